"""Bands of a block, filtered by its mask and read ahead at their own pixel size."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import pystac
from odc.geo.geobox import GeoBox

from minecube.arrays import AnyArray, Bool, Int32, UInt8, UInt16
from minecube.composite.masks import crop
from minecube.composite.needs import LEAST_CUT_PX, MASK_M, count_ahead, pixel_size_of
from minecube.composite.values import Samples
from minecube.grid import PIXEL_M, coarsen
from minecube.reader import Ledger, find_tile_rows, start_read

Window = tuple[slice, slice]
_LEAST_ROWS = 64  # rows of 20 m in a strip: a shorter one costs more time than it saves memory


@dataclass(frozen=True)
class Observations:
    """Scenes, their days, and the kind of each pixel of a day."""

    scenes: Sequence[pystac.Item]
    """Scenes in mosaic order."""
    day_of: Sequence[int]
    """Index of each scene's day."""
    owner: AnyArray
    """int8 or int16 [day, y, x] at 20 m, index of the scene of each day's pixel, -1 = none."""
    kind: UInt8
    """uint8 [day, y, x] at 20 m, as `masks.classify_day` returns it; set to 0 if a band has no data."""
    incomplete: set[int] = field(default_factory=set)
    """Scenes with a band without data at pixels seen by SCL."""
    reads: set[tuple[int, str, int]] = field(default_factory=set)
    """Scene, band and first row of each read so far; a second read does not count as planned."""

    def crop(self, edge: int) -> Observations:
        """Return the arrays without `edge` pixels on each side, as views: changes reach the
        original."""
        return replace(self, owner=crop(self.owner, edge), kind=crop(self.kind, edge))


class Strip(NamedTuple):
    """All used days of some rows of a band."""

    band: str
    rows: slice
    """Rows of 20 m."""
    pixels: UInt16
    """uint16 [day, y, x] at the band's own pixel size, 0 at unused observations."""


class _Read(NamedTuple):
    """A window of a scene, being read."""

    scene: int
    window: Window
    """Rows and columns at 20 m."""
    pixels: Future[UInt16]


class _StripReads(NamedTuple):
    """All reads of a strip."""

    strip: Strip
    """Its pixels are the result. Days of one scene are read in place."""
    reads: deque[_Read]


