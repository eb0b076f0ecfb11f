"""The Dagster workflow, in a process of its own and through Dagster's daemon."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import xarray as xr

from known_builds import args, run_here
from known_datasets import read_log, read_site, write_dataset

pytest.importorskip("dagster")

WORKFLOWS = Path(__file__).parents[1] / "workflows"
FILE = WORKFLOWS / "dagster_dataset.py"
SECRET = "wJalrXUtnFEMI7MDENGbPxRfiCYEXAMPLEKEY"
# 2021 has no scenes: it fails, and a repetition is no use.
YEARS = "2020-2022"
IN_PROCESS = """
import dagster as dg
import dagster_dataset as workflow

def main():
    with dg.instance_for_test() as instance:
        first = workflow.new_sites(dg.build_sensor_context(instance=instance))
        for request in first.dynamic_partitions_requests:
            instance.add_dynamic_partitions(request.partitions_def_name, request.partition_keys)
        print("new", [request.tags for request in first.run_requests])
        second = workflow.new_sites(dg.build_sensor_context(instance=instance))
        print("again", second.run_requests)
        january = workflow.each_january(dg.build_schedule_context(instance=instance))
        print("january", [str(request.partition_key) for request in january])
        for year in ("2020", "2021"):
            run = dg.materialize(
                [workflow.site_year],
                instance=instance,
                partition_key=dg.MultiPartitionKey({"site": "pit", "year": year}),
                tags={"dagster/backfill": "b"},
                raise_on_error=False,
            )
            print(year, run.success)
            for made in run.asset_materializations_for_node("site_year"):
                print({key: str(value.value)[:60] for key, value in made.metadata.items()})
        print("backfill", dict(workflow.count_backfill(instance, "b")))
        (request,) = first.run_requests
        run = dg.materialize(
            [workflow.site_year], instance=instance, tags=request.tags, raise_on_error=False
        )
        print("range", run.success)
        states = instance.get_status_by_partition(
            workflow.site_year.key, ["pit|2020", "pit|2021", "pit|2022"], workflow.site_years
        )
        print("states", [state.value for state in states.values()])
        run = dg.materialize(
            [workflow.site_year, workflow.results],
            instance=instance,
            tags={**request.tags, "dagster/asset_partition_range_start": "pit|2022"},
            raise_on_error=False,
        )
        made = run.asset_materializations_for_node("site_year")
        print("both", [(event.partition, sorted(event.metadata)) for event in made])
        failed = [event.step_key for event in run.all_events if event.is_step_failure]
        print("both failed", failed)
        print("results", dg.materialize([workflow.results], instance=instance, raise_on_error=False).success)

if __name__ == "__main__":
    main()
"""


def make_home(world, folder):
    """A dataset and a home of Dagster; the environment of its commands."""
    dataset = write_dataset(world, folder / "mines", years=YEARS, workers=1)
    home = folder / "home"
    home.mkdir()
    shutil.copy(WORKFLOWS / "dagster.yaml", home)
    path = os.pathsep.join([str(WORKFLOWS), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "DAGSTER_HOME": str(home)}
    return env | {"MINECUBE_DATASET": str(dataset), "AWS_SECRET_ACCESS_KEY": SECRET}


def call(words, env, ok=0):
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        env=env,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == ok, f"{done.stdout}\n{done.stderr[-3000:]}"
    return done.stdout


def assert_built(world, folder):
    """Compare the cubes with those of the plain command, and look for the secret everywhere."""
    (folder / "plain").mkdir()
    run_here("build", *args(world, folder / "plain" / "cubes.zarr"))
    cubes = read_site(folder / "mines")
    plain = read_site(folder / "plain")
    both = cubes.reflectance.sel(year=plain.year)
    xr.testing.assert_identical(both.drop_attrs(), plain.reflectance.drop_attrs())
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_partitions_schedules_and_metadata(world, tmp_path):
    env = make_home(world, tmp_path)
    script = tmp_path / "in_process.py"
    script.write_text(IN_PROCESS)
    out = call([script], env)
    first, last = (f"'dagster/asset_partition_range_{end}" for end in ("start", "end"))
    assert f"new [{{{first}': 'pit|2020', {last}': 'pit|2022'}}]" in out
    assert "again []" in out
    assert "january ['pit|2022']" in out
    assert "2020 True" in out
    assert "'pixels': '11520'" in out
    assert "'quicklook': '![pit 2020](data:image/png;base64,iVBOR" in out
    assert "2021 False" in out
    assert "backfill {'FAILURE': 1, 'SUCCESS': 1}" in out
    assert "range False" in out
    assert "states ['MATERIALIZED', 'FAILED', 'MATERIALIZED']" in out
    names = ["mean clear observations", "observed pixels", "pixels", "quicklook"]
    assert f"both [('pit|2022', {names})]" in out
    assert "both failed ['results']" in out  # it has begun, and 2021 is missing
    assert "results False" in out  # 2021 is missing, but 2022 is built
    searches = read_log(Path(env["MINECUBE_DATASET"])).query("step == 'build' and event == 'end'")
    assert searches[searches["state"] == "done"]["year"].tolist() == [2020, 2022]
    assert_built(world, tmp_path)


@contextlib.contextmanager
def daemon(env, log):
    words = ["-c", "from dagster._daemon.cli import main; main()", "run", "-f", FILE]
    with log.open("w") as out:
        options = {"env": env, "stdout": out, "stderr": out, "start_new_session": True}
        process = subprocess.Popen([sys.executable, *words], **options)
        try:
            yield
        finally:
            # Its code server would go on for 20 seconds and write to the home.
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def dagster(*words):
    return ["-m", "dagster", *words]


def wait_for(condition, log):
    """Wait until a condition holds. After 300 s, fail with the end of the daemon's log."""
    until = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < until, log.read_text()[-3000:]
        time.sleep(1)


@pytest.mark.slow
def test_the_daemon_builds_new_sites_and_a_backfill_reports_failures(world, tmp_path):
    env = make_home(world, tmp_path)
    log = tmp_path / "daemon.log"
    call(dagster("sensor", "start", "-f", FILE, "new_sites"), env)
    with daemon(env, log):
        wait_for(lambda: len(read_ends(Path(env["MINECUBE_DATASET"]))) == 3, log)
        words = ("-j", "build_site_years", "--partitions", "pit|2020,pit|2021", "--noprompt")
        out = call(dagster("job", "backfill", "-f", FILE, *words), env)
        backfill = re.search(r"Launched backfill job `(\w+)`", out)[1]
        # One run for the new site, and one for each partition of the backfill.
        wait_for(lambda: len(re.findall("RUN_SUCCESS|RUN_FAILURE", log.read_text())) == 3, log)
        counts = call([FILE, backfill], env, ok=1)
    assert sorted(counts.strip().split(", ")) == ["1 FAILURE", "1 SUCCESS"]
    assert_built(world, tmp_path)


def read_ends(dataset):
    """Site-years that are built or have failed."""
    ends = read_log(dataset).query("event == 'end'")
    return {*ends.query("step == 'build' or state == 'failed'")["year"]}
