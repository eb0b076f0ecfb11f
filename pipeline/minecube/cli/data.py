"""Subcommands that make data: sites, simulate, search, build, label."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path

import click
import odc.geo.xr  # noqa: F401  registers the .odc accessor

from minecube import cube, labels, scenes
from minecube.catalog import Site, pick
from minecube.cli import build as building
from minecube.cli.common import (
    Years,
    catalog_option,
    choose_sites,
    progress_bar,
    recipes,
    sites_option,
    sources,
    store_option,
    stored_sites,
    table,
    years_option,
)
from minecube.errors import CatalogError, LabelError, SceneError
from minecube.grid import grid_of
from minecube.simulate import World
from minecube.simulate import simulate as make_world

source_option = click.option(
    "--source", "source_id", required=True, help="Where scenes come from: earth-search, cdse, ... (catalog/sources.yaml)."
)
recipe_option = click.option(
    "--recipe", "recipe_id", default="annual-median", show_default=True, help="How a composite is made (catalog/recipes.yaml)."
)


@click.command()
@sites_option
@catalog_option
def sites(wanted: str, catalog: Path | None) -> None:
    """List sites: name, country, split, years, and the grid where the area of interest is known.

    \b
    Examples:
      minecube sites --sites 'Germany_*'
      minecube sites --sites my_mines.geojson
    """
    rows = []
    for site in choose_sites(wanted, catalog):
        grid = grid_of(site) if site.geometry is not None else None
        whole = len(site.years) > 1 and site.years == tuple(range(site.years[0], site.years[-1] + 1))
        years = f"{site.years[0]}-{site.years[-1]}" if whole else ",".join(map(str, site.years)) or "-"
        where = f"EPSG:{grid.crs.epsg} {grid.shape.x} x {grid.shape.y} px" if grid else "no polygon yet"
        rows.append((site.id, site.country or "-", site.split or "-", years, where))
    click.echo(table(("site", "country", "split", "years", "grid"), rows))


@click.command()
@sites_option
@catalog_option
@click.option("--years", type=Years(), default="2015,2020,2022", show_default=True, help="Years to simulate.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the archive; becomes a --catalog.")
@click.option("--dates", default=22, show_default=True, help="Acquisition dates a year in the growing season.")
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same pixels.")
def simulate(wanted: str, catalog: Path | None, years: tuple[int, ...], out: Path, dates: int, seed: int) -> None:
    """Make a Sentinel-2 archive over sites, in the styles of three providers, with the truth beside it.

    \b
    Example:
      minecube simulate --sites demo_1 --years 2020-2022 --out world
      minecube build --catalog world --sites demo_1 --years 2020-2022 --source sim-cdse --store cubes.zarr
    """
    chosen = choose_sites(wanted, catalog)
    with progress_bar("simulating") as advance:
        make_world(chosen, out, World(years=years, dates_per_year=dates, seed=seed), progress=lambda note: advance(note=note))
    click.echo(f"{out}: {len(chosen)} sites, {len(years)} years; use it with --catalog {out} --source sim-earth-search")


@click.command()
@sites_option
@years_option
@source_option
@catalog_option
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("scenes"), show_default=True, help="Folder for the scene lists."
)
def search(wanted: str, years: tuple[int, ...], source_id: str, catalog: Path | None, out: Path) -> None:
    """Find the scenes of sites and years, and save each list as stac-geoparquet for `build --scenes`.

    \b
    Example:
      minecube search --sites my_mines.geojson --years 2019-2023 --source earth-search --out scenes
    """
    source = pick(sources(catalog), source_id, "source")
    chosen = choose_sites(wanted, catalog)
    rows = []
    with progress_bar("searching", len(chosen) * len(years)) as advance:
        for site in chosen:
            for year in years:
                found = building.snapshot(site, year, source, out, anew=True)
                baselines = sorted({s.properties["s2:processing_baseline"] for s in found})
                cloud = sum(s.properties["eo:cloud_cover"] for s in found) / len(found)
                days = len({s.properties["minecube:solar_day"] for s in found})
                rows.append((site.id, year, len(found), days, f"{cloud:.0f}", ", ".join(baselines)))
                advance(note=site.id)
    click.echo(table(("site", "year", "scenes", "days", "cloud %", "baselines"), rows))
    click.echo(f"saved in {out}")


@click.command()
@sites_option
@years_option
@source_option
@store_option
@recipe_option
@catalog_option
@click.option(
    "--scenes",
    "snapshots",
    type=click.Path(path_type=Path),
    help="Folder of scene lists, used where there and filled where not. [default: <store>-scenes]",
)
@click.option("--scheduler", help="Address of a Dask scheduler (tcp://host:8786); this machine's threads by default.")
@click.option(
    "--overwrite", is_flag=True, help="Replace site-years that were built from other scenes; the old are gone at once."
)
@click.option("--dry-run", is_flag=True, help="Say what would be built from which scenes; reads no pixel, writes nothing.")
@click.pass_context
def build(
    ctx: click.Context,
    wanted: str,
    years: tuple[int, ...],
    source_id: str,
    store: str,
    recipe_id: str,
    catalog: Path | None,
    snapshots: Path | None,
    scheduler: str | None,
    overwrite: bool,
    dry_run: bool,
) -> None:
    """Composite scenes into cloud-free annual cubes, one Zarr group a site.

    Run again, it does nothing for what is there; interrupted, it goes on where it stopped.

    \b
    Examples:
      minecube build --sites my_mines.geojson --years 2019-2023 --source earth-search --store cubes.zarr
      minecube build --sites my_mines.geojson --years 2019-2023 --source earth-search --store cubes.zarr --dry-run
    """
    source, recipe = pick(sources(catalog), source_id, "source"), pick(recipes(catalog), recipe_id, "recipe")
    chosen = choose_sites(wanted, catalog)
    folder = snapshots or Path(f"{store.rstrip('/').rpartition('/')[2] if '://' in store else store.rstrip('/')}-scenes")
    job = building.Job(store=store, source=source, recipe=recipe, snapshots=folder, overwrite=overwrite)
    if dry_run:
        click.echo(_plan(job, chosen, years))
        return
    with progress_bar("building", len(chosen) * len(years)) as advance, _executor(scheduler) as executor:
        outcomes = building.build(job, chosen, years, executor, lambda o: advance(note=f"{o.site} {o.year}"))
    click.echo(
        table(
            ("site", "year", "state", "scenes", "days", "s"),
            [(o.site, o.year, o.state, o.scenes, o.days, round(o.seconds, 1)) for o in outcomes],
        )
    )
    failed = [o for o in outcomes if o.state == "failed"]
    for outcome in failed:
        click.echo(f"error: {outcome.site} {outcome.year}: {outcome.message}", err=True)
    if failed:
        click.echo(
            f"{len(failed)} of {len(outcomes)} site-years failed and are not in {store}; run again to try just those", err=True
        )
        ctx.exit(1)


@click.command()
@store_option
@sites_option
@click.option(
    "--polygons",
    type=click.Path(path_type=Path),
    required=True,
    help="GeoJSON, GeoPackage, GeoParquet or Shapefile; with a `year` column where footprints differ by year, a `site` "
    "column where sites are told apart by name.",
)
def label(store: str, wanted: str, polygons: Path) -> None:
    """Rasterise mine polygons onto the cubes' grids: footprint 1 mine, 0 not, 255 unknown.

    \b
    Example:
      minecube label --store cubes.zarr --polygons mines.gpkg
    """
    found = labels.read_polygons(polygons)
    rows = []
    for site_id in stored_sites(store, wanted):
        opened = cube.open_cube(store, site_id)
        own = found[found["site"] == site_id] if "site" in found else found
        if own.empty:
            named = ", ".join(sorted(found["site"].astype(str).unique())[:8])
            raise LabelError(f"{polygons}: no polygon of site {site_id!r}; its `site` column has {named}")
        footprint = labels.rasterize(own, opened.odc.geobox, [int(y) for y in opened.year])
        cube.write_footprint(store, site_id, footprint, origin=polygons.name)
        for year in footprint.year.values:
            mask = footprint.sel(year=year).values
            known = (mask != 255).any()
            rows.append((site_id, int(year), round(float((mask == 1).sum()) / 1e4, 3) if known else "unknown"))
    click.echo(table(("site", "year", "mine km2"), rows))


def _plan(job: building.Job, chosen: Sequence[Site], years: Sequence[int]) -> str:
    scenes.check_years(years)
    rows: list[tuple[object, ...]] = []
    for site in chosen:
        cube.check(job.store, site, grid_of(site), years, job.recipe)
        committed = cube.builds(job.store, site.id)
        for year in years:
            try:
                listed = scenes.select(building.known_scenes(site, year, job.source, job.snapshots), job.recipe)
            except SceneError as error:
                click.echo(f"error: {site.id} {year}: {error}", err=True)
                rows.append((site.id, year, "no scenes", 0, 0, 0))
                continue
            state = "to build"
            if year in committed:
                asked = cube.build_id(cube.provenance_of(site, year, grid_of(site), job.recipe, listed))
                state = "committed" if committed[year]["build_id"] == asked else "committed from other scenes"
            days = len({s.properties["minecube:solar_day"] for s in listed})
            rows.append((site.id, year, state, len(listed), days, len(listed) * (len(job.recipe.bands) + 1)))
    headings = ("site", "year", "state", "scenes", "days", "reads a block at most")
    return table(headings, rows) + "\ndry run: nothing was read or written"


@contextmanager
def _executor(scheduler: str | None) -> Iterator[Executor | None]:
    """The Dask scheduler's executor, or None for this machine's threads."""
    if scheduler is None:
        yield None
        return
    try:
        from distributed import Client  # an extra: one machine needs none of it
    except ModuleNotFoundError as error:
        raise CatalogError("--scheduler needs one package more: pip install 'minecube[cluster]'") from error
    try:
        client = Client(scheduler, timeout="10s")  # type: ignore[no-untyped-call]
    except OSError as error:
        raise CatalogError(f"no Dask scheduler answers at {scheduler} ({error}); start one with `dask scheduler`") from error
    with client:
        yield client.get_executor()  # type: ignore[no-untyped-call]
