"""What can disturb a run. Each function disturbs runs of a trial, and counts its disturbances."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from run_trials import WORKERS, Run, Trial

_CLOCK = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
"""Debian's package libfaketime, which moves the wall clock of a process and its children."""


def kill(pid: int) -> None:
    """Kill a process that may have ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def kill_workers(trial: Trial, rng: random.Random) -> int:
    """Kill workers that have a unit in hand. Their run goes on, and exits with 0."""
    run = trial.start()
    kills = _kill_workers_of(trial, run, rng)
    trial.expect_end(run, 0)
    return kills


def _kill_workers_of(trial: Trial, run: Run, rng: random.Random) -> int:
    kills: Counter[tuple[Any, ...]] = Counter()
    for count in sorted(rng.sample(range(1, 2 * trial.units, 3), 6)):
        if not trial.place.wait_for_events(count, run):
            break
        time.sleep(rng.uniform(0, 0.1))
        in_hand = trial.place.find_in_hand()
        # A unit whose workers die three times has failed.
        pids = [pid for pid, unit in in_hand.items() if kills[unit] < 2]
        if pids:
            pid = rng.choice(pids)
            kill(pid)
            kills[in_hand[pid]] += 1
            trial.redoable += 1
    trial.check_pixels()
    return kills.total()


def kill_drivers(trial: Trial, rng: random.Random) -> int:
    """Kill `minecube run`. Its workers must end, too."""
    return _kill_runs(trial, rng, with_workers=False)


def kill_machines(trial: Trial, rng: random.Random) -> int:
    """Kill `minecube run` together with its workers, as a loss of power does."""
    return _kill_runs(trial, rng, with_workers=True)


def _kill_runs(trial: Trial, rng: random.Random, *, with_workers: bool) -> int:
    kills = 0
    for _ in range(3):
        run = trial.start()
        target = trial.place.count_events() + rng.randint(0, 2 * trial.units // 3)
        if not trial.place.wait_for_events(target, run):
            trial.expect_end(run, 0)
            break
        time.sleep(rng.uniform(0, 0.2))
        pids = list(trial.place.find_in_hand())
        kill(run.pid)
        if with_workers:
            for pid in pids:
                kill(pid)
        run.end()
        kills += 1
        trial.redoable += WORKERS
        trial.expect_no_orphans(pids)
        trial.check_pixels()
    return kills


def kill_one_of_two(trial: Trial, rng: random.Random) -> int:
    """Start two runs at once, and kill one of them."""
    runs = [trial.start(), trial.start()]
    target = rng.randint(0, 2 * trial.units - 1)
    is_killed = trial.place.wait_for_events(target, *runs)
    if is_killed:
        dead = runs.pop(rng.randrange(2))
        kill(dead.pid)
        dead.end()
        trial.check_pixels()
    for run in runs:
        trial.expect_end(run, 0)
    return int(is_killed)


def kill_with_wrong_clocks(trial: Trial, rng: random.Random) -> int:
    """Kill runs whose wall clocks are wrong by up to two days, before or after the time of files.

    Returns 0 without libfaketime.
    """
    kills = 0
    for _ in range(2 if _CLOCK else 0):
        offset_s = rng.uniform(-2, 2) * 86400
        environment = {
            **os.environ,
            "LD_PRELOAD": str(_CLOCK),
            "FAKETIME": f"{offset_s:+.0f}",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",  # files keep the time of the disk
        }
        command = [sys.executable, "-c", "from minecube.cli import main; main()", "run"]
        command += [str(trial.place.folder / "dataset.yaml"), *trial.options]
        with (trial.place.folder / "clock.log").open("wb") as log:
            process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        target = trial.place.count_events() + rng.randint(1, trial.units)
        while trial.place.count_events() < target and process.poll() is None:
            time.sleep(0.1)
        kills += process.poll() is None
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        if process.wait() not in (0, -signal.SIGKILL):
            trial.problems.append((trial.place.folder / "clock.log").read_text()[-1500:])
        trial.redoable += WORKERS
        trial.check_pixels()
    return kills


@contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """Mount a small disk; None where that is not permitted."""
    disk = folder / "disk"
    disk.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill_disk(trial: Trial, rng: random.Random) -> int:
    """Run on a disk that fills up, then with space again. The store of the trial is on it."""
    filler = Path(trial.place.store).parent / "filler"
    free = os.statvfs(filler.parent).f_bavail * os.statvfs(filler.parent).f_frsize
    filler.write_bytes(bytes(free - rng.randrange(4096, 600_000)))
    trial.expect_end(trial.start(), 0, 1, 2)
    trial.check_pixels()
    filler.unlink()
    return 1


def stop_store(trial: Trial, rng: random.Random) -> int:
    """Stop the S3 server of the trial's store for some seconds."""
    server = trial.server
    run = trial.start()
    if not trial.place.wait_for_events(rng.randint(1, 2 * trial.units - 2), run):
        trial.expect_end(run, 0)
        return 0
    server.stop()
    time.sleep(rng.uniform(0.5, 4))
    server.start()
    trial.expect_end(run, 0, 1)
    trial.check_pixels()
    return 1


@contextmanager
def dask_cluster(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Start a Dask scheduler with two workers. Yields its address and its process."""
    file = folder / "scheduler.json"
    log = (folder / "dask.log").open("wb")
    common = {"stdout": log, "stderr": log, "start_new_session": True}
    dask = [sys.executable, "-m", "dask"]
    options = ["--scheduler-file", str(file), "--no-dashboard"]
    scheduler = subprocess.Popen([*dask, "scheduler", "--port", "0", *options], **common)
    count = ["--nworkers", str(WORKERS), "--nthreads", "1", "--death-timeout", "20"]
    workers = subprocess.Popen([*dask, "worker", *count, *options], **common)
    try:
        while not file.exists() and scheduler.poll() is None:
            time.sleep(0.1)
        yield _read_address(file), scheduler
    finally:
        for process in (workers, scheduler):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.close()


def _read_address(file: Path) -> str:
    """Return the address in a scheduler's file."""
    return str(json.loads(file.read_text())["address"])


def kill_dask_workers(trial: Trial, rng: random.Random) -> int:
    """Kill workers of a Dask cluster. Their nannies start new ones, and the run goes on."""
    with dask_cluster(trial.place.folder) as (address, _):
        run = trial.start("--engine", address)
        kills = _kill_workers_of(trial, run, rng)
        trial.expect_end(run, 0)
    return kills


def kill_scheduler(trial: Trial, rng: random.Random) -> int:
    """Kill the Dask scheduler. The run fails in one sentence, and a local run finishes its work."""
    with dask_cluster(trial.place.folder) as (address, scheduler):
        run = trial.start("--engine", address)
        is_alive = trial.place.wait_for_events(rng.randint(1, 2 * trial.units - 2), run)
        scheduler.kill()
        trial.expect_end(run, 1, 2)
        trial.check_pixels()
    return int(is_alive)
