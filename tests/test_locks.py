"""Two runs never hold one lock; a dead run's lock is free."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import obstore.exceptions
import pytest
import zarr
from obstore.store import from_url

from known_scenes import site_of
from minecube import cube
from minecube.cube import locks
from minecube.errors import BusyError


def locks_of(store):
    return sorted(p.name for p in (store / ".locks").glob("*"))


def test_a_second_holder_is_told_who_holds_it(tmp_path, monkeypatch):
    store = cube.Store(tmp_path / "cubes.zarr")
    with locks.hold(store, "pit/builds/2020"):
        assert locks_of(tmp_path / "cubes.zarr") == ["pit.builds.2020.lock"]
        said = rf"cubes.zarr: pit/builds/2020 is being written by another run \(process {os.getpid()} on "
        with pytest.raises(BusyError, match=said), locks.hold(store, "pit/builds/2020"):
            pass
        with locks.hold(store, "pit/builds/2021"), locks.hold(store, "pit"):
            pass  # others are free
        monkeypatch.chdir(tmp_path)
        with pytest.raises(BusyError), locks.hold(cube.Store("cubes.zarr/"), "pit/builds/2020"):
            pass  # the same store by another name
    with locks.hold(store, "pit/builds/2020") as again:
        again.check()
    assert list((tmp_path / "cubes.zarr").iterdir()) == []


def test_threads_take_turns(tmp_path):
    """Each adds 1 to a number in a way that loses additions unless it is alone."""
    store = cube.Store(tmp_path / "cubes.zarr")
    total = [0]

    def add():
        for _ in range(20):
            with locks.hold(store, "pit", wait_s=60):
                seen = total[0]
                time.sleep(0.001)
                total[0] = seen + 1

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert total == [80]


def _count(store, path, times):
    for _ in range(times):
        with locks.hold(store, "pit", wait_s=60):
            seen = int(path.read_text())
            path.write_text(str(seen + 1))


def test_processes_take_turns(tmp_path):
    path = tmp_path / "number"
    path.write_text("0")
    store = cube.Store(tmp_path / "cubes.zarr")
    context = multiprocessing.get_context("fork")
    counting = [context.Process(target=_count, args=(store, path, 100)) for _ in range(3)]
    for process in counting:
        process.start()
    for process in counting:
        process.join()
    assert [process.exitcode for process in counting] == [0, 0, 0]
    assert path.read_text() == "300"
    assert locks_of(tmp_path / "cubes.zarr") == []


def _take_often(store, name):
    for _ in range(300):
        with locks.hold(store, name):
            pass


def test_a_lock_of_another_name_never_stands_in_the_way(tmp_path):
    """The last holder removes the folder of locks, also while another process takes a lock."""
    store = cube.Store(tmp_path / "cubes.zarr")
    context = multiprocessing.get_context("fork")
    taking = [context.Process(target=_take_often, args=(store, f"pit-{n}")) for n in range(3)]
    for process in taking:
        process.start()
    for process in taking:
        process.join()
    assert [process.exitcode for process in taking] == [0, 0, 0]
    assert locks_of(tmp_path / "cubes.zarr") == []


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    script = f"""
        import time
        from minecube.cube import Store
        from minecube.cube.locks import hold
        with hold(Store({str(tmp_path / "cubes.zarr")!r}), "pit"):
            print("held", flush=True)
            time.sleep(60)
    """
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with (
        pytest.raises(BusyError, match=rf"process {holder.pid} on "),
        locks.hold(cube.Store(tmp_path / "cubes.zarr"), "pit"),
    ):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with locks.hold(cube.Store(tmp_path / "cubes.zarr"), "pit"):
        pass


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    """A process that holds the lock is killed while its child lives on."""
    script = f"""
        import multiprocessing, time
        from minecube.cube import Store
        from minecube.cube.locks import hold
        with hold(Store({str(tmp_path / "cubes.zarr")!r}), "pit"):
            multiprocessing.get_context("fork").Process(target=time.sleep, args=(5,)).start()
            print("held", flush=True)
            time.sleep(60)
    """
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locks.hold(cube.Store(tmp_path / "cubes.zarr"), "pit", wait_s=2):
        pass
    holder.stdout.close()


@pytest.fixture
def quick(monkeypatch):
    """Leases that die within a second."""
    monkeypatch.setattr(locks, "LEASE_S", 0.8)
    monkeypatch.setattr(locks, "RENEW_S", 0.1)


def test_a_lease_that_is_renewed_is_not_taken_over(bucket, quick):
    store = cube.Store(f"{bucket}/a/cubes.zarr")
    with locks.hold(store, "pit") as first:
        start = time.monotonic()
        with (
            pytest.raises(BusyError, match=r"a/cubes.zarr: pit is being written by another run"),
            locks.hold(store, "pit"),
        ):
            pass
        assert time.monotonic() - start < locks.LEASE_S
        with (
            pytest.raises(BusyError),
            locks.hold(store, "pit", wait_s=2),
        ):  # longer than a dead lease lasts
            pass
        first.check()
        with locks.hold(store, "quarry"):
            pass
        (kept,) = [entry["path"] for batch in from_url(bucket).list() for entry in batch]
        assert kept == "a/cubes.zarr/.locks/pit.json"
    with locks.hold(store, "pit"):
        pass
    assert [entry for batch in from_url(bucket).list() for entry in batch] == []


def test_a_dead_lease_is_taken_over_and_its_holder_notices(bucket, quick):
    store = cube.Store(f"{bucket}/cubes.zarr")
    dead = locks._Lease(store, "pit")
    assert dead._try_put("create")  # and never renewed
    with locks.hold(store, "pit") as lock:
        lock.check()
        with pytest.raises(BusyError):
            dead.check()
        assert not dead._try_put(dead.tag)
    dead._thread.start()
    dead.release()


def test_a_put_whose_answer_was_lost_is_no_conflict(bucket):
    """The client repeats it, and its own first put is then in the way."""
    lease = locks._Lease(cube.Store(f"{bucket}/cubes.zarr"), "pit")
    content = lease._content()
    lease.objects.put(lease.key, content)
    assert lease._try_put("create")
    lease.check()


def test_a_tag_holds_what_each_store_compares():
    """Google Cloud Storage refuses a conditional put without the version (generation) of the object."""
    assert locks._tag_of({"e_tag": '"a"', "version": None, "size": 3}) == {"e_tag": '"a"'}
    assert locks._tag_of({"e_tag": '"a"', "version": "17", "size": 3}) == {
        "e_tag": '"a"',
        "version": "17",
    }


def test_of_many_takers_one_wins(bucket, quick):
    leases = [locks._Lease(cube.Store(f"{bucket}/cubes.zarr"), "pit") for _ in range(8)]
    won = []

    def take(lease):
        if lease._try_put("create"):
            won.append(lease)

    threads = [threading.Thread(target=take, args=(lease,)) for lease in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    with pytest.raises(obstore.exceptions.AlreadyExistsError):
        leases[0].objects.put(leases[0].key, b"", mode="create")


def test_a_run_that_was_suspended_past_its_lease_commits_nothing(bucket, monkeypatch):
    """A laptop sleeps in the middle of a build, another run takes over and commits, and the first one wakes."""
    spec = importlib.util.spec_from_file_location(
        "opening", Path(__file__).with_name("test_opening.py")
    )
    test_opening = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(test_opening)
    monkeypatch.setattr(locks, "LEASE_S", 0.6)
    monkeypatch.setattr(locks, "RENEW_S", 60.0)  # no renewal while it sleeps
    store = cube.Store(f"{bucket}/cubes.zarr")
    site = site_of("pit", 360000, 5600040, 90, 90)
    cube.create_site(store, site, test_opening.grid_of(site), (2020,), test_opening.RECIPE)
    slept = []

    def sleep():
        if not slept:
            slept.append(test_opening.build(store, site, 2020, 3000, overwrite=True, workers=1))
        return False

    with pytest.raises(BusyError, match="pit/builds/2020 is being written by another run"):
        test_opening.build(store, site, 2020, 2000, workers=1, stopped=sleep)
    assert slept == [True]
    assert int(cube.open_committed(store, "pit").reflectance.max()) == 3007
    # The first run's blocks are left, apart from the cube. The scene list of these builds is no Parquet.
    wrong = [f.what for f in cube.verify(store).findings if f.kind != "unfinished"]
    assert wrong == ["builds/2020/scenes"]


def test_two_sites_of_a_fresh_store_are_created_at_once(tmp_path, monkeypatch):
    """Each has a lock of its own, and both make the group above them: the second finds it made since Zarr looked."""
    store = cube.Store(tmp_path / "cubes.zarr")
    open_group = zarr.open_group

    def overtaken(target, *, path, mode, **options):
        if not path and mode == "a":
            zarr.create_group(target)  # the other run
            zarr.create_group(target)  # Zarr's own, which looked before
        return open_group(target, path=path, mode=mode, **options)

    monkeypatch.setattr(zarr, "open_group", overtaken)
    store.begin_group("pit", {"title": "mine"})
    assert open_group(str(store), path="pit", mode="r").attrs["title"] == "mine"
