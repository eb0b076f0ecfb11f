"""The catalogue says what it holds, and every wrong entry is named by file, entry and field."""

from __future__ import annotations

import dataclasses
import json
from decimal import Decimal
from pathlib import Path

import geopandas as gpd
import pytest
from shapely.geometry import GeometryCollection, MultiPoint, Point, Polygon, box

from minecube import catalog
from minecube.catalog import (
    BANDS,
    HazeTest,
    as_dict,
    load_models,
    load_recipes,
    load_sites,
    load_sources,
    make_id,
    match_ids,
)
from minecube.errors import CatalogError
from minecube.grid import grid_of

README = Path(__file__).parents[1] / "catalog" / "README.md"


def test_the_split_is_eurominenets(real_data):
    facts = json.loads((real_data / "eurominenet_facts" / "facts.json").read_text())
    ours = {s.id: s for s in load_sites() if not s.id.startswith("demo_")}
    for split, names in facts["released_split"].items():
        assert {i for i, s in ours.items() if s.split == split} == set(names)
    assert len(ours) == 132
    assert ours["Portuga_1"].country == "Portugal"
    assert all(s.geometry is None for s in ours.values())
    assert all(s.years == tuple(range(2015, 2025)) for s in ours.values())


def test_the_shipped_entries():
    assert set(load_sources()) == {"earth-search", "earth-search-c1", "planetary-computer", "cdse"}
    assert load_recipes()["annual-median"].bands == BANDS
    assert load_models()["unet-small"].bands == BANDS


def test_the_readme_of_the_catalogue_names_every_field():
    text = README.read_text()
    for cls in (
        catalog.Site,
        catalog.Source,
        catalog.Offset,
        catalog.Access,
        catalog.Recipe,
        catalog.MaskRule,
        catalog.BrightOverride,
        catalog.ModelCard,
    ):
        for field in dataclasses.fields(cls):
            assert f"`{field.name}`" in text, f"{cls.__name__}.{field.name}"


SOURCE = "mine:\n  {title: t, kind: stac-api, href: 'http://x', collection: c, assets: {B04: red, SCL: scl}%s}\n"
RECIPE = "mine: {title: t%s}\n"


