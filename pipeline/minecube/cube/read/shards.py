"""Map shards on a local disk into memory, and locate their chunks.

Zarr replaces whole files. The mapped bytes therefore never change, and a rebuilt shard has another
stamp. A packed store is mapped as a whole, once per process; its directory locates the shards.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numcodecs
import numpy as np
from google_crc32c import value as crc32c

from minecube.cube import packed
from minecube.errors import CubeError

_ABSENT = 2**64 - 1  # offset of a chunk of fill value only (Zarr v3, sharding-indexed codec)
_INDEX_ENTRY = 16  # bytes: offset and length of a chunk
_CRC_BYTES = 4
_BLOSC_SIZE = slice(4, 8)  # size of the unpacked content in Blosc's header


@dataclass(frozen=True)
class Shard:
    """A shard in a mapped file."""

    file: mmap.mmap
    start: int
    """Offset of the shard in the file."""
    size: int
    index: Any
    """[row][column] -> offset of each chunk from the shard's start, and its bytes."""
    checked: set[int] = field(default_factory=set)
    """Offsets in the file of chunks with a correct checksum."""

    def locate(self, row: int, column: int) -> tuple[int, int] | None:
        """Return a chunk's offset in the file and its length; None for fill value only.

        Raises:
            ValueError: the index points beyond the shard.
        """
        offset, length = self.index[row][column]
        if offset == _ABSENT:
            return None
        if offset + length > self.size:
            raise ValueError("the index points beyond the shard")
        return self.start + offset, length

    def prefetch(self, offset: int, length: int) -> None:
        """Request a chunk from the disk without waiting."""
        page = offset % mmap.PAGESIZE
        self.file.madvise(mmap.MADV_WILLNEED, offset - page, length + page)

    def release(self) -> None:
        """Give back the shard's memory. The system also reads the surroundings of chunks."""
        page = self.start % mmap.PAGESIZE
        self.file.madvise(mmap.MADV_DONTNEED, self.start - page, self.size + page)


@dataclass(frozen=True)
class Decoder:
    """Unpacks chunks of a known codec."""

    codec: Any
    has_crc: bool
    """Whether each chunk ends in a CRC-32C."""

    def decode(self, shard: Shard, offset: int, length: int, out: Any) -> None:
        """Unpack a chunk into `out`.

        Raises:
            RuntimeError: the codec cannot unpack the chunk.
            ValueError: the same, or the CRC-32C is wrong, or the chunk has another size.
        """
        content = memoryview(shard.file)[offset : offset + length]
        if self.has_crc:
            self._check(shard, offset, content)
            content = content[:-_CRC_BYTES]
        if isinstance(self.codec, numcodecs.Blosc):
            # A smaller chunk, of another variable, would fill only a part of `out`.
            size = int.from_bytes(content[_BLOSC_SIZE], "little")
            if size != out.nbytes:
                raise ValueError(f"it has {size} bytes in place of {out.nbytes}")
        self.codec.decode(content, out=out)

    @staticmethod
    def _check(shard: Shard, offset: int, content: memoryview) -> None:
        """Raise ValueError if a chunk's CRC-32C is wrong.

        The check runs only at the first read of a chunk, because windows read each chunk several
        times. It takes a tenth of the time of unpacking.
        """
        if offset in shard.checked:
            return
        if crc32c(bytes(content[:-_CRC_BYTES])) != int.from_bytes(content[-_CRC_BYTES:], "little"):
            raise ValueError("its CRC-32C is wrong")
        shard.checked.add(offset)


def decoder_of(metadata: Any) -> Decoder | None:
    """Return the decoder of an array's chunks; None if they are packed in an unknown way.

    `metadata` is the content of the array's `zarr.json`.
    """
    (sharding,) = metadata["codecs"]
    if sharding["name"] != "sharding_indexed":
        return None
    configuration = sharding["configuration"]
    index_codecs = [codec["name"] for codec in configuration["index_codecs"]]
    if configuration.get("index_location", "end") != "end" or index_codecs != ["bytes", "crc32c"]:
        return None
    serializer, *packing = [codec["name"] for codec in configuration["codecs"]]
    has_crc = packing[-1:] == ["crc32c"]
    if has_crc:
        packing.pop()
    codecs = {"zstd": numcodecs.Zstd, "blosc": numcodecs.Blosc}
    if serializer != "bytes" or len(packing) != 1 or packing[0] not in codecs:
        return None
    return Decoder(codecs[packing[0]](), has_crc)


@lru_cache(maxsize=512)  # each entry is an open file; a process usually may have 1024
def map_shard(path: str, _stamp: packed.Stamp, shape: tuple[int, int]) -> Shard:
    """Map a shard's file of this stamp into memory. `shape` is its rows and columns of chunks.

    Raises:
        CubeError: the shard is damaged.
    """
    file = _map(path)
    return _read_index(path, file, 0, len(file), shape)


@lru_cache(maxsize=4096)
def find_shard(path: str, stamp: packed.Stamp, key: str, shape: tuple[int, int]) -> Shard | None:
    """Locate a shard in the memory map of a packed store; None if it is absent.

    Raises:
        CubeError: the shard is damaged.
    """
    member = packed.directory(path, stamp).get(key)
    if member is None:
        return None
    file = _map_packed(path, stamp)
    try:
        start = packed.start_of(packed.header_of(file, key, member), key, member)
    except OSError as error:
        raise CubeError(f"{path}: {key} is damaged ({error}); run `minecube verify`") from error
    if start + member.size > len(file):
        raise CubeError(f"{path}: ends before {key} does; copy or download it again")
    return _read_index(f"{path}: {key}", file, start, member.size, shape)


@lru_cache(maxsize=8)
def _map_packed(path: str, _stamp: packed.Stamp) -> mmap.mmap:
    """Map a packed store, without read-ahead. Read-ahead would read half as much again."""
    file = _map(path)
    file.madvise(mmap.MADV_RANDOM)
    return file


def _map(path: str) -> mmap.mmap:
    with open(path, "rb") as file:  # noqa: PTH123
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _read_index(name: str, file: mmap.mmap, start: int, size: int, shape: tuple[int, int]) -> Shard:
    """Make a shard with its index, stored before its CRC-32C of four bytes at the end."""
    length = _INDEX_ENTRY * shape[0] * shape[1]
    if size < length + _CRC_BYTES:
        raise CubeError(
            f"{name}: is too short for a shard, so it is damaged; run `minecube verify`"
        )
    end = start + size - _CRC_BYTES
    content = file[end - length : end]
    # A wrong index may point to another chunk, or to none: this would read as fill value.
    if crc32c(content) != int.from_bytes(file[end : end + _CRC_BYTES], "little"):
        raise CubeError(
            f"{name}: the CRC-32C of its index is wrong, so it is damaged; run `minecube verify`"
        )
    index = np.frombuffer(content, "<u8")
    return Shard(file, start, size, index.reshape(*shape, 2).tolist())
