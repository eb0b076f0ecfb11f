"""TinyCD: the first stages of an EfficientNet, and masks of their mixed features."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from minecube.models.blocks import InvertedResidual, Stages, convolution, siamese


class TinyCD(nn.Module):
    """TinyCD of Codegoni, Lombardi and Ferrari 2022 (arXiv:2207.13159).

    Input: (n, 2, bands, y, x), sides multiples of 8. Output: logits (n, classes, y, x). Default
    widths and depths are EfficientNet-b4's. The encoder starts from random weights, since ImageNet
    weights are for three bands. It has no stochastic depth.

    Options: `widths` of the encoder's stem and three stages, `depths` of the stages, `decoder`
    widths.
    """

    def __init__(
        self,
        bands: int,
        classes: int,
        *,
        widths: Sequence[int] = (48, 24, 32, 56),
        depths: Sequence[int] = (2, 4, 4),
        decoder: Sequence[int] = (64, 64, 32),
    ) -> None:
        super().__init__()
        self.encoder = _encoder(bands, widths, depths)
        self.masks = nn.ModuleList(
            [_mask(bands, 10, 5), *(_mask(w, w // 2, w // 4) for w in widths[1:3])]
        )
        self.mix = _mix(widths[3])
        self.up = nn.ModuleList(
            _separable(a, b) for a, b in zip([widths[3], *decoder], decoder, strict=False)
        )
        last = decoder[-1]
        self.head = nn.Sequential(
            _pointwise(last, last // 2, last // 4), nn.Conv2d(last // 4, classes, 1)
        )

    def forward(self, pair: Tensor) -> Tensor:
        """Return the logits of a pair (n, 2, bands, y, x)."""
        *levels, deepest = [(pair[:, 0], pair[:, 1]), *siamese(self.encoder, pair)]
        x = self.mix(_interleave(*deepest))
        for up, mask, dates in zip(self.up, reversed(self.masks), reversed(levels), strict=True):
            size = dates[0].shape[-2:]
            x = up(
                functional.interpolate(x, size, mode="bilinear", align_corners=True)
                * mask(_interleave(*dates))
            )
        logits: Tensor = self.head(x)
        return logits


def _encoder(bands: int, widths: Sequence[int], depths: Sequence[int]) -> Stages:
    """Build the first three stages of an EfficientNet, at 1/2, 1/4 and 1/8 of the size."""
    stages = []
    forms = ((1, 1, 3), (2, 6, 3), (2, 6, 5))  # stride, expansion and kernel per stage
    for inputs, outputs, depth, (stride, expansion, kernel) in zip(
        widths, widths[1:], depths, forms, strict=False
    ):
        block = partial(InvertedResidual, expansion=expansion, kernel=kernel, squeeze=True)
        blocks = [block(inputs, outputs, stride=stride)]
        blocks += [block(outputs, outputs) for _ in range(depth - 1)]
        stages.append(nn.Sequential(*blocks))
    return Stages(convolution(bands, widths[0], stride=2, activation=nn.SiLU), stages)


def _interleave(earlier: Tensor, later: Tensor) -> Tensor:
    """Alternate the channels of two dates, so a grouped convolution mixes counterparts."""
    return torch.stack([earlier, later], dim=2).flatten(1, 2)


def _mix(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2 * channels, channels, 3, padding=1, groups=channels),
        nn.PReLU(),
        nn.InstanceNorm2d(channels),
    )


def _mask(channels: int, *hidden: int) -> nn.Sequential:
    return nn.Sequential(_mix(channels), _pointwise(channels, *hidden, 1))


def _pointwise(*channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(channels):
        layers += [nn.Conv2d(inputs, outputs, 1), nn.PReLU()]
    return nn.Sequential(*layers)


def _separable(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs),
        nn.PReLU(),
        nn.InstanceNorm2d(inputs),
        nn.Conv2d(inputs, outputs, 1),
        nn.PReLU(),
        nn.InstanceNorm2d(outputs),
    )
