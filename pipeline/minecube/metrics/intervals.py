"""Estimate the uncertainty of pooled scores by bootstrap over sites.

It reflects the choice of sites. Sites are drawn with replacement, as many as there are. Their
counts are added up before the formulas apply. Pixels of one site are not independent, so whole
sites are drawn. Intervals are percentiles of the resampled scores (Efron & Tibshirani 1993, ch.
13), or bias-corrected and accelerated (BCa, ch. 14). Resamples with an undefined score are left out
of its interval. A single site has no interval: it is NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from minecube.errors import ModelError
from minecube.metrics.formulas import formulas, kinds_of, vector
from minecube.metrics.states import Scores

RESAMPLES = 2000


def intervals(
    sites: Mapping[str, Scores],
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
    method: str = "percentile",
) -> pd.DataFrame:
    """Compute pooled scores of all sites with intervals: score, low and high, one row per score.

    The same seed gives the same interval.

    Args:
        sites: Counts by site.
        level: Confidence level.
        resamples: Number of resamples.
        seed: Seed of the draws.
        method: "percentile" or "bca".

    Raises:
        ModelError: there is no site, or the method is unknown.
    """
    return _table({"score": sites}, lambda scores: scores[0], level, resamples, seed, method)


def difference(
    one: Mapping[str, Scores],
    other: Mapping[str, Scores],
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
    method: str = "percentile",
) -> pd.DataFrame:
    """Compute how much higher the first pooled scores are than the second, with intervals.

    The table is as in `intervals`. Each resample uses the same sites for both.

    Raises:
        ModelError: the two differ in sites, or in the pairs of years of a site. Or see `intervals`.
    """
    if set(one) != set(other):
        lacking = sorted(set(one) ^ set(other))
        raise ModelError(
            f"a paired difference needs the same sites of both, but {lacking[0]} is scored in one of them alone"
        )
    unlike = sorted(name for name in one if set(one[name].pairs) != set(other[name].pairs))
    if unlike:
        numbers = " and ".join(str(len(scores[unlike[0]].pairs)) for scores in (one, other))
        raise ModelError(
            f"{unlike[0]} is scored over {numbers} pairs of years, not the same ones, and change over longer gaps is easier; "
            "map the same pairs by both, or score them one by one"
        )
    return _table(
        {"one": one, "other": other},
        lambda scores: scores[0] - scores[1],
        level,
        resamples,
        seed,
        method,
    )


def _table(
    sets: Mapping[str, Mapping[str, Scores]],
    of: Any,
    level: float,
    resamples: int,
    seed: int,
    method: str,
) -> pd.DataFrame:
    if method not in ("percentile", "bca"):
        raise ModelError(f"interval method {method!r}; expected percentile or bca")
    if not all(sets.values()):
        raise ModelError("there is no site to score; name at least one")
    kinds = [kinds_of(list(sites.values())) for sites in sets.values()]
    # Sorted by name, so the same draws mean the same sites, for any order of counting.
    counts = [
        np.stack([vector(sites[s], k) for s in sorted(sites)])
        for sites, k in zip(sets.values(), kinds, strict=True)
    ]
    number = len(counts[0])

    def scores(weights: NDArray[Any]) -> dict[str, NDArray[Any]]:
        # In floats, products run in BLAS. Counts stay exact below 2^53.
        found = [
            formulas(weights.astype(np.float64) @ c.astype(np.float64), k)
            for c, k in zip(counts, kinds, strict=True)
        ]
        return {
            name: np.asarray(of([f[name] for f in found]))
            for name in found[0]
            if all(name in f for f in found)
        }

    drawn = np.random.default_rng(seed).integers(0, number, (resamples, number))
    times = np.zeros((resamples, number))
    np.add.at(times, (np.arange(resamples)[:, None], drawn), 1)
    pooled, spread, without = (
        scores(np.ones((1, number))),
        scores(times),
        scores(1 - np.eye(number)),
    )
    rows = {}
    for name, value in pooled.items():
        ends = (np.nan, np.nan)
        if number > 1 and not np.isnan(value[0]):
            ends = _ends(float(value[0]), spread[name], without[name], level, method)
        rows[name] = (float(value[0]), *ends)
    return pd.DataFrame.from_dict(
        rows, orient="index", columns=["score", "low", "high"]
    ).rename_axis("name")


def _ends(
    value: float, spread: NDArray[Any], without: NDArray[Any], level: float, method: str
) -> tuple[float, float]:
    spread = spread[~np.isnan(spread)]
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    if method == "bca" and np.ptp(spread) > 0:
        below = (np.count_nonzero(spread < value) + np.count_nonzero(spread <= value)) / (
            2 * len(spread)
        )
        bias = ndtri(below)
        off = np.nanmean(without) - without[~np.isnan(without)]
        cubes = 6 * (off**2).sum() ** 1.5
        skew = (off**3).sum() / cubes if cubes else 0.0
        z = bias + ndtri(tails)
        tails = ndtr(bias + z / (1 - skew * z))
    low, high = np.quantile(spread, tails)
    return float(low), float(high)
