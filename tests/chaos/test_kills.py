"""A run that is killed between any two objects loses nothing: after running again, the store is that of an undisturbed run."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
import sys
import types
from pathlib import Path

import dask
import dask.array as da
import numpy as np
import odc.geo.xr
import pandas as pd
import pytest
import xarray as xr

from known_scenes import site_of
from minecube import cube
from minecube.catalog import Recipe
from minecube.errors import CubeError
from minecube.grid import grid_of

spec = importlib.util.spec_from_file_location("faults", Path(__file__).with_name("faults.py"))
faults = importlib.util.module_from_spec(spec)
spec.loader.exec_module(faults)

RECIPE = Recipe(id="small", title="t", bands=("B04", "B11"), block_px=64, chunk_px=32)
YEARS = (2019, 2020, 2021)


@pytest.fixture(scope="module")
def site():
    return site_of("pit", 360000, 5600040, 90, 48)


class Counted:
    """Counts of reads, none of them lost."""

    def totals(self):
        return {"planned": 7, "lost": 0, "completeness": 1.0}

    def lost(self):
        return []

    def to_parquet(self):
        out = io.BytesIO()
        pd.DataFrame({"planned": [7], "lost": [0]}).to_parquet(out)
        return out.getvalue()


def create(store, site, years=YEARS):
    cube.create_site(cube.Store(store), site, grid_of(site), years, RECIPE)


def build(store, site, year=2020, seed=1, overwrite=False):
    """Build a year; the second block of every other seed has no observation."""
    grid = grid_of(site)
    rng = np.random.default_rng([year, seed])
    quality = np.ones(grid.shape, np.uint8)
    quality[:, 64:] = seed % 2
    pixels = np.where(quality, rng.integers(1, 9000, (2, *grid.shape)), 0).astype(np.uint16)
    made = {
        "reflectance": (("band", "y", "x"), da.from_array(pixels, chunks=(2, 64, 64))),
        "clear_count": (("y", "x"), da.from_array(quality.astype(np.uint16), chunks=64)),
        "quality": (("y", "x"), da.from_array(quality, chunks=64)),
    }
    told = {
        "minecube:source": "s",
        "s2:processing_baseline": "05.00",
        "minecube:offset": 0,
        "minecube:offset_reason": "r",
    }
    scene = types.SimpleNamespace(id=f"scene {seed}", properties=told)
    listed = io.BytesIO()
    pd.DataFrame({"id": [scene.id]}).to_parquet(listed)
    provenance = cube.describe_build(site, year, grid, RECIPE, [scene])
    how = {"overwrite": overwrite, "workers": 1, "scheduler": "synchronous"}
    cube.write_year(
        cube.Store(store),
        xr.Dataset(made),
        provenance,
        listed.getvalue(),
        cube.BuildOptions(reads=Counted(), **how),
    )


def label(store, site, value=1):
    grid = grid_of(site)
    coords = {"year": list(YEARS), **odc.geo.xr.xr_coords(grid)}
    masks = xr.DataArray(np.full((3, *grid.shape), value, np.uint8), coords, ("year", "y", "x"))
    cube.write_footprint(cube.Store(store), "pit", masks, f"origin {value}", masks * np.uint8(100))


def predict(store, site, model="a", years=(2019, 2020), overwrite=False):
    grid = grid_of(site)

    def rows(views):
        for view in views:
            yield types.SimpleNamespace(
                view=view, y=0, values=np.full((1, 1, *grid.shape), ord(model), np.uint8)
            )

    wanted = cube.Prediction(model="net", views=[(year,) for year in years], origin={"id": model})
    cube.write_prediction(cube.Store(store), "pit", wanted, rows, overwrite=overwrite)


def two_years(store, site):
    create(store, site)
    build(store, site, 2019)
    build(store, site, 2020)


def labelled(store, site):
    two_years(store, site)
    label(store, site)


def mapped(store, site):
    labelled(store, site)
    predict(store, site)


COMMANDS = {
    "create": (lambda *_: None, create),
    "extend": (mapped, lambda store, site: create(store, site, (2017, 2018, 2020, 2023))),
    "first build": (create, build),
    "another build in its place": (
        mapped,
        lambda store, site: build(store, site, seed=2, overwrite=True),
    ),
    "label": (two_years, label),
    "label again": (labelled, lambda store, site: label(store, site, 0)),
    "predict": (labelled, predict),
    "predict with another model": (
        mapped,
        lambda store, site: predict(store, site, "b", overwrite=True),
    ),
    "withdraw": (mapped, lambda store, _: cube.withdraw_years(cube.Store(store), "pit", [2020])),
}


def content(store):
    """All objects of a store, without the times in its markers."""
    found = {}
    for path in sorted(Path(store).rglob("*")):
        if path.is_file():
            found[str(path.relative_to(store))] = path.read_bytes()
    for key in found:
        if "/builds/" in key and key.endswith("20/zarr.json"):
            marker = json.loads(found[key])
            for name in ("committed", "sha256"):
                marker["attributes"].pop(name, None)
            found[key] = json.dumps(marker).encode()
    return found


def committed(store):
    """Pixels of committed years, as the documented way in gives them; None if it refuses."""
    try:
        opened = cube.open_committed(cube.Store(store), "pit").load()
    except CubeError:
        return None
    return {
        int(year): opened.reflectance.sel(year=year).to_numpy().tobytes() for year in opened.year
    }


def damage(store):
    """What `verify` finds, apart from what is unfinished and maps of an earlier build."""
    return [
        str(f)
        for f in cube.verify(cube.Store(store)).findings
        if f.kind not in ("unfinished", "stale")
    ]


def is_mixed(found, old, new):
    """Whether a year has pixels that it had neither before the command nor after it."""
    return any(
        pixels not in ((old or {}).get(year), (new or {}).get(year))
        for year, pixels in (found or {}).items()
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_a_kill_between_any_two_objects(command, site, tmp_path, monkeypatch):
    for module in ("markers", "read.commits"):
        monkeypatch.setattr(sys.modules[f"minecube.cube.{module}"], "PLACED_S", 0.0)
    prepare, run = COMMANDS[command]
    before = tmp_path / "before.zarr"
    undisturbed = tmp_path / "undisturbed.zarr"
    with dask.config.set(scheduler="synchronous"):
        prepare(str(before), site)
        old = committed(str(before))
        if before.exists():
            shutil.copytree(before, undisturbed)
        with faults.dying_after(None) as writes:
            run(str(undisturbed), site)
        wanted = content(undisturbed)
        new = committed(str(undisturbed))
        assert writes.count > 3
        assert damage(undisturbed) == []
        for last in range(writes.count):
            store = tmp_path / "killed.zarr"
            if before.exists():
                shutil.copytree(before, store)
            with faults.dying_after(last), pytest.raises(faults.Killed):
                run(str(store), site)
            assert not is_mixed(committed(str(store)), old, new), last
            if before.exists():
                assert damage(store) == [], last
            run(str(store), site)
            assert content(store) == wanted, last
            assert not (store / ".locks").exists()
            shutil.rmtree(store)
