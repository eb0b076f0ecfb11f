"""Map all years at once: a U-Net per year, and attention between the years.

Other years often settle the doubts of a single year, such as a cloud's edge or a bare field. Mines
come and go over years, weather does not. Each place looks at its other years three times:

1. at the coarsest level, by attention
2. at the finer levels on the way up, by the same attention, enlarged
3. at full size, by means over the years before, after and around

Step 2 follows U-TAE (Garnot and Landrieu 2021, arXiv:2107.07933). U-TAE gives one map per series,
this network one per year. The means' weights by distance in years are learned.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from minecube.catalog import ModelCard
from minecube.models.blocks import Pyramid, convolution, enlarge
from minecube.models.options import options_of

_REACH = 10
"""Years; larger distances weigh as much as this one."""


def series_attention(card: ModelCard) -> nn.Module:
    """Build the network from a card.

    Options: `width` (of the first level), `depth` (number of halvings), `heads` and `layers` of
    attention.
    """
    return SeriesAttention(
        len(card.bands), len(card.classes), **options_of(card, width=16, depth=3, heads=4, layers=1)
    )


class SeriesAttention(nn.Module):
    """Network for a series of any number of years.

    Input: (n, year, bands, y, x), sides multiples of 2 ** depth. Output: logits (n, year, classes,
    y, x). A pixel with 0 in all bands was not observed. Other years ignore it, but it has an output
    from the observed years. Time enters only as distance in years, independent of the calendar.
    """

    def __init__(
        self,
        bands: int,
        classes: int,
        *,
        width: int = 16,
        depth: int = 3,
        heads: int = 4,
        layers: int = 1,
    ) -> None:
        super().__init__()
        channels = [width * 2**level for level in range(depth + 1)]
        # One more band marks observed pixels.
        self.encoder = Pyramid(
            _two_convolutions(a, b) for a, b in zip([bands + 1, *channels], channels, strict=False)
        )
        self.attention = nn.ModuleList(_Attention(channels[-1], heads) for _ in range(layers))
        self.mix = nn.ModuleList(nn.Conv2d(c, c, 1) for c in channels[-2:0:-1])
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * c, c, 2, stride=2) for c in channels[-2::-1])
        self.merge = nn.ModuleList(_two_convolutions(2 * c, c) for c in channels[-2::-1])
        self.coherence = _Coherence(width)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, series: Tensor, years: Tensor | None = None) -> Tensor:
        """Return the logits of (n, year, bands, y, x).

        `years` (int, one per year of the series) are consecutive by default.
        """
        shape = series.shape[:2]
        years = torch.arange(shape[1], device=series.device) if years is None else years
        apart = (years[None, :] - years[:, None]).clamp(
            -_REACH, _REACH
        ) + _REACH  # [looking, looked at]
        seen = (series != 0).any(dim=2, keepdim=True).to(series.dtype)
        *skipped, x = self.encoder(torch.cat([series, seen], dim=2).flatten(0, 1))
        words = torch.unflatten(x, 0, shape)
        for layer in self.attention:
            words, weight = layer(words, _coarser(seen, x), apart)
        x = words.flatten(0, 1)
        for level, (up, merge) in enumerate(zip(self.up, self.merge, strict=True)):
            beside = skipped.pop()
            # At full size, attention of all pairs of years would be larger than all the rest.
            if level < len(self.mix):
                pooled = _weighted(
                    weight, torch.unflatten(beside, 0, shape), _coarser(seen, beside)
                )
                beside = beside + self.mix[level](pooled.flatten(0, 1))
            x = merge(torch.cat([beside, up(x)], dim=1))
        x = self.coherence(torch.unflatten(x, 0, shape), seen, apart).flatten(0, 1)
        logits: Tensor = torch.unflatten(self.head(x), 0, shape)
        return logits


def _two_convolutions(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(convolution(inputs, outputs), convolution(outputs, outputs))


def _coarser(seen: Tensor, like: Tensor) -> Tensor:
    """Mark coarser pixels with any observation by 1, others by 0: (n, year, 1, y, x)."""
    factor = seen.shape[-1] // like.shape[-1]
    return torch.unflatten(functional.max_pool2d(seen.flatten(0, 1), factor), 0, seen.shape[:2])


def _weighted(weight: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """Sum values (n, year, channel, y, x) over years by weight.

    Weights are [n, head, looking, looked at, y, x]. If smaller than the values, they are enlarged
    and normalised again over the observed years. Each head has its share of the channels.
    """
    heads = weight.shape[1]
    if weight.shape[-2:] != values.shape[-2:]:
        weight = torch.unflatten(enlarge(weight.flatten(1, 3), values), 1, weight.shape[1:4])
        weight = weight * seen[:, None, None, :, 0]
        weight = weight * weight.sum(dim=3, keepdim=True).clamp(min=1e-4).reciprocal()
    return torch.einsum(
        "nhtsyx,nshcyx->nthcyx", weight, torch.unflatten(values, 2, (heads, -1))
    ).flatten(2, 3)


class _Attention(nn.Module):
    """Attention between the years of one place.

    It returns (n, year, channel, y, x) and the attention weights.
    """

    def __init__(self, channels: int, heads: int, size: int = 8) -> None:
        super().__init__()
        self.heads, self.scale = heads, size**-0.5
        self.before, self.middle = (nn.LayerNorm(channels) for _ in range(2))
        self.query, self.key = (nn.Conv2d(channels, heads * size, 1) for _ in range(2))
        self.value, self.out = (nn.Conv2d(channels, channels, 1) for _ in range(2))
        self.perceptron = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 1), nn.GELU(), nn.Conv2d(2 * channels, channels, 1)
        )
        # Heads start with different reach in years.
        slopes = 2.0 ** -torch.arange(1, heads + 1)
        self.distance = nn.Parameter(-slopes[:, None] * torch.arange(-_REACH, _REACH + 1).abs())

    def forward(self, x: Tensor, seen: Tensor, apart: Tensor) -> tuple[Tensor, Tensor]:
        shape = x.shape[:2]
        flat = x.flatten(0, 1)
        normal = self.before(flat.movedim(1, -1)).movedim(-1, 1)
        query, key = (
            a(normal).unflatten(1, (self.heads, -1)).unflatten(0, shape)
            for a in (self.query, self.key)
        )
        score = (
            torch.einsum("nthcyx,nshcyx->nhtsyx", query, key) * self.scale
            + self.distance[:, apart][None, ..., None, None]
        )
        observed = seen[:, None, None, :, 0]
        weight = (
            score.masked_fill(observed == 0, torch.finfo(score.dtype).min).softmax(dim=3) * observed
        )
        pooled = _weighted(weight, self.value(normal).unflatten(0, shape), seen).flatten(0, 1)
        flat = flat + self.out(pooled)
        flat = flat + self.perceptron(self.middle(flat.movedim(1, -1)).movedim(-1, 1))
        return torch.unflatten(flat, 0, shape), weight


class _Coherence(nn.Module):
    """Update of a year's features, added to a shortcut.

    It uses means over the years before, after and around.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        apart = torch.arange(-_REACH, _REACH + 1)
        near = -apart.abs() / 2
        # A year weighs little in its own mean before or after, unless no such years exist.
        self.distance = nn.Parameter(
            torch.stack([near - 6 * (apart >= 0), near - 6 * (apart <= 0), near])
        )
        self.blend = nn.Sequential(
            nn.Conv2d(4 * channels, channels, 1), nn.GELU(), nn.Conv2d(channels, channels, 1)
        )

    def forward(self, x: Tensor, seen: Tensor, apart: Tensor) -> Tensor:
        weight = self.distance.exp()[:, apart]  # [mean, looking, looked at]
        # Channels last, as in memory: one matrix product then sums the years without a copy.
        last, observed = x.movedim(2, -1), seen.movedim(2, -1)
        known = (last * observed).flatten(2)
        means = [
            (w @ known).view(last.shape)
            * (w @ observed.flatten(2)).clamp(min=1e-6).reciprocal().view(observed.shape)
            for w in weight
        ]
        both = torch.cat([last, *means], dim=-1).movedim(-1, 2)
        found: Tensor = x + torch.unflatten(self.blend(both.flatten(0, 1)), 0, x.shape[:2])
        return found
