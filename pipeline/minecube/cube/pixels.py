"""Read parts of an array of a cube, faster than Zarr.

Zarr takes 0.6 ms per chunk, a quarter of it for unpacking. This module maps shards on a local disk
into memory. It requests all chunks of a part before it waits for the first. A packed store is
mapped as a whole, once per process, and its directory locates the shards. Zarr reads the shards of
object stores and shards of other compression.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numcodecs
import numpy as np
import numpy.typing as npt
import zarr
from google_crc32c import value as crc32c
from xarray.backends import BackendArray
from xarray.core import indexing
from zarr.storage import WrapperStore

from minecube.cube import packed
from minecube.cube.commits import Watch
from minecube.cube.store import Store
from minecube.errors import CubeError

_ABSENT = 2**64 - 1  # offset of a chunk of fill value only (Zarr v3, sharding-indexed codec)


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
    codec: Any
    """Decoder of a chunk; None if Zarr has to read it."""
    summed: bool
    """Whether each chunk ends in a CRC-32C."""
    watch: Watch | None = None
    """Check for writes during a read."""

    @classmethod
    def of(cls, store: Store, path: str, watch: Watch | None = None) -> Pixels:
        """Open the array at this path."""
        store = store.absolute()
        array = zarr.open_array(store.open_zarr(), path=path, mode="r")
        chunk, shard = array.chunks[-2:], array.shards[-2:]
        codec, summed = (None, False) if store.path is None else _codec(array.metadata.to_dict())
        fill = array.metadata.fill_value
        return cls(store, path, array.shape, array.dtype, fill, chunk, shard, codec, summed, watch)

    def cut(self, years: Sequence[int], y: int, x: int, size: int) -> npt.NDArray[Any]:
        """Read a window at year indices: [year, ..., size, size], fill value outside the site."""
        rows, columns = (
            slice(at, min(at + size, n)) for at, n in zip((y, x), self.shape[-2:], strict=True)
        )
        out = np.empty((len(years), *self.shape[1:-2], size, size), self.dtype)
        out[..., rows.stop - y :, :] = out[..., columns.stop - x :] = self.fill
        self._fill(out[..., : rows.stop - y, : columns.stop - x], years, rows, columns, keep=True)
        return out

    def __getitem__(self, key: tuple[int | slice | npt.NDArray[np.intp], ...]) -> npt.NDArray[Any]:
        """Read any part. Each axis takes an index, a slice or a list of indices.

        Rows and columns given by index or with a step are slow. The pages read are released:
        otherwise reading a whole site would gradually keep all its files in this process's memory.
        """
        first, *lead, down, across = key
        inside = [
            slice(*p.indices(n))
            for p, n in zip((down, across), self.shape[-2:], strict=True)
            if isinstance(p, slice)
        ]
        if [part.step for part in inside] != [1, 1]:
            found = self._array().oindex[key]
            self._check(np.arange(self.shape[0])[first].ravel().tolist())
            return found  # type: ignore[no-any-return]
        years, (rows, columns) = np.arange(self.shape[0])[first], inside
        shape = [max(part.stop - part.start, 0) for part in inside]
        out = np.empty((years.size, *self.shape[1:-2], *shape), self.dtype)
        self._fill(out, years.ravel().tolist(), rows, columns, keep=False)
        for part, n in zip(lead, self.shape[1:-2], strict=True):  # the bands, if any
            if not np.array_equal(np.arange(n)[part], np.arange(n)):
                out = out[:, part]
        return out if years.ndim else out[0]

    def _fill(
        self,
        out: npt.NDArray[Any],
        years: Sequence[int],
        rows: slice,
        columns: slice,
        *,
        keep: bool,
    ) -> None:
        if self.codec is None:
            array = self._array()
            for n, year in enumerate(years):  # by slice: for indices, Zarr looks up each pixel
                out[n] = array[(year, *(slice(None) for _ in self.shape[1:-2]), rows, columns)]
        else:
            self._unpack(out, years, rows, columns, keep=keep)
        self._check(years)

    def _array(self) -> zarr.Array:
        """Open the array with Zarr. A missing shard of a commit is an error."""
        return _opened(self.store, self.path, self.watch, os.getpid())

    def _check(self, years: Sequence[int]) -> None:
        """Raise CubeError if one of these years has changed since the array was opened."""
        if self.watch is not None:
            self.watch.check(years)

    def _unpack(
        self,
        out: npt.NDArray[Any],
        years: Sequence[int],
        rows: slice,
        columns: slice,
        *,
        keep: bool,
    ) -> None:
        parts: list[tuple[npt.NDArray[Any], tuple[Any, ...], _Shard, int, int]] = []
        shards: dict[tuple[int, int, int], _Shard | None] = {}
        for n, year in enumerate(years):
            for (down, row), here, there in _cuts(rows, self.chunk[0], self.shard[0]):
                for (across, column), left, right in _cuts(columns, self.chunk[1], self.shard[1]):
                    key = (year, down, across)
                    if key not in shards:
                        shards[key] = self._shard(*key)
                    shard = shards[key]
                    # Chunks and shards of fill value only are not stored.
                    if shard is None or shard.index[row][column][0] == _ABSENT:
                        out[n][..., here, left] = self.fill
                        continue
                    file, (offset, length) = shard.file, shard.index[row][column]
                    if offset + length > shard.size:
                        raise CubeError(
                            f"{self.store}: {self.path} ends before its chunks do; run `minecube verify`"
                        )
                    offset += shard.start
                    page = offset % mmap.PAGESIZE
                    file.madvise(mmap.MADV_WILLNEED, offset - page, length + page)
                    parts.append(
                        (out[n][..., here, left], (..., there, right), shard, offset, length)
                    )
        chunk = np.empty((*self.shape[1:-2], *self.chunk), self.dtype)
        for target, inside, shard, offset, length in parts:
            try:
                content = memoryview(shard.file)[offset : offset + length]
                self.codec.decode(self._checked(content, shard, offset), out=chunk)
            except (RuntimeError, ValueError) as error:
                raise CubeError(
                    f"{self.store}: {self.path} has a damaged chunk ({error}); run `minecube verify`"
                ) from error
            target[...] = chunk[inside]
        for read in shards.values() if not keep else ():
            if read is not None:  # release the whole shard: the system also reads the surroundings
                page = read.start % mmap.PAGESIZE
                read.file.madvise(mmap.MADV_DONTNEED, read.start - page, read.size + page)

    def _checked(self, content: memoryview, shard: _Shard, offset: int) -> memoryview:
        """Return a chunk without its CRC-32C. Raises ValueError if the CRC-32C is wrong.

        The check runs only at the first read of a chunk, because windows read each chunk several
        times. It takes a tenth of the time of unpacking.
        """
        if not self.summed:
            return content
        if offset not in shard.checked:
            if crc32c(bytes(content[:-4])) != int.from_bytes(content[-4:], "little"):
                raise ValueError("its CRC-32C is wrong")
            shard.checked.add(offset)
        return content[:-4]

    def _shard(self, year: int, down: int, across: int) -> _Shard | None:
        """Map a shard into memory; None if it holds fill value only."""
        key = "/".join(
            (self.path, "c", str(year), *("0" for _ in self.shape[1:-2]), str(down), str(across))
        )
        shape = tuple(s // c for s, c in zip(self.shard, self.chunk, strict=True))
        path = str(self.store.path) if self.store.packed else f"{self.store.path}/{key}"
        try:
            stamp = packed.stamp_of(os.stat(path))  # noqa: PTH116  a Path is slower
        except FileNotFoundError as error:
            if self.store.packed:
                raise CubeError(f"{path}: is gone; put it back, or open another store") from error
            shard = None
        else:
            shard = (
                _member(path, stamp, key, shape)
                if self.store.packed
                else _mapped(path, stamp, shape)
            )
        if shard is None and self.watch is not None:
            self.watch.need_absent(key)
        return shard


@lru_cache(maxsize=256)
def _opened(store: Store, path: str, watch: Watch | None, _process: int) -> zarr.Array:
    """Open an array with Zarr, once per process: in an object store each opening is a request."""
    there = store.open_zarr() if watch is None else _WholeStore(store.open_zarr(), watch)
    return zarr.open_array(there, path=path, mode="r", zarr_format=3)


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


class LazyPixels(BackendArray):
    """Pixels for xarray's lazy indexing."""

    def __init__(self, pixels: Pixels) -> None:
        self._pixels, self.shape, self.dtype = pixels, pixels.shape, pixels.dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> npt.NDArray[Any]:
        outer = indexing.IndexingSupport.OUTER
        return indexing.explicit_indexing_adapter(key, self.shape, outer, self._pixels.__getitem__)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Shard:
    file: mmap.mmap
    start: int
    """Offset of the shard in the file."""
    size: int
    index: Any
    """[row][column] -> offset of each chunk from the shard's start, and its bytes."""
    checked: set[int] = field(default_factory=set)
    """Offsets in the file of chunks with a correct checksum."""


