"""A read of a server in trouble is tried again, given up or lost, and names its cause."""

from __future__ import annotations

import functools
import socket
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from known_scenes import grid_at, serve
from known_servers import LEFT, TOP, Ranged, counts, running
from minecube import network
from minecube.catalog import Access
from minecube.errors import LostReadError, ReadError, UnusableFileError
from minecube.reader import find_missing, read
from minecube.reader import remote as module
from minecube.reader.remote import HEAD_BYTES, Tally

pytestmark = pytest.mark.usefixtures("all_hosts_are_tried")


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


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_what_passes_is_tried_until_patience_ends(band, status, clock):
    folder, grid, _ = band
    start = clock.now
    with serve(folder, "--fail", 1, "--status", status) as url:
        with pytest.raises(ReadError, match=rf"HTTP {status}, after \d+ tries in \d+ s"):
            read(f"{url}/B04.tif", grid)
        assert counts(url)["requests"] >= 4
    assert 0 < clock.now - start - module.PATIENCE_S < 20  # the last pause is of 15 s at most


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


class Misnumbered(Ranged):
    """Sends the headers given instead of its own."""

    def __init__(self, status, sent, *args, **kwargs):
        self.status, self.sent = status, sent
        super().__init__(*args, **kwargs)

    def do_GET(self):  # noqa: N802  the name that http.server calls
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
@pytest.mark.usefixtures("clock")
def test_headers_without_sense_are_a_failed_read(band, status, sent):
    folder, grid, _ = band
    handler = functools.partial(Misnumbered, status, sent, directory=str(folder))
    with running(handler) as url, pytest.raises(ReadError, match=r"B04\.tif: cannot be read"):
        read(f"{url}/B04.tif", grid)
