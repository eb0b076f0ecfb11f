"""A STAC collection of exported images, with their items as stac-geoparquet, too.

    out/collection.json                   written last: what it lists is there
    out/items.parquet                     the items as one table
    out/pit/pit_2020.json                 one item a site-year, beside its images

The items say what the images themselves say: they are read back for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import stac_geoparquet.arrow
import xarray as xr
from rasterio.warp import transform_bounds, transform_geom
from shapely.geometry import box

from minecube.errors import CubeError
from minecube.export.credits import Credit
from minecube.export.files import href, listed, whole
from minecube.export.layers import LAYERS, SPECTRUM

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
MEDIA = {
    ".parquet": "application/vnd.apache.parquet",
    ".gpkg": "application/geopackage+sqlite3",
    ".nc": "application/netcdf",
    ".zarr": "application/vnd.zarr",
}
CLASSES = {0: "not mine", 1: "mine", 255: "unknown"}


def write_stac(
    out: Path, cogs: Iterable[Path], tables: Mapping[str, Path], *, title: str, about: str, licence: str = "other"
) -> Path:
    """A self-contained STAC collection of images made by `write_cogs` and of other files; the path of collection.json.

    One item a site-year, saved beside its images, with them as assets; all items once more in items.parquet. All hrefs are
    relative, so the folder can be moved or served as it is. Checksums are multihashes (SHA-256). Licence and citation of
    every input, which the images carry, become links, providers and publications.

    Args:
        out: the folder everything lies in; collection.json is written there.
        cogs: images below `out`.
        tables: asset key -> file below `out`: footprints as GeoParquet or GeoPackage, whole cubes as NetCDF or Zarr.
        title: the collection's title; its id is made of it.
        about: what this is, for people; the attribution that the Copernicus terms demand is added.
        licence: SPDX identifier of the whole, or "other": those of its inputs, which are linked.

    Raises:
        CubeError: no image, an image or table that lies outside `out` or cannot be read, or a file cannot be written.
    """
    site_years: dict[Path, list[Path]] = {}
    for cog in sorted(cogs):
        site_years.setdefault(cog.with_name(cog.stem.rpartition("_")[0] + ".json"), []).append(cog)
    if not site_years:
        raise CubeError(f"{out}: there is no image to list, so there is no collection to write; export images first")
    outside = [p for p in (*site_years, *tables.values()) if not p.resolve().is_relative_to(out.resolve())]
    if outside:
        raise CubeError(f"{outside[0]}: lies outside {out}, so the collection could not be moved with it; export it there")
    name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    credited: dict[Credit, None] = {}  # in the order in which they are met, each once
    items = {path: _item(path, images, out / "collection.json", name, credited) for path, images in site_years.items()}
    assets = {key: _file_asset(key, table, out) for key, table in tables.items()}
    imagery_first = tuple(sorted(credited, key=lambda c: c.kind != "imagery"))
    collection = _collection(name, list(items.values()), title, about, licence, imagery_first, assets)
    collection["links"] += [_link("item", path, out) for path in items]
    mirror = {"type": MEDIA[".parquet"], "roles": ["collection-mirror"], "title": "The items as stac-geoparquet"}
    _write_items([_seen_from(out, path, item) for path, item in items.items()], out / "items.parquet")
    collection["assets"] = {**assets, "items": {**listed(out / "items.parquet", out, ""), **mirror}}
    for path, content in {**items, out / "collection.json": collection}.items():
        with whole(path) as part:
            part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return out / "collection.json"


def _seen_from(out: Path, path: Path, item: Mapping[str, Any]) -> dict[str, Any]:
    """The item with hrefs relative to `out`, where the table lies, rather than to its own file."""

    def moved(entry: Mapping[str, Any]) -> dict[str, Any]:
        there = entry["href"]
        return {**entry, "href": there if "://" in there else href(path.parent / there, out)}

    assets = {key: moved(asset) for key, asset in item["assets"].items()}
    return {**item, "assets": assets, "links": [moved(link) for link in item["links"]]}


def _write_items(items: list[dict[str, Any]], path: Path) -> None:
    with whole(path) as part:
        stac_geoparquet.arrow.to_parquet(stac_geoparquet.arrow.parse_stac_items_to_arrow(items), part)


def _item(path: Path, images: Iterable[Path], collection: Path, name: str, credited: dict[Credit, None]) -> dict[str, Any]:
    """The item of a site-year; adds what its images were made from to `credited`."""
    assets: dict[str, Any] = {}
    properties: dict[str, Any] = {}
    own: dict[Credit, None] = {}
    for image in images:
        try:
            with rasterio.open(image) as src:
                tags = src.tags()
                assets[tags["variable"]] = _image_asset(image, src)
                bounds = transform_bounds(src.crs, 4326, *src.bounds)
                geometry = transform_geom(src.crs, 4326, box(*src.bounds).__geo_interface__)
                grid = {
                    "proj:code": src.crs.to_string(),
                    "proj:shape": list(src.shape),
                    "proj:transform": list(src.transform)[:6],
                }
                dimensions = _dimensions(src, "bands" if tags["variable"] == "reflectance" else "")
                if tags["variable"] == "footprint":
                    properties |= _label(src)
        except (rasterio.errors.RasterioIOError, KeyError) as error:
            raise CubeError(f"{image}: is not an image that write_cogs made ({error}), so it cannot be listed") from error
        properties |= _processing(json.loads(tags.get("build", "{}")))
        properties["cube:dimensions"] = {**properties.get("cube:dimensions", {}), **dimensions}
        variable = {
            "type": "data",
            "dimensions": [*list(dimensions)[2:], "y", "x"],
            "description": LAYERS[tags["variable"]].title,
        }
        properties.setdefault("cube:variables", {})[tags["variable"]] = variable
        own |= dict.fromkeys(_credits(tags))
    credited |= own
    year = tags["year"]
    links = [_link(rel, collection, path.parent) for rel in ("root", "parent", "collection")] + _license_links(own)
    if "label:type" in properties:
        links.append({**_link("source", path, path.parent), "label:assets": [k for k in ("reflectance",) if k in assets]})
    used = {"projection", "raster", "eo", "file", "datacube"} | {k.partition(":")[0] for k in properties}
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
            "datetime": None,
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


def _credits(tags: Mapping[str, str]) -> list[Credit]:
    return [Credit(**{**c, "dois": tuple(c["dois"])}) for c in json.loads(tags.get("credits", "[]"))]


def _processing(build: Mapping[str, Any]) -> dict[str, Any]:
    """How the composite was made, as the processing extension and two fields of ours say it; nothing where nobody noted it."""
    if not build:
        return {}
    baselines = ", ".join(build["baselines"])
    return {
        "processing:level": "L3",
        "processing:software": {"minecube": build["version"], **build["libraries"]},
        "processing:datetime": build["committed"],
        "processing:lineage": f"{build['recipe']}, from {len(build['scenes'])} scenes of processing baselines {baselines}",
        "minecube:build_id": build["build_id"],
        "minecube:scenes": build["scenes"],
    }


def _label(src: rasterio.DatasetReader) -> dict[str, Any]:
    """The label extension's fields of a footprint, with the pixels of each class counted."""
    values, counts = np.unique(src.read(1), return_counts=True)
    seen = [{"name": CLASSES[int(v)], "count": int(n)} for v, n in zip(values, counts, strict=True)]
    whence = "".join(f", from {c.name} ({c.licence})" for c in _credits(src.tags()))
    return {
        "label:type": "raster",
        "label:properties": None,  # which the extension asks of rasters
        "label:classes": [{"name": None, "classes": list(CLASSES.values())[:2]}],
        "label:tasks": ["segmentation"],
        "label:description": f"Mine footprint: 1 mine, 0 not mine, 255 unknown{whence}",
        "label:overviews": [{"counts": seen}],
    }