@lru_cache(maxsize=512)  # each entry is an open file; a process usually may have 1024
def _mapped(path: str, _stamp: packed.Stamp, shape: tuple[int, int]) -> _Shard:
    """Map a shard's file of this stamp into memory.

    Zarr replaces whole files. The mapped bytes therefore never change, and a rebuilt shard has
    another stamp.
    """
    file = _map(path)
    return _indexed(path, file, 0, len(file), shape)


@lru_cache(maxsize=4096)
def _member(path: str, stamp: packed.Stamp, key: str, shape: tuple[int, int]) -> _Shard | None:
    """Locate a shard in the memory map of a packed store; None if it is absent."""
    member = packed.directory(path, stamp).get(key)
    if member is None:
        return None
    file = _whole(path, stamp)
    try:
        start = packed.start_of(packed.header_of(file, key, member), key, member)
    except OSError as error:
        raise CubeError(f"{path}: {key} is damaged ({error}); run `minecube verify`") from error
    if start + member.size > len(file):
        raise CubeError(f"{path}: ends before {key} does; copy or download it again")
    return _indexed(f"{path}: {key}", file, start, member.size, shape)


@lru_cache(maxsize=8)
def _whole(path: str, _stamp: packed.Stamp) -> mmap.mmap:
    """Map a packed store, without read-ahead. Read-ahead would read half as much again."""
    file = _map(path)
    file.madvise(mmap.MADV_RANDOM)
    return file


