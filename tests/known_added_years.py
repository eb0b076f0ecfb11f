"""Two stores of the same four years: one made in order, one to which the earlier years were added last."""

from __future__ import annotations

import dataclasses

import geopandas as gpd
import shapely

from known_maps import CHANGE, SERIES, SMALL, given_by, pair_of, series_of
from known_predictions import RECIPE, build, pit
from known_stores import run
from minecube import cube
from minecube.grid import grid_of
from minecube.jobs.predict import MapOptions, map_site
from minecube.models import Mapper

YEARS = (2018, 2019, 2020, 2021)
MODELS = {
    "net": given_by(lambda x: x[:, :1], dataclasses.replace(SMALL, id="net")),
    "pairs": given_by(pair_of, CHANGE),
    "years": given_by(series_of, SERIES),
}


def draw(path):
    """A mine that grows by ten pixels a year."""
    mines = [
        shapely.box(360100, 5600040 - 900, 360100 + 100 * (year - 2015), 5600040 - 200)
        for year in YEARS
    ]
    drawn = gpd.GeoDataFrame({"year": YEARS}, geometry=mines, crs="EPSG:32633")
    drawn.to_file(path)
    return path


def add_years(store, years):
    """Build these years, then label and map all that are there."""
    site = pit()
    cube.create_site(cube.Store(store), site, grid_of(site), years, RECIPE)
    for year in years:
        build(cube.Store(store), site, year)
    run("label", "--store", store, "--polygons", draw(store.with_suffix(".gpkg")))
    for name, model in MODELS.items():
        map_site(cube.Store(store), "pit", Mapper(model), MapOptions(prediction=name))
    run("tracks", "--store", store, "--model", "net", "--out", store.with_suffix(".tracks"))


def make_stores(folder):
    """The store made in order, and the one with earlier years added twice."""
    in_order = folder / "in_order.zarr"
    add_years(in_order, YEARS)
    added = folder / "added.zarr"
    for years in ((2020, 2021), (2019,), (2018,)):
        add_years(added, years)
    return in_order, added
