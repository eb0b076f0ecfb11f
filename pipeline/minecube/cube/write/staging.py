"""Build a site-year apart from committed pixels, then put it in their place.

    SITE/builds/2020.RUN.new/   attributes: finished blocks, their checksums and read counts
      reflectance, ...          one array per variable [build, ..., y, x], in the cube's shards
      scenes, reads             bytes, written last

The commit is a single write: the new provenance replaces the marker `SITE/builds/2020`, under
`placing`. The objects are then renamed to their places. Finally the marker is written without
`placing`. Until the commit, the old year is untouched. After it, `finish` completes the work of a
killed run. `open_committed` leaves out a year with `placing`.
"""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import zarr

from minecube.cube.checksums import ChecksumStore, seal, size_and_sha256
from minecube.cube.locks import WAIT_S, hold
from minecube.cube.markers import (
    PLACING,
    STAGED,
    WITHDRAWN,
    completeness_of,
    marker_path,
    read_marker,
    staged_year,
)
from minecube.cube.provenance import hash_run
from minecube.cube.store import Store
from minecube.cube.template import built_variables, layout_of
from minecube.errors import BusyError, CubeError

log = logging.getLogger(__name__)


def staging_path(site_id: str, year: int, run: str) -> str:
    """Return the path of the staging group of a site-year and run."""
    return f"{marker_path(site_id, year)}.{run}{STAGED}"


