"""Compare minecube's composites with what users would otherwise run: time, memory, accuracy.

    python benchmarks/composite.py [--json FILE] [--quick] [--picture FILE] [--markdown FILE]

The script makes its own archives. It runs the contenders in turn, each in its own process.
A ratio is minecube's median over the rounds, divided by the contender's. Below 1, minecube is
faster or needs less memory. Times are wall times: use an idle machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import bottleneck
import distributed  # noqa: F401
import geomad
import numpy as np
import odc.geo.xr
import odc.stac
import pandas as pd
import pystac
import rasterio
import stackstac
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox
from rasterio.enums import Resampling
from scipy import ndimage
from shapely.geometry import box, mapping

from minecube import report, scenes
from minecube.catalog import (
    BANDS,
    NATIVE_M,
    SCL,
    Access,
    BestPixel,
    MaskRule,
    Recipe,
    Registration,
    load_recipes,
    load_sites,
    load_sources,
)
from minecube.composite import composite, masks, reducers, registration
from minecube.composite.needs import index_overpasses, sort_in_mosaic_order
from minecube.grid import coarsen, grid_of
from minecube.jobs.tables import format_table
from minecube.reader import Ledger, compute_stack, stack
from minecube.reader.tiles import TiledImage
from minecube.scenes import veils
from minecube.scenes.looks import read_look
from minecube.simulate import World, simulate_archive

DATES = 40
SITE_PX = 1024
"""Side of the site in pixels of 10 m."""
SCENE_PX = 2048
"""Side of a scene in pixels of 10 m."""
MIDDLE = ((SCENE_PX - SITE_PX) // 2, (SCENE_PX - SITE_PX) // 2)
"""Corner of a site whose edges are edges of tiles."""
CORNERS = ((138, 744), (702, 96), (936, 378))
"""Corners of sites as they lie: at any multiple of 60 m, drawn at random."""
LEFT = 360000
TOP = 5600040
CLOUD_CLASSES = (3, 8, 9, 10)
"""SCL classes that all contenders mask. The medians must then be identical."""
PLAIN = Recipe(
    id="plain", title="SCL and a median", mask=(MaskRule(classes=CLOUD_CLASSES),), block_px=SITE_PX
)
GEOMEDIAN = dataclasses.replace(PLAIN, id="geomedian", reducer="geomedian", block_px=SITE_PX // 2)
YEARS = (2015, 2020, 2022)


def main() -> None:
    """Run one contender, or the whole benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--markdown", type=Path, help="write the tables to this Markdown file")
    parser.add_argument(
        "--picture", type=Path, help="draw one mine block and three composites of it"
    )
    parser.add_argument("--quick", action="store_true", help="run one round instead of three")
    parser.add_argument(
        "--run", nargs=3, metavar=("CONTENDER", "ARCHIVE", "DATES"), help=argparse.SUPPRESS
    )
    options = parser.parse_args()
    if options.run:
        print(json.dumps(run_contender(options.run[0], options.run[1], int(options.run[2]))))
        return
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, {pd.Timestamp.now():%Y-%m-%d}"
    )
    print(machine, flush=True)
    logging.disable(logging.WARNING)  # the simulated world has many displaced scenes
    rounds = 1 if options.quick else 3
    figures: dict[str, Any] = {"machine": machine}
    texts: list[str] = []

    def print_table(title: str, text: str) -> None:
        texts.append(f"## {title}\n```\n{text}\n```\n")
        print(f"\n{title}\n{text}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_archive(root / "mixed", DATES, lambda rng: rng.uniform(0, 0.7))
        figures |= compare_contenders(root / "mixed", rounds, print_table)
        figures |= measure_decoding(root / "mixed", print_table)
        figures |= measure_bytes_read(root / "cloudy", print_table)
        figures |= measure_scaling(root / "mixed", rounds, print_table)
        figures |= measure_two_workers(root / "flat", print_table)
        figures |= measure_quality(root, options.picture, print_table)
        figures |= measure_gpu(print_table)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if options.markdown:
        options.markdown.write_text(f"Machine: {machine}.\n\n" + "\n".join(texts), encoding="utf-8")


# Archive


def write_archive(
    folder: Path,
    dates: int,
    draw_cloud_share: Callable[[np.random.Generator], float],
    compress: str = "deflate",
) -> None:
    """Write an archive of cloudy scenes.

    Files are COGs with tiles of 512 pixels. Their noise compresses like real bands.

    Args:
        folder: where to write the scenes.
        dates: number of scenes.
        draw_cloud_share: draws the cloud share of one scene.
        compress: empty for uncompressed files.
    """
    rng = np.random.default_rng(0)
    land = np.clip(
        ndimage.gaussian_filter(rng.standard_normal((SCENE_PX, SCENE_PX)), 4) * 8000 + 1800,
        200,
        6000,
    )
    cloud_shares = [draw_cloud_share(np.random.default_rng([5, date])) for date in range(dates)]

    def write(date: int) -> None:
        rng = np.random.default_rng([1, date])
        cloudiness = sum(_draw_noise(rng, size) * size for size in (16, 32, 64))
        cloud = (
            cloudiness > np.quantile(cloudiness, 1 - cloud_shares[date])
            if 0 < cloud_shares[date] < 1
            else np.full(cloudiness.shape, cloud_shares[date] >= 1)
        )
        for band, size in NATIVE_M.items():
            ground = land[:: size // 10, :: size // 10]
            cloud_here = cloud if size == 20 else cloud.repeat(2, axis=0).repeat(2, axis=1)
            if band == SCL:
                pixels = np.where(cloud, 9, np.where(ground > 2500, 5, 4)).astype(np.uint8)
            else:
                surface = np.where(cloud_here, 6000 + ground / 8, ground + 10 * date)
                surface = surface + rng.standard_normal(ground.shape, dtype=np.float32) * 20
                pixels = np.clip(surface, 1, 20000).astype(np.uint16)
            path = folder / f"{date:02d}" / f"{band}.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            profile = {
                "driver": "COG",
                "count": 1,
                "dtype": pixels.dtype,
                "crs": "EPSG:32633",
                "nodata": 0,
                "blocksize": 512,
            }
            profile |= {"compress": "deflate", "predictor": 2} if compress else {"compress": "none"}
            transform = Affine(size, 0, LEFT, 0, -size, TOP)
            with rasterio.open(
                path, "w", height=len(pixels), width=len(pixels), transform=transform, **profile
            ) as out:
                out.write(pixels, 1)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, range(dates)))


