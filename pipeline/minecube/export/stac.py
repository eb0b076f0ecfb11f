"""Write a STAC collection of exported images, with its items as stac-geoparquet.

    out/collection.json                   written last, after everything it lists
    out/items.parquet                     the items as one table
    out/pit/pit_2020.json                 one item per site-year, next to its images

Item fields are read back from the images.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import rasterio
import stac_geoparquet.arrow
from rasterio.coords import BoundingBox
from rasterio.warp import transform_bounds, transform_geom
from shapely.geometry import box

from minecube.errors import CubeError
from minecube.export.credits import Credit
from minecube.export.files import describe_file, make_href, need_inside, open_draft
from minecube.export.stac_fields import (
    MEDIA,
    describe_grid,
    describe_variable,
    make_image_asset,
    make_label_fields,
    make_processing_fields,
    measure_dimensions,
    middle_of,
    parse_credits,
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


_COLLECTION = "collection.json"


@dataclass(frozen=True)
class Item:
    """A STAC item of one site-year."""

    path: Path
    """Its file, next to its images."""
    content: dict[str, Any]
    inputs: tuple[Credit, ...]
    """Inputs of its images, each once."""


def write_items(out: Path, cogs: Iterable[Path], *, title: str) -> list[Item]:
    """Write one STAC item per site-year, with its images as assets. Returns the items by path.

    Args:
        out: The folder of the collection that will list them.
        cogs: Images below `out`, made by `write_cogs`.
        title: The title of that collection.

    Raises:
        CubeError: an image lies outside `out` or cannot be read, or writing fails.
    """
    site_years: dict[Path, list[Path]] = {}
    for cog in sorted(cogs):
        site_years.setdefault(cog.with_name(cog.stem.rpartition("_")[0] + ".json"), []).append(cog)
    for path in site_years:
        need_inside(path, out)
    items = []
    for path, cogs_of_year in site_years.items():
        images = [_read_image(cog) for cog in cogs_of_year]
        content = _make_item(path, images, out / _COLLECTION, _make_id(title))
        _write_json(path, content)
        items.append(Item(path, content, tuple(_list_inputs(images))))
    return items


def write_stac(
    out: Path,
    items: Iterable[Item],
    assets: Mapping[str, dict[str, Any]],
    *,
    title: str,
    description: str,
) -> Path:
    """Write a self-contained STAC collection and return the path of collection.json.

    It lists items made by `write_items` and other files. items.parquet repeats all items. All hrefs
    are relative, so the folder can be moved or served unchanged. Checksums are multihashes
    (SHA-256). Licence and citation of every input come from the images and become links, providers
    and publications.

    Args:
        out: The common folder, also of collection.json.
        items: Items of images below `out`.
        assets: Asset key -> asset made by `make_asset`.
        title: The collection's title, also the basis of its id. The items have the same.
        description: Description for people. The attribution required by the Copernicus terms is added.

    Raises:
        CubeError: there is no item, or writing fails.
    """
    items = sorted(items, key=lambda item: item.path)
    if not items:
        raise CubeError(
            f"{out}: expected images for the collection, found none; export images first"
        )
    inputs = dict.fromkeys(credit for item in items for credit in item.inputs)
    imagery_first = sorted(inputs, key=lambda credit: credit.kind != "imagery")
    collection = {
        "type": "Collection",
        "stac_version": STAC_VERSION,
        "stac_extensions": _list_extensions(_list_prefixes(imagery_first, assets)),
        "id": _make_id(title),
        "title": title,
        **_describe_inputs(description, [item.content for item in items], imagery_first),
    }
    collection["links"] += [_make_link("item", item.path, out) for item in items]
    moved = [_move_hrefs(item.content, item.path.parent, out) for item in items]
    collection["assets"] = {**assets, "items": _write_table_of_items(moved, out)}
    root = out / _COLLECTION
    _write_json(root, collection)
    return root


def _make_id(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with open_draft(path) as draft:
        draft.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _move_hrefs(item: Mapping[str, Any], source: Path, target: Path) -> dict[str, Any]:
    """Make an item's hrefs relative to the folder `target` instead of `source`."""

    def move(entry: Mapping[str, Any]) -> dict[str, Any]:
        if "://" in entry["href"]:
            return dict(entry)
        return {**entry, "href": make_href(source / entry["href"], target)}

    assets = {key: move(asset) for key, asset in item["assets"].items()}
    return {**item, "assets": assets, "links": [move(link) for link in item["links"]]}


