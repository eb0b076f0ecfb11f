"""A map is the same for any number of workers and threads, batch and height of strips."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial

import numpy as np
import pytest
import torch
import xarray as xr

from known_maps import (
    CHANGE,
    SERIES,
    SMALL,
    WIDE,
    YEARS,
    Network,
    given_by,
    holes,
    pair_of,
    reflectance,
    series_of,
    untrained,
)
from minecube.models import Compute, Mapper, TrainedModel, predict
from minecube.models.layout import Layout

pytestmark = pytest.mark.usefixtures("one_thread")


class LastBits(torch.nn.Module):
    """Gives logits made of the last bits of another network's, so that the map shows them."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        # Exact: a power of two, and the remainder of a power of two.
        return torch.remainder(self.network(windows) * 2**18, 8) - 4


def last_bits(model: TrainedModel) -> TrainedModel:
    return dataclasses.replace(model, network=LastBits(model.network).eval())


def same_maps(runs: list[Callable[[], xr.DataArray]]) -> bool:
    first, *others = [run() for run in runs]
    assert len(np.unique(first)) > 100  # of a uniform map it would say nothing
    return all(np.array_equal(first, other) for other in others)


def test_the_map_is_the_same_whatever_the_workers_and_the_batch() -> None:
    # Wide enough for the libraries to choose another kernel for another batch, or number of threads, as they do.
    model, of = last_bits(untrained(WIDE)), reflectance(6, 70, 53, (2019,))
    hows = [Compute(workers=n) for n in (1, 2, 3, 8)] + [
        Compute(workers=2, batch=n) for n in (1, 7, 1000)
    ]
    assert same_maps([lambda how=how: predict(model, of, compute=how) for how in hows])


def test_the_map_is_the_same_whatever_the_threads_of_the_caller() -> None:
    def with_threads(n: int) -> xr.DataArray:
        torch.set_num_threads(n)
        try:
            found = predict(model, of)
            assert torch.get_num_threads() == n
            return found
        finally:
            torch.set_num_threads(1)

    model, of = last_bits(untrained(WIDE)), reflectance(6, 40, 53, (2019,))
    assert same_maps([lambda n=n: with_threads(n) for n in (1, 2, 4)])


def test_the_map_is_the_same_whichever_window_is_first() -> None:
    """Some calls take long, others overtake them."""
    network = last_bits(untrained()).network
    pixels = reflectance(7, 70, 153)
    orders: list[list[int]] = []

    def predict_delayed(seed: int) -> xr.DataArray:
        rng = random.Random(seed)
        order: list[int] = []

        def forward(windows: torch.Tensor) -> torch.Tensor:
            logits = network(windows)
            time.sleep(rng.choice((0, 0, 0.02)))
            order.append(hash(windows.numpy().tobytes()))
            return logits

        found = predict(given_by(forward), pixels, compute=Compute(workers=4))
        orders.append(order)
        return found

    delayed = [partial(predict_delayed, seed) for seed in range(3)]
    assert same_maps([lambda: predict(given_by(network), pixels), *delayed])
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def test_the_map_is_the_same_whatever_the_height_of_strips() -> None:
    """A strip is a window of 260 rows or more, in whole chunks."""
    card = dataclasses.replace(SMALL, window_px=260)
    model, of = last_bits(untrained(card)), holes(reflectance(8, 801, 53))

    def read(chunks: tuple[int, ...] | None) -> xr.DataArray:
        pixels = of.copy()
        if chunks:
            pixels.encoding["chunks"] = chunks
        return predict(model, pixels)

    heights = (7, 50, 128, 261, 1000)
    assert same_maps([partial(read, None), *(partial(read, (1, 10, n, n)) for n in heights)])


