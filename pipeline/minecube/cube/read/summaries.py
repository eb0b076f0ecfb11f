"""Read the markers of many site-years fast, for `status` and for runs of whole datasets.

A marker is read as plain JSON, without Zarr.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from itertools import chain, islice
from typing import Any

import msgspec

from minecube.cube.markers import completeness_of, marker_path
from minecube.cube.store import Store
from minecube.errors import CubeError
from minecube.grid import LARGEST_PX

_READERS = 32  # simultaneous requests to an object store
_BATCH = 10_000
_MOST_LOST = 10**9  # more are damage
_PART_BYTES = 1 << 16  # more than most markers have


@dataclass(frozen=True, slots=True)
class Commit:
    """A committed site-year, from its marker."""

    site: str
    year: int
    build: str
    sha256: str
    """Hash of the marker. It identifies pixels, origin and decisions."""
    committed: str
    """Time, ISO 8601."""
    version: str
    """Version of minecube."""
    recipe: Mapping[str, Any]
    grid: tuple[Any, ...]
    """CRS, transform and shape, as in `provenance.describe_grid`."""
    lost: int
    """Number of lost reads."""
    completeness: float
    """Share of successful reads."""
    offset_rule: str | None
    """How offsets in conflict with pixels were treated; None if there was no conflict."""
    inputs: str = ""
    """Hash of what the build was made from, as from `hash_inputs`; empty if it is not known."""

    @property
    def pixels(self) -> int:
        """Number of pixels of the grid."""
        height, width = self.grid[2]
        return int(height * width)


_EMPTY = msgspec.Raw(b"{}")


class _Attributes(msgspec.Struct):
    """The attributes of a marker that a `Commit` needs.

    The parser skips all others, such as scenes: this takes a third of the time. It leaves recipe
    and grid as text, since most markers share them.
    """

    placing: Any = None
    build_id: str | None = None
    sha256: str = ""
    committed: str = ""
    version: str = ""
    recipe: msgspec.Raw = _EMPTY
    grid: msgspec.Raw = _EMPTY
    reads: dict[str, Any] = {}
    offset_conflicts: Any = None
    on_offset_conflict: str | None = None
    inputs: str | None = None


class _Grid(msgspec.Struct):
    crs: str
    transform: list[float]
    shape: tuple[int, int]


class _Marker(msgspec.Struct):
    attributes: _Attributes


_DECODER = msgspec.json.Decoder(_Marker)


def grid_key(description: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return a grid's entry in a provenance as a tuple, as in `Commit.grid`."""
    transform = tuple(map(float, description["transform"]))
    return description["crs"], transform, tuple(description["shape"])


def read_commits(
    store: Store,
    site_years: Iterable[tuple[str, int]],
    damaged: dict[tuple[str, int], CubeError] | None = None,
) -> dict[tuple[str, int], Commit]:
    """Read the markers of these site-years. Uncommitted site-years are missing from the result.

    A year whose objects are being put in place is missing, too. `damaged` collects the errors of
    damaged markers. Without it, the first one is raised.

    Raises:
        CubeError: a marker is damaged, or the store cannot be read.
    """
    commits = iterate_commits(store, site_years, damaged)
    return {(commit.site, commit.year): commit for commit in commits}


def iterate_commits(
    store: Store,
    site_years: Iterable[tuple[str, int]],
    damaged: dict[tuple[str, int], CubeError] | None = None,
) -> Iterator[Commit]:
    """Yield what `read_commits` returns, in the order of the site-years."""
    shared: dict[Any, Any] = {}
    for (site, year), content in _read_all(store, site_years):
        try:
            commit = _parse(store, site, year, content, shared)
        except CubeError as error:
            if damaged is None:
                raise
            damaged[site, year] = error
            continue
        if commit is not None:
            yield commit


def _read_all(
    store: Store, site_years: Iterable[tuple[str, int]]
) -> Iterator[tuple[tuple[str, int], bytes]]:
    if store.path is not None and not store.packed:
        for site, year in site_years:
            path = f"{store.path}/{marker_path(site, year)}/zarr.json"
            try:
                content = _read_file(path)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise CubeError(f"{path}: cannot be read ({error.strerror})") from error
            yield (site, year), content
        return
    objects = store.open_objects()

    def read(key: tuple[str, int]) -> tuple[tuple[str, int], bytes] | None:
        try:
            return key, bytes(objects.get(f"{marker_path(*key)}/zarr.json").bytes())
        except FileNotFoundError:
            return None

    waiting = iter(site_years)
    with store.reading("markers"), ThreadPoolExecutor(_READERS) as pool:
        while batch := list(islice(waiting, _BATCH)):
            yield from filter(None, pool.map(read, batch))


