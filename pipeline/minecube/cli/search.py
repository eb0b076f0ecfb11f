"""Subcommand search: search scenes, and save their lists."""

from __future__ import annotations

import math
from pathlib import Path

import click

from minecube import scenes
from minecube.cli.bars import progress_bar
from minecube.cli.options import SiteOptions, catalog_sites_options, collect_options, years_option
from minecube.cli.parameters import OutFolder
from minecube.cli.scene_options import source_option
from minecube.jobs.catalogs import choose_sources
from minecube.jobs.scene_lists import search_and_save
from minecube.jobs.tables import format_table
from minecube.places import Place


@click.command()
@catalog_sites_options
@years_option
@source_option
@click.option(
    "--out",
    type=OutFolder(),
    default=Path("scenes"),
    show_default=True,
    help="Folder for the scene lists, one GeoParquet file per site and year, as `build --scenes` "
    "reads them.",
)
@collect_options
def search(sites: SiteOptions, years: tuple[int, ...], source_ids: str, out: Place) -> None:
    """Search the scenes of sites and years, and save one list per site-year.

    The lists are stac-geoparquet files for `build --scenes`.

    \b
    Example:
      minecube search --sites my_mines.geojson --years 2019-2023 --source earth-search --out scenes
    """
    loaded = sites.load()
    sources = choose_sources(source_ids, sites.catalog)
    rows = []
    with progress_bar("searching", len(loaded) * len(years), "site-years") as bar:
        for site in loaded:
            for year in years:
                listed = search_and_save(site, year, sources, out)
                rows.append((site.id, year, *_summarise(listed)))
                bar.advance(f"{site.id} {year}")
    columns = ("site", "year", "scenes", "days", "copies", "refused", "cloud %", "baselines")
    click.echo(format_table(columns, rows))
    click.echo(f"saved in {out}")


def _summarise(listed: scenes.SearchResult) -> tuple[object, ...]:
    """Return counts, mean cloud cover and baselines of scenes, for the table."""
    baselines = sorted({s.properties["s2:processing_baseline"] for s in listed.scenes})
    cloud = scenes.mean_cloud_cover(listed.scenes)
    cloud_text = f"{cloud:.0f}"
    if math.isnan(cloud):
        cloud_text = "?"
    return (
        len(listed.scenes),
        len(scenes.list_solar_days(listed.scenes)),
        listed.copies,
        len(listed.refused),
        cloud_text,
        ", ".join(baselines),
    )
