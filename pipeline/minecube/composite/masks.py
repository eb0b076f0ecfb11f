"""Which observations of a pixel are clear, and what it is made of where none is: numpy kernels on SCL's pixels of 20 m.

Arrays are [day, y, x], a day being an overpass. All arithmetic is of integers and flags, and every neighbourhood is of fixed
size, so that a pixel's value does not depend on how the site is cut into blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view
from scipy import ndimage

from minecube.catalog import FALLBACKS, BrightOverride, HazeTest, MaskRule, Recipe
from minecube.composite.ranks import lower_quartile

Bool = npt.NDArray[np.bool_]
UInt8 = npt.NDArray[np.uint8]
Int16 = npt.NDArray[np.int16]
Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]

PIXEL_M = 20
"""Pixel size of all masks, the mission's of SCL."""
CELL = 4
"""Pixels a side of the cells on which the surroundings of bright ground are looked at: 80 m, against windows of 600 m."""
_PER_UNIT = 64
_PROOF = round(np.log(1000) * _PER_UNIT)
"""Evidence at which bright ground is 1000 times likelier than chance clouds."""
_LEAST_CHANCE = 0.01
"""Least probability of a chance cloud: two dates in clear surroundings are just enough as evidence."""
CLEAR, UNUSABLE = 1, 255
_CLOUD, _NODATA = (8, 9), 0
_LAST_CLASS = 11  # snow
VEILED = 12
"""A class that SCL lacks: clear ground of a date that is under thin cloud as a whole. All recipes take it for thin cloud."""
_CLEAR_CLASSES, _BARE, _CIRRUS = (2, 4, 5, 6, 7), 5, 10


def mosaic(scl: Iterable[UInt8], days: Sequence[int]) -> tuple[Int16, UInt8]:
    """Which scene each day's pixel comes from, and the day's SCL.

    The first scene of a day that has a pixel keeps it. Each scene loses the outermost pixel of its coverage first: there
    20 m and 10 m pixels are partly outside the swath.

    Args:
        scl: uint8 [y, x] of each scene as it comes, 0 = no data; those of a day in order of preference.
        days: index of each scene's day, 0..n-1.

    Returns:
        int16 [day, y, x], index of the scene, -1 = not observed; uint8 [day, y, x], 0 = not observed.
    """
    owner, day_scl = np.empty((0, 0, 0), np.int16), np.empty((0, 0, 0), np.uint8)
    for i, (day, layer) in enumerate(zip(days, scl, strict=True)):
        if not i:
            shape = (max(days) + 1, *layer.shape)
            owner, day_scl = np.full(shape, -1, dtype=np.int16), np.zeros(shape, dtype=np.uint8)
        free = _inside(layer) & (owner[day] < 0)
        np.copyto(owner[day], i, where=free)
        np.copyto(day_scl[day], layer, where=free)
    return owner, day_scl


def corrected(scl: UInt8, error: str | None) -> UInt8:
    """The classes of a scene, whose SCL may err as a whole. Numbers that are no class of SCL become 0, not observed.

    Args:
        scl: uint8 [y, x].
        error: `veiled` makes clear ground `VEILED`, `no cirrus` makes cirrus bare ground; None changes nothing.
    """
    scl = np.where(scl <= _LAST_CLASS, scl, np.uint8(_NODATA))
    if error == "veiled":
        return np.where(_among(scl, _CLEAR_CLASSES), np.uint8(VEILED), scl)
    if error == "no cirrus":
        return np.where(scl == _CIRRUS, np.uint8(_BARE), scl)
    return scl


