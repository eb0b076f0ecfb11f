"""Read windows of GeoTIFFs tile by tile: fetched, checked and decoded into place.

The files do not pass through GDAL. GDAL takes a third longer, and reads some tiles with false
checksums as pixels. libdeflate verifies the checksum of each DEFLATE tile, and LERC its own. ZSTD
tiles rarely have one, LZW and plain tiles never. A tile with another number of pixels than its
header declares is an error, too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import imagecodecs
import numpy as np

from minecube.arrays import AnyArray, UInt16
from minecube.reader.geotiff import Compression, Header

Fetch = Callable[[int, int], bytes]
"""Returns the bytes at a position and of a length. Raises RequestError if it cannot."""
_DECODERS: dict[Compression, Callable[..., Any]] = {
    Compression.PLAIN: lambda stored, out: stored[: out.nbytes],
    Compression.LZW: imagecodecs.lzw_decode,
    Compression.DEFLATE: imagecodecs.deflate_decode,
    Compression.OLD_DEFLATE: imagecodecs.deflate_decode,
    Compression.LERC: imagecodecs.lerc_decode,
    Compression.ZSTD: imagecodecs.zstd_decode,
}
"""Functions of stored bytes and `out`, an array to decode into."""
_ERRORS = (RuntimeError, ValueError)  # each codec has its own kind of RuntimeError
_GAP_BYTES = 4096
"""Longest gap between tiles of one request. The tiles of COGs have gaps of 8 bytes."""
_REQUEST_BYTES = 2**24
"""Most bytes of one request for several tiles. A longer one could not end in time on a slow line."""
_MOST_DN = 32767
"""Higher numbers are no reflectance: no ground or cloud is brighter. Numbers near 65535 are negative
reflectance wrapped by uint16. Products call 65535 itself SATURATED (MTD_MSIL2A.xml)."""


class DamagedTileError(Exception):
    """A tile that cannot be decoded, or has a false checksum or size."""


class TiledImage:
    """An open GeoTIFF, read by its tiles."""

    def __init__(self, header: Header, fetch: Fetch) -> None:
        self.crs = header.crs
        self.transform = header.transform
        self.height, self.width = header.shape
        self.block = header.block
        self.wrapped = 0
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
            self.wrapped += clear_invalid(target, self._header.nodata)
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
        if header.compression is not Compression.LERC:
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


def clear_invalid(pixels: UInt16, nodata: float | None) -> int:
    """Set nodata and numbers out of range to 0, in place; return the count of the latter."""
    if nodata:
        pixels[pixels == nodata] = 0
    if pixels.max() <= _MOST_DN:
        return 0
    wrapped = pixels > _MOST_DN
    pixels[wrapped] = 0
    return int(np.count_nonzero(wrapped))
