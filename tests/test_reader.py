"""Pixels land where they belong, unchanged, or the read fails."""

from __future__ import annotations

import dataclasses

import numpy as np
import odc.stac
import pytest
import rasterio
from affine import Affine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox
from pyproj import Transformer
from rasterio.enums import Resampling
from scipy import ndimage

from known_scenes import grid_at, unique_pixels, write_tif
from minecube import scenes
from minecube.catalog import Access
from minecube.errors import ReadError, UnusableFileError
from minecube.reader import gridding, read, remove_offset

LEFT, TOP = 360000, 5600040


def expected_nearest(pixels, file_grid, grid):
    """By brute force: the file pixel in which each grid pixel's centre lies, 0 outside."""
    out = np.zeros(grid.shape, dtype=pixels.dtype)
    for row in range(grid.shape[0]):
        for col in range(grid.shape[1]):
            x, y = grid.transform @ (col + 0.5, row + 0.5)
            c, r = ~file_grid.transform @ (x, y)
            if 0 <= c < file_grid.shape[1] and 0 <= r < file_grid.shape[0]:
                out[row, col] = pixels[int(r), int(c)]
    return out


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    ratio=st.sampled_from([1, 2, 6]),
    dx=st.integers(-50, 90),
    dy=st.integers(-50, 90),
    width=st.integers(1, 40),
    height=st.integers(1, 40),
)
def test_any_window_of_a_nested_file_is_read_as_it_is(
    tmp_path_factory, ratio, dx, dy, width, height
):
    file_grid = grid_at(LEFT, TOP, 24, 18, size=10 * ratio)
    path = tmp_path_factory.getbasetemp() / f"nested_{ratio}.tif"
    pixels = unique_pixels(18, 24)
    if not path.exists():
        write_tif(path, pixels, file_grid)
    grid = grid_at(LEFT + 10 * dx, TOP - 10 * dy, width, height)
    np.testing.assert_array_equal(read(str(path), grid), expected_nearest(pixels, file_grid, grid))


def test_pixels_that_are_not_square_are_not_taken_as_nested(tmp_path):
    rows = np.arange(1, 31, dtype=np.uint16)[:, None].repeat(20, axis=1)
    write_tif(
        tmp_path / "tall.tif", rows, GeoBox(rows.shape, Affine(10, 0, LEFT, 0, -20, TOP), 32633)
    )
    got = read(str(tmp_path / "tall.tif"), grid_at(LEFT, TOP, 20, 60))
    np.testing.assert_array_equal(got, rows.repeat(2, axis=0))


