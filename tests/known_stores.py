"""Stores with random pixels to export and publish, and the command line in this process."""

from __future__ import annotations

import hashlib

import dask.array as da
import geopandas as gpd
import numpy as np
import shapely
import xarray as xr
from click.testing import CliRunner

from known_scenes import site_of
from minecube import cube
from minecube.catalog import load_recipes
from minecube.cli import cli
from minecube.grid import grid_of

RECIPE = load_recipes()["annual-median"]
YEARS = (2019, 2020, 2021)


def run(*arguments, ok=0):
    done = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert done.exit_code == ok, (done.output, done.exception)
    return done.output


def year_of(grid, seed):
    rng = np.random.default_rng(seed)

    def blocks(values):
        return da.from_array(values, chunks=(*values.shape[:-2], RECIPE.block_px, RECIPE.block_px))

    shape = grid.shape
    return xr.Dataset(
        {
            "reflectance": (
                ("band", "y", "x"),
                blocks(rng.integers(1, 9000, (10, *shape)).astype(np.uint16)),
            ),
            "clear_count": (("y", "x"), blocks(rng.integers(1, 30, shape).astype(np.uint16))),
            "quality": (("y", "x"), blocks(np.ones(shape, np.uint8))),
        }
    )


def build(store, site, year, seed=0, scene="S2A", overwrite=False):
    """Build a site-year of one scene into a store, as `minecube build` leaves it."""
    grid = grid_of(site)
    cube.create_site(cube.Store(store), site, grid, YEARS, RECIPE)
    provenance = {
        "site": site.id,
        "year": year,
        "grid": {},
        "recipe": {"title": RECIPE.title},
        "scenes": [
            {"id": scene, "source": "s", "baseline": "05.00", "offset": 0, "offset_reason": "r"}
        ],
        "version": "0.1.0",
        "libraries": {"numpy": np.__version__},
    }
    assert cube.write_year(
        cube.Store(store),
        year_of(grid, seed),
        provenance,
        b"scene list",
        cube.BuildOptions(overwrite=overwrite),
    )


def files_of(folder):
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


def make_pit():
    return site_of("pit", 360000, 5600040, 300, 270)


def make_hole():
    return site_of("hole", 420000, 5600040, 60, 60)


def make_labelled_store(folder):
    """A store of one site, years 2019 and 2021 built, labelled by a file that says its licence."""
    for year in (2019, 2021):
        build(str(folder / "cubes.zarr"), make_pit(), year, seed=year)
    drawn = gpd.GeoDataFrame(
        {"source": ["maus"], "licence": ["CC BY-SA 4.0"], "doi": ["10.1594/PANGAEA.942325"]},
        geometry=[shapely.box(360500, 5598000, 362000, 5599000)],
        crs="EPSG:32633",
    )
    drawn.to_file(folder / "pits.gpkg")
    run("label", "--store", folder / "cubes.zarr", "--polygons", folder / "pits.gpkg")
    return folder / "cubes.zarr"


def export_every_format(made, out):
    formats = [
        f for name in ("cog", "netcdf", "zarr", "zarr2", "croissant") for f in ("--format", name)
    ]
    return out, run("export", "--store", made, "--out", out, *formats)
