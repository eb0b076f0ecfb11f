"""Tables and pictures of scores, for a terminal and for files."""

from __future__ import annotations

import functools
import json
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from minecube import metrics, report
from minecube.jobs.score import Counts
from minecube.jobs.tables import format_latex, format_markdown, format_table, write_text

SHOWN = ("iou", "f1", "ca_tiou", "tiou_s", "tiou_c", "bc", "sc", "scs", "change_f1", "boundary_f1")
"""Scores of footprints in tables."""
CHANGE_SHOWN = (
    "change_f1",
    "change_iou",
    "transition_f1",
    "expansion_f1",
    "change_auprc",
    "change_f1_at_r",
)
"""Scores of change in tables."""
POOLED = "pooled"
"""Name of the row of all sites together."""
NOUN = "the scores"
"""What the files hold, for errors."""


@dataclass(frozen=True)
class ScoreTables:
    """All scores of all models."""

    counts: Counts
    pooled: Mapping[str, metrics.Counts]
    """Model -> counts of all sites together."""
    intervals: Mapping[str, pd.DataFrame]
    """Model -> pooled score with `low` and `high`, one row per score."""
    differences: Mapping[str, pd.DataFrame]
    """"a - b" -> difference of the pooled scores of a and b, on the same resampled sites."""

    @classmethod
    def from_counts(
        cls, counts: Counts, compared: Iterable[tuple[str, str]] | None = None
    ) -> ScoreTables:
        """Pool and resample the counts, and compare models.

        Compares the pairs in `compared`, by default each model with the first.
        """
        pooled = {model: sum(sites.values(), metrics.Counts()) for model, sites in counts.items()}
        intervals = {model: metrics.estimate_intervals(sites) for model, sites in counts.items()}
        reference, *models = counts
        if compared is None:
            compared = [(model, reference) for model in models]
        differences = {
            f"{a} - {b}": metrics.estimate_difference(counts[a], counts[b]) for a, b in compared
        }
        return cls(counts, pooled, intervals, differences)

    def text(self) -> str:
        """Format all tables for a terminal."""
        parts: list[str] = []
        for model in self.counts:
            parts += [self._site_text(model), self._detail_text(model)]
        if len(self.counts) > 1 or len(next(iter(self.counts.values()))) > 1:
            summary = self.summary()
            rows = [(str(row[0]), *row[1:]) for row in summary.itertuples()]
            parts.append(format_table((POOLED, *summary.columns), rows))
        if any(len(sites) == 1 for sites in self.counts.values()):
            parts.append(
                "Only one site: no confidence interval, since the bootstrap resamples sites."
            )
        return "\n\n".join(parts)

    def summary(self) -> pd.DataFrame:
        """Return pooled scores with intervals as text, one row per model."""
        names = list(dict.fromkeys([*SHOWN, *CHANGE_SHOWN]))
        rows = {
            model: [format_score(intervals, name) for name in names]
            for model, intervals in self.intervals.items()
        }
        frame = pd.DataFrame.from_dict(rows, orient="index", columns=names)
        return frame.rename_axis("model")

    def long(self) -> dict[str, pd.DataFrame]:
        """Return tables of numbers by name.

        Rows are per model and site, year, gap, pair of years or score.
        """
        sites = {(m, site): counts for m in self.counts for site, counts in self.counts[m].items()}
        index = pd.MultiIndex.from_tuples(sites, names=["model", "site"])
        tables = {"by_site": pd.DataFrame(map(metrics.finish, sites.values()), index)}
        makers = {
            "by_year": metrics.tabulate_years,
            "by_gap": metrics.tabulate_gaps,
            "by_pair": metrics.tabulate_pairs,
        }
        for name, make in makers.items():
            stacked = self._stack(make, footprints_only=name == "by_year")
            if not stacked.empty:
                tables[name] = stacked
        tables[POOLED] = pd.concat(self.intervals, names=["model"])
        if self.differences:
            tables["differences"] = pd.concat(self.differences, names=["models"])
        return tables

    def content(self) -> dict[str, Any]:
        """Return all scores as nested dictionaries for JSON."""
        return {
            "models": {model: self._model_content(model) for model in self.counts},
            "differences": {
                name: frame.to_dict("index") for name, frame in self.differences.items()
            },
        }

    def _with_pooled(self, model: str) -> Iterator[tuple[str, metrics.Counts]]:
        yield from self.counts[model].items()
        yield POOLED, self.pooled[model]

    def _site_text(self, model: str) -> str:
        names: Sequence[str] = SHOWN
        if not self.pooled[model].years:
            names = _change_scores(self.intervals[model])
        rows = []
        for site, scores in self._with_pooled(model):
            finished = metrics.finish(scores)
            rows.append((site, *(finished[name] for name in names)))
        return f"{model}\n{format_table(('site', *names), rows)}"

    def _detail_text(self, model: str) -> str:
        """Format the scores of a model by year or, without footprints, by gap."""
        detail = metrics.tabulate_gaps(self.pooled[model])
        if self.pooled[model].years:
            detail = metrics.tabulate_years(self.pooled[model])
        numbers = detail.to_numpy().astype(float).tolist()
        rows = [(name, *row) for name, row in zip(detail.index, numbers, strict=True)]
        return format_table((str(detail.index.name), *detail.columns), rows)

    def _stack(
        self, make: Callable[[metrics.Counts], pd.DataFrame], *, footprints_only: bool
    ) -> pd.DataFrame:
        """Stack a table of each model and site; empty without any."""
        frames = {
            (model, site): make(scores)
            for model in self.counts
            for site, scores in self._with_pooled(model)
            if scores.years or not footprints_only
        }
        if not frames:
            return pd.DataFrame()
        return pd.concat(frames, names=["model", "site"])

    def _model_content(self, model: str) -> dict[str, Any]:
        scores = dict(self._with_pooled(model))
        return {
            "sites": {site: metrics.finish(counts) for site, counts in scores.items()},
            "by_year": {
                site: metrics.tabulate_years(counts).to_dict("index")
                for site, counts in scores.items()
                if counts.years
            },
            "by_gap": {
                site: metrics.tabulate_gaps(counts).to_dict("index")
                for site, counts in scores.items()
            },
            "intervals": self.intervals[model].to_dict("index"),
        }


