"""Read a band of a scene onto a grid, on shared threads, and count the read."""

from __future__ import annotations

import functools
import itertools
import json
import os
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pystac
from affine import Affine
from odc.geo.geobox import GeoBox
from rasterio.enums import Resampling

from minecube.arrays import Int32, UInt16
from minecube.catalog import SCL, Access
from minecube.errors import ReadError, UnusableFileError
from minecube.grid import WINDOW_PX, TileEdges
from minecube.network import (
    ForbiddenError,
    MissingError,
    RequestError,
    check_href,
    is_local,
    remove_query,
)
from minecube.reader.gridding import copy_to
from minecube.reader.ledger import Ledger
from minecube.reader.raster import File, find_tiles, need_header, read_file
from minecube.reader.transfer import Tally

READ_THREADS = 64
"""Simultaneous reads in a process. Reads wait for networks and disks, so the number is
independent of Dask's threads and the cores."""
LOCAL_THREADS = (os.cpu_count() or 1) + 1
"""Simultaneous reads of local files. They wait for a core, not for an answer. More would take
cores from the reducers."""


@dataclass(frozen=True)
class Asset:
    """One file of a scene."""

    scene: str
    band: str
    file: File

    def read(
        self, grid: GeoBox, resampling: Resampling, ledger: Ledger | None, out: UInt16 | None = None
    ) -> UInt16:
        """Read the file onto a grid (`raster.read_file`) and count it in the ledger.

        A read lost with the ledger's permission returns uint16 zeros.
        """
        if ledger is None:
            return read_file(self.file, grid, resampling, out=out)
        tally = Tally()
        began = time.perf_counter()
        try:
            pixels = read_file(self.file, grid, resampling, tally, out)
        except ReadError as error:
            self._count(ledger, tally, began, lost_because=str(error))
            if not ledger.lossy or (ledger.copied and isinstance(error, UnusableFileError)):
                raise
            return copy_to(np.zeros(grid.shape, dtype=np.uint16), out)
        self._count(ledger, tally, began)
        return pixels

    def _count(self, ledger: Ledger, tally: Tally, began: float, lost_because: str = "") -> None:
        is_lost = bool(lost_because)
        ledger.add(
            self.scene,
            self.band,
            reason=lost_because,
            planned=1,
            read=int(not is_lost),
            lost=int(is_lost),
            requests=tally.requests,
            retried=tally.retried,
            bytes=tally.bytes,
            struck=tally.wrapped,
            seconds=time.perf_counter() - began,
        )


def find_common_tiles(
    scenes: Sequence[pystac.Item], band: str, grid: GeoBox, ledger: Ledger | None
) -> list[tuple[TileEdges, TileEdges]]:
    """Return the edges of the file tiles of each Sentinel-2 tile, the one with most scenes first.

    Returns an empty list if a scene is in another zone than the grid, or a file cannot be read. Also
    if the grid is no larger than a window. Reads headers only, which later reads do not request again.
    """
    if max(grid.shape, default=0) <= WINDOW_PX:
        return []
    names = [scene.properties.get("s2:mgrs_tile") for scene in scenes]
    found = []
    for name, _ in Counter(names).most_common():
        tiles = _find_tiles(scenes[names.index(name)], band, grid, ledger)
        if tiles is None:
            return []
        found.append(tiles)
    return found


def _find_tiles(
    scene: pystac.Item, band: str, grid: GeoBox, ledger: Ledger | None
) -> tuple[TileEdges, TileEdges] | None:
    """Return the edges of the tiles of a scene's file; None if it has another CRS or is unreadable."""
    tally = Tally()
    try:
        tiles = find_tiles(asset_of(scene, band).file, grid, tally)
    except ReadError:
        tiles = None
    if ledger is not None:
        requests, retried, read_bytes = tally.requests, tally.retried, tally.bytes
        ledger.add(scene.id, band, requests=requests, retried=retried, bytes=read_bytes)
    return tiles


def asset_of(scene: pystac.Item, band: str) -> Asset:
    """Return the scene's file of a band.

    Raises ReadError if the file does not exist or must not be read.
    """
    if band not in scene.assets:
        raise ReadError(
            f"scene {scene.id}: no asset for {band}; it has {', '.join(sorted(scene.assets))}"
        )
    origin = scene.properties.get("minecube:origin")
    if not isinstance(origin, str):  # with None, the caller would vouch for the href
        raise ReadError(
            f"scene {scene.id}: expected the host of its catalogue in minecube:origin, "
            f"found {origin!r}. Search again."
        )
    fields = json.loads(scene.properties["minecube:access"])
    fields["credentials_for"] = tuple(fields.get("credentials_for", ()))
    file = File(scene.assets[band].href, Access(**fields), origin)
    try:
        check_href(file.href, origin, file.access.hosts())
    except ForbiddenError as error:
        raise ReadError(
            f"scene {scene.id}: {band} is not read from {remove_query(file.href)}: {error}"
        ) from error
    return Asset(scene.id, band, file)


