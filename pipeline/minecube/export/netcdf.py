"""Export a site's cube as one NetCDF-4 file following CF 1.11.

GDAL, Panoply, R, Julia and MATLAB read it without plugins.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr
from odc.geo.geobox import GeoBox

from minecube.arrays import Int64
from minecube.errors import CubeError
from minecube.export.files import open_draft
from minecube.export.layers import chunk_shape, describe_cube


def write_netcdf(cube: xr.Dataset, grid: GeoBox, path: Path, site: str) -> Path:
    """Write the whole cube as one NetCDF-4 file and return its path.

    Dimensions are (time, band, y, x). Stored values are the cube's own, bit for bit: reflectance
    uint16 with `scale_factor` 1e-4 and `_FillValue` 0, footprint and probability uint8 with
    `_FillValue` 255. `time` is the middle of each year; its bounds span the whole year.

    Raises:
        CubeError: the cube does not match the grid, netCDF4 is not installed, or writing fails.
    """
    timed = _replace_years(describe_cube(cube, grid, site))
    encoding = {}
    for name, variable in timed.data_vars.items():
        if "y" not in variable.dims:
            continue
        chunks = chunk_shape(variable.shape)
        encoding[str(name)] = {"zlib": True, "complevel": 4, "shuffle": True, "chunksizes": chunks}
    with open_draft(path) as draft:
        try:
            timed.to_netcdf(draft, engine="netcdf4", format="NETCDF4", encoding=encoding)
        except ModuleNotFoundError as error:
            raise CubeError(
                "--format netcdf needs one package more: pip install 'minecube[publish]'"
            ) from error
        except RuntimeError as error:  # raised by netCDF4 on a full disk
            raise OSError(None, str(error)) from error
    return path


def _replace_years(cube: xr.Dataset) -> xr.Dataset:
    """Convert years to CF times: days since 1970 with bounds; the `year` coordinate stays."""
    years = cube["year"].to_numpy()
    start = _count_days(years)
    end = _count_days(years + 1)
    attributes = {
        "standard_name": "time",
        "long_name": "middle of the year",
        "axis": "T",
        "bounds": "time_bnds",
        "units": "days since 1970-01-01",
        "calendar": "standard",
        "units_metadata": "leap_seconds: none",
    }
    timed = cube
    if "band" in cube.dims:
        # CF allows no text coordinate with its dimension's own name, so it becomes `band_name`.
        timed = timed.reset_index("band").rename_vars(band="band_name")
    timed = timed.rename_dims(year="time")
    timed = timed.assign_coords(time=("time", (start + end) / 2, attributes))
    timed["time_bnds"] = (("time", "bnds"), np.stack([start, end], axis=1).astype(np.float64))
    for name in ("x", "y", "time", "wavelength", "time_bnds"):
        if name in timed.variables:
            timed[name].encoding["_FillValue"] = None  # CF: coordinates have no gaps
    timed["time_bnds"].encoding["coordinates"] = None
    return timed


def _count_days(years: Int64) -> Int64:
    """Return the days from 1970-01-01 to the start of each year."""
    starts = [f"{year}-01-01" for year in years]
    return np.array(starts, "datetime64[D]").astype(np.int64)
