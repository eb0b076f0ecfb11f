"""Bring a dataset up to date: new years and sites, changed scenes, another recipe.

A site-year is built next to its old build, which stays readable until the new one is whole. Cubes of
another recipe go to a store of their own, so the old store stays as it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from minecube import scenes
from minecube.catalog import Dataset, as_dict
from minecube.cube.provenance import untitled
from minecube.cube.read.summaries import list_commits
from minecube.digests import sha256_of_json
from minecube.errors import MinecubeError, SceneError
from minecube.jobs.runs.driver import make_plan, run
from minecube.jobs.runs.inputs import Inputs, load_inputs
from minecube.jobs.runs.plan import Plan
from minecube.jobs.runs.states import StaleCheck, list_read_years, needs_search
from minecube.jobs.runs.summary import Progress, RunOptions, Summary
from minecube.jobs.runs.units import Unit
from minecube.jobs.scene_lists import load_list, save_list
from minecube.scenes import SceneChange, SearchResult

_SEARCHES = 4
"""Simultaneous searches, as in an audit."""

Note = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class UpdateOptions:
    """What to bring up to date."""

    sites: str = "*"
    """Names of sites of the dataset, comma-separated, * allowed."""
    refresh: bool = False
    """Whether to search all scene lists again. Lists that cannot be complete always are."""
    rebuild: bool = False
    """Whether to build site-years of other versions of minecube again, too."""


@dataclass
class Changes:
    """What an update finds. Keys are (site, year)."""

    scenes: dict[tuple[str, int], list[SceneChange]] = field(default_factory=dict)
    """Differences of scene lists that were searched again."""
    unanswered: dict[tuple[str, int], str] = field(default_factory=dict)
    """Reason of each failed search. A saved list stays."""
    reasons: dict[tuple[str, int], str] = field(default_factory=dict)
    """Reason of each site-year to build: new, or why it is stale."""
    older: dict[tuple[str, int], str] = field(default_factory=dict)
    """Site-years of other versions of minecube, which are left as they are."""

    def add(self, other: Changes) -> None:
        """Add the changes of another site."""
        self.scenes |= other.scenes
        self.unanswered |= other.unanswered
        self.reasons |= other.reasons
        self.older |= other.older


def find_changes(
    dataset: Dataset, options: UpdateOptions, *, save: bool, note: Note = lambda _: None
) -> Changes:
    """Search what is new, and find the site-years to build.

    With `save`, scene lists are saved; otherwise nothing is written. `note` gets each finished site.

    Raises as `run` does.
    """
    plan = make_plan(dataset, RunOptions(sites=options.sites))
    found = Changes()
    stopped = threading.Event()

    def find(site: str) -> Changes:
        return _find_site_changes(plan, site, options, save, stopped)

    with ThreadPoolExecutor(_SEARCHES) as pool:
        try:
            for site, changes in zip(plan.sites, pool.map(find, plan.sites), strict=True):
                found.add(changes)
                note(site)
        except BaseException:  # Ctrl-C, for example: begun searches end, and no other begins
            stopped.set()
            raise
    return found


def update(
    dataset: Dataset, options: UpdateOptions, progress: Progress = lambda *_: None
) -> Summary:
    """Build what `find_changes` has found, and all steps that follow.

    Raises as `run` does.
    """
    chosen = RunOptions(sites=options.sites, overwrite=True, rebuild=options.rebuild)
    return run(dataset, chosen, progress)


def _find_site_changes(
    plan: Plan, site: str, options: UpdateOptions, save: bool, stopped: threading.Event
) -> Changes:
    """Search the lists of one site that are missing or may have changed, and compare."""
    inputs = plan.inputs
    found = Changes()
    searched: dict[tuple[str, int], SearchResult] = {}
    for year in list_read_years(inputs.job.recipe, plan.years):
        is_incomplete = needs_search(inputs, site, year)
        if stopped.is_set() or not (is_incomplete or options.refresh):
            continue
        try:
            listed = _search_again(inputs, site, year, found)
        except scenes.NoScenesError:
            continue  # an empty year is no list; a saved list stays
        except MinecubeError as error:  # the run has it again, and logs it
            found.unanswered[site, year] = str(error)
            continue
        searched[site, year] = listed
        # An equal list keeps its time: what is newer than a commit is read at each later run.
        if save and (is_incomplete or (site, year) in found.scenes):
            save_list(listed, inputs.sites[site], year, inputs.job.sources, inputs.job.snapshots)
    check = StaleCheck(inputs, searched)
    for year in plan.years:
        _judge(plan, check, Unit("build", site, year), found, rebuild=options.rebuild)
    return found


def _search_again(inputs: Inputs, site: str, year: int, found: Changes) -> SearchResult:
    job = inputs.job
    listed = scenes.search(inputs.sites[site], year, *job.sources)
    try:
        old = load_list(inputs.sites[site], year, job.sources, job.snapshots)
    except SceneError:  # of another search; the new list takes its place
        old = SearchResult(scenes=(), listed=0)
    if old is not None and (changes := scenes.compare_lists(old.scenes, listed.scenes)):
        found.scenes[site, year] = changes
    return listed


def _judge(plan: Plan, check: StaleCheck, unit: Unit, found: Changes, *, rebuild: bool) -> None:
    """Note why a site-year is built, or that another version of minecube has built it."""
    key = (unit.site, unit.year)
    commit = plan.commits.get(key)
    if commit is None:
        found.reasons[key] = "new"
    elif reason := check.explain_inputs(commit):
        found.reasons[key] = reason
    elif reason := check.explain_version(commit):
        (found.reasons if rebuild else found.older)[key] = reason


def choose_store(dataset: Dataset) -> Dataset:
    """Return the dataset, with a store and results of their own if its recipe is another.

    They are named after the recipe, next to the present ones: `cubes-RECIPE-HASH.zarr`. The same
    recipe gives the same names, so an interrupted update resumes. Scene lists are shared.

    Raises:
        CatalogError, CubeError: as `run`.
    """
    inputs = load_inputs(dataset)
    recipe = untitled(as_dict(inputs.job.recipe))
    stored = _read_recipe(inputs)
    if stored is None or stored == recipe:
        return dataset
    suffix = f"-{inputs.job.recipe.id}-{sha256_of_json(recipe)[:6]}"
    return replace(
        dataset,
        store=_add_to_name(dataset.store, suffix),
        results=_add_to_name(dataset.results, suffix),
        scenes=str(inputs.job.snapshots),
    )


def _read_recipe(inputs: Inputs) -> dict[str, object] | None:
    """Return the recipe of the first committed site; None in an empty store."""
    store = inputs.store
    if store.path is not None and not store.path.is_dir():
        return None
    stored = set(store.list_folders(""))
    for site in filter(stored.__contains__, inputs.sites):
        for commit in list_commits(store, [site]).values():
            return untitled(commit.recipe)
    return None


def _add_to_name(place: str, suffix: str) -> str:
    """Add a suffix to the name of a folder or URL, before its ending such as .zarr."""
    parent, slash, name = place.rstrip("/").rpartition("/")
    path = Path(name)
    return f"{parent}{slash}{path.stem}{suffix}{path.suffix}"
