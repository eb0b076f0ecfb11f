"""Networks of series use every observed year and the distances between years."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from known_networks import CARDS, fitted, images, series, settled
from minecube import models
from minecube.models import series as network_module

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_series_is_mapped_by_the_years_that_it_is_of() -> None:
    """Three years in a row, and the same pixels years apart, as the network itself sees them."""
    card = dataclasses.replace(CARDS["series-attention-small"], window_px=32)
    torch.manual_seed(0)
    network = models.build(card).eval()
    for layer in network.attention:
        nn.init.normal_(
            layer.distance, std=4
        )  # as after training, when how far apart years are matters
    nn.init.normal_(network.head.weight, std=4)
    trained = models.TrainedModel(
        card=card, network=network, mean=(1000.0,) * 10, std=(300.0,) * 10, sites=("a",)
    )
    pixels = np.random.default_rng(0).integers(1, 3000, (3, 10, 32, 32)).astype(np.uint16)
    maps = []
    for years in ([2015, 2016, 2017], [2015, 2020, 2024]):
        site = xr.DataArray(
            pixels,
            dims=("year", "band", "y", "x"),
            coords={"year": years, "band": list(card.bands)},
        )
        maps.append(models.predict(trained, site).values)
        windows = torch.from_numpy(models.normalise(pixels, trained.mean, trained.std))[None]
        with torch.inference_mode():
            alone = 250 * network(windows, torch.tensor(years)).sigmoid()[0, :, 0].numpy()
        # Its only whole window is the site itself; the others weigh little in the middle. A quarter is lost by rounding.
        assert np.abs(maps[-1] - alone)[:, 14:18, 14:18].mean() < 0.3
    assert (maps[0] != maps[1]).mean() > 0.05


@settings(deadline=None, max_examples=15)
@given(
    years=st.integers(1, 12),
    depth=st.integers(1, 3),
    layers=st.integers(1, 2),
    height=st.integers(1, 3),
    width=st.integers(1, 3),
)
def test_any_number_of_years(years: int, depth: int, layers: int, height: int, width: int) -> None:
    network = settled(series(depth=depth, layers=layers))
    found = network(torch.randn(1, years, 10, height * 2**depth, width * 2**depth))
    assert found.shape == (1, years, 1, height * 2**depth, width * 2**depth)
    assert torch.isfinite(found).all()


def test_gradients_reach_every_parameter_of_the_series_network() -> None:
    network = series(layers=2).train()
    (
        network(images(2, 21)) * images(2, 21)[:, :, :1]
    ).sum().backward()  # all distances up to the last
    dead = [key for key, p in network.named_parameters() if not p.grad.abs().sum() > 0]
    assert dead == []
    assert all(
        (p.grad != 0).all() for key, p in network.named_parameters() if key.endswith("distance")
    )


def test_every_year_is_seen_by_every_other() -> None:
    network = settled(series())
    given_ = images(1, 5).requires_grad_()
    for year in range(5):
        (gradient,) = torch.autograd.grad(network(given_)[:, year].square().sum(), given_)
        assert (gradient.abs().sum(dim=(0, 2, 3, 4)) > 0).all()


def test_without_distances_years_are_a_set() -> None:
    network = settled(series(layers=2))
    given_, order = images(2, 6), torch.tensor([3, 0, 5, 1, 4, 2])
    moved = network(given_[:, order])
    assert not torch.allclose(moved, network(given_)[:, order], atol=1e-3)  # distances are seen
    with torch.no_grad():
        for key, p in network.named_parameters():
            if key.endswith("distance"):
                p.zero_()
    assert torch.allclose(network(given_[:, order]), network(given_)[:, order], atol=1e-5)


def test_only_distances_in_years_count() -> None:
    network = settled(series())
    given_ = images(1, 4)
    consecutive = network(given_)
    assert torch.equal(network(given_, torch.tensor([2017, 2018, 2019, 2020])), consecutive)
    assert not torch.allclose(
        network(given_, torch.tensor([2015, 2018, 2019, 2024])), consecutive, atol=1e-4
    )
    far = [
        network(given_, torch.tensor([0, 10 + more, 20 + 2 * more, 30 + 3 * more]))
        for more in (0, 7)
    ]
    assert torch.equal(*far)  # beyond ten years it is all the same


def test_nobody_looks_at_a_missing_year_but_it_has_an_output() -> None:
    network = settled(series(layers=2))
    given_ = images(1, 5)
    given_[:, 2] = 0
    given_.requires_grad_()
    found = network(given_)
    others = [0, 1, 3, 4]
    (gradient,) = torch.autograd.grad(found[:, others].square().sum(), given_)
    assert (gradient[:, 2] == 0).all()
    assert (gradient[:, others].abs().sum(dim=(0, 2, 3, 4)) > 0).all()
    # The same as if it were not in the series at all, the distances kept.
    without = network(given_[:, others], torch.tensor(others))
    assert torch.allclose(found[:, others], without, atol=1e-5)
    # And its own output is made of the others.
    (gradient,) = torch.autograd.grad(network(given_)[:, 2].square().sum(), given_)
    assert (gradient[:, others].abs().sum(dim=(0, 2, 3, 4)) > 0).all()


def test_weights_are_shared_out_anew_among_what_was_observed() -> None:
    # Against loops in numpy: heads by channels, weights enlarged by two, those of unobserved pixels taken away.
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(1, 2, 3, 3, 2, 2, generator=generator)
    values = torch.randn(1, 3, 4, 4, 4, generator=generator)
    observed = (torch.rand(1, 3, 1, 4, 4, generator=generator) < 0.6).float()
    found = network_module._sum_over_years(weight, values, observed).numpy()
    large = (
        nn.functional.interpolate(weight.flatten(1, 3), (4, 4), mode="bilinear")
        .reshape(1, 2, 3, 3, 4, 4)
        .numpy()
    )
    for year, channel, y, x in itertools.product(range(3), range(4), range(4), range(4)):
        seen = [t for t in range(3) if observed[0, t, 0, y, x]]
        weights = large[0, channel // 2, year, :, y, x]
        expected = sum(weights[t] * values[0, t, channel, y, x].item() for t in seen) / max(
            sum(weights[seen]), 1e-4
        )
        assert found[0, year, channel, y, x] == pytest.approx(expected, abs=1e-5)


def test_nobody_looks_at_a_missing_corner() -> None:
    # Far from the corner's rim, where convolutions do not reach, nothing of it is left in the other years.
    network = settled(series(depth=1))
    given_ = images(1, 3, side=48)
    given_[:, 1, :, :24, :24] = 0
    given_.requires_grad_()
    (gradient,) = torch.autograd.grad(network(given_)[:, [0, 2], :, :4, :4].square().sum(), given_)
    assert (gradient[:, 1, :, :12, :12] == 0).all()
    assert (gradient[:, 0, :, :4, :4] != 0).any()


def test_a_series_without_any_observation_is_no_error() -> None:
    assert torch.isfinite(settled(series())(torch.zeros(1, 3, 10, 16, 16))).all()


def clouded(
    seed: int, n: int = 8, years: int = 6, side: int = 16
) -> tuple[torch.Tensor, torch.Tensor]:
    """Series of a mine that appears and stays; each year's image is hidden in part by clouds as bright as a mine."""
    r = np.random.default_rng(seed)
    mine = np.zeros((n, years, 1, side, side), np.float32)
    for i in range(n):
        y, x = r.integers(1, side // 2, 2)
        mine[i, r.integers(0, years - 1) :, 0, y : y + side // 2, x : x + side // 2] = 1
    cloud = np.zeros_like(mine)
    for i, t in itertools.product(range(n), range(years)):
        if r.random() < 0.5:
            y, x = r.integers(0, side // 2, 2)
            cloud[i, t, 0, y : y + side // 2, x : x + side // 2] = 1
    pixels = r.normal(0, 0.3, (n, years, 10, side, side)) + 2 * np.maximum(mine, cloud)
    return torch.from_numpy(pixels.astype(np.float32)), torch.from_numpy(mine)


def test_a_series_settles_what_a_single_year_leaves_open() -> None:
    class Alone(nn.Module):
        """The same network, shown one year at a time."""

        def __init__(self) -> None:
            super().__init__()
            self.network = series(width=8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.network(x.flatten(0, 1)[:, None]).reshape(*x.shape[:2], 1, *x.shape[3:])

    errors = {}
    for name, network in (("series", series(width=8)), ("alone", Alone())):
        network.train()
        for step in range(6):
            fitted(network, *clouded(step), steps=12, rate=1e-2)
        network.eval()
        pixels, mine = clouded(99, n=24)
        with torch.inference_mode():
            errors[name] = ((network(pixels) > 0) != (mine > 0)).float().mean().item()
    assert errors["series"] < 0.6 * errors["alone"], errors
