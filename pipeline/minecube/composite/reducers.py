"""Many observations of a pixel -> one: numpy kernels over days.

`observed` is uint16 [day, y, x], reflectance x 10000, 0 = not observed; `stack` is uint16 [band, day, y, x], of which a day
has all bands at a pixel or none. A result depends on its own pixel's observations only, however the image is cut.

Order statistics come from sorting networks: numbers are compared in an order that is the same for all pixels, so that each
comparison is one instruction over thousands of them (Batcher 1968, Proc. AFIPS 32, odd-even merge sort; what the wanted ranks
do not need is left out). That a pixel lacks days is no obstacle to a median: every other missing value is set to the least
number and the rest to the greatest, which leaves the middle where it is.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from minecube.catalog import BestPixel

Bool = npt.NDArray[np.bool_]
Float = npt.NDArray[np.float32]
Int16 = npt.NDArray[np.int16]
Int32 = npt.NDArray[np.int32]
UInt16 = npt.NDArray[np.uint16]

CONVERGED = 1e-6
"""Reflectance by which a geomedian is expected to be off at most."""
MOST_STEPS = 1000
STRIDE = np.float32(1.2)  # of Weiszfeld's steps, which makes them a tenth to a fifth fewer; up to 2 converges (Ostresh 1978)
_ORDER_TILE, _SPECTRA_TILE = 16384, 4096  # pixels at a time, such that what is worked on stays in the caches
_FEW = 64  # pixels that are not worth laying aside, of which one alone would be summed in another order


class Geomedian(NamedTuple):
    """The geometric median of each pixel, and the median distances of the observations from it (Roberts et al. 2018)."""

    reflectance: UInt16
    """[band, y, x], 0 = none."""
    emad: Float
    """[y, x], Euclidean, in reflectance; NaN = none, as in the others."""
    smad: Float
    """[y, x], one less the cosine of the angle."""
    bcmad: Float
    """[y, x], Bray-Curtis."""


class Reducers(Protocol):
    """What a composite is reduced with: this module, or its like on a GPU."""

    def median(self, observed: UInt16) -> UInt16: ...  # noqa: D102
    def percentile(self, observed: UInt16, percent: float) -> UInt16: ...  # noqa: D102
    def geomedian(self, stack: UInt16) -> Geomedian: ...  # noqa: D102
    def medoid(self, stack: UInt16) -> Int16: ...  # noqa: D102
    def max_ndvi(self, red: UInt16, nir: UInt16) -> Int16: ...  # noqa: D102
    def best_pixel(self, score: Float, observed: Bool) -> Int16: ...  # noqa: D102
    def taken(self, observed: UInt16, index: Int16) -> UInt16: ...  # noqa: D102


def median(observed: UInt16) -> UInt16:
    """Median of what is observed: uint16 [y, x], halves rounded to even, 0 where there is nothing."""
    days = len(observed) + len(observed) % 2  # even, so that the two in the middle are the same for all
    comparisons = _network(days, (days // 2 - 1, days // 2)) if days else ()
    out = np.zeros(observed.shape[1:], dtype=np.uint16)
    for part, values in _tiles(observed, days, _ORDER_TILE, out):
        odd, tmp = np.zeros_like(part), np.empty_like(part)
        for row in values:
            missing = (row == 0).astype(np.uint16)
            np.bitwise_and(missing, odd, out=tmp)
            odd ^= missing
            tmp *= 65535
            row |= tmp
        rows = _compared(values, comparisons)
        low, high = rows[days // 2 - 1].astype(np.uint32), rows[days // 2]
        twice = low + high
        half = (twice >> 1) + ((twice & 1) & (twice >> 1 & 1))
        # One missing value more that is least: the upper of the two is the middle one.
        # Nothing but missing ones: half of them are 0.
        part[:] = np.where(odd, high, np.where(low == 0, 0, half))
    return out


def percentile(observed: UInt16, percent: float) -> UInt16:
    """That percentile of what is observed, linear between two: uint16 [y, x], halves rounded to even, 0 where nothing is."""
    days = len(observed)
    out = np.zeros(observed.shape[1:], dtype=np.uint16)
    for part, values in _tiles(observed, days, _ORDER_TILE, out):
        count = (values != 0).sum(axis=0)
        values[values == 0] = 65535
        rows = _compared(values, _network(days, tuple(range(days))))
        rank = np.maximum(count - 1, 0) * (percent / 100)
        first = np.floor(rank).astype(np.int64)
        low, high = (_at_rank(rows, r).astype(np.float64) for r in (first, np.minimum(first + 1, np.maximum(count - 1, 0))))
        share = rank - first
        # As numpy interpolates, from the nearer end.
        between = np.where(share < 0.5, low + (high - low) * share, high - (high - low) * (1 - share))
        part[:] = np.where(count > 0, np.rint(between), 0)
    return out


def lower_quartile(values: Int32, known: Bool) -> Int32:
    """The known value of rank (n - 1) // 4 over days, int32 [y, x]; 0 where none of [day, y, x] is known."""
    days = len(values)
    out = np.zeros(values.shape[1:], dtype=np.int32)
    ranks = (days - 1) // 4 + 1 if days else 0
    for (part, sorting), (_, there) in zip(
        _tiles(values, days, _ORDER_TILE, out), _tiles(known, days, _ORDER_TILE, out), strict=True
    ):
        sorting[~there] = np.iinfo(np.int32).max
        count = there.sum(axis=0)
        rows = _compared(sorting, _network(days, tuple(range(ranks))))
        part[:] = np.where(count > 0, _at_rank(rows[:ranks], np.maximum(count - 1, 0) // 4), 0)
    return out


def geomedian(stack: UInt16) -> Geomedian:
    """The geometric median, by Weiszfeld's steps until less than `CONVERGED` is left of the way, and its three deviations.

    Of two observations it is their mean.
    """
    bands, days, *shape = stack.shape
    flat = stack.reshape(bands, days, math.prod(shape))
    if flat.shape[2] == 1:  # of a single pixel numpy would sum days in another order
        twice = geomedian(np.repeat(stack, 2, axis=-1))
        return Geomedian(twice.reflectance[..., :1], twice.emad[..., :1], twice.smad[..., :1], twice.bcmad[..., :1])
    middle = np.zeros((bands, flat.shape[2]), dtype=np.uint16)
    away = np.full((3, flat.shape[2]), np.nan, dtype=np.float32)
    for part in _parts(flat.shape[2] if days else 0):
        spectra = flat[:, :, part].astype(np.float32)
        spectra *= np.float32(1e-4)
        seen = flat[0, :, part] != 0
        found = _at_observations(spectra, seen, _weiszfeld(spectra, seen))
        some = seen.any(axis=0)
        middle[:, part] = np.where(some, np.maximum(np.rint(found * np.float32(1e4)), 1), 0)
        away[:, part] = np.where(some, _deviations(spectra, seen, found), np.nan)
    emad, smad, bcmad = away.reshape(3, *shape)
    return Geomedian(middle.reshape(bands, *shape), emad, smad, bcmad)


def medoid(stack: UInt16) -> Int16:
    """The day nearest to all others, by the sum of Euclidean distances; of equals the first: int16 [y, x], -1 = none."""
    bands, days, *shape = stack.shape
    flat = stack.reshape(bands, days, math.prod(shape))
    out = np.full(flat.shape[2], -1, dtype=np.int16)
    for part in _parts(len(out) if days else 0):
        spectra = flat[:, :, part].astype(np.float32)
        seen = spectra[0] != 0
        total = np.zeros(seen.shape, dtype=np.float64)
        tmp, apart = np.empty((2, 1, 1, seen.shape[1]), dtype=np.float32)[:, 0]
        for one in range(days):
            for other in range(one):
                _squares(spectra[:, one, None], spectra[:, other], tmp, apart)
                np.sqrt(apart, out=apart)
                apart *= seen[one] & seen[other]
                total[one] += apart[0]
                total[other] += apart[0]
        total[~seen] = np.inf
        out[part] = np.where(seen.any(axis=0), total.argmin(axis=0), -1)
    return out.reshape(shape)


def max_ndvi(red: UInt16, nir: UInt16) -> Int16:
    """The day of the highest vegetation index; of equals the first: int16 [y, x], -1 = none."""
    best, out = np.full(red.shape[1:], -np.inf), np.full(red.shape[1:], -1, dtype=np.int16)
    for day in range(len(red)):
        r, n = red[day].astype(np.float64), nir[day].astype(np.float64)
        index = np.where((r > 0) & (n > 0), (n - r) / np.maximum(n + r, 1), -np.inf)
        out[index > best] = day
        np.maximum(best, index, out=best)
    return out


def best_pixel(score: Float, observed: Bool) -> Int16:
    """The observed day of the highest score; of equals the first: int16 [y, x], -1 = none."""
    if not len(score):
        return np.full(score.shape[1:], -1, dtype=np.int16)
    seen = np.where(observed, score, -np.inf)
    return np.where(observed.any(axis=0), seen.argmax(axis=0), -1).astype(np.int16)


def best_pixel_score(
    day_of_year: Sequence[int] | npt.NDArray[Any], cloud_distance_m: Float, opacity: Float, sharpness: Float, rule: BestPixel
) -> Float:
    """How good each observation is, float32 [day, y, x]: a weighted sum of parts from 0 to 1.

    After Griffiths et al. 2013 (IEEE JSTARS 6) and White et al. 2014 (Canadian Journal of Remote Sensing 40).

    Args:
        day_of_year: of each day.
        cloud_distance_m: [day, y, x] to the nearest cloud or shadow.
        opacity: [day, y, x], excess of haze, reflectance.
        sharpness: [day, y, x], 0..1.
        rule: where each part is 1 or 0, and its weight.
    """
    off = np.abs(np.asarray(day_of_year, dtype=np.float64) - rule.day)
    off = np.minimum(off, 365.25 - off)  # the year is round
    season = np.exp(-((off / rule.day_spread) ** 2) / 2).astype(np.float32)[:, None, None]
    score: Float = np.float32(rule.day_weight) * season + np.float32(rule.sharpness_weight) * sharpness
    score += np.float32(rule.cloud_weight) * np.minimum(cloud_distance_m / np.float32(rule.cloud_distance_m), 1)
    score += np.float32(rule.opacity_weight) * (1 - np.clip(opacity / np.float32(rule.opacity), 0, 1))
    return score


def sharpness(band: UInt16) -> Float:
    """Detail of each date against the sharpest of that pixel: float32 [day, y, x], 0..1; 1 where none has any, 0 not observed.

    The absolute Laplacian, averaged over those of 5 x 5 pixels that have one: whose four neighbours are observed, too.
    """
    detail = np.zeros(band.shape, dtype=np.float64)
    for day, image in enumerate(band.astype(np.int64)):
        inner, around = image[1:-1, 1:-1], (image[:-2, 1:-1], image[2:, 1:-1], image[1:-1, :-2], image[1:-1, 2:])
        whole = np.logical_and.reduce([a != 0 for a in (inner, *around)])
        bent = np.where(whole, np.abs(4 * inner - sum(around)), 0)
        total, count = (_sum_around(np.pad(a.astype(np.int64), 1)) for a in (bent, whole))
        detail[day] = np.where(image != 0, total / np.maximum(count, 1), 0)
    most = detail.max(axis=0, initial=0)
    share = np.where(most > 0, detail / np.where(most > 0, most, 1), 1)
    return np.where(band != 0, share, 0).astype(np.float32)


def _sum_around(values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Sums of integers [y, x] over 5 x 5 pixels, cut at the edges."""
    total = np.pad(values, 2)
    for axis in (0, 1):
        length = total.shape[axis] - 4
        total = np.sum([total.take(range(k, k + length), axis=axis) for k in range(5)], axis=0)
    return total


def taken(observed: UInt16, index: Int16) -> UInt16:
    """The observation of each pixel's chosen day, uint16 [y, x]; 0 where the index is -1."""
    if not len(observed):
        return np.zeros(index.shape, dtype=np.uint16)
    chosen = np.take_along_axis(observed, np.maximum(index, 0)[None].astype(np.intp), axis=0)[0]
    return np.where(index >= 0, chosen, 0).astype(np.uint16)


@functools.cache
def _network(n: int, wanted: tuple[int, ...]) -> tuple[tuple[int, int, bool, bool], ...]:
    """Comparisons that bring the wanted ranks of `n` numbers to their places: two rows, and of which the result is needed."""
    pairs = []
    p = 1
    while p < n:
        k = p
        while k:
            for j in range(k % p, n - k, 2 * k):
                pairs += [(i, i + k) for i in range(j, min(j + k, n - k)) if i // (2 * p) == (i + k) // (2 * p)]
            k //= 2
        p *= 2
    needed, kept = set(wanted), []
    for low, high in reversed(pairs):
        if low in needed or high in needed:
            kept.append((low, high, low in needed, high in needed))
            needed |= {low, high}
    return tuple(reversed(kept))


def _compared(values: npt.NDArray[Any], comparisons: Sequence[tuple[int, int, bool, bool]]) -> list[npt.NDArray[Any]]:
    """The rows of `values` [day, pixel] in the order that a network puts them in; `values` is used up."""
    rows = list(values)
    spare = np.empty_like(values[:1])[0] if len(values) else values
    for low, high, low_needed, high_needed in comparisons:
        a, b = rows[low], rows[high]
        if low_needed and high_needed:
            np.minimum(a, b, out=spare)
            np.maximum(a, b, out=b)
            rows[low], spare = spare, a
        elif low_needed:
            np.minimum(a, b, out=a)
        else:
            np.maximum(a, b, out=b)
    return rows


def _at_rank(rows: Sequence[npt.NDArray[Any]], rank: npt.NDArray[Any]) -> npt.NDArray[Any]:
    out = np.zeros_like(rows[0])
    for n, row in enumerate(rows):
        np.copyto(out, row, where=rank == n)
    return out


def _tiles(
    values: npt.NDArray[Any], days: int, pixels: int, out: npt.NDArray[Any]
) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """Parts of `out` [y, x], flat, and copies of their values [day, pixel], with days of 0 up to `days`."""
    if not days:
        return
    flat, target = values.reshape(len(values), out.size), out.reshape(-1)
    buffer = np.empty((days, min(pixels, max(len(target), 1))), dtype=values.dtype)
    for at in range(0, len(target), pixels):
        part = target[at : at + pixels]
        tile = buffer[:, : len(part)]
        tile[: len(values)] = flat[:, at : at + pixels]
        tile[len(values) :] = 0
        yield part, tile


def _parts(pixels: int) -> Iterator[slice]:
    """Slices of about `_SPECTRA_TILE` pixels, none of them small."""
    edges = np.linspace(0, pixels, max(pixels // _SPECTRA_TILE, 1) + 1).astype(int).tolist()
    yield from (slice(a, b) for a, b in itertools.pairwise(edges) if b > a)


def _squares(spectra: Float, middle: Float, tmp: Float, out: Float) -> Float:
    """Squared distance of each day [band, day, pixel] from one spectrum [band, pixel], band by band."""
    for k, (values, m) in enumerate(zip(spectra, middle, strict=True)):
        np.subtract(values, m, out=tmp)
        np.multiply(tmp, tmp, out=tmp if k else out)
        if k:
            out += tmp
    return out


def _weiszfeld(spectra: Float, seen: Bool) -> Float:
    """Geometric medians [band, pixel] of spectra [band, day, pixel]; each pixel stops for itself."""
    out = np.zeros((spectra.shape[0], spectra.shape[2]), dtype=np.float32)
    left, there = np.arange(spectra.shape[2]), seen.astype(np.float32)
    # From the mean, since what is small has digits to spare.
    origin = spectra.sum(axis=1) / np.maximum(there.sum(axis=0), 1)
    spectra, middle = spectra - origin[:, None], np.zeros_like(origin)
    done: Bool = np.logical_not(seen.any(axis=0))
    before, closer = np.zeros(len(left), dtype=np.float32), np.zeros(len(left), dtype=bool)
    weight, tmp = np.empty_like(there), np.empty_like(there)
    for _ in range(MOST_STEPS):
        if done.all():
            break
        if done.mean() > 0.5 and len(done) > _FEW:  # what is done need not be carried on
            out[:, left] = middle
            parts = (left, spectra, there, middle, before, closer, done)
            left, spectra, there, middle, before, closer, done = (np.compress(~done, a, axis=-1) for a in parts)
            weight, tmp = np.empty_like(there), np.empty_like(there)
        _squares(spectra, middle, tmp, weight)
        np.maximum(weight, 1e-16, out=weight)  # at an observation itself
        np.sqrt(weight, out=weight)
        np.divide(there, weight, out=weight)
        step, pull = np.empty_like(middle), weight.sum(axis=0)
        for values, total in zip(spectra, step, strict=True):
            np.multiply(values, weight, out=tmp)
            tmp.sum(axis=0, out=total)
        step /= np.where(done, 1, pull)
        step -= middle
        step *= STRIDE
        middle += np.where(done, 0, step)
        # Beside an observation steps are short for its pull alone; without it they would be of this length.
        now = (
            np.abs(step).max(axis=0) * pull / np.maximum(pull - weight.max(axis=0), np.float32(1e-6) * pull + np.float32(1e-30))
        )
        # They shrink in a geometric series, of which the rest is still to come: now * r / (1 - r), r = now / before. Twice in a
        # row, since two that cancel out can make one step short.
        close = now * now <= CONVERGED * (before - now)
        done |= (close & closer) | (now == 0)
        closer = close
        before = now
    out[:, left] = middle
    out += origin
    return out


def _at_observations(spectra: Float, seen: Bool, middle: Float) -> Float:
    """The same, moved to the nearest observation where that is the geometric median itself: steps get there in the limit only.

    It is where the unit vectors to the others sum up to no more than the number of its equals (Kuhn 1973, Mathematical
    Programming 4).
    """
    tmp, away = np.empty_like(seen, dtype=np.float32), np.empty_like(seen, dtype=np.float32)
    _squares(spectra, middle, tmp, away)
    away[~seen] = np.inf
    nearest = np.take_along_axis(spectra, away.argmin(axis=0)[None, None], axis=1)[:, 0]
    _squares(spectra, nearest, tmp, away)
    np.sqrt(away, out=away)
    equal = (away == 0) & seen
    unit = np.where(seen & ~equal, 1 / np.where(away > 0, away, 1), 0).astype(np.float32)
    pull = np.zeros(seen.shape[1], dtype=np.float32)
    for values, at in zip(spectra, nearest, strict=True):
        np.subtract(values, at, out=tmp)
        np.multiply(tmp, unit, out=tmp)
        pull += tmp.sum(axis=0) ** 2
    # Where it is just as many, as between two observations, all the way to the next one is median, and the middle stays.
    best = np.sqrt(pull) < equal.sum(axis=0) * np.float32(1 - 1e-6)
    return np.where(best, nearest, middle)


def _deviations(spectra: Float, seen: Bool, middle: Float) -> Float:
    """emad, smad and bcmad, [3, pixel]: medians over days of the distances from the middle [band, pixel]."""
    tmp, length, manhattan, total = (np.zeros(seen.shape, dtype=np.float32) for _ in range(4))
    away = np.empty((3, *seen.shape), dtype=np.float32)
    np.sqrt(_squares(spectra, middle, tmp, away[0]), out=away[0])
    _squares(spectra, np.zeros_like(middle), tmp, length)
    np.divide(1, np.maximum(np.sqrt(length, out=length), np.float32(1e-12), out=length), out=length)
    direction = middle / np.maximum(np.sqrt((middle * middle).sum(axis=0)), np.float32(1e-12))
    away[1] = 0
    for values, m, d in zip(spectra, middle, direction, strict=True):
        # One less the cosine is half the squared distance on the unit sphere, which keeps the digits of small angles.
        np.multiply(values, length, out=tmp)
        tmp -= d
        np.multiply(tmp, tmp, out=tmp)
        away[1] += tmp
        np.subtract(values, m, out=tmp)
        np.abs(tmp, out=tmp)
        manhattan += tmp
        np.add(values, m, out=tmp)
        total += tmp
    away[1] *= np.float32(0.5)
    np.divide(manhattan, np.maximum(total, np.float32(1e-12), out=total), out=away[2])
    return _medians(away, seen)


def _medians(values: Float, seen: Bool) -> Float:
    """Medians over days of what is seen, of several [n, day, pixel]: float32 [n, pixel]; NaN where nothing is."""
    days = seen.shape[0] + seen.shape[0] % 2
    least = np.empty((days, seen.shape[1]), dtype=bool)
    greatest, odd = np.zeros_like(least), np.zeros(seen.shape[1], dtype=bool)
    for day in range(days):
        missing = ~seen[day] if day < len(seen) else np.ones_like(odd)
        np.logical_and(missing, odd, out=greatest[day])
        np.logical_and(missing, ~odd, out=least[day])
        odd ^= missing
    rows, out = np.empty(least.shape, dtype=np.float32), np.empty((len(values), seen.shape[1]), dtype=np.float32)
    for each, middle in zip(values, out, strict=True):
        rows[: len(each)] = each
        np.copyto(rows, -np.inf, where=least)
        np.copyto(rows, np.inf, where=greatest)
        ordered = _compared(rows, _network(days, (days // 2 - 1, days // 2)))
        low, high = ordered[days // 2 - 1], ordered[days // 2]
        with np.errstate(invalid="ignore"):  # infinities of a pixel without any
            middle[:] = np.where(odd, high, (low + high) / 2)
    return out
