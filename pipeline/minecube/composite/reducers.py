"""Many observations of a year -> one, in numpy: spectral medians by iteration, dates by score; `ranks` has the rest.

`observed` is uint16 [day, y, x], a day being an overpass: reflectance x 10000, 0 = not observed, valid >= 1. `stack` is
uint16 [band, day, y, x], 0 in all bands or in none. A pixel's result depends on its own values alone, bit by bit, and not on
how the image is cut: sums run over days and bands in their order, never along pixels.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from minecube.catalog import BestPixel
from minecube.composite.ranks import median, median_of_seen, percentile

Bool = npt.NDArray[np.bool_]
UInt16 = npt.NDArray[np.uint16]
Int16 = npt.NDArray[np.int16]
Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
Pixels = npt.NDArray[Any]

__all__ = [
    "Geomedian",
    "Reducers",
    "best_pixel",
    "best_pixel_score",
    "geomedian",
    "max_ndvi",
    "median",
    "medoid",
    "percentile",
    "sharpness",
    "taken",
]

YEAR_DAYS = 365.25
CLOSE = 0.003
"""Stored units: steps shorter than this end the search for a geomedian, as a rule within 1e-5 of reflectance."""
MOST_STEPS = 100
MOST_AHEAD = 20
"""How many of its own steps ahead of itself the search may leap."""
TOUCHING = 1e-3
"""Stored units: nearer to an observation than this is on it."""
_TILE = 4096  # pixels, such that what is worked on stays in the caches
_TINY = np.float32(1e-30)


class Geomedian(NamedTuple):
    """The geomedian of a stack and how far its observations lie from it."""

    reflectance: UInt16
    """[band, y, x], x 10000, halves rounded to even, 0 = none."""
    emad: Float32
    """[y, x], median Euclidean distance in reflectance, NaN = none."""
    smad: Float32
    """[y, x], median cosine distance, NaN = none."""
    bcmad: Float32
    """[y, x], median Bray-Curtis distance, NaN = none."""


class Reducers(Protocol):
    """What a block is reduced with: this module, or `torch_reducers.TorchReducers`."""

    def median(self, observed: UInt16) -> UInt16:
        """See the function of that name, like all here."""

    def percentile(self, observed: UInt16, percent: float) -> UInt16:
        """uint16 [y, x]."""

    def geomedian(self, stack: UInt16) -> Geomedian:
        """Geomedian and deviations."""

    def medoid(self, stack: UInt16) -> Int16:
        """int16 [y, x], index of a day."""

    def max_ndvi(self, red: UInt16, nir: UInt16) -> Int16:
        """int16 [y, x], index of a day."""

    def best_pixel(self, score: Float32, observed: Bool) -> Int16:
        """int16 [y, x], index of a day."""

    def taken(self, observed: UInt16, index: Int16) -> UInt16:
        """uint16 [y, x]."""


def geomedian(stack: UInt16) -> Geomedian:
    """The spectrum with the least sum of Euclidean distances to those observed, and the median deviations from it.

    Roberts, Mueller and McIntyre 2017 (IEEE TGRS 55, high-dimensional pixel composites), Roberts, Dunn and Mueller 2018
    (IGARSS, median absolute deviations). Weiszfeld's iteration, with Vardi and Zhang's (2000, PNAS 97) way off an observation
    it lands on, from the median of each band; each step leaps ahead along the last two (Anderson acceleration of depth one)
    unless the sum of distances rose. Of two observations any point between is a geomedian: it is the middle.

    Args:
        stack: uint16 [band, day, y, x], 0 = not observed, in all bands or in none.
    """
    bands, days, *shape = stack.shape
    flat = stack.reshape(bands, days, math.prod(shape))
    pixels = flat.shape[2]
    middle = np.zeros((bands, pixels), dtype=np.uint16)
    away = np.full((3, pixels), np.nan, dtype=np.float32)
    for start in range(0, pixels, _TILE):
        tile = flat[:, :, start : start + _TILE]
        seen = tile[0] != 0
        used = seen.any(axis=1)
        if not used.any():
            continue
        width = tile.shape[2]
        if width == 1:  # numpy sums one column in another order than several
            tile, seen = tile.repeat(2, axis=2), seen.repeat(2, axis=1)
        made, deviations = _geomedian_tile(tile[:, used], seen[used])
        middle[:, start : start + width] = np.rint(made)[:, :width]
        away[:, start : start + width] = deviations[:, :width]
    emad, smad, bcmad = away.reshape(3, *shape)
    return Geomedian(middle.reshape(bands, *shape), emad, smad, bcmad)


def medoid(stack: UInt16) -> Int16:
    """The day whose spectrum has the least sum of Euclidean distances to the others: int16 [y, x], -1 = not observed.

    Of equal ones the earliest. Distances are of single precision and their sums exact, so that equal ones stay equal.

    Args:
        stack: uint16 [band, day, y, x], 0 = not observed, in all bands or in none.
    """
    bands, days, *shape = stack.shape
    flat = stack.reshape(bands, days, math.prod(shape))
    out = np.full(flat.shape[2], -1, dtype=np.int16)
    for start in range(0, len(out), _TILE):
        tile = flat[:, :, start : start + _TILE]
        seen = tile[0] != 0
        used = seen.any(axis=1)
        if used.any():
            index = _medoid_tile(tile[:, used].astype(np.float32), seen[used])
            out[start : start + len(index)] = np.where(index >= 0, np.flatnonzero(used)[index], -1)
    return out.reshape(shape)


def max_ndvi(red: UInt16, nir: UInt16) -> Int16:
    """The day of highest NDVI: int16 [y, x], of equal ones the earliest, -1 = not observed.

    Args:
        red: uint16 [day, y, x], 0 = not observed.
        nir: the same of near infrared.
    """
    out = np.full(red.shape[1:], -1, dtype=np.int16)
    best_red, best_nir = np.ones(out.shape, dtype=np.uint32), np.zeros(out.shape, dtype=np.uint32)
    for day, (r, n) in enumerate(zip(red, nir, strict=True)):
        # NDVI rises with nir / red; products of two 16 bit numbers are exact.
        better = (n * best_red > best_nir * r) & (r > 0)
        out[better] = day
        np.copyto(best_red, r, where=better)
        np.copyto(best_nir, n, where=better)
    return out


def best_pixel(score: Float32, observed: Bool) -> Int16:
    """The day of highest score: int16 [y, x], of equal ones the earliest, -1 = not observed.

    Args:
        score: float32 [day, y, x], finite where observed.
        observed: bool [day, y, x].
    """
    out = np.full(score.shape[1:], -1, dtype=np.int16)
    best = np.full(out.shape, -np.inf, dtype=np.float32)
    for day, (of_day, seen) in enumerate(zip(score, observed, strict=True)):
        better = (of_day > best) & seen
        out[better] = day
        np.copyto(best, of_day, where=better)
    return out


def best_pixel_score(
    day_of_year: npt.NDArray[np.integer[Any]], cloud_distance_m: Float32, opacity: Float32, sharpness: Float32, rule: BestPixel
) -> Float32:
    """How good each observation is: float32 [day, y, x], the weighted sum of four parts from 0 to 1.

    After Griffiths et al. 2013 (IEEE JSTARS 6) and White et al. 2014 (Canadian Journal of Remote Sensing 40).

    Args:
        day_of_year: of each day, 1..366.
        cloud_distance_m: float32 [day, y, x], metres to the nearest cloud or shadow of that day.
        opacity: float32 [day, y, x], excess of haze in reflectance.
        sharpness: float32 [day, y, x], as `sharpness` gives it.
        rule: the best day, where each part ends, and its weight.
    """
    apart = np.abs(day_of_year.astype(np.float64) - rule.day)
    apart = np.minimum(apart, YEAR_DAYS - apart)
    season = rule.day_weight * np.exp(-((apart / rule.day_spread) ** 2) / 2)
    score: Float32 = np.clip(cloud_distance_m / np.float32(rule.cloud_distance_m), 0, 1)
    score *= np.float32(rule.cloud_weight)
    score += season.astype(np.float32)[:, None, None]
    clear = 1 - np.clip(opacity / np.float32(rule.opacity), 0, 1)
    clear *= np.float32(rule.opacity_weight)
    score += clear
    score += sharpness * np.float32(rule.sharpness_weight)
    return score


def sharpness(band: UInt16) -> Float32:
    """Local detail of each date relative to the pixel's sharpest date: float32 [day, y, x], 0..1; 0 = not observed.

    Detail is the absolute Laplacian averaged over the pixels of a 5 x 5 window that have one: that are observed with their
    four neighbours. It looks three pixels far; beyond the image nothing is observed. Where no date has any, all are 1.

    Args:
        band: uint16 [day, y, x], 0 = not observed.
    """
    out = np.zeros(band.shape, dtype=np.float32)
    for of_day, detail in zip(band, out, strict=True):
        ring = np.pad(of_day.astype(np.int32), 1)
        around = (ring[:-2, 1:-1], ring[2:, 1:-1], ring[1:-1, :-2], ring[1:-1, 2:])
        has = of_day > 0
        for neighbour in around:
            has &= neighbour > 0
        bent = np.abs(4 * ring[1:-1, 1:-1] - sum(around)) * has
        np.divide(_sum_5x5(bent), np.maximum(_sum_5x5(has.astype(np.int32)), 1), out=detail, casting="same_kind")
        detail *= of_day > 0
    sharpest = out.max(axis=0, initial=0)
    for of_day, detail in zip(band, out, strict=True):
        np.divide(detail, sharpest, out=detail, where=sharpest > 0)
        detail[(sharpest == 0) & (of_day > 0)] = 1
    return out


def taken(observed: UInt16, index: Int16) -> UInt16:
    """The value of the day that was chosen: uint16 [y, x], 0 where the index is -1.

    Args:
        observed: uint16 [day, y, x], 0 = not observed.
        index: int16 [y, x], -1 = none.
    """
    if not len(observed):
        return np.zeros(index.shape, dtype=np.uint16)
    chosen = np.take_along_axis(observed, np.maximum(index, 0)[None], axis=0)[0]
    return np.where(index >= 0, chosen, 0).astype(np.uint16)


class _Search(NamedTuple):
    """Where the search for geomedians stands, float32 [band, pixel]; `cost` [pixel]."""

    step: Float32
    reached: Float32
    cost: Float32


def _geomedian_tile(tile: UInt16, seen: Bool) -> tuple[Float32, Float32]:
    """Geomedian float32 [band, pixel] in stored units, 0 = none, and its deviations float32 [3, pixel], NaN = none."""
    origin = median_of_seen(tile.swapaxes(0, 1), seen)
    # From the origin differences are small and, being halves of integers, exact.
    spectra = tile.astype(np.float32)
    spectra -= origin[:, None]
    weight = seen.astype(np.float32)
    at = _on_observation(spectra, weight, _searched(spectra, weight))
    away = _deviations(spectra, weight, at, origin)
    deviations = median_of_seen(away.view(np.int32), seen)
    deviations[:, ~seen.any(axis=0)] = np.nan
    return origin + at, deviations


def _searched(spectra: Float32, weight: Float32) -> Float32:
    """Geomedian float32 [band, pixel] of spectra [band, day, pixel]; weight [day, pixel] is 1 where observed, else 0.

    Each pixel stops by itself; those that have are laid aside when they are half.
    """
    at = np.zeros((len(spectra), spectra.shape[2]), dtype=np.float32)
    out, where = at.copy(), np.arange(at.shape[1])
    going = np.ones(len(where), dtype=bool)
    before: _Search | None = None
    for _ in range(MOST_STEPS):
        now = _weiszfeld(spectra, weight, at)
        ahead, before = _leap(now, before)
        moved = np.maximum(_dot(ahead - at, ahead - at), _dot(now.step, now.step))
        at = ahead
        stops = going & (moved < CLOSE**2)
        out[:, where[stops]] = at[:, stops]
        going &= ~stops
        left = np.count_nonzero(going)
        if not left:
            return out
        if 1 < left <= len(where) // 2:  # not one: numpy sums one column in another order
            spectra, weight, at = (np.compress(going, a, axis=-1) for a in (spectra, weight, at))
            before = _Search(*(np.compress(going, a, axis=-1) for a in before))
            where, going = where[going], going[going]
    out[:, where[going]] = at[:, going]
    return out


def _on_observation(spectra: Float32, weight: Float32, at: Float32) -> Float32:
    """Geomedians [band, pixel], of which those that are the observation next to them are put there: steps near it are short.

    It is one where the others pull no harder than it, or those equal to it, hold; between two they pull just as hard.
    """
    away = _squared_distance(spectra, at)
    away[weight == 0] = np.inf
    nearest = np.take_along_axis(spectra, away.argmin(axis=0)[None, None], axis=1)[:, 0]
    distance = np.sqrt(_squared_distance(spectra, nearest))
    equal = (distance == 0) & (weight > 0)
    pull = np.divide(weight * ~equal, np.maximum(distance, np.float32(0.5)))
    pulled, drawn = np.empty_like(at), np.empty_like(distance)
    for band, values in enumerate(spectra):
        np.subtract(values, nearest[band], out=drawn)
        np.multiply(drawn, pull, out=drawn)
        np.add.reduce(drawn, axis=0, out=pulled[band])
    best = np.sqrt(_dot(pulled, pulled)) < equal.sum(axis=0, dtype=np.int32) * np.float32(1 - 1e-6)
    return np.where(best, nearest, at)


def _leap(now: _Search, before: _Search | None) -> tuple[Float32, _Search]:
    """Where to go next, and what to remember: `now`, or `before` where the last leap made it worse, to go on from there."""
    if before is None:
        return now.reached, now
    turn = now.step - before.step
    ahead = _dot(now.step, turn) / np.maximum(_dot(turn, turn), _TINY)
    ahead = np.where(ahead < 0.5, np.maximum(ahead, -MOST_AHEAD), 0)  # steps that grow are no sequence to see the end of
    target = now.reached - ahead.astype(np.float32) * (now.reached - before.reached)
    worse = now.cost > before.cost * np.float32(1 + 1e-6)
    if not worse.any():
        return target, now
    back = _Search(*(np.where(worse, b, n) for n, b in zip(now, before, strict=True)))
    return np.where(worse, before.reached, target), back


def _weiszfeld(spectra: Float32, weight: Float32, at: Float32) -> _Search:
    """One step of Weiszfeld's iteration from `at` [band, pixel], and the sum of distances there."""
    distance = np.sqrt(_squared_distance(spectra, at))
    touching = distance <= TOUCHING
    touches = touching.any()
    pull = np.divide(weight * ~touching if touches else weight, np.maximum(distance, TOUCHING))
    cost = np.add.reduce(distance * weight, axis=0)
    total = np.maximum(np.add.reduce(pull, axis=0), _TINY)
    step, drawn = np.empty_like(at), np.empty_like(distance)
    for band, values in enumerate(spectra):
        np.multiply(values, pull, out=drawn)
        np.add.reduce(drawn, axis=0, out=step[band])
    step /= total
    step -= at * (total > _TINY)
    if touches:  # stay, unless the others pull harder than those it lies on
        held = np.add.reduce(touching * weight, axis=0)
        pulled = np.sqrt(_dot(step, step)) * total
        step *= np.maximum(1 - held / np.maximum(pulled, _TINY), 0)
    return _Search(step, at + step, cost)


