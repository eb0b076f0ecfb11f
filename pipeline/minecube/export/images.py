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
import numpy as np
import pandas as pd
import pyogrio
import xarray as xr
from odc.geo.geobox import GeoBox
from rasterio.io import MemoryFile

from minecube.errors import CubeError
from minecube.export.credits import credits_of, lines
from minecube.export.files import whole
from minecube.export.layers import LAYERS, Layer, need_on_grid

log = logging.getLogger(__name__)


def write_cogs(cube: xr.Dataset, grid: GeoBox, out: Path, site: str) -> list[Path]:
    """Write one Cloud Optimized GeoTIFF per year and variable and return the paths.

    Files are `<site>_<year>_<variable>.tif` in `out`. Reflectance has one image band per band
    (uint16), footprint and probability are uint8. Variables missing from the cube are skipped, and
    so are years without a valid pixel. Values are the cube's own. Scale, nodata, licence and
    citation are stored in the file. Provenance from `cube.attrs["builds"]` (year ->
    `minecube.cube.builds`) is added if present, except to footprints.

    Raises:
        CubeError: the cube does not match the grid, or writing fails.
    """
    need_on_grid(cube, grid, site)
    written = []
    for year in cube.year.to_numpy():
        made = cube.attrs.get("builds", {}).get(int(year), {})
        for name in (n for n in LAYERS if n in cube):
            layer = cube[name].sel(year=year)
            values = layer.to_numpy()
            if (values == LAYERS[name].nodata).all():
                log.info("%s %s: %s holds nothing but nodata, so it gets no file", site, year, name)
                continue
            bands = [str(b) for b in layer.band.to_numpy()] if "band" in layer.dims else [name]
            path = out / f"{site}_{year}_{name}.tif"
            tags = {"site": site, "year": str(year), "variable": name}
            tags |= _credited(cube[[name]].sel(year=[year])) | (
                _built(made) if name != "footprint" else {}
            )
            _write_cog(
                path, values.reshape(len(bands), *grid.shape), bands, grid, LAYERS[name], tags
            )
            written.append(path)
    return written


def write_layers(
    layers: xr.Dataset, mapped: xr.DataArray, grid: GeoBox, out: Path, site: str
) -> list[Path]:
    """Write one Cloud Optimized GeoTIFF per layer derived from a map and return the paths.

    Files are `<site>_<layer>.tif` in `out`.

    Args:
        layers: Integer layers (y, x). Attribute `nodata` is required. The optional `long_name`,
            `flag_masks` and `flag_meanings` are written, too.
        mapped: The source probability (year, y, x) with its model card. The card's terms apply.
        grid: Grid of the layers.
        out: Folder.
        site: The site's name.

    Raises:
        CubeError: the layers do not match the grid, or writing fails.
    """
    need_on_grid(layers, grid, site)
    credited, written = _credited(mapped.rename("probability").to_dataset()), []
    for name, layer in layers.data_vars.items():
        about = Layer(
            title=layer.attrs.get("long_name", str(name)),
            nodata=layer.attrs["nodata"],
            scale=1,
            overview="NEAREST",
            roles=(),
        )
        tags = {"site": site, "variable": str(name), "long_name": about.title, **credited}
        tags |= {
            k: str(layer.attrs[k]) for k in ("flag_masks", "flag_meanings") if k in layer.attrs
        }
        path = out / f"{site}_{name}.tif"
        _write_cog(path, layer.to_numpy()[None], [str(name)], grid, about, tags)
        written.append(path)
    return written


def _credited(layer: xr.Dataset) -> dict[str, str]:
    """Build licence tags: TIFF's own copyright tag for people, `credits` for programs."""
    found = credits_of(layer)
    text = lines(found)
    copyright_ = ". ".join(
        v.rstrip(".") for v in (text.get("acknowledgement"), text["license"]) if v
    )
    return {"TIFFTAG_COPYRIGHT": copyright_, "credits": json.dumps([asdict(c) for c in found])}