def write_tables(
    tables: ScoreTables, folder: Path, pictured: Sequence[str] | None = None
) -> list[Path]:
    """Write tables, counts and pictures to a folder. Returns their paths.

    `pictured` lists the models in the pictures, by default all.

    Raises CatalogError if a file cannot be written.
    """
    summary = tables.summary()
    texts = {"scores.md": format_markdown(summary), "scores.tex": format_latex(summary)}
    texts |= {f"{name}.csv": frame.to_csv() for name, frame in tables.long().items()}
    texts["counts.json"] = json.dumps(tables.counts, default=metrics.Counts.to_json) + "\n"
    paths = [write_text(folder / name, text, NOUN) for name, text in texts.items()]
    if pictured is None:
        pictured = list(tables.counts)
    return paths + _draw_scores(tables, folder, pictured) + _draw_curves(tables, folder, pictured)


def sum_histograms(histograms: Mapping[int, metrics.Histogram]) -> metrics.Histogram:
    """Sum the histograms of all years or gaps."""
    return functools.reduce(operator.add, histograms.values())


def format_score(intervals: pd.DataFrame, name: str) -> str:
    """Format a score with its interval; "n/a" for NaN, "" for a score that the table lacks."""
    if name not in intervals.index:
        return ""
    score, low, high = (float(intervals[column][name]) for column in ("score", "low", "high"))
    if math.isnan(score):
        return "n/a"
    if math.isnan(low):
        return f"{score:.3f}"
    return f"{score:.3f} [{low:.3f}, {high:.3f}]"


def replace_nan(value: object) -> object:
    """Replace NaN by None in nested dictionaries, since JSON has no NaN."""
    if isinstance(value, dict):
        return {str(key): replace_nan(item) for key, item in value.items()}
    if isinstance(value, float) and math.isnan(value):
        return None
    return value


def _change_scores(intervals: pd.DataFrame) -> Sequence[str]:
    """Return the available scores of a change model."""
    names = (*CHANGE_SHOWN, "expansion_auprc", "expansion_f1_at_r", "change_unmapped")
    return [name for name in names if name in intervals.index]


def _draw_scores(tables: ScoreTables, folder: Path, models: Sequence[str]) -> list[Path]:
    """Draw IoU by year and F1 of change by gap. Returns the paths."""
    pooled = {model: tables.pooled[model] for model in models}
    by_year = {
        m: metrics.tabulate_years(scores)["iou"] for m, scores in pooled.items() if scores.years
    }
    tables_by_gap = {model: metrics.tabulate_gaps(scores) for model, scores in pooled.items()}
    by_gap = {m: frame["change_f1"] for m, frame in tables_by_gap.items() if "change_f1" in frame}
    gap_axes = ("gap, calendar years between the two of a pair", "F1 of changed pixels")
    paths = []
    for lines, name, title, axes in (
        (by_year, "iou_by_year.png", "Footprints by year", ("year", "IoU of footprints")),
        (by_gap, "change_f1_by_gap.png", "Change by gap", gap_axes),
    ):
        if lines:
            report.draw_scores(lines, folder / name, title, axes=axes, models=models)
            paths.append(folder / name)
    return paths


def _draw_curves(tables: ScoreTables, folder: Path, models: Sequence[str]) -> list[Path]:
    """Draw reliability, and precision over recall. Returns the paths."""
    pooled = {model: tables.pooled[model] for model in models}
    footprints = {
        model: sum_histograms(scores.footprint)
        for model, scores in pooled.items()
        if scores.years and scores.footprint
    }
    changes = {
        model: sum_histograms(scores.change) for model, scores in pooled.items() if scores.change
    }
    paths = []
    if footprints:
        path = folder / "reliability.png"
        bins = {
            model: metrics.tabulate_reliability(histogram)
            for model, histogram in footprints.items()
        }
        report.draw_reliability(bins, path, "Reliability of footprints", models=models)
        paths.append(path)
    for histograms, name, title in (
        (footprints, "precision_recall.png", "Footprints"),
        (changes, "change_precision_recall.png", "Change, all pairs of years"),
    ):
        if not histograms:
            continue
        curves = {
            model: metrics.tabulate_precision_recall(histogram)
            for model, histogram in histograms.items()
        }
        pixels = next(iter(histograms.values())).pixels
        share = float(pixels[:, 1].sum() / max(int(pixels.sum()), 1))
        report.draw_precision_recall(curves, folder / name, title, share, models=models)
        paths.append(folder / name)
    return paths
