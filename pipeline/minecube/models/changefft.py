"""ChangeFFT, the baseline of MineNetCD: differences of two dates mixed among frequencies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from minecube.models.blocks import ResNet, convolution, enlarge, siamese

_THRESHOLD = 0.01
"""Mixed frequencies below this threshold count as noise (from the authors' code)."""


class ChangeFFT(nn.Module):
    """ChangeFFT of Yu et al. 2024 (MineNetCD, IEEE TGRS, arXiv:2407.03971).

    Input: (n, 2, bands, y, x), sides multiples of 32. Output: logits (n, classes, y, x). The
    encoder is a ResNet-18 from random weights, the lightest one compared in the paper. The
    auxiliary head is left out, since there is one loss on one output. Drop path is left out too.

    Options: `width` and `depths` of the ResNet, and `head` (width of the UPerNet head).
    """

    def __init__(
        self,
        bands: int,
        classes: int,
        *,
        width: int = 64,
        depths: Sequence[int] = (2, 2, 2, 2),
        head: int = 512,
    ) -> None:
        super().__init__()
        channels = [width * 2**level for level in range(len(depths))]
        self.encoder = ResNet(bands, width, depths)
        self.normal = nn.ModuleList(nn.LayerNorm(c) for c in channels)
        self.mix = nn.ModuleList(FrequencyMix(c) for c in channels)
        self.decoder = UPerNetHead(channels, head)
        self.head = nn.Conv2d(head, classes, 1)

    def forward(self, pair: Tensor) -> Tensor:
        """Return the logits of a pair (n, 2, bands, y, x)."""
        levels = []
        for (earlier, later), normal, mix in zip(
            siamese(self.encoder, pair), self.normal, self.mix, strict=True
        ):
            difference = later - earlier
            levels.append(difference + mix(normal(difference.movedim(1, -1))).movedim(-1, 1))
        return enlarge(self.head(self.decoder(levels)), pair)


class FrequencyMix(nn.Module):
    """Channel mixing of (n, y, x, channel) by two complex layers, alike at every frequency.

    The layers act on four blocks of channels. This is Einstein FFT of Patro and Agneeswaran 2024
    (SiMBA, arXiv:2403.15360), adopted by the authors of ChangeFFT.
    """

    def __init__(self, channels: int, blocks: int = 4) -> None:
        super().__init__()
        self.shape = (blocks, channels // blocks)
        # The last dimension holds the real and the imaginary part.
        self.weight = nn.ParameterList(
            0.02 * torch.randn(*self.shape, channels // blocks, 2) for _ in range(2)
        )
        self.bias = nn.ParameterList(0.02 * torch.randn(*self.shape, 2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Return the mixed image (n, y, x, channel) in the precision of the input."""
        # Always single precision: CPUs have no complex numbers of half precision.
        spectrum = torch.fft.fft2(
            torch.unflatten(x.float(), -1, self.shape), dim=(1, 2), norm="ortho"
        )
        for layer, (weight, bias) in enumerate(zip(self.weight, self.bias, strict=True)):
            kernel = torch.view_as_complex(weight.float().contiguous())
            mixed = (
                torch.view_as_real(torch.einsum("...bi,bio->...bo", spectrum, kernel))
                + bias.float()
            )
            mixed = mixed.relu() if layer == 0 else functional.softshrink(mixed, _THRESHOLD)
            spectrum = torch.view_as_complex(mixed.contiguous())
        image: Tensor = torch.fft.ifft2(spectrum, dim=(1, 2), norm="ortho").real.flatten(-2)
        return image.to(x.dtype)


class UPerNetHead(nn.Module):
    """Decoder head of Xiao et al. 2018 (arXiv:1807.10221).

    It pools the coarsest level over 1, 2, 3 and 6 cells and fuses all levels in a feature pyramid.
    """

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        cells = (1, 2, 3, 6)
        self.pool = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(c), convolution(channels[-1], width, 1))
            for c in cells
        )
        self.coarsest = convolution(channels[-1] + len(cells) * width, width)
        self.reduce = nn.ModuleList(convolution(c, width, 1) for c in channels[:-1])
        self.smooth = nn.ModuleList(convolution(width, width) for _ in channels[:-1])
        self.fuse = convolution(len(channels) * width, width)

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Return (n, width, y, x) at the size of the first level."""
        *finer, coarsest = levels
        pooled = [enlarge(pool(coarsest), coarsest) for pool in self.pool]
        x = self.coarsest(torch.cat([coarsest, *pooled], dim=1))
        pyramid = [x]
        for level, reduce, smooth in reversed(
            list(zip(finer, self.reduce, self.smooth, strict=True))
        ):
            x = reduce(level) + enlarge(x, level)
            pyramid.append(smooth(x))
        fused: Tensor = self.fuse(
            torch.cat([enlarge(level, levels[0]) for level in reversed(pyramid)], dim=1)
        )
        return fused
