"""Log what workers do, next to the cubes: one append-only log per worker, as JSON lines.

    cubes.zarr/.runs/events/WORKER.jsonl          in a folder
    s3://.../.runs/events/WORKER/0001.jsonl       in an object store, where nothing can be appended:
                                                  parts of up to `PART_LINES` lines, the last one
                                                  written again with each line

A worker is one thread of a process. It works on one unit at a time. While it works, it touches its
log every `BEAT_S` seconds. A log that has not changed for `DEAD_S` seconds belongs to a dead worker.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import obstore.exceptions
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from minecube.cube.store import Store

RUNS = ".runs"
"""Folder of events and of finished steps in a store."""
_EVENTS = f"{RUNS}/events"
PART_LINES = 200
BEAT_S = 15.0
DEAD_S = 60.0
_TEXT = pa.string()
SCHEMA = pa.schema(
    {
        "event": _TEXT,  # start or end
        "time": _TEXT,  # ISO 8601, UTC
        "step": _TEXT,
        "site": _TEXT,
        "year": pa.int64(),  # 0 for a step of a whole site
        "attempt": pa.int64(),
        "state": _TEXT,  # of an end: done, gaps or failed
        "error_class": _TEXT,  # network, data, memory, disk or bug
        "message": _TEXT,
        "seconds": pa.float64(),
        "peak_mb": pa.float64(),  # most memory of the process during the task
        "bytes": pa.float64(),  # read from the source
        "requests": pa.float64(),
        "retried": pa.float64(),
        "lost": pa.float64(),
        "version": _TEXT,  # of minecube
        "worker": _TEXT,
        "machine": _TEXT,
        "system": _TEXT,  # Python and operating system
    }
)
"""Columns of events. Every line has some of them."""
_REPEATED = (
    "event",
    "step",
    "site",
    "state",
    "error_class",
    "version",
    "worker",
    "machine",
    "system",
)
_COMPACT = {name: pa.field(name, pa.dictionary(pa.int32(), _TEXT)) for name in _REPEATED} | {
    "time": pa.field("time", pa.timestamp("ms", "UTC"))
}


def _now() -> str:
    return datetime.now(tz=UTC).isoformat(timespec="milliseconds")


class EventLog:
    """The log of one worker in one store."""

    def __init__(self, store: Store) -> None:
        self.worker = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self._common = {
            "worker": self.worker,
            "machine": socket.gethostname(),
            "system": f"Python {platform.python_version()}, {platform.platform(terse=True)}",
        }
        self._store = store
        self._lines: list[bytes] = []  # of the current part, in an object store
        self._parts = 0
        self._lock = threading.Lock()

    def write(self, event: Mapping[str, Any]) -> None:
        """Append an event with the current time and this worker.

        Raises:
            CubeError: the store cannot be written.
        """
        content = {**event, "time": _now(), **self._common}
        line = json.dumps({key: value for key, value in content.items() if value not in (None, "")})
        with self._store.writing(), self._lock:
            if self._store.path is None:
                self._add_to_part(line.encode())
            else:
                folder = self._store.path / _EVENTS
                folder.mkdir(parents=True, exist_ok=True)
                # A line starts with a line break: a line cut by a full disk spoils no other.
                with (folder / f"{self.worker}.jsonl").open("ab") as file:
                    file.write(b"\n" + line.encode())

    def _add_to_part(self, line: bytes) -> None:
        if len(self._lines) == PART_LINES:
            self._lines = []
        if not self._lines:
            self._parts += 1
        self._lines.append(line)
        self._put_part()

    def _put_part(self) -> None:
        key = f"{_EVENTS}/{self.worker}/{self._parts:04d}.jsonl"
        self._store.client().put(key, b"\n".join(self._lines))

    def _beat(self) -> None:
        with contextlib.suppress(OSError, obstore.exceptions.BaseError), self._lock:
            if self._store.path is None:
                self._put_part()
            else:
                os.utime(self._store.path / _EVENTS / f"{self.worker}.jsonl")

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Touch the log every `BEAT_S` seconds until the end of the block."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(BEAT_S):
                self._beat()

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


@dataclass(frozen=True)
class Events:
    """All events of a store."""

    table: pd.DataFrame
    """One row per event with the columns of `SCHEMA`, by time. Times have a time zone."""
    alive: frozenset[str]
    """Workers whose log changed within the last `DEAD_S` seconds."""


@contextmanager
def _returning_memory() -> Iterator[None]:
    """Let Arrow return freed memory to the system, which its default pool keeps."""
    pool = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        pa.set_memory_pool(pool)


@_returning_memory()
def read_events(store: Store, columns: Sequence[str] = SCHEMA.names) -> Events:
    """Read these columns from the logs of all workers, `time` among them.

    Lines cut by a kill or a full disk are left out.

    Raises:
        CubeError: the logs cannot be read.
    """
    tables: list[pa.Table] = [_compact(_choose(columns).empty_table())]
    alive = set()
    oldest = time.time() - DEAD_S
    with store.reading(_EVENTS):
        for name, changed, content in _iterate_logs(store):
            tables.append(_compact(_parse(content, columns)))
            if changed >= oldest:
                alive.add(name)
    return Events(_sort(tables), frozenset(alive))


def _sort(tables: list[pa.Table]) -> pd.DataFrame:
    """Sort events by time, and empty the list of their tables.

    Each column is sorted on its own, which saves memory for a copy of the whole table.
    """
    table = pa.concat_tables(tables)
    tables.clear()
    order = pc.sort_indices(table["time"])  # stable
    columns = {}
    for name in table.column_names:
        column = table[name].unify_dictionaries()
        table = table.drop_columns([name])
        columns[name] = column.take(order).to_pandas()
        del column
        pa.default_memory_pool().release_unused()
    return pd.DataFrame(columns, copy=False)


def _choose(columns: Sequence[str]) -> pa.Schema:
    return pa.schema([SCHEMA.field(name) for name in columns])


def _compact(table: pa.Table) -> pa.Table:
    """Encode columns of repeated text, and times: a tenth of the memory."""
    fields = [_COMPACT.get(field.name, field) for field in table.schema]
    return table.cast(pa.schema(fields))


def _iterate_logs(store: Store) -> Iterator[tuple[str, float, bytes]]:
    """Yield worker, time of the last change and content of each log or part of one."""
    if store.packed or (store.path is not None and not (store.path / _EVENTS).is_dir()):
        return
    objects = store.open_objects()
    for batch in objects.list(_EVENTS):
        for entry in batch:
            path = str(entry["path"])
            worker = path.removeprefix(f"{_EVENTS}/").split("/")[0].removesuffix(".jsonl")
            content = bytes(objects.get(path).bytes())
            yield worker, entry["last_modified"].timestamp(), content


def _parse(content: bytes, columns: Sequence[str]) -> pa.Table:
    """Parse these columns of JSON lines. Damaged lines are left out."""
    schema = _choose(columns)
    if not content or content.isspace():
        return schema.empty_table()
    options = pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    try:
        return pyarrow.json.read_json(io.BytesIO(content), parse_options=options)
    except pa.ArrowInvalid:
        whole = [line for line in content.splitlines() if _is_event(line)]
        if not whole:
            return schema.empty_table()
        return pyarrow.json.read_json(io.BytesIO(b"\n".join(whole)), parse_options=options)


def _is_event(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
