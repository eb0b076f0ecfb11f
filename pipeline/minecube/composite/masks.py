"""Kinds of observations and the choice of those to use: numpy kernels on SCL's 20 m pixels.

Arrays are [day, y, x], and a day is an overpass. All arithmetic uses integers and flags. Every
neighbourhood has a fixed size. So a pixel's value does not depend on the cut into blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from scipy import ndimage

from minecube.arrays import AnyArray, Bool, Float32, Float64, Int32, UInt8
from minecube.catalog import FALLBACKS, BrightOverride, HazeTest, MaskRule, Recipe
from minecube.composite.needs import MASK_M
from minecube.composite.ranks import lower_quartile

_CELL = 4
"""Side in pixels of the cells for sampling the surroundings of bright ground: 80 m, for windows
of 600 m."""
_PER_UNIT = 64
_PROOF = round(np.log(1000) * _PER_UNIT)
"""Evidence for bright ground being 1000 times likelier than chance clouds."""
_LEAST_CHANCE = 0.01
"""Lowest probability of a chance cloud: two dates in clear surroundings are just enough
evidence."""
CLEAR = 1
"""Kind of a clear observation, as in the layer `quality`."""
UNUSABLE = 255
"""Kind of an observation that no step of the recipe uses."""
_NODATA = 0
_BARE = 5
_CIRRUS = 10
_LAST_CLASS = 11  # snow
_CLOUD_CLASSES = (8, 9)
_CLEAR_CLASSES = (2, 4, 5, 6, 7)
VEILED = 12
"""A class missing from SCL: clear ground on a date entirely under thin cloud. All recipes treat
it as thin cloud."""


def mosaic_scenes(
    scl: Iterable[UInt8], days: Sequence[int], margin: int = 0
) -> tuple[AnyArray, UInt8]:
    """Merge the scenes of each day: source scene and SCL of each pixel.

    The first scene of a day with data at a pixel keeps the pixel. Each scene first loses the
    outermost pixel of its coverage. There, 20 m and 10 m pixels are partly outside the swath.

    Args:
        scl: uint8 [y, x] of each scene in turn, 0 = no data. Scenes of one day come in order of
            preference.
        days: Index of each scene's day, 0..n-1.
        margin: Pixels on each side that the first result lacks.

    Returns:
        int8 or int16 [day, y, x], index of the scene, -1 = not observed. uint8 [day, y, x], the SCL
        class, 0 = not observed.
    """
    owner: AnyArray = np.empty((0, 0, 0), np.int8)
    mosaic = np.empty((0, 0, 0), np.uint8)
    for scene, (day, layer) in enumerate(zip(days, scl, strict=True)):
        if not scene:
            mosaic = np.zeros((max(days) + 1, *layer.shape), dtype=np.uint8)
            dtype = np.min_scalar_type(-len(days))
            owner = np.full(crop(mosaic, margin).shape, -1, dtype=dtype)
        free = _erode_coverage(layer) & (mosaic[day] == _NODATA)
        np.copyto(mosaic[day], layer, where=free)
        np.copyto(owner[day], scene, where=crop(free, margin))
    return owner, mosaic


def correct_classes(scl: UInt8, error: str | None) -> UInt8:
    """Correct the classes uint8 [y, x] of a scene for an error of the whole scene.

    Numbers outside SCL's classes become 0, not observed. An error `veiled` makes clear ground
    `VEILED`, and `no cirrus` makes cirrus bare ground.
    """
    scl = np.where(scl <= _LAST_CLASS, scl, np.uint8(_NODATA))
    if error == "veiled":
        return np.where(is_one_of(scl, _CLEAR_CLASSES), np.uint8(VEILED), scl)
    if error == "no cirrus":
        return np.where(scl == _CIRRUS, np.uint8(_BARE), scl)
    return scl


def cut_edges(scl: UInt8, depth_px: int) -> UInt8:
    """Set the outermost pixels of a scene's coverage, uint8 [y, x], to 0."""
    for _ in range(depth_px):
        scl = np.where(_erode_coverage(scl), scl, np.uint8(_NODATA))
    return scl


