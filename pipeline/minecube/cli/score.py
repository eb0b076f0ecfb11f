"""Subcommand score: compare models with labels, in tables and pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
import xarray as xr

from minecube import cube, labels, metrics
from minecube.cli.common import (
    OutFile,
    OutFolder,
    SiteChoice,
    progress_bar,
    sites_option,
    store_option,
    stored_prediction,
    stored_sites,
    table,
)
from minecube.errors import CatalogError, CubeError, LabelError, ModelError
from minecube.files import replacing
from minecube.report import scores as pictures

SHOWN = ("iou", "f1", "ca_tiou", "tiou_s", "tiou_c", "bc", "sc", "scs", "change_f1", "boundary_f1")
CHANGE_SHOWN = (
    "change_f1",
    "change_iou",
    "transition_f1",
    "expansion_f1",
    "change_auprc",
    "change_f1_at_r",
)
BLOCK_PX = 512
"""Rows per block. Blocks keep memory independent of a site's height."""

Counted = dict[str, dict[str, metrics.Scores]]
"""Model or baseline -> site -> counts."""


@click.command()
@store_option
@sites_option
@click.option(
    "--model",
    "models",
    default="unet-small",
    show_default=True,
    help="Names of predictions, comma-separated. A model's id selects its only prediction. =NAME: exactly that name.",
)
@click.option(
    "--baselines",
    is_flag=True,
    help="Also score trivial baselines: a map that never changes, a map that is all mine, and last year's labels.",
)
@click.option(
    "--join",
    "joined",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Counts of other sites (counts.json, which --out writes), to score together. May be repeated.",
)
@click.option("--json", "json_file", type=OutFile(), help="File for all scores.")
@click.option(
    "--out",
    type=OutFolder(),
    help="Folder for tables (Markdown, CSV, LaTeX), pictures, and counts for --join.",
)
def score(
    store: cube.Store,
    wanted: SiteChoice,
    models: str,
    baselines: bool,
    joined: Sequence[Path],
    json_file: Path | None,
    out: Path | None,
) -> None:
    """Compare predictions with the labels, per site, year, gap and pair of years, and pooled.

    A pooled score is a ratio of sums, not a mean of ratios. With several sites it has a 95 % interval, by
    bootstrap over sites. Every model after the first is also compared with the first, over the same
    sites. Models of footprints and of change share one table.

    \b
    Examples:
      minecube score --store cubes.zarr --sites Germany_2 --model unet-small
      minecube score --store cubes.zarr --model unet-small,tinycd --baselines --out scores
      minecube score --store here.zarr --join there/counts.json --out both
    """
    sites = stored_sites(store, wanted)
    asked = [name.strip() for name in models.split(",")]
    if not all(asked):
        raise CatalogError(
            f"--model {models}: expected names with a comma between them, found an empty name"
        )
    if len(set(asked)) < len(asked):
        raise CatalogError(f"--model {models}: expected each model once")
    joining = [(path, _read_counts(path)) for path in joined]  # before the slow counting
    named = [stored_prediction(store, sites, name) for name in asked]
    if len(set(named)) < len(named):
        raise CatalogError(
            f"--model {models}: two of the names stand for one prediction; expected each model once"
        )
    counted: Counted = {name: {} for name in named}
    for path, counts in joining:
        _join(counted, path, counts, sites)
    with progress_bar("scoring", len(sites) * len(named)) as advance:
        for site in sites:
            for name in named:
                counted[name][site] = score_site(store, site, name)
                advance(note=f"{site} {name}")
            if baselines:
                for name, scores in baselines_of(store, site).items():
                    counted.setdefault(name, {})[site] = scores
    tables = Tables.of(counted)
    click.echo(tables.text())
    content = {"ca_tiou_version": metrics.CA_TIOU_VERSION, **tables.content()}
    if json_file:
        write(json_file, json.dumps(_without_nan(content), indent=2) + "\n")
    if out:
        for path in write_all(tables, out):
            click.echo(path)


def _read_counts(path: Path) -> Counted:
    """Read counts from another run. Raises CatalogError if the file holds no counts."""
    try:
        return {
            model: {site: metrics.Scores.of_json(counts) for site, counts in sites.items()}
            for model, sites in json.loads(path.read_text(encoding="utf-8")).items()
        }
    except (OSError, ValueError, AttributeError, RecursionError, ModelError) as error:
        raise CatalogError(
            f"{path}: expected counts.json as `minecube score --out` writes it ({error})"
        ) from error


