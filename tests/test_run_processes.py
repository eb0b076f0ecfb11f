"""Worker processes: which tasks a death fails, and which it leaves alone."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

import pytest

from known_runs import start_fork_server, write_dataset
from minecube.cube import Store
from minecube.cube.events import read_events
from minecube.jobs.processes import Processes


@pytest.fixture
def processes() -> Iterator[Processes]:
    start_fork_server()
    made = Processes(2, multiprocessing.get_context("forkserver"))
    yield made
    made.kill()


def square(number: int) -> int:
    return number * number


def pid_after(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


@contextmanager
def no_more_files() -> Iterator[None]:
    """This process can open no file, pipe or socket."""
    free = os.open(os.devnull, os.O_RDONLY)
    os.close(free)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def die_after(seconds: float) -> None:
    time.sleep(seconds)
    die()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(text: str) -> None:
    raise ValueError(text)


def test_results_and_errors_belong_to_their_tasks(processes: Processes) -> None:
    results = [processes.submit(square, number) for number in range(8)]
    failed = processes.submit(fail, "no such mine")
    assert [future.result(60) for future in results] == [n * n for n in range(8)]
    with pytest.raises(ValueError, match="no such mine"):
        failed.result(60)


def test_a_death_fails_its_own_task_only(processes: Processes) -> None:
    """Tasks in work and waiting tasks end as if no other had died."""
    long = processes.submit(pid_after, 1.0)
    dead = [processes.submit(die) for _ in range(3)]
    waiting = [processes.submit(square, number) for number in range(5)]
    wait([long, *dead, *waiting], timeout=60)
    assert [type(future.exception()) for future in dead] == [BrokenProcessPool] * 3
    assert long.exception() is None
    assert [future.result() for future in waiting] == [0, 1, 4, 9, 16]


def test_a_process_that_died_without_a_task_is_replaced(processes: Processes) -> None:
    first = processes.submit(pid_after, 0.0).result(60)
    os.kill(first, signal.SIGKILL)
    time.sleep(0.2)
    second = processes.submit(pid_after, 0.0)
    wait([second], timeout=60)
    # The death is noticed before the task, or ends it.
    if second.exception() is None:
        assert second.result() != first
    else:
        assert isinstance(second.exception(), BrokenProcessPool)
    assert processes.submit(square, 3).result(60) == 9


def test_a_script_without_a_guard_is_told_so(run_world: Path, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, run_world)
    script = tmp_path / "script.py"
    lines = ["from pathlib import Path", "from minecube import catalog, jobs"]
    call = (
        f"jobs.run(catalog.load_dataset(Path({str(dataset)!r})), jobs.RunOptions(only=('search',)))"
    )
    script.write_text("\n".join([*lines, call]))
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=200)
    assert ended.returncode == 1
    assert ended.stderr.count("Traceback") == 1  # of the script itself, and none of its workers
    assert 'start the run below `if __name__ == "__main__":`' in ended.stderr.splitlines()[-1]
    assert not read_events(Store(tmp_path / "cubes.zarr")).table["event"].eq("end").any()
    script.write_text("\n".join([*lines, 'if __name__ == "__main__":', f"    {call}"]))
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=200)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert len(read_events(Store(tmp_path / "cubes.zarr")).table.query("event == 'end'")) == 4


def test_a_script_on_standard_input_is_refused(run_world: Path, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, run_world)
    script = f"""
from pathlib import Path
from minecube import catalog, jobs
if __name__ == "__main__":
    jobs.run(catalog.load_dataset(Path({str(dataset)!r})), jobs.RunOptions(only=("search",)))
"""
    words = [sys.executable, "/dev/stdin"]
    ended = subprocess.run(words, input=script, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert "is no file, and each worker imports the script; save it to a file" in last


def test_no_more_processes_than_asked_for_work_at_once(processes: Processes) -> None:
    pids = {processes.submit(pid_after, 0.05) for _ in range(10)}
    assert len({future.result(60) for future in pids}) <= 2


def test_tasks_fail_if_no_process_can_be_started(processes: Processes) -> None:
    """Later tasks run once a process can be started again."""
    with no_more_files():
        futures = [processes.submit(square, number) for number in range(3)]
        assert [type(future.exception(60)) for future in futures] == [OSError] * 3
    assert processes.submit(square, 3).result(60) == 9


def test_a_dead_process_that_cannot_be_replaced_fails_the_next_task() -> None:
    """Both futures end, so no one waits for ever."""
    start_fork_server()
    single = Processes(1, multiprocessing.get_context("forkserver"))
    dead = single.submit(die_after, 1.0)
    waiting = single.submit(square, 3)
    with no_more_files():
        assert isinstance(dead.exception(60), BrokenProcessPool)
        assert isinstance(waiting.exception(60), OSError)
    assert single.submit(square, 3).result(60) == 9
    single.kill()
