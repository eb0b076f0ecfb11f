"""Export sites of a store to formats of other tools: the job of `minecube export`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import dask
import geopandas as gpd
import pandas as pd
import xarray as xr
from odc.geo.geobox import GeoBox

from minecube import cube, export, labels, report, tracks
from minecube.codes import UNKNOWN
from minecube.errors import WorkerError
from minecube.jobs.processes import end_unguarded_import, open_processes

FORMATS = ("cog", "netcdf", "zarr", "zarr2", "croissant")
LABELS = "labels"
MAPPED = "mapped"
"""Kinds of footprints: of the polygons, and of a prediction."""
_Areas = TypeVar("_Areas")
_TITLE = "minecube export"
_WRITERS = {
    "netcdf": (export.write_netcdf, ".nc"),
    "zarr": (export.write_zarr, ".zarr"),
    "zarr2": (export.write_zarr2, ".v2.zarr"),
}
"""Format -> function that writes all years of a site, and suffix of its file or folder."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to export."""

    model: str | None = None
    """Name of a prediction to export with the cubes."""
    formats: tuple[str, ...] = ("cog",)
    """Some of `FORMATS`."""
    min_area_m2: float = 0
    """Minimum mapping unit: smaller holes are filled, then smaller regions removed."""


@dataclass
class _Exported:
    """Files and tables of the sites so far."""

    images: list[Path] = field(default_factory=list)
    items: list[export.Item] = field(default_factory=list)
    cubes: dict[str, Path] = field(default_factory=dict)
    """Asset key -> file or folder with all years of a site."""
    assets: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Asset key -> STAC asset of that file or folder."""
    credits: dict[export.Credit, None] = field(default_factory=dict)
    outlines: dict[str, list[gpd.GeoDataFrame]] = field(default_factory=dict)
    """Kind of footprints -> outlines of each site, EPSG:4326."""
    areas: dict[str, dict[str, pd.DataFrame]] = field(default_factory=dict)
    """Kind of footprints -> site -> area by year in m2."""
    commits: list[datetime] = field(default_factory=list)
    """Times of all commits."""

    def add(self, part: _Exported) -> None:
        """Add the files and tables of one more site."""
        self.images += part.images
        self.items += part.items
        self.cubes |= part.cubes
        self.assets |= part.assets
        self.credits |= part.credits
        self.commits += part.commits
        for kind, outlines in part.outlines.items():
            self.outlines.setdefault(kind, []).extend(outlines)
        for kind, areas in part.areas.items():
            self.areas.setdefault(kind, {}).update(areas)


def export_sites(
    store: cube.Store,
    sites: Sequence[str],
    folder: Path,
    options: ExportOptions | None = None,
    progress: Callable[[str], None] = lambda _: None,
    workers: int = 1,
) -> tuple[list[Path], list[Path]]:
    """Write sites in the given formats. The same store always gives the same bytes.

    Returns the paths of the images, and of all other formats. `progress` is called with the name of
    each finished site. `workers` processes work on a site each. A script that asks for several
    calls this function below `if __name__ == "__main__":`.

    Raises:
        CubeError: a site has no committed year, or a file cannot be written.
        WorkerError: a process died, most often for lack of memory.
    """
    options = options or ExportOptions()
    exported = _Exported()
    parts = _export_each(store, sites, folder, options, workers)
    for site, part in zip(sites, parts, strict=True):
        exported.add(part)
        progress(site)
    changed = max(exported.commits)  # instead of the current time, for reproducible files
    tables = _write_outlines(exported, folder, changed)
    if exported.areas:
        shown, truth = _choose_areas(exported.areas)
        report.draw_area_overview(shown, folder / "areas.png", truth)
    recipe = next(iter(cube.read_markers(store, sites[0]).values()))["recipe"]["title"]
    text = f"Annual Sentinel-2 composites of mines. {recipe}."
    if "cog" in options.formats:
        assets = {key: export.make_asset(key, path, folder) for key, path in tables.items()}
        assets |= exported.assets
        export.write_stac(folder, exported.items, assets, title=_TITLE, description=text)
    files = list(exported.cubes.values())
    if "croissant" in options.formats:
        described = [*exported.images, *tables.values(), *filter(Path.is_file, files)]
        if exported.images:
            described.append(folder / "items.parquet")
        files.append(
            export.write_croissant(
                folder,
                described,
                exported.credits,
                title=_TITLE,
                description=text,
                published=changed.date(),
            )
        )
    return exported.images, files


def _export_each(
    store: cube.Store, sites: Sequence[str], folder: Path, options: ExportOptions, workers: int
) -> Iterator[_Exported]:
    """Export each site. Yields their files and tables in order."""
    if workers < 2:
        for site in sites:
            yield _export_site(store, site, folder, options)
        return
    end_unguarded_import()
    with open_processes(workers, __name__) as processes:
        tasks = [
            processes.submit(_export_on_one_core, store, site, folder, options) for site in sites
        ]
        for site, task in zip(sites, tasks, strict=True):
            try:
                yield task.result()
            except BrokenProcessPool as error:
                raise WorkerError(
                    f"{site}: its process died, most often for lack of memory; export fewer sites "
                    "at a time"
                ) from error


def _export_on_one_core(
    store: cube.Store, site: str, folder: Path, options: ExportOptions
) -> _Exported:
    """Export a site in a worker. Dask threads of several workers would slow each other down."""
    with dask.config.set(scheduler="synchronous"):
        return _export_site(store, site, folder, options)


def _export_site(store: cube.Store, site: str, folder: Path, options: ExportOptions) -> _Exported:
    """Write the files of one site. Returns its files and tables."""
    exported = _Exported()
    builds = cube.read_markers(store, site)
    exported.commits += [datetime.fromisoformat(build["committed"]) for build in builds.values()]
    dataset = cube.open_committed(store, site).load().assign_attrs(builds=builds)
    grid = dataset.odc.geobox
    footprints: dict[str, xr.DataArray] = {}
    if bool((dataset["footprint"] != UNKNOWN).any()):
        footprints[LABELS] = dataset["footprint"]
    if options.model:
        probability = cube.open_probability(store, site, options.model)
        probability = probability.sel(year=dataset.year).load()
        dataset = dataset.assign(probability=probability)
        footprints[MAPPED] = tracks.threshold(probability)
    exported.credits |= dict.fromkeys(export.list_credits(dataset))
    for name, (write, suffix) in _WRITERS.items():
        if name in options.formats:
            path = folder / site / f"{site}{suffix}"
            exported.cubes[f"{site}_{name}"] = write(dataset, grid, path, site)
    if "cog" not in options.formats:
        return exported
    exported.images += export.write_cogs(dataset, grid, folder / site, site)
    exported.items += export.write_items(folder, exported.images, title=_TITLE)
    for key, path in exported.cubes.items():
        exported.assets[key] = export.make_asset(key, path, folder)
    areas = {}
    for kind, footprint in footprints.items():
        outlines = _outline(footprint, grid, site, options.min_area_m2)
        exported.outlines.setdefault(kind, []).append(outlines)
        areas[kind] = tracks.compute_areas(footprint, grid)
        exported.areas.setdefault(kind, {})[site] = areas[kind]
    report.draw_strip(dataset, footprints, folder / site / f"{site}_strip.png", site)
    if areas:
        shown, truth = _choose_areas(areas)
        report.draw_areas(shown, folder / site / f"{site}_areas.png", site, truth)
    return exported


def _write_outlines(exported: _Exported, folder: Path, changed: datetime) -> dict[str, Path]:
    """Write the outlines of all sites as GeoParquet and GeoPackage. Returns paths by asset key."""
    paths = {}
    for kind, parts in exported.outlines.items():
        citations = [c for c in exported.credits if (c.kind == "labels") == (kind == LABELS)]
        outlines = pd.concat(parts, ignore_index=True)
        outlines.attrs = export.format_credits(citations)
        name = f"footprints_{kind}"
        for key, suffix in ((name, "parquet"), (f"{name}_gpkg", "gpkg")):
            paths[key] = folder / f"{name}.{suffix}"
            export.write_footprints(outlines, paths[key], changed)
    return paths


def _choose_areas(areas: Mapping[str, _Areas]) -> tuple[_Areas, _Areas | None]:
    """Return the areas to plot, and their truth: mapped and labelled, or labelled areas alone."""
    labelled = areas.get(LABELS)
    if MAPPED in areas:
        return areas[MAPPED], labelled
    return areas[LABELS], None


def _outline(
    footprint: xr.DataArray, grid: GeoBox, site: str, min_area_m2: float
) -> gpd.GeoDataFrame:
    """Outline the footprint's regions: with ids, simplified, in longitude and latitude."""
    regions = labels.vectorize(footprint, grid, site, min_area_m2)
    labelled = footprint.year[(footprint != UNKNOWN).any(("y", "x"))]
    identified = labels.assign_ids(regions, labelled.to_numpy().tolist())
    return labels.simplify_outlines(identified, grid.resolution.x).to_crs(4326)
