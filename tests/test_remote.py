"""Bytes from a server in trouble are those of the file, or the read is lost, and the ledger says which."""

from __future__ import annotations

import datetime as dt
import functools
import json
import os
import pickle
import re
import socket
import ssl
import threading
import time
import tracemalloc
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import rasterio
import requests
import stackstac
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rasterio.enums import Resampling

from known_scenes import grid_at, serve, unique_pixels, write_tif
from minecube import images, network, scenes
from minecube.catalog import Access, Recipe
from minecube.composite import composite
from minecube.errors import CatalogError, LostReadError, ReadError, UnusableFileError
from minecube.reader import (
    Ledger,
    NativeReader,
    check_credentials,
    compute_stack,
    find_missing,
    read,
)
from minecube.reader import remote as module
from minecube.reader.gdal_file import RemoteFile
from minecube.reader.remote import HEAD_BYTES, Remote, Tally
from minecube.reader.signing import bucket_of

LEFT, TOP = 360000, 5600040


def counts(url):
    with urllib.request.urlopen(f"{url}/counts") as answer:
        return json.load(answer)


@pytest.fixture(autouse=True)
def _all_hosts_are_tried():
    network.forget_unreachable()


class Ranged(SimpleHTTPRequestHandler):
    """Files by ranges of bytes."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        path = Path(self.directory) / self.path.partition("?")[0].lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
        body = content[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.send(body)

    def send(self, body):
        self.wfile.write(body)


class Dripping(Ranged):
    def send(self, body):
        for byte in body:
            try:
                self.wfile.write(bytes([byte]))
            except OSError:
                return
            time.sleep(0.02)


class Endless(SimpleHTTPRequestHandler):
    """An answer in chunks that stops when the client does."""

    protocol_version = "HTTP/1.1"

    def __init__(self, status, *args, **kwargs):
        self.status = status
        super().__init__(*args, **kwargs)

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.send_response(self.status)
        self.send_header("Transfer-Encoding", "chunked")
        if self.status == 206:
            self.send_header("Content-Range", f"bytes 0-{HEAD_BYTES - 1}/{HEAD_BYTES}")
        self.end_headers()
        try:
            for _ in range(200):  # 100 MB: the client must not wait for them
                self.wfile.write(b"80000\r\n" + bytes(0x80000) + b"\r\n")
        except OSError:
            self.close_connection = True


class Noted(Ranged):
    """Says what it was asked, with all headers; sends files that are elsewhere there."""

    def __init__(self, asked, elsewhere, *args, **kwargs):
        self.asked, self.elsewhere = asked, elsewhere
        super().__init__(*args, **kwargs)

    def do_GET(self):
        self.asked.append(f"{self.path} {dict(self.headers)}")
        if self.path.startswith("/token/"):
            body = json.dumps(
                {"token": "sig=SECRET", "msft:expiry": "2999-01-01T00:00:00+00:00"}
            ).encode()
            self.send_response(200)
        elif self.elsewhere:
            self.send_response(302)
            self.send_header("Location", self.elsewhere)
            body = b""
        else:
            return super().do_GET()
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        return self.wfile.write(body)


@contextmanager
def running(handler):
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def band(tmp_path):
    """A tiled file of 700 x 600 pixels no two of which are alike, its grid and pixels."""
    grid, pixels = (
        grid_at(LEFT, TOP, 700, 600),
        np.random.default_rng(0).integers(1, 9000, (600, 700)).astype(np.uint16),
    )
    as_cog = {
        "driver": "COG",
        "blocksize": 64,
        "overviews": "NONE",
        "tiled": None,
        "blockxsize": None,
        "blockysize": None,
    }
    write_tif(tmp_path / "files" / "B04.tif", pixels, grid, **as_cog)
    return tmp_path / "files", grid, pixels


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


@pytest.mark.parametrize(("status", "tries"), [(404, 1), (410, 1), (403, 1), (501, 1)])
def test_what_is_final_is_not_asked_twice(band, status, tries):
    folder, grid, _ = band
    with serve(folder, "--fail", 1, "--status", status) as url:
        with pytest.raises(
            ReadError, match=rf"B04\.tif: cannot be read \(HTTP {status}.*not written"
        ):
            read(f"{url}/B04.tif", grid)
        assert counts(url)["requests"] == tries


@pytest.mark.parametrize(
    ("status", "gone"), [(403, True), (404, True), (410, True), (401, False), (501, False)]
)
def test_files_that_are_gone_for_good_are_told_from_others(band, archive, status, gone):
    """Another source may have a copy of what is gone; a server in trouble may come back."""
    folder, grid, _ = band
    scene = archive.scene("2020-07-05T10:00:00", grid_at(LEFT, TOP, 60, 60), {"B04": 1, "B11": 1})
    assert find_missing(scene, ["SCL", "B04", "B11"]) == ""
    with serve(folder, "--fail", 1, "--status", status) as url:
        with pytest.raises(LostReadError, match=rf"HTTP {status}") as caught:
            read(f"{url}/B04.tif", grid)
        assert isinstance(caught.value, UnusableFileError) is gone
        scene.assets["B04"].href = f"{url}/B04.tif"
        assert find_missing(scene, ["SCL", "B04", "B11"]).startswith(
            f"B04 is gone (HTTP {status}" if gone else ""
        )
        assert bool(find_missing(scene, ["SCL", "B04", "B11"])) is gone
    scene.assets["B04"].href = str(folder / "nothing.tif")
    assert find_missing(scene, ["B11", "B04"]) == "B04 is gone (No such file or directory)"
    with pytest.raises(UnusableFileError) as caught:
        read(scene.assets["B04"].href, grid)
    assert caught.value.href == scene.assets["B04"].href


@pytest.mark.parametrize("status", [401, 403, 409])
def test_a_refusal_names_the_setting_that_would_sign(band, status):
    folder, grid, _ = band
    hint = "list the host or bucket in credentials_for"
    with serve(folder, "--fail", 1, "--status", status) as url:
        signing = Access(kind="s3", href=url, credentials_for=("ours",))
        with pytest.raises(ReadError, match=rf"HTTP {status}.*; {hint} of its source"):
            read("s3://files/B04.tif", grid, access=signing)
        for access in (
            Access(),
            Access(kind="s3", href=url, anonymous=True),
        ):  # nothing could be listed there
            with pytest.raises(ReadError, match=rf"HTTP {status}") as caught:
                read(f"{url}/B04.tif", grid, access=access)
            assert hint not in str(caught.value)


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_what_passes_is_tried_until_patience_ends(band, status, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE_S", 1.0)
    folder, grid, _ = band
    with serve(folder, "--fail", 1, "--status", status) as url:
        with pytest.raises(ReadError, match=rf"HTTP {status}, after \d+ tries in \d+ s"):
            read(f"{url}/B04.tif", grid)
        assert counts(url)["requests"] >= 4


REFUSED = r"127\.0\.0\.1:1 cannot be reached \(Connection refused\): check the address, and that the server is running"


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_server_that_is_not_there_is_tried_once_a_run(clock, monkeypatch, share):
    """Whatever share of its longest each pause is drawn as."""
    monkeypatch.setattr(
        module.random, "uniform", lambda low, high: max(0.01, low + share * (high - low))
    )
    grid, start = grid_at(LEFT, TOP, 10, 10), clock.now
    first, second, third = Tally(), Tally(), Tally()
    with pytest.raises(
        ReadError, match=rf"^http://127\.0\.0\.1:1/B04\.tif: cannot be read \({REFUSED}\)"
    ) as caught:
        read("http://127.0.0.1:1/B04.tif?sig=secret", grid, tally=first)
    assert "secret" not in str(caught.value)
    assert first.requests > 1  # a server may be restarting
    assert network.REFUSED_S / 2 < clock.now - start <= network.REFUSED_S
    start = clock.now
    with pytest.raises(ReadError, match=REFUSED):
        read("http://127.0.0.1:1/B05.tif", grid, tally=second)
    assert clock.now == start
    assert second.requests == 1
    network.forget_unreachable()
    with pytest.raises(ReadError, match=REFUSED):
        read("http://127.0.0.1:1/B05.tif", grid, tally=third)
    assert third.requests > 1


def test_a_server_that_restarts_is_waited_for(band):
    """It is there again a second after the first connection was refused."""
    folder, grid, pixels = band
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    handler = functools.partial(Ranged, directory=str(folder))

    def start():
        time.sleep(1)
        server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server

    with ThreadPoolExecutor(1) as thread:
        starting = thread.submit(start)
        np.testing.assert_array_equal(read(f"http://127.0.0.1:{port}/B04.tif", grid), pixels)
        starting.result().shutdown()
        starting.result().server_close()


def test_a_host_name_that_is_not_found():
    with pytest.raises(
        ReadError, match=r"the host name nowhere\.invalid is not found: check its spelling, and"
    ):
        read("http://nowhere.invalid/B04.tif", grid_at(LEFT, TOP, 10, 10))


def test_a_server_that_drips_is_given_up(band, monkeypatch):
    """Each piece comes in time, the whole never would."""
    monkeypatch.setattr(module, "PATIENCE_S", 1.0)
    folder, grid, _ = band
    with running(functools.partial(Dripping, directory=str(folder))) as url:
        start = time.monotonic()
        with pytest.raises(ReadError, match=r"\d+ bytes of \d+ in 1 s"):
            read(f"{url}/B04.tif", grid)
        assert time.monotonic() - start < 6


@pytest.mark.parametrize("status", [200, 206, 404])
def test_an_answer_without_end_is_not_read_to_it(band, status):
    """Chunked, so that its header does not say how long it is."""
    with running(functools.partial(Endless, status)) as url:
        tracemalloc.start()
        try:
            with pytest.raises(ReadError, match=r"HTTP 404|byte ranges|found another format"):
                read(f"{url}/B04.tif", grid_at(LEFT, TOP, 10, 10))
            assert tracemalloc.get_traced_memory()[1] < 10e6
        finally:
            tracemalloc.stop()


def test_the_server_says_when_to_come_back(band):
    folder, grid, pixels = band
    with serve(folder, "--fail", 0.5, "--retry-after", 1, "--seed", 3) as url:
        start, tally = time.monotonic(), Tally()
        np.testing.assert_array_equal(read(f"{url}/B04.tif", grid, tally=tally), pixels)
        assert tally.retried
        assert time.monotonic() - start >= tally.retried


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


def test_tokens_that_expire_while_reading(band, caplog, capfd):
    """Signed when asked, renewed before they expire or when refused; shown nowhere."""
    folder, grid, pixels = band
    caplog.set_level("DEBUG")
    with serve(folder, "--token-life", 0.5) as url:
        access = Access(
            kind="planetary-computer", href=f"{url}/token", credentials_for=("127.0.0.1",)
        )
        href = f"{url}/B04.tif"
        for y in range(0, 600, 40):
            np.testing.assert_array_equal(
                read(href, grid[y : y + 40], access=access), pixels[y : y + 40]
            )
            time.sleep(0.1)
        # The token is thought to be good for longer than it is, as where clocks differ.
        source = module.remote_for(access, "127.0.0.1")
        (container,) = source.signer._tokens
        source.signer._tokens[container] = ("sv=1&sig=stale", time.time() + 1000)
        tally = Tally()
        np.testing.assert_array_equal(
            read(href, grid[300:340], access=access, tally=tally), pixels[300:340]
        )
        assert tally.retried == 1
        assert counts(url)["refused"] == 1
    shown = caplog.text + "".join(capfd.readouterr())
    assert "B04.tif" in shown
    assert "sig=" not in shown


def test_a_token_service_that_gives_none(band):
    folder, grid, _ = band
    with serve(folder) as url:
        access = Access(
            kind="planetary-computer", href=f"{url}/nowhere", credentials_for=("127.0.0.1",)
        )
        with pytest.raises(ReadError, match=r"/nowhere gives no token for 127/B04\.tif: HTTP 404"):
            read(f"{url}/B04.tif", grid, access=access)


def test_a_lost_read_fails_unless_the_ledger_allows_it(archive, site):
    grid = grid_at(LEFT, TOP, 240, 180)
    scene = archive.scene("2020-07-05T10:00:00", grid, {"B04": 5, "B11": 6})
    Path(scene.assets["B04"].href).unlink()
    strict, lossy = Ledger(), Ledger(lossy=True)
    with pytest.raises(ReadError, match="No such file"):
        compute_stack(scenes.stack([scene], scenes.grid_of(site), ("B04", "B11"), ledger=strict))
    values = compute_stack(
        scenes.stack([scene], scenes.grid_of(site), ("B04", "B11"), ledger=lossy)
    )
    assert not values[0, 0].any()
    assert (values[0, 1] == 6).all()
    totals = lossy.totals()
    assert (totals["planned"], totals["read"], totals["lost"], totals["completeness"]) == (
        2,
        1,
        1,
        0.5,
    )
    assert strict.totals()["lost"] == 1
    (line,) = lossy.lost()
    assert line.startswith(f"{scene.id} B04: ")
    assert "No such file" in line


def test_what_is_lost_counts_as_not_observed(archive, site):
    """A date of which one band is lost is as if it had not been."""
    grid, rng = grid_at(LEFT, TOP, 240, 180), np.random.default_rng(0)
    listed = [
        archive.scene(
            f"2020-07-{day:02d}T10:00:00",
            grid,
            {"B04": rng.integers(1, 9000, (180, 240)), "B11": rng.integers(1, 9000, (90, 120))},
        )
        for day in (1, 6, 11, 16)
    ]
    recipe = Recipe(id="r", title="t", bands=("B04", "B11"), block_px=64, chunk_px=32)
    expected = composite(listed[1:], scenes.grid_of(site), recipe).compute()
    Path(listed[0].assets["B11"].href).write_bytes(b"gone")
    ledger = Ledger(lossy=True)
    got = composite(listed, scenes.grid_of(site), recipe, ledger).compute()
    assert expected.identical(got)
    assert ledger.totals()["lost"] == 12  # blocks


def test_a_ledger_goes_on_where_it_was(tmp_path):
    """Sums of two runs, kept as Parquet between them, by hand."""
    first = Ledger()
    first.add(
        "a",
        "B04",
        planned=2,
        read=1,
        lost=1,
        requests=5,
        retried=1,
        bytes=100,
        seconds=0.5,
        reason="why",
    )
    second = Ledger(before=first.to_parquet())
    second.add("a", "B04", planned=1, read=1, requests=2, bytes=10, seconds=0.25)
    second.add("b", "SCL", planned=1, read=1)
    table = second.table().set_index(["scene", "band"])
    assert table.loc[("a", "B04")].to_dict() == {
        "planned": 3, "read": 2, "lost": 1, "requests": 7, "retried": 1, "bytes": 110, "seconds": 0.75, "reason": "why"
    }  # fmt: skip
    assert second.totals()["completeness"] == 0.75
    assert second.lost() == ["a B04: why"]
    assert Ledger().totals()["completeness"] == 1


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


@pytest.fixture
def jp2(tmp_path):
    """Lossless JPEG 2000 of several tiles, as the products have it."""
    grid, pixels = (
        grid_at(LEFT, TOP, 700, 600),
        np.random.default_rng(0).integers(1, 4000, (600, 700)).astype(np.uint16),
    )
    path = tmp_path / "files" / "B04.jp2"
    path.parent.mkdir()
    options = {
        "driver": "JP2OpenJPEG",
        "REVERSIBLE": "YES",
        "QUALITY": "100",
        "BLOCKXSIZE": 256,
        "BLOCKYSIZE": 256,
    }
    with rasterio.open(
        path,
        "w",
        height=600,
        width=700,
        count=1,
        dtype="uint16",
        crs="EPSG:32633",
        transform=grid.transform,
        **options,
    ) as out:
        out.write(pixels, 1)
    return path, grid, pixels


def test_jpeg_2000_here_and_from_a_server_in_trouble(jp2, monkeypatch):
    """Also where the user has told GDAL to use threads, which would read past Python's files without an error."""
    monkeypatch.setenv("GDAL_NUM_THREADS", "ALL_CPUS")
    path, grid, pixels = jp2
    np.testing.assert_array_equal(read(str(path), grid[100:300, 200:500]), pixels[100:300, 200:500])
    with serve(path.parent, "--fail", 0.3, "--truncate", 0.1) as url:
        np.testing.assert_array_equal(
            read(f"{url}/B04.jp2", grid[100:300, 200:500]), pixels[100:300, 200:500]
        )


