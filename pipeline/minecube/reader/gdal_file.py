"""A remote file as GDAL sees it: a Python file object, opened by `rasterio.open(..., opener=)`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol

from rasterio.abc import MultiByteRangeResourceContainer

from minecube.network import MissingError
from minecube.reader.transfer import Head, Tally

_LEAST = 65536  # bytes, smallest plain read beyond the head; ranges of tiles are fetched exactly


class Ranges(Protocol):
    """Source of a file's bytes."""

    def fetch(self, href: str, head: Head, start: int, length: int, tally: Tally) -> bytes:
        """Fetch these bytes, or all up to the file's end; raise OSError on failure."""


class RemoteFile:
    """A seekable remote file for GDAL, read by one thread; ranges of tiles are fetched exactly.

    GDAL calls it from C++, and a Python exception there would end the process. So errors are stored
    in the tally instead, and GDAL gets zeros. The caller of GDAL must not use them as pixels.
    """

    def __init__(
        self, source: Ranges, href: str, head: Head, tally: Tally, least: int = _LEAST
    ) -> None:
        self._source = source
        self._href = href
        self._head = head
        self._tally = tally
        self._least = least
        self._position = 0
        self._buffer = b""
        self._buffer_start = 0

    def __enter__(self) -> RemoteFile:
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing: no resource is open."""

    def close(self) -> None:
        """Do nothing: no resource is open."""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position, as files do."""
        origins = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._head.size}
        self._position = offset + origins[whence]
        return self._position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def read(self, length: int = -1) -> bytes:
        """Read bytes from the position; fewer only at the file's end."""
        start = self._position
        stop = self._head.size
        if length >= 0:
            stop = min(start + length, stop)
        if stop <= start:
            return b""
        if stop <= len(self._head.data):
            data = self._head.data[start:stop]
        else:
            buffer_stop = self._buffer_start + len(self._buffer)
            if not self._buffer_start <= start <= stop <= buffer_stop:
                self._buffer_start = start
                self._buffer = self._fetch(start, max(stop - start, self._least))
            data = self._buffer[start - self._buffer_start : stop - self._buffer_start]
        self._position += len(data)
        return data

    def get_byte_ranges(self, offsets: Sequence[int], sizes: Sequence[int]) -> list[bytes]:
        """Return the bytes of each range, padded with zeros to the requested length."""
        parts = [self._fetch(start, length) for start, length in zip(offsets, sizes, strict=True)]
        is_cut = any(len(part) < length for part, length in zip(parts, sizes, strict=True))
        if is_cut and not self._tally.error:
            self._tally.error = MissingError(
                f"it ends after {self._head.size} bytes, before the tiles that its header names"
            )
        return [part.ljust(length, b"\0") for part, length in zip(parts, sizes, strict=True)]

    def _fetch(self, start: int, length: int) -> bytes:
        if not self._tally.error:
            try:
                return self._source.fetch(self._href, self._head, start, length, self._tally)
            except Exception as error:  # stored, and raised by the reader: see the class
                self._tally.error = error
        return bytes(min(length, max(self._head.size - start, 0)))


@MultiByteRangeResourceContainer.register
class Opened:
    """One remote file for `rasterio.open(..., opener=)`."""

    def __init__(
        self, source: Ranges, href: str, head: Head, tally: Tally, least: int = _LEAST
    ) -> None:
        self._source = source
        self._href = href
        self._head = head
        self._tally = tally
        self._least = least

    def open(self, path: str, mode: str = "rb", **_: Any) -> RemoteFile:
        """Open the file under any name. Names visible to GDAL and its logs contain no URL."""
        del path, mode
        return RemoteFile(self._source, self._href, self._head, self._tally, self._least)

    def isfile(self, path: str) -> bool:
        """Return True."""
        del path
        return True

    def isdir(self, path: str) -> bool:
        """Return False."""
        del path
        return False

    def ls(self, path: str) -> list[str]:
        """Return an empty list, so GDAL does not request sidecar files."""
        del path
        return []

    def mtime(self, path: str) -> int:
        """Return 0: unknown."""
        del path
        return 0

    def size(self, path: str) -> int:
        """Return the file's size in bytes."""
        del path
        return self._head.size
