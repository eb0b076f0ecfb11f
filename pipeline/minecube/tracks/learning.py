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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Self

import numpy as np
import xarray as xr

from minecube.arrays import Float64, UInt8
from minecube.codes import BACKGROUND, FULL, MINE, UNKNOWN
from minecube.errors import LabelError
from minecube.tracks.smoothing import (
    MAX_RATE,
    MIN_PRIOR,
    MIN_RATE,
    MIN_SHARE,
    TEMPER,
    Rates,
    check_stored,
    checked_years,
    evidence,
)

MAX_TURNS = 200
TOLERANCE = 1e-3
"""Relative change of both rates at convergence."""
_SAMPLE_PX = 1 << 16
_CERTAIN = 1e12  # odds of a labelled mine


@dataclass(frozen=True)
class Series:
    """Distinct series of stored values over consecutive years, uint8 (year, series).

    `weights` are their numbers of occurrences.
    """

    values: UInt8
    weights: Float64


@dataclass(frozen=True)
class Expected:
    """Expected counts in pixels; they add up over series, sites and machines."""

    opened: float = 0
    stayed_closed: float = 0
    closed: float = 0
    stayed_open: float = 0
    initial: float = 0
    """Mine pixels in the first year."""
    pixels: float = 0
    log_likelihood: float = 0

    def __add__(self, addend: Self) -> Self:
        sums = {name: count + getattr(addend, name) for name, count in vars(self).items()}
        return type(self)(**sums)

    def rates(self, rates: Rates) -> Rates:
        """Compute the likeliest rates and initial share for these counts.

        Prior and temper are those of `rates`.
        """
        return replace(
            rates,
            opening=_rate(self.opened, self.stayed_closed),
            closing=_rate(self.closed, self.stayed_open),
            initial=_share(self.initial, self.pixels),
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
    start = _under_own_prior(series, temper)
    if prior is not None:
        start = replace(start, prior=prior)
    rates, _ = maximise(series, start)
    return rates


def make_rates(
    probabilities: Iterable[xr.DataArray], opening: float, closing: float, *, temper: float = TEMPER
) -> Rates:
    """Make rates of these two, with the maps' mean as initial share and prior.

    Raises:
        LabelError: As for `learn_rates`, or the rates are out of bounds.
    """
    start = _under_own_prior(sampled(list(probabilities)), temper)
    return replace(start, opening=opening, closing=closing)


def _under_own_prior(series: Sequence[Series], temper: float) -> Rates:
    return _initial_rates(*_sum_probability(series), temper)


def _initial_rates(mine: float, total: float, temper: float) -> Rates:
    """Return the rates before learning, with the mine share as initial share and prior."""
    return Rates(
        opening=0.01,
        closing=0.01,
        initial=_share(mine, total),
        prior=_share(mine, total, MIN_PRIOR),
        temper=temper,
    )


def maximise(series: Sequence[Series], start: Rates) -> tuple[Rates, list[float]]:
    """Maximise the likelihood of these series over the rates.

    Returns the rates and the log-likelihood before each turn. Prior and temper stay as they are.
    """

    def count(rates: Rates) -> Expected:
        table = evidence(rates).astype(np.float64)
        return sum((expected(table[s.values], s.weights, rates) for s in series), Expected())

    return _iterate(count, start, TOLERANCE)


def _iterate(
    count: Callable[[Rates], Expected], rates: Rates, tolerance: float
) -> tuple[Rates, list[float]]:
    """Compute new rates from the counts at the rates, until they hardly change.

    Returns the rates and the log-likelihood before each turn.
    """
    log_likelihoods = []
    for _ in range(MAX_TURNS):
        counts = count(rates)
        log_likelihoods.append(counts.log_likelihood)
        guess = rates
        rates = counts.rates(guess)
        opening_is_close = math.isclose(guess.opening, rates.opening, rel_tol=tolerance)
        if opening_is_close and math.isclose(guess.closing, rates.closing, rel_tol=tolerance):
            break
    return rates, log_likelihoods


def _sum_probability(series: Sequence[Series]) -> tuple[float, float]:
    """Sum the known probabilities, and count the known values."""
    mine = 0.0
    total = 0.0
    for s in series:
        observed = s.values != UNKNOWN
        stored = np.where(observed, s.values, 0).sum(axis=0, dtype=np.float64)
        mine += float((stored * s.weights).sum()) / FULL
        total += float((observed.sum(axis=0) * s.weights).sum())
    return mine, total


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
    series = [_sample_series(probability, step) for probability in probabilities]
    if not sum(s.weights.sum() for s in series):
        raise LabelError(
            "the maps hold no known pixel (all are 255), so they tell no rates; map the sites "
            "first, or give rates"
        )
    return series


def _sample_series(probability: xr.DataArray, step: int) -> Series:
    """Sample one in `step` pixels of a map."""
    years = checked_years(probability)
    values = probability.to_numpy().reshape(len(years), -1)
    # Random: every n-th pixel is in the same few columns if n and the width share a factor.
    sample = np.random.default_rng(0).choice(
        values.shape[1], -(-values.shape[1] // step), replace=False, shuffle=False
    )
    values = values[:, sample]
    check_stored(values)
    values = values[:, (values != UNKNOWN).any(axis=0)]
    filled = np.full((years[-1] - years[0] + 1, values.shape[1]), UNKNOWN, np.uint8)
    filled[np.subtract(years, years[0])] = values
    distinct, counts = np.unique(filled, axis=1, return_counts=True)
    return Series(distinct, counts.astype(np.float64))


def steps_of_labels(footprint: xr.DataArray) -> Counter[tuple[int, int, int]]:
    """Count pixels by steps between successive known states.

    Keys are (state, next state, years between). Counts of several sites can be added. The footprint
    is (year, y, x) uint8: 1 mine, 0 not, 255 unknown; years ascending.

    Raises:
        LabelError: The argument is not a footprint.
    """
    years = checked_years(footprint)
    values = footprint.to_numpy()
    if ((values > MINE) & (values != UNKNOWN)).any():
        raise LabelError(
            f"the labels hold values other than 0, 1 and {UNKNOWN} (unknown); "
            "give footprints, not probabilities"
        )
    counts: Counter[tuple[int, int, int]] = Counter()
    for i, j in combinations(range(len(years)), 2):
        # Known in both years and in none between: steps over a known year would count twice.
        adjacent = (values[i + 1 : j] == UNKNOWN).all(axis=0)
        if not adjacent.any():
            continue
        for state, next_state in product((BACKGROUND, MINE), repeat=2):
            pixels = (values[i] == state) & (values[j] == next_state) & adjacent
            counts[state, next_state, years[j] - years[i]] += int(pixels.sum())
    return +counts


def learn_rates_from_labels(footprints: Iterable[xr.DataArray], *, temper: float = TEMPER) -> Rates:
    """Estimate rates of opening and closing from labelled sites.

    The sites' mine share becomes the initial share and the prior. Use the training sites of the
    model: its probabilities were learned under their share.

    There is one footprint per site, (year, y, x) uint8: 1 mine, 0 not, 255 unknown; years
    ascending, gaps allowed.

    Raises:
        LabelError: No pixel is known in two years, or an argument is not a footprint.
    """
    steps: Counter[tuple[int, int, int]] = Counter()
    mine = 0
    total = 0
    for footprint in footprints:
        steps += steps_of_labels(footprint)
        mine += int((footprint == MINE).sum())
        total += int((footprint != UNKNOWN).sum())
    if not steps:
        raise LabelError(
            "no pixel of these labels is known in two years, so they tell no rates; label more "
            "years, or give rates"
        )
    return rates_of_steps(steps, _initial_rates(mine, total, temper))


def rates_of_steps(steps: Mapping[tuple[int, int, int], int], start: Rates) -> Rates:
    """Estimate the likeliest rates from counted steps.

    For steps of one year these are the shares. Longer steps need expectation maximisation.
    """
    odds = {BACKGROUND: 1 / _CERTAIN, MINE: _CERTAIN}

    def count(rates: Rates) -> Expected:
        counts = Expected()
        for (state, next_state, gap), pixels in steps.items():
            likely = np.ones((gap + 1, 1))
            likely[0] = odds[state]
            likely[-1] = odds[next_state]
            counts += expected(likely, np.array([float(pixels)]), rates)
        return counts

    rates, _ = _iterate(count, start, TOLERANCE**2)
    return replace(rates, initial=start.initial)


def expected(likely: Float64, weights: Float64, rates: Rates) -> Expected:
    """Compute the expected steps of series from likelihood ratios (year, series) and weights.

    Years are consecutive. The log-likelihood is that of the ratios. It differs from the series' own
    by a term independent of the rates.
    """
    a00, a01, a10, a11 = rates.over(1)
    initial_odds = rates.initial / (1 - rates.initial)
    odds = np.empty_like(likely)
    odds[0] = initial_odds * likely[0]
    log_likelihood = np.log1p(odds[0]) - math.log1p(initial_odds)
    for t in range(1, len(likely)):
        forward = (a01 + a11 * odds[t - 1]) / (a00 + a10 * odds[t - 1])
        odds[t] = likely[t] * forward
        log_likelihood += np.log1p(odds[t]) - np.log1p(forward)
    backward = np.ones_like(odds[0])
    sums = np.zeros(4)
    for t in range(len(likely) - 1, 0, -1):
        later = likely[t] * backward
        steps = np.stack(
            [np.full_like(later, a00), a01 * later, a10 * odds[t - 1], a11 * odds[t - 1] * later]
        )
        sums += (steps / steps.sum(axis=0)) @ weights
        backward = (a10 + a11 * later) / (a00 + a01 * later)
    posterior_odds = odds[0] * backward
    stayed_closed, opened, closed, stayed_open = sums.tolist()
    return Expected(
        opened=opened,
        stayed_closed=stayed_closed,
        closed=closed,
        stayed_open=stayed_open,
        initial=float((posterior_odds / (1 + posterior_odds)) @ weights),
        pixels=float(weights.sum()),
        log_likelihood=float(log_likelihood @ weights),
    )


def _rate(changed: float, unchanged: float) -> float:
    """Compute the share of changed pixels, limited to the bounds of rates."""
    total = changed + unchanged
    if not total:
        return MIN_RATE
    return min(max(changed / total, MIN_RATE), MAX_RATE)


def _share(part: float, total: float, minimum: float = MIN_SHARE) -> float:
    """Divide, limited to `minimum` .. 1 - `minimum`."""
    return min(max(part / total, minimum), 1 - minimum)
