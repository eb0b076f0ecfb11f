"""The loops of `counting`, compiled by numba, on footprints as bits.

A word holds 64 pixels of a row, the lowest bit leftmost. A site is processed in bands of rows small
enough for the processor's cache. In each band, truth and prediction of all years are packed. A few
rows above and below are included, with an empty word before and after each row.

An operation on a word applies to all its pixels. Numba turns loops over words into vector
instructions, including bit counts, if indices cannot be negative. This holds for slices from 0 on
and for unsigned indices. A slice costs a reference count, too much for the short loops of
boundaries. So these loops use unsigned indices.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from minecube.compiled import compiled
from minecube.metrics.states import BOUNDARY_PX, UNKNOWN

Bytes = NDArray[np.uint8]
Words = NDArray[np.uint64]
Ints = NDArray[np.int64]
Range = tuple[int, int]

MARGIN_PX = BOUNDARY_PX + 1
"""Margin of context around a block needed for its boundary pixels."""
_NOT, _MINE, _UNKNOWN = np.uint8(0), np.uint8(1), np.uint8(UNKNOWN)
_0, _1, _2, _3, _61, _62, _63 = (np.uint64(n) for n in (0, 1, 2, 3, 61, 62, 63))


class Sums(NamedTuple):
    """Counts of pixels and pixel-years."""

    alike: Ints
    """(2): pixels equal in all years, truth and prediction; then the mine pixels among them.

    All other counts, except the boundaries, cover only the remaining pixels.
    """
    years: Ints
    """(3, year): mine in truth, in prediction, in both."""
    edges: Ints
    """(4, year): the last four of `Mapped`."""
    pairs: Ints
    """(year, year, 10): as `Pair`, by first and second year. The second is the same or later."""
    steps: Ints
    """(6): as `Steps`."""
    tubes: Ints
    """(2): the last two of `Tubes`."""
    windows: Ints
    """(2, year, year): as `Window`, by first and last year."""

    @classmethod
    def zero(cls, years: int) -> Sums:
        """Create zero counts for a number of years."""
        shapes = (2,), (3, years), (4, years), (years, years, 10), (6,), (2,), (2, years, years)
        return cls(*(np.zeros(shape, np.int64) for shape in shapes))


def _byte_at(context: Any, builder: Any, signature: Any, row: Any, at: Any) -> Any:
    return builder.gep(context.make_array(signature.args[0])(context, builder, row).data, [at])


@intrinsic  # type: ignore[untyped-decorator]
def _equal(_context: Any, row: Any, _at: Any, _value: Any) -> Any:
    """Compare the 64 bytes of a row from `at` on with a value, as bits of a word.

    This is one vector comparison. The compiler does not derive it from a loop.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row, at, value = arguments
        kind, places = ir.VectorType(ir.IntType(8), 64), ir.VectorType(ir.IntType(32), 64)
        found = builder.load(
            builder.bitcast(_byte_at(context, builder, signature, row, at), kind.as_pointer())
        )
        found.align = 1
        blank = ir.Constant(kind, ir.Undefined)
        one = builder.insert_element(blank, value, ir.Constant(ir.IntType(32), 0))
        all_ = builder.shuffle_vector(one, blank, ir.Constant(places, [0] * 64))
        return builder.bitcast(builder.icmp_unsigned("==", found, all_), ir.IntType(64))

    return types.uint64(row, types.intp, types.uint8), code


