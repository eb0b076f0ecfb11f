"""Write cubes in the published layout and on the published grid.

Loaders for the release read the result unchanged.

    EuroMineNet/Germany_1/image/Year2015.tif   int16, ten bands, EPSG:4326
    EuroMineNet/Germany_1/label/Year2015.tif   uint8, 0 or 255, the same pixels, no CRS

Labels are resampled through the covered fraction. A 10 m mask, sampled at pixels of 10 m by 6 m,
loses up to one pixel along every edge (IoU 0.95 to 0.98). Interpolating the fraction between four
pixel centres locates the edge within pixels (IoU 0.997 and better). Regions of a few pixels still
lose some area: regions of 4 x 4 pixels at 66 degrees north reach 0.93.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox
from pyproj import Transformer
from rasterio.errors import NotGeoreferencedWarning
from rasterio.io import MemoryFile
from scipy import ndimage

from minecube.errors import ReleaseError
from minecube.files import replacing
from minecube.grid import PIXEL_DEG

FOLDER = "EuroMineNet"
_SLACK_M = 1.0  # the cube's grid follows edges, straight in degrees, only at sampled points
FULL, UNKNOWN = 250, 255
"""Values of `footprint_fraction`: fully covered, and unknown."""


def release_grid(year: Any) -> GeoBox:
    """Build the grid of a site and year from its row of `years` in an import."""
    return GeoBox(
        (int(year["height"]), int(year["width"])), Affine(*year["transform"]), year["crs"]
    )


def own_grid(grid: GeoBox) -> GeoBox:
    """Return the largest grid of the release's kind within the cube's grid.

    Use it for sites outside the release.
    """
    above, below, before, after = _edges(grid, "EPSG:4326")
    west, east, south, north = (
        before[:, 0].max(),
        after[:, 0].min(),
        below[:, 1].max(),
        above[:, 1].min(),
    )
    left, top = math.ceil(west / PIXEL_DEG), math.floor(north / PIXEL_DEG)
    shape = (top - math.ceil(south / PIXEL_DEG), math.floor(east / PIXEL_DEG) - left)
    return GeoBox(
        shape, Affine(PIXEL_DEG, 0, left * PIXEL_DEG, 0, -PIXEL_DEG, top * PIXEL_DEG), "EPSG:4326"
    )


def image_on(reflectance: xr.DataArray, grid: GeoBox) -> npt.NDArray[np.int16]:
    """Resample a year's reflectance bilinearly to another grid.

    Pixels with less than half of their weight observed become 0.

    Args:
        reflectance: uint16 [band, y, x], 0 = not observed, georeferenced like cubes.
        grid: The target grid.

    Returns:
        int16 [band, y, x], x 10000, 0 = not observed.

    Raises:
        ReleaseError: the grid extends beyond the cube.
    """
    there = reflectance.odc.geobox
    need_within(there, grid)
    at, out = _centres(grid, there), np.zeros((reflectance.sizes["band"], *grid.shape), np.int16)
    for band, into in zip(reflectance.values, out, strict=True):
        value, share = _between(band, band != 0, at)
        np.copyto(
            into,
            np.minimum(np.rint(value), np.iinfo(np.int16).max).astype(np.int16),
            where=share >= 0.5,
        )
    return out


def label_on(
    footprint: xr.DataArray, fraction: xr.DataArray | None, grid: GeoBox
) -> npt.NDArray[np.uint8] | None:
    """Resample a year's footprint to another grid.

    Args:
        footprint: uint8 [y, x], 1 mine, 0 not, 255 unknown.
        fraction: uint8 [y, x], share covered by mine x 250, 255 unknown. If given, the edge is at
            half coverage.
        grid: The target grid.

    Returns:
        uint8 [y, x], 255 mine, 0 not. None if any pixel is unknown.

    Raises:
        ReleaseError: the grid extends beyond the cube.
    """
    there = footprint.odc.geobox
    need_within(there, grid)
    at = _centres(grid, there)
    if fraction is None:
        nearest = ndimage.map_coordinates(footprint.values, at, order=0, mode="nearest")
        return None if (nearest == UNKNOWN).any() else (nearest * np.uint8(255)).astype(np.uint8)
    covered, share = _between(fraction.values, fraction.values != UNKNOWN, at)
    # At the edge of the mapped area one known neighbour is enough.
    return None if (share == 0).any() else np.where(covered >= FULL / 2, np.uint8(255), np.uint8(0))


def write(
    out: Path,
    site: str,
    year: int,
    image: npt.NDArray[np.int16],
    label: npt.NDArray[np.uint8] | None,
    grid: GeoBox,
) -> None:
    """Write a year of a site in the release's layout below `out`, replacing older files.

    Raises:
        ReleaseError: writing fails.
    """
    place = {"crs": str(grid.crs), "transform": grid.affine}
    _write(out / FOLDER / site / "image" / f"Year{year}.tif", image, place)
    path = out / FOLDER / site / "label" / f"Year{year}.tif"
    if label is not None:
        _write(path, label[None], {})
    else:
        path.unlink(missing_ok=True)  # from an earlier export of another cube


def iou(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> float:
    """Compute intersection over union of two labels; 1 if both are empty."""
    both, either = ((one > 0) & (other > 0)).sum(), ((one > 0) | (other > 0)).sum()
    return float(both / either) if either else 1.0


def need_within(cube: GeoBox, grid: GeoBox) -> None:
    """Raise ReleaseError if a grid extends beyond the cube: outside would be false zeros."""
    edges = np.concatenate(_edges(grid, str(cube.crs)))
    left, bottom, right, top = cube.boundingbox
    (west, south), (east, north) = edges.min(axis=0), edges.max(axis=0)
    if min(west - left, south - bottom, right - east, top - north) < -_SLACK_M:
        raise ReleaseError(
            f"the grid asked for ({west:.0f}, {south:.0f}, {east:.0f}, {north:.0f} in {cube.crs}) reaches beyond the cube's "
            f"({left:.0f}, {bottom:.0f}, {right:.0f}, {top:.0f}), where nothing is known: build the cube on the area that the "
            "import has of the site (--catalog FOLDER)"
        )


def _edges(grid: GeoBox, crs: str) -> tuple[npt.NDArray[np.float64], ...]:
    """Project points [n, 2] on the top, bottom, left and right edge of a grid."""
    height, width = grid.shape
    at = np.linspace(0, 1, 65)
    rows, columns = at * height, at * width
    transform = Transformer.from_crs(str(grid.crs), crs, always_xy=True).transform

    def moved(row: npt.ArrayLike, column: npt.ArrayLike) -> npt.NDArray[np.float64]:
        return np.stack(transform(*(grid.affine @ np.broadcast_arrays(column, row))), axis=-1)

    return (
        moved(0.0, columns),
        moved(float(height), columns),
        moved(rows, 0.0),
        moved(rows, float(width)),
    )


def _centres(grid: GeoBox, there: GeoBox) -> npt.NDArray[np.float64]:
    """Locate all pixel centres of a grid in another grid.

    Returns:
        row and column, [2, y, x]; integers at the other grid's pixel centres.
    """
    rows, columns = np.mgrid[: grid.shape[0], : grid.shape[1]] + 0.5
    transform = Transformer.from_crs(str(grid.crs), str(there.crs), always_xy=True).transform
    columns, rows = ~there.affine @ transform(*(grid.affine @ (columns, rows)))
    return np.stack([rows - 0.5, columns - 0.5])


def _between(
    values: npt.NDArray[Any], known: npt.NDArray[np.bool_], at: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Interpolate bilinearly between valid neighbours.

    GDAL's warp is avoided: at nearly equal pixel sizes it widens the kernel and blurs.

    Returns:
        the values, and the weight of the valid neighbours (0..1).
    """
    share = ndimage.map_coordinates(known.astype(np.float64), at, order=1, mode="nearest")
    total = ndimage.map_coordinates(
        np.where(known, values, 0).astype(np.float64), at, order=1, mode="nearest"
    )
    return total / np.where(share > 0, share, 1), share


def _write(path: Path, pixels: npt.NDArray[Any], place: dict[str, Any]) -> None:
    # Uncompressed: any loader can read it.
    profile = {"driver": "GTiff", "count": len(pixels), "dtype": pixels.dtype, **place}
    # Write to memory first: a full disk then raises OSError.
    with MemoryFile() as memory, warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # labels have none
        with memory.open(height=pixels.shape[1], width=pixels.shape[2], **profile) as image:
            image.write(pixels)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as part:
                part.write_bytes(memory.getbuffer())
        except OSError as error:
            raise ReleaseError(
                f"{path}: cannot be written ({error.strerror}); mend that and export again"
            ) from error
