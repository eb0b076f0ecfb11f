"""Compute scores from counts.

All formulas accept numbers or arrays. Arrays give many resamples at once, element by element.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from minecube.metrics.curves import auprc, brier, ece, f1_at_r
from minecube.metrics.states import LEVELS, Mapped, Pair, Scores, Steps, Tubes, Window, _Counts

K = TypeVar("K", bound=Hashable)
Floats = Any
"""A number, or float64 of any shape."""

VARIANTS = {
    (): ("change", "transition", "expansion"),
    ("removed", "new"): ("change", "transition", "expansion"),
    ("changed",): ("change",),
    ("new",): ("expansion",),
}
"""Change classes of a model -> variants of change scores."""
_PARTS: tuple[type[_Counts], ...] = (Mapped, Pair, Tubes, Steps)


def finish(scores: Scores) -> dict[str, float]:
    """Compute all scores, pooled over pixels, years and pairs.

    These are scores of footprints, boundaries, consistency through time, change and probabilities.
    Scores without counts are left out: a change model has no footprint scores, for example. The
    empty `Scores()` returns all footprint scores, as NaN.
    """
    kinds = kinds_of([scores])
    return {name: float(value) for name, value in formulas(vector(scores, kinds), kinds).items()}


@dataclass(frozen=True)
class Kinds:
    """Kinds of counts available."""

    maps: bool
    windows: tuple[int, ...]
    footprint: bool
    change: bool
    variants: tuple[str, ...]


def kinds_of(scores: Sequence[Scores]) -> Kinds:
    """Return the kinds of counts in any of several scores to be compared.

    `variants` are those shared by all of them.
    """
    classes = {s.classes for s in scores if s.pairs} or {()}
    maps = any(s.years for s in scores) or not any(s.pairs for s in scores)
    variants = [v for v in VARIANTS[()] if all(v in VARIANTS[c] for c in classes)]
    windows = tuple(sorted({n for s in scores for _, _, n in s.windows}))
    return Kinds(
        maps,
        windows,
        any(s.footprint for s in scores),
        any(s.change for s in scores),
        tuple(variants),
    )


def vector(scores: Scores, kinds: Kinds) -> NDArray[np.int64]:
    """Return all counts needed by the formulas, as one row. Rows add up as scores do."""
    parts: list[_Counts] = [
        sum(scores.years.values(), Mapped()),
        sum(scores.pairs.values(), Pair()),
        scores.tubes,
        scores.steps,
    ]
    parts += [
        sum((w for key, w in scores.windows.items() if key[2] == n), Window())
        for n in kinds.windows
    ]
    numbers = [np.array([getattr(part, f.name) for part in parts for f in fields(part)], np.int64)]
    empty = np.zeros((LEVELS + 1, 2), np.int64)
    for wanted, histograms in ((kinds.footprint, scores.footprint), (kinds.change, scores.change)):
        if wanted:
            numbers.append(sum((h.pixels for h in histograms.values()), empty).ravel())
    return np.concatenate(numbers)


def formulas(counts: NDArray[Any], kinds: Kinds) -> dict[str, Floats]:
    """Compute scores (...) from counts (..., counts) in the order of `vector`."""
    at = 0
    parts: list[Any] = []
    for part in (*_PARTS, *(Window for _ in kinds.windows)):
        size = len(fields(part))
        parts.append(part(*np.moveaxis(counts[..., at : at + size], -1, 0)))
        at += size
    mapped, pair, tubes, steps, *windows = parts
    found: dict[str, Floats] = {}
    if kinds.maps:
        found |= _of_maps(mapped) | _through_time(tubes, steps)
        found |= {
            f"vc_{n}": _ratio(w.kept, w.steady) for n, w in zip(kinds.windows, windows, strict=True)
        }
    found |= _of_change(pair, kinds.variants)
    size = 2 * (LEVELS + 1)
    if kinds.footprint:
        found |= of_footprint(counts[..., at : at + size])
        at += size
    if kinds.change:
        found |= _of_change_curve(counts[..., at : at + size], kinds.variants)
    return found


def by_year(scores: Scores) -> pd.DataFrame:
    """Tabulate footprint and boundary scores by year, with scores of probabilities if counted."""
    table = _table(scores.years, _of_maps, "year")
    if scores.footprint:
        rows = {year: of_footprint(h.pixels.ravel()) for year, h in scores.footprint.items()}
        table = table.join(pd.DataFrame.from_dict(rows, orient="index"))
    return table


def by_pair(scores: Scores) -> pd.DataFrame:
    """Tabulate change scores by pair of years."""
    named = {f"{a}-{b}": pair for (a, b), pair in scores.pairs.items()}
    return _table(named, lambda pair: _of_change(pair, VARIANTS[scores.classes]), "years")


def by_gap(scores: Scores) -> pd.DataFrame:
    """Tabulate change scores by gap, the number of calendar years between a pair."""
    variants = VARIANTS[scores.classes]
    gaps: dict[int, Pair] = {}
    for (first, second), pair in scores.pairs.items():
        gaps[second - first] = gaps.get(second - first, Pair()) + pair
    table = _table(gaps, lambda pair: _of_change(pair, variants), "gap")
    if scores.change:
        rows = {
            gap: _of_change_curve(h.pixels.ravel(), variants) for gap, h in scores.change.items()
        }
        table = table.join(pd.DataFrame.from_dict(rows, orient="index"))
    return table


def _table(
    counts: Mapping[K, Any], of: Callable[[Any], dict[str, Floats]], index: str
) -> pd.DataFrame:
    rows = [{name: float(value) for name, value in of(value).items()} for value in counts.values()]
    return pd.DataFrame(rows, index=pd.Index(list(counts), name=index)).sort_index()


def _of_maps(n: Mapped) -> dict[str, Floats]:
    known = n.tp + n.fp + n.fn + n.tn
    precision, recall = _ratio(n.drawn_near, n.drawn), _ratio(n.true_near, n.true)
    meet = np.asarray(n.drawn_near * n.true_near) > 0
    harmonic = _ratio(2 * precision * recall, np.where(meet, precision + recall, 1))
    return {
        **_rates(n.tp, n.fp, n.fn),
        "accuracy": _ratio(n.tp + n.tn, known),
        "boundary_f1": np.where(meet, harmonic, _ratio(0 * known, n.drawn + n.true)),
        "unmapped": _ratio(n.unmapped, known + n.unmapped),
    }


def _through_time(tubes: Tubes, steps: Steps) -> dict[str, Floats]:
    tiou_s, tiou_c = _ratio(tubes.s_both, tubes.s_either), _ratio(tubes.c_both, tubes.c_either)
    bc = _ratio(steps.both, steps.either)
    wrong = steps.y1p0 + steps.y0p1
    there1, there0 = (np.asarray(n) > 0 for n in (steps.y1p1 + steps.y1p0, steps.y0p0 + steps.y0p1))
    classes = [
        np.where(there, _ratio(hit, hit + wrong), 0)
        for hit, there in ((steps.y1p1, there1), (steps.y0p0, there0))
    ]
    sc = _ratio(sum(classes), there1.astype(int) + there0.astype(int))
    return {
        "tiou_s": tiou_s,
        "tiou_c": tiou_c,
        "ca_tiou": (tiou_s + tiou_c) / 2,
        "bc": bc,
        "sc": sc,
        "scs": (bc + sc) / 2,
    }


def _of_change(n: Pair, variants: Sequence[str]) -> dict[str, Floats]:
    truly = n.new_new + n.new_same + n.new_gone + n.gone_new + n.gone_same + n.gone_gone
    drawn = n.new_new + n.gone_new + n.same_new + n.new_gone + n.gone_gone + n.same_gone
    counts = {
        "change": (n.new_new + n.new_gone + n.gone_new + n.gone_gone, truly, drawn),
        "transition": (n.new_new + n.gone_gone, truly, drawn),
        "expansion": (
            n.new_new,
            n.new_new + n.new_same + n.new_gone,
            n.new_new + n.gone_new + n.same_new,
        ),
    }
    known = truly + n.same_new + n.same_same + n.same_gone
    rates = {
        f"{variant}_{name}": value
        for variant, (hit, in_truth, in_pred) in counts.items()
        if variant in variants
        for name, value in _rates(hit, in_pred - hit, in_truth - hit).items()
    }
    return rates | {"change_unmapped": _ratio(n.unmapped, known + n.unmapped)}


def of_footprint(counts: NDArray[Any]) -> dict[str, Floats]:
    """Compute scores of mine probabilities from (..., 502), a flat Histogram."""
    pixels = counts.reshape(*counts.shape[:-1], LEVELS + 1, 2)
    return {"auprc": auprc(pixels), "ece": ece(pixels), "brier": brier(pixels)}


def _of_change_curve(counts: NDArray[Any], variants: Sequence[str]) -> dict[str, Floats]:
    pixels = counts.reshape(*counts.shape[:-1], LEVELS + 1, 2)
    of = "change" if "change" in variants else "expansion"
    return {f"{of}_auprc": auprc(pixels), f"{of}_f1_at_r": f1_at_r(pixels)}


def _rates(tp: Floats, fp: Floats, fn: Floats) -> dict[str, Floats]:
    return {
        "iou": _ratio(tp, tp + fp + fn),
        "f1": _ratio(2 * tp, 2 * tp + fp + fn),
        "precision": _ratio(tp, tp + fp),
        "recall": _ratio(tp, tp + fn),
    }


def _ratio(part: Floats, whole: Floats) -> Floats:
    """Divide a part by a whole; NaN if the whole is 0."""
    whole = np.asarray(whole, np.float64)
    return np.divide(
        part, whole, out=np.full(np.broadcast(part, whole).shape, np.nan), where=whole != 0
    )
