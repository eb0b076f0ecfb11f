"""A small built world, and damaged files and folders as inputs of bad command lines."""

from __future__ import annotations

import json
import shutil
import zipfile

import geopandas as gpd
import numpy as np
import pandas as pd
import zarr
from click.testing import CliRunner
from shapely.geometry import Point

from known_scenes import site_of
from minecube import models
from minecube.catalog import load_models
from minecube.cli import cli
from minecube.simulate import World, simulate_archive

BUILD = "--sites {w}/sites.geojson --years 2020 --source sim-earth-search --catalog {w}/archive"
STORE = "--store {w}/cubes.zarr"
JUNK = bytes(range(256)) * 8


def make_world(folder):
    """A built and labelled store of three sites, a model that nobody trained, and the archive."""
    site = site_of("a", 360000, 5600040, 48, 48)
    simulate_archive(
        [site],
        folder / "archive",
        World(years=(2020, 2022), dates_per_year=4, winter_dates=1, styles=("earth-search",)),
    )
    gpd.GeoDataFrame({"id": ["a"], "margin": [0]}, geometry=[site.geometry], crs=4326).to_file(
        folder / "sites.geojson"
    )
    shutil.copy(folder / "archive" / "truth_footprints.parquet", folder / "mine.parquet")
    given = [
        "--sites",
        "sites.geojson",
        "--catalog",
        "archive",
        "--source",
        "sim-earth-search",
        "--years",
        "2020,2022",
    ]
    given = [str(folder / word) if (folder / word).exists() else word for word in given]
    store = str(folder / "cubes.zarr")
    assert CliRunner().invoke(cli, ["build", *given, "--store", store]).exit_code == 0
    done = CliRunner().invoke(
        cli, ["label", "--store", store, "--polygons", str(folder / "mine.parquet")]
    )
    assert done.exit_code == 0, done.output
    for name in "bc":
        shutil.copytree(folder / "cubes.zarr" / "a", folder / "cubes.zarr" / name)
    card = load_models()["unet-small"]
    bands = len(card.bands)
    trained = models.TrainedModel(
        card=card, network=models.build(card), mean=(1.0,) * bands, std=(1.0,) * bands, sites=("a",)
    )
    models.save(trained, folder / "model.pt")
    return folder


def make_damaged(folder, world):
    """Files and folders that are not what they seem."""
    _write_junk(folder)
    _write_sites(folder, gpd.read_file(world / "sites.geojson").geometry[0])
    _write_catalogs(folder)
    _write_unreachable_sources(folder)
    _write_wrong_json(folder)
    _write_wrong_stores(folder, world)
    return folder


def _write_junk(folder):
    (folder / "file.txt").write_text("hello\n")
    for suffix in ("geojson", "parquet", "gpkg", "shp", "pt", "yaml", "json", "zip"):
        (folder / f"junk.{suffix}").write_bytes(JUNK)
    zipfile.ZipFile(folder / "empty.zip", "w").close()
    (folder / "state.pt.ckpt").write_bytes(JUNK)
    for name in ("folder.geojson", "folder.gpkg", "folder.zip"):
        (folder / name).mkdir()
    with zipfile.ZipFile(folder / "other.zip", "w") as other:
        other.writestr("readme.txt", "hello")
    pd.DataFrame({"a": [1]}).to_parquet(folder / "table.parquet")


def _write_sites(folder, site):
    gpd.GeoDataFrame({"id": ["p"]}, geometry=[Point(10, 50)], crs=4326).to_file(
        folder / "points.geojson"
    )
    for name, ids in (
        ("long_id", ["L" * 5000]),
        ("one_id", ["a"]),
        ("twin_ids", ["a/b", "a b"]),
        ("zarr_id", ["zarr.json"]),
    ):
        gpd.GeoDataFrame({"id": ids}, geometry=[site] * len(ids), crs=4326).to_file(
            folder / f"{name}.geojson"
        )
    feature = json.loads((folder / "one_id.geojson").read_text())
    feature["features"][0]["properties"]["years"] = [None, True]
    (folder / "null_year.geojson").write_text(json.dumps(feature))


def _write_catalogs(folder):
    catalogs = {
        "open": b"a: [1, 2\nb: {c\n",
        "tab": b"a:\n\t- b\n",
        "tag": b"a: !odd x\n",
        "twice": b"a: {title: t}\n\na: {title: u}\n",
        "alias": b"a: *nothere\n",
        "key": b"? [a, b]\n: c\n",
        "deep": b"[" * 20_000,
        "long": b"a" * 101 + b": {title: t, architecture: unet}",
        "list": b"- a\n- b\n",
        "junk": JUNK,
    }
    for name, content in catalogs.items():
        (folder / name).mkdir()
        for file in ("recipes.yaml", "models.yaml"):
            (folder / name / file).write_bytes(content)


def _write_unreachable_sources(folder):
    """A catalogue whose servers do not listen."""
    (folder / "dead").mkdir()
    source = "{title: t, kind: %s, href: 'http://127.0.0.1:9/%s', collection: c}"
    api, file = source % ("stac-api", "v1"), source % ("stac-geoparquet", "items.parquet")
    (folder / "dead" / "sources.yaml").write_text(f"dead: {api}\ndead-file: {file}\n")
    weights = f"{{href: 'http://127.0.0.1:9/w.pt', sha256: '{'0' * 64}'}}"
    (folder / "dead" / "models.yaml").write_text(
        f"far: {{title: t, architecture: unet, weights: {weights}}}\n"
    )


def _write_wrong_json(folder):
    """Metadata and prices that are nested too deeply, cut off or no numbers."""
    (folder / "nan.yaml").write_text("latency_s: .nan\n")
    (folder / "list.json").write_text("[1]")
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "deep.zarr").mkdir()
    (folder / "deep.zarr" / "zarr.json").write_text("[" * 100_000)
    (folder / "deep_bench").mkdir()
    (folder / "deep_bench" / "bench.json").write_text("[" * 100_000)
    (folder / "bench").mkdir()
    (folder / "bench" / "bench.json").write_text("{")


def _write_wrong_stores(folder, world):
    zarr.open_group(folder / "foreign.zarr", mode="w").create_array("x", data=np.arange(5))
    zarr.save_array(folder / "array.zarr", np.arange(5))
    shutil.copytree(world / "cubes.zarr", folder / "damaged.zarr")
    (folder / "damaged.zarr" / "zarr.json").write_text('{"a": ')
