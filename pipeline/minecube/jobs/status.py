"""Show the state of a dataset or a store: the job of `minecube status`.

The state comes from markers, scene lists, notes of finished steps and event logs. It is the same
while a run is going, after it was killed, and for a store that no run has made.
"""

from __future__ import annotations

import itertools
import os
import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray

from minecube import cube
from minecube.catalog import Dataset
from minecube.composite.plan import Terms
from minecube.cube.events import RUNS, Events, read_events
from minecube.cube.read.summaries import Commit, iterate_commits, list_site_years
from minecube.errors import CubeError, MinecubeError
from minecube.grid import area_of
from minecube.jobs.runs.history import COLUMNS, History, take_rows
from minecube.jobs.runs.inputs import Inputs, forget_inputs, load_inputs
from minecube.jobs.runs.lookups import READERS
from minecube.jobs.runs.site_steps import check_steps
from minecube.jobs.runs.states import StaleCheck
from minecube.jobs.runs.units import SITE_STEPS, list_steps

STATES = ("done", "gaps", "stale", "running", "failed", "interrupted", "to do")
"""done: committed from the present inputs. gaps: committed, but with lost reads. stale: committed
from other inputs. interrupted: its worker died. to do: not tried yet."""
_KM2_PER_PIXEL = 1e-4
_SPENT = ["step", "state", "time", "seconds", "bytes", "requests"]
_LAST = ["state", "error_class", "message", "seconds", "peak_mb", "bytes", "requests", "worker"]
_LAST += ["attempts", "running", "interrupted"]
"""Columns of the history that tell how a site-year ended last."""
_MADE_OF_BUILDS = ("predict", "tracks", "score", "export")
_BATCH = 10_000  # commits whose scene lists are compared at the same time
_MOST_CHECKED = 2000
"""Most sites whose steps are compared with their inputs and outputs; of more, with times."""
_RATE_WINDOW = timedelta(hours=1)


@dataclass(frozen=True)
class Status:
    """The state of all site-years and of the steps of all sites."""

    name: str
    """Name of the dataset or the store."""
    site_years: pd.DataFrame
    """One row per site-year, by site and year: state (`STATES`), why, error_class, attempts,
    seconds, peak_mb, mb, requests, lost, km2, version, worker and committed."""
    steps: pd.DataFrame
    """One row per site with a state per step: done, stale (older than a build of the site),
    running, failed, interrupted or empty."""
    step_failures: pd.DataFrame
    """One row per failed step of a site: site, step, error_class, attempts and why."""
    spent: Mapping[str, float]
    """Sums over all attempts that have ended: seconds, mb and requests. Interrupted attempts are
    missing, since they log no end."""
    per_hour: float
    """Site-years built per hour, lately; 0 if none is running."""
    cost: float | None
    """Of `spent`; None without prices."""
    currency: str = ""

    @property
    def counts(self) -> dict[str, int]:
        """Count the site-years of each state."""
        counts = self.site_years["state"].value_counts()
        return {state: int(counts.get(state, 0)) for state in STATES}

    @property
    def left(self) -> timedelta | None:
        """Time left at the present rate; None if nothing is running.

        Stale site-years count while one of them is built again.
        """
        if not self.per_hour:
            return None
        counts = self.counts
        waiting = counts["to do"] + counts["running"]
        running = self.site_years[self.site_years["state"] == "running"]
        if (running["committed"] != "").any():
            waiting += counts["stale"]
        return timedelta(hours=waiting / self.per_hour)

    @property
    def km2(self) -> float:
        """Area of all committed site-years."""
        return float(self.site_years["km2"].sum())


def read_status(dataset: Dataset) -> Status:
    """Read the state of a dataset.

    Raises:
        CatalogError: a name or file of the dataset is unknown or missing.
        CubeError: the store cannot be read.
    """
    forget_inputs()
    inputs = load_inputs(dataset).with_listings()
    keys = list(itertools.product(inputs.sites, dataset.years))
    damaged: dict[tuple[str, int], CubeError] = {}
    found = iterate_commits(inputs.store, keys, damaged)
    commits = _tabulate(_explain(found, inputs, damaged))
    steps = [step for step in list_steps(dataset) if step in SITE_STEPS]
    terms = Terms.load(Path(dataset.prices)) if dataset.prices else Terms()
    finished = None
    if len(inputs.sites) <= _MOST_CHECKED:
        finished = check_steps(inputs, steps)
    reader = _Reader(inputs.store, keys, commits, damaged, finished)
    return reader.read(dataset.id, steps, terms, read_events(inputs.store, COLUMNS))


