"""Worker processes that each work on one task at a time.

If one process of a `ProcessPoolExecutor` dies, the executor ends all others and fails all waiting
tasks. Here, each process has an executor of its own. A death fails the task that it was working on,
and no other.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from minecube.errors import UnguardedScriptError

_UNGUARDED = 71
"""Exit code of a process that has begun a run while it imported the user's script."""


def end_unguarded_import() -> None:
    """End this process if it is a worker that only imports the user's script so far.

    A worker imports the script of its parent. If the script starts a run when it is imported, each
    worker would start one, too. The parent learns it from the exit code.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        os._exit(_UNGUARDED)


_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")
"""CPU time of this container in microseconds, and the period it is for: `200000 100000`."""


def count_cores(limit: Path = _CPU_LIMIT) -> int:
    """Count the cores that this process may use: by its affinity and its container's limit."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    if not limit.exists():  # no Linux, or no container
        return cores
    quota, period = limit.read_text().split()
    if quota == "max":
        return cores
    return max(min(cores, int(quota) // int(period)), 1)


@dataclass
class _Task:
    """A task that waits for a process or is in work."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    future: Future[Any]


class Processes:
    """Up to `count` processes. Each starts with its first task; a dead one is replaced."""

    def __init__(
        self, count: int, context: BaseContext, initializer: Callable[[], None] | None = None
    ) -> None:
        self._context = context
        self._initializer = initializer
        self._idle: list[ProcessPoolExecutor | None] = [None] * count
        """Executors without a task; None: not yet made."""
        self._busy: set[ProcessPoolExecutor] = set()
        self._waiting: deque[_Task] = deque()
        self._lock = threading.Lock()

    def _make_executor(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, mp_context=self._context, initializer=self._initializer)

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Hand a task to the next free process.

        The future raises BrokenProcessPool if the process dies, OSError if none can be started, and
        UnguardedScriptError if the user's script starts a run when a process imports it.
        """
        task = _Task(function, args, Future())
        with self._lock:
            self._waiting.append(task)
        self._start_tasks()
        return task.future

    def _start_tasks(self) -> None:
        """Hand waiting tasks to idle processes."""
        while True:
            with self._lock:
                if not (self._idle and self._waiting):
                    return
                idle = self._idle.pop()  # the one that worked last: it has warm caches
                task = self._waiting.popleft()
                failure: Exception | None = None
                try:
                    executor, started = self._submit_to(idle, task)
                    self._busy.add(executor)
                except Exception as error:  # too many open files, for example
                    self._idle.append(None)
                    failure = error
            if failure is None:
                self._pass_on(started, task, executor)
            else:
                task.future.set_exception(failure)

    def _submit_to(
        self, executor: ProcessPoolExecutor | None, task: _Task
    ) -> tuple[ProcessPoolExecutor, Future[Any]]:
        """Submit a task to an executor, or to a new one in place of a dead or missing one."""
        if executor is not None:
            with suppress(BrokenProcessPool):  # it died without a task
                return executor, executor.submit(task.function, *task.args)
            executor.shutdown(wait=False)
        executor = self._make_executor()
        try:
            return executor, executor.submit(task.function, *task.args)
        except Exception:
            executor.shutdown(wait=False, cancel_futures=True)
            raise

    def _pass_on(self, started: Future[Any], task: _Task, executor: ProcessPoolExecutor) -> None:
        """Pass a task's end on to its future, and its process to the next task."""
        processes = list((executor._processes or {}).values())

        def end(ended: Future[Any]) -> None:
            error = None if ended.cancelled() else ended.exception()
            is_dead = isinstance(error, BrokenProcessPool)
            if is_dead:
                _keep_until_ended(executor)
            if is_dead and _UNGUARDED in [process.exitcode for process in processes]:
                error = UnguardedScriptError(
                    "the script starts a run when it is imported, and each worker imports it; "
                    'start the run below `if __name__ == "__main__":`'
                )
            with self._lock:
                self._busy.discard(executor)
                self._idle.append(None if is_dead else executor)
            if ended.cancelled():
                task.future.cancel()
            elif error is not None:
                task.future.set_exception(error)
            else:
                task.future.set_result(ended.result())
            self._start_tasks()

        started.add_done_callback(end)

    def shutdown(self) -> None:
        """End all processes. No task is in work."""
        for executor in filter(None, self._idle):
            executor.shutdown(wait=True)

    def kill(self) -> None:
        """Kill all processes. Waiting tasks never start; the futures of others fail."""
        with self._lock:
            self._waiting.clear()
            executors = [*filter(None, self._idle), *self._busy]
        for executor in executors:
            for process in list((executor._processes or {}).values()):
                with suppress(ProcessLookupError):
                    process.kill()
        for executor in executors:
            executor.shutdown(wait=True, cancel_futures=True)


def _keep_until_ended(executor: ProcessPoolExecutor) -> None:
    """Keep a broken executor until its manager thread has ended.

    The manager thread would wait for its own lock if it dropped the last reference, and the process
    would never end (Python 3.12.1 to 3.12.7 and 3.13.0).
    """
    manager = getattr(executor, "_executor_manager_thread", None)

    def keep(_kept: ProcessPoolExecutor) -> None:
        if manager is not None:
            manager.join()

    threading.Thread(
        target=keep, args=(executor,), name="keep broken executor", daemon=True
    ).start()


def make_processes(count: int, module: str, temporary: str | None = None) -> Processes:
    """Make up to `count` processes with a module imported, and with a folder for temporary files.

    Raises UnguardedScriptError for a script on standard input.
    """
    main = sys.modules["__main__"]
    script = getattr(main, "__file__", None)
    if main.__spec__ is None and script is not None and not Path(script).is_file():
        raise UnguardedScriptError(
            f"{script} is no file, and each worker imports the script; save it to a file"
        )
    # A server that has imported the module starts workers in milliseconds. It has no threads, so
    # its forks are safe.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    return Processes(count, context, partial(_start_worker, temporary))


@contextmanager
def open_processes(count: int, module: str) -> Iterator[Processes]:
    """Open processes with a module imported. They end at the end, and at once after an error."""
    processes = make_processes(count, module)
    try:
        yield processes
    except BaseException:
        processes.kill()
        raise
    processes.shutdown()


def _start_worker(temporary: str | None) -> None:
    """Prepare a worker process: it leaves Ctrl-C to its parent, and ends with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="end with parent", daemon=True).start()
    if temporary is not None:
        os.environ["TMPDIR"] = temporary
        tempfile.tempdir = None  # looks up TMPDIR again


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:  # None in the first process only
        wait([parent.sentinel])
        os._exit(1)
