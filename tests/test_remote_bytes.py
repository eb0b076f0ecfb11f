"""The bytes that come from a remote file are those of the file."""

from __future__ import annotations

import functools
import os
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import rasterio
import stackstac
from affine import Affine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from known_scenes import grid_at, serve, unique_pixels, write_tif
from known_servers import LEFT, TOP, counts, write_jp2
from minecube import images
from minecube.catalog import Access
from minecube.errors import ReadError
from minecube.reader import NativeReader, read
from minecube.reader.gdal_file import RemoteFile, open_remote
from minecube.reader.remote import HEAD_BYTES, Remote, Tally

pytestmark = pytest.mark.usefixtures("all_hosts_are_tried")


@pytest.fixture
def jp2(tmp_path):
    return write_jp2(tmp_path)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_reads_of_a_remote_file_are_its_bytes(data, flaky_bytes):
    """Seeks, reads and ranges in any order, under failures, short answers and stalls."""
    url, content, source = flaky_bytes
    tally = Tally()
    file = RemoteFile(source, url, source.head(url, tally), tally)
    for _ in range(data.draw(st.integers(1, 5))):
        start = data.draw(st.integers(0, len(content)))
        length = data.draw(st.integers(0, 200_000))
        stop = min(start + length, len(content))
        if data.draw(st.booleans()):
            assert file.get_byte_ranges([start, 5], [stop - start, 10]) == [
                content[start:stop],
                content[5:15],
            ]
        else:
            assert file.seek(start) == start
            assert file.read(length) == content[start:stop]
            assert file.tell() == stop
    assert file.seek(-3, os.SEEK_END) == len(content) - 3
    assert file.read() == content[-3:]
    assert tally.error is None
    assert [len(x) for x in file.get_byte_ranges([len(content) - 3], [10])] == [
        10
    ]  # GDAL copies as many as it asked for
    assert "it ends after 300001 bytes" in str(tally.error)


@pytest.fixture(scope="module")
def flaky_bytes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flaky")
    content = np.random.default_rng(1).bytes(300_001)
    (folder / "x.bin").write_bytes(content)
    with serve(folder, "--fail", 0.33, "--truncate", 0.1, "--stall", 0.02, "--stall-s", 0.1) as url:
        yield f"{url}/x.bin", content, Remote(Access())
        assert counts(url)["failed"] > 20
        assert counts(url)["truncated"] > 5


def test_a_window_from_a_server_in_trouble(band):
    """503 one time in three, truncated one time in twenty, stalled longer than a try waits: the same pixels, all counted."""
    folder, grid, pixels = band
    with serve(folder, "--fail", 0.333, "--truncate", 0.2, "--stall", 0.02, "--stall-s", 4) as url:
        tallies = []
        for y in range(0, 600, 60):
            tallies.append(Tally())
            window = grid[y : y + 60, 100:400]
            np.testing.assert_array_equal(
                read(f"{url}/B04.tif", window, tally=tallies[-1]), pixels[y : y + 60, 100:400]
            )
        seen = counts(url)
    assert sum(t.requests for t in tallies) == seen["requests"]
    assert sum(t.retried for t in tallies) >= seen["failed"] + seen["truncated"] > 0


def test_a_server_without_ranges_is_named(band):
    folder, grid, _ = band
    with (
        serve(folder, "--no-ranges") as url,
        pytest.raises(ReadError, match="does not answer byte ranges"),
    ):
        read(f"{url}/B04.tif", grid)


