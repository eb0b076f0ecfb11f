"""Files of polygons are read in the named formats alone, whatever GDAL could make of their bytes."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pyogrio
import pytest
import rasterio
from pyproj import CRS
from rasterio.transform import from_origin
from shapely.geometry import box

from minecube.catalog import load_sites
from minecube.errors import CatalogError, LabelError
from minecube.labels import read_polygons

MINE = box(10.0, 50.0, 10.01, 50.01)
OTHER = box(20.0, 40.0, 20.01, 40.01)


def written(path, shape=MINE):
    table = gpd.GeoDataFrame({"id": ["a"]}, geometry=[shape], crs=4326)
    if path.suffix in (".parquet", ".geoparquet"):
        table.to_parquet(path)
    elif path.suffix == ".zip":
        table.to_file(path.with_suffix(".shp"))
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for part in ("shp", "shx", "dbf", "prj"):
                archive.write(path.with_suffix(f".{part}"), f"mines/{path.stem}.{part}")
    else:
        drivers = {
            ".geojson": "GeoJSON",
            ".json": "GeoJSON",
            ".gpkg": "GPKG",
            ".fgb": "FlatGeobuf",
            ".kml": "LIBKML",
        }
        table.to_file(path, driver=drivers.get(path.suffix, "ESRI Shapefile"))
    return path


@pytest.mark.parametrize(
    "suffix",
    ["geojson", "json", "gpkg", "parquet", "geoparquet", "shp", "SHP", "zip", "fgb", "kml"],
)
def test_every_named_format_is_read(tmp_path, suffix):
    path = written(tmp_path / f"mines.{suffix.lower()}")
    if suffix == "SHP":
        for part in ("shp", "shx", "dbf", "prj"):
            path.with_suffix(f".{part}").rename(tmp_path / f"mines.{part.upper()}")
        path = tmp_path / "mines.SHP"
    assert read_polygons(path).geometry[0].equals_exact(MINE, 1e-9, normalize=True)
    assert load_sites(path)[0].geometry.equals_exact(MINE, 1e-9, normalize=True)


def refused(path, words):
    with pytest.raises(LabelError, match=words):
        read_polygons(Path(path))
    with pytest.raises(CatalogError, match=words):
        load_sites(path)


VRT = '<OGRVRTDataSource><OGRVRTLayer name="other"><SrcDataSource>{other}</SrcDataSource></OGRVRTLayer></OGRVRTDataSource>'
KML = '<?xml version="1.0"?><!-- drawn --><kml xmlns="http://www.opengis.net/kml/2.2"><Document>{}</Document></kml>'


@pytest.mark.parametrize(
    "suffix", ["geojson", "json", "gpkg", "shp", "fgb", "kml", "vrt", "parquet", "zip"]
)
def test_a_file_that_names_another_file_is_refused(tmp_path, suffix):
    other = written(tmp_path / "other.gpkg", OTHER)
    path = tmp_path / f"mines.{suffix}"
    path.write_text(VRT.format(other=other))
    if suffix not in ("parquet", "shp", "zip"):  # GDAL itself follows the name
        assert gpd.read_file(path).geometry[0].equals(OTHER)
    refused(path, "expected")


def test_a_text_that_another_driver_would_take_is_refused(tmp_path):
    other = written(tmp_path / "other.gpkg", OTHER)
    pipeline = {"type": "gdal_streamed_alg", "command_line": f"gdal vector pipeline ! read {other}"}
    (tmp_path / "mines.geojson").write_text(json.dumps(pipeline))
    refused(tmp_path / "mines.geojson", "refers to other files")
    (tmp_path / "mines.kml").write_text(KML.format(VRT.format(other=other)))
    refused(tmp_path / "mines.kml", "refers to other files")


def test_a_format_must_be_the_one_of_the_suffix(tmp_path):
    written(tmp_path / "mines.gpkg").rename(tmp_path / "mines.geojson")
    refused(tmp_path / "mines.geojson", "format of the suffix .geojson")
    (tmp_path / "mines.csv").write_text("WKT\nPOINT (1 2)\n")
    refused(tmp_path / "mines.csv", "found the suffix '.csv'")
    plain = bytearray((written(tmp_path / "b.gpkg")).read_bytes())
    plain[68:72] = bytes(4)  # SQLite, but no GeoPackage
    (tmp_path / "plain.gpkg").write_bytes(plain)
    refused(tmp_path / "plain.gpkg", "format of the suffix .gpkg")


def test_names_that_gdal_treats_as_virtual_or_as_a_driver_are_refused(tmp_path, monkeypatch):
    written(tmp_path / "mines.zip")
    refused(f"/vsizip{tmp_path}/mines.zip/mines/mines.shp", "virtual")
    monkeypatch.chdir(tmp_path)
    refused("GPKG:mines.gpkg", "No such file")


def test_a_zip_of_other_things_is_refused(tmp_path):
    path = written(tmp_path / "mines.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("second.shp", b"")
    refused(path, r"format of the suffix \.shp")
    written(tmp_path / "other.gpkg", OTHER)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mines.shp", VRT.format(other=tmp_path / "other.gpkg"))
    refused(path, "format of the suffix .shp")
    path.write_bytes(path.read_bytes()[:-10])
    refused(path, "damaged")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data/mines.geojson", b"{oops")
    refused(path, r"GDAL cannot open \('mines.geojson' not recognized")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", b"nothing here")
    refused(path, "none of these in the zip file")


# --- several layers -----------------------------------------------------------------------------------------------------


def table(*shapes, **columns):
    return gpd.GeoDataFrame(columns, geometry=list(shapes), crs=4326)


def pit_2019():
    return table(MINE, year=[2019])


def pits_2022():
    return table(MINE, OTHER, year=[2022, 2022])


def kml(*folders):
    """A document with folders (name, placemarks)."""
    inside = "".join(
        f"<Folder><name>{name}</name>{''.join(marks)}</Folder>" for name, marks in folders
    )
    return KML.format(inside)


def placemark(shape, name="", more=""):
    ring = " ".join(f"{x},{y}" for x, y in shape.exterior.coords)
    area = f"<Polygon><outerBoundaryIs><LinearRing><coordinates>{ring}</coordinates></LinearRing></outerBoundaryIs></Polygon>"
    return f"<Placemark id='k1'><name>{name}</name>{more}{area}</Placemark>"


def two_layers(path):
    """A file with the layers mines_2019 (one row) and mines_2022 (two rows)."""
    layers = {"mines_2019": pit_2019(), "mines_2022": pits_2022()}
    if path.suffix in (".kml", ".kmz"):
        marks = (
            (name, [placemark(shape, "m") for shape in rows.geometry])
            for name, rows in layers.items()
        )
        text = kml(*marks)
        if path.suffix == ".kml":
            path.write_text(text)
            return path
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("doc.kml", text)
            archive.writestr("files/icon.png", b"no polygon")
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, rows in layers.items():
                rows.to_file(path.with_name(f"{name}.shp"))
                for part in ("shp", "shx", "dbf", "prj"):
                    archive.write(path.with_name(f"{name}.{part}"), f"data/{name}.{part}")
            archive.writestr("__MACOSX/data/._mines_2019.shp", b"resource fork")
            archive.writestr("data/about.json", b"[]")
    else:
        for name, rows in layers.items():
            driver = {".gpkg": "GPKG", ".gdb": "OpenFileGDB"}[path.suffix]
            rows.astype({"year": "int32"}).to_file(path, layer=name, driver=driver, mode="a")
    return path


@pytest.mark.parametrize("suffix", ["gpkg", "gdb", "kml", "kmz", "zip"])
def test_of_several_layers_of_polygons_none_is_taken_unasked(tmp_path, suffix):
    path = two_layers(tmp_path / f"mines.{suffix}")
    refused(
        path,
        r"expected one layer of polygons, found 2: mines_2019 \(.*\), mines_2022 \(.*\); name the one .* --layer",
    )
    assert [
        len(read_polygons(path, layer)) for layer in ("mines_2019", "mines_2022", "mines_*")
    ] == [1, 2, 3]
    with pytest.raises(
        LabelError, match=r"expected a layer 'mines_2020', found mines_2019 .*, mines_2022"
    ):
        read_polygons(path, "mines_2020")


def test_layers_are_joined_in_one_crs(tmp_path):
    path = tmp_path / "mines.gpkg"
    pit_2019().to_file(path, layer="a")
    table(OTHER, year=[2022]).to_crs(32634).to_file(path, layer="b", mode="a")
    found = read_polygons(path, "*")
    assert found["year"].tolist() == [2019, 2022]
    assert found.geometry[1].equals_exact(OTHER, 1e-6, normalize=True)


@pytest.mark.parametrize("first", [True, False])
def test_the_only_layer_of_polygons_is_taken_and_the_others_named(tmp_path, caplog, first):
    path = tmp_path / "mines.gpkg"
    points = gpd.GeoDataFrame({"n": [1]}, geometry=[MINE.centroid], crs=4326)
    layers = [("notes", points), ("mines", pit_2019()), ("template", pit_2019().iloc[:0])]
    for name, rows in layers if first else layers[::-1]:
        rows.to_file(path, layer=name, mode="a" if path.exists() else "w")
    pyogrio.write_dataframe(
        pd.DataFrame({"style": ["red"]}), path, layer="layer_styles", append=True
    )
    with caplog.at_level("WARNING"):
        assert read_polygons(path)["year"].tolist() == [2019]
    assert "layer mines was read" in caplog.text
    assert all(f"{name} (" in caplog.text for name in ("notes", "template", "layer_styles"))
    assert len(load_sites(path)) == 1


def test_a_table_of_raster_tiles_is_no_layer(tmp_path):
    path = tmp_path / "mines.gpkg"
    profile = {
        "driver": "GPKG",
        "width": 256,
        "height": 256,
        "count": 3,
        "dtype": "uint8",
        "crs": "EPSG:4326",
    }
    with rasterio.open(path, "w", **profile, transform=from_origin(10, 50, 1e-3, 1e-3)) as image:
        image.write(np.ones((3, 256, 256), "uint8"))
    refused(
        path,
        r"found a file that GDAL cannot open \('mines.gpkg' not recognized as .* file format\); check the file",
    )
    pit_2019().to_file(path, layer="pits", mode="a")
    assert read_polygons(path)["year"].tolist() == [2019]


def test_layers_of_unknown_geometry_are_looked_into(tmp_path):
    """GDAL does not say what a KML folder holds."""
    path = tmp_path / "mines.kml"
    point = "<Placemark><name>p</name><Point><coordinates>10,50</coordinates></Point></Placemark>"
    path.write_text(kml(("sights", [point]), ("pits", [placemark(MINE)]), ("plans", [])))
    assert read_polygons(path).geometry[0].equals_exact(MINE, 1e-9, normalize=True)
    path.write_text(kml(("sights", [point]), ("plans", [])))
    refused(path, "expected a layer of polygons, found sights .*, plans")


def test_twins_in_a_zip_have_the_name_of_their_folder(tmp_path):
    path = tmp_path / "mines.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for year, rows in (("2019", pit_2019()), ("2022", pits_2022())):
            rows.to_file(tmp_path / f"{year}.gpkg", layer="pits")
            archive.write(tmp_path / f"{year}.gpkg", f"all/{year}.gpkg")
    refused(path, r"found 2: all/2019/pits \(.*, all/2022/pits")
    assert len(read_polygons(path, "all/2022/pits")) == 2


def test_twins_of_one_folder_have_the_suffix_of_their_file(tmp_path):
    path = tmp_path / "mines.zip"
    pit_2019().to_file(tmp_path / "a.shp")
    pits_2022().to_file(tmp_path / "a.geojson")
    with zipfile.ZipFile(path, "w") as archive:
        for part in ("shp", "shx", "dbf", "prj", "geojson"):
            archive.write(tmp_path / f"a.{part}", f"a.{part}")
        archive.write(tmp_path / "a.geojson", "new/a.geojson")
    refused(path, r"found 3: a.geojson \(Polygon\), a.shp \(Polygon\), new/a \(Polygon\)")
    assert [
        len(read_polygons(path, layer)) for layer in ("a.shp", "a.geojson", "new/a", "a.*")
    ] == [1, 2, 2, 3]
    with pytest.raises(LabelError, match=r"expected a layer 'a', found a\.geojson"):
        read_polygons(path, "a")


def test_columns_of_joined_layers_may_differ_in_case(tmp_path):
    path = tmp_path / "mines.gpkg"
    table(MINE, Year=[2019], Site=[7]).to_file(path, layer="m_1")
    table(OTHER, YEAR=["2022-06-01"], SITE=["b"]).to_file(path, layer="m_2", mode="a")
    table(OTHER, begin=[2020]).to_file(path, layer="m_3", mode="a")
    found = read_polygons(path, "m_*")
    assert found["year"].fillna(0).tolist() == [2019, 2022, 0]
    assert found["start"].fillna(0).tolist() == [0, 0, 2020]
    assert found["site"].fillna("").tolist() == ["7", "b", ""]
    both = tmp_path / "both.parquet"
    table(MINE, OTHER, Year=[2019, None], YEAR=[2019, 2022]).to_parquet(both)
    with pytest.raises(
        LabelError, match="has several columns of one meaning: Year, YEAR; keep one"
    ):
        read_polygons(both)


def test_a_zip_with_a_password_is_refused_in_words(tmp_path):
    path = written(tmp_path / "mines.zip")
    content = bytearray(path.read_bytes())
    for start, bits in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # bit 0 of the flags: encrypted
        at = content.find(start)
        while at >= 0:
            content[at + bits] |= 1
            at = content.find(start, at + 1)
    path.write_bytes(content)
    refused(path, "expected a zip file without a password, found an encrypted one; unzip it")


def test_a_folder_in_a_zip_may_end_like_a_file(tmp_path):
    path = tmp_path / "mines.zip"
    written(tmp_path / "a.geojson")
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tmp_path / "a.geojson", "mines.shp/a.geojson")
    assert len(read_polygons(path)) == 1


def test_other_encodings_are_named(tmp_path):
    path = tmp_path / "mines.geojson"
    feature = {
        "type": "Feature",
        "properties": {"name": "Größe"},
        "geometry": MINE.__geo_interface__,
    }
    path.write_bytes(json.dumps(feature, ensure_ascii=False).encode("latin-1"))
    refused(path, "expected text in UTF-8, found another encoding; convert the file to UTF-8")
    path.write_bytes(json.dumps(feature).encode("utf-16"))
    refused(path, "expected text in UTF-8, found UTF-16; save the file as UTF-8")
    (tmp_path / "mines.kml").write_bytes(KML.format(placemark(MINE, "a")).encode("utf-16-be"))
    refused(tmp_path / "mines.kml", "found UTF-16")


def test_tags_of_kml_may_have_a_prefix(tmp_path):
    path = tmp_path / "mines.kml"
    text = KML.format(placemark(MINE, "Pit")).replace(
        "<kml xmlns=", "<kml:kml xmlns:kml='http://www.opengis.net/kml/2.2' xmlns="
    )
    path.write_text(text.replace("</kml>", "</kml:kml>"))
    assert read_polygons(path).geometry[0].equals_exact(MINE, 1e-9, normalize=True)
    path.write_text(VRT.format(other="a.gpkg").replace("OGRVRTDataSource>", "kml:kml>"))
    refused(path, "refers to other files")


def test_folders_and_files_are_told_apart(tmp_path):
    (tmp_path / "mines.geojson").mkdir()
    refused(
        tmp_path / "mines.geojson",
        "expected a file with the suffix .geojson, found a folder; name the file",
    )
    (tmp_path / "mines.gdb").write_text("x")
    refused(
        tmp_path / "mines.gdb",
        "expected a folder with the suffix .gdb, found a file; name the folder",
    )
    (tmp_path / "empty.gdb").mkdir()
    refused(
        tmp_path / "empty.gdb",
        "expected a File Geodatabase, found a folder without a00000001.gdbtable",
    )


def test_parquet_with_text_for_geometry_is_described(tmp_path):
    pd.DataFrame({"geometry": [MINE.wkt]}).to_parquet(tmp_path / "mines.parquet")
    refused(tmp_path / "mines.parquet", r"found geometry \((large_)?string\); write GeoParquet")


def test_a_zipped_geodatabase_and_names_that_leave_the_folder(tmp_path):
    folder = two_layers(tmp_path / "mines.gdb")
    path = tmp_path / "mines.gdb.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"mines.gdb/{file.name}")
        archive.writestr("../../escaped.geojson", json.dumps(MINE.__geo_interface__))
    refused(path, "found 3: .*mines_2019")
    assert not list(tmp_path.parent.rglob("escaped.geojson"))


def test_placemarks_have_names_and_times(tmp_path):
    path = tmp_path / "mines.kml"
    span = "<TimeSpan><begin>{}</begin><end>2020-12-31</end></TimeSpan>"
    path.write_text(kml(("pits", [placemark(MINE, "Big Pit", span.format("2019-01-01"))])))
    found = read_polygons(path)
    assert (found["start"].tolist(), found["end"].tolist()) == ([2019], [2020])
    assert [site.id for site in load_sites(path)] == ["Big_Pit"]
    path.write_text(kml(("pits", [placemark(MINE, "Big Pit", span.format("2019"))])))
    refused(path, "expected whole dates in <begin>, found 2019; write 2019-01-01")  # GDAL drops it


# --- Parquet's own geometry type ----------------------------------------------------------------------------------------


class Wkb(pa.ExtensionType):
    """What pyarrow writes as Parquet's GEOMETRY."""

    def __init__(self, about):
        self.about = about
        super().__init__(pa.binary(), "geoarrow.wkb")

    def __arrow_ext_serialize__(self):
        return self.about.encode()

    @classmethod
    def __arrow_ext_deserialize__(cls, _storage, about):
        return cls(about.decode())


