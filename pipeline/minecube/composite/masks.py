"""Kinds of observations and the choice of those to use: numpy kernels on SCL's 20 m pixels.

Arrays are [day, y, x], and a day is an overpass. All arithmetic uses integers and flags. Every
neighbourhood has a fixed size. So a pixel's value does not depend on the cut into blocks.
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
"""Pixel size of all masks: the mission's size of SCL."""
CELL = 4
"""Side in pixels of the cells for sampling the surroundings of bright ground: 80 m, for windows
of 600 m."""
_PER_UNIT = 64
_PROOF = round(np.log(1000) * _PER_UNIT)
"""Evidence for bright ground being 1000 times likelier than chance clouds."""
_LEAST_CHANCE = 0.01
"""Lowest probability of a chance cloud: two dates in clear surroundings are just enough
evidence."""
CLEAR, UNUSABLE = 1, 255
_CLOUD, _NODATA = (8, 9), 0
_LAST_CLASS = 11  # snow
VEILED = 12
"""A class missing from SCL: clear ground on a date entirely under thin cloud. All recipes treat
it as thin cloud."""
_CLEAR_CLASSES, _BARE, _CIRRUS = (2, 4, 5, 6, 7), 5, 10


def mosaic(scl: Iterable[UInt8], days: Sequence[int]) -> tuple[Int16, UInt8]:
    """Merge the scenes of each day: source scene and SCL of each pixel.

    The first scene of a day with data at a pixel keeps the pixel. Each scene first loses the
    outermost pixel of its coverage. There, 20 m and 10 m pixels are partly outside the swath.

    Args:
        scl: uint8 [y, x] of each scene in turn, 0 = no data. Scenes of one day come in order of
            preference.
        days: Index of each scene's day, 0..n-1.

    Returns:
        int16 [day, y, x], index of the scene, -1 = not observed. uint8 [day, y, x], the SCL class,
        0 = not observed.
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
    """Correct the classes of a scene for an error of the whole scene.

    Numbers outside SCL's classes become 0, not observed.

    Args:
        scl: uint8 [y, x].
        error: `veiled` makes clear ground `VEILED`. `no cirrus` makes cirrus bare ground. None
            changes no class.
    """
    scl = np.where(scl <= _LAST_CLASS, scl, np.uint8(_NODATA))
    if error == "veiled":
        return np.where(_among(scl, _CLEAR_CLASSES), np.uint8(VEILED), scl)
    if error == "no cirrus":
        return np.where(scl == _CIRRUS, np.uint8(_BARE), scl)
    return scl


def kinds(
    scl: UInt8,
    recipe: Recipe,
    months: Sequence[int],
    seasons: Sequence[int],
    opinion: UInt8 | None = None,
) -> UInt8:
    """Classify each observation: an index into `QUALITY`, 0 = not observed, 255 = unusable.

    Args:
        scl: uint8 [day, y, x] scene classification, 0 = not observed.
        recipe: Mask rules and bright override.
        months: Calendar month of each day.
        seasons: Kind of each day's clear observations: 1 in the recipe's months, or a fallback (see
            `daymasks.season`).
        opinion: uint8 [day, y, x], classes of a second mask, 0 = clear.

    Returns:
        uint8 [day, y, x].
    """
    ground = persistently_bright(scl, recipe.bright_override) if recipe.bright_override else None
    out = np.empty_like(scl)
    for day, layer in enumerate(scl):  # day by day, to need no memory beyond the result
        bright = None if ground is None else ground[day]
        out[day] = kinds_of_day(
            layer,
            bright,
            recipe,
            months[day],
            seasons[day],
            None if opinion is None else opinion[day],
        )
    return out


def kinds_of_day(
    layer: UInt8,
    bright: Bool | None,
    recipe: Recipe,
    month: int,
    season: int,
    opinion: UInt8 | None,
) -> UInt8:
    """Classify the observations of one day: uint8 [y, x], as `kinds` returns them.

    Args:
        layer: uint8 [y, x] scene classification, 0 = not observed.
        bright: bool [y, x], bright ground called cloud by SCL; None without a bright override.
        recipe: Mask rules.
        month: Calendar month of the day.
        season: Kind of the day's clear observations.
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
    """Remove specks narrower than `open_m` from flags [y, x], then dilate by a disc of
    `dilate_m`."""
    size = rule.open_m // PIXEL_M
    return dilated(opened(flagged, size) if size > 1 else flagged, rule.dilate_m)


