"""Stores, models and packed files of earlier versions still open, and work goes on in them."""

from __future__ import annotations

import io
import types
import zipfile
from pathlib import Path

import dask.array as da
import numpy as np
import odc.geo.xr
import pandas as pd
import pytest
import xarray as xr
from click.testing import CliRunner

from known_scenes import site_of
from minecube import cube, models
from minecube.catalog import BANDS, SCL, Recipe, as_dict, rebuild_recipe
from minecube.cli import cli
from minecube.composite import composite
from minecube.errors import ReadError
from minecube.grid import grid_of

EARLIER = Path(__file__).with_name("earlier")
RECIPE = Recipe(id="small", title="t", block_px=64, chunk_px=32)


@pytest.fixture
def store(tmp_path):
    folder = tmp_path / "cubes.zarr"
    zipfile.ZipFile(EARLIER / "store.zip").extractall(folder)
    return str(folder)


@pytest.fixture
def site():
    return site_of("pit", 360000, 5600040, 72, 66)


def pixels_of(year):
    """As `earlier/README.md` says."""
    band, y, x = np.mgrid[:10, :66, :72]
    pixels = (year - 2000) * 10 + band * 100 + y // 8 + x // 8
    return np.where(y < 5, 0, pixels).astype(np.uint16)


def build(store, site, year):
    quality = (pixels_of(year)[0] > 0).astype(np.uint8)
    made = {
        "reflectance": (("band", "y", "x"), da.from_array(pixels_of(year), chunks=(10, 64, 64)))
    }
    for name, dtype in (("clear_count", np.uint16), ("quality", np.uint8)):
        made[name] = (("y", "x"), da.from_array(quality.astype(dtype), chunks=64))
    told = {
        "minecube:source": "s",
        "s2:processing_baseline": "05.00",
        "minecube:offset": 0,
        "minecube:offset_reason": "r",
    }
    scene = types.SimpleNamespace(id="a", properties=told)
    pd.DataFrame({"id": ["a"]}).to_parquet(listed := io.BytesIO())
    provenance = cube.describe_build(site, year, grid_of(site), RECIPE, [scene])
    return cube.write_year(cube.Store(store), xr.Dataset(made), provenance, listed.getvalue())


def run(*words):
    done = CliRunner().invoke(cli, [str(w) for w in words])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "packed"])
def test_all_of_it_is_read(store, packed):
    where = str(EARLIER / "packed.zip") if packed else store
    opened = cube.open_committed(cube.Store(where), "pit").load()
    assert opened.year.values.tolist() == [2019, 2020]
    for year in (2019, 2020):
        np.testing.assert_array_equal(opened.reflectance.sel(year=year), pixels_of(year))
    assert int((opened.footprint.sel(year=2020) == 1).sum()) == 600
    assert opened.footprint.attrs["origin"] == "drawn (CC0)"
    assert cube.read_counts(cube.Store(where), "pit", 2020).lost.tolist() == [1]
    assert cube.completeness_of(cube.read_markers(cube.Store(where), "pit")[2020]) == 0.875
    assert cube.open_probability(cube.Store(where), "pit", "tiny").year.values.tolist() == [
        2019,
        2020,
    ]
    assert cube.open_probability(cube.Store(where), "pit", "tiny+hmm").dims == ("year", "y", "x")
    window = cube.CubeDataset(cube.Store(where), size=32, step=32)[0]
    np.testing.assert_array_equal(window["reflectance"][1], pixels_of(2020)[:, :32, :32])
    assert cube.verify(cube.Store(where)).findings == ()


def test_work_goes_on(store, site):
    """The year of which one block was built, an earlier and a later year, labels, maps of the same model, and a packed file."""
    cube.create_site(cube.Store(store), site, grid_of(site), (2018, 2021, 2022), RECIPE)
    assert not build(store, site, 2020)  # it is there
    for year in (2018, 2021, 2022):
        assert build(store, site, year)
    assert "pit: 3 years mapped" in run(
        "predict", "--store", store, "--model", EARLIER / "model.pt", "--name", "tiny"
    )
    opened = cube.open_committed(cube.Store(store), "pit").load()
    assert opened.year.values.tolist() == [2018, 2019, 2020, 2021, 2022]
    for year in (2018, 2019, 2020, 2021, 2022):
        np.testing.assert_array_equal(opened.reflectance.sel(year=year), pixels_of(year))
    masks = xr.zeros_like(opened.footprint)
    masks = masks.assign_coords(odc.geo.xr.xr_coords(grid_of(site)))
    cube.write_footprint(cube.Store(store), "pit", masks, "none")
    assert not (cube.open_committed(cube.Store(store), "pit").footprint == 1).any()
    assert [f.kind for f in cube.verify(cube.Store(store)).findings] == [
        "stale"
    ]  # tiny+hmm, of two years
    run("pack", "--store", store, "--out", f"{store}.zip")
    xr.testing.assert_equal(
        cube.open_committed(cube.Store(f"{store}.zip"), "pit"),
        cube.open_committed(cube.Store(store), "pit"),
    )


def test_a_model_maps_as_it_did(store):
    mapper = models.load(EARLIER / "model.pt")
    reflectance = cube.open_committed(cube.Store(store), "pit").reflectance.load()
    found = models.predict(mapper, reflectance).astype(int)
    assert (
        abs(found - cube.open_probability(cube.Store(store), "pit", "tiny").astype(int)).max() <= 1
    )  # another processor's last bit


def test_a_recipe_with_a_second_cloud_mask_is_read_but_makes_no_composite(site):
    stored = as_dict(RECIPE) | {"second_opinion": {"weights": ["a.pt"], "classes": [1, 2, 3]}}
    recipe = rebuild_recipe(stored)
    assert as_dict(recipe) == stored
    asset = types.SimpleNamespace(extra_fields={"gsd": 10})
    scene = types.SimpleNamespace(id="a", assets=dict.fromkeys([*BANDS, SCL], asset))
    with pytest.raises(ReadError, match="'small': second cloud masks have been removed"):
        composite([scene], grid_of(site), recipe)