def _deviations(spectra: Float32, weight: Float32, at: Float32, origin: Float32) -> Float32:
    """Euclidean, cosine and Bray-Curtis distance of each observation from the geomedian: float32 [day, 3, pixel], 0 = none.

    The cosine's is (d² - (|a| - |b|)²) / 2|a||b|, d being the Euclidean: 1 - cos would lose its digits.
    """
    middle = origin + at
    length, squared = np.sqrt(_dot(middle, middle)), _squared_distance(spectra, at)
    lengths, apart, total = np.zeros_like(squared), np.zeros_like(squared), np.zeros_like(squared)
    value = np.empty_like(squared)
    for values, to, off in zip(spectra, at, origin, strict=True):
        np.subtract(values, to, out=value)
        apart += np.abs(value, out=value)
        np.add(values, off, out=value)
        total += value
        value *= value
        lengths += value
    np.sqrt(lengths, out=lengths)
    out = np.empty((len(weight), 3, at.shape[1]), dtype=np.float32)
    out[:, 0] = np.sqrt(squared) / np.float32(1e4)
    out[:, 1] = np.maximum(squared - (lengths - length) ** 2, 0) / np.maximum(2 * lengths * length, _TINY)
    total += functools.reduce(np.add, middle)
    out[:, 2] = apart / np.maximum(total, _TINY)
    out *= weight[:, None]
    return out


