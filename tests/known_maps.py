"""Pixels and networks whose map is known."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
import xarray as xr

from minecube import models
from minecube.catalog import BANDS, ModelCard
from minecube.models import TrainedModel

SMALL = ModelCard(
    id="small",
    title="for tests",
    architecture="unet",
    options={"width": 4, "depth": 2},
    window_px=16,
    multiple_px=4,
)
WIDE = dataclasses.replace(SMALL, options={"width": 16, "depth": 3}, window_px=32, multiple_px=8)
CHANGE = dataclasses.replace(SMALL, id="pairs", task="change", classes=("removed", "new"))
SERIES = dataclasses.replace(SMALL, id="years", task="series")
YEARS = (2018, 2019, 2021)


def reflectance(
    seed: int, height: int = 48, width: int = 40, years: tuple[int, ...] = (2019, 2020)
) -> xr.DataArray:
    pixels = np.random.default_rng(seed).integers(
        1, 3000, (len(years), len(BANDS), height, width), dtype=np.uint16
    )
    coords = {
        "year": list(years),
        "band": list(BANDS),
        "y": 5.6e6 - 10.0 * np.arange(height),
        "x": 5e5 + 10.0 * np.arange(width),
    }
    return xr.DataArray(pixels, dims=("year", "band", "y", "x"), coords=coords)


def untrained(card: ModelCard = SMALL) -> TrainedModel:
    torch.manual_seed(0)
    network = models.build(card).eval()
    for module in network.modules():  # statistics as after training, so that all layers matter
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    with torch.no_grad():  # logits of mean 0 and deviation 2, so that probabilities differ
        found = network(torch.randn(4, len(card.bands), card.window_px, card.window_px))
        gain = 2 / found.std()
        network.head.weight *= gain
        network.head.bias.copy_((network.head.bias - found.mean()) * gain)
    n = len(card.bands)
    return TrainedModel(
        card=card, network=network, mean=(1000.0,) * n, std=(500.0,) * n, sites=("a",)
    )


class Network(torch.nn.Module):
    """Any function of the windows."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.functions = [function]  # in a list: a network is not to be a layer of this one
        self.copies = 0

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.functions[0](*inputs)

    def __deepcopy__(self, memo: object) -> Network:
        self.copies += 1
        return self


def given_by(
    function: Callable[..., torch.Tensor],
    card: ModelCard = SMALL,
    kind: type[Network] = Network,
) -> TrainedModel:
    n = len(card.bands)
    return TrainedModel(
        card=card, network=kind(function), mean=(1000.0,) * n, std=(500.0,) * n, sites=()
    )


def pair_of(x: torch.Tensor) -> torch.Tensor:
    """Of single pixels: how much the first band rose, and what it was."""
    return torch.stack([x[:, 1, 0] - x[:, 0, 0], x[:, 0, 0]], dim=1)


def series_of(x: torch.Tensor, _years: torch.Tensor) -> torch.Tensor:
    """Of single pixels: a year's first band less the mean of all."""
    return x[:, :, :1] - x[:, :, :1].mean(dim=1, keepdim=True)


def normal(pixels: np.ndarray) -> np.ndarray:
    return (pixels.astype(np.float64) - 1000) / 500


def stored(logits: np.ndarray) -> np.ndarray:
    return 250 / (1 + np.exp(-logits))


def holes(of: xr.DataArray) -> xr.DataArray:
    of.values[0, 3, 10, 20] = 0
    of.values[1, :, :40, :40] = 0
    return of