@pytest.mark.parametrize(
    ("load", "text", "said"),
    [
        (
            load_sources,
            SOURCE % ", colour: red",
            "entry 'mine': field 'colour': expected one of title",
        ),
        (
            load_sources,
            SOURCE.replace("stac-api", "ftp") % "",
            "field 'kind': expected one of stac-api, stac-geoparquet, found 'ftp'",
        ),
        (
            load_sources,
            SOURCE.replace(", SCL: scl", "") % "",
            "field 'assets': expected an entry for SCL",
        ),
        (load_sources, SOURCE.replace("title: t, ", "") % "", "field 'title': expected a value"),
        (
            load_sources,
            SOURCE % ", offset: {from_baseline: 4.0}",
            "field 'from_baseline': expected str, found 4.0",
        ),
        (
            load_sources,
            SOURCE % ", offset: {value: true}",
            "field 'value': expected int, found True",
        ),
        (load_sources, SOURCE % "" + SOURCE % "", "'mine' occurs twice"),
        (
            load_sources,
            SOURCE % ", access: {credentials_for: [a]}",
            "field 'credentials_for': expected no names where nothing is signed, found a",
        ),
        (
            load_sources,
            SOURCE % ", access: {kind: s3, credentials_for: ['https://a']}",
            "field 'credentials_for': expected bare names",
        ),
        (load_sources, "- just\n- a list\n", "expected entries by id, found list"),
        (load_sources, "mine: 3\n", "entry 'mine': expected fields, found int"),
        (load_sources, "a: [", "cannot be read as a catalogue"),
        (
            load_recipes,
            RECIPE % ", bands: [B02, B99]",
            "field 'bands': expected bands of B02.* found B99",
        ),
        (load_recipes, RECIPE % ", bands: [B03, B02]", "in the order B02"),
        (
            load_recipes,
            RECIPE % ", months: [13]",
            r"field 'months': expected 1..12, ascending, each once, found \[13\]",
        ),
        (
            load_recipes,
            RECIPE % ", reducer: mean",
            "field 'reducer': expected one of median, geomedian, best-pixel, found 'mean'",
        ),
        (
            load_recipes,
            RECIPE % ", percentile: 40",
            "field 'percentile': expected a value with reducer percentile, and with no",
        ),
        (
            load_recipes,
            RECIPE % ", reducer: percentile",
            "field 'percentile': expected a value with reducer percentile",
        ),
        (
            load_recipes,
            RECIPE % ", reducer: percentile, percentile: 120",
            r"field 'percentile': expected 0..100, found 120",
        ),
        (
            load_recipes,
            RECIPE % ", reducer: best-pixel",
            "field 'best_pixel': expected a value with reducer best-pixel",
        ),
        (
            load_recipes,
            RECIPE % ", reducer: max-ndvi",
            "field 'reducer': expected one of .*, found 'max-ndvi', which has been removed",
        ),
        (
            load_recipes,
            RECIPE % ", bright_override: {classes: []}",
            r"field 'classes': expected SCL 1..11, found \(\)",
        ),
        (
            load_recipes,
            RECIPE % ", fallback: [hope]",
            "field 'fallback': expected steps of ungrown, thin",
        ),
        (
            load_recipes,
            RECIPE % ", fallback: [thin, thin]",
            "field 'fallback': expected steps of .*, each once",
        ),
        (
            load_recipes,
            RECIPE % ", months: [6], fallback: [wider-season]",
            "field 'wider_months': expected 1..12",
        ),
        (
            load_recipes,
            RECIPE % ", months: [6], wider_months: [7]",
            "field 'wider_months': expected the step wider-season",
        ),
        (
            load_recipes,
            RECIPE % ", months: [6], wider_months: [6], fallback: [wider-season]",
            r"field 'wider_months': expected months that are not in months already, found \[6\]",
        ),
        (
            load_recipes,
            RECIPE % ", min_clear: 2, fallback: [cloud]",
            "field 'min_clear': expected 1, or more and a fallback of ungrown",
        ),
        (
            load_recipes,
            RECIPE % ", max_clear_observations: 2",
            "field 'max_clear_observations': expected at least 3",
        ),
        (
            load_recipes,
            RECIPE % ", bright_override: {}",
            r"field 'bright_override': expected classes .*, found \[8, 9\]",
        ),
        (
            load_recipes,
            RECIPE % ", haze: {}, bands: [B04]",
            "field 'haze': expected B02 and B04 among the bands",
        ),
        (
            load_recipes,
            RECIPE % ", second_opinion: {weights: [a.pt]}",
            "field 'second_opinion': expected null, found .*; second cloud masks have been removed",
        ),
        (
            load_recipes,
            RECIPE % ", mask: [{classes: [11], months: [0]}]",
            r"field 'months': expected 1..12",
        ),
        (
            load_recipes,
            RECIPE % ", registration: {beyond: guess}",
            "field 'beyond': expected record, drop or shift",
        ),
        (
            load_recipes,
            RECIPE % ", registration: {most_px: 0}",
            "field 'most_px': expected pixels above 0",
        ),
        (load_recipes, RECIPE % ", mask: [{classes: [14]}]", "field 'classes': expected SCL 1..11"),
        (
            load_recipes,
            RECIPE % ", block_px: 100, chunk_px: 100",
            "field 'block_px': expected a multiple of 8",
        ),
        (
            load_models,
            "m: {title: t, architecture: unet, task: driving}\n",
            "field 'task': expected one of mapping, change, series",
        ),
    ],
)
def test_a_wrong_entry_is_named(tmp_path, load, text, said):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(CatalogError, match=rf"own\.yaml.*{said}"):
        load(path)


def sites_file(tmp_path, geometries, crs=4326, suffix=".geojson", **columns):
    path = tmp_path / f"own{suffix}"
    table = gpd.GeoDataFrame(columns, geometry=geometries, crs=crs)
    table.to_parquet(path) if suffix == ".parquet" else table.to_file(path)
    return path


MINE, OTHER = box(13.0, 50.0, 13.05, 50.03), box(14.0, 50.0, 14.05, 50.03)
BOWTIE = gpd.GeoSeries.from_wkt(["POLYGON ((13 50, 13.1 50.1, 13.1 50, 13 50.1, 13 50))"])[0]


@pytest.mark.parametrize("suffix", [".geojson", ".gpkg", ".parquet", ".shp"])
def test_sites_of_ones_own_in_any_format_and_projection(tmp_path, suffix):
    path = sites_file(
        tmp_path,
        gpd.GeoSeries([MINE, OTHER], crs=4326).to_crs(32633),
        32633,
        suffix,
        name=["North pit", "B"],
    )
    if suffix == ".geojson":
        gpd.read_file(path).to_crs(4326).to_file(path)
    found = load_sites(path)
    assert [s.id for s in found] == ["North_pit", "B"]
    assert found[0].geometry.symmetric_difference(MINE).area < 1e-6


