"""Scores against loops over pixels, scikit-learn, scipy, published definitions by hand, and baselines that must lose."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import operator
from collections.abc import Callable
from functools import reduce
from itertools import combinations, pairwise

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import distance_transform_edt
from scipy.stats import bootstrap
from sklearn.calibration import calibration_curve
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    brier_score_loss,
    f1_score,
    jaccard_score,
    precision_recall_curve,
    precision_score,
    recall_score,
)

from minecube import metrics
from minecube.errors import ModelError
from minecube.metrics import Counts, count, finish

YEARS = [2015, 2016, 2018, 2019]


def series(
    seed: int, shape: tuple[int, int, int] = (4, 17, 23), unknown: float = 0.1
) -> np.ndarray:
    """Footprints of which some pixels never change, some do, and some are unknown now and then."""
    r = np.random.default_rng(seed)
    years, height, width = shape
    steady = np.broadcast_to(r.random((height, width)) < 0.4, shape)
    mine = np.where(r.random((height, width)) < 0.5, steady, r.random(shape) < 0.5)
    return np.where(r.random((years, height, width)) < unknown, 255, mine).astype(np.uint8)


def ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def by_loops(p: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """The definitions, pixel by pixel, in sets."""
    years, height, width = p.shape
    tube = {"s": [0, 0], "c": [0, 0]}
    b_and_c = b_or_c = 0
    confusion = np.zeros((2, 2), int)
    pairs = []
    for r in range(height):
        for c in range(width):
            truth, pred = y[:, r, c].tolist(), p[:, r, c].tolist()
            stratum = tube["c" if {0, 1} <= set(truth) else "s"]
            for a, b in zip(truth, pred, strict=True):
                if 255 not in (a, b):
                    stratum[0] += a and b
                    stratum[1] += a or b
            for i, j in pairwise(range(years)):
                if 255 not in (truth[i], truth[j], pred[i], pred[j]):
                    changed, said = truth[i] != truth[j], pred[i] != pred[j]
                    b_and_c += changed and said
                    b_or_c += changed or said
                    if changed:
                        confusion[truth[j], pred[j]] += 1
            pairs += [
                (truth[j] - truth[i], pred[j] - pred[i])
                for i, j in combinations(range(years), 2)
                if 255 not in (truth[i], truth[j], pred[i], pred[j])
            ]
    # mIoU as DynamicEarthNet's code has it: summed over all classes, divided by the number of those in the truth.
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    sc = ratio(sum(confusion.diagonal() / np.maximum(union, 1)), np.count_nonzero(confusion.sum(1)))
    bc = ratio(b_and_c, b_or_c)
    s, c = ratio(*tube["s"]), ratio(*tube["c"])
    a, b = np.array(pairs).T
    variants = {"change": (a != 0, b != 0), "expansion": (a == 1, b == 1)}
    rates = {
        f"{name}_{score}": f(t, q, zero_division=np.nan)
        for name, (t, q) in variants.items()
        for score, f in (
            ("f1", f1_score),
            ("iou", _jaccard),
            ("precision", precision_score),
            ("recall", recall_score),
        )
    }
    transition = {
        "transition_f1": f1_score(a, b, labels=[-1, 1], average="micro"),
        "transition_iou": jaccard_score(a, b, labels=[-1, 1], average="micro"),
        "transition_precision": precision_score(a, b, labels=[-1, 1], average="micro"),
        "transition_recall": recall_score(a, b, labels=[-1, 1], average="micro"),
    }
    tubes = {
        "tiou_s": s,
        "tiou_c": c,
        "ca_tiou": (s + c) / 2,
        "bc": bc,
        "sc": sc,
        "scs": (bc + sc) / 2,
    }
    return tubes | rates | transition


def _jaccard(t: np.ndarray, q: np.ndarray, zero_division: float) -> float:
    return jaccard_score(t, q) if (t | q).any() else zero_division


@pytest.mark.parametrize("seed", range(4))
def test_scores_through_time_are_those_of_loops(seed: int) -> None:
    p, y = series(seed), series(seed + 100)
    found, expected = finish(count(p, y, YEARS)), by_loops(p, y)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)


def test_footprint_scores_are_scikit_learns() -> None:
    p, y = series(1), series(2)
    scores = count(p, y, YEARS)
    table, pooled = metrics.tabulate_years(scores), finish(scores)
    known = (p != 255) & (y != 255)
    for i, year in [*enumerate(YEARS), (slice(None), None)]:
        t, q = y[i][known[i]], p[i][known[i]]
        expected = {
            "iou": jaccard_score(t, q),
            "f1": f1_score(t, q),
            "precision": precision_score(t, q),
            "recall": recall_score(t, q),
            "accuracy": accuracy_score(t, q),
            "unmapped": ((p[i] == 255) & (y[i] != 255)).sum() / (y[i] != 255).sum(),
        }
        row = pooled if year is None else table.loc[year].to_dict()
        assert {name: row[name] for name in expected} == pytest.approx(expected)


def boundaries(p: np.ndarray, y: np.ndarray) -> list[int]:
    """The last four of Mapped, of one year, by Euclidean distances."""
    known = (p != 255) & (y != 255)

    def edge(mask: np.ndarray) -> np.ndarray:
        found = np.zeros(mask.shape, bool)
        for a, b in np.argwhere((mask == 1) & known):
            near = [(a - 1, b), (a + 1, b), (a, b - 1), (a, b + 1)]
            inside = [
                n
                for n in near
                if 0 <= n[0] < mask.shape[0] and 0 <= n[1] < mask.shape[1] and known[n]
            ]
            found[a, b] = any(mask[n] == 0 for n in inside)
        return found

    drawn, true = edge(p), edge(y)
    near_true, near_drawn = (
        distance_transform_edt(~of) <= 3 if of.any() else np.zeros_like(of) for of in (true, drawn)
    )
    return [int(of.sum()) for of in (drawn, drawn & near_true, true, true & near_drawn)]


@pytest.mark.parametrize("width", [61, 200])
def test_boundaries_are_those_of_euclidean_distances(width: int) -> None:
    """Of pits, of single pixels scattered, and of both, some unknown in the upper rows, year by year."""
    r = np.random.default_rng(3)
    shape = (6, 43, width)
    pits = np.kron(r.integers(0, 2, (2, 6, 5, -(-width // 9))), np.ones((9, 9), int))[
        ..., :43, :width
    ]
    single = r.random((2, *shape)) < 0.03
    kinds = np.array([0, 1, 2, 0, 1, 1]).reshape(-1, 1, 1)
    p, y = np.where(kinds == 0, pits, np.where(kinds == 1, single, pits ^ single)).astype(np.uint8)
    p[1:5, :7][r.random((4, 7, width)) < 0.2] = 255
    y[1:5, :7, : width // 2] = 255
    y[3, :, 20:] = 0
    found = [dataclasses.astuple(n)[5:] for n in count(p, y, range(2015, 2021)).years.values()]
    expected = [boundaries(*year) for year in zip(p, y, strict=True)]
    assert np.array(found).tolist() == expected
    assert all(0 < near < drawn for drawn, near, *_ in expected)


def test_boundary_f1_is_that_of_its_counts() -> None:
    p, y = (
        np.kron(np.random.default_rng(n).integers(0, 2, (1, 6, 7)), np.ones((1, 9, 9), np.uint8))
        for n in (3, 4)
    )
    drawn, drawn_near, true, true_near = boundaries(p[0], y[0])
    precision, recall = drawn_near / drawn, true_near / true
    assert 0.1 < precision < 0.9
    expected = 2 * precision * recall / (precision + recall)
    assert finish(count(p, y, [2020]))["boundary_f1"] == pytest.approx(expected)


@pytest.mark.parametrize("at", [20, *range(60, 69)])
@pytest.mark.parametrize(("shift", "expected"), [(3, 1), (4, 0)])
def test_boundary_tolerance_is_three_pixels(shift: int, expected: float, at: int) -> None:
    y = np.zeros((1, 20, 140), np.uint8)
    y[0, :, :at] = 1
    p = y.copy()
    p[0, :, at : at + shift] = 1
    assert finish(count(p, y, [2020]))["boundary_f1"] == expected


def test_scores_by_hand() -> None:
    # Six pixels, three years: truth, prediction.
    y = np.array([[0, 0, 0], [1, 1, 1], [0, 1, 1], [0, 0, 1], [1, 0, 0], [0, 0, 0]]).T.reshape(
        3, 1, 6
    )
    p = np.array([[0, 0, 0], [1, 1, 1], [0, 1, 1], [0, 1, 1], [1, 1, 1], [0, 0, 1]]).T.reshape(
        3, 1, 6
    )
    found = finish(count(p.astype(np.uint8), y.astype(np.uint8), [2019, 2020, 2021]))
    # S: pixels 1, 2, 6: both 3, either 4. C: pixels 3, 4, 5: both 2 + 1 + 1, either 2 + 2 + 3.
    assert found["tiou_s"] == 3 / 4
    assert found["tiou_c"] == 4 / 7
    assert found["ca_tiou"] == pytest.approx((3 / 4 + 4 / 7) / 2)
    # Steps with b: pixels 3 (1st), 4 (2nd), 5 (1st); with c: 3 (1st), 4 (1st), 6 (2nd).
    assert found["bc"] == 1 / 5
    # Where b: y_t = 1 twice, p_t = 1 in both; y_t = 0 once, p_t = 1 there: IoU of mine 2/3, of the rest 0/1.
    assert found["sc"] == pytest.approx((2 / 3 + 0) / 2)
    # New in the pairs 19-20, 20-21, 19-21: truth pixels 3; 4; 3, 4; prediction 3, 4; 6; 3, 4, 6.
    assert found["expansion_precision"] == pytest.approx(3 / 6)
    assert found["expansion_recall"] == pytest.approx(3 / 4)
    # Gone: truth pixel 5 in 19-20 and 19-21, never predicted.
    assert found["change_recall"] == pytest.approx(3 / 6)
    assert found["transition_f1"] == pytest.approx(2 * 3 / (6 + 6))


def test_sc_is_averaged_over_the_classes_in_the_truth_alone() -> None:
    # Four pixels open and none closes: three are mapped as mine afterwards. A mean over both classes would halve it.
    y = np.array([[[0, 0, 0, 0]], [[1, 1, 1, 1]]], np.uint8)
    p = np.array([[[1, 1, 0, 0]], [[1, 1, 1, 0]]], np.uint8)
    found = finish(count(p, y, [2019, 2020]))
    assert (found["bc"], found["sc"], found["scs"]) == (1 / 4, 3 / 4, 1 / 2)


def test_a_perfect_map_scores_one() -> None:
    y = series(5)
    found = finish(count(y, y, YEARS))
    assert found.pop("unmapped") == found.pop("change_unmapped") == 0
    assert set(found.values()) == {1.0}


def never_changes() -> tuple[np.ndarray, np.ndarray]:
    y = series(6, unknown=0)
    return np.broadcast_to(y[0], y.shape), y


def test_a_map_that_never_changes_scores_zero_in_change_though_not_in_mapping() -> None:
    scores = count(*never_changes(), YEARS)
    found = finish(scores)
    assert found["iou"] > 0.5
    assert found["tiou_s"] == 1
    changes = (
        "bc",
        "change_f1",
        "change_iou",
        "transition_f1",
        "transition_iou",
        "expansion_f1",
        "expansion_iou",
    )
    assert [found[name] for name in changes] == [0] * len(changes)
    assert (
        metrics.tabulate_pairs(scores)[["change_f1", "transition_f1", "expansion_f1"]] == 0
    ).all(axis=None)


def test_all_mine_is_no_good_map() -> None:
    y = series(7, unknown=0)
    found = finish(count(np.ones_like(y), y, YEARS))
    assert found["iou"] == found["precision"] == y.mean()
    assert found["recall"] == 1
    assert found["change_f1"] == found["bc"] == found["expansion_f1"] == 0


def test_nothing_to_judge_is_nan_not_zero_or_one() -> None:
    empty = np.zeros((3, 5, 5), np.uint8)
    found = finish(count(empty, empty, [2019, 2020, 2021]))
    assert found.pop("accuracy") == 1
    assert found.pop("unmapped") == found.pop("change_unmapped") == 0
    assert [found.pop(f"vc_{n}") for n in (2, 3)] == [
        1,
        1,
    ]  # nothing moved, and nothing is a class, too
    assert all(math.isnan(value) for value in found.values())
    assert all(math.isnan(value) for value in finish(Counts()).values())
    json.dumps(found)


def test_a_stratum_without_pixels_leaves_ca_tiou_undefined() -> None:
    steady = np.ones((3, 5, 5), np.uint8)
    found = finish(count(steady, steady, [2019, 2020, 2021]))
    assert found["tiou_s"] == 1
    assert math.isnan(found["tiou_c"])
    assert math.isnan(found["ca_tiou"])


def test_a_map_without_any_mine_scores_zero_where_there_is_one() -> None:
    y = series(8)
    found = finish(count(np.zeros_like(y), y, YEARS))
    assert [found[name] for name in ("iou", "f1", "recall", "boundary_f1", "ca_tiou")] == [0] * 5
    assert math.isnan(found["precision"])


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


def test_gaps_are_calendar_years_and_pairs_are_all_pairs() -> None:
    p, y = series(15), series(16)
    scores = count(p, y, YEARS)
    assert metrics.tabulate_pairs(scores).index.tolist() == sorted(
        f"{a}-{b}" for a, b in combinations(YEARS, 2)
    )
    gaps = metrics.tabulate_gaps(scores)
    assert gaps.index.tolist() == [1, 2, 3, 4]  # not 1, 2, 3: 2017 is not among the years
    alone = finish(
        count(p[[0, 2]], y[[0, 2]], [2015, 2018]) + count(p[[1, 3]], y[[1, 3]], [2016, 2019])
    )
    assert gaps.loc[3].to_dict() == pytest.approx({name: alone[name] for name in gaps.columns})


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


# Counts of all sizes of sites and numbers of years.


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


def vspw(truth: np.ndarray, pred: np.ndarray, n: int, windows: int) -> list[float]:
    """By frame, as VSPW's evaluation compares each frame of a window with its first."""
    found = []
    for first in range(windows):
        steady = np.all([truth[first] == truth[first + k] for k in range(1, n)], axis=0)
        kept = np.all([pred[first] == pred[first + k] for k in range(1, n)], axis=0)
        found.append((kept & steady).sum() / steady.sum())
    return found


