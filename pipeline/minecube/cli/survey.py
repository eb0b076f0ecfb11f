"""Subcommands before a build: search, audit and plan."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
import pandas as pd

from minecube import cube, report, scenes
from minecube.catalog import Recipe, Site, Source, pick
from minecube.cli import build as building
from minecube.cli.common import (
    OutFolder,
    SiteChoice,
    catalog_option,
    choose_sources,
    margin_option,
    progress_bar,
    recipe_option,
    recipes,
    scenes_folder,
    sites_option,
    sites_with_margin,
    snapshots_option,
    source_option,
    store_option,
    table,
    years_option,
)
from minecube.composite import plan as planning
from minecube.errors import CubeError, SceneError
from minecube.files import replacing
from minecube.grid import grid_of
from minecube.scenes import coverage

_SEARCHES = 4
"""Simultaneous searches. Their number depends on the API's latency, not on the cores."""
_LAG = timedelta(days=2)
"""Time until a pass counts as missing. Products are made and listed within about a day."""


@click.command()
@sites_option
@margin_option
@years_option
@source_option
@catalog_option
@click.option(
    "--out",
    type=OutFolder(),
    default=Path("scenes"),
    show_default=True,
    help="Folder for the scene lists.",
)
def search(
    wanted: SiteChoice,
    margin: float | None,
    years: tuple[int, ...],
    source_ids: str,
    catalog: Path | None,
    out: Path,
) -> None:
    """Search the scenes of sites and years, and save one list per site-year.

    The lists are stac-geoparquet files for `build --scenes`.

    \b
    Example:
      minecube search --sites my_mines.geojson --years 2019-2023 --source earth-search --out scenes
    """
    chosen = sites_with_margin(wanted, catalog, margin)
    sources = choose_sources(source_ids, catalog)
    rows = []
    with progress_bar("searching", len(chosen) * len(years)) as advance:
        for site in chosen:
            for year in years:
                found = building.saved_scenes(site, year, sources, out, search_again=True)
                baselines = sorted({s.properties["s2:processing_baseline"] for s in found.scenes})
                cloud = scenes.mean_cloud_cover(found.scenes)
                shown = "?" if math.isnan(cloud) else f"{cloud:.0f}"
                counts = (
                    len(found.scenes),
                    len(scenes.dates(found.scenes)),
                    found.copies,
                    len(found.refused),
                )
                rows.append((site.id, year, *counts, shown, ", ".join(baselines)))
                advance(note=site.id)
    click.echo(
        table(("site", "year", "scenes", "days", "copies", "refused", "cloud %", "baselines"), rows)
    )
    click.echo(f"saved in {out}")


@click.command()
@sites_option
@margin_option
@years_option
@source_option
@recipe_option
@catalog_option
@click.option(
    "--out",
    type=OutFolder(),
    default=Path("audit"),
    show_default=True,
    help="Folder for audit.parquet (by month), audit.csv (by year) and audit.png.",
)
@click.pass_context
def audit(
    ctx: click.Context,
    /,
    wanted: SiteChoice,
    margin: float | None,
    years: tuple[int, ...],
    source_ids: str,
    recipe_id: str,
    catalog: Path | None,
    out: Path,
) -> None:
    """Compare the scenes that each source lists with the passes expected from the orbits.

    Reads no pixels. Exits with 1 if a site-year has fewer usable dates than the recipe needs, or if a
    source does not answer.

    \b
    Example:
      minecube audit --sites my_mines.geojson --years 2015-2024 --source earth-search,planetary-computer --out audit
    """
    chosen = sites_with_margin(wanted, catalog, margin)
    sources = choose_sources(source_ids, catalog)
    recipe = pick(recipes(catalog), recipe_id, "recipe")
    scenes.check_years(years)
    for site in chosen:
        grid_of(site)  # fail early for a site without polygon
    until, parts = datetime.now(tz=UTC).date() - _LAG, []
    unread: list[Unread] = []
    with progress_bar("auditing", len(chosen) * len(years) * len(sources)) as advance:
        for site in chosen:
            listings = _listings(site, years, sources, unread, lambda note: advance(note=note))
            parts += [coverage.audit(listings, recipe, until)] if listings else []
    _show_unread(unread)
    unanswered = len(chosen) * len(years) - sum(by_year["year"].nunique() for _, by_year in parts)
    few = 0
    if parts:
        by_month, by_year = (
            pd.concat(tables, ignore_index=True) for tables in zip(*parts, strict=True)
        )
        few = _show_audit(by_year, recipe)
        _save_audit(by_month, by_year, out, recipe)
    if few or unanswered:
        click.echo(
            f"of {len(chosen) * len(years)} site-years, {few} have too few usable dates and {unanswered} could not be audited",
            err=True,
        )
        ctx.exit(1)