def kinds(scl: UInt8, recipe: Recipe, months: Sequence[int], seasons: Sequence[int], opinion: UInt8 | None = None) -> UInt8:
    """What each observation is: an index into `QUALITY`, 0 = not observed, 255 = not to be used.

    Args:
        scl: uint8 [day, y, x] scene classification, 0 = not observed.
        recipe: its mask rules and bright override.
        months: calendar month of each day.
        seasons: of each day, the kind of its clear observations: 1 in the recipe's months, or the fallback that has it.
        opinion: uint8 [day, y, x], classes of a second mask, 0 = clear.

    Returns:
        uint8 [day, y, x].
    """
    ground = persistently_bright(scl, recipe.bright_override) if recipe.bright_override else None
    out = np.empty_like(scl)
    for day, layer in enumerate(scl):  # day by day, so that memory is that of the result
        bright = None if ground is None else ground[day]
        out[day] = kinds_of_day(layer, bright, recipe, months[day], seasons[day], None if opinion is None else opinion[day])
    return out


def kinds_of_day(layer: UInt8, bright: Bool | None, recipe: Recipe, month: int, season: int, opinion: UInt8 | None) -> UInt8:
    """Classify the observations of one day: uint8 [y, x], as `kinds` returns them.

    Args:
        layer: uint8 [y, x] scene classification, 0 = not observed.
        bright: bool [y, x], pixels that SCL calls cloud although the ground is bright; None without a bright override.
        recipe: its mask rules.
        month: calendar month of the day.
        season: the kind of the day's clear observations.
        opinion: uint8 [y, x], classes of a second mask, 0 = clear.
    """
    observed = layer != _NODATA
    hidden = layer == VEILED
    grown = hidden.copy()
    for rule in (r for r in recipe.mask if month in r.months):
        flagged = _among(layer, rule.classes)
        if bright is not None:
            flagged &= ~bright
        hidden |= flagged
        grown |= grow(flagged, rule)
    if opinion is not None and recipe.second_opinion:
        seen = _among(opinion, recipe.second_opinion.classes)
        if bright is not None:
            seen &= ~bright
        hidden |= seen
        grown |= dilated(seen, recipe.second_opinion.dilate_m)
    clear = observed & ~grown
    out: UInt8 = np.full_like(layer, UNUSABLE if season != CLEAR else FALLBACKS["ungrown"])
    if season == CLEAR:
        np.copyto(out, FALLBACKS["thin"], where=hidden)
        np.copyto(out, FALLBACKS["cloud"], where=hidden & _among(layer, _CLOUD))
    np.copyto(out, np.uint8(season), where=clear)
    out *= observed
    return out


def grow(flagged: Bool, rule: MaskRule) -> Bool:
    """Flags [y, x] with specks narrower than `open_m` gone and the rest dilated by a disc of `dilate_m`."""
    size = rule.open_m // PIXEL_M
    return dilated(opened(flagged, size) if size > 1 else flagged, rule.dilate_m)


def opened(flagged: Bool, size: int) -> Bool:
    """Flags [y, x] of which only what holds a square of `size` pixels is left."""
    corner = _run(_run(~flagged, 0, 0, size - 1), 1, 0, size - 1)  # pixels from which the square would leave the flags
    corner[1 - size :], corner[:, 1 - size :] = True, True
    return _run(_run(~corner, 0, 1 - size, 0), 1, 1 - size, 0) & flagged


def dilated(flagged: Bool, radius_m: int) -> Bool:
    """Flags [y, x] and all within a disc of that radius, centre to centre."""
    reach = radius_m // PIXEL_M
    if not reach or not flagged.any():
        return flagged
    out = flagged.copy()
    wide, half = flagged, 0
    for dy in range(reach, -1, -1):  # the disc is rows, each shorter the farther it lies from the middle
        width = int((reach**2 - dy**2) ** 0.5)
        wide, half = _grown_sideways(wide, half, width), width
        for step in {dy, -dy}:
            _or_shifted(out, wide, step, 0)
    return out


