"""Polygons to masks and back: areas, pixel centres, years, repair, and every bad file."""

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
import xarray as xr
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from odc.geo.geobox import GeoBox
from odc.geo.xr import xr_coords
from pyproj import CRS, Geod, Transformer

from minecube.catalog import Site
from minecube.errors import LabelError
from minecube.grid import grid_of
from minecube.labels import (
    covered,
    match_sites,
    rasterize,
    read_polygons,
    rows_without_centre,
    vectorize,
)
from minecube.labels.masks import compute_pixel_shares
from minecube.labels.placement import on_grid

REAL = Path(__file__).parents[2] / "shared" / "data" / "mine_polygons" / "sites.geojson"
real = pytest.mark.skipif(not REAL.exists(), reason="../shared/data/mine_polygons is absent")

LEFT, TOP = 399960, 5700000
GRID = GeoBox((40, 60), Affine(10, 0, LEFT, 0, -10, TOP), "EPSG:32633")


def table(shapes, crs="EPSG:32633", **columns):
    return gpd.GeoDataFrame(columns, geometry=list(shapes), crs=crs)


def px(row, col, height, width):
    """The rectangle of whole pixels with that corner and size."""
    return shapely.box(
        LEFT + 10 * col, TOP - 10 * (row + height), LEFT + 10 * (col + width), TOP - 10 * row
    )


def centres(grid):
    x, y = np.meshgrid(np.arange(grid.shape[1]) + 0.5, np.arange(grid.shape[0]) + 0.5)
    a = grid.affine
    return a.c + a.a * x, a.f + a.e * y


def sampled(grid):
    """Where `rasterize` looks at each pixel: a tenth of a millimetre beside its centre."""
    x, y = centres(grid)
    return x + 1e-4, y - 6.18e-5


def as_mask(array, grid=GRID, years=(2020,)):
    coords = {"year": np.array(years), **xr_coords(grid)}
    return xr.DataArray(
        np.asarray(array, np.uint8).reshape(len(years), *grid.shape), coords, ("year", "y", "x")
    )


def written(tmp_path, polygons, name="mines.gpkg"):
    path = tmp_path / name
    if name.endswith("parquet"):
        polygons.to_parquet(path)
    else:
        polygons.to_file(path)
    return path


# --- area and pixel centres ---------------------------------------------------------------------------------------------


def real_polygons():
    if not REAL.exists():
        return []
    mines = gpd.read_file(REAL)
    mines = mines[mines["source"] != "tile_bbox"]
    return [pytest.param(row, id=f"{row.site}-{row.source}") for row in mines.itertuples()]


@real
@pytest.mark.parametrize("row", real_polygons())
def test_area_there_and_back_within_a_thousandth(row):
    grid = grid_of(Site(id=row.site, geometry=shapely.envelope(row.geometry)))
    polygon = table([row.geometry], "EPSG:4326")
    footprint = rasterize(polygon, grid, [2019])
    flat = polygon.to_crs(str(grid.crs)).area.sum()
    assert footprint.sum().item() * 100 == pytest.approx(flat, rel=1e-3)
    back = vectorize(footprint, grid, row.site)
    assert back.area.sum() == pytest.approx(flat, rel=1e-3)
    # Independent of any projection: the area on the ellipsoid.
    on_ellipsoid = abs(Geod(ellps="WGS84").geometry_area_perimeter(row.geometry)[0])
    assert back["area_m2"].sum() == pytest.approx(on_ellipsoid, rel=1e-3)
    assert (rasterize(back, grid, [2019]) == footprint).all()


@real
@pytest.mark.parametrize("row", real_polygons()[:2])
def test_every_pixel_is_decided_by_its_centre(row):
    grid = grid_of(Site(id=row.site, geometry=shapely.envelope(row.geometry)))
    polygon = table([row.geometry], "EPSG:4326").to_crs(str(grid.crs)).geometry[0]
    x, y = centres(grid)
    shapely.prepare(polygon)
    inside = shapely.contains_xy(polygon, x, y)
    assert 0.01 < inside.mean() < 0.9
    assert np.array_equal(
        rasterize(table([polygon], str(grid.crs)), grid, [2019]).values[0], inside.astype(np.uint8)
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(-100, 700), st.floats(-100, 500)), min_size=3, max_size=9))
def test_any_polygon_is_decided_by_pixel_centres(corners):
    polygon = shapely.convex_hull(shapely.MultiPoint([(LEFT + x, TOP - y) for x, y in corners]))
    if polygon.geom_type != "Polygon" or not polygon.intersects(GRID.extent.geom):
        return
    x, y = sampled(GRID)
    decided = ~shapely.dwithin(
        polygon.boundary, shapely.points(x, y), 1e-6
    )  # rounding decides on the edge itself
    expected = shapely.contains_xy(polygon, x, y)
    assert np.array_equal(
        rasterize(table([polygon]), GRID, [2020]).values[0][decided], expected[decided]
    )