def test_a_file_that_changes_is_not_read_half_old_half_new(band):
    folder, grid, pixels = band
    with serve(folder) as url:
        np.testing.assert_array_equal(read(f"{url}/B04.tif", grid[:60, :60]), pixels[:60, :60])
        changed = (pixels[::-1] // 2).astype(np.uint16)
        write_tif(folder / "B04.tif", changed, grid)
        with pytest.raises(ReadError, match="changed while it was read"):
            read(f"{url}/B04.tif", grid[300:400, 300:400])
        np.testing.assert_array_equal(read(f"{url}/B04.tif", grid), changed)


def test_a_header_is_asked_for_once(band):
    folder, grid, _ = band
    with serve(folder) as url:
        first, second = Tally(), Tally()
        read(f"{url}/B04.tif", grid[320:380, 320:380], tally=first)
        read(f"{url}/B04.tif", grid[512:570, 320:380], tally=second)
        assert (first.requests, second.requests) == (2, 1)
        assert first.bytes > HEAD_BYTES > second.bytes > 0


def test_no_more_connections_than_allowed(band):
    folder, grid, pixels = band
    access = Access(connections=3)
    with serve(folder, "--delay", 0.02) as url:
        with ThreadPoolExecutor(16) as threads:
            windows = [grid[y : y + 20, 100:400] for y in range(0, 600, 20)]
            got = list(threads.map(lambda w: read(f"{url}/B04.tif", w, access=access), windows))
        np.testing.assert_array_equal(np.concatenate(got), pixels[:, 100:400])
        assert counts(url)["peak"] == 3


def test_bytes_of_a_local_file_are_those_of_its_tiles(band):
    folder, grid, _ = band
    tally = Tally()
    read(str(folder / "B04.tif"), grid[64:128, 0:64], tally=tally)
    with rasterio.open(folder / "B04.tif") as src:
        assert tally.bytes == int(src.get_tag_item("BLOCK_SIZE_0_1", "TIFF", bidx=1))
        assert src.block_shapes == [(64, 64)]


def test_as_stackstacs_own_reader(band):
    """`stackstac.stack(reader=)` by a user, on plain items."""
    folder, grid, pixels = band
    with serve(folder) as url:
        item = {
            "id": "x",
            "properties": {
                "datetime": "2020-07-05T10:00:00Z",
                "proj:epsg": 32633,
                "proj:bbox": list(grid.boundingbox),
            },
            "assets": {"B04": {"href": f"{url}/B04.tif"}},
        }
        options = {
            "epsg": 32633,
            "resolution": 10,
            "bounds": tuple(grid.boundingbox),
            "snap_bounds": False,
        }
        options |= {
            "dtype": np.dtype("uint16"),
            "fill_value": np.uint16(0),
            "rescale": False,
            "errors_as_nodata": (),
        }
        for reader in (NativeReader, functools.partial(NativeReader, access=Access())):
            stacked = stackstac.stack(
                [item], assets=["B04"], reader=reader, xy_coords="center", **options
            )
            np.testing.assert_array_equal(stacked.values[0, 0], pixels)


def test_jpeg_2000_here_and_from_a_server_in_trouble(jp2, monkeypatch):
    """Also where the user has told GDAL to use threads, which would read past Python's files without an error."""
    monkeypatch.setenv("GDAL_NUM_THREADS", "ALL_CPUS")
    path, grid, pixels = jp2
    np.testing.assert_array_equal(read(str(path), grid[100:300, 200:500]), pixels[100:300, 200:500])
    with serve(path.parent, "--fail", 0.3, "--truncate", 0.1) as url:
        np.testing.assert_array_equal(
            read(f"{url}/B04.jp2", grid[100:300, 200:500]), pixels[100:300, 200:500]
        )


@pytest.mark.parametrize("kind", ["tif", "jp2"])
def test_bytes_that_do_not_come_are_no_pixels(tmp_path, jp2, kind):
    """Uncompressed, where zeros in place of bytes would pass for data; and JPEG 2000, where they decode to anything."""
    path, grid, pixels = jp2
    if kind == "tif":
        path = write_tif(path.with_suffix(".tif"), pixels, grid, compress=None)
    with serve(path.parent, "--only-before", 20000) as url:
        with pytest.raises(ReadError, match="HTTP 404"):
            read(f"{url}/{path.name}", grid[300:400, 300:400])
        with pytest.raises(ReadError, match="HTTP 404"):  # warped, too
            read(f"{url}/{path.name}", grid_at(LEFT + 3005, TOP - 3000, 100, 100))
    with serve(path.parent) as url:
        np.testing.assert_array_equal(read(f"{url}/{path.name}", grid), pixels)


def test_a_file_of_the_same_size_that_changes(tmp_path):
    """Told by its ETag: size and header are those of before."""
    grid, pixels = grid_at(LEFT, TOP, 300, 300), unique_pixels(300, 300)
    path = write_tif(tmp_path / "files" / "B04.tif", pixels, grid, compress=None)
    with serve(path.parent) as url:
        read(f"{url}/B04.tif", grid[:10, :10])
        write_tif(path, pixels[::-1].copy(), grid, compress=None)
        with pytest.raises(ReadError, match="changed while it was read"):
            read(f"{url}/B04.tif", grid[200:250, 200:250])


def test_remote_images_share_one_file_system_of_gdal(tmp_path):
    """GDAL's list of file systems has no lock: no thread may change it while others open files."""
    write_tif(tmp_path / "band.tif", unique_pixels(64, 64), grid_at(LEFT, TOP, 64, 64))
    names = []

    def open_name(name):
        names.append(name)
        return images.open_image(name, b"II*\0", most_px=64 * 64)

    def read_pixels(url):
        tally = Tally()
        remote = Remote(Access())
        head = remote.head(url, tally)
        open_again = functools.partial(RemoteFile, remote, url, head, tally)
        with (
            rasterio.Env(**images.SETTINGS),
            open_remote(open_again, head.size, open_name) as image,
        ):
            return image.read(1)

    with serve(tmp_path) as url, ThreadPoolExecutor(4) as pool:
        layers = list(pool.map(read_pixels, [f"{url}/band.tif"] * 20))
    assert all(np.array_equal(layer, unique_pixels(64, 64)) for layer in layers)
    assert len(set(names)) == 20
    assert len({name.rpartition("/")[0] for name in names}) == 1


class Counted(RemoteFile):
    """A remote file that counts how many of its kind are open."""

    still_open = 0

    def __enter__(self):
        Counted.still_open += 1
        return self

    def __exit__(self, *_):
        Counted.still_open -= 1


def test_a_refused_image_is_closed(tmp_path):
    """Closed later, by another thread, GDAL would find neither the file nor its name."""
    write_tif(tmp_path / "band.tif", unique_pixels(64, 64), grid_at(LEFT, TOP, 64, 64))
    with serve(tmp_path) as url:
        tally = Tally()
        remote = Remote(Access())
        head = remote.head(f"{url}/band.tif", tally)
        open_again = functools.partial(Counted, remote, f"{url}/band.tif", head, tally)
        open_name = functools.partial(images.open_image, beginning=head.data, most_px=1)
        with (
            pytest.raises(images.TooLargeError) as refused,
            rasterio.Env(**images.SETTINGS),
            open_remote(open_again, head.size, open_name),
        ):
            pass
    assert Counted.still_open == 0, refused.value  # whose traceback would keep the image open


def test_a_file_without_crs_is_named(tmp_path):
    profile = {"driver": "GTiff", "width": 4, "height": 4, "count": 1, "dtype": "uint16"}
    place = Affine(10, 0, LEFT, 0, -10, TOP)
    with rasterio.open(tmp_path / "B04.tif", "w", transform=place, **profile) as image:
        image.write(unique_pixels(4, 4), 1)
    grid = grid_at(LEFT, TOP, 4, 4)
    with serve(tmp_path) as url:
        for href in (str(tmp_path / "B04.tif"), f"{url}/B04.tif"):
            with pytest.raises(ReadError, match=f"{re.escape(href)}: the file has no CRS"):
                read(href, grid)
