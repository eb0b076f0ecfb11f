"""Read a zip archive in place, by byte ranges: first its directory, then the wanted members.

zipfile does the reading, including Zip64, all its compressions and checksums. This module only
supplies the bytes. zipfile gets a file with some spans of the archive. A read outside the spans
raises an error with the missing range. The range is then fetched and the read repeated. Many
threads can read in parallel. Adjacent members, such as the labels of a site, share one request.

Libraries need more traffic for the labels and image headers of 200 site-years (783 MB), with eight
threads and 20 ms per answer:

    this module                             800 requests     1.8 MB   3.9 s
    zipfile on obstore's exact ranges     1,224 requests     2.0 MB   3.7 s
    remotezip                               408 requests   783.5 MB   4.5 s
    zipfile on obstore's buffered reader  1,232 requests     over 6 GB

They also have no limits on members that unpack to far more than their size.
"""

from __future__ import annotations

import hashlib
import json
import logging
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import rasterio
from rasterio.errors import RasterioError
from rasterio.io import MemoryFile

from minecube import images
from minecube.errors import ReleaseError, UnreadArchiveError
from minecube.network import ForbiddenError, RequestError, is_local, local_path, remove_query
from minecube.reader.gdal_file import RemoteFile, open_remote
from minecube.reader.remote import Head, Tally, access_to
from minecube.release.ranges import Bytes, LocalBytes, MissingBytesError, RemoteBytes, Spans
from minecube.zips import LOCAL_HEADER, parse_local_header

Result = TypeVar("Result")

log = logging.getLogger(__name__)

_END = 1024  # bytes requested first, from the end: they locate the directory
_FIRST = 1200  # first bytes of an image header; the georeference follows the list of strips
_LEAST = 1024  # minimum of later requests; GDAL reads at most 1024 at a time
_GAP = 4096  # bytes between members; up to this gap one request beats two
# Errors of zipfile (checksum, truncation, encryption, unknown compression) and of decompressors.
_BROKEN = (zipfile.BadZipFile, EOFError, RuntimeError, zlib.error, lzma.LZMAError, OSError)
_MOST_OVERHEAD = LOCAL_HEADER + 2 * 65535 + 24  # name, extra field, data descriptor
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


class BrokenMemberError(ReleaseError):
    """A member contradicts its name or the directory; others may be intact."""