def opened(flagged: Bool, size: int) -> Bool:
    """Keep only the parts of flags [y, x] covered by flagged squares of `size` pixels."""
    corner = _run(_run(~flagged, 0, 0, size - 1), 1, 0, size - 1)  # square has an unflagged pixel
    corner[1 - size :], corner[:, 1 - size :] = True, True
    return _run(_run(~corner, 0, 1 - size, 0), 1, 1 - size, 0) & flagged


def dilated(flagged: Bool, radius_m: int) -> Bool:
    """Dilate flags [y, x] by a disc of this radius, measured between pixel centres."""
    reach = radius_m // PIXEL_M
    if not reach or not flagged.any():
        return flagged
    out = flagged.copy()
    wide, half = flagged, 0
    for dy in range(reach, -1, -1):  # rows of the disc, longer towards its middle
        width = int((reach**2 - dy**2) ** 0.5)
        wide, half = _grown_sideways(wide, half, width), width
        for step in {dy, -dy}:
            _or_shifted(out, wide, step, 0)
    return out


def persistently_bright(scl: UInt8, rule: BrightOverride) -> Bool:
    """Find bright ground called cloud by SCL: flags of observations [day, y, x].

    SCL flags a mine's bare ground on nearly every date. So the surroundings of a date are judged
    without certain pixels: those flagged clearly more often than usual on the other dates. Only
    dates with clear surroundings count. On these dates, flags of a pixel are attributed to the
    ground under two conditions. At least the share `rule.flagged` of the dates, and at least two
    dates, are flagged. Chance clouds are an unlikely cause (see `_evidence`).
    """
    observed = scl != _NODATA
    flagged = _among(scl, rule.classes)
    looks = observed.sum(axis=0, dtype=np.int32)
    flags = flagged.sum(axis=0, dtype=np.int32)
    share = flags / np.maximum(looks, 1)
    # The usual share is the lower quartile of the surroundings, sampled at one pixel per cell.
    # A large mine, flagged nearly always, does not raise a lower quartile.
    half = rule.window_m // (PIXEL_M * CELL)
    sample = np.where(looks > 0, share, np.nan)[::CELL, ::CELL]
    usual = (_of_cells(_lower_quartile_around(sample, half), share.shape) + 0.2).astype(np.float32)
    clear_around = np.empty_like(observed)
    evidence = np.zeros(share.shape, np.int32)
    for day in range(len(scl)):
        # Leave out the date itself: among few dates, a single flag makes a pixel stand out.
        ordinary = flags - flagged[day] <= usual * (looks - observed[day])
        counted = observed[day] & ordinary
        cloudy, seen = (
            window_sum(_cell_sums(layer), half) for layer in (flagged[day] & counted, counted)
        )
        # Surroundings without observations are no evidence.
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
    """Compute one date's evidence for bright ground against chance clouds.

    The evidence is a log likelihood ratio, summed over dates (Wald 1945, Annals of Mathematical
    Statistics 16). Bright ground is flagged with probability `rule.flagged`. Other ground is
    flagged with the share of its surroundings on the date. Values are rounded integers in units of
    1 / `_PER_UNIT`, so sums are exact.

    Args:
        cloudy: Flagged pixels in the surroundings, int32 [y, x].
        seen: Observed pixels in the surroundings.
        rule: The bright override.

    Returns:
        Evidence at flagged pixels and at unflagged pixels, int32 [y, x] each.
    """
    chance = np.clip(cloudy / np.maximum(seen, 1), _LEAST_CHANCE, max(rule.around, _LEAST_CHANCE))
    bright = min(max(rule.flagged, 0.05), 0.95)
    if_flagged = np.log(bright / chance) * _PER_UNIT
    if_not = np.log((1 - bright) / (1 - chance)) * _PER_UNIT
    return np.rint(if_flagged).astype(np.int32), np.rint(if_not).astype(np.int32)


