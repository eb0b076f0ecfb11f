"""Measure reading under bad conditions: latency, failing servers, expiring tokens, wrong flags.

    python benchmarks/reading.py [--json FILE] [--quick] [--plot FILE]

The script makes its own archives, serves them on loopback from another process
(tests/range_server.py) and prints the figures. Times are wall times: use an idle machine.
Local and remote reads take turns.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pystac
import rasterio
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox
from scipy import ndimage
from shapely.geometry import box, mapping

from minecube import cube, scenes
from minecube.catalog import (
    BANDS,
    NATIVE_M,
    SCL,
    Access,
    Recipe,
    Site,
    load_recipes,
    load_sites,
    load_sources,
)
from minecube.composite import composite, registration
from minecube.errors import ReadError
from minecube.grid import coarsen, grid_of
from minecube.jobs import build as building
from minecube.jobs.scene_lists import load_or_search
from minecube.reader import Ledger, compute_stack, read, stack
from minecube.scenes import offsets
from minecube.scenes.looks import read_look
from minecube.simulate import World, simulate_archive

SERVER = Path(__file__).parents[1] / "tests" / "range_server.py"
DATES = 40
SIDE = 1024
"""Side of the site in pixels of 10 m."""
CORNER = Affine(10, 0, 369600, 0, -10, 5590440)
"""Place of the sites: no edge of a tile."""
TOP = 5600040
"""Northing of the first row of the files."""
TILE = 512
LARGE_SIDE = 4096
LARGE_DATES = 4
LATENCY_S = 0.04
SERVERS = (
    (),
    ("--delay", str(LATENCY_S)),
    ("--delay", str(LATENCY_S), "--stall", "0.01", "--stall-s", "1.5"),
)
"""Options of the servers of composites: near, far, and far with 1 % of the answers late."""
YEARS = (2020, 2022)


def main() -> None:
    """Run all parts, print the figures and write them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--plot", type=Path, help="draw the distributions of offset steps")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="use a quarter of the dates, one run instead of three, one seed",
    )
    options = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}"
    )
    with tempfile.TemporaryDirectory() as folder_name:
        root = Path(folder_name)
        dates = DATES // 4 if options.quick else DATES
        figures = measure_latency(root / "far", dates, runs=1 if options.quick else 3)
        figures |= measure_checks(root / "far", root / "large", dates)
        figures |= measure_flips(root / "far" / "00" / "B11.tif", 100 if options.quick else 1000)
        figures |= measure_troubles(root / "world")
        figures |= measure_wrong_flags(
            root / "flags", (1,) if options.quick else (1, 2, 3), options.plot
        )
    for name, value in figures.items():
        print(f"{name:32} {value}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


@contextmanager
def serve_folder(folder: Path, *troubles: str) -> Iterator[str]:
    """Serve a folder with these troubles. Yields its URL."""
    server = subprocess.Popen(
        [sys.executable, str(SERVER), str(folder), *troubles], stdout=subprocess.PIPE, text=True
    )
    try:
        yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
    finally:
        server.terminate()
        server.communicate()


# A site-year of 40 dates x 10 bands and SCL, 1024 x 1024: on disk and behind 40 ms of latency


def measure_latency(folder: Path, dates: int, runs: int) -> dict[str, object]:
    """Time reading and compositing a site-year, from disk and over the network."""
    grid = write_archive(folder, dates)
    items_here = make_items(str(folder), grid, dates)
    seconds: dict[str, list[float]] = {
        name: []
        for name in (
            "read here",
            "read far",
            "composite here",
            "composite near",
            "composite far",
            "composite late",
        )
    }
    recipe = dataclasses.replace(load_recipes()["annual-median"], block_px=SIDE)
    ledger = Ledger()
    read_all(items_here, grid, Ledger())  # fills the page cache for both
    for run in range(runs):
        # Each server has a new URL, so that no header is cached from the previous run.
        with serve_folder(folder, "--delay", str(LATENCY_S)) as url:
            items_far = make_items(url, grid, dates)
            ledger = Ledger()
            sum_here, seconds_here = time_call(lambda: read_all(items_here, grid, Ledger()))
            read_far = functools.partial(read_all, items_far, grid, ledger)
            sum_far, seconds_far = time_call(read_far)
            assert sum_here == sum_far, "pixels differ"
            heads = count_heads(url)
        cube_here, composite_here = time_call(
            functools.partial(load_composite, items_here, grid, recipe)
        )
        composites = []
        for troubles in SERVERS:
            with serve_folder(folder, *troubles) as url:
                items_far = make_items(url, grid, dates)
                cube_far, composite_far = time_call(
                    functools.partial(load_composite, items_far, grid, recipe)
                )
                assert cube_here.identical(cube_far), "composites differ"
            composites.append(composite_far)
        for name, value in zip(
            seconds, (seconds_here, seconds_far, composite_here, *composites), strict=True
        ):
            seconds[name].append(value)
        print(
            f"  run {run + 1}: "
            + ", ".join(f"{name} {values[-1]:.2f} s" for name, values in seconds.items()),
            flush=True,
        )
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    totals = ledger.totals()
    return {
        "read_here_s": round(medians["read here"], 2),
        "read_far_s": round(medians["read far"], 2),
        "composite_here_s": round(medians["composite here"], 2),
        "composite_near_s": round(medians["composite near"], 2),
        "composite_far_s": round(medians["composite far"], 2),
        "composite_late_s": round(medians["composite late"], 2),
        "requests": totals["requests"],
        "requests_per_window": round(totals["requests"] / totals["read"], 2),
        "header_requests_per_window": round(heads / totals["read"], 2),
        "tile_requests_per_window": round((totals["requests"] - heads) / totals["read"], 2),
        "tile_rows_per_window": round(count_tile_rows(grid), 2),
        "mb": round(totals["bytes"] / 1e6),
        "latency_ratio": round(medians["read far"] / medians["read here"], 3),
        "latency_ratio_composite": round(medians["composite far"] / medians["composite here"], 3),
    }


def count_heads(url: str) -> int:
    """Return how many requests of a server began at a file's first byte."""
    with urllib.request.urlopen(f"{url}/counts") as answer:
        return json.load(answer)["heads"]


def count_tile_rows(grid: GeoBox) -> float:
    """Return the rows of file tiles in a window of the archive, on average over the bands."""
    top, bottom = (TOP - y for y in (grid.boundingbox.top, grid.boundingbox.bottom))
    rows = [
        math.ceil(bottom / size / TILE) - math.floor(top / size / TILE)
        for size in NATIVE_M.values()
    ]
    return statistics.mean(rows)


def measure_checks(folder: Path, large: Path, dates: int) -> dict[str, object]:
    """Compare the bytes for checks with all bytes of a build: sites of 10 km and of 41 km.

    All dates of the large site have the same files under other names.
    """
    site = GeoBox((SIDE, SIDE), CORNER, "EPSG:32633")
    with serve_folder(folder) as url:
        normal = measure_check_bytes(make_items(url, site, dates), site)
    site = write_archive(large, 1, LARGE_SIDE, level=1)
    for date in range(1, LARGE_DATES):
        (large / f"{date:02d}").mkdir()
        for path in (large / "00").iterdir():
            (large / f"{date:02d}" / path.name).hardlink_to(path)
    with serve_folder(large) as url:
        wide = measure_check_bytes(make_items(url, site, LARGE_DATES), site)
    return {
        **normal,
        **{f"{name}_large": value for name, value in wide.items()},
    }


def measure_check_bytes(items: list[pystac.Item], grid: GeoBox) -> dict[str, object]:
    """Check and composite scenes as a build does. Returns the figures of the checks' reads."""
    recipe = load_recipes()["annual-median"]
    checks = Ledger()
    look = read_look(items, grid, checks, recipe.bands)
    registration.measure_shifts(items, grid, checks, look.middle)
    reads = Ledger()
    composite(items, grid, recipe, reads).load()
    check_bytes = checks.totals()["bytes"]
    return {
        "check_bytes_fraction": round(check_bytes / (check_bytes + reads.totals()["bytes"]), 4),
        "check_mb_per_scene": round(check_bytes / len(items) / 1e6, 2),
        "check_requests_per_scene": round(checks.totals()["requests"] / len(items), 1),
    }


def measure_flips(path: Path, flips: int) -> dict[str, object]:
    """Flip single bits of a file's tiles. Counts the flips that minecube and GDAL read as pixels."""
    with rasterio.open(path) as image:
        grid = GeoBox(image.shape, image.transform, image.crs.to_wkt())
        pixels = image.read(1)
        first = int(image.get_tag_item("BLOCK_OFFSET_0_0", "TIFF", bidx=1))
        size = int(image.get_tag_item("BLOCK_SIZE_0_0", "TIFF", bidx=1))
    whole = path.read_bytes()
    corner = grid[:512, :512]
    rng = np.random.default_rng(0)
    unseen = {"flips_unseen": 0, "flips_unseen_by_gdal": 0}
    for _ in range(flips):
        flipped = bytearray(whole)
        flipped[first + int(rng.integers(size))] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        with contextlib.suppress(ReadError):
            unseen["flips_unseen"] += bool((read(str(path), corner) != pixels[:512, :512]).any())
        with contextlib.suppress(rasterio.errors.RasterioIOError), rasterio.open(path) as image:
            read_by_gdal = image.read(1, window=((0, 512), (0, 512)))
            unseen["flips_unseen_by_gdal"] += bool((read_by_gdal != pixels[:512, :512]).any())
    path.write_bytes(whole)
    return {"flips": flips, **unseen}


def time_call(work: object) -> tuple[object, float]:
    """Run a function. Returns its result and the seconds."""
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def load_composite(items: list[pystac.Item], grid: GeoBox, recipe: Recipe) -> xr.Dataset:
    """Composite scenes into memory."""
    return composite(items, grid, recipe).load()


def read_all(items: list[pystac.Item], grid: GeoBox, ledger: Ledger) -> int:
    """Read all bands of all scenes at native resolution. Returns the sum of the pixels."""
    total = 0
    for size in (10, 20):
        bands = [b for b in (*BANDS, SCL) if NATIVE_M[b] == size]
        total += int(
            compute_stack(
                stack(items, coarsen(grid, size), bands, chunk_px=SIDE, ledger=ledger)
            ).sum()
        )
    return total


def write_archive(folder: Path, dates: int, side: int = SIDE, level: int = 6) -> GeoBox:
    """Write COGs with tiles of 512 pixels, 20 km wider than the site.

    They have as many bytes per pixel as real ones (1.5 and 1.4). Returns the grid of the site.
    """
    width = side + 2 * SIDE
    rng = np.random.default_rng(0)
    land = ndimage.gaussian_filter(rng.standard_normal((width, width)), 4) * 8000 + 2500
    for band, size in NATIVE_M.items():
        step = size // 10
        base = land[::step, ::step]
        for date in range(dates):
            if band == SCL:
                pixels = np.where(base > 3200, 8, 4).astype(np.uint8)
            else:
                pixels = np.clip(
                    base + date + rng.standard_normal(base.shape) * 20, 1, 20000
                ).astype(np.uint16)
            path = folder / f"{date:02d}" / f"{band}.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            with rasterio.open(
                path,
                "w",
                driver="COG",
                height=pixels.shape[0],
                width=pixels.shape[1],
                count=1,
                dtype=pixels.dtype,
                crs="EPSG:32633",
                transform=Affine(size, 0, 360000, 0, -size, TOP),
                nodata=0,
                compress="deflate",
                level=level,
                predictor=2,
                blocksize=TILE,
            ) as out:
                out.write(pixels, 1)
    return GeoBox((side, side), CORNER, "EPSG:32633")


