"""Masks of a block's days: the source scene and the kind of each pixel."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pystac
from odc.geo.geobox import GeoBox

from minecube.catalog import FALLBACKS, SCL, Recipe
from minecube.composite import masks
from minecube.composite.bands import UInt16, cropped, finer
from minecube.composite.masks import CLEAR, Float32, Int16, UInt8
from minecube.composite.needs import MASK_M, OPINION_BANDS, days_of, margins_m
from minecube.grid import at_resolution, padded
from minecube.reader import Ledger, begin

Opinion = Callable[[UInt16], UInt8]
"""A second mask of one date: B03, B04, B08, uint16 [3, y, x] at 10 m, x 10000 -> classes uint8
[y, x], 0 = clear."""
SCL_IS = "minecube:scl"  # item property: error of a scene's whole classification, found by `scenes`


class Masks(NamedTuple):
    """Masks of some days, [day, y, x] at 20 m, of the block and its fringe."""

    owner: Int16
    """Index of the scene of a day's pixel, -1 = not observed."""
    kind: UInt8
    """As `masks.kinds` returns it."""
    away: Float32 | None
    """Metres from the day's nearest cloud, for recipes with a best pixel."""


class DayMasks:
    """The masks of a block's days, from SCL.

    Args:
        scenes: Scenes near the block, in mosaic order.
        box: The block, at 10 m.
        recipe: Mask rules and margins.
        year: The composite's year.
        opinion: A second mask.
        ledger: Counts the reads.
    """

    def __init__(
        self,
        scenes: Sequence[pystac.Item],
        box: GeoBox,
        recipe: Recipe,
        year: int,
        opinion: Opinion | None,
        ledger: Ledger | None,
    ) -> None:
        fringe, margin = margins_m(recipe)
        self.days = days_of(scenes)
        """Index of each scene's day."""
        first = [scenes[self.days.index(day)] for day in range(max(self.days) + 1)]
        self.when = [s.datetime for s in first if s.datetime]
        """Time of each day's first scene."""
        self._scenes, self._wide, self._edge = (
            scenes,
            padded(box, margin),
            (margin - fringe) // MASK_M,
        )
        self._recipe, self._opinion, self._ledger = recipe, opinion, ledger
        self._seasons = [season(s, recipe, year) for s in first]
        self._scl: UInt8 | None = None

    def all(self) -> Masks:
        """Read SCL of all scenes and return the masks of all days."""
        owner, scl = masks.mosaic(self._classes(range(len(self._scenes)), self._ledger), self.days)
        opinion = self._opinions(range(len(self._scenes)), self.days, owner, self._ledger)
        kind = masks.kinds(scl, self._recipe, [w.month for w in self.when], self._seasons, opinion)
        self._scl = scl if len(scl) < len(self._scenes) else None  # `of_later` needs it
        return self._cropped(owner, kind)

    def of_later(self, scene: int) -> Masks | None:
        """Return the masks of one day, made of the day's scenes after this scene.

        Returns None if there are no later scenes. The other days stay unchanged. So missing data in
        other scenes does not affect these masks.
        """
        day = self.days[scene]
        later = [n for n in range(scene + 1, len(self.days)) if self.days[n] == day]
        if not later or self._scl is None:
            return None
        ledger = self._ledger.repeated() if self._ledger else None
        found, scl = masks.mosaic(self._classes(later, ledger), [0] * len(later))
        owner = np.where(found >= 0, np.array(later, dtype=np.int16)[found], np.int16(-1))
        opinion = self._opinions(later, [0] * len(later), owner, ledger)
        bright, override = None, self._recipe.bright_override
        if override:
            everything = self._scl.copy()
            everything[day] = scl[0]
            bright = masks.persistently_bright(everything, override)[day]
        second = None if opinion is None else opinion[0]
        month = self.when[day].month
        kind = masks.kinds_of_day(scl[0], bright, self._recipe, month, self._seasons[day], second)
        return self._cropped(owner, kind[None])

    def _cropped(self, owner: Int16, kind: UInt8) -> Masks:
        best = self._recipe.best_pixel
        away = (
            cropped(masks.cloud_distance_m(kind, best.cloud_distance_m), self._edge).copy()
            if best
            else None
        )
        return Masks(cropped(owner, self._edge).copy(), cropped(kind, self._edge).copy(), away)

    def _classes(self, scenes: Sequence[int], ledger: Ledger | None) -> Iterator[UInt8]:
        """Yield the classes of each of these scenes, uint8 [y, x] at 20 m."""
        of_scl = at_resolution(self._wide, MASK_M)
        reads = deque(begin(self._scenes[n], SCL, of_scl, ledger) for n in scenes)
        try:
            for n in scenes:
                yield masks.corrected(
                    reads.popleft().result().astype(np.uint8),
                    self._scenes[n].properties.get(SCL_IS),
                )
        finally:
            for read in reads:
                read.cancel()

    def _opinions(
        self, scenes: Sequence[int], days: Sequence[int], owner: Int16, ledger: Ledger | None
    ) -> UInt8 | None:
        """Compute the second mask of each day: uint8 [day, y, x] at 20 m; None without an opinion.

        A value is the highest class among the four 10 m pixels.
        """
        if self._opinion is None:
            return None
        reads = {
            n: [begin(self._scenes[n], b, self._wide, ledger) for b in OPINION_BANDS]
            for n in scenes
        }
        out = np.zeros(owner.shape, dtype=np.uint8)
        try:
            for day, of_day in enumerate(owner):
                image = np.zeros((len(OPINION_BANDS), *self._wide.shape), dtype=np.uint16)
                for scene in (n for n, d in zip(scenes, days, strict=True) if d == day):
                    where = finer(of_day == scene, MASK_M)
                    for layer, read in zip(image, reads[scene], strict=True):
                        np.copyto(layer, read.result(), where=where)
                out[day] = (
                    self._opinion(image)
                    .reshape(owner.shape[1], 2, owner.shape[2], 2)
                    .max(axis=(1, 3))
                )
        finally:
            for read in (r for of_scene in reads.values() for r in of_scene):
                read.cancel()
        return out


def season(scene: pystac.Item, recipe: Recipe, year: int) -> int:
    """Return the kind of a scene's clear observations.

    The kind is clear or the matching fallback, or 255 if the recipe does not use the scene.
    """
    when = scene.datetime
    if when and when.month in recipe.months:
        neighbour = (
            FALLBACKS["neighbour-year"] if "neighbour-year" in recipe.fallback else masks.UNUSABLE
        )
        return CLEAR if when.year == year else neighbour
    wider = when and when.year == year and when.month in recipe.wider_months
    return FALLBACKS["wider-season"] if wider else masks.UNUSABLE
