"""Images read through GDAL, and remote files as GDAL sees them: Python file objects with names."""

from __future__ import annotations

import atexit
import contextvars
import functools
import io
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import rasterio
from affine import Affine
from rasterio.abc import MultiByteRangeResourceContainer
from rasterio.enums import MaskFlags
from rasterio.io import MemoryFile
from rasterio.windows import Window

from minecube.arrays import UInt16
from minecube.network import MissingError, RequestError
from minecube.reader.tiles import clear_invalid
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


class _Content(NamedTuple):
    """A file for GDAL."""

    open_again: Callable[[], RemoteFile | BinaryIO]
    """Opens the file at its first byte."""
    size: int
    """In bytes."""


@MultiByteRangeResourceContainer.register
class _OpenFiles:
    """The open remote files of this process, for `rasterio.open(..., opener=)`.

    Each such call installs a handler in GDAL's list of file systems, and removes it later. This
    list has no lock. Another thread that opens a file meanwhile may read freed memory, which ends
    the process: once in about 100,000 opens by 8 threads (rasterio 1.4.4, GDAL 3.10.3). So only
    one small image is opened in this way, and it stays open. Remote files get names next to it.
    """

    def __init__(self) -> None:
        content = _make_image()
        self._files: dict[str, _Content] = {
            "0": _Content(lambda: io.BytesIO(content), len(content))
        }
        self._numbers = itertools.count(1)
        self._image = rasterio.open("remote/0", opener=self, driver="GTiff")
        self.context = contextvars.copy_context()
        """Where rasterio looks up this opener. Other threads have other contexts."""
        # GDAL must not close the image after Python's end: this ends in a crash.
        atexit.register(self.context.copy().run, self._image.close)

    @contextmanager
    def give_name(self, file: _Content) -> Iterator[str]:
        """Give the file a name for `rasterio.open`, within a context."""
        number = str(next(self._numbers))
        self._files[number] = file
        try:
            yield self._image.name.removesuffix("0") + number
        finally:
            del self._files[number]

    def open(self, path: str, _mode: str = "rb", **_: Any) -> RemoteFile | BinaryIO:
        """Open the file of this name. Names visible to GDAL and its logs contain no URL."""
        return self._find(path).open_again()

    def isfile(self, path: str) -> bool:
        """Return whether a file has this name; sidecar files do not exist."""
        return _number_of(path) in self._files

    def isdir(self, _path: str) -> bool:
        """Return False."""
        return False

    def ls(self, _path: str) -> list[str]:
        """Return an empty list, so GDAL does not request sidecar files."""
        return []

    def mtime(self, _path: str) -> int:
        """Return 0: unknown."""
        return 0

    def size(self, path: str) -> int:
        """Return the file's size in bytes."""
        return self._find(path).size

    def _find(self, path: str) -> _Content:
        file = self._files.get(_number_of(path))
        if file is None:
            raise FileNotFoundError(path)
        return file


_LOCK = threading.Lock()


@functools.cache
def _make_open_files() -> _OpenFiles:
    return _OpenFiles()


def _number_of(path: str) -> str:
    return path.rpartition("/")[2]


def _make_image() -> bytes:
    """Make a GeoTIFF of one pixel."""
    profile = {"driver": "GTiff", "width": 1, "height": 1, "count": 1, "dtype": "uint8"}
    with MemoryFile() as memory:
        with memory.open(**profile, transform=Affine.scale(10, -10)):
            pass
        return bytes(memory.getbuffer())


@contextmanager
def open_remote(
    open_again: Callable[[], RemoteFile],
    size: int,
    open_name: Callable[[str], rasterio.DatasetReader],
) -> Iterator[rasterio.DatasetReader]:
    """Open a remote image in a `with` statement, within `rasterio.Env(**images.SETTINGS)`.

    Without these settings, GDAL looks for sidecar files while it reads, and fails. Lost bytes do
    not raise: GDAL gets zeros, and the caller must check the error of the file's tally. The image
    is closed here and nowhere else.

    Args:
        open_again: Opens the file at its first byte. GDAL may call this several times.
        size: Size of the file in bytes.
        open_name: Opens the image of a name. It closes the image if it fails later.

    Raises:
        RasterioError, ForbiddenError: As `open_name` does.
    """
    with _LOCK:
        files = _make_open_files()
    context = files.context.copy()
    with files.give_name(_Content(open_again, size)) as name:
        image = context.run(open_name, name)
        try:
            yield image
        finally:
            context.run(image.close)


class GdalImage:
    """An open image, read through GDAL."""

    def __init__(self, image: rasterio.DatasetReader, tally: Tally) -> None:
        self.crs = image.crs
        self.transform = image.transform
        self.height, self.width = image.shape
        self.block = image.block_shapes[0]
        self.wrapped = 0
        self._image = image
        self._tally = tally

    def read(self, rows: range, columns: range, out: UInt16 | None = None) -> UInt16:
        """Read a window within the image: uint16 [y, x], 0 at invalid pixels.

        The pixels are put into `out` if given.

        Raises:
            RasterioError: The pixels cannot be decoded.
            RequestError: Bytes of a remote file cannot be fetched.
        """
        window = Window(columns.start, rows.start, len(columns), len(rows))
        self._count_stored(rows, columns)
        pixels: UInt16 = self._image.read(1, window=window).astype(np.uint16, copy=False)
        if MaskFlags.per_dataset in self._image.mask_flag_enums[0]:
            pixels[self._image.read_masks(1, window=window) == 0] = 0
        self.wrapped += clear_invalid(pixels, self._image.nodata)
        if self._tally.error:  # GDAL got zeros instead of missing bytes
            raise RequestError(str(self._tally.error)) from self._tally.error
        if out is None:
            return pixels
        out[:] = pixels
        return out

    def _count_stored(self, rows: range, columns: range) -> None:
        """Count the stored bytes of a window of a local GeoTIFF: its compressed tiles."""
        if self._tally.requests:
            return  # a remote file: its bytes are already counted
        height, width = self.block
        for y in range(rows.start // height, -(-rows.stop // height)):
            for x in range(columns.start // width, -(-columns.stop // width)):
                size = self._image.get_tag_item(f"BLOCK_SIZE_{x}_{y}", "TIFF", bidx=1)
                self._tally.bytes += int(size or 0)
