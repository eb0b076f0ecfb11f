"""Subcommand predict: map whole cubes with a trained network, into the store."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import click

from minecube import cube, models
from minecube.catalog.fields import FieldError, need_name
from minecube.cli.bars import Bar, progress_bar
from minecube.cli.options import (
    StoreSites,
    catalog_option,
    collect_options,
    device_option,
    scheduler_option,
    sites_option,
    writable_store_option,
)
from minecube.cli.parameters import Pairs
from minecube.errors import CubeError
from minecube.jobs.catalogs import load_all_models
from minecube.jobs.memory import keep_memory
from minecube.jobs.predict import (
    MapOptions,
    Mapped,
    ModelReference,
    describe_model,
    map_on_workers,
    map_site,
)
from minecube.jobs.workers import connect_workers
from minecube.places import Place


@dataclass(frozen=True)
class ModelOptions:
    """The model: --model and --catalog."""

    model: str
    catalog: Place | None


def _check_name(_ctx: click.Context, _param: click.Parameter, name: str | None) -> str | None:
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
    help="Path or object-store URL of a trained model, or the name of a model with weights (catalog/models.yaml).",
)
@click.option(
    "--name",
    "prediction",
    callback=_check_name,
    help="Name of the prediction in the store. [default: the model's id and the first 8 digits "
    "of its weights' SHA-256]",
)
@device_option
@click.option(
    "--pairs",
    type=Pairs(),
    help="Pairs of years for a model of change: gaps in years (1,2) or pairs (2019-2021,...). "
    "[default: all]",
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
    help="Map again, even if already mapped. Also replaces another model's prediction of the "
    "same name.",
)
@collect_options
def predict(
    sites: StoreSites,
    network: ModelOptions,
    options: MapOptions,
    compute: models.Compute,
    scheduler: str | None,
) -> None:
    """Map the chosen cubes with a trained model, and store the maps.

    A model of footprints maps each committed year. A model of change maps pairs of years.
    Site-years that this model has already mapped are skipped: an interrupted run resumes, and a
    finished run does nothing. Each model's prediction has its own name.

    To use several GPUs, start one run per GPU with its own --sites and --device, or use
    --scheduler: each Dask task maps one site, on one CPU thread or on the worker's own --device.

    \b
    Example:
      minecube predict --store cubes.zarr --sites Germany_2 --model model.pt
      minecube predict --store cubes.zarr --model model.pt --name spring-2024
      minecube predict --store cubes.zarr --sites 'Chile_*' --model change.pt --pairs 1,2 --device cuda:1
    """
    store = sites.store
    if scheduler is None:
        compute.find_device()
    mapper = models.Mapper(
        models.find_model(network.model, load_all_models(network.catalog)), compute
    )
    names = sites.names()
    built = [name for name in names if cube.read_markers(store, name)]
    if not built:
        raise CubeError(
            f"{store}: no committed year in {', '.join(names)}; "
            "run `minecube build` until it says built"
        )
    prediction = options.prediction
    if prediction is None:
        prediction = cube.choose_name(store, built, mapper.description, mapper.name)
    options = replace(options, prediction=prediction)
    total = Mapped(0, 0, 0.0)
    start = time.monotonic()
    with connect_workers(scheduler) as pool, progress_bar("mapping", len(built), "sites") as bar:
        if pool is None:
            keep_memory()
            results: Iterator[tuple[str, Mapped]] = (
                _map_here(store, site, mapper, options, bar) for site in built
            )
        else:
            reference = ModelReference(
                network.model, network.catalog, describe_model(mapper), replace(compute, workers=1)
            )
            results = map_on_workers(pool, store, built, reference, options)
        for name, mapped in results:
            place = f"{store}, group {name}/predictions/{prediction}"
            maps = _describe_maps(mapped, mapper)
            click.echo(f"{name}: {maps}; prediction {prediction} ({place})")
            bar.advance(name)
            seconds = time.monotonic() - start
            total = Mapped(total.maps + mapped.maps, total.pixels + mapped.pixels, seconds)
    if len(built) > 1 and total.maps:
        click.echo(f"in all: {total}")
    _exit_if_unbuilt([name for name in names if name not in built])


def _map_here(
    store: cube.Store, site: str, mapper: models.Mapper, options: MapOptions, bar: Bar
) -> tuple[str, Mapped]:
    """Map a site, and show its windows in the bar. Returns its name and the result."""
    start = time.monotonic()

    def show_rate(windows: int, total: int) -> None:
        rate = windows / (time.monotonic() - start)
        bar.show(f"{site}, {windows} of {total} windows, {rate:.0f} windows/s")

    return site, map_site(store, site, mapper, options, show_rate)


def _exit_if_unbuilt(sites: Sequence[str]) -> None:
    """Print the sites without a committed year, and exit with 1 if there are any."""
    if sites:
        click.echo(
            f"not mapped, no committed year: {', '.join(sites)}; "
            "run `minecube build` until it says built",
            err=True,
        )
        click.get_current_context().exit(1)


def _describe_maps(mapped: Mapped, mapper: models.Mapper) -> str:
    if not mapped.maps:
        return "mapped already"
    if mapper.trained.card.task == "change":
        return f"{mapped.maps} pairs mapped, {mapped}"
    return f"{mapped.maps} years mapped, {mapped}"
