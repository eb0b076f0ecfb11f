"""Reducers of many observations of a year to one, in numpy.

This module has spectral medians by iteration and dates by score. `ranks` has the others.

`observed` is uint16 [day, y, x]: reflectance x 10000, 0 = not observed, valid >= 1. A day is an
overpass. `stack` is uint16 [band, day, y, x], 0 in all bands or in none. A pixel's result depends
bit by bit only on its own values, not on the cut of the image. Sums run over days and bands in
their order, never along pixels.
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
"""Stored units: a shorter step ends the search for a geomedian, usually within 1e-5 of
reflectance."""
MOST_STEPS = 100
MOST_AHEAD = 20
"""Maximum length of a leap ahead in the search, in its own steps."""
TOUCHING = 1e-3
"""Stored units: a point nearer than this to an observation is on it."""
_TILE = 4096  # pixels, few enough for the caches
_TINY = np.float32(1e-30)


class Geomedian(NamedTuple):
    """The geomedian of a stack and the deviations of its observations."""

    reflectance: UInt16
    """[band, y, x], x 10000, halves rounded to even, 0 = none."""
    emad: Float32
    """[y, x], median Euclidean distance in reflectance, NaN = none."""
    smad: Float32
    """[y, x], median cosine distance, NaN = none."""
    bcmad: Float32
    """[y, x], median Bray-Curtis distance, NaN = none."""


class Reducers(Protocol):
    """Reducers of a block: this module, or `torch_reducers.TorchReducers`."""

    def median(self, observed: UInt16) -> UInt16:
        """Return the median: uint16 [y, x]."""

    def percentile(self, observed: UInt16, percent: float) -> UInt16:
        """Return the percentile: uint16 [y, x]."""

    def geomedian(self, stack: UInt16) -> Geomedian:
        """Return the geomedian and its deviations."""

    def medoid(self, stack: UInt16) -> Int16:
        """Return the day of the medoid: int16 [y, x]."""

    def max_ndvi(self, red: UInt16, nir: UInt16) -> Int16:
        """Return the day of highest NDVI: int16 [y, x]."""

    def best_pixel(self, score: Float32, observed: Bool) -> Int16:
        """Return the day of highest score: int16 [y, x]."""

    def taken(self, observed: UInt16, index: Int16) -> UInt16:
        """Return the values of the chosen days: uint16 [y, x]."""


def geomedian(stack: UInt16) -> Geomedian:
    """Compute the geomedian and the median deviations from it.

    The geomedian is the spectrum with the least sum of Euclidean distances to the observations. See
    Roberts, Mueller and McIntyre 2017 (IEEE TGRS 55, high-dimensional pixel composites). For the
    median absolute deviations see Roberts, Dunn and Mueller 2018 (IGARSS).

    The search is Weiszfeld's iteration from the median of each band. Vardi and Zhang's method
    (2000, PNAS 97) leaves an observation reached by the search. Each step leaps ahead along the
    last two steps (Anderson acceleration of depth one), unless the sum of distances rose. With two
    observations, any point between them is a geomedian; the result is their middle.

    Args:
        stack: Array uint16 [band, day, y, x], 0 = not observed, in all bands or in none.
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
    """Choose the day with the least sum of spectral distances to the others: int16 [y, x].

    Distances are Euclidean. -1 = not observed. Among equal days, the earliest is chosen. Distances
    have single precision and their sums are exact, so equal days stay equal.

    Args:
        stack: Array uint16 [band, day, y, x], 0 = not observed, in all bands or in none.
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
    """Choose the day of highest NDVI: int16 [y, x], the earliest of equal days, -1 = not observed.

    Args:
        red: Array uint16 [day, y, x], 0 = not observed.
        nir: Near infrared, likewise.
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
    """Choose the day of highest score: int16 [y, x], the earliest of equal days, -1 = not observed.

    Args:
        score: Array float32 [day, y, x], finite at observations.
        observed: Flags bool [day, y, x].
    """
    out = np.full(score.shape[1:], -1, dtype=np.int16)
    best = np.full(out.shape, -np.inf, dtype=np.float32)
    for day, (of_day, seen) in enumerate(zip(score, observed, strict=True)):
        better = (of_day > best) & seen
        out[better] = day
        np.copyto(best, of_day, where=better)
    return out


