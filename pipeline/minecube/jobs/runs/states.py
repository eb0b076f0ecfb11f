"""Judge site-years by their markers, scene lists and events. Nothing else holds a run's state."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from minecube import cube
from minecube.catalog import Recipe, Site, Source, as_dict, format_years
from minecube.cube.provenance import describe_grid, untitled
from minecube.cube.read.summaries import Commit, grid_key
from minecube.errors import SceneError
from minecube.grid import grid_of, grids_of
from minecube.jobs.build import choose_scenes, hash_listed_inputs
from minecube.jobs.runs.inputs import Inputs
from minecube.jobs.scene_lists import is_early, load_or_search, name_list, path_of_list
from minecube.places import Place, time_of_file
from minecube.scenes import SearchResult, has_images

_GRIDS = 1000
"""Sites whose grids are computed at once. Commits come site by site."""


class StaleCheck:
    """Compares commits with what a run would build now.

    `searched` has scenes of site-years whose lists are not saved.
    """

    def __init__(
        self, inputs: Inputs, searched: Mapping[tuple[str, int], SearchResult] | None = None
    ) -> None:
        self._inputs = inputs
        self._searched = searched or {}
        self._version = metadata.version("minecube")
        self._recipe = untitled(as_dict(inputs.job.recipe))
        self._known_recipe: object = None  # most commits share one object
        self._sites = list(inputs.sites)
        self._grids: dict[str, tuple[Any, ...]] = {}
        """Keys of the grids of some sites."""
        self._lock = threading.Lock()
        self._read_years = functools.cache(self._list_read_years)

    def explain(self, commit: Commit) -> str:
        """Say why a site-year is stale; empty if it is current.

        A scene list is read only if it changed after the commit.
        """
        return self.explain_inputs(commit) or self.explain_version(commit)

    def explain_version(self, commit: Commit) -> str:
        """Say which other version of minecube built a site-year."""
        return "" if commit.version == self._version else f"built by minecube {commit.version}"

    def explain_inputs(self, commit: Commit) -> str:
        """Say which other inputs or rules built a site-year, whatever the version of minecube."""
        if commit.recipe is not self._known_recipe:
            if untitled(commit.recipe) != self._recipe:
                return f"built with another recipe {commit.recipe['id']}"
            self._known_recipe = commit.recipe
        if commit.grid != self._find_grid(commit.site):
            return "its polygon or margin has changed"
        job = self._inputs.job
        if commit.completeness < job.min_read_completeness:
            return f"more reads were lost ({commit.lost}) than min_read_completeness allows"
        if commit.offset_rule not in (None, job.on_offset_conflict):
            return f"built with on_offset_conflict {commit.offset_rule}"
        changed = self._list_changed_lists(commit)
        if changed and self._has_other_scenes(commit):
            return f"the scene list of {format_years(changed)} has changed"
        return ""

    def _find_grid(self, site: str) -> tuple[Any, ...]:
        grid = self._grids.get(site)
        if grid is None:
            with self._lock:  # several threads read markers from an object store
                grid = self._grids.get(site) or self._compute_grids(site)[site]
        return grid

    def _compute_grids(self, site: str) -> dict[str, tuple[Any, ...]]:
        """Compute the grids of a site and of those that follow."""
        grid_of(self._inputs.sites[site])  # raises CatalogError for a site without a grid
        first = self._sites.index(site)
        chosen = [self._inputs.sites[name] for name in self._sites[first : first + _GRIDS]]
        grids = grids_of(chosen).items()
        self._grids = {name: grid_key(describe_grid(grid)) for name, grid in grids}
        return self._grids

    def _list_read_years(self, year: int) -> list[int]:
        return list_read_years(self._inputs.job.recipe, [year])

    def _list_changed_lists(self, commit: Commit) -> list[int]:
        """List the years whose scene lists are newer than a commit that has read them."""
        if commit.site not in self._inputs.sites:
            return []
        committed = datetime.fromisoformat(commit.committed).timestamp()
        return [
            year
            for year in self._read_years(commit.year)
            if (commit.site, year) in self._searched
            or self._changed_after(commit.site, year, committed)
        ]

    def _changed_after(self, site: str, year: int, time: float) -> bool:
        """Whether a scene list was saved after a time."""
        job = self._inputs.job
        name = name_list(site, year, job.sources)
        if isinstance(job.snapshots, Path):
            # A list is looked up per site-year, and a `Path` takes four times as long as a string.
            changed = time_of_file(f"{job.snapshots}/{name}")
        else:
            changed = self._inputs.lookup.time_of_change(job.snapshots / name)
        return changed is not None and changed > time

    def _find(
        self, site: Site, year: int, sources: Sequence[Source], folder: Place
    ) -> SearchResult:
        found = self._searched.get((site.id, year))
        return found or load_or_search(site, year, sources, folder)

    def _has_other_scenes(self, commit: Commit) -> bool:
        inputs = self._inputs
        site = inputs.sites[commit.site]
        is_saved = not any(site_id == commit.site for site_id, _ in self._searched)
        if is_saved and commit.inputs == hash_listed_inputs(
            inputs.job, site, commit.year, inputs.lookup.hash_list
        ):
            return False  # only the time of a list has changed, as in a copy
        try:
            _, candidates = choose_scenes(inputs.job, site, commit.year, self._find)
        except SceneError:
            return False  # reported when the list is used
        provenance = cube.describe_build(
            site, commit.year, grid_of(site), inputs.job.recipe, candidates
        )
        return cube.hash_build({**provenance, "version": commit.version}) != commit.build


def list_read_years(recipe: Recipe, years: Iterable[int]) -> list[int]:
    """List the years whose scene lists are read for the composites of some years."""
    read = set(years)
    if "neighbour-year" in recipe.fallback:
        read |= {year + step for year in read for step in (-1, 1)}
    return sorted(filter(has_images, read))


def list_path(inputs: Inputs, site: str, year: int) -> Place:
    """Return the place of a site-year's scene list."""
    return path_of_list(inputs.sites[site], year, inputs.job.sources, inputs.job.snapshots)


def needs_search(inputs: Inputs, site: str, year: int) -> bool:
    """Whether a site-year has no scene list, or one that was saved too early to be complete.

    A list may be saved in January, as the neighbour of the year before.
    """
    saved = inputs.lookup.time_of_change(list_path(inputs, site, year))
    return saved is None or is_early(saved, inputs.job.recipe, year)
