"""Look up the files, notes and seals of a dataset: each when asked, or in listings of folders."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minecube import cube
from minecube.catalog import Site, Source
from minecube.cube.read.summaries import read_seal
from minecube.jobs.runs.finished import folder_of_notes, read_finished
from minecube.jobs.runs.units import SITE_STEPS
from minecube.jobs.scene_lists import hash_list
from minecube.places import Place, Url, list_files, time_of_change

READERS = 32
"""Simultaneous requests to an object store."""
_SITES_PER_PART = 1000
"""Sites of a part of a listing. The parts are listed at the same time."""
_KEPT = 4096
"""Notes and seals that are kept, because several steps of a site compare them."""


class Lookup:
    """Looks up each file, note and seal when it is asked for."""

    def time_of_change(self, place: Place) -> float | None:
        """Return the time of a file's last change in seconds since 1970; None if it is missing."""
        return time_of_change(place)

    def exists(self, place: Place) -> bool:
        """Whether a file exists."""
        return place.exists()

    def list_files(self, folder: Place) -> list[str]:
        """List the files below a folder, relative to it, sorted; empty for a missing folder."""
        return list_files(folder)

    def hash_list(
        self, site: Site, year: int, sources: Sequence[Source], folder: Place
    ) -> str | None:
        """Hash a scene list as `scene_lists.hash_list` does."""
        return hash_list(site, year, sources, folder)

    def read_note(self, store: cube.Store, step: str, name: str) -> dict[str, Any]:
        """Read the note of a finished step as `read_finished` does."""
        return read_finished(store, step, name)

    def read_seal(self, store: cube.Store, path: str) -> str:
        """Read the seal of an array or group as `summaries.read_seal` does."""
        return read_seal(store, path)

    def forget(self) -> None:
        """Forget notes and seals that were read, but no listing."""


@dataclass
class _Listing:
    """Contents of a folder."""

    times: dict[str, float] = field(default_factory=dict)
    """Times of the files right in it."""
    below: dict[str, list[str]] = field(default_factory=dict)
    """Files below each of its folders."""


class ListedLookup(Lookup):
    """Lists each folder of an object store once, and keeps notes and seals.

    So a site costs no request to find out which of its files exist. The answers are those at the
    time of the listing. Files on a disk are looked up each time.
    """

    def __init__(self, sites: Iterable[str]) -> None:
        self._sites = sorted(sites)
        self._lock = threading.RLock()
        self._hashes: dict[tuple[str, int], str | None] = {}
        self._list = functools.cache(self._list_folder)
        self._read_note = functools.lru_cache(_KEPT)(read_finished)
        self._read_seal = functools.lru_cache(_KEPT)(read_seal)

    def time_of_change(self, place: Place) -> float | None:
        """Return the time in the listing of the file's folder."""
        if isinstance(place, Path):
            return time_of_change(place)
        return self._open(place.parent).times.get(place.name)

    def exists(self, place: Place) -> bool:
        """Whether the file is in the listing of its folder."""
        if isinstance(place, Path):
            return place.exists()
        return place.name in self._open(place.parent).times

    def list_files(self, folder: Place) -> list[str]:
        """Return the part of the parent's listing that is below a folder."""
        if isinstance(folder, Path):
            return list_files(folder)
        return self._open(folder.parent).below.get(folder.name, [])

    def hash_list(
        self, site: Site, year: int, sources: Sequence[Source], folder: Place
    ) -> str | None:
        """Hash a scene list once, though audits and builds compare it."""
        key = (site.id, year)
        known = self._hashes.get(key)
        if known is None:
            known = hash_list(site, year, sources, folder)
            if len(self._hashes) >= _KEPT:
                self._hashes.clear()
            self._hashes[key] = known
        return known

    def read_note(self, store: cube.Store, step: str, name: str) -> dict[str, Any]:
        """Read a note. One that is not in the listing costs no request."""
        notes = folder_of_notes(store, step)
        if step in SITE_STEPS:
            return self._read_note(store, step, name) if self.exists(notes / f"{name}.json") else {}
        with self._lock:  # all sites ask for the same note
            return self._read_note(store, step, name)

    def read_seal(self, store: cube.Store, path: str) -> str:
        """Read a seal once, though several steps compare it."""
        return self._read_seal(store, path)

    def forget(self) -> None:
        """Forget notes and seals that were read, but no listing."""
        self._read_note.cache_clear()
        self._read_seal.cache_clear()

    def _open(self, folder: Url) -> _Listing:
        with self._lock:  # others need the same listing
            return self._list(folder)

    def _list_folder(self, folder: Url) -> _Listing:
        """List a folder in parts: files of sites are in the order of the sites' names."""
        prefix = _prefix_of(folder)
        bounds = [f"{prefix}{site}" for site in self._sites[_SITES_PER_PART::_SITES_PER_PART]]
        if not folder.text.startswith("s3://"):
            bounds = []  # other stores may list a folder from its beginning for each part
        listing = _Listing()
        with ThreadPoolExecutor(READERS) as pool:
            list_part = functools.partial(_list_part, folder)
            for part in pool.map(list_part, [None, *bounds], [*bounds, None]):
                for name, time in part:
                    first, _, rest = name.partition("/")
                    if rest:
                        listing.below.setdefault(first, []).append(rest)
                    else:
                        listing.times[first] = time
        return listing


def _prefix_of(folder: Url) -> str:
    """Return what the keys below a folder begin with: nothing in a whole bucket."""
    return f"{folder.key}/" if folder.key else ""


def _list_part(folder: Url, after: str | None, last: str | None) -> list[tuple[str, float]]:
    """List the files of a folder whose keys are between two others, with their times."""
    found: list[tuple[str, float]] = []
    for batch in folder.client().list(folder.key, offset=after, chunk_size=1000):
        for entry in batch:
            if last is not None and entry["path"] > last:
                return found
            # Whole seconds, as in the answer about a single object.
            name = entry["path"].removeprefix(_prefix_of(folder))
            found.append((name, float(int(entry["last_modified"].timestamp()))))
    return found
