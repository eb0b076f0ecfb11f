"""Simulate runs of whole datasets: how long they take, what they cost, and what breaks first.

    python benchmarks/scale.py                          the table for 1,330 and 450,000 site-years
    python benchmarks/scale.py --check dataset.yaml     compare with a finished run of this machine

Units of work come from a site's years (search, build) and from the site (audit, label, predict,
tracks, score, export), in the order of `minecube run`. A worker takes one unit at a time. The
simulation has:

- durations: log-normal around the mean seconds of each step
- failures: a share of attempts fails, and is tried again by the next run
- churn: workers are lost at random; the unit in hand starts again
- rate limits: searches per second, shared by all workers
- the driver: seconds per unit, and seconds of requests to the store per site

The defaults are measured on small simulated runs and, for builds, by `minecube plan` on real
scene lists of 250 x 250 pixels and 40 dates. They are estimates: replace them by your own
(`--seconds build=90`), from the event logs of a first run.
"""

from __future__ import annotations

import argparse
import heapq
import math
import random
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from minecube.catalog import load_dataset
from minecube.cube import Store
from minecube.cube.events import read_events
from minecube.jobs.runs.units import SITE_YEAR_STEPS, STEPS, list_steps
from minecube.jobs.tables import format_table

SECONDS = {
    "search": 2.0,
    "build": 60.0,
    "audit": 1.0,
    "label": 0.3,
    "predict": 6.0,
    "tracks": 2.0,
    "score": 0.6,
    "export": 8.0,
}
"""Step -> mean seconds of a unit on one core."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A dataset and the machines for it."""

    sites: int
    years: int
    workers: int
    seconds: dict[str, float] = field(default_factory=lambda: dict(SECONDS))
    spread: float = 0.5
    """Standard deviation of the logarithm of durations."""
    failures: float = 0.01
    """Share of attempts that fail."""
    lifetime_s: float = 6 * 3600
    """Mean time until a worker is lost. A new one takes its place after `start_s`."""
    start_s: float = 20.0
    searches_per_s: float = 5.0
    """Rate limit of the scene catalogue."""
    unit_s: float = 0.001
    """Seconds of the driver per unit."""
    site_s: float = 0.003
    """Seconds of the driver per site and step: markers, notes and seals in the store."""
    core_hour: float = 0.05
    """Price of one worker for an hour."""


@dataclass
class Outcome:
    """Figures of a simulated run."""

    makespan_s: float = 0.0
    worker_s: float = 0.0
    """Seconds of all workers, idle or not, until the end."""
    busy_s: float = 0.0
    driver_s: float = 0.0
    """Seconds in which the driver was busy."""
    units: Counter[str] = field(default_factory=Counter)
    failed: int = 0
    lost: int = 0
    """Units that were in work when their worker was lost."""

    @property
    def use(self) -> float:
        """Share of the workers' time in which they worked."""
        return self.busy_s / self.worker_s

    @property
    def driver_use(self) -> float:
        """Share of the time in which the driver was busy: at 1, more workers gain nothing."""
        return self.driver_s / self.makespan_s


