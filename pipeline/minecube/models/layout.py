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
from torch import Tensor

from minecube.arrays import Int64, IntP
from minecube.codes import FULL

_LOGIT_STEPS = 2**20  # per unit of logit; float32 logits near 8 have no finer steps
_LOGIT_LIMIT = 30.0  # constant stored probability beyond; sums far from overflow (2 ** 45)
_WEIGHT_STEPS = 2**10  # per unit of blending weight, in y and in x


@dataclass(frozen=True)
class Layout:
    """Windows of one size over a site.

    Positions are those of the mirrored image, starting `margin` pixels before the site.
    """

    height: int
    width: int
    window_px: int

    @property
    def step(self) -> int:
        """Pixels from one window to the next."""
        return self.window_px // 2

    @property
    def margin(self) -> int:
        """Mirrored pixels before the first row and column."""
        return self.window_px // 4

    @property
    def inside(self) -> slice:
        """Columns of the mirrored image inside the site."""
        return slice(self.margin, self.margin + self.width)

    @cached_property
    def rows(self) -> IntP:
        """Row of the site in each row of the mirrored image."""
        return self._mirror(self.height)

    @cached_property
    def columns(self) -> IntP:
        """Column of the site in each column of the mirrored image."""
        return self._mirror(self.width)

    @cached_property
    def tops(self) -> range:
        """First row of each row of windows."""
        return range(0, len(self.rows) - self.window_px + 1, self.step)

    @cached_property
    def lefts(self) -> range:
        """First column of each column of windows."""
        return range(0, len(self.columns) - self.window_px + 1, self.step)

    @cached_property
    def ramp(self) -> Int64:
        """Weights along one side of a window."""
        turn = np.pi * (np.arange(self.window_px) + 0.5) / self.window_px
        weights: Int64 = np.rint(np.sin(turn) ** 2 * _WEIGHT_STEPS).astype(np.int64)
        return weights

    def finished_rows(self, top: int) -> tuple[slice, slice]:
        """Return the rows finished once the windows at `top` are added.

        The first slice counts in the site, the second in the windows' own rows.
        """
        height = self.window_px if top == self.tops[-1] else self.step
        start = self._row_of_site(top)
        stop = self._row_of_site(top + height)
        shift = self.margin - top
        return slice(start, stop), slice(start + shift, stop + shift)

    def _row_of_site(self, row: int) -> int:
        return min(max(row - self.margin, 0), self.height)

    def _mirror(self, size: int) -> IntP:
        steps = max(-(-(size + 2 * self.margin - self.window_px) // self.step), 0)
        pad_after = self.window_px + steps * self.step - size - self.margin
        return np.pad(np.arange(size), (self.margin, pad_after), mode="reflect")


class Blend:
    """Rows of one map from rows of windows, downwards, on the device of the logits."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self._layout = layout
        self._overlap = torch.zeros((), dtype=torch.int64)
        self._ramp = torch.from_numpy(layout.ramp).to(device)
        # These include skipped windows: all pixels of a skipped window are unknown anyway.
        self._weights = [
            torch.from_numpy(_sum_ramps(layout.ramp, starts)).to(device)
            for starts in (layout.tops, layout.lefts)
        ]
        # Limits replace exp: its last bit may depend on the position of a value in the array.
        steps = (np.arange(FULL) + 0.5) / FULL
        self._limits = torch.from_numpy(np.log(steps / (1 - steps))).to(device)

    def down(self, top: int, row: Tensor) -> Tensor:
        """Add a row of windows and return the rows finished by it (`Layout.finished_rows`).

        `row` is int64 [time, class, window, columns] and is overwritten. The result is uint8 [time,
        class, row, x], probability x FULL.
        """
        rows = self._layout.finished_rows(top)[1]
        columns = self._layout.inside
        down, right = self._weights
        weight = (
            down[top + rows.start : top + rows.stop, None] * right[columns] * _LOGIT_STEPS
        ).to(torch.float64)
        overlap = self._overlap if top else row[..., :0, :]
        start = (rows.start, columns.start)
        levels = blend_rows(row, overlap, self._ramp, weight, self._limits, start)
        self._overlap = row[..., self._layout.step :, :].contiguous()
        return levels


def add_window(row: Tensor, column: int, window: Tensor) -> None:
    """Add one window [..., window, window] from `weight_logits` to its row, in place.

    The row is int64 [..., window, columns].
    """
    row[..., column : column + window.shape[-1]] += window


def blend_rows(
    row: Tensor,
    overlap: Tensor,
    ramp: Tensor,
    weight: Tensor,
    limits: Tensor,
    start: tuple[int, int],
) -> Tensor:
    """Blend a row of windows with the overlap of the row above, and return uint8 levels.

    `row` is weighted by `ramp` in place, and `overlap` is added to its first rows. A level is the
    number of `limits` below the sum divided by its weight [row, column]. Levels start at row and
    column `start`.
    """
    row.mul_(ramp[:, None])
    row[..., : overlap.shape[-2], :] += overlap
    y, x = start
    height, width = weight.shape
    return torch.bucketize(row[..., y : y + height, x : x + width] / weight, limits).to(torch.uint8)


def weight_logits(logits: Tensor, ramp: Tensor) -> Tensor:
    """Convert logits float32 [..., window] to integers weighted along x."""
    # Exact in float32: the factor is a power of two, and values beyond 2 ** 24 steps are whole.
    steps = logits.clamp(-_LOGIT_LIMIT, _LOGIT_LIMIT).mul_(_LOGIT_STEPS).round_()
    return steps.to(torch.int64).mul_(ramp)


def are_finite(logits: Tensor) -> Tensor:
    """Report per window [n, ...] whether all logits are finite (a sum propagates NaN and inf)."""
    return logits.flatten(1).sum(dim=1, dtype=torch.float64).isfinite()


def _sum_ramps(ramp: Int64, starts: range) -> Int64:
    total = np.zeros(starts[-1] + len(ramp), np.int64)
    for start in starts:
        total[start : start + len(ramp)] += ramp
    return total
