"""Define one grid per site: its UTM zone, 10 m pixels, corners on multiples of 60 m.

The coarsest Sentinel-2 pixel is 60 m, and tile corners are multiples of 60 m. Scenes of the same
zone therefore fit the grid at 10, 20 and 60 m without resampling (Sentinel-2 Products Specification
Document, issue 14.9, section 3.2).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import pyproj
import shapely
from affine import Affine
from odc.geo import CRS, BoundingBox
from odc.geo.geobox import GeoBox
from odc.geo.geom import Geometry
from shapely.geometry.base import BaseGeometry

from minecube.arrays import AnyArray, IntP
from minecube.catalog import Site
from minecube.errors import CatalogError
from minecube.vectors import extract_polygons

PIXEL_M = 10
ALIGN_M = 60  # coarsest native pixel
LARGEST_PX = 100_000
WINDOW_PX = 510
"""Side of the windows of `choose_windows`: the largest multiple of 60 m in a tile of 512 pixels."""
CELL_PX = 1500
"""Least side of the cells with one window each, for looks at scenes (`minecube.scenes.looks`).

With smaller cells, the checks would take more than 5 % of a build's bytes."""
_FOOTPRINT_M = 1000
"""Accuracy of published footprints."""
PIXEL_DEG = 10 / 111319.490793
"""Ten metres on the equator in degrees: the pixel of exports to EPSG:4326 at 10 m, as
EuroMineNet's."""
_SCL_PX = 2  # side of a pixel of SCL, in pixels of 10 m
BlockSlices = tuple[slice, slice]

_LONLAT = CRS("EPSG:4326")
_STEP_DEG = 0.01
"""Longest side of a polygon between two vertices that are projected."""
_UTM_LIMITS = (-80, 84)
"""Southernmost and northernmost latitude."""
_UTM_CODES = np.array([*range(32601, 32661), *range(32701, 32761)])
_UTM_WEST = np.tile(np.arange(-180.0, 180.0, 6.0), 2)
_UTM_WEST[_UTM_CODES == 32629] = -12.01  # as in EPSG's area of use, which begins 0.01 early
_UTM_EAST = np.tile(np.arange(-174.0, 181.0, 6.0), 2)
_UTM_SOUTH = np.repeat([0.0, -80.0], 60)
_UTM_NORTH = np.repeat([84.0, 0.0], 60)


@functools.lru_cache(1024)
def grid_of(site: Site) -> GeoBox:
    """Return the site's grid, in the UTM zone of its centroid with 10 m pixels.

    The site's box and margin grow outward to multiples of 60 m.

    Raises:
        CatalogError: the site has no area of interest, lies outside UTM, or is too large.
    """
    if site.geometry is None:
        raise CatalogError(
            f"site {site.id!r} has no area of interest yet (geometry is null), so it has no grid: "
            "give its polygon in a file of your own (--sites FILE)"
        )
    if not (_UTM_LIMITS[0] <= site.geometry.centroid.y <= _UTM_LIMITS[1]):
        raise CatalogError(
            f"site {site.id!r} lies at latitude {site.geometry.centroid.y:.2f}; "
            "UTM, and with it the grid, spans -80..84"
        )
    crs = CRS(f"EPSG:{_zones_of(np.array([site.geometry]))[0]}")
    return _make_grid(site, project_bounds(site.geometry, crs))


def grids_of(sites: Iterable[Site]) -> dict[str, GeoBox]:
    """Return the grids of many sites by name. Sites for which `grid_of` raises are left out.

    It takes a third of the time of `grid_of` for each, since whole zones are projected at once.
    """
    placed = [site for site in sites if site.geometry is not None]
    shapes = np.array([site.geometry for site in placed], dtype=object)
    latitudes = shapely.get_y(shapely.centroid(shapes))
    is_in_utm = (latitudes >= _UTM_LIMITS[0]) & (latitudes <= _UTM_LIMITS[1])
    zones = _zones_of(shapes)
    grids = {}
    for zone in np.unique(zones[is_in_utm]):
        rows = np.flatnonzero(is_in_utm & (zones == zone))
        crs = CRS(f"EPSG:{zone}")
        for row, box in zip(rows, _project_all_bounds(shapes[rows], crs), strict=True):
            site = placed[row]
            with suppress(CatalogError):  # too large
                grids[site.id] = _make_grid(site, BoundingBox(*box, crs))
    return grids


