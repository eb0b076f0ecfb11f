"""Publish releases of a store in Icechunk.

Every tag is one permanent state of all cubes. Two tags can be compared. A release contains
committed data only: pixels of years without a marker are left out.

Pixels are copied bit for bit. Years are in ascending order (`year_order`). Licence and citations
are added to the attributes of each site's group. Only changed objects are written, so two tags
differ only in real changes. A year added before others moves their shards, which are written again.

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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import icechunk
import numpy as np
import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from minecube.errors import CubeError
from minecube.export.year_order import Years, encode_years
from minecube.places import check_url

_ROOT = "zarr.json"
_BATCH = 16  # objects in flight: hides an object store's latency and still fits in memory
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # names safe in Icechunk and on any disk
_CHUNK = re.compile(r"/c(/\d+)*$")  # Zarr v3 chunk names; `c` for arrays without dimensions


def open_repository(place: str, *, create: bool = False) -> icechunk.Repository:
    """Open the Icechunk repository in a folder or at `s3://bucket/prefix`.

    S3 keys and endpoint come from the environment.

    Raises:
        CubeError: the repository is missing and `create` is false, the folder has other content,
            the URL scheme is not supported, `place` is a file, or opening fails.
    """
    if not _is_url(place) and not create and not Path(place).exists():
        raise _missing_repository(place)  # Icechunk would create the folder
    if Path(place).is_file():  # Icechunk would panic
        raise CubeError(f"{place}: expected a folder, found a file; name a folder")
    storage = _open_storage(place)
    with _convert_errors(place):
        if icechunk.Repository.exists(storage):
            return icechunk.Repository.open(storage)
        if not create:
            raise _missing_repository(place)
        if not _is_url(place) and Path(place).exists() and any(Path(place).iterdir()):
            raise CubeError(
                f"{place}: is not empty and no Icechunk repository; name another folder"
            )
        return icechunk.Repository.create(storage)


def _is_url(place: str) -> bool:
    return bool(place.partition("://")[2])


def _missing_repository(place: str) -> CubeError:
    return CubeError(f"{place}: there is no Icechunk repository; `minecube publish` makes one")


def _open_storage(place: str) -> icechunk.Storage:
    if not _is_url(place):
        # Icechunk warns about several processes, but `publish_release` locks.
        icechunk.set_logs_filter("error")
        return icechunk.local_filesystem_storage(place)
    scheme, _, address = place.partition("://")
    if scheme != "s3":
        raise CubeError(
            f"{place}: expected a folder or s3://bucket/prefix, found {scheme}://; "
            "name another place"
        )
    check_url(place)
    bucket, _, prefix = address.partition("/")
    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return icechunk.s3_storage(
        bucket=bucket,
        prefix=prefix.rstrip("/") or None,
        from_env=True,
        region=region or "us-east-1",
        endpoint_url=endpoint,
        allow_http=bool(endpoint and endpoint.startswith("http://")),
        force_path_style=bool(endpoint),
    )


def publish_release(
    source: zarr.Group,
    years: Mapping[str, Sequence[int]],
    place: str,
    tag: str,
    attributes: Mapping[str, Mapping[str, str]],
    progress: Callable[[int, int], None] = lambda _part, _total: None,
) -> tuple[int, int] | None:
    """Copy the state of these sites to the repository, commit it and tag the commit.

    Args:
        source: Root of the store.
        years: Site -> its committed years. Unlisted sites are removed from this and later releases.
        place: The repository, as for `open_repository`. It is created if missing.
        tag: Name of the release. A tag never moves.
        attributes: Site -> attributes of its group: licence and citations.
        progress: Called with the number of compared objects, and of all objects.

    Returns:
        The numbers of objects written and removed. None if the tag already has this state.

    Raises:
        CubeError: the tag is invalid, has another state or was deleted; another process publishes
            to the folder; or reading or writing fails. The branch `main` then stays unchanged.
    """
    check_tag(tag)
    with _lock(place, create=True), _convert_errors(place):
        repository = open_repository(place, create=True)
        release = _plan_release(source, years, attributes)
        if tag in repository.list_tags():
            if sync(_holds(repository.readonly_session(tag=tag).store, release)):
                return None
            raise CubeError(
                f"{place}: tag {tag!r} holds another state of the store; choose another name"
            )
        session = repository.writable_session("main")
        parent = session.snapshot_id
        snapshot = parent
        changed: tuple[int, int] = sync(_mirror(session.store, release, progress))
        if session.has_uncommitted_changes:
            metadata = {site: dict(text) for site, text in attributes.items()}
            snapshot = session.commit(f"Release {tag}", metadata=metadata)
        try:
            repository.create_tag(tag, snapshot)
        except icechunk.IcechunkError as error:
            repository.reset_branch("main", parent, from_snapshot_id=snapshot)
            # Deleted tags are not listed. Icechunk 1 says "exists", Icechunk 2 "deleted".
            if re.search("already (exists|deleted)", str(error)):
                raise CubeError(
                    f"{place}: tag {tag!r} was deleted, and Icechunk never reuses a tag; "
                    "choose another name"
                ) from error
            raise
    return changed


def check_tag(tag: str) -> None:
    """Raise CubeError for a name that is no tag."""
    if not _TAG.fullmatch(tag):
        raise CubeError(
            f"expected a tag of at most 100 letters, digits, . _ -, found {tag!r}; "
            "choose another name"
        )


@dataclass(frozen=True, kw_only=True)
class _Release:
    """The objects of a release."""

    source: zarr.Group
    """Root of the store."""
    keys: Mapping[str, str]
    """Key of each object -> its key in the store."""
    coordinates: Mapping[str, bytes]
    """Chunks of years in another order than in the store, by key."""
    attributes: Mapping[str, Mapping[str, str]]
    """Site -> attributes added to its group: licence and citations."""

    async def read(self, key: str) -> bytes:
        """Read an object of the store, adding licence and citations to a site's group."""
        if key in self.coordinates:
            return self.coordinates[key]
        stored = await self.source.store.get(self.keys[key], default_buffer_prototype())
        if stored is None:
            raise CubeError(
                f"{key}: was deleted from the store while publishing; "
                "publish again when nothing is being built"
            )
        content = bytes(stored.to_bytes())
        site, _, path = key.partition("/")
        if path != _ROOT or site not in self.attributes:
            return content
        group = json.loads(content)
        group["attributes"] = {**group.get("attributes", {}), **self.attributes[site]}
        return json.dumps(group).encode()


