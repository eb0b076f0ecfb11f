"""Build site-years from scenes, for `minecube build`, the demo and the cluster workflow."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pystac

from minecube import cube, scenes
from minecube.catalog import Recipe, Site, Source
from minecube.cli.common import as_ended, failure_text
from minecube.cli.copies import Copies
from minecube.composite import Tools, composite, plan, registration
from minecube.errors import CatalogError, GoneError, LostReadError, MinecubeError, SceneError
from minecube.grid import grid_of
from minecube.reader import Ledger, check_credentials, interrupted
from minecube.scenes import offsets, snapshot, veils
from minecube.scenes.looks import look_at

log = logging.getLogger(__name__)

_REMEMBERED = 4  # scene lists: a year, its two neighbours, and the next year


@dataclass(frozen=True, kw_only=True)
class Job:
    """Settings of a build: input, method and store."""

    store: cube.Store
    sources: tuple[Source, ...]
    """In order of preference. Each acquisition is read from the first source listing it."""
    recipe: Recipe
    snapshots: Path
    """Folder of scene lists. Existing lists are reused, to repeat a build without the API."""
    on_offset_conflict: str = "drop"
    """One of `offsets.POLICIES`."""
    min_read_completeness: float = 1.0
    """Least share of successful reads for a commit. Below 1, lost pixels count as unobserved."""
    overwrite: bool = False
    at_once: int = 1
    """Number of simultaneous site-years on this machine."""
    tools: Tools = field(default_factory=Tools)
    """Reducers and second mask for the blocks."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of one site-year."""

    site: str
    year: int
    state: str
    """built, kept (already committed), failed, or stale (failed, with an older build committed)."""
    scenes: int = 0
    """Number of scenes used."""
    days: int = 0
    """Number of days of these scenes."""
    conflicts: int = 0
    """Number of scenes with an offset contradicting their pixels."""
    planned: plan.Estimate | None = None
    reads: Mapping[str, float] = field(default_factory=dict)
    """Actual reads, as in `Ledger.totals`; empty without reads."""
    looks: Mapping[str, float] = field(default_factory=dict)
    """The same for the reads to check offsets and registration."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Id of a scene with missing files -> the missing file, and the copy read instead."""
    seconds: float = 0.0
    message: str = ""


def known_scenes(site: Site, year: int, sources: Sequence[Source], folder: Path) -> scenes.Found:
    """Load the site-year's scenes from its saved list. Without a list, search them."""
    path = list_path(site, year, sources, folder)
    if not path.exists():
        return scenes.search(site, year, *sources)
    found = snapshot.load(path)
    scenes.belonging(found.scenes, site, year, sources)
    snapshot.need_belonging(path, snapshot.belongs_to(site, year, sources))
    return found


def saved_scenes(
    site: Site, year: int, sources: Sequence[Source], folder: Path, *, search_again: bool = False
) -> scenes.Found:
    """Find the site-year's scenes as `known_scenes` does, and save their list.

    A later run then builds from the same list. `search_again` ignores an existing list.
    """
    path = list_path(site, year, sources, folder)
    if path.exists() and not search_again:
        return known_scenes(site, year, sources, folder)
    found = scenes.search(site, year, *sources)
    snapshot.save(found, path, snapshot.belongs_to(site, year, sources))
    return found


def remembered(find: Callable[..., scenes.Found]) -> Callable[..., scenes.Found]:
    """Add a cache of the last lists to `known_scenes` or `saved_scenes`.

    A list may be needed three times: for its own year and for both neighbours.
    """
    kept: dict[tuple[str, int], scenes.Found] = {}

    def remembering(site: Site, year: int, sources: Sequence[Source], folder: Path) -> scenes.Found:
        key = (site.id, year)
        if key not in kept:
            if len(kept) >= _REMEMBERED:
                del kept[next(iter(kept))]
            kept[key] = find(site, year, sources, folder)
        return kept[key]

    return remembering


def chosen_scenes(
    job: Job, site: Site, year: int, find: Callable[..., scenes.Found]
) -> tuple[scenes.Found, list[pystac.Item]]:
    """Return the year's scenes, and the scenes for the recipe.

    The second includes the neighbouring years if the recipe falls back on them. A neighbour may
    lack scenes.

    Args:
        job: sources and recipe.
        site: the site.
        year: the year.
        find: `known_scenes` or `saved_scenes`.

    Raises:
        SceneError: the year has no scenes, or too few for the recipe, or a search had no answer.
    """
    found = find(site, year, job.sources, job.snapshots)
    chosen = scenes.select(found.scenes, job.recipe)
    if "neighbour-year" in job.recipe.fallback:
        for other in (year - 1, year + 1):
            if not scenes.has_images(other):
                continue
            try:
                chosen += scenes.usable(
                    find(site, other, job.sources, job.snapshots).scenes, job.recipe
                )
            except scenes.NothingFoundError as error:  # a search without answer fails the year
                log.info("%s %s: nothing to take from %s: %s", site.id, year, other, error)
    return found, chosen