@pytest.mark.parametrize("n", [2, 3, 5, 9])
def test_video_consistency_is_vspws(n: int) -> None:
    y, p = series(28, (10, 12, 13), unknown=0), series(29, (10, 12, 13), unknown=0)
    years = list(range(2015, 2025))
    scores = count(p, y, years)
    windows = [w for (_, _, long), w in sorted(scores.windows.items()) if long == n]
    assert len(windows) == 10 - n + 1
    # Theirs: the mean of ratios, without the last window.
    assert np.mean([w.kept / w.steady for w in windows[:-1]]) == pytest.approx(
        np.mean(vspw(y, p, n, 10 - n))
    )
    assert finish(scores)[f"vc_{n}"] == sum(w.kept for w in windows) / sum(
        w.steady for w in windows
    )
    never = finish(count(np.broadcast_to(p[0], p.shape), y, years))
    assert never[f"vc_{n}"] == 1


def test_video_consistency_leaves_out_what_is_unknown_in_the_window() -> None:
    y = np.array([[[0, 0, 0]], [[0, 0, 255]], [[0, 0, 0]]], np.uint8)
    p = np.array([[[1, 0, 0]], [[1, 255, 0]], [[1, 0, 1]]], np.uint8)
    scores = count(p, y, [2019, 2020, 2021])
    assert {key: (w.steady, w.kept) for key, w in scores.windows.items()} == {
        (2019, 2020, 2): (1, 1),
        (2020, 2021, 2): (1, 1),
        (2019, 2021, 3): (1, 1),
    }


