"""The one way pixels are read: one asset onto one grid, in its own pixels wherever they fall on the grid.

`read` trusts the file, never the item. A file of the grid's zone whose pixels are the grid's, or whole multiples of them,
is read as a plain window (a 20 m pixel is repeated, not interpolated); anything else, above all a scene of the
neighbouring UTM zone, is warped. A read that fails raises: an error never becomes a zero.

All of stackstac stays in this module. It is called in the only mode in which it was found correct pixel for pixel:
explicit epsg, resolution and bounds, pixel-centre coordinates, no rescaling, integers with 0 as fill, on items that
carry nothing but hrefs, so that no metadata can shift or drop a read.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
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
from odc.geo.geobox import GeoBox
from rasterio.enums import Resampling
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window

from minecube.catalog import SCL
from minecube.errors import ReadError

UInt16 = npt.NDArray[np.uint16]
_SAME = 1e-3  # corners that agree to a thousandth of a pixel are the same corner: they are whole metres in UTM
_SAME_SIZE = 1e-6  # pixel sizes must agree far better: the difference adds up over 10980 pixels


def stack(items: Sequence[pystac.Item], grid: GeoBox, bands: Sequence[str], *, chunk_px: int = 512) -> xr.DataArray:
    """The lazy view of scenes on a grid, one time step per item in the order given.

    Args:
        items: normalised scenes (`minecube.scenes`) of one source, any UTM zone.
        grid: where the pixels go; its own resolution, whatever the files'.
        bands: band names, or SCL, in the order wanted.
        chunk_px: side of a Dask chunk.

    Returns:
        uint16 [time, band, y, x]: surface reflectance x 10000 with the offset removed, valid pixels >= 1, 0 = no data;
        SCL as its class numbers. Coordinates: `id` and `offset` per time, pixel centres for y and x, `spatial_ref`.

    Raises:
        ReadError: no items, or items of sources that are read differently; when computed, a pixel that cannot be read.
    """
    if not items:
        raise ReadError("no scenes to stack; expected at least one item")
    options = {(i.properties["minecube:prefix"], tuple(sorted(i.properties["minecube:gdal"].items()))) for i in items}
    if len(options) > 1:
        raise ReadError("scenes of different sources in one stack; they are opened in different ways, so stack each alone")
    prefix, gdal = options.pop()
    offsets = np.array([i.properties["minecube:offset"] for i in items], dtype=np.int32)
    layers = {}
    for names, resampling in (([b for b in bands if b != SCL], Resampling.bilinear), ([SCL], Resampling.nearest)):
        wanted = [b for b in names if b in bands]
        if wanted:
            light = [_light(item, wanted, grid, prefix) for item in items]
            raw = _stackstac(light, wanted, grid, resampling, chunk_px, dict(gdal))
            shift = da.from_array(offsets[:, None, None, None], chunks=(1, -1, -1, -1))
            pixels = raw if wanted == [SCL] else da.map_blocks(remove_offset, raw, shift, dtype=np.uint16)
            layers.update({b: pixels[:, k] for k, b in enumerate(wanted)})
    data = da.stack([layers[b] for b in bands], axis=1)
    coords: dict[str, Any] = {
        **odc.geo.xr.xr_coords(grid),
        "time": ("time", np.array([i.datetime.replace(tzinfo=None) for i in items if i.datetime], dtype="datetime64[ns]")),
        "band": ("band", list(bands)),
        "id": ("time", [i.id for i in items]),
        "offset": ("time", offsets),
    }
    return xr.DataArray(data, dims=("time", "band", "y", "x"), coords=coords, name="reflectance")


def remove_offset(raw: UInt16, offset: npt.NDArray[np.int32] | int) -> UInt16:
    """Digital numbers with BOA_ADD_OFFSET added: uint16, valid pixels at least 1, nodata 0 stays 0.

    Through int32, since uint16 would wrap: a dark 900 with offset -1000 must become 1, not 65436.
    """
    shifted = np.clip(raw.astype(np.int32) + offset, 1, 65535)
    return np.where(raw == 0, 0, shifted).astype(np.uint16)


def read(href: str, grid: GeoBox, resampling: Resampling = Resampling.nearest) -> UInt16:
    """One single-band file on the grid: uint16 (y, x), 0 where the file has nothing.

    Files in the grid's zone whose pixels nest in the grid are read without resampling; `resampling` is for the rest.

    Raises:
        ReadError: the file is missing, truncated, has several bands or is not of unsigned integers up to 16 bits.
    """
    try:
        with rasterio.open(href, sharing=False) as src:
            if src.count != 1 or src.dtypes[0] not in ("uint8", "uint16"):
                found = f"{src.count} of {src.dtypes[0]}"
                raise ReadError(f"{_shown(href)}: expected one band of uint8 or uint16, found {found}; not a Sentinel-2 band")
            native = _nested(src, grid)
            return _read_nested(src, grid, *native) if native else _warp(src, grid, resampling)
    except rasterio.errors.RasterioError as error:
        raise ReadError(
            f"{_shown(href)}: cannot be read ({_shown(str(error.__cause__ or error))}); its pixels would be missing from the "
            "composite, so the site-year is not written; check that the file is there and whole, then run again"
        ) from error


class NativeReader:
    """stackstac's reader protocol over `read`: a window of a stack is a window of the grid.

    Nothing is kept open between reads, so a reader may be used from any thread and pickled; each asset is read once a
    block anyway.
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
        gdal_env: Mapping[str, str],
        errors_as_nodata: tuple[Exception, ...] = (),
    ) -> None:
        self.url, self.spec, self.resampling, self.gdal = url, spec, resampling, gdal_env
        if (dtype, fill_value, scale_offset, errors_as_nodata) != (np.dtype("uint16"), 0, (1, 0), ()):
            raise ReadError("stackstac must be called with dtype uint16, fill_value 0, rescale False and no errors_as_nodata")

    def read(self, window: Window, **_: Any) -> UInt16:
        """The window of the grid, uint16 (y, x); raises ReadError."""
        spec = self.spec
        corner = spec.transform @ Affine.translation(window.col_off, window.row_off)
        with rasterio.Env(**self.gdal):
            return read(self.url, GeoBox((window.height, window.width), corner, spec.epsg), self.resampling)

    def close(self) -> None:
        """Nothing is held open."""


