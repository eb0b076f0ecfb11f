"""Measure what a run costs next to pixels, engine by engine. Part of `benchmarks/runs.py`."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import stac_geoparquet.arrow
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from known_scenes import Archive, grid_at, serve, site_of
from minecube import cube
from minecube.catalog import Dataset, load_dataset
from minecube.cube.events import read_events
from minecube.jobs.build import build_year
from minecube.jobs.runs import RunOptions, run
from minecube.jobs.runs.engines import open_engine
from minecube.jobs.runs.inputs import load_inputs
from minecube.jobs.runs.steps import Limits
from minecube.jobs.runs.units import Unit
from minecube.jobs.scene_lists import load_or_save

BANDS = ("B02", "B03", "B04")
_EMPTY_UNITS = 200
_EQUAL_YEARS = (2018, 2019, 2020, 2021)
_EQUAL_SITES = 6
"""Site-years of `two_workers_ratio`: 6 sites x 4 years."""
_EQUAL_DATES = 20
_DELAY_S = 0.04
_ROUNDS = 3
_IN_RUN_ROUNDS = 7


def make_dataset(
    folder: Path, sites: int, years: tuple[int, ...], side_px: int, dates: int, url: str = ""
) -> Path:
    """Write scenes, sites and a dataset.yaml with the steps search and build.

    Each site has scenes of its own, `dates` per year, in three bands. Items point into the folder,
    or at a server of it. Returns dataset.yaml.
    """
    archive = Archive(folder / "archive", bands=BANDS)
    places = []
    items = []
    rng = np.random.default_rng(0)
    smooth = rng.integers(20, 2500, (side_px // 4 + 16, side_px // 4 + 16)).astype(np.uint16)
    for number in range(sites):
        left = 300000 + 20 * (side_px + 80) * number
        places.append(site_of(f"mine_{number + 1}", left, 5600040, side_px, side_px))
        grid = grid_at(left - 120, 5600160, side_px + 40, side_px + 40)
        for year in years:
            for date in range(dates):
                when = f"{year}-{4 + date // 6:02d}-{3 + 4 * (date % 6):02d}T10:00:00"
                pixels = {
                    band: np.kron(smooth, np.ones((4, 4), np.uint16))[
                        : side_px + 40, : side_px + 40
                    ]
                    + np.uint16(10 * index + date)
                    for index, band in enumerate(BANDS)
                }
                # A tile of its own gives the scenes of each site other names.
                item = archive.item(when, grid, pixels, tile=f"33UU{'ABCDEF'[number]}")
                for asset in item.assets.values():
                    asset.href = asset.href.replace(str(folder), url or str(folder))
                items.append(item.to_dict())
    table = stac_geoparquet.arrow.parse_stac_items_to_arrow(items)
    stac_geoparquet.arrow.to_parquet(table, folder / "items.parquet")
    columns = {"id": [place.id for place in places], "margin": [0] * sites}
    shapes = [place.geometry for place in places]
    gpd.GeoDataFrame(columns, geometry=shapes, crs=4326).to_file(folder / "sites.geojson")
    return write_dataset(folder, years)


def write_dataset(folder: Path, years: tuple[int, ...], **changes: object) -> Path:
    """Write catalogue and dataset.yaml next to the scenes of `make_dataset`."""
    source = {
        "title": "benchmark",
        "kind": "stac-geoparquet",
        "href": "items.parquet",
        "collection": "test",
        "licence": "none",
        "assets": {band: band for band in (*BANDS, "SCL")},
    }
    recipe = {"title": "three bands", "bands": list(BANDS)}
    (folder / "sources.yaml").write_text(yaml.safe_dump({"bench": source}))
    (folder / "recipes.yaml").write_text(yaml.safe_dump({"bench": recipe}))
    content = {
        "id": "bench",
        "sites": "sites.geojson",
        "years": list(years),
        "catalog": ".",
        "sources": ["bench"],
        "recipe": "bench",
        "on_offset_conflict": "warn",
        "store": "cubes.zarr",
        **changes,
    }
    path = folder / "dataset.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


# Overhead of an engine


def measure_overhead(engine: str) -> float:
    """Return the seconds per empty unit through an engine, with one worker.

    An empty unit is a search whose list is saved already: lease, two events, and the list.
    """
    with tempfile.TemporaryDirectory() as name, _engine_address(engine, Path(name)) as address:
        dataset = load_dataset(make_dataset(Path(name), 1, (2020,), 48, 3))
        run(dataset, RunOptions(only=("search",)))
        dataset = replace(dataset, engine=address, workers=1 if address == "local" else None)
        unit = Unit("search", "mine_1", 2020)
        with open_engine(dataset, ["search"]) as workers:
            _wait_for([workers.submit(unit, Limits(), 1)])  # starts the worker
            start = time.perf_counter()
            # One after the other: two attempts at one unit would wait for its lease.
            for attempt in range(_EMPTY_UNITS):
                _wait_for([workers.submit(unit, Limits(), attempt + 2)])
            return (time.perf_counter() - start) / _EMPTY_UNITS


def _wait_for(tasks: list[Future[Any]]) -> None:
    wait(tasks)
    for task in tasks:
        result = task.result()
        if not result.is_good:
            raise RuntimeError(f"an empty unit failed: {result.message}")


@contextmanager
def _engine_address(engine: str, folder: Path) -> Iterator[str]:
    """Yield "local", or the address of a new Dask scheduler with one worker."""
    if engine == "local":
        yield "local"
        return
    from distributed import LocalCluster

    options = {"dashboard_address": "127.0.0.1:0", "local_directory": str(folder)}
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=True, **options) as cluster:
        yield str(cluster.scheduler_address)


# Two workers


def measure_two_workers() -> float:
    """Return the time of two workers divided by that of one, for equal site-years.

    Each request to the source takes 40 ms.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds: dict[int, list[float]] = {1: [], 2: []}
        with serve(folder, "--delay", _DELAY_S) as url:
            make_dataset(folder, _EQUAL_SITES, _EQUAL_YEARS, 96, _EQUAL_DATES, url)
            for number in range(_ROUNDS):
                for workers, times in seconds.items():
                    times.append(_time_run(folder, workers, number))
    return statistics.median(seconds[2]) / statistics.median(seconds[1])


