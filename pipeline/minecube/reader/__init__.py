"""Pixel reader: one asset onto one grid, at its own pixels if they fit the grid.

`read` trusts the file, not the item. A file in the grid's zone is read as a plain window if its
pixels are the grid's or whole multiples of them. A 20 m pixel is repeated, not interpolated. Any
other file is warped, typically a scene of the neighbouring UTM zone. A file is a GeoTIFF or JPEG
2000 at a local path, http(s):// or s3://. `remote` fetches the bytes of remote files.
`minecube.network` decides the allowed hrefs, `minecube.images` the files to open. A failed read
raises, or is recorded as lost if the `Ledger` allows this. An error never becomes an unrecorded
zero.

One thread opens, reads and closes a dataset within one read. All threads share the header bytes and
the connections (`remote`), so nothing is requested twice.

All use of stackstac stays in this module. It is called in the only mode found correct for every
pixel. This mode has explicit epsg, resolution and bounds, pixel-centre coordinates, no rescaling,
and integers with fill 0. The items contain only names. So no metadata can shift or drop a read, and
no graph contains a URL.
"""

from __future__ import annotations

import functools
import json
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
import odc.geo.xr
import pystac
import rasterio
import stackstac
import xarray as xr
from affine import Affine
from odc.geo.crs import CRS
from odc.geo.geobox import GeoBox
from rasterio.enums import MaskFlags, Resampling
from rasterio.io import MemoryFile
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform_bounds
from rasterio.windows import Window, from_bounds

from minecube import images
from minecube.catalog import SCL, Access
from minecube.errors import GoneError, LostReadError, ReadError
from minecube.network import (
    ForbiddenError,
    MissingError,
    RequestError,
    check_href,
    is_local,
    local_path,
    origin_of,
    without_query,
)
from minecube.reader.ledger import Ledger
from minecube.reader.remote import (
    HEAD,
    Head,
    Opened,
    Tally,
    check_credentials,
    interrupted,
    remote_for,
)

__all__ = [
    "HEAD",
    "READ_THREADS",
    "Asset",
    "Ledger",
    "NativeReader",
    "begin",
    "check_credentials",
    "fetched",
    "interrupted",
    "missing",
    "read",
    "read_band",
    "remove_offset",
    "stack",
]

READ_THREADS = 64
"""Simultaneous reads in a process. Reads wait for networks and disks, so the number is
independent of Dask's threads and the cores."""
LOCAL_THREADS = (os.cpu_count() or 1) + 1
"""Simultaneous reads of local files. They wait for a core, not for an answer. More would take
cores from the reducers."""
UInt16 = npt.NDArray[np.uint16]
_SAME = 1e-3  # pixels: corners this close are the same, as whole metres in UTM
_SAME_SIZE = 1e-6  # pixel sizes must agree better: errors add up over 10980 pixels


_PLAIN = Access()
_MOST_PX = 10_980**2  # pixels of a band of a Sentinel-2 tile at 10 m
_STRIP_PX = 2**23  # pixels of a file warped at once: 16 MB, a site of 29 km at 10 m
_MOST_DN = 32767  # higher numbers are defects and fill values: no ground or cloud is brighter