@pytest.mark.parametrize(
    ("geometries", "columns", "said"),
    [
        ([MINE, OTHER], {"id": ["a", "a"]}, "site 'a' occurs twice"),
        (
            [BOWTIE],
            {"id": ["a"]},
            "site 'a': field 'geometry': expected a valid polygon, found Self-intersection",
        ),
        (
            [Point(13, 50)],
            {"id": ["a"]},
            "site 'a': field 'geometry': expected a polygon, found Point",
        ),
        (
            [MINE],
            {"id": ["a"], "contry": ["Austria"]},
            "field 'contry': expected geometry or one of id, country",
        ),
        (
            [MINE],
            {"id": ["a"], "years": ["20x"]},
            "field 'years': expected 2015-2024 or a list of years, found '20x'",
        ),
        ([MINE], {"id": ["../../etc"]}, "field 'id': expected letters"),
        (
            [MINE],
            {"id": ["a"], "split": ["dev"]},
            "field 'split': expected train, val, test or null, found 'dev'",
        ),
    ],
)
def test_a_wrong_site_is_named(tmp_path, geometries, columns, said):
    path = sites_file(tmp_path, geometries, **columns)
    with pytest.raises(CatalogError, match=rf"own\.geojson: .*{said}"):
        load_sites(path, catalogue=True)


def test_margins_of_files_and_catalogues(tmp_path):
    """What is asked for comes first, then a row's own margin, then 1 km, or none in a catalogue."""
    path = sites_file(tmp_path, [MINE, OTHER], id=["a", "b"], margin=[250.5, None])
    assert [s.margin for s in load_sites(path)] == [250.5, 1000]
    assert [s.margin for s in load_sites(path, margin=40)] == [40, 40]
    assert [s.margin for s in load_sites(path, margin=0)] == [0, 0]
    assert [s.margin for s in load_sites(path, catalogue=True)] == [250.5, 0]
    assert {s.margin for s in load_sites()} == {0}
    assert [s.margin for s in load_sites(sites_file(tmp_path, [MINE], id=["a"]))] == [1000]
    assert [s.margin for s in load_sites(sites_file(tmp_path, [MINE], id=["a"], margin=[0]))] == [0]


@pytest.mark.parametrize("margin", [-1, 100_001, "wide", True])
def test_a_margin_that_is_none_is_refused(tmp_path, margin):
    with pytest.raises(
        CatalogError, match=r"site 'a': field 'margin': expected metres from 0 to 100000, found"
    ):
        load_sites(sites_file(tmp_path, [MINE], 4326, ".parquet", id=["a"], margin=[margin]))


def test_what_users_files_hold(tmp_path):
    """Z coordinates, numbers with a gap as ids, years as text or number, a geometry column of another name."""
    high = Polygon([(13, 50, 300), (13.05, 50, 310), (13.05, 50.03, 320)])
    table = gpd.GeoDataFrame(
        {"id": [7, None], "years": ["2015-2017", "2020"], "note": ["x", "y"]},
        geometry=[high, OTHER],
        crs=4326,
    )
    table.rename_geometry("geom").to_parquet(tmp_path / "own.parquet")
    first, second = load_sites(str(tmp_path / "own.parquet"))
    assert (first.id, second.id) == ("7", "site_2")
    assert (first.years, second.years) == ((2015, 2016, 2017), (2020,))
    assert not first.geometry.has_z
    assert grid_of(first)


def test_a_users_invalid_polygon_is_repaired_and_reported(tmp_path, caplog):
    (site,) = load_sites(sites_file(tmp_path, [BOWTIE], id=["a"]))
    assert site.geometry.is_valid
    assert site.geometry.area == pytest.approx(0.1 * 0.1 / 2, rel=1e-6)  # two triangles, by hand
    assert "site a: its polygon was invalid (Self-intersection" in caplog.text


def test_a_polygon_file_without_crs_or_without_polygons(tmp_path):
    with pytest.raises(CatalogError, match="has no CRS"):
        load_sites(sites_file(tmp_path, [MINE], None, ".parquet", id=["a"]))
    path = tmp_path / "empty.geojson"
    path.write_text('{"type": "FeatureCollection", "features": []}')
    with pytest.raises(CatalogError, match=r"empty\.geojson: holds no site"):
        load_sites(path)


# --- names --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("North pit", "North_pit"),
        ("a  b.c-d", "a__b.c-d"),  # as earlier versions made it
        ("way/10001", "way_10001"),
        ("Kopalnia Bełża (Nord)", "Kopalnia_Belza_Nord"),
        ("Görlitz-Süd", "Gorlitz-Sud"),
        ("Перник", "Pernik"),
        ("../../etc", "etc"),
        ("???", ""),
    ],
)
def test_a_name_becomes_an_id(name, made):
    assert make_id(name) == made


