"""Simulate a site's mine per calendar year: smooth outlines, growth, shift, reclamation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import shapely
from odc.geo.geobox import GeoBox
from shapely.geometry import LineString, MultiPolygon, Polygon
from shapely.geometry.base import BaseGeometry

from minecube.arrays import Float64
from minecube.simulate.noise import Draw

_HARMONICS = np.arange(2, 7)
_Wobble: TypeAlias = tuple[Float64, Float64]
"""Amplitudes relative to the radius, and phases, of an outline's harmonics."""


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


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """The properties of a site's mine that are the same in every year. Angles are in radians."""

    side: float
    """Shorter side of the site, metres. All lengths are relative to it."""
    middle: Float64
    """Centre of the mine."""
    heading: float
    """Direction of the main pit's advance."""
    shapes: tuple[_Wobble, ...]
    """Of the main pit, inner dump, outer dump, second pit, third pit and lake."""
    speed: float
    growth: float
    sideways: float
    """Side of the outer dump: -1 or 1."""
    opens: float
    """Year of the second pit's opening."""
    closes: float
    """Year of the third pit's closing."""


def _draw_plan(grid: GeoBox, rng: np.random.Generator) -> _Plan:
    box = grid.extent.boundingbox
    side = min(box.span_x, box.span_y)
    centre = np.array([(box.left + box.right) / 2, (box.bottom + box.top) / 2])
    return _Plan(  # in the order of the random numbers
        side=side,
        middle=centre + rng.uniform(-0.04, 0.04, 2) * side,
        heading=rng.uniform(0, 2 * np.pi),
        shapes=tuple(_draw_wobble(rng) for _ in range(6)),
        speed=rng.uniform(0.10, 0.15),
        growth=rng.uniform(0.02, 0.04),
        sideways=float(rng.choice([-1.0, 1.0])),
        opens=rng.uniform(2013.5, 2019.5),
        closes=rng.uniform(2016.5, 2021.5),
    )


def draw_mine(grid: GeoBox, draw: Draw, year: int) -> Mine:
    """Return the mine of one site in any year.

    A main pit advances across the site. An inner dump follows and fills it, and the land behind the
    dump is reclaimed. An outer dump next to the pit is reclaimed from its rim. A second pit opens,
    a third one closes. Lengths scale with the site.
    """
    plan = _draw_plan(grid, draw("mine"))
    side = plan.side
    ahead = _point_to(plan.heading)
    front = plan.middle + ahead * side * plan.speed * np.tanh((year - 2020) / 8)
    main, second, third = _draw_pits(plan, front, year)
    pits = shapely.union_all([pit for pit in (main, second, third) if pit.area > 2000])
    inner = _draw_blob(
        front - ahead * side * 0.16 + _point_to(plan.heading + 1.6) * side * 0.03,
        side * 0.115,
        plan.shapes[1],
    )
    dump = plan.middle + _point_to(plan.heading + plan.sideways * 1.75) * side * 0.25
    outer = _draw_blob(
        dump, side * 0.12 * (0.72 - 0.28 * np.tanh((year - 2020) / 5)), plan.shapes[2]
    )
    deep = main.difference(inner).buffer(-0.035 * side)
    lake = _draw_blob(
        front + ahead * side * 0.05,
        side * (0.035 + 0.012 * np.tanh((year - 2018) / 5)),
        plan.shapes[5],
    ).intersection(deep)
    # Closed and opened by 20 m: removes slivers and needles, and rounds corners.
    outline = shapely.union_all([pits, inner, outer]).buffer(20).buffer(-40).buffer(20)
    return Mine(
        pits=pits,
        dumps=shapely.union_all([inner.difference(shapely.union_all([lake])), outer]),
        lake=lake,
        haul_road=LineString([front, front - ahead * side * 0.09, dump]).buffer(9),
        outline=outline,
        footprint=_keep_polygons(outline.intersection(grid.extent.geom)),
    )


def _draw_pits(plan: _Plan, front: Float64, year: int) -> tuple[Polygon, Polygon, Polygon]:
    """Draw the main pit at the front, the second and the third pit."""
    side = plan.side
    main = _draw_blob(
        front, side * (0.16 + plan.growth * np.tanh((year - 2019) / 6)), plan.shapes[0]
    )
    second = _draw_blob(
        plan.middle + _point_to(plan.heading - plan.sideways * 1.2) * side * 0.37,
        side * 0.10 * _ramp_up(year, plan.opens, 7),
        plan.shapes[3],
    )
    third = _draw_blob(
        plan.middle + _point_to(plan.heading + 2.9) * side * 0.385,
        side * 0.085 * (1 - _ramp_up(year, plan.closes, 5)),
        plan.shapes[4],
    )
    return main, second, third


def _keep_polygons(shape: BaseGeometry) -> MultiPolygon:
    parts = getattr(shape, "geoms", [shape])
    return MultiPolygon([part for part in parts if isinstance(part, Polygon)])


def _point_to(angle: float) -> Float64:
    return np.array([np.cos(angle), np.sin(angle)])


def _ramp_up(year: float, start: float, length: float) -> float:
    """Return 0 before `start`, 1 from `start + length` on, smooth between."""
    t = float(np.clip((year - start) / length, 0, 1))
    return t * t * (3 - 2 * t)


def _draw_wobble(rng: np.random.Generator) -> _Wobble:
    """Draw amplitudes and phases of an outline's harmonics 2 to 6.

    They keep a blob's shape the same in every year.
    """
    amplitudes = rng.uniform(0.3, 1.0, 5) * 0.28 / _HARMONICS
    return amplitudes, rng.uniform(0, 2 * np.pi, 5)


def _draw_blob(centre: Float64, radius: float, wobble: _Wobble) -> Polygon:
    """Draw a round outline with the harmonics of a wobble."""
    amplitudes, phases = wobble
    angles = np.linspace(0, 2 * np.pi, 160, endpoint=False)
    waves = np.cos(_HARMONICS[:, None] * angles + phases[:, None])
    reach = 1 + (amplitudes[:, None] * waves).sum(axis=0)
    return Polygon(centre + radius * (reach * np.array([np.cos(angles), np.sin(angles)])).T)