@dataclass(frozen=True)
class Asset:
    """One file of a scene and its access."""

    scene: str
    band: str
    href: str
    access: Access = _PLAIN
    origin: str | None = None
    """Host of the catalogue listing the file, empty for a local one; None if the caller vouches
    for the href."""

    @classmethod
    def of(cls, scene: pystac.Item, band: str) -> Asset:
        """Return the scene's file of a band.

        Raises ReadError if the file does not exist or must not be read.
        """
        if band not in scene.assets:
            raise ReadError(
                f"scene {scene.id}: no asset for {band}; it has {', '.join(sorted(scene.assets))}"
            )
        origin = scene.properties.get("minecube:origin")
        if not isinstance(origin, str):  # with None, the caller would vouch for the href
            raise ReadError(
                f"scene {scene.id}: expected the host of its catalogue in minecube:origin, found {origin!r}. Search again."
            )
        said = json.loads(scene.properties["minecube:access"])
        access = Access(**{**said, "credentials_for": tuple(said.get("credentials_for", ()))})
        asset = cls(scene.id, band, scene.assets[band].href, access, origin)
        try:
            check_href(asset.href, origin, access.hosts())
        except ForbiddenError as error:
            raise ReadError(
                f"scene {scene.id}: {band} is not read from {without_query(asset.href)}: {error}"
            ) from error
        return asset

    def read(
        self, grid: GeoBox, resampling: Resampling, ledger: Ledger | None, out: UInt16 | None = None
    ) -> UInt16:
        """Call `read` and count it in the ledger.

        A read lost with the ledger's permission returns uint16 zeros.
        """
        if ledger is None:
            return read(self.href, grid, resampling, self.access, out=out, origin=self.origin)
        tally, began = Tally(), time.perf_counter()
        try:
            pixels = read(self.href, grid, resampling, self.access, tally, out, self.origin)
        except ReadError as error:
            self._count(ledger, tally, began, lost_because=str(error))
            if not ledger.lossy or (ledger.copied and isinstance(error, GoneError)):
                raise
            return _put(np.zeros(grid.shape, dtype=np.uint16), out)
        self._count(ledger, tally, began)
        return pixels

    def _count(self, ledger: Ledger, tally: Tally, began: float, lost_because: str = "") -> None:
        ledger.add(
            self.scene,
            self.band,
            reason=lost_because,
            planned=1,
            read=0 if lost_because else 1,
            lost=1 if lost_because else 0,
            requests=tally.requests,
            retried=tally.retried,
            bytes=tally.bytes,
            seconds=time.perf_counter() - began,
        )


def stack(
    items: Sequence[pystac.Item],
    grid: GeoBox,
    bands: Sequence[str],
    *,
    chunk_px: int = 512,
    ledger: Ledger | None = None,
) -> xr.DataArray:
    """Stack scenes on a grid lazily, one time step per item in the given order.

    Args:
        items: Normalised scenes (`minecube.scenes`) of any sources and UTM zones.
        grid: Grid of the result. Its resolution may differ from the files'.
        bands: Band names, or SCL, in the wanted order.
        chunk_px: Side of a Dask chunk.
        ledger: Counts the reads made in this process.

    Returns:
        uint16 [time, band, y, x]: Surface reflectance x 10000 with the offset removed, valid pixels
        >= 1, 0 = no data. SCL as class numbers.
        Coordinates are `id` and `offset` per time, pixel centres for y and x, and `spatial_ref`.

    Raises:
        ReadError: There are no items, or one lacks a band. When computed: A pixel cannot be read.
    """
    if not items:
        raise ReadError("no scenes to stack; expected at least one item")
    offsets = np.array([i.properties["minecube:offset"] for i in items], dtype=np.int32)
    layers = {}
    for names, resampling in (
        ([b for b in bands if b != SCL], Resampling.bilinear),
        ([SCL], Resampling.nearest),
    ):
        wanted = [b for b in names if b in bands]
        if wanted:
            raw = _stackstac(items, wanted, grid, resampling, chunk_px, ledger)
            shift = da.from_array(offsets[:, None, None, None], chunks=(1, -1, -1, -1))
            pixels = (
                raw
                if wanted == [SCL]
                else da.map_blocks(remove_offset, raw, shift, dtype=np.uint16)
            )
            layers.update({b: pixels[:, k] for k, b in enumerate(wanted)})
    data = da.stack([layers[b] for b in bands], axis=1)
    coords: dict[str, Any] = {
        **odc.geo.xr.xr_coords(grid),
        "time": (
            "time",
            np.array(
                [i.datetime.replace(tzinfo=None) for i in items if i.datetime],
                dtype="datetime64[ns]",
            ),
        ),
        "band": ("band", list(bands)),
        "id": ("time", [i.id for i in items]),
        "offset": ("time", offsets),
    }
    return xr.DataArray(data, dims=("time", "band", "y", "x"), coords=coords, name="reflectance")


