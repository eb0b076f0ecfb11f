"""Clusters of the catalogue, and what they give each worker."""

from __future__ import annotations

import os

import pytest

from known_builds import run_here
from known_datasets import write_dataset
from minecube.catalog import load_clusters, load_dataset, load_sources
from minecube.catalog.scene_source import Access
from minecube.cli.run import change_engine
from minecube.errors import CatalogError
from minecube.jobs.processes import count_cores
from minecube.jobs.runs.engines import share_requests
from minecube.jobs.runs.inputs import choose_cluster
from minecube.jobs.runs.steps import Limits, share_searches
from minecube.reader.remote import limit_connections, remote_for

SLURM = "kind: slurm, workers: 2, memory_gb: 4"


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ("kind: pbs", "field 'kind': expected one of local, dask, slurm, kubernetes, found 'pbs'"),
        ("kind: local, adress: x", "field 'adress': expected one of title, kind, workers"),
        (
            "kind: local, address: 'tcp://h:1'",
            "field 'address': expected kind dask for this field, found 'local'",
        ),
        ("kind: dask", "field 'address': expected an address such as tcp://host:8786, found None"),
        ("kind: slurm, workers: 2", "field 'memory_gb': expected the memory of each worker"),
        ("kind: slurm, memory_gb: 2", "field 'workers': expected the number of workers to start"),
        (f"{SLURM}, stagger_minutes: 5", "expected 0, or less than lifetime_minutes, found 5.0"),
        (f"{SLURM}, workers: 0", "'workers' occurs twice"),
        ("kind: kubernetes, workers: 2, memory_gb: 4", "field 'kubernetes': expected the image"),
        ("kind: local, threads: 0", "field 'threads': expected 1 or more, found 0"),
        ("kind: local, resources: {build: {GPU: 1}}", "field 'resources': expected a cluster"),
    ],
)
def test_wrong_clusters_are_named(tmp_path, fields, sentence):
    path = tmp_path / "clusters.yaml"
    path.write_text(f"mine: {{title: Mine, {fields}}}\n")
    with pytest.raises(CatalogError) as error:
        load_clusters(path)
    assert sentence in str(error.value)
    assert str(path) in str(error.value)


def test_the_engine_of_a_dataset_is_a_name_or_an_address(world, tmp_path):
    mine = {"mine": {"title": "Mine", "kind": "local", "workers": 3}}
    path = write_dataset(world, tmp_path, mine, engine="mine")
    assert choose_cluster(load_dataset(path)).workers == 3
    path = write_dataset(world, tmp_path / "b", engine="tcp://10.0.0.1:8786")
    assert choose_cluster(load_dataset(path)).address == "tcp://10.0.0.1:8786"
    path = write_dataset(world, tmp_path / "c", engine="slurm", workers=4)
    _, err = run_here("run", path, "--dry-run", ok=2)
    assert "engine slurm: expected no `workers` in the dataset, found 4" in err


def test_another_engine_keeps_the_workers_of_this_machine_only(world, tmp_path):
    dataset = load_dataset(write_dataset(world, tmp_path, workers=4))
    assert change_engine(dataset, "local") == dataset
    assert change_engine(dataset, "slurm").workers is None
    assert change_engine(dataset, "tcp://10.0.0.1:8786").workers is None


@pytest.mark.parametrize(
    ("content", "cores"),
    [
        ("100000 100000\n", 1),
        ("50000 100000\n", 1),  # half a core
        ("max 100000\n", len(os.sched_getaffinity(0))),
        ("99900000 100000\n", len(os.sched_getaffinity(0))),  # more than there are
    ],
)
def test_cores_are_those_of_the_container(tmp_path, content, cores):
    limit = tmp_path / "cpu.max"
    limit.write_text(content)
    assert count_cores(limit) == cores
    assert count_cores(tmp_path / "none") == len(os.sched_getaffinity(0))


def test_workers_divide_requests_among_them(tmp_path):
    path = tmp_path / "clusters.yaml"
    path.write_text("mine: {title: Mine, kind: local, connections: 10}\n")
    limits = share_requests(Limits(), load_clusters(path)["mine"], workers=4)
    assert (limits.workers, limits.connections) == (4, 2)
    source = load_sources()["earth-search"]
    sharded = share_requests(Limits(workers=2), load_clusters(path)["mine"], workers=4)
    assert (sharded.workers, sharded.connections) == (8, 1)  # two shards of four workers
    (shared,) = share_searches([source], limits.workers)
    assert shared.searches_per_s == source.searches_per_s / 4
    try:
        limit_connections(limits.connections)
        assert remote_for(Access(connections=64), "of a test").access.connections == 2
        assert remote_for(Access(connections=1), "of a test").access.connections == 1
    finally:
        limit_connections(None)
    assert remote_for(Access(connections=64), "of a test").access.connections == 64
