"""Servers of image files on this machine, and the files that they serve."""

from __future__ import annotations

import functools
import json
import re
import threading
import urllib.request
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import rasterio

from known_scenes import grid_at, write_tif

LEFT, TOP = 360000, 5600040


def counts(url):
    with urllib.request.urlopen(f"{url}/counts") as answer:
        return json.load(answer)


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


def write_band(folder):
    """A tiled file of 700 x 600 pixels no two of which are alike: its folder, grid and pixels."""
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
    write_tif(folder / "files" / "B04.tif", pixels, grid, **as_cog)
    return folder / "files", grid, pixels


def write_jp2(folder):
    """Lossless JPEG 2000 of several tiles, as the products have it: its path, grid and pixels."""
    grid, pixels = (
        grid_at(LEFT, TOP, 700, 600),
        np.random.default_rng(0).integers(1, 4000, (600, 700)).astype(np.uint16),
    )
    path = folder / "files" / "B04.jp2"
    path.parent.mkdir(exist_ok=True)
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


@contextmanager
def noted(folder, elsewhere=""):
    """URL of a server, and what it is asked."""
    asked = []
    with running(functools.partial(Noted, asked, elsewhere, directory=str(folder))) as url:
        yield url, asked
