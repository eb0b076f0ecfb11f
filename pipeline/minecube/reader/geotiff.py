"""Read headers of usual GeoTIFFs. All others are left to GDAL.

A header is believed only if each of its fields has the expected type and a usual value.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import rasterio
from affine import Affine

from minecube.arrays import Int64
from minecube.images import Directories, Directory

_TILE_STEP_PX = 16  # TIFF 6.0, section 15
_MOST_TILES = 2**19
_NODATA = re.compile(rb"nan|[-+]?[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?")
_LAST_BYTE = 2**60  # no file is longer


class Compression(IntEnum):
    """TIFF's numbers of the compressions that are decoded here."""

    PLAIN = 1
    LZW = 5
    DEFLATE = 8
    OLD_DEFLATE = 32946
    LERC = 34887
    ZSTD = 50000


_WITH_PREDICTOR = (
    Compression.LZW,
    Compression.DEFLATE,
    Compression.OLD_DEFLATE,
    Compression.ZSTD,
)


@dataclass(frozen=True, kw_only=True)
class Header:
    """Where and how a file stores its pixels."""

    crs: rasterio.CRS | None
    transform: Affine
    shape: tuple[int, int]
    """Height and width in pixels."""
    dtype: np.dtype[Any]
    """uint8 or uint16, in the file's byte order."""
    nodata: float | None
    block: tuple[int, int]
    """Height and width of a tile, or of a strip."""
    compression: Compression
    is_delta: bool
    """Pixels are stored as differences from their left neighbours: TIFF's predictor 2."""
    offsets: Int64
    """Position of each tile in the file: int64 [row of tiles, column of tiles]."""
    sizes: Int64
    """Bytes of each tile: int64 [row of tiles, column of tiles]. Missing tiles have position 0 and
    no bytes."""


class _Tag(IntEnum):
    """Fields of a TIFF directory (TIFF 6.0, GeoTIFF 1.1, GDAL)."""

    KIND = 254
    WIDTH = 256
    HEIGHT = 257
    BITS = 258
    COMPRESSION = 259
    COLOURS = 262
    BIT_ORDER = 266
    STRIP_OFFSETS = 273
    SAMPLES = 277
    STRIP_ROWS = 278
    STRIP_SIZES = 279
    PLANES = 284
    PREDICTOR = 317
    TILE_WIDTH = 322
    TILE_HEIGHT = 323
    TILE_OFFSETS = 324
    TILE_SIZES = 325
    NUMBERS = 339
    PIXEL_SIZE = 33550
    CORNER = 33922
    MATRIX = 34264
    GEO_KEYS = 34735
    METADATA = 42112
    NODATA = 42113
    LERC = 50674


_SIMPLE = {
    _Tag.KIND: (0,),
    _Tag.COLOURS: (1, 3),
    _Tag.BIT_ORDER: (1,),
    _Tag.SAMPLES: (1,),
    _Tag.PLANES: (1, 2),
    _Tag.NUMBERS: (1,),  # unsigned
    _Tag.PREDICTOR: (1, 2),
}
"""Field -> its values in files that are read here. All may be missing."""
_MASK = 4  # bit of `KIND`
_PROJECTED_CRS = 3072
_SIMPLE_KEYS = {1024: (1,), 1025: (1,), 1026: None, 2049: None, 2054: (9102,), 3076: (9001,)}
"""Key of GeoTIFF -> values of a projected system with an EPSG code, in metres, whose pixels are
areas. None: any text."""


def read_header(directories: Directories, most_px: int) -> Header | None:
    """Read the header of a TIFF file; None if the file is left to GDAL.

    GDAL reads all files whose place or pixels are described in a less common way, and files with
    more than `most_px` pixels.
    """
    if not directories.is_whole or not directories.found:
        return None
    try:
        header = _read_header(*directories.found)
    except (KeyError, TypeError, ValueError, ArithmeticError, rasterio.errors.CRSError):
        return None
    if header and max(math.prod(header.shape), math.prod(header.block)) > most_px:
        return None
    return header


