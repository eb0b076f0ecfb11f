"""Hand the units of a run to Dask workers, each unit as one task.

The driver never waits for ever:

    no worker             for `wait_minutes`: the run ends
    a missing resource    an error before the run, or of the units that need it
    a worker that ends    after its lifetime or by death: Dask starts its units elsewhere. The lease
                          of a unit keeps the attempts apart. A unit with `_MOST_STARTS` starts
                          and no end has failed.
    no scheduler          the run ends
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from distributed import Client, get_worker

from minecube.catalog import Cluster, Dataset
from minecube.errors import CatalogError, WorkerError
from minecube.jobs.failures import describe_failure, one_line
from minecube.jobs.runs.deployments import start_workers
from minecube.jobs.runs.engines import share_requests
from minecube.jobs.runs.steps import Limits
from minecube.jobs.runs.units import Unit
from minecube.jobs.runs.worker import Result, run_unit

log = logging.getLogger(__name__)

_WATCH_S = 1.0
"""Seconds between two looks at the workers."""
_MOST_STARTS = 5
"""Starts of a unit without an end, after which it has failed. Dask gives up at the fourth death."""
_PROBE_S = 300
"""Longest time in seconds to import minecube on a worker."""
_CLOSED = ("closed", "closing", "newly-created")
_GONE = (CancelledError, OSError, TimeoutError, RuntimeError)
"""What a client raises that has lost its scheduler."""


def _run_counted(topic: str, dataset: Dataset, unit: Unit, limits: Limits, attempt: int) -> Result:
    """Run a unit on a Dask worker, and report its start and end to the driver."""
    worker = get_worker()
    worker.log_event(topic, [str(unit), 1])
    result = run_unit(dataset, unit, limits, attempt)
    worker.log_event(topic, [str(unit), -1])
    return result


def _read_version() -> str:
    return metadata.version("minecube")


@dataclass
class _Task:
    """A unit at the scheduler."""

    future: Any
    """Its Dask future."""
    unit: str
    needed: Mapping[str, float]
    """Resources of its worker."""


@dataclass
class DaskWorkers:
    """Workers of a Dask scheduler."""

    dataset: Dataset
    cluster: Cluster
    client: Any
    workers: int = 1
    threads: int = field(init=False)
    _tasks: dict[str, tuple[Future[Result], _Task]] = field(default_factory=dict)
    """Key -> units that have not ended."""
    _starts: Counter[str] = field(default_factory=Counter)
    """Unit -> starts without an end."""
    _resources: Sequence[Mapping[str, float]] = ()
    """Resources of each worker, as of the last look."""
    _last_seen: float = field(default_factory=time.monotonic)
    """When there was a worker."""
    _end: str = ""
    """Why no more units are taken."""
    _lock: Any = field(default_factory=threading.RLock)
    _closed: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.threads = self.cluster.threads or 1
        self._topic = f"minecube-{uuid.uuid4()}"
        self.client.subscribe_topic(self._topic, self._count)
        self._look()
        threading.Thread(target=self._watch, name="watch workers", daemon=True).start()

    def submit(self, unit: Unit, limits: Limits, attempt: int) -> Future[Result]:
        """Hand a unit to the scheduler.

        Raises WorkerError if there is no scheduler or no worker any more.
        """
        if self._end or self.client.status in _CLOSED:
            raise WorkerError(self._end or describe_failure(CancelledError()))
        promise: Future[Result] = Future()
        needed = self.cluster.resources.get(unit.step, {})
        if not self._has(needed):
            promise.set_exception(WorkerError(self.explain_lack(unit.step)))
            return promise
        key = f"{unit.step}-{uuid.uuid4()}"
        limits = share_requests(limits, self.cluster, self.workers)
        arguments = (self._topic, self.dataset, unit, limits, attempt)
        try:
            future = self.client.submit(
                _run_counted, *arguments, key=key, pure=False, resources=needed or None
            )
        except _GONE as error:
            raise WorkerError(describe_failure(CancelledError())) from error
        with self._lock:
            self._tasks[key] = (promise, _Task(future, str(unit), needed))
        future.add_done_callback(lambda _: self._pass_on(key))
        return promise

    def _pass_on(self, key: str) -> None:
        """Give the outcome of a Dask future to the driver."""
        with self._lock:
            promise, task = self._tasks.pop(key, (None, None))
        if promise is None or task is None:  # the driver has its error
            return
        try:
            result = task.future.result()
        except BaseException as error:
            self._starts[task.unit] = 0  # the driver counts deaths
            promise.set_exception(error)
        else:
            promise.set_result(result)

    def _count(self, event: tuple[float, tuple[str, int]]) -> None:
        """Count starts and ends of units."""
        _, (unit, change) = event
        self._starts[unit] += change

    def _watch(self) -> None:
        # A list of a thousand workers has megabytes.
        while not self._closed.wait(max(_WATCH_S, self.workers / 50)):
            with suppress(*_GONE):
                self._look()
            self._give_up()

    def _look(self) -> None:
        """See which workers there are."""
        state = self.client.scheduler_info(n_workers=-1)
        joined = state.get("workers", {}).values()  # a closed client has none
        self._resources = [worker["resources"] for worker in joined]
        if joined:
            self._last_seen = time.monotonic()
            self.workers = sum(worker["nthreads"] for worker in joined)

    def _give_up(self) -> None:
        """Fail units that would wait for ever."""
        waited = time.monotonic() - self._last_seen
        if waited > 60 * self.cluster.wait_minutes:
            self._end = f"{explain_absence(self.cluster)}; committed site-years are safe"
        with self._lock:
            tasks = list(self._tasks.items())
        for key, (_, task) in tasks:
            if self._end:
                self._fail(key, self._end)
            elif self._resources and not self._has(task.needed):
                self._fail(key, f"no worker is left with {_format_amounts(task.needed)}")
            elif self._starts[task.unit] >= _MOST_STARTS:
                self._fail(
                    key,
                    f"{self._starts.pop(task.unit)} workers ended before it did; give workers a longer lifetime "
                    "and time limit, or more memory",
                )

    def _fail(self, key: str, text: str) -> None:
        with self._lock:
            promise, task = self._tasks.pop(key, (None, None))
        if promise is None or task is None:
            return
        with suppress(*_GONE):
            self.client.cancel([task.future], force=True)
        promise.set_exception(WorkerError(text))

    def _has(self, needed: Mapping[str, float]) -> bool:
        """Whether one worker has these resources."""
        return not needed or any(
            all(offered.get(name, 0) >= amount for name, amount in needed.items())
            for offered in self._resources
        )

    def check_resources(self, steps: Sequence[str]) -> None:
        """Raise CatalogError if no worker has the resources of one of these steps."""
        for step in steps:
            if not self._has(self.cluster.resources.get(step, {})):
                raise CatalogError(self.explain_lack(step))

    def explain_lack(self, step: str) -> str:
        """Say which resources are missing."""
        amounts = _format_amounts(self.cluster.resources[step])
        return (
            f"engine {self.cluster.id}: the step {step} needs a worker with {amounts}, and no "
            f'worker has it; start one with `dask worker --resources "{amounts}"`, or change '
            "`resources` in clusters.yaml"
        )

    def is_death(self, error: BaseException) -> bool:
        """Whether workers died."""
        return "KilledWorker" in {kind.__name__ for kind in type(error).__mro__}

    def close(self) -> None:
        """Leave the workers to the cluster."""
        self._closed.set()

    def stop(self) -> None:
        """Drop waiting tasks. Those in work end on their own."""
        self._closed.set()
        with self._lock:
            futures = [task.future for _, task in self._tasks.values()]
            self._tasks.clear()
        with suppress(*_GONE):
            self.client.cancel(futures, force=True)


def _format_amounts(needed: Mapping[str, float]) -> str:
    return " ".join(f"{name}={amount:g}" for name, amount in needed.items())


def explain_absence(cluster: Cluster) -> str:
    """Say that there is no worker, and where to look."""
    places = {
        "slurm": "see `squeue` and the logs of the jobs",
        "kubernetes": "see `kubectl get pods` and `kubectl describe pod`",
    }
    place = places.get(cluster.kind, "start some with `dask worker ADDRESS`")
    return f"engine {cluster.id}: no worker for {cluster.wait_minutes:g} minutes; {place}"


@contextmanager
def connect(dataset: Dataset, cluster: Cluster, steps: Sequence[str]) -> Iterator[DaskWorkers]:
    """Start the workers of a cluster, or reach those of a scheduler.

    Raises CatalogError as `engines.open_engine` does.
    """
    for name in ("distributed", "distributed.client"):  # both print through their own handlers
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with start_workers(cluster) as address, _connect(cluster, address) as client:
        log.info("dashboard of engine %s: %s", cluster.id, client.dashboard_link)
        try:
            client.wait_for_workers(1, timeout=60 * cluster.wait_minutes)
        except TimeoutError as error:
            raise CatalogError(explain_absence(cluster)) from error
        _check_version(client, cluster)
        engine = DaskWorkers(dataset, cluster, client)
        engine.check_resources(steps)
        yield engine


@contextmanager
def _connect(cluster: Cluster, address: Any) -> Iterator[Any]:
    try:
        # As the default, a client would receive all further work of this process with Dask.
        client = Client(address, timeout="5s", set_as_default=False)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:  # ValueError: invalid address
        raise CatalogError(
            f"engine {cluster.id}: no Dask scheduler answers at {address} ({one_line(error)}); "
            "start one with `dask scheduler`, which says its address, tcp://host:8786 or the like"
        ) from error
    with client:
        yield client


def _check_version(client: Any, cluster: Cluster) -> None:
    """Raise CatalogError if a worker cannot import this version of minecube."""
    version = _read_version()
    probe = client.submit(_read_version, pure=False)
    try:
        their_version = probe.result(timeout=_PROBE_S)
    except CancelledError as error:
        raise WorkerError(describe_failure(error)) from error
    except Exception as error:
        raise CatalogError(
            f"engine {cluster.id}: its workers cannot run minecube ({one_line(error)}); "
            f"install minecube {version} on them"
        ) from error
    if their_version != version:
        raise CatalogError(
            f"engine {cluster.id}: its workers have minecube {their_version}, this machine has "
            f"{version}; install the same version"
        )
