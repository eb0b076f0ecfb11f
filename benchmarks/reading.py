"""What reading costs and survives: far away, from a server that fails, with tokens that expire, with flags that are wrong.

    python benchmarks/reading.py [--json FILE] [--quick] [--plot FILE]

It makes its archives, serves them on loopback by a process of its own (tests/range_server.py), and prints what came of each.
The figures are wall times on a machine that does nothing else; the reads far away and here are taken in turn.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
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
from minecube.composite import composite
from minecube.grid import coarsen, grid_of
from minecube.jobs import build as building
from minecube.jobs.scene_lists import load_or_search
from minecube.reader import Ledger, compute_stack, stack
from minecube.scenes import offsets
from minecube.scenes.looks import read_look
from minecube.simulate import World, simulate_archive

SERVER = Path(__file__).parents[1] / "tests" / "range_server.py"
DATES, SIDE = 40, 1024
LATENCY_S = 0.04
YEARS = (2020, 2022)


def main() -> None:
    """Run all parts and print, and write, what came of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="draw the two distributions of offset steps here")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a quarter of the dates, one run instead of three, one seed",
    )
    asked = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    )
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        figures = far_away(
            place / "far", DATES // 4 if asked.quick else DATES, 1 if asked.quick else 3
        )
        figures |= troubled(place / "world")
        figures |= wrong_flags(place / "flags", (1,) if asked.quick else (1, 2, 3), asked.plot)
    for name, value in figures.items():
        print(f"{name:32} {value}")
    if asked.json:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        asked.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


@contextmanager
def served(folder: Path, *trouble: str) -> Iterator[str]:
    """The URL under which the folder is served, with that trouble."""
    server = subprocess.Popen(
        [sys.executable, str(SERVER), str(folder), *trouble], stdout=subprocess.PIPE, text=True
    )
    try:
        yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
    finally:
        server.terminate()
        server.communicate()


# A site-year of 40 dates x 10 bands and SCL, 1024 x 1024, here and 40 ms away


def far_away(folder: Path, dates: int, runs: int) -> dict[str, object]:
    """Seconds to read a site-year, and to composite it, from disk and over the network."""
    grid = archive(folder, dates)
    here = listed(str(folder), grid, dates)
    seconds: dict[str, list[float]] = {
        name: [] for name in ("read here", "read far", "composite here", "composite far")
    }
    ledger = Ledger()
    read(here, grid, Ledger())  # the page cache is warm for both
    for run in range(runs):
        # A fresh server is a fresh URL, so that no header is known from the run before.
        with served(folder, "--delay", str(LATENCY_S)) as url:
            far = listed(url, grid, dates)
            ledger = Ledger()
            a, seconds_here = timed(lambda: read(here, grid, Ledger()))
            b, seconds_far = timed(lambda: read(far, grid, ledger))  # noqa: B023
            assert a == b, "pixels differ"
        with served(folder, "--delay", str(LATENCY_S)) as url:
            far = listed(url, grid, dates)
            recipe = dataclasses.replace(load_recipes()["annual-median"], block_px=SIDE)
            c, composite_here = timed(lambda: composite(here, grid, recipe).load())  # noqa: B023
            d, composite_far = timed(lambda: composite(far, grid, recipe).load())  # noqa: B023
            assert c.identical(d), "composites differ"
        for name, value in zip(
            seconds, (seconds_here, seconds_far, composite_here, composite_far), strict=True
        ):
            seconds[name].append(value)
        print(
            f"  run {run + 1}: "
            + ", ".join(f"{name} {values[-1]:.2f} s" for name, values in seconds.items()),
            flush=True,
        )
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    totals = ledger.totals()
    return {
        "read_here_s": round(middle["read here"], 2),
        "read_far_s": round(middle["read far"], 2),
        "composite_here_s": round(middle["composite here"], 2),
        "composite_far_s": round(middle["composite far"], 2),
        "requests": totals["requests"],
        "mb": round(totals["bytes"] / 1e6),
        "latency_ratio": round(middle["read far"] / middle["read here"], 3),
        "latency_ratio_composite": round(middle["composite far"] / middle["composite here"], 3),
    }


def timed(work: object) -> tuple[object, float]:
    """What it gives, and the seconds it takes."""
    start = time.perf_counter()
    given = work()
    return given, time.perf_counter() - start


def read(listed_scenes: list[pystac.Item], grid: GeoBox, ledger: Ledger) -> int:
    """Every band of every scene in its own pixels; the sum of all."""
    total = 0
    for size in (10, 20):
        bands = [b for b in (*BANDS, SCL) if NATIVE_M[b] == size]
        total += int(
            compute_stack(
                stack(listed_scenes, coarsen(grid, size), bands, chunk_px=SIDE, ledger=ledger)
            ).sum()
        )
    return total


def archive(folder: Path, dates: int) -> GeoBox:
    """COGs of 512-pixel tiles, three times as wide as the site; their bytes a pixel are those of real ones (1.5 and 1.4)."""
    width = 3 * SIDE
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
                transform=Affine(size, 0, 360000, 0, -size, 5600040),
                nodata=0,
                compress="deflate",
                level=6,
                predictor=2,
                blocksize=512,
            ) as out:
                out.write(pixels, 1)
    return GeoBox((SIDE, SIDE), Affine(10, 0, 369600, 0, -10, 5590440), "EPSG:32633")


