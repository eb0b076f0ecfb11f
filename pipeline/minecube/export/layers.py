"""Describe a cube's variables for exports: title, nodata, scale, CF names, wavelengths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr
from odc.geo.geobox import GeoBox
from odc.geo.xr import xr_coords

from minecube.codes import BACKGROUND, FULL, MINE, UNKNOWN
from minecube.errors import CubeError
from minecube.export.credits import format_credits, format_years, list_credits


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Export settings of one variable."""

    title: str
    nodata: int
    scale: float = 1
    """Pixel value x scale = physical value."""
    overview: str = "NEAREST"
    """GDAL resampling of the overviews. Classes must not be averaged."""
    roles: tuple[str, ...] = ()
    """Roles of a STAC asset. Layers without roles are not listed."""
    cf: Mapping[str, Any] = field(default_factory=dict)
    """CF attributes, except `scale_factor` and the nodata value."""


LAYERS = {
    "reflectance": Layer(
        title="Surface reflectance, annual composite",
        nodata=0,
        scale=1e-4,
        overview="AVERAGE",
        roles=("data", "reflectance"),
        cf={"standard_name": "surface_bidirectional_reflectance", "units": "1"},
    ),
    "footprint": Layer(
        title="Mine footprint",
        nodata=UNKNOWN,
        roles=("data", "labels"),
        cf={
            "flag_values": np.array([BACKGROUND, MINE], np.uint8),
            "flag_meanings": "not_mine mine",
        },
    ),
    "probability": Layer(
        title="Mine probability",
        nodata=UNKNOWN,
        scale=1 / FULL,
        overview="AVERAGE",
        roles=("data",),
        cf={"units": "1"},
    ),
}
"""Variables exported as images."""
_DESCRIBED = {
    **LAYERS,
    "footprint_fraction": Layer(
        title="Share of the pixel that is mine",
        nodata=UNKNOWN,
        scale=1 / FULL,
        cf={"units": "1"},
    ),
}
"""Variables described in NetCDF and Zarr. Fractions get no image."""
CHUNK_PX = 512
"""Longest side of chunks in NetCDF and Zarr, and of tiles in images."""
# Name in the STAC EO extension v1.1, and centre in micrometres
# (Sentinel-2A, from MTD_MSIL2A.xml, Spectral_Information).
SPECTRUM = {
    "B02": ("blue", 0.4927),
    "B03": ("green", 0.5598),
    "B04": ("red", 0.6646),
    "B05": ("rededge", 0.7041),
    "B06": ("rededge", 0.7405),
    "B07": ("rededge", 0.7828),
    "B08": ("nir", 0.8328),
    "B8A": ("nir08", 0.8647),
    "B11": ("swir16", 1.6137),
    "B12": ("swir22", 2.2024),
}


def need_on_grid(cube: xr.Dataset, grid: GeoBox, site: str) -> None:
    """Raise CubeError unless the cube's coordinates are the grid's pixel centres."""
    centres = xr_coords(grid)
    for axis in ("y", "x"):
        if cube.sizes[axis] != centres[axis].size or not np.allclose(
            cube[axis], centres[axis], rtol=0, atol=1e-3
        ):
            raise CubeError(
                f"{site}: the cube's {axis} coordinates are not the grid's pixel centres; "
                "export the cube on its own grid"
            )


