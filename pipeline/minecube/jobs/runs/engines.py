"""Where the units of a run are worked on: processes of this machine, or a cluster."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

from minecube.catalog import Cluster, Dataset
from minecube.jobs.processes import Processes, count_cores, make_processes
from minecube.jobs.runs.inputs import choose_cluster
from minecube.jobs.runs.steps import Limits
from minecube.jobs.runs.units import Unit
from minecube.jobs.runs.worker import Result, run_unit


class Engine(Protocol):
    """Workers that take units."""

    workers: int
    """Number of workers, to keep enough units waiting."""
    threads: int
    """Threads of each worker for blocks of a composite."""

    def submit(self, unit: Unit, limits: Limits, attempt: int) -> Future[Result]:
        """Hand a unit to a worker.

        Raises WorkerError if no worker can be reached any more.
        """

    def is_death(self, error: BaseException) -> bool:
        """Whether a future ended because its worker died, not because of the unit."""

    def close(self) -> None:
        """Free the workers. No unit is in work."""

    def stop(self) -> None:
        """Stop at once. Units in work are lost."""


def share_requests(limits: Limits, cluster: Cluster, workers: int) -> Limits:
    """Give a worker its part of the requests that all workers may make together.

    `limits.workers` is the number of shards. Each shard has `workers`.
    """
    workers *= limits.workers
    connections = cluster.connections
    if connections is not None:
        connections = max(connections // workers, 1)
    return replace(limits, workers=workers, connections=connections)


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Turn SIGTERM into KeyboardInterrupt: schedulers of jobs send it at the end of a time limit.

    Only the main thread can. Elsewhere, SIGTERM stays as it is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


@dataclass
class Local:
    """Processes on this machine. A dead process is replaced, and its unit starts again."""

    dataset: Dataset
    cluster: Cluster
    workers: int = field(init=False)
    threads: int = field(init=False)
    _processes: Processes = field(init=False)

    def __post_init__(self) -> None:
        self.workers = self.dataset.workers or self.cluster.workers or count_cores()
        self.threads = self.cluster.threads or max(count_cores() // self.workers, 1)
        self._processes = make_processes(self.workers, __name__, self.cluster.temporary)

    def submit(self, unit: Unit, limits: Limits, attempt: int) -> Future[Result]:
        """Hand a unit to a process."""
        limits = share_requests(limits, self.cluster, self.workers)
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


@contextmanager
def open_engine(dataset: Dataset, steps: Sequence[str]) -> Iterator[Engine]:
    """Start the workers of the dataset's engine, and stop them at the end.

    Args:
        dataset: the dataset to work on.
        steps: steps that the workers will get.

    Raises:
        CatalogError: the engine is unknown, its scheduler does not answer, no worker comes, or no
            worker has the resources of a step.
    """
    with _start(dataset, choose_cluster(dataset), steps) as engine:
        try:
            yield engine
        except BaseException:
            engine.stop()
            raise
        engine.close()


@contextmanager
def _start(dataset: Dataset, cluster: Cluster, steps: Sequence[str]) -> Iterator[Engine]:
    if cluster.kind == "local":
        yield Local(dataset, cluster)
        return
    from minecube.jobs.runs.dask_workers import connect  # needs the extra `cluster`

    with connect(dataset, cluster, steps) as engine:
        yield engine
