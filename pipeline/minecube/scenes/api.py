"""List the items of a STAC API for an area and a year.

All pages are read, and each item counts once. Links and redirects of an API stay on its host. The
size of answers is limited: `_PAGE_BYTES` per answer, `_MONTH_BYTES` and `_PAGES` per month.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import random
import threading
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin

import pystac
import pystac_client
import requests
import shapely
from pystac_client.errors import ClientTypeError
from pystac_client.exceptions import APIError
from pystac_client.stac_api_io import StacApiIO
from pystac_client.warnings import DoesNotConformTo
from shapely.geometry.base import BaseGeometry

from minecube import network
from minecube.catalog import Source
from minecube.errors import SceneError, UnansweredError
from minecube.grid import clean_footprint
from minecube.network import ForbiddenError, RequestError, origin_of
from minecube.reader.remote import Session, parse_retry_after
from minecube.scenes.features import Feature
from minecube.scenes.footprints import parse_shape

log = logging.getLogger(__name__)

PAGE = 100
"""Items per page."""
_PAGE_BYTES = 100_000_000  # per answer of an API; 100 items take about a megabyte
_PAGES = 200  # per month: 20,000 items; a site has a few dozen
_MONTH_BYTES = 200_000_000  # per month
_CONNECT_S = 10.0
_READ_S = 60.0
_PAUSE_S = 0.5  # before the first retry; doubles each time, except after a refused connection
_TEMPORARY = {429, 500, 502, 503, 504}
"""HTTP statuses of temporary failures."""
_TRIES = 9
_HUNG_TRIES = 2  # for requests without an answer in `_READ_S`
_API_FAULTS = (
    APIError,
    ForbiddenError,
    ClientTypeError,
    DoesNotConformTo,
    OSError,  # also of requests
    pystac.errors.STACError,
    # The client's reaction to answers in JSON but not in STAC.
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
)


def search_api(source: Source, area: BaseGeometry, year: int) -> list[Feature]:
    """List the items of an API for a calendar year and an area in EPSG:4326.

    Raises:
        UnansweredError: the API does not answer, or its pages differ from its own count.
        SceneError: a link leads to another host.
    """
    try:
        by_id = _search_year(source, area, year)
    except (ForbiddenError, RequestError) as error:
        kind = SceneError if isinstance(error, ForbiddenError) else UnansweredError
        raise kind(f"{source.href}: the search for {year} failed ({error})") from error
    except _API_FAULTS as error:
        raise UnansweredError(
            f"{source.href}: the search for {year} failed ({error}); check the URL and the network"
        ) from error
    return [feature for feature in by_id.values() if _may_lie_over(feature, area)]


def _may_lie_over(feature: Feature, area: BaseGeometry) -> bool:
    """Return whether the footprint meets the area.

    True without a footprint, so the item is refused by name later.
    """
    footprint = clean_footprint(parse_shape(feature.get("geometry")))
    return bool(footprint.is_empty or shapely.intersects(footprint, area))


def _search_year(source: Source, area: BaseGeometry, year: int) -> dict[str, Feature]:
    """Search month by month, to keep each sequence of pages short. Return items by id."""
    by_id: dict[str, Feature] = {}
    stac_io = _SourceIO(source)
    client = pystac_client.Client.open(source.href, stac_io=stac_io)
    for month in (f"{year}-{number:02d}" for number in range(1, 13)):
        if source.since and month < source.since:
            continue
        # Items may have been added between two pages, so a wrong count gets a second search.
        for _ in range(2):
            stac_io.begin_month()
            items, matched = _search_month(client, source.collection, area, month)
            if matched in (None, len(items)):
                break
        else:
            raise UnansweredError(
                f"{source.href}: expected {matched} items of {month}, as it counts them, "
                f"found {len(items)} in its pages; search again"
            )
        by_id |= items
    return by_id


def _search_month(
    client: pystac_client.Client, collection: str, area: BaseGeometry, month: str
) -> tuple[dict[str, Feature], int | None]:
    """Return items by id, and the API's own count or None."""
    query = client.search(
        collections=[collection],
        intersects=shapely.geometry.mapping(area),
        datetime=month,
        limit=PAGE,
    )
    pages = list(itertools.islice(query.pages_as_dicts(), _PAGES + 1))
    if len(pages) > _PAGES:
        raise RequestError(f"expected at most {_PAGES} pages of {month}, found more")
    items: dict[str, Feature] = {}
    for page in pages:
        for feature in page["features"]:
            items[_key(feature)] = feature if isinstance(feature, dict) else {}
    if not pages:
        return items, None
    # Use the count in the first page. The client would request that page again.
    context = pages[0].get("context") or {}
    return items, pages[0].get("numberMatched", context.get("matched"))


def _key(feature: object) -> str:
    """Return a key shared by two listings of one item: its id, or the whole item without one."""
    name = feature.get("id") if isinstance(feature, dict) else None
    if isinstance(name, str):
        return name
    return json.dumps(feature, sort_keys=True)


@dataclass
class _Pace:
    """Rate limit shared by all threads: one request starts every `every_s`."""

    every_s: float
    _next_start: float = 0.0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def wait(self) -> None:
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next_start)
            self._next_start = start + self.every_s
        time.sleep(start - now)


@functools.cache
def _pace_of(href: str, searches_per_s: float) -> _Pace:
    """Return the rate limit shared by this process's requests to one API."""
    log.debug("%s: at most %g requests a second", href, searches_per_s)
    return _Pace(1 / searches_per_s)


