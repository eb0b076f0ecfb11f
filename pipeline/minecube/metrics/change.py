"""Score maps of change like footprints. A change model predicts change directly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from minecube.errors import ModelError
from minecube.metrics.counting import stack_of
from minecube.metrics.curves import checked, histogram
from minecube.metrics.formulas import VARIANTS
from minecube.metrics.states import HALF, UNKNOWN, Histogram, Pair, Scores

KNOWN = ("changed", "removed", "new")


def count_change(
    change: NDArray[np.uint8],
    truth: NDArray[np.uint8] | xr.DataArray,
    years: Sequence[int],
    pairs: Sequence[tuple[int, int]],
    classes: Sequence[str],
) -> Scores:
    """Count a change model's probabilities by pair of years, and pixels by probability and truth.

    A pixel has changed from probability one half on. If both removed and new reach it, the more
    probable one counts. A model of one class is scored in its own variant: ("changed",) in
    `change`, ("new",) in `expansion`.

    Args:
        change: Shape (pair, class, y, x): probability x 250, 255 for unknown.
        truth: Shape (year, y, x): footprints, 1 mine, 0 not, 255 unknown.
        years: Years of the truth, ascending.
        pairs: First and second year, in the order of `change`. The first is the earlier.
        classes: ("changed",), ("new",) or ("removed", "new"), in any order.

    Raises:
        ModelError: shapes, pairs or classes are wrong, or a value is no stored probability.
    """
    y, p = stack_of(truth, "truth", years), np.asarray(change)
    named = (
        tuple(sorted(classes, key=KNOWN.index)) if set(classes) <= set(KNOWN) else tuple(classes)
    )
    if named not in VARIANTS or not named:
        raise ModelError(
            f"change classes {tuple(classes)}; expected ('changed',), ('new',) or ('removed', 'new')"
        )
    if p.shape != (len(pairs), len(named), *y.shape[1:]):
        raise ModelError(
            f"change has shape {p.shape} for {len(pairs)} pairs and {len(named)} classes, truth {y.shape}; scores need "
            "(pair, class, y, x) on the truth's grid"
        )
    at = {int(year): i for i, year in enumerate(years)}
    wrong = [pair for pair in pairs if not (pair[0] in at and pair[1] in at and pair[0] < pair[1])]
    if wrong or len(set(pairs)) < len(pairs):
        raise ModelError(
            f"pairs {[tuple(map(int, pair)) for pair in wrong or pairs]}; expected each once, the earlier year first, both "
            f"among {list(at)}: backwards, new would be scored as removed"
        )
    counted: dict[tuple[int, int], Pair] = {}
    curves: dict[int, Histogram] = {}
    order = [list(classes).index(name) for name in named]
    for (first, second), maps in zip(pairs, checked(p), strict=True):
        maps = maps[order]
        before, after = y[at[first]], y[at[second]]
        labelled = (before != UNKNOWN) & (after != UNKNOWN)
        known = labelled & (maps != UNKNOWN).all(axis=0)
        moved = after[known].astype(np.int8) - before[known].astype(np.int8)
        said, score = _said(maps[:, known], named)
        table = np.bincount(3 * (1 - moved) + (1 - said), minlength=9).reshape(
            3, 3
        )  # new, same, gone
        new, same, gone = table.tolist()
        unmapped = int(np.count_nonzero(labelled) - len(moved))
        counted[int(first), int(second)] = Pair(*(*new, *gone, *same, unmapped))
        gap = int(second) - int(first)
        found = histogram(score, (moved == 1 if named == ("new",) else moved != 0).astype(np.uint8))
        curves[gap] = curves[gap] + found if gap in curves else found
    return Scores(pairs=counted, change=curves, classes=named)


def _said(
    maps: NDArray[np.uint8], classes: tuple[str, ...]
) -> tuple[NDArray[np.int8], NDArray[np.uint8]]:
    """Return -1, 0 or 1 for each pixel, and its probability of any change.

    A change of unknown direction is 1.
    """
    score = maps.max(axis=0)
    said = (score >= HALF).astype(np.int8)
    if classes == ("removed", "new"):
        said[(said == 1) & (maps[0] > maps[1])] = -1
    return said, score
