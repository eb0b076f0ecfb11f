"""Build site-years from scenes: the job of `minecube build`."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import pystac
from odc.geo.geobox import GeoBox

from minecube import cube, scenes
from minecube.catalog import Recipe, Site, Source
from minecube.composite import (
    BLOCK_BYTES,
    GeomedianFunction,
    composite,
    plan,
    reducers,
    registration,
    values,
)
from minecube.errors import (
    CatalogError,
    LostReadError,
    MinecubeError,
    SceneError,
    UnusableFileError,
)
from minecube.grid import grid_of
from minecube.jobs.copies import Copies
from minecube.jobs.failures import classify, describe_failure
from minecube.jobs.scene_lists import (
    FindScenes,
    HashList,
    cache_lists,
    hash_list,
    is_early,
    load_or_save,
    path_of_list,
)
from minecube.jobs.workers import iterate_finished
from minecube.places import Place, time_of_change
from minecube.reader import Ledger, check_credentials, interruption
from minecube.scenes import offsets, snapshot, veils
from minecube.scenes.looks import read_look

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BuildJob:
    """Settings of a build: input, method and store."""

    store: cube.Store
    sources: tuple[Source, ...]
    """In order of preference. Each acquisition is read from the first source listing it."""
    recipe: Recipe
    snapshots: Place
    """Folder of scene lists. Existing lists are reused, to repeat a build without the API."""
    on_offset_conflict: str = "drop"
    """One of `offsets.CONFLICT_POLICIES`."""
    min_read_completeness: float = 1.0
    """Least share of successful reads for a commit. Below 1, lost pixels count as unobserved."""
    overwrite: bool = False
    """Whether to replace builds from other scenes or with lost reads."""
    at_once: int = 1
    """Number of simultaneous site-years on this machine."""
    geomedian: GeomedianFunction = reducers.geomedian
    """The geomedian for recipes that use it."""
    block_fraction: float = 1.0
    """Share of the usual memory of a block. Smaller blocks take longer; pixels are the same."""

    @property
    def lossy(self) -> bool:
        """Whether a site-year may be committed with lost reads."""
        return self.min_read_completeness < 1


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
    value_faults: tuple[values.Fault, ...] = ()
    """Faults in the values of scenes."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Id of a scene with missing files -> the missing file, and the copy read instead."""
    seconds: float = 0.0
    message: str = ""
    """Reason of a failure, or remark on a kept build."""
    error_class: str = ""
    """Class of a failure, as from `failures.classify`."""


@dataclass(frozen=True, kw_only=True)
class _SiteYear:
    """One site-year of a build."""

    job: BuildJob
    site: Site
    year: int
    workers: int = 1
    """Threads that compute blocks."""
    stopped: Callable[[], bool] = lambda: False
    """Whether to begin no further blocks."""

    @property
    def grid(self) -> GeoBox:
        """The site's grid."""
        return grid_of(self.site)


def build_cubes(
    job: BuildJob,
    sites: Sequence[Site],
    years: Sequence[int],
    executor: Executor | None = None,
    progress: Callable[[Outcome], None] = lambda _: None,
    searched: Callable[[str, int], None] = lambda _site, _year: None,
) -> list[Outcome]:
    """Build all site-years, one task each on the executor (by default threads of this machine).

    All searches come first: a site without any scenes leaves no group in the store. Calls
    `searched` after each search with scenes, and `progress` with each outcome.

    Raises:
        MinecubeError: nothing can be built. Causes are a year without Sentinel-2, a source without
            a band or its keys, a site without polygon, and a group with another recipe or grid.
            Another cause: no site-year can start, and not all searches were empty. Raised before
            any pixel is read and before the store is written.
    """
    scenes.check_years(years)
    for source in job.sources:
        missing = [b for b in job.recipe.bands if b not in source.bands()]
        if missing:
            raise CatalogError(
                f"source {source.id!r} has no {', '.join(missing)}, "
                f"which recipe {job.recipe.id!r} needs"
            )
        check_credentials(source.access, source.id)
    for site in sites:
        cube.check_site(job.store, site, grid_of(site), job.recipe)
    tasks, outcomes = _search_all(job, sites, years, progress, searched)
    for site in {s.id: s for s, _ in tasks}.values():
        cube.create_site(job.store, site, grid_of(site), years, job.recipe)
    for outcome in _build_all(job, tasks, executor):
        outcomes.append(outcome)
        progress(outcome)
    return sorted(outcomes, key=lambda o: (o.site, o.year))


