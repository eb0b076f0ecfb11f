"""Tiles decode to the pixels that GDAL reads, or the read fails."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox

from known_scenes import grid_at, serve, unique_pixels, write_tif
from known_servers import counts
from minecube import images
from minecube.errors import LostReadError, ReadError
from minecube.network import ForbiddenError
from minecube.reader import gdal_file, raster, read, tiles
from minecube.reader.remote import Tally

LEFT, TOP = 360000, 5600040
HEIGHT, WIDTH = 150, 210
"""Sides of the images: no multiples of a tile's."""
STRIPS = {"tiled": False, "blockxsize": None, "blockysize": 16}
KINDS = {
    "DEFLATE": {},
    "DEFLATE, predictor": {"predictor": 2},
    "DEFLATE, strips": {**STRIPS, "predictor": 2},
    "one strip": {**STRIPS, "blockysize": HEIGHT},
    "plain": {"compress": None},
    "plain strips": {**STRIPS, "compress": None},
    "LZW": {"compress": "lzw"},
    "LZW, predictor": {"compress": "lzw", "predictor": 2},
    "ZSTD": {"compress": "zstd"},
    "ZSTD, predictor": {"compress": "zstd", "predictor": 2},
    "LERC": {"compress": "lerc"},
    "BigTIFF": {"BIGTIFF": "YES", "predictor": 2},
    "big-endian": {"ENDIANNESS": "BIG"},
    "big-endian, predictor": {"ENDIANNESS": "BIG", "predictor": 2},
    "big-endian, plain strips": {**STRIPS, "ENDIANNESS": "BIG", "compress": None},
    "sparse": {"SPARSE_OK": "TRUE"},
    "COG": {"driver": "COG", "tiled": None, "blockxsize": None, "blockysize": None},
    "other nodata": {"nodata": 7},
    "no nodata": {"nodata": None},
}
OF_GDAL = {
    "LERC and DEFLATE": {"compress": "lerc_deflate"},
    "LERC, strips": {**STRIPS, "compress": "lerc"},
    "PackBits": {"compress": "packbits"},
    "12 bits": {"NBITS": 12},
}
SCENE_GRID = grid_at(LEFT, TOP, WIDTH, HEIGHT)


def write_kind(path: Path, options: dict, dtype: str = "uint16") -> Path:
    pixels = unique_pixels(HEIGHT, WIDTH)
    pixels[:70, :130] = 0  # a tile without data
    pixels %= 4096 if "NBITS" in options else np.iinfo(dtype).max
    options = {"compress": "deflate"} | options
    given_options = {name: value for name, value in options.items() if value is not None}
    if given_options.keys() & {"driver"}:
        return write_cog(path, pixels.astype(dtype), given_options)
    return write_tif_of(path, pixels.astype(dtype), options)


def write_tif_of(path, pixels, options):
    defaults = {"nodata": 0, "tiled": True, "blockxsize": 64, "blockysize": 64, "driver": "GTiff"}
    profile = {k: v for k, v in (defaults | options).items() if v is not None}
    return _write(path, pixels, profile)


def write_cog(path, pixels, options):
    return _write(path, pixels, {"nodata": 0, "blocksize": 64} | options)


def _write(path, pixels, profile):
    height, width = pixels.shape
    place = {"crs": "EPSG:32633", "transform": SCENE_GRID.transform, "dtype": pixels.dtype}
    with rasterio.open(path, "w", height=height, width=width, count=1, **place, **profile) as out:
        out.write(pixels, 1)
    return path


