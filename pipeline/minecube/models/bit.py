"""BIT: compare two dates through a few tokens per date."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from minecube.models.blocks import ResNet, attend, convolution, siamese

_HEADS = 8


class BIT(nn.Module):
    """Bitemporal image transformer of Chen, Qi and Shi 2021 (arXiv:2103.00208).

    Input: (n, 2, bands, y, x), sides multiples of 8. Output: logits (n, classes, y, x). The
    ResNet-18 lacks its last stage, and its third stage keeps the resolution (S4 in the paper).
    There are 32 channels, 4 tokens per date and 8 heads. Attention is scaled by the head size, as
    in the paper's formula. The authors' code scales by the channels. Unlike there, each class has
    one logit without softmax, and weights start at random.

    Options: `width` (channels of the ResNet-18's first stage), `depth` (of the decoder) and `head`
    (size of a decoder head).
    """

    def __init__(
        self, bands: int, classes: int, *, width: int = 64, depth: int = 8, head: int = 8
    ) -> None:
        super().__init__()
        channels = 32
        tokens = 4
        self.encoder = ResNet(bands, width, (2, 2, 2), strides=(1, 2, 1))
        self.reduce = nn.Conv2d(4 * width, channels, 3, padding=1)
        self.tokenise = nn.Conv2d(channels, tokens, 1, bias=False)
        self.position = nn.Parameter(torch.randn(1, 2 * tokens, channels))
        self.context = _Layer(channels, 64)
        self.decoder = nn.ModuleList(_Layer(channels, head) for _ in range(depth))
        self.head = nn.Sequential(
            convolution(channels, channels), nn.Conv2d(channels, classes, 3, padding=1)
        )

    def forward(self, pair: Tensor) -> Tensor:
        """Return the logits of a pair (n, 2, bands, y, x)."""
        features = [
            self.reduce(functional.interpolate(date, scale_factor=2))
            for date in siamese(self.encoder, pair)[-1]
        ]
        tokens = torch.cat([self._tokens(x) for x in features], dim=1) + self.position
        tokens = self.context(tokens, tokens)
        decoded = []
        for x, words in zip(features, tokens.chunk(2, dim=1), strict=True):
            pixels = x.flatten(2).transpose(1, 2)
            for layer in self.decoder:
                pixels = layer(pixels, words)
            decoded.append(pixels.transpose(1, 2).reshape(x.shape))
        difference = (decoded[0] - decoded[1]).abs()
        logits: Tensor = self.head(
            functional.interpolate(difference, scale_factor=4, mode="bilinear", align_corners=False)
        )
        return logits

    def _tokens(self, x: Tensor) -> Tensor:
        weight: Tensor = self.tokenise(x).flatten(2).softmax(dim=-1)
        return weight @ x.flatten(2).transpose(1, 2)


class _Layer(nn.Module):
    """Attention from (n, a, channel) to (n, b, channel), then a perceptron.

    Each follows a normalisation and has a shortcut.
    """

    def __init__(self, channels: int, head: int) -> None:
        super().__init__()
        self.before = nn.LayerNorm(channels)
        self.middle = nn.LayerNorm(channels)
        self.query, self.key, self.value = (
            nn.Linear(channels, _HEADS * head, bias=False) for _ in range(3)
        )
        self.out = nn.Linear(_HEADS * head, channels)
        self.perceptron = nn.Sequential(
            nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels)
        )

    def forward(self, x: Tensor, to: Tensor) -> Tensor:
        words = self.before(x)
        context = self.before(to)
        attended = attend(self.query(words), self.key(context), self.value(context), _HEADS)
        x = x + self.out(attended)
        updated: Tensor = x + self.perceptron(self.middle(x))
        return updated
