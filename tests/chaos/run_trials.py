"""Start runs of one tiny dataset, watch their event logs, and compare what they leave."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from campaign import exit_with, hash_store, remove_store

from known_runs import write_dataset
from minecube import cube
from minecube.cube.events import read_events
from minecube.errors import MinecubeError

WORKERS = 2
FEW_STEPS = ("--only", "search,build,label,predict,tracks")
"""Options for runs without the slow drawing of audits, scores and exports."""
_END_S = 300.0
"""Most seconds of a run."""
_POLL_S = 0.1
_ORPHAN_S = 20.0
"""Most seconds that workers may outlive their driver."""
_SAME = ("tracks/**/*.csv", "tracks/**/*.tif", "scores/**/*.csv", "scores/**/*.json", "audit/*.csv")
"""Results whose bytes are the same in every run. Exports have the times of commits."""
_FORK = multiprocessing.get_context("forkserver")


@dataclass
class Run:
    """A `minecube run` in a process of its own."""

    process: Any
    output: Path

    @property
    def pid(self) -> int:
        """The process."""
        return int(self.process.pid)

    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return bool(self.process.is_alive())

    def end(self) -> int:
        """Wait for its end. Returns the exit code, negative for a signal."""
        self.process.join(_END_S)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        return int(self.process.exitcode)


def _run_in_child(words: list[str], output: Path) -> None:
    """Run a command and end this process with the command's exit code."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file, stream.fileno())
    torch.set_num_threads(1)
    exit_with(words)


@dataclass
class Place:
    """A folder with a dataset.yaml, its store and its results."""

    folder: Path
    world: Path
    store: str
    runs: list[Run] = field(default_factory=list)

    @classmethod
    def make(cls, folder: Path, world: Path, store: str | None = None) -> Place:
        """Write the dataset.yaml. The store is in the folder, or at another address."""
        folder.mkdir(parents=True)
        store = store or str(folder / "cubes.zarr")
        write_dataset(folder, world, store=store, scenes="scenes", workers=WORKERS)
        return cls(folder, world, store)

    def start(self, *options: str) -> Run:
        """Start `minecube run`."""
        output = self.folder / f"run-{len(self.runs)}.log"
        words = ["run", str(self.folder / "dataset.yaml"), *options]
        process = _FORK.Process(target=_run_in_child, args=(words, output))
        process.start()
        run = Run(process, output)
        self.runs.append(run)
        return run

    def read_events(self) -> Any:
        """Return the table of events; None if there is no store yet."""
        with contextlib.suppress(Exception):  # the store may be out of reach
            return read_events(cube.Store(self.store)).table
        return None

    def count_events(self) -> int:
        """Count the events of all runs."""
        table = self.read_events()
        return 0 if table is None else len(table)

    def find_in_hand(self) -> dict[int, tuple[Any, ...]]:
        """Map the processes of workers that have started a unit and not ended it to the unit."""
        table = self.read_events()
        if table is None or table.empty:
            return {}
        last = table.drop_duplicates("worker", keep="last")
        begun = last[last["event"] == "start"]
        units = begun[["step", "site", "year"]].itertuples(index=False, name=None)
        pids = [int(name.rsplit("-", 2)[1]) for name in begun["worker"]]
        return {pid: unit for pid, unit in zip(pids, units, strict=True) if is_running(pid)}

    def wait_for_events(self, count: int, *runs: Run) -> bool:
        """Wait until there are this many events. Returns False if all runs end before."""
        while self.count_events() < count:
            if not any(run.is_alive() for run in runs):
                return False
            time.sleep(_POLL_S)
        return any(run.is_alive() for run in runs)

    def hash_pixels(self) -> dict[str, str]:
        """Hash each committed site-year and map, as readers see them.

        Empty if readers get an error: of a store without sites, or of labels half written.
        """
        try:
            return hash_store(self.store)
        except MinecubeError:
            return {}

    def hash_results(self) -> dict[str, str]:
        """Hash the files of audits, tracks, scores and exports."""
        results = self.folder / "results"
        return {
            str(path.relative_to(results)): hashlib.sha256(path.read_bytes()).hexdigest()[:12]
            for pattern in _SAME
            for path in sorted(results.glob(pattern))
        }

    def remove(self) -> None:
        """Remove the store. The folder goes with the campaign's."""
        remove_store(self.store)


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@dataclass(frozen=True)
class Undisturbed:
    """What a run leaves that nothing disturbs."""

    pixels: dict[str, str]
    results: dict[str, str]
    units: int