def read_by_gdal(path: Path) -> np.ndarray:
    """All pixels, with 0 at nodata and above 32767."""
    with rasterio.open(path) as image:
        pixels = image.read(1).astype(np.uint16)
        if image.nodata is not None:
            pixels[pixels == image.nodata] = 0
    pixels[pixels > 32767] = 0
    return pixels


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Kind and type -> a file, and its pixels as GDAL reads them."""
    folder = tmp_path_factory.mktemp("kinds")
    found = {}
    for kind, options in (KINDS | OF_GDAL).items():
        for dtype in ("uint8", "uint16"):
            if dtype == "uint8" and "NBITS" in options:
                continue
            path = write_kind(folder / f"{len(found)}.tif", options, dtype)
            found[kind, dtype] = path, read_by_gdal(path)
    return found


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("kind", KINDS)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    dx=st.integers(-40, WIDTH),
    dy=st.integers(-40, HEIGHT),
    width=st.integers(1, 250),
    height=st.integers(1, 200),
)
def test_any_window_of_any_kind_is_what_gdal_reads(files, kind, dtype, dx, dy, width, height):
    path, pixels = files[kind, dtype]
    padded = np.pad(pixels, ((40, 400), (40, 500)))
    grid = grid_at(LEFT + 10 * dx, TOP - 10 * dy, width, height)
    expected = padded[40 + dy :, 40 + dx :][:height, :width]
    np.testing.assert_array_equal(read(str(path), grid), expected)


def test_all_these_kinds_are_read_by_tiles(files, monkeypatch):
    """And the others through GDAL, with the same pixels."""

    def refuse(*_):
        raise AssertionError("read through GDAL")

    by_gdal = {kind: files[kind, "uint16"] for kind in OF_GDAL}
    for path, pixels in by_gdal.values():
        np.testing.assert_array_equal(read(str(path), SCENE_GRID), pixels)
    monkeypatch.setattr(gdal_file.GdalImage, "read", refuse)
    for kind in KINDS:
        path, pixels = files[kind, "uint16"]
        np.testing.assert_array_equal(read(str(path), SCENE_GRID), pixels)
    for path, _ in by_gdal.values():
        with pytest.raises(AssertionError, match="through GDAL"):
            read(str(path), SCENE_GRID)


def list_blocks(path: Path) -> list[tuple[int, int]]:
    """Position and bytes of each tile that exists."""
    blocks = []
    with rasterio.open(path) as image:
        ((height, width),) = image.block_shapes
        for y, x in np.ndindex(-(-HEIGHT // height), -(-WIDTH // width)):
            start, size = (
                image.get_tag_item(f"BLOCK_{name}_{x}_{y}", "TIFF", bidx=1)
                for name in ("OFFSET", "SIZE")
            )
            if start:
                blocks.append((int(start), int(size)))
    return blocks


@pytest.mark.parametrize("kind", ["DEFLATE, predictor", "DEFLATE, strips", "COG", "LERC"])
def test_no_flipped_bit_passes_as_pixels(tmp_path, kind):
    """Of 250 bits of each kind with a checksum. A bit that no decoder reads leaves all pixels."""
    path = write_kind(tmp_path / "B04.tif", KINDS[kind])
    expected = read_by_gdal(path)
    whole = bytearray(path.read_bytes())
    blocks = list_blocks(path)
    rng = np.random.default_rng(1)
    lost = 0
    for number in range(250):
        start, size = blocks[number % len(blocks)]
        place = start + int(rng.integers(size))
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        try:
            pixels = read(str(path), SCENE_GRID)
        except ReadError:
            lost += 1
        else:
            np.testing.assert_array_equal(pixels, expected)
    assert lost > 240


def change_field(path: Path, tag: int, value: float) -> None:
    """Replace the first value of a field of a little-endian TIFF's first directory."""
    content = bytearray(path.read_bytes())
    (directory,) = struct.unpack_from("<I", content, 4)
    (fields,) = struct.unpack_from("<H", content, directory)
    for number in range(fields):
        at = directory + 2 + 12 * number
        found, kind, count, place = struct.unpack_from("<HHII", content, at)
        if found == tag:
            form, size = {3: ("<H", 2), 4: ("<I", 4), 12: ("<d", 8)}[kind]
            inline = size * count <= 4
            struct.pack_into(form, content, at + 8 if inline else place, value)
            path.write_bytes(content)
            return
    raise AssertionError(f"{path} has no field {tag}")


