"""Mapped regions as outlines: the minimum mapping unit, ids through the years, and fewer corners on the same area."""

from __future__ import annotations

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
from rasterio import features
from scipy import ndimage

from minecube.errors import LabelError
from minecube.labels import assign_ids, rasterize, simplify_outlines, vectorize

LEFT, TOP = 399960, 5700000
FOUR = ndimage.generate_binary_structure(2, 1)


def grid_of_size(height, width):
    return GeoBox((height, width), Affine(10, 0, LEFT, 0, -10, TOP), "EPSG:32633")


def footprint_of(masks, first_year=2015):
    masks = np.asarray(masks, np.uint8)
    grid = grid_of_size(*masks.shape[1:])
    years = np.arange(first_year, first_year + len(masks))
    return xr.DataArray(masks, {"year": years, **xr_coords(grid)}, ("year", "y", "x")), grid


def drawn(*years):
    """A footprint from drawings, one a year, rows parted by slashes: # is mine."""
    return footprint_of(
        [[[char == "#" for char in row] for row in year.split("/")] for year in years]
    )


def identified(*years):
    footprint, grid = drawn(*years)
    return assign_ids(vectorize(footprint, grid, "pit"), footprint.year.to_numpy().tolist())


def pixels_of(shape, grid):
    return features.rasterize([shape], out_shape=grid.shape, transform=grid.affine)


def by_year(polygons):
    """Year -> id -> pixels."""
    return {
        year: {
            i: round(shape.area / 100) for i, shape in zip(rows["id"], rows.geometry, strict=True)
        }
        for year, rows in polygons.groupby("year")
    }


def row_of(polygons, year, pit):
    (row,) = polygons[(polygons["year"] == year) & (polygons["id"] == pit)].itertuples()
    return row


# --- ids ----------------------------------------------------------------------------------------------------------------


def test_a_pit_keeps_its_id_as_it_grows_and_another_gets_the_next():
    found = identified("##......", "###....#", "####..##")
    assert by_year(found) == {
        2015: {"pit_1": 2},
        2016: {"pit_1": 3, "pit_2": 1},
        2017: {"pit_1": 4, "pit_2": 2},
    }
    assert found["parent"].isna().all()
    assert found["merged"].isna().all()


def test_a_pit_that_moves_keeps_its_id():
    found = identified("####....", "..####..", "....####")
    assert set(found["id"]) == {"pit_1"}


def test_on_a_split_the_larger_part_keeps_the_id_and_is_the_parent_of_the_others():
    # The smaller part lies to the west, so that its place in the order of rows does not decide.
    found = identified("########", "##.###.#", "##.###.#")
    assert by_year(found)[2016] == {"pit_1": 3, "pit_2": 2, "pit_3": 1}
    assert [row_of(found, 2016, i).parent for i in ("pit_2", "pit_3")] == ["pit_1", "pit_1"]
    assert pd.isna(row_of(found, 2016, "pit_1").parent)
    assert by_year(found)[2017] == by_year(found)[2016]
    assert found[found["year"] == 2017]["parent"].isna().all()


def test_on_a_merge_the_largest_id_survives_and_names_the_others():
    found = identified("#.##.###", "########", "########")
    assert by_year(found)[2015] == {"pit_1": 3, "pit_2": 2, "pit_3": 1}
    assert by_year(found)[2016] == {"pit_1": 8}
    assert row_of(found, 2016, "pit_1").merged == "pit_2,pit_3"
    assert pd.isna(row_of(found, 2017, "pit_1").merged)


def test_an_id_that_has_merged_is_over():
    found = identified("##.###", "######", "##.###")
    assert by_year(found)[2017] == {"pit_1": 3, "pit_3": 2}
    assert row_of(found, 2017, "pit_3").parent == "pit_1"


@pytest.mark.parametrize(("missing", "back_as"), [(1, "pit_1"), (2, "pit_1"), (3, "pit_2")])
def test_a_gap_of_two_years_does_not_lose_the_id_three_do(missing, back_as):
    found = identified("###...", *["......"] * missing, "###...")
    assert by_year(found)[2016 + missing] == {back_as: 3}


