"""Subcommand label: draw mine polygons on the grids of the cubes."""

from __future__ import annotations

import click
import geopandas as gpd
import pandas as pd

from minecube import cube, labels
from minecube.cli.bars import progress_bar
from minecube.cli.options import (
    StoreSites,
    collect_options,
    layer_option,
    sites_with_polygons_option,
    writable_store_option,
)
from minecube.cli.parameters import InFile
from minecube.jobs.label import MOST_NAMES, SiteLabels, UndrawnRows, draw_labels, find_undrawn
from minecube.jobs.tables import format_table
from minecube.places import Place
from minecube.vectors import FORMAT_NAMES


@click.command()
@writable_store_option
@sites_with_polygons_option
@click.option(
    "--polygons",
    "file",
    type=InFile(exists=False),
    required=True,
    help=f"File of polygons ({FORMAT_NAMES}): a path or an object-store URL. Optional columns: "
    "`year`, or `start` and `end`, for polygons of some years; `site` for polygons of one site; "
    "`source`, `licence` and `doi`, which exports cite.",
)
@layer_option
@collect_options
def label(sites: StoreSites, file: Place, layer: str | None) -> None:
    """Draw mine polygons on the grids of the cubes.

    Writes `footprint` (1 mine, 0 background, 255 unknown) and `footprint_fraction`, the share of
    each pixel inside the mine. A row without a site is drawn at every site that it overlaps.
    Check a file with `minecube polygons` first.

    \b
    Example:
      minecube label --store cubes.zarr --polygons mines.gpkg
      minecube label --store cubes.zarr --polygons mines.gpkg --layer mines_2019
    """
    polygons = labels.read_polygons(file, layer)
    stored = cube.list_sites(sites.store)
    polygons = labels.match_sites(polygons, stored, file)
    undated = labels.find_unread_year_columns(polygons)
    rows: list[tuple[object, ...]] = []
    rows_by_site: dict[str, pd.Index] = {}
    names = sites.names(stored)
    with progress_bar("labelling", len(names), "sites") as bar:
        for site in names:
            grid, years = cube.read_grid_and_years(sites.store, site)
            drawing = draw_labels(polygons, site, grid, years, file)
            _print_missed(drawing)
            if undated:
                listed = ", ".join(map(str, years))
                click.echo(f"{site}: rows without years are drawn in {listed}", err=True)
            drawing.write(sites.store)
            rows_by_site[site] = drawing.polygons.index
            rows += [(site, year, _format_km2(area)) for year, area in drawing.mine_km2().items()]
            bar.advance(site)
    click.echo(format_table(("site", "year", "mine km2"), rows))
    _print_undrawn(find_undrawn(polygons, rows_by_site, stored), polygons, file)


def _format_km2(area: float | None) -> object:
    if area is None:
        return "unknown"
    return round(area, 3)


def _print_missed(drawing: SiteLabels) -> None:
    """Print the polygons that are smaller than a pixel."""
    missed = labels.find_rows_without_centre(drawing.polygons, drawing.footprint.odc.geobox)
    if len(missed):
        click.echo(
            f"{drawing.site}: {len(missed)} of {len(drawing.polygons)} polygons hold no pixel's "
            f"centre ({labels.describe_rows(missed)}); `footprint` has no pixel of them, "
            "`footprint_fraction` has their area",
            err=True,
        )


def _print_undrawn(undrawn: UndrawnRows, polygons: gpd.GeoDataFrame, file: Place) -> None:
    """Print rows without a site, and rows drawn nowhere."""
    reports = {
        "name no site and are drawn at each site that they reach": undrawn.unnamed,
        "name no site, reach none of these sites and are left out": undrawn.unnamed_far,
        "do not reach the site that they name and are left out": undrawn.far,
    }
    for words, rows in reports.items():
        if len(rows):
            listed = labels.describe_rows(rows)
            click.echo(
                f"{file}: {len(rows)} of {len(polygons)} polygons {words}: {listed}", err=True
            )
    counts = [f"{site} ({count})" for site, count in undrawn.unknown_sites.items()]
    if counts:
        listed = ", ".join(counts[:MOST_NAMES])
        if len(counts) > MOST_NAMES:
            listed += f" and {len(counts) - MOST_NAMES} more"
        click.echo(f"{file}: left out, rows of sites that the store has not: {listed}", err=True)
