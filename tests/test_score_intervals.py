"""Intervals of scores and of their differences are a bootstrap over sites."""

from __future__ import annotations

import dataclasses
import math
import operator
from functools import reduce

import numpy as np
import pytest
from scipy.stats import bootstrap

from known_footprints import chances, series
from minecube import metrics
from minecube.errors import ModelError
from minecube.metrics import Counts, count, finish


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