def listed(root: str, grid: GeoBox, dates: int) -> list[pystac.Item]:
    """The archive's scenes."""
    area = box(*grid.geographic_extent.boundingbox)
    found = []
    for date in range(dates):
        day = pd.Timestamp("2021-04-03 10:00") + pd.Timedelta(days=5 * date)
        stamp = f"{day:%Y%m%dT%H%M%S}"
        found.append(
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
    return found


# The simulated archive, from servers in trouble


def troubled(folder: Path) -> dict[str, object]:
    """A build undisturbed; from a server that fails; with a file gone for good; with tokens that expire."""
    (site,) = [s for s in load_sites() if s.id == "demo_1"]
    site = Site(id="mine", geometry=site.geometry)
    simulate_archive(
        [site], folder, World(years=YEARS, styles=("planetary-computer",), dates_per_year=12)
    )
    recipe = dataclasses.replace(load_recipes()["annual-median"], block_px=192, chunk_px=96)
    undisturbed = built(folder, f"{folder}", site, recipe, "here")
    trouble = ("--fail", "0.333", "--truncate", "0.05", "--stall", "0.02", "--stall-s", "10")
    with served(folder, *trouble) as url:
        flaky = built(folder, url, site, recipe, "flaky")
        retries = sum(o.reads["retried"] for o in flaky.outcomes)
    figures: dict[str, object] = {
        "flaky_identical": undisturbed.cube.identical(flaky.cube),
        "flaky_retries": int(retries),
        "flaky_s": round(flaky.seconds, 1),
        "undisturbed_s": round(undisturbed.seconds, 1),
    }
    with served(folder, "--token-life", "3", "--delay", "0.04") as url:
        tokens = built(
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
        "signatures_written": written(b"sig=", folder.parent / "tokens"),
    }
    clearest = min(undisturbed.used, key=lambda scene: scene.properties["eo:cloud_cover"])
    next(folder.glob(f"planetary-computer/{clearest.id}/*_B04_10m.tif")).unlink()
    with served(folder) as url:
        lost = built(folder, url, site, recipe, "lost")
    states = {o.year: o.state for o in lost.outcomes}
    return figures | {
        "lost_site_year_committed": states[2022] == "built",
        "other_site_year_committed": states[2020] == "built",
    }


@dataclasses.dataclass
class Built:
    """A build, its cube, and how long it took."""

    outcomes: list[building.Outcome]
    cube: xr.Dataset
    used: list[pystac.Item]
    """Scenes of its last year."""
    seconds: float


def built(
    folder: Path, root: str, site: Site, recipe: Recipe, name: str, access: Access | None = None
) -> Built:
    """The site's years built from the archive at that root."""
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
    used = scenes.select(load_or_search(site, YEARS[-1], job.sources, job.snapshots).scenes, recipe)
    return Built(outcomes, cube.open_cube(job.store, site.id).load().drop_attrs(), used, seconds)


def written(signature: bytes, folder: Path) -> int:
    """Files below the folder that hold it."""
    return sum(signature in path.read_bytes() for path in folder.rglob("*") if path.is_file())


# Flags that are wrong


def wrong_flags(folder: Path, seeds: tuple[int, ...], plot: Path | None) -> dict[str, object]:
    """Scenes whose offset is wrong, found and not, among those that the recipe uses and among all."""
    recipe, rows = load_recipes()["annual-median"], []
    sites = [s for s in load_sites() if s.id.startswith("demo_")]
    for seed in seeds:
        world = folder / str(seed)
        simulate_archive(
            sites,
            world,
            World(years=(2020, 2022), styles=("earth-search",), wrong_flags=0.05, seed=seed),
        )
        carried = pd.read_parquet(world / "truth_offsets.parquet").set_index("id")["carried"]
        (source,) = load_sources(world / "sources.yaml").values()
        for site in sites:
            for year in (2020, 2022):
                found = scenes.search(site, year, source).scenes
                used = {s.id for s in scenes.select(found, recipe)}
                checks = offsets.check_offsets(found, read_look(found, grid_of(site)))
                rows += [
                    (c.scene in used, c.offset != -carried[c.scene], c.conflict, c.step)
                    for c in checks
                ]
    table = pd.DataFrame(rows, columns=["used", "wrong", "conflict", "step"])
    used = table[table.used]
    if plot:
        draw(used, plot)
    return {
        "offset_flags_found_pct": round(100 * float(used[used.wrong].conflict.mean()), 2),
        "offset_false_alarms": int((used.conflict & ~used.wrong).sum()),
        "offset_scenes_used": len(used),
        "offset_flags_wrong": int(used.wrong.sum()),
        "offset_all_scenes": len(table),
        "offset_all_wrong": int(table.wrong.sum()),
        "offset_all_found": int((table.wrong & table.conflict).sum()),
        "offset_all_false_alarms": int((table.conflict & ~table.wrong).sum()),
        "offset_all_untold_wrong": int((table.wrong & table.step.isna()).sum()),
    }


def draw(table: pd.DataFrame, path: Path) -> None:
    """The two distributions of steps."""
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
        xlabel="step against the scenes around it (reflectance x 10000)",
        ylabel="scenes",
    )
    axes.axvspan(-500, 500, color="0.92", zorder=0)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
