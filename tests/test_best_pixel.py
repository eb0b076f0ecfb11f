"""The best pixel is one date in all bands: near its day, far from clouds, least black."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from known_composites import FOUR, LEFT, PLAIN, TOP, times_read
from known_scenes import grid_at
from minecube.catalog import NATIVE_M, BestPixel, MaskRule
from minecube.composite import bands, composite
from minecube.reader import Ledger


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


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("water", [False, True])
def test_black_bands_are_read_once_more_and_others_once(archive, monkeypatch, water, ahead):
    """Water is black in B11 on all dates: B11 is read to choose, and no band is read a third time.

    A band that is not read ahead is read after the choice, for the chosen date only.
    """
    monkeypatch.setattr(bands, "count_ahead", lambda scenes: ahead)
    grid, where = grid_at(LEFT, TOP, 48, 36), grid_at(LEFT - 1500, TOP + 1500, 400, 400)
    many = dataclasses.replace(archive, bands=FOUR)
    recipe = dataclasses.replace(PLAIN, bands=FOUR, reducer="best-pixel", best_pixel=BestPixel())
    b11 = np.full((200, 200), 1900)
    b11[75:90, 75:90] = 1 if water else 1900
    pixels = {"B02": 500, "B04": 700, "B08": 2500, "B11": b11}
    listed = [many.scene(f"2020-0{month}-24T10:00:00", where, pixels) for month in (6, 7, 8)]
    ledger = Ledger()
    made = composite(listed, grid, recipe, ledger).compute()
    assert (made.quality == 1).all()
    assert (made.day_of_year == 206).all()
    np.testing.assert_array_equal(made.reflectance[3], b11[75:93, 75:99].repeat(2, 0).repeat(2, 1))
    used = set(ledger.table().scene[ledger.table().band == "B11"])
    times = {
        band: [times_read(ledger, s, band, grid) for s in listed if band != "B11" or s.id in used]
        for band in FOUR
    }
    once = [1, 1, 1]
    of_b11 = {(0, False): [1], (0, True): [1, 2, 1], (1, False): once, (1, True): [2, 2, 2]}
    expected = dict.fromkeys(("B02", "B04", "B08"), once) | {"B11": of_b11[ahead, water]}
    assert times == expected
    if not (water or ahead):
        assert used == {listed[1].id}
    table = ledger.table()
    assert (table.planned == 1).all()
    assert (table.read == 1).all()


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
