"""Stores to verify, and the ways in which tests damage them."""

from __future__ import annotations

import io
import json
import types

import dask.array as da
import numpy as np
import odc.geo.xr
import pandas as pd
import xarray as xr

from known_scenes import site_of
from minecube import cube
from minecube.catalog import Recipe
from minecube.grid import grid_of

RECIPE = Recipe(id="small", title="t", bands=("B04", "B11"), block_px=64, chunk_px=32)
YEARS = (2019, 2020, 2021)
SHARD = "pit/reflectance/c/1/0/1/2"


def year_of(grid, seed):
    """A composite that a real one could be: quality, counts and reflectance agree. The last block saw nothing."""
    rng = np.random.default_rng(seed)
    quality = rng.integers(0, 7, grid.shape).astype(np.uint8)
    quality[128:, 192:] = 0  # if there is such a block
    seen = quality > 0
    reflectance = np.where(seen, rng.integers(1, 9000, (2, *grid.shape)), 0).astype(np.uint16)
    clear = np.where(np.isin(quality, (1, 5, 6)), rng.integers(1, 30, grid.shape), 0).astype(
        np.uint16
    )

    def lazy(values):
        return da.from_array(values, chunks=(*values.shape[:-2], 64, 64))

    return xr.Dataset(
        {
            "reflectance": (("band", "y", "x"), lazy(reflectance)),
            "clear_count": (("y", "x"), lazy(clear)),
            "quality": (("y", "x"), lazy(quality)),
        }
    )


def parquet(**columns):
    out = io.BytesIO()
    pd.DataFrame(columns).to_parquet(out)
    return out.getvalue()


class Counted:
    """Counts of reads, none of them lost."""

    def totals(self):
        return {"planned": 7, "lost": 0, "completeness": 1.0}

    def lost(self):
        return []

    def to_parquet(self):
        return parquet(scene=["a", "a"], planned=[3, 4], lost=[0, 0])


def provenance(site, year):
    told = {
        "source": "s",
        "s2:processing_baseline": "05.00",
        "minecube:offset": 0,
        "minecube:offset_reason": "r",
    }
    scene = types.SimpleNamespace(
        id="a",
        properties={
            k if k.startswith("s2") or ":" in k else f"minecube:{k}": v for k, v in told.items()
        },
    )
    return cube.describe_build(site, year, grid_of(site), RECIPE, [scene])


def built(store, site, years=(2019, 2020)):
    """A site with two of three years, labels and a prediction."""
    grid = grid_of(site)
    cube.create_site(cube.Store(store), site, grid, YEARS, RECIPE)
    for year in years:
        seed = year + (site.id == "quarry") * 100
        cube.write_year(
            cube.Store(store),
            year_of(grid, seed),
            provenance(site, year),
            parquet(id=["a"]),
            cube.BuildOptions(reads=Counted()),
        )
    rng = np.random.default_rng(1)
    masks = xr.DataArray(
        rng.integers(0, 2, (3, *grid.shape)).astype(np.uint8),
        dims=("year", "y", "x"),
        coords={"year": list(YEARS), **odc.geo.xr.xr_coords(grid)},
    )
    cube.write_footprint(cube.Store(store), site.id, masks, origin="drawn")
    cube.write_probability(
        cube.Store(store), site.id, "net", masks.sel(year=list(years)), {"id": "net"}
    )


def make_whole(folder):
    """Two sites on grids of one size."""
    store = folder / "cubes.zarr"
    built(str(store), site_of("pit", 360000, 5600040, 240, 180))
    built(str(store), site_of("quarry", 370020, 5600040, 240, 180), years=(2020,))
    return store


def found(store, **options):
    return cube.verify(cube.Store(store), **options).findings


def only(store):
    (finding,) = found(store)
    return finding


def flip(path, at, bit=0):
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, indent=2))
