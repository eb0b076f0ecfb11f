"""When a satellite comes over, on which orbit, and which tiles its scene is cut into."""

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
"""First and last month of the acquisition dates that a median of the year is made of."""
SCL_M = 20
OFFSET_DAY = date(2022, 1, 25)
"""Baseline 04.00: from here on every new product carries BOA_ADD_OFFSET (Sentinel-2 PSD 14.9)."""
REFINED = date(2021, 3, 30)
"""Baseline 03.00: from here on scenes of Europe are fitted to the Global Reference Image."""
_CYCLE = timedelta(days=10)  # 143 orbits
# One acquisition per satellite and relative orbit that really took place; all others follow from the cycle. Two orbits
# three days apart, whose swaths overlap.
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
"""The orbit whose swath covers the site, and the one whose swath ends within it."""


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
    """Start of the datatake, UTC; the site is seen some minutes later."""
    sensed: datetime
    cover: float
    """Share of the sky that is cloud, 0..1."""
    snow: bool
    split: bool
    """Downlinked in two pieces: two granules of one datatake."""
    neighbour: bool
    """The neighbouring zone's tile is listed."""
    gap: bool
    """The catalogue lacks the own-zone tile on the side where the neighbouring zone's is."""
    astray_px: float | None
    """Standard deviation, on either axis, of how far the scene lies beside its place; None where two in five lie beside it."""
    edges_unclassified: bool
    """SCL leaves most of a cloud's edges unclassified."""
    false_cirrus: bool
    """SCL calls most of the clear ground cirrus."""
    unseen_cirrus: bool
    """Thin cirrus, each band's streaks elsewhere, that SCL does not see at all."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One tile of the archive: its own pixel grid, and where its pixels are on the canvas."""

    name: str
    """MGRS, for instance 33UUS."""
    box: GeoBox
    """10 m."""
    area: Polygon
    """The part of its extent that the canvas covers, in its own CRS."""
    cols: slice
    """Columns of the canvas at 10 m that it has; it has all rows."""
    warp: Warp | None = None


@dataclass(frozen=True, kw_only=True)
class Warp:
    """How a tile of the neighbouring zone and the site see each other's pixels; arrays as `positions` makes them."""

    from_canvas: dict[int, npt.NDArray[np.float64]]
    """Pixel size -> where the tile's pixels lie on the canvas."""
    to_site: npt.NDArray[np.float64]
    """Where the site's 10 m pixels lie on the tile's 20 m ones."""


