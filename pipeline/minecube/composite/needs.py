"""What a block needs before a pixel of it is read: which scenes, how far beyond its edge, how much memory."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import pystac
import shapely
from odc.geo.geobox import GeoBox

from minecube.catalog import SCL, Recipe
from minecube.grid import ALIGN_M, area_of, at_resolution, padded

MASK_M = 20
"""Pixel size of masks, the mission's of SCL."""
AHEAD = 2
"""Bands of 10 m, or as many bytes of coarser ones, that are read while the next is waited for."""
OPINION_BANDS = ("B03", "B04", "B08")
_OPINION_M = 480  # what a network sees around a pixel
_STEP_M = 240  # margins are multiples of this: of 60 m, and of the four SCL pixels that make a cell of the bright override


def in_mosaic_order(scenes: Sequence[pystac.Item], grid: GeoBox) -> list[pystac.Item]:
    """Scenes of the grid's zone first, since they need no resampling; then newest baseline, time and id: one order for all."""
    own = f"EPSG:{grid.crs.epsg}"

    def rank(scene: pystac.Item) -> tuple[Any, ...]:
        baseline = float(scene.properties["s2:processing_baseline"])
        return scene.properties["proj:code"] != own, -baseline, scene.datetime, scene.id

    return sorted(scenes, key=rank)


def days_of(scenes: Sequence[pystac.Item]) -> list[int]:
    """Index of each scene's overpass: its datatake, which all its tiles and granules share, and no other of that day."""
    days = [s.properties["minecube:datatake"] for s in scenes]
    index = {day: n for n, day in enumerate(sorted(set(days)))}
    return [index[day] for day in days]


def near(scenes: Sequence[pystac.Item], around: GeoBox) -> list[pystac.Item]:
    """The scenes whose footprint comes within a kilometre; published footprints are that coarse."""
    area = area_of(padded(around, 1000 // ALIGN_M * ALIGN_M))
    west, south, east, north = area.bounds

    def comes_near(scene: pystac.Item) -> bool:
        if scene.bbox and len(scene.bbox) == 4 and scene.bbox[0] <= scene.bbox[2]:  # not across the antimeridian
            left, bottom, right, top = scene.bbox
            if left > east or right < west or bottom > north or top < south:
                return False
        return bool(shapely.intersects(shapely.geometry.shape(scene.geometry), area))

    return [s for s in scenes if comes_near(s)]


def size_of(band: str, scenes: Sequence[pystac.Item]) -> int:
    """Pixel size in metres at which a band is read: the finest that a scene has; of SCL, that of masks."""
    if band == SCL:
        return MASK_M
    finest: int = min(s.assets[band].extra_fields["gsd"] for s in scenes)
    return finest


def margins_m(recipe: Recipe) -> tuple[int, int]:
    """How far beyond a block the haze test and the choice of a best pixel look, and how far the whole mask does, in metres.

    The first is of whole 60 m pixels, the second such that every block samples the same ones.
    """
    window = recipe.haze.window_m // 2 + MASK_M if recipe.haze else 0
    fringe = -(-max(window, 50 if recipe.best_pixel else 0) // ALIGN_M) * ALIGN_M
    reach = fringe + ALIGN_M + max((r.dilate_m + r.open_m for r in recipe.mask), default=0)
    reach += recipe.best_pixel.cloud_distance_m if recipe.best_pixel else 0
    reach += recipe.second_opinion.dilate_m + _OPINION_M if recipe.second_opinion else 0
    if recipe.bright_override:
        reach += 2 * recipe.bright_override.window_m + 8 * MASK_M
    return fringe, -(-reach // _STEP_M) * _STEP_M


def looked_at(recipe: Recipe) -> set[str]:
    """Bands that say which observations are used, and so are read before the others."""
    hazy = {"B02", "B04"} if recipe.haze or recipe.best_pixel else set()
    return hazy | ({"B04", "B08"} if recipe.reducer == "max-ndvi" else set())


def memory(scenes: Sequence[pystac.Item], box: GeoBox, recipe: Recipe) -> int:
    """Bytes that a block takes at its height, beside what the process has anyway.

    Of the mask's surroundings, SCL of each scene and a dozen bytes a day. Of the bands, those in hand: one, what is read ahead,
    and those that haze or a choice must see first; of a reducer that sees all bands at once, all.
    """
    fringe, margin = margins_m(recipe)
    days = len({s.properties["minecube:datatake"] for s in scenes})
    clear = min(days, recipe.max_clear_observations * 3 // 2) if recipe.max_clear_observations else days
    wide, inner = (math.prod(at_resolution(padded(box, m), MASK_M).shape) for m in (margin, fringe))
    by_band = [2 * math.prod(at_resolution(padded(box, fringe), size_of(b, scenes)).shape) for b in recipe.bands]
    together = recipe.reducer in ("geomedian", "medoid")
    held: int = sum(by_band)
    if not together:
        most = 2 * math.prod(padded(box, fringe).shape)
        held = min(held, (2 + AHEAD + 2 * bool(looked_at(recipe))) * most)
    a_day = 12 + 24 * bool(recipe.second_opinion) + 4 * bool(recipe.best_pixel)
    masks: int = len(scenes) * wide + days * wide * a_day + days * inner * 12 * bool(recipe.haze)
    return masks + clear * held


def connections(scenes: Sequence[pystac.Item], most: int) -> int:
    """Requests for pixels that may be in flight."""
    allowed: list[int] = [json.loads(s.properties["minecube:access"])["connections"] for s in scenes]
    return min([most, *allowed])
