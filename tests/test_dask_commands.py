"""Commands on Dask workers make the same cubes and maps as on this machine."""

from __future__ import annotations

import dataclasses
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dask
import distributed
import geopandas as gpd
import pytest
import torch
import xarray as xr
from click.testing import CliRunner

from known_scenes import site_of
from minecube import cube, models
from minecube.catalog import load_models, load_recipes
from minecube.cli import cli
from minecube.errors import ModelError, WorkerError
from minecube.jobs import build, predict
from minecube.jobs.predict import MapOptions, ModelReference, describe_model, load_same
from minecube.jobs.workers import connect_workers, iterate_finished
from minecube.simulate import World, simulate_archive

WORKFLOWS = Path(__file__).parents[1] / "workflows"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two small sites in one archive, built by the plain command."""
    folder = tmp_path_factory.mktemp("world")
    sites = [
        site_of("north", 360000, 5600040, 60, 48),
        site_of("south", 363000, 5590020, 48, 60),
    ]
    simulate_archive(
        sites,
        folder / "archive",
        World(years=(2022,), dates_per_year=4, winter_dates=0, styles=("planetary-computer",)),
    )
    table = gpd.GeoDataFrame(
        {"id": [s.id for s in sites]}, geometry=[s.geometry for s in sites], crs=4326
    )
    table.to_file(folder / "archive" / "sites.geojson")
    done = CliRunner().invoke(
        cli,
        ["build", "--sites", "north,south", "--store", str(folder / "plain.zarr"), *common(folder)],
    )
    assert done.exit_code == 0, done.output
    return folder


def common(folder):
    return [
        "--years",
        "2022",
        "--catalog",
        str(folder / "archive"),
        "--source",
        "sim-planetary-computer",
    ]


def assert_same(one, other, names):
    for name in names:
        a, b = (xr.open_zarr(s, group=name, consolidated=False).load() for s in (one, other))
        assert (a.reflectance > 0).any()
        xr.testing.assert_identical(a, b)


def on_cluster(*arguments):
    """The command with two worker processes."""
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0"
    ) as cluster:
        words = [*map(str, arguments), "--scheduler", cluster.scheduler_address]
        return CliRunner().invoke(cli, words)


def test_on_worker_processes(world):
    store = world / "cluster.zarr"
    done = on_cluster("build", "--sites", "north,south", "--store", store, *common(world))
    assert done.exit_code == 0, done.stderr
    assert done.stdout.count("built") == 2
    assert_same(store, world / "plain.zarr", ["north", "south"])


def model_in(folder):
    card, torch_state = load_models()["unet-small"], torch.get_rng_state()
    torch.manual_seed(0)
    n = len(card.bands)
    network = models.build(card).eval()
    torch.set_rng_state(torch_state)
    models.save(
        models.TrainedModel(
            card=card, network=network, mean=(1500.0,) * n, std=(500.0,) * n, sites=()
        ),
        folder / "model.pt",
    )
    return folder / "model.pt"


def test_a_scheduler_gets_no_other_work_of_this_process():
    """A default client would keep it waiting for a scheduler that has ended."""
    with (
        distributed.LocalCluster(
            n_workers=1,
            processes=False,
            protocol="tcp",
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
        ) as cluster,
        connect_workers(cluster.scheduler_address) as executor,
    ):
        assert executor.submit(sum, [1, 2]).result() == 3
        assert dask.config.get("scheduler", None) is None
        with pytest.raises(ValueError, match="No clients found"):
            distributed.default_client()


def test_sites_are_mapped_on_worker_processes(world, tmp_path):
    model, stores = (
        model_in(tmp_path),
        [shutil.copytree(world / "plain.zarr", tmp_path / f"{n}.zarr") for n in range(2)],
    )
    done = on_cluster("predict", "--store", stores[0], "--model", model)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.count(": 1 years mapped") == 2
    assert "in all: " in done.stdout
    plain = CliRunner().invoke(cli, ["predict", "--store", str(stores[1]), "--model", str(model)])
    assert plain.exit_code == 0, plain.output
    for name in ("north", "south"):
        one, other = (
            cube.open_probability(
                cube.Store(store),
                name,
                cube.find_prediction(cube.Store(store), [name], "unet-small"),
            ).load()
            for store in stores
        )
        assert one.max() > one.min()
        xr.testing.assert_identical(one, other)
    again = on_cluster("predict", "--store", stores[0], "--model", model)
    assert again.stdout.count("mapped already") == 2


def test_what_a_worker_cannot_do_is_one_sentence(world, tmp_path):
    done = on_cluster(
        "predict",
        "--store",
        world / "plain.zarr",
        "--model",
        model_in(tmp_path),
        "--device",
        "cuda:7",
    )
    assert done.exit_code == 2
    said = [
        line for line in done.stderr.splitlines() if line.startswith("error: ")
    ]  # among what workers log
    assert len(said) == 1
    assert "cuda:7" in said[0]
    assert not (world / "plain.zarr/north/predictions").exists()


def test_a_worker_with_another_model_under_that_name_maps_nothing(tmp_path):
    with pytest.raises(ModelError, match="other weights than the machine that asked"):
        load_same(ModelReference(str(model_in(tmp_path)), None, "another", models.Compute()))


def test_a_worker_that_lives_on_takes_the_model_that_is_there_now(tmp_path):
    """Of the same weights, and another mean."""
    file, found = model_in(tmp_path), []
    for mean in (1500.0, 100.0):
        models.save(dataclasses.replace(models.load(file), mean=(mean,) * 10), file)
        description = describe_model(models.Mapper(models.load(file)))
        reference = ModelReference(str(file), None, description, models.Compute())
        found.append(load_same(reference).trained.mean[0])
    assert found == [1500.0, 100.0]


def mapped_on(monkeypatch, map_site, *arguments):
    """What `map_on_workers` gives of some sites, with threads for workers."""
    monkeypatch.setattr(predict, "load_same", lambda reference: reference)
    monkeypatch.setattr(predict, "map_site", map_site)
    with ThreadPoolExecutor(1) as pool:
        return sorted(predict.map_on_workers(pool, *arguments), key=lambda result: result[0])


def test_workers_in_other_folders_find_the_same_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.pt").touch()
    (tmp_path / "unet-small").mkdir()  # no model, but a folder of that name

    def given(store, name, model, catalog):
        reference = ModelReference(model, catalog, "it", models.Compute())
        arguments = store, [name], reference, MapOptions(pairs=(1,))
        ((_, tasks),) = mapped_on(monkeypatch, lambda *of: of, *arguments)
        store, site, reference, options = tasks
        assert (site, options) == (name, MapOptions(pairs=(1,)))
        assert (reference.description, reference.compute) == ("it", models.Compute())
        return store, reference.model, reference.catalog

    here = str(tmp_path)
    found = given(cube.Store("cubes.zarr"), "a", "model.pt", Path("mine"))
    assert found == (cube.Store(f"{here}/cubes.zarr"), f"{here}/model.pt", tmp_path / "mine")
    found = given(cube.Store("s3://bucket/cubes"), "a", "unet-small", None)
    assert found == (cube.Store("s3://bucket/cubes"), "unet-small", None)


def test_workers_that_build_in_other_folders_find_the_same_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = build.BuildJob(
        store=cube.Store("cubes.zarr"),
        sources=(),
        recipe=load_recipes()["annual-median"],
        snapshots=Path("lists"),
    )
    monkeypatch.setattr(build, "build_year", lambda job, *_: job)
    with ThreadPoolExecutor(1) as pool:
        (given,) = build._build_all(job, [(site_of("a", 360000, 5600040, 60, 48), 2022)], pool)
    assert given == dataclasses.replace(
        job, store=cube.Store(tmp_path / "cubes.zarr"), snapshots=tmp_path / "lists"
    )


def test_a_worker_that_dies_is_one_sentence_and_the_rest_is_not_begun(monkeypatch):
    begun = []

    def dies(_store, name, _trained, _options):
        begun.append(name)
        time.sleep(0.2)
        raise RuntimeError("no room")

    reference = ModelReference("model", None, "it", models.Compute())
    with pytest.raises(
        WorkerError,
        match=r"a: RuntimeError: no room; committed maps are safe; run the same command again",
    ):
        mapped_on(
            monkeypatch, dies, cube.Store("cubes.zarr"), [*"abcdefgh"], reference, MapOptions()
        )
    assert len(begun) <= 2


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="signals of threads")
def test_ctrl_c_is_heard_while_tasks_run_whatever_thread_gets_it():
    end, start = threading.Event(), time.monotonic()

    def interrupt():
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        return end.wait(20)

    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # processes that share out tests do not listen
    with ThreadPoolExecutor(1) as pool:
        try:
            with pytest.raises(KeyboardInterrupt):
                list(iterate_finished([pool.submit(interrupt)]))
            assert time.monotonic() - start < 10
        finally:
            end.set()
            signal.signal(signal.SIGINT, before)