class Bands:
    """Bands in sequence, each [day, y, x] at its own pixel size, 0 at unused observations.

    All bands of an observation come from one scene. If one of them has no data at a pixel seen by
    SCL, the kind of the observation becomes 0. The scene joins `incomplete` of the observations.
    The caller must then redo the block.

    `use` marks the observations to read, bool [day, y, x] at 20 m. Days without any are left out of
    all results. `box` is the area to read, at 10 m. `samples` collects pixels to check. Its block
    begins `fringe` pixels of 20 m inside the box.
    """

    def __init__(
        self,
        observations: Observations,
        use: Bool,
        box: GeoBox,
        ledger: Ledger | None,
        samples: Samples | None = None,
        fringe: int = 0,
    ) -> None:
        self.days = np.flatnonzero(use.any(axis=(1, 2)))
        """Indices of the used days among all days."""
        self.use = use if len(self.days) == len(use) else use[self.days]
        self._observations = observations
        self._box = box
        self._ledger = ledger
        self._samples = samples
        self._fringe = fringe
        index = {int(day): n for n, day in enumerate(self.days)}
        self._day_of = [index.get(day, -1) for day in observations.day_of]
        self._reading: deque[_StripReads] = deque()
        self._queue: deque[tuple[str, slice]] = deque()
        self._ahead_px = 0
        self._windows: dict[tuple[int, int], list[tuple[int, Window]]] = {}
        self._spare: list[UInt16] = []

    def read(self, bands: Sequence[str], *, in_strips: bool = False) -> None:
        """Queue bands for `next`, after the bands queued before.

        Strips begin at rows of the files' tiles, so no tile is decoded twice. They take less memory
        than whole bands.
        """
        whole = [slice(0, self.use.shape[1])]
        bands = sorted(bands, key=self._size_of)  # the memory of bands of one size is used again
        strips: dict[int, list[slice]] = {}
        for band in bands:
            size = self._size_of(band)
            if in_strips and size not in strips:
                strips[size] = self._cut_strips(band)
            self._queue.extend((band, rows) for rows in strips.get(size, whole))
        sizes = [math.prod(self._shape_of(*strip)) for strip in self._queue]
        ahead = count_ahead(self._observations.scenes)
        self._ahead_px = (ahead + 1) * max(sizes, default=0)
        self._start_reads()

    def are_left(self) -> bool:
        """Test if `next` has strips to return."""
        return bool(self._reading)

    def next(self) -> Strip:
        """Return the next strip; raise ReadError if it cannot be read."""
        strip, reads = self._reading.popleft()
        self._start_reads()
        size = self._size_of(strip.band)
        use = self.use[:, strip.rows]
        while reads:
            scene, window, read = reads.popleft()  # removed, to free its memory
            pixels = read.result()
            day = self._day_of[scene]
            if self._samples is not None:
                corner = window[0].start - self._fringe, window[1].start - self._fringe
                self._samples.add(scene, strip.band, corner, pixels, size)
            if not pixels.min():
                self._note_gaps(scene, window, pixels, size)
            if self._is_alone(scene):
                mask_pixels(strip.pixels[day], use[day], size, out=strip.pixels[day])
            else:
                place = (day, *_scale_window(window, strip.rows.start, size))
                strip.pixels[place] |= mask_pixels(
                    pixels, self._flag_used(scene, window), size, out=pixels
                )
        return strip

    def release(self, strip: Strip) -> None:
        """Release the memory of a strip, so a later strip reuses it."""
        if self._queue and strip.pixels.base is not None:
            self._spare.append(strip.pixels.base)

    def narrow(self, use: Bool) -> None:
        """Reduce the observations of the bands not yet begun."""
        self.use = use
        self._windows.clear()

    def cancel(self) -> None:
        """Cancel all pending reads."""
        for strip in self._reading:
            for read in strip.reads:
                read.pixels.cancel()

    def _size_of(self, band: str) -> int:
        return pixel_size_of(band, self._observations.scenes)

    def _cut_strips(self, band: str) -> list[slice]:
        """Cut the rows of a band where tiles of its first file begin: slices of 20 m rows."""
        size = self._size_of(band)
        box = coarsen(self._box, size)
        height = self.use.shape[1]
        starts = [0]
        if len(self.days) * math.prod(box.shape) > LEAST_CUT_PX:
            scene = self._observations.scenes[self._day_of.index(0)]
            for row in find_tile_rows(scene, band, box, self._ledger):
                start, remainder = divmod(row * size, MASK_M)
                if not remainder and starts[-1] + _LEAST_ROWS <= start <= height - _LEAST_ROWS:
                    starts.append(start)
        return [slice(*ends) for ends in itertools.pairwise([*starts, height])]

    def _note_gaps(self, scene: int, window: Window, pixels: UInt16, size_m: int) -> None:
        """Strike the used observations without data in a band."""
        gaps = self._flag_used(scene, window) & ~_has_all_parts(pixels, size_m)
        day = self.days[self._day_of[scene]]
        self._observations.kind[(day, *window)][gaps] = 0
        if gaps.any():
            self._observations.incomplete.add(scene)

    def _start_reads(self) -> None:
        """Start as many of the queued strips as fit into memory."""
        while self._queue:
            band, rows = self._queue[0]
            shape = self._shape_of(band, rows)
            ahead = sum(reading.strip.pixels.size for reading in self._reading)
            if self._reading and ahead + math.prod(shape) > self._ahead_px:
                return
            self._queue.popleft()
            strip = Strip(band, rows, self._allocate(shape))
            self._reading.append(_StripReads(strip, self._start_strip(strip)))

    def _shape_of(self, band: str, rows: slice) -> tuple[int, int, int]:
        scale = MASK_M // self._size_of(band)
        days, _, width = self.use.shape
        return days, (rows.stop - rows.start) * scale, width * scale

    def _allocate(self, shape: tuple[int, int, int]) -> UInt16:
        """Return an array of any content, if possible in the memory of an earlier strip."""
        pixels = math.prod(shape)
        fitting = [n for n, spare in enumerate(self._spare) if pixels <= spare.size < 2 * pixels]
        if fitting:
            memory = self._spare.pop(fitting[0])
        else:
            self._spare.clear()  # the bands that follow are no larger
            memory = np.empty(pixels, dtype=np.uint16)
        return memory[:pixels].reshape(shape)

    def _start_strip(self, strip: Strip) -> deque[_Read]:
        """Start the reads of a strip with pixels of any content."""
        size = self._size_of(strip.band)
        box = coarsen(self._box, size)
        reads: deque[_Read] = deque()
        started: set[int] = set()
        for scene, window in self._list_windows(strip.rows):
            day = self._day_of[scene]
            # Read straight into place if the day has no other scene.
            target = None
            if self._is_alone(scene):
                target = strip.pixels[(day, *_scale_window(window, strip.rows.start, size))]
            elif day not in started:
                strip.pixels[day] = 0
            started.add(day)
            ledger = self._ledger
            key = (scene, strip.band, strip.rows.start)
            if ledger and key in self._observations.reads:
                ledger = ledger.for_repeats()
            self._observations.reads.add(key)
            item = self._observations.scenes[scene]
            place = box[_scale_window(window, 0, size)]
            read = start_read(item, strip.band, place, ledger, target)
            reads.append(_Read(scene, window, read))
        for day in set(range(len(strip.pixels))) - started:
            strip.pixels[day] = 0
        return reads

    def _is_alone(self, scene: int) -> bool:
        """Test if a scene is the only one of its day, so it owns every pixel seen."""
        return self._day_of.count(self._day_of[scene]) == 1

    def _list_windows(self, rows: slice) -> list[tuple[int, Window]]:
        """List the scenes with used pixels in a strip, each with the smallest window around
        them."""
        if (rows.start, rows.stop) in self._windows:
            return self._windows[rows.start, rows.stop]
        windows = self._windows[rows.start, rows.stop] = []
        whole_strip = (rows, slice(0, self.use.shape[2]))
        for scene, day in enumerate(self._day_of):
            if day < 0:
                continue
            pixels = self._flag_used(scene, whole_strip)
            if pixels.any():
                span = _find_span(pixels, 1)
                used_rows = slice(rows.start + span.start, rows.start + span.stop)
                windows.append((scene, (used_rows, _find_span(pixels, 0))))
        return windows

    def _flag_used(self, scene: int, window: Window) -> Bool:
        """Flag the used pixels of a scene in a window of 20 m pixels."""
        day = self._day_of[scene]
        use = self.use[(day, *window)]
        if self._is_alone(scene):
            return use
        owner = self._observations.owner[(int(self.days[day]), *window)]
        is_owner: Bool = owner == scene
        return use & is_owner


