"""Subcommand train: train a network on labelled cubes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist

from minecube import cube, models
from minecube import train as training
from minecube.catalog import ModelCard, Settings, pick
from minecube.cli import common
from minecube.cli.common import (
    SEED,
    OutFile,
    SiteChoice,
    catalog_option,
    progress_bar,
    sites_option,
    store_option,
    stored_sites,
    with_layer,
)
from minecube.device import device_of
from minecube.errors import CatalogError, ModelError

MOST_WORKERS = 256
"""Most processes to cut windows. All are forked immediately, and each takes memory."""


@click.command()
@store_option
@sites_option
@click.option(
    "--valid",
    callback=with_layer,
    help="Names of validation sites, comma-separated, * allowed. Their F1 chooses the best epoch. They are not trained on.",
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
@click.option("--out", type=OutFile(), required=True, help="File for the trained model.")
@click.option(
    "--epochs", type=click.IntRange(min=1), help="Number of epochs. [default: the preset's]"
)
@click.option(
    "--seed",
    type=SEED,
    default=0,
    show_default=True,
    help="Seed of weights, windows and augmentation.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
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
    help="Resume from <out>.ckpt, if it exists. The result is the same as without the interruption.",
)
def train(
    store: cube.Store,
    wanted: SiteChoice,
    valid: SiteChoice | None,
    catalog: Path | None,
    model_id: str,
    preset_id: str,
    out: Path,
    epochs: int | None,
    **how: Any,
) -> None:
    """Train a network on all labelled site-years of the chosen cubes.

    Split by site: never train on a site that you will score. After each epoch, the state is saved in
    <out>.ckpt and a line is added to <out>.csv. For several GPUs, start the command with torchrun: each
    process takes a part of every batch.

    \b
    Example:
      minecube train --store cubes.zarr --sites 'Germany_*' --valid 'Spain_*' --preset cpu --out model.pt
      torchrun --nproc-per-node 4 --no-python minecube train --store cubes.zarr --device cuda --out model.pt
    """
    card, settings = (
        pick(common.models(catalog), model_id, "model"),
        pick(common.presets(catalog), preset_id, "preset"),
    )
    settings = dataclasses.replace(settings, epochs=epochs or settings.epochs)
    judged = stored_sites(store, valid) if valid else []
    learnt = [name for name in stored_sites(store, wanted) if name not in judged]
    if not learnt:
        raise CatalogError(
            f"--sites {wanted}: no site is left to learn from, for --valid {valid} names them all"
        )
    if not out.absolute().parent.is_dir():
        raise ModelError(
            f"{out}: its folder is not there, so the model could not be written; make it first"
        )
    with _processes(how.pop("device")) as (device, first):
        fitted = train_network(
            store,
            learnt,
            judged,
            card,
            settings,
            training.Run(checkpoint=state_of(out), device=device, **how),
        )
    if not first:
        return
    models.save(fitted.trained, out)
    best = fitted.best
    score = f", F1 {best.f1:.3f} and IoU {best.iou:.3f} on {', '.join(judged)}" if judged else ""
    click.echo(
        f"{out}: {card.id} trained on {', '.join(learnt)}; epoch {best.epoch} of {len(fitted.history)}{score}"
    )
    click.echo(
        f"see {out}.csv for the log; {out}.ckpt, the state to go on from, is no longer needed"
    )


def train_network(
    store: cube.Store,
    learnt: Sequence[str],
    judged: Sequence[str],
    card: ModelCard,
    settings: Settings,
    run: training.Run,
) -> training.Fitted:
    """Train a network on sites of a store, and validate it on others, with a progress bar.

    Raises as `train.fit` does.
    """
    view = {"mapping": "year", "change": "pair", "series": "series"}[card.task]
    source = cube.CubeDataset(store, learnt, view=view)
    valid = cube.CubeDataset(store, judged, view=view) if judged else None
    with progress_bar(f"training {card.id}") as advance:
        seen = 0

        def progress(done: int, steps: int, note: str) -> None:
            nonlocal seen
            advance(n=done - seen, note=note, total=steps)
            seen = done

        return training.fit(
            card, source, valid, settings, dataclasses.replace(run, progress=progress)
        )


def state_of(out: Path) -> Path:
    """Return the path of the training state for a model file."""
    return out.with_name(f"{out.name}.ckpt")


@contextmanager
def _processes(device: str) -> Iterator[tuple[str, bool]]:
    """Yield this process's device, and whether its rank is 0.

    Joins the process group under torchrun.
    """
    if "LOCAL_RANK" not in os.environ:
        yield device, True
        return
    own = f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device
    gpu = device_of(own).type == "cuda"
    if gpu:
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if gpu else "gloo")
    try:
        yield own, dist.get_rank() == 0
    finally:
        dist.destroy_process_group()