@intrinsic  # type: ignore[untyped-decorator]
def _fetch(_context: Any, row: Any, _at: Any) -> Any:
    """Prefetch the byte at offset `at` of a row into the cache. It may lie outside the array."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _byte_at(context, builder, signature, *arguments)
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [address.type, number, number, number])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [address.type], kind)
        # The arguments mean read access, second cache, data.
        builder.call(prefetch, [address, number(0), number(2), number(1)])
        return context.get_dummy_value()

    return types.void(row, types.intp), code


@intrinsic  # type: ignore[untyped-decorator]
def _size(_context: Any, _word: Any) -> Any:
    """Count the bits set in a word."""
    return types.uint64(
        types.uint64
    ), lambda _context, builder, _signature, arguments: builder.ctpop(arguments[0])


@compiled
def add(
    truth: Bytes,
    pred: Bytes,
    rows: Range,
    site: Words,
    own: Words,
    band: int,
    part: int,
    sums: Sums,
) -> bool:
    """Count a site's rows, for the pixels in `own`. Other pixels are context.

    Args:
        truth: Shape (year, y, x), contiguous, 64 columns or more: 1 mine, 0 not, 255 unknown.
        pred: Same layout as truth.
        rows: First row, and last + 1.
        site: Bits of a row inside the site, with an extra word on either side.
        own: The bits of `site` to be counted.
        band: Rows per band.
        part: Words per call of `_add`, for words with pixels not all alike.
        sums: The counts are added here.

    Returns:
        Whether all values are 0, 1 or 255. If False, the sums are invalid.
    """
    years, height, _ = truth.shape
    across, high = len(site), band + 2 * MARGIN_PX
    mine, unknown = (
        np.zeros((2, years, across, high), np.uint64),
        np.zeros((0, years, across, high), np.uint64),
    )
    blank, counted = np.empty((across, high), np.uint64), np.empty((across, high), np.uint64)
    for top in range(rows[0], rows[1], band):
        first, end = top - MARGIN_PX, min(top + band, rows[1])
        inside = max(first, 0), min(end + MARGIN_PX, height)
        for w in range(across):
            for row in range(high):
                blank[w, row] = ~site[w] if inside[0] <= first + row < inside[1] else ~_0
                counted[w, row] = own[w] if top <= first + row < end else _0
        others, fit = _pack(truth, pred, inside, first, mine)
        if not fit:
            return False
        if others or unknown.size:
            unknown = np.zeros_like(mine)
            _pack_unknown(truth, pred, inside, first, unknown)
        size = across * high
        flat, flat_unknown = (
            mine.reshape((2, years, size)),
            unknown.reshape((len(unknown), years, size)),
        )
        _boundaries(flat, flat_unknown, blank.reshape(-1), counted.reshape(-1), high, sums)
        _changes(flat, flat_unknown, counted.reshape(-1), part, sums)
    return True


@compiled
def _pack(truth: Bytes, pred: Bytes, inside: Range, first: int, mine: Words) -> tuple[bool, bool]:
    """Pack mine pixels as bits.

    Returns:
        Whether there are values other than 0 and 1, and whether these are all 255.
    """
    years, _, width = truth.shape
    words = -(-width // 64)
    over = np.uint64(64 * words - width)
    others = wrong = False
    for y in range(*inside):
        # All years in turn, since several memory streams are read faster than one.
        for t in range(years):
            for k in range(2):
                row, out = truth[t, y] if k == 0 else pred[t, y], mine[k, t, 1:, y - first]
                more = _0
                for w in range(words - 1):
                    # Two rows ahead. No processor foresees 20 rows read in turn.
                    _fetch(row, 64 * w + 2 * width)
                    bits = _equal(row, 64 * w, _MINE)
                    more |= ~(bits | _equal(row, 64 * w, _NOT))
                    out[w] = bits
                # The last word holds the end of the last 64 pixels.
                bits = _equal(row, width - 64, _MINE)
                more |= ~(bits | _equal(row, width - 64, _NOT))
                out[words - 1] = bits >> over
                if more:
                    others = True
                    for x in range(width):
                        wrong |= row[x] > _MINE and row[x] != _UNKNOWN
    return others, not wrong


@compiled
def _pack_unknown(truth: Bytes, pred: Bytes, inside: Range, first: int, unknown: Words) -> None:
    years, _, width = truth.shape
    for t in range(years):
        for y in range(*inside):
            for k in range(2):
                row = truth[t, y] if k == 0 else pred[t, y]
                for x in range(width):
                    if row[x] == _UNKNOWN:
                        unknown[k, t, 1 + x // 64, y - first] |= _1 << np.uint64(x % 64)


@compiled
def _boundaries(
    mine: Words, unknown: Words, outside: Words, own: Words, high: int, sums: Sums
) -> None:
    """Count the edge pixels of truth and prediction, and those near the other's edges."""
    _, years, size = mine.shape
    blank, edges, spare = outside, np.zeros((2, size), np.uint64), np.empty(high, np.uint64)
    starts, ends = np.zeros((2, size // high), np.intp), np.zeros((2, size // high), np.intp)
    for t in range(years):
        if unknown.size:
            blank = outside | unknown[0, t] | unknown[1, t]
        for k in range(2):
            bits, out = mine[k, t], edges[k]
            for w in range(1, size // high - 1):
                out[starts[k, w] : ends[k, w]] = 0
                starts[k, w], ends[k, w] = _span(bits, w * high + 1, (w + 1) * high - 1)
                _edges(bits, blank, high, starts[k, w], ends[k, w], out)
        for k in range(2):
            its, others = edges[k], edges[1 - k]
            for w in range(1, size // high - 1):
                at, end = (
                    max(starts[k, w], w * high + MARGIN_PX),
                    min(ends[k, w], (w + 1) * high - MARGIN_PX),
                )
                some, near = _near(its, own, high, at, end, others, spare)
                sums.edges[2 - 2 * k, t] += np.int64(some)
                sums.edges[3 - 2 * k, t] += np.int64(near)


@compiled
def _span(mine: Words, at: int, end: int) -> Range:
    """Return the first word with a mine, and one past the last."""
    while at < end and not mine[at]:
        at += 1
    while end > at and not mine[end - 1]:
        end -= 1
    return at, end


@compiled
def _edges(mine: Words, blank: Words, high: int, at: int, end: int, edges: Words) -> None:
    """Mark known mine pixels with a known non-mine pixel among their four neighbours."""
    side = np.uint64(high)
    for i in range(np.uint64(at), np.uint64(end)):
        full = mine[i] | blank[i]
        inner = (mine[i - _1] | blank[i - _1]) & (mine[i + _1] | blank[i + _1])
        inner &= full << _1 | (mine[i - side] | blank[i - side]) >> _63
        inner &= full >> _1 | (mine[i + side] | blank[i + side]) << _63
        edges[i] = full & ~inner & ~blank[i]


@compiled
def _near(
    edges: Words, own: Words, high: int, at: int, end: int, others: Words, spare: Words
) -> tuple[np.uint64, np.uint64]:
    """Count own edge pixels, and those near the other's edge pixels.

    Near means a distance of centres up to BOUNDARY_PX = 3. In the same row this is 3 pixels to each
    side. In the two rows above and below it is 2. In the third row it is the pixel straight above
    or below.
    """
    some = near = _0
    if at >= end:
        return some, near
    side, first = np.uint64(high), np.uint64(at - 2)
    for i in range(first, np.uint64(end + 2)):
        bits, west, east = others[i], others[i - side], others[i + side]
        two = bits | bits << _1 | bits << _2 | west >> _63 | west >> _62
        spare[i - first] = two | bits >> _1 | bits >> _2 | east << _63 | east << _62
    for i in range(np.uint64(at), np.uint64(end)):
        j = i - first
        close = (
            spare[j - _2]
            | spare[j - _1]
            | spare[j]
            | spare[j + _1]
            | spare[j + _2]
            | others[i - _3]
            | others[i + _3]
        )
        close |= (
            others[i] << _3 | others[i - side] >> _61 | others[i] >> _3 | others[i + side] << _61
        )
        its = edges[i] & own[i]
        some += _size(its)
        near += _size(its & close)
    return some, near


@compiled
def _changes(mine: Words, unknown: Words, own: Words, part: int, sums: Sums) -> None:
    """Count own pixels alike in all years, truth and prediction, and pass on the rest.

    `_add` counts the remaining pixels, `part` words at a time.
    """
    _, years, size = mine.shape
    some, every = mine[0, 0].copy(), mine[0, 0].copy()
    for k in range(2):
        for t in range(years):
            bits = mine[k, t]
            for i in range(size):
                some[i] |= bits[i]
                every[i] &= bits[i]
            if unknown.size:
                some |= unknown[k, t]
    alike = always = _0
    for i in range(size):
        always += _size(every[i] & own[i])
        some[i] &= own[i] & ~every[i]
        alike += _size(own[i] & ~some[i])
    sums.alike[0] += np.int64(alike)
    sums.alike[1] += np.int64(always)
    truth, pred = np.empty((years, part), np.uint64), np.empty((years, part), np.uint64)
    mapped, known = np.empty((years, part), np.uint64), np.empty((years, part), np.uint64)
    n = 0
    for i in range(size):
        if some[i]:
            for t in range(years):
                mapped[t, n] = known[t, n] = some[i]
                if unknown.size:
                    mapped[t, n] &= ~unknown[0, t, i]
                    known[t, n] = mapped[t, n] & ~unknown[1, t, i]
                truth[t, n], pred[t, n] = mine[0, t, i] & mapped[t, n], mine[1, t, i] & known[t, n]
            n += 1
        if n == part or (n and i == size - 1):
            _add(truth, pred, mapped, known, n, sums)
            n = 0


@compiled
def _add(truth: Words, pred: Words, mapped: Words, known: Words, n: int, sums: Sums) -> None:
    """Count bits [year, word], and add them to the sums.

    `truth` has mine bits among those with known truth (`mapped`). `pred` has mine bits among those
    with both known (`known`).
    """
    years = len(truth)
    ever, always = np.zeros(n, np.uint64), ~np.zeros(n, np.uint64)
    for t in range(years):
        y, m, k = truth[t], mapped[t], known[t]
        for w in range(n):
            ever[w] |= y[w]
            always[w] &= y[w] | ~m[w]
            y[w] &= k[w]
    changing = ever & ~always
    for t in range(years):
        y, p = truth[t], pred[t]
        true = drawn = both = both_changing = either_changing = _0
        for w in range(n):
            true += _size(y[w])
            drawn += _size(p[w])
            both += _size(y[w] & p[w])
            both_changing += _size(y[w] & p[w] & changing[w])
            either_changing += _size((y[w] | p[w]) & changing[w])
        for c, size in enumerate((true, drawn, both)):
            sums.years[c, t] += np.int64(size)
        for c, size in enumerate((both_changing, either_changing)):
            sums.tubes[c] += np.int64(size)
    for i in range(years):
        for j in range(i, years):
            sizes = _pair(
                truth[i], truth[j], pred[i], pred[j], mapped[i], mapped[j], known[i], known[j], n
            )
            for c, size in enumerate(sizes):
                sums.pairs[i, j, c] += np.int64(size)
    _through(truth, pred, known, n, sums)


@compiled
def _pair(
    y0: Words, y1: Words, p0: Words, p1: Words, m0: Words, m1: Words, k0: Words, k1: Words, n: int
) -> tuple[np.uint64, ...]:
    """Count the fields of `Pair` for two years, the second the same or later.

    Separate arrays take a quarter less time than parts of one array for noisy pixels.
    """
    every = mapped = new = gone = new_said = gone_said = new_new = new_gone = gone_new = (
        gone_gone
    ) = _0
    for w in range(n):
        known = k0[w] & k1[w]
        moves, said = (y0[w] ^ y1[w]) & known, (p0[w] ^ p1[w]) & known
        came, went, came_said, went_said = moves & y1[w], moves & y0[w], said & p1[w], said & p0[w]
        every += _size(known)
        mapped += _size(m0[w] & m1[w])
        new += _size(came)
        gone += _size(went)
        new_said += _size(came_said)
        gone_said += _size(went_said)
        new_new += _size(came & came_said)
        new_gone += _size(came & went_said)
        gone_new += _size(went & came_said)
        gone_gone += _size(went & went_said)
    new_same, gone_same = new - new_new - new_gone, gone - gone_new - gone_gone
    same_new, same_gone = new_said - new_new - gone_new, gone_said - new_gone - gone_gone
    same_same = every - new - gone - same_new - same_gone
    return (
        new_new,
        new_same,
        new_gone,
        gone_new,
        gone_same,
        gone_gone,
        same_new,
        same_same,
        same_gone,
        mapped - every,
    )


@compiled
def _through(truth: Words, pred: Words, known: Words, n: int, sums: Sums) -> None:
    """Count steps from each year to the next, and windows without change."""
    years = len(truth)
    still, kept = np.empty((years, n), np.uint64), np.empty((years, n), np.uint64)
    for t in range(1, years):
        y0, y1, p0, p1 = truth[t - 1], truth[t], pred[t - 1], pred[t]
        k0, k1, steady, lasting = known[t - 1], known[t], still[t], kept[t]
        n0 = n1 = n2 = n3 = n4 = n5 = _0
        for w in range(n):
            alike = k0[w] & k1[w]
            moves, said = (y0[w] ^ y1[w]) & alike, (p0[w] ^ p1[w]) & alike
            steady[w], lasting[w] = alike & ~moves, alike & ~moves & ~said
            n0 += _size(moves & said)
            n1 += _size(moves | said)
            n2 += _size(moves & y1[w] & p1[w])
            n3 += _size(moves & y1[w] & ~p1[w])
            n4 += _size(moves & ~y1[w] & p1[w])
            n5 += _size(moves & ~y1[w] & ~p1[w])
        for c, size in enumerate((n0, n1, n2, n3, n4, n5)):
            sums.steps[c] += np.int64(size)
    so_far, kept_so_far = np.empty(n, np.uint64), np.empty(n, np.uint64)
    for first in range(years - 1):
        for w in range(n):
            so_far[w] = kept_so_far[w] = ~_0
        for last in range(first + 1, years):
            steady, lasting = still[last], kept[last]
            one = other = _0
            for w in range(n):
                so_far[w] &= steady[w]
                kept_so_far[w] &= lasting[w]
                one += _size(so_far[w])
                other += _size(kept_so_far[w])
            sums.windows[0, first, last] += np.int64(one)
            sums.windows[1, first, last] += np.int64(other)
