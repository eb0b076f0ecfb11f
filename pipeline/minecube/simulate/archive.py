"""Write an archive to disk: COGs per item, a stac-geoparquet of all items, sources.yaml.

sources.yaml                        one source per imitated provider
earth-search.parquet                its items; hrefs relative to this file, so the folder is movable
earth-search/<item id>/item.json    the same item, hrefs relative to it
earth-search/<item id>/B04.tif ...
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import stac_geoparquet.arrow
import yaml
from odc.geo.geobox import GeoBox
from rasterio.io import MemoryFile

from minecube.arrays import AnyArray, Bool, Int16, UInt8, UInt16
from minecube.catalog import SCL, Source
from minecube.grid import coarsen
from minecube.simulate.faults import damage_band
from minecube.simulate.granules import Granule
from minecube.simulate.items import Item, Product, make_item
from minecube.simulate.passes import epsg_of
from minecube.simulate.pixels import enlarge


def write_item(out: Path, source: Source, granule: Granule, product: Product) -> Item:
    """Write one item with its files; return its entry for the stac-geoparquet."""
    style = source.id
    item, files = make_item(style, granule, product, source.assets)
    folder = out / style / item["id"]
    folder.mkdir(parents=True)
    for band, name in files.items():
        grid = coarsen(granule.tile.box, granule.layout(band)[0])
        pixels = _add_offset(granule, product, band)
        if product.fault is not None and product.fault.band == band:
            pixels = damage_band(pixels.astype(np.uint16), product.fault.kind, granule.scl)
        _write_cog(folder / name, pixels, grid)
    (folder / "item.json").write_text(json.dumps(item, indent=1), encoding="utf-8")
    assets = {}
    for key, asset in item["assets"].items():
        file = asset["href"].removeprefix("./")
        assets[key] = {**asset, "href": f"{style}/{item['id']}/{file}"}
    return {**item, "assets": assets}


def _add_offset(granule: Granule, product: Product, band: str) -> UInt8 | UInt16:
    """Return a band as stored: with the product's offset, 0 without data."""
    if band == SCL:
        return granule.scl
    counts: Int16 = granule.counts[band]
    if product.old:
        counts = granule.old_counts[band]
    has_data: Bool = enlarge(granule.scl != 0, counts.shape)
    # Pixels with data are at least 1; 0 is nodata. With the offset still included, noise
    # can leave less than 1000.
    stored = np.maximum(counts.astype(np.int32) + product.offset, 1)
    return np.where(has_data, stored, 0).astype(np.uint16)


def write_index(out: Path, style: str, items: list[Item]) -> None:
    """Write the stac-geoparquet of one style, sorted by time and id."""
    ordered = sorted(items, key=lambda item: (item["properties"]["datetime"], item["id"]))
    table = stac_geoparquet.arrow.parse_stac_items_to_arrow(ordered)
    stac_geoparquet.arrow.to_parquet(table, out / f"{style}.parquet")


def write_sources(out: Path, sources: Mapping[str, Source]) -> None:
    """Write `sources.yaml`: for each style the provider's offset rules and the parquet file."""
    entries: dict[str, Any] = {}
    for style, source in sources.items():
        offset: dict[str, Any] = {
            "value": source.offset.value,
            "from_baseline": source.offset.from_baseline,
        }
        if source.offset.applied_flag:
            offset["applied_flag"] = source.offset.applied_flag
        entries[f"sim-{style}"] = {
            "title": f"Simulated, in the style of {source.title}",
            "kind": "stac-geoparquet",
            "href": f"{style}.parquet",
            "collection": source.collection,
            "assets": dict(source.assets),
            "offset": offset,
            "licence": "simulated; free of rights",
        }
    (out / "sources.yaml").write_text(yaml.safe_dump(entries, sort_keys=False), encoding="utf-8")


def _write_cog(path: Path, pixels: AnyArray, grid: GeoBox) -> None:
    profile = {
        "driver": "COG",
        "height": pixels.shape[0],
        "width": pixels.shape[1],
        "count": 1,
        "dtype": pixels.dtype,
        "crs": f"EPSG:{epsg_of(grid)}",
        "transform": grid.transform,
        "nodata": 0,
        "compress": "deflate",
        "level": 1,  # noisy counts compress almost as well, in half the time
        "predictor": 2,
    }
    # Write to memory first: on a full disk GDAL cuts small files without an error.
    with MemoryFile() as memory:
        with memory.open(**profile) as image:
            image.write(pixels, 1)
        path.write_bytes(memory.getbuffer())
