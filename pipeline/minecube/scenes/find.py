"""List all items of an area and a year, from a STAC API or a file of items.

All pages are read, and each item counts once. Links and redirects of an API stay on its host. The
size of answers is limited: `_PAGE_BYTES` per answer, `_MONTH_BYTES` and `_PAGES` per month.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import logging
import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
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
from minecube.grid import footprint_of
from minecube.network import ForbiddenError, RequestError, is_local, local_path, origin_of
from minecube.reader.remote import Session, access_to, remote_for, retry_after
from minecube.scenes.normalise import UNREAD_TIME, shape_of

log = logging.getLogger(__name__)

Feature = dict[str, Any]
Ints = npt.NDArray[np.int64]

PAGE = 100
"""Items per page."""
_PAGE_BYTES = 100_000_000  # per answer of an API; 100 items take about a megabyte
_PAGES = 200  # per month: 20,000 items; a site has a few dozen
_MONTH_BYTES = 200_000_000  # per month
_INDEX_BYTES = 2**30  # per file of items, packed and unpacked
_INDEX_ITEMS = 1_000_000
_FRESH_S = 60.0  # interval between checks of a remote file for changes
_MOST_KEPT = 8  # files of items kept in memory
_TIMES = (
    "datetime",
    "start_datetime",
    "end_datetime",
    "created",
    "updated",
    "published",
    "unpublished",
    "expires",
)
"""Columns with times."""
_TOP = {"type", "stac_version", "stac_extensions", "id", "collection"}
"""Columns outside the properties, apart from place and assets."""
_TYPE_SHOWN = 60  # characters of a type shown in an error
_BATCH = 1000  # rows of a file of items unpacked at a time
_CONNECT_S, _READ_S = 10.0, 60.0
_PAUSE_S = 0.5  # before the first retry; doubles each time, except after a refused connection
_AGAIN = {429, 500, 502, 503, 504}
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
_FILE_FAULTS = (
    OSError,
    ValueError,
    LookupError,
    ArithmeticError,
    TypeError,
    AttributeError,
    RuntimeError,  # also RecursionError and NotImplementedError
    pa.ArrowException,
    pystac.errors.STACError,
    pystac.errors.STACTypeError,
    shapely.errors.ShapelyError,
)
"""Errors raised by files other than stac-geoparquet."""
_TRIES = 9
_HUNG_TRIES = 2  # for requests without an answer in `_READ_S`


class _ColumnError(Exception):
    """An unreadable type of a column in a file of items."""


@dataclass
class _Pace:
    """Rate limit shared by all threads: one request starts every `every_s`."""

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
    """Return the rate limit shared by this process's requests to one API."""
    log.debug("%s: at most %g requests a second", href, searches_per_s)
    return _Pace(1 / searches_per_s)


class _ApiSession(Session):
    """Session with redirects restricted to the same host."""

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        """Return the target of a redirect. Raise ForbiddenError if it is on another host."""
        target = super().get_redirect_target(resp)
        return target and _on_host(target, origin_of(resp.url))


def _on_host(url: str, host: str) -> str:
    """Return the URL. Raise ForbiddenError if it is on another host."""
    network.check_url(url, host)
    found = network.host_of(url)
    if found != host:
        raise ForbiddenError(
            f"it leads to {found}; links and redirects of an API must stay on its host"
        )
    return url


