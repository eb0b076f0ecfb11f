"""Measure what whole runs cost beside pixels.

    python benchmarks/runs.py [--json FILE] [--sites 133]

The sites are squares of 48 pixels next to each other, over one simulated archive of two years.
Such sites have few pixels, so most of a run's time is overhead.

rerun_ms_per_site_year    CPU time of a second `minecube build`, after a first build of everything
first_ms_per_site_year    CPU time of that first build

CPU times are those of the whole command, with its start, in milliseconds per site-year.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geopandas as gpd
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
_INSET_M = 5  # keeps corners within a pixel, so that grids have the given size


def main() -> None:
    """Measure all figures, print them and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures to this JSON file")
    parser.add_argument(
        "--sites", type=int, default=SITES, help=f"number of tiny sites ({SITES}, at most 144)"
    )
    options = parser.parse_args()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    figures: dict[str, Any] = {"machine": machine, "sites": options.sites, "years": len(YEARS)}
    with tempfile.TemporaryDirectory() as folder:
        make_world(Path(folder), options.sites)
        figures |= measure_rerun(Path(folder), options.sites)
    print(format_table(("figure", "value"), list(figures.items())))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


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
