"""Every site's grid is made of whole 60 m pixels of its zone and holds its polygon."""

from __future__ import annotations

import numpy as np
import pyproj
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from odc.geo import CRS, Geometry
from odc.geo.geobox import GeoBox
from pyproj import Geod, Transformer
from pyproj.database import query_utm_crs_info
from shapely.geometry import box
from shapely.ops import unary_union

from minecube.catalog import Site, load_sites
from minecube.errors import CatalogError
from minecube.grid import (
    coarsen,
    equal_area_crs,
    grid_of,
    grids_of,
    iterate_blocks,
    pad,
    project_bounds,
)


def site_at(lon, lat, width, height):
    return Site(id="s", geometry=box(lon, lat, lon + width, lat + height))


@settings(max_examples=60, deadline=None)
@given(
    lon=st.floats(-179, 178.5),
    lat=st.floats(-79, 82),
    width=st.floats(0.001, 0.2),
    height=st.floats(0.001, 0.2),
)
def test_any_sites_grid(lon, lat, width, height):
    site = site_at(lon, lat, width, height)
    grid = grid_of(site)
    left, bottom, right, top = grid.boundingbox
    assert all(v == int(v) and v % 60 == 0 for v in (left, bottom, right, top))
    assert (grid.resolution.x, grid.resolution.y) == (10, -10)
    middle = lon + width / 2
    assert grid.crs.epsg in (
        32600 + int((middle + 180) // 6) + 1,
        32700 + int((middle + 180) // 6) + 1,
    )
    # The polygon's own corners, by another way, lie inside, and the grid reaches at most 60 m beyond its bulging edges.
    x, y = Transformer.from_crs(4326, grid.crs.epsg, always_xy=True).transform(
        *np.array(site.geometry.exterior.coords).T
    )
    assert left - 1e-3 <= min(x)
    assert max(x) <= right + 1e-3
    assert bottom - 1e-3 <= min(y)
    assert max(y) <= top + 1e-3


@settings(max_examples=40, deadline=None)
@given(st.integers(-500, 500), st.integers(1, 300), st.integers(1, 300), st.integers(0, 200))
def test_a_margin_is_ground_on_each_side(steps, columns, rows, margin_steps):
    """The margin in metres of the grid: polygons and margins of whole 60 m come out exactly."""
    left, bottom, margin = 500_000 - 500_000 % 60 + 60 * steps, 5_600_040, 60 * margin_steps
    mine = box(left, bottom, left + 60 * columns, bottom + 60 * rows)
    lonlat = shapely.transform(
        mine, Transformer.from_crs(32633, 4326, always_xy=True).transform, interleaved=False
    )
    grown = mine.buffer(margin, join_style="mitre")
    grid = grid_of(Site(id="s", geometry=lonlat, margin=margin))
    # An edge that is straight in degrees bulges, by up to a metre here, which takes another 60 m.
    assert all(0 <= beyond <= 60 for beyond in np.abs(np.subtract(grid.boundingbox, grown.bounds)))
    assert box(*grid.boundingbox).contains(grown)


@pytest.mark.parametrize(("margin", "side"), [(0, 120), (60, 132), (90, 144), (1000, 324)])
def test_margins_of_a_square_of_twenty_times_sixty_metres(margin, side):
    """1000 m takes seventeen times 60 m on each side, 90 m two."""
    mine = box(500_040, 5_600_040, 501_240, 5_601_240)
    lonlat = shapely.transform(
        mine.buffer(-1, join_style="mitre"),
        Transformer.from_crs(32633, 4326, always_xy=True).transform,
        interleaved=False,
    )
    assert grid_of(Site(id="s", geometry=lonlat, margin=margin)).shape == (side, side)


def test_the_demo_sites_are_384_pixels():
    assert {tuple(grid_of(s).shape) for s in load_sites() if s.id.startswith("demo_")} == {
        (384, 384)
    }


def test_a_grid_does_not_grow_when_its_own_corners_come_back():
    """Through degrees and back a corner moves by micrometres; it must not take another 60 m with it."""
    grid = grid_of(site_at(13.0, 50.0, 0.05, 0.03))
    back = Transformer.from_crs(grid.crs.epsg, 4326, always_xy=True)
    outline = box(*grid.boundingbox).segmentize(
        20
    )  # an edge that is straight in degrees would bulge beyond it
    again = Site(id="s", geometry=shapely.transform(outline, back.transform, interleaved=False))
    assert grid_of(again) == grid


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 300).map(lambda n: n * 6),
    st.integers(1, 300).map(lambda n: n * 6),
    st.integers(1, 700),
)
def test_blocks_tile_the_grid(height, width, size):
    grid = grid_of(site_at(13.0, 50.0, 0.05, 0.03))[:6, :6]
    grid = GeoBox((height, width), grid.transform, grid.crs)
    if height * width > 500_000 or (height // size + 1) * (width // size + 1) > 2000:
        return
    hit = np.zeros((height, width), np.uint8)
    for block in iterate_blocks(grid, size):
        hit[block] += 1
    assert (hit == 1).all()


def test_coarser_and_padded_grids_share_corners():
    grid = grid_of(site_at(13.0, 50.0, 0.05, 0.03))
    for size in (10, 20, 60):
        coarse = coarsen(grid, size)
        assert tuple(coarse.boundingbox) == tuple(grid.boundingbox)
        assert coarse.resolution.x == size
    wide = pad(grid, 240)
    assert np.subtract(wide.boundingbox, grid.boundingbox).tolist() == [-240, -240, 240, 240]


@pytest.mark.parametrize(
    ("lon", "lat"), [(14.0, 51.0), (-70.0, -23.0), (118.0, -22.5), (24.0, 65.0)]
)
def test_areas_agree_with_the_ellipsoids(lon, lat):
    """The area of a projected polygon against its geodesic area."""
    polygon = box(lon, lat, lon + 0.05, lat + 0.03).segmentize(0.001)
    crs = equal_area_crs(grid_of(Site(id="s", geometry=polygon)))
    flat = shapely.transform(
        polygon, Transformer.from_crs(4326, crs, always_xy=True).transform, interleaved=False
    )
    true, _ = Geod(ellps="GRS80").geometry_area_perimeter(polygon)
    assert abs(flat.area / abs(true) - 1) < 1e-5


def test_sites_without_a_grid():
    with pytest.raises(CatalogError, match="'s' has no area of interest yet"):
        grid_of(Site(id="s"))
    with pytest.raises(CatalogError, match="expected at most 100000 per side"):
        grid_of(site_at(10, 50, 18, 5))
    with pytest.raises(CatalogError, match="latitude 85"):
        grid_of(Site(id="s", geometry=unary_union([box(10, 84.9, 11, 85.1)])))


def best_zone(shape, zones):
    """The zone with the largest part of a box, by areas of use from EPSG's database."""
    parts = [shape.intersection(area).area for area in zones.values()]
    return list(zones)[int(np.argmax(parts))]


def test_a_sites_zone_is_that_of_proj():
    """At random places, and close to borders, the equator and Norway's and Svalbard's exceptions, which EPSG's zones lack."""
    zones = {
        int(zone.code): box(*pyproj.CRS.from_epsg(zone.code).area_of_use.bounds)
        for zone in query_utm_crs_info(datum_name="WGS 84")
    }
    rng = np.random.default_rng(0)
    places = [*zip(rng.uniform(-179, 179, 100), rng.uniform(-79, 83, 100), strict=True)]
    borders = 6.0 * rng.integers(-29, 30, 100)
    places += zip(borders - 0.01 * rng.random(100), rng.uniform(-79, 83, 100), strict=True)
    places += zip(borders - 0.01 * rng.random(100), -0.01 * rng.random(100), strict=True)
    special = [(5.0, 60.0), (15.0, 78.0), (11.99, 50.0), (11.993, 50.0), (12.0, 50.0)]
    special += [(-12.006, 8.0), (-179.9, 10.0), (20.0, 0.001), (20.0, -0.02), (20.0, -0.003)]
    for x, y in [*places, *special]:
        shape = box(x, y, x + 0.01, y + 0.01)
        assert grid_of(Site(id="s", geometry=shape)).crs.epsg == best_zone(shape, zones), (x, y)
    for x, y in special:  # the library's own choice, which takes 0.1 s
        shape = box(x, y, x + 0.01, y + 0.01)
        expected = CRS.utm(Geometry(shape, "EPSG:4326"))
        assert grid_of(Site(id="s", geometry=shape)).crs == expected, (x, y)


@pytest.mark.parametrize(
    "shape",
    [
        shapely.box(10.0, 45.0, 10.3, 45.02),
        shapely.box(-0.004, 51.0, 0.004, 51.2),  # odc-geo adds no vertices at Greenwich
        shapely.Point(30.0, -20.0).buffer(0.06).difference(shapely.box(30.0, -20.0, 30.01, -19.9)),
        shapely.union(shapely.box(20.0, 60.0, 20.2, 60.1), shapely.box(20.3, 60.2, 20.31, 60.21)),
    ],
)
def test_a_grid_covers_the_box_that_odc_geo_projects(shape):
    """Committed cubes have grids of this box. Another last digit might change a grid."""
    crs = CRS(f"EPSG:{grid_of(Site(id='pit', geometry=shape)).crs.epsg}")
    expected = Geometry(shape, "EPSG:4326").to_crs(crs, resolution=0.01).boundingbox
    assert project_bounds(shape, crs).bbox == expected.bbox


def test_grids_of_many_sites_are_those_of_each():
    rng = np.random.default_rng(5)
    sites = [Site(id="nowhere")]
    for number in range(300):
        x, y = rng.uniform(-179, 178), rng.uniform(-79.9, 84.5)  # some lie outside UTM
        shape = shapely.box(x, y, x + rng.uniform(0.001, 0.3), y + rng.uniform(0.001, 0.2))
        if number % 3 == 0:
            shape = shapely.union(
                shape.difference(shape.centroid.buffer(0.0004)),
                shapely.box(x, y + 0.3, x + 0.01, y + 0.31),
            )
        sites.append(Site(id=f"mine_{number}", geometry=shape, margin=float(rng.choice([0, 1000]))))
    sites.append(Site(id="around", geometry=shapely.box(-179.9, 0, 179.9, 1)))
    sites.append(Site(id="large", geometry=shapely.box(9.0, 40.0, 9.1, 52.0)))
    expected = {}
    for site in sites:
        try:
            expected[site.id] = grid_of(site)
        except CatalogError:
            continue
    assert 250 < len(expected) < len(sites) - 3
    assert grids_of(sites) == expected
    assert grids_of([]) == {}
