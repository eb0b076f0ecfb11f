"""Pixels -> counts, at about the speed at which they come from memory.

Eight years of a pixel lie in the bits of one byte (a lane), the first year highest. What is done to a byte is done to eight
years, and a neighbour in y or x is a slice away: boundaries need no loop over years. Of most pixels all years are alike, in
truth and in prediction: they are counted once. The others, in words of eight, are turned into one row of bits a year, and all
pairs of years come from the numbers of pixels that two rows have in common (`_joint`). Rows in which there is no mine are only
looked at. None of this is an approximation.
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
"""Rows at a time: their planes, lanes and boundaries stay in the processor's cache."""
_WORDS = 2048
"""Words of bits at a time, likewise."""
_FULL = np.uint8(255)
_EIGHT = [np.uint64(0x0101010101010101 << bit) for bit in range(8)]
"""That bit of eight pixels."""

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
    rows, columns = (range(n)[s] for n, s in zip(p.shape[1:], core or (slice(None), slice(None)), strict=True))
    sums = _Sums.zero(len(years))
    left = [sums.add(band) for band in _bands(p, y, rows, columns)]
    if left:
        sums.through_time(left)
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


@dataclass(frozen=True)
class _Band:
    """Some rows, MARGIN_PX of context around them, as lanes; rows flat, with a gap at their end, so that a pixel's neighbours
    are at +-1 and +- one row, and none is in another row."""

    row: int
    """Pixels of a row and its gap."""
    lanes: Bytes
    """(2 or 4, lane, pixel): truth and prediction (1 mine), and where some are not known, those of each that are not."""
    site: Bytes
    """(pixel): 255 where there is a site, 0 in gaps and beyond its edges."""
    core: Bytes | None
    """(pixel) without the rows of context: 255 where pixels are to be counted; None if only gaps are not."""


