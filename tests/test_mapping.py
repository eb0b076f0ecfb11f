"""Whole sites mapped by windows: the same as by brute force, whatever reads, computes and waits; in memory that stays flat."""

from __future__ import annotations

import dataclasses
import random
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial

import dask
import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from minecube import models
from minecube.catalog import BANDS, ModelCard, Weights
from minecube.errors import ModelError
from minecube.models import (
    Compute,
    Mapper,
    TrainedModel,
    batches,
    cores,
    list_views,
    mapping,
    predict,
    streams,
)
from minecube.models.forward import Forward
from minecube.models.layout import (
    Blend,
    Layout,
    add_window,
    blend_rows,
    weight_logits,
)
from minecube.models.streams import Strip

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ModelCard(
    id="small",
    title="for tests",
    architecture="unet",
    options={"width": 4, "depth": 2},
    window_px=16,
    multiple_px=4,
)
WIDE = dataclasses.replace(SMALL, options={"width": 16, "depth": 3}, window_px=32, multiple_px=8)
CHANGE = dataclasses.replace(SMALL, id="pairs", task="change", classes=("removed", "new"))
SERIES = dataclasses.replace(SMALL, id="years", task="series")
YEARS = (2018, 2019, 2021)


def reflectance(
    seed: int, height: int = 48, width: int = 40, years: tuple[int, ...] = (2019, 2020)
) -> xr.DataArray:
    pixels = np.random.default_rng(seed).integers(
        1, 3000, (len(years), len(BANDS), height, width), dtype=np.uint16
    )
    coords = {
        "year": list(years),
        "band": list(BANDS),
        "y": 5.6e6 - 10.0 * np.arange(height),
        "x": 5e5 + 10.0 * np.arange(width),
    }
    return xr.DataArray(pixels, dims=("year", "band", "y", "x"), coords=coords)


def untrained(card: ModelCard = SMALL) -> TrainedModel:
    torch.manual_seed(0)
    network = models.build(card).eval()
    for module in network.modules():  # statistics as after training, so that all layers matter
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    with torch.no_grad():  # logits of mean 0 and deviation 2, so that probabilities differ
        found = network(torch.randn(4, len(card.bands), card.window_px, card.window_px))
        gain = 2 / found.std()
        network.head.weight *= gain
        network.head.bias.copy_((network.head.bias - found.mean()) * gain)
    n = len(card.bands)
    return TrainedModel(
        card=card, network=network, mean=(1000.0,) * n, std=(500.0,) * n, sites=("a",)
    )


class Network(torch.nn.Module):
    """Any function of the windows."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.functions = [function]  # in a list: a network is not to be a layer of this one
        self.copies = 0

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.functions[0](*inputs)

    def __deepcopy__(self, memo: object) -> Network:
        self.copies += 1
        return self


def given_by(
    function: Callable[..., torch.Tensor],
    card: ModelCard = SMALL,
    kind: type[Network] = Network,
) -> TrainedModel:
    n = len(card.bands)
    return TrainedModel(
        card=card, network=kind(function), mean=(1000.0,) * n, std=(500.0,) * n, sites=()
    )


def pair_of(x: torch.Tensor) -> torch.Tensor:
    """Of single pixels: how much the first band rose, and what it was."""
    return torch.stack([x[:, 1, 0] - x[:, 0, 0], x[:, 0, 0]], dim=1)


def series_of(x: torch.Tensor, _years: torch.Tensor) -> torch.Tensor:
    """Of single pixels: a year's first band less the mean of all."""
    return x[:, :, :1] - x[:, :, :1].mean(dim=1, keepdim=True)


def normal(pixels: np.ndarray) -> np.ndarray:
    return (pixels.astype(np.float64) - 1000) / 500


