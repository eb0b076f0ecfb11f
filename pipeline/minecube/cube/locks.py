"""Locks to keep two runs from writing the same part of a store.

A lock has a name, such as `Germany_1` or `Germany_1/builds/2020`. Locks lie in `.locks` in the
store.

    folder        flock(2): the kernel frees the lock of a killed process
    object store  a lease, written with conditional puts. Its holder renews it every few seconds.
                  After `LEASE_S` without renewal it is dead and is taken over. Leases use only this
                  machine's monotonic clock, so a wrong clock does no harm.

Two threads of one process also exclude each other.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import obstore.exceptions

from minecube.cube.store import Store
from minecube.errors import BusyError, CubeError

log = logging.getLogger(__name__)

LOCKS = ".locks"
"""Folder of the locks in a store."""
LEASE_S = 30.0
"""Seconds without renewal before a lease is dead."""
RENEW_S = 5.0
"""Seconds between two renewals of a lease."""
WAIT_S = 120.0
"""Seconds to wait for a briefly held lock, such as that of a site's metadata."""
_POLL_S = 0.05


class Lock:
    """A lock held by this run. A flock is lost only with its process."""

    def check(self) -> None:
        """Raise BusyError if another run has taken over the lock. No run can take over a flock."""


@contextmanager
def hold(store: Store, name: str, *, wait_s: float = 0.0) -> Iterator[Lock]:
    """Keep a lock of a store for writing: a lease in an object store, a file lock in a folder.

    Yields the lock. Check it before a commit: it must still be held. `name` is the path of the group
    or part in the store that only one run may write. `wait_s` is the time to wait for another
    holder, in seconds; 0 fails at once.

    Raises:
        BusyError: another run holds the lock.
        CubeError: the file system has no locks, the store is packed, or it cannot be written.
    """
    with store.writing():
        if store.path is None:
            with _hold_lease(store, name, wait_s) as lease:
                yield lease
        else:
            with _hold_file(store.path, name, wait_s) as lock:
                yield lock


def _busy(store: object, name: str, holder: dict[str, Any]) -> BusyError:
    process, host, since = (holder.get(entry, "?") for entry in ("process", "host", "since"))
    return BusyError(
        f"{store}: {name} is being written by another run (process {process} on {host}, since "
        f"{since}); wait until it ends, then run this again"
    )


def _describe_run() -> dict[str, Any]:
    return {
        "owner": secrets.token_hex(8),
        "host": socket.gethostname(),
        "process": os.getpid(),
        "since": datetime.now(tz=UTC).isoformat(timespec="seconds"),
    }


def _parse(content: bytes) -> dict[str, Any]:
    """Parse a lock's content; empty while the lock is still being written."""
    try:
        holder = json.loads(content)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


# Folders


_open_files: set[int] = set()


def _close_in_child() -> None:
    """Close the parent's locks in a forked child: it would hold them after the parent's death."""
    for file in _open_files:
        with contextlib.suppress(OSError):
            os.close(file)
    _open_files.clear()


os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def _hold_file(folder: Path, name: str, wait_s: float) -> Iterator[Lock]:
    locks = folder.resolve() / LOCKS
    path = locks / f"{name.replace('/', '.')}.lock"
    deadline = time.monotonic() + wait_s
    while (file := _try_flock(path)) is None:
        if time.monotonic() >= deadline:
            try:
                content = path.read_bytes()
            except FileNotFoundError:  # released at this moment
                content = b""
            raise _busy(folder, name, _parse(content))
        time.sleep(_POLL_S)
    _open_files.add(file)
    try:
        os.truncate(file, 0)
        os.pwrite(file, json.dumps(_describe_run()).encode(), 0)
        yield Lock()
    finally:
        # Remove the name before the lock. A waiting run notices this and opens the file again.
        path.unlink(missing_ok=True)
        _open_files.discard(file)
        os.close(file)
        with contextlib.suppress(OSError):  # other locks are held
            locks.rmdir()


def _try_flock(path: Path) -> int | None:
    """Open and lock a file; None if another run holds the lock.

    A run that releases its lock removes the file, and then the folder if it is empty. If that
    happens here between two steps, no run holds the lock, so this begins again.
    """
    while True:
        file = _open_lock(path)
        if file is None:
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file_at_path = os.stat(path)  # noqa: PTH116  compared with fstat
            if os.fstat(file).st_ino == file_at_path.st_ino:
                return file
        except FileNotFoundError:
            pass
        except BlockingIOError:
            os.close(file)
            return None
        except OSError as error:
            os.close(file)
            raise CubeError(
                f"{path}: this file system has no locks ({error.strerror}), so two runs could mix "
                "their pixels; mount it with locks (Lustre: -o flock), or use another --store"
            ) from error
        os.close(file)


