"""Yearly probabilities smoothed through time, pixel by pixel: changes that go back must be worth more than one that lasts.

A story says of each year whether the ground is a mine. Its score is the sum of the log-odds log(p / (1 - p)) of its mine years,
plus log(again) for each of its changes after the first. A year's odds are then those of the best story in which the ground is
a mine that year over the best in which it is not:

    log-odds_t = max over stories with a mine in t  -  max over stories without one in t

Cut at one half this is the best story of all. It is a hidden Markov model of four states, mine or not and changed before or
not, solved by Viterbi's recursion run forward and backward (max-marginals; Rabiner 1989, Proceedings of the IEEE 77, section
III B, has the forward half; for hidden Markov models over land-cover maps see Abercrombie and Friedl 2016, IEEE TGRS 54).

Why the first change is free: a network has learned from millions of pixels how rare mines are and where they grow, and its
errors come again year after year. If rare changes were charged for once more, as a chain of rates learned from all pixels does,
each mine would open too late in the last years and too early in the first; if its mine share were divided out, pixels that
every year maps as no mine would become mines. So a series that changes once, or never, keeps its footprint exactly, and only
what goes back is questioned: blips, dips, flicker along edges. The charge `again` is learned (`learning`).

The price: in the first year and in the last no other year tells a blip from a change, so blips of these years stay.

255 says nothing: log-odds 0, so a year left out is to the result a year of which nothing is known. Before a pixel's first known
year and after its last, the nearest known year's probability stands.

A stored 0 is taken for 1/500, half a step, and 250 for 499/500. Log-odds are whole numbers of 2^-14, added and compared: the
result does not depend on the machine.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from minecube.errors import LabelError
from minecube.tracks.areas import HALF, UNKNOWN

SCALE = 250
LEAST = 1e-4
"""Least `again`: with 0 no evidence could show that a mine was reclaimed which had opened in the years that are mapped."""
UNIT = 1 << 14
"""Log-odds of 1 as they are counted."""
FAR = round(UNIT * math.log(2 * SCALE - 1))
"""Log-odds of 499/500, from which a probability is stored as 250, and less them as 0."""
NEVER = -(1 << 28)
"""Score of what cannot be: below any story of a thousand years, and far from the ends of int32."""
_BLOCK_PX = 1 << 13  # with ten years 1.3 MB of scores: they stay in a core's cache
UInt8 = NDArray[np.uint8]
Int32 = NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What is believed of ground that changes more than once."""

    again: float
    """Odds that a change back, mine to none or none to mine, is one, where the yearly maps show it; in [`LEAST`, 1]."""

    def __post_init__(self) -> None:
        if not LEAST <= self.again <= 1:
            raise LabelError(
                f"again is {self.again}; expected odds between {LEAST} and 1: with less no evidence could show a change back, "
                "with more changes would be added that no year shows"
            )

    @property
    def charge(self) -> int:
        """log(again) in units of 2^-14, at most 0."""
        return round(UNIT * math.log(self.again))


Kernel = Callable[[UInt8, Rates], UInt8]
"""Stored probabilities (year, pixel), 255 = none, and rates -> stored probabilities given all years, likewise, none unknown."""


def log_odds() -> Int32:
    """Of each stored value, in 2^-14: int32 [256]; 0 for 255."""
    share = np.clip(np.arange(SCALE + 1) / SCALE, 0.5 / SCALE, 1 - 0.5 / SCALE)
    table = np.zeros(256, np.int32)
    table[: SCALE + 1] = np.rint(UNIT * np.log(share / (1 - share)))
    return table


def stored() -> UInt8:
    """Probability x 250 of log-odds -`FAR` .. `FAR`: uint8; below one half wherever the log-odds are negative."""
    odds = np.arange(-FAR, FAR + 1)
    table = np.rint(SCALE / (1 + np.exp(-odds / UNIT)))
    table[[0, -1]] = 0, SCALE
    return np.where(odds < 0, np.minimum(table, HALF - 1), table).astype(np.uint8)


