"""Open images safely: only GeoTIFF and JPEG 2000, by their first bytes, up to an allowed size.

GDAL picks a driver by a file's bytes or name. Some drivers, such as VRT, follow names inside a file
to other files and hosts. `open_image` uses one of two single-file drivers, and ignores sidecar
files. A GeoTIFF may still name another file for its overviews. `open_image` refuses the image
before GDAL opens that file.

`is_cut` walks through the directories of a TIFF by itself. GDAL opens a cut file without an error,
and then lacks its location, fill value or mask.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import rasterio

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
_DIRECTORIES = 32  # of a TIFF: one per image, overview and mask
_FIELDS = 4096  # of a directory: a GeoTIFF has a few dozen


class TooLargeError(ForbiddenError):
    """An image with a header beyond the allowed size."""


def is_cut(read: Callable[[int, int], bytes], size: int) -> bool:
    """Return whether a file is empty, or a GeoTIFF or JPEG 2000 file cut within its header.

    `read` returns the bytes at a position and of a length. With fewer bytes, the check ends. `size`
    is that of the file, in bytes.
    """
    beginning = read(0, SIGNATURE)
    if size < SIGNATURE:
        return any(signature.startswith(beginning[: len(signature)]) for signature in _DRIVERS)
    if _DRIVERS.get(beginning[:4]) != "GTiff":
        return False
    layout = _layout_of(beginning)
    position = layout.start
    for _ in range(_DIRECTORIES):
        directory = _read_number(read, layout.offset, position)
        if not directory:  # the last directory
            return position + struct.calcsize(layout.offset) > size
        start = directory + struct.calcsize(layout.count)
        if start > size:
            return True
        fields = _read_number(read, layout.count, directory)
        if fields is None or fields > _FIELDS:
            return False
        position = start + fields * struct.calcsize(layout.field)
        if position + struct.calcsize(layout.offset) > size:
            return True
        content = read(start, position - start)
        if len(content) < position - start:
            return False
        for _, kind, values, value in struct.iter_unpack(layout.field, content):
            length = values * _VALUE_BYTES.get(kind, 0)
            if length > len(value) and struct.unpack(layout.offset, value)[0] + length > size:
                return True
    return False


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