def classify_day(
    layer: UInt8, bright: Bool | None, recipe: Recipe, month: int, season: int
) -> UInt8:
    """Classify the observations of one day: uint8 [y, x], index into `QUALITY`.

    0 = not observed, 255 = unusable.

    `layer` is the scene classification, uint8 [y, x], 0 = not observed. `bright` marks bright
    ground called cloud by SCL, bool [y, x]; None without a bright override. `month` is the day's
    calendar month. `season` is the kind of the day's clear observations: 1 in the recipe's months,
    or a fallback (see `daymasks.season_of`).
    """
    observed = layer != _NODATA
    hidden = layer == VEILED
    grown = hidden.copy()
    for rule in recipe.mask:
        if month not in rule.months:
            continue
        flagged = is_one_of(layer, rule.classes)
        if bright is not None:
            flagged &= ~bright
        hidden |= flagged
        grown |= grow(flagged, rule)
    if season == CLEAR:
        kinds: UInt8 = np.full_like(layer, FALLBACKS["ungrown"])
        np.copyto(kinds, FALLBACKS["thin"], where=hidden)
        np.copyto(kinds, FALLBACKS["cloud"], where=hidden & is_one_of(layer, _CLOUD_CLASSES))
    else:
        kinds = np.full_like(layer, UNUSABLE)
    np.copyto(kinds, np.uint8(season), where=observed & ~grown)
    kinds *= observed
    return kinds


def grow(flags: Bool, rule: MaskRule) -> Bool:
    """Remove specks narrower than `open_m` from flags [y, x], then dilate by a disc of
    `dilate_m`."""
    size = rule.open_m // MASK_M
    if size > 1:
        flags = remove_specks(flags, size)
    return dilate(flags, rule.dilate_m)


def remove_specks(flags: Bool, size: int) -> Bool:
    """Keep only the parts of flags [y, x] covered by flagged squares of `size` pixels."""
    # A corner is the upper left pixel of a square. First, flag squares with an unflagged pixel.
    corner = _flag_along(_flag_along(~flags, 0, 0, size - 1), 1, 0, size - 1)
    corner[1 - size :] = True
    corner[:, 1 - size :] = True
    return _flag_along(_flag_along(~corner, 0, 1 - size, 0), 1, 1 - size, 0) & flags


def dilate(flags: Bool, radius_m: int) -> Bool:
    """Dilate flags [y, x] by a disc of this radius, measured between pixel centres."""
    reach = radius_m // MASK_M
    if not reach or not flags.any():
        return flags
    disc = flags.copy()
    row = flags
    half = 0
    for dy in range(reach, -1, -1):  # rows of the disc, longer towards its middle
        width = int((reach**2 - dy**2) ** 0.5)
        row = _grow_sideways(row, half, width)
        half = width
        for step in {dy, -dy}:
            _or_shifted(disc, row, step, 0)
    return disc