class _Simulation:
    """One run, event by event. Times in seconds since its start.

    Like the driver, it continues begun sites first, and begins another one while fewer than three
    units per worker are in work or waiting.
    """

    def __init__(self, case: Case, seed: int) -> None:
        self.case = case
        self.random = random.Random(seed)
        self.outcome = Outcome()
        self.free = [case.start_s] * case.workers  # times at which workers become free
        heapq.heapify(self.free)
        self.driver_free = 0.0
        self.next_search = 0.0

    def run(self, steps: Sequence[str]) -> Outcome:
        """Send every site through the steps. Tracks wait for the maps of all sites."""
        now = 0.0
        for phase in _split_at_tracks(steps):
            now = self._run_phase(phase, now)
        outcome = self.outcome
        outcome.makespan_s = now
        outcome.worker_s = now * self.case.workers
        return outcome

    def _run_phase(self, steps: Sequence[str], now: float) -> float:
        """Send every site through these steps. Returns the time of the end."""
        ready = deque((site, 0) for site in range(self.case.sites))
        in_work = [0] * self.case.sites
        running: list[tuple[float, int, int]] = []  # end, site, number of its step
        while ready or running:
            while ready and len(running) < 3 * self.case.workers:
                site, number = ready.popleft()
                if number < len(steps):
                    self._occupy_driver(now, self.case.site_s)
                    is_yearly = steps[number] in SITE_YEAR_STEPS
                    in_work[site] = self.case.years if is_yearly else 1
                    for _ in range(in_work[site]):
                        end = self._run_unit(steps[number], now)
                        heapq.heappush(running, (end, site, number))
            if running:
                now, site, number = heapq.heappop(running)
                in_work[site] -= 1
                if not in_work[site]:
                    ready.appendleft((site, number + 1))
        return now

    def _run_unit(self, step: str, now: float) -> float:
        handed_out = self._occupy_driver(now, self.case.unit_s)
        start = max(heapq.heappop(self.free), handed_out)
        if step == "search":
            start = max(start, self.next_search)
            self.next_search = start + 1 / self.case.searches_per_s
        seconds = self._draw_seconds(step)
        lost = self.random.random() < 1 - math.exp(-seconds / self.case.lifetime_s)
        end = start + seconds
        self.outcome.busy_s += seconds
        if lost:  # at a random moment of the unit, which then starts again
            self.outcome.lost += 1
            end += seconds * self.random.random() + self.case.start_s
        if self.random.random() < self.case.failures:
            self.outcome.failed += 1
            end += self._draw_seconds(step)
        self.outcome.units[step] += 1
        heapq.heappush(self.free, end)
        return end

    def _draw_seconds(self, step: str) -> float:
        spread = self.case.spread
        factor = math.exp(self.random.gauss(-spread * spread / 2, spread))
        return self.case.seconds[step] * factor

    def _occupy_driver(self, now: float, seconds: float) -> float:
        """Let the driver work. Returns the time at which it has ended."""
        self.driver_free = max(self.driver_free, now) + seconds
        self.outcome.driver_s += seconds
        return self.driver_free


def _split_at_tracks(steps: Sequence[str]) -> tuple[list[str], list[str]]:
    if "tracks" not in steps:
        return list(steps), []
    place = list(steps).index("tracks")
    return list(steps[:place]), list(steps[place:])


def simulate(case: Case, steps: Sequence[str] = STEPS, seed: int = 0) -> Outcome:
    """Simulate a run."""
    return _Simulation(case, seed).run(steps)


# Objects and requests

OBJECTS_PER_SITE_YEAR = 12
"""Five of the build's record, five of its arrays and labels, and two of maps. Counted in the store
of a small run: a site-year of up to 1024 x 1024 pixels is one shard per array."""
OBJECTS_PER_SITE = 44
"""Metadata of arrays and groups, coordinates, and notes of finished steps."""
_LIST_PAGE = 1000
_LIST_S = 0.15
"""Seconds per request of a listing in an object store."""


def count_objects(case: Case) -> int:
    """Count the objects of a finished store."""
    return case.sites * (OBJECTS_PER_SITE + case.years * OBJECTS_PER_SITE_YEAR)


def estimate_listing_s(case: Case) -> float:
    """Estimate the seconds to list a whole store: why no task may do it."""
    return math.ceil(count_objects(case) / _LIST_PAGE) * _LIST_S


# Tables

