"""Masks of a block's days: the source scene and the kind of each pixel."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pystac

from minecube.arrays import Float32, Int16, UInt8
from minecube.catalog import FALLBACKS, SCL, Recipe
from minecube.composite import masks
from minecube.composite.bands import crop
from minecube.composite.masks import CLEAR
from minecube.composite.needs import MASK_M, compute_margins, index_overpasses
from minecube.composite.task import BlockTask
from minecube.grid import coarsen, pad
from minecube.reader import Ledger, start_read

SCL_IS = "minecube:scl"  # item property: error of a scene's whole classification, found by `scenes`


class Masks(NamedTuple):
    """Masks of some days, [day, y, x] at 20 m, of the block and its fringe."""

    owner: Int16
    """Index of the scene of a day's pixel, -1 = not observed."""
    kind: UInt8
    """As `masks.classify` returns it."""
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
        recipe = self._task.recipe
        scenes = range(len(self._task.scenes))
        classes = self._read_classes(scenes, self._task.ledger)
        owner, scl = masks.mosaic_scenes(classes, self.days)
        months = [time.month for time in self.times]
        kind = masks.classify(scl, recipe, months, self._seasons)
        if len(scl) < len(scenes):
            self._scl = scl  # `read_later` needs it
        return self._crop(owner, kind)

    def read_later(self, scene: int) -> Masks | None:
        """Return the masks of one day, made of the day's scenes after this scene.

        Returns None if there are no later scenes. The other days stay unchanged. So missing data in
        other scenes does not affect these masks.
        """
        recipe = self._task.recipe
        day = self.days[scene]
        later = [n for n in range(scene + 1, len(self.days)) if self.days[n] == day]
        if not later or self._scl is None:
            return None
        ledger = self._task.ledger and self._task.ledger.for_repeats()
        one_day = [0] * len(later)
        position, scl = masks.mosaic_scenes(self._read_classes(later, ledger), one_day)
        owner = np.where(position >= 0, np.array(later, dtype=np.int16)[position], np.int16(-1))
        bright = None
        if recipe.bright_override:
            all_days = self._scl.copy()
            all_days[day] = scl[0]
            bright = masks.find_bright_ground(all_days, recipe.bright_override)[day]
        month = self.times[day].month
        kind = masks.classify_day(scl[0], bright, recipe, month, self._seasons[day])
        return self._crop(owner, kind[None])

    def _crop(self, owner: Int16, kind: UInt8) -> Masks:
        cloud_distance = None
        if self._task.recipe.best_pixel:
            limit_m = self._task.recipe.best_pixel.cloud_distance_m
            cloud_distance = crop(masks.measure_cloud_distance(kind, limit_m), self._edge).copy()
        return Masks(crop(owner, self._edge).copy(), crop(kind, self._edge).copy(), cloud_distance)

    def _read_classes(self, scenes: Sequence[int], ledger: Ledger | None) -> Iterator[UInt8]:
        """Yield the classes of each of these scenes, uint8 [y, x] at 20 m."""
        box = coarsen(self._box, MASK_M)
        items = [self._task.scenes[n] for n in scenes]
        reads = deque(start_read(item, SCL, box, ledger) for item in items)
        try:
            for item in items:
                scl = reads.popleft().result().astype(np.uint8)
                yield masks.correct_classes(scl, item.properties.get(SCL_IS))
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
