"""Masks against brute force, and against the ground that is bright, hazy or cloudy in them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from minecube.catalog import (
    FALLBACKS,
    QUALITY,
    BrightOverride,
    HazeTest,
    MaskRule,
    Recipe,
    load_recipes,
)
from minecube.composite.masks import (
    choose_clearest,
    choose_observations,
    classify_day,
    correct_classes,
    find_bright_ground,
    grow,
    measure_cloud_distance,
    mosaic_scenes,
    remove_haze,
    sum_windows,
)

PLAIN = Recipe(id="plain", title="no mask")
INT32 = st.integers(-(2**20), 2**20)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 999),
    st.sampled_from([0.2, 0.8, 0.95]),
    st.sampled_from([0, 20, 60, 100]),
    st.sampled_from([0, 40, 60]),
)
def test_grow_opens_and_dilates_in_metres(seed, share, dilate_m, open_m):
    flagged = np.random.default_rng(seed).random((2, 12, 13)) < share
    rule = MaskRule(classes=(8,), dilate_m=dilate_m, open_m=open_m)
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
        np.testing.assert_array_equal(grow(flagged[day], rule), expected)


def test_the_outermost_pixel_of_a_swath_is_not_trusted():
    scl = np.full((1, 7, 7), 4, np.uint8)
    scl[0, :, :2] = 0
    owner, day = mosaic_scenes(scl, [0])
    assert (owner[0, :, :3] == -1).all()  # two without data, one of border
    assert (owner[0, :, 3:] == 0).all()  # the edge of the window is no border
    assert (day[0, :, 3:] == 4).all()


@pytest.mark.parametrize("scenes", [3, 128, 129])
def test_owners_beyond_the_margin_are_cut_off(scenes):
    """Scene n covers column n and its neighbours, so the inner column keeps its first scene."""
    scl = np.zeros((scenes, 5, scenes + 2), np.uint8)
    for n in range(scenes):
        scl[n, :, n : n + 3] = 4
    owner, day = mosaic_scenes(scl, [0] * scenes, margin=2)
    np.testing.assert_array_equal(owner[0, 0], np.arange(1, scenes - 1))
    np.testing.assert_array_equal(owner, mosaic_scenes(scl, [0] * scenes)[0][:, 2:-2, 2:-2])
    assert day.shape == (1, 5, scenes + 2)


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
    bright = find_bright_ground(scl, BrightOverride())
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
    assert find_bright_ground(scl, BrightOverride()).mean() < 0.005


@pytest.mark.parametrize("beyond", [4, 16, 80])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.35])
def test_ground_that_was_never_observed_says_nothing_of_bright_ground(share, beyond):
    """Image chips have nothing around them."""
    scl, *_ = mine_under_changing_sky(share)
    wide = np.pad(scl, ((0, 0), (beyond, beyond), (beyond, beyond)))
    found = find_bright_ground(wide, BrightOverride())
    np.testing.assert_array_equal(
        found[:, beyond:-beyond, beyond:-beyond], find_bright_ground(scl, BrightOverride())
    )
    assert found.sum() == found[:, beyond:-beyond, beyond:-beyond].sum()


@pytest.mark.parametrize("side", [1, 8, 30])
def test_a_cloudy_chip_is_not_mistaken_for_a_mine(side):
    """Overcast on seven dates of ten, with nothing observed around it."""
    scl = np.zeros((10, 80, 80), np.uint8)
    middle = slice(40 - side // 2, 40 - side // 2 + side)
    scl[:, middle, middle] = 4
    scl[:7, middle, middle] = 9
    assert not find_bright_ground(scl, BrightOverride()).any()


@pytest.mark.parametrize("dates", [2, 3, 4, 6])
@pytest.mark.parametrize("cover", [0.1, 0.2, 0.3])
def test_scattered_clouds_on_few_dates_are_no_bright_ground(dates, cover):
    """Discs of cloud at random places: where they meet on all dates, they are clouds still."""
    rng = np.random.default_rng(dates)
    rows, columns = np.mgrid[:96, :96]
    scl = np.full((dates, 96, 96), 4, np.uint8)
    for layer in scl:
        while (layer == 9).mean() < cover:
            row, column, radius = *rng.integers(0, 96, 2), rng.integers(3, 7)
            layer[(rows - row) ** 2 + (columns - column) ** 2 <= radius**2] = 9
    assert (scl == 9).all(axis=0).any() or dates * cover < 2
    assert find_bright_ground(scl, BrightOverride()).mean() < 1e-3


@pytest.mark.parametrize("dates", [2, 3, 4])
def test_a_mine_is_bright_ground_on_few_dates_too(dates):
    scl = np.full((dates, 96, 96), 4, np.uint8)
    scl[:, 40:56, 40:56] = 9
    bright = find_bright_ground(scl, BrightOverride())
    assert bright[:, 40:56, 40:56].all()
    assert bright.sum() == dates * 256


@pytest.mark.parametrize("number", [12, 13, 100, 254, 255])
def test_numbers_that_are_no_class_are_not_observed(number):
    scl = np.array([[4, number, 11, 0]], np.uint8)
    for error in (None, "veiled", "no cirrus"):
        assert (correct_classes(scl, error) == 0).tolist() == [[False, True, False, True]]


def test_of_two_observations_the_hazy_one_goes():
    use = np.ones((2, 9, 9), bool)
    blue = np.full((2, 9, 9), 400 * 4)
    red = np.full((2, 9, 9), 500 * 4)
    blue[1] += 1000 * 4
    kept, quality, excess = remove_haze(2 * blue - red, use, np.ones((9, 9), np.uint8), HazeTest())
    assert kept[0].all()
    assert not kept[1].any()
    assert (quality == 1).all()
    assert (excess[1] == 8000).all()  # 0.1 more blue, in units of 1 / 80000


def test_kinds_rank_what_is_not_clear():
    scl = np.array([[4, 9, 3, 10, 0, 4, 4, 4, 4, 4]], np.uint8)
    recipe = dataclasses.replace(
        PLAIN, mask=(MaskRule(classes=(9,), dilate_m=20), MaskRule(classes=(3, 10)))
    )
    kind = classify_day(scl, None, recipe, 6, 1)
    np.testing.assert_array_equal(kind[0], [2, 4, 3, 3, 0, 1, 1, 1, 1, 1])


@pytest.mark.parametrize("name", ["annual-median", "annual-geomedian", "summer-bap", "eurominenet"])
def test_shipped_recipes_take_what_is_unclassified_for_no_clear_ground(name):
    """Of real ones, 97 % are cloud in season."""
    scl = np.array([[4, 7, 5]], np.uint8)
    kind = classify_day(scl, None, load_recipes()[name], 6, 1)
    np.testing.assert_array_equal(kind[0], [1, FALLBACKS["thin"], 1])


def test_a_rule_holds_in_its_months():
    scl = np.full((4, 4), 11, np.uint8)
    recipe = dataclasses.replace(PLAIN, mask=(MaskRule(classes=(11,), months=(5, 6, 7)),))
    assert (classify_day(scl, None, recipe, 1, 1) == 1).all()
    assert (classify_day(scl, None, recipe, 6, 1) == FALLBACKS["thin"]).all()


def test_other_seasons_give_clear_observations_only():
    scl = np.array([[4, 9, 0]], np.uint8)
    recipe = dataclasses.replace(PLAIN, mask=(MaskRule(classes=(9,)),))
    assert classify_day(scl, None, recipe, 6, 1).tolist() == [[1, 4, 0]]
    wider = classify_day(scl, None, recipe, 11, FALLBACKS["wider-season"])
    assert wider.tolist() == [[5, 255, 0]]


def test_one_date_alone_says_nothing_of_bright_ground():
    scl = np.full((1, 60, 60), 5, np.uint8)
    scl[0, 30, 30] = 9
    assert not find_bright_ground(scl, BrightOverride()).any()
    assert find_bright_ground(np.repeat(scl, 2, axis=0), BrightOverride()).any()


def test_thin_cloud_is_taken_where_there_is_nothing_else_and_only_there():
    kind = np.array([[[1, 3]], [[3, 3]], [[3, 0]]], np.uint8)
    use, quality = choose_observations(
        kind, dataclasses.replace(PLAIN, min_clear=3, fallback=("ungrown", "thin"))
    )
    np.testing.assert_array_equal(use[:, 0], [[True, True], [False, True], [False, False]])
    np.testing.assert_array_equal(quality, [[1, 3]])


def test_a_pixel_seen_through_haze_only_stays_and_says_so():
    hot, use = np.zeros((3, 5, 5), np.int32), np.ones((3, 5, 5), bool)
    hot[0], use[1:, 2, 2] = (
        20000,
        False,
    )  # 0.25 of excess on the first date, the only one of the middle pixel
    kept, quality, _ = remove_haze(hot, use, np.ones((5, 5), np.uint8), HazeTest())
    hazy = np.zeros((5, 5), bool)
    hazy[2, 2] = True
    np.testing.assert_array_equal(kept[0], hazy)
    assert kept[1:].sum() == 48
    np.testing.assert_array_equal(quality, np.where(hazy, 3, 1))


def test_fallbacks_in_the_order_of_the_recipe():
    """Columns: enough clear; none clear; one clear of two wanted; nothing but cloud; nothing at all."""
    kind = np.array(
        [
            [[1, 2, 1, 4, 0]],
            [[1, 3, 2, 4, 0]],
            [[2, 5, 5, 4, 0]],
            [[4, 6, 3, 255, 255]],
        ],
        np.uint8,
    )
    default = choose_observations(kind, PLAIN)
    np.testing.assert_array_equal(default[1], [[1, 2, 1, 4, 0]])
    np.testing.assert_array_equal(
        default[0][:, 0].T.astype(int),
        [[1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [0] * 4],
    )
    wider = dataclasses.replace(
        PLAIN,
        months=(6,),
        wider_months=(5, 7),
        min_clear=2,
        fallback=("wider-season", "neighbour-year", "ungrown", "thin", "cloud"),
    )
    use, quality = choose_observations(kind, wider)
    np.testing.assert_array_equal(quality, [[1, 6, 5, 4, 0]])
    np.testing.assert_array_equal(
        use[:, 0].T.astype(int), [[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0], [1, 1, 1, 0], [0] * 4]
    )
    none = dataclasses.replace(PLAIN, fallback=())
    np.testing.assert_array_equal(choose_observations(kind, none)[1], [[1, 0, 1, 0, 0]])
    assert max(FALLBACKS.values()) == len(QUALITY) - 1


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(
        np.uint8,
        st.tuples(st.integers(3, 9), st.integers(1, 5), st.integers(1, 5)),
        elements=st.integers(0, 5),
    )
)
def test_the_clearest_are_clear_and_leave_no_hole(kind):
    days = np.arange(len(kind)) * 10
    use = choose_clearest(kind, 3, 2, days)
    clear = kind == 1
    assert not (use & ~clear).any()
    # Where clear observations are, one is used; where there are two, two are.
    assert (use.sum(axis=0) >= np.minimum(clear.sum(axis=0), 2)).all()


def test_the_clearest_are_spread_over_the_season():
    """Twelve clear dates, eight of them in April: four of them all are not four of April."""
    kind = np.ones((12, 5, 5), np.uint8)
    days = np.array([100, 101, 102, 103, 104, 105, 106, 107, 160, 200, 240, 280])
    used = days[choose_clearest(kind, 4, 2, days).any(axis=(1, 2))]
    assert len(used) == 4
    assert np.diff(np.sort(used)).min() >= 40
    kind[9, 2:] = 4  # a date that is half cloudy is worth less than a clear one beside it
    assert 200 not in days[choose_clearest(kind, 3, 1, days).any(axis=(1, 2))]


def test_others_are_read_only_where_the_clearest_lack():
    kind = np.ones((6, 4, 4), np.uint8)
    kind[:3, 0, 0] = 4  # three clear days, but for one pixel
    kind[3:, 2:] = 4  # three half clear ones
    use = choose_clearest(kind, 3, 1, np.arange(6))
    assert use[:3].sum() == 3 * 15
    assert use[3:].sum() == 1
    assert use[3:, 0, 0].sum() == 1


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.int32, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=INT32),
    st.integers(0, 4),
)
def test_window_sums_are_cut_at_the_edges(values, half):
    got = sum_windows(values, half)
    for y, x in np.ndindex(values.shape):
        assert (
            got[y, x]
            == values[max(y - half, 0) : y + half + 1, max(x - half, 0) : x + half + 1].sum()
        )


def test_cloud_distance():
    kind = np.ones((2, 5, 9), np.uint8)
    kind[0, 2, 2], kind[0, 0, 8] = 4, 0
    away = np.stack([measure_cloud_distance(day, 60) for day in kind])
    assert (away[1] == 60).all()  # no cloud that day
    np.testing.assert_allclose(away[0, 2], [40, 20, 0, 20, 40, 60, 60, 60, 60])
    assert away[0, 3, 3] == pytest.approx(20 * np.sqrt(2))
    assert away[0, 0, 8] == 60  # not observed is no cloud
