"""Bands of a block, filtered by its mask and read ahead at their own pixel size."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import pystac
from odc.geo.geobox import GeoBox

from minecube.arrays import AnyArray, Bool, Int16, Int32, UInt8, UInt16
from minecube.composite.needs import AHEAD, MASK_M, pixel_size_of
from minecube.grid import PIXEL_M, coarsen
from minecube.reader import Ledger, start_read

Window = tuple[slice, slice]


@dataclass(frozen=True)
class Observations:
    """Scenes, their days, and the kind of each pixel of a day."""

    scenes: Sequence[pystac.Item]
    """Scenes in mosaic order."""
    day_of: Sequence[int]
    """Index of each scene's day."""
    owner: Int16
    """int16 [day, y, x] at 20 m, index of the scene of each day's pixel, -1 = none."""
    kind: UInt8
    """uint8 [day, y, x] at 20 m, as `masks.classify` returns it; set to 0 if a band has no data."""
    incomplete: set[int] = field(default_factory=set)
    """Scenes with a band without data at pixels seen by SCL."""
    reads: set[tuple[int, str]] = field(default_factory=set)
    """Pairs of scene and band already read; a second read does not count as planned."""

    def crop(self, edge: int) -> Observations:
        """Return the arrays without `edge` pixels on each side, as views: changes reach the
        original."""
        return replace(self, owner=crop(self.owner, edge), kind=crop(self.kind, edge))


class _Read(NamedTuple):
    """A window of a scene, being read."""

    scene: int
    window: Window
    """Rows and columns at 20 m."""
    pixels: Future[UInt16]


class _BandReads(NamedTuple):
    """All reads of a band."""

    band: str
    stack: UInt16
    """uint16 [day, y, x] at the band's own pixel size, the result. Days of one scene are read in
    place."""
    reads: deque[_Read]


