"""Judge site-years by their markers, scene lists and events. Nothing else holds a run's state."""

from __future__ import annotations

from datetime import datetime
from importlib import metadata

from minecube import cube
from minecube.catalog import as_dict
from minecube.cube.provenance import untitled
from minecube.cube.read.summaries import Commit
from minecube.errors import SceneError
from minecube.grid import grid_of
from minecube.jobs.build import choose_scenes
from minecube.jobs.runs.inputs import Inputs
from minecube.jobs.scene_lists import load_or_search, path_of_list
from minecube.places import Place, time_of_change


class StaleCheck:
    """Compares commits with what a run would build now."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self._version = metadata.version("minecube")
        self._recipe = untitled(as_dict(inputs.job.recipe))
        self._known_recipe: object = None  # most commits share one object

    def explain(self, commit: Commit) -> str:
        """Say why a site-year is stale; empty if it is current.

        A scene list is read only if it changed after the commit.
        """
        if commit.version != self._version:
            return f"built by minecube {commit.version}"
        if commit.recipe is not self._known_recipe:
            if untitled(commit.recipe) != self._recipe:
                return f"built with another recipe {commit.recipe['id']}"
            self._known_recipe = commit.recipe
        if self._has_other_scenes(commit):
            return "the scene list has changed"
        return ""

    def _has_other_scenes(self, commit: Commit) -> bool:
        inputs = self._inputs
        site = inputs.sites.get(commit.site)
        if site is None:
            return False
        committed = datetime.fromisoformat(commit.committed).timestamp()
        years = [commit.year]
        if "neighbour-year" in inputs.job.recipe.fallback:
            years += [commit.year - 1, commit.year + 1]
        if not any(
            _changed_after(list_path(inputs, commit.site, year), committed) for year in years
        ):
            return False
        try:
            _, candidates = choose_scenes(inputs.job, site, commit.year, load_or_search)
        except SceneError:
            return False  # reported when the list is used
        provenance = cube.describe_build(
            site, commit.year, grid_of(site), inputs.job.recipe, candidates
        )
        return cube.hash_build(provenance) != commit.build


def list_path(inputs: Inputs, site: str, year: int) -> Place:
    """Return the place of a site-year's scene list."""
    return path_of_list(inputs.sites[site], year, inputs.job.sources, inputs.job.snapshots)


def _changed_after(place: Place, time: float) -> bool:
    changed = time_of_change(place)
    return changed is not None and changed > time
