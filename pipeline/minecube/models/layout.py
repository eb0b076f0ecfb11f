"""Place windows over a site and blend their logits into one map.

Windows overlap by half and begin a quarter beyond the site. The site is mirrored there, so no pixel
lies only at the rim of windows. Logits, not labels, are blended by weights falling to zero at the
windows' edges. The weights are squared sines. Those of neighbours add up to one. Integer sums are
the same in any order.

Rows of windows follow each other downwards. Later rows never touch the upper half of a row. Those
rows of pixels are finished, and only the lower half is kept.
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
"""Stored probability of unknown pixels."""
_LOGIT_STEPS = 2**20  # per unit of logit; float32 logits near 8 have no finer steps
_LOGIT_LIMIT = 30.0  # constant stored probability beyond; sums far from overflow (2 ** 45)
_LIMIT, _STEPS = np.float32(_LOGIT_LIMIT), np.float32(_LOGIT_STEPS)
_WEIGHT_STEPS = 2**10  # per unit of blending weight, in y and in x


@dataclass(frozen=True)
class Layout:
    """Windows of one size over a site.

    Positions are those of the mirrored image, starting `beyond` pixels before the site.
    """

    height: int
    width: int
    window_px: int

    @property
    def step(self) -> int:
        """Pixels from one window to the next."""
        return self.window_px // 2

    @property
    def beyond(self) -> int:
        """Mirrored pixels before the first row and column."""
        return self.window_px // 4

    @cached_property
    def rows(self) -> NDArray[np.intp]:
        """Row of the site in each row of the mirrored image."""
        return self._mirrored(self.height)

    @cached_property
    def columns(self) -> NDArray[np.intp]:
        """Column of the site in each column of the mirrored image."""
        return self._mirrored(self.width)

    @cached_property
    def tops(self) -> range:
        """First row of each row of windows."""
        return range(0, len(self.rows) - self.window_px + 1, self.step)

    @cached_property
    def lefts(self) -> range:
        """First column of each column of windows."""
        return range(0, len(self.columns) - self.window_px + 1, self.step)

    @cached_property
    def ramp(self) -> NDArray[np.int64]:
        """Weights along one side of a window."""
        turn = np.pi * (np.arange(self.window_px) + 0.5) / self.window_px
        weights: NDArray[np.int64] = np.rint(np.sin(turn) ** 2 * _WEIGHT_STEPS).astype(np.int64)
        return weights

    def finished(self, top: int) -> tuple[slice, slice]:
        """Return the rows finished once the windows at `top` are added.

        The first slice counts in the site, the second in the windows' own rows.
        """
        whole = self.window_px if top == self.tops[-1] else self.step
        first, last = (min(max(top + n - self.beyond, 0), self.height) for n in (0, whole))
        return slice(first, last), slice(first + self.beyond - top, last + self.beyond - top)

    def _mirrored(self, size: int) -> NDArray[np.intp]:
        more = max(-(-(size + 2 * self.beyond - self.window_px) // self.step), 0) * self.step
        pad = (self.beyond, self.window_px + more - size - self.beyond)
        mirrored: NDArray[np.intp] = np.pad(np.arange(size), pad, mode="reflect")
        return mirrored


class Blend:
    """Rows of one map from rows of windows, downwards, on the device of the logits."""

    def __init__(self, layout: Layout, place: torch.device) -> None:
        self._layout, self._total = layout, torch.zeros((), dtype=torch.int64)
        self._ramp = torch.from_numpy(layout.ramp).to(place)
        # These include skipped windows: all pixels of a skipped window are NODATA anyway.
        self._weights = [
            torch.from_numpy(_sums(layout.ramp, at)).to(place) for at in (layout.tops, layout.lefts)
        ]
        # Limits replace exp: its last bit may depend on the position of a value in the array.
        steps = (np.arange(SCALE) + 0.5) / SCALE
        self._limits = torch.from_numpy(np.log(steps / (1 - steps))).to(place)

    def down(self, top: int, row: Tensor) -> Tensor:
        """Add a row of windows and return the rows `finished` by it.

        `row` is int64 [time, class, window, columns] and is overwritten. The result is uint8 [time,
        class, row, x], x `SCALE`.
        """
        step, own = self._layout.step, self._layout.finished(top)[1]
        inside = slice(self._layout.beyond, self._layout.beyond + self._layout.width)
        down, across = self._weights
        weight = (down[top + own.start : top + own.stop, None] * across[inside] * _LOGIT_STEPS).to(
            torch.float64
        )
        before, at = self._total if top else row[..., :0, :], (own.start, inside.start)
        if row.is_cuda:
            levels = blended(row, before, self._ramp, weight, self._limits, at)
        else:
            sums, earlier, ramp, divisor, limits = (
                t.numpy() for t in (row, before, self._ramp, weight, self._limits)
            )
            levels = torch.from_numpy(blended_on_cpu(sums, earlier, ramp, divisor, limits, at))
        self._total = row[..., step:, :].contiguous()
        return levels


def across(row: Tensor, left: int, weighted: Tensor) -> None:
    """Add one window [..., window, window] of `weighted` to its row, in place.

    The row is int64 [..., window, columns].
    """
    row[..., left : left + weighted.shape[-1]] += weighted


@compiled
def summed(
    logits: NDArray[np.float32],
    lefts: NDArray[np.intp],
    ramp: NDArray[np.int64],
    total: NDArray[np.int64],
    finite: NDArray[np.bool_],
) -> None:
    """Weight windows and add them to their row: `weighted` and `across` in one pass.

    Windows are [window, time, class, row, x], the row [time, class, row, column]. `finite` marks
    the windows with only finite logits.
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


def blended(
    row: Tensor, before: Tensor, ramp: Tensor, weight: Tensor, limits: Tensor, at: tuple[int, int]
) -> Tensor:
    """Blend a row of windows with the overlap of the row above, and return uint8 levels.

    `row` is weighted by `ramp` in place, and `before` is added to its first rows. A level is the
    number of `limits` below the sum divided by its weight [row, column]. Levels start at row and
    column `at`.
    """
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
    """Compute `blended` in one pass."""
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
    """Convert logits float32 [..., window] to integers weighted along x."""
    # Exact in float32: the factor is a power of two, and values beyond 2 ** 24 steps are whole.
    steps = logits.clamp(-_LOGIT_LIMIT, _LOGIT_LIMIT).mul_(_LOGIT_STEPS).round_()
    return steps.to(torch.int64).mul_(ramp)


def _sums(ramp: NDArray[np.int64], starts: range) -> NDArray[np.int64]:
    total = np.zeros(starts[-1] + len(ramp), np.int64)
    for start in starts:
        total[start : start + len(ramp)] += ramp
    return total