def test_one_that_vanished_for_good_leaves_its_number_unused():
    found = identified("###..#", "###...", "###...", "###...", "###...", "###.##")
    assert by_year(found)[2020] == {"pit_1": 3, "pit_3": 2}
    assert pd.isna(row_of(found, 2020, "pit_3").parent)


def test_years_that_nobody_mapped_are_no_gap():
    footprint, grid = drawn("##", "..", "..", "..", "##")
    regions = vectorize(footprint, grid, "pit")
    assert set(assign_ids(regions, [2015, 2019])["id"]) == {"pit_1"}
    assert set(assign_ids(regions, range(2015, 2020))["id"]) == {"pit_1", "pit_2"}
    assert set(assign_ids(regions)["id"]) == {"pit_1"}


def test_a_vanished_pit_of_which_a_neighbour_took_less_than_half_has_not_merged():
    found = identified("####.###", "...#####", "####.###")
    assert by_year(found)[2016] == {"pit_2": 5}
    assert pd.isna(row_of(found, 2016, "pit_2").merged)
    assert by_year(found)[2017] == {"pit_1": 4, "pit_2": 3}


def test_a_pit_that_grows_into_its_neighbour_keeps_its_own_id():
    # The eastern region overlaps pit_1 by three pixels, more than pit_2, whose id it has; the west overlaps pit_1 by four.
    found = identified("########.##", "####.######")
    assert by_year(found) == {2015: {"pit_1": 8, "pit_2": 2}, 2016: {"pit_1": 4, "pit_2": 6}}
    assert found["parent"].isna().all()
    # Of a neighbour that it hardly touches it is not the same pit.
    found = identified("########.####", "####.#####...")
    assert by_year(found)[2016] == {"pit_1": 4, "pit_3": 5}
    assert row_of(found, 2016, "pit_3").parent == "pit_1"
    assert pd.isna(row_of(found, 2016, "pit_3").merged)


def test_sites_are_numbered_on_their_own():
    footprint, grid = drawn("##.#", "##.#")
    both = pd.concat([vectorize(footprint, grid, name) for name in ("b", "a")], ignore_index=True)
    found = assign_ids(both)
    assert set(found["id"]) == {"a_1", "a_2", "b_1", "b_2"}
    assert found["site"].tolist() == both["site"].tolist()


scenes = arrays(
    np.uint8,
    st.tuples(st.integers(1, 5), st.just(6), st.just(7)),
    elements=st.sampled_from([0, 0, 1]),
)


@settings(max_examples=80, deadline=None)
@given(scenes, st.randoms(use_true_random=False))
def test_ids_are_unique_in_a_year_whatever_the_order_and_later_years_change_none(masks, random):
    footprint, grid = footprint_of(masks)
    regions, years = vectorize(footprint, grid, "pit"), footprint.year.to_numpy().tolist()
    found = assign_ids(regions, years)
    assert not found.duplicated(["year", "id"]).any()
    assert found["id"].notna().all()
    order = list(range(len(regions)))
    random.shuffle(order)
    assert (
        assign_ids(regions.iloc[order], years)
        .sort_index()
        .drop(columns="geometry")
        .equals(found.drop(columns="geometry"))
    )
    early = regions[regions["year"] < years[-1]]
    assert assign_ids(early, years[:-1])["id"].tolist() == found.loc[early.index, "id"].tolist()
    over = set()
    for year in years:
        rows = found[found["year"] == year]
        assert not over & set(rows["id"])
        over |= {i for names in rows["merged"].dropna() for i in names.split(",")}
        assert set(rows["parent"].dropna()) <= set(found[found["year"] < year]["id"])
    assert over <= set(found["id"])


