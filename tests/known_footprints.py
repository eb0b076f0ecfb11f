"""Maps and probabilities of several years that tests of scores compare."""

from __future__ import annotations

import numpy as np

YEARS = [2015, 2016, 2018, 2019]


def series(
    seed: int, shape: tuple[int, int, int] = (4, 17, 23), unknown: float = 0.1
) -> np.ndarray:
    """Footprints of which some pixels never change, some do, and some are unknown now and then."""
    r = np.random.default_rng(seed)
    years, height, width = shape
    steady = np.broadcast_to(r.random((height, width)) < 0.4, shape)
    mine = np.where(r.random((height, width)) < 0.5, steady, r.random(shape) < 0.5)
    return np.where(r.random((years, height, width)) < unknown, 255, mine).astype(np.uint8)


def chances(
    seed: int, shape: tuple[int, int, int], levels: int = 251
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities x 250 that tell something, some unknown, and truth."""
    r = np.random.default_rng(seed)
    p = r.integers(0, levels, shape) * (250 // (levels - 1))
    y = (r.random(shape) * 250 < 0.6 * p + 20).astype(np.uint8)
    p[r.random(shape) < 0.1], y[r.random(shape) < 0.1] = 255, 255
    return p.astype(np.uint8), y