def _built(made: Mapping[str, Any]) -> dict[str, str]:
    if not made:
        return {}
    kept: dict[str, Any] = {k: made[k] for k in ("build_id", "committed", "version", "libraries")}
    kept |= {"recipe": made["recipe"]["title"], "scenes": [s["id"] for s in made["scenes"]]}
    kept["completeness"] = made.get("reads", {}).get("completeness", 1.0)
    kept["baselines"] = sorted({s["baseline"] for s in made["scenes"]})
    return {"TIFFTAG_SOFTWARE": f"minecube {made['version']}", "build": json.dumps(kept)}


def _write_cog(
    path: Path,
    values: np.ndarray[Any, Any],
    bands: list[str],
    grid: GeoBox,
    layer: Layer,
    tags: Mapping[str, str],
) -> None:
    profile = {
        "crs": str(grid.crs),
        "transform": grid.affine,
        "nodata": layer.nodata,
        "dtype": values.dtype,
    }
    profile |= {"count": len(bands), "height": grid.shape[0], "width": grid.shape[1]}
    options = {
        "compress": "DEFLATE",
        "predictor": "YES",
        "blocksize": 512,
        "overview_resampling": layer.overview,
    }
    # Write to memory first: a full disk then raises OSError, not a private rasterio error.
    with MemoryFile() as memory:
        with memory.open(driver="COG", **profile, **options) as image:
            image.write(values)
            image.descriptions = bands
            image.scales = [layer.scale] * len(bands)
            image.update_tags(**tags)
        with whole(path) as part:
            part.write_bytes(memory.getbuffer())


def write_footprints(table: gpd.GeoDataFrame, path: Path, changed: datetime | None = None) -> None:
    """Write footprints as GeoParquet (`.parquet`) or GeoPackage (`.gpkg`), by suffix.

    Args:
        table: The outlines. Text in `table.attrs` (licence, citation) becomes file metadata.
        path: The file.
        changed: Date of the last change, stored in a GeoPackage. Default: now.

    Raises:
        CubeError: the suffix is not supported, or writing fails.
    """
    suffix = path.suffix.lower()
    if suffix not in (".parquet", ".gpkg"):
        raise CubeError(
            f"{path}: expected a name in .parquet or .gpkg, found {suffix or 'no suffix'!r}; choose one"
        )
    with whole(path) as part:
        if suffix == ".parquet":
            table.to_parquet(part)
        else:
            about = {str(k): str(v) for k, v in table.attrs.items()}
            flat = _distinct_columns(table)
            names = {str(c).lower() for c in flat.columns}
            # Names for the columns added by GeoPackage, unused in the table.
            own = {"FID": _free_name("fid", names), "GEOMETRY_NAME": _free_name("geom", names)}
            with _gdal_date(changed):
                flat.to_file(
                    part,
                    driver="GPKG",
                    layer="footprints",
                    layer_metadata=about or None,
                    layer_options=own,
                )


def _distinct_columns(table: gpd.GeoDataFrame) -> gpd.GeoDataFrame:
    """Rename columns differing only in case, and write further geometries as text.

    A GeoPackage ignores case in column names.
    """
    seen: set[str] = set()
    names: dict[str, str] = {}
    for column in map(str, table.columns):
        names[column] = _free_name(column, seen)
        seen.add(names[column].lower())
    renamed = [f"{old} is {new}" for old, new in names.items() if old != new]
    if renamed:
        log.warning("columns that differ in case alone were renamed: %s", ", ".join(renamed))
    texts = {
        c: table[c].to_wkt()
        for c in table.columns[table.dtypes == "geometry"]
        if c != table.geometry.name
    }
    return table.assign(**texts).rename(columns=names)


def _free_name(name: str, names: Collection[str]) -> str:
    """Return the name, numbered if `names` (in lower case) already has it."""
    numbered = (name, *(f"{name}_{n}" for n in range(1, len(names) + 1)))
    return next(free for free in numbered if free.lower() not in names)


@contextmanager
def _gdal_date(date: datetime | None) -> Iterator[None]:
    """Make GDAL write this date into GeoPackages instead of the present time."""
    before = pyogrio.get_gdal_config_option("OGR_CURRENT_DATE")
    text = date.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z") if date else before
    pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": text})
    try:
        yield
    finally:
        pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": before})


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a table as CSV without its index; raise CubeError if writing fails."""
    with whole(path) as part:
        table.to_csv(part, index=False)