@pytest.mark.parametrize(
    ("width", "years", "best", "calls"),
    [
        (2, 1, 16, 1),
        (20, 1, 9, 1),
        (22, 1, 8, 2),
        (32, 1, 6, 2),
        (40, 1, 5, 2),
        (32, 2, 3, 4),
        (1024, 1, 1, 12),
    ],
)
def test_windows_go_together_by_what_a_layer_takes_and_gives(
    width: int, years: int, best: int, calls: int
) -> None:
    """Two layers of 1 x 1 take 10 and width floats a pixel and year, and give width and 1: half of the sum, in the mean."""
    card = dataclasses.replace(SERIES, window_px=64, multiple_px=1)
    given = list[int]()
    layers = torch.nn.Sequential(torch.nn.Conv2d(10, width, 1), torch.nn.Conv2d(width, 1, 1))

    class Recorded(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: torch.Tensor, _years: torch.Tensor) -> torch.Tensor:
            given.append(len(x))
            return self.layers(x.flatten(0, 1)).unflatten(0, x.shape[:2])

        def __deepcopy__(self, memo: object) -> Recorded:
            return self

    assert best == min(max(round(3.7e6 / (64 * 64 * 4 * years * (2 * width + 11) / 2)), 1), 16)
    n = len(card.bands)
    model = TrainedModel(
        card=card, network=Recorded(), mean=(1000.0,) * n, std=(500.0,) * n, sites=()
    )
    of = reflectance(8, 32, 32 * 12, YEARS[:years])
    predict(model, of)
    assert given[0] == 1  # the one that is looked at
    assert sum(given[1:]) == len(Layout(32, 32 * 12, 64).lefts) == 12
    assert given[1:] == [12 // calls] * calls
    assert not any(layer._forward_hooks for layer in layers)


def test_two_maps_at_once_are_those_of_each_alone() -> None:
    of, models_ = reflectance(8, 131, 53), [untrained(), untrained(WIDE)]
    alone = [[rows.values for rows in Mapper(model).map_rows(of, [(2019,)])] for model in models_]
    with closing(Mapper(models_[0]).map_rows(of, [(2019,)])) as first:
        begun = [next(first).values]
        second = [rows.values for rows in Mapper(models_[1]).map_rows(of, [(2019,)])]
        begun += [rows.values for rows in first]
    for found, expected in zip((begun, second), alone, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_network_is_copied_once_for_all_sites_and_again_for_a_series_of_other_years() -> None:
    sites = [reflectance(16, 40, 53, YEARS), reflectance(17, 33, 20, YEARS)]
    by_years = given_by(lambda x, years: series_of(x, years) * (years[1] - years[0]), SERIES)
    for model, views, copies in (
        (given_by(untrained().network), [[(2018,), (2019,)], [(2021,)]], 1),
        (given_by(pair_of, CHANGE), [[(2018, 2019)], [(2019, 2021)]], 1),
        (by_years, [[(2018, 2019)], [(2018, 2019)], [(2019, 2021)]], 2),
    ):
        mapper = Mapper(model)
        for site, each in zip([*sites, sites[0]], views, strict=False):
            rows = list(mapper.map_rows(site, each))
            expected = list(Mapper(model).map_rows(site, each))
            assert all(
                np.array_equal(a.values, b.values) for a, b in zip(rows, expected, strict=True)
            )
        assert model.network.copies == copies + len(views)  # another mapper has its own copy


def test_threads_map_sites_by_one_mapper_with_one_copy_of_the_network() -> None:
    class Slow(Network):
        def __deepcopy__(self, memo: object) -> Network:
            time.sleep(0.1)  # for the others to come
            return super().__deepcopy__(memo)

    model = given_by(untrained(WIDE).network, WIDE, Slow)
    mapper = Mapper(model)
    sites = [reflectance(n, 131, 53) for n in range(4)]

    def mapped(by: Mapper, of: xr.DataArray) -> np.ndarray:
        return np.concatenate([rows.values for rows in by.map_rows(of, [(2019,)])], axis=-2)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda of: mapped(mapper, of), sites))
    assert model.network.copies == 1
    for one, of in zip(found, sites, strict=True):
        assert np.array_equal(one, mapped(Mapper(model), of))
