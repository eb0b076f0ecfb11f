"""Read polygons from files of the formats that minecube names, and of no other.

GDAL picks a driver by a file's bytes. Some drivers, such as VRT, follow names inside a file to other files and hosts. Here the
suffix and the first bytes decide whether GDAL sees a file at all.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import zipfile
from pathlib import Path

import geopandas as gpd

NAMED = "GeoJSON, GeoPackage, GeoParquet, Shapefile (also zipped), FlatGeobuf or KML"
_FIRST = 2**16
"""Bytes at the start of a file that decide on its format."""
_FORMATS = {
    ".geojson": rb"(\xef\xbb\xbf)?\s*\{",
    ".json": rb"(\xef\xbb\xbf)?\s*\{",
    ".gpkg": rb"SQLite format 3\0.{52}(GPKG|GP10|GP11)",
    ".parquet": rb"PAR1",
    ".geoparquet": rb"PAR1",
    ".shp": rb"\0\0\x27\x0a",
    ".zip": rb"PK\x03\x04",
    ".fgb": rb"fgb\x03fgb",
    ".kml": rb"(\xef\xbb\xbf)?\s*(<\?xml[^>]*\?>)?\s*(<!--.*?-->\s*)*<kml[\s>]",
}
"""Suffix -> how a file of that format begins."""
_TEXTS = (".geojson", ".json", ".kml")
_OTHER_DRIVERS = rb"<OGR|gdal_streamed_alg|opengis\.net/gml"
"""Words by which GDAL would take a text for a VRT, a pipeline, a web service or GML."""
_PARTS = (".shp", ".shx", ".dbf", ".prj", ".cpg")
_MOST_ZIPPED = 2**31
"""Bytes that a zipped Shapefile may take."""


def read_vector(path: Path) -> gpd.GeoDataFrame:
    """Read the features of a file.

    Raises:
        ValueError: the file has another format than `NAMED`, or another than its suffix.
        OSError, RuntimeError: the file cannot be read.
    """
    place = path.absolute()  # begins with no driver's name
    suffix = place.suffix.lower()
    _check_format(place, suffix)
    if suffix in (".parquet", ".geoparquet"):
        return gpd.read_parquet(place)
    if suffix != ".zip":
        return gpd.read_file(place)
    with tempfile.TemporaryDirectory() as folder:
        try:
            shape = _unzip(place, Path(folder))
        except zipfile.BadZipFile as error:
            raise ValueError(f"expected a zip file, found a damaged one ({error}); make it again") from error
        return read_vector(shape)


def _check_format(path: Path, suffix: str) -> None:
    if suffix not in _FORMATS:
        raise ValueError(f"expected {NAMED}, found the suffix {suffix!r}; convert the file with ogr2ogr")
    if path.parts[1].startswith("vsi"):
        raise ValueError("expected a file, found a name that GDAL treats as virtual; move the file to another folder")
    with path.open("rb") as file:
        first = file.read(_FIRST)
    if not re.match(_FORMATS[suffix], first, re.DOTALL):
        raise ValueError(f"expected the format of the suffix {suffix}, found another; correct the suffix or convert the file")
    if suffix in _TEXTS and re.search(_OTHER_DRIVERS, first):
        raise ValueError("expected features, found a text that refers to other files; convert the file with ogr2ogr")


def _unzip(path: Path, folder: Path) -> Path:
    """Extract the only Shapefile of a zip file and return its new path."""
    with zipfile.ZipFile(path) as archive:
        members = {name.lower(): name for name in archive.namelist()}
        shapes = [name for name in members if name.endswith(".shp")]
        if len(shapes) != 1:
            raise ValueError(f"expected one .shp in the zip file, found {len(shapes)}; keep one")
        stem = shapes[0].removesuffix(".shp")
        found = {part: members[stem + part] for part in _PARTS if stem + part in members}
        size = sum(archive.getinfo(name).file_size for name in found.values())
        if size > _MOST_ZIPPED:
            raise ValueError(f"expected at most {_MOST_ZIPPED:,} bytes in the zip file, found {size:,}; unzip it")
        for part, name in found.items():
            with archive.open(name) as packed, (folder / f"polygons{part}").open("wb") as file:
                shutil.copyfileobj(packed, file)
    return folder / "polygons.shp"
