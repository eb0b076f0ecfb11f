"""The commands build, label, train, map, score and export one simulated mine."""

from __future__ import annotations

import json
import shutil

import geopandas as gpd
import numpy as np
import pytest
import xarray as xr
from shapely.geometry import box

from known_builds import run
from minecube import cube


def test_built_cubes_and_labels(world, built):
    cubes = xr.open_zarr(built, group="pit", consolidated=False)
    truth = xr.open_zarr(world / "archive" / "truth.zarr", group="pit", consolidated=False)
    np.testing.assert_array_equal(cubes.footprint, truth.footprint)
    seen = cubes.reflectance.values > 0
    assert seen.mean() > 0.99
    error = (cubes.reflectance.astype(float) - truth.reflectance.astype(float)).values[seen] / 1e4
    assert np.sqrt((error**2).mean()) < 0.03
    provenance = cube.read_markers(cube.Store(built), "pit")[2022]
    assert {s["source"] for s in provenance["scenes"]} == {"sim-earth-search"}
    assert all(s["offset"] == 0 and "is true" in s["offset_reason"] for s in provenance["scenes"])


def test_label_keeps_the_fraction_beside_the_footprint(built):
    opened = cube.open_cube(cube.Store(built), "pit")
    fraction, mine = opened.footprint_fraction.values, opened.footprint.values == 1
    assert (fraction != 255).all()
    # A convex corner may hide in a pixel, no more: most pixels are all or nothing, and the sums agree.
    assert (fraction[mine] > 0).all()
    assert (fraction[~mine] < 250).all()
    assert fraction.sum(dtype=float) / 250 == pytest.approx(mine.sum(), rel=0.02)


def test_train_predict_score_export(built, tmp_path):
    model = tmp_path / "model.pt"
    run("train", "--store", built, "--out", model, "--epochs", "2")
    run("predict", "--store", built, "--model", model)
    out, _ = run("score", "--store", built, "--json", tmp_path / "scores.json")
    assert "ca_tiou" in out
    scores = json.loads((tmp_path / "scores.json").read_text())
    ((name, scored),) = scores["models"].items()
    assert name == cube.find_prediction(cube.Store(built), ["pit"], "unet-small")
    sites = scored["sites"]
    assert sites["pit"] == sites["pooled"]
    out, _ = run("export", "--store", built, "--out", tmp_path / "export", "--model", "unet-small")
    made = {p.name for p in (tmp_path / "export").rglob("*") if p.is_file()}
    assert {
        "collection.json",
        "pit_2020_reflectance.tif",
        "pit_2022_probability.tif",
        "pit_strip.png",
        "pit_areas.png",
        "areas.png",
    } <= made
    kinds = [f"footprints_{kind}" for kind in ("labels", "mapped")]
    assert {f"{kind}.{suffix}" for kind in kinds for suffix in ("parquet", "gpkg")} <= made
    for kind in kinds:
        outlines = gpd.read_parquet(tmp_path / "export" / f"{kind}.parquet")
        assert not outlines.duplicated(["year", "id"]).any()
        assert outlines["id"].str.startswith("pit_").all()
        assert (outlines.to_crs(3035).area / outlines["area_m2"]).between(0.995, 1.005).all()
        beside = gpd.read_file(tmp_path / "export" / f"{kind}.gpkg")
        assert beside["id"].tolist() == outlines["id"].tolist()
        assert beside.geometry.geom_equals_exact(outlines.geometry, 1e-9).all()
    run("export", "--store", built, "--out", tmp_path / "large", "--min-area", "20000")
    large = gpd.read_parquet(tmp_path / "large" / "footprints_labels.parquet")
    small = gpd.read_parquet(tmp_path / "export" / "footprints_labels.parquet")
    assert large["area_m2"].min() >= 20000
    assert len(large) == (small["area_m2"] >= 20000).sum()
    _, err = run("export", "--store", built, "--out", tmp_path / "none", "--min-area", "-1", ok=2)
    assert "--min-area" in err
    _, err = run("score", "--store", built, "--model", "other", ok=2)
    assert "no prediction of 'other' for pit" in err


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
    bowtie = (
        f"POLYGON(({west} {south}, {east} {north}, {east} {south}, {west} {north}, {west} {south}))"
    )
    gpd.GeoDataFrame(geometry=gpd.GeoSeries.from_wkt([bowtie]), crs=4326).to_file(
        tmp_path / "bowtie.gpkg"
    )
    shutil.copytree(built, tmp_path / "cubes.zarr")
    _, err = run(
        "label", "--store", tmp_path / "cubes.zarr", "--polygons", tmp_path / "bowtie.gpkg"
    )
    assert "repaired" in err
