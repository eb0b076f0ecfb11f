"""Scores through time equal loops over pixels, scikit-learn and values by hand."""

from __future__ import annotations

import json
import math
from itertools import combinations, pairwise

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, jaccard_score, precision_score, recall_score

from known_footprints import YEARS, series
from minecube import metrics
from minecube.metrics import Counts, count, finish


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
    tubes = {
        "tiou_s": s,
        "tiou_c": c,
        "ca_tiou": (s + c) / 2,
        "bc": bc,
        "sc": sc,
        "scs": (bc + sc) / 2,
    }
    return tubes | rates_of_pairs(pairs)


def rates_of_pairs(pairs: list[tuple[int, int]]) -> dict[str, float]:
    """Scores of changes in truth and prediction: -1, 0 or 1 each."""
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
    return rates | transition


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
