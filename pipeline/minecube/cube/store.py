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
"""Version of the layout; a store of another one is refused."""
SCHEMES = ("s3", "gs", "az")
"""Kinds of object stores, by the scheme of their URLs."""
_ANSWERS_S = 8
"""How long after its first request an object store is no longer asked again."""
BEING_MADE = 0
"""Format of a group that is being created. A run that is killed there starts again."""
NAMED = "minecube"
"""Attribute under which a site's group says what it is."""


def folder_of(store: str) -> Path | None:
    """The folder of a local store; None for an object store.

    Raises:
        CubeError: the name is empty, or a URL of another kind than `SCHEMES`, or of no bucket.
    """
    if not store.strip():
        raise CubeError("the store has no name; name a folder, or an object store such as s3://bucket/cubes.zarr")
    scheme, colon, place = store.partition("://")
    if not colon:
        return Path(store)
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise CubeError(f"{store}: expected a folder or a URL that begins with {known}; found {scheme}://")
    if not place.strip("/"):
        raise CubeError(f"{store}: names no bucket; expected a URL such as {scheme}://bucket/cubes.zarr")
    return None


def absolute(store: str) -> str:
    """The store by a name that does not depend on the folder of a process."""
    folder = folder_of(store)
    return store if folder is None else str(folder.absolute())


def has_objects(store: str, path: str) -> bool:
    """Whether any object lies below a path."""
    folder = folder_of(store)
    if folder is not None and not folder.exists():
        return False
    return any(batch for batch in objects(store).list(path))


def client_of(url: str) -> Any:
    """The client of an object store, one per URL and process: it keeps its connections, which do not survive a fork."""
    return _client(url.rstrip("/"), os.getpid())


@lru_cache(maxsize=32)
def _client(url: str, _process: int) -> Any:
    _check_endpoint(url)
    return from_url(url)


def _check_endpoint(url: str) -> None:
    """Raise CubeError if the endpoint of an S3 store is no URL: obstore 0.12 panics on it, and prints pages."""
    for variable in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"):
        endpoint = os.environ.get(variable, "")
        if url.startswith("s3://") and endpoint and not endpoint.startswith(("https://", "http://")):
            raise CubeError(f"{variable} is {endpoint!r}; expected the URL of an endpoint such as https://s3.example.org")


def check_answers(store: str) -> None:
    """List one object of an object store, so that one that does not answer is found in seconds instead of minutes.

    Raises:
        CubeError: as `folder_of`, or the endpoint is no URL.
        obstore.exceptions.BaseError: the store does not answer, refuses the keys, or has no such bucket.
    """
    if folder_of(store) is None:
        _check_endpoint(store)
        hurried = from_url(store, retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=_ANSWERS_S)})
        next(iter(obstore.list(hurried, chunk_size=1)), None)


def objects(store: str) -> Any:
    """The objects of a store as they are stored, without Zarr."""
    if is_packed(store):
        return packed.Objects(store)
    folder = folder_of(store)
    return client_of(store) if folder is None else LocalStore(folder)


class FolderStore(zarr.storage.LocalStore):  # type: ignore[misc]
    """Zarr's store in a folder, without the files that other processes are writing at this moment.

    Zarr 3.1.6 lists them as members of a group and warns of each.
    """

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Names below a prefix."""
        async for name in super().list_dir(prefix):
            if not name.endswith(".partial"):
                yield name


def zarr_store(store: str) -> Any:
    """The Zarr store of that name."""
    if is_packed(store):
        return packed.zarr_store(store)
    folder = folder_of(store)
    return zarr.storage.ObjectStore(client_of(store)) if folder is None else FolderStore(folder)


class Summing(WrapperStore):  # type: ignore[misc]
    """A store that keeps the size and SHA-256 of every object on its way out: nothing is read again for it.

    They are of the stored bytes, so that `sha256sum` on the file says the same.
    """

    def __init__(self, store: Any, sums: dict[str, list[Any]] | None = None) -> None:
        super().__init__(store)
        self.sums = {} if sums is None else sums

    def _with_store(self, store: Any) -> Summing:
        return Summing(store, self.sums)  # read-only twins share them

    async def set(self, key: str, value: Any) -> None:
        """Sum, then write."""
        self.sums[key] = await asyncio.to_thread(sum_of, value.as_numpy_array())
        await super().set(key, value)

    async def delete(self, key: str) -> None:
        """Forget its sum, then remove it."""
        self.sums.pop(key, None)  # a chunk of nothing but its fill value is no object
        await super().delete(key)

    async def delete_dir(self, prefix: str) -> None:
        """Forget the sums of all below, then remove it."""
        for key in [key for key in list(self.sums) if key.startswith(f"{prefix.rstrip('/')}/")]:
            self.sums.pop(key, None)
        await super().delete_dir(prefix)

    def below(self, path: str, within: str) -> dict[str, list[Any]]:
        """The sums of objects below `path`, their keys relative to the group `within`."""
        # A copy, since other threads write: their keys must not change the table while it is gone through.
        found = sorted((key, value) for key, value in list(self.sums.items()) if key.startswith(f"{path}/"))
        return {key.removeprefix(f"{within}/"): value for key, value in found}


def summing(store: str) -> Summing:
    """The Zarr store of that name, which keeps checksums of all that is written through it."""
    need_writable(store)
    return Summing(zarr_store(store))


def sum_of(content: Any) -> list[Any]:
    """Size and SHA-256 of an object's bytes."""
    return [memoryview(content).nbytes, hashlib.sha256(content).hexdigest()]