def _dimensions(src: rasterio.DatasetReader, bands: str) -> dict[str, Any]:
    """The datacube extension's dimensions of an image: pixel centres from the first to the last."""
    height, width = src.shape
    (x0, y0), (x1, y1) = src.xy(0, 0), src.xy(height - 1, width - 1)
    place = {"type": "spatial", "reference_system": src.crs.to_epsg()}
    found: dict[str, Any] = {
        "x": {**place, "axis": "x", "extent": [x0, x1], "step": src.res[0]},
        "y": {**place, "axis": "y", "extent": [y1, y0], "step": src.res[1]},
    }
    return {**found, bands: {"type": "bands", "values": list(src.descriptions)}} if bands else found


def _image_asset(path: Path, src: rasterio.DatasetReader) -> dict[str, Any]:
    variable = src.tags()["variable"]
    layer = LAYERS[variable]
    pixel = {"data_type": src.dtypes[0], "nodata": src.nodata, "scale": src.scales[0], "spatial_resolution": src.res[0]}
    asset: dict[str, Any] = {
        **listed(path, path.parent, layer.title),
        "type": "image/tiff; application=geotiff; profile=cloud-optimized",
        "roles": list(layer.roles),
        "raster:bands": [pixel] * src.count,
    }
    if variable == "reflectance":
        spectra = [(b, *SPECTRUM[b]) for b in src.descriptions]
        asset["eo:bands"] = [{"name": b, "common_name": common, "center_wavelength": um} for b, common, um in spectra]
    if variable == "footprint":
        asset["file:values"] = [{"values": [value], "summary": text} for value, text in CLASSES.items()]
    return asset


