"""Measure what a site-year costs through Dagster's daemon. Part of `benchmarks/runs.py`."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from run_engines import make_dataset

from minecube.catalog import load_dataset
from minecube.jobs.runs import RunOptions, run

_WORKFLOW = Path(__file__).parents[1] / "workflows" / "dagster_dataset.py"
_SITES = 5
_YEARS = tuple(range(2016, 2026))
_MOST_S = 600
"""Seconds until the runs must have ended."""


def measure_overhead() -> float:
    """Return the seconds of Dagster's runs for new sites per site-year that is built already.

    A site is one run with ten years. A run lasts from its launch by the daemon to its end, as
    Dagster's records say. It starts a process, imports the workflow, finds nothing to do, and
    reports on each cube. One run at a time. Returns the median.
    """
    import dagster as dg

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        path = make_dataset(folder, _SITES, _YEARS, 48, 3)
        summary = run(load_dataset(path), RunOptions(only=("search", "build")))
        if summary.exit_code:
            raise RuntimeError(f"the site-years were not built: {summary.failures}")
        home = _make_home(folder / "home")
        env = {**os.environ, "DAGSTER_HOME": str(home), "MINECUBE_DATASET": str(path)}
        log = folder / "daemon.log"
        with dg.DagsterInstance.from_config(str(home)) as instance, _start_daemon(env, log):
            command = [sys.executable, "-m", "dagster", "sensor", "start", "-f", str(_WORKFLOW)]
            subprocess.run([*command, "new_sites"], env=env, check=True, capture_output=True)
            until = time.monotonic() + _MOST_S
            while sum(entry.is_finished for entry in instance.get_runs()) < _SITES:
                if time.monotonic() > until:
                    raise RuntimeError(f"Dagster has not ended: {log.read_text()[-2000:]}")
                time.sleep(1)
            return statistics.median(_read_durations(instance)) / len(_YEARS)


def _make_home(home: Path) -> Path:
    """Make a home of Dagster with the settings of workflows/, but one run at a time."""
    settings = yaml.safe_load(_WORKFLOW.with_name("dagster.yaml").read_text())
    settings["run_coordinator"]["config"]["max_concurrent_runs"] = 1
    home.mkdir()
    (home / "dagster.yaml").write_text(yaml.safe_dump(settings))
    return home


@contextmanager
def _start_daemon(env: dict[str, str], log: Path) -> Iterator[None]:
    words = ["-c", "from dagster._daemon.cli import main; main()", "run", "-f", str(_WORKFLOW)]
    command = [sys.executable, *words]
    with log.open("w") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True)
        try:
            yield
        finally:
            # Its code server would go on for 20 seconds and write to the home.
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def _read_durations(instance: Any) -> Iterator[float]:
    """Yield the seconds from launch to end of each run. Raises RuntimeError if a run failed."""
    import dagster as dg

    for entry in instance.get_run_records():
        if entry.dagster_run.status is not dg.DagsterRunStatus.SUCCESS:
            raise RuntimeError(f"a run of Dagster ended as {entry.dagster_run.status.value}")
        run_id = entry.dagster_run.run_id
        (launch,) = instance.all_logs(run_id, of_type=dg.DagsterEventType.RUN_STARTING)
        yield entry.end_time - launch.timestamp