def chances(
    seed: int, shape: tuple[int, int, int], levels: int = 251
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities x 250 that tell something, some unknown, and truth."""
    r = np.random.default_rng(seed)
    p = r.integers(0, levels, shape) * (250 // (levels - 1))
    y = (r.random(shape) * 250 < 0.6 * p + 20).astype(np.uint8)
    p[r.random(shape) < 0.1], y[r.random(shape) < 0.1] = 255, 255
    return p.astype(np.uint8), y


@pytest.mark.parametrize("levels", [251, 6])
def test_curves_are_scikit_learns(levels: int) -> None:
    p, y = chances(30, (4, 15, 16), levels)
    scores = metrics.count_probability(p, y, YEARS)
    table = metrics.tabulate_years(
        count(np.where(p == 255, 255, p >= 125).astype(np.uint8), y, YEARS) + scores
    )
    known = (p != 255) & (y != 255)
    for i, year in enumerate(YEARS):
        t, q = y[i][known[i]], p[i][known[i]] / 250
        assert table["auprc"][year] == pytest.approx(average_precision_score(t, q))
        assert table["brier"][year] == pytest.approx(brier_score_loss(t, q))
        observed, predicted = calibration_curve(t, q, n_bins=10)
        bins = metrics.tabulate_reliability(scores.footprint[year])
        assert bins["observed"].tolist() == pytest.approx(observed.tolist())
        assert bins["predicted"].tolist() == pytest.approx(predicted.tolist())
        off = np.abs(bins["observed"] - bins["predicted"])
        assert table["ece"][year] == pytest.approx((off * bins["pixels"]).sum() / len(t))
        precision, recall, thresholds = precision_recall_curve(t, q)
        curve = metrics.tabulate_precision_recall(scores.footprint[year])
        assert curve["threshold"].tolist() == pytest.approx(thresholds[::-1].tolist())
        assert curve["precision"].tolist() == pytest.approx(precision[-2::-1].tolist())
        assert curve["recall"].tolist() == pytest.approx(recall[-2::-1].tolist())


def test_change_is_ranked_by_the_distance_of_probabilities() -> None:
    p, y = chances(31, (4, 9, 10))
    found = finish(metrics.count_probability(p, y, YEARS) + count(y, y, YEARS))
    score, truth = [], []
    for i, j in combinations(range(4), 2):
        both = (p[i] != 255) & (p[j] != 255) & (y[i] != 255) & (y[j] != 255)
        score += np.abs(p[i][both].astype(int) - p[j][both]).tolist()
        truth += (y[i][both] != y[j][both]).tolist()
    assert found["change_auprc"] == pytest.approx(average_precision_score(truth, score))
    # F1@r by sorting, ties in every order: the mean over many of them.
    r, rng, hits = sum(truth), np.random.default_rng(0), []
    for _ in range(400):
        order = np.lexsort([rng.random(len(score)), -np.array(score)])[:r]
        hits.append(np.array(truth)[order].mean())
    assert found["change_f1_at_r"] == pytest.approx(
        np.mean(hits), abs=4 * np.std(hits) / 20 + 1e-12
    )


def test_f1_at_r_by_hand() -> None:
    # Scores 9, 5, 5, 5, 1; true are 9, one of the 5s, and 1: r = 3, two of three ties are taken, 2/3 of a hit.
    p = np.array([[[0, 0, 0, 0, 0]], [[9, 5, 5, 5, 1]]], np.uint8)
    y = np.array([[[0, 0, 0, 0, 0]], [[1, 1, 0, 0, 1]]], np.uint8)
    found = finish(metrics.count_probability(p, y, [2019, 2020]))
    assert found["change_f1_at_r"] == pytest.approx((1 + 2 / 3) / 3)
    still = finish(metrics.count_probability(p, np.zeros_like(y), [2019, 2020]))
    assert math.isnan(still["change_f1_at_r"])
    assert math.isnan(still["auprc"])


def test_a_truth_that_is_none_of_the_three_is_refused_where_probabilities_are_counted() -> None:
    p, y = chances(32, (2, 5, 5))
    y[1, 2, 3] = 2
    with pytest.raises(ModelError, match="the truth holds values other than 0, 1 and 255"):
        metrics.count_probability(p, y, [2019, 2020])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 8))
def test_curves_of_blocks_add_up(seed: int, at: int) -> None:
    p, y = chances(seed, (3, 9, 7))
    years = [2019, 2020, 2022]
    parts = [
        metrics.count_probability(p, y, years, core=(rows, slice(None)))
        for rows in (slice(0, at), slice(at, 9))
    ]
    assert parts[0] + parts[1] == metrics.count_probability(p, y, years)
    assert sorted(parts[0].change) == [1, 2, 3]


PAIRS = list(combinations(YEARS, 2))


def as_change(p: np.ndarray, classes: tuple[str, ...]) -> np.ndarray:
    """What a perfect reader of two maps would say, as a change model's probabilities."""
    says = {
        "changed": lambda a, b: a != b,
        "new": lambda a, b: (a == 0) & (b == 1),
        "removed": lambda a, b: (a == 1) & (b == 0),
    }
    maps = []
    for i, j in combinations(range(len(p)), 2):
        unknown = (p[i] == 255) | (p[j] == 255)
        maps.append([np.where(unknown, 255, says[c](p[i], p[j]) * 200) for c in classes])
    return np.array(maps, np.uint8)


@pytest.mark.parametrize(
    ("classes", "variants"),
    [
        (("changed",), {"change"}),
        (("new",), {"expansion"}),
        (("removed", "new"), {"change", "transition", "expansion"}),
        (("new", "removed"), {"change", "transition", "expansion"}),
    ],
)
def test_maps_of_change_are_scored_as_footprints_are(
    classes: tuple[str, ...], variants: set[str]
) -> None:
    p, y = series(32), series(33)
    of_maps, of_change = (
        count(p, y, YEARS),
        metrics.count_change(as_change(p, classes), y, YEARS, PAIRS, classes),
    )
    expected, found = (metrics.tabulate_gaps(s) for s in (of_maps, of_change))
    names = [
        name
        for name in expected.columns
        if name.split("_")[0] in variants and name != "change_unmapped"
    ]
    assert {name.split("_")[0] for name in found.columns} - {"change"} == variants - {"change"}
    assert found[names].equals(expected[names])
    assert finish(of_change).keys() >= set(names)
    assert found["change_unmapped"].equals(expected["change_unmapped"])
    assert ("change_f1" in found) == ("change" in variants)
    if classes != ("new",):
        assert of_change.change.keys() == {1, 2, 3, 4}
        assert "change_auprc" in found


def test_a_perfect_map_of_change_scores_one_and_one_without_change_zero() -> None:
    y = series(34)
    for classes in (("changed",), ("new",), ("removed", "new")):
        found = finish(metrics.count_change(as_change(y, classes), y, YEARS, PAIRS, classes))
        assert found.pop("change_unmapped") == 0
        assert set(found.values()) == {1.0}
        none = np.zeros((len(PAIRS), len(classes), *y.shape[1:]), np.uint8)
        scores = {
            n: v
            for n, v in finish(metrics.count_change(none, y, YEARS, PAIRS, classes)).items()
            if n.endswith(("f1", "iou"))
        }
        assert set(scores.values()) == {0.0}


def test_of_removed_and_new_the_more_probable_counts() -> None:
    y = np.array([[[0, 0, 1, 0]], [[1, 1, 0, 0]]], np.uint8)
    change = np.array([[[[130, 200, 200, 124]], [[200, 130, 199, 124]]]], np.uint8)  # removed, new
    pair = metrics.count_change(change, y, [1, 2], [(1, 2)], ("removed", "new")).pairs[1, 2]
    assert (pair.new_new, pair.new_gone, pair.gone_gone, pair.same_same) == (1, 1, 1, 1)


def test_change_the_wrong_way_round_is_refused() -> None:
    y = series(35)
    maps = as_change(y, ("new",))
    backwards = [(b, a) for a, b in PAIRS]
    cases = [
        (maps, backwards, ("new",), "backwards"),
        (maps, [*PAIRS[:-1], PAIRS[0]], ("new",), "each once"),
        (maps, [*PAIRS[:-1], (2015, 2031)], ("new",), "among"),
        (maps, PAIRS, ("gone",), "expected"),
        (maps, PAIRS, ("removed", "new"), "2 classes"),
        (maps[:, :, :-1], PAIRS, ("new",), "grid"),
        (np.full_like(maps, 251), PAIRS, ("new",), "0..250"),
    ]
    for change, pairs, classes, words in cases:
        with pytest.raises(ModelError, match=words):
            metrics.count_change(change, y, YEARS, pairs, classes)


def test_scores_of_different_change_classes_are_not_joined() -> None:
    y = series(36)
    one, other = (
        metrics.count_change(as_change(y, c), y, YEARS, PAIRS, c) for c in (("new",), ("changed",))
    )
    with pytest.raises(ModelError, match="score the two models apart"):
        one + other
    assert Counts() + one == one


def test_a_probability_is_no_footprint_and_the_reverse() -> None:
    with pytest.raises(ModelError, match="expected uint8"):
        metrics.count_probability(np.full((1, 3, 3), 0.5), np.zeros((1, 3, 3), np.uint8), [2020])  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"0\.\.250"):
        metrics.count_probability(
            np.full((1, 3, 3), 252, np.uint8), np.zeros((1, 3, 3), np.uint8), [2020]
        )