class _CatalogueIO(StacApiIO):
    """Client requests with limits: the source's host only, its rate, and bounded answers."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.session = _ApiSession()
        self._pace = _pace(source.href, source.searches_per_s)
        self._at, self._host = source.href, origin_of(source.href)
        self._left = _MONTH_BYTES

    def begin_month(self) -> None:
        """Reset the byte budget to `_MONTH_BYTES`."""
        self._left = _MONTH_BYTES

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
        url = _on_host(urljoin(self._at, href), self._host)
        verb = (method or "GET").upper()
        if verb not in ("GET", "POST"):
            raise ForbiddenError(f"expected a link to GET or POST, found {verb}")
        self._at = url
        content = {"json": parameters} if verb == "POST" else {"params": parameters or {}}
        self._pace.wait()
        with self._answer(url, requests.Request(verb, url, headers=headers, **content)) as answer:
            body = _bounded(answer, _PAGE_BYTES)
        self._left -= len(body)
        if self._left < 0:
            raise RequestError(f"expected at most {_MONTH_BYTES:,} bytes of one month, found more")
        if not answer.ok:
            raise APIError(
                f"HTTP {answer.status_code} {answer.reason}: {body[:200].decode(errors='replace')}"
            )
        return body.decode()

    def _answer(self, url: str, request: requests.Request) -> requests.Response:
        """Send a request and retry temporary failures. The answer's body is not read yet."""
        network.need_reachable(url)
        prepared = self.session.prepare_request(request)
        settings = self.session.merge_environment_settings(url, {}, True, None, None)
        began = time.monotonic()
        for tried in itertools.count(1):
            wait = _PAUSE_S * 2 ** (tried - 1) + random.uniform(0, _PAUSE_S)  # noqa: S311  no secret depends on it
            try:
                answer = self.session.send(prepared, timeout=(_CONNECT_S, _READ_S), **settings)
            # Read timeouts may arrive as ConnectionError too.
            except requests.exceptions.ConnectionError as error:
                wait = _wait_after(error, url, time.monotonic() - began, tried) or wait
            except requests.exceptions.Timeout as error:
                if tried >= _HUNG_TRIES:
                    why = f"{origin_of(url)} took the connection and sent nothing for {_READ_S:.0f} s: try again later"
                    network.note_unreachable(url, why)
                    raise RequestError(why) from error
            else:
                wait = max(wait, retry_after(answer.headers.get("Retry-After")))
                if answer.status_code not in _AGAIN or tried >= _TRIES or wait > network.PATIENCE_S:
                    return answer
                answer.close()
            time.sleep(wait)
        raise AssertionError  # the loop has no end


def _wait_after(
    error: requests.exceptions.ConnectionError, url: str, lasted_s: float, tried: int
) -> float | None:
    """Return the seconds to wait after a failed connection, or None for the usual wait.

    Raises:
        RequestError: there is no further try.
    """
    why = network.why_unreachable(url, error)
    if why and lasted_s + _PAUSE_S > network.REFUSED_S:
        network.note_unreachable(url, why)
        raise RequestError(why) from error
    if tried >= _TRIES:
        raise RequestError(
            f"{origin_of(url)} broke {tried} connections: try again later"
        ) from error
    return _PAUSE_S if why else None


def _bounded(answer: requests.Response, most: int) -> bytes:
    """Return the unpacked body. Raise RequestError if it is too long or too late."""
    body = bytearray()
    until = time.monotonic() + network.PATIENCE_S
    for part in answer.iter_content(65536):
        body += part
        if len(body) > most:
            raise RequestError(f"expected an answer of at most {most:,} bytes, found more")
        if time.monotonic() > until:
            raise RequestError(f"the answer was not complete after {network.PATIENCE_S:.0f} s")
    return bytes(body)


def items_of(source: Source, area: BaseGeometry, year: int) -> list[Feature]:
    """List a source's items for a calendar year and an area in EPSG:4326.

    Returns:
        GeoJSON features as the source lists them.

    Raises:
        UnansweredError: the source does not answer, or its pages differ from its own count.
        SceneError: a file of items is unusable, or a link leads to another host.
    """
    return (
        _from_api(source, area, year)
        if source.kind == "stac-api"
        else _from_file(source, area, year)
    )


