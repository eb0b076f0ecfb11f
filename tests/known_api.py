"""A STAC API on loopback that lists known items, and can misbehave."""

from __future__ import annotations

import functools
import json
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_SPACES = 1_000_000


@dataclass
class Api:
    """What the API lists, how it misbehaves, and how often it was asked."""

    items: list[Any]
    url: str = ""
    posts: int = 0
    """Searches asked so far, each page counted."""
    fail_first: int = 0
    """Searches that fail before the first answer."""
    retry_after: str = ""
    """When to come back, as failures say it."""
    lose: bool = False
    """Leave the last item out."""
    html: bool = False
    """Answer a web page instead of the catalogue."""
    old: bool = False
    """Give the number of items as versions before 1.0 did."""
    hang: bool = False
    """Wait two seconds before each answer."""
    next_href: str | None = None
    """Link to the next page."""
    moved_to: str = ""
    """Where the catalogue redirects to."""
    search_href: str = ""
    """Link to the search."""
    page_size: int = 10
    page_bytes: list[int] = field(default_factory=list)
    """Unpacked sizes of the next pages with items, filled up with spaces."""
    endless: bool = False
    """Let each page link to itself as the next one."""
    month: str = ""
    """The month that has all items, whatever time they name."""
    down: str = ""
    """Refuse searches of a time that begins so."""


@contextmanager
def serve_api(items: list[Any]) -> Iterator[Api]:
    """Answer GET / and POST /search from a list of items, page by page."""
    api = Api(items)
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, api))
    api.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield api
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def serve_recorded_search(real_data: Path) -> Iterator[Api]:
    """Serve the items of the search that was recorded from Earth Search."""
    recorded = [
        json.loads(p.read_text())
        for p in sorted((real_data / "stac_items" / "search_pages").glob("*.json"))
    ]
    with serve_api([f for page in recorded for f in page["response"]["features"]]) as api:
        yield api


class _Handler(BaseHTTPRequestHandler):
    """Answers for one `Api`."""

    def __init__(self, api: Api, *args: Any) -> None:
        self.api = api
        super().__init__(*args)  # answers the request

    def log_message(self, *args: Any) -> None:
        pass

    def answer(
        self,
        content: Any,
        status: int = 200,
        kind: str = "application/geo+json",
        retry_after: str = "",
        size: int = 0,
    ) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        if size:
            body = _pack(body, size)
            self.send_header("Content-Encoding", "gzip")
        if retry_after:
            self.send_header("Retry-After", retry_after)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.api.moved_to:
            self.send_response(302)
            self.send_header("Location", self.api.moved_to)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif self.api.html:
            self.answer(b"<html>maintenance</html>", kind="text/html")
        else:
            self.answer(_landing_page(self.api))

    def do_POST(self) -> None:
        api = self.api
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        api.posts += 1
        if api.hang:
            time.sleep(2)
        if api.posts <= api.fail_first:
            self.answer(
                {"code": "busy"},
                status=429 if api.retry_after else 503,
                retry_after=api.retry_after,
            )
        elif api.down and asked["datetime"].startswith(api.down):
            self.answer({"code": "refused"}, status=400)
        else:
            page = _search_page(api, asked)
            size = api.page_bytes.pop(0) if page["features"] and api.page_bytes else 0
            self.answer(page, size=size)


def _pack(body: bytes, size: int) -> bytes:
    """Fill up with spaces to this size, and compress."""
    spaces, rest = divmod(size - len(body), _SPACES)
    return _gzip(body) + spaces * _gzip(b" " * _SPACES) + _gzip(b" " * rest)


def _gzip(content: bytes) -> bytes:
    """Compress to an eighth at best: clients unpack more at once only slowly."""
    packer = zlib.compressobj(wbits=31, strategy=zlib.Z_HUFFMAN_ONLY)
    return packer.compress(content) + packer.flush()


def _landing_page(api: Api) -> dict[str, Any]:
    return {
        "type": "Catalog",
        "id": "test",
        "stac_version": "1.0.0",
        "description": "test",
        "conformsTo": [
            "https://api.stacspec.org/v1.0.0/core",
            "https://api.stacspec.org/v1.0.0/item-search",
        ],
        "links": [
            {"rel": "self", "href": api.url},
            {"rel": "root", "href": api.url},
            {
                "rel": "search",
                "href": api.search_href or f"{api.url}/search",
                "method": "POST",
                "type": "application/geo+json",
            },
        ],
    }


def _search_page(api: Api, asked: dict[str, Any]) -> dict[str, Any]:
    first, last = asked["datetime"].split("/")
    if api.month:
        match = api.items if first.startswith(api.month) else []
    else:
        match = [i for i in api.items if first <= i["properties"]["datetime"] <= last]
    at = asked.get("token", 0)
    page = match[at : at + api.page_size]
    links = []
    if at + api.page_size < len(match):
        body = {**asked, "token": at if api.endless else at + api.page_size}
        href = api.next_href or f"{api.url}/search"
        links = [{"rel": "next", "href": href, "method": "POST", "body": body}]
    # A page that repeats an item of the last one, as the recorded searches do.
    again = match[at - 1 : at] if at else []
    shown = page[:-1] if api.lose and not links else [*again, *page]
    told = {"context": {"matched": len(match)}} if api.old else {"numberMatched": len(match)}
    return {"type": "FeatureCollection", "features": shown, "links": links, **told}
