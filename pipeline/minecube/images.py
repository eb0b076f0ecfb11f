"""Open images safely: only GeoTIFF and JPEG 2000, by their first bytes, up to an allowed size.

GDAL picks a driver by a file's bytes or name. Some drivers, such as VRT, follow names inside a file
to other files and hosts. `open_image` uses one of two single-file drivers, and ignores sidecar
files. A GeoTIFF may still name another file for its overviews. `open_image` refuses the image
before GDAL opens that file.

`find_directories` walks through the directories of a TIFF by itself. GDAL opens a cut file without
an error, and then lacks its location, fill value or mask.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import rasterio

from minecube.arrays import AnyArray
from minecube.network import ForbiddenError

SETTINGS = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",  # no sidecars: each costs a request
    "GDAL_PAM_ENABLED": "NO",
    "GDAL_GEOREF_SOURCES": "INTERNAL",
    # GDAL's own threads do not know rasterio's Python files. JPEG 2000 then returns arbitrary
    # memory without an error. The reads themselves run in parallel.
    "GDAL_NUM_THREADS": "1",
}
"""GDAL's settings for foreign images: `with rasterio.Env(**SETTINGS)`."""
SIGNATURE = 12
"""Number of first bytes needed to recognise a format."""
_SIZES = {"complex_int16": 4}
"""Bytes of types unknown to numpy."""
_DRIVERS = {
    b"II*\0": "GTiff",
    b"MM\0*": "GTiff",
    b"II+\0": "GTiff",  # BigTIFF
    b"MM\0+": "GTiff",
    b"\0\0\0\x0cjP  \r\n\x87\n": "JP2OpenJPEG",
    b"\xff\x4f\xff\x51": "JP2OpenJPEG",  # a bare codestream
}
_VALUE_BYTES = {
    **dict.fromkeys((1, 2, 6, 7), 1),
    **dict.fromkeys((3, 8), 2),
    **dict.fromkeys((4, 9, 11, 13), 4),
    **dict.fromkeys((5, 10, 12, 16, 17, 18), 8),
}
"""Type of a TIFF field -> bytes of one value."""
_KINDS = {1: "u1", 2: "S1", 3: "u2", 4: "u4", 12: "f8", 16: "u8"}
"""Type of a TIFF field -> the same type in numpy."""
_ORDERS: dict[str, Literal["little", "big"]] = {"<": "little", ">": "big"}
_DIRECTORIES = 32  # of a TIFF: one per image, overview and mask
_MOST_VALUE_BYTES = 2**24
_FIELDS = 4096  # of a directory: a GeoTIFF has a few dozen


class TooLargeError(ForbiddenError):
    """An image with a header beyond the allowed size."""


@dataclass(frozen=True)
class Directory:
    """The fields of one image, overview or mask in a TIFF file."""

    order: str
    """Byte order, in the notation of `struct`."""
    fields: Mapping[int, tuple[int, int, bytes]]
    """Tag -> type, number of values, and their bytes or offset."""
    read: Callable[[int, int], bytes]
    """Returns the bytes at a position and of a length."""

    def values(self, tag: int) -> AnyArray:
        """Read the values of a field of numbers or text; empty if it is missing.

        Raises KeyError for a field of another type, ValueError for one with too many values.
        """
        kind, count, content = self.fields.get(tag, (1, 0, b""))
        length = count * np.dtype(_KINDS[kind]).itemsize
        if length > _MOST_VALUE_BYTES:
            raise ValueError(f"field {tag}: expected at most {_MOST_VALUE_BYTES:,} bytes")
        if length > len(content):
            offset = int.from_bytes(content, _ORDERS[self.order])
            content = self.read(offset, length)
        return np.frombuffer(content[:length], f"{self.order}{_KINDS[kind]}")


class Directories(NamedTuple):
    """What was found in a TIFF file."""

    found: list[Directory]
    is_cut: bool
    """True for a file that is empty, or ends within a directory or its values."""
    is_whole: bool
    """True if all directories were found."""


