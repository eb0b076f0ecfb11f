"""One block of one site-year: masked, read and reduced. All that is computed when a composite is.

SCL comes first, with a margin as wide as any neighbourhood the mask looks at. It says which observations are wanted, and so
which files, and which window of each. Bands are read in their own pixels on the I/O threads, two bands ahead of the one that is
being reduced, and are gone once they are: memory is that of a few bands, not of all.

All bands of an observation come from one scene. A band rarely has no data where SCL has some, so this is noticed while reading.
Then the pixel goes to the next scene of that day, or loses the day if there is no other, and the block is made again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pystac
from odc.geo.geobox import GeoBox

from minecube.catalog import FALLBACKS, Recipe
from minecube.composite import masks, reducers
from minecube.composite.bands import Bands, Observations, UInt16, cropped, finer, masked, summed
from minecube.composite.daymasks import DayMasks, Opinion
from minecube.composite.masks import CLEAR, Bool, Float32, Int16, Int32
from minecube.composite.needs import MASK_M, looked_at, margins_m, memory, near, size_of
from minecube.composite.reducers import Reducers
from minecube.grid import PIXEL_M, padded
from minecube.reader import Ledger

Layers = dict[str, npt.NDArray[Any]]
BLOCK_BYTES = 1_000_000_000
"""Memory a block may take; one that would take more, for the number of its dates, is made in parts."""
_SMALLEST_PX = 48  # a block is not cut further
_STRIP_PX = 32  # rows whose bands of all dates are laid side by side at a time
_CLEAR_KINDS = (CLEAR, FALLBACKS["wider-season"], FALLBACKS["neighbour-year"])


@dataclass(frozen=True)
class Tools:
    """What a block is worked with, if not with what is here: reducers for a GPU, a network that looks at clouds."""

    reducers: Reducers = reducers
    opinion: Opinion | None = None


def composite_block(
    scenes: Sequence[pystac.Item], box: GeoBox, recipe: Recipe, year: int, tools: Tools, ledger: Ledger | None = None
) -> Layers:
    """One block: `reflectance` uint16 [band, y, x], and the recipe's layers [y, x]. Scenes must be in mosaic order.

    One of so many dates that it would take more than `BLOCK_BYTES` is made in parts.
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
        pass  # each time, pixels went to a later scene of their day, or lost that day
    return layers


def _empty(box: GeoBox, recipe: Recipe) -> Layers:
    made: Layers = {"reflectance": np.zeros((len(recipe.bands), *box.shape), np.uint16)}
    for name, layer in recipe.layers.items():
        made[name] = np.full(box.shape, np.nan if layer.dtype.startswith("float") else 0, layer.dtype)
    return made


