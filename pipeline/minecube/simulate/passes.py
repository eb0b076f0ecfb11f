"""Simulate overpass dates, orbits, and the tiles of a scene."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from datetime import date, datetime, timedelta

import numpy as np
import numpy.typing as npt
from odc.geo import CRS, BoundingBox
from odc.geo.geobox import GeoBox
from pyproj import Transformer
from shapely.geometry import Polygon, box

from minecube.errors import CatalogError
from minecube.grid import ALIGN_M, PIXEL_M, at_resolution
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
_KNOWN = {
    ("S2A", 65): (date(2020, 3, 2), 24515),
    ("S2A", 108): (date(2020, 3, 5), 24558),
    ("S2B", 65): (date(2020, 7, 5), 17394),
    ("S2B", 108): (date(2020, 7, 8), 17437),
}
_FIRST = {"S2A": date(2015, 7, 4), "S2B": date(2017, 7, 1)}
Pass = tuple[date, str, int]
"""Day, satellite, relative orbit."""
_SNOW = (1, 2, 12)  # months
FULL, CUT = 65, 108
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
    astray_px: float | None
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

    Arrays have the format of `positions`.
    """

    from_canvas: dict[int, npt.NDArray[np.float64]]
    """Pixel size -> positions of the tile's pixels on the canvas."""
    to_site: npt.NDArray[np.float64]
    """Positions of the site's 10 m pixels on the tile's 20 m pixels."""


