"""What the event logs of a store tell about each unit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

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
        table = events.table
        is_newest = ~table["worker"].duplicated(keep="last").to_numpy()
        rows = np.flatnonzero(~_find_busy(table))
        # Numbers of units take a tenth of the memory of their names. 0: without a name.
        numbers = table[KEYS].iloc[rows].groupby(KEYS, observed=True, sort=False).ngroup()
        unit = numbers.to_numpy() + 1
        is_end = (table["event"] == "end").to_numpy()[rows]
        lacked = is_end & (table["error_class"] == "memory").to_numpy()[rows]
        size = int(unit.max(initial=0)) + 1
        last = np.full(size, -1)
        last[unit] = rows  # of repeated units, the last row stays
        last_end = np.full(size, -1)
        last_end[unit[is_end]] = rows[is_end]
        names = table[KEYS].iloc[last[last >= 0]].astype({"step": object, "site": object})
        index = pd.MultiIndex.from_frame(names)
        by_name = pd.Series(np.flatnonzero(last >= 0), index=index).sort_index()
        last = last[by_name]
        last_end = last_end[by_name]
        is_open = (table["event"] == "start").to_numpy()[last]
        works = table["worker"].isin(events.alive).to_numpy()[last] & is_newest[last]
        of_end = [name for name in COLUMNS if name not in ("event", *KEYS)]
        columns = {name: take_rows(table[name], last_end) for name in of_end} | {
            "attempts": np.bincount(unit[~is_end], minlength=size)[by_name],
            "running": is_open & works,
            "interrupted": is_open & ~works,
            "memory_failures": np.bincount(unit[lacked], minlength=size)[by_name],
            "last_time": take_rows(table["time"], last),
        }
        return cls(pd.DataFrame(columns, index=by_name.index, copy=False))

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


def take_rows(column: pd.Series, rows: NDArray[np.intp]) -> Any:
    """Return the values of a column at these positions. Those at -1 are missing."""
    return column.reset_index(drop=True).reindex(rows).array


def _find_busy(table: pd.DataFrame) -> NDArray[np.bool_]:
    """Find attempts that found another run at work. That run logs the unit."""
    busy = table["state"] == "busy"
    if not busy.any():
        return busy.to_numpy()
    # A worker logs one unit at a time: its event before a busy end is the start of the attempt.
    begun = busy.groupby(table["worker"], observed=True).shift(-1, fill_value=False)
    return (busy | begun).to_numpy(dtype=bool)
