"""A site's cube as Zarr for others: v3 as a pyramid by the GeoZarr conventions, and v2 for GDAL before 3.13 and QGIS.

    pit.zarr/      multiscales: which of the groups is derived from which
      0/           10 m, the cube's own values          1/  20 m          2/  40 m ...
    pit.v2.zarr/   one group, all of its metadata in one file (.zmetadata)

Neither is sharded, which is what keeps GDAL before 3.13 from the cubes themselves. Conventions: zarr-conventions/multiscales,
proj and spatial, v0.1. GDAL's own `_CRS` stands beside them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox
from zarr.codecs import GzipCodec

from minecube.export.files import whole
from minecube.export.layers import described, placed

CHUNK_PX = 512
_GZIP_TIME = slice(4, 8)  # bytes of a gzip header, RFC 1952
SMALLEST_PX = 256
"""Levels are added until the longer side has no more than this."""
# What a coarser pixel is made of; others take the nearest, since a day of the year, say, has no mean.
METHODS = {
    "reflectance": "average",
    "probability": "average",
    "clear_count": "average",
    "footprint_fraction": "average",
    "footprint": "mode",
    "quality": "mode",
}


class _TimelessGzip(GzipCodec):  # type: ignore[misc]
    """Gzip without the time of compression, so that two exports of a store are equal."""

    async def encode(self, chunks_and_specs: Iterable[tuple[Any, Any]]) -> Iterable[Any]:
        """Compress chunks, and clear the time in each header."""
        return [None if chunk is None else _without_time(chunk) for chunk in await super().encode(chunks_and_specs)]


def _without_time(chunk: Any) -> Any:
    content = bytearray(chunk.to_bytes())
    content[_GZIP_TIME] = bytes(4)
    return type(chunk).from_bytes(bytes(content))


def write_zarr(cube: xr.Dataset, grid: GeoBox, folder: Path, site: str) -> Path:
    """The cube as a Zarr v3 pyramid, groups `0` (the cube's own values, bit for bit), `1` (half the resolution), ...; the path.

    Coarser levels are made of the finest: reflectance, probability, fractions and clear counts by the mean of the pixels that
    hold a value, footprint and quality by the value that most of them have, all others by the nearest. dtype and nodata stay.

    Raises:
        CubeError: the cube does not lie on the grid, `folder` is something else than a Zarr, or it cannot be written.
    """
    finest = described(cube, grid, site)
    grids = [grid]
    while max(grids[-1].shape) > SMALLEST_PX:
        grids.append(grid.zoom_out(2 ** len(grids)))
    layout = []
    for level, coarse in enumerate(grids):
        entry: dict[str, Any] = {"asset": str(level), "transform": {"scale": [2.0**level] * 2, "translation": [0.0, 0.0]}}
        entry |= {"derived_from": "0", "resampling_method": "average"} if level else {}
        layout.append(entry | {k: v for k, v in _spatial(coarse).items() if k in ("spatial:shape", "spatial:transform")})
    with whole(folder) as part:
        about = {**finest.attrs, **_spatial(grid), "multiscales": {"layout": layout, "resampling_method": "average"}}
        zarr.open_group(part, mode="w", zarr_format=3, attributes={**about, **_conventions("multiscales", "proj", "spatial")})
        for level, coarse in enumerate(grids):
            data = finest if level == 0 else _coarser(finest, coarse, 2**level)
            data = _for_gdal(_nodata_in_words(data), grid).assign_attrs(**_spatial(coarse), **_conventions("proj", "spatial"))
            encoding = _encoding(data, _TimelessGzip())
            for name, variable in data.data_vars.items():
                encoding[str(name)]["fill_value"] = variable.attrs.get("nodata", 0)
            data.to_zarr(part, group=str(level), mode="a", zarr_format=3, consolidated=False, encoding=encoding)
    return folder


def write_zarr2(cube: xr.Dataset, grid: GeoBox, folder: Path, site: str) -> Path:
    """The cube as one Zarr v2 group with consolidated metadata, for GDAL before 3.13 and QGIS; the path.

    Stored values are the cube's own, bit for bit. Nodata is the arrays' fill value and `scale_factor` an attribute, as GDAL
    takes them: `xarray.open_zarr` decodes both unless it is told `mask_and_scale=False`.

    Raises:
        CubeError: as `write_zarr`.
    """
    data = _for_gdal(described(cube, grid, site), grid)
    with whole(folder) as part:
        data.to_zarr(part, mode="w", zarr_format=2, consolidated=True, encoding=_encoding(data, {"id": "zlib", "level": 6}))
    return folder


def _coarser(cube: xr.Dataset, coarse: GeoBox, factor: int) -> xr.Dataset:
    """The cube on a coarser grid that shares its upper left corner."""
    variables = {str(n): _resampled(v, factor) for n, v in cube.data_vars.items()}
    coords = {str(n): c.variable for n, c in cube.coords.items() if n not in ("x", "y", "spatial_ref")}
    return xr.Dataset(variables, {**coords, **placed(coarse)}, cube.attrs)


def _resampled(variable: xr.DataArray, factor: int) -> xr.Variable:
    """The variable with pixels `factor` times as large; those at the lower and right edge are made of what is left there."""
    method = METHODS.get(str(variable.name), "nearest")
    made = RESAMPLE[method](variable.to_numpy(), factor, variable.attrs.get("_FillValue"))
    return xr.Variable(variable.dims, made, {**variable.attrs, "resampling_method": method})


def _sums(values: NDArray[Any], factor: int) -> NDArray[Any]:
    """Sums over blocks of the last two dimensions."""
    for axis in (-2, -1):
        values = np.add.reduceat(values, np.arange(0, values.shape[axis], factor), axis=axis, dtype=np.int64)
    return values


def _average(values: NDArray[Any], factor: int, nodata: Any) -> NDArray[Any]:
    """The mean of integers, rounded, of pixels that hold a value; nodata where none does."""
    valid = np.ones_like(values, bool) if nodata is None else values != nodata
    counts = _sums(valid, factor)
    means = _sums(np.where(valid, values, 0), factor) / np.maximum(counts, 1)
    return np.where(counts > 0, np.rint(means), nodata or 0).astype(values.dtype)


def _mode(values: NDArray[Any], factor: int, nodata: Any) -> NDArray[Any]:
    """The value that most pixels have, the smaller of two that as many have; nodata where none has another."""
    classes = np.array([c for c in np.unique(values) if c != nodata] or [nodata], values.dtype)
    counts = np.stack([_sums(values == c, factor) for c in classes])
    return np.where(counts.any(axis=0), classes[counts.argmax(axis=0)], nodata or 0).astype(values.dtype)


def _nearest(values: NDArray[Any], factor: int, nodata: Any) -> NDArray[Any]:  # noqa: ARG001  as the others are called
    """The value of the pixel at the coarser one's centre, or of the last there is."""
    rows, columns = (np.minimum(np.arange(0, n, factor) + factor // 2, n - 1) for n in values.shape[-2:])
    return values[..., rows[:, None], columns]


RESAMPLE = {"average": _average, "mode": _mode, "nearest": _nearest}


def _nodata_in_words(cube: xr.Dataset) -> xr.Dataset:
    """Integers that xarray leaves integers: it turns what has `_FillValue` or `scale_factor` into floats.

    And text of any length, Zarr v3's `string`: that of fixed length has no specification there.
    """
    said = cube.assign_coords(band=cube["band"].astype(object)) if "band" in cube else cube.copy()
    for variable in said.data_vars.values():
        if variable.dtype.kind == "f":
            continue
        if (fill := variable.attrs.pop("_FillValue", None)) is not None:
            variable.attrs["nodata"] = int(fill)
        if (scale := variable.attrs.pop("scale_factor", None)) is not None:
            times = round(1 / scale)
            variable.attrs |= {"long_name": f"{variable.attrs['long_name']}, times {times}", "units": f"{scale:g}"}
    return said


def _for_gdal(cube: xr.Dataset, grid: GeoBox) -> xr.Dataset:
    """The same with GDAL's own attribute for the CRS, and flags as JSON has them."""
    said = cube.copy()
    for variable in said.data_vars.values():
        variable.attrs["_CRS"] = {"url": f"http://www.opengis.net/def/crs/EPSG/0/{grid.crs.epsg}", "wkt": grid.crs.to_wkt()}
        if "flag_values" in variable.attrs:
            variable.attrs["flag_values"] = np.asarray(variable.attrs["flag_values"]).tolist()
    return said


def _encoding(cube: xr.Dataset, compressor: Any) -> dict[str, dict[str, Any]]:
    """One year, all bands and 512 x 512 pixels a chunk; packed as every GDAL can unpack, coordinates, too."""
    packed: dict[str, dict[str, Any]] = {str(name): {"compressors": compressor} for name in cube.variables}
    for name, v in cube.data_vars.items():
        packed[str(name)]["chunks"] = (1, *v.shape[1:-2], *(min(CHUNK_PX, n) for n in v.shape[-2:]))
    return packed


def _spatial(grid: GeoBox) -> dict[str, Any]:
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


def _conventions(*names: str) -> dict[str, Any]:
    """What says that attributes are to be read by these conventions."""
    home = "https://{}/zarr-conventions/{}/{}v0.1/{}"
    found = [
        {
            "uuid": _UUID[name],
            "name": name,
            "schema_url": home.format("raw.githubusercontent.com", name, "refs/tags/", "schema.json"),
            "spec_url": home.format("github.com", name, "blob/", "README.md"),
        }
        for name in names
    ]
    return {"zarr_conventions": found}