def _read_file(path: str) -> bytes:
    """Read a small file. `open` takes half as long again, since it asks for more than bytes."""
    number = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        content = b""
        while part := os.read(number, _PART_BYTES):  # one part, unless a disk gives less
            content += part
        return content
    finally:
        os.close(number)


def _parse(
    store: Store, site: str, year: int, content: bytes, shared: dict[Any, Any]
) -> Commit | None:
    """Parse a marker; None if the year is not committed.

    `shared` has the value of each text of a recipe or grid.
    """
    try:
        content.decode()  # the parser does not look into the text that it skips
        marker = _DECODER.decode(content).attributes
        if marker.placing is not None or marker.build_id is None:
            return None
        datetime.fromisoformat(marker.committed)  # raises ValueError
        lost = int(marker.reads.get("lost", 0))
        grid = _parse_once(marker.grid, _parse_grid, shared)
        if not (marker.version and 0 <= lost <= _MOST_LOST):
            raise ValueError("expected a version and a number of lost reads")
        has_conflict = bool(marker.offset_conflicts)
        return Commit(
            site=site,
            year=year,
            build=marker.build_id,
            sha256=marker.sha256,
            committed=marker.committed,
            version=sys.intern(marker.version),
            recipe=_parse_once(marker.recipe, _parse_recipe, shared),
            grid=grid,
            lost=lost,
            completeness=completeness_of({"reads": marker.reads}),
            offset_rule=marker.on_offset_conflict if has_conflict else None,
            inputs=marker.inputs or "",
        )
    except (
        msgspec.MsgspecError,
        ValueError,
        KeyError,
        TypeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise CubeError(
            f"{store}: the marker of {site} {year} is damaged ({type(error).__name__}: {error}); "
            "run `minecube verify`"
        ) from error


def _parse_once(text: msgspec.Raw, parse: Callable[[bytes], Any], shared: dict[Any, Any]) -> Any:
    key = (parse, bytes(text))
    if key not in shared:
        shared[key] = parse(key[1])
    return shared[key]


def _parse_recipe(text: bytes) -> dict[str, Any]:
    recipe = msgspec.json.decode(text, type=dict[str, Any])
    if not isinstance(recipe["id"], str):
        raise ValueError("expected the name of a recipe")
    return recipe


def _parse_grid(text: bytes) -> tuple[Any, ...]:
    grid = msgspec.json.decode(text, type=_Grid)
    sizes_fit = all(0 < side <= LARGEST_PX for side in grid.shape)
    if len(grid.transform) != 6 or not sizes_fit:
        raise ValueError("expected the transform and two sizes of the grid")
    return grid.crs, tuple(grid.transform), grid.shape


def list_commits(store: Store, sites: Iterable[str]) -> dict[tuple[str, int], Commit]:
    """Read the markers of all committed years of these sites, as `read_commits` does."""
    return read_commits(store, list_site_years(store, sites))


def list_site_years(store: Store, sites: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Yield the site-years with a marker, which may be uncommitted."""
    return chain.from_iterable(_list_years(store, site) for site in sites)


def _list_years(store: Store, site: str) -> list[tuple[str, int]]:
    if store.path is not None and not store.packed:
        try:
            names = os.listdir(store.path / site / "builds")  # noqa: PTH208  for each site
        except (FileNotFoundError, NotADirectoryError):
            return []
    else:
        names = store.list_folders(f"{site}/builds")
    years = {int(name) for name in names if name.isdigit()}
    return [(site, year) for year in sorted(years)]


def read_seals(store: Store, paths: Iterable[str]) -> list[str]:
    """Return `read_seal` of each path. Reads several at a time from an object store."""
    if store.path is not None:
        return [read_seal(store, path) for path in paths]
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(partial(read_seal, store), paths))


def read_seal(store: Store, path: str) -> str:
    """Return the `sha256` attribute of a group or array; empty without one.

    Labels and predictions have one of all their shards' checksums.
    """
    key = f"{path}/zarr.json"
    try:
        if store.path is not None and not store.packed:
            content = (store.path / key).read_bytes()
        else:
            content = bytes(store.open_objects().get(key).bytes())
        return str(json.loads(content)["attributes"].get("sha256", ""))
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return ""
