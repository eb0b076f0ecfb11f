"""Compute scores from counts.

All formulas accept numbers or arrays. Arrays give many resamples at once, element by element.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from minecube.arrays import AnyArray, Int64
from minecube.codes import FULL
from minecube.metrics.counts import (
    Counts,
    Histogram,
    PairCounts,
    StepCounts,
    Tally,
    TubeCounts,
    WindowCounts,
    YearCounts,
)
from minecube.metrics.curves import auprc, brier, ece, f1_at_r

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
_HISTOGRAM_SIZE = 2 * (FULL + 1)


def finish(scores: Counts) -> dict[str, float]:
    """Compute all scores, pooled over pixels, years and pairs.

    These are scores of footprints, boundaries, consistency through time, change and probabilities.
    Scores without counts are left out: a change model has no footprint scores, for example. The
    empty `Counts()` returns all footprint scores, as NaN.
    """
    kinds = find_kinds([scores])
    return _as_floats(compute_scores(flatten(scores, kinds), kinds))


@dataclass(frozen=True, kw_only=True)
class Kinds:
    """Kinds of counts available."""

    maps: bool
    """Whether footprints are counted."""
    windows: tuple[int, ...]
    """Numbers of years in the windows."""
    footprint: bool
    """Whether mine probabilities are counted."""
    change: bool
    """Whether probabilities of change are counted."""
    variants: tuple[str, ...]
    """Variants of the change scores."""


def find_kinds(scores: Sequence[Counts]) -> Kinds:
    """Return the kinds of counts in any of several scores to be compared.

    `variants` are those shared by all of them.
    """
    classes = {s.classes for s in scores if s.pairs} or {()}
    has_maps = any(s.years for s in scores)
    has_pairs = any(s.pairs for s in scores)
    return Kinds(
        maps=has_maps or not has_pairs,
        windows=tuple(sorted({length for s in scores for _, _, length in s.windows})),
        footprint=any(s.footprint for s in scores),
        change=any(s.change for s in scores),
        variants=tuple(v for v in VARIANTS[()] if all(v in VARIANTS[c] for c in classes)),
    )


def flatten(scores: Counts, kinds: Kinds) -> Int64:
    """Return all counts needed by the formulas, as one row. Rows add up as scores do."""
    tallies: list[Tally] = [
        sum(scores.years.values(), YearCounts()),
        sum(scores.pairs.values(), PairCounts()),
        scores.tubes,
        scores.steps,
    ]
    for length in kinds.windows:
        windows = (counts for key, counts in scores.windows.items() if key[2] == length)
        tallies.append(sum(windows, WindowCounts()))
    parts = [list(vars(tally).values()) for tally in tallies]
    if kinds.footprint:
        parts.append(_sum_histograms(scores.footprint))
    if kinds.change:
        parts.append(_sum_histograms(scores.change))
    return np.concatenate([np.array(part, np.int64) for part in parts])


def _sum_histograms(histograms: Mapping[int, Histogram]) -> Any:
    empty = np.zeros((FULL + 1, 2), np.int64)
    return sum((histogram.pixels for histogram in histograms.values()), empty).ravel()


def compute_scores(counts: AnyArray, kinds: Kinds) -> dict[str, Floats]:
    """Compute scores (...) from counts (..., counts) in the order of `flatten`."""
    tally_types: list[type[Tally]] = [YearCounts, PairCounts, TubeCounts, StepCounts]
    tally_types += [WindowCounts] * len(kinds.windows)
    sizes = [len(fields(tally)) for tally in tally_types]
    sizes += [_HISTOGRAM_SIZE] * (kinds.footprint + kinds.change)
    parts = np.split(counts, np.cumsum(sizes)[:-1], axis=-1)
    histograms = parts[len(tally_types) :]
    tallies: list[Any] = [
        tally(*np.moveaxis(part, -1, 0)) for tally, part in zip(tally_types, parts, strict=False)
    ]
    years, pairs, tubes, steps, *windows = tallies
    scores: dict[str, Floats] = {}
    if kinds.maps:
        scores |= _score_maps(years) | _score_through_time(tubes, steps)
        for length, window in zip(kinds.windows, windows, strict=True):
            scores[f"vc_{length}"] = _ratio(window.kept, window.steady)
    scores |= _score_change(pairs, kinds.variants)
    if kinds.footprint:
        scores |= _score_probability(histograms[0])
    if kinds.change:
        scores |= _score_change_probability(histograms[-1], kinds.variants)
    return scores


def tabulate_years(scores: Counts) -> pd.DataFrame:
    """Tabulate footprint and boundary scores by year, with scores of probabilities if counted."""
    table = _tabulate(scores.years, _score_maps, "year")
    return _join_histograms(table, scores.footprint, _score_probability)


def tabulate_pairs(scores: Counts) -> pd.DataFrame:
    """Tabulate change scores by pair of years."""
    variants = VARIANTS[scores.classes]
    pairs = {f"{start}-{end}": counts for (start, end), counts in scores.pairs.items()}
    return _tabulate(pairs, lambda counts: _score_change(counts, variants), "years")


def tabulate_gaps(scores: Counts) -> pd.DataFrame:
    """Tabulate change scores by gap, the number of calendar years between a pair."""
    variants = VARIANTS[scores.classes]
    gaps: dict[int, PairCounts] = {}
    for (start, end), counts in scores.pairs.items():
        gaps[end - start] = gaps.get(end - start, PairCounts()) + counts
    table = _tabulate(gaps, lambda counts: _score_change(counts, variants), "gap")
    return _join_histograms(
        table, scores.change, lambda pixels: _score_change_probability(pixels, variants)
    )


def _tabulate(
    counts: Mapping[K, Any], score: Callable[[Any], dict[str, Floats]], index: str
) -> pd.DataFrame:
    rows = [_as_floats(score(tally)) for tally in counts.values()]
    return pd.DataFrame(rows, index=pd.Index(list(counts), name=index)).sort_index()


def _as_floats(scores: Mapping[str, Floats]) -> dict[str, float]:
    return {name: float(value) for name, value in scores.items()}


def _join_histograms(
    table: pd.DataFrame,
    histograms: Mapping[int, Histogram],
    score: Callable[[AnyArray], dict[str, Floats]],
) -> pd.DataFrame:
    """Add the scores of histograms as columns, if there are any."""
    if not histograms:
        return table
    rows = {key: score(histogram.pixels.ravel()) for key, histogram in histograms.items()}
    return table.join(pd.DataFrame.from_dict(rows, orient="index"))


def _score_maps(counts: YearCounts) -> dict[str, Floats]:
    total = counts.tp + counts.fp + counts.fn + counts.tn
    precision = _ratio(counts.drawn_near, counts.drawn)
    recall = _ratio(counts.true_near, counts.true)
    any_close = np.asarray(counts.drawn_near * counts.true_near) > 0
    harmonic = _ratio(2 * precision * recall, np.where(any_close, precision + recall, 1))
    zero = _ratio(0 * total, counts.drawn + counts.true)
    return {
        **_rates(counts.tp, counts.fp, counts.fn),
        "accuracy": _ratio(counts.tp + counts.tn, total),
        "boundary_f1": np.where(any_close, harmonic, zero),
        "unmapped": _ratio(counts.unmapped, total + counts.unmapped),
    }


def _score_through_time(tubes: TubeCounts, steps: StepCounts) -> dict[str, Floats]:
    tiou_s = _ratio(tubes.s_both, tubes.s_either)
    tiou_c = _ratio(tubes.c_both, tubes.c_either)
    bc = _ratio(steps.both, steps.either)
    wrong = steps.y1p0 + steps.y0p1
    opened = np.asarray(steps.y1p1 + steps.y1p0) > 0
    closed = np.asarray(steps.y0p0 + steps.y0p1) > 0
    iou_opened = np.where(opened, _ratio(steps.y1p1, steps.y1p1 + wrong), 0)
    iou_closed = np.where(closed, _ratio(steps.y0p0, steps.y0p0 + wrong), 0)
    sc = _ratio(iou_opened + iou_closed, opened.astype(int) + closed.astype(int))
    return {
        "tiou_s": tiou_s,
        "tiou_c": tiou_c,
        "ca_tiou": (tiou_s + tiou_c) / 2,
        "bc": bc,
        "sc": sc,
        "scs": (bc + sc) / 2,
    }


def _score_change(counts: PairCounts, variants: Sequence[str]) -> dict[str, Floats]:
    in_truth = counts.changed_in_truth()
    in_prediction = counts.changed_in_prediction()
    new_in_truth = counts.new_new + counts.new_same + counts.new_gone
    new_in_prediction = counts.new_new + counts.gone_new + counts.same_new
    hits = {
        "change": (counts.changed_in_both(), in_truth, in_prediction),
        "transition": (counts.new_new + counts.gone_gone, in_truth, in_prediction),
        "expansion": (counts.new_new, new_in_truth, new_in_prediction),
    }
    scores: dict[str, Floats] = {}
    for variant in variants:
        tp, true, predicted = hits[variant]
        for name, value in _rates(tp, predicted - tp, true - tp).items():
            scores[f"{variant}_{name}"] = value
    total = in_truth + counts.same_new + counts.same_same + counts.same_gone
    scores["change_unmapped"] = _ratio(counts.unmapped, total + counts.unmapped)
    return scores


def _score_probability(counts: AnyArray) -> dict[str, Floats]:
    """Compute scores of mine probabilities from (..., 502), a flat Histogram."""
    pixels = counts.reshape(*counts.shape[:-1], FULL + 1, 2)
    return {"auprc": auprc(pixels), "ece": ece(pixels), "brier": brier(pixels)}


def _score_change_probability(counts: AnyArray, variants: Sequence[str]) -> dict[str, Floats]:
    """Compute scores of change probabilities from (..., 502), a flat Histogram."""
    pixels = counts.reshape(*counts.shape[:-1], FULL + 1, 2)
    variant = "change"
    if variant not in variants:
        variant = "expansion"
    return {f"{variant}_auprc": auprc(pixels), f"{variant}_f1_at_r": f1_at_r(pixels)}


def _rates(tp: Floats, fp: Floats, fn: Floats) -> dict[str, Floats]:
    return {
        "iou": _ratio(tp, tp + fp + fn),
        "f1": _ratio(2 * tp, 2 * tp + fp + fn),
        "precision": _ratio(tp, tp + fp),
        "recall": _ratio(tp, tp + fn),
    }


def _ratio(part: Floats, total: Floats) -> Floats:
    """Divide a part by a total; NaN if the total is 0."""
    total = np.asarray(total, np.float64)
    blank = np.full(np.broadcast(part, total).shape, np.nan)
    return np.divide(part, total, out=blank, where=total != 0)
