"""The simulated world through every provider: what they list differs in all that does not matter, and the composites do not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import xarray as xr

from known_scenes import site_of
from minecube import scenes
from minecube.catalog import Offset, Registration, load_recipes, load_sources
from minecube.composite import composite
from minecube.composite.registration import apply_registration, measure_shifts
from minecube.grid import grid_of
from minecube.simulate import World, simulate_archive

RECIPE = load_recipes()["annual-median"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(site, sources by id, truth) of 120 x 96 px listed by all three, 2020 and 2022."""
    folder = tmp_path_factory.mktemp("world") / "archive"
    site = site_of("pit", 360000, 5600040, 120, 96)
    simulate_archive([site], folder, World(years=(2020, 2022), dates_per_year=12, winter_dates=1))
    truth = xr.open_zarr(folder / "truth.zarr", group="pit", consolidated=False).load()
    return site, load_sources(folder / "sources.yaml"), truth


def made(site, source, year, recipe=RECIPE):
    return composite(
        scenes.select(scenes.search(site, year, source).scenes, recipe), grid_of(site), recipe
    ).compute()


def rmse(composite, truth, year):
    off = composite.reflectance.values.astype(float) - truth.reflectance.sel(year=year).values
    return np.sqrt((off**2).mean()) / 1e4


def test_every_provider_gives_the_same_composite(world):
    site, sources, _ = world
    one, two, three = (
        made(site, sources[f"sim-{s}"], 2022)
        for s in ("earth-search", "planetary-computer", "cdse")
    )
    xr.testing.assert_identical(one, two)
    xr.testing.assert_identical(one, three)


@pytest.mark.parametrize(
    ("style", "rule"),
    [
        ("cdse", Offset(value=0)),  # the offset is not removed
        ("earth-search", Offset()),  # the flag is not asked: it is removed twice
        ("planetary-computer", Offset(from_baseline="99.99")),
    ],
)
def test_a_wrong_offset_rule_is_seen_in_the_truth(world, style, rule):
    site, sources, truth = world
    source = sources[f"sim-{style}"]
    right, wrong = (
        made(site, source, 2022),
        made(site, dataclasses.replace(source, offset=rule), 2022),
    )
    assert rmse(right, truth, 2022) < 0.025
    assert rmse(wrong, truth, 2022) > 0.05


def test_old_baselines_are_dropped(world):
    """Earth Search lists every acquisition of 2020 twice; the older copy is biased and shifted."""
    site, sources, _ = world
    found = scenes.search(site, 2020, sources["sim-earth-search"]).scenes
    assert {s.properties["s2:processing_baseline"] for s in found} == {"05.00"}
    keys = [
        (
            s.properties["minecube:datatake"],
            s.properties["s2:mgrs_tile"],
            s.properties["minecube:granule_start"],
        )
        for s in found
    ]
    assert len(set(keys)) == len(keys)
    assert len({k[:2] for k in keys}) < len(
        keys
    )  # a split datatake: two granules of one tile, both kept
    assert {s.properties["proj:code"] for s in found} == {"EPSG:32633", "EPSG:32632"}


@pytest.mark.parametrize("without", ["mask", "bright_override"])
def test_each_step_of_the_mask_earns_its_place(world, without):
    site, sources, truth = world
    source = sources["sim-cdse"]
    bare = dataclasses.replace(
        RECIPE, bright_override=None, **({"mask": ()} if without == "mask" else {})
    )
    mine = truth.footprint.values == 1

    def errors(recipe):
        full = [made(site, source, y, recipe) for y in (2020, 2022)]
        off = (
            np.stack([c.reflectance.values.astype(float) for c in full]) - truth.reflectance.values
        )
        return (off**2).mean(), np.mean(
            [(c.quality.values[m] > 1).mean() for c, m in zip(full, mine, strict=True)]
        )

    (with_it, filled), (without_it, filled_without) = errors(RECIPE), errors(bare)
    if without == "bright_override":
        # Without it the mine's bright ground is cloud on every date, and only the fallback fills it.
        assert filled_without > 10 * max(filled, 0.001)
    else:
        assert with_it < without_it


def test_scenes_beside_each_other_cost_no_dates(tmp_path):
    """Until 2021 scenes lie about 6 m off: the shipped recipe keeps them all, and in a year of few is nearer to the truth."""
    site = site_of("pit", 360000, 5600040, 120, 120)
    simulate_archive(
        [site],
        tmp_path / "w",
        World(years=(2020,), dates_per_year=7, styles=("earth-search",), shifts=True),
    )
    truth = xr.open_zarr(tmp_path / "w" / "truth.zarr", group="pit", consolidated=False).load()
    source = load_sources(tmp_path / "w" / "sources.yaml")["sim-earth-search"]
    recipe = dataclasses.replace(RECIPE, min_dates=1)
    used = scenes.select(scenes.search(site, 2020, source).scenes, recipe)
    grid = grid_of(site)
    found = measure_shifts(used, grid)
    assert max(shift.distance_m for shift in found) > 5
    all_of_them = apply_registration(used, found, RECIPE.registration)
    assert [s.id for s in all_of_them] == [s.id for s in used]
    fewer = apply_registration(used, found, Registration(most_px=0.5, beyond="drop"))
    ours, theirs = (
        rmse(composite(kept, grid, recipe).compute(), truth, 2020) for kept in (all_of_them, fewer)
    )
    assert ours < theirs
