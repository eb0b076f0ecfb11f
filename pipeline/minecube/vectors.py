"""Read polygons from files, only in the formats listed by minecube.

GDAL picks a driver by a file's bytes. Some drivers, such as VRT, follow names inside a file to
other files and hosts. Here the suffix and the first bytes must match before GDAL sees a file.
"""

from __future__ import annotations

import fnmatch
import json
import logging
import re
import tempfile
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pyogrio
import shapely
from pyproj import CRS

from minecube.arrays import AnyArray
from minecube.places import Place, Url, local_copy

FORMAT_NAMES = (
    "GeoJSON, GeoPackage, GeoParquet, Shapefile, FlatGeobuf, KML or File Geodatabase, also zipped"
)
_BEGINNING = 2**16
"""Number of first bytes that determine a file's format."""
_FORMATS = {
    ".geojson": rb"(\xef\xbb\xbf)?\s*\{",
    ".json": rb"(\xef\xbb\xbf)?\s*\{",
    ".gpkg": rb"SQLite format 3\0.{52}(GPKG|GP10|GP11)",
    ".parquet": rb"PAR1",
    ".geoparquet": rb"PAR1",
    ".shp": rb"\0\0\x27\x0a",
    ".zip": rb"PK\x03\x04",
    ".fgb": rb"fgb\x03fgb",
    ".kml": rb"(\xef\xbb\xbf)?\s*(<\?xml[^>]*\?>)?\s*(<!--.*?-->\s*)*<(\w+:)?kml[\s>]",
    ".kmz": rb"PK\x03\x04",
    ".gdb": rb"[\x03\x04]\0\0\0",
}
"""Suffix -> beginning of a file. A File Geodatabase is a folder: its table of contents decides."""
SUFFIXES = tuple(_FORMATS)
_CONTENTS = "a00000001.gdbtable"
_PARQUET = (".parquet", ".geoparquet")
_TEXTS = (".geojson", ".json", ".kml")
_UTF_16 = (b"\xff\xfe", b"\xfe\xff", b"<\0", b"\0<", b"{\0", b"\0{")
"""Beginnings of UTF-16 texts. The words of `_OTHER_DRIVERS` cannot be found in UTF-16."""
_OTHER_DRIVERS = rb"<OGR|gdal_streamed_alg|opengis\.net/gml"
"""Words in a text that make GDAL read it as a VRT, a pipeline, a web service or GML."""
_SHORT_TIME = rb"<(?:\w+:)?(begin|end|when)>\s*(\d{4}(?:-\d\d)?)\s*<"
"""A year or a month in a KML file. GDAL reads only whole dates, and takes these as missing."""
_ZIPS = (".zip", ".kmz")
_ZIPPED = (".geojson", ".gpkg", *_PARQUET, ".shp", ".fgb", ".kml")
"""Suffixes read from a zip file. `.json` is left out: it may be anything."""
_PARTS = (".shx", ".dbf", ".prj", ".cpg")
_MOST_ZIPPED = 2**31
"""Maximum bytes of the polygons in a zip file."""
_MOST_COLUMNS = 8
"""Maximum number of columns listed in an error."""
_ENCRYPTED = 1
"""Flag bit of a zip member with a password."""
_COLLECTIONS = [
    shapely.GeometryType.MULTIPOINT,
    shapely.GeometryType.MULTILINESTRING,
    shapely.GeometryType.MULTIPOLYGON,
    shapely.GeometryType.GEOMETRYCOLLECTION,
]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """One table of a file."""

    path: Path
    name: str
    kind: str | None
    """Geometry type in GDAL's spelling; None for a table without geometry."""
    number: int | None
    """Index in the file; None for Parquet, with one table per file."""


