"""Read a zip archive in place, by byte ranges: first its directory, then the wanted members.

zipfile does the reading, including Zip64, all its compressions and checksums. This module only
supplies the bytes. zipfile gets a file with some spans of the archive. A read outside the spans
raises an error with the missing range. The range is then fetched and the read repeated. Many
threads can read in parallel. Adjacent members, such as the labels of a site, share one request.
"""

from __future__ import annotations

import bisect
import errno
import hashlib
import io
import json
import logging
import lzma
import os
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

import rasterio
from rasterio.errors import RasterioError

from minecube import images
from minecube.catalog import Access
from minecube.errors import ReleaseError, UnreadArchiveError
from minecube.network import (
    ForbiddenError,
    RequestError,
    is_local,
    local_path,
    origin_of,
    without_query,
)
from minecube.reader.remote import Head, Opened, Tally, access_to, remote_for

T = TypeVar("T")

log = logging.getLogger(__name__)

_END = 1024  # bytes requested first, from the end: they locate the directory
_FIRST = 1200  # first bytes of an image header; the georeference follows the list of strips
_LEAST = 1024  # minimum of later requests; GDAL reads at most 1024 at a time
_GAP = 4096  # bytes between members; up to this gap one request beats two
# Errors of zipfile (checksum, truncation, encryption, unknown compression) and of decompressors.
_BROKEN = (zipfile.BadZipFile, EOFError, RuntimeError, zlib.error, lzma.LZMAError, OSError)
_LOCAL_HEADER = 30  # bytes before the name (APPNOTE.TXT, 4.3.7)
_AROUND = _LOCAL_HEADER + 2 * 65535 + 24  # maximum overhead: name, extra field, data descriptor
MOST_PX = 5000**2
"""Maximum pixels per band of an image or label: 50 x 50 km."""
MOST_BYTES = 2**29
"""Maximum bytes of an image or label, as a file and as pixels."""
_MOST_PREFIX = 2**27  # bytes unpacked to reach an image's header
_MOST_DIRECTORY = 2**26  # bytes of an archive's directory: half a million members
_PIECE = 65536  # bytes unpacked at a time
_BY_PIECES = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Compressions with piecewise unpacking in Python.

Others unpack all of their input at once, so the input is limited.
"""
_PACKED_PIECE = 64  # bytes; bzip2 expands them to 90 MB at most


class Bytes(Protocol):
    """A file with range reads from any thread; `tally` counts the traffic."""

    size: int
    tally: Tally

    def fetch(self, start: int, length: int) -> bytes:
        """Return exactly these bytes; raise RequestError otherwise."""


class LocalBytes:
    """A file on disk."""

    def __init__(self, path: Path) -> None:
        self._path, self.tally = path, Tally()
        self.size = path.stat().st_size

    def fetch(self, start: int, length: int) -> bytes:
        """Return exactly these bytes; raise RequestError otherwise."""
        try:
            with self._path.open("rb") as file:  # reopened: threads would share one position
                file.seek(start)
                data = file.read(length)
        except OSError as error:  # a disk error, not an error of the content
            raise RequestError(error.strerror or str(error)) from error
        if len(data) < length:
            raise RequestError(
                f"{len(data)} bytes of {length} from {start} on; it has become shorter"
            )
        self.tally.bytes += len(data)
        return data


class RemoteBytes:
    """A file at http(s):// or s3://; incomplete answers are requested again."""

    def __init__(self, url: str, access: Access) -> None:
        self._url, self.tally = url, Tally()
        self._remote = remote_for(access, origin_of(url))
        self._head = self._remote.head(url, self.tally)
        self.size = self._head.size
        self._lock = threading.Lock()

    def fetch(self, start: int, length: int) -> bytes:
        """Return exactly these bytes; raise RequestError otherwise."""
        tally = Tally()
        try:
            return self._remote.fetch(self._url, self._head, start, length, tally)
        finally:
            with self._lock:
                for count in ("requests", "retried", "bytes"):
                    setattr(self.tally, count, getattr(self.tally, count) + getattr(tally, count))


class _LackingError(Exception):
    """A read outside the available spans, with the missing range.

    Not an OSError: zipfile would report a broken archive.
    """

    def __init__(self, start: int, length: int) -> None:
        super().__init__(start, length)
        self.start, self.length = start, length


class _Spans(io.RawIOBase):
    """Some spans of a file, for zipfile. zipfile reads under its own lock."""

    def __init__(self, size: int) -> None:
        self._size, self._at = size, 0
        self._starts: list[int] = []
        self._data: dict[int, bytes] = {}
        self._lock = threading.Lock()

    def hold(self, start: int, data: bytes) -> None:
        with self._lock:
            if start not in self._data:
                bisect.insort(self._starts, start)
            if len(data) > len(self._data.get(start, b"")):
                self._data[start] = data

    def drop(self, start: int) -> None:
        with self._lock:
            if self._data.pop(start, None) is not None:
                self._starts.remove(start)

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if at < 0:  # zipfile seeks Zip64 before the end, even in short files
            raise OSError(errno.EINVAL, "expected a place within the file")
        self._at = at
        return at

    def tell(self) -> int:
        return self._at

    def read(self, length: int = -1) -> bytes:
        """Return all requested bytes; zipfile treats fewer as the end."""
        stop = self._size if length < 0 else min(self._at + length, self._size)
        found, at = [], self._at
        with self._lock:
            while at < stop:
                start = next((s for s in self._starts if s <= at < s + len(self._data[s])), None)
                if start is None:
                    following = self._starts[bisect.bisect_right(self._starts, at) :]
                    raise _LackingError(at, min([stop, *following]) - at)
                found.append(self._data[start][at - start : stop - start])
                at += len(found[-1])
        self._at = at
        return b"".join(found)


