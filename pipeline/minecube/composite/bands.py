"""The bands of a block as its mask lets them through: read in their own pixels, ahead of what is made of them."""

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
    """Scenes, the days they make up, and what each pixel of a day is."""

    scenes: Sequence[pystac.Item]
    """In mosaic order."""
    day_of: Sequence[int]
    """Of each scene, its day's index."""
    owner: Int16
    """int16 [day, y, x] at 20 m, the scene that each day's pixel comes from, -1 = none."""
    kind: UInt8
    """uint8 [day, y, x] at 20 m, as `masks.kinds` has it; where a band has no data, the kind becomes 0."""
    lacking: set[int] = field(default_factory=set)
    """Scenes in which a band has no data where SCL has some."""
    asked: set[tuple[int, str]] = field(default_factory=set)
    """Scenes and bands that were read once, which a second time must not count as planned."""

    def inside(self, edge: int) -> Observations:
        """The same without `edge` pixels on each side; views, so that what is struck out here is there."""
        return replace(self, owner=cropped(self.owner, edge), kind=cropped(self.kind, edge))


class Bands:
    """Bands one after the other, each [day, y, x] in its own pixels, 0 where it is not to be used.

    All bands of an observation come from one scene. Where a band of that scene has no data although SCL has some, the kind of
    the observation becomes 0 and the scene joins `lacking` of the observations. The caller must then redo the block.

    Args:
        observations: what there is.
        use: bool [day, y, x] at 20 m, the observations wanted. Days without any are left out of all that comes of this.
        box: where, at 10 m.
        ledger: counts the reads.
    """

    def __init__(self, observations: Observations, use: Bool, box: GeoBox, ledger: Ledger | None) -> None:
        self.days = np.flatnonzero(use.any(axis=(1, 2)))
        """Those that are used, of all days."""
        self.use = use[self.days]
        self._of, self._box, self._ledger = observations, box, ledger
        index = {int(day): n for n, day in enumerate(self.days)}
        self._day_of = [index.get(day, -1) for day in observations.day_of]
        self._windows = self._wanted()
        self._reading: deque[tuple[str, UInt16, deque[tuple[int, Window, Future[UInt16]]]]] = deque()
        self._queue: deque[str] = deque()
        self._spare: dict[int, list[UInt16]] = {}

    def read(self, bands: Sequence[str]) -> None:
        """Bands that `next` gives, after those that were named before."""
        self._queue.extend(bands)
        self._begin()

    def next(self) -> UInt16:
        """The next band; raises ReadError where it cannot be read."""
        band, seen, reads = self._reading.popleft()
        self._begin()
        size = size_of(band, self._of.scenes)
        while reads:
            scene, window, read = reads.popleft()  # and so out of memory
            pixels, day = read.result(), self._day_of[scene]
            if not pixels.min():
                lacking = self._where(scene, window) & ~_whole(pixels, size)
                self._of.kind[(self.days[day], *window)][lacking] = 0
                if lacking.any():
                    self._of.lacking.add(scene)
            if self._alone(scene):
                masked(seen[day], self.use[day], size, out=seen[day])
            else:
                seen[(day, *_scaled(window, size))] |= masked(pixels, self._where(scene, window), size, out=pixels)
        return seen

    def spent(self, seen: UInt16, band: str) -> None:
        """What `next` gave for a band is needed no more: one of those to come is read into the same memory."""
        size = size_of(band, self._of.scenes)
        if size in (size_of(b, self._of.scenes) for b in self._queue):
            self._spare.setdefault(size, []).append(seen)

    def narrow(self, use: Bool) -> None:
        """Fewer observations are wanted of the bands to come."""
        self.use = use
        self._windows = self._wanted()

    def cancel(self) -> None:
        """Read no more."""
        for *_, reads in self._reading:
            for *_, read in reads:
                read.cancel()

    def _begin(self) -> None:
        while self._queue:
            band = self._queue[0]
            size = size_of(band, self._of.scenes)
            box = at_resolution(self._box, size)
            shape = (len(self.days), *box.shape)
            # As much at a time as `AHEAD` bands of 10 m and one more; of coarser ones more, which are soon done with.
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
                # Straight to its place, where no other scene has a pixel of that day.
                out = seen[(day, *place)] if self._alone(scene) else None
                if out is None and day not in begun:
                    seen[day] = 0
                begun.add(day)
                ledger = self._ledger.repeated() if self._ledger and (scene, band) in self._of.asked else self._ledger
                self._of.asked.add((scene, band))
                reads.append((scene, window, begin(self._of.scenes[scene], band, box[place], ledger, out)))
            for day in set(range(len(seen))) - begun:
                seen[day] = 0
            self._reading.append((band, seen, reads))

    def _alone(self, scene: int) -> bool:
        """Whether it is the only scene of its day, and so owns all that was seen."""
        return self._day_of.count(self._day_of[scene]) == 1

    def _wanted(self) -> list[tuple[int, Window]]:
        """Scenes of which a pixel is used, and the smallest window that has all of them."""
        found = []
        whole = (slice(0, self.use.shape[1]), slice(0, self.use.shape[2]))
        for scene, day in enumerate(self._day_of):
            if day >= 0 and (where := self._where(scene, whole)).any():
                found.append((scene, (_span(where, 1), _span(where, 0))))
        return found

    def _where(self, scene: int, window: Window) -> Bool:
        """Flags in a window of 20 m pixels: of that scene, this is used."""
        day = self._day_of[scene]
        use = self.use[(day, *window)]
        return use if self._alone(scene) else use & (self._of.owner[(int(self.days[day]), *window)] == scene)


