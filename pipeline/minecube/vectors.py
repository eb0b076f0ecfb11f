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
import numpy.typing as npt
import pandas as pd
import pyarrow.parquet as pq
import pyogrio
import shapely
from pyproj import CRS

NAMED = (
    "GeoJSON, GeoPackage, GeoParquet, Shapefile, FlatGeobuf, KML or File Geodatabase, also zipped"
)
_FIRST = 2**16
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
_LISTED = 8
"""Maximum number of columns listed in an error."""
_ENCRYPTED = 1
"""Flag bit of a zip member with a password."""
_COLLECTIONS = [
    shapely.GeometryType[f"MULTI{kind}"].value for kind in ("POINT", "LINESTRING", "POLYGON")
]
_COLLECTIONS.append(shapely.GeometryType.GEOMETRYCOLLECTION.value)

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


def read_vector(path: Path, layer: str | None = None) -> gpd.GeoDataFrame:
    """Read the features of a file.

    In a file with several layers, this reads the only one with polygons. A warning lists the rest.

    Args:
        path: the file, or the folder of a File Geodatabase.
        layer: the layer to read. `*` stands for any letters; the rows of all matching layers are joined.

    Raises:
        ValueError: the format is not in `NAMED` or contradicts the suffix, several layers have
            polygons but `layer` is not given, or no layer has the requested name.
        OSError, RuntimeError: the file cannot be read.
    """
    place = path.absolute()  # an absolute path starts with no driver's name
    try:
        if place.suffix.lower() not in _ZIPS:
            return _read_layers(path, _layers_of(place), layer)
        _check_format(place)
        with tempfile.TemporaryDirectory() as folder:
            return _read_layers(path, _zipped_layers(place, Path(folder)), layer)
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"expected a zip file, found a damaged one ({error}); make it again"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(
            "expected text in UTF-8, found another encoding; convert the file to UTF-8, for example with iconv"
        ) from error
    except shapely.errors.ShapelyError as error:
        raise ValueError(
            f"expected polygons, found geometries that cannot be read ({error}); convert the file"
        ) from error


def _check_format(path: Path) -> None:
    suffix = path.suffix.lower()
    if suffix not in _FORMATS:
        raise ValueError(
            f"expected {NAMED}, found the suffix {suffix!r}; convert the file with ogr2ogr"
        )
    if path.parts[1].startswith("vsi"):
        raise ValueError(
            "expected a file, found a name that GDAL treats as virtual; move the file to another folder"
        )
    if path.is_dir() != (suffix == ".gdb") and path.exists():
        wanted, found = ("folder", "file") if suffix == ".gdb" else ("file", "folder")
        raise ValueError(
            f"expected a {wanted} with the suffix {suffix}, found a {found}; name the {wanted} of polygons"
        )
    if suffix == ".gdb" and path.is_dir() and not (path / _CONTENTS).is_file():
        raise ValueError(
            f"expected a File Geodatabase, found a folder without {_CONTENTS}; name another folder"
        )
    with (path / _CONTENTS if suffix == ".gdb" else path).open("rb") as file:
        first = file.read(_FIRST)
    if suffix in _TEXTS and first.startswith(_UTF_16):
        raise ValueError("expected text in UTF-8, found UTF-16; save the file as UTF-8")
    if not re.match(_FORMATS[suffix], first, re.DOTALL):
        raise ValueError(
            f"expected the format of the suffix {suffix}, found another; correct the suffix or convert the file"
        )
    if suffix in _TEXTS and re.search(_OTHER_DRIVERS, first):
        raise ValueError(
            "expected features, found a text that refers to other files; convert the file with ogr2ogr"
        )


def _layers_of(path: Path) -> list[_Layer]:
    """List the layers of one file that is not zipped."""
    _check_format(path)
    suffix = path.suffix.lower()
    if suffix in _PARQUET:
        return [_Layer(path=path, name=path.stem, kind="Unknown", number=None)]
    if suffix == ".kml" and (time := re.search(_SHORT_TIME, path.read_bytes())):
        year = time[2].decode()
        raise ValueError(
            f"expected whole dates in <{time[1].decode()}>, found {year}; write {year[:4]}-01-01 or the like"
        )
    try:
        listed = enumerate(pyogrio.list_layers(path))
    except pyogrio.errors.DataSourceError as error:
        # Without GDAL's advice to name a driver: minecube chooses the driver.
        text = str(error).replace(str(path), path.name).partition(".; It might help")[0]
        raise ValueError(
            f"expected features, found a file that GDAL cannot open ({text}); check the file"
        ) from error
    return [
        _Layer(path=path, name=str(name), kind=kind, number=number)
        for number, (name, kind) in listed
    ]


