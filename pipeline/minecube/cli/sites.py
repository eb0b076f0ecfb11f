"""Subcommand sites: list sites."""

from __future__ import annotations

from collections.abc import Sequence

import click

from minecube.catalog import Site
from minecube.cli.options import SiteOptions, catalog_sites_options, collect_options
from minecube.grid import grid_of
from minecube.jobs.tables import format_table


@click.command()
@catalog_sites_options
@collect_options
def sites(sites: SiteOptions) -> None:
    """List sites with country, split, years and grid.

    \b
    Examples:
      minecube sites --sites 'Germany_*'
      minecube sites --sites my_mines.geojson
    """
    rows = [
        (
            site.id,
            site.country or "-",
            site.split or "-",
            _format_years(site.years),
            _format_grid(site),
            site.title or "-",
        )
        for site in sites.load()
    ]
    columns = ["site", "country", "split", "years", "grid", "title"]
    if all(row[-1] == "-" for row in rows):
        columns.remove("title")
    click.echo(format_table(columns, [row[: len(columns)] for row in rows]))


def _format_years(years: Sequence[int]) -> str:
    if len(years) > 1 and list(years) == list(range(years[0], years[-1] + 1)):
        return f"{years[0]}-{years[-1]}"
    return ",".join(map(str, years)) or "-"


def _format_grid(site: Site) -> str:
    if site.geometry is None:
        return "no polygon yet"
    grid = grid_of(site)
    return f"EPSG:{grid.crs.epsg} {grid.shape.x} x {grid.shape.y} px"
