"""Read parts of an array of a cube, faster than Zarr.

This module maps shards on a local disk into memory. It requests all chunks of a part before it
waits for the first. Zarr reads the shards of object stores, and shards of other codecs. For a site
of 1020 x 1020 pixels and six years, loading a cube takes 1.4 s of a processor and 3.6 s with Zarr
alone. A window of 160 pixels takes 1.4 ms and 8 ms.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from xarray.backends import BackendArray
from xarray.core import indexing
from zarr.storage import WrapperStore

from minecube.arrays import AnyArray
from minecube.cube import packed
from minecube.cube.read.commits import Watch
from minecube.cube.read.shards import Decoder, Shard, decoder_of, find_shard, map_shard
from minecube.cube.store import Store
from minecube.errors import CubeError


@dataclass(frozen=True)
class _Area:
    """Years, rows and columns of a part, by index."""

    years: Sequence[int]
    rows: slice
    columns: slice


@dataclass(frozen=True)
class _Cut:
    """A chunk's share of one axis of a part."""

    shard: int
    chunk: int
    """Place of the chunk in its shard."""
    target: slice
    """Place in the part."""
    source: slice
    """Place in the chunk."""


@dataclass(frozen=True)
class _Read:
    """A chunk to unpack."""

    shard: Shard
    offset: int
    length: int
    source: tuple[Any, ...]
    """Place in the chunk."""
    target: AnyArray
    """View of the part."""


