"""Where the units of a run are worked on: processes of this machine, or a Dask cluster."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any, Protocol

from minecube.catalog import Dataset
from minecube.jobs.runs.processes import Processes
from minecube.jobs.runs.steps import Limits
from minecube.jobs.runs.units import Unit
from minecube.jobs.runs.worker import Result, run_unit
from minecube.jobs.workers import connect_workers

log = logging.getLogger(__name__)


class Engine(Protocol):
    """Workers that take units."""

    workers: int
    """Number of workers, to keep enough units waiting."""
    threads: int
    """Threads of each worker for blocks of a composite."""

    def submit(self, unit: Unit, limits: Limits, attempt: int) -> Future[Result]:
        """Hand a unit to a worker."""

    def is_death(self, error: BaseException) -> bool:
        """Whether a future ended because its worker died, not because of the unit."""

    def close(self) -> None:
        """Free the workers. No unit is in work."""

    def stop(self) -> None:
        """Stop at once. Units in work are lost."""


def count_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker() -> None:
    """Prepare a worker process: it leaves Ctrl-C to its parent, and ends with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="end with parent", daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:  # None in the first process only
        wait([parent.sentinel])
        os._exit(1)


@dataclass
class Local:
    """Processes on this machine. A dead process is replaced, and its unit starts again."""

    dataset: Dataset
    workers: int
    threads: int = field(init=False)
    _processes: Processes = field(init=False)

    def __post_init__(self) -> None:
        self.threads = max(count_cores() // self.workers, 1)
        # A server that has imported this module starts workers in milliseconds. It has no threads,
        # so its forks are safe.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._processes = Processes(self.workers, context, _start_worker)

    def submit(self, unit: Unit, limits: Limits, attempt: int) -> Future[Result]:
        """Hand a unit to a process."""
        return self._processes.submit(run_unit, self.dataset, unit, limits, attempt)

    def is_death(self, error: BaseException) -> bool:
        """Whether a process died."""
        return isinstance(error, BrokenProcessPool)

    def close(self) -> None:
        """End all processes."""
        self._processes.shutdown()

    def stop(self) -> None:
        """Kill all processes."""
        self._processes.kill()


@dataclass
class Cluster:
    """A Dask cluster. Each task is one unit."""

    dataset: Dataset
    client: Any
    workers: int
    threads: int = 1

    def submit(self, unit: Unit, limits: Limits, attempt: int) -> Future[Result]:
        """Hand a unit to the scheduler."""
        future: Future[Result] = self.client.submit(run_unit, self.dataset, unit, limits, attempt)
        return future

    def is_death(self, error: BaseException) -> bool:
        """Whether workers died."""
        return "KilledWorker" in {kind.__name__ for kind in type(error).__mro__}

    def close(self) -> None:
        """Leave the workers to the cluster."""
        self.client.shutdown(wait=True)

    def stop(self) -> None:
        """Drop waiting tasks. Those in work end on their own."""
        self.client.shutdown(wait=False)


@contextmanager
def open_engine(dataset: Dataset) -> Iterator[Engine]:
    """Start the workers of the dataset's engine, and stop them at the end.

    Raises:
        CatalogError: the engine is unknown, or its scheduler does not answer.
    """
    with _start(dataset) as engine:
        try:
            yield engine
        except BaseException:
            engine.stop()
            raise
        engine.close()


@contextmanager
def _start(dataset: Dataset) -> Iterator[Engine]:
    if dataset.engine == "local":
        yield Local(dataset, dataset.workers or count_cores())
        return
    with connect_workers(dataset.engine) as client:
        yield Cluster(dataset, client, workers=8)
