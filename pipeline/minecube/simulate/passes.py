"""Simulate overpass dates, orbits, and the tiles of a scene."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta

import numpy as np
from odc.geo import CRS, BoundingBox
from odc.geo.geobox import GeoBox
from pyproj import Transformer
from shapely.geometry import Polygon, box

from minecube.arrays import Float64
from minecube.errors import CatalogError
from minecube.grid import ALIGN_M, PIXEL_M, coarsen
from minecube.simulate.noise import Draw

SEASON = (4, 10)
"""First and last month of the dates behind an annual median."""
SCL_M = 20
OFFSET_DAY = date(2022, 1, 25)
"""Baseline 04.00: new products from here on have BOA_ADD_OFFSET (Sentinel-2 PSD 14.9)."""
REFINED = date(2021, 3, 30)
"""Baseline 03.00: scenes of Europe from here on match the Global Reference Image."""
_CYCLE = timedelta(days=10)  # 143 orbits
# One real acquisition per satellite and relative orbit; all others follow from the cycle. The two
# orbits are three days apart and their swaths overlap.
_REAL = {
    ("S2A", 65): (date(2020, 3, 2), 24515),
    ("S2A", 108): (date(2020, 3, 5), 24558),
    ("S2B", 65): (date(2020, 7, 5), 17394),
    ("S2B", 108): (date(2020, 7, 8), 17437),
}
_LAUNCHED = {"S2A": date(2015, 7, 4), "S2B": date(2017, 7, 1)}
Pass = tuple[date, str, int]
"""Day, satellite, relative orbit."""
_SNOW = (1, 2, 12)  # months
FULL_SWATH = 65
CUT_SWATH = 108
"""FULL's swath covers the whole site; CUT's swath ends within it."""


@dataclass(frozen=True, kw_only=True)
class Overpass:
    """One acquisition of one site."""

    day: date
    """Solar day."""
    satellite: str
    orbit: int
    """Relative orbit."""
    absolute_orbit: int
    start: datetime
    """Start of the datatake, UTC; the site is sensed some minutes later."""
    sensed: datetime
    cover: float
    """Share of cloud in the sky, 0..1."""
    snow: bool
    split: bool
    """Downlinked in two pieces: two granules of one datatake."""
    neighbour: bool
    """The neighbouring zone's tile is listed."""
    gap: bool
    """The own-zone tile on the side of the neighbouring zone is missing from the catalogue."""
    displacement_px: float | None = None
    """Standard deviation of the scene's displacement per axis, pixels.

    None: two in five scenes are displaced, by up to 0.4 pixels.
    """
    edges_unclassified: bool
    """SCL leaves most cloud edges unclassified."""
    false_cirrus: bool
    """SCL classifies most of the clear ground as cirrus."""
    unseen_cirrus: bool
    """Thin cirrus missed by SCL, with streaks at a different place in each band."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One tile of the archive: its pixel grid and its position on the canvas."""

    name: str
    """MGRS, for instance 33UUS."""
    box: GeoBox
    """10 m."""
    area: Polygon
    """The canvas's part of the tile's extent, in the tile's CRS."""
    cols: slice
    """The tile's columns of the canvas at 10 m; it has all rows."""
    warp: Warp | None = None


@dataclass(frozen=True, kw_only=True)
class Warp:
    """Pixel positions between a tile of the neighbouring zone and the site.

    Arrays have the format of `locate_pixels`.
    """

    from_canvas: dict[int, Float64]
    """Pixel size -> positions of the tile's pixels on the canvas."""
    to_site: Float64
    """Positions of the site's 10 m pixels on the tile's 20 m pixels."""


