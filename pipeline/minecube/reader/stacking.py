"""Stack scenes lazily. All use of stackstac is here.

It is called in the only mode found correct for every pixel. This mode has explicit epsg, resolution
and bounds, pixel-centre coordinates, no rescaling, and integers with fill 0. The items contain only
names. So no metadata can shift or drop a read, and no graph contains a URL.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dask.array as da
import numpy as np
import odc.geo.xr
import pystac
import stackstac
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox
from rasterio.enums import Resampling
from rasterio.windows import Window

from minecube.arrays import UInt16
from minecube.catalog import SCL, Access
from minecube.errors import ReadError
from minecube.reader.assets import READ_THREADS, Asset, asset_of, remove_offset, threads
from minecube.reader.ledger import Ledger
from minecube.reader.raster import PLAIN, File

_OPTIONS = {
    "dtype": np.dtype("uint16"),
    "fill_value": 0,
    "scale_offset": (1, 0),
    "errors_as_nodata": (),
}
"""What stackstac must pass to a reader."""
_STACKSTAC_LOCK = threading.Lock()  # stackstac caches projections in plain dictionaries


def stack(
    items: Sequence[pystac.Item],
    grid: GeoBox,
    bands: Sequence[str],
    *,
    chunk_px: int = 512,
    ledger: Ledger | None = None,
) -> xr.DataArray:
    """Stack scenes on a grid lazily, one time step per item in the given order.

    The items are normalised scenes (`minecube.scenes`) of any sources and UTM zones. The resolution
    of the grid may differ from the files'. SCL may be among the bands. `ledger` counts the reads made
    in this process.

    Returns:
        uint16 [time, band, y, x]: Surface reflectance x 10000 with the offset removed, valid pixels
        >= 1, 0 = no data. SCL as class numbers.
        Coordinates are `id` and `offset` per time, pixel centres for y and x, and `spatial_ref`.

    Raises:
        ReadError: There are no items, or one lacks a band. When computed: A pixel cannot be read.
    """
    if not items:
        raise ReadError("no scenes to stack; expected at least one item")
    offsets = np.array([item.properties["minecube:offset"] for item in items], dtype=np.int32)
    layers: dict[str, da.Array] = {}
    reflectance_bands = [band for band in bands if band != SCL]
    if reflectance_bands:
        raw = _stack_raw(items, reflectance_bands, grid, Resampling.bilinear, chunk_px, ledger)
        offset = da.from_array(offsets[:, None, None, None], chunks=(1, -1, -1, -1))
        pixels = da.map_blocks(remove_offset, raw, offset, dtype=np.uint16)
        layers |= {band: pixels[:, k] for k, band in enumerate(reflectance_bands)}
    if SCL in bands:
        layers[SCL] = _stack_raw(items, [SCL], grid, Resampling.nearest, chunk_px, ledger)[:, 0]
    times = [item.datetime.replace(tzinfo=None) for item in items if item.datetime]
    coords: dict[str, Any] = {
        **odc.geo.xr.xr_coords(grid),
        "time": ("time", np.array(times, dtype="datetime64[ns]")),
        "band": ("band", list(bands)),
        "id": ("time", [item.id for item in items]),
        "offset": ("time", offsets),
    }
    data = da.stack([layers[band] for band in bands], axis=1)
    return xr.DataArray(data, dims=("time", "band", "y", "x"), coords=coords, name="reflectance")


def compute_stack(stacked: xr.DataArray) -> UInt16:
    """Compute the pixels of a stack on the `READ_THREADS` threads shared by all stacks."""
    pixels: UInt16 = stacked.data.compute(scheduler="threads", pool=threads(READ_THREADS))
    return pixels


@dataclass(frozen=True)
class AssetTable:
    """The files of a stack of several sources, by the names in its graph."""

    assets: Mapping[str, Asset]
    ledger: Ledger | None
    """Counts the reads."""


class NativeReader:
    """stackstac's reader protocol over `read`: a window of a stack is a window of the grid.

    `stackstac.stack(items, reader=NativeReader, ...)` reads unsigned hrefs. For signed hrefs, pass
    `functools.partial(NativeReader, access=source.access)`. Files are closed after each read, so a
    reader can be pickled and used from any thread. Each asset is read only once per block anyway.

    For stacks of several sources, `url` is the name of an asset in `table`. stackstac's dtype must be
    uint16, fill_value 0, scale_offset (1, 0), and errors_as_nodata empty. gdal_env is not used.
    """

    def __init__(
        self,
        *,
        url: str,
        spec: Any,
        resampling: Resampling,
        access: Access = PLAIN,
        table: AssetTable | None = None,
        **options: Any,
    ) -> None:
        options.pop("gdal_env", None)
        if options != _OPTIONS:
            raise ReadError(
                "stackstac must be called with dtype uint16, fill_value 0, rescale False "
                "and no errors_as_nodata"
            )
        self.spec = spec
        self.resampling = resampling
        self.ledger: Ledger | None = None
        if table:
            self.asset = table.assets[url]
            self.ledger = table.ledger
        else:
            self.asset = Asset(scene="", band="", file=File(url, access))

    def read(self, window: Window, **_: Any) -> UInt16:
        """Read a window of the grid: uint16 (y, x); raise ReadError if it cannot be read."""
        corner = self.spec.transform @ Affine.translation(window.col_off, window.row_off)
        grid = GeoBox((window.height, window.width), corner, self.spec.epsg)
        return self.asset.read(grid, self.resampling, self.ledger)

    def close(self) -> None:
        """Do nothing: no file is open."""


def _stack_raw(
    items: Sequence[pystac.Item],
    bands: list[str],
    grid: GeoBox,
    resampling: Resampling,
    chunk_px: int,
    ledger: Ledger | None,
) -> da.Array:
    """Stack the files' numbers lazily: uint16 [time, band, y, x]."""
    assets: dict[str, Asset] = {}
    for n, item in enumerate(items):
        assets |= {f"{n}/{band}": asset_of(item, band) for band in bands}
    with _STACKSTAC_LOCK:
        stacked = stackstac.stack(
            [_make_light_item(n, item, bands, grid) for n, item in enumerate(items)],
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
            reader=functools.partial(NativeReader, table=AssetTable(assets, ledger)),
        )
    expected = (len(items), len(bands), *grid.shape)
    same_x = np.array_equal(stacked.x, grid.coordinates["x"].values)
    same_y = np.array_equal(stacked.y, grid.coordinates["y"].values)
    if stacked.shape != expected or not same_x or not same_y:
        raise ReadError(
            f"stackstac laid out {stacked.shape}, expected {expected} on the grid's coordinates"
        )
    return stacked.data


def _make_light_item(
    n: int, item: pystac.Item, bands: Sequence[str], grid: GeoBox
) -> dict[str, Any]:
    """Build an item for stackstac: only names, and the grid as its place.

    So stackstac skips or drops no item.
    """
    return {
        "id": item.id,
        "properties": {
            "datetime": item.datetime.isoformat() if item.datetime else None,
            "proj:epsg": grid.crs.epsg,
            "proj:bbox": list(grid.boundingbox),
        },
        "assets": {band: {"href": f"{n}/{band}"} for band in bands},
    }
