"""Time every command on as many sites and years as EuroMineNet has, with tiny grids.

    python benchmarks/mission.py [--json FILE] [--sites 133] [--years 10]

Sites have 48 x 48 pixels, so most of a command's time is not spent on pixels. They lie next to each
other in one simulated archive with a few dates per year. The store is written directly: mines are
bright discs on dark ground. Each command then runs in its own process. `build` composites seven
sites into a store of its own, and runs again with nothing to do. `train` and `bench` use a tenth of
the sites.

`slowest_step_s` is the longest time of a command that does not composite or map pixels: all
commands except those in `PIXEL_STEPS`.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import dask.array as da
import geopandas as gpd
import numpy as np
import pandas as pd
import pystac
import shapely
import xarray as xr
from pyproj import Transformer

from minecube import cube
from minecube.catalog import Site, load_recipes, load_sites
from minecube.grid import grid_of
from minecube.jobs.export import FORMATS
from minecube.simulate import World, simulate_archive

SITES = 133
YEARS = tuple(range(2015, 2025))
SIDE_PX = 48
SPACING_PX = 60
PER_ROW = 12
"""Sites next to each other, from west to east."""
CORNER_M = (360000, 5600040)
"""North-western corner of the first site in UTM."""
DATES = 10
"""Acquisition dates per year in the archive."""
PIXEL_STEPS = ("build", "train", "predict", "bench")
"""Steps whose time is mostly that of compositing pixels, or of applying networks to them."""
PRESET = """
quick:
  title: Seconds
  window_px: 48
  windows: 192
  epochs: 1
  batch: 8
  optimiser: adamw
  learning_rate: 3.0e-3
  valid_windows: 32
"""
_CRS = 32633
_MINECUBE = [sys.executable, "-c", "from minecube.cli import main; main()"]
_RECIPE = load_recipes()["annual-median"]


def main() -> None:
    """Make the inputs, time each step, and print the seconds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--sites", type=int, default=SITES, help=f"number of sites ({SITES})")
    parser.add_argument(
        "--years", type=int, default=len(YEARS), help=f"number of years ({len(YEARS)})"
    )
    options = parser.parse_args()
    figures = measure_mission(options.sites, options.years)
    print(f"slowest: {figures['slowest_step']}, {figures['slowest_step_s']:.1f} s")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def measure_mission(site_count: int, year_count: int) -> dict[str, Any]:
    """Time each command. Returns seconds and CPU seconds of each, and the slowest."""
    years = YEARS[:year_count]
    seconds: dict[str, float] = {}
    cpu_seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        make_inputs(out, site_count, years)
        for name, arguments in list_steps(out, site_count, years).items():
            cpu_before = _children_cpu_s()
            seconds[name] = time_step(name, arguments, out)
            cpu_seconds[name] = _children_cpu_s() - cpu_before
            print(f"{name:20} {seconds[name]:7.1f} s, CPU {cpu_seconds[name]:7.1f} s", flush=True)
    timed = {name: s for name, s in seconds.items() if name not in PIXEL_STEPS}
    slowest = max(timed, key=lambda name: timed[name])
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "sites": site_count,
        "years": len(years),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "slowest_step": slowest,
        "slowest_step_s": timed[slowest],
    }


def _children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


# Inputs


