"""A STAC API on loopback that lists known items, and can misbehave."""

from __future__ import annotations

import functools
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PAGE = 10
"""Items per page."""


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


@contextmanager
def serve_api(items: list[Any]) -> Iterator[Api]:
    """Answer GET / and POST /search from a list of items, ten a page."""
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
    ) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
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
        else:
            self.answer(_search_page(api, asked))


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
    match = [i for i in api.items if first <= i["properties"]["datetime"] <= last]
    at = asked.get("token", 0)
    page = match[at : at + PAGE]
    links = []
    if at + PAGE < len(match):
        body = {**asked, "token": at + PAGE}
        href = api.next_href or f"{api.url}/search"
        links = [{"rel": "next", "href": href, "method": "POST", "body": body}]
    # A page that repeats an item of the last one, as the recorded searches do.
    again = match[at - 1 : at] if at else []
    shown = page[:-1] if api.lose and not links else [*again, *page]
    told = {"context": {"matched": len(match)}} if api.old else {"numberMatched": len(match)}
    return {"type": "FeatureCollection", "features": shown, "links": links, **told}
