"""What a composite costs and how good it is, against what a user would run instead, all in one run.

    python benchmarks/composite.py [--json FILE] [--quick] [--picture FILE] [--markdown FILE]

It makes its archives, runs every contender in a process of its own, in turn, and prints the ratios. A ratio is ours divided by
theirs, of medians over the rounds; so below 1 is faster, or less. Wall times of a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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
from minecube.scenes import veils
from minecube.scenes.looks import read_look
from minecube.simulate import World, simulate_archive

DATES, SIDE, WIDE = 40, 1024, 2048
LEFT, TOP = 360000, 5600040
HIDING = (3, 8, 9, 10)
"""SCL classes that all contenders mask, and nothing else: what they make of it must be the same to the last bit."""
PLAIN = Recipe(
    id="plain", title="SCL and a median", mask=(MaskRule(classes=HIDING),), block_px=SIDE
)
GEOMEDIAN = dataclasses.replace(PLAIN, id="geomedian", reducer="geomedian", block_px=SIDE // 2)
YEARS = (2015, 2020, 2022)


def main() -> None:
    """Run one contender, or all parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument(
        "--markdown", type=Path, help="write the tables here, for the documentation"
    )
    parser.add_argument(
        "--picture", type=Path, help="draw one mine block under three composites here"
    )
    parser.add_argument("--quick", action="store_true", help="one round instead of three")
    parser.add_argument(
        "--run", nargs=3, metavar=("CONTENDER", "ARCHIVE", "DATES"), help=argparse.SUPPRESS
    )
    asked = parser.parse_args()
    if asked.run:
        print(json.dumps(run_here(asked.run[0], asked.run[1], int(asked.run[2]))))
        return
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {pd.Timestamp.now():%Y-%m-%d}"
    print(machine, flush=True)
    logging.disable(logging.WARNING)  # shifts of scenes, which the simulated world has many of
    rounds = 1 if asked.quick else 3
    figures: dict[str, Any] = {"machine": machine}
    texts: list[str] = []

    def say(title: str, text: str) -> None:
        texts.append(f"## {title}\n```\n{text}\n```\n")
        print(f"\n{title}\n{text}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_archive(place / "mixed", DATES, lambda rng: rng.uniform(0, 0.7))
        figures |= against_others(place / "mixed", rounds, say)
        figures |= bytes_read(place / "cloudy", say)
        figures |= scaling(place / "mixed", rounds, say)
        figures |= two_workers(place / "flat", say)
        figures |= quality(place, asked.picture, say)
        figures |= on_gpu(say)
    if asked.json:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        asked.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if asked.markdown:
        asked.markdown.write_text(f"Machine: {machine}.\n\n" + "\n".join(texts), encoding="utf-8")


# The archive: COGs of 512-pixel tiles, noise that deflates as real bands do, clouds of many sizes


def write_archive(
    folder: Path,
    dates: int,
    cover: Callable[[np.random.Generator], float],
    compress: str = "deflate",
) -> None:
    """`dates` scenes of `WIDE` pixels a side, of which the share `cover` is cloud; the site is their middle."""
    rng = np.random.default_rng(0)
    land = np.clip(
        ndimage.gaussian_filter(rng.standard_normal((WIDE, WIDE)), 4) * 8000 + 1800, 200, 6000
    )
    covers = [cover(np.random.default_rng([5, date])) for date in range(dates)]

    def write(date: int) -> None:
        rng = np.random.default_rng([1, date])
        field = sum(_noise(rng, size) * size for size in (16, 32, 64))
        cloud = (
            field > np.quantile(field, 1 - covers[date])
            if 0 < covers[date] < 1
            else np.full(field.shape, covers[date] >= 1)
        )
        for band, size in NATIVE_M.items():
            ground = land[:: size // 10, :: size // 10]
            over = cloud if size == 20 else cloud.repeat(2, axis=0).repeat(2, axis=1)
            if band == SCL:
                pixels = np.where(cloud, 9, np.where(ground > 2500, 5, 4)).astype(np.uint8)
            else:
                seen = np.where(over, 6000 + ground / 8, ground + 10 * date)
                seen = seen + rng.standard_normal(ground.shape, dtype=np.float32) * 20
                pixels = np.clip(seen, 1, 20000).astype(np.uint16)
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


def _noise(rng: np.random.Generator, size: int) -> np.ndarray[Any, Any]:
    n = WIDE // 2
    coarse = rng.standard_normal((n // size + 3, n // size + 3)).astype(np.float32)
    return ndimage.zoom(coarse, size, order=1)[:n, :n]


def site_grid(height: int = SIDE, width: int = SIDE) -> GeoBox:
    """The middle of the scenes."""
    return GeoBox(
        (height, width),
        Affine(10, 0, LEFT + 5 * (WIDE - SIDE), 0, -10, TOP - 5 * (WIDE - SIDE)),
        "EPSG:32633",
    )


def raw_items(folder: Path | str, dates: int) -> list[pystac.Item]:
    """The scenes as a catalogue lists them, with all that stackstac and odc-stac ask for."""
    area = box(
        *GeoBox(
            (WIDE, WIDE), Affine(10, 0, LEFT, 0, -10, TOP), "EPSG:32633"
        ).geographic_extent.boundingbox
    )
    found = []
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
            side = WIDE * 10 // size
            place = {
                "proj:shape": [side, side],
                "proj:transform": [size, 0, LEFT, 0, -size, TOP, 0, 0, 1],
                "gsd": size,
            }
            item.add_asset(
                band,
                pystac.Asset(f"{folder}/{date:02d}/{band}.tif", roles=["data"], extra_fields=place),
            )
        found.append(item)
    return found


def listed(folder: Path | str, dates: int) -> list[pystac.Item]:
    """The same, as minecube's search gives them."""
    made = raw_items(folder, dates)
    for item in made:
        item.properties |= {
            "s2:processing_baseline": "03.00",
            "minecube:access": json.dumps(dataclasses.asdict(Access())),
            "minecube:origin": "",
            "minecube:datatake": f"S2A_{item.datetime:%Y%m%dT%H%M%S}",
            "minecube:offset": 0,
        }
    return made


# Contenders. Each gives reflectance [band, y, x] uint16: the median of what SCL leaves, 0 where it leaves nothing


def ours(folder: str, dates: int, recipe: Recipe = PLAIN) -> np.ndarray[Any, Any]:
    """This project."""
    return composite(listed(folder, dates), site_grid(), recipe)["reflectance"].values


def ours_geomedian(folder: str, dates: int) -> np.ndarray[Any, Any]:
    """This project's geomedian with its three deviations."""
    made = composite(listed(folder, dates), site_grid(), GEOMEDIAN).compute()
    return made["reflectance"].values


def stackstac_xarray(folder: str, dates: int) -> np.ndarray[Any, Any]:
    """stackstac, everything at 10 m, xarray's median over time."""
    grid = site_grid()
    stacked = stackstac.stack(
        raw_items(folder, dates),
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
    return _xarray_median(stacked.sel(band=SCL), stacked.sel(band=list(BANDS)))


def odc_xarray(folder: str, dates: int) -> np.ndarray[Any, Any]:
    """odc-stac, everything at 10 m, xarray's median over time."""
    loaded = odc.stac.load(
        raw_items(folder, dates),
        bands=[*BANDS, SCL],
        geobox=site_grid(),
        chunks={"x": 512, "y": 512},
        dtype="uint16",
        nodata=0,
    )
    return _xarray_median(
        loaded[SCL], loaded[list(BANDS)].to_array("band").transpose("time", "band", "y", "x")
    )


def _xarray_median(scl: xr.DataArray, bands: xr.DataArray) -> np.ndarray[Any, Any]:
    clear = ~scl.isin(HIDING) & (scl != 0)
    seen = bands.where(clear & (bands != 0)).chunk({"time": -1})
    with np.errstate(all="ignore"):
        middle = seen.median("time", skipna=True)
        return middle.round().fillna(0).astype(np.uint16).values


def odc_bottleneck(folder: str, dates: int) -> np.ndarray[Any, Any]:
    """odc-stac at native resolutions, bottleneck's median band by band: what an expert would write."""
    grid, items = site_grid(), raw_items(folder, dates)
    half = coarsen(grid, 20)
    scl = odc.stac.load(items, bands=[SCL], geobox=half, pool=8)[SCL].values
    clear = ~np.isin(scl, HIDING) & (scl != 0)
    out = np.zeros((len(BANDS), *grid.shape), np.uint16)

    def reduce(band: str, values: np.ndarray[Any, Any], mask: np.ndarray[Any, Any]) -> None:
        seen = values.astype(np.float32)
        seen[~mask | (values == 0)] = np.nan
        middle = np.nan_to_num(np.rint(bottleneck.nanmedian(seen, axis=0))).astype(np.uint16)
        out[BANDS.index(band)] = (
            middle if middle.shape == grid.shape else middle.repeat(2, axis=0).repeat(2, axis=1)
        )

    fine = clear.repeat(2, axis=1).repeat(2, axis=2)
    with ThreadPoolExecutor(2) as pool:
        waiting = []
        for band in BANDS:
            where, mask = (grid, fine) if NATIVE_M[band] == 10 else (half, clear)
            values = odc.stac.load(
                items, bands=[band], geobox=where, dtype="uint16", nodata=0, pool=8
            )[band].values
            waiting.append(pool.submit(reduce, band, values, mask))
        for done in waiting:
            done.result()
    return out


def floor(folder: str, dates: int) -> None:
    """GDAL reads and decodes the same windows, and nothing is done with them."""

    def read(asset: tuple[int, str]) -> int:
        date, band = asset
        scale = NATIVE_M[band] // 10
        at, side = (WIDE - SIDE) // 2 // scale, SIDE // scale
        with rasterio.open(f"{folder}/{date:02d}/{band}.tif") as file:
            return int(file.read(1, window=((at, at + side), (at, at + side)))[0, 0])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, ((date, band) for band in NATIVE_M for date in range(dates))))


def geomad_kernel(folder: str, dates: int) -> None:
    """geomad's geomedian and deviations on both cores, of the same pixels, in memory in the order it likes; its time only."""
    grid, items = site_grid(), listed(folder, dates)
    seconds = 0.0
    for top in range(0, SIDE, 64):
        strip = grid[top : top + 64]
        pixels = compute_stack(stack(items, strip, BANDS, chunk_px=SIDE))
        clear = ~np.isin(
            compute_stack(stack(items, strip, [SCL], chunk_px=SIDE))[:, 0], (0, *HIDING)
        )
        spectra = np.where(clear[:, None], pixels, np.float32(np.nan)).astype(
            np.float32
        ) / np.float32(1e4)
        spectra = np.ascontiguousarray(spectra.transpose(2, 3, 1, 0))
        start = time.perf_counter()
        middle = geomad.nangeomedian_pcm(spectra, num_threads=2, eps=1e-6)
        for deviation in (geomad.emad_pcm, geomad.smad_pcm, geomad.bcmad_pcm):
            deviation(spectra, middle, num_threads=2)
        seconds += time.perf_counter() - start
    geomad_kernel.seconds = seconds  # type: ignore[attr-defined]


CONTENDERS: dict[str, Callable[[str, int], Any]] = {
    "minecube": ours,
    "odc-stac native + bottleneck": odc_bottleneck,
    "stackstac + xarray": stackstac_xarray,
    "odc-stac + xarray": odc_xarray,
    "GDAL reads only": floor,
    "minecube geomedian": ours_geomedian,
    "geomad's kernel only": geomad_kernel,
}


def run_here(name: str, folder: str, dates: int) -> dict[str, Any]:
    """Seconds, peak memory and a hash of what came out; everything was imported and its first reads are warm."""
    floor(folder, 2)
    start = time.perf_counter()
    made = CONTENDERS[name](folder, dates)
    seconds = getattr(CONTENDERS[name], "seconds", time.perf_counter() - start)
    digest = (
        hashlib.sha256(np.ascontiguousarray(made).tobytes()).hexdigest() if made is not None else ""
    )
    return {"seconds": seconds, "peak_mb": peak_mb(), "hash": digest}


def peak_mb() -> float:
    """Memory of this process at its highest; what getrusage says may be its parent's, from before it was this program."""
    (line,) = (
        line
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        if line.startswith("VmHWM")
    )
    return int(line.split()[1]) / 1e3


def run_apart(name: str, folder: Path, dates: int = DATES) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--run", name, str(folder), str(dates)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


Say = Callable[[str, str], None]


def against_others(folder: Path, rounds: int, say: Say) -> dict[str, Any]:
    """All contenders in turn."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name in CONTENDERS:
            runs[name].append(run_apart(name, folder))
    seconds = {name: statistics.median(r["seconds"] for r in found) for name, found in runs.items()}
    peak = {name: statistics.median(r["peak_mb"] for r in found) for name, found in runs.items()}
    hashes = {runs[name][0]["hash"] for name in list(CONTENDERS)[:4]}
    mine = seconds["minecube"]
    rows = [
        (name, round(seconds[name], 2), round(peak[name]), f"{mine / seconds[name]:.2f}")
        for name in CONTENDERS
    ]
    say(
        f"{DATES} dates x {len(BANDS)} bands and SCL, {SIDE} x {SIDE} at 10 m, COGs on disk; medians "
        + ("identical" if len(hashes) == 1 else "DIFFER"),
        format_table(("", "s", "peak MB", "minecube's median / this"), rows),
    )
    both = seconds["GDAL reads only"] + seconds["geomad's kernel only"]
    return {
        "medians_identical": len(hashes) == 1,
        "seconds": {name: round(s, 2) for name, s in seconds.items()},
        "vs_stackstac": round(mine / seconds["stackstac + xarray"], 3),
        "vs_odc": round(mine / seconds["odc-stac + xarray"], 3),
        "vs_odc_bottleneck": round(mine / seconds["odc-stac native + bottleneck"], 3),
        "vs_floor": round(mine / seconds["GDAL reads only"], 3),
        "memory_vs_stackstac": round(peak["minecube"] / peak["stackstac + xarray"], 3),
        "geomedian_vs_floor_and_kernel": round(seconds["minecube geomedian"] / both, 3),
    }


def bytes_read(folder: Path, say: Say) -> dict[str, Any]:
    """What is read of an archive as cloudy as Europe: half of the dates fully clouded over the site, the others in part."""
    write_archive(folder, DATES, lambda rng: 1.0 if rng.random() < 0.5 else rng.uniform(0, 0.3))
    items, grid = listed(folder, DATES), site_grid()
    dull = sum(_share_cloudy(item) > 0.99 for item in items)
    everything = Ledger()
    for size in (10, 20):
        bands = [b for b in NATIVE_M if NATIVE_M[b] == size]
        compute_stack(stack(items, coarsen(grid, size), bands, chunk_px=SIDE, ledger=everything))
    read, seconds, made = {}, {}, {}
    for name, most in (("all", None), ("K = 12", 12), ("K = 6", 6)):
        ledger = Ledger()
        start = time.perf_counter()
        made[name] = composite(
            items, grid, dataclasses.replace(PLAIN, max_clear_observations=most), ledger
        ).compute()
        seconds[name], read[name] = (
            time.perf_counter() - start,
            ledger.totals()["bytes"] / everything.totals()["bytes"],
        )
    ground = made["all"]["reflectance"].values.astype(float)
    rows = []
    for name in read:
        off = float(np.sqrt(((made[name]["reflectance"].values - ground) ** 2).mean())) / 1e4
        fewest = int(made[name]["clear_count"].min())
        rows.append(
            (name, f"{100 * read[name]:.1f}", round(seconds[name], 2), fewest, f"{off:.5f}")
        )
    say(
        f"An archive in which {dull} of {DATES} dates are fully clouded over the site",
        format_table(
            ("dates read", "% of all bytes", "s", "fewest clear dates", "RMSE against all"), rows
        ),
    )
    return {
        "cloudy_bytes_fraction": round(read["all"], 3),
        "k12_bytes_fraction": round(read["K = 12"], 3),
    }


def _share_cloudy(item: pystac.Item) -> float:
    with rasterio.open(item.assets[SCL].href) as file:
        return float(np.isin(file.read(1), HIDING).mean())


def scaling(folder: Path, rounds: int, say: Say) -> dict[str, Any]:
    """Seconds and memory over dates and over area."""
    rows, figures = [], {}
    for what, sizes in (
        ("dates", [(n, SIDE) for n in (10, 20, 30, 40)]),
        ("area", [(20, n) for n in (512, 1024, 1536, 2048)]),
    ):
        amounts, took = [], []
        for dates, side in sizes:
            runs = [_one_size(folder, dates, side) for _ in range(rounds)]
            amounts.append(dates if what == "dates" else side**2 / 1e6)
            took.append(statistics.median(r[0] for r in runs))
            peak = max(r[1] for r in runs)
            rows.append((what, dates, f"{side} x {side}", round(took[-1], 2), round(peak)))
        slope, start = np.polyfit(amounts, took, 1)
        worst = float(np.abs(np.polyval((slope, start), amounts) / took - 1).max())
        unit = "date" if what == "dates" else "Mpx"
        figures[f"linear_in_{what}"] = (
            f"{start:.2f} s + {slope:.3f} s a {unit}, within {100 * worst:.0f} %"
        )
    say(
        "Cost over dates and area, blocks of 512: "
        + "; ".join(f"{k}: {v}" for k, v in figures.items()),
        format_table(("over", "dates", "size", "s", "peak MB of the process"), rows),
    )
    return figures


def _one_size(folder: Path, dates: int, side: int) -> tuple[float, float]:
    code = (
        "import sys, time, dataclasses; sys.path.insert(0, sys.argv[1]); import composite as c; "
        "g = c.GeoBox((int(sys.argv[4]),) * 2, c.Affine(10, 0, c.LEFT, 0, -10, c.TOP), 'EPSG:32633'); "
        "items = c.listed(sys.argv[2], int(sys.argv[3])); r = dataclasses.replace(c.PLAIN, block_px=512); "
        "c.floor(sys.argv[2], 2); t = time.perf_counter(); made = c.composite(items, g, r).compute(); "
        "print(time.perf_counter() - t, c.peak_mb())"
    )
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        code,
        str(Path(__file__).parent),
        str(folder),
        str(dates),
        str(side),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, peak = done.stdout.split()[-2:]
    return float(seconds), float(peak)


def two_workers(folder: Path, say: Say) -> dict[str, Any]:
    """One and two Dask worker processes of one thread, on geomedians of files that cost nothing to decode."""
    from distributed import Client, LocalCluster

    write_archive(folder, 20, lambda rng: rng.uniform(0, 0.3), compress="")
    recipe = dataclasses.replace(GEOMEDIAN, block_px=256)
    lazy = composite(listed(folder, 20), site_grid(), recipe)
    took = {}
    for workers in (1, 2):
        with (
            LocalCluster(
                n_workers=workers, threads_per_worker=1, processes=True, dashboard_address=None
            ) as cluster,
            Client(cluster),
        ):
            lazy.isel(y=slice(0, 256)).compute()  # every worker has imported all
            start = time.perf_counter()
            lazy.compute()
            took[workers] = time.perf_counter() - start
    rows = [(workers, round(seconds, 1)) for workers, seconds in took.items()]
    say(
        "Geomedian of 20 dates, 16 blocks of 256, on Dask workers of one thread",
        format_table(("workers", "s"), rows),
    )
    return {"two_workers_speedup": round(took[1] / took[2], 3)}


# How good: on the simulated world, against its truth


def quality(place: Path, picture: Path | None, say: Say) -> dict[str, Any]:
    """Every reducer, what others would run, and the recipe with each of its steps switched off."""
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
        simulate_archive(sites, place / str(number), world)
        years = site_years(place / str(number), sites)
        measured[name] = _scored(years, name, say)
        if picture and not number:
            draw(next(y for y in years if y.name == "demo_3" and y.year == YEARS[-1]), picture)
    plain, *_ = measured.values()
    return {
        "quality": measured,
        "residual_cloud_pct": max(plain[name]["cloud_pct"] for name in REDUCERS),
    }


def _scored(years: Sequence[SiteYear], world: str, say: Say) -> dict[str, dict[str, float]]:
    """The scores of every way, printed as a table."""
    measured = {
        name: scores([measure(year, way(year)) for year in years]) for name, way in WAYS.items()
    }
    rows = [
        (name, *(f"{v:.4f}" if k.startswith("rmse") else f"{v:.3f}" for k, v in found.items()))
        for name, found in measured.items()
    ]
    say(
        f"Against the truth of {len(years)} site-years of the {world}",
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
        + "\nbright: blue more than 0.03 above the truth; cloud: and as much above the median of the truly clear observations,"
        "\nwhich has those by its scenes' displacement alone, or, where one day is chosen, and that day not clear there;"
        "\ndark: red 0.01 and B08 0.04 below the truth, as in a shadow; holes: empty although a clear observation existed",
    )
    return measured


def draw(year: SiteYear, path: Path) -> None:
    """One mine block under three composites, and the truth."""
    middle = {
        "dims": ("band", "y", "x"),
        "coords": {"band": list(BANDS), **odc.geo.xr.xr_coords(year.grid)},
    }
    drawn = {
        name: xr.DataArray(WAYS[way](year)["reflectance"].values, **middle)
        for name, way in PICTURED.items()
    }
    drawn["truth: no cloud, no noise"] = xr.DataArray(year.truth, **middle)
    report.draw_comparison(drawn, path, f"{year.name} {year.year}, simulated")


REDUCERS = (
    "annual-median", "annual-geomedian", "best pixel", "summer-bap", "eurominenet",
)  # fmt: skip
"""Ways whose worst residual cloud is the figure."""
PICTURED = {
    "median of everything": "median of everything",
    "SCL mask and median": "odc-stac, SCL mask and median",
    "minecube": "annual-median",
}


@dataclasses.dataclass(frozen=True)
class SiteYear:
    """A year of a simulated site, and what was really there."""

    name: str
    year: int
    scenes: list[pystac.Item]
    grid: GeoBox
    truth: np.ndarray[Any, Any]
    mine: np.ndarray[Any, Any]
    sky: xr.DataArray
    """uint8 (time, y, x), 1 = clear."""
    oracle: np.ndarray[Any, Any]
    """Median of the observations that are truly clear, 0 where there is none."""


def site_years(world: Path, sites: Sequence[Any]) -> list[SiteYear]:
    """All of a world, with the oracle's composites."""
    found = []
    for source in load_sources(world / "sources.yaml").values():
        for site in sites:
            for year in YEARS:
                try:
                    listed_scenes = scenes.search(site, year, source).scenes
                except scenes.NoScenesError:
                    continue
                truth = xr.open_zarr(world / "truth.zarr", group=site.id, consolidated=False)
                grid, sky = grid_of(site), truth["sky"].load()
                found.append(
                    SiteYear(
                        name=site.id,
                        year=year,
                        scenes=list(listed_scenes),
                        grid=grid,
                        truth=truth["reflectance"].sel(year=year).values,
                        mine=truth["footprint"].sel(year=year).values == 1,
                        sky=sky[sky.time.dt.year == year],
                        oracle=oracle(
                            scenes.select_usable(listed_scenes, load_recipes()["naive-median"]),
                            grid,
                            sky,
                        ),
                    )
                )
    return found


def oracle(used: Sequence[pystac.Item], grid: GeoBox, sky: xr.DataArray) -> np.ndarray[Any, Any]:
    """The median that a perfect mask would give."""
    used = sort_in_mosaic_order(used, grid)
    pixels = compute_stack(stack(used, grid, BANDS, chunk_px=max(grid.shape)))
    days = index_overpasses(used)
    seen = np.zeros((len(BANDS), max(days) + 1, *grid.shape), np.uint16)
    for n, (scene, day) in enumerate(zip(used, days, strict=True)):
        clear = sky.sel(time=scene.properties["minecube:solar_day"]).values == 1
        free = clear & (pixels[n] != 0).all(axis=0) & (seen[0, day] == 0)
        np.copyto(seen[:, day], pixels[n], where=free)
    out: np.ndarray[Any, Any] = np.stack([reducers.median(band) for band in seen])
    return out


def made_by(year: SiteYear, recipe: Recipe) -> xr.Dataset:
    """The composite of a recipe."""
    used = scenes.select(year.scenes, dataclasses.replace(recipe, min_dates=1))
    if recipe.haze:
        used = veils.mark_wrong_classifications(used, read_look(used, year.grid), recipe.haze)
    if recipe.registration:
        used = registration.apply_registration(
            used, registration.measure_shifts(used, year.grid), recipe.registration
        )
    return composite(used, year.grid, recipe, year=year.year).load()


def _without_erosion(year: SiteYear) -> xr.Dataset:
    erode, masks._erode_coverage = masks._erode_coverage, lambda scl: scl != 0
    try:
        return made_by(year, load_recipes()["annual-median"])
    finally:
        masks._erode_coverage = erode


def _as_dataset(pixels: np.ndarray[Any, Any]) -> xr.Dataset:
    return xr.Dataset({"reflectance": (("band", "y", "x"), pixels)})


def odc_mask_and_median(year: SiteYear) -> xr.Dataset:
    """What is usually written with odc-stac: offset removed, overpasses mosaicked, cloud classes of SCL masked, median."""
    used = scenes.select(year.scenes, load_recipes()["naive-median"])
    parts = []
    for offset in sorted({s.properties["minecube:offset"] for s in used}):
        own = [s for s in used if s.properties["minecube:offset"] == offset]
        how = {SCL: "nearest", "*": "bilinear"}
        loaded = odc.stac.load(
            own,
            bands=[*BANDS, SCL],
            geobox=year.grid,
            groupby="solar_day",
            resampling=how,
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
    out: np.ndarray[Any, Any] = np.nan_to_num(
        np.rint(bottleneck.nanmedian(np.concatenate(parts, axis=1), axis=1))
    )
    return _as_dataset(out.astype(np.uint16))


def measure(year: SiteYear, of: xr.Dataset) -> dict[str, float]:
    """Sums over a site-year."""
    made = of["reflectance"].values
    off = made.astype(np.float32) - year.truth
    bright = off[0] > CLOUDY
    if "day_of_year" in of:
        cloud = bright & ~clear_then(year.sky, of["day_of_year"].values)
    else:
        cloud = (
            bright & (made[0].astype(np.float32) - year.oracle[0] > CLOUDY) & (year.oracle[0] > 0)
        )
    dark = (
        (off[BANDS.index("B08")] < -400) & (off[BANDS.index("B04")] < -100) & (year.oracle[0] > 0)
    )
    squares = (off**2).mean(axis=0)
    return {
        "pixels": year.mine.size,
        "mine": int(year.mine.sum()),
        "squares": float(squares.sum()),
        "squares_mine": float(squares[year.mine].sum()),
        "bright": int(bright.sum()),
        "cloud": int(cloud.sum()),
        "cloud_mine": int(cloud[year.mine].sum()),
        "dark": int(dark.sum()),
        "holes": int(((made == 0).any(axis=0) & (year.oracle[0] > 0)).sum()),
    }


def clear_then(sky: xr.DataArray, day_of_year: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Where the sky of that day was clear."""
    clear = np.zeros(day_of_year.shape, bool)
    for of_day in sky:
        clear |= (day_of_year == int(of_day.time.dt.dayofyear)) & (of_day.values == 1)
    return clear


CLOUDY = 300
"""Blue brighter by this (reflectance x 10000) is residual cloud."""


def scores(found: Sequence[dict[str, float]]) -> dict[str, float]:
    """What the sums of all site-years come to."""
    total = {name: sum(f[name] for f in found) for name in found[0]}
    rest = total["pixels"] - total["mine"]
    return {
        "rmse": round((total["squares"] / total["pixels"]) ** 0.5 / 1e4, 5),
        "rmse_mine": round((total["squares_mine"] / total["mine"]) ** 0.5 / 1e4, 5),
        "rmse_rest": round(((total["squares"] - total["squares_mine"]) / rest) ** 0.5 / 1e4, 5),
        "bright_pct": round(100 * total["bright"] / total["pixels"], 4),
        "cloud_pct": round(100 * total["cloud"] / total["pixels"], 4),
        "cloud_mine_pct": round(100 * total["cloud_mine"] / total["mine"], 4),
        "dark_pct": round(100 * total["dark"] / total["pixels"], 4),
        "holes_pct": round(100 * total["holes"] / total["pixels"], 4),
    }


def _opened(rule: MaskRule, by_m: int = 40) -> MaskRule:
    return dataclasses.replace(rule, open_m=by_m)


def _ways() -> dict[str, Callable[[SiteYear], xr.Dataset]]:
    """Composites by name."""
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
            best, mask=tuple(_opened(r) if r.classes == (3,) else r for r in best.mask)
        ),
        "no opening": dataclasses.replace(best, mask=tuple(_opened(r, 0) for r in best.mask)),
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
        "odc-stac, SCL mask and median": odc_mask_and_median,
        **{name: functools.partial(made_by, recipe=recipe) for name, recipe in recipes.items()},
        "no border erosion": _without_erosion,
        "median of what is truly clear": lambda year: _as_dataset(year.oracle),
    }


WAYS = _ways()


def on_gpu(say: Say) -> dict[str, Any]:
    """The geomedian on a GPU, transfers and all, beside the processor's on two cores; nothing where there is none."""
    import torch

    from minecube.composite.torch_reducers import TorchGeomedian

    if not torch.cuda.is_available():
        say("Geomedian on a GPU", "no GPU here")
        return {"gpu": None}
    gpu = TorchGeomedian("cuda")
    rng = np.random.default_rng(0)
    stack = rng.integers(1, 9000, (len(BANDS), DATES, 512, 512), dtype=np.uint16)
    stack *= rng.random((1, DATES, 512, 512)) > 0.35
    halves = np.array_split(stack, 2, axis=-2)
    gpu(stack)
    torch.cuda.synchronize()
    gpu_s = _median_seconds(lambda: gpu(stack))
    with ThreadPoolExecutor(2) as pool:
        cpu_s = _median_seconds(lambda: list(pool.map(reducers.geomedian, halves)))
    figures = {
        "gpu_gb_per_s": stack.nbytes / gpu_s / 1e9,
        "cpu_gb_per_s": stack.nbytes / cpu_s / 1e9,
    }
    row = (*(f"{figure:.2f}" for figure in figures.values()), f"{cpu_s / gpu_s:.1f}")
    say(
        f"Geomedian on {torch.cuda.get_device_name()}",
        format_table(("GB/s of input", "two cores", "times"), [row]),
    )
    return {"gpu": {"geomedian": figures}}


def _median_seconds(work: Callable[[], Any]) -> float:
    took = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        took.append(time.perf_counter() - start)
    return statistics.median(took)


if __name__ == "__main__":
    main()
