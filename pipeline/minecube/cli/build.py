"""From scenes to committed site-years: the composition that `minecube build`, the demo and the cluster workflow run."""

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
from minecube.cli.common import absolute, as_ended, failure_text
from minecube.cli.copies import Copies
from minecube.composite import Tools, composite, plan, registration
from minecube.errors import CatalogError, GoneError, LostReadError, MinecubeError, SceneError
from minecube.grid import grid_of
from minecube.reader import Ledger, check_credentials, interrupted
from minecube.scenes import offsets, snapshot, veils
from minecube.scenes.looks import look_at

log = logging.getLogger(__name__)

_REMEMBERED = 4  # scene lists: a year's, its neighbours', and the next one's


@dataclass(frozen=True, kw_only=True)
class Job:
    """One build: what is made of what, and where to."""

    store: str
    sources: tuple[Source, ...]
    """In order of preference: each acquisition is read from the first that lists it."""
    recipe: Recipe
    snapshots: Path
    """Folder of scene lists; one that is there is used, so that a build can be repeated with the API gone."""
    on_offset_conflict: str = "drop"
    """One of `offsets.POLICIES`."""
    min_read_completeness: float = 1.0
    """Share of a site-year's planned reads below which it is not committed; below 1, lost pixels count as not observed."""
    overwrite: bool = False
    at_once: int = 1
    """Site-years that share this machine."""
    tools: Tools = field(default_factory=Tools)
    """What blocks are worked with."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one site-year."""

    site: str
    year: int
    state: str
    """built; kept (that build is committed already); failed; or stale (it failed, and an older build stays committed)."""
    scenes: int = 0
    """Scenes whose pixels are used."""
    days: int = 0
    """Days of these scenes."""
    conflicts: int = 0
    """Scenes whose offset contradicts their pixels."""
    planned: plan.Estimate | None = None
    reads: Mapping[str, float] = field(default_factory=dict)
    """What came of them, as `Ledger.totals` has it; empty where nothing was read."""
    looks: Mapping[str, float] = field(default_factory=dict)
    """The same of the reads that checked offsets and places."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Id of a scene whose files are gone -> which of them, and whose copy was read."""
    seconds: float = 0.0
    message: str = ""


def known_scenes(site: Site, year: int, sources: Sequence[Source], folder: Path) -> scenes.Found:
    """The site-year's scenes: from its saved list, else searched."""
    path = list_path(site, year, sources, folder)
    if not path.exists():
        return scenes.search(site, year, *sources)
    found = snapshot.load(path)
    scenes.belonging(found.scenes, site, year, sources)
    snapshot.need_belonging(path, snapshot.belongs_to(site, year, sources))
    return found


def saved_scenes(site: Site, year: int, sources: Sequence[Source], folder: Path, *, anew: bool = False) -> scenes.Found:
    """The same, saved before a pixel is read, so that a later run builds from the same list; `anew` searches in any case."""
    path = list_path(site, year, sources, folder)
    if path.exists() and not anew:
        return known_scenes(site, year, sources, folder)
    found = scenes.search(site, year, *sources)
    snapshot.save(found, path, snapshot.belongs_to(site, year, sources))
    return found


def remembered(find: Callable[..., scenes.Found]) -> Callable[..., scenes.Found]:
    """`known_scenes` or `saved_scenes`, which remembers the last lists: a year, and its neighbours, are asked for thrice."""
    kept: dict[tuple[str, int], scenes.Found] = {}

    def remembering(site: Site, year: int, sources: Sequence[Source], folder: Path) -> scenes.Found:
        key = (site.id, year)
        if key not in kept:
            if len(kept) >= _REMEMBERED:
                del kept[next(iter(kept))]
            kept[key] = find(site, year, sources, folder)
        return kept[key]

    return remembering


def chosen_scenes(job: Job, site: Site, year: int, find: Callable[..., scenes.Found]) -> tuple[scenes.Found, list[pystac.Item]]:
    """The year's scenes as `find` (`known_scenes`, `saved_scenes`) has them, and those that the recipe uses.

    The latter with the neighbouring years' where the recipe falls back on them; a neighbour without scenes has none to give.

    Raises:
        SceneError: the year has no scenes, or too few for the recipe; or a search was not answered.
    """
    found = find(site, year, job.sources, job.snapshots)
    chosen = scenes.select(found.scenes, job.recipe)
    if "neighbour-year" in job.recipe.fallback:
        for other in (year - 1, year + 1):
            if not scenes.has_images(other):
                continue
            try:
                chosen += scenes.usable(find(site, other, job.sources, job.snapshots).scenes, job.recipe)
            except scenes.NothingFoundError as error:  # one that is not answered fails the year
                log.info("%s %s: nothing to take from %s: %s", site.id, year, other, error)
    return found, chosen


def list_path(site: Site, year: int, sources: Sequence[Source], folder: Path) -> Path:
    """Where the site-year's scene list is."""
    return folder / f"{site.id}_{year}_{'+'.join(s.id for s in sources)}.parquet"