def _time_run(folder: Path, workers: int, number: int) -> float:
    """Build all site-years into a new store, from lists that are saved. Returns seconds."""
    names = {"store": f"cubes-{workers}-{number}.zarr", "scenes": "scenes", "workers": workers}
    dataset = load_dataset(write_dataset(folder, _EQUAL_YEARS, **names))
    run(dataset, RunOptions(only=("search",)))
    start = time.perf_counter()
    summary = run(dataset, RunOptions(only=("build",)))
    if summary.exit_code:
        raise RuntimeError(f"the run failed: {summary.failures}")
    return time.perf_counter() - start


# A site-year inside a run


def measure_in_run() -> float:
    """Return the time of a site-year's build inside a run divided by that of the build alone.

    The site-year has 1024 x 1024 pixels and 40 dates. Rounds alternate.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_dataset(folder, 1, (2020,), 1024, 40)
        inside = []
        alone = []
        for number in range(_IN_RUN_ROUNDS):
            alone.append(_time_alone(folder, f"alone-{number}.zarr"))
            inside.append(_time_inside(folder, f"inside-{number}.zarr"))
    return statistics.median(inside) / statistics.median(alone)


def _time_inside(folder: Path, store: str) -> float:
    """Return the seconds of the build in the event log of a run."""
    options: dict[str, object] = {"store": store, "scenes": "scenes", "workers": 1}
    run(load_dataset(write_dataset(folder, (2020,), **options)))
    events = read_events(cube.Store(str(folder / store))).table
    return float(
        events.loc[(events["step"] == "build") & (events["event"] == "end"), "seconds"].iloc[0]
    )


def _time_alone(folder: Path, store: str) -> float:
    """Return the seconds of the same build in a process of its own."""
    code = f"import run_engines; run_engines.build_alone({str(folder)!r}, {store!r})"
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def build_alone(folder: str, store: str) -> None:
    """Composite and write a site-year without a run. Prints the seconds."""
    path = write_dataset(Path(folder), (2020,), store=store, scenes="scenes")
    dataset: Dataset = load_dataset(path)
    inputs = load_inputs(dataset)
    site = inputs.sites["mine_1"]
    with suppress(FileExistsError):
        load_or_save(site, 2020, inputs.job.sources, inputs.job.snapshots)
    from minecube.grid import grid_of
    from minecube.jobs.processes import count_cores

    start = time.perf_counter()
    cube.create_site(inputs.store, site, grid_of(site), dataset.years, inputs.job.recipe)
    outcome = build_year(inputs.job, site, 2020, count_cores())
    if outcome.state != "built":
        raise RuntimeError(outcome.message)
    print(time.perf_counter() - start)
