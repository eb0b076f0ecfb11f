"""Polygons that lie elsewhere than their site are found, with the swap that explains it."""

from __future__ import annotations

import pytest
import shapely
from pyproj import Geod

from known_polygons import SITES, found, lonlat_mines, surveyed, table
from minecube.errors import LabelError


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