class Archive:
    """A zip archive at a path, or at an http(s):// or s3:// URL.

    Raises:
        ReleaseError: the archive cannot be read, is truncated or empty, or is not a zip archive.
    """

    def __init__(self, location: str) -> None:
        self.location = remove_query(location)
        self.bytes = self._open(location)
        self._spans = Spans(self.bytes.size)
        self._zip = self._read_directory()
        self._members = {
            member.filename: member for member in self._zip.infolist() if not member.is_dir()
        }
        if not self._members:
            raise ReleaseError(
                f"{self.location}: expected a zip archive of images and labels, "
                "found one without a file"
            )
        self._ends = self._locate_ends()

    def _open(self, location: str) -> Bytes:
        try:
            if is_local(location):
                return LocalBytes(Path(local_path(location)))
            return RemoteBytes(location, access_to(location))
        except OSError as error:
            raise self._unreadable(error) from error
        except ForbiddenError as error:
            raise ReleaseError(f"{self.location}: is not read ({error}); check the URL") from error

    def _read_directory(self) -> zipfile.ZipFile:
        span_starts: list[int] = []
        try:
            directory = self._fetch_until_done(
                lambda: zipfile.ZipFile(self._spans), span_starts, _MOST_DIRECTORY, _END
            )
        except zipfile.BadZipFile as error:
            raise ReleaseError(
                f"{self.location}: expected a zip archive, "
                f"found {self.bytes.size:,} bytes without a whole directory at their end "
                f"({error}); it is cut off or no zip file: "
                "get it again, and compare its size with the publisher's"
            ) from error
        self._drop_spans(span_starts)
        return directory

    def _locate_ends(self) -> dict[str, int]:
        """Map each member to an offset behind its last byte."""
        starts = sorted(member.header_offset for member in self._members.values())
        following = dict(zip(starts, [*starts[1:], self._zip.start_dir], strict=True))
        ends = {}
        for name, member in self._members.items():
            # At most the member's own length: gaps between members are not fetched.
            longest = member.header_offset + member.compress_size + _MOST_OVERHEAD
            ends[name] = min(following[member.header_offset], longest)
        return ends

    def names(self) -> list[str]:
        """List member names in the order of the directory."""
        return list(self._members)

    def get_size(self, name: str) -> int:
        """Return a member's packed or unpacked bytes, the larger, from the directory."""
        return max(self._members[name].file_size, self._members[name].compress_size)

    def get_checksum(self, name: str) -> int:
        """Return the CRC-32 of an unpacked member from the directory."""
        return self._members[name].CRC

    def compute_identity(self) -> str:
        """Hash names, sizes and checksums of all members with SHA-256.

        The same archive has the same hash at any location.
        """
        entries = [
            (member.filename, member.file_size, member.CRC) for member in self._members.values()
        ]
        return hashlib.sha256(json.dumps(sorted(entries)).encode()).hexdigest()

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, bytes | None]]:
        """Yield members with their content, or None.

        None marks a member with an unknown compression, or one contradicting the directory.

        Raises:
            ReleaseError: the archive cannot be read, or a member has more than `MOST_BYTES`.
        """
        ordered = sorted(names, key=lambda name: self._members[name].header_offset)
        for name in ordered:
            if self.get_size(name) > MOST_BYTES:
                raise ReleaseError(
                    f"{self.location}: expected at most {MOST_BYTES:,} bytes in its member {name}, "
                    f"found {self.get_size(name):,}; get the archive again"
                )
        for adjacent in self._group_adjacent(ordered):
            start = self._members[adjacent[0]].header_offset
            self._fetch_span(start, self._ends[adjacent[-1]] - start)
            try:
                for name in adjacent:
                    yield name, self._unpack_whole(name)
            finally:
                self._spans.drop(start)

    def _unpack_whole(self, name: str) -> bytes | None:
        try:
            return self._unpack(self._members[name], MOST_BYTES)
        except _BROKEN as error:
            log.warning("%s: its member %s cannot be unpacked: %s", self.location, name, error)
            return None

    @contextmanager
    def open_image(self, name: str) -> Iterator[rasterio.DatasetReader]:
        """Open a GeoTIFF member by its header alone: a few thousand bytes.

        Raises:
            BrokenMemberError: the member is not an image or contradicts the directory.
            ReleaseError: the archive cannot be read.
        """
        tally = Tally()
        size = self._members[name].file_size
        span_starts: list[int] = []
        try:
            content, first_bytes = self._open_member(name, span_starts)
            head = Head(first_bytes[:size], size, "")
            open_again = partial(RemoteFile, content, name, head, tally, least=_LEAST)
            open_name = partial(
                images.open_image,
                beginning=first_bytes,
                most_px=MOST_PX,
                most_bytes=MOST_BYTES,
            )
            with (
                rasterio.Env(**images.SETTINGS),
                open_remote(open_again, size, open_name) as image,
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
                f"{self.location}: its member {name} cannot be read as an image ({cause})"
            ) from error
        finally:
            self._drop_spans(span_starts)

    def _open_member(self, name: str, span_starts: list[int]) -> tuple[_Stored | _Packed, bytes]:
        """Open a member for range reads, and return its first bytes, unpacked."""
        member = self._members[name]
        start = member.header_offset
        first_bytes = self.bytes.fetch(start, min(_FIRST, self._ends[name] - start))
        if member.compress_type == zipfile.ZIP_STORED:
            try:
                overhead = parse_local_header(first_bytes).size
            except ValueError as error:
                raise zipfile.BadZipFile(str(error)) from error
            return _Stored(self.bytes, start + overhead), first_bytes[overhead:]
        self._spans.add(start, first_bytes)
        span_starts.append(start)
        packed = _Packed(self, member, span_starts)
        return packed, packed.read(0, _FIRST)

    def _group_adjacent(self, names: Sequence[str]) -> Iterator[list[str]]:
        """Group adjacent members."""
        adjacent: list[str] = []
        for name in names:
            if adjacent and self._members[name].header_offset - self._ends[adjacent[-1]] > _GAP:
                yield adjacent
                adjacent = []
            adjacent.append(name)
        if adjacent:
            yield adjacent

    def _fetch_span(self, start: int, length: int) -> None:
        try:
            self._spans.add(start, self.bytes.fetch(start, length))
        except OSError as error:
            raise self._unreadable(error) from error

    def _drop_spans(self, starts: Iterable[int]) -> None:
        for start in starts:
            self._spans.drop(start)

    def _fetch_until_done(
        self,
        work: Callable[[], Result],
        span_starts: list[int],
        most_bytes: int,
        least_bytes: int = 0,
    ) -> Result:
        """Call `work` until all its bytes are available, and return its result.

        Missing bytes are fetched after each call. Their start offsets are added to `span_starts`.

        Raises:
            BadZipFile: one missing range is longer than `most_bytes`.
        """
        while True:
            try:
                return work()
            except MissingBytesError as missing:
                if missing.length > most_bytes:
                    raise zipfile.BadZipFile(
                        f"expected at most {most_bytes:,} bytes, found {missing.length:,}"
                    ) from missing
                # Extend backwards at the end of the file: zipfile searches the directory there.
                start = max(min(missing.start, self.bytes.size - least_bytes), 0)
                stop = max(
                    missing.start + missing.length, min(start + least_bytes, self.bytes.size)
                )
                self._fetch_span(start, stop - start)
                span_starts.append(start)
                least_bytes *= 2  # each repetition starts from scratch

    def unpack_prefix(self, member: zipfile.ZipInfo, length: int, span_starts: list[int]) -> bytes:
        """Unpack the first bytes of a packed member.

        Start offsets of fetched spans are added to `span_starts`.
        """
        if length > _MOST_PREFIX:
            raise zipfile.BadZipFile(f"expected its header within {_MOST_PREFIX:,} bytes")
        least_bytes = 0
        if member.compress_type not in _BY_PIECES:
            least_bytes = _GAP
        return self._fetch_until_done(
            lambda: self._unpack(member, length),
            span_starts,
            member.compress_size + _MOST_OVERHEAD,
            least_bytes,
        )

    def _unpack(self, member: zipfile.ZipInfo, length: int) -> bytes:
        """Unpack a member's first bytes in pieces, at most its size in the directory."""
        piece_length = _PIECE
        unpacked = bytearray()
        with self._zip.open(member) as content:
            if member.compress_type not in _BY_PIECES:
                piece_length = _PACKED_PIECE
                # The size of packed pieces.
                content.MIN_READ_SIZE = piece_length  # type: ignore[attr-defined]
            while len(unpacked) < length:
                piece = content.read(min(piece_length, length - len(unpacked)))
                if not piece:
                    break
                unpacked += piece
        return bytes(unpacked)

    def _unreadable(self, error: OSError) -> ReleaseError:
        reason = error.strerror or str(error)
        text = f"{self.location}: cannot be read ({remove_query(reason)}); check that it is there"
        if "byte ranges" in reason:
            return ReleaseError(f"{text}; or let it be downloaded first (--download)")
        if "://" in self.location:
            return UnreadArchiveError(text)
        return ReleaseError(text)