@settings(max_examples=80, deadline=None)
@given(arrays(np.uint8, (2, 6, 7), elements=st.sampled_from([0, 1])))
def test_from_one_year_to_the_next_ids_follow_the_overlap_in_pixels(masks):
    footprint, grid = footprint_of(masks)
    found = assign_ids(vectorize(footprint, grid, "pit"), [2015, 2016])
    old, new = (
        {r.id: pixels_of(r.geometry, grid) == 1 for r in rows.itertuples()}
        for rows in (found[found["year"] == 2015], found[found["year"] == 2016])
    )
    overlap = {(n, o): (new[n] & old[o]).sum() for n in new for o in old}
    for row in found[found["year"] == 2016].itertuples():
        most = max((overlap[row.id, o] for o in old), default=0)
        if row.id in old and overlap[row.id, row.id] < most:
            assert 2 * overlap[row.id, row.id] >= old[row.id].sum()
            best = [o for o in old if overlap[row.id, o] == most]
            assert any(o in new and overlap[o, o] >= most for o in best)
        elif row.id in old:
            rivals = [n for n in new if max(overlap[n, o] for o in old) == overlap[n, row.id]]
            assert all(overlap[n, row.id] <= most or n in old for n in rivals)
        elif pd.notna(row.parent):
            assert overlap[row.id, row.parent] == most > 0
            assert row.parent in new
            assert overlap[row.parent, row.parent] >= most
        else:
            assert most == 0
        for gone in [] if pd.isna(row.merged) else row.merged.split(","):
            assert gone not in new
            assert 2 * overlap[row.id, gone] >= old[gone].sum()


def test_no_region_at_all():
    footprint, grid = drawn("...", "...")
    found = simplify_outlines(assign_ids(vectorize(footprint, grid, "pit"), [2015, 2016]), 10)
    assert found.empty
    assert list(found.columns) == ["site", "year", "area_m2", "geometry", "id", "parent", "merged"]


# --- minimum mapping unit -----------------------------------------------------------------------------------------------


def test_small_holes_are_filled_first_then_small_regions_left_out():
    picture = (
        "##########.#/"
        "#........#.#/"
        "#.######.#../"
        "#.#.##.#.#../"
        "#.######.#../"
        "#........#../"
        "##########.#"
    )  # fmt: skip
    footprint, grid = drawn(picture)
    full = vectorize(footprint, grid, "pit")
    assert sorted(round(a / 100) for a in full.area) == [1, 2, 16, 30]
    # 290 m2: holes of one pixel are filled, which makes an island of 18 pixels; specks of one and two pixels go.
    kept = vectorize(footprint, grid, "pit", 290)
    assert sorted(round(a / 100) for a in kept.area) == [18, 30]
    # The ring's hole is 40 pixels: below 4100 m2 it is filled, island and all.
    assert [round(a / 100) for a in vectorize(footprint, grid, "pit", 4100).area] == [70]
    assert vectorize(footprint, grid, "pit", 8000).empty
    with pytest.raises(LabelError, match="0 m2 or more, found -1"):
        vectorize(footprint, grid, "pit", -1)


@settings(max_examples=100, deadline=None)
@given(arrays(np.uint8, (2, 12, 13), elements=st.sampled_from([0, 1, 1])), st.integers(0, 12))
def test_every_pixel_of_a_region_that_is_large_enough_is_in_exactly_one_polygon(masks, least_px):
    footprint, grid = footprint_of(masks)
    kept = vectorize(footprint, grid, "pit", 100 * least_px - 50 if least_px else 0)
    assert kept.is_valid.all()
    for year, mask in zip(footprint.year.to_numpy(), masks, strict=True):
        shapes = kept.geometry[kept["year"] == year]
        # One at a time, so that a pixel in two would count twice.
        times = np.zeros(mask.shape, int)
        for shape in shapes:
            times += pixels_of(shape, grid)
        expected = list(_large_regions(mask == 1, least_px))
        assert len(shapes) == len(expected)
        assert np.array_equal(
            times, np.sum(expected, axis=0, dtype=int) if expected else np.zeros(mask.shape, int)
        )
        assert times.max(initial=0) <= 1


def _large_regions(mine, least_px):
    """The same on pixels: of each region alone, small holes filled, then counted."""
    labelled, regions = ndimage.label(mine, FOUR)
    for n in range(1, regions + 1):
        region = labelled == n
        holes, count = ndimage.label(ndimage.binary_fill_holes(region, FOUR) & ~region, FOUR)
        small = [h for h in range(1, count + 1) if (holes == h).sum() < least_px]
        region = region | np.isin(holes, small)
        if region.sum() >= least_px:
            yield region