def read_band(
    scene: pystac.Item,
    band: str,
    grid: GeoBox,
    ledger: Ledger | None = None,
    out: UInt16 | None = None,
) -> UInt16:
    """Read one band of one scene onto a grid: uint16 [y, x].

    The result equals `stack`'s, but without a graph. It is put into `out` if given. A registration
    shift in `minecube:shift_m` (east and north) is applied.

    Raises:
        ReadError: The scene lacks this band, or its pixels cannot be read.
    """
    asset = asset_of(scene, band)
    shift = scene.properties.get("minecube:shift_m")
    if shift:
        grid = GeoBox(grid.shape, Affine.translation(*shift) @ grid.transform, grid.crs)
    if band == SCL:
        return asset.read(grid, Resampling.nearest, ledger, out)
    raw = asset.read(grid, Resampling.bilinear, ledger, out)
    offset = scene.properties["minecube:offset"]
    if not offset:
        return raw
    return copy_to(remove_offset(raw, offset), out)


def find_tile_rows(
    scene: pystac.Item, band: str, grid: GeoBox, ledger: Ledger | None = None
) -> list[int]:
    """Return the rows of a grid at which tiles of a scene's file begin, besides its first row.

    Empty for a file of another zone, with other pixels, or that cannot be read. Reads its header
    only.
    """
    tiles = _find_tiles(scene, band, grid, ledger)
    if tiles is None or scene.properties.get("minecube:shift_m"):
        return []
    start, stop, step = tiles[0]
    if step < 1:
        return []
    first = max(start, start % step)
    rows = np.arange(first, min(stop, grid.shape[0]), step)
    return [round(row) for row in rows.tolist() if row > 0 and row == round(row)]


def remove_offset(raw: UInt16, offset: Int32 | int) -> UInt16:
    """Add BOA_ADD_OFFSET to digital numbers: uint16, valid pixels at least 1, nodata 0 stays 0.

    Values are clipped before the addition, because uint16 would wrap. A dark 900 with offset -1000
    must become 1, not 65436.
    """
    subtrahend = np.clip(-np.asarray(offset, dtype=np.int32), -65534, 65534)
    low = np.maximum(1 + subtrahend, 1).astype(np.uint16)
    high = np.minimum(65535 + subtrahend, 65535).astype(np.uint16)
    # A negative subtrahend wraps, and so does the difference: back to the right number.
    reflectance: UInt16 = np.clip(raw, low, high) - subtrahend.astype(np.uint16)
    reflectance *= raw != 0
    return reflectance


def start_read(
    scene: pystac.Item,
    band: str,
    grid: GeoBox,
    ledger: Ledger | None = None,
    out: UInt16 | None = None,
) -> Future[UInt16]:
    """Start `read_band` on the process's shared threads: many for remote files, few for local
    ones."""
    return _threads_for(scene, band).submit(read_band, scene, band, grid, ledger, out)


def start_stored_read(
    scene: pystac.Item, band: str, grid: GeoBox, ledger: Ledger | None = None
) -> Future[UInt16]:
    """Start to read a band as stored: with its offset, and without a shift of registration."""

    def read() -> UInt16:
        resampling = Resampling.nearest if band == SCL else Resampling.bilinear
        return asset_of(scene, band).read(grid, resampling, ledger)

    return _threads_for(scene, band).submit(read)


def wait_for(reads: Iterable[Future[UInt16]], ahead: int | None = None) -> Iterator[UInt16]:
    """Yield the pixels of reads in their order; if one fails, cancel those not yet begun.

    `ahead` limits the reads taken from an iterator at a time, and so the pixels in memory.
    """
    reads = iter(reads)
    waiting = deque(itertools.islice(reads, ahead))
    try:
        while waiting:
            pixels = waiting.popleft().result()
            waiting.extend(itertools.islice(reads, 1))
            yield pixels
    finally:
        for read in waiting:
            read.cancel()


def _threads_for(scene: pystac.Item, band: str) -> ThreadPoolExecutor:
    is_remote = band in scene.assets and not is_local(scene.assets[band].href)
    return threads(READ_THREADS if is_remote else LOCAL_THREADS)


@functools.cache
def threads(count: int) -> ThreadPoolExecutor:
    """Return the process's shared threads of this number."""
    return ThreadPoolExecutor(count, thread_name_prefix="minecube-read")


def find_missing(scene: pystac.Item, bands: Sequence[str]) -> str:
    """Find the first of these bands with a missing, empty or cut file, and report the reason.

    Returns an empty text if no file is missing, or if this cannot be checked now. Requests the
    first bytes of each file; reads need these anyway.
    """
    files = [asset_of(scene, band).file for band in bands]
    checks = [threads(READ_THREADS).submit(_explain_missing, file) for file in files]
    reasons = [check.result() for check in checks]
    for band, reason in zip(bands, reasons, strict=True):
        if reason:
            return f"{band} is gone ({reason})"
    return ""


def _explain_missing(file: File) -> str:
    try:
        need_header(file)
    except MissingError as error:
        return str(error)
    except (RequestError, ForbiddenError):
        pass  # this cannot be checked now
    return ""
