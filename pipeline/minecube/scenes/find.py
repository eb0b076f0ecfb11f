"""Asking a STAC API, or a file of items, for all that it lists of an area and a year: every page, each item once."""

from __future__ import annotations

import functools
import io
import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pystac
import pystac_client
import requests
import shapely
import stac_geoparquet.arrow
from pystac_client.errors import ClientTypeError
from pystac_client.exceptions import APIError
from pystac_client.stac_api_io import StacApiIO
from pystac_client.warnings import DoesNotConformTo
from shapely.geometry.base import BaseGeometry
from urllib3 import Retry

from minecube.catalog import Source
from minecube.errors import SceneError
from minecube.grid import split_at_antimeridian
from minecube.scenes.normalise import taken

log = logging.getLogger(__name__)

PAGE = 100
"""Items a page."""
_API_FAULTS = (
    APIError,
    ClientTypeError,
    DoesNotConformTo,
    requests.RequestException,
    pystac.errors.STACError,
    # What the client makes of answers that are JSON, but no STAC.
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
)
_RETRIES = Retry(
    total=8,
    backoff_factor=0.5,
    backoff_jitter=0.5,
    status_forcelist=[429, 500, 502, 503, 504],  # Retry-After is honoured
    allowed_methods=None,  # POST too: pystac-client searches with it, and urllib3 leaves it out by default
)


@dataclass
class _Pace:
    """Lets one request start every `every_s`, whatever thread it comes from."""

    every_s: float
    _next: float = 0.0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def wait(self) -> None:
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next)
            self._next = start + self.every_s
        time.sleep(start - now)


@functools.cache
def _pace(href: str, searches_per_s: float) -> _Pace:
    """The pace of all requests of this process to one API."""
    log.debug("%s: at most %g requests a second", href, searches_per_s)
    return _Pace(1 / searches_per_s)


class _PacedIO(StacApiIO):
    """The client's requests at the pace that the source allows."""

    def __init__(self, pace: _Pace) -> None:
        super().__init__(max_retries=_RETRIES, timeout=60)
        self._pace = pace

    def request(self, *args: Any, **kwargs: Any) -> str:
        self._pace.wait()
        return super().request(*args, **kwargs)


def items_of(source: Source, area: BaseGeometry, year: int) -> list[pystac.Item]:
    """Everything the source lists of that calendar year over the area (EPSG:4326), as it lists it.

    Raises:
        SceneError: the source does not answer, or its pages held another number of items than it says match.
    """
    return _from_api(source, area, year) if source.kind == "stac-api" else _from_file(source, area, year)


def _from_api(source: Source, area: BaseGeometry, year: int) -> list[pystac.Item]:
    """Month by month, so that no sequence of pages is long enough to break."""
    by_id: dict[str, pystac.Item] = {}
    try:
        stac_io = _PacedIO(_pace(source.href, source.searches_per_s))
        client = pystac_client.Client.open(source.href, stac_io=stac_io)
        for month in (f"{year}-{number:02d}" for number in range(1, 13)):
            if source.since and month < source.since:
                continue
            ids, matched = _month(client, source.collection, area, month)
            if matched is not None and matched != len(ids):  # items may have been added between two pages
                ids, matched = _month(client, source.collection, area, month)
            if matched is not None and matched != len(ids):
                raise SceneError(
                    f"{source.href}: says {matched} items match {month}, its pages held {len(ids)}; scenes would be "
                    "missing without a trace, so nothing is built; search again"
                )
            by_id |= ids
    except _API_FAULTS as error:
        raise SceneError(f"{source.href}: the search for {year} failed ({error}); check the URL and the network") from error
    return list(by_id.values())


def _month(
    client: pystac_client.Client, collection: str, area: BaseGeometry, month: str
) -> tuple[dict[str, pystac.Item], int | None]:
    """Items by id, and how many the API says match, where it does."""
    asked = client.search(collections=[collection], intersects=shapely.geometry.mapping(area), datetime=month, limit=PAGE)
    pages = list(asked.pages_as_dicts())
    # Not migrated to the newest STAC: `normalise` reads old and new, and migration warns about what it cannot move.
    ids = {d["id"]: pystac.Item.from_dict(d, migrate=False) for page in pages for d in page["features"]}
    # The first page tells; the client would ask for it once more.
    context = pages[0].get("context") or {} if pages else {}
    return ids, pages[0].get("numberMatched", context.get("matched")) if pages else None


def _from_file(source: Source, area: BaseGeometry, year: int) -> list[pystac.Item]:
    found = [i for i in read_items(source.href) if (when := taken(i)) is None or when.year == year]
    found = [i for i in found if not i.geometry or over(i, area)]
    folder = source.href.rpartition("/")[0]  # a local one is absolute: the catalogue's loader sees to it
    for item in found:
        for asset in item.assets.values():
            if "://" not in asset.href and not asset.href.startswith("/"):
                asset.href = f"{folder}/{asset.href.removeprefix('./')}"
    return found


def over(item: pystac.Item, area: BaseGeometry) -> bool:
    """Whether the item's footprint meets the area, also where either crosses the antimeridian."""
    return bool(shapely.intersects(split_at_antimeridian(shapely.geometry.shape(item.geometry)), area))


def read_items(path: Path | str) -> list[pystac.Item]:
    """All items of a stac-geoparquet file, local or remote; raises SceneError where it is none."""
    try:
        table = pq.read_table(_fetched(path) if str(path).startswith(("http://", "https://")) else path)
        found = [pystac.Item.from_dict(d, migrate=False) for d in stac_geoparquet.arrow.stac_table_to_items(table)]
    except (OSError, ValueError, KeyError, TypeError) as error:  # requests' errors are OSErrors
        raise SceneError(f"{path}: cannot be read as stac-geoparquet ({error}); check the path, or search again") from error
    return found


def _fetched(url: Path | str) -> io.BytesIO:
    """A remote file as a whole: an index of scenes is small beside one scene."""
    answer = requests.get(str(url), timeout=60)
    answer.raise_for_status()
    return io.BytesIO(answer.content)