@dataclass(frozen=True)
class Unread:
    """A site-year without answer from a source."""

    site_year: str
    source: str
    reason: str


def _show_unread(unread: Sequence[Unread]) -> None:
    """Print each source's first error, and its number of site-years without answer."""
    by_source: dict[str, list[Unread]] = {}
    for one in unread:
        by_source.setdefault(one.source, []).append(one)
    for source, missing in by_source.items():
        others = f" and {len(missing) - 1} other site-years are" if len(missing) > 1 else " is"
        click.echo(
            f"error: {missing[0].site_year}{others} not audited, {source}: {missing[0].reason}",
            err=True,
        )


def _listings(
    site: Site,
    years: Sequence[int],
    sources: Sequence[Source],
    unread: list[Unread],
    done: Callable[[str], None],
) -> list[coverage.Listing]:
    """List the scenes of each source and year.

    A year with a missing answer is added to `unread` instead.
    """
    listings: list[coverage.Listing] = []
    pool = ThreadPoolExecutor(max_workers=_SEARCHES)
    try:
        tasks = {
            year: [pool.submit(_listing, site, year, source) for source in sources]
            for year in years
        }
        for year, asked in tasks.items():
            errors: list[Unread] = []
            for source, task in zip(sources, asked, strict=True):
                error = task.exception()
                if error and not isinstance(error, SceneError):
                    raise error
                if error:
                    errors.append(Unread(f"{site.id} {year}", source.id, str(error)))
                done(f"{site.id} {year}")
            unread += errors
            listings += [] if errors else [task.result() for task in asked]
    finally:
        pool.shutdown(cancel_futures=True)
    return listings


def _listing(site: Site, year: int, source: Source) -> coverage.Listing:
    try:
        found = scenes.search(site, year, source)
    except scenes.NothingFoundError as error:
        found = error.found
    return coverage.Listing(site=site.id, year=year, source=source.id, found=found)


def _show_audit(by_year: pd.DataFrame, recipe: Recipe) -> int:
    """Print all years, and errors for site-years below the recipe's minimum.

    Returns the number of errors.
    """
    shown = ["site", "year", "source", "listed", "refused", "copies", "scenes"]
    shown += ["days", "expected", "missing", "usable", "gap_days", "cloud", "baselines", "state"]
    text = by_year.assign(cloud=["-" if pd.isna(c) else f"{c:.0f}" for c in by_year["cloud"]])[
        shown
    ].astype(object)
    rows = text.where(text.notna(), "?").to_numpy().tolist()
    click.echo(
        table([name.replace("gap_days", "gap").replace("cloud", "cloud %") for name in shown], rows)
    )
    months = ", ".join(map(str, recipe.months))
    click.echo(
        f"days, expected, missing and usable are dates of months {months}; gap is the most days in a row without a usable one"
    )
    # The last row of a site-year has all sources together.
    few = by_year.groupby(["site", "year"], sort=False).tail(1).query("state != 'ok'")
    for row in few.itertuples():
        click.echo(
            f"error: {row.site} {row.year}: {row.usable} usable dates, and recipe {recipe.id!r} needs {row.needed}; "
            f"the longest gap in season is {row.gap_days} days, {row.gap}",
            err=True,
        )
    return len(few)


def _save_audit(by_month: pd.DataFrame, by_year: pd.DataFrame, out: Path, recipe: Recipe) -> None:
    """Write each file completely or not at all. Raises CubeError if a file cannot be written."""
    for path, write in (
        (out / "audit.parquet", by_month.to_parquet),
        (out / "audit.csv", by_year.to_csv),
    ):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as part:
                write(part, index=False)
        except OSError as error:
            raise CubeError(
                f"{path}: cannot be written ({error.strerror or error}); choose another --out"
            ) from error
    report.coverage_map(
        by_month, by_year, out / "audit.png", f"Usable dates by month, recipe {recipe.id}"
    )
    click.echo(f"saved in {out}")


