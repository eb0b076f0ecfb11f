"""A build follows its recipe in layers, neighbouring years, reducers and shifts."""

from __future__ import annotations

import dataclasses
import functools
from datetime import UTC, datetime

import numpy as np
import pytest
import xarray as xr

from known_builds import args, run_here
from minecube import cube, scenes
from minecube.catalog import Registration, load_recipes, load_sites, load_sources
from minecube.composite import reducers
from minecube.errors import SceneError
from minecube.jobs import build as building


@pytest.mark.parametrize(
    ("recipe", "layers"),
    [
        ("annual-geomedian", {"emad": "float32", "smad": "float32", "bcmad": "float32"}),
        ("summer-bap", {"day_of_year": "uint16"}),
        ("eurominenet", {}),
    ],
)
def test_every_recipe_is_built(world, built, tmp_path, recipe, layers):
    """Its layers are in the cube, of both years, and later years find room for them."""
    store = tmp_path / "cubes.zarr"
    for years in ("2020", "2022"):
        run_here("build", *args(world, store, years), "--recipe", recipe)
    made, usual = (xr.open_zarr(s, group="pit", consolidated=False) for s in (store, built))
    types, usual_types = (
        {name: str(v.dtype) for name, v in each.data_vars.items()} for each in (made, usual)
    )
    assert types == usual_types | layers
    seen = made.reflectance.values.all(axis=1)
    assert seen.mean() > 0.9
    off = (made.reflectance.astype(float) - usual.reflectance.astype(float)).values.transpose(
        0, 2, 3, 1
    )[seen] / 1e4
    assert np.sqrt((off**2).mean()) < 0.05
    for name in layers:
        values = made[name].values
        assert (values[seen] >= 0).all()
        assert (
            np.isnan(values[~seen]).all()
            if layers[name] == "float32"
            else (values[~seen] == 0).all()
        )
    assert all("shifts" in made for made in cube.read_markers(cube.Store(store), "pit").values())


def test_a_neighbouring_year_gives_what_it_has_and_is_never_passed_over(world, tmp_path):
    """One without scenes has none to give; one that could not be searched fails the year, which it would change unseen."""
    (site,) = load_sites(world / "sites.geojson")
    (source,) = load_sources(world / "archive" / "sources.yaml").values()
    recipe = load_recipes()["summer-bap"]
    job = building.BuildJob(
        store=cube.Store("none"), sources=(source,), recipe=recipe, snapshots=tmp_path
    )
    listed = {year: scenes.search(site, year, source) for year in (2020, 2022)}
    asked = []

    def find(_site, year, *_):
        asked.append(year)
        if year == 2021:
            return listed[2020]
        if year in listed:
            return listed[year]
        return scenes.search(site, year, source)  # which finds nothing

    _, chosen = building.choose_scenes(job, site, 2022, find)
    assert asked == [2022, 2021, 2023]
    summer = [
        s.id
        for s in listed[2020].scenes
        if s.datetime.month in recipe.months and s.properties["eo:cloud_cover"] <= 90
    ]
    assert {s.id for s in chosen if s.datetime.year == 2020} == set(summer) != set()
    last, asked = datetime.now(tz=UTC).year, []
    building.choose_scenes(
        job, site, last, lambda _site, year, *_: asked.append(year) or listed[2020]
    )
    assert asked == [last, last - 1]  # no year to come

    def fails(_site, year, *_):
        if year == 2023:
            raise SceneError("the API does not answer")
        return listed[2022]

    with pytest.raises(SceneError, match="does not answer"):
        building.choose_scenes(job, site, 2022, fails)


def test_a_build_uses_the_reducers_it_is_given(world, tmp_path):
    """What `--device` chooses: here numpy's geomedian, lifted by 1 to show it."""
    sites = load_sites(world / "sites.geojson")
    (source,) = load_sources(world / "archive" / "sources.yaml").values()
    recipe = dataclasses.replace(load_recipes()["naive-median"], reducer="geomedian")
    cubes = {}

    def lifted(lift, stack):
        result = reducers.geomedian(stack)
        return result._replace(reflectance=result.reflectance + np.uint16(lift))

    for lift in (0, 1):
        store = str(tmp_path / f"{lift}.zarr")
        job = building.BuildJob(
            store=cube.Store(store),
            sources=(source,),
            recipe=recipe,
            snapshots=tmp_path,
            geomedian=functools.partial(lifted, lift),
        )
        assert [o.state for o in building.build_cubes(job, sites, [2020])] == ["built"]
        cubes[lift] = xr.open_zarr(store, group="pit", consolidated=False)["reflectance"].load()
    np.testing.assert_array_equal(cubes[1], cubes[0] + 1)


def test_a_scene_beside_the_others_is_left_out_of_the_build(world, tmp_path, monkeypatch):
    sites = load_sites(world / "sites.geojson")
    (source,) = load_sources(world / "archive" / "sources.yaml").values()
    asked, found = {}, building.registration.measure_shifts

    def accused(beside_m, scenes_, *rest):
        return [
            dataclasses.replace(s, dx_m=beside_m, dy_m=0.0) if n < 1 else s
            for n, s in enumerate(found(scenes_, *rest))
        ]

    for beside_m in (0.0, 20.0):
        monkeypatch.setattr(
            building.registration, "measure_shifts", functools.partial(accused, beside_m)
        )
        recipe = dataclasses.replace(
            load_recipes()["naive-median"], registration=Registration(most_px=0.5, beyond="drop")
        )
        job = building.BuildJob(
            store=cube.Store(tmp_path / f"{beside_m}"),
            sources=(source,),
            recipe=recipe,
            snapshots=tmp_path,
        )
        (made,) = building.build_cubes(job, sites, [2020])
        assert made.state == "built"
        asked[beside_m] = made.reads["planned"]
        (kept,) = cube.read_markers(job.store, "pit").values()
        assert kept["shifts"][0]["dx_m"] == beside_m
    assert asked[0.0] - asked[20.0] == 11  # ten bands and SCL of one scene, in the site's one block
