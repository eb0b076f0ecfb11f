"""Load the shipped catalogue together with a user's folder of the same files."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from minecube.catalog import (
    Cluster,
    ModelCard,
    Recipe,
    Source,
    TrainingSettings,
    load_clusters,
    load_models,
    load_presets,
    load_recipes,
    load_sources,
    pick,
)
from minecube.errors import CatalogError
from minecube.places import Place

T = TypeVar("T")


def load_all_recipes(folder: Place | None) -> dict[str, Recipe]:
    """Load the shipped recipes and the recipes of a folder."""
    return _load_both(load_recipes, folder, "recipe")


def load_all_models(folder: Place | None) -> dict[str, ModelCard]:
    """Load the shipped model cards and the model cards of a folder."""
    return _load_both(load_models, folder, "model")


def load_all_presets(folder: Place | None) -> dict[str, TrainingSettings]:
    """Load the shipped training settings and the training settings of a folder."""
    return _load_both(load_presets, folder, "preset")


def load_all_clusters(folder: Place | None) -> dict[str, Cluster]:
    """Load the shipped clusters and the clusters of a folder."""
    return _load_both(load_clusters, folder, "cluster")


def choose_sources(ids: str, folder: Place | None) -> tuple[Source, ...]:
    """Choose sources by ids in order of preference, such as "earth-search,cdse".

    Raises CatalogError for an unknown or repeated source.
    """
    names = [name.strip() for name in ids.split(",")]
    if len(set(names)) < len(names):
        raise CatalogError(f"--source {ids}: expected each source once")
    sources = _load_both(load_sources, folder, "source")
    return tuple(pick(sources, name, "source") for name in names)


def need_new_names(shipped: dict[str, T], users: dict[str, T], folder: Place, kind: str) -> None:
    """Raise CatalogError if an entry of the user has the name of a shipped entry."""
    repeated = sorted(set(shipped) & set(users))
    if repeated:
        raise CatalogError(
            f"{folder}: {kind} {repeated[0]!r} is in the shipped catalogue already; "
            "give yours another id"
        )


def _load_both(load: Callable[..., dict[str, T]], folder: Place | None, kind: str) -> dict[str, T]:
    shipped = load()
    if folder is None or not (folder / f"{kind}s.yaml").exists():
        return shipped
    users = load(folder / f"{kind}s.yaml")
    need_new_names(shipped, users, folder, kind)
    return shipped | users
