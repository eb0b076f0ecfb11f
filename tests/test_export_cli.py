"""`minecube export` writes every format from the same committed years, with the licence of its labels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import geopandas as gpd
import numpy as np
import pystac
import pytest
import rasterio
import xarray as xr
import zarr

from known_scenes import site_of
from known_stores import build, export_every_format, files_of, make_labelled_store, run
from minecube import cube
from minecube.errors import CubeError
from minecube.jobs.export import FORMATS, ExportOptions, export_sites
from minecube.jobs.label import format_origin


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_labelled_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def mapped(made, tmp_path_factory):
    """Make a copy of that store, with the prediction of a model."""
    store = shutil.copytree(made, tmp_path_factory.mktemp("mapped") / "cubes.zarr")
    footprint = cube.open_committed(cube.Store(store), "pit")["footprint"].load()
    probability = (footprint * 200 + 20).astype(np.uint8)
    cube.write_probability(
        cube.Store(store), "pit", "net-11111111", probability, {"id": "net", "licence": "MIT"}
    )
    return store


@pytest.fixture(scope="module")
def exported(made, tmp_path_factory):
    return export_every_format(made, tmp_path_factory.mktemp("out") / "export")


@pytest.fixture(scope="module")
def four_sites(tmp_path_factory):
    """A store of four sites with one year."""
    path = tmp_path_factory.mktemp("four") / "cubes.zarr"
    for number in range(4):
        site = site_of(f"pit_{number}", 360000 + 2000 * number, 5600040, 60, 60)
        build(str(path), site, 2020, seed=number)
    return path


def export_with(store, folder, workers):
    names = []
    options = ExportOptions(formats=("cog", "netcdf"))
    sites = cube.list_sites(cube.Store(store))
    images, _ = export_sites(cube.Store(store), sites, folder, options, names.append, workers)
    assert list(dict.fromkeys(path.relative_to(folder).parts[0] for path in images)) == sites
    assert names == sites
    return files_of(folder)


def test_several_processes_write_the_same_bytes(four_sites, tmp_path):
    one = export_with(four_sites, tmp_path / "one", 1)
    assert len(one) == 4 * 4 + 2  # two images, NetCDF and picture; collection and items
    assert export_with(four_sites, tmp_path / "three", 3) == one


def test_a_failure_in_a_process_ends_the_export(four_sites, tmp_path):
    store = shutil.copytree(four_sites, tmp_path / "cubes.zarr")
    shard = next(path for path in (store / "pit_2/reflectance/c").rglob("*") if path.is_file())
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(CubeError, match="pit_2"):
        export_with(store, tmp_path / "out", 2)


def test_every_format_holds_the_committed_years(exported, made):
    out, printed = exported
    expected = cube.open_committed(cube.Store(made), "pit")
    assert list(expected.year.values) == [2019, 2021]
    opened = {
        "netcdf": xr.open_dataset(out / "pit" / "pit.nc", mask_and_scale=False),
        "zarr": xr.open_zarr(out / "pit" / "pit.zarr", group="0", consolidated=False),
        "zarr2": xr.open_zarr(out / "pit" / "pit.v2.zarr", mask_and_scale=False),
    }
    for name, found in opened.items():
        assert list(found.year.values) == [2019, 2021], name
        for variable in expected.data_vars:
            np.testing.assert_array_equal(
                found[variable].values, expected[variable].values, err_msg=f"{name} {variable}"
            )
        found.close()
    assert f"{out}: 4 images; open {out}/collection.json" in printed
    assert [line for line in printed.splitlines() if "croissant" in line] == [
        f"{out}/croissant.json"
    ]
    collection = pystac.Collection.from_file(str(out / "collection.json"))
    assert {
        "pit_netcdf",
        "pit_zarr",
        "pit_zarr2",
        "footprints_labels",
        "footprints_labels_gpkg",
        "items",
    } == set(collection.assets)
    item = next(collection.get_items())
    assert item.properties["processing:software"] == {"minecube": "0.1.0", "numpy": np.__version__}
    assert item.properties["minecube:scenes"] == ["S2A"]


def test_a_polygon_files_licence_reaches_every_export(exported):
    out, _ = exported
    licence, doi = "CC-BY-SA-4.0", "10.1594/PANGAEA.942325"
    with rasterio.open(out / "pit" / "pit_2019_footprint.tif") as src:
        said = [src.tags()["TIFFTAG_COPYRIGHT"]]
    with xr.open_dataset(out / "pit" / "pit.nc") as opened:
        said.append(opened.license + opened.references)
    said.append(str(dict(zarr.open_group(out / "pit" / "pit.zarr", mode="r").attrs)))
    said.append(str(dict(zarr.open_group(out / "pit" / "pit.v2.zarr", mode="r").attrs)))
    said.append(str(gpd.read_parquet(out / "footprints_labels.parquet").attrs))
    said += [(out / name).read_text() for name in ("collection.json", "croissant.json")]
    for text in said:
        assert licence in text or "licenses/by-sa/4.0/" in text
        assert doi in text


def test_polygons_of_many_sources_go_by_their_files_name():
    drawn = gpd.GeoDataFrame(
        {"source": [f"survey {n}" for n in range(9)], "LICENSE": ["ODbL-1.0"] * 9}
    )
    assert format_origin(drawn, Path("osm.gpkg")) == "osm.gpkg (ODbL-1.0)"
    assert (
        format_origin(drawn.drop(columns="LICENSE")[:2], Path("osm.gpkg"))
        == "survey 0 (not stated) | survey 1 (not stated)"
    )
    drawn["LICENSE"] = ["CC BY 4.0"] + ["ODbL-1.0"] * 8
    said = format_origin(drawn.assign(doi=["10.1/a", *[None] * 8])[:2], Path("osm.gpkg"))
    assert said == "survey 0 (CC BY 4.0) doi:10.1/a | survey 1 (ODbL-1.0)"


def test_one_format_writes_that_alone(made, tmp_path):
    run("export", "--store", made, "--out", tmp_path / "a", "--format", "netcdf")
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()] == [
        "a/pit/pit.nc"
    ]
    run("export", "--store", made, "--out", tmp_path / "b")
    assert {p.suffix for p in (tmp_path / "b").rglob("*") if p.is_file()} == {
        ".gpkg",
        ".json",
        ".parquet",
        ".png",
        ".tif",
    }
    pictures = {str(p.relative_to(tmp_path / "b")) for p in (tmp_path / "b").rglob("*.png")}
    assert pictures == {"areas.png", "pit/pit_areas.png", "pit/pit_strip.png"}
    out = run("export", "--store", made, "--out", tmp_path / "c", "--format", "croissant", ok=2)
    assert "add --format cog or --format netcdf" in out
    assert not (tmp_path / "c").exists()


def test_the_same_store_is_exported_to_the_same_bytes(mapped, tmp_path):
    """At another time, in another time zone and folder, with other hashes of text."""
    made = []
    for zone, seed in (("UTC", "1"), ("Asia/Tokyo", "2")):
        folder = tmp_path / f"in {zone.lower().replace('/', ' ')}"
        (folder / "here").mkdir(parents=True)
        command = [
            sys.executable,
            "-c",
            "from minecube.cli import main; main()",
            "export",
            "--model",
            "net",
        ]
        command += ["--store", str(mapped), "--out", "../out"]
        command += [f for name in FORMATS for f in ("--format", name)]
        environment = {**os.environ, "TZ": zone, "PYTHONHASHSEED": seed}
        subprocess.run(
            command, cwd=folder / "here", env=environment, check=True, capture_output=True
        )
        made.append(files_of(folder / "out"))
        time.sleep(2.1)
    assert {Path(name).suffix for name in made[0]} > {
        ".tif",
        ".nc",
        ".parquet",
        ".gpkg",
        ".json",
        ".png",
    }
    assert made[0] == made[1]


def test_an_unknown_prediction_is_named_with_those_there_are(mapped, tmp_path):
    said = run("export", "--store", mapped, "--model", "unknown", "--out", tmp_path / "e", ok=2)
    assert "no prediction of 'unknown' for pit; it has net-11111111" in said
    assert not (tmp_path / "e").exists()
    assert "an empty name" in run("score", "--store", mapped, "--model", "net,,net", ok=2)


def test_a_model_stands_for_its_only_prediction(mapped, tmp_path):
    said = run("export", "--store", mapped, "--model", "net", "--out", tmp_path)
    assert "--model net: using prediction net-11111111" in said
    expected = cube.open_probability(cube.Store(mapped), "pit", "net-11111111").sel(year=2021)
    with rasterio.open(tmp_path / "pit" / "pit_2021_probability.tif") as image:
        np.testing.assert_array_equal(image.read(1), expected)