def persistently_bright(scl: UInt8, rule: BrightOverride) -> Bool:
    """Observations [day, y, x] that SCL calls cloud although only the ground is bright.

    A mine's bare ground is flagged on nearly every date. So the surroundings of a date are judged without the pixels that
    are flagged clearly more often than usual on the other dates. Where they are clear, a pixel's flags are the ground's if
    it is flagged on at least `rule.flagged` of such dates, and if chance clouds are an unlikely cause: see `_evidence`.
    """
    observed = scl != _NODATA
    flagged = _among(scl, rule.classes)
    looks = observed.sum(axis=0, dtype=np.int32)
    flags = flagged.sum(axis=0, dtype=np.int32)
    share = flags / np.maximum(looks, 1)
    # The surroundings' own share: their lower quartile, on one pixel of each cell, so that a large mine, itself flagged
    # nearly always, does not raise it.
    half = rule.window_m // (PIXEL_M * CELL)
    sample = np.where(looks > 0, share, np.nan)[::CELL, ::CELL]
    usual = (_of_cells(_lower_quartile_around(sample, half), share.shape) + 0.2).astype(np.float32)
    clear_around = np.empty_like(observed)
    evidence = np.zeros(share.shape, np.int32)
    for day in range(len(scl)):
        # Without the date itself: of few dates, each flag makes a pixel stand out.
        ordinary = flags - flagged[day] <= usual * (looks - observed[day])
        counted = observed[day] & ordinary
        cloudy, seen = (window_sum(_cell_sums(layer), half) for layer in (flagged[day] & counted, counted))
        # Surroundings without any observation prove nothing.
        clear = (cloudy <= rule.around * seen) & (seen > 0)
        clear_around[day] = _of_cells(clear, share.shape) & observed[day]
        if_flagged, if_not = _evidence(cloudy, seen, rule)
        evidence += clear_around[day] * np.where(
            flagged[day], _of_cells(if_flagged, share.shape), _of_cells(if_not, share.shape)
        )
    flagged &= clear_around
    dates = clear_around.sum(axis=0, dtype=np.int32)
    often = flagged.sum(axis=0, dtype=np.int32) >= np.maximum(rule.flagged * dates, 2)
    flagged &= often & (evidence >= _PROOF)
    return flagged


def _evidence(cloudy: Int32, seen: Int32, rule: BrightOverride) -> tuple[Int32, Int32]:
    """What one date says for bright ground and against chance clouds, where it is flagged, and where it is not.

    A logarithm of a likelihood ratio, summed over dates (Wald 1945, Annals of Mathematical Statistics 16): bright ground is
    flagged with the probability `rule.flagged`, other ground with that of its surroundings on the date. Rounded to whole
    `_PER_UNIT`, so that sums are exact.

    Args:
        cloudy: flagged pixels around, int32 [y, x].
        seen: observed pixels around.
        rule: the bright override.
    """
    chance = np.clip(cloudy / np.maximum(seen, 1), _LEAST_CHANCE, max(rule.around, _LEAST_CHANCE))
    bright = min(max(rule.flagged, 0.05), 0.95)
    if_flagged = np.log(bright / chance) * _PER_UNIT
    if_not = np.log((1 - bright) / (1 - chance)) * _PER_UNIT
    return np.rint(if_flagged).astype(np.int32), np.rint(if_not).astype(np.int32)


def chosen(kind: UInt8, recipe: Recipe) -> tuple[Bool, UInt8]:
    """The observations a pixel is made of: its clear ones and, where they are too few, what the recipe's fallbacks add.

    Thin cloud and cloud are taken only where there is nothing else; steps that are clear, up to `min_clear`.

    Args:
        kind: uint8 [day, y, x], as `kinds` gives it.
        recipe: its `fallback` and `min_clear`.

    Returns:
        use: bool [day, y, x]. quality: uint8 [y, x], index into `QUALITY` of the last step taken; 0 where there is nothing.
    """
    use = kind == CLEAR
    count = use.sum(axis=0, dtype=np.int32)
    quality = (count > 0).astype(np.uint8)
    for step in recipe.fallback:
        needy = count < (1 if step in ("thin", "cloud") else recipe.min_clear)
        if not needy.any():
            continue
        added = (kind == FALLBACKS[step]) & needy
        more = added.sum(axis=0, dtype=np.int32)
        use |= added
        count += more
        quality[more > 0] = FALLBACKS[step]
    return use, quality


