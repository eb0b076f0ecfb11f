"""A year's composite against brute force, another library, and the invariants that traps break."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import odc.stac
import pytest
from scipy import ndimage

from known_scenes import grid_at, unique_pixels
from minecube import scenes
from minecube.catalog import (
    BANDS,
    NATIVE_M,
    BestPixel,
    BrightOverride,
    HazeTest,
    MaskRule,
    Recipe,
    SecondOpinion,
)
from minecube.composite import Tools, bands, block, composite
from minecube.errors import ReadError
from minecube.grid import grid_of
from minecube.reader import Ledger

LEFT, TOP = 360000, 5600040
PLAIN = Recipe(id="plain", title="no mask", bands=("B04", "B11"), block_px=64, chunk_px=32)
MASKED = dataclasses.replace(
    PLAIN,
    id="masked",
    mask=(
        MaskRule(classes=(8, 9), open_m=40, dilate_m=60),
        MaskRule(classes=(3,), dilate_m=20),
        MaskRule(classes=(11,)),
    ),
)


def by_brute_force(listed, grid, recipe, files):  # noqa: C901  one long loop, as plain as can be
    """The year pixel by pixel, in plain numpy on the arrays that were written; no mask but the recipe's dilated classes."""
    n20 = (grid.shape[0] // 2, grid.shape[1] // 2)
    days = sorted({s.properties["minecube:solar_day"] for s in listed})
    day_scl, owner = np.zeros((len(days), *n20), int), np.full((len(days), *n20), -1)
    for i, scene in enumerate(listed):  # in order of preference
        scl, where = files[scene.id]["SCL"], files[scene.id]["grid"]
        d = days.index(scene.properties["minecube:solar_day"])
        top, left = (
            round((where.transform.f - grid.transform.f) / -20),
            round((where.transform.c - grid.transform.c) / 20),
        )
        for r in range(n20[0]):
            for c in range(n20[1]):
                y, x = r - top, c - left
                around = [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
                # The outermost pixel of the coverage is not trusted.
                inside = all(
                    0 <= a < scl.shape[0] and 0 <= b < scl.shape[1] and scl[a, b] != 0
                    for a, b in around
                )
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


def year_of_scenes(archive, rng, bright=False):
    """Six days: two tiles overlapping, a split datatake, offsets of both kinds, ragged swath edges, cloud."""
    listed, files = [], {}

    def add(when, where, **kwargs):
        h, w = where.shape
        scl = rng.choice([4, 5], (h // 2, w // 2)).astype(np.uint8)
        y, x = rng.integers(0, h // 2 - 4), rng.integers(0, w // 2 - 4)
        scl[y : y + 4, x : x + 4] = rng.choice([3, 8, 9, 11])
        if bright:  # ground at a fixed place that is called cloud each time, in a ragged shape
            row, column = (
                round(v) for v in ((where.transform.f - TOP) / 20, (LEFT - where.transform.c) / 20)
            )
            for k in range(14):
                scl[
                    max(row + 8 + k, 0) : row + 9 + k,
                    max(column + 8 - k % 3, 0) : column + 20 + k % 5,
                ] = 9
        scl[: rng.integers(0, 6)] = 0
        pixels = {
            "B04": rng.integers(1, 4000, (h, w)),
            "B11": rng.integers(1, 4000, (h // 2, w // 2)),
        }
        listed.append(archive.scene(when, where, pixels, scl, **kwargs))
        files[listed[-1].id] = {**pixels, "SCL": scl, "grid": where}

    for day in (1, 4, 7, 9):
        add(f"2020-06-0{day}T10:00:00", grid_at(LEFT - 200, TOP + 200, 64, 100))
        add(f"2020-06-0{day}T10:00:05", grid_at(LEFT + 200, TOP + 200, 90, 100), tile="33UVR")
    add("2020-07-01T10:00:00", grid_at(LEFT - 200, TOP + 200, 120, 100), baseline="05.00")
    add(
        "2020-07-06T10:00:00",
        grid_at(LEFT - 200, TOP + 200, 120, 60),
        start="20200706T100001",
        baseline="04.00",
    )
    add(
        "2020-07-06T10:00:00",
        grid_at(LEFT - 200, TOP - 200, 120, 60),
        start="20200706T100025",
        baseline="04.00",
    )
    return listed, files


def test_against_brute_force(archive):
    grid = grid_at(LEFT, TOP, 72, 66)
    recipe = dataclasses.replace(
        MASKED, mask=tuple(dataclasses.replace(r, open_m=0) for r in MASKED.mask)
    )
    listed, files = year_of_scenes(archive, np.random.default_rng(1))
    # Clouds beside the grid reach into it.
    expected, count = by_brute_force(listed, grid.pad(6), recipe, files)
    expected, count = expected[:, 6:-6, 6:-6], count[6:-6, 6:-6]
    made = composite(listed, grid, recipe).compute()
    np.testing.assert_array_equal(made.clear_count, count)
    clear = count > 0
    np.testing.assert_array_equal(made.reflectance.values[:, clear], expected[:, clear])
    assert set(np.unique(made.quality.values[clear])) == {1}
    assert clear.mean() > 0.5


def test_neither_the_order_of_scenes_nor_the_cut_into_blocks_matters(archive):
    grid = grid_at(LEFT, TOP, 72, 66)
    recipe = dataclasses.replace(MASKED, bright_override=BrightOverride(window_m=120))
    listed, _ = year_of_scenes(archive, np.random.default_rng(2), bright=True)
    whole = composite(
        listed, grid, dataclasses.replace(recipe, block_px=128, chunk_px=128)
    ).compute()
    plain = composite(listed, grid, dataclasses.replace(recipe, bright_override=None)).compute()
    assert (whole.clear_count > plain.clear_count).any()  # so the override has something to do
    for side in (16, 24, 40):
        order = np.random.default_rng(side).permutation(len(listed))
        made = composite(
            [listed[i] for i in order], grid, dataclasses.replace(recipe, block_px=side, chunk_px=8)
        ).compute()
        for name in whole.data_vars:
            np.testing.assert_array_equal(
                made[name], whole[name], err_msg=f"{name}, blocks of {side}"
            )


def test_haze_goes_and_changed_ground_stays(archive):
    """Seven dates: a veil over half of the third, unknown to SCL; a field bare from the sixth on, in red above all."""
    grid, where = grid_at(LEFT, TOP, 96, 64), grid_at(LEFT - 1200, TOP + 1200, 400, 400)
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


def test_overlapping_tiles_are_one_observation(archive):
    """Counted twice, the two tiles of the bright day would outvote the other two days."""
    grid, where = grid_at(LEFT, TOP, 60, 60), grid_at(LEFT - 600, TOP + 600, 180, 180)
    listed = [
        archive.scene("2020-06-01T10:00:00", where, {"B04": 9000, "B11": 9000}, tile="33UUR"),
        archive.scene("2020-06-01T10:00:14", where, {"B04": 9000, "B11": 9000}, tile="33UVR"),
        archive.scene("2020-06-04T10:00:00", where, {"B04": 1000, "B11": 1000}),
        archive.scene("2020-06-09T10:00:00", where, {"B04": 1100, "B11": 1100}),
    ]
    made = composite(listed, grid, PLAIN).compute()
    assert np.unique(made.reflectance) == [1100]
    assert np.unique(made.clear_count) == [3]


def test_dark_pixels_do_not_wrap_and_nodata_is_not_an_observation(archive):
    grid, where = grid_at(LEFT, TOP, 60, 60), grid_at(LEFT - 600, TOP + 600, 180, 180)
    holed = np.full((180, 180), 950, np.uint16)
    holed[100:120] = 0
    listed = [
        archive.scene("2022-06-01T10:00:00", where, {"B04": holed, "B11": 1300}, baseline="04.00")
    ]
    made = composite(listed, grid, PLAIN).compute()
    rows = slice(100 - 60, 120 - 60)
    seen = np.ones(60, bool)
    seen[rows] = False
    assert np.unique(made.reflectance.sel(band="B04")[seen]) == [1]
    assert np.unique(made.reflectance.sel(band="B11")[seen]) == [300]
    # All bands or none, and no false zero counted.
    for name in ("reflectance", "clear_count", "quality"):
        assert not made[name].values[..., rows, :].any()


def test_the_neighbouring_zone_lands_where_gdal_puts_it(archive):
    """Our mosaic of a warped scene against odc-stac's loading of the same item."""
    grid = grid_at(LEFT, TOP, 120, 90)
    y, x = np.mgrid[:400, :400]
    pixels = {
        "B04": (2000 + 5 * x + 3 * y).astype(np.uint16),
        "B11": (1000 + 4 * x + 2 * y)[::2, ::2].astype(np.uint16),
    }
    item = archive.item(
        "2020-06-01T10:00:00", grid_at(784000, 5607000, 400, 400, 32632), pixels, tile="32UQB"
    )
    made = composite([scenes.normalise(item, archive.source)], grid, PLAIN).compute()
    theirs = odc.stac.load(
        [item], bands=["B04", "B11"], geobox=grid, resampling="bilinear", dtype="uint16", nodata=0
    )
    assert (made.clear_count == 1).all()
    off = np.abs(made.reflectance.sel(band="B04").astype(int) - theirs.B04[0].astype(int))
    assert off.max() <= 2
    # 20 m bands are kept at 20 m and repeated: within a pixel's gradient of interpolating at 10 m.
    assert (
        np.abs(made.reflectance.sel(band="B11").astype(int) - theirs.B11[0].astype(int)).max() <= 6
    )


def test_scenes_of_the_grids_own_zone_come_first(archive):
    """A warped pixel is only taken where no unresampled one is, though its scene came first."""
    grid = grid_at(LEFT, TOP, 60, 60)
    neighbour = archive.scene(
        "2020-06-01T10:00:00",
        grid_at(784000, 5607000, 400, 400, 32632),
        {"B04": 5000, "B11": 5000},
        tile="32UQB",
    )
    own = archive.scene(
        "2020-06-01T10:00:14", grid_at(LEFT - 600, TOP + 600, 90, 180), {"B04": 2000, "B11": 2000}
    )
    made = composite([neighbour, own], grid, PLAIN).compute()
    values = made.reflectance.sel(band="B04").values
    # The own scene ends 300 m into the grid, and its last 20 m pixel is not trusted.
    assert np.unique(values[:, :28]) == [2000]
    assert np.unique(values[:, 28:]) == [5000]


def test_20_m_pixels_are_repeated_not_shifted(archive):
    grid, where = grid_at(LEFT, TOP, 64, 48), grid_at(LEFT - 300, TOP + 300, 140, 120)
    b11 = unique_pixels(60, 70)
    made = composite(
        [archive.scene("2020-06-01T10:00:00", where, {"B04": 7, "B11": b11})], grid, PLAIN
    ).compute()
    expected = b11[15 : 15 + 24, 15 : 15 + 32].repeat(2, axis=0).repeat(2, axis=1)
    np.testing.assert_array_equal(made.reflectance.sel(band="B11"), expected)


def test_it_is_lazy_and_its_graph_grows_with_blocks_not_with_scenes(archive):
    grid = grid_at(LEFT, TOP, 72, 66)
    listed, _ = year_of_scenes(archive, np.random.default_rng(1))
    for scene in listed:
        for asset in scene.assets.values():
            asset.href = "/nowhere.tif"
    few, many = composite(listed[:2], grid, PLAIN), composite(listed, grid, PLAIN)
    assert len(few.reflectance.__dask_graph__()) == len(many.reflectance.__dask_graph__())
    assert many.reflectance.chunks == ((2,), (64, 2), (64, 8))
    with pytest.raises(ReadError, match="nowhere"):
        many.compute()


def test_a_scene_without_a_band_is_named(archive):
    scene = archive.scene("2020-06-01T10:00:00", grid_at(LEFT, TOP, 60, 60), {"B04": 1, "B11": 1})
    with pytest.raises(ReadError, match=rf"{scene.id}: has no B08, which recipe 'plain' needs"):
        composite(
            [scene],
            grid_at(LEFT, TOP, 60, 60),
            dataclasses.replace(PLAIN, bands=("B04", "B08", "B11")),
        )


def test_a_pixel_always_cloudy_is_filled_and_not_counted_clear(archive):
    grid, where = grid_at(LEFT, TOP, 60, 60), grid_at(LEFT - 600, TOP + 600, 180, 180)
    scl = np.full((90, 90), 4, np.uint8)
    scl[40:50, 40:50] = 9
    listed = [
        archive.scene(f"2020-06-0{d}T10:00:00", where, {"B04": 1000 + d, "B11": 2000}, scl)
        for d in (1, 4, 6)
    ]
    made = composite(listed, grid, MASKED).compute()
    assert made.reflectance.values.all()
    assert (made.clear_count.values[20:40, 20:40] == 0).all()
    assert (made.quality.values[20:40, 20:40] == 4).all()
    assert set(np.unique(made.quality)) == {1, 2, 4}
    np.testing.assert_array_equal(made.clear_count.values > 0, made.quality.values == 1)


def test_an_observation_is_one_in_all_bands_and_the_next_best_takes_its_place(archive):
    """Left: the clear date lacks B11, so the cloudy one is used; right: both lack a band, so nothing is."""
    grid, where = grid_at(LEFT, TOP, 60, 60), grid_at(LEFT - 600, TOP + 600, 180, 180)
    clear_b11, cloudy_b04 = np.full((90, 90), 2000), np.full((180, 180), 5000)
    clear_b11[:, 40:] = 0  # from column 20 of the grid on, in 10 m pixels
    cloudy_b04[:, 100:] = 0  # from column 40 on
    listed = [
        archive.scene("2020-06-01T10:00:00", where, {"B04": 1000, "B11": clear_b11}, 4),
        archive.scene("2020-06-04T10:00:00", where, {"B04": cloudy_b04, "B11": 6000}, 9),
    ]
    made = composite(listed, grid, MASKED).compute()
    expected = [
        ((slice(0, 20)), 1000, 2000, 1, 1),
        (slice(20, 40), 5000, 6000, 0, 4),
        (slice(40, 60), 0, 0, 0, 0),
    ]
    for columns, b04, b11, count, quality in expected:
        assert np.unique(made.reflectance.values[0][:, columns]) == [b04]
        assert np.unique(made.reflectance.values[1][:, columns]) == [b11]
        assert np.unique(made.clear_count.values[:, columns]) == [count]
        assert np.unique(made.quality.values[:, columns]) == [quality]


def test_what_bands_lack_is_found_at_once(archive, monkeypatch):
    """Six dates, each without a pixel in one band or the other: the block is made twice, not once more for each."""
    grid, where = grid_at(LEFT, TOP, 60, 60), grid_at(LEFT - 600, TOP + 600, 180, 180)
    listed = []
    for n in range(6):
        b04, b11 = np.full((180, 180), 1000 + n), np.full((90, 90), 2000 + n)
        (b04 if n % 2 else b11)[70 // (2 - n % 2) : 80 // (2 - n % 2)] = 0
        listed.append(
            archive.scene(f"2020-06-{1 + 2 * n:02d}T10:00:00", where, {"B04": b04, "B11": b11})
        )
    rounds, made = [], block._Block.composite
    monkeypatch.setattr(block._Block, "composite", lambda self: rounds.append(1) or made(self))
    composite(listed, grid, PLAIN).compute()
    assert len(rounds) == 2


def tiles_with_holes(archive, rng):
    """Five days of up to three overlapping tiles, with clouds and with holes in B04 or B11 at other places in each tile."""
    listed, tiles = [], []
    for day in range(5):
        for n in range(1 + day % 3):
            scl = np.where(rng.random((120, 120)) < 0.01, 9, 4).astype(np.uint8)
            scl[:, : 20 * n] = 0  # the second tile begins 400 m further east than the first
            b04, b11 = rng.integers(1, 4000, (240, 240)), rng.integers(1, 4000, (120, 120))
            for _ in range(8):
                row, column = rng.integers(30, 80, 2)
                b04[2 * row : 2 * row + 9, 2 * column : 2 * column + 15] = rng.choice([0, 65535])
                row, column = rng.integers(30, 80, 2)
                b11[row : row + 5, column : column + 7] = rng.choice([0, 65535])
            where, tile = grid_at(LEFT - 600, TOP + 600, 240, 240), f"33U{'UVW'[n]}R"
            listed.append(
                archive.scene(
                    f"2020-06-{1 + 4 * day:02d}T10:00:{n:02d}",
                    where,
                    {"B04": b04, "B11": b11},
                    scl,
                    tile=tile,
                )
            )
            tiles.append((day, scl, b04, b11))
    return listed, tiles


def first_whole_tile(tiles, reach):
    """Per day the value [day, band, y, x] of the first tile with all bands, in plain numpy; NaN where that tile is cloudy.

    A tile is masked as if it and the later tiles of its day were all there is.
    """
    out = np.full((5, 2, 240, 240), np.nan)
    for day in range(5):
        of_day = [t[1:] for t in tiles if t[0] == day]
        undecided = np.ones((120, 120), bool)
        for n, (_, b04, b11) in enumerate(of_day):
            inside = [ndimage.minimum_filter(scl, 3) != 0 for scl, *_ in of_day[n:]]
            scl = np.select(inside, [scl for scl, *_ in of_day[n:]], 0)
            y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
            hidden = ndimage.binary_dilation(scl == 9, y**2 + x**2 <= reach**2)
            there = (b04 % 65535 != 0).reshape(120, 2, 120, 2).all(axis=(1, 3)) & (b11 % 65535 != 0)
            here = undecided & inside[0]
            take = (here & there & ~hidden).repeat(2, 0).repeat(2, 1)
            out[day][:, take] = np.stack([b04, b11.repeat(2, 0).repeat(2, 1)])[:, take]
            undecided &= ~(here & (there | hidden))
    return out[..., 60:140, 60:140]


def test_a_hole_in_a_tile_is_filled_from_the_next_tile_of_the_day(archive):
    grid = grid_at(LEFT, TOP, 80, 80)
    recipe = dataclasses.replace(
        PLAIN, mask=(MaskRule(classes=(9,), dilate_m=60),), fallback=(), block_px=96
    )
    listed, tiles = tiles_with_holes(archive, np.random.default_rng(3))
    expected = first_whole_tile(tiles, 3)
    made = composite(listed, grid, recipe).compute()
    np.testing.assert_array_equal(made.clear_count, np.isfinite(expected[:, 0]).sum(axis=0))
    seen = np.isfinite(expected[:, 0]).any(axis=0)
    np.testing.assert_array_equal(
        made.reflectance.values[:, seen], np.rint(np.nanmedian(expected[..., seen], axis=0))
    )
    assert not made.reflectance.values[:, ~seen].any()
    bright = dataclasses.replace(recipe, bright_override=BrightOverride(window_m=120, classes=(9,)))
    for rules in (recipe, bright):
        whole = composite(listed, grid, rules).compute()
        for side in (16, 40):
            cut = composite(
                listed, grid, dataclasses.replace(rules, block_px=side, chunk_px=8)
            ).compute()
            for name in whole.data_vars:
                np.testing.assert_array_equal(
                    cut[name], whole[name], err_msg=f"{name}, blocks of {side}"
                )


@pytest.mark.parametrize("holed", [False, True])
def test_the_next_tile_of_a_day_is_read_only_for_holes(archive, holed):
    grid, where = grid_at(LEFT, TOP, 60, 60), grid_at(LEFT - 600, TOP + 600, 180, 180)
    b11 = np.full((90, 90), 2000)
    b11[40:50, 35:45] = 0 if holed else 2000
    listed = [
        archive.scene("2020-06-01T10:00:00", where, {"B04": 1000, "B11": b11}, tile="33UUR"),
        archive.scene("2020-06-01T10:00:14", where, {"B04": 1010, "B11": 2010}, tile="33UVR"),
    ]
    ledger = Ledger()
    made = composite(listed, grid, PLAIN, ledger).compute()
    hole = np.zeros((60, 60), bool)
    hole[20:40, 10:30] = holed
    np.testing.assert_array_equal(
        made.reflectance.values - np.array([1000, 2000])[:, None, None],
        np.where(hole, 10, 0)[None].repeat(2, 0),
    )
    assert (made.clear_count == 1).all()
    assert (made.quality == 1).all()
    table = ledger.table().set_index(["scene", "band"])
    read = {(0, "SCL"), (1, "SCL"), (0, "B04"), (0, "B11")} | (
        {(1, "B04"), (1, "B11")} if holed else set()
    )
    assert set(table.index) == {(listed[n].id, band) for n, band in read}
    assert (table.planned == 1).all()
    assert (table.read == 1).all()
    assert ledger.totals()["completeness"] == 1


def test_bands_of_a_scene_that_no_pixel_needs_are_not_read(archive):
    """The mask decides first: the overcast scene's bands are gone, and nobody asks for them."""
    grid, where = grid_at(LEFT, TOP, 60, 60), grid_at(LEFT - 600, TOP + 600, 180, 180)
    listed = [
        archive.scene("2020-06-01T10:00:00", where, {"B04": 8000, "B11": 8000}, 9),
        archive.scene("2020-06-04T10:00:00", where, {"B04": 1000, "B11": 2000}, 4),
    ]
    for band in ("B04", "B11"):
        Path(listed[0].assets[band].href).unlink()
    assert np.unique(composite(listed, grid, MASKED).compute().reflectance.sel(band="B04")) == [
        1000
    ]
    with pytest.raises(ReadError, match="No such file"):
        composite(listed, grid, PLAIN).compute()


def test_two_overpasses_of_one_day_are_two_observations(archive):
    """Far north two satellites pass on one day: the clear one must not hide behind the cloudy one."""
    grid, where = grid_at(LEFT, TOP, 60, 60), grid_at(LEFT - 600, TOP + 600, 180, 180)
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


# Reducers, seasons, choices: through the whole engine


EVERY = {
    "median": {},
    "geomedian": {},
    "best-pixel": {"best_pixel": BestPixel()},
}
FOUR = ("B02", "B04", "B08", "B11")


def four_bands(archive, rng, days=9, cloud=0.2, bright=0.0):
    """Dates of random pixels in four bands, clouds strewn about, some on all dates; a third in part outside the swath."""
    always = rng.random((160, 160)) < bright
    where = grid_at(LEFT - 1200, TOP + 1200, 320, 320)
    many, files = dataclasses.replace(archive, bands=FOUR), []
    listed = []
    for day in range(days):
        scl = np.where((rng.random((160, 160)) < cloud) | always, 9, 4).astype(np.uint8)
        if day % 3 == 0:
            scl[:, : rng.integers(60, 100)] = 0
        pixels = {
            b: rng.integers(100, 4000, (320, 320) if b != "B11" else (160, 160)).astype(np.uint16)
            for b in FOUR
        }
        listed.append(
            many.scene(f"2020-0{4 + day % 6}-{3 + 2 * day:02d}T10:00:00", where, pixels, scl)
        )
        files.append({**pixels, "SCL": scl})
    return listed, files


def spectra(files, row, column):
    """(day, four bands) of one pixel of the grid, in plain numpy: of clear dates whose neighbours are inside the swath."""
    y, x = row + 120, column + 120
    kept = []
    for day, content in enumerate(files):
        scl = content["SCL"]
        around = scl[y // 2 - 1 : y // 2 + 2, x // 2 - 1 : x // 2 + 2]
        if around.all() and scl[y // 2, x // 2] == 4:
            kept.append(
                (
                    day,
                    [
                        int(content[b][y, x]) if b != "B11" else int(content[b][y // 2, x // 2])
                        for b in FOUR
                    ],
                )
            )
    return kept


@pytest.mark.parametrize("reducer", EVERY)
def test_every_reducer_by_brute_force(archive, reducer):
    grid = grid_at(LEFT, TOP, 48, 36)
    recipe = dataclasses.replace(
        PLAIN,
        bands=FOUR,
        mask=(MaskRule(classes=(9,)),),
        fallback=(),
        reducer=reducer,
        **EVERY[reducer],
        block_px=32,
        chunk_px=16,
    )
    listed, files = four_bands(archive, np.random.default_rng(3))
    made = composite(listed, grid, recipe).compute()
    assert set(made.data_vars) == {"reflectance", *recipe.layers}
    for row, column in np.random.default_rng(0).integers(0, (36, 48), (60, 2)):
        kept = spectra(files, row, column)
        got = made.reflectance.values[:, row, column].astype(int)
        assert made.clear_count.values[row, column] == len(kept)
        values = np.array([v for _, v in kept], dtype=float)
        if reducer == "median":
            np.testing.assert_array_equal(got, np.rint(np.median(values, axis=0)))
        elif reducer == "geomedian":
            middle = values.mean(axis=0)
            for _ in range(2000):
                weight = 1 / np.maximum(np.linalg.norm(values - middle, axis=1), 1e-9)
                middle = (values * weight[:, None]).sum(axis=0) / weight.sum()
            assert np.abs(got - middle).max() <= 0.7
            euclidean = np.median(np.linalg.norm(values - middle, axis=1)) / 1e4
            assert made.emad.values[row, column] == pytest.approx(euclidean, abs=2e-4)
        # The score of best-pixel has tests of its own; that it is one date's pixels is tested below.


def test_a_chosen_date_is_one_date_in_all_bands(archive):
    """Each date's bands are its own number: whatever is chosen, all bands and the day of year are of the same date."""
    grid, where = grid_at(LEFT, TOP, 48, 36), grid_at(LEFT - 1500, TOP + 1500, 400, 400)
    many, rng = dataclasses.replace(archive, bands=FOUR), np.random.default_rng(8)
    recipe = dataclasses.replace(
        PLAIN,
        bands=FOUR,
        mask=(MaskRule(classes=(9,)),),
        reducer="best-pixel",
        best_pixel=BestPixel(),
    )
    listed = []
    for n in range(6):
        scl = np.where(rng.random((200, 200)) < 0.3, 9, 4).astype(np.uint8)
        pixels = {
            "B02": 1000 + n,
            "B04": 1100 + n,
            "B08": 2000 + int(rng.integers(0, 900)) // 10 * 10 + n,
            "B11": 3000 + n,
        }
        listed.append(many.scene(f"2020-07-{1 + 3 * n:02d}T10:00:00", where, pixels, scl))
    made = composite(listed, grid, recipe).compute()
    date = made.reflectance.sel(band="B02").values - 1000
    assert len(np.unique(date)) > 1
    for band, base in (("B04", 1100), ("B11", 3000)):
        np.testing.assert_array_equal(made.reflectance.sel(band=band).values - base, date)
    np.testing.assert_array_equal(made.reflectance.sel(band="B08").values % 10, date)
    np.testing.assert_array_equal(
        made.day_of_year.values, 183 + 3 * date
    )  # 1 July 2020 is the 183rd day


@pytest.mark.parametrize("band", ["B02", "B04"])
def test_a_black_pixel_is_chosen_only_where_all_are(archive, band):
    """Blue of 1 is free of haze, on the best day of the year, too."""
    grid, where = grid_at(LEFT, TOP, 48, 36), grid_at(LEFT - 1500, TOP + 1500, 400, 400)
    many = dataclasses.replace(archive, bands=FOUR)
    recipe = dataclasses.replace(
        PLAIN,
        bands=FOUR,
        mask=(MaskRule(classes=(9,)),),
        reducer="best-pixel",
        best_pixel=BestPixel(),
    )
    ground = {"B02": 500, "B04": 700, "B08": 2500, "B11": 1900}
    better, worse = (
        ground | {band: np.full((400, 400), ground[band], np.uint16)} for _ in range(2)
    )
    better[band][:, :170], worse[band][:, :160] = 1, 1
    worse |= {"B08": 2000}
    listed = [
        many.scene("2020-07-24T10:00:00", where, better),
        many.scene("2020-09-24T10:00:00", where, worse),
    ]
    made = composite(listed, grid, recipe).compute()
    day = np.where(
        (np.arange(48) >= 10) & (np.arange(48) < 20), 268, 206
    )  # black on both, on the better one, on neither
    np.testing.assert_array_equal(made.day_of_year.values, np.broadcast_to(day, (36, 48)))
    assert (made.clear_count == 2).all()


FIVE = (*FOUR, "B12")


def days_with_black(archive, rng, holes=0.0):
    """Seven dates with clouds, black patches in single bands, and water: black on all dates in B11 and B12.

    Returns the scenes, and of each date and band the pixels of a grid of 80 x 80 at 10 m; 0 = cloud, or a hole in a band.
    """
    many, listed = dataclasses.replace(archive, bands=FIVE), []
    pixels = np.zeros((7, 5, 80, 80), int)
    for day in range(7):
        scl = np.where(rng.random((200, 200)) < 0.2, 9, 4).astype(np.uint8)
        files, usable = {}, (scl[80:120, 80:120] == 4).repeat(2, 0).repeat(2, 1)
        for k, band in enumerate(FIVE):
            step = NATIVE_M[band] // 10
            side = 400 // step
            values = rng.integers(100, 4000, (side, side))
            for _ in range(10):
                row, column = rng.integers(side * 2 // 5, side * 3 // 5, 2)
                values[row : row + 12 // step, column : column + 8 // step] = 1
            if step == 2:
                values[80:120, 80:90] = 1
                values[rng.random((side, side)) < holes] = 0
            files[band] = values
            pixels[day, k] = values.repeat(step, 0).repeat(step, 1)[160:240, 160:240]
        pixels[day] *= usable & (pixels[day] != 0).all(axis=0)
        listed.append(
            many.scene(
                f"2020-0{5 + day % 5}-{3 + 3 * day:02d}T10:00:00",
                grid_at(LEFT - 1600, TOP + 1600, 400, 400),
                files,
                scl,
            )
        )
    return listed, pixels


@pytest.mark.parametrize("holes", [0.0, 0.03])
def test_the_date_black_in_the_fewest_bands_is_chosen(archive, holes):
    """In any band of the recipe, whether the choice looks at it or not; water takes its best date."""
    grid = grid_at(LEFT, TOP, 80, 80)
    only = BestPixel(opacity_weight=0, sharpness_weight=0, cloud_weight=0)
    recipe = dataclasses.replace(
        PLAIN,
        bands=FIVE,
        mask=(MaskRule(classes=(9,)),),
        fallback=(),
        reducer="best-pixel",
        best_pixel=only,
        block_px=96,
    )
    listed, pixels = days_with_black(archive, np.random.default_rng(11), holes)
    yeardays = np.array([s.datetime.timetuple().tm_yday for s in listed])
    observed = pixels[:, 0] != 0
    score = np.broadcast_to(-np.abs(yeardays - only.day)[:, None, None], observed.shape)
    assert len(np.unique(np.abs(yeardays - only.day))) == 7
    black = np.where(observed, (pixels == 1).sum(axis=1), 99)
    best = np.where(black == black.min(axis=0), score, -np.inf).argmax(axis=0)
    expected = np.take_along_axis(pixels, best[None, None], axis=0)[0]
    seen = observed.any(axis=0)
    made = composite(listed, grid, recipe).compute()
    np.testing.assert_array_equal(made.reflectance, np.where(seen, expected, 0))
    np.testing.assert_array_equal(made.day_of_year, np.where(seen, yeardays[best], 0))
    np.testing.assert_array_equal(made.quality, seen)
    if not holes:
        np.testing.assert_array_equal(made.clear_count, observed.sum(axis=0))
    assert (made.reflectance.values[3:, :, :20][:, seen[:, :20]] == 1).all()  # the water
    assert (expected[:, :, 20:] == 1).mean() < 0.02 < (pixels[:, :, :, 20:] == 1).mean()
    for side in (16, 40):
        cut = composite(
            listed, grid, dataclasses.replace(recipe, block_px=side, chunk_px=8)
        ).compute()
        for name in made.data_vars:
            np.testing.assert_array_equal(
                cut[name], made[name], err_msg=f"{name}, blocks of {side}"
            )


@pytest.mark.parametrize("water", [False, True])
def test_black_bands_are_read_once_more_and_others_once(archive, monkeypatch, water):
    """Water is black in B11 on all dates: B11 is read to choose, and no band is read a third time."""
    grid, where = grid_at(LEFT, TOP, 48, 36), grid_at(LEFT - 1500, TOP + 1500, 400, 400)
    many = dataclasses.replace(archive, bands=FOUR)
    recipe = dataclasses.replace(PLAIN, bands=FOUR, reducer="best-pixel", best_pixel=BestPixel())
    b11 = np.full((200, 200), 1900)
    b11[75:90, 75:90] = 1 if water else 1900
    pixels = {"B02": 500, "B04": 700, "B08": 2500, "B11": b11}
    listed = [many.scene(f"2020-0{month}-24T10:00:00", where, pixels) for month in (6, 7, 8)]
    read, begin = [], bands.start_read
    monkeypatch.setattr(
        bands,
        "start_read",
        lambda scene, band, *a: read.append((scene.id, band)) or begin(scene, band, *a),
    )
    ledger = Ledger()
    made = composite(listed, grid, recipe, ledger).compute()
    assert (made.quality == 1).all()
    assert (made.day_of_year == 206).all()
    np.testing.assert_array_equal(made.reflectance[3], b11[75:93, 75:99].repeat(2, 0).repeat(2, 1))
    times = {band: sorted(read.count((s.id, band)) for s in listed) for band in FOUR}
    once = [1, 1, 1]
    assert times == {"B02": once, "B04": once, "B08": once, "B11": [2, 2, 2] if water else once}
    table = ledger.table()
    assert (table.planned == 1).all()
    assert (table.read == 1).all()


@pytest.mark.parametrize(
    ("reducer", "rule"), [("medoid", {}), ("max-ndvi", {}), ("percentile", {"percentile": 30.0})]
)
def test_reducers_of_earlier_versions_are_refused_by_name(archive, reducer, rule):
    where = grid_at(LEFT, TOP, 60, 60)
    scene = archive.scene("2020-06-01T10:00:00", where, {"B04": 1, "B11": 1})
    bands = ("B04", "B08") if reducer == "max-ndvi" else PLAIN.bands
    recipe = dataclasses.replace(PLAIN, reducer=reducer, bands=bands, **rule)
    scene.assets["B08"] = scene.assets["B04"]
    with pytest.raises(
        ReadError, match=f"'{reducer}' has been removed; expected one of median, geomedian"
    ):
        composite([scene], where, recipe)


def test_bands_read_into_the_memory_of_others_are_the_same(archive, monkeypatch):
    """One band ahead, against all at once, which share nothing: two tiles a day, clouds, a veil."""
    grid, rng = grid_at(LEFT, TOP, 96, 72), np.random.default_rng(12)
    recipe = dataclasses.replace(
        PLAIN, bands=BANDS, mask=(MaskRule(classes=(9,)),), haze=HazeTest(), fallback=()
    )
    ten, listed = dataclasses.replace(archive, bands=BANDS), []
    for n in range(7):
        for left in (-1200, 480) if n % 2 else (-1200,):
            where = grid_at(LEFT + left, TOP + 1200, 300 if n % 2 else 400, 400)
            height, width = where.shape
            scl = np.full((height // 2, width // 2), 4, np.uint8)
            for _ in range(12):
                row, column = rng.integers(40, 110, 2)
                scl[row : row + 14, column : column + 14] = 9
            pixels = {
                b: rng.integers(1000, 1200, (height, width)) for b in BANDS if NATIVE_M[b] == 10
            }
            pixels |= {
                b: rng.integers(1000, 1200, (height // 2, width // 2))
                for b in BANDS
                if NATIVE_M[b] == 20
            }
            pixels["B02"] += 2000 * (n == 3)  # a veil over all of that day
            listed.append(
                ten.scene(f"2020-06-{1 + 4 * n:02d}T10:00:{left % 60:02d}", where, pixels, scl)
            )
    monkeypatch.setattr(bands, "AHEAD", 99)
    apart = composite(listed, grid, recipe).compute()
    read, begin = [], bands.start_read
    monkeypatch.setattr(bands, "AHEAD", 0)
    monkeypatch.setattr(
        bands,
        "start_read",
        lambda scene, band, *a: read.append((scene.id, band)) or begin(scene, band, *a),
    )
    made = composite(listed, grid, recipe).compute()
    assert (made.clear_count == 0).any()
    assert made.clear_count.max() == 6
    for name in made.data_vars:
        np.testing.assert_array_equal(made[name], apart[name], err_msg=name)
    of_veil = {
        band for scene, band in read if scene in {s.id for s in listed if s.datetime.day == 13}
    }
    assert {"B02", "B04"} <= of_veil
    assert not {"B08", "B8A", "B11", "B12"} & of_veil


def test_a_date_that_is_clear_beside_the_block_only_is_no_observation_in_it(archive):
    """The haze test looks 60 m beyond the block, where the first date is clear; the other dates' bands must stay their own."""
    grid, where = grid_at(LEFT, TOP, 48, 36), grid_at(LEFT - 1200, TOP + 1200, 320, 320)
    three, listed = dataclasses.replace(archive, bands=("B02", "B04", "B11")), []
    for n, value in enumerate((9000, 500, 600, 800)):
        scl = np.full((160, 160), 4 if n else 9, np.uint8)
        scl[:, 57:60] = 4
        pixels = {"B02": value // 2, "B04": value, "B11": value}
        listed.append(three.scene(f"2020-06-{1 + 5 * n:02d}T10:00:00", where, pixels, scl))
    recipe = dataclasses.replace(
        PLAIN, bands=three.bands, mask=(MaskRule(classes=(9,)),), haze=HazeTest(), fallback=()
    )
    made = composite(listed, grid, recipe).compute()
    assert (made.clear_count == 3).all()
    assert [np.unique(made.reflectance.sel(band=b)).tolist() for b in three.bands] == [
        [300],
        [600],
        [600],
    ]


@pytest.mark.parametrize("reducer", EVERY)
def test_a_date_under_haze_is_no_choice_of_any_reducer(archive, reducer):
    """Five dates, the third hazy over the left half and of the highest NDVI there: no pixel of it, no hole for it."""
    grid, where = grid_at(LEFT, TOP, 48, 36), grid_at(LEFT - 1200, TOP + 1200, 320, 320)
    many, rng, listed = dataclasses.replace(archive, bands=FOUR), np.random.default_rng(2), []
    recipe = dataclasses.replace(
        PLAIN, bands=FOUR, haze=HazeTest(), reducer=reducer, **EVERY[reducer], block_px=32
    )
    for n in range(5):
        blue, red, nir = (
            np.full((320, 320), 400),
            rng.integers(480, 520, (320, 320)),
            np.full((320, 320), 2000 + n),
        )
        if n == 2:
            blue[:, :144], nir[:, :144] = 1500, 9000
        pixels = {"B02": blue, "B04": red, "B08": nir, "B11": 3000 + n}
        listed.append(many.scene(f"2020-07-{11 + 4 * n:02d}T10:00:00", where, pixels))
    made = composite(listed, grid, recipe).compute()
    assert (made.reflectance != 0).all()
    assert (made.clear_count.values[:, :20] == 4).all()
    assert (made.reflectance.sel(band="B02").values == 400).all()
    assert (made.reflectance.sel(band="B08").values < 2005).all()


def test_the_best_pixel_is_near_its_day_and_far_from_clouds(archive):
    grid, where = grid_at(LEFT, TOP, 48, 48), grid_at(LEFT - 2400, TOP + 2400, 600, 600)
    many = dataclasses.replace(archive, bands=FOUR)
    rule = BestPixel(
        day=196, day_spread=20, opacity_weight=0, sharpness_weight=0, cloud_distance_m=300
    )
    recipe = dataclasses.replace(
        PLAIN,
        bands=FOUR,
        mask=(MaskRule(classes=(9,)),),
        reducer="best-pixel",
        best_pixel=rule,
        block_px=48,
        chunk_px=48,
    )
    scl = np.full((300, 300), 4, np.uint8)
    scl[:, :124] = 9  # of the best date: cloud up to column 8 of the grid
    listed = [
        many.scene("2020-07-14T10:00:00", where, dict.fromkeys(FOUR, 1000), scl),  # the 196th day
        many.scene("2020-07-24T10:00:00", where, dict.fromkeys(FOUR, 2000)),
        many.scene("2020-09-20T10:00:00", where, dict.fromkeys(FOUR, 3000)),
    ]
    made = composite(listed, grid, recipe).compute()
    # Ten days off its day costs 1 - exp(-1 / 8) = 0.1175 of a date, a cloud at d metres, up to 300, 1 - d / 300.
    away = np.maximum(
        (np.arange(48) // 2 * 2 - 8) * 10 + 20, 0
    )  # of 20 m pixels: from the last cloudy one
    best = np.where((away > 0) & (np.minimum(away / 300, 1) > np.exp(-1 / 8)), 1000, 2000)
    np.testing.assert_array_equal(made.reflectance.values[0], np.broadcast_to(best, (48, 48)))
    np.testing.assert_array_equal(np.unique(made.day_of_year), [196, 206])


def test_a_cloud_is_kept_away_from_across_blocks(archive):
    """A cloud of the first date in the west of the first block: up to 1 km off, in the second, the other date is better."""
    grid, where = grid_at(LEFT, TOP, 128, 48), grid_at(LEFT - 1500, TOP + 1500, 500, 400)
    only = BestPixel(day_weight=0, opacity_weight=0, sharpness_weight=0, cloud_distance_m=1000)
    recipe = dataclasses.replace(
        PLAIN,
        bands=FOUR,
        mask=(MaskRule(classes=(9,)),),
        reducer="best-pixel",
        best_pixel=only,
        block_px=64,
    )
    many, listed = dataclasses.replace(archive, bands=FOUR), []
    for n in range(2):
        scl = np.full((200, 250), 4, np.uint8)
        scl[:, 75] = 4 if n else 9  # the grid's first 20 m
        listed.append(
            many.scene(
                f"2020-07-{6 + 5 * n:02d}T10:00:00", where, dict.fromkeys(FOUR, 1000 + n), scl
            )
        )
    taken = composite(listed, grid, recipe).compute().reflectance.sel(band="B04").values - 1000
    far = 20 * (np.arange(128) // 2)  # metres from the cloud, pixel of 20 m to pixel
    np.testing.assert_array_equal(taken, np.broadcast_to(far < 1000, taken.shape).astype(int))


def test_the_surroundings_of_bright_ground_reach_across_blocks(archive):
    """A bright spot in the second block on ten dates; on two, cloud in the first, 300 m off: there it is cloud, too."""
    grid, where = grid_at(LEFT, TOP, 128, 48), grid_at(LEFT - 1500, TOP + 1500, 500, 400)
    recipe = dataclasses.replace(
        PLAIN,
        mask=(MaskRule(classes=(9,)),),
        bright_override=BrightOverride(classes=(9,)),
        fallback=(),
        block_px=64,
    )
    listed = []
    for n in range(10):
        scl = np.full((200, 250), 5, np.uint8)
        scl[80:84, 75 + 35 : 75 + 37] = 9  # 700 m into the grid
        scl[:, 75 + 5 : 75 + 20] = 9 if n < 2 else 5  # 100 to 400 m into it
        listed.append(
            archive.scene(
                f"2020-07-{1 + 3 * n:02d}T10:00:00", where, {"B04": 1000, "B11": 1000}, scl
            )
        )
    count = composite(listed, grid, recipe).compute().clear_count.values
    np.testing.assert_array_equal(np.unique(count[10:18, 70:74]), [8])
    np.testing.assert_array_equal(np.unique(count[:, 74:]), [10])


def test_a_wider_season_and_a_neighbouring_year_fill_what_summer_leaves(archive):
    """Left: clear in July; then clear in October only; then in the year before only; then never."""
    grid, where = grid_at(LEFT, TOP, 80, 60), grid_at(LEFT - 600, TOP + 600, 200, 180)
    recipe = dataclasses.replace(
        MASKED,
        mask=(MaskRule(classes=(9,)),),
        months=(7,),
        wider_months=(10,),
        fallback=("wider-season", "neighbour-year", "thin", "cloud"),
    )

    def clear_in(first, last):
        scl = np.full((90, 100), 9, np.uint8)
        scl[:, 30 + first // 2 : 30 + last // 2] = 4
        return scl

    listed = [
        archive.scene("2020-07-01T10:00:00", where, {"B04": 1000, "B11": 1000}, clear_in(0, 20)),
        archive.scene("2020-10-01T10:00:00", where, {"B04": 2000, "B11": 2000}, clear_in(0, 40)),
        archive.scene("2019-07-01T10:00:00", where, {"B04": 3000, "B11": 3000}, clear_in(0, 60)),
        archive.scene("2019-10-01T10:00:00", where, {"B04": 4000, "B11": 4000}, 4),  # of no use
    ]
    made = composite(listed, grid, recipe, year=2020).compute()
    expected = [
        (slice(0, 20), 1000, 1, 1),
        (slice(20, 40), 2000, 5, 1),
        (slice(40, 60), 3000, 6, 1),
        (slice(60, 80), 1000, 4, 0),
    ]
    for columns, value, quality, count in [*expected, (slice(60, 80), 1000, 4, 0)]:
        assert np.unique(made.reflectance.values[:, :, columns]) == [value]
        assert np.unique(made.quality.values[:, columns]) == [quality]
        assert np.unique(made.clear_count.values[:, columns]) == [count]
    with pytest.raises(ReadError, match=r"of 2019\.\.2020, of which a composite is of one year"):
        composite(listed, grid, recipe)
    two = dataclasses.replace(recipe, min_clear=2)
    made = composite(listed, grid, two, year=2020).compute()
    assert np.unique(made.reflectance.values[:, :, :20]) == [1500]  # the mean of July and October
    assert np.unique(made.quality.values[:, :20]) == [5]


def test_the_clearest_dates_are_read_and_no_hole_is_left(archive):
    """Twelve dates, of which three clear ones are enough; one corner is clear on another date only."""
    grid, where = grid_at(LEFT, TOP, 80, 80), grid_at(LEFT - 600, TOP + 600, 200, 200)
    recipe = dataclasses.replace(
        MASKED, mask=(MaskRule(classes=(9,)),), max_clear_observations=3, block_px=96
    )
    listed = []
    for n in range(12):
        scl = np.full((100, 100), 4, np.uint8)
        if n % 2:
            scl[:, :50] = 9
        if n != 5:
            scl[60:70, 60:70] = 9  # rows and columns 60-79 of the grid
        listed.append(
            archive.scene(
                f"2020-06-{1 + 2 * n:02d}T10:00:00", where, {"B04": 1000 + n, "B11": 2000}, scl
            )
        )
    ledger = Ledger()
    made = composite(listed, grid, recipe, ledger).compute()
    np.testing.assert_array_equal(np.unique(made.clear_count), [1, 3])
    assert np.unique(made.reflectance.values[0][60:80, 60:80]) == [1005]
    table = ledger.table()
    assert table[table.band == "B04"].scene.nunique() == 4
    assert table[table.band == "SCL"].scene.nunique() == 12
    everything = composite(
        listed, grid, dataclasses.replace(recipe, max_clear_observations=None)
    ).compute()
    assert ((everything.clear_count > 0) == (made.clear_count > 0)).all()


@pytest.mark.parametrize("reducer", EVERY)
def test_a_block_made_in_parts_is_the_same(archive, reducer, monkeypatch):
    """So that memory has a bound whatever the number of dates."""
    grid = grid_at(
        LEFT, TOP, 180, 156
    )  # half of which is no multiple of the bright override's cells
    mask = (MaskRule(classes=(9,), dilate_m=40),)
    override = BrightOverride(window_m=120, classes=(9,))
    recipe = dataclasses.replace(
        PLAIN,
        bands=FOUR,
        mask=mask,
        bright_override=override,
        haze=HazeTest(),
        reducer=reducer,
        **EVERY[reducer],
        block_px=192,
        chunk_px=96,
    )
    listed, _ = four_bands(archive, np.random.default_rng(5), cloud=0.1, bright=0.02)
    whole = composite(listed, grid, recipe).compute()
    made, calls = block.composite_block, []
    monkeypatch.setattr(block, "BLOCK_BYTES", 2_000_000)
    monkeypatch.setattr(block, "composite_block", lambda *a: calls.append(a[1].shape) or made(*a))
    parts = composite(listed, grid, recipe).compute()
    assert len(calls) > 2
    for name in whole.data_vars:
        np.testing.assert_array_equal(parts[name], whole[name], err_msg=name)


def test_a_second_opinion_is_asked_of_every_date(archive):
    """A network that calls everything brighter than 3000 in the near infrared thin cloud, where SCL sees nothing."""
    grid, where = grid_at(LEFT, TOP, 60, 60), grid_at(LEFT - 1200, TOP + 1200, 320, 320)
    bands = ("B03", "B04", "B08")
    second = SecondOpinion(weights=("net.pt",), dilate_m=0)
    recipe = dataclasses.replace(PLAIN, bands=bands, second_opinion=second)
    hazy = np.full((320, 320), 2000)
    hazy[:, 150:] = 5000
    listed = [
        dataclasses.replace(archive, bands=bands).scene(
            f"2020-06-0{n}T10:00:00", where, {"B03": 500, "B04": 600, "B08": nir}
        )
        for n, nir in ((1, 2000), (3, hazy), (5, 2000))
    ]
    asked = []

    def opinion(image):
        asked.append(image.shape)
        assert np.unique(image[0]) == [500]
        return np.where(image[2] > 3000, 2, 0).astype(np.uint8)

    made = composite(listed, grid, recipe, tools=Tools(opinion=opinion)).compute()
    assert len(asked) == 3
    np.testing.assert_array_equal(made.clear_count.values[0], np.where(np.arange(60) < 30, 3, 2))
    with pytest.raises(ReadError, match="asks for second opinion on clouds, and none is given"):
        composite(listed, grid, recipe)
    with pytest.raises(ReadError, match="asks for no second opinion on clouds, and one is given"):
        composite(
            listed,
            grid,
            dataclasses.replace(recipe, second_opinion=None),
            tools=Tools(opinion=opinion),
        )


def test_layers_without_an_observation(archive):
    """A scene beside the grid: integers are 0 and deviations NaN, never a number that could be one."""
    far = [
        archive.scene(
            "2020-06-01T10:00:00", grid_at(LEFT + 90000, TOP, 60, 60), {"B04": 1, "B11": 1}
        )
    ]
    near_by = [
        archive.scene("2020-06-01T10:00:00", grid_at(LEFT + 300, TOP, 60, 60), {"B04": 1, "B11": 1})
    ]
    recipe = dataclasses.replace(PLAIN, reducer="geomedian")
    for listed, seen in ((far, False), (near_by, True)):
        made = composite(listed, grid_at(LEFT, TOP, 60, 60), recipe).compute()
        assert bool(made.reflectance.values.any()) is seen
        assert not made.reflectance.values[:, :, :30].any()
        assert np.isnan(made.emad.values[:, :30]).all()
        assert np.isfinite(made.emad.values[:, 34:]).any() == seen
