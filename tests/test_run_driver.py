"""How the driver answers deaths of workers, a lost scheduler, and units of other runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from pathlib import Path

import pytest

from known_runs import dataset_in
from minecube.cube import Store
from minecube.cube.events import read_events
from minecube.errors import CubeError, WorkerError
from minecube.jobs.runs import RunOptions, driver
from minecube.jobs.runs.history import History
from minecube.jobs.runs.steps import Limits
from minecube.jobs.runs.units import Shard, Unit
from minecube.jobs.runs.worker import Result

Behave = Callable[[Unit, int], Result]
"""What becomes of an attempt at a unit. May raise."""


class KilledWorker(Exception):  # noqa: N818  the name of Dask
    """A worker died."""


class ScriptedEngine:
    """An engine without workers: each unit ends at once, as told."""

    workers = 2
    threads = 1

    def __init__(self, behave: Behave) -> None:
        self.behave = behave
        self.submitted: list[tuple[Unit, Limits, int]] = []

    def submit(self, unit: Unit, limits: Limits, attempt: int) -> Future[Result]:
        self.submitted.append((unit, limits, attempt))
        future: Future[Result] = Future()
        try:
            future.set_result(self.behave(unit, attempt))
        except CancelledError:
            future.cancel()
            future.set_running_or_notify_cancel()
        except Exception as error:
            future.set_exception(error)
        return future

    def is_death(self, error: BaseException) -> bool:
        return isinstance(error, KilledWorker)

    def close(self) -> None:
        pass

    def stop(self) -> None:
        pass


def drive(
    folder: Path, world: Path, behave: Behave, shard: Shard | None = None
) -> tuple[ScriptedEngine, driver.Summary]:
    """Send searches and builds of the tiny dataset through a scripted engine."""
    options = RunOptions(only=("search", "build"), shard=shard)
    plan = driver.make_plan(dataset_in(folder, world), options)
    engine = ScriptedEngine(behave)
    driver._Driver(plan, lambda *_: None).work(lambda: engine)
    return engine, plan.summary


def test_a_unit_that_kills_workers_fails_after_three_deaths(
    tmp_path: Path, run_world: Path
) -> None:
    """Its blocks get smaller each time. No other unit is tried again."""
    deadly = Unit("build", "pit", 2021)

    def behave(unit: Unit, _: int) -> Result:
        if unit == deadly:
            raise KilledWorker
        return Result(state="done")

    engine, summary = drive(tmp_path, run_world, behave)
    assert set(summary.failures) == {deadly}
    assert summary.failures[deadly].error_class == "memory"
    attempts = [
        (limits.block_fraction, n) for unit, limits, n in engine.submitted if unit == deadly
    ]
    assert attempts == [(1.0, 1), (0.5, 2), (0.25, 3)]
    counts = Counter(unit for unit, _, _ in engine.submitted)
    assert [unit for unit, count in counts.items() if count > 1] == [deadly]


def test_a_lost_scheduler_ends_the_run_in_one_sentence(tmp_path: Path, run_world: Path) -> None:
    def behave(unit: Unit, _: int) -> Result:
        if unit.step == "build":
            raise CancelledError
        return Result(state="done")

    with pytest.raises(WorkerError, match="scheduler is gone; committed site-years are safe"):
        drive(tmp_path, run_world, behave)


def test_a_unit_of_another_run_is_tried_again_until_it_is_free(
    tmp_path: Path, run_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "_BUSY_S", 0.0)
    tries: Counter[Unit] = Counter()

    def behave(unit: Unit, _: int) -> Result:
        tries[unit] += 1
        is_busy = unit == Unit("build", "pond", 2020) and tries[unit] < 4
        return Result(state="busy" if is_busy else "done")

    engine, summary = drive(tmp_path, run_world, behave)
    assert summary.exit_code == 0
    assert summary.count("build") == 4
    busy = [n for unit, _, n in engine.submitted if unit == Unit("build", "pond", 2020)]
    assert busy == [1, 1, 1, 1]  # an attempt counts only once it has begun


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(28, "No space left on device"), "disk"),
        (WorkerError("no worker is left with GPU=1"), "network"),
    ],
)
def test_an_error_of_the_engine_fails_its_unit_only(
    tmp_path: Path, run_world: Path, error: Exception, kind: str
) -> None:
    def behave(unit: Unit, _: int) -> Result:
        if unit.site == "pit":
            raise error
        return Result(state="done")

    _, summary = drive(tmp_path, run_world, behave)
    assert {unit.site for unit in summary.failures} == {"pit"}
    assert {result.error_class for result in summary.failures.values()} == {kind}
    assert summary.blocked == {"build": 2}
    assert summary.count("build") == 2


def test_a_failure_outside_its_unit_is_logged_without_credentials(
    tmp_path: Path, run_world: Path
) -> None:
    def behave(unit: Unit, _: int) -> Result:
        if unit.site == "pit":
            raise CubeError("https://me:word@host.example/a.tif?sig=SECRET answers HTTP 503")
        return Result(state="done")

    _, summary = drive(tmp_path, run_world, behave)
    text = "https://host.example/a.tif answers HTTP 503"
    assert {result.message for result in summary.failures.values()} == {text}
    history = History.from_events(read_events(Store(str(tmp_path / "cubes.zarr"))))
    failures = {unit: row.message for unit, row in history.failures()}
    searches = [Unit("search", "pit", year) for year in (2020, 2021)]
    assert failures == dict.fromkeys(searches, text)


def test_shards_divide_requests_among_them(tmp_path: Path, run_world: Path) -> None:
    def behave(*_: object) -> Result:
        return Result(state="done")

    engine, _ = drive(tmp_path, run_world, behave, Shard(1, 2))
    assert {limits.workers for _, limits, _ in engine.submitted} == {2}
    engine, _ = drive(tmp_path, run_world, behave)
    assert {limits.workers for _, limits, _ in engine.submitted} == {1}


def test_pauses_of_a_busy_unit_grow_to_a_minute(tmp_path: Path, run_world: Path) -> None:
    plan = driver.make_plan(dataset_in(tmp_path, run_world), RunOptions(only=("search",)))
    work = driver._Work(Unit("search", "pit", 2020), driver._Chain(iter([])))
    pauses = []
    for _ in range(7):
        future: Future[Result] = Future()
        future.set_result(Result(state="busy"))
        assert driver._Driver(plan, lambda *_: None)._read_result(future, work) is None
        pauses.append(work.pause_s)
    assert pauses == [2, 4, 8, 16, 32, 60, 60]
