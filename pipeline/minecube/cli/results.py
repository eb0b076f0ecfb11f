"""Subcommand export: write cubes, footprints and maps in formats of other tools."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from datetime import datetime
from pathlib import Path

import click
import geopandas as gpd
import pandas as pd
import xarray as xr
from odc.geo.geobox import GeoBox

from minecube import cube, labels, report, tracks
from minecube import export as exporting
from minecube.cli.common import (
    FiniteRange,
    OutFolder,
    SiteChoice,
    progress_bar,
    sites_option,
    store_option,
    stored_prediction,
    stored_sites,
)

FORMATS = ("cog", "netcdf", "zarr", "zarr2", "croissant")


@click.command()
@store_option
@sites_option
@click.option("--out", type=OutFolder(), required=True, help="Folder for the files.")
@click.option(
    "--model",
    help="Also export this prediction: its name, or the id of a model with only one. =NAME: exactly that name.",
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
    help="Minimum mapping unit in m2. Smaller holes of footprints are filled, then smaller regions removed.",
)
def export(
    store: cube.Store,
    wanted: SiteChoice,
    out: Path,
    model: str | None,
    formats: tuple[str, ...],
    min_area_m2: float,
) -> None:
    """Export cubes, footprints and maps to formats that other tools open.

    By default: one COG per year, footprints as GeoParquet and GeoPackage, a STAC collection, and
    pictures. Footprints are simplified outlines: their areas are within 0.5 % of the pixels', and a pit
    keeps its id through the years.

    \b
    Examples:
      minecube export --store cubes.zarr --sites Germany_2 --model unet-small --out export
      minecube export --store cubes.zarr --format cog --format netcdf --format croissant --out export
    """
    if "croissant" in formats and not {"cog", "netcdf"} & set(formats):
        raise click.UsageError(
            "--format croissant describes files of the other formats: add --format cog or --format netcdf"
        )
    names = stored_sites(store, wanted)
    if model is not None:
        model = stored_prediction(store, names, model)
    with progress_bar("exporting", len(names)) as advance:
        images, others = export_sites(
            store,
            names,
            out,
            model,
            lambda name: advance(note=name),
            formats=formats,
            min_area_m2=min_area_m2,
        )
    if images:
        click.echo(f"{out}: {len(images)} images; open {out}/collection.json")
    for path in others:
        click.echo(path)


def export_sites(
    store: cube.Store,
    names: Sequence[str],
    out: Path,
    model: str | None,
    done: Callable[[str], None] = lambda _: None,
    *,
    formats: Collection[str] = ("cog",),
    min_area_m2: float = 0,
) -> tuple[list[Path], list[Path]]:
    """Write sites in the given formats. Returns the paths of the images, and of all other formats.

    The same store always gives the same bytes.
    """
    cogs: list[Path] = []
    whole: dict[str, Path] = {}
    credited: dict[exporting.Credit, None] = {}
    outlines: dict[str, list[gpd.GeoDataFrame]] = {}
    areas: dict[str, dict[str, pd.DataFrame]] = {}
    commits: list[datetime] = []
    for name in names:
        built = cube.builds(store, name)
        commits += [datetime.fromisoformat(build["committed"]) for build in built.values()]
        opened = cube.open_committed(store, name).load().assign_attrs(builds=built)
        grid = opened.odc.geobox
        drawn: dict[str, xr.DataArray] = {}
        if bool((opened["footprint"] != labels.UNKNOWN).any()):
            drawn["labels"] = opened["footprint"]
        if model:
            probability = cube.open_probability(store, name, model).sel(year=opened.year).load()
            opened = opened.assign(probability=probability)
            drawn["mapped"] = tracks.threshold(probability)
        credited |= dict.fromkeys(exporting.credits_of(opened))
        whole |= _whole_cubes(opened, out / name, name, formats)
        if "cog" not in formats:
            done(name)
            continue
        cogs += exporting.write_cogs(opened, grid, out / name, name)
        for kind, footprint in drawn.items():
            outlines.setdefault(kind, []).append(_outlines(footprint, grid, name, min_area_m2))
            areas.setdefault(kind, {})[name] = tracks.areas(footprint, grid)
        report.strip(opened, drawn, out / name / f"{name}_strip.png", name)
        done(name)
    changed = max(commits)  # instead of the current time, for reproducible files
    tables = {}
    for kind, parts in outlines.items():
        drawn_from = [c for c in credited if (c.kind == "labels") == (kind == "labels")]
        outline = pd.concat(parts, ignore_index=True)
        outline.attrs = exporting.lines(drawn_from)
        for key, suffix in ((f"footprints_{kind}", "parquet"), (f"footprints_{kind}_gpkg", "gpkg")):
            tables[key] = out / f"footprints_{kind}.{suffix}"
            exporting.write_footprints(outline, tables[key], changed)
    if areas:
        main = areas.get("mapped") or areas["labels"]
        report.area_plot(
            main,
            out / "areas.png",
            areas["labels"] if "mapped" in areas and "labels" in areas else None,
        )
    recipe = next(iter(cube.builds(store, names[0]).values()))["recipe"]["title"]
    described = {
        "title": "minecube export",
        "about": f"Annual Sentinel-2 composites of mines. {recipe}.",
    }
    if "cog" in formats:
        exporting.write_stac(out, cogs, {**tables, **whole}, **described)
    others = list(whole.values())
    if "croissant" in formats:
        listed = [
            *cogs,
            *tables.values(),
            *(p for p in others if p.is_file()),
            *([out / "items.parquet"] if cogs else []),
        ]
        others.append(
            exporting.write_croissant(out, listed, credited, published=changed.date(), **described)
        )
    return cogs, others


def _whole_cubes(
    opened: xr.Dataset, folder: Path, name: str, formats: Collection[str]
) -> dict[str, Path]:
    """Write all years of a site to one file or folder per format.

    Returns the paths by asset key.
    """
    writers = {
        "netcdf": (exporting.write_netcdf, ".nc"),
        "zarr": (exporting.write_zarr, ".zarr"),
        "zarr2": (exporting.write_zarr2, ".v2.zarr"),
    }
    return {
        f"{name}_{key}": write(opened, opened.odc.geobox, folder / f"{name}{suffix}", name)
        for key, (write, suffix) in writers.items()
        if key in formats
    }


def _outlines(
    footprint: xr.DataArray, grid: GeoBox, site: str, min_area_m2: float
) -> gpd.GeoDataFrame:
    """Outline the footprint's regions: with ids, simplified, in longitude and latitude."""
    regions = labels.vectorize(footprint, grid, site, min_area_m2)
    known = footprint.year[(footprint != labels.UNKNOWN).any(("y", "x"))]
    return labels.simplify(
        labels.identify(regions, known.to_numpy().tolist()), grid.resolution.x
    ).to_crs(4326)
