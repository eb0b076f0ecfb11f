"""Folding: the same logits from fewer layers, of every network by name; nothing folded that is used elsewhere."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from minecube import models
from minecube.catalog import load_models
from minecube.models.folding import fold_batch_norms

pytestmark = pytest.mark.usefixtures("one_thread")

CARDS = load_models()
LEFT = {  # by architecture
    "linknet": 5,  # after transposed convolutions
    "snunet": 15,  # what they normalise is added again later
    "changeformer": 4,  # after a ReLU
    "dtcdscn": 4,  # before a convolution
}


class Both(nn.Module):
    """A convolution and a norm, called by those that derive from it."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 3, 1), norm()


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
    window = torch.randn(1, 3, 8, 8)
    fold_batch_norms(network, lambda: network(window))
    with torch.inference_mode():
        torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-5)
    assert norms(network) == left


@pytest.mark.parametrize("name", CARDS)
def test_every_network_says_the_same_in_fewer_layers(name: str) -> None:
    card = CARDS[name]
    torch.manual_seed(3)
    network = models.build(card).eval()
    for m in network.modules():
        if isinstance(m, nn.BatchNorm2d):
            learnt(m)
    years = [2015, 2016, 2017][: {"mapping": 1, "change": 2, "series": 3}[card.task]]
    windows = torch.randn(2, len(years), len(card.bands), card.window_px, card.window_px)
    with torch.inference_mode():
        expected = models.compute_logits(network, card.task, windows, years)
    fold_batch_norms(network, lambda: models.compute_logits(network, card.task, windows[:1], years))
    with torch.inference_mode():
        found = models.compute_logits(network, card.task, windows, years)
    assert norms(network) == LEFT.get(card.architecture, 0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))


def test_only_what_comes_right_after_a_convolution_is_folded() -> None:
    torch.manual_seed(1)

    class Between(Both):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.convolution(x).relu())

    unlearnt = nn.BatchNorm2d(3, track_running_stats=False)  # always of the windows before it
    same(nn.Sequential(nn.Conv2d(3, 3, 1), unlearnt), 1)
    same(Between(), 1)
    same(nn.Sequential(norm(), nn.Conv2d(3, 3, 1)), 1)
    same(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), norm()), 1)
    same(
        nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 3, 3, padding=1)), nn.Sequential(norm(), nn.ReLU())
        ),
        0,
    )
    same(
        nn.Sequential(
            nn.Conv2d(3, 6, 3, groups=3, bias=False), norm(6), nn.Conv2d(6, 3, 1), norm()
        ),
        0,
    )


def test_a_convolution_that_is_used_elsewhere_stays() -> None:
    torch.manual_seed(2)

    class Again(Both):
        """Its convolution is also added."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found = self.convolution(x)
            return found + self.norm(found)

    class Twice(Both):
        """Its norm is also called alone."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x) + self.norm(self.convolution(x))

    class Bare(Both):
        """Its convolution is also called alone."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.convolution(x).relu() + self.norm(self.convolution(x))

    class Siamese(Both):
        """Both are called twice, together."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.convolution(x)) - self.norm(self.convolution(x + 1))

    class Crossed(Both):
        """Both are called twice, once together."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.convolution(x)) + self.norm(x) + self.convolution(x).relu()

    same(Again(), 1)
    same(Twice(), 1)
    same(Bare(), 1)
    same(Siamese(), 0)
    for odd in (Again(), Twice(), Bare(), Crossed()):  # they keep no other pair from folding
        same(nn.Sequential(nn.Conv2d(3, 3, 1), norm(), odd), 1)
    shared = nn.Conv2d(3, 3, 1)
    same(nn.Sequential(shared, norm(), nn.ReLU(), shared, norm()), 2)


def test_a_layer_of_two_names_is_folded_under_both() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.norm = nn.Conv2d(3, 3, 1), norm()
            self.others = nn.ModuleList([self.one, self.norm])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.others[0](x)) + self.others[1](self.one(x + 1))

    same(Named(), 0)


def test_what_happens_is_what_counts() -> None:
    """Branches, parts called by themselves, and operations on weights are seen as they come."""

    class Branch(Both):
        def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
            found = self.convolution(x)
            return found + self.norm(found) if skip is None else self.norm(found)

    class Asks(Both):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (
                self.norm(self.convolution(x))
                if float(x.mean()) > 10
                else self.norm(self.convolution(x)).relu()
            )

    class Weighs(Both):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.convolution(x)) + nn.functional.conv2d(x, self.convolution.weight)

    class Rescales(Both):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.convolution(x)) * self.norm.weight.view(-1, 1, 1)

    class Around(Both):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm.forward(self.convolution(x))

    class Aside(Both):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.convolution(x)) + self.norm.forward(x)

    class Gives(Both):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found = self.convolution(x)
            self.normal = self.norm(found)
            return found

    for network, left in (
        (Branch(), 1),
        (Asks(), 0),
        (Weighs(), 1),
        (Rescales(), 1),
        (Around(), 1),
        (Aside(), 1),
        (Gives(), 1),
    ):
        same(network, left)


def test_norms_of_other_kinds_and_layers_with_hooks_stay() -> None:
    class Doubled(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    same(nn.Sequential(nn.Conv2d(3, 3, 1), learnt(Doubled(3))), 1)
    for layer, register, left in (
        (0, "register_forward_hook", 1),
        (1, "register_forward_hook", 1),
        (0, "register_forward_pre_hook", 0),  # changes the input only, and stays
    ):
        network = nn.Sequential(nn.Conv2d(3, 3, 1), norm())
        getattr(network[layer], register)(
            lambda _, given, found=None: (given[0] if found is None else found) + 1
        )
        same(network, left)


def test_networks_in_other_threads_go_on_meanwhile() -> None:
    """One is folded while another computes, and sees nothing of it."""
    network, other = (nn.Sequential(nn.Conv2d(3, 3, 1), norm()).eval() for _ in range(2))

    def run() -> torch.Tensor:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: other(torch.ones(1, 3, 8, 8)).sum().backward()).result()
        return network(window)

    window = torch.randn(1, 3, 8, 8)
    fold_batch_norms(network, run)
    assert (norms(network), norms(other)) == (0, 1)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
