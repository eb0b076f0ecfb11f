"""`minecube tracks` as a user meets it, on a store of two sites whose years are known."""

from __future__ import annotations

import json
import re
from pathlib import Path

import dask.array as da
import numpy as np
import pandas as pd
import pytest
import rasterio
import xarray as xr
import zarr
from click.testing import CliRunner

from known_scenes import site_of
from minecube import cube, tracks
from minecube.catalog import load_recipes
from minecube.cli import cli
from minecube.errors import CubeError, LabelError
from minecube.grid import grid_of
from minecube.jobs.tracks import track_site

RECIPE = load_recipes()["annual-median"]
YEARS = (2016, 2017, 2018, 2020, 2021, 2022)
OPENS = {"pit": 2018, "hole": 2016}


def run(*arguments, ok=0):
    done = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert done.exit_code == ok, (done.output, done.exception)
    return done.output


def truth(name: str, shape: tuple[int, int]) -> np.ndarray:
    """A square that opens, and in `hole` is there at first and reclaimed from its left half in 2021."""
    mine = np.zeros((len(YEARS), *shape), np.uint8)
    for t, year in enumerate(YEARS):
        if year >= OPENS[name]:
            mine[t, 10:50, 10:50] = 1
        if name == "hole" and year >= 2021:
            mine[t, 10:50, 10:30] = 0
    return mine


@pytest.fixture(scope="module")
def sites():
    return [site_of("pit", 360000, 5600040, 90, 60), site_of("hole", 420000, 5600040, 60, 60)]


@pytest.fixture(scope="module")
def store(tmp_path_factory, sites) -> Path:
    path = tmp_path_factory.mktemp("store") / "cubes.zarr"
    for n, site in enumerate(sites):
        grid = grid_of(site)
        shape = tuple(grid.shape)
        cube.create_site(cube.Store(path), site, grid, YEARS, RECIPE)
        said = {
            "site": site.id,
            "grid": {},
            "recipe": {"title": RECIPE.title},
            "version": "0.1.0",
            "libraries": {},
        }
        scene = {"id": "S2A", "source": "s", "baseline": "05.00", "offset": 0, "offset_reason": "r"}
        for year in YEARS:
            layers = {
                "reflectance": np.ones((10, *shape), np.uint16),
                "clear_count": np.ones(shape, np.uint16),
            }
            layers["quality"] = np.ones(shape, np.uint8)
            made = xr.Dataset(
                {
                    k: (
                        ("band", "y", "x")[-v.ndim :],
                        da.from_array(v, chunks=(*v.shape[:-2], RECIPE.block_px, RECIPE.block_px)),
                    )
                    for k, v in layers.items()
                }
            )
            assert cube.write_year(
                cube.Store(path), made, {**said, "year": year, "scenes": [scene]}, b"scenes"
            )
        mine, r = truth(site.id, shape), np.random.default_rng(n)
        probability = np.where(mine == 1, 245, 5) + r.integers(-4, 5, mine.shape)
        flicker = r.random(mine.shape) < 0.02
        probability = np.where(flicker, np.where(mine == 1, 90, 160), probability).astype(np.uint8)
        opened = cube.open_committed(cube.Store(path), site.id)
        mapped = opened["footprint"].copy(data=probability)
        cube.write_probability(
            cube.Store(path), site.id, "net", mapped, {"id": "net", "licence": "MIT"}
        )
        cube.write_footprint(
            cube.Store(path), site.id, opened["footprint"].copy(data=mine), "drawn"
        )
    return path


def test_when_did_it_open_and_how_fast_does_it_grow(store, tmp_path):
    out = tmp_path / "out"
    said = run("tracks", "--store", store, "--model", "net", "--out", out)
    pit, hole = (
        next(line.split() for line in said.splitlines() if line.startswith(name))
        for name in ("pit", "hole")
    )
    assert pit[1] == "2018"
    assert hole[1:3] == ["<=", "2016"]
    assert re.search(r"abrupt, 9\d% in 2018", said)
    assert "none" in hole
    told = pd.read_csv(out / "sites.csv").set_index("site").loc[["pit", "hole"]]
    assert told["last_ha"].tolist() == pytest.approx([16, 8], rel=0.05)
    assert told["reclaimed_ha"].tolist() == pytest.approx([0, 8], rel=0.05, abs=0.05)
    assert (told["flip_rate"] < 0.1 * told["flip_rate_raw"]).all()
    areas = pd.read_csv(out / "areas.csv")
    assert areas.groupby("site")["year"].apply(list).to_dict() == {
        name: list(YEARS) for name in OPENS
    }
    assert (areas["low_m2"] <= areas["expected_m2"]).all()
    assert (areas["expected_m2"] <= areas["high_m2"]).all()
    with rasterio.open(out / "hole" / "hole_onset.tif") as image:
        assert image.crs == grid_of_store(store, "hole").crs
        assert image.transform == grid_of_store(store, "hole").affine
        np.testing.assert_array_equal(image.read(1)[10:50, 10:50], 2016)
        assert image.nodata == 0
        assert {c["name"]: c["licence"] for c in json.loads(image.tags()["credits"])}[
            "model net"
        ] == "MIT"
    with rasterio.open(out / "hole" / "hole_kind.tif") as image:
        kind = image.read(1)[10:50, 10:50]
        assert image.tags()["flag_meanings"].split()[4] == "closed_abruptly"
        assert np.isin(kind[:, :20], (1 + 16, 1 + 32)).mean() > 0.95  # there at first, and closed
        assert (kind[:, 20:] == 1 + 2).mean() > 0.95
    assert {p.name for p in (out / "pit").iterdir()} == {
        f"pit_{n}.tif" for n in ("onset", "end", "reclaimed", "kind", "flips")
    }


