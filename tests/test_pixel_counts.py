"""Counts of pixels add up over blocks, sites and years, and refuse other values."""

from __future__ import annotations

import dataclasses
import itertools
import json
import operator
from collections.abc import Callable
from functools import reduce
from itertools import combinations

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from known_footprints import YEARS, series
from minecube import metrics
from minecube.errors import ModelError
from minecube.metrics import Counts, count, finish


def test_unknown_pixels_are_left_out_whatever_stands_there() -> None:
    y, p = series(9), series(10)
    other = p.copy()
    other[y == 255] = 1 - np.minimum(other[y == 255], 1)
    assert count(other, y, YEARS) == count(p, y, YEARS)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([14, 63, 64, 65, 130]),
    st.integers(1, 11),
    st.integers(1, 13),
)
def test_counts_of_blocks_add_up_to_those_of_the_site(
    seed: int, width: int, at_y: int, at_x: int
) -> None:
    at_x = at_x * width // 14
    p, y = (series(n, (3, 12, width)) for n in (seed, seed + 1))
    years = [2019, 2020, 2021]
    total = Counts()
    for rows in (slice(0, at_y), slice(at_y, 12)):
        for columns in (slice(0, at_x), slice(at_x, width)):
            context = tuple(
                slice(max(s.start - metrics.MARGIN_PX, 0), s.stop + metrics.MARGIN_PX)
                for s in (rows, columns)
            )
            core = tuple(
                slice(s.start - c.start, s.stop - c.start)
                for s, c in zip((rows, columns), context, strict=True)
            )
            total += count(p[:, *context], y[:, *context], years, core=core)  # type: ignore[arg-type]
    assert total == count(p, y, years)


def test_counts_of_sites_with_other_years_add_up() -> None:
    one, two = (
        count(series(11), series(12), YEARS),
        count(series(13)[:3], series(14)[:3], [2016, 2019, 2024]),
    )
    both = one + two
    assert both == two + one
    assert both + Counts() == both
    assert reduce(operator.add, [one, two]) == sum([one, two], Counts())
    assert both.years[2016] == one.years[2016] + two.years[2016]
    assert both.years[2024] == two.years[2024]
    assert metrics.tabulate_years(both).index.tolist() == [2015, 2016, 2018, 2019, 2024]


def test_pooling_is_a_ratio_of_sums_not_a_mean_of_ratios() -> None:
    large, small = np.ones((1, 10, 10), np.uint8), np.ones((1, 2, 1), np.uint8)
    half = np.array([[[1], [0]]], np.uint8)
    found = finish(count(large, large, [2020]) + count(half, small, [2020]))
    assert found["iou"] == 101 / 102  # the mean of ratios would be 0.75


def test_dataarrays_are_scored_by_their_own_years() -> None:
    p, y = series(17), series(18)
    label = xr.DataArray(y, dims=("year", "y", "x"), coords={"year": YEARS})
    turned = xr.DataArray(p, dims=("year", "y", "x"), coords={"year": YEARS}).transpose(
        "x", "y", "year"
    )
    assert count(turned, label, YEARS) == count(p, y, YEARS)
    with pytest.raises(ModelError, match="one year would be scored as another"):
        count(turned.assign_coords(year=[2014, 2015, 2016, 2017]), label, YEARS)