def _stackstac(
    items: list[dict[str, Any]], bands: list[str], grid: GeoBox, resampling: Resampling, chunk_px: int, gdal: dict[str, str]
) -> da.Array:
    with _STACKSTAC_LOCK:
        stacked = stackstac.stack(
            items,
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
            errors_as_nodata=(),  # its default turns a missing file into zeros
            properties=False,
            band_coords=False,
            gdal_env=gdal,
            reader=NativeReader,
        )
    expected = (len(items), len(bands), *grid.shape)
    same = stacked.shape == expected and np.array_equal(stacked.x, grid.coordinates["x"].values)
    if not (same and np.array_equal(stacked.y, grid.coordinates["y"].values)):
        raise ReadError(f"stackstac laid out {stacked.shape}, expected {expected} on the grid's coordinates")
    return stacked.data


_STACKSTAC_LOCK = threading.Lock()  # it caches projections in plain dictionaries


def _light(item: pystac.Item, bands: list[str], grid: GeoBox, prefix: str) -> dict[str, Any]:
    """What stackstac is shown of an item: hrefs, and the grid itself as its place, so that it neither skips nor drops."""
    for band in bands:
        if band not in item.assets:
            raise ReadError(f"scene {item.id}: no asset for {band}; it has {', '.join(sorted(item.assets))}")
    place = {"proj:epsg": grid.crs.epsg, "proj:bbox": list(grid.boundingbox)}
    when = item.datetime.isoformat() if item.datetime else None
    # GDAL's own name for S3: rasterio would look for boto3 first.
    hrefs = {band: re.sub("^s3://", "/vsis3/", item.assets[band].href) for band in bands}
    assets = {band: {"href": prefix + href} for band, href in hrefs.items()}
    return {"id": item.id, "properties": {"datetime": when, **place}, "assets": assets}