def make_inputs(out: Path, count: int, years: Sequence[int]) -> None:
    """Write sites, outlines of mines, an archive and a store."""
    squares = [_place_square(number) for number in range(count)]
    names = name_sites(count)
    table = gpd.GeoDataFrame({"id": names, "margin": 0}, geometry=squares, crs=4326)
    table.to_file(out / "sites.geojson")
    table[:: max(1, count // 6)].to_file(out / "few.geojson")
    (out / "presets.yaml").write_text(PRESET, encoding="utf-8")
    _draw_mines(names, years).to_parquet(out / "mines.parquet")
    area = Site(id="mission", geometry=shapely.union_all(squares).envelope)
    world = World(
        years=tuple(years),
        dates_per_year=DATES,
        sparse_dates=DATES,
        winter_dates=0,
        styles=("earth-search",),
    )
    simulate_archive([area], out / "archive", world)
    with ProcessPoolExecutor() as pool:
        sites = load_sites(out / "sites.geojson", catalogue=True)
        make = partial(make_site, out / "cubes.zarr", years)
        list(pool.map(make, range(count), sites))


def name_sites(count: int) -> list[str]:
    """Name the sites like EuroMineNet's, so that `release import` knows them."""
    names = [site.id for site in load_sites() if site.split]
    more = [f"Germany_{number}" for number in range(100, 100 + count)]
    return [*names, *more][:count]


def _corner_of(number: int) -> tuple[int, int]:
    """Return a site's north-western corner in UTM metres."""
    row, column = divmod(number, PER_ROW)
    west, north = CORNER_M
    return west + 10 * SPACING_PX * column, north - 10 * SPACING_PX * row


def _to_degrees(shape: shapely.Geometry) -> shapely.Geometry:
    transformer = Transformer.from_crs(_CRS, 4326, always_xy=True)
    return shapely.transform(shape, transformer.transform, interleaved=False)


def _place_square(number: int) -> shapely.Geometry:
    west, north = _corner_of(number)
    inset_m = 3  # keeps corners within a pixel, so that grids have the given size
    side_m = 10 * SIDE_PX
    square = shapely.box(
        west + inset_m, north - side_m + inset_m, west + side_m - inset_m, north - inset_m
    )
    return _to_degrees(square)


def _radius_px(number: int, index: int) -> float:
    """Return the radius of a site's mine in a year. Every fifth mine shrinks."""
    rng = np.random.default_rng(number)
    first = rng.uniform(2, 9)
    growth = rng.uniform(0, 1.2)
    if number % 5 == 4:
        growth = -0.15 * first
    return float(np.clip(first + growth * index, 0, 22))


def _draw_mines(names: Sequence[str], years: Sequence[int]) -> gpd.GeoDataFrame:
    """Draw the outline of each mine in each year, in longitude and latitude."""
    rows = []
    for number, name in enumerate(names):
        west, north = _corner_of(number)
        centre = shapely.Point(west + 5 * SIDE_PX, north - 5 * SIDE_PX)
        for index, year in enumerate(years):
            radius_px = _radius_px(number, index)
            if radius_px > 0:
                shape = _to_degrees(centre.buffer(10 * radius_px))
                rows.append({"site": name, "year": year, "geometry": shape})
    return gpd.GeoDataFrame(rows, crs=4326)


def make_site(path: Path, years: Sequence[int], number: int, site: Site) -> None:
    """Write and commit all years of one site."""
    store = cube.Store(path)
    grid = grid_of(site)
    cube.create_site(store, site, grid, years, _RECIPE)
    for index, year in enumerate(years):
        item = _describe_scene(site.id, year)
        provenance = cube.describe_build(site, year, grid, _RECIPE, [item])
        rng = np.random.default_rng([number, index])
        composite = _draw_composite(grid.shape, _radius_px(number, index), rng)
        cube.write_year(store, composite, provenance, _list_scenes(item))


def _describe_scene(site: str, year: int) -> pystac.Item:
    """Describe an invented scene."""
    when = datetime(year, 7, 1, 10, 30, tzinfo=UTC)
    properties = {
        "minecube:source": "sim-earth-search",
        "minecube:offset": 0,
        "minecube:offset_reason": "removed by the source",
        "s2:processing_baseline": "05.00",
    }
    return pystac.Item(f"S2A_{site}_{year}", None, None, when, properties)


def _list_scenes(item: pystac.Item) -> bytes:
    listed = io.BytesIO()
    pd.DataFrame({"id": [item.id]}).to_parquet(listed)
    return listed.getvalue()


def _draw_composite(
    shape: tuple[int, int], radius_px: float, rng: np.random.Generator
) -> xr.Dataset:
    """Draw a bright disc on dark ground as one block."""
    y, x = np.indices(shape) + 0.5 - SIDE_PX / 2
    mine = np.hypot(y, x) < radius_px
    ground = rng.normal(900, 150, shape) + rng.normal(0, 30, (len(_RECIPE.bands), *shape))
    pixels = np.where(mine, ground + 1500, ground).clip(1, 10_000).astype(np.uint16)
    clear = rng.integers(3, 30, shape, dtype=np.uint16)
    layers = {"clear_count": clear, "quality": np.ones(shape, np.uint8)}
    variables = {"reflectance": (("band", "y", "x"), da.from_array(pixels, chunks=-1))}
    for name, layer in layers.items():
        variables[name] = (("y", "x"), da.from_array(layer, chunks=-1))
    return xr.Dataset(variables)


# Steps


def list_steps(out: Path, count: int, years: Sequence[int]) -> dict[str, list[str]]:
    """Return the arguments of each command, in an order in which each finds its inputs."""
    names = name_sites(count)
    train, valid, test = (",".join(names[part :: max(3, count // 10)]) for part in range(3))
    source = f"--catalog {out}/archive --source sim-earth-search --years {years[0]}-{years[-1]}"
    search = f"--sites {out}/sites.geojson {source}"
    build = f"build --sites {out}/few.geojson {source} --store {out}/built.zarr"
    store = f"--store {out}/cubes.zarr"
    predict = f"predict {store} --model {out}/model.pt"
    publish = f"publish {store} --icechunk {out}/icechunk"
    formats = " ".join(f"--format {name}" for name in FORMATS)
    preset = f"--catalog {out} --preset quick"
    split = f"--train {train} --valid {valid} --test {test} --models tinycd-small"
    lines = {
        "sites": f"sites --sites {out}/sites.geojson",
        "search": f"search {search} --out {out}/scenes",
        "audit": f"audit {search} --out {out}/audit",
        "plan": f"plan {search} {store} --scenes {out}/scenes",
        "build": f"{build} --scenes {out}/scenes",
        "build again": f"{build} --scenes {out}/scenes",
        "polygons": f"polygons {out}/mines.parquet --sites {out}/sites.geojson",
        "label": f"label {store} --polygons {out}/mines.parquet",
        "train": f"train {store} --sites {train} {preset} --out {out}/model.pt",
        "predict": predict,
        "predict again": predict,
        "tracks": f"tracks {store} --out {out}/tracks",
        "score": f"score {store} --baselines --out {out}/scores",
        "bench": f"bench {store} {split} {preset} --out {out}/bench",
        "export": f"export {store} --model unet-small --out {out}/export",
        "export, all formats": f"export {store} {formats} --out {out}/formats",
        "verify": f"verify {store}",
        "pack": f"pack {store} --out {out}/cubes.zip",
        "verify, packed": f"verify --store {out}/cubes.zip",
        "publish": f"{publish} --tag v1",
        "publish again": f"{publish} --tag v2",
        "publish, compare": f"versions {out}/icechunk --compare v1 v2",
        "release export": f"release export {store} --out {out}/release",
        "release import": f"release import {out}/release.zip --out {out}/imported",
        "release audit": f"release audit {out}/imported",
    }
    return {name: shlex.split(line) for name, line in lines.items()}


def time_step(name: str, arguments: Sequence[str], out: Path) -> float:
    """Return the wall seconds of a command. Ends the benchmark with its output if it fails."""
    if name == "release import":
        shutil.make_archive(f"{out}/release", "zip", f"{out}/release")
    start = time.perf_counter()
    done = subprocess.run([*_MINECUBE, *arguments], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    # An audit exits with 1 if it has findings.
    if done.returncode != 0 and not (done.returncode == 1 and "audit" in name):
        sys.exit(
            f"{name} failed with {done.returncode}:\n{done.stdout[-1000:]}{done.stderr[-2000:]}"
        )
    return seconds


if __name__ == "__main__":
    main()
