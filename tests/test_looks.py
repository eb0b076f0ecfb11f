"""Looks at scenes read few bytes, and each of their pixels is the one that plain numpy takes from the file."""

from __future__ import annotations

import dataclasses
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox
from pyproj import Transformer
from rasterio.enums import Resampling

from known_scenes import grid_at, serve, write_tif
from minecube.catalog import Registration, load_recipes
from minecube.composite import plan
from minecube.composite.registration import measure_shifts
from minecube.grid import CELL_PX, WINDOW_PX, TileEdges, add_windows, choose_windows
from minecube.reader import HEAD_BYTES, Ledger, find_common_tiles, wait_for
from minecube.scenes.looks import read_look
from minecube.scenes.offsets import check_offsets

LEFT, TOP = 360000, 5600040
VEGETATION = 4
BANDS = ("B02", "B04", "B12")


def start_of(window: GeoBox, grid: GeoBox) -> tuple[int, int]:
    """Row and column in a grid at which a window begins."""
    column, row = ~grid.transform * (window.transform * (0, 0))
    assert (row, column) == (round(row), round(column))
    return round(row), round(column)


@given(
    side=st.integers(1, 1500).map(lambda n: 6 * n),
    edge=st.integers(-400, 0).map(lambda n: 6 * n),
    tile=st.sampled_from([64, 512, 1024, 10980]),
    cell=st.sampled_from([CELL_PX, 100_000]),
)
def test_windows_against_brute_force(side, edge, tile, cell):
    """Rows move to the nearest place in a tile, tried one by one, and so do columns."""
    grid = grid_at(LEFT, TOP, side, side)
    tiles = TileEdges(edge, edge + 100 * tile, tile)
    windows = choose_windows(grid, [(tiles, tiles)], cell)
    unmoved = choose_windows(grid, (), cell)
    per_side = max(side // cell, 1)
    assert len(windows) == len(unmoved) == per_side**2
    for n, (window, middle) in enumerate(zip(windows, unmoved, strict=True)):
        assert window.shape == (min(side, WINDOW_PX),) * 2
        starts = start_of(middle, grid)
        assert all(start % 6 == 0 for start in starts)  # 60 m
        for start, k in zip(starts, divmod(n, per_side), strict=True):
            assert abs(start + min(side, WINDOW_PX) / 2 - side * (k + 0.5) / per_side) <= 6
        places = range(0, side - WINDOW_PX + 1, 2)  # 20 m
        fits = [p for p in places if (p - edge) // tile == (p + WINDOW_PX - 1 - edge) // tile]
        for moved, start in zip(start_of(window, grid), starts, strict=True):
            if not fits:
                assert moved == start
            else:
                assert moved in fits
                assert abs(moved - start) == min(abs(p - start) for p in fits)
    if side >= 2 * (WINDOW_PX + 2) and tile >= WINDOW_PX + 2:
        assert fits  # as a plan expects


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ((-6000, 5000), 482),  # covers all
        ((500, 5000), 482),  # covers more of the new window
        ((-6000, 700), 252),  # would cover less of it
        ((-6000, 100), 482),  # covers none of either
    ],
)
def test_a_window_does_not_leave_a_file(other, expected):
    """Of 1020 pixels, with tiles from -30 on: the middle at 252 moves to the tile from 482 on, or stays."""
    grid = grid_at(LEFT, TOP, 1020, 1020)
    most = TileEdges(-30, 5000, 512)
    ((window),) = choose_windows(grid, [(most, most), (most, TileEdges(*other, 512))])
    assert start_of(window, grid) == (482, expected)


