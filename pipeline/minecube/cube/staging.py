"""Keep a site-year that is being built apart from committed pixels, then put it in their place.

    SITE/builds/2020.new/     attributes: the run, its finished blocks, their checksums, the counts of its reads so far
      reflectance, ...        one array per variable [build, ..., y, x], in the shards of the cube
      scenes, reads           bytes, written last

The commit is one object: the marker `SITE/builds/2020` is replaced by the new provenance with `placing` set. The objects are
then renamed to their places, and the marker is written again without `placing`. Until the commit, the old year is untouched.
After it, `finish` completes a run that was killed. A year with `placing` set is not read.
"""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import zarr

from minecube.catalog import recipe_of
from minecube.cube.builds import PLACING, STAGED, WITHDRAWN, note_incomplete, run_of
from minecube.cube.store import NAMED, Summing, begin_group, group_at, group_of, objects, sealed, site_group, summing
from minecube.errors import CubeError


def staging_path(site_id: str, year: int) -> str:
    """The group of a site-year that is being built."""
    return f"{site_id}/builds/{year}{STAGED}"


@dataclass
class Staging:
    """Arrays of a site-year that is being built, and what is known of its blocks."""

    store: str
    site_id: str
    year: int
    target: Summing
    group: zarr.Group
    arrays: dict[str, zarr.Array]
    """Variable -> array [1, ..., y, x]."""

    @property
    def blocks(self) -> list[str]:
        """Blocks that are done, as `row/column`."""
        return list(self.group.attrs["blocks"])

    @property
    def checksums(self) -> dict[str, list[Any]]:
        """Shard, relative to this group -> size and SHA-256."""
        return dict(self.group.attrs["checksums"])

    def note(self, blocks: Sequence[str], checksums: Mapping[str, Any], counts: bytes | None) -> None:
        """Note blocks as done, together with the counts of their reads: one object, so that both are kept or neither."""
        noted = {**self.group.attrs, "blocks": list(blocks), "checksums": dict(checksums)}
        if counts is not None:
            noted["reads"] = base64.b64encode(counts).decode()
        self.group.attrs.put(noted)

    def commit(self, provenance: Mapping[str, Any], blobs: Mapping[str, bytes]) -> None:
        """Commit the year with this provenance and these bytes (`scenes`, `reads`), and put its objects in place."""
        for name, content in blobs.items():
            put_bytes(self.group, name, content)
        written = self.target.below(self.group.path, self.group.path)
        kept = {f"builds/{self.year}/{key}": value for key, value in written.items() if key.split("/")[0] in blobs}
        cube = site_group(self.store, self.site_id, "r")
        index = year_index(cube, self.year)
        for key, value in self.checksums.items():
            kept[_placed_key(key, index)] = value
        marker = zarr.open_group(self.target, path=f"{self.site_id}/builds/{self.year}", mode="a", use_consolidated=False)
        marker.attrs.put(sealed({**provenance, PLACING: True, "checksums": kept}))  # the commit
        finish(self.store, self.site_id, self.year)


def year_index(group: zarr.Group, year: int) -> int:
    """Index of a year on the first axis of a cube; raises CubeError if the cube has no room for it."""
    there = [int(y) for y in group["year"][:]]
    if year not in there:
        raise CubeError(f"year {year} is not in the cube, which has {there[0]}..{there[-1]}; build it first")
    return there.index(year)


def put_bytes(group: zarr.Group, name: str, content: bytes) -> None:
    """Store bytes as a one-dimensional array of their own."""
    data = np.frombuffer(content, dtype=np.uint8)
    group.create_array(name, data=data, overwrite=True, dimension_names=(f"byte_of_{name}",))


def open_staging(store: str, site_id: str, year: int, names: Sequence[str], run: str, *, counted: bool) -> Staging:
    """Open the staging group of a site-year, with the blocks that the same run left there.

    Args:
        store: local path or object-store URL.
        site_id: the site.
        year: a year of the cube.
        names: variables that are built.
        run: identity of the build (`run_of`). What another run left is removed.
        counted: whether reads are counted. Blocks without readable counts are then removed, too.
    """
    path = staging_path(site_id, year)
    target = summing(store)
    group = group_at(store, path)
    if group is None or group.attrs.get("building") != run or (counted and group.attrs["blocks"] and not counts_of(group)):
        discard(store, site_id, year)
        _empty_unfinished(store, site_id, year)
        cube = zarr.open_group(target, path=site_id, mode="r+", use_consolidated=False)
        group = zarr.open_group(target, path=path, mode="a", use_consolidated=False)
        for name in names:
            _create_staged(group, name, cube[name])
        group.attrs.put({"building": run, "blocks": [], "checksums": {}})  # last: the template is whole
    else:
        group = zarr.open_group(target, path=path, mode="r+", use_consolidated=False)
    arrays = {name: zarr.open_array(target, path=f"{path}/{name}", mode="r+") for name in names}
    return Staging(store, site_id, year, target, group, arrays)


def _create_staged(group: zarr.Group, name: str, like: zarr.Array) -> None:
    """Create an array for one build, with the shards and codecs of the cube's array."""
    group.create_array(
        name,
        shape=(1, *like.shape[1:]),
        dtype=like.dtype,
        chunks=like.chunks,
        shards=like.shards,
        fill_value=like.fill_value,
        compressors=like.compressors,
        dimension_names=("build", *like.metadata.dimension_names[1:]),
        overwrite=True,
    )


