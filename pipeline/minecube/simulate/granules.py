"""Cut an observation into the units of an archive: tiles and halves of split datatakes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import shapely
from odc.geo.geobox import GeoBox
from pyproj import Transformer
from scipy import ndimage
from shapely.geometry import box, mapping
from shapely.geometry.base import BaseGeometry
from shapely.geometry.polygon import orient

from minecube.arrays import AnyArray, Float64, Int16, UInt8
from minecube.grid import coarsen
from minecube.simulate.observe import NATIVE_M, Observation
from minecube.simulate.passes import SCL_M, Overpass, Tile, cut_swath, epsg_of, neighbour_is_west

_OVERLAP_PX = 3  # 20 m pixels; overlap of split halves on either side of the cut


@dataclass(frozen=True, kw_only=True)
class Granule:
    """One tile of one overpass, or a half of it."""

    tile: Tile
    overpass: Overpass
    part: int
    """0, or 1 for the southern half of a split datatake."""
    parts: int
    counts: dict[str, Int16]
    old_counts: dict[str, Int16]
    """Counts of the first processing; empty from the offset on."""
    scl: UInt8
    """0 without data in this granule; counts are meaningless there."""
    geometry: dict[str, Any]
    """GeoJSON of the area with data."""
    bbox: list[float]
    azimuth: float
    elevation: float
    share: Float64 = field(init=False)
    """Percent of the tile's pixels in each SCL class 0..11."""

    def __post_init__(self) -> None:
        counts = np.bincount(self.scl.ravel(), minlength=12)
        object.__setattr__(self, "share", counts * (100 / self.scl.size))

    def percent(self, value: int) -> float:
        """Return an SCL class's percentage: for 0 of the tile, for others of pixels with data."""
        total = 100.0
        if value != 0:
            total = max(100 - float(self.share[0]), 1e-9)
        return round(float(self.share[value]) * 100 / total, 6)

    @property
    def cloud_cover(self) -> float:
        """Percentage of pixels classified as cloud or thin cirrus by SCL."""
        return round(sum(self.percent(c) for c in (8, 9, 10)), 6)

    @property
    def sensed(self) -> datetime:
        """Sensing time, UTC."""
        return self.overpass.sensed + timedelta(seconds=9 * self.part)

    @property
    def strip_start(self) -> datetime:
        """Sensing start of the datastrip; it differs between halves of a split datatake."""
        return self.overpass.start + timedelta(minutes=5, seconds=33 + 14 * self.part)

    def layout(self, band: str) -> tuple[int, list[int], list[float]]:
        """Return pixel size in metres, shape and affine transform of the band's file."""
        size = NATIVE_M.get(band, SCL_M)
        grid = coarsen(self.tile.box, size)
        return size, list(grid.shape), list(grid.transform)[:6]


def cut_granules(
    observation: Observation, overpass: Overpass, tiles: list[Tile], grid: GeoBox, canvas: GeoBox
) -> Iterator[Granule]:
    """Yield the listed tiles of an overpass, in two granules if the datatake was split."""
    area = cut_swath(canvas, grid, overpass)
    parts = 1 + overpass.split
    for tile in list_tiles(tiles, overpass, grid):
        scl = fit_to_tile(observation.scl, tile, SCL_M)
        counts = _fit_bands(observation.counts, tile)
        old_counts = _fit_bands(observation.old_counts, tile)
        area_on_tile = _transform(area, epsg_of(grid), epsg_of(tile.box)).intersection(tile.area)
        for part in range(parts):
            rows = _cut_rows(tile, part, parts)
            inside = np.zeros_like(scl)
            inside[rows] = scl[rows]
            outline = _outline_rows(tile, area_on_tile, rows)
            yield Granule(
                tile=tile,
                overpass=overpass,
                part=part,
                parts=parts,
                counts=counts,
                old_counts=old_counts,
                scl=inside,
                geometry=mapping(outline),
                bbox=list(outline.bounds),
                azimuth=observation.azimuth,
                elevation=observation.elevation,
            )


def _fit_bands(counts: dict[str, Int16], tile: Tile) -> dict[str, Int16]:
    return {band: fit_to_tile(pixels, tile, NATIVE_M[band]) for band, pixels in counts.items()}


def _outline_rows(tile: Tile, area: BaseGeometry, rows: slice) -> BaseGeometry:
    """Return the area within rows of a tile, in longitude and latitude."""
    west, _, east, top = tile.box.extent.boundingbox.bbox
    strip = box(west, top - rows.stop * SCL_M, east, top - rows.start * SCL_M)
    shape = _transform(area.intersection(strip), epsg_of(tile.box), 4326)
    return orient(shapely.set_precision(shape, 1e-7))


def _transform(shape: BaseGeometry, source: int, target: int) -> BaseGeometry:
    """Transform a shape between two EPSG codes."""
    transformer = Transformer.from_crs(source, target, always_xy=True)
    return shapely.transform(shape, transformer.transform, interleaved=False)


def list_tiles(tiles: list[Tile], overpass: Overpass, grid: GeoBox) -> list[Tile]:
    """Return the tiles of an overpass in the catalogue."""
    west, east, neighbour = tiles
    listed = [west, east]
    if overpass.gap and neighbour_is_west(grid):
        listed = [east]
    elif overpass.gap:
        listed = [west]
    if overpass.neighbour:
        listed.append(neighbour)
    return listed


def fit_to_tile(pixels: AnyArray, tile: Tile, size_m: int) -> AnyArray:
    """Cut a tile from the site's simulated pixels, or warp them to the tile's zone.

    `pixels` [y, x] are of the whole site. Classes (uint8) take the nearest pixel, and 0 outside the
    site. Other types are interpolated bilinearly. Tiles of the site's zone differ in columns only.
    """
    if tile.warp is None:
        factor = size_m // 10
        return pixels[:, tile.cols.start // factor : tile.cols.stop // factor]
    options: dict[str, Any] = {"order": 1, "mode": "nearest"}
    if pixels.dtype == np.uint8:
        options = {"order": 0, "mode": "constant"}
    warped: AnyArray = ndimage.map_coordinates(pixels, tile.warp.from_canvas[size_m], **options)
    return warped


def _cut_rows(tile: Tile, part: int, parts: int) -> slice:
    """Return the rows of 20 m pixels with data; halves of a split datatake overlap."""
    n = tile.box.shape[0] // 2
    if parts == 1:
        return slice(0, n)
    if part == 0:
        return slice(0, n // 2 + _OVERLAP_PX)
    return slice(n // 2 - _OVERLAP_PX, n)
