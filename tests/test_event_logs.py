"""Event logs of workers in a store: written, read, cut, and counted."""

from __future__ import annotations

import json
import os
import time

import pytest

from minecube import cube
from minecube.cube import events
from minecube.cube.events import DEAD_S, EventLog, read_events
from minecube.errors import CubeError
from minecube.jobs.runs.history import History
from minecube.jobs.runs.units import Unit

START = {"event": "start", "step": "build", "site": "pit", "year": 2020, "attempt": 1}
END = {**START, "event": "end", "state": "failed", "error_class": "network", "message": "no answer"}


def log_file(store, log):
    return store.path / ".runs" / "events" / f"{log.worker}.jsonl"


@pytest.fixture
def store(tmp_path):
    return cube.Store(tmp_path / "cubes.zarr")


def test_events_come_back_with_worker_and_machine(store):
    log = EventLog(store)
    log.write(START)
    log.write({**END, "seconds": 1.5, "bytes": 1000})
    found = read_events(store)
    assert list(found.table["event"]) == ["start", "end"]
    assert list(found.table["worker"]) == [log.worker] * 2
    assert found.table["seconds"][1] == 1.5
    assert found.alive == {log.worker}


def test_a_line_is_json_with_an_iso_time(store):
    log = EventLog(store)
    log.write(START)
    line = json.loads(log_file(store, log).read_text())
    assert line["site"] == "pit"
    assert line["time"].endswith("+00:00")
    assert "message" not in line  # empty values are left out


def test_a_store_without_logs_has_no_events(store):
    assert read_events(store).table.empty


def test_a_line_cut_by_a_full_disk_spoils_no_other(store):
    log = EventLog(store)
    log.write(START)
    with log_file(store, log).open("ab") as file:
        file.write(b'\n{"event": "end", "si')  # cut here
    log.write(END)
    assert list(read_events(store).table["event"]) == ["start", "end"]


def test_a_log_of_one_cut_line_is_empty(store):
    log = EventLog(store)
    log.write(START)
    log_file(store, log).write_bytes(b'\n{"event": "sta')
    assert read_events(store).table.empty


def test_a_full_disk_is_reported(store, monkeypatch):
    log = EventLog(store)
    store.path.mkdir()
    (store.path / ".runs").write_text("a file where the folder belongs")
    with pytest.raises(CubeError, match="cannot be written"):
        log.write(START)


def test_an_old_log_belongs_to_a_dead_worker(store):
    log = EventLog(store)
    log.write(START)
    old = time.time() - DEAD_S - 5
    os.utime(log_file(store, log), (old, old))
    found = read_events(store)
    assert not found.alive
    units = History.from_events(found).units
    assert bool(units.loc[("build", "pit", 2020), "interrupted"])
    assert not bool(units.loc[("build", "pit", 2020), "running"])


def test_a_beating_worker_stays_alive(store, monkeypatch):
    monkeypatch.setattr(events, "BEAT_S", 0.01)
    log = EventLog(store)
    log.write(START)
    file = log_file(store, log)
    os.utime(file, (1, 1))
    with log.beating():
        deadline = time.monotonic() + 20
        while file.stat().st_mtime == 1 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert file.stat().st_mtime > 1


def test_attempts_and_the_last_end_count(store):
    log = EventLog(store)
    for _ in range(2):
        log.write(START)
        log.write(END)
    history = History.from_events(read_events(store))
    unit = Unit("build", "pit", 2020)
    assert history.count_attempts(unit) == 2
    assert history.has_failed("pit", 2020)
    log.write(START)
    log.write({**END, "state": "done"})
    history = History.from_events(read_events(store))
    assert history.count_attempts(unit) == 3
    assert not history.has_failed("pit", 2020)
    assert history.count_attempts(Unit("build", "pit", 2021)) == 0


def test_logs_in_an_object_store(bucket):
    store = cube.Store(f"{bucket}/cubes.zarr")
    log = EventLog(store)
    other = EventLog(store)
    for year in range(events.PART_LINES + 5):
        log.write({**START, "year": 2000 + year})
    other.write(END)
    found = read_events(store)
    assert len(found.table) == events.PART_LINES + 6
    assert found.alive == {log.worker, other.worker}
    parts = [entry["path"] for batch in store.client().list(".runs/events") for entry in batch]
    assert len(parts) == 3  # two parts of the long log, one of the other