def clearest(kind: UInt8, most: int, enough: int, day_of_year: Sequence[int]) -> Bool:
    """The clear observations worth reading: of the clearest days, spread over the season, and others only where they lack.

    First up to `most` days, each time the one that adds most to pixels of fewer than `most`, less the nearer it is to one
    that is chosen. Then, for pixels that have fewer than `enough`, more days, of which only those pixels are read.

    Args:
        kind: uint8 [day, y, x], as `kinds` gives it.
        most: days.
        enough: clear observations a pixel should have, where so many exist.
        day_of_year: of each day.

    Returns:
        bool [day, y, x], a part of the clear ones.
    """
    clear = kind == CLEAR
    use: Bool = np.zeros_like(clear)
    count = np.zeros(clear.shape[1:], dtype=np.int32)
    when = np.asarray(day_of_year, dtype=np.float64)
    apart = max((when.max() - when.min()) / most, 1.0)  # days between dates if they were evenly spread
    left, picked = [d for d in range(len(clear)) if clear[d].any()], list[int]()

    def gains(needed: int) -> npt.NDArray[np.float64]:
        return np.array([np.count_nonzero(clear[d] & (count < needed)) for d in left], dtype=np.float64)

    while left and len(picked) < most and (gain := gains(most)).any():
        if picked:
            gap = np.abs(when[left][:, None] - when[picked]).min(axis=1)
            gain *= 0.5 + 0.5 * np.minimum(gap / apart, 1)
        picked.append(day := left.pop(int(gain.argmax())))
        use[day] = clear[day]
        count += use[day]
    while left and (gain := gains(enough)).any():
        day = left.pop(int(gain.argmax()))
        use[day] = clear[day] & (count < enough)
        count += use[day]
    return use


def without_haze(hot: Int32, use: Bool, quality: UInt8, rule: HazeTest) -> tuple[Bool, UInt8, Int32]:
    """The observations that are not under thin cloud; where all are, they stay and the quality says so.

    Over clear ground blue and red rise and fall together, over haze blue rises more (the haze optimised transform: Zhang,
    Guindon and Cihlar 2002, Remote Sensing of Environment 82; coefficient of Zhu and Woodcock 2012, same journal 118). Against
    the pixel's own lower quartile, a field that is ploughed or a pit that grows is no haze.

    Args:
        hot: int32 [day, y, x], 2 x blue - red, each the sum of reflectance x 10000 over the four 10 m pixels; used up.
        use: bool [day, y, x], the observations it is of.
        quality: uint8 [y, x], index into `QUALITY`.
        rule: the threshold and the window.

    Returns:
        use and quality, changed; and the excess that was judged, int32 [day, y, x], reflectance x 80000.
    """
    # Integers throughout: a window's sum must not depend on where in the array it lies.
    hot -= lower_quartile(hot, use)
    hot *= use
    half = rule.window_m // PIXEL_M // 2
    for day, above in enumerate(hot):
        seen = np.maximum(window_sum(use[day].astype(np.int32), half), 1)
        above[:] = window_sum(above, half) // seen
    hazy = use & (hot > rule.excess * 1e4 * 2 * 4)
    left = use & ~hazy
    some = left.any(axis=0)
    worse = ~some & (quality == CLEAR)
    return np.where(some, left, use), np.where(worse, FALLBACKS["thin"], quality).astype(np.uint8), hot