def lonlat_of(grid, columns, rows=slice(0, None)):
    """Footprint of a part of a grid."""
    return grid[rows, columns].extent.to_crs("EPSG:4326").geom


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ([slice(0, 2000)], []),  # whole
        ([slice(0, 1300), slice(1300, 2000)], [1392]),  # 1300 + 350 - 255, in steps of 6
        ([slice(0, 1300), slice(1000, 2000)], [1242]),  # the middle has none: it ends at 996 + 254
        ([slice(0, 1300), slice(900, 2000)], []),  # the middle has 354 of 510 columns
        ([slice(1300, 2000), slice(1310, 2000), slice(1250, 2000)], [1398]),  # one for all
        ([slice(1300, 2000), slice(0, 400)], [0, 1392]),
        ([slice(1990, 2000)], []),  # 0.6 square kilometres, which a footprint may be wrong by
    ],
)
def test_scenes_outside_the_windows_have_their_own(columns, expected):
    """Of a site of 2000 x 600 pixels, whose window begins at column 744 and row 42."""
    grid = grid_at(LEFT, TOP, 2000, 600)
    windows = choose_windows(grid)
    assert [start_of(window, grid) for window in windows] == [(42, 744)]
    further = add_windows(windows, grid, [lonlat_of(grid, part) for part in columns])
    assert all(window.shape == (510, 510) for window in further)
    found = sorted(start_of(window, grid) for window in further)
    assert len(found) == len(expected)
    for (row, column), start in zip(found, expected, strict=True):
        assert row in (36, 42)
        assert abs(column - start) <= 6


def test_a_further_window_lies_in_a_tile_of_its_own_file():
    """The second file has tiles of 540 from column 1304 on: its window moves from 1392 to 1334."""
    grid = grid_at(LEFT, TOP, 2000, 1200)
    rows = TileEdges(0, 1200, 600)
    first, second = (rows, TileEdges(0, 1302, 600)), (rows, TileEdges(1304, 2000, 540))
    shapes = [lonlat_of(grid, slice(1304, 2000))]
    windows = choose_windows(grid)
    ((row, column),) = (start_of(w, grid) for w in add_windows(windows, grid, shapes))
    assert column < 1304 + 540 < column + 510
    assert row < 600 < row + 510
    (moved,) = add_windows(windows, grid, shapes, [first, second])
    assert start_of(moved, grid) == (90, 1304 + 540 - 510)
    # A window does not move to where it has less of its scene, which here begins at row 180.
    shapes = [lonlat_of(grid, slice(1304, 2000), slice(180, 700))]
    (kept,) = add_windows(windows, grid, shapes, [first, second])
    assert 174 <= start_of(kept, grid)[0] <= 186