def _make_grid(site: Site, box: BoundingBox) -> GeoBox:
    """Make the grid of a projected box. Raises CatalogError if it is too large."""
    expected = f"expected at most {LARGEST_PX} per side, within one UTM zone; split the site"
    if not np.isfinite(box.bbox).all():
        raise CatalogError(f"site {site.id!r} has points that its UTM zone cannot show; {expected}")
    grid = _aligned(box.buffered(site.margin), box.crs)
    if max(grid.shape) > LARGEST_PX:
        raise CatalogError(
            f"site {site.id!r} is {grid.shape[1]} x {grid.shape[0]} pixels of {PIXEL_M} m; {expected}"
        )
    return grid


def _zones_of(shapes: AnyArray) -> IntP:
    """Return the EPSG code of the UTM zone with the largest part of each shape's box.

    It is the zone of `odc.geo.CRS.utm`, which takes 60 ms to query PROJ's database. EPSG's zones
    have no exceptions for Norway and Svalbard.
    """
    west, south, east, north = shapely.bounds(shapes).T[..., np.newaxis]
    width = np.minimum(_UTM_EAST, east) - np.maximum(_UTM_WEST, west)
    height = np.minimum(_UTM_NORTH, north) - np.maximum(_UTM_SOUTH, south)
    areas = width.clip(min=0) * height.clip(min=0)
    codes: IntP = _UTM_CODES[areas.argmax(axis=1)]
    return codes


def project_bounds(shape: BaseGeometry, crs: CRS) -> BoundingBox:
    """Return the bounds of polygons in longitude and latitude in another CRS.

    They equal those of `odc.geo.Geometry.to_crs(crs, resolution=0.01)` to the last digit. That takes
    three times as long, since it makes an object per vertex.
    """
    (box,) = _project_all_bounds(np.array([shape]), crs)
    return BoundingBox(*box, crs)


def _project_all_bounds(shapes: AnyArray, crs: CRS) -> list[list[float]]:
    """Return `project_bounds` of each shape: west, south, east, north."""
    parts, shape = shapely.get_parts(shapes, return_index=True)
    rings = shapely.get_exterior_ring(parts)
    points, ring = shapely.get_coordinates(rings, return_index=True)
    sides = shapely.linestrings(np.stack([points[:-1], points[1:]], axis=1))
    lengths = shapely.length(sides)
    is_side = ring[:-1] == ring[1:]
    # odc-geo adds no vertices to sides this close to the meridian of Greenwich.
    is_at_zero = points[:-1, 0] ** 2 + points[1:, 0] ** 2 < _STEP_DEG**2
    lengths[~is_side | is_at_zero] = 0.0
    steps = np.full(int(lengths.max(initial=0) / _STEP_DEG) + 1, _STEP_DEG).cumsum()
    added = steps.searchsorted(lengths)  # number of vertices along each side
    side = np.repeat(np.arange(len(sides)), added)
    step = np.arange(len(side)) - np.repeat(added.cumsum() - added, added)
    vertices = shapely.line_interpolate_point(sides[side], steps[step])
    longitude, latitude = np.vstack([points, shapely.get_coordinates(vertices)]).T
    x, y = _LONLAT.transformer_to_crs(crs)(longitude, latitude)
    shape_of_point = np.concatenate([shape[ring], shape[ring[side]]])
    boxes = np.empty((len(shapes), 4))
    for column, (pick, values) in enumerate(
        [(np.minimum, x), (np.minimum, y), (np.maximum, x), (np.maximum, y)]
    ):
        boxes[:, column] = np.inf if pick is np.minimum else -np.inf
        pick.at(boxes[:, column], shape_of_point, values)
    return boxes.tolist()


