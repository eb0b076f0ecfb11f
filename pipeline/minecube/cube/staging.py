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
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import zarr

from minecube.catalog import recipe_of
from minecube.cube.builds import PLACING, STAGED, WITHDRAWN, note_incomplete, run_of, staged_year
from minecube.cube.checksums import ChecksumStore, sealed, sum_of
from minecube.cube.store import NAMED, Store
from minecube.errors import BusyError, CubeError

log = logging.getLogger(__name__)


def staging_path(site_id: str, year: int, run: str) -> str:
    """Return the path of the staging group of a site-year and run."""
    return f"{site_id}/builds/{year}.{run}{STAGED}"


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
        noted: dict[str, Any] = {"blocks": list(blocks), "checksums": dict(checksums)}
        if counts is not None:
            noted["reads"] = base64.b64encode(counts).decode()
        self.group.attrs.put(noted)

    def commit(self, provenance: Mapping[str, Any], blobs: Mapping[str, bytes]) -> None:
        """Commit the year with this provenance and these bytes, and put its objects in place.

        `blobs` holds `scenes`, and `reads` if reads were counted.
        """
        for name, content in blobs.items():
            put_bytes(self.group, name, content)
        written = self.target.checksums_below(self.group.path, self.group.path)
        kept = {
            f"builds/{self.year}/{key}": value
            for key, value in written.items()
            if key.split("/")[0] in blobs
        }
        index = year_index(self.store.open_site(self.site_id, "r"), self.year)
        for key, value in self.checksums.items():
            kept[_placed_key(key, index)] = value
        made = sealed({**provenance, "checksums": kept})
        marker = zarr.open_group(
            self.target, path=f"{self.site_id}/builds/{self.year}", mode="a", use_consolidated=False
        )
        marker.attrs.put({PLACING: {"made": made, "staging": self.group.path}})  # the commit
        finish(self.store, self.site_id, self.year)


def year_index(group: zarr.Group, year: int) -> int:
    """Return a year's index on the first axis of a cube.

    Raises:
        CubeError: the cube has no room for the year.
    """
    there = [int(y) for y in group["year"][:]]
    if year not in there:
        raise CubeError(
            f"year {year} is not in the cube, which has {there[0]}..{there[-1]}; build it first"
        )
    return there.index(year)


def put_bytes(group: zarr.Group, name: str, content: bytes) -> None:
    """Store bytes as a separate one-dimensional array."""
    data = np.frombuffer(content, dtype=np.uint8)
    group.create_array(name, data=data, overwrite=True, dimension_names=(f"byte_of_{name}",))


def open_staging(
    store: Store, site_id: str, year: int, names: Sequence[str], run: str, before: bytes | None
) -> Staging:
    """Open the staging group of a run, with the blocks left by an earlier process of the same run.

    Args:
        store: local path or object-store URL.
        site_id: the site.
        year: a year of the cube.
        names: variables to build.
        run: identity of the build (`run_of`). Remains of other runs of the year are removed.
        before: read counts at the start of this process. Staged blocks with other counts are
            removed.
    """
    path = staging_path(site_id, year, run)
    target = store.open_with_checksums()
    group = store.find_group(path)
    _discard_others(store, site_id, year, keep=path)
    if group is None or not _is_resumable(store, path, group, before):
        _remove(store, path)
        _empty_unfinished(store, site_id, year)
        cube = zarr.open_group(target, path=site_id, mode="r+", use_consolidated=False)
        group = zarr.open_group(target, path=path, mode="a", use_consolidated=False)
        for name in names:
            _create_staged(group, name, cube[name])
        group.attrs.put({"blocks": [], "checksums": {}})  # last: the template is whole
    else:
        group = zarr.open_group(target, path=path, mode="r+", use_consolidated=False)
    arrays = {name: zarr.open_array(target, path=f"{path}/{name}", mode="r+") for name in names}
    return Staging(store, site_id, year, target, group, arrays)


def _is_resumable(store: Store, path: str, group: zarr.Group, before: bytes | None) -> bool:
    """Whether the read counts equal `before` and all noted shards exist with their sizes."""
    counts = counts_of(group)
    if (
        "blocks" not in group.attrs
        or counts != before
        or ("reads" in group.attrs and counts is None)
    ):
        return False
    raw = store.open_objects()
    try:
        return all(
            raw.head(f"{path}/{key}")["size"] == size
            for key, (size, _) in group.attrs["checksums"].items()
        )
    except FileNotFoundError:
        return False


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
    """Return the read counts of a year under construction; None if missing or unreadable."""
    try:
        content = base64.b64decode(group.attrs["reads"], validate=True)
        pd.read_parquet(io.BytesIO(content))
    except (KeyError, ValueError, TypeError, OSError):  # pyarrow's errors are ValueError or OSError
        return None
    return content


def reads_so_far(store: Store, provenance: Mapping[str, Any]) -> bytes | None:
    """Return the read counts of an interrupted run of the same build; None if missing."""
    group = store.find_group(
        staging_path(provenance["site"], provenance["year"], run_of(provenance))
    )
    return None if group is None else counts_of(group)


def discard(store: Store, site_id: str, year: int) -> None:
    """Remove all remains of builds of a year."""
    _discard_others(store, site_id, year, keep="")