@dataclass(frozen=True)
class _Block:
    """A block whose mask is made. Arrays [day, y, x] are at 20 m and reach `fringe_m` beyond the block."""

    of_mask: Observations
    away: Float32 | None
    """Where a best pixel is chosen: metres from the day's nearest cloud, of those beyond the arrays, too."""
    yeardays: npt.NDArray[np.int64]
    """Of each day, its day of the year."""
    day_masks: DayMasks
    box: GeoBox
    fringe_m: int
    recipe: Recipe
    tools: Tools
    ledger: Ledger | None

    @classmethod
    def of(
        cls, scenes: Sequence[pystac.Item], box: GeoBox, recipe: Recipe, year: int, tools: Tools, ledger: Ledger | None
    ) -> _Block:
        """Read SCL and make the mask."""
        of_days = DayMasks(scenes, box, recipe, year, tools.opinion, ledger)
        made = of_days.all()
        yeardays = np.array([w.timetuple().tm_yday for w in of_days.when])
        observed = Observations(scenes, of_days.days, made.owner, made.kind)
        return cls(observed, made.away, yeardays, of_days, box, margins_m(recipe)[0], recipe, tools, ledger)

    def made(self) -> Layers | None:
        """Reduce the block.

        Returns None if a band has no data where the mask saw some. Such pixels now come from other scenes: reduce it again.
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
        bands = Bands(self.of_mask.inside(self.fringe_m // MASK_M), self.inside(use), self.box, self.ledger)
        try:
            ahead.read(first)
            bands.read([b for b in recipe.bands if b not in first])
            seen = {band: ahead.next() for band in first}
            excess = np.zeros(ahead.use.shape, dtype=np.int32)
            if recipe.haze:
                excess = 2 * summed(seen["B02"], self.size("B02")) - summed(seen["B04"], self.size("B04"))
                left, quality, excess = masks.without_haze(excess, ahead.use, quality, recipe.haze)
                ahead.narrow(left)
                bands.narrow(self.inside(left[np.searchsorted(ahead.days, bands.days)]))
            use = bands.use
            count = np.where(np.isin(self.inside(quality), _CLEAR_KINDS), use.sum(axis=0), 0)
            out["clear_count"][:], out["quality"][:] = finer(count, MASK_M), finer(self.inside(quality), MASK_M)
            self._reduce(ahead, bands, seen, excess, out)
        finally:
            ahead.cancel()
            bands.cancel()
        if not self.of_mask.lacking:
            return out
        self._hand_on()
        return None

    def _hand_on(self) -> None:
        """Give pixels in which a band of their scene has no data to the next scene of the day that has SCL there."""
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

    def _reduce(self, ahead: Bands, bands: Bands, seen: dict[str, UInt16], excess: Int32, out: Layers) -> None:
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
            index = np.concatenate([how.medoid(stack) for _, stack in self._strips(everything)])
            self._taken(everything, index, bands, out)
        else:
            index = self._best(ahead, bands, seen, excess)
            bands.narrow(bands.use & _where_chosen(index, len(bands.days)))
            self._taken(self._each(ahead, bands, seen), index, bands, out)

    def _each(self, ahead: Bands, bands: Bands, seen: dict[str, UInt16]) -> Iterator[tuple[int, str, UInt16]]:
        """Place, name and pixels [day, y, x] of each band, those first that were seen already."""
        names = self.recipe.bands
        for band in [*seen, *(b for b in names if b not in seen)]:
            values = self._used(ahead, bands, seen.pop(band), band) if band in seen else bands.next()
            yield names.index(band), band, values

    def _used(self, ahead: Bands, bands: Bands, seen: UInt16, band: str) -> UInt16:
        """Of a band that was read ahead, and so with more than is used now, what `bands` would give: a copy."""
        inside = np.ascontiguousarray(self.inside(seen, self.size(band))[np.searchsorted(ahead.days, bands.days)])
        return masked(inside, bands.use, self.size(band), out=inside)

    def _strips(self, everything: Sequence[tuple[int, str, UInt16]]) -> Iterator[tuple[slice, UInt16]]:
        """Rows of the block, and all bands of them side by side: uint16 [band, day, y, x] at 10 m."""
        height, width = self.box.shape
        for top in range(0, height, _STRIP_PX):
            rows = slice(top, min(top + _STRIP_PX, height))
            stack = np.empty((len(everything), len(everything[0][2]), rows.stop - top, width), dtype=np.uint16)
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

    def _taken(self, each: Iterable[tuple[int, str, UInt16]], index: Int16, bands: Bands, out: Layers) -> None:
        """Of each pixel the one day that was chosen."""
        out["day_of_year"][:] = np.where(index >= 0, self.yeardays[bands.days][index], 0)
        for k, band, values in each:
            out["reflectance"][k] = self.tools.reducers.taken(finer(values, self.size(band)), index)

    def _best(self, ahead: Bands, bands: Bands, seen: dict[str, UInt16], excess: Int32) -> Int16:
        """Index of the best day of each pixel, int16 [y, x] at 10 m, -1 = none."""
        how, rule = self.tools.reducers, self.recipe.best_pixel
        if rule is None or self.away is None:
            red, nir = (finer(self._used(ahead, bands, seen[b], b), self.size(b)) for b in ("B04", "B08"))
            use = _better_than_black(red != 0, red, nir)
            return how.max_ndvi(red * use, nir * use)
        same = np.searchsorted(ahead.days, bands.days)
        hazy = (excess[same] / 8e4).astype(np.float32)
        sharp = finer(reducers.sharpness(seen["B04"][same]), self.size("B04"))
        score = reducers.best_pixel_score(
            self.yeardays[bands.days], finer(self.away[bands.days], MASK_M), finer(hazy, MASK_M), sharp, rule
        )
        looked_at = (finer(self._used(ahead, bands, seen[b], b), self.size(b)) for b in ("B02", "B04"))
        return how.best_pixel(self.inside(score, PIXEL_M), _better_than_black(finer(bands.use, MASK_M), *looked_at))

    def size(self, band: str) -> int:
        """Pixel size in metres at which a band is read."""
        return size_of(band, self.of_mask.scenes)

    def inside(self, pixels: npt.NDArray[Any], size_m: int = MASK_M) -> npt.NDArray[Any]:
        """Pixels of that size without the fringe."""
        return cropped(pixels, self.fringe_m // size_m)


def _better_than_black(use: Bool, *bands: UInt16) -> Bool:
    """The observations [day, y, x] in use without those that are black in a band, unless a pixel has no others.

    Products cut what atmospheric correction makes negative at 1. In blue or red that looks free of haze, or full of leaves.
    """
    black = np.logical_or.reduce([band <= 1 for band in bands]) & use
    if not black.any():
        return use
    others = use & ~black
    return np.where(others.any(axis=0), others, use)


def _where_chosen(index: Int16, days: int) -> Bool:
    """Flags [day, y, x] at 20 m: some of its 10 m pixels take that day."""
    height, width = (n // 2 for n in index.shape)
    four = index.reshape(height, 2, width, 2)
    return np.stack([(four == day).any(axis=(1, 3)) for day in range(days)])
