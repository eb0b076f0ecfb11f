"""Stores to pack, their packed files, and what the tests of both do to them."""

from __future__ import annotations

import io
import types
import zipfile

import dask.array as da
import numpy as np
import odc.geo.xr
import pandas as pd
import pytest
import xarray as xr
from click.testing import CliRunner

from known_scenes import site_of
from minecube import cube
from minecube.catalog import Recipe
from minecube.cli import cli
from minecube.errors import CubeError
from minecube.grid import grid_of

RECIPE = Recipe(id="small", title="t", bands=("B04", "B11"), block_px=64, chunk_px=32)
YEARS = (2019, 2020, 2021)


def year_of(grid, seed):
    """What a real composite could be: quality, counts and reflectance agree. The last block saw nothing."""
    rng = np.random.default_rng(seed)
    quality = rng.integers(1, 7, grid.shape).astype(np.uint8)
    quality[64:, 128:] = 0  # if there is such a block
    reflectance = np.where(quality, rng.integers(1, 9000, (2, *grid.shape)), 0).astype(np.uint16)
    clear = np.where(np.isin(quality, (1, 5, 6)), rng.integers(1, 30, grid.shape), 0).astype(
        np.uint16
    )
    layers = {"reflectance": reflectance, "clear_count": clear, "quality": quality}
    return xr.Dataset(
        {
            n: (
                ("band", "y", "x")[3 - v.ndim :],
                da.from_array(v, chunks=(2, 64, 64)[3 - v.ndim :]),
            )
            for n, v in layers.items()
        }
    )


def provenance(site, year):
    told = {
        "minecube:source": "s",
        "s2:processing_baseline": "05.00",
        "minecube:offset": 0,
        "minecube:offset_reason": "r",
    }
    return cube.describe_build(
        site, year, grid_of(site), RECIPE, [types.SimpleNamespace(id="a", properties=told)]
    )


def built(store, site, years=(2019, 2020), begun=()):
    """Some years, one that is only begun, labels of all, and a prediction."""
    grid = grid_of(site)
    cube.create_site(cube.Store(store), site, grid, YEARS, RECIPE)
    for year in years:
        cube.write_year(cube.Store(store), year_of(grid, year), provenance(site, year), scenes())
    for year in begun:
        how = {"workers": 1, "stopped": iter((False, True, True)).__next__}
        with pytest.raises(CubeError, match="stopped with"):
            cube.write_year(
                cube.Store(store),
                year_of(grid, year),
                provenance(site, year),
                scenes(),
                cube.BuildOptions(**how),
            )
    mask = np.random.default_rng(1).integers(0, 2, (3, *grid.shape)).astype(np.uint8)
    masks = xr.DataArray(
        mask, dims=("year", "y", "x"), coords={"year": list(YEARS), **odc.geo.xr.xr_coords(grid)}
    )
    cube.write_footprint(cube.Store(store), site.id, masks, origin="drawn")
    if years:
        cube.write_probability(
            cube.Store(store), site.id, "net", masks.sel(year=list(years)), {"id": "net"}
        )


def scenes():
    pd.DataFrame({"id": ["a"]}).to_parquet(out := io.BytesIO())
    return out.getvalue()


def make_sites():
    return {
        "pit": site_of("pit", 360000, 5600040, 180, 120),
        "pond": site_of("pond", 370020, 5600040, 60, 60),
        "plan": site_of("plan", 380040, 5600040, 60, 60),
    }


def make_whole(folder):
    """A site with a year begun, a small one, and one of which nothing is built."""
    sites, store = make_sites(), folder / "cubes.zarr"
    built(str(store), sites["pit"], begun=(2021,))
    built(str(store), sites["pond"])
    built(str(store), sites["plan"], years=())
    return store


def pack_whole(whole):
    """It packed, and what the command said."""
    out = whole.with_name("cubes.zarr.zip")
    done = CliRunner().invoke(cli, ["pack", "--store", str(whole), "--out", str(out)])
    assert done.exit_code == 0, done.output
    return out, done


def pack_small(whole):
    """Only the small site, for tests that look at every byte."""
    cube.pack(cube.Store(whole), out := whole.with_name("pond.zip"), ["pond"])
    return out


def contents(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def place(path, key):
    """Where a member's bytes begin, and how many they are."""
    with zipfile.ZipFile(path) as opened:
        info = opened.getinfo(key)
        content = opened.read(key)
    return path.read_bytes().index(content, info.header_offset), len(content)


def flip(path, at, bit=0):
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)
