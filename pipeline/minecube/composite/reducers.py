"""Reducers of many observations of a year to one, in numpy.

This module has the geomedian, and days by score. `ranks` has the median.

`observed` is uint16 [day, y, x]: reflectance x 10000, 0 = not observed, valid >= 1. A day is an
overpass. `stack` is uint16 [band, day, y, x], 0 in all bands or in none. A pixel's result depends
bit by bit only on its own values, not on the cut of the image. Sums run over days and bands in
their order, never along pixels.

The geomedian is the only reducer that takes a large share of a composite: 39 % of the processor
time with 20 dates, 74 % with 40. The package geomad takes 1.5 times as long for its kernel alone
as minecube for a whole composite (`benchmarks/composite.py`).
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from minecube.arrays import Bool, Float32, Int16, Int32, UInt16
from minecube.catalog import BestPixel
from minecube.composite.ranks import median, median_of_observed

__all__ = [
    "Geomedian",
    "choose_best_day",
    "geomedian",
    "measure_sharpness",
    "median",
    "score_days",
    "take_day",
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


def geomedian(stack: UInt16) -> Geomedian:
    """Compute the geomedian and the median deviations from it.

    The geomedian is the spectrum with the least sum of Euclidean distances to the observations. See
    Roberts, Mueller and McIntyre 2017 (IEEE TGRS 55, high-dimensional pixel composites). For the
    median absolute deviations see Roberts, Dunn and Mueller 2018 (IGARSS).

    The search is Weiszfeld's iteration from the median of each band. Vardi and Zhang's method
    (2000, PNAS 97) leaves an observation reached by the search. Each step leaps ahead along the
    last two steps (Anderson acceleration of depth one), unless the sum of distances rose. With two
    observations, any point between them is a geomedian; the result is their middle.
    """
    bands, days, *shape = stack.shape
    flat = stack.reshape(bands, days, math.prod(shape))
    pixels = flat.shape[2]
    reflectance = np.zeros((bands, pixels), dtype=np.uint16)
    deviations = np.full((3, pixels), np.nan, dtype=np.float32)
    for start in range(0, pixels, _TILE):
        tile = flat[:, :, start : start + _TILE]
        observed = tile[0] != 0
        has_pixels = observed.any(axis=1)
        if not has_pixels.any():
            continue
        width = tile.shape[2]
        if width == 1:  # numpy sums one column in another order than several
            tile = tile.repeat(2, axis=2)
            observed = observed.repeat(2, axis=1)
        centre, tile_deviations = _geomedian_of_tile(tile[:, has_pixels], observed[has_pixels])
        reflectance[:, start : start + width] = np.rint(centre)[:, :width]
        deviations[:, start : start + width] = tile_deviations[:, :width]
    emad, smad, bcmad = deviations.reshape(3, *shape)
    return Geomedian(reflectance.reshape(bands, *shape), emad, smad, bcmad)


def choose_best_day(score: Float32, observed: Bool) -> Int16:
    """Choose the day of highest score: int16 [y, x], the earliest of equal days, -1 = not observed.

    Scores are [day, y, x], finite at observations.
    """
    index = np.full(score.shape[1:], -1, dtype=np.int16)
    highest = np.full(index.shape, -np.inf, dtype=np.float32)
    for day, (day_score, day_observed) in enumerate(zip(score, observed, strict=True)):
        better = (day_score > highest) & day_observed
        index[better] = day
        np.copyto(highest, day_score, where=better)
    return index


def score_days(
    day_of_year: npt.NDArray[np.integer[Any]],
    cloud_distance_m: Float32,
    opacity: Float32,
    sharpness: Float32,
    rule: BestPixel,
) -> Float32:
    """Score each observation: float32 [day, y, x], a weighted sum of four parts from 0 to 1.

    After Griffiths et al. 2013 (IEEE JSTARS 6) and White et al. 2014 (Canadian Journal of Remote
    Sensing 40).

    `day_of_year` is that of each day, 1..366. The arrays are float32 [day, y, x]: metres to the
    day's nearest cloud or shadow, excess of haze in reflectance, and the result of
    `measure_sharpness`.
    """
    gap = np.abs(day_of_year.astype(np.float64) - rule.day)
    gap = np.minimum(gap, YEAR_DAYS - gap)
    season = rule.day_weight * np.exp(-((gap / rule.day_spread) ** 2) / 2)
    score: Float32 = np.clip(cloud_distance_m / np.float32(rule.cloud_distance_m), 0, 1)
    score *= np.float32(rule.cloud_weight)
    score += season.astype(np.float32)[:, None, None]
    clearness = 1 - np.clip(opacity / np.float32(rule.opacity), 0, 1)
    clearness *= np.float32(rule.opacity_weight)
    score += clearness
    score += sharpness * np.float32(rule.sharpness_weight)
    return score


def measure_sharpness(band: UInt16) -> Float32:
    """Measure each date's local detail relative to the pixel's sharpest date: float32 [day, y, x].

    `band` has the same shape, 0 = not observed. Results are 0..1, 0 = not observed. Detail is the
    mean absolute Laplacian in a 5 x 5 window. A pixel has a Laplacian if it and its four neighbours
    are observed. So the measure depends on pixels up to three pixels away. Pixels beyond the image
    count as unobserved. If no date has detail, all observations get 1.
    """
    sharp = np.zeros(band.shape, dtype=np.float32)
    for day_band, detail in zip(band, sharp, strict=True):
        ring = np.pad(day_band.astype(np.int32), 1)
        neighbours = (ring[:-2, 1:-1], ring[2:, 1:-1], ring[1:-1, :-2], ring[1:-1, 2:])
        has_laplacian = day_band > 0
        for neighbour in neighbours:
            has_laplacian &= neighbour > 0
        laplacian = np.abs(4 * ring[1:-1, 1:-1] - sum(neighbours)) * has_laplacian
        np.divide(
            _sum_5x5(laplacian),
            np.maximum(_sum_5x5(has_laplacian.astype(np.int32)), 1),
            out=detail,
            casting="same_kind",
        )
        detail *= day_band > 0
    sharpest = sharp.max(axis=0, initial=0)
    for day_band, detail in zip(band, sharp, strict=True):
        np.divide(detail, sharpest, out=detail, where=sharpest > 0)
        detail[(sharpest == 0) & (day_band > 0)] = 1
    return sharp


def take_day(observed: UInt16, index: Int16) -> UInt16:
    """Take the value of the indexed day of [day, y, x]: uint16 [y, x], 0 at index -1."""
    if not len(observed):
        return np.zeros(index.shape, dtype=np.uint16)
    values = np.take_along_axis(observed, np.maximum(index, 0)[None], axis=0)[0]
    return np.where(index >= 0, values, 0).astype(np.uint16)


class _Search(NamedTuple):
    """State of the search for geomedians: float32 [band, pixel], `cost` [pixel]."""

    step: Float32
    end: Float32
    cost: Float32


def _geomedian_of_tile(tile: UInt16, observed: Bool) -> tuple[Float32, Float32]:
    """Compute geomedian and deviations of a tile.

    The geomedian is float32 [band, pixel] in stored units, 0 = none. Deviations are float32 [3,
    pixel], NaN = none.
    """
    origin = median_of_observed(tile.swapaxes(0, 1), observed)
    # Differences from the origin are small, and exact as halves of integers.
    spectra = tile.astype(np.float32)
    spectra -= origin[:, None]
    weight = observed.astype(np.float32)
    centre = _snap_to_observations(spectra, weight, _search_geomedians(spectra, weight))
    distances = _measure_distances(spectra, weight, centre, origin)
    deviations = median_of_observed(distances.view(np.int32), observed)
    deviations[:, ~observed.any(axis=0)] = np.nan
    return origin + centre, deviations


def _search_geomedians(spectra: Float32, weight: Float32) -> Float32:
    """Search the geomedians float32 [band, pixel] of spectra [band, day, pixel].

    `weight` [day, pixel] is 1 at observations, else 0. Each pixel stops independently. Once half of
    the pixels have stopped, the search drops the stopped pixels from its arrays.
    """
    point = np.zeros((len(spectra), spectra.shape[2]), dtype=np.float32)
    geomedians = point.copy()
    pixels = np.arange(point.shape[1])
    active = np.ones(len(pixels), dtype=bool)
    state: _Search | None = None
    for _ in range(MOST_STEPS):
        step = _take_weiszfeld_step(spectra, weight, point)
        target, state = _leap(step, state)
        squared_move = np.maximum(_dot(target - point, target - point), _dot(step.step, step.step))
        point = target
        stops = active & (squared_move < CLOSE**2)
        geomedians[:, pixels[stops]] = point[:, stops]
        active &= ~stops
        count = np.count_nonzero(active)
        if not count:
            return geomedians
        if 1 < count <= len(pixels) // 2:  # at least two: numpy sums one column in another order
            spectra, weight, point = (
                np.compress(active, a, axis=-1) for a in (spectra, weight, point)
            )
            state = _Search(*(np.compress(active, a, axis=-1) for a in state))
            pixels = pixels[active]
            active = active[active]
    geomedians[:, pixels[active]] = point[:, active]
    return geomedians


def _snap_to_observations(spectra: Float32, weight: Float32, centre: Float32) -> Float32:
    """Move geomedians [band, pixel] onto their nearest observation if it is the geomedian itself.

    Near this observation the steps of the search are short. An observation is the geomedian if the
    summed unit vectors towards the others are shorter than the number of observations equal to it.
    With two observations both sides are equal, so neither is chosen.
    """
    squared = _squared_distance(spectra, centre)
    squared[weight == 0] = np.inf
    nearest = np.take_along_axis(spectra, squared.argmin(axis=0)[None, None], axis=1)[:, 0]
    distance = np.sqrt(_squared_distance(spectra, nearest))
    equal = (distance == 0) & (weight > 0)
    pull = np.divide(weight * ~equal, np.maximum(distance, np.float32(0.5)))
    total_pull = np.empty_like(centre)
    product = np.empty_like(distance)
    for band, values in enumerate(spectra):
        np.subtract(values, nearest[band], out=product)
        np.multiply(product, pull, out=product)
        np.add.reduce(product, axis=0, out=total_pull[band])
    equal_count = equal.sum(axis=0, dtype=np.int32)
    is_geomedian = np.sqrt(_dot(total_pull, total_pull)) < equal_count * np.float32(1 - 1e-6)
    return np.where(is_geomedian, nearest, centre)


def _leap(step: _Search, state: _Search | None) -> tuple[Float32, _Search]:
    """Return the next point and the state to remember.

    The state is the last step. If the last leap raised the cost, the state stays the same, and the
    search continues from its end.
    """
    if state is None:
        return step.end, step
    turn = step.step - state.step
    leap = _dot(step.step, turn) / np.maximum(_dot(turn, turn), _TINY)
    leap = np.where(leap < 0.5, np.maximum(leap, -MOST_AHEAD), 0)  # growing steps do not converge
    target = step.end - leap.astype(np.float32) * (step.end - state.end)
    worse = step.cost > state.cost * np.float32(1 + 1e-6)
    if not worse.any():
        return target, step
    best_state = _Search(*(np.where(worse, b, a) for a, b in zip(step, state, strict=True)))
    return np.where(worse, state.end, target), best_state


def _take_weiszfeld_step(spectra: Float32, weight: Float32, point: Float32) -> _Search:
    """Take one step of Weiszfeld's iteration from a point [band, pixel].

    The cost in the result is the sum of distances at this point.
    """
    distance = np.sqrt(_squared_distance(spectra, point))
    touching = distance <= TOUCHING
    touches = touching.any()
    free_weight = weight * ~touching if touches else weight
    pull = np.divide(free_weight, np.maximum(distance, TOUCHING))
    cost = np.add.reduce(distance * weight, axis=0)
    total = np.maximum(np.add.reduce(pull, axis=0), _TINY)
    step = np.empty_like(point)
    product = np.empty_like(distance)
    for band, values in enumerate(spectra):
        np.multiply(values, pull, out=product)
        np.add.reduce(product, axis=0, out=step[band])
    step /= total
    step -= point * (total > _TINY)
    if touches:  # stay, unless the others pull harder than the touched observations
        resistance = np.add.reduce(touching * weight, axis=0)
        force = np.sqrt(_dot(step, step)) * total
        step *= np.maximum(1 - resistance / np.maximum(force, _TINY), 0)
    return _Search(step, point + step, cost)


def _measure_distances(
    spectra: Float32, weight: Float32, centre: Float32, origin: Float32
) -> Float32:
    """Measure each observation's distances from the geomedian: float32 [day, 3, pixel], 0 = none.

    The three are Euclidean, cosine and Bray-Curtis distance. The cosine distance is (d² - (|a| -
    |b|)²) / 2|a||b| with the Euclidean distance d. 1 - cos would lose digits.
    """
    spectrum = origin + centre
    length = np.sqrt(_dot(spectrum, spectrum))
    squared = _squared_distance(spectra, centre)
    lengths = np.zeros_like(squared)
    difference = np.zeros_like(squared)
    total = np.zeros_like(squared)
    value = np.empty_like(squared)
    for values, band_centre, band_origin in zip(spectra, centre, origin, strict=True):
        np.subtract(values, band_centre, out=value)
        difference += np.abs(value, out=value)
        np.add(values, band_origin, out=value)
        total += value
        value *= value
        lengths += value
    np.sqrt(lengths, out=lengths)
    distances = np.empty((len(weight), 3, centre.shape[1]), dtype=np.float32)
    distances[:, 0] = np.sqrt(squared) / np.float32(1e4)
    distances[:, 1] = np.maximum(squared - (lengths - length) ** 2, 0) / np.maximum(
        2 * lengths * length, _TINY
    )
    total += functools.reduce(np.add, spectrum)
    distances[:, 2] = difference / np.maximum(total, _TINY)
    distances *= weight[:, None]
    return distances


def _squared_distance(spectra: Float32, centre: Float32) -> Float32:
    """Compute squared distances of spectra [band, day, pixel] to one spectrum [band, pixel].

    Returns float32 [day, pixel].
    """
    squared = np.zeros(spectra.shape[1:], dtype=np.float32)
    difference = np.empty(spectra.shape[1:], dtype=np.float32)
    for values, band_centre in zip(spectra, centre, strict=True):
        np.subtract(values, band_centre, out=difference)
        np.multiply(difference, difference, out=difference)
        np.add(squared, difference, out=squared)
    return squared


def _dot(a: Float32, b: Float32) -> Float32:
    """Compute the inner product over bands, in their order: float32 [pixel]."""
    return functools.reduce(np.add, a * b)


def _sum_5x5(values: Int32) -> Int32:
    """Sum the 5 x 5 window around each pixel, with 0 beyond the image."""
    padded = np.pad(values, 2)
    height, width = values.shape
    rows = sum((padded[i : i + height] for i in range(1, 5)), padded[:height])
    return sum((rows[:, i : i + width] for i in range(1, 5)), rows[:, :width])
