"""ChangeFormer: differences of two dates' features from a hierarchical transformer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from minecube.models.blocks import attend, enlarge, siamese


class ChangeFormer(nn.Module):
    """ChangeFormer of Bandara and Patel 2022 (arXiv:2201.01293), as V6 of their code.

    Input: (n, 2, bands, y, x), sides multiples of 32. Output: logits (n, classes, y, x). The
    authors also supervise maps of four scales. Here there is one loss on one output. Dropout and
    drop path are left out. Each class has its own logit in place of the authors' softmax.

    Options: `widths` and `depths` of the encoder's four stages, `width` of the decoder.
    """

    def __init__(
        self,
        bands: int,
        classes: int,
        *,
        widths: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 3, 4, 3),
        width: int = 256,
    ) -> None:
        super().__init__()
        self.encoder = _MixTransformer(bands, widths, depths)
        self.reduce = nn.ModuleList(nn.Conv2d(w, width, 1) for w in widths)
        self.compare = nn.ModuleList(_compare(width) for _ in widths)
        self.fuse = nn.Sequential(nn.Conv2d(len(widths) * width, width, 1), nn.BatchNorm2d(width))
        self.up = nn.ModuleList(
            nn.Sequential(
                nn.ConvTranspose2d(width, width, 4, stride=2, padding=1), _Residual(width)
            )
            for _ in range(2)
        )
        self.head = nn.Conv2d(width, classes, 3, padding=1)

    def forward(self, pair: Tensor) -> Tensor:
        """Return the logits of a pair (n, 2, bands, y, x)."""
        levels = siamese(self.encoder, pair)
        differences: list[Tensor] = []
        for (earlier, later), reduce, compare in reversed(
            list(zip(levels, self.reduce, self.compare, strict=True))
        ):
            difference = compare(torch.cat([reduce(earlier), reduce(later)], dim=1))
            if differences:
                difference = difference + enlarge(differences[-1], difference)
            differences.append(difference)
        finest = differences[-1]
        x = self.fuse(torch.cat([enlarge(level, finest) for level in differences], dim=1))
        for up in self.up:
            x = up(x)
        logits: Tensor = self.head(x)
        return logits


def _compare(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2 * width, width, 3, padding=1),
        nn.ReLU(),
        nn.BatchNorm2d(width),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
    )


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        updated: Tensor = x + 0.1 * self.body(x)
        return updated


class _MixTransformer(nn.Module):
    """SegFormer's encoder (Xie et al. 2021, arXiv:2105.15203) with ChangeFormer's patches.

    All patches are 7 pixels wide.
    """

    def __init__(self, bands: int, widths: Sequence[int], depths: Sequence[int]) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        inputs = bands
        for width, depth, stride, heads, shrink in zip(
            widths, depths, (4, 2, 2, 2), (1, 2, 4, 8), (8, 4, 2, 1), strict=True
        ):
            stage = {
                "patches": nn.Conv2d(inputs, width, 7, stride, 3),
                "first": nn.LayerNorm(width),
                "blocks": nn.ModuleList(_Block(width, heads, shrink) for _ in range(depth)),
                "last": nn.LayerNorm(width),
            }
            self.stages.append(nn.ModuleDict(stage))
            inputs = width

    def forward(self, x: Tensor) -> list[Tensor]:
        levels = []
        for stage in self.stages:
            x = stage["patches"](x)  # type: ignore[index]  # a ModuleDict
            shape = x.shape
            words = stage["first"](x.flatten(2).transpose(1, 2))  # type: ignore[index]
            for block in stage["blocks"]:  # type: ignore[index]
                words = block(words, shape[-2:])
            x = stage["last"](words).transpose(1, 2).reshape(shape)  # type: ignore[index]
            levels.append(x)
        return levels


class _Block(nn.Module):
    """Attention to a coarser image, then a perceptron with a depth-wise convolution.

    Input and output are (n, y * x, channel).
    """

    def __init__(self, width: int, heads: int, shrink: int) -> None:
        super().__init__()
        self.heads = heads
        self.before = nn.LayerNorm(width)
        self.middle = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.both = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.shrink: nn.Module | None = None
        self.shrunk: nn.Module | None = None
        if shrink > 1:
            self.shrink = nn.Conv2d(width, width, shrink, stride=shrink)
            self.shrunk = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)
        self.near = nn.Conv2d(4 * width, 4 * width, 3, padding=1, groups=4 * width)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        words = self.before(x)
        context = words
        if self.shrink is not None and self.shrunk is not None:
            image = words.transpose(1, 2).unflatten(2, size)
            context = self.shrunk(self.shrink(image).flatten(2).transpose(1, 2))
        key, value = self.both(context).chunk(2, dim=-1)
        x = x + self.out(attend(self.query(words), key, value, self.heads))
        wide = self.widen(self.middle(x))
        local = self.near(wide.transpose(1, 2).unflatten(2, size)).flatten(2).transpose(1, 2)
        updated: Tensor = x + self.narrow(functional.gelu(local))
        return updated
