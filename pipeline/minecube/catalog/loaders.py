"""Load the catalogue's YAML files: sources, recipes, models, presets, releases and clusters."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from minecube.catalog.cluster import Cluster
from minecube.catalog.conversion import build
from minecube.catalog.fields import FieldError
from minecube.catalog.model import ModelCard
from minecube.catalog.recipe import REDUCERS, Recipe
from minecube.catalog.releases import Release
from minecube.catalog.scene_source import Source
from minecube.catalog.training import TrainingSettings
from minecube.errors import CatalogError
from minecube.places import Place, Url, place_of

T = TypeVar("T")
Entry = TypeVar("Entry", Cluster, ModelCard, Recipe, Release, Source, TrainingSettings)

_MOST_NAMES = 8
"""Most names listed in an error."""


def catalog_folder() -> Path:
    """Return the folder of the shipped catalogue."""
    package = Path(__file__).parents[1]
    shipped = package / "_catalog"  # in a wheel; a checkout has catalog/ at its top
    if shipped.is_dir():
        return shipped
    return package.parents[1] / "catalog"


def load_sources(path: Place | None = None) -> dict[str, Source]:
    """Load a `sources.yaml`, by id. Raises CatalogError as `load_sites` does."""
    path = place_of(path or catalog_folder() / "sources.yaml").resolve()
    sources = _load_entries(Source, path)
    for name, source in sources.items():
        if source.kind != "stac-api":
            href = _absolute(source.href, path.parent)
            sources[name] = dataclasses.replace(source, href=href)
    return sources


def load_recipes(path: Place | None = None) -> dict[str, Recipe]:
    """Load a `recipes.yaml`, by id. Raises CatalogError as `load_sites` does."""
    path = path or catalog_folder() / "recipes.yaml"
    recipes = _load_entries(Recipe, path)
    for recipe in recipes.values():
        if recipe.reducer not in REDUCERS:
            raise CatalogError(
                f"{path}: entry {recipe.id!r}, field 'reducer': expected one of "
                f"{', '.join(REDUCERS)}, found {recipe.reducer!r}, which has been removed"
            )
        if recipe.second_opinion is not None:
            raise CatalogError(
                f"{path}: entry {recipe.id!r}, field 'second_opinion': expected null, "
                f"found {recipe.second_opinion!r}; second cloud masks have been removed"
            )
    return recipes


def load_releases(path: Place | None = None) -> dict[str, Release]:
    """Load the published datasets of a `releases.yaml`, by id.

    Raises CatalogError as `load_sites` does.
    """
    return _load_entries(Release, path or catalog_folder() / "releases.yaml")


def load_models(path: Place | None = None) -> dict[str, ModelCard]:
    """Load the model cards of a `models.yaml`, by id. Raises CatalogError as `load_sites` does."""
    path = place_of(path or catalog_folder() / "models.yaml").resolve()
    cards = _load_entries(ModelCard, path)
    for name, card in cards.items():
        if card.weights:
            href = _absolute(card.weights.href, path.parent)
            weights = dataclasses.replace(card.weights, href=href)
            cards[name] = dataclasses.replace(card, weights=weights)
    return cards


def load_presets(path: Place | None = None) -> dict[str, TrainingSettings]:
    """Load the training settings of a `presets.yaml`, by id.

    Raises CatalogError as `load_sites` does.
    """
    return _load_entries(TrainingSettings, path or catalog_folder() / "presets.yaml")


def load_clusters(path: Place | None = None) -> dict[str, Cluster]:
    """Load a `clusters.yaml`, by id. Raises CatalogError as `load_sites` does."""
    return _load_entries(Cluster, path or catalog_folder() / "clusters.yaml")


def _absolute(href: str, folder: Place) -> str:
    """Resolve a path relative to the folder of the YAML file. URLs stay unchanged.

    Raises CatalogError for a local path in a catalogue at a URL.
    """
    if "://" in href:
        return href
    if isinstance(folder, Url) and Path(href).is_absolute():
        raise CatalogError(
            f"{folder}: expected a URL, or a path relative to the catalogue, found {href}; "
            "local files are for local catalogues"
        )
    return str(folder / href)


def pick(entries: Mapping[str, T], name: str, kind: str) -> T:
    """Pick an entry by name. Raises CatalogError with the available names."""
    if name not in entries:
        listed = []
        if len(entries) > _MOST_NAMES:
            listed = difflib.get_close_matches(name, entries, n=_MOST_NAMES)
        listed = listed or sorted(entries)[:_MOST_NAMES]
        remainder = ""
        if len(entries) > len(listed):
            remainder = f", and {len(entries) - len(listed)} more"
        raise CatalogError(f"unknown {kind} {name!r}; there is: {', '.join(listed)}{remainder}")
    return entries[name]


def _load_entries(cls: type[Entry], path: Place) -> dict[str, Entry]:
    """Load the entries of a YAML file, by id."""
    entries = {}
    for name, fields in _read_yaml(path).items():
        try:
            if not isinstance(fields, Mapping):
                raise FieldError(f"expected fields, found {type(fields).__name__}")
            entry = build(cls, {"id": str(name), **fields})
        except ValueError as error:
            raise CatalogError(f"{path}: entry {name!r}: {error}") from error
        entries[entry.id] = entry
    return entries


def _read_yaml(path: Place) -> Mapping[Any, Any]:
    try:
        content = read_unique_yaml(path.read_bytes().decode("utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise CatalogError(
            f"{path}: cannot be read as a catalogue: {describe_yaml_error(error)}"
        ) from error
    if not isinstance(content, Mapping):
        raise CatalogError(f"{path}: expected entries by id, found {type(content).__name__}")
    return content


def read_unique_yaml(text: str) -> Any:
    """Read YAML of plain values. Raises yaml.YAMLError, also for a repeated key."""
    return yaml.load(text, Loader=_UniqueKeys)  # noqa: S506  a SafeLoader


class _UniqueKeys(yaml.SafeLoader):
    """Load YAML. Repeated keys are errors."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = set()
        for key_node, _ in node.value:
            key = str(self.construct_object(key_node, deep=True))
            if key in keys:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} occurs twice", key_node.start_mark
                )
            keys.add(key)
        return super().construct_mapping(node, deep)


def describe_yaml_error(error: Exception) -> str:
    """Describe the problem in a YAML file in one line, with its line number."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    problem = getattr(error, "problem", None) or getattr(error, "strerror", None) or error
    text = " ".join(str(problem).split())
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return text
    return f"line {mark.line + 1}: {text}"
