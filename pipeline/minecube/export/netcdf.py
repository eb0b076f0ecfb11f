"""Export a site's cube as one NetCDF-4 file following CF 1.11.

GDAL, Panoply, R, Julia and MATLAB read it without plugins.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr
from odc.geo.geobox import GeoBox

from minecube.errors import CubeError
from minecube.export.files import whole
from minecube.export.layers import described

CHUNK_PX = 512


def write_netcdf(cube: xr.Dataset, grid: GeoBox, path: Path, site: str) -> Path:
    """Write the whole cube as one NetCDF-4 file and return its path.

    Dimensions are (time, band, y, x). Stored values are the cube's own, bit for bit: reflectance
    uint16 with `scale_factor` 1e-4 and `_FillValue` 0, footprint and probability uint8 with
    `_FillValue` 255. `time` is the middle of each year; its bounds span the whole year.

    Raises:
        CubeError: the cube does not match the grid, netCDF4 is not installed, or writing fails.
    """
    timed = _timed(described(cube, grid, site))
    encoding = {}
    for name, variable in timed.data_vars.items():
        if "y" not in variable.dims:
            continue
        chunks = (1, *variable.shape[1:-2], *(min(CHUNK_PX, n) for n in variable.shape[-2:]))
        encoding[str(name)] = {"zlib": True, "complevel": 4, "shuffle": True, "chunksizes": chunks}
    with whole(path) as part:
        try:
            timed.to_netcdf(part, engine="netcdf4", format="NETCDF4", encoding=encoding)
        except ModuleNotFoundError as error:
            raise CubeError(
                "--format netcdf needs one package more: pip install 'minecube[publish]'"
            ) from error
        except RuntimeError as error:  # raised by netCDF4 on a full disk
            raise OSError(None, str(error)) from error
    return path


def _timed(cube: xr.Dataset) -> xr.Dataset:
    """Convert years to CF times: days since 1970 with bounds; the `year` coordinate stays."""
    first = np.array([f"{y}-01-01" for y in cube["year"].to_numpy()], "datetime64[D]").astype(
        np.int64
    )
    end = np.array([f"{y + 1}-01-01" for y in cube["year"].to_numpy()], "datetime64[D]").astype(
        np.int64
    )
    about = {
        "standard_name": "time",
        "long_name": "middle of the year",
        "axis": "T",
        "bounds": "time_bnds",
    }
    about |= {
        "units": "days since 1970-01-01",
        "calendar": "standard",
        "units_metadata": "leap_seconds: none",
    }
    # CF allows no text coordinate with its dimension's own name, so it becomes `band_name`.
    named = cube.reset_index("band").rename_vars(band="band_name") if "band" in cube.dims else cube
    timed = named.rename_dims(year="time").assign_coords(time=("time", (first + end) / 2, about))
    timed["time_bnds"] = (("time", "bnds"), np.stack([first, end], axis=1).astype(np.float64))
    for name in ("x", "y", "time", "wavelength", "time_bnds"):
        if name in timed.variables:
            timed[name].encoding["_FillValue"] = None  # CF: coordinates have no gaps
    timed["time_bnds"].encoding["coordinates"] = None
    return timed
