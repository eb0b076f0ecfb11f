"""Runs on real Dask schedulers and workers, which die, retire and lack what is needed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import dask
import pytest
import xarray as xr

from known_builds import args, run_here
from known_datasets import begun_builds, blocked_builds, read_log, read_site, write_dataset
from minecube import cube
from minecube.catalog import load_dataset
from minecube.cube.events import EventLog
from minecube.jobs.runs import RunOptions, run

distributed = pytest.importorskip("distributed")


@contextlib.contextmanager
def start_scheduler(workers, allowed_failures=0):
    """A cluster of worker processes with one thread each. Tasks fail at the first death."""
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": allowed_failures}),
        distributed.LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
        ) as cluster,
    ):
        yield cluster


@pytest.fixture(scope="module")
def cluster():
    with start_scheduler(workers=2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def plain(world, tmp_path_factory):
    """The folder of the same cubes, built without Dask."""
    folder = tmp_path_factory.mktemp("plain")
    run_here("build", *args(world, folder / "cubes.zarr"))
    return folder


def wait_for(condition):
    until = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


@contextlib.contextmanager
def running(path):
    """Run search and build of a dataset in a thread. Yields the list that gets its summary."""
    summaries = []
    options = RunOptions(only=("search", "build"))
    thread = threading.Thread(target=lambda: summaries.append(run(load_dataset(path), options)))
    thread.start()
    yield summaries
    thread.join(100)
    assert not thread.is_alive()


def test_a_run_on_a_scheduler_makes_the_same_cubes(world, plain, cluster, tmp_path):
    path = write_dataset(world, tmp_path)
    _, err = run_here("run", path, "--engine", cluster.scheduler_address)
    assert f"dashboard of engine dask: {cluster.dashboard_link}" in err
    assert read_log(path)["event"].eq("end").sum() == 5  # search and build of 2 years, an audit
    xr.testing.assert_identical(read_site(tmp_path), read_site(plain))


def test_an_update_and_a_retry_run_on_a_scheduler(world, plain, cluster, tmp_path):
    path = write_dataset(world, tmp_path)
    engine = ("--engine", cluster.scheduler_address)
    _, err = run_here("update", path, *engine)
    assert f"dashboard of engine dask: {cluster.dashboard_link}" in err
    store = cube.Store(str(tmp_path / "cubes.zarr"))
    year = sorted(cube.read_markers(store, "pit"))[0]
    shutil.rmtree(tmp_path / "cubes.zarr" / "pit" / "builds" / str(year))
    failed = {"step": "build", "site": "pit", "year": year, "state": "failed"}
    EventLog(store).write({"event": "end", "error_class": "network", **failed})
    _, err = run_here("retry", path, *engine)
    assert f"dashboard of engine dask: {cluster.dashboard_link}" in err
    xr.testing.assert_identical(read_site(tmp_path), read_site(plain))


def test_a_unit_whose_worker_is_killed_is_tried_again(world, plain, cluster, tmp_path):
    path = write_dataset(world, tmp_path, engine=cluster.scheduler_address)
    with blocked_builds(path) as release, running(path) as summaries:
        wait_for(lambda: begun_builds(path))
        os.kill(begun_builds(path)[0], signal.SIGKILL)
        wait_for(lambda: len(begun_builds(path)) > 1)
        release()
    assert summaries[0].exit_code == 0
    builds = read_log(path).query("step == 'build'")
    killed = builds[builds["year"] == builds["year"].iloc[0]]
    assert list(killed["event"]) == ["start", "start", "end"]
    assert list(killed["attempt"]) == [1, 2, 2]
    xr.testing.assert_identical(read_site(tmp_path), read_site(plain))


def test_a_step_without_its_resource_is_an_error_at_once(world, cluster, tmp_path):
    entry = {
        "title": "Two kinds of workers",
        "kind": "dask",
        "address": cluster.scheduler_address,
        "resources": {"build": {"GPU": 1}},
    }
    path = write_dataset(world, tmp_path, {"two-kinds": entry}, engine="two-kinds")
    _, err = run_here("run", path, ok=2)
    assert "engine two-kinds: the step build needs a worker with GPU=1, and no worker has it" in err
    assert not (tmp_path / "cubes.zarr").exists()
    run_here("run", path, "--only", "search")


@pytest.mark.parametrize("command", ["update", "retry"])
def test_an_unknown_engine_is_refused_before_the_work(world, tmp_path, command):
    _, err = run_here(command, write_dataset(world, tmp_path), "--engine", "typo", ok=2)
    assert "error: unknown engine 'typo'; there is: local, slurm" in err
    assert not (tmp_path / "cubes.zarr").exists()


@pytest.mark.parametrize("engine", ["tcp://127.0.0.1:9", "tcp://nowhere", "typo"])
def test_an_engine_that_does_not_answer_is_one_sentence(world, tmp_path, engine):
    _, err = run_here("run", write_dataset(world, tmp_path), "--engine", engine, ok=2)
    expected = {
        "tcp://127.0.0.1:9": "engine dask: no Dask scheduler answers at tcp://127.0.0.1:9",
        "tcp://nowhere": "engine 'tcp://nowhere': field 'address': expected an address such as",
        "typo": "unknown engine 'typo'; there is: local, slurm",
    }
    assert f"error: {expected[engine]}" in err
    assert not (tmp_path / "cubes.zarr").exists()


def test_a_scheduler_without_workers_ends_the_wait(world, tmp_path):
    with start_scheduler(workers=0) as empty:
        entry = {"title": "None", "kind": "dask", "wait_minutes": 0.05}
        entry["address"] = empty.scheduler_address
        path = write_dataset(world, tmp_path, {"empty": entry}, engine="empty")
        _, err = run_here("run", path, ok=2)
    assert "error: engine empty: no worker for 0.05 minutes; start some" in err
    assert not (tmp_path / "cubes.zarr").exists()


def test_a_worker_that_retires_leaves_no_second_writer(world, plain, cluster, tmp_path):
    """Dask does not wait for a task at the end of a worker's lifetime: it starts it elsewhere."""
    path = write_dataset(world, tmp_path, engine=cluster.scheduler_address, years="2020")
    with (
        blocked_builds(path) as release,
        running(path) as summaries,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        wait_for(lambda: begun_builds(path))
        (first,) = begun_builds(path)
        address = client.run(os.getpid)
        (retired,) = [worker for worker, process in address.items() if process == first]
        client.run(end_lifetime, workers=[retired], wait=False)
        # The other worker gets the unit, finds its lease taken, and leaves it alone.
        wait_for(lambda: retired not in client.scheduler_info()["workers"])
        time.sleep(5)
        assert begun_builds(path) == [first]
        release()
    assert summaries[0].exit_code == 0
    builds = read_log(path).query("step == 'build'")
    # Dask may end the retired worker before it has written its end.
    assert list(builds["event"])[-1] == "end"
    assert set(builds["state"].dropna()) == {"done"}
    both = read_site(plain).sel(year=[2020])
    xr.testing.assert_identical(read_site(tmp_path).reflectance, both.reflectance)


async def end_lifetime(dask_worker):
    """Do what a worker does at the end of its lifetime."""
    await dask_worker.close_gracefully(restart=True)


def start_process(name, *options):
    command = [sys.executable, "-m", f"distributed.cli.dask_{name}", "--host", "127.0.0.1"]
    return subprocess.Popen([*command, *map(str, options)], stderr=subprocess.DEVNULL)


def test_a_scheduler_that_is_killed_ends_the_run(world, tmp_path):
    address = tmp_path / "scheduler.json"
    known = ("--scheduler-file", address, "--no-dashboard")
    killed = start_process("scheduler", "--port", 0, *known)
    worker = start_process("worker", "--nthreads", 1, *known)
    try:
        wait_for(lambda: address.exists() and address.read_text().endswith("}"))
        engine = json.loads(address.read_text())["address"]
        path = write_dataset(world, tmp_path / "mines", engine=engine)

        def kill():
            wait_for(lambda: begun_builds(path))
            killed.kill()

        with blocked_builds(path), ThreadPoolExecutor(1) as pool:
            pool.submit(kill)
            _, err = run_here("run", path, ok=1)
    finally:
        for process in (killed, worker):
            process.kill()
            process.wait()
    assert err.endswith(
        "error: the Dask scheduler is gone; committed site-years are safe, "
        "so start it and run the same command again\n"
    )


@pytest.mark.slow
def test_workers_that_always_end_fail_the_unit(world, tmp_path):
    """Dask alone would start it again for ever."""
    with start_scheduler(workers=1, allowed_failures=100) as cluster:
        entry = {"title": "Leaving", "kind": "dask", "wait_minutes": 5}
        entry["address"] = cluster.scheduler_address
        path = write_dataset(world, tmp_path, {"leaving": entry}, engine="leaving", years="2020")
        with blocked_builds(path):
            killed = []
            with running(path) as summaries:
                while not summaries:
                    for process in set(begun_builds(path)) - set(killed):
                        os.kill(process, signal.SIGKILL)
                        killed.append(process)
                    time.sleep(0.2)
            (failure,) = summaries[0].failures.values()
    # The run may end before the fifth worker is killed.
    assert failure.message.startswith("5 workers ended before it did")
    assert len(killed) in (4, 5)