def _scale_window(window: Window, top: int, size_m: int) -> Window:
    """Convert a window of 20 m pixels to another pixel size, with rows counted from row `top`."""
    scale = MASK_M // size_m
    rows, columns = window
    return (
        slice((rows.start - top) * scale, (rows.stop - top) * scale),
        slice(columns.start * scale, columns.stop * scale),
    )


def mask_pixels(pixels: UInt16, use: Bool, size_m: int, out: UInt16) -> UInt16:
    """Set pixels [..., y, x] of 10 or 20 m to 0 outside flags [..., y, x] of 20 m.

    All arrays must be contiguous.
    """
    if size_m == MASK_M:
        return np.multiply(pixels, use, out=out)
    # View two 10 m pixels as one 32-bit value, to mask both at once.
    pair_mask = use.astype(np.uint32) * np.uint32(0xFFFFFFFF)
    *lead, height, width = use.shape
    pairs, masked_pairs = (
        np.ascontiguousarray(a).view(np.uint32).reshape(*lead, height, 2, width)
        for a in (pixels, out)
    )
    np.bitwise_and(pairs, pair_mask[..., None, :], out=masked_pairs)
    return out


def sum_to_mask_size(pixels: UInt16, size_m: int) -> Int32:
    """Sum 10 m pixels [y, x] to 20 m; multiply 20 m pixels by 4 instead."""
    if size_m == MASK_M:
        return pixels.astype(np.int32) * 4
    rows = pixels[::2].astype(np.int32)
    rows += pixels[1::2]
    return rows[:, ::2] + rows[:, 1::2]


def repeat_pixels(pixels: AnyArray, size_m: int) -> AnyArray:
    """Repeat pixels of 10 or 20 m along the last two dimensions to reach 10 m."""
    scale = size_m // PIXEL_M
    if scale == 1:
        return pixels
    return pixels.repeat(scale, axis=-2).repeat(scale, axis=-1)


def _has_all_parts(pixels: UInt16, size_m: int) -> Bool:
    """Flag the 20 m pixels with data in all of their parts."""
    scale = MASK_M // size_m
    height, width = pixels.shape
    parts = (pixels != 0).reshape(height // scale, scale, width // scale, scale)
    has_all: Bool = parts.all(axis=(1, 3))
    return has_all


def _find_span(flags: Bool, axis: int) -> slice:
    """Return the range from the first to the last row (or column) with a flag.

    `axis` is the other one.
    """
    start, last = np.flatnonzero(flags.any(axis=axis))[[0, -1]]
    return slice(int(start), int(last) + 1)