def _from_api(source: Source, area: BaseGeometry, year: int) -> list[Feature]:
    """Search month by month, to keep each sequence of pages short."""
    by_id: dict[str, Feature] = {}
    try:
        api = _CatalogueIO(source)
        client = pystac_client.Client.open(source.href, stac_io=api)
        for month in (f"{year}-{number:02d}" for number in range(1, 13)):
            if source.since and month < source.since:
                continue
            api.begin_month()
            ids, matched = _month(client, source.collection, area, month)
            # Items may have been added between two pages.
            if matched is not None and matched != len(ids):
                api.begin_month()
                ids, matched = _month(client, source.collection, area, month)
            if matched is not None and matched != len(ids):
                raise UnansweredError(
                    f"{source.href}: says {matched} items match {month}, its pages held {len(ids)}; scenes would be "
                    "missing without a trace, so nothing is built; search again"
                )
            by_id |= ids
    except _API_FAULTS as error:
        hint = (
            ""
            if isinstance(error, RequestError | ForbiddenError)
            else "; check the URL and the network"
        )
        kind = SceneError if isinstance(error, ForbiddenError) else UnansweredError
        raise kind(f"{source.href}: the search for {year} failed ({error}){hint}") from error
    # Items without a footprint stay, so they are refused by name later.
    footprints = {
        name: footprint_of(shape_of(item.get("geometry"))) for name, item in by_id.items()
    }
    return [
        by_id[name]
        for name, shape in footprints.items()
        if shape.is_empty or shapely.intersects(shape, area)
    ]


def _month(
    client: pystac_client.Client, collection: str, area: BaseGeometry, month: str
) -> tuple[dict[str, Feature], int | None]:
    """Return items by id, and the API's own count or None."""
    asked = client.search(
        collections=[collection],
        intersects=shapely.geometry.mapping(area),
        datetime=month,
        limit=PAGE,
    )
    pages = list(itertools.islice(asked.pages_as_dicts(), _PAGES + 1))
    if len(pages) > _PAGES:
        raise RequestError(f"expected at most {_PAGES} pages of {month}, found more")
    ids = {
        _key(feature): feature if isinstance(feature, dict) else {}
        for page in pages
        for feature in page["features"]
    }
    # Use the count in the first page. The client would request that page again.
    context = pages[0].get("context") or {} if pages else {}
    return ids, pages[0].get("numberMatched", context.get("matched")) if pages else None


def _key(feature: object) -> str:
    """Return a key shared by two listings of one item: its id, or the whole item without one."""
    name = feature.get("id") if isinstance(feature, dict) else None
    return name if isinstance(name, str) else json.dumps(feature, sort_keys=True)


def _from_file(source: Source, area: BaseGeometry, year: int) -> list[Feature]:
    index = _index_of(source.href)
    with _explained(source.href):
        found = _features(index.rows_of(area, year))
    # A local href is absolute already, by the catalogue's loader.
    folder = source.href.rpartition("/")[0]
    listed = [item["assets"] for item in found if isinstance(item["assets"], dict)]
    for asset in (
        asset for assets in listed for asset in assets.values() if isinstance(asset, dict)
    ):
        href = asset.get("href")
        # A name with a colon is not a path. It stays unchanged and is refused later.
        if isinstance(href, str) and ":" not in href and not href.startswith("/"):
            asset["href"] = f"{folder}/{href.removeprefix('./')}"
    return found


@dataclass(frozen=True)
class _Index:
    """File of items in memory, with the keys for selecting its rows."""

    schema: pa.Schema
    batches: Sequence[pa.RecordBatch]
    starts: Ints
    """First row of each batch."""
    years: Ints
    """UTC year of each row, 0 if unknown."""
    tree: shapely.STRtree
    """Footprints of all rows, empty for rows without one."""
    placeless: Ints
    """Rows without a footprint. Every search lists them, so they are refused by name."""

    @classmethod
    def of(cls, table: pa.Table) -> _Index:
        footprints = _footprints(_shapes(table))
        batches = table.to_batches()
        return cls(
            schema=table.schema,
            batches=batches,
            starts=np.cumsum([0, *(batch.num_rows for batch in batches)])[:-1],
            years=_years(table),
            tree=shapely.STRtree(footprints),
            placeless=np.flatnonzero(shapely.is_empty(footprints)),
        )

    def rows_of(self, area: BaseGeometry, year: int) -> pa.Table:
        """Return rows of the year or of unknown year over the area, in file order.

        Rows without a footprint are included.
        """
        over_area = self.tree.query(area, predicate="intersects")
        rows = np.sort(np.concatenate([over_area, self.placeless]))
        rows = rows[np.isin(self.years[rows], (year, 0))]
        batch_of_row = np.searchsorted(self.starts, rows, side="right") - 1
        parts = [
            self.batches[n].take(pa.array(rows[batch_of_row == n] - self.starts[n]))
            for n in np.unique(batch_of_row).tolist()
        ]
        return pa.Table.from_batches(parts, self.schema).combine_chunks()


