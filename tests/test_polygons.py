"""Files of polygons looked through: what is found, what becomes of it, polygons elsewhere, and two mappers compared."""

from __future__ import annotations

import json
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
from affine import Affine
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox
from pyproj import Geod

from minecube.catalog import Site
from minecube.cli import cli
from minecube.errors import LabelError
from minecube.grid import grid_of
from minecube.labels import (
    compare_mappers,
    rasterize,
    read_polygons,
    repair_polygons,
    tabulate_areas,
)

REAL = Path(__file__).parents[2] / "shared" / "data" / "mine_polygons" / "sites.geojson"
real = pytest.mark.skipif(not REAL.exists(), reason="../shared/data/mine_polygons is absent")

LEFT, TOP = 399960, 5700000
GRID = GeoBox((40, 60), Affine(10, 0, LEFT, 0, -10, TOP), "EPSG:32633")


def box(x, y, width, height):
    """A rectangle in metres from the grid's upper left corner."""
    return shapely.box(LEFT + x, TOP - y - height, LEFT + x + width, TOP - y)


def table(shapes, crs="EPSG:32633", **columns):
    return gpd.GeoDataFrame(columns, geometry=list(shapes), crs=crs)


def written(folder, polygons, name="mines.parquet"):
    path = folder / name
    if name.endswith("parquet"):
        polygons.to_parquet(path)
    else:
        polygons.to_file(path)
    return path


def surveyed(folder, polygons, **how):
    return repair_polygons(written(folder, polygons), **how)


def found(looked):
    """(finding, row, done), without the counts."""
    return [
        tuple(row) for row in looked.findings[["finding", "row", "done"]].itertuples(index=False)
    ]


def run(*arguments, ok=0):
    done = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert done.exit_code == ok, f"exit {done.exit_code}\n{done.output}"
    return done.stdout, done.stderr


# --- findings -----------------------------------------------------------------------------------------------------------


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


def test_sites_without_a_place_cannot_be_held_against(tmp_path):
    _, said = run(
        "polygons", written(tmp_path, table([box(0, 0, 100, 100)])), "--sites", "Germany_1", ok=2
    )
    assert (
        "Germany_1: the catalogue has no place for them yet, so nothing can be compared with it"
        in said
    )


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


# --- elsewhere ----------------------------------------------------------------------------------------------------------

SITES = {
    name: gpd.GeoSeries([shapely.box(LEFT + x, TOP - 400, LEFT + x + 600, TOP)], crs=32633).to_crs(
        4326
    )[0]
    for name, x in (("a", 0), ("b", 100_000))
}


def lonlat_mines():
    mines = gpd.GeoSeries(
        [box(0, 0, 100, 100), box(100_000, 0, 100, 100), box(100_200, 0, 100, 100)], crs=32633
    )
    return mines.to_crs(4326).to_numpy()


def test_a_row_in_the_wrong_hemisphere_is_found_by_its_distance(tmp_path):
    shapes = lonlat_mines()
    shapes[1] = shapely.transform(shapes[1], lambda xy: xy[:, ::-1])
    shapes[2] = shapely.transform(shapes[2], lambda xy: xy * [1, -1])
    looked = surveyed(tmp_path, table(shapes, "EPSG:4326", site=["a", "b", "b"]), sites=SITES)
    assert found(looked) == [("elsewhere", 2, "left out"), ("elsewhere", 3, "left out")]
    swapped, south = looked.findings["about"]
    assert swapped.endswith("from b; with longitude and latitude swapped, it would lie there")
    assert south.endswith("from b; with the sign of latitude changed, it would lie there")
    centre = SITES["b"].centroid
    expected = Geod(ellps="WGS84").inv(centre.x, centre.y, centre.x, -centre.y)[2] / 1000
    assert float(south.split(" km")[0]) == pytest.approx(expected, rel=0.01)
    assert looked.polygons["row"].tolist() == [1]


def test_a_row_at_another_site_than_it_names_is_elsewhere_and_one_that_names_none_may_lie_at_any(
    tmp_path,
):
    looked = surveyed(
        tmp_path, table(lonlat_mines(), "EPSG:4326", site=["a", "a", None]), sites=SITES
    )
    assert found(looked) == [("elsewhere", 2, "left out"), ("no site", 3, "kept")]
    assert (
        looked.findings["about"][0] == "99 km from a"
    )  # 100 km less the 600 m of the area, on the ground
    shapes = [
        *lonlat_mines(),
        shapely.box(100, 1, 100.1, 1.1),
        shapely.transform(lonlat_mines()[0], lambda xy: xy[:, ::-1]),
    ]
    looked = surveyed(tmp_path, table(shapes, "EPSG:4326"), sites=SITES)
    assert found(looked) == [("at no site", 4, "left out"), ("elsewhere", 5, "left out")]
    assert looked.polygons["row"].tolist() == [1, 2, 3]


