"""The group of a site is created, extended and repaired, and one that does not fit is refused."""

from __future__ import annotations

import dataclasses
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr
from odc.geo.xr import xr_coords

from known_site_years import (
    PROVENANCE,
    RECIPE,
    YEARS,
    create_store,
    year_of,
)
from known_stores import files_of
from minecube import cube
from minecube.errors import CubeError
from minecube.grid import grid_of


@pytest.fixture
def grid(site):
    return grid_of(site)


@pytest.fixture
def store(tmp_path, site, grid):
    """A store with the site's template, nothing built."""
    return create_store(tmp_path / "cubes.zarr", site, grid)


def test_a_template_killed_half_way_is_made_anew(store, site, grid):
    group = zarr.open_group(f"{store}/mine", mode="r+")
    group.attrs["minecube"] = {"format": 0}
    shutil.rmtree(f"{store}/mine/quality")
    cube.create_site(store, site, grid, YEARS, RECIPE)
    assert cube.write_year(store, year_of(grid), PROVENANCE, b"")


def test_years_killed_half_way_are_named_anew(store, site, grid):
    """The arrays have grown and the year has no name yet."""
    for name in (
        "reflectance",
        "clear_count",
        "quality",
        "footprint",
        "footprint_fraction",
        "year",
    ):
        array = zarr.open_array(f"{store}/mine/{name}", mode="r+")
        array.resize((5, *array.shape[1:]))
    made = year_of(grid)
    cube.write_year(store, made, PROVENANCE, b"")
    assert cube.read_grid_and_years(store, "mine")[1] == list(YEARS)
    read = cube.open_reflectance(store, "mine")
    assert list(read.year.values) == [2020]
    np.testing.assert_array_equal(read[0], made.reflectance)
    cube.create_site(store, site, grid, [2018, 2020, 2023], RECIPE)
    assert list(cube.open_cube(store, "mine").year.values) == [2018, *YEARS, 2023]


def test_another_recipe_or_grid_is_refused(store, site, grid):
    with pytest.raises(
        CubeError, match="made with recipe 'small', which differs from 'small' in months"
    ):
        cube.create_site(store, site, grid, YEARS, dataclasses.replace(RECIPE, months=(6, 7)))
    with pytest.raises(CubeError, match="lies on another grid"):
        cube.create_site(store, site, grid.pad(6), YEARS, RECIPE)


def test_later_and_earlier_years_are_added(store, site, grid):
    """Shards stay where they are, so the stored years are in the order in which they were added."""
    made = year_of(grid)
    cube.write_year(store, made, PROVENANCE, b"")
    mask = np.random.default_rng(1).integers(0, 2, (1, *grid.shape)).astype(np.uint8)
    coords = {"year": [2020], **xr_coords(grid)}
    cube.write_footprint(store, "mine", xr.DataArray(mask, coords, ("year", "y", "x")), "drawn")
    shards = files_of(store.path / "mine/reflectance/c")
    cube.create_site(store, site, grid, [2020, 2023], RECIPE)
    cube.create_site(store, site, grid, [2018, 2016], RECIPE)
    opened = cube.open_cube(store, "mine")
    assert list(opened.year.values) == [2016, 2018, 2019, 2020, 2021, 2023]
    assert cube.read_grid_and_years(store, "mine")[1] == opened.year.values.tolist()
    assert zarr.open_array(store.path / "mine/year", mode="r")[:].tolist() == [
        *YEARS,
        2023,
        2016,
        2018,
    ]
    np.testing.assert_array_equal(opened.reflectance.sel(year=2020), made.reflectance)
    assert not opened.reflectance.sel(year=[2016, 2018, 2023]).values.any()
    np.testing.assert_array_equal(opened.footprint.sel(year=[2020]), mask)
    assert (opened.footprint.sel(year=[2016, 2018, 2019, 2021, 2023]) == 255).all()
    assert files_of(store.path / "mine/reflectance/c") == shards


def test_runs_that_add_different_years_at_once(store, site, grid):
    """Each builds its own year, and each year keeps its pixels."""
    years = (2016, 2017, 2018, 2022)
    start = threading.Barrier(len(years))

    def add(year):
        start.wait()
        cube.create_site(store, site, grid, [year], RECIPE)
        return cube.write_year(store, year_of(grid, seed=year), {**PROVENANCE, "year": year}, b"")

    with ThreadPoolExecutor(len(years)) as pool:
        assert all(pool.map(add, years))
    opened = cube.open_committed(store, "mine").load()
    assert opened.year.values.tolist() == list(years)
    for year in years:
        for name, layer in year_of(grid, seed=year).items():
            np.testing.assert_array_equal(opened[name].sel(year=year), layer)


def test_a_store_that_is_not_ours(tmp_path, site, grid):
    where = cube.Store(tmp_path / "other.zarr")
    zarr.create_group(str(where)).create_group("mine")
    with pytest.raises(CubeError, match="was not made by this version"):
        cube.create_site(where, site, grid, YEARS, RECIPE)


def test_a_folder_that_cannot_be_written(site, grid):
    with pytest.raises(CubeError, match=r"/proc/cubes\.zarr: cannot be written"):
        cube.create_site(cube.Store("/proc/cubes.zarr"), site, grid, YEARS, RECIPE)


def test_a_site_that_lost_its_metadata_is_not_created_again(store, site, grid):
    cube.write_year(store, year_of(grid), PROVENANCE, b"")
    Path(store.path, "mine/zarr.json").unlink()
    there = sorted(store.path.rglob("*"))
    with pytest.raises(
        CubeError,
        match=r"mine has lost its zarr.json, but has other objects; run `minecube verify`",
    ):
        cube.create_site(store, site, grid, YEARS, RECIPE)
    assert sorted(store.path.rglob("*")) == there


def test_a_group_that_lacks_an_array_is_refused(store, site, grid):
    shutil.rmtree(f"{store}/mine/quality")
    with pytest.raises(CubeError, match="mine lacks its array 'quality'; run `minecube verify`"):
        cube.create_site(store, site, grid, YEARS, RECIPE)
