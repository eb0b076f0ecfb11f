"""Scenes + grid + recipe -> one cloud-free year, lazily; and the kernels that do it, plain numpy.

One Dask task makes one block of one site-year, the block a Zarr shard: it reads SCL with a margin, masks, reads the bands
of the dates at their own resolution, and reduces. The margin is as wide as any neighbourhood the mask looks at, so a
pixel's value does not depend on how the site is cut into blocks.

An observation is an overpass: overlapping tiles, granules of a split datatake and tiles of the neighbouring zone are
mosaicked first, scenes of the grid's own zone before warped ones, so that it counts once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import bottleneck
import dask
import dask.array as da
import numpy as np
import numpy.typing as npt
import odc.geo.xr
import pystac
import shapely
import xarray as xr
from odc.geo.geobox import GeoBox
from scipy import ndimage

from minecube.catalog import SCL, BrightOverride, HazeTest, MaskRule, Recipe
from minecube.errors import ReadError
from minecube.grid import ALIGN_M, PIXEL_M, area_of, at_resolution, blocks, padded
from minecube.reader import Ledger, fetched, stack

Bool = npt.NDArray[np.bool_]
UInt8 = npt.NDArray[np.uint8]
UInt16 = npt.NDArray[np.uint16]

QUALITY = ("no observation", "clear", "clear before the mask was grown", "thin cloud or shadow", "cloud in every observation")
"""What the numbers of the `quality` layer mean; anything above 1 is a fallback, for want of a clear observation."""
SCL_M = 20
"""The mission's pixel size of SCL."""
MARGIN_STEP_M = 240
"""Margins are multiples of this: of 60 m, and of the four SCL pixels of which `persistently_bright` samples one."""
_CLOUD, _NODATA = (8, 9), 0


def composite(scenes: Sequence[pystac.Item], grid: GeoBox, recipe: Recipe, ledger: Ledger | None = None) -> xr.Dataset:
    """One year of one site, lazy: nothing is read until it is computed or written.

    Args:
        scenes: normalised scenes of one year (`scenes.select`), in any order and any UTM zone.
        grid: the site's grid.
        recipe: bands, mask, reducer and block size.
        ledger: counts the reads, where they are made in this process, and says whether one may be lost.

    Returns:
        reflectance uint16 [band, y, x], x 10000, 0 = no observation, valid >= 1; the median is rounded half to even.
        clear_count uint16 [y, x]: overpasses clear and seen in every band. quality uint8 [y, x]: index into `QUALITY`.
        Dask chunks are blocks of `recipe.block_px`, all bands in one.

    Raises:
        ReadError: no scenes, or one without a band of the recipe; when computed, a pixel that cannot be read.
    """
    if not scenes:
        raise ReadError("no scenes to composite; expected at least one")
    for scene in scenes:
        sizes = {a.extra_fields["gsd"] for a in scene.assets.values()}
        if not sizes <= {10, 20}:
            raise ReadError(
                f"scene {scene.id}: says its pixels are of {sorted(sizes)} m; a band of 10 or 20 m is needed for each"
            )
        missing = [b for b in (*recipe.bands, SCL) if b not in scene.assets]
        if missing:
            raise ReadError(f"scene {scene.id}: has no {', '.join(missing)}, which recipe {recipe.id!r} needs")
    if recipe.haze and not {"B02", "B04"} <= set(by_resolution(scenes, recipe.bands)[0][1]):
        raise ReadError(f"recipe {recipe.id!r} tests for haze, which needs B02 and B04 at the finest resolution of its bands")
    ordered = _in_mosaic_order(scenes, grid)
    shared = dask.delayed(ordered, pure=False, traverse=False)
    task = dask.delayed(composite_block, pure=False, traverse=False)
    planes = len(recipe.bands) + 2
    rows = []
    for _, row in itertools.groupby(blocks(grid, recipe.block_px), key=lambda block: block[0].start):
        boxes = [grid[block] for block in row]
        rows.append(
            [da.from_delayed(task(shared, box, recipe, ledger), (planes, *box.shape), dtype=np.uint16) for box in boxes]
        )
    packed = da.block(rows)
    return xr.Dataset(
        {
            "reflectance": (("band", "y", "x"), packed[:-2]),
            "clear_count": (("y", "x"), packed[-2]),
            "quality": (("y", "x"), packed[-1].astype(np.uint8)),
        },
        coords={"band": list(recipe.bands), **odc.geo.xr.xr_coords(grid)},
    )