def overpasses(
    draw: Draw, longitude: float, year: int, dates: int, winter: int, scl_errors: bool = False, shifts: bool = False
) -> list[Overpass]:
    """The acquisitions of a year, by day: `dates` within the season, half on either orbit, and `winter` with snow about.

    At most `dates_possible(year)` within the season, and as many winter dates as there were passes. See `World` for
    errors and shifts.
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
        at = clearest.index((day, satellite, orbit)) if (day, satellite, orbit) in clearest else None
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
                # A clear one, so that both halves are needed.
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
    """Dates of one orbit with their cloud cover, both strewn evenly over the season.

    Cover is U-shaped, from clear to overcast, as it is over Central Europe.
    """
    possible = _in_season(year, orbit)
    edges = [i * len(possible) // n for i in range(n + 1)] if n else []
    chosen = [possible[rng.integers(a, b)] for a, b in itertools.pairwise(edges)]
    # The golden ratio strews ranks evenly: fine and cloudy spells, none of them a season long.
    rank = np.argsort(np.argsort((np.arange(n) * 0.618 + rng.random()) % 1))
    cover = np.interp((rank + 0.5) / max(n, 1), (0, 0.35, 0.55, 0.78, 1), (0, 0.02, 0.2, 0.9, 1))
    return dict(zip(chosen, cover.tolist(), strict=True))


def dates_possible(year: int) -> int:
    """How many times the satellites passed over a site from April to October; both orbits equally often."""
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
    """Azimuth and elevation in degrees at half past ten, solar time (declination after Cooper 1969)."""
    declination = math.radians(23.45) * math.sin(2 * math.pi * (284 + day.timetuple().tm_yday) / 365)
    hour, phi = math.radians(-22.5), math.radians(latitude)
    up = math.sin(phi) * math.sin(declination) + math.cos(phi) * math.cos(declination) * math.cos(hour)
    east = -math.cos(declination) * math.sin(hour)
    north = math.sin(declination) * math.cos(phi) - math.cos(declination) * math.sin(phi) * math.cos(hour)
    return math.degrees(math.atan2(east, north)) % 360, math.degrees(math.asin(up))


def swath(canvas: GeoBox, grid: GeoBox, overpass: Overpass) -> Polygon:
    """The part of the canvas that the orbit sees. The edge leans as a descending orbit does, 13 degrees off south."""
    whole = canvas.extent.boundingbox
    if overpass.orbit == FULL:
        return box(*whole.bbox)
    site = grid.extent.boundingbox
    middle, lean = site.left + 0.2 * site.span_x, math.tan(math.radians(13))
    half = whole.span_y / 2
    far = whole.right + whole.span_x
    return Polygon(
        [(middle + lean * half, whole.top), (far, whole.top), (far, whole.bottom), (middle - lean * half, whole.bottom)]
    ).intersection(box(*whole.bbox))


def tiles_of(grid: GeoBox, canvas: GeoBox, taken: set[str]) -> list[Tile]:
    """A, the west 65 % of the site; B, the east half; C, 60 % of it in the neighbouring UTM zone, on the side it lies.

    Args:
        grid: the site's grid.
        canvas: the grid with a margin; tiles reach to its edge.
        taken: names in use; the new ones are added. Two sites of one square get tiles of different names.
    """
    site, whole = grid.extent.boundingbox, canvas.extent.boundingbox
    west = _aligned(BoundingBox(whole.left, whole.bottom, site.left + 0.65 * site.span_x, whole.top, grid.crs))
    east = _aligned(BoundingBox(site.right - 0.5 * site.span_x, whole.bottom, whole.right, whole.top, grid.crs))
    own = []
    for step, part in enumerate((west, east)):
        cols = slice(round((part.left - whole.left) / PIXEL_M), round((part.right - whole.left) / PIXEL_M))
        name = _name(canvas, step, taken)
        own.append(Tile(name=name, box=canvas[:, cols], area=box(*part.bbox), cols=cols))
    return [*own, _neighbour(grid, canvas, taken)]


def neighbour_is_west(grid: GeoBox) -> bool:
    """Whether the nearer of the two neighbouring UTM zones lies to the west."""
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
    tile = GeoBox(shape, grid.transform.translation(bounds.left, bounds.top) * grid.transform.scale(PIXEL_M, -PIXEL_M), crs)
    warp = Warp(
        from_canvas={size: positions(at_resolution(tile, size), at_resolution(canvas, size)) for size in (PIXEL_M, SCL_M)},
        to_site=positions(grid, at_resolution(tile, SCL_M)),
    )
    name = _name(tile, 0, taken)
    return Tile(name=name, box=tile, area=area, cols=slice(None), warp=warp)


def positions(of: GeoBox, on: GeoBox) -> npt.NDArray[np.float64]:
    """Where the pixel centres of one grid lie on another: float64 [2, y, x], row and column, 0 = centre of the first."""
    y, x = np.meshgrid(*(of.coords[d].values for d in ("y", "x")), indexing="ij")
    x, y = Transformer.from_crs(epsg(of), epsg(on), always_xy=True).transform(x, y)
    col, row = ~on.transform * (x, y)
    return np.stack([row, col]) - 0.5


def epsg(box: GeoBox) -> int:
    """EPSG code of a UTM grid."""
    return int(str(box.crs).removeprefix("EPSG:"))


def _aligned(area: BoundingBox) -> BoundingBox:
    """Grown to the corners that Sentinel-2 tiles keep to."""
    left, bottom = (math.floor(v / ALIGN_M) * ALIGN_M for v in (area.left, area.bottom))
    right, top = (math.ceil(v / ALIGN_M) * ALIGN_M for v in (area.right, area.top))
    return BoundingBox(left, bottom, right, top, area.crs)


def _name(tile: GeoBox, step: int, taken: set[str]) -> str:
    """The MGRS square (NGA.STND.0037, 2.0.0) of the tile's middle, or the next one north that is free."""
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
