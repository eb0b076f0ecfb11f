"""Put the pixels of an open file onto a grid: as they are if they fit, else warped.

A file in the grid's zone is read as a plain window if its pixels are the grid's or whole multiples
of them. A 20 m pixel is repeated, not interpolated. Any other file is warped, typically a scene of
the neighbouring UTM zone.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple, Protocol

import numpy as np
import rasterio
from affine import Affine
from odc.geo.crs import CRS
from odc.geo.geobox import GeoBox
from rasterio.enums import Resampling
from rasterio.errors import WarpOperationError
from rasterio.io import MemoryFile
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform_bounds
from rasterio.windows import Window, from_bounds

from minecube.arrays import UInt16

_SAME = 1e-3  # pixels: corners this close are the same, as whole metres in UTM
_SAME_SIZE = 1e-6  # pixel sizes must agree better: errors add up over 10980 pixels
_STRIP_PX = 2**23  # pixels of a file warped at once: 16 MB, a site of 29 km at 10 m


class Image(Protocol):
    """An open image with one band."""

    crs: rasterio.CRS | None
    transform: Affine
    height: int
    width: int
    block: tuple[int, int]
    """Height and width of a tile."""
    wrapped: int
    """Number of pixels read as invalid because their number is above 32767."""

    def read(self, rows: range, columns: range, out: UInt16 | None = None) -> UInt16:
        """Read a window within the image: uint16 [y, x], 0 at invalid pixels."""


class Nesting(NamedTuple):
    """Place of a file's pixels in a grid."""

    ratio: int
    """Grid pixels per file pixel."""
    dx: int
    """Grid pixels from the file's left edge to the grid's."""
    dy: int
    """Grid pixels from the file's upper edge down to the grid's."""


def copy_to(pixels: UInt16, out: UInt16 | None) -> UInt16:
    """Copy pixels into an array, if there is one, and return the array."""
    if out is None or out is pixels:
        return pixels
    out[:] = pixels
    return out


@functools.lru_cache(256)
def _same_crs(one: str, other: str) -> bool:
    """Compare the names or WKT of two reference systems, cached: this takes a tenth of a read."""
    return bool(CRS(one) == CRS(other))


def has_crs_of(image: Image, grid: GeoBox) -> bool:
    """Return whether an image has the reference system of a grid."""
    return image.crs is not None and _same_crs(image.crs.to_wkt(), str(grid.crs))


def nesting_of(image: Image, grid: GeoBox) -> Nesting | None:
    """Return the place of the file's pixels in the grid; None if they do not nest."""
    t = image.transform
    size = abs(grid.resolution.x)
    if not has_crs_of(image, grid):
        return None
    is_square = abs(t.a + t.e) <= _SAME_SIZE * size
    if t.b or t.d or not is_square:
        return None
    exact_ratio = t.a / size
    exact_dx = (grid.transform.c - t.c) / size
    exact_dy = (t.f - grid.transform.f) / size
    nesting = Nesting(round(exact_ratio), round(exact_dx), round(exact_dy))
    if nesting.ratio < 1 or abs(exact_ratio - nesting.ratio) > _SAME_SIZE:
        return None
    if abs(exact_dx - nesting.dx) > _SAME or abs(exact_dy - nesting.dy) > _SAME:
        return None
    return nesting