def find_bright_ground(scl: UInt8, rule: BrightOverride) -> Bool:
    """Find bright ground called cloud by SCL: flags of observations [day, y, x].

    SCL flags a mine's bare ground on nearly every date. So the surroundings of a date are judged
    without certain pixels: those flagged clearly more often than usual on the other dates. Only
    dates with clear surroundings count. On these dates, flags of a pixel are attributed to the
    ground under two conditions. At least the share `rule.flagged` of the dates, and at least two
    dates, are flagged. Chance clouds are an unlikely cause (see `_weigh_evidence`).
    """
    observed = scl != _NODATA
    flagged = is_one_of(scl, rule.classes)
    observed_count = observed.sum(axis=0, dtype=np.int32)
    flagged_count = flagged.sum(axis=0, dtype=np.int32)
    share = flagged_count / np.maximum(observed_count, 1)
    # The usual share is the lower quartile of the surroundings, sampled at one pixel per cell.
    # A large mine, flagged nearly always, does not raise a lower quartile.
    half = rule.window_m // (MASK_M * _CELL)
    sample = np.where(observed_count > 0, share, np.nan)[::_CELL, ::_CELL]
    quartile = _repeat_cells(_lower_quartile_around(sample, half), share.shape)
    usual_share = (quartile + 0.2).astype(np.float32)
    is_clear_around = np.empty_like(observed)
    evidence = np.zeros(share.shape, np.int32)
    for day in range(len(scl)):
        # Leave out the date itself: among few dates, a single flag makes a pixel stand out.
        flagged_otherwise = flagged_count - flagged[day]
        is_ordinary = flagged_otherwise <= usual_share * (observed_count - observed[day])
        is_counted = observed[day] & is_ordinary
        cloudy = sum_windows(_sum_cells(flagged[day] & is_counted), half)
        counted = sum_windows(_sum_cells(is_counted), half)
        # Surroundings without observations are no evidence.
        is_clear = (cloudy <= rule.around * counted) & (counted > 0)
        is_clear_around[day] = _repeat_cells(is_clear, share.shape) & observed[day]
        if_flagged, if_not = _weigh_evidence(cloudy, counted, rule)
        evidence += is_clear_around[day] * np.where(
            flagged[day],
            _repeat_cells(if_flagged, share.shape),
            _repeat_cells(if_not, share.shape),
        )
    flagged &= is_clear_around
    dates = is_clear_around.sum(axis=0, dtype=np.int32)
    is_frequent = flagged.sum(axis=0, dtype=np.int32) >= np.maximum(rule.flagged * dates, 2)
    flagged &= is_frequent & (evidence >= _PROOF)
    return flagged


def _weigh_evidence(cloudy: Int32, counted: Int32, rule: BrightOverride) -> tuple[Int32, Int32]:
    """Compute one date's evidence for bright ground against chance clouds.

    The evidence is a log likelihood ratio, summed over dates (Wald 1945, Annals of Mathematical
    Statistics 16). Bright ground is flagged with probability `rule.flagged`. Other ground is
    flagged with the share of its surroundings on the date. Values are rounded integers in units of
    1 / `_PER_UNIT`, so sums are exact.

    `cloudy` and `counted` are the flagged and the observed pixels in the surroundings, int32
    arrays. The results are the evidence at flagged pixels and at unflagged pixels.
    """
    highest_chance = max(rule.around, _LEAST_CHANCE)
    chance = np.clip(cloudy / np.maximum(counted, 1), _LEAST_CHANCE, highest_chance)
    bright = min(max(rule.flagged, 0.05), 0.95)
    if_flagged = np.log(bright / chance) * _PER_UNIT
    if_not = np.log((1 - bright) / (1 - chance)) * _PER_UNIT
    return np.rint(if_flagged).astype(np.int32), np.rint(if_not).astype(np.int32)


def choose_observations(kind: UInt8, recipe: Recipe) -> tuple[Bool, UInt8]:
    """Choose the observations of each pixel: clear ones, and fallbacks if these are too few.

    Thin cloud and cloud are used only at pixels without other observations. Other fallbacks are
    used at pixels with fewer than `min_clear` observations. `kind` is uint8 [day, y, x], as
    `classify_day` returns it.

    Returns:
        use: bool [day, y, x].
        quality: uint8 [y, x], index into `QUALITY` of the last step used, 0 = no observation.
    """
    use = kind == CLEAR
    count = use.sum(axis=0, dtype=np.int32)
    quality = (count > 0).astype(np.uint8)
    for step in recipe.fallback:
        enough = 1 if step in ("thin", "cloud") else recipe.min_clear
        needy = count < enough
        if not needy.any():
            continue
        added = (kind == FALLBACKS[step]) & needy
        added_count = added.sum(axis=0, dtype=np.int32)
        use |= added
        count += added_count
        quality[added_count > 0] = FALLBACKS[step]
    return use, quality


