"""Count boundary pixels of truth and prediction, and those close to the boundary of the other.

A boundary pixel is mine, and one of its four neighbours is background. Pixels unknown in truth or
prediction are neither. Two pixels are close if their centres are at most BOUNDARY_PX apart.
"""

from __future__ import annotations

import math

import numpy as np

from minecube.arrays import Bool, Int64, UInt8
from minecube.codes import MINE, UNKNOWN

BOUNDARY_PX = 3
MARGIN_PX = BOUNDARY_PX + 1
"""Margin of context around a block needed for its boundary pixels."""
_REACH = range(-BOUNDARY_PX, BOUNDARY_PX + 1)
_DISC = sorted(
    ((y, x) for y in _REACH for x in _REACH if math.hypot(y, x) <= BOUNDARY_PX),
    key=lambda offset: math.hypot(*offset),
)
"""Offsets (y, x) of close pixels, nearest first."""


def count_boundaries(pred: UInt8, truth: UInt8, core: tuple[range, range]) -> Int64:
    """Count the core's boundary pixels (year, 4), as the last four fields of `YearCounts`.

    Arrays are (year, y, x): 1 mine, 0 not, 255 unknown. Boundaries outside the core's rows and
    columns may be close to those in it.
    """
    rows, columns = core
    framed_shape = [size + 2 * BOUNDARY_PX for size in truth.shape[1:]]
    inside = np.zeros(framed_shape, bool)
    inside[
        BOUNDARY_PX + rows.start : BOUNDARY_PX + rows.stop,
        BOUNDARY_PX + columns.start : BOUNDARY_PX + columns.stop,
    ] = True
    counts = []
    for pred_year, truth_year in zip(pred, truth, strict=True):
        predicted = np.pad(pred_year, BOUNDARY_PX, constant_values=UNKNOWN)
        labelled = np.pad(truth_year, BOUNDARY_PX, constant_values=UNKNOWN)
        valid = (predicted != UNKNOWN) & (labelled != UNKNOWN)
        pred_boundary = _find_boundary(predicted == MINE, valid)
        truth_boundary = _find_boundary(labelled == MINE, valid)
        counts.append(
            [
                *_count_close(pred_boundary & inside, truth_boundary),
                *_count_close(truth_boundary & inside, pred_boundary),
            ]
        )
    return np.array(counts, np.int64)


def _find_boundary(mine: Bool, valid: Bool) -> Bool:
    """Mark known mine pixels with a known background pixel among their four neighbours."""
    background = valid & ~mine
    next_to_background = np.zeros_like(mine)
    next_to_background[1:] |= background[:-1]
    next_to_background[:-1] |= background[1:]
    next_to_background[:, 1:] |= background[:, :-1]
    next_to_background[:, :-1] |= background[:, 1:]
    return mine & valid & next_to_background


def _count_close(boundary: Bool, target: Bool) -> tuple[int, int]:
    """Count boundary pixels, and those close to a pixel of the target.

    The outermost BOUNDARY_PX rows and columns hold neither.
    """
    targets = target.ravel()
    pixels = np.flatnonzero(boundary)
    distant = pixels
    for y, x in _DISC:
        distant = distant[~targets[distant + y * boundary.shape[1] + x]]
    return len(pixels), len(pixels) - len(distant)
