"""What the checks of a site know, and their common helpers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import zarr
from odc.geo.geobox import GeoBox
from zarr.core.buffer import default_buffer_prototype

from minecube.cube.listing import parse_json, read_object
from minecube.cube.verify.findings import UNFINISHED, Finding


@dataclass(frozen=True, order=True)
class Place:
    """Place of a shard in a variable."""

    index: int
    """Index of the year."""
    row: int
    column: int


@dataclass
class SiteState:
    """One stored site. Each check adds what later checks need."""

    raw: Any
    """Stored objects, as from `Store.open_objects`."""
    name: str
    files: Mapping[str, int]
    """Object, relative to the site's group -> bytes."""
    judged: dict[str, Any] = field(default_factory=dict)
    """Metadata of years, labels and maps -> its content when read, to detect later changes."""
    checksums: dict[str, list[Any]] = field(default_factory=dict)
    """Object -> size and SHA-256 as written, from all intact lists."""

    # From the group
    description: Mapping[str, Any] = field(default_factory=dict)
    """The group's attribute `minecube`."""
    grid: GeoBox | None = None
    incomplete_reads: Mapping[str, float] = field(default_factory=dict)
    """`incomplete_reads` of the group."""
    built: set[str] = field(default_factory=lambda: {"reflectance", "clear_count", "quality"})
    """Variables written by builds. The others are labels."""
    metadata: dict[str, bytes] = field(default_factory=dict)
    """Array -> its `zarr.json`."""
    expected: Mapping[str, Any] = field(default_factory=dict)
    """Array -> its `zarr.json`, made again from the template."""
    years: list[int] = field(default_factory=list)
    """Values of the coordinate."""

    # From markers, labels and predictions
    committed: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Committed year -> its provenance; empty if the marker is damaged."""
    unsure: set[int] = field(default_factory=set)
    """Committed years without checksums."""
    labelling: set[int] = field(default_factory=set)
    """Years with unfinished labels."""
    mapped: dict[str, dict[int, bool]] = field(default_factory=dict)
    """Prediction -> index on the first axis -> whether it is complete. Needs checksums."""

    def read(self, key: str) -> Any:
        """Read an object as `listing.read_object`. `key` is relative to the site's group."""
        return read_object(self.raw, f"{self.name}/{key}")

    def find(
        self, kind: str, subject: str, text: str, cure: str, year: int | None = None
    ) -> Finding:
        """Make a finding."""
        return Finding(site=self.name, year=year, kind=kind, what=subject, found=text, cure=cure)

    def find_unfinished(
        self, subject: str, text: str, cure: str, year: int | None = None, command: str = ""
    ) -> Finding:
        """Make a finding about remains of a run. `command` completes them (default: the cure)."""
        advice = f"run `minecube {command or cure}` again, unless it is still running"
        return self.find(UNFINISHED, subject, f"{text}; {advice}", cure, year)

    def check_empty_group(self, key: str) -> Iterator[Finding]:
        """Check the metadata of a group without attributes."""
        yield from check_empty_group(self.name, key, self.read(key))

    def year_at(self, index: int) -> int | None:
        """Return the year at an index; None beyond the last one."""
        return self.years[index] if index < len(self.years) else None

    def year_of(self, key: str) -> int | None:
        """Return the year of a variable's shard; None for other objects."""
        place = place_of(key)
        return None if place is None else self.year_at(place.index)

    def year_and_cure(self, key: str) -> tuple[int | None, str]:
        """Return the year and the cure of a faulty object."""
        folder, *parts = key.split("/")
        if folder == "predictions":
            return None, "predict"
        if folder == "builds":
            return int(parts[0]), "build"
        return self.year_of(key), self.cure_of(folder)

    def cure_of(self, variable: str) -> str:
        """Return the cure of a faulty variable."""
        return "build" if variable in self.built else "label"

    def values_of(self, name: str) -> Any:
        """Read a small array as a whole; None if it cannot be read."""
        contents = {
            path.removeprefix(f"{name}/"): self.read(path)
            for path in self.files
            if path.startswith(f"{name}/")
        }
        try:
            return open_array(contents)[...]
        except Exception:  # zarr may raise anything on damaged bytes: the caller reports it
            return None


def check_empty_group(site: str, key: str, content: Any) -> Iterator[Finding]:
    """Check the metadata of a group without attributes. `site` is empty for the store itself."""
    if parse_json(content) != {"attributes": {}, "zarr_format": 3, "node_type": "group"}:
        yield Finding(
            site=site,
            year=None,
            kind="missing" if content is None else "damaged",
            what=key,
            found="expected an empty Zarr group",
            cure="group",
        )


def place_of(key: str) -> Place | None:
    """Return the place of a variable's shard; None for other objects."""
    _, *parts = key.split("/")
    if parts[:1] != ["c"] or len(parts) < 4 or not all(part.isdigit() for part in parts[1:]):
        return None
    return Place(int(parts[1]), int(parts[-2]), int(parts[-1]))


def open_array(contents: Mapping[str, Any]) -> zarr.Array:
    """Open an array with these objects."""
    buffer = default_buffer_prototype().buffer
    memory = {
        path: buffer.from_bytes(content)
        for path, content in contents.items()
        if isinstance(content, bytes)
    }
    return zarr.open_array(zarr.storage.MemoryStore(memory), mode="r")
