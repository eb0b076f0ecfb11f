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
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox
from pyproj import Transformer
from rasterio.errors import NotGeoreferencedWarning
from rasterio.io import MemoryFile
from scipy import ndimage

from minecube.arrays import AnyArray, Bool, Float64, Int16, UInt8
from minecube.codes import HALF, MINE, UNKNOWN
from minecube.errors import ReleaseError
from minecube.files import replacing
from minecube.grid import PIXEL_DEG
from minecube.release.sites import ARCHIVE_MINE

FOLDER = "EuroMineNet"
_SLACK_M = 1.0  # the cube's grid follows edges, straight in degrees, only at sampled points
_EDGE_POINTS = 65


def read_release_grid(year: Any) -> GeoBox:
    """Build the grid of a site and year from its row of `years` in an import."""
    shape = (int(year["height"]), int(year["width"]))
    return GeoBox(shape, Affine(*year["transform"]), year["crs"])


def make_release_grid(grid: GeoBox) -> GeoBox:
    """Return the largest grid of the release's kind within the cube's grid.

    Use it for sites outside the release.
    """
    north_edge, south_edge, west_edge, east_edge = _project_edges(grid, "EPSG:4326")
    first_column = math.ceil(west_edge[:, 0].max() / PIXEL_DEG)
    last_column = math.floor(east_edge[:, 0].min() / PIXEL_DEG)
    # Rows are counted from the equator, northward.
    first_row = math.floor(north_edge[:, 1].min() / PIXEL_DEG)
    last_row = math.ceil(south_edge[:, 1].max() / PIXEL_DEG)
    west = first_column * PIXEL_DEG
    north = first_row * PIXEL_DEG
    return GeoBox(
        (first_row - last_row, last_column - first_column),
        Affine(PIXEL_DEG, 0, west, 0, -PIXEL_DEG, north),
        "EPSG:4326",
    )


def resample_image(reflectance: xr.DataArray, grid: GeoBox) -> Int16:
    """Resample a year's reflectance bilinearly to another grid.

    Pixels with less than half of their weight observed become 0. Reflectance is uint16 [band, y, x],
    0 = not observed, georeferenced like cubes. The result is int16 [band, y, x], reflectance x 10000,
    0 = not observed.

    Raises:
        ReleaseError: the grid extends beyond the cube.
    """
    cube_grid = reflectance.odc.geobox
    need_within(cube_grid, grid)
    positions = _locate_centres(grid, cube_grid)
    image = np.zeros((reflectance.sizes["band"], *grid.shape), np.int16)
    for source, target in zip(reflectance.values, image, strict=True):
        values, weight = _interpolate(source, source != 0, positions)
        limited = np.minimum(np.rint(values), np.iinfo(np.int16).max)
        np.copyto(target, limited.astype(np.int16), where=weight >= 0.5)
    return image


def resample_label(
    footprint: xr.DataArray, fraction: xr.DataArray | None, grid: GeoBox
) -> UInt8 | None:
    """Resample a year's footprint to another grid.

    Args:
        footprint: uint8 [y, x], 1 mine, 0 not, 255 unknown.
        fraction: uint8 [y, x], share covered by mine x 250, 255 unknown. If given, the edge is at
            half coverage.

    Returns:
        uint8 [y, x], 255 mine, 0 not. None if any pixel is unknown.

    Raises:
        ReleaseError: the grid extends beyond the cube.
    """
    cube_grid = footprint.odc.geobox
    need_within(cube_grid, grid)
    positions = _locate_centres(grid, cube_grid)
    if fraction is None:
        nearest = ndimage.map_coordinates(footprint.values, positions, order=0, mode="nearest")
        is_unknown = nearest == UNKNOWN
        is_mine = nearest == MINE
    else:
        share, weight = _interpolate(fraction.values, fraction.values != UNKNOWN, positions)
        # At the edge of the mapped area one known neighbour is enough.
        is_unknown = weight == 0
        is_mine = share >= HALF
    if is_unknown.any():
        return None
    return np.where(is_mine, np.uint8(ARCHIVE_MINE), np.uint8(0))


