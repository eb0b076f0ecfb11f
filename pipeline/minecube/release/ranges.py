"""Fetch byte ranges of a file, local or remote, and offer some of them to zipfile."""

from __future__ import annotations

import bisect
import errno
import io
import os
import threading
from pathlib import Path
from typing import Protocol

from minecube.catalog import Access
from minecube.network import RequestError, origin_of
from minecube.reader.remote import Tally, remote_for


class Bytes(Protocol):
    """A file with range reads from any thread; `tally` counts the traffic."""

    size: int
    tally: Tally

    def fetch(self, start: int, length: int) -> bytes:
        """Return exactly these bytes; raise RequestError otherwise."""


class LocalBytes:
    """A file on disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.tally = Tally()
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
        self._url = url
        self.tally = Tally()
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
                self.tally.requests += tally.requests
                self.tally.retried += tally.retried
                self.tally.bytes += tally.bytes


class MissingBytesError(Exception):
    """A read outside the available spans, with the missing range.

    Not an OSError: zipfile would report a broken archive.
    """

    def __init__(self, start: int, length: int) -> None:
        super().__init__(start, length)
        self.start = start
        self.length = length


class Spans(io.RawIOBase):
    """Some spans of a file, for zipfile. zipfile reads under its own lock."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._position = 0
        self._starts: list[int] = []
        self._data: dict[int, bytes] = {}
        self._lock = threading.Lock()

    def add(self, start: int, data: bytes) -> None:
        """Add a span. A longer span with the same start stays."""
        with self._lock:
            if start not in self._data:
                bisect.insort(self._starts, start)
            if len(data) > len(self._data.get(start, b"")):
                self._data[start] = data

    def drop(self, start: int) -> None:
        """Drop the span with this start, if there is one."""
        with self._lock:
            if self._data.pop(start, None) is not None:
                self._starts.remove(start)

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move the position, also to bytes without a span."""
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        position = origin + offset
        if position < 0:  # zipfile seeks Zip64 before the end, even in short files
            raise OSError(errno.EINVAL, "expected a place within the file")
        self._position = position
        return position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def read(self, length: int = -1) -> bytes:
        """Return all requested bytes; zipfile treats fewer as the end.

        Raises:
            MissingBytesError: some of them lie in no span.
        """
        stop = self._size
        if length >= 0:
            stop = min(self._position + length, self._size)
        pieces = []
        position = self._position
        with self._lock:
            while position < stop:
                piece = self._read_span(position, stop)
                pieces.append(piece)
                position += len(piece)
        self._position = position
        return b"".join(pieces)

    def _read_span(self, position: int, stop: int) -> bytes:
        """Return bytes up to `stop` from one span."""
        for start in self._starts:
            data = self._data[start]
            if start <= position < start + len(data):
                return data[position - start : stop - start]
        following = self._starts[bisect.bisect_right(self._starts, position) :]
        raise MissingBytesError(position, min([stop, *following]) - position)
