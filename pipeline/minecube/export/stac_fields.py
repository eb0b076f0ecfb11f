"""Read STAC extension fields back from exported images and cubes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import xarray as xr
from odc.geo import CRS

from minecube.codes import BACKGROUND, MINE, UNKNOWN
from minecube.errors import CubeError
from minecube.export.credits import Credit
from minecube.export.files import describe_file, make_href, need_inside
from minecube.export.layers import LAYERS, SPECTRUM

MEDIA = {
    ".parquet": "application/vnd.apache.parquet",
    ".gpkg": "application/geopackage+sqlite3",
    ".nc": "application/netcdf",
    ".zarr": "application/vnd.zarr",
}
CLASSES = {BACKGROUND: "not mine", MINE: "mine", UNKNOWN: "unknown"}


def parse_credits(tags: Mapping[str, str]) -> list[Credit]:
    """Read the credited inputs from an image's tags."""
    entries = json.loads(tags.get("credits", "[]"))
    return [Credit(**{**entry, "dois": tuple(entry["dois"])}) for entry in entries]


def middle_of(year: int) -> str:
    """Return the middle of a year in RFC 3339: noon or, in leap years, midnight.

    The exported NetCDF files use the same time.
    """
    start = np.datetime64(f"{year}-01-01", "s")
    end = np.datetime64(f"{year + 1}-01-01", "s")
    return f"{start + (end - start) // 2}Z"


def make_processing_fields(build: Mapping[str, Any]) -> dict[str, Any]:
    """Return provenance: the processing extension's fields and three of ours.

    Empty if the provenance is unknown.
    """
    if not build:
        return {}
    baselines = ", ".join(build["baselines"])
    return {
        "processing:level": "L3",
        "processing:software": {"minecube": build["version"], **build["libraries"]},
        "processing:datetime": build["committed"],
        "processing:lineage": (
            f"{build['recipe']}, from {len(build['scenes'])} scenes "
            f"of processing baselines {baselines}"
        ),
        "minecube:build_id": build["build_id"],
        "minecube:scenes": build["scenes"],
        "minecube:read_completeness": build["completeness"],
    }


def make_label_fields(image: rasterio.DatasetReader) -> dict[str, Any]:
    """Return the label extension's fields of a footprint, with pixel counts per class.

    Empty for other images.
    """
    if image.tags()["variable"] != "footprint":
        return {}
    values, counts = np.unique(image.read(1), return_counts=True)
    pixels = [
        {"name": CLASSES[value], "count": count}
        for value, count in zip(values.tolist(), counts.tolist(), strict=True)
    ]
    sources = "".join(f", from {c.name} ({c.licence})" for c in parse_credits(image.tags()))
    return {
        "label:type": "raster",
        "label:properties": None,  # required for rasters
        "label:classes": [{"name": None, "classes": [CLASSES[BACKGROUND], CLASSES[MINE]]}],
        "label:tasks": ["segmentation"],
        "label:description": f"Mine footprint: 1 mine, 0 not mine, 255 unknown{sources}",
        "label:overviews": [{"counts": pixels}],
    }


def describe_grid(image: rasterio.DatasetReader) -> dict[str, Any]:
    """Return the projection extension's fields of an image."""
    return {
        "proj:code": image.crs.to_string(),
        "proj:shape": list(image.shape),
        "proj:transform": list(image.transform)[:6],
    }


def measure_dimensions(image: rasterio.DatasetReader) -> dict[str, Any]:
    """Return the datacube dimensions of an image: first to last pixel centre."""
    height, width = image.shape
    west, north = image.xy(0, 0)
    east, south = image.xy(height - 1, width - 1)
    axis = {"type": "spatial", "reference_system": image.crs.to_epsg()}
    dimensions: dict[str, Any] = {
        "x": {**axis, "axis": "x", "extent": [west, east], "step": image.res[0]},
        "y": {**axis, "axis": "y", "extent": [south, north], "step": image.res[1]},
    }
    if image.tags()["variable"] == "reflectance":
        dimensions["bands"] = {"type": "bands", "values": list(image.descriptions)}
    return dimensions


def describe_variable(tags: Mapping[str, str], dimensions: Mapping[str, Any]) -> dict[str, Any]:
    """Return the datacube variable of an image with these tags and dimensions."""
    variable = tags["variable"]
    bands = [name for name in dimensions if name not in ("x", "y")]
    return {
        variable: {
            "type": "data",
            "dimensions": [*bands, "y", "x"],
            "description": LAYERS[variable].title,
        }
    }


