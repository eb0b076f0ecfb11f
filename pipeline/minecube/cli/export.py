"""Subcommand export: write cubes, footprints and maps in formats of other tools."""

from __future__ import annotations

from dataclasses import replace

import click

from minecube.cli.bars import progress_bar
from minecube.cli.options import StoreSites, collect_options, sites_option, store_option
from minecube.cli.parameters import FiniteRange, OutFolder
from minecube.jobs.export import FORMATS, ExportOptions, export_sites
from minecube.jobs.processes import count_cores
from minecube.places import Place, outgoing

_SITES_PER_WORKER = 4  # fewer do not pay for the start of a process


@click.command()
@store_option
@sites_option
@click.option("--out", type=OutFolder(), required=True, help="Folder for the files.")
@click.option(
    "--model",
    help="Also export this prediction: its name, or the id of a model that has one prediction. "
    "=NAME: exactly that name.",
)
@click.option(
    "--format",
    "formats",
    type=click.Choice(FORMATS),
    multiple=True,
    default=("cog",),
    show_default=True,
    help="cog: images, STAC collection, footprints and pictures. netcdf, zarr (v3, "
    "multiscales), zarr2 (for GDAL before 3.13 and QGIS): all years of a site in one file "
    "or group. croissant: metadata of the other formats. May be repeated.",
)
@click.option(
    "--min-area",
    "min_area_m2",
    type=FiniteRange(min=0),
    default=0,
    show_default=True,
    help="Minimum mapping unit in m2. Smaller holes of footprints are filled, then smaller "
    "regions removed.",
)
@collect_options
def export(sites: StoreSites, options: ExportOptions, out: Place) -> None:
    """Export cubes, footprints and maps to formats that other tools open.

    By default: one COG per year, footprints as GeoParquet and GeoPackage, a STAC collection, and
    pictures. Each site has a picture of its years and one of its mine area. `areas.png` shows the
    area of all sites, with a row per site. Footprints are simplified outlines: their areas are
    within 0.5 % of the pixels', and a pit keeps its id through the years.

    \b
    Examples:
      minecube export --store cubes.zarr --sites Germany_2 --model unet-small --out export
      minecube export --store cubes.zarr --format cog --format netcdf --format croissant --out export
    """
    if "croissant" in options.formats and not {"cog", "netcdf"} & set(options.formats):
        raise click.UsageError(
            "--format croissant describes files of the other formats: "
            "add --format cog or --format netcdf"
        )
    names = sites.names()
    if options.model is not None:
        options = replace(options, model=sites.prediction(names, options.model))
    with outgoing(out) as folder, progress_bar("exporting", len(names), "sites") as bar:
        workers = max(min(count_cores(), len(names) // _SITES_PER_WORKER), 1)
        images, files = export_sites(sites.store, names, folder, options, bar.advance, workers)
    if images:
        click.echo(f"{out}: {len(images)} images; open {out}/collection.json")
    for path in files:
        click.echo(out / path.relative_to(folder))
