"""Where windows lie over a site, and how their logits become one map.

Windows overlap by half and begin a quarter beyond the site, which is mirrored there, so that no pixel is judged at a window's
rim only. Their logits, not their labels, are blended by weights that fall to zero at the windows' edges: a squared sine, of
which neighbours add up to one. Sums are kept in integers, which add up to the same in any order.

Rows of windows follow each other downwards. Once a row is in, no later one touches the upper half of it: those rows of pixels
are finished, and only the lower half is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minecube.compiled import compiled

SCALE = 250
"""Stored probability of one; the integers above it are free for `NODATA`."""
NODATA = 255
"""Stored probability where nothing is known."""
_LOGIT_STEPS = 2**20  # per unit of logit; a float32 logit near 8 has no finer steps
_LOGIT_LIMIT = 30.0  # beyond it the stored probability no longer moves, and the sums stay far from overflow (2 ** 45)
_LIMIT, _STEPS = np.float32(_LOGIT_LIMIT), np.float32(_LOGIT_STEPS)
_WEIGHT_STEPS = 2**10  # per unit of blending weight, in y and in x


@dataclass(frozen=True)
class Layout:
    """Windows of one size over a site; positions are those of the mirrored image, which begins `beyond` pixels earlier."""

    height: int
    width: int
    window_px: int

    @property
    def step(self) -> int:
        """From one window to the next."""
        return self.window_px // 2

    @property
    def beyond(self) -> int:
        """Pixels that are mirrored before the first row and column."""
        return self.window_px // 4

    @cached_property
    def rows(self) -> NDArray[np.intp]:
        """Row of the site that stands in each row of the mirrored image."""
        return self._mirrored(self.height)

    @cached_property
    def columns(self) -> NDArray[np.intp]:
        """Likewise."""
        return self._mirrored(self.width)

    @cached_property
    def tops(self) -> range:
        """Where rows of windows begin."""
        return range(0, len(self.rows) - self.window_px + 1, self.step)

    @cached_property
    def lefts(self) -> range:
        """Where columns of windows begin."""
        return range(0, len(self.columns) - self.window_px + 1, self.step)

    @cached_property
    def ramp(self) -> NDArray[np.int64]:
        """Weight along one side of a window."""
        turn = np.pi * (np.arange(self.window_px) + 0.5) / self.window_px
        weights: NDArray[np.int64] = np.rint(np.sin(turn) ** 2 * _WEIGHT_STEPS).astype(np.int64)
        return weights

    def finished(self, top: int) -> tuple[slice, slice]:
        """Rows that are whole once the windows at `top` are in: of the site, and among the windows' own rows."""
        whole = self.window_px if top == self.tops[-1] else self.step
        first, last = (min(max(top + n - self.beyond, 0), self.height) for n in (0, whole))
        return slice(first, last), slice(first + self.beyond - top, last + self.beyond - top)

    def _mirrored(self, size: int) -> NDArray[np.intp]:
        more = max(-(-(size + 2 * self.beyond - self.window_px) // self.step), 0) * self.step
        pad = (self.beyond, self.window_px + more - size - self.beyond)
        mirrored: NDArray[np.intp] = np.pad(np.arange(size), pad, mode="reflect")
        return mirrored


class Blend:
    """The rows of one map, one row of windows after the other, downwards; on the device where the logits are."""

    def __init__(self, layout: Layout, place: torch.device) -> None:
        self._layout, self._total = layout, torch.zeros((), dtype=torch.int64)
        self._ramp = torch.from_numpy(layout.ramp).to(place)
        # Without regard to windows that were left out: they had no observed pixel, so these weights are not asked for there.
        self._weights = [torch.from_numpy(_sums(layout.ramp, at)).to(place) for at in (layout.tops, layout.lefts)]
        # Compared with rather than computed by exp, of which the last bit may depend on where in an array a value stands.
        steps = (np.arange(SCALE) + 0.5) / SCALE
        self._limits = torch.from_numpy(np.log(steps / (1 - steps))).to(place)

    def down(self, top: int, row: Tensor) -> Tensor:
        """Add a row of windows, int64 [time, class, window, columns], which is not kept; the rows `finished` by it, uint8
        [time, class, row, x], x `SCALE`."""
        step, own = self._layout.step, self._layout.finished(top)[1]
        inside = slice(self._layout.beyond, self._layout.beyond + self._layout.width)
        down, across = self._weights
        weight = (down[top + own.start : top + own.stop, None] * across[inside] * _LOGIT_STEPS).to(torch.float64)
        before, at = self._total if top else row[..., :0, :], (own.start, inside.start)
        if row.is_cuda:
            levels = blended(row, before, self._ramp, weight, self._limits, at)
        else:
            sums, earlier, ramp, divisor, limits = (t.numpy() for t in (row, before, self._ramp, weight, self._limits))
            levels = torch.from_numpy(blended_on_cpu(sums, earlier, ramp, divisor, limits, at))
        self._total = row[..., step:, :].contiguous()
        return levels


def across(row: Tensor, left: int, weighted: Tensor) -> None:
    """Add one window [..., window, window], as `weighted` has it, to its row, int64 [..., window, columns]."""
    row[..., left : left + weighted.shape[-1]] += weighted


@compiled
def summed(
    logits: NDArray[np.float32],
    lefts: NDArray[np.intp],
    ramp: NDArray[np.int64],
    total: NDArray[np.int64],
    finite: NDArray[np.bool_],
) -> None:
    """Add windows [window, time, class, row, x] to their row [time, class, row, column]: `weighted` and `across`, in one pass.

    `finite` says of each window whether all its logits are numbers.
    """
    count, times, classes, rows, side = logits.shape
    for n in range(count):
        wrong = False
        for t in range(times):
            for c in range(classes):
                for y in range(rows):
                    given, row = logits[n, t, c, y], total[t, c, y, lefts[n] : lefts[n] + side]
                    for x in range(side):
                        logit = min(max(given[x], -_LIMIT), _LIMIT)
                        row[x] += np.int64(np.rint(logit * _STEPS)) * ramp[x]
                        wrong |= not np.isfinite(given[x])
        finite[n] = not wrong


def blended(row: Tensor, before: Tensor, ramp: Tensor, weight: Tensor, limits: Tensor, at: tuple[int, int]) -> Tensor:
    """Have a row of windows become sums, with those of the row `before` in its first rows; and what these are from row and
    column `at` on, as numbers of limits that lie below, once they are divided by their weight [row, column]."""
    row.mul_(ramp[:, None])
    row[..., : before.shape[-2], :] += before
    (y, x), (height, width) = at, weight.shape
    return torch.bucketize(row[..., y : y + height, x : x + width] / weight, limits).to(torch.uint8)


@compiled
def blended_on_cpu(
    row: NDArray[np.int64],
    before: NDArray[np.int64],
    ramp: NDArray[np.int64],
    weight: NDArray[np.float64],
    limits: NDArray[np.float64],
    at: tuple[int, int],
) -> NDArray[np.uint8]:
    """`blended`, in one pass."""
    times, classes, rows, columns = row.shape
    height, width = weight.shape
    levels = np.empty((times, classes, height, width), np.uint8)
    for t in range(times):
        for c in range(classes):
            for y in range(rows):
                sums = row[t, c, y]
                for x in range(columns):
                    sums[x] *= ramp[y]
                if y < before.shape[2]:
                    earlier = before[t, c, y]
                    for x in range(columns):
                        sums[x] += earlier[x]
            for y in range(height):
                sums, found = row[t, c, at[0] + y, at[1] : at[1] + width], levels[t, c, y]
                for x in range(width):
                    found[x] = np.searchsorted(limits, sums[x] / weight[y, x])
    return levels


def weighted(logits: Tensor, ramp: Tensor) -> Tensor:
    """Logits float32 [..., window] as the integers that are added up, by their weight along x."""
    # Exact in float32: a power of two, and beyond 2 ** 24 of these steps there is nothing to be rounded.
    steps = logits.clamp(-_LOGIT_LIMIT, _LOGIT_LIMIT).mul_(_LOGIT_STEPS).round_()
    return steps.to(torch.int64).mul_(ramp)


def _sums(ramp: NDArray[np.int64], starts: range) -> NDArray[np.int64]:
    total = np.zeros(starts[-1] + len(ramp), np.int64)
    for start in starts:
        total[start : start + len(ramp)] += ramp
    return total