class BrokenMemberError(ReleaseError):
    """A member contradicts its name or the directory; others may be intact."""


class Archive:
    """A zip archive, local or remote.

    Args:
        where: Path, or http(s):// or s3:// URL.
        access: How requests are signed.

    Raises:
        ReleaseError: the archive cannot be read, is truncated or empty, or is not a zip archive.
    """

    def __init__(self, where: str, access: Access | None = None) -> None:
        self.where = without_query(where)
        try:
            self.bytes: Bytes = (
                LocalBytes(Path(local_path(where)))
                if is_local(where)
                else RemoteBytes(where, access or access_to(where))
            )
        except OSError as error:
            raise self._unreadable(error) from error
        except ForbiddenError as error:
            raise ReleaseError(f"{self.where}: is not read ({error}); check the URL") from error
        self._spans = _Spans(self.bytes.size)
        held: list[int] = []
        try:
            self._zip = self._with_more(
                lambda: zipfile.ZipFile(self._spans), held, _MOST_DIRECTORY, _END
            )
        except zipfile.BadZipFile as error:
            raise ReleaseError(
                f"{self.where}: expected a zip archive, found {self.bytes.size:,} bytes without a whole directory at their end "
                f"({error}); it was cut off, or is something else: get it again, and compare its size with the publisher's"
            ) from error
        self._members = {m.filename: m for m in self._zip.infolist() if not m.is_dir()}
        if not self._members:
            raise ReleaseError(
                f"{self.where}: expected a zip archive of images and labels, found one without a file"
            )
        for start in held:
            self._spans.drop(start)
        starts = sorted(m.header_offset for m in self._members.values())
        ends = dict(zip(starts, [*starts[1:], self._zip.start_dir], strict=True))
        self._ends = {
            # At most the member's own length: gaps between members are not fetched.
            name: min(ends[m.header_offset], m.header_offset + m.compress_size + _AROUND)
            for name, m in self._members.items()
        }

    def names(self) -> list[str]:
        """List member names in the order of the directory."""
        return list(self._members)

    def size_of(self, name: str) -> int:
        """Return a member's packed or unpacked bytes, the larger, from the directory."""
        return max(self._members[name].file_size, self._members[name].compress_size)

    def checksum_of(self, name: str) -> int:
        """Return the CRC-32 of an unpacked member from the directory."""
        return self._members[name].CRC

    def identity(self) -> str:
        """Hash names, sizes and checksums of all members with SHA-256.

        The same archive has the same hash at any location.
        """
        listed = [(m.filename, m.file_size, m.CRC) for m in self._members.values()]
        return hashlib.sha256(json.dumps(sorted(listed)).encode()).hexdigest()

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, bytes | None]]:
        """Yield members with their content, or None.

        None marks a member with an unknown compression, or one contradicting the directory.

        Raises:
            ReleaseError: the archive cannot be read, or a member has more than `MOST_BYTES`.
        """
        wanted = sorted(names, key=lambda n: self._members[n].header_offset)
        for name in wanted:
            if self.size_of(name) > MOST_BYTES:
                raise ReleaseError(
                    f"{self.where}: expected at most {MOST_BYTES:,} bytes in its member {name}, found {self.size_of(name):,}; "
                    "get the archive again"
                )
        for run in self._runs(wanted):
            start, stop = self._members[run[0]].header_offset, self._ends[run[-1]]
            self._hold(start, stop - start)
            try:
                for name in run:
                    try:
                        yield name, self._unpacked(self._members[name], MOST_BYTES)
                    except _BROKEN as error:
                        log.warning(
                            "%s: its member %s cannot be unpacked: %s", self.where, name, error
                        )
                        yield name, None
            finally:
                self._spans.drop(start)

    @contextmanager
    def image(self, name: str) -> Iterator[rasterio.DatasetReader]:
        """Open a GeoTIFF member by its header alone: a few thousand bytes.

        Raises:
            BrokenMemberError: the member is not an image or contradicts the directory.
            ReleaseError: the archive cannot be read.
        """
        member, tally = self._members[name], Tally()
        held: list[int] = []
        part = (
            _Stored(self.bytes)
            if member.compress_type == zipfile.ZIP_STORED
            else _Packed(self, member, held)
        )
        try:
            begin = self.bytes.fetch(
                member.header_offset, min(_FIRST, self._ends[name] - member.header_offset)
            )
            if isinstance(part, _Stored):
                named, more = (int.from_bytes(begin[at : at + 2], "little") for at in (26, 28))
                part.start = member.header_offset + _LOCAL_HEADER + named + more
                first = begin[_LOCAL_HEADER + named + more :]
            else:
                self._spans.hold(member.header_offset, begin)
                held.append(member.header_offset)
                first = part.fetch("", Head(b"", 0, ""), 0, _FIRST, tally)
            opener = Opened(
                part,
                name,
                Head(first[: member.file_size], member.file_size, ""),
                tally,
                least=_LEAST,
            )
            # A fixed name keeps GDAL from searching for sidecar files.
            with (
                rasterio.Env(**images.SETTINGS),
                images.open_image(
                    "remote/image", first, most_px=MOST_PX, most_bytes=MOST_BYTES, opener=opener
                ) as image,
            ):
                if tally.error:
                    raise tally.error
                yield image
        except (RasterioError, ForbiddenError, *_BROKEN) as error:
            cause = tally.error or error
            if isinstance(cause, ReleaseError):
                raise cause from error
            if isinstance(cause, RequestError):
                raise self._unreadable(cause) from error
            raise BrokenMemberError(
                f"{self.where}: its member {name} cannot be read as an image ({cause})"
            ) from error
        finally:
            for start in held:
                self._spans.drop(start)

    def _runs(self, names: Sequence[str]) -> Iterator[list[str]]:
        """Group adjacent members."""
        run: list[str] = []
        for name in names:
            if run and self._members[name].header_offset - self._ends[run[-1]] > _GAP:
                yield run
                run = []
            run.append(name)
        if run:
            yield run

    def _hold(self, start: int, length: int) -> None:
        try:
            self._spans.hold(start, self.bytes.fetch(start, length))
        except OSError as error:
            raise self._unreadable(error) from error

    def _with_more(self, work: Callable[[], T], held: list[int], most: int, least: int = 0) -> T:
        """Call `work` until all its bytes are available, and return its result.

        Missing bytes are fetched after each call. Their start offsets are added to `held`.

        Raises:
            BadZipFile: one missing range is longer than `most`.
        """
        while True:
            try:
                return work()
            except _LackingError as lacking:
                if lacking.length > most:
                    raise zipfile.BadZipFile(
                        f"expected at most {most:,} bytes, found {lacking.length:,}"
                    ) from lacking
                # Extend backwards at the end of the file: zipfile searches the directory there.
                start = max(min(lacking.start, self.bytes.size - least), 0)
                self._hold(
                    start,
                    max(
                        lacking.start + lacking.length - start, min(least, self.bytes.size - start)
                    ),
                )
                held.append(start)
                least *= 2  # each repetition starts from scratch

    def prefix(self, member: zipfile.ZipInfo, length: int, held: list[int]) -> bytes:
        """Unpack the first bytes of a packed member.

        Start offsets of fetched spans are added to `held`.
        """

        if length > _MOST_PREFIX:
            raise zipfile.BadZipFile(f"expected its header within {_MOST_PREFIX:,} bytes")
        least = _GAP if member.compress_type not in _BY_PIECES else 0
        return self._with_more(
            lambda: self._unpacked(member, length), held, member.compress_size + _AROUND, least
        )

    def _unpacked(self, member: zipfile.ZipInfo, length: int) -> bytes:
        """Unpack a member's first bytes in pieces, at most its size in the directory."""
        whole = member.compress_type not in _BY_PIECES
        piece = _PACKED_PIECE if whole else _PIECE
        found = bytearray()
        with self._zip.open(member) as content:
            if whole:
                content.MIN_READ_SIZE = piece  # type: ignore[attr-defined]  # of packed bytes
            while len(found) < length and (more := content.read(min(piece, length - len(found)))):
                found += more
        return bytes(found)

    def _unreadable(self, error: OSError) -> ReleaseError:
        why = error.strerror or str(error)
        needs_download = "byte ranges" in why
        hint = "; or let it be downloaded first (--download)" if needs_download else ""
        kind = UnreadArchiveError if "://" in self.where and not needs_download else ReleaseError
        return kind(
            f"{self.where}: cannot be read ({without_query(why)}); check that it is there{hint}"
        )


class _Stored:
    """A member without compression, as a file."""

    def __init__(self, source: Bytes) -> None:
        self._source, self.start = source, 0

    def fetch(self, href: str, head: Head, start: int, length: int, tally: Tally) -> bytes:
        """Return these bytes of the member."""
        del href, tally
        return self._source.fetch(self.start + start, min(length, head.size - start))


class _Packed:
    """A packed member; reading a byte requires unpacking all bytes before it."""

    def __init__(self, archive: Archive, member: zipfile.ZipInfo, held: list[int]) -> None:
        self._archive, self._member, self._held, self._known = archive, member, held, b""

    def fetch(self, href: str, head: Head, start: int, length: int, tally: Tally) -> bytes:
        """Return these bytes of the member."""
        del href, head, tally
        if len(self._known) < min(start + length, self._member.file_size):
            self._known = self._archive.prefix(self._member, start + length, self._held)
        return self._known[start : start + length]
