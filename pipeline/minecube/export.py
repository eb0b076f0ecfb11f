"""Cubes and footprints as files that other tools open: Cloud Optimized GeoTIFFs, GeoParquet or GeoPackage, a STAC collection.

    out/collection.json                   written last: what it lists is there
    out/pit/pit_2020.json                 one item a site-year, beside its images
    out/pit/pit_2020_reflectance.tif      band names, scale and nodata are inside, too

Each file is written under another name and then renamed, so a full disk or a killed run leaves no half file. The items say
what the images themselves say: they are read back for it.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import rasterio
import xarray as xr
from odc.geo.geobox import GeoBox
from odc.geo.xr import xr_coords
from pyogrio.errors import DataLayerError, DataSourceError
from rasterio.io import MemoryFile
from rasterio.warp import transform_bounds, transform_geom
from shapely.geometry import box

from minecube.errors import CubeError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """How one variable of a cube becomes an image."""

    title: str
    nodata: int
    scale: float
    """Pixel value x scale = physical value."""
    overview: str
    """GDAL resampling of the overviews: classes must not be averaged."""
    roles: tuple[str, ...]


LAYERS = {
    "reflectance": Layer(
        title="Surface reflectance, annual composite", nodata=0, scale=1e-4, overview="AVERAGE", roles=("data", "reflectance")
    ),
    "footprint": Layer(title="Mine footprint", nodata=255, scale=1, overview="NEAREST", roles=("data", "labels")),
    "probability": Layer(title="Mine probability", nodata=255, scale=1 / 250, overview="AVERAGE", roles=("data",)),
}
# Name in the STAC EO extension v1.1, and centre in micrometres (Sentinel-2A's, from MTD_MSIL2A.xml, Spectral_Information).
SPECTRUM = {
    "B02": ("blue", 0.4927),
    "B03": ("green", 0.5598),
    "B04": ("red", 0.6646),
    "B05": ("rededge", 0.7041),
    "B06": ("rededge", 0.7405),
    "B07": ("rededge", 0.7828),
    "B08": ("nir", 0.8328),
    "B8A": ("nir08", 0.8647),
    "B11": ("swir16", 1.6137),
    "B12": ("swir22", 2.2024),
}
STAC_VERSION = "1.1.0"
EXTENSIONS = [
    f"https://stac-extensions.github.io/{name}/schema.json"
    for name in ("projection/v2.0.0", "raster/v1.1.0", "eo/v1.1.0", "file/v2.1.0")
]
SENTINEL_TERMS = "https://sentinels.copernicus.eu/documents/247904/690755/Sentinel_Data_Legal_Notice"


def write_cogs(cube: xr.Dataset, grid: GeoBox, out: Path, site: str) -> list[Path]:
    """One Cloud Optimized GeoTIFF a year and variable, `<site>_<year>_<variable>.tif` in `out`; their paths.

    Of reflectance (one image band per band, uint16), footprint and probability (uint8), those the cube has; a year in
    which a variable holds nothing but nodata gets no file. Values are the cube's own; scale and nodata stand in the file.

    Raises:
        CubeError: the cube does not lie on the grid, or a file cannot be written.
    """
    _need_on_grid(cube, grid, site)
    written = []
    for year in cube.year.to_numpy():
        for name in (n for n in LAYERS if n in cube):
            layer = cube[name].sel(year=year)
            values = layer.to_numpy()
            if (values == LAYERS[name].nodata).all():
                log.info("%s %s: %s holds nothing but nodata, so it gets no file", site, year, name)
                continue
            bands = [str(b) for b in layer.band.to_numpy()] if "band" in layer.dims else [name]
            path = out / f"{site}_{year}_{name}.tif"
            tags = {"site": site, "year": str(year), "variable": name}
            _write_cog(path, values.reshape(len(bands), *grid.shape), bands, grid, tags)
            written.append(path)
    return written


def _need_on_grid(cube: xr.Dataset, grid: GeoBox, site: str) -> None:
    expected = xr_coords(grid)
    for axis in ("y", "x"):
        if cube.sizes[axis] != expected[axis].size or not np.allclose(cube[axis], expected[axis], rtol=0, atol=1e-3):
            raise CubeError(
                f"{site}: the cube's {axis} coordinates are not the grid's pixel centres, so its images would lie in the wrong "
                "place; export it on the grid it was built on"
            )


def _write_cog(path: Path, values: np.ndarray[Any, Any], bands: list[str], grid: GeoBox, tags: Mapping[str, str]) -> None:
    layer = LAYERS[tags["variable"]]
    profile = {"crs": str(grid.crs), "transform": grid.affine, "nodata": layer.nodata, "dtype": values.dtype}
    profile |= {"count": len(bands), "height": grid.shape[0], "width": grid.shape[1]}
    options = {"compress": "DEFLATE", "predictor": "YES", "blocksize": 512, "overview_resampling": layer.overview}
    # Into memory first: a disk that fills up is then Python's OSError, not a private error class of rasterio's.
    with MemoryFile() as memory:
        with memory.open(driver="COG", **profile, **options) as image:
            image.write(values)
            image.descriptions = bands
            image.scales = [layer.scale] * len(bands)
            image.update_tags(**tags)
        with _whole(path) as part:
            part.write_bytes(memory.getbuffer())


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, renamed to `path` at the end, so that a reader finds the whole file or none."""
    part = path.with_name(f".{os.getpid()}.part.{path.name}")  # keeps the suffix, which drivers go by
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        part.replace(path)
    except (OSError, DataSourceError, DataLayerError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CubeError(f"{path}: cannot be written ({reason}); no half file stays; mend that and export again") from error
    finally:
        # Whatever a failed or an earlier, killed run left of this file; SQLite keeps a journal beside its own.
        for left in path.parent.glob(f".*.part.{glob.escape(path.name)}*"):
            left.unlink(missing_ok=True)


def write_footprints(table: gpd.GeoDataFrame, path: Path) -> None:
    """The footprints as GeoParquet (`.parquet`) or GeoPackage (`.gpkg`), by the path's suffix.

    Raises:
        CubeError: another suffix, or the file cannot be written.
    """
    suffix = path.suffix.lower()
    if suffix not in (".parquet", ".gpkg"):
        raise CubeError(f"{path}: expected a name in .parquet or .gpkg, found {suffix or 'no suffix'!r}; choose one")
    with _whole(path) as part:
        if suffix == ".parquet":
            table.to_parquet(part)
        else:
            table.to_file(part, driver="GPKG", layer="footprints")


def write_stac(
    out: Path, cogs: Iterable[Path], tables: Mapping[str, Path], *, title: str, about: str, licence: str = "other"
) -> Path:
    """A self-contained STAC collection of images made by `write_cogs` and of footprint tables; the path of collection.json.

    One item a site-year, saved beside its images, with them as assets. All hrefs are relative, so the folder can be moved
    or served as it is. Checksums are multihashes (SHA-256).

    Args:
        out: the folder everything lies in; collection.json is written there.
        cogs: images below `out`.
        tables: asset key -> GeoParquet or GeoPackage below `out`.
        title: the collection's title; its id is made of it.
        about: what this is, for people; the attribution that the Copernicus terms demand is added.
        licence: SPDX identifier of the whole, or "other": the Copernicus Sentinel data terms, which are linked.

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
    items = {path: _item(path, images, out / "collection.json", name) for path, images in site_years.items()}
    collection = _collection(name, list(items.values()), title, about, licence)
    collection["links"] += [_link("item", path, out) for path in items]
    collection["assets"] = {key: _table_asset(key, table, out) for key, table in tables.items()}
    for path, content in {**items, out / "collection.json": collection}.items():
        with _whole(path) as part:
            part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return out / "collection.json"


def _item(path: Path, images: Iterable[Path], collection: Path, name: str) -> dict[str, Any]:
    assets = {}
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
        except (rasterio.errors.RasterioIOError, KeyError) as error:
            raise CubeError(f"{image}: is not an image that write_cogs made ({error}), so it cannot be listed") from error
    year = tags["year"]
    return {
        "type": "Feature",
        "stac_version": STAC_VERSION,
        "stac_extensions": EXTENSIONS,
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
            **grid,
        },
        "links": [_link(rel, collection, path.parent) for rel in ("root", "parent", "collection")],
        "assets": assets,
    }


def _image_asset(path: Path, src: rasterio.DatasetReader) -> dict[str, Any]:
    variable = src.tags()["variable"]
    layer = LAYERS[variable]
    pixel = {"data_type": src.dtypes[0], "nodata": src.nodata, "scale": src.scales[0], "spatial_resolution": src.res[0]}
    asset: dict[str, Any] = {
        **_file(path, path.parent, layer.title),
        "type": "image/tiff; application=geotiff; profile=cloud-optimized",
        "roles": list(layer.roles),
        "raster:bands": [pixel] * src.count,
    }
    if variable == "reflectance":
        spectra = [(b, *SPECTRUM[b]) for b in src.descriptions]
        asset["eo:bands"] = [{"name": b, "common_name": common, "center_wavelength": um} for b, common, um in spectra]
    if variable == "footprint":
        meanings = {0: "not mine", 1: "mine", 255: "unknown"}
        asset["file:values"] = [{"values": [value], "summary": text} for value, text in meanings.items()]
    return asset


def _table_asset(key: str, path: Path, out: Path) -> dict[str, Any]:
    media = "application/vnd.apache.parquet" if path.suffix == ".parquet" else "application/geopackage+sqlite3"
    return {**_file(path, out, f"Mine footprints as polygons: {key}"), "type": media, "roles": ["data", "labels"]}


def _file(path: Path, folder: Path, title: str) -> dict[str, Any]:
    try:
        with path.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
            size = content.tell()
    except OSError as error:
        raise CubeError(f"{path}: cannot be read ({error.strerror}), so the collection cannot list it") from error
    # Multihash: 0x12 says SHA-256, 0x20 its 32 bytes.
    return {"href": _href(path, folder), "title": title, "file:size": size, "file:checksum": f"1220{digest}"}


def _collection(name: str, items: list[dict[str, Any]], title: str, about: str, licence: str) -> dict[str, Any]:
    west, south, east, north = zip(*(i["bbox"] for i in items), strict=True)
    properties = [i["properties"] for i in items]
    start, end = min(p["start_datetime"] for p in properties), max(p["end_datetime"] for p in properties)
    esa = {
        "name": "European Space Agency, Copernicus Sentinel-2",
        "roles": ["producer", "licensor"],
        "url": "https://sentinels.copernicus.eu",
    }
    made_by = {"name": f"minecube {metadata.version('minecube')}", "roles": ["processor"]}
    terms = {"rel": "license", "href": SENTINEL_TERMS, "type": "application/pdf", "title": "Copernicus Sentinel data terms"}
    root = {"rel": "root", "href": "./collection.json", "type": "application/json"}
    return {
        "type": "Collection",
        "stac_version": STAC_VERSION,
        "stac_extensions": EXTENSIONS[-1:],
        "id": name,
        "title": title,
        "description": f"{about}\n\nContains modified Copernicus Sentinel data {start[:4]}-{end[:4]}.",
        "license": licence,
        "providers": [esa, made_by],
        "extent": {
            "spatial": {"bbox": [[min(west), min(south), max(east), max(north)]]},
            "temporal": {"interval": [[start, end]]},
        },
        "summaries": {"constellation": ["sentinel-2"], "proj:code": sorted({p["proj:code"] for p in properties})},
        "links": [root, terms],
    }


def _link(rel: str, path: Path, folder: Path) -> dict[str, str]:
    media = "application/geo+json" if rel == "item" else "application/json"
    return {"rel": rel, "href": _href(path, folder), "type": media}


def _href(path: Path, folder: Path) -> str:
    relative = Path(os.path.relpath(path, folder)).as_posix()
    return relative if relative.startswith(".") else f"./{relative}"
