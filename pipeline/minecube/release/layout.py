"""Cubes in the published layout, on the published grid: what loaders written for the release run on unchanged.

    EuroMineNet/Germany_1/image/Year2015.tif   int16, ten bands, EPSG:4326
    EuroMineNet/Germany_1/label/Year2015.tif   uint8, 0 or 255, the same pixels, no CRS

A label goes back to where it came from through the covered fraction. A mask of 10 m pixels, sampled at pixels of 10 m by 6, has
lost up to a pixel along every edge (IoU 0.95 to 0.98); the fraction, between four pixels' centres, knows where in them the edge
lies (0.997 and better). A region of a few pixels is lost in part all the same: 4 x 4 of them at 66 degrees north have 0.93.
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
_SLACK_M = 1.0  # an edge that is straight in degrees was followed from point to point when the cube's grid was made
FULL, UNKNOWN = 250, 255
"""Of `footprint_fraction`: all of the pixel, and not known."""


def release_grid(year: Any) -> GeoBox:
    """The grid of a site and year of an import, from its row of `years`."""
    return GeoBox((int(year["height"]), int(year["width"])), Affine(*year["transform"]), year["crs"])


def own_grid(grid: GeoBox) -> GeoBox:
    """A grid as the release has them, of what no release has: the largest that lies within the cube's."""
    above, below, before, after = _edges(grid, "EPSG:4326")
    west, east, south, north = before[:, 0].max(), after[:, 0].min(), below[:, 1].max(), above[:, 1].min()
    left, top = math.ceil(west / PIXEL_DEG), math.floor(north / PIXEL_DEG)
    shape = (top - math.ceil(south / PIXEL_DEG), math.floor(east / PIXEL_DEG) - left)
    return GeoBox(shape, Affine(PIXEL_DEG, 0, left * PIXEL_DEG, 0, -PIXEL_DEG, top * PIXEL_DEG), "EPSG:4326")


def image_on(reflectance: xr.DataArray, grid: GeoBox) -> npt.NDArray[np.int16]:
    """A year's reflectance on another grid: int16 [band, y, x], x 10000, 0 = not observed; between pixels' centres, bilinear.

    Args:
        reflectance: uint16 [band, y, x], 0 = not observed, georeferenced as cubes are.
        grid: where it goes.

    Raises:
        ReleaseError: the grid reaches beyond the cube.
    """
    there = reflectance.odc.geobox
    need_within(there, grid)
    at, out = _centres(grid, there), np.zeros((reflectance.sizes["band"], *grid.shape), np.int16)
    for band, into in zip(reflectance.values, out, strict=True):
        value, share = _between(band, band != 0, at)
        np.copyto(into, np.minimum(np.rint(value), np.iinfo(np.int16).max).astype(np.int16), where=share >= 0.5)
    return out


def label_on(footprint: xr.DataArray, fraction: xr.DataArray | None, grid: GeoBox) -> npt.NDArray[np.uint8] | None:
    """A year's footprint on another grid: uint8 [y, x], 255 mine, 0 not; None where some of it is unknown.

    Args:
        footprint: uint8 [y, x], 1 mine, 0 not, 255 unknown.
        fraction: uint8 [y, x], covered by mine, x 250, 255 unknown; where given, the edge lies where half is covered.
        grid: where it goes.

    Raises:
        ReleaseError: the grid reaches beyond the cube.
    """
    there = footprint.odc.geobox
    need_within(there, grid)
    at = _centres(grid, there)
    if fraction is None:
        nearest = ndimage.map_coordinates(footprint.values, at, order=0, mode="nearest")
        return None if (nearest == UNKNOWN).any() else (nearest * np.uint8(255)).astype(np.uint8)
    covered, share = _between(fraction.values, fraction.values != UNKNOWN, at)
    # Of a pixel at the edge of what was mapped, the neighbours beyond are unknown.
    return None if (share == 0).any() else np.where(covered >= FULL / 2, np.uint8(255), np.uint8(0))


def write(
    out: Path, site: str, year: int, image: npt.NDArray[np.int16], label: npt.NDArray[np.uint8] | None, grid: GeoBox
) -> None:
    """A year of a site in the release's layout below `out`, in place of what is there; raises ReleaseError if it cannot be."""
    place = {"crs": str(grid.crs), "transform": grid.affine}
    _write(out / FOLDER / site / "image" / f"Year{year}.tif", image, place)
    path = out / FOLDER / site / "label" / f"Year{year}.tif"
    if label is not None:
        _write(path, label[None], {})
    else:
        path.unlink(missing_ok=True)  # of an earlier export: it is of another cube than the image beside it


def iou(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> float:
    """Intersection over union of two labels; 1 where both are empty."""
    both, either = ((one > 0) & (other > 0)).sum(), ((one > 0) | (other > 0)).sum()
    return float(both / either) if either else 1.0


def need_within(cube: GeoBox, grid: GeoBox) -> None:
    """Raises ReleaseError where a grid reaches beyond the cube: what is there would be a false zero."""
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
    """Points [n, 2] along the top, bottom, left and right edge of a grid, in another CRS."""
    height, width = grid.shape
    at = np.linspace(0, 1, 65)
    rows, columns = at * height, at * width
    transform = Transformer.from_crs(str(grid.crs), crs, always_xy=True).transform

    def moved(row: npt.ArrayLike, column: npt.ArrayLike) -> npt.NDArray[np.float64]:
        return np.stack(transform(*(grid.affine @ np.broadcast_arrays(column, row))), axis=-1)

    return moved(0.0, columns), moved(float(height), columns), moved(rows, 0.0), moved(rows, float(width))


def _centres(grid: GeoBox, there: GeoBox) -> npt.NDArray[np.float64]:
    """Of all pixel centres of a grid, row and column in another: [2, y, x], whole at that one's pixel centres."""
    rows, columns = np.mgrid[: grid.shape[0], : grid.shape[1]] + 0.5
    transform = Transformer.from_crs(str(grid.crs), str(there.crs), always_xy=True).transform
    columns, rows = ~there.affine @ transform(*(grid.affine @ (columns, rows)))
    return np.stack([rows - 0.5, columns - 0.5])


def _between(
    values: npt.NDArray[Any], known: npt.NDArray[np.bool_], at: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Bilinear between those of the four neighbours that are known, and what share of the weight these have.

    Not GDAL's warp: where pixels are all but of one size it widens the kernel, and blurs.
    """
    share = ndimage.map_coordinates(known.astype(np.float64), at, order=1, mode="nearest")
    total = ndimage.map_coordinates(np.where(known, values, 0).astype(np.float64), at, order=1, mode="nearest")
    return total / np.where(share > 0, share, 1), share


def _write(path: Path, pixels: npt.NDArray[Any], place: dict[str, Any]) -> None:
    profile = {"driver": "GTiff", "count": len(pixels), "dtype": pixels.dtype, **place}  # not packed: any loader reads it
    # In memory first: a disk that is full is then Python's OSError.
    with MemoryFile() as memory, warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # labels have no place, as published
        with memory.open(height=pixels.shape[1], width=pixels.shape[2], **profile) as image:
            image.write(pixels)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as part:
                part.write_bytes(memory.getbuffer())
        except OSError as error:
            raise ReleaseError(f"{path}: cannot be written ({error.strerror}); mend that and export again") from error
