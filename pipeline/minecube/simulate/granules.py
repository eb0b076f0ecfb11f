"""Cut an observation into the units of an archive: tiles and halves of split datatakes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from odc.geo.geobox import GeoBox
from pyproj import Transformer
from scipy import ndimage
from shapely.geometry import box, mapping
from shapely.geometry.polygon import orient

from minecube.catalog import SCL
from minecube.grid import at_resolution
from minecube.simulate.observe import NATIVE_M, Counts, Observation
from minecube.simulate.passes import SCL_M, Overpass, Tile, epsg, neighbour_is_west, swath
from minecube.simulate.sky import UInt8

_OVERLAP_PX = 3  # 20 m pixels; overlap of split halves on either side of the cut


@dataclass(frozen=True, kw_only=True)
class Granule:
    """One tile of one overpass, or a half of it."""

    tile: Tile
    overpass: Overpass
    part: int
    """0, or 1 for the southern half of a split datatake."""
    parts: int
    counts: dict[str, Counts]
    old_counts: dict[str, Counts]
    """Counts of the first processing; empty from the offset on."""
    scl: UInt8
    """0 without data in this granule; counts are meaningless there."""
    geometry: dict[str, Any]
    """GeoJSON of the area with data."""
    bbox: list[float]
    azimuth: float
    elevation: float
    share: npt.NDArray[np.float64] = field(init=False)
    """Percent of the tile's pixels in each SCL class 0..11."""

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "share", np.bincount(self.scl.ravel(), minlength=12) * (100 / self.scl.size)
        )

    def percent(self, value: int) -> float:
        """Return an SCL class's percentage: for 0 of the tile, for others of pixels with data."""
        of = 100.0 if value == 0 else max(100 - float(self.share[0]), 1e-9)
        return round(float(self.share[value]) * 100 / of, 6)

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
        size = SCL_M if band == SCL else NATIVE_M[band]
        where = at_resolution(self.tile.box, size)
        return size, list(where.shape), list(where.transform)[:6]


def granules(
    seen: Observation, overpass: Overpass, tiles: list[Tile], grid: GeoBox, canvas: GeoBox
) -> Iterator[Granule]:
    """Yield the listed tiles of an overpass, in two granules if the datatake was split."""
    area = swath(canvas, grid, overpass)
    parts = 2 if overpass.split else 1
    for tile in listed(tiles, overpass, grid):
        scl = on_tile(seen.scl, tile, SCL_M)
        counts = {b: on_tile(c, tile, NATIVE_M[b]) for b, c in seen.counts.items()}
        old_counts = {b: on_tile(c, tile, NATIVE_M[b]) for b, c in seen.old_counts.items()}
        there = Transformer.from_crs(epsg(grid), epsg(tile.box), always_xy=True)
        in_tile = shapely.transform(area, there.transform, interleaved=False).intersection(
            tile.area
        )
        to_lonlat = Transformer.from_crs(epsg(tile.box), 4326, always_xy=True)
        for part in range(parts):
            rows = _rows(tile, part, parts)
            inside = np.zeros_like(scl)
            inside[rows] = scl[rows]
            west, _, east, top = tile.box.extent.boundingbox.bbox
            strip = box(west, top - rows.stop * SCL_M, east, top - rows.start * SCL_M)
            shape = shapely.transform(
                in_tile.intersection(strip), to_lonlat.transform, interleaved=False
            )
            shape = orient(shapely.set_precision(shape, 1e-7))
            yield Granule(
                tile=tile,
                overpass=overpass,
                part=part,
                parts=parts,
                counts=counts,
                old_counts=old_counts,
                scl=inside,
                geometry=mapping(shape),
                bbox=list(shape.bounds),
                azimuth=seen.azimuth,
                elevation=seen.elevation,
            )


def listed(tiles: list[Tile], overpass: Overpass, grid: GeoBox) -> list[Tile]:
    """Return the tiles of an overpass in the catalogue."""
    west, east, neighbour = tiles
    own = [west, east]
    if overpass.gap:
        own.remove(west if neighbour_is_west(grid) else east)
    return own + ([neighbour] if overpass.neighbour else [])


def on_tile(pixels: npt.NDArray[Any], tile: Tile, size_m: int) -> npt.NDArray[Any]:
    """Return canvas pixels of one size [y, x] on a tile: cropped, or warped to another zone.

    Counts are interpolated bilinearly. Classes (uint8) take the nearest pixel, 0 outside the
    canvas.
    """
    if tile.warp is not None:
        classes = pixels.dtype == np.uint8
        how = {"order": 0, "mode": "constant"} if classes else {"order": 1, "mode": "nearest"}
        onto: npt.NDArray[Any] = ndimage.map_coordinates(
            pixels, tile.warp.from_canvas[size_m], **how
        )
        return onto
    step = size_m // 10
    return pixels[:, tile.cols.start // step : tile.cols.stop // step]


def _rows(tile: Tile, part: int, parts: int) -> slice:
    """Return the rows of 20 m pixels with data; halves of a split datatake overlap."""
    n = tile.box.shape[0] // 2
    if parts == 1:
        return slice(0, n)
    return slice(0, n // 2 + _OVERLAP_PX) if part == 0 else slice(n // 2 - _OVERLAP_PX, n)
