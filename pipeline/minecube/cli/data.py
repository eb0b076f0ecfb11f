"""Subcommands sites, simulate, build and label."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import geopandas as gpd
import numpy as np
import pandas as pd
from odc.geo.geobox import GeoBox

from minecube import cube, labels
from minecube import export as exporting
from minecube.catalog import Recipe, pick
from minecube.cli import build as building
from minecube.cli.common import (
    SEED,
    FiniteRange,
    SiteChoice,
    Years,
    catalog_option,
    choose_sources,
    executor_of,
    layer_option,
    margin_option,
    progress_bar,
    recipe_option,
    recipes,
    scenes_folder,
    scheduler_option,
    sites_option,
    sites_with_margin,
    sites_with_polygons_option,
    snapshots_option,
    source_option,
    stored_sites,
    table,
    writable_store_option,
    years_option,
)
from minecube.cli.survey import show_plan
from minecube.composite import Tools, plan
from minecube.errors import CatalogError, LabelError
from minecube.grid import grid_of
from minecube.scenes import offsets
from minecube.simulate import World
from minecube.simulate import simulate as make_world
from minecube.vectors import NAMED, texts

_SOURCES = 8  # most label sources or sites listed by name
LARGE_KM2 = 2500
"""Largest site built without --yes. Europe's largest open pits cover less than 100 km2."""


@click.command()
@sites_option
@margin_option
@catalog_option
def sites(wanted: SiteChoice, margin: float | None, catalog: Path | None) -> None:
    """List sites with country, split, years and grid.

    \b
    Examples:
      minecube sites --sites 'Germany_*'
      minecube sites --sites my_mines.geojson
    """
    rows = []
    for site in sites_with_margin(wanted, catalog, margin):
        grid = grid_of(site) if site.geometry is not None else None
        whole = len(site.years) > 1 and site.years == tuple(
            range(site.years[0], site.years[-1] + 1)
        )
        years = (
            f"{site.years[0]}-{site.years[-1]}" if whole else ",".join(map(str, site.years)) or "-"
        )
        where = (
            f"EPSG:{grid.crs.epsg} {grid.shape.x} x {grid.shape.y} px" if grid else "no polygon yet"
        )
        rows.append(
            (site.id, site.country or "-", site.split or "-", years, where, site.title or "-")
        )
    titled = any(row[-1] != "-" for row in rows)
    columns = ("site", "country", "split", "years", "grid", "title")[: 6 if titled else 5]
    click.echo(table(columns, [row[: len(columns)] for row in rows]))


@click.command()
@sites_option
@margin_option
@catalog_option
@click.option(
    "--years", type=Years(), default="2015,2020,2022", show_default=True, help="Years to simulate."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder for the archive. Pass it to other commands as --catalog.",
)
@click.option(
    "--dates",
    "dates_per_year",
    default=22,
    show_default=True,
    help="Acquisition dates per growing season.",
)
@click.option(
    "--seed", type=SEED, default=0, show_default=True, help="The same seed gives the same pixels."
)
def simulate(
    wanted: SiteChoice, margin: float | None, catalog: Path | None, out: Path, **world: Any
) -> None:
    """Simulate a Sentinel-2 archive over sites, with the truth.

    Each site is listed in the style of another provider.

    \b
    Example:
      minecube simulate --sites demo_1 --years 2020-2022 --out world
      minecube build --catalog world --sites demo_1 --years 2020-2022 --source sim-cdse --store cubes.zarr
    """
    chosen = sites_with_margin(wanted, catalog, margin)
    asked = World(**world)
    with progress_bar("simulating") as advance:
        make_world(chosen, out, asked, progress=lambda note: advance(note=note))
    click.echo(
        f"{out}: {len(chosen)} sites, {len(asked.years)} years; use it with --catalog {out} --source sim-earth-search"
    )