HEIGHT_FIELD, COMPRESSION, TILE_WIDTH, TILE_OFFSETS, TILE_SIZES = 257, 259, 322, 324, 325
CORNER = 33922


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        (COMPRESSION, 60001, "cannot be read"),
        (COMPRESSION, 5, "a tile is damaged"),  # LZW
        (COMPRESSION, 1, "a tile is damaged"),
        (HEIGHT_FIELD, 0, "cannot be read"),
        (TILE_WIDTH, 1, "cannot be read"),
        (TILE_WIDTH, 128, "cannot be read"),
        (TILE_WIDTH, 32, "cannot be read"),
        (TILE_SIZES, 0, "expected a tile of 1 to"),
        (TILE_SIZES, 20, "a tile is damaged"),
        (TILE_SIZES, 2**31, "cannot be read"),
        (TILE_SIZES, 400_000_000, "cannot be read"),
        (TILE_OFFSETS, 3, "a tile is damaged"),
        (TILE_OFFSETS, 2**31, "before the tiles that its header names"),
    ],
)
def test_a_header_that_lies_is_no_pixel(tmp_path, field, value, says):
    pixels = np.random.default_rng(0).integers(1, 9000, (HEIGHT, WIDTH)).astype(np.uint16)
    path = write_tif(tmp_path / "B04.tif", pixels, SCENE_GRID)
    change_field(path, field, value)
    with pytest.raises(ReadError, match=says):
        read(str(path), SCENE_GRID)


@pytest.mark.parametrize(
    "kind", ["DEFLATE, predictor", "BigTIFF", "big-endian", "plain strips", "COG"]
)
def test_a_damaged_header_raises_nothing_but_read_errors(tmp_path, monkeypatch, kind):
    """Files left to GDAL are not opened here."""

    def refuse(*_, **__):
        raise ForbiddenError("left to GDAL")

    monkeypatch.setattr(images, "open_image", refuse)
    path = write_kind(tmp_path / "B04.tif", KINDS[kind])
    whole = path.read_bytes()
    start = min(start for start, _ in list_blocks(path))
    rng = np.random.default_rng(2)
    outcomes = set()
    for _ in range(400):
        changed = bytearray(whole)
        changed[int(rng.integers(4, start))] = int(rng.choice([0, 1, 2, 4, 128, 255]))
        path.write_bytes(changed)
        try:
            outcomes.add(read(str(path), SCENE_GRID).shape)
        except ReadError:
            outcomes.add("refused")
    assert outcomes == {(HEIGHT, WIDTH), "refused"}


def test_missing_tiles_have_no_pixels(tmp_path):
    """As for GDAL, a tile without bytes has only nodata."""
    pixels = unique_pixels(HEIGHT, WIDTH)
    path = write_tif(tmp_path / "B04.tif", pixels, SCENE_GRID, nodata=7)
    change_field(path, TILE_SIZES, 0)
    change_field(path, TILE_OFFSETS, 0)
    expected = np.where((pixels == 7) | (pixels > 32767), 0, pixels)
    expected[:64, :64] = 0
    np.testing.assert_array_equal(read(str(path), SCENE_GRID), expected)
    np.testing.assert_array_equal(read_by_gdal(path), expected)


def test_the_corner_may_be_given_of_another_pixel(tmp_path):
    """The second pixel of the first row is given the place of the first."""
    pixels = unique_pixels(HEIGHT, WIDTH)
    path = write_tif(tmp_path / "B04.tif", pixels, SCENE_GRID)
    change_field(path, CORNER, 1.0)
    with rasterio.open(path) as image:
        assert image.transform.c == LEFT - 10
    moved = read_by_gdal(path)[:, 1:]
    np.testing.assert_array_equal(read(str(path), SCENE_GRID)[:, :-1], moved)


def test_plain_tiles_may_end_with_padding(tmp_path):
    pixels = unique_pixels(HEIGHT, WIDTH)
    path = write_tif(tmp_path / "B04.tif", pixels, SCENE_GRID, compress=None)
    change_field(path, TILE_SIZES, 64 * 64 * 2 + 5)
    expected = read_by_gdal(path)
    np.testing.assert_array_equal(read(str(path), SCENE_GRID), expected)
    assert expected[0, 0] == pixels[0, 0]


