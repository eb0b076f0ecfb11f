"""Write self-describing Cloud Optimized GeoTIFFs, footprint tables and CSV."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import geopandas as gpd
import pandas as pd
import pyogrio
import xarray as xr
from odc.geo.geobox import GeoBox
from rasterio.io import MemoryFile

from minecube.errors import CubeError
from minecube.export.credits import format_credits, list_credits
from minecube.export.files import open_draft
from minecube.export.layers import CHUNK_PX, LAYERS, Layer, need_on_grid

log = logging.getLogger(__name__)

_TILE_STEP_PX = 16
"""Sides of TIFF's tiles are multiples of it (TIFF 6.0, section 15)."""


def write_cogs(cube: xr.Dataset, grid: GeoBox, out: Path, site: str) -> list[Path]:
    """Write one Cloud Optimized GeoTIFF per year and variable and return the paths.

    Files are `<site>_<year>_<variable>.tif` in `out`. Reflectance has one image band per band
    (uint16), footprint and probability are uint8. Variables missing from the cube are skipped, and
    so are years without a valid pixel. Values are the cube's own. Scale, nodata, licence and
    citation are stored in the file. Provenance from `cube.attrs["builds"]` (year ->
    `minecube.cube.read_markers`) is added if present, except to footprints.

    Raises:
        CubeError: the cube does not match the grid, or writing fails.
    """
    need_on_grid(cube, grid, site)
    names = [name for name in LAYERS if name in cube]
    paths = []
    for number, year in enumerate(cube.year.to_numpy()):
        build = cube.attrs.get("builds", {}).get(int(year), {})
        layers = cube[names].isel(year=[number])
        for name in names:
            layer = layers[name].squeeze("year")
            if (layer.to_numpy() == LAYERS[name].nodata).all():
                log.info("%s %s: %s has only nodata; no file is written", site, year, name)
                continue
            tags = {"site": site, "year": str(year), "variable": name}
            tags |= _make_credit_tags(layers[[name]])
            if name != "footprint":
                tags |= _make_build_tags(build)
            path = out / f"{site}_{year}_{name}.tif"
            _write_cog(path, layer, grid, LAYERS[name], tags)
            paths.append(path)
    return paths


def write_layers(
    layers: xr.Dataset, mapped: xr.DataArray, grid: GeoBox, out: Path, site: str
) -> list[Path]:
    """Write one Cloud Optimized GeoTIFF per layer derived from a map and return the paths.

    Files are `<site>_<layer>.tif` in `out`.

    Args:
        layers: Integer layers (y, x). Attribute `nodata` is required. The optional `long_name`,
            `flag_masks` and `flag_meanings` are written, too.
        mapped: The source probability (year, y, x) with its model card. The card's terms apply.

    Raises:
        CubeError: the layers do not match the grid, or writing fails.
    """
    need_on_grid(layers, grid, site)
    credit_tags = _make_credit_tags(mapped.rename("probability").to_dataset())
    paths = []
    for name, layer in layers.data_vars.items():
        title = layer.attrs.get("long_name", str(name))
        settings = Layer(title=title, nodata=layer.attrs["nodata"])
        tags = {"site": site, "variable": str(name), "long_name": settings.title, **credit_tags}
        for key in ("flag_masks", "flag_meanings"):
            if key in layer.attrs:
                tags[key] = str(layer.attrs[key])
        path = out / f"{site}_{name}.tif"
        _write_cog(path, layer, grid, settings, tags)
        paths.append(path)
    return paths


def _make_credit_tags(layer: xr.Dataset) -> dict[str, str]:
    """Build licence tags: TIFF's own copyright tag for people, `credits` for programs."""
    inputs = list_credits(layer)
    text = format_credits(inputs)
    notices = [text.get("acknowledgement", ""), text["license"]]
    return {
        "TIFFTAG_COPYRIGHT": ". ".join(notice.rstrip(".") for notice in notices if notice),
        "credits": json.dumps([asdict(credit) for credit in inputs]),
    }


def _make_build_tags(build: Mapping[str, Any]) -> dict[str, str]:
    """Build provenance tags; none if the provenance is unknown."""
    if not build:
        return {}
    provenance = {
        **{key: build[key] for key in ("build_id", "committed", "version", "libraries")},
        "recipe": build["recipe"]["title"],
        "scenes": [scene["id"] for scene in build["scenes"]],
        "completeness": build.get("reads", {}).get("completeness", 1.0),
        "baselines": sorted({scene["baseline"] for scene in build["scenes"]}),
    }
    return {
        "TIFFTAG_SOFTWARE": f"minecube {build['version']}",
        "build": json.dumps(provenance),
    }