def counts_of(group: zarr.Group) -> bytes | None:
    """The counts of reads of a year that is being built; None if there are none or they cannot be read."""
    try:
        content = base64.b64decode(group.attrs["reads"], validate=True)
        pd.read_parquet(io.BytesIO(content))
    except (KeyError, ValueError, TypeError, OSError):  # pyarrow's errors are ValueError or OSError
        return None
    return content


def reads_so_far(store: str, provenance: Mapping[str, Any]) -> bytes | None:
    """The counts of reads of an interrupted run of that very build; None if there are none."""
    group = group_at(store, staging_path(provenance["site"], provenance["year"]))
    if group is None or group.attrs.get("building") != run_of(provenance):
        return None
    return counts_of(group)


def discard(store: str, site_id: str, year: int) -> None:
    """Remove what a build of a year has left, if there is anything."""
    path = staging_path(site_id, year)
    group = group_at(store, path, "r+")
    if group is not None:
        group.attrs.put({})  # first, so that no block counts as done once its shards are gone
    with contextlib.suppress(FileNotFoundError, KeyError):
        builds = group_of(store, f"{site_id}/builds", "r+")
        del builds[f"{year}{STAGED}"]


def finish(store: str, site_id: str, year: int) -> None:
    """Put the objects of a committed year in place, if a run was killed before it had done so.

    Raises:
        CubeError: an object of the commit is missing.
    """
    marker = group_at(store, f"{site_id}/builds/{year}", "r+")
    if marker is None or PLACING not in marker.attrs:
        return
    made = dict(marker.attrs)
    raw = objects(store)
    cube = site_group(store, site_id, "r")
    index = year_index(cube, year)
    staged = staging_path(site_id, year)
    for key in sorted({*made["checksums"], *_shard_keys(cube, index)}):
        if key not in made["checksums"]:
            _delete(store, [f"{site_id}/{key}"])  # of the year that is replaced
            continue
        try:
            raw.rename(f"{staged}/{_staged_key(key)}", f"{site_id}/{key}")
        except FileNotFoundError:
            _need_placed(raw, store, f"{site_id}/{key}")
    if "reads" in made:
        note_incomplete(store, site_id)
    discard(store, site_id, year)
    # Last, so that a run that is killed before is finished by the next one.
    settled = {name: value for name, value in made.items() if name != PLACING}
    marker.attrs.put(sealed(settled))


def _need_placed(raw: Any, store: str, key: str) -> None:
    """Raise CubeError if an object is neither staged nor in its place."""
    try:
        raw.head(key)
    except FileNotFoundError as error:
        raise CubeError(f"{store}: {key} is missing although its year was committed; run `minecube verify`") from error


def _placed_key(key: str, index: int) -> str:
    """Where a staged shard belongs: the first index of its chunk key is that of the year."""
    name, _, rest = key.partition("/c/0/")
    return f"{name}/c/{index}/{rest}"


def _staged_key(key: str) -> str:
    """Where an object of a commit lies until it is put in place; both keys are relative to their groups."""
    first, *rest = key.split("/")
    if first == "builds":
        return "/".join(rest[1:])
    return "/".join([first, "c", "0", *rest[2:]])


def built_names(cube: zarr.Group) -> list[str]:
    """Names of the variables that builds write."""
    return ["reflectance", *recipe_of(cube.attrs[NAMED]["recipe"]).layers]


def _shard_keys(cube: zarr.Group, index: int) -> Iterator[str]:
    """All objects that a year can have in the variables that builds write."""
    for name in built_names(cube):
        array = cube[name]
        rows, columns = (-(-n // side) for n, side in zip(array.shape[-2:], array.shards[-2:], strict=True))
        for row in range(rows):
            for column in range(columns):
                key = array.metadata.encode_chunk_key((index, *(0,) * (array.ndim - 3), row, column))
                yield f"{name}/{key}"


def _empty_unfinished(store: str, site_id: str, year: int) -> None:
    """Remove pixels of a year that is not committed: those of older versions, and of a withdrawal that was killed."""
    marker = group_at(store, f"{site_id}/builds/{year}", "r+")
    if marker is None or not marker.attrs or "build_id" in marker.attrs:
        return
    cube = site_group(store, site_id, "r")
    _delete(store, (f"{site_id}/{key}" for key in _shard_keys(cube, year_index(cube, year))))
    marker.attrs.put({})


def withdraw(store: str, site_id: str, year: int) -> None:
    """Take the commit off a year and remove the pixels that its marker lists. A marker that cannot be read lists none."""
    path = f"{site_id}/builds/{year}"
    try:
        marker = group_at(store, path)
        attrs = {} if marker is None else dict(marker.attrs)
    except CubeError:
        attrs = {}
    pixels = [key for key in attrs.get(WITHDRAWN, attrs.get("checksums", ())) if not key.startswith("builds/")]
    begin_group(store, path, {WITHDRAWN: pixels})
    _delete(store, (f"{site_id}/{key}" for key in pixels))
    begin_group(store, path, {})


def _delete(store: str, keys: Iterable[str]) -> None:
    """Remove objects, if they are there."""
    raw = objects(store)
    for key in keys:
        with contextlib.suppress(FileNotFoundError):
            raw.delete(key)
