"""Composite one block of one site-year: mask, read and reduce.

SCL is read first. Its margin covers every neighbourhood used by the mask. It decides the used
observations, and so the files and windows to read. Bands are read at their own pixel size on the
I/O threads, ahead of the reducer. A median is made strip by strip: a band's rows of file tiles.
Each strip is freed after its reduction, so only a few are in memory.

All bands of an observation come from one scene. Rarely, a band has no data at a pixel seen by SCL,
and this is noticed during reading. Then the pixel goes to the next scene of the day. Without
another scene, the pixel loses the day. The block is then made again.

The best pixel is chosen from two bands. If another band of the chosen date is black, this band is
read for the other dates as well. The pixel is then chosen again among the dates with the fewest
black bands.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pystac
from odc.geo.geobox import GeoBox

from minecube.arrays import AnyArray, Bool, Float32, Int16, Int32, Int64, IntP, UInt8, UInt16
from minecube.catalog import FALLBACKS, BestPixel, Recipe
from minecube.composite import masks, reducers
from minecube.composite.bands import (
    Bands,
    Observations,
    Strip,
    mask_pixels,
    repeat_pixels,
    sum_to_mask_size,
)
from minecube.composite.daymasks import DayMasks
from minecube.composite.masks import CLEAR, crop
from minecube.composite.needs import (
    MASK_M,
    are_cut,
    bands_with_fringe,
    compute_margins,
    estimate_memory,
    pixel_size_of,
    scenes_near,
)
from minecube.composite.task import BlockTask, GeomedianFunction
from minecube.composite.values import Samples, UntrustedValuesError
from minecube.grid import PIXEL_M, pad
from minecube.reader import Ledger

Layers = dict[str, AnyArray]
BLOCK_BYTES = 1_000_000_000
"""Memory limit of a block in bytes. A block above it, due to many dates, is made in parts."""
_SMALLEST_ROWS = 32  # a block is not cut further
_STRIP_PX = 32  # rows per strip, a stack of all bands and dates
_BLACK = 1  # the stored value of reflectance that atmospheric correction made zero or negative
_CLEAR_KINDS = (CLEAR, FALLBACKS["wider-season"], FALLBACKS["neighbour-year"])


def composite_block(
    scenes: Sequence[pystac.Item],
    box: GeoBox,
    recipe: Recipe,
    year: int,
    geomedian: GeomedianFunction,
    ledger: Ledger | None = None,
    block_bytes: int = BLOCK_BYTES,
    check_values: bool = False,
) -> Layers:
    """Composite one block: `reflectance` uint16 [band, y, x], and the recipe's layers [y, x].

    Scenes must be in the order of `sort_in_mosaic_order`. A block that needs more than
    `block_bytes` of memory is made in parts, of `_SMALLEST_ROWS` rows or more.

    Raises:
        UntrustedValuesError: With `check_values`, a scene has faults in its values.
    """
    _, mask_margin_m = compute_margins(recipe)
    scenes = scenes_near(scenes, pad(box, mask_margin_m))
    if not scenes:
        return _make_empty_layers(box, recipe)
    if estimate_memory(scenes, box, recipe) > block_bytes and box.shape[0] >= 2 * _SMALLEST_ROWS:
        # Halves have all columns. GDAL's warp interpolates positions along a row, so pixels of
        # another UTM zone would differ by a rounding step between windows of other columns.
        middle = box.shape[0] // 2 // 8 * 8
        parts = [
            composite_block(
                scenes, half, recipe, year, geomedian, ledger, block_bytes, check_values
            )
            for half in (box[:middle], box[middle:])
        ]
        return {name: np.concatenate([part[name] for part in parts], axis=-2) for name in parts[0]}
    block = _Block.from_task(
        BlockTask(
            scenes=scenes,
            box=box,
            recipe=recipe,
            year=year,
            geomedian=geomedian,
            ledger=ledger,
            check_values=check_values,
        )
    )
    while (layers := block.composite()) is None:
        pass  # each pass gives pixels to a later scene of their day, or removes the day
    return layers


def _make_empty_layers(box: GeoBox, recipe: Recipe) -> Layers:
    layers: Layers = {"reflectance": np.zeros((len(recipe.bands), *box.shape), np.uint16)}
    for name, layer in recipe.layers.items():
        missing = np.nan if layer.dtype.startswith("float") else 0
        layers[name] = np.full(box.shape, missing, layer.dtype)
    return layers


class _FringeBands(NamedTuple):
    """The bands that decide the used observations, read with the block's fringe."""

    bands: Bands
    pixels: dict[str, UInt16]
    """uint16 [day, y, x] of each of these bands, at its own pixel size."""
    excess: Int32 | None
    """int32 [day, y, x] at 20 m, excess of haze, reflectance x 80000. None without best pixel or
    haze test."""


