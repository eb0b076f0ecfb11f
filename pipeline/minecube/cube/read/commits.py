"""Detect writes to years or labels during a read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from minecube.cube.markers import PLACED_S, PLACING, marker_path, read_marker
from minecube.cube.packed import stamp_of
from minecube.cube.store import Store
from minecube.cube.template import LABELLING
from minecube.errors import CubeError


class Watch(Protocol):
    """A check for writes during a read of pixels."""

    def check(self, indices: Iterable[int]) -> None:
        """Raise CubeError if one of these years has changed since opening, or must not be read."""

    def need_absent(self, key: str) -> None:
        """Raise CubeError if an absent object should exist."""

    def __hash__(self) -> int:
        """Make watches hashable: they are values."""


@dataclass(frozen=True)
class Labels:
    """The labels of a site at the time of opening."""

    store: Store
    path: str
    """Path of the array."""
    unfinished: tuple[int, ...]
    """Indices of years with half-written labels."""
    sha256: str
    """Identity of the labels' state; empty for a site without labels."""
    stamp: Any
    """Stamp of the array's metadata. If it changes, the metadata is read: it may only have more
    years."""

    @classmethod
    def read(cls, store: Store, site_id: str, name: str) -> Labels:
        """Read the current state of the labels."""
        store = store.absolute()
        stamp = _stamp_at(store, f"{site_id}/{name}/zarr.json")
        with store.reading(site_id):
            group = store.open_site(site_id)
            years = [int(year) for year in group["year"][:]]
            attrs = group[name].attrs
            unfinished = tuple(years.index(year) for year in attrs.get(LABELLING, ()))
        return cls(store, f"{site_id}/{name}", unfinished, str(attrs.get("sha256", "")), stamp)

    def check(self, indices: Iterable[int]) -> None:
        """Raise CubeError if labels are half written, or were written after opening."""
        site_id = self.path.split("/")[0]
        if set(self.unfinished) & set(indices):
            raise CubeError(
                f"{self.store}: labels of {site_id} are being written, or a run was killed while "
                "it wrote them; wait, or run `minecube label` again"
            )
        if self.store.packed or _stamp_at(self.store, f"{self.path}/zarr.json") == self.stamp:
            return
        if self._read_sha256() != self.sha256:
            raise CubeError(
                f"{self.store}: labels of {site_id} were written while they were being read; open "
                "the cube again"
            )

    def _read_sha256(self) -> str:
        try:
            content = bytes(self.store.open_objects().get(f"{self.path}/zarr.json").bytes())
            return str(json.loads(content)["attributes"].get("sha256", ""))
        except (OSError, ValueError, KeyError) as error:
            raise CubeError(
                f"{self.store}: {self.path} cannot be read ({error}); run `minecube verify`"
            ) from error

    def need_absent(self, key: str) -> None:
        """Do nothing: labels of fill value only are not stored."""


@dataclass(frozen=True)
class Commits:
    """The markers of a site at the time of opening."""

    store: Store
    site_id: str
    years: tuple[int, ...]
    """Years by index on the first axis."""
    committed: tuple[int, ...]
    """Committed years."""
    stamps: tuple[Any, ...]
    """Stamp of each marker; None if missing, `PLACING` if the year is being put in place."""
    shards: frozenset[str] = field(repr=False)
    """Shards of committed years, relative to the site's group."""

    @classmethod
    def read(cls, store: Store, site_id: str) -> Commits:
        """Read the current markers; raises CubeError if the site is missing."""
        store = store.absolute()
        with store.reading(site_id):
            years = tuple(int(year) for year in store.open_site(site_id)["year"][:])
        stamps = []
        committed = []
        shards: set[str] = set()
        for year in years:
            stamp, marker = _stamped_marker(store, site_id, year)
            if marker is not None and PLACING in marker:
                # The year may have pixels of two builds, so it is not read.
                stamp = PLACING
            elif marker is not None:
                committed.append(year)
                objects = marker.get("checksums", ())
                shards.update(key for key in objects if not key.startswith("builds/"))
            stamps.append(stamp)
        return cls(store, site_id, years, tuple(committed), tuple(stamps), frozenset(shards))

    def check(self, indices: Iterable[int]) -> None:
        """Raise CubeError if one of these years was committed or withdrawn since opening."""
        if self.store.packed:
            return  # a packed store never changes
        for index in indices:
            if index >= len(self.years):
                continue
            year = self.years[index]
            if _stamp_at(self.store, _marker_key(self.site_id, year)) != self.stamps[index]:
                raise CubeError(
                    f"{self.store}: {self.site_id} {year} was built again while it was being read; "
                    "open the cube again"
                )

    def need_absent(self, key: str) -> None:
        """Raise CubeError if an absent object was committed. `key` is relative to the store."""
        name = key.removeprefix(f"{self.site_id}/")
        if name in self.shards:
            self.check([int(name.split("/")[2])])
            raise CubeError(
                f"{self.store}: {key} is missing although it was committed; run `minecube verify`"
            )


def _marker_key(site_id: str, year: int) -> str:
    return f"{marker_path(site_id, year)}/zarr.json"


def _stamped_marker(store: Store, site_id: str, year: int) -> tuple[Any, dict[str, Any] | None]:
    """Return a marker and its stamp, from the same moment."""
    key = _marker_key(site_id, year)
    while True:
        stamp = _stamp_at(store, key)
        marker = read_marker(store, site_id, year, wait_s=PLACED_S)
        if stamp == _stamp_at(store, key):
            return stamp, marker


def _stamp_at(store: Store, key: str) -> Any:
    """Return the stamp of an object; None if the object is missing."""
    try:
        if store.path is None:
            return store.open_objects().head(key)["e_tag"]
        return stamp_of(os.stat(f"{store.path}/{key}"))  # noqa: PTH116  called at every read
    except (FileNotFoundError, NotADirectoryError):  # the latter in a packed store
        return None
