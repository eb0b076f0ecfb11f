"""Scores of footprints through time: `count` makes additive integer states, `+` joins them, formulas come last.

Joined states of blocks, sites and machines give the scores of all their pixels together: a ratio of sums, never a mean of
ratios. A score whose denominator is zero is NaN, because nothing was there to be judged: never 0, never 1.

Unknown pixels (255) are left out, each where it matters: a pixel counts in a year if truth and prediction are known then, and
in a pair of years if they are known in both. Where truth is known but the prediction is not, the pixel is counted as
unmapped, so that a map cannot gain unseen by leaving out what is hard.

Let y be truth and p prediction, b = [y_t != y_(t-1)] and c = [p_t != p_(t-1)] with t-1 the year listed before t.
- Boundary F1: precision is the share of the prediction's boundary pixels within 3 px of the truth's, recall the reverse (Csurka
  et al. 2013, BMVC). Boundary pixels are mine with a known neighbour, of the four, that is not; a site's edge is no boundary.
- CA-TIoU, version 1. EuroMineNet (arXiv:2510.14661) names it, but its public code lacks the formula; this one is ours. Pixels
  whose truth takes one value in all its known years are stratum S, those with both values are stratum C. In each the tube IoU
  is sum |p and y| / sum |p or y| over pixels and years; CA-TIoU is the mean of the two, NaN unless both are defined.
- BC, SC, SCS as DynamicEarthNet's authors compute them (Toker et al. 2022, CVPR; their evaluation code): BC = sum |b and c| /
  sum |b or c|; SC is the IoU of y_t and p_t over pixels with b = 1, averaged over the classes that y_t has there; SCS is their
  mean. SC does not ask whether p changed: a map that never changes has BC = 0, but not SC = 0.
- Change over all pairs of years, in three variants: `change` (any), `transition` (right only if removed and new are told apart;
  both together, `same` being background) and `expansion` (new alone). A map that never changes scores 0 in each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import combinations
from typing import Self, TypeVar

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from minecube.errors import ModelError

CA_TIOU_VERSION = 1
UNKNOWN = 255
BOUNDARY_PX = 3
MARGIN_PX = BOUNDARY_PX + 1
"""What a block's boundary pixels depend on around it."""

Bits = NDArray[np.uint64]
"""One bit per pixel, 64 of them compared at once; (year, words), or (words) of one set of pixels."""


@dataclass(frozen=True)
class _Counts:
    def __add__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Mapped(_Counts):
    """Pixels of one year."""

    tp: int = 0
    fp: int = 0
    fn: int = 0
    tn: int = 0
    unmapped: int = 0
    """Truth known, prediction not; in none of the others."""
    drawn: int = 0
    """Boundary pixels of the prediction, and those of them near the truth's."""
    drawn_near: int = 0
    true: int = 0
    """Boundary pixels of the truth, and those of them near the prediction's."""
    true_near: int = 0


@dataclass(frozen=True)
class Tubes(_Counts):
    """Pixel-years that are mine in truth and prediction, and in either, where truth is steady (S) and where it changes (C)."""

    s_both: int = 0
    s_either: int = 0
    c_both: int = 0
    c_either: int = 0


@dataclass(frozen=True)
class Steps(_Counts):
    """Pixels from one listed year to the next."""

    both: int = 0
    """b and c"""
    either: int = 0
    """b or c"""
    y1p1: int = 0
    """Where b = 1: y_t and p_t."""
    y1p0: int = 0
    y0p1: int = 0
    y0p0: int = 0


@dataclass(frozen=True)
class Pair(_Counts):
    """Pixels of a pair of years: truth first, prediction second."""

    new_new: int = 0
    new_same: int = 0
    new_gone: int = 0
    gone_new: int = 0
    gone_same: int = 0
    gone_gone: int = 0
    same_new: int = 0
    same_same: int = 0
    same_gone: int = 0


K = TypeVar("K", bound=Hashable)
C = TypeVar("C", bound=_Counts)


@dataclass(frozen=True)
class Scores:
    """Everything the scores are made of; `Scores()` is zero."""

    years: Mapping[int, Mapped] = field(default_factory=dict)
    pairs: Mapping[tuple[int, int], Pair] = field(default_factory=dict)
    tubes: Tubes = Tubes()
    steps: Steps = Steps()

    def __add__(self, other: Scores) -> Scores:
        return Scores(
            _joined(self.years, other.years),
            _joined(self.pairs, other.pairs),
            self.tubes + other.tubes,
            self.steps + other.steps,
        )


def _joined(one: Mapping[K, C], other: Mapping[K, C]) -> dict[K, C]:
    return {**one, **{key: one[key] + value if key in one else value for key, value in other.items()}}