def run_undisturbed(folder: Path, world: Path, options: tuple[str, ...] = ()) -> Undisturbed:
    """Run the dataset once. Raises AssertionError if the run fails."""
    place = Place.make(folder, world)
    run = place.start(*options)
    assert run.end() == 0, run.output.read_text()
    units = place.count_events() // 2
    return Undisturbed(place.hash_pixels(), place.hash_results(), units)


@dataclass
class Trial:
    """A place whose runs are disturbed."""

    place: Place
    undisturbed: Undisturbed
    options: tuple[str, ...] = ()
    """Options of `minecube run`: none, or `FEW_STEPS`."""
    server: Any = None
    """The S3 server of the store, if it is there."""
    problems: list[str] = field(default_factory=list)
    redoable: int = 0
    """Units that were in the hands of killed workers."""

    @property
    def units(self) -> int:
        """Units of a whole run."""
        return 14 if self.options else self.undisturbed.units

    def start(self, *options: str) -> Run:
        """Start a run."""
        return self.place.start(*options, *self.options)

    def check_pixels(self) -> None:
        """Check that all that can be read now is as in the undisturbed run."""
        for name, value in self.place.hash_pixels().items():
            # Labels of a site may be missing until its step; maps, until they are finished.
            if value != self.undisturbed.pixels[name] and "labels" not in name:
                self.problems.append(f"{name} differs right after a disturbance")

    def expect_end(self, run: Run, *codes: int) -> None:
        """Wait for the end of a run, and check its exit code and its errors."""
        code = run.end()
        text = run.output.read_text()
        if code not in codes:
            self.problems.append(f"exit {code} instead of {codes}: {text[-1500:]}")
        if "Traceback" in text:
            self.problems.append(f"a traceback: {text[-3000:]}")

    def expect_no_orphans(self, pids: list[int]) -> None:
        """Check that workers end soon after their driver."""
        deadline = time.monotonic() + _ORPHAN_S
        while any(is_running(pid) for pid in pids):
            if time.monotonic() > deadline:
                self.problems.append("workers outlive their driver")
                return
            time.sleep(0.05)

    def finish(self) -> None:
        """Run to the end, and compare everything with the undisturbed run."""
        self.expect_end(self.start(), 0)
        if self.problems:
            return
        self.problems += list(self._compare())
        self.problems += [str(finding) for finding in self._verify()]
        self.problems += list(self._check_locks())
        rebuilt = self._list_rebuilt()
        if rebuilt:
            self.problems.append(f"built twice: {rebuilt}")

    def _compare(self) -> Iterator[str]:
        results = self.undisturbed.results
        if self.options:
            results = {name: value for name, value in results.items() if name.startswith("tracks/")}
        found = {**self.place.hash_pixels(), **self.place.hash_results()}
        wanted = {**self.undisturbed.pixels, **results}
        for name in sorted(found.keys() | wanted.keys()):
            if found.get(name) != wanted.get(name):
                yield f"{name} is {found.get(name)} instead of {wanted.get(name)} at the end"

    def _verify(self) -> list[Any]:
        return list(cube.verify(cube.Store(self.place.store)).findings)

    def _check_locks(self) -> Iterator[str]:
        """Yield the locks that a run could not take. Files of dead runs do no harm."""
        for path in Path(self.place.store, ".locks").glob("*"):
            with path.open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    yield f"{path.name} is still locked"

    def _list_rebuilt(self) -> list[str]:
        """List the site-years that more than one attempt has built to the end."""
        table = self.place.read_events()
        # An attempt that finds the work of another run reads nothing.
        builds = table[(table["step"] == "build") & (table["bytes"] > 0)]
        counts = builds[builds["state"] != "failed"].groupby(["site", "year"], observed=True).size()
        return [str(name) for name in counts.index[counts > 1]]

    def count_repeated(self) -> int:
        """Count attempts beyond the first of each unit that did not follow a failure."""
        table = self.place.read_events()
        keys = ["step", "site", "year"]
        starts = table[table["event"] == "start"].groupby(keys, observed=True).size()
        failed = table[table["state"] == "failed"].groupby(keys, observed=True).size()
        return int((starts - 1 - failed.reindex(starts.index).fillna(0)).clip(lower=0).sum())

    def check_repeats(self) -> None:
        """Check that no more units were repeated than were in the hands of killed workers."""
        repeated = self.count_repeated()
        if repeated > self.redoable:
            self.problems.append(f"{repeated} units repeated, {self.redoable} were in work")

    def check_lines(self) -> None:
        """Check that every line of the event logs is JSON."""
        for path in Path(self.place.store, ".runs", "events").glob("*.jsonl"):
            for line in path.read_bytes().splitlines():
                with contextlib.suppress(ValueError):
                    if not line or isinstance(json.loads(line), dict):
                        continue
                self.problems.append(f"{path.name}: a damaged line {line[:80]!r}")
