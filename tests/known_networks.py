"""Small networks of change and of series, and data for them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from minecube import models
from minecube.catalog import load_models
from minecube.models.series import SeriesAttention

CARDS = load_models()
CHANGE = [
    name for name, card in CARDS.items() if card.task == "change" and not name.endswith("-small")
]
TINY: dict[str, dict[str, Any]] = {
    "fc-ef": {"width": 4},
    "fc-siam-conc": {"width": 4},
    "fc-siam-diff": {"width": 4},
    "snunet": {"width": 4},
    "bit": {"width": 8, "depth": 1, "head": 4},
    "changeformer": {"widths": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "width": 8},
    "tinycd": {"widths": [12, 8, 8, 12], "depths": [1, 1, 1], "decoder": [12, 12, 8]},
    "a2net": {"width": 8, "encoder": 0.25},
    "dtcdscn": {"width": 8, "depths": [1, 1, 1, 1]},
    "changefft": {"width": 8, "depths": [1, 1, 1, 1], "head": 8},
}
"""Options with which a test is quick."""


def tiny(name: str, *, seed: int = 0, **changes: Any) -> nn.Module:
    torch.manual_seed(seed)
    options = {**TINY[name], **({"dropout": 0} if name.startswith("fc-") else {})}
    return models.build(dataclasses.replace(CARDS[name], options=options, **changes))


def settled(network: nn.Module) -> nn.Module:
    """In evaluation mode, with statistics as after training, so that all layers matter."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(
                torch.rand(module.running_mean.shape, generator=generator) - 0.5
            )
            module.running_var.copy_(
                torch.rand(module.running_var.shape, generator=generator) + 0.5
            )
    return network.eval()


def fitted(
    network: nn.Module, images: torch.Tensor, labels: torch.Tensor, steps: int, rate: float = 5e-3
) -> list[float]:
    optimiser = torch.optim.Adam(network.parameters(), rate)
    losses = []
    for _ in range(steps):
        loss = nn.functional.binary_cross_entropy_with_logits(network(images), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def series(seed: int = 0, **changes: Any) -> SeriesAttention:
    torch.manual_seed(seed)
    options = {"width": 4, "depth": 2, "heads": 2, "layers": 1, **changes}
    return SeriesAttention(10, 1, **options)


def images(n: int, years: int, side: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, years, 10, side, side, generator=torch.Generator().manual_seed(seed))
