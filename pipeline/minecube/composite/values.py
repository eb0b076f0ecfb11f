"""Find scenes with values that cannot be trusted, in the pixels read for a composite.

All bands of a scene see the same ground at once, so each band is compared with the others:

stuck       One number holds 20 % of a band's clear pixels, and the numbers next to it are rare. The
            band is constant, or its detector is saturated. Water and shade have many pixels with
            one number up to 100. It counts only if 90 % of the band have it, and no other band is
            dark.
displaced   The other bands predict the band, by linear regression. Gradients in the regression show
            the displacement between them (Lucas and Kanade 1981, IJCAI). It counts from 8 m on, if
            it halves the residual. Bands of correct products agree to 6 m, 0.3 pixels of 20 m. The
            other bands must agree with each other: the bands of unmasked clouds do not. Water does
            not count, since waves move between the bands.
strip       Pixels along an edge of the scene's coverage are low in a band. Their median ratio to
            the ground 100 m inside is below 0.7.

Scenes with a stuck or displaced band are left out. All edges of a scene with a strip are cut off.
A fault that most scenes of a block share in one band is the ground's, and does not count. The
reader handles a fourth fault: it leaves out numbers above 32767 and counts them.

A good scene that is left out is worse than a fault that is missed. So all limits are far from what
correct scenes show: docs/sources.md has the figures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pystac
from odc.geo.geobox import GeoBox

from minecube.arrays import AnyArray, Bool, Float32, Float64, Int64, UInt8, UInt16
from minecube.catalog import SCL, Recipe
from minecube.composite import masks
from minecube.composite.needs import MASK_M, pixel_size_of, scenes_near
from minecube.errors import MinecubeError
from minecube.grid import coarsen
from minecube.reader import Ledger, start_read

HAS_STRIP = "minecube:has_strip"
"""Item property: whether the edges of the scene's coverage are cut off."""
CUT_PX = 5
"""20 m pixels cut off: the deepest strip, and a pixel more that may be low in part."""
STRIP = "strip"
"""The fault that does not leave out the scene."""
_SIDE = 48  # 20 m pixels: side of the part of a block in which a scene's bands are compared
_STUCK = 0.2  # share of pixels with one number; at most 0.06 in correct scenes, 0.09 in cloud tops
_NEXT_TO = 5  # difference of numbers next to each other; water varies as little
_DIM = 100  # numbers of water and shade, reflectance x 10000
_ALL = 0.9  # share of pixels for a dim number to count
_BRIGHT = 1000  # median of each other band for a dim number to count
_FEWEST = 200  # pixels needed to compare bands
_FEWEST_BANDS = 4
_DISPLACED = 0.4  # pixels of 20 m
_EXPLAINED = 0.8  # least share of the band's variance explained by the others, once displaced
_GAIN = 2.0  # least residual without displacement, divided by the residual with it
_FARTHEST = 1.5  # pixels; the linear model does not reach farther
_ROUNDS = 2  # of displacing and predicting
_RIDGE = 1e-4  # of the regression, for bands that are nearly equal
_LOW = 0.7  # ratio of a strip to the ground inside
_STEP = 0.8  # most ratio of a strip's innermost pixel to the pixel beyond
_DEPTH = CUT_PX - 1  # 20 m pixels: deepest strip
_INSIDE = 5  # 20 m pixels from the edge to the ground inside
_FEWEST_PAIRS = 60  # pixels of an edge, 1.2 km
_FEWEST_SCENES = 3  # to find out that a fault is the ground's


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault of one band of a scene."""

    scene: str
    band: str
    fault: str
    """stuck, displaced or strip."""
    detail: str

    def __str__(self) -> str:
        return f"{self.scene}: {self.band} {self.detail}"

    def as_row(self) -> dict[str, Any]:
        """Return the fault as plain JSON, for provenance."""
        return {"scene": self.scene, "band": self.band, "fault": self.fault, "detail": self.detail}


class UntrustedValuesError(MinecubeError):
    """A block has scenes whose values cannot be trusted: composite without these faults."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__("; ".join(map(str, faults)))
        self.faults = tuple(faults)

    def __reduce__(self) -> tuple[type[UntrustedValuesError], tuple[tuple[Fault, ...]]]:
        """Pickle the faults: Python would pickle the message as the only argument."""
        return type(self), (self.faults,)