def chosen(kind: UInt8, recipe: Recipe) -> tuple[Bool, UInt8]:
    """Choose the observations of each pixel: clear ones, and fallbacks if these are too few.

    Thin cloud and cloud are used only at pixels without other observations. Other fallbacks are
    used at pixels with fewer than `min_clear` observations.

    Args:
        kind: uint8 [day, y, x], as `kinds` returns it.
        recipe: Its `fallback` and `min_clear`.

    Returns:
        use: bool [day, y, x].
        quality: uint8 [y, x], index into `QUALITY` of the last step used, 0 = no observation.
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
    """Choose the clear observations to read: the clearest days, spread over the season.

    First, choose up to `most` days, one at a time. Each choice maximises the gain: the number of
    its clear pixels with fewer than `most` observations. Days near a chosen day have a reduced
    gain. Then add days for pixels with fewer than `enough` observations, and read only these
    pixels.

    Args:
        kind: uint8 [day, y, x], as `kinds` returns it.
        most: Maximum number of days in the first step.
        enough: Number of clear observations wanted per pixel, as far as available.
        day_of_year: Day of the year of each day.

    Returns:
        bool [day, y, x], a subset of the clear observations.
    """
    clear = kind == CLEAR
    use: Bool = np.zeros_like(clear)
    count = np.zeros(clear.shape[1:], dtype=np.int32)
    when = np.asarray(day_of_year, dtype=np.float64)
    apart = max((when.max() - when.min()) / most, 1.0)  # days between dates with even spacing
    left, picked = [d for d in range(len(clear)) if clear[d].any()], list[int]()

    def gains(needed: int) -> npt.NDArray[np.float64]:
        return np.array(
            [np.count_nonzero(clear[d] & (count < needed)) for d in left], dtype=np.float64
        )

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


def without_haze(
    hot: Int32, use: Bool, quality: UInt8, rule: HazeTest
) -> tuple[Bool, UInt8, Int32]:
    """Remove observations under thin cloud.

    If all observations of a pixel are hazy, they stay. The pixel's quality then changes from clear
    to thin.

    Over clear ground, blue and red rise and fall together. Over haze, blue rises more. This is the
    haze optimised transform of Zhang, Guindon and Cihlar 2002 (Remote Sensing of Environment 82).
    The coefficient is from Zhu and Woodcock 2012 (same journal, 118). The reference is the pixel's
    own lower quartile, so a ploughed field or a growing pit is not haze.

    Args:
        hot: int32 [day, y, x], 2 x blue - red, each the sum of reflectance x 10000 over four 10 m
            pixels. Overwritten.
        use: bool [day, y, x], the observations in `hot`.
        quality: uint8 [y, x], index into `QUALITY`.
        rule: Threshold and window.

    Returns:
        The changed use and quality, and the judged excess, int32 [day, y, x], reflectance x 80000.
    """
    # Use integers: a window's sum must not depend on its position in the array.
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
    return (
        np.where(some, left, use),
        np.where(worse, FALLBACKS["thin"], quality).astype(np.uint8),
        hot,
    )


def window_sum(values: Int32, half: int) -> Int32:
    """Sum integers [y, x] over a square of `2 * half + 1` pixels around each pixel, exactly.

    Squares are cut at the edges.
    """
    total = values
    for axis in (0, 1):
        n = total.shape[axis]
        upto = np.zeros_like(total, shape=[s + (a == axis) for a, s in enumerate(total.shape)])
        np.cumsum(total, axis=axis, out=upto[1:] if axis == 0 else upto[:, 1:])
        low, high = np.clip(np.arange(n) - half, 0, n), np.clip(np.arange(n) + half + 1, 0, n)
        total = upto.take(high, axis=axis) - upto.take(low, axis=axis)
    return total


def cloud_distance_m(kind: UInt8, most_m: int) -> Float32:
    """Measure the distance of each observation [day, y, x] to the day's nearest cloud.

    Cloud is any observation not classified as clear. Distances are in metres, up to `most_m`.
    """
    out = np.full(kind.shape, most_m, dtype=np.float32)
    for day, layer in enumerate(kind):
        cloudy = ~np.isin(layer, (0, CLEAR, FALLBACKS["wider-season"], FALLBACKS["neighbour-year"]))
        if cloudy.any():
            out[day] = np.minimum(ndimage.distance_transform_edt(~cloudy) * PIXEL_M, most_m)
    return out


def _among(layer: UInt8, classes: Sequence[int]) -> Bool:
    found: Bool = layer == classes[0]
    for other in classes[1:]:  # comparisons are many times faster than a lookup per pixel
        found |= layer == other
    return found


def _inside(scl: UInt8) -> Bool:
    """Flag the pixels of a scene with data, except the outermost pixel of its coverage.

    Coverage is assumed to continue beyond the array.
    """
    seen: Bool = scl != _NODATA
    if seen.all():
        return seen
    inside: Bool = np.logical_not(_run(_run(seen == 0, 0, -1, 1), 1, -1, 1))
    return inside


def _run(flags: Bool, axis: int, first: int, last: int) -> Bool:
    """Flag pixels with any flag `first`..`last` pixels further along the axis.

    Pixels beyond the array have no flag.
    """
    out = np.zeros_like(flags)
    for step in range(first, last + 1):
        _or_shifted(out, flags, *((-step, 0) if axis == 0 else (0, -step)))
    return out


def _or_shifted(out: Bool, flags: Bool, down: int, right: int) -> None:
    """Add flags shifted by whole pixels to `out`."""
    height, width = flags.shape
    if abs(down) >= height or abs(right) >= width:
        return
    to = out[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)]
    to |= flags[max(-down, 0) : height + min(-down, 0), max(-right, 0) : width + min(-right, 0)]


def _grown_sideways(flags: Bool, half: int, width: int) -> Bool:
    """Grow flags from `half` to `width` pixels to the left and right."""
    out = flags
    for _ in range(half, width):
        flags, out = out, out.copy()
        _or_shifted(out, flags, 0, 1)
        _or_shifted(out, flags, 0, -1)
    return out


def _lower_quartile_around(cells: Floats, half: int) -> Floats:
    """Compute the lower quartile of the observed cells [y, x] within `half` cells of each cell.

    NaN means not observed, in input and output.
    """
    size = 2 * half + 1
    rows = sliding_window_view(np.pad(cells, half, constant_values=np.nan), (size, size))
    out = np.empty_like(cells)
    for y, windows in enumerate(rows):  # row by row: windows of all rows would need too much memory
        ranked = np.sort(windows.reshape(cells.shape[1], -1), axis=1)  # NaN last
        rank = np.count_nonzero(np.isfinite(ranked), axis=1) // 4
        out[y] = ranked[np.arange(cells.shape[1]), rank]
    return out


def _cell_sums(flags: Bool) -> Int32:
    """Count the flagged pixels in each cell of side `CELL`; the last cells may be cut."""
    height, width = flags.shape
    rows = np.add.reduceat(flags, np.arange(0, height, CELL), axis=0, dtype=np.int32)
    sums: Int32 = np.add.reduceat(rows, np.arange(0, width, CELL), axis=1)
    return sums


def _of_cells(cells: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Repeat the value of each cell at all of its pixels."""
    return cells.repeat(CELL, axis=0).repeat(CELL, axis=1)[: shape[0], : shape[1]]