@click.command()
@sites_option
@margin_option
@years_option
@source_option
@writable_store_option
@recipe_option
@catalog_option
@snapshots_option
@scheduler_option
@click.option(
    "--overwrite",
    is_flag=True,
    help="Rebuild site-years that were built from other scenes or with lost reads. The old "
    "pixels stay until the new build is complete.",
)
@click.option(
    "--on-offset-conflict",
    type=click.Choice(offsets.POLICIES),
    default="drop",
    show_default=True,
    help="What to do with a scene whose offset contradicts its pixels. warn: keep the scene. "
    "fix: use the other offset. drop: leave the scene out. fail: fail the site-year.",
)
@click.option(
    "--min-read-completeness",
    type=FiniteRange(0, 1),
    default=1.0,
    show_default=True,
    help="Commit a site-year only if at least this share of its reads succeeded. Below 1, lost reads count as unobserved.",
)
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    help="Device for the reducers: cpu, or a GPU (cuda).",
)
@click.option(
    "--yes",
    is_flag=True,
    help=f"Also build sites larger than {LARGE_KM2} km2. Without --yes, their plan is shown and nothing is built.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print the plan, as `minecube plan` does. Reads no pixels and writes nothing.",
)
@click.pass_context
def build(
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
    scheduler: str | None,
    device: str,
    yes: bool,
    dry_run: bool,
    **how: Any,
) -> None:
    """Composite scenes into cloud-free annual cubes, with one Zarr group per site.

    Finished site-years are skipped. An interrupted build resumes when you run it again.

    \b
    Examples:
      minecube build --sites my_mines.geojson --years 2019-2023 --source earth-search --store cubes.zarr
      minecube build --sites my_mines.geojson --years 2019-2023 --source earth-search-c1,planetary-computer --store cubes.zarr
    """
    recipe = pick(recipes(catalog), recipe_id, "recipe")
    folder = scenes_folder(snapshots, store)
    job = building.Job(
        store=store,
        sources=choose_sources(source_ids, catalog),
        recipe=recipe,
        snapshots=folder,
        **how,
    )
    chosen = sites_with_margin(wanted, catalog, margin, store)
    if dry_run:
        ctx.exit(show_plan(job, chosen, years, plan.Terms()))
    large = [s for s in chosen if math.prod(grid_of(s).shape) > LARGE_KM2 * 10_000]
    if large and not yes:
        show_plan(job, large, years, plan.Terms())
        named = ", ".join(f"{s.id} ({math.prod(grid_of(s).shape) / 1e4:,.0f} km2)" for s in large)
        raise CatalogError(
            f"{named}: larger than {LARGE_KM2} km2, which no mine is, so nothing was built; the table says what it would take: "
            "check the polygon, or say --yes"
        )
    job = dataclasses.replace(job, tools=_tools(recipe, device, catalog))
    with (
        progress_bar("building", len(chosen) * len(years)) as advance,
        executor_of(scheduler) as executor,
    ):
        outcomes = building.build(
            job, chosen, years, executor, lambda o: advance(note=f"{o.site} {o.year}")
        )
    click.echo(
        table(
            ("site", "year", "state", "scenes", "days", "offsets in conflict", "lost reads", "s"),
            [
                (
                    o.site,
                    o.year,
                    o.state,
                    o.scenes,
                    o.days,
                    o.conflicts,
                    o.reads.get("lost", 0),
                    round(o.seconds, 1),
                )
                for o in outcomes
            ],
        )
    )
    _show_planned_and_actual(outcomes)
    for outcome in outcomes:
        for name, why in outcome.copies.items():
            click.echo(f"{outcome.site} {outcome.year}: {name}: {why}")
        if outcome.message:
            said = "" if outcome.state == "kept" else "error: "
            click.echo(f"{said}{outcome.site} {outcome.year}: {outcome.message}", err=True)
    _exit_if_failed(ctx, outcomes, store)


def _exit_if_failed(
    ctx: click.Context, outcomes: Sequence[building.Outcome], store: cube.Store
) -> None:
    """Count what failed, and exit with 1 if anything did."""
    failed = sum(o.state == "failed" for o in outcomes)
    stale = sum(o.state == "stale" for o in outcomes)
    if failed:
        click.echo(
            f"{failed} of {len(outcomes)} site-years failed and are not in {store}; run the same command again to try them",
            err=True,
        )
    if stale:
        click.echo(
            f"{stale} of {len(outcomes)} site-years failed; {store} keeps an older build of them",
            err=True,
        )
    if failed or stale:
        ctx.exit(1)