def smooth(probability: xr.DataArray, rates: Rates, kernel: Kernel | None = None) -> xr.DataArray:
    """Mine probability of each year given all years: uint8 (year, y, x) x 250, 255 where no year is known.

    It is that of the best story with a mine in that year against the best without; where it is 125 or more the best story of
    all has a mine (of equally good ones, the one with more mines). A year in which a pixel is unknown (255) is filled from the
    others. Pixels do not see each other, so blocks give what the whole gives.

    Args:
        probability: (year, y, x) uint8 x 250, 255 = none; years ascending, not necessarily without gaps.
        rates: Given, or learned (`learn_rates`).
        kernel: `best_stories`, or its twin on a GPU.

    Raises:
        LabelError: other dimensions or dtype, years that do not ascend, values 251..254.
    """
    years = checked_years(probability)
    values = np.ascontiguousarray(probability.to_numpy()).reshape(len(years), -1)
    need_stored(values)
    found = (kernel or best_stories)(values, rates)
    _carry(values, found)
    return (
        probability.copy(data=found.reshape(probability.shape))
        .drop_attrs(deep=False)
        .rename("probability")
        .assign_attrs(long_name="mine probability x 250, smoothed through time", nodata=int(UNKNOWN))
    )


def _carry(values: UInt8, found: UInt8) -> None:
    """Before a pixel's first known year and after its last, in place, the nearest known year's; 255 where none is known."""
    known = values != UNKNOWN
    some = np.flatnonzero(~known.all(axis=0))
    own, known = found[:, some], known[:, some]
    year = np.arange(len(values))[:, None]
    first, last = known.argmax(axis=0), len(values) - 1 - known[::-1].argmax(axis=0)
    own = np.take_along_axis(own, np.clip(year, first, last), axis=0)
    found[:, some] = np.where(known.any(axis=0), own, UNKNOWN)


def checked_years(probability: xr.DataArray) -> list[int]:
    """The years of a stored probability or footprint (year, y, x); raises LabelError where it is none."""
    years = [int(y) for y in probability["year"].to_numpy()] if "year" in probability.coords else []
    if probability.dims != ("year", "y", "x") or probability.dtype != np.uint8 or not years or years != sorted(set(years)):
        raise LabelError(
            f"expected (year, y, x) in uint8 with ascending years, a probability x {SCALE} or a footprint; found "
            f"{dict(probability.sizes)} in {probability.dtype} with years {years}: steps through time would be of other years"
        )
    return years


def need_stored(values: UInt8) -> None:
    """Raises LabelError where a value stands for no probability."""
    if ((values > SCALE) & (values < UNKNOWN)).any():
        raise LabelError(
            f"the probability holds values of {SCALE + 1}..254; expected 0..{SCALE} (x {SCALE}), or {UNKNOWN} where there is "
            f"none: scaled otherwise, say by 255, every year would be read as another probability; store it x {SCALE}"
        )


def best_stories(values: UInt8, rates: Rates) -> UInt8:
    """A `Kernel`: blocks of pixels on all cores."""
    table, back, charge = log_odds(), stored(), np.int32(rates.charge)
    out = np.empty_like(values)

    def work(at: int) -> None:
        block = slice(at, at + _BLOCK_PX)
        out[:, block] = back[_max_marginals(table[values[:, block]], charge)]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(work, range(0, values.shape[1], _BLOCK_PX)):
            pass
    return out


def _max_marginals(odds: Int32, charge: np.int32) -> Int32:
    """Log-odds (year, pixel) of each year alone -> places in `stored` of those given all years.

    Best scores of stories up to each year: `always` a mine, now `out` or `mine` after a change; never a mine scores 0.
    """
    always = np.cumsum(odds, axis=0, dtype=np.int32)
    out, mine = np.full_like(odds, NEVER), np.full_like(odds, NEVER)
    for t in range(1, len(odds)):
        np.maximum(out[t - 1], np.maximum(always[t - 1], mine[t - 1] + charge), out=out[t])
        np.maximum(mine[t - 1], np.maximum(out[t - 1] + charge, 0), out=mine[t])
        mine[t] += odds[t]
    # The same of the years to come, by what was before: never or always a mine, or changed and now out or a mine.
    never_on, always_on, out_on, mine_on = np.zeros((4, odds.shape[1]), np.int32)
    for t in range(len(odds) - 1, -1, -1):
        yes = np.maximum(always[t] + always_on, mine[t] + mine_on)
        no = np.maximum(never_on, out[t] + out_on)
        opened, open_still = odds[t] + mine_on, odds[t] + always_on
        never_on, always_on = np.maximum(never_on, opened), np.maximum(open_still, out_on)
        out_on, mine_on = np.maximum(out_on, opened + charge), np.maximum(opened, out_on + charge)
        yes -= no
        np.clip(yes, -FAR, FAR, out=always[t])
    always += FAR
    return always