@click.command()
@sites_option
@margin_option
@years_option
@source_option
@store_option
@recipe_option
@catalog_option
@snapshots_option
@click.option(
    "--prices",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="YAML file with any of latency_s, mb_per_s, cores, currency, per_1000_requests, per_gb and per_core_hour.",
)
@click.pass_context
def plan(
    ctx: click.Context,
    /,
    wanted: SiteChoice,
    margin: float | None,
    years: tuple[int, ...],
    source_ids: str,
    store: cube.Store,
    recipe_id: str,
    catalog: Path | None,
    snapshots: Path | None,
    prices: Path | None,
) -> None:
    """Estimate the requests, bytes, memory, time and cost of a build.

    Reads no pixels and writes nothing. Saved scene lists are used; missing ones are searched.

    \b
    Example:
      minecube plan --sites my_mines.geojson --years 2019-2023 --source earth-search --store cubes.zarr --prices prices.yaml
    """
    job = building.Job(
        store=store,
        sources=choose_sources(source_ids, catalog),
        recipe=pick(recipes(catalog), recipe_id, "recipe"),
        snapshots=scenes_folder(snapshots, store),
    )
    terms = planning.Terms.load(prices) if prices else planning.Terms()
    ctx.exit(show_plan(job, sites_with_margin(wanted, catalog, margin, store), years, terms))


def show_plan(
    job: building.Job, chosen: Sequence[Site], years: Sequence[int], terms: planning.Terms
) -> int:
    """Print upper bounds for each site-year, and their sum over the uncommitted ones.

    Returns:
        The exit code: 1 if a site-year has no scenes, else 0.

    Raises:
        SceneError: no site-year has scenes, and not all searches were empty.
    """
    scenes.check_years(years)
    failed: list[SceneError] = []
    rows: list[tuple[object, ...]] = []
    total = planning.Estimate()
    committed = {site.id: cube.builds(job.store, site.id) for site in chosen}
    notes = [
        made["took"]
        for years_made in committed.values()
        for made in years_made.values()
        if "took" in made
    ]
    pace = planning.pace(notes, terms)
    find = building.remembered(building.known_scenes)
    for site in chosen:
        grid = grid_of(site)
        cube.check(job.store, site, grid, years, job.recipe)
        for year in years:
            try:
                _, listed = building.chosen_scenes(job, site, year, find)
            except SceneError as error:
                failed.append(error)
                rows.append(_row(site.id, year, "no scenes", 0, planning.Estimate(), terms, pace))
                continue
            state, needs = "to build", planning.estimate(listed, grid, job.recipe)
            made = committed[site.id].get(year)
            if made:
                asked = cube.build_id(cube.provenance_of(site, year, grid, job.recipe, listed))
                state = "committed" if made["build_id"] == asked else "committed from other scenes"
            if state == "committed":
                needs = planning.Estimate(scenes=len(listed))
            total += needs
            rows.append(_row(site.id, year, state, len(scenes.dates(listed)), needs, terms, pace))
    if len(failed) == len(rows) and not all(
        isinstance(e, scenes.NothingFoundError) and not e.found.refused for e in failed
    ):
        raise failed[0]
    for failure in failed:
        click.echo(f"error: {failure}", err=True)
    if len(rows) > 1:
        rows.append(_row("all", "", "", "", total, terms, pace))
    priced = ("cost " + terms.currency,) if total.cost(terms) is not None else ()
    headings = (
        "site",
        "year",
        "state",
        "days",
        "scenes",
        "reads",
        "checks",
        "requests",
        "MB",
        "MB a block",
        "s",
        *priced,
    )
    click.echo(table(headings, rows))
    assumed = ", ".join(
        f"{name} {value}" for name, value in dataclasses.asdict(terms).items() if value is not None
    )
    click.echo(
        f"reads, checks, requests, MB and MB a block are the most, with {assumed}; nothing was read or written"
    )
    how = "a guess, since this store has no builds to compare with; it may be wrong several times over"
    if pace is not None:
        how = f"from {len(notes)} builds in this store, which took {pace:.2f} times the guess for their size"
    start = planning.START_S if total.site_years else 0.0
    expected = total.seconds(terms) * (pace or 1.0) + start
    click.echo(f"expected time: {expected:.0f} s in all, {start:.0f} s to begin included ({how})")
    return 1 if failed else 0


def _row(
    site: str,
    year: object,
    state: str,
    days: object,
    needs: planning.Estimate,
    terms: planning.Terms,
    pace: float | None,
) -> tuple[object, ...]:
    cost = needs.cost(terms, pace or 1.0)
    return (
        *(site, year, state, days, needs.scenes, needs.reads, needs.checks, needs.requests),
        *(
            round(needs.bytes / 1e6, 1),
            round(needs.block_bytes / 1e6),
            round(needs.seconds(terms) * (pace or 1.0), 1),
        ),
        *(() if cost is None else (f"{cost:.4f}",)),
    )
