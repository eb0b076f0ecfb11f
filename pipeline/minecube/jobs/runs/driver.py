"""Run a whole dataset: hand its unfinished units to workers, in the order data allows."""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace

from minecube import cube, scenes
from minecube.catalog import Dataset, format_years
from minecube.errors import CatalogError, CubeError, UnguardedScriptError, WorkerError
from minecube.grid import grid_of
from minecube.jobs.failures import describe_failure
from minecube.jobs.processes import end_unguarded_import
from minecube.jobs.runs.engines import Engine, interrupted_by_sigterm, open_engine
from minecube.jobs.runs.finished import note_finished, read_finished
from minecube.jobs.runs.inputs import (
    Inputs,
    check_inputs,
    forget_inputs,
    load_inputs,
    open_log,
)
from minecube.jobs.runs.joins import join_results
from minecube.jobs.runs.lookups import READERS
from minecube.jobs.runs.notify import notifying
from minecube.jobs.runs.plan import Barrier, Plan
from minecube.jobs.runs.steps import Limits
from minecube.jobs.runs.summary import Progress, RunOptions, Summary
from minecube.jobs.runs.units import Unit, list_steps
from minecube.jobs.runs.worker import Result, log_end
from minecube.jobs.selection import match_names

_POLL_S = 1.0
_BUSY_S = 2.0
"""Seconds until a unit is tried again on which another run works. Each pause is twice as long."""
_LONGEST_BUSY_S = 60.0
_MOST_DEATHS = 3
"""Deaths of workers after which their unit has failed."""


def run(
    dataset: Dataset,
    options: RunOptions | None = None,
    progress: Progress = lambda *_: None,
) -> Summary:
    """Run all unfinished steps of a dataset. The failure of a unit stops no other site.

    Workers start with the first unfinished unit. SIGTERM ends the run as Ctrl-C does. `progress` is
    called with each unit that ends, its result, and the number of all units of this run, an upper
    bound.

    Raises:
        CatalogError: a name, step, file or engine is unknown or missing. Nothing is written.
        CubeError: the store is of another dataset, or cannot be read or written.
        WorkerError: the Dask scheduler is gone. Finished units are safe.
        UnguardedScriptError: the user's script starts a run when a worker imports it.
    """
    end_unguarded_import()
    options = options or RunOptions()
    start = time.monotonic()
    summary = Summary()
    with interrupted_by_sigterm(), notifying(dataset, summary, progress) as note:
        plan = make_plan(dataset, options)
        plan.summary = summary
        driver = _Driver(plan, note)
        with ExitStack() as stack:
            sent = replace(dataset, notify=None)  # the URL of a webhook is one

            def start_engine() -> Engine:
                engine = stack.enter_context(open_engine(sent, plan.steps))
                note_dataset(plan.inputs)
                return engine

            driver.work(start_engine)
        if options.shard is None:
            summary.unjoined = join_results(plan.inputs, plan.steps)
    summary.seconds = time.monotonic() - start
    return summary


def make_plan(dataset: Dataset, options: RunOptions) -> Plan:
    """Check a dataset, and read the state of its site-years. Writes nothing.

    Raises as `run` does.
    """
    end_unguarded_import()
    forget_inputs()
    inputs = load_inputs(dataset).with_listings()
    with dataset.naming_line("years"):
        scenes.check_years(dataset.years)
    check_inputs(inputs)
    steps = list_steps(dataset, options.only)
    sites = _choose_names(inputs, options.sites)
    years = choose_years(dataset, options.years)
    shard = options.shard
    in_shard = sites if shard is None else [site for site in sites if shard.has_any(site, years)]
    stored_years = check_store(inputs, in_shard)
    return Plan.make(inputs, options, steps, sites, years, stored_years)


def _choose_names(inputs: Inputs, names: str | tuple[str, ...]) -> list[str]:
    """Return the sites that match a text, or those of a tuple. Raises CatalogError for another."""
    if isinstance(names, str):
        return match_names(names, list(inputs.sites), inputs.dataset.id)
    unknown = [name for name in names if name not in inputs.sites]
    if unknown:
        raise CatalogError(
            f"sites: the dataset {inputs.dataset.id} has no site {unknown[0]!r}; name one that it has"
        )
    return list(names)