def list_path(site: Site, year: int, sources: Sequence[Source], folder: Path) -> Path:
    """Return the path of the site-year's scene list."""
    return folder / f"{site.id}_{year}_{'+'.join(s.id for s in sources)}.parquet"


def build_year(
    job: Job, site: Site, year: int, workers: int = 1, stopped: Callable[[], bool] = lambda: False
) -> Outcome:
    """Build and commit one site-year, the unit of work on every machine.

    Never raises MinecubeError: a failed outcome contains the reason.
    """
    start = time.monotonic()
    try:
        return _built(job, site, year, workers, stopped)
    except LostReadError as error:
        hint = "; name one more --source that has it, or accept lost reads with --min-read-completeness"
        return _failed(
            job.store, site, year, LostReadError(f"{error}{hint}"), time.monotonic() - start
        )
    except MinecubeError as error:
        return _failed(job.store, site, year, error, time.monotonic() - start)


def _built(job: Job, site: Site, year: int, workers: int, stopped: Callable[[], bool]) -> Outcome:
    start = time.monotonic()
    grid = grid_of(site)
    cube.settle(job.store, site.id, year)
    found, chosen = chosen_scenes(job, site, year, saved_scenes)
    provenance = cube.provenance_of(
        site,
        year,
        grid,
        job.recipe,
        chosen,
        snapshot=snapshot.digest(found.scenes),
        refused=dict(found.refused),
        on_offset_conflict=job.on_offset_conflict,
    )
    done = Outcome(
        site=site.id, year=year, state="kept", scenes=len(chosen), days=len(scenes.dates(chosen))
    )
    if cube.is_committed(
        job.store, provenance, overwrite=job.overwrite, completeness=job.min_read_completeness
    ):
        marker = cube.builds(job.store, site.id)[year]
        ids = {scene.get("copy_of", scene["id"]) for scene in cube.used_scenes(marker)}
        used = [scene for scene in chosen if scene.id in ids]
        share = cube.completeness_of(marker)
        gaps = (
            f"has {share:.2%} of its reads; use --overwrite to build it again"
            if share < job.min_read_completeness
            else ""
        )
        return replace(
            done,
            scenes=len(used),
            days=len(scenes.dates(used)),
            message=gaps,
            seconds=time.monotonic() - start,
        )
    copies = Copies(
        job.sources,
        job.recipe.bands,
        lambda year, source: saved_scenes(site, year, [source], job.snapshots),
    )
    if copies.possible and cube.is_begun(job.store, site.id, year):
        copies.take(chosen)  # as in the interrupted run, to resume it
    while True:
        made = json.loads(json.dumps(provenance))  # each try adds its own notes
        cube.note_copies(made, copies.found, copies.why)
        try:
            outcome = _composited(
                job,
                site,
                year,
                copies.in_place(chosen),
                made,
                workers,
                stopped,
                copied=copies.possible,
            )
        except GoneError as error:
            if not copies.possible or not (
                copies.take(chosen, error) or job.min_read_completeness < 1
            ):
                raise
        else:
            return replace(outcome, copies=copies.said(), seconds=time.monotonic() - start)


def _composited(
    job: Job,
    site: Site,
    year: int,
    chosen: Sequence[pystac.Item],
    provenance: dict[str, Any],
    workers: int,
    stopped: Callable[[], bool],
    *,
    copied: bool,
) -> Outcome:
    """Check, read and write a site-year.

    With `copied`, a missing file raises GoneError, to try a copy.
    """
    start = time.monotonic()
    grid = grid_of(site)
    lossy = job.min_read_completeness < 1
    looks = Ledger(lossy=lossy, copied=copied)
    look = look_at(chosen, grid, looks, job.recipe.bands)
    checks = offsets.check_offsets(chosen, look)
    used = offsets.resolve(chosen, checks, job.on_offset_conflict)
    left_out = dict.fromkeys(_lacking(chosen, used), "offset")
    provenance |= {
        "offset_conflicts": offsets.as_rows(checks),
        "offset_untold": [c.scene for c in checks if c.step is None],
    }
    if job.recipe.haze:
        used = veils.judged(used, look.of(used), job.recipe.haze)
        provenance["scl_errors"] = veils.as_rows(used)
    if job.recipe.registration:
        moved = registration.shifts(used, grid, looks)
        registered = registration.registered(used, moved, job.recipe.registration)
        left_out |= dict.fromkeys(_lacking(used, registered), "registration")
        used = registered
        provenance["shifts"] = registration.as_rows(moved)
    cube.leave_out(provenance, left_out)
    if left_out:
        scenes.need_dates(used, job.recipe, year)
    provenance["check_reads"] = looks.totals()
    planned = plan.estimate(chosen, grid, job.recipe)
    before = cube.reads_so_far(job.store, provenance)
    ledger = Ledger(lossy=lossy, before=before, copied=copied)
    # Use threads even in a cluster task, since a task must not wait for its own subtasks.
    new = cube.write_year(
        job.store,
        composite(used, grid, job.recipe, ledger, year=year, tools=job.tools),
        provenance,
        snapshot.to_bytes(used),
        cube.BuildOptions(
            reads=ledger,
            before=before,
            completeness=job.min_read_completeness,
            overwrite=job.overwrite,
            scheduler="threads",
            workers=workers,
            stopped=stopped,
            finished=lambda: (
                {}
                if before
                else {"took": plan.took(planned, (time.monotonic() - start) / job.at_once)}
            ),
        ),
    )
    return Outcome(
        site=site.id,
        year=year,
        state="built" if new else "kept",
        scenes=len(used),
        days=len(scenes.dates(used)),
        conflicts=sum(c.conflict for c in checks),
        planned=planned,
        reads=ledger.totals(),
        looks=looks.totals(),
    )


