"""Make the simulated benchmark: cubes of random mines with true footprints.

    python workflows/simulated.py --out build/simulated
    minecube bench --store build/simulated/cubes.zarr \\
        --train 'train_*' --valid 'valid_*' --test 'test_*' --out build/bench

Each site has a simulated archive with cloud, haze, snow and displaced dates. The script builds
the site like a real one: it searches and checks scenes, composites them by the shipped recipe,
and labels them. The same seed gives the same cubes. An interrupted run resumes when you run it
again.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import geopandas as gpd
import shapely
from pyproj import Transformer

from minecube import cube, labels
from minecube.catalog import Site, load_recipes, load_sites, load_sources
from minecube.grid import grid_of
from minecube.jobs.build import BuildJob, build_cubes, need_built
from minecube.jobs.label import draw_labels
from minecube.simulate import World, simulate_archive

YEARS = tuple(range(2015, 2025))
SPLIT = {"train": 8, "valid": 2, "test": 6}
"""Part of the split -> number of sites."""
SIDE_M = 2200
"""Side of a site in metres."""
APART_M = 9000
"""Distance between sites in metres, so that their scenes do not overlap."""
STYLE = "earth-search"
"""Provider that the archive imitates."""
_CRS = 32633
_CORNER_M = (360000, 5600040)  # of the first site
_PER_ROW = 8
_INSET_M = 5  # keeps corners within a 10 m pixel, so that grids have the given size


def draw_sites(counts: Mapping[str, int], side_m: int = SIDE_M) -> gpd.GeoDataFrame:
    """Place squares in rows of eight, named by their part of the split.

    Args:
        counts: part of the split -> number of sites.
        side_m: side of each square in metres.

    Returns a table of ids and polygons in longitude and latitude.
    """
    names = [f"{part}_{n + 1}" for part, count in counts.items() for n in range(count)]
    squares = [_place_square(number, side_m) for number in range(len(names))]
    return gpd.GeoDataFrame({"id": names}, geometry=squares, crs=4326)


def _place_square(number: int, side_m: int) -> shapely.Polygon:
    row, column = divmod(number, _PER_ROW)
    west = _CORNER_M[0] + column * APART_M + _INSET_M
    north = _CORNER_M[1] - row * APART_M - _INSET_M
    square = shapely.box(west, north - side_m + 10, west + side_m - 10, north)
    to_degrees = Transformer.from_crs(_CRS, 4326, always_xy=True).transform
    return shapely.transform(square, to_degrees, interleaved=False)


def make_site(site: Site, folder: Path, years: Sequence[int], world: World) -> str:
    """Simulate, build and label one site. Returns its id.

    The simulated scenes are removed after the build. Raises MinecubeError if a year cannot be
    built.
    """
    store = cube.Store(folder / "cubes.zarr")
    archive = folder / "worlds" / site.id
    truth = folder / "truth" / f"{site.id}.parquet"
    if not truth.exists():
        if not archive.exists():
            simulate_archive([site], archive, world)
        (source,) = load_sources(archive / "sources.yaml").values()
        recipe = load_recipes()["annual-median"]
        job = BuildJob(store=store, sources=(source,), recipe=recipe, snapshots=archive / "scenes")
        need_built(build_cubes(job, [site], years))
        truth.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(archive / "truth_footprints.parquet", truth)
    outlines = labels.read_polygons(truth)
    draw_labels(outlines, site.id, grid_of(site), years, truth, "simulated truth").write(store)
    shutil.rmtree(archive, ignore_errors=True)
    return site.id


def main(argv: Sequence[str] | None = None) -> None:
    """Make all sites of the split in parallel processes."""
    options = _parse(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    counts = {part: getattr(options, part) for part in SPLIT}
    path = options.out / "sites.geojson"
    draw_sites(counts, options.side).to_file(path)
    world = World(
        years=tuple(options.years),
        dates_per_year=options.dates,
        sparse_dates=5,
        winter_dates=0,
        styles=(STYLE,),
        seed=options.seed,
    )
    make = partial(make_site, folder=options.out, years=options.years, world=world)
    with ProcessPoolExecutor(options.processes) as pool:
        for name in pool.map(make, load_sites(path, catalogue=True)):
            print(name, flush=True)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("build/simulated"), help="folder (build/simulated)"
    )
    for part, count in SPLIT.items():
        parser.add_argument(
            f"--{part}", type=int, default=count, help=f"number of {part} sites ({count})"
        )
    parser.add_argument("--years", type=int, nargs="+", default=YEARS, help="years of each site")
    parser.add_argument(
        "--side", type=int, default=SIDE_M, help=f"side of a site in metres ({SIDE_M})"
    )
    parser.add_argument(
        "--dates", type=int, default=12, help="acquisitions per growing season (12)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (0)")
    parser.add_argument("--processes", type=int, default=2, help="sites at a time (2)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