# --- fewer corners ------------------------------------------------------------------------------------------------------


def blobs(seed, height=120, width=150, smooth=3.0, share=0.4):
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.normal(size=(height, width)), smooth)
    return (noise > np.quantile(noise, 1 - share)).astype(np.uint8)


def assert_simplified(simple, exact):
    assert simple.is_valid.all()
    assert (simple.geom_type == "Polygon").all()
    assert (np.abs(simple.area / exact.area - 1) <= 0.005).all()
    lonlat = [t.to_crs(3035).area for t in (simple, exact)]
    assert (np.abs(lonlat[0] / lonlat[1] - 1) <= 0.005).all()
    for old, new in zip(exact.geometry, simple.geometry, strict=True):
        assert len(old.interiors) == len(new.interiors)
        assert new.hausdorff_distance(old) <= 20
    for _, rows in simple.groupby("year"):
        shapes = rows.geometry.to_numpy()
        a, b = shapely.STRtree(shapes).query(shapes, predicate="intersects")
        common = shapely.area(shapely.intersection(shapes[a[a < b]], shapes[b[a < b]]))
        assert (common < 1e-6).all()


@pytest.mark.parametrize("smooth", [0.8, 1.5, 3.0, 8.0])
def test_simplified_outlines_keep_area_holes_and_distance_from_each_other(smooth):
    masks = [blobs(seed, smooth=smooth) for seed in range(3)]
    footprint, grid = footprint_of(masks)
    exact = vectorize(footprint, grid, "pit")
    assert any(len(p.interiors) for p in exact.geometry) == (smooth < 8)
    simple = simplify_outlines(exact, 10)
    assert_simplified(simple, exact)
    assert simple.drop(columns="geometry").equals(exact.drop(columns="geometry"))
    corners = [shapely.get_num_coordinates(t.geometry.to_numpy()).sum() for t in (simple, exact)]
    assert corners[0] < corners[1] * (0.25 if smooth == 8 else 1)


@settings(max_examples=100, deadline=None)
@given(arrays(np.uint8, (2, 9, 10), elements=st.sampled_from([0, 1, 1])))
def test_any_mask_is_simplified_within_the_rules(masks):
    footprint, grid = footprint_of(np.kron(masks, np.ones((1, 3, 3), np.uint8)))
    exact = vectorize(footprint, grid, "pit")
    assert_simplified(simplify_outlines(exact, 10), exact)


def test_a_disc_has_a_tenth_of_its_corners_and_its_place():
    y, x = np.mgrid[:300, :300]
    footprint, grid = footprint_of([np.hypot(y - 150, x - 150) < 120])
    exact = vectorize(footprint, grid, "pit")
    simple = simplify_outlines(exact, 10)
    corners = [shapely.get_num_coordinates(t.geometry[0]) for t in (simple, exact)]
    assert corners[0] < corners[1] / 10
    assert simple.geometry[0].centroid.distance(exact.geometry[0].centroid) < 1
    both = rasterize(simple, grid, [2015]).values[0], footprint.values[0]
    assert (both[0] & both[1]).sum() / (both[0] | both[1]).sum() > 0.99


def test_an_island_in_a_hole_stays_inside_it():
    y, x = np.mgrid[:120, :120]
    away = np.hypot(y - 60, x - 60)
    footprint, grid = footprint_of([(away < 50) & (away > 22) | (away < 20)])
    exact = vectorize(footprint, grid, "pit")
    assert len(exact) == 2
    simple = simplify_outlines(exact, 10)
    assert_simplified(simple, exact)
    assert simple.geometry[0].disjoint(simple.geometry[1])


def test_a_single_pixel_stays_a_pixel():
    footprint, grid = drawn("#..#")
    exact = vectorize(footprint, grid, "pit")
    assert simplify_outlines(exact, 10).geometry.geom_equals(exact.geometry).all()