def find_directories(read: Callable[[int, int], bytes], size: int) -> Directories:
    """Find the directories of a TIFF file: none in a file of another format.

    `read` returns the bytes at a position and of a length. With fewer bytes, the search ends.
    `size` is that of the file, in bytes.
    """
    found: list[Directory] = []
    beginning = read(0, SIGNATURE)
    if size < SIGNATURE:
        is_cut = any(signature.startswith(beginning[: len(signature)]) for signature in _DRIVERS)
        return Directories(found, is_cut, False)
    if _DRIVERS.get(beginning[:4]) != "GTiff":
        return Directories(found, False, False)
    layout = _layout_of(beginning)
    position = layout.start
    for _ in range(_DIRECTORIES):
        directory = _read_number(read, layout.offset, position)
        if not directory:  # the last directory
            is_cut = position + struct.calcsize(layout.offset) > size
            return Directories(found, is_cut, directory == 0)
        start = directory + struct.calcsize(layout.count)
        if start > size:
            return Directories(found, True, False)
        fields = _read_number(read, layout.count, directory)
        if fields is None or fields > _FIELDS:
            break
        position = start + fields * struct.calcsize(layout.field)
        if position + struct.calcsize(layout.offset) > size:
            return Directories(found, True, False)
        content = read(start, position - start)
        if len(content) < position - start:
            break
        entries = list(struct.iter_unpack(layout.field, content))
        for _, kind, values, value in entries:
            length = values * _VALUE_BYTES.get(kind, 0)
            if length > len(value) and struct.unpack(layout.offset, value)[0] + length > size:
                return Directories(found, True, False)
        # Of equal tags, the first counts, as in libtiff.
        fields_by_tag = {tag: (kind, n, value) for tag, kind, n, value in reversed(entries)}
        found.append(Directory(layout.offset[0], fields_by_tag, read))
    return Directories(found, False, False)


@dataclass(frozen=True)
class _TiffLayout:
    """Formats of the numbers in a TIFF file, in the notation of `struct`."""

    start: int
    """Position of the offset of the first directory."""
    count: str
    """Number of fields in a directory."""
    field: str
    """Tag, type, number of values, and their value or offset."""
    offset: str
    """Position in the file."""


def _layout_of(beginning: bytes) -> _TiffLayout:
    order = ">"
    if beginning[:2] == b"II":
        order = "<"
    if b"+" in beginning[2:4]:  # BigTIFF
        return _TiffLayout(8, f"{order}Q", f"{order}HHQ8s", f"{order}Q")
    return _TiffLayout(4, f"{order}H", f"{order}HHI4s", f"{order}I")


def _read_number(read: Callable[[int, int], bytes], layout: str, position: int) -> int | None:
    """Return the number at a position; None if its bytes are not available."""
    size = struct.calcsize(layout)
    content = read(position, size)
    if len(content) != size:
        return None
    return int(struct.unpack(layout, content)[0])


def open_image(
    name: str, beginning: bytes, *, most_px: int, most_bytes: int = 2**30
) -> rasterio.DatasetReader:
    """Open a GeoTIFF or JPEG 2000 file, within `rasterio.Env(**SETTINGS)`.

    Args:
        name: a path, or a name in memory or of a remote file, for rasterio.
        beginning: the file's first bytes, `SIGNATURE` of them or more.
        most_px: maximum number of pixels per band.
        most_bytes: maximum number of bytes of all pixels.

    Raises:
        ForbiddenError: the file has another format, or names another file for its overviews.
        TooLargeError: the header declares more than allowed.
        RasterioError: the file cannot be opened.
    """
    drivers = [driver for mark, driver in _DRIVERS.items() if beginning.startswith(mark)]
    if not drivers:
        raise ForbiddenError("expected a GeoTIFF or JPEG 2000 file, found another format")
    image = rasterio.open(name, sharing=False, driver=drivers[0])
    try:
        if image.tags(ns="OVERVIEWS"):
            raise ForbiddenError(
                "expected an image without OVERVIEWS metadata, which lets GDAL open another file"
            )
        _need_size(image, most_px, most_bytes)
    except BaseException:
        image.close()
        raise
    return image


def _need_size(image: rasterio.DatasetReader, most_px: int, most_bytes: int) -> None:
    """Raise TooLargeError if the header declares more than allowed. Reads no pixels."""
    if image.width * image.height > most_px:
        raise TooLargeError(
            f"expected at most {most_px:,} pixels, found {image.height:,} x {image.width:,}"
        )
    height, width = max(image.block_shapes, key=math.prod, default=(0, 0))
    if height * width > most_px:
        raise TooLargeError(
            f"expected tiles of at most {most_px:,} pixels, found {height:,} x {width:,}"
        )
    per_pixel = sum(_SIZES.get(name) or np.dtype(name).itemsize for name in image.dtypes)
    # A tile may hold all bands, and may be larger than the image.
    needed = max(image.width * image.height, height * width) * per_pixel
    if needed > most_bytes:
        raise TooLargeError(
            f"expected at most {most_bytes:,} bytes of pixels, "
            f"found {needed:,} in {image.count} bands"
        )
