"""An exported Croissant file describes every exported file, as Croissant's own library reads it."""

from __future__ import annotations

import datetime as dt
import hashlib
import json

import geopandas as gpd
import mlcroissant
import pytest

from known_stores import export_every_format, make_labelled_store
from minecube.errors import CubeError
from minecube.export import EUROMINENET, write_croissant


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_labelled_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def exported(made, tmp_path_factory):
    return export_every_format(made, tmp_path_factory.mktemp("out") / "export")


rdflib_warns = pytest.mark.filterwarnings(
    "ignore:ConjunctiveGraph is deprecated:DeprecationWarning"
)  # what mlcroissant uses


@rdflib_warns
def test_croissants_own_library_finds_no_fault(exported, caplog):
    out, _ = exported
    described = mlcroissant.Dataset(jsonld=out / "croissant.json")
    assert not described.metadata.ctx.issues.errors
    assert not described.metadata.ctx.issues.warnings
    assert "not standard" not in caplog.text
    metadata = described.metadata
    assert set(metadata.license) == {
        "https://sentinels.copernicus.eu/documents/247904/690755/Sentinel_Data_Legal_Notice",
        "https://creativecommons.org/licenses/by-sa/4.0/",
    }
    assert (
        metadata.cite_as
        == "Contains modified Copernicus Sentinel data 2019-2021.; maus, doi:10.1594/PANGAEA.942325"
    )


@rdflib_warns
def test_croissants_records_are_the_tables_rows(exported):
    out, _ = exported
    described = mlcroissant.Dataset(jsonld=out / "croissant.json")
    rows = list(described.records(record_set="footprints_labels"))
    table = gpd.read_parquet(out / "footprints_labels.parquet")
    assert [r["footprints_labels/area_m2"] for r in rows] == list(table["area_m2"])
    assert [r["footprints_labels/year"] for r in rows] == list(table["year"])
    assert [r["footprints_labels/site"] for r in rows] == [s.encode() for s in table["site"]]
    items = list(described.records(record_set="items"))
    assert [i["items/id"] for i in items] == [b"pit_2019", b"pit_2021"]


def test_every_file_is_named_with_its_checksum(exported):
    out, _ = exported
    named = {
        f["contentUrl"]: f for f in json.loads((out / "croissant.json").read_text())["distribution"]
    }
    there = {
        p.relative_to(out).as_posix()
        for s in ("tif", "nc", "parquet", "gpkg")
        for p in out.rglob(f"*.{s}")
    }
    assert set(named) == there
    for name, entry in named.items():
        assert entry["sha256"] == hashlib.sha256((out / name).read_bytes()).hexdigest()
        assert entry["contentSize"] == f"{(out / name).stat().st_size} B"


def test_what_croissant_cannot_name_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    for files, says in [
        ([], "there is no file"),
        ([tmp_path / "a.tif"], "lies outside"),
        ([tmp_path / "in" / "a.tif"], "cannot be read"),
    ]:
        with pytest.raises(CubeError, match=says):
            write_croissant(
                tmp_path / "in",
                files,
                [EUROMINENET],
                title="t",
                description="a",
                published=dt.date(2024, 1, 1),
            )
    assert not list(tmp_path.rglob("*.json"))
