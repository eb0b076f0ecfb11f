"""Show the state of a dataset or a store: the job of `minecube status`.

The state comes from markers, scene lists, notes of finished steps and event logs. It is the same
while a run is going, after it was killed, and for a store that no run has made.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely

from minecube import cube
from minecube.catalog import Dataset
from minecube.composite.plan import Terms
from minecube.cube.events import RUNS, Events, read_events
from minecube.cube.read.summaries import Commit, list_commits, read_commits
from minecube.errors import CubeError, MinecubeError
from minecube.grid import area_of
from minecube.jobs.runs.history import COLUMNS, History
from minecube.jobs.runs.inputs import forget_inputs, load_inputs
from minecube.jobs.runs.lookups import READERS
from minecube.jobs.runs.site_steps import check_steps
from minecube.jobs.runs.states import StaleCheck
from minecube.jobs.runs.units import SITE_STEPS, list_steps

STATES = ("done", "gaps", "stale", "running", "failed", "interrupted", "to do")
"""done: committed from the present inputs. gaps: committed, but with lost reads. stale: committed
from other inputs. interrupted: its worker died. to do: not tried yet."""
_KM2_PER_PIXEL = 1e-4
_SPENT = ["step", "state", "time", "seconds", "bytes", "requests"]
_MADE_OF_BUILDS = ("predict", "tracks", "score", "export")
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
    commits = read_commits(inputs.store, keys, damaged)
    check = StaleCheck(inputs)

    def explain(commit: Commit) -> str:
        try:
            return check.explain(commit)
        except MinecubeError as error:  # the polygon of its site is gone, for example
            damaged[commit.site, commit.year] = CubeError(str(error))
            return ""

    with ThreadPoolExecutor(1 if inputs.store.path else READERS) as pool:
        found = zip(commits, pool.map(explain, commits.values()), strict=True)
        reasons = {key: reason for key, reason in found if reason}
    steps = [step for step in list_steps(dataset) if step in SITE_STEPS]
    terms = Terms.load(Path(dataset.prices)) if dataset.prices else Terms()
    finished = None
    if len(inputs.sites) <= _MOST_CHECKED:
        finished = check_steps(inputs, steps)
    reader = _Reader(inputs.store, keys, commits, reasons, damaged, finished)
    return reader.read(dataset.id, steps, terms)


def read_store_status(store: cube.Store) -> Status:
    """Read the state of a store: its committed years, and those in its event logs.

    Raises:
        CubeError: the store cannot be read.
    """
    commits = list_commits(store, cube.list_sites(store))
    events = read_events(store, COLUMNS)
    tried = events.table[["site", "year"]].drop_duplicates().query("year > 0")
    keys = sorted({*commits, *tried.itertuples(index=False, name=None)})
    return _Reader(store, keys, commits, {}, {}).read(str(store), SITE_STEPS, Terms(), events)


@dataclass(frozen=True)
class _Reader:
    """Puts markers and events together."""

    store: cube.Store
    keys: Sequence[tuple[str, int]]
    commits: Mapping[tuple[str, int], Commit]
    reasons: Mapping[tuple[str, int], str]
    """Why committed site-years are stale."""
    damaged: Mapping[tuple[str, int], CubeError]
    """Site-years with a damaged marker."""
    finished: Mapping[str, Mapping[str, bool]] | None = None
    """Step -> site -> whether it is finished; None: the times of notes and builds decide."""

    def read(
        self, name: str, steps: Iterable[str], terms: Terms, events: Events | None = None
    ) -> Status:
        events = events or read_events(self.store, COLUMNS)
        history = History.from_events(events).units.reset_index()
        ends = events.table.loc[events.table["event"] == "end", _SPENT]
        spent = {
            "seconds": float(ends["seconds"].sum()),
            "mb": float(ends["bytes"].sum()) / 1e6,
            "requests": float(ends["requests"].sum()),
        }
        site_years = self._tabulate_site_years(history)
        return Status(
            name=name,
            site_years=site_years,
            steps=self._tabulate_steps(history, list(steps)),
            spent=spent,
            per_hour=_measure_rate(ends) if (site_years["state"] == "running").any() else 0.0,
            cost=_compute_cost(spent, terms),
            currency=terms.currency,
        )

    def _tabulate_site_years(self, history: pd.DataFrame) -> pd.DataFrame:
        tried = history[history["step"].isin(["search", "build"])]
        # The build tells more than the search, where both were tried.
        last = (
            tried.sort_values("step").drop_duplicates(["site", "year"]).set_index(["site", "year"])
        )
        index = pd.MultiIndex.from_tuples(self.keys, names=["site", "year"])
        table = last.reindex(index).astype({"error_class": object, "worker": object})
        built = [self.commits.get(key) for key in self.keys]
        committed = np.array([commit is not None for commit in built], dtype=bool)
        lost = np.array([0 if commit is None else commit.lost for commit in built])
        stale = np.array([key in self.reasons for key in self.keys], dtype=bool)
        broken = np.array([key in self.damaged for key in self.keys], dtype=bool)
        failed = (table["state"] == "failed").to_numpy() | broken
        running = table["running"].eq(True).to_numpy()
        interrupted = table["interrupted"].eq(True).to_numpy()
        conditions = [
            running,
            broken,
            stale,
            committed & (lost > 0),
            committed,
            interrupted,
            failed,
        ]
        choices = ["running", "failed", "stale", "gaps", "done", "interrupted", "failed"]
        state = np.select(conditions, choices, "to do")
        why = table["message"].fillna("").where(~committed | failed, "").to_numpy(dtype=object)
        for position in np.flatnonzero(stale):
            reason = self.reasons[self.keys[int(position)]]
            why[position] = "; ".join(filter(None, [reason, why[position]]))
        for position in np.flatnonzero(state == "gaps"):
            why[position] = f"{lost[position]} reads were lost"
        for position in np.flatnonzero(broken):
            why[position] = str(self.damaged[self.keys[int(position)]])
        return pd.DataFrame(
            {
                "state": state,
                "why": why,
                "error_class": table["error_class"].fillna("").where(failed, "").to_numpy(),
                "attempts": table["attempts"].fillna(0).astype(int).to_numpy(),
                "seconds": table["seconds"].to_numpy(),
                "peak_mb": table["peak_mb"].to_numpy(),
                "mb": (table["bytes"] / 1e6).round(3).to_numpy(),
                "requests": table["requests"].to_numpy(),
                "lost": lost,
                "km2": [
                    0.0 if commit is None else commit.pixels * _KM2_PER_PIXEL for commit in built
                ],
                "version": ["" if commit is None else commit.version for commit in built],
                "worker": table["worker"].fillna("").to_numpy(),
                "committed": ["" if commit is None else commit.committed for commit in built],
            },
            index=index,
        )

    def _tabulate_steps(self, history: pd.DataFrame, steps: Sequence[str]) -> pd.DataFrame:
        sites = list(dict.fromkeys(site for site, _ in self.keys))
        built: dict[str, float] = {}
        for (site, _), commit in self.commits.items():
            committed = datetime.fromisoformat(commit.committed).timestamp()
            built[site] = max(built.get(site, 0.0), committed)
        columns = {}
        for step in steps:
            finished = _list_finished(self.store, step)
            tried = history[history["step"] == step].set_index("site")
            states = pd.Series("", index=sites)
            for site in sites:
                if site not in finished:
                    continue
                is_current = step not in _MADE_OF_BUILDS or finished[site] >= built.get(site, 0.0)
                if self.finished is not None:
                    is_current = self.finished[step][site]
                states[site] = "done" if is_current else "stale"
            states[states.index.isin(tried.index[tried["state"] == "failed"])] = "failed"
            states[states.index.isin(tried.index[tried["interrupted"]])] = "interrupted"
            states[states.index.isin(tried.index[tried["running"]])] = "running"
            columns[step] = states
        return pd.DataFrame(columns, index=pd.Index(sites, name="site"))


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
