"""Read one file onto a grid, or fail with the reason.

The file is trusted, not its item. GDAL opens only files allowed by `minecube.network` and
`minecube.images`. A failed read raises: an error never becomes a zero.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import rasterio
from affine import Affine
from odc.geo.geobox import GeoBox
from rasterio.enums import Resampling

from minecube import images
from minecube.arrays import UInt16
from minecube.catalog import Access
from minecube.errors import LostReadError, ReadError, UnusableFileError
from minecube.grid import TileEdges
from minecube.network import (
    ForbiddenError,
    MissingError,
    RequestError,
    check_href,
    is_local,
    local_path,
    origin_of,
    remove_query,
)
from minecube.reader.gdal_file import GdalImage, RemoteFile, open_remote
from minecube.reader.geotiff import read_header
from minecube.reader.gridding import Image, copy_to, has_crs_of, nesting_of, read_nested, warp
from minecube.reader.remote import HEAD_BYTES, Remote, remote_for
from minecube.reader.tiles import DamagedTileError, TiledImage
from minecube.reader.transfer import Tally

PLAIN = Access()
"""Access without signatures."""
# UnicodeError: rasterio fails to decode some of GDAL's messages about damaged headers.
_READ_ERRORS = (rasterio.errors.RasterioError, RequestError, DamagedTileError, UnicodeError)
_MOST_PX = 10_980**2  # pixels of a band of a Sentinel-2 tile at 10 m


@dataclass(frozen=True)
class File:
    """A file and its access."""

    href: str
    """Local path, or file://, http(s):// or s3:// URL."""
    access: Access = PLAIN
    """Signing of requests."""
    origin: str | None = None
    """Host of the catalogue listing the file, empty for a local one; None if the caller vouches
    for the href."""


def read(
    href: str,
    grid: GeoBox,
    resampling: Resampling = Resampling.nearest,
    access: Access | None = None,
    tally: Tally | None = None,
    origin: str | None = None,
) -> UInt16:
    """Read one single-band file onto the grid: uint16 (y, x), 0 at invalid pixels.

    See `read_file` for pixels and errors, and `File` for `href`, `access` and `origin`. By default,
    requests are unsigned, and the caller vouches for the href.
    """
    return read_file(File(href, access or PLAIN, origin), grid, resampling, tally)


def read_file(
    file: File,
    grid: GeoBox,
    resampling: Resampling,
    tally: Tally | None = None,
    out: UInt16 | None = None,
) -> UInt16:
    """Read one single-band file onto the grid: uint16 (y, x), 0 at invalid pixels.

    Invalid pixels are 0, the file's nodata, pixels hidden by its mask, and numbers above 32767.
    Resampling uses valid pixels only. A resampled pixel is 0 if the file's pixel at its centre is
    invalid. Overviews are not read. Files in the grid's zone with pixels nested in the grid are
    read without resampling.

    `tally` counts requests, bytes and numbers above 32767. The pixels are put into `out` if given,
    which avoids a copy.

    Raises:
        ReadError: The href must not be read. The file is missing, truncated, no GeoTIFF or JPEG
            2000, or larger than a Sentinel-2 tile. It has several bands, or is not of unsigned
            integers up to 16 bits.
    """
    tally = tally or Tally()
    with _open_placed(file, tally) as image:
        nesting = nesting_of(image, grid)
        if nesting:
            pixels = read_nested(image, grid, nesting, out)
        else:
            with rasterio.Env(**images.SETTINGS):
                pixels = copy_to(warp(image, grid, resampling), out)
        tally.wrapped = image.wrapped
        return pixels


def find_tiles(file: File, grid: GeoBox, tally: Tally) -> tuple[TileEdges, TileEdges] | None:
    """Return the edges of a file's rows and columns of tiles.

    None in another CRS than the grid's, or if rows do not go south and columns east.

    Raises as `read_file` does.
    """
    with _open_placed(file, tally) as image:
        if not has_crs_of(image, grid):
            return None
        t = ~grid.transform @ image.transform
        if t.b or t.d or min(t.a, t.e) <= 0:  # rotated, or stored from the bottom up
            return None
        height, width = image.block
        rows = TileEdges(t.f, t.f + t.e * image.height, t.e * height)
        return rows, TileEdges(t.c, t.c + t.a * image.width, t.a * width)


@contextmanager
def _open_placed(file: File, tally: Tally) -> Iterator[Image]:
    """Open an image with a place within a context; any failure there raises ReadError."""
    name = remove_query(file.href)
    try:
        with _open(file, name, tally) as image:
            _need_place(image, name)
            yield image
    except ForbiddenError as error:
        raise ReadError(
            f"{name}: is not read ({error}), so its site-year is not written; replace the file"
        ) from error
    except _READ_ERRORS as error:
        raise _make_error(file.href, error, tally) from error


def _need_place(image: Image, name: str) -> None:
    """Raise ReadError if the header does not tell where the pixels are."""
    missing = ""
    if image.crs is None:
        missing = "CRS"
    elif not _is_plausible(image.transform):
        missing = "valid transform"
    if missing:
        raise ReadError(
            f"{name}: the file has no {missing}, "
            "so its pixels cannot be placed on the grid; replace the file"
        )


def _is_plausible(transform: Affine) -> bool:
    """Whether pixels have a size and a place, in any unit. Arithmetic overflows with others."""
    has_place = all(abs(number) < 1e15 for number in transform)
    return has_place and 1e-20 < abs(transform.determinant) < 1e20


