"""Read windows of GeoTIFFs tile by tile: fetched, checked and decoded into place.

The files do not pass through GDAL. GDAL takes a third longer, and reads some tiles with false
checksums as pixels. libdeflate verifies the checksum of each DEFLATE tile, and LERC its own. ZSTD
tiles rarely have one, LZW and plain tiles never. A tile with another number of pixels than its
header declares is an error, too.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import imagecodecs
import numpy as np
import rasterio
from affine import Affine
from rasterio.enums import MaskFlags
from rasterio.windows import Window

from minecube.arrays import AnyArray, Int64, UInt16
from minecube.images import Directories, Directory
from minecube.network import RequestError
from minecube.reader.transfer import Tally

Fetch = Callable[[int, int], bytes]
"""Returns the bytes at a position and of a length. Raises RequestError if it cannot."""
_LERC = 34887
_DECODERS: dict[int, Callable[..., Any]] = {
    1: lambda stored, out: stored[: out.nbytes],
    5: imagecodecs.lzw_decode,
    8: imagecodecs.deflate_decode,
    32946: imagecodecs.deflate_decode,
    50000: imagecodecs.zstd_decode,
    _LERC: imagecodecs.lerc_decode,
}
"""TIFF's number of a compression -> function of stored bytes and `out`, an array to decode into."""
_WITH_PREDICTOR = (5, 8, 32946, 50000)
_ERRORS = (RuntimeError, ValueError)  # each codec has its own kind of RuntimeError
_GAP_BYTES = 4096
"""Longest gap between tiles of one request. The tiles of COGs have gaps of 8 bytes."""
_REQUEST_BYTES = 2**24
"""Most bytes of one request for several tiles. A longer one could not end in time on a slow line."""
_TILE_STEP_PX = 16  # TIFF 6.0, section 15
_MOST_TILES = 2**19
_NODATA = re.compile(rb"nan|[-+]?[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?")
_LAST_BYTE = 2**60  # no file is longer
_MOST_DN = 32767  # higher numbers are defects and fill values: no ground or cloud is brighter


class DamagedTileError(Exception):
    """A tile that cannot be decoded, or has a false checksum or size."""


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
    compression: int
    """A key of `_DECODERS`."""
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
    compression = _number(directory, _Tag.COMPRESSION, 1)
    place = _read_place(directory)
    if place is None or compression not in _DECODERS:
        return None
    has_whole_blocks = _Tag.TILE_WIDTH in directory.fields
    is_compressed_twice = any(directory.values(_Tag.LERC).tolist()[1:2])
    if compression == _LERC and (is_compressed_twice or not has_whole_blocks):
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