def grid_of_store(store, name):
    return cube.open_cube(cube.Store(store), name).odc.geobox


def test_a_smoothed_map_is_a_prediction_like_any_other(store, tmp_path):
    run("tracks", "--store", store, "--model", "net", "--out", tmp_path / "out")
    smoothed = cube.open_probability(cube.Store(store), "pit", "net+hmm")
    raw, other = (cube.open_probability(cube.Store(store), name, "net") for name in ("pit", "hole"))
    card = smoothed.attrs["model"]
    assert card["id"] == "net+hmm"
    assert card["licence"] == "MIT"
    rates = tracks.Rates(**card["rates"])
    assert rates == tracks.learn_rates([other, raw])
    np.testing.assert_array_equal(smoothed.values, tracks.smooth(raw, rates).values)
    scores = {}
    for model in ("net", "net+hmm"):
        run("score", "--store", store, "--model", model, "--json", tmp_path / "s.json")
        scores[model] = json.loads((tmp_path / "s.json").read_text())["models"][model]["sites"][
            "pooled"
        ]
    for name in ("iou", "ca_tiou", "bc", "change_f1"):
        assert scores["net+hmm"][name] > scores["net"][name]
    assert "+hmm" not in run(
        "verify", "--store", store, ok=1
    )  # which finds fault with the scene lists of this test alone
    assert "smoothed already" in run(
        "tracks", "--store", store, "--model", "net+hmm", "--out", tmp_path / "o", ok=2
    )


def test_a_smoothed_map_is_not_opened_once_another_model_has_mapped(store, tmp_path):
    def tracked():
        run("tracks", "--store", store, "--model", "net", "--out", tmp_path / "out")

    raw = cube.open_probability(cube.Store(store), "pit", "net").load()
    card = raw.attrs["model"]
    tracked()
    cube.write_probability(cube.Store(store), "pit", "net", raw, card)  # the same model once more
    cube.open_probability(cube.Store(store), "pit", "net+hmm")
    cube.write_probability(
        cube.Store(store), "pit", "net", 250 - raw, {**card, "weights_sha256": "other"}
    )
    try:
        for command in (
            ("score", "--model", "net+hmm"),
            ("export", "--model", "net+hmm", "--out", tmp_path / "e"),
        ):
            said = run(*command, "--store", store, "--sites", "pit", ok=2)
            assert "'net+hmm' of pit was made of an earlier 'net'" in said
            assert "minecube tracks" in said
        zarr.open_group(str(store), path="pit/predictions/net", mode="r+").attrs.put(
            {}
        )  # a run was killed that had just begun
        with pytest.raises(CubeError, match=r"'net\+hmm' of pit was made of an earlier 'net'"):
            cube.open_probability(cube.Store(store), "pit", "net+hmm")
        cube.write_probability(
            cube.Store(store), "pit", "net", 250 - raw, {**card, "weights_sha256": "other"}
        )
        tracked()
        smoothed = cube.open_probability(cube.Store(store), "pit", "net+hmm")
        assert (smoothed.values[:, 0, -10:] > 125).all()  # of the map that is there now
    finally:
        cube.write_probability(cube.Store(store), "pit", "net", raw, card)


def test_rates_of_labels_given_and_wrong(store, tmp_path):
    out = tmp_path / "out"
    run(
        "tracks",
        "--store",
        store,
        "--model",
        "net",
        "--sites",
        "hole",
        "--rates",
        "labels:pit",
        "--out",
        out,
    )
    labels = cube.open_committed(cube.Store(store), "pit")["footprint"]
    card = cube.open_probability(cube.Store(store), "hole", "net+hmm").attrs["model"]
    assert tracks.Rates(**card["rates"]) == tracks.learn_rates_from_labels([labels])
    run(
        "tracks",
        "--store",
        store,
        "--model",
        "net",
        "--rates",
        "0.02,0.001",
        "--temper",
        "0.5",
        "--out",
        out,
    )
    card = cube.open_probability(cube.Store(store), "hole", "net+hmm").attrs["model"]
    assert [card["rates"][k] for k in ("opening", "closing", "temper")] == [0.02, 0.001, 0.5]
    before = {p: p.stat().st_mtime_ns for folder in (tmp_path, store) for p in folder.rglob("*")}
    for rates, message in (
        ("often", "two chances per year"),
        ("0.01", "two chances"),
        ("0,0.1", "opening"),
        ("0.01,nan", "closing"),
    ):
        assert message in run(
            "tracks", "--store", store, "--model", "net", "--rates", rates, "--out", out, ok=2
        )
    assert "no prediction of 'other'" in run(
        "tracks", "--store", store, "--model", "other", "--out", tmp_path / "o", ok=2
    )
    assert "unknown site" in run(
        "tracks", "--store", store, "--model", "net", "--rates", "labels:x", "--out", out, ok=2
    )
    assert {
        p: p.stat().st_mtime_ns for folder in (tmp_path, store) for p in folder.rglob("*")
    } == before


def test_one_year_is_no_track(store, sites, tmp_path):
    one = cube.open_probability(cube.Store(store), "pit", "net").isel(year=[0]).load()
    with pytest.raises(LabelError, match="two years or more"):
        track_site(one, grid_of(sites[0]), tracks.learn_rates([one]))