def read_band(
    scene: pystac.Item,
    band: str,
    grid: GeoBox,
    ledger: Ledger | None = None,
    out: UInt16 | None = None,
) -> UInt16:
    """Read one band of one scene onto a grid: uint16 [y, x].

    The result equals `stack`'s, but without a graph. It is put into `out` if given. A registration
    shift in `minecube:shift_m` (east and north) is applied.

    Raises:
        ReadError: The scene lacks this band, or its pixels cannot be read.
    """
    asset = Asset.of(scene, band)
    if shift := scene.properties.get("minecube:shift_m"):
        grid = GeoBox(grid.shape, Affine.translation(*shift) @ grid.transform, grid.crs)
    if band == SCL:
        return asset.read(grid, Resampling.nearest, ledger, out)
    raw = asset.read(grid, Resampling.bilinear, ledger, out)
    offset = scene.properties["minecube:offset"]
    return _put(remove_offset(raw, offset), out) if offset else raw


def begin(
    scene: pystac.Item,
    band: str,
    grid: GeoBox,
    ledger: Ledger | None = None,
    out: UInt16 | None = None,
) -> Future[UInt16]:
    """Start `read_band` on the process's shared threads: many for remote files, few for local
    ones."""
    far = band in scene.assets and not is_local(scene.assets[band].href)
    return _threads(READ_THREADS if far else LOCAL_THREADS).submit(
        read_band, scene, band, grid, ledger, out
    )


def fetched(stacked: xr.DataArray) -> UInt16:
    """Compute the pixels of a stack on the `READ_THREADS` threads shared by all stacks."""
    pixels: UInt16 = stacked.data.compute(scheduler="threads", pool=_threads(READ_THREADS))
    return pixels


@functools.cache
def _threads(n: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n, thread_name_prefix="minecube-read")


def remove_offset(raw: UInt16, offset: npt.NDArray[np.int32] | int) -> UInt16:
    """Add BOA_ADD_OFFSET to digital numbers: uint16, valid pixels at least 1, nodata 0 stays 0.

    Values are clipped before the addition, because uint16 would wrap. A dark 900 with offset -1000
    must become 1, not 65436.
    """
    down = np.clip(-np.asarray(offset, dtype=np.int32), -65534, 65534)
    low, high = (
        np.maximum(1 + down, 1).astype(np.uint16),
        np.minimum(65535 + down, 65535).astype(np.uint16),
    )
    shifted: UInt16 = np.clip(raw, low, high) - down.astype(
        np.uint16
    )  # negative `down` wraps, as the sum does
    shifted *= raw != 0
    return shifted


def read(
    href: str,
    grid: GeoBox,
    resampling: Resampling = Resampling.nearest,
    access: Access | None = None,
    tally: Tally | None = None,
    out: UInt16 | None = None,
    origin: str | None = None,
) -> UInt16:
    """Read one single-band file onto the grid: uint16 (y, x), 0 at invalid pixels.

    Invalid pixels are 0, the file's nodata, pixels hidden by its mask, and numbers above 32767.
    Resampling uses valid pixels only. A resampled pixel is 0 if the file's pixel at its centre is
    invalid. Overviews are not read. Files in the grid's zone with pixels nested in the grid are
    read without resampling.

    Args:
        href: Local path, or file://, http(s):// or s3:// URL.
        grid: Grid of the result.
        resampling: Method for files to be warped.
        access: Signing of requests. By default, requests are unsigned.
        tally: Counts requests and bytes.
        out: Array for the pixels, to avoid a copy. By default a new array.
        origin: Host of the catalogue listing the href, empty for a local one. By default the caller
            vouches for the href.

    Raises:
        ReadError: The href must not be read. The file is missing, truncated, no GeoTIFF or JPEG
            2000, or larger than a Sentinel-2 tile. It has several bands, or is not of unsigned
            integers up to 16 bits.
    """
    tally = tally or Tally()
    try:
        origin = origin_of(href) if origin is None else origin
        with rasterio.Env(**images.SETTINGS), _open(href, access or _PLAIN, origin, tally) as src:
            if src.count != 1 or src.dtypes[0] not in ("uint8", "uint16"):
                found = f"{src.count} of {src.dtypes[0]}"
                raise ReadError(
                    f"{without_query(href)}: expected one band of uint8 or uint16, found {found}; not a Sentinel-2 band"
                )
            native = _nested(src, grid)
            pixels = (
                _read_nested(src, grid, native, tally, out)
                if native
                else _put(_warp(src, grid, resampling, tally), out)
            )
            if tally.error:  # GDAL got zeros instead of missing bytes
                raise RequestError(str(tally.error)) from tally.error
            return pixels
    except ForbiddenError as error:
        name = without_query(href)
        raise ReadError(
            f"{name}: is not read ({error}), so its site-year is not written; replace the file"
        ) from error
    except (rasterio.errors.RasterioError, RequestError) as error:
        why = tally.error or (
            error if isinstance(error, RequestError) else error.__cause__ or error
        )
        message = (
            f"{without_query(href)}: cannot be read ({without_query(str(why))}), so its site-year is not written; check that "
            "the file is there and whole, then run again"
        )
        passing = isinstance(why, RequestError) and not isinstance(why, MissingError)
        raise (LostReadError(message) if passing else GoneError(message, href)) from error


