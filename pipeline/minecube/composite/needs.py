"""Needs of a block before any pixel is read: scenes, margins, memory."""

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
"""Pixel size of masks: the mission's size of SCL."""
AHEAD = 2
"""Bands of 10 m, or as many bytes of coarser bands, read ahead of the next one."""
OPINION_BANDS = ("B03", "B04", "B08")
_OPINION_M = 480  # reach of a network around a pixel
_STEP_M = 240  # unit of margins: a multiple of 60 m and of the 80 m cells of the bright override


def in_mosaic_order(scenes: Sequence[pystac.Item], grid: GeoBox) -> list[pystac.Item]:
    """Sort scenes: the grid's zone first, then newest baseline, time and id.

    Scenes of the grid's zone need no resampling. The order is the same for all blocks.
    """
    own = f"EPSG:{grid.crs.epsg}"

    def rank(scene: pystac.Item) -> tuple[Any, ...]:
        baseline = float(scene.properties["s2:processing_baseline"])
        return scene.properties["proj:code"] != own, -baseline, scene.datetime, scene.id

    return sorted(scenes, key=rank)


def days_of(scenes: Sequence[pystac.Item]) -> list[int]:
    """Return the index of each scene's overpass.

    An overpass is a datatake, shared by all its tiles and granules. Another overpass of the same
    day has another datatake.
    """
    days = [s.properties["minecube:datatake"] for s in scenes]
    index = {day: n for n, day in enumerate(sorted(set(days)))}
    return [index[day] for day in days]


def near(scenes: Sequence[pystac.Item], around: GeoBox) -> list[pystac.Item]:
    """Select the scenes with a footprint within a kilometre.

    Published footprints are only this accurate.
    """
    area = area_of(padded(around, 1000 // ALIGN_M * ALIGN_M))
    west, south, east, north = area.bounds

    def comes_near(scene: pystac.Item) -> bool:
        if (
            scene.bbox and len(scene.bbox) == 4 and scene.bbox[0] <= scene.bbox[2]
        ):  # not across the antimeridian
            left, bottom, right, top = scene.bbox
            if left > east or right < west or bottom > north or top < south:
                return False
        return bool(shapely.intersects(shapely.geometry.shape(scene.geometry), area))

    return [s for s in scenes if comes_near(s)]


def size_of(band: str, scenes: Sequence[pystac.Item]) -> int:
    """Return the pixel size in metres for reading a band.

    This is the finest size among the scenes, and for SCL the size of masks.
    """
    if band == SCL:
        return MASK_M
    finest: int = min(s.assets[band].extra_fields["gsd"] for s in scenes)
    return finest


def margins_m(recipe: Recipe) -> tuple[int, int]:
    """Compute the margins around a block in metres: the fringe, and the margin of the mask.

    The fringe serves the haze test and the choice of a best pixel. It is a multiple of 60 m. The
    margin of the mask is a multiple of 240 m, so every block samples the same pixels.
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
    """Return the bands deciding the used observations; they are read before the others."""
    hazy = {"B02", "B04"} if recipe.haze or recipe.best_pixel else set()
    return hazy | ({"B04", "B08"} if recipe.reducer == "max-ndvi" else set())


def memory(scenes: Sequence[pystac.Item], box: GeoBox, recipe: Recipe) -> int:
    """Estimate the peak memory of a block in bytes, on top of the process's own memory.

    The mask needs one SCL layer per scene plus about 12 bytes per pixel and day, margin included.
    The bands in memory are the current one, those read ahead, and those for the haze test or pixel
    choice. Geomedian and medoid need all bands.
    """
    fringe, margin = margins_m(recipe)
    days = len({s.properties["minecube:datatake"] for s in scenes})
    clear = (
        min(days, recipe.max_clear_observations * 3 // 2) if recipe.max_clear_observations else days
    )
    wide, inner = (math.prod(at_resolution(padded(box, m), MASK_M).shape) for m in (margin, fringe))
    by_band = [
        2 * math.prod(at_resolution(padded(box, fringe), size_of(b, scenes)).shape)
        for b in recipe.bands
    ]
    together = recipe.reducer in ("geomedian", "medoid")
    held: int = sum(by_band)
    if not together:
        most = 2 * math.prod(padded(box, fringe).shape)
        held = min(held, (2 + AHEAD + 2 * bool(looked_at(recipe))) * most)
    a_day = 12 + 24 * bool(recipe.second_opinion) + 4 * bool(recipe.best_pixel)
    masks: int = len(scenes) * wide + days * wide * a_day + days * inner * 12 * bool(recipe.haze)
    return masks + clear * held


def connections(scenes: Sequence[pystac.Item], most: int) -> int:
    """Return the maximum number of simultaneous pixel requests."""
    allowed: list[int] = [
        json.loads(s.properties["minecube:access"])["connections"] for s in scenes
    ]
    return min([most, *allowed])
