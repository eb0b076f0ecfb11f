"""Find the unfinished units of a run, site by site, in the order data allows."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property

from obstore.exceptions import BaseError

from minecube.cube.events import read_events
from minecube.cube.read.summaries import Commit, read_commits
from minecube.errors import CubeError, MinecubeError
from minecube.jobs.runs.history import COLUMNS, History
from minecube.jobs.runs.inputs import Inputs
from minecube.jobs.runs.lookups import READERS, Lookup
from minecube.jobs.runs.rates import list_mapped, update_rates
from minecube.jobs.runs.site_steps import (
    Commits,
    is_finished,
    make_step,
    read_site_commits,
)
from minecube.jobs.runs.states import StaleCheck, needs_search
from minecube.jobs.runs.summary import RunOptions, Summary
from minecube.jobs.runs.units import NEEDS, SITE_YEAR_STEPS, Unit
from minecube.jobs.runs.worker import Result


class Barrier:
    """Yielded in place of units: the site waits for all others, whose maps give the rates."""


_WAIT_FOR_ALL = Barrier()
_COUNTING = threading.Lock()


def _add(counts: Counter[str], step: str) -> None:
    """Count a unit. Threads of the driver do so at the same time."""
    with _COUNTING:
        counts[step] += 1


@dataclass
class Plan:
    """Finds the unfinished units of each site, step by step."""

    inputs: Inputs
    options: RunOptions
    steps: Sequence[str]
    sites: Sequence[str]
    years: Sequence[int]
    stored_years: Mapping[str, Sequence[int]]
    """Years in the group of each site. Sites that do not fit into the store are missing."""
    commits: dict[tuple[str, int], Commit]
    """At the start of the run."""
    damaged: dict[tuple[str, int], CubeError]
    """Site-years with a damaged marker."""
    stale_check: StaleCheck
    summary: Summary = field(default_factory=Summary)
    are_rates_known: bool = False
    """Whether tracks may start."""
    failed: deque[Unit] = field(default_factory=deque)
    """Units that failed before any worker had them. The driver logs them."""

    @classmethod
    def make(
        cls,
        inputs: Inputs,
        options: RunOptions,
        steps: Sequence[str],
        sites: Sequence[str],
        years: Sequence[int],
        stored_years: Mapping[str, Sequence[int]],
    ) -> Plan:
        """Read the markers of all site-years, or of those in the shard.

        A step of a site depends on all its years, also on those that the dataset lacks.
        """
        shard = options.shard
        site_years = [
            (site, year)
            for site in sites
            for year in sorted({*years, *stored_years.get(site, ())})
            if shard is None or shard.has(site, 0) or (year in years and shard.has(site, year))
        ]
        damaged: dict[tuple[str, int], CubeError] = {}
        commits = read_commits(inputs.store, site_years, damaged)
        return cls(
            inputs,
            options,
            steps,
            sites,
            years,
            stored_years,
            commits,
            damaged,
            StaleCheck(inputs),
        )

    @cached_property
    def history(self) -> History:
        """Earlier attempts. They are read with the first unfinished unit: a rerun needs none."""
        return History.from_events(read_events(self.inputs.store, COLUMNS))

    def walk(self, site: str) -> Iterator[list[Unit] | Barrier]:
        """Yield the unfinished units of each step of a site. Resume when they have ended.

        If the state of a step cannot be read, the step has failed, and no later one starts.
        """
        reached = [self.steps[0]]
        try:
            yield from self._walk(site, reached)
        except (MinecubeError, OSError, BaseError) as error:
            step = reached[-1]
            years = self.years if step in SITE_YEAR_STEPS else (0,)
            for year in years:
                if self.options.shard is None or self.options.shard.has(site, year):
                    self._fail(Unit(step, site, year), error)

    def _walk(self, site: str, reached: list[str]) -> Iterator[list[Unit] | Barrier]:
        failed: set[str] = set()
        committed: Commits | None = None
        follows = False  # an earlier unit has succeeded
        inputs = self.inputs
        for step in self.steps:
            reached.append(step)
            if step in SITE_YEAR_STEPS:
                committed = None  # read again after builds
                if units := self._list_site_years(step, site, inputs):
                    yield units
                    inputs = self._fresh_inputs
                    follows |= not all(map(self._has_failed, units))
                continue
            if step == "tracks":
                yield _WAIT_FOR_ALL
                if not self.are_rates_known:
                    _add(self.summary.waiting, step)
                    failed.add(step)
                    continue
            unit = Unit(step, site)
            if self.options.shard and not self.options.shard.has(site, 0):
                failed.add(step)
                continue
            if step != "audit":  # which comes before builds, and needs none
                committed = committed or self._read_site_commits(inputs, site)
            if not self._may_start(unit, failed, committed or {}):
                failed.add(step)
            elif is_finished(step, make_step(step, inputs, site, committed or {})):
                _add(self.summary.kept, step)
            elif not (follows or self._is_chosen(unit)):
                failed.add(step)
            else:
                yield [unit]
                inputs = self._fresh_inputs
                follows |= not self._has_failed(unit)
                if self._has_failed(unit):
                    failed.add(step)

    @cached_property
    def _fresh_inputs(self) -> Inputs:
        """The inputs for the state of a site on which this run has worked."""
        return replace(self.inputs, lookup=Lookup())

    @cached_property
    def _fresh_check(self) -> StaleCheck:
        """Judges the builds of a site whose scenes this run has searched."""
        return StaleCheck(self._fresh_inputs)

    @cached_property
    def _site_commits(self) -> dict[str, dict[int, Commit]]:
        commits: dict[str, dict[int, Commit]] = {}
        for (site, year), commit in self.commits.items():
            commits.setdefault(site, {})[year] = commit
        return commits

    def _read_site_commits(self, inputs: Inputs, site: str) -> Commits:
        """Return the markers of a site. They are read again once the run has worked on it.

        Raises CubeError for a damaged marker.
        """
        if inputs is not self.inputs or site not in self.stored_years:
            return read_site_commits(inputs, site)
        for year in sorted({*self.years, *self.stored_years[site]}):
            if (site, year) in self.damaged:
                raise self.damaged[site, year]
        return self._site_commits.get(site, {})

    def _is_chosen(self, unit: Unit) -> bool:
        return self.options.chosen is None or unit in self.options.chosen

    def _list_site_years(self, step: str, site: str, inputs: Inputs) -> list[Unit]:
        units = []
        for year in self.years:
            unit = Unit(step, site, year)
            if self.options.shard and not self.options.shard.has(site, year):
                continue
            if not self._is_chosen(unit):
                continue
            if step == "build" and (site, year) in self.damaged:
                self._fail(unit, self.damaged[site, year])
            elif not self._is_unfinished(unit, inputs):
                _add(self.summary.kept, step)
            elif self._has_failed(Unit("search", site, year)):
                _add(self.summary.blocked, step)
            else:
                units.append(unit)
        return units

    def _is_unfinished(self, unit: Unit, inputs: Inputs) -> bool:
        """Whether a site-year still needs its search or build. Notes stale builds."""
        if unit.step == "search":
            return needs_search(inputs, unit.site, unit.year)
        commit = self.commits.get((unit.site, unit.year))
        if commit is None:
            return True
        check = self.stale_check if inputs is self.inputs else self._fresh_check
        reason = check.explain(commit)
        if not reason:
            return False
        if self.options.overwrite and (self.options.rebuild or check.explain_inputs(commit)):
            return True
        self.summary.stale[unit] = reason
        return False

    def _fail(self, unit: Unit, error: Exception) -> None:
        """Note that a unit cannot be worked on."""
        self.summary.results[unit] = Result.from_error(error)
        self.failed.append(unit)

    def is_built(self, unit: Unit) -> bool:
        """Whether a site-year has a marker. Then the marker tells what is wrong with it."""
        key = (unit.site, unit.year)
        return unit.step in SITE_YEAR_STEPS and (key in self.commits or key in self.damaged)

    def _has_failed(self, unit: Unit) -> bool:
        result = self.summary.results.get(unit)
        return result is not None and not result.is_good

    def _may_start(self, unit: Unit, failed: set[str], committed: Commits) -> bool:
        """Whether a site's step has what it needs. Otherwise it is counted as blocked."""
        if unit.step != "audit":
            if self.options.shard and not self._are_all_tried(unit.site, committed):
                _add(self.summary.waiting, unit.step)
                return False
            if not committed:
                _add(self.summary.blocked, unit.step)
                return False
        if failed & set(NEEDS.get(unit.step, ())):
            _add(self.summary.blocked, unit.step)
            return False
        return True

    def _are_all_tried(self, site: str, committed: Commits) -> bool:
        """Whether each year of a site is committed, or has failed in some run."""
        return all(year in committed or self.history.has_failed(site, year) for year in self.years)

    def count(self) -> int:
        """Count the units of this run that are done or may still come: an upper bound."""
        per_site = [len(self.years) if step in SITE_YEAR_STEPS else 1 for step in self.steps]
        shares = self.options.shard.count if self.options.shard else 1
        others = (self.summary.kept, self.summary.blocked, self.summary.waiting)
        return len(self.sites) * sum(per_site) // shares - sum(sum(c.values()) for c in others)

    def preview(self) -> dict[str, tuple[int, int]]:
        """Count the unfinished and the finished units of each step as of now."""
        before = Counter(self.summary.kept)
        unfinished: Counter[str] = Counter()
        with ThreadPoolExecutor(1 if self.inputs.store.path else READERS) as pool:
            for counts in pool.map(self._count_unfinished, self.sites):
                unfinished += counts
        kept = self.summary.kept - before
        return {step: (unfinished[step], kept[step]) for step in self.steps}

    def _count_unfinished(self, site: str) -> Counter[str]:
        """Count the unfinished units of each step of a site. Finished units are added to `kept`."""
        unfinished: Counter[str] = Counter()
        for step in self.steps:
            if step in SITE_YEAR_STEPS:
                unfinished[step] = len(self._list_site_years(step, site, self.inputs))
                continue
            committed = self._read_site_commits(self.inputs, site)
            if is_finished(step, make_step(step, self.inputs, site, committed)):
                _add(self.summary.kept, step)
            else:
                unfinished[step] = 1
        return unfinished

    def update_rates(self) -> None:
        """Determine the rates of tracks. In a shard, tracks wait until all sites are mapped."""
        mapped = list_mapped(self.inputs)
        self.inputs.lookup.forget()
        if self.options.shard and not all(
            map(self._is_predict_over, set(self.inputs.sites) - set(mapped))
        ):
            return
        self.are_rates_known = update_rates(self.inputs, mapped)

    def _is_predict_over(self, site: str) -> bool:
        """Whether a site without maps will get none: its step or all its builds have failed."""
        has_failed = self.history.has_failed
        return self.history.has_failed_step("predict", site) or all(
            has_failed(site, year) for year in self.years
        )
