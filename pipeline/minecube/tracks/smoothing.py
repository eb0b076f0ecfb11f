"""Smooth yearly probabilities pixel by pixel, by a hidden Markov model of two states.

Ground is a mine or not. From one year to the next it opens with one probability and closes with
another. Over a gap of g years, the matrix of these is taken to the power g. For the posterior, a
missing year thus equals a year without evidence. Forward-backward and Viterbi follow Rabiner (1989,
Proceedings of the IEEE 77). Abercrombie and Friedl (2016, IEEE TGRS 54) smooth land-cover maps in
this way. With two states, odds r = P(mine) / P(not mine) suffice: one number per pixel and year.
With a_ij the probability to go from state i to j:

    forward    f_t = l_t (a_01 + a_11 f_(t-1)) / (a_00 + a_10 f_(t-1))
    backward   b_t = (a_10 + a_11 l_(t+1) b_(t+1)) / (a_00 + a_01 l_(t+1) b_(t+1)),  1 in the last year
    posterior  odds f_t b_t
    Viterbi    the same forward, with the larger term in place of each sum

l_t = (p / (1 - p) / (prior / (1 - prior))) ^ temper is the evidence of a year's probability p for a
mine. A network's p is a posterior under the mine share of its training, so the odds of this prior
are divided out. Its errors come again year after year. Ten years hold less evidence than ten
independent ones, hence temper < 1. A value of 255 has no evidence: l_t = 1.

Odds keep their relative precision at both ends. Probabilities of 32 bits round to 1 there. A stored
0 counts as 1/500, half a step, and 250 as 499/500. With rates not below `LEAST`, odds stay in 1e-20
.. 1e20, far within float32.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from minecube.errors import LabelError
from minecube.tracks.areas import UNKNOWN

SCALE = 250
LEAST, MOST = 1e-6, 0.5
"""Bounds of the rates. A rate of 0 would make a state final and its odds unbounded."""
LEAST_SHARE, LEAST_PRIOR = 1e-4, 0.01
"""Lower bounds of initial share and prior; the upper ones are as far from 1. Under a prior near
1/500, a stored 0 would be no evidence, since it counts as 1/500."""
TEMPER = 0.75
"""Within 0.004 of the best CA-TIoU for errors independent or half lasting, and for overconfident
maps or not: `benchmarks/tracks.py`."""
_BLOCK_PX = 1 << 14  # 0.7 MB of odds and evidence for ten years, within a core's cache
UInt8 = NDArray[np.uint8]
Float32 = NDArray[np.float32]


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
            if not LEAST <= getattr(self, name) <= MOST:
                raise LabelError(
                    f"rate {name} is {getattr(self, name)}; expected a chance per year between {LEAST} and {MOST}: with less "
                    "no evidence could change a pixel any more, with more it would change back and forth"
                )
        for name, least in (("initial", LEAST_SHARE), ("prior", LEAST_PRIOR)):
            if not least <= getattr(self, name) <= 1 - least:
                raise LabelError(
                    f"{name} is {getattr(self, name)}; expected a share of mine pixels between {least} and {1 - least}: "
                    "beyond these no year could speak against it, or a stored 0, anything below 1/500, would speak for a mine"
                )
        if not 0 < self.temper <= 1:
            raise LabelError(
                f"temper is {self.temper}; expected more than 0, which would believe no year, and at most 1"
            )

    def over(self, years: int) -> tuple[float, float, float, float]:
        """Return the transition probabilities a_00, a_01, a_10, a_11 over this number of years.

        State 0 is not mine, state 1 is mine.
        """
        both = self.opening + self.closing
        moved = -math.expm1(years * math.log1p(-both)) if both < 1 else 1.0
        opened, closed = self.opening / both * moved, self.closing / both * moved
        return 1 - opened, opened, closed, 1 - closed


Kernel = Callable[[UInt8, Sequence[int], Rates], UInt8]
"""Stored probabilities (year, pixel), years and rates -> stored posteriors, or 0 / 1, of the same
shape; 255 if no year is known."""


def evidence(rates: Rates) -> Float32:
    """Tabulate the likelihood ratio mine : not mine of each stored value, float32 [256].

    It is 1 for 255, and NaN for the invalid values 251..254.
    """
    share = np.clip(np.arange(SCALE + 1) / SCALE, 0.5 / SCALE, 1 - 0.5 / SCALE)
    table = np.full(256, np.nan)
    table[: SCALE + 1] = (share / (1 - share) / (rates.prior / (1 - rates.prior))) ** rates.temper
    table[UNKNOWN] = 1
    return table.astype(np.float32)


def smooth(probability: xr.DataArray, rates: Rates, kernel: Kernel | None = None) -> xr.DataArray:
    """Compute the posterior mine probability of each year given all years.

    The result is uint8 (year, y, x) x 250, 255 if no year is known. Unknown years (255) of a pixel
    are filled from its other years. Pixels are independent, so blocks give the same as the whole.

    Args:
        probability: (year, y, x) uint8 x 250, 255 = unknown; years ascending, gaps allowed.
        rates: Given, or learned (`learn_rates`, `rates_from_labels`).
        kernel: `posterior` (default), or its twin on a GPU.

    Raises:
        LabelError: Dimensions or dtype are wrong, years do not ascend, or values are 251..254.
    """
    return (
        _applied(probability, rates, kernel or posterior)
        .rename("probability")
        .assign_attrs(
            long_name="mine probability x 250, smoothed through time", nodata=int(UNKNOWN)
        )
    )


def likeliest(
    probability: xr.DataArray, rates: Rates, kernel: Kernel | None = None
) -> xr.DataArray:
    """Compute the footprint (year, y, x) of each pixel's likeliest path through all years.

    The footprint is uint8: 1 mine, 0 not, 255 never known. The path is consistent over the years.
    The posterior cut at one half decides each year alone, and changes state slightly more often.
    Arguments and errors are those of `smooth`. `kernel` is `viterbi` or its twin.
    """
    return (
        _applied(probability, rates, kernel or viterbi)
        .rename("footprint")
        .assign_attrs(long_name="mine footprint, likeliest path through time", nodata=int(UNKNOWN))
    )


def _applied(probability: xr.DataArray, rates: Rates, kernel: Kernel) -> xr.DataArray:
    years = checked_years(probability)
    values = np.ascontiguousarray(probability.to_numpy())
    found = kernel(values.reshape(len(years), -1), years, rates)
    return probability.copy(data=found.reshape(values.shape)).drop_attrs(deep=False)


def checked_years(probability: xr.DataArray) -> list[int]:
    """Return the years of a stored probability or footprint (year, y, x).

    Raises:
        LabelError: The array is neither.
    """
    years = [int(y) for y in probability["year"].to_numpy()] if "year" in probability.coords else []
    if (
        probability.dims != ("year", "y", "x")
        or probability.dtype != np.uint8
        or not years
        or years != sorted(set(years))
    ):
        raise LabelError(
            f"expected (year, y, x) in uint8 with ascending years, a probability x {SCALE} or a footprint; found "
            f"{dict(probability.sizes)} in {probability.dtype} with years {years}: steps through time would be of other years"
        )
    return years


def posterior(values: UInt8, years: Sequence[int], rates: Rates) -> UInt8:
    """Run forward-backward in numpy, as the `Kernel` of `smooth`."""
    return _in_blocks(_posterior, values, years, rates)


def viterbi(values: UInt8, years: Sequence[int], rates: Rates) -> UInt8:
    """Run Viterbi in numpy, as the `Kernel` of `likeliest`.

    Of equally likely paths, it takes the one without a change.
    """
    return _in_blocks(_viterbi, values, years, rates)


def steps_of(years: Sequence[int], rates: Rates) -> list[tuple[np.float32, ...]]:
    """List the transition probabilities a_00, a_01, a_10, a_11 of successive years, in float32."""
    return [
        tuple(np.float32(a) for a in rates.over(after - before))
        for before, after in pairwise(years)
    ]


def initial_odds(rates: Rates) -> np.float32:
    """Return the odds of a mine in the first year, before its evidence."""
    return np.float32(rates.initial / (1 - rates.initial))


def need_stored(unfit: bool) -> None:
    """Raise LabelError if a value is no stored probability."""
    if unfit:
        raise LabelError(
            f"the probability holds values of {SCALE + 1}..254; expected 0..{SCALE} (x {SCALE}), or {UNKNOWN} where there is "
            f"none: scaled otherwise, say by 255, every year would be read as another probability; store it x {SCALE}"
        )


_Block = Callable[[UInt8, Float32, list[tuple[np.float32, ...]], np.float32], UInt8]


def _in_blocks(block: _Block, values: UInt8, years: Sequence[int], rates: Rates) -> UInt8:
    table, steps, start = evidence(rates), steps_of(years, rates), initial_odds(rates)
    out = np.empty_like(values)

    def work(at: int) -> None:
        own = values[:, at : at + _BLOCK_PX]
        need_stored(bool(((own > SCALE) & (own < UNKNOWN)).any()))
        found = block(own, table, steps, start)
        found[:, (own == UNKNOWN).all(axis=0)] = UNKNOWN
        out[:, at : at + _BLOCK_PX] = found

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(work, range(0, values.shape[1], _BLOCK_PX)):
            pass
    return out


def _posterior(
    values: UInt8, table: Float32, steps: list[tuple[np.float32, ...]], start: np.float32
) -> UInt8:
    likely = table[values]
    odds = np.empty_like(likely)
    np.multiply(likely[0], start, out=odds[0])
    for t, (a00, a01, a10, a11) in enumerate(steps, 1):
        before = odds[t - 1]
        np.multiply(likely[t], (before * a11 + a01) / (before * a10 + a00), out=odds[t])
    back = np.ones_like(odds[0])
    for t, (a00, a01, a10, a11) in zip(range(len(steps) - 1, -1, -1), reversed(steps), strict=True):
        ahead = likely[t + 1] * back
        back = (ahead * a11 + a10) / (ahead * a01 + a00)
        odds[t] *= back
    # R / (1 + R) would be inf / inf if R overflows; 1 / (1 + R) is right at both ends.
    return np.rint(SCALE - SCALE / (odds + 1)).astype(np.uint8)


def _viterbi(
    values: UInt8, table: Float32, steps: list[tuple[np.float32, ...]], start: np.float32
) -> UInt8:
    likely = table[values]
    odds = np.empty_like(likely)
    np.multiply(likely[0], start, out=odds[0])
    for t, (a00, a01, a10, a11) in enumerate(steps, 1):
        before = odds[t - 1]
        np.multiply(
            likely[t], np.maximum(before * a11, a01) / np.maximum(before * a10, a00), out=odds[t]
        )
    path = np.empty_like(values)
    state = odds[-1] >= 1
    path[-1] = state
    for t, (a00, a01, a10, a11) in zip(range(len(steps) - 1, -1, -1), reversed(steps), strict=True):
        state = np.where(state, odds[t] * a11 >= a01, odds[t] * a10 > a00)
        path[t] = state
    return path
