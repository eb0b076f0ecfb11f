"""Event logs of workers: what survives a kill or a full disk, who is alive, and what they tell."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from minecube import cube
from minecube.cube.events import DEAD_S, PART_LINES, EventLog, read_events
from minecube.jobs.runs.finished import forget_finished, note_finished, read_finished, read_notes
from minecube.jobs.runs.history import History
from minecube.jobs.runs.inputs import open_log
from minecube.jobs.runs.units import Unit

BUILD = {"step": "build", "site": "pit", "year": 2020}


@pytest.fixture
def store(tmp_path: Path) -> cube.Store:
    (tmp_path / "cubes.zarr").mkdir()
    return cube.Store(str(tmp_path / "cubes.zarr"))


def log_file(store: cube.Store, log: EventLog) -> Path:
    assert store.path is not None
    return store.path / ".runs" / "events" / f"{log.worker}.jsonl"


def set_age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_a_store_without_runs_has_no_events(store: cube.Store) -> None:
    events = read_events(store)
    assert len(events.table) == 0
    assert events.alive == frozenset()
    assert History.from_events(events).count_attempts(Unit("build", "pit", 2020)) == 0


def test_events_of_all_workers_come_by_time(store: cube.Store) -> None:
    logs = [EventLog(store), EventLog(store)]
    for number in range(6):
        logs[number % 2].write({"event": "start", **BUILD, "attempt": number})
        time.sleep(0.002)
    table = read_events(store).table
    assert table["attempt"].tolist() == list(range(6))
    assert table["worker"].tolist() == [logs[n % 2].worker for n in range(6)]


@pytest.mark.parametrize("cut", [1, 20, 90])
def test_a_line_cut_by_a_full_disk_spoils_no_other(store: cube.Store, cut: int) -> None:
    log = EventLog(store)
    log.write({"event": "start", **BUILD, "attempt": 1})
    path = log_file(store, log)
    whole = path.read_bytes()
    log.write({"event": "end", **BUILD, "attempt": 1, "state": "failed"})
    path.write_bytes(path.read_bytes()[: len(whole) + cut])
    log.write({"event": "start", **BUILD, "attempt": 2})
    table = read_events(store).table
    assert table["attempt"].tolist() == [1, 2]
    assert table["event"].tolist() == ["start", "start"]


def test_a_worker_without_a_heartbeat_is_dead_and_its_unit_interrupted(store: cube.Store) -> None:
    alive, dead = EventLog(store), EventLog(store)
    alive.write({"event": "start", **BUILD, "attempt": 1})
    dead.write({"event": "start", **BUILD, "site": "pond", "attempt": 1})
    set_age(log_file(store, alive), DEAD_S - 20)
    set_age(log_file(store, dead), DEAD_S + 20)
    events = read_events(store)
    assert events.alive == {alive.worker}
    units = History.from_events(events).units
    assert units["running"].to_dict() == {
        ("build", "pit", 2020): True,
        ("build", "pond", 2020): False,
    }
    assert units["interrupted"].tolist() == [False, True]


def test_a_living_worker_that_has_gone_on_lost_its_unit(store: cube.Store) -> None:
    """The end of its first unit could not be written."""
    log = EventLog(store)
    log.write({"event": "start", **BUILD, "attempt": 1})
    log.write({"event": "start", **BUILD, "site": "pond", "attempt": 1})
    units = History.from_events(read_events(store)).units
    assert units["interrupted"].to_dict() == {
        ("build", "pit", 2020): True,
        ("build", "pond", 2020): False,
    }
    assert units["running"].tolist() == [False, True]


def test_each_thread_has_its_own_log(store: cube.Store) -> None:
    """Threads of one process work on several units at a time."""
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(open_log, store).result()
    assert open_log(store) is open_log(store)
    assert other.worker != open_log(store).worker


def test_attempts_that_found_another_run_at_work_hide_no_failure(store: cube.Store) -> None:
    log, other = EventLog(store), EventLog(store)
    log.write({"event": "start", **BUILD, "attempt": 1})
    log.write({"event": "end", **BUILD, "attempt": 1, "state": "failed", "message": "no scene"})
    other.write({"event": "start", **BUILD, "site": "pond", "attempt": 1})
    for _ in range(3):
        log.write({"event": "start", **BUILD, "attempt": 2})
        log.write({"event": "end", **BUILD, "attempt": 2, "state": "busy"})
    history = History.from_events(read_events(store))
    ((unit, row),) = history.failures()
    assert (unit, row.message, row.attempts) == (Unit("build", "pit", 2020), "no scene", 1)
    assert history.units["running"].to_dict() == {
        ("build", "pit", 2020): False,
        ("build", "pond", 2020): True,
    }


def test_a_heartbeat_touches_the_log(store: cube.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minecube.cube.events.BEAT_S", 0.01)
    log = EventLog(store)
    log.write({"event": "start", **BUILD})
    set_age(log_file(store, log), 2 * DEAD_S)
    assert read_events(store).alive == frozenset()
    with log.beating():
        deadline = time.monotonic() + 20
        while not read_events(store).alive and time.monotonic() < deadline:
            time.sleep(0.01)
    assert read_events(store).alive == {log.worker}


def test_history_counts_attempts_and_remembers_the_last_end(store: cube.Store) -> None:
    log = EventLog(store)
    for attempt, state in ((1, "failed"), (2, "failed"), (3, "done")):
        log.write({"event": "start", **BUILD, "attempt": attempt})
        log.write({"event": "end", **BUILD, "attempt": attempt, "state": state})
        if attempt == 2:
            history = History.from_events(read_events(store))
            assert history.has_failed("pit", 2020)
            assert [unit for unit, _ in history.failures()] == [Unit("build", "pit", 2020)]
    history = History.from_events(read_events(store))
    assert history.count_attempts(Unit("build", "pit", 2020)) == 3
    assert not history.has_failed("pit", 2020)
    assert list(history.failures()) == []


def test_logs_in_an_object_store_are_parts_of_bounded_size(bucket: str) -> None:
    store = cube.Store(f"{bucket}/cubes.zarr")
    log = EventLog(store)
    for attempt in range(PART_LINES + 5):
        log.write({"event": "start", **BUILD, "attempt": attempt})
    table = read_events(store).table
    assert sorted(table["attempt"]) == list(range(PART_LINES + 5))
    keys = [entry["path"] for batch in store.client().list(".runs") for entry in batch]
    assert [key.rpartition("/")[2] for key in sorted(keys)] == ["0001.jsonl", "0002.jsonl"]


# Notes of finished steps


@pytest.mark.parametrize("where", ["folder", "bucket"])
def test_notes_of_finished_steps(
    where: str, store: cube.Store, request: pytest.FixtureRequest
) -> None:
    if where == "bucket":
        store = cube.Store(f"{request.getfixturevalue('bucket')}/cubes.zarr")
    assert read_finished(store, "label", "pit") == {}
    note_finished(store, "label", "pit", "a", {"x": 1})
    note_finished(store, "label", "pit", "b", {"x": 2})
    note_finished(store, "label", "pond", "c", {})
    assert read_finished(store, "label", "pit")["outputs"] == {"x": 2}
    notes = read_notes(store, "label", ["pit", "pool", "pond"])
    assert {site: note["inputs"] for site, note in notes.items()} == {"pit": "b", "pond": "c"}
    forget_finished(store, "label", "pit")
    assert read_finished(store, "label", "pit") == {}
    assert list(read_notes(store, "label", ["pit", "pond"])) == ["pond"]


@pytest.mark.parametrize("content", ["", "{", "[1]", json.dumps({"inputs": "a"})])
def test_a_damaged_note_counts_as_unfinished(store: cube.Store, content: str) -> None:
    note_finished(store, "label", "pit", "a", {})
    assert store.path is not None
    (store.path / ".runs" / "steps" / "label" / "pit.json").write_text(content)
    assert read_finished(store, "label", "pit") == {}
    assert read_notes(store, "label", ["pit"]) == {}
