"""Compute footprints of probabilities, areas by year, and the year of each pixel's onset.

Areas are in the grid's equal-area projection, since a UTM pixel differs from 100 m2 on the ground
by up to 0.2 %. Pixels are counted per cell of 64 x 64 and multiplied by the cell's mean pixel area.
This is the area of the cell's projected outline, divided by its pixels. The result agrees with
projecting every pixel's polygon to better than 0.001 %.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import shapely
import xarray as xr
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox
from pyproj import Transformer

from minecube.errors import LabelError
from minecube.grid import equal_area_crs

MINE, NOT_MINE, UNKNOWN = np.uint8(1), np.uint8(0), np.uint8(255)
HALF = 125
"""Lowest stored probability (x 250) of a mine pixel."""
_CELL_PX = 64  # UTM's scale changes by less than 1e-5 over 640 m


def threshold(probability: xr.DataArray) -> xr.DataArray:
    """Convert a probability x 250 to a footprint of the same dimensions.

    The footprint is uint8: 1 from one half on, 0 below, 255 unknown.
    """
    footprint = (probability >= HALF).astype(np.uint8).where(probability != UNKNOWN, UNKNOWN)
    return footprint.rename("footprint").assign_attrs(
        long_name="mine footprint", nodata=int(UNKNOWN)
    )


def onset(footprint: xr.DataArray) -> xr.DataArray:
    """Return the first mine year of each pixel: (y, x) uint16, 0 = never.

    Unknown years (255) are ignored.
    """
    years = footprint["year"].astype(np.uint16)
    never = np.iinfo(np.uint16).max
    first = years.where(footprint == MINE, never).min("year")
    return (
        first.where(first < never, 0)
        .astype(np.uint16)
        .rename("onset")
        .assign_attrs(long_name="first year as a mine", nodata=0)
    )


def areas(footprint: xr.DataArray, grid: GeoBox) -> pd.DataFrame:
    """Compute mine area by year in m2.

    Columns are year, area_m2, gain_m2, loss_m2, unknown_m2. Gain and loss compare with a pixel's
    last known year, so no change is lost in a gap. Without unknown pixels, area grows by gain -
    loss. In the first year both are NaN, as there is no earlier year.

    Args:
        footprint: (year, y, x) uint8: 1 mine, 0 not, 255 unknown; years ascending.
        grid: The footprint's grid.

    Raises:
        LabelError: The footprint has other dimensions or another shape than the grid, or its years
            do not ascend.
    """
    years = footprint["year"].to_numpy().tolist() if "year" in footprint.coords else []
    if (
        footprint.dims != ("year", "y", "x")
        or footprint.shape[1:] != tuple(grid.shape)
        or years != sorted(set(years))
    ):
        raise LabelError(
            f"expected a footprint (year, y, x) of {grid.shape[0]} x {grid.shape[1]} pixels with ascending years, found "
            f"{dict(footprint.sizes)} with years {years}; areas of another grid, or gains back in time, would be wrong"
        )
    worth = _pixel_m2(grid)
    last = np.full(tuple(grid.shape), UNKNOWN)
    rows = []
    for year in years:
        now = footprint.sel(year=year).to_numpy()
        gain, loss = (
            _sum((last == a) & (now == b), worth) for a, b in ((NOT_MINE, MINE), (MINE, NOT_MINE))
        )
        rows.append((year, _sum(now == MINE, worth), gain, loss, _sum(now == UNKNOWN, worth)))
        last = np.where(now == UNKNOWN, last, now)
    table = pd.DataFrame(rows, columns=["year", "area_m2", "gain_m2", "loss_m2", "unknown_m2"])
    table.loc[:0, ["gain_m2", "loss_m2"]] = np.nan
    return table


def pixel_areas(grid: GeoBox) -> NDArray[np.float64]:
    """Compute the area of each pixel (y, x) in m2, in the equal-area projection."""
    height, width = grid.shape
    cells = _pixel_m2(grid).repeat(_CELL_PX, axis=0).repeat(_CELL_PX, axis=1)
    return cells[:height, :width]


def _edges(size: int) -> NDArray[np.int64]:
    """Return the starts of cells, and the end of the last, possibly shorter one."""
    return np.append(np.arange(0, size, _CELL_PX), size)


def _pixel_m2(grid: GeoBox) -> NDArray[np.float64]:
    """Compute the mean pixel area of each cell (cell rows, cell columns)."""
    rows, columns = (_edges(size) for size in grid.shape)
    size_x, _, left, _, size_y, top = grid.affine[:6]
    move = Transformer.from_crs(str(grid.crs), equal_area_crs(grid), always_xy=True)
    x, y = move.transform(*np.meshgrid(left + size_x * columns, top + size_y * rows))
    corners = np.stack([x, y], axis=-1)
    rings = np.stack(
        [corners[:-1, :-1], corners[:-1, 1:], corners[1:, 1:], corners[1:, :-1]], axis=2
    )
    found: NDArray[np.float64] = shapely.area(shapely.polygons(rings)) / np.outer(
        np.diff(rows), np.diff(columns)
    )
    return found


def _sum(mask: NDArray[np.bool_], worth: NDArray[np.float64]) -> float:
    rows, columns = (_edges(size)[:-1] for size in mask.shape)
    pixels = np.add.reduceat(np.add.reduceat(mask, rows, axis=0, dtype=np.int64), columns, axis=1)
    return float((pixels * worth).sum())