@pytest.fixture
def s3(monkeypatch):
    """An S3 server on loopback, and the keys it takes."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    yield f"http://127.0.0.1:{port}"
    server.stop()


def test_files_in_s3(s3, jp2, band):
    """As CDSE has them: JPEG 2000 under s3:// hrefs at an endpoint of its own, requests signed when they are made."""
    import obstore

    (path, grid, pixels), (folder, _, tif_pixels) = jp2, band
    urllib.request.urlopen(urllib.request.Request(f"{s3}/eodata", method="PUT"), timeout=20)
    access = Access(kind="s3", href=s3, region="default", credentials_for=("eodata",))
    bucket = bucket_of(access, "eodata")
    obstore.put(bucket, "a/B04.jp2", path)
    obstore.put(bucket, "a/B04.tif", folder / "B04.tif")
    np.testing.assert_array_equal(
        read("s3://eodata/a/B04.jp2", grid[100:300, 200:500], access=access),
        pixels[100:300, 200:500],
    )
    np.testing.assert_array_equal(read("s3://eodata/a/B04.tif", grid, access=access), tif_pixels)
    with pytest.raises(
        ReadError, match=r"^s3://eodata/a/none\.tif: cannot be read \(HTTP 404"
    ) as caught:
        read("s3://eodata/a/none.tif", grid, access=access)
    assert "ignature" not in str(caught.value)