def _map(path: str) -> mmap.mmap:
    with open(path, "rb") as file:  # noqa: PTH123
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _indexed(where: str, file: mmap.mmap, start: int, size: int, shape: tuple[int, int]) -> _Shard:
    """Make a shard with its index, stored before the last four bytes (the index checksum)."""
    count = shape[0] * shape[1]
    if size < 16 * count + 4:
        raise CubeError(
            f"{where}: is too short for a shard, so it is damaged; run `minecube verify`"
        )
    index = np.frombuffer(file[start + size - 16 * count - 4 : start + size - 4], "<u8")
    return _Shard(file, start, size, index.reshape(*shape, 2).tolist())


def _cuts(part: slice, chunk: int, shard: int) -> list[tuple[tuple[int, int], slice, slice]]:
    """List the chunks on one axis of a part: (shard, place in it), slice of part and of chunk."""
    cuts = []
    for n in range(part.start // chunk, -(-part.stop // chunk)):
        first, last = max(part.start, n * chunk), min(part.stop, (n + 1) * chunk)
        here, there = (
            slice(first - part.start, last - part.start),
            slice(first - n * chunk, last - n * chunk),
        )
        cuts.append((divmod(n, shard // chunk), here, there))
    return cuts


def _codec(metadata: Any) -> tuple[Any, bool]:
    """Return the decoder of an array's chunks, and whether each chunk ends in a CRC-32C.

    Arrays packed in another way than the template's have no decoder (None).
    """
    (sharding,) = metadata["codecs"]
    if (
        sharding["name"] != "sharding_indexed"
        or sharding["configuration"].get("index_location", "end") != "end"
    ):
        return None, False
    inner = [codec["name"] for codec in sharding["configuration"]["codecs"]]
    index = [codec["name"] for codec in sharding["configuration"]["index_codecs"]]
    summed = inner[-1:] == ["crc32c"]
    packing = inner[1:-1] if summed else inner[1:]
    if index != ["bytes", "crc32c"] or inner[:1] != ["bytes"] or len(packing) != 1:
        return None, False
    return {"zstd": numcodecs.Zstd(), "blosc": numcodecs.Blosc()}.get(packing[0]), summed
