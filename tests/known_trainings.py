"""Cards, cubes and networks of which a training is quick."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import nn

from minecube.catalog import BANDS, ModelCard, TrainingSettings
from minecube.train import Cubes

SMALL = ModelCard(
    id="small",
    title="for tests",
    architecture="unet",
    options={"width": 4, "depth": 2},
    window_px=16,
    multiple_px=4,
)
CHANGE = dataclasses.replace(SMALL, id="pairs", task="change", classes=("removed", "new"))
SERIES = dataclasses.replace(SMALL, id="all-years", task="series")
PLAIN = TrainingSettings(id="plain", title="for tests", epochs=3, batch=8, learning_rate=3e-3)


def cube(
    seed: int, height: int = 48, width: int = 40, years: tuple[int, ...] = (2019, 2020)
) -> xr.Dataset:
    """Bright discs, the mines, in dim noise; another disc each year."""
    r = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    mine = np.stack(
        [
            np.hypot(y - r.uniform(0.3, 0.7) * height, x - r.uniform(0.3, 0.7) * width)
            < r.uniform(8, 14)
            for _ in years
        ]
    )
    pixels = r.normal(1000, 150, (len(years), len(BANDS), height, width)) + 900 * mine[:, None]
    return xr.Dataset(
        {
            "reflectance": (("year", "band", "y", "x"), np.clip(pixels, 1, None).astype(np.uint16)),
            "footprint": (("year", "y", "x"), mine.astype(np.uint8)),
        },
        coords={"year": list(years), "band": list(BANDS)},
    )


def with_holes(
    seed: int, height: int = 48, width: int = 40, years: tuple[int, ...] = (2019, 2020)
) -> xr.Dataset:
    """The same with unknown labels and unobserved pixels, some in one band only."""
    of, r = cube(seed, height, width, years), np.random.default_rng(seed)
    of.footprint.values[r.random(of.footprint.shape) < 0.1] = 255
    of.reflectance.values[r.random(of.reflectance.shape) < 0.01] = 0
    return of


def labels_of(of: xr.Dataset) -> np.ndarray:
    """What is both labelled and observed, the rest 255."""
    return np.where((of.reflectance.values > 0).all(axis=1), of.footprint.values, 255)


def weights(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(v, w) for (a, v), (b, w) in pairs)


class Flat(nn.Module):
    """A network of each task without batch normalisation: a pixel's bands, and for pairs those of both years."""

    def __init__(self, card: ModelCard) -> None:
        super().__init__()
        self.task = card.task
        inputs = len(card.bands) * (2 if card.task == "change" else 1)
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, len(card.classes), 1)
        )

    def forward(self, x: torch.Tensor, _years: torch.Tensor | None = None) -> torch.Tensor:
        if self.task == "mapping":
            return self.layers(x)
        if self.task == "change":
            return self.layers(x.flatten(1, 2))
        return self.layers(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def corner(height: int = 60, width: int = 70) -> xr.Dataset:
    """A mine of 5 x 3 pixels in the far corner, in one of two years."""
    of = cube(1, height, width)
    of.footprint.values[...] = 0
    of.footprint.values[1, -5:, -3:] = 1
    return of


def with_dropout(card: ModelCard) -> nn.Module:
    """Batch normalisation and random numbers of torch's own: all that a state has to know of."""
    first = nn.Conv2d(len(card.bands), 6, 3, padding=1)
    return nn.Sequential(
        first, nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout2d(0.3), nn.Conv2d(6, len(card.classes), 1)
    )


@dataclasses.dataclass(frozen=True)
class Recorded(Cubes):
    """Notes the site, years, row, column and size of each cut."""

    cuts: list[tuple[Any, ...]] = dataclasses.field(default_factory=list)

    def cut(self, *args: Any) -> Any:
        self.cuts.append(args)
        return super().cut(*args)


class Unforkable(Cubes):
    """A source whose processes are started afresh."""

    forkable = False
