"""Requests to an object store to find out what a dataset lacks, counted at the server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from known_runs import YEARS, dataset_in
from minecube import cube
from minecube.catalog import Dataset
from minecube.cli import cli
from minecube.jobs.runs import RunOptions, lookups
from minecube.jobs.runs.driver import make_plan
from minecube.jobs.runs.inputs import load_inputs
from minecube.jobs.runs.states import list_path
from minecube.jobs.runs.units import Unit
from minecube.jobs.scene_lists import load_or_search, save_list
from minecube.places import Url, list_files, open_client


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Method and path of each request to the server of `bucket`; LIST for a listing."""
    from moto.moto_server import threaded_moto_server

    requests = []

    class Noting(threaded_moto_server.DomainDispatcherApplication):
        def __call__(self, environment: dict[str, str], start: Callable[..., object]) -> object:
            method = environment["REQUEST_METHOD"]
            if "list-type" in environment["QUERY_STRING"]:
                method = "LIST"
            requests.append((method, environment["PATH_INFO"]))
            return super().__call__(environment, start)

    monkeypatch.setattr(threaded_moto_server, "DomainDispatcherApplication", Noting)
    return requests


def upload(finished: Path, bucket: str) -> None:
    client = open_client(bucket)
    for path in sorted(finished.rglob("*")):
        if path.is_file():
            client.put(str(path.relative_to(finished)), path.read_bytes())


@pytest.fixture
def dataset(asked: list, bucket: str, finished_run: Path, run_world: Path, tmp_path: Path):
    """The finished dataset, in a bucket."""
    upload(finished_run, bucket)
    places = {"store": f"{bucket}/cubes.zarr", "results": f"{bucket}/results"}
    return dataset_in(tmp_path, run_world, **places)


@pytest.mark.parametrize(
    ("command", "per_site"),
    [
        # the site, its markers, the notes of six steps, and the seals of labels and two maps
        (("run", "--dry-run"), 1 + len(YEARS) + 6 + 3),
        (("update", "--dry-run"), 1 + len(YEARS)),
    ],
)
def test_a_further_site_costs_one_request_per_object_that_is_read(
    dataset: Dataset, tmp_path: Path, asked: list, command: tuple[str, ...], per_site: int
) -> None:
    requests = {}
    for sites in ("pit", "*"):
        asked.clear()
        words = [command[0], str(tmp_path / "dataset.yaml"), *command[1:], "--sites", sites]
        done = CliRunner().invoke(cli, words, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        requests[sites] = Counter(asked)
    further = requests["*"] - requests["pit"]
    assert {method for method, _ in further} == {"GET"}
    assert all("pond" in path for _, path in further)
    assert set(further.values()) == {1}
    lists = [path for _, path in further if path.startswith("/mines/cubes.zarr-scenes")]
    assert len(lists) == len(YEARS)  # they are newer than the commits, so they are compared
    assert len(further) - len(lists) == per_site


def test_what_vanishes_between_listing_and_reading_is_missing(
    dataset: Dataset, asked: list
) -> None:
    inputs = load_inputs(dataset).with_listings()
    notes = Url(dataset.store) / ".runs" / "steps" / "label"
    assert inputs.lookup.exists(notes / "pit.json")
    (notes / "pit.json").unlink()
    assert inputs.lookup.read_note(inputs.store, "label", "pit") == {}
    assert inputs.lookup.read_note(inputs.store, "label", "pond") != {}
    assert inputs.lookup.time_of_change(list_path(inputs, "pit", 2020)) is not None
    assert inputs.lookup.time_of_change(list_path(inputs, "pit", 1999)) is None


@pytest.mark.parametrize("sites_per_part", [1, 2, 1000])
def test_a_bucket_listed_in_parts_is_whole(
    bucket: str, monkeypatch: pytest.MonkeyPatch, sites_per_part: int
) -> None:
    monkeypatch.setattr(lookups, "_SITES_PER_PART", sites_per_part)
    sites = ["a", "a-1", "b", "c"]
    folder = Url(bucket.removesuffix("/"))
    names = [f"{site}_{year}_source.parquet" for site in sites for year in (2020, 2021)]
    for name in names:
        cube.Store(bucket).client().put(name, b"")
    lookup = lookups.ListedLookup(sites)
    assert all(lookup.time_of_change(folder / name) for name in names)


def test_a_folder_listed_in_parts_is_whole(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookups, "_SITES_PER_PART", 1)
    sites = ["a", "a-1", "a_b", "b", "c", "é"]
    folder = Url(f"{bucket}/export")
    client = cube.Store(bucket).client()
    for name in ["0", "catalog.json", "zz", *(f"{site}/x/{i}" for site in sites for i in "12")]:
        client.put(f"export/{name}", b"")
    lookup = lookups.ListedLookup(sites)
    for site in sites:
        assert lookup.list_files(folder / site) == list_files(folder / site) == ["x/1", "x/2"]
    assert all(lookup.exists(folder / name) for name in ("0", "catalog.json", "zz"))
    assert not lookup.exists(folder / "nothing")
    assert lookup.list_files(folder / "nothing") == []


def test_a_list_that_the_run_has_searched_again_makes_a_build_stale(dataset: Dataset) -> None:
    """The plan has listed the folder of scene lists before."""
    inputs = load_inputs(dataset)
    site = inputs.sites["pit"]
    place = list_path(inputs, "pit", 2021)
    known = load_or_search(site, 2021, inputs.job.sources, inputs.job.snapshots)
    place.unlink()
    plan = make_plan(dataset, RunOptions(only=("search", "build"), sites="pit"))
    chain = plan.walk("pit")
    assert next(chain) == [Unit("search", "pit", 2021)]
    fewer = replace(known, scenes=known.scenes[::2])
    save_list(fewer, site, 2021, inputs.job.sources, inputs.job.snapshots)
    assert list(chain) == []
    assert plan.summary.stale[Unit("build", "pit", 2021)] == "the scene list of 2021 has changed"