def describe_action(fault: Fault) -> str:
    """Describe what a build does about a fault."""
    if fault.fault == STRIP:
        return f"edges cut off, {CUT_PX * MASK_M} m"
    return "scene left out"


def merge_faults(earlier: Sequence[Fault], later: Sequence[Fault]) -> list[Fault]:
    """Add faults to those found earlier: one of each kind per scene."""
    merged = {(fault.scene, fault.fault): fault for fault in (*later, *earlier)}
    return [merged[key] for key in sorted(merged)]


def apply_faults(scenes: Sequence[pystac.Item], faults: Sequence[Fault]) -> list[pystac.Item]:
    """Leave out scenes with stuck or displaced bands, and mark those with strips.

    `Samples` finds no fault twice: a mark ends the search for strips.
    """
    left_out = {fault.scene for fault in faults if fault.fault != STRIP}
    cut = {fault.scene for fault in faults if fault.fault == STRIP}
    accepted = []
    for scene in scenes:
        if scene.id in left_out:
            continue
        if scene.id in cut:
            scene = scene.clone()
            scene.properties[HAS_STRIP] = True
        accepted.append(scene)
    return accepted


class _Edge(NamedTuple):
    """Pixels along the edges of a coverage: pairs of an edge's pixels and the ground inside."""

    rows: Int64
    """[depth, pair], 20 m pixels of the block. The last depth is the ground inside."""
    columns: Int64
    direction: Int64
    """[pair], 0..3."""


def check_scenes(
    scenes: Sequence[pystac.Item],
    box: GeoBox,
    recipe: Recipe,
    ledger: Ledger | None = None,
) -> tuple[list[Fault], set[str]]:
    """Read and check a recipe's bands of scenes in a box, scene by scene.

    Returns:
        The faults, and the ids of the scenes with enough clear pixels for a check.

    Raises:
        ReadError: A pixel cannot be read.
    """
    faults: list[Fault] = []
    checked: set[str] = set()
    coarse = coarsen(box, MASK_M)
    near = scenes_near(scenes, box)
    for scene, read in [(scene, start_read(scene, SCL, coarse, ledger)) for scene in near]:
        scl = masks.cut_edges(masks.correct_classes(read.result().astype(np.uint8), None), 1)
        clear = _flag_clear(scene, scl, recipe)
        if np.count_nonzero(clear) < _FEWEST:
            continue
        sizes = [pixel_size_of(band, [scene]) for band in recipe.bands]
        reads = [
            start_read(scene, band, coarsen(box, size), ledger)
            for band, size in zip(recipe.bands, sizes, strict=True)
        ]
        owner = np.where(scl, np.int16(0), np.int16(-1))
        samples = Samples([scene], [0], owner[None], clear[None])
        for band, size, pixels in zip(recipe.bands, sizes, reads, strict=True):
            samples.add(0, band, (0, 0), pixels.result(), size)
        faults += samples.find_faults()
        checked.add(scene.id)
    return _discard_shared(faults, len(checked)), checked


def _flag_clear(scene: pystac.Item, scl: UInt8, recipe: Recipe) -> Bool:
    """Flag the clear pixels of a scene, bool [y, x]; without a mask no pixel is known to be clear."""
    if not recipe.mask or scene.datetime is None:
        return np.zeros(scl.shape, dtype=bool)
    kind = masks.classify_day(scl, None, recipe, scene.datetime.month, masks.CLEAR)
    clear: Bool = kind == masks.CLEAR
    return clear


