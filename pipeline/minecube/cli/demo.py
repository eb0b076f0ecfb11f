"""Subcommand demo: run and measure the whole pipeline on a simulated world with known truth."""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import geopandas as gpd
import numpy as np
import numpy.typing as npt
import xarray as xr

from minecube import cube, labels, metrics, models, report, scenes, tracks
from minecube import train as training
from minecube.catalog import Site, load_models, load_presets, load_recipes, load_sites, load_sources
from minecube.cli import build as building
from minecube.cli.common import SEED, OutFolder, table
from minecube.cli.predict import map_site
from minecube.cli.results import export_sites
from minecube.cli.score import SHOWN, score_site, write
from minecube.composite import composite
from minecube.errors import CatalogError, MinecubeError
from minecube.grid import grid_of
from minecube.scenes import snapshot
from minecube.simulate import World
from minecube.simulate import simulate as make_world

YEARS = (2015, 2020, 2022)
"""A year with one satellite and few dates, one in two baselines, one with the offset of 04.00."""
CLOUDY = 300
"""Residual cloud: blue is brighter than the truth by more than this (reflectance x 10000)."""
MODEL, RECIPE = "unet-small", "annual-median"


@click.command()
@click.option(
    "--out",
    type=OutFolder(),
    default=Path("build/demo"),
    show_default=True,
    help="New or empty folder for all results.",
)
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    default=30,
    show_default=True,
    help="Number of training epochs.",
)
@click.option(
    "--seed",
    type=SEED,
    default=0,
    show_default=True,
    help="Seed of the simulated world and of the training.",
)
def demo(out: Path, epochs: int, seed: int) -> None:
    """Run the whole pipeline on a simulated world, and score it against the truth.

    Covers three mines and three years; each mine is listed in the style of another provider. A small
    U-Net learns from two mines and maps the third. Writes cubes, exports, pictures and summary.json, and
    prints the scores. Takes three to five minutes and 1.7 GB on two cores.

    \b
    Example:
      minecube demo --out build/demo
    """
    if out.exists() and any(out.iterdir()):
        raise CatalogError(
            f"{out}: is not empty; the demo starts afresh, so remove it or choose another --out"
        )
    start = time.monotonic()
    world, store = out / "world", cube.Store(out / "cubes.zarr")
    sites = [s for s in load_sites() if s.id.startswith("demo_")]
    with _stage("simulate the archive"):
        make_world(sites, world, World(years=YEARS, one_style_per_site=True, seed=seed))
    with _stage("build the cubes"):
        listed_by = _build(sites, world, store, out / "scenes")
    with _stage("compare them and a naive median with the truth"):
        summary = _against_truth(sites, world, store, out, listed_by)
    with _stage("label"):
        outlines = labels.read_polygons(world / "truth_footprints.parquet")
        for site in sites:
            own, grid = outlines[outlines["site"] == site.id], grid_of(site)
            footprint, fraction = (
                labels.rasterize(own, grid, YEARS),
                labels.covered(own, grid, YEARS),
            )
            cube.write_footprint(store, site.id, footprint, "simulated truth", fraction)
    learnt = [s.id for s in sites if s.split == "train"]
    unseen = next(s.id for s in sites if s.split == "test")
    with _stage(f"train on {', '.join(learnt)}"):
        cubes = {name: cube.open_committed(store, name).load() for name in learnt}
        settings = dataclasses.replace(load_presets()["demo"], epochs=epochs)
        trained = training.fit(
            load_models()[MODEL], training.Cubes(cubes), None, settings, training.Run(seed=seed)
        ).trained
        models.save(trained, out / "model.pt")
        del cubes
    with _stage("map all three"):
        mapper = models.Mapper(trained)
        for site in sites:
            map_site(store, site.id, mapper)
    with _stage(f"score {unseen}, which the network has not seen"):
        summary |= _scores(store, unseen, world, mapper.name)
    with _stage("export"):
        export_sites(store, [s.id for s in sites], out / "export", mapper.name)
    summary["seconds"] = round(time.monotonic() - start, 1)
    summary["peak_rss_mb"] = round(
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        / (1e6 if sys.platform == "darwin" else 1e3)
    )
    write(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    click.echo(_shown(summary))
    for file in (
        f"export/{unseen}/{unseen}_strip.png",
        "comparison.png",
        "export/areas.png",
        "export/collection.json",
    ):
        click.echo(f"see {out}/{file}")


@contextmanager
def _stage(what: str) -> Iterator[None]:
    start = time.monotonic()
    click.echo(f"{what} ...", err=True)
    yield
    click.echo(f"{'':4}{time.monotonic() - start:.0f} s", err=True)


def _build(sites: list[Site], world: Path, store: cube.Store, lists: Path) -> dict[str, str]:
    """Build every site from the source listing it. Returns the source's id by site."""
    known = load_sources(world / "sources.yaml")
    listed_by: dict[str, str] = {}
    for source in known.values():
        own = [s for s in sites if _lists(source.href, s)]
        job = building.Job(
            store=store, sources=(source,), recipe=load_recipes()[RECIPE], snapshots=lists
        )
        for outcome in building.build(job, own, YEARS):
            if outcome.state == "failed":
                raise MinecubeError(f"{outcome.site} {outcome.year}: {outcome.message}")
        listed_by |= {s.id: source.id for s in own}
    return listed_by


def _lists(href: str, site: Site) -> bool:
    return bool(gpd.read_parquet(href, columns=["geometry"]).intersects(site.geometry).any())


def _against_truth(
    sites: list[Site], world: Path, store: cube.Store, out: Path, listed_by: dict[str, str]
) -> dict[str, float]:
    """Compare all composites with the clean reflectance, and draw one of them."""
    squares = {"ours": 0.0, "naive": 0.0, "mine": 0.0}
    pixels = cloudy = cloudy_naive = holes = mine_pixels = 0
    for site in sites:
        truth = xr.open_zarr(world / "truth.zarr", group=site.id, consolidated=False)
        made = cube.open_committed(store, site.id)
        for year in YEARS:
            clean = truth["reflectance"].sel(year=year).values.astype(np.float32)
            ours = made["reflectance"].sel(year=year).values
            listed = snapshot.load(
                out / "scenes" / f"{site.id}_{year}_{listed_by[site.id]}.parquet"
            ).scenes
            everything = load_recipes()["naive-median"]
            naive = composite(scenes.select(listed, everything), grid_of(site), everything)[
                "reflectance"
            ].compute()
            mine = truth["footprint"].sel(year=year).values == 1
            off, off_naive = ours - clean, naive.values - clean
            squares["ours"] += float((off**2).sum())
            squares["naive"] += float((off_naive**2).sum())
            squares["mine"] += float((off[:, mine] ** 2).sum())
            pixels += mine.size
            mine_pixels += int(mine.sum())
            cloudy += int((off[0] > CLOUDY).sum())
            cloudy_naive += int((off_naive[0] > CLOUDY).sum())
            holes += int(((ours == 0).any(axis=0) & _seen_clear(truth, year)).sum())
            if site.split == "test" and year == YEARS[-1]:
                images = {
                    "median of everything": naive,
                    "minecube": made["reflectance"].sel(year=year).load(),
                }
                images["truth: no cloud, no noise"] = truth["reflectance"].sel(year=year).load()
                report.comparison(images, out / "comparison.png", f"{site.id} {year}")
    bands = len(load_recipes()[RECIPE].bands)

    def rmse(total: float, n: int) -> float:
        return round(float(np.sqrt(total / (n * bands))) / 1e4, 5)

    return {
        "composite_rmse": rmse(squares["ours"], pixels),
        "composite_rmse_naive": rmse(squares["naive"], pixels),
        "composite_rmse_mine": rmse(squares["mine"], mine_pixels),
        "residual_cloud_pct": round(100 * cloudy / pixels, 3),
        "residual_cloud_pct_naive": round(100 * cloudy_naive / pixels, 3),
        "holes_pct": round(100 * holes / pixels, 3),
    }


def _seen_clear(truth: xr.Dataset, year: int) -> npt.NDArray[np.bool_]:
    """Return the pixels with a clear observation in the recipe's months, bool (y, x)."""
    months = load_recipes()[RECIPE].months
    sky = truth["sky"].sel(time=str(year))
    seen: npt.NDArray[np.bool_] = (
        (sky.sel(time=sky.time.dt.month.isin(months)) == 1).any("time").values
    )
    return seen


def _scores(store: cube.Store, unseen: str, world: Path, prediction: str) -> dict[str, float]:
    scores = score_site(store, unseen, prediction)
    finished, by_year = metrics.finish(scores), metrics.by_year(scores)
    summary = {"map_iou": finished["iou"]} | {f"map_iou_{y}": by_year["iou"][y] for y in YEARS}
    summary |= {k: finished[k] for k in SHOWN if k != "iou"}
    grid = cube.open_cube(store, unseen).odc.geobox
    mapped = tracks.areas(
        tracks.threshold(cube.open_probability(store, unseen, prediction)).load(), grid
    )
    truth = tracks.areas(
        xr.open_zarr(world / "truth.zarr", group=unseen, consolidated=False)["footprint"].load(),
        grid,
    )
    off = np.abs(mapped["area_m2"] / truth["area_m2"] - 1)
    return {k: round(float(v), 4) for k, v in summary.items()} | {
        "area_error_pct": round(100 * float(off.mean()), 2)
    }


MEANINGS = {
    "composite_rmse": "composites against clean reflectance, all bands, sites and years",
    "composite_rmse_naive": "the same for the median of everything, unmasked",
    "composite_rmse_mine": "the same as the first, mine pixels only",
    "residual_cloud_pct": "pixels whose blue is brighter than the truth by more than 0.03",
    "residual_cloud_pct_naive": "the same for the median of everything",
    "holes_pct": "pixels empty although a clear observation existed",
    "map_iou": "footprints of the unseen site, all years pooled",
    "ca_tiou": "tube IoU, mean of constant and of changing ground",
    "change_f1": "changed pixels over all pairs of years",
    "area_error_pct": "mapped area against the true one, mean over years",
    "seconds": "all of it",
    "peak_rss_mb": "memory at its highest",
}


def _shown(summary: dict[str, float]) -> str:
    return table(
        ("measure", "value", "what it is"), [(k, summary[k], MEANINGS.get(k, "")) for k in summary]
    )