def make_image_asset(path: Path, image: rasterio.DatasetReader) -> dict[str, Any]:
    """Build the asset of an image made by `write_cogs`.

    Raises:
        CubeError: the image cannot be read.
        KeyError: the image was not made by `write_cogs`.
    """
    variable = image.tags()["variable"]
    layer = LAYERS[variable]
    pixel = {
        "data_type": image.dtypes[0],
        "nodata": image.nodata,
        "scale": image.scales[0],
        "spatial_resolution": image.res[0],
    }
    asset: dict[str, Any] = {
        **describe_file(path, path.parent, layer.title),
        "type": "image/tiff; application=geotiff; profile=cloud-optimized",
        "roles": list(layer.roles),
        "raster:bands": [pixel] * image.count,
    }
    if variable == "reflectance":
        asset["eo:bands"] = [_describe_band(band) for band in image.descriptions]
    if variable == "footprint":
        asset["file:values"] = [
            {"values": [value], "summary": text} for value, text in CLASSES.items()
        ]
    return asset


def _describe_band(band: str) -> dict[str, Any]:
    common_name, centre_um = SPECTRUM[band]
    return {"name": band, "common_name": common_name, "center_wavelength": centre_um}


def make_asset(key: str, path: Path, out: Path) -> dict[str, Any]:
    """Build the STAC asset of a footprint table or of a whole cube with its dimensions.

    A Zarr is a folder and therefore has no checksum.

    Args:
        key: The asset's name, part of its title.
        path: Footprints as GeoParquet or GeoPackage, or a whole cube as NetCDF or Zarr.
        out: The folder of the collection that will list the asset. It contains `path`.

    Raises:
        CubeError: the file lies outside `out`, or cannot be read.
    """
    need_inside(path, out)
    media = {"type": MEDIA[path.suffix]}
    if path.suffix in (".parquet", ".gpkg"):
        file = describe_file(path, out, f"Mine footprints as polygons: {key}")
        return {**file, **media, "roles": ["data", "labels"]}
    title = f"Cube of all years: {key}"
    file = {"href": make_href(path, out), "title": title}
    if path.is_file():
        file = describe_file(path, out, title)
    try:
        with _open_cube(path) as cube:
            return {**file, **media, "roles": ["data"], **_describe_cube(cube)}
    except (OSError, ValueError, ImportError) as error:
        raise CubeError(f"{path}: cannot be read ({error}); export it again") from error


def _open_cube(path: Path) -> xr.Dataset:
    options: dict[str, Any] = {"engine": "netcdf4"}
    if path.suffix == ".zarr":
        options = {"engine": "zarr", "consolidated": False}
        if (path / "0").is_dir():
            options["group"] = "0"
    return xr.open_dataset(path, decode_times=False, mask_and_scale=False, **options)


def _describe_cube(cube: xr.Dataset) -> dict[str, Any]:
    layers = {str(name): layer for name, layer in cube.data_vars.items() if "y" in layer.dims}
    variables = {
        name: {
            "type": "data",
            "dimensions": [str(dim) for dim in layers[name].dims],
            "description": str(layers[name].attrs["long_name"]),
        }
        for name in sorted(layers)  # Zarr lists its arrays in any order
    }
    return {"cube:dimensions": _measure_dimensions(cube), "cube:variables": variables}


def _measure_dimensions(cube: xr.Dataset) -> dict[str, Any]:
    dimensions: dict[str, Any] = {}
    epsg = CRS(cube["spatial_ref"].attrs["crs_wkt"]).epsg
    for axis in ("x", "y"):
        dimensions[axis] = {
            "type": "spatial",
            "reference_system": epsg,
            "axis": axis,
            "extent": [float(cube[axis].min()), float(cube[axis].max())],
        }
    bands = cube["band"]
    if "band_name" in cube.coords:  # in NetCDF
        bands = cube["band_name"]
    dimensions["band"] = {"type": "bands", "values": [str(band) for band in bands.to_numpy()]}
    years = [int(year) for year in cube["year"]]
    if "time" in cube.dims:
        name = "time"
        instants = [middle_of(year) for year in years]
    else:
        name = "year"
        instants = [f"{year}-01-01T00:00:00Z" for year in years]
    dimensions[name] = {
        "type": "temporal",
        "extent": [f"{years[0]}-01-01T00:00:00Z", f"{years[-1]}-12-31T23:59:59Z"],
        "values": instants,
    }
    return dimensions