def choose_clearest(kind: UInt8, limit: int, enough: int, day_of_year: Sequence[int]) -> Bool:
    """Choose the clear observations to read: the clearest days, spread over the season.

    First, choose up to `limit` days, one at a time. Each choice maximises the gain: the number of
    its clear pixels with fewer than `limit` observations. Days near a chosen day have a reduced
    gain. Then add days for pixels with fewer than `enough` observations, and read only these
    pixels.

    Args:
        kind: uint8 [day, y, x], as `classify_day` returns it.
        limit: Maximum number of days in the first step.
        enough: Number of clear observations per pixel, as far as available.
        day_of_year: Day of the year of each day.

    Returns:
        bool [day, y, x], a subset of the clear observations.
    """
    clear = kind == CLEAR
    use: Bool = np.zeros_like(clear)
    count = np.zeros(clear.shape[1:], dtype=np.int32)
    yeardays = np.asarray(day_of_year, dtype=np.float64)
    spacing = max((yeardays.max() - yeardays.min()) / limit, 1.0)  # of evenly spread dates, in days
    candidates = [day for day in range(len(clear)) if clear[day].any()]
    selected: list[int] = []

    def count_gains(needed: int) -> Float64:
        gains = [np.count_nonzero(clear[day] & (count < needed)) for day in candidates]
        return np.array(gains, dtype=np.float64)

    while candidates and len(selected) < limit and (gain := count_gains(limit)).any():
        if selected:
            gap = np.abs(yeardays[candidates][:, None] - yeardays[selected]).min(axis=1)
            gain *= 0.5 + 0.5 * np.minimum(gap / spacing, 1)
        day = candidates.pop(int(gain.argmax()))
        selected.append(day)
        use[day] = clear[day]
        count += use[day]
    while candidates and (gain := count_gains(enough)).any():
        day = candidates.pop(int(gain.argmax()))
        use[day] = clear[day] & (count < enough)
        count += use[day]
    return use


def remove_haze(hot: Int32, use: Bool, quality: UInt8, rule: HazeTest) -> tuple[Bool, UInt8, Int32]:
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
    half = rule.window_m // MASK_M // 2
    for day, excess in enumerate(hot):
        observed_count = np.maximum(sum_windows(use[day].astype(np.int32), half), 1)
        excess[:] = sum_windows(excess, half) // observed_count
    hazy = use & (hot > rule.excess * 1e4 * 2 * 4)
    clear = use & ~hazy
    has_clear = clear.any(axis=0)
    becomes_thin = ~has_clear & (quality == CLEAR)
    new_quality = np.where(becomes_thin, FALLBACKS["thin"], quality).astype(np.uint8)
    return np.where(has_clear, clear, use), new_quality, hot


def sum_windows(values: Int32, half: int) -> Int32:
    """Sum integers [y, x] over a square of `2 * half + 1` pixels around each pixel, exactly.

    Squares are cut at the edges.
    """
    total = values
    for axis in (0, 1):
        size = total.shape[axis]
        shape = list(total.shape)
        shape[axis] += 1
        cumulated = np.zeros_like(total, shape=shape)  # from 0 to the sum of all
        all_but_zero = cumulated[1:] if axis == 0 else cumulated[:, 1:]
        np.cumsum(total, axis=axis, out=all_but_zero)
        positions = np.arange(size)
        start = np.clip(positions - half, 0, size)
        stop = np.clip(positions + half + 1, 0, size)
        total = cumulated.take(stop, axis=axis) - cumulated.take(start, axis=axis)
    return total