@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:3035", "EPSG:3857"])
def test_edges_are_straight_in_the_crs_they_were_drawn_in(crs):
    # A box 40 km wide: projected by its corners alone, its edges would be off by some pixels of 10 m.
    grid = GeoBox((3600, 400), Affine(10, 0, LEFT, 0, -10, TOP), "EPSG:32633")
    to_drawn = Transformer.from_crs(32633, crs, always_xy=True)
    left, top = to_drawn.transform(LEFT - 19000, TOP - 1000)
    right, bottom = to_drawn.transform(LEFT + 22000, TOP - 34000)
    drawn = shapely.box(left, bottom, right, top)
    x, y = centres(grid)
    expected = shapely.contains_xy(drawn, *to_drawn.transform(x[:, ::40], y[:, ::40]))
    assert np.array_equal(rasterize(table([drawn], crs), grid, [2020]).values[0][:, ::40], expected)


def test_coordinates_are_pixel_centres_and_georeferenced():
    footprint = rasterize(table([px(3, 5, 2, 4)]), GRID, [2019, 2020])
    assert footprint.dims == ("year", "y", "x")
    assert footprint.dtype == np.uint8
    assert footprint.odc.geobox == GRID
    assert (footprint.x[0].item(), footprint.y[0].item()) == (LEFT + 5, TOP - 5)
    expected = np.zeros(GRID.shape, np.uint8)
    expected[3:5, 5:9] = 1
    assert np.array_equal(footprint.values, [expected, expected])


# --- centres on edges ---------------------------------------------------------------------------------------------------

SMALL = GeoBox((12, 15), Affine(10, 0, LEFT, 0, -10, TOP), "EPSG:32633")


def landsat(row, col, height=1, width=1):
    """Landsat's pixels: 30 m, corners on odd multiples of 15 m, so that their edges run through centres of 10 m pixels."""
    left, top = LEFT + 15 + 30 * col, TOP - 15 - 30 * row
    return shapely.box(left, top - 30 * height, left + 30 * width, top)


def drawn_in(way, shape):
    """The shape in another CRS, or in longitude and latitude with so many decimals."""
    if way.startswith("EPSG"):
        return table([shape]).to_crs(way)
    lonlat = table([shape]).to_crs(4326)
    digits = int(way.split()[0])
    return lonlat.set_geometry(
        shapely.transform(lonlat.geometry.to_numpy(), lambda xy: np.round(xy, digits))
    )


def burnt(shape):
    return rasterize(table([shape]), GRID, [2020]).values[0] == 1


@pytest.mark.parametrize("clockwise", [False, True])
@pytest.mark.parametrize(
    "way", ["EPSG:32633", "EPSG:32632", "EPSG:4326", "EPSG:3857", "9 decimals"]
)
def test_a_pixel_of_landsat_is_nine_pixels(way, clockwise):
    expected = np.zeros((1, *GRID.shape), np.uint8)
    expected[0, 4:7, 7:10] = (
        1  # rows from 45 to 75 m, columns from 75 to 105 m: centres on top and left edges are in
    )
    shape = shapely.orient_polygons(landsat(1, 2), exterior_cw=clockwise)
    assert np.array_equal(rasterize(drawn_in(way, shape), GRID, [2020]), expected)


def test_ten_by_ten_pixels_of_landsat_are_nine_hundred():
    assert burnt(landsat(0, 0, 10, 10)).sum() == 900
    hollow = landsat(0, 0, 10, 10).difference(landsat(3, 3, 2, 4))
    assert burnt(hollow).sum() == 900 - 72
    assert burnt(hollow.reverse()).sum() == 900 - 72
    corners = shapely.MultiPolygon([landsat(0, 0), landsat(1, 1), landsat(0, 3, 2, 2)])
    assert burnt(corners).sum() == 9 + 9 + 36


