"""Open images safely: only GeoTIFF and JPEG 2000, by their first bytes, up to an allowed size.

GDAL picks a driver by a file's bytes or name. Some drivers, such as VRT, follow names inside a file
to other files and hosts. `open_image` uses one of two single-file drivers, and ignores sidecar
files. A GeoTIFF may still name another file for its overviews. `open_image` refuses the image
before GDAL opens that file.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

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
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
    16: 8,
    17: 8,
    18: 8,
}
"""Type of a TIFF field -> bytes of one value."""
_DIRECTORIES = 32  # of a TIFF: one per image, overview and mask
_FIELDS = 4096  # of a directory: a GeoTIFF has a few dozen


class TooLargeError(ForbiddenError):
    """An image with a header beyond the allowed size."""


def is_cut(read: Callable[[int, int], bytes], size: int) -> bool:
    """Return whether a file is empty, or a GeoTIFF or JPEG 2000 file cut within its header.

    GDAL opens a GeoTIFF without the cut part: its location, fill value or mask may be missing.

    Args:
        read: returns the bytes at a position and of a length. With fewer bytes, the check ends.
        size: of the file, in bytes.
    """
    first = read(0, SIGNATURE)
    if size < SIGNATURE:
        return any(signature.startswith(first[: len(signature)]) for signature in _DRIVERS)
    if _DRIVERS.get(first[:4]) != "GTiff":
        return False
    order, big = "<" if first[:2] == b"II" else ">", b"+" in first[2:4]
    count, entry, offset = ("Q", "HHQ8s", "Q") if big else ("H", "HHI4s", "I")
    at = 8 if big else 4  # of the offset of the first directory
    for _ in range(_DIRECTORIES):
        found = _number(read, order + offset, at)
        if not found:  # the last directory
            return at + struct.calcsize(offset) > size
        begin = found + struct.calcsize(count)
        if begin > size:
            return True
        fields = _number(read, order + count, found)
        if fields is None or fields > _FIELDS:
            return False
        at = begin + fields * struct.calcsize(order + entry)
        if at + struct.calcsize(offset) > size:
            return True
        entries = read(begin, at - begin)
        if len(entries) < at - begin:
            return False
        for _, kind, values, value in struct.iter_unpack(order + entry, entries):
            length = values * _VALUE_BYTES.get(kind, 0)
            if length > len(value) and struct.unpack(order + offset, value)[0] + length > size:
                return True
    return False


def _number(read: Callable[[int, int], bytes], form: str, at: int) -> int | None:
    """Return the number at a position; None if its bytes are not available."""
    content = read(at, struct.calcsize(form))
    return int(struct.unpack(form, content)[0]) if len(content) == struct.calcsize(form) else None


def open_image(
    name: str, first: bytes, *, most_px: int, most_bytes: int = 2**30, **options: Any
) -> rasterio.DatasetReader:
    """Open a GeoTIFF or JPEG 2000 file, within `rasterio.Env(**SETTINGS)`.

    Args:
        name: a path, or a name in memory or of an `opener`, for rasterio.
        first: the file's first bytes, `SIGNATURE` of them or more.
        most_px: maximum number of pixels per band.
        most_bytes: maximum number of bytes of all pixels.
        options: for `rasterio.open`.

    Raises:
        ForbiddenError: the file has another format, or names another file for its overviews.
        TooLargeError: the header declares more than allowed.
        RasterioError: the file cannot be opened.
    """
    driver = next((d for signature, d in _DRIVERS.items() if first.startswith(signature)), None)
    if driver is None:
        raise ForbiddenError("expected a GeoTIFF or JPEG 2000 file, found another format")
    image = rasterio.open(name, sharing=False, driver=driver, **options)
    try:
        if image.tags(ns="OVERVIEWS"):
            raise ForbiddenError(
                "expected an image without OVERVIEWS metadata, which lets GDAL open another file"
            )
        _need_size(image, most_px, most_bytes)
    except ForbiddenError:
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
            f"expected at most {most_bytes:,} bytes of pixels, found {needed:,} in {image.count} bands"
        )
