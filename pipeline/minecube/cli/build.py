"""From scenes to committed site-years: the composition that `minecube build`, the demo and the cluster workflow run."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import pystac

from minecube import cube, scenes
from minecube.catalog import Recipe, Site, Source
from minecube.composite import composite
from minecube.errors import CatalogError, MinecubeError, SceneError
from minecube.grid import grid_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One build: what is made of what, and where to."""

    store: str
    source: Source
    recipe: Recipe
    snapshots: Path
    """Folder of scene lists; one that is there is used, so that a build can be repeated with the API gone."""
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one site-year."""

    site: str
    year: int
    state: str
    """built, kept (that build was there already) or failed."""
    scenes: int = 0
    days: int = 0
    seconds: float = 0.0
    message: str = ""


def known_scenes(site: Site, year: int, source: Source, folder: Path) -> list[pystac.Item]:
    """The site-year's scenes: from its saved list, else searched."""
    path = _list_path(site, year, source, folder)
    return scenes.belonging(scenes.load(path), site, year, source) if path.exists() else scenes.search(site, year, source)


def snapshot(site: Site, year: int, source: Source, folder: Path, *, anew: bool = False) -> list[pystac.Item]:
    """The same, saved before a pixel is read, so that a later run builds from the same list; `anew` searches in any case."""
    path = _list_path(site, year, source, folder)
    if path.exists() and not anew:
        return known_scenes(site, year, source, folder)
    found = scenes.search(site, year, source)
    scenes.save(found, path)
    return found


def _list_path(site: Site, year: int, source: Source, folder: Path) -> Path:
    return folder / f"{site.id}_{year}_{source.id}.parquet"


def build_year(job: Job, site: Site, year: int, workers: int = 1, stopped: Callable[[], bool] = lambda: False) -> Outcome:
    """One site-year, committed or with the reason why not; the unit of work on every machine. Never raises MinecubeError."""
    start = time.monotonic()
    try:
        grid = grid_of(site)
        chosen = scenes.select(snapshot(site, year, job.source, job.snapshots), job.recipe)
        provenance = cube.provenance_of(site, year, grid, job.recipe, chosen)
        with tempfile.TemporaryDirectory() as folder:
            scenes.save(chosen, Path(folder) / "scenes.parquet")
            listed = (Path(folder) / "scenes.parquet").read_bytes()
        lazy = composite(chosen, grid, job.recipe)
        # On threads, also inside a task of a cluster, which must not wait for tasks of its own.
        new = cube.write_year(
            job.store,
            lazy,
            provenance,
            listed,
            overwrite=job.overwrite,
            scheduler="threads",
            workers=workers,
            stopped=stopped,
        )
    except MinecubeError as error:
        return _failed(site, year, error, time.monotonic() - start)
    days = len({s.properties["minecube:solar_day"] for s in chosen})
    state = "built" if new else "kept"
    return Outcome(site=site.id, year=year, state=state, scenes=len(chosen), days=days, seconds=time.monotonic() - start)


def build(
    job: Job,
    sites: Sequence[Site],
    years: Sequence[int],
    executor: Executor | None = None,
    done: Callable[[Outcome], None] = lambda _: None,
) -> list[Outcome]:
    """All site-years, each in a task of its own on the executor (threads of this machine by default).

    Everything is searched first, so that a site of which nothing can be built leaves nothing in the store.

    Raises:
        MinecubeError: a year without Sentinel-2, a source without a band of the recipe, a site without polygon, or one whose
            group in the store was made by another recipe or on another grid; before anything is read or written.
    """
    scenes.check_years(years)
    lacking = [b for b in job.recipe.bands if b not in job.source.assets]
    if lacking:
        raise CatalogError(f"source {job.source.id!r} has no {', '.join(lacking)}, which recipe {job.recipe.id!r} needs")
    for site in sites:
        cube.check(job.store, site, grid_of(site), years, job.recipe)
    outcomes, todo = [], []
    for site in sites:
        for year in years:
            try:
                scenes.select(snapshot(site, year, job.source, job.snapshots), job.recipe)
            except SceneError as error:
                outcomes.append(_failed(site, year, error, 0.0))
                done(outcomes[-1])
            else:
                todo.append((site, year))
    for site in {s.id: s for s, _ in todo}.values():
        cube.create(job.store, site, grid_of(site), years, job.recipe)
    for outcome in _run(job, todo, executor):
        outcomes.append(outcome)
        done(outcome)
    return sorted(outcomes, key=lambda o: (o.site, o.year))


def _run(job: Job, todo: Sequence[tuple[Site, int]], executor: Executor | None) -> Iterator[Outcome]:
    """Outcomes as they come. Interrupted, blocks in hand are finished, and no other is begun."""
    cores, stop = os.cpu_count() or 1, threading.Event()
    at_once = max(min(cores, len(todo)), 1)
    pool = executor or ThreadPoolExecutor(max_workers=at_once)
    # A site-year's blocks share the cores that the others leave, so that memory grows with the cores, not with their square.
    local = () if executor else (max(cores // at_once, 1), stop.is_set)
    tasks = {pool.submit(build_year, job, site, year, *local): (site, year) for site, year in todo}
    try:
        for task in as_completed(tasks):
            error = task.exception()
            # A worker that died, or anything else that is no MinecubeError, fails its own site-year and is reported.
            yield _failed(*tasks[task], error, 0.0) if error else task.result()
    finally:
        stop.set()
        for task in tasks:
            task.cancel()
        if executor is None:
            pool.shutdown(wait=True, cancel_futures=True)


def _failed(site: Site, year: int, error: BaseException, seconds: float) -> Outcome:
    said = str(error) if isinstance(error, MinecubeError) else f"{type(error).__name__}: {error}"
    return Outcome(site=site.id, year=year, state="failed", message=said, seconds=seconds)
