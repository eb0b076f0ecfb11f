"""Open cubes to read: lazily, and never with two builds of one year mixed.

Every read of pixels ends with a check of the markers. If a year was committed or withdrawn after
opening, the read fails: its blocks could come from two builds. A missing shard is an error if a
marker lists it, not fill value.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import odc.geo.xr  # noqa: F401  registers the .odc accessor
import xarray as xr
from odc.geo.geobox import GeoBox
from xarray.core import indexing

from minecube.arrays import Int64
from minecube.cube.read.commits import Commits, Labels, Watch
from minecube.cube.read.pixels import LazyPixels, Pixels
from minecube.cube.store import Store
from minecube.cube.template import LABELS, WRITTEN_LATER, grid_in
from minecube.errors import CubeError

REFLECTANCE_SCALE = 10_000
"""Stored reflectance per unit of surface reflectance."""


def open_cube(store: Store, site_id: str) -> xr.Dataset:
    """Open a site's cube with all its years, lazily. A year without a commit reads as no data.

    Dimensions are year (ascending), band, y, x. `cube/__init__.py` lists the variables. Attributes are text and
    numbers, and variables have no encoding. `to_netcdf` and `to_zarr` therefore work.

    Raises:
        CubeError: the site is missing, or the store is not of minecube. Also raised on reading, if
            a year was rebuilt or a shard is missing or damaged.
    """
    return _open(Commits.read(store, site_id))


def open_committed(store: Store, site_id: str) -> xr.Dataset:
    """Open a site's cube as `open_cube`, with committed years only. Use this to read a cube.

    Raises:
        CubeError: as `open_cube`, or the site has no committed year.
    """
    commits = Commits.read(store, site_id)
    if not commits.committed:
        raise CubeError(
            f"{store}: {site_id} has no committed year; run `minecube build` until it says built"
        )
    return _open(commits).sel(year=sorted(commits.committed))


def _open(commits: Commits) -> xr.Dataset:
    """Open the cube with these markers."""
    store = commits.store
    site_id = commits.site_id
    with store.reading(site_id):
        opened: xr.Dataset = xr.open_zarr(
            store.open_zarr(), group=site_id, consolidated=False, chunks=None
        )
        opened["year"].load()
        for name, array in opened.data_vars.items():
            if array.dims[:1] == ("year",):
                watch: Watch = commits
                if name in LABELS:
                    watch = Labels.read(store, site_id, str(name))
                pixels = Pixels.open(store, f"{site_id}/{name}", watch)
                opened[name] = _chunk(array.variable, pixels)
    for variable in opened.variables.values():
        variable.encoding = {}
    opened = opened.isel(year=_order_years(opened["year"].to_numpy()))
    return opened.assign_attrs({name: _flatten(value) for name, value in opened.attrs.items()})


def _order_years(years: Int64) -> Int64:
    """Return the indices of named years, in ascending order of the years.

    Years are stored in the order in which they were added. A run killed while it added years leaves
    years without a name: 0.
    """
    order = np.argsort(years)
    return order[years[order] > 0]


def read_grid_and_years(store: Store, site_id: str) -> tuple[GeoBox, list[int]]:
    """Read the grid of a site's cube, and all its years in ascending order, from metadata.

    Raises:
        CubeError: the site is missing.
    """
    group = store.open_site(site_id)
    with store.reading(site_id):
        years = group["year"][:]
        return grid_in(group.attrs), years[_order_years(years)].tolist()


def as_float(cube: xr.Dataset) -> xr.Dataset:
    """Convert reflectance from uint16 x 10000 (0 = no data) to float32 (NaN = no data)."""
    stored = cube["reflectance"]
    scaled = stored.astype(np.float32) / np.float32(REFLECTANCE_SCALE)
    attrs = {name: value for name, value in stored.attrs.items() if name not in ("nodata", "units")}
    reflectance = scaled.where(stored > 0)
    reflectance.attrs = {**attrs, "long_name": "surface reflectance", "units": "1"}
    return cube.assign(reflectance=reflectance)


def _chunk(variable: xr.Variable, pixels: Pixels) -> xr.Variable:
    """Wrap a variable in Dask chunks read by `pixels`, without checksums in its attributes."""
    attrs = {
        name: _flatten(value)
        for name, value in variable.attrs.items()
        if name == "origin" or name not in WRITTEN_LATER
    }
    lazy = xr.Variable(variable.dims, indexing.LazilyIndexedArray(LazyPixels(pixels)), attrs)
    chunk = (1, *pixels.shape[1:-2], *pixels.chunk)
    return lazy.chunk(dict(zip(variable.dims, chunk, strict=True)))


def _flatten(value: Any) -> Any:
    """Convert an attribute for NetCDF: nested values become JSON."""
    is_nested = isinstance(value, dict)
    if isinstance(value, list):
        is_nested = any(isinstance(item, dict | list) for item in value)
    return json.dumps(value) if is_nested else value