def _discard_others(store: Store, site_id: str, year: int, keep: str) -> None:
    """Remove all remains of builds of a year except one group."""
    below = store.open_objects().list_with_delimiter(f"{site_id}/builds")["common_prefixes"]
    for path in (found.rstrip("/") for found in below):
        name = path.rpartition("/")[2]
        if name.endswith(STAGED) and staged_year(name) == year and path != keep:
            _remove(store, path)


def is_begun(store: Store, site_id: str, year: int) -> bool:
    """Whether an unfinished build of a year exists."""
    below = store.open_objects().list_with_delimiter(f"{site_id}/builds")["common_prefixes"]
    names = [found.rstrip("/").rpartition("/")[2] for found in below]
    return any(name.endswith(STAGED) and staged_year(name) == year for name in names)


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
    marker = store.find_group(f"{site_id}/builds/{year}", "r+")
    if marker is None or PLACING not in marker.attrs:
        return
    made = marker.attrs[PLACING]["made"]
    staged = marker.attrs[PLACING]["staging"]
    cube = store.open_site(site_id, "r")
    index = year_index(cube, year)
    for key in sorted({*made["checksums"], *_shard_keys(cube, index)}):
        if key not in made["checksums"]:
            _delete(store, [f"{site_id}/{key}"])  # of the replaced year
        elif not _place(
            store, f"{staged}/{_staged_key(key)}", f"{site_id}/{key}", made["checksums"][key]
        ):
            log.warning(
                "%s: %s %s lost %s before it was in place; the year is built again",
                store,
                site_id,
                year,
                key,
            )
            withdraw(store, site_id, year)
            return
    if "reads" in made:
        note_incomplete(store, site_id)
    discard(store, site_id, year)
    marker.attrs.put(made)  # last: after a kill, the next run finishes the work


def _place(store: Store, source: str, target: str, checksum: Sequence[Any]) -> bool:
    """Rename an object to its place. Returns whether it is in place.

    An object renamed earlier must match its checksum.
    """
    raw = store.open_objects()
    try:
        raw.rename(source, target)
    except FileNotFoundError:
        try:
            return sum_of(bytes(raw.get(target).bytes())) == list(checksum)
        except FileNotFoundError:
            return False
    return True


def _placed_key(key: str, index: int) -> str:
    """Return the final key of a staged shard: its first chunk index becomes that of the year."""
    name, _, rest = key.partition("/c/0/")
    return f"{name}/c/{index}/{rest}"


def _staged_key(key: str) -> str:
    """Return the staged key of a committed object. Both keys are relative to their groups."""
    first, *rest = key.split("/")
    if first == "builds":
        return "/".join(rest[1:])
    return "/".join([first, "c", "0", *rest[2:]])


def built_names(cube: zarr.Group) -> list[str]:
    """Return the names of the variables written by builds."""
    return ["reflectance", *recipe_of(cube.attrs[NAMED]["recipe"]).layers]


def _shard_keys(cube: zarr.Group, index: int) -> Iterator[str]:
    """Yield the keys of all possible shards of a year, in the variables written by builds."""
    for name in built_names(cube):
        array = cube[name]
        rows, columns = (
            -(-n // side) for n, side in zip(array.shape[-2:], array.shards[-2:], strict=True)
        )
        for row in range(rows):
            for column in range(columns):
                key = array.metadata.encode_chunk_key(
                    (index, *(0,) * (array.ndim - 3), row, column)
                )
                yield f"{name}/{key}"


def _empty_unfinished(store: Store, site_id: str, year: int) -> None:
    """Remove pixels of an uncommitted year, left by older versions or a killed withdrawal."""
    marker = store.find_group(f"{site_id}/builds/{year}", "r+")
    if marker is None or not marker.attrs or "build_id" in marker.attrs:
        return
    cube = store.open_site(site_id, "r")
    _delete(store, (f"{site_id}/{key}" for key in _shard_keys(cube, year_index(cube, year))))
    marker.attrs.put({})


def withdraw(store: Store, site_id: str, year: int, judged: str | None = None) -> None:
    """Withdraw the commit of a year, and remove its staged objects and the pixels in its marker.

    Args:
        store: local path or object-store URL.
        site_id: the site.
        year: the year. A damaged marker lists no pixels.
        judged: `sha256` of the faulty marker; None for any marker.

    Raises:
        BusyError: the year has been built again since the check.
    """
    path = f"{site_id}/builds/{year}"
    try:
        marker = store.find_group(path)
        attrs = {} if marker is None else dict(marker.attrs)
    except CubeError:
        attrs = {}
    if judged is not None and attrs.get("sha256") not in (judged, None):
        raise BusyError(
            f"{store}: {site_id} {year} was built again since it was verified; verify it again"
        )
    listed = attrs.get(WITHDRAWN, attrs.get(PLACING, {}).get("made", attrs).get("checksums", ()))
    pixels = [key for key in listed if not key.startswith("builds/")]
    store.begin_group(path, {WITHDRAWN: pixels})
    _delete(store, (f"{site_id}/{key}" for key in pixels))
    discard(store, site_id, year)
    store.begin_group(path, {})


def _delete(store: Store, keys: Iterable[str]) -> None:
    """Remove objects if they exist."""
    raw = store.open_objects()
    for key in keys:
        with contextlib.suppress(FileNotFoundError):
            raw.delete(key)
