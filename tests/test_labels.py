"""Polygons to masks and back: areas, pixel centres, years, repair, and every bad file."""

from __future__ import annotations

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
    find_rows_without_centre,
    rasterize,
    rasterize_fraction,
    read_polygons,
    vectorize,
)
from minecube.labels.masks import compute_pixel_shares
from minecube.labels.placement import place_on_grid

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
        if len(place_on_grid(there, SMALL, required=False)):
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
        stored = rasterize_fraction(table(shapes), grid, [2020])
        assert stored.dtype == np.uint8
        assert (np.abs(stored.values[0] / 250 - expected) <= 0.002 + 1e-9).all()


@real
@pytest.mark.parametrize("row", real_polygons())
def test_the_fractions_of_a_real_mine_sum_to_its_area(row):
    grid = grid_of(Site(id=row.site, geometry=shapely.envelope(row.geometry)))
    polygon = table([row.geometry], "EPSG:4326")
    fraction = rasterize_fraction(polygon, grid, [2019])
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
    fraction, footprint = (f(drawn, GRID, [2018, 2019]) for f in (rasterize_fraction, rasterize))
    assert fraction.name == "footprint_fraction"
    assert fraction.odc.geobox == GRID
    assert fraction.values[1, 0, :7].tolist() == [250, 250, 250, 250, 250, 125, 0]
    assert fraction.values[0, 0, :7].tolist() == [250, 250, 250, 250, 250, 125, 255]
    assert ((fraction == 255) == ((footprint == 255) & (fraction == 255))).all()
    assert (fraction.sel(year=2019) == 250).sum() == 50 + 9
    with pytest.raises(LabelError, match="no polygon reaches the grid"):
        rasterize_fraction(table([shapely.box(13, 51, 13.1, 51.1)], "EPSG:4326"), GRID, [2018])


def test_overlaps_are_covered_once():
    fraction = rasterize_fraction(
        table([px(0, 0, 5, 5), px(0, 0, 5, 9), px(3, 3, 5, 5)]), GRID, [2020]
    )
    assert fraction.max() == 250
    assert (fraction == 250).sum() == 45 + 25 - 2 * 5


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
    assert find_rows_without_centre(table(shapes), GRID).tolist() == expected


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
    assert find_rows_without_centre(table(shapes), GRID).tolist() == [
        n for n, is_drawn in enumerate(drawn) if not is_drawn
    ]


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
    np.testing.assert_array_equal(
        rasterize_fraction(looked_at(), GRID, [2019, 2020, 2021, 2022]), fraction
    )


def test_what_was_looked_at_ends_within_a_pixel():
    """A pixel is known by its centre; of one that is known, the share is that of the mine, of others there is none."""
    area = shapely.affinity.translate(
        px(5, 5, 10, 10), xoff=4
    )  # its left edge lies in pixel 5, left of the centre
    polygons = table([area, area], year=[2020, 2020], mapped=[True, False])
    assert rasterize(polygons, GRID, [2020]).values[0, 7, 4:7].tolist() == [255, 1, 1]
    assert rasterize_fraction(polygons, GRID, [2020]).values[0, 7, 4:7].tolist() == [255, 150, 250]
    assert rasterize_fraction(polygons, GRID, [2020]).values[0, 7, 14:17].tolist() == [
        250,
        255,
        255,
    ]