def read_vector(path: Place, layer: str | None = None) -> gpd.GeoDataFrame:
    """Read the features of a file.

    In a file with several layers, this reads the only one with polygons. A warning lists the rest.

    Args:
        path: the file, or the local folder of a File Geodatabase.
        layer: the layer to read. `*` stands for any letters; the rows of all matching layers are
            joined.

    Raises:
        ValueError: the format is not in `FORMAT_NAMES` or contradicts the suffix, several layers have
            polygons but `layer` is not given, or no layer has the requested name.
        OSError, RuntimeError: the file cannot be read.
        PlaceError: there is no such object.
    """
    if isinstance(path, Url) and path.suffix.lower() == ".gdb":
        raise ValueError("expected a file, found the name of a folder; zip the File Geodatabase")
    parts = _PARTS if path.suffix.lower() == ".shp" else ()
    with local_copy(path, parts) as copy:
        return _read_file(path, copy.absolute(), layer)  # it starts with no driver's name


def _read_file(path: Place, copy: Path, layer: str | None) -> gpd.GeoDataFrame:
    """Read a local file. Messages name its place `path`."""
    try:
        if copy.suffix.lower() not in _ZIPS:
            return _read_layers(path, _layers_of(copy), layer)
        _check_format(copy)
        with tempfile.TemporaryDirectory() as folder:
            return _read_layers(path, _zipped_layers(copy, Path(folder)), layer)
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"expected a zip file, found a damaged one ({error}); make it again"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(
            "expected text in UTF-8, found another encoding; "
            "convert the file to UTF-8, for example with iconv"
        ) from error
    except shapely.errors.ShapelyError as error:
        raise ValueError(
            f"expected polygons, found geometries that cannot be read ({error}); convert the file"
        ) from error


def _check_format(path: Path) -> None:
    """Raise ValueError unless a file has the format of its suffix."""
    _check_place(path)
    suffix = path.suffix.lower()
    content = path
    if suffix == ".gdb":
        content = path / _CONTENTS
    with content.open("rb") as file:
        beginning = file.read(_BEGINNING)
    if suffix in _TEXTS and beginning.startswith(_UTF_16):
        raise ValueError("expected text in UTF-8, found UTF-16; save the file as UTF-8")
    if not re.match(_FORMATS[suffix], beginning, re.DOTALL):
        raise ValueError(
            f"expected the format of the suffix {suffix}, found another; "
            "correct the suffix or convert the file"
        )
    if suffix in _TEXTS and re.search(_OTHER_DRIVERS, beginning):
        raise ValueError(
            "expected features, found a text that refers to other files; "
            "convert the file with ogr2ogr"
        )


def _check_place(path: Path) -> None:
    """Raise ValueError for an unknown suffix, a name special to GDAL, or a folder for a file."""
    suffix = path.suffix.lower()
    if suffix not in _FORMATS:
        raise ValueError(
            f"expected {FORMAT_NAMES}, found the suffix {suffix!r}; convert the file with ogr2ogr"
        )
    if path.parts[1].startswith("vsi"):
        raise ValueError(
            "expected a file, found a name that GDAL treats as virtual; "
            "move the file to another folder"
        )
    if suffix == ".gdb" and path.exists() and not path.is_dir():
        raise ValueError(
            f"expected a folder with the suffix {suffix}, found a file; name the folder of polygons"
        )
    if suffix != ".gdb" and path.is_dir():
        raise ValueError(
            f"expected a file with the suffix {suffix}, found a folder; name the file of polygons"
        )
    if suffix == ".gdb" and path.is_dir() and not (path / _CONTENTS).is_file():
        raise ValueError(
            f"expected a File Geodatabase, found a folder without {_CONTENTS}; name another folder"
        )


def _layers_of(path: Path) -> list[_Layer]:
    """List the layers of one file that is not zipped."""
    _check_format(path)
    suffix = path.suffix.lower()
    if suffix in _PARQUET:
        return [_Layer(path=path, name=path.stem, kind="Unknown", number=None)]
    if suffix == ".kml":
        _check_times(path)
    try:
        listed = pyogrio.list_layers(path)
    except pyogrio.errors.DataSourceError as error:
        # Without GDAL's advice to name a driver: minecube chooses the driver.
        text = str(error).replace(str(path), path.name).partition(".; It might help")[0]
        raise ValueError(
            f"expected features, found a file that GDAL cannot open ({text}); check the file"
        ) from error
    return [
        _Layer(path=path, name=str(name), kind=kind, number=number)
        for number, (name, kind) in enumerate(listed)
    ]