@dataclass(frozen=True)
class Pixels:
    """An array [year, ..., y, x] of a store, as a source of windows."""

    store: Store
    path: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fill: Any
    chunk: tuple[int, int]
    shard: tuple[int, int]
    decoder: Decoder | None
    """Decoder of a chunk; None if Zarr has to read it."""
    watch: Watch | None = None
    """Check for writes during a read."""

    @classmethod
    def open(cls, store: Store, path: str, watch: Watch | None = None) -> Pixels:
        """Open the array at this path."""
        store = store.absolute()
        array = zarr.open_array(store.open_zarr(), path=path, mode="r")
        decoder = None
        if store.path is not None:
            decoder = decoder_of(array.metadata.to_dict())
        return cls(
            store,
            path,
            array.shape,
            array.dtype,
            array.metadata.fill_value,
            array.chunks[-2:],
            array.shards[-2:],
            decoder,
            watch,
        )

    def cut(self, years: Sequence[int], y: int, x: int, size: int) -> AnyArray:
        """Read a window at year indices: [year, ..., size, size], fill value outside the site."""
        height, width = self.shape[-2:]
        rows = slice(y, min(y + size, height))
        columns = slice(x, min(x + size, width))
        window = np.empty((len(years), *self.shape[1:-2], size, size), self.dtype)
        window[..., rows.stop - y :, :] = self.fill
        window[..., columns.stop - x :] = self.fill
        inside = window[..., : rows.stop - y, : columns.stop - x]
        self._read(inside, _Area(years, rows, columns), keep=True)
        return window

    def __getitem__(self, key: tuple[int | slice | npt.NDArray[np.intp], ...]) -> AnyArray:
        """Read any part. Each axis takes an index, a slice or a list of indices.

        Rows and columns given by index or with a step are slow. The pages read are released:
        otherwise reading a whole site would gradually keep all its files in this process's memory.
        """
        year_key, *lead, row_key, column_key = key
        years = np.arange(self.shape[0])[year_key]
        rows = _as_range(row_key, self.shape[-2])
        columns = _as_range(column_key, self.shape[-1])
        if rows is None or columns is None:
            part: AnyArray = self._open_zarr().oindex[key]
            self._check(years.ravel().tolist())
            return part
        height = max(rows.stop - rows.start, 0)
        width = max(columns.stop - columns.start, 0)
        part = np.empty((years.size, *self.shape[1:-2], height, width), self.dtype)
        self._read(part, _Area(years.ravel().tolist(), rows, columns), keep=False)
        for band_key, length in zip(lead, self.shape[1:-2], strict=True):  # the bands, if any
            bands = np.arange(length)
            if not np.array_equal(bands[band_key], bands):
                part = part[:, band_key]
        return part if years.ndim else part[0]

    def _read(self, out: AnyArray, area: _Area, *, keep: bool) -> None:
        """Read an area into an array. `keep` keeps the files' pages in memory."""
        if self.decoder is None:
            self._read_with_zarr(out, area)
        else:
            shards: dict[tuple[int, int, int], Shard | None] = {}
            self._unpack(self.decoder, list(self._plan(out, area, shards)))
            if not keep:
                for shard in shards.values():
                    if shard is not None:
                        shard.release()
        self._check(area.years)

    def _read_with_zarr(self, out: AnyArray, area: _Area) -> None:
        array = self._open_zarr()
        bands = [slice(None)] * (len(self.shape) - 3)
        for index, year in enumerate(area.years):  # for a list, Zarr looks up each pixel
            out[index] = array[(year, *bands, area.rows, area.columns)]

    def _open_zarr(self) -> zarr.Array:
        """Open the array with Zarr. A missing shard of a commit is an error."""
        return _open_array(self.store, self.path, self.watch, os.getpid())

    def _check(self, years: Sequence[int]) -> None:
        """Raise CubeError if one of these years has changed since the array was opened."""
        if self.watch is not None:
            self.watch.check(years)

    def _plan(
        self, out: AnyArray, area: _Area, shards: dict[tuple[int, int, int], Shard | None]
    ) -> Iterator[_Read]:
        """Request the chunks of an area, and yield them. Areas without a chunk get fill value.

        `shards` collects the shards by year, row and column.
        """
        cuts = [
            (down, across)
            for down in _cuts(area.rows, self.chunk[0], self.shard[0])
            for across in _cuts(area.columns, self.chunk[1], self.shard[1])
        ]
        for index, year in enumerate(area.years):
            for down, across in cuts:
                place = (year, down.shard, across.shard)
                if place not in shards:
                    shards[place] = self._find_shard(place)
                shard = shards[place]
                target = out[index][..., down.target, across.target]
                extent = self._locate(shard, down.chunk, across.chunk)
                # Chunks and shards of fill value only are not stored.
                if shard is None or extent is None:
                    target[...] = self.fill
                else:
                    shard.prefetch(*extent)
                    yield _Read(shard, *extent, (..., down.source, across.source), target)

    def _locate(self, shard: Shard | None, row: int, column: int) -> tuple[int, int] | None:
        """Return offset and length of a chunk; None if it is fill value only."""
        if shard is None:
            return None
        try:
            return shard.locate(row, column)
        except ValueError as error:
            raise CubeError(
                f"{self.store}: {self.path} ends before its chunks do; run `minecube verify`"
            ) from error

    def _unpack(self, decoder: Decoder, reads: Sequence[_Read]) -> None:
        chunk = np.empty((*self.shape[1:-2], *self.chunk), self.dtype)
        for read in reads:
            try:
                decoder.decode(read.shard, read.offset, read.length, chunk)
            except (RuntimeError, ValueError) as error:
                raise CubeError(
                    f"{self.store}: {self.path} has a damaged chunk ({error}); run "
                    "`minecube verify`"
                ) from error
            read.target[...] = chunk[read.source]

    def _find_shard(self, place: tuple[int, int, int]) -> Shard | None:
        """Map a shard (year, row, column) into memory; None if it holds fill value only."""
        year, row, column = place
        lead = ["0"] * (len(self.shape) - 3)
        key = "/".join([self.path, "c", str(year), *lead, str(row), str(column)])
        shard = self._map(key)
        if shard is None and self.watch is not None:
            self.watch.need_absent(key)
        return shard

    def _map(self, key: str) -> Shard | None:
        """Map a shard's file, or its part of a packed store, into memory; None if absent."""
        is_packed = self.store.packed
        path = str(self.store.path) if is_packed else f"{self.store.path}/{key}"
        try:
            stamp = packed.stamp_of(os.stat(path))  # noqa: PTH116  a Path is slower
        except FileNotFoundError as error:
            if not is_packed:
                return None
            raise CubeError(f"{path}: is gone; put it back, or open another store") from error
        chunks = (self.shard[0] // self.chunk[0], self.shard[1] // self.chunk[1])
        if is_packed:
            return find_shard(path, stamp, key, chunks)
        return map_shard(path, stamp, chunks)


class LazyPixels(BackendArray):
    """Pixels for xarray's lazy indexing."""

    def __init__(self, pixels: Pixels) -> None:
        self._pixels = pixels
        self.shape = pixels.shape
        self.dtype = pixels.dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> AnyArray:
        part: AnyArray = indexing.explicit_indexing_adapter(
            key, self.shape, indexing.IndexingSupport.OUTER, self._pixels.__getitem__
        )
        return part


class _WholeStore(WrapperStore):  # type: ignore[misc]
    """A store without silent gaps: a missing shard of a commit is an error, not fill value."""

    def __init__(self, store: Any, watch: Watch) -> None:
        super().__init__(store)
        self.watch = watch

    def _with_store(self, store: Any) -> _WholeStore:
        return _WholeStore(store, self.watch)

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        """Get an object or a part of it; None if it is absent and was not committed."""
        content = await super().get(key, prototype, byte_range)
        if content is None:
            self.watch.need_absent(key)
        return content


@lru_cache(maxsize=256)
def _open_array(store: Store, path: str, watch: Watch | None, _process: int) -> zarr.Array:
    """Open an array with Zarr, once per process: in an object store each opening is a request."""
    source = store.open_zarr()
    if watch is not None:
        source = _WholeStore(source, watch)
    return zarr.open_array(source, path=path, mode="r", zarr_format=3)


def _as_range(key: int | slice | npt.NDArray[np.intp], length: int) -> slice | None:
    """Return a slice with start and stop within an axis; None for other keys, or with a step."""
    if not isinstance(key, slice):
        return None
    start, stop, step = key.indices(length)
    return slice(start, stop) if step == 1 else None


def _cuts(part: slice, chunk: int, shard: int) -> list[_Cut]:
    """List the chunks on one axis of a part. `chunk` and `shard` are sides in pixels."""
    cuts = []
    for number in range(part.start // chunk, -(-part.stop // chunk)):
        begin = number * chunk
        start = max(part.start, begin)
        stop = min(part.stop, begin + chunk)
        cuts.append(
            _Cut(
                *divmod(number, shard // chunk),
                target=slice(start - part.start, stop - part.start),
                source=slice(start - begin, stop - begin),
            )
        )
    return cuts
