"""Read parts of an array of a cube, faster than Zarr does.

Zarr takes 0.6 ms for each chunk, of which a quarter is unpacking, so shards on a local disk are mapped into memory here, and
the chunks that a part touches are asked for before the first is waited for. A packed store is mapped as a whole, once a
process; its directory says where each shard lies. Shards compressed in a way not known here, and those of object stores, are
read by Zarr.
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
from minecube.cube.store import absolute, zarr_store
from minecube.errors import CubeError

_ABSENT = 2**64 - 1  # offset of a chunk that holds nothing but fill value (Zarr v3, sharding-indexed codec)


@dataclass(frozen=True)
class Pixels:
    """An array [year, ..., y, x] of a store, from which windows are cut."""

    store: str
    path: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fill: Any
    chunk: tuple[int, int]
    shard: tuple[int, int]
    codec: Any
    """What unpacks a chunk; None where Zarr has to read it."""
    summed: bool
    """Whether a CRC-32C follows each chunk."""
    packed: bool
    """Whether the store is."""
    watch: Watch | None = None
    """What a read must not see two states of."""

    @classmethod
    def of(cls, store: str, path: str, watch: Watch | None = None) -> Pixels:
        """Open the array at that path."""
        store = absolute(store)
        array = zarr.open_array(zarr_store(store), path=path, mode="r")
        chunk, shard = array.chunks[-2:], array.shards[-2:]
        codec, summed = (None, False) if "://" in store else _codec(array.metadata.to_dict())
        fill, in_zip = array.metadata.fill_value, packed.is_packed(store)
        return cls(store, path, array.shape, array.dtype, fill, chunk, shard, codec, summed, in_zip, watch)

    def cut(self, years: Sequence[int], y: int, x: int, size: int) -> npt.NDArray[Any]:
        """A window of the years at these places: [year, ..., size, size], fill value beyond the site."""
        rows, columns = (slice(at, min(at + size, n)) for at, n in zip((y, x), self.shape[-2:], strict=True))
        out = np.empty((len(years), *self.shape[1:-2], size, size), self.dtype)
        out[..., rows.stop - y :, :] = out[..., columns.stop - x :] = self.fill
        self._fill(out[..., : rows.stop - y, : columns.stop - x], years, rows, columns, keep=True)
        return out

    def __getitem__(self, key: tuple[int | slice | npt.NDArray[np.intp], ...]) -> npt.NDArray[Any]:
        """Any part, each axis by itself: one index, a slice, or indices; rows and columns by index or in steps take long.

        Whoever reads a whole site would have all its files in this process's memory by and by: these are let go.
        """
        first, *lead, down, across = key
        inside = [slice(*p.indices(n)) for p, n in zip((down, across), self.shape[-2:], strict=True) if isinstance(p, slice)]
        if [part.step for part in inside] != [1, 1]:
            found = self._array().oindex[key]
            self._check(np.arange(self.shape[0])[first].ravel().tolist())
            return found  # type: ignore[no-any-return]
        years, (rows, columns) = np.arange(self.shape[0])[first], inside
        shape = [max(part.stop - part.start, 0) for part in inside]
        out = np.empty((years.size, *self.shape[1:-2], *shape), self.dtype)
        self._fill(out, years.ravel().tolist(), rows, columns, keep=False)
        for part, n in zip(lead, self.shape[1:-2], strict=True):  # the bands, if there are any
            if not np.array_equal(np.arange(n)[part], np.arange(n)):
                out = out[:, part]
        return out if years.ndim else out[0]

    def _fill(self, out: npt.NDArray[Any], years: Sequence[int], rows: slice, columns: slice, *, keep: bool) -> None:
        if self.codec is None:
            array = self._array()
            for n, year in enumerate(years):  # by slices: Zarr would look up pixel by pixel what is asked for by indices
                out[n] = array[(year, *(slice(None) for _ in self.shape[1:-2]), rows, columns)]
        else:
            self._unpack(out, years, rows, columns, keep=keep)
        self._check(years)

    def _array(self) -> zarr.Array:
        """The array as Zarr opens it, of a store in which no shard of a commit may be missing."""
        return _opened(self.store, self.path, self.watch, os.getpid())

    def _check(self, years: Sequence[int]) -> None:
        """Raise CubeError if one of these years has changed since it was opened."""
        if self.watch is not None:
            self.watch.check(years)

    def _unpack(self, out: npt.NDArray[Any], years: Sequence[int], rows: slice, columns: slice, *, keep: bool) -> None:
        parts: list[tuple[npt.NDArray[Any], tuple[Any, ...], _Shard, int, int]] = []
        shards: dict[tuple[int, int, int], _Shard | None] = {}
        for n, year in enumerate(years):
            for (down, row), here, there in _cuts(rows, self.chunk[0], self.shard[0]):
                for (across, column), left, right in _cuts(columns, self.chunk[1], self.shard[1]):
                    key = (year, down, across)
                    if key not in shards:
                        shards[key] = self._shard(*key)
                    shard = shards[key]
                    # A chunk of nothing but fill value is not stored, nor is such a shard.
                    if shard is None or shard.index[row][column][0] == _ABSENT:
                        out[n][..., here, left] = self.fill
                        continue
                    file, (offset, length) = shard.file, shard.index[row][column]
                    if offset + length > shard.size:
                        raise CubeError(f"{self.store}: {self.path} ends before its chunks do; run `minecube verify`")
                    offset += shard.start
                    page = offset % mmap.PAGESIZE
                    file.madvise(mmap.MADV_WILLNEED, offset - page, length + page)
                    parts.append((out[n][..., here, left], (..., there, right), shard, offset, length))
        chunk = np.empty((*self.shape[1:-2], *self.chunk), self.dtype)
        for target, inside, shard, offset, length in parts:
            try:
                content = memoryview(shard.file)[offset : offset + length]
                self.codec.decode(self._checked(content, shard, offset), out=chunk)
            except (RuntimeError, ValueError) as error:
                raise CubeError(f"{self.store}: {self.path} has a damaged chunk ({error}); run `minecube verify`") from error
            target[...] = chunk[inside]
        for read in shards.values() if not keep else ():
            if read is not None:  # as a whole: what is read brings what lies around it
                page = read.start % mmap.PAGESIZE
                read.file.madvise(mmap.MADV_DONTNEED, read.start - page, read.size + page)

    def _checked(self, content: memoryview, shard: _Shard, offset: int) -> memoryview:
        """A chunk without its CRC-32C, which is checked when the chunk is first read; raises ValueError if it is wrong.

        The checksum takes a tenth of the time of unpacking, and windows read each chunk several times.
        """
        if not self.summed:
            return content
        if offset not in shard.checked:
            if crc32c(bytes(content[:-4])) != int.from_bytes(content[-4:], "little"):
                raise ValueError("its CRC-32C is wrong")
            shard.checked.add(offset)
        return content[:-4]

    def _shard(self, year: int, down: int, across: int) -> _Shard | None:
        """A shard in memory; None where it is nothing but fill value."""
        key = "/".join((self.path, "c", str(year), *("0" for _ in self.shape[1:-2]), str(down), str(across)))
        shape = tuple(s // c for s, c in zip(self.shard, self.chunk, strict=True))
        path = self.store.rstrip("/") if self.packed else f"{self.store}/{key}"
        try:
            stamp = packed.stamp_of(os.stat(path))  # noqa: PTH116  a Path for each takes longer than the rest
        except FileNotFoundError as error:
            if self.packed:
                raise CubeError(f"{path}: is gone; put it back, or open another store") from error
            shard = None
        else:
            shard = _member(path, stamp, key, shape) if self.packed else _mapped(path, stamp, shape)
        if shard is None and self.watch is not None:
            self.watch.need_absent(key)
        return shard


@lru_cache(maxsize=256)
def _opened(store: str, path: str, watch: Watch | None, _process: int) -> zarr.Array:
    """An array as Zarr opens it, once per process: in an object store each opening is a request."""
    there = zarr_store(store) if watch is None else _WholeStore(zarr_store(store), watch)
    return zarr.open_array(there, path=path, mode="r", zarr_format=3)


class _WholeStore(WrapperStore):  # type: ignore[misc]
    """A store in which a shard of a commit that is missing is an error, not fill value."""

    def __init__(self, store: Any, watch: Watch) -> None:
        super().__init__(store)
        self.watch = watch

    def _with_store(self, store: Any) -> _WholeStore:
        return _WholeStore(store, self.watch)

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        """An object, or a part of it; None if it is not there and need not be."""
        content = await super().get(key, prototype, byte_range)
        if content is None:
            self.watch.need_absent(key)
        return content


class LazyPixels(BackendArray):
    """Pixels in the form that xarray indexes lazily."""

    def __init__(self, pixels: Pixels) -> None:
        self._pixels, self.shape, self.dtype = pixels, pixels.shape, pixels.dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> npt.NDArray[Any]:
        outer = indexing.IndexingSupport.OUTER
        return indexing.explicit_indexing_adapter(key, self.shape, outer, self._pixels.__getitem__)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Shard:
    file: mmap.mmap
    start: int
    """Where in the file it begins."""
    size: int
    index: Any
    """[row][column]: offset from its start, and bytes, of each chunk."""
    checked: set[int] = field(default_factory=set)
    """Where in the file the chunks begin whose checksum is right."""


@lru_cache(maxsize=512)  # each holds one of the files that a process may have open, of which 1024 are usual
def _mapped(path: str, _stamp: packed.Stamp, shape: tuple[int, int]) -> _Shard:
    """A shard's file in memory, as the file of that stamp has it.

    Zarr replaces files as a whole, so what is mapped stays what it was, and a shard that is built anew is another one.
    """
    file = _map(path)
    return _indexed(path, file, 0, len(file), shape)


@lru_cache(maxsize=4096)
def _member(path: str, stamp: packed.Stamp, key: str, shape: tuple[int, int]) -> _Shard | None:
    """A shard of a packed store, whose file is mapped as a whole."""
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
    """A packed store in memory, read nowhere but where it is asked to: with what lies around it, half as much again is read."""
    file = _map(path)
    file.madvise(mmap.MADV_RANDOM)
    return file


def _map(path: str) -> mmap.mmap:
    with open(path, "rb") as file:  # noqa: PTH123
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _indexed(where: str, file: mmap.mmap, start: int, size: int, shape: tuple[int, int]) -> _Shard:
    """With its index: the last bytes, before a checksum of theirs."""
    count = shape[0] * shape[1]
    if size < 16 * count + 4:
        raise CubeError(f"{where}: is too short for a shard, so it is damaged; run `minecube verify`")
    index = np.frombuffer(file[start + size - 16 * count - 4 : start + size - 4], "<u8")
    return _Shard(file, start, size, index.reshape(*shape, 2).tolist())


def _cuts(part: slice, chunk: int, shard: int) -> list[tuple[tuple[int, int], slice, slice]]:
    """The chunks that a part of one axis touches: shard and place in it, where in the part, where in the chunk."""
    cuts = []
    for n in range(part.start // chunk, -(-part.stop // chunk)):
        first, last = max(part.start, n * chunk), min(part.stop, (n + 1) * chunk)
        here, there = slice(first - part.start, last - part.start), slice(first - n * chunk, last - n * chunk)
        cuts.append((divmod(n, shard // chunk), here, there))
    return cuts


def _codec(metadata: Any) -> tuple[Any, bool]:
    """What unpacks a chunk of an array whose shards are packed as the template packs them, and whether a CRC-32C follows.

    None for arrays that are packed otherwise.
    """
    (sharding,) = metadata["codecs"]
    if sharding["name"] != "sharding_indexed" or sharding["configuration"].get("index_location", "end") != "end":
        return None, False
    inner = [codec["name"] for codec in sharding["configuration"]["codecs"]]
    index = [codec["name"] for codec in sharding["configuration"]["index_codecs"]]
    summed = inner[-1:] == ["crc32c"]
    packing = inner[1:-1] if summed else inner[1:]
    if index != ["bytes", "crc32c"] or inner[:1] != ["bytes"] or len(packing) != 1:
        return None, False
    return {"zstd": numcodecs.Zstd(), "blosc": numcodecs.Blosc()}.get(packing[0]), summed