def _tools(recipe: Recipe, device: str, catalog: Path | None) -> Tools:
    """Load the reducers for the device, and the recipe's second mask.

    Raises:
        CatalogError: a package is missing. The message names the extra to install.
        ModelError: the device is missing, or weights cannot be loaded.
    """
    tools = Tools()
    if device != "cpu":
        try:
            from minecube.composite.torch_reducers import TorchReducers  # an extra, for GPUs only
        except ModuleNotFoundError as error:
            raise CatalogError("--device needs PyTorch: pip install 'minecube[torch]'") from error
        tools = Tools(reducers=TorchReducers(device))
    if recipe.second_opinion:
        try:
            from minecube.composite.opinion import OmniCloudMask
        except ModuleNotFoundError as error:
            raise CatalogError(
                f"recipe {recipe.id!r} asks for a second opinion on clouds, which needs a package more: "
                "pip install 'minecube[clouds]'"
            ) from error
        beside = catalog or Path()
        weights = [str(beside / w) for w in recipe.second_opinion.weights]
        tools = Tools(reducers=tools.reducers, opinion=OmniCloudMask(weights, device))
    return tools


def _show_planned_and_actual(outcomes: Sequence[building.Outcome]) -> None:
    """Print planned upper bounds next to actual reads, requests and megabytes."""
    built = [o for o in outcomes if o.planned]
    if not built:
        return
    planned = sum((o.planned for o in built if o.planned), plan.Estimate())
    looks = {
        name: sum(o.looks[name] for o in built)
        for name in ("planned", "requests", "bytes", "retried")
    }
    reads = {name: sum(o.reads[name] for o in built) for name in looks}
    actual = {name: reads[name] + looks[name] for name in looks}
    rows = [
        ("reads", planned.reads, int(reads["planned"])),
        ("reads that check offsets and places", planned.checks, int(looks["planned"])),
        ("requests", planned.requests, int(actual["requests"])),
        ("MB", round(planned.bytes / 1e6, 1), round(actual["bytes"] / 1e6, 1)),
    ]
    click.echo("\n" + table(("", "planned, at most", "actual"), rows))
    if actual["retried"]:
        click.echo(f"{int(actual['retried'])} requests were tried again")


@click.command()
@writable_store_option
@sites_with_polygons_option
@click.option(
    "--polygons",
    type=click.Path(path_type=Path),
    required=True,
    help=f"File of polygons ({NAMED}). Optional columns: `year`, or `start` and `end`, for "
    "polygons of some years; `site` for polygons of one site; `source`, `licence` and "
    "`doi`, which exports cite.",
)
@layer_option
def label(store: cube.Store, wanted: SiteChoice, polygons: Path, layer: str | None) -> None:
    """Draw mine polygons on the grids of the cubes.

    Writes `footprint` (1 mine, 0 background, 255 unknown) and `footprint_fraction`, the share of each
    pixel inside the mine. A row without a site is drawn at every site that it overlaps. Check a file
    with `minecube polygons` first.

    \b
    Example:
      minecube label --store cubes.zarr --polygons mines.gpkg
      minecube label --store cubes.zarr --polygons mines.gpkg --layer mines_2019
    """
    found = labels.read_polygons(polygons, layer)
    there = cube.sites(store)
    found = labels.match_sites(found, there, polygons)
    unread = labels.unread_years(found)
    rows = []
    reached: set[Any] = set()
    for site_id in stored_sites(store, wanted, there):
        grid, years = cube.grid_and_years(store, site_id)
        own = _polygons_of(found, site_id, grid, polygons)
        reached |= set(own.index)
        _report_missed(own, grid, site_id)
        if unread:
            click.echo(
                f"{site_id}: rows without years are drawn in {', '.join(map(str, years))}", err=True
            )
        footprint = labels.rasterize(own, grid, years)
        fraction = labels.covered(own, grid, years)
        cube.write_footprint(store, site_id, footprint, _origin(own, polygons), fraction)
        for year in footprint.year.values:
            mask = footprint.sel(year=year).values
            known = (mask != 255).any()
            rows.append(
                (
                    site_id,
                    int(year),
                    round(float((mask == 1).sum()) / 1e4, 3) if known else "unknown",
                )
            )
    click.echo(table(("site", "year", "mine km2"), rows))
    _report_unused(found, reached, [row[0] for row in rows], there, polygons)


