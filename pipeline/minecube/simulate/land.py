"""Simulate the ground of a site per calendar year, and its clean reflectance per day."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import rasterio.features
from odc.geo.geobox import GeoBox
from scipy import ndimage
from shapely.geometry import LineString
from shapely.geometry.base import BaseGeometry

from minecube.simulate.mine import Mine, mine_of
from minecube.simulate.noise import Bool, Draw, Float, fractal
from minecube.simulate.spectra import Patches

Ids = npt.NDArray[np.int32]
Point = npt.NDArray[np.float64]
Layer = Callable[[Bool, Ids, list[str]], None]
"""Mask, index into the new patches, and their kinds. Later layers cover earlier ones."""
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

    patch: Ids
    """Index of each pixel's patch, int32 [y, x]."""
    shade: Float
    """Brightness of a pixel relative to its patch, constant through the year."""
    patches: Patches
    kinds: list[str]
    """Kind of every patch."""
    water: Bool
    dazzling: Bool
    """Bright ground classified as cloud by SCL: kaolin, white roofs."""
    mine: Mine

    def reflectance(self, spectra: Float) -> Float:
        """Return the clean reflectance 0..1 of one band, float32 [y, x].

        `spectra` is the band's column of `patches.spectra(day)`.
        """
        seen: Float = spectra[self.patch]
        seen *= self.shade
        return seen


@dataclass(frozen=True, kw_only=True)
class Land:
    """A site's land features shared by all years."""

    grid: GeoBox
    canvas: GeoBox
    draw: Draw
    parcel: Ids
    woods: Bool
    conifers: Bool
    village: Bool
    road: Bool
    river: Bool
    lake: Bool


def land_of(grid: GeoBox, canvas: GeoBox, draw: Draw) -> Land:
    """Draw the permanent land of a site on its canvas."""
    rng = draw("land")
    box = canvas.extent.boundingbox
    side = min(grid.extent.boundingbox.span_x, grid.extent.boundingbox.span_y)
    y, x = (axis.astype(np.float32) for axis in np.meshgrid(*_metres(canvas), indexing="ij"))
    left = _parcels(rng, x, y)
    right = _parcels(rng, x, y)
    districts = fractal(rng, canvas.shape.yx, 250) > 0
    woods = fractal(rng, canvas.shape.yx, 120) + 0.2 * fractal(rng, canvas.shape.yx, 12) > 0.6
    towns = [
        np.array([(box.left + box.right) / 2, (box.bottom + box.top) / 2])
        + reach * np.array([np.cos(a), np.sin(a)])
        for a, reach in zip(
            rng.uniform(0, 2 * np.pi) + np.arange(4) * 1.7,
            rng.uniform(0.36, 0.55, 4) * side,
            strict=True,
        )
    ]
    edge = rng.uniform([box.left, box.bottom], [box.right, box.top], (3, 2))
    edge[0, 0], edge[1, 0], edge[2, 1] = box.left, box.right, box.top
    roads = [_bent(rng, towns[i], towns[(i + 1) % 4], 0.08) for i in range(4)]
    roads += [_bent(rng, towns[i], edge[i], 0.1) for i in range(3)]
    stream = _bent(rng, np.array([box.left, towns[0][1]]), np.array([box.right, towns[2][1]]), 0.16)
    far = np.hypot(x - towns[3][0], y - towns[3][1])
    near_town = np.min([np.hypot(x - t[0], y - t[1]) for t in towns[:3]], axis=0)
    rough = fractal(rng, canvas.shape.yx, 40)
    return Land(
        grid=grid,
        canvas=canvas,
        draw=draw,
        parcel=np.where(districts, left, right + left.max() + 1).astype(np.int32),
        woods=woods,
        conifers=fractal(rng, canvas.shape.yx, 80) > 0.1,
        village=near_town < np.clip(0.05 * side, 120, 300) * (1 + 0.3 * rough),
        road=_burn(canvas, [r.buffer(7) for r in roads]),
        river=_burn(canvas, [stream.buffer(rng.uniform(11, 20))]),
        lake=far < np.clip(0.045 * side, 60, 260) * (1 + 0.25 * rough),
    )


def ground_of(land: Land, year: int) -> Ground:
    """Draw the site in one calendar year.

    Crops rotate, the mine moves on, and former mine land becomes green.
    """
    rng = land.draw("ground", year)
    mine = mine_of(land.grid, land.draw, year)
    kinds: list[str] = []
    patch = np.zeros(land.canvas.shape, dtype=np.int32)

    def lay(where: Bool, which: Ids, names: list[str]) -> None:
        patch[where] = len(kinds) + which[where]
        kinds.extend(names)

    n = int(land.parcel.max()) + 1
    lasting = land.draw("parcels").random(n) < 0.4
    arable = rng.choice(_ARABLE, n, p=(0.30, 0.24, 0.26, 0.20))
    everywhere = np.ones_like(land.woods)
    lay(
        everywhere,
        land.parcel,
        ["meadow" if m else str(a) for m, a in zip(lasting, arable, strict=True)],
    )
    lay(land.woods & land.conifers, land.parcel, ["conifer"] * n)
    lay(land.woods & ~land.conifers, land.parcel, ["broadleaf"] * n)
    house = _cells(land.draw("houses"), land.canvas.shape.yx, len(_HOUSES))
    lay(land.village, house, list(_HOUSES))
    one = np.zeros_like(patch)
    lay(land.road, one, ["asphalt"])
    lay(land.lake, one, ["water"])
    lay(land.river, one, ["river"])
    young = _years_since(land, year)
    lay(young > 0, young - 1, ["young"] * _RECLAIMED_YEARS)
    shade = _lay_mine(land, mine, lay)
    texture = Patches(kinds, land.draw("tint"))
    shade *= 1 + texture.texture[patch] * fractal(
        land.draw("texture"), land.canvas.shape.yx, 30, slope=1.6
    )
    names = np.array(kinds)
    return Ground(
        patch=patch,
        shade=np.clip(shade, 0.4, 1.6).astype(np.float32),
        patches=texture,
        kinds=kinds,
        water=np.isin(names, ("water", "river", "pit water"))[patch],
        dazzling=np.isin(names, ("kaolin", "white roof"))[patch],
        mine=mine,
    )