def _file_asset(key: str, path: Path, out: Path) -> dict[str, Any]:
    """A table of footprints, or a cube of all years with its dimensions; a Zarr, being a folder, has no checksum."""
    media = {"type": MEDIA[path.suffix]}
    if path.suffix in (".parquet", ".gpkg"):
        return {**listed(path, out, f"Mine footprints as polygons: {key}"), **media, "roles": ["data", "labels"]}
    title = f"Cube of all years: {key}"
    place = listed(path, out, title) if path.is_file() else {"href": href(path, out), "title": title}
    try:
        how: dict[str, Any] = {"engine": "netcdf4"}
        if path.suffix == ".zarr":
            how = {"engine": "zarr", "group": "0" if (path / "0").is_dir() else None, "consolidated": False}
        with xr.open_dataset(path, decode_times=False, mask_and_scale=False, **how) as cube:
            return {**place, **media, "roles": ["data"], **_cube_fields(cube)}
    except (OSError, ValueError, ImportError) as error:
        raise CubeError(f"{path}: cannot be read ({error}), so the collection cannot list it") from error


def _cube_fields(cube: xr.Dataset) -> dict[str, Any]:
    epsg = int(cube["spatial_ref"].attrs["crs_wkt"].rpartition('"EPSG",')[2].partition("]")[0].strip('"'))
    place = {"type": "spatial", "reference_system": epsg}
    years = [int(y) for y in cube["year"]]
    span = [f"{years[0]}-01-01T00:00:00Z", f"{years[-1]}-12-31T23:59:59Z"]
    dimensions: dict[str, Any] = {
        axis: {**place, "axis": axis, "extent": [float(cube[axis].min()), float(cube[axis].max())]} for axis in ("x", "y")
    }
    bands = cube["band_name" if "band_name" in cube.coords else "band"].to_numpy()
    dimensions["band"] = {"type": "bands", "values": [str(b) for b in bands]}
    time = "time" if "time" in cube.dims else "year"
    dimensions[time] = {"type": "temporal", "extent": span, "values": [f"{y}-01-01T00:00:00Z" for y in years]}
    layers = {n: v for n, v in cube.data_vars.items() if "y" in v.dims}
    described = {
        str(n): {"type": "data", "dimensions": [str(d) for d in v.dims], "description": str(v.attrs["long_name"])}
        for n, v in layers.items()
    }
    return {"cube:dimensions": dimensions, "cube:variables": described}


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
    start, end = min(p["start_datetime"] for p in properties), max(p["end_datetime"] for p in properties)
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
    made_by = {"name": f"minecube {version}", "roles": ["processor"], "processing:software": {"minecube": version}}
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
        "summaries": {"constellation": ["sentinel-2"], "proj:code": sorted({p["proj:code"] for p in properties})},
        **({"sci:publications": publications} if publications else {}),
        "links": [root, *_license_links(credited), *cited],
    }


def _license_links(credited: Iterable[Credit]) -> list[dict[str, str]]:
    """A link to the text of each licence, once."""
    found = {c.url: f"{c.name}: {c.licence}" for c in credited if c.url}
    return [{"rel": "license", "href": url, "title": title} for url, title in found.items()]


def _link(rel: str, path: Path, folder: Path) -> dict[str, Any]:
    media = "application/geo+json" if rel in ("item", "source") else "application/json"
    return {"rel": rel, "href": href(path, folder), "type": media}
