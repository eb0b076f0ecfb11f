"""Pixels -> counts, without a look at most pixels but the first.

What is a mine in no year, or in all, in truth and in prediction, is counted and left. Where there is something, pixels are
packed into bits, as they lie in memory, and around the rest words of 64 bits are taken out of them, a row of words a year, so
that an operation on a word is done to all its pixels. A word holds 48 pixels and 4 on either side, which are those of its
neighbours, and 8 bits that are not used: boundaries need nothing but shifts, and the words above and below. Counts of
pairs of years come from the numbers of bits that rows of words have in common. None of this is an approximation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from minecube.errors import ModelError
from minecube.metrics.states import BOUNDARY_PX, UNKNOWN, Mapped, Pair, Scores, Steps, Tubes, Window

MARGIN_PX = BOUNDARY_PX + 1
"""What a block's boundary pixels depend on around it."""
_BAND_PX = 128
"""Rows that are looked at, then packed if there is something: what is between stays in the processor's cache. A
multiple of eight, so that each band begins with a byte of bits."""
_WORDS = 4096
"""Words at a time: many enough that most sites take one go, few enough for the same cache."""
_STEP_PX = 48
"""Pixels of a word that are its own: with the margins 56, and those can begin at any bit of the first of eight bytes."""
_ONE = np.uint64(1)

Bytes = NDArray[np.uint8]
Words = NDArray[np.uint64]
Ints = NDArray[np.int64]


def count(
    pred: Bytes | xr.DataArray,
    truth: Bytes | xr.DataArray,
    years: Sequence[int],
    *,
    core: tuple[slice, slice] | None = None,
) -> Scores:
    """The counts of one site, or of one block of it.

    Args:
        pred: (year, y, x): 1 mine, 0 not, 255 unknown.
        truth: Likewise.
        years: Ascending; of both arrays.
        core: Which (y, x) pixels to count; the others are context. A block's counts add up to those of its site, to the last
            boundary pixel, if the arrays reach MARGIN_PX beyond the block on all sides where the site does.

    Raises:
        ModelError: shapes or years differ, or a value is none of 0, 1, 255 (a probability, say).
    """
    p, y = stack_of(pred, "prediction", years), stack_of(truth, "truth", years)
    if p.shape != y.shape:
        raise ModelError(f"prediction has shape {p.shape}, truth {y.shape}; scores need the same years on the same grid")
    p, y = _footprints(p, "prediction"), _footprints(y, "truth")
    rows, columns = (range(n)[s] for n, s in zip(p.shape[1:], core or (slice(None), slice(None)), strict=True))
    sums = _Sums.zero(len(years))
    if len(rows) and len(columns):
        words = _busy(p, y, rows, columns)
        sums.always = words.always
        for part in words.parts():
            sums.add(part)
    return sums.scores(years, len(rows) * len(columns))


def stack_of(stack: Bytes | xr.DataArray, what: str, years: Sequence[int]) -> Bytes:
    """The pixels as (year, y, x); raises ModelError unless they are of these years, ascending."""
    if isinstance(stack, xr.DataArray):
        stack = stack.transpose("year", "y", "x")
        found = stack["year"].to_numpy().tolist() if "year" in stack.coords else list(years)
        if found != list(years):
            raise ModelError(f"the {what} has the years {found}, expected {list(years)}; one year would be scored as another")
    values = np.asarray(stack)
    if values.ndim != 3 or len(values) != len(years) or list(years) != sorted(set(years)) or not len(years):
        raise ModelError(
            f"the {what} has shape {values.shape} for the years {list(years)}; expected (year, y, x) and ascending years"
        )
    return values


def _footprints(stack: NDArray[Any], what: str) -> Bytes:
    """As bytes; bytes themselves are checked where they are packed."""
    if stack.dtype != np.uint8:
        _check(stack, what)
        stack = stack.astype(np.uint8)
    return stack


def _check(stack: NDArray[Any], what: str) -> None:
    """Raises ModelError for what is no footprint."""
    if ((stack != 0) & (stack != 1) & (stack != UNKNOWN)).any():
        raise ModelError(f"the {what} holds values other than 0, 1 and {UNKNOWN} (unknown); threshold probabilities first")


@dataclass(frozen=True)
class _Words:
    """Words whose pixels are not all alike, and up to MARGIN_PX of those above and below each, column by column of words, so
    that a word's neighbours are beside it. Lowest bit leftmost."""

    bits: Words
    """(2 or 4, year, word): truth and prediction (1 mine), and where some are not known, those of each that are not."""
    site: Words
    """(word): where there is a site."""
    own: Words
    """(word): which pixels are to be counted."""
    moves: Words
    """(word): which of them are not alike in all years, in truth and prediction."""
    always: int
    """Pixels to be counted that are mine in all years, in truth and prediction; in all words, these or not."""

    def parts(self) -> Iterator[_Words]:
        """A few words at a time, and what is beside them."""
        for first in range(0, len(self.own), _WORDS):
            last = min(first + _WORDS, len(self.own))
            start, stop = max(first - MARGIN_PX, 0), last + MARGIN_PX
            own, moves = np.zeros((2, min(stop, len(self.own)) - start), np.uint64)
            own[first - start : last - start] = self.own[first:last]
            moves[first - start : last - start] = self.moves[first:last]
            yield _Words(self.bits[:, :, start:stop], self.site[start:stop], own, moves, 0)


