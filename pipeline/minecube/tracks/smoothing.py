"""Smooth yearly probabilities pixel by pixel, by a hidden Markov model of two states.

Ground is a mine or not. From one year to the next it opens with one probability and closes with
another. Over a gap of g years, the matrix of these is taken to the power g. For the posterior, a
missing year thus equals a year without evidence. Forward-backward follows Rabiner (1989,
Proceedings of the IEEE 77). Abercrombie and Friedl (2016, IEEE TGRS 54) smooth land-cover maps in
this way. With two states, odds r = P(mine) / P(not mine) suffice: one number per pixel and year.
With a_ij the probability to go from state i to j:

    forward    f_t = l_t (a_01 + a_11 f_(t-1)) / (a_00 + a_10 f_(t-1))
    backward   b_t = (a_10 + a_11 l_(t+1) b_(t+1)) / (a_00 + a_01 l_(t+1) b_(t+1))
    posterior  odds f_t b_t, with b_t = 1 in the last year

l_t = (p / (1 - p) / (prior / (1 - prior))) ^ temper is the evidence of a year's probability p for a
mine. A network's p is a posterior under the mine share of its training, so the odds of this prior
are divided out. Its errors come again year after year. Ten years hold less evidence than ten
independent ones, hence temper < 1. A value of 255 has no evidence: l_t = 1.

Odds keep their relative precision at both ends. Probabilities of 32 bits round to 1 there. A stored
0 counts as 1/500, half a step, and 250 as 499/500. With rates not below `MIN_RATE`, odds stay in
1e-20 .. 1e20, far within float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import xarray as xr

from minecube.arrays import AnyArray, Float32, UInt8
from minecube.codes import FULL, UNKNOWN
from minecube.errors import LabelError

MIN_RATE = 1e-6
MAX_RATE = 0.5
"""Bounds of the rates. A rate of 0 would make a state final and its odds unbounded."""
MIN_SHARE = 1e-4
MIN_PRIOR = 0.01
"""Lower bounds of initial share and prior; the upper ones are as far from 1. Under a prior near
1/500, a stored 0 would be no evidence, since it counts as 1/500."""
TEMPER = 0.75
"""Within 0.004 of the best CA-TIoU for errors independent or half lasting, and for overconfident
maps or not: `benchmarks/tracks.py`."""
_BLOCK_PX = 1 << 14  # 0.7 MB of odds and evidence for ten years, within a core's cache


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Rates of opening and closing, and the weight of stored probabilities."""

    opening: float
    """Probability per year of ground outside mines to become a mine."""
    closing: float
    """Probability per year of a mine to close."""
    initial: float
    """Probability of a mine in the first year, before any evidence."""
    prior: float
    """Mine share assumed by the probabilities as posteriors; it is divided out."""
    temper: float = TEMPER
    """Power of each year's evidence, in (0, 1]: 1 for errors independent between years."""

    def __post_init__(self) -> None:
        for name in ("opening", "closing"):
            if not MIN_RATE <= getattr(self, name) <= MAX_RATE:
                raise LabelError(
                    f"rate {name} is {getattr(self, name)}; expected a chance per year between "
                    f"{MIN_RATE} and {MAX_RATE}: with less no evidence could change a pixel any "
                    "more, with more it would change back and forth"
                )
        for name, minimum in (("initial", MIN_SHARE), ("prior", MIN_PRIOR)):
            if not minimum <= getattr(self, name) <= 1 - minimum:
                raise LabelError(
                    f"{name} is {getattr(self, name)}; expected a share of mine pixels between "
                    f"{minimum} and {1 - minimum}: beyond these no year could speak against it, "
                    "or a stored 0, anything below 1/500, would speak for a mine"
                )
        if not 0 < self.temper <= 1:
            raise LabelError(
                f"temper is {self.temper}; expected more than 0, which would believe no year, "
                "and at most 1"
            )

    def over(self, years: int) -> tuple[float, float, float, float]:
        """Return the transition probabilities a_00, a_01, a_10, a_11 over this number of years.

        State 0 is not mine, state 1 is mine.
        """
        rate = self.opening + self.closing
        moved_share = 1.0
        if rate < 1:
            moved_share = -math.expm1(years * math.log1p(-rate))
        opened = self.opening / rate * moved_share
        closed = self.closing / rate * moved_share
        return 1 - opened, opened, closed, 1 - closed


