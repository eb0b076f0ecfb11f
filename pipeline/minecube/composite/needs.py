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
from minecube.grid import ALIGN_M, area_of, coarsen, pad
from minecube.network import is_local

MASK_M = 20
"""Pixel size of masks: the mission's size of SCL."""
AHEAD = 1
"""Bands, or strips of them, read ahead of the next one over a network. Small ones are read farther
ahead."""
LEAST_CUT_PX = 2**24
"""Bands of fewer pixels and days, 32 MB, are not cut into strips."""
_BUFFER_BYTES = 2**24
"""Buffers of reads and reducers."""
_STEP_M = 240  # unit of margins: a multiple of 60 m and of the 80 m cells of the bright override


def sort_in_mosaic_order(scenes: Sequence[pystac.Item], grid: GeoBox) -> list[pystac.Item]:
    """Sort scenes: the grid's zone first, then newest baseline, time and id.

    Scenes of the grid's zone need no resampling. The order is the same for all blocks.
    """
    grid_zone = f"EPSG:{grid.crs.epsg}"

    def rank(scene: pystac.Item) -> tuple[Any, ...]:
        baseline = float(scene.properties["s2:processing_baseline"])
        return scene.properties["proj:code"] != grid_zone, -baseline, scene.datetime, scene.id

    return sorted(scenes, key=rank)


def index_overpasses(scenes: Sequence[pystac.Item]) -> list[int]:
    """Return the index of each scene's overpass.

    An overpass is a datatake, shared by all its tiles and granules. Another overpass of the same
    day has another datatake.
    """
    days = [s.properties["minecube:datatake"] for s in scenes]
    index = {day: n for n, day in enumerate(sorted(set(days)))}
    return [index[day] for day in days]


def scenes_near(scenes: Sequence[pystac.Item], grid: GeoBox) -> list[pystac.Item]:
    """Select the scenes with a footprint within a kilometre of a grid.

    Published footprints are only this accurate.
    """
    area = area_of(pad(grid, 1000 // ALIGN_M * ALIGN_M))
    west, south, east, north = area.bounds

    def comes_near(scene: pystac.Item) -> bool:
        box = scene.bbox
        if box and len(box) == 4 and box[0] <= box[2]:  # not across the antimeridian
            box_west, box_south, box_east, box_north = box
            if box_west > east or box_east < west or box_south > north or box_north < south:
                return False
        return bool(shapely.intersects(shapely.geometry.shape(scene.geometry), area))

    return [scene for scene in scenes if comes_near(scene)]


def pixel_size_of(band: str, scenes: Sequence[pystac.Item]) -> int:
    """Return the pixel size in metres for reading a band.

    This is the finest size among the scenes, and for SCL the size of masks.
    """
    if band == SCL:
        return MASK_M
    finest: int = min(s.assets[band].extra_fields["gsd"] for s in scenes)
    return finest


def compute_margins(recipe: Recipe) -> tuple[int, int]:
    """Compute the margins around a block in metres: the fringe, and the margin of the mask.

    The fringe serves the haze test and the choice of a best pixel. It is a multiple of 60 m. The
    margin of the mask is a multiple of 240 m, so every block samples the same pixels.
    """
    fringe = 0
    if recipe.haze:
        fringe = recipe.haze.window_m // 2 + MASK_M
    if recipe.best_pixel:
        fringe = max(fringe, 50)
    fringe = _round_up(fringe, ALIGN_M)
    margin = fringe + ALIGN_M
    margin += max((rule.dilate_m + rule.open_m for rule in recipe.mask), default=0)
    if recipe.best_pixel:
        margin += recipe.best_pixel.cloud_distance_m
    if recipe.bright_override:
        margin += 2 * recipe.bright_override.window_m + 8 * MASK_M
    return fringe, _round_up(margin, _STEP_M)


def _round_up(length_m: int, step_m: int) -> int:
    return -(-length_m // step_m) * step_m


def are_cut(recipe: Recipe) -> bool:
    """Test if bands are reduced strip by strip: medians alone need one band at a time."""
    return recipe.reducer == "median" and not recipe.best_pixel


def bands_with_fringe(recipe: Recipe) -> set[str]:
    """Return the bands deciding the used observations: they are read before the others."""
    if recipe.haze or recipe.best_pixel:
        return {"B02", "B04"}
    return set()


def count_ahead(scenes: Sequence[pystac.Item]) -> int:
    """Return the number of bands, or strips, to read ahead of the next one.

    Local files need none: while a strip is reduced, the next one is read in any case.
    """
    hrefs = (asset.href for scene in scenes for asset in scene.assets.values())
    return 0 if all(map(is_local, hrefs)) else AHEAD


def estimate_memory(scenes: Sequence[pystac.Item], box: GeoBox, recipe: Recipe) -> int:
    """Estimate the peak memory of a block in bytes, on top of the process's own memory.

    It is the larger of two stages. The masks need each scene's SCL and 6 bytes per pixel and day,
    margin included. The bands in memory are the current one, those read ahead, and those for the
    haze test or the best pixel. The geomedian needs all bands. Strips are taken for whole bands,
    and all days for used ones. So most blocks need less.
    """
    fringe, margin = compute_margins(recipe)
    days = len({s.properties["minecube:datatake"] for s in scenes})
    with_margin: int = math.prod(coarsen(pad(box, margin), MASK_M).shape)
    of_masks = (2 * len(scenes) + 6 * days) * with_margin
    with_fringe: int = math.prod(coarsen(pad(box, fringe), MASK_M).shape)
    bytes_per_pixel = 5 + 8 * bool(recipe.haze) + 4 * bool(recipe.best_pixel)
    days_read = days
    if recipe.max_clear_observations:
        days_read = min(days, recipe.max_clear_observations * 3 // 2)
    of_bands = days * with_fringe * bytes_per_pixel
    of_bands += days_read * _estimate_band_bytes(scenes, pad(box, fringe), recipe)
    of_layers: int = 2 * len(recipe.bands) * math.prod(box.shape)
    return _BUFFER_BYTES + of_layers + max(of_masks, of_bands)


def _estimate_band_bytes(scenes: Sequence[pystac.Item], box: GeoBox, recipe: Recipe) -> int:
    """Return the bytes per day of the bands in memory at a time."""
    all_bands: int = 0
    for band in recipe.bands:
        all_bands += 2 * math.prod(coarsen(box, pixel_size_of(band, scenes)).shape)
    if recipe.reducer == "geomedian":
        return all_bands
    largest_band: int = 2 * math.prod(box.shape)
    at_a_time = 2 + count_ahead(scenes) + 2 * bool(bands_with_fringe(recipe))
    of_scores = 4 * largest_band * bool(recipe.best_pixel)
    return of_scores + min(all_bands, at_a_time * largest_band)


def count_connections(scenes: Sequence[pystac.Item], limit: int) -> int:
    """Return the maximum number of simultaneous pixel requests."""
    access = [json.loads(scene.properties["minecube:access"]) for scene in scenes]
    allowed: list[int] = [of_scene["connections"] for of_scene in access]
    return min([limit, *allowed])