def _write_cog(
    path: Path, layer: xr.DataArray, grid: GeoBox, settings: Layer, tags: Mapping[str, str]
) -> None:
    """Write a layer ([band,] y, x). Image bands are described by band, or by the layer's name."""
    bands = [str(layer.name)]
    if "band" in layer.dims:
        bands = [str(band) for band in layer.band.to_numpy()]
    height, width = grid.shape
    profile = {
        "crs": str(grid.crs),
        "transform": grid.affine,
        "nodata": settings.nodata,
        "dtype": layer.dtype,
        "count": len(bands),
        "height": height,
        "width": width,
        "compress": "DEFLATE",
        "predictor": "YES",
        "blocksize": _choose_block(height, width),
        "overview_resampling": settings.overview,
    }
    # Write to memory first: a full disk then raises OSError, not a private rasterio error.
    with MemoryFile() as memory:
        with memory.open(driver="COG", **profile) as image:
            image.write(layer.to_numpy().reshape(len(bands), height, width))
            image.descriptions = bands
            image.scales = [settings.scale] * len(bands)
            image.update_tags(**tags)
        with open_draft(path) as draft:
            draft.write_bytes(memory.getbuffer())


def _choose_block(height: int, width: int) -> int:
    """Return the side of a COG's tiles in pixels: 512, or less for an image that fits into one tile.

    GDAL compresses whole tiles. Filling up an image of 48 pixels would take ten times as long.
    """
    side = -(-max(height, width) // _TILE_STEP_PX) * _TILE_STEP_PX
    return min(side, CHUNK_PX)


def write_footprints(table: gpd.GeoDataFrame, path: Path, changed: datetime | None = None) -> None:
    """Write footprints as GeoParquet (`.parquet`) or GeoPackage (`.gpkg`), by suffix.

    Text in `table.attrs` (licence, citation) becomes file metadata. A GeoPackage stores the date of
    the last change, by default now.

    Raises:
        CubeError: the suffix is not supported, or writing fails.
    """
    suffix = path.suffix.lower()
    if suffix not in (".parquet", ".gpkg"):
        raise CubeError(
            f"{path}: expected a name in .parquet or .gpkg, "
            f"found {suffix or 'no suffix'!r}; name another file"
        )
    with open_draft(path) as draft:
        if suffix == ".parquet":
            table.to_parquet(draft)
        else:
            with _set_gdal_date(changed):
                _write_geopackage(table, draft)


def _write_geopackage(table: gpd.GeoDataFrame, path: Path) -> None:
    flat = _separate_columns(table)
    names = {str(column).lower() for column in flat.columns}
    flat.to_file(
        path,
        driver="GPKG",
        layer="footprints",
        layer_metadata={str(key): str(value) for key, value in table.attrs.items()} or None,
        # Names for the columns added by GeoPackage, unused in the table.
        layer_options={
            "FID": _find_free_name("fid", names),
            "GEOMETRY_NAME": _find_free_name("geom", names),
        },
    )


def _separate_columns(table: gpd.GeoDataFrame) -> gpd.GeoDataFrame:
    """Rename columns differing only in case, and write further geometries as text.

    A GeoPackage ignores case in column names.
    """
    lower_names: set[str] = set()
    names: dict[str, str] = {}
    for column in map(str, table.columns):
        names[column] = _find_free_name(column, lower_names)
        lower_names.add(names[column].lower())
    renamed = [f"{old} is {new}" for old, new in names.items() if old != new]
    if renamed:
        log.warning("columns that differ only in case were renamed: %s", ", ".join(renamed))
    geometries = table.columns[table.dtypes == "geometry"].drop(table.geometry.name)
    texts = {column: table[column].to_wkt() for column in geometries}
    return table.assign(**texts).rename(columns=names)


def _find_free_name(name: str, names: Collection[str]) -> str:
    """Return the name, numbered if `names` (in lower case) already has it."""
    numbered = (name, *(f"{name}_{n}" for n in range(1, len(names) + 1)))
    return next(candidate for candidate in numbered if candidate.lower() not in names)


@contextmanager
def _set_gdal_date(date: datetime | None) -> Iterator[None]:
    """Make GDAL write this date into GeoPackages instead of the present time."""
    if date is None:
        yield
        return
    former = pyogrio.get_gdal_config_option("OGR_CURRENT_DATE")
    text = date.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
    pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": text})
    try:
        yield
    finally:
        pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": former})


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a table as CSV without its index; raise CubeError if writing fails."""
    with open_draft(path) as draft:
        table.to_csv(draft, index=False)