def test_rows_of_sites_that_were_not_asked_for_are_kept(tmp_path):
    looked = surveyed(
        tmp_path, table(lonlat_mines(), "EPSG:4326", site=["a", "c", "b"]), sites=SITES
    )
    assert found(looked) == [("unknown site", 2, "kept")]
    assert len(looked.polygons) == 3
    with pytest.raises(LabelError, match=r"expected polygons of the sites a, b, found only c, d"):
        surveyed(tmp_path, table(lonlat_mines(), "EPSG:4326", site=["c", "c", "d"]), sites=SITES)


@pytest.mark.parametrize("named", [True, False])
def test_a_file_that_lies_elsewhere_as_a_whole_is_refused_and_says_which_swap(tmp_path, named):
    swapped = [shapely.transform(s, lambda xy: xy[:, ::-1]) for s in lonlat_mines()]
    columns = {"site": ["a", "b", "b"]} if named else {}
    with pytest.raises(
        LabelError,
        match=r"within 10 km.*with longitude and latitude swapped, 3 of 3 would lie there",
    ):
        surveyed(tmp_path, table(swapped, "EPSG:4326", **columns), sites=SITES)


def test_of_two_swaps_that_explain_a_row_the_one_that_explains_more_is_named(tmp_path):
    # Near Greenwich a change of the sign of longitude is a few kilometres only, so that of latitude explains one row as well.
    drawn = table(
        [shapely.box(-0.02, -51.1, -0.01, -51), shapely.box(-0.29, -51.1, -0.28, -51)], "EPSG:4326"
    )
    with pytest.raises(LabelError, match="with both signs changed, 2 of 2 would lie there"):
        surveyed(tmp_path, drawn, sites={"a": shapely.box(0, 51, 0.3, 51.1)})


# --- two mappers --------------------------------------------------------------------------------------------------------


def test_two_mappers_by_hand():
    one = table([box(0, 0, 200, 100), box(100, 0, 100, 100)])  # an overlap of its own, counted once
    two = table(
        [box(100, 0, 200, 100), box(0, 300, 1000, 10)]
    )  # 600 m of the strip lie on the grid
    found = compare_mappers({"one": one, "two": two}, {"pit": GRID})
    assert found["site"].tolist() == ["pit", "pooled"]
    row = found.iloc[0]
    areas = row[["area_m2", "other_area_m2", "intersection_m2", "union_m2"]].to_list()
    assert areas == pytest.approx([20_000, 26_000, 10_000, 36_000], rel=2e-3)
    assert row["iou"] == pytest.approx(10 / 36, rel=1e-6)
    assert row[["pixels_both", "pixels_either"]].to_list() == [100, 360]
    assert row["raster_iou"] == pytest.approx(10 / 36)
    assert row["raster_area_off"] == pytest.approx(0)
    assert pd.isna(row["year"])
    assert found.iloc[1]["iou"] == row["iou"]


def test_pooled_is_a_ratio_of_sums_over_sites_and_years_that_both_mapped():
    second = GeoBox((40, 60), Affine(10, 0, LEFT + 5000, 0, -10, TOP), "EPSG:32633")
    one = table(
        [box(0, 0, 100, 100), box(5000, 0, 400, 100), box(0, 0, 100, 100)],
        site=["a", "b", "a"],
        year=[2018, 2018, 2019],
    )
    two = table(
        [box(50, 0, 100, 100), box(5100, 0, 300, 100), box(0, 0, 9, 9)],
        site=["a", "b", "c"],
        year=[2018] * 3,
    )
    found = compare_mappers({"one": one, "two": two}, {"a": GRID, "b": second, "c": GRID})
    assert found[["site", "year"]].fillna(0).to_numpy().tolist() == [
        ["a", 2018],
        ["b", 2018],
        ["pooled", 0],
    ]
    assert found["iou"].to_list() == pytest.approx([1 / 3, 3 / 4, 35_000 / 55_000], rel=1e-5)
    assert found["raster_iou"].to_list() == pytest.approx([1 / 3, 3 / 4, 350 / 550])


def test_polygons_that_hold_for_all_years_are_compared_in_those_of_the_other():
    by_span = table(
        [box(0, 0, 100, 100), box(100, 0, 100, 100)],
        start=pd.array([2018, 2019], "Int64"),
        end=pd.array([2019, None], "Int64"),
    )
    found = compare_mappers({"all": table([box(0, 0, 100, 100)]), "span": by_span}, {"pit": GRID})
    assert found["year"].fillna(0).tolist() == [2018, 2019, 0]
    assert found["iou"].to_list() == pytest.approx([1, 1 / 2, 2 / 3], rel=1e-6)