class Bands:
    """Bands in sequence, each [day, y, x] at its own pixel size, 0 at unused observations.

    All bands of an observation come from one scene. If one of them has no data at a pixel seen by
    SCL, the kind of the observation becomes 0. The scene joins `incomplete` of the observations.
    The caller must then redo the block.

    `use` marks the observations to read, bool [day, y, x] at 20 m. Days without any are left out of
    all results. `box` is the area to read, at 10 m.
    """

    def __init__(
        self, observations: Observations, use: Bool, box: GeoBox, ledger: Ledger | None
    ) -> None:
        self.days = np.flatnonzero(use.any(axis=(1, 2)))
        """Indices of the used days among all days."""
        self.use = use[self.days]
        self._observations = observations
        self._box = box
        self._ledger = ledger
        index = {int(day): n for n, day in enumerate(self.days)}
        self._day_of = [index.get(day, -1) for day in observations.day_of]
        self._windows = self._list_windows()
        self._reading: deque[_BandReads] = deque()
        self._queue: deque[str] = deque()
        self._spare: dict[int, list[UInt16]] = {}

    def read(self, bands: Sequence[str]) -> None:
        """Queue bands for `next`, after the bands queued before."""
        self._queue.extend(bands)
        self._start_reads()

    def next(self) -> UInt16:
        """Return the next band; raise ReadError if it cannot be read."""
        band, stack, reads = self._reading.popleft()
        self._start_reads()
        size = self._size_of(band)
        while reads:
            scene, window, read = reads.popleft()  # removed, to free its memory
            pixels = read.result()
            day = self._day_of[scene]
            if not pixels.min():
                self._note_gaps(scene, window, pixels, size)
            if self._is_alone(scene):
                mask_pixels(stack[day], self.use[day], size, out=stack[day])
            else:
                place = (day, *_scale_window(window, size))
                stack[place] |= mask_pixels(
                    pixels, self._flag_used(scene, window), size, out=pixels
                )
        return stack

    def release(self, stack: UInt16, band: str) -> None:
        """Release an array returned by `next`, so a later band reuses its memory."""
        size = self._size_of(band)
        if any(self._size_of(later) == size for later in self._queue):
            self._spare.setdefault(size, []).append(stack)

    def narrow(self, use: Bool) -> None:
        """Reduce the observations of the bands not yet begun."""
        self.use = use
        self._windows = self._list_windows()

    def cancel(self) -> None:
        """Cancel all pending reads."""
        for band in self._reading:
            for read in band.reads:
                read.pixels.cancel()

    def _size_of(self, band: str) -> int:
        return pixel_size_of(band, self._observations.scenes)

    def _note_gaps(self, scene: int, window: Window, pixels: UInt16, size_m: int) -> None:
        """Strike the used observations without data in a band."""
        gaps = self._flag_used(scene, window) & ~_has_all_parts(pixels, size_m)
        day = self.days[self._day_of[scene]]
        self._observations.kind[(day, *window)][gaps] = 0
        if gaps.any():
            self._observations.incomplete.add(scene)

    def _start_reads(self) -> None:
        """Start as many of the queued bands as fit into memory."""
        while self._queue:
            band = self._queue[0]
            size = self._size_of(band)
            shape = (len(self.days), *coarsen(self._box, size).shape)
            # Read at most `AHEAD` + 1 bands of 10 m at a time, or as many bytes of coarser bands.
            pixels = sum(reading.stack.size for reading in self._reading) + math.prod(shape)
            limit = (AHEAD + 1) * len(self.days) * math.prod(self._box.shape)
            if self._reading and pixels > limit:
                return
            self._queue.popleft()
            spare = self._spare.get(size)
            stack = spare.pop() if spare else np.empty(shape, dtype=np.uint16)
            self._reading.append(self._start_band(band, size, stack))

    def _start_band(self, band: str, size: int, stack: UInt16) -> _BandReads:
        """Start the reads of a band into a stack [day, y, x] of any content."""
        box = coarsen(self._box, size)
        reads: deque[_Read] = deque()
        started: set[int] = set()
        for scene, window in self._windows:
            day = self._day_of[scene]
            place = _scale_window(window, size)
            # Read straight into place if the day has no other scene.
            target = stack[(day, *place)] if self._is_alone(scene) else None
            if target is None and day not in started:
                stack[day] = 0
            started.add(day)
            ledger = self._ledger
            if ledger and (scene, band) in self._observations.reads:
                ledger = ledger.for_repeats()
            self._observations.reads.add((scene, band))
            item = self._observations.scenes[scene]
            reads.append(_Read(scene, window, start_read(item, band, box[place], ledger, target)))
        for day in set(range(len(stack))) - started:
            stack[day] = 0
        return _BandReads(band, stack, reads)

    def _is_alone(self, scene: int) -> bool:
        """Test if a scene is the only one of its day, so it owns every pixel seen."""
        return self._day_of.count(self._day_of[scene]) == 1

    def _list_windows(self) -> list[tuple[int, Window]]:
        """List the scenes with used pixels, each with the smallest window around them."""
        windows = []
        whole_area = (slice(0, self.use.shape[1]), slice(0, self.use.shape[2]))
        for scene, day in enumerate(self._day_of):
            if day < 0:
                continue
            pixels = self._flag_used(scene, whole_area)
            if pixels.any():
                windows.append((scene, (_find_span(pixels, 1), _find_span(pixels, 0))))
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


def _scale_window(window: Window, size_m: int) -> Window:
    """Convert a window of 20 m pixels to another pixel size."""
    rows, columns = (slice(s.start * MASK_M // size_m, s.stop * MASK_M // size_m) for s in window)
    return rows, columns


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
    """Sum 10 m pixels [day, y, x] to 20 m; multiply 20 m pixels by 4 instead."""
    if size_m == MASK_M:
        return pixels.astype(np.int32) * 4
    rows = pixels[:, ::2].astype(np.int32)
    rows += pixels[:, 1::2]
    return rows[:, :, ::2] + rows[:, :, 1::2]


def repeat_pixels(pixels: AnyArray, size_m: int) -> AnyArray:
    """Repeat pixels of 10 or 20 m along the last two dimensions to reach 10 m."""
    scale = size_m // PIXEL_M
    if scale == 1:
        return pixels
    return pixels.repeat(scale, axis=-2).repeat(scale, axis=-1)


def crop(pixels: AnyArray, margin: int) -> AnyArray:
    """Remove `margin` pixels from each side of the last two dimensions."""
    if not margin:
        return pixels
    return pixels[..., margin:-margin, margin:-margin]


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
