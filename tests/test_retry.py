"""`retry` tries again what a repetition can mend, and lists the rest."""

from __future__ import annotations

import json
import os
import signal
import threading
from datetime import UTC, datetime, timedelta

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest

from known_builds import run_here
from known_run_failures import log_failure, log_start, make_dataset, write_dataset
from minecube import cube
from minecube.cube.events import EventLog, read_events
from minecube.errors import CatalogError
from minecube.jobs.runs import RunOptions, run
from minecube.jobs.runs.driver import make_plan
from minecube.jobs.runs.inputs import load_inputs, open_log
from minecube.jobs.runs.retry import RetryOptions, list_failures, retry
from minecube.jobs.runs.states import list_path
from minecube.jobs.runs.units import Unit

BUILD = Unit("build", "pit", 2020)
LATER = Unit("build", "pit", 2022)


@pytest.fixture
def dataset(tmp_path, world):
    return make_dataset(tmp_path, world)


def interrupt(dataset, unit):
    """Log a start by a worker that died long ago."""
    log = EventLog(cube.Store(dataset.store))
    log_start(log, unit)
    (file,) = (cube.Store(dataset.store).path / ".runs/events").glob(f"{log.worker}.jsonl")
    os.utime(file, (0, 0))


def test_the_last_attempt_counts(dataset):
    log_failure(dataset, BUILD, "memory")
    log_failure(dataset, BUILD, "memory", attempt=2)
    log_failure(dataset, BUILD, "network", "no answer", attempt=3)
    (failure,) = list_failures(dataset)
    assert (failure.unit, failure.error_class, failure.message) == (BUILD, "network", "no answer")
    assert (failure.attempts, failure.memory_failures, failure.replaces) == (3, 2, False)


def test_a_dead_worker_interrupts_and_a_living_one_runs(dataset):
    interrupt(dataset, BUILD)
    log_failure(dataset, LATER, "data")
    log_start(open_log(cube.Store(dataset.store)), LATER, 2)
    assert [(f.unit, f.error_class) for f in list_failures(dataset)] == [(BUILD, "interrupted")]


def test_sites_and_times_choose(dataset):
    log_failure(dataset, BUILD, "network")
    log_failure(dataset, Unit("build", "elsewhere", 2020), "network")
    log_failure(dataset, Unit("build", "pit", 1999), "network")
    log_failure(dataset, Unit("score", "pit"), "network")  # a step that the dataset lacks
    now = datetime.now(tz=UTC)
    for since, found in ((now - timedelta(minutes=9), [BUILD]), (now + timedelta(minutes=9), [])):
        failures = list_failures(dataset, RetryOptions(failed_since=since))
        assert [failure.unit for failure in failures] == found
    assert list_failures(dataset, RetryOptions(sites="p*"))


def test_a_unit_on_which_workers_died_lacked_memory(dataset):
    """Each worker is killed at the start of its build."""
    killed = []
    ended = threading.Event()

    def kill():
        while not ended.wait(0.02):
            events = read_events(cube.Store(dataset.store)).table
            builds = events[(events["step"] == "build") & (events["event"] == "start")]
            for worker in set(builds["worker"]).difference(killed):
                os.kill(int(worker.split("-")[-2]), signal.SIGKILL)
                killed.append(worker)

    killer = threading.Thread(target=kill)
    killer.start()
    done = run(dataset, RunOptions(only=("search", "build"), years=(2020,)))
    ended.set()
    killer.join()
    assert [result.error_class for result in done.failures.values()] == ["memory"]
    (failure,) = list_failures(dataset)
    assert (failure.unit, failure.error_class) == (BUILD, "memory")
    assert (failure.attempts, failure.memory_failures) == (3, 1)


