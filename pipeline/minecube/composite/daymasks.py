"""Masks of a block's days: the source scene and the kind of each pixel."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pystac

from minecube.arrays import AnyArray, Bool, Float32, UInt8
from minecube.catalog import FALLBACKS, SCL, Recipe
from minecube.composite import masks
from minecube.composite.masks import CLEAR, crop
from minecube.composite.needs import MASK_M, compute_margins, index_overpasses
from minecube.composite.task import BlockTask
from minecube.composite.values import CUT_PX, HAS_STRIP
from minecube.grid import coarsen, pad
from minecube.reader import Ledger, start_read

SCL_IS = "minecube:scl"  # item property: error of a scene's whole classification, found by `scenes`


class Masks(NamedTuple):
    """Masks of some days, [day, y, x] at 20 m, of the block and its fringe."""

    owner: AnyArray
    """int8 or int16, index of the scene of a day's pixel, -1 = not observed."""
    kind: UInt8
    """As `masks.classify_day` returns it."""
    cloud_distance: Float32 | None
    """Metres from the day's nearest cloud, for recipes with a best pixel."""


class DayMasks:
    """The masks of a block's days, from SCL."""

    def __init__(self, task: BlockTask) -> None:
        scenes = task.scenes
        fringe, margin = compute_margins(task.recipe)
        self.days = index_overpasses(scenes)
        """Index of each scene's day."""
        of_days = [scenes[self.days.index(day)] for day in range(max(self.days) + 1)]
        self.times = [scene.datetime for scene in of_days if scene.datetime]
        """Time of each day's first scene."""
        self._task = task
        self._box = pad(task.box, margin)
        self._edge = (margin - fringe) // MASK_M
        self._seasons = [season_of(scene, task.recipe, task.year) for scene in of_days]
        self._scl: UInt8 | None = None

    def read(self) -> Masks:
        """Read SCL of all scenes and return the masks of all days."""
        rule = self._task.recipe.bright_override
        scenes = range(len(self._task.scenes))
        classes = self._read_classes(scenes, self._task.ledger)
        owner, scl = masks.mosaic_scenes(classes, self.days, self._edge)
        bright = masks.find_bright_ground(scl, rule) if rule else None
        if len(scl) < len(scenes):
            self._scl = scl  # `read_later` needs it
        return self._classify(owner, scl, bright, range(len(scl)))

    def read_later(self, scene: int) -> Masks | None:
        """Return the masks of one day, made of the day's scenes after this scene.

        Returns None if there are no later scenes. The other days stay unchanged. So missing data in
        other scenes does not affect these masks.
        """
        rule = self._task.recipe.bright_override
        day = self.days[scene]
        later = [n for n in range(scene + 1, len(self.days)) if self.days[n] == day]
        if not later or self._scl is None:
            return None
        ledger = self._task.ledger and self._task.ledger.for_repeats()
        one_day = [0] * len(later)
        classes = self._read_classes(later, ledger)
        position, scl = masks.mosaic_scenes(classes, one_day, self._edge)
        owner = np.where(position >= 0, np.array(later, dtype=np.int16)[position], np.int16(-1))
        bright = None
        if rule:
            all_days = self._scl.copy()
            all_days[day] = scl[0]
            bright = masks.find_bright_ground(all_days, rule)[day, None]
        return self._classify(owner, scl, bright, [day])

    def _classify(
        self, owner: AnyArray, scl: UInt8, bright: Bool | None, days: Sequence[int]
    ) -> Masks:
        """Classify days one by one, to need no memory beyond the result.

        `scl` and `bright` are [day, y, x] with the margin, and `owner` is without it.
        """
        recipe = self._task.recipe
        kind = np.empty(owner.shape, np.uint8)
        distance = np.empty(owner.shape, np.float32) if recipe.best_pixel else None
        for n, day in enumerate(days):
            bright_today = None if bright is None else bright[n]
            month = self.times[day].month
            whole = masks.classify_day(scl[n], bright_today, recipe, month, self._seasons[day])
            kind[n] = crop(whole, self._edge)
            if recipe.best_pixel and distance is not None:
                limit_m = recipe.best_pixel.cloud_distance_m
                distance[n] = crop(masks.measure_cloud_distance(whole, limit_m), self._edge)
        return Masks(owner, kind, distance)

    def _cut_edges(self, item: pystac.Item, scl: UInt8, ledger: Ledger | None) -> UInt8:
        """Cut off the edges of a scene's coverage, and count their pixels."""
        cut = masks.cut_edges(scl, CUT_PX)
        if ledger:
            margin_px = compute_margins(self._task.recipe)[1] // MASK_M
            struck = int(np.count_nonzero(crop(scl != cut, margin_px)))
            ledger.add(item.id, SCL, struck=struck)
        return cut

    def _read_classes(self, scenes: Sequence[int], ledger: Ledger | None) -> Iterator[UInt8]:
        """Yield the classes of each of these scenes, uint8 [y, x] at 20 m."""
        box = coarsen(self._box, MASK_M)
        items = [self._task.scenes[n] for n in scenes]
        reads = deque(start_read(item, SCL, box, ledger) for item in items)
        try:
            for item in items:
                scl = reads.popleft().result().astype(np.uint8)
                scl = masks.correct_classes(scl, item.properties.get(SCL_IS))
                if HAS_STRIP in item.properties:
                    scl = self._cut_edges(item, scl, ledger)
                yield scl
        finally:
            for read in reads:
                read.cancel()


def season_of(scene: pystac.Item, recipe: Recipe, year: int) -> int:
    """Return the kind of a scene's clear observations.

    The kind is clear or the matching fallback, or 255 if the recipe does not use the scene.
    """
    time = scene.datetime
    if time is None:
        return masks.UNUSABLE
    if time.month in recipe.months:
        if time.year == year:
            return CLEAR
        if "neighbour-year" in recipe.fallback:
            return FALLBACKS["neighbour-year"]
    elif time.year == year and time.month in recipe.wider_months:
        return FALLBACKS["wider-season"]
    return masks.UNUSABLE