def choose_years(dataset: Dataset, years: Sequence[int] | None) -> tuple[int, ...]:
    """Return these years, or all of the dataset. Raises CatalogError for another year."""
    if years is None:
        return dataset.years
    missing = sorted(set(years) - set(dataset.years))
    if missing:
        raise CatalogError(
            f"--years {missing[0]}: the dataset has {format_years(dataset.years)}; "
            "add the year to its file"
        )
    return tuple(years)


def check_store(inputs: Inputs, sites: Sequence[str]) -> dict[str, list[int]]:
    """Raise CubeError if the store is of another dataset: all its sites have another grid or recipe.

    A site that alone does not fit, or has no polygon, is left to its own failure. Returns the years
    in the group of each other site; none for a site without a group.
    """

    _check_dataset(inputs)
    store = inputs.store
    stored = set(store.list_folders("")) if store.path is None else set(sites)

    def check(name: str) -> CubeError | list[int] | None:
        site = inputs.sites[name]
        if name not in stored:
            return None
        try:
            return cube.read_fitting_years(store, site, grid_of(site), inputs.job.recipe)
        except CubeError as error:
            return error

    placed = [name for name in sites if inputs.sites[name].geometry is not None]
    with ThreadPoolExecutor(1 if store.path else READERS) as pool:
        found = dict(zip(placed, pool.map(check, placed), strict=True))
    errors = [error for error in found.values() if isinstance(error, CubeError)]
    if errors and not any(isinstance(years, list) for years in found.values()):
        raise errors[0]
    return {name: years or [] for name, years in found.items() if not isinstance(years, CubeError)}


def _check_dataset(inputs: Inputs) -> None:
    """Raise CubeError if the store holds another dataset, or only other sites or files."""
    store = inputs.store
    name = inputs.dataset.id
    noted = read_finished(store, "dataset", "dataset").get("inputs")
    if noted is None and store.has_group(""):
        stored = cube.list_sites(store)
        if stored and not set(stored) & set(inputs.sites):
            raise CubeError(
                f"{store}: has none of the sites of {name}, but {stored[0]} and others; "
                "name another `store`"
            )
    elif noted is None and store.path is not None and store.path.is_dir():
        others = sorted(path.name for path in store.path.iterdir() if path.name[0] != ".")
        if others:
            raise CubeError(
                f"{store}: expected a store of cubes or an empty folder, found {others[0]}; "
                "name another `store`"
            )
    elif noted not in (None, name):
        raise CubeError(
            f"{store}: holds the dataset {noted}, not {name}; name another `store`, or correct `id`"
        )


def note_dataset(inputs: Inputs) -> None:
    """Note in the store which dataset it holds."""
    if not read_finished(inputs.store, "dataset", "dataset"):
        note_finished(inputs.store, "dataset", "dataset", inputs.dataset.id, None)


@dataclass
class _Chain:
    """A site on its way through the steps."""

    steps: Iterator[list[Unit] | Barrier]
    open: int = 0
    """Units in work."""


def _find_next(chain: _Chain) -> list[Unit] | Barrier | None:
    return next(chain.steps, None)


@dataclass
class _Work:
    """A unit in work, or waiting to be tried again."""

    unit: Unit
    chain: _Chain
    attempt: int = 0
    """Number of the last attempt, over all runs."""
    deaths: int = 0
    """Workers that died on it."""
    pause_s: float = 0.0
    """Last pause because another run worked on it."""
    not_before: float = 0.0


