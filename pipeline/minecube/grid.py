"""One site, one grid: its UTM zone, 10 m pixels, corners on multiples of 60 m.

60 m is the coarsest Sentinel-2 pixel and tile corners are multiples of it, so scenes of the same zone fall on the grid
at 10, 20 and 60 m without resampling (Sentinel-2 Products Specification Document, issue 14.9, section 3.2).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import pyproj
import shapely
from affine import Affine
from odc.geo import CRS, BoundingBox, Geometry
from odc.geo.geobox import GeoBox
from shapely.geometry.base import BaseGeometry

from minecube.catalog import Site
from minecube.errors import CatalogError

PIXEL_M = 10
ALIGN_M = 60  # coarsest native pixel
LARGEST_PX = 100_000
PIXEL_DEG = 10 / 111319.490793
"""Ten metres on the equator, in degrees: pixels of images exported to EPSG:4326 at a scale of 10 m, as EuroMineNet's were."""
Block = tuple[slice, slice]


@functools.lru_cache(1024)
def grid_of(site: Site) -> GeoBox:
    """The site's grid: UTM zone of its centroid, 10 m, its box and margin grown outward to multiples of 60 m.

    Raises:
        CatalogError: the site has no area of interest, or one that no UTM zone holds.
    """
    if site.geometry is None:
        raise CatalogError(
            f"site {site.id!r} has no area of interest yet (geometry is null), so it has no grid: "
            "give its polygon in a file of your own (--sites FILE)"
        )
    lonlat = Geometry(site.geometry, "EPSG:4326")
    if not (-80 <= site.geometry.centroid.y <= 84):
        raise CatalogError(
            f"site {site.id!r} lies at latitude {site.geometry.centroid.y:.2f}; UTM, and with it the grid, spans -80..84"
        )
    crs = _zone_of(site.geometry) or CRS.utm(lonlat)
    box = lonlat.to_crs(crs, resolution=0.01).boundingbox.buffered(site.margin)
    grid = _aligned(box, crs)
    if max(grid.shape) > LARGEST_PX:
        raise CatalogError(
            f"site {site.id!r} is {grid.shape[1]} x {grid.shape[0]} pixels of {PIXEL_M} m; expected at most {LARGEST_PX} a "
            "side, since farther from its meridian a UTM zone is no map any more: split it"
        )
    return grid


def _zone_of(shape: BaseGeometry) -> CRS | None:
    """The UTM zone that a shape lies inside; None at a border: a look-up in PROJ's database takes a tenth of a second."""
    west, south, east, north = shape.bounds
    zone = math.ceil((west + 180) / 6)
    inside = 6 * zone - 186 < west and east < 6 * zone - 180
    if not inside or not (south > 0 or north < 0):
        return None
    return CRS(f"EPSG:{(32600 if south > 0 else 32700) + zone}")


def _aligned(box: BoundingBox, crs: CRS) -> GeoBox:
    # Half a millimetre of tolerance: a corner that is on 60 m before a round trip through degrees stays there.
    eps = 0.0005
    left, bottom = (int((v + eps) // ALIGN_M) * ALIGN_M for v in (box.left, box.bottom))
    right, top = (-int((-v + eps) // ALIGN_M) * ALIGN_M for v in (box.right, box.top))
    return GeoBox(((top - bottom) // PIXEL_M, (right - left) // PIXEL_M), Affine(PIXEL_M, 0, left, 0, -PIXEL_M, top), crs)


def at_resolution(grid: GeoBox, resolution_m: int) -> GeoBox:
    """The same extent with pixels of `resolution_m` (10, 20 or 60), sharing the grid's upper left corner."""
    return grid if resolution_m == PIXEL_M else grid.zoom_out(resolution_m / PIXEL_M)


def padded(grid: GeoBox, margin_m: int) -> GeoBox:
    """The grid grown on all four sides by `margin_m` (a multiple of 60), so that neighbourhoods at its edge are whole."""
    return grid.pad(margin_m // PIXEL_M)


def blocks(grid: GeoBox, size_px: int) -> Iterator[Block]:
    """The (y, x) slices that tile the grid, `size_px` a side, row by row; the last ones are shorter."""
    height, width = grid.shape
    for y in range(0, height, size_px):
        for x in range(0, width, size_px):
            yield slice(y, min(y + size_px, height)), slice(x, min(x + size_px, width))


def equal_area_crs(grid: GeoBox) -> pyproj.CRS:
    """The projection in which areas are stated: ETRS89-LAEA (EPSG:3035) in Europe, else Lambert's centred on the site."""
    lon, lat = grid.geographic_extent.centroid.coords[0]
    if -25 <= lon <= 45 and 33 <= lat <= 72:  # EPSG:3035's area of use, the Atlantic islands left out
        return pyproj.CRS.from_epsg(3035)
    return pyproj.CRS.from_proj4(f"+proj=laea +lat_0={lat:.4f} +lon_0={lon:.4f} +datum=WGS84 +units=m")


def area_of(grid: GeoBox) -> BaseGeometry:
    """The grid's extent in longitude and latitude, cut at the antimeridian."""
    return split_at_antimeridian(grid.geographic_extent.geom)


def footprint_of(shape: BaseGeometry | None) -> BaseGeometry:
    """The polygons of a footprint in longitude and latitude, in two dimensions and valid, cut at the antimeridian.

    Other parts, such as the lines of a geometry collection, have no area and are left out. Empty if there is no polygon, or
    if the coordinates are no degrees.
    """
    if shape is None or shape.is_empty or not _in_degrees(shape):
        return shapely.Polygon()
    if shape.geom_type not in ("Polygon", "MultiPolygon") or shape.has_z or not shape.is_valid:
        shape = shapely.union_all(_polygons(shapely.make_valid(shapely.force_2d(shape))))
    return shape if shape.is_empty else split_at_antimeridian(shape)


def _in_degrees(shape: BaseGeometry) -> bool:
    longitude, latitude = shapely.get_coordinates(shape).T
    return bool((abs(longitude) <= 360).all() and (abs(latitude) <= 90).all())  # NaN is neither


def _polygons(shape: BaseGeometry) -> list[BaseGeometry]:
    """All polygons in a geometry, also in collections of collections."""
    if shape.geom_type == "Polygon":
        return [shape]
    return [polygon for part in getattr(shape, "geoms", ()) for polygon in _polygons(part)]


def split_at_antimeridian(shape: BaseGeometry) -> BaseGeometry:
    """The footprint as GeoJSON has it (RFC 7946, 3.1.9): cut at 180 degrees where it spans half the world otherwise."""
    west, _, east, _ = shape.bounds
    inside = west >= -180 and east <= 180  # some footprints go on beyond 180 degrees instead
    if inside and east - west <= 180:
        return shape
    # A footprint that is cut already has a part on either side and stays as it is.
    parts = shapely.get_parts(shape)
    if inside and all(p.bounds[2] - p.bounds[0] <= 180 for p in parts):
        return shape

    def eastward(x: Any, y: Any) -> tuple[Any, Any]:
        return x + 360 * (x < 0), y

    whole = shapely.transform(shape, eastward, interleaved=False)
    left = whole.intersection(shapely.box(0, -90, 180, 90))
    right = shapely.transform(whole.intersection(shapely.box(180, -90, 360, 90)), lambda x, y: (x - 360, y), interleaved=False)
    pieces = [p for half in (left, right) for p in shapely.get_parts(half) if p.area > 0]
    return shapely.MultiPolygon(pieces)
