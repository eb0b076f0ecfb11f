"""Options of a run, and what it has done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from minecube.jobs.runs.units import Shard, Unit
from minecube.jobs.runs.worker import Result

Progress = Callable[[Unit, Result, int], None]
"""Called with a unit that ends, its result, and the number of all units."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Which units to run, and how."""

    only: tuple[str, ...] | None = None
    """Steps; None: all of the dataset."""
    sites: str | tuple[str, ...] = "*"
    """Names of sites of the dataset, comma-separated, * allowed; or a tuple of exact names."""
    years: tuple[int, ...] | None = None
    """Years of the dataset; None: all."""
    shard: Shard | None = None
    """Part of all units, for runs without a coordinator. Tables of all sites are then not made."""
    overwrite: bool = False
    """Whether to build site-years of other inputs again, and to replace maps of other models."""
    rebuild: bool = False
    """With `overwrite`: whether to build site-years of other versions of minecube again, too."""
    fractions: Mapping[Unit, float] = field(default_factory=dict)
    """Share of the usual memory of a block, for units that lacked memory."""
    chosen: frozenset[Unit] | None = None
    """Units to run; None: all unfinished ones. Steps of a site also run if they come after a chosen
    unit that succeeds."""


@dataclass
class Summary:
    """What a run has done."""

    results: dict[Unit, Result] = field(default_factory=dict)
    """The last result of each unit that was tried."""
    kept: Counter[str] = field(default_factory=Counter)
    """Step -> units that were finished before."""
    blocked: Counter[str] = field(default_factory=Counter)
    """Step -> units that lack an earlier step."""
    waiting: Counter[str] = field(default_factory=Counter)
    """Step -> sites whose years other shards have not built yet."""
    stale: dict[Unit, str] = field(default_factory=dict)
    """Site-years that other inputs have made, with the reason. They are left as they are."""
    unjoined: Mapping[str, str] = field(default_factory=dict)
    """Step whose results could not be joined -> reason."""
    seconds: float = 0.0

    @property
    def failures(self) -> dict[Unit, Result]:
        """Units that failed."""
        return {unit: result for unit, result in self.results.items() if not result.is_good}

    @property
    def exit_code(self) -> int:
        """1 if a unit failed or lacks an earlier step, or results are not joined; else 0."""
        return int(bool(self.failures or self.blocked or self.unjoined))

    def count(self, step: str) -> int:
        """Count the units of a step that this run has finished."""
        return sum(unit.step == step and result.is_good for unit, result in self.results.items())