def _explain(
    commits: Iterator[Commit], inputs: Inputs, damaged: dict[tuple[str, int], CubeError]
) -> Iterator[tuple[Commit, str]]:
    """Add to each commit why it is stale. Site-years that cannot be judged are damaged."""
    check = StaleCheck(inputs)

    def explain(commit: Commit) -> str:
        try:
            return check.explain(commit)
        except MinecubeError as error:  # the polygon of its site is gone, for example
            damaged[commit.site, commit.year] = CubeError(str(error))
            return ""

    if inputs.store.path is not None:
        for commit in commits:
            yield commit, explain(commit)
        return
    with ThreadPoolExecutor(READERS) as pool:  # a changed scene list is read
        while batch := list(itertools.islice(commits, _BATCH)):
            yield from zip(batch, pool.map(explain, batch), strict=True)


def read_store_status(store: cube.Store) -> Status:
    """Read the state of a store: its committed years, and those in its event logs.

    Raises:
        CubeError: the store cannot be read.
    """
    found = iterate_commits(store, list_site_years(store, cube.list_sites(store)))
    commits = _tabulate((commit, "") for commit in found)
    events = read_events(store, COLUMNS)
    tried = events.table[["site", "year"]].drop_duplicates().query("year > 0")
    keys = sorted({*commits.index, *tried.itertuples(index=False, name=None)})
    return _Reader(store, keys, commits, {}).read(str(store), SITE_STEPS, Terms(), events)


def _tabulate(commits: Iterable[tuple[Commit, str]]) -> pd.DataFrame:
    """Return commits by site and year: committed, version, lost, pixels and why they are stale.

    A `Commit` takes five times the memory of a row.
    """
    keys: list[tuple[str, int]] = []
    texts: dict[str, list[str]] = {"committed": [], "version": [], "stale": []}
    numbers = {"lost": array("q"), "pixels": array("q")}
    for commit, reason in commits:
        keys.append((commit.site, commit.year))
        texts["committed"].append(commit.committed)
        texts["version"].append(commit.version)
        texts["stale"].append(sys.intern(reason))
        numbers["lost"].append(commit.lost)
        numbers["pixels"].append(commit.pixels)
    index = pd.MultiIndex.from_tuples(keys, names=["site", "year"])
    columns = {name: np.array(values, dtype=object) for name, values in texts.items()}
    return pd.DataFrame({**columns, **{k: np.array(v) for k, v in numbers.items()}}, index=index)


