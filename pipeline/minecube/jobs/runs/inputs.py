"""Load what the steps of a run need, once per process and run."""

from __future__ import annotations

import functools
import hashlib
import io
import threading
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import geopandas as gpd

from minecube import cube, labels
from minecube.catalog import Cluster, Dataset, Site, as_dict, pick
from minecube.catalog.dataset import LabelInput
from minecube.catalog.fields import FieldError
from minecube.composite.plan import Terms
from minecube.cube.events import EventLog
from minecube.errors import CatalogError
from minecube.jobs.build import BuildJob
from minecube.jobs.catalogs import (
    choose_sources,
    load_all_clusters,
    load_all_models,
    load_all_recipes,
)
from minecube.jobs.runs.lookups import ListedLookup, Lookup
from minecube.jobs.scene_lists import default_folder
from minecube.jobs.selection import SiteChoice, choose_sites
from minecube.places import Place, place_of

F = TypeVar("F", bound=Callable[..., Any])

_caches: list[Any] = []
_run = ""
"""Id of the last run that worked in this process."""
_lock = threading.Lock()


def cached_for_run(maxsize: int) -> Callable[[F], F]:
    """Cache the results of a function until `forget_inputs`."""

    def decorate(function: F) -> F:
        cached: Any = functools.lru_cache(maxsize)(function)
        _caches.append(cached)
        return cast("F", cached)

    return decorate


def forget_inputs() -> None:
    """Forget all loaded files. They are read again, because they may have changed."""
    for cache in _caches:
        cache.cache_clear()


def join_run(run: str) -> None:
    """Forget what this process has loaded for another run.

    Workers of a Dask scheduler outlive the run.
    """
    global _run
    with _lock:
        if run != _run:
            forget_inputs()
            _run = run


@dataclass(frozen=True)
class Inputs:
    """A dataset with its sites, sources and recipe."""

    dataset: Dataset
    sites: dict[str, Site]
    job: BuildJob
    lookup: Lookup = field(default_factory=Lookup, compare=False)

    def with_listings(self) -> Inputs:
        """Return the inputs for reading the state of many sites: folders are listed once."""
        return replace(self, lookup=ListedLookup(self.sites))

    @property
    def store(self) -> cube.Store:
        """The store of the cubes."""
        return self.job.store

    @property
    def results(self) -> Place:
        """Folder of audits, tracks, scores and exports."""
        return place_of(self.dataset.results)

    @property
    def catalog(self) -> Place | None:
        """Folder of the user's catalogue."""
        return _catalog_of(self.dataset)


def _catalog_of(dataset: Dataset) -> Place | None:
    return None if dataset.catalog is None else place_of(dataset.catalog)


@cached_for_run(maxsize=2)
def load_inputs(dataset: Dataset) -> Inputs:
    """Load a dataset's sites, sources and recipe.

    Raises:
        CatalogError: a name is unknown, or a file is missing or malformed.
        CubeError: the store cannot be read.
    """
    catalog = _catalog_of(dataset)
    if isinstance(catalog, Path) and not catalog.is_dir():
        with dataset.naming_line("catalog"):
            raise CatalogError(f"{catalog}: no such folder; expected the `catalog` of {dataset.id}")
    with dataset.naming_line("store"):
        store = cube.Store.connect(dataset.store, writable=True)
    with dataset.naming_line("scenes" if dataset.scenes else "store"):
        snapshots = place_of(dataset.scenes) if dataset.scenes else default_folder(store)
    with dataset.naming_line("sites"):
        sites = choose_sites(SiteChoice(dataset.sites, dataset.sites_layer), catalog)
    with dataset.naming_line("sources"):
        sources = choose_sources(",".join(dataset.sources), catalog)
    with dataset.naming_line("recipe"):
        recipe = pick(load_all_recipes(catalog), dataset.recipe, "recipe")
    if dataset.margin is not None:
        sites = [replace(site, margin=dataset.margin) for site in sites]
    job = BuildJob(
        store=store,
        sources=sources,
        recipe=recipe,
        snapshots=snapshots,
        on_offset_conflict=dataset.on_offset_conflict,
        min_read_completeness=dataset.min_read_completeness,
    )
    return Inputs(dataset, {site.id: site for site in sites}, job)


def choose_cluster(dataset: Dataset) -> Cluster:
    """Return the cluster that the dataset's engine names, by its name or its address.

    Raises CatalogError for an unknown name.
    """
    if "://" in dataset.engine:
        title = "A running Dask scheduler"
        try:
            return Cluster(
                id="dask", title=title, kind="dask", address=dataset.engine, wait_minutes=1
            )
        except FieldError as error:
            raise CatalogError(f"engine {dataset.engine!r}: {error}") from error
    cluster = pick(load_all_clusters(_catalog_of(dataset)), dataset.engine, "engine")
    if dataset.workers is not None and cluster.kind != "local":
        raise CatalogError(
            f"engine {cluster.id}: expected no `workers` in the dataset, found {dataset.workers}; "
            "the number is in clusters.yaml"
        )
    return cluster


def check_inputs(inputs: Inputs) -> None:
    """Check the files that later steps need, before any work.

    Raises CatalogError for a missing file, or an unknown model or engine.
    """
    dataset = inputs.dataset
    choose_cluster(dataset)
    if dataset.prices is not None:
        with dataset.naming_line("prices"):
            Terms.load(place_of(dataset.prices))
    if dataset.labels is not None and not place_of(dataset.labels.file).exists():
        with dataset.naming_line("labels"):
            raise CatalogError(f"{dataset.labels.file}: no such file; expected polygons of mines")
    for index, model in enumerate(dataset.models):
        with dataset.naming_line("models", index):
            identify_model(inputs, model.file)


@cached_for_run(maxsize=2)
def load_polygons(source: LabelInput, sites: tuple[str, ...]) -> gpd.GeoDataFrame:
    """Load mine polygons, with the dataset's names of sites.

    Raises LabelError if they cannot be read.
    """
    file = place_of(source.file)
    polygons = labels.read_polygons(file, source.layer)
    return labels.match_sites(polygons, sites, file)


@cached_for_run(maxsize=64)
def hash_file(path: str) -> str:
    """Return the SHA-256 of a file, the same for the whole run."""
    return hashlib.sha256(place_of(path).read_bytes()).hexdigest()


def identify_model(inputs: Inputs, model: str) -> Any:
    """Return what identifies a model: the hash of its file, or its card.

    Raises CatalogError if there is neither.
    """
    if place_of(model).exists():
        return _hash_model(model)
    if Path(model).suffix:
        raise CatalogError(f"{model}: no such file; expected a trained model")
    return as_dict(pick(load_all_models(inputs.catalog), model, "model"))


@cached_for_run(maxsize=64)
def _hash_model(path: str) -> str:
    """Return the SHA-256 of a trained model. Raises CatalogError for another file."""
    content = place_of(path).read_bytes()
    if not zipfile.is_zipfile(io.BytesIO(content)):  # as torch saves
        raise CatalogError(f"{path}: is no trained model; `minecube train` makes one")
    return hashlib.sha256(content).hexdigest()


def open_log(store: cube.Store) -> EventLog:
    """Open the log of this thread in a store. A thread works on one unit at a time."""
    return _open_log(store, threading.get_ident())


@functools.lru_cache(maxsize=256)
def _open_log(store: cube.Store, thread: int) -> EventLog:
    del thread  # a key of the cache
    return EventLog(store)
