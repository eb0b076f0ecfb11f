"""Learn rates of opening and closing from labels or from probabilities.

From probabilities it is expectation maximisation: Baum and Welch's method (Rabiner 1989,
Proceedings of the IEEE 77, section III C). Evidence is fixed, since a stored probability already
gives it. Each turn counts the expected openings and closings at the current rates, and computes new
rates from them. Each turn makes the series at least as likely as before. Missing years are years
without evidence, so a gap of three years counts as three steps. Counts add up over sites.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Self

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from minecube.errors import LabelError
from minecube.tracks.areas import MINE, NOT_MINE, UNKNOWN
from minecube.tracks.smoothing import (
    LEAST,
    LEAST_PRIOR,
    LEAST_SHARE,
    MOST,
    SCALE,
    TEMPER,
    Rates,
    checked_years,
    evidence,
    need_stored,
)

MOST_TURNS, CLOSE = 200, 1e-3
"""Maximum number of turns, and the relative change of both rates at convergence."""
_SAMPLE_PX = 1 << 16
_CERTAIN = 1e12  # odds of a labelled mine
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """Distinct series of stored values over consecutive years, uint8 (year, series).

    `weights` are their numbers of occurrences.
    """

    values: NDArray[np.uint8]
    weights: Float64


@dataclass(frozen=True)
class Expected:
    """Expected counts in pixels; they add up over series, sites and machines."""

    opened: float = 0
    stayed_closed: float = 0
    closed: float = 0
    stayed_open: float = 0
    first: float = 0
    """Mine pixels in the first year."""
    pixels: float = 0
    log_likelihood: float = 0

    def __add__(self, other: Self) -> Self:
        return type(self)(
            **{name: getattr(self, name) + getattr(other, name) for name in vars(self)}
        )

    def rates(self, before: Rates) -> Rates:
        """Compute the likeliest rates and initial share for these counts.

        Prior and temper are as before.
        """
        opening, closing = (
            min(max(some / whole if whole else LEAST, LEAST), MOST)
            for some, whole in (
                (self.opened, self.opened + self.stayed_closed),
                (self.closed, self.closed + self.stayed_open),
            )
        )
        return replace(
            before, opening=opening, closing=closing, initial=_share(self.first, self.pixels)
        )


def learn_rates(
    probabilities: Iterable[xr.DataArray], *, prior: float | None = None, temper: float = TEMPER
) -> Rates:
    """Learn the likeliest rates for these maps, from the maps alone.

    The same share of pixels is drawn from each map, about 65 thousand in all. The same maps give
    the same rates.

    Args:
        probabilities: One per site, (year, y, x) uint8 x 250, 255 = unknown; years ascending, gaps
            allowed.
        prior: Mine share of the model's training. Default: the mean of the maps, as posteriors have
            this mean under their own prior.
        temper: As in `Rates.temper`.

    Raises:
        LabelError: There is no map. No map has a known pixel. A map is no stored probability.
    """
    series = sampled(list(probabilities))
    start = _under_own_prior(series, temper=temper)
    rates, _ = maximise(series, start if prior is None else replace(start, prior=prior))
    return rates


def rates_given(
    probabilities: Iterable[xr.DataArray], opening: float, closing: float, *, temper: float = TEMPER
) -> Rates:
    """Make rates of these two, with the maps' mean as initial share and prior.

    Raises:
        LabelError: As for `learn_rates`, or the rates are out of bounds.
    """
    return replace(
        _under_own_prior(sampled(list(probabilities)), temper=temper),
        opening=opening,
        closing=closing,
    )


def _under_own_prior(series: Sequence[Series], temper: float) -> Rates:
    share, prior = mean_probability(series), mean_probability(series, LEAST_PRIOR)
    return Rates(opening=0.01, closing=0.01, initial=share, prior=prior, temper=temper)


def maximise(series: Sequence[Series], start: Rates) -> tuple[Rates, list[float]]:
    """Maximise the likelihood of these series over the rates.

    Returns the rates and the log-likelihood before each turn. Prior and temper stay as they are.
    """
    rates, told = start, []
    for _ in range(MOST_TURNS):
        table = evidence(rates).astype(np.float64)
        found = sum((expected(table[s.values], s.weights, rates) for s in series), Expected())
        told.append(found.log_likelihood)
        before, rates = rates, found.rates(rates)
        if _settled(before, rates, CLOSE):
            break
    return rates, told


def _settled(before: Rates, after: Rates, close: float) -> bool:
    return all(
        math.isclose(getattr(before, n), getattr(after, n), rel_tol=close)
        for n in ("opening", "closing")
    )


def mean_probability(series: Sequence[Series], least: float = LEAST_SHARE) -> float:
    """Compute the mean of all known values, limited to `least` .. 1 - `least`."""
    total = known = 0.0
    for s in series:
        there = s.values != UNKNOWN
        total += (
            float((np.where(there, s.values, 0).sum(axis=0, dtype=np.float64) * s.weights).sum())
            / SCALE
        )
        known += float((there.sum(axis=0) * s.weights).sum())
    return _share(total, known, least)


def sampled(probabilities: Sequence[xr.DataArray]) -> list[Series]:
    """Sample the same share of pixels of each map, and merge equal series.

    The sample is the same each time.

    Raises:
        LabelError: As for `learn_rates`.
    """
    if not sum(p.size for p in probabilities):
        raise LabelError(
            "there is no map to learn rates from; name sites that a model has mapped, or give rates"
        )
    step = -(-sum(p.sizes["y"] * p.sizes["x"] for p in probabilities) // _SAMPLE_PX)
    found = []
    for probability in probabilities:
        years = checked_years(probability)
        values = probability.to_numpy().reshape(len(years), -1)
        # Random: every n-th pixel is in the same few columns if n and the width share a factor.
        chosen = np.random.default_rng(0).choice(
            values.shape[1], -(-values.shape[1] // step), replace=False, shuffle=False
        )
        values = values[:, chosen]
        need_stored(bool(((values > SCALE) & (values < UNKNOWN)).any()))
        values = values[:, (values != UNKNOWN).any(axis=0)]
        filled = np.full((years[-1] - years[0] + 1, values.shape[1]), UNKNOWN)
        filled[np.subtract(years, years[0])] = values
        distinct, counts = np.unique(filled, axis=1, return_counts=True)
        found.append(Series(distinct, counts.astype(np.float64)))
    if not sum(s.weights.sum() for s in found):
        raise LabelError(
            "the maps hold no known pixel (all are 255), so they tell no rates; map the sites first, or give rates"
        )
    return found


def steps_of_labels(footprint: xr.DataArray) -> Counter[tuple[int, int, int]]:
    """Count pixels by steps between successive known states.

    Keys are (state, next state, years between). Counts of several sites can be added.

    Args:
        footprint: (year, y, x) uint8: 1 mine, 0 not, 255 unknown; years ascending.

    Raises:
        LabelError: The argument is not a footprint.
    """
    years = checked_years(footprint)
    values = footprint.to_numpy()
    if ((values > MINE) & (values != UNKNOWN)).any():
        raise LabelError(
            f"the labels hold values other than 0, 1 and {UNKNOWN} (unknown); give footprints, not probabilities"
        )
    counts: Counter[tuple[int, int, int]] = Counter()
    for i, j in combinations(range(len(years)), 2):
        # Known in both years and in none between: steps over a known year would count twice.
        adjacent = (values[i + 1 : j] == UNKNOWN).all(axis=0)
        if not adjacent.any():
            continue
        for a in (NOT_MINE, MINE):
            for b in (NOT_MINE, MINE):
                counts[int(a), int(b), years[j] - years[i]] += int(
                    ((values[i] == a) & (values[j] == b) & adjacent).sum()
                )
    return +counts


def rates_from_labels(footprints: Iterable[xr.DataArray], *, temper: float = TEMPER) -> Rates:
    """Estimate rates of opening and closing from labelled sites.

    The sites' mine share becomes the initial share and the prior. Use the training sites of the
    model: its probabilities were learned under their share.

    Args:
        footprints: One per site, (year, y, x) uint8: 1 mine, 0 not, 255 unknown; years ascending,
            gaps allowed.
        temper: As in `Rates.temper`.

    Raises:
        LabelError: No pixel is known in two years, or an argument is not a footprint.
    """
    steps: Counter[tuple[int, int, int]] = Counter()
    mine = known = 0
    for footprint in footprints:
        steps += steps_of_labels(footprint)
        mine += int((footprint == MINE).sum())
        known += int((footprint != UNKNOWN).sum())
    if not steps:
        raise LabelError(
            "no pixel of these labels is known in two years, so they tell no rates; label more years, or give rates"
        )
    start = Rates(
        opening=0.01,
        closing=0.01,
        initial=_share(mine, known),
        prior=_share(mine, known, LEAST_PRIOR),
        temper=temper,
    )
    return rates_of_steps(steps, start)


def rates_of_steps(steps: Mapping[tuple[int, int, int], int], start: Rates) -> Rates:
    """Estimate the likeliest rates from counted steps.

    For steps of one year these are the shares. Longer steps need expectation maximisation.
    """
    rates = start
    for _ in range(MOST_TURNS):
        found = Expected()
        for (a, b, gap), count in steps.items():
            likely = np.ones((gap + 1, 1))
            likely[0], likely[-1] = (_CERTAIN if state else 1 / _CERTAIN for state in (a, b))
            found += expected(likely, np.array([float(count)]), rates)
        before, rates = rates, found.rates(rates)
        if _settled(before, rates, CLOSE**2):
            break
    return replace(rates, initial=start.initial)


def expected(likely: Float64, weights: Float64, rates: Rates) -> Expected:
    """Compute the expected steps of series from likelihood ratios (year, series) and weights.

    Years are consecutive. The log-likelihood is that of the ratios. It differs from the series' own
    by a term independent of the rates.
    """
    a00, a01, a10, a11 = rates.over(1)
    begun = rates.initial / (1 - rates.initial)
    odds = np.empty_like(likely)
    odds[0] = begun * likely[0]
    log_likelihood = np.log1p(odds[0]) - math.log1p(begun)
    for t in range(1, len(likely)):
        ahead = (a01 + a11 * odds[t - 1]) / (a00 + a10 * odds[t - 1])
        odds[t] = likely[t] * ahead
        log_likelihood += np.log1p(odds[t]) - np.log1p(ahead)
    back = np.ones_like(odds[0])
    sums = np.zeros(4)
    for t in range(len(likely) - 1, 0, -1):
        ahead = likely[t] * back
        pairs = np.stack(
            [np.full_like(ahead, a00), a01 * ahead, a10 * odds[t - 1], a11 * odds[t - 1] * ahead]
        )
        sums += (pairs / pairs.sum(axis=0)) @ weights
        back = (a10 + a11 * ahead) / (a00 + a01 * ahead)
    first = odds[0] * back
    stayed_closed, opened, closed, stayed_open = (float(n) for n in sums)
    return Expected(
        opened=opened,
        stayed_closed=stayed_closed,
        closed=closed,
        stayed_open=stayed_open,
        first=float((first / (1 + first)) @ weights),
        pixels=float(weights.sum()),
        log_likelihood=float(log_likelihood @ weights),
    )


def _share(some: float, whole: float, least: float = LEAST_SHARE) -> float:
    return min(max(some / whole, least), 1 - least)