def _medoid_tile(spectra: Float32, seen: Bool) -> npt.NDArray[np.int64]:
    """Index of the medoid among the days [pixel], -1 = none; of spectra [band, day, pixel]."""
    total, weight = np.zeros(seen.shape), seen.astype(np.float32)
    for day in range(len(seen) - 1):
        distance = np.sqrt(_squared_distance(spectra[:, day + 1 :], spectra[:, day]))
        total[day + 1 :] += distance * weight[day]
        distance *= weight[day + 1 :]
        total[day] += distance.sum(axis=0, dtype=np.float64)
    total[~seen] = np.inf
    return np.where(seen.any(axis=0), total.argmin(axis=0), -1)


def _squared_distance(spectra: Float32, to: Float32) -> Float32:
    """float32 [day, pixel], of spectra [band, day, pixel] to one [band, pixel]."""
    out, apart = np.zeros(spectra.shape[1:], dtype=np.float32), np.empty(spectra.shape[1:], dtype=np.float32)
    for values, middle in zip(spectra, to, strict=True):
        np.subtract(values, middle, out=apart)
        np.multiply(apart, apart, out=apart)
        np.add(out, apart, out=out)
    return out


def _dot(a: Float32, b: Float32) -> Float32:
    """float32 [pixel], the inner product over bands, in their order."""
    product: Float32 = functools.reduce(np.add, a * b)
    return product


def _sum_5x5(values: Int32) -> Int32:
    """Sums over the 5 x 5 windows around each pixel; beyond the image there is 0."""
    wide = np.pad(values, 2)
    height, width = values.shape
    rows = sum((wide[i : i + height] for i in range(1, 5)), wide[:height])
    return sum((rows[:, i : i + width] for i in range(1, 5)), rows[:, :width])