def best_pixel_score(
    day_of_year: npt.NDArray[np.integer[Any]],
    cloud_distance_m: Float32,
    opacity: Float32,
    sharpness: Float32,
    rule: BestPixel,
) -> Float32:
    """Score each observation: float32 [day, y, x], a weighted sum of four parts from 0 to 1.

    After Griffiths et al. 2013 (IEEE JSTARS 6) and White et al. 2014 (Canadian Journal of Remote
    Sensing 40).

    Args:
        day_of_year: Day of the year of each day, 1..366.
        cloud_distance_m: Metres to the day's nearest cloud or shadow, float32 [day, y, x].
        opacity: Excess of haze in reflectance, float32 [day, y, x].
        sharpness: Result of `sharpness`, float32 [day, y, x].
        rule: The best day, and the limit and weight of each part.
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
    """Measure each date's local detail relative to the pixel's sharpest date: float32 [day, y, x].

    Values are 0..1, 0 = not observed. Detail is the mean absolute Laplacian in a 5 x 5 window. A
    pixel has a Laplacian if it and its four neighbours are observed. So the measure depends on
    pixels up to three pixels away. Pixels beyond the image count as unobserved. If no date has
    detail, all observations get 1.

    Args:
        band: Array uint16 [day, y, x], 0 = not observed.
    """
    out = np.zeros(band.shape, dtype=np.float32)
    for of_day, detail in zip(band, out, strict=True):
        ring = np.pad(of_day.astype(np.int32), 1)
        around = (ring[:-2, 1:-1], ring[2:, 1:-1], ring[1:-1, :-2], ring[1:-1, 2:])
        has = of_day > 0
        for neighbour in around:
            has &= neighbour > 0
        bent = np.abs(4 * ring[1:-1, 1:-1] - sum(around)) * has
        np.divide(
            _sum_5x5(bent),
            np.maximum(_sum_5x5(has.astype(np.int32)), 1),
            out=detail,
            casting="same_kind",
        )
        detail *= of_day > 0
    sharpest = out.max(axis=0, initial=0)
    for of_day, detail in zip(band, out, strict=True):
        np.divide(detail, sharpest, out=detail, where=sharpest > 0)
        detail[(sharpest == 0) & (of_day > 0)] = 1
    return out


def taken(observed: UInt16, index: Int16) -> UInt16:
    """Take the value of the chosen day: uint16 [y, x], 0 at index -1.

    Args:
        observed: Array uint16 [day, y, x], 0 = not observed.
        index: Array int16 [y, x], -1 = none.
    """
    if not len(observed):
        return np.zeros(index.shape, dtype=np.uint16)
    chosen = np.take_along_axis(observed, np.maximum(index, 0)[None], axis=0)[0]
    return np.where(index >= 0, chosen, 0).astype(np.uint16)


class _Search(NamedTuple):
    """State of the search for geomedians: float32 [band, pixel], `cost` [pixel]."""

    step: Float32
    reached: Float32
    cost: Float32


def _geomedian_tile(tile: UInt16, seen: Bool) -> tuple[Float32, Float32]:
    """Compute geomedian and deviations of a tile.

    The geomedian is float32 [band, pixel] in stored units, 0 = none. Deviations are float32 [3,
    pixel], NaN = none.
    """
    origin = median_of_seen(tile.swapaxes(0, 1), seen)
    # Differences from the origin are small, and exact as halves of integers.
    spectra = tile.astype(np.float32)
    spectra -= origin[:, None]
    weight = seen.astype(np.float32)
    at = _on_observation(spectra, weight, _searched(spectra, weight))
    away = _deviations(spectra, weight, at, origin)
    deviations = median_of_seen(away.view(np.int32), seen)
    deviations[:, ~seen.any(axis=0)] = np.nan
    return origin + at, deviations


def _searched(spectra: Float32, weight: Float32) -> Float32:
    """Search the geomedians float32 [band, pixel] of spectra [band, day, pixel].

    `weight` [day, pixel] is 1 at observations, else 0. Each pixel stops independently. Once half of
    the pixels have stopped, the search drops the stopped pixels from its arrays.
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
        if 1 < left <= len(where) // 2:  # at least two: numpy sums one column in another order
            spectra, weight, at = (np.compress(going, a, axis=-1) for a in (spectra, weight, at))
            before = _Search(*(np.compress(going, a, axis=-1) for a in before))
            where, going = where[going], going[going]
    out[:, where[going]] = at[:, going]
    return out


