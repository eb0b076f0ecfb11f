"""Notice when a year is committed or withdrawn while it is being read."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from minecube.cube.builds import PLACED_S, PLACING, marker_of
from minecube.cube.packed import is_packed, stamp_of
from minecube.cube.store import folder_of, objects, reading, site_group
from minecube.errors import CubeError


@dataclass(frozen=True)
class Commits:
    """The markers of a site as they were when it was opened."""

    store: str
    site_id: str
    years: tuple[int, ...]
    """By index on the first axis."""
    committed: tuple[int, ...]
    """Years that are committed."""
    stamps: tuple[Any, ...]
    """What tells each marker from another one of its name; None if there is none."""
    shards: frozenset[str] = field(repr=False)
    """Shards of committed years, relative to the site's group."""
    folder: str | None
    """Folder of the markers; None in an object store."""

    @classmethod
    def of(cls, store: str, site_id: str) -> Commits:
        """The markers as they are now; raises CubeError if the site is not there."""
        with reading(store, site_id):
            years = tuple(int(y) for y in site_group(store, site_id, "r")["year"][:])
        folder = folder_of(store)
        markers = None if folder is None else f"{folder}/{site_id}/builds"
        stamps = []
        committed = []
        shards: set[str] = set()
        for year in years:
            stamp, marker = _stamped(store, site_id, year, markers)
            stamps.append(stamp)
            if marker is not None and PLACING not in marker:
                committed.append(year)
                shards.update(key for key in marker.get("checksums", ()) if not key.startswith("builds/"))
        return cls(store, site_id, years, tuple(committed), tuple(stamps), frozenset(shards), markers)

    def check(self, indices: Iterable[int]) -> None:
        """Raise CubeError if one of these years was committed or withdrawn since the site was opened."""
        if is_packed(self.store):
            return  # it is never written
        for index in indices:
            if index < len(self.years) and self._stamp(self.years[index]) != self.stamps[index]:
                raise CubeError(
                    f"{self.store}: {self.site_id} {self.years[index]} was built again while it was being read; open the cube "
                    "again"
                )

    def _stamp(self, year: int) -> Any:
        return _stamp(self.store, self.site_id, year, self.folder)

    def need_absent(self, key: str) -> None:
        """Raise CubeError if an object that is not there was committed; `key` is that of the store."""
        name = key.removeprefix(f"{self.site_id}/")
        if name in self.shards:
            self.check([int(name.split("/")[2])])
            raise CubeError(f"{self.store}: {key} is missing although it was committed; run `minecube verify`")


def _stamped(store: str, site_id: str, year: int, markers: str | None) -> tuple[Any, dict[str, Any] | None]:
    """The stamp of a marker, and the marker that has it."""
    while True:
        before = _stamp(store, site_id, year, markers)
        marker = marker_of(store, site_id, year, wait_s=PLACED_S)
        if before == _stamp(store, site_id, year, markers):
            return before, marker


def _stamp(store: str, site_id: str, year: int, markers: str | None) -> Any:
    """What tells a marker from another one of its name; None if there is none."""
    try:
        if markers is None:
            return objects(store).head(f"{site_id}/builds/{year}/zarr.json")["e_tag"]
        return stamp_of(os.stat(f"{markers}/{year}/zarr.json"))  # noqa: PTH116  asked for at every read
    except (FileNotFoundError, NotADirectoryError):  # the latter in a packed store
        return None
