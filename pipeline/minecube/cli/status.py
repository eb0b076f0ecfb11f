"""Subcommand status: the state of a dataset or a store."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import pandas as pd
from rich.console import Console
from rich.live import Live
from rich.text import Text

from minecube import cube
from minecube.catalog import Dataset, load_dataset
from minecube.cli.parameters import OutFile
from minecube.errors import CatalogError
from minecube.jobs.status import (
    Status,
    list_areas,
    list_store_areas,
    make_map,
    read_status,
    read_store_status,
)
from minecube.jobs.tables import format_table
from minecube.places import Place, outgoing

_MOST_SITES = 60
"""Most sites in the table; of more, only unfinished sites are shown."""
_MOST_REASONS = 20
_WATCH_S = 5.0
_MARKS = {"done": "done", "to do": "-", "interrupted": "cut off"}
"""State -> word in the table, where it differs."""


@click.command()
@click.argument("dataset", type=click.Path(dir_okay=False, path_type=Path), required=False)
@click.option("--store", help="Show the sites and years of this store instead of a dataset.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "csv", "json", "parquet"]),
    default="table",
    show_default=True,
    help="parquet: a GeoParquet map, one polygon per site-year.",
)
@click.option("--out", type=OutFile(), help="File to write. Needed for parquet.")
@click.option("--watch", is_flag=True, help=f"Show the table again every {_WATCH_S:g} s.")
def status(
    dataset: Path | None, store: str | None, form: str, out: Place | None, watch: bool
) -> None:
    """Show the state of each site-year and step of DATASET, a dataset.yaml.

    The state is read from the store, so no run needs to be going. States: done, gaps (committed,
    but with lost reads), stale (committed from other inputs), running, failed, cut off (its worker
    died) and - (to do).

    \b
    Examples:
      minecube status dataset.yaml
      minecube status dataset.yaml --format parquet --out states.parquet
      minecube status --store cubes.zarr
    """
    read, areas = _choose_place(dataset, store)
    if watch:
        if form != "table" or out:
            raise click.UsageError("--watch shows the table: leave out --format and --out")
        _watch(read)
    found = read()
    if form == "parquet":
        if out is None:
            raise click.UsageError("--format parquet: expected --out FILE for the map")
        with outgoing(out) as path:
            make_map(found, areas()).to_parquet(path)
        click.echo(f"{out}: {len(found.site_years)} site-years")
        return
    text = _format(found, form)
    if out is None:
        click.echo(text)
    else:
        with outgoing(out) as path:
            path.write_text(text + "\n", encoding="utf-8")
        click.echo(f"{out}: {len(found.site_years)} site-years")


def _choose_place(
    path: Path | None, store_name: str | None
) -> tuple[Callable[[], Status], Callable[[], Mapping[str, Any]]]:
    """Return functions that read the state, and the areas of sites."""
    if (path is None) == (store_name is None):
        raise click.UsageError("expected either DATASET, a dataset.yaml, or --store")
    if store_name is not None:
        store = cube.Store.connect(store_name)
        return lambda: read_store_status(store), lambda: list_store_areas(store)
    dataset: Dataset = load_dataset(Path(str(path)))
    return lambda: read_status(dataset), lambda: list_areas(dataset)


def _watch(read: Callable[[], Status]) -> None:
    console = Console()
    if not console.is_terminal:
        raise CatalogError("--watch needs a terminal; leave it out to print the table once")
    with Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(Text(_format(read(), "table")), refresh=True)
            time.sleep(_WATCH_S)


def _format(found: Status, form: str) -> str:
    if form == "csv":
        return found.site_years.reset_index().to_csv(index=False).rstrip("\n")
    if form == "json":
        return found.site_years.reset_index().to_json(orient="records", lines=True).rstrip("\n")
    parts = [_format_sites(found), _format_totals(found), _format_reasons(found)]
    return "\n\n".join(filter(None, parts))


def _format_sites(found: Status) -> str:
    """Format a table with one row per site: a column per year and per step."""
    states = found.site_years.reset_index().pivot_table(
        values="state", index="site", columns="year", aggfunc="first", sort=False
    )
    steps = found.steps.loc[:, (found.steps != "").any()]  # a store of no run has none
    table = pd.concat([states.sort_index(axis=1), steps], axis=1).fillna("").replace(_MARKS)
    hidden = 0
    if len(table) > _MOST_SITES:
        unfinished = table[(table != "done").any(axis=1)]
        hidden = len(table) - min(len(unfinished), _MOST_SITES)
        table = unfinished.head(_MOST_SITES)
    rows = [(site, *row) for site, row in zip(table.index, table.to_numpy().tolist(), strict=True)]
    text = format_table(("site", *map(str, table.columns)), rows)
    if hidden:
        text += f"\n{hidden} more sites are not shown; --format csv lists all"
    return text


def _format_totals(found: Status) -> str:
    counts = [f"{count} {state}" for state, count in found.counts.items() if count]
    lines = [f"{len(found.site_years)} site-years: {', '.join(counts) or 'none'}"]
    spent = found.spent
    line = f"{found.km2:,.0f} km2 built, {spent['mb']:,.0f} MB in {spent['requests']:,.0f} requests"
    if found.cost is not None:
        line += f", {found.cost:,.2f} {found.currency}"
    lines.append(line)
    if found.left is not None:
        hours = found.left.total_seconds() / 3600
        lines.append(f"{found.per_hour:,.1f} site-years per hour, {hours:,.1f} h left")
    return "\n".join(lines)


def _format_reasons(found: Status) -> str:
    """Format why site-years are not done, and why steps of sites have failed."""
    of_years = found.site_years[found.site_years["why"] != ""].reset_index()
    of_steps = found.step_failures.rename(columns={"step": "year"}).assign(state="failed")
    table = pd.concat([of_years, of_steps])
    lines = []
    for row in table.head(_MOST_REASONS).to_dict("records"):
        text = f"{row['site']} {row['year']}: {row['state']}"
        if row["error_class"]:
            text += f" ({row['error_class']})"
        if row["attempts"] > 1:
            text += f", {row['attempts']:.0f} attempts"
        lines.append(f"{text}: {row['why']}")
    if len(table) > _MOST_REASONS:
        lines.append(f"and {len(table) - _MOST_REASONS} more: --format csv lists all site-years")
    return "\n".join(lines)
