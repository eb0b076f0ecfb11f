"""How sure a pooled score is, given that other sites could have been chosen: bootstrap over sites.

Sites are drawn with replacement, as many as there are; their counts are added up, and the formulas are of the sums. Pixels of
one site are not independent, so that nothing less than a site is drawn. Intervals are percentiles of the resampled scores
(Efron & Tibshirani 1993, ch. 13), or bias-corrected and accelerated (BCa, ch. 14). Resamples in which a score is undefined are
left out of its interval. Of one site no interval can be had: it is NaN.
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
    sites: Mapping[str, Scores], *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0, method: str = "percentile"
) -> pd.DataFrame:
    """Scores of all sites together: score, low and high, one row per score. The same seed gives the same interval.

    Args:
        sites: Counts by site.
        level: Of confidence.
        resamples: How many.
        seed: Of the draws.
        method: "percentile" or "bca".

    Raises:
        ModelError: no site, or another method.
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
    """How much higher the first's pooled scores are than the second's: as `intervals`, both of the same drawn sites each time.

    Raises:
        ModelError: the sites, or the pairs of years of one of them, are not the same.
    """
    if set(one) != set(other):
        lacking = sorted(set(one) ^ set(other))
        raise ModelError(f"a paired difference needs the same sites of both, but {lacking[0]} is scored in one of them alone")
    unlike = sorted(name for name in one if set(one[name].pairs) != set(other[name].pairs))
    if unlike:
        numbers = " and ".join(str(len(scores[unlike[0]].pairs)) for scores in (one, other))
        raise ModelError(
            f"{unlike[0]} is scored over {numbers} pairs of years, not the same ones, and change over longer gaps is easier; "
            "map the same pairs by both, or score them one by one"
        )
    return _table({"one": one, "other": other}, lambda scores: scores[0] - scores[1], level, resamples, seed, method)


def _table(
    sets: Mapping[str, Mapping[str, Scores]], of: Any, level: float, resamples: int, seed: int, method: str
) -> pd.DataFrame:
    if method not in ("percentile", "bca"):
        raise ModelError(f"interval method {method!r}; expected percentile or bca")
    if not all(sets.values()):
        raise ModelError("there is no site to score; name at least one")
    kinds = [kinds_of(list(sites.values())) for sites in sets.values()]
    # By name, so that the same draws mean the same sites, and the order in which they were counted does not matter.
    counts = [np.stack([vector(sites[s], k) for s in sorted(sites)]) for sites, k in zip(sets.values(), kinds, strict=True)]
    number = len(counts[0])

    def scores(weights: NDArray[Any]) -> dict[str, NDArray[Any]]:
        # In floats, products run in BLAS; counts stay exact below 2^53.
        found = [formulas(weights.astype(np.float64) @ c.astype(np.float64), k) for c, k in zip(counts, kinds, strict=True)]
        return {name: np.asarray(of([f[name] for f in found])) for name in found[0] if all(name in f for f in found)}

    drawn = np.random.default_rng(seed).integers(0, number, (resamples, number))
    times = np.zeros((resamples, number))
    np.add.at(times, (np.arange(resamples)[:, None], drawn), 1)
    pooled, spread, without = scores(np.ones((1, number))), scores(times), scores(1 - np.eye(number))
    rows = {}
    for name, value in pooled.items():
        ends = (np.nan, np.nan)
        if number > 1 and not np.isnan(value[0]):
            ends = _ends(float(value[0]), spread[name], without[name], level, method)
        rows[name] = (float(value[0]), *ends)
    return pd.DataFrame.from_dict(rows, orient="index", columns=["score", "low", "high"]).rename_axis("name")


def _ends(value: float, spread: NDArray[Any], without: NDArray[Any], level: float, method: str) -> tuple[float, float]:
    spread = spread[~np.isnan(spread)]
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    if method == "bca" and np.ptp(spread) > 0:
        below = (np.count_nonzero(spread < value) + np.count_nonzero(spread <= value)) / (2 * len(spread))
        bias = ndtri(below)
        off = np.nanmean(without) - without[~np.isnan(without)]
        cubes = 6 * (off**2).sum() ** 1.5
        skew = (off**3).sum() / cubes if cubes else 0.0
        z = bias + ndtri(tails)
        tails = ndtr(bias + z / (1 - skew * z))
    low, high = np.quantile(spread, tails)
    return float(low), float(high)