def _packed(p: Bytes, y: Bytes, rows: range) -> Bytes:
    """(2 or 4, year, byte), as `_Words.bits`: pixels of those rows, eight bytes before and after them."""
    years, _, width = p.shape
    shape = 2, years, 16 + -(-len(rows) * width // 8)
    frame, unknown = np.zeros(shape, np.uint8), None
    ever = np.empty((min(_BAND_PX, len(rows)), width), np.uint8)
    for top in range(rows.start, rows.stop, _BAND_PX):
        stacks = [stack[:, top : min(top + _BAND_PX, rows.stop)] for stack in (y, p)]
        ever = ever[: stacks[0].shape[1]]
        np.bitwise_or(stacks[0][0], stacks[1][0], out=ever)
        for stack in stacks:
            for plane in stack[1:]:
                np.bitwise_or(ever, plane, out=ever)
        most = ever.max()
        if not most:
            continue
        start = 8 + (top - rows.start) * width // 8
        place = (..., slice(start, start + -(-ever.size // 8)))
        stacks = [stack.reshape(years, -1) for stack in stacks]
        if most > 1:
            for stack, what in zip(stacks, ("truth", "prediction"), strict=True):
                _check(stack, what)
            unknown = np.zeros(shape, np.uint8) if unknown is None else unknown
            for of, stack in zip(unknown[place], stacks, strict=True):
                of[:] = np.packbits(stack >> np.uint8(7), axis=-1, bitorder="little")
            stacks = [stack & np.uint8(1) for stack in stacks]
        for of, stack in zip(frame[place], stacks, strict=True):
            of[:] = np.packbits(stack, axis=-1, bitorder="little")
    return frame if unknown is None else np.concatenate([frame, unknown])


def _words(packed: Bytes, place: Ints, site: Words) -> Words:
    """Of bits (..., byte) the words that begin at a bit, and of them the pixels of the site: (..., *place.shape)."""
    byte, shift = place >> 3, (place & 7).astype(np.uint64)
    words = np.empty((*packed.shape[:-1], *place.shape), np.uint64)
    for of in np.ndindex(packed.shape[:-1]):
        words[of] = np.ndarray(packed.shape[-1] - 7, np.uint64, packed[of], strides=(1,))[byte]
    words >>= shift
    words &= site
    return words


def _busy(p: Bytes, y: Bytes, rows: range, columns: range) -> _Words:
    """Those words that are worth more than a look."""
    _, height, width = p.shape
    first, last = max(rows.start - MARGIN_PX, 0), min(rows.stop + MARGIN_PX, height)
    frame = _packed(p, y, range(first, last))
    planes = frame[:2].reshape(-1, frame.shape[2])
    some, all_ = np.bitwise_or.reduce(planes, axis=0), np.bitwise_and.reduce(planes, axis=0)
    for unknown in frame[2:].reshape(-1, frame.shape[2]):
        some |= unknown
        all_ &= ~unknown
    left = np.arange(0, width, _STEP_PX) - MARGIN_PX
    x, bit = left[:, None] + np.arange(64), np.arange(64)
    inside = (x >= 0) & (x < width) & (bit < 64 - 8)
    core = (x >= columns.start) & (x < columns.stop) & (bit >= MARGIN_PX) & (bit < MARGIN_PX + _STEP_PX)
    across, own = (np.packbits(of, axis=1, bitorder="little").view(np.uint64)[:, 0] for of in (inside, core))
    down = np.arange(rows.start - MARGIN_PX, rows.stop + MARGIN_PX)
    site = np.where(((down >= 0) & (down < height))[:, None], across, np.uint64(0))
    place = 64 + (np.clip(down, first, last - 1) - first)[:, None] * width + left
    some, all_ = _words(some, place, site), _words(all_, place, site)
    # Nothing moves, and there is no boundary, where a pixel is never a mine, or always with all its neighbours.
    calm = all_ | ~site
    middle = calm[1:-1]
    still = middle & calm[2:] & calm[:-2] & middle << _ONE & middle >> _ONE
    inner = slice(MARGIN_PX, -MARGIN_PX)
    busy = np.zeros(some.shape, np.bool_)
    busy[inner] = some[inner] & ~still[MARGIN_PX - 1 : 1 - MARGIN_PX] & own
    near = busy.copy()
    for away in range(1, MARGIN_PX + 1):
        near[away:] |= busy[:-away]
        near[:-away] |= busy[away:]
    column, row = np.nonzero(near.T)
    place, site = place[row, column], site[row, column]
    own_bits = np.where(busy[row, column], own[column], np.uint64(0))
    always = int(_sizes(all_[inner] & own).sum())
    return _Words(_words(frame, place, site), site, own_bits, (some & ~all_)[row, column] & own_bits, always)


def _edges(x: Words, blank: Words) -> Words:
    """Of bits (..., year, word): mine, and of the four neighbours one that is not; both known."""
    mine = x | blank
    edges = np.zeros_like(mine)
    inner = mine[..., 2:] & mine[..., :-2]
    middle = mine[..., 1:-1]
    inner &= middle << _ONE
    inner &= middle >> _ONE
    np.bitwise_and(middle, ~inner, out=edges[..., 1:-1])
    edges &= ~blank
    return edges


def _near(edges: Words) -> Words:
    """All pixels whose centre lies within BOUNDARY_PX = 3 of an edge pixel's: 3 to the sides in the edge's own row, 2 in the
    two rows on either side, and the one above and below at 3."""
    two = edges
    for _ in range(2):
        two = two | two << _ONE | two >> _ONE
    near = two << _ONE
    near |= two >> _ONE
    for away, reach in ((1, two), (2, two), (3, edges)):
        near[..., away:] |= reach[..., :-away]
        near[..., :-away] |= reach[..., away:]
    return near


@dataclass
class _Sums:
    years: int
    left: int
    """Pixels that are not alike in all years, in truth and prediction."""
    always: int
    """Pixels that are mine in all years, in truth and prediction."""
    known: Ints
    """(year, year), of `left`: known in both; and those whose truth is, if not the prediction."""
    unmapped: Ints
    single: Ints
    """(3, year): mine in truth, in prediction, in both."""
    moved: Ints
    """(8, year, year): see _PAIR."""
    steps: Ints
    edges: Ints
    """(4, year): the last four of Mapped."""
    tubes: Ints
    windows: Ints
    """(2, year, year), first and last."""

    @classmethod
    def zero(cls, n: int) -> _Sums:
        shapes = ((n, n), (n, n), (3, n), (8, n, n), (6,), (4, n), (2,), (2, n, n))
        return cls(n, 0, 0, *(np.zeros(shape, np.int64) for shape in shapes))

    def add(self, words: _Words) -> None:
        """Count the boundaries of the words' own pixels, and what changes in those that are not all alike."""
        self._boundaries(words)
        # In bytes of eight pixels: those without a change are let go.
        busy = np.flatnonzero(words.moves.view(np.uint8))
        here = _taken(words.moves, busy)
        self.left += int(_sizes(here))
        y, p, *unknown = (_taken(of, busy) & here for of in words.bits)
        true, not_true, known, mapped = y, here & ~y, np.broadcast_to(here, y.shape), None
        if unknown:
            mapped = here & ~unknown[0]
            known = mapped & ~unknown[1]
            true, not_true = y & mapped, not_true & mapped
            y, p = y & known, p & known
        changing = np.bitwise_or.reduce(true, axis=0) & np.bitwise_or.reduce(not_true, axis=0)
        both = y & p
        self.single += [_sizes(rows) for rows in (y, p, both)]
        self.tubes += [_sizes(both & changing).sum(), _sizes((y | p) & changing).sum()]
        self._pairs(y, p, known, mapped)
        self._consecutive(y, p, known)

    def _boundaries(self, words: _Words) -> None:
        blank = ~words.site
        if len(words.bits) > 2:
            blank = blank | words.bits[2] | words.bits[3]
        edges = _edges(words.bits[:2], blank)
        near = _near(edges)
        edges &= words.own
        near &= edges[::-1]
        (true, drawn), (drawn_near, true_near) = _sizes(edges), _sizes(near)
        self.edges += [drawn, drawn_near, true, true_near]

    def _pairs(self, y: Words, p: Words, known: Words, mapped: Words | None) -> None:
        """Of rows without unknown pixels; `mapped` is where truth is known, None if all is."""
        buffer = np.empty((8, *y.shape), np.uint64)
        moved = np.zeros((8, self.years, self.years), np.int64)
        for i in range(self.years):
            part = buffer[:, i + 1 :]
            truth, pred, both, truth_new_pred, pred_new_truth, both_new, truth_new, pred_new = part
            np.bitwise_xor(y[i], y[i + 1 :], out=truth)
            np.bitwise_xor(p[i], p[i + 1 :], out=pred)
            if mapped is not None:
                shared = known[i] & known[i:]
                truth &= shared[1:]
                pred &= shared[1:]
                self.known[i, i:] += _sizes(shared)
                self.unmapped[i, i:] += _sizes(mapped[i] & mapped[i:]) - _sizes(shared)
            np.bitwise_and(truth, pred, out=both)
            np.bitwise_and(truth, y[i + 1 :], out=truth_new)
            np.bitwise_and(pred, p[i + 1 :], out=pred_new)
            np.bitwise_and(truth_new, pred, out=truth_new_pred)
            np.bitwise_and(pred_new, truth, out=pred_new_truth)
            np.bitwise_and(truth_new_pred, pred_new, out=both_new)
            counted = 6 if mapped is None else 8
            moved[:counted, i, i + 1 :] = _sizes(part[:counted])
        if mapped is None:
            self.known += np.triu(np.ones_like(self.known)) * _sizes(known[0])
            # All are known in both years: what is new less what is gone is what there is more of.
            for n, sizes in enumerate((_sizes(y), _sizes(p))):
                moved[6 + n] = np.triu(moved[n] + sizes - sizes[:, None], 1) // 2
        self.moved += moved

    def _consecutive(self, y: Words, p: Words, known: Words) -> None:
        """Steps and windows."""
        alike = known[1:] & known[:-1]
        truth, pred = alike & (y[1:] ^ y[:-1]), alike & (p[1:] ^ p[:-1])
        cells = [truth & y[1:] & p[1:], truth & y[1:] & ~p[1:], truth & ~y[1:] & p[1:], truth & ~y[1:] & ~p[1:]]
        self.steps += [_sizes(rows).sum() for rows in (truth & pred, truth | pred, *cells)]
        steps = np.stack([alike & ~truth, alike & ~(truth | pred)])
        lasting = steps
        for long in range(1, self.years):
            first = np.arange(self.years - long)
            self.windows[:, first, first + long] += _sizes(lasting)
            lasting = lasting[:, :-1] & steps[:, long:]

    def scores(self, years: Sequence[int], pixels: int) -> Scores:
        """All of it, for a block of so many pixels."""
        named = [int(year) for year in years]
        alike = pixels - self.left
        known = self.known + alike
        truth, pred, both = (self.single + self.always).tolist()
        pairs = (np.concatenate([known[None], self.moved]).T @ _PAIR).transpose(1, 0, 2).tolist()
        lasting, unmapped, edges = (self.windows + alike).tolist(), self.unmapped.tolist(), self.edges.T.tolist()
        mapped, moves, spans = {}, {}, {}
        for i, first in enumerate(named):
            tp, fp, fn = both[i], pred[i] - both[i], truth[i] - both[i]
            mapped[first] = Mapped(tp, fp, fn, int(known[i, i]) - tp - fp - fn, unmapped[i][i], *edges[i])
            for j, second in enumerate(named[i + 1 :], start=i + 1):
                moves[first, second] = Pair(*[*pairs[i][j], unmapped[i][j]])
                spans[first, second, j - i + 1] = Window(lasting[0][i][j], lasting[1][i][j])
        tp, either = sum(both), sum(truth) + sum(pred) - sum(both)
        c_both, c_either = self.tubes.tolist()
        tubes = Tubes(tp - c_both, either - c_either, c_both, c_either)
        return Scores(mapped, moves, tubes, Steps(*self.steps.tolist()), spans)


def _taken(words: Words, places: Ints) -> Words:
    """Those bytes of words (..., word), as words."""
    taken = np.zeros((*words.shape[:-1], -(-len(places) // 8) * 8), np.uint8)
    taken[..., : len(places)] = np.take(words.view(np.uint8), places, axis=-1)
    return taken.view(np.uint64)


def _sizes(rows: NDArray[Any]) -> Ints:
    """Bits set in each row."""
    sizes: Ints = np.bitwise_count(rows).sum(axis=-1, dtype=np.uint32).astype(np.int64)
    return sizes


_PAIR = np.array(
    [
        [0, 0, 0, 0, 0, 0, 0, 1, 0],  # known in both years
        [0, 0, 0, 0, 1, 0, 0, -1, 0],  # truth changes
        [0, 0, 0, 0, 0, 0, 0, -1, 1],  # prediction changes
        [0, 0, 0, 0, -1, 1, 0, 1, -1],  # both change
        [0, -1, 1, 0, 1, -1, 0, 0, 0],  # truth is new, prediction changes
        [0, 0, 0, 1, 0, -1, -1, 0, 1],  # prediction is new, truth changes
        [1, 0, -1, -1, 0, 1, 0, 0, 0],  # both are new
        [0, 1, 0, 0, -1, 0, 0, 0, 0],  # truth is new
        [0, 0, 0, 0, 0, 0, 1, 0, -1],  # prediction is new
    ]
)
"""Counts of a pair of years -> Pair, without the last."""