def test_known_areas_that_share_an_edge_share_no_pixel():
    areas = [landsat(0, 0, 5, 5), landsat(0, 5, 5, 5)]
    known = [
        rasterize(
            table([area, landsat(1, 1)], year=[2020] * 2, mapped=[True, False]), GRID, [2020]
        ).values[0]
        != 255
        for area in areas
    ]
    assert [int(k.sum()) for k in known] == [225, 225 + 9]  # the mine is known in both
    assert (known[0] & known[1]).sum() == 9


ways = [(5.0, w) for w in ("EPSG:32633", "EPSG:32632", "EPSG:4326", "7 decimals")] + [
    (0.01, "EPSG:32633"),
    (0.01, "EPSG:4326"),
]


@pytest.mark.parametrize(("metres", "way"), ways)
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_partition_of_the_plane_burns_each_pixel_once(metres, way, data):
    """Triangles between points, joined to polygons with holes and parts, with rings in any direction.

    Points on multiples of 5 m are centres, corners and middles of edges of pixels.
    """
    place = st.integers(round(-20 / metres), round(170 / metres)).map(lambda n: n * metres)
    points = data.draw(st.lists(st.tuples(place, place), min_size=1, max_size=12))
    around = [(-100, -100), (-100, 300), (300, -100), (300, 300)]
    corners = shapely.MultiPoint(np.array([*points, *around]) * [1, -1] + [LEFT, TOP])
    triangles = shapely.get_parts(shapely.delaunay_triangles(corners))
    owner = np.array(
        data.draw(st.lists(st.integers(0, 3), min_size=len(triangles), max_size=len(triangles)))
    )
    turned = data.draw(st.lists(st.booleans(), min_size=4, max_size=4))
    burns = np.zeros(SMALL.shape, int)
    for n in np.unique(owner):
        shape = shapely.union_all(triangles[owner == n])
        shape = shape.reverse() if turned[n] else shape
        there = drawn_in(way, shape)
        if len(on_grid(there, SMALL, required=False)):
            burns += rasterize(there, SMALL, [2020]).values[0]
    assert (burns == 1).all()


# --- years --------------------------------------------------------------------------------------------------------------


def test_a_year_without_rows_is_unknown_not_zero():
    polygons = table([px(0, 0, 5, 5), px(0, 0, 9, 9)], year=[2018, 2020])
    footprint = rasterize(polygons, GRID, [2018, 2019, 2020])
    assert footprint.sel(year=2018).sum() == 25
    assert (footprint.sel(year=2019) == 255).all()
    assert footprint.sel(year=2020).sum() == 81


def test_a_year_mapped_only_at_another_site_is_unknown_here():
    elsewhere = shapely.box(LEFT + 50_000, TOP, LEFT + 51_000, TOP + 1000)
    footprint = rasterize(table([px(0, 0, 5, 5), elsewhere], year=[2018, 2019]), GRID, [2018, 2019])
    assert footprint.sel(year=2018).sum() == 25
    assert (footprint.sel(year=2019) == 255).all()


def test_rows_of_null_year_hold_for_all_years_and_do_not_make_a_year_known():
    years = pd.array([None, 2019], dtype="Int64")
    footprint = rasterize(table([px(0, 0, 5, 5), px(10, 10, 4, 4)], year=years), GRID, [2018, 2019])
    assert footprint.sel(year=2019).sum() == 25 + 16
    unmapped = footprint.sel(year=2018).values
    assert (unmapped == 1).sum() == 25
    assert (unmapped == 255).sum() == unmapped.size - 25
    everywhere = rasterize(
        table([px(0, 0, 5, 5)], year=pd.array([None], dtype="Int64")), GRID, [2018, 2019]
    )
    assert (everywhere.sum(("y", "x")) == 25).all()


def test_only_other_years_is_an_error():
    with pytest.raises(
        LabelError, match=r"expected polygons of 2020\.\.2021 \(2 years\), found 2018 on this grid"
    ):
        rasterize(table([px(0, 0, 5, 5)], year=[2018]), GRID, [2020, 2021])


