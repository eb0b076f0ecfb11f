"""Ranks over days by sorting networks: medians, percentiles, quartiles of what a pixel has, in numpy.

A pixel misses some days, so that its median lies at another rank than its neighbour's. As many of its missing values as are
needed are taken as lowest, the others as highest, until the rank is the same for all; then one sorting network (Batcher 1968,
AFIPS 32), of which only what leads to that rank is left, serves a whole tile by minima and maxima of days.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

Bool = npt.NDArray[np.bool_]
UInt16 = npt.NDArray[np.uint16]
Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
Pixels = npt.NDArray[Any]

_TILE = 32768  # pixels, such that what is worked on stays in the caches


def median(observed: UInt16) -> UInt16:
    """Median of what is observed: uint16 [y, x], halves rounded to even, 0 = not observed.

    Args:
        observed: uint16 [day, y, x], 0 = not observed.
    """
    ranks = (np.arange(len(observed) + 1) - 1) // 2
    out = np.zeros(observed.shape[1:], dtype=np.uint16)
    for part, rows, missing in _tiles(observed, out):
        low, high, count = _at_rank(rows, missing, ranks)
        odd = (count & 1).astype(bool)
        total = low + np.where(odd, low, high).astype(np.uint32)
        half = total >> 1
        half += total & half & 1
        half *= count > 0
        part[:] = half
    return out


def percentile(observed: UInt16, percent: float) -> UInt16:
    """Percentile of what is observed, numpy's method "linear": uint16 [y, x], halves rounded to even, 0 = not observed.

    Args:
        observed: uint16 [day, y, x], 0 = not observed.
        percent: 0..100.
    """
    exact = np.maximum(np.arange(len(observed) + 1) - 1, 0) * (percent / 100)  # of 0..days observations
    ranks = np.floor(exact).astype(np.int64)
    shares = exact - ranks
    out = np.zeros(observed.shape[1:], dtype=np.uint16)
    for part, rows, missing in _tiles(observed, out):
        low, high, count = _at_rank(rows, missing, ranks)
        share = shares[count]
        high = np.where(share > 0, high, low)  # of the highest rank there is no next
        between = high.astype(np.float64) - low
        # From the nearer of both, as numpy does, so that rounding is the same.
        value = np.where(share < 0.5, low + between * share, high - between * (1 - share))
        part[:] = np.where(count > 0, np.rint(value), 0)
    return out


def lower_quartile(values: Int32, known: Bool) -> Int32:
    """The value at rank (n - 1) // 4 of the n known ones: int32 [y, x], 0 where none is known.

    Args:
        values: int32 [day, y, x].
        known: bool [day, y, x].
    """
    out = np.zeros(values.shape[1:], dtype=np.int32)
    ranks = np.maximum(np.arange(len(values) + 1) - 1, 0) // 4
    for part, rows, missing in _tiles(values, out, known):
        low, _, count = _at_rank(rows, missing, ranks, above=0)
        np.multiply(low, count > 0, out=part)
    return out


def median_of_seen(values: Pixels, seen: Bool) -> Float32:
    """Median over days of what is seen, not rounded: float32 [row, pixel], 0 = none.

    Args:
        values: uint16 [day, row, pixel], or int32, then the bits of floats >= 0, whose order is the same; 0 where not seen.
        seen: bool [day, pixel], the same for each row.
    """
    days, lines, width = values.shape
    rows = np.empty((days + 1, lines * width), values.dtype)
    rows[:-1] = values.reshape(days, -1)
    missing = np.empty((days, lines, width), values.dtype)
    missing[:] = ~seen[:, None]
    low, high, count = _at_rank(rows, missing.reshape(days, -1), (np.arange(days + 1) - 1) // 2)
    high = np.where(count & 1, low, high)
    low, high = (np.where(count > 0, a, 0) for a in (low, high))  # the bits of what stands for missing are no number
    if values.dtype == np.int32:
        low, high = (a.astype(np.int32).view(np.float32) for a in (low, high))
    middle: Float32 = (low.astype(np.float32) + high).astype(np.float32) * np.float32(0.5)
    return middle.reshape(lines, width)


@functools.cache
def _network(size: int, wanted: tuple[int, ...]) -> tuple[tuple[int, int, bool, bool], ...]:
    """Batcher's odd-even merge sort of `size` rows, without what does not lead to the wanted ranks.

    Returns:
        Pairs of rows, the first to take the minimum, and whether that and whether the maximum is of use.
    """
    pairs: list[tuple[int, int]] = []
    run = 1
    while run < size:
        step = run
        while step:
            for j in range(step % run, size - step, 2 * step):
                rows = range(j, j + min(step, size - j - step))
                pairs += [(i, i + step) for i in rows if i // (2 * run) == (i + step) // (2 * run)]
            step //= 2
        run *= 2
    needed, kept = set(wanted), []
    for a, b in reversed(pairs):
        if needed & {a, b}:
            kept.append((a, b, a in needed, b in needed))
            needed |= {a, b}
    return tuple(kept[::-1])


def _tiles(values: Pixels, out: Pixels, known: Bool | None = None) -> Iterator[tuple[Pixels, Pixels, Pixels]]:
    """Parts of `out` as 1-d views, each with its values [day + 1, pixel], 0 where missing, and missing [day, pixel], 0 or 1.

    Both are of the values' type and used again for the next part; the last row of values is spare.
    """
    days, result = len(values), out.reshape(-1)
    if not values.size:
        return
    flat = values.reshape(days, -1)
    flags = None if known is None else known.reshape(days, -1)
    width = min(_TILE, len(result))
    rows, missing = np.empty((days + 1, width), values.dtype), np.empty((days, width), values.dtype)
    for start in range(0, len(result), _TILE):
        stop = min(start + _TILE, len(result))
        row, miss, source = rows[:, : stop - start], missing[:, : stop - start], flat[:, start:stop]
        if flags is None:
            np.copyto(row[:-1], source)
            np.copyto(miss, source == 0)
        else:
            np.multiply(source, flags[:, start:stop], out=row[:-1])
            np.copyto(miss, ~flags[:, start:stop])
        yield result[start:stop], row, miss


def _at_rank(rows: Pixels, missing: Pixels, ranks: npt.NDArray[np.int64], above: int = 1) -> tuple[Pixels, Pixels, Pixels]:
    """Of each pixel the value at the rank that belongs to its count, the next higher one, and the count.

    Args:
        rows: [day + 1, pixel], uint16 or int32, 0 where missing; the last row is spare. All are overwritten.
        missing: the same type [day, pixel], 0 or 1.
        ranks: of 0..days observations, the rank wanted; it never rises by more than one.
        above: 0 where the next higher value is not needed; it is then the value again.
    """
    days, limits = len(missing), np.iinfo(rows.dtype)
    *layers, spare = list(rows)
    count = (days - missing.sum(axis=0, dtype=rows.dtype)).astype(np.int16)
    # What is missing goes below the rank until it is that of a pixel that misses nothing, then above it.
    left = (ranks[days] - ranks).astype(rows.dtype)[count]
    low = np.empty_like(left)
    for row, miss in zip(layers, missing, strict=True):
        np.minimum(left, miss, out=low)
        np.subtract(left, low, out=left)
        np.subtract(miss, low, out=spare)
        np.multiply(spare, rows.dtype.type(limits.max), out=spare)
        np.add(row, spare, out=row)
        if limits.min:
            np.multiply(low, rows.dtype.type(limits.min), out=low)
            np.add(row, low, out=row)
    wanted = (int(ranks[days]), min(int(ranks[days]) + above, days - 1))
    for a, b, lower, upper in _network(days, wanted):
        if lower and upper:
            np.minimum(layers[a], layers[b], out=spare)
            np.maximum(layers[a], layers[b], out=layers[b])
            layers[a], spare = spare, layers[a]
        elif lower:
            np.minimum(layers[a], layers[b], out=layers[a])
        else:
            np.maximum(layers[a], layers[b], out=layers[b])
    return layers[wanted[0]], layers[wanted[1]], count