def _join(counted: Counted, path: Path, found: Counted, own: Sequence[str]) -> None:
    """Add the counts of other sites.

    Raises CatalogError if a site is counted twice, or will be counted here.
    """
    for model, sites in found.items():
        twice = sorted(set(sites) & {*counted.get(model, ()), *(own if model in counted else ())})
        if twice:
            raise CatalogError(
                f"{path}: {twice[0]} of {model} is already counted; counting it again would weigh it twice, so choose other "
                "--sites"
            )
        counted.setdefault(model, {}).update(sites)


def score_site(store: cube.Store, name: str, model: str) -> metrics.Scores:
    """Count a site's prediction against its labels, in blocks of rows.

    Handles footprints and change.

    Raises:
        LabelError: no built year has a label.
        CubeError: the model did not map the site's current build.
    """
    truth = _truth(store, name)
    years = [int(y) for y in truth.year]
    if cube.mapped_by(store, name, model) == "change":
        change = cube.open_change(store, name, model)
        pairs = list(
            zip(
                change["first"].to_numpy().tolist(),
                change["second"].to_numpy().tolist(),
                strict=True,
            )
        )
        classes = [str(c) for c in change["class"].to_numpy()]
        total = metrics.Scores()
        for context, (own, _) in _blocks(truth):
            rows = slice(context.start + own.start, context.start + own.stop)
            block = change.isel(y=rows).transpose("pair", "class", "y", "x").to_numpy()
            total += metrics.count_change(
                block, truth.isel(y=rows).to_numpy(), years, pairs, classes
            )
        return total
    probability = cube.open_probability(store, name, model)
    missing = sorted(set(years) - {int(y) for y in probability.year})
    if missing:
        raise CubeError(
            f"{store}: {model!r} did not map {name} in {missing[0]}, which is labelled; run `minecube predict` again"
        )
    probability = probability.sel(year=years)
    total = metrics.Scores()
    for rows, core in _blocks(truth):
        p, y = (a.isel(y=rows).transpose("year", "y", "x").to_numpy() for a in (probability, truth))
        footprint = np.where(p == metrics.UNKNOWN, metrics.UNKNOWN, p >= metrics.HALF).astype(
            np.uint8
        )
        total += metrics.count(footprint, y, years, core=core) + metrics.count_probability(
            p, y, years, core=core
        )
    return total


def _truth(store: cube.Store, name: str) -> xr.DataArray:
    truth = cube.open_committed(store, name)["footprint"]
    if bool((truth == labels.UNKNOWN).all()):
        raise LabelError(
            f"{store}: {name} has no footprint in any built year, so nothing can be scored; run `minecube label` first"
        )
    return truth


def _blocks(truth: xr.DataArray) -> Iterator[tuple[slice, tuple[slice, slice]]]:
    """Yield rows to read, and the pixels to count within these rows."""
    height = truth.sizes["y"]
    for first in range(0, height, BLOCK_PX):
        last = min(first + BLOCK_PX, height)
        top = max(first - metrics.MARGIN_PX, 0)
        yield (
            slice(top, min(last + metrics.MARGIN_PX, height)),
            (slice(first - top, last - top), slice(None)),
        )


def baselines_of(store: cube.Store, site: str) -> dict[str, metrics.Scores]:
    """Count trivial baselines, by name. Raises LabelError as `score_site` does."""
    truth = _truth(store, site)
    found: dict[str, metrics.Scores] = {}
    years = [int(y) for y in truth.year]
    for rows, core in _blocks(truth):
        y = truth.isel(y=rows).transpose("year", "y", "x").to_numpy()
        for name, pred in metrics.baselines(y).items():
            found[name] = found.get(name, metrics.Scores()) + metrics.count(
                pred, y, years, core=core
            )
    return found


