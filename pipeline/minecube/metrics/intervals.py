"""Estimate the uncertainty of pooled scores by bootstrap over sites.

It reflects the choice of sites. Sites are drawn with replacement, as many as there are. Their
counts are added up before the formulas apply. Pixels of one site are not independent, so whole
sites are drawn. Intervals are percentiles of the resampled scores (Efron & Tibshirani 1993, ch.
13). Resamples with an undefined score are left out of its interval. A single site has no interval:
it is NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

from minecube.arrays import Float64
from minecube.errors import ModelError
from minecube.metrics.counts import Counts
from minecube.metrics.formulas import Kinds, compute_scores, find_kinds, flatten

RESAMPLES = 2000
LEVEL = 0.95
"""Confidence level."""


def estimate_intervals(
    sites: Mapping[str, Counts], *, resamples: int = RESAMPLES, seed: int = 0
) -> pd.DataFrame:
    """Compute pooled scores of all sites with intervals: score, low and high, one row per score.

    The same seed gives the same interval.

    Raises:
        ModelError: there is no site.
    """
    return _estimate([sites], lambda scores: scores[0], resamples, seed)


def estimate_difference(
    minuend: Mapping[str, Counts], subtrahend: Mapping[str, Counts]
) -> pd.DataFrame:
    """Compute how much higher the first pooled scores are than the second, with intervals.

    The table is as in `estimate_intervals`. Each resample uses the same sites for both.

    Raises:
        ModelError: the two differ in sites, or in the pairs of years of a site. Or there is no
            site.
    """
    unpaired = sorted(set(minuend) ^ set(subtrahend))
    if unpaired:
        raise ModelError(
            f"a paired difference needs the same sites of both, but {unpaired[0]} is scored in "
            "one of them alone"
        )
    for site in sorted(minuend):
        if set(minuend[site].pairs) != set(subtrahend[site].pairs):
            raise ModelError(
                f"{site} is scored over {len(minuend[site].pairs)} and "
                f"{len(subtrahend[site].pairs)} pairs of years, not the same ones, and change over "
                "longer gaps is easier; map the same pairs by both, or score them one by one"
            )
    return _estimate([minuend, subtrahend], lambda scores: scores[0] - scores[1])


def _estimate(
    models: Sequence[Mapping[str, Counts]],
    combine: Callable[[list[Float64]], Float64],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Combine the pooled scores of one or two models over the same resampled sites."""
    if not all(models):
        raise ModelError("there is no site to score; name at least one")
    kinds = [find_kinds(list(sites.values())) for sites in models]
    # Sorted by name, so the same draws mean the same sites, for any order of counting.
    counts = [_stack_counts(sites, k) for sites, k in zip(models, kinds, strict=True)]
    number = len(models[0])

    def score(weights: Float64) -> dict[str, Float64]:
        """Compute scores of weighted sites; weights have the shape (resample, site)."""
        # In floats, products run in BLAS. Counts stay exact below 2^53.
        scores = [compute_scores(weights @ c, k) for c, k in zip(counts, kinds, strict=True)]
        shared = [name for name in scores[0] if all(name in s for s in scores)]
        combined = {}
        for name in shared:
            values = [s[name] for s in scores]
            combined[name] = np.asarray(combine(values))
        return combined

    draws = np.random.default_rng(seed).integers(0, number, (resamples, number))
    weights = np.zeros((resamples, number))
    np.add.at(weights, (np.arange(resamples)[:, None], draws), 1)
    pooled = score(np.ones((1, number)))
    resampled = score(weights)
    rows = []
    for name, (value,) in pooled.items():
        interval = (np.nan, np.nan)
        if number > 1 and not np.isnan(value):
            interval = _percentiles(resampled[name])
        rows.append((float(value), *interval))
    index = pd.Index(list(pooled), name="name")
    return pd.DataFrame(rows, index=index, columns=["score", "low", "high"])


def _stack_counts(sites: Mapping[str, Counts], kinds: Kinds) -> Float64:
    """Stack the counts of sites, sorted by name, as (site, counts)."""
    return np.stack([flatten(sites[name], kinds) for name in sorted(sites)]).astype(np.float64)


def _percentiles(resampled: Float64) -> tuple[float, float]:
    """Return the ends of the interval around the resampled scores, NaN left out."""
    defined = resampled[~np.isnan(resampled)]
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