def digest(value: Any) -> str:
    """SHA-256 of what is plain JSON, whatever the order of its keys."""
    as_stored = json.loads(json.dumps(value))  # where keys are text and tuples are lists
    return hashlib.sha256(json.dumps(as_stored, sort_keys=True).encode()).hexdigest()


def sealed(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes with a `sha256` of all the others."""
    rest = {name: value for name, value in attrs.items() if name != "sha256"}
    return {**rest, "sha256": digest(rest)}


def exists(store: str, path: str) -> bool:
    """Whether there is a group at that path; raises CubeError where it is damaged, or the store is a file."""
    folder = folder_of(store)
    if folder is not None and not folder.exists():
        return False
    if folder is not None and folder.is_file() and not is_packed(store):
        raise CubeError(f"{store}: is a file; expected a folder, the URL of one, or a packed store, whose name ends in .zip")
    try:
        group_of(store, path)
    except (FileNotFoundError, zarr.errors.GroupNotFoundError):
        return False
    return True


def group_at(store: str, path: str, mode: str = "r") -> zarr.Group | None:
    """The group at that path; None if there is none. Raises CubeError if it is damaged, or if the store is a file."""
    return group_of(store, path, mode) if exists(store, path) else None


def group_of(store: str, path: str, mode: str = "r") -> zarr.Group:
    """The group at that path; raises CubeError where it is damaged, FileNotFoundError where there is none."""
    if mode != "r":
        need_writable(store)
    with reading(store, path):
        return zarr.open_group(zarr_store(store), path=path, mode=mode, use_consolidated=False)


def begin_group(store: str, path: str, attributes: Mapping[str, Any]) -> None:
    """Create a group with these attributes, or empty the one that is there, whatever a killed run left of it.

    The attributes come first and are never gone, so that the group says at any moment what it is.
    """
    need_writable(store)
    target = zarr_store(store)
    parent = path.rpartition("/")[0]
    with contextlib.suppress(zarr.errors.ContainsGroupError):  # another run has made it since Zarr looked
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
    """Whether the group is a site whose creation was interrupted."""
    return bool(group.attrs.get(NAMED) == {"format": BEING_MADE})


@contextmanager
def reading(store: str, path: str) -> Iterator[None]:
    """Turns what is raised on something damaged into a CubeError."""
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
    """A site's group; raises CubeError where there is none, or one of another version."""
    if not exists(store, site_id):
        there = ", ".join(sites(store)) or "no site"
        raise CubeError(f"{store}: no site {site_id!r}; it has {there}")
    group = group_of(store, site_id, mode)
    if is_being_made(group):
        raise CubeError(f"{store}: {site_id} is being created, or a run was killed then; run `minecube build` again")
    known = group.attrs.get(NAMED, {})
    if known.get("format") != FORMAT:
        raise CubeError(f"{store}: group {site_id!r} was not made by this version of minecube; use another --store")
    return group


def sites(store: str) -> list[str]:
    """Names of the sites in a store; raises CubeError if minecube made no store there."""
    if not exists(store, ""):
        raise CubeError(f"{store}: there is no store; `minecube build` makes one")
    raw = objects(store)
    found = []
    with reading(store, ""):
        for path in sorted(raw.list_with_delimiter()["common_prefixes"]):
            name = path.rstrip("/")
            try:
                attributes = json.loads(bytes(raw.get(f"{name}/zarr.json").bytes())).get("attributes", {})
            except FileNotFoundError:
                continue
            if attributes.get(NAMED, {"format": BEING_MADE}) != {"format": BEING_MADE}:
                found.append(name)
    return found


@contextmanager
def writing(store: str) -> Iterator[None]:
    """Turns a packed store, a full disk or a forbidden folder into a CubeError."""
    need_writable(store)
    try:
        yield
    except OSError as error:
        raise CubeError(
            f"{store}: cannot be written ({error.strerror or error}); committed site-years are unharmed; make room or "
            "choose another --store, then run the same command again"
        ) from error