def _open_lock(path: Path) -> int | None:
    """Open or make a file of a lock; None if its folder is removed at this moment."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        if path.parent.is_symlink() or path.parent.is_file():
            raise
        return None
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:
        return None
    with contextlib.suppress(OSError):  # a file of another user, already with this mode
        os.fchmod(file, 0o666)
    return file


# Object stores


def _tag_of(meta: Any) -> dict[str, str]:
    """Return the tag for a conditional put: S3 and Azure compare `e_tag`, Google `version`."""
    return {name: str(meta[name]) for name in ("e_tag", "version") if meta.get(name) is not None}


class _Lease(Lock):
    """A lease object, renewed by a thread until release."""

    def __init__(self, store: Store, name: str) -> None:
        self.store = store
        self.name = name
        self.key = f"{LOCKS}/{name}.json"
        self.objects: Any = store.client()
        self.holder = _describe_run()
        self.tag: dict[str, str] = {}
        self._count = 0
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, name=f"lease of {name}", daemon=True)

    def _content(self) -> bytes:
        self._count += 1  # each renewal has other content and therefore another tag
        return json.dumps({**self.holder, "renewed": self._count}).encode()

    def _read(self) -> tuple[dict[str, str] | None, dict[str, Any]]:
        """Return tag and content of the current lease; None and no content without a lease."""
        try:
            stored = self.objects.get(self.key)
            return _tag_of(stored.meta), _parse(bytes(stored.bytes()))
        except FileNotFoundError:
            return None, {}

    def _try_put(self, mode: Any) -> bool:
        """Write the lease under a condition. Returns whether this run holds it now.

        If the answer to a put is lost, the client repeats the put, and the repeat looks like a
        conflict. The owner is therefore read back.
        """
        content = self._content()
        try:
            self.tag = _tag_of(self.objects.put(self.key, content, mode=mode))
        except (
            obstore.exceptions.AlreadyExistsError,
            obstore.exceptions.PreconditionError,
            FileNotFoundError,
        ):
            tag, holder = self._read()
            if tag is None or not self._is_owner(holder):
                return False
            self.tag = tag
        return True

    def _is_owner(self, holder: dict[str, Any]) -> bool:
        """Whether the holder in a lease's content is this run."""
        return bool(holder.get("owner") == self.holder["owner"])

    def take(self, wait_s: float) -> None:
        """Take the lease. A holder without renewal for `LEASE_S` is dead."""
        deadline = time.monotonic() + wait_s
        watched: dict[str, str] = {}
        since = time.monotonic()
        while not self._try_put("create"):
            tag, holder = self._read()
            if tag is None:
                continue
            if tag != watched:
                renewed = bool(watched)
                watched = tag
                since = time.monotonic()
                if renewed and time.monotonic() >= deadline:
                    raise _busy(self.store, self.name, holder)
            elif time.monotonic() - since > LEASE_S and self._try_put(watched):
                log.info(
                    "%s: took over the lease of %s from a run that is gone", self.store, self.name
                )
                break
            time.sleep(min(RENEW_S / 10, 0.5))
        self._thread.start()

    def _renew(self) -> None:
        while not self._released.wait(RENEW_S):
            try:
                if not self._try_put(self.tag):
                    return  # `check` reports it
            except (obstore.exceptions.BaseError, OSError) as error:
                log.info(
                    "%s: the lease of %s was not renewed (%s)",
                    self.store,
                    self.name,
                    type(error).__name__,
                )

    def check(self) -> None:
        """Raise BusyError if another run has taken over the lease."""
        _, holder = self._read()
        if not self._is_owner(holder):
            raise _busy(self.store, self.name, holder)

    def release(self) -> None:
        """Remove the lease if this run still holds it."""
        self._released.set()
        self._thread.join()
        with contextlib.suppress(obstore.exceptions.BaseError, OSError):  # the lease then expires
            _, holder = self._read()
            if self._is_owner(holder):
                self.objects.delete(self.key)


@contextmanager
def _hold_lease(store: Store, name: str, wait_s: float) -> Iterator[Lock]:
    lease = _Lease(store, name)
    lease.take(wait_s)
    try:
        yield lease
    finally:
        lease.release()