def _zipped_layers(path: Path, folder: Path) -> list[_Layer]:
    """Extract the polygons of a zip file to a folder, and list their layers.

    A layer name used twice gets its folder's name. If the folder also has it twice, it gets its
    suffix.
    """
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if _may_be_polygons(member)]
        size = sum(member.file_size for member in members)
        if size > _MOST_ZIPPED:
            raise ValueError(
                f"expected at most {_MOST_ZIPPED:,} bytes in the zip file, found {size:,}; unzip it"
            )
        if any(member.flag_bits & _ENCRYPTED for member in members):
            raise ValueError(
                "expected a zip file without a password, found an encrypted one; unzip it and name the file in it"
            )
        try:
            for member in members:
                archive.extract(member, folder)
        except NotImplementedError as error:
            raise ValueError(
                f"expected a zip file that Python can read ({error}); unzip it and name the file in it"
            ) from error
    paths = sorted(folder.rglob("*"))
    files = [
        path
        for path in paths
        if path.suffix.lower() == ".gdb" or (path.suffix.lower() in _ZIPPED and path.is_file())
    ]
    layers = [layer for file in files for layer in _layers_of(file)]
    if not layers:
        raise ValueError(f"expected {NAMED}; found none of these in the zip file")
    short = [layer.name for layer in layers]
    long = [_long_name(layer, layer.path.relative_to(folder).with_suffix("")) for layer in layers]
    longest = [_long_name(layer, layer.path.relative_to(folder)) for layer in layers]
    uses = Counter(short)
    names = [long[n] if uses[name] > 1 else name for n, name in enumerate(short)]
    uses = Counter(names)
    names = [longest[n] if uses[name] > 1 else name for n, name in enumerate(names)]
    return [replace(layer, name=name) for layer, name in zip(layers, names, strict=True)]


def _may_be_polygons(member: zipfile.ZipInfo) -> bool:
    path = Path(member.filename)
    if member.is_dir() or path.name.startswith("._"):  # added by macOS
        return False
    in_geodatabase = any(parent.suffix.lower() == ".gdb" for parent in path.parents)
    return in_geodatabase or path.suffix.lower() in (*_ZIPPED, *_PARTS)


def _long_name(layer: _Layer, file: Path) -> str:
    """Name a layer by its file, plus its own name if different."""
    return file.as_posix() if layer.path.stem == layer.name else f"{file.as_posix()}/{layer.name}"


def _read_layers(path: Path, layers: Sequence[_Layer], wanted: str | None) -> gpd.GeoDataFrame:
    """Read the requested layers, or else the only one with polygons."""
    if wanted is not None:
        same = [layer for layer in layers if layer.name == wanted]
        chosen = same or [layer for layer in layers if fnmatch.fnmatchcase(layer.name, wanted)]
        if not chosen:
            raise ValueError(
                f"expected a layer {wanted!r}, found {_listed(layers)}; name one of these"
            )
        return _joined([_read_layer(layer) for layer in chosen])
    if len(layers) == 1:
        return _read_layer(layers[0])
    areal = [layer for layer in layers if _has_areas(layer)]
    if len(areal) > 1:
        raise ValueError(
            f"expected one layer of polygons, found {len(areal)}: {_listed(areal)}; name the one to read with --layer, or "
            "--sites-layer for a file of --sites"
        )
    if not areal:
        raise ValueError(
            f"expected a layer of polygons, found {_listed(layers) or 'no layer'}; name another file"
        )
    others = _listed([layer for layer in layers if layer not in areal])
    log.warning(
        "%s: layer %s was read; these hold no polygons and were left out: %s",
        path,
        areal[0].name,
        others,
    )
    return _read_layer(areal[0])


def _listed(layers: Sequence[_Layer]) -> str:
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


def _joined(tables: Sequence[gpd.GeoDataFrame]) -> gpd.GeoDataFrame:
    """Join the rows of layers in the CRS of the first one."""
    if len(tables) == 1:
        return tables[0]
    if not all(isinstance(table, gpd.GeoDataFrame) and table.crs is not None for table in tables):
        raise ValueError(
            "expected layers with geometries and a CRS to join, found one without; name the others one by one"
        )
    name = tables[0].geometry.name
    same = [
        table.rename(columns={table.geometry.name: name}).set_geometry(name).to_crs(tables[0].crs)
        for table in tables
    ]
    return pd.concat([table for table in same if len(table)] or same[:1], ignore_index=True)


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
    native = {
        c.path: c.logical_type for c in columns if c.logical_type.type in ("GEOMETRY", "GEOGRAPHY")
    }
    if not native:
        fields = [f"{field.name} ({field.type})" for field in file.schema_arrow]
        found = ", ".join(fields[:_LISTED])
        raise ValueError(
            f"expected GeoParquet, or a column of Parquet's type GEOMETRY, found {found}; write GeoParquet "
            "with geopandas or ogr2ogr"
        )
    table = file.read().to_pandas()
    for name, kind in native.items():
        crs = _parquet_crs(json.loads(kind.to_json()).get("crs") or "", metadata)
        table[name] = gpd.GeoSeries.from_wkb(table[name], crs=crs)
    return gpd.GeoDataFrame(
        table, geometry="geometry" if "geometry" in native else next(iter(native))
    )


