"""Polygons far from the grid: their distance, and the mistake in their coordinates."""

from __future__ import annotations

import geopandas as gpd
import numpy as np
import pytest
import shapely
from affine import Affine
from odc.geo.geobox import GeoBox

from minecube.errors import LabelError
from minecube.labels import (
    rasterize,
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


@pytest.mark.parametrize(
    ("lon", "lat", "km"),
    [(13.6, -51.4, 11400), (51.4, 13.6, 5300), (-166.4, 51.4, 8600), (13.8, 51.9, 50)],
    ids=["southern hemisphere", "swapped", "other side", "next valley"],
)
def test_polygons_elsewhere_are_told_by_their_distance(lon, lat, km):
    with pytest.raises(LabelError, match="no polygon reaches the grid") as error:
        rasterize(table([shapely.box(lon, lat, lon + 0.1, lat + 0.1)], "EPSG:4326"), GRID, [2020])
    assert float(str(error.value).split(" km")[0].split()[-1]) == pytest.approx(km, rel=0.1)


@pytest.mark.parametrize(
    ("move", "says"),
    [
        (
            lambda lon, lat: (lat, lon),
            "with longitude and latitude swapped, 2 of 3 would lie there",
        ),
        (lambda lon, lat: (-lon, lat), "with the sign of longitude changed, 2 of 3"),
        (lambda lon, lat: (lon, -lat), "with the sign of latitude changed, 2 of 3"),
        (lambda lon, lat: (-lon, -lat), "with both signs changed, 2 of 3"),
        (
            lambda lon, lat: (-lat, lon),
            "with longitude and latitude swapped and the sign of latitude changed, 2 of 3",
        ),
    ],
)
def test_the_message_says_which_swap_would_put_them_here(move, says):
    there = table([px(0, 0, 5, 5), px(9, 9, 5, 5)]).to_crs(4326).geometry
    moved = shapely.transform(there.to_numpy(), lambda xy: np.stack(move(*xy.T), axis=1))
    with pytest.raises(LabelError, match=says):
        rasterize(table([*moved, shapely.box(100, 1, 100.1, 1.1)], "EPSG:4326"), GRID, [2020])


@pytest.mark.parametrize(
    ("crs", "move", "says"),
    [
        ("EPSG:32733", lambda xy: xy, "in the UTM zone of the other hemisphere, 1 of 1"),
        ("EPSG:32633", lambda xy: xy[:, ::-1], "with x and y swapped, 1 of 1"),
        ("EPSG:32633", lambda xy: xy * [1, -1], "with the sign of y changed, 1 of 1"),
    ],
)
def test_projected_polygons_are_put_right_in_their_own_terms(crs, move, says):
    moved = shapely.transform(px(1, 1, 5, 5), move)
    with pytest.raises(LabelError, match=says):
        rasterize(table([moved], crs), GRID, [2020])


def test_a_valley_away_no_swap_is_named():
    with pytest.raises(LabelError, match=r"order of longitude and latitude$"):
        rasterize(table([shapely.box(13.8, 51.9, 13.9, 52)], "EPSG:4326"), GRID, [2020])


def test_polygons_around_the_globe_do_not_hide_the_one_here():
    lonlat = table([px(1, 1, 6, 7)]).to_crs(4326).geometry
    world = [
        shapely.box(lon, lat, lon + 0.1, lat + 0.1)
        for lon in range(-180, 180, 30)
        for lat in (-89, 0, 51, 89)
    ]
    assert rasterize(table([*world, *lonlat], "EPSG:4326"), GRID, [2020]).sum() == 42


@pytest.mark.parametrize("bounds", [(-180, -80, 180, 80), (-60, -80, 100, 85), (0, 40, 30, 60)])
def test_a_polygon_larger_than_the_projection_still_covers_the_grid(bounds):
    assert (rasterize(table([shapely.box(*bounds)], "EPSG:4326"), GRID, [2020]) == 1).all()
