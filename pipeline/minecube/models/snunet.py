"""SNUNet-CD: a nested U-Net with dense connections between two dates."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minecube.models.blocks import Pyramid, SqueezeExcite, siamese


class SNUNet(nn.Module):
    """SNUNet of Fang, Li, Shao and Li 2021 (IEEE GRSL, 10.1109/LGRS.2021.3056416).

    Input: (n, 2, bands, y, x), sides multiples of 16. Output: logits (n, classes, y, x). The
    ensemble channel attention module (ECAM) weights the four outputs of full resolution. As in the
    paper, the deepest level sees only the second date. Unlike there, each class has one logit in
    place of a softmax over two.

    Option: `width`, channels of the first level (32 in the paper's SNUNet-CD/32).
    """

    def __init__(self, bands: int, classes: int, width: int = 32) -> None:
        super().__init__()
        c = [width * 2**level for level in range(5)]
        self.encoder = Pyramid([_Block(a, b) for a, b in zip([bands, *c], c, strict=False)])
        nodes = [(level, step) for step in range(1, 5) for level in range(5 - step)]
        # Node (level, step) sees both dates, earlier nodes of its level, and (level + 1, step - 1).
        self.nodes = nn.ModuleDict(
            {
                f"{level}_{step}": _Block((1 + step) * c[level] + c[level + 1], c[level])
                for level, step in nodes
            }
        )
        self.up = nn.ModuleDict(
            {
                f"{level}_{step}": nn.ConvTranspose2d(c[level + 1], c[level + 1], 2, stride=2)
                for level, step in nodes
            }
        )
        self.within = SqueezeExcite(width, max(width // 4, 1), maximum=True)
        self.across = SqueezeExcite(4 * width, max(width // 4, 1), maximum=True)
        self.head = nn.Conv2d(4 * width, classes, 1)

    def forward(self, pair: Tensor) -> Tensor:
        """Return the logits of a pair (n, 2, bands, y, x)."""
        dates = siamese(self.encoder, pair)
        nodes: list[list[Tensor]] = [[later] for _, later in dates]
        for step in range(1, 5):
            for level in range(5 - step):
                name = f"{level}_{step}"
                coarser = self.up[name](nodes[level + 1][step - 1])
                inputs = torch.cat([*dates[level], *nodes[level][1:], coarser], dim=1)
                nodes[level].append(self.nodes[name](inputs))
        outputs = nodes[0][1:]
        ensemble = torch.cat(outputs, dim=1)
        attention = self.within.gate(torch.stack(outputs).sum(dim=0)).repeat(1, 4, 1, 1)
        logits: Tensor = self.head(self.across.gate(ensemble) * (ensemble + attention))
        return logits


class _Block(nn.Module):
    """Two convolutions with a shortcut from the first, before its normalisation."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.rest = nn.Sequential(
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return torch.relu(self.rest(x) + x)
