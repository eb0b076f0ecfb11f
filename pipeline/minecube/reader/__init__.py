"""Pixel reader: one asset onto one grid, at its own pixels if they fit the grid.

A file is a GeoTIFF or JPEG 2000 at a local path, http(s):// or s3://. A failed read raises, or is
recorded as lost if the `Ledger` allows this. An error never becomes an unrecorded zero.

GeoTIFFs are read by their tiles, without GDAL. GDAL reads JPEG 2000 and unusual GeoTIFFs, and warps
the pixels that do not fit the grid.

One thread opens, reads and closes a file within one read. All threads share the header bytes and
the connections (`remote`), so nothing is requested twice.

    assets.py       one band of one scene, counted: `read_band`, `start_read`
    raster.py       one file, opened with care: `read`
    geotiff.py      its header, if it is usual
    tiles.py        its tiles, fetched, checked and decoded
    gridding.py     its pixels, placed on the grid or warped
    stacking.py     many scenes, lazily, by stackstac: `stack`
    ledger.py       counts of all reads
    remote.py       byte ranges of remote files, with retries
    signing.py      tokens and signatures
    connections.py  connections with checked addresses
    gdal_file.py    an image read through GDAL, and a remote file as GDAL sees it
    transfer.py     head of a file, and counts of one read
"""

from __future__ import annotations

from minecube.reader.assets import (
    READ_THREADS,
    find_common_tiles,
    find_missing,
    find_tile_rows,
    read_band,
    remove_offset,
    start_read,
    start_stored_read,
    wait_for,
)
from minecube.reader.ledger import Ledger
from minecube.reader.raster import read
from minecube.reader.remote import HEAD_BYTES, interruption
from minecube.reader.signing import check_credentials
from minecube.reader.stacking import NativeReader, compute_stack, stack

__all__ = [
    "HEAD_BYTES",
    "READ_THREADS",
    "Ledger",
    "NativeReader",
    "check_credentials",
    "compute_stack",
    "find_common_tiles",
    "find_missing",
    "find_tile_rows",
    "interruption",
    "read",
    "read_band",
    "remove_offset",
    "stack",
    "start_read",
    "start_stored_read",
    "wait_for",
]
