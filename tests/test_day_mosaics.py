"""Overlapping tiles of one day are one observation, and holes come from the next tile."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from known_composites import LEFT, MASKED, PLAIN, TOP, times_read
from known_scenes import grid_at
from minecube.catalog import BrightOverride, MaskRule
from minecube.composite import composite
from minecube.errors import ReadError
from minecube.reader import Ledger


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


def test_what_bands_lack_is_found_at_once(archive):
    """Six dates, each without a pixel in one band or the other: the block is made twice, not once more for each."""
    grid, where = grid_at(LEFT, TOP, 60, 60), grid_at(LEFT - 600, TOP + 600, 180, 180)
    listed = []
    for n in range(6):
        b04, b11 = np.full((180, 180), 1000 + n), np.full((90, 90), 2000 + n)
        (b04 if n % 2 else b11)[70 // (2 - n % 2) : 80 // (2 - n % 2)] = 0
        listed.append(
            archive.scene(f"2020-06-{1 + 2 * n:02d}T10:00:00", where, {"B04": b04, "B11": b11})
        )
    ledger = Ledger()
    composite(listed, grid, PLAIN, ledger).compute()
    for scene in listed:
        assert [times_read(ledger, scene, band, grid) for band in PLAIN.bands] == [2, 2]


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
