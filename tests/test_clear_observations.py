"""A pixel's value comes from its clear dates, or else from the next best ones."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from known_composites import LEFT, MASKED, PLAIN, TOP
from known_scenes import grid_at
from minecube.catalog import BrightOverride, HazeTest, MaskRule
from minecube.composite import composite
from minecube.errors import ReadError
from minecube.reader import Ledger


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