def test_a_retry_mends_and_lists_what_it_cannot(dataset, tmp_path, world):
    """The list of 2022 is missing again, a build failed by a bug, and the audit never ran."""
    assert run(dataset, RunOptions(only=("search",), years=(2020,))).exit_code == 0
    log_failure(dataset, Unit("search", "pit", 2022), "network")
    log_failure(dataset, BUILD, "bug", "KeyError: 'a'")
    pauses = []
    retried = retry(dataset, RetryOptions(attempts=3), pause=pauses.append)
    (done,) = retried.passes
    assert set(done.results) == {
        Unit("search", "pit", 2022),
        LATER,  # follows from the search
        Unit("audit", "pit"),
    }
    assert not done.failures
    assert pauses == []
    assert [failure.unit for failure in retried.left] == [BUILD]

    out, err = run_here("retry", write_dataset(tmp_path, world), ok=1)
    assert out == "no failure of class network, memory, disk to try again\n"
    last_line = err.splitlines()[-1]
    assert last_line == "build pit 2020: bug, 1 attempts: KeyError: 'a'; please report it"


def test_pauses_double(dataset):
    """The scene list is damaged, so each attempt fails again."""
    path = list_path(load_inputs(dataset), "pit", 2022)
    path.parent.mkdir(parents=True)
    path.write_text("no list")
    log_failure(dataset, LATER, "data")
    pauses = []
    options = RetryOptions(classes=("data",), attempts=3, pause_s=10)
    retried = retry(dataset, options, pause=pauses.append)
    assert pauses == [10, 20]
    assert [set(done.failures) for done in retried.passes] == [{LATER}] * 3
    assert [(failure.unit, failure.attempts) for failure in retried.left] == [(LATER, 4)]


def test_a_failed_rebuild_is_mended_whatever_the_clocks(dataset):
    """The old build is of another version, and a clock that was ahead has dated it."""
    assert run(dataset, RunOptions(only=("search", "build"), years=(2020,))).exit_code == 0
    store = cube.Store(dataset.store)
    marker = store.path / "pit/builds/2020/zarr.json"
    content = json.loads(marker.read_text())
    present = content["attributes"]
    ahead = datetime.now(tz=UTC) + timedelta(hours=1)
    older = {"version": "0.0.1", "build_id": "older", "committed": ahead.isoformat()}
    marker.write_text(json.dumps(content | {"attributes": present | older}))
    log_failure(dataset, BUILD, "network", attempt=2)
    (failure,) = list_failures(dataset)
    assert (failure.unit, failure.replaces) == (BUILD, True)
    (done,) = retry(dataset).passes
    assert done.results[BUILD].is_good
    assert cube.read_markers(store, "pit")[2020]["build_id"] == present["build_id"]
    assert list_failures(dataset) == []


def test_a_current_site_year_is_no_failure(dataset):
    """Another machine has built it, and its clock was behind."""
    assert run(dataset, RunOptions(only=("search", "build"), years=(2020,))).exit_code == 0
    log_failure(dataset, BUILD, "network", attempt=2)
    assert list_failures(dataset) == []


def test_a_run_takes_exact_names(tmp_path, world):
    pit = gpd.read_file(world / "sites.geojson")
    file = tmp_path / "sites.geojson"
    pd.concat([pit.assign(id=name) for name in ("pit", "pit_2", "pit_3")]).to_file(file)
    dataset = make_dataset(tmp_path, world, sites=str(file))
    for names, found in (
        (("pit_3", "pit"), ["pit_3", "pit"]),
        ("pit_3,pit", ["pit_3", "pit"]),
        ("pit*", ["pit", "pit_2", "pit_3"]),
    ):
        assert make_plan(dataset, RunOptions(sites=names)).sites == found
    with pytest.raises(CatalogError, match=r"pits has no site 'pit\*'"):
        make_plan(dataset, RunOptions(sites=("pit", "pit*")))


def test_half_blocks_give_the_same_pixels(dataset, tmp_path, world):
    """Smaller blocks read more windows."""
    (tmp_path / "whole").mkdir()
    other = make_dataset(tmp_path / "whole", world)
    only = RunOptions(only=("search", "build"), years=(2020,))
    assert run(other, only).exit_code == 0
    log_failure(dataset, BUILD, "memory")
    (done,) = retry(dataset).passes
    assert done.results[BUILD].is_good
    stores = [cube.Store(place.store) for place in (other, dataset)]
    whole, halves = [cube.open_committed(store, "pit").load() for store in stores]
    for name in whole.data_vars:
        np.testing.assert_array_equal(whole[name].values, halves[name].values)
    reads = [cube.read_markers(store, "pit")[2020]["reads"]["planned"] for store in stores]
    assert reads[1] > reads[0]
