"""Releases of a store in Icechunk: every tag is one state of all cubes, kept for good, and two of them can be compared.

A release holds what is committed: pixels of years without a marker stay behind. Objects are copied as they are, so that
pixels are the store's own to the last bit, and only those that differ from what the repository holds: what two tags differ
in is then what was really changed. A commit is one object: a run that is killed before it leaves the repository as it was.
A run that is killed later can be repeated: the tag is then made, or found to hold this state.

On a local folder Icechunk is safe for one process at a time (its own words), which a lock on the folder sees to. On S3 it is
for any number.
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
_AT_ONCE = 16  # objects under way: enough to hide an object store's latency, few enough to hold in memory
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # names that Icechunk lists as they were given, and any disk can hold
_CHUNK = re.compile(r"/c(/\d+)*$")  # how Zarr v3 names chunks; that of an array without dimensions is `c`


def open_repository(place: str, *, create: bool = False) -> icechunk.Repository:
    """The Icechunk repository in a folder, or at `s3://bucket/prefix` with the keys and endpoint of the environment.

    Raises:
        CubeError: there is none and `create` is false, another kind of URL, or it cannot be opened.
    """
    scheme, _, rest = place.partition("://")
    if not rest:
        if not create and not Path(place).exists():  # Icechunk would make the folder
            raise CubeError(f"{place}: there is no Icechunk repository; `minecube publish --tag` makes one")
        icechunk.set_logs_filter("error")  # its warning that a folder bears one process only, which `publish` locks it for
        storage = icechunk.local_filesystem_storage(place)
    elif scheme == "s3":
        bucket, _, prefix = rest.partition("/")
        endpoint = os.environ.get("AWS_ENDPOINT_URL")
        storage = icechunk.s3_storage(
            bucket=bucket,
            prefix=prefix.rstrip("/") or None,
            from_env=True,
            region=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1",
            endpoint_url=endpoint,
            allow_http=bool(endpoint and endpoint.startswith("http://")),
            force_path_style=bool(endpoint),
        )
    else:
        raise CubeError(f"{place}: expected a folder or s3://bucket/prefix, found {scheme}://; releases go to one of those")
    with _icechunk(place):
        if not icechunk.Repository.exists(storage):
            if not create:
                raise CubeError(f"{place}: there is no Icechunk repository; `minecube publish --tag` makes one")
            if not rest and Path(place).exists() and any(Path(place).iterdir()):
                raise CubeError(f"{place}: is not empty and no Icechunk repository, so nothing is written there; name another")
            return icechunk.Repository.create(storage)
        return icechunk.Repository.open(storage)


def publish(
    source: zarr.Group, years: Mapping[str, Sequence[int]], place: str, tag: str, about: Mapping[str, Mapping[str, str]]
) -> tuple[int, int] | None:
    """Make the repository hold what these sites hold, commit that, and name the commit by the tag.

    Returns how many objects were written, and how many were removed; None if the tag already holds this very state.

    Args:
        source: root of the store.
        years: site -> its committed years. Sites that are not named are in no later release, either.
        place: the repository, as `open_repository` takes it; made where it is not there.
        tag: name of the release; never moved.
        about: site -> attributes of its group: licence and citations.

    Raises:
        CubeError: the tag is no name for a tag, holds another state, or was deleted; another process publishes there; or
            something cannot be read or written. The branch `main` then stays as it was.
    """
    if not _TAG.fullmatch(tag):
        raise CubeError(f"expected a tag of at most 100 letters, digits, . _ -, found {tag!r}; choose another name")
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
            snapshot = session.commit(f"Release {tag}", metadata={site: dict(text) for site, text in about.items()})
        try:
            repository.create_tag(tag, snapshot)
        except icechunk.IcechunkError as error:
            repository.reset_branch("main", before, from_snapshot_id=snapshot)
            if "already exists" in str(error):  # although it is not listed
                raise CubeError(
                    f"{place}: tag {tag!r} was deleted, and Icechunk never uses a tag again; choose another name"
                ) from error
            raise
    return changed


def _keys(source: zarr.Group, site: str, years: Sequence[int]) -> Iterator[str]:
    """Keys of a site in the store, those of chunks and markers of uncommitted years, and files that are no Zarr, left out."""
    there = [int(y) for y in np.asarray(source[f"{site}/year"])]
    gone = {index for index, year in enumerate(there) if year not in years}

    async def found() -> list[str]:
        return [key async for key in source.store.list_prefix(f"{site}/")]

    for key in sync(found()):
        if not key.endswith(f"/{_ROOT}") and not _CHUNK.search(key):
            continue  # what a killed write left, or somebody put there
        name, *rest = key.removeprefix(f"{site}/").split("/")
        if name == "builds" and rest[0].isdigit() and int(rest[0]) not in years:
            continue
        if rest[:1] == ["c"] and name != "year" and len(rest) > 3 and int(rest[1]) in gone:
            continue
        yield key


async def _mirror(source: zarr.Group, target: Any, wanted: set[str], about: Mapping[str, Mapping[str, str]]) -> tuple[int, int]:
    """Set what differs and delete what is not wanted; how many objects each was."""
    prototype = default_buffer_prototype()
    gone = sorted([key async for key in target.list() if key not in wanted], key=_order, reverse=True)
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


async def _holds(source: zarr.Group, target: Any, wanted: set[str], about: Mapping[str, Mapping[str, str]]) -> bool:
    """Report whether a release holds the wanted objects, as they are in the store, and no others."""
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
    """Read an object of the store as a release holds it: a site's group with licence and citations."""
    found = await source.store.get(key, default_buffer_prototype())
    if found is None:
        raise CubeError(f"{key}: was in the store a moment ago and is not any more; publish when nothing is being built")
    content = bytes(found.to_bytes())
    site, _, rest = key.partition("/")
    return _with_attributes(content, about[site]) if rest == _ROOT and site in about else content


