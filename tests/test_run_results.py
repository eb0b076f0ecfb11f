"""A run makes what the commands of its steps make alone, pixel by pixel and number by number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rasterio

from known_builds import run_here
from known_runs import PLACES, YEARS
from minecube import cube

STEPS = ("reflectance", "clear_count", "quality", "footprint", "footprint_fraction")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, run_world: Path) -> Path:
    """Folder with a store and results made by separate commands."""
    folder = tmp_path_factory.mktemp("alone")
    store = ("--store", folder / "cubes.zarr")
    catalog = ("--catalog", run_world)
    places = ("--sites", run_world / "sites.geojson", "--years", "2020-2021", "--source", "mine")
    scenes = ("--recipe", "tiny", "--scenes", folder / "scenes", "--on-offset-conflict", "drop")
    run_here("build", *store, *catalog, *places, *scenes)
    run_here("label", *store, "--polygons", run_world / "polygons.geojson")
    run_here("predict", *store, "--model", run_world / "net.pt", "--name", "net")
    run_here("tracks", *store, "--model", "net", "--rates", "0.05,0.01", "--out", folder / "tracks")
    scores = ("--out", folder / "scores")
    run_here("score", *store, "--model", "net,net+hmm", "--baselines", *scores)
    run_here("export", *store, "--model", "net+hmm", "--out", folder / "export")
    return folder


def test_cubes_labels_and_maps_are_the_same(finished_run: Path, alone: Path) -> None:
    stores = [cube.Store(str(folder / "cubes.zarr")) for folder in (finished_run, alone)]
    for site in PLACES:
        in_run, expected = (cube.open_committed(store, site).load() for store in stores)
        assert in_run.year.values.tolist() == list(YEARS)
        for name in STEPS:
            np.testing.assert_array_equal(in_run[name].values, expected[name].values)
        for model in ("net", "net+hmm"):
            maps = [cube.open_probability(store, site, model).values for store in stores]
            np.testing.assert_array_equal(*maps)
        assert in_run.footprint.values.any()


def test_areas_and_scores_are_the_same(finished_run: Path, alone: Path) -> None:
    results = finished_run / "results"
    areas = pd.read_csv(results / "tracks" / "net" / "areas.csv")
    expected = pd.read_csv(alone / "tracks" / "areas.csv")
    pd.testing.assert_frame_equal(areas, expected)
    for name in ("by_site", "by_year", "pooled"):
        table = pd.read_csv(results / "scores" / f"{name}.csv")
        expected = pd.read_csv(alone / "scores" / f"{name}.csv")
        pd.testing.assert_frame_equal(table, expected)
        assert len(table) > 0


def test_exported_images_are_the_same(finished_run: Path, alone: Path) -> None:
    images = sorted((alone / "export").rglob("*.tif"))
    assert len(images) == 2 * 2 * 3  # sites, years, kinds of images
    for path in images:
        site = path.parent.name
        same = finished_run / "results" / "export" / site / site / path.name
        with rasterio.open(path) as expected, rasterio.open(same) as found:
            np.testing.assert_array_equal(found.read(), expected.read())
            assert found.transform == expected.transform
