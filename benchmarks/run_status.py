"""Measure `status` on simulated markers and event logs. Part of `benchmarks/runs.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import geopandas as gpd
import msgspec
import shapely
import yaml

from minecube import cube
from minecube.catalog import Site
from minecube.cube.events import RUNS
from minecube.cube.markers import marker_path
from minecube.cube.provenance import describe_grid
from minecube.grid import grid_of

_WORKERS = 64
"""Event logs of the simulated run."""
_MOST_LINKS = 30_000  # ext4 allows 65,000 names per file
_SCENES = 40
_SQUARE = shapely.box(10.0, 45.0, 10.03, 45.02)
_CHILD = """
import json, resource, sys, time
from pathlib import Path
from minecube.catalog import load_dataset
from minecube.jobs.status import read_status
dataset = load_dataset(Path(sys.argv[1]))
start = time.perf_counter()
status = read_status(dataset)
seconds = time.perf_counter() - start
peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
print(json.dumps({"s": seconds, "mb": peak_mb}))
"""


def measure_status(sites: int, years: int) -> dict[str, float]:
    """Return seconds and peak memory in MB of `read_status` on a simulated finished dataset.

    Raises RuntimeError if it fails.
    """
    with tempfile.TemporaryDirectory() as name:
        path = simulate_run(Path(name), sites, tuple(range(2025 - years, 2025)))
        command = [sys.executable, "-c", _CHILD, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"read_status failed: {done.stderr[-1000:]}")
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def simulate_run(folder: Path, sites: int, years: tuple[int, ...]) -> Path:
    """Write sites, markers and event logs as a finished run leaves them.

    Markers are hard links to a few files: their content is the same but for site and year, which
    `status` takes from the path. Returns the path of dataset.yaml.
    """
    names = [f"mine_{number + 1}" for number in range(sites)]
    squares = [_SQUARE] * sites  # one place, since all sites share their markers
    frame = gpd.GeoDataFrame({"id": names, "margin": 0}, geometry=squares, crs=4326)
    frame.to_parquet(folder / "sites.parquet")
    store = folder / "cubes.zarr"
    store.mkdir()
    (store / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    _write_markers(store, names, years)
    _write_events(store, names, years)
    content = {
        "id": "simulated",
        "sites": "sites.parquet",
        "years": list(years),
        "sources": ["earth-search"],
        "store": "cubes.zarr",
    }
    path = folder / "dataset.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def describe_marker(year: int) -> dict[str, Any]:
    """Return a marker with the fields that `status` reads, and with 40 scenes for its size."""
    from importlib import metadata

    from minecube.catalog import as_dict, load_recipes

    scene = {
        "id": f"S2A_33UUR_{year}0501_0_L2A",
        "datetime": f"{year}-05-01T10:00:00Z",
        "source": "earth-search",
        "baseline": "05.00",
        "offset": -1000,
        "offset_reason": "baseline 04.00 or later, not applied",
        "shift_m": [0.0, 0.0],
    }
    return {
        "build_id": "0123456789abcdef",
        "sha256": "0" * 64,
        "committed": "2026-01-01T00:00:00+00:00",
        "version": metadata.version("minecube"),
        "recipe": as_dict(load_recipes()["annual-median"]),
        "snapshot": "0" * 64,
        "grid": describe_grid(grid_of(Site(id="mine_1", geometry=_SQUARE))),
        "reads": {"planned": 900, "lost": 0, "bytes": 3e7, "requests": 900, "completeness": 1.0},
        "took": {"seconds": 60.0},
        "scenes": [scene] * _SCENES,
    }


def _write_markers(store: Path, names: list[str], years: tuple[int, ...]) -> None:
    for year in years:
        content = msgspec.json.encode({"attributes": describe_marker(year)})
        for number, site in enumerate(names):
            folder = f"{store}/{marker_path(site, year)}"
            os.makedirs(folder)  # noqa: PTH103  called for each site-year
            path = f"{folder}/zarr.json"
            if number % _MOST_LINKS == 0:
                source = path
                Path(source).write_bytes(content)
            else:
                os.link(source, path)


def _write_events(store: Path, names: list[str], years: tuple[int, ...]) -> None:
    """Write start and end of each search and build, divided among the workers."""
    folder = store / RUNS / "events"
    folder.mkdir(parents=True)
    units = [(site, year) for site in names for year in years]
    common = {"machine": "node", "system": "Python 3.12, Linux", "attempt": 1}
    end = {"state": "done", "seconds": 60.0, "peak_mb": 900.0, "bytes": 3e7, "requests": 900.0}
    end |= {"retried": 0.0, "lost": 0.0, "version": "0.1.0"}
    for worker in range(_WORKERS):
        name = f"node-{worker}-abcdef"
        with (folder / f"{name}.jsonl").open("wb") as file:
            for site, year in units[worker::_WORKERS]:
                for step in ("search", "build"):
                    unit = {"step": step, "site": site, "year": year, "worker": name, **common}
                    start = {"event": "start", **unit, "time": "2026-01-01T00:00:00.000+00:00"}
                    last = {"event": "end", **unit, **end, "time": "2026-01-01T00:01:00.000+00:00"}
                    file.write(
                        b"\n" + msgspec.json.encode(start) + b"\n" + msgspec.json.encode(last)
                    )


def open_simulated(folder: Path) -> cube.Store:
    """Open the store of a simulated run."""
    return cube.Store(str(folder / "cubes.zarr"))