def _order(key: str) -> tuple[bool, int, str]:
    """Metadata before chunks, groups before what is in them: Icechunk takes a chunk only into an array that it knows."""
    return not key.endswith(_ROOT), key.count("/"), key


def _same(old: bytes, new: bytes, key: str) -> bool:
    """Whether two objects say the same; Icechunk writes metadata its own way."""
    return old == new or (key.endswith(_ROOT) and json.loads(old) == json.loads(new))


def _with_attributes(content: bytes, attributes: Mapping[str, str]) -> bytes:
    group = json.loads(content)
    group["attributes"] = {**group.get("attributes", {}), **attributes}
    return json.dumps(group).encode()


def releases(place: str) -> list[tuple[str, str, str]]:
    """Name, time (UTC, ISO 8601) and snapshot of every tag, oldest first; raises CubeError as `open_repository`."""
    repository = open_repository(place)
    with _icechunk(place):
        found = []
        for tag in repository.list_tags():
            newest = next(iter(repository.ancestry(tag=tag)))
            found.append((tag, newest.written_at.isoformat(timespec="seconds"), newest.id))
    return sorted(found, key=lambda release: (release[1], release[0]))


def differences(place: str, old: str, new: str) -> list[tuple[str, str, str]]:
    """What is not the same in two releases: site, year ("all" where it is no year's), variable; sorted, each once.

    Icechunk says what was written since the release that both come from; of that, contents are compared. So it is right for
    any two tags: in either order, on both sides of a rollback, and where something was changed and changed back.

    Raises:
        CubeError: no such tag, or no repository.
    """
    repository = open_repository(place)
    with _icechunk(place):
        _need_tags(repository, place, old, new)
        lines = [[s.id for s in repository.ancestry(tag=tag)] for tag in (old, new)]
        common = next(s for s in lines[0] if s in lines[1])
        touched = {key for line in lines if line[0] != common for key in _touched(repository, common, line[0])}
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
    """Of these keys those whose objects differ, and how: new, gone or changed."""
    changed = {}
    for key in keys:
        before, after = [await _content(store, key) for store in stores]
        if before != after:
            changed[key] = "new" if before is None else "gone" if after is None else "changed"
    return changed


async def _content(store: Any, key: str) -> bytes | None:
    if not key.endswith(_ROOT) and not await store.exists(_CHUNK.sub(f"/{_ROOT}", key)):
        return None  # where Icechunk would raise, since not even the array is there
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
    """Site, year and variable of a key below the site's group, and how it differs, where it did not just change."""
    suffix = "" if how == "changed" else f" ({how})"
    if rest.startswith("builds/"):
        _, year, *more = rest.split("/")
        return site, year, ("provenance" if more[:1] in ([], [_ROOT]) else more[0]) + suffix
    if rest.endswith(_ROOT):
        return site, "all", (rest.removesuffix(_ROOT).rstrip("/") or "site") + (suffix or " (metadata)")
    name = _CHUNK.sub("", rest)
    chunk = rest.removeprefix(f"{name}/c").lstrip("/")
    if chunk.count("/") < 2:
        return site, "all", name + suffix
    beside = "/".join([site, *name.split("/")[:-1], "year"])
    years = zarr.open_array(store, path=beside, mode="r")
    # That a chunk is there or not says no more than that it holds something else: one of nothing but nodata is not written.
    return site, str(np.asarray(years)[int(chunk.split("/")[0])]), name


def rollback(place: str, tag: str) -> None:
    """Make `main` what it was at the tag, so that the next release starts from there; later tags stay.

    Raises:
        CubeError: no such tag, or no repository.
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
    """The folder locked for this process, for as long as it lives at most; raises CubeError where another one holds it."""
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise CubeError(f"{folder}: is no folder that can be used ({error.strerror}); name another") from error
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
    """Turns what Icechunk raises into a CubeError."""
    try:
        yield
    except icechunk.IcechunkError as error:
        said = next((line.strip(" x") for line in str(error).splitlines() if line.strip(" x|")), type(error).__name__)
        raise CubeError(f"{place}: {said}; the releases that are there are unharmed") from error
