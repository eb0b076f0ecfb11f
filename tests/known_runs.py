"""Datasets of the small simulated world, and events of runs that never took place."""

from __future__ import annotations

import yaml

from minecube.catalog import load_dataset
from minecube.cube import Store
from minecube.jobs.runs.inputs import open_log
from minecube.jobs.runs.worker import Result, log_end


def write_dataset(folder, world, **changes):
    """Write a dataset.yaml of `make_world` whose store and results lie in a folder."""
    content = {
        "id": "pits",
        "sites": str(world / "sites.geojson"),
        "years": "2020,2022",
        "sources": ["sim-earth-search"],
        "catalog": str(world / "archive"),
        "store": "cubes.zarr",
        "scenes": "scenes",
        "workers": 1,
    }
    path = folder / "dataset.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return path


def make_dataset(folder, world, **changes):
    return load_dataset(write_dataset(folder, world, **changes))


def log_failure(dataset, unit, error_class, message="broken", attempt=1):
    """Log an attempt at a unit that failed."""
    log = open_log(Store(dataset.store))
    log_start(log, unit, attempt)
    log_end(log, unit, attempt, Result(state="failed", error_class=error_class, message=message))


def log_start(log, unit, attempt=1):
    event = {"event": "start", "step": unit.step, "site": unit.site, "year": unit.year}
    log.write({**event, "attempt": attempt})
