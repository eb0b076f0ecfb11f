"""Publish releases of a store in Icechunk.

Every tag is one permanent state of all cubes. Two tags can be compared. A release contains
committed data only: pixels of years without a marker are left out.

Pixels are copied bit for bit. Licence and citations are added to the attributes of each site's
group. Only changed objects are written, so two tags differ only in real changes.

A commit is one object. A run killed before the commit leaves the repository unchanged. A run killed
later can be repeated: it creates the tag or finds it complete.

In a local folder, Icechunk supports only one process at a time, so the folder is locked. On S3 it
supports any number of processes.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import icechunk
import numpy as np
import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from minecube.errors import CubeError

_ROOT = "zarr.json"
_AT_ONCE = 16  # objects in flight: hides an object store's latency and still fits in memory
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # names safe in Icechunk and on any disk
_CHUNK = re.compile(r"/c(/\d+)*$")  # Zarr v3 chunk names; `c` for arrays without dimensions


def open_repository(place: str, *, create: bool = False) -> icechunk.Repository:
    """Open the Icechunk repository in a folder or at `s3://bucket/prefix`.

    S3 keys and endpoint come from the environment.

    Raises:
        CubeError: the repository is missing and `create` is false, the folder has other content,
            the URL scheme is not supported, or opening fails.
    """
    scheme, _, rest = place.partition("://")
    if not rest:
        if not create and not Path(place).exists():  # Icechunk would create the folder
            raise CubeError(
                f"{place}: there is no Icechunk repository; `minecube publish --tag` makes one"
            )
        icechunk.set_logs_filter("error")  # it warns about several processes, but `publish` locks
        storage = icechunk.local_filesystem_storage(place)
    elif scheme == "s3":
        bucket, _, prefix = rest.partition("/")
        endpoint = os.environ.get("AWS_ENDPOINT_URL")
        storage = icechunk.s3_storage(
            bucket=bucket,
            prefix=prefix.rstrip("/") or None,
            from_env=True,
            region=os.environ.get("AWS_REGION")
            or os.environ.get("AWS_DEFAULT_REGION")
            or "us-east-1",
            endpoint_url=endpoint,
            allow_http=bool(endpoint and endpoint.startswith("http://")),
            force_path_style=bool(endpoint),
        )
    else:
        raise CubeError(
            f"{place}: expected a folder or s3://bucket/prefix, found {scheme}://; releases go to one of those"
        )
    with _icechunk(place):
        if not icechunk.Repository.exists(storage):
            if not create:
                raise CubeError(
                    f"{place}: there is no Icechunk repository; `minecube publish --tag` makes one"
                )
            if not rest and Path(place).exists() and any(Path(place).iterdir()):
                raise CubeError(
                    f"{place}: is not empty and no Icechunk repository, so nothing is written there; name another"
                )
            return icechunk.Repository.create(storage)
        return icechunk.Repository.open(storage)


def publish(
    source: zarr.Group,
    years: Mapping[str, Sequence[int]],
    place: str,
    tag: str,
    about: Mapping[str, Mapping[str, str]],
) -> tuple[int, int] | None:
    """Copy the state of these sites to the repository, commit it and tag the commit.

    Args:
        source: Root of the store.
        years: Site -> its committed years. Unlisted sites are removed from this and later releases.
        place: The repository, as for `open_repository`. It is created if missing.
        tag: Name of the release. A tag never moves.
        about: Site -> attributes of its group: licence and citations.

    Returns:
        The numbers of objects written and removed. None if the tag already has this state.

    Raises:
        CubeError: the tag is invalid, has another state or was deleted; another process publishes
            to the folder; or reading or writing fails. The branch `main` then stays unchanged.
    """
    if not _TAG.fullmatch(tag):
        raise CubeError(
            f"expected a tag of at most 100 letters, digits, . _ -, found {tag!r}; choose another name"
        )
    with nullcontext() if "://" in place else _alone(Path(place), make=True), _icechunk(place):
        repository = open_repository(place, create=True)
        wanted = {_ROOT, *(key for site in years for key in _keys(source, site, years[site]))}
        if tag in repository.list_tags():
            if sync(_holds(source, repository.readonly_session(tag=tag).store, wanted, about)):
                return None
            raise CubeError(
                f"{place}: tag {tag!r} holds another state of the store, and a tag never moves; choose another name"
            )
        session = repository.writable_session("main")
        before = snapshot = session.snapshot_id
        changed: tuple[int, int] = sync(_mirror(source, session.store, wanted, about))
        if session.has_uncommitted_changes:
            snapshot = session.commit(
                f"Release {tag}", metadata={site: dict(text) for site, text in about.items()}
            )
        try:
            repository.create_tag(tag, snapshot)
        except icechunk.IcechunkError as error:
            repository.reset_branch("main", before, from_snapshot_id=snapshot)
            if "already exists" in str(error):  # deleted tags are not listed
                raise CubeError(
                    f"{place}: tag {tag!r} was deleted, and Icechunk never uses a tag again; choose another name"
                ) from error
            raise
    return changed


def _keys(source: zarr.Group, site: str, years: Sequence[int]) -> Iterator[str]:
    """Yield the keys of a site in the store.

    Chunks and markers of uncommitted years are skipped, and so are files outside the Zarr format.
    """
    there = [int(y) for y in np.asarray(source[f"{site}/year"])]
    gone = {index for index, year in enumerate(there) if year not in years}

    async def found() -> list[str]:
        return [key async for key in source.store.list_prefix(f"{site}/")]

    for key in sync(found()):
        if not key.endswith(f"/{_ROOT}") and not _CHUNK.search(key):
            continue  # leftover of a killed write, or a foreign file
        name, *rest = key.removeprefix(f"{site}/").split("/")
        if name == "builds" and rest[0].isdigit() and int(rest[0]) not in years:
            continue
        if rest[:1] == ["c"] and name != "year" and len(rest) > 3 and int(rest[1]) in gone:
            continue
        yield key


async def _mirror(
    source: zarr.Group, target: Any, wanted: set[str], about: Mapping[str, Mapping[str, str]]
) -> tuple[int, int]:
    """Write changed objects and delete unwanted ones; return both counts."""
    prototype = default_buffer_prototype()
    gone = sorted(
        [key async for key in target.list() if key not in wanted], key=_order, reverse=True
    )
    for key in gone:
        await target.delete(key)

    async def copy(key: str) -> bool:
        content = await _wanted(source, key, about)
        old = await target.get(key, prototype)
        if old is not None and _same(old.to_bytes(), content, key):
            return False
        await target.set(key, prototype.buffer.from_bytes(content))
        return True

    metadata = sorted((key for key in wanted if key.endswith(_ROOT)), key=_order)
    written = [await copy(key) for key in metadata]
    for chunks in _batches(wanted.difference(metadata)):
        written += await asyncio.gather(*map(copy, chunks))
    return sum(written), len(gone)


async def _holds(
    source: zarr.Group, target: Any, wanted: set[str], about: Mapping[str, Mapping[str, str]]
) -> bool:
    """Report whether a release has exactly the wanted objects, with the store's content."""
    if {key async for key in target.list()} != wanted:
        return False

    async def same(key: str) -> bool:
        old = await _content(target, key)
        return old is not None and _same(old, await _wanted(source, key, about), key)

    for keys in _batches(wanted):
        if not all(await asyncio.gather(*map(same, keys))):
            return False
    return True


