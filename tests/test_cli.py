"""The command line as a user meets it: help, the whole way on a small world, and one clear sentence for every mistake."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import io
import json
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import typing
import urllib.request
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import geopandas as gpd
import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio
import stac_geoparquet.arrow
import xarray as xr
import yaml
import zarr
from click.testing import CliRunner
from shapely.geometry import box

from known_scenes import site_of
from minecube import cube, scenes
from minecube.catalog import Registration, load_recipes, load_sites, load_sources
from minecube.cli import COMMANDS, cli
from minecube.composite import reducers
from minecube.errors import SceneError
from minecube.jobs import build as building
from minecube.simulate import World, simulate_archive


def run(*arguments, ok=0, cwd=None):
    """The command in a process of its own; (standard output, standard error)."""
    command = [sys.executable, "-c", "from minecube.cli import main; main()", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == ok, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


def run_here(*arguments, ok=0):
    """The same within this process, which spares the seconds of importing."""
    done = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert done.exit_code == ok, f"exit {done.exit_code}\n{done.output}"
    return done.stdout, done.stderr


def commands():
    """All commands and subcommands that take options, by name."""
    for name in COMMANDS:
        command = getattr(importlib.import_module(f"minecube.cli.{name}"), name)
        yield name, command
        for below, subcommand in getattr(command, "commands", {}).items():
            yield f"{name} {below}", subcommand


def test_every_option_reaches_its_command():
    """By its own name, or as a field of a dataclass that the command receives."""
    collected = 0
    for name, command in commands():
        function = command.callback
        if not hasattr(function, "__wrapped__") or name.startswith("models"):
            continue
        options = {param.name for param in command.params if param.expose_value}
        hints = typing.get_type_hints(function.__wrapped__)
        fields = [
            {field.name for field in dataclasses.fields(hints[parameter])}
            for parameter in set(hints) - options - {"return"}
        ]
        assert options <= set(hints).union(*fields), name
        for parameter in set(hints) - options - {"return"}:  # none is missing without a default
            for field in dataclasses.fields(hints[parameter]):
                optional = (field.default, field.default_factory) != (dataclasses.MISSING,) * 2
                assert optional or field.name in options, (name, field.name)
        collected += 1
    assert collected > 15


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_shows_an_example(command):
    out, _ = run_here(command, "--help")
    assert "Example" in out
    assert f"minecube {command}" in out
    assert re.search(r"^  Examples?:$", out, re.MULTILINE)  # where help begins, not astray
    assert not re.search(r"\b(XXX|TODO|FIXME)\b", out)


def test_the_list_of_commands():
    out, _ = run("--help")
    listed = out.split("Commands:")[1]
    assert [
        line.split()[0] for line in listed.splitlines() if line.startswith("  ") and line[2] != " "
    ] == list(COMMANDS)


def test_the_list_of_sites_says_which_years():
    out, _ = run_here("sites", "--sites", "demo_1,Austria_1")
    demo, austria = (line.split() for line in out.splitlines()[2:])
    assert demo == [
        "demo_1",
        "Simulated",
        "train",
        "2015,2020,2022",
        "EPSG:32633",
        "384",
        "x",
        "384",
        "px",
    ]
    assert austria == ["Austria_1", "Austria", "train", "2015-2024", "no", "polygon", "yet"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A site of 120 x 96 px, two years, one provider; polygons of the site and of its mine."""
    folder = tmp_path_factory.mktemp("world")
    site = site_of("pit", 360000, 5600040, 120, 96)
    simulate_archive(
        [site],
        folder / "archive",
        World(years=(2020, 2022), dates_per_year=6, winter_dates=1, styles=("earth-search",)),
    )
    gpd.GeoDataFrame({"id": ["pit"], "margin": [0]}, geometry=[site.geometry], crs=4326).to_file(
        folder / "sites.geojson"
    )
    return folder


@pytest.fixture(scope="module")
def built(world):
    """That world built and labelled: the store."""
    store = world / "cubes.zarr"
    out, _ = run("build", *args(world, store))
    assert out.count("built") == 2
    run("label", "--store", store, "--polygons", world / "archive" / "truth_footprints.parquet")
    return store


def args(world, store, years="2020,2022", source="sim-earth-search"):
    return (
        "--sites",
        world / "sites.geojson",
        "--years",
        years,
        "--catalog",
        world / "archive",
        "--source",
        source,
        "--store",
        store,
    )