_S3_SITE_S = 20 * 0.03 / len(STEPS)
"""Seconds of requests per site and step: 20 requests of 30 ms for a site of ten years. Its metadata,
markers, notes and seals were counted on an S3 server (tests/test_plan_requests.py). The driver reads
32 sites at the same time."""
CASES = {
    "1,330 site-years, 2 processes": Case(sites=133, years=10, workers=2),
    "1,330 site-years, 32 workers": Case(sites=133, years=10, workers=32),
    "450,000 site-years, 200 workers": Case(sites=45_000, years=10, workers=200),
    "450,000 site-years, 1,000 workers": Case(
        sites=45_000, years=10, workers=1000, searches_per_s=50
    ),
    "the same, 5 searches/s": Case(sites=45_000, years=10, workers=1000),
    "the same, store in S3": Case(
        sites=45_000, years=10, workers=1000, searches_per_s=50, site_s=_S3_SITE_S / 32
    ),
    "the same, without threads": Case(
        sites=45_000, years=10, workers=1000, searches_per_s=50, site_s=_S3_SITE_S
    ),
}


def estimate_rerun_s(case: Case) -> float:
    """Estimate the seconds of a run that finds everything finished: those of the driver."""
    return case.sites * len(STEPS) * case.site_s


def list_rows(cases: dict[str, Case]) -> list[tuple[str, ...]]:
    """Simulate cases. Returns a row for each."""
    rows = []
    for name, case in cases.items():
        outcome = simulate(case)
        hours = outcome.makespan_s / 3600
        cost = outcome.worker_s / 3600 * case.core_hour
        rows.append(
            (
                name,
                f"{hours:,.1f}",
                f"{outcome.use:.0%}",
                f"{outcome.driver_use:.0%}",
                f"{outcome.units.total() / outcome.makespan_s:.1f}",
                f"{outcome.lost:,}",
                f"{outcome.failed:,}",
                f"{cost:,.0f}",
                f"{count_objects(case) / 1e6:.2f}",
                f"{estimate_listing_s(case) / 60:,.1f}",
                f"{estimate_rerun_s(case) / 60:,.1f}",
            )
        )
    return rows


HEADER = (
    "run",
    "hours",
    "workers busy",
    "driver busy",
    "units/s",
    "units lost",
    "failed",
    "cost",
    "million objects",
    "minutes to list",
    "minutes of a rerun",
)


def check_against(path: Path) -> tuple[float, float]:
    """Compare a finished first run with its simulation, from its own mean seconds per step.

    Returns the real and the simulated makespan in seconds, both from the first start on.
    """
    dataset = load_dataset(path)
    table = read_events(Store(dataset.store)).table
    ends = table[table["event"] == "end"]
    times = table["time"].astype("datetime64[ns, UTC]")
    real = (times.max() - times.min()).total_seconds()
    means = ends.groupby("step", observed=True)["seconds"].mean().to_dict()
    sites = ends["site"].nunique()
    case = Case(
        sites=sites,
        years=len(dataset.years),
        workers=ends["worker"].nunique(),
        seconds={**SECONDS, **means},
        spread=0.0,
        failures=0.0,
        start_s=0.0,
        searches_per_s=math.inf,
    )
    return real, simulate(case, list_steps(dataset)).makespan_s


def main() -> None:
    """Print the table, or the check against a run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", type=Path, help="dataset.yaml of a finished run")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument(
        "--seconds", action="append", default=[], metavar="STEP=S", help="mean seconds of a step"
    )
    options = parser.parse_args()
    if options.check:
        real, simulated = check_against(options.check)
        print(f"real {real:.1f} s, simulated {simulated:.1f} s, ratio {simulated / real:.2f}")
        return
    given = dict(text.split("=") for text in options.seconds)
    seconds = {**SECONDS, **{step: float(value) for step, value in given.items()}}
    rows = list_rows({name: replace(case, seconds=seconds) for name, case in CASES.items()})
    if options.markdown:
        for row in (HEADER, ["---"] * len(HEADER), *rows):
            print("| " + " | ".join(row) + " |")
    else:
        print(format_table(HEADER, rows))


if __name__ == "__main__":
    main()
