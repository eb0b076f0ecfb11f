"""Faults of drawn polygons are found, named and repaired."""

from __future__ import annotations

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyproj import Geod

from known_polygons import GRID, LEFT, TOP, box, found, surveyed, table
from minecube.errors import LabelError
from minecube.labels import compare_mappers, repair_polygons, tabulate_areas


def test_nothing_is_found_in_sound_polygons_and_they_stay_as_they_are(tmp_path):
    drawn = table([box(0, 0, 100, 100), box(100, 0, 50, 100)], name=["a", "b"], year=[2019, 2019])
    looked = surveyed(tmp_path, drawn)
    assert looked.findings.empty
    assert looked.rows == 2
    assert looked.polygons.geometry.geom_equals(drawn.geometry).all()
    assert looked.polygons[["name", "row", "repaired"]].to_numpy().tolist() == [
        ["a", 1, False],
        ["b", 2, False],
    ]


def test_areas_that_were_looked_at_are_no_mines(tmp_path):
    """They overlap every mine and are none: neither findings, nor counted, nor compared."""
    drawn = table(
        [box(0, 0, 300, 300), box(50, 50, 100, 100)], year=[2019, 2019], mapped=[True, False]
    )
    looked = surveyed(tmp_path, drawn)
    assert looked.findings.empty
    assert looked.polygons[["row", "mapped"]].to_numpy().tolist() == [[1, True], [2, False]]
    assert tabulate_areas(looked.polygons)["polygons"].tolist() == [1]
    mine = drawn.iloc[[1]].drop(columns="mapped")
    assert compare_mappers({"a": looked.polygons, "b": mine}, {"all": GRID})["iou"].tolist()[
        0
    ] == pytest.approx(1)


def test_labels_drawn_along_pixels_keep_what_is_one_pixel_wide(tmp_path):
    """A column of the release's pixels is 4 m wide in the north; the same column in a file without `mapped` is a sliver."""
    drawn = table(
        [box(0, 0, 300, 300), box(50, 50, 4, 100)],
        year=[2019, 2019],
        site=["a", "a"],
        mapped=[True, False],
    )
    assert len(surveyed(tmp_path, drawn).polygons) == 2
    with pytest.raises(LabelError, match="no polygon is wider than 5 m"):
        surveyed(tmp_path, drawn.iloc[[1]].drop(columns="mapped"))


def test_invalid_shapes_are_mended_and_those_without_area_left_out(tmp_path):
    bow_tie = shapely.Polygon(
        [(LEFT, TOP), (LEFT + 100, TOP - 100), (LEFT + 100, TOP), (LEFT, TOP - 100)]
    )
    flat = shapely.Polygon([(LEFT, TOP), (LEFT + 100, TOP), (LEFT + 50, TOP)])
    looked = surveyed(tmp_path, table([box(500, 0, 50, 50), bow_tie, None, flat]))
    assert ("invalid", 2, "repaired") in found(looked)
    assert [f for f in found(looked) if f[2] == "left out"] == [
        ("no area", 3, "left out"),
        ("no area", 4, "left out"),
    ]
    assert "Self-intersection" in looked.findings.set_index("row")["about"][2]
    assert looked.polygons["row"].tolist() == [1, 2]
    assert looked.polygons.area.tolist() == [2500, 5000]
    with pytest.raises(LabelError, match="no polygon with area"):
        surveyed(tmp_path, table([flat]))


def test_duplicates_are_told_whatever_corner_they_begin_at_and_not_across_years(tmp_path):
    square = box(0, 0, 100, 100)
    turned = shapely.Polygon(np.roll(shapely.get_coordinates(square)[:-1], 2, axis=0)).reverse()
    looked = surveyed(tmp_path, table([square, turned, square], year=[2019, 2019, 2020]))
    assert found(looked) == [("duplicate", 2, "left out")]
    assert looked.findings["about"].tolist() == ["as row 1"]
    assert looked.findings["area_m2"].item() == pytest.approx(10_000, rel=2e-3)  # UTM's scale


def test_overlaps_are_cut_from_the_later_row(tmp_path):
    looked = surveyed(
        tmp_path, table([box(0, 0, 100, 100), box(60, 0, 100, 100), box(10, 10, 20, 20)])
    )
    assert found(looked) == [
        ("overlap", 2, "cut from this row"),
        ("overlap", 3, "cut from this row"),
        ("overlap", 3, "left out"),
    ]
    assert looked.findings["about"].tolist() == [
        "with row 1",
        "with row 1",
        "wholly within earlier rows",
    ]
    assert looked.findings["area_m2"].tolist() == pytest.approx([4000, 400, 400], rel=2e-3)
    assert looked.polygons.area.tolist() == pytest.approx([10_000, 6000])


def test_what_a_cut_leaves_by_rounding_is_no_row(tmp_path):
    # Corners that no float holds exactly, in degrees: the inner one stands out by a millionth of a square metre.
    outer = shapely.Polygon([(13.1, 51.1), (13.3, 51.2), (13.2, 51.4)])
    inner = shapely.Polygon(
        [outer.boundary.interpolate(f, normalized=True) for f in (0.02, 0.04, 0.27, 0.64, 0.81)]
    )
    looked = surveyed(tmp_path, table([outer, inner], "EPSG:4326"))
    assert found(looked) == [("overlap", 2, "cut from this row"), ("overlap", 2, "left out")]
    assert looked.polygons["row"].tolist() == [1]


