"""Open a store and its groups: a local folder, a packed store or an object-store URL."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import obstore
import zarr
import zarr.errors
from obstore.store import LocalStore, from_url
from zarr.storage import WrapperStore

from minecube.cube import packed
from minecube.cube.packed import is_packed, need_writable
from minecube.errors import CubeError

FORMAT = 1
"""Version of the layout. Stores of another version are refused."""
SCHEMES = ("s3", "gs", "az")
"""URL schemes of object stores."""
_ANSWERS_S = 8
"""Seconds after the first request before an object store is given up."""
BEING_MADE = 0
"""Format of a group under construction. After a kill, its construction starts again."""
NAMED = "minecube"
"""Attribute of a site's group with its description."""


def folder_of(store: str) -> Path | None:
    """Return the folder of a local store; None for an object store.

    Raises:
        CubeError: the name is empty, or is a URL of another scheme than `SCHEMES` or without a
            bucket.
    """
    if not store.strip():
        raise CubeError(
            "the store has no name; name a folder, or an object store such as s3://bucket/cubes.zarr"
        )
    scheme, colon, place = store.partition("://")
    if not colon:
        return Path(store)
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise CubeError(
            f"{store}: expected a folder or a URL that begins with {known}; found {scheme}://"
        )
    if not place.strip("/"):
        raise CubeError(
            f"{store}: names no bucket; expected a URL such as {scheme}://bucket/cubes.zarr"
        )
    return None


def absolute(store: str) -> str:
    """Return the store's name independently of the working directory."""
    folder = folder_of(store)
    return store if folder is None else str(folder.absolute())


def has_objects(store: str, path: str) -> bool:
    """Whether any object lies below a path."""
    folder = folder_of(store)
    if folder is not None and not folder.exists():
        return False
    return any(batch for batch in objects(store).list(path))


def client_of(url: str) -> Any:
    """Return the client of an object store, one per URL and process.

    A client keeps its connections, and they do not survive a fork.
    """
    return _client(url.rstrip("/"), os.getpid())


@lru_cache(maxsize=32)
def _client(url: str, _process: int) -> Any:
    _check_endpoint(url)
    return from_url(url)


def _check_endpoint(url: str) -> None:
    """Raise CubeError if an S3 endpoint is no URL: obstore 0.12 panics and prints pages."""
    for variable in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"):
        endpoint = os.environ.get(variable, "")
        if (
            url.startswith("s3://")
            and endpoint
            and not endpoint.startswith(("https://", "http://"))
        ):
            raise CubeError(
                f"{variable} is {endpoint!r}; expected the URL of an endpoint such as https://s3.example.org"
            )


def check_answers(store: str) -> None:
    """List one object of an object store, to find a silent store in seconds instead of minutes.

    Raises:
        CubeError: as `folder_of`, or the endpoint is no URL.
        obstore.exceptions.BaseError: the store does not answer, refuses the keys, or lacks the
            bucket.
    """
    if folder_of(store) is None:
        _check_endpoint(store)
        hurried = from_url(
            store, retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=_ANSWERS_S)}
        )
        next(iter(obstore.list(hurried, chunk_size=1)), None)


def objects(store: str) -> Any:
    """Open the stored objects of a store, without Zarr."""
    if is_packed(store):
        return packed.Objects(store)
    folder = folder_of(store)
    return client_of(store) if folder is None else LocalStore(folder)


class FolderStore(zarr.storage.LocalStore):  # type: ignore[misc]
    """Zarr's folder store, without the temporary files of other writers.

    Zarr 3.1.6 lists these files as members of a group and warns of each.
    """

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """List the names below a prefix."""
        async for name in super().list_dir(prefix):
            if not name.endswith(".partial"):
                yield name


def zarr_store(store: str) -> Any:
    """Open the Zarr store of that name."""
    if is_packed(store):
        return packed.zarr_store(store)
    folder = folder_of(store)
    return zarr.storage.ObjectStore(client_of(store)) if folder is None else FolderStore(folder)


class Summing(WrapperStore):  # type: ignore[misc]
    """A store with the size and SHA-256 of every object written through it.

    They are computed while writing, without another read. The SHA-256 is that of the stored bytes,
    as from `sha256sum` on the file.
    """

    def __init__(self, store: Any, sums: dict[str, list[Any]] | None = None) -> None:
        super().__init__(store)
        self.sums = {} if sums is None else sums

    def _with_store(self, store: Any) -> Summing:
        return Summing(store, self.sums)  # read-only twins share the sums

    async def set(self, key: str, value: Any) -> None:
        """Sum an object, then write it."""
        self.sums[key] = await asyncio.to_thread(sum_of, value.as_numpy_array())
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

    def below(self, path: str, within: str) -> dict[str, list[Any]]:
        """Return the sums of objects below `path`, with keys relative to the group `within`."""
        # Iterate over a copy, because other threads add keys meanwhile.
        found = sorted(
            (key, value) for key, value in list(self.sums.items()) if key.startswith(f"{path}/")
        )
        return {key.removeprefix(f"{within}/"): value for key, value in found}


def summing(store: str) -> Summing:
    """Open the Zarr store of that name, with checksums of everything written through it."""
    need_writable(store)
    return Summing(zarr_store(store))


