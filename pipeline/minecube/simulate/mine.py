"""Simulate a site's mine per calendar year: smooth outlines, growth, shift, reclamation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import shapely
from odc.geo.geobox import GeoBox
from shapely.geometry import LineString, MultiPolygon, Polygon
from shapely.geometry.base import BaseGeometry

from minecube.simulate.noise import Draw

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Mine:
    """The mine in one year, in the site's UTM coordinates."""

    pits: BaseGeometry
    dumps: BaseGeometry
    lake: BaseGeometry
    haul_road: BaseGeometry
    outline: BaseGeometry
    """Pits, dumps and lake in one smooth line."""
    footprint: MultiPolygon
    """The outline, clipped to the site."""


def mine_of(grid: GeoBox, draw: Draw, year: int) -> Mine:
    """Return the mine of one site in any year.

    A main pit advances across the site. An inner dump follows and fills it, and the land behind the
    dump is reclaimed. An outer dump next to the pit is reclaimed from its rim. A second pit opens,
    a third one closes. Lengths scale with the site.
    """
    rng = draw("mine")
    box = grid.extent.boundingbox
    side = min(box.span_x, box.span_y)
    middle = (
        np.array([(box.left + box.right) / 2, (box.bottom + box.top) / 2])
        + rng.uniform(-0.04, 0.04, 2) * side
    )
    turn = rng.uniform(0, 2 * np.pi)
    ahead = _direction(turn)
    wobble = [_wobble(rng) for _ in range(6)]
    speed, growth, sideways = (
        rng.uniform(0.10, 0.15),
        rng.uniform(0.02, 0.04),
        rng.choice([-1.0, 1.0]),
    )
    opens, closes = rng.uniform(2013.5, 2019.5), rng.uniform(2016.5, 2021.5)

    front = middle + ahead * side * speed * np.tanh((year - 2020) / 8)
    main = _blob(front, side * (0.16 + growth * np.tanh((year - 2019) / 6)), wobble[0])
    inner = _blob(
        front - ahead * side * 0.16 + _direction(turn + 1.6) * side * 0.03, side * 0.115, wobble[1]
    )
    beside = middle + _direction(turn + sideways * 1.75) * side * 0.25
    outer = _blob(beside, side * 0.12 * (0.72 - 0.28 * np.tanh((year - 2020) / 5)), wobble[2])
    second = _blob(
        middle + _direction(turn - sideways * 1.2) * side * 0.37,
        side * 0.10 * _ramp(year, opens, 7),
        wobble[3],
    )
    third = _blob(
        middle + _direction(turn + 2.9) * side * 0.385,
        side * 0.085 * (1 - _ramp(year, closes, 5)),
        wobble[4],
    )

    pits = shapely.union_all([p for p in (main, second, third) if p.area > 2000])
    deep = main.difference(inner).buffer(-0.035 * side)
    lake = _blob(
        front + ahead * side * 0.05, side * (0.035 + 0.012 * np.tanh((year - 2018) / 5)), wobble[5]
    ).intersection(deep)
    # Closed and opened by 20 m: removes slivers and needles, and rounds corners.
    outline = shapely.union_all([pits, inner, outer]).buffer(20).buffer(-40).buffer(20)
    road = LineString([front, front - ahead * side * 0.09, beside]).buffer(9)
    return Mine(
        pits=pits,
        dumps=shapely.union_all([inner.difference(shapely.union_all([lake])), outer]),
        lake=lake,
        haul_road=road,
        outline=outline,
        footprint=_multi(outline.intersection(grid.extent.geom)),
    )


def _multi(shape: BaseGeometry) -> MultiPolygon:
    return MultiPolygon([p for p in getattr(shape, "geoms", [shape]) if isinstance(p, Polygon)])


def _direction(angle: float) -> Vector:
    return np.array([np.cos(angle), np.sin(angle)])


def _ramp(year: float, start: float, length: float) -> float:
    """Return 0 before `start`, 1 from `start + length` on, smooth between."""
    t = float(np.clip((year - start) / length, 0, 1))
    return t * t * (3 - 2 * t)


def _wobble(rng: np.random.Generator) -> tuple[Vector, ...]:
    """Draw amplitudes and phases of an outline's harmonics 2 to 6.

    They keep a blob's shape the same in every year.
    """
    harmonics = np.arange(2, 7)
    return rng.uniform(0.3, 1.0, 5) * 0.28 / harmonics, rng.uniform(0, 2 * np.pi, 5)


def _blob(
    centre: Vector,
    radius: float,
    wobble: tuple[Vector, ...],
) -> Polygon:
    angle = np.linspace(0, 2 * np.pi, 160, endpoint=False)
    amplitude, phase = wobble
    reach = 1 + (
        amplitude[:, None] * np.cos(np.arange(2, 7)[:, None] * angle + phase[:, None])
    ).sum(axis=0)
    return Polygon(centre + radius * (reach * np.array([np.cos(angle), np.sin(angle)])).T)
