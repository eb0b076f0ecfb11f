"""Run and measure the whole pipeline on a simulated world with known truth.

Three mines and three years. Each mine is listed in the style of another provider. A small U-Net
learns from two mines and maps the third.
"""

from __future__ import annotations

import dataclasses
import resource
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import xarray as xr

from minecube import cube, labels, metrics, models, report, scenes, tracks, train
from minecube.catalog import (
    Recipe,
    Site,
    load_models,
    load_presets,
    load_recipes,
    load_sites,
    load_sources,
)
from minecube.codes import MINE
from minecube.composite import composite
from minecube.errors import CatalogError
from minecube.grid import grid_of
from minecube.jobs.build import BuildJob, build_cubes, need_built
from minecube.jobs.export import ExportOptions, export_sites
from minecube.jobs.label import draw_labels
from minecube.jobs.predict import map_site
from minecube.jobs.score import score_site
from minecube.jobs.score_tables import NOUN, SHOWN
from minecube.jobs.tables import write_json
from minecube.scenes import snapshot
from minecube.simulate import World, simulate_archive

YEARS = (2015, 2020, 2022)
"""A year with one satellite and few dates, one in two baselines, one with the offset of 04.00."""
CLOUDY = 300
"""Residual cloud: blue is brighter than the truth by more than this (reflectance x 10000)."""
TEST_SITE = "demo_3"
"""Site that the network has not seen. Its split in the catalogue is `test`."""
MODEL = "unet-small"
RECIPE = "annual-median"
NAIVE_RECIPE = "naive-median"

Stage = Callable[[str], AbstractContextManager[None]]
"""Called with the title of each stage; the stage runs within the returned context."""


@dataclass(frozen=True)
class Demo:
    """Places and sites of one run."""

    folder: Path
    sites: tuple[Site, ...]
    seed: int = 0

    @property
    def world(self) -> Path:
        """Folder of the simulated archive and its truth."""
        return self.folder / "world"

    @property
    def lists(self) -> Path:
        """Folder of scene lists."""
        return self.folder / "scenes"

    @property
    def store(self) -> cube.Store:
        """The cubes."""
        return cube.Store(self.folder / "cubes.zarr")

    @property
    def train_sites(self) -> list[str]:
        """Sites that the network learns from."""
        return [site.id for site in self.sites if site.split == "train"]

    def open_truth(self, site: str) -> xr.Dataset:
        """Open clean reflectance, footprints and sky of a site, lazily."""
        path = self.world / "truth.zarr"
        truth: xr.Dataset = xr.open_zarr(path, group=site, consolidated=False)
        return truth


def run_demo(
    folder: Path, epochs: int, seed: int = 0, stage: Stage = lambda _: nullcontext()
) -> dict[str, float]:
    """Run the whole pipeline on a simulated world, and score it against the truth.

    Takes three to five minutes and 1.7 GB on two cores.

    The folder gets cubes, exports, pictures and summary.json. `stage` wraps each stage, for
    instance to print its title and duration.

    Returns the content of summary.json: name of a measure -> value.

    Raises:
        CatalogError: the folder is not empty.
        MinecubeError: a site-year could not be built.
    """
    if folder.exists() and any(folder.iterdir()):
        raise CatalogError(
            f"{folder}: is not empty; the demo starts afresh, so remove it or choose another --out"
        )
    start = time.monotonic()
    sites = tuple(site for site in load_sites() if site.id.startswith("demo_"))
    demo = Demo(folder, sites, seed)
    with stage("simulate the archive"):
        simulate_archive(sites, demo.world, World(years=YEARS, one_style_per_site=True, seed=seed))
    with stage("build the cubes"):
        sources = _build_cubes(demo)
    with stage("compare them and a naive median with the truth"):
        summary = _measure_composites(demo, sources)
    with stage("label"):
        _label_cubes(demo)
    with stage(f"train on {', '.join(demo.train_sites)}"):
        trained = _train_network(demo, epochs)
    with stage("map all three"):
        mapper = models.Mapper(trained)
        for site in sites:
            map_site(demo.store, site.id, mapper)
    with stage(f"score {TEST_SITE}, which the network has not seen"):
        summary |= _measure_maps(demo, mapper.name)
    with stage("export"):
        options = ExportOptions(model=mapper.name)
        export_sites(demo.store, [site.id for site in sites], folder / "export", options)
    summary["seconds"] = round(time.monotonic() - start, 1)
    summary["peak_rss_mb"] = _peak_memory_mb()
    write_json(folder / "summary.json", summary, NOUN)
    return summary


def _build_cubes(demo: Demo) -> dict[str, str]:
    """Build every site from the source listing it. Returns the source's id by site."""
    sources: dict[str, str] = {}
    for source in load_sources(demo.world / "sources.yaml").values():
        items = gpd.read_parquet(source.href, columns=["geometry"])
        sites = [site for site in demo.sites if items.intersects(site.geometry).any()]
        job = BuildJob(
            store=demo.store,
            sources=(source,),
            recipe=load_recipes()[RECIPE],
            snapshots=demo.lists,
        )
        need_built(build_cubes(job, sites, YEARS))
        sources |= {site.id: source.id for site in sites}
    return sources


def _label_cubes(demo: Demo) -> None:
    file = demo.world / "truth_footprints.parquet"
    outlines = labels.read_polygons(file)
    for site in demo.sites:
        drawing = draw_labels(outlines, site.id, grid_of(site), YEARS, file, "simulated truth")
        drawing.write(demo.store)