@dataclass(frozen=True)
class _Block:
    """A block with a finished mask. Arrays [day, y, x] are at 20 m and reach `fringe_m` beyond
    it."""

    task: BlockTask
    observations: Observations
    cloud_distance: Float32 | None
    """Metres from the day's nearest cloud, including clouds beyond the arrays; None without best
    pixel."""
    yeardays: Int64
    """Day of the year of each day."""
    day_masks: DayMasks
    fringe_m: int

    @classmethod
    def from_task(cls, task: BlockTask) -> _Block:
        """Read SCL and make the mask."""
        day_masks = DayMasks(task)
        owner, kind, cloud_distance = day_masks.read()
        yeardays = np.array([time.timetuple().tm_yday for time in day_masks.times])
        observations = Observations(task.scenes, day_masks.days, owner, kind)
        fringe_m, _ = compute_margins(task.recipe)
        return cls(task, observations, cloud_distance, yeardays, day_masks, fringe_m)

    @property
    def recipe(self) -> Recipe:
        """The recipe of the composite."""
        return self.task.recipe

    def composite(self) -> Layers | None:
        """Reduce the block.

        Returns None if a band has no data at a pixel seen by the mask. Such pixels now come from
        other scenes: reduce the block again.
        """
        layers = _make_empty_layers(self.task.box, self.recipe)
        use, quality = self._choose_observations()
        if not self.crop(use).any():
            return layers
        names = bands_with_fringe(self.recipe)
        fringe_names = [band for band in self.recipe.bands if band in names]
        box = pad(self.task.box, self.fringe_m)
        fringe = self.fringe_m // MASK_M
        inner = self.observations.crop(fringe)
        samples = self._make_samples(inner, self.crop(use))
        fringe_reads = Bands(self.observations, use, box, self.task.ledger, samples, fringe)
        bands = Bands(inner, self.crop(use), self.task.box, self.task.ledger, samples)
        try:
            fringe_reads.read(fringe_names)
            bands.read(
                [band for band in self.recipe.bands if band not in names],
                in_strips=are_cut(self.recipe),
            )
            pixels = {band: fringe_reads.next().pixels for band in fringe_names}
            quality, excess = self._remove_haze(pixels, fringe_reads, bands, quality)
            self._count_clear(bands.use, self.crop(quality), layers)
            self._reduce(_FringeBands(fringe_reads, pixels, excess), bands, layers)
            if samples is not None and (faults := samples.find_faults()):
                raise UntrustedValuesError(faults)
        finally:
            fringe_reads.cancel()
            bands.cancel()
        if not self.observations.incomplete:
            return layers
        self._replace_incomplete()
        return None

    def _make_samples(self, observations: Observations, use: Bool) -> Samples | None:
        """Prepare samples of clear pixels to check, if values are checked in this pass.

        Gaps struck in an earlier pass are no edges of the coverage. Without a mask no pixel is
        known to be clear.
        """
        if not self.task.check_values or observations.reads or not self.recipe.mask:
            return None
        clear = use & masks.is_one_of(observations.kind, _CLEAR_KINDS)
        return Samples(observations.scenes, observations.day_of, observations.owner, clear)

    def _choose_observations(self) -> tuple[Bool, UInt8]:
        """Choose the observations to read, bool [day, y, x], and the quality [y, x]."""
        kind = self.observations.kind
        use, quality = masks.choose_observations(kind, self.recipe)
        limit = self.recipe.max_clear_observations
        if limit:
            enough = max(self.recipe.min_clear, -(-limit // 3))
            clearest = masks.choose_clearest(kind, limit, enough, self.yeardays.tolist())
            use &= clearest | (kind != CLEAR)
        return use, quality

    def _remove_haze(
        self, pixels: dict[str, UInt16], fringe: Bands, bands: Bands, quality: UInt8
    ) -> tuple[UInt8, Int32 | None]:
        """Narrow the observations of all bands to those without haze, if the recipe tests for it.

        Returns the changed quality, and the excess of haze if a best pixel is chosen by it.
        """
        if self.recipe.haze is None:
            return quality, None
        hot = np.empty(fringe.use.shape, dtype=np.int32)  # 2 x blue - red
        for day in range(len(hot)):  # day by day, to need no memory beyond the result
            hot[day] = sum_to_mask_size(pixels["B02"][day], self.size("B02"))
            hot[day] *= 2
            hot[day] -= sum_to_mask_size(pixels["B04"][day], self.size("B04"))
        clear, quality, excess = masks.remove_haze(hot, fringe.use, quality, self.recipe.haze)
        fringe.narrow(clear)
        bands.narrow(self.crop(clear[np.searchsorted(fringe.days, bands.days)]))
        return quality, excess if self.recipe.best_pixel else None

    def _count_clear(self, use: Bool, quality: UInt8, layers: Layers) -> None:
        """Write the layers `clear_count` and `quality`. Arrays have no fringe."""
        count = np.where(np.isin(quality, _CLEAR_KINDS), use.sum(axis=0), 0)
        layers["clear_count"][:] = repeat_pixels(count, MASK_M)
        layers["quality"][:] = repeat_pixels(quality, MASK_M)

    def _replace_incomplete(self) -> None:
        """Give pixels without data in a band to the day's next scene with SCL there."""
        owner = self.observations.owner
        kind = self.observations.kind
        # In mosaic order, since a later scene may lack data, too.
        for scene in sorted(self.observations.incomplete):
            day = self.observations.day_of[scene]
            struck = (owner[day] == scene) & (kind[day] == 0)
            later = self.day_masks.read_later(scene)
            if later is None:
                owner[day][struck] = -1
                continue
            np.copyto(owner[day], later.owner[0], where=struck)
            np.copyto(kind[day], later.kind[0], where=struck)
            if self.cloud_distance is not None and later.cloud_distance is not None:
                np.copyto(self.cloud_distance[day], later.cloud_distance[0], where=struck)
        self.observations.incomplete.clear()

    def _reduce(self, fringe: _FringeBands, bands: Bands, layers: Layers) -> None:
        if self.recipe.best_pixel:
            best = _BestPixels(self, self.recipe.best_pixel, fringe, bands.days, bands.use)
            index = best.choose()
            bands.narrow(bands.use & _flag_chosen(index, len(bands.days)))
            copied = fringe._replace(pixels=dict(fringe.pixels))  # still needed for a second choice
            self.take_days(self.yield_bands(copied, bands), index, bands.days, layers)
            best.replace_black(index, layers)
        elif self.recipe.reducer == "geomedian":
            self._reduce_geomedian(list(self.yield_bands(fringe, bands)), layers)
        elif self.recipe.reducer == "median":
            for strip in self.yield_bands(fringe, bands):
                size = self.size(strip.band)
                k = self.recipe.bands.index(strip.band)
                scale = MASK_M // PIXEL_M
                rows = slice(strip.rows.start * scale, strip.rows.stop * scale)
                median = reducers.median(strip.pixels)
                layers["reflectance"][k, rows] = repeat_pixels(median, size)
                bands.release(strip)
                del strip  # free its memory before the next one is read
        else:
            raise NotImplementedError(f"reducer {self.recipe.reducer!r} has no branch here")

    def _reduce_geomedian(self, all_bands: Sequence[Strip], layers: Layers) -> None:
        for rows, stack in self._cut_strips(all_bands):
            geomedian = self.task.geomedian(stack)
            layers["reflectance"][:, rows] = geomedian.reflectance
            layers["emad"][rows] = geomedian.emad
            layers["smad"][rows] = geomedian.smad
            layers["bcmad"][rows] = geomedian.bcmad

    def _cut_strips(self, all_bands: Sequence[Strip]) -> Iterator[tuple[slice, UInt16]]:
        """Yield strips of rows with all bands stacked: uint16 [band, day, y, x] at 10 m."""
        height, width = self.task.box.shape
        days = len(all_bands[0].pixels)
        for top in range(0, height, _STRIP_PX):
            rows = slice(top, min(top + _STRIP_PX, height))
            stack = np.empty((len(all_bands), days, rows.stop - top, width), dtype=np.uint16)
            for band in all_bands:
                size = self.size(band.band)
                scale = size // PIXEL_M
                part = band.pixels[:, rows.start // scale : rows.stop // scale]
                stack[self.recipe.bands.index(band.band)] = repeat_pixels(part, size)
            yield rows, stack

    def yield_bands(self, fringe: _FringeBands, bands: Bands) -> Iterator[Strip]:
        """Yield all bands of the used days, beginning with those read with the fringe.

        Bands are removed from `fringe.pixels`, to free their memory.
        """
        whole = slice(0, bands.use.shape[1])
        for band in list(fringe.pixels):
            pixels = fringe.pixels.pop(band)
            pixels = self.select_used(fringe.bands.days, bands.days, bands.use, pixels, band)
            yield Strip(band, whole, pixels)
        while bands.are_left():
            yield bands.next()

    def select_used(
        self, fringe_days: IntP, days: IntP, use: Bool, pixels: UInt16, band: str
    ) -> UInt16:
        """Copy the observations in use [day, y, x] from a band read with the fringe.

        The band contains more observations: those of all `fringe_days`.
        """
        size = self.size(band)
        height, width = self.crop(pixels, size).shape[1:]
        used = np.empty((len(days), height, width), dtype=np.uint16)
        for n, day in enumerate(np.searchsorted(fringe_days, days)):
            used[n] = self.crop(pixels[day], size)
            mask_pixels(used[n], use[n], size, out=used[n])
        return used

    def take_days(
        self, all_bands: Iterable[Strip], index: Int16, days: IntP, layers: Layers
    ) -> None:
        """Write the chosen day of each pixel to `reflectance` and `day_of_year` of the layers.

        `index` is int16 [y, x] at 10 m into `days`, the indices of the bands' days; -1 = none.
        """
        layers["day_of_year"][:] = np.where(index >= 0, self.yeardays[days][index], 0)
        for band in all_bands:
            fine = repeat_pixels(band.pixels, self.size(band.band))
            place = self.recipe.bands.index(band.band)
            layers["reflectance"][place] = reducers.take_day(fine, index)

    def open_bands(self, days: IntP, use: Bool) -> Bands:
        """Open the bands of these days for the observations in use, bool [day, y, x] at 20 m."""
        observations = self.observations.crop(self.fringe_m // MASK_M)
        use_of_all = np.zeros(observations.kind.shape, dtype=np.bool_)
        use_of_all[days] = use
        return Bands(observations, use_of_all, self.task.box, self.task.ledger)

    def size(self, band: str) -> int:
        """Return the pixel size in metres for reading a band."""
        return pixel_size_of(band, self.task.scenes)

    def crop(self, pixels: AnyArray, size_m: int = MASK_M) -> AnyArray:
        """Remove the fringe from pixels of the given size."""
        return crop(pixels, self.fringe_m // size_m)


class _BestPixels:
    """The choice of the best day of each pixel of a block.

    `days` are indices of the candidate days among all days. `use` marks their candidate
    observations, bool [day, y, x] at 20 m.
    """

    def __init__(
        self, block: _Block, rule: BestPixel, fringe: _FringeBands, days: IntP, use: Bool
    ) -> None:
        self._block = block
        self._rule = rule
        self._fringe = fringe
        self._days = days
        self._use = use

    def choose(self) -> Int16:
        """Choose the best day of each pixel: index int16 [y, x] at 10 m, -1 = none.

        Only days with the fewest black bands in the fringe bands are candidates.
        """
        observed = repeat_pixels(self._use, MASK_M)
        score = self._score_days()
        black = self._count_black()
        if black is not None:
            observed = _keep_least_black(observed, black)
        return reducers.choose_best_day(score, observed)

    def replace_black(self, index: Int16, layers: Layers) -> None:
        """Choose again if the chosen day is black in a band not read with the fringe.

        The band is then read for all candidate days there. Each pixel ends with the best of its
        days with the fewest black bands. A choice without black in further bands cannot lose to
        another day when further bands are counted.
        """
        checked: dict[str, Bool] = {}
        score: Float32 | None = None
        count: UInt8 | None = None
        observed = np.empty(0, dtype=np.bool_)
        while not self._block.observations.incomplete:  # else the block is made again in any case
            doubtful = self._find_doubtful(layers["reflectance"], checked)
            if not doubtful:
                return
            if score is None:
                observed = repeat_pixels(self._use, MASK_M)
                score = self._score_days()
                count = self._count_black()
            if count is None:
                count = np.zeros(observed.shape, dtype=np.uint8)
            for band, pixels in doubtful.items():
                self._add_black(band, pixels, count)
            if self._block.observations.incomplete:
                return
            better = reducers.choose_best_day(score, _keep_least_black(observed, count))
            changed = np.where(better == index, np.int16(-1), better)
            self._take_again(changed, layers)
            index = better

    def _score_days(self) -> Float32:
        """Score the candidate days: float32 [day, y, x] at 10 m."""
        block = self._block
        if block.cloud_distance is None:
            raise TypeError("a best pixel needs the distance to clouds")
        same_days = np.searchsorted(self._fringe.bands.days, self._days)
        sharpness = reducers.measure_sharpness(self._fringe.pixels["B04"][same_days])
        scores = np.empty((len(self._days), *block.task.box.shape), dtype=np.float32)
        for n, day in enumerate(self._days):  # day by day, to need less memory
            distance = block.cloud_distance[day, None]
            opacity = np.zeros_like(distance)
            if self._fringe.excess is not None:
                opacity = (self._fringe.excess[same_days[n], None] / 8e4).astype(np.float32)
            score = reducers.score_days(
                block.yeardays[day, None],
                repeat_pixels(distance, MASK_M),
                repeat_pixels(opacity, MASK_M),
                repeat_pixels(sharpness[n, None], block.size("B04")),
                self._rule,
            )
            scores[n] = block.crop(score[0], PIXEL_M)
        return scores

    def _count_black(self) -> UInt8 | None:
        """Count the black bands of each observation among the fringe bands.

        Returns uint8 [day, y, x] at 10 m, or None if all counts are 0.
        """
        block = self._block
        count: UInt8 | None = None
        for band, pixels in self._fringe.pixels.items():
            if not (pixels == _BLACK).any():
                continue
            pixels = block.select_used(self._fringe.bands.days, self._days, self._use, pixels, band)
            black = pixels == _BLACK
            if not black.any():
                continue
            fine = repeat_pixels(black, block.size(band)).astype(np.uint8)
            count = fine if count is None else count + fine
        return count

    def _find_doubtful(self, reflectance: UInt16, checked: dict[str, Bool]) -> dict[str, Bool]:
        """Find bands that are black at pixels with other days, bool [y, x] at 20 m each.

        Pixels join `checked` of their band, and are found once only.
        """
        has_other_days = self._use.sum(axis=0) > 1
        doubtful: dict[str, Bool] = {}
        for band, values in zip(self._block.recipe.bands, reflectance, strict=True):
            if band in self._fringe.pixels:
                continue
            black = values == _BLACK
            if not black.any():
                continue
            checked_before = checked.setdefault(
                band, np.zeros(has_other_days.shape, dtype=np.bool_)
            )
            pixels = _flag_any_of_four(black) & has_other_days & ~checked_before
            if pixels.any():
                doubtful[band] = pixels
                checked[band] = checked_before | pixels
        return doubtful

    def _add_black(self, band: str, pixels: Bool, count: UInt8) -> None:
        """Read a band of all candidate days at some pixels, and count its black observations."""
        bands = self._block.open_bands(self._days, self._use & pixels)
        try:
            bands.read([band])
            black = bands.next().pixels == _BLACK
        finally:
            bands.cancel()
        days = np.searchsorted(self._days, bands.days)
        count[days] += repeat_pixels(black, self._block.size(band))

    def _take_again(self, index: Int16, layers: Layers) -> None:
        """Replace the pixels with an index, int16 [y, x] at 10 m, by the pixels of the indexed
        day."""
        block = self._block
        changed = index >= 0
        if not changed.any():
            return
        bands = block.open_bands(self._days, self._use & _flag_chosen(index, len(self._days)))
        try:
            bands.read([band for band in block.recipe.bands if band not in self._fringe.pixels])
            position = np.full(len(self._days), -1, dtype=np.int16)
            position[np.searchsorted(self._days, bands.days)] = np.arange(len(bands.days))
            new_layers = _make_empty_layers(block.task.box, block.recipe)
            new_index = np.where(changed, position[index], -1).astype(np.int16)
            copied = self._fringe._replace(pixels=dict(self._fringe.pixels))
            all_bands = block.yield_bands(copied, bands)
            block.take_days(all_bands, new_index, bands.days, new_layers)
        finally:
            bands.cancel()
        for name in ("reflectance", "day_of_year"):
            np.copyto(layers[name], new_layers[name], where=changed)


def _keep_least_black(use: Bool, count: UInt8) -> Bool:
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


def _flag_any_of_four(flags: Bool) -> Bool:
    """Flag the 20 m pixels [..., y, x] with a flag in any of their four 10 m pixels."""
    *lead, height, width = flags.shape
    four = flags.reshape(*lead, height // 2, 2, width // 2, 2)
    flags_of_20m: Bool = np.logical_or.reduce(four, axis=(-3, -1))
    return flags_of_20m


def _flag_chosen(index: Int16, days: int) -> Bool:
    """Flag the days [day, y, x] at 20 m chosen by any of a pixel's 10 m pixels."""
    return np.stack([_flag_any_of_four(index == day) for day in range(days)])