@pytest.mark.parametrize(
    ("p", "years", "words"),
    [
        (np.zeros((3, 4, 4), np.uint8), YEARS[:3], "same grid"),
        (np.zeros((2, 4, 5), np.uint8), YEARS[:3], "ascending years"),
        (np.zeros((3, 4, 5), np.uint8), [2015, 2016, 2016], "ascending years"),
        (np.full((3, 4, 5), 125, np.uint8), YEARS[:3], "threshold"),
    ],
)
def test_what_cannot_be_scored_says_so(p: np.ndarray, years: list[int], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        count(p, np.zeros((3, 4, 5), np.uint8), years)


def test_a_core_with_gaps_is_not_taken_for_all_between() -> None:
    pred, truth = series(17, (3, 9, 9)), series(18, (3, 9, 9))
    for core in ((slice(0, 9, 2), slice(None)), (slice(None), slice(None, None, -1))):
        with pytest.raises(ModelError, match="core of rows and columns one after another"):
            count(pred, truth, range(2000, 2003), core=core)


@pytest.mark.parametrize("width", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("of", ["prediction", "truth"])
def test_a_value_that_is_no_footprint_is_found_wherever_it_is(width: int, of: str) -> None:
    stacks = {"prediction": series(15, (3, 9, width)), "truth": series(16, (3, 9, width))}
    for x in {0, width // 2, width - 1}:
        for value in (2, 125, 254):
            wrong = stacks[of].copy()
            wrong[2, 8, x] = value
            with pytest.raises(ModelError, match=f"{of} holds values other than 0, 1 and 255"):
                count(*({**stacks, of: wrong}[name] for name in ("prediction", "truth")), [1, 2, 3])


@pytest.mark.parametrize(
    "change",
    [lambda a: a[:, ::2], lambda a: a[:, :, ::-1], np.asfortranarray, lambda a: a.astype(np.int64)],
)
def test_it_does_not_matter_how_pixels_lie_in_memory(
    change: Callable[[np.ndarray], np.ndarray],
) -> None:
    p, y = change(series(17)), change(series(18))
    p.flags.writeable = False
    assert count(p, y, YEARS) == count(p.astype(np.uint8, "C"), y.astype(np.uint8, "C"), YEARS)


def by_loops_of_years(p: np.ndarray, y: np.ndarray) -> tuple[list, list]:
    """Mapped without boundaries, and Pair, of each year and pair: with masks of bool."""
    known, labelled = (p != 255) & (y != 255), y != 255
    maps = [
        [np.sum(known[i] & (y[i] == a) & (p[i] == b)) for a, b in ((1, 1), (0, 1), (1, 0), (0, 0))]
        + [np.sum(labelled[i] & (p[i] == 255))]
        for i in range(len(y))
    ]
    pairs = []
    for i, j in combinations(range(len(y)), 2):
        both = known[i] & known[j]
        truth, pred = (a[j][both].astype(int) - a[i][both] for a in (y, p))
        cells = [
            np.sum((truth == a) & (pred == b)) for a, b in itertools.product((1, -1, 0), (1, 0, -1))
        ]
        pairs.append([*cells, np.sum(labelled[i] & labelled[j] & ~both)])
    return maps, pairs


@pytest.mark.parametrize(
    ("shape", "unknown"),
    [
        ((1, 9, 9), 0),
        ((8, 5, 64), 0),
        ((9, 140, 33), 0),
        ((10, 131, 20), 0.05),
        ((17, 6, 70), 0),
        ((2, 5, 128), 0.05),
        ((3, 300, 7), 1),
    ],
    ids=str,
)
def test_counts_are_those_of_masks(shape: tuple[int, int, int], unknown: float) -> None:
    p, y = series(20, shape, unknown), series(21, shape, unknown)
    p[:, :, : shape[2] // 4] = y[:, :, : shape[2] // 4] = 0  # pixels without change
    years = list(range(2000, 2000 + shape[0]))
    scores = count(p, y, years)
    maps, pairs = by_loops_of_years(p, y)
    assert [list(dataclasses.astuple(n))[:5] for n in scores.years.values()] == maps
    assert [list(dataclasses.astuple(n)) for n in scores.pairs.values()] == pairs
    assert list(scores.pairs) == list(combinations(years, 2))


def test_blocks_of_many_rows_add_up() -> None:
    p, y = series(22, (3, 300, 21), 0.02), series(23, (3, 300, 21), 0.02)
    total = Counts()
    for first in range(0, 300, 77):
        rows = slice(max(first - metrics.MARGIN_PX, 0), min(first + 77 + metrics.MARGIN_PX, 300))
        core = slice(first - rows.start, min(first + 77, 300) - rows.start)
        total += count(p[:, rows], y[:, rows], [1, 2, 3], core=(core, slice(None)))
    assert total == count(p, y, [1, 2, 3])
    # Without context a seam would look like a site's edge, which is no boundary.
    apart = count(p[:, :150], y[:, :150], [1, 2, 3]) + count(p[:, 150:], y[:, 150:], [1, 2, 3])
    assert apart.pairs == total.pairs
    assert apart.years != total.years


def test_a_block_is_not_its_context() -> None:
    p, y = series(24, (3, 20, 20)), series(25, (3, 20, 20))
    other_p, other_y = p.copy(), y.copy()
    other_p[:, :2], other_y[:, :, 18:] = 1 - np.minimum(p[:, :2], 1), 0
    core = slice(6, 14), slice(6, 14)
    assert count(p, y, [1, 2, 3], core=core) == count(other_p, other_y, [1, 2, 3], core=core)


def test_counts_go_through_json_unchanged() -> None:
    p, y = series(26), series(27)
    probability = np.where(p == 255, 255, np.minimum(p, 1) * 171)
    scores = count(p, y, YEARS) + metrics.count_probability(probability.astype(np.uint8), y, YEARS)
    back = Counts.of_json(json.loads(json.dumps(scores.to_json())))
    assert back == scores
    assert back + scores == scores + scores
    for wrong in (
        {},
        {**scores.to_json(), "version": 0},
        {**scores.to_json(), "footprint": {"2015": [[1, 2]]}},
        [],
    ):
        with pytest.raises(ModelError, match="count again"):
            Counts.of_json(wrong)  # type: ignore[arg-type]