def write_site_year(
    out: Path, site: str, year: int, image: Int16, label: UInt8 | None, grid: GeoBox
) -> None:
    """Write a year of a site in the release's layout below `out`, replacing older files.

    Raises:
        ReleaseError: writing fails.
    """
    folder = out / FOLDER / site
    georeference = {"crs": str(grid.crs), "transform": grid.affine}
    _write_tiff(folder / "image" / f"Year{year}.tif", image, georeference)
    label_path = folder / "label" / f"Year{year}.tif"
    if label is not None:
        _write_tiff(label_path, label[None], {})
    else:
        label_path.unlink(missing_ok=True)  # from an earlier export of another cube


def compute_iou(label: UInt8, other_label: UInt8) -> float:
    """Compute intersection over union of two labels; 1 if both are empty."""
    intersection = ((label > 0) & (other_label > 0)).sum()
    union = ((label > 0) | (other_label > 0)).sum()
    if not union:
        return 1.0
    return float(intersection / union)


def need_within(cube: GeoBox, grid: GeoBox) -> None:
    """Raise ReleaseError if a grid extends beyond the cube: outside would be false zeros."""
    edges = np.concatenate(_project_edges(grid, str(cube.crs)))
    west, south = edges.min(axis=0)
    east, north = edges.max(axis=0)
    cube_west, cube_south, cube_east, cube_north = cube.boundingbox
    if min(west - cube_west, south - cube_south, cube_east - east, cube_north - north) < -_SLACK_M:
        raise ReleaseError(
            f"the grid ({west:.0f}, {south:.0f}, {east:.0f}, {north:.0f} in EPSG:{cube.crs.epsg}) "
            "reaches beyond the cube "
            f"({cube_west:.0f}, {cube_south:.0f}, {cube_east:.0f}, {cube_north:.0f}); "
            "build the cube on the import's area of the site (--catalog FOLDER)"
        )


def _project_edges(grid: GeoBox, crs: str) -> tuple[Float64, Float64, Float64, Float64]:
    """Project points [n, 2] on the top, bottom, left and right edge of a grid."""
    height, width = grid.shape
    rows = np.linspace(0, 1, _EDGE_POINTS) * height
    columns = np.linspace(0, 1, _EDGE_POINTS) * width
    transform = Transformer.from_crs(str(grid.crs), crs, always_xy=True).transform

    def project(row: float | Float64, column: float | Float64) -> Float64:
        return np.stack(transform(*(grid.affine @ np.broadcast_arrays(column, row))), axis=-1)

    return (
        project(0.0, columns),
        project(float(height), columns),
        project(rows, 0.0),
        project(rows, float(width)),
    )


def _locate_centres(grid: GeoBox, cube_grid: GeoBox) -> Float64:
    """Locate all pixel centres of a grid in the cube's grid.

    Returns:
        row and column, [2, y, x]; integers at the cube's pixel centres.
    """
    rows, columns = np.mgrid[: grid.shape[0], : grid.shape[1]] + 0.5
    transform = Transformer.from_crs(str(grid.crs), str(cube_grid.crs), always_xy=True).transform
    cube_columns, cube_rows = ~cube_grid.affine @ transform(*(grid.affine @ (columns, rows)))
    return np.stack([cube_rows - 0.5, cube_columns - 0.5])


def _interpolate(values: AnyArray, is_valid: Bool, positions: Float64) -> tuple[Float64, Float64]:
    """Interpolate bilinearly between valid neighbours.

    GDAL's warp is avoided: at nearly equal pixel sizes it widens the kernel and blurs.

    Returns:
        the values, and the weight of the valid neighbours (0..1).
    """
    weight = ndimage.map_coordinates(
        is_valid.astype(np.float64), positions, order=1, mode="nearest"
    )
    total = ndimage.map_coordinates(
        np.where(is_valid, values, 0).astype(np.float64), positions, order=1, mode="nearest"
    )
    return total / np.where(weight > 0, weight, 1), weight


def _write_tiff(path: Path, pixels: AnyArray, georeference: dict[str, Any]) -> None:
    count, height, width = pixels.shape
    # Write to memory first: a full disk then raises OSError.
    with MemoryFile() as memory, warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # labels have none
        # Uncompressed: any loader can read it.
        with memory.open(
            driver="GTiff",
            count=count,
            height=height,
            width=width,
            dtype=pixels.dtype,
            **georeference,
        ) as image:
            image.write(pixels)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as draft:
                draft.write_bytes(memory.getbuffer())
        except OSError as error:
            raise ReleaseError(
                f"{path}: cannot be written ({error.strerror}); fix that and export again"
            ) from error
