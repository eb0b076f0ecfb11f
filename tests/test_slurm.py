"""Runs on a real SLURM of one node, started here; skipped where it cannot run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import xarray as xr

import slurm_server
from known_builds import args, run_here
from known_datasets import begun_builds, blocked_builds, read_log, read_site, write_dataset

SCRIPT = Path(__file__).parents[1] / "workflows" / "slurm_array.sh"
RUN = [sys.executable, "-c", "from minecube.cli import main; main()", "run"]
ENTRY = {
    "title": "One small job",
    "kind": "slurm",
    "workers": 1,
    "memory_gb": 1,
    "wait_minutes": 5,
    "resources": {"build": {"CORE": 1}},
    "slurm": {"walltime": "00:10:00", "setup": ["export MARK=set"]},
}


@pytest.fixture(scope="module")
def slurm():
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:  # sockets need short paths
        try:
            with slurm_server.slurm(Path(folder)) as env:
                env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
                yield env
        except slurm_server.Unavailable as missing:
            pytest.skip(str(missing))


@pytest.fixture(scope="module")
def plain(world, tmp_path_factory):
    """The folder of the same cubes, built without SLURM."""
    folder = tmp_path_factory.mktemp("plain")
    run_here("build", *args(world, folder / "cubes.zarr"))
    return folder


def call(command, env, cwd, ok=0):
    done = subprocess.run(
        [str(word) for word in command],
        env=env,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == ok, f"{done.stdout}\n{done.stderr}"
    return done.stdout, done.stderr


def wait_for(condition, slurm, folder):
    """Wait until a condition holds. After 300 s, fail with the queue and the logs of the jobs."""
    until = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < until, describe_jobs(slurm, folder)
        time.sleep(0.5)


def describe_jobs(slurm, folder):
    """The queue, and the end of each log: of the jobs and of SLURM's servers."""
    servers = Path(slurm["SLURM_CONF"]).parent.glob("slurm*d.log")
    logs = [*sorted(folder.glob("slurm-*.out")), *sorted(servers)]
    ends = [f"{path.name}:\n{path.read_text()[-2000:]}" for path in logs]
    return "\n".join([slurm_server.ask(["squeue"], slurm), *ends])


def test_workers_are_jobs(world, plain, slurm, tmp_path):
    entry = {**ENTRY, "slurm": {**ENTRY["slurm"], "logs": str(tmp_path / "logs")}}
    path = write_dataset(world, tmp_path, {"small": entry}, engine="small")
    _, err = call([*RUN, path], slurm, tmp_path)
    assert "dashboard of engine small: http://" in err
    assert read_log(path)["event"].eq("end").sum() == 5
    assert len(list((tmp_path / "logs").glob("minecube-*.err"))) == 1
    assert not slurm_server.ask(["squeue", "-h"], slurm)
    xr.testing.assert_identical(read_site(tmp_path), read_site(plain))


@pytest.mark.parametrize(
    ("job", "sentence"),
    [
        ({"queue": "nowhere"}, "invalid partition specified: nowhere"),
        ({"directives": ["--hold"]}, "engine small: no worker for 0.1 minutes; see `squeue`"),
    ],
)
def test_jobs_that_never_start_are_one_sentence(world, slurm, tmp_path, job, sentence):
    entry = {**ENTRY, "wait_minutes": 0.1, "slurm": job}
    path = write_dataset(world, tmp_path, {"small": entry}, engine="small")
    _, err = call([*RUN, path], slurm, tmp_path, ok=2)
    assert sentence in err
    assert sum(line.startswith("error: ") for line in err.splitlines()) == 1
    assert not (tmp_path / "cubes.zarr").exists()
    assert not slurm_server.ask(["squeue", "-h"], slurm)


def submit(path, slurm, parts):
    """Submit the arrays; the three numbers of the jobs."""
    out, _ = call(["bash", SCRIPT, path, parts], slurm, path.parent)
    return re.search(r"submitted (\d+), (\d+) and (\d+);", out).groups()


def test_a_job_array_without_a_scheduler_process(world, plain, slurm, tmp_path):
    path = write_dataset(world, tmp_path)
    *_, last = submit(path, slurm, 2)
    wait_for(lambda: not slurm_server.ask(["squeue", "-h"], slurm), slurm, tmp_path)
    log = (tmp_path / f"slurm-{last}.out").read_text()
    assert re.search(r"build +0 +2 +0 +0", log), log
    assert read_log(path)["event"].eq("end").sum() == 5
    assert (tmp_path / "results" / "audit" / "audit.parquet").exists()
    xr.testing.assert_identical(read_site(tmp_path), read_site(plain))


@pytest.mark.slow
def test_a_task_at_its_time_limit_requeues_only_itself(world, slurm, tmp_path):
    """The last task of an array has the number of the whole array as its own."""
    path = write_dataset(world, tmp_path)

    def ask(*words):
        return slurm_server.ask(["squeue", "-h", *words], slurm)

    with blocked_builds(path) as release:
        first, second, last = submit(path, slurm, 2)
        wait_for(lambda: begun_builds(path), slurm, tmp_path)
        # All builds belong to one site and so to one task. The other one ends by itself.
        wait_for(lambda: ask("-j", first, "-r", "-o", "%T") == "RUNNING", slurm, tmp_path)
        task = ask("-j", first, "-o", "%K")
        # SLURM sends this signal two minutes before the time limit.
        call(["scancel", "--batch", "--signal=USR1", f"{first}_{task}"], slurm, tmp_path)
        wait_for(lambda: read_restarts(slurm, first), slurm, tmp_path)
        assert read_restarts(slurm, first) == {task}
        release()
    wait_for(lambda: ask("-j", f"{first}_{task}", "-o", "%T") == "PENDING", slurm, tmp_path)
    # SLURM keeps a requeued job back for two minutes. Shorten this, but not to nothing: a node refuses
    # a job that starts in the second in which its earlier attempt was killed.
    start = "StartTime=now+3seconds"
    call(["scontrol", "update", f"JobId={first}_{task}", start], slurm, tmp_path)
    # The arrays that follow are those of the test above.
    call(["scancel", second, last], slurm, tmp_path)
    log = tmp_path / f"slurm-{first}_{task}.out"
    resumed = re.compile(rf"requeue {first}_{task}\n(.*\n)*build +[12] +0 +0 +0")
    wait_for(lambda: resumed.search(log.read_text()), slurm, tmp_path)
    wait_for(lambda: not ask(), slurm, tmp_path)
    assert read_restarts(slurm, first) == {task}


def read_restarts(slurm, array):
    """Tasks of an array that were requeued."""
    text = slurm_server.ask(["scontrol", "show", "job", array, "--oneliner"], slurm)
    jobs = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in text.splitlines()]
    return {job["ArrayTaskId"] for job in jobs if job.get("Restarts", "0") != "0"}