def _aligned(box: BoundingBox, crs: CRS) -> GeoBox:
    # Half a millimetre of tolerance keeps a corner on 60 m after a round trip through degrees.
    eps = 0.0005
    west, south = (int((v + eps) // ALIGN_M) * ALIGN_M for v in (box.left, box.bottom))
    east, north = (-int((-v + eps) // ALIGN_M) * ALIGN_M for v in (box.right, box.top))
    return GeoBox(
        ((north - south) // PIXEL_M, (east - west) // PIXEL_M),
        Affine(PIXEL_M, 0, west, 0, -PIXEL_M, north),
        crs,
    )


def coarsen(grid: GeoBox, resolution_m: int) -> GeoBox:
    """Return the same extent at `resolution_m` (10, 20 or 60), with the same upper left corner."""
    if resolution_m == PIXEL_M:
        return grid
    return grid.zoom_out(resolution_m / PIXEL_M)


def pad(grid: GeoBox, margin_m: int) -> GeoBox:
    """Grow the grid on all sides by `margin_m` (a multiple of 60), for whole neighbourhoods."""
    return grid.pad(margin_m // PIXEL_M)


def iterate_blocks(grid: GeoBox, size_px: int) -> Iterator[BlockSlices]:
    """Yield (y, x) slices of tiles, row by row. Tiles have `size_px` a side, the last ones less."""
    height, width = grid.shape
    for y in range(0, height, size_px):
        for x in range(0, width, size_px):
            yield slice(y, min(y + size_px, height)), slice(x, min(x + size_px, width))


class TileEdges(NamedTuple):
    """Edges of a file's tiles along one side of a grid, in pixels of the grid."""

    start: float
    """The file's first edge; negative before the grid."""
    stop: float
    """The file's last edge."""
    step: float
    """Side of a tile."""


def choose_windows(
    grid: GeoBox,
    tiles: Sequence[tuple[TileEdges, TileEdges]] = (),
    cell_px: int = LARGEST_PX,
) -> list[GeoBox]:
    """Choose windows of `WINDOW_PX` in the middle of cells that divide the grid.

    Cells have `cell_px` or more, so a grid of less than two of them has one window. A grid smaller
    than a window is itself the window. Windows begin at multiples of 60 m. With `tiles` of files
    (rows and columns), they then move to the nearest place within one tile of the first file, by
    whole pixels of SCL. No file covers less of a window then. Elsewhere, a window usually takes four
    tiles.
    """
    step = ALIGN_M // PIXEL_M
    slices: list[list[slice]] = []
    for axis, side in enumerate(grid.shape):
        cells = max(side // cell_px, 1)
        ends = [side * (2 * cell + 1) // cells for cell in range(cells)]
        starts = [max(end - WINDOW_PX, 0) // 2 // step * step for end in ends]
        edges = [file[axis] for file in tiles]
        starts = [_move_into_tile(start, side, edges) for start in starts]
        slices.append([slice(start, min(start + WINDOW_PX, side)) for start in starts])
    return [grid[rows, columns] for rows in slices[0] for columns in slices[1]]


def add_windows(
    windows: Sequence[GeoBox],
    grid: GeoBox,
    footprints: Iterable[BaseGeometry],
    tiles: Sequence[tuple[TileEdges, TileEdges]] = (),
) -> list[GeoBox]:
    """Choose further windows for scenes that lie outside the windows, or mostly so.

    A footprint in longitude and latitude gets a window in the middle of its part of the grid if
    there it has more than twice as much as in any other window, and a square kilometre more. Published
    footprints are only this accurate. With `tiles`, a window moves into one tile of the file that
    covers most of it, unless it then has less of the footprint.

    Returns the further windows only.
    """
    area = grid.extent.geom
    parts = [Geometry(shape, _LONLAT).to_crs(grid.crs).geom for shape in set(footprints)]
    parts = [shapely.intersection(shapely.make_valid(part), area) for part in parts]
    parts = [part for part in parts if part.area >= _FOOTPRINT_M**2]
    further: list[GeoBox] = []
    # A window for a small part also serves the larger parts around it.
    for part in sorted(parts, key=lambda part: (part.area, part.bounds)):
        window = _choose_window(grid, part, tiles)
        most = max(_measure_part(part, chosen) for chosen in [*windows, *further])
        own = _measure_part(part, window)
        if own > 2 * most and own - most >= _FOOTPRINT_M**2:
            further.append(window)
    return further


def _measure_part(part: BaseGeometry, window: GeoBox) -> float:
    """Measure how much of a part of the grid lies in a window, in square metres."""
    return float(shapely.intersection(part, window.extent.geom).area)


def _choose_window(
    grid: GeoBox, part: BaseGeometry, tiles: Sequence[tuple[TileEdges, TileEdges]]
) -> GeoBox:
    """Choose the window in the middle of a part of the grid, or near it in one file tile."""
    step = ALIGN_M // PIXEL_M
    middle = ~grid.transform * part.centroid.coords[0]
    starts = []
    for side, at in zip(grid.shape, reversed(middle), strict=True):
        start = min(max(at - WINDOW_PX / 2, 0), max(side - WINDOW_PX, 0))
        starts.append(int(start) // step * step)

    def place(starts: Sequence[int]) -> GeoBox:
        rows, columns = (
            slice(start, min(start + WINDOW_PX, side))
            for start, side in zip(starts, grid.shape, strict=True)
        )
        return grid[rows, columns]

    files = sorted(tiles, key=lambda file: -math.prod(map(_overlap, file, starts)))
    moved = [
        _move_into_tile(start, side, [file[axis] for file in files])
        for axis, (start, side) in enumerate(zip(starts, grid.shape, strict=True))
    ]
    candidates = [place(moved), place(starts)]
    return max(candidates, key=lambda window: _measure_part(part, window))


def _move_into_tile(start: int, side: int, files: Sequence[TileEdges]) -> int:
    """Move a window along a side into one tile: its new start, or the old one if none fits."""
    if not files or side <= WINDOW_PX:
        return start
    places = []
    edge, _, tile = files[0]
    first = (start - edge) // tile
    for number in (first - 1, first, first + 1):
        lowest = _SCL_PX * math.ceil((edge + number * tile) / _SCL_PX)
        highest = _SCL_PX * math.floor((edge + (number + 1) * tile - WINDOW_PX) / _SCL_PX)
        place = min(max(start, lowest, 0), highest, side - WINDOW_PX)
        is_covered = all(_overlap(file, place) >= _overlap(file, start) for file in files)
        if place >= max(lowest, 0) and is_covered:
            places.append(place)
    return min(places, key=lambda place: abs(place - start), default=start)


def _overlap(file: TileEdges, start: int) -> float:
    """Return how much of a window a file covers along one side, in pixels."""
    return max(min(file.stop, start + WINDOW_PX) - max(file.start, start), 0)


@functools.lru_cache(
    1024
)  # a site's is needed five times in an export; a grid's centre takes 12 ms
def equal_area_crs(grid: GeoBox) -> pyproj.CRS:
    """Return the projection for areas.

    It is ETRS89-LAEA (EPSG:3035) in Europe, else Lambert's azimuthal equal area centred on the
    site.
    """
    lon, lat = grid.geographic_extent.centroid.coords[0]
    if -25 <= lon <= 45 and 33 <= lat <= 72:  # EPSG:3035's area of use without the Atlantic islands
        return pyproj.CRS.from_epsg(3035)
    return pyproj.CRS.from_proj4(
        f"+proj=laea +lat_0={lat:.4f} +lon_0={lon:.4f} +datum=WGS84 +units=m"
    )


@functools.lru_cache(1024)
def area_of(grid: GeoBox) -> BaseGeometry:
    """Return the grid's extent in longitude and latitude, cut at the antimeridian."""
    return split_at_antimeridian(grid.geographic_extent.geom)


def clean_footprint(shape: BaseGeometry | None) -> BaseGeometry:
    """Return a footprint's polygons in longitude and latitude: valid, 2-D, cut at the antimeridian.

    Other parts have no area and are left out, such as lines of a geometry collection. The result is
    empty without polygons, or if the coordinates are not degrees.
    """
    if shape is None or shape.is_empty or not _in_degrees(shape):
        return shapely.Polygon()
    if shape.geom_type not in ("Polygon", "MultiPolygon") or shape.has_z or not shape.is_valid:
        shape = shapely.union_all(extract_polygons(shapely.make_valid(shapely.force_2d(shape))))
    if shape.is_empty:
        return shape
    return split_at_antimeridian(shape)


def _in_degrees(shape: BaseGeometry) -> bool:
    longitude, latitude = shapely.get_coordinates(shape).T
    return bool((abs(longitude) <= 360).all() and (abs(latitude) <= 90).all())  # False for NaN


def split_at_antimeridian(shape: BaseGeometry) -> BaseGeometry:
    """Cut a footprint wider than half the world at 180 degrees, as GeoJSON (RFC 7946, 3.1.9)."""
    west, _, east, _ = shape.bounds
    inside = west >= -180 and east <= 180  # some footprints continue beyond 180 degrees
    if inside and east - west <= 180:
        return shape
    # A footprint already cut has a part on either side and stays as it is.
    parts = shapely.get_parts(shape)
    if inside and all(p.bounds[2] - p.bounds[0] <= 180 for p in parts):
        return shape

    joined = shapely.transform(shape, lambda x, y: (x + 360 * (x < 0), y), interleaved=False)
    before_180 = joined.intersection(shapely.box(0, -90, 180, 90))
    beyond_180 = joined.intersection(shapely.box(180, -90, 360, 90))
    beyond_180 = shapely.transform(beyond_180, lambda x, y: (x - 360, y), interleaved=False)
    pieces = [*shapely.get_parts(before_180), *shapely.get_parts(beyond_180)]
    return shapely.MultiPolygon([piece for piece in pieces if piece.area > 0])
