"""The command line as a user meets it: help, the whole way on a small world, and one clear sentence for every mistake."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import geopandas as gpd
import numpy as np
import pytest
import xarray as xr
from click.testing import CliRunner
from shapely.geometry import box

from minecube import cube
from minecube.cli import COMMANDS, cli
from minecube.simulate import World, simulate


def run(*arguments, ok=0, cwd=None):
    """The command in a process of its own; (standard output, standard error)."""
    command = [sys.executable, "-c", "from minecube.cli import main; main()", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == ok, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


def run_here(*arguments, ok=0):
    """The same within this process, which spares the seconds of importing."""
    done = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert done.exit_code == ok, f"exit {done.exit_code}\n{done.output}"
    return done.stdout, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_shows_an_example(command):
    out, _ = run_here(command, "--help")
    assert "Example" in out
    assert f"minecube {command}" in out


def test_the_list_of_commands():
    out, _ = run("--help")
    listed = out.split("Commands:")[1]
    assert [line.split()[0] for line in listed.splitlines() if line.startswith("  ") and line[2] != " "] == list(COMMANDS)


def test_the_list_of_sites_says_which_years():
    out, _ = run_here("sites", "--sites", "demo_1,Austria_1")
    demo, austria = (line.split() for line in out.splitlines()[2:])
    assert demo == ["demo_1", "Simulated", "train", "2015,2020,2022", "EPSG:32633", "384", "x", "384", "px"]
    assert austria == ["Austria_1", "Austria", "train", "2015-2024", "no", "polygon", "yet"]


@pytest.fixture(scope="module")
def world(tmp_path_factory, make):
    """A site of 120 x 96 px, two years, one provider; polygons of the site and of its mine."""
    folder = tmp_path_factory.mktemp("world")
    site = make.site("pit", 360000, 5600040, 120, 96)
    simulate([site], folder / "archive", World(years=(2020, 2022), dates_per_year=6, winter_dates=1, styles=("earth-search",)))
    gpd.GeoDataFrame({"id": ["pit"]}, geometry=[site.geometry], crs=4326).to_file(folder / "sites.geojson")
    return folder


@pytest.fixture(scope="module")
def built(world):
    """That world built and labelled: the store."""
    store = world / "cubes.zarr"
    out, _ = run("build", *args(world, store))
    assert out.count("built") == 2
    run("label", "--store", store, "--polygons", world / "archive" / "truth_footprints.parquet")
    return store


def args(world, store, years="2020,2022", source="sim-earth-search"):
    return (
        "--sites",
        world / "sites.geojson",
        "--years",
        years,
        "--catalog",
        world / "archive",
        "--source",
        source,
        "--store",
        store,
    )


def test_built_cubes_and_labels(world, built):
    cubes = xr.open_zarr(built, group="pit", consolidated=False)
    truth = xr.open_zarr(world / "archive" / "truth.zarr", group="pit", consolidated=False)
    np.testing.assert_array_equal(cubes.footprint, truth.footprint)
    seen = cubes.reflectance.values > 0
    assert seen.mean() > 0.99
    error = (cubes.reflectance.astype(float) - truth.reflectance.astype(float)).values[seen] / 1e4
    assert np.sqrt((error**2).mean()) < 0.03
    provenance = cube.builds(str(built), "pit")[2022]
    assert {s["source"] for s in provenance["scenes"]} == {"sim-earth-search"}
    assert all(s["offset"] == 0 and "is true" in s["offset_reason"] for s in provenance["scenes"])


def test_a_second_build_keeps_everything_and_needs_no_archive(world, built, tmp_path):
    """The scene lists were saved: the same build again works with the source gone, and does nothing."""
    shutil.copytree(world / "archive", tmp_path / "archive", ignore=shutil.ignore_patterns("earth-search", "*.parquet"))
    shutil.copy(world / "sites.geojson", tmp_path)
    out, _ = run("build", *args(tmp_path, built))
    assert out.count("kept") == 2
    assert "built" not in out


def test_dry_run_writes_nothing(world, tmp_path):
    out, _ = run("build", *args(world, tmp_path / "new.zarr"), "--dry-run")
    assert "dry run: nothing was read or written" in out
    assert "to build" in out
    assert list(tmp_path.iterdir()) == []


def test_train_predict_score_export(built, tmp_path):
    model = tmp_path / "model.pt"
    run("train", "--store", built, "--out", model, "--epochs", "2")
    run("predict", "--store", built, "--model", model)
    out, _ = run("score", "--store", built, "--json", tmp_path / "scores.json")
    assert "ca_tiou" in out
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["sites"]["pit"] == scores["sites"]["pooled"]
    out, _ = run("export", "--store", built, "--out", tmp_path / "export", "--model", "unet-small")
    made = {p.name for p in (tmp_path / "export").rglob("*") if p.is_file()}
    assert {"collection.json", "pit_2020_reflectance.tif", "pit_2022_probability.tif", "pit_strip.png", "areas.png"} <= made
    assert {"footprints_labels.parquet", "footprints_mapped.parquet"} <= made
    _, err = run("score", "--store", built, "--model", "other", ok=2)
    assert "no prediction of 'other' for pit" in err


def test_other_scenes_are_refused_unless_told(world, built, tmp_path):
    """A scene list from which one scene is gone is another build."""
    from minecube import scenes

    (lists := tmp_path / "lists").mkdir()
    for path in (world / "cubes.zarr-scenes").glob("*.parquet"):
        listed = scenes.load(path)
        summer = [s for s in listed if 4 <= s.datetime.month <= 10 and s.properties["eo:cloud_cover"] <= 90]
        scenes.save([s for s in listed if "2020" not in path.name or s.id != summer[0].id], lists / path.name)
    store = tmp_path / "cubes.zarr"
    shutil.copytree(built, store)
    out, err = run("build", *args(world, store), "--scenes", lists, ok=1)
    assert out.count("kept") == 1
    assert "pit 2020" in err
    assert "to replace it say --overwrite" in err
    assert "1 of 2 site-years failed" in err
    out, _ = run("build", *args(world, store), "--scenes", lists, "--overwrite")
    assert (out.count("built"), out.count("kept")) == (1, 1)


def test_a_missing_and_a_truncated_file_fail_one_site_year_each_and_nothing_else(world, tmp_path):
    shutil.copytree(world / "archive", tmp_path / "archive")
    shutil.copy(world / "sites.geojson", tmp_path)
    # A file that the composite needs: of the clearest summer scene.
    victims = sorted((tmp_path / "archive" / "earth-search").glob("*_20220[5-9]*/B04.tif"))
    for path in victims:
        path.unlink()
    out, err = run("build", *args(tmp_path, tmp_path / "cubes.zarr"), ok=1)
    assert out.count("built") == 1
    assert "B04.tif: cannot be read" in err
    assert "No such file" in err
    assert list(cube.builds(str(tmp_path / "cubes.zarr"), "pit")) == [2020]
    for path in sorted((tmp_path / "archive" / "earth-search").glob("*_20200[5-9]*/B08.tif")):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    out, err = run("build", *args(tmp_path, tmp_path / "cubes2.zarr"), ok=1)
    assert "2 of 2 site-years failed" in err
    assert "B08.tif: cannot be read" in err
    assert cube.builds(str(tmp_path / "cubes2.zarr"), "pit") == {}


def test_an_interrupted_build_goes_on(world, tmp_path):
    """Killed while it writes: what is committed stays, the rest is built by the same command."""
    import os
    import signal
    import time

    store = tmp_path / "cubes.zarr"
    command = [sys.executable, "-c", "from minecube.cli import main; main()", "build", *map(str, args(world, store))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(store.glob("pit/builds/*/zarr.json")) and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (130, 0)  # 0: it was through already
    if process.returncode:
        assert "run the same command again to go on" in err
    run("build", *args(world, store))
    assert list(cube.builds(str(store), "pit")) == [2020, 2022]


BAD = {
    "unknown site": (("sites", "--sites", "Atlantis_*"), "unknown site 'Atlantis_*'; the catalogue has Austria_1"),
    "no such file": (("sites", "--sites", "mines.geojson"), "mines.geojson: no such file"),
    "years": (("search", "--sites", "demo_1", "--years", "20x", "--source", "cdse"), "expected years such as 2019-2023"),
    "years backwards": (("search", "--sites", "demo_1", "--years", "2023-2019", "--source", "cdse"), "expected years such as"),
    "unknown source": (
        ("search", "--sites", "demo_1", "--years", "2020", "--source", "nasa"),
        "unknown source 'nasa'; there is: cdse, earth-",
    ),
    "unknown command": (("fly",), "No such command 'fly'"),
    "no store": (("export", "--store", "nowhere.zarr", "--out", "x"), "nowhere.zarr: there is no store"),
    "no model": (
        ("train", "--store", "nowhere.zarr", "--out", "x", "--model", "gpt"),
        "unknown model 'gpt'; there is: unet-small",
    ),
    "no polygons": (("label", "--store", "nowhere.zarr", "--polygons", "no.gpkg"), "no.gpkg"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_use(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, said = BAD[case]
    out, err = run_here(*arguments, ok=2)
    assert said in out + err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--years": "2012"}, "year 2012: expected 2015"),
        ({"--recipe": "winter-mean"}, "unknown recipe 'winter-mean'; there is: annual-median"),
        ({"--source": "nasa"}, "unknown source 'nasa'"),
        ({"--store": "/proc/cubes.zarr"}, "cannot be written"),
        ({"--sites": "Germany_1"}, "site 'Germany_1' has no area of interest yet"),
        ({"--scheduler": "tcp://127.0.0.1:1"}, "no Dask scheduler answers at tcp://127.0.0.1:1"),
    ],
)
def test_a_bad_build(world, tmp_path, change, said, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = dict(zip(*[iter(args(world, tmp_path / "new.zarr"))] * 2, strict=True)) | change
    _, err = run_here("build", *[v for pair in given.items() for v in pair], ok=2)
    assert said in err
    assert list(tmp_path.iterdir()) == []


def test_an_empty_search_says_how_to_widen_it_and_leaves_nothing(world, tmp_path):
    _, err = run("build", *args(world, tmp_path / "new.zarr", years="2019"), ok=1)
    assert "no scene of 2019 over pit (west, south, east, north" in err
    assert "try another year or --source" in err
    assert list(tmp_path.iterdir()) == []


def test_polygons_that_do_not_fit(built, world, tmp_path):
    far = gpd.GeoDataFrame(geometry=[box(30, 10, 30.1, 10.1)], crs=4326)
    far.to_file(tmp_path / "far.gpkg")
    _, err = run("label", "--store", built, "--polygons", tmp_path / "far.gpkg", ok=2)
    assert "km" in err
    no_crs = gpd.GeoDataFrame(geometry=[box(30, 10, 30.1, 10.1)])
    no_crs.to_parquet(tmp_path / "no_crs.parquet")
    _, err = run("label", "--store", built, "--polygons", tmp_path / "no_crs.parquet", ok=2)
    assert "no CRS" in err


def test_an_invalid_polygon_is_repaired_and_reported(world, built, tmp_path):
    site = gpd.read_file(world / "sites.geojson").geometry[0]
    west, south, east, north = site.bounds
    bowtie = f"POLYGON(({west} {south}, {east} {north}, {east} {south}, {west} {north}, {west} {south}))"
    gpd.GeoDataFrame(geometry=gpd.GeoSeries.from_wkt([bowtie]), crs=4326).to_file(tmp_path / "bowtie.gpkg")
    shutil.copytree(built, tmp_path / "cubes.zarr")
    _, err = run("label", "--store", tmp_path / "cubes.zarr", "--polygons", tmp_path / "bowtie.gpkg")
    assert "repaired" in err