def test_spans_hold_through_their_years_either_end_open():
    spans = {"start": [2016, None, 2019, None], "end": [2017, 2015, None, None]}
    drawn = table([px(0, 0, 1, 1), px(0, 1, 1, 2), px(0, 3, 1, 4), px(0, 7, 1, 8)], **spans)
    footprint = rasterize(drawn, GRID, range(2014, 2022))
    # Pixels by year: the row without years is 8, on top of every year; in 2018 no row with years holds, so it is unknown.
    assert ((footprint == 1).sum(("y", "x")) == [10, 10, 9, 9, 8, 12, 12, 12]).all()
    assert [bool((footprint.sel(year=y) == 255).any()) for y in footprint.year] == [
        y == 2018 for y in footprint.year
    ]
    with pytest.raises(
        LabelError, match=r"expected polygons of 2020, found 2016\.\.2017 \(2 years\) on this grid"
    ):
        rasterize(drawn[:1], GRID, [2020])


def test_overlaps_count_once_and_holes_stay_open():
    ring = px(0, 0, 9, 9).difference(px(3, 3, 3, 3))
    footprint = rasterize(table([ring, px(0, 0, 2, 2)]), GRID, [2020])
    assert footprint.sum() == 81 - 9
    assert footprint.max() == 1


# --- covered fraction ---------------------------------------------------------------------------------------------------


def pixel_boxes(grid):
    row, col = np.mgrid[: grid.shape[0], : grid.shape[1]]
    a = grid.affine
    return shapely.box(
        a.c + a.a * col, a.f + a.e * (row + 1), a.c + a.a * (col + 1), a.f + a.e * row
    )


corners = st.lists(st.tuples(st.floats(-60, 160), st.floats(-60, 130)), min_size=3, max_size=8)


@settings(max_examples=150, deadline=None)
@given(st.lists(corners, min_size=1, max_size=4), st.booleans())
def test_the_covered_fraction_is_each_pixels_intersection_with_the_union(drawn, hollow):
    grid = GeoBox((7, 10), Affine(10, 0, LEFT, 0, -10, TOP), "EPSG:32633")
    shapes = [
        shapely.convex_hull(shapely.MultiPoint([(LEFT + x, TOP - y) for x, y in one]))
        for one in drawn
    ]
    if hollow:
        shapes = [s.difference(shapely.affinity.scale(s, 0.5, 0.6)) for s in shapes]
    shapes = [s for s in shapes if s.geom_type == "Polygon" and s.area > 1e-3]
    if not shapes:
        return
    union = shapely.union_all(shapes)
    expected = shapely.area(shapely.intersection(pixel_boxes(grid), union)) / 100
    np.testing.assert_allclose(compute_pixel_shares(union, grid), expected, rtol=0, atol=1e-9)
    if union.intersects(grid.extent.geom):
        stored = covered(table(shapes), grid, [2020])
        assert stored.dtype == np.uint8
        assert (np.abs(stored.values[0] / 250 - expected) <= 0.002 + 1e-9).all()


@real
@pytest.mark.parametrize("row", real_polygons())
def test_the_fractions_of_a_real_mine_sum_to_its_area(row):
    grid = grid_of(Site(id=row.site, geometry=shapely.envelope(row.geometry)))
    polygon = table([row.geometry], "EPSG:4326")
    fraction = covered(polygon, grid, [2019])
    flat = polygon.to_crs(str(grid.crs)).area.sum()
    assert fraction.sum(dtype=float).item() / 250 * 100 == pytest.approx(flat, rel=1e-5)
    mask = rasterize(polygon, grid, [2019])
    whole, none = (fraction == 250).values, (fraction == 0).values
    assert (mask.values[whole] == 1).all()
    assert (mask.values[none] == 0).all()
    assert 0 < (~whole & ~none).sum() < 0.1 * whole.sum()