def composite_block(scenes: Sequence[pystac.Item], box: GeoBox, recipe: Recipe, ledger: Ledger | None = None) -> UInt16:
    """One block, read and reduced: uint16 [bands..., clear_count, quality; y, x]. Scenes must be in mosaic order."""
    out = np.zeros((len(recipe.bands) + 2, *box.shape), dtype=np.uint16)
    fringe, margin = margins_m(recipe)
    scenes = near(scenes, padded(box, margin))
    if not scenes:
        return out
    days = _days(scenes)
    size = scenes[0].assets[SCL].extra_fields["gsd"]
    scl = _read(scenes, at_resolution(padded(box, margin), size), (SCL,), ledger)[:, 0].astype(np.uint8)
    owner, day_scl = mosaic(scl, days)
    clear, lower = usable(day_scl, recipe, size)
    owner, day_scl, clear, lower = (_cropped(a, (margin - fringe) // size) for a in (owner, day_scl, clear, lower))
    groups = by_resolution(scenes, recipe.bands)
    seen = {
        resolution: np.zeros((len(bands), len(clear), *at_resolution(padded(box, fringe), resolution).shape), np.uint16)
        for resolution, bands in groups
    }
    # An observation is one in all bands. Where none of a pixel's turns out to be, the next best are read.
    use, quality = with_fallback(clear, lower, observed := day_scl != _NODATA)
    wanted, kept = use, np.zeros_like(use)
    while wanted.any():
        complete = np.ones_like(use)
        for resolution, bands in groups:
            asked = np.where(wanted, owner, -1)
            _fill(seen[resolution], scenes, days, asked, padded(box, fringe), resolution, bands, ledger)
            for pixels in seen[resolution]:
                complete &= _summed(pixels, resolution, size) != 0
        kept |= wanted & complete
        observed &= ~wanted | complete
        lost = wanted.any(axis=0) & ~kept.any(axis=0)
        use, again = with_fallback(clear & observed, lower, observed)
        wanted, quality = use & lost, np.where(lost, again, quality)
    if recipe.haze:
        finest, bands = groups[0]
        blue, red = (_summed(seen[finest][bands.index(b)], finest, size) for b in ("B02", "B04"))
        kept, quality = without_haze(blue, red, kept, quality, recipe.haze, size)
    for resolution, bands in groups:
        inside = _owner_at(kept.astype(np.int16), size, resolution) == 1
        for band, pixels in zip(bands, seen[resolution], strict=True):
            values = _cropped(pixels * inside, fringe // resolution)
            out[recipe.bands.index(band)] = _finer(median(values), resolution)
    count = np.where(quality == 1, kept.sum(axis=0), 0)
    out[-2], out[-1] = (_cropped(_finer(layer, size), fringe // PIXEL_M) for layer in (count, quality))
    return out


def _fill(
    seen: UInt16,
    scenes: Sequence[pystac.Item],
    days: Sequence[int],
    owner: npt.NDArray[np.int16],
    around: GeoBox,
    resolution: int,
    bands: tuple[str, ...],
    ledger: Ledger | None,
) -> None:
    """Read bands into `seen` [band, day, y, x] where `owner` [day, y, x], at the mask's pixel size, names a scene."""
    wanted = np.unique(owner[owner >= 0]).tolist()
    pick = _owner_at(owner, around.shape[0] * PIXEL_M // owner.shape[1], resolution)
    pixels = _read([scenes[i] for i in wanted], at_resolution(around, resolution), bands, ledger)
    for n, i in enumerate(wanted):
        np.copyto(seen[:, days[i]], pixels[n], where=pick[days[i]] == i)


def mosaic(scl: UInt8, days: Sequence[int]) -> tuple[npt.NDArray[np.int16], UInt8]:
    """Which scene each day's pixel comes from, and the day's SCL.

    The first scene of a day that has a pixel keeps it. Each scene loses the outermost pixel of its coverage first: there
    20 m and 10 m pixels are partly outside the swath.

    Args:
        scl: uint8 [scene, y, x], 0 = no data; scenes of a day in order of preference.
        days: index of each scene's day, 0..n-1.

    Returns:
        int16 [day, y, x], index of the scene, -1 = not observed; uint8 [day, y, x], 0 = not observed.
    """
    shape = (max(days) + 1, *scl.shape[1:])
    owner, day_scl = np.full(shape, -1, dtype=np.int16), np.zeros(shape, dtype=np.uint8)
    for i, day in enumerate(days):
        inside = ndimage.binary_erosion(scl[i] != _NODATA, structure=np.ones((3, 3), bool), border_value=1)
        free = inside & (owner[day] < 0)
        owner[day][free] = i
        day_scl[day][free] = scl[i][free]
    return owner, day_scl


def usable(scl: UInt8, recipe: Recipe, pixel_m: int) -> tuple[Bool, UInt8]:
    """Which observations are clear, and how good the others are.

    Args:
        scl: uint8 [day, y, x] scene classification, 0 = not observed.
        recipe: its mask rules and bright override.
        pixel_m: pixel size of `scl`.

    Returns:
        clear: bool [day, y, x]. lower: uint8 [day, y, x], index into `QUALITY` (2..4) of observations that are not clear.
    """
    observed = scl != _NODATA
    bright = persistently_bright(scl, recipe.bright_override, pixel_m) if recipe.bright_override else np.zeros_like(observed)
    hidden, grown = np.zeros_like(observed), np.zeros_like(observed)
    for rule in recipe.mask:
        flagged = np.isin(scl, rule.classes) & ~bright
        hidden |= flagged
        grown |= grow(flagged, rule, pixel_m)
    lower = np.where(hidden, 3, 2).astype(np.uint8)
    lower[hidden & np.isin(scl, _CLOUD)] = 4
    return observed & ~grown, lower


def grow(flagged: Bool, rule: MaskRule, pixel_m: int) -> Bool:
    """Flags [day, y, x] with specks narrower than `open_m` gone and the rest dilated by a disc of `dilate_m`."""
    kept = flagged
    if rule.open_m >= 2 * pixel_m:
        size = rule.open_m // pixel_m
        kept = ndimage.binary_opening(flagged, structure=np.ones((1, size, size), bool))
    if rule.dilate_m < pixel_m:
        return kept
    out = np.empty_like(kept)
    for day in range(len(kept)):  # the distance transform costs the same whatever the radius
        near = ndimage.distance_transform_edt(~kept[day]) * pixel_m <= rule.dilate_m if kept[day].any() else kept[day]
        out[day] = near
    return out


def persistently_bright(scl: UInt8, rule: BrightOverride, pixel_m: int) -> Bool:
    """Observations [day, y, x] that SCL calls cloud although only the ground is bright.

    A mine's bare ground is flagged on nearly every date. So pixels flagged clearly more often than their surroundings are
    set aside; where the surroundings without them are clear, and a pixel is flagged on at least `rule.flagged` of such
    dates, its flags on these dates are the ground's.
    """
    observed = scl != _NODATA
    flagged = np.isin(scl, rule.classes) & observed
    looks = np.maximum(observed.sum(axis=0), 1)
    share = flagged.sum(axis=0) / looks
    size = 2 * (rule.window_m // pixel_m) + 1
    # The surroundings' own share: their lower quartile, on every fourth pixel for speed, so that a large mine, itself
    # flagged nearly always, does not raise it.
    typical = ndimage.percentile_filter(share[::4, ::4], 25, size=size // 4 | 1, mode="nearest")
    typical = typical.repeat(4, axis=0).repeat(4, axis=1)[: share.shape[0], : share.shape[1]]
    ordinary = observed & (share <= typical + 0.2)
    clear_around = observed & (_window_sum(flagged & ordinary, size) <= rule.around * _window_sum(ordinary, size))
    dates = clear_around.sum(axis=0)
    often = (flagged & clear_around).sum(axis=0) >= np.maximum(rule.flagged * dates, 2)
    bright: Bool = flagged & clear_around & often
    return bright


def with_fallback(clear: Bool, lower: UInt8, observed: Bool) -> tuple[Bool, UInt8]:
    """The observations a pixel is made of: its clear ones or, where it has none, the best it has.

    Returns:
        use: bool [day, y, x]. quality: uint8 [y, x], index into `QUALITY`; 0 only where nothing was observed.
    """
    rank = np.where(clear, 1, np.where(observed, lower, 255)).astype(np.uint8)
    best = rank.min(axis=0)
    return (rank == best) & observed, np.where(best == 255, 0, best).astype(np.uint8)


def without_haze(
    blue: npt.NDArray[np.int32], red: npt.NDArray[np.int32], use: Bool, quality: UInt8, rule: HazeTest, pixel_m: int
) -> tuple[Bool, UInt8]:
    """The observations that are not under thin cloud; where all are, they stay and the quality says so.

    Over clear ground blue and red rise and fall together, over haze blue rises more (the haze optimised transform: Zhang,
    Guindon and Cihlar 2002, Remote Sensing of Environment 82; coefficient of Zhu and Woodcock 2012, same journal 118). Against
    the pixel's own lower quartile, a field that is ploughed or a pit that grows is no haze.

    Args:
        blue: int32 [day, y, x], reflectance x 10000 times any constant; 0 where not observed.
        red: likewise.
        use: bool [day, y, x].
        quality: uint8 [y, x], index into `QUALITY`.
        rule: the threshold and the window.
        pixel_m: pixel size of all of these.

    Returns:
        use and quality, changed.
    """
    known = use & (blue > 0) & (red > 0)
    # Integers throughout: a window's sum must not depend on where in the array it lies.
    hot = np.where(known, 2 * blue - red, np.iinfo(np.int32).max)
    looks = known.sum(axis=0)
    quartile = np.take_along_axis(np.sort(hot, axis=0), (np.maximum(looks - 1, 0) // 4)[None], axis=0)[0]
    above = np.where(known, hot - np.where(looks > 0, quartile, 0), 0)
    size = rule.window_m // pixel_m | 1
    # hot is in twice the units of blue, which are pixels of 10 m summed up
    limit = rule.excess * 1e4 * 2 * (pixel_m // PIXEL_M) ** 2
    hazy = known & (_window_sum(above, size) > limit * _window_sum(known, size))
    left = use & ~hazy
    some = left.any(axis=0)
    return np.where(some, left, use), np.where(~some & (quality == 1), 3, quality).astype(np.uint8)


def median(observed: UInt16) -> UInt16:
    """Median over days of the observations that are not 0: uint16 [y, x], halves rounded to even, 0 where there is none."""
    if not len(observed):
        return np.zeros(observed.shape[1:], dtype=np.uint16)
    values = observed.astype(np.float32)  # exact for uint16 and the halves between them
    values[observed == 0] = np.nan
    middle = bottleneck.nanmedian(values, axis=0)
    rounded: UInt16 = np.rint(np.nan_to_num(middle, copy=False)).astype(np.uint16)
    return rounded


def _in_mosaic_order(scenes: Sequence[pystac.Item], grid: GeoBox) -> list[pystac.Item]:
    """Scenes of the grid's zone first, since they need no resampling; then newest baseline, time and id: one order for all."""
    own = f"EPSG:{grid.crs.epsg}"

    def rank(scene: pystac.Item) -> tuple[Any, ...]:
        baseline = float(scene.properties["s2:processing_baseline"])
        return scene.properties["proj:code"] != own, -baseline, scene.datetime, scene.id

    return sorted(scenes, key=rank)


def _days(scenes: Sequence[pystac.Item]) -> list[int]:
    """Index of each scene's overpass: its datatake, which all its tiles and granules share, and no other of that day."""
    days = [s.properties["minecube:datatake"] for s in scenes]
    index = {day: n for n, day in enumerate(sorted(set(days)))}
    return [index[day] for day in days]


def by_resolution(scenes: Sequence[pystac.Item], bands: Sequence[str]) -> list[tuple[int, tuple[str, ...]]]:
    """Pixel sizes in metres, finest first, each with its bands in order."""
    size = {b: min(s.assets[b].extra_fields["gsd"] for s in scenes) for b in bands}
    by_size = itertools.groupby(sorted(bands, key=lambda b: size[b]), key=lambda b: size[b])
    return [(resolution, tuple(group)) for resolution, group in by_size]


def _read(scenes: Sequence[pystac.Item], box: GeoBox, bands: Sequence[str], ledger: Ledger | None) -> UInt16:
    return fetched(stack(scenes, box, bands, chunk_px=max(box.shape), ledger=ledger))


def near(scenes: Sequence[pystac.Item], around: GeoBox) -> list[pystac.Item]:
    """The scenes whose footprint comes within a kilometre; published footprints are that coarse."""
    area = area_of(padded(around, 1000 // ALIGN_M * ALIGN_M))
    return [s for s in scenes if shapely.intersects(shapely.geometry.shape(s.geometry), area)]


def margins_m(recipe: Recipe) -> tuple[int, int]:
    """How far beyond a block the haze test looks, and how far the whole mask does, in metres.

    The first is of whole 60 m pixels, the second such that every block samples the same ones.
    """
    fringe = -(-(recipe.haze.window_m // 2 + SCL_M) // ALIGN_M) * ALIGN_M if recipe.haze else 0
    reach = fringe + ALIGN_M + max((r.dilate_m + r.open_m for r in recipe.mask), default=0)
    if recipe.bright_override:
        reach += 2 * recipe.bright_override.window_m + 8 * SCL_M
    return fringe, -(-reach // MARGIN_STEP_M) * MARGIN_STEP_M


def _window_sum(values: npt.NDArray[Any], size: int) -> npt.NDArray[np.int64]:
    """Sums of flags or integers [day, y, x] over the square of `size` around each pixel, cut at the edges; exact."""
    half = size // 2
    total: npt.NDArray[np.int64] = values.astype(np.int64)
    for axis in (1, 2):
        n = values.shape[axis]
        upto = np.insert(total.cumsum(axis=axis), 0, 0, axis=axis)
        low, high = np.clip(np.arange(n) - half, 0, n), np.clip(np.arange(n) + half + 1, 0, n)
        total = upto.take(high, axis=axis) - upto.take(low, axis=axis)
    return total


def _cropped(pixels: npt.NDArray[Any], margin: int) -> npt.NDArray[Any]:
    """The last two dimensions without `margin` pixels on each side."""
    return pixels[..., margin:-margin, margin:-margin] if margin else pixels


def _summed(pixels: UInt16, from_m: int, to_m: int) -> npt.NDArray[np.int32]:
    """Pixels [day, y, x] at the size of the mask, as sums of 10 m pixels; 0 where one of them is not observed."""
    if from_m >= to_m:
        return _finer(pixels, from_m, to_m).astype(np.int32) * (to_m // PIXEL_M) ** 2
    step = to_m // from_m
    day, height, width = pixels.shape
    groups = pixels.reshape(day, height // step, step, width // step, step).astype(np.int32)
    summed: npt.NDArray[np.int32] = groups.sum(axis=(2, 4)) * (from_m // PIXEL_M) ** 2 * (groups != 0).all(axis=(2, 4))
    return summed


def _finer(pixels: npt.NDArray[Any], from_m: int, to_m: int = PIXEL_M) -> npt.NDArray[Any]:
    """The last two dimensions at a smaller (or the same) pixel size, by repetition."""
    return pixels.repeat(from_m // to_m, axis=-2).repeat(from_m // to_m, axis=-1)


def _owner_at(owner: npt.NDArray[np.int16], from_m: int, to_m: int) -> npt.NDArray[np.int16]:
    """Which scene a pixel comes from, at another pixel size; where finer pixels disagree, none (-1)."""
    if to_m <= from_m:
        return _finer(owner, from_m, to_m)
    step = to_m // from_m
    day, height, width = owner.shape
    groups = owner.reshape(day, height // step, step, width // step, step)
    low = groups.min(axis=(2, 4))
    return np.where(low == groups.max(axis=(2, 4)), low, -1)