def overpasses(
    draw: Draw,
    longitude: float,
    year: int,
    dates: int,
    winter: int,
    scl_errors: bool = False,
    shifts: bool = False,
) -> list[Overpass]:
    """Simulate the acquisitions of a year, sorted by day.

    `dates` of them are within the season, half on either orbit. `winter` of them have snow. The
    season has at most `dates_possible(year)` dates. Winter dates are limited to real passes. See
    `World` for errors and shifts.
    """
    rng = draw("passes", year)
    cover = _season(rng, year, FULL, -(-dates // 2)) | _season(rng, year, CUT, dates // 2)
    clearest = sorted((p for p in cover if p[2] == FULL), key=lambda p: cover[p])
    cold = [p for orbit in (FULL, CUT) for p in _passes(year, orbit) if p[0].month in _SNOW]
    chosen = sorted(rng.choice(len(cold), min(winter, len(cold)), replace=False))
    cover |= {cold[i]: float(rng.uniform(0, 0.4)) for i in chosen}
    made = []
    for number, (day, satellite, orbit) in enumerate(sorted(cover)):
        known_day, known_orbit = _KNOWN[satellite, orbit]
        at = (
            clearest.index((day, satellite, orbit)) if (day, satellite, orbit) in clearest else None
        )
        sensed = datetime(day.year, day.month, day.day, 10, 30) - timedelta(hours=longitude / 15)
        made.append(
            Overpass(
                day=day,
                satellite=satellite,
                orbit=orbit,
                absolute_orbit=known_orbit + 143 * ((day - known_day) // _CYCLE),
                start=sensed - timedelta(minutes=7, seconds=23),
                sensed=sensed,
                cover=cover[day, satellite, orbit],
                snow=day.month in _SNOW,
                # The second clearest, so both halves are needed.
                split=at == min(1, len(clearest) - 1),
                neighbour=number % 3 == 0,
                gap=number % 6 == 3,
                astray_px=(0.5 if day < REFINED else 0.17) if shifts else None,
                edges_unclassified=scl_errors,
                false_cirrus=scl_errors and at == 0,
                unseen_cirrus=scl_errors and at == 2,
            )
        )
    return made


def _season(rng: np.random.Generator, year: int, orbit: int, n: int) -> dict[Pass, float]:
    """Choose dates of one orbit with their cloud cover, both spread evenly over the season.

    Cover is U-shaped, from clear to overcast, as over Central Europe.
    """
    possible = _in_season(year, orbit)
    edges = [i * len(possible) // n for i in range(n + 1)] if n else []
    chosen = [possible[rng.integers(a, b)] for a, b in itertools.pairwise(edges)]
    # The golden ratio spreads ranks evenly: clear and cloudy spells stay short.
    rank = np.argsort(np.argsort((np.arange(n) * 0.618 + rng.random()) % 1))
    cover = np.interp((rank + 0.5) / max(n, 1), (0, 0.35, 0.55, 0.78, 1), (0, 0.02, 0.2, 0.9, 1))
    return dict(zip(chosen, cover.tolist(), strict=True))


def dates_possible(year: int) -> int:
    """Return the possible dates from April to October, both orbits equally often."""
    return 2 * min(len(_in_season(year, orbit)) for orbit in (FULL, CUT))


def _in_season(year: int, orbit: int) -> list[Pass]:
    return [p for p in _passes(year, orbit) if SEASON[0] <= p[0].month <= SEASON[1]]


def _passes(year: int, orbit: int) -> list[Pass]:
    found = []
    for satellite, first in _FIRST.items():
        day, _ = _KNOWN[satellite, orbit]
        day -= _CYCLE * ((day - date(year, 1, 1)) // _CYCLE)
        while day.year == year:
            found += [(day, satellite, orbit)] if day >= first else []
            day += _CYCLE
    return sorted(found)


def sun(day: date, latitude: float) -> tuple[float, float]:
    """Compute the sun's azimuth and elevation in degrees at 10:30 solar time.

    Declination after Cooper 1969.
    """
    declination = math.radians(23.45) * math.sin(
        2 * math.pi * (284 + day.timetuple().tm_yday) / 365
    )
    hour, phi = math.radians(-22.5), math.radians(latitude)
    up = math.sin(phi) * math.sin(declination) + math.cos(phi) * math.cos(declination) * math.cos(
        hour
    )
    east = -math.cos(declination) * math.sin(hour)
    north = math.sin(declination) * math.cos(phi) - math.cos(declination) * math.sin(
        phi
    ) * math.cos(hour)
    return math.degrees(math.atan2(east, north)) % 360, math.degrees(math.asin(up))


def swath(canvas: GeoBox, grid: GeoBox, overpass: Overpass) -> Polygon:
    """Return the part of the canvas seen by the orbit.

    The edge leans like a descending orbit, 13 degrees off south.
    """
    whole = canvas.extent.boundingbox
    if overpass.orbit == FULL:
        return box(*whole.bbox)
    site = grid.extent.boundingbox
    middle, lean = site.left + 0.2 * site.span_x, math.tan(math.radians(13))
    half = whole.span_y / 2
    far = whole.right + whole.span_x
    return Polygon(
        [
            (middle + lean * half, whole.top),
            (far, whole.top),
            (far, whole.bottom),
            (middle - lean * half, whole.bottom),
        ]
    ).intersection(box(*whole.bbox))


def tiles_of(grid: GeoBox, canvas: GeoBox, taken: set[str]) -> list[Tile]:
    """Return three tiles: A, B and C.

    A covers the west 65 % of the site, and B the east half. C is in the nearer neighbouring UTM
    zone and covers the 60 % of the site facing this zone.

    Args:
        grid: The site's grid.
        canvas: The grid with a margin; tiles extend to its edge.
        taken: Names in use; the new ones are added. Two sites in one square get different tile
            names.
    """
    site, whole = grid.extent.boundingbox, canvas.extent.boundingbox
    west = _aligned(
        BoundingBox(whole.left, whole.bottom, site.left + 0.65 * site.span_x, whole.top, grid.crs)
    )
    east = _aligned(
        BoundingBox(site.right - 0.5 * site.span_x, whole.bottom, whole.right, whole.top, grid.crs)
    )
    own = []
    for step, part in enumerate((west, east)):
        cols = slice(
            round((part.left - whole.left) / PIXEL_M), round((part.right - whole.left) / PIXEL_M)
        )
        name = _name(canvas, step, taken)
        own.append(Tile(name=name, box=canvas[:, cols], area=box(*part.bbox), cols=cols))
    return [*own, _neighbour(grid, canvas, taken)]


def neighbour_is_west(grid: GeoBox) -> bool:
    """Report whether the nearer neighbouring UTM zone lies to the west."""
    return bool(grid.geographic_extent.centroid.coords[0][0] % 6 < 3)


def _neighbour(grid: GeoBox, canvas: GeoBox, taken: set[str]) -> Tile:
    zone, hemisphere = epsg(grid) % 100, epsg(grid) // 100 * 100
    to_west = neighbour_is_west(grid)
    crs = CRS(f"EPSG:{hemisphere + (zone - 1 + (-1 if to_west else 1)) % 60 + 1}")
    site, whole = grid.extent.boundingbox, canvas.extent.boundingbox
    left = whole.left if to_west else site.right - 0.6 * site.span_x
    right = site.left + 0.6 * site.span_x if to_west else whole.right
    there = Transformer.from_crs(epsg(grid), crs.to_epsg(), always_xy=True)
    corners = [(left, whole.bottom), (right, whole.bottom), (right, whole.top), (left, whole.top)]
    area = Polygon([there.transform(*c) for c in corners])
    bounds = _aligned(BoundingBox.from_xy(area.bounds[::2], area.bounds[1::2], crs))
    shape = (round(bounds.span_y / PIXEL_M), round(bounds.span_x / PIXEL_M))
    tile = GeoBox(
        shape,
        grid.transform.translation(bounds.left, bounds.top)
        * grid.transform.scale(PIXEL_M, -PIXEL_M),
        crs,
    )
    warp = Warp(
        from_canvas={
            size: positions(at_resolution(tile, size), at_resolution(canvas, size))
            for size in (PIXEL_M, SCL_M)
        },
        to_site=positions(grid, at_resolution(tile, SCL_M)),
    )
    name = _name(tile, 0, taken)
    return Tile(name=name, box=tile, area=area, cols=slice(None), warp=warp)


def positions(of: GeoBox, on: GeoBox) -> npt.NDArray[np.float64]:
    """Locate the pixel centres of one grid on another.

    Returns:
        float64 [2, y, x], row and column, 0 = centre of the first pixel.
    """
    y, x = np.meshgrid(*(of.coords[d].values for d in ("y", "x")), indexing="ij")
    x, y = Transformer.from_crs(epsg(of), epsg(on), always_xy=True).transform(x, y)
    col, row = ~on.transform * (x, y)
    return np.stack([row, col]) - 0.5


def epsg(box: GeoBox) -> int:
    """Return the EPSG code of a UTM grid."""
    return int(str(box.crs).removeprefix("EPSG:"))


def _aligned(area: BoundingBox) -> BoundingBox:
    """Extend an area to the corner alignment of Sentinel-2 tiles."""
    left, bottom = (math.floor(v / ALIGN_M) * ALIGN_M for v in (area.left, area.bottom))
    right, top = (math.ceil(v / ALIGN_M) * ALIGN_M for v in (area.right, area.top))
    return BoundingBox(left, bottom, right, top, area.crs)


def _name(tile: GeoBox, step: int, taken: set[str]) -> str:
    """Name a tile by its centre's MGRS square (NGA.STND.0037, 2.0.0).

    If the name is taken, the next free square to the north is used.
    """
    zone = epsg(tile) % 100
    ((x, y),) = tile.extent.centroid.coords
    lat = float(np.clip(tile.geographic_extent.centroid.coords[0][1], -80, 83.9))
    band = "CDEFGHJKLMNPQRSTUVWX"[min(int((lat + 80) // 8), 19)]
    columns = ("STUVWXYZ", "ABCDEFGH", "JKLMNPQR")[zone % 3]
    column = columns[(int(np.clip(x // 100_000, 1, 8)) - 1 + step) % 8]
    letters = "ABCDEFGHJKLMNPQRSTUV"
    first = int(y // 100_000) + (0 if zone % 2 else 5)
    for row in range(first, first + 20):
        name = f"{zone:02d}{band}{column}{letters[row % 20]}"
        if name not in taken:
            taken.add(name)
            return name
    raise CatalogError(
        f"more than twenty sites lie in one column of MGRS squares (zone {zone}{band}), so their tiles cannot be named apart; "
        "simulate fewer sites at a time"
    )
