"""Check footprints, count their pixels with `bits`, and name the counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from minecube.errors import ModelError
from minecube.metrics.bits import Bytes, Sums, add
from minecube.metrics.states import UNKNOWN, Mapped, Pair, Scores, Steps, Tubes, Window

_BAND_PX = 128
"""Rows per band. Ten years of 1000 pixels take 0.4 MB of bits, within a core's cache."""
_WORDS = 256
"""Words with changes per call. Ten years take 80 kB, within a smaller cache."""
_SAME_SAME = [field.name for field in fields(Pair)].index("same_same")


def count(
    pred: Bytes | xr.DataArray,
    truth: Bytes | xr.DataArray,
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
    p, y = stack_of(pred, "prediction", years), stack_of(truth, "truth", years)
    if p.shape != y.shape:
        raise ModelError(
            f"prediction has shape {p.shape}, truth {y.shape}; scores need the same years on the same grid"
        )
    p, y = _footprints(p, "prediction"), _footprints(y, "truth")
    rows, columns = (
        range(n)[of] for n, of in zip(p.shape[1:], core or (slice(None), slice(None)), strict=True)
    )
    if {rows.step, columns.step} != {1}:
        raise ModelError(
            f"expected a core of rows and columns one after another, found {core}; scores would be of others, too"
        )
    sums = Sums.zero(len(years))
    if rows and columns:
        width, bands = p.shape[2], -(-len(rows) // _BAND_PX)
        if width < 64:
            y, p = (np.pad(of, ((0, 0), (0, 0), (0, 64 - width))) for of in (y, p))
        site, own = _within(width, 0, width), _within(width, columns.start, columns.stop)
        if not add(y, p, (rows.start, rows.stop), site, own, -(-len(rows) // bands), _WORDS, sums):
            check(y, "truth")
            check(p, "prediction")
    return _scores(sums, years)


def stack_of(stack: Bytes | xr.DataArray, what: str, years: Sequence[int]) -> Bytes:
    """Return the pixels as (year, y, x). Raise ModelError for other or unsorted years."""
    if isinstance(stack, xr.DataArray):
        stack = stack.transpose("year", "y", "x")
        found = stack["year"].to_numpy().tolist() if "year" in stack.coords else list(years)
        if found != list(years):
            raise ModelError(
                f"the {what} has the years {found}, expected {list(years)}; one year would be scored as another"
            )
    values = np.asarray(stack)
    if (
        values.ndim != 3
        or len(values) != len(years)
        or list(years) != sorted(set(years))
        or not len(years)
    ):
        raise ModelError(
            f"the {what} has shape {values.shape} for the years {list(years)}; expected (year, y, x) and ascending years"
        )
    return values


def _footprints(stack: NDArray[Any], what: str) -> Bytes:
    """Convert to contiguous bytes. Values of byte arrays are checked later, while packing."""
    if stack.dtype != np.uint8:
        check(stack, what)
    # A single kind of array, so only one version is compiled.
    return np.require(stack, np.uint8, ["C", "W"])


def check(stack: NDArray[Any], what: str) -> None:
    """Raise ModelError for values other than 0, 1 and 255."""
    if ((stack != 0) & (stack != 1) & (stack != UNKNOWN)).any():
        raise ModelError(
            f"the {what} holds values other than 0, 1 and {UNKNOWN} (unknown); threshold probabilities first"
        )


def _within(width: int, first: int, last: int) -> NDArray[np.uint64]:
    """Return a row's bits, set from `first` up to `last`, with an empty word on either side."""
    x = np.arange(-64, -(-width // 64) * 64 + 64)
    return np.packbits((x >= first) & (x < last), bitorder="little").view(np.uint64)


def _scores(sums: Sums, years: Sequence[int]) -> Scores:
    named = [int(year) for year in years]
    alike, always = sums.alike.tolist()
    truth, pred, both = (sums.years + always).tolist()
    sums.pairs[..., _SAME_SAME] += alike
    pairs, lasting, edges = (
        sums.pairs.tolist(),
        (sums.windows + alike).tolist(),
        sums.edges.T.tolist(),
    )
    maps, moves, spans = {}, {}, {}
    for i, first in enumerate(named):
        tp, fp, fn = both[i], pred[i] - both[i], truth[i] - both[i]
        maps[first] = Mapped(
            tp, fp, fn, pairs[i][i][_SAME_SAME] - tp - fp - fn, pairs[i][i][-1], *edges[i]
        )
        for j, second in enumerate(named[i + 1 :], start=i + 1):
            moves[first, second] = Pair(*pairs[i][j])
            spans[first, second, j - i + 1] = Window(lasting[0][i][j], lasting[1][i][j])
    tp, either = sum(both), sum(truth) + sum(pred) - sum(both)
    c_both, c_either = sums.tubes.tolist()
    tubes = Tubes(tp - c_both, either - c_either, c_both, c_either)
    return Scores(maps, moves, tubes, Steps(*sums.steps.tolist()), spans)
