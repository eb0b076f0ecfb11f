"""Write a STAC collection of exported images, with its items as stac-geoparquet.

    out/collection.json                   written last, after everything it lists
    out/items.parquet                     the items as one table
    out/pit/pit_2020.json                 one item per site-year, next to its images

Item fields are read back from the images.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import rasterio
import stac_geoparquet.arrow
from rasterio.warp import transform_bounds, transform_geom
from shapely.geometry import box

from minecube.errors import CubeError
from minecube.export.credits import Credit
from minecube.export.files import href, listed, whole
from minecube.export.layers import LAYERS
from minecube.export.stac_fields import (
    MEDIA,
    credits_in,
    dimensions,
    file_asset,
    image_asset,
    label,
    middle_of,
    processing,
)

STAC_VERSION = "1.1.0"
EXTENSIONS = {
    name: f"https://stac-extensions.github.io/{name}/v{version}/schema.json"
    for name, version in {
        "projection": "2.0.0",
        "raster": "1.1.0",
        "eo": "1.1.0",
        "file": "2.1.0",
        "datacube": "2.2.0",
        "processing": "1.2.0",
        "label": "1.0.1",
        "scientific": "1.0.0",
    }.items()
}


def write_stac(
    out: Path,
    cogs: Iterable[Path],
    tables: Mapping[str, Path],
    *,
    title: str,
    about: str,
    licence: str = "other",
) -> Path:
    """Write a self-contained STAC collection and return the path of collection.json.

    It lists images made by `write_cogs` and other files. Each site-year becomes one item next to
    its images, with the images as assets. items.parquet repeats all items. All hrefs are relative,
    so the folder can be moved or served unchanged. Checksums are multihashes (SHA-256). Licence and
    citation of every input come from the images and become links, providers and publications.

    Args:
        out: The common folder, also of collection.json.
        cogs: Images below `out`.
        tables: Asset key -> file below `out`: footprints as GeoParquet or GeoPackage, whole cubes
            as NetCDF or Zarr.
        title: The collection's title, also the basis of its id.
        about: Description for people. The attribution required by the Copernicus terms is added.
        licence: SPDX identifier of the whole, or "other" for the linked licences of the inputs.

    Raises:
        CubeError: there is no image, a file lies outside `out` or cannot be read, or writing fails.
    """
    site_years: dict[Path, list[Path]] = {}
    for cog in sorted(cogs):
        site_years.setdefault(cog.with_name(cog.stem.rpartition("_")[0] + ".json"), []).append(cog)
    if not site_years:
        raise CubeError(
            f"{out}: there is no image to list, so there is no collection to write; export images first"
        )
    outside = [
        p for p in (*site_years, *tables.values()) if not p.resolve().is_relative_to(out.resolve())
    ]
    if outside:
        raise CubeError(
            f"{outside[0]}: lies outside {out}, so the collection could not be moved with it; export it there"
        )
    name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    credited: dict[Credit, None] = {}  # unique, in order of appearance
    items = {
        path: _item(path, images, out / "collection.json", name, credited)
        for path, images in site_years.items()
    }
    assets = {key: file_asset(key, table, out) for key, table in tables.items()}
    imagery_first = tuple(sorted(credited, key=lambda c: c.kind != "imagery"))
    collection = _collection(
        name, list(items.values()), title, about, licence, imagery_first, assets
    )
    collection["links"] += [_link("item", path, out) for path in items]
    mirror = {
        "type": MEDIA[".parquet"],
        "roles": ["collection-mirror"],
        "title": "The items as stac-geoparquet",
    }
    _write_items(
        [_seen_from(out, path, item) for path, item in items.items()], out / "items.parquet"
    )
    collection["assets"] = {**assets, "items": {**listed(out / "items.parquet", out, ""), **mirror}}
    for path, content in {**items, out / "collection.json": collection}.items():
        with whole(path) as part:
            part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return out / "collection.json"


def _seen_from(out: Path, path: Path, item: Mapping[str, Any]) -> dict[str, Any]:
    """Return the item with hrefs relative to `out`, the folder of the table."""

    def moved(entry: Mapping[str, Any]) -> dict[str, Any]:
        there = entry["href"]
        return {**entry, "href": there if "://" in there else href(path.parent / there, out)}

    assets = {key: moved(asset) for key, asset in item["assets"].items()}
    return {**item, "assets": assets, "links": [moved(link) for link in item["links"]]}


def _write_items(items: list[dict[str, Any]], path: Path) -> None:
    with whole(path) as part:
        stac_geoparquet.arrow.to_parquet(
            stac_geoparquet.arrow.parse_stac_items_to_arrow(items), part
        )


def _item(
    path: Path, images: Iterable[Path], collection: Path, name: str, credited: dict[Credit, None]
) -> dict[str, Any]:
    """Build the item of a site-year and add the inputs of its images to `credited`."""
    assets: dict[str, Any] = {}
    properties: dict[str, Any] = {}
    own: dict[Credit, None] = {}
    for image in images:
        try:
            with rasterio.open(image, driver="GTiff") as src:
                tags = src.tags()
                assets[tags["variable"]] = image_asset(image, src)
                bounds = transform_bounds(src.crs, 4326, *src.bounds)
                geometry = transform_geom(src.crs, 4326, box(*src.bounds).__geo_interface__)
                grid = {
                    "proj:code": src.crs.to_string(),
                    "proj:shape": list(src.shape),
                    "proj:transform": list(src.transform)[:6],
                }
                place = dimensions(src, "bands" if tags["variable"] == "reflectance" else "")
                if tags["variable"] == "footprint":
                    properties |= label(src)
        except (rasterio.errors.RasterioIOError, KeyError) as error:
            raise CubeError(
                f"{image}: is not an image that write_cogs made ({error}), so it cannot be listed"
            ) from error
        properties |= processing(json.loads(tags.get("build", "{}")))
        properties["cube:dimensions"] = {**properties.get("cube:dimensions", {}), **place}
        variable = {
            "type": "data",
            "dimensions": [*list(place)[2:], "y", "x"],
            "description": LAYERS[tags["variable"]].title,
        }
        properties.setdefault("cube:variables", {})[tags["variable"]] = variable
        own |= dict.fromkeys(credits_in(tags))
    credited |= own
    year = tags["year"]
    links = [
        _link(rel, collection, path.parent) for rel in ("root", "parent", "collection")
    ] + _license_links(own)
    if "label:type" in properties:
        links.append(
            {
                **_link("source", path, path.parent),
                "label:assets": [k for k in ("reflectance",) if k in assets],
            }
        )
    used = {"projection", "raster", "eo", "file", "datacube"} | {
        k.partition(":")[0] for k in properties
    }
    return {
        "type": "Feature",
        "stac_version": STAC_VERSION,
        "stac_extensions": [url for key, url in EXTENSIONS.items() if key in used],
        "id": path.stem,
        "collection": name,
        "geometry": geometry,
        "bbox": list(bounds),
        "properties": {
            "title": f"{tags['site']} {year}",
            "datetime": middle_of(int(year)),  # QGIS and gdalcubes treat null as empty
            "start_datetime": f"{year}-01-01T00:00:00Z",
            "end_datetime": f"{year}-12-31T23:59:59Z",
            "constellation": "sentinel-2",
            "instruments": ["msi"],
            "gsd": grid["proj:transform"][0],
            "license": "other",
            **grid,
            **properties,
        },
        "links": links,
        "assets": assets,
    }


def _collection(
    name: str,
    items: list[dict[str, Any]],
    title: str,
    about: str,
    licence: str,
    credited: tuple[Credit, ...],
    assets: Mapping[str, Any],
) -> dict[str, Any]:
    west, south, east, north = zip(*(i["bbox"] for i in items), strict=True)
    properties = [i["properties"] for i in items]
    start, end = (
        min(p["start_datetime"] for p in properties),
        max(p["end_datetime"] for p in properties),
    )
    esa = {
        "name": "European Space Agency, Copernicus Sentinel-2",
        "roles": ["producer", "licensor"],
        "url": "https://sentinels.copernicus.eu",
    }
    makers = [
        {"name": c.name, "description": f"{c.kind}: {c.licence}", "roles": ["producer", "licensor"]}
        | ({"url": f"https://doi.org/{c.dois[0]}"} if c.dois else {})
        for c in credited
        if c.kind != "imagery"
    ]
    version = metadata.version("minecube")
    made_by = {
        "name": f"minecube {version}",
        "roles": ["processor"],
        "processing:software": {"minecube": version},
    }
    root = {"rel": "root", "href": "./collection.json", "type": "application/json"}
    publications = [{"doi": d, "citation": c.citation} for c in credited for d in c.dois]
    used = {"file", "processing"} | ({"scientific"} if publications else set())
    used |= {"datacube"} if any("cube:dimensions" in a for a in assets.values()) else set()
    cited = [{"rel": "cite-as", "href": f"https://doi.org/{p['doi']}"} for p in publications]
    terms = "; ".join(f"{c.kind}: {c.name}, {c.licence}" for c in credited)
    return {
        "type": "Collection",
        "stac_version": STAC_VERSION,
        "stac_extensions": [url for key, url in EXTENSIONS.items() if key in used],
        "id": name,
        "title": title,
        "description": f"{about}\n\nContains modified Copernicus Sentinel data {start[:4]}-{end[:4]}. Terms: {terms}.",
        "license": licence,
        "providers": [esa, *makers, made_by],
        "extent": {
            "spatial": {"bbox": [[min(west), min(south), max(east), max(north)]]},
            "temporal": {"interval": [[start, end]]},
        },
        "summaries": {
            "constellation": ["sentinel-2"],
            "proj:code": sorted({p["proj:code"] for p in properties}),
        },
        **({"sci:publications": publications} if publications else {}),
        "links": [root, *_license_links(credited), *cited],
    }


def _license_links(credited: Iterable[Credit]) -> list[dict[str, str]]:
    """Link the text of each licence once."""
    found = {c.url: f"{c.name}: {c.licence}" for c in credited if c.url}
    return [{"rel": "license", "href": url, "title": title} for url, title in found.items()]


def _link(rel: str, path: Path, folder: Path) -> dict[str, Any]:
    media = "application/geo+json" if rel in ("item", "source") else "application/json"
    return {"rel": rel, "href": href(path, folder), "type": media}