def _polygons_of(
    polygons: gpd.GeoDataFrame, site_id: str, grid: GeoBox, path: Path
) -> gpd.GeoDataFrame:
    """Return the rows on a site's grid naming this site or no site.

    Raises LabelError without such rows.
    """
    own = polygons[labels.of_no_site(polygons) | labels.of_site(polygons, site_id)]
    if own.empty:
        named = ", ".join(sorted(polygons["site"].unique())[:8])
        raise LabelError(f"{path}: no polygon of site {site_id!r}; its `site` column has {named}")
    return own.loc[labels.on_grid(own, grid).index]


def _report_missed(polygons: gpd.GeoDataFrame, grid: GeoBox, site_id: str) -> None:
    missed = labels.rows_without_centre(polygons, grid)
    if len(missed):
        click.echo(
            f"{site_id}: {len(missed)} of {len(polygons)} polygons hold no pixel's centre ({labels.index_text(missed)}); "
            "`footprint` has no pixel of them, `footprint_fraction` has their area",
            err=True,
        )


def _report_unused(
    polygons: gpd.GeoDataFrame,
    drawn: set[Any],
    labelled: Sequence[str],
    there: Sequence[str],
    path: Path,
) -> None:
    """Report rows without a site, and rows drawn nowhere."""
    unnamed = labels.of_no_site(polygons)
    reaching = polygons.index.isin(drawn)
    astray = (
        ~unnamed
        & ~reaching
        & np.any([labels.of_site(polygons, site) for site in set(labelled)], axis=0)
    )
    reports = {
        "name no site and are drawn at each site that they reach": unnamed
        & reaching
        & (not unnamed.all()),
        "name no site, reach none of these sites and are left out": unnamed & ~reaching,
        "do not reach the site that they name and are left out": astray,
    }
    for words, rows in reports.items():
        if rows.any():
            said = f"{path}: {rows.sum()} of {len(polygons)} polygons {words}: {labels.index_text(polygons.index[rows])}"
            click.echo(said, err=True)
    foreign = (
        polygons["site"][~unnamed & ~polygons["site"].isin(there)].value_counts()
        if "site" in polygons
        else {}
    )
    if len(foreign):
        names = ", ".join(f"{name} ({count})" for name, count in list(foreign.items())[:_SOURCES])
        more = f" and {len(foreign) - _SOURCES} more" if len(foreign) > _SOURCES else ""
        click.echo(
            f"{path}: left out, rows of sites that the store has not: {names}{more}", err=True
        )


def _origin(polygons: gpd.GeoDataFrame, path: Path) -> str:
    """Format the origins of polygons: `EuroMineNet (CC-BY-4.0) doi:10.14278/rodare.4656`."""
    names = [
        c for c in polygons.columns if str(c).lower() in ("source", "licence", "license", "doi")
    ]
    columns = {str(c).lower(): texts(polygons[c]).fillna("") for c in names}
    licence = columns.get("licence", columns.get("license"))
    none = pd.Series("", polygons.index, dtype="string")
    told = pd.DataFrame(
        {"source": columns.get("source", none), "licence": none if licence is None else licence}
    )
    told["doi"] = columns.get("doi", none)
    if told["source"].nunique() > _SOURCES:
        told["source"] = ""  # some maps have one source per polygon
    rows = told.drop_duplicates().sort_values(["source", "licence", "doi"]).itertuples(index=False)
    # Always write a licence: otherwise brackets in a name would be read as one.
    named = (
        (source or path.name, licence or exporting.NOT_STATED, f" doi:{doi}" if doi else "")
        for source, licence, doi in rows
    )
    return exporting.SEVERAL.join(f"{source} ({licence}){doi}" for source, licence, doi in named)