def window_sum(values: Int32, half: int) -> Int32:
    """Sums of integers [y, x] over the square of `2 * half + 1` pixels around each pixel, cut at the edges; exact."""
    total = values
    for axis in (0, 1):
        n = total.shape[axis]
        upto = np.zeros_like(total, shape=[s + (a == axis) for a, s in enumerate(total.shape)])
        np.cumsum(total, axis=axis, out=upto[1:] if axis == 0 else upto[:, 1:])
        low, high = np.clip(np.arange(n) - half, 0, n), np.clip(np.arange(n) + half + 1, 0, n)
        total = upto.take(high, axis=axis) - upto.take(low, axis=axis)
    return total


def cloud_distance_m(kind: UInt8, most_m: int) -> Float32:
    """Distance of each observation [day, y, x] from the nearest of its day that is not clear, in metres, up to `most_m`."""
    out = np.full(kind.shape, most_m, dtype=np.float32)
    for day, layer in enumerate(kind):
        cloudy = ~np.isin(layer, (0, CLEAR, FALLBACKS["wider-season"], FALLBACKS["neighbour-year"]))
        if cloudy.any():
            out[day] = np.minimum(ndimage.distance_transform_edt(~cloudy) * PIXEL_M, most_m)
    return out


def _among(layer: UInt8, classes: Sequence[int]) -> Bool:
    found: Bool = layer == classes[0]
    for other in classes[1:]:  # a comparison each is many times faster than looking each pixel up
        found |= layer == other
    return found


def _inside(scl: UInt8) -> Bool:
    """Where a scene has data, its outermost pixel left out; beyond the array it is taken to go on."""
    seen: Bool = scl != _NODATA
    if seen.all():
        return seen
    inside: Bool = np.logical_not(_run(_run(seen == 0, 0, -1, 1), 1, -1, 1))
    return inside


def _run(flags: Bool, axis: int, first: int, last: int) -> Bool:
    """Whether any of the pixels `first`..`last` further along the axis is flagged; beyond the array none is."""
    out = np.zeros_like(flags)
    for step in range(first, last + 1):
        _or_shifted(out, flags, *((-step, 0) if axis == 0 else (0, -step)))
    return out


def _or_shifted(out: Bool, flags: Bool, down: int, right: int) -> None:
    """Add to `out` the flags moved by whole pixels."""
    height, width = flags.shape
    if abs(down) >= height or abs(right) >= width:
        return
    to = out[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)]
    to |= flags[max(-down, 0) : height + min(-down, 0), max(-right, 0) : width + min(-right, 0)]


def _grown_sideways(flags: Bool, half: int, width: int) -> Bool:
    """Flags that were grown by `half` pixels to the left and right, grown to `width`."""
    out = flags
    for _ in range(half, width):
        flags, out = out, out.copy()
        _or_shifted(out, flags, 0, 1)
        _or_shifted(out, flags, 0, -1)
    return out


def _lower_quartile_around(cells: Floats, half: int) -> Floats:
    """The lower quartile of the observed cells [y, x] within `half` cells of each; NaN = not observed, here and there."""
    size = 2 * half + 1
    rows = sliding_window_view(np.pad(cells, half, constant_values=np.nan), (size, size))
    out = np.empty_like(cells)
    for y, windows in enumerate(rows):  # row by row, for the windows of one row are many times the array
        ranked = np.sort(windows.reshape(cells.shape[1], -1), axis=1)  # NaN last
        rank = np.count_nonzero(np.isfinite(ranked), axis=1) // 4
        out[y] = ranked[np.arange(cells.shape[1]), rank]
    return out


def _cell_sums(flags: Bool) -> Int32:
    """Flagged pixels in each cell of `CELL` a side; the last ones may be cut."""
    height, width = flags.shape
    rows = np.add.reduceat(flags, np.arange(0, height, CELL), axis=0, dtype=np.int32)
    sums: Int32 = np.add.reduceat(rows, np.arange(0, width, CELL), axis=1)
    return sums


def _of_cells(cells: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """A value of each cell at all of its pixels."""
    return cells.repeat(CELL, axis=0).repeat(CELL, axis=1)[: shape[0], : shape[1]]
