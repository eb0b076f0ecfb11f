"""Composite one block of one site-year: mask, read and reduce.

SCL is read first. Its margin covers every neighbourhood used by the mask. It decides the wanted
observations, and so the files and windows to read. Bands are read at their own pixel size on the
I/O threads, two bands ahead of the reducer. Each band is freed after its reduction, so only a few
bands are in memory.

All bands of an observation come from one scene. Rarely, a band has no data at a pixel seen by SCL,
and this is noticed during reading. Then the pixel goes to the next scene of the day. Without
another scene, the pixel loses the day. The block is then made again.

Reducers choosing a date look at two or three bands. If another band of the chosen date is black,
this band is read for the other dates as well. The pixel is then chosen again among the dates with
the fewest black bands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pystac
from odc.geo.geobox import GeoBox

from minecube.catalog import FALLBACKS, Recipe
from minecube.composite import masks, reducers
from minecube.composite.bands import Bands, Observations, UInt16, cropped, finer, masked, summed
from minecube.composite.daymasks import DayMasks, Opinion
from minecube.composite.masks import CLEAR, Bool, Float32, Int16, Int32, UInt8
from minecube.composite.needs import MASK_M, looked_at, margins_m, memory, near, size_of
from minecube.composite.reducers import Reducers
from minecube.grid import PIXEL_M, padded
from minecube.reader import Ledger

Days = npt.NDArray[np.intp]
Layers = dict[str, npt.NDArray[Any]]
BLOCK_BYTES = 1_000_000_000
"""Memory limit of a block in bytes. A block above it, due to many dates, is made in parts."""
_SMALLEST_PX = 48  # a block is not cut further
_STRIP_PX = 32  # rows per strip, a stack of all bands and dates
_BLACK = 1  # the stored value of reflectance that atmospheric correction made zero or negative
_CLEAR_KINDS = (CLEAR, FALLBACKS["wider-season"], FALLBACKS["neighbour-year"])


@dataclass(frozen=True)
class Tools:
    """Replacements for the defaults: GPU reducers, and a cloud network for a second opinion."""

    reducers: Reducers = reducers
    opinion: Opinion | None = None


def composite_block(
    scenes: Sequence[pystac.Item],
    box: GeoBox,
    recipe: Recipe,
    year: int,
    tools: Tools,
    ledger: Ledger | None = None,
) -> Layers:
    """Composite one block: `reflectance` uint16 [band, y, x], and the recipe's layers [y, x].

    Scenes must be in mosaic order. A block above `BLOCK_BYTES` is made in parts.
    """
    scenes = near(scenes, padded(box, margins_m(recipe)[1]))
    if not scenes:
        return _empty(box, recipe)
    if memory(scenes, box, recipe) > BLOCK_BYTES and max(box.shape) >= 2 * _SMALLEST_PX:
        axis = int(box.shape[1] >= box.shape[0])
        at = box.shape[axis] // 2 // 8 * 8
        halves = (box[:at], box[at:]) if axis == 0 else (box[:, :at], box[:, at:])
        made = [composite_block(scenes, half, recipe, year, tools, ledger) for half in halves]
        return {name: np.concatenate([m[name] for m in made], axis=axis - 2) for name in made[0]}
    block = _Block.of(scenes, box, recipe, year, tools, ledger)
    while (layers := block.made()) is None:
        pass  # each pass gives pixels to a later scene of their day, or removes the day
    return layers


def _empty(box: GeoBox, recipe: Recipe) -> Layers:
    made: Layers = {"reflectance": np.zeros((len(recipe.bands), *box.shape), np.uint16)}
    for name, layer in recipe.layers.items():
        made[name] = np.full(
            box.shape, np.nan if layer.dtype.startswith("float") else 0, layer.dtype
        )
    return made


class _Choice(NamedTuple):
    """The observations of a block and the rule for the best day."""

    observed: Bool
    """bool [day, y, x] at 10 m, the observations to choose from."""
    choose: Callable[[Bool], Int16]
    """Some of these observations -> index of the best day of each pixel, int16 [y, x], -1 =
    none."""


@dataclass(frozen=True)
class _Block:
    """A block with a finished mask. Arrays [day, y, x] are at 20 m and reach `fringe_m` beyond
    it."""

    of_mask: Observations
    away: Float32 | None
    """Metres from the day's nearest cloud, including clouds beyond the arrays; None without best
    pixel."""
    yeardays: npt.NDArray[np.int64]
    """Day of the year of each day."""
    day_masks: DayMasks
    box: GeoBox
    fringe_m: int
    recipe: Recipe
    tools: Tools
    ledger: Ledger | None

    @classmethod
    def of(
        cls,
        scenes: Sequence[pystac.Item],
        box: GeoBox,
        recipe: Recipe,
        year: int,
        tools: Tools,
        ledger: Ledger | None,
    ) -> _Block:
        """Read SCL and make the mask."""
        of_days = DayMasks(scenes, box, recipe, year, tools.opinion, ledger)
        made = of_days.all()
        yeardays = np.array([w.timetuple().tm_yday for w in of_days.when])
        observed = Observations(scenes, of_days.days, made.owner, made.kind)
        return cls(
            observed, made.away, yeardays, of_days, box, margins_m(recipe)[0], recipe, tools, ledger
        )

    def made(self) -> Layers | None:
        """Reduce the block.

        Returns None if a band has no data at a pixel seen by the mask. Such pixels now come from
        other scenes: reduce the block again.
        """
        recipe, out = self.recipe, _empty(self.box, self.recipe)
        kind = self.of_mask.kind
        use, quality = masks.chosen(kind, recipe)
        if most := recipe.max_clear_observations:
            enough = max(recipe.min_clear, -(-most // 3))
            use &= masks.clearest(kind, most, enough, self.yeardays.tolist()) | (kind != CLEAR)
        if not self.inside(use).any():
            return out
        first = [b for b in recipe.bands if b in looked_at(recipe)]
        ahead = Bands(self.of_mask, use, padded(self.box, self.fringe_m), self.ledger)
        bands = Bands(
            self.of_mask.inside(self.fringe_m // MASK_M), self.inside(use), self.box, self.ledger
        )
        try:
            ahead.read(first)
            bands.read([b for b in recipe.bands if b not in first])
            seen = {band: ahead.next() for band in first}
            excess = np.zeros(ahead.use.shape, dtype=np.int32)
            if recipe.haze:
                excess = 2 * summed(seen["B02"], self.size("B02")) - summed(
                    seen["B04"], self.size("B04")
                )
                left, quality, excess = masks.without_haze(excess, ahead.use, quality, recipe.haze)
                ahead.narrow(left)
                bands.narrow(self.inside(left[np.searchsorted(ahead.days, bands.days)]))
            use = bands.use
            count = np.where(np.isin(self.inside(quality), _CLEAR_KINDS), use.sum(axis=0), 0)
            out["clear_count"][:], out["quality"][:] = (
                finer(count, MASK_M),
                finer(self.inside(quality), MASK_M),
            )
            self._reduce(ahead, bands, seen, excess, out)
        finally:
            ahead.cancel()
            bands.cancel()
        if not self.of_mask.lacking:
            return out
        self._hand_on()
        return None

    def _hand_on(self) -> None:
        """Give pixels without data in a band to the day's next scene with SCL there."""
        of = self.of_mask
        for scene in sorted(of.lacking):  # in mosaic order, since a later scene may lack data, too
            day = of.day_of[scene]
            struck = (of.owner[day] == scene) & (of.kind[day] == 0)
            later = self.day_masks.of_later(scene)
            if later is None:
                of.owner[day][struck] = -1
                continue
            np.copyto(of.owner[day], later.owner[0], where=struck)
            np.copyto(of.kind[day], later.kind[0], where=struck)
            if self.away is not None and later.away is not None:
                np.copyto(self.away[day], later.away[0], where=struck)
        of.lacking.clear()

    def _reduce(
        self, ahead: Bands, bands: Bands, seen: dict[str, UInt16], excess: Int32, out: Layers
    ) -> None:
        how, percent, rows = self.tools.reducers, self.recipe.percentile, out["reflectance"]
        if self.recipe.reducer in ("median", "percentile"):
            for k, band, values in self._each(ahead, bands, seen):
                made = how.median(values) if percent is None else how.percentile(values, percent)
                rows[k] = finer(made, self.size(band))
                bands.spent(values, band)
        elif self.recipe.reducer == "geomedian":
            self._geomedian(list(self._each(ahead, bands, seen)), out)
        elif self.recipe.reducer == "medoid":
            everything = list(self._each(ahead, bands, seen))
            index = np.concatenate(
                [how.medoid(_one_of_two(stack)) for _, stack in self._strips(everything)]
            )
            self._taken(everything, index, bands, out)
        else:
            usable = bands.use
            index = self._best(ahead, bands, seen, excess)
            bands.narrow(usable & _where_chosen(index, len(bands.days)))
            self._taken(self._each(ahead, bands, dict(seen)), index, bands, out)
            self._replace_black(ahead, bands.days, usable, seen, excess, index, out)

    def _each(
        self, ahead: Bands, bands: Bands, seen: dict[str, UInt16]
    ) -> Iterator[tuple[int, str, UInt16]]:
        """Yield place, name and pixels [day, y, x] of each band, beginning with the bands read
        ahead."""
        names = self.recipe.bands
        for band in [*seen, *(b for b in names if b not in seen)]:
            values = (
                self._used(ahead, bands.days, bands.use, seen.pop(band), band)
                if band in seen
                else bands.next()
            )
            yield names.index(band), band, values

    def _used(self, ahead: Bands, days: Days, use: Bool, seen: UInt16, band: str) -> UInt16:
        """Copy the observations in use [day, y, x] from a band read ahead.

        The band read ahead has a fringe and contains more observations.
        """
        inside = np.ascontiguousarray(
            self.inside(seen, self.size(band))[np.searchsorted(ahead.days, days)]
        )
        return masked(inside, use, self.size(band), out=inside)

    def _strips(
        self, everything: Sequence[tuple[int, str, UInt16]]
    ) -> Iterator[tuple[slice, UInt16]]:
        """Yield strips of rows with all bands stacked: uint16 [band, day, y, x] at 10 m."""
        height, width = self.box.shape
        for top in range(0, height, _STRIP_PX):
            rows = slice(top, min(top + _STRIP_PX, height))
            stack = np.empty(
                (len(everything), len(everything[0][2]), rows.stop - top, width), dtype=np.uint16
            )
            for k, band, values in everything:
                scale = self.size(band) // PIXEL_M
                stack[k] = finer(values[:, top // scale : rows.stop // scale], self.size(band))
            yield rows, stack

    def _geomedian(self, everything: Sequence[tuple[int, str, UInt16]], out: Layers) -> None:
        for rows, stack in self._strips(everything):
            made = self.tools.reducers.geomedian(stack)
            out["reflectance"][:, rows] = made.reflectance
            for name in ("emad", "smad", "bcmad"):
                out[name][rows] = getattr(made, name)

    def _taken(
        self, each: Iterable[tuple[int, str, UInt16]], index: Int16, bands: Bands, out: Layers
    ) -> None:
        """Write the chosen day of each pixel to `out`."""
        out["day_of_year"][:] = np.where(index >= 0, self.yeardays[bands.days][index], 0)
        for k, band, values in each:
            out["reflectance"][k] = self.tools.reducers.taken(finer(values, self.size(band)), index)

    def _best(self, ahead: Bands, bands: Bands, seen: dict[str, UInt16], excess: Int32) -> Int16:
        """Choose the best day of each pixel: index int16 [y, x] at 10 m, -1 = none.

        Only days with the fewest black bands among `seen` are candidates.
        """
        choice = self._choice(ahead, bands.days, bands.use, seen, excess)
        black = self._black(ahead, bands.days, bands.use, seen)
        return choice.choose(
            choice.observed if black is None else _least_black(choice.observed, black)
        )

    def _choice(
        self, ahead: Bands, days: Days, use: Bool, seen: dict[str, UInt16], excess: Int32
    ) -> _Choice:
        """Rate the observations in use, bool [day, y, x] at 20 m."""
        how, rule = self.tools.reducers, self.recipe.best_pixel
        if rule is None or self.away is None:
            red, nir = (
                finer(self._used(ahead, days, use, seen[b], b), self.size(b))
                for b in ("B04", "B08")
            )
            return _Choice(red != 0, lambda some: how.max_ndvi(red * some, nir * some))
        same = np.searchsorted(ahead.days, days)
        hazy = (excess[same] / 8e4).astype(np.float32)
        sharp = finer(reducers.sharpness(seen["B04"][same]), self.size("B04"))
        score = reducers.best_pixel_score(
            self.yeardays[days], finer(self.away[days], MASK_M), finer(hazy, MASK_M), sharp, rule
        )
        inside = self.inside(score, PIXEL_M)
        return _Choice(finer(use, MASK_M), lambda some: how.best_pixel(inside, some))

    def _black(self, ahead: Bands, days: Days, use: Bool, seen: dict[str, UInt16]) -> UInt8 | None:
        """Count the black bands of each observation among `seen`.

        Returns uint8 [day, y, x] at 10 m, or None if all counts are 0.
        """
        count: UInt8 | None = None
        for band, values in seen.items():
            if not (values == _BLACK).any():
                continue
            black = self._used(ahead, days, use, values, band) == _BLACK
            if black.any():
                fine = finer(black, self.size(band)).astype(np.uint8)
                count = fine if count is None else count + fine
        return count

    def _replace_black(
        self,
        ahead: Bands,
        days: Days,
        usable: Bool,
        seen: dict[str, UInt16],
        excess: Int32,
        index: Int16,
        out: Layers,
    ) -> None:
        """Choose again if the chosen day is black in a band not in `seen` before the choice.

        The band is then read for all usable days there. Each pixel ends with the best of its days
        with the fewest black bands. A choice without black in further bands cannot lose to another
        day when further bands are counted.
        """
        asked: dict[str, Bool] = {}
        choice: _Choice | None = None
        count: UInt8 | None = None
        while not self.of_mask.lacking:  # otherwise the block is made again in any case
            doubted: dict[str, Bool] = {}
            for band, values in zip(self.recipe.bands, out["reflectance"], strict=True):
                if band not in seen and (black := values == _BLACK).any():
                    before = asked.setdefault(band, np.zeros(usable.shape[1:], dtype=np.bool_))
                    where = _any_of_four(black) & (usable.sum(axis=0) > 1) & ~before
                    if where.any():
                        doubted[band] = where
                        asked[band] = before | where
            if not doubted:
                return
            choice = choice or self._choice(ahead, days, usable, seen, excess)
            if count is None:
                count = self._black(ahead, days, usable, seen)
            if count is None:
                count = np.zeros(choice.observed.shape, dtype=np.uint8)
            for band, where in doubted.items():
                asking = self._bands(days, usable & where)
                try:
                    asking.read([band])
                    count[np.searchsorted(days, asking.days)] += finer(
                        asking.next() == _BLACK, self.size(band)
                    )
                finally:
                    asking.cancel()
            if self.of_mask.lacking:
                return
            better = choice.choose(_least_black(choice.observed, count))
            self._take_again(
                ahead, days, usable, seen, np.where(better == index, np.int16(-1), better), out
            )
            index = better

    def _take_again(
        self,
        ahead: Bands,
        days: Days,
        usable: Bool,
        seen: dict[str, UInt16],
        index: Int16,
        out: Layers,
    ) -> None:
        """Replace the pixels with an index, int16 [y, x] at 10 m, by the pixels of the indexed
        day."""
        changed = index >= 0
        if not changed.any():
            return
        taken = self._bands(days, usable & _where_chosen(index, len(days)))
        try:
            taken.read([b for b in self.recipe.bands if b not in seen])
            place = np.full(len(days), -1, dtype=np.int16)
            place[np.searchsorted(days, taken.days)] = np.arange(len(taken.days))
            made = _empty(self.box, self.recipe)
            index = np.where(changed, place[index], -1).astype(np.int16)
            self._taken(self._each(ahead, taken, dict(seen)), index, taken, made)
        finally:
            taken.cancel()
        for name in ("reflectance", "day_of_year"):
            np.copyto(out[name], made[name], where=changed)

    def _bands(self, days: Days, use: Bool) -> Bands:
        """Open the bands of these days for the observations in use, bool [day, y, x] at 20 m."""
        of = self.of_mask.inside(self.fringe_m // MASK_M)
        everything = np.zeros(of.kind.shape, dtype=np.bool_)
        everything[days] = use
        return Bands(of, everything, self.box, self.ledger)

    def size(self, band: str) -> int:
        """Return the pixel size in metres for reading a band."""
        return size_of(band, self.of_mask.scenes)

    def inside(self, pixels: npt.NDArray[Any], size_m: int = MASK_M) -> npt.NDArray[Any]:
        """Remove the fringe from pixels of the given size."""
        return cropped(pixels, self.fringe_m // size_m)


def _least_black(use: Bool, count: UInt8) -> Bool:
    """Return the observations in use with the fewest black bands, bool [day, y, x].

    Atmospheric correction can make reflectance negative; it is stored as 1. In blue this value
    looks free of haze, in red it looks full of leaves. Deep water is black on all days, so all its
    days remain.
    """
    if not len(use):
        return use
    ranked = np.where(use, count, np.uint8(255))
    least: Bool = use & (ranked == ranked.min(axis=0))
    return least


def _one_of_two(stack: UInt16) -> UInt16:
    """Remove, in place, one of two observations if more of its bands are black.

    The medoid of two observations is either of them. Among three or more, a day with unusual black
    is far from the others. `stack` is uint16 [band, day, y, x].
    """
    seen = stack[0] != 0
    two = seen.sum(axis=0, dtype=np.int16) == 2
    if two.any():
        least = _least_black(seen, (stack == _BLACK).sum(axis=0, dtype=np.uint8))
        stack *= np.logical_or(least, ~two)
    return stack


def _any_of_four(flags: Bool) -> Bool:
    """Flag the 20 m pixels [..., y, x] with a flag in any of their four 10 m pixels."""
    *lead, height, width = flags.shape
    four: Bool = np.logical_or.reduce(
        flags.reshape(*lead, height // 2, 2, width // 2, 2), axis=(-3, -1)
    )
    return four


def _where_chosen(index: Int16, days: int) -> Bool:
    """Flag the days [day, y, x] at 20 m chosen by any of a pixel's 10 m pixels."""
    return np.stack([_any_of_four(index == day) for day in range(days)])
