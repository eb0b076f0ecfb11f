"""Building blocks shared by networks: convolutions, residual blocks, squeeze-and-excitation."""

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
    """Build a padded convolution without bias, batch normalisation and an optional activation."""
    convolved = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    layers: list[nn.Module] = [convolved, nn.BatchNorm2d(outputs)]
    if activation:
        layers.append(activation())
    return nn.Sequential(*layers)


def siamese(encoder: nn.Module, pair: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Encode both dates of (n, 2, band, y, x) and return their features per level.

    Both dates pass in one batch. In training they share the normalisation statistics.
    """
    dates = [torch.unflatten(level, 0, (-1, 2)) for level in encoder(pair.flatten(0, 1))]
    return [(level[:, 0], level[:, 1]) for level in dates]


def enlarge(x: Tensor, like: Tensor) -> Tensor:
    """Resize bilinearly to the height and width of `like`."""
    return functional.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Attend from (n, a, channel) to (n, b, channel) by several heads; returns (n, a, channel)."""
    by_head = (torch.unflatten(x, -1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    queries, keys, values = by_head
    attended = functional.scaled_dot_product_attention(queries, keys, values)
    return attended.transpose(1, 2).flatten(2)


class Pyramid(nn.Module):
    """Chain of blocks with 2 x 2 max pooling between them; returns all blocks' outputs."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return one tensor per block, the finest first."""
        finest, *coarser = self.blocks
        levels: list[Tensor] = [finest(x)]
        for block in coarser:
            levels.append(block(functional.max_pool2d(levels[-1], 2)))
        return levels


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation of Hu, Shen and Sun 2018 (arXiv:1709.01507).

    A small network weights the channels by their means. With `maximum` it also uses their maxima,
    as the channel attention of Woo et al. 2018 (arXiv:1807.06521).
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
            nn.Conv2d(channels, hidden, 1, bias=bias),
            activation(),
            nn.Conv2d(hidden, channels, 1, bias=bias),
        )

    def gate(self, x: Tensor) -> Tensor:
        """Return the channel weights in 0..1, (n, channel, 1, 1)."""
        weight: Tensor = self.weigh(x.mean((2, 3), keepdim=True))
        if self.maximum:
            weight = weight + self.weigh(x.amax((2, 3), keepdim=True))
        return weight.sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """Weight the channels."""
        return x * self.gate(x)


class BasicBlock(nn.Module):
    """Two convolutions with a shortcut (He et al. 2016, arXiv:1512.03385).

    Squeeze-and-excitation is optional.
    """

    def __init__(
        self, inputs: int, outputs: int, *, stride: int = 1, squeeze: bool = False
    ) -> None:
        super().__init__()
        self.body = nn.Sequential(
            convolution(inputs, outputs, stride=stride),
            convolution(outputs, outputs, activation=None),
            SqueezeExcite(outputs, max(outputs // 16, 1)) if squeeze else nn.Identity(),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = convolution(inputs, outputs, 1, stride=stride, activation=None)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, inputs, y, x) to (n, outputs, y / stride, x / stride)."""
        return torch.relu(self.body(x) + self.shortcut(x))


class Stages(nn.Module):
    """Stem and chain of stages; returns all stages' outputs."""

    def __init__(self, stem: nn.Module, stages: Iterable[nn.Module]) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return one tensor per stage, the finest first."""
        x = self.stem(x)
        levels = []
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        return levels


class ResNet(Stages):
    """Residual network of basic blocks.

    With `width` 64, `depths` (2, 2, 2, 2) give ResNet-18 and (3, 4, 6, 3) ResNet-34. Stages have
    width x 1, 2, 4, ... channels at 1/4, 1/8, 1/16, ... of the size. A stride of 1 keeps the size
    of the stage before.
    """

    def __init__(
        self,
        bands: int,
        width: int,
        depths: Sequence[int],
        *,
        strides: Sequence[int] = (1, 2, 2, 2),
        squeeze: bool = False,
    ) -> None:
        stem = nn.Sequential(convolution(bands, width, 7, stride=2), nn.MaxPool2d(3, 2, 1))
        stages = []
        channels = width
        for level, depth in enumerate(depths):
            outputs = width * 2**level
            blocks = [BasicBlock(channels, outputs, stride=strides[level], squeeze=squeeze)]
            blocks += [BasicBlock(outputs, outputs, squeeze=squeeze) for _ in range(depth - 1)]
            stages.append(nn.Sequential(*blocks))
            channels = outputs
        super().__init__(stem, stages)


class InvertedResidual(nn.Module):
    """Depth-wise convolution on expanded channels (Sandler et al. 2018, arXiv:1801.04381).

    `squeeze` adds squeeze-and-excitation with a quarter of the input channels, and SiLU, as in
    EfficientNet (Tan and Le 2019, arXiv:1905.11946).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        stride: int = 1,
        expansion: int = 6,
        kernel: int = 3,
        squeeze: bool = False,
    ) -> None:
        super().__init__()
        inside = inputs * expansion
        activation: Callable[[], nn.Module] = nn.SiLU if squeeze else nn.ReLU6
        expand: nn.Module = nn.Identity()
        weigh: nn.Module = nn.Identity()
        if expansion > 1:
            expand = convolution(inputs, inside, 1, activation=activation)
        depthwise = convolution(
            inside, inside, kernel, stride=stride, groups=inside, activation=activation
        )
        if squeeze:
            weigh = SqueezeExcite(inside, max(inputs // 4, 1), bias=True, activation=nn.SiLU)
        self.body = nn.Sequential(
            expand, depthwise, weigh, convolution(inside, outputs, 1, activation=None)
        )
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, inputs, y, x) to (n, outputs, y / stride, x / stride)."""
        features: Tensor = self.body(x)
        if self.shortcut:
            return x + features
        return features