class _Driver:
    """Keeps the workers busy with the units of a plan."""

    def __init__(self, plan: Plan, progress: Progress) -> None:
        self._plan = plan
        self._run = secrets.token_hex(8)
        self._progress = progress
        self._ready = deque(_Chain(plan.walk(site)) for site in plan.sites)
        self._parked: list[_Chain] = []
        self._again: list[_Work] = []
        self._running: dict[Future[Result], _Work] = {}
        self._engine: Engine | None = None

    def work(self, start_engine: Callable[[], Engine]) -> None:
        """Work until every site has gone through all steps."""
        while self._ready or self._parked or self._again or self._running:
            self._hand_out(start_engine)
            if self._running:
                self._collect()
            elif self._again:
                time.sleep(_POLL_S)
            elif self._parked and not self._ready:
                self._plan.update_rates()
                self._ready.extend(self._parked)
                self._parked.clear()

    def _hand_out(self, start_engine: Callable[[], Engine]) -> None:
        """Submit units until enough are waiting at the workers."""
        now = time.monotonic()
        for work in [work for work in self._again if work.not_before <= now]:
            self._again.remove(work)
            self._submit(self._engine or start_engine(), work)
        while self._ready and not self._has_enough():
            found = self._find_units()
            self._log_failed()
            for chain, units in found:
                if isinstance(units, Barrier):
                    self._parked.append(chain)
                elif units:
                    engine = self._engine or start_engine()
                    self._engine = engine
                    chain.open = len(units)
                    for unit in units:
                        self._submit(engine, _Work(unit, chain))

    def _find_units(self) -> list[tuple[_Chain, list[Unit] | Barrier | None]]:
        """Find the next unfinished units of ready sites; None for sites at their end.

        In a folder, this is fast. An object store takes dozens of requests per site, so the
        requests of several sites overlap.
        """
        is_remote = self._plan.inputs.store.path is None
        count = min(READERS, len(self._ready)) if is_remote else 1
        chains = [self._ready.popleft() for _ in range(count)]
        with ThreadPoolExecutor(count) as pool:
            return list(zip(chains, pool.map(_find_next, chains), strict=True))

    def _has_enough(self) -> bool:
        return self._engine is not None and len(self._running) >= 3 * self._engine.workers

    def _submit(self, engine: Engine, work: _Work) -> None:
        options = self._plan.options
        limits = Limits(
            run=self._run,
            threads=engine.threads,
            block_fraction=options.fractions.get(work.unit, 1.0) * 0.5**work.deaths,
            workers=options.shard.count if options.shard else 1,
            overwrite=options.overwrite,
        )
        work.attempt = self._plan.history.count_attempts(work.unit) + work.deaths + 1
        self._running[engine.submit(work.unit, limits, work.attempt)] = work

    def _collect(self) -> None:
        """Take the results of units that have ended."""
        # The timeout is for Ctrl-C: a signal to another thread does not wake this thread.
        ended, _ = wait(self._running, timeout=_POLL_S, return_when=FIRST_COMPLETED)
        for future in ended:
            work = self._running.pop(future)
            result = self._read_result(future, work)
            if result is None:
                continue
            self._plan.summary.results[work.unit] = result
            self._progress(work.unit, result, self._plan.count())
            work.chain.open -= 1
            if not work.chain.open:
                self._ready.appendleft(work.chain)  # finish begun sites first

    def _read_result(self, future: Future[Result], work: _Work) -> Result | None:
        """Return the result of a unit; None if it will be tried again."""
        try:
            result = future.result()
        except CancelledError as error:  # no code here cancels units, so the scheduler is gone
            raise WorkerError(describe_failure(error)) from error
        except UnguardedScriptError:  # no worker can start
            raise
        except BaseException as error:
            if self._engine is None or not self._engine.is_death(error):
                if not isinstance(error, Exception):
                    raise
                return self._log_end(work, Result.from_error(error))
            work.deaths += 1
            if work.deaths < _MOST_DEATHS:
                self._again.append(work)
                return None
            return self._fail_dead(work)
        if result.state == "busy":
            work.pause_s = min(max(2 * work.pause_s, _BUSY_S), _LONGEST_BUSY_S)
            work.not_before = time.monotonic() + work.pause_s
            self._again.append(work)
            return None
        return result

    def _fail_dead(self, work: _Work) -> Result:
        result = Result(
            state="failed",
            error_class="memory",
            message=f"workers died on it {work.deaths} times, most often for lack of memory; "
            "give each worker more memory",
        )
        return self._log_end(work, result)

    def _log_failed(self) -> None:
        """Log the units that failed in the plan, unless an earlier run has logged the same.

        A site-year with a marker has failed for its inputs. Once these are mended, it is finished,
        and no event would follow.
        """
        plan = self._plan
        while plan.failed:
            unit = plan.failed.popleft()
            result = plan.summary.results[unit]
            is_logged = plan.history.has_failure(unit, result.message)
            if not (is_logged or plan.is_built(unit)):
                self._log(unit, plan.history.count_attempts(unit) + 1, result)
            self._progress(unit, result, plan.count())

    def _log_end(self, work: _Work, result: Result) -> Result:
        """Log that a unit has failed, in place of its worker."""
        self._log(work.unit, work.attempt, result)
        return result

    def _log(self, unit: Unit, attempt: int, result: Result) -> None:
        with suppress(CubeError):  # the unit may have failed because the store cannot be written
            log_end(open_log(self._plan.inputs.store), unit, attempt, result)
