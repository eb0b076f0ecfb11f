"""Read a stac-geoparquet file into a table, within limits, with types that later steps can select.

Files are untrusted: size, rows and unpacked bytes are limited. Other tools write columns as views,
maps, JSON or extension types. stac-geoparquet's own reader fails on these.
"""

from __future__ import annotations

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from minecube.network import RequestError
from minecube.scenes.listed_item import UNREAD_TIME

MOST_BYTES = 2**30
"""Largest size of a file of items, packed and unpacked."""
_MOST_ITEMS = 1_000_000
TIMES = (
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
_TYPE_LETTERS = 60  # letters of a type shown in an error
_BATCH = 1000  # rows of a file of items unpacked at a time


class ColumnError(Exception):
    """An unreadable type of a column in a file of items."""


def unpack(file: pq.ParquetFile) -> pa.Table:
    """Read a file of items as a table with timestamps.

    Raises:
        RequestError: the file is larger than a list of scenes may be.
        ColumnError: a column has an unusable type.
        ValueError: a column is missing.
    """
    table = _read_batches(file)
    for name in ("id", "geometry", "assets"):
        if name not in table.column_names:
            raise ValueError(
                f"expected a column {name!r}, found {', '.join(table.column_names[:8])}"
            )
    columns = [_plain_column(column) for column in table.columns]
    table = pa.Table.from_arrays(columns, names=table.column_names)
    _check_place_type(table.schema)
    _check_assets_type(table.schema)
    _check_time_type(table.schema)
    for name in TIMES:
        if name in table.column_names:
            table = _with_timestamps(table, name)
    return table


def _read_batches(file: pq.ParquetFile) -> pa.Table:
    """Unpack a Parquet file batch by batch. Raise RequestError above the limits of a scene list.

    The file's metadata count a repeated value once, so the unpacked batches are counted too.
    """
    metadata = file.metadata
    groups = [metadata.row_group(n).total_byte_size for n in range(metadata.num_row_groups)]
    _need_size(metadata.num_rows, sum(groups))
    # A row takes at most its group's size in the metadata, so one batch stays within the limit.
    rows = MOST_BYTES // max([1, *groups])
    tables = [pa.Table.from_batches([], file.schema_arrow)]
    pending: list[pa.RecordBatch] = []
    unpacked = 0
    for batch in file.iter_batches(min(rows, _BATCH)):
        unpacked += batch.nbytes
        _need_size(metadata.num_rows, unpacked)
        pending.append(batch)
        if len(pending) * batch.num_rows >= _BATCH:
            tables.append(_join(pending))
    if pending:
        tables.append(_join(pending))
    return pa.concat_tables(tables)


def _join(pending: list[pa.RecordBatch]) -> pa.Table:
    """Join small batches and empty the list. Each batch takes 200 KB on top of its rows."""
    piece = pa.Table.from_batches(pending).combine_chunks()
    pending.clear()
    return piece


def _need_size(items: int, unpacked: int) -> None:
    """Raise RequestError for too many items or bytes for a list of scenes."""
    if items > _MOST_ITEMS or unpacked > MOST_BYTES:
        raise RequestError(
            f"expected at most {_MOST_ITEMS:,} items and {MOST_BYTES:,} bytes, "
            f"found {items:,} and {unpacked:,}"
        )


def _plain_column(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Cast a column to types with selectable rows. Most columns need no cast."""
    stored = strip_extension(column)
    plain = _plain_type(stored.type)
    if plain == stored.type:
        return stored
    return stored.cast(plain)


def strip_extension(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column without its extension type."""
    if not isinstance(column.type, pa.BaseExtensionType):
        return column
    return pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type)


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


def _check_place_type(schema: pa.Schema) -> None:
    """Raise ColumnError unless the column of geometries can hold WKB."""
    geometry = schema.field("geometry").type
    value = geometry
    if pa.types.is_dictionary(geometry):
        value = geometry.value_type
    tests = (
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_fixed_size_binary,
        pa.types.is_null,
        _is_text,
    )
    if not any(test(value) for test in tests):
        raise ColumnError(f"expected WKB in column 'geometry', found {_shorten(geometry)}")


def _check_assets_type(schema: pa.Schema) -> None:
    """Raise ColumnError unless the column of assets can hold objects with an href."""
    assets = schema.field("assets").type
    asset_types = []
    if pa.types.is_struct(assets):
        asset_types = [field.type for field in assets]
    elif pa.types.is_map(assets):
        asset_types = [assets.item_type]
    tests = (pa.types.is_struct, pa.types.is_map, pa.types.is_null)
    has_objects = any(test(kind) for kind in asset_types for test in tests)
    if not (has_objects or _is_text(assets) or pa.types.is_null(assets)):
        raise ColumnError(
            f"expected structs with an href in column 'assets', found {_shorten(assets)}"
        )


def _check_time_type(schema: pa.Schema) -> None:
    """Raise ColumnError if the only times are plain numbers."""
    if "datetime" not in schema.names or "start_datetime" in schema.names:
        return
    kind = schema.field("datetime").type
    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)
    if any(test(kind) for test in tests):
        raise ColumnError(
            f"expected timestamps or ISO 8601 texts in column 'datetime', found {_shorten(kind)}"
        )


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _shorten(kind: pa.DataType) -> str:
    """Shorten a type's name. A struct's name lists all its fields."""
    name = str(kind)
    if len(name) > _TYPE_LETTERS:
        return name[:_TYPE_LETTERS] + "..."
    return name


def _with_timestamps(table: pa.Table, name: str) -> pa.Table:
    """Parse a column of times, unless it has timestamps."""
    if pa.types.is_timestamp(table.schema.field(name).type):
        return table
    values = table.column(name)
    timestamps = parse_times(values)
    if name == "datetime":
        table = _note_unread(table, values.to_pandas(), timestamps)
    return table.set_column(table.column_names.index(name), name, pa.array(timestamps))


def _note_unread(table: pa.Table, values: pd.Series, timestamps: pd.Series) -> pa.Table:
    """Store unreadable times in an extra column, so their items are refused with the value."""
    unread = timestamps.isna() & values.notna()
    if not unread.any():
        return table
    texts = [str(value) if lost else None for value, lost in zip(values, unread, strict=True)]
    return table.append_column(UNREAD_TIME, pa.array(texts, pa.string()))


def parse_times(column: pa.ChunkedArray) -> pd.Series:
    """Parse times to UTC microseconds, NaT if unknown."""
    timestamps: pd.Series = pd.to_datetime(
        column.to_pandas(), utc=True, errors="coerce", format="ISO8601"
    )
    microseconds: pd.Series = timestamps.dt.as_unit("us")
    return microseconds