def _batches(keys: Collection[str]) -> Iterator[list[str]]:
    ordered = sorted(keys)
    for at in range(0, len(ordered), _AT_ONCE):
        yield ordered[at : at + _AT_ONCE]


async def _wanted(source: zarr.Group, key: str, about: Mapping[str, Mapping[str, str]]) -> bytes:
    """Read an object of the store, adding licence and citations to a site's group."""
    found = await source.store.get(key, default_buffer_prototype())
    if found is None:
        raise CubeError(
            f"{key}: was in the store a moment ago and is not any more; publish when nothing is being built"
        )
    content = bytes(found.to_bytes())
    site, _, rest = key.partition("/")
    return _with_attributes(content, about[site]) if rest == _ROOT and site in about else content


def _order(key: str) -> tuple[bool, int, str]:
    """Sort metadata before chunks, and groups before their members.

    Icechunk accepts a chunk only after its array.
    """
    return not key.endswith(_ROOT), key.count("/"), key


def _same(old: bytes, new: bytes, key: str) -> bool:
    """Compare two objects; JSON metadata by value, since Icechunk rewrites it."""
    return old == new or (key.endswith(_ROOT) and json.loads(old) == json.loads(new))


def _with_attributes(content: bytes, attributes: Mapping[str, str]) -> bytes:
    group = json.loads(content)
    group["attributes"] = {**group.get("attributes", {}), **attributes}
    return json.dumps(group).encode()


def releases(place: str) -> list[tuple[str, str, str]]:
    """List name, time (UTC, ISO 8601) and snapshot of every tag, oldest first.

    Raises:
        CubeError: as `open_repository`.
    """
    repository = open_repository(place)
    with _icechunk(place):
        found = []
        for tag in repository.list_tags():
            newest = next(iter(repository.ancestry(tag=tag)))
            found.append((tag, newest.written_at.isoformat(timespec="seconds"), newest.id))
    return sorted(found, key=lambda release: (release[1], release[0]))


def differences(place: str, old: str, new: str) -> list[tuple[str, str, str]]:
    """List the differences between two releases as unique, sorted (site, year, variable).

    The year is "all" for objects without a year. Icechunk lists the objects written since the
    common ancestor of the two tags, and their contents are compared. The result is therefore
    correct for any two tags: in either order, across a rollback, and after a change was undone.

    Raises:
        CubeError: a tag or the repository is missing.
    """
    repository = open_repository(place)
    with _icechunk(place):
        _need_tags(repository, place, old, new)
        lines = [[s.id for s in repository.ancestry(tag=tag)] for tag in (old, new)]
        common = next(s for s in lines[0] if s in lines[1])
        touched = {
            key
            for line in lines
            if line[0] != common
            for key in _touched(repository, common, line[0])
        }
        stores = [repository.readonly_session(tag=tag).store for tag in (old, new)]
        changed: dict[str, str] = sync(_compared(stores, touched))
        return sorted(_rows(stores, changed))


