"""Bands of a block, filtered by its mask and read ahead at their own pixel size."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pystac
from odc.geo.geobox import GeoBox

from minecube.composite.masks import Bool, Int16, Int32, UInt8
from minecube.composite.needs import AHEAD, MASK_M, size_of
from minecube.grid import at_resolution
from minecube.reader import Ledger, begin

UInt16 = npt.NDArray[np.uint16]
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
    """uint8 [day, y, x] at 20 m, as `masks.kinds` returns it; set to 0 if a band has no data."""
    lacking: set[int] = field(default_factory=set)
    """Scenes with a band without data at pixels seen by SCL."""
    asked: set[tuple[int, str]] = field(default_factory=set)
    """Pairs of scene and band already read; a second read does not count as planned."""

    def inside(self, edge: int) -> Observations:
        """Return the arrays without `edge` pixels on each side, as views: changes reach the
        original."""
        return replace(self, owner=cropped(self.owner, edge), kind=cropped(self.kind, edge))


class Bands:
    """Bands in sequence, each [day, y, x] at its own pixel size, 0 at unused observations.

    All bands of an observation come from one scene. If one of them has no data at a pixel seen by
    SCL, the kind of the observation becomes 0. The scene joins `lacking` of the observations. The
    caller must then redo the block.

    Args:
        observations: The scenes and their masks.
        use: bool [day, y, x] at 20 m, the wanted observations. Days without any are left out of all
            results.
        box: The area to read, at 10 m.
        ledger: Counts the reads.
    """

    def __init__(
        self, observations: Observations, use: Bool, box: GeoBox, ledger: Ledger | None
    ) -> None:
        self.days = np.flatnonzero(use.any(axis=(1, 2)))
        """Indices of the used days among all days."""
        self.use = use[self.days]
        self._of, self._box, self._ledger = observations, box, ledger
        index = {int(day): n for n, day in enumerate(self.days)}
        self._day_of = [index.get(day, -1) for day in observations.day_of]
        self._windows = self._wanted()
        self._reading: deque[tuple[str, UInt16, deque[tuple[int, Window, Future[UInt16]]]]] = (
            deque()
        )
        self._queue: deque[str] = deque()
        self._spare: dict[int, list[UInt16]] = {}

    def read(self, bands: Sequence[str]) -> None:
        """Queue bands for `next`, after the bands queued before."""
        self._queue.extend(bands)
        self._begin()

    def next(self) -> UInt16:
        """Return the next band; raise ReadError if it cannot be read."""
        band, seen, reads = self._reading.popleft()
        self._begin()
        size = size_of(band, self._of.scenes)
        while reads:
            scene, window, read = reads.popleft()  # removed, to free its memory
            pixels, day = read.result(), self._day_of[scene]
            if not pixels.min():
                lacking = self._where(scene, window) & ~_whole(pixels, size)
                self._of.kind[(self.days[day], *window)][lacking] = 0
                if lacking.any():
                    self._of.lacking.add(scene)
            if self._alone(scene):
                masked(seen[day], self.use[day], size, out=seen[day])
            else:
                seen[(day, *_scaled(window, size))] |= masked(
                    pixels, self._where(scene, window), size, out=pixels
                )
        return seen

    def spent(self, seen: UInt16, band: str) -> None:
        """Release an array returned by `next`, so a later band reuses its memory."""
        size = size_of(band, self._of.scenes)
        if size in (size_of(b, self._of.scenes) for b in self._queue):
            self._spare.setdefault(size, []).append(seen)

    def narrow(self, use: Bool) -> None:
        """Reduce the wanted observations of the bands not yet begun."""
        self.use = use
        self._windows = self._wanted()

    def cancel(self) -> None:
        """Cancel all pending reads."""
        for *_, reads in self._reading:
            for *_, read in reads:
                read.cancel()

    def _begin(self) -> None:
        while self._queue:
            band = self._queue[0]
            size = size_of(band, self._of.scenes)
            box = at_resolution(self._box, size)
            shape = (len(self.days), *box.shape)
            # Read at most `AHEAD` + 1 bands of 10 m at a time, or as many bytes of coarser bands.
            held = sum(seen.size for _, seen, _ in self._reading) + math.prod(shape)
            if self._reading and held > (AHEAD + 1) * len(self.days) * math.prod(self._box.shape):
                return
            self._queue.popleft()
            spare = self._spare.get(size)
            seen = spare.pop() if spare else np.empty(shape, dtype=np.uint16)
            reads: deque[tuple[int, Window, Future[UInt16]]] = deque()
            begun: set[int] = set()
            for scene, window in self._windows:
                day, place = self._day_of[scene], _scaled(window, size)
                # Read straight into place if the day has no other scene.
                out = seen[(day, *place)] if self._alone(scene) else None
                if out is None and day not in begun:
                    seen[day] = 0
                begun.add(day)
                ledger = (
                    self._ledger.repeated()
                    if self._ledger and (scene, band) in self._of.asked
                    else self._ledger
                )
                self._of.asked.add((scene, band))
                reads.append(
                    (scene, window, begin(self._of.scenes[scene], band, box[place], ledger, out))
                )
            for day in set(range(len(seen))) - begun:
                seen[day] = 0
            self._reading.append((band, seen, reads))

    def _alone(self, scene: int) -> bool:
        """Test if a scene is the only one of its day, so it owns every pixel seen."""
        return self._day_of.count(self._day_of[scene]) == 1

    def _wanted(self) -> list[tuple[int, Window]]:
        """List the scenes with used pixels, each with the smallest window around them."""
        found = []
        whole = (slice(0, self.use.shape[1]), slice(0, self.use.shape[2]))
        for scene, day in enumerate(self._day_of):
            if day >= 0 and (where := self._where(scene, whole)).any():
                found.append((scene, (_span(where, 1), _span(where, 0))))
        return found

    def _where(self, scene: int, window: Window) -> Bool:
        """Flag the used pixels of a scene in a window of 20 m pixels."""
        day = self._day_of[scene]
        use = self.use[(day, *window)]
        return (
            use
            if self._alone(scene)
            else use & (self._of.owner[(int(self.days[day]), *window)] == scene)
        )


def _scaled(window: Window, size_m: int) -> Window:
    """Convert a window of 20 m pixels to another pixel size."""
    rows, columns = (slice(s.start * MASK_M // size_m, s.stop * MASK_M // size_m) for s in window)
    return rows, columns


def masked(pixels: UInt16, use: Bool, size_m: int, out: UInt16) -> UInt16:
    """Set pixels [..., y, x] of 10 or 20 m to 0 outside flags [..., y, x] of 20 m.

    All arrays must be contiguous.
    """
    if size_m == MASK_M:
        return np.multiply(pixels, use, out=out)
    # View two 10 m pixels as one 32-bit value, to mask both at once.
    wide = use.astype(np.uint32) * np.uint32(0xFFFFFFFF)
    *lead, height, width = use.shape
    before, after = (
        np.ascontiguousarray(a).view(np.uint32).reshape(*lead, height, 2, width)
        for a in (pixels, out)
    )
    np.bitwise_and(before, wide[..., None, :], out=after)
    return out


def summed(pixels: UInt16, size_m: int) -> Int32:
    """Sum 10 m pixels [day, y, x] to 20 m; multiply 20 m pixels by 4 instead."""
    if size_m == MASK_M:
        return pixels.astype(np.int32) * 4
    a, b = pixels[:, ::2].astype(np.int32), pixels[:, 1::2]
    a += b
    total: Int32 = a[:, :, ::2] + a[:, :, 1::2]
    return total


def finer(pixels: npt.NDArray[Any], size_m: int, to_m: int = 10) -> npt.NDArray[Any]:
    """Repeat pixels along the last two dimensions to reach a smaller (or the same) pixel size."""
    scale = size_m // to_m
    return pixels if scale == 1 else pixels.repeat(scale, axis=-2).repeat(scale, axis=-1)


def cropped(pixels: npt.NDArray[Any], margin: int) -> npt.NDArray[Any]:
    """Remove `margin` pixels from each side of the last two dimensions."""
    return pixels[..., margin:-margin, margin:-margin] if margin else pixels


def _whole(pixels: UInt16, size_m: int) -> Bool:
    """Flag the 20 m pixels with data in all of their parts."""
    scale = MASK_M // size_m
    height, width = pixels.shape
    whole: Bool = (
        (pixels != 0).reshape(height // scale, scale, width // scale, scale).all(axis=(1, 3))
    )
    return whole


def _span(flags: Bool, over: int) -> slice:
    """Return the range from the first to the last row (or column) with a flag."""
    first, last = np.flatnonzero(flags.any(axis=over))[[0, -1]]
    return slice(int(first), int(last) + 1)
