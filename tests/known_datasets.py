"""Datasets of the small simulated world, for runs on engines."""

from __future__ import annotations

import contextlib
from pathlib import Path

import yaml

from minecube import cube
from minecube.catalog import load_dataset
from minecube.cube.events import read_events
from minecube.cube.locks import hold


def write_dataset(world, folder, clusters=None, **keys):
    """A dataset.yaml in its own folder, with a catalogue of the world's source and of clusters."""
    catalog = folder / "catalog"
    catalog.mkdir(parents=True)
    sources = yaml.safe_load((world / "archive" / "sources.yaml").read_text())
    for source in sources.values():
        source["href"] = str(world / "archive" / source["href"])
    (catalog / "sources.yaml").write_text(yaml.safe_dump(sources))
    if clusters:
        (catalog / "clusters.yaml").write_text(yaml.safe_dump(clusters))
    content = {
        "id": "pits",
        "sites": str(world / "sites.geojson"),
        "years": "2020,2022",
        "sources": ["sim-earth-search"],
        "store": "cubes.zarr",
        "catalog": "catalog",
    }
    path = folder / "dataset.yaml"
    path.write_text(yaml.safe_dump({**content, **keys}))
    return path


def read_site(folder, site="pit"):
    """The cube that a run has made in its folder."""
    return cube.open_committed(cube.Store(folder / "cubes.zarr"), site).load()


def read_log(path: Path):
    """Starts and ends of a dataset's units."""
    return read_events(cube.Store(load_dataset(path).store)).table


def begun_builds(path):
    """Process numbers of the workers that have begun a build."""
    started = read_log(path).query("event == 'start' and step == 'build'")
    return [int(worker.split("-")[-2]) for worker in started["worker"]]


@contextlib.contextmanager
def blocked_builds(path):
    """Keep every build in work: the site's metadata are locked. Yields their release."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(hold(cube.Store(load_dataset(path).store), "pit"))
        yield stack.close