def _check_times(path: Path) -> None:
    """Raise ValueError for a year or a month in a KML file."""
    if time := re.search(_SHORT_TIME, path.read_bytes()):
        element = time[1].decode()
        date = time[2].decode()
        raise ValueError(
            f"expected whole dates in <{element}>, found {date}; write {date[:4]}-01-01 or the like"
        )


def _zipped_layers(path: Path, folder: Path) -> list[_Layer]:
    """Extract the polygons of a zip file to a folder, and list their layers.

    A name of two layers gets the path of its file in front, without the suffix. If both files
    differ in their suffix only, the suffix stays.
    """
    _extract_polygons(path, folder)
    layers = [layer for file in _files_of(folder) for layer in _layers_of(file)]
    if not layers:
        raise ValueError(f"expected {FORMAT_NAMES}; found none of these in the zip file")
    names = [layer.name for layer in layers]
    for n in _repeated(names):
        names[n] = _long_name(layers[n], layers[n].path.relative_to(folder).with_suffix(""))
    for n in _repeated(names):
        names[n] = _long_name(layers[n], layers[n].path.relative_to(folder))
    return [replace(layer, name=name) for layer, name in zip(layers, names, strict=True)]


def _extract_polygons(path: Path, folder: Path) -> None:
    """Extract the polygons of a zip file to a folder. Raises ValueError if this is impossible."""
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if _may_be_polygons(member)]
        size = sum(member.file_size for member in members)
        if size > _MOST_ZIPPED:
            raise ValueError(
                f"expected at most {_MOST_ZIPPED:,} bytes in the zip file, found {size:,}; unzip it"
            )
        if any(member.flag_bits & _ENCRYPTED for member in members):
            raise ValueError(
                "expected a zip file without a password, found an encrypted one; "
                "unzip it and name the file in it"
            )
        try:
            for member in members:
                archive.extract(member, folder)
        except NotImplementedError as error:
            raise ValueError(
                f"expected a zip file that Python can read ({error}); "
                "unzip it and name the file in it"
            ) from error


