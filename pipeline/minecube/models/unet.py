"""U-Net."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn


class UNet(nn.Module):
    """U-Net of Ronneberger, Fischer and Brox 2015 (arXiv:1505.04597).

    Convolutions are padded and have batch normalisation. Input: (n, bands, y, x) float32, sides
    multiples of 2 ** depth. Output: logits (n, classes, y, x).

    Options: `width` (channels of the first level) and `depth` (number of halvings).
    """

    def __init__(self, bands: int, classes: int, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        channels = [width * 2**level for level in range(depth + 1)]
        steps = list(itertools.pairwise(channels))
        self.inlet = _two_convolutions(bands, width)
        self.down = nn.ModuleList(
            nn.Sequential(nn.MaxPool2d(2), _two_convolutions(a, b)) for a, b in steps
        )
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in reversed(steps))
        self.merge = nn.ModuleList(_two_convolutions(2 * a, a) for a, _ in reversed(steps))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of (n, bands, y, x)."""
        skipped = [self.inlet(x)]
        for down in self.down:
            skipped.append(down(skipped[-1]))
        x = skipped.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([skipped.pop(), up(x)], dim=1))
        logits: Tensor = self.head(x)
        return logits


def _two_convolutions(inputs: int, outputs: int) -> nn.Sequential:
    # Batch, not group normalisation: bright ground is a matter of absolute reflectance.
    layers: list[nn.Module] = []
    for a, b in ((inputs, outputs), (outputs, outputs)):
        layers += [
            nn.Conv2d(a, b, 3, padding=1, bias=False),
            nn.BatchNorm2d(b),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)
