"""A card with trained weights, and a file that must not be opened."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import torch

from minecube import models
from minecube.catalog import ModelCard, Weights
from minecube.models import TrainedModel

CARD = ModelCard(
    id="mine-net",
    title="for tests",
    architecture="unet",
    bands=("B04", "B08"),
    options={"width": 4, "depth": 2},
    window_px=16,
    multiple_px=4,
)
MEAN, STD = (900.0, 2100.0), (300.0, 800.0)


def trained(card: ModelCard = CARD, seed: int = 0) -> TrainedModel:
    torch.manual_seed(seed)
    n = len(card.bands)
    return TrainedModel(
        card=card, network=models.build(card).eval(), mean=MEAN[:n], std=STD[:n], sites=("a", "b")
    )


def with_weights(
    path: Path, href: str | None = None, card: ModelCard = CARD, **more: object
) -> ModelCard:
    """The card, whose weights are this file's, at this URL."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    return dataclasses.replace(card, weights=Weights(href=href or str(path), sha256=found, **more))


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


class Evil:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)