def _train_network(demo: Demo, epochs: int) -> models.TrainedModel:
    """Train on the cubes in memory, and write model.pt."""
    cubes = {site: cube.open_committed(demo.store, site).load() for site in demo.train_sites}
    settings = dataclasses.replace(load_presets()["demo"], epochs=epochs)
    run = train.TrainingOptions(seed=demo.seed)
    fitted = train.fit(load_models()[MODEL], train.Cubes(cubes), None, settings, run)
    models.save(fitted.trained, demo.folder / "model.pt")
    return fitted.trained


@dataclass
class _Deviations:
    """Deviations of composites from the clean reflectance, summed over sites and years."""

    bands: int
    squares: float = 0.0
    """Squared deviations of all bands, (reflectance x 10000) squared."""
    naive_squares: float = 0.0
    """The same of the naive median."""
    mine_squares: float = 0.0
    """The same as `squares`, mine pixels only."""
    pixels: int = 0
    mine_pixels: int = 0
    cloudy: int = 0
    """Pixels whose blue is too bright."""
    naive_cloudy: int = 0
    holes: int = 0
    """Pixels empty although a clear observation existed."""

    def add(
        self, truth: xr.Dataset, composite: xr.DataArray, naive: xr.DataArray, year: int
    ) -> None:
        """Add one site-year: two composites [band, y, x] and the truth of all years."""
        annual = truth.sel(year=year)
        clean = annual["reflectance"].values.astype(np.float32)
        mine = annual["footprint"].values == MINE
        values = composite.values
        deviation = values - clean
        naive_deviation = naive.values - clean
        self.squares += float((deviation**2).sum())
        self.naive_squares += float((naive_deviation**2).sum())
        self.mine_squares += float((deviation[:, mine] ** 2).sum())
        self.pixels += mine.size
        self.mine_pixels += int(mine.sum())
        self.cloudy += int((deviation[0] > CLOUDY).sum())
        self.naive_cloudy += int((naive_deviation[0] > CLOUDY).sum())
        empty = (values == 0).any(axis=0)
        self.holes += int((empty & _has_clear_observation(truth, year)).sum())

    def summary(self) -> dict[str, float]:
        """Return errors as reflectance, and pixels in percent."""
        return {
            "composite_rmse": self._rmse(self.squares, self.pixels),
            "composite_rmse_naive": self._rmse(self.naive_squares, self.pixels),
            "composite_rmse_mine": self._rmse(self.mine_squares, self.mine_pixels),
            "residual_cloud_pct": round(100 * self.cloudy / self.pixels, 3),
            "residual_cloud_pct_naive": round(100 * self.naive_cloudy / self.pixels, 3),
            "holes_pct": round(100 * self.holes / self.pixels, 3),
        }

    def _rmse(self, squares: float, pixels: int) -> float:
        return round(float(np.sqrt(squares / (pixels * self.bands))) / 1e4, 5)


def _measure_composites(demo: Demo, sources: dict[str, str]) -> dict[str, float]:
    """Compare all composites with the clean reflectance, and draw one of them."""
    recipes = load_recipes()
    deviations = _Deviations(bands=len(recipes[RECIPE].bands))
    for site in demo.sites:
        truth = demo.open_truth(site.id)
        built = cube.open_committed(demo.store, site.id)["reflectance"]
        for year in YEARS:
            naive = _composite_naively(demo, site, year, sources[site.id], recipes[NAIVE_RECIPE])
            deviations.add(truth, built.sel(year=year), naive, year)
            if site.id == TEST_SITE and year == YEARS[-1]:
                images = {
                    "median of everything": naive,
                    "minecube": built.sel(year=year).load(),
                    "truth: no cloud, no noise": truth["reflectance"].sel(year=year).load(),
                }
                picture = demo.folder / "comparison.png"
                report.draw_comparison(images, picture, f"{site.id} {year}")
    return deviations.summary()


def _composite_naively(
    demo: Demo, site: Site, year: int, source: str, recipe: Recipe
) -> xr.DataArray:
    """Composite all scenes of a site-year without masks, uint16 [band, y, x] in memory."""
    listed = snapshot.load(demo.lists / f"{site.id}_{year}_{source}.parquet").scenes
    everything = scenes.select(listed, recipe)
    naive: xr.DataArray = composite(everything, grid_of(site), recipe)["reflectance"].compute()
    return naive


def _has_clear_observation(truth: xr.Dataset, year: int) -> npt.NDArray[np.bool_]:
    """Return the pixels with a clear observation in the recipe's months, bool (y, x)."""
    months = load_recipes()[RECIPE].months
    sky = truth["sky"].sel(time=str(year))
    in_season = sky.sel(time=sky.time.dt.month.isin(months))
    clear: npt.NDArray[np.bool_] = (in_season == 1).any("time").values
    return clear


def _measure_maps(demo: Demo, prediction: str) -> dict[str, float]:
    """Score the maps of the unseen site, and compare mapped with true areas."""
    site = TEST_SITE
    scores = score_site(demo.store, site, prediction)
    finished = metrics.finish(scores)
    by_year = metrics.tabulate_years(scores)
    summary = {"map_iou": finished["iou"]}
    summary |= {f"map_iou_{year}": by_year["iou"][year] for year in YEARS}
    summary |= {name: finished[name] for name in SHOWN if name != "iou"}
    grid = cube.open_cube(demo.store, site).odc.geobox
    maps = tracks.threshold(cube.open_probability(demo.store, site, prediction)).load()
    mapped = tracks.compute_areas(maps, grid)
    true = tracks.compute_areas(demo.open_truth(site)["footprint"].load(), grid)
    errors = np.abs(mapped["area_m2"] / true["area_m2"] - 1)
    rounded = {name: round(float(value), 4) for name, value in summary.items()}
    return rounded | {"area_error_pct": round(100 * float(errors.mean()), 2)}


def _peak_memory_mb() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":
        return round(peak / 1e6)  # bytes there, kilobytes elsewhere
    return round(peak / 1e3)