@dataclass(frozen=True)
class Tables:
    """All scores of all models."""

    counted: Counted
    pooled: Mapping[str, metrics.Scores]
    intervals: Mapping[str, pd.DataFrame]
    differences: Mapping[str, pd.DataFrame]
    """"a - b" -> difference of the pooled scores of a and b, on the same resampled sites."""

    @classmethod
    def of(cls, counted: Counted, compared: Iterable[tuple[str, str]] | None = None) -> Tables:
        """Pool and resample the counts, and compare models.

        Compares the pairs in `compared`, by default each model with the first.
        """
        pooled = {model: sum(sites.values(), metrics.Scores()) for model, sites in counted.items()}
        spread = {model: metrics.intervals(sites) for model, sites in counted.items()}
        first, *others = counted
        pairs = [(m, first) for m in others] if compared is None else compared
        paired = {f"{a} - {b}": metrics.difference(counted[a], counted[b]) for a, b in pairs}
        return cls(counted, pooled, spread, paired)

    def text(self) -> str:
        """Format all tables for a terminal."""
        parts = []
        for model, sites in self.counted.items():
            shown = SHOWN if self.pooled[model].years else _of_change(self.intervals[model])
            finished = {
                site: metrics.finish(c)
                for site, c in [*sites.items(), ("pooled", self.pooled[model])]
            }
            parts.append(
                model
                + "\n"
                + table(
                    ("site", *shown), [(s, *(f[k] for k in shown)) for s, f in finished.items()]
                )
            )
            by = (
                metrics.by_year(self.pooled[model])
                if self.pooled[model].years
                else metrics.by_gap(self.pooled[model])
            )
            rows = [
                (n, *(float(v) for v in row))
                for n, row in zip(by.index, by.to_numpy(), strict=True)
            ]
            parts.append(table((str(by.index.name), *by.columns), rows))
        if len(self.counted) > 1 or len(next(iter(self.counted.values()))) > 1:
            pooled = self.summary()
            rows = [(name, *row) for name, row in zip(pooled.index, pooled.to_numpy(), strict=True)]
            parts.append(table(("pooled", *pooled.columns), rows))
        if any(len(sites) == 1 for sites in self.counted.values()):
            parts.append(
                "Only one site: no confidence interval, since the bootstrap resamples sites."
            )
        return "\n\n".join(parts)

    def summary(self) -> pd.DataFrame:
        """Return pooled scores with intervals as text, one row per model."""
        names = list(dict.fromkeys([*SHOWN, *CHANGE_SHOWN]))
        rows = {
            m: {n: cell(t.loc[n]) if n in t.index else "" for n in names}
            for m, t in self.intervals.items()
        }
        return pd.DataFrame.from_dict(rows, orient="index", columns=names).rename_axis("model")

    def long(self) -> dict[str, pd.DataFrame]:
        """Return tables of numbers by name.

        Rows are per model and site, year, gap, pair of years or score.
        """

        def finished(scores: metrics.Scores) -> pd.DataFrame:
            return pd.DataFrame([metrics.finish(scores)])

        sites = {
            (m, s): finished(c) for m, by_site in self.counted.items() for s, c in by_site.items()
        }
        tables = {"by_site": pd.concat(sites, names=["model", "site"]).droplevel(2)}
        for name, of in (
            ("by_year", metrics.by_year),
            ("by_gap", metrics.by_gap),
            ("by_pair", metrics.by_pair),
        ):
            found = {
                (m, s): of(c)
                for m in self.counted
                for s, c in self._all(m)
                if c.years or name != "by_year"
            }
            if found:
                tables[name] = pd.concat(found, names=["model", "site"])
        tables["pooled"] = pd.concat(self.intervals, names=["model"])
        if self.differences:
            tables["differences"] = pd.concat(self.differences, names=["models"])
        return tables

    def content(self) -> dict[str, Any]:
        """Return all scores as nested dictionaries for JSON."""
        return {
            "models": {
                m: {
                    "sites": {
                        s: metrics.finish(c)
                        for s, c in [*sites.items(), ("pooled", self.pooled[m])]
                    },
                    "by_year": {
                        s: metrics.by_year(c).to_dict("index") for s, c in self._all(m) if c.years
                    },
                    "by_gap": {s: metrics.by_gap(c).to_dict("index") for s, c in self._all(m)},
                    "intervals": self.intervals[m].to_dict("index"),
                }
                for m, sites in self.counted.items()
            },
            "differences": {name: t.to_dict("index") for name, t in self.differences.items()},
        }

    def _all(self, model: str) -> list[tuple[str, metrics.Scores]]:
        return [*self.counted[model].items(), ("pooled", self.pooled[model])]


def write_all(tables: Tables, out: Path, drawn: Sequence[str] | None = None) -> list[Path]:
    """Write tables, counts and pictures to a folder. Returns their paths.

    `drawn` lists the models in the pictures, by default all.
    """
    written = []
    summary = tables.summary()
    for suffix, text in ((".md", markdown(summary)), (".tex", latex(summary))):
        written.append(write(out / f"scores{suffix}", text))
    for name, of in tables.long().items():
        written.append(write(out / f"{name}.csv", of.to_csv()))
    counts = {m: {s: c.to_json() for s, c in sites.items()} for m, sites in tables.counted.items()}
    written.append(write(out / "counts.json", json.dumps(counts) + "\n"))
    return written + _drawn(tables, out, list(tables.counted) if drawn is None else list(drawn))


