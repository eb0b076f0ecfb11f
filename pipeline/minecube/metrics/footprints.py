"""Count one site's predicted footprints against the truth.

A pixel of a year is unknown, background or mine in truth and prediction, which gives 9 codes. Most
pixels have one code in all years. They are counted once, and only the others in each pair of years.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, combinations_with_replacement, pairwise

import numpy as np
import xarray as xr

from minecube.arrays import AnyArray, Bool, Int64, UInt8
from minecube.codes import UNKNOWN
from minecube.errors import ModelError
from minecube.metrics.boundaries import count_boundaries
from minecube.metrics.counts import (
    PairCounts,
    Scores,
    StepCounts,
    TubeCounts,
    WindowCounts,
    YearCounts,
)

_STATES = 3
"""States of a pixel: 0 unknown, 1 background, 2 mine. Its code is 3 * truth + prediction."""
_BACKGROUND = 1
_MINE = 2
_CODES = _STATES**2
_MOVES = np.array(
    [
        [[0, 0, 0], [0, 0, 1], [0, 0, 0]],
        [[0, 0, 0], [0, 1, 0], [0, 0, 1]],
        [[0, 0, 0], [0, 0, 0], [0, 1, 0]],
    ]
)
"""(move, first state, last state): 1 for the states of the moves new, same and gone."""


def count(
    pred: UInt8 | xr.DataArray,
    truth: UInt8 | xr.DataArray,
    years: Sequence[int],
    *,
    core: tuple[slice, slice] | None = None,
) -> Scores:
    """Count the pixels of one site, or of one block of it.

    Args:
        pred: Shape (year, y, x): 1 mine, 0 not, 255 unknown.
        truth: Shape (year, y, x), same values.
        years: Years of both arrays, ascending.
        core: Pixels (y, x) to count; the others are context. The counts of all blocks add up
            exactly to those of the site, including boundary pixels. For this the arrays must reach
            MARGIN_PX beyond each block, or to the site's edge.

    Raises:
        ModelError: shapes or years differ, a value is not 0, 1 or 255 (a probability, for example),
            or `core` skips pixels.
    """
    predicted = stack_of(pred, "prediction", years)
    labelled = stack_of(truth, "truth", years)
    if predicted.shape != labelled.shape:
        raise ModelError(
            f"prediction has shape {predicted.shape}, truth {labelled.shape}; "
            "scores need the same years on the same grid"
        )
    check_footprint(labelled, "truth")
    check_footprint(predicted, "prediction")
    rows, columns = _core_of(predicted.shape[1:], core)
    predicted = predicted.astype(np.uint8, copy=False)
    labelled = labelled.astype(np.uint8, copy=False)
    codes = _states(labelled) * np.uint8(_STATES) + _states(predicted)
    counted = codes[:, rows.start : rows.stop, columns.start : columns.stop]
    boundaries = count_boundaries(predicted, labelled, (rows, columns))
    return _score_codes(counted.reshape(len(years), -1), boundaries, years)


def stack_of(stack: AnyArray | xr.DataArray, name: str, years: Sequence[int]) -> AnyArray:
    """Return the pixels as (year, y, x). Raise ModelError for other or unsorted years."""
    listed = list(years)
    if isinstance(stack, xr.DataArray):
        stack = stack.transpose("year", "y", "x")
        if "year" in stack.coords and stack["year"].to_numpy().tolist() != listed:
            raise ModelError(
                f"the {name} has the years {stack['year'].to_numpy().tolist()}, expected {listed}; "
                "one year would be scored as another"
            )
    pixels = np.asarray(stack)
    ascending = bool(listed) and listed == sorted(set(listed))
    if pixels.ndim != 3 or len(pixels) != len(listed) or not ascending:
        raise ModelError(
            f"the {name} has shape {pixels.shape} for the years {listed}; "
            "expected (year, y, x) and ascending years"
        )
    return pixels


def check_footprint(stack: AnyArray, name: str) -> None:
    """Raise ModelError for values other than 0, 1 and 255."""
    if ((stack != 0) & (stack != 1) & (stack != UNKNOWN)).any():
        raise ModelError(
            f"the {name} holds values other than 0, 1 and {UNKNOWN} (unknown); "
            "threshold probabilities first"
        )


def _core_of(shape: tuple[int, ...], core: tuple[slice, slice] | None) -> tuple[range, range]:
    """Return the rows and columns to count. Raise ModelError if they skip pixels."""
    height, width = shape
    row_slice, column_slice = core or (slice(None), slice(None))
    rows = range(height)[row_slice]
    columns = range(width)[column_slice]
    if rows.step != 1 or columns.step != 1:
        raise ModelError(
            f"expected a core of rows and columns one after another, found {core}; "
            "scores would be of others, too"
        )
    return rows, columns


def _states(footprint: UInt8) -> UInt8:
    """Turn 255, 0 and 1 into 0 unknown, 1 background and 2 mine."""
    return footprint + np.uint8(1)  # 255 + 1 is 0 in uint8


def _score_codes(codes: UInt8, boundaries: Int64, years: Sequence[int]) -> Scores:
    """Turn codes (year, pixel) and boundaries (year, 4) into listed counts."""
    changing = (codes != codes[0]).any(axis=0)
    histories = codes[:, changing]
    constant = np.bincount(codes[0, ~changing], minlength=_CODES)
    tables = _count_pairs(histories) + np.diag(constant)
    tables = tables.reshape(*tables.shape[:2], *[_STATES] * 4)
    listed = [int(year) for year in years]
    maps = {year: _year_counts(tables[t, t], boundaries[t]) for t, year in enumerate(listed)}
    pairs = {
        (listed[i], listed[j]): _pair_counts(tables[i, j])
        for i, j in combinations(range(len(listed)), 2)
    }
    consecutive = sum((pairs[pair] for pair in pairwise(listed)), PairCounts())
    firsts = np.arange(len(listed) - 1)
    moves = tables[firsts, firsts + 1].sum(axis=0)
    known_throughout = constant.reshape(_STATES, _STATES)[1:, 1:].sum()
    return Scores(
        maps,
        pairs,
        _tube_counts(histories, sum(maps.values(), YearCounts())),
        _step_counts(consecutive, moves),
        _window_counts(histories, int(known_throughout), listed),
    )


def _count_pairs(histories: UInt8) -> Int64:
    """Count pixels by their codes in two years: (start year, end year, 9, 9), start <= end."""
    number = len(histories)
    counts = np.zeros((number, number, _CODES, _CODES), np.int64)
    for start, end in combinations_with_replacement(range(number), 2):
        codes = histories[start] * np.uint8(_CODES) + histories[end]
        counts[start, end] = np.bincount(codes, minlength=_CODES**2).reshape(_CODES, _CODES)
    return counts


def _year_counts(table: Int64, boundaries: Int64) -> YearCounts:
    """Name the counts of a year from its table with itself, and from its boundary pixels."""
    states = table.reshape(_CODES, _CODES).diagonal().reshape(_STATES, _STATES)  # truth, prediction
    (tn, fp), (fn, tp) = states[1:, 1:].tolist()
    unmapped = int(states[1:, 0].sum())
    return YearCounts(tp, fp, fn, tn, unmapped, *boundaries.tolist())


def _pair_counts(table: Int64) -> PairCounts:
    """Name the counts of a table: truth and prediction of the first year, then of the last."""
    new, same, gone = np.einsum("ipjq,mij,npq->mn", table, _MOVES, _MOVES).tolist()
    unknown_truth_aside = table[1:, :, 1:, :]
    unmapped = int(unknown_truth_aside.sum() - unknown_truth_aside[:, 1:, :, 1:].sum())
    counts = [*new, *gone, *same, unmapped]
    return PairCounts(*counts)


def _step_counts(pairs: PairCounts, moves: Int64) -> StepCounts:
    """Name the counts of consecutive years, from the sums of their pairs and of their tables."""
    intersection = pairs.changed_in_both()
    union = pairs.changed_in_truth() + pairs.changed_in_prediction() - intersection
    y1p0, y1p1 = moves[_BACKGROUND, 1:, _MINE, 1:].sum(axis=0).tolist()
    y0p0, y0p1 = moves[_MINE, 1:, _BACKGROUND, 1:].sum(axis=0).tolist()
    return StepCounts(intersection, union, y1p1, y1p0, y0p1, y0p0)


def _tube_counts(histories: UInt8, total: YearCounts) -> TubeCounts:
    """Split the mine pixel-years of all years into strata S and C."""
    truth, prediction = np.divmod(histories, np.uint8(_STATES))
    in_c = (truth == _MINE).any(axis=0) & (truth == _BACKGROUND).any(axis=0)
    valid = (truth > 0) & (prediction > 0) & in_c
    c_both = _size(valid & (truth == _MINE) & (prediction == _MINE))
    c_either = _size(valid & ((truth == _MINE) | (prediction == _MINE)))
    union = total.tp + total.fp + total.fn
    return TubeCounts(total.tp - c_both, union - c_either, c_both, c_either)


def _window_counts(
    histories: UInt8, constant: int, years: Sequence[int]
) -> dict[tuple[int, int, int], WindowCounts]:
    """Count pixels without change from a first to a last year.

    Args:
        histories: Codes (year, pixel).
        constant: Number of other pixels, known and constant in all years.
        years: The years.
    """
    truth, prediction = np.divmod(histories, np.uint8(_STATES))
    valid = (truth > 0) & (prediction > 0)
    windows = {}
    for start in range(len(years)):
        steady = steady_in_both = valid[start]
        for end in range(start + 1, len(years)):
            steady = steady & valid[end] & (truth[end] == truth[start])
            steady_in_both = steady_in_both & steady & (prediction[end] == prediction[start])
            windows[years[start], years[end], end - start + 1] = WindowCounts(
                constant + _size(steady), constant + _size(steady_in_both)
            )
    return windows


def _size(mask: Bool) -> int:
    """Return the number of pixels in a mask."""
    return int(np.count_nonzero(mask))