@dataclass
class _Sample:
    """The checked pixels of one scene in a block."""

    rows: slice
    """20 m pixels of the block, as `columns`."""
    columns: slice
    clear: Bool
    """[y, x] of these rows and columns."""
    edge: _Edge | None
    bands: dict[str, UInt16] = field(default_factory=dict)
    """[y, x] at the band's own pixel size, 0 where not read."""
    edge_values: dict[str, UInt16] = field(default_factory=dict)
    """[depth, pair], as in `edge`; 0 if not read."""


class Samples:
    """Samples of all scenes of a block, collected band by band.

    Args:
        scenes: Scenes of the block.
        day_of: Index of each scene's day.
        owner: [day, y, x] at 20 m, index of the scene of each pixel.
        use: bool [day, y, x], clear pixels.
    """

    def __init__(
        self, scenes: Sequence[pystac.Item], day_of: Sequence[int], owner: AnyArray, use: Bool
    ) -> None:
        self._scenes = scenes
        self._samples: dict[int, _Sample] = {}
        for scene, day in enumerate(day_of):
            covered = owner[day] == scene
            clear = covered & use[day]
            if clear.any():
                rows, columns = _choose_window(clear)
                observed = owner[day] >= 0
                edge = None if observed.all() else _find_edge(covered, observed, clear)
                self._samples[scene] = _Sample(rows, columns, clear[rows, columns], edge)

    def add(
        self, scene: int, band: str, corner: tuple[int, int], pixels: UInt16, size_m: int
    ) -> None:
        """Add a window of a scene's band, [y, x]. `corner` is its first row and column, in 20 m
        pixels of the block."""
        sample = self._samples.get(scene)
        if sample is None:
            return
        scale = MASK_M // size_m
        height, width = sample.clear.shape
        part = sample.bands.setdefault(band, np.zeros((height * scale, width * scale), np.uint16))
        top = (corner[0] - sample.rows.start) * scale
        left = (corner[1] - sample.columns.start) * scale
        _paste(pixels, part, top, left)
        if sample.edge is not None:
            row = sample.edge.rows - corner[0]
            column = sample.edge.columns - corner[1]
            height, width = (side // scale for side in pixels.shape)
            is_read = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            values = sample.edge_values.setdefault(band, np.zeros(row.shape, np.uint16))
            values[is_read] = pixels[row[is_read] * scale, column[is_read] * scale]

    def find_faults(self) -> list[Fault]:
        """Judge the scenes from the bands added so far."""
        faults = []
        judged = 0
        for number, sample in self._samples.items():
            item = self._scenes[number]
            if HAS_STRIP not in item.properties:
                faults += _judge_strips(item.id, sample)
            if len(sample.bands) >= _FEWEST_BANDS and np.count_nonzero(sample.clear) >= _FEWEST:
                judged += 1
                faults += _judge_stuck(item.id, sample) or _judge_displaced(item.id, sample)
        return _discard_shared(faults, judged)


def _discard_shared(faults: Sequence[Fault], scenes: int) -> list[Fault]:
    """Discard the faults that more than half of the scenes share: the ground itself is like that.

    Salt and snow saturate a band at every date, for example. Strips are the exception: edges may
    all be damaged, and cutting them off costs little.
    """
    counts = Counter((fault.fault, fault.band) for fault in faults)
    return [
        fault
        for fault in faults
        if fault.fault == STRIP
        or scenes < _FEWEST_SCENES
        or 2 * counts[fault.fault, fault.band] <= scenes
    ]


def _paste(pixels: UInt16, part: UInt16, top: int, left: int) -> None:
    """Copy pixels [y, x] into `part`, as far as they lie within it. Their first pixel belongs at
    row `top` and column `left`."""
    height, width = pixels.shape
    inside = part[max(top, 0) : max(top + height, 0), max(left, 0) : max(left + width, 0)]
    inside[:] = pixels[max(-top, 0) :, max(-left, 0) :][: inside.shape[0], : inside.shape[1]]


def _choose_window(clear: Bool) -> tuple[slice, slice]:
    """Choose the window with the most clear pixels, of a grid of windows."""
    step = 4  # of pixels counted
    sides = [min(_SIDE, length // step * step) or length for length in clear.shape]
    numbers = [length // side for length, side in zip(clear.shape, sides, strict=True)]
    counted = clear[: numbers[0] * sides[0] : step, : numbers[1] * sides[1] : step]
    cells = counted.reshape(numbers[0], -1, numbers[1], counted.shape[1] // numbers[1])
    row, column = divmod(int(cells.sum(axis=(1, 3)).argmax()), numbers[1])
    return (
        slice(row * sides[0], (row + 1) * sides[0]),
        slice(column * sides[1], (column + 1) * sides[1]),
    )


def _find_edge(covered: Bool, observed: Bool, clear: Bool) -> _Edge | None:
    """List clear pixels along the edges of a coverage [y, x]; None if there are too few.

    Where another scene goes on with the day (`observed`) is no edge of the swath.
    """
    depths = np.array([*range(_DEPTH), _INSIDE])[:, None]
    height, width = covered.shape
    padded = np.pad(observed, 1, constant_values=True)  # the block's edge is no edge
    parts = []
    for direction, (down, right) in enumerate(((0, 1), (0, -1), (1, 0), (-1, 0))):  # inwards
        outward = padded[1 - down :, 1 - right :][:height, :width]
        row, column = np.divmod(np.flatnonzero(covered & ~outward), width)
        rows = row + down * depths
        columns = column + right * depths
        inside = (rows[-1] >= 0) & (rows[-1] < height)
        inside &= (columns[-1] >= 0) & (columns[-1] < width)
        rows = rows[:, inside]
        columns = columns[:, inside]
        usable = clear[rows, columns].all(axis=0)
        number = np.count_nonzero(usable)
        if number >= _FEWEST_PAIRS:
            step = max(number // (2 * _FEWEST_PAIRS), 1)
            pairs = np.flatnonzero(usable)[::step]
            parts.append((rows[:, pairs], columns[:, pairs], np.full(len(pairs), direction)))
    if not parts:
        return None
    return _Edge(*(np.concatenate(part, axis=-1) for part in zip(*parts, strict=True)))


def _judge_strips(scene: str, sample: _Sample) -> list[Fault]:
    """Find the deepest strip of a scene along its edges."""
    if sample.edge is None or not sample.edge_values:
        return []
    values = np.stack(list(sample.edge_values.values())).astype(np.float32)
    valid = (values > 0).all(axis=(0, 1))
    lowest = np.ones(len(values), np.float32)
    deepest = 0
    for direction in range(4):
        pairs = valid & (sample.edge.direction == direction)
        if np.count_nonzero(pairs) < _FEWEST_PAIRS:
            continue
        ratios = np.median(values[:, :, pairs] / values[:, -1:, pairs], axis=2)
        low = np.logical_and.accumulate(ratios[:, :-1] < _LOW, axis=1)  # from the edge on
        depth = low.sum(axis=1)
        last = ratios[np.arange(len(ratios)), np.maximum(depth - 1, 0)]
        beyond = ratios[np.arange(len(ratios)), depth]
        depth[last > beyond * _STEP] = 0  # ground changes slowly
        deepest = max(deepest, int(depth.max()))
        lowest = np.where(depth > 0, np.minimum(lowest, ratios[:, 0]), lowest)
    if not deepest:
        return []
    band = int(lowest.argmin())
    detail = (
        f"has {lowest[band]:.0%} of the values inside along an edge of its coverage, "
        f"{deepest * MASK_M} m deep"
    )
    name = list(sample.edge_values)[band]
    return [Fault(scene=scene, band=name, fault=STRIP, detail=detail)]


def _judge_stuck(scene: str, sample: _Sample) -> list[Fault]:
    step = 2  # every other pixel of 20 m
    clear = sample.clear[::step, ::step]
    values = {}
    for band, pixels in sample.bands.items():
        scale = len(pixels) // len(sample.clear) * step
        numbers = pixels[::scale, ::scale][clear]
        numbers = numbers[numbers != 0]
        if len(numbers) >= _FEWEST // step:
            values[band] = numbers
    return [
        Fault(
            scene=scene,
            band=band,
            fault="stuck",
            detail=f"is {number} in {share:.0%} of its clear pixels",
        )
        for band, (number, share) in find_stuck(values).items()
    ]


def _judge_displaced(scene: str, sample: _Sample) -> list[Fault]:
    """Find the band with the clearest displacement from the others."""
    names = list(sample.bands)
    stack = np.stack([_average(pixels, len(sample.clear)) for pixels in sample.bands.values()])
    clear = sample.clear & (stack > 0).all(axis=0)
    if {"B03", "B08"} <= set(names):  # NDWI: water is brighter in green than in infrared
        clear &= stack[names.index("B08")] > stack[names.index("B03")]
    measured = measure_displacements(stack, clear)
    if measured is None:
        return []
    moves, explained, gain = measured
    distance = np.hypot(*moves.T)
    gain = np.where((distance >= _DISPLACED) & (explained >= _EXPLAINED), gain, 0)
    band = int(gain.argmax())  # a displaced band also moves the predictions of the others
    if gain[band] < _GAIN or not _agree(np.delete(stack, band, axis=0), clear):
        return []
    east, south = moves[band] * MASK_M
    detail = f"lies {east:+.0f} m east and {-south:+.0f} m north of its other bands"
    return [Fault(scene=scene, band=names[band], fault="displaced", detail=detail)]


def _agree(stack: Float32, clear: Bool) -> bool:
    """Test if most bands [band, y, x] lie where the others are."""
    measured = measure_displacements(stack, clear)
    return measured is not None and bool(np.median(np.hypot(*measured[0].T)) < _DISPLACED / 2)


def _average(pixels: UInt16, height: int) -> Float32:
    """Average 10 m pixels [y, x] to 20 m; 0 where a part is 0. 20 m pixels stay as they are."""
    if len(pixels) == height:
        return pixels.astype(np.float32)
    average = np.add(pixels[::2, ::2], pixels[1::2, ::2], dtype=np.float32)
    average += pixels[::2, 1::2]
    average += pixels[1::2, 1::2]
    average /= 4
    if not pixels.all():
        average[(pixels == 0).reshape(height, 2, -1, 2).any(axis=(1, 3))] = 0
    return average


def find_stuck(values: Mapping[str, UInt16]) -> dict[str, tuple[int, float]]:
    """Find bands with one number in many pixels: band -> number and its share.

    `values` are the valid pixels of each band, in any order.
    """
    found: dict[str, tuple[int, float]] = {}
    medians: dict[str, float] = {}
    for band, numbers in values.items():
        ranked = np.sort(numbers, kind="stable")  # radix sort
        medians[band] = float(ranked[len(ranked) // 2])
        if hit := _find_frequent(ranked):
            found[band] = hit
    if 2 * len(found) > len(values):
        return {}  # the ground itself is uniform
    darkest = min((median for band, median in medians.items() if band not in found), default=0)
    return {
        band: (number, share)
        for band, (number, share) in found.items()
        if number > _DIM or (share >= _ALL and darkest > _BRIGHT)
    }


def _find_frequent(ranked: UInt16) -> tuple[int, float] | None:
    """Find a number with a share of `_STUCK` in sorted numbers, and few numbers next to it."""
    span = int(_STUCK * len(ranked))
    same = np.flatnonzero(ranked[span:] == ranked[: len(ranked) - span])
    if not same.size:
        return None
    number = int(ranked[same[0]])
    ends = np.searchsorted(ranked, [number - _NEXT_TO, number, number + 1, number + _NEXT_TO + 1])
    below, equal, above = np.diff(ends)
    if 2 * (below + above) > equal:
        return None  # water varies by a few numbers only
    return number, float(equal / len(ranked))


def measure_displacements(stack: Float32, clear: Bool) -> tuple[Float64, Float64, Float64] | None:
    """Measure the displacement of each band from the others of the same scene.

    Args:
        stack: [band, y, x], bands of one pixel size, three or more.
        clear: [y, x], pixels to use.

    Returns:
        float64 [band, 2], pixels east and south, at most `_FARTHEST`. float64 [band], share of the
        band's variance explained by the others. float64 [band], residual without displacement,
        divided by the residual with it. None if too few pixels are clear.
    """
    smooth = stack[:, 1:] + stack[:, :-1]
    smooth = smooth[:, 1:] + smooth[:, :-1]
    smooth = smooth[:, :, 1:] + smooth[:, :, :-1]
    smooth = smooth[:, :, 1:] + smooth[:, :, :-1]
    rows = clear[:-4] & clear[1:-3] & clear[2:-2] & clear[3:-1] & clear[4:]
    inside = rows[:, :-4] & rows[:, 1:-3] & rows[:, 2:-2] & rows[:, 3:-1] & rows[:, 4:]
    inside = inside[::2]  # every other row is enough
    count = np.count_nonzero(inside)
    if count < _FEWEST:
        return None
    bands = len(smooth)
    sample = np.empty((3, bands, *inside.shape), np.float32)
    sample[0] = smooth[:, 1:-1:2, 1:-1]
    np.subtract(smooth[:, 1:-1:2, 2:], smooth[:, 1:-1:2, :-2], out=sample[1])
    np.subtract(smooth[:, 2::2, 1:-1], smooth[:, :-2:2, 1:-1], out=sample[2])
    sample[1:] /= 2
    sample *= inside
    sample -= (sample.sum(axis=(2, 3), keepdims=True) / count) * inside
    flat = sample.reshape(3 * bands, -1)
    return _solve(np.asarray(flat @ flat.T, np.float64), bands)


def _solve(gram: Float64, bands: int) -> tuple[Float64, Float64, Float64]:
    """Solve for displacements from the products of values, and of gradients east and south.

    `gram` is [3 * bands, 3 * bands].
    """
    scale = np.tile(1 / np.sqrt(np.maximum(np.diag(gram)[:bands], 1e-9)), 3)
    gram = gram * scale * scale[:, None]
    blocks = gram.reshape(3, bands, 3, bands).transpose(0, 2, 1, 3)
    own = np.eye(bands, dtype=bool)
    itself = (
        own[:, :, None] | own[:, None, :]
    )  # [band, other, other]: a band predicts no part of itself
    moves = np.zeros((bands, 2))
    first = np.ones(bands)
    for step in range(_ROUNDS + 1):
        # The others, displaced by each band's move: values less gradients times the move.
        taylor = np.column_stack([np.ones(bands), -moves])
        normal = np.einsum("bp,bq,pqjk->bjk", taylor, taylor, blocks)
        normal = np.where(itself, own[None] * 1.0, normal) + _RIDGE * own
        target = np.where(own, 0, np.einsum("bp,pjb->bj", taylor, blocks[:, 0]))
        weights = np.linalg.solve(normal, target[..., None])[..., 0]
        residual = (
            1 - 2 * (weights * target).sum(1) + np.einsum("bj,bjk,bk->b", weights, normal, weights)
        )
        residual = np.maximum(residual, 1e-9)
        if step == 0:
            first = residual
        if step == _ROUNDS:
            break
        # Regress the band on its prediction and the prediction's gradients.
        products = np.einsum("bj,pqjk,bk->bpq", weights, blocks, weights)
        products += 1e-9 * np.eye(3)
        aims = np.einsum("bj,pjb->bp", weights, blocks[:, 0])
        value, east, south = np.linalg.solve(products, aims[..., None])[..., 0].T
        value = np.where(np.abs(value) < 1e-6, 1e-6, value)
        moves = np.clip(np.column_stack([-east / value, -south / value]), -_FARTHEST, _FARTHEST)
        if np.abs(moves).max() < _DISPLACED / 2:
            break
    return moves, 1 - residual, first / residual
