"""Train a network on sites of a store: the job of `minecube train`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from minecube import cube, train
from minecube.catalog import ModelCard, TrainingSettings
from minecube.device import find_device
from minecube.places import Place

_VIEWS = {"mapping": "year", "change": "pair", "series": "series"}
"""Task of a model -> years of one training window."""


def train_network(
    store: cube.Store,
    train_sites: Sequence[str],
    valid_sites: Sequence[str],
    card: ModelCard,
    settings: TrainingSettings,
    run: train.TrainingOptions,
) -> train.TrainingResult:
    """Train a network on labelled sites of a store.

    The F1 of the validation sites, if any, chooses the best epoch.

    Raises:
        CubeError: a site has no committed year.
        ModelError: the network does not fit the cubes, or the checkpoint is of another training.
        LabelError: no training site has a label.
    """
    view = _VIEWS[card.task]
    source = cube.CubeDataset(store, train_sites, view=view)
    valid = None
    if valid_sites:
        valid = cube.CubeDataset(store, valid_sites, view=view)
    return train.fit(card, source, valid, settings, run)


def checkpoint_path(model: Place) -> Place:
    """Return the path or URL of the training state for a model file."""
    return model.with_name(f"{model.name}.ckpt")


@contextmanager
def join_process_group(device: str) -> Iterator[tuple[str, bool]]:
    """Yield this process's device, and whether its rank is 0.

    Joins the process group if torchrun started this process (`LOCAL_RANK` is set).

    Raises ModelError if the device is missing.
    """
    if "LOCAL_RANK" not in os.environ:
        yield device, True
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    backend = "gloo"
    if find_device(device).type == "cuda":
        backend = "nccl"
        torch.cuda.set_device(device)
    dist.init_process_group(backend)
    try:
        yield device, dist.get_rank() == 0
    finally:
        dist.destroy_process_group()