def chunk_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the chunks of an array (year, [band,] y, x) in NetCDF and Zarr.

    A chunk has one year, all bands and at most 512 x 512 pixels.
    """
    _, *bands, height, width = shape
    return (1, *bands, min(CHUNK_PX, height), min(CHUNK_PX, width))


def describe_cube(cube: xr.Dataset, grid: GeoBox, site: str) -> xr.Dataset:
    """Add CF attributes, licences and citations to a cube.

    Variables keep dimensions, dtype and every value. The attributes `_FillValue` and `scale_factor`
    describe the stored values. The optional `cube.attrs["builds"]` maps year -> provenance
    (`minecube.cube.read_markers`).

    Raises:
        CubeError: the cube does not match the grid.
    """
    need_on_grid(cube, grid, site)
    coords = make_coords(grid)
    coords["year"] = ("year", cube["year"].to_numpy(), {"long_name": "calendar year", "units": "1"})
    if "band" in cube.dims:
        coords |= _make_band_coords([str(band) for band in cube["band"].to_numpy()])
    names = sorted(map(str, cube.data_vars))  # a store lists them in any order
    builds = cube.attrs.get("builds", {})
    attributes = {
        "Conventions": "CF-1.11",
        "title": f"{site}: annual Sentinel-2 composites {format_years(cube)}",
        "site": site,
        "source": "Sentinel-2 L2A, composited by minecube",
        "history": "; ".join(f"{year}: {_state_build(builds[year])}" for year in sorted(builds)),
        **format_credits(list_credits(cube)),
    }
    return xr.Dataset(
        {name: _describe_variable(cube[name]) for name in names},
        coords,
        {key: value for key, value in attributes.items() if value},
    )


def _make_band_coords(bands: list[str]) -> dict[str, Any]:
    """Return the names of the bands and their centres in micrometres."""
    return {
        "band": (
            "band",
            np.asarray(bands),
            {"long_name": "Sentinel-2 band", "standard_name": "sensor_band_identifier"},
        ),
        "wavelength": (
            "band",
            np.array([SPECTRUM[band][1] for band in bands]),
            {
                "standard_name": "radiation_wavelength",
                "long_name": "centre of the band",
                "units": "um",
            },
        ),
    }


def _state_build(build: Mapping[str, Any]) -> str:
    statement = f"build {build['build_id']}, minecube {build['version']}"
    completeness = build.get("reads", {}).get("completeness", 1.0)
    if completeness < 1:
        statement += f", {completeness:.2%} of its reads"
    return statement


def make_coords(grid: GeoBox) -> dict[str, Any]:
    """Return a grid's coordinates with CF names: x, y and spatial_ref."""
    coords = dict(xr_coords(grid))
    for axis in ("x", "y"):
        attributes = {
            "standard_name": f"projection_{axis}_coordinate",
            "long_name": f"{axis} of pixel centres",
            "units": "m",
            "axis": axis.upper(),
        }
        coords[axis] = (axis, coords[axis].to_numpy(), attributes)
    reference = coords["spatial_ref"].assign_attrs(long_name="coordinate reference system")
    coords["spatial_ref"] = reference.variable
    return coords


def _describe_variable(variable: xr.DataArray) -> xr.Variable:
    attributes = {**_make_attributes(variable), "grid_mapping": "spatial_ref"}
    return xr.Variable(variable.dims, variable.data, attributes)


def _make_attributes(variable: xr.DataArray) -> dict[str, Any]:
    layer = _DESCRIBED.get(str(variable.name))
    if layer is None:
        return _attributes_from_store(variable)
    # Plain attributes: xarray's `encoding` would divide the values by the scale on writing.
    nodata = variable.dtype.type(layer.nodata)
    attributes = {"long_name": layer.title, **layer.cf, "_FillValue": nodata}
    if layer.scale != 1:
        attributes["scale_factor"] = layer.scale
    return attributes


def _attributes_from_store(variable: xr.DataArray) -> dict[str, Any]:
    """Convert the cube's own attributes of a variable without export settings."""
    stored = variable.attrs
    attributes = {"long_name": stored.get("long_name", str(variable.name))}
    for key in stored:
        if key == "flag_meanings" or (key == "units" and stored[key]):
            attributes[key] = stored[key]
    if "flag_values" in stored:
        attributes["flag_values"] = np.asarray(stored["flag_values"], variable.dtype)
    nodata = stored.get("nodata")
    if variable.dtype.kind == "f":
        attributes["_FillValue"] = variable.dtype.type("nan")
    elif nodata is not None and nodata not in stored.get("flag_values", ()):
        attributes["_FillValue"] = variable.dtype.type(nodata)
    return attributes