def _plan_release(
    source: zarr.Group,
    years: Mapping[str, Sequence[int]],
    attributes: Mapping[str, Mapping[str, str]],
) -> _Release:
    """List the objects of a release, with ascending years. Arguments are as in `publish_release`."""
    stored_keys = {_ROOT}.union(*(_list_keys(source, site, years[site]) for site in years))
    stored = Years.read(source, stored_keys)
    released = stored.sort()
    keys = {}
    for stored_key in stored_keys:
        name = stored.name_object(stored_key)
        if name is not None and (key := released.find_object(name)) is not None:
            keys[key] = stored_key
    coordinates: dict[str, bytes] = {}
    for group, ascending in released.items():
        if ascending != stored[group]:
            metadata = sync(source.store.get(f"{group}/year/{_ROOT}", default_buffer_prototype()))
            chunks = encode_years(ascending, metadata.to_bytes())
            coordinates |= {f"{group}/year/{chunk}": content for chunk, content in chunks.items()}
    return _Release(source=source, keys=keys, coordinates=coordinates, attributes=attributes)


def _list_keys(source: zarr.Group, site: str, committed_years: Sequence[int]) -> Iterator[str]:
    """Yield the keys of a site in the store.

    Chunks and markers of uncommitted years are skipped, and so are files outside the Zarr format.
    """
    stored_years = [int(year) for year in np.asarray(source[f"{site}/year"])]
    uncommitted = {index for index, year in enumerate(stored_years) if year not in committed_years}
    for key in _list_below(source.store, f"{site}/"):
        if not key.endswith(f"/{_ROOT}") and not _CHUNK.search(key):
            continue  # leftover of a killed write, or a foreign file
        name, *path = key.removeprefix(f"{site}/").split("/")
        if name == "builds" and path[0].isdigit() and int(path[0]) not in committed_years:
            continue
        # A chunk's key is c/YEAR/.../Y/X: chunks hold one year. Chunks of coordinates are shorter.
        is_pixels = path[:1] == ["c"] and name != "year" and len(path) > 3
        if is_pixels and int(path[1]) in uncommitted:
            continue
        yield key


async def _mirror(
    target: Any, release: _Release, progress: Callable[[int, int], None]
) -> tuple[int, int]:
    """Write changed objects and delete all others; return both counts."""
    prototype = default_buffer_prototype()
    superfluous = [key async for key in target.list() if key not in release.keys]
    for key in sorted(superfluous, key=_sort_key, reverse=True):
        await target.delete(key)

    async def copy(key: str) -> bool:
        content = await release.read(key)
        old = await target.get(key, prototype)
        if old is not None and _are_same(old.to_bytes(), content, key):
            return False
        await target.set(key, prototype.buffer.from_bytes(content))
        return True

    metadata = sorted((key for key in release.keys if key.endswith(_ROOT)), key=_sort_key)
    copied = [await copy(key) for key in metadata]
    for chunks in _cut_batches(set(release.keys).difference(metadata)):
        copied += await asyncio.gather(*map(copy, chunks))
        progress(len(copied), len(release.keys))
    await _need_unchanged(target, release, metadata)
    return sum(copied), len(superfluous)