@dataclass(frozen=True)
class _Kept:
    """Index with the version of its file."""

    index: _Index
    version: tuple[object, ...]
    until: float
    """Time of the next check for changes."""


_kept: dict[str, _Kept] = {}
_reading = threading.Lock()  # one thread reads a file at a time


def _index_of(href: str) -> _Index:
    """Return the index of a file of items, read again after changes.

    Raises errors like `read_items`.
    """
    with _reading:
        kept = _kept.pop(href, None)
        if kept is None or time.monotonic() >= kept.until:
            version = _version(href)
            if kept is None or version != kept.version or None in version:
                kept = None  # free the old index first, since two would not fit into memory
                table = _unpacked(href)
                with _explained(href):
                    kept = _Kept(_Index.of(table), version, 0.0)
            kept = replace(kept, until=time.monotonic() + (0.0 if is_local(href) else _FRESH_S))
        if len(_kept) >= _MOST_KEPT:
            del _kept[next(iter(_kept))]
        _kept[href] = kept
    return kept.index


def _version(href: str) -> tuple[object, ...]:
    """Return a tuple with a different value after each change. It contains None if unknown."""
    with _explained(href):
        if is_local(href):
            about = Path(local_path(href)).stat()
            return about.st_mtime_ns, about.st_size, about.st_ino
        return remote_for(access_to(href), origin_of(href)).version(href)


def over(item: pystac.Item, area: BaseGeometry) -> bool:
    """Return whether an item's footprint meets the area, including across the antimeridian."""
    return bool(shapely.intersects(footprint_of(shape_of(item.geometry)), area))


def read_items(path: Path | str) -> list[pystac.Item]:
    """Read all items of a local or remote stac-geoparquet file.

    Raises:
        SceneError: the file is not stac-geoparquet, or too large.
        UnansweredError: a remote file cannot be fetched.
    """
    table = _unpacked(str(path))
    with _explained(str(path)):
        features = _features(table)
        return [
            pystac.Item.from_dict(feature, migrate=False, preserve_dict=False)
            for feature in features
        ]


@contextmanager
def _explained(href: str) -> Iterator[None]:
    """Turn errors from a file of items into SceneError or UnansweredError."""
    try:
        yield
    except ForbiddenError as error:
        raise SceneError(f"{href}: cannot be read as stac-geoparquet ({error})") from error
    except RequestError as error:
        kind = SceneError if is_local(href) else UnansweredError
        raise kind(f"{href}: cannot be read as stac-geoparquet ({error})") from error
    except _ColumnError as error:
        raise SceneError(
            f"{href}: cannot be read as stac-geoparquet ({error}); write it again with stac-geoparquet"
        ) from error
    except _FILE_FAULTS as error:
        raise SceneError(
            f"{href}: cannot be read as stac-geoparquet ({error}); check the path, or search again"
        ) from error


def _unpacked(href: str) -> pa.Table:
    """Read a file of items as a table with timestamps. Raise errors like `read_items`."""
    with _explained(href):
        table = _table(
            pq.ParquetFile(local_path(href) if is_local(href) else io.BytesIO(_fetched(href)))
        )
        lacking = [name for name in ("id", "geometry", "assets") if name not in table.column_names]
        if lacking:
            raise ValueError(
                f"expected a column {lacking[0]!r}, found {', '.join(table.column_names[:8])}"
            )
        table = pa.Table.from_arrays(
            [_plain_column(column) for column in table.columns], names=table.column_names
        )
        _need_types(table.schema)
        for name in _TIMES:
            if name in table.column_names and not pa.types.is_timestamp(
                table.schema.field(name).type
            ):
                values = table.column(name)
                times = _as_times(values)
                if name == "datetime":
                    table = _note_unread(table, values.to_pandas(), times)
                table = table.set_column(table.column_names.index(name), name, pa.array(times))
        return table


