"""Dates on which the scene classification errs as a whole."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from known_scenes import grid_at, site_of
from minecube import scenes
from minecube.catalog import HazeTest, MaskRule, Recipe, load_recipes, load_sources
from minecube.composite import composite
from minecube.errors import ReadError
from minecube.grid import grid_of
from minecube.scenes import veils
from minecube.scenes.looks import read_look
from minecube.simulate import World, simulate_archive
from minecube.simulate.noise import make_generators
from minecube.simulate.passes import simulate_overpasses

LEFT, TOP = 360000, 5600040
VEGETATION, CIRRUS, CLOUD = 4, 10, 9
MOST = 0.0125


def seen(n=7, pixels=400):
    """Haze [scene, pixel] of ground that is the same on n days, but for noise; and SCL that calls it vegetation."""
    rng = np.random.default_rng(0)
    ground = rng.uniform(0.01, 0.06, pixels) + rng.normal(0, 0.002, (n, pixels))
    return ground.astype(np.float32), np.full((n, pixels), VEGETATION, np.uint16)


def judged(haze, scl):
    """The verdicts on scenes of as many days."""
    return veils.judge(haze, scl, [f"2020-05-{day + 1:02d}" for day in range(len(haze))], MOST)


def test_a_clear_year_is_trusted():
    assert judged(*seen()) == [""] * 7


@pytest.mark.parametrize(("more", "verdict"), [(0.005, ""), (0.02, "veiled"), (0.1, "veiled")])
def test_a_veil_over_a_whole_date(more, verdict):
    haze, scl = seen()
    haze[2] += more
    assert judged(haze, scl) == ["", "", verdict, "", "", "", ""]


def test_streaks_that_are_blue_here_and_red_there():
    haze, scl = seen()
    haze[2] += np.where(np.arange(400) % 8 < 4, 0.03, -0.03)
    assert judged(haze, scl)[2] == "veiled"


def test_a_cloud_in_a_corner_is_no_veil():
    """Of what SCL calls clear a sixth is the halo of a cloud: the median and the quartiles are those of the rest."""
    haze, scl = seen()
    haze[2, :40] += 0.08
    scl[2, 40:160] = CLOUD
    haze[2, 40:160] += 0.2
    assert judged(haze, scl)[2] == ""


@pytest.mark.parametrize(
    ("more", "verdict"), [(0.0, "no cirrus"), (0.006, "no cirrus"), (0.02, ""), (0.05, "")]
)
def test_cirrus_is_asked_whether_it_is_any(more, verdict):
    haze, scl = seen()
    haze[3, :240] += more
    scl[3, :240] = CIRRUS
    assert judged(haze, scl)[3] == verdict


def test_cirrus_of_which_a_part_is_real_stays():
    haze, scl = seen()
    scl[3, :240], haze[3, :40] = CIRRUS, haze[3, :40] + 0.06
    assert judged(haze, scl)[3] == ""


@pytest.mark.parametrize("first", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("share", [0.3, 0.6, 1.0])
def test_a_pit_that_opens_is_no_veil(first, share):
    """Forest becomes bare ground on one of nine dates, over a part of the site or all of it."""
    haze, scl = seen(9)
    haze[first:, : int(400 * share)] += 0.035
    assert judged(haze, scl) == [""] * 9


def test_a_veil_over_a_pit_that_has_opened():
    haze, scl = seen(9)
    haze[4:, :120] += 0.035
    haze[6] += 0.02
    assert judged(haze, scl) == [""] * 6 + ["veiled"] + [""] * 2


def test_two_veils_in_a_row():
    haze, scl = seen(8)
    haze[3:5] += 0.03
    assert judged(haze, scl) == [""] * 3 + ["veiled"] * 2 + [""] * 3


def test_two_veils_with_an_overcast_day_between_them():
    """An overcast day is no clear day: the two clear days before the second veil lie farther back."""
    haze, scl = seen(9)
    haze[[3, 5]] += 0.03
    scl[4] = CLOUD
    assert judged(haze, scl) == [""] * 3 + ["veiled", "", "veiled"] + [""] * 3


def test_ground_that_is_darker_by_a_tenth_makes_no_streaks():
    """Part of a quarry is hardly brighter than usual on one date, the rest a tenth darker."""
    haze, scl = seen(7)
    haze[:] = 0.155
    haze[3, :160] = 0.155 * 1.1 + 0.014
    haze[3, 160:] = 0.155 * 0.905
    assert judged(haze, scl) == [""] * 7


def test_bright_ground_that_varies_by_a_tenth_is_no_veil():
    """A quarry with a haze index of 0.155, whose brightness differs by -12 to +6 % from date to date."""
    haze, scl = seen(7)
    haze[:] = 0.155 * np.array([0.97, 1.06, 0.88, 1.03, 0.92, 1.05, 1.0])[:, None]
    assert judged(haze, scl) == [""] * 7


def test_scenes_of_one_day_count_once():
    """Two dates that two tiles show are two looks, and two are too few."""
    haze, scl = seen(4)
    haze[2:] += 0.1
    days = ["2020-05-01", "2020-05-01", "2020-06-01", "2020-06-01"]
    assert veils.judge(haze, scl, days, MOST) == [""] * 4
    assert veils.judge(haze, scl, [*"abcd"], MOST) != [""] * 4


def test_the_order_of_scenes_does_not_matter():
    haze, scl = seen(9)
    haze[4:, :120] += 0.035
    haze[6] += 0.02
    order = np.random.default_rng(1).permutation(9)
    days = [f"2020-05-{day + 1:02d}" for day in order]
    assert [
        order[n]
        for n, verdict in enumerate(veils.judge(haze[order], scl[order], days, MOST))
        if verdict
    ] == [6]


def test_too_few_pixels_or_dates_tell_nothing():
    haze, scl = seen()
    haze[2] += 0.1
    haze[2, 49:] = np.nan
    assert judged(haze, scl)[2] == ""
    haze, scl = seen(2)
    haze[1] += 0.1
    assert judged(haze, scl) == ["", ""]
    assert judged(haze[:, :0], scl[:, :0]) == ["", ""]


@pytest.mark.parametrize("cirrus_masked", [True, False])
def test_a_veiled_date_counts_as_thin_cloud_and_no_cirrus_as_clear(archive, cirrus_masked):
    """Of three dates: one veiled, one of which SCL calls all cirrus, and one of cloud; at the right edge the veiled alone."""
    grid, where = grid_at(LEFT, TOP, 48, 48), grid_at(LEFT - 300, TOP + 300, 120, 120)
    mask = (
        (MaskRule(classes=(8, 9)), MaskRule(classes=(10,)))
        if cirrus_masked
        else (MaskRule(classes=(8, 9)),)
    )
    recipe = Recipe(id="t", title="t", bands=("B04", "B11"), mask=mask, block_px=48, chunk_px=48)
    scl = np.full((60, 60), CIRRUS, np.uint8)
    scl[:, 35:] = 0
    cloud = np.full((60, 60), CLOUD, np.uint8)
    cloud[:, 35:] = 0
    listed = [
        archive.scene("2020-05-05T10:00:00", where, {"B04": 700, "B11": 700}),
        archive.scene("2020-06-05T10:00:00", where, {"B04": 500, "B11": 500}, scl),
        archive.scene("2020-07-05T10:00:00", where, {"B04": 9000, "B11": 9000}, cloud),
    ]
    listed[0].properties[veils.SCL_FAULT], listed[1].properties[veils.SCL_FAULT] = (
        "veiled",
        "no cirrus",
    )
    made = composite(listed, grid, recipe).compute()
    inside = np.arange(48) // 2 + 15 < 34  # the outermost pixel of a scene is left out
    np.testing.assert_array_equal(
        made.reflectance.values[0], np.broadcast_to(np.where(inside, 500, 700), (48, 48))
    )
    np.testing.assert_array_equal(
        made.quality.values, np.broadcast_to(np.where(inside, 1, 3), (48, 48))
    )


def test_errors_of_simulated_years_are_found_and_nothing_else(tmp_path):
    """Each year has a date that is veiled unseen, and one, the clearest, on which SCL sees cirrus that is none."""
    site, years = site_of("pit", LEFT, TOP, 120, 120), (2020, 2022)
    simulate_archive(
        [site],
        tmp_path / "w",
        World(years=years, styles=("earth-search",), scl_errors=True, seed=2),
    )
    source = load_sources(tmp_path / "w" / "sources.yaml")["sim-earth-search"]
    recipe = load_recipes()["annual-median"]
    grid = grid_of(site)
    longitude = grid.geographic_extent.centroid.coords[0][0]
    sky = xr.open_zarr(tmp_path / "w" / "truth.zarr", group="pit", consolidated=False).sky.load()
    for year in years:
        used = scenes.select(scenes.search(site, year, source).scenes, recipe)
        found = veils.mark_wrong_classifications(used, read_look(used, grid), recipe.haze)
        passes = simulate_overpasses(
            make_generators(2, "pit"), longitude, year, 22, 2, scl_errors=True
        )
        truth = {p.day: "veiled" for p in passes if p.unseen_cirrus} | {
            p.day: "no cirrus" for p in passes if p.false_cirrus
        }
        assert len(truth) == 2
        told = {
            s.datetime.date(): s.properties[veils.SCL_FAULT]
            for s in found
            if veils.SCL_FAULT in s.properties
        }
        assert {day: told.get(day) for day in truth} == truth
        for day in set(told) - set(truth):  # other dates have haze or the halos of clouds
            assert told[day] == "veiled"
            over = sky.sel(time=str(day)).values
            assert (over == 2).sum() > 0.3 * (over > 0).sum()
        assert all(
            veils.SCL_FAULT not in s.properties for s in used
        )  # the caller's own are as they were
        rows = veils.list_wrong_classifications(found)
        assert {row["scl"] for row in rows} == {"veiled", "no cirrus"}
        off = veils.mark_wrong_classifications(
            used, read_look(used, grid), dataclasses.replace(recipe.haze, date_excess=None)
        )
        assert veils.list_wrong_classifications(off) == []


def test_without_blue_or_red_nothing_is_asked(archive):
    grid = grid_at(LEFT, TOP, 48, 48)
    listed = [
        archive.scene(f"2020-0{month}-05T10:00:00", grid, {"B04": 700, "B11": 700})
        for month in (5, 6, 7)
    ]
    assert (
        veils.mark_wrong_classifications(
            listed, read_look(listed, grid), HazeTest(date_excess=MOST)
        )
        == listed
    )
    assert (
        veils.mark_wrong_classifications([], read_look([], grid), HazeTest(date_excess=MOST)) == []
    )


def test_a_band_that_the_recipe_does_not_need_may_be_missing(archive):
    """B12 is looked at if it is there; without it, the bands of the recipe judge the scenes."""
    grid = grid_at(LEFT, TOP, 48, 48)
    pixels = {"B02": 300, "B04": 400, "B08": 2000, "B12": 900}
    four = dataclasses.replace(archive, bands=("B02", "B04", "B08", "B12"))
    listed = [four.scene(f"2020-0{month}-05T10:00:00", grid, pixels) for month in (5, 6, 7)]
    assert read_look(listed, grid, needed=("B02", "B04", "B08")).bands == ("B02", "B04", "B12")
    Path(listed[1].assets["B12"].href).unlink()
    look = read_look(listed, grid, needed=("B02", "B04", "B08"))
    assert look.bands == ("B02", "B04", "B08")
    assert (look.stored == np.array([300, 400, 2000])[None, :, None]).all()
    with pytest.raises(ReadError, match=r"B12\.tif"):
        read_look(listed, grid, needed=("B02", "B04", "B12"))
    with pytest.raises(ReadError, match=r"B12\.tif"):
        read_look(listed, grid)