async def _need_unchanged(target: Any, release: _Release, metadata: Sequence[str]) -> None:
    """Raise CubeError if a site-year, labels or a map were written while they were copied.

    Each write changes metadata: the marker of a year, or the checksum of labels and maps.
    """
    for key in metadata:
        copied = await target.get(key, default_buffer_prototype())
        if not _are_same(copied.to_bytes(), await release.read(key), key):
            raise CubeError(
                f"{key}: was written while it was published; publish again when nothing is "
                "being built"
            )


async def _holds(target: Any, release: _Release) -> bool:
    """Report whether a target has exactly the release's objects, with the store's content."""
    if {key async for key in target.list()} != set(release.keys):
        return False

    async def same(key: str) -> bool:
        old = await _read_content(target, key)
        return old is not None and _are_same(old, await release.read(key), key)

    for keys in _cut_batches(release.keys):
        if not all(await asyncio.gather(*map(same, keys))):
            return False
    return True


def _cut_batches(keys: Collection[str]) -> Iterator[list[str]]:
    ordered = sorted(keys)
    for start in range(0, len(ordered), _BATCH):
        yield ordered[start : start + _BATCH]


def _sort_key(key: str) -> tuple[bool, int, str]:
    """Sort metadata before chunks, and groups before their members.

    Icechunk accepts a chunk only after its array.
    """
    return not key.endswith(_ROOT), key.count("/"), key


def _are_same(old: bytes, new: bytes, key: str) -> bool:
    """Compare two objects; JSON metadata by value, since Icechunk rewrites it."""
    return old == new or (key.endswith(_ROOT) and json.loads(old) == json.loads(new))


def list_releases(place: str) -> list[tuple[str, str, str, str]]:
    """List name, time (UTC, ISO 8601), snapshot and branch of every tag, oldest first.

    The branch is "main" if main is at the tag, else empty.

    Raises:
        CubeError: as `open_repository`.
    """
    repository = open_repository(place)
    with _convert_errors(place):
        current = repository.lookup_branch("main")
        rows = []
        for tag in repository.list_tags():
            newest = next(iter(repository.ancestry(tag=tag)))
            branch = "main" if newest.id == current else ""
            rows.append((tag, newest.written_at.isoformat(timespec="seconds"), newest.id, branch))
    return sorted(rows, key=lambda row: (row[1], row[0]))


def list_differences(place: str, old: str, new: str) -> list[tuple[str, str, str]]:
    """List the differences between two releases as unique, sorted (site, year, variable).

    The year is "all" for objects without a year. Icechunk lists the objects written since the
    common ancestor of the two tags, and their contents are compared. The result is therefore
    correct for any two tags: in either order, across a rollback, and after a change was undone.
    If a year has another index in the two releases, all objects of its site are compared.

    Raises:
        CubeError: a tag or the repository is missing.
    """
    repository = open_repository(place)
    with _convert_errors(place):
        _need_tags(repository, place, old, new)
        old_line = [snapshot.id for snapshot in repository.ancestry(tag=old)]
        new_line = [snapshot.id for snapshot in repository.ancestry(tag=new)]
        common = next(snapshot for snapshot in old_line if snapshot in new_line)
        keys: set[str] = set()
        for newest in (old_line[0], new_line[0]):
            if newest != common:
                keys.update(_list_changes(repository, common, newest))
        stores = [repository.readonly_session(tag=tag).store for tag in (old, new)]
        years = [_read_years(store) for store in stores]
        for group in years[0].find_moved(years[1]):
            for store in stores:
                keys.update(_list_below(store, f"{group}/"))
        names = {name for of in years for key in keys if (name := of.name_object(key)) is not None}
        places = {name: [of.find_object(name) for of in years] for name in names}
        changes: dict[str, str] = sync(_compare(stores, places))
        return sorted(_make_rows(years, changes))


def _list_changes(repository: icechunk.Repository, start: str, end: str) -> Iterator[str]:
    """Yield the keys of the objects written or deleted between two snapshots."""
    diff = repository.diff(from_snapshot_id=start, to_snapshot_id=end)
    groups = diff.new_groups | diff.deleted_groups | diff.updated_groups
    for path in groups | diff.new_arrays | diff.deleted_arrays | diff.updated_arrays:
        yield f"{path}/{_ROOT}".lstrip("/")
    for path, chunks in diff.updated_chunks.items():
        yield from ("/".join([path.lstrip("/"), "c", *map(str, chunk)]) for chunk in chunks)