def test_names_may_differ_in_case_accents_and_blanks():
    known = ["Big_Pit", "Belza", "way_1", "PIT", "Pit"]
    assert match_ids("big pit", known) == ["Big_Pit"]
    assert match_ids("BIG-PIT", known) == ["Big_Pit"]
    assert match_ids("Bełża", known) == ["Belza"]
    assert match_ids("way/1", known) == ["way_1"]
    assert match_ids("Pit", known) == ["Pit"]
    assert match_ids("pit", known) == ["PIT", "Pit"]
    assert match_ids("Bigpit", known) == []


def test_names_that_are_no_ids_are_kept_as_titles_and_reported(tmp_path, caplog):
    path = sites_file(tmp_path, [MINE, OTHER], id=["way/1", "ok"], name=["Kamieniołom Górny", None])
    first, second = load_sites(path)
    assert (first.id, first.title) == ("way_1", "Kamieniołom Górny")
    assert (second.id, second.title) == ("ok", "")
    assert "'way/1' is way_1" in caplog.text
    assert "ok" not in caplog.text.split("ids made of names")[1]
    (alone,) = load_sites(sites_file(tmp_path, [MINE], id=["way/1"]))
    assert (alone.id, alone.title) == ("way_1", "way/1")


def test_two_names_of_one_id_are_refused_by_name(tmp_path):
    with pytest.raises(
        CatalogError, match=r"sites 'Bełża' and 'Belza' would both have the id 'Belza'; rename one"
    ):
        load_sites(sites_file(tmp_path, [MINE, OTHER], name=["Bełża", "Belza"]))
    with pytest.raises(CatalogError, match=r"site 'a' occurs twice"):
        load_sites(sites_file(tmp_path, [MINE, OTHER], name=["a", "a"]))


@pytest.mark.parametrize("suffix", [".geojson", ".shp", ".parquet"])
def test_columns_are_understood_in_any_case(tmp_path, suffix):
    columns = {
        "NAME": ["Alpha", "Beta"],
        "Country": ["Greece", "Spain"],
        "YEARS": ["2015-2016", "2020"],
    }
    first, second = load_sites(sites_file(tmp_path, [MINE, OTHER], suffix=suffix, **columns))
    assert (first.id, first.country, first.years) == ("Alpha", "Greece", (2015, 2016))
    assert (second.id, second.country, second.years) == ("Beta", "Spain", (2020,))


def test_twins_of_a_column_are_refused_unless_one_is_empty(tmp_path):
    with pytest.raises(
        CatalogError, match="has several columns of one meaning: name, NAME; keep one"
    ):
        load_sites(sites_file(tmp_path, [MINE], suffix=".parquet", name=["a"], NAME=["b"]))
    (site,) = load_sites(sites_file(tmp_path, [MINE], suffix=".parquet", name=[None], NAME=["b"]))
    assert site.id == "b"


def test_rows_without_a_name_are_numbered_and_reported(tmp_path, caplog):
    found = load_sites(
        sites_file(tmp_path, [MINE, OTHER], id=[None, " "], name=["a", "???"], owner=["x", "y"])
    )
    assert [site.id for site in found] == ["a", "site_2"]
    assert "'???' is site_2" in caplog.text
    caplog.clear()
    found = load_sites(sites_file(tmp_path, [MINE, OTHER], owner=["x", "y"]))
    assert [site.id for site in found] == ["site_1", "site_2"]
    assert "called by their number: site_1, site_2; the columns are owner" in caplog.text


@pytest.mark.parametrize("column", ["id", "name", "site"])
def test_numbers_with_a_gap_are_whole(tmp_path, column):
    found = load_sites(sites_file(tmp_path, [MINE, OTHER], suffix=".gpkg", **{column: [7.0, None]}))
    assert [site.id for site in found] == ["7", "site_2"]


@pytest.mark.parametrize("suffix", [".geojson", ".gpkg", ".parquet", ".fgb"])
def test_sites_without_columns_are_numbered(tmp_path, suffix):
    assert [site.id for site in load_sites(sites_file(tmp_path, [MINE, OTHER], suffix=suffix))] == [
        "site_1",
        "site_2",
    ]


@pytest.mark.parametrize(
    "content",
    [
        MINE.__geo_interface__,
        {"type": "Feature", "properties": None, "geometry": MINE.__geo_interface__},
    ],
    ids=["geometry", "feature"],
)
def test_a_bare_geometry_is_one_site(tmp_path, content):
    path = tmp_path / "own.geojson"
    path.write_text(json.dumps(content))
    (site,) = load_sites(path)
    assert site.id == "site_1"
    assert site.geometry.equals(MINE)
    assert (site.years, site.margin, site.labels) == ((), 1000, None)