@dataclass
class Staging:
    """Arrays of a site-year under construction, and notes on its blocks."""

    store: Store
    site_id: str
    year: int
    target: ChecksumStore
    group: zarr.Group
    arrays: dict[str, zarr.Array]
    """Variable -> array [1, ..., y, x]."""

    @property
    def blocks(self) -> list[str]:
        """Finished blocks, as `row/column`."""
        return list(self.group.attrs["blocks"])

    @property
    def checksums(self) -> dict[str, list[Any]]:
        """Shard, relative to this group -> size and SHA-256."""
        return dict(self.group.attrs["checksums"])

    def note(
        self, blocks: Sequence[str], checksums: Mapping[str, Any], counts: bytes | None
    ) -> None:
        """Note blocks as done, with their read counts, in one write: both are kept or neither."""
        notes: dict[str, Any] = {"blocks": list(blocks), "checksums": dict(checksums)}
        if counts is not None:
            notes["reads"] = base64.b64encode(counts).decode()
        self.group.attrs.put(notes)

    def commit(self, provenance: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        """Commit the year: write its files, then its marker, then rename its objects.

        The marker holds the provenance and the checksums of all objects. Its single write is the
        commit. If the run is killed later, `finish` renames the remaining objects.

        Args:
            provenance: From `describe_build`.
            files: `scenes`, and `reads` if reads were counted.
        """
        for name, content in files.items():
            put_bytes(self.group, name, content)
        written = self.target.checksums_below(self.group.path, self.group.path)
        checksums = {
            f"builds/{self.year}/{key}": checksum
            for key, checksum in written.items()
            if key.split("/")[0] in files
        }
        index = year_index(self.store.open_site(self.site_id), self.year)
        for key, checksum in self.checksums.items():
            checksums[_placed_key(key, index)] = checksum
        provenance = seal({**provenance, "checksums": checksums})
        path = marker_path(self.site_id, self.year)
        marker = zarr.open_group(self.target, path=path, mode="a", use_consolidated=False)
        marker.attrs.put({PLACING: {"made": provenance, "staging": self.group.path}})
        finish(self.store, self.site_id, self.year)


def year_index(group: zarr.Group, year: int) -> int:
    """Return a year's index on the first axis of a cube.

    Raises:
        CubeError: the cube has no room for the year.
    """
    years = [int(value) for value in group["year"][:]]
    if year not in years:
        listed = ", ".join(map(str, sorted(years)))
        raise CubeError(f"year {year} is not in the cube, which has {listed}; build it first")
    return years.index(year)


def put_bytes(group: zarr.Group, name: str, content: bytes) -> None:
    """Store bytes as a separate one-dimensional array."""
    data = np.frombuffer(content, dtype=np.uint8)
    group.create_array(name, data=data, overwrite=True, dimension_names=(f"byte_of_{name}",))


def open_staging(
    store: Store,
    site_id: str,
    year: int,
    names: Sequence[str],
    run: str,
    initial_counts: bytes | None,
) -> Staging:
    """Open the staging group of a run, with the blocks left by an earlier process of the same run.

    `names` are the variables to build. `run` is the identity of the build (`hash_run`). Remains of
    other runs of the year are removed, and so are staged blocks with other read counts than
    `initial_counts`, those at the start of this process.
    """
    path = staging_path(site_id, year, run)
    target = store.open_with_checksums()
    group = store.find_group(path)
    discard(store, site_id, year, keep=path)
    if group is None or not _is_resumable(store, path, group, initial_counts):
        _remove(store, path)
        _empty_unfinished(store, site_id, year)
        cube = zarr.open_group(target, path=site_id, mode="r+", use_consolidated=False)
        group = zarr.open_group(target, path=path, mode="a", use_consolidated=False)
        for name in names:
            like = cube[name]
            group.create_array(
                name,
                shape=(1, *like.shape[1:]),
                dimension_names=("build", *like.metadata.dimension_names[1:]),
                overwrite=True,
                **layout_of(like),
            )
        group.attrs.put({"blocks": [], "checksums": {}})  # last: the template is whole
    else:
        group = zarr.open_group(target, path=path, mode="r+", use_consolidated=False)
    arrays = {name: zarr.open_array(target, path=f"{path}/{name}", mode="r+") for name in names}
    return Staging(store, site_id, year, target, group, arrays)


def _is_resumable(store: Store, path: str, group: zarr.Group, initial_counts: bytes | None) -> bool:
    """Whether the read counts are the initial ones, and all noted shards exist with their sizes."""
    counts = counts_of(group)
    if "blocks" not in group.attrs or counts != initial_counts:
        return False
    if "reads" in group.attrs and counts is None:
        return False
    raw = store.open_objects()
    try:
        return all(
            raw.head(f"{path}/{key}")["size"] == size
            for key, (size, _) in group.attrs["checksums"].items()
        )
    except FileNotFoundError:
        return False


def counts_of(group: zarr.Group) -> bytes | None:
    """Return the read counts of a year under construction; None if missing or unreadable."""
    try:
        content = base64.b64decode(group.attrs["reads"], validate=True)
        pd.read_parquet(io.BytesIO(content))
    except (KeyError, ValueError, TypeError, OSError):  # pyarrow's errors are ValueError or OSError
        return None
    return content


def read_initial_counts(store: Store, provenance: Mapping[str, Any]) -> bytes | None:
    """Return the read counts of an interrupted run of the same build; None if missing."""
    path = staging_path(provenance["site"], provenance["year"], hash_run(provenance))
    group = store.find_group(path)
    return None if group is None else counts_of(group)


def _staging_groups(store: Store, site_id: str, year: int) -> list[str]:
    return [
        f"{site_id}/builds/{name}"
        for name in store.list_folders(f"{site_id}/builds")
        if name.endswith(STAGED) and staged_year(name) == year
    ]


def has_unfinished_build(store: Store, site_id: str, year: int) -> bool:
    """Whether an unfinished build of a year exists."""
    return bool(_staging_groups(store, site_id, year))


def discard(store: Store, site_id: str, year: int, keep: str = "") -> None:
    """Remove all remains of builds of a year, except the group `keep`."""
    for path in _staging_groups(store, site_id, year):
        if path != keep:
            _remove(store, path)


def _remove(store: Store, path: str) -> None:
    """Remove a staging group if it exists."""
    group = store.find_group(path, "r+")
    if group is not None:
        group.attrs.put({})  # first: no block may count as done without its shards
    parent, _, name = path.rpartition("/")
    with contextlib.suppress(FileNotFoundError, KeyError):
        del store.open_group(parent, "r+")[name]


def finish(store: Store, site_id: str, year: int) -> None:
    """Put the objects of a committed year in place after a killed run.

    If an object is lost, the commit is withdrawn. The year can then be built again.
    """
    group = store.find_group(marker_path(site_id, year), "r+")
    if group is None or PLACING not in group.attrs:
        return
    marker = group.attrs[PLACING]["made"]
    staged = group.attrs[PLACING]["staging"]
    checksums = marker["checksums"]
    cube = store.open_site(site_id)
    for key in sorted({*checksums, *_shard_keys(cube, year_index(cube, year))}):
        place = f"{site_id}/{key}"
        if key not in checksums:
            _delete(store, [place])  # of the replaced year
        elif not _place(store, f"{staged}/{_staged_key(key)}", place, checksums[key]):
            log.warning(
                "%s: %s %s lost %s before it was in place; the year is built again",
                store,
                site_id,
                year,
                key,
            )
            withdraw(store, site_id, year)
            return
    if "reads" in marker:
        _note_lost_reads(store, site_id)
    discard(store, site_id, year)
    group.attrs.put(marker)  # last: after a kill, the next run finishes the work


def _note_lost_reads(store: Store, site_id: str) -> None:
    """Note years with lost reads in the cube's attribute `incomplete_reads`: year -> share read."""
    with hold(store, site_id, wait_s=WAIT_S):
        group = store.open_site(site_id, mode="r+")
        shares = {}
        for year in sorted(group["year"][:]):
            marker = read_marker(store, site_id, int(year))
            if marker is not None and completeness_of(marker) < 1:
                shares[str(year)] = completeness_of(marker)
        if shares != group.attrs.get("incomplete_reads", {}):
            group.attrs["incomplete_reads"] = shares


def _place(store: Store, source: str, target: str, checksum: Sequence[Any]) -> bool:
    """Rename an object to its place. Returns whether it is in place.

    An object renamed earlier must match its checksum.
    """
    raw = store.open_objects()
    try:
        raw.rename(source, target)
    except FileNotFoundError:
        try:
            return size_and_sha256(bytes(raw.get(target).bytes())) == list(checksum)
        except FileNotFoundError:
            return False
    return True


def _placed_key(key: str, index: int) -> str:
    """Return the final key of a staged shard: its first chunk index becomes that of the year."""
    name, _, chunk = key.partition("/c/0/")
    return f"{name}/c/{index}/{chunk}"


def _staged_key(key: str) -> str:
    """Return the staged key of a committed object. Both keys are relative to their groups."""
    name, *parts = key.split("/")
    if name == "builds":
        return "/".join(parts[1:])
    return "/".join([name, "c", "0", *parts[2:]])


def shard_grid(array: zarr.Array) -> list[tuple[int, int]]:
    """List row and column of each shard of a year."""
    rows, columns = (
        -(-length // side) for length, side in zip(array.shape[-2:], array.shards[-2:], strict=True)
    )
    return list(itertools.product(range(rows), range(columns)))


def _shard_keys(cube: zarr.Group, index: int) -> Iterator[str]:
    """Yield the keys of all possible shards of a year, in the variables written by builds."""
    for name in built_variables(cube):
        array = cube[name]
        for row, column in shard_grid(array):
            chunk = (index, *(0,) * (array.ndim - 3), row, column)
            yield f"{name}/{array.metadata.encode_chunk_key(chunk)}"


def _empty_unfinished(store: Store, site_id: str, year: int) -> None:
    """Remove pixels of an uncommitted year, left by older versions or a killed withdrawal."""
    marker = store.find_group(marker_path(site_id, year), "r+")
    if marker is None or not marker.attrs or "build_id" in marker.attrs:
        return
    cube = store.open_site(site_id)
    _delete(store, (f"{site_id}/{key}" for key in _shard_keys(cube, year_index(cube, year))))
    marker.attrs.put({})


def withdraw(store: Store, site_id: str, year: int, judged: str | None = None) -> None:
    """Withdraw the commit of a year, and remove its staged objects and the pixels in its marker.

    A damaged marker lists no pixels. `judged` is the `sha256` of the faulty marker; None for any
    marker.

    Raises:
        BusyError: the year has been built again since the check.
    """
    path = marker_path(site_id, year)
    attrs = store.read_attributes(path)
    if judged is not None and attrs.get("sha256") not in (judged, None):
        raise BusyError(
            f"{store}: {site_id} {year} was built again since it was verified; verify it again"
        )
    committed = attrs.get(PLACING, {}).get("made", attrs)
    objects = attrs.get(WITHDRAWN, committed.get("checksums", ()))
    pixels = [key for key in objects if not key.startswith("builds/")]
    store.begin_group(path, {WITHDRAWN: pixels})
    _delete(store, (f"{site_id}/{key}" for key in pixels))
    discard(store, site_id, year)
    store.begin_group(path, {})


def _delete(store: Store, keys: Iterable[str]) -> None:
    raw = store.open_objects()
    for key in keys:
        with contextlib.suppress(FileNotFoundError):
            raw.delete(key)
