"""Each workflow run on a small world makes the same cubes as the plain command."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import geopandas as gpd
import pytest
import xarray as xr
from click.testing import CliRunner

from minecube.cli import cli
from minecube.simulate import World, simulate

WORKFLOWS = Path(__file__).parents[1] / "workflows"


@pytest.fixture(scope="module")
def world(tmp_path_factory, make):
    """Two small sites in one archive, built by the plain command."""
    folder = tmp_path_factory.mktemp("world")
    sites = [make.site("north", 360000, 5600040, 60, 48), make.site("south", 363000, 5590020, 48, 60)]
    simulate(sites, folder / "archive", World(years=(2022,), dates_per_year=4, winter_dates=0, styles=("planetary-computer",)))
    table = gpd.GeoDataFrame({"id": [s.id for s in sites]}, geometry=[s.geometry for s in sites], crs=4326)
    table.to_file(folder / "archive" / "sites.geojson")
    done = CliRunner().invoke(cli, ["build", "--sites", "north,south", "--store", str(folder / "plain.zarr"), *common(folder)])
    assert done.exit_code == 0, done.output
    return folder


def common(folder):
    return ["--years", "2022", "--catalog", str(folder / "archive"), "--source", "sim-planetary-computer"]


def assert_same(one, other, names):
    for name in names:
        a, b = (xr.open_zarr(s, group=name, consolidated=False).load() for s in (one, other))
        assert (a.reflectance > 0).any()
        xr.testing.assert_identical(a, b)


def test_on_worker_processes(world):
    store = world / "cluster.zarr"
    arguments = ["--workers", "2", "--", "--sites", "north,south", "--store", str(store), *common(world)]
    done = subprocess.run(
        [sys.executable, str(WORKFLOWS / "cluster.py"), *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("built") == 2
    assert_same(store, world / "plain.zarr", ["north", "south"])


def test_as_a_job_array(world, tmp_path):
    """As SLURM runs it: one task a line, in any order; a task that runs twice changes nothing."""
    (tmp_path / "sites.txt").write_text("north\nsouth\n")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = {"YEARS": "2022", "SOURCE": "sim-planetary-computer", "CATALOG": str(world / "archive"), "STORE": "cubes.zarr"}
    for task, state in (("2", "built"), ("1", "built"), ("2", "kept")):
        done = subprocess.run(
            ["bash", str(WORKFLOWS / "slurm_array.sh")],
            cwd=tmp_path,
            env={**os.environ, **settings, "PATH": path, "SLURM_ARRAY_TASK_ID": task},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert state in done.stdout
    assert_same(tmp_path / "cubes.zarr", world / "plain.zarr", ["north", "south"])


def test_the_cron_line_is_a_command_of_ours():
    lines = [line for line in (WORKFLOWS / "crontab").read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) == 1
    words = shlex.split(lines[0].split("&&")[1].split(">>")[0])
    assert words[0].endswith("bin/minecube")
    words[words.index("--years") + 1] = "2024"
    done = CliRunner().invoke(cli, [*words[1:], "--dry-run"])
    assert "no such file; expected polygons of sites" in done.output  # all options are known, only the user's file is not there
