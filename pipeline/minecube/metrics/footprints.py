"""Count one site's predicted footprints against the truth.

Each count is the size of a set of pixels. Sets are packed into bits, so one operation on a word
covers 64 pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
import xarray as xr

from minecube.arrays import AnyArray, Bool, Int64, UInt8, UInt64
from minecube.codes import BACKGROUND, MINE, UNKNOWN
from minecube.errors import ModelError
from minecube.metrics.boundaries import count_boundaries
from minecube.metrics.counts import (
    Counts,
    PairCounts,
    StepCounts,
    TubeCounts,
    WindowCounts,
    YearCounts,
)


@dataclass(frozen=True)
class _Year:
    """Sets of pixels in one year, 64 per word."""

    truth: UInt64
    """Mine in the truth."""
    pred: UInt64
    """Mine in the prediction."""
    labelled: UInt64
    """Known in the truth."""
    valid: UInt64
    """Known in truth and prediction."""


def count(
    pred: UInt8 | xr.DataArray,
    truth: UInt8 | xr.DataArray,
    years: Sequence[int],
    *,
    core: tuple[slice, slice] | None = None,
) -> Counts:
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
    boundaries = count_boundaries(predicted, labelled, (rows, columns))
    core_pixels = np.s_[rows.start : rows.stop, columns.start : columns.stop]
    packed = {
        int(year): _pack_year(predicted[t][core_pixels], labelled[t][core_pixels])
        for t, year in enumerate(years)
    }
    maps = {
        year: _count_year(pixels, boundaries[t]) for t, (year, pixels) in enumerate(packed.items())
    }
    pairs = {
        (start, end): _count_pair(packed[start], packed[end])
        for start, end in combinations(packed, 2)
    }
    steps = (
        _count_step(packed[start], packed[end], pairs[start, end])
        for start, end in pairwise(packed)
    )
    return Counts(
        years=maps,
        pairs=pairs,
        tubes=_count_tubes(list(packed.values())),
        steps=sum(steps, StepCounts()),
        windows=_count_windows(packed),
    )


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
    for footprint in stack:
        if ((footprint != BACKGROUND) & (footprint != MINE) & (footprint != UNKNOWN)).any():
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


def _pack_year(pred: UInt8, truth: UInt8) -> _Year:
    labelled = truth != UNKNOWN
    return _Year(
        truth=_pack(truth == MINE),
        pred=_pack(pred == MINE),
        labelled=_pack(labelled),
        valid=_pack(labelled & (pred != UNKNOWN)),
    )


def _pack(mask: Bool) -> UInt64:
    """Pack a mask into the bits of words. Bits after the last pixel are 0."""
    octets = np.packbits(mask)
    return np.pad(octets, (0, -len(octets) % 8)).view(np.uint64)


def _size(pixels: UInt64) -> int:
    """Count the pixels in a set."""
    return int(np.bitwise_count(pixels).sum())


def _count_year(year: _Year, boundaries: Int64) -> YearCounts:
    valid = _size(year.valid)
    true = _size(year.valid & year.truth)
    predicted = _size(year.valid & year.pred)
    tp = _size(year.valid & year.truth & year.pred)
    fp = predicted - tp
    fn = true - tp
    unmapped = _size(year.labelled) - valid
    return YearCounts(tp, fp, fn, valid - tp - fp - fn, unmapped, *boundaries.tolist())


def _count_pair(start: _Year, end: _Year) -> PairCounts:
    valid = start.valid & end.valid
    new = valid & ~start.truth & end.truth
    gone = valid & start.truth & ~end.truth
    pred_new = valid & ~start.pred & end.pred
    pred_gone = valid & start.pred & ~end.pred
    new_new = _size(new & pred_new)
    new_gone = _size(new & pred_gone)
    gone_new = _size(gone & pred_new)
    gone_gone = _size(gone & pred_gone)
    new_same = _size(new) - new_new - new_gone
    gone_same = _size(gone) - gone_new - gone_gone
    same_new = _size(pred_new) - new_new - gone_new
    same_gone = _size(pred_gone) - new_gone - gone_gone
    return PairCounts(
        new_new=new_new,
        new_same=new_same,
        new_gone=new_gone,
        gone_new=gone_new,
        gone_same=gone_same,
        gone_gone=gone_gone,
        same_new=same_new,
        same_same=_size(valid) - _size(new | gone | pred_new | pred_gone),
        same_gone=same_gone,
        unmapped=_size(start.labelled & end.labelled) - _size(valid),
    )


def _count_step(start: _Year, end: _Year, pair: PairCounts) -> StepCounts:
    """Count from one listed year to the next."""
    intersection = pair.changed_in_both()
    changed = start.valid & end.valid & (start.truth ^ end.truth)
    return StepCounts(
        both=intersection,
        either=pair.changed_in_truth() + pair.changed_in_prediction() - intersection,
        y1p1=_size(changed & end.truth & end.pred),
        y1p0=_size(changed & end.truth & ~end.pred),
        y0p1=_size(changed & ~end.truth & end.pred),
        y0p0=_size(changed & ~end.truth & ~end.pred),
    )


def _count_tubes(years: Sequence[_Year]) -> TubeCounts:
    ever_mine = np.bitwise_or.reduce([year.labelled & year.truth for year in years])
    ever_background = np.bitwise_or.reduce([year.labelled & ~year.truth for year in years])
    stratum_c = ever_mine & ever_background
    counts = TubeCounts()
    for year in years:
        intersection = year.valid & year.truth & year.pred
        union = year.valid & (year.truth | year.pred)
        counts += TubeCounts(
            s_both=_size(intersection & ~stratum_c),
            s_either=_size(union & ~stratum_c),
            c_both=_size(intersection & stratum_c),
            c_either=_size(union & stratum_c),
        )
    return counts


def _count_windows(years: Mapping[int, _Year]) -> dict[tuple[int, int, int], WindowCounts]:
    """Count pixels without change from each year to each later one."""
    windows = {}
    for start, (year, pixels) in enumerate(years.items()):
        steady = steady_in_both = pixels.valid
        for length, (end, later) in enumerate(list(years.items())[start + 1 :], start=2):
            steady = steady & later.valid & ~(pixels.truth ^ later.truth)
            steady_in_both = steady_in_both & steady & ~(pixels.pred ^ later.pred)
            windows[year, end, length] = WindowCounts(_size(steady), _size(steady_in_both))
    return windows