def measure_cloud_distance(kind: UInt8, limit_m: int) -> Float32:
    """Measure the distance of each pixel of a day to the nearest cloud: float32 [y, x].

    Cloud is any observation not classified as clear. Distances are in metres, up to `limit_m`.
    `kind` is uint8 [y, x], as `classify_day` returns it.
    """
    clear_kinds = (0, CLEAR, FALLBACKS["wider-season"], FALLBACKS["neighbour-year"])
    cloudy = ~np.isin(kind, clear_kinds)
    if not cloudy.any():
        return np.full(kind.shape, limit_m, dtype=np.float32)
    distance: Float64 = ndimage.distance_transform_edt(~cloudy) * MASK_M
    return np.minimum(distance, limit_m).astype(np.float32)


def crop(pixels: AnyArray, margin: int) -> AnyArray:
    """Remove `margin` pixels from each side of the last two dimensions."""
    if not margin:
        return pixels
    return pixels[..., margin:-margin, margin:-margin]


def is_one_of(layer: UInt8, classes: Sequence[int]) -> Bool:
    """Flag the pixels of a class of the list, bool of the same shape."""
    flags: Bool = layer == classes[0]
    for number in classes[1:]:  # comparisons are many times faster than a lookup per pixel
        flags |= layer == number
    return flags


def _erode_coverage(scl: UInt8) -> Bool:
    """Flag the pixels of a scene with data, except the outermost pixel of its coverage.

    Coverage is assumed to continue beyond the array.
    """
    has_data: Bool = scl != _NODATA
    if has_data.all():
        return has_data
    return np.logical_not(_flag_along(_flag_along(~has_data, 0, -1, 1), 1, -1, 1))


def _flag_along(flags: Bool, axis: int, start: int, last: int) -> Bool:
    """Flag pixels with any flag `start`..`last` pixels further along the axis.

    Pixels beyond the array have no flag.
    """
    result = np.zeros_like(flags)
    for step in range(start, last + 1):
        if axis == 0:
            _or_shifted(result, flags, -step, 0)
        else:
            _or_shifted(result, flags, 0, -step)
    return result


def _or_shifted(target: Bool, flags: Bool, down: int, right: int) -> None:
    """Add flags shifted by whole pixels to `target`."""
    height, width = flags.shape
    if abs(down) >= height or abs(right) >= width:
        return
    part = target[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)]
    part |= flags[max(-down, 0) : height + min(-down, 0), max(-right, 0) : width + min(-right, 0)]


def _grow_sideways(flags: Bool, half: int, width: int) -> Bool:
    """Grow flags from `half` to `width` pixels to the left and right."""
    grown = flags
    for _ in range(half, width):
        narrow = grown
        grown = narrow.copy()
        _or_shifted(grown, narrow, 0, 1)
        _or_shifted(grown, narrow, 0, -1)
    return grown


def _lower_quartile_around(cells: Float64, half: int) -> Float64:
    """Compute the lower quartile of the observed cells [y, x] within `half` cells of each cell.

    NaN means not observed, in input and output.
    """
    size = 2 * half + 1
    width = cells.shape[1]
    rows = sliding_window_view(np.pad(cells, half, constant_values=np.nan), (size, size))
    quartiles = np.empty_like(cells)
    for y, windows in enumerate(rows):  # row by row: windows of all rows would need too much memory
        ordered = np.sort(windows.reshape(width, -1), axis=1)  # NaN last
        rank = np.count_nonzero(np.isfinite(ordered), axis=1) // 4
        quartiles[y] = ordered[np.arange(width), rank]
    return quartiles


def _sum_cells(flags: Bool) -> Int32:
    """Count the flagged pixels in each cell of side `_CELL`; the last cells may be cut."""
    height, width = flags.shape
    rows = np.add.reduceat(flags, np.arange(0, height, _CELL), axis=0, dtype=np.int32)
    return np.add.reduceat(rows, np.arange(0, width, _CELL), axis=1)


def _repeat_cells(cells: AnyArray, shape: tuple[int, ...]) -> AnyArray:
    """Repeat the value of each cell at all of its pixels."""
    return cells.repeat(_CELL, axis=0).repeat(_CELL, axis=1)[: shape[0], : shape[1]]
