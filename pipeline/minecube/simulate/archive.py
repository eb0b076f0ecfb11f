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
import numpy.typing as npt
import rasterio
import stac_geoparquet.arrow
import yaml
from odc.geo.geobox import GeoBox

from minecube.catalog import SCL, Source
from minecube.grid import at_resolution
from minecube.simulate.granules import Granule
from minecube.simulate.items import Item, Product, item_of
from minecube.simulate.passes import epsg


def write_item(out: Path, source: Source, granule: Granule, product: Product) -> Item:
    """Write one item with its files; return its entry for the stac-geoparquet."""
    style = source.id
    item, files = item_of(style, granule, product, source.assets)
    folder = out / style / item["id"]
    folder.mkdir(parents=True)
    counts = granule.old_counts if product.old else granule.counts
    has_data = granule.scl != 0
    for band, name in files.items():
        if band == SCL:
            pixels = granule.scl
        else:
            fine = (
                has_data
                if counts[band].shape == has_data.shape
                else has_data.repeat(2, axis=0).repeat(2, axis=1)
            )
            # Pixels with data are at least 1; 0 is nodata. With the offset still included, noise
            # can leave less than 1000.
            pixels = np.where(
                fine, np.maximum(counts[band].astype(np.int32) + product.offset, 1), 0
            ).astype(np.uint16)
        _write_cog(folder / name, pixels, at_resolution(granule.tile.box, granule.layout(band)[0]))
    (folder / "item.json").write_text(json.dumps(item, indent=1), encoding="utf-8")
    moved = {
        k: {**a, "href": f"{style}/{item['id']}/{a['href'].removeprefix('./')}"}
        for k, a in item["assets"].items()
    }
    return {**item, "assets": moved}


def write_index(out: Path, style: str, items: list[Item]) -> None:
    """Write the stac-geoparquet of one style, sorted by time and id."""
    ordered = sorted(items, key=lambda i: (i["properties"]["datetime"], i["id"]))
    stac_geoparquet.arrow.to_parquet(
        stac_geoparquet.arrow.parse_stac_items_to_arrow(ordered), out / f"{style}.parquet"
    )


def write_sources(out: Path, real: Mapping[str, Source]) -> None:
    """Write `sources.yaml`: for each style the provider's offset rules and the parquet file."""
    entries: dict[str, Any] = {}
    for style, source in real.items():
        rule = {"value": source.offset.value, "from_baseline": source.offset.from_baseline}
        flag = {"applied_flag": source.offset.applied_flag} if source.offset.applied_flag else {}
        entries[f"sim-{style}"] = {
            "title": f"Simulated, in the style of {source.title}",
            "kind": "stac-geoparquet",
            "href": f"{style}.parquet",
            "collection": source.collection,
            "assets": dict(source.assets),
            "offset": rule | flag,
            "licence": "simulated; free of rights",
        }
    (out / "sources.yaml").write_text(yaml.safe_dump(entries, sort_keys=False), encoding="utf-8")


def _write_cog(path: Path, pixels: npt.NDArray[Any], where: GeoBox) -> None:
    # Level 1: noisy counts compress almost as well, in half the time.
    with rasterio.open(
        path,
        "w",
        driver="COG",
        height=pixels.shape[0],
        width=pixels.shape[1],
        count=1,
        dtype=pixels.dtype,
        crs=f"EPSG:{epsg(where)}",
        transform=where.transform,
        nodata=0,
        compress="deflate",
        level=1,
        predictor=2,
    ) as file:
        file.write(pixels, 1)
