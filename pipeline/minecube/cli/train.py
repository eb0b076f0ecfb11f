"""Subcommand train: train a network on labelled cubes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from minecube import models
from minecube import train as training
from minecube.catalog import ModelCard, TrainingSettings, pick
from minecube.cli.bars import progress_bar
from minecube.cli.options import (
    StoreSites,
    add_layer,
    catalog_option,
    collect_options,
    device_option,
    sites_option,
    store_option,
    training_seed_option,
)
from minecube.cli.parameters import OutFile
from minecube.errors import CatalogError, ModelError
from minecube.jobs.catalogs import load_all_models, load_all_presets
from minecube.jobs.selection import SiteChoice, stored_sites
from minecube.jobs.train import checkpoint_path, join_process_group, train_network
from minecube.places import Place

MOST_WORKERS = 256
"""Most processes to cut windows. All are forked immediately, and each takes memory."""


@dataclass(frozen=True)
class NetworkOptions:
    """Network and training settings: --model, --preset, --epochs and --catalog."""

    model_id: str
    preset_id: str
    epochs: int | None
    catalog: Place | None

    def card(self) -> ModelCard:
        """Return the card of the network."""
        return pick(load_all_models(self.catalog), self.model_id, "model")

    def settings(self) -> TrainingSettings:
        """Return the settings of the preset, with the given number of epochs."""
        settings = pick(load_all_presets(self.catalog), self.preset_id, "preset")
        return dataclasses.replace(settings, epochs=self.epochs or settings.epochs)


@click.command()
@store_option
@sites_option
@click.option(
    "--valid",
    callback=add_layer,
    help="Names of validation sites, comma-separated, * allowed. Their F1 chooses the best "
    "epoch. They are not trained on.",
)
@catalog_option
@click.option(
    "--model",
    "model_id",
    default="unet-small",
    show_default=True,
    help="Network to train (catalog/models.yaml).",
)
@click.option(
    "--preset",
    "preset_id",
    default="default",
    show_default=True,
    help="Training settings (catalog/presets.yaml).",
)
@click.option(
    "--out",
    type=OutFile(),
    required=True,
    help="File for the trained model, such as model.pt. The checkpoint and the "
    "table of epochs are written next to it.",
)
@click.option(
    "--epochs", type=click.IntRange(min=1), help="Number of epochs. [default: the preset's]"
)
@training_seed_option
@device_option
@click.option(
    "--workers",
    type=click.IntRange(0, MOST_WORKERS),
    default=0,
    show_default=True,
    help="Number of processes that load windows.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Resume from <out>.ckpt, if it exists. The result is the same as without the "
    "interruption.",
)
@collect_options
def train(
    sites: StoreSites,
    valid: SiteChoice | None,
    network: NetworkOptions,
    out: Place,
    run: training.TrainingOptions,
) -> None:
    """Train a network on all labelled site-years of the chosen cubes.

    Split by site: never train on a site that you will score. After each epoch, the state is saved
    in <out>.ckpt and a line is added to <out>.csv. For several GPUs, start the command with
    torchrun: each process takes a part of every batch.

    \b
    Example:
      minecube train --store cubes.zarr --sites 'Germany_*' --valid 'Spain_*' --preset cpu --out model.pt
      torchrun --nproc-per-node 4 --no-python minecube train --store cubes.zarr --device cuda --out model.pt
    """
    card = network.card()
    settings = network.settings()
    valid_sites: list[str] = []
    if valid:
        valid_sites = stored_sites(sites.store, valid)
    train_sites = [name for name in sites.names() if name not in valid_sites]
    if not train_sites:
        raise CatalogError(
            f"--sites {sites.choice}: no site is left to learn from, "
            f"because --valid {valid} names them all"
        )
    if isinstance(out, Path) and not out.absolute().parent.is_dir():
        raise ModelError(
            f"{out}: its folder is not there, so the model could not be written; make it first"
        )
    with (
        join_process_group(run.device) as (device, is_main),
        progress_bar(f"training {card.id}", shown=is_main) as bar,
    ):
        run = dataclasses.replace(
            run, checkpoint=checkpoint_path(out), device=device, progress=bar.reach
        )
        fitted = train_network(sites.store, train_sites, valid_sites, card, settings, run)
    if is_main:
        models.save(fitted.trained, out)
        _print_result(fitted, out, train_sites, valid_sites)


def _print_result(
    fitted: training.TrainingResult,
    out: Place,
    train_sites: Sequence[str],
    valid_sites: Sequence[str],
) -> None:
    best = fitted.best
    score = ""
    if valid_sites:
        score = f", F1 {best.f1:.3f} and IoU {best.iou:.3f} on {', '.join(valid_sites)}"
    click.echo(
        f"{out}: {fitted.trained.card.id} trained on {', '.join(train_sites)}; "
        f"epoch {best.epoch} of {len(fitted.history)}{score}"
    )
    click.echo(
        f"see {out}.csv for the log; {out}.ckpt, the state to go on from, is no longer needed"
    )