@dataclass(frozen=True)
class _Reader:
    """Puts markers and events together."""

    store: cube.Store
    keys: Sequence[tuple[str, int]]
    commits: pd.DataFrame
    """As from `_tabulate`."""
    damaged: Mapping[tuple[str, int], CubeError]
    """Site-years with a damaged marker."""
    finished: Mapping[str, Mapping[str, bool]] | None = None
    """Step -> site -> whether it is finished; None: the times of notes and builds decide."""

    def read(self, name: str, steps: Iterable[str], terms: Terms, events: Events) -> Status:
        ends = events.table.loc[events.table["event"] == "end", _SPENT]
        spent = {
            "seconds": float(ends["seconds"].sum()),
            "mb": float(ends["bytes"].sum()) / 1e6,
            "requests": float(ends["requests"].sum()),
        }
        per_hour = _measure_rate(ends)
        del ends
        units = History.from_events(events).units
        del events
        site_years = self._tabulate_site_years(units)
        states = self._tabulate_steps(units, list(steps))
        return Status(
            name=name,
            site_years=site_years,
            steps=states,
            step_failures=_list_step_failures(units, states),
            spent=spent,
            per_hour=per_hour if (site_years["state"] == "running").any() else 0.0,
            cost=_compute_cost(spent, terms),
            currency=terms.currency,
        )

    def _tabulate_site_years(self, units: pd.DataFrame) -> pd.DataFrame:
        index = pd.MultiIndex.from_tuples(self.keys, names=["site", "year"])
        last = _take_columns(units, _LAST, _find_last(units, index))
        rows = self.commits.index.get_indexer(index)
        commits = _take_columns(self.commits, self.commits.columns, rows)
        committed = rows >= 0
        lost = commits["lost"].fillna(0).astype(np.int64).to_numpy()
        reason = commits["stale"].fillna("").to_numpy()
        broken = np.array([key in self.damaged for key in self.keys], dtype=bool)
        failed = (last["state"] == "failed").to_numpy() | broken
        conditions = {
            "running": last["running"].eq(True).to_numpy(),
            "failed": broken,
            "stale": reason != "",
            "gaps": committed & (lost > 0),
            "done": committed,
            "interrupted": last["interrupted"].eq(True).to_numpy(),
        }
        choices = np.array([*conditions, "failed", "to do"], dtype=object)
        state = choices[np.select([*conditions.values(), failed], range(7), 7)]
        why = last["message"].fillna("").where(~committed | failed, "").to_numpy(dtype=object)
        for position in np.flatnonzero(reason != ""):
            why[position] = "; ".join(filter(None, [reason[position], why[position]]))
        for position in np.flatnonzero(state == "gaps"):
            why[position] = f"{lost[position]} reads were lost"
        for position in np.flatnonzero(broken):
            why[position] = str(self.damaged[self.keys[int(position)]])
        error_class = last["error_class"].astype(object).fillna("").where(failed, "")
        columns = {
            "state": state,
            "why": why,
            "error_class": error_class.to_numpy(),
            "attempts": last["attempts"].fillna(0).astype(int).to_numpy(),
            "seconds": last["seconds"].to_numpy(),
            "peak_mb": last["peak_mb"].to_numpy(),
            "mb": (last["bytes"] / 1e6).round(3).to_numpy(),
            "requests": last["requests"].to_numpy(),
            "lost": lost,
            "km2": commits["pixels"].fillna(0).to_numpy() * _KM2_PER_PIXEL,
            "version": commits["version"].fillna("").to_numpy(),
            "worker": last["worker"].astype(object).fillna("").to_numpy(),
            "committed": commits["committed"].fillna("").to_numpy(),
        }
        return pd.DataFrame(columns, index=index, copy=False)

    def _tabulate_steps(self, units: pd.DataFrame, steps: Sequence[str]) -> pd.DataFrame:
        sites = list(dict.fromkeys(site for site, _ in self.keys))
        built = {} if self.finished is not None else self._list_times()
        columns = {}
        for step in steps:
            finished = _list_finished(self.store, step)
            states = []
            for site in sites:
                is_current = step not in _MADE_OF_BUILDS or (
                    finished.get(site, 0.0) >= built.get(site, 0.0)
                )
                if self.finished is not None:
                    is_current = self.finished[step][site]
                state = "done" if is_current else "stale"
                states.append(state if site in finished else "")
            tried = _choose_step(units, step)
            names = tried.index.get_level_values("site")
            column = pd.Series(states, index=sites, dtype=object)
            # A failure for inputs that are mended by now has no later event.
            is_open = column.ne("done") | (self.finished is None)
            column[is_open & column.index.isin(names[tried["state"] == "failed"])] = "failed"
            column[is_open & column.index.isin(names[tried["interrupted"]])] = "interrupted"
            column[column.index.isin(names[tried["running"]])] = "running"
            columns[step] = column
        return pd.DataFrame(columns, index=pd.Index(sites, name="site"))

    def _list_times(self) -> dict[str, float]:
        """Map each site to the time of its last commit."""
        built: dict[str, float] = {}
        sites = self.commits.index.get_level_values("site")
        for site, committed in zip(sites, self.commits["committed"], strict=True):
            time = datetime.fromisoformat(committed).timestamp()
            built[site] = max(built.get(site, 0.0), time)
        return built