def _plain_column(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Cast a column to types with selectable rows. Most columns need no cast."""
    stored = _storage(column)
    kind = _plain_type(stored.type)
    return stored if kind == stored.type else stored.cast(kind)


def _plain_type(kind: pa.DataType) -> pa.DataType:
    """Return the type without views, with times in UTC. Parquet stores all times in UTC."""
    if pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_binary_view(kind):
        return pa.large_binary()
    if pa.types.is_timestamp(kind) and kind.tz:
        return pa.timestamp(kind.unit, "UTC")
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_plain_type(field.type)) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(_plain_type(kind.key_type), _plain_type(kind.item_type))
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_plain_type(kind.value_type)))
    return kind


def _need_types(schema: pa.Schema) -> None:
    """Raise _ColumnError for wrong types of the columns with places, assets or times."""
    types = pa.types
    geometry, assets = schema.field("geometry").type, schema.field("assets").type
    value = geometry.value_type if types.is_dictionary(geometry) else geometry
    tests = (
        types.is_binary,
        types.is_large_binary,
        types.is_fixed_size_binary,
        _is_text,
        types.is_null,
    )
    if not any(test(value) for test in tests):
        raise _ColumnError(f"expected WKB in column 'geometry', found {_brief(geometry)}")
    inner = (
        [field.type for field in assets]
        if types.is_struct(assets)
        else [assets.item_type]
        if types.is_map(assets)
        else []
    )
    objects = [
        kind for kind in inner if types.is_struct(kind) or types.is_map(kind) or types.is_null(kind)
    ]
    if not objects and not (_is_text(assets) or types.is_null(assets)):
        raise _ColumnError(
            f"expected structs with an href in column 'assets', found {_brief(assets)}"
        )
    if "datetime" in schema.names and "start_datetime" not in schema.names:
        time_type = schema.field("datetime").type
        if (
            types.is_integer(time_type)
            or types.is_floating(time_type)
            or types.is_decimal(time_type)
        ):
            raise _ColumnError(
                f"expected timestamps or ISO 8601 texts in column 'datetime', found {_brief(time_type)}"
            )


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _brief(kind: pa.DataType) -> str:
    """Shorten a type's name. A struct's name lists all its fields."""
    return f"{str(kind)[:_TYPE_SHOWN]}{'...' * (len(str(kind)) > _TYPE_SHOWN)}"


def _note_unread(table: pa.Table, values: pd.Series, times: pd.Series) -> pa.Table:
    """Store unreadable times in an extra column, so their items are refused with the value."""
    unread = times.isna() & values.notna()
    if not unread.any():
        return table
    texts = [str(value) if lost else None for value, lost in zip(values, unread, strict=True)]
    return table.append_column(UNREAD_TIME, pa.array(texts, pa.string()))


def _as_times(column: pa.ChunkedArray) -> pd.Series:
    """Parse times to UTC microseconds, NaT if unknown."""
    times: pd.Series = pd.to_datetime(
        column.to_pandas(), utc=True, errors="coerce", format="ISO8601"
    )
    known: pd.Series = times.dt.as_unit("us")
    return known


def _years(table: pa.Table) -> Ints:
    """Return each row's UTC year by `datetime`, else by `start_datetime`. Unknown years are 0."""
    columns = [name for name in ("datetime", "start_datetime") if name in table.column_names]
    times = pd.Series(pd.NaT, index=range(table.num_rows), dtype="datetime64[us, UTC]")
    for name in columns:
        times = times.fillna(_as_times(table.column(name)))
    years: Ints = times.dt.year.fillna(0).to_numpy(dtype=np.int64)
    return years


def _shapes(table: pa.Table) -> Any:
    """Return the geometry of each row, None if missing or invalid WKB."""
    return shapely.from_wkb(_storage(table.column("geometry")).to_numpy(), on_invalid="ignore")


def _footprints(shapes: npt.NDArray[np.object_]) -> npt.NDArray[np.object_]:
    """Apply `footprint_of` to each shape. Most are plain polygons, and stay unchanged."""
    west, south, east, north = shapely.bounds(shapes).T
    # These tests are False for NaN.
    plain = (west >= -180) & (east <= 180) & (east - west <= 180) & (south >= -90) & (north <= 90)
    plain &= (
        (shapely.get_type_id(shapes) == shapely.GeometryType.POLYGON)
        & shapely.is_valid(shapes)
        & ~shapely.has_z(shapes)
    )
    footprints = shapes.copy()
    for row in np.flatnonzero(~plain):
        footprints[row] = footprint_of(shapes[row])
    return footprints


def _storage(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column without its extension type."""
    if not isinstance(column.type, pa.BaseExtensionType):
        return column
    return pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type)


def _features(table: pa.Table) -> list[Feature]:
    """Convert rows to GeoJSON features, with footprints of any type or none.

    The library's conversion takes five times as long. It also needs a polygon and a bounding box in
    every row.
    """
    shapes = _shapes(table)
    names = set(table.column_names)
    table = table.drop_columns(
        [name for name in ("geometry", "bbox", "proj:geometry", "links") if name in names]
    )
    for name in names.intersection(_TIMES):
        times = table.column(name).cast(pa.timestamp("us", tz="UTC"), safe=False)
        texts = pc.strftime(times, format="%Y-%m-%dT%H:%M:%SZ")
        table = table.set_column(table.column_names.index(name), name, texts)
    features: list[Feature] = []
    for row, shape in zip(table.to_pylist(), shapes, strict=True):
        feature: Feature = {
            "type": "Feature",
            "stac_version": "1.0.0",
            "geometry": None,
            "bbox": None,
            "links": [],
        }
        if shape is not None:
            # Parsers return GeoJSON with lists in place of tuples.
            feature["geometry"] = json.loads(json.dumps(shapely.geometry.mapping(shape)))
            feature["bbox"] = list(shape.bounds)
        assets = _by_name(row.pop("assets"))
        if isinstance(assets, dict):
            assets = {
                k: a if isinstance(a, dict) else _by_name(a)
                for k, a in assets.items()
                if a is not None
            }
        feature["assets"] = assets
        # Joined files have null in columns missing from one of their parts.
        feature |= {
            name: value for name in _TOP & row.keys() if (value := row.pop(name)) is not None
        }
        feature["properties"] = row
        features.append(feature)
    return features


def _by_name(value: Any) -> Any:
    """Return assets, or one asset, as a dictionary.

    A map column has pairs, and some files have JSON. Other values are returned unchanged.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return value
    if isinstance(value, list) and all(isinstance(pair, tuple) for pair in value):
        value = dict(value)
    return {} if value is None else value


def _table(file: pq.ParquetFile) -> pa.Table:
    """Unpack a Parquet file batch by batch. Raise RequestError above the limits of a scene list.

    The file's metadata count a repeated value once, so the unpacked batches are counted too.
    """
    about = file.metadata
    groups = [about.row_group(n).total_byte_size for n in range(about.num_row_groups)]
    _need_size(about.num_rows, sum(groups))
    # A row takes at most its group's size in the metadata, so one batch stays within the limit.
    rows = _INDEX_BYTES // max([1, *groups])
    tables = [pa.Table.from_batches([], file.schema_arrow)]
    pending: list[pa.RecordBatch] = []
    unpacked = 0
    for batch in file.iter_batches(min(rows, _BATCH)):
        unpacked += batch.nbytes
        _need_size(about.num_rows, unpacked)
        pending.append(batch)
        if len(pending) * batch.num_rows >= _BATCH:
            tables.append(_joined(pending))
    return pa.concat_tables([*tables, _joined(pending)]) if pending else pa.concat_tables(tables)


def _joined(pending: list[pa.RecordBatch]) -> pa.Table:
    """Join small batches and empty the list. Each batch takes 200 KB on top of its rows."""
    piece = pa.Table.from_batches(pending).combine_chunks()
    pending.clear()
    return piece


def _need_size(items: int, unpacked: int) -> None:
    """Raise RequestError for too many items or bytes for a list of scenes."""
    if items > _INDEX_ITEMS or unpacked > _INDEX_BYTES:
        expected = f"expected at most {_INDEX_ITEMS:,} items and {_INDEX_BYTES:,} bytes"
        raise RequestError(f"{expected}, found {items:,} and {unpacked:,}")


def _fetched(url: str) -> bytes:
    """Fetch a remote file as a whole. An index is small compared with one scene."""
    return remote_for(access_to(url), origin_of(url)).whole(url, _INDEX_BYTES)