def make_items(root: str, grid: GeoBox, dates: int) -> list[pystac.Item]:
    """List the archive's scenes."""
    area = box(*grid.geographic_extent.boundingbox)
    items = []
    for date in range(dates):
        day = pd.Timestamp("2021-04-03 10:00") + pd.Timedelta(days=5 * date)
        stamp = f"{day:%Y%m%dT%H%M%S}"
        items.append(
            pystac.Item(
                id=f"scene_{date:02d}",
                geometry=mapping(area),
                bbox=list(area.bounds),
                datetime=day.to_pydatetime(),
                properties={
                    "proj:code": "EPSG:32633",
                    "s2:processing_baseline": "03.00",
                    "minecube:access": json.dumps(dataclasses.asdict(Access())),
                    "minecube:origin": "",
                    "minecube:datatake": f"S2A_{stamp}",
                    "minecube:offset": 0,
                },
                assets={
                    band: pystac.Asset(f"{root}/{date:02d}/{band}.tif", extra_fields={"gsd": size})
                    for band, size in NATIVE_M.items()
                },
            )
        )
    return items


# The simulated archive on troubled servers


def measure_troubles(folder: Path) -> dict[str, object]:
    """Build from an intact server and from three troubled ones.

    One server fails, one has expiring tokens, one has lost a file.
    """
    (site,) = [s for s in load_sites() if s.id == "demo_1"]
    site = Site(id="mine", geometry=site.geometry)
    simulate_archive(
        [site], folder, World(years=YEARS, styles=("planetary-computer",), dates_per_year=12)
    )
    recipe = dataclasses.replace(load_recipes()["annual-median"], block_px=192, chunk_px=96)
    undisturbed = build_from(folder, f"{folder}", site, recipe, "here")
    troubles = ("--fail", "0.333", "--truncate", "0.05", "--stall", "0.02", "--stall-s", "10")
    with serve_folder(folder, *troubles) as url:
        flaky = build_from(folder, url, site, recipe, "flaky")
        retries = sum(o.reads["retried"] for o in flaky.outcomes)
    figures: dict[str, object] = {
        "flaky_identical": undisturbed.cube.identical(flaky.cube),
        "flaky_retries": int(retries),
        "flaky_s": round(flaky.seconds, 1),
        "undisturbed_s": round(undisturbed.seconds, 1),
    }
    with serve_folder(folder, "--token-life", "3", "--delay", "0.04") as url:
        tokens = build_from(
            folder,
            url,
            site,
            recipe,
            "tokens",
            Access(kind="planetary-computer", href=f"{url}/token", credentials_for=("127.0.0.1",)),
        )
    figures |= {
        "expiring_tokens_lost": int(sum(o.reads["lost"] for o in tokens.outcomes)),
        "expiring_tokens_identical": undisturbed.cube.identical(tokens.cube),
        "expiring_tokens_renewed": int(sum(o.reads["retried"] for o in tokens.outcomes)),
        "signatures_written": count_files_with(b"sig=", folder.parent / "tokens"),
    }
    clearest = min(undisturbed.used, key=lambda scene: scene.properties["eo:cloud_cover"])
    next(folder.glob(f"planetary-computer/{clearest.id}/*_B04_10m.tif")).unlink()
    with serve_folder(folder) as url:
        lost = build_from(folder, url, site, recipe, "lost")
    states = {o.year: o.state for o in lost.outcomes}
    return figures | {
        "lost_site_year_committed": states[2022] == "built",
        "other_site_year_committed": states[2020] == "built",
    }


