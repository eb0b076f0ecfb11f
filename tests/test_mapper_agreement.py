"""Two mappers of the same sites are compared by area and by pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import shapely
from affine import Affine
from odc.geo.geobox import GeoBox

from known_polygons import GRID, LEFT, TOP, box, table
from minecube.catalog import Site
from minecube.grid import grid_of
from minecube.labels import compare_mappers, read_polygons

REAL = Path(__file__).parents[2] / "shared" / "data" / "mine_polygons" / "sites.geojson"


real = pytest.mark.skipif(not REAL.exists(), reason="../shared/data/mine_polygons is absent")


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