def need_built(outcomes: Iterable[Outcome]) -> None:
    """Raise MinecubeError with the reason of the first failed site-year."""
    for outcome in outcomes:
        if outcome.state == "failed":
            raise MinecubeError(f"{outcome.site} {outcome.year}: {outcome.message}")


def choose_scenes(
    job: BuildJob, site: Site, year: int, find: FindScenes
) -> tuple[scenes.SearchResult, list[pystac.Item]]:
    """Return the year's scenes, and the scenes for the recipe.

    The second includes the neighbouring years if the recipe falls back on them. A neighbour may
    lack scenes. `find` is `scene_lists.load_or_search` or `scene_lists.load_or_save`.

    Raises:
        SceneError: the year has no scenes, or too few for the recipe, or a search had no answer.
    """
    listed = find(site, year, job.sources, job.snapshots)
    selected = scenes.select(listed.scenes, job.recipe)
    for neighbour in _list_neighbours(job.recipe, year):
        try:
            nearby = find(site, neighbour, job.sources, job.snapshots)
            selected += scenes.select_usable(nearby.scenes, job.recipe)
        except scenes.NoScenesError as error:  # a search without answer fails the year
            log.info("%s %s: nothing to take from %s: %s", site.id, year, neighbour, error)
    return listed, selected


def _list_neighbours(recipe: Recipe, year: int) -> list[int]:
    """List the neighbouring years that a recipe falls back on."""
    if "neighbour-year" not in recipe.fallback:
        return []
    return [neighbour for neighbour in (year - 1, year + 1) if scenes.has_images(neighbour)]


def hash_listed_inputs(
    job: BuildJob, site: Site, year: int, hash_scenes: HashList = hash_list
) -> str | None:
    """Hash what decides about a site-year's build; None if one of its scene lists is missing."""
    hashes = []
    for listed_year in (year, *_list_neighbours(job.recipe, year)):
        scene_list = hash_scenes(site, listed_year, job.sources, job.snapshots)
        if scene_list is None:
            return None
        hashes.append(scene_list)
    return cube.hash_inputs(site, year, grid_of(site), job.recipe, hashes)


def load_geomedian(device: str) -> GeomedianFunction:
    """Load the geomedian for a device: cpu, or a GPU such as cuda.

    Raises:
        CatalogError: PyTorch is missing. The message names the extra to install.
        ModelError: the device is missing.
    """
    if device == "cpu":
        return reducers.geomedian
    try:
        from minecube.composite.torch_reducers import TorchGeomedian  # an extra, for GPUs only
    except ModuleNotFoundError as error:
        raise CatalogError("--device needs PyTorch: pip install 'minecube[torch]'") from error
    return TorchGeomedian(device)


