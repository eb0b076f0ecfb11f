"""Polygons in metres from the corner of a grid, and two sites to lay them on."""

from __future__ import annotations

import geopandas as gpd
import shapely
from affine import Affine
from click.testing import CliRunner
from odc.geo.geobox import GeoBox

from minecube.cli import cli
from minecube.labels import repair_polygons

LEFT, TOP = 399960, 5700000
GRID = GeoBox((40, 60), Affine(10, 0, LEFT, 0, -10, TOP), "EPSG:32633")


def box(x, y, width, height):
    """A rectangle in metres from the grid's upper left corner."""
    return shapely.box(LEFT + x, TOP - y - height, LEFT + x + width, TOP - y)


def table(shapes, crs="EPSG:32633", **columns):
    return gpd.GeoDataFrame(columns, geometry=list(shapes), crs=crs)


def written(folder, polygons, name="mines.parquet"):
    path = folder / name
    if name.endswith("parquet"):
        polygons.to_parquet(path)
    else:
        polygons.to_file(path)
    return path


def surveyed(folder, polygons, **how):
    return repair_polygons(written(folder, polygons), **how)


def found(looked):
    """(finding, row, done), without the counts."""
    return [
        tuple(row) for row in looked.findings[["finding", "row", "done"]].itertuples(index=False)
    ]


def run(*arguments, ok=0):
    done = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert done.exit_code == ok, f"exit {done.exit_code}\n{done.output}"
    return done.stdout, done.stderr


SITES = {
    name: gpd.GeoSeries([shapely.box(LEFT + x, TOP - 400, LEFT + x + 600, TOP)], crs=32633).to_crs(
        4326
    )[0]
    for name, x in (("a", 0), ("b", 100_000))
}


def lonlat_mines():
    mines = gpd.GeoSeries(
        [box(0, 0, 100, 100), box(100_000, 0, 100, 100), box(100_200, 0, 100, 100)], crs=32633
    )
    return mines.to_crs(4326).to_numpy()