def _write_table_of_items(items: list[dict[str, Any]], out: Path) -> dict[str, Any]:
    """Write items.parquet. Returns its asset."""
    path = out / "items.parquet"
    table = stac_geoparquet.arrow.parse_stac_items_to_arrow(items)
    with open_draft(path) as draft:
        stac_geoparquet.arrow.to_parquet(table, draft)
    return {
        **describe_file(path, out, "The items as stac-geoparquet"),
        "type": MEDIA[".parquet"],
        "roles": ["collection-mirror"],
    }


@dataclass(frozen=True, kw_only=True)
class _Image:
    """What an item states of one image."""

    tags: Mapping[str, str]
    """Tags written by `write_cogs`."""
    asset: dict[str, Any]
    grid: dict[str, Any]
    """Fields of the projection extension."""
    bbox: tuple[float, float, float, float]
    """West, south, east, north in degrees."""
    geometry: dict[str, Any]
    """GeoJSON in longitude and latitude."""
    dimensions: dict[str, Any]
    """Dimensions of the datacube extension."""
    labels: dict[str, Any]
    """Fields of the label extension; none except for footprints."""


def _read_image(path: Path) -> _Image:
    """Read an image made by `write_cogs`; raise CubeError for any other file."""
    try:
        with rasterio.open(path, driver="GTiff") as image:
            bbox, geometry = _locate(image.crs.to_string(), image.bounds)
            return _Image(
                tags=image.tags(),
                asset=make_image_asset(path, image),
                grid=describe_grid(image),
                bbox=bbox,
                geometry=geometry,
                dimensions=measure_dimensions(image),
                labels=make_label_fields(image),
            )
    except (rasterio.errors.RasterioIOError, KeyError) as error:
        raise CubeError(
            f"{path}: expected an image written by write_cogs ({error}); export it again"
        ) from error


@lru_cache(maxsize=1)  # images of one site have the same bounds
def _locate(
    crs: str, bounds: BoundingBox
) -> tuple[tuple[float, float, float, float], dict[str, Any]]:
    """Return bounding box and GeoJSON outline of an image, in longitude and latitude."""
    geometry = transform_geom(crs, 4326, box(*bounds).__geo_interface__)
    return transform_bounds(crs, 4326, *bounds), geometry


def _list_inputs(images: Iterable[_Image]) -> list[Credit]:
    """Return the inputs of images, each once, in order of appearance."""
    return list(dict.fromkeys(credit for image in images for credit in parse_credits(image.tags)))


def _make_item(
    path: Path, images: Sequence[_Image], collection: Path, collection_id: str
) -> dict[str, Any]:
    """Build the item of a site-year from its images, which share one grid."""
    assets = {image.tags["variable"]: image.asset for image in images}
    properties: dict[str, Any] = {}
    for image in images:
        properties |= image.labels
        properties |= make_processing_fields(json.loads(image.tags.get("build", "{}")))
        properties.setdefault("cube:dimensions", {}).update(image.dimensions)
        properties.setdefault("cube:variables", {}).update(
            describe_variable(image.tags, image.dimensions)
        )
    links = [_make_link(rel, collection, path.parent) for rel in ("root", "parent", "collection")]
    links += _make_license_links(_list_inputs(images))
    if "label:type" in properties:
        labelled = [key for key in ("reflectance",) if key in assets]
        links.append({**_make_link("source", path, path.parent), "label:assets": labelled})
    last = images[-1]
    year = last.tags["year"]
    prefixes = {"projection", "raster", "eo", "file", "datacube"}
    prefixes |= {key.partition(":")[0] for key in properties}
    return {
        "type": "Feature",
        "stac_version": STAC_VERSION,
        "stac_extensions": _list_extensions(prefixes),
        "id": path.stem,
        "collection": collection_id,
        "geometry": last.geometry,
        "bbox": list(last.bbox),
        "properties": {
            "title": f"{last.tags['site']} {year}",
            "datetime": middle_of(int(year)),  # QGIS and gdalcubes treat null as empty
            "start_datetime": f"{year}-01-01T00:00:00Z",
            "end_datetime": f"{year}-12-31T23:59:59Z",
            "constellation": "sentinel-2",
            "instruments": ["msi"],
            "gsd": last.grid["proj:transform"][0],
            "license": "other",
            **last.grid,
            **properties,
        },
        "links": links,
        "assets": assets,
    }