def _open(href: str, access: Access, origin: str, tally: Tally) -> rasterio.DatasetReader:
    check_href(href, origin, access.hosts())
    if is_local(href):
        path = Path(local_path(href))
        return images.open_image(str(path), _first_bytes(path), most_px=_MOST_PX)
    source = remote_for(access, origin)
    head = source.head(href, tally)
    _need_whole(head)
    return images.open_image(
        "remote/image", head.data, most_px=_MOST_PX, opener=Opened(source, href, head, tally)
    )


def _first_bytes(path: Path) -> bytes:
    """Read the first bytes of a local file.

    Raises MissingError if the file is missing or cut, RequestError if it cannot be read.
    """
    try:
        if not path.is_file() and path.exists():
            raise ForbiddenError("expected a file, found something else")
        with path.open("rb") as file:

            def read_at(start: int, length: int) -> bytes:
                file.seek(start)
                return file.read(length)

            size = file.seek(0, os.SEEK_END)
            _need_header(read_at, size)
            return read_at(0, images.SIGNATURE)
    except MissingError:
        raise
    except OSError as error:
        kind = (
            MissingError
            if isinstance(error, FileNotFoundError | NotADirectoryError)
            else RequestError
        )
        raise kind(error.strerror or str(error)) from error


def _need_whole(head: Head) -> None:
    """Raise MissingError if a remote file is empty or ends within its header.

    Only its first bytes are checked.
    """
    _need_header(lambda start, length: head.data[start : start + length], head.size)


def _need_header(read_at: Callable[[int, int], bytes], size: int) -> None:
    if images.is_cut(read_at, size):
        raise MissingError(
            f"it ends after {size:,} bytes, before its header does" if size else "it is empty"
        )


def missing(scene: pystac.Item, bands: Sequence[str]) -> str:
    """Find the first of these bands with a missing, empty or cut file, and report the reason.

    Returns an empty text if no file is missing, or if this cannot be checked now. Requests the
    first bytes of each file; reads need these anyway.
    """
    asked = [_threads(READ_THREADS).submit(_missing, Asset.of(scene, band)) for band in bands]
    return next(
        (
            f"{band} is gone ({why})"
            for band, why in zip(bands, [a.result() for a in asked], strict=True)
            if why
        ),
        "",
    )


def _missing(asset: Asset) -> str:
    try:
        if is_local(asset.href):
            _first_bytes(Path(local_path(asset.href)))
        else:
            _need_whole(remote_for(asset.access, asset.origin or "").head(asset.href, Tally()))
    except MissingError as error:
        return str(error)
    except (RequestError, ForbiddenError):
        return ""
    return ""


