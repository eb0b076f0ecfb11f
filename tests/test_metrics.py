"""Scores against loops over pixels, scikit-learn, scipy, the published SCS by hand, and baselines that must lose."""

from __future__ import annotations

import json
import math
import operator
from functools import reduce
from itertools import combinations, pairwise

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.ndimage import distance_transform_edt
from sklearn.metrics import accuracy_score, f1_score, jaccard_score, precision_score, recall_score

from minecube import metrics
from minecube.errors import ModelError
from minecube.metrics import Scores, count, finish

YEARS = [2015, 2016, 2018, 2019]


def series(seed: int, shape: tuple[int, int, int] = (4, 17, 23), unknown: float = 0.1) -> np.ndarray:
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
        for score, f in (("f1", f1_score), ("iou", _jaccard), ("precision", precision_score), ("recall", recall_score))
    }
    transition = {
        "transition_f1": f1_score(a, b, labels=[-1, 1], average="micro"),
        "transition_iou": jaccard_score(a, b, labels=[-1, 1], average="micro"),
        "transition_precision": precision_score(a, b, labels=[-1, 1], average="micro"),
        "transition_recall": recall_score(a, b, labels=[-1, 1], average="micro"),
    }
    tubes = {"tiou_s": s, "tiou_c": c, "ca_tiou": (s + c) / 2, "bc": bc, "sc": sc, "scs": (bc + sc) / 2}
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
    table, pooled = metrics.by_year(scores), finish(scores)
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


def test_boundary_f1_is_that_of_euclidean_distances() -> None:
    r = np.random.default_rng(3)
    p, y = (np.kron(r.integers(0, 2, (1, 6, 7)), np.ones((1, 9, 9))).astype(np.uint8) for _ in range(2))
    y[0, :15, :15] = 255
    p[0, 40:, 50:] = 255
    known = (p[0] != 255) & (y[0] != 255)

    def edge(mask: np.ndarray) -> np.ndarray:
        found = np.zeros(mask.shape, bool)
        for a, b in np.argwhere((mask == 1) & known):
            near = [(a - 1, b), (a + 1, b), (a, b - 1), (a, b + 1)]
            inside = [n for n in near if 0 <= n[0] < mask.shape[0] and 0 <= n[1] < mask.shape[1] and known[n]]
            found[a, b] = any(mask[n] == 0 for n in inside)
        return found

    drawn, true = edge(p[0]), edge(y[0])
    precision = (distance_transform_edt(~true)[drawn] <= 3).mean()
    recall = (distance_transform_edt(~drawn)[true] <= 3).mean()
    assert 0.1 < precision < 0.9
    expected = 2 * precision * recall / (precision + recall)
    assert finish(count(p, y, [2020]))["boundary_f1"] == pytest.approx(expected)


@pytest.mark.parametrize(("shift", "expected"), [(3, 1), (4, 0)])
def test_boundary_tolerance_is_three_pixels(shift: int, expected: float) -> None:
    y = np.zeros((1, 20, 40), np.uint8)
    y[0, :, :20] = 1
    p = y.copy()
    p[0, :, 20 : 20 + shift] = 1
    assert finish(count(p, y, [2020]))["boundary_f1"] == expected


def test_scores_by_hand() -> None:
    # Six pixels, three years: truth, prediction.
    y = np.array([[0, 0, 0], [1, 1, 1], [0, 1, 1], [0, 0, 1], [1, 0, 0], [0, 0, 0]]).T.reshape(3, 1, 6)
    p = np.array([[0, 0, 0], [1, 1, 1], [0, 1, 1], [0, 1, 1], [1, 1, 1], [0, 0, 1]]).T.reshape(3, 1, 6)
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
    changes = ("bc", "change_f1", "change_iou", "transition_f1", "transition_iou", "expansion_f1", "expansion_iou")
    assert [found[name] for name in changes] == [0] * len(changes)
    assert (metrics.by_pair(scores)[["change_f1", "transition_f1", "expansion_f1"]] == 0).all(axis=None)


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
    assert [found.pop(f"vc_{n}") for n in (2, 3)] == [1, 1]  # nothing moved, and nothing is a class, too
    assert all(math.isnan(value) for value in found.values())
    assert all(math.isnan(value) for value in finish(Scores()).values())
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


@settings(max_examples=30, deadline=None)
@given(arrays(np.uint8, (2, 3, 12, 14), elements=st.sampled_from([0, 1, 255])), st.integers(1, 11), st.integers(1, 13))
def test_counts_of_blocks_add_up_to_those_of_the_site(both: np.ndarray, at_y: int, at_x: int) -> None:
    p, y = both
    years = [2019, 2020, 2021]
    total = Scores()
    for rows in (slice(0, at_y), slice(at_y, 12)):
        for columns in (slice(0, at_x), slice(at_x, 14)):
            context = tuple(slice(max(s.start - metrics.MARGIN_PX, 0), s.stop + metrics.MARGIN_PX) for s in (rows, columns))
            core = tuple(slice(s.start - c.start, s.stop - c.start) for s, c in zip((rows, columns), context, strict=True))
            total += count(p[:, *context], y[:, *context], years, core=core)  # type: ignore[arg-type]
    assert total == count(p, y, years)


def test_counts_of_sites_with_other_years_add_up() -> None:
    one, two = count(series(11), series(12), YEARS), count(series(13)[:3], series(14)[:3], [2016, 2019, 2024])
    both = one + two
    assert both == two + one
    assert both + Scores() == both
    assert reduce(operator.add, [one, two]) == sum([one, two], Scores())
    assert both.years[2016] == one.years[2016] + two.years[2016]
    assert both.years[2024] == two.years[2024]
    assert metrics.by_year(both).index.tolist() == [2015, 2016, 2018, 2019, 2024]


def test_pooling_is_a_ratio_of_sums_not_a_mean_of_ratios() -> None:
    large, small = np.ones((1, 10, 10), np.uint8), np.ones((1, 2, 1), np.uint8)
    half = np.array([[[1], [0]]], np.uint8)
    found = finish(count(large, large, [2020]) + count(half, small, [2020]))
    assert found["iou"] == 101 / 102  # the mean of ratios would be 0.75


def test_gaps_are_calendar_years_and_pairs_are_all_pairs() -> None:
    p, y = series(15), series(16)
    scores = count(p, y, YEARS)
    assert metrics.by_pair(scores).index.tolist() == sorted(f"{a}-{b}" for a, b in combinations(YEARS, 2))
    gaps = metrics.by_gap(scores)
    assert gaps.index.tolist() == [1, 2, 3, 4]  # not 1, 2, 3: 2017 is not among the years
    alone = finish(count(p[[0, 2]], y[[0, 2]], [2015, 2018]) + count(p[[1, 3]], y[[1, 3]], [2016, 2019]))
    assert gaps.loc[3].to_dict() == pytest.approx({name: alone[name] for name in gaps.columns})


def test_dataarrays_are_scored_by_their_own_years() -> None:
    p, y = series(17), series(18)
    label = xr.DataArray(y, dims=("year", "y", "x"), coords={"year": YEARS})
    turned = xr.DataArray(p, dims=("year", "y", "x"), coords={"year": YEARS}).transpose("x", "y", "year")
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
