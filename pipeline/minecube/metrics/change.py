"""Score maps of change like footprints. A change model predicts change directly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from minecube.arrays import UInt8
from minecube.codes import HALF, UNKNOWN
from minecube.errors import ModelError
from minecube.metrics.counts import Counts, Histogram, PairCounts
from minecube.metrics.curves import add_histogram, check_probability, histogram
from minecube.metrics.footprints import stack_of
from minecube.metrics.formulas import VARIANTS

Int8 = NDArray[np.int8]


def count_change(
    change: UInt8,
    truth: UInt8 | xr.DataArray,
    years: Sequence[int],
    pairs: Sequence[tuple[int, int]],
    classes: Sequence[str],
) -> Counts:
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
    labelled_years = stack_of(truth, "truth", years)
    maps = np.asarray(change)
    ordered = _ordered(classes)
    if maps.shape != (len(pairs), len(ordered), *labelled_years.shape[1:]):
        raise ModelError(
            f"change has shape {maps.shape} for {len(pairs)} pairs and {len(ordered)} classes, "
            f"truth {labelled_years.shape}; scores need (pair, class, y, x) on the truth's grid"
        )
    footprints = dict(zip(map(int, years), labelled_years, strict=True))
    _check_pairs(pairs, list(footprints))
    check_probability(maps)
    order = [list(classes).index(name) for name in ordered]
    counts: dict[tuple[int, int], PairCounts] = {}
    histograms: dict[int, Histogram] = {}
    for (start, end), pair_maps in zip(pairs, maps, strict=True):
        probability = pair_maps[order]
        start_truth = footprints[int(start)]
        end_truth = footprints[int(end)]
        labelled = (start_truth != UNKNOWN) & (end_truth != UNKNOWN)
        valid = labelled & (probability != UNKNOWN).all(axis=0)
        true_moves = end_truth.astype(np.int8) - start_truth.astype(np.int8)
        predicted_moves = _predict_moves(probability, ordered)
        unmapped = int(np.count_nonzero(labelled) - np.count_nonzero(valid))
        counts[int(start), int(end)] = _count_moves(
            true_moves[valid], predicted_moves[valid], unmapped
        )
        positives = true_moves != 0
        if ordered == ("new",):
            positives = true_moves == 1
        pixels = histogram(probability.max(axis=0), positives, valid)
        add_histogram(histograms, int(end) - int(start), pixels)
    return Counts(pairs=counts, change=histograms, classes=ordered)


def _ordered(classes: Sequence[str]) -> tuple[str, ...]:
    """Return the classes in the order of `VARIANTS`. Raise ModelError for other classes."""
    for ordered in VARIANTS:
        if ordered and sorted(ordered) == sorted(classes):
            return ordered
    raise ModelError(
        f"change classes {tuple(classes)}; expected ('changed',), ('new',) or ('removed', 'new')"
    )


def _check_pairs(pairs: Sequence[tuple[int, int]], years: list[int]) -> None:
    """Raise ModelError unless each pair has two of the years in order, and is listed once."""
    wrong = [pair for pair in pairs if not (set(pair) <= set(years) and pair[0] < pair[1])]
    if wrong or len(set(pairs)) < len(pairs):
        listed = [tuple(map(int, pair)) for pair in wrong or pairs]
        raise ModelError(
            f"pairs {listed}; expected each once, the earlier year first, both among {years}: "
            "backwards, new would be scored as removed"
        )


def _predict_moves(probability: UInt8, classes: tuple[str, ...]) -> Int8:
    """Return -1 removed, 0 same or 1 new for each pixel (y, x) of maps (class, y, x).

    A change of unknown direction is 1.
    """
    moves: Int8 = (probability.max(axis=0) >= HALF).astype(np.int8)
    if classes == ("removed", "new"):
        removed, new = probability
        moves[(moves == 1) & (removed > new)] = -1
    return moves


def _count_moves(true_moves: Int8, predicted_moves: Int8, unmapped: int) -> PairCounts:
    """Count pixels by their moves, -1, 0 or 1, in truth and prediction."""
    codes = 3 * (1 - true_moves) + (1 - predicted_moves)
    new, same, gone = np.bincount(codes, minlength=9).reshape(3, 3).tolist()
    counts = [*new, *gone, *same, unmapped]
    return PairCounts(*counts)