@dataclasses.dataclass
class BuildResult:
    """A build, its cube and its duration."""

    outcomes: list[building.Outcome]
    cube: xr.Dataset
    used: list[pystac.Item]
    """Scenes used for the last year."""
    seconds: float


def build_from(
    folder: Path, root: str, site: Site, recipe: Recipe, name: str, access: Access | None = None
) -> BuildResult:
    """Build all years of a site from the archive at `root`."""
    (source,) = load_sources(folder / "sources.yaml").values()
    source = dataclasses.replace(
        source, href=f"{root}/planetary-computer.parquet", access=access or Access()
    )
    out = folder.parent / name
    job = building.BuildJob(
        store=cube.Store(out / "cubes.zarr"),
        sources=(source,),
        recipe=recipe,
        snapshots=out / "scenes",
    )
    start = time.perf_counter()
    outcomes = building.build_cubes(job, [site], YEARS)
    seconds = time.perf_counter() - start
    scenes_used = scenes.select(
        load_or_search(site, YEARS[-1], job.sources, job.snapshots).scenes, recipe
    )
    return BuildResult(
        outcomes, cube.open_cube(job.store, site.id).load().drop_attrs(), scenes_used, seconds
    )


def count_files_with(signature: bytes, folder: Path) -> int:
    """Count the files of a folder that contain the signature."""
    return sum(signature in path.read_bytes() for path in folder.rglob("*") if path.is_file())