def simulate_overpasses(
    draw: Draw, longitude: float, year: int, dates: int, winter: int, scl_errors: bool = False
) -> list[Overpass]:
    """Simulate the acquisitions of a year, sorted by day.

    `dates` of them are within the season, half on either orbit. `winter` of them have snow. The
    season has at most `count_possible_dates(year)` dates. Winter dates are limited to real passes.
    See `World` for SCL errors.
    """
    rng = draw("passes", year)
    cover = _draw_season(rng, year, FULL_SWATH, -(-dates // 2)) | _draw_season(
        rng, year, CUT_SWATH, dates // 2
    )
    # The clearest dates of the full orbit, in order, are the ones with a split or SCL errors.
    full_orbit = sorted((p for p in cover if p[2] == FULL_SWATH), key=lambda p: cover[p])
    ranks = {clear_pass: rank for rank, clear_pass in enumerate(full_orbit)}
    winter_passes = [
        p for o in (FULL_SWATH, CUT_SWATH) for p in list_passes(year, o) if p[0].month in _SNOW
    ]
    count = min(winter, len(winter_passes))
    for index in sorted(rng.choice(len(winter_passes), count, replace=False)):
        cover[winter_passes[index]] = float(rng.uniform(0, 0.4))
    acquisitions = []
    for number, (day, satellite, orbit) in enumerate(sorted(cover)):
        rank = ranks.get((day, satellite, orbit))
        real_day, real_orbit = _REAL[satellite, orbit]
        sensed = datetime(day.year, day.month, day.day, 10, 30) - timedelta(hours=longitude / 15)
        acquisitions.append(
            Overpass(
                day=day,
                satellite=satellite,
                orbit=orbit,
                absolute_orbit=real_orbit + 143 * ((day - real_day) // _CYCLE),
                start=sensed - timedelta(minutes=7, seconds=23),
                sensed=sensed,
                cover=cover[day, satellite, orbit],
                snow=day.month in _SNOW,
                # The second clearest, so both halves are needed.
                split=rank == min(1, len(full_orbit) - 1),
                neighbour=number % 3 == 0,
                gap=number % 6 == 3,
                edges_unclassified=scl_errors,
                false_cirrus=scl_errors and rank == 0,
                unseen_cirrus=scl_errors and rank == 2,
            )
        )
    return acquisitions


def displace_scene(overpass: Overpass) -> Overpass:
    """Return the overpass displaced as in real archives, more strongly before `REFINED`."""
    if overpass.day < REFINED:
        return replace(overpass, displacement_px=0.5)
    return replace(overpass, displacement_px=0.17)


def _draw_season(rng: np.random.Generator, year: int, orbit: int, n: int) -> dict[Pass, float]:
    """Choose dates of one orbit with their cloud cover, both spread evenly over the season.

    Cover is U-shaped, from clear to overcast, as over Central Europe.
    """
    possible = _in_season(year, orbit)
    edges = [i * len(possible) // max(n, 1) for i in range(n + 1)]
    passes = [possible[rng.integers(a, b)] for a, b in itertools.pairwise(edges)]
    # The golden ratio spreads ranks evenly: clear and cloudy spells stay short.
    rank = np.argsort(np.argsort((np.arange(n) * 0.618 + rng.random()) % 1))
    cover = np.interp((rank + 0.5) / max(n, 1), (0, 0.35, 0.55, 0.78, 1), (0, 0.02, 0.2, 0.9, 1))
    return dict(zip(passes, cover.tolist(), strict=True))


def count_possible_dates(year: int) -> int:
    """Return the possible dates from April to October, both orbits equally often."""
    return 2 * min(len(_in_season(year, orbit)) for orbit in (FULL_SWATH, CUT_SWATH))


def _in_season(year: int, orbit: int) -> list[Pass]:
    return [p for p in list_passes(year, orbit) if SEASON[0] <= p[0].month <= SEASON[1]]


def list_passes(year: int, orbit: int) -> list[Pass]:
    """List the year's passes of an orbit as (date, satellite, orbit), in order of dates."""
    passes = []
    for satellite, launched in _LAUNCHED.items():
        day, _ = _REAL[satellite, orbit]
        day -= _CYCLE * ((day - date(year, 1, 1)) // _CYCLE)
        while day.year == year:
            if day >= launched:
                passes.append((day, satellite, orbit))
            day += _CYCLE
    return sorted(passes)


def locate_sun(day: date, latitude: float) -> tuple[float, float]:
    """Compute the sun's azimuth and elevation in degrees at 10:30 solar time.

    Declination after Cooper 1969.
    """
    year_angle = 2 * math.pi * (284 + day.timetuple().tm_yday) / 365
    declination = math.radians(23.45) * math.sin(year_angle)
    sin_declination = math.sin(declination)
    cos_declination = math.cos(declination)
    sin_latitude = math.sin(math.radians(latitude))
    cos_latitude = math.cos(math.radians(latitude))
    hour = math.radians(-22.5)
    up = sin_latitude * sin_declination + cos_latitude * cos_declination * math.cos(hour)
    east = -cos_declination * math.sin(hour)
    north = sin_declination * cos_latitude - cos_declination * sin_latitude * math.cos(hour)
    return math.degrees(math.atan2(east, north)) % 360, math.degrees(math.asin(up))


def cut_swath(canvas: GeoBox, grid: GeoBox, overpass: Overpass) -> Polygon:
    """Return the part of the canvas seen by the orbit.

    The edge leans like a descending orbit, 13 degrees off south.
    """
    area = canvas.extent.boundingbox
    if overpass.orbit == FULL_SWATH:
        return box(*area.bbox)
    site = grid.extent.boundingbox
    edge = site.left + 0.2 * site.span_x
    lean = math.tan(math.radians(13)) * (area.span_y / 2)
    beyond = area.right + area.span_x
    return Polygon(
        [
            (edge + lean, area.top),
            (beyond, area.top),
            (beyond, area.bottom),
            (edge - lean, area.bottom),
        ]
    ).intersection(box(*area.bbox))


def lay_tiles(grid: GeoBox, canvas: GeoBox, names: set[str]) -> list[Tile]:
    """Return three tiles: A, B and C.

    A covers the west 65 % of the site, and B the east half. C is in the nearer neighbouring UTM
    zone and covers the 60 % of the site facing this zone.

    Tiles extend to the edge of the canvas, the grid with a margin. `names` are names in use; the
    new ones are added. Two sites in one square get different tile names.
    """
    site = grid.extent.boundingbox
    area = canvas.extent.boundingbox
    west_end = site.left + 0.65 * site.span_x
    east_start = site.right - 0.5 * site.span_x
    west = _align(BoundingBox(area.left, area.bottom, west_end, area.top, grid.crs))
    east = _align(BoundingBox(east_start, area.bottom, area.right, area.top, grid.crs))
    tiles = []
    for step, extent in enumerate((west, east)):
        start = round((extent.left - area.left) / PIXEL_M)
        stop = round((extent.right - area.left) / PIXEL_M)
        cols = slice(start, stop)
        name = _name_tile(canvas, step, names)
        tiles.append(Tile(name=name, box=canvas[:, cols], area=box(*extent.bbox), cols=cols))
    return [*tiles, _lay_neighbour_tile(grid, canvas, names)]


def neighbour_is_west(grid: GeoBox) -> bool:
    """Report whether the nearer neighbouring UTM zone lies to the west."""
    return bool(grid.geographic_extent.centroid.coords[0][0] % 6 < 3)


def _lay_neighbour_tile(grid: GeoBox, canvas: GeoBox, names: set[str]) -> Tile:
    crs = _find_neighbour_crs(grid)
    site = grid.extent.boundingbox
    left, bottom, right, top = canvas.extent.boundingbox.bbox
    if neighbour_is_west(grid):
        right = site.left + 0.6 * site.span_x
    else:
        left = site.right - 0.6 * site.span_x
    to_tile = Transformer.from_crs(epsg_of(grid), crs.to_epsg(), always_xy=True)
    corners = [(left, bottom), (right, bottom), (right, top), (left, top)]
    area = Polygon([to_tile.transform(*corner) for corner in corners])
    bounds = _align(BoundingBox.from_xy(area.bounds[::2], area.bounds[1::2], crs))
    shape = (round(bounds.span_y / PIXEL_M), round(bounds.span_x / PIXEL_M))
    tile = GeoBox(
        shape,
        grid.transform.translation(bounds.left, bounds.top)
        * grid.transform.scale(PIXEL_M, -PIXEL_M),
        crs,
    )
    warp = Warp(
        from_canvas={
            size: locate_pixels(coarsen(tile, size), coarsen(canvas, size))
            for size in (PIXEL_M, SCL_M)
        },
        to_site=locate_pixels(grid, coarsen(tile, SCL_M)),
    )
    name = _name_tile(tile, 0, names)
    return Tile(name=name, box=tile, area=area, cols=slice(None), warp=warp)


def _find_neighbour_crs(grid: GeoBox) -> CRS:
    """Return the nearer neighbouring UTM zone."""
    hemisphere, zone = divmod(epsg_of(grid), 100)
    neighbour = zone + 1
    if neighbour_is_west(grid):
        neighbour = zone - 1
    return CRS(f"EPSG:{hemisphere * 100 + (neighbour - 1) % 60 + 1}")


def locate_pixels(source: GeoBox, target: GeoBox) -> Float64:
    """Locate the pixel centres of one grid on another: float64 [2, y, x], row and column.

    0 is the centre of the first pixel.
    """
    y, x = np.meshgrid(*(source.coords[d].values for d in ("y", "x")), indexing="ij")
    x, y = Transformer.from_crs(epsg_of(source), epsg_of(target), always_xy=True).transform(x, y)
    col, row = ~target.transform * (x, y)
    return np.stack([row, col]) - 0.5


def epsg_of(box: GeoBox) -> int:
    """Return the EPSG code of a UTM grid."""
    return int(str(box.crs).removeprefix("EPSG:"))


def _align(area: BoundingBox) -> BoundingBox:
    """Extend an area to the corner alignment of Sentinel-2 tiles."""
    left, bottom = (math.floor(v / ALIGN_M) * ALIGN_M for v in (area.left, area.bottom))
    right, top = (math.ceil(v / ALIGN_M) * ALIGN_M for v in (area.right, area.top))
    return BoundingBox(left, bottom, right, top, area.crs)


def _name_tile(tile: GeoBox, step: int, names: set[str]) -> str:
    """Name a tile by its centre's MGRS square (NGA.STND.0037, 2.0.0), and add it to the names.

    If the name is in use, the next free square to the north is used.
    """
    zone = epsg_of(tile) % 100
    ((x, y),) = tile.extent.centroid.coords
    lat = float(np.clip(tile.geographic_extent.centroid.coords[0][1], -80, 83.9))
    band = "CDEFGHJKLMNPQRSTUVWX"[min(int((lat + 80) // 8), 19)]
    columns = ("STUVWXYZ", "ABCDEFGH", "JKLMNPQR")[zone % 3]
    column = columns[(int(np.clip(x // 100_000, 1, 8)) - 1 + step) % 8]
    rows = ("FGHJKLMNPQRSTUVABCDE", "ABCDEFGHJKLMNPQRSTUV")[zone % 2]
    start = int(y // 100_000)
    for row in range(start, start + 20):
        name = f"{zone:02d}{band}{column}{rows[row % 20]}"
        if name not in names:
            names.add(name)
            return name
    raise CatalogError(
        "expected at most 20 sites in one column of MGRS squares, "
        f"found more in zone {zone}{band}; simulate fewer sites at a time"
    )
