"""What the event logs of a store tell about each unit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd

from minecube.cube.events import Events
from minecube.jobs.runs.units import Unit

COLUMNS = ["event", "time", "step", "site", "year", "state", "error_class", "message"]
COLUMNS += ["seconds", "peak_mb", "bytes", "requests", "worker"]
"""Columns of events that tell the history of units."""
KEYS = ["step", "site", "year"]


@dataclass(frozen=True)
class History:
    """Attempts at units, and how the last one ended."""

    units: pd.DataFrame
    """One row per unit, by `KEYS`: the columns of its last end, and these.

    `attempts`, `running`, `interrupted`, `memory_failures`: attempts that lacked memory,
    `last_time`: time of the last event.
    """

    @classmethod
    def from_events(cls, events: Events) -> History:
        """Sum up events.

        A unit is running if its last event is a start by a living worker. If that worker is dead,
        or has gone on to another unit, the attempt was interrupted.
        """
        newest_of_workers = events.table.drop_duplicates("worker", keep="last").index
        table = _drop_busy(events.table[COLUMNS])
        # Numbers of units take a tenth of the memory of their names.
        numbers = table.groupby(KEYS, observed=True, sort=False).ngroup()
        table = table.assign(unit=numbers)
        is_end = table["event"] == "end"
        lacked = is_end & (table["error_class"] == "memory")
        last = table.drop_duplicates("unit", keep="last")
        is_newest = last.index.isin(newest_of_workers)
        last = last.set_index("unit")
        ends = table[is_end].drop_duplicates("unit", keep="last").set_index("unit")
        units = ends.drop(columns=["event", *KEYS]).reindex(last.index)
        repeated = units.select_dtypes("category").columns
        units = units.astype(dict.fromkeys(repeated, object))
        open_ = last["event"] == "start"
        works = last["worker"].isin(events.alive) & is_newest
        units["attempts"] = numbers[~is_end].value_counts().reindex(units.index, fill_value=0)
        units["running"] = open_ & works
        units["interrupted"] = open_ & ~works
        units["memory_failures"] = numbers[lacked].value_counts().reindex(units.index, fill_value=0)
        units["last_time"] = last["time"]
        names = last[KEYS].astype({"step": object, "site": object})
        return cls(units.set_index(pd.MultiIndex.from_frame(names)).sort_index())

    def count_attempts(self, unit: Unit) -> int:
        """Count the attempts at a unit, the one in work included."""
        return int(self._value(unit, "attempts", 0))

    def has_failed(self, site: str, year: int) -> bool:
        """Whether the last search or build of a site-year failed."""
        return any(
            self._value(Unit(step, site, year), "state") == "failed" for step in ("search", "build")
        )

    def has_failed_step(self, step: str, site: str) -> bool:
        """Whether the last attempt at a step of a site failed."""
        return bool(self._value(Unit(step, site), "state") == "failed")

    def has_failure(self, unit: Unit, message: str) -> bool:
        """Whether the last attempt at a unit failed with this message."""
        is_failed = self._value(unit, "state") == "failed"
        return is_failed and bool(self._value(unit, "message") == message)

    def failures(self) -> Iterator[tuple[Unit, Any]]:
        """Yield the units whose last attempt failed or was interrupted, with their rows."""
        ended_badly = (self.units["state"] == "failed") | self.units["interrupted"]
        failed = self.units[ended_badly & ~self.units["running"]]
        for (step, site, year), row in zip(failed.index, failed.itertuples(), strict=True):
            yield Unit(step, site, int(year)), row

    def _value(self, unit: Unit, column: str, missing: Any = None) -> Any:
        key = (unit.step, unit.site, unit.year)
        if key not in self.units.index:
            return missing
        return self.units.loc[key, column]


def _drop_busy(table: pd.DataFrame) -> pd.DataFrame:
    """Leave out attempts that found another run at work. That run logs the unit."""
    busy = table["state"] == "busy"
    if not busy.any():
        return table
    # A worker logs one unit at a time: its event before a busy end is the start of the attempt.
    begun = busy.groupby(table["worker"], observed=True).shift(-1, fill_value=False)
    return table[~busy & ~begun]