def test_built_cubes_and_labels(world, built):
    cubes = xr.open_zarr(built, group="pit", consolidated=False)
    truth = xr.open_zarr(world / "archive" / "truth.zarr", group="pit", consolidated=False)
    np.testing.assert_array_equal(cubes.footprint, truth.footprint)
    seen = cubes.reflectance.values > 0
    assert seen.mean() > 0.99
    error = (cubes.reflectance.astype(float) - truth.reflectance.astype(float)).values[seen] / 1e4
    assert np.sqrt((error**2).mean()) < 0.03
    provenance = cube.read_markers(cube.Store(built), "pit")[2022]
    assert {s["source"] for s in provenance["scenes"]} == {"sim-earth-search"}
    assert all(s["offset"] == 0 and "is true" in s["offset_reason"] for s in provenance["scenes"])


def test_a_second_build_keeps_everything_and_needs_no_archive(world, built, tmp_path):
    """The scene lists were saved: the same build again works with the source gone, and does nothing."""
    shutil.copytree(
        world / "archive",
        tmp_path / "archive",
        ignore=shutil.ignore_patterns("earth-search", "*.parquet"),
    )
    shutil.copy(world / "sites.geojson", tmp_path)
    out, _ = run("build", *args(tmp_path, built))
    assert out.count("kept") == 2
    assert "built" not in out


def test_dry_run_writes_nothing(world, tmp_path):
    out, _ = run("build", *args(world, tmp_path / "new.zarr"), "--dry-run")
    assert "nothing was read or written" in out
    assert "to build" in out
    assert list(tmp_path.iterdir()) == []


def test_label_keeps_the_fraction_beside_the_footprint(built):
    opened = cube.open_cube(cube.Store(built), "pit")
    fraction, mine = opened.footprint_fraction.values, opened.footprint.values == 1
    assert (fraction != 255).all()
    # A convex corner may hide in a pixel, no more: most pixels are all or nothing, and the sums agree.
    assert (fraction[mine] > 0).all()
    assert (fraction[~mine] < 250).all()
    assert fraction.sum(dtype=float) / 250 == pytest.approx(mine.sum(), rel=0.02)


def test_train_predict_score_export(built, tmp_path):
    model = tmp_path / "model.pt"
    run("train", "--store", built, "--out", model, "--epochs", "2")
    run("predict", "--store", built, "--model", model)
    out, _ = run("score", "--store", built, "--json", tmp_path / "scores.json")
    assert "ca_tiou" in out
    scores = json.loads((tmp_path / "scores.json").read_text())
    ((name, scored),) = scores["models"].items()
    assert name == cube.find_prediction(cube.Store(built), ["pit"], "unet-small")
    sites = scored["sites"]
    assert sites["pit"] == sites["pooled"]
    out, _ = run("export", "--store", built, "--out", tmp_path / "export", "--model", "unet-small")
    made = {p.name for p in (tmp_path / "export").rglob("*") if p.is_file()}
    assert {
        "collection.json",
        "pit_2020_reflectance.tif",
        "pit_2022_probability.tif",
        "pit_strip.png",
        "areas.png",
    } <= made
    kinds = [f"footprints_{kind}" for kind in ("labels", "mapped")]
    assert {f"{kind}.{suffix}" for kind in kinds for suffix in ("parquet", "gpkg")} <= made
    for kind in kinds:
        outlines = gpd.read_parquet(tmp_path / "export" / f"{kind}.parquet")
        assert not outlines.duplicated(["year", "id"]).any()
        assert outlines["id"].str.startswith("pit_").all()
        assert (outlines.to_crs(3035).area / outlines["area_m2"]).between(0.995, 1.005).all()
        beside = gpd.read_file(tmp_path / "export" / f"{kind}.gpkg")
        assert beside["id"].tolist() == outlines["id"].tolist()
        assert beside.geometry.geom_equals_exact(outlines.geometry, 1e-9).all()
    run("export", "--store", built, "--out", tmp_path / "large", "--min-area", "20000")
    large = gpd.read_parquet(tmp_path / "large" / "footprints_labels.parquet")
    small = gpd.read_parquet(tmp_path / "export" / "footprints_labels.parquet")
    assert large["area_m2"].min() >= 20000
    assert len(large) == (small["area_m2"] >= 20000).sum()
    _, err = run("export", "--store", built, "--out", tmp_path / "none", "--min-area", "-1", ok=2)
    assert "--min-area" in err
    _, err = run("score", "--store", built, "--model", "other", ok=2)
    assert "no prediction of 'other' for pit" in err