def _draw_noise(rng: np.random.Generator, size: int) -> np.ndarray[Any, Any]:
    n = SCENE_PX // 2
    coarse = rng.standard_normal((n // size + 3, n // size + 3)).astype(np.float32)
    return ndimage.zoom(coarse, size, order=1)[:n, :n]


def make_site_grid(
    height: int = SITE_PX, width: int = SITE_PX, corner: tuple[int, int] = MIDDLE
) -> GeoBox:
    """Return the grid of a site, by default in the middle of the scenes.

    `corner` is its first row and column in the scenes, in pixels of 10 m.
    """
    row, column = corner
    left = LEFT + 10 * column
    top = TOP - 10 * row
    return GeoBox((height, width), Affine(10, 0, left, 0, -10, top), "EPSG:32633")


def make_items(folder: Path | str, dates: int) -> list[pystac.Item]:
    """List the scenes like a catalogue, with the properties that stackstac and odc-stac need."""
    area = box(
        *GeoBox(
            (SCENE_PX, SCENE_PX), Affine(10, 0, LEFT, 0, -10, TOP), "EPSG:32633"
        ).geographic_extent.boundingbox
    )
    items = []
    for date in range(dates):
        day = pd.Timestamp("2021-04-03 10:00") + pd.Timedelta(days=5 * date)
        item = pystac.Item(
            id=f"scene_{date:02d}",
            geometry=mapping(area),
            bbox=list(area.bounds),
            datetime=day.to_pydatetime(),
            properties={"proj:epsg": 32633, "proj:code": "EPSG:32633"},
        )
        for band, size in NATIVE_M.items():
            side = SCENE_PX * 10 // size
            asset_fields = {
                "proj:shape": [side, side],
                "proj:transform": [size, 0, LEFT, 0, -size, TOP, 0, 0, 1],
                "gsd": size,
            }
            item.add_asset(
                band,
                pystac.Asset(
                    f"{folder}/{date:02d}/{band}.tif", roles=["data"], extra_fields=asset_fields
                ),
            )
        items.append(item)
    return items


def make_searched_items(folder: Path | str, dates: int) -> list[pystac.Item]:
    """List the scenes like minecube's search."""
    items = make_items(folder, dates)
    for item in items:
        item.properties |= {
            "s2:processing_baseline": "03.00",
            "minecube:access": json.dumps(dataclasses.asdict(Access())),
            "minecube:origin": "",
            "minecube:datatake": f"S2A_{item.datetime:%Y%m%dT%H%M%S}",
            "minecube:offset": 0,
        }
    return items


# Contenders. Most return uint16 reflectance [band, y, x]: the median of clear pixels, 0 for none.


def run_minecube(folder: str, dates: int, recipe: Recipe = PLAIN) -> np.ndarray[Any, Any]:
    """Composite with minecube."""
    return composite(make_searched_items(folder, dates), make_site_grid(), recipe)[
        "reflectance"
    ].values


def run_minecube_unaligned(folder: str, dates: int) -> np.ndarray[Any, Any]:
    """Composite three sites whose edges are not edges of tiles."""
    items = make_searched_items(folder, dates)
    sites = [composite(items, make_site_grid(corner=corner), PLAIN) for corner in CORNERS]
    return np.stack([site["reflectance"].values for site in sites])


def run_minecube_geomedian(folder: str, dates: int) -> np.ndarray[Any, Any]:
    """Compute minecube's geomedian with its three deviations."""
    result = composite(make_searched_items(folder, dates), make_site_grid(), GEOMEDIAN).compute()
    return result["reflectance"].values


def run_stackstac(folder: str, dates: int) -> np.ndarray[Any, Any]:
    """Load all bands at 10 m with stackstac, reduce with xarray's median."""
    grid = make_site_grid()
    stacked = stackstac.stack(
        make_items(folder, dates),
        assets=[*BANDS, SCL],
        epsg=32633,
        resolution=10,
        bounds=tuple(grid.boundingbox),
        snap_bounds=False,
        xy_coords="center",
        rescale=False,
        dtype="uint16",
        fill_value=np.uint16(0),
        resampling=Resampling.nearest,
    )
    return _compute_xarray_median(stacked.sel(band=SCL), stacked.sel(band=list(BANDS)))


def run_odc(folder: str, dates: int) -> np.ndarray[Any, Any]:
    """Load all bands at 10 m with odc-stac, reduce with xarray's median."""
    loaded = odc.stac.load(
        make_items(folder, dates),
        bands=[*BANDS, SCL],
        geobox=make_site_grid(),
        chunks={"x": 512, "y": 512},
        dtype="uint16",
        nodata=0,
    )
    return _compute_xarray_median(
        loaded[SCL], loaded[list(BANDS)].to_array("band").transpose("time", "band", "y", "x")
    )


def _compute_xarray_median(scl: xr.DataArray, bands: xr.DataArray) -> np.ndarray[Any, Any]:
    clear = ~scl.isin(CLOUD_CLASSES) & (scl != 0)
    clear_bands = bands.where(clear & (bands != 0)).chunk({"time": -1})
    with np.errstate(all="ignore"):
        median = clear_bands.median("time", skipna=True)
        return median.round().fillna(0).astype(np.uint16).values


def run_odc_bottleneck(folder: str, dates: int) -> np.ndarray[Any, Any]:
    """Load bands at native resolution with odc-stac, reduce each with bottleneck's median.

    This is what an expert would write.
    """
    grid = make_site_grid()
    items = make_items(folder, dates)
    coarse_grid = coarsen(grid, 20)
    scl = odc.stac.load(items, bands=[SCL], geobox=coarse_grid, pool=8)[SCL].values
    clear = ~np.isin(scl, CLOUD_CLASSES) & (scl != 0)
    medians = np.zeros((len(BANDS), *grid.shape), np.uint16)

    def reduce(band: str, values: np.ndarray[Any, Any], mask: np.ndarray[Any, Any]) -> None:
        observations = values.astype(np.float32)
        observations[~mask | (values == 0)] = np.nan
        median = np.nan_to_num(np.rint(bottleneck.nanmedian(observations, axis=0))).astype(
            np.uint16
        )
        medians[BANDS.index(band)] = (
            median if median.shape == grid.shape else median.repeat(2, axis=0).repeat(2, axis=1)
        )

    fine_clear = clear.repeat(2, axis=1).repeat(2, axis=2)
    with ThreadPoolExecutor(2) as pool:
        futures = []
        for band in BANDS:
            is_fine = NATIVE_M[band] == 10
            band_grid = grid if is_fine else coarse_grid
            mask = fine_clear if is_fine else clear
            values = odc.stac.load(
                items, bands=[band], geobox=band_grid, dtype="uint16", nodata=0, pool=8
            )[band].values
            futures.append(pool.submit(reduce, band, values, mask))
        for future in futures:
            future.result()
    return medians


def read_with_gdal(folder: str, dates: int, corners: Sequence[tuple[int, int]] = (MIDDLE,)) -> None:
    """Read and decode the same windows with GDAL, and discard the pixels."""

    def read(asset: tuple[int, str, tuple[int, int]]) -> int:
        date, band, corner = asset
        scale = NATIVE_M[band] // 10
        row, column = (start // scale for start in corner)
        side = SITE_PX // scale
        with rasterio.open(f"{folder}/{date:02d}/{band}.tif") as file:
            window = ((row, row + side), (column, column + side))
            return int(file.read(1, window=window)[0, 0])

    assets = itertools.product(range(dates), NATIVE_M, corners)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, sorted(assets, key=lambda asset: (asset[2], asset[1]))))


def read_unaligned_with_gdal(folder: str, dates: int) -> None:
    """Read the windows of `run_minecube_unaligned` with GDAL, and discard the pixels."""
    read_with_gdal(folder, dates, CORNERS)


def run_geomad_kernel(folder: str, dates: int) -> None:
    """Time geomad's geomedian and deviations on two cores.

    The pixels are in memory, in the order that geomad prefers. Only the kernel is timed.
    """
    grid = make_site_grid()
    items = make_searched_items(folder, dates)
    seconds = 0.0
    for top in range(0, SITE_PX, 64):
        strip = grid[top : top + 64]
        pixels = compute_stack(stack(items, strip, BANDS, chunk_px=SITE_PX))
        clear = ~np.isin(
            compute_stack(stack(items, strip, [SCL], chunk_px=SITE_PX))[:, 0], (0, *CLOUD_CLASSES)
        )
        spectra = np.where(clear[:, None], pixels, np.float32(np.nan)).astype(
            np.float32
        ) / np.float32(1e4)
        spectra = np.ascontiguousarray(spectra.transpose(2, 3, 1, 0))
        start = time.perf_counter()
        geomedian = geomad.nangeomedian_pcm(spectra, num_threads=2, eps=1e-6)
        for deviation in (geomad.emad_pcm, geomad.smad_pcm, geomad.bcmad_pcm):
            deviation(spectra, geomedian, num_threads=2)
        seconds += time.perf_counter() - start
    run_geomad_kernel.seconds = seconds  # type: ignore[attr-defined]


CONTENDERS: dict[str, Callable[[str, int], Any]] = {
    "minecube": run_minecube,
    "odc-stac native + bottleneck": run_odc_bottleneck,
    "stackstac + xarray": run_stackstac,
    "odc-stac + xarray": run_odc,
    "GDAL reads only": read_with_gdal,
    "minecube, 3 unaligned": run_minecube_unaligned,
    "GDAL reads only, 3 unaligned": read_unaligned_with_gdal,
    "minecube geomedian": run_minecube_geomedian,
    "geomad's kernel only": run_geomad_kernel,
}


def run_contender(name: str, folder: str, dates: int) -> dict[str, Any]:
    """Run one contender in this process.

    Two scenes are read first, so that imports and first reads are not timed. Returns seconds, peak
    memory and a hash of the result.
    """
    read_with_gdal(folder, 2)
    start = time.perf_counter()
    reflectance = CONTENDERS[name](folder, dates)
    seconds = getattr(CONTENDERS[name], "seconds", time.perf_counter() - start)
    digest = (
        hashlib.sha256(np.ascontiguousarray(reflectance).tobytes()).hexdigest()
        if reflectance is not None
        else ""
    )
    return {"seconds": seconds, "peak_mb": measure_peak_mb(), "hash": digest}


def measure_peak_mb() -> float:
    """Return this process's peak memory in MB.

    `getrusage` may report the parent's peak from before `exec`, so this reads `/proc`.
    """
    (line,) = (
        line
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        if line.startswith("VmHWM")
    )
    return int(line.split()[1]) / 1e3


def run_in_new_process(name: str, folder: Path, dates: int = DATES) -> dict[str, Any]:
    """Run one contender in a new process."""
    command = [sys.executable, "-W", "ignore", __file__, "--run", name, str(folder), str(dates)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        raise SystemExit(f"{name} failed:\n{process.stderr}")
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


PrintTable = Callable[[str, str], None]


def compare_contenders(folder: Path, rounds: int, print_table: PrintTable) -> dict[str, Any]:
    """Run all contenders in turn and print their medians."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name in CONTENDERS:
            runs[name].append(run_in_new_process(name, folder))
    seconds = {
        name: statistics.median(r["seconds"] for r in results) for name, results in runs.items()
    }
    peak = {
        name: statistics.median(r["peak_mb"] for r in results) for name, results in runs.items()
    }
    hashes = {runs[name][0]["hash"] for name in list(CONTENDERS)[:4]}
    minecube_s = seconds["minecube"]
    rows = [
        (name, round(seconds[name], 2), round(peak[name]), f"{minecube_s / seconds[name]:.2f}")
        for name in CONTENDERS
    ]
    print_table(
        f"{DATES} dates x {len(BANDS)} bands and SCL, {SITE_PX} x {SITE_PX} at 10 m, "
        "COGs on disk; medians " + ("identical" if len(hashes) == 1 else "DIFFER"),
        format_table(("", "s", "peak MB", "minecube's median / this"), rows),
    )
    floor_and_kernel_s = seconds["GDAL reads only"] + seconds["geomad's kernel only"]
    return {
        "medians_identical": len(hashes) == 1,
        "seconds": {name: round(s, 2) for name, s in seconds.items()},
        "vs_stackstac": round(minecube_s / seconds["stackstac + xarray"], 3),
        "vs_odc": round(minecube_s / seconds["odc-stac + xarray"], 3),
        "vs_odc_bottleneck": round(minecube_s / seconds["odc-stac native + bottleneck"], 3),
        "vs_floor": round(minecube_s / seconds["GDAL reads only"], 3),
        "vs_floor_unaligned": round(
            seconds["minecube, 3 unaligned"] / seconds["GDAL reads only, 3 unaligned"], 3
        ),
        "memory_vs_floor": round(peak["minecube"] / peak["GDAL reads only"], 3),
        "memory_vs_stackstac": round(peak["minecube"] / peak["stackstac + xarray"], 3),
        "geomedian_vs_floor_and_kernel": round(
            seconds["minecube geomedian"] / floor_and_kernel_s, 3
        ),
    }


def measure_decoding(folder: Path, print_table: PrintTable) -> dict[str, Any]:
    """Measure the pixels decoded from tiles for each pixel of a window that is read.

    GDAL decodes the same tiles for the same windows.
    """
    figures = {}
    for name, run in (("", run_minecube), ("_unaligned", run_minecube_unaligned)):
        with (
            _count_pixels("_decode", np.size) as decoded,
            _count_pixels("read", np.size) as used,
        ):
            run(str(folder), DATES)
        figures[f"decoded_over_used{name}"] = round(sum(decoded) / sum(used), 3)
    print_table(
        "Pixels decoded for each pixel read",
        format_table(("sites", "decoded / read"), [list(pair) for pair in figures.items()]),
    )
    return figures


@contextmanager
def _count_pixels(method: str, count: Callable[[Any], int]) -> Iterator[list[int]]:
    """Collect a number for each result of a method of `TiledImage`."""
    original = getattr(TiledImage, method)
    counts: list[int] = []

    def call(*args: Any) -> Any:
        result = original(*args)
        counts.append(count(result))
        return result

    with mock.patch.object(TiledImage, method, call):
        yield counts


def measure_bytes_read(folder: Path, print_table: PrintTable) -> dict[str, Any]:
    """Measure the share of bytes read from an archive as cloudy as Europe.

    Half of the dates are fully clouded over the site, the others partly.
    """
    write_archive(folder, DATES, lambda rng: 1.0 if rng.random() < 0.5 else rng.uniform(0, 0.3))
    items = make_searched_items(folder, DATES)
    grid = make_site_grid()
    overcast_count = sum(_measure_cloud_share(item) > 0.99 for item in items)
    full_ledger = Ledger()
    for size in (10, 20):
        bands = [b for b in NATIVE_M if NATIVE_M[b] == size]
        compute_stack(
            stack(items, coarsen(grid, size), bands, chunk_px=SITE_PX, ledger=full_ledger)
        )
    fractions = {}
    seconds = {}
    composites = {}
    for name, limit in (("all", None), ("K = 12", 12), ("K = 6", 6)):
        ledger = Ledger()
        start = time.perf_counter()
        composites[name] = composite(
            items, grid, dataclasses.replace(PLAIN, max_clear_observations=limit), ledger
        ).compute()
        seconds[name] = time.perf_counter() - start
        fractions[name] = ledger.totals()["bytes"] / full_ledger.totals()["bytes"]
    reference = composites["all"]["reflectance"].values.astype(float)
    rows = []
    for name in fractions:
        rmse = (
            float(np.sqrt(((composites[name]["reflectance"].values - reference) ** 2).mean())) / 1e4
        )
        fewest = int(composites[name]["clear_count"].min())
        rows.append(
            (name, f"{100 * fractions[name]:.1f}", round(seconds[name], 2), fewest, f"{rmse:.5f}")
        )
    print_table(
        f"Archive with {overcast_count} of {DATES} dates fully clouded over the site",
        format_table(
            ("dates read", "% of all bytes", "s", "fewest clear dates", "RMSE against all"), rows
        ),
    )
    return {
        "cloudy_bytes_fraction": round(fractions["all"], 3),
        "k12_bytes_fraction": round(fractions["K = 12"], 3),
    }


def _measure_cloud_share(item: pystac.Item) -> float:
    with rasterio.open(item.assets[SCL].href) as file:
        return float(np.isin(file.read(1), CLOUD_CLASSES).mean())


def measure_scaling(folder: Path, rounds: int, print_table: PrintTable) -> dict[str, Any]:
    """Measure seconds and memory by number of dates and by area."""
    rows = []
    figures = {}
    for variable, sizes in (
        ("dates", [(n, SITE_PX) for n in (10, 20, 30, 40)]),
        ("area", [(20, n) for n in (512, 1024, 1536, 2048)]),
    ):
        amounts = []
        seconds = []
        for dates, side in sizes:
            runs = [_run_size(folder, dates, side) for _ in range(rounds)]
            amounts.append(dates if variable == "dates" else side**2 / 1e6)
            seconds.append(statistics.median(r[0] for r in runs))
            peak = max(r[1] for r in runs)
            rows.append((variable, dates, f"{side} x {side}", round(seconds[-1], 2), round(peak)))
        slope, start = np.polyfit(amounts, seconds, 1)
        worst_error = float(np.abs(np.polyval((slope, start), amounts) / seconds - 1).max())
        unit = "date" if variable == "dates" else "Mpx"
        figures[f"linear_in_{variable}"] = (
            f"{start:.2f} s + {slope:.3f} s per {unit}, within {100 * worst_error:.0f} %"
        )
    print_table(
        "Cost by dates and area, blocks of 512: "
        + "; ".join(f"{k}: {v}" for k, v in figures.items()),
        format_table(("over", "dates", "size", "s", "peak MB of the process"), rows),
    )
    return figures


_SIZE_PROGRAM = """
import dataclasses, sys, time
script_folder, archive, dates, side = sys.argv[1:]
sys.path.insert(0, script_folder)
import composite as bench
transform = bench.Affine(10, 0, bench.LEFT, 0, -10, bench.TOP)
grid = bench.GeoBox((int(side), int(side)), transform, "EPSG:32633")
items = bench.make_searched_items(archive, int(dates))
recipe = dataclasses.replace(bench.PLAIN, block_px=512)
bench.read_with_gdal(archive, 2)
start = time.perf_counter()
result = bench.composite(items, grid, recipe).compute()
print(time.perf_counter() - start, bench.measure_peak_mb())
"""
"""Program that composites one size and prints seconds and peak memory."""


def _run_size(folder: Path, dates: int, side: int) -> tuple[float, float]:
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        _SIZE_PROGRAM,
        str(Path(__file__).parent),
        str(folder),
        str(dates),
        str(side),
    ]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, peak = process.stdout.split()[-2:]
    return float(seconds), float(peak)


def measure_two_workers(folder: Path, print_table: PrintTable) -> dict[str, Any]:
    """Time geomedians on one and on two Dask worker processes with one thread each.

    The files are uncompressed, so that decoding costs almost nothing.
    """
    from distributed import Client, LocalCluster

    write_archive(folder, 20, lambda rng: rng.uniform(0, 0.3), compress="")
    recipe = dataclasses.replace(GEOMEDIAN, block_px=256)
    lazy = composite(make_searched_items(folder, 20), make_site_grid(), recipe)
    seconds_by_workers = {}
    for workers in (1, 2):
        with (
            LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                processes=True,
                dashboard_address="127.0.0.1:0",
            ) as cluster,
            Client(cluster),
        ):
            lazy.isel(y=slice(0, 256)).compute()  # makes every worker import all modules
            start = time.perf_counter()
            lazy.compute()
            seconds_by_workers[workers] = time.perf_counter() - start
    rows = [(workers, round(seconds, 1)) for workers, seconds in seconds_by_workers.items()]
    print_table(
        "Geomedian of 20 dates, 16 blocks of 256, on Dask workers of one thread",
        format_table(("workers", "s"), rows),
    )
    return {"two_workers_speedup": round(seconds_by_workers[1] / seconds_by_workers[2], 3)}


# Accuracy on simulated worlds


def measure_quality(folder: Path, picture: Path | None, print_table: PrintTable) -> dict[str, Any]:
    """Score composites of simulated worlds against the truth.

    Contenders are every reducer, the usual odc-stac code, and the recipe without one of its steps.
    The first world is scored a second time, with a fifth of its scenes displaced by 20 m.
    """
    sites = [s for s in load_sites() if s.id.startswith("demo_")]
    worlds = {
        "simulated world": World(years=YEARS, one_style_per_site=True),
        "world whose scene classification errs by whole dates": World(
            years=YEARS, one_style_per_site=True, scl_errors=True
        ),
        "world whose scenes lie metres beside each other": World(
            years=YEARS, one_style_per_site=True, shifts=True
        ),
    }
    measured = {}
    for number, (name, world) in enumerate(worlds.items()):
        simulate_archive(sites, folder / str(number), world)
        years = load_site_years(folder / str(number), sites)
        measured[name] = _score_ways(years, name, print_table)
        if number == 0:
            astray = "simulated world with a fifth of its scenes two pixels astray"
            displaced = displace_scenes(years, folder / "astray")
            measured[astray] = _score_ways(displaced, astray, print_table)
        if picture and number == 0:
            pictured = next(y for y in years if y.name == "demo_3" and y.year == YEARS[-1])
            draw_picture(pictured, picture)
    simulated, *_ = measured.values()
    return {
        "quality": measured,
        "residual_cloud_pct": max(simulated[name]["cloud_pct"] for name in REDUCERS),
    }


def _score_ways(
    years: Sequence[SiteYear], world: str, print_table: PrintTable
) -> dict[str, dict[str, float]]:
    """Score every way on the site-years of one world and print a table."""
    measured = {
        name: compute_scores([measure_errors(year, way(year)) for year in years])
        for name, way in WAYS.items()
    }
    rows = [
        (name, *(f"{v:.4f}" if k.startswith("rmse") else f"{v:.3f}" for k, v in errors.items()))
        for name, errors in measured.items()
    ]
    print_table(
        f"Errors on {len(years)} site-years of the {world}",
        format_table(
            (
                "",
                "RMSE",
                "on the mine",
                "elsewhere",
                "bright %",
                "cloud %",
                "cloud % of mine",
                "dark %",
                "holes %",
            ),
            rows,
        )
        + "\nbright: blue is more than 0.03 above the truth"
        "\ncloud: bright, and more than 0.03 above the median of the truly clear observations;"
        "\n  for a reducer that takes one day: bright, and that day is cloud there"
        "\ndark: red is 0.01 and B08 is 0.04 below the truth, as in a shadow"
        "\nholes: empty, although a clear observation exists",
    )
    return measured


def draw_picture(year: SiteYear, path: Path) -> None:
    """Draw one mine block: the truth and three composites."""
    layout = {
        "dims": ("band", "y", "x"),
        "coords": {"band": list(BANDS), **odc.geo.xr.xr_coords(year.grid)},
    }
    pictures = {
        name: xr.DataArray(WAYS[way](year)["reflectance"].values, **layout)
        for name, way in PICTURED.items()
    }
    pictures["truth: no cloud, no noise"] = xr.DataArray(year.truth, **layout)
    report.draw_comparison(pictures, path, f"{year.name} {year.year}, simulated")


REDUCERS = (
    "annual-median", "annual-geomedian", "best pixel", "summer-bap", "eurominenet",
)  # fmt: skip
"""Ways whose worst residual cloud is reported as `residual_cloud_pct`."""
PICTURED = {
    "median of everything": "median of everything",
    "SCL mask and median": "odc-stac, SCL mask and median",
    "minecube": "annual-median",
}


@dataclasses.dataclass(frozen=True)
class SiteYear:
    """One year of a simulated site, with its truth."""

    name: str
    year: int
    scenes: list[pystac.Item]
    grid: GeoBox
    truth: np.ndarray[Any, Any]
    mine: np.ndarray[Any, Any]
    sky: xr.DataArray
    """uint8 (time, y, x), 1 = clear."""
    oracle: np.ndarray[Any, Any]
    """Median of the truly clear observations, 0 without any."""


def load_site_years(world: Path, sites: Sequence[Any]) -> list[SiteYear]:
    """Load all site-years of a simulated world."""
    site_years = []
    for source in load_sources(world / "sources.yaml").values():
        for site in sites:
            for year in YEARS:
                try:
                    found_scenes = scenes.search(site, year, source).scenes
                except scenes.NoScenesError:
                    continue
                truth = xr.open_zarr(world / "truth.zarr", group=site.id, consolidated=False)
                grid = grid_of(site)
                sky = truth["sky"].load()
                site_years.append(
                    SiteYear(
                        name=site.id,
                        year=year,
                        scenes=list(found_scenes),
                        grid=grid,
                        truth=truth["reflectance"].sel(year=year).values,
                        mine=truth["footprint"].sel(year=year).values == 1,
                        sky=sky[sky.time.dt.year == year],
                        oracle=compute_oracle(
                            scenes.select_usable(found_scenes, load_recipes()["naive-median"]),
                            grid,
                            sky,
                        ),
                    )
                )
    return site_years


def displace_scenes(years: Sequence[SiteYear], folder: Path) -> list[SiteYear]:
    """Move a fifth of the scenes by 20 m, in copies of their files with another transform.

    The oracle's pixels stay where they were.
    """
    rng = np.random.default_rng(1)
    folder.mkdir()
    displaced = []
    for year in years:
        items = [item.clone() for item in year.scenes]
        for item in items:
            if rng.random() >= 0.2:
                continue
            east, north = ((20, 0), (-20, 0), (0, 20), (0, -20))[rng.integers(4)]
            for band in (*BANDS, SCL):
                asset = item.assets[band]
                copy = folder / f"{year.name}_{item.id}_{band}.tif"
                shutil.copy(asset.href.removeprefix("file://"), copy)
                with rasterio.open(copy, "r+", IGNORE_COG_LAYOUT_BREAK="YES") as image:
                    image.transform = Affine.translation(east, north) * image.transform
                asset.href = str(copy)
        displaced.append(dataclasses.replace(year, scenes=items))
    return displaced


def compute_oracle(
    items: Sequence[pystac.Item], grid: GeoBox, sky: xr.DataArray
) -> np.ndarray[Any, Any]:
    """Compute the median with a perfect cloud mask."""
    items = sort_in_mosaic_order(items, grid)
    pixels = compute_stack(stack(items, grid, BANDS, chunk_px=max(grid.shape)))
    days = index_overpasses(items)
    observations = np.zeros((len(BANDS), max(days) + 1, *grid.shape), np.uint16)
    for n, (scene, day) in enumerate(zip(items, days, strict=True)):
        clear = sky.sel(time=scene.properties["minecube:solar_day"]).values == 1
        is_new = clear & (pixels[n] != 0).all(axis=0) & (observations[0, day] == 0)
        np.copyto(observations[:, day], pixels[n], where=is_new)
    median: np.ndarray[Any, Any] = np.stack([reducers.median(band) for band in observations])
    return median


def make_composite(year: SiteYear, recipe: Recipe) -> xr.Dataset:
    """Composite a site-year by a recipe, with its haze test and registration."""
    items = scenes.select(year.scenes, dataclasses.replace(recipe, min_dates=1))
    if recipe.haze:
        items = veils.mark_wrong_classifications(items, read_look(items, year.grid), recipe.haze)
    if recipe.registration:
        items = registration.apply_registration(
            items, registration.measure_shifts(items, year.grid), recipe.registration
        )
    return composite(items, year.grid, recipe, year=year.year).load()


def _composite_without_erosion(year: SiteYear) -> xr.Dataset:
    erode = masks._erode_coverage
    masks._erode_coverage = lambda scl: scl != 0
    try:
        return make_composite(year, load_recipes()["annual-median"])
    finally:
        masks._erode_coverage = erode


def _as_dataset(pixels: np.ndarray[Any, Any]) -> xr.Dataset:
    return xr.Dataset({"reflectance": (("band", "y", "x"), pixels)})


def run_odc_on_year(year: SiteYear) -> xr.Dataset:
    """Composite a site-year as users of odc-stac usually do.

    Remove the offset, mosaic overpasses, mask SCL's cloud classes, take the median.
    """
    items = scenes.select(year.scenes, load_recipes()["naive-median"])
    parts = []
    for offset in sorted({s.properties["minecube:offset"] for s in items}):
        same_offset = [s for s in items if s.properties["minecube:offset"] == offset]
        resampling = {SCL: "nearest", "*": "bilinear"}
        loaded = odc.stac.load(
            same_offset,
            bands=[*BANDS, SCL],
            geobox=year.grid,
            groupby="solar_day",
            resampling=resampling,
            nodata=0,
        )
        bands = (
            loaded[list(BANDS)]
            .to_array("band")
            .transpose("band", "time", "y", "x")
            .values.astype(np.float32)
        )
        clear = ~np.isin(loaded[SCL].values, (0, 1, 3, 8, 9, 10, 11))
        parts.append(np.where(clear & (bands != 0), np.maximum(bands + offset, 1), np.nan))
    median: np.ndarray[Any, Any] = np.nan_to_num(
        np.rint(bottleneck.nanmedian(np.concatenate(parts, axis=1), axis=1))
    )
    return _as_dataset(median.astype(np.uint16))


def measure_errors(year: SiteYear, result: xr.Dataset) -> dict[str, float]:
    """Sum squared errors and count wrong pixels of one composite."""
    pixels = result["reflectance"].values
    error = pixels.astype(np.float32) - year.truth
    bright = error[0] > CLOUD_EXCESS
    if "day_of_year" in result:
        cloud = bright & ~find_clear(year.sky, result["day_of_year"].values)
    else:
        cloud = (
            bright
            & (pixels[0].astype(np.float32) - year.oracle[0] > CLOUD_EXCESS)
            & (year.oracle[0] > 0)
        )
    dark = (
        (error[BANDS.index("B08")] < -400)
        & (error[BANDS.index("B04")] < -100)
        & (year.oracle[0] > 0)
    )
    squares = (error**2).mean(axis=0)
    return {
        "pixels": year.mine.size,
        "mine": int(year.mine.sum()),
        "squares": float(squares.sum()),
        "squares_mine": float(squares[year.mine].sum()),
        "bright": int(bright.sum()),
        "cloud": int(cloud.sum()),
        "cloud_mine": int(cloud[year.mine].sum()),
        "dark": int(dark.sum()),
        "holes": int(((pixels == 0).any(axis=0) & (year.oracle[0] > 0)).sum()),
    }


def find_clear(sky: xr.DataArray, day_of_year: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Find the pixels whose sky was clear on the given day of year."""
    clear = np.zeros(day_of_year.shape, bool)
    for sky_of_day in sky:
        clear |= (day_of_year == int(sky_of_day.time.dt.dayofyear)) & (sky_of_day.values == 1)
    return clear


CLOUD_EXCESS = 300
"""Excess of blue that counts as residual cloud, in reflectance x 10000."""


def compute_scores(sums: Sequence[dict[str, float]]) -> dict[str, float]:
    """Compute scores from the sums of all site-years."""
    totals = {name: sum(f[name] for f in sums) for name in sums[0]}
    rest = totals["pixels"] - totals["mine"]
    return {
        "rmse": round((totals["squares"] / totals["pixels"]) ** 0.5 / 1e4, 5),
        "rmse_mine": round((totals["squares_mine"] / totals["mine"]) ** 0.5 / 1e4, 5),
        "rmse_rest": round(((totals["squares"] - totals["squares_mine"]) / rest) ** 0.5 / 1e4, 5),
        "bright_pct": round(100 * totals["bright"] / totals["pixels"], 4),
        "cloud_pct": round(100 * totals["cloud"] / totals["pixels"], 4),
        "cloud_mine_pct": round(100 * totals["cloud_mine"] / totals["mine"], 4),
        "dark_pct": round(100 * totals["dark"] / totals["pixels"], 4),
        "holes_pct": round(100 * totals["holes"] / totals["pixels"], 4),
    }


def _set_opening(rule: MaskRule, open_m: int = 40) -> MaskRule:
    return dataclasses.replace(rule, open_m=open_m)


def _list_ways() -> dict[str, Callable[[SiteYear], xr.Dataset]]:
    """List the compared composites by name."""
    known = load_recipes()
    best = known["annual-median"]
    recipes = {
        "median of everything": known["naive-median"],
        "annual-median": best,
        "annual-geomedian": known["annual-geomedian"],
        "best pixel": dataclasses.replace(best, reducer="best-pixel", best_pixel=BestPixel()),
        "summer-bap": known["summer-bap"],
        "eurominenet": known["eurominenet"],
        "no haze test": dataclasses.replace(best, haze=None),
        "no bright override": dataclasses.replace(best, bright_override=None),
        "no dilation": dataclasses.replace(
            best, mask=tuple(dataclasses.replace(r, dilate_m=0) for r in best.mask)
        ),
        "shadow opened, too": dataclasses.replace(
            best, mask=tuple(_set_opening(r) if r.classes == (3,) else r for r in best.mask)
        ),
        "no opening": dataclasses.replace(best, mask=tuple(_set_opening(r, 0) for r in best.mask)),
        "no shadow rule": dataclasses.replace(
            best, mask=tuple(r for r in best.mask if r.classes != (3,))
        ),
        "no date test": dataclasses.replace(
            best, haze=dataclasses.replace(best.haze, date_excess=None) if best.haze else None
        ),
        "no registration": dataclasses.replace(best, registration=None),
        "scenes beyond half a pixel left out": dataclasses.replace(
            best, registration=Registration(most_px=0.5, beyond="drop")
        ),
        "no fallback": dataclasses.replace(best, fallback=()),
        "K = 6": dataclasses.replace(best, max_clear_observations=6),
    }
    return {
        "odc-stac, SCL mask and median": run_odc_on_year,
        **{
            name: functools.partial(make_composite, recipe=recipe)
            for name, recipe in recipes.items()
        },
        "no border erosion": _composite_without_erosion,
        "median of what is truly clear": lambda year: _as_dataset(year.oracle),
    }


WAYS = _list_ways()


def measure_gpu(print_table: PrintTable) -> dict[str, Any]:
    """Time the geomedian on a GPU, with transfers, and on two CPU cores.

    Without a GPU nothing is timed.
    """
    import torch

    from minecube.composite.torch_reducers import TorchGeomedian

    if not torch.cuda.is_available():
        print_table("Geomedian on a GPU", "no GPU here")
        return {"gpu": None}
    gpu = TorchGeomedian("cuda")
    rng = np.random.default_rng(0)
    stack = rng.integers(1, 9000, (len(BANDS), DATES, 512, 512), dtype=np.uint16)
    stack *= rng.random((1, DATES, 512, 512)) > 0.35
    halves = np.array_split(stack, 2, axis=-2)
    gpu(stack)
    torch.cuda.synchronize()
    gpu_s = _measure_median_seconds(lambda: gpu(stack))
    with ThreadPoolExecutor(2) as pool:
        cpu_s = _measure_median_seconds(lambda: list(pool.map(reducers.geomedian, halves)))
    figures = {
        "gpu_gb_per_s": stack.nbytes / gpu_s / 1e9,
        "cpu_gb_per_s": stack.nbytes / cpu_s / 1e9,
    }
    row = (*(f"{figure:.2f}" for figure in figures.values()), f"{cpu_s / gpu_s:.1f}")
    print_table(
        f"Geomedian on {torch.cuda.get_device_name()}",
        format_table(("GB/s of input", "two cores", "times"), [row]),
    )
    return {"gpu": {"geomedian": figures}}


def _measure_median_seconds(work: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