def test_the_fraction_is_unknown_where_the_footprint_is():
    half = shapely.box(LEFT, TOP - 100, LEFT + 55, TOP)
    drawn = table([half, px(20, 20, 3, 3)], year=pd.array([None, 2019], dtype="Int64"))
    fraction, footprint = (f(drawn, GRID, [2018, 2019]) for f in (covered, rasterize))
    assert fraction.name == "footprint_fraction"
    assert fraction.odc.geobox == GRID
    assert fraction.values[1, 0, :7].tolist() == [250, 250, 250, 250, 250, 125, 0]
    assert fraction.values[0, 0, :7].tolist() == [250, 250, 250, 250, 250, 125, 255]
    assert ((fraction == 255) == ((footprint == 255) & (fraction == 255))).all()
    assert (fraction.sel(year=2019) == 250).sum() == 50 + 9
    with pytest.raises(LabelError, match="no polygon reaches the grid"):
        covered(table([shapely.box(13, 51, 13.1, 51.1)], "EPSG:4326"), GRID, [2018])


def test_overlaps_are_covered_once():
    fraction = covered(table([px(0, 0, 5, 5), px(0, 0, 5, 9), px(3, 3, 5, 5)]), GRID, [2020])
    assert fraction.max() == 250
    assert (fraction == 250).sum() == 45 + 25 - 2 * 5


# --- elsewhere ----------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("polygons", "years", "says"),
    [
        (table([]), [2020], "the table is empty"),
        (table([px(0, 0, 1, 1)], None), [2020], "no CRS"),
        (table([px(0, 0, 1, 1)]), [], "no year"),
        (table([shapely.box(1e20, 1e20, 2e20, 2e20)]), [2020], "cannot be placed on the globe"),
    ],
)
def test_rasterize_refuses(polygons, years, says):
    with pytest.raises(LabelError, match=says):
        rasterize(polygons, GRID, years)


# --- masks to polygons --------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(arrays(np.uint8, (2, 7, 9), elements=st.sampled_from([0, 1, 1, 255])))
def test_vectorized_masks_rasterize_to_themselves(masks):
    grid = GeoBox((7, 9), Affine(10, 0, LEFT, 0, -10, TOP), "EPSG:32633")
    polygons = vectorize(as_mask(masks, grid, (2019, 2020)), grid, "pit")
    assert polygons.is_valid.all()
    assert polygons.area.sum() == 100 * (masks == 1).sum()
    for year, mask in zip((2019, 2020), masks, strict=True):
        rows = polygons[polygons["year"] == year]
        if rows.empty:
            assert not (mask == 1).any()
        else:
            assert np.array_equal(rasterize(rows, grid, [year]).values[0], mask == 1)


def test_regions_that_meet_at_a_corner_are_two_and_holes_are_kept():
    mask = np.zeros(GRID.shape, np.uint8)
    mask[1:6, 1:6] = 1
    mask[3, 3] = 0
    mask[6, 6] = 1
    polygons = vectorize(as_mask(mask), GRID, "pit")
    assert list(polygons.columns) == ["site", "year", "area_m2", "geometry"]
    assert sorted(polygons.area) == [100, 2400]
    assert [len(p.interiors) for p in polygons.geometry] == [1, 0]
    assert polygons.crs == CRS(32633)
    assert set(polygons["site"]) == {"pit"}
    assert set(polygons["year"]) == {2020}


@pytest.mark.parametrize(
    ("epsg", "left", "top"),
    [(32633, 399960, 5700000), (32719, 500000, 7300020), (32633, 166020, 4000020)],
)
def test_area_is_the_ellipsoids_not_the_pixel_counts(epsg, left, top):
    # On the central meridian a UTM pixel of 100 m2 covers 100.08 m2 of ground.
    grid = GeoBox((600, 900), Affine(10, 0, left, 0, -10, top), f"EPSG:{epsg}")
    polygons = vectorize(as_mask(np.ones(grid.shape), grid), grid, "pit")
    lonlat = gpd.GeoSeries([grid.extent.geom], crs=epsg).segmentize(100).to_crs(4326)[0]
    on_ellipsoid = abs(Geod(ellps="WGS84").geometry_area_perimeter(lonlat)[0])
    assert polygons["area_m2"].item() == pytest.approx(on_ellipsoid, rel=1e-6)
    assert abs(polygons["area_m2"].item() / 54e6 - 1) > 2e-4


def test_a_footprint_without_mine_gives_an_empty_table_with_columns():
    polygons = vectorize(as_mask(np.full(GRID.shape, 255)), GRID, "pit")
    assert polygons.empty
    assert list(polygons.columns) == ["site", "year", "area_m2", "geometry"]
    assert polygons.crs == CRS(32633)
    assert polygons["year"].dtype == np.int64


