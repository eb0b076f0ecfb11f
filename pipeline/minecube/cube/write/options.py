"""Options of a build of a site-year."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class Account(Protocol):
    """Read counts of a composite, complete after its computation (`reader.Ledger`)."""

    def totals(self) -> Mapping[str, float]:
        """Return planned, lost, completeness and others."""

    def lost(self) -> Sequence[str]:
        """Return one line per lost read."""

    def to_parquet(self) -> bytes:
        """Return all counts as the bytes of a Parquet file."""


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Options of `write_year`."""

    reads: Account | None = None
    """Counts of the reads of this computation."""
    before: bytes | None = None
    """The starting counts of `reads` (`read_initial_counts`). Staged blocks with other counts are made
    again."""
    completeness: float = 1.0
    """Minimum share of the planned reads for a commit."""
    overwrite: bool = False
    """Replace another committed build of the year."""
    scheduler: str | None = None
    """Name of the Dask scheduler; default: the active one."""
    workers: int = 4
    """Blocks computed at a time."""
    stopped: Callable[[], bool] = lambda: False
    """Called between blocks. After True, the year can be resumed later."""
    finished: Callable[[], Mapping[str, Any]] = dict
    """Called after the last block. Returns further entries of the provenance, such as the time
    taken."""


DEFAULT = BuildOptions()