def _make_error(href: str, error: Exception, tally: Tally) -> ReadError:
    """Build the error of a failed read: lost if another try may succeed, else gone."""
    cause: BaseException = error
    if tally.error:
        cause = tally.error
    elif isinstance(error, rasterio.errors.RasterioError):
        cause = error.__cause__ or error
    message = (
        f"{remove_query(href)}: cannot be read ({remove_query(str(cause))}), "
        "so its site-year is not written; check that the file is there and whole, then run again"
    )
    if isinstance(cause, RequestError) and not isinstance(cause, MissingError):
        return LostReadError(message)
    return UnusableFileError(message, href)


@contextmanager
def _open(file: File, name: str, tally: Tally) -> Iterator[Image]:
    """Open an image within a context, after checking its href and its first bytes."""
    origin = origin_of(file.href) if file.origin is None else file.origin
    check_href(file.href, origin, file.access.hosts())
    if is_local(file.href):
        opened = _open_local(Path(local_path(file.href)), name, tally)
    else:
        opened = _open_remote(remote_for(file.access, origin), file.href, name, tally)
    with opened as image:
        yield image


@contextmanager
def _open_local(path: Path, name: str, tally: Tally) -> Iterator[Image]:
    """Open a local image. Raises RequestError if the file changes within the context."""
    with _open_bytes(path) as stored:
        before = os.fstat(stored.fileno())
        read_at = partial(_read_at, stored)
        head = read_at(0, HEAD_BYTES)

        def read_header_at(start: int, length: int) -> bytes:
            if start + length <= len(head):
                return head[start : start + length]
            return read_at(start, length)

        def fetch(start: int, length: int) -> bytes:
            _need_within(start, length, before.st_size)
            content = read_at(start, length)
            tally.bytes += len(content)
            if len(content) < length:
                raise RequestError(
                    f"expected {length:,} bytes at {start:,}, found {len(content):,}"
                )
            return content

        try:
            header = read_header(_need_directories(read_header_at, before.st_size), _MOST_PX)
            if header is None:
                with (
                    rasterio.Env(**images.SETTINGS),
                    images.open_image(str(path), head, most_px=_MOST_PX) as opened,
                ):
                    yield _open_in_gdal(opened, name, tally)
            else:
                yield TiledImage(header, fetch)
        finally:
            after = os.fstat(stored.fileno())
            if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                raise RequestError("the file changed while it was read")


@contextmanager
def _open_remote(remote: Remote, href: str, name: str, tally: Tally) -> Iterator[Image]:
    head = remote.head(href, tally)
    open_again = partial(RemoteFile, remote, href, head, tally)

    def fetch(start: int, length: int) -> bytes:
        _need_within(start, length, head.size)
        return remote.fetch(href, head, start, length, tally)

    directories = _need_directories(partial(_read_at, open_again()), head.size)
    header = read_header(directories, _MOST_PX)
    if tally.error:  # zeros replace missing bytes
        raise RequestError(str(tally.error)) from tally.error
    if header is None:
        open_name = partial(images.open_image, beginning=head.data, most_px=_MOST_PX)
        with (
            rasterio.Env(**images.SETTINGS),
            open_remote(open_again, head.size, open_name) as opened,
        ):
            yield _open_in_gdal(opened, name, tally)
    else:
        yield TiledImage(header, fetch)


def _read_at(file: RemoteFile | BinaryIO, start: int, length: int) -> bytes:
    try:
        file.seek(start)
        return file.read(length)
    except OSError as error:
        raise RequestError(error.strerror or str(error)) from error


def _need_within(start: int, length: int, size: int) -> None:
    if start + length > size:
        raise MissingError(f"it ends after {size:,} bytes, before the tiles that its header names")


def _open_in_gdal(image: rasterio.DatasetReader, name: str, tally: Tally) -> Image:
    if image.count != 1 or image.dtypes[0] not in ("uint8", "uint16"):
        raise ReadError(
            f"{name}: expected one band of uint8 or uint16, "
            f"found {image.count} of {image.dtypes[0]}; not a Sentinel-2 band"
        )
    return GdalImage(image, tally)


def need_header(file: File) -> None:
    """Check that a file exists and does not end within its header.

    Requests the first bytes of a remote file; reads need these anyway.

    Raises:
        MissingError: The file is missing, empty or cut.
        RequestError: This cannot be checked now.
        ForbiddenError: The file must not be read.
    """
    if is_local(file.href):
        with _open_bytes(Path(local_path(file.href))) as stored:
            _need_directories(partial(_read_at, stored), os.fstat(stored.fileno()).st_size)
    else:
        head = remote_for(file.access, file.origin or "").head(file.href, Tally())
        _need_directories(partial(_read_at, io.BytesIO(head.data)), head.size)


def _open_bytes(path: Path) -> BinaryIO:
    """Open a local file.

    Raises MissingError if the file is missing, RequestError if it cannot be opened.
    """
    try:
        if not path.is_file() and path.exists():
            raise ForbiddenError("expected a file, found something else")
        return path.open("rb", buffering=0)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingError(error.strerror or str(error)) from error
    except OSError as error:
        raise RequestError(error.strerror or str(error)) from error


def _need_directories(read_at: Callable[[int, int], bytes], size: int) -> images.Directories:
    """Find the directories of a file. Raises MissingError if it is empty or ends within them."""
    directories = images.find_directories(read_at, size)
    if not directories.is_cut:
        return directories
    if not size:
        raise MissingError("it is empty")
    raise MissingError(f"it ends after {size:,} bytes, before its header does")