def test_three_mappers_make_three_pairs():
    mappers = {name: table([box(x, 0, 100, 100)]) for name, x in (("a", 0), ("b", 0), ("c", 500))}
    found = compare_mappers(mappers, {"pit": GRID})
    pooled = found[found["site"] == "pooled"].set_index(["mapper", "other"])["iou"]
    assert pooled.to_dict() == {("a", "b"): 1, ("a", "c"): 0, ("b", "c"): 0}


def test_mappers_of_landsat_pixels_share_none_along_an_edge():
    """Their edges run through centres of pixels: 30 m with corners on odd multiples of 15 m."""
    found = compare_mappers(
        {"one": table([box(15, 15, 90, 60)]), "two": table([box(105, 15, 60, 60)])}, {"pit": GRID}
    )
    assert found[["pixels_both", "pixels_either"]].iloc[0].to_list() == [0, 54 + 36]
    off = found[["raster_area_off", "other_raster_area_off"]].iloc[0].to_list()
    assert off == pytest.approx([0, 0], abs=1e-12)


TOUCHING = box(-100, 100, 100, 100)
ACROSS_THE_EDGE = box(-100, 100, 200, 100)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_polygons_that_only_touch_the_grid_have_area_0_and_no_iou():
    found = compare_mappers({"one": table([TOUCHING]), "two": table([TOUCHING])}, {"pit": GRID})
    assert found["site"].tolist() == ["pit", "pooled"]
    counts = [
        "area_m2",
        "other_area_m2",
        "intersection_m2",
        "union_m2",
        "pixels_both",
        "pixels_either",
    ]
    assert (found[counts] == 0).all(axis=None)
    assert (
        found[["iou", "raster_iou", "raster_area_off", "other_raster_area_off"]]
        .isna()
        .all(axis=None)
    )
    row = compare_mappers(
        {"one": table([TOUCHING]), "two": table([ACROSS_THE_EDGE])}, {"pit": GRID}
    ).iloc[0]
    assert row["area_m2"] == row["iou"] == row["raster_iou"] == 0
    assert row["other_area_m2"] == pytest.approx(10_000, rel=2e-3)
    assert np.isnan(row["raster_area_off"])
    assert row["other_raster_area_off"] == pytest.approx(0)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_polygons_without_a_pixel_have_an_iou_and_no_raster_iou():
    one, two = table([box(101, 101, 3, 3)]), table([box(101, 101, 3, 1)])
    found = compare_mappers({"one": one, "two": two}, {"pit": GRID})
    assert found["iou"].to_list() == pytest.approx([1 / 3, 1 / 3], rel=1e-6)
    assert found["raster_iou"].isna().all()
    assert found["raster_area_off"].iloc[0] == -1


@real
def test_of_real_mappers_the_raster_agrees_with_the_vector():
    mines = read_polygons(REAL)
    grids = {
        str(site): grid_of(Site(id=str(site), geometry=shapely.box(*own.total_bounds)))
        for site, own in mines.groupby("site")
    }
    mappers = {str(name): own for name, own in mines.groupby("source")}
    found = compare_mappers(mappers, grids)
    assert found[found["site"] != "pooled"].groupby(["mapper", "other"]).size().to_list() == [
        2,
        3,
        3,
    ]
    assert (np.abs(found["raster_iou"] - found["iou"]) <= 1e-3).all()
    off = found[["raster_area_off", "other_raster_area_off"]].abs().to_numpy()
    assert np.nanmax(off) <= 1e-3
    # The areas that the data's authors state, in km2.
    stated = mines.set_index(["site", "source"])["area_km2"]
    for row in found[found["site"] != "pooled"].itertuples():
        assert row.area_m2 / 1e6 == pytest.approx(stated[row.site, row.mapper], rel=2e-3)
        assert row.other_area_m2 / 1e6 == pytest.approx(stated[row.site, row.other], rel=2e-3)


