"""Read STAC extension fields back from exported images and cubes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import xarray as xr

from minecube.errors import CubeError
from minecube.export.credits import Credit
from minecube.export.files import href, listed
from minecube.export.layers import LAYERS, SPECTRUM

MEDIA = {
    ".parquet": "application/vnd.apache.parquet",
    ".gpkg": "application/geopackage+sqlite3",
    ".nc": "application/netcdf",
    ".zarr": "application/vnd.zarr",
}
CLASSES = {0: "not mine", 1: "mine", 255: "unknown"}


def credits_in(tags: Mapping[str, str]) -> list[Credit]:
    """Read the credited inputs from an image's tags."""
    return [
        Credit(**{**c, "dois": tuple(c["dois"])}) for c in json.loads(tags.get("credits", "[]"))
    ]


def middle_of(year: int) -> str:
    """Return the middle of a year in RFC 3339: noon or, in leap years, midnight.

    The exported NetCDF files use the same time.
    """
    start = np.datetime64(f"{year}-01-01", "s")
    end = np.datetime64(f"{year + 1}-01-01", "s")
    return f"{start + (end - start) // 2}Z"


def processing(build: Mapping[str, Any]) -> dict[str, Any]:
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
        "processing:lineage": f"{build['recipe']}, from {len(build['scenes'])} scenes of processing baselines {baselines}",
        "minecube:build_id": build["build_id"],
        "minecube:scenes": build["scenes"],
        "minecube:read_completeness": build["completeness"],
    }


def label(src: rasterio.DatasetReader) -> dict[str, Any]:
    """Return the label extension's fields of a footprint, with pixel counts per class."""
    values, counts = np.unique(src.read(1), return_counts=True)
    seen = [{"name": CLASSES[int(v)], "count": int(n)} for v, n in zip(values, counts, strict=True)]
    sources = "".join(f", from {c.name} ({c.licence})" for c in credits_in(src.tags()))
    return {
        "label:type": "raster",
        "label:properties": None,  # required for rasters
        "label:classes": [{"name": None, "classes": list(CLASSES.values())[:2]}],
        "label:tasks": ["segmentation"],
        "label:description": f"Mine footprint: 1 mine, 0 not mine, 255 unknown{sources}",
        "label:overviews": [{"counts": seen}],
    }


def dimensions(src: rasterio.DatasetReader, bands: str) -> dict[str, Any]:
    """Return the datacube dimensions of an image: first to last pixel centre."""
    height, width = src.shape
    (x0, y0), (x1, y1) = src.xy(0, 0), src.xy(height - 1, width - 1)
    place = {"type": "spatial", "reference_system": src.crs.to_epsg()}
    found: dict[str, Any] = {
        "x": {**place, "axis": "x", "extent": [x0, x1], "step": src.res[0]},
        "y": {**place, "axis": "y", "extent": [y1, y0], "step": src.res[1]},
    }
    return {**found, bands: {"type": "bands", "values": list(src.descriptions)}} if bands else found


def image_asset(path: Path, src: rasterio.DatasetReader) -> dict[str, Any]:
    """Build the asset of an image made by `write_cogs`.

    Raises:
        CubeError: the image cannot be read.
        KeyError: the image was not made by `write_cogs`.
    """
    variable = src.tags()["variable"]
    layer = LAYERS[variable]
    pixel = {
        "data_type": src.dtypes[0],
        "nodata": src.nodata,
        "scale": src.scales[0],
        "spatial_resolution": src.res[0],
    }
    asset: dict[str, Any] = {
        **listed(path, path.parent, layer.title),
        "type": "image/tiff; application=geotiff; profile=cloud-optimized",
        "roles": list(layer.roles),
        "raster:bands": [pixel] * src.count,
    }
    if variable == "reflectance":
        spectra = [(b, *SPECTRUM[b]) for b in src.descriptions]
        asset["eo:bands"] = [
            {"name": b, "common_name": common, "center_wavelength": um} for b, common, um in spectra
        ]
    if variable == "footprint":
        asset["file:values"] = [
            {"values": [value], "summary": text} for value, text in CLASSES.items()
        ]
    return asset


def file_asset(key: str, path: Path, out: Path) -> dict[str, Any]:
    """Build the asset of a footprint table or of a cube with its dimensions.

    A Zarr is a folder and therefore has no checksum.
    """
    media = {"type": MEDIA[path.suffix]}
    if path.suffix in (".parquet", ".gpkg"):
        return {
            **listed(path, out, f"Mine footprints as polygons: {key}"),
            **media,
            "roles": ["data", "labels"],
        }
    title = f"Cube of all years: {key}"
    place = (
        listed(path, out, title) if path.is_file() else {"href": href(path, out), "title": title}
    )
    try:
        how: dict[str, Any] = {"engine": "netcdf4"}
        if path.suffix == ".zarr":
            how = {
                "engine": "zarr",
                "group": "0" if (path / "0").is_dir() else None,
                "consolidated": False,
            }
        with xr.open_dataset(path, decode_times=False, mask_and_scale=False, **how) as cube:
            return {**place, **media, "roles": ["data"], **_cube_fields(cube)}
    except (OSError, ValueError, ImportError) as error:
        raise CubeError(
            f"{path}: cannot be read ({error}), so the collection cannot list it"
        ) from error


def _cube_fields(cube: xr.Dataset) -> dict[str, Any]:
    epsg = int(
        cube["spatial_ref"].attrs["crs_wkt"].rpartition('"EPSG",')[2].partition("]")[0].strip('"')
    )
    place = {"type": "spatial", "reference_system": epsg}
    years = [int(y) for y in cube["year"]]
    span = [f"{years[0]}-01-01T00:00:00Z", f"{years[-1]}-12-31T23:59:59Z"]
    dimensions: dict[str, Any] = {
        axis: {**place, "axis": axis, "extent": [float(cube[axis].min()), float(cube[axis].max())]}
        for axis in ("x", "y")
    }
    bands = cube["band_name" if "band_name" in cube.coords else "band"].to_numpy()
    dimensions["band"] = {"type": "bands", "values": [str(b) for b in bands]}
    if "time" in cube.dims:
        dimensions["time"] = {
            "type": "temporal",
            "extent": span,
            "values": [middle_of(y) for y in years],
        }
    else:
        dimensions["year"] = {
            "type": "temporal",
            "extent": span,
            "values": [f"{y}-01-01T00:00:00Z" for y in years],
        }
    layers = {str(n): v for n, v in cube.data_vars.items() if "y" in v.dims}
    described = {
        n: {
            "type": "data",
            "dimensions": [str(d) for d in v.dims],
            "description": str(v.attrs["long_name"]),
        }
        for n, v in sorted(layers.items())  # Zarr lists its arrays in any order
    }
    return {"cube:dimensions": dimensions, "cube:variables": described}
