"""FC-EF, FC-Siam-conc and FC-Siam-diff: U-Nets for two dates."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional

from minecube.catalog import ModelCard
from minecube.models.blocks import Pyramid, siamese
from minecube.models.options import build_with_options


def fc_ef(card: ModelCard) -> nn.Module:
    """Build FC-EF: both dates are bands of one image.

    Options: `width` (of the first level, 16 in the paper) and `dropout` (0.2).
    """
    return build_with_options(card, FullyConvolutional, skip="early")


def fc_siam_conc(card: ModelCard) -> nn.Module:
    """Build FC-Siam-conc: dates are encoded alone, and both skip to the decoder.

    Options are those of `fc_ef`.
    """
    return build_with_options(card, FullyConvolutional, skip="both")


def fc_siam_diff(card: ModelCard) -> nn.Module:
    """Build FC-Siam-diff: dates are encoded alone, and their difference skips to the decoder.

    Options are those of `fc_ef`.
    """
    return build_with_options(card, FullyConvolutional, skip="difference")


class FullyConvolutional(nn.Module):
    """Networks of Daudt, Le Saux and Boulch 2018 (arXiv:1810.08462).

    Input: (n, 2, bands, y, x), sides multiples of 16. Output: logits (n, classes, y, x). `skip` is
    early, both or difference. If dates are encoded alone, the decoder starts from the second date's
    deepest features, as in the authors' code. The paper leaves this open. The order of the dates
    therefore matters even with |difference|. Unlike there, each class has one logit without
    softmax.
    """

    def __init__(
        self, bands: int, classes: int, *, skip: str, width: int = 16, dropout: float = 0.2
    ) -> None:
        super().__init__()
        self.skip = skip
        # Dates in the first layer's input, and copies of a level's features for the decoder.
        dates, copies = {"early": (2, 1), "both": (1, 2), "difference": (1, 1)}[skip]
        channels = [width * 2**level for level in range(4)]
        inputs = [bands * dates, *channels[:-1]]
        outputs = [channels[0], *channels[:-1]]
        self.encoder = Pyramid(
            [
                _layers([inputs[level], *[c] * (2 + level // 2)], dropout)
                for level, c in enumerate(channels)
            ]
        )
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(c, c, 3, stride=2, padding=1, output_padding=1)
            for c in reversed(channels)
        )
        self.decoder = nn.ModuleList(
            _layers(
                [c * (1 + copies), *[c] * (1 + level // 2), outputs[level]],
                dropout,
                last=level == 0,
            )
            for level, c in reversed(list(enumerate(channels)))
        )
        self.head = nn.Conv2d(width, classes, 3, padding=1)

    def forward(self, pair: Tensor) -> Tensor:
        """Return the logits of a pair (n, 2, bands, y, x)."""
        if self.skip == "early":
            skipped: list[Tensor] = self.encoder(pair.flatten(1, 2))
            deepest = skipped[-1]
        else:
            levels = siamese(self.encoder, pair)
            deepest = levels[-1][1]
            if self.skip == "both":
                skipped = [torch.cat(dates, dim=1) for dates in levels]
            else:
                skipped = [(earlier - later).abs() for earlier, later in levels]
        x = functional.max_pool2d(deepest, 2)
        for up, decode, skip in zip(self.up, self.decoder, reversed(skipped), strict=True):
            x = decode(torch.cat([up(x), skip], dim=1))
        logits: Tensor = self.head(x)
        return logits


def _layers(channels: list[int], dropout: float, *, last: bool = False) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(channels):
        layers += [
            nn.Conv2d(inputs, outputs, 3, padding=1),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Dropout2d(dropout),
        ]
    if last:  # the head's convolution follows
        layers = layers[:-4]
    return nn.Sequential(*layers)