def _scaled(window: Window, size_m: int) -> Window:
    """A window of 20 m pixels in pixels of that size."""
    rows, columns = (slice(s.start * MASK_M // size_m, s.stop * MASK_M // size_m) for s in window)
    return rows, columns


def masked(pixels: UInt16, use: Bool, size_m: int, out: UInt16) -> UInt16:
    """Pixels [..., y, x] of 10 or 20 m, and 0 where flags [..., y, x] of 20 m do not let them through; contiguous arrays."""
    if size_m == MASK_M:
        return np.multiply(pixels, use, out=out)
    # Two pixels of 10 m are one of 32 bits, so that a flag is laid over both at once.
    wide = use.astype(np.uint32) * np.uint32(0xFFFFFFFF)
    *lead, height, width = use.shape
    before, after = (np.ascontiguousarray(a).view(np.uint32).reshape(*lead, height, 2, width) for a in (pixels, out))
    np.bitwise_and(before, wide[..., None, :], out=after)
    return out


def summed(pixels: UInt16, size_m: int) -> Int32:
    """Pixels [day, y, x] of 10 or 20 m at 20 m, as sums of 10 m pixels; 0 where they are."""
    if size_m == MASK_M:
        return pixels.astype(np.int32) * 4
    a, b = pixels[:, ::2].astype(np.int32), pixels[:, 1::2]
    a += b
    total: Int32 = a[:, :, ::2] + a[:, :, 1::2]
    return total


def finer(pixels: npt.NDArray[Any], size_m: int, to_m: int = 10) -> npt.NDArray[Any]:
    """The last two dimensions at a smaller (or the same) pixel size, by repetition."""
    scale = size_m // to_m
    return pixels if scale == 1 else pixels.repeat(scale, axis=-2).repeat(scale, axis=-1)


def cropped(pixels: npt.NDArray[Any], margin: int) -> npt.NDArray[Any]:
    """The last two dimensions without `margin` pixels on each side."""
    return pixels[..., margin:-margin, margin:-margin] if margin else pixels


def _whole(pixels: UInt16, size_m: int) -> Bool:
    """Where all of a 20 m pixel is seen."""
    scale = MASK_M // size_m
    height, width = pixels.shape
    whole: Bool = (pixels != 0).reshape(height // scale, scale, width // scale, scale).all(axis=(1, 3))
    return whole


def _span(flags: Bool, over: int) -> slice:
    """First to last row (or column) with a flag, over the other axis."""
    first, last = np.flatnonzero(flags.any(axis=over))[[0, -1]]
    return slice(int(first), int(last) + 1)
