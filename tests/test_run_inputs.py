"""Workers that outlive a run: each run sees the files as they are now."""

from __future__ import annotations

import hashlib
from pathlib import Path

from known_runs import copy_dataset, dataset_in, write_polygons
from minecube.cube import Store
from minecube.jobs.runs.finished import read_finished
from minecube.jobs.runs.inputs import hash_file, join_run
from minecube.jobs.runs.steps import Limits
from minecube.jobs.runs.units import Unit
from minecube.jobs.runs.worker import run_unit


def test_a_file_is_read_again_for_the_next_run_only(tmp_path: Path) -> None:
    path = tmp_path / "mines.gpkg"
    old, new = (hashlib.sha256(content).hexdigest() for content in (b"old", b"new"))
    path.write_bytes(b"old")
    join_run("first")
    assert hash_file(str(path)) == old
    path.write_bytes(b"new")
    join_run("first")
    assert hash_file(str(path)) == old  # one run has one answer
    join_run("second")
    assert hash_file(str(path)) == new


def test_a_worker_that_outlives_a_run_labels_with_corrected_polygons(
    finished_run: Path, run_world: Path, tmp_path: Path
) -> None:
    """The same process works for both runs, as a Dask worker does."""
    polygons = tmp_path / "mines.geojson"
    folder = copy_dataset(finished_run, tmp_path / "copied")
    dataset = dataset_in(folder, run_world, labels={"file": str(polygons)})
    notes = []
    for name, shrink_degrees in (("first", 0.001), ("second", 0.002)):
        write_polygons(polygons, shrink_degrees)
        assert run_unit(dataset, Unit("label", "pit"), Limits(run=name), 1).is_good
        notes.append(read_finished(Store(dataset.store), "label", "pit"))
    assert notes[0]["outputs"] != notes[1]["outputs"]
