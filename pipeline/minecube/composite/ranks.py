"""Ranks over days by sorting networks in numpy: medians, percentiles and quartiles.

Pixels miss different days, so their medians lie at different ranks. To equalise the ranks, some
missing values are filled with the lowest value and the others with the highest. Then one sorting
network serves a whole tile by minima and maxima of days (Batcher 1968, AFIPS 32). The network
contains only the comparisons needed for the wanted rank.
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

_TILE = 32768  # pixels, few enough for the caches


def median(observed: UInt16) -> UInt16:
    """Compute the median of observed values: uint16 [y, x], 0 = not observed.

    Halves are rounded to even.

    Args:
        observed: Array uint16 [day, y, x], 0 = not observed.
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
    """Compute a percentile of observed values: uint16 [y, x], 0 = not observed.

    The method is numpy's "linear". Halves are rounded to even.

    Args:
        observed: Array uint16 [day, y, x], 0 = not observed.
        percent: 0..100.
    """
    exact = np.maximum(np.arange(len(observed) + 1) - 1, 0) * (
        percent / 100
    )  # of 0..days observations
    ranks = np.floor(exact).astype(np.int64)
    shares = exact - ranks
    out = np.zeros(observed.shape[1:], dtype=np.uint16)
    for part, rows, missing in _tiles(observed, out):
        low, high, count = _at_rank(rows, missing, ranks)
        share = shares[count]
        high = np.where(share > 0, high, low)  # the highest rank has no next value
        between = high.astype(np.float64) - low
        # Interpolate from the nearer value, as numpy does, for the same rounding.
        value = np.where(share < 0.5, low + between * share, high - between * (1 - share))
        part[:] = np.where(count > 0, np.rint(value), 0)
    return out


def lower_quartile(values: Int32, known: Bool) -> Int32:
    """Select the value at rank (n - 1) // 4 of the n known values: int32 [y, x], 0 = none known.

    Args:
        values: Array int32 [day, y, x].
        known: Flags bool [day, y, x].
    """
    out = np.zeros(values.shape[1:], dtype=np.int32)
    ranks = np.maximum(np.arange(len(values) + 1) - 1, 0) // 4
    for part, rows, missing in _tiles(values, out, known):
        low, _, count = _at_rank(rows, missing, ranks, above=0)
        np.multiply(low, count > 0, out=part)
    return out


def median_of_seen(values: Pixels, seen: Bool) -> Float32:
    """Compute the median over days of seen values, not rounded: float32 [row, pixel], 0 = none.

    Args:
        values: Array uint16 [day, row, pixel], 0 = not seen. Or int32 with the bits of floats >= 0,
            sorting in the same order.
        seen: Flags bool [day, pixel], the same for each row.
    """
    days, lines, width = values.shape
    rows = np.empty((days + 1, lines * width), values.dtype)
    rows[:-1] = values.reshape(days, -1)
    missing = np.empty((days, lines, width), values.dtype)
    missing[:] = ~seen[:, None]
    low, high, count = _at_rank(rows, missing.reshape(days, -1), (np.arange(days + 1) - 1) // 2)
    high = np.where(count & 1, low, high)
    low, high = (np.where(count > 0, a, 0) for a in (low, high))  # a fill may have the bits of NaN
    if values.dtype == np.int32:
        low, high = (a.astype(np.int32).view(np.float32) for a in (low, high))
    middle: Float32 = (low.astype(np.float32) + high).astype(np.float32) * np.float32(0.5)
    return middle.reshape(lines, width)


@functools.cache
def _network(size: int, wanted: tuple[int, ...]) -> tuple[tuple[int, int, bool, bool], ...]:
    """Build Batcher's odd-even merge sort of `size` rows, reduced to the wanted ranks.

    Returns:
        Pairs of rows. The first row takes the minimum. Two flags mark if the minimum and if the
        maximum is needed.
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


def _tiles(
    values: Pixels, out: Pixels, known: Bool | None = None
) -> Iterator[tuple[Pixels, Pixels, Pixels]]:
    """Yield 1-d views of parts of `out`, each with its values and missing flags.

    Values are [day + 1, pixel], 0 = missing, with a spare last row. Missing flags are [day, pixel],
    0 or 1. Both have the type of `values`, and the next part reuses their memory.
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


def _at_rank(
    rows: Pixels, missing: Pixels, ranks: npt.NDArray[np.int64], above: int = 1
) -> tuple[Pixels, Pixels, Pixels]:
    """Select each pixel's value at the rank for its count, the next higher value, and the count.

    Args:
        rows: Array [day + 1, pixel], uint16 or int32, 0 = missing. The last row is spare. All rows
            are overwritten.
        missing: Array [day, pixel] of the same type, 0 or 1.
        ranks: Wanted rank for 0..days observations. It never rises by more than one.
        above: 0 if the next higher value is not needed. The value itself then replaces it.
    """
    days, limits = len(missing), np.iinfo(rows.dtype)
    *layers, spare = list(rows)
    count = (days - missing.sum(axis=0, dtype=rows.dtype)).astype(np.int16)
    # Fill missing days with the lowest value until the rank equals that of a complete pixel,
    # then with the highest.
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