def test_other_scenes_are_refused_unless_told(world, built, tmp_path):
    """A scene list from which one scene is gone is another build."""
    from minecube.scenes import SearchResult, snapshot

    (site,) = load_sites(world / "sites.geojson")
    source = load_sources(world / "archive" / "sources.yaml")["sim-earth-search"]
    (lists := tmp_path / "lists").mkdir()
    for path in (world / "cubes.zarr-scenes").glob("*.parquet"):
        listed = snapshot.load(path).scenes
        summer = [
            s
            for s in listed
            if 4 <= s.datetime.month <= 10 and s.properties["eo:cloud_cover"] <= 90
        ]
        kept = [s for s in listed if "2020" not in path.name or s.id != summer[0].id]
        belongs = snapshot.hash_search(site, int(path.name.split("_")[1]), [source])
        snapshot.save(
            SearchResult(scenes=tuple(kept), listed=len(kept)), lists / path.name, belongs
        )
    store = tmp_path / "cubes.zarr"
    shutil.copytree(built, store)
    out, err = run("build", *args(world, store), "--scenes", lists, ok=1)
    assert out.count("kept") == 1
    assert "pit 2020" in err
    assert "use --overwrite to replace it" in err
    assert "1 of 2 site-years failed; " in err
    assert f"{store} keeps an older build of them" in err
    assert "1 of 2 site-years failed" in err
    out, _ = run("build", *args(world, store), "--scenes", lists, "--overwrite")
    assert (out.count("built"), out.count("kept")) == (1, 1)


def test_a_missing_and_a_truncated_file_fail_one_site_year_each_and_nothing_else(world, tmp_path):
    shutil.copytree(world / "archive", tmp_path / "archive")
    shutil.copy(world / "sites.geojson", tmp_path)
    # A file that the composite needs: of the clearest summer scene.
    victims = sorted((tmp_path / "archive" / "earth-search").glob("*_20220[5-9]*/B04.tif"))
    for path in victims:
        path.unlink()
    out, err = run("build", *args(tmp_path, tmp_path / "cubes.zarr"), ok=1)
    assert out.count("built") == 1
    assert "B04.tif: cannot be read" in err
    assert "No such file" in err
    assert list(cube.read_markers(cube.Store(tmp_path / "cubes.zarr"), "pit")) == [2020]
    for path in sorted((tmp_path / "archive" / "earth-search").glob("*_20200[5-9]*/B08.tif")):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    out, err = run("build", *args(tmp_path, tmp_path / "cubes2.zarr"), ok=1)
    assert "2 of 2 site-years failed" in err
    assert "B08.tif: cannot be read" in err
    assert cube.read_markers(cube.Store(tmp_path / "cubes2.zarr"), "pit") == {}