def count(
    pred: NDArray[np.uint8] | xr.DataArray,
    truth: NDArray[np.uint8] | xr.DataArray,
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
    p, y = _checked(pred, "prediction", years), _checked(truth, "truth", years)
    if p.shape != y.shape:
        raise ModelError(f"prediction has shape {p.shape}, truth {y.shape}; scores need the same years on the same grid")
    core = core or (slice(None), slice(None))
    edges = [_boundary(p[i], y[i], core) for i in range(len(years))]
    p, y = p[:, *core], y[:, *core]
    true1, true0, pred1, pred0 = _bits(y == 1), _bits(y == 0), _bits(p == 1), _bits(p == 0)
    known = (true1 | true0) & (pred1 | pred0)
    unmapped = (true1 | true0) & ~known
    mine_y, mine_p = true1 & known, pred1 & known
    steps, pairs = Steps(), {}
    for i, j in combinations(range(len(years)), 2):
        pair, step = _pair(mine_y[i], mine_y[j], mine_p[i], mine_p[j], known[i] & known[j])
        pairs[int(years[i]), int(years[j])] = pair
        if j == i + 1:
            steps += step
    mapped = {
        int(year): _mapped(mine_p[i], mine_y[i], known[i]) + edges[i] + Mapped(unmapped=_size(unmapped[i]))
        for i, year in enumerate(years)
    }
    changing = np.bitwise_or.reduce(true1, axis=0) & np.bitwise_or.reduce(true0, axis=0)
    return Scores(mapped, pairs, _tubes(mine_p, mine_y, changing), steps)


def _checked(stack: NDArray[np.uint8] | xr.DataArray, what: str, years: Sequence[int]) -> NDArray[np.uint8]:
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
    if ((values > 1) & (values != UNKNOWN)).any():
        raise ModelError(f"the {what} holds values other than 0, 1 and {UNKNOWN} (unknown); threshold probabilities first")
    return values


def _bits(mask: NDArray[np.bool_]) -> Bits:
    """(year, y, x) -> (year, words)."""
    packed = np.packbits(mask.reshape(len(mask), -1), axis=1)
    return np.pad(packed, ((0, 0), (0, -packed.shape[1] % 8))).view(np.uint64)


def _size(bits: Bits) -> int:
    return int(np.bitwise_count(bits).sum())


def _mapped(p: Bits, y: Bits, known: Bits) -> Mapped:
    tp, fp, fn = _size(p & y), _size(p & ~y), _size(y & ~p)
    return Mapped(tp=tp, fp=fp, fn=fn, tn=_size(known) - tp - fp - fn)


def _tubes(p: Bits, y: Bits, changing: Bits) -> Tubes:
    both, either = p & y, p | y
    c_both, c_either = _size(both & changing), _size(either & changing)
    return Tubes(s_both=_size(both) - c_both, s_either=_size(either) - c_either, c_both=c_both, c_either=c_either)


def _pair(y1: Bits, y2: Bits, p1: Bits, p2: Bits, known: Bits) -> tuple[Pair, Steps]:
    new_y, gone_y, new_p, gone_p = y2 & ~y1 & known, y1 & ~y2 & known, p2 & ~p1 & known, p1 & ~p2 & known
    n_new_y, n_gone_y, n_new_p, n_gone_p = (_size(bits) for bits in (new_y, gone_y, new_p, gone_p))
    nn, ng, gn, gg = _size(new_y & new_p), _size(new_y & gone_p), _size(gone_y & new_p), _size(gone_y & gone_p)
    both = nn + ng + gn + gg
    either = n_new_y + n_gone_y + n_new_p + n_gone_p - both
    y1p1, y0p1 = _size(new_y & p2), _size(gone_y & p2)
    pair = Pair(
        new_new=nn,
        new_same=n_new_y - nn - ng,
        new_gone=ng,
        gone_new=gn,
        gone_same=n_gone_y - gn - gg,
        gone_gone=gg,
        same_new=n_new_p - nn - gn,
        same_same=_size(known) - either,
        same_gone=n_gone_p - ng - gg,
    )
    return pair, Steps(both=both, either=either, y1p1=y1p1, y1p0=n_new_y - y1p1, y0p1=y0p1, y0p0=n_gone_y - y0p1)


def _boundary(pred: NDArray[np.uint8], truth: NDArray[np.uint8], core: tuple[slice, slice]) -> Mapped:
    known = (pred <= 1) & (truth <= 1)
    p, y = _edge((pred == 1) & known, known), _edge((truth == 1) & known, known)
    near_p, near_y = _grown(p), _grown(y)
    drawn, drawn_near, true, true_near = (int(a[core].sum()) for a in (p, p & near_y, y, y & near_p))
    return Mapped(drawn=drawn, drawn_near=drawn_near, true=true, true_near=true_near)


def _edge(mine: NDArray[np.bool_], known: NDArray[np.bool_]) -> NDArray[np.bool_]:
    other = known & ~mine
    touched = np.zeros_like(mine)
    touched[1:] |= other[:-1]
    touched[:-1] |= other[1:]
    touched[:, 1:] |= other[:, :-1]
    touched[:, :-1] |= other[:, 1:]
    return mine & touched


def _grown(edge: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """All pixels whose centre lies within BOUNDARY_PX of an edge pixel's."""
    height, width = edge.shape
    rows = np.pad(edge, BOUNDARY_PX)
    grown = np.zeros_like(edge)
    for dy in range(-BOUNDARY_PX, BOUNDARY_PX + 1):
        reach = math.isqrt(BOUNDARY_PX**2 - dy**2)
        for dx in range(-reach, reach + 1):
            grown |= rows[BOUNDARY_PX + dy :, BOUNDARY_PX + dx :][:height, :width]
    return grown


def finish(scores: Scores) -> dict[str, float]:
    """All scores, each of all pixels, years and pairs together: footprints, boundary, CA-TIoU, BC/SC/SCS, three of change."""
    tubes, steps = scores.tubes, scores.steps
    tiou_s, tiou_c = _ratio(tubes.s_both, tubes.s_either), _ratio(tubes.c_both, tubes.c_either)
    bc = _ratio(steps.both, steps.either)
    wrong = steps.y1p0 + steps.y0p1
    classes = [
        _ratio(hit, hit + wrong)
        for hit, there in ((steps.y1p1, steps.y1p1 + steps.y1p0), (steps.y0p0, steps.y0p0 + steps.y0p1))
        if there
    ]
    sc = _ratio(sum(classes), len(classes))
    through_time = {
        "tiou_s": tiou_s,
        "tiou_c": tiou_c,
        "ca_tiou": (tiou_s + tiou_c) / 2,
        "bc": bc,
        "sc": sc,
        "scs": (bc + sc) / 2,
    }
    return _of_maps(sum(scores.years.values(), Mapped())) | through_time | _of_change(sum(scores.pairs.values(), Pair()))


def by_year(scores: Scores) -> pd.DataFrame:
    """Footprint and boundary scores, one row per year."""
    return _table(scores.years, _of_maps, "year")


def by_pair(scores: Scores) -> pd.DataFrame:
    """Change scores, one row per pair of years."""
    return _table({f"{a}-{b}": pair for (a, b), pair in scores.pairs.items()}, _of_change, "years")


def by_gap(scores: Scores) -> pd.DataFrame:
    """Change scores, one row per number of calendar years between the two of a pair."""
    gaps: dict[int, Pair] = {}
    for (first, second), pair in scores.pairs.items():
        gaps = _joined(gaps, {second - first: pair})
    return _table(gaps, _of_change, "gap")


def _table(counts: Mapping[K, C], formulas: Callable[[C], dict[str, float]], index: str) -> pd.DataFrame:
    table = pd.DataFrame([formulas(value) for value in counts.values()], index=pd.Index(list(counts), name=index))
    return table.sort_index()


def _of_maps(n: Mapped) -> dict[str, float]:
    known = n.tp + n.fp + n.fn + n.tn
    precision, recall = _ratio(n.drawn_near, n.drawn), _ratio(n.true_near, n.true)
    meet = n.drawn_near and n.true_near
    return {
        **_rates(n.tp, n.fp, n.fn),
        "accuracy": _ratio(n.tp + n.tn, known),
        "boundary_f1": 2 * precision * recall / (precision + recall) if meet else _ratio(0, n.drawn + n.true),
        "unmapped": _ratio(n.unmapped, known + n.unmapped),
    }


def _of_change(n: Pair) -> dict[str, float]:
    truly = n.new_new + n.new_same + n.new_gone + n.gone_new + n.gone_same + n.gone_gone
    drawn = n.new_new + n.gone_new + n.same_new + n.new_gone + n.gone_gone + n.same_gone
    variants = {
        "change": (n.new_new + n.new_gone + n.gone_new + n.gone_gone, truly, drawn),
        "transition": (n.new_new + n.gone_gone, truly, drawn),
        "expansion": (n.new_new, n.new_new + n.new_same + n.new_gone, n.new_new + n.gone_new + n.same_new),
    }
    return {
        f"{variant}_{name}": value
        for variant, (hit, in_truth, in_pred) in variants.items()
        for name, value in _rates(hit, in_pred - hit, in_truth - hit).items()
    }


def _rates(tp: int, fp: int, fn: int) -> dict[str, float]:
    return {
        "iou": _ratio(tp, tp + fp + fn),
        "f1": _ratio(2 * tp, 2 * tp + fp + fn),
        "precision": _ratio(tp, tp + fp),
        "recall": _ratio(tp, tp + fn),
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