def _drawn(tables: Tables, out: Path, models: Sequence[str]) -> list[Path]:
    pooled = {m: tables.pooled[m] for m in models}
    maps = {m: c for m, c in pooled.items() if c.years}
    said = {m: sum_of(c.footprint) for m, c in maps.items() if c.footprint}
    moved = {m: sum_of(c.change) for m, c in pooled.items() if c.change}
    names = [
        out / f"{n}.png"
        for n in (
            "iou_by_year",
            "change_f1_by_gap",
            "reliability",
            "precision_recall",
            "change_precision_recall",
        )
    ]
    drawn = []
    if maps:
        scores = {m: metrics.by_year(c)["iou"] for m, c in maps.items()}
        pictures.lines(
            scores,
            names[0],
            "Footprints by year",
            axes=("year", "IoU of footprints"),
            models=models,
        )
        drawn.append(names[0])
    gaps = {m: t["change_f1"] for m, c in pooled.items() if "change_f1" in (t := metrics.by_gap(c))}
    if gaps:
        labels_of = ("gap, calendar years between the two of a pair", "F1 of changed pixels")
        pictures.lines(gaps, names[1], "Change by gap", axes=labels_of, models=models)
        drawn.append(names[1])
    if said:
        pictures.reliability(
            {m: metrics.reliability(h) for m, h in said.items()},
            names[2],
            "Reliability of footprints",
            models=models,
        )
        drawn.append(names[2])
    for histograms, path, title in (
        (said, names[3], "Footprints"),
        (moved, names[4], "Change, all pairs of years"),
    ):
        if histograms:
            curves = {m: metrics.precision_recall(h) for m, h in histograms.items()}
            first = next(iter(histograms.values())).pixels
            share = first[:, 1].sum() / max(first.sum(), 1)
            pictures.precision_recall(curves, path, title, float(share), models=models)
            drawn.append(path)
    return drawn


def sum_of(histograms: Mapping[int, metrics.Histogram]) -> metrics.Histogram:
    """Sum the histograms of all years or gaps."""
    first, *others = histograms.values()
    return sum(others, first)


def markdown(summary: pd.DataFrame) -> str:
    """Format the summary as a Markdown table."""
    rows = [("model", *summary.columns), ("---", *["---:"] * len(summary.columns)), *_rows(summary)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def latex(summary: pd.DataFrame) -> str:
    """Format the summary as a LaTeX tabular for booktabs."""
    rows = [("model", *summary.columns), *_rows(summary)]
    head, *body = (" & ".join(_escaped(cell) for cell in row) + r" \\" for row in rows)
    lines = [
        rf"\begin{{tabular}}{{l{'r' * len(summary.columns)}}}",
        r"\toprule",
        head,
        r"\midrule",
        *body,
        r"\bottomrule",
    ]
    return "\n".join([*lines, r"\end{tabular}"]) + "\n"


def _rows(summary: pd.DataFrame) -> list[tuple[str, ...]]:
    return [
        (str(name), *map(str, row))
        for name, row in zip(summary.index, summary.to_numpy(), strict=True)
    ]


def _escaped(text: str) -> str:
    return "".join("\\" + c if c in "&%$#_{}" else c for c in text)


def cell(row: Any) -> str:
    """Format a score with its interval."""
    if math.isnan(row["score"]):
        return "n/a"
    interval = "" if math.isnan(row["low"]) else f" [{row['low']:.3f}, {row['high']:.3f}]"
    return f"{row['score']:.3f}{interval}"


def _of_change(intervals: pd.DataFrame) -> Sequence[str]:
    """Return the available scores of a change model."""
    names = (*CHANGE_SHOWN, "expansion_auprc", "expansion_f1_at_r", "change_unmapped")
    return [name for name in names if name in intervals.index]


def write(path: Path, text: str) -> Path:
    """Write a file completely or not at all. Raises CatalogError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            part.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CatalogError(
            f"{path}: the scores cannot be written ({error.strerror}); name another place"
        ) from error
    return path


def _without_nan(value: object) -> object:
    """Replace NaN by None, since JSON has no NaN."""
    if isinstance(value, dict):
        return {str(k): _without_nan(v) for k, v in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