def _read_years(store: Any) -> Years:
    return Years.read(zarr.open_group(store, mode="r"), _list_below(store, ""))


def _list_below(store: Any, prefix: str) -> list[str]:
    """List the keys of the objects with this prefix."""

    async def list_keys() -> list[str]:
        return [key async for key in store.list_prefix(prefix)]

    keys: list[str] = sync(list_keys())
    return keys


async def _compare(
    stores: Sequence[Any], places: Mapping[str, Sequence[str | None]]
) -> dict[str, str]:
    """Map the name of each different object to "new", "gone" or "changed".

    `places` has the keys of each object in the stores (`Years.find_object`).
    """
    changes = {}
    for name, keys in places.items():
        old, new = [
            await _read_content(store, key) for store, key in zip(stores, keys, strict=True)
        ]
        if old == new:
            continue
        if old is None:
            changes[name] = "new"
        elif new is None:
            changes[name] = "gone"
        else:
            changes[name] = "changed"
    return changes


async def _read_content(store: Any, key: str | None) -> bytes | None:
    if key is None:
        return None
    if not key.endswith(_ROOT) and not await store.exists(_CHUNK.sub(f"/{_ROOT}", key)):
        return None  # Icechunk raises if the array is missing
    content = await store.get(key, default_buffer_prototype())
    if content is None:
        return None
    return bytes(content.to_bytes())


def _make_rows(years: Sequence[Years], changes: Mapping[str, str]) -> set[tuple[str, str, str]]:
    sites = {
        key.removesuffix(f"/{_ROOT}"): change
        for key, change in changes.items()
        if key.count("/") == 1 and key.endswith(_ROOT) and change != "changed"
    }
    rows = {(site, "all", f"the whole site ({change})") for site, change in sites.items()}
    old, new = years
    for name, change in changes.items():
        site, _, path = name.partition("/")
        if not path or site in sites:
            continue
        if change == "gone":
            rows.add(_make_row(old, name, change))
        else:
            rows.add(_make_row(new, name, change))
    return rows


def _make_row(years: Years, name: str, change: str) -> tuple[str, str, str]:
    """Return site, year and variable of an object below a site's group.

    The variable gets a suffix for anything but a plain change.
    """
    site, _, path = name.partition("/")
    suffix = f" ({change})"
    if change == "changed":
        suffix = ""
    if path.startswith("builds/"):
        _, year, *members = path.split("/")
        variable = "provenance"
        if members and members[0] != _ROOT:
            variable = members[0]
        return site, year, variable + suffix
    if path.endswith(_ROOT):
        variable = path.removesuffix(_ROOT).rstrip("/") or "site"
        return site, "all", variable + (suffix or " (metadata)")
    variable = _CHUNK.sub("", path)
    chunk = path.removeprefix(f"{variable}/c").lstrip("/")
    if chunk.count("/") < 2:
        return site, "all", variable + suffix
    # No suffix: all-nodata chunks are not stored, so a new or missing chunk is a plain change.
    return site, years.year_of(name), variable


def roll_back(place: str, tag: str) -> None:
    """Reset `main` to the tag; the next release starts from there and later tags stay.

    Raises:
        CubeError: the tag or the repository is missing.
    """
    repository = open_repository(place)
    with _lock(place), _convert_errors(place):
        _need_tags(repository, place, tag)
        repository.reset_branch("main", repository.lookup_tag(tag))


def _need_tags(repository: icechunk.Repository, place: str, *tags: str) -> None:
    existing = sorted(repository.list_tags())
    for tag in tags:
        if tag not in existing:
            raise CubeError(f"{place}: has no tag {tag!r}; it has {', '.join(existing) or 'none'}")


@contextmanager
def _lock(place: str, *, create: bool = False) -> Iterator[None]:
    """Lock a local folder for this process; object stores need no lock.

    The lock ends with the process at the latest.

    Raises:
        CubeError: another process has the lock, or the folder cannot be used.
    """
    if _is_url(place):
        yield
        return
    folder = Path(place)
    try:
        if create:
            folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise CubeError(
            f"{folder}: is no folder that can be used ({error.strerror}); name another folder"
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise CubeError(
            f"{folder}: another process is publishing there; wait for its end"
        ) from error
    finally:
        os.close(handle)


@contextmanager
def _convert_errors(place: str) -> Iterator[None]:
    """Convert Icechunk errors to CubeError."""
    try:
        yield
    except icechunk.IcechunkError as error:
        lines = [line.strip(" x") for line in str(error).splitlines() if line.strip(" x|")]
        reason = [*lines, type(error).__name__][0]
        raise CubeError(f"{place}: {reason}; existing releases are unchanged") from error