def _list_extensions(names: Collection[str]) -> list[str]:
    return [url for name, url in EXTENSIONS.items() if name in names]


def _list_prefixes(inputs: Iterable[Credit], assets: Mapping[str, Any]) -> set[str]:
    """Return the names of the extensions used by the collection."""
    names = {"file", "processing"}
    if any(credit.dois for credit in inputs):
        names.add("scientific")
    if any("cube:dimensions" in asset for asset in assets.values()):
        names.add("datacube")
    return names


def _describe_inputs(
    description: str, items: Sequence[Mapping[str, Any]], inputs: Sequence[Credit]
) -> dict[str, Any]:
    """Return a collection's fields on its extent, and on the origin and terms of its inputs."""
    west, south, east, north = zip(*(item["bbox"] for item in items), strict=True)
    properties = [item["properties"] for item in items]
    start = min(fields["start_datetime"] for fields in properties)
    end = max(fields["end_datetime"] for fields in properties)
    terms = "; ".join(f"{credit.kind}: {credit.name}, {credit.licence}" for credit in inputs)
    publications = [
        {"doi": doi, "citation": credit.citation} for credit in inputs for doi in credit.dois
    ]
    cited = {}
    if publications:
        cited["sci:publications"] = publications
    root = {"rel": "root", "href": "./collection.json", "type": "application/json"}
    return {
        "description": (
            f"{description}\n\nContains modified Copernicus Sentinel data {start[:4]}-{end[:4]}. "
            f"Terms: {terms}."
        ),
        "license": "other",  # the inputs' licences are linked
        "providers": _list_providers(inputs),
        "extent": {
            "spatial": {"bbox": [[min(west), min(south), max(east), max(north)]]},
            "temporal": {"interval": [[start, end]]},
        },
        "summaries": {
            "constellation": ["sentinel-2"],
            "proj:code": sorted({fields["proj:code"] for fields in properties}),
        },
        **cited,
        "links": [
            root,
            *_make_license_links(inputs),
            *(
                {"rel": "cite-as", "href": f"https://doi.org/{publication['doi']}"}
                for publication in publications
            ),
        ],
    }


def _list_providers(inputs: Iterable[Credit]) -> list[dict[str, Any]]:
    """List ESA, the makers of labels and models, and minecube."""
    providers: list[dict[str, Any]] = [
        {
            "name": "European Space Agency, Copernicus Sentinel-2",
            "roles": ["producer", "licensor"],
            "url": "https://sentinels.copernicus.eu",
        }
    ]
    for credit in inputs:
        if credit.kind == "imagery":
            continue
        maker: dict[str, Any] = {
            "name": credit.name,
            "description": f"{credit.kind}: {credit.licence}",
            "roles": ["producer", "licensor"],
        }
        if credit.dois:
            maker["url"] = f"https://doi.org/{credit.dois[0]}"
        providers.append(maker)
    version = metadata.version("minecube")
    processor = {
        "name": f"minecube {version}",
        "roles": ["processor"],
        "processing:software": {"minecube": version},
    }
    return [*providers, processor]


def _make_license_links(inputs: Iterable[Credit]) -> list[dict[str, Any]]:
    """Link the text of each licence once."""
    titles = {credit.url: f"{credit.name}: {credit.licence}" for credit in inputs if credit.url}
    return [{"rel": "license", "href": url, "title": title} for url, title in titles.items()]


def _make_link(rel: str, path: Path, folder: Path) -> dict[str, Any]:
    media = "application/json"
    if rel in ("item", "source"):
        media = "application/geo+json"
    return {"rel": rel, "href": make_href(path, folder), "type": media}
