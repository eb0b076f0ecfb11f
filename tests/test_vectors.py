"""Files of polygons are read in the named formats alone, whatever GDAL could make of their bytes."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import geopandas as gpd
import pytest
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
        drivers = {".geojson": "GeoJSON", ".json": "GeoJSON", ".gpkg": "GPKG", ".fgb": "FlatGeobuf", ".kml": "LIBKML"}
        table.to_file(path, driver=drivers.get(path.suffix, "ESRI Shapefile"))
    return path


@pytest.mark.parametrize("suffix", ["geojson", "json", "gpkg", "parquet", "geoparquet", "shp", "SHP", "zip", "fgb", "kml"])
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


@pytest.mark.parametrize("suffix", ["geojson", "json", "gpkg", "shp", "fgb", "kml", "vrt", "parquet", "zip"])
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


def test_a_zip_holds_one_shapefile(tmp_path):
    path = written(tmp_path / "mines.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("second.shp", b"")
    refused(path, "expected one .shp in the zip file, found 2")
    written(tmp_path / "other.gpkg", OTHER)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mines.shp", VRT.format(other=tmp_path / "other.gpkg"))
    refused(path, "format of the suffix .shp")
    path.write_bytes(path.read_bytes()[:-10])
    refused(path, "damaged")
