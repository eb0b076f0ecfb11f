"""What several networks are made of: convolutions with their normalisation, residual blocks, squeeze-and-excitation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


def convolution(
    inputs: int,
    outputs: int,
    kernel: int = 3,
    *,
    stride: int = 1,
    groups: int = 1,
    activation: Callable[[], nn.Module] | None = nn.ReLU,
) -> nn.Sequential:
    """Padded convolution without bias, batch normalisation, and an activation if any."""
    convolved = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    layers: list[nn.Module] = [convolved, nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, *([activation()] if activation else []))


def siamese(encoder: nn.Module, pair: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What the encoder gives, level by level, for the first date and for the second of (n, 2, band, y, x).

    Both dates pass in one batch, so that in training they are normalised by the same statistics.
    """
    levels: list[Tensor] = encoder(pair.flatten(0, 1))
    return [(both[:, 0], both[:, 1]) for both in (torch.unflatten(level, 0, (-1, 2)) for level in levels)]


def enlarge(x: Tensor, like: Tensor) -> Tensor:
    """Bilinear, to the height and width of `like`."""
    return functional.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


class Pyramid(nn.Module):
    """Blocks one after another, with the image halved (by maxima) between them; gives what each block gives."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> list[Tensor]:
        """One tensor a block, the finest first."""
        found: list[Tensor] = []
        for block in self.blocks:
            found.append(block(functional.max_pool2d(found[-1], 2) if found else x))
        return found


class SqueezeExcite(nn.Module):
    """Hu, Shen and Sun 2018 (arXiv:1709.01507): channels weighted by a small network of their means.

    With `maximum`, of their maxima too, as in the channel attention of Woo et al. 2018 (arXiv:1807.06521).
    """

    def __init__(
        self,
        channels: int,
        hidden: int,
        *,
        bias: bool = False,
        maximum: bool = False,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        self.maximum = maximum
        self.weigh = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=bias), activation(), nn.Conv2d(hidden, channels, 1, bias=bias)
        )

    def gate(self, x: Tensor) -> Tensor:
        """Weights in 0..1, (n, channel, 1, 1)."""
        weight: Tensor = self.weigh(x.mean((2, 3), keepdim=True))
        if self.maximum:
            weight = weight + self.weigh(x.amax((2, 3), keepdim=True))
        return weight.sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """The weighted channels."""
        return x * self.gate(x)


class BasicBlock(nn.Module):
    """Two convolutions beside a shortcut (He et al. 2016, arXiv:1512.03385), with squeeze-and-excitation if wanted."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1, squeeze: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(
            convolution(inputs, outputs, stride=stride),
            convolution(outputs, outputs, activation=None),
            SqueezeExcite(outputs, max(outputs // 16, 1)) if squeeze else nn.Identity(),
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else convolution(inputs, outputs, 1, stride=stride, activation=None)

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, y, x) -> (n, outputs, y / stride, x / stride)."""
        return torch.relu(self.body(x) + self.shortcut(x))


class Stages(nn.Module):
    """A stem, and stages one after another; gives what each stage gives."""

    def __init__(self, stem: nn.Module, stages: Iterable[nn.Module]) -> None:
        super().__init__()
        self.stem, self.stages = stem, nn.ModuleList(stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        """One tensor a stage, the finest first."""
        x = self.stem(x)
        found = []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found


class ResNet(Stages):
    """The residual network of basic blocks: `depths` (2, 2, 2, 2) and `width` 64 are ResNet-18, (3, 4, 6, 3) is ResNet-34.

    Gives its stages' features, width x 1, 2, 4, ... channels at a 4th, 8th, 16th, ... of the size; at the same size as
    the stage before where `strides` says 1.
    """

    def __init__(
        self, bands: int, width: int, depths: Sequence[int], *, strides: Sequence[int] = (1, 2, 2, 2), squeeze: bool = False
    ) -> None:
        stem = nn.Sequential(convolution(bands, width, 7, stride=2), nn.MaxPool2d(3, 2, 1))
        stages, channels = [], width
        for level, depth in enumerate(depths):
            outputs = width * 2**level
            blocks = [BasicBlock(channels, outputs, stride=strides[level], squeeze=squeeze)]
            blocks += [BasicBlock(outputs, outputs, squeeze=squeeze) for _ in range(depth - 1)]
            stages.append(nn.Sequential(*blocks))
            channels = outputs
        super().__init__(stem, stages)


class InvertedResidual(nn.Module):
    """A depth-wise convolution among more channels than it takes and gives (Sandler et al. 2018, arXiv:1801.04381).

    With `squeeze`, a quarter of the input channels, as in EfficientNet (Tan and Le 2019, arXiv:1905.11946).
    """

    def __init__(
        self, inputs: int, outputs: int, *, stride: int = 1, expansion: int = 6, kernel: int = 3, squeeze: bool = False
    ) -> None:
        super().__init__()
        activation = nn.SiLU if squeeze else nn.ReLU6
        inside = inputs * expansion
        self.body = nn.Sequential(
            convolution(inputs, inside, 1, activation=activation) if expansion > 1 else nn.Identity(),
            convolution(inside, inside, kernel, stride=stride, groups=inside, activation=activation),
            SqueezeExcite(inside, max(inputs // 4, 1), bias=True, activation=nn.SiLU) if squeeze else nn.Identity(),
            convolution(inside, outputs, 1, activation=None),
        )
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, y, x) -> (n, outputs, y / stride, x / stride)."""
        found: Tensor = self.body(x)
        return x + found if self.shortcut else found
