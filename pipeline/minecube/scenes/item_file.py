"""List the items of a stac-geoparquet file, local or remote.

Files stay in memory with an index, since a build searches one file for each of its site-years.
Reading a file of 1000 items takes 42 ms, and a search for 111 of them 136 ms. Files may have
100,000 items and more.
"""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pystac
import shapely
from shapely.geometry.base import BaseGeometry

from minecube.arrays import AnyArray, Int64
from minecube.catalog import Source
from minecube.errors import SceneError, UnansweredError
from minecube.grid import clean_footprint
from minecube.network import ForbiddenError, RequestError, is_local, local_path, origin_of
from minecube.reader.remote import access_to, remote_for
from minecube.scenes import parquet
from minecube.scenes.features import Feature, parse_shapes, to_features

_FRESH_S = 60.0  # interval between checks of a remote file for changes
_MOST_FILES = 8  # files of items in memory
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


def search_file(source: Source, area: BaseGeometry, year: int) -> list[Feature]:
    """List the items of a file for a calendar year and an area in EPSG:4326.

    Raises:
        UnansweredError: a remote file cannot be fetched.
        SceneError: the file is unusable.
    """
    index = _index_of(source.href)
    with _explained(source.href):
        features = to_features(index.rows_of(area, year))
    # A local href is absolute already, by the catalogue's loader.
    folder = source.href.rpartition("/")[0]
    for feature in features:
        if isinstance(feature["assets"], dict):
            for asset in feature["assets"].values():
                _make_absolute(asset, folder)
    return features


def _make_absolute(asset: object, folder: str) -> None:
    """Put the folder of the file before the relative path of an asset, in place."""
    if not isinstance(asset, dict):
        return
    href = asset.get("href")
    # A name with a colon is not a path. It stays unchanged and is refused later.
    if isinstance(href, str) and ":" not in href and not href.startswith("/"):
        asset["href"] = f"{folder}/{href.removeprefix('./')}"


def read_items(path: Path | str) -> list[pystac.Item]:
    """Read all items of a local or remote stac-geoparquet file.

    Raises:
        SceneError: the file is not stac-geoparquet, or too large.
        UnansweredError: a remote file cannot be fetched.
    """
    table = _read_table(str(path))
    with _explained(str(path)):
        return [
            pystac.Item.from_dict(feature, migrate=False, preserve_dict=False)
            for feature in to_features(table)
        ]


def _read_table(href: str) -> pa.Table:
    """Read a file of items as a table. Raise errors like `read_items`."""
    with _explained(href):
        if is_local(href):
            return parquet.unpack(pq.ParquetFile(local_path(href)))
        # An index is small compared with one scene, so it is fetched as a whole.
        remote = remote_for(access_to(href), origin_of(href))
        content = remote.whole(href, parquet.MOST_BYTES)
        return parquet.unpack(pq.ParquetFile(io.BytesIO(content)))


@contextmanager
def _explained(href: str) -> Iterator[None]:
    """Turn errors from a file of items into SceneError or UnansweredError."""
    problem = f"{href}: cannot be read as stac-geoparquet"
    try:
        yield
    except ForbiddenError as error:
        raise SceneError(f"{problem} ({error})") from error
    except RequestError as error:
        kind = SceneError if is_local(href) else UnansweredError
        raise kind(f"{problem} ({error})") from error
    except parquet.ColumnError as error:
        raise SceneError(f"{problem} ({error}); write it again with stac-geoparquet") from error
    except _FILE_FAULTS as error:
        raise SceneError(f"{problem} ({error}); check the path, or search again") from error


@dataclass(frozen=True)
class _Index:
    """File of items in memory, with the keys for selecting its rows."""

    rows: pyarrow.dataset.Dataset
    """Its `take` selects rows batch by batch. `pyarrow.Table.take` would copy the table first."""
    years: Int64
    """UTC year of each row, 0 if unknown."""
    tree: shapely.STRtree
    """Footprints of all rows, empty for rows without one."""
    placeless: Int64
    """Rows without a footprint. Every search lists them, so they are refused by name."""

    def rows_of(self, area: BaseGeometry, year: int) -> pa.Table:
        """Return rows of the year or of unknown year over the area, in file order.

        Rows without a footprint are included.
        """
        over_area = self.tree.query(area, predicate="intersects")
        rows = np.sort(np.concatenate([over_area, self.placeless]))
        rows = rows[np.isin(self.years[rows], (year, 0))]
        return self.rows.take(pa.array(rows, pa.int64()))


def _years(table: pa.Table) -> Int64:
    """Return each row's UTC year by `datetime`, else by `start_datetime`. Unknown years are 0."""
    timestamps = pd.Series(pd.NaT, index=range(table.num_rows), dtype="datetime64[us, UTC]")
    for name in ("datetime", "start_datetime"):
        if name in table.column_names:
            timestamps = timestamps.fillna(parquet.parse_times(table.column(name)))
    years: Int64 = timestamps.dt.year.fillna(0).to_numpy(dtype=np.int64)
    return years


def _footprints(shapes: AnyArray) -> AnyArray:
    """Apply `clean_footprint` to each shape. Most are plain polygons, and stay unchanged."""
    west, south, east, north = shapely.bounds(shapes).T
    # These tests are False for NaN.
    plain = (west >= -180) & (east <= 180) & (east - west <= 180) & (south >= -90) & (north <= 90)
    plain &= shapely.get_type_id(shapes) == shapely.GeometryType.POLYGON
    plain &= shapely.is_valid(shapes) & ~shapely.has_z(shapes)
    footprints = shapes.copy()
    for row in np.flatnonzero(~plain):
        footprints[row] = clean_footprint(shapes[row])
    return footprints


@dataclass(frozen=True)
class _CachedIndex:
    """Index with the version of its file."""

    index: _Index
    version: tuple[object, ...]
    check_at: float
    """Time of the next check for changes, on the monotonic clock."""


_cache: dict[str, _CachedIndex] = {}
_cache_lock = threading.Lock()  # one thread reads a file at a time


def _index_of(href: str) -> _Index:
    """Return the index of a file of items, read again after changes.

    Raises errors like `read_items`.
    """
    with _cache_lock:
        cached = _cache.pop(href, None)
        if cached is None or time.monotonic() >= cached.check_at:
            version = _version(href)
            if cached is None or version != cached.version or None in version:
                cached = None  # free the old index first, since two would not fit into memory
                cached = _CachedIndex(_read_index(href), version, 0.0)
            interval = 0.0 if is_local(href) else _FRESH_S
            cached = replace(cached, check_at=time.monotonic() + interval)
        if len(_cache) >= _MOST_FILES:
            oldest = next(iter(_cache))
            del _cache[oldest]
        _cache[href] = cached
    return cached.index


def _read_index(href: str) -> _Index:
    table = _read_table(href)
    with _explained(href):
        footprints = _footprints(parse_shapes(table))
        return _Index(
            rows=pyarrow.dataset.dataset(table),
            years=_years(table),
            tree=shapely.STRtree(footprints),
            placeless=np.flatnonzero(shapely.is_empty(footprints)),
        )


def _version(href: str) -> tuple[object, ...]:
    """Return a tuple with a different value after each change. It contains None if unknown."""
    with _explained(href):
        if is_local(href):
            status = Path(local_path(href)).stat()
            return status.st_mtime_ns, status.st_size, status.st_ino
        return remote_for(access_to(href), origin_of(href)).version(href)
