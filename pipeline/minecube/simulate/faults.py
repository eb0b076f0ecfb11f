"""Damage single bands of simulated products, with the faults that real products have."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from minecube.arrays import UInt8, UInt16
from minecube.catalog import BANDS
from minecube.simulate.pixels import enlarge

KINDS = ("wrapped", "constant", "saturated", "strip", "displaced")
"""Faults of a band.

wrapped: dark pixels are negative and wrap to numbers near 65535. constant: all pixels have one
number. saturated: the brighter half has one number. strip: values along the edge of the coverage
are far too low. displaced: the band lies 20 m east of the others.
"""
STRIP_PX = 3
"""Depth of a strip in 20 m pixels, the outermost pixel included."""
_STRIP_SHARE = 0.4  # values of a strip
_CONSTANT = 1234
_WRAPPED_SHARE = 0.02


@dataclass(frozen=True)
class BandFault:
    """A fault of one band of a product."""

    kind: str
    """One of `KINDS`."""
    band: str


def draw_fault(rng: np.random.Generator) -> BandFault:
    """Draw a fault and a band."""
    kind = KINDS[rng.integers(len(KINDS))]
    return BandFault(kind, BANDS[rng.integers(len(BANDS))])


def damage_band(stored: UInt16, kind: str, scl: UInt8) -> UInt16:
    """Give a stored band [y, x] a fault. `scl` is 0 without data, [y, x] at 20 m."""
    damaged = stored.copy()
    valid = stored > 0
    if not valid.any():
        return damaged
    if kind == "wrapped":
        dark = valid & (stored <= np.quantile(stored[valid], _WRAPPED_SHARE))
        damaged[dark] = 65535 - stored[dark] % 100
    elif kind == "constant":
        damaged[valid] = _CONSTANT
    elif kind == "saturated":
        damaged = np.minimum(stored, np.uint16(np.median(stored[valid])))
    elif kind == "strip":
        square = np.ones((3, 3))
        inside = ndimage.binary_erosion(scl > 0, square, iterations=STRIP_PX, border_value=1)
        edge = valid & ~enlarge(inside, stored.shape)
        damaged[edge] = np.maximum(stored[edge] * _STRIP_SHARE, 1).astype(np.uint16)
    else:
        moved = np.roll(stored, len(stored) // len(scl), axis=1)
        damaged = np.where(valid & (moved > 0), moved, stored)
    return damaged