def _on_observation(spectra: Float32, weight: Float32, at: Float32) -> Float32:
    """Move geomedians [band, pixel] onto their nearest observation if it is the geomedian itself.

    Near this observation the steps of the search are short. An observation is the geomedian if the
    summed unit vectors towards the others are shorter than the number of observations equal to it.
    With two observations both sides are equal, so neither is chosen.
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
    """Return the next point and the state to remember.

    The state is `now`. If the last leap raised the cost, the state is `before`, and the search
    continues from its end.
    """
    if before is None:
        return now.reached, now
    turn = now.step - before.step
    ahead = _dot(now.step, turn) / np.maximum(_dot(turn, turn), _TINY)
    ahead = np.where(
        ahead < 0.5, np.maximum(ahead, -MOST_AHEAD), 0
    )  # growing steps do not converge
    target = now.reached - ahead.astype(np.float32) * (now.reached - before.reached)
    worse = now.cost > before.cost * np.float32(1 + 1e-6)
    if not worse.any():
        return target, now
    back = _Search(*(np.where(worse, b, n) for n, b in zip(now, before, strict=True)))
    return np.where(worse, before.reached, target), back


def _weiszfeld(spectra: Float32, weight: Float32, at: Float32) -> _Search:
    """Take one step of Weiszfeld's iteration from `at` [band, pixel].

    The cost in the result is the sum of distances at `at`.
    """
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
    if touches:  # stay, unless the others pull harder than the touched observations
        held = np.add.reduce(touching * weight, axis=0)
        pulled = np.sqrt(_dot(step, step)) * total
        step *= np.maximum(1 - held / np.maximum(pulled, _TINY), 0)
    return _Search(step, at + step, cost)


def _deviations(spectra: Float32, weight: Float32, at: Float32, origin: Float32) -> Float32:
    """Measure each observation's distances from the geomedian: float32 [day, 3, pixel], 0 = none.

    The three are Euclidean, cosine and Bray-Curtis distance. The cosine distance is (d² - (|a| -
    |b|)²) / 2|a||b| with the Euclidean distance d. 1 - cos would lose digits.
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
    out[:, 1] = np.maximum(squared - (lengths - length) ** 2, 0) / np.maximum(
        2 * lengths * length, _TINY
    )
    total += functools.reduce(np.add, middle)
    out[:, 2] = apart / np.maximum(total, _TINY)
    out *= weight[:, None]
    return out


def _medoid_tile(spectra: Float32, seen: Bool) -> npt.NDArray[np.int64]:
    """Return the index of the medoid among the days [pixel], -1 = none.

    Spectra are [band, day, pixel].
    """
    total, weight = np.zeros(seen.shape), seen.astype(np.float32)
    for day in range(len(seen) - 1):
        distance = np.sqrt(_squared_distance(spectra[:, day + 1 :], spectra[:, day]))
        total[day + 1 :] += distance * weight[day]
        distance *= weight[day + 1 :]
        total[day] += distance.sum(axis=0, dtype=np.float64)
    total[~seen] = np.inf
    return np.where(seen.any(axis=0), total.argmin(axis=0), -1)


def _squared_distance(spectra: Float32, to: Float32) -> Float32:
    """Compute squared distances of spectra [band, day, pixel] to one spectrum [band, pixel].

    Returns float32 [day, pixel].
    """
    out, apart = (
        np.zeros(spectra.shape[1:], dtype=np.float32),
        np.empty(spectra.shape[1:], dtype=np.float32),
    )
    for values, middle in zip(spectra, to, strict=True):
        np.subtract(values, middle, out=apart)
        np.multiply(apart, apart, out=apart)
        np.add(out, apart, out=out)
    return out


def _dot(a: Float32, b: Float32) -> Float32:
    """Compute the inner product over bands, in their order: float32 [pixel]."""
    product: Float32 = functools.reduce(np.add, a * b)
    return product


def _sum_5x5(values: Int32) -> Int32:
    """Sum the 5 x 5 window around each pixel, with 0 beyond the image."""
    wide = np.pad(values, 2)
    height, width = values.shape
    rows = sum((wide[i : i + height] for i in range(1, 5)), wide[:height])
    return sum((rows[:, i : i + width] for i in range(1, 5)), rows[:, :width])
