"""Make the simulated benchmark: cubes of ten years of mines that are drawn from a seed, with their true footprints.

    python workflows/simulated.py --out build/simulated
    minecube bench --store build/simulated/cubes.zarr --train 'train_*' --valid 'valid_*' --test 'test_*' --out build/bench

Every site goes the whole way of a real one: an archive of scenes with cloud, haze, snow and displaced dates, found, checked,
composited by the shipped recipe, and labelled. Run again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import geopandas as gpd
import shapely
from pyproj import Transformer

from minecube import cube, labels
from minecube.catalog import Site, load_recipes, load_sites, load_sources
from minecube.cli import build as building
from minecube.errors import MinecubeError
from minecube.grid import grid_of
from minecube.simulate import World, simulate

YEARS = tuple(range(2015, 2025))
SPLIT = {"train": 8, "valid": 2, "test": 6}
SIDE_M = 2200
APART_M = 9000
"""Scenes of neighbours must not overlap."""
STYLE = "earth-search"


def sites(counts: dict[str, int], side_m: int = SIDE_M) -> gpd.GeoDataFrame:
    """Squares in rows of eight, named by their part of the split."""
    names = [f"{part}_{n + 1}" for part, count in counts.items() for n in range(count)]
    to_degrees = Transformer.from_crs(32633, 4326, always_xy=True).transform
    # A little within 10 m pixels, so that grids come out as large as asked.
    corners = [
        (360000 + n % 8 * APART_M + 5, 5600040 - n // 8 * APART_M - 5) for n in range(len(names))
    ]
    squares = [shapely.box(x, y - side_m + 10, x + side_m - 10, y) for x, y in corners]
    return gpd.GeoDataFrame(
        {"id": names},
        geometry=[shapely.transform(s, to_degrees, interleaved=False) for s in squares],
        crs=4326,
    )


def make(site: Site, out: Path, years: Sequence[int], world: World) -> str:
    """Simulate, build and label one site; its scenes are removed once its cube is there."""
    store, archive, recipe = (
        cube.Store(out / "cubes.zarr"),
        out / "worlds" / site.id,
        load_recipes()["annual-median"],
    )
    truth = out / "truth" / f"{site.id}.parquet"
    if not truth.exists():
        if not archive.exists():
            simulate([site], archive, world)
        (source,) = load_sources(archive / "sources.yaml").values()
        job = building.Job(
            store=store, sources=(source,), recipe=recipe, snapshots=archive / "scenes"
        )
        for outcome in building.build(job, [site], years):
            if outcome.state == "failed":
                raise MinecubeError(f"{outcome.site} {outcome.year}: {outcome.message}")
        truth.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(archive / "truth_footprints.parquet", truth)
    outlines, grid = labels.read_polygons(truth), grid_of(site)
    masks, fraction = labels.rasterize(outlines, grid, years), labels.covered(outlines, grid, years)
    cube.write_footprint(store, site.id, masks, "simulated truth", fraction)
    shutil.rmtree(archive, ignore_errors=True)
    return site.id


def main(argv: Sequence[str] | None = None) -> None:
    """Make all sites of the split, two at a time."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/simulated"))
    for part, count in SPLIT.items():
        parser.add_argument(
            f"--{part}", type=int, default=count, help=f"sites of this part of the split ({count})"
        )
    parser.add_argument("--years", type=int, nargs="+", default=YEARS)
    parser.add_argument("--side", type=int, default=SIDE_M, help=f"of a site, in metres ({SIDE_M})")
    parser.add_argument(
        "--dates", type=int, default=12, help="acquisitions in a year's growing season (12)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    asked = parser.parse_args(argv)
    asked.out.mkdir(parents=True, exist_ok=True)
    sites({part: getattr(asked, part) for part in SPLIT}, asked.side).to_file(
        asked.out / "sites.geojson"
    )
    world = World(
        years=tuple(asked.years),
        dates_per_year=asked.dates,
        sparse_dates=5,
        winter_dates=0,
        styles=(STYLE,),
        seed=asked.seed,
    )
    chosen = load_sites(asked.out / "sites.geojson", catalogue=True)
    with ProcessPoolExecutor(asked.processes) as pool:
        for name in pool.map(partial(make, out=asked.out, years=asked.years, world=world), chosen):
            print(name, flush=True)


if __name__ == "__main__":
    main()