def test_baselines_lose_where_they_must() -> None:
    y = series(37, (6, 20, 20), unknown=0.05)
    years = list(range(2015, 2021))
    found = {name: finish(count(p, y, years)) for name, p in metrics.make_baselines(y).items()}
    assert list(found) == ["never changes", "always mine", "last year's map"]
    for name in ("never changes", "always mine"):
        assert [found[name][s] for s in ("change_f1", "transition_f1", "expansion_f1", "bc")] == [
            0
        ] * 4
    assert found["always mine"]["recall"] == 1
    assert found["never changes"]["tiou_s"] == 1
    assert found["never changes"]["unmapped"] == 0
    late = found["last year's map"]
    assert late["unmapped"] > 1 / 7
    assert 0 < late["change_f1"] < 0.8


def sites_of(number: int, seed: int = 0) -> dict[str, Counts]:
    found = {}
    for n in range(number):
        y = series(1000 * seed + n, (3, 8, 9 + n), unknown=0)
        p = np.where(np.random.default_rng(n).random(y.shape) < 0.04 * (n + 1), 1 - y, y).astype(
            np.uint8
        )
        found[f"s{n}"] = count(p, y, [2019, 2020, 2021])
    return found


@pytest.mark.parametrize("name", ["iou", "ca_tiou", "change_f1", "sc"])
def test_intervals_are_scipys(name: str) -> None:
    sites = sites_of(9)
    table = metrics.estimate_intervals(sites, resamples=500, seed=5)
    of = list(sites.values())

    def pooled(index: np.ndarray) -> float:
        return finish(reduce(operator.add, [of[int(i)] for i in index]))[name]

    rng = np.random.default_rng(5)
    expected = bootstrap(
        (np.arange(9),),
        pooled,
        n_resamples=500,
        method="percentile",
        vectorized=False,
        random_state=rng,
    ).confidence_interval
    assert table.loc[name, "score"] == pytest.approx(pooled(np.arange(9)))
    assert table.loc[name, ["low", "high"]].tolist() == pytest.approx(list(expected))
    assert table.loc[name, "low"] < table.loc[name, "score"] < table.loc[name, "high"]