def test_public_objects_are_asked_for_without_a_signature(band):
    folder, grid, pixels = band
    with serve(folder.parent) as url:
        access = Access(kind="s3", href=url, anonymous=True)
        np.testing.assert_array_equal(read("s3://files/B04.tif", grid, access=access), pixels)


def test_requests_to_s3_are_signed(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    access = Access(
        kind="s3", href="https://eodata.example.org", region="default", credentials_for=("eodata",)
    )
    url, _ = Remote(access).sign("s3://eodata/a b/x.jp2")
    assert url.startswith("https://eodata.example.org/eodata/a%20b/x.jp2?")
    assert "X-Amz-Signature=" in url
    assert "very-secret" not in url
    other, _ = Remote(access).sign("s3://elsewhere/a b/x.jp2")
    assert other == "https://eodata.example.org/elsewhere/a%20b/x.jp2"
    assert (
        Remote(Access()).sign("s3://eodata/x.jp2")[0]
        == "https://s3.us-east-1.amazonaws.com/eodata/x.jp2"
    )


def test_only_sources_of_kind_s3_use_an_endpoint_of_the_user(monkeypatch):
    """Any catalogue can name s3://, and would reach a private endpoint or the token service."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://10.0.0.5:9000")
    service = Access(kind="planetary-computer", href="https://tokens.example.org/token")
    for access in (Access(), service):
        remote = Remote(access, "stac.example.org")
        assert remote.sign("s3://a/b.tif") == (
            "https://s3.us-east-1.amazonaws.com/a/b.tif",
            None,
        )
        with pytest.raises(network.ForbiddenError, match=r"10\.0\.0\.5"):
            remote.check_address("10.0.0.5", "10.0.0.5")
    remote = Remote(Access(kind="s3", anonymous=True), "stac.example.org")
    assert remote.sign("s3://a/b.tif") == ("http://10.0.0.5:9000/a/b.tif", None)
    remote.check_address("10.0.0.5", "10.0.0.5")


def test_a_source_without_keys(monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    with pytest.raises(
        CatalogError,
        match=r"'cdse' reads from https://x, which needs keys: AWS_ACCESS_KEY_ID not set",
    ):
        check_credentials(Access(kind="s3", href="https://x", credentials_for=("b",)), "cdse")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    check_credentials(Access(kind="s3", href="https://x", credentials_for=("b",)), "cdse")
    for access in (Access(kind="s3", href="https://x"), Access(kind="s3")):
        with pytest.raises(
            CatalogError, match="'cdse' signs requests, but names no bucket: list its buckets in"
        ):
            check_credentials(access, "cdse")
    check_credentials(Access(kind="s3", href="https://x", anonymous=True), "cdse")
    check_credentials(Access(), "plain")


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


def test_a_redirect_shows_no_signature(band, caplog):
    folder, grid, pixels = band
    caplog.set_level("DEBUG")
    with serve(folder, "--redirect", "--fail", 0.3) as url:
        np.testing.assert_array_equal(read(f"{url}/B04.tif?sig=secret", grid), pixels)
    assert "Redirecting" in caplog.text
    assert "secret" not in caplog.text


def test_patience_begins_with_the_trouble(band, monkeypatch):
    """Not while a request waits for a connection that others have."""
    monkeypatch.setattr(module, "PATIENCE_S", 1.5)
    folder, grid, pixels = band
    access = Access(connections=1)
    with serve(folder, "--delay", 0.15, "--fail", 0.2) as url, ThreadPoolExecutor(12) as threads:
        windows = [grid[y : y + 50, :] for y in range(0, 600, 50)]
        got = list(threads.map(lambda w: read(f"{url}/B04.tif", w, access=access), windows))
    np.testing.assert_array_equal(np.concatenate(got), pixels)


def test_trouble_is_given_up_when_interrupted(band):
    folder, grid, _ = band
    with serve(folder, "--fail", 1) as url, ThreadPoolExecutor(1) as thread:
        reading, start = thread.submit(read, f"{url}/B04.tif", grid), time.monotonic()
        time.sleep(0.5)
        module.interruption.set()
        try:
            with pytest.raises(ReadError, match="HTTP 503; interrupted"):
                reading.result(timeout=20)
        finally:
            module.interruption.clear()
        assert time.monotonic() - start < 10


def test_a_lost_mask_takes_its_bands_with_it(archive):
    """One date of four: a quarter is gone, though it is one read of ten a block."""
    grid, where = grid_at(LEFT, TOP, 240, 180), grid_at(LEFT - 600, TOP + 600, 360, 300)
    days = (1, 6, 11, 16)
    listed = [
        archive.scene(f"2020-07-{day:02d}T10:00:00", where, {"B04": 5, "B11": 6}) for day in days
    ]
    Path(listed[0].assets["SCL"].href).unlink()
    ledger, recipe = (
        Ledger(lossy=True),
        Recipe(id="r", title="t", bands=("B04", "B11"), block_px=240, chunk_px=120),
    )
    made = composite(listed, grid, recipe, ledger).compute()
    assert (made.clear_count == 3).all()
    totals = ledger.totals()
    assert (totals["planned"], totals["lost"], totals["completeness"]) == (10, 1, 0.75)


def test_a_lost_band_is_read_around_and_counted_once(archive):
    """Its date is left out of all bands, for which the block is made again: what is read again was planned once."""
    grid, where = grid_at(LEFT, TOP, 240, 180), grid_at(LEFT - 600, TOP + 600, 360, 300)
    listed = [
        archive.scene(f"2020-07-{day:02d}T10:00:00", where, {"B04": 100 * day, "B11": 6})
        for day in (1, 6, 11, 16)
    ]
    Path(listed[2].assets["B11"].href).unlink()
    ledger, recipe = (
        Ledger(lossy=True),
        Recipe(id="r", title="t", bands=("B04", "B11"), block_px=240, chunk_px=120),
    )
    made = composite(listed, grid, recipe, ledger).compute()
    assert (made.clear_count == 3).all()
    assert np.unique(made.reflectance.sel(band="B04")) == [600]  # of 100, 600 and 1600
    totals = ledger.totals()
    assert (totals["planned"], totals["read"], totals["lost"], totals["completeness"]) == (
        12,
        11,
        1,
        11 / 12,
    )


def test_a_ledger_in_another_process_allows_no_loss(tmp_path):
    """Nobody would hear of it."""
    copy = pickle.loads(pickle.dumps(Ledger(lossy=True)))
    assert not copy.lossy
    assert copy.totals()["planned"] == 0


def test_a_read_that_gdal_makes_shows_no_url(band, caplog):
    """What fails within GDAL is told by the request that failed, not by GDAL's name for the file."""
    folder, grid, _ = band
    content = (folder / "B04.tif").read_bytes()
    (folder / "B04.tif").write_bytes(
        content[: len(content) // 2]
    )  # the header promises tiles that are not there
    with serve(folder) as url, pytest.raises(ReadError, match=rf"^{url}/B04\.tif: cannot be read"):
        read(f"{url}/B04.tif?sig=secret", grid, Resampling.nearest)
    assert "secret" not in caplog.text


# What must not be read


@contextmanager
def noted(folder, elsewhere=""):
    """URL of a server, and what it is asked."""
    asked = []
    with running(functools.partial(Noted, asked, elsewhere, directory=str(folder))) as url:
        yield url, asked


def test_a_token_is_for_the_hosts_that_the_source_names(band):
    """A foreign host is asked without it, by itself and after a redirect. `localhost` is another name of this machine."""
    folder, grid, pixels = band
    with noted(folder) as (url, asked):
        foreign = url.replace("127.0.0.1", "localhost")
        access = Access(
            kind="planetary-computer", href=f"{url}/token", credentials_for=("127.0.0.1",)
        )
        np.testing.assert_array_equal(read(f"{foreign}/B04.tif", grid, access=access), pixels)
        assert asked
        assert not [a for a in asked if "SECRET" in a or a.startswith("/token/")]
        with noted(folder, f"{foreign}/B04.tif") as (named, asked_first):
            access = Access(
                kind="planetary-computer", href=f"{named}/token", credentials_for=("127.0.0.1",)
            )
            np.testing.assert_array_equal(read(f"{named}/B04.tif", grid, access=access), pixels)
            assert any("SECRET" in a for a in asked_first)  # the named host does see it
        assert not [a for a in asked if "SECRET" in a or "uthorization" in a]


def test_a_backslash_hides_no_host(band):
    """urlsplit takes what follows @ for the host, urllib3 what comes before the backslash."""
    folder, grid, _ = band
    with noted(folder) as (url, asked):
        access = Access(
            kind="planetary-computer", href=f"{url}/token", credentials_for=("blob.example.org",)
        )
        with pytest.raises(ReadError, match="expected a URL without a backslash"):
            read(f"{url}\\@blob.example.org/c/B04.tif", grid, access=access)
        with pytest.raises(network.RequestError, match="expected a URL without a backslash"):
            Remote(access).head(f"{url}\\@blob.example.org/c/B04.tif", Tally())
        assert asked == []


class Misnumbered(Ranged):
    """Sends the headers given instead of its own."""

    def __init__(self, status, sent, *args, **kwargs):
        self.status, self.sent = status, sent
        super().__init__(*args, **kwargs)

    def do_GET(self):
        self.send_response(self.status)
        for name, value in self.sent.items():
            self.send_header(name, value)
        self.end_headers()
        self.close_connection = True


@pytest.mark.parametrize(
    ("status", "sent"),
    [
        (200, {"Content-Length": "abc"}),
        (200, {"Content-Length": "\u00b2"}),
        (302, {"Content-Length": "\u00b2", "Location": "/B04.tif"}),
        (206, {"Content-Range": f"bytes 0-9/{'9' * 5000}"}),
        (503, {"Retry-After": "\u00b2"}),
        (302, {"Location": "http://[::1/x"}),
    ],
)
def test_headers_without_sense_are_a_failed_read(band, monkeypatch, status, sent):
    monkeypatch.setattr(module, "PATIENCE_S", 0.5)
    folder, grid, _ = band
    handler = functools.partial(Misnumbered, status, sent, directory=str(folder))
    with running(handler) as url, pytest.raises(ReadError, match=r"B04\.tif: cannot be read"):
        read(f"{url}/B04.tif", grid)


@pytest.mark.parametrize(
    "href", ["http://[::1/B04.tif", "http://127.0.0.1:port/B04.tif", "s3://", "s3:///B04.tif"]
)
def test_an_invalid_url_is_not_read(href):
    with pytest.raises(ReadError, match="is not read"):
        read(href, grid_at(LEFT, TOP, 10, 10))


def test_a_bucket_is_no_host():
    """A host that has the name of a bucket is not given a token."""
    access = Access(kind="s3", href="https://s3.example.org", credentials_for=("eodata",))
    assert Remote(access).sign("https://eodata/c/B04.tif") == ("https://eodata/c/B04.tif", None)


def test_a_token_is_not_sent_in_the_clear():
    access = Access(
        kind="planetary-computer",
        href="https://tokens.example.org",
        credentials_for=("files.example.org",),
    )
    assert Remote(access).sign("http://files.example.org/c/B04.tif") == (
        "http://files.example.org/c/B04.tif",
        None,
    )


def test_another_bucket_is_asked_without_a_signature(band, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "KEY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    folder, grid, pixels = band
    with noted(folder.parent) as (url, asked):
        access = Access(kind="s3", href=url, region="default", credentials_for=("ours",))
        np.testing.assert_array_equal(read("s3://files/B04.tif", grid, access=access), pixels)
        assert asked
        assert not [a for a in asked if "KEY" in a or "X-Amz" in a or "uthorization" in a]
        with pytest.raises(ReadError, match="HTTP 404"):
            read("s3://ours/B04.tif", grid, access=access)
        assert "X-Amz-Signature" in asked[-1]


def test_a_name_of_a_public_catalogue_that_has_a_private_address_is_not_asked(band, monkeypatch):
    """Told when the connection is made, before a request is sent."""
    folder, grid, pixels = band
    lookup = socket.getaddrinfo
    ours = {"stac.example.org": "93.184.216.34", "files.example.org": "127.0.0.1"}
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *args, **more: lookup(ours.get(host, host), *args, **more),
    )
    with noted(folder) as (url, asked):
        href = f"{url}/B04.tif".replace("127.0.0.1", "files.example.org")
        with pytest.raises(
            ReadError,
            match=r"files\.example\.org has the address 127\.0\.0\.1, which is not public",
        ):
            read(href, grid, origin="stac.example.org")
        assert asked == []
        np.testing.assert_array_equal(
            read(href, grid, origin="files.example.org"), pixels
        )  # its own API is there


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_forbidden_address_is_sent_nothing(scheme):
    """Not even the beginning of a TLS connection, which tells the host's name."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        port = server.getsockname()[1]
        source = Remote(Access(), "93.184.216.34")
        with pytest.raises(network.RequestError, match=r"127\.0\.0\.1, which is not public"):
            source.head(f"{scheme}://127.0.0.1:{port}/B04.tif", Tally())
        connection, _ = server.accept()
        with connection:
            connection.settimeout(10)
            assert connection.recv(1) == b""


@pytest.mark.parametrize(
    "target", ["file:///data/B04.tif", "ftp://127.0.0.1/B04.tif", "http://169.254.169.254/B04.tif"]
)
def test_a_redirect_leads_nowhere_else(band, target):
    folder, grid, _ = band
    with (
        noted(folder, target) as (url, asked),
        pytest.raises(ReadError, match=r"B04\.tif: cannot be read"),
    ):
        read(f"{url}/B04.tif", grid)
    assert len(asked) == 1


def test_redirects_have_an_end(band):
    folder, grid, _ = band
    with (
        noted(folder, "/B04.tif") as (url, asked),
        pytest.raises(ReadError, match="more than 5 redirects"),
    ):
        read(f"{url}/B04.tif", grid)
    assert len(asked) == 6


@pytest.mark.parametrize("far", [False, True])
def test_a_virtual_format_is_not_followed(band, far):
    """A text that points at a file of ours, under the name of a GeoTIFF. GDAL alone would read it."""
    folder, grid, pixels = band
    with rasterio.open(folder / "B04.tif") as src:
        place, wkt = ", ".join(map(str, src.transform.to_gdal())), src.crs.to_wkt()
    source = f"<SimpleSource><SourceFilename>{folder / 'B04.tif'}</SourceFilename><SourceBand>1</SourceBand></SimpleSource>"
    (folder / "V.tif").write_text(
        f'<VRTDataset rasterXSize="700" rasterYSize="600"><SRS>{wkt}</SRS><GeoTransform>{place}</GeoTransform>'
        f'<VRTRasterBand dataType="UInt16" band="1">{source}</VRTRasterBand></VRTDataset>'
    )
    with rasterio.open(folder / "V.tif") as src:
        np.testing.assert_array_equal(src.read(1), pixels)
    with running(functools.partial(Ranged, directory=str(folder))) as url:
        href = f"{url}/V.tif" if far else str(folder / "V.tif")
        with pytest.raises(
            ReadError,
            match=r"V\.tif: is not read \(expected a GeoTIFF or JPEG 2000 file, found another format",
        ):
            read(href, grid)


@pytest.mark.parametrize("far", [False, True])
def test_overviews_in_another_file_are_not_followed(band, far):
    """A GeoTIFF that names a file of ours for its overviews. GDAL alone would read it."""
    folder, grid, _ = band
    small = grid_at(LEFT, TOP, 64, 64)
    write_tif(folder / "other.tif", np.full((64, 64), 4321, np.uint16), small)
    write_tif(folder / "V.tif", np.full((128, 128), 7, np.uint16), grid_at(LEFT, TOP, 128, 128))
    with rasterio.open(folder / "V.tif", "r+") as out:
        out.update_tags(ns="OVERVIEWS", OVERVIEW_FILE=str(folder / "other.tif"))
    with rasterio.Env(**images.SETTINGS), rasterio.open(folder / "V.tif") as src:
        assert np.unique(src.read(1, out_shape=(64, 64))) == [4321]
    with running(functools.partial(Ranged, directory=str(folder))) as url:
        href = f"{url}/V.tif" if far else str(folder / "V.tif")
        with pytest.raises(
            ReadError, match=r"V\.tif: is not read \(expected an image without OVERVIEWS metadata"
        ):
            read(href, grid)


@pytest.mark.parametrize(
    "href", ["/vsicurl/{url}/B04.tif", "/vsis3/bucket/B04.tif", "GTIFF_DIR:1:{folder}/B04.tif"]
)
def test_gdals_own_names_are_not_opened(band, href):
    folder, grid, _ = band
    with pytest.raises(ReadError, match=r"it is a special name of GDAL|found GTIFF_DIR:"):
        read(href.format(url="http://127.0.0.1:1", folder=folder), grid)


def test_file_urls_are_local_files(band):
    folder, grid, pixels = band
    (folder / "a b.tif").write_bytes((folder / "B04.tif").read_bytes())
    np.testing.assert_array_equal(read(f"file://{folder}/a%20b.tif", grid), pixels)
    with pytest.raises(
        ReadError, match=r"it is a local file, but its catalogue is at stac\.example\.org"
    ):
        read(f"file://{folder}/a%20b.tif", grid, origin="stac.example.org")


def test_what_is_no_file_is_not_opened(band):
    """GDAL would wait for a pipe for ever."""
    folder, grid, _ = band
    os.mkfifo(folder / "P.tif")
    with pytest.raises(ReadError, match="expected a file, found something else"):
        read(str(folder / "P.tif"), grid)


def test_files_beside_an_image_are_not_read(tmp_path):
    """A no-data value and a place, both of which GDAL would take over."""
    grid, pixels = grid_at(LEFT, TOP, 60, 60), unique_pixels(60, 60)
    path = write_tif(tmp_path / "B04.tif", pixels, grid, nodata=None)
    wrong = f"<PAMDataset><PAMRasterBand band='1'><NoDataValue>{pixels[5, 5]}</NoDataValue></PAMRasterBand></PAMDataset>"
    path.with_suffix(".tif.aux.xml").write_text(wrong)
    with rasterio.open(path) as src:
        assert src.nodata == pixels[5, 5]
    np.testing.assert_array_equal(read(str(path), grid), pixels)


def test_world_files_are_not_read(tmp_path):
    grid, path = grid_at(LEFT, TOP, 60, 60), tmp_path / "bare.tif"
    warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
    shape = {"height": 60, "width": 60, "count": 1, "dtype": "uint16"}
    with rasterio.open(path, "w", driver="GTiff", crs="EPSG:32633", **shape) as out:
        out.write(unique_pixels(60, 60), 1)
    path.with_suffix(".tfw").write_text(f"10\n0\n0\n-10\n{LEFT + 5}\n{TOP - 5}\n")
    with rasterio.open(path) as src:
        assert src.transform == grid.transform
    with pytest.raises(ReadError, match="cannot be read"):
        read(str(path), grid)


HUGE = {
    "pixels": (
        {"height": 200_000, "width": 200_000, "blockxsize": 512, "blockysize": 512},
        r"200,000 x 200,000",
    ),
    "a tile": (
        {"height": 600, "width": 700, "blockxsize": 50_000, "blockysize": 50_000},
        r"tiles of .* 50,000 x 50,000",
    ),
}


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("what", HUGE)
def test_a_header_that_says_too_much_is_believed_before_a_pixel_is_read(tmp_path, what, far):
    """The files are sparse: a few kilobytes, whose header merely says so."""
    options, said = HUGE[what]
    grid = grid_at(LEFT, TOP, 700, 600)
    with rasterio.open(
        tmp_path / "B04.tif", "w", driver="GTiff", count=1, dtype="uint16", tiled=True, sparse_ok=True, crs="EPSG:32633",
        transform=grid.transform, BIGTIFF="YES", **options,
    ):  # fmt: skip
        pass
    assert (tmp_path / "B04.tif").stat().st_size < 5e6
    with running(functools.partial(Ranged, directory=str(tmp_path))) as url:
        tracemalloc.start()
        with pytest.raises(ReadError, match=said):
            read(f"{url}/B04.tif" if far else str(tmp_path / "B04.tif"), grid)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 10e6


def test_a_band_as_large_as_a_tile_is_read(tmp_path):
    """10,980 pixels a side, in one strip a row, are what a product has."""
    grid = grid_at(LEFT, TOP, 10_980, 10_980)
    with rasterio.open(
        tmp_path / "B04.tif", "w", driver="GTiff", count=1, dtype="uint16", height=10_980, width=10_980, sparse_ok=True,
        crs="EPSG:32633", transform=grid.transform,
    ):  # fmt: skip
        pass
    assert not read(str(tmp_path / "B04.tif"), grid[:10, :10]).any()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate of localhost that only it has signed, and its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    made = made.not_valid_before(now - dt.timedelta(1)).not_valid_after(now + dt.timedelta(1))
    made = made.add_extension(
        x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False
    )
    signed = made.add_extension(
        x509.BasicConstraints(ca=True, path_length=None), critical=True
    ).sign(key, hashes.SHA256())
    path = tmp_path_factory.mktemp("tls") / "localhost.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(signed.public_bytes(serialization.Encoding.PEM) + private)
    return path


@contextmanager
def running_tls(handler, certificate):
    """The handler on a server of TLS; yields its URL."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"https://localhost:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_a_file_is_read_over_tls_from_a_server_with_a_trusted_certificate(
    band, certificate, monkeypatch
):
    folder, grid, pixels = band
    monkeypatch.setattr(
        module, "_REMOTES", {}
    )  # connections keep the certificates that they began with
    handler = functools.partial(Ranged, directory=str(folder))
    with running_tls(handler, certificate) as url:
        monkeypatch.setattr(network, "REFUSED_S", 0.0)
        monkeypatch.setattr(network, "PATIENCE_S", 0.0)
        with pytest.raises(ReadError, match="certificate"):
            read(f"{url}/B04.tif", grid)
        with pytest.raises(requests.exceptions.SSLError), module.Session() as session:
            session.get(url, timeout=10)
        monkeypatch.setattr(module, "_REMOTES", {})
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        np.testing.assert_array_equal(read(f"{url}/B04.tif", grid), pixels)
        with module.Session() as session:
            answer = session.get(f"{url}/B04.tif", timeout=10, headers={"Range": "bytes=0-9"})
            assert answer.content == (folder / "B04.tif").read_bytes()[:10]
