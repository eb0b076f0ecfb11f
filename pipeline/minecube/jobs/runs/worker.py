"""Work on one unit of a run in this process, and log it."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from minecube.catalog import Dataset
from minecube.cube.events import EventLog
from minecube.cube.locks import hold
from minecube.errors import BusyError
from minecube.jobs.failures import classify, describe_failure, one_line
from minecube.jobs.runs.inputs import Inputs, join_run, load_inputs, open_log
from minecube.jobs.runs.site_steps import finish_step, make_step, read_site_commits
from minecube.jobs.runs.steps import (
    BuildFailedError,
    Finding,
    Limits,
    build_site_year,
    search_scenes,
)
from minecube.jobs.runs.units import Unit
from minecube.network import remove_secrets
from minecube.reader.remote import limit_connections

_PEAK = Path("/proc/self/clear_refs")  # Linux; elsewhere the peak is that of the process so far


@dataclass(frozen=True, kw_only=True)
class Result:
    """The end of an attempt at a unit."""

    state: str
    """done, gaps, failed, or busy: another run works on it."""
    error_class: str = ""
    message: str = ""
    seconds: float = 0.0
    peak_mb: float = 0.0
    bytes: float = 0.0
    requests: float = 0.0
    retried: float = 0.0
    lost: float = 0.0

    @classmethod
    def from_error(cls, error: Exception) -> Result:
        """Describe the error that has ended an attempt, without credentials."""
        text = remove_secrets(one_line(describe_failure(error)))
        if isinstance(error, BusyError):
            return cls(state="busy", message=text)
        kind = error.error_class if isinstance(error, BuildFailedError) else classify(error)
        return cls(state="failed", error_class=kind, message=text)

    @property
    def is_good(self) -> bool:
        """Whether the unit has its outputs."""
        return self.state in ("done", "gaps")


def run_unit(dataset: Dataset, unit: Unit, limits: Limits, attempt: int) -> Result:
    """Work on a unit under its lease, and log start and end. The entry point of every worker.

    Never raises an error of the unit: a failed result has its class and reason.

    Raises:
        CubeError: the log or the lease cannot be written.
        CatalogError: the dataset cannot be loaded here.
    """
    limit_connections(limits.connections)
    join_run(limits.run)
    inputs = load_inputs(dataset)
    log = open_log(inputs.store)
    try:
        with hold(inputs.store, unit.lease):
            return _work_and_log(inputs, unit, limits, log, attempt)
    except BusyError as error:
        return Result.from_error(error)


def _work_and_log(
    inputs: Inputs, unit: Unit, limits: Limits, log: EventLog, attempt: int
) -> Result:
    log.write({"event": "start", **asdict(unit), "attempt": attempt})
    with contextlib.suppress(OSError):
        _PEAK.write_text("5")  # resets the peak
    start = time.monotonic()
    with log.beating():
        result = _work(inputs, unit, limits)
    measured: Mapping[str, Any] = {
        **asdict(result),
        "seconds": round(time.monotonic() - start, 3),
        "peak_mb": _read_peak_mb(),
    }
    ended = Result(**measured)
    log_end(log, unit, attempt, ended)
    return ended


def log_end(log: EventLog, unit: Unit, attempt: int, result: Result) -> None:
    """Log the end of an attempt. Raises CubeError if the log cannot be written."""
    version = metadata.version("minecube")
    end = {**asdict(unit), "attempt": attempt, **asdict(result), "version": version}
    log.write({"event": "end", **end})


def _work(inputs: Inputs, unit: Unit, limits: Limits) -> Result:
    try:
        finding = _do_step(inputs, unit, limits)
    except Exception as error:
        return Result.from_error(error)
    reads: dict[str, Any] = dict(finding.reads)
    return Result(state=finding.state, **reads)


def _do_step(inputs: Inputs, unit: Unit, limits: Limits) -> Finding:
    if unit.step == "search":
        return search_scenes(inputs, unit, limits)
    if unit.step == "build":
        return build_site_year(inputs, unit, limits)
    step = make_step(unit.step, inputs, unit.site, read_site_commits(inputs, unit.site))
    finish_step(unit.step, step, overwrite=limits.overwrite)
    return Finding()


def _read_peak_mb() -> float:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return round(int(line.split()[1]) / 1e3, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, 1)
