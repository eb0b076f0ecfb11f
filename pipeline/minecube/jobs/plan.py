"""Plan a build before it: the job of `minecube plan` and of `build --dry-run`.

Reads no pixels and writes nothing. Saved scene lists are used; missing ones are searched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from minecube import cube, scenes
from minecube.catalog import Site
from minecube.composite.plan import START_S, Estimate, Terms, estimate, measure_pace
from minecube.errors import SceneError
from minecube.grid import grid_of
from minecube.jobs.build import BuildJob, choose_scenes, is_empty_search
from minecube.jobs.scene_lists import FindScenes, cache_lists, load_or_search


@dataclass(frozen=True, kw_only=True)
class PlannedYear:
    """Upper bounds for one site-year."""

    site: str
    year: int
    state: str
    """no scenes, to build, committed, or committed from other scenes."""
    days: int = 0
    """Number of days with scenes."""
    needs: Estimate = field(default_factory=Estimate)
    """Zero, apart from the scenes, for a committed site-year."""
    error: SceneError | None = None
    """Reason for the state `no scenes`."""


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """Upper bounds for all site-years of a build."""

    years: tuple[PlannedYear, ...]
    terms: Terms
    """Speed and prices of the machine."""
    timed_builds: int
    """Builds in the store with a known duration."""
    measured_pace: float | None
    """Duration of these builds, divided by the estimate for their size; None without any."""

    @property
    def errors(self) -> list[SceneError]:
        """Reasons why site-years cannot start."""
        return [planned.error for planned in self.years if planned.error]

    @property
    def total(self) -> Estimate:
        """Sum over the uncommitted site-years."""
        return sum((planned.needs for planned in self.years), Estimate())

    @property
    def pace(self) -> float:
        """Factor from estimated to expected seconds; 1 without timed builds."""
        return self.measured_pace or 1.0

    @property
    def start_s(self) -> float:
        """Seconds until the first site-year begins."""
        if self.total.site_years:
            return START_S
        return 0.0

    @property
    def expected_s(self) -> float:
        """Expected seconds of the build."""
        return self.total.seconds(self.terms) * self.pace + self.start_s


def plan_build(
    job: BuildJob,
    sites: Sequence[Site],
    years: Sequence[int],
    terms: Terms | None = None,
    progress: Callable[[PlannedYear], None] = lambda _: None,
) -> BuildPlan:
    """Estimate upper bounds for each site-year of a build.

    Raises:
        CatalogError: a year is without Sentinel-2.
        CubeError: the store has another recipe or grid, or cannot be read.
        SceneError: no site-year has scenes, and not all searches were empty.
    """
    scenes.check_years(years)
    terms = terms or Terms()
    builds = {site.id: cube.read_markers(job.store, site.id) for site in sites}
    markers = [marker for by_year in builds.values() for marker in by_year.values()]
    durations = [marker["took"] for marker in markers if "took" in marker]
    find = cache_lists(load_or_search)
    rows = []
    for site in sites:
        cube.check_site(job.store, site, grid_of(site), job.recipe)
        for year in years:
            rows.append(_plan_year(job, site, year, builds[site.id].get(year), find))
            progress(rows[-1])
    plan = BuildPlan(
        years=tuple(rows),
        terms=terms,
        timed_builds=len(durations),
        measured_pace=measure_pace(durations, terms),
    )
    if len(plan.errors) == len(rows) and not all(map(is_empty_search, plan.errors)):
        raise plan.errors[0]
    return plan


def _plan_year(
    job: BuildJob, site: Site, year: int, marker: Mapping[str, Any] | None, find: FindScenes
) -> PlannedYear:
    try:
        _, candidates = choose_scenes(job, site, year, find)
    except SceneError as error:
        return PlannedYear(site=site.id, year=year, state="no scenes", error=error)
    grid = grid_of(site)
    state = "to build"
    if marker:
        provenance = cube.describe_build(site, year, grid, job.recipe, candidates)
        state = "committed from other scenes"
        if marker["build_id"] == cube.hash_build(provenance):
            state = "committed"
    needs = Estimate(scenes=len(candidates))
    if state != "committed":
        needs = estimate(candidates, grid, job.recipe)
    days = len(scenes.list_solar_days(candidates))
    return PlannedYear(site=site.id, year=year, state=state, days=days, needs=needs)