def test_wrong_offsets_of_scenes_beyond_the_middle_are_found(archive):
    """The east of the site lies in another Sentinel-2 tile, and two of its scenes carry 1000 more."""
    where = grid_at(LEFT, TOP, 2000, 600)
    rng = np.random.default_rng(0)
    archive.bands = BANDS
    fields = {b: np.kron(rng.integers(300, 2500, (60, 200)), np.ones((10, 10), int)) for b in BANDS}
    fields["B12"] = fields["B12"][::2, ::2]
    listed = []
    for day in range(1, 9):
        for tile, columns in (("33UUR", slice(0, 1300)), ("33UVR", slice(1300, 2000))):
            wrong = 1000 * (tile == "33UVR" and day in (3, 5))
            pixels = {}
            for band, field in fields.items():
                half = 2 if band == "B12" else 1
                part = field[:, columns.start // half : columns.stop // half]
                pixels[band] = part + rng.integers(-30, 30) + wrong
            when = f"2022-07-{day:02d}T10:00:00"
            flags = {"baseline": "04.00", "earthsearch:boa_offset_applied": True}
            listed.append(
                archive.scene(when, where[:, columns], pixels, VEGETATION, tile=tile, **flags)
            )
    checks = check_offsets(listed, read_look(listed, where))
    assert all(check.step is not None for check in checks)
    found = [(s.properties["s2:mgrs_tile"], s.datetime.day) for s in listed]
    wrong = [place for place, check in zip(found, checks, strict=True) if check.conflict]
    assert wrong == [("33UVR", 3), ("33UVR", 5)]


def test_displaced_scenes_beyond_the_middle_are_found(archive):
    where = grid_at(LEFT, TOP, 2000, 600)
    rng = np.random.default_rng(5)
    fields = np.kron(rng.integers(2000, 6000, (30, 100)), np.ones((20, 20), int))
    archive.bands = ("B04",)
    listed, made = [], []
    for day, right in ((1, 0), (2, 0), (3, 0), (4, 2)):
        for tile, columns in (("33UUR", slice(0, 1300)), ("33UVR", slice(1300, 2000))):
            shift = right if tile == "33UVR" else 0
            seen = np.roll(fields, shift, 1) + rng.integers(0, 90, fields.shape)
            when = f"2020-07-{day:02d}T10:00:00"
            pixels = {"B04": seen[:, columns]}
            listed.append(archive.scene(when, where[:, columns], pixels, VEGETATION, tile=tile))
            made.append(10 * shift)
    ledger = Ledger()
    shifts = measure_shifts(listed, where, ledger)
    assert [shift.dx_m for shift in shifts] == pytest.approx(made, abs=1)
    recipe = dataclasses.replace(load_recipes()["naive-median"], bands=("B04",))
    recipe = dataclasses.replace(recipe, registration=Registration())
    own = ledger.totals()["planned"]
    looks = Ledger()
    read_look(listed, where, looks)
    planned = plan.estimate(listed, where, recipe).checks
    assert own + looks.totals()["planned"] <= planned == 8 * (2 * 4 + 2)


def test_looks_read_few_scenes_at_a_time():
    """Of 200 reads, no more are begun than 20 beyond those that were waited for."""
    begun = []

    def start():
        for n in range(200):
            begun.append(n)
            read = Future()
            read.set_result(n)
            yield read

    for n, pixels in enumerate(wait_for(start(), 20)):
        assert pixels == n
        assert len(begun) == min(n + 21, 200)
    assert len(begun) == 200


def land(archive, where, days=(1,), scl=VEGETATION, tile="33UUR", seed=0, **properties):
    """Scenes of random ground in three bands."""
    rng = np.random.default_rng(seed)
    archive.bands = BANDS
    height, width = where.shape
    return [
        archive.scene(
            f"2020-07-{day:02d}T10:00:00",
            where,
            {
                "B02": rng.integers(1, 9000, (height, width)),
                "B04": rng.integers(1, 9000, (height, width)),
                "B12": rng.integers(1, 9000, (height // 2, width // 2)),
            },
            scl,
            tile=tile,
            **properties,
        )
        for day in days
    ]


def read_whole(scene, band):
    """All pixels of a file, by rasterio."""
    with rasterio.open(scene.assets[band].href) as image:
        return image.read(1).astype(float)


def mean_of_four(pixels):
    return (pixels[::2, ::2] + pixels[1::2, ::2] + pixels[::2, 1::2] + pixels[1::2, 1::2]) / 4


def test_small_place_is_seen_whole(archive):
    """Means of 2 x 2 pixels of 10 m, pixels of 20 m and classes as they are; none where one pixel is missing."""
    where = grid_at(LEFT, TOP, 400, 300)
    classes = np.random.default_rng(1).choice([0, 1, 3, 4, 9], (150, 200))
    listed = land(archive, where, (1, 6), classes)
    path = Path(listed[1].assets["B02"].href)
    pixels = read_whole(listed[1], "B02").astype(np.uint16)
    pixels[51, 70] = 0
    pixels[60, 80] = 40000  # a defect
    write_tif(path, pixels, where)
    look = read_look(listed, where)
    assert look.bands == BANDS
    np.testing.assert_array_equal(look.scl, np.tile(classes.ravel(), (2, 1)))
    is_seen = ~np.isin(classes, (0, 1))
    expected = np.stack(
        [
            [
                mean_of_four(read_whole(s, "B02")),
                mean_of_four(read_whole(s, "B04")),
                read_whole(s, "B12"),
            ]
            for s in listed
        ]
    )
    expected = np.where(is_seen, expected, np.nan)
    expected[1, :, 25, 35] = expected[1, :, 30, 40] = np.nan
    np.testing.assert_array_equal(look.stored, expected.reshape(2, 3, -1).astype(np.float32))


def test_large_place_is_seen_in_windows_of_every_few_pixels(archive):
    """Two windows side by side, 130,050 pixels of 20 m: every fourth in the order of rows."""
    where = grid_at(LEFT, TOP, 3000, 600)
    (scene,) = land(archive, where)
    look = read_look([scene], where)
    assert look.middle == {}
    windows = choose_windows(where, find_common_tiles([scene], "B02", where, None), CELL_PX)
    assert len(windows) == 2
    expected = []
    for window in windows:
        row, column = start_of(window, where)
        for n, band in enumerate(BANDS):
            pixels = read_whole(scene, band)
            if band != "B12":
                pixels = mean_of_four(pixels)
            inside = pixels[row // 2 :, column // 2 :][:255, :255]
            expected.append((n, inside.reshape(-1)[::4]))
    for n in range(3):
        found = np.concatenate([pixels for band, pixels in expected if band == n])
        np.testing.assert_array_equal(look.stored[0, n], found.astype(np.float32))


@pytest.mark.parametrize("band", BANDS)
def test_overviews_are_not_read(archive, band):
    """They may be made by any method, and here they are of other pixels."""
    where = grid_at(LEFT, TOP, 800, 800)
    (scene,) = land(archive, where)
    expected = read_look([scene], where)
    with rasterio.open(scene.assets[band].href, "r+") as image:
        pixels = image.read(1)
        image.write(np.full_like(pixels, 20000), 1)
        image.build_overviews([2, 4, 8, 16], Resampling.average)
        image.write(pixels, 1)
    np.testing.assert_array_equal(read_look([scene], where).stored, expected.stored)


def test_scenes_of_the_neighbouring_zone(archive):
    """Ground that rises evenly to the east is seen at the same places in both zones."""
    where = grid_at(LEFT, TOP, 1080, 1080)
    x, y = Transformer.from_crs(32633, 32632, always_xy=True).transform(LEFT + 5400, TOP - 5400)
    there = grid_at(round(x / 60) * 60 - 7200, round(y / 60) * 60 + 7200, 1440, 1440, 32632)
    archive.bands = BANDS
    listed = []
    for grid, tile in ((where, "33UUR"), (there, "32UUR")):
        pixels = {}
        for band in BANDS:
            on = grid.zoom_out(archive.resolution[band] / 10)
            eastings, northings = np.meshgrid(
                on.coordinates["x"].values, on.coordinates["y"].values
            )
            back = Transformer.from_crs(grid.crs.epsg, 32633, always_xy=True)
            east, north = back.transform(eastings, northings)
            pixels[band] = np.clip((east - LEFT) / 5 + (TOP - north) / 5 + 2000, 1, 30000).round()
        listed.append(archive.scene("2020-07-01T10:00:00", grid, pixels, VEGETATION, tile=tile))
    look = read_look(listed, where)
    assert np.isfinite(look.stored).all()
    assert (
        abs(look.stored[0] - look.stored[1]).max() <= 2
    )  # 10 m: a step of a pixel would be 2 or 4


def rewrite_in_tiles(scene, where, side):
    """Write the files again, uncompressed, in tiles of this side: bytes are pixels times two, or one."""
    for band, asset in scene.assets.items():
        pixels = np.ones((where.shape[0] // 2, where.shape[1] // 2), np.uint8)
        if band != "SCL":
            pixels = read_whole(scene, band).astype(np.uint16)
        on = where.zoom_out(where.shape[0] / pixels.shape[0])
        options = {"blockxsize": side, "blockysize": side, "compress": None}
        write_tif(Path(asset.href), pixels, on, **options)


def test_bytes_of_a_site_of_41_km(archive):
    """Four windows, each one tile of each file: 7.3 MB and 16 requests, of 106 MB in the files; headers apart."""
    where = grid_at(LEFT, TOP, 4104, 4104)
    (scene,) = land(archive, where)
    rewrite_in_tiles(scene, where, 512)
    ledger = Ledger()
    with serve(archive.root) as url:
        for asset in scene.assets.values():
            asset.href = asset.href.replace(str(archive.root), url)
        look = read_look([scene], where, ledger)
    totals = ledger.totals()
    assert totals["planned"] == totals["read"] == 16
    assert totals["requests"] == 16 + 4
    assert totals["bytes"] == 4 * 512**2 * (2 + 2 + 2 + 1) + 4 * HEAD_BYTES
    assert look.stored.shape[-1] == 4 * -(-(255**2) // 7)


def test_tiles_are_those_of_gdal(archive):
    where = grid_at(LEFT, TOP, 800, 700)
    (scene,) = land(archive, where)
    ledger = Ledger()
    ((rows, columns),) = find_common_tiles([scene], "B12", where, ledger)
    with rasterio.open(scene.assets["B12"].href) as image:
        for (row, column), window in image.block_windows(1):
            left, top = image.window_transform(window) * (0, 0)
            assert TOP - 10 * (rows.start + row * rows.step) == top
            assert LEFT + 10 * (columns.start + column * columns.step) == left
        assert LEFT + 10 * columns.stop == image.bounds.right
        assert TOP - 10 * rows.stop == image.bounds.bottom
    assert ledger.totals()["planned"] == 0  # a header is no read
    assert find_common_tiles([scene], "B12", where[:510, :510], None) == []  # no need


def test_without_common_tiles_windows_stay_in_the_middle(archive):
    where = grid_at(LEFT, TOP, 800, 800)
    (scene,) = land(archive, where)
    (other,) = land(archive, where, (2,), tile="33UVR")
    assert len(find_common_tiles([scene, other], "B04", where, None)) == 2
    elsewhere = GeoBox(where.shape, where.transform, "EPSG:32634")
    assert find_common_tiles([scene, other], "B04", elsewhere, None) == []
    Path(scene.assets["B04"].href).unlink()
    assert find_common_tiles([scene], "B04", where, None) == []
    Path(scene.assets["B02"].href).write_bytes(b"II*\0 and nothing else")
    assert find_common_tiles([scene], "B02", where, None) == []
    with rasterio.open(other.assets["B04"].href, "r+") as image:
        assert find_common_tiles([other], "B04", where, None) != []
        image.crs = rasterio.CRS.from_wkt('LOCAL_CS["somewhere", UNIT["metre", 1]]')
    assert find_common_tiles([other], "B04", where, None) == []


@pytest.mark.parametrize("flag", ["True", "False"])
def test_registration_uses_the_pixels_of_a_look(archive, flag):
    """It reads nothing more and measures the same, with an offset or without."""
    where = grid_at(LEFT, TOP, 1080, 1080)
    rng = np.random.default_rng(5)
    fields = np.kron(rng.integers(2000, 6000, (60, 60)), np.ones((20, 20), int))
    archive.bands = BANDS
    listed = []
    for day, (down, right) in ((1, (0, 0)), (2, (0, 2)), (3, (0, 0)), (4, (1, 0))):
        seen = np.roll(fields, (down, right), (0, 1))[:1080, :1080] + rng.integers(
            0, 90, (1080, 1080)
        )
        pixels = {"B02": 700, "B04": seen, "B12": 900}
        when = f"2022-07-{day:02d}T10:00:00"
        applied = {"earthsearch:boa_offset_applied": flag == "True"}
        listed.append(archive.scene(when, where, pixels, VEGETATION, baseline="04.00", **applied))
    assert {s.properties["minecube:offset"] for s in listed} == {0 if flag == "True" else -1000}
    look = read_look(listed, where)
    ledger = Ledger()
    shifts = measure_shifts(listed, where, ledger, look.middle)
    assert ledger.totals()["planned"] == 0
    assert shifts == measure_shifts(listed, where)
    assert shifts[1].dx_m == pytest.approx(20, abs=1)
    assert shifts[3].dy_m == pytest.approx(-10, abs=1)


def test_turned_files_have_no_tiles(archive):
    """Rows of pixels that go north or east, as a header may say: windows stay where they are."""
    listed = archive.scene(
        "2020-06-01T10:00:00", grid_at(LEFT, TOP, 600, 600), {"B04": 1, "B11": 1}
    )
    grid = grid_at(LEFT, TOP, 600, 600)
    assert find_common_tiles([listed], "B04", grid, None)
    for turned in (Affine(10, 0, LEFT, 0, 10, TOP - 6000), Affine(0, 10, LEFT, -10, 0, TOP)):
        with rasterio.open(listed.assets["B04"].href, "r+") as image:
            image.transform = turned
        assert find_common_tiles([listed], "B04", grid, None) == []
