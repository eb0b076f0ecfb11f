"""Sites, files and scenes whose every pixel a test knows, and a server of them."""

from __future__ import annotations

import datetime as dt
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pystac
import rasterio
import shapely
from affine import Affine
from odc.geo.geobox import GeoBox
from pyproj import Transformer
from shapely.geometry import box, mapping

from minecube import scenes
from minecube.catalog import BANDS, Offset, Site, Source

NATIVE = {b: 10 if b in ("B02", "B03", "B04", "B08") else 20 for b in BANDS} | {"SCL": 20}


def site_of(name: str, left: float, top: float, width: int, height: int, epsg: int = 32633) -> Site:
    """A site whose grid has these corners and sizes in pixels; the polygon stays 3 m inside."""
    corners = box(left + 3, top - 10 * height + 3, left + 10 * width - 3, top - 3)
    return Site(id=name, geometry=to_lonlat(corners, epsg))


def to_lonlat(geometry: Any, epsg: int) -> Any:
    move = Transformer.from_crs(epsg, 4326, always_xy=True).transform
    return shapely.transform(geometry, move, interleaved=False)


def unique_pixels(height: int, width: int, start: int = 1) -> np.ndarray:
    """Pixels no two of which are equal (up to 65535), so that a test knows which one it got."""
    return (np.arange(height * width).reshape(height, width) % 65000 + start).astype(np.uint16)


def write_tif(path: Path, pixels: np.ndarray, grid: GeoBox, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = pixels.shape
    options = {
        "driver": "GTiff",
        "nodata": 0,
        "tiled": True,
        "blockxsize": 64,
        "blockysize": 64,
        "compress": "deflate",
    } | options
    with rasterio.open(
        path,
        "w",
        height=height,
        width=width,
        count=1,
        dtype=pixels.dtype,
        crs=grid.crs.to_wkt(),
        transform=grid.transform,
        **options,
    ) as out:
        out.write(pixels, 1)
    return path


@dataclass
class Archive:
    """Writes scenes as files with items in the manner of Earth Search, and normalises them."""

    root: Path
    bands: tuple[str, ...] = ("B04", "B11")
    resolution: dict[str, int] = field(default_factory=lambda: dict(NATIVE))
    source_id: str = "test"

    @property
    def source(self) -> Source:
        return Source(
            id=self.source_id,
            title="test archive",
            kind="stac-geoparquet",
            href=str(self.root / "items.parquet"),
            collection="test",
            assets={b: b for b in (*self.bands, "SCL")},
            resolution_m=self.resolution,
            offset=Offset(applied_flag="earthsearch:boa_offset_applied"),
        )

    def item(
        self,
        when: str,
        grid: GeoBox,
        pixels: dict[str, np.ndarray | int],
        scl: np.ndarray | int = 4,
        *,
        baseline: str = "02.14",
        tile: str = "33UUR",
        start: str | None = None,
        processed: str | None = None,
        **properties: Any,
    ) -> pystac.Item:
        """One granule: `grid` is its 10 m extent; a number fills a band. Writes its files, returns the raw item."""
        time = dt.datetime.fromisoformat(when).replace(tzinfo=dt.UTC)
        stamp = time.strftime("%Y%m%dT%H%M%S")
        start, processed = start or stamp, processed or stamp
        name = (
            f"S2A_MSIL2A_{stamp}_N{baseline.replace('.', '')}_R022_T{tile}_{processed}_{start[-6:]}"
        )
        assets = {}
        for band, values in {**pixels, "SCL": scl}.items():
            where = grid.zoom_out(self.resolution[band] / 10)
            full = np.broadcast_to(values, where.shape).astype(
                np.uint8 if band == "SCL" else np.uint16
            )
            path = write_tif(self.root / name / f"{band}.tif", full, where)
            place = {"gsd": self.resolution[band], "proj:shape": list(where.shape)}
            assets[band] = pystac.Asset(str(path), extra_fields=place)
        footprint = to_lonlat(box(*grid.boundingbox), grid.crs.epsg)
        return pystac.Item(
            id=name,
            geometry=mapping(footprint),
            bbox=list(footprint.bounds),
            datetime=time,
            properties={
                "platform": "sentinel-2a",
                "eo:cloud_cover": 10.0,
                "proj:epsg": grid.crs.epsg,
                "s2:mgrs_tile": tile,
                "s2:processing_baseline": baseline,
                # to the minute, so that tiles sensed seconds apart are of one overpass
                "s2:datatake_id": f"GS2A_{stamp[:-2]}00_000123_N{baseline}",
                "s2:datastrip_id": f"S2A_OPER_MSI_L2A_DS_MPS__{processed}_S{start}_N{baseline}",
                "s2:product_uri": f"S2A_MSIL2A_{stamp}_N{baseline.replace('.', '')}_R022_T{tile}_{processed}.SAFE",
                **properties,
            },
            assets=assets,
        )

    def scene(self, *args: Any, **kwargs: Any) -> pystac.Item:
        """The same, normalised."""
        return scenes.normalise(self.item(*args, **kwargs), self.source)


def grid_at(
    left: float, top: float, width: int, height: int, epsg: int = 32633, size: float = 10
) -> GeoBox:
    return GeoBox((height, width), Affine(size, 0, left, 0, -size, top), f"EPSG:{epsg}")


@contextmanager
def serve(folder: Path, *trouble: object) -> Iterator[str]:
    """URL of the folder on a loopback server of its own process."""
    command = [
        sys.executable,
        str(Path(__file__).with_name("range_server.py")),
        str(folder),
        *map(str, trouble),
    ]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout
        yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
    finally:
        server.terminate()
        server.communicate()
