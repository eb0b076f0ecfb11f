"""Trivial maps made without imagery. A useful model must score better."""

from __future__ import annotations

import numpy as np

from minecube.arrays import UInt8
from minecube.codes import UNKNOWN


def make_baselines(truth: UInt8) -> dict[str, UInt8]:
    """Make trivial predictions from the truth (year, y, x), as name -> (year, y, x) for `count`.

    Values are 1 mine, 0 not, 255 unknown.

    - "never changes": each pixel has the value of its first known year. It scores 0 in change, BC
      and expansion.
    - "always mine": a mine everywhere. It scores 0 in the same three.
    - "last year's map": the truth of the year listed before, unknown in the first. It is hard to
      beat except in change. Truth is mostly unchanged, but this map sees each change a year late.
    """
    earliest = np.full_like(truth[0], UNKNOWN)
    for footprint in truth:
        np.copyto(earliest, footprint, where=earliest == UNKNOWN)
    late = np.full_like(truth, UNKNOWN)
    late[1:] = truth[:-1]
    return {
        "never changes": np.broadcast_to(earliest, truth.shape),
        "always mine": np.ones_like(truth),
        "last year's map": late,
    }