def _lay_mine(land: Land, mine: Mine, lay: Layer) -> Float:
    """Add the mine's surfaces and return the shading of its relief: float32 [y, x] around 1."""
    rng = land.draw("mine ground")
    inside, pit, dump = (_burn(land.canvas, [s]) for s in (mine.outline, mine.pits, mine.dumps))
    rough = fractal(rng, land.canvas.shape.yx, 25, slope=2.2)
    zero = np.zeros(land.canvas.shape, dtype=np.int32)
    lay(inside, zero, ["overburden"])

    depth = ndimage.distance_transform_edt(pit) * 10 + 18 * rough
    bench = np.clip(depth / _BENCH_M, 0, None)
    strata = [str(s) for s in rng.permutation(["sand", "overburden", "clay", "sand"])] + [
        "clay",
        str(rng.choice(["coal", "rock"])),
    ]
    lay(pit, np.minimum(bench.astype(np.int32), len(strata) - 1), strata)
    # Bench faces lie in shade.
    shade = np.where(pit & (bench % 1 < 0.22) & (depth > 12), np.float32(0.78), np.float32(1))

    ridge = ndimage.distance_transform_edt(dump) * 10 + 25 * rough
    lay(dump, (fractal(rng, land.canvas.shape.yx, 60) > 0.9).astype(np.int32), ["dump", "pioneers"])
    shade = np.where(dump, 1 + 0.07 * np.sin(2 * np.pi * ridge / 62), shade)

    pale = fractal(rng, land.canvas.shape.yx, 45, slope=3.6) > 1.25
    lay(inside & pale & (bench < 4), zero, ["kaolin"])
    lay(inside & _burn(land.canvas, [mine.haul_road]), zero, ["gravel"])
    lay(_burn(land.canvas, [mine.lake]), zero, ["pit water"])
    return shade.astype(np.float32)


def _years_since(land: Land, year: int) -> Ids:
    """Count years since a pixel was last mine, 1.._RECLAIMED_YEARS.

    0 if it was never mine, or longer ago. The current year is ignored: the mine is drawn on top
    later.
    """
    since = np.zeros(land.canvas.shape, dtype=np.int32)
    for age in range(_RECLAIMED_YEARS, 0, -1):
        since[_burn(land.canvas, [mine_of(land.grid, land.draw, year - age).outline])] = age
    return since


def _burn(canvas: GeoBox, shapes: Iterable[BaseGeometry]) -> Bool:
    """Mark pixels with their centre in one of the shapes."""
    drawn = [s for s in shapes if not s.is_empty]
    if not drawn:
        return np.zeros(canvas.shape, dtype=np.bool_)
    burnt: Bool = rasterio.features.rasterize(
        drawn, canvas.shape, transform=canvas.transform, dtype=np.uint8
    ).astype(np.bool_)
    return burnt


def _metres(canvas: GeoBox) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return pixel centres, y and x."""
    y, x = (np.asarray(canvas.coords[d].values, dtype=np.float64) for d in ("y", "x"))
    return y, x


def _parcels(rng: np.random.Generator, x: Float, y: Float) -> Ids:
    """Draw fields: strips of uneven width in a random direction, cut into uneven lengths."""
    angle = rng.uniform(0, np.pi)
    across = (x - x.mean()) * np.cos(angle) + (y - y.mean()) * np.sin(angle)
    along = (y - y.mean()) * np.cos(angle) - (x - x.mean()) * np.sin(angle)
    reach = float(np.hypot(np.ptp(x), np.ptp(y)))
    edges = np.cumsum(rng.uniform(100, 330, int(reach / 100) + 2)) - reach / 2
    strip = np.searchsorted(edges, across)
    length = rng.uniform(180, 620, len(edges) + 1)
    start = rng.uniform(0, 1, len(edges) + 1)
    field = np.floor(along / length[strip] + start[strip]).astype(np.int64)
    ids: Ids = (
        np.unique(strip * 100_000 + field, return_inverse=True)[1].reshape(x.shape).astype(np.int32)
    )
    return ids


def _cells(rng: np.random.Generator, shape: tuple[int, int], kinds: int) -> Ids:
    """Draw random plots of 20 m."""
    plots: Ids = (
        rng.integers(0, kinds, (shape[0] // 2, shape[1] // 2), dtype=np.int32)
        .repeat(2, axis=0)
        .repeat(2, axis=1)
    )
    return plots


def _bent(rng: np.random.Generator, start: Point, end: Point, bend: float) -> LineString:
    """Draw a winding line between two points; `bend` is its swing relative to its length."""
    t = np.linspace(0, 1, 80)[:, None]
    along = np.asarray(end) - start
    aside = np.array([-along[1], along[0]])
    swing = sum(rng.normal(0, bend) / k * np.sin(np.pi * k * t) for k in range(1, 6))
    return LineString(start + t * along + swing * aside)
