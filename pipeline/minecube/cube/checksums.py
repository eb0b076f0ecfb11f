"""Checksums of stored objects, computed while writing, and of attributes."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from typing import Any

from zarr.storage import WrapperStore

from minecube.digests import sha256_of_json


class ChecksumStore(WrapperStore):  # type: ignore[misc]
    """A store with the size and SHA-256 of every object written through it.

    They are computed while writing, without another read. The SHA-256 is that of the stored bytes,
    as from `sha256sum` on the file.
    """

    def __init__(self, store: Any, sums: dict[str, list[Any]] | None = None) -> None:
        super().__init__(store)
        self.sums = {} if sums is None else sums

    def _with_store(self, store: Any) -> ChecksumStore:
        return ChecksumStore(store, self.sums)  # read-only twins share the sums

    async def set(self, key: str, value: Any) -> None:
        """Sum an object, then write it."""
        self.sums[key] = await asyncio.to_thread(size_and_sha256, value.as_numpy_array())
        await super().set(key, value)

    async def delete(self, key: str) -> None:
        """Forget an object's sum, then remove the object."""
        self.sums.pop(key, None)  # Zarr deletes a chunk of fill value only
        await super().delete(key)

    async def delete_dir(self, prefix: str) -> None:
        """Forget the sums below a prefix, then remove the objects."""
        for key in [key for key in list(self.sums) if key.startswith(f"{prefix.rstrip('/')}/")]:
            self.sums.pop(key, None)
        await super().delete_dir(prefix)

    def checksums_below(self, path: str, group: str) -> dict[str, list[Any]]:
        """Return the sums of objects below `path`, with keys relative to the group at `group`."""
        # Iterate over a copy, because other threads add keys meanwhile.
        sums = sorted(
            (key, value) for key, value in list(self.sums.items()) if key.startswith(f"{path}/")
        )
        return {key.removeprefix(f"{group}/"): value for key, value in sums}


def size_and_sha256(content: Any) -> list[Any]:
    """Return size and SHA-256 of an object's bytes."""
    return [memoryview(content).nbytes, hashlib.sha256(content).hexdigest()]


def seal(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes with a `sha256` of all others."""
    content = {name: value for name, value in attrs.items() if name != "sha256"}
    return {**content, "sha256": sha256_of_json(content)}
