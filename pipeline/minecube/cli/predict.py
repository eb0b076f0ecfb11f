"""Subcommand predict: map whole cubes with a trained network, into the store."""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import click

from minecube import cube, models
from minecube.catalog.fields import FieldError, need_name
from minecube.cli import common
from minecube.cli.common import (
    SiteChoice,
    absolute,
    as_ended,
    catalog_option,
    executor_of,
    failure_text,
    keep_memory,
    progress_bar,
    scheduler_option,
    sites_option,
    stored_sites,
    writable_store_option,
)
from minecube.errors import CubeError, MinecubeError, ModelError, WorkerError

Pair = tuple[int, int]
_KM2 = 1e-4  # area of a 10 m pixel


class Pairs(click.ParamType[tuple[int | Pair, ...]]):
    """Gaps in years (1,2), pairs of years (2019-2021,2020-2021), or both."""

    name = "pairs"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int | Pair, ...]:
        """Convert text to gaps and pairs, in the given order."""
        if isinstance(value, tuple):
            return value
        found: list[int | Pair] = []
        for part in str(value).split(","):
            match = re.fullmatch(r"\s*(\d{4})\s*-\s*(\d{4})\s*|\s*(\d{1,2})\s*", part)
            if not match:
                self.fail(
                    f"{value!r}: expected gaps such as 1,2 or pairs of years such as 2019-2021",
                    param,
                    ctx,
                )
            found.append(int(match[3]) if match[3] else (int(match[1]), int(match[2])))
        return tuple(found)


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
        return f"{self.pixels / 1e6:.2f} Mpx in {self.seconds:.1f} s, {rate / 1e6:.3g} Mpx/s, {rate * _KM2:.3g} km2/s"


def map_site(
    store: cube.Store,
    name: str,
    mapper: models.Mapper,
    *,
    prediction: str | None = None,
    pairs: Sequence[int | Pair] | None = None,
    overwrite: bool = False,
) -> Mapped:
    """Map a site's committed years, except current builds already mapped by this model.

    Args:
        store: The cubes.
        name: The site.
        mapper: The model.
        prediction: Name of the prediction; `mapper.name` by default.
        pairs: Gaps in years, or pairs of years, for change; all pairs by default.
        overwrite: Repeat existing maps, and replace the prediction of another model.

    Raises:
        CubeError: No year is committed, the name belongs to another model, or the store cannot be
            written.
        ModelError: The model does not fit the cube, or its output is not finite.
    """
    reflectance, card = cube.open_reflectance(store, name), mapper.trained.card
    years = [int(year) for year in reflectance["year"]]
    views = models.views_of(card, years, None if pairs is None else _named(pairs, years))
    mapper.check(reflectance, views)
    planned = cube.Prediction(
        model=prediction or mapper.name,
        views=views,
        about=mapper.about,
        variable="change" if card.task == "change" else "probability",
        classes=card.classes,
        computed=str(mapper.compute),
    )
    start = time.monotonic()
    with progress_bar(f"mapping {name}") as advance:

        def progress(done: int, total: int) -> None:
            rate = f"{done / (time.monotonic() - start):.0f} windows/s" if done else ""
            advance(n=0, note=f"{done} of {total} windows, {rate}")

        mapped = cube.write_prediction(
            store,
            name,
            planned,
            lambda todo: mapper.rows(reflectance, todo, progress),
            overwrite=overwrite,
        )
    maps = sum(len(view) if card.task == "series" else 1 for view in mapped)
    return Mapped(
        maps, maps * reflectance.sizes["y"] * reflectance.sizes["x"], time.monotonic() - start
    )


def _named(pairs: Sequence[int | Pair], years: Sequence[int]) -> list[models.View]:
    """List the pairs of these years with the given gaps, and the pairs given directly."""
    gaps = {pair for pair in pairs if isinstance(pair, int)}
    by_gap = [(a, b) for a, b in combinations(sorted(years), 2) if b - a in gaps]
    return list(dict.fromkeys([*by_gap, *(pair for pair in pairs if not isinstance(pair, int))]))


def _on_workers(
    pool: Executor,
    store: cube.Store,
    names: Sequence[str],
    model: str,
    made_by: str,
    catalog: Path | None,
    compute: models.Compute,
    **how: Any,
) -> Iterator[tuple[str, Mapped]]:
    """Yield sites as they finish, one task per site.

    An error in a worker is raised here and cancels the other tasks.
    """
    # Workers may run in other folders than this process.
    there, where = store.absolute(), absolute(model) if Path(model).is_file() else model
    cards = catalog and catalog.absolute()
    tasks = {
        pool.submit(_on_worker, there, name, where, cards, made_by, compute, **how): name
        for name in names
    }
    try:
        for task in as_ended(tasks):
            try:
                found = task.result()
            except MinecubeError:
                raise
            except Exception as error:  # such as a dead worker or a lost scheduler
                raise WorkerError(
                    f"{tasks[task]}: {failure_text(error)}; committed maps are safe; run the same command again to resume"
                ) from error
            yield tasks[task], found
    finally:
        for task in tasks:
            task.cancel()


