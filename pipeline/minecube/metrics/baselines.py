"""Maps that know nothing of the imagery: a model that scores no better has learnt nothing of what the score asks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from minecube.metrics.states import UNKNOWN


def baselines(truth: NDArray[np.uint8]) -> dict[str, NDArray[np.uint8]]:
    """Name -> prediction (year, y, x), 1 mine, 0 not, 255 unknown, as `count` takes it. They are made from the truth itself.

    - "never changes": each pixel as it is in the first year in which it is known. It scores 0 in change, BC and expansion.
    - "always mine": a mine everywhere. So does it.
    - "last year's map": the truth of the year listed before; unknown in the first. A hard one in all but change: truth is
      mostly what it was, but each change is seen a year late.

    Args:
        truth: (year, y, x): 1 mine, 0 not, 255 unknown.
    """
    first = np.full_like(truth[0], UNKNOWN)
    for of_year in truth:
        np.copyto(first, of_year, where=first == UNKNOWN)
    late = np.full_like(truth, UNKNOWN)
    late[1:] = truth[:-1]
    return {
        "never changes": np.broadcast_to(first, truth.shape),
        "always mine": np.ones_like(truth),
        "last year's map": late,
    }
