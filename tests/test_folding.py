"""Folding: the same logits from fewer layers, of every network that is shipped; nothing folded that is used elsewhere."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from minecube import models
from minecube.catalog import load_models
from minecube.models.folding import folded

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {name: card for name, card in load_models().items() if name.endswith("-small")}
LEFT = {
    "linknet-resnet18-small": 5,  # after transposed convolutions
    "segformer-b0-small": 1,  # in a part that asks for numbers
    "snunet-small": 15,  # what they normalise is added again later
    "changeformer-small": 4,  # after a ReLU
    "dtcdscn-small": 4,  # before a convolution
}


def norm(channels: int = 3) -> nn.BatchNorm2d:
    return learnt(nn.BatchNorm2d(channels))


def learnt(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """Statistics as after training."""
    with torch.no_grad():
        norm.running_mean.normal_(0, 0.3)
        norm.running_var.uniform_(0.5, 2)
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(0, 0.3)
    return norm


def norms(network: nn.Module) -> int:
    return sum(isinstance(m, nn.BatchNorm2d) for m in network.modules())


def same(network: nn.Module, left: int) -> None:
    x = torch.randn(2, 3, 8, 8)
    network.eval()
    with torch.inference_mode():
        expected = network(x)
        torch.testing.assert_close(folded(network)(x), expected, rtol=1e-4, atol=1e-5)
    assert norms(network) == left


@pytest.mark.parametrize("name", SMALL)
def test_every_network_says_the_same_in_fewer_layers(name: str) -> None:
    card = SMALL[name]
    torch.manual_seed(3)
    network = models.build(card).eval()
    for m in network.modules():
        if isinstance(m, nn.BatchNorm2d):
            learnt(m)
    years = [2015, 2016, 2017][: {"mapping": 1, "change": 2, "series": 3}[card.task]]
    windows = torch.randn(2, len(years), len(card.bands), card.window_px, card.window_px)
    weights = {key: value.clone() for key, value in network.state_dict().items()}
    with torch.inference_mode():
        expected = models.logits(network, card.task, windows, years)
        of = deepcopy(network)
        found = models.logits(folded(of), card.task, windows, years)
    assert norms(of) == LEFT.get(name, 0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))
    assert all(torch.equal(value, weights[key]) for key, value in network.state_dict().items())


def test_only_what_comes_right_after_a_convolution_is_folded() -> None:
    torch.manual_seed(1)

    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.norm = nn.Conv2d(3, 3, 1), norm()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.convolution(x).relu())

    unlearnt = nn.BatchNorm2d(3, track_running_stats=False)  # always of the windows before it
    same(nn.Sequential(nn.Conv2d(3, 3, 1), unlearnt), 1)
    same(Between(), 1)
    same(nn.Sequential(norm(), nn.Conv2d(3, 3, 1)), 1)
    same(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), norm()), 1)
    same(nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1)), nn.Sequential(norm(), nn.ReLU())), 0)
    same(nn.Sequential(nn.Conv2d(3, 6, 3, groups=3, bias=False), norm(6), nn.Conv2d(6, 3, 1), norm()), 0)


def test_a_convolution_that_is_used_elsewhere_stays() -> None:
    torch.manual_seed(2)

    class Again(nn.Module):
        """Its convolution is also added."""

        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.norm = nn.Conv2d(3, 3, 1), norm()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found = self.convolution(x)
            return found + self.norm(found)

    class Twice(Again):
        """Its norm is also called alone."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x) + self.norm(self.convolution(x))

    class Bare(Again):
        """Its convolution is also called alone."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.convolution(x).relu() + self.norm(self.convolution(x))

    class Siamese(Again):
        """Both are called twice, together."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.convolution(x)) - self.norm(self.convolution(x + 1))

    same(Again(), 1)
    same(Twice(), 1)
    same(Bare(), 1)
    same(Siamese(), 0)
    shared = nn.Conv2d(3, 3, 1)
    same(nn.Sequential(shared, norm(), nn.ReLU(), shared, norm()), 2)


def test_one_convolution_of_two_names_stays() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.norm = nn.Conv2d(3, 3, 1), norm()
            self.other = nn.ModuleList([self.one])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.other[0](x))

    same(Named(), 1)


def test_parts_are_looked_at_where_the_whole_asks_for_numbers() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[object] = []
            self.part = nn.Sequential(nn.Conv2d(3, 3, 1), norm())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.append(x)
            return self.part(x) if x.mean() > 10 else self.part(x).relu()

    network = Asks()
    same(network, 0)
    assert all(type(x) is torch.Tensor for x in network.seen)
