"""Read a packed store: a whole Zarr store in one zip, made by `minecube pack` and read-only.

Its members are the store's objects under their keys. They are not compressed, so a part of an
object is a part of the file. zarr-python's ZipStore also opens it. To seek in a shard, ZipStore
reads the shard from its beginning (Python before 3.13): loading a cube takes twice as much
processor time as with this module, and a window of 160 pixels four times as much. Forked processes
share ZipStore's open file and its position: of 240 reads by four of them at once, 29 failed. Here
each read opens the file.
"""

from __future__ import annotations

import asyncio
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.storage import ZipStore

from minecube.errors import CubeError
from minecube.zips import LOCAL_HEADER, MISPLACED, parse_local_header

SUFFIX = ".zip"
_BROKEN = (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError, struct.error)

Stamp = tuple[int, int, int]
"""Identity of a version of a file: inode, time, size."""


@dataclass(frozen=True)
class Member:
    """Place of an object, from the zip's directory."""

    header: int
    size: int
    crc: int


def stamp_of(stat: os.stat_result) -> Stamp:
    """Return a file's stamp."""
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


@lru_cache(maxsize=8)
def directory(path: str, _stamp: Stamp) -> Mapping[str, Member]:
    """Map the keys of a zip to its members, for the file of this stamp.

    Raises:
        CubeError: the file is no zip, is damaged, or has compressed or encrypted members.
    """
    try:
        with zipfile.ZipFile(path) as opened:
            entries = [entry for entry in opened.infolist() if not entry.is_dir()]
    except _BROKEN as error:
        raise CubeError(
            f"{path}: is no zip, or a damaged one ({error}), so nothing in it can be found; copy "
            "or download it again"
        ) from error
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise CubeError(
                f"{path}: {entry.filename} is compressed or encrypted, so no part of it can be "
                "read by itself; unzip it, and `minecube pack` the folder"
            )
    return {
        entry.filename: Member(entry.header_offset, entry.file_size, entry.CRC) for entry in entries
    }


def members(path: str) -> Mapping[str, Member]:
    """Map the keys of a packed store to its current members.

    Raises:
        CubeError: as `directory`, or the store is missing.
    """
    try:
        return directory(path, stamp_of(Path(path).stat()))
    except OSError as error:
        raise CubeError(
            f"{path}: there is no such packed store ({error.strerror}); `minecube pack` makes one"
        ) from error


def start_of(header: bytes, key: str, member: Member) -> int:
    """Return the offset of a member's bytes, from its local header.

    Raises:
        OSError: the header is not that of the member.
    """
    try:
        parsed = parse_local_header(header)
    except ValueError as error:
        raise OSError(str(error)) from error
    if (parsed.method, parsed.name) != (zipfile.ZIP_STORED, key.encode()):
        raise OSError(MISPLACED)
    return member.header + parsed.size


def header_of(content: Any, key: str, member: Member) -> bytes:
    """Return a member's local header from a mapped zip, for `start_of`."""
    return bytes(content[member.header : member.header + LOCAL_HEADER + len(key.encode())])


def read(path: str, key: str, start: int = 0, stop: int | None = None) -> bytes:
    """Read bytes `start` to `stop` of an object. Negative values count from the object's end.

    A complete object is checked against the zip's CRC-32.

    Raises:
        KeyError: the object is missing.
        OSError: the object cannot be read, or is damaged.
    """
    member = members(path)[key]
    start, stop, _ = slice(start, stop).indices(member.size)
    length = max(stop - start, 0)
    with Path(path).open("rb") as file:
        file.seek(member.header)
        header = file.read(LOCAL_HEADER + len(key.encode()))
        file.seek(start_of(header, key, member) + start)
        content = file.read(length)
    if len(content) < length:
        raise OSError("the zip ends before it does")
    if len(content) == member.size and zlib.crc32(content) != member.crc:
        raise OSError("its CRC-32 is not that of the zip's directory")
    return content


class PackedStore(ZipStore):  # type: ignore[misc]
    """Zarr's ZipStore with direct reads of objects and parts, from any number of threads."""

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        """Read an object or a part of it; None if missing. Raises CubeError if damaged."""
        start, stop = _bounds(byte_range)
        try:
            content = await asyncio.to_thread(read, str(self.path), key, start, stop)
            return prototype.buffer.from_bytes(content)
        except KeyError:
            return None
        except OSError as error:
            raise CubeError(
                f"{self.path}: {key} is damaged ({error}); `minecube verify` says what else is"
            ) from error

    async def get_partial_values(self, prototype: Any, key_ranges: Any) -> list[Any]:
        """Read several objects or parts."""
        return [await self.get(key, prototype, part) for key, part in key_ranges]


def _bounds(byte_range: Any) -> tuple[int, int | None]:
    """Return start and stop of a part of an object, as for `read`."""
    match byte_range:
        case None:
            return 0, None
        case RangeByteRequest():
            return byte_range.start, byte_range.end
        case OffsetByteRequest():
            return byte_range.offset, None
        case SuffixByteRequest():
            return -byte_range.suffix, None
        case _:
            raise TypeError(f"expected a range of bytes, found {byte_range}")


@lru_cache(maxsize=8)
def _open(path: str, _stamp: Stamp, _process: int) -> PackedStore:
    return PackedStore(path, mode="r")


def open_zarr(path: str) -> PackedStore:
    """Return the Zarr store, one per process: reading a large directory takes seconds."""
    members(path)  # raises a clear error
    return _open(path, stamp_of(Path(path).stat()), os.getpid())


@dataclass(frozen=True)
class Objects:
    """The part of an obstore store used by `verify` and `pack`."""

    path: str

    def list(self) -> Iterator[list[dict[str, Any]]]:
        """Yield batches of path and size."""
        yield [{"path": key, "size": member.size} for key, member in members(self.path).items()]

    def list_with_delimiter(self, prefix: str) -> Mapping[str, Any]:
        """Return the folders right below a prefix, in obstore's form."""
        root = f"{prefix}/" if prefix else ""
        folders = set()
        for key in members(self.path):
            name, slash, _ = key.removeprefix(root).partition("/")
            if key.startswith(root) and slash:
                folders.add(f"{root}{name}")
        return {"common_prefixes": sorted(folders)}

    def get(self, key: str) -> _Object:
        """Read an object.

        Raises:
            FileNotFoundError: the object is missing.
            OSError: the object is damaged.
        """
        try:
            return _Object(read(self.path, key))
        except KeyError as error:
            raise FileNotFoundError(key) from error


@dataclass(frozen=True)
class _Object:
    content: bytes

    def bytes(self) -> bytes:
        """Return the whole content."""
        return self.content
