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
from known_datasets import read_log, read_site, write_dataset

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


def wait_for(condition):
    until = time.monotonic() + 400
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.5)


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
    wait_for(lambda: not slurm_server.ask(["squeue", "-h"], slurm))
    log = (tmp_path / f"slurm-{last}.out").read_text()
    assert re.search(r"build +0 +2 +0 +0", log), log
    assert read_log(path)["event"].eq("end").sum() == 5
    assert (tmp_path / "results" / "audit" / "audit.parquet").exists()
    xr.testing.assert_identical(read_site(tmp_path), read_site(plain))