def _choose_step(units: pd.DataFrame, step: str) -> pd.DataFrame:
    """Return the rows of the units of a step."""
    return units[units.index.get_level_values("step") == step]


def _list_step_failures(units: pd.DataFrame, states: pd.DataFrame) -> pd.DataFrame:
    """Tell why the last attempts at failed steps failed."""
    parts = []
    for step in states.columns:
        tried = _choose_step(units, step).reset_index()
        parts.append(tried[tried["site"].isin(states.index[states[step] == "failed"])])
    columns = ["site", "step", "error_class", "attempts", "message"]
    table = pd.concat([part[columns] for part in parts]) if parts else pd.DataFrame(columns=columns)
    return table.rename(columns={"message": "why"}).reset_index(drop=True)


def _find_last(units: pd.DataFrame, index: pd.MultiIndex) -> NDArray[np.intp]:
    """Return the row of each site-year's build, or of its search; -1 if neither was tried."""
    rows = np.full(len(index), -1)
    for step in ("search", "build"):  # the build tells more
        of_step = np.flatnonzero(units.index.get_level_values("step") == step)
        keys = units.index[of_step]
        names = [keys.get_level_values(name) for name in ("site", "year")]
        found = pd.MultiIndex.from_arrays(names).get_indexer(index)
        rows[found >= 0] = of_step[found[found >= 0]]
    return rows


def _take_columns(
    table: pd.DataFrame, columns: Iterable[str], rows: NDArray[np.intp]
) -> dict[str, pd.Series]:
    """Return these rows of some columns. Those at -1 are missing."""
    return {name: pd.Series(take_rows(table[name], rows)) for name in columns}


def _list_finished(store: cube.Store, step: str) -> dict[str, float]:
    """Map each site with a note of a finished step to the note's time."""
    prefix = f"{RUNS}/steps/{step}"
    if store.path is None:
        batches = itertools.chain.from_iterable(store.client().list(f"{prefix}/"))
        return {_site_of(entry["path"]): entry["last_modified"].timestamp() for entry in batches}
    try:
        with os.scandir(store.path / prefix) as entries:
            return {_site_of(e.name): e.stat().st_mtime for e in entries if e.is_file()}
    except (FileNotFoundError, NotADirectoryError):
        return {}


def _site_of(path: str) -> str:
    return path.rpartition("/")[2].removesuffix(".json")


def _measure_rate(ends: pd.DataFrame) -> float:
    """Return the site-years built per hour, within the hour before the last one."""
    builds = ends[(ends["step"] == "build") & (ends["state"] != "failed")]
    times = builds["time"]
    if len(times) < 2:
        return 0.0
    recent = times[times >= times.max() - _RATE_WINDOW]
    hours = (datetime.now(tz=UTC) - recent.min()).total_seconds() / 3600
    return float(len(recent) / max(hours, 1e-9))


def _compute_cost(spent: Mapping[str, float], terms: Terms) -> float | None:
    prices = (terms.per_1000_requests, terms.per_gb, terms.per_core_hour)
    if prices == (None, None, None):
        return None
    amounts = (spent["requests"] / 1e3, spent["mb"] / 1e3, spent["seconds"] / 3600)
    return sum((price or 0) * amount for price, amount in zip(prices, amounts, strict=True))


def make_map(status: Status, areas: Mapping[str, shapely.Geometry]) -> gpd.GeoDataFrame:
    """Return the site-years with the area of their site in longitude and latitude, as a map."""
    table = status.site_years.reset_index()
    polygons = [areas.get(site) for site in table["site"]]
    return gpd.GeoDataFrame(table, geometry=polygons, crs=4326)


def list_areas(dataset: Dataset) -> dict[str, shapely.Geometry]:
    """Return the polygon of each site of a dataset, in longitude and latitude."""
    sites = load_inputs(dataset).sites.values()
    return {site.id: site.geometry for site in sites if site.geometry is not None}


def list_store_areas(store: cube.Store) -> dict[str, shapely.Geometry]:
    """Return the extent of the grid of each site in a store, in longitude and latitude."""
    sites = cube.list_sites(store)
    return {site: area_of(cube.read_grid_and_years(store, site)[0]) for site in sites}
