"""Export a site's cube as Zarr: v3 as a GeoZarr pyramid, v2 for GDAL before 3.13 and QGIS.

    pit.zarr/      multiscales: derivation of the groups
      0/           10 m, the cube's own values
      1/           20 m
      2/           40 m ...
    pit.v2.zarr/   one group, all of its metadata in one file (.zmetadata)

Neither is sharded: sharding stops GDAL before 3.13 from reading the cubes themselves. Conventions:
zarr-conventions/multiscales, proj and spatial, v0.1. GDAL's own `_CRS` is added.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from odc.geo.geobox import GeoBox
from zarr.codecs import GzipCodec

from minecube.arrays import AnyArray
from minecube.export.files import open_draft
from minecube.export.layers import chunk_shape, describe_cube, make_coords

_GZIP_TIME = slice(4, 8)  # bytes of a gzip header, RFC 1952
SMALLEST_PX = 256
"""Levels are added until the longer side is at most this long."""
# Resampling per variable. Others take the nearest pixel: a day of the year has no mean.
METHODS = {
    "reflectance": "average",
    "probability": "average",
    "clear_count": "average",
    "footprint_fraction": "average",
    "footprint": "mode",
    "quality": "mode",
}


class _TimelessGzip(GzipCodec):  # type: ignore[misc]
    """Gzip without a timestamp, for reproducible exports."""

    async def encode(self, chunks_and_specs: Iterable[tuple[Any, Any]]) -> Iterable[Any]:
        """Compress chunks, and clear the time in each header."""
        return [_clear_time(chunk) for chunk in await super().encode(chunks_and_specs)]


def _clear_time(chunk: Any) -> Any:
    if chunk is None:  # an empty chunk is not stored
        return None
    content = bytearray(chunk.to_bytes())
    content[_GZIP_TIME] = bytes(4)
    return type(chunk).from_bytes(bytes(content))


def write_zarr(cube: xr.Dataset, grid: GeoBox, folder: Path, site: str) -> Path:
    """Write the cube as a Zarr v3 pyramid and return its path.

    Group `0` has the cube's own values, bit for bit. Group `1` has half the resolution, and so on.
    Every level is computed from the finest. Reflectance, probability, fractions and clear counts
    use the mean of valid pixels. Footprint and quality use the most frequent value. All others use
    the nearest pixel. dtype and nodata stay the same.

    Raises:
        CubeError: the cube does not match the grid, `folder` is not a Zarr, or writing fails.
    """
    finest = describe_cube(cube, grid, site)
    grids = [grid]
    while max(grids[-1].shape) > SMALLEST_PX:
        grids.append(grid.zoom_out(2 ** len(grids)))
    attributes = {
        **finest.attrs,
        **_describe_grid(grid),
        "multiscales": {
            "layout": [_describe_level(level, coarse) for level, coarse in enumerate(grids)],
            "resampling_method": "average",
        },
        **_declare_conventions("multiscales", "proj", "spatial"),
    }
    with open_draft(folder) as draft:
        zarr.open_group(draft, mode="w", zarr_format=3, attributes=attributes)
        for level, coarse in enumerate(grids):
            data = _coarsen(finest, coarse, 2**level)
            data = _adapt_to_gdal(_move_nodata_and_scale(data), grid).assign_attrs(
                **_describe_grid(coarse), **_declare_conventions("proj", "spatial")
            )
            encoding = _make_encoding(data, _TimelessGzip())
            for name, variable in data.data_vars.items():
                encoding[str(name)]["fill_value"] = variable.attrs.get("nodata", 0)
            data.to_zarr(
                draft,
                group=str(level),
                mode="a",
                zarr_format=3,
                consolidated=False,
                encoding=encoding,
            )
    return folder


def _describe_level(level: int, grid: GeoBox) -> dict[str, Any]:
    """Return a level's entry in the layout of the multiscales convention."""
    entry: dict[str, Any] = {
        "asset": str(level),
        "transform": {"scale": [2.0**level] * 2, "translation": [0.0, 0.0]},
    }
    if level:
        entry |= {"derived_from": "0", "resampling_method": "average"}
    spatial = _describe_grid(grid)
    return entry | {key: spatial[key] for key in ("spatial:transform", "spatial:shape")}


def write_zarr2(cube: xr.Dataset, grid: GeoBox, folder: Path, site: str) -> Path:
    """Write the cube as one Zarr v2 group and return its path.

    The metadata is consolidated, for GDAL before 3.13 and QGIS. Stored values are the cube's own,
    bit for bit. Nodata is the arrays' fill value and `scale_factor` an attribute, as GDAL expects.
    `xarray.open_zarr` decodes both unless called with `mask_and_scale=False`.

    Raises:
        CubeError: as `write_zarr`.
    """
    data = _adapt_to_gdal(describe_cube(cube, grid, site), grid)
    with open_draft(folder) as draft:
        data.to_zarr(
            draft,
            mode="w",
            zarr_format=2,
            consolidated=True,
            encoding=_make_encoding(data, {"id": "zlib", "level": 6}),
        )
    return folder


def _coarsen(cube: xr.Dataset, coarse: GeoBox, factor: int) -> xr.Dataset:
    """Resample the cube to a coarser grid with the same upper left corner."""
    if factor == 1:
        return cube
    variables = {str(name): _resample(layer, factor) for name, layer in cube.data_vars.items()}
    coords = {
        str(name): coord.variable
        for name, coord in cube.coords.items()
        if name not in ("x", "y", "spatial_ref")
    }
    return xr.Dataset(variables, {**coords, **make_coords(coarse)}, cube.attrs)


