"""Run tasks on the workers of a Dask scheduler, or on this machine."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, wait
from contextlib import contextmanager
from typing import TypeVar

from minecube.errors import CatalogError, WorkerError
from minecube.jobs.failures import describe_failure

T = TypeVar("T")

_CONNECT_S = 5
"""Seconds to wait for a Dask scheduler."""
_LISTEN_S = 1.0  # seconds between checks for Ctrl-C


@contextmanager
def connect_workers(scheduler: str | None) -> Iterator[Executor | None]:
    """Yield the executor of the Dask scheduler at an address such as tcp://host:8786.

    Yields None for this machine, without an address.

    Raises:
        CatalogError: no scheduler answers, or the package `distributed` is missing.
    """
    if scheduler is None:
        yield None
        return
    try:
        from distributed import Client  # an extra, for clusters only
    except ModuleNotFoundError as error:
        raise CatalogError(
            "--scheduler needs one package more: pip install 'minecube[cluster]'"
        ) from error
    for name in ("distributed", "distributed.client"):  # both print through their own handlers
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        # As the default, a client would receive all further work of this process with Dask. This
        # work would wait for ever for a scheduler that has ended.
        client = Client(scheduler, timeout=f"{_CONNECT_S}s", set_as_default=False)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:  # ValueError: invalid address
        raise CatalogError(
            f"no Dask scheduler answers at {scheduler} ({error}); start one with `dask scheduler`, "
            "which says its address, tcp://host:8786 or the like"
        ) from error
    with client:
        yield client.get_executor()  # type: ignore[no-untyped-call]


def iterate_finished(tasks: Iterable[Future[T]]) -> Iterator[Future[T]]:
    """Yield tasks as they end.

    Raises WorkerError for a cancelled task, since its scheduler is gone.
    """
    running = set(tasks)
    while running:
        # The timeout is for Ctrl-C: a signal to another thread does not wake this thread.
        finished, running = wait(running, timeout=_LISTEN_S, return_when=FIRST_COMPLETED)
        for task in finished:
            if task.cancelled():  # no code here cancels tasks, so the scheduler is gone
                raise WorkerError(describe_failure(CancelledError()))
            yield task
