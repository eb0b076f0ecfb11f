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

from minecube.models.blocks import Pyramid, convolution, enlarge

_REACH = 10
"""Years; larger distances weigh as much as this one."""


class SeriesAttention(nn.Module):
    """Network for a series of any number of years.

    Input: (n, year, bands, y, x), sides multiples of 2 ** depth. Output: logits (n, year, classes,
    y, x). A pixel with 0 in all bands was not observed. Other years ignore it, but it has an output
    from the observed years. Time enters only as distance in years, independent of the calendar.

    Options: `width` (of the first level), `depth` (number of halvings), `heads` and `layers` of
    attention.
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
        if years is None:
            years = torch.arange(shape[1], device=series.device)
        distance = (years[None, :] - years[:, None]).clamp(-_REACH, _REACH)  # [looking, looked at]
        apart = distance + _REACH
        observed = (series != 0).any(dim=2, keepdim=True).to(series.dtype)
        *skipped, x = self.encoder(torch.cat([series, observed], dim=2).flatten(0, 1))
        words = torch.unflatten(x, 0, shape)
        for layer in self.attention:
            words, weight = layer(words, _observed_in(x, observed), apart)
        x = words.flatten(0, 1)
        for level, (up, merge) in enumerate(zip(self.up, self.merge, strict=True)):
            skip = skipped.pop()
            # At full size, attention of all pairs of years would be larger than all other tensors.
            if level < len(self.mix):
                pooled = _sum_over_years(
                    weight, torch.unflatten(skip, 0, shape), _observed_in(skip, observed)
                )
                skip = skip + self.mix[level](pooled.flatten(0, 1))
            x = merge(torch.cat([skip, up(x)], dim=1))
        x = self.coherence(torch.unflatten(x, 0, shape), observed, apart).flatten(0, 1)
        return torch.unflatten(self.head(x), 0, shape)


def _two_convolutions(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(convolution(inputs, outputs), convolution(outputs, outputs))


def _observed_in(level: Tensor, observed: Tensor) -> Tensor:
    """Mark a level's pixels with any observation by 1, others by 0: (n, year, 1, y, x)."""
    factor = observed.shape[-1] // level.shape[-1]
    pooled = functional.max_pool2d(observed.flatten(0, 1), factor)
    return torch.unflatten(pooled, 0, observed.shape[:2])


def _sum_over_years(weight: Tensor, values: Tensor, observed: Tensor) -> Tensor:
    """Sum values (n, year, channel, y, x) over years by weight.

    Weights are [n, head, looking, looked at, y, x]. If smaller than the values, they are enlarged
    and normalised again over the observed years. Each head has its share of the channels.
    """
    heads = weight.shape[1]
    if weight.shape[-2:] != values.shape[-2:]:
        weight = torch.unflatten(enlarge(weight.flatten(1, 3), values), 1, weight.shape[1:4])
        weight = weight * observed[:, None, None, :, 0]
        weight = weight * weight.sum(dim=3, keepdim=True).clamp(min=1e-4).reciprocal()
    return torch.einsum(
        "nhtsyx,nshcyx->nthcyx", weight, torch.unflatten(values, 2, (heads, -1))
    ).flatten(2, 3)


class _Attention(nn.Module):
    """Attention between the years of one place.

    It returns (n, year, channel, y, x) and the attention weights.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        size = 8
        self.heads = heads
        self.scale = size**-0.5
        self.before, self.middle = (nn.LayerNorm(channels) for _ in range(2))
        self.query, self.key = (nn.Conv2d(channels, heads * size, 1) for _ in range(2))
        self.value, self.out = (nn.Conv2d(channels, channels, 1) for _ in range(2))
        self.perceptron = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 1), nn.GELU(), nn.Conv2d(2 * channels, channels, 1)
        )
        # Heads start with different reach in years.
        slopes = 2.0 ** -torch.arange(1, heads + 1)
        self.distance = nn.Parameter(-slopes[:, None] * torch.arange(-_REACH, _REACH + 1).abs())

    def forward(self, x: Tensor, observed: Tensor, apart: Tensor) -> tuple[Tensor, Tensor]:
        """Let each year look at the observed years of the same pixel.

        Args:
            x: features [n, year, channel, y, x].
            observed: [n, year, 1, y, x], 1 where the pixel is observed, else 0.
            apart: [year, year], index into `distance` by the years between two images.

        Returns:
            Features as `x`, and weights [n, head, year, observed year, y, x].
        """
        # In the sums: n item, t looking year, s observed year, h head, c channel.
        shape = x.shape[:2]
        flat = x.flatten(0, 1)
        normal = self.before(flat.movedim(1, -1)).movedim(-1, 1)
        query = self.query(normal).unflatten(1, (self.heads, -1)).unflatten(0, shape)
        key = self.key(normal).unflatten(1, (self.heads, -1)).unflatten(0, shape)
        value = self.value(normal).unflatten(0, shape)
        score = (
            torch.einsum("nthcyx,nshcyx->nhtsyx", query, key) * self.scale
            + self.distance[:, apart][None, ..., None, None]
        )
        looked_at = observed[:, None, None, :, 0]
        lowest = torch.finfo(score.dtype).min
        # Without any observed year, softmax gives equal weights; they become 0.
        weight = score.masked_fill(looked_at == 0, lowest).softmax(dim=3) * looked_at
        pooled = _sum_over_years(weight, value, observed).flatten(0, 1)
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
        weight = -apart.abs() / 2
        # A year weighs little in its own mean before or after, unless no such years exist.
        self.distance = nn.Parameter(
            torch.stack([weight - 6 * (apart >= 0), weight - 6 * (apart <= 0), weight])
        )
        self.blend = nn.Sequential(
            nn.Conv2d(4 * channels, channels, 1), nn.GELU(), nn.Conv2d(channels, channels, 1)
        )

    def forward(self, x: Tensor, observed: Tensor, apart: Tensor) -> Tensor:
        weight = self.distance.exp()[:, apart]  # [mean, looking, looked at]
        # Channels last, as in memory: one matrix product then sums the years without a copy.
        features = x.movedim(2, -1)
        counts = observed.movedim(2, -1)
        observed_features = (features * counts).flatten(2)
        means = [
            (w @ observed_features).view(features.shape)
            * (w @ counts.flatten(2)).clamp(min=1e-6).reciprocal().view(counts.shape)
            for w in weight
        ]
        inputs = torch.cat([features, *means], dim=-1).movedim(-1, 2)
        return x + torch.unflatten(self.blend(inputs.flatten(0, 1)), 0, x.shape[:2])