@pytest.fixture
def wkb_type():
    pa.register_extension_type(Wkb(""))
    yield Wkb
    pa.unregister_extension_type("geoarrow.wkb")


@pytest.mark.parametrize(
    ("about", "crs"),
    [
        ({}, 4326),
        ({"crs": "EPSG:32632"}, 32632),
        ({"crs": CRS(32632).to_json_dict()}, 32632),
        ({"crs": "32632", "crs_type": "srid"}, 32632),
    ],
)
def test_native_geometry_is_read_with_its_crs(tmp_path, wkb_type, about, crs):
    shape = table(MINE).to_crs(crs).geometry[0]
    column = pa.ExtensionArray.from_storage(
        wkb_type(json.dumps(about)), pa.array([shape.wkb, None], pa.binary())
    )
    pq.write_table(
        pa.table({"year": [2019, 2020], "shape": column}),
        tmp_path / "mines.parquet",
        store_schema=False,
    )
    found = read_polygons(tmp_path / "mines.parquet")
    assert found["year"].tolist() == [2019]
    assert found.to_crs(4326).geometry[0].equals_exact(MINE, 1e-9, normalize=True)


def test_parquet_without_geometry_is_refused_in_words_of_its_own(tmp_path):
    pd.DataFrame({"geometry": [MINE.wkb]}).to_parquet(tmp_path / "mines.parquet")
    refused(
        tmp_path / "mines.parquet", "expected GeoParquet, or a column of Parquet's type GEOMETRY"
    )


def test_a_geometry_that_cannot_be_read_is_one_sentence(tmp_path):
    plain = pa.table({"geometry": pa.array([b"no shape"], pa.binary())})
    geo = {
        "version": "1.0.0",
        "primary_column": "geometry",
        "columns": {"geometry": {"encoding": "WKB", "geometry_types": []}},
    }
    pq.write_table(
        plain.replace_schema_metadata({"geo": json.dumps(geo)}), tmp_path / "mines.parquet"
    )
    refused(tmp_path / "mines.parquet", "cannot be read")
