"""Describe a cube's variables for exports: title, nodata, scale, CF names, wavelengths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr
from odc.geo.geobox import GeoBox
from odc.geo.xr import xr_coords

from minecube.errors import CubeError
from minecube.export.credits import credits_of, lines, span_of


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Export settings of one variable."""

    title: str
    nodata: int
    scale: float
    """Pixel value x scale = physical value."""
    overview: str
    """GDAL resampling of the overviews. Classes must not be averaged."""
    roles: tuple[str, ...]
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
        nodata=255,
        scale=1,
        overview="NEAREST",
        roles=("data", "labels"),
        cf={"flag_values": np.array([0, 1], np.uint8), "flag_meanings": "not_mine mine"},
    ),
    "probability": Layer(
        title="Mine probability",
        nodata=255,
        scale=1 / 250,
        overview="AVERAGE",
        roles=("data",),
        cf={"units": "1"},
    ),
}
# Not exported as an image, but described in NetCDF and Zarr.
FRACTION = Layer(
    title="Share of the pixel that is mine",
    nodata=255,
    scale=1 / 250,
    overview="AVERAGE",
    roles=(),
    cf={"units": "1"},
)
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
    expected = xr_coords(grid)
    for axis in ("y", "x"):
        if cube.sizes[axis] != expected[axis].size or not np.allclose(
            cube[axis], expected[axis], rtol=0, atol=1e-3
        ):
            raise CubeError(
                f"{site}: the cube's {axis} coordinates are not the grid's pixel centres, so its images would lie in the wrong "
                "place; export it on the grid it was built on"
            )


def described(cube: xr.Dataset, grid: GeoBox, site: str) -> xr.Dataset:
    """Add CF attributes, licences and citations to a cube.

    Variables keep dimensions, dtype and every value. The attributes `_FillValue` and `scale_factor`
    describe the stored values. The optional `cube.attrs["builds"]` maps year -> provenance
    (`minecube.cube.builds`).

    Raises:
        CubeError: the cube does not match the grid.
    """
    need_on_grid(cube, grid, site)
    made = cube.attrs.get("builds", {})
    coords = placed(grid)
    coords["year"] = ("year", cube["year"].to_numpy(), {"long_name": "calendar year", "units": "1"})
    if "band" in cube.dims:
        bands = [str(b) for b in cube["band"].to_numpy()]
        coords["band"] = (
            "band",
            np.asarray(bands),
            {"long_name": "Sentinel-2 band", "standard_name": "sensor_band_identifier"},
        )
        centres = {
            "standard_name": "radiation_wavelength",
            "long_name": "centre of the band",
            "units": "um",
        }
        coords["wavelength"] = ("band", np.array([SPECTRUM[b][1] for b in bands]), centres)
    names = sorted(map(str, cube.data_vars))  # a store lists them in any order
    variables = {name: _described(cube[name]) for name in names}
    about = {
        "Conventions": "CF-1.11",
        "title": f"{site}: annual Sentinel-2 composites {span_of(cube)}",
        "site": site,
        "source": "Sentinel-2 L2A, composited by minecube",
        "history": "; ".join(f"{year}: {_history(build)}" for year, build in sorted(made.items())),
        **lines(credits_of(cube)),
    }
    return xr.Dataset(variables, coords, {k: v for k, v in about.items() if v})


def _history(build: Mapping[str, Any]) -> str:
    share = build.get("reads", {}).get("completeness", 1.0)
    return f"build {build['build_id']}, minecube {build['version']}" + (
        f", {share:.2%} of its reads" if share < 1 else ""
    )


def placed(grid: GeoBox) -> dict[str, Any]:
    """Return a grid's coordinates with CF names: x, y and spatial_ref."""
    found = dict(xr_coords(grid))
    for axis in ("x", "y"):
        attrs = {
            "standard_name": f"projection_{axis}_coordinate",
            "long_name": f"{axis} of pixel centres",
            "units": "m",
        }
        found[axis] = (axis, found[axis].to_numpy(), {**attrs, "axis": axis.upper()})
    found["spatial_ref"] = (
        found["spatial_ref"].assign_attrs(long_name="coordinate reference system").variable
    )
    return found


def _described(variable: xr.DataArray) -> xr.Variable:
    layer = FRACTION if variable.name == "footprint_fraction" else LAYERS.get(str(variable.name))
    attrs: dict[str, Any] = {
        "long_name": layer.title if layer else variable.attrs.get("long_name", str(variable.name))
    }
    if layer:
        attrs |= layer.cf
    else:
        attrs |= {
            k: v
            for k, v in variable.attrs.items()
            if k in ("flag_meanings",) or (k == "units" and v)
        }
        if "flag_values" in variable.attrs:
            attrs["flag_values"] = np.asarray(variable.attrs["flag_values"], variable.dtype)
    # Plain attributes: xarray's `encoding` would divide the values by the scale on writing.
    if layer:
        attrs["_FillValue"] = variable.dtype.type(layer.nodata)
        if layer.scale != 1:
            attrs["scale_factor"] = layer.scale
    elif variable.dtype.kind == "f":
        attrs["_FillValue"] = variable.dtype.type("nan")
    elif (nodata := variable.attrs.get("nodata")) is not None and nodata not in variable.attrs.get(
        "flag_values", ()
    ):
        attrs["_FillValue"] = variable.dtype.type(nodata)
    return xr.Variable(variable.dims, variable.data, {**attrs, "grid_mapping": "spatial_ref"})
