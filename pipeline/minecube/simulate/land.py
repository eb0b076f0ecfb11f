"""Simulate the ground of a site per calendar year, and its clean reflectance per day."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import rasterio.features
from odc.geo import BoundingBox
from odc.geo.geobox import GeoBox
from scipy import ndimage
from shapely.geometry import LineString
from shapely.geometry.base import BaseGeometry

from minecube.arrays import Bool, Float32, Float64, Int32
from minecube.simulate.mine import Mine, draw_mine
from minecube.simulate.noise import Draw, draw_fractal
from minecube.simulate.spectra import Patches

_ARABLE = ("winter cereal", "maize", "ley", "fallow")
_HOUSES = (
    "red roof",
    "grey roof",
    "garden",
    "garden",
    "garden",
    "asphalt",
    "red roof",
    "garden",
    "garden",
    "asphalt",
    "red roof",
    "grey roof",
    "white roof",
)
_BENCH_M = 70  # width of a pit bench, including its face
_RECLAIMED_YEARS = 15  # afterwards a former mine is ordinary land


@dataclass(frozen=True, kw_only=True)
class Ground:
    """One site in one calendar year on the canvas (the site's grid with a margin)."""

    patch: Int32
    """Index of each pixel's patch, int32 [y, x]."""
    shade: Float32
    """Brightness of a pixel relative to its patch, constant through the year."""
    patches: Patches
    kinds: list[str]
    """Kind of every patch."""
    water: Bool
    dazzling: Bool
    """Bright ground classified as cloud by SCL: kaolin, white roofs."""
    mine: Mine

    def reflectance(self, spectra: Float32) -> Float32:
        """Return the clean reflectance 0..1 of one band, float32 [y, x].

        `spectra` is the band's column of `patches.spectra(day)`.
        """
        reflectance: Float32 = spectra[self.patch]
        reflectance *= self.shade
        return reflectance


@dataclass(frozen=True, kw_only=True)
class Land:
    """A site's land features shared by all years."""

    grid: GeoBox
    canvas: GeoBox
    draw: Draw
    parcel: Int32
    woods: Bool
    conifers: Bool
    village: Bool
    road: Bool
    river: Bool
    lake: Bool


def draw_land(grid: GeoBox, canvas: GeoBox, draw: Draw) -> Land:
    """Draw the permanent land of a site on its canvas."""
    rng = draw("land")
    box = canvas.extent.boundingbox
    side = min(grid.extent.boundingbox.span_x, grid.extent.boundingbox.span_y)
    y, x = (
        axis.astype(np.float32) for axis in np.meshgrid(*_locate_centres(canvas), indexing="ij")
    )
    parcels = _draw_parcels(rng, x, y)
    more_parcels = _draw_parcels(rng, x, y)
    districts = draw_fractal(rng, canvas.shape.yx, 250) > 0
    woods = (
        draw_fractal(rng, canvas.shape.yx, 120) + 0.2 * draw_fractal(rng, canvas.shape.yx, 12) > 0.6
    )
    towns = _draw_towns(rng, box, side)
    edge = rng.uniform([box.left, box.bottom], [box.right, box.top], (3, 2))
    edge[0, 0] = box.left
    edge[1, 0] = box.right
    edge[2, 1] = box.top
    roads = [_draw_line(rng, towns[i], towns[(i + 1) % 4], 0.08) for i in range(4)]
    roads += [_draw_line(rng, towns[i], edge[i], 0.1) for i in range(3)]
    source = np.array([box.left, towns[0][1]])
    mouth = np.array([box.right, towns[2][1]])
    river = _draw_line(rng, source, mouth, 0.16)
    to_lake = np.hypot(x - towns[3][0], y - towns[3][1])
    to_town = np.min([np.hypot(x - town[0], y - town[1]) for town in towns[:3]], axis=0)
    rough = draw_fractal(rng, canvas.shape.yx, 40)
    parcel = np.where(districts, parcels, more_parcels + parcels.max() + 1)
    return Land(
        grid=grid,
        canvas=canvas,
        draw=draw,
        parcel=parcel.astype(np.int32),
        woods=woods,
        conifers=draw_fractal(rng, canvas.shape.yx, 80) > 0.1,
        village=to_town < np.clip(0.05 * side, 120, 300) * (1 + 0.3 * rough),
        road=_burn(canvas, [road.buffer(7) for road in roads]),
        river=_burn(canvas, [river.buffer(rng.uniform(11, 20))]),
        lake=to_lake < np.clip(0.045 * side, 60, 260) * (1 + 0.25 * rough),
    )


def _draw_towns(rng: np.random.Generator, box: BoundingBox, side: float) -> list[Float64]:
    """Draw four places around the centre. A lake lies at the last."""
    centre = np.array([(box.left + box.right) / 2, (box.bottom + box.top) / 2])
    angles = rng.uniform(0, 2 * np.pi) + np.arange(4) * 1.7
    reaches = rng.uniform(0.36, 0.55, 4) * side
    return [
        centre + reach * np.array([np.cos(angle), np.sin(angle)])
        for angle, reach in zip(angles, reaches, strict=True)
    ]


class _Cover:
    """The kinds of ground on a canvas. Later layers cover earlier ones."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.patch: Int32 = np.zeros(shape, dtype=np.int32)
        """Index of each pixel's patch."""
        self.kinds: list[str] = []
        """Kind of every patch."""

    def add(self, mask: Bool, patch: Int32, kinds: Sequence[str]) -> None:
        """Cover a mask with new patches: index of each pixel's patch, and kinds of the patches."""
        self.patch[mask] = len(self.kinds) + patch[mask]
        self.kinds.extend(kinds)


def draw_ground(land: Land, year: int) -> Ground:
    """Draw the site in one calendar year.

    Crops rotate, the mine moves on, and former mine land becomes green.
    """
    rng = land.draw("ground", year)
    mine = draw_mine(land.grid, land.draw, year)
    cover = _Cover(land.canvas.shape.yx)
    n = int(land.parcel.max()) + 1
    lasting = land.draw("parcels").random(n) < 0.4
    arable = rng.choice(_ARABLE, n, p=(0.30, 0.24, 0.26, 0.20))
    fields = np.where(lasting, "meadow", arable).tolist()
    cover.add(np.ones_like(land.woods), land.parcel, fields)
    cover.add(land.woods & land.conifers, land.parcel, ["conifer"] * n)
    cover.add(land.woods & ~land.conifers, land.parcel, ["broadleaf"] * n)
    house = _draw_plots(land.draw("houses"), land.canvas.shape.yx, len(_HOUSES))
    cover.add(land.village, house, _HOUSES)
    single = np.zeros_like(cover.patch)
    cover.add(land.road, single, ["asphalt"])
    cover.add(land.lake, single, ["water"])
    cover.add(land.river, single, ["river"])
    young = _years_since_mine(land, year)
    cover.add(young > 0, young - 1, ["young"] * _RECLAIMED_YEARS)
    shade = _add_mine(cover, land, mine)
    patches = Patches(cover.kinds, land.draw("tint"))
    shade *= 1 + patches.texture[cover.patch] * draw_fractal(
        land.draw("texture"), land.canvas.shape.yx, 30, slope=1.6
    )
    kinds = np.array(cover.kinds)
    return Ground(
        patch=cover.patch,
        shade=np.clip(shade, 0.4, 1.6).astype(np.float32),
        patches=patches,
        kinds=cover.kinds,
        water=np.isin(kinds, ("water", "river", "pit water"))[cover.patch],
        dazzling=np.isin(kinds, ("kaolin", "white roof"))[cover.patch],
        mine=mine,
    )


def _add_mine(cover: _Cover, land: Land, mine: Mine) -> Float32:
    """Add the mine's surfaces and return the shading of its relief: float32 [y, x] around 1."""
    rng = land.draw("mine ground")
    inside = _burn(land.canvas, [mine.outline])
    pit = _burn(land.canvas, [mine.pits])
    dump = _burn(land.canvas, [mine.dumps])
    rough = draw_fractal(rng, land.canvas.shape.yx, 25, slope=2.2)
    zero = np.zeros(land.canvas.shape, dtype=np.int32)
    cover.add(inside, zero, ["overburden"])

    depth = ndimage.distance_transform_edt(pit) * 10 + 18 * rough
    bench = np.clip(depth / _BENCH_M, 0, None)
    strata = [str(s) for s in rng.permutation(["sand", "overburden", "clay", "sand"])] + [
        "clay",
        str(rng.choice(["coal", "rock"])),
    ]
    cover.add(pit, np.minimum(bench.astype(np.int32), len(strata) - 1), strata)
    # Bench faces lie in shade.
    shade = np.where(pit & (bench % 1 < 0.22) & (depth > 12), np.float32(0.78), np.float32(1))

    ridge = ndimage.distance_transform_edt(dump) * 10 + 25 * rough
    cover.add(
        dump,
        (draw_fractal(rng, land.canvas.shape.yx, 60) > 0.9).astype(np.int32),
        ["dump", "pioneers"],
    )
    shade = np.where(dump, 1 + 0.07 * np.sin(2 * np.pi * ridge / 62), shade)

    pale = draw_fractal(rng, land.canvas.shape.yx, 45, slope=3.6) > 1.25
    cover.add(inside & pale & (bench < 4), zero, ["kaolin"])
    cover.add(inside & _burn(land.canvas, [mine.haul_road]), zero, ["gravel"])
    cover.add(_burn(land.canvas, [mine.lake]), zero, ["pit water"])
    return shade.astype(np.float32)


def _years_since_mine(land: Land, year: int) -> Int32:
    """Count years since a pixel was last mine, 1.._RECLAIMED_YEARS.

    0 if it was never mine, or longer ago. The current year is ignored: the mine is drawn on top
    later.
    """
    since = np.zeros(land.canvas.shape, dtype=np.int32)
    for age in range(_RECLAIMED_YEARS, 0, -1):
        since[_burn(land.canvas, [draw_mine(land.grid, land.draw, year - age).outline])] = age
    return since


def _burn(canvas: GeoBox, shapes: Iterable[BaseGeometry]) -> Bool:
    """Mark pixels with their centre in one of the shapes."""
    filled = [shape for shape in shapes if not shape.is_empty]
    if not filled:
        return np.zeros(canvas.shape, dtype=np.bool_)
    burnt: Bool = rasterio.features.rasterize(
        filled, canvas.shape, transform=canvas.transform, dtype=np.uint8
    ).astype(np.bool_)
    return burnt


def _locate_centres(canvas: GeoBox) -> tuple[Float64, Float64]:
    """Return pixel centres, y and x."""
    y, x = (np.asarray(canvas.coords[d].values, dtype=np.float64) for d in ("y", "x"))
    return y, x


def _draw_parcels(rng: np.random.Generator, x: Float32, y: Float32) -> Int32:
    """Draw fields: strips in a random direction, each with its own width and length of fields.

    Coordinates are in metres. Returns the number of the field of each pixel.
    """
    angle = rng.uniform(0, np.pi)
    across = (x - x.mean()) * np.cos(angle) + (y - y.mean()) * np.sin(angle)
    along = (y - y.mean()) * np.cos(angle) - (x - x.mean()) * np.sin(angle)
    reach = float(np.hypot(np.ptp(x), np.ptp(y)))
    widths = rng.uniform(100, 330, int(reach / 100) + 2)
    edges = np.cumsum(widths) - reach / 2
    strip = np.searchsorted(edges, across)
    length = rng.uniform(180, 620, len(edges) + 1)
    start = rng.uniform(0, 1, len(edges) + 1)
    field = np.floor(along / length[strip] + start[strip]).astype(np.int64)
    unique = strip * 100_000 + field  # no strip has as many fields
    _, numbers = np.unique(unique, return_inverse=True)
    return numbers.reshape(x.shape).astype(np.int32)


def _draw_plots(rng: np.random.Generator, shape: tuple[int, int], kinds: int) -> Int32:
    """Draw random plots of 20 m."""
    return (
        rng.integers(0, kinds, (shape[0] // 2, shape[1] // 2), dtype=np.int32)
        .repeat(2, axis=0)
        .repeat(2, axis=1)
    )


def _draw_line(rng: np.random.Generator, start: Float64, end: Float64, bend: float) -> LineString:
    """Draw a winding line between two points; `bend` is its swing relative to its length."""
    t = np.linspace(0, 1, 80)[:, None]
    along = np.asarray(end) - start
    aside = np.array([-along[1], along[0]])
    swing = sum(rng.normal(0, bend) / k * np.sin(np.pi * k * t) for k in range(1, 6))
    return LineString(start + t * along + swing * aside)