def _parquet_crs(text: str, metadata: Mapping[bytes, bytes]) -> CRS:
    """Read the CRS of a Parquet geometry type.

    It is longitude and latitude by default, `srid:N`, `projjson:KEY`, or any text known to pyproj.
    """
    key = text.removeprefix("projjson:").encode()
    if key in metadata:
        return CRS.from_user_input(metadata[key].decode())
    code = text.removeprefix("srid:")
    return CRS.from_epsg(code) if code.isdigit() else CRS.from_user_input(text or "OGC:CRS84")


def understood_columns(table: gpd.GeoDataFrame, meanings: Mapping[str, str]) -> gpd.GeoDataFrame:
    """Rename columns to their meaning, ignoring case, and join columns of the same meaning.

    Args:
        table: rows as read.
        meanings: name in lower case -> column of that meaning.

    Raises:
        ValueError: two columns have the same meaning, and a row has a value in both.
    """
    names: dict[str, list[str]] = {}
    for column in table.columns.drop(table.geometry.name):
        meaning = meanings.get(str(column).strip().lower())
        if meaning:
            names.setdefault(meaning, []).append(column)
    for meaning, twins in names.items():
        filled = [name for name in twins if texts(table[name]).notna().any()] or twins[:1]
        if len(filled) > 1:
            table = table.assign(**{filled[0]: _coalesced(table, filled)})
        table = table.drop(columns=[name for name in twins if name != filled[0]]).rename(
            columns={filled[0]: meaning}
        )
    return table


def _coalesced(table: gpd.GeoDataFrame, names: Sequence[str]) -> pd.Series:
    """Join columns with at most one value per row."""
    filled = np.stack([texts(table[name]).notna().to_numpy() for name in names])
    if (filled.sum(axis=0) > 1).any():
        raise ValueError(f"has the columns {', '.join(names)}, which mean the same; keep one")
    joined = pd.Series(None, table.index, dtype=object)
    for name, rows in zip(names, filled, strict=True):
        # A column of integers with a gap is stored as floats.
        joined[rows] = table[name].convert_dtypes().astype(object).to_numpy()[rows]
    return joined.infer_objects()


def texts(column: pd.Series) -> pd.Series:
    """Convert values to text: 7 (not 7.0) in columns of numbers with gaps; missing if blank.

    Bytes are read as UTF-8. Invalid bytes become the replacement character.
    """
    with np.errstate(invalid="ignore"):  # infinite numbers are not integers
        values = column.convert_dtypes()
    if values.dtype == object:
        values = values.map(_text, na_action="ignore")
    text = values.astype("string").str.strip()
    return text.mask(text == "")


def _text(value: object) -> str:
    return (
        bytes(value).decode(errors="replace")
        if isinstance(value, bytes | bytearray)
        else str(value)
    )


def areal_parts(shape: shapely.Geometry) -> shapely.Geometry:
    """Return the polygons of a collection as one multipolygon."""
    parts = _single_parts(shape)
    return shapely.multipolygons(
        parts[shapely.get_type_id(parts) == shapely.GeometryType.POLYGON.value]
    )


def areas_of_collections(
    shapes: npt.NDArray[np.object_],
) -> tuple[npt.NDArray[np.object_], npt.NDArray[np.object_]]:
    """Keep only the polygons of each GeometryCollection that has some.

    Returns:
        The shapes, and per shape the omitted parts in words ("1 LineString"; "" for none).
    """
    kept = shapes.copy()
    left_out = np.full(len(shapes), "", object)
    for n in np.flatnonzero(
        shapely.get_type_id(shapes) == shapely.GeometryType.GEOMETRYCOLLECTION.value
    ):
        areas = areal_parts(shapes[n])
        if shapely.is_empty(areas):
            continue
        kept[n] = areas
        kinds = Counter(part.geom_type for part in _single_parts(shapes[n]))
        left_out[n] = ", ".join(
            f"{count} {kind}" for kind, count in sorted(kinds.items()) if kind != "Polygon"
        )
    return kept, left_out


def _single_parts(shape: shapely.Geometry) -> npt.NDArray[np.object_]:
    """Return all parts of a shape, also from nested collections."""
    parts: npt.NDArray[np.object_] = shapely.get_parts(shape)
    while np.isin(shapely.get_type_id(parts), _COLLECTIONS).any():
        parts = shapely.get_parts(parts)
    return parts