def stored(logits: np.ndarray) -> np.ndarray:
    return 250 / (1 + np.exp(-logits))


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The logits of every row of windows, before they are rounded to a probability."""
    found: list[np.ndarray] = []
    down = Blend.down

    def recorded(self: Blend, top: int, row: torch.Tensor) -> torch.Tensor:
        found.append(row.numpy().copy())
        return down(self, top, row)

    monkeypatch.setattr(Blend, "down", recorded)
    return found


def same_sums(sums: list[np.ndarray], runs: list[Callable[[], object]]) -> bool:
    each = []
    for run in runs:
        sums.clear()
        run()
        each.append(list(sums))
    assert each[0]
    assert len({len(one) for one in each}) == 1
    return all(np.array_equal(a, b) for other in each for a, b in zip(each[0], other, strict=True))


# The map


@pytest.mark.parametrize(
    ("height", "width"), [(48, 40), (5, 7), (1, 33), (16, 16), (17, 15), (100, 9)]
)
def test_any_size_of_site_is_mapped_on_its_own_grid(height: int, width: int) -> None:
    of = reflectance(3, height, width)
    found = predict(untrained(), of)
    assert found.dtype == np.uint8
    assert found.dims == ("year", "y", "x")
    assert found.shape == (2, height, width)
    for name in ("year", "y", "x"):
        xr.testing.assert_equal(found[name], of[name])
    assert found.max() <= 250


@pytest.mark.parametrize(("height", "width"), [(70, 53), (20, 90), (7, 5)])
def test_the_map_is_that_of_brute_force(height: int, width: int) -> None:
    """Every window of the mirrored image by itself, blended in floating point over the whole."""
    model, of = untrained(), reflectance(1, height, width, (2019,))
    side, step, beyond = 16, 8, 4
    ends = [
        max(-(-(n + 2 * beyond - side) // step), 0) * step + side - n - beyond
        for n in (height, width)
    ]
    image = np.pad(of.values[0], [(0, 0), (beyond, ends[0]), (beyond, ends[1])], mode="reflect")
    ramp = np.sin(np.pi * (np.arange(side) + 0.5) / side) ** 2
    total, weight = np.zeros((2, *image.shape[1:]))
    for y in range(0, image.shape[1] - side + 1, step):
        for x in range(0, image.shape[2] - side + 1, step):
            window = torch.from_numpy(normal(image[:, y : y + side, x : x + side])).float()
            with torch.inference_mode():
                logits = model.network(window[None])[0, 0].double().numpy()
            total[y : y + side, x : x + side] += logits * ramp[:, None] * ramp
            weight[y : y + side, x : x + side] += ramp[:, None] * ramp
    expected = stored(total / weight)[beyond : beyond + height, beyond : beyond + width]
    assert np.ptp(expected) > 20
    assert (
        np.abs(predict(model, of).values[0] - expected).max() <= 0.5 + 0.1
    )  # weights are kept in steps of a thousandth


def test_windows_and_strips_do_not_show() -> None:
    # A network that looks at single pixels only must give the same map in windows as at once.
    of = reflectance(4, 300, 38)
    expected = stored(normal(of.isel(band=0).values) * 0.7 - 0.2)
    found = predict(given_by(lambda x: x[:, :1] * 0.7 - 0.2), of)
    assert np.abs(found.values - expected).max() <= 0.5 + 1e-3


def test_logits_are_blended_not_probabilities_and_the_rim_of_a_window_counts_little() -> None:
    # Windows give +8 in their left half, -2 in their right: where two meet, logits by squared sine are known in closed form.
    half = torch.where(torch.arange(16) < 8, 8.0, -2.0).expand(1, 1, 16, 16)
    found = predict(
        given_by(lambda x: half.expand(len(x), -1, -1, -1)), reflectance(5, 24, 64)
    ).values[0, 12, 4:52]
    weight = (
        np.sin(np.pi * (np.arange(8) + 0.5) / 16) ** 2
    )  # of the window that begins here; its left half lies over
    logits = 8 * weight + -2 * (1 - weight)  # the right half of the one before
    assert np.abs(found.reshape(-1, 8).astype(int) - np.rint(stored(logits))).max() <= 1


def test_pairs_see_the_earlier_year_first() -> None:
    of = reflectance(6, 50, 30, YEARS)
    found = predict(
        given_by(pair_of, CHANGE), of.sel(year=[2021, 2018, 2019])
    )  # whatever the cube's order
    assert found.dims == ("pair", "class", "y", "x")
    assert list(zip(found["first"].values, found["second"].values, strict=True)) == [
        (2018, 2019),
        (2018, 2021),
        (2019, 2021),
    ]
    assert found["class"].values.tolist() == ["removed", "new"]
    for n, (a, b) in enumerate(list_views(CHANGE, YEARS)):
        before, after = (normal(of.sel(year=year).isel(band=0).values) for year in (a, b))
        assert (
            np.abs(found.values[n] - stored(np.stack([after - before, before]))).max() <= 0.5 + 1e-3
        )
    two = predict(given_by(pair_of, CHANGE), of, pairs=[(2019, 2021), (2018, 2019)])
    np.testing.assert_array_equal(two.values, found.values[[0, 2]])


def test_a_series_sees_all_years() -> None:
    of = reflectance(7, 50, 30, YEARS)
    values = normal(of.isel(band=0).values)
    found = predict(given_by(series_of, SERIES), of)
    assert found.dims == ("year", "y", "x")
    assert np.abs(found.values - stored(values - values.mean(axis=0))).max() <= 0.5 + 1e-3
    turned = predict(given_by(series_of, SERIES), of.sel(year=[2021, 2018, 2019]))
    xr.testing.assert_identical(turned, found.sel(year=[2021, 2018, 2019]))


def test_one_year_alone_and_in_a_series_are_the_same() -> None:
    of = reflectance(10)
    series = predict(untrained(), of)
    alone = predict(untrained(), of.sel(year=2020))
    assert alone.dims == ("y", "x")
    xr.testing.assert_identical(alone, series.sel(year=2020))
    assert "year" not in predict(untrained(), of.sel(year=2020, drop=True)).coords


# Pixels that are not there


def holes(of: xr.DataArray) -> xr.DataArray:
    of.values[0, 3, 10, 20] = 0
    of.values[1, :, :40, :40] = 0
    return of


def test_pixels_without_observation_have_no_probability() -> None:
    of = holes(reflectance(8, 60, 60, YEARS))
    unseen = (of.values == 0).any(axis=1)
    assert np.array_equal(predict(untrained(), of).values == 255, unseen)
    assert np.array_equal(predict(given_by(series_of, SERIES), of).values == 255, unseen)
    either = np.stack([unseen[0] | unseen[1], unseen[0] | unseen[2], unseen[1] | unseen[2]])
    found = predict(given_by(pair_of, CHANGE), of).values == 255
    assert np.array_equal(found, np.stack([either, either], axis=1))


@pytest.mark.parametrize("hole", [slice(0, 40), slice(0, 46), slice(16, 64)])
def test_windows_without_an_observed_pixel_are_not_computed(hole: slice) -> None:
    seen: list[torch.Tensor] = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return x[:, :1]

    of = reflectance(9, 64, 64, (2019,))
    of.values[0, :, :40] = 0
    of.values[0, 2, 40:, hole] = 0  # one band missing is as good as all
    predict(given_by(forward), of)
    layout = Layout(64, 64, 16)
    live = np.pad((of.values[0] > 0).all(axis=0), [(4, 4), (4, 4)], mode="reflect")
    count = sum(len(windows) for windows in seen)
    assert count == sum(
        live[y : y + 16, x : x + 16].any() for y in layout.tops for x in layout.lefts
    )
    assert 0 < count < len(layout.tops) * len(layout.lefts) / 3
    of.values[...] = 0
    seen.clear()
    assert (predict(given_by(forward), of) == 255).all()
    assert not seen


def test_a_hole_does_not_move_the_pixels_around_it() -> None:
    # Windows left out are left out of the weights, too: nothing of a single-pixel network's map may change.
    of = reflectance(10, 64, 64, (2019,))
    model = given_by(lambda x: x[:, :1])
    whole = predict(model, of).values
    of.values[0, :, :, 20:50] = 0
    found = predict(model, of).values
    assert np.array_equal(found[..., :20], whole[..., :20])
    assert np.array_equal(found[..., 50:], whole[..., 50:])


# The same, whatever computes


def test_the_map_is_the_same_whatever_the_workers_and_the_batch(sums: list[np.ndarray]) -> None:
    # Wide enough for the libraries to choose another kernel for another batch, or number of threads, as they do.
    model, of = untrained(WIDE), reflectance(6, 70, 53, (2019,))
    hows = [Compute(workers=n) for n in (1, 2, 3, 8)] + [
        Compute(workers=2, batch=n) for n in (1, 7, 1000)
    ]
    assert same_sums(sums, [lambda how=how: predict(model, of, compute=how) for how in hows])


def test_the_map_is_the_same_whatever_the_threads_of_the_caller(sums: list[np.ndarray]) -> None:
    def with_threads(n: int) -> None:
        torch.set_num_threads(n)
        try:
            predict(model, of)
            assert torch.get_num_threads() == n
        finally:
            torch.set_num_threads(1)

    model, of = untrained(WIDE), reflectance(6, 40, 53, (2019,))
    assert same_sums(sums, [lambda n=n: with_threads(n) for n in (1, 2, 4)])


def test_the_map_is_the_same_whichever_window_is_first(sums: list[np.ndarray]) -> None:
    """Some calls take long, others overtake them."""
    network = untrained().network
    pixels = reflectance(7, 70, 153)
    orders: list[list[int]] = []

    def predict_delayed(seed: int) -> None:
        rng = random.Random(seed)
        order: list[int] = []

        def forward(windows: torch.Tensor) -> torch.Tensor:
            logits = network(windows)
            time.sleep(rng.choice((0, 0, 0.02)))
            order.append(hash(windows.numpy().tobytes()))
            return logits

        predict(given_by(forward), pixels, compute=Compute(workers=4))
        orders.append(order)

    delayed = [partial(predict_delayed, seed) for seed in range(3)]
    assert same_sums(sums, [lambda: predict(given_by(network), pixels), *delayed])
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def test_the_map_is_the_same_whatever_the_height_of_strips(
    sums: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, of = untrained(), holes(reflectance(8, 131, 53))

    def read(rows: int, chunks: tuple[int, ...] | None) -> None:
        monkeypatch.setattr(mapping, "_READ_ROWS", rows)
        pixels = of.copy()
        if chunks:
            pixels.encoding["chunks"] = chunks
        predict(model, pixels)

    runs = [
        (1, None),
        (17, None),
        (1000, None),
        (1, (1, 10, 7, 7)),
        (40, (1, 10, 50, 50)),
        (1, (1, 10, 128, 128)),
    ]
    assert same_sums(sums, [partial(read, *run) for run in runs])


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


@pytest.mark.parametrize(
    ("count", "best", "sizes"),
    [
        (0, 16, []),
        (1, 16, [1]),
        (17, 16, [17]),
        (23, 16, [23]),
        (25, 16, [12, 13]),
        (41, 16, [13, 14, 14]),
        (7, 1, [1] * 7),
    ],
)
def test_windows_of_a_row_go_in_equal_groups_of_about_the_best_size(
    count: int, best: int, sizes: list[int]
) -> None:
    groups = cores.group_windows(range(count), best)
    assert [n for group in groups for n in group] == list(range(count))
    assert sorted(map(len, groups)) == sizes


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 80), st.integers(1, 50), st.integers(0, 2**31), st.sampled_from([4, 6, 7, 16])
)
def test_rows_come_once_and_in_order_whatever_the_size(
    height: int, width: int, seed: int, window: int
) -> None:
    of = reflectance(seed, height, width, (2019,))
    model = given_by(
        lambda x: x[:, :1], dataclasses.replace(SMALL, window_px=window, multiple_px=1)
    )
    rows = list(Mapper(model).map_rows(of, [(2019,)]))
    assert [r.y for r in rows] == np.cumsum([0, *(r.values.shape[-2] for r in rows)])[:-1].tolist()
    whole = np.concatenate([r.values for r in rows], axis=-2)[0, 0]
    assert whole.shape == (height, width)
    assert np.abs(whole - stored(normal(of.values[0, 0]))).max() <= 0.5 + 1e-3


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 200), st.sampled_from([4, 6, 7, 16, 33]))
def test_every_pixel_is_well_inside_of_some_window(size: int, window: int) -> None:
    layout = Layout(size, 1, window)
    assert len(layout.rows) == layout.tops[-1] + window
    centres = np.array(layout.tops) + (window - 1) / 2 - layout.margin
    distance = np.abs(np.arange(size)[:, None] - centres).min(axis=1)
    assert distance.max() <= window / 4 + 1
    np.testing.assert_array_equal(
        layout.rows[layout.margin : layout.margin + size], np.arange(size)
    )


# Streams


def recording(of: xr.DataArray, read: list[int]) -> xr.DataArray:
    """The same pixels, lazy: chunks of 16 rows, of which each notes its first row as it is read."""

    def block(
        values: np.ndarray, block_info: dict[int, dict[str, list[tuple[int, int]]]]
    ) -> np.ndarray:
        read.append(block_info[0]["array-location"][2][0])
        return values

    lazy = of.chunk({"year": 1, "y": 16})
    lazy = lazy.copy(
        data=lazy.data.map_blocks(block, dtype=np.uint16, meta=np.empty((0, 0, 0, 0), np.uint16))
    )
    lazy.encoding["chunks"] = (1, 10, 16, 40)
    return lazy


def test_every_row_is_read_once_a_view_and_not_long_before_it_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mapping, "_READ_ROWS", 16)
    of, read = reflectance(9, 208, 40, YEARS), list[int]()
    lazy = recording(of, read)
    for rows in Mapper(untrained(), Compute(workers=2)).map_rows(lazy, [(2019,)]):
        # A strip that waits, one that is made, rows in flight, and the row of windows itself.
        assert max(read) <= rows.y + 16 * 8
    assert sorted(read) == list(range(0, 208, 16))
    read.clear()
    list(Mapper(given_by(pair_of, CHANGE)).map_rows(lazy, list_views(CHANGE, YEARS)))
    assert sorted(read) == sorted([*range(0, 208, 16)] * 6)
    xr.testing.assert_identical(predict(untrained(), lazy), predict(untrained(), of))


def test_memory_is_flat_in_the_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapping, "_READ_ROWS", 16)
    model = given_by(lambda x: x[:, :1], dataclasses.replace(SMALL, window_px=32))

    def peak(height: int) -> int:
        def rows(block_info: dict[None, dict[str, list[tuple[int, int]]]]) -> np.ndarray:
            (a, b) = block_info[None]["array-location"][2]
            return np.full((1, 10, b - a, 150), 1000, np.uint16)

        import dask.array as da

        made = da.map_blocks(
            rows,
            chunks=((1,), (10,), (16,) * (height // 16), (150,)),
            dtype=np.uint16,
            meta=np.empty((0,) * 4, np.uint16),
        )
        lazy = xr.DataArray(
            made, dims=("year", "band", "y", "x"), coords={"year": [2019], "band": list(BANDS)}
        )
        lazy.encoding["chunks"] = (1, 10, 16, 150)
        tracemalloc.start()
        seen = sum(
            r.values.shape[-2] for r in Mapper(model, Compute(workers=2)).map_rows(lazy, [(2019,)])
        )
        left, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert seen == height
        return most - left  # without Dask's graph, of which a taller site has more

    peak(320)  # what is imported and kept once
    small, large = peak(320), peak(1280)
    # A peak varies with who is quick, by some strips; held pixels of the taller site would add all of their bytes.
    assert large - small < (1280 - 320) * 150 * 20 / 4


def test_a_reader_is_ahead_by_as_much_as_was_asked_for_and_ends_when_closed() -> None:
    made: list[int] = []
    before = threading.active_count()

    def items() -> Iterator[int]:
        for n in range(100):
            made.append(n)
            yield n

    there = streams.read_ahead(items(), depth=2)
    assert next(there) == 0
    deadline = threading.Event()
    for _ in range(200):
        if len(made) == 3:  # one taken, two waiting
            break
        deadline.wait(0.01)
    deadline.wait(0.05)
    assert made == [0, 1, 2]
    there.close()
    assert threading.active_count() == before
    assert list(streams.read_ahead(iter(range(50)))) == list(range(50))


def test_an_error_in_the_reader_reaches_the_caller_and_no_thread_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mapping, "_READ_ROWS", 16)
    of, before = reflectance(1, 200, 40, (2019,)), threading.active_count()

    def block(
        values: np.ndarray, block_info: dict[int, dict[str, list[tuple[int, int]]]]
    ) -> np.ndarray:
        if block_info[0]["array-location"][2][0] == 96:
            raise OSError("bad sector")
        return values

    lazy = of.chunk({"y": 16})
    lazy = lazy.copy(
        data=lazy.data.map_blocks(block, dtype=np.uint16, meta=np.empty((0, 0, 0, 0), np.uint16))
    )
    with dask.config.set(scheduler="synchronous"):  # so that no thread is Dask's
        with pytest.raises(OSError, match="bad sector"):
            predict(untrained(), lazy)
        rows = Mapper(untrained()).map_rows(lazy, [(2019,)])
        next(rows)
        rows.close()  # the caller has enough
    assert threading.active_count() == before
    assert torch.get_num_threads() == 1


# Batches, as on a GPU


@pytest.fixture
def batched(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], list[Forward]]:
    """Start to compute on the CPU as on a GPU, in batches of this size at first."""

    def start(batch: int | None) -> list[Forward]:
        forwards: list[Forward] = []

        def sum_rows(
            forward: Forward, strips: Iterator[Strip[object]], ramp: np.ndarray, _: Compute
        ) -> Iterator[object]:
            if forward not in forwards:
                forward.group = batch
                forwards.append(forward)
            yield from batches.sum_in_batches(forward, strips, torch.from_numpy(ramp))

        monkeypatch.setattr(mapping, "sum_rows", sum_rows)
        return forwards

    return start


@pytest.mark.parametrize("batch", [None, 1, 5, 64, 10_000])
def test_batches_across_rows_and_years_give_the_same_map(
    batch: int | None, batched: Callable[[int | None], list[Forward]]
) -> None:
    of = holes(reflectance(11, 70, 53))
    expected = predict(untrained(), of)
    batched(batch)
    found = predict(untrained(), of)
    assert np.array_equal(found == 255, expected == 255)
    assert (
        np.abs(found.astype(int) - expected.astype(int)).max() <= 1
    )  # the last bits of a logit depend on the batch


def test_out_of_memory_halves_the_batch_and_takes_the_same_windows_again(
    batched: Callable[[int | None], list[Forward]], caplog: pytest.LogCaptureFixture
) -> None:
    sizes: list[int] = []

    def forward(windows: torch.Tensor) -> torch.Tensor:
        sizes.append(len(windows))
        if len(windows) > 6:
            raise torch.OutOfMemoryError("no room")
        return windows[:, :1]

    of = reflectance(12, 70, 53)
    forwards = batched(40)
    assert (
        np.abs(predict(given_by(forward), of).values - stored(normal(of.values[:, 0]))).max()
        <= 0.5 + 1e-3
    )
    assert sizes[:4] == [40, 20, 10, 5]
    assert set(sizes[3:-1]) == {5}
    assert [made.group for made in forwards] == [5]  # of which the next site makes use
    layout = Layout(70, 53, 16)
    assert sum(size for size in sizes if size <= 6) == 2 * len(layout.tops) * len(
        layout.lefts
    )  # each once
    assert "out of memory at 10 windows to a batch; going on with 5" in caplog.text


def test_a_batch_is_looked_for_once_and_used_for_all_sites(
    monkeypatch: pytest.MonkeyPatch, batched: Callable[[int | None], list[Forward]]
) -> None:
    tried, sizes, room = list[object](), list[int](), [100]
    model, of = untrained(), reflectance(13, 70, 53)
    expected = predict(model, of)

    def find_batch(seconds: Callable[[int], float]) -> int:
        tried.append(seconds)
        return 12

    def limited(windows: torch.Tensor) -> torch.Tensor:
        sizes.append(len(windows))
        if len(windows) > room[0]:
            raise torch.OutOfMemoryError("no room")
        return model.network(windows)

    monkeypatch.setattr(batches, "find_batch", find_batch)
    batched(None)
    mapper = Mapper(given_by(limited))
    layout = Layout(70, 53, 16)
    count = 2 * len(layout.tops) * len(layout.lefts)
    for fits, size in ((100, 12), (100, 12), (7, 6), (100, 6)):
        room[0], sizes[:] = fits, []
        rows = list(mapper.map_rows(of, [(2019,), (2020,)]))
        found = np.concatenate(
            [
                np.concatenate([r.values for r in rows if r.view == (y,)], axis=-2)[0]
                for y in (2019, 2020)
            ]
        )
        assert np.abs(found.astype(int) - expected.values.astype(int)).max() <= 1
        done = [n for n in sizes if n <= fits]
        assert sum(done) == count
        assert set(done[:-1]) == {size}
    assert len(tried) == 1
    sizes[:], room[0] = [], 0
    with pytest.raises(ModelError, match="does not hold one window"):
        list(mapper.map_rows(of, [(2019,)]))
    assert sizes == [6, 3, 1]


def test_memory_that_runs_out_over_the_last_few_says_nothing_of_the_next_site() -> None:
    def logits(windows: torch.Tensor) -> torch.Tensor:
        if len(windows) == 3:
            raise torch.OutOfMemoryError("no room")
        return torch.ones_like(windows[:, :1])

    strips = [
        Strip(
            tag=0, pixels=np.ones((1, 10, 16, 16 * 11), np.uint16), lefts=tuple(range(0, 176, 16))
        )
    ]
    model = given_by(logits)
    forward = Forward(model.network, model, Compute(batch=8), (2019,))
    rows = batches.sum_in_batches(forward, iter(strips), torch.ones(16, dtype=torch.int64))
    ((_, total, _),) = rows
    assert (total == 2**20).all()
    assert forward.group == 8


def test_memory_that_does_not_hold_one_window_is_an_error(
    batched: Callable[[int | None], list[Forward]],
) -> None:
    def forward(windows: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    batched(None)
    with pytest.raises(ModelError, match="does not hold one window"):
        predict(given_by(forward), reflectance(13))


def test_the_batch_doubles_until_memory_or_throughput_stops() -> None:
    tried: list[int] = []

    def seconds(size: int, fixed: float, room: int) -> float:
        tried.append(size)
        if size > room:
            raise torch.OutOfMemoryError("no room")
        return fixed + size * 0.01

    assert (
        batches.find_batch(lambda n: seconds(n, 0.1, 10**6)) == 128
    )  # 256 would be faster by 3.9 % only
    assert tried == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert batches.find_batch(lambda n: seconds(n, 0.1, 20)) == 16
    assert batches.find_batch(lambda n: seconds(n, 0, 10**6)) == 1
    assert batches.find_batch(lambda n: seconds(n, 100, 10**6)) == 1024
    assert batches.find_batch(lambda n: seconds(n, 0, 0)) == 1


def test_bf16_is_close_and_not_the_same() -> None:
    of = reflectance(14)
    exact = predict(untrained(WIDE), of).astype(int)
    coarse = predict(untrained(WIDE), of, compute=Compute(precision="bf16")).astype(int)
    assert 0 < np.abs(exact - coarse).max() < 25
    assert np.abs(exact - coarse).mean() < 2


# What goes wrong


def test_a_logit_that_is_no_number_stops_and_says_where(
    batched: Callable[[int | None], list[Forward]],
) -> None:
    of = reflectance(15, 100, 60)
    of.values[1, :, 40, 30] = 60_000
    model = given_by(lambda x: torch.where(x > 50, torch.nan, x)[:, :1])
    # Windows over row 40 begin at 28 and 36, those over column 30 at 20 and 28: it is the first of them that is named.
    where = "model small: a logit is not a number in 2020, in the window at row 28, column 20"
    with pytest.raises(ModelError, match=where):
        predict(model, of)
    batched(16)
    with pytest.raises(ModelError, match=where):
        predict(model, of)


def test_views() -> None:
    assert list_views(SMALL, [2020, 2019]) == [(2019,), (2020,)]
    assert list_views(SERIES, [2020, 2019]) == [(2019, 2020)]
    assert len(list_views(CHANGE, range(2015, 2025))) == 45
    assert list_views(CHANGE, YEARS, [(2019, 2021), (2019, 2021)]) == [(2019, 2021)]
    with pytest.raises(ModelError, match="change needs 2 years or more, found 2019"):
        list_views(CHANGE, [2019])
    for pairs in ([(2019, 2018)], [(2018, 2020)], [(2018, 2018)]):
        with pytest.raises(
            ModelError, match=f"of the years 2018, 2019, 2021, .* found {pairs[0][0]}-{pairs[0][1]}"
        ):
            list_views(CHANGE, YEARS, pairs)
    with pytest.raises(ModelError, match="pairs of years are for change; its task is mapping"):
        list_views(SMALL, YEARS, [(2018, 2019)])
    with pytest.raises(ModelError, match="year 2030 is not in the cube"):
        list(Mapper(untrained()).map_rows(reflectance(1), [(2030,)]))


def test_a_network_of_so_many_years_takes_no_other_number() -> None:
    model = given_by(series_of, SERIES)
    model.network.years = 3  # type: ignore[assignment]
    assert predict(model, reflectance(1, years=YEARS)).shape == (3, 48, 40)
    with pytest.raises(ModelError, match=r"takes 3 years, found 2 \(2019, 2020\)"):
        predict(model, reflectance(1))


def test_mapping_evaluates_and_leaves_the_model_as_it_was() -> None:
    model, of = untrained(), reflectance(11)
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    expected = predict(model, of)
    model.network.train()  # statistics of each window in place of those learnt, unless mapping sees to it
    xr.testing.assert_identical(predict(model, of), expected)
    assert model.network.training
    assert all(
        torch.equal(value, before[name]) for name, value in model.network.state_dict().items()
    )


def test_bands_are_taken_by_name() -> None:
    of = reflectance(12)
    three = dataclasses.replace(SMALL, bands=("B03", "B04", "B11"))
    expected = predict(untrained(three), of.sel(band=list(three.bands)))
    xr.testing.assert_identical(predict(untrained(three), of), expected)
    with pytest.raises(ModelError, match="in this order, found B03, B02, B04"):
        predict(untrained(), of.isel(band=[1, 0, *range(2, 10)]))
    with pytest.raises(ModelError, match="found B02, B03, B04"):
        predict(untrained(), of.isel(band=slice(0, 9)))
    with pytest.raises(ModelError, match="no names"):
        predict(untrained(), of.drop_vars("band"))


def test_decoded_reflectance_is_refused() -> None:
    with pytest.raises(ModelError, match=r"uint16.*float"):
        predict(untrained(), reflectance(13) / 10000.0)


def test_ways_to_compute_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ModelError, match=r"'cuda' was asked for, but torch .* sees 0 GPUs"):
        predict(untrained(), reflectance(14), compute=Compute(device="cuda"))
    with pytest.raises(ModelError, match="is for GPUs"):
        predict(untrained(), reflectance(14), compute=Compute(compiled=True))
    with pytest.raises(ModelError, match="'gpu' is not one that torch knows"):
        predict(untrained(), reflectance(14), compute=Compute(device="gpu"))
    for wrong in ({"precision": "fp8"}, {"workers": 0}, {"batch": -1}):
        with pytest.raises(
            ModelError, match="expected a precision of fp32, bf16, workers and batch of 1 or more"
        ):
            Compute(**wrong)  # type: ignore[arg-type]


def test_progress_ends_with_all_windows() -> None:
    seen: list[tuple[int, int]] = []
    predict(untrained(), reflectance(9), progress=lambda done, total: seen.append((done, total)))
    layout = Layout(48, 40, 16)
    each = len(layout.lefts)
    total = 2 * len(layout.tops) * each
    assert seen == [(n, total) for n in range(each, total + 1, each)]


def test_what_made_a_map_follows_from_the_weights() -> None:
    a, b = untrained(), untrained()
    assert models.describe(a) == models.describe(b)
    with torch.no_grad():
        next(b.network.parameters())[0, 0, 0, 0] += 1e-3
    assert models.describe(a)["weights_sha256"] != models.describe(b)["weights_sha256"]
    signed = Weights(href="https://example.org/a.pt?signature=secret", sha256="a1" * 32)
    elsewhere = dataclasses.replace(a.card, weights=signed, scores={"iou": 0.9})
    assert models.describe(dataclasses.replace(a, card=elsewhere)) == models.describe(a)
    assert models.describe(a)["mapped_by"] == {
        "window_px": 16,
        "step_px": 8,
        "weights": "squared sine",
    }


def test_sums_are_exact_and_limited() -> None:
    logits = torch.tensor([[[1e9, -1e9], [0.5, 2**-21], [29.9999981, 3 * 2**-21]]])
    found = weight_logits(logits, torch.tensor([1, 1024]))
    assert found.tolist() == [
        [[30 * 2**20, -30 * 2**30], [2**19, 0], [int(logits[0, 2, 0].item() * 2**20), 2 * 1024]]
    ]
    row = torch.ones((1, 3, 3), dtype=torch.int64)
    add_window(row, 1, found)
    assert row[..., 0].tolist() == [[1, 1, 1]]
    assert torch.equal(row[..., 1:], found + 1)


@pytest.mark.parametrize("top", [True, False])
def test_rows_are_blended_with_the_overlap_of_the_row_above(top: bool) -> None:
    rng = np.random.default_rng(1)
    ramp, limits = (
        Layout(40, 40, 16).ramp,
        np.sort([0, *rng.normal(0, 3, 249)]),
    )  # a sum of zero is not above it
    weight = rng.integers(1000, 1050, (9, 20)) * 1000 * 2.0**20
    row, before = (rng.integers(-(2**33), 2**33, (2, 3, n, 32)) for n in (16, 0 if top else 8))
    row[1, 2, 3:12, 4:24] = 0
    total = row * ramp[:, None]
    total[..., : before.shape[2], :] += before
    expected = np.searchsorted(limits, total[..., 3:12, 4:24] / weight)
    found = blend_rows(*map(torch.from_numpy, (row, before, ramp, weight, limits)), (3, 4))
    np.testing.assert_array_equal(row, total)
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(expected)) > 150