def _lacking(before: Sequence[pystac.Item], after: Sequence[pystac.Item]) -> list[str]:
    """Return the ids of the scenes in `before` missing from `after`."""
    kept = {scene.id for scene in after}
    return [scene.id for scene in before if scene.id not in kept]


def build(
    job: Job,
    sites: Sequence[Site],
    years: Sequence[int],
    executor: Executor | None = None,
    done: Callable[[Outcome], None] = lambda _: None,
) -> list[Outcome]:
    """Build all site-years, one task each on the executor (by default threads of this machine).

    All searches come first: a site without any scenes leaves no group in the store.

    Raises:
        MinecubeError: nothing can be built. Causes are a year without Sentinel-2, a source without
            a band or its keys, a site without polygon, and a group with another recipe or grid.
            Another cause: no site-year can start, and not all searches were empty. Raised before
            any pixel is read and before the store is written.
    """
    scenes.check_years(years)
    for source in job.sources:
        lacking = [b for b in job.recipe.bands if b not in source.bands()]
        if lacking:
            raise CatalogError(
                f"source {source.id!r} has no {', '.join(lacking)}, which recipe {job.recipe.id!r} needs"
            )
        check_credentials(source.access, source.id)
    for site in sites:
        cube.check(job.store, site, grid_of(site), years, job.recipe)
    todo, outcomes = _searched(job, sites, years, done)
    for site in {s.id: s for s, _ in todo}.values():
        cube.create(job.store, site, grid_of(site), years, job.recipe)
    for outcome in _run(job, todo, executor):
        outcomes.append(outcome)
        done(outcome)
    return sorted(outcomes, key=lambda o: (o.site, o.year))


def _searched(
    job: Job, sites: Sequence[Site], years: Sequence[int], done: Callable[[Outcome], None]
) -> tuple[list[tuple[Site, int]], list[Outcome]]:
    """Search and save the scenes of all site-years.

    Returns the site-years to build, and outcomes of the others.

    Raises SceneError if no site-year can start, unless all searches were empty.
    """
    outcomes, todo, unusable = [], [], []
    find = remembered(saved_scenes)
    for site in sites:
        for year in years:
            try:
                chosen_scenes(job, site, year, find)
            except SceneError as error:
                outcomes.append(_failed(job.store, site, year, error, 0.0))
                done(outcomes[-1])
                if not isinstance(error, scenes.NothingFoundError) or error.found.refused:
                    unusable.append(error)
            else:
                todo.append((site, year))
    if unusable and not todo:
        raise unusable[0]  # the fault is in the source or the list, not in a site-year
    return todo, outcomes


def _run(
    job: Job, todo: Sequence[tuple[Site, int]], executor: Executor | None
) -> Iterator[Outcome]:
    """Yield outcomes as they come.

    After an interruption, finish the current blocks and begin no others.
    """
    interrupted.clear()  # here, not at the end: queued reads of a stopped build must give up
    cores, stop = os.cpu_count() or 1, threading.Event()
    at_once = max(min(cores, len(todo)), 1)
    job = replace(job, at_once=1 if executor else at_once)
    pool = executor or ThreadPoolExecutor(max_workers=at_once)
    if executor:  # workers may run in other folders
        job = replace(job, store=job.store.absolute(), snapshots=job.snapshots.absolute())
    # Divide the cores among site-years: memory grows with the cores, not with their square.
    local = () if executor else (max(cores // at_once, 1), stop.is_set)
    tasks: dict[Future[Outcome], tuple[Site, int]] = {}
    try:
        for site, year in todo:
            tasks[pool.submit(build_year, job, site, year, *local)] = (site, year)
        for task in as_ended(tasks):
            error = task.exception()
            # Other errors, such as a dead worker, fail their own site-year and are reported.
            yield _failed(job.store, *tasks[task], error, 0.0) if error else task.result()
    except BaseException:
        interrupted.set()  # do not wait for requests in trouble
        raise
    finally:
        stop.set()
        for task in tasks:
            task.cancel()
        if executor is None:
            pool.shutdown(wait=True, cancel_futures=True)


def _failed(
    store: cube.Store, site: Site, year: int, error: BaseException, seconds: float
) -> Outcome:
    """Make the outcome of a failed site-year: `stale` if an older build remains, else `failed`."""
    try:
        kept = year in cube.builds(store, site.id)
    except MinecubeError:  # a damaged group, reported by the error or by `verify`
        kept = False
    return Outcome(
        site=site.id,
        year=year,
        state="stale" if kept else "failed",
        message=failure_text(error),
        seconds=seconds,
    )