class _ApiSession(Session):
    """Session with redirects restricted to the same host."""

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        """Return the target of a redirect. Raise ForbiddenError if it is on another host."""
        target = super().get_redirect_target(resp)
        return target and _need_host(target, origin_of(resp.url))


def _need_host(url: str, host: str) -> str:
    """Return the URL. Raise ForbiddenError if it is on another host."""
    network.check_url(url, host)
    host_of_url = network.host_of(url)
    if host_of_url != host:
        raise ForbiddenError(
            f"it leads to {host_of_url}; links and redirects of an API must stay on its host"
        )
    return url


class _SourceIO(StacApiIO):
    """Client requests with limits: the source's host only, its rate, and bounded answers."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.session = _ApiSession()
        self._pace = _pace_of(source.href, source.searches_per_s)
        self._page_url = source.href
        self._host = origin_of(source.href)
        self._budget = _MONTH_BYTES

    def begin_month(self) -> None:
        """Reset the byte budget to `_MONTH_BYTES`."""
        self._budget = _MONTH_BYTES

    def read_text(self, source: pystac.link.HREF, *args: Any, **kwargs: Any) -> str:
        """Read the target of a link or URL.

        The client's own method would open a link without a scheme as a local file.
        """
        if isinstance(source, pystac.Link):
            return super().read_text(source, *args, **kwargs)
        return self.request(str(source), *args, **kwargs)

    def request(
        self,
        href: str,
        method: str | None = None,
        headers: dict[str, str] | None = None,
        parameters: dict[str, Any] | None = None,
    ) -> str:
        """Return the body of the answer. Raise APIError, ForbiddenError or RequestError."""
        url = _need_host(urljoin(self._page_url, href), self._host)
        verb = (method or "GET").upper()
        if verb not in ("GET", "POST"):
            raise ForbiddenError(f"expected a link to GET or POST, found {verb}")
        self._page_url = url
        request = requests.Request(verb, url, headers=headers)
        if verb == "POST":
            request.json = parameters
        elif parameters:
            request.params = parameters
        self._pace.wait()
        with self._send(url, request) as answer:
            body = _read_body(answer, _PAGE_BYTES)
        self._budget -= len(body)
        if self._budget < 0:
            raise RequestError(f"expected at most {_MONTH_BYTES:,} bytes of one month, found more")
        if not answer.ok:
            text = body[:200].decode(errors="replace")
            raise APIError(f"HTTP {answer.status_code} {answer.reason}: {text}")
        return body.decode()

    def _send(self, url: str, request: requests.Request) -> requests.Response:
        """Send a request and retry temporary failures. The answer's body is not read yet."""
        network.need_reachable(url)
        prepared = self.session.prepare_request(request)
        settings = self.session.merge_environment_settings(url, {}, True, None, None)
        start = time.monotonic()
        for attempt in itertools.count(1):
            jitter = random.uniform(0, _PAUSE_S)  # noqa: S311  no secret depends on it
            pause = _PAUSE_S * 2 ** (attempt - 1) + jitter
            try:
                answer = self.session.send(prepared, timeout=(_CONNECT_S, _READ_S), **settings)
            # Read timeouts may arrive as ConnectionError too.
            except requests.exceptions.ConnectionError as error:
                lasted_s = time.monotonic() - start
                pause = _pause_after(error, url, lasted_s, attempt) or pause
            except requests.exceptions.Timeout as error:
                if attempt >= _HUNG_TRIES:
                    raise _hung(url) from error
            else:
                pause = max(pause, parse_retry_after(answer.headers.get("Retry-After")))
                is_final = answer.status_code not in _TEMPORARY or attempt >= _TRIES
                if is_final or pause > network.PATIENCE_S:
                    return answer
                answer.close()
            time.sleep(pause)
        raise AssertionError  # the loop has no end


def _hung(url: str) -> RequestError:
    """Return the error for a host without an answer, and remember the host as unreachable."""
    reason = (
        f"{origin_of(url)} accepted the connection, but sent nothing for {_READ_S:.0f} s: "
        "try again later"
    )
    network.note_unreachable(url, reason)
    return RequestError(reason)


def _pause_after(
    error: requests.exceptions.ConnectionError, url: str, lasted_s: float, attempt: int
) -> float | None:
    """Return the seconds to wait after a failed connection, or None for the usual wait.

    Raises:
        RequestError: there is no further try.
    """
    reason = network.explain_unreachable(url, error)
    if reason and lasted_s + _PAUSE_S > network.REFUSED_S:
        network.note_unreachable(url, reason)
        raise RequestError(reason) from error
    if attempt >= _TRIES:
        raise RequestError(
            f"{origin_of(url)} broke {attempt} connections: try again later"
        ) from error
    return _PAUSE_S if reason else None


def _read_body(answer: requests.Response, most_bytes: int) -> bytes:
    """Return the unpacked body. Raise RequestError if it is too long or too late."""
    body = bytearray()
    deadline = time.monotonic() + network.PATIENCE_S
    for part in answer.iter_content(65536):
        body += part
        if len(body) > most_bytes:
            raise RequestError(f"expected an answer of at most {most_bytes:,} bytes, found more")
        if time.monotonic() > deadline:
            raise RequestError(f"the answer was not complete after {network.PATIENCE_S:.0f} s")
    return bytes(body)
