"""A2Net: MobileNetV2 features of neighbouring scales, compared with change-map attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from minecube.catalog import ModelCard
from minecube.errors import ModelError
from minecube.models.blocks import InvertedResidual, convolution, enlarge
from minecube.models.options import build_with_options

_MOBILENET = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Expansion, channels, blocks and stride per stage (Sandler et al. 2018, arXiv:1801.04381, table
2)."""
_FEATURE_STAGES = (1, 2, 4, 6)
"""Stages used as features, at 1/4, 1/8, 1/16 and 1/32 of the size."""


def a2net(card: ModelCard) -> nn.Module:
    """Build A2Net from a card.

    Options: `width` (64) and `encoder`, a factor for MobileNetV2's channels (1).

    Raises:
        ModelError: The classes are not `changed` alone. A2Net does not see the order of the dates.
    """
    if card.classes != ("changed",):
        raise ModelError(
            f"model {card.id}: expected the class changed alone, found {', '.join(card.classes)}; "
            "A2Net sees only how far two dates are apart, not which is the earlier, so it cannot "
            "tell new from removed: take another architecture"
        )
    return build_with_options(card, A2Net)


class A2Net(nn.Module):
    """A2Net of Li et al. 2023 (IEEE TGRS, 10.1109/TGRS.2023.3241436).

    Input: (n, 2, bands, y, x), sides multiples of 32. Output: logits (n, classes, y, x), the same
    for either order of the dates. As in the paper, the maps of coarser scales steer attention.
    Unlike in the paper, these maps are not supervised: there is one loss on one output. The encoder
    starts from random weights, since ImageNet weights are for three bands.
    """

    def __init__(self, bands: int, classes: int, *, width: int = 64, encoder: float = 1.0) -> None:
        super().__init__()
        self.encoder = _MobileNet(bands, encoder)
        channels = [max(int(_MOBILENET[stage][1] * encoder), 1) for stage in _FEATURE_STAGES]
        self.gather = nn.ModuleList(
            _Neighbours(channels[max(i - 1, 0) : i + 2], channels[i], width) for i in range(4)
        )
        self.compare = nn.ModuleList(_Compare(width) for _ in range(4))
        self.attend = nn.ModuleList(_Attend(width) for _ in range(3))
        self.merge = nn.ModuleList(_convolution(width, width) for _ in range(3))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, pair: Tensor) -> Tensor:
        """Return the logits of a pair (n, 2, bands, y, x)."""
        levels = self.encoder(pair.flatten(0, 1))
        differences = []
        for i, (gather, compare) in enumerate(zip(self.gather, self.compare, strict=True)):
            dates = gather(levels[max(i - 1, 0) : i + 2], levels[i]).unflatten(0, (-1, 2))
            differences.append(compare((dates[:, 0] - dates[:, 1]).abs()))
        *finer, x = differences
        for attend, merge, skip in zip(self.attend, self.merge, reversed(finer), strict=True):
            x = merge(skip + enlarge(attend(x), skip))
        return enlarge(self.head(x), pair)


class _MobileNet(nn.Module):
    def __init__(self, bands: int, factor: float) -> None:
        super().__init__()
        inputs = max(int(32 * factor), 1)
        self.stem = convolution(bands, inputs, stride=2, activation=nn.ReLU6)
        self.stages = nn.ModuleList()
        for expansion, channels, depth, stride in _MOBILENET:
            outputs = max(int(channels * factor), 1)
            blocks = [InvertedResidual(inputs, outputs, stride=stride, expansion=expansion)]
            blocks += [
                InvertedResidual(outputs, outputs, expansion=expansion) for _ in range(depth - 1)
            ]
            self.stages.append(nn.Sequential(*blocks))
            inputs = outputs

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        features = []
        for number, stage in enumerate(self.stages):
            x = stage(x)
            if number in _FEATURE_STAGES:
                features.append(x)
        return features


def _convolution(
    inputs: int, outputs: int, dilation: int = 1, *, activation: bool = True
) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, 3, padding=dilation, dilation=dilation),
        nn.BatchNorm2d(outputs),
    ]
    if activation:
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


class _Neighbours(nn.Module):
    """Fusion of one scale with the next finer (pooled) and the next coarser (enlarged)."""

    def __init__(self, channels: list[int], centre: int, width: int) -> None:
        super().__init__()
        self.reduce = nn.ModuleList(_convolution(c, width // 2) for c in channels)
        inside = len(channels) * (width // 2)
        self.fuse = nn.Sequential(
            _convolution(inside, width), _convolution(width, width, activation=False)
        )
        self.shortcut = nn.Conv2d(centre, width, 1)

    def forward(self, levels: list[Tensor], centre: Tensor) -> Tensor:
        neighbours = []
        for reduce, level in zip(self.reduce, levels, strict=True):
            if level.shape[-1] > centre.shape[-1]:
                level = functional.max_pool2d(level, 2)
            neighbours.append(enlarge(reduce(level), centre))
        return torch.relu(self.fuse(torch.cat(neighbours, dim=1)) + self.shortcut(centre))


class _Compare(nn.Module):
    """Difference of two dates, refined by convolutions of dilation 7, 5, 3 and 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.look = nn.ModuleList(
            _convolution(width, width, dilation, activation=False) for dilation in (7, 5, 3, 1)
        )
        self.again = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, difference: Tensor) -> Tensor:
        x = difference
        for look, again in zip(self.look, self.again, strict=True):
            x = torch.relu(again(difference) + look(x))
        return x


class _Attend(nn.Module):
    """Features weighted by a coarse change map and its complement."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.change = nn.Conv2d(width, 1, 1)
        self.weigh = nn.Sequential(nn.Conv2d(2, width, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.refine = _convolution(width, width)

    def forward(self, x: Tensor) -> Tensor:
        change = self.change(x).sigmoid()
        weighted: Tensor = self.refine(x * self.weigh(torch.cat([change, 1 - change], dim=1)))
        return weighted