class NativeReader:
    """stackstac's reader protocol over `read`: a window of a stack is a window of the grid.

    `stackstac.stack(items, reader=NativeReader, ...)` reads unsigned hrefs. For signed hrefs, pass
    `functools.partial(NativeReader, access=source.access)`. Files are closed after each read, so a
    reader can be pickled and used from any thread. Each asset is read only once per block anyway.

    Args:
        url: Href of the asset, or its name among `assets`.
        spec: Grid in stackstac's form.
        resampling: Method for files to be warped.
        dtype: Must be uint16.
        fill_value: Must be 0.
        scale_offset: Must be (1, 0).
        gdal_env: Not used.
        errors_as_nodata: Must be empty.
        access: Signing of requests.
        assets: Assets by name, for stacks of several sources.
        ledger: Counts the reads.
    """

    def __init__(
        self,
        *,
        url: str,
        spec: Any,
        resampling: Resampling,
        dtype: np.dtype[Any],
        fill_value: float,
        scale_offset: tuple[float, float],
        gdal_env: Any = None,
        errors_as_nodata: tuple[Exception, ...] = (),
        access: Access | None = None,
        assets: Mapping[str, Asset] | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        del gdal_env
        self.asset = (
            assets[url] if assets else Asset(scene="", band="", href=url, access=access or _PLAIN)
        )
        self.spec, self.resampling, self.ledger = spec, resampling, ledger
        if (dtype, fill_value, scale_offset, errors_as_nodata) != (
            np.dtype("uint16"),
            0,
            (1, 0),
            (),
        ):
            raise ReadError(
                "stackstac must be called with dtype uint16, fill_value 0, rescale False and no errors_as_nodata"
            )

    def read(self, window: Window, **_: Any) -> UInt16:
        """Read a window of the grid: uint16 (y, x); raise ReadError if it cannot be read."""
        spec = self.spec
        corner = spec.transform @ Affine.translation(window.col_off, window.row_off)
        return self.asset.read(
            GeoBox((window.height, window.width), corner, spec.epsg), self.resampling, self.ledger
        )

    def close(self) -> None:
        """Do nothing: no file is open."""


def _stackstac(
    items: Sequence[pystac.Item],
    bands: list[str],
    grid: GeoBox,
    resampling: Resampling,
    chunk_px: int,
    ledger: Ledger | None,
) -> da.Array:
    # stackstac gets only names, and the grid as each item's place. So it skips or drops no item.
    assets = {f"{n}/{band}": Asset.of(item, band) for n, item in enumerate(items) for band in bands}
    place = {"proj:epsg": grid.crs.epsg, "proj:bbox": list(grid.boundingbox)}
    light = [
        {
            "id": item.id,
            "properties": {
                "datetime": item.datetime.isoformat() if item.datetime else None,
                **place,
            },
            "assets": {band: {"href": f"{n}/{band}"} for band in bands},
        }
        for n, item in enumerate(items)
    ]
    with _STACKSTAC_LOCK:
        stacked = stackstac.stack(
            light,
            assets=bands,
            epsg=grid.crs.epsg,
            resolution=abs(grid.resolution.x),
            bounds=tuple(grid.boundingbox),
            snap_bounds=False,
            xy_coords="center",
            sortby_date=False,
            rescale=False,
            dtype=np.dtype("uint16"),
            fill_value=np.uint16(0),
            chunksize=chunk_px,
            resampling=resampling,
            errors_as_nodata=(),  # the default turns a missing file into zeros
            properties=False,
            band_coords=False,
            reader=functools.partial(NativeReader, assets=assets, ledger=ledger),
        )
    expected = (len(items), len(bands), *grid.shape)
    same = stacked.shape == expected and np.array_equal(stacked.x, grid.coordinates["x"].values)
    if not (same and np.array_equal(stacked.y, grid.coordinates["y"].values)):
        raise ReadError(
            f"stackstac laid out {stacked.shape}, expected {expected} on the grid's coordinates"
        )
    return stacked.data


_STACKSTAC_LOCK = threading.Lock()  # stackstac caches projections in plain dictionaries


@functools.lru_cache(256)
def _same_crs(wkt: str, crs: CRS) -> bool:
    """Compare two reference systems, cached: a comparison takes a tenth of a read."""
    return bool(crs == wkt)


def _nested(src: rasterio.DatasetReader, grid: GeoBox) -> tuple[int, int, int] | None:
    """Test if the file's pixels nest in the grid.

    Returns grid pixels per file pixel, and x and y distance of the corners in grid pixels. Returns
    None if the pixels do not nest.
    """
    t, size = src.transform, abs(grid.resolution.x)
    if (
        src.crs is None
        or not _same_crs(src.crs.to_wkt(), grid.crs)
        or t.b
        or t.d
        or abs(t.a + t.e) > _SAME_SIZE * size
    ):
        return None
    ratio, dx, dy = t.a / size, (grid.transform.c - t.c) / size, (t.f - grid.transform.f) / size
    whole, left, top = round(ratio), round(dx), round(dy)
    if (
        whole < 1
        or abs(ratio - whole) > _SAME_SIZE
        or abs(dx - left) > _SAME
        or abs(dy - top) > _SAME
    ):
        return None
    return whole, left, top


def _read_nested(
    src: rasterio.DatasetReader,
    grid: GeoBox,
    native: tuple[int, int, int],
    tally: Tally,
    out: UInt16 | None,
) -> UInt16:
    ratio, dx, dy = native
    height, width = grid.shape
    # First and last file pixel, cut to the file: boundless reads would fill with the file's nodata.
    x0, x1 = max(dx // ratio, 0), min(-(-(dx + width) // ratio), src.width)
    y0, y1 = max(dy // ratio, 0), min(-(-(dy + height) // ratio), src.height)
    if x0 >= x1 or y0 >= y1:
        return _put(np.zeros((height, width), dtype=np.uint16), out)
    window = Window(x0, y0, x1 - x0, y1 - y0)
    _count_stored(src, window, tally)
    whole = (
        ratio == 1
        and (window.height, window.width) == (height, width)
        and src.dtypes[0] == "uint16"
    )
    pixels = _valid(src, window, out if whole else None)
    if whole:
        return pixels
    pixels = pixels.repeat(ratio, axis=0).repeat(ratio, axis=1)
    top, left = y0 * ratio - dy, x0 * ratio - dx  # first file pixel on the grid; negative: cut
    pixels = pixels[max(-top, 0) :, max(-left, 0) :][: height - max(top, 0), : width - max(left, 0)]
    made = np.zeros((height, width), dtype=np.uint16)
    made[max(top, 0) :, max(left, 0) :][: pixels.shape[0], : pixels.shape[1]] = pixels
    return _put(made, out)


def _put(pixels: UInt16, out: UInt16 | None) -> UInt16:
    if out is None or out is pixels:
        return pixels
    out[:] = pixels
    return out


def _warp(
    src: rasterio.DatasetReader, grid: GeoBox, resampling: Resampling, tally: Tally
) -> UInt16:
    if src.crs is None:
        name = without_query(src.name)
        raise ReadError(
            f"{name}: the file has no CRS, so its pixels cannot be placed on the grid; replace the file"
        )
    _count_stored(src, _around(src, grid), tally)
    rows = _rows_per_strip(src, grid)
    warped = np.empty(grid.shape, dtype=np.uint16)
    for top in range(0, grid.shape[0], rows):
        strip = slice(top, min(top + rows, grid.shape[0]))
        warped[strip] = _warp_strip(src, grid[strip, :], resampling)
    return warped


def _rows_per_strip(src: rasterio.DatasetReader, grid: GeoBox) -> int:
    """Return the number of grid rows covered by about `_STRIP_PX` pixels of the file."""
    around = _around(src, grid)
    columns = min(around.width, src.width)
    rows_per_row = around.height / grid.shape[0]
    return max(int(_STRIP_PX / max(columns * rows_per_row, 1)), 1)


def _around(src: rasterio.DatasetReader, grid: GeoBox) -> Window:
    """Return the file's window around the grid."""
    return from_bounds(
        *transform_bounds(grid.crs.to_wkt(), src.crs, *grid.boundingbox), transform=src.transform
    )


def _warp_strip(src: rasterio.DatasetReader, grid: GeoBox, resampling: Resampling) -> UInt16:
    """Resample the file's own pixels, never its overviews.

    Averages in an overview may contain invalid pixels.
    """
    around = _around(src, grid)
    size = abs(grid.resolution.x) / abs(src.transform.a)
    reach = math.ceil(max(size, 1)) + 2  # pixels beyond the grid used for averages
    x0, x1 = (
        max(math.floor(around.col_off) - reach, 0),
        min(math.ceil(around.col_off + around.width) + reach, src.width),
    )
    y0, y1 = (
        max(math.floor(around.row_off) - reach, 0),
        min(math.ceil(around.row_off + around.height) + reach, src.height),
    )
    if x0 >= x1 or y0 >= y1:
        return np.zeros(grid.shape, dtype=np.uint16)
    window = Window(x0, y0, x1 - x0, y1 - y0)
    # Invalid pixels become nodata first: GDAL would average a defect with its neighbours.
    with MemoryFile() as memory:
        profile = {
            "driver": "GTiff",
            "count": 1,
            "dtype": "uint16",
            "crs": src.crs,
            "transform": src.window_transform(window),
        }
        with memory.open(**profile, width=window.width, height=window.height) as valid:
            valid.write(_valid(src, window), 1)
        with memory.open() as valid:
            return _on_grid(valid, grid, resampling)


def _on_grid(src: rasterio.DatasetReader, grid: GeoBox, resampling: Resampling) -> UInt16:
    """Resample an image to a grid: uint16 [y, x]. 0 is nodata in both."""
    height, width = grid.shape
    # Number of target pixels per source pixel. GDAL guesses it from the bounding box of the window,
    # so values of one pixel differ by hundreds between windows (warp option XSCALE; "may vary among
    # chunks").
    scale = str(abs(src.transform.a) / abs(grid.resolution.x))
    # Position error in pixels; GDAL's default is an eighth. Nearest is exact, to make the mask
    # independent of the window. Bilinear errs by less than a rounding step; exact positions would
    # take four times as long.
    tolerance = 1e-9 if resampling is Resampling.nearest else 1e-3
    with WarpedVRT(
        src,
        crs=grid.crs.to_wkt(),
        transform=grid.transform,
        height=height,
        width=width,
        resampling=resampling,
        src_nodata=0,
        nodata=0,
        dtype=src.dtypes[0],
        XSCALE=scale,
        YSCALE=scale,
        tolerance=tolerance,
    ) as vrt:
        warped: UInt16 = vrt.read(1).astype(np.uint16)
    return warped


def _valid(src: rasterio.DatasetReader, window: Window, out: UInt16 | None = None) -> UInt16:
    """Read the pixels of a window, with 0 at invalid pixels.

    These are nodata, pixels hidden by the file's mask and numbers out of range.
    """
    pixels: UInt16 = src.read(1, window=window, out=out).astype(np.uint16, copy=False)
    if src.nodata:
        pixels[pixels == src.nodata] = 0
    if MaskFlags.per_dataset in src.mask_flag_enums[0]:
        pixels[src.read_masks(1, window=window) == 0] = 0
    if pixels.max() > _MOST_DN:
        pixels[pixels > _MOST_DN] = 0
    return pixels


def _count_stored(src: rasterio.DatasetReader, window: Window, tally: Tally) -> None:
    """Count the stored bytes of a window of a local GeoTIFF: its compressed tiles."""
    if tally.bytes:
        return  # a remote file: its bytes are already counted
    height, width = src.block_shapes[0]
    x0, x1 = max(int(window.col_off), 0), min(int(window.col_off + window.width), src.width)
    y0, y1 = max(int(window.row_off), 0), min(int(window.row_off + window.height), src.height)
    for y in range(y0 // height, -(-y1 // height)):
        for x in range(x0 // width, -(-x1 // width)):
            tally.bytes += int(src.get_tag_item(f"BLOCK_SIZE_{x}_{y}", "TIFF", bidx=1) or 0)
