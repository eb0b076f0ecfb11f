"""Scores of probabilities equal scikit-learn's curves and values by hand."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import average_precision_score, brier_score_loss, precision_recall_curve

from known_footprints import YEARS, chances
from minecube import metrics
from minecube.errors import ModelError
from minecube.metrics import count, finish


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


def test_a_probability_is_no_footprint_and_the_reverse() -> None:
    with pytest.raises(ModelError, match="expected uint8"):
        metrics.count_probability(np.full((1, 3, 3), 0.5), np.zeros((1, 3, 3), np.uint8), [2020])  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"0\.\.250"):
        metrics.count_probability(
            np.full((1, 3, 3), 252, np.uint8), np.zeros((1, 3, 3), np.uint8), [2020]
        )