# --- the command --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["repaired.parquet", "repaired.gpkg"])
def test_the_command_reports_and_writes_what_it_repaired(tmp_path, out):
    drawn = table(
        [box(0, 0, 100, 100), box(60, 0, 100, 100), box(300, 0, 3, 100)],
        year=[2019, 2019, 2019],
        site=["pit"] * 3,
    )
    path = written(tmp_path, drawn, "mines.gpkg")
    said, _ = run("polygons", path, "--out", tmp_path / out, "--json", tmp_path / "report.json")
    assert "3 rows, 2 kept" in said
    assert "cut from this row" in said
    assert "sliver" in said
    repaired = read_polygons(tmp_path / out)
    assert repaired.area.tolist() == pytest.approx([10_000, 6000])
    assert repaired["row"].tolist() == [1, 2]
    assert rasterize(repaired, GRID, [2019]).sum() == 160
    report = json.loads((tmp_path / "report.json").read_text())
    assert [f["finding"] for f in report["findings"]] == ["overlap", "sliver"]
    assert report["findings"][0]["site"] == "pit"
    assert report["files"] == {str(path): {"rows": 3, "kept": 2, "crs": "EPSG:32633"}}
    assert report["areas"][0]["area_m2"] == pytest.approx(16_000, rel=2e-3)
    assert report["comparison"] == []


def test_the_command_compares_a_column_or_a_second_file(tmp_path):
    drawn = table([box(0, 0, 200, 100), box(100, 0, 200, 100)], who=["x", "y"])
    path = written(tmp_path, drawn, "both.gpkg")
    said, _ = run("polygons", path, "--compare", "who", "--json", tmp_path / "r.json")
    assert "nothing to repair" in said
    one, two = (written(tmp_path, drawn.iloc[[n]], f"{n}.geojson") for n in (0, 1))
    run("polygons", one, "--compare", two, "--json", tmp_path / "s.json")
    for name in ("r.json", "s.json"):
        row = json.loads((tmp_path / name).read_text())["comparison"][0]
        assert row["iou"] == pytest.approx(1 / 3, rel=1e-3)
        assert row["raster_iou"] == pytest.approx(1 / 3, abs=0.02)
        assert row["year"] is None


def test_the_command_on_a_site_of_another_place(tmp_path):
    sites = gpd.GeoDataFrame({"id": list(SITES)}, geometry=list(SITES.values()), crs=4326)
    written(tmp_path, sites, "sites.geojson")
    shapes = lonlat_mines()
    shapes[0] = shapely.transform(shapes[0], lambda xy: xy[:, ::-1])
    path = written(tmp_path, table(shapes, "EPSG:4326", site=["a", "b", "b"]), "mines.gpkg")
    said, _ = run(
        "polygons", path, "--sites", tmp_path / "sites.geojson", "--out", tmp_path / "o.gpkg", ok=1
    )
    assert "with longitude and latitude swapped, it would lie there" in said
    assert len(gpd.read_file(tmp_path / "o.gpkg")) == 2
    world = written(
        tmp_path,
        table(
            [*lonlat_mines(), *[shapely.box(x, 1, x + 0.1, 1.1) for x in range(30)]], "EPSG:4326"
        ),
    )
    said, _ = run("polygons", world, "--sites", tmp_path / "sites.geojson")
    assert "33 rows, 3 kept" in said
    assert [line.split()[:6] for line in said.splitlines() if "at no site" in line] == [
        ["at", "no", "site", "left", "out", "30"]
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["mines.gpkg", "--compare", "mapper"], "has no column 'mapper'"),
        (["mines.gpkg", "--compare", "who"], "names x only; a comparison takes two mappers"),
        (["mines.gpkg", "--compare", "nowhere.gpkg"], "nowhere.gpkg: cannot be read"),
        (["other.gpkg", "--compare", "far.gpkg"], "nothing to compare"),
        (["nowhere.gpkg"], "nowhere.gpkg: cannot be read"),
        (["mines.gpkg", "--out", "o.csv"], "expected a name in .parquet or .gpkg"),
        (["mines.gpkg", "--sites", "Atlantis_1"], "unknown site 'Atlantis_1'"),
        (["mines.gpkg", "--sites", "demo_*"], "no polygon lies within 10 km of its site"),
        (["wide.gpkg", "--compare", "who"], "name the sites they are of"),
    ],
)
def test_mistakes_are_one_sentence_and_nothing_is_written(tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, table([box(0, 0, 100, 100)], who=["x"]), "mines.gpkg")
    written(
        tmp_path,
        table([box(0, 0, 100, 100), box(0, 200, 99, 99)], site=["a", "a"], who=["x", "y"]),
        "far.gpkg",
    )
    written(tmp_path, table([box(0, 0, 100, 100)], site=["b"]), "other.gpkg")
    written(
        tmp_path, table([box(0, 0, 100, 100), box(0, 300_000, 99, 99)], who=["x", "y"]), "wide.gpkg"
    )
    before = sorted(p.name for p in tmp_path.iterdir())
    extra = [] if "--out" in arguments else ["--out", "o.parquet"]
    _, err = run("polygons", *arguments, *extra, "--json", "o.json", ok=2)
    assert says in err
    assert err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == before