def test_intervals_are_of_ratios_of_sums() -> None:
    large, small = np.ones((1, 30, 30), np.uint8), np.ones((1, 2, 1), np.uint8)
    half = np.array([[[1], [0]]], np.uint8)
    sites = {"large": count(large, large, [2020]), "small": count(half, small, [2020])}
    table = metrics.estimate_intervals(sites, seed=1)
    # Both large, one of each or both small: the mean of site scores would be 0.75 in the middle.
    assert table.loc["iou"].tolist() == [901 / 902, 0.5, 1.0]
    # Of five large and five small sites the mean of site scores would lie between 0.6 and 0.9.
    several = {f"{name}{n}": scores for name, scores in sites.items() for n in range(5)}
    assert metrics.estimate_intervals(several, seed=1).loc["iou", "low"] > 0.98


def test_the_same_seed_gives_the_same_interval_and_one_site_none() -> None:
    sites = sites_of(6)
    assert metrics.estimate_intervals(sites, seed=3).equals(
        metrics.estimate_intervals(sites, seed=3)
    )
    assert not metrics.estimate_intervals(sites, seed=3).equals(
        metrics.estimate_intervals(sites, seed=4)
    )
    alone = metrics.estimate_intervals({"s0": sites["s0"]})
    assert alone["score"].dropna().to_dict() == {
        n: v for n, v in finish(sites["s0"]).items() if not math.isnan(v)
    }
    assert alone[["low", "high"]].isna().all(axis=None)
    with pytest.raises(ModelError, match="no site"):
        metrics.estimate_intervals({})


