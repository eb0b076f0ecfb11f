"""A tiny dataset with all steps of a run: two sites, two years, three bands, one small network."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from multiprocessing import forkserver
from pathlib import Path

import geopandas as gpd
import numpy as np
import stac_geoparquet.arrow
import torch
import yaml

from known_scenes import NATIVE, Archive, grid_at, site_of
from minecube import models
from minecube.catalog import Dataset, ModelCard, Site, load_dataset

YEARS = (2020, 2021)
BANDS = ("B02", "B03", "B04")
PLACES = {
    "pit": site_of("pit", 360000, 5600040, 48, 48),
    "pond": site_of("pond", 363000, 5600040, 48, 48),
}
RECIPE = {
    "title": "three bands",
    "bands": list(BANDS),
    "block_px": 64,
    "chunk_px": 64,
}


def make_run_world(folder: Path) -> Path:
    """Write scenes, two sites, a recipe, polygons, a network and a dataset.yaml with all steps.

    Returns the folder. Tests must not change it.
    """
    write_scenes(folder)
    write_sites(folder / "sites.geojson", list(PLACES.values()))
    write_polygons(folder / "polygons.geojson", shrink_degrees=0.001)
    (folder / "recipes.yaml").write_text(json.dumps({"tiny": RECIPE}))
    save_model(folder / "net.pt", seed=0)
    return folder


def write_scenes(folder: Path, months: tuple[int, ...] = (5, 6, 7)) -> None:
    """Write one scene per month and year over both sites, and their source `mine`."""
    archive = Archive(folder / "archive", bands=BANDS)
    texture = np.random.default_rng(0).integers(20, 2500, (len(BANDS), 120, 420))
    grid = grid_at(359400, 5600640, 420, 120)
    items = []
    for year in YEARS:
        for month in months:
            pixels = {}
            for band, values in zip(BANDS, texture, strict=True):
                step = NATIVE[band] // 10
                pixels[band] = (values[::step, ::step] + 2 * month + year - 2000).astype(np.uint16)
            scene = archive.item(f"{year}-{month:02d}-0{month}T10:00:00", grid, pixels)
            items.append(scene.to_dict())
    table = stac_geoparquet.arrow.parse_stac_items_to_arrow(items)
    stac_geoparquet.arrow.to_parquet(table, folder / "items.parquet")
    source = {
        "title": "known scenes",
        "kind": "stac-geoparquet",
        "href": "items.parquet",
        "collection": "test",
        "licence": "none",
        "assets": {band: band for band in (*BANDS, "SCL")},
    }
    gone = {**source, "href": "no_such_items.parquet"}
    (folder / "sources.yaml").write_text(json.dumps({"mine": source, "gone": gone}))


def write_sites(path: Path, places: list[Site]) -> None:
    """Write sites without margin."""
    columns = {"id": [place.id for place in places], "margin": [0] * len(places)}
    shapes = [place.geometry for place in places]
    gpd.GeoDataFrame(columns, geometry=shapes, crs=4326).to_file(path)


def write_polygons(path: Path, shrink_degrees: float) -> None:
    """Write one mine per site: the site's polygon, smaller by a border."""
    shapes = [place.geometry.buffer(-shrink_degrees) for place in PLACES.values()]
    gpd.GeoDataFrame({"site": list(PLACES)}, geometry=shapes, crs=4326).to_file(path)


def save_model(path: Path, seed: int) -> None:
    """Save a network with random weights."""
    torch.manual_seed(seed)
    card = ModelCard(
        id="tiny",
        title="t",
        architecture="unet",
        bands=BANDS,
        options={"width": 2, "depth": 1},
        window_px=32,
        multiple_px=2,
    )
    mean = (1500.0,) * len(BANDS)
    network = models.build(card).eval()
    trained = models.TrainedModel(card=card, network=network, mean=mean, std=mean, sites=("x",))
    models.save(trained, path)


def write_dataset(folder: Path, world: Path, **changes: object) -> Path:
    """Write `folder`/dataset.yaml with all steps, on the scenes of a world.

    `changes` replaces keys; a key with the value None is left out.
    """
    content = {
        "id": "two-mines",
        "sites": str(world / "sites.geojson"),
        "years": "2020-2021",
        "catalog": str(world),
        "sources": ["mine"],
        "recipe": "tiny",
        "store": "cubes.zarr",
        "labels": {"file": str(world / "polygons.geojson")},
        "models": [{"file": str(world / "net.pt"), "name": "net"}],
        "tracks": {"rates": "0.05,0.01"},
        "score": {"baselines": True},
        "export": {"formats": ["cog"], "model": "net+hmm"},
        "workers": 1,
        **changes,
    }
    kept = {key: value for key, value in content.items() if value is not None}
    path = folder / "dataset.yaml"
    path.write_text(yaml.safe_dump(kept, sort_keys=False))
    return path


def dataset_in(folder: Path, world: Path, **changes: object) -> Dataset:
    """Write a dataset into a folder, and load it."""
    return load_dataset(write_dataset(folder, world, **changes))


def copy_dataset(finished: Path, folder: Path) -> Path:
    """Copy store, scene lists and results of a dataset, with their times."""
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    return folder


def start_fork_server() -> None:
    """Start the server of worker processes with torch imported, so that workers start quickly."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "minecube.jobs.runs.engines"])
    forkserver.ensure_running()
