"""A store that dies after a number of writes: every later change fails, as if the process had been killed there."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import obstore.store
import zarr.storage


class Killed(BaseException):
    """The process is gone."""


class Writes:
    """Counts changes of objects; from `last` on, each raises Killed."""

    def __init__(self, last: int | None) -> None:
        self.last = last
        self.count = 0

    def step(self) -> None:
        """Count a change, unless the process is dead."""
        if self.last is not None and self.count >= self.last:
            raise Killed
        self.count += 1


@contextmanager
def dying_after(last: int | None) -> Iterator[Writes]:
    """Let folder stores die after `last` changes of objects; never if it is None.

    A rename is a copy and a deletion, as in object stores. A folder is removed file by file.
    """
    writes = Writes(last)
    put = zarr.storage.LocalStore._set
    delete = zarr.storage.LocalStore.delete
    delete_dir = zarr.storage.LocalStore.delete_dir
    remove = obstore.store.LocalStore.delete

    @functools.wraps(put)
    async def counted_put(self: Any, *args: Any, **how: Any) -> None:
        writes.step()
        await put(self, *args, **how)

    @functools.wraps(delete)
    async def counted_delete(self: Any, key: str) -> None:
        writes.step()
        await delete(self, key)

    @functools.wraps(delete_dir)
    async def counted_delete_dir(self: Any, prefix: str) -> None:
        for path in sorted(Path(self.root, prefix).rglob("*"), reverse=True):
            if path.is_file():
                writes.step()
                path.unlink()
        await delete_dir(self, prefix)

    def counted_rename(self: Any, source: str, target: str) -> None:
        self.head(source)
        writes.step()
        self.copy(source, target)
        writes.step()
        remove(self, source)

    def counted_remove(self: Any, path: str) -> None:
        writes.step()
        remove(self, path)

    with (
        mock.patch.object(zarr.storage.LocalStore, "_set", counted_put),
        mock.patch.object(zarr.storage.LocalStore, "delete", counted_delete),
        mock.patch.object(zarr.storage.LocalStore, "delete_dir", counted_delete_dir),
        mock.patch.object(obstore.store.LocalStore, "rename", counted_rename),
        mock.patch.object(obstore.store.LocalStore, "delete", counted_remove),
    ):
        yield writes
