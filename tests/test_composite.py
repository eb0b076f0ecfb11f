"""A year's composite against brute force, another library, and the invariants that traps break."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import odc.stac
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from minecube import scenes
from minecube.catalog import BrightOverride, HazeTest, MaskRule, Recipe
from minecube.composite import (
    QUALITY,
    composite,
    grow,
    median,
    mosaic,
    persistently_bright,
    usable,
    with_fallback,
    without_haze,
)
from minecube.errors import ReadError
from minecube.grid import grid_of

LEFT, TOP = 360000, 5600040
PLAIN = Recipe(id="plain", title="no mask", bands=("B04", "B11"), block_px=64, chunk_px=32)
MASKED = dataclasses.replace(
    PLAIN,
    id="masked",
    mask=(MaskRule(classes=(8, 9), open_m=40, dilate_m=60), MaskRule(classes=(3,), dilate_m=20), MaskRule(classes=(11,))),
)


def by_brute_force(listed, grid, recipe, files):  # noqa: C901  one long loop, as plain as can be
    """The year pixel by pixel, in plain numpy on the arrays that were written; no mask but the recipe's dilated classes."""
    n20 = (grid.shape[0] // 2, grid.shape[1] // 2)
    days = sorted({s.properties["minecube:solar_day"] for s in listed})
    day_scl, owner = np.zeros((len(days), *n20), int), np.full((len(days), *n20), -1)
    for i, scene in enumerate(listed):  # in order of preference
        scl, where = files[scene.id]["SCL"], files[scene.id]["grid"]
        d = days.index(scene.properties["minecube:solar_day"])
        top, left = round((where.transform.f - grid.transform.f) / -20), round((where.transform.c - grid.transform.c) / 20)
        for r in range(n20[0]):
            for c in range(n20[1]):
                y, x = r - top, c - left
                around = [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
                # The outermost pixel of the coverage is not trusted.
                inside = all(0 <= a < scl.shape[0] and 0 <= b < scl.shape[1] and scl[a, b] != 0 for a, b in around)
                if inside and owner[d, r, c] < 0:
                    owner[d, r, c], day_scl[d, r, c] = i, scl[y, x]
    hidden = np.zeros(day_scl.shape, bool)
    for rule in recipe.mask:
        for d, r, c in zip(*np.nonzero(np.isin(day_scl, rule.classes)), strict=True):
            reach = rule.dilate_m // 20
            for dy in range(-reach, reach + 1):
                for dx in range(-reach, reach + 1):
                    near = (dy * 20) ** 2 + (dx * 20) ** 2 <= rule.dilate_m**2
                    if near and 0 <= r + dy < n20[0] and 0 <= c + dx < n20[1]:
                        hidden[d, r + dy, c + dx] = True
    out = np.zeros((len(recipe.bands), *grid.shape))
    count = np.zeros(grid.shape)
    for r in range(grid.shape[0]):
        for c in range(grid.shape[1]):
            x, y = grid.transform.c + 10 * c + 5, grid.transform.f - 10 * r - 5
            values = []
            for d in range(len(days)):
                i = owner[d, r // 2, c // 2]
                if i >= 0 and not hidden[d, r // 2, c // 2]:
                    content = files[listed[i].id]
                    where = content["grid"].transform
                    row, column = (where.f - y) / 10, (x - where.c) / 10
                    offset = listed[i].properties["minecube:offset"]
                    b04 = int(content["B04"][int(row), int(column)])
                    b11 = int(content["B11"][int(row / 2), int(column / 2)])
                    values.append([max(v + offset, 1) for v in (b04, b11)])
            if values:
                out[:, r, c] = np.rint(np.median(values, axis=0))
                count[r, c] = len(values)
    return out, count


def year_of_scenes(archive, make, rng, bright=False):
    """Six days: two tiles overlapping, a split datatake, offsets of both kinds, ragged swath edges, cloud."""
    listed, files = [], {}

    def add(when, where, **kwargs):
        h, w = where.shape
        scl = rng.choice([4, 5], (h // 2, w // 2)).astype(np.uint8)
        y, x = rng.integers(0, h // 2 - 4), rng.integers(0, w // 2 - 4)
        scl[y : y + 4, x : x + 4] = rng.choice([3, 8, 9, 11])
        if bright:  # ground at a fixed place that is called cloud each time, in a ragged shape
            row, column = (round(v) for v in ((where.transform.f - TOP) / 20, (LEFT - where.transform.c) / 20))
            for k in range(14):
                scl[max(row + 8 + k, 0) : row + 9 + k, max(column + 8 - k % 3, 0) : column + 20 + k % 5] = 9
        scl[: rng.integers(0, 6)] = 0
        pixels = {"B04": rng.integers(1, 4000, (h, w)), "B11": rng.integers(1, 4000, (h // 2, w // 2))}
        listed.append(archive.scene(when, where, pixels, scl, **kwargs))
        files[listed[-1].id] = {**pixels, "SCL": scl, "grid": where}

    for day in (1, 4, 7, 9):
        add(f"2020-06-0{day}T10:00:00", make.grid(LEFT - 200, TOP + 200, 64, 100))
        add(f"2020-06-0{day}T10:00:05", make.grid(LEFT + 200, TOP + 200, 90, 100), tile="33UVR")
    add("2020-07-01T10:00:00", make.grid(LEFT - 200, TOP + 200, 120, 100), baseline="05.00")
    add("2020-07-06T10:00:00", make.grid(LEFT - 200, TOP + 200, 120, 60), start="20200706T100001", baseline="04.00")
    add("2020-07-06T10:00:00", make.grid(LEFT - 200, TOP - 200, 120, 60), start="20200706T100025", baseline="04.00")
    return listed, files


def test_against_brute_force(archive, make):
    grid = make.grid(LEFT, TOP, 72, 66)
    recipe = dataclasses.replace(MASKED, mask=tuple(dataclasses.replace(r, open_m=0) for r in MASKED.mask))
    listed, files = year_of_scenes(archive, make, np.random.default_rng(1))
    # Clouds beside the grid reach into it.
    expected, count = by_brute_force(listed, grid.pad(6), recipe, files)
    expected, count = expected[:, 6:-6, 6:-6], count[6:-6, 6:-6]
    made = composite(listed, grid, recipe).compute()
    np.testing.assert_array_equal(made.clear_count, count)
    clear = count > 0
    np.testing.assert_array_equal(made.reflectance.values[:, clear], expected[:, clear])
    assert set(np.unique(made.quality.values[clear])) == {1}
    assert clear.mean() > 0.5


def test_neither_the_order_of_scenes_nor_the_cut_into_blocks_matters(archive, make):
    grid = make.grid(LEFT, TOP, 72, 66)
    recipe = dataclasses.replace(MASKED, bright_override=BrightOverride(window_m=120))
    listed, _ = year_of_scenes(archive, make, np.random.default_rng(2), bright=True)
    whole = composite(listed, grid, dataclasses.replace(recipe, block_px=128, chunk_px=128)).compute()
    plain = composite(listed, grid, dataclasses.replace(recipe, bright_override=None)).compute()
    assert (whole.clear_count > plain.clear_count).any()  # so the override has something to do
    for block in (16, 24, 40):
        order = np.random.default_rng(block).permutation(len(listed))
        made = composite([listed[i] for i in order], grid, dataclasses.replace(recipe, block_px=block, chunk_px=8)).compute()
        for name in whole.data_vars:
            np.testing.assert_array_equal(made[name], whole[name], err_msg=f"{name}, blocks of {block}")


def test_haze_goes_and_changed_ground_stays(archive, make):
    """Seven dates: a veil over half of the third, unknown to SCL; a field bare from the sixth on, in red above all."""
    grid, where = make.grid(LEFT, TOP, 96, 64), make.grid(LEFT - 1200, TOP + 1200, 400, 400)
    three = dataclasses.replace(archive, bands=("B02", "B04", "B11"))
    recipe = dataclasses.replace(PLAIN, bands=("B02", "B04", "B11"), haze=HazeTest())
    rng = np.random.default_rng(4)
    listed = []
    for day in range(7):
        blue, red = rng.normal(400, 20, (400, 400)), rng.normal(500, 20, (400, 400))
        if day >= 5:  # rows 20-40 of the grid, columns 10-30
            blue[140:160, 130:150] += 500
            red[140:160, 130:150] += 900
        if day == 2:
            blue[:, 168:] += 900
            red[:, 168:] += 800
        pixels = {"B02": blue.astype(int), "B04": red.astype(int), "B11": 2000 + day}
        listed.append(three.scene(f"2020-06-{2 * day + 1:02d}T10:00:00", where, pixels))
    made = composite(listed, grid, recipe).compute()
    count = made.clear_count.values
    assert (count[:, :44] == 7).all()  # the bare field too
    assert (count[:, 52:] == 6).all()
    assert (made.quality == 1).all()
    cut = composite(listed, grid, dataclasses.replace(recipe, block_px=24, chunk_px=8)).compute()
    for name in made.data_vars:
        np.testing.assert_array_equal(made[name], cut[name], err_msg=name)


def test_of_two_observations_the_hazy_one_goes():
    use = np.ones((2, 9, 9), bool)
    blue = np.full((2, 9, 9), 400 * 4)
    red = np.full((2, 9, 9), 500 * 4)
    blue[1] += 1000 * 4
    kept, quality = without_haze(blue, red, use, np.ones((9, 9), np.uint8), HazeTest(), 20)
    assert kept[0].all()
    assert not kept[1].any()
    assert (quality == 1).all()


def test_overlapping_tiles_are_one_observation(archive, make):
    """Counted twice, the two tiles of the bright day would outvote the other two days."""
    grid, where = make.grid(LEFT, TOP, 60, 60), make.grid(LEFT - 600, TOP + 600, 180, 180)
    listed = [
        archive.scene("2020-06-01T10:00:00", where, {"B04": 9000, "B11": 9000}, tile="33UUR"),
        archive.scene("2020-06-01T10:00:14", where, {"B04": 9000, "B11": 9000}, tile="33UVR"),
        archive.scene("2020-06-04T10:00:00", where, {"B04": 1000, "B11": 1000}),
        archive.scene("2020-06-09T10:00:00", where, {"B04": 1100, "B11": 1100}),
    ]
    made = composite(listed, grid, PLAIN).compute()
    assert np.unique(made.reflectance) == [1100]
    assert np.unique(made.clear_count) == [3]


def test_dark_pixels_do_not_wrap_and_nodata_is_not_an_observation(archive, make):
    grid, where = make.grid(LEFT, TOP, 60, 60), make.grid(LEFT - 600, TOP + 600, 180, 180)
    holed = np.full((180, 180), 950, np.uint16)
    holed[100:120] = 0
    listed = [archive.scene("2022-06-01T10:00:00", where, {"B04": holed, "B11": 1300}, baseline="04.00")]
    made = composite(listed, grid, PLAIN).compute()
    rows = slice(100 - 60, 120 - 60)
    seen = np.ones(60, bool)
    seen[rows] = False
    assert np.unique(made.reflectance.sel(band="B04")[seen]) == [1]
    assert np.unique(made.reflectance.sel(band="B11")[seen]) == [300]
    # All bands or none, and no false zero counted.
    for name in ("reflectance", "clear_count", "quality"):
        assert not made[name].values[..., rows, :].any()


def test_the_neighbouring_zone_lands_where_gdal_puts_it(archive, make):
    """Our mosaic of a warped scene against odc-stac's loading of the same item."""
    grid = make.grid(LEFT, TOP, 120, 90)
    y, x = np.mgrid[:400, :400]
    pixels = {"B04": (2000 + 5 * x + 3 * y).astype(np.uint16), "B11": (1000 + 4 * x + 2 * y)[::2, ::2].astype(np.uint16)}
    item = archive.item("2020-06-01T10:00:00", make.grid(784000, 5607000, 400, 400, 32632), pixels, tile="32UQB")
    made = composite([scenes.normalise(item, archive.source)], grid, PLAIN).compute()
    theirs = odc.stac.load([item], bands=["B04", "B11"], geobox=grid, resampling="bilinear", dtype="uint16", nodata=0)
    assert (made.clear_count == 1).all()
    off = np.abs(made.reflectance.sel(band="B04").astype(int) - theirs.B04[0].astype(int))
    assert off.max() <= 2
    # 20 m bands are kept at 20 m and repeated: within a pixel's gradient of interpolating at 10 m.
    assert np.abs(made.reflectance.sel(band="B11").astype(int) - theirs.B11[0].astype(int)).max() <= 6


def test_scenes_of_the_grids_own_zone_come_first(archive, make):
    """A warped pixel is only taken where no unresampled one is, though its scene came first."""
    grid = make.grid(LEFT, TOP, 60, 60)
    neighbour = archive.scene(
        "2020-06-01T10:00:00", make.grid(784000, 5607000, 400, 400, 32632), {"B04": 5000, "B11": 5000}, tile="32UQB"
    )
    own = archive.scene("2020-06-01T10:00:14", make.grid(LEFT - 600, TOP + 600, 90, 180), {"B04": 2000, "B11": 2000})
    made = composite([neighbour, own], grid, PLAIN).compute()
    values = made.reflectance.sel(band="B04").values
    # The own scene ends 300 m into the grid, and its last 20 m pixel is not trusted.
    assert np.unique(values[:, :28]) == [2000]
    assert np.unique(values[:, 28:]) == [5000]


def test_20_m_pixels_are_repeated_not_shifted(archive, make):
    grid, where = make.grid(LEFT, TOP, 64, 48), make.grid(LEFT - 300, TOP + 300, 140, 120)
    b11 = make.unique(60, 70)
    made = composite([archive.scene("2020-06-01T10:00:00", where, {"B04": 7, "B11": b11})], grid, PLAIN).compute()
    expected = b11[15 : 15 + 24, 15 : 15 + 32].repeat(2, axis=0).repeat(2, axis=1)
    np.testing.assert_array_equal(made.reflectance.sel(band="B11"), expected)


def test_it_is_lazy_and_its_graph_grows_with_blocks_not_with_scenes(archive, make):
    grid = make.grid(LEFT, TOP, 72, 66)
    listed, _ = year_of_scenes(archive, make, np.random.default_rng(1))
    for scene in listed:
        for asset in scene.assets.values():
            asset.href = "/nowhere.tif"
    few, many = composite(listed[:2], grid, PLAIN), composite(listed, grid, PLAIN)
    assert len(few.reflectance.__dask_graph__()) == len(many.reflectance.__dask_graph__())
    assert many.reflectance.chunks == ((2,), (64, 2), (64, 8))
    with pytest.raises(ReadError, match="nowhere"):
        many.compute()


def test_a_scene_without_a_band_is_named(archive, make):
    scene = archive.scene("2020-06-01T10:00:00", make.grid(LEFT, TOP, 60, 60), {"B04": 1, "B11": 1})
    with pytest.raises(ReadError, match=rf"{scene.id}: has no B08, which recipe 'plain' needs"):
        composite([scene], make.grid(LEFT, TOP, 60, 60), dataclasses.replace(PLAIN, bands=("B04", "B08", "B11")))


# Kernels


@settings(max_examples=80, deadline=None)
@given(hnp.arrays(np.uint16, st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 4))))
def test_median_is_numpys_of_what_was_observed(observed):
    got = median(observed)
    for index in np.ndindex(observed.shape[1:]):
        values = observed[(slice(None), *index)]
        values = values[values > 0]
        assert got[index] == (np.rint(np.median(values)) if len(values) else 0)


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(bool, (2, 12, 13)), st.sampled_from([0, 20, 60, 100]), st.sampled_from([0, 40, 60]))
def test_grow_opens_and_dilates_in_metres(flagged, dilate_m, open_m):
    got = grow(flagged, MaskRule(classes=(8,), dilate_m=dilate_m, open_m=open_m), 20)
    for day in range(2):
        kept = np.zeros((12, 13), bool)
        n = max(open_m // 20, 1)
        # Opening: the union of all n x n squares that are flagged throughout.
        for r in range(12 - n + 1):
            for c in range(13 - n + 1):
                if flagged[day, r : r + n, c : c + n].all():
                    kept[r : r + n, c : c + n] = True
        expected = np.zeros((12, 13), bool)
        for r, c in zip(*np.nonzero(kept), strict=True):
            yy, xx = np.mgrid[:12, :13]
            expected |= np.hypot(yy - r, xx - c) * 20 <= dilate_m + 1e-9
        np.testing.assert_array_equal(got[day], expected)


def test_the_outermost_pixel_of_a_swath_is_not_trusted():
    scl = np.full((1, 7, 7), 4, np.uint8)
    scl[0, :, :2] = 0
    owner, day = mosaic(scl, [0])
    assert (owner[0, :, :3] == -1).all()  # two without data, one of border
    assert (owner[0, :, 3:] == 0).all()  # the edge of the window is no border
    assert (day[0, :, 3:] == 4).all()


def mine_under_changing_sky(share_of_window, dates=14, side=60):
    """SCL of 20 m in which a square of bare ground is called cloud on every date, and real clouds come and go."""
    rng = np.random.default_rng(0)
    scl = np.full((dates, side, side), 5, np.uint8)
    half = int(side * np.sqrt(share_of_window) / 2)
    mine = np.zeros((side, side), bool)
    mine[side // 2 - half : side // 2 + half, side // 2 - half : side // 2 + half] = True
    overcast = np.zeros(dates, bool)
    overcast[rng.permutation(dates)[: dates // 2]] = True
    scl[overcast] = 9
    scl[:, mine] = rng.choice([8, 9], (dates, mine.sum()))
    return scl, mine, overcast


@pytest.mark.parametrize("share", [0.01, 0.1, 0.35])
def test_bright_ground_is_kept_and_clouds_over_it_are_not(share):
    scl, mine, overcast = mine_under_changing_sky(share)
    bright = persistently_bright(scl, BrightOverride(), 20)
    assert bright[~overcast][:, mine].all()
    assert not bright[overcast].any()
    assert not bright[:, ~mine].any()


def test_a_cloudy_year_is_not_mistaken_for_a_mine():
    """Clouds that cover every pixel on nine dates of ten, each time elsewhere clear: nothing is persistent here."""
    rng = np.random.default_rng(5)
    scl = np.full((20, 60, 60), 4, np.uint8)
    for day in range(20):
        for _ in range(14):
            y, x = rng.integers(-10, 60, 2)
            scl[day, max(y, 0) : y + 22, max(x, 0) : x + 22] = 9
    cloud = scl == 9
    assert cloud.mean() > 0.7
    assert persistently_bright(scl, BrightOverride(), 20).mean() < 0.005


def test_usable_ranks_what_is_not_clear():
    scl = np.array([[[4, 9, 3, 10, 0, 4, 4, 4, 4, 4]]], np.uint8)
    recipe = dataclasses.replace(PLAIN, mask=(MaskRule(classes=(9,), dilate_m=20), MaskRule(classes=(3, 10))))
    clear, lower = usable(scl, recipe, 20)
    np.testing.assert_array_equal(clear[0, 0], [0, 0, 0, 0, 0, 1, 1, 1, 1, 1])
    np.testing.assert_array_equal(lower[0, 0, :4], [2, 4, 3, 3])


def test_fallback_leaves_no_hole_and_says_so():
    clear = np.array([[[1, 0, 0, 0, 0]], [[1, 0, 0, 0, 0]]], bool)
    lower = np.array([[[2, 2, 3, 4, 2]], [[2, 4, 4, 4, 2]]], np.uint8)
    observed = np.array([[[1, 1, 1, 1, 0]], [[1, 1, 1, 0, 0]]], bool)
    use, quality = with_fallback(clear, lower, observed)
    np.testing.assert_array_equal(quality[0], [1, 2, 3, 4, 0])
    np.testing.assert_array_equal(use[:, 0], [[1, 1, 1, 1, 0], [1, 0, 0, 0, 0]])
    assert len(QUALITY) == 5


def test_a_pixel_always_cloudy_is_filled_and_not_counted_clear(archive, make):
    grid, where = make.grid(LEFT, TOP, 60, 60), make.grid(LEFT - 600, TOP + 600, 180, 180)
    scl = np.full((90, 90), 4, np.uint8)
    scl[40:50, 40:50] = 9
    listed = [archive.scene(f"2020-06-0{d}T10:00:00", where, {"B04": 1000 + d, "B11": 2000}, scl) for d in (1, 4, 6)]
    made = composite(listed, grid, MASKED).compute()
    assert made.reflectance.values.all()
    assert (made.clear_count.values[20:40, 20:40] == 0).all()
    assert (made.quality.values[20:40, 20:40] == 4).all()
    assert set(np.unique(made.quality)) == {1, 2, 4}
    np.testing.assert_array_equal(made.clear_count.values > 0, made.quality.values == 1)


def test_an_observation_is_one_in_all_bands_and_the_next_best_takes_its_place(archive, make):
    """Left: the clear date lacks B11, so the cloudy one is used; right: both lack a band, so nothing is."""
    grid, where = make.grid(LEFT, TOP, 60, 60), make.grid(LEFT - 600, TOP + 600, 180, 180)
    clear_b11, cloudy_b04 = np.full((90, 90), 2000), np.full((180, 180), 5000)
    clear_b11[:, 40:] = 0  # from column 20 of the grid on, in 10 m pixels
    cloudy_b04[:, 100:] = 0  # from column 40 on
    listed = [
        archive.scene("2020-06-01T10:00:00", where, {"B04": 1000, "B11": clear_b11}, 4),
        archive.scene("2020-06-04T10:00:00", where, {"B04": cloudy_b04, "B11": 6000}, 9),
    ]
    made = composite(listed, grid, MASKED).compute()
    expected = [((slice(0, 20)), 1000, 2000, 1, 1), (slice(20, 40), 5000, 6000, 0, 4), (slice(40, 60), 0, 0, 0, 0)]
    for columns, b04, b11, count, quality in expected:
        assert np.unique(made.reflectance.values[0][:, columns]) == [b04]
        assert np.unique(made.reflectance.values[1][:, columns]) == [b11]
        assert np.unique(made.clear_count.values[:, columns]) == [count]
        assert np.unique(made.quality.values[:, columns]) == [quality]


def test_bands_of_a_scene_that_no_pixel_needs_are_not_read(archive, make):
    """The mask decides first: the overcast scene's bands are gone, and nobody asks for them."""
    grid, where = make.grid(LEFT, TOP, 60, 60), make.grid(LEFT - 600, TOP + 600, 180, 180)
    listed = [
        archive.scene("2020-06-01T10:00:00", where, {"B04": 8000, "B11": 8000}, 9),
        archive.scene("2020-06-04T10:00:00", where, {"B04": 1000, "B11": 2000}, 4),
    ]
    for band in ("B04", "B11"):
        Path(listed[0].assets[band].href).unlink()
    assert np.unique(composite(listed, grid, MASKED).compute().reflectance.sel(band="B04")) == [1000]
    with pytest.raises(ReadError, match="No such file"):
        composite(listed, grid, PLAIN).compute()


def test_two_overpasses_of_one_day_are_two_observations(archive, make):
    """Far north two satellites pass on one day: the clear one must not hide behind the cloudy one."""
    grid, where = make.grid(LEFT, TOP, 60, 60), make.grid(LEFT - 600, TOP + 600, 180, 180)
    listed = [
        archive.scene("2020-06-01T10:00:00", where, {"B04": 8000, "B11": 8000}, 9),
        archive.scene("2020-06-01T11:40:00", where, {"B04": 1000, "B11": 2000}, 4),
    ]
    made = composite(listed, grid, MASKED).compute()
    assert np.unique(made.reflectance.sel(band="B04")) == [1000]
    assert np.unique(made.clear_count) == [1]


def test_the_site_grid_is_the_cubes(site):
    grid = grid_of(site)
    assert grid.shape == (180, 240)
    assert tuple(grid.boundingbox) == (LEFT, TOP - 1800, LEFT + 2400, TOP)