def test_differences_are_paired_by_site() -> None:
    one = sites_of(8)
    worse = {}
    for name, scores in one.items():  # a little worse at each site
        years = {
            y: dataclasses.replace(n, tp=n.tp - 2, fn=n.fn + 2) for y, n in scores.years.items()
        }
        worse[name] = dataclasses.replace(scores, years=years)
    paired = metrics.estimate_difference(one, dict(reversed(worse.items())))
    assert (
        0
        < paired.loc["recall", "low"]
        < paired.loc["recall", "score"]
        < paired.loc["recall", "high"]
    )
    apart = [metrics.estimate_intervals(s).loc["recall"] for s in (one, worse)]
    assert apart[0]["low"] < apart[1]["high"]  # unpaired, they overlap
    with pytest.raises(ModelError, match="same sites"):
        metrics.estimate_difference(one, {**worse, "s9": worse["s0"]})
    near = {pair: n for pair, n in one["s3"].pairs.items() if pair[1] - pair[0] == 1}
    with pytest.raises(ModelError, match="s3 is scored over 3 and 2 pairs of years"):
        metrics.estimate_difference(
            one, {**worse, "s3": dataclasses.replace(one["s3"], pairs=near)}
        )


def test_formulas_work_on_many_resamples_at_once() -> None:
    """Each row of counts gives what it gives alone."""
    from minecube.metrics.formulas import compute_scores, find_kinds, flatten

    p, y = chances(40, (3, 8, 8))
    years = [2019, 2020, 2021]
    several = [
        count(np.where(p == 255, 255, p >= 125).astype(np.uint8), y, years)
        + metrics.count_probability(p, y, years),
        count(y, y, years),
        Counts(),
    ]
    kinds = find_kinds(several)
    together = compute_scores(np.stack([flatten(s, kinds) for s in several]), kinds)
    for n, scores in enumerate(several):
        alone = finish(scores)
        for name in alone.keys() & together.keys():
            assert together[name][n] == pytest.approx(alone[name], nan_ok=True), name