def _on_worker(
    store: cube.Store,
    name: str,
    model: str,
    catalog: Path | None,
    made_by: str,
    compute: models.Compute,
    **how: Any,
) -> Mapped:
    return map_site(store, name, _the_same(model, catalog, made_by, compute), **how)


@functools.lru_cache(maxsize=1)
def _the_same(
    model: str, catalog: Path | None, made_by: str, compute: models.Compute
) -> models.Mapper:
    """Load the model on a worker, and cache it on the device until another model is needed.

    Raises ModelError if the worker finds another model than the calling machine.
    """
    mapper = models.Mapper(models.find(model, common.models(catalog)), compute)
    if _makes(mapper) != made_by:
        raise ModelError(
            f"{model}: a worker found another card or other weights than the machine that asked, so sites would be mapped by "
            "several models; put model and catalogue where all see the same files"
        )
    return mapper


def _makes(mapper: models.Mapper) -> str:
    """Return the model's description as text, for comparison."""
    return json.dumps(mapper.about, sort_keys=True)


def _named_safely(_ctx: click.Context, _param: click.Parameter, name: str | None) -> str | None:
    if name is None:
        return None
    try:
        need_name(name, "name")
    except FieldError as error:
        raise click.BadParameter(str(error)) from error
    return name


@click.command()
@writable_store_option
@sites_option
@catalog_option
@scheduler_option
@click.option(
    "--model",
    required=True,
    help="File of a trained model, or the name of a model with weights (catalog/models.yaml).",
)
@click.option(
    "--name",
    "prediction",
    callback=_named_safely,
    help="Name of the prediction in the store. [default: the model's id and the first 8 digits of its weights' SHA-256]",
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option(
    "--pairs",
    type=Pairs(),
    help="Pairs of years for a model of change: gaps (1,2) or pairs (2019-2021,...). [default: all]",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16"]),
    help="Precision of the network. [default: bf16 on a GPU, fp32 on a CPU]",
)
@click.option(
    "--compile",
    "compiled",
    is_flag=True,
    help="Compile the network for a GPU first (torch.compile). Takes minutes, once.",
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="Map again, even if already mapped. Also replaces another model's prediction of the same name.",
)
@click.pass_context
def predict(
    ctx: click.Context,
    /,
    store: cube.Store,
    wanted: SiteChoice,
    catalog: Path | None,
    scheduler: str | None,
    model: str,
    prediction: str | None,
    pairs: tuple[int | Pair, ...] | None,
    overwrite: bool,
    **how: Any,
) -> None:
    """Map the chosen cubes with a trained model, and store the maps.

    A model of footprints maps each committed year. A model of change maps pairs of years. Site-years that
    this model has already mapped are skipped: an interrupted run resumes, and a finished run does nothing.
    Each model's prediction has its own name.

    To use several GPUs, start one run per GPU with its own --sites and --device, or use --scheduler: each
    Dask task maps one site, on one CPU thread or on the worker's own --device.

    \b
    Example:
      minecube predict --store cubes.zarr --sites Germany_2 --model model.pt
      minecube predict --store cubes.zarr --model model.pt --name spring-2024
      minecube predict --store cubes.zarr --sites 'Chile_*' --model change.pt --pairs 1,2 --device cuda:1
    """
    compute = models.Compute(**how)
    if scheduler is None:
        compute.place()
    mapper, names = (
        models.Mapper(models.find(model, common.models(catalog)), compute),
        stored_sites(store, wanted),
    )
    built = [name for name in names if cube.builds(store, name)]
    if not built:
        raise CubeError(
            f"{store}: no committed year in {', '.join(names)}; run `minecube build` until it says built"
        )
    total, start = Mapped(0, 0, 0.0), time.monotonic()
    written = prediction or cube.choose_name(store, built, mapper.about, mapper.name)
    asked: dict[str, Any] = {"prediction": written, "pairs": pairs, "overwrite": overwrite}
    with executor_of(scheduler) as pool:
        found: Iterator[tuple[str, Mapped]]
        if pool is None:
            keep_memory()
            found = ((name, map_site(store, name, mapper, **asked)) for name in built)
        else:
            one_thread = replace(compute, workers=1)
            found = _on_workers(
                pool, store, built, model, _makes(mapper), catalog, one_thread, **asked
            )
        for name, one in found:
            what = "pairs" if mapper.trained.card.task == "change" else "years"
            said = f"{one.maps} {what} mapped, {one}" if one.maps else "mapped already"
            click.echo(
                f"{name}: {said}; prediction {written} ({store}, group {name}/predictions/{written})"
            )
            total = Mapped(
                total.maps + one.maps, total.pixels + one.pixels, time.monotonic() - start
            )
    if len(built) > 1 and total.maps:
        click.echo(f"in all: {total}")
    if len(built) < len(names):
        left = ", ".join(name for name in names if name not in built)
        click.echo(
            f"not mapped, no committed year: {left}; run `minecube build` until it says built",
            err=True,
        )
        ctx.exit(1)