def sum_of(content: Any) -> list[Any]:
    """Return size and SHA-256 of an object's bytes."""
    return [memoryview(content).nbytes, hashlib.sha256(content).hexdigest()]


def digest(value: Any) -> str:
    """Return the SHA-256 of plain JSON, independent of the order of its keys."""
    as_stored = json.loads(json.dumps(value))  # with keys as text and tuples as lists
    return hashlib.sha256(json.dumps(as_stored, sort_keys=True).encode()).hexdigest()


def sealed(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes with a `sha256` of all others."""
    rest = {name: value for name, value in attrs.items() if name != "sha256"}
    return {**rest, "sha256": digest(rest)}


def exists(store: str, path: str) -> bool:
    """Whether a group exists at this path.

    Raises:
        CubeError: the group is damaged, or the store is a file.
    """
    folder = folder_of(store)
    if folder is not None and not folder.exists():
        return False
    if folder is not None and folder.is_file() and not is_packed(store):
        raise CubeError(
            f"{store}: is a file; expected a folder, the URL of one, or a packed store, whose name ends in .zip"
        )
    try:
        group_of(store, path)
    except (FileNotFoundError, zarr.errors.GroupNotFoundError):
        return False
    return True


def group_at(store: str, path: str, mode: str = "r") -> zarr.Group | None:
    """Return the group at this path; None if it is missing.

    Raises:
        CubeError: the group is damaged, or the store is a file.
    """
    return group_of(store, path, mode) if exists(store, path) else None


def group_of(store: str, path: str, mode: str = "r") -> zarr.Group:
    """Return the group at this path.

    Raises:
        CubeError: the group is damaged.
        FileNotFoundError: the group is missing.
    """
    if mode != "r":
        need_writable(store)
    with reading(store, path):
        return zarr.open_group(zarr_store(store), path=path, mode=mode, use_consolidated=False)


def begin_group(store: str, path: str, attributes: Mapping[str, Any]) -> None:
    """Create a group with these attributes, or empty an existing one.

    This also clears remains of a killed run. The attributes are written first and never removed.
    The group is therefore identified at any moment.
    """
    need_writable(store)
    target = zarr_store(store)
    parent = path.rpartition("/")[0]
    with contextlib.suppress(zarr.errors.ContainsGroupError):  # made by another run just now
        zarr.open_group(target, path=parent, mode="a", use_consolidated=False)
    try:
        group = group_at(store, path, "r+")
    except CubeError:  # damaged
        group = None
    if group is None:
        group = zarr.create_group(target, path=path, attributes=dict(attributes), overwrite=True)
    else:
        group.attrs.put(dict(attributes))
    for child in objects(store).list_with_delimiter(path)["common_prefixes"]:
        del group[child.rstrip("/").rpartition("/")[2]]


def is_being_made(group: zarr.Group) -> bool:
    """Whether the group is a site with unfinished creation."""
    return bool(group.attrs.get(NAMED) == {"format": BEING_MADE})


@contextmanager
def reading(store: str, path: str) -> Iterator[None]:
    """Convert errors on damaged data to CubeError."""
    try:
        yield
    except (FileNotFoundError, zarr.errors.GroupNotFoundError):
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CubeError(
            f"{store}: {path or 'the store'} cannot be read ({type(error).__name__}: {error}); run `minecube verify`, or use "
            "another --store if minecube did not make this one"
        ) from error


def site_group(store: str, site_id: str, mode: str) -> zarr.Group:
    """Return a site's group.

    Raises:
        CubeError: the site is missing, unfinished, or of another version.
    """
    if not exists(store, site_id):
        there = ", ".join(sites(store)) or "no site"
        raise CubeError(f"{store}: no site {site_id!r}; it has {there}")
    group = group_of(store, site_id, mode)
    if is_being_made(group):
        raise CubeError(
            f"{store}: {site_id} is being created, or a run was killed then; run `minecube build` again"
        )
    known = group.attrs.get(NAMED, {})
    if known.get("format") != FORMAT:
        raise CubeError(
            f"{store}: group {site_id!r} was not made by this version of minecube; use another --store"
        )
    return group


def sites(store: str) -> list[str]:
    """List the names of the sites in a store.

    Raises:
        CubeError: there is no store.
    """
    if not exists(store, ""):
        raise CubeError(f"{store}: there is no store; `minecube build` makes one")
    raw = objects(store)
    found = []
    with reading(store, ""):
        for path in sorted(raw.list_with_delimiter()["common_prefixes"]):
            name = path.rstrip("/")
            try:
                attributes = json.loads(bytes(raw.get(f"{name}/zarr.json").bytes())).get(
                    "attributes", {}
                )
            except FileNotFoundError:
                continue
            if attributes.get(NAMED, {"format": BEING_MADE}) != {"format": BEING_MADE}:
                found.append(name)
    return found


@contextmanager
def writing(store: str) -> Iterator[None]:
    """Convert a packed store, a full disk or a forbidden folder to CubeError."""
    need_writable(store)
    try:
        yield
    except OSError as error:
        raise CubeError(
            f"{store}: cannot be written ({error.strerror or error}); committed site-years are unharmed; make room or "
            "choose another --store, then run the same command again"
        ) from error