def _nested(src: rasterio.DatasetReader, grid: GeoBox) -> tuple[int, int, int] | None:
    """How the file's pixels nest in the grid: (grid pixels per file pixel, x and y distance of the corners in grid pixels)."""
    t, size = src.transform, abs(grid.resolution.x)
    if src.crs is None or grid.crs != src.crs or t.b or t.d or not np.isclose(t.a, -t.e):
        return None
    ratio, dx, dy = t.a / size, (grid.transform.c - t.c) / size, (t.f - grid.transform.f) / size
    whole, left, top = round(ratio), round(dx), round(dy)
    if whole < 1 or abs(ratio - whole) > _SAME_SIZE or abs(dx - left) > _SAME or abs(dy - top) > _SAME:
        return None
    return whole, left, top


def _read_nested(src: rasterio.DatasetReader, grid: GeoBox, ratio: int, dx: int, dy: int) -> UInt16:
    height, width = grid.shape
    out = np.zeros((height, width), dtype=np.uint16)
    # First and last file pixel, both cut to the file: boundless reads would fill with whatever nodata the file declares.
    x0, x1 = max(dx // ratio, 0), min(-(-(dx + width) // ratio), src.width)
    y0, y1 = max(dy // ratio, 0), min(-(-(dy + height) // ratio), src.height)
    if x0 >= x1 or y0 >= y1:
        return out
    pixels = _zero_nodata(src.read(1, window=Window(x0, y0, x1 - x0, y1 - y0)), src.nodata)
    pixels = pixels.repeat(ratio, axis=0).repeat(ratio, axis=1)
    top, left = y0 * ratio - dy, x0 * ratio - dx  # where the first file pixel falls on the grid; negative: cut
    pixels = pixels[max(-top, 0) :, max(-left, 0) :][: height - max(top, 0), : width - max(left, 0)]
    out[max(top, 0) :, max(left, 0) :][: pixels.shape[0], : pixels.shape[1]] = pixels
    return out


def _warp(src: rasterio.DatasetReader, grid: GeoBox, resampling: Resampling) -> UInt16:
    if src.crs is None:
        raise ReadError(f"{_shown(src.name)}: the file has no CRS, so its pixels cannot be placed on the grid")
    height, width = grid.shape
    # How many source pixels a target pixel looks at. GDAL guesses it from the bounding box of the window, so that the same
    # pixel differs by hundreds from window to window (its warp option XSCALE; "may vary among chunks").
    scale = str(abs(src.transform.a) / abs(grid.resolution.x))
    # Pixels by which a position may be off; GDAL's default is an eighth. Nearest is exact, so that the mask does not depend on
    # the window; bilinear is off by less than a rounding step, exact would take four times as long.
    tolerance = 1e-9 if resampling is Resampling.nearest else 1e-3
    with WarpedVRT(
        src,
        crs=grid.crs.to_wkt(),
        transform=grid.transform,
        height=height,
        width=width,
        resampling=resampling,
        src_nodata=src.nodata or 0,
        nodata=0,
        dtype=src.dtypes[0],
        XSCALE=scale,
        YSCALE=scale,
        tolerance=tolerance,
    ) as vrt:
        warped: UInt16 = vrt.read(1).astype(np.uint16)
    return warped


def _zero_nodata(pixels: npt.NDArray[Any], nodata: float | None) -> UInt16:
    if nodata:
        pixels = np.where(pixels == nodata, 0, pixels)
    return pixels.astype(np.uint16, copy=False)


def _shown(href: str) -> str:
    """An href without its query, which may hold a signature that must not reach a log, and without a GDAL prefix."""
    return re.sub(r"\?[^\s'\"]*", "", re.sub(r"/vsicurl\?\S*?url=", "", href))
