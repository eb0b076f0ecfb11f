"""Try failed units again: those whose failure a repetition can mend."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from minecube.catalog import Dataset
from minecube.jobs.runs.driver import make_plan, run
from minecube.jobs.runs.plan import Plan
from minecube.jobs.runs.site_steps import is_finished, make_step, read_site_commits
from minecube.jobs.runs.states import list_path
from minecube.jobs.runs.summary import Progress, RunOptions, Summary
from minecube.jobs.runs.units import Unit

MENDABLE = ("network", "memory", "disk")
"""Classes of errors that may be gone at the next attempt."""
INTERRUPTED = "interrupted"
"""Class of an attempt whose worker died. It is always tried again."""
_LONGEST_PAUSE_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class RetryOptions:
    """Which failed units to try again, and how often."""

    classes: tuple[str, ...] = MENDABLE
    """Of `failures.CLASSES`."""
    failed_since: datetime | None = None
    """Only units that failed at this time or later; None: all. Has a time zone."""
    sites: str = "*"
    """Names of sites of the dataset, comma-separated, * allowed."""
    attempts: int = 1
    """Most attempts at each unit."""
    pause_s: float = 60.0
    """Seconds before the second attempt. Each further pause is twice as long, up to an hour."""


@dataclass(frozen=True)
class Failure:
    """A unit that is unfinished, and whose last attempt failed or was interrupted."""

    unit: Unit
    error_class: str
    """One of `failures.CLASSES`, or `INTERRUPTED`."""
    message: str
    attempts: int
    memory_failures: int
    """Attempts that lacked memory."""
    replaces: bool
    """Whether an older build of the site-year is committed, which `update` was to replace."""


@dataclass
class Retried:
    """What the attempts have done."""

    passes: list[Summary] = field(default_factory=list)
    """One per attempt."""
    left: list[Failure] = field(default_factory=list)
    """Failures that remain, also of other classes."""


def retry(
    dataset: Dataset,
    options: RetryOptions | None = None,
    progress: Progress = lambda *_: None,
    pause: Callable[[float], None] = time.sleep,
) -> Retried:
    """Run the failed units of the chosen classes again, and the steps that follow from them.

    Units that lacked memory get half the memory of a block per earlier lack. `pause` waits the
    seconds before a further attempt.

    Raises as `run` does.
    """
    options = options or RetryOptions()
    retried = Retried()
    for attempt in range(options.attempts):
        chosen = [
            failure
            for failure in list_failures(dataset, options)
            if failure.error_class in (*options.classes, INTERRUPTED)
        ]
        if not chosen:
            break
        if attempt:
            pause(min(options.pause_s * 2 ** (attempt - 1), _LONGEST_PAUSE_S))
        retried.passes.append(run(dataset, _plan_attempt(chosen), progress))
    retried.left = list_failures(dataset, options)
    return retried


def _plan_attempt(failures: list[Failure]) -> RunOptions:
    units = {failure.unit for failure in failures}
    units |= {Unit("build", unit.site, unit.year) for unit in units if unit.step == "search"}
    replaces = any(failure.replaces for failure in failures)
    return RunOptions(
        sites=tuple(sorted({unit.site for unit in units})),
        chosen=frozenset(units),
        overwrite=replaces,
        rebuild=replaces,
        fractions={failure.unit: 0.5**failure.memory_failures for failure in failures},
    )


def list_failures(dataset: Dataset, options: RetryOptions | None = None) -> list[Failure]:
    """List the failures of all classes at the sites and since the time of the options.

    Raises as `run` does.
    """
    options = options or RetryOptions()
    plan = make_plan(dataset, RunOptions(sites=options.sites))
    return list(_iterate_failures(plan, options.failed_since))


def _iterate_failures(plan: Plan, since: datetime | None) -> Iterator[Failure]:
    sites = set(plan.sites)
    years = {0, *plan.years}
    for unit, row in plan.history.failures():
        if unit.site not in sites or unit.year not in years or unit.step not in plan.steps:
            continue
        if since is not None and row.last_time < since:
            continue
        if _is_unfinished(plan, unit):
            yield _describe(plan, unit, row)


def _describe(plan: Plan, unit: Unit, row: Any) -> Failure:
    error_class, message = row.error_class, row.message
    if row.interrupted:
        error_class, message = INTERRUPTED, "its worker died"
    return Failure(
        unit=unit,
        error_class=error_class,
        message=message,
        attempts=row.attempts,
        memory_failures=row.memory_failures,
        replaces=unit.step == "build" and (unit.site, unit.year) in plan.commits,
    )


def _is_unfinished(plan: Plan, unit: Unit) -> bool:
    """Whether a unit still lacks what its failed attempt was to make."""
    if unit.step == "search":
        return not plan.inputs.lookup.exists(list_path(plan.inputs, unit.site, unit.year))
    if unit.step == "build":
        commit = plan.commits.get((unit.site, unit.year))
        return commit is None or bool(plan.stale_check.explain(commit))
    step = make_step(unit.step, plan.inputs, unit.site, read_site_commits(plan.inputs, unit.site))
    return not is_finished(unit.step, step)
