"""Map whole sites of a store with a trained network: the job of `minecube predict`."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

from minecube import cube, models
from minecube.errors import MinecubeError, ModelError, WorkerError
from minecube.jobs.catalogs import load_all_models
from minecube.jobs.failures import describe_failure
from minecube.jobs.workers import iterate_finished
from minecube.places import Place

Pair = tuple[int, int]
_KM2_PER_PIXEL = 1e-4


@dataclass(frozen=True, kw_only=True)
class MapOptions:
    """Maps to make, and their name."""

    prediction: str | None = None
    """Name of the prediction; by default the mapper's."""
    pairs: tuple[int | Pair, ...] | None = None
    """Gaps in years, or pairs of years, for a model of change; None: all pairs."""
    overwrite: bool = False
    """Whether to repeat existing maps, and to replace the prediction of another model."""


@dataclass(frozen=True)
class Mapped:
    """Counts and time of mapping one site."""

    maps: int
    """Years or pairs mapped in this run."""
    pixels: int
    """Pixels of all these maps."""
    seconds: float

    def __str__(self) -> str:
        rate = self.pixels / max(self.seconds, 1e-9)
        return (
            f"{self.pixels / 1e6:.2f} Mpx in {self.seconds:.1f} s, "
            f"{rate / 1e6:.3g} Mpx/s, {rate * _KM2_PER_PIXEL:.3g} km2/s"
        )


@dataclass(frozen=True)
class ModelReference:
    """A model that workers load by themselves."""

    model: str
    """File of a trained model, or name of a model with weights."""
    catalog: Place | None
    """Folder of the user's catalogue."""
    description: str
    """Card and weights that the workers must load; see `describe_model`."""
    compute: models.Compute

    def absolute(self) -> ModelReference:
        """Return the reference with absolute paths, for workers in other folders."""
        model = self.model
        if Path(model).is_file():
            model = str(Path(model).absolute())
        catalog = self.catalog
        if catalog is not None:
            catalog = catalog.absolute()
        return replace(self, model=model, catalog=catalog)


def map_site(
    store: cube.Store,
    site: str,
    mapper: models.Mapper,
    options: MapOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Mapped:
    """Map a site's committed years, except current builds already mapped by this model.

    Calls `progress` with the number of finished windows, and of all windows.

    Raises:
        CubeError: No year is committed, the name belongs to another model, or the store cannot be
            written.
        ModelError: The model does not fit the cube, or its output is not finite.
    """
    start = time.monotonic()
    options = options or MapOptions()
    reflectance = cube.open_reflectance(store, site)
    card = mapper.trained.card
    years = [int(year) for year in reflectance["year"]]
    views = models.list_views(card, years, _list_pairs(options.pairs, years))
    mapper.check(reflectance, views)
    planned = cube.Prediction(
        model=options.prediction or mapper.name,
        views=views,
        origin=mapper.description,
        variable="change" if card.task == "change" else "probability",
        classes=card.classes,
        computed=str(mapper.compute),
    )
    mapped = cube.write_prediction(
        store,
        site,
        planned,
        lambda views: mapper.map_rows(reflectance, views, progress),
        overwrite=options.overwrite,
    )
    maps = len(mapped)
    if card.task == "series":
        maps = sum(map(len, mapped))
    pixels = maps * reflectance.sizes["y"] * reflectance.sizes["x"]
    return Mapped(maps, pixels, time.monotonic() - start)


def map_on_workers(
    pool: Executor,
    store: cube.Store,
    sites: Sequence[str],
    model: ModelReference,
    options: MapOptions,
) -> Iterator[tuple[str, Mapped]]:
    """Yield sites as they finish, one task per site.

    An error in a worker is raised here and cancels the other tasks.

    Raises:
        MinecubeError: as `map_site`, or a worker found another model than this machine.
        WorkerError: a worker died, or the scheduler is lost.
    """
    # Workers may run in other folders than this process.
    store = store.absolute()
    model = model.absolute()
    tasks = {pool.submit(_map_on_worker, store, site, model, options): site for site in sites}
    try:
        for task in iterate_finished(tasks):
            try:
                mapped = task.result()
            except MinecubeError:
                raise
            except Exception as error:  # such as a dead worker or a lost scheduler
                raise WorkerError(
                    f"{tasks[task]}: {describe_failure(error)}; committed maps are safe; "
                    "run the same command again to resume"
                ) from error
            yield tasks[task], mapped
    finally:
        for task in tasks:
            task.cancel()


def describe_model(mapper: models.Mapper) -> str:
    """Return card and weights of a model as text, to compare models."""
    return json.dumps(mapper.description, sort_keys=True)


def _list_pairs(pairs: Sequence[int | Pair] | None, years: Sequence[int]) -> list[Pair] | None:
    """List the pairs of these years with the given gaps, and the pairs given directly."""
    if pairs is None:
        return None
    gaps = {pair for pair in pairs if isinstance(pair, int)}
    by_gap = [(a, b) for a, b in combinations(sorted(years), 2) if b - a in gaps]
    explicit = [pair for pair in pairs if not isinstance(pair, int)]
    return list(dict.fromkeys([*by_gap, *explicit]))


def _map_on_worker(
    store: cube.Store, site: str, model: ModelReference, options: MapOptions
) -> Mapped:
    return map_site(store, site, load_same(model), options)


@functools.lru_cache(maxsize=1)
def load_same(reference: ModelReference) -> models.Mapper:
    """Load a model on a worker, and cache it on the device until another model is needed.

    Raises ModelError if the worker finds another model than the calling machine.
    """
    cards = load_all_models(reference.catalog)
    mapper = models.Mapper(models.find_model(reference.model, cards), reference.compute)
    if describe_model(mapper) != reference.description:
        raise ModelError(
            f"{reference.model}: a worker found another card or other weights than the machine "
            "that asked, so sites would be mapped by several models; "
            "put model and catalogue where all see the same files"
        )
    return mapper