def test_blank_text_is_missing_in_every_column(tmp_path):
    blank = {
        key: [" ", ""] for key in ("id", "title", "country", "split", "labels", "years", "margin")
    }
    first, second = load_sites(sites_file(tmp_path, [MINE, OTHER], suffix=".parquet", **blank))
    assert (first.id, second.id) == ("site_1", "site_2")
    assert {
        (s.title, s.country, s.split, s.labels, s.years, s.margin) for s in (first, second)
    } == {("", "", None, None, (), 1000)}


def test_numbers_as_text_are_numbers(tmp_path):
    columns = {"id": ["a", "b"], "margin": ["500", " 12.5 "], "years": ["2019.0", "2015 - 2017"]}
    first, second = load_sites(sites_file(tmp_path, [MINE, OTHER], **columns))
    assert (first.margin, second.margin) == (500, 12.5)
    assert (first.years, second.years) == ((2019,), (2015, 2016, 2017))
    decimals = sites_file(
        tmp_path, [MINE, OTHER], suffix=".parquet", id=["a", "b"], margin=[Decimal("60"), None]
    )
    assert [site.margin for site in load_sites(decimals)] == [60, 1000]
    listed = sites_file(
        tmp_path, [MINE, OTHER], suffix=".parquet", id=["a", "b"], years=[["2019", " "], []]
    )
    assert [site.years for site in load_sites(listed)] == [(2019,), ()]


@pytest.mark.parametrize("margin", ["500 m", "nan", "inf", "-1"])
def test_a_margin_of_text_that_is_no_number_of_metres_is_refused(tmp_path, margin):
    with pytest.raises(
        CatalogError, match=r"site 'a': field 'margin': expected metres from 0 to 100000, found"
    ):
        load_sites(sites_file(tmp_path, [MINE], id=["a"], margin=[margin]))


@pytest.mark.parametrize("field", ["labels", "country", "split", "title"])
def test_a_list_where_text_is_expected_is_refused(tmp_path, field):
    path = sites_file(tmp_path, [MINE], suffix=".parquet", id=["a"], **{field: [["x", "y"]]})
    with pytest.raises(
        CatalogError, match=rf"site 'a': field '{field}': expected text, found \['x', 'y'\]"
    ):
        load_sites(path)


def test_fields_of_text_are_text(tmp_path):
    (site,) = load_sites(
        sites_file(tmp_path, [MINE], suffix=".parquet", id=[7], country=[1], labels=[2.0])
    )
    assert (site.id, site.country, site.labels) == ("7", "1", "2")


def test_bytes_that_are_no_text_do_not_hinder(tmp_path):
    (site,) = load_sites(
        sites_file(tmp_path, [MINE], suffix=".parquet", id=[b"pit"], photo=[b"\x89PNG\xff"])
    )
    assert site.id == "pit"
    (site,) = load_sites(sites_file(tmp_path, [MINE], suffix=".parquet", id=[b"Gr\xf6"]))
    assert site.id == "Gr"


def test_twins_are_joined_where_no_row_fills_both(tmp_path):
    found = load_sites(
        sites_file(tmp_path, [MINE, OTHER], suffix=".parquet", name=["a", None], NAME=[" ", "b"])
    )
    assert [site.id for site in found] == ["a", "b"]


def test_the_areas_of_a_collection_are_kept(tmp_path, caplog):
    mixed = GeometryCollection(
        [MINE, MultiPoint([(13, 50), (14, 50)]), GeometryCollection([OTHER, OTHER.exterior])]
    )
    (site,) = load_sites(sites_file(tmp_path, [mixed], id=["a"]))
    assert site.geometry.equals(MINE | OTHER)
    assert (
        "site a: the areas of its collection were kept, left out: 1 LineString, 2 Point"
        in caplog.text
    )
    with pytest.raises(CatalogError, match="expected a polygon, found GeometryCollection"):
        load_sites(sites_file(tmp_path, [GeometryCollection([Point(13, 50)])], id=["a"]))


def test_fields_that_came_later_change_no_hash_where_they_are_unset():
    """Stores keep the recipe they were made with; `haze` of the first ones has two fields."""
    assert as_dict(HazeTest()) == {"excess": 0.025, "window_m": 60}
    assert as_dict(HazeTest(date_excess=0.0125))["date_excess"] == 0.0125