def read_nested(image: Image, grid: GeoBox, nesting: Nesting, out: UInt16 | None = None) -> UInt16:
    """Read a window of an open file, each pixel repeated by the ratio of sizes.

    Returns uint16 (y, x), 0 at invalid pixels and outside the file. The pixels are put into `out`
    if given, which avoids a copy.
    """
    ratio, dx, dy = nesting
    height, width = grid.shape
    # First and last file pixel, cut to the file: boundless reads would fill with the file's nodata.
    columns = range(max(dx // ratio, 0), min(-(-(dx + width) // ratio), image.width))
    rows = range(max(dy // ratio, 0), min(-(-(dy + height) // ratio), image.height))
    if not columns or not rows:
        return copy_to(np.zeros((height, width), dtype=np.uint16), out)
    if ratio == 1 and (len(rows), len(columns)) == (height, width):
        return image.read(rows, columns, out)
    pixels = image.read(rows, columns).repeat(ratio, axis=0).repeat(ratio, axis=1)
    # Place of the first file pixel on the grid; negative: cut.
    y = rows.start * ratio - dy
    x = columns.start * ratio - dx
    pixels = pixels[max(-y, 0) :, max(-x, 0) :][: height - max(y, 0), : width - max(x, 0)]
    on_grid = np.zeros((height, width), dtype=np.uint16)
    on_grid[max(y, 0) :, max(x, 0) :][: pixels.shape[0], : pixels.shape[1]] = pixels
    return copy_to(on_grid, out)


def warp(image: Image, grid: GeoBox, resampling: Resampling) -> UInt16:
    """Resample an open file onto a grid, in strips: uint16 (y, x), 0 at invalid pixels."""
    window = _window_of(image, grid)
    height = grid.shape[0]
    pixels_per_row = min(window.width, image.width) * (window.height / height)
    rows = max(int(_STRIP_PX / max(pixels_per_row, 1)), 1)
    warped = np.empty(grid.shape, dtype=np.uint16)
    for top in range(0, height, rows):
        strip = slice(top, min(top + rows, height))
        warped[strip] = _warp_strip(image, grid[strip, :], resampling)
    return warped


def _window_of(image: Image, grid: GeoBox) -> Window:
    """Return the file's window of the grid, in fractions of pixels."""
    try:
        bounds = transform_bounds(grid.crs.to_wkt(), image.crs, *grid.boundingbox)
    except Exception as error:  # GDAL's errors have no public class
        raise WarpOperationError(f"its CRS has no way to the grid's: {error}") from error
    window = from_bounds(*bounds, transform=image.transform)
    if not all(map(math.isfinite, window.flatten())):
        raise WarpOperationError("its pixels have no place on the grid")
    return window


def _warp_strip(image: Image, grid: GeoBox, resampling: Resampling) -> UInt16:
    """Resample the file's own pixels, never its overviews.

    Averages in an overview may contain invalid pixels.
    """
    window = _window_of(image, grid)
    size = abs(grid.resolution.x) / abs(image.transform.a)
    reach = math.ceil(max(size, 1)) + 2  # pixels beyond the grid used for averages
    columns = range(
        max(math.floor(window.col_off) - reach, 0),
        min(math.ceil(window.col_off + window.width) + reach, image.width),
    )
    rows = range(
        max(math.floor(window.row_off) - reach, 0),
        min(math.ceil(window.row_off + window.height) + reach, image.height),
    )
    if not columns or not rows:
        return np.zeros(grid.shape, dtype=np.uint16)
    # Invalid pixels become nodata first: GDAL would average a defect with its neighbours.
    with MemoryFile() as memory:
        profile = {
            "driver": "GTiff",
            "count": 1,
            "dtype": "uint16",
            "crs": image.crs,
            "transform": image.transform @ Affine.translation(columns.start, rows.start),
        }
        with memory.open(**profile, width=len(columns), height=len(rows)) as copy:
            copy.write(image.read(rows, columns), 1)
        with memory.open() as copy:
            return _resample(copy, grid, resampling)


def _resample(image: rasterio.DatasetReader, grid: GeoBox, resampling: Resampling) -> UInt16:
    """Resample an image to a grid: uint16 [y, x]. 0 is nodata in both."""
    height, width = grid.shape
    # Number of target pixels per source pixel. GDAL guesses it from the bounding box of the window,
    # so values of one pixel differ by hundreds between windows (warp option XSCALE; "may vary among
    # chunks").
    scale = str(abs(image.transform.a) / abs(grid.resolution.x))
    # Position error in pixels; GDAL's default is an eighth. Nearest is exact, to make the mask
    # independent of the window. Bilinear errs by less than a rounding step; exact positions would
    # take four times as long.
    tolerance = 1e-9 if resampling is Resampling.nearest else 1e-3
    # Both nodata values are 0: with another one in the source, GDAL 3.11 and later turn zeros into
    # ones.
    with WarpedVRT(
        image,
        crs=grid.crs.to_wkt(),
        transform=grid.transform,
        height=height,
        width=width,
        resampling=resampling,
        src_nodata=0,
        nodata=0,
        dtype=image.dtypes[0],
        XSCALE=scale,
        YSCALE=scale,
        tolerance=tolerance,
    ) as vrt:
        warped: UInt16 = vrt.read(1).astype(np.uint16)
    return warped