def _read_header(directory: Directory, *others: Directory) -> Header | None:
    """Read the first directory of a file.

    Raises KeyError, TypeError, ValueError, ArithmeticError or CRSError if it is not understood.
    """
    if any(_number(other, _Tag.KIND, 0) & _MASK for other in others):
        return None
    for tag, values in _SIMPLE.items():
        if _number(directory, tag, values[0]) not in values:
            return None
    if _Tag.MATRIX in directory.fields or b"OVERVIEWS" in directory.values(_Tag.METADATA).tobytes():
        return None
    shape = (_number(directory, _Tag.HEIGHT), _number(directory, _Tag.WIDTH))
    block, offsets, sizes = _read_blocks(directory, shape)
    compression = Compression(_number(directory, _Tag.COMPRESSION, Compression.PLAIN))
    place = _read_place(directory)
    if place is None:
        return None
    has_whole_blocks = _Tag.TILE_WIDTH in directory.fields
    is_compressed_twice = any(directory.values(_Tag.LERC).tolist()[1:2])
    if compression is Compression.LERC and (is_compressed_twice or not has_whole_blocks):
        return None
    dtype = {8: "u1", 16: "u2"}[_number(directory, _Tag.BITS)]
    nodata = directory.values(_Tag.NODATA).tobytes().rstrip(b"\0 ")
    if nodata and not _NODATA.fullmatch(nodata):
        return None
    return Header(
        crs=place[0],
        transform=place[1],
        shape=shape,
        dtype=np.dtype(f"{directory.order}{dtype}"),
        nodata=float(nodata) if nodata else None,
        block=block,
        compression=compression,
        is_delta=compression in _WITH_PREDICTOR and _number(directory, _Tag.PREDICTOR, 1) == 2,
        offsets=offsets,
        sizes=sizes,
    )


def _number(directory: Directory, tag: int, default: int | None = None) -> int:
    """Return the number of a field with one value. Raises KeyError if it has no such value."""
    values = directory.values(tag)
    if not len(values) and default is not None:
        return default
    if len(values) != 1 or values.dtype.kind != "u":
        raise KeyError(tag)
    return int(values[0])


def _read_blocks(
    directory: Directory, shape: tuple[int, int]
) -> tuple[tuple[int, int], Int64, Int64]:
    """Read the size of tiles or strips, and the position and bytes of each."""
    height, width = shape
    if _Tag.TILE_WIDTH in directory.fields:
        block = (_number(directory, _Tag.TILE_HEIGHT), _number(directory, _Tag.TILE_WIDTH))
        if block[0] % _TILE_STEP_PX or block[1] % _TILE_STEP_PX:
            raise ValueError(f"expected sides of tiles in multiples of {_TILE_STEP_PX}")
        tags = (_Tag.TILE_OFFSETS, _Tag.TILE_SIZES)
    else:
        block = (min(_number(directory, _Tag.STRIP_ROWS, height), height), width)
        tags = (_Tag.STRIP_OFFSETS, _Tag.STRIP_SIZES)
    tiles = (-(-height // block[0]), -(-width // block[1]))
    if not 0 < math.prod(tiles) <= _MOST_TILES:
        raise ValueError(f"expected 1 to {_MOST_TILES} tiles")
    offsets, sizes = (directory.values(tag).reshape(tiles) for tag in tags)
    if offsets.itemsize < 2 or offsets.max() > _LAST_BYTE or sizes.max() > _LAST_BYTE:
        raise ValueError("expected the positions and bytes of tiles")
    return block, offsets.astype(np.int64), sizes.astype(np.int64)


def _read_place(directory: Directory) -> tuple[rasterio.CRS, Affine] | None:
    """Read where the pixels are; None if this is described in a less common way."""
    (version, _, _, count), *keys = directory.values(_Tag.GEO_KEYS).reshape(-1, 4).tolist()
    if version != 1 or count != len(keys):
        return None
    codes = []
    for key, location, _, value in keys:
        if key == _PROJECTED_CRS and location == 0:
            codes.append(value)
            continue
        values = _SIMPLE_KEYS[key]  # KeyError: an unusual key
        if values and (location or value not in values):
            return None
    x_size, y_size, _ = directory.values(_Tag.PIXEL_SIZE).tolist()
    column, row, _, x, y, _ = directory.values(_Tag.CORNER).tolist()
    if len(codes) != 1 or column or row or not (x_size > 0 and y_size > 0):
        return None
    return _crs_of(codes[0]), Affine(x_size, 0, x, 0, -y_size, y)


@functools.cache
def _crs_of(epsg: int) -> rasterio.CRS:
    return rasterio.CRS.from_epsg(epsg)