class TiledImage:
    """An open GeoTIFF, read by its tiles."""

    def __init__(self, header: Header, fetch: Fetch) -> None:
        self.crs = header.crs
        self.transform = header.transform
        self.height, self.width = header.shape
        self._header = header
        self._fetch = fetch

    def read(self, rows: range, columns: range, out: UInt16 | None = None) -> UInt16:
        """Read a window within the image: uint16 [y, x], 0 at invalid pixels.

        The pixels are put into `out` if given.

        Raises:
            DamagedTileError: A tile cannot be decoded.
            RequestError: A tile cannot be fetched.
        """
        if out is None:
            out = np.empty((len(rows), len(columns)), np.uint16)
        buffer = np.empty(self._header.block, self._header.dtype)
        for place, stored in self._fetch_tiles(rows, columns):
            tile_rows, target_rows = _overlap(rows, place[0], self._header.block[0])
            tile_columns, target_columns = _overlap(columns, place[1], self._header.block[1])
            target = out[target_rows, target_columns]
            if stored is None:
                target[:] = 0
                continue
            tile = self._decode(stored, place[0], buffer)[tile_rows, : tile_columns.stop]
            if self._header.is_delta:
                tile = imagecodecs.delta_decode(tile, axis=-1, out=tile)
            target[:] = tile[:, tile_columns]
            clear_invalid(target, self._header.nodata)
        return out

    def _fetch_tiles(
        self, rows: range, columns: range
    ) -> Iterator[tuple[tuple[int, int], memoryview | None]]:
        """Yield the place of each tile of a window, and its stored bytes; None if it is missing.

        Tiles next to each other in the file are fetched together.
        """
        height, width = self._header.block
        places = itertools.product(
            range(rows.start // height, -(-rows.stop // height)),
            range(columns.start // width, -(-columns.stop // width)),
        )
        tiles = [_Tile(self._header, place) for place in places]
        groups: list[list[_Tile]] = []
        most_bytes = 2 * math.prod(self._header.block) * self._header.dtype.itemsize + _GAP_BYTES
        for tile in sorted(tiles, key=lambda tile: tile.start):
            if tile.start == tile.size == 0:
                yield tile.place, None
            elif not 0 < tile.size <= most_bytes:
                raise DamagedTileError(
                    f"expected a tile of 1 to {most_bytes:,} bytes, found {tile.size:,}"
                )
            elif groups and tile.follows(groups[-1]):
                groups[-1].append(tile)
            else:
                groups.append([tile])
        for group in groups:
            start = group[0].start
            stored = memoryview(self._fetch(start, group[-1].stop - start))
            for tile in group:
                yield tile.place, stored[tile.start - start : tile.stop - start]

    def _decode(self, stored: memoryview, row: int, buffer: AnyArray) -> AnyArray:
        """Decode a tile in this row of tiles: its values as stored, [y, x]."""
        header = self._header
        out = buffer
        if header.compression != _LERC:
            out = buffer.reshape(-1).view(np.uint8)
        try:
            decoded = _DECODERS[header.compression](stored, out=out)
            values = np.frombuffer(decoded, header.dtype).reshape(-1, header.block[1])
        except _ERRORS as error:
            raise DamagedTileError(f"a tile is damaged: {error}") from error
        height = header.block[0]
        rest = header.shape[0] - row * height
        if len(values) not in (height, rest):  # the last strip ends with the image
            raise DamagedTileError(f"expected a tile of {height} rows, found {len(values)}")
        return values.astype(header.dtype.newbyteorder("="), copy=False)


class GdalImage:
    """An open image, read through GDAL."""

    def __init__(self, image: rasterio.DatasetReader, tally: Tally) -> None:
        self.crs = image.crs
        self.transform = image.transform
        self.height, self.width = image.shape
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
        clear_invalid(pixels, self._image.nodata)
        if MaskFlags.per_dataset in self._image.mask_flag_enums[0]:
            pixels[self._image.read_masks(1, window=window) == 0] = 0
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
        height, width = self._image.block_shapes[0]
        for y in range(rows.start // height, -(-rows.stop // height)):
            for x in range(columns.start // width, -(-columns.stop // width)):
                size = self._image.get_tag_item(f"BLOCK_SIZE_{x}_{y}", "TIFF", bidx=1)
                self._tally.bytes += int(size or 0)


class _Tile:
    """A tile's place in its image and in its file."""

    def __init__(self, header: Header, place: tuple[int, int]) -> None:
        self.place = place
        self.start = int(header.offsets[place])
        self.size = int(header.sizes[place])
        self.stop = self.start + self.size

    def follows(self, group: list[_Tile]) -> bool:
        """Return whether the tile can be fetched together with those before it in the file."""
        is_near = 0 <= self.start - group[-1].stop <= _GAP_BYTES
        return is_near and self.stop - group[0].start <= _REQUEST_BYTES


def _overlap(window: range, number: int, length: int) -> tuple[slice, slice]:
    """Return the part of a tile within a window, and its part of the window."""
    start = number * length
    first = max(window.start, start)
    stop = min(window.stop, start + length)
    return slice(first - start, stop - start), slice(first - window.start, stop - window.start)


def clear_invalid(pixels: UInt16, nodata: float | None) -> None:
    """Set nodata and numbers out of range to 0, in place."""
    if nodata:
        pixels[pixels == nodata] = 0
    if pixels.max() > _MOST_DN:
        pixels[pixels > _MOST_DN] = 0
