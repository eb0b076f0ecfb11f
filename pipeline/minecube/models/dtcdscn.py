"""DTCDSCN: differences of two dates in an SE-ResNet, decoded with spatial and channel attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from minecube.models.blocks import ResNet, SqueezeExcite, siamese


class DTCDSCN(nn.Module):
    """Change detection half of the dual task network of Liu et al. 2020 (arXiv:1909.07726).

    Input: (n, 2, bands, y, x), sides multiples of 32. Output: logits (n, classes, y, x). The other
    half maps buildings per date on the same encoder, with a centre, decoder and head of the same
    shape. It is left out: its output does not affect the change map and has no label here.

    Options: `width` (channels of the encoder's first stage) and `depths` (by default an
    SE-ResNet-34).
    """

    def __init__(
        self, bands: int, classes: int, *, width: int = 64, depths: Sequence[int] = (3, 4, 6, 3)
    ) -> None:
        super().__init__()
        channels = [width * 2**level for level in range(4)]
        self.encoder = ResNet(bands, width, depths, squeeze=True)
        self.centre = _Dilated(channels[3])
        self.decoder = nn.ModuleList(
            _Decode(a, b) for a, b in zip(channels[::-1], [*channels[2::-1], width], strict=True)
        )
        self.head = nn.Sequential(
            nn.ConvTranspose2d(width, width // 2, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width // 2, width // 2, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width // 2, classes, 3, padding=1),
        )

    def forward(self, pair: Tensor) -> Tensor:
        """Return the logits of a pair (n, 2, bands, y, x)."""
        *finer, coarsest = [earlier - later for earlier, later in siamese(self.encoder, pair)]
        x = self.centre(coarsest)
        *decoder, last = self.decoder
        for decode, skip in zip(decoder, reversed(finer), strict=True):
            x = decode(x) + skip
        logits: Tensor = self.head(last(x))
        return logits


class _Dilated(nn.Module):
    """D-LinkNet's centre: sum over a chain of ever wider convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=d, dilation=d) for d in (1, 2, 4, 8)
        )

    def forward(self, x: Tensor) -> Tensor:
        total = x
        for layer in self.layers:
            x = torch.relu(layer(x))
            total = total + x
        return total


class _Decode(nn.Module):
    """Dual attention with a shortcut, then enlargement to twice the size.

    The attention is by channel and by place (Roy et al. 2018, arXiv:1803.02579).
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        inside = inputs // 4
        self.reduce = nn.Sequential(nn.Conv2d(inputs, inside, 1), nn.BatchNorm2d(inside), nn.ReLU())
        self.channel = SqueezeExcite(inside, max(inside // 16, 1))
        self.place = nn.Conv2d(inside, 1, 1, bias=False)
        self.expand = nn.Sequential(
            nn.ConvTranspose2d(inside, inside, 3, stride=2, padding=1, output_padding=1),
            nn.BatchNorm2d(inside),
            nn.ReLU(),
            nn.Conv2d(inside, outputs, 1),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.reduce(x)
        enlarged: Tensor = self.expand(x + self.channel(x) + x * self.place(x).sigmoid())
        return enlarged