def build_year(
    job: BuildJob,
    site: Site,
    year: int,
    workers: int = 1,
    stopped: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Build and commit one site-year, the unit of work on every machine.

    Never raises MinecubeError: a failed outcome contains the reason. Uses `workers` threads, and
    begins no further blocks once `stopped` returns True.
    """
    start = time.monotonic()
    site_year = _SiteYear(job=job, site=site, year=year, workers=workers, stopped=stopped)
    try:
        outcome = _build_or_keep(site_year)
    except LostReadError as error:
        advice = (
            f"{error}; name one more --source that has it, "
            "or accept lost reads with --min-read-completeness"
        )
        outcome = replace(_describe_failed(job.store, site, year, error), message=advice)
    except MinecubeError as error:
        outcome = _describe_failed(job.store, site, year, error)
    return replace(outcome, seconds=time.monotonic() - start)


def _build_or_keep(task: _SiteYear) -> Outcome:
    """Build a site-year, unless the same build is committed."""
    job = task.job
    cube.finish_commit(job.store, task.site.id, task.year)
    # Before the scenes are read: a list replaced meanwhile must not count as the list of this build.
    inputs = hash_listed_inputs(job, task.site, task.year)
    listed, candidates = choose_scenes(job, task.site, task.year, load_or_save)
    provenance = cube.describe_build(
        task.site,
        task.year,
        task.grid,
        job.recipe,
        candidates,
        snapshot=snapshot.hash_scenes(listed.scenes),
        refused=dict(listed.refused),
        on_offset_conflict=job.on_offset_conflict,
        inputs=inputs,
    )
    if cube.is_committed(
        job.store, provenance, overwrite=job.overwrite, completeness=job.min_read_completeness
    ):
        marker = cube.read_markers(job.store, task.site.id)[task.year]
        ids = {scene.get("copy_of", scene["id"]) for scene in cube.list_used_scenes(marker)}
        read = [scene for scene in candidates if scene.id in ids]
        return _describe_kept(job, marker, len(scenes.list_solar_days(read)))
    _warn_of_early_list(job, task.site, task.year)
    copies = Copies(
        job.sources,
        job.recipe.bands,
        lambda year, source: load_or_save(task.site, year, [source], job.snapshots),
    )
    if copies.possible and cube.has_unfinished_build(job.store, task.site.id, task.year):
        copies.take(candidates)  # as in the interrupted run, to resume it
    faults: list[values.Fault] = []
    while True:
        notes = json.loads(json.dumps(provenance))  # each try adds its own notes
        cube.note_copies(notes, copies.copies, copies.reasons)
        try:
            outcome = _composite_year(
                task, copies.replace_in(candidates), notes, faults, copied=copies.possible
            )
        except values.UntrustedValuesError as error:
            for fault in error.faults:
                log.warning("%s (%s)", fault, values.describe_action(fault))
            faults = values.merge_faults(faults, error.faults)
        except UnusableFileError as error:
            if not copies.possible or not (copies.take(candidates, error) or job.lossy):
                raise
        else:
            return replace(outcome, copies=copies.describe())


def _warn_of_early_list(job: BuildJob, site: Site, year: int) -> None:
    """Warn if the list of a year was saved before its season was over, as a neighbour's list."""
    place = path_of_list(site, year, job.sources, job.snapshots)
    saved = time_of_change(place)
    if saved is not None and is_early(saved, job.recipe, year):
        log.warning(
            "%s %s: the scene list was saved before the end of the season, so scenes can be "
            "missing; to search again, remove %s",
            site.id,
            year,
            place,
        )


def _composite_year(
    task: _SiteYear,
    candidates: Sequence[pystac.Item],
    notes: dict[str, Any],
    faults: Sequence[values.Fault],
    *,
    copied: bool,
) -> Outcome:
    """Check, read and write a site-year. Results of the checks are added to the provenance `notes`.

    `faults` are those found in values so far. Further ones raise UntrustedValuesError. With
    `copied`, a missing file raises UnusableFileError, to try a copy.
    """
    start = time.monotonic()
    job = task.job
    looks = Ledger(lossy=job.lossy, copied=copied)
    usable, checks = _check_scenes(task, candidates, looks, notes, faults)
    notes["days"] = len(scenes.list_solar_days(usable))
    planned = plan.estimate(candidates, task.grid, job.recipe)
    resumed = cube.read_initial_counts(job.store, notes)
    ledger = Ledger(lossy=job.lossy, before=resumed, copied=copied)

    def note_end() -> dict[str, Any]:
        notes_at_end: dict[str, Any] = {}
        if struck := ledger.list_struck():
            notes_at_end["struck"] = struck
        if not resumed:
            seconds = (time.monotonic() - start) / job.at_once
            notes_at_end["took"] = plan.describe_duration(planned, seconds)
        return notes_at_end

    options = cube.BuildOptions(
        reads=ledger,
        before=resumed,
        completeness=job.min_read_completeness,
        overwrite=job.overwrite,
        scheduler="threads",  # even in a cluster task: a task must not wait for its own subtasks
        workers=task.workers,
        stopped=task.stopped,
        finished=note_end,
    )
    annual = composite(
        usable,
        task.grid,
        job.recipe,
        ledger,
        year=task.year,
        geomedian=job.geomedian,
        block_bytes=_limit_block(planned, job.block_fraction),
        check_values=True,
    )
    is_new = cube.write_year(
        job.store,
        annual,
        notes,
        snapshot.to_bytes(usable),
        options,
    )
    return Outcome(
        site=task.site.id,
        year=task.year,
        state="built" if is_new else "kept",
        scenes=len(usable),
        days=notes["days"],
        conflicts=sum(check.conflict for check in checks),
        planned=planned,
        reads=ledger.totals(),
        looks=looks.totals(),
        value_faults=tuple(faults),
    )


def _limit_block(planned: plan.Estimate, fraction: float) -> int:
    """Return the most memory of a block in bytes: this share of the largest planned block.

    Buffers for reading do not count. They do not depend on the size of a block.
    """
    if fraction == 1:
        return BLOCK_BYTES
    return int(fraction * (planned.block_bytes - plan.BASE_BYTES))


def _check_scenes(
    task: _SiteYear,
    candidates: Sequence[pystac.Item],
    looks: Ledger,
    notes: dict[str, Any],
    faults: Sequence[values.Fault],
) -> tuple[list[pystac.Item], list[offsets.OffsetCheck]]:
    """Check offsets, haze and positions of scenes, and add the results to the provenance.

    `faults` in values were found before. Their scenes are left out, or their edges are.

    Returns the usable scenes, and the checks of all offsets.

    Raises SceneError if too few scenes are usable.
    """
    job = task.job
    look = read_look(candidates, task.grid, looks, job.recipe.bands)
    checks = offsets.check_offsets(candidates, look)
    usable = offsets.resolve_conflicts(candidates, checks, job.on_offset_conflict)
    dropped = dict.fromkeys(_ids_missing(candidates, usable), "offset")
    notes["offset_conflicts"] = offsets.list_conflicts(checks)
    notes["offset_untold"] = [check.scene for check in checks if check.step is None]
    if job.recipe.haze:
        usable = veils.mark_wrong_classifications(
            usable, look.select_scenes(usable), job.recipe.haze
        )
        notes["scl_errors"] = veils.list_wrong_classifications(usable)
    if job.recipe.registration:
        shifts = registration.measure_shifts(usable, task.grid, looks, look.middle)
        registered = registration.apply_registration(usable, shifts, job.recipe.registration)
        dropped |= dict.fromkeys(_ids_missing(usable, registered), "registration")
        usable = registered
        notes["shifts"] = registration.as_rows(shifts)
    trusted = values.apply_faults(usable, faults)
    dropped |= dict.fromkeys(_ids_missing(usable, trusted), "values")
    usable = trusted
    if faults:
        notes[cube.VALUE_FAULTS] = [fault.as_row() for fault in faults]
    cube.leave_out(notes, dropped)
    if dropped:
        scenes.need_dates(usable, job.recipe, task.year, dropped)
    notes["check_reads"] = looks.totals()
    return usable, checks


def _ids_missing(earlier: Sequence[pystac.Item], later: Sequence[pystac.Item]) -> list[str]:
    """Return the ids of the scenes in `earlier` missing from `later`."""
    ids = {scene.id for scene in later}
    return [scene.id for scene in earlier if scene.id not in ids]


def _find_kept(job: BuildJob, site: Site, year: int) -> Outcome | None:
    """Make the outcome of a site-year committed from the same inputs, without reading its scenes.

    Returns None if only its scenes can tell, or if the site-year is to be built.
    """
    start = time.monotonic()
    inputs = hash_listed_inputs(job, site, year)
    if inputs is None:
        return None
    marker = cube.find_build(job.store, site.id, year, inputs, job.on_offset_conflict)
    if marker is None:
        return None
    if job.overwrite and cube.completeness_of(marker) < job.min_read_completeness:
        return None
    kept = _describe_kept(job, marker, marker["days"])
    return replace(kept, seconds=time.monotonic() - start)


def _describe_kept(job: BuildJob, marker: Mapping[str, Any], days: int) -> Outcome:
    """Make the outcome of a site-year that is already committed."""
    completeness = cube.completeness_of(marker)
    message = ""
    if completeness < job.min_read_completeness:
        message = f"has {completeness:.2%} of its reads; use --overwrite to build it again"
    return Outcome(
        site=marker["site"],
        year=marker["year"],
        state="kept",
        scenes=len(cube.list_used_scenes(marker)),
        days=days,
        message=message,
    )


def _describe_failed(store: cube.Store, site: Site, year: int, error: BaseException) -> Outcome:
    """Make the outcome of a failed site-year: `stale` if an older build remains, else `failed`."""
    state = "failed"
    try:
        if year in cube.read_markers(store, site.id):
            state = "stale"
    except MinecubeError:  # a damaged group, reported by the error or by `verify`
        pass
    return Outcome(
        site=site.id,
        year=year,
        state=state,
        message=describe_failure(error),
        error_class=classify(error),
    )


def _search_all(
    job: BuildJob,
    sites: Sequence[Site],
    years: Sequence[int],
    progress: Callable[[Outcome], None],
    searched: Callable[[str, int], None],
) -> tuple[list[tuple[Site, int]], list[Outcome]]:
    """Search and save the scenes of all site-years, except those committed from the same lists.

    Returns the site-years to build, and outcomes of the others.

    Raises SceneError if no site-year can start or is kept, unless all searches were empty.
    """
    tasks: list[tuple[Site, int]] = []
    outcomes: list[Outcome] = []
    faults: list[SceneError] = []
    find = cache_lists(load_or_save)
    for site in sites:
        for year in years:
            kept = _find_kept(job, site, year)
            if kept is not None:
                outcomes.append(kept)
                progress(kept)
                continue
            try:
                choose_scenes(job, site, year, find)
            except SceneError as error:
                outcomes.append(_describe_failed(job.store, site, year, error))
                progress(outcomes[-1])
                if not is_empty_search(error):
                    faults.append(error)
            else:
                tasks.append((site, year))
                searched(site.id, year)
    if faults and not tasks and all(outcome.state != "kept" for outcome in outcomes):
        raise faults[0]  # the fault is in the source or the list, not in a site-year
    return tasks, outcomes


def is_empty_search(error: SceneError) -> bool:
    """Return whether a search was answered and listed no scene, not even an unusable one."""
    return isinstance(error, scenes.NoScenesError) and not error.result.refused


def _build_all(
    job: BuildJob, site_years: Sequence[tuple[Site, int]], executor: Executor | None
) -> Iterator[Outcome]:
    """Yield outcomes as they come.

    After an interruption, finish the current blocks and begin no others.
    """
    interruption.clear()  # here, not at the end: queued reads of a stopped build must give up
    stop = threading.Event()
    options: tuple[Any, ...] = ()
    if executor is None:
        cores = os.cpu_count() or 1
        at_once = max(min(cores, len(site_years)), 1)
        job = replace(job, at_once=at_once)
        # Divide the cores among site-years: memory grows with the cores, not with their square.
        options = (max(cores // at_once, 1), stop.is_set)
        pool: Executor = ThreadPoolExecutor(max_workers=at_once)
    else:  # workers may run in other folders
        job = replace(
            job, at_once=1, store=job.store.absolute(), snapshots=job.snapshots.absolute()
        )
        pool = executor
    tasks: dict[Future[Outcome], tuple[Site, int]] = {}
    try:
        for site, year in site_years:
            tasks[pool.submit(build_year, job, site, year, *options)] = (site, year)
        for task in iterate_finished(tasks):
            error = task.exception()
            if error:
                # Other errors, such as a dead worker, fail their own site-year and are reported.
                yield _describe_failed(job.store, *tasks[task], error)
            else:
                yield task.result()
    except BaseException:
        interruption.set()  # do not wait for requests in trouble
        raise
    finally:
        stop.set()
        for task in tasks:
            task.cancel()
        if executor is None:
            pool.shutdown(wait=True, cancel_futures=True)