def test_bytes_are_counted_whoever_reads(files):
    """The bytes of all tiles of a local file, read here or through GDAL."""
    for kind in ("DEFLATE", "PackBits"):
        path, _ = files[kind, "uint16"]
        tally = Tally()
        read(str(path), SCENE_GRID, tally=tally)
        assert tally.bytes == sum(size for _, size in list_blocks(path))


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux")
def test_an_error_of_the_disk_is_a_lost_read():
    """Reading the first byte of this file fails with EIO."""
    with pytest.raises(LostReadError, match="Input/output error"):
        read("/proc/self/mem", SCENE_GRID)


def test_a_short_answer_of_the_disk_is_no_missing_tile(tmp_path, monkeypatch):
    """An answer may end where a tile ends: the next tile is lost, not empty."""
    path = write_tif(tmp_path / "B04.tif", unique_pixels(HEIGHT, WIDTH), SCENE_GRID)
    (start, size), *_ = sorted(list_blocks(path))
    read_at = raster._read_at

    def cut(file, position, length):
        return read_at(file, position, length)[: size if position == start else length]

    monkeypatch.setattr(raster, "_read_at", cut)
    with pytest.raises(LostReadError, match=f"expected .* bytes at {start:,}, found {size:,}"):
        read(str(path), SCENE_GRID)


@pytest.mark.parametrize("is_damaged", [False, True])
def test_a_local_file_that_changes_meanwhile_is_lost(tmp_path, monkeypatch, is_damaged):
    """Also if its new bytes cannot be decoded: another try may succeed."""
    path = write_tif(tmp_path / "B04.tif", unique_pixels(HEIGHT, WIDTH), SCENE_GRID)
    os.utime(path, (0, 0))  # file systems keep times of milliseconds
    first = min(start for start, _ in list_blocks(path))
    read_at = raster._read_at
    whole = path.read_bytes()
    new = whole[:first] + bytes(len(whole) - first) if is_damaged else whole

    def change(file, start, length):
        if start >= first:
            path.write_bytes(new)
        return read_at(file, start, length)

    monkeypatch.setattr(raster, "_read_at", change)
    with pytest.raises(LostReadError, match="changed while it was read"):
        read(str(path), SCENE_GRID)


def test_a_file_that_was_replaced_is_read_again(tmp_path):
    path = tmp_path / "B04.tif"
    first = unique_pixels(HEIGHT, WIDTH) % 5000
    write_tif(path, first, SCENE_GRID)
    np.testing.assert_array_equal(read(str(path), SCENE_GRID), first)
    moved = GeoBox(SCENE_GRID.shape, SCENE_GRID.affine * Affine.translation(-3, -2), 32633)
    write_tif(path, first, moved, blockxsize=32, blockysize=32)
    expected = np.zeros_like(first)
    expected[:-2, :-3] = first[2:, 3:]
    np.testing.assert_array_equal(read(str(path), SCENE_GRID), expected)


@pytest.mark.usefixtures("all_hosts_are_tried")
def test_one_request_per_row_of_tiles(tmp_path, monkeypatch):
    """Tiles of a row lie next to each other in the file, rows of the image do not."""
    pixels = np.random.default_rng(0).integers(1, 9000, (640, 640)).astype(np.uint16)
    grid = grid_at(LEFT, TOP, 640, 640)
    write_tif(tmp_path / "B04.tif", pixels, grid)
    with serve(tmp_path) as url:
        read(f"{url}/B04.tif", grid[:10, :10])
        before = counts(url)["requests"]
        tally = Tally()
        window = read(f"{url}/B04.tif", grid[200:400, 100:500], tally=tally)
        np.testing.assert_array_equal(window, pixels[200:400, 100:500])
        assert tally.requests == counts(url)["requests"] - before == 4
        whole = Tally()
        np.testing.assert_array_equal(read(f"{url}/B04.tif", grid, tally=whole), pixels)
        assert whole.requests == 1
        monkeypatch.setattr(tiles, "_REQUEST_BYTES", 100_000)
        parts = Tally()
        np.testing.assert_array_equal(read(f"{url}/B04.tif", grid, tally=parts), pixels)
        assert 100 > parts.requests >= whole.bytes / 100_000