@contextmanager
def open_content(content: bytes) -> Iterator[rasterio.DatasetReader]:
    """Open a whole member as an image.

    Raises:
        RasterioError: the member is not an image.
        ForbiddenError: the image is neither GeoTIFF nor JPEG 2000, names another file for its
            overviews, or is too large.
    """
    with (
        rasterio.Env(**images.SETTINGS),
        MemoryFile(content) as memory,
        images.open_image(memory.name, content, most_px=MOST_PX, most_bytes=MOST_BYTES) as image,
    ):
        yield image


class _Stored:
    """A member without compression, as a file."""

    def __init__(self, source: Bytes, offset: int) -> None:
        self._source = source
        self._offset = offset

    def fetch(self, href: str, head: Head, start: int, length: int, tally: Tally) -> bytes:
        """Return these bytes of the member."""
        del href, tally
        return self._source.fetch(self._offset + start, min(length, head.size - start))


class _Packed:
    """A packed member; reading a byte requires unpacking all bytes before it."""

    def __init__(self, archive: Archive, member: zipfile.ZipInfo, span_starts: list[int]) -> None:
        self._archive = archive
        self._member = member
        self._span_starts = span_starts
        self._unpacked = b""

    def fetch(self, href: str, head: Head, start: int, length: int, tally: Tally) -> bytes:
        """Return these bytes of the member."""
        del href, head, tally
        return self.read(start, length)

    def read(self, start: int, length: int) -> bytes:
        """Return these bytes of the member, or fewer at its end."""
        stop = start + length
        if len(self._unpacked) < min(stop, self._member.file_size):
            self._unpacked = self._archive.unpack_prefix(self._member, stop, self._span_starts)
        return self._unpacked[start:stop]