@pytest.mark.parametrize(
    ("columns", "done"),
    [
        ({"year": [2019, 2020]}, []),
        ({"site": ["a", "b"]}, []),
        ({"year": [2019, None]}, ["kept, years differ"]),
        ({"start": [2018, 2020], "end": [2020, None]}, ["kept, years differ"]),
        ({"start": [2018, 2021], "end": [2020, None]}, []),
        ({"start": [2018, 2018], "end": [2020, 2020]}, ["cut from this row"]),
    ],
)
def test_overlaps_are_of_one_site_and_year(tmp_path, columns, done):
    columns = {k: v if k == "site" else pd.array(v, dtype="Int64") for k, v in columns.items()}
    looked = surveyed(tmp_path, table([box(0, 0, 100, 100), box(50, 0, 100, 100)], **columns))
    assert looked.findings["done"].tolist() == done
    assert looked.polygons.area.tolist() == [
        10_000,
        5000 if done == ["cut from this row"] else 10_000,
    ]


def test_overlaps_of_two_mappers_are_none_where_a_column_tells_them_apart(tmp_path):
    drawn = table([box(0, 0, 100, 100), box(50, 0, 100, 100)], who=["x", "y"])
    assert surveyed(tmp_path, drawn, by="who").findings.empty
    assert len(surveyed(tmp_path, drawn).findings) == 1
    with pytest.raises(
        LabelError, match="no column 'mapper' that says who mapped a row; its columns are who"
    ):
        surveyed(tmp_path, drawn, by="mapper")


@pytest.mark.parametrize(("width", "is_sliver"), [(4.8, True), (5.3, False)])
@pytest.mark.parametrize("crs", ["EPSG:32633", "EPSG:4326", "EPSG:3035"])
def test_a_sliver_is_what_no_circle_of_that_width_fits_into(tmp_path, width, is_sliver, crs):
    # Askew, so that its bounding box says nothing of its width.
    strip = shapely.affinity.rotate(box(300, 0, width, 300), 30)
    holed = box(0, 0, 100, 100).difference(box(20, 20, 60, width)).difference(box(20, 60, 30, 30))
    looked = surveyed(tmp_path, table([shapely.union(holed, strip)]).to_crs(crs))
    expected = (
        [("hole", 1, "filled"), ("hole", 1, "kept"), ("sliver", 1, "left out")]
        if is_sliver
        else [("hole", 1, "kept")]
    )
    assert sorted(found(looked)) == expected
    area = 10_000 - 900 if is_sliver else 10_000 - 900 - 60 * width + strip.area
    assert looked.polygons.to_crs(32633).area.sum() == pytest.approx(area, rel=1e-6)
    assert repair_polygons(tmp_path / "mines.parquet", min_width_m=0).polygons.to_crs(
        32633
    ).area.sum() == pytest.approx(10_000 - 900 - 60 * width + strip.area, rel=1e-6)


def test_a_row_of_slivers_only_is_left_out(tmp_path):
    looked = surveyed(tmp_path, table([box(0, 0, 100, 100), box(200, 0, 3, 100)]))
    assert found(looked) == [("sliver", 2, "left out")]
    assert looked.polygons["row"].tolist() == [1]
    with pytest.raises(LabelError, match="no polygon is wider than 200 m anywhere"):
        repair_polygons(tmp_path / "mines.parquet", min_width_m=200)
    with pytest.raises(LabelError, match="least width of 0 m or more"):
        repair_polygons(tmp_path / "mines.parquet", min_width_m=-1)


rectangles = st.lists(
    st.tuples(st.integers(0, 80), st.integers(0, 80), st.integers(20, 90), st.integers(20, 90)),
    min_size=1,
    max_size=7,
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rectangles)
def test_no_ground_is_lost_or_twice_there(tmp_path, drawn):
    shapes = [box(*one) for one in drawn]
    kept = surveyed(tmp_path, table(shapes), min_width_m=0).polygons
    union = shapely.union_all(shapes)
    assert kept.is_valid.all()
    assert shapely.union_all(kept.geometry.to_numpy()).symmetric_difference(union).area < 1e-6
    assert kept.area.sum() == pytest.approx(union.area, abs=1e-6)
    assert tabulate_areas(table(shapes))["area_m2"].item() == pytest.approx(
        tabulate_areas(kept)["area_m2"].item(), rel=1e-6
    )


def test_areas_are_the_ellipsoids_by_site_and_year_each_place_once():
    drawn = table(
        [
            box(0, 0, 100, 100),
            box(50, 0, 100, 100),
            box(0, 200, 90, 90).difference(box(20, 220, 40, 40)),
        ],
        site=["a", "a", "b"],
        start=pd.array([2018, 2019, None], dtype="Int64"),
        end=pd.array([2019, None, None], dtype="Int64"),
    )
    areas = tabulate_areas(drawn).set_index(["site", "year"])
    assert areas.index.to_list()[:2] == [("a", 2018), ("a", 2019)]
    assert areas["polygons"].tolist() == [1, 2, 1]
    assert areas["holes"].tolist() == [0, 0, 1]
    lonlat = gpd.GeoSeries(
        [box(0, 0, 100, 100), box(0, 0, 150, 100), drawn.geometry[2]], crs=32633
    ).to_crs(4326)
    on_ellipsoid = [abs(Geod(ellps="WGS84").geometry_area_perimeter(shape)[0]) for shape in lonlat]
    assert areas["area_m2"].tolist() == pytest.approx(on_ellipsoid, rel=1e-6)
