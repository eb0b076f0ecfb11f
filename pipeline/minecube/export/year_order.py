"""Put the years of a release in ascending order.

A store keeps years in the order in which they were added, because the keys of its shards contain
their index. A release is opened by other tools. There, a slice of years and a difference between
neighbours need an ascending axis. If years were added out of order, the shards of a release
therefore have other keys than those of the store.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import numpy as np
import zarr
from zarr.core.buffer import default_buffer_prototype

_COORDINATE = "/year/zarr.json"
_SHARD = re.compile(r"((.+)/[^/]+/c)/(\d+)/(\d+/.+)")
"""Array, group, index and rest of the key of a shard. Chunks of coordinates are shorter."""


class Years(dict[str, list[int]]):
    """Years of a store or release by index, of each group with the coordinate `year`.

    A group is given by its path. The year 0 is room without a name.
    """

    @classmethod
    def read(cls, root: zarr.Group, keys: Collection[str]) -> Years:
        """Read the years of the groups with these keys."""
        groups = [key.removesuffix(_COORDINATE) for key in keys if key.endswith(_COORDINATE)]
        return cls({group: np.asarray(root[f"{group}/year"]).tolist() for group in groups})

    def sort(self) -> Years:
        """Return the same years in ascending order, those without a name last."""
        return Years(
            {
                group: sorted(years, key=lambda year: (year == 0, year))
                for group, years in self.items()
            }
        )

    def find_moved(self, other: Years) -> list[str]:
        """List the groups in which an index is another year in the other release."""
        moved = []
        for group in set(self) & set(other):
            pairs = zip(self[group], other[group], strict=False)
            if any(year != other_year for year, other_year in pairs):
                moved.append(group)
        return moved

    def name_object(self, key: str) -> str | None:
        """Replace the index in a shard's key by its year; None if there is no such year.

        Other keys are returned unchanged.
        """
        match = _SHARD.fullmatch(key)
        if match is None or match[2] not in self:
            return key
        years = self[match[2]]
        index = int(match[3])
        if index >= len(years):
            return None
        return f"{match[1]}/{years[index]}/{match[4]}"

    def find_object(self, name: str) -> str | None:
        """Return the key of an object with this name; None if its year is missing."""
        match = _SHARD.fullmatch(name)
        if match is None or match[2] not in self:
            return name
        years = self[match[2]]
        year = int(match[3])
        if year not in years:
            return None
        return f"{match[1]}/{years.index(year)}/{match[4]}"

    def year_of(self, name: str) -> str:
        """Return the year in the name of a shard; "all" for other objects."""
        match = _SHARD.fullmatch(name)
        if match is None or match[2] not in self:
            return "all"
        return match[3]


def encode_years(years: list[int], metadata: bytes) -> dict[str, bytes]:
    """Encode years as chunks of their coordinate, by key. `metadata` is its `zarr.json`."""
    memory: dict[str, Any] = {"zarr.json": default_buffer_prototype().buffer.from_bytes(metadata)}
    zarr.open_array(zarr.storage.MemoryStore(memory), mode="r+")[:] = np.array(years)
    return {key: value.to_bytes() for key, value in memory.items() if key != "zarr.json"}