def _files_of(folder: Path) -> list[Path]:
    """List the files of polygons below a folder, and the folders of File Geodatabases."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() == ".gdb" or (path.suffix.lower() in _ZIPPED and path.is_file())
    ]


def _repeated(names: Sequence[str]) -> list[int]:
    """Return the positions of names used more than once."""
    uses = Counter(names)
    return [position for position, name in enumerate(names) if uses[name] > 1]


def _may_be_polygons(member: zipfile.ZipInfo) -> bool:
    path = Path(member.filename)
    if member.is_dir() or path.name.startswith("._"):  # added by macOS
        return False
    in_geodatabase = any(parent.suffix.lower() == ".gdb" for parent in path.parents)
    return in_geodatabase or path.suffix.lower() in (*_ZIPPED, *_PARTS)


def _long_name(layer: _Layer, file: Path) -> str:
    """Name a layer by its file, plus its own name if different."""
    if layer.path.stem == layer.name:
        return file.as_posix()
    return f"{file.as_posix()}/{layer.name}"


def _read_layers(path: Place, layers: Sequence[_Layer], name: str | None) -> gpd.GeoDataFrame:
    """Read the requested layers, or else the only one with polygons."""
    if name is not None:
        matches = [layer for layer in layers if layer.name == name]
        if not matches:
            matches = [layer for layer in layers if fnmatch.fnmatchcase(layer.name, name)]
        if not matches:
            raise ValueError(
                f"expected a layer {name!r}, found {_describe(layers)}; name one of these"
            )
        return _join([_read_layer(layer) for layer in matches])
    if len(layers) == 1:
        return _read_layer(layers[0])
    areal = [layer for layer in layers if _has_areas(layer)]
    if len(areal) > 1:
        raise ValueError(
            f"expected one layer of polygons, found {len(areal)}: {_describe(areal)}; "
            "name the one to read with --layer, or --sites-layer for a file of --sites"
        )
    if not areal:
        raise ValueError(
            f"expected a layer of polygons, found {_describe(layers) or 'no layer'}; "
            "name another file"
        )
    log.warning(
        "%s: layer %s was read; these hold no polygons and were left out: %s",
        path,
        areal[0].name,
        _describe([layer for layer in layers if layer not in areal]),
    )
    return _read_layer(areal[0])


def _describe(layers: Sequence[_Layer]) -> str:
    kinds = {None: "no geometry", "Unknown": "any geometry"}
    return ", ".join(f"{layer.name} ({kinds.get(layer.kind, layer.kind)})" for layer in layers)


def _has_areas(layer: _Layer) -> bool:
    if layer.kind and re.search("Polygon|Surface", layer.kind):
        info = pyogrio.read_info(layer.path, layer=layer.number, force_feature_count=True)
        return bool(info["features"])
    if layer.kind and re.search("Unknown|Collection", layer.kind):
        table = _read_layer(layer)
        return isinstance(table, gpd.GeoDataFrame) and bool(
            (shapely.get_dimensions(table.geometry) == 2).any()
        )
    return False


def _join(tables: Sequence[gpd.GeoDataFrame]) -> gpd.GeoDataFrame:
    """Join the rows of layers in the CRS of the first one."""
    if len(tables) == 1:
        return tables[0]
    if not all(isinstance(table, gpd.GeoDataFrame) and table.crs is not None for table in tables):
        raise ValueError(
            "expected layers with geometries and a CRS to join, found one without; "
            "name the others one by one"
        )
    name = tables[0].geometry.name
    alike = [
        table.rename(columns={table.geometry.name: name}).set_geometry(name).to_crs(tables[0].crs)
        for table in tables
    ]
    return pd.concat([table for table in alike if len(table)] or alike[:1], ignore_index=True)


def _read_layer(layer: _Layer) -> gpd.GeoDataFrame:
    if layer.number is None:
        return _read_parquet(layer.path)
    table = gpd.read_file(layer.path, layer=layer.number)
    if layer.path.suffix.lower() == ".kml" and "Name" in table and table["Name"].notna().any():
        # "id" is the document's own number. People know a placemark by its name.
        table = table.rename(columns={"id": "kml_id"})
    return table


def _read_parquet(path: Path) -> gpd.GeoDataFrame:
    """Read GeoParquet, or Parquet with its own geometry type."""
    file = pq.ParquetFile(path)
    metadata = file.schema_arrow.metadata or {}
    if b"geo" in metadata:
        return gpd.read_parquet(path)
    columns = [file.schema.column(n) for n in range(len(file.schema.names))]
    geometries = [c for c in columns if c.logical_type.type in ("GEOMETRY", "GEOGRAPHY")]
    if not geometries:
        fields = [f"{field.name} ({field.type})" for field in file.schema_arrow]
        raise ValueError(
            "expected GeoParquet, or a column of Parquet's type GEOMETRY, "
            f"found {', '.join(fields[:_MOST_COLUMNS])}; "
            "write GeoParquet with geopandas or ogr2ogr"
        )
    table = file.read().to_pandas()
    for column in geometries:
        crs = _parquet_crs(json.loads(column.logical_type.to_json()).get("crs") or "", metadata)
        table[column.path] = gpd.GeoSeries.from_wkb(table[column.path], crs=crs)
    names = [column.path for column in geometries]
    geometry = "geometry" if "geometry" in names else names[0]
    return gpd.GeoDataFrame(table, geometry=geometry)


def _parquet_crs(text: str, metadata: Mapping[bytes, bytes]) -> CRS:
    """Read the CRS of a Parquet geometry type.

    It is longitude and latitude by default, `srid:N`, `projjson:KEY`, or any text known to pyproj.
    """
    key = text.removeprefix("projjson:").encode()
    if key in metadata:
        return CRS.from_user_input(metadata[key].decode())
    code = text.removeprefix("srid:")
    if code.isdigit():
        return CRS.from_epsg(code)
    return CRS.from_user_input(text or "OGC:CRS84")


def rename_columns(table: gpd.GeoDataFrame, meanings: Mapping[str, str]) -> gpd.GeoDataFrame:
    """Rename columns to their meaning, ignoring case, and join columns of the same meaning.

    `meanings` maps a name in lower case to the column of that meaning.

    Raises:
        ValueError: two columns have the same meaning, and a row has a value in both.
    """
    names: dict[str, list[str]] = {}
    for column in table.columns.drop(table.geometry.name):
        meaning = meanings.get(str(column).strip().lower())
        if meaning:
            names.setdefault(meaning, []).append(column)
    for meaning, twins in names.items():
        filled = [name for name in twins if to_texts(table[name]).notna().any()] or twins[:1]
        column = filled[0]
        if len(filled) > 1:
            table = table.assign(**{column: _coalesce(table, filled)})
        table = table.drop(columns=[name for name in twins if name != column])
        table = table.rename(columns={column: meaning})
    return table


def _coalesce(table: gpd.GeoDataFrame, names: Sequence[str]) -> pd.Series:
    """Join columns with at most one value per row."""
    filled = np.stack([to_texts(table[name]).notna().to_numpy() for name in names])
    if (filled.sum(axis=0) > 1).any():
        raise ValueError(f"has several columns of one meaning: {', '.join(names)}; keep one")
    joined = pd.Series(None, table.index, dtype=object)
    for name, rows in zip(names, filled, strict=True):
        # A column of integers with a gap is stored as floats.
        joined[rows] = table[name].convert_dtypes().astype(object).to_numpy()[rows]
    return joined.infer_objects()


def to_texts(column: pd.Series) -> pd.Series:
    """Convert values to text: 7 (not 7.0) in columns of numbers with gaps; missing if blank.

    Bytes are read as UTF-8. Invalid bytes become the replacement character.
    """
    with np.errstate(invalid="ignore"):  # infinite numbers are not integers
        values = column.convert_dtypes()
    if values.dtype == object:
        values = values.map(_decode, na_action="ignore")
    text = values.astype("string").str.strip()
    return text.mask(text == "")


def _decode(value: object) -> str:
    if isinstance(value, bytes | bytearray):
        return bytes(value).decode(errors="replace")
    return str(value)


def extract_polygons(shape: shapely.Geometry) -> shapely.Geometry:
    """Return the polygons of a collection as one multipolygon."""
    parts = _single_parts(shape)
    return shapely.multipolygons(parts[shapely.get_type_id(parts) == shapely.GeometryType.POLYGON])


def extract_polygons_of_collections(shapes: AnyArray) -> tuple[AnyArray, AnyArray]:
    """Keep only the polygons of each GeometryCollection that has some.

    Returns:
        The shapes, and per shape the omitted parts in words ("1 LineString"; "" for none).
    """
    shapes = shapes.copy()
    omitted = np.full(len(shapes), "", object)
    types = shapely.get_type_id(shapes)
    for n in np.flatnonzero(types == shapely.GeometryType.GEOMETRYCOLLECTION):
        areas = extract_polygons(shapes[n])
        if shapely.is_empty(areas):
            continue
        kinds = Counter(part.geom_type for part in _single_parts(shapes[n]))
        del kinds["Polygon"]
        omitted[n] = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        shapes[n] = areas
    return shapes, omitted


def _single_parts(shape: shapely.Geometry) -> AnyArray:
    """Return all parts of a shape, also from nested collections."""
    parts: AnyArray = shapely.get_parts(shape)
    while np.isin(shapely.get_type_id(parts), _COLLECTIONS).any():
        parts = shapely.get_parts(parts)
    return parts