def test_a_footprint_of_another_grid_is_refused():
    with pytest.raises(LabelError, match="expected year, y, x with 40 x 60 px"):
        vectorize(as_mask(np.zeros(GRID.shape))[:, :-1], GRID, "pit")


# --- files --------------------------------------------------------------------------------------------------------------


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


@given(
    st.lists(
        st.tuples(
            st.floats(20, 350),
            st.floats(20, 250),
            st.floats(0.5, 12),
            st.floats(0.5, 120),
            st.floats(0, 90),
        ),
        min_size=1,
    )
)
@settings(max_examples=40, deadline=None)
def test_rows_without_a_pixels_centre(drawn):
    shapes = [
        shapely.affinity.rotate(shapely.box(x, y, x + w, y + h), a) for x, y, w, h, a in drawn
    ]
    shapes = [shapely.transform(shape, lambda xy: xy * [1, -1] + [LEFT, TOP]) for shape in shapes]
    x, y = sampled(GRID)
    holds = [bool(shapely.contains_xy(shape, x, y).any()) for shape in shapes]
    # A shape that reaches beyond the grid may hold centres there, and is not reported.
    expected = [
        n for n, shape in enumerate(shapes) if not holds[n] and shape.within(GRID.extent.geom)
    ]
    assert rows_without_centre(table(shapes), GRID).tolist() == expected


def test_a_centre_on_an_edge_is_decided_as_it_is_drawn():
    """One pixel to the right of its corner, edges through centres: a row holds a centre if and only if a pixel is drawn."""
    shapes = [
        shapely.affinity.translate(px(5, 5, h, w), 5, -5)
        for h, w in ((1, 1), (0.5, 1), (1, 0.5), (0.5, 0.5))
    ]
    shapes.append(
        shapely.LineString([(LEFT + 5, TOP - 5), (LEFT + 35, TOP - 5)])
        .buffer(1, cap_style="flat")
        .intersection(shapely.box(LEFT, TOP - 5, LEFT + 100, TOP))
    )
    drawn = [bool((rasterize(table([shape]), GRID, [0]) == 1).any()) for shape in shapes]
    assert rows_without_centre(table(shapes), GRID).tolist() == [
        n for n, is_drawn in enumerate(drawn) if not is_drawn
    ]


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
        (table([px(0, 0, 1, 1)], year=[2019], Year=[2018]), "columns year, Year"),
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


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(LabelError, match="cannot be read"):
        read_polygons(tmp_path / "nowhere.gpkg")


def looked_at():
    """2019: an area that was looked at with a mine in it; 2020: the same without a mine; 2021: another area."""
    shapes = [px(5, 5, 20, 30), px(10, 10, 4, 6), px(5, 5, 20, 30), px(0, 50, 10, 20)]
    return table(shapes, year=[2019, 2019, 2020, 2021], mapped=[True, False, True, True])


def test_only_what_was_looked_at_is_known():
    """Within it all that is no mine is not mine, also in a year without a mine; beyond it nothing is known."""
    expected = np.full((4, *GRID.shape), 255, np.uint8)
    expected[:2, 5:25, 5:35] = 0
    expected[0, 10:14, 10:16] = 1
    expected[2, 0:10, 50:60] = 0
    np.testing.assert_array_equal(rasterize(looked_at(), GRID, [2019, 2020, 2021, 2022]), expected)
    fraction = np.where(expected == 1, 250, expected)
    np.testing.assert_array_equal(covered(looked_at(), GRID, [2019, 2020, 2021, 2022]), fraction)


def test_what_was_looked_at_ends_within_a_pixel():
    """A pixel is known by its centre; of one that is known, the share is that of the mine, of others there is none."""
    area = shapely.affinity.translate(
        px(5, 5, 10, 10), xoff=4
    )  # its left edge lies in pixel 5, left of the centre
    polygons = table([area, area], year=[2020, 2020], mapped=[True, False])
    assert rasterize(polygons, GRID, [2020]).values[0, 7, 4:7].tolist() == [255, 1, 1]
    assert covered(polygons, GRID, [2020]).values[0, 7, 4:7].tolist() == [255, 150, 250]
    assert covered(polygons, GRID, [2020]).values[0, 7, 14:17].tolist() == [250, 255, 255]


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
