"""Files of polygons: formats, columns, years, sites, repair, and every bad file."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
from affine import Affine
from odc.geo.geobox import GeoBox
from pyproj import CRS

from minecube.errors import LabelError
from minecube.labels import (
    match_sites,
    rasterize,
    read_polygons,
)

LEFT, TOP = 399960, 5700000
GRID = GeoBox((40, 60), Affine(10, 0, LEFT, 0, -10, TOP), "EPSG:32633")


def table(shapes, crs="EPSG:32633", **columns):
    return gpd.GeoDataFrame(columns, geometry=list(shapes), crs=crs)


def px(row, col, height, width):
    """The rectangle of whole pixels with that corner and size."""
    return shapely.box(
        LEFT + 10 * col, TOP - 10 * (row + height), LEFT + 10 * (col + width), TOP - 10 * row
    )


def written(tmp_path, polygons, name="mines.gpkg"):
    path = tmp_path / name
    if name.endswith("parquet"):
        polygons.to_parquet(path)
    else:
        polygons.to_file(path)
    return path


@pytest.mark.parametrize("name", ["m.geojson", "m.gpkg", "m.parquet", "m.shp"])
def test_every_format_gives_the_same_mask(tmp_path, name):
    drawn = table(
        [px(0, 0, 5, 5), px(2, 2, 9, 9)],
        year=pd.array([2019, None], dtype="Int64"),
        Site=["a", "b"],
    ).to_crs(4326)
    polygons = read_polygons(written(tmp_path, drawn, name))
    assert polygons["year"].dtype == "Int64"
    assert polygons["year"].fillna(0).tolist() == [2019, 0]
    assert polygons["site"].tolist() == ["a", "b"]
    assert not polygons["repaired"].any()
    assert rasterize(polygons, GRID, [2019]).sum() == 25 + 81 - 9


def test_shouted_column_names_are_understood(tmp_path):
    polygons = read_polygons(written(tmp_path, table([px(0, 0, 5, 5)], YEAR=[2018]), "m.shp"))
    assert polygons["year"].tolist() == [2018]


def test_spans_are_read_as_years_and_dates(tmp_path):
    drawn = table(
        [px(0, 0, 5, 5)] * 3,
        Start=["2018-04-01", "2019", None],
        END=["2020", "2021-12-31T00:00:00Z", None],
    )
    polygons = read_polygons(written(tmp_path, drawn, "m.gpkg"))
    assert polygons["start"].dtype == polygons["end"].dtype == "Int64"
    assert polygons["start"].fillna(0).tolist() == [2018, 2019, 0]
    assert polygons["end"].fillna(0).tolist() == [2020, 2021, 0]
    dates = table([px(0, 0, 5, 5)] * 2, start=pd.to_datetime(["2018-04-01", None]))
    assert read_polygons(written(tmp_path, dates, "d.gpkg"))["start"].fillna(0).tolist() == [
        2018,
        0,
    ]


@pytest.mark.parametrize(
    "date",
    [
        "2019-06-01",
        "2019-12-31T23:00:00Z",
        "2019/6",
        "2019.06.01",
        "20190601",
        "1.6.2019",
        "06/13/2019",
        "6/2019",
    ],
)
@pytest.mark.parametrize("column", ["year", "start", "end"])
def test_a_date_counts_by_its_year(tmp_path, column, date):
    assert read_polygons(written(tmp_path, table([px(0, 0, 5, 5)], **{column: [date]})))[
        column
    ].tolist() == [2019]


@pytest.mark.parametrize("name", ["m.gpkg", "m.parquet", "m.shp"])
def test_a_column_of_dates_is_years(tmp_path, name):
    drawn = table(
        [px(0, 0, 5, 5)] * 2, Year=pd.Series(pd.to_datetime(["2019-06-01", "2022-01-01"])).dt.date
    )
    assert read_polygons(written(tmp_path, drawn, name))["year"].tolist() == [2019, 2022]


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("date", ["2019-06-01", "2022-06-01"]),
        ("start_year", [2019, 2022]),
        ("acq_date", ["20190601", None]),
        ("acquisition_date", ["1.6.2019", "1.6.2022"]),
        ("Image taken", ["2019/06", "?"]),
        ("Datum", ["Sommer 2019", "2022"]),
        ("imgyr", ["2019", "2022"]),
    ],
)
@pytest.mark.parametrize("name", ["m.gpkg", "m.shp"])
def test_a_column_that_may_be_years_is_named(tmp_path, caplog, column, values, name):
    drawn = table([px(0, 0, 5, 5)] * 2, **{column: values})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names of ten letters
        path = written(tmp_path, drawn, name)
    read_polygons(path)
    (said,) = [record.getMessage() for record in caplog.records]
    shown = column[:10] if name == "m.shp" else column
    assert f"column `{shown}` may hold years" in said
    assert "`year`, or `start` and `end`" in said
    assert "2 rows hold for all years" in said


def test_nothing_is_said_of_dates_where_years_are_known_or_nothing_looks_like_one(tmp_path, caplog):
    known = table([px(0, 0, 5, 5)] * 2, year=[2019, 2022], created=["2023-01-01"] * 2)
    read_polygons(written(tmp_path, known, "known.gpkg"))
    plain = table(
        [px(0, 0, 5, 5)] * 2,
        height=[120.5, 99],
        validated=[1, 0],
        note=["Pit 2019", None],
        tile=[3301, 3302],
    )
    read_polygons(written(tmp_path, plain, "plain.gpkg"))
    assert not caplog.records


def warned(tmp_path, caplog, column, values):
    """Whether a column of a file of polygons is named as one that may hold years."""
    caplog.clear()
    path = written(tmp_path, table([px(0, 0, 5, 5)] * len(values), **{column: values}), "m.parquet")
    read_polygons(path)
    return f"column `{column}` may hold years" in caplog.text


@pytest.mark.parametrize(
    "values",
    [
        ["Jun 2019", "Jun 2022"],
        ["June 1, 2019"],
        ["1 June 2019"],
        ["01-JUN-2019"],
        ["2019-Jun-01"],
        ["06.2019", "10.2022"],
        ["Juni 2019", "Mai 2022"],
        ["2019年6月", "2022年6月"],
        ["summer 2019"],
        ["Q3/2019"],
        ["2019Q3"],
        ["2019/2020"],
        ["2019-20"],
        ["2019 to 2021"],
        ["2019, 2022"],
        ["C2019", "C2022"],
        ["FY2019", "FY2020"],
        [2019152, 2022152],
        [2019152.0, None],
        ["A2019152"],
        ["MOD13Q1.A2019145.h18v04"],
        [201906, 202206],
        [1559347200, 1654041600],
        ["1559347200"],
        [1559347200000, 1654041600000],
        ["S2A_20190601", "S2B_20220601"],
        ["20190601T101031_20190601T101501_T32UQC"],
        ["from 1.6.2019 on", None],
        [["2019-06-01"]],
    ],
)
def test_years_in_other_forms_are_named(tmp_path, caplog, values):
    assert warned(tmp_path, caplog, "seen", values)


def test_seconds_count_as_time_by_name_and_dates_in_ids_count(tmp_path, caplog):
    assert warned(tmp_path, caplog, "system:time_start", [1559347323456])
    assert warned(tmp_path, caplog, "product_id", ["S2A_MSIL2A_20190601T101031_N0212"])
    assert not warned(tmp_path, caplog, "seen", [1559347323])


DRAWN = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("area", DRAWN.integers(100, 5_000_000, 50)),
        ("area", DRAWN.integers(2_000_000, 2_100_000, 50)),
        ("area", [2019152.37, 2022152.2]),
        ("area", ["2019.54", "2022.7"]),
        ("area", ["2019,54", "2022,7"]),
        ("height", [2019.5, 2022.25]),
        ("osm", DRAWN.integers(10**7, 10**10, 50)),
        ("osm", DRAWN.integers(1_420_070_400, 1_500_000_000, 50)),
        ("osm", [f"way/{n}" for n in DRAWN.integers(1_420_070_400, 1_500_000_000, 50)]),
        ("osm_id", [1559347200, 1654041600]),
        ("fid", [2015, 2016]),
        ("OBJECTID", [2019152, 2022152]),
        ("siteId", ["MINE-2019", "MINE-2020"]),
        ("code", ["MINE-2019-001", "MINE-2020-014"]),
        ("uuid", [DRAWN.bytes(16).hex() for _ in range(50)]),
        ("phone", ["+49 3573 2019", "+49 3573 2022"]),
        ("phone", [1712345678, 1601234501]),
        ("phone", ["0171 2345678", "0160 1234501"]),
        ("phone", DRAWN.integers(2_010_000_000, 2_019_999_999, 50)),
        ("phone", ["(201) 555-0123", "(202) 555-0145"]),
        ("source", ["Maus et al. 2020"] * 4),
        ("doi", ["10.5281/zenodo.2019152", "10.14278/rodare.4656"]),
        ("note", ["Pit 2019", "north", "south"]),
        ("photo", [b"\xff2019", b"2019\xfe"]),
        ("blank", [" ", None]),
        ("open", [True, False]),
    ],
)
def test_ids_areas_and_phone_numbers_are_no_years(tmp_path, caplog, column, values):
    assert not warned(tmp_path, caplog, column, values)


def test_blank_years_are_missing(tmp_path):
    drawn = table([px(0, 0, 5, 5)] * 2, year=["2019", " "], mapped=["1", ""])
    found = read_polygons(written(tmp_path, drawn, "m.parquet"))
    assert found["year"].fillna(0).tolist() == [2019, 0]
    assert found["mapped"].tolist() == [True, False]
    spans = table([px(0, 0, 5, 5)] * 2, start=["", "2019"], end=["2020", ""])
    found = read_polygons(written(tmp_path, spans, "s.parquet"))
    assert found[["start", "end"]].fillna(0).to_numpy().tolist() == [[0, 2020], [2019, 0]]


@pytest.mark.parametrize("name", ["photo", "site", "year", "mapped"])
def test_bytes_that_are_no_text_are_never_a_crash(tmp_path, name):
    path = written(
        tmp_path, table([px(0, 0, 5, 5)] * 2, **{name: [b"\xff\xfe", b"\x89PNG"]}), "m.parquet"
    )
    if name in ("photo", "site"):
        assert len(read_polygons(path)) == 2
        return
    with pytest.raises(LabelError, match=f"column {name}: expected"):
        read_polygons(path)


def test_a_year_that_is_a_dictionary_or_a_list_is_refused(tmp_path):
    for values in ([{"a": 2019}, {"a": 2022}], [[2019, 2020], [2022]]):
        path = written(tmp_path, table([px(0, 0, 5, 5)] * 2, year=values), "m.parquet")
        with pytest.raises(LabelError, match="column year: expected whole calendar years"):
            read_polygons(path)


def test_a_numeric_site_with_a_gap_is_whole_and_a_blank_one_missing(tmp_path):
    drawn = table([px(0, 0, 5, 5)] * 2, site=[7.0, None])
    assert read_polygons(written(tmp_path, drawn)).site.fillna("-").tolist() == ["7", "-"]
    drawn = table([px(0, 0, 5, 5)] * 3, site=[" ", "", " a "])
    assert read_polygons(written(tmp_path, drawn)).site.fillna("-").tolist() == ["-", "-", "a"]


def test_sites_are_matched_whatever_their_case_blanks_and_accents(caplog):
    drawn = table(
        [px(0, 0, 5, 5)] * 4, site=pd.array(["big pit", "Bełża", "Other", None], dtype="string")
    )
    found = match_sites(drawn, ["Big_Pit", "Belza"], Path("m.gpkg"))
    assert found["site"].fillna("-").tolist() == ["Big_Pit", "Belza", "Other", "-"]
    assert "m.gpkg: sites by another name: 'big pit' is Big_Pit, 'Bełża' is Belza" in caplog.text
    with pytest.raises(
        LabelError,
        match=r"m\.gpkg: site 'big pit' may be Big_Pit or big-pit; spell it as one of them",
    ):
        match_sites(drawn, ["Big_Pit", "big-pit"], Path("m.gpkg"))


def test_collections_give_their_areas_and_name_what_is_left_out(tmp_path, caplog):
    mixed = shapely.GeometryCollection(
        [px(0, 0, 4, 4), shapely.LineString([(LEFT, TOP), (LEFT + 200, TOP)])]
    )
    path = written(tmp_path, table([px(20, 20, 3, 3), mixed]))
    found = read_polygons(path)
    assert rasterize(found, GRID, [2020]).sum() == 16 + 9
    assert not found["repaired"].any()
    assert "the areas of the collection in row 2 were kept, left out: 1 LineString" in caplog.text
    with pytest.raises(LabelError, match="found GeometryCollection in row 1"):
        read_polygons(
            written(
                tmp_path,
                table([shapely.GeometryCollection([shapely.Point(LEFT, TOP)])]),
                "lines.gpkg",
            )
        )


def test_the_index_is_the_row_of_the_file(tmp_path):
    found = read_polygons(written(tmp_path, table([None, px(0, 0, 5, 5)])))
    assert found.index.tolist() == [1]


def test_geojson_without_crs_is_longitude_and_latitude(tmp_path):
    path = tmp_path / "m.geojson"
    feature = {
        "type": "Feature",
        "properties": {"year": "2020"},
        "geometry": shapely.box(13.6, 51.4, 13.7, 51.5).__geo_interface__,
    }
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    polygons = read_polygons(path)
    assert polygons.crs == CRS(4326)
    assert polygons["year"].tolist() == [2020]


def test_invalid_polygons_are_repaired_and_reported(tmp_path, caplog):
    bow_tie = shapely.Polygon(
        [(LEFT, TOP), (LEFT + 100, TOP - 100), (LEFT + 100, TOP), (LEFT, TOP - 100)]
    )
    # A shell that runs over itself: the overlap is mine, not a hole as the even-odd rule has it.
    looped = shapely.from_wkt("POLYGON((0 0,0 30,20 30,20 10,10 10,10 20,30 20,30 0,0 0))")
    looped = shapely.transform(looped, lambda c: c * [10, -10] + [LEFT + 200, TOP])
    flat = shapely.Polygon([(LEFT, TOP), (LEFT + 100, TOP), (LEFT + 50, TOP)])
    path = written(tmp_path, table([px(30, 30, 2, 2), bow_tie, looped, flat, None]))
    with caplog.at_level(logging.WARNING):
        polygons = read_polygons(path)
    assert polygons["repaired"].tolist() == [False, True, True]
    assert polygons.is_valid.all()
    assert set(polygons.geom_type) <= {"Polygon", "MultiPolygon"}
    assert polygons.area.tolist() == [400, 5000, 80000]
    assert "invalid polygons were repaired: rows 2, 3" in caplog.text
    assert "rows without area were left out: rows 4, 5" in caplog.text


@pytest.mark.parametrize(
    ("drawn", "says"),
    [
        (table([px(0, 0, 1, 1)], None), "has no CRS"),
        (table([]), "holds no polygon"),
        (table([None]), "holds no polygon with area"),
        (
            table([px(0, 0, 1, 1), shapely.Point(LEFT, TOP)]),
            "expected polygons, found Point in row 2",
        ),
        (table([px(0, 0, 1, 1)], "EPSG:4326"), "look projected"),
        (table([shapely.box(0, 0, np.inf, 1)]), "infinite"),
        (table([px(0, 0, 1, 1)] * 2, year=["2019", "around 2020"]), "found around 2020 in row 2"),
        (table([px(0, 0, 1, 1)], year=[2019.5]), "whole calendar years"),
        (table([px(0, 0, 1, 1)], year=[20190]), "found 20190"),
        (table([px(0, 0, 1, 1)], year=[True]), "found True"),
        (table([px(0, 0, 1, 1)], year=["2019-20"]), "found 2019-20"),
        (table([px(0, 0, 1, 1)], year=["20191301"]), "found 20191301"),
        (
            table([px(0, 0, 1, 1)], year=[2019], Year=[2018]),
            "several columns of one meaning: year, Year",
        ),
        (
            table([px(0, 0, 1, 1)] * 2, start=[2019, 2021], end=[2019, 2020]),
            r"end before they start \(row 2\)",
        ),
        (table([px(0, 0, 1, 1)] * 2, year=[None, 2019], start=[2018, 2018]), "found both in row 2"),
        (
            table([px(0, 0, 1, 1)], start=["spring 2019"]),
            "column start: expected whole calendar years",
        ),
        (table([px(0, 0, 1, 1)], end=["19-01-01"]), "or null for an open end"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(tmp_path, drawn, says):
    with pytest.raises(LabelError, match=says) as error:
        read_polygons(written(tmp_path, drawn, "m.parquet"))
    assert "m.parquet" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_shapefile_without_prj_has_no_crs(tmp_path):
    path = written(tmp_path, table([px(0, 0, 1, 1)]), "m.shp")
    path.with_suffix(".prj").unlink()
    with pytest.raises(LabelError, match=r"missing \.prj"):
        read_polygons(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [("m.geojson", "{oops"), ("m.parquet", "oops"), ("m.gpkg", ""), ("m.csv", "year\n2019\n")],
)
def test_unreadable_files_are_refused(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(LabelError, match=r"cannot be read|holds no polygon"):
        read_polygons(tmp_path / name)


def looked_at():
    """2019: an area that was looked at with a mine in it; 2020: the same without a mine; 2021: another area."""
    shapes = [px(5, 5, 20, 30), px(10, 10, 4, 6), px(5, 5, 20, 30), px(0, 50, 10, 20)]
    return table(shapes, year=[2019, 2019, 2020, 2021], mapped=[True, False, True, True])


@pytest.mark.parametrize("name", ["mines.gpkg", "mines.shp", "mines.geojson", "mines.parquet"])
def test_what_was_looked_at_is_no_mine_in_any_format(tmp_path, name):
    """A Shapefile knows no truth, only numbers: taken for mines, these areas would cover everything."""
    polygons = looked_at().to_crs(4326) if name.endswith("geojson") else looked_at()
    if name.endswith("shp"):
        polygons["mapped"] = polygons["mapped"].astype(int)
    found = read_polygons(written(tmp_path, polygons, name))
    assert found["mapped"].tolist() == [True, False, True, True]
    assert (rasterize(found, GRID, [2019]).values == 1).sum() == 24


def test_a_column_mapped_that_means_something_else_is_refused(tmp_path):
    path = written(tmp_path, table([px(1, 1, 3, 3)], mapped=["by hand"]))
    with pytest.raises(
        LabelError, match=r"column mapped: expected true .* found 'by hand'; rename the column"
    ):
        read_polygons(path)