def test_the_file_is_trusted_not_the_item(real_data):
    """The item of this scene says 10 m; its files are 100 m."""
    path = real_data / "earthsearch_scene_29RKH_20200219" / "B04.tif"
    with rasterio.open(path) as src:
        pixels = src.read(1)
    grid = grid_at(203400, 2790000, 90, 70, 32629)
    rows = ((2800020 - (2790000 - 5 - 10 * np.arange(70))) // 100).astype(int)
    columns = ((203405 + 10 * np.arange(90) - 199980) // 100).astype(int)
    np.testing.assert_array_equal(read(str(path), grid), pixels[np.ix_(rows, columns)])


@pytest.mark.parametrize("resampling", [Resampling.nearest, Resampling.bilinear])
@pytest.mark.parametrize(
    ("epsg", "left", "top", "size"),
    [
        (32632, 784000, 5607000, 10),  # the neighbouring zone
        (
            32633,
            LEFT - 95,
            TOP + 100,
            10,
        ),  # the same zone, half a pixel off: must not be read as if it were nested
        (32633, LEFT - 100, TOP + 105, 10),
        (32633, LEFT - 100, TOP + 100, 10.2),  # pixels that are nearly 10 m
    ],
)
def test_what_does_not_nest_is_warped_to_pixel_centres(tmp_path, resampling, epsg, left, top, size):
    file_grid = grid_at(left, top, 300, 300, epsg, size=size)
    row, column = np.mgrid[:300, :300]
    pixels = (3000 + 10 * column + 7 * row + 500 * np.sin(column / 9.0)).astype(np.uint16)
    write_tif(tmp_path / "band.tif", pixels, file_grid)
    grid = grid_at(LEFT + 200, TOP - 200, 60, 50)
    x, y = np.meshgrid(grid.coordinates["x"].values, grid.coordinates["y"].values)
    x, y = Transformer.from_crs(32633, epsg, always_xy=True).transform(x, y)
    at = np.array([(top - y) / size - 0.5, (x - left) / size - 0.5])
    order = 1 if resampling is Resampling.bilinear else 0
    expected = ndimage.map_coordinates(pixels.astype(float), at, order=order)
    off = np.abs(read(str(tmp_path / "band.tif"), grid, resampling) - expected)
    if resampling is Resampling.bilinear:
        assert off.max() <= 1.5  # a hundredth of a pixel at 65 a pixel, and rounding
    else:
        assert np.mean(off > 0) < 0.03  # centres that fall between two pixels may go to either


def test_a_warped_pixel_does_not_depend_on_the_window_it_is_read_in(tmp_path):
    pixels = np.random.default_rng(0).integers(1, 9000, (400, 400)).astype(np.uint16)
    write_tif(tmp_path / "band.tif", pixels, grid_at(784000, 5607000, 400, 400, 32632))
    grid = grid_at(LEFT + 200, TOP - 200, 120, 90)
    for resampling in (Resampling.nearest, Resampling.bilinear):
        whole = read(str(tmp_path / "band.tif"), grid, resampling)
        for rows, columns in (
            (slice(0, 30), slice(0, 50)),
            (slice(30, 90), slice(50, 120)),
            (slice(44, 45), slice(7, 113)),
        ):
            part = read(str(tmp_path / "band.tif"), grid[rows, columns], resampling)
            off = np.abs(part.astype(int) - whole[rows, columns])
            assert off.max() <= (0 if resampling is Resampling.nearest else 5)
            assert np.mean(off > 1) < 0.02


GRIDS = {
    "as it lies": (LEFT, TOP, 60, 60, 32633),
    "a part, and beyond": (LEFT + 300, TOP + 100, 60, 60, 32633),
    "another zone": (785160, 5605900, 60, 60, 32632),
    "half a pixel off": (LEFT + 5, TOP, 50, 50, 32633),
    "coarse": (LEFT, TOP, 10, 10, 32633, 60),
}


HOW = [32768, 65436, 65535, "mask", "nodata"]


@pytest.mark.parametrize("where", GRIDS)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("resampling", [Resampling.nearest, Resampling.bilinear])
def test_what_is_not_valid_is_no_pixel_and_mixed_into_none(tmp_path, where, how, resampling):
    """As if the file had zeros there: products have numbers above 32767 and masks with any number beneath."""
    grid = grid_at(LEFT, TOP, 60, 60)
    pixels = np.random.default_rng(3).integers(1, 7777, (60, 60)).astype(np.uint16)
    hidden = np.random.default_rng(4).random((60, 60)) < 0.1
    zeros = write_tif(tmp_path / "zeros.tif", np.where(hidden, 0, pixels), grid)
    spoilt = np.where(hidden, how if isinstance(how, int) else 7777, pixels).astype(
        np.uint16
    )  # 7777 may be reflectance
    path = write_tif(
        tmp_path / "spoilt.tif", spoilt, grid, nodata=7777 if how == "nodata" else None
    )
    if how == "mask":
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as out:
            out.write_mask(~hidden)
    wanted = grid_at(*GRIDS[where])
    expected = read(str(zeros), wanted, resampling)
    np.testing.assert_array_equal(read(str(path), wanted, resampling), expected)
    assert (expected > 0).mean() > 0.3
    assert expected.max() < 7777


@pytest.mark.parametrize("resampling", [Resampling.nearest, Resampling.bilinear])
@pytest.mark.parametrize("epsg", [32633, 32632])
@pytest.mark.parametrize("nodata", [None, 0, 11])
def test_zeros_of_a_warped_file_stay_zeros(tmp_path, nodata, epsg, resampling):
    """GDAL 3.11 and later make ones of them if the source's nodata is another number or unknown."""
    left, top, size = (LEFT + 3, TOP - 3, 60) if epsg == 32633 else (785160, 5605900, 70)
    file_grid = grid_at(left, top, size, size, epsg)
    classes = np.random.default_rng(3).integers(0, 11, (size, size)).astype(np.uint8)
    classes[20:50, 20:50] = 0
    path = write_tif(tmp_path / "SCL.tif", classes, file_grid, nodata=nodata)
    grid = grid_at(LEFT + 100, TOP - 100, 40, 40)
    x, y = np.meshgrid(grid.coordinates["x"].values, grid.coordinates["y"].values)
    x, y = Transformer.from_crs(32633, epsg, always_xy=True).transform(x, y)
    at = np.array([(top - y) / 10, (x - left) / 10])
    between = np.abs(at - np.rint(at)).min(axis=0) < 0.02  # centres that may go to either pixel
    expected = classes[tuple(np.floor(at).astype(int))]
    got = read(str(path), grid, resampling)
    np.testing.assert_array_equal((got == 0)[~between], (expected == 0)[~between])
    assert 0.3 < (expected == 0).mean() < 0.9
    if resampling is Resampling.nearest:
        np.testing.assert_array_equal(got[~between], expected[~between])


def test_a_defect_is_no_coarse_pixel_either(tmp_path):
    """A third of the file is a defect as large as the coarse pixels."""
    pixels = np.full((60, 60), 1400, np.uint16)
    pixels[:, :20] = 65535
    path = write_tif(tmp_path / "band.tif", pixels, grid_at(LEFT, TOP, 60, 60), nodata=None)
    got = read(str(path), grid_at(LEFT, TOP, 6, 6, size=100), Resampling.nearest)
    np.testing.assert_array_equal(got, np.broadcast_to([0, 0, 1400, 1400, 1400, 1400], (6, 6)))


def average_of_valid(pixels, valid, factor):
    """Average valid pixels with weights that fall to zero at `factor` pixels from each coarse pixel's centre.

    The average is 0 where the pixel at the centre is not valid.
    """
    height, width = (n // factor for n in pixels.shape)
    expected = np.zeros((height, width))
    for row in range(height):
        for column in range(width):
            down = np.abs(np.arange(pixels.shape[0]) + 0.5 - factor * (row + 0.5))
            across = np.abs(np.arange(pixels.shape[1]) + 0.5 - factor * (column + 0.5))
            weights = np.clip(1 - down / factor, 0, None)[:, None] * np.clip(
                1 - across / factor, 0, None
            )
            weights = weights * valid
            if valid[int(factor * (row + 0.5)), int(factor * (column + 0.5))]:
                expected[row, column] = (weights * pixels).sum() / weights.sum()
    return expected


@pytest.mark.parametrize("factor", [3, 6])
@pytest.mark.parametrize("how", [*HOW, "zero", "zero, nodata 65535"])
def test_coarse_pixels_are_averages_of_valid_pixels(tmp_path, how, factor):
    grid = grid_at(LEFT, TOP, 60, 60)
    pixels = np.random.default_rng(3).integers(1000, 2000, (60, 60)).astype(np.uint16)
    valid = np.random.default_rng(4).random((60, 60)) > 0.1
    valid[:, :20] = False
    number = how if isinstance(how, int) else {"mask": 1400, "nodata": 7777}.get(how, 0)
    nodata = {"nodata": 7777, "zero, nodata 65535": 65535}.get(how)
    path = write_tif(
        tmp_path / "band.tif",
        np.where(valid, pixels, number).astype(np.uint16),
        grid,
        nodata=nodata,
    )
    if how == "mask":
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as out:
            out.write_mask(valid)
    expected = average_of_valid(pixels, valid, factor)
    got = read(
        str(path),
        grid_at(LEFT, TOP, 60 // factor, 60 // factor, size=10 * factor),
        Resampling.bilinear,
    )
    np.testing.assert_array_equal(got == 0, expected == 0)
    assert 0 < (got == 0).mean() < 0.5
    np.testing.assert_allclose(got, expected, atol=1)


def test_overviews_are_not_read(tmp_path):
    """An average in an overview may contain invalid pixels."""
    path = write_tif(
        tmp_path / "band.tif", np.full((256, 256), 1400, np.uint16), grid_at(LEFT, TOP, 256, 256)
    )
    with rasterio.open(path, "r+") as out:
        out.build_overviews([2, 4, 8], Resampling.average)
    for level in range(3):
        with rasterio.open(path, "r+", OVERVIEW_LEVEL=level) as out:
            out.write(np.full(out.shape, 3000, np.uint16), 1)
    for factor in (4, 8):
        coarse = grid_at(LEFT, TOP, 256 // factor, 256 // factor, size=10 * factor)
        for resampling in (Resampling.nearest, Resampling.bilinear):
            assert np.unique(read(str(path), coarse, resampling)).tolist() == [1400]


@pytest.mark.parametrize("resampling", [Resampling.nearest, Resampling.bilinear])
@pytest.mark.parametrize("epsg", [32633, 32632])
def test_strips_make_one_image(tmp_path, monkeypatch, epsg, resampling):
    """A large area is warped in strips of rows. The grid extends beyond the file."""
    left, top = (LEFT, TOP) if epsg == 32633 else (784000, 5607000)
    pixels = np.random.default_rng(0).integers(1, 9000, (400, 400)).astype(np.uint16)
    path = write_tif(tmp_path / "band.tif", pixels, grid_at(left, top, 400, 400, epsg))
    grid = grid_at(LEFT - 300, TOP + 300, 150, 110, size=40)
    whole = read(str(path), grid, resampling)
    monkeypatch.setattr(gridding, "_STRIP_PX", 10_000)
    off = np.abs(read(str(path), grid, resampling).astype(int) - whole)
    assert off.max() <= (0 if resampling is Resampling.nearest or epsg == 32633 else 5)
    assert 0.3 < (whole > 0).mean() < 0.8


def test_the_brightest_number_that_is_valid(tmp_path):
    grid = grid_at(LEFT, TOP, 3, 1)
    path = write_tif(tmp_path / "band.tif", np.array([[32766, 32767, 32768]], np.uint16), grid)
    assert read(str(path), grid).tolist() == [[32766, 32767, 0]]


def test_offset_is_removed_without_wrapping():
    raw = np.arange(65536, dtype=np.uint16)
    by_hand = [0 if v == 0 else max(v - 1000, 1) for v in range(65536)]
    np.testing.assert_array_equal(remove_offset(raw, -1000), by_hand)
    np.testing.assert_array_equal(remove_offset(raw, 0), raw)


def test_stack_keeps_every_scene_in_the_order_given(archive, site):
    """stackstac drops and reorders items by their metadata; a scene beside the grid must stay, as zeros."""
    grid = scenes.grid_of(site)
    there, beside = grid_at(LEFT, TOP, 240, 180), grid_at(LEFT + 60000, TOP, 240, 180)
    listed = [
        archive.scene("2020-07-05T10:00:00", there, {"B04": 500, "B11": 600}),
        archive.scene("2020-05-05T10:00:00", beside, {"B04": 700, "B11": 800}),
        archive.scene("2022-06-05T10:00:00", there, {"B04": 1900, "B11": 900}, baseline="04.00"),
    ]
    stacked = scenes.stack(listed, grid, ("B11", "SCL", "B04"))
    assert stacked.shape == (3, 3, 180, 240)
    assert stacked.dtype == np.uint16
    assert list(stacked.id.values) == [s.id for s in listed]
    values = stacked.values[:, :, 90, 120]
    # 900 - 1000 is dark, not 65436; SCL carries no offset.
    np.testing.assert_array_equal(values, [[600, 4, 500], [0, 0, 0], [1, 4, 900]])
    assert stacked.y.values[0] == TOP - 5
    assert stacked.x.values[0] == LEFT + 5


def test_stack_agrees_with_odc_stac_and_plain_rasterio(archive, site):
    grid = scenes.grid_of(site)
    rng = np.random.default_rng(3)
    raw, listed = [], []
    for day in (3, 8):
        where = grid_at(LEFT - 600 + 60 * day, TOP + 600, 260, 220)
        pixels = {
            "B04": rng.integers(1, 9000, (220, 260)),
            "B11": rng.integers(1, 9000, (110, 130)),
        }
        raw.append(archive.item(f"2020-07-{day:02d}T10:00:00", where, pixels))
        listed.append(scenes.normalise(raw[-1], archive.source))
    ours = scenes.stack(listed, grid, ("B04", "B11")).values
    theirs = odc.stac.load(
        raw, bands=["B04", "B11"], geobox=grid, dtype="uint16", nodata=0
    ).to_dataarray("band")
    np.testing.assert_array_equal(ours, theirs.transpose("time", "band", "y", "x").values)
    with rasterio.open(raw[0].assets["B11"].href) as src:
        x, y = float(ours.shape[3]) * 5 + LEFT, TOP - 300.0
        (value,) = src.sample([(x, y)])
    np.testing.assert_array_equal(ours[0, 1, 30, 120], value[0])


def test_stack_mixes_sources(archive, site, tmp_path):
    """Each scene is read in its own source's way; only the order of the stack is common."""
    grid = grid_at(LEFT, TOP, 240, 180)
    one = archive.scene("2020-07-05T10:00:00", grid, {"B04": 11, "B11": 1})
    other = scenes.normalise(
        archive.item("2020-07-06T10:00:00", grid, {"B04": 12, "B11": 1}),
        dataclasses.replace(archive.source, id="other", access=Access(connections=1)),
    )
    values = scenes.stack([other, one], scenes.grid_of(site), ("B04",)).values
    assert values[0].max() == values[0].min() == 12
    assert values[1].max() == values[1].min() == 11


@pytest.mark.parametrize("keep", [0.3, 0.7])
def test_a_truncated_file_fails_loudly(tmp_path, keep):
    grid = grid_at(LEFT, TOP, 500, 500)
    whole = write_tif(
        tmp_path / "B04.tif",
        np.random.default_rng(0).integers(1, 9000, (500, 500)).astype(np.uint16),
        grid,
    )
    content = whole.read_bytes()
    whole.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ReadError, match=r"B04\.tif: cannot be read .* not written"):
        read(str(whole), grid)


FORMATS = {
    "tiles": {},
    "strips": {"tiled": False, "blockxsize": None, "blockysize": None},
    "BigTIFF": {"BIGTIFF": "YES"},
    "big-endian": {"ENDIANNESS": "BIG"},
    "internal mask": {},
}


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_cut_anywhere_in_its_header_is_gone(tmp_path, form):
    """No length gives other pixels: GDAL opens what lacks its place, its fill value or its mask."""
    grid = grid_at(LEFT, TOP, 60, 60)
    options = {
        name: value
        for name, value in ({"compress": None} | FORMATS[form]).items()
        if value is not None
    }
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        path = write_tif(tmp_path / "B04.tif", unique_pixels(60, 60), grid, **options)
        if form == "internal mask":
            with rasterio.open(path, "r+") as image:
                image.write_mask(unique_pixels(60, 60) % 2 == 0)
    whole = path.read_bytes()
    read(str(path), grid)
    lengths = [*range(0, 900, 3), *range(900, len(whole), 101), *range(len(whole) - 40, len(whole))]
    for length in lengths:
        path.write_bytes(whole[:length])
        with pytest.raises(
            UnusableFileError,
            match=r"B04\.tif: cannot be read .* check that the file is there and whole",
        ):
            read(str(path), grid)


def test_a_missing_file_fails_loudly_and_shows_no_signature():
    with pytest.raises(ReadError) as caught:
        read("/nowhere/B04.tif?sig=secret", grid_at(LEFT, TOP, 10, 10))
    assert "secret" not in str(caught.value)
    assert "/nowhere/B04.tif" in str(caught.value)


def test_what_is_no_band_is_refused(tmp_path):
    grid = grid_at(LEFT, TOP, 64, 64)
    write_tif(tmp_path / "float.tif", np.ones((64, 64), np.float32), grid)
    with pytest.raises(ReadError, match="found 1 of float32"):
        read(str(tmp_path / "float.tif"), grid)