def _touched(repository: icechunk.Repository, start: str, end: str) -> Iterator[str]:
    diff = repository.diff(from_snapshot_id=start, to_snapshot_id=end)
    groups = diff.new_groups | diff.deleted_groups | diff.updated_groups
    for path in groups | diff.new_arrays | diff.deleted_arrays | diff.updated_arrays:
        yield f"{path}/{_ROOT}".lstrip("/")
    for path, chunks in diff.updated_chunks.items():
        yield from ("/".join([path.lstrip("/"), "c", *map(str, chunk)]) for chunk in chunks)


async def _compared(stores: Sequence[Any], keys: Collection[str]) -> dict[str, str]:
    """Map each key with different objects to "new", "gone" or "changed"."""
    changed = {}
    for key in keys:
        before, after = [await _content(store, key) for store in stores]
        if before != after:
            changed[key] = "new" if before is None else "gone" if after is None else "changed"
    return changed


async def _content(store: Any, key: str) -> bytes | None:
    if not key.endswith(_ROOT) and not await store.exists(_CHUNK.sub(f"/{_ROOT}", key)):
        return None  # Icechunk raises if the array is missing
    found = await store.get(key, default_buffer_prototype())
    return None if found is None else bytes(found.to_bytes())


def _rows(stores: Sequence[Any], changed: Mapping[str, str]) -> set[tuple[str, str, str]]:
    whole = {
        key.removesuffix(f"/{_ROOT}"): how
        for key, how in changed.items()
        if key.count("/") == 1 and key.endswith(_ROOT) and how != "changed"
    }
    rows = {(site, "all", f"the whole site ({how})") for site, how in whole.items()}
    for key, how in changed.items():
        site, _, rest = key.partition("/")
        if rest and site not in whole:
            rows.add(_row(stores[0] if how == "gone" else stores[1], site, rest, how))
    return rows


def _row(store: Any, site: str, rest: str, how: str) -> tuple[str, str, str]:
    """Return site, year and variable of a key below the site's group.

    The variable gets a suffix for anything but a plain change.
    """
    suffix = "" if how == "changed" else f" ({how})"
    if rest.startswith("builds/"):
        _, year, *more = rest.split("/")
        return site, year, ("provenance" if more[:1] in ([], [_ROOT]) else more[0]) + suffix
    if rest.endswith(_ROOT):
        return (
            site,
            "all",
            (rest.removesuffix(_ROOT).rstrip("/") or "site") + (suffix or " (metadata)"),
        )
    name = _CHUNK.sub("", rest)
    chunk = rest.removeprefix(f"{name}/c").lstrip("/")
    if chunk.count("/") < 2:
        return site, "all", name + suffix
    beside = "/".join([site, *name.split("/")[:-1], "year"])
    years = zarr.open_array(store, path=beside, mode="r")
    # No suffix: all-nodata chunks are not stored, so a new or missing chunk is a plain change.
    return site, str(np.asarray(years)[int(chunk.split("/")[0])]), name


def rollback(place: str, tag: str) -> None:
    """Reset `main` to the tag; the next release starts from there and later tags stay.

    Raises:
        CubeError: the tag or the repository is missing.
    """
    repository = open_repository(place)
    with nullcontext() if "://" in place else _alone(Path(place)), _icechunk(place):
        _need_tags(repository, place, tag)
        repository.reset_branch("main", repository.lookup_tag(tag))


def _need_tags(repository: icechunk.Repository, place: str, *tags: str) -> None:
    there = sorted(repository.list_tags())
    for tag in tags:
        if tag not in there:
            raise CubeError(f"{place}: has no tag {tag!r}; it has {', '.join(there) or 'none'}")


@contextmanager
def _alone(folder: Path, *, make: bool = False) -> Iterator[None]:
    """Lock the folder for this process.

    The lock ends with the process at the latest.

    Raises:
        CubeError: another process has the lock, or the folder cannot be used.
    """
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise CubeError(
            f"{folder}: is no folder that can be used ({error.strerror}); name another"
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise CubeError(
            f"{folder}: another process is publishing there, and two would harm a repository in a folder; wait for it"
        ) from error
    finally:
        os.close(handle)


@contextmanager
def _icechunk(place: str) -> Iterator[None]:
    """Convert Icechunk errors to CubeError."""
    try:
        yield
    except icechunk.IcechunkError as error:
        said = next(
            (line.strip(" x") for line in str(error).splitlines() if line.strip(" x|")),
            type(error).__name__,
        )
        raise CubeError(f"{place}: {said}; the releases that are there are unharmed") from error