def test_an_interrupted_build_goes_on(world, tmp_path):
    """Killed while it writes: what is committed stays, the rest is built by the same command."""
    import os

    store = tmp_path / "cubes.zarr"
    command = [
        sys.executable,
        "-c",
        "from minecube.cli import main; main()",
        "build",
        *map(str, args(world, store)),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(store.glob("pit/builds/*/zarr.json")) and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (130, 0)  # 0: it was through already
    if process.returncode:
        assert "run the same command again to resume" in err
    run("build", *args(world, store))
    assert list(cube.read_markers(cube.Store(store), "pit")) == [2020, 2022]


BAD = {
    "unknown site": (
        ("sites", "--sites", "Atlantis_*"),
        "unknown site 'Atlantis_*'; the catalogue has Austria_1",
    ),
    "no such file": (("sites", "--sites", "mines.geojson"), "mines.geojson: no such file"),
    "years": (
        ("search", "--sites", "demo_1", "--years", "20x", "--source", "cdse"),
        "expected years such as 2019-2023",
    ),
    "years backwards": (
        ("search", "--sites", "demo_1", "--years", "2023-2019", "--source", "cdse"),
        "expected years such as",
    ),
    "unknown source": (
        ("search", "--sites", "demo_1", "--years", "2020", "--source", "nasa"),
        "unknown source 'nasa'; there is: cdse, earth-",
    ),
    "unknown command": (("fly",), "No such command 'fly'"),
    "no store": (
        ("export", "--store", "nowhere.zarr", "--out", "x"),
        "nowhere.zarr: there is no store",
    ),
    "no model": (
        ("train", "--store", "nowhere.zarr", "--out", "x", "--model", "gpt"),
        "unknown model 'gpt'; there is: a2net",
    ),
    "no polygons": (("label", "--store", "nowhere.zarr", "--polygons", "no.gpkg"), "no.gpkg"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_use(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, said = BAD[case]
    out, err = run_here(*arguments, ok=2)
    assert said in out + err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--years": "2012"}, "year 2012: expected 2015"),
        ({"--years": "2099"}, "year 2099: expected 2015"),
        ({"--device": "gpu7"}, "device 'gpu7' is not one that torch knows"),
        (
            {"--recipe": "winter-mean"},
            "unknown recipe 'winter-mean'; there is: annual-geomedian, annual-median",
        ),
        ({"--source": "nasa"}, "unknown source 'nasa'"),
        ({"--store": "/proc/cubes.zarr"}, "cannot be written"),
        ({"--sites": "Germany_1"}, "site 'Germany_1' has no area of interest yet"),
        ({"--scheduler": "tcp://127.0.0.1:1"}, "no Dask scheduler answers at tcp://127.0.0.1:1"),
        ({"--scheduler": "cluster"}, "no Dask scheduler answers at cluster (missing port number"),
    ],
)
def test_a_bad_build(world, tmp_path, change, said, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = dict(zip(*[iter(args(world, tmp_path / "new.zarr"))] * 2, strict=True)) | change
    _, err = run_here("build", *[v for pair in given.items() for v in pair], ok=2)
    assert said in err
    assert list(tmp_path.iterdir()) == []


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


def test_a_store_keeps_the_margin_it_was_built_with(world, tmp_path):
    """The default is 1 km; stores made before there were margins, or with another one, stay as they are."""
    (tmp_path / "mine").mkdir()
    frame = gpd.read_file(world / "sites.geojson").drop(columns="margin")
    frame.to_file(tmp_path / "mine" / "sites.geojson")
    inside = ["--sites", tmp_path / "mine" / "sites.geojson"]

    def built(store, *more, ok=0):
        lists = ["--scenes", tmp_path / f"{store}-scenes"]
        return run_here(
            "build", *inside, *args(world, tmp_path / store, "2020")[2:], *lists, *more, ok=ok
        )

    assert "324 x 300 px" not in run_here("sites", "--sites", world / "sites.geojson")[0]
    out, err = run_here("sites", *inside)
    assert "EPSG:32633 324 x 300 px" in out  # 17 times 60 m more on each side
    assert err == "margin around pit: 1000 m\n"
    assert "EPSG:32633 144 x 120 px" in run_here("sites", *inside, "--margin", 100)[0]
    _, err = built("old", "--margin", 0)
    assert err == ""
    assert (
        "margin" not in zarr.open_group(tmp_path / "old")["pit"].attrs["minecube"]
    )  # as in stores of earlier versions
    out, err = built("old")
    assert "kept" in out
    assert err.splitlines()[0] == f"margin around pit: 0 m, as in {tmp_path / 'old'}"
    _, err = built("old", "--margin", 500, ok=2)
    assert (
        "polygon or --margin has changed (the store has a margin of 0 m, asked for was 500 m)"
        in err
    )
    out, err = built("new", "--margin", 100)
    assert "built" in out
    assert "margin around pit: 100 m" in err
    out, err = built("new")
    assert "kept" in out
    assert f"margin around pit: 100 m, as in {tmp_path / 'new'}" in err
    out, _ = run_here(
        "plan",
        *inside,
        *args(world, tmp_path / "new", "2020")[2:],
        "--scenes",
        tmp_path / "new-scenes",
    )
    assert "committed" in out
    wide, narrow = (
        xr.open_zarr(tmp_path / name, group="pit", consolidated=False) for name in ("new", "old")
    )
    assert (wide.sizes["x"], wide.sizes["y"]) == (144, 120)  # twice 60 m on each side
    assert wide.x.values[12:-12].tolist() == narrow.x.values.tolist()
    assert wide.y.values[12:-12].tolist() == narrow.y.values.tolist()


def test_a_country_is_shown_its_plan_and_not_built(world, tmp_path):
    (pit,) = load_sites(world / "sites.geojson")
    x, y = pit.geometry.centroid.coords[0]
    gpd.GeoDataFrame(
        {"id": ["country"]}, geometry=[box(x - 1, y - 0.7, x + 1, y + 0.7)], crs=4326
    ).to_file(tmp_path / "country.geojson")
    given = [
        "--sites",
        tmp_path / "country.geojson",
        *args(world, tmp_path / "new.zarr", "2020")[2:],
    ]
    out, err = run_here("build", *given, ok=2)
    assert "MB a block" in out  # the plan
    (km2,) = re.findall(r"country \(([\d,]+) km2\): larger than 2500 km2", err)
    assert (
        18_000 < int(km2.replace(",", "")) < 28_000
    )  # 1.4 of 111 km by 2 of 65..75, and what the grid adds at its corners
    assert [f.name for f in tmp_path.iterdir()] == ["country.geojson"]


def test_a_large_site_is_built_when_asked_twice(world, tmp_path, monkeypatch):
    monkeypatch.setattr("minecube.cli.build.LARGE_KM2", 1)
    asked = args(world, tmp_path / "new.zarr", "2020")
    assert "pit (1 km2): larger than 1 km2" in run_here("build", *asked, ok=2)[1]
    assert "built" in run_here("build", *asked, "--yes")[0]


def test_an_empty_search_says_how_to_widen_it_and_leaves_nothing(world, tmp_path):
    _, err = run("build", *args(world, tmp_path / "new.zarr", years="2019"), ok=1)
    assert "no scene of 2019 over pit (west, south, east, north" in err
    assert "try another year or --source" in err
    assert list(tmp_path.iterdir()) == []


def test_polygons_that_do_not_fit(built, world, tmp_path):
    far = gpd.GeoDataFrame(geometry=[box(30, 10, 30.1, 10.1)], crs=4326)
    far.to_file(tmp_path / "far.gpkg")
    _, err = run("label", "--store", built, "--polygons", tmp_path / "far.gpkg", ok=2)
    assert "km" in err
    no_crs = gpd.GeoDataFrame(geometry=[box(30, 10, 30.1, 10.1)])
    no_crs.to_parquet(tmp_path / "no_crs.parquet")
    _, err = run("label", "--store", built, "--polygons", tmp_path / "no_crs.parquet", ok=2)
    assert "no CRS" in err


def test_an_invalid_polygon_is_repaired_and_reported(world, built, tmp_path):
    site = gpd.read_file(world / "sites.geojson").geometry[0]
    west, south, east, north = site.bounds
    bowtie = (
        f"POLYGON(({west} {south}, {east} {north}, {east} {south}, {west} {north}, {west} {south}))"
    )
    gpd.GeoDataFrame(geometry=gpd.GeoSeries.from_wkt([bowtie]), crs=4326).to_file(
        tmp_path / "bowtie.gpkg"
    )
    shutil.copytree(built, tmp_path / "cubes.zarr")
    _, err = run(
        "label", "--store", tmp_path / "cubes.zarr", "--polygons", tmp_path / "bowtie.gpkg"
    )
    assert "repaired" in err


def test_a_later_source_fills_what_the_first_lacks(world, tmp_path):
    """The first source lists half of the acquisitions: those come from it, the others from the second, none from both."""
    shutil.copytree(world / "archive", tmp_path / "archive")
    shutil.copy(world / "sites.geojson", tmp_path)
    known = yaml.safe_load((tmp_path / "archive" / "sources.yaml").read_text())
    items = items_of(tmp_path / "archive" / "earth-search.parquet")
    takes = sorted({i["properties"]["s2:datatake_id"][:25] for i in items})
    half = [i for i in items if i["properties"]["s2:datatake_id"][:25] in takes[::2]]
    write_items(half, tmp_path / "archive" / "half.parquet")
    known["half"] = {**known["sim-earth-search"], "href": "half.parquet"}
    (tmp_path / "archive" / "sources.yaml").write_text(yaml.safe_dump(known))
    whole, mixed = tmp_path / "whole.zarr", tmp_path / "mixed.zarr"
    run("build", *args(tmp_path, whole, years="2022"))
    run("build", *args(tmp_path, mixed, years="2022", source="half,sim-earth-search"))
    provenance = cube.read_markers(cube.Store(mixed), "pit")[2022]
    by_source = {
        s: {x["id"] for x in provenance["scenes"] if x["source"] == s}
        for s in ("half", "sim-earth-search")
    }
    assert all(by_source.values())
    assert by_source["half"] == {x["id"] for x in provenance["scenes"]} & {i["id"] for i in half}
    assert sorted(i for ids in by_source.values() for i in ids) == sorted(
        x["id"] for x in cube.read_markers(cube.Store(whole), "pit")[2022]["scenes"]
    )
    one, other = (
        xr.open_zarr(s, group="pit", consolidated=False).drop_attrs() for s in (whole, mixed)
    )
    xr.testing.assert_identical(one.load(), other.load())


def test_provenance_tells_the_reads(world, built):
    """Planned and read agree with the scenes and bands of the composite, by hand."""
    made, reads = (
        cube.read_markers(cube.Store(built), "pit")[2022],
        cube.read_counts(cube.Store(built), "pit", 2022),
    )
    totals = made["reads"]
    assert totals["completeness"] == 1
    assert totals["lost"] == totals["retried"] == totals["requests"] == 0  # local files
    assert totals["read"] == totals["planned"] == reads.planned.sum()
    assert totals["bytes"] == reads.bytes.sum() > 0
    ids = {s["id"] for s in made["scenes"]}
    assert set(reads.scene) <= ids
    assert (
        set(reads[reads.band == "SCL"].scene) == ids
    )  # the mask of every scene, the bands of those that are needed
    assert (made["offset_conflicts"], made["refused"], made["on_offset_conflict"]) == (
        [],
        {},
        "drop",
    )
    assert len(made["snapshot"]) == 64


def test_a_plan_holds(world, tmp_path):
    """What is read is at most what was planned, and not far from it; the plan writes nothing and works with the API gone."""
    prices = tmp_path / "prices.yaml"
    prices.write_text("per_1000_requests: 0.0004\nper_gb: 0.09\ncurrency: EUR\n")
    out, _ = run("plan", *args(world, tmp_path / "new.zarr"), "--prices", prices)
    assert "cost EUR" in out
    assert "nothing was read or written" in out
    assert not (tmp_path / "new.zarr").exists()
    assert "(a guess, since this store has no builds to compare with" in out
    rows = {line.split()[1]: line.split() for line in out.splitlines() if line.startswith("pit")}
    out, _ = run("build", *args(world, tmp_path / "new.zarr"))
    assert "planned, at most" in out
    for year in ("2020", "2022"):
        planned_reads = int(rows[year][rows[year].index("build") + 3])
        totals = cube.read_markers(cube.Store(tmp_path / "new.zarr"), "pit")[int(year)]["reads"]
        assert planned_reads / 3 < totals["planned"] <= planned_reads
    out, _ = run("plan", *args(world, tmp_path / "new.zarr"))
    assert out.count("committed") == 2
    assert "expected time: 0 s in all" in out
    assert "(from 2 builds in this store, which took" in out
    for made in cube.read_markers(cube.Store(tmp_path / "new.zarr"), "pit").values():
        took = made["took"]
        assert took["checks"] == made["check_reads"]["planned"]
        assert took["reads"] >= made["reads"]["planned"]
        assert took["seconds"] > 0
    prices.write_text("per_gigabit: 1\n")
    _, err = run("plan", *args(world, tmp_path / "new.zarr"), "--prices", prices, ok=2)
    assert "prices.yaml: field 'per_gigabit': expected one of latency_s" in err


def test_a_lost_read_may_be_allowed(world, tmp_path):
    """One file gone: refused, then committed with what is there, and the cube says so."""
    shutil.copytree(world / "archive", tmp_path / "archive")
    shutil.copy(world / "sites.geojson", tmp_path)
    sorted((tmp_path / "archive" / "earth-search").glob("*_20220[5-9]*/B11.tif"))[-1].unlink()
    store = tmp_path / "cubes.zarr"
    run("build", *args(tmp_path, store), ok=1)
    out, err = run("build", *args(tmp_path, store), "--min-read-completeness", "0.9")
    assert (out.count("built"), out.count("kept")) == (1, 1), err
    share = cube.read_markers(cube.Store(store), "pit")[2022]["reads"]["completeness"]
    assert 0.9 < share < 1
    assert xr.open_zarr(store, group="pit", consolidated=False).attrs["incomplete_reads"] == {
        "2022": share
    }
    reads = cube.read_counts(cube.Store(store), "pit", 2022)
    assert reads[reads.lost > 0].band.tolist() == ["B11"]
    assert "No such file" in reads[reads.lost > 0].reason.item()
    out, err = run("build", *args(tmp_path, store))  # accepted once, it stays
    assert out.count("kept") == 2
    assert err == f"pit 2022: has {share:.2%} of its reads; use --overwrite to build it again\n"
    _, err = run("build", *args(tmp_path, store), "--overwrite", ok=1)
    assert "1 of 2 site-years failed; " in err
    assert (
        cube.read_markers(cube.Store(store), "pit")[2022]["reads"]["completeness"] == share
    )  # the old year stays


@pytest.mark.parametrize("policy", ["warn", "fix", "drop", "fail"])
def test_a_wrong_flag(world, built, tmp_path, policy):
    """A scene that says its offset is removed though it is not: all its numbers are 1000 too high."""
    shutil.copytree(world / "archive", tmp_path / "archive")
    shutil.copy(world / "sites.geojson", tmp_path)
    items = gpd.read_parquet(tmp_path / "archive" / "earth-search.parquet")
    clear = items[
        (items.datetime.dt.year == 2022) & items.datetime.dt.month.between(5, 9)
    ].sort_values("eo:cloud_cover")
    victim = clear.iloc[0]["id"]
    for path in (tmp_path / "archive" / "earth-search" / victim).glob("B*.tif"):
        with rasterio.open(path) as src:
            profile, pixels = src.profile, src.read(1)
        path.unlink()
        with rasterio.open(path, "w", **{**profile, "driver": "GTiff"}) as out:
            out.write(np.where(pixels == 0, 0, pixels + 1000).astype(np.uint16), 1)
    store = tmp_path / "cubes.zarr"
    out, err = run(
        "build",
        *args(tmp_path, store, years="2022"),
        "--on-offset-conflict",
        policy,
        ok=1 if policy == "fail" else 0,
    )
    if policy == "fail":
        assert "1 of" in err
        assert f"{victim}: offset 0 contradicts its pixels" in err
        assert cube.read_markers(cube.Store(store), "pit") == {}
        return
    made = cube.read_markers(cube.Store(store), "pit")[2022]
    (conflict,) = made["offset_conflicts"]
    assert (conflict["scene"], conflict["offset"], conflict["should_be"]) == (victim, 0, -1000)
    assert 850 < conflict["step"] < 1150
    plain, got = (
        xr.open_zarr(s, group="pit", consolidated=False).reflectance.sel(year=2022).values
        for s in (built, store)
    )
    if policy == "fix":
        np.testing.assert_array_equal(
            np.abs(got.astype(int) - plain) <= 1, True
        )  # what was 0 or 1 cannot be told any more
    else:
        assert (got != plain).any()


# The main thread, which hears signals, is not the one that is given this; and it is not ignored, as in a shell's background.
ANOTHER_IS_GIVEN_IT = """
import signal, threading
signal.signal(signal.SIGINT, signal.default_int_handler)
threading.Thread(target=threading.Event().wait, daemon=True).start()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
from minecube.cli import main
main()
"""


def test_an_interrupt_is_heard_while_a_server_is_in_trouble(world, tmp_path):
    """Every image is answered with 503, which is waited out for minutes; not after Ctrl-C, whatever thread is given it."""
    shutil.copytree(
        world / "archive", tmp_path / "archive", ignore=shutil.ignore_patterns("truth*")
    )
    shutil.copy(world / "sites.geojson", tmp_path)
    server = [
        sys.executable,
        str(Path(__file__).with_name("range_server.py")),
        str(tmp_path / "archive"),
        "--fail",
        "1",
    ]
    process = subprocess.Popen(server, stdout=subprocess.PIPE, text=True)
    try:
        url = f"http://127.0.0.1:{process.stdout.readline().strip()}"
        known = yaml.safe_load((tmp_path / "archive" / "sources.yaml").read_text())
        known["sim-earth-search"]["href"] = f"{url}/earth-search.parquet"
        (tmp_path / "archive" / "sources.yaml").write_text(yaml.safe_dump(known))
        command = [sys.executable, "-c", ANOTHER_IS_GIVEN_IT, "build"]
        build = subprocess.Popen(
            [*command, *map(str, args(tmp_path, tmp_path / "new.zarr"))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        failed = 0
        while failed < 100 and build.poll() is None:  # it is in the midst of it
            time.sleep(0.2)
            with urllib.request.urlopen(f"{url}/counts") as answer:
                failed = json.load(answer)["failed"]
        build.send_signal(signal.SIGINT)
        start = time.monotonic()
        try:
            _, err = build.communicate(timeout=60)
        finally:
            build.kill()
            build.communicate()
    finally:
        process.terminate()
        process.communicate()
    assert time.monotonic() - start < 30
    assert build.returncode == 130, err
    assert "interrupted; committed years are safe" in err
    assert cube.read_markers(cube.Store(tmp_path / "new.zarr"), "pit") == {}


LOUD = "import logging; logging.basicConfig(level=logging.DEBUG); from minecube.cli import main; main()"


def test_no_signature_is_written(world, built, tmp_path):
    """Tokens that expire during the build: nothing lost, and no file, log or line on the screen holds one."""
    shutil.copytree(world / "archive", tmp_path / "archive")
    shutil.copy(world / "sites.geojson", tmp_path)
    server = [
        sys.executable,
        str(Path(__file__).with_name("range_server.py")),
        str(tmp_path / "archive"),
    ]
    process = subprocess.Popen(
        [*server, "--token-life", "0.5", "--delay", "0.02"], stdout=subprocess.PIPE, text=True
    )
    try:
        url = f"http://127.0.0.1:{process.stdout.readline().strip()}"
        known = yaml.safe_load((tmp_path / "archive" / "sources.yaml").read_text())
        known["sim-earth-search"] |= {
            "href": f"{url}/earth-search.parquet",
            "access": {"kind": "planetary-computer", "href": f"{url}/token"},
        }
        (tmp_path / "archive" / "sources.yaml").write_text(yaml.safe_dump(known))
        store = tmp_path / "cubes.zarr"
        done = subprocess.run(
            [sys.executable, "-c", LOUD, "-v", "build", *map(str, args(tmp_path, store))],
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        process.terminate()
        process.communicate()
    assert done.returncode == 0, done.stderr[-2000:]
    assert "127.0.0.1" in done.stderr  # the log tells requests
    assert "sig=" not in done.stdout + done.stderr
    written = [p for p in tmp_path.rglob("*") if p.is_file() and "archive" not in p.parts]
    assert len(written) > 20
    assert not [p for p in written if b"sig=" in p.read_bytes()]
    for year in (2020, 2022):  # these are compressed
        for name in ("scenes", "reads"):
            content = zarr.open_array(store, path=f"pit/builds/{year}/{name}", mode="r")[
                :
            ].tobytes()
            assert not any(
                b"sig=" in str(row).encode()
                for row in pq.read_table(io.BytesIO(content)).to_pylist()
            )
    for year in (2020, 2022):
        totals = cube.read_markers(cube.Store(store), "pit")[year]["reads"]
        assert (totals["lost"], totals["completeness"]) == (0, 1)
        assert totals["requests"] > 0
    a, b = (
        xr.open_zarr(s, group="pit", consolidated=False).drop_vars(
            ["footprint", "footprint_fraction"]
        )
        for s in (built, store)
    )
    xr.testing.assert_identical(a.drop_attrs().load(), b.drop_attrs().load())


def test_bad_sources(world, tmp_path, monkeypatch):
    """Each is one sentence, exit 2, and nothing written."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    shutil.copytree(
        world / "archive", tmp_path / "archive", ignore=shutil.ignore_patterns("earth-search")
    )
    shutil.copy(world / "sites.geojson", tmp_path)
    known = yaml.safe_load((tmp_path / "archive" / "sources.yaml").read_text())
    raw = items_of(tmp_path / "archive" / "earth-search.parquet")[:4]
    for item in raw:
        item["properties"].pop("s2:datastrip_id")
    write_items(raw, tmp_path / "archive" / "unusable.parquet")
    with html_server() as url:
        known["keyless"] = {
            **known["sim-earth-search"],
            "access": {"kind": "s3", "href": "https://eodata.example.org"},
        }
        known["html"] = {**known["sim-earth-search"], "kind": "stac-api", "href": url}
        known["unusable"] = {**known["sim-earth-search"], "href": "unusable.parquet"}
        (tmp_path / "archive" / "sources.yaml").write_text(yaml.safe_dump(known))
        for source, code, said in (
            ("keyless", 2, "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY not set"),
            ("html", 1, "the search for 2020 failed"),
            ("unusable", 2, "names no acquisition"),
            ("html,html", 2, "expected each source once"),
        ):
            before = sorted(tmp_path.rglob("*"))
            out, err = run("build", *args(tmp_path, tmp_path / "new.zarr", source=source), ok=code)
            (line,) = [x for x in err.splitlines() if x.startswith("error: ")]
            assert said in line
            assert out == ""
            assert sorted(tmp_path.rglob("*")) == before
    known["html"]["access"] = {"kind": "ftp"}
    (tmp_path / "archive" / "sources.yaml").write_text(yaml.safe_dump(known))
    _, err = run("build", *args(tmp_path, tmp_path / "new.zarr"), ok=2)
    assert (
        "sources.yaml: entry 'html': field 'kind': expected one of plain, planetary-computer, s3"
        in err
    )


def test_a_list_of_another_site(world, built, tmp_path):
    lists = tmp_path / "lists"
    lists.mkdir()
    for year in (2020, 2022):
        shutil.copy(
            world / "cubes.zarr-scenes" / f"pit_{year}_sim-earth-search.parquet",
            lists / f"far_{year}_sim-earth-search.parquet",
        )
    far = site_of("far", 460000, 5600040, 60, 60)
    gpd.GeoDataFrame({"id": ["far"]}, geometry=[far.geometry], crs=4326).to_file(
        tmp_path / "sites.geojson"
    )
    shutil.copytree(
        world / "archive", tmp_path / "archive", ignore=shutil.ignore_patterns("earth-search")
    )
    for command in ("build", "plan"):
        _, err = run(command, *args(tmp_path, tmp_path / "new.zarr"), "--scenes", lists, ok=2)
        assert "the saved list for far 2020 from sim-earth-search holds scenes elsewhere" in err
    assert not (tmp_path / "new.zarr").exists()


def items_of(path):
    return [dict(item) for item in stac_geoparquet.arrow.stac_table_to_items(pq.read_table(path))]


def write_items(items, path):
    stac_geoparquet.arrow.to_parquet(stac_geoparquet.arrow.parse_stac_items_to_arrow(items), path)


@contextmanager
def html_server():
    """Answers everything with a page."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<html>maintenance</html>")

        do_POST = do_GET  # noqa: N815  what the server calls

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_that_is_kept_is_not_given_anew():
    """By page faults while 80 MB are taken and freed, again and again."""
    program = """
import resource, sys, numpy
from minecube.jobs.memory import keep_memory
if sys.argv[1] == "kept":
    keep_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        [numpy.ones(2**18) for _ in range(40)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""
    asked = [
        subprocess.run([sys.executable, "-c", program, how], capture_output=True, text=True)
        for how in ("kept", "freed")
    ]
    kept, freed = (int(done.stdout) for done in asked)
    assert freed > 100
    assert kept < freed / 20