def evidence(rates: Rates) -> Float32:
    """Tabulate the likelihood ratio mine : not mine of each stored value, float32 [256].

    It is 1 for 255, and NaN for the invalid values 251..254.
    """
    share = np.clip(np.arange(FULL + 1) / FULL, 0.5 / FULL, 1 - 0.5 / FULL)
    table = np.full(256, np.nan)
    table[: FULL + 1] = (share / (1 - share) / (rates.prior / (1 - rates.prior))) ** rates.temper
    table[UNKNOWN] = 1
    return table.astype(np.float32)


def smooth(probability: xr.DataArray, rates: Rates) -> xr.DataArray:
    """Compute the posterior mine probability of each year given all years.

    The result is uint8 (year, y, x) x 250, 255 if no year is known. Unknown years (255) of a pixel
    are filled from its other years. Pixels are independent, so blocks give the same as the whole.

    The input is (year, y, x) uint8 x 250, 255 = unknown; years ascending, gaps allowed.

    Raises:
        LabelError: Dimensions or dtype are wrong, years do not ascend, or values are 251..254.
    """
    years = checked_years(probability)
    values = np.ascontiguousarray(probability.to_numpy())
    smoothed = compute_posterior(values.reshape(len(years), -1), years, rates)
    return (
        probability.copy(data=smoothed.reshape(values.shape))
        .drop_attrs(deep=False)
        .rename("probability")
        .assign_attrs(long_name="mine probability x 250, smoothed through time", nodata=UNKNOWN)
    )


def checked_years(probability: xr.DataArray) -> list[int]:
    """Return the years of a probability or footprint (year, y, x); raise LabelError for others."""
    years: list[int] = []
    if "year" in probability.coords:
        years = probability["year"].to_numpy().astype(int).tolist()
    is_stored = probability.dims == ("year", "y", "x") and probability.dtype == np.uint8
    if not is_stored or not years or years != sorted(set(years)):
        raise LabelError(
            f"expected (year, y, x) in uint8 with ascending years, a probability x {FULL} or a "
            f"footprint; found {dict(probability.sizes)} in {probability.dtype} with years "
            f"{years}: steps through time would be of other years"
        )
    return years


def check_stored(values: AnyArray) -> None:
    """Raise LabelError if a value is no stored probability."""
    if ((values > FULL) & (values < UNKNOWN)).any():
        raise LabelError(
            f"the probability holds values of {FULL + 1}..254; expected 0..{FULL} (x {FULL}), or "
            f"{UNKNOWN} for unknown: scaled otherwise, say by 255, every year would be "
            f"read as another probability; store it x {FULL}"
        )


def compute_posterior(values: UInt8, years: Sequence[int], rates: Rates) -> UInt8:
    """Run forward-backward on stored probabilities (year, pixel), block by block.

    Returns the stored posteriors, 255 if no year is known.

    Raises:
        LabelError: Values are 251..254.
    """
    table = evidence(rates)
    smoothed = np.empty_like(values)
    for start in range(0, values.shape[1], _BLOCK_PX):
        block = values[:, start : start + _BLOCK_PX]
        check_stored(block)
        odds = _posterior_odds(table[block], years, rates)
        # R / (1 + R) would be inf / inf if R overflows; 1 / (1 + R) is right at both ends.
        stored = np.rint(FULL - FULL / (odds + 1)).astype(np.uint8)
        stored[:, (block == UNKNOWN).all(axis=0)] = UNKNOWN
        smoothed[:, start : start + _BLOCK_PX] = stored
    return smoothed


def _posterior_odds(likely: Float32, years: Sequence[int], rates: Rates) -> Float32:
    """Compute the odds of a mine given all years from likelihood ratios (year, pixel)."""
    transitions = [
        tuple(np.float32(a) for a in rates.over(end - start)) for start, end in pairwise(years)
    ]
    odds = np.empty_like(likely)
    np.multiply(likely[0], np.float32(rates.initial / (1 - rates.initial)), out=odds[0])
    for t, (a00, a01, a10, a11) in enumerate(transitions):
        forward = (odds[t] * a11 + a01) / (odds[t] * a10 + a00)
        np.multiply(likely[t + 1], forward, out=odds[t + 1])
    backward = np.ones_like(odds[0])
    for t in range(len(transitions) - 1, -1, -1):
        a00, a01, a10, a11 = transitions[t]
        later = likely[t + 1] * backward
        backward = (later * a11 + a10) / (later * a01 + a00)
        odds[t] *= backward
    return odds
