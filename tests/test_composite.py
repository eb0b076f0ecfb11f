"""A year's composite equals brute force and another library, whatever its blocks."""

from __future__ import annotations

import dataclasses
import tracemalloc
from datetime import timedelta

import numpy as np
import odc.stac
import pytest

from known_composites import LEFT, MASKED, PLAIN, TOP
from known_scenes import grid_at, unique_pixels
from minecube import scenes
from minecube.catalog import BANDS, NATIVE_M, BrightOverride, HazeTest, MaskRule, load_recipes
from minecube.composite import bands, composite
from minecube.composite.needs import count_ahead, estimate_memory
from minecube.errors import ReadError
from minecube.grid import coarsen, grid_of
from minecube.reader import Ledger, find_tile_rows


def days_by_brute_force(listed, grid, files):
    """SCL [day, y, x] and the scene [day, y, x] that each pixel of 20 m comes from, -1 = none."""
    n20 = (grid.shape[0] // 2, grid.shape[1] // 2)
    days = sorted({s.properties["minecube:solar_day"] for s in listed})
    day_scl, owner = np.zeros((len(days), *n20), int), np.full((len(days), *n20), -1)
    for i, scene in enumerate(listed):  # in order of preference
        scl, where = files[scene.id]["SCL"], files[scene.id]["grid"]
        d = days.index(scene.properties["minecube:solar_day"])
        top, left = (
            round((where.transform.f - grid.transform.f) / -20),
            round((where.transform.c - grid.transform.c) / 20),
        )
        for r in range(n20[0]):
            for c in range(n20[1]):
                y, x = r - top, c - left
                around = [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
                # The outermost pixel of the coverage is not trusted.
                inside = all(
                    0 <= a < scl.shape[0] and 0 <= b < scl.shape[1] and scl[a, b] != 0
                    for a, b in around
                )
                if inside and owner[d, r, c] < 0:
                    owner[d, r, c], day_scl[d, r, c] = i, scl[y, x]
    return day_scl, owner


def hidden_by_brute_force(day_scl, recipe):
    """The pixels within reach of the recipe's classes, bool [day, y, x]."""
    height, width = day_scl.shape[1:]
    hidden = np.zeros(day_scl.shape, bool)
    for rule in recipe.mask:
        for d, r, c in zip(*np.nonzero(np.isin(day_scl, rule.classes)), strict=True):
            reach = rule.dilate_m // 20
            for dy in range(-reach, reach + 1):
                for dx in range(-reach, reach + 1):
                    near = (dy * 20) ** 2 + (dx * 20) ** 2 <= rule.dilate_m**2
                    if near and 0 <= r + dy < height and 0 <= c + dx < width:
                        hidden[d, r + dy, c + dx] = True
    return hidden


def by_brute_force(listed, grid, recipe, files):
    """The year pixel by pixel, in plain numpy on the arrays that were written; no mask but the recipe's dilated classes."""
    day_scl, owner = days_by_brute_force(listed, grid, files)
    hidden = hidden_by_brute_force(day_scl, recipe)
    out = np.zeros((len(recipe.bands), *grid.shape))
    count = np.zeros(grid.shape)
    for r in range(grid.shape[0]):
        for c in range(grid.shape[1]):
            x, y = grid.transform.c + 10 * c + 5, grid.transform.f - 10 * r - 5
            values = []
            for d in range(len(owner)):
                i = owner[d, r // 2, c // 2]
                if i >= 0 and not hidden[d, r // 2, c // 2]:
                    content = files[listed[i].id]
                    where = content["grid"].transform
                    row, column = (where.f - y) / 10, (x - where.c) / 10
                    offset = listed[i].properties["minecube:offset"]
                    b04 = int(content["B04"][int(row), int(column)])
                    b11 = int(content["B11"][int(row / 2), int(column / 2)])
                    values.append([max(v + offset, 1) for v in (b04, b11)])
            if values:
                out[:, r, c] = np.rint(np.median(values, axis=0))
                count[r, c] = len(values)
    return out, count


def year_of_scenes(archive, rng, bright=False):
    """Six days: two tiles overlapping, a split datatake, offsets of both kinds, ragged swath edges, cloud."""
    listed, files = [], {}

    def add(when, where, **kwargs):
        h, w = where.shape
        scl = rng.choice([4, 5], (h // 2, w // 2)).astype(np.uint8)
        y, x = rng.integers(0, h // 2 - 4), rng.integers(0, w // 2 - 4)
        scl[y : y + 4, x : x + 4] = rng.choice([3, 8, 9, 11])
        if bright:  # ground at a fixed place that is called cloud each time, in a ragged shape
            row, column = (
                round(v) for v in ((where.transform.f - TOP) / 20, (LEFT - where.transform.c) / 20)
            )
            for k in range(14):
                scl[
                    max(row + 8 + k, 0) : row + 9 + k,
                    max(column + 8 - k % 3, 0) : column + 20 + k % 5,
                ] = 9
        scl[: rng.integers(0, 6)] = 0
        pixels = {
            "B04": rng.integers(1, 4000, (h, w)),
            "B11": rng.integers(1, 4000, (h // 2, w // 2)),
        }
        listed.append(archive.scene(when, where, pixels, scl, **kwargs))
        files[listed[-1].id] = {**pixels, "SCL": scl, "grid": where}

    for day in (1, 4, 7, 9):
        add(f"2020-06-0{day}T10:00:00", grid_at(LEFT - 200, TOP + 200, 64, 100))
        add(f"2020-06-0{day}T10:00:05", grid_at(LEFT + 200, TOP + 200, 90, 100), tile="33UVR")
    add("2020-07-01T10:00:00", grid_at(LEFT - 200, TOP + 200, 120, 100), baseline="05.00")
    add(
        "2020-07-06T10:00:00",
        grid_at(LEFT - 200, TOP + 200, 120, 60),
        start="20200706T100001",
        baseline="04.00",
    )
    add(
        "2020-07-06T10:00:00",
        grid_at(LEFT - 200, TOP - 200, 120, 60),
        start="20200706T100025",
        baseline="04.00",
    )
    return listed, files


@pytest.mark.parametrize("in_strips", [False, True])
def test_against_brute_force(archive, monkeypatch, in_strips):
    """In strips, B04 is cut at row 44: its files have tiles of 64 px, and begin 20 px north of the grid."""
    grid = grid_at(LEFT, TOP, 72, 66)
    if in_strips:
        monkeypatch.setattr(bands, "LEAST_CUT_PX", 0)
        monkeypatch.setattr(bands, "_LEAST_ROWS", 4)
    ledger = Ledger()
    recipe = dataclasses.replace(
        MASKED, mask=tuple(dataclasses.replace(r, open_m=0) for r in MASKED.mask)
    )
    listed, files = year_of_scenes(archive, np.random.default_rng(1))
    # Clouds beside the grid reach into it.
    expected, count = by_brute_force(listed, grid.pad(6), recipe, files)
    expected, count = expected[:, 6:-6, 6:-6], count[6:-6, 6:-6]
    made = composite(listed, grid, recipe, ledger).compute()
    np.testing.assert_array_equal(made.clear_count, count)
    reads = ledger.table().groupby("band").read.sum()
    assert (reads["B04"] > reads["B11"]) == in_strips
    clear = count > 0
    np.testing.assert_array_equal(made.reflectance.values[:, clear], expected[:, clear])
    assert set(np.unique(made.quality.values[clear])) == {1}
    assert clear.mean() > 0.5


def test_rows_where_tiles_begin(archive):
    """Tiles of 64 px: counted by hand from the file's upper edge, in pixels of the grid."""
    file_grid = grid_at(LEFT, TOP + 200, 200, 300)
    scene = archive.scene("2020-06-01T10:00:00", file_grid, {"B04": 1, "B11": 1})
    grid = grid_at(LEFT, TOP, 60, 240)
    assert find_tile_rows(scene, "B04", grid) == [44, 108, 172, 236]
    assert find_tile_rows(scene, "B11", coarsen(grid, 20)) == [54, 118]
    assert find_tile_rows(scene, "B11", grid) == [108, 236]
    above = grid_at(LEFT, TOP + 840, 60, 100)
    assert find_tile_rows(scene, "B04", above) == [64]
    assert find_tile_rows(scene, "B04", grid_at(LEFT, TOP, 60, 240, epsg=32632)) == []
    scene.assets["B04"].href += ".gone"
    assert find_tile_rows(scene, "B04", grid) == []


def test_neither_the_order_of_scenes_nor_the_cut_into_blocks_matters(archive):
    grid = grid_at(LEFT, TOP, 72, 66)
    recipe = dataclasses.replace(MASKED, bright_override=BrightOverride(window_m=120))
    listed, _ = year_of_scenes(archive, np.random.default_rng(2), bright=True)
    whole = composite(
        listed, grid, dataclasses.replace(recipe, block_px=128, chunk_px=128)
    ).compute()
    plain = composite(listed, grid, dataclasses.replace(recipe, bright_override=None)).compute()
    assert (whole.clear_count > plain.clear_count).any()  # so the override has something to do
    for side in (16, 24, 40):
        order = np.random.default_rng(side).permutation(len(listed))
        made = composite(
            [listed[i] for i in order], grid, dataclasses.replace(recipe, block_px=side, chunk_px=8)
        ).compute()
        for name in whole.data_vars:
            np.testing.assert_array_equal(
                made[name], whole[name], err_msg=f"{name}, blocks of {side}"
            )


def test_dark_pixels_do_not_wrap_and_nodata_is_not_an_observation(archive):
    grid, where = grid_at(LEFT, TOP, 60, 60), grid_at(LEFT - 600, TOP + 600, 180, 180)
    holed = np.full((180, 180), 950, np.uint16)
    holed[100:120] = 0
    listed = [
        archive.scene("2022-06-01T10:00:00", where, {"B04": holed, "B11": 1300}, baseline="04.00")
    ]
    made = composite(listed, grid, PLAIN).compute()
    rows = slice(100 - 60, 120 - 60)
    seen = np.ones(60, bool)
    seen[rows] = False
    assert np.unique(made.reflectance.sel(band="B04")[seen]) == [1]
    assert np.unique(made.reflectance.sel(band="B11")[seen]) == [300]
    # All bands or none, and no false zero counted.
    for name in ("reflectance", "clear_count", "quality"):
        assert not made[name].values[..., rows, :].any()


def test_the_neighbouring_zone_lands_where_gdal_puts_it(archive):
    """Our mosaic of a warped scene against odc-stac's loading of the same item."""
    grid = grid_at(LEFT, TOP, 120, 90)
    y, x = np.mgrid[:400, :400]
    pixels = {
        "B04": (2000 + 5 * x + 3 * y).astype(np.uint16),
        "B11": (1000 + 4 * x + 2 * y)[::2, ::2].astype(np.uint16),
    }
    item = archive.item(
        "2020-06-01T10:00:00", grid_at(784000, 5607000, 400, 400, 32632), pixels, tile="32UQB"
    )
    made = composite([scenes.normalise(item, archive.source)], grid, PLAIN).compute()
    theirs = odc.stac.load(
        [item], bands=["B04", "B11"], geobox=grid, resampling="bilinear", dtype="uint16", nodata=0
    )
    assert (made.clear_count == 1).all()
    off = np.abs(made.reflectance.sel(band="B04").astype(int) - theirs.B04[0].astype(int))
    assert off.max() <= 2
    # 20 m bands are kept at 20 m and repeated: within a pixel's gradient of interpolating at 10 m.
    assert (
        np.abs(made.reflectance.sel(band="B11").astype(int) - theirs.B11[0].astype(int)).max() <= 6
    )


def test_scenes_of_the_grids_own_zone_come_first(archive):
    """A warped pixel is only taken where no unresampled one is, though its scene came first."""
    grid = grid_at(LEFT, TOP, 60, 60)
    neighbour = archive.scene(
        "2020-06-01T10:00:00",
        grid_at(784000, 5607000, 400, 400, 32632),
        {"B04": 5000, "B11": 5000},
        tile="32UQB",
    )
    own = archive.scene(
        "2020-06-01T10:00:14", grid_at(LEFT - 600, TOP + 600, 90, 180), {"B04": 2000, "B11": 2000}
    )
    made = composite([neighbour, own], grid, PLAIN).compute()
    values = made.reflectance.sel(band="B04").values
    # The own scene ends 300 m into the grid, and its last 20 m pixel is not trusted.
    assert np.unique(values[:, :28]) == [2000]
    assert np.unique(values[:, 28:]) == [5000]


def test_20_m_pixels_are_repeated_not_shifted(archive):
    grid, where = grid_at(LEFT, TOP, 64, 48), grid_at(LEFT - 300, TOP + 300, 140, 120)
    b11 = unique_pixels(60, 70)
    made = composite(
        [archive.scene("2020-06-01T10:00:00", where, {"B04": 7, "B11": b11})], grid, PLAIN
    ).compute()
    expected = b11[15 : 15 + 24, 15 : 15 + 32].repeat(2, axis=0).repeat(2, axis=1)
    np.testing.assert_array_equal(made.reflectance.sel(band="B11"), expected)


def test_it_is_lazy_and_its_graph_grows_with_blocks_not_with_scenes(archive):
    grid = grid_at(LEFT, TOP, 72, 66)
    listed, _ = year_of_scenes(archive, np.random.default_rng(1))
    for scene in listed:
        for asset in scene.assets.values():
            asset.href = "/nowhere.tif"
    few, many = composite(listed[:2], grid, PLAIN), composite(listed, grid, PLAIN)
    assert len(few.reflectance.__dask_graph__()) == len(many.reflectance.__dask_graph__())
    assert many.reflectance.chunks == ((2,), (64, 2), (64, 8))
    with pytest.raises(ReadError, match="nowhere"):
        many.compute()


def test_a_scene_without_a_band_is_named(archive):
    scene = archive.scene("2020-06-01T10:00:00", grid_at(LEFT, TOP, 60, 60), {"B04": 1, "B11": 1})
    with pytest.raises(ReadError, match=rf"{scene.id}: has no B08, which recipe 'plain' needs"):
        composite(
            [scene],
            grid_at(LEFT, TOP, 60, 60),
            dataclasses.replace(PLAIN, bands=("B04", "B08", "B11")),
        )


def test_the_site_grid_is_the_cubes(site):
    grid = grid_of(site)
    assert grid.shape == (180, 240)
    assert tuple(grid.boundingbox) == (LEFT, TOP - 1800, LEFT + 2400, TOP)


def scenes_under_a_veil(archive, rng, sizes):
    """Seven days of one or two tiles with clouds, in all bands at these pixel sizes; a veil over all of the fourth."""
    ten, listed = dataclasses.replace(archive, bands=BANDS, resolution={**sizes, "SCL": 20}), []
    for n in range(7):
        for left in (-1200, 480) if n % 2 else (-1200,):
            where = grid_at(LEFT + left, TOP + 1200, 300 if n % 2 else 400, 400)
            height, width = where.shape
            scl = np.full((height // 2, width // 2), 4, np.uint8)
            for _ in range(12):
                row, column = rng.integers(40, 110, 2)
                scl[row : row + 14, column : column + 14] = 9
            shapes = {b: (height * 10 // size, width * 10 // size) for b, size in sizes.items()}
            pixels = {b: rng.integers(1000, 1200, shape) for b, shape in shapes.items()}
            pixels["B02"] += 2000 * (n == 3)
            listed.append(
                ten.scene(f"2020-06-{1 + 4 * n:02d}T10:00:{left % 60:02d}", where, pixels, scl)
            )
    return listed


def test_bands_read_into_the_memory_of_others_are_the_same(archive):
    """All bands, more than are read ahead, against each by itself, which shares nothing: two tiles a day, clouds, a veil."""
    grid = grid_at(LEFT, TOP, 96, 72)
    recipe = dataclasses.replace(
        PLAIN, bands=BANDS, mask=(MaskRule(classes=(9,)),), haze=HazeTest(), fallback=()
    )
    # So that arrays of both sizes are used again: the first and the last band after the haze test's are of 20 m.
    sizes = dict.fromkeys(BANDS, 10) | {"B03": 20, "B12": 20}
    listed = scenes_under_a_veil(archive, np.random.default_rng(12), sizes)
    ledger = Ledger()
    made = composite(listed, grid, recipe, ledger).compute()
    assert (made.clear_count == 0).any()
    assert made.clear_count.max() == 6
    for band in set(BANDS) - {"B02", "B04"}:
        three = tuple(b for b in BANDS if b in ("B02", "B04", band))
        alone = dataclasses.replace(recipe, bands=three)
        apart = composite(listed, grid, alone).compute()
        together = made.sel(band=list(three))
        for name in made.data_vars:
            np.testing.assert_array_equal(together[name], apart[name], err_msg=f"{name}, {band}")
    table = ledger.table()
    of_veil = set(table[table.scene.isin([s.id for s in listed if s.datetime.day == 13])].band)
    assert {"B02", "B04"} <= of_veil
    assert not {"B08", "B8A", "B11", "B12"} & of_veil


@pytest.mark.parametrize(
    "name", ["annual-median", "annual-geomedian", "summer-bap", "naive-median"]
)
def test_memory_is_estimated(archive, name):
    """30 days without a cloud need the most. numpy reports its memory to Python's own count."""
    grid = grid_at(LEFT, TOP, 600, 576)
    sizes = {band: size for band, size in NATIVE_M.items() if band != "SCL"}
    ten = dataclasses.replace(archive, bands=BANDS, resolution=NATIVE_M)
    rng = np.random.default_rng(3)
    pixels = {
        band: rng.integers(1000, 1200, (11000 // size, 11000 // size))
        for band, size in sizes.items()
    }
    first = ten.scene(
        "2020-06-01T10:00:00", grid_at(LEFT - 2400, TOP + 2400, 1100, 1100), pixels, 4
    )
    listed = []
    for day in range(30):
        scene = first.clone()
        scene.id += str(day)
        scene.datetime += timedelta(days=2 * day)
        scene.properties["minecube:datatake"] += str(day)
        listed.append(scene)
    recipe = dataclasses.replace(load_recipes()[name], block_px=1024)
    composite(listed[:2], grid, recipe).compute()  # imports
    tracemalloc.start()
    try:
        composite(listed, grid, recipe).compute()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    estimate = estimate_memory(listed, grid, recipe)
    assert peak < estimate < 2 * peak


def test_only_remote_bands_are_read_ahead(archive):
    scene = archive.scene("2020-06-01T10:00:00", grid_at(LEFT, TOP, 60, 60), {"B04": 1, "B11": 1})
    assert count_ahead([scene]) == 0
    scene.assets["B11"].href = "https://example.com/B11.tif"
    assert count_ahead([scene]) == 1


def test_layers_without_an_observation(archive):
    """A scene beside the grid: integers are 0 and deviations NaN, never a number that could be one."""
    far = [
        archive.scene(
            "2020-06-01T10:00:00", grid_at(LEFT + 90000, TOP, 60, 60), {"B04": 1, "B11": 1}
        )
    ]
    near_by = [
        archive.scene("2020-06-01T10:00:00", grid_at(LEFT + 300, TOP, 60, 60), {"B04": 1, "B11": 1})
    ]
    recipe = dataclasses.replace(PLAIN, reducer="geomedian")
    for listed, seen in ((far, False), (near_by, True)):
        made = composite(listed, grid_at(LEFT, TOP, 60, 60), recipe).compute()
        assert bool(made.reflectance.values.any()) is seen
        assert not made.reflectance.values[:, :, :30].any()
        assert np.isnan(made.emad.values[:, :30]).all()
        assert np.isfinite(made.emad.values[:, 34:]).any() == seen
