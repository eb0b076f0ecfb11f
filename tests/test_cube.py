"""A stored cube holds what was written, opens unaided and georeferenced, and names what is missing."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import odc.geo.xr  # noqa: F401
import pyogrio
import pytest
import rasterio
import rioxarray  # noqa: F401
import xarray as xr
import zarr

from known_site_years import (
    PROVENANCE,
    RECIPE,
    YEARS,
    create_store,
    year_of,
)
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


def test_a_store_is_a_value(tmp_path):
    """It is equal, hashed and pickled by its name, and shows the name as it was given."""
    store = cube.Store("cubes.zarr/")
    copy = pickle.loads(pickle.dumps(store))
    assert copy == store
    assert hash(copy) == hash(store)
    assert (str(copy), copy.path, copy.packed) == ("cubes.zarr/", Path("cubes.zarr"), False)
    assert cube.Store(tmp_path / "cubes.zip").packed
    (tmp_path / "folder.zip").mkdir()
    assert not cube.Store(tmp_path / "folder.zip").packed
    assert cube.Store("s3://bucket/cubes.zarr").absolute().path is None


def test_what_is_written_is_what_is_read(store, grid):
    made = year_of(grid)
    assert cube.write_year(store, made, PROVENANCE, b"scene list")
    opened = xr.open_zarr(str(store), group="mine", consolidated=False)
    for name in made.data_vars:
        assert (
            opened[name].dtype == made[name].dtype
        )  # no fill value that would turn integers into floats
        np.testing.assert_array_equal(opened[name].sel(year=2020), made[name])
        assert not opened[name].sel(year=[2019, 2021]).values.any()
    assert (opened.footprint == 255).all()
    assert opened.reflectance.dims == ("year", "band", "y", "x")
    assert list(opened.band.values) == ["B04", "B11"]
    by_zarr = zarr.open_group(str(store), mode="r")["mine"]
    np.testing.assert_array_equal(by_zarr["reflectance"][1], made.reflectance)
    assert by_zarr["reflectance"].shards == (1, 2, 64, 64)
    assert by_zarr["reflectance"].chunks == (1, 2, 32, 32)
    assert zarr.open_array(f"{store}/mine/builds/2020/scenes")[:].tobytes() == b"scene list"


def test_an_object_store_holds_the_same(bucket, site, grid):
    url = cube.Store(f"{bucket}/cubes.zarr")
    made = year_of(grid)
    cube.create_site(url, site, grid, YEARS, RECIPE)
    assert cube.write_year(url, made, PROVENANCE, b"")
    assert not cube.write_year(url, made, PROVENANCE, b"")
    cube.create_site(url, site, grid, [2022], RECIPE)
    opened = cube.open_committed(url, "mine")
    np.testing.assert_array_equal(opened.reflectance[0], made.reflectance)
    assert cube.list_sites(url) == ["mine"]
    assert list(cube.open_cube(url, "mine").year.values) == [*YEARS, 2022]


def test_a_damaged_store_says_so(store, tmp_path):
    (tmp_path / "cubes.zarr" / "mine" / "zarr.json").write_text("{")
    with pytest.raises(CubeError, match=r"mine cannot be read .* run `minecube verify`"):
        cube.open_cube(store, "mine")
    (tmp_path / "file").write_text("")
    with pytest.raises(CubeError, match="is a file"):
        cube.list_sites(cube.Store(tmp_path / "file"))


def test_it_is_georeferenced_unaided_to_the_centimetre(store, grid):
    opened = xr.open_zarr(str(store), group="mine", consolidated=False)
    assert opened.odc.geobox == grid
    assert opened.reflectance.rio.crs.to_epsg() == 32633
    assert tuple(opened.reflectance.rio.transform())[:6] == (10, 0, 360000, 0, -10, 5600040)
    assert tuple(opened.reflectance.rio.bounds()) == tuple(grid.boundingbox)
    assert (float(opened.x[0]), float(opened.y[0])) == pytest.approx((360005, 5600035), abs=0.01)
    assert (float(opened.x[-1]), float(opened.y[-1])) == pytest.approx((362395, 5598245), abs=0.01)
    attrs = zarr.open_group(f"{store}/mine", mode="r").attrs
    assert attrs["proj:code"] == "EPSG:32633"
    assert attrs["spatial:transform"] == [10, 0, 360000, 0, -10, 5600040]
    assert attrs["spatial:bbox"] == list(grid.boundingbox)
    assert {c["name"] for c in attrs["zarr_conventions"]} == {"proj:", "spatial:"}


def test_gdal_reads_it_where_it_is_new_enough(store, grid):
    newest = max(
        tuple(int(n) for n in v.split(".")[:2])
        for v in (rasterio.__gdal_version__, pyogrio.__gdal_version_string__)
    )
    if newest < (3, 13):
        pytest.skip(
            f"GDAL reads sharded Zarr v3 from 3.13 on, here is {newest}; COGs are the way for older ones"
        )
    cube.write_year(store, made := year_of(grid), PROVENANCE, b"")
    with rasterio.open(f'ZARR:"{store}":/mine/clear_count:1') as src:
        np.testing.assert_array_equal(src.read(1), made.clear_count)


def test_what_is_not_there_is_named(store):
    with pytest.raises(CubeError, match="no site 'other'; it has mine"):
        cube.open_cube(store, "other")
    with pytest.raises(CubeError, match="no prediction of 'net' for mine"):
        cube.open_probability(store, "mine", "net")
    with pytest.raises(CubeError, match="there is no store"):
        cube.list_sites(cube.Store(f"{store}x"))