def _bands(p: Bytes, y: Bytes, rows: range, columns: range) -> Iterator[_Band]:
    height, width = p.shape[1:]
    for first in range(rows.start, rows.stop, _BAND_PX):
        last = min(first + _BAND_PX, rows.stop)
        top, bottom = max(first - MARGIN_PX, 0), min(last + MARGIN_PX, height)
        stacks = [y[:, top:bottom], p[:, top:bottom]]
        ever = [_ever(stack, what) for stack, what in zip(stacks, ("truth", "prediction"), strict=True)]
        any_year = np.bitwise_or.reduce(ever[0] | ever[1], axis=0)
        there = np.flatnonzero(any_year)
        if not len(there):
            continue
        # Beyond these columns nothing is a mine in any year, and all is known.
        left, right = max(int(there[0]) - 1, 0), min(int(there[-1]) + 2, width)
        stacks = [stack[:, :, left:right] for stack in stacks]
        # Bit 0 of a pixel says mine or unknown, bit 7 unknown.
        unknown = any_year.max() > 1
        planes = [s & np.uint8(1) for s in stacks] + [s >> np.uint8(7) for s in stacks] if unknown else stacks
        row = -(-(right - left + MARGIN_PX) // 8) * 8
        frame = (last - first + 2 * MARGIN_PX, row)
        at = slice(top - first + MARGIN_PX, bottom - first + MARGIN_PX), slice(0, right - left)
        lanes = np.zeros((len(planes), -(-len(p) // 8), *frame), np.uint8)
        for plane, lane in zip(planes, lanes, strict=True):
            _fill(lane, plane, at)
        site = np.zeros(frame, np.uint8)
        site[at] = _FULL
        core = None
        if columns.start > left or columns.stop < right:
            core = np.zeros((last - first, row), np.uint8)
            core[:, max(columns.start - left, 0) : max(min(columns.stop, right) - left, 0)] = _FULL
            core = core.reshape(-1)
        yield _Band(row, lanes.reshape(*lanes.shape[:2], -1), site.reshape(-1), core)


def _ever(stack: NDArray[np.generic], what: str) -> Bytes:
    """(y, x): 0 where no year has a mine, more than 1 where one is unknown; raises ModelError for what is no footprint."""
    ever: Bytes = np.bitwise_or.reduce(stack, axis=0)
    if ever.dtype != np.uint8 or ever.max(initial=0) > 1:
        if (stack != 0).any() and not np.isin(stack, (0, 1, UNKNOWN)).all():
            raise ModelError(f"the {what} holds values other than 0, 1 and {UNKNOWN} (unknown); threshold probabilities first")
        ever = ever.astype(np.uint8)
    return ever


def _fill(lanes: Bytes, stack: Bytes, at: tuple[slice, slice]) -> None:
    """Put (year, y, x) of 0 and 1 at their place in (lane, y, x), which are 0. A lane of fewer than eight years repeats its
    first in the bits above."""
    for n, lane in enumerate(lanes):
        inside = lane[at]
        np.negative(stack[8 * n], out=inside, dtype=np.uint8, casting="unsafe")
        for plane in stack[8 * n + 1 : 8 * n + 8]:
            np.add(lane, lane, out=lane)
            np.bitwise_or(inside, plane, out=inside, casting="unsafe")


def _bit(year: int, years: int) -> tuple[int, int]:
    """Lane and bit, 0 the lowest, of a year."""
    lane = year // 8
    return lane, min(8, years - 8 * lane) - 1 - year % 8


def _edges(x: Bytes, known: Bytes, row: int) -> Bytes:
    """Of lanes (lane, pixel): known, x, and of its four neighbours one that is not x."""
    edges = np.zeros_like(x)
    inner = x[:, row - 1 : -row - 1] & x[:, row + 1 : x.shape[1] - row + 1]
    inner &= x[:, : -2 * row]
    inner &= x[:, 2 * row :]
    np.bitwise_and(x[:, row:-row], ~inner, out=edges[:, row:-row])
    edges &= known
    return edges


def _near(edges: Bytes, row: int) -> Bytes:
    """All pixels, without the rows of context, whose centre lies within BOUNDARY_PX = 3 of an edge pixel's: 3 to the sides in
    the edge's own row, 2 in the two rows on either side, and the one above and below at 3."""
    size = edges.shape[1]
    one = edges.copy()
    one[:, 1:] |= edges[:, :-1]
    one[:, :-1] |= edges[:, 1:]
    two = np.zeros_like(edges)
    np.bitwise_or(one[:, 2:], one[:, :-2], out=two[:, 1:-1])
    middle = slice(MARGIN_PX * row, size - MARGIN_PX * row)
    near = two[:, middle.start - 1 : middle.stop - 1] | two[:, middle.start + 1 : middle.stop + 1]
    for away, reach in ((1, two), (2, two), (3, edges)):
        near |= reach[:, middle.start - away * row : middle.stop - away * row]
        near |= reach[:, middle.start + away * row : middle.stop + away * row]
    return near


def _by_year(lanes: Words, years: int) -> Ints:
    """(part, lane, words of eight pixels) -> (part, year): how many pixels have the year's bit."""
    found = np.zeros((len(lanes), years), np.int64)
    for year in range(years):
        lane, bit = _bit(year, years)
        found[:, year] = _sizes(lanes[:, lane] & _EIGHT[bit])
    return found


@dataclass
class _Sums:
    years: int
    left: int
    """Pixels that are not alike in all years."""
    joint: Ints
    """(year, year, 4, 4) from the earlier to the later or the same year: pixels known in both, by 2 * truth + prediction."""
    edges: Ints
    """(4, year): the last four of Mapped."""
    unmapped: Ints
    """(year, year): truth known in both, prediction not."""
    tubes: Ints
    windows: Ints
    """(2, year, year), first and last."""
    steady: Ints
    """(4): pixels that are alike in all years, by 2 * truth + prediction; but for those that never were a mine."""

    @classmethod
    def zero(cls, years: int) -> _Sums:
        shapes = ((years, years, 4, 4), (4, years), (years, years), (2,), (2, years, years), (4,))
        return cls(years, 0, *(np.zeros(shape, np.int64) for shape in shapes))

    def add(self, band: _Band) -> Bytes:
        """Count the band's boundaries, and its pixels that are alike in all years; return the lanes of the others."""
        lanes, margin = band.lanes, MARGIN_PX * band.row
        known, blank = band.site, ~band.site
        if len(lanes) > 2:
            unknown = lanes[2] | lanes[3]
            known, blank = known & ~unknown, blank | unknown
        true, drawn = (_edges(lane | blank, known, band.row) for lane in lanes[:2])
        inner = lanes[:, :, margin:-margin]
        if true.any() or drawn.any():
            near = [_near(drawn, band.row), _near(true, band.row)]
            true, drawn = true[:, margin:-margin], drawn[:, margin:-margin]
            if band.core is not None:
                true, drawn = true & band.core, drawn & band.core
            any_year = np.bitwise_or.reduce(true | drawn, axis=0)
            words = np.flatnonzero(any_year.view(np.uint64) != 0)
            true8, drawn8, near_drawn, near_true = (np.take(e.view(np.uint64), words, axis=1) for e in (true, drawn, *near))
            self.edges += _by_year(np.stack([drawn8, drawn8 & near_true, true8, true8 & near_drawn]), self.years)
        if band.core is not None:
            inner = inner & band.core
        # Alike in all years: its first lane is 0 or 255, and so are the others.
        (true0, *others), (drawn0, *more) = inner[:2]
        moves = ((true0 + np.uint8(1)) | (drawn0 + np.uint8(1))) & np.uint8(254)
        for lane, first in [*((o, true0) for o in others), *((o, drawn0) for o in more)]:
            moves |= lane ^ first
        for lane in inner[2:].reshape(-1, len(moves)):
            moves |= lane
        words = np.flatnonzero(moves.view(np.uint64) != 0)
        moving: Bytes = np.take(inner.view(np.uint64), words, axis=2).view(np.uint8)
        moving = np.compress(moves.view(np.uint64)[words].view(np.uint8) != 0, moving, axis=2)
        self.left += moving.shape[2]
        self.steady[1:] += _cells(true0, drawn0) - _cells(moving[0, 0], moving[1, 0])
        return moving

    def through_time(self, lanes: Sequence[Bytes]) -> None:
        """Count what changes in the pixels of lanes (2 or 4, lane, pixel)."""
        kinds = max(len(part) for part in lanes)
        whole = np.zeros((kinds, lanes[0].shape[1], sum(part.shape[2] for part in lanes)), np.uint8)
        at = 0
        for part in lanes:
            whole[: len(part), :, at : at + part.shape[2]] = part
            at += part.shape[2]
        for at in range(0, whole.shape[2], 64 * _WORDS):
            self._through_time(whole[:, :, at : at + 64 * _WORDS])

    def _through_time(self, lanes: Bytes) -> None:
        here = _packed(np.full(lanes.shape[2], _FULL))
        y, p, *unknown = (self._rows(of) for of in lanes)
        true, not_true, known = y, here & ~y, None
        if unknown:
            known = here & ~(unknown[0] | unknown[1])
            true, not_true = y & ~unknown[0], not_true & ~unknown[0]
            y, p = y & known, p & known
        joint = _joint(y, p, known, here)
        self.joint += joint
        if unknown:
            self.unmapped += _common(here & ~unknown[0]) - joint.sum(axis=(2, 3))
        changing = np.bitwise_or.reduce(true, axis=0) & np.bitwise_or.reduce(not_true, axis=0)
        self.tubes += [_sizes(y & p & changing).sum(), _sizes((y | p) & changing).sum()]
        self._windows(y, p, np.broadcast_to(here, y.shape) if known is None else known)

    def _rows(self, lanes: Bytes) -> Words:
        """(lane, pixel) -> (year, words): a bit a pixel."""
        rows = []
        for year in range(self.years):
            lane, bit = _bit(year, self.years)
            rows.append(_packed(lanes[lane] & np.uint8(1 << bit)))
        return np.stack(rows)

    def _windows(self, y: Words, p: Words, known: Words) -> None:
        alike = known[1:] & known[:-1]
        truth, both = alike & ~(y[1:] ^ y[:-1]), alike & ~(y[1:] ^ y[:-1]) & ~(p[1:] ^ p[:-1])
        steps = truth, both
        for long in range(1, self.years):
            first = np.arange(self.years - long)
            for n, rows in enumerate((truth, both)):
                self.windows[n, first, first + long] += _sizes(rows)
            truth, both = (rows[:-1] & step[long:] for rows, step in zip((truth, both), steps, strict=True))

    def scores(self, years: Sequence[int], pixels: int) -> Scores:
        """All of it, for a block of so many pixels."""
        steady = self.steady.copy()
        steady[0] = pixels - self.left - steady.sum()
        joint = self.joint + np.triu(np.ones((self.years, self.years), np.int64))[:, :, None, None] * np.diag(steady)
        windows = self.windows + steady.sum()
        named = [int(year) for year in years]
        mapped, pairs, spans = {}, {}, {}
        of_pairs = np.concatenate(
            [joint.reshape(self.years, self.years, 16) @ _PAIR, self.unmapped[..., None]], axis=-1
        ).tolist()
        lasting, unmapped, edges = windows.tolist(), self.unmapped.diagonal().tolist(), self.edges.T.tolist()
        for i, first in enumerate(named):
            tn, fp, fn, tp = joint[i, i].diagonal().tolist()
            mapped[first] = Mapped(tp, fp, fn, tn, unmapped[i], *edges[i])
            for j, second in enumerate(named[i + 1 :], start=i + 1):
                pairs[first, second] = Pair(*of_pairs[i][j])
                spans[first, second, j - i + 1] = Window(lasting[0][i][j], lasting[1][i][j])
        steps = Steps(*(joint.diagonal(1).sum(axis=-1).ravel() @ _STEP).tolist())
        tp, either = (sum(n) for n in zip(*((m.tp, m.tp + m.fp + m.fn) for m in mapped.values()), strict=True))
        c_both, c_either = (int(n) for n in self.tubes)
        return Scores(mapped, pairs, Tubes(tp - c_both, either - c_either, c_both, c_either), steps, spans)


def _packed(values: Bytes) -> Words:
    """Pixels -> words of bits, set where they are not zero."""
    packed = np.packbits(values)
    return np.pad(packed, (0, -len(packed) % 8)).view(np.uint64)


def _sizes(rows: NDArray[Any]) -> Ints:
    """Bits set in each row."""
    sizes: Ints = np.bitwise_count(rows).sum(axis=-1, dtype=np.int64)
    return sizes


def _common(rows: Words) -> Ints:
    """(year, year), the first the earlier or the same: bits set in both."""
    common = np.zeros((len(rows), len(rows)), np.int64)
    for i, row in enumerate(rows):
        common[i, i:] = _sizes(row & rows[i:])
    return common


def _joint(y: Words, p: Words, known: Words | None, here: Words) -> Ints:
    """`_Sums.joint` of (year, words): by inclusion and exclusion from how many pixels any two rows have in common, of those
    known, mine in truth, in prediction and in both. Where `known` is None all pixels `here` are."""
    rows = np.stack([y, p, y & p] if known is None else [known, y, p, y & p])
    kinds, years = rows.shape[:2]
    common = np.zeros((years, years, 4, 4), np.int64)
    for i in range(years):
        shared = _sizes(rows[:, None, i, None] & rows[None, :, i:])  # (kind, kind, year)
        common[i, i:, 4 - kinds :, 4 - kinds :] = shared.transpose(2, 0, 1)
    if known is None:
        single = common[range(years), range(years)].diagonal(axis1=1, axis2=2).copy()
        single[:, 0] = _sizes(here)
        common[:, :, 0, :], common[:, :, :, 0] = single[None], single[:, None]
        common *= np.triu(np.ones((years, years), np.int64))[:, :, None, None]
    # Rows: neither, prediction alone, truth alone, both; columns: known, truth, prediction, both.
    apart = np.array([[1, -1, -1, 1], [0, 0, 1, -1], [0, 1, 0, -1], [0, 0, 0, 1]])
    joint: Ints = apart @ common @ apart.T
    return joint


_TRUTH, _PRED = np.divmod(np.arange(4), 2)
_MOVES = 3 * (1 - (_TRUTH[None] - _TRUTH[:, None])) + 1 - (_PRED[None] - _PRED[:, None])
"""(first, second year): 3 * truth + prediction, each 0 new, 1 same, 2 gone."""
_PAIR = (_MOVES.reshape(16, 1) == [0, 1, 2, 6, 7, 8, 3, 4, 5]).astype(np.int64)
"""Joint counts -> Pair, without the last."""
_STEP = np.stack(
    [
        (_TRUTH[None] != _TRUTH[:, None]) & (_PRED[None] != _PRED[:, None]),
        (_TRUTH[None] != _TRUTH[:, None]) | (_PRED[None] != _PRED[:, None]),
        *((_TRUTH[None] != _TRUTH[:, None]) & (np.arange(4) == after) for after in (3, 2, 1, 0)),
    ],
    axis=-1,
).reshape(16, 6)
"""Joint counts -> Steps."""


def _cells(truth: Bytes, pred: Bytes) -> Ints:
    """Pixels by 2 * truth + prediction of the first year, the highest bit, but for 0."""
    first, second, both = (np.count_nonzero(lane & np.uint8(128)) for lane in (truth, pred, truth & pred))
    return np.array([second - both, first - both, both])
