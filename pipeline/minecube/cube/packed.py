"""A packed store: the whole Zarr store in one zip, read where it lies. `minecube pack` makes it, nobody writes into it.

Its members are the store's objects under their own keys, stored as they are, so that any part of one is a part of the file:
zarr-python's own ZipStore opens it, too, but reads a shard from its beginning to seek in it (Python before 3.13).
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
from typing import Any, BinaryIO

from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.storage import ZipStore

from minecube.errors import CubeError

SUFFIX = ".zip"
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # APPNOTE.TXT 4.3.7; name and extra field follow, then the bytes
_BROKEN = (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError, struct.error)

Stamp = tuple[int, int, int]
"""What tells a file from another of its name: inode, time, size."""


@dataclass(frozen=True)
class Member:
    """Where an object lies, as the zip's directory has it."""

    header: int
    size: int
    crc: int


def is_packed(store: str) -> bool:
    """Whether that names a packed store, be it there or not; raises CubeError for one that is far away."""
    if not store.rstrip("/").endswith(SUFFIX) or Path(store).is_dir():
        return False
    if "://" in store:
        raise CubeError(f"{store}: a packed store is read from a local disk; download it, or unzip it there")
    return True


def need_writable(store: str) -> None:
    """Raises CubeError for a packed store."""
    if is_packed(store):
        raise CubeError(
            f"{store}: is a packed store, which is only read; write to the store it was packed from, or unpack it "
            f"(`unzip -d {unpacked(store)} {store}`)"
        )


def unpacked(store: str) -> str:
    """The folder that a packed store is said to be unpacked into, where that is needed: not the one it was packed from."""
    return f"{store.rstrip('/').removesuffix(SUFFIX)}-unpacked"


def stamp_of(stat: os.stat_result) -> Stamp:
    """A file's stamp."""
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


@lru_cache(maxsize=8)
def directory(path: str, _stamp: Stamp) -> Mapping[str, Member]:
    """Key -> member of a zip, as the file of that stamp has it.

    Raises:
        CubeError: it is no zip, or damaged, or packed by others in a way that has to be unpacked.
    """
    try:
        with zipfile.ZipFile(path) as opened:
            listed = [m for m in opened.infolist() if not m.is_dir()]
    except _BROKEN as error:
        raise CubeError(
            f"{path}: is no zip, or a damaged one ({error}), so nothing in it can be found; copy or download it again"
        ) from error
    strange = [m.filename for m in listed if m.compress_type != zipfile.ZIP_STORED or m.flag_bits & 1]
    if strange:
        raise CubeError(
            f"{path}: {strange[0]} is compressed or encrypted, so no part of it can be read by itself; unzip it, and "
            "`minecube pack` the folder"
        )
    return {m.filename: Member(m.header_offset, m.file_size, m.CRC) for m in listed}


def members(store: str) -> Mapping[str, Member]:
    """Key -> member of a packed store as it is now; raises CubeError as `directory` does, or where there is none."""
    try:
        return directory(store.rstrip("/"), stamp_of(Path(store.rstrip("/")).stat()))
    except OSError as error:
        raise CubeError(f"{store}: there is no such packed store ({error.strerror}); `minecube pack` makes one") from error


def start_of(header: bytes, key: str, member: Member) -> int:
    """Where a member's bytes begin, by its header in place; raises OSError where that is not of this member."""
    if len(header) < _LOCAL_HEADER.size:
        raise OSError("the zip ends before it")
    magic, _, _, method, *_, name, extra = _LOCAL_HEADER.unpack(header[: _LOCAL_HEADER.size])
    there = header[_LOCAL_HEADER.size : _LOCAL_HEADER.size + name]
    if (magic, method, there) != (b"PK\x03\x04", zipfile.ZIP_STORED, key.encode()):
        raise OSError("the zip's directory points beside it")
    return member.header + _LOCAL_HEADER.size + int(name) + int(extra)


def header_of(content: Any, key: str, member: Member) -> bytes:
    """The bytes of a mapped zip that `start_of` wants."""
    return bytes(content[member.header : member.header + _LOCAL_HEADER.size + len(key.encode())])


def read(store: str, key: str, first: int = 0, end: int | None = None) -> bytes:
    """Bytes `first` to `end` of an object, an end below 0 counted from its own end; all of it is held to the zip's CRC-32.

    Raises:
        KeyError: no such object.
        OSError: it cannot be read, or is damaged.
    """
    member = members(store)[key]
    first, last, _ = slice(first, end).indices(member.size)
    with Path(store.rstrip("/")).open("rb") as file:
        start = _start(file, key, member)
        file.seek(start + first)
        content = file.read(max(last - first, 0))
    if len(content) < last - first:
        raise OSError("the zip ends before it does")
    if len(content) == member.size and zlib.crc32(content) != member.crc:
        raise OSError("its CRC-32 is not that of the zip's directory")
    return content


def _start(file: BinaryIO, key: str, member: Member) -> int:
    file.seek(member.header)
    return start_of(file.read(_LOCAL_HEADER.size + len(key.encode())), key, member)


class PackedStore(ZipStore):  # type: ignore[misc]
    """Zarr's ZipStore, which lists; objects and parts of them are read where they lie, by as many threads as ask."""

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        """An object or a part of it; None where there is none; raises CubeError where it is damaged."""
        match byte_range:
            case None:
                part = (0, None)
            case RangeByteRequest():
                part = (byte_range.start, byte_range.end)
            case OffsetByteRequest():
                part = (byte_range.offset, None)
            case SuffixByteRequest():
                part = (-byte_range.suffix, None)
            case _:
                raise TypeError(f"expected a range of bytes, found {byte_range}")
        try:
            return prototype.buffer.from_bytes(await asyncio.to_thread(read, str(self.path), key, *part))
        except KeyError:
            return None
        except OSError as error:
            raise CubeError(f"{self.path}: {key} is damaged ({error}); `minecube verify` says what else is") from error

    async def get_partial_values(self, prototype: Any, key_ranges: Any) -> list[Any]:
        """Several of them."""
        return [await self.get(key, prototype, part) for key, part in key_ranges]


@lru_cache(maxsize=8)
def _opened(path: str, _stamp: Stamp, _process: int) -> PackedStore:
    return PackedStore(path, mode="r")


def zarr_store(store: str) -> PackedStore:
    """What Zarr opens; one a process, since reading a large directory takes seconds."""
    members(store)  # which says in a sentence what is wrong with it
    path = store.rstrip("/")
    return _opened(path, stamp_of(Path(path).stat()), os.getpid())


@dataclass(frozen=True)
class Objects:
    """What `verify` and `pack` use of an obstore store."""

    store: str

    def list(self) -> Iterator[list[dict[str, Any]]]:
        """Batches of path and size."""
        yield [{"path": key, "size": member.size} for key, member in members(self.store).items()]

    def list_with_delimiter(self) -> Mapping[str, Any]:
        """The first parts of all paths, as obstore gives them."""
        return {"common_prefixes": sorted({key.split("/")[0] for key in members(self.store) if "/" in key})}

    def get(self, path: str) -> _Object:
        """An object; raises FileNotFoundError where there is none, OSError where it is damaged."""
        try:
            return _Object(read(self.store, path))
        except KeyError as error:
            raise FileNotFoundError(path) from error


@dataclass(frozen=True)
class _Object:
    content: bytes

    def bytes(self) -> bytes:
        """All of it."""
        return self.content
