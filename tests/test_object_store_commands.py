"""Every command reads and writes in an object store what it reads and writes on disk."""

from __future__ import annotations

import shutil

import obstore
import pytest
from obstore.store import from_url

from known_builds import run_here
from minecube import cube

ALL_FORMATS = ("cog", "netcdf", "zarr", "zarr2", "croissant")
PREDICTION = "mapped"


def files_in(place):
    """Relative name -> content of all files below a folder or URL."""
    if "://" not in str(place):
        paths = [path for path in place.rglob("*") if path.is_file()]
        return {str(path.relative_to(place)): path.read_bytes() for path in paths}
    client = from_url(str(place))
    entries = obstore.list(client).collect()
    return {entry["path"]: bytes(client.get(entry["path"]).bytes()) for entry in entries}


def upload(path, url):
    client = from_url(url)
    for name, content in files_in(path).items():
        client.put(name, content)


@pytest.fixture
def inputs(world, tmp_path, bucket):
    """A local folder of inputs. The bucket has the same at inputs/."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    shutil.copy(world / "sites.geojson", folder)
    shutil.copy(world / "archive" / "truth_footprints.parquet", folder / "polygons.parquet")
    (folder / "prices.yaml").write_text("per_gb: 0.09")
    upload(folder, f"{bucket}/inputs")
    return folder


def build_and_map(world, inputs, out):
    """Run all commands that write to a store. Returns the store."""
    store = f"{out}/cubes.zarr"
    search = ("--sites", f"{inputs}/sites.geojson", "--years", "2020,2022")
    search += ("--catalog", world / "archive", "--source", "sim-earth-search")
    run_here("search", *search, "--out", f"{out}/scenes")
    scenes = (*search, "--store", store, "--scenes", f"{out}/scenes")
    run_here("plan", *scenes, "--prices", f"{inputs}/prices.yaml")
    run_here("build", *scenes)
    run_here("label", "--store", store, "--polygons", f"{inputs}/polygons.parquet")
    model = f"{out}/model.pt"
    run_here("train", "--store", store, "--out", model, "--epochs", "1")
    run_here("train", "--store", store, "--out", model, "--epochs", "1", "--resume")
    run_here("predict", "--store", store, "--model", model, "--name", PREDICTION)
    shown, _ = run_here("models", "show", model)
    assert "trained on" in shown
    return cube.Store(store)


def write_files(world, inputs, store, out):
    """Run all commands that write files, from one store."""
    sites = ("--sites", f"{inputs}/sites.geojson")
    source = ("--catalog", world / "archive", "--source", "sim-earth-search")
    run_here("audit", *sites, "--years", "2020,2022", *source, "--out", f"{out}/audit")
    formats = [word for name in ALL_FORMATS for word in ("--format", name)]
    maps = ("--store", store, "--model", PREDICTION)
    run_here("export", *maps, "--out", f"{out}/export", *formats)
    run_here("score", *maps, "--out", f"{out}/scores", "--json", f"{out}/scores.json")
    run_here("tracks", *maps, "--out", f"{out}/tracks", "--rates", "0.1,0.1")
    run_here("pack", "--store", store, "--out", f"{out}/cubes.zip")
    run_here("verify", "--store", store, "--json", f"{out}/verified.json")
    run_here("release", "export", "--store", store, "--out", f"{out}/again")
    repaired = ("--out", f"{out}/repaired.parquet", "--json", f"{out}/report.json")
    run_here("polygons", f"{inputs}/polygons.parquet", *sites, *repaired)


@pytest.mark.slow
def test_outputs_are_the_same_on_disk_and_in_an_object_store(
    world, inputs, bucket, tmp_path, one_thread
):
    on_disk = build_and_map(world, inputs, tmp_path / "disk")
    in_bucket = build_and_map(world, f"{bucket}/inputs", f"{bucket}/stored")
    expected = files_in(tmp_path / "disk")
    found = files_in(f"{bucket}/stored")
    files = {name for name in expected if not name.startswith("cubes.zarr/")}
    assert files == {name for name in found if not name.startswith("cubes.zarr/")}
    lists = [name for name in files if name.startswith("scenes/")]
    assert len(lists) == 2
    assert [expected[name] for name in lists] == [found[name] for name in lists]
    compare_stores(on_disk, in_bucket)

    write_files(world, inputs, on_disk, tmp_path / "files")
    write_files(world, f"{bucket}/inputs", on_disk, f"{bucket}/files")
    expected = files_in(tmp_path / "files")
    found = files_in(f"{bucket}/files")
    assert expected.keys() == found.keys()
    # It names the file of polygons.
    found["report.json"] = found["report.json"].replace(
        f"{bucket}/inputs".encode(), str(inputs).encode()
    )
    assert [name for name, content in expected.items() if found[name] != content] == []


def compare_stores(a, b):
    """Compare builds, pixels, labels and maps."""
    builds = [
        {year: marker["build_id"] for year, marker in cube.read_markers(store, "pit").items()}
        for store in (a, b)
    ]
    assert builds[0] == builds[1]
    opened = [cube.open_committed(store, "pit").load() for store in (a, b)]
    assert opened[0].equals(opened[1])
    maps = [cube.open_probability(store, "pit", PREDICTION).load() for store in (a, b)]
    assert maps[0].equals(maps[1])