def _resample(variable: xr.DataArray, factor: int) -> xr.Variable:
    """Resample a variable to pixels `factor` times as large.

    Pixels at the lower and right edge use the remaining fine pixels.
    """
    values = variable.to_numpy()
    nodata = variable.attrs.get("_FillValue")
    method = METHODS.get(str(variable.name), "nearest")
    if method == "average":
        coarse = _average_blocks(values, factor, nodata)
    elif method == "mode":
        coarse = _take_most_frequent(values, factor, nodata)
    else:
        coarse = _take_nearest(values, factor)
    return xr.Variable(variable.dims, coarse, {**variable.attrs, "resampling_method": method})


def _sum_blocks(values: AnyArray, factor: int) -> AnyArray:
    """Sum blocks of `factor` x `factor` pixels over the last two dimensions."""
    for axis in (-2, -1):
        values = np.add.reduceat(
            values, np.arange(0, values.shape[axis], factor), axis=axis, dtype=np.int64
        )
    return values


def _average_blocks(values: AnyArray, factor: int, nodata: Any) -> AnyArray:
    """Average valid integer pixels and round; blocks without a valid pixel get nodata."""
    valid = np.ones_like(values, bool)
    if nodata is not None:
        valid = values != nodata
    counts = _sum_blocks(valid, factor)
    means = _sum_blocks(np.where(valid, values, 0), factor) / np.maximum(counts, 1)
    return np.where(counts > 0, np.rint(means), nodata or 0).astype(values.dtype)


def _take_most_frequent(values: AnyArray, factor: int, nodata: Any) -> AnyArray:
    """Take the most frequent value, the smaller on a tie; nodata for blocks without values."""
    classes = np.array([c for c in np.unique(values) if c != nodata] or [nodata], values.dtype)
    counts = np.stack([_sum_blocks(values == c, factor) for c in classes])
    winners = classes[counts.argmax(axis=0)]
    return np.where(counts.any(axis=0), winners, nodata or 0).astype(values.dtype)


def _take_nearest(values: AnyArray, factor: int) -> AnyArray:
    """Take the pixel at the coarse pixel's centre, or the last pixel at an edge."""
    rows, columns = (
        np.minimum(np.arange(0, n, factor) + factor // 2, n - 1) for n in values.shape[-2:]
    )
    return values[..., rows[:, None], columns]


def _move_nodata_and_scale(cube: xr.Dataset) -> xr.Dataset:
    """Rename the attributes of integers to keep xarray from decoding them to floats.

    `_FillValue` becomes `nodata`. `scale_factor` moves into `long_name` and `units`. Band names
    become Zarr v3 `string`: fixed-length text has no specification in v3.
    """
    renamed = cube.copy()
    if "band" in cube:
        renamed = renamed.assign_coords(band=cube["band"].astype(object))
    for variable in renamed.data_vars.values():
        if variable.dtype.kind == "f":
            continue
        if (fill := variable.attrs.pop("_FillValue", None)) is not None:
            variable.attrs["nodata"] = int(fill)
        if (scale := variable.attrs.pop("scale_factor", None)) is not None:
            variable.attrs |= {
                "long_name": f"{variable.attrs['long_name']}, times {round(1 / scale)}",
                "units": f"{scale:g}",
            }
    return renamed


def _adapt_to_gdal(cube: xr.Dataset, grid: GeoBox) -> xr.Dataset:
    """Add GDAL's own CRS attribute and make flag values JSON lists."""
    labelled = cube.copy()
    for variable in labelled.data_vars.values():
        variable.attrs["_CRS"] = {
            "url": f"http://www.opengis.net/def/crs/EPSG/0/{grid.crs.epsg}",
            "wkt": grid.crs.to_wkt(),
        }
        if "flag_values" in variable.attrs:
            variable.attrs["flag_values"] = np.asarray(variable.attrs["flag_values"]).tolist()
    return labelled


def _make_encoding(cube: xr.Dataset, compressor: Any) -> dict[str, dict[str, Any]]:
    """Set chunks and compression: one year, all bands and 512 x 512 pixels per chunk.

    Every variable gets a compressor readable by any GDAL, coordinates included.
    """
    packed: dict[str, dict[str, Any]] = {
        str(name): {"compressors": compressor} for name in cube.variables
    }
    for name, variable in cube.data_vars.items():
        packed[str(name)]["chunks"] = chunk_shape(variable.shape)
    return packed


def _describe_grid(grid: GeoBox) -> dict[str, Any]:
    return {
        "proj:code": f"EPSG:{grid.crs.epsg}",
        "spatial:dimensions": ["y", "x"],
        "spatial:transform": list(grid.affine)[:6],
        "spatial:shape": list(grid.shape),
        "spatial:bbox": list(grid.boundingbox),
    }


_UUID = {
    "multiscales": "d35379db-88df-4056-af3a-620245f8e347",
    "proj": "f17cb550-5864-4468-aeb7-f3180cfb622f",
    "spatial": "689b58e2-cf7b-45e0-9fff-9cfc0883d6b4",
}


def _declare_conventions(*names: str) -> dict[str, Any]:
    """Declare the conventions followed by the attributes."""
    schemas = "https://raw.githubusercontent.com/zarr-conventions"
    texts = "https://github.com/zarr-conventions"
    conventions = [
        {
            "uuid": _UUID[name],
            "name": name,
            "schema_url": f"{schemas}/{name}/refs/tags/v0.1/schema.json",
            "spec_url": f"{texts}/{name}/blob/v0.1/README.md",
        }
        for name in names
    ]
    return {"zarr_conventions": conventions}
