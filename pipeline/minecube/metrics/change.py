"""Maps of change, scored as footprints are: what two yearly maps say by their difference, a change model says itself."""

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
    """Counts of a change model's probabilities: pairs of years, and pixels by probability and truth.

    A pixel has changed from one half on; where it is both removed and new by that, it is what is more probable. A model of one
    class is scored in the variant that it can know: ("changed",) in `change`, ("new",) in `expansion`.

    Args:
        change: (pair, class, y, x): probability x 250, 255 none.
        truth: (year, y, x): footprints, 1 mine, 0 not, 255 unknown.
        years: Ascending; of the truth.
        pairs: First and second year, as change has them; the first is the earlier.
        classes: ("changed",), ("new",) or ("removed", "new"), in any order.

    Raises:
        ModelError: shapes, pairs or classes are others, or a value is no stored probability.
    """
    y, p = stack_of(truth, "truth", years), np.asarray(change)
    named = tuple(sorted(classes, key=KNOWN.index)) if set(classes) <= set(KNOWN) else tuple(classes)
    if named not in VARIANTS or not named:
        raise ModelError(f"change classes {tuple(classes)}; expected ('changed',), ('new',) or ('removed', 'new')")
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
        table = np.bincount(3 * (1 - moved) + (1 - said), minlength=9).reshape(3, 3)  # new, same, gone
        new, same, gone = table.tolist()
        unmapped = int(np.count_nonzero(labelled) - len(moved))
        counted[int(first), int(second)] = Pair(*(*new, *gone, *same, unmapped))
        gap = int(second) - int(first)
        found = histogram(score, (moved == 1 if named == ("new",) else moved != 0).astype(np.uint8))
        curves[gap] = curves[gap] + found if gap in curves else found
    return Scores(pairs=counted, change=curves, classes=named)


def _said(maps: NDArray[np.uint8], classes: tuple[str, ...]) -> tuple[NDArray[np.int8], NDArray[np.uint8]]:
    """-1, 0 or 1 of each pixel, any change of unknown direction as 1; and the probability that it changed at all."""
    score = maps.max(axis=0)
    said = (score >= HALF).astype(np.int8)
    if classes == ("removed", "new"):
        said[(said == 1) & (maps[0] > maps[1])] = -1
    return said, score
