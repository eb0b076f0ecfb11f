"""Options of the commands that search scenes, and the values that these commands receive."""

from __future__ import annotations

from dataclasses import dataclass

import click

from minecube import cube
from minecube.catalog import Recipe, Source, pick
from minecube.cli.options import F
from minecube.cli.parameters import InFolder
from minecube.jobs.build import BuildJob
from minecube.jobs.catalogs import choose_sources, load_all_recipes
from minecube.jobs.scene_lists import default_folder
from minecube.places import Place

source_option = click.option(
    "--source",
    "source_ids",
    required=True,
    help="Sources of scenes, such as earth-search or cdse (catalog/sources.yaml). Several are "
    "comma-separated, in order of preference: later sources fill in acquisitions that "
    "earlier ones lack.",
)
_recipe_option = click.option(
    "--recipe",
    "recipe_id",
    default="annual-median",
    show_default=True,
    help="Name of a composite recipe: one of catalog/recipes.yaml, or your own (--catalog).",
)
_snapshots_option = click.option(
    "--scenes",
    "snapshots",
    type=InFolder(exists=False),
    help="Folder of scene lists: a path or an object-store URL. Existing lists are reused; missing "
    "ones are searched and saved. [default: <store>-scenes]",
)


def scene_options(command: F) -> F:
    """Add --source and --recipe of `SceneOptions`."""
    return source_option(_recipe_option(command))


def job_options(command: F) -> F:
    """Add --source, --recipe and --scenes of `JobOptions`."""
    return scene_options(_snapshots_option(command))


@dataclass(frozen=True)
class SceneOptions:
    """Sources and method: --source, --recipe and --catalog."""

    source_ids: str
    recipe_id: str
    catalog: Place | None

    def sources(self) -> tuple[Source, ...]:
        """Return the sources in order of preference."""
        return choose_sources(self.source_ids, self.catalog)

    def recipe(self) -> Recipe:
        """Return the recipe of the composite."""
        return pick(load_all_recipes(self.catalog), self.recipe_id, "recipe")


@dataclass(frozen=True)
class JobOptions(SceneOptions):
    """Input, method and store of a build: also --store and --scenes."""

    store: cube.Store
    snapshots: Place | None

    def load(self) -> BuildJob:
        """Return the settings of a build."""
        return BuildJob(
            store=self.store,
            sources=self.sources(),
            recipe=self.recipe(),
            snapshots=self.snapshots or default_folder(self.store),
        )