# Wrong offset flags


def measure_wrong_flags(
    folder: Path, seeds: tuple[int, ...], plot: Path | None
) -> dict[str, object]:
    """Count wrong offsets that are detected, and false alarms.

    Counts are made for the scenes that the recipe uses and for all scenes.
    """
    recipe = load_recipes()["annual-median"]
    rows = []
    sites = [s for s in load_sites() if s.id.startswith("demo_")]
    for seed in seeds:
        world = folder / str(seed)
        simulate_archive(
            sites,
            world,
            World(years=(2020, 2022), styles=("earth-search",), wrong_flags=0.05, seed=seed),
        )
        true_offsets = pd.read_parquet(world / "truth_offsets.parquet").set_index("id")["carried"]
        (source,) = load_sources(world / "sources.yaml").values()
        for site in sites:
            for year in (2020, 2022):
                items = scenes.search(site, year, source).scenes
                used_ids = {s.id for s in scenes.select(items, recipe)}
                checks = offsets.check_offsets(items, read_look(items, grid_of(site)))
                rows += [
                    (
                        check.scene in used_ids,
                        check.offset != -true_offsets[check.scene],
                        check.conflict,
                        check.step,
                    )
                    for check in checks
                ]
    table = pd.DataFrame(rows, columns=["used", "wrong", "conflict", "step"])
    used_scenes = table[table.used]
    if plot:
        draw_steps(used_scenes, plot)
    return {
        "offset_flags_found_pct": round(
            100 * float(used_scenes[used_scenes.wrong].conflict.mean()), 2
        ),
        "offset_false_alarms": int((used_scenes.conflict & ~used_scenes.wrong).sum()),
        "offset_scenes_used": len(used_scenes),
        "offset_flags_wrong": int(used_scenes.wrong.sum()),
        "offset_all_scenes": len(table),
        "offset_all_wrong": int(table.wrong.sum()),
        "offset_all_found": int((table.wrong & table.conflict).sum()),
        "offset_all_false_alarms": int((table.conflict & ~table.wrong).sum()),
        "offset_all_untold_wrong": int((table.wrong & table.step.isna()).sum()),
    }


def draw_steps(table: pd.DataFrame, path: Path) -> None:
    """Draw the distributions of steps for right and wrong offsets."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    bins = np.arange(-1300, 1301, 40)
    for wrong, colour, label in (
        (False, "#4477aa", "offset right"),
        (True, "#cc3311", "offset wrong"),
    ):
        steps = table[(table.wrong == wrong) & table.step.notna()].step
        axes.hist(
            steps.clip(-1290, 1290),
            bins,
            color=colour,
            label=f"{label}: {len(steps)} scenes",
            alpha=0.85,
        )
    axes.set(
        yscale="log",
        xlabel="step from neighbouring scenes (reflectance x 10000)",
        ylabel="scenes",
    )
    axes.axvspan(-500, 500, color="0.92", zorder=0)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