def build_year(job: Job, site: Site, year: int, workers: int = 1, stopped: Callable[[], bool] = lambda: False) -> Outcome:
    """One site-year, committed or with the reason why not; the unit of work on every machine. Never raises MinecubeError."""
    start = time.monotonic()
    try:
        return _built(job, site, year, workers, stopped)
    except LostReadError as error:
        hint = "; name one more --source that has it, or accept lost reads with --min-read-completeness"
        return _failed(job.store, site, year, LostReadError(f"{error}{hint}"), time.monotonic() - start)
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
    done = Outcome(site=site.id, year=year, state="kept", scenes=len(chosen), days=len(scenes.dates(chosen)))
    if cube.is_committed(job.store, provenance, overwrite=job.overwrite, completeness=job.min_read_completeness):
        marker = cube.builds(job.store, site.id)[year]
        ids = {scene.get("copy_of", scene["id"]) for scene in cube.used_scenes(marker)}
        used = [scene for scene in chosen if scene.id in ids]
        share = cube.completeness_of(marker)
        gaps = f"has {share:.2%} of its reads; use --overwrite to build it again" if share < job.min_read_completeness else ""
        return replace(done, scenes=len(used), days=len(scenes.dates(used)), message=gaps, seconds=time.monotonic() - start)
    copies = Copies(job.sources, job.recipe.bands, lambda year, source: saved_scenes(site, year, [source], job.snapshots))
    if copies.possible and cube.is_begun(job.store, site.id, year):
        copies.take(chosen)  # as the run that was interrupted did, so that this one goes on
    while True:
        made = json.loads(json.dumps(provenance))  # each try notes its own
        cube.note_copies(made, copies.found, copies.why)
        try:
            outcome = _composited(job, site, year, copies.in_place(chosen), made, workers, stopped, copied=copies.possible)
        except GoneError as error:
            if not copies.possible or not (copies.take(chosen, error) or job.min_read_completeness < 1):
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
    """Check, read and write a site-year; `copied`: a file that is gone ends it, since another source may have a copy."""
    start = time.monotonic()
    grid = grid_of(site)
    lossy = job.min_read_completeness < 1
    looks = Ledger(lossy=lossy, copied=copied)
    look = look_at(chosen, grid, looks, job.recipe.bands)
    checks = offsets.check_offsets(chosen, look)
    used = offsets.resolve(chosen, checks, job.on_offset_conflict)
    left_out = dict.fromkeys(_lacking(chosen, used), "offset")
    provenance |= {"offset_conflicts": offsets.as_rows(checks), "offset_untold": [c.scene for c in checks if c.step is None]}
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
    # On threads, also inside a task of a cluster, which must not wait for tasks of its own.
    new = cube.write_year(
        job.store,
        composite(used, grid, job.recipe, ledger, year=year, tools=job.tools),
        provenance,
        snapshot.to_bytes(used),
        reads=ledger,
        before=before,
        completeness=job.min_read_completeness,
        overwrite=job.overwrite,
        scheduler="threads",
        workers=workers,
        stopped=stopped,
        finished=lambda: {} if before else {"took": plan.took(planned, (time.monotonic() - start) / job.at_once)},
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
    """Ids of the scenes that are gone."""
    kept = {scene.id for scene in after}
    return [scene.id for scene in before if scene.id not in kept]


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
        MinecubeError: a year without Sentinel-2, a source without a band of the recipe or without its keys, a site without
            polygon, or one whose group in the store was made by another recipe or on another grid, or no site-year that
            can be begun, for other reasons than empty searches; before a pixel is read or anything written to the store.
    """
    scenes.check_years(years)
    for source in job.sources:
        lacking = [b for b in job.recipe.bands if b not in source.bands()]
        if lacking:
            raise CatalogError(f"source {source.id!r} has no {', '.join(lacking)}, which recipe {job.recipe.id!r} needs")
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
    """Site-years that have their scenes, saved, and what became of the others; raises SceneError as `build` says."""
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
        raise unusable[0]  # no site-year has failed: the source, or the list, is not what it was taken for
    return todo, outcomes


def _run(job: Job, todo: Sequence[tuple[Site, int]], executor: Executor | None) -> Iterator[Outcome]:
    """Outcomes as they come. Interrupted, blocks in hand are finished, and no other is begun."""
    interrupted.clear()  # here, not at the end: reads that a stopped build left in the queue are to give up, too
    cores, stop = os.cpu_count() or 1, threading.Event()
    at_once = max(min(cores, len(todo)), 1)
    job = replace(job, at_once=1 if executor else at_once)
    pool = executor or ThreadPoolExecutor(max_workers=at_once)
    if executor:  # whose workers may be in other folders
        job = replace(job, store=absolute(job.store), snapshots=job.snapshots.absolute())
    # A site-year's blocks share the cores that the others leave, so that memory grows with the cores, not with their square.
    local = () if executor else (max(cores // at_once, 1), stop.is_set)
    tasks: dict[Future[Outcome], tuple[Site, int]] = {}
    try:
        for site, year in todo:
            tasks[pool.submit(build_year, job, site, year, *local)] = (site, year)
        for task in as_ended(tasks):
            error = task.exception()
            # A worker that died, or anything else that is no MinecubeError, fails its own site-year and is reported.
            yield _failed(job.store, *tasks[task], error, 0.0) if error else task.result()
    except BaseException:
        interrupted.set()  # no request in trouble is waited for
        raise
    finally:
        stop.set()
        for task in tasks:
            task.cancel()
        if executor is None:
            pool.shutdown(wait=True, cancel_futures=True)


def _failed(store: str, site: Site, year: int, error: BaseException, seconds: float) -> Outcome:
    """The outcome of a site-year that was not built: `stale` if the store keeps an older build of it."""
    try:
        kept = year in cube.builds(store, site.id)
    except MinecubeError:  # a damaged group: the error says so, or `verify` does
        kept = False
    return Outcome(site=site.id, year=year, state="stale" if kept else "failed", message=failure_text(error), seconds=seconds)
