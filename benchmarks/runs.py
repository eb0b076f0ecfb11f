"""Measure what whole runs cost beside pixels, and what survives kills.

    python benchmarks/runs.py --json FILE
    python benchmarks/runs.py --only rerun,status_1330 --sites 133

`--only` names the measurements:

rerun          rerun_ms_per_site_year: CPU time of a second `minecube build`, after a first build of
               everything; first_ms_per_site_year: CPU time of that first build
overhead_local, overhead_dask
               overhead_*_s: seconds per empty unit of a run through an engine with one worker
overhead_dagster
               overhead_dagster_s: seconds per site-year that is built already, in runs of Dagster's
               daemon for new sites with ten years, from launch to end, with the start of a process
two_workers    two_workers_ratio: time of two worker processes for 24 equal site-years divided by
               that of one; each request takes 40 ms
in_run         in_run_ratio: time of a site-year of 1024 x 1024 pixels and 40 dates inside a run
               divided by that of the same build alone
status_1330, status_450000
               status_*_s, status_*_mb: seconds and peak memory of `status`, on simulated markers
               and event logs
kills          kills, kills_identical: random SIGKILLs, full disks and lost stores, and after how
               many of them a later run made the same results (tests/chaos/kills_of_runs.py)
reads          mixed_reads: reads during updates that saw a mixture of two builds (mixed_reads.py)
mission        slowest_step, slowest_step_s: the command that takes longest on 133 sites and 10 years
               of tiny grids, of those that neither composite nor map (mission.py)

The sites of `rerun` are squares of 48 pixels next to each other, over one simulated archive of two
years. Such sites have few pixels, so most of a run's time is overhead. CPU times are those of the
whole command, with its start, in milliseconds per site-year. Use an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geopandas as gpd
import mission
import mixed_reads
import run_dagster
import run_engines
import run_status
import shapely
from pyproj import Transformer

from minecube.catalog import Site
from minecube.jobs.tables import format_table
from minecube.simulate import World, simulate_archive

SITES = 133
"""Number of sites, as in EuroMineNet."""
YEARS = (2020, 2021)
SIDE_M = 480
_PER_ROW = 12
_CRS = 32633
_CORNER_M = (360000, 5600040)  # of the first site
Figures = dict[str, Any]
_INSET_M = 5  # keeps corners within a pixel, so that grids have the given size


def main() -> None:
    """Measure the chosen figures, print them and write the JSON."""
    options = _parse_options()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    figures: dict[str, Any] = {"machine": machine}
    for name in options.only.split(","):
        figures |= MEASUREMENTS[name](options)
        print(f"{name} done", file=sys.stderr, flush=True)
    print(format_table(("figure", "value"), list(figures.items())))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures to this JSON file")
    parser.add_argument(
        "--only", default=",".join(MEASUREMENTS), help="measurements, comma-separated (all)"
    )
    parser.add_argument(
        "--sites", type=int, default=SITES, help=f"number of tiny sites ({SITES}, at most 144)"
    )
    parser.add_argument("--kills", type=int, default=200, help="number of kills (200)")
    parser.add_argument("--reads", type=int, default=10_000, help="reads during rebuilds (10000)")
    options = parser.parse_args()
    unknown = set(options.only.split(",")) - MEASUREMENTS.keys()
    if unknown:
        parser.error(f"--only {min(unknown)}: expected some of {', '.join(MEASUREMENTS)}")
    return options


def _measure_rerun(options: argparse.Namespace) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        make_world(Path(folder), options.sites)
        figures = measure_rerun(Path(folder), options.sites)
    return {"sites": options.sites, "years": len(YEARS), **figures}


def _measure_overhead_local(_: argparse.Namespace) -> Figures:
    return {"overhead_local_s": run_engines.measure_overhead("local")}


def _measure_overhead_dask(_: argparse.Namespace) -> Figures:
    return {"overhead_dask_s": run_engines.measure_overhead("dask")}


def _measure_overhead_dagster(_: argparse.Namespace) -> Figures:
    return {"overhead_dagster_s": run_dagster.measure_overhead()}


def _measure_two_workers(_: argparse.Namespace) -> Figures:
    return {"two_workers_ratio": run_engines.measure_two_workers()}


def _measure_in_run(_: argparse.Namespace) -> Figures:
    return {"in_run_ratio": run_engines.measure_in_run()}


def _measure_status_1330(_: argparse.Namespace) -> Figures:
    measured = run_status.measure_status(sites=133, years=10)
    return {f"status_1330_{unit}": value for unit, value in measured.items()}


def _measure_status_450000(_: argparse.Namespace) -> Figures:
    measured = run_status.measure_status(sites=45_000, years=10)
    return {f"status_450000_{unit}": value for unit, value in measured.items()}


def _measure_kills(options: argparse.Namespace) -> Figures:
    campaign = Path(__file__).parents[1] / "tests" / "chaos" / "kills_of_runs.py"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "tally.json"
        words = ["--kills", str(options.kills), "--json", str(out)]
        # It exits with 1 if it has found problems, and they are in its tally.
        subprocess.run([sys.executable, str(campaign), *words], check=False)
        tally = json.loads(out.read_text())
    return {name: tally[name] for name in ("kills", "kills_identical")}


def _measure_reads(options: argparse.Namespace) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        counts = mixed_reads.count_mixed_reads(Path(folder), options.reads)
    return {"mixed_reads": counts["mixed_reads"]}


def _measure_mission(options: argparse.Namespace) -> Figures:
    figures = mission.measure_mission(options.sites, len(mission.YEARS))
    return {name: figures[name] for name in ("slowest_step", "slowest_step_s")}


MEASUREMENTS: dict[str, Callable[[argparse.Namespace], Figures]] = {
    "rerun": _measure_rerun,
    "overhead_local": _measure_overhead_local,
    "overhead_dask": _measure_overhead_dask,
    "overhead_dagster": _measure_overhead_dagster,
    "two_workers": _measure_two_workers,
    "in_run": _measure_in_run,
    "status_1330": _measure_status_1330,
    "status_450000": _measure_status_450000,
    "kills": _measure_kills,
    "reads": _measure_reads,
    "mission": _measure_mission,
}


# A world of tiny sites


def make_world(folder: Path, count: int) -> None:
    """Simulate an archive in `folder`/archive, and write `folder`/sites.geojson with tiny sites."""
    squares = [_place_square(number, SIDE_M) for number in range(count)]
    names = [f"mine_{number + 1}" for number in range(count)]
    sites = gpd.GeoDataFrame({"id": names, "margin": 0}, geometry=squares, crs=4326)
    sites.to_file(folder / "sites.geojson")
    whole = Site(id="whole", geometry=shapely.box(*sites.total_bounds))
    simulate_archive(
        [whole], folder / "archive", World(years=YEARS, dates_per_year=12, styles=("earth-search",))
    )


def _place_square(number: int, side_m: int) -> shapely.Polygon:
    row, column = divmod(number, _PER_ROW)
    west = _CORNER_M[0] + column * side_m
    north = _CORNER_M[1] - row * side_m
    square = shapely.box(west, north - side_m, west + side_m, north).buffer(
        -_INSET_M, join_style="mitre"
    )
    to_degrees = Transformer.from_crs(_CRS, 4326, always_xy=True).transform
    return shapely.transform(square, to_degrees, interleaved=False)


# A run with nothing to do


@dataclass(frozen=True)
class Usage:
    """Resources used by a command."""

    cpu_s: float
    wall_s: float
    output: str


def measure_rerun(folder: Path, sites: int) -> dict[str, float]:
    """Build all site-years of a world twice. Returns the figures of both builds.

    Raises RuntimeError if a site-year is not built by the first run and kept by the second.
    """
    site_years = sites * len(YEARS)
    figures = {}
    for name, state in (("first", "built"), ("rerun", "kept")):
        usage = run_build(folder)
        count = usage.output.split().count(state)
        if count != site_years:
            raise RuntimeError(f"{name} run: expected {site_years} {state}, found {count}")
        figures[f"{name}_ms_per_site_year"] = 1000 * usage.cpu_s / site_years
        figures[f"{name}_wall_s"] = usage.wall_s
    return figures


def run_build(folder: Path) -> Usage:
    """Run `minecube build` over a world, in a process of its own.

    Raises RuntimeError if the command fails.
    """
    command = [sys.executable, "-c", "from minecube.cli import main; main()", "build"]
    command += ["--sites", str(folder / "sites.geojson"), "--years", ",".join(map(str, YEARS))]
    command += ["--catalog", str(folder / "archive"), "--source", "sim-earth-search"]
    command += ["--store", str(folder / "cubes.zarr")]
    before = _children_cpu_s()
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wall_s = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"minecube build failed: {done.stderr[-1000:]}")
    return Usage(_children_cpu_s() - before, wall_s, done.stdout)


def _children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
