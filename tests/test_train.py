"""Training: what is drawn, learnt, ignored, judged, kept, and gone on from."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import math
import os
import socket
import subprocess
import sys
import textwrap
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import odc.geo.xr
import pytest
import torch
import xarray as xr
from click.testing import CliRunner
from hypothesis import given
from hypothesis import settings as having
from hypothesis import strategies as st
from sklearn.metrics import f1_score, jaccard_score, precision_score, recall_score
from torch import nn

from known_scenes import site_of
from minecube import cube as stores
from minecube import models
from minecube.catalog import BANDS, ModelCard, Recipe, TrainingSettings, load_presets
from minecube.cli import cli
from minecube.errors import CatalogError, ModelError
from minecube.grid import grid_of
from minecube.models import load, predict
from minecube.train import (
    Cubes,
    Tiles,
    TrainingOptions,
    Windows,
    checkpoint,
    compute_targets,
    fit,
    list_views,
    statistics,
    survey_source,
)
from minecube.train.loss import compute_loss
from minecube.train.windows import augment, batches, count_steps

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ModelCard(
    id="small",
    title="for tests",
    architecture="unet",
    options={"width": 4, "depth": 2},
    window_px=16,
    multiple_px=4,
)
CHANGE = dataclasses.replace(SMALL, id="pairs", task="change", classes=("removed", "new"))
SERIES = dataclasses.replace(SMALL, id="all-years", task="series")
PLAIN = TrainingSettings(id="plain", title="for tests", epochs=3, batch=8, learning_rate=3e-3)


def cube(
    seed: int, height: int = 48, width: int = 40, years: tuple[int, ...] = (2019, 2020)
) -> xr.Dataset:
    """Bright discs, the mines, in dim noise; another disc each year."""
    r = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    mine = np.stack(
        [
            np.hypot(y - r.uniform(0.3, 0.7) * height, x - r.uniform(0.3, 0.7) * width)
            < r.uniform(8, 14)
            for _ in years
        ]
    )
    pixels = r.normal(1000, 150, (len(years), len(BANDS), height, width)) + 900 * mine[:, None]
    return xr.Dataset(
        {
            "reflectance": (("year", "band", "y", "x"), np.clip(pixels, 1, None).astype(np.uint16)),
            "footprint": (("year", "y", "x"), mine.astype(np.uint8)),
        },
        coords={"year": list(years), "band": list(BANDS)},
    )


def with_holes(
    seed: int, height: int = 48, width: int = 40, years: tuple[int, ...] = (2019, 2020)
) -> xr.Dataset:
    """The same with unknown labels and unobserved pixels, some in one band only."""
    of, r = cube(seed, height, width, years), np.random.default_rng(seed)
    of.footprint.values[r.random(of.footprint.shape) < 0.1] = 255
    of.reflectance.values[r.random(of.reflectance.shape) < 0.01] = 0
    return of


def labels_of(of: xr.Dataset) -> np.ndarray:
    """What is both labelled and observed, the rest 255."""
    return np.where((of.reflectance.values > 0).all(axis=1), of.footprint.values, 255)


def weights(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(v, w) for (a, v), (b, w) in pairs)


class Flat(nn.Module):
    """A network of each task without batch normalisation: a pixel's bands, and for pairs those of both years."""

    def __init__(self, card: ModelCard) -> None:
        super().__init__()
        self.task = card.task
        inputs = len(card.bands) * (2 if card.task == "change" else 1)
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, len(card.classes), 1)
        )

    def forward(self, x: torch.Tensor, _years: torch.Tensor | None = None) -> torch.Tensor:
        if self.task == "mapping":
            return self.layers(x)
        if self.task == "change":
            return self.layers(x.flatten(1, 2))
        return self.layers(x.flatten(0, 1)).unflatten(0, x.shape[:2])


@pytest.fixture
def flat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.ARCHITECTURES, "unet", Flat)


# What is to be learnt


@having(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0, 1, 255]), min_size=24, max_size=24))
def test_targets_are_what_each_pair_of_pixels_says(values: list[int]) -> None:
    label = np.array(values, np.uint8).reshape(2, 3, 4)
    classes = ("new", "changed", "removed")
    found = compute_targets(label, classes)
    assert (found.dtype, found.shape) == (np.uint8, (1, 3, 3, 4))
    for y, x in np.ndindex(3, 4):
        before, after = int(label[0, y, x]), int(label[1, y, x])
        told = {
            "new": (before, after) == (0, 1),
            "removed": (before, after) == (1, 0),
            "changed": before != after,
        }
        for c, name in enumerate(classes):
            assert found[0, c, y, x] == (255 if 255 in (before, after) else told[name])
    assert np.array_equal(compute_targets(label, ("mine",)), label[:, None])


def test_views_are_those_of_the_task() -> None:
    years = tuple(range(2015, 2025))
    source = Cubes({"a": cube(1, years=years), "b": cube(2, 8, 8, (2016, 2020, 2021))})
    assert list_views(source, SMALL) == [("a", (y,)) for y in years] + [
        ("b", (y,)) for y in (2016, 2020, 2021)
    ]
    pairs = list_views(source, CHANGE)
    assert len(pairs) == 45 + 3
    assert pairs[-3:] == [("b", (2016, 2020)), ("b", (2016, 2021)), ("b", (2020, 2021))]
    assert all(first < second for _, (first, second) in pairs)
    far = list_views(source, CHANGE, (4, 9))
    assert far == [
        ("a", (y, y + 4)) if y < 2021 else ("a", (2015, 2024)) for y in range(2015, 2016)
    ] + [("a", (2015, 2024))] + [("a", (y, y + 4)) for y in range(2016, 2021)] + [
        ("b", (2016, 2020))
    ]
    assert list_views(Cubes({"a": cube(1, years=years)}), SERIES) == [("a", years)]


def test_years_come_in_their_order_whatever_the_order_in_the_cube() -> None:
    of = cube(1, years=(2018, 2019, 2021))
    plain, turned = Cubes({"a": of}), Cubes({"a": of.isel(year=[2, 0, 1])})
    assert list_views(turned, CHANGE) == list_views(plain, CHANGE)
    for one, other in zip(
        turned.cut("a", (2018, 2021), 3, 4, 20), plain.cut("a", (2018, 2021), 3, 4, 20), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_years_that_do_not_fit_the_task_are_refused() -> None:
    one, two = cube(1, years=(2019,)), cube(2)
    with pytest.raises(ModelError, match="sees two years, found 2019 at a"):
        fit(CHANGE, Cubes({"a": one}), None, PLAIN)
    with pytest.raises(ModelError, match=r"two years 2 or 3 years apart, found 2019, 2020 at b"):
        fit(CHANGE, Cubes({"b": two}), None, dataclasses.replace(PLAIN, gaps=(2, 3)))
    with pytest.raises(ModelError, match=r"those of a \(2019\), found 2019, 2020 at b"):
        fit(SERIES, Cubes({"a": one, "b": two}), None, PLAIN)
    with pytest.raises(
        ModelError,
        match=r"as many of the validation sites as of the training sites \(2\), found 1 at a",
    ):
        fit(SERIES, Cubes({"b": two}), Cubes({"a": one}), PLAIN)


# The survey


class Counted(Cubes):
    """Says how large the largest cut was."""

    largest = 0

    def cut(self, *args: Any) -> Any:
        found = super().cut(*args)
        type(self).largest = max(type(self).largest, found[0].size)
        return found


def test_normalisation_is_that_of_observed_training_pixels() -> None:
    a, b, unseen = with_holes(1), with_holes(2, 33, 70), cube(3)
    unseen.reflectance.values[...] += 5000  # were it looked at, the mean would tell
    three = dataclasses.replace(SMALL, bands=("B03", "B08", "B12"))
    model = fit(
        three, Cubes({"a": a, "b": b}), Cubes({"c": unseen}), dataclasses.replace(PLAIN, epochs=1)
    ).trained
    images = np.concatenate(
        [
            c.reflectance.sel(band=list(three.bands)).values.swapaxes(0, 1).reshape(3, -1)
            for c in (a, b)
        ],
        axis=1,
    )
    observed = images[:, (images > 0).all(axis=0)].astype(np.longdouble)
    np.testing.assert_allclose(model.mean, observed.mean(axis=1).astype(float), rtol=1e-14)
    np.testing.assert_allclose(model.std, observed.std(axis=1).astype(float), rtol=1e-12)


def test_the_survey_reads_blocks_and_says_the_same_whatever_their_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = Counted({"a": with_holes(1, 70, 45), "b": with_holes(2, 20, 100)})
    whole = survey_source(source, CHANGE, PLAIN)
    monkeypatch.setattr(statistics, "BLOCK_PX", 32)
    Counted.largest = 0
    found = survey_source(source, CHANGE, PLAIN)
    assert Counted.largest == 10 * 32 * 32  # one year of one block
    assert (found.mean, found.std, found.positive, found.pixels) == (
        whole.mean,
        whole.std,
        whole.positive,
        whole.pixels,
    )
    for name in ("known", "rare"):
        pairs = zip(getattr(found, name), getattr(whole, name), strict=True)
        assert all(np.array_equal(one, other) for one, other in pairs)


@having(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 99),
    height=st.integers(1, 50),
    width=st.integers(1, 50),
    side=st.sampled_from([4, 8, 12, 16, 32, 96, 160]),
)
def test_the_survey_finds_every_cell_and_pixel(
    seed: int, height: int, width: int, side: int
) -> None:
    of = with_holes(seed, height, width, (2018, 2019, 2020))
    of.footprint.values[0, 0, 0], of.footprint.values[1:, 0, 0] = 0, 1  # some change at least
    of.footprint.values[0, -1, -1], of.footprint.values[1:, -1, -1] = 1, 0
    of.reflectance.values[:, :, [0, -1], [0, -1]] = 7
    if height * width == 1:
        return
    card = dataclasses.replace(CHANGE, window_px=side)
    found = survey_source(Cubes({"a": of}), card, PLAIN)
    cell = {4: 1, 8: 2, 12: 2, 16: 4, 32: 8, 96: 16, 160: 16}[side]
    assert found.cell_px == cell
    labels = dict(zip((2018, 2019, 2020), labels_of(of).astype(int), strict=True))
    positive, pixels = Counter(), 0
    for n, (_, (first, second)) in enumerate(found.views):
        known = (labels[first] < 2) & (labels[second] < 2)
        gone, new = (
            known & (labels[first] > labels[second]),
            known & (labels[first] < labels[second]),
        )
        positive.update(removed=int(gone.sum()), new=int(new.sum()))
        pixels += int(known.sum())
        for row, column in np.ndindex(-(-height // cell), -(-width // cell)):
            part = np.s_[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
            assert found.known[n][row, column] == known[part].any()
            assert found.rare[n][row, column] == (gone | new)[part].any()
    assert found.positive == (positive["removed"], positive["new"])
    assert found.pixels == pixels


def test_what_cannot_be_learnt_is_refused() -> None:
    of = cube(1)
    of.footprint.values[...] = 255
    with pytest.raises(
        ModelError, match="cubes of a have no pixel that is both labelled and observed"
    ):
        fit(SMALL, Cubes({"a": of, "b": cube(2)}), None, PLAIN)
    of.footprint.values[0], of.reflectance.values[0] = 1, 0
    with pytest.raises(ModelError, match="both labelled and observed"):
        fit(SMALL, Cubes({"a": of}), None, PLAIN)
    with pytest.raises(ModelError, match="reflectance and footprint, found reflectance"):
        Cubes({"a": of.drop_vars("footprint")})
    with pytest.raises(ModelError, match="found none"):
        Cubes({})
    with pytest.raises(ModelError, match=r"uint16.* as float64"):
        Cubes({"a": of.assign(reflectance=of.reflectance / 1e4)})
    none = cube(1)
    none.footprint.values[...] = 0
    with pytest.raises(ModelError, match="'mine', found none in the labels of a"):
        fit(SMALL, Cubes({"a": none}), None, PLAIN)
    with pytest.raises(ModelError, match="'mine', found none in the labels of b"):
        fit(SMALL, Cubes({"a": cube(1)}), Cubes({"b": none}), PLAIN)
    still = cube(1)
    still.footprint.values[1] = still.footprint.values[0]
    with pytest.raises(ModelError, match=r"'removed', found none in the labels of a.*that change"):
        fit(CHANGE, Cubes({"a": still}), None, PLAIN)


def test_bands_are_taken_by_name() -> None:
    of = cube(1)
    three = dataclasses.replace(SMALL, bands=("B03", "B04", "B11"))
    once = dataclasses.replace(PLAIN, epochs=1)
    expected = fit(three, Cubes({"a": of.sel(band=list(three.bands))}), None, once)
    assert same(fit(three, Cubes({"a": of}), None, once).trained.network, expected.trained.network)
    with pytest.raises(ModelError, match="in this order, found B03, B02, B04"):
        fit(SMALL, Cubes({"a": of.isel(band=[1, 0, *range(2, 10)])}), None, once)
    with pytest.raises(ModelError, match="found B02, B03, B04"):
        fit(SMALL, Cubes({"a": of.isel(band=slice(0, 9))}), None, once)
    with pytest.raises(ModelError, match="no names"):
        fit(SMALL, Cubes({"a": of.drop_vars("band")}), None, once)
    with pytest.raises(
        ModelError, match=r"site b: expected the bands B02, .*, as of the other sites"
    ):
        Cubes({"a": of, "b": of.isel(band=slice(0, 9))})


# Windows


def drawn(source: Cubes, card: ModelCard, settings: TrainingSettings, seed: int = 0) -> Windows:
    return Windows(source, card, settings, survey_source(source, card, settings), seed)


def corner(height: int = 60, width: int = 70) -> xr.Dataset:
    """A mine of 5 x 3 pixels in the far corner, in one of two years."""
    of = cube(1, height, width)
    of.footprint.values[...] = 0
    of.footprint.values[1, -5:, -3:] = 1
    return of


@pytest.mark.parametrize("card", [SMALL, dataclasses.replace(CHANGE, classes=("changed",)), SERIES])
@pytest.mark.parametrize("rare", [0.0, 0.4, 1.0])
def test_as_many_windows_as_asked_for_hold_the_rare_class(card: ModelCard, rare: float) -> None:
    source = Cubes({"a": corner()})
    windows = drawn(source, card, dataclasses.replace(PLAIN, rare=rare))
    held = [bool((windows[0, i][1] == 1).any()) for i in range(400)]
    # Of the others, by the rule as it is written: a cell of any view, and a window around it that the site has room for.
    count = all_ = 0.0
    for _, years in windows.survey.views:
        for cy, cx in itertools.product(range(0, 60, 4), range(0, 70, 4)):
            ys, xs = (
                [at for at in range(size - 15) if at <= c and at + 16 >= min(c + 4, size)]
                for c, size in ((cy, 60), (cx, 70))
            )
            all_ += 1
            there = 2020 in years
            count += there * np.mean([y + 16 > 55 for y in ys]) * np.mean([x + 16 > 67 for x in xs])
    expected = rare + (1 - rare) * count / all_
    assert np.mean(held) == pytest.approx(
        expected, abs=4 * math.sqrt(max(expected * (1 - expected), 1e-6) / 400)
    )


def test_windows_anywhere_are_everywhere_that_a_label_is() -> None:
    of, small = cube(1, 24, 20), cube(2, 9, 30)
    of.footprint.values[1] = 255
    windows = drawn(Cubes({"a": of, "b": small}), SMALL, PLAIN)
    places = [windows.position(0, i) for i in range(5000)]
    assert {p.view for p in places} == {("a", (2019,)), ("b", (2019,)), ("b", (2020,))}
    assert {(p.y, p.x) for p in places if p.view[0] == "a"} == {
        (y, x) for y in range(9) for x in range(5)
    }
    assert {(p.y, p.x) for p in places if p.view[0] == "b"} == {(0, x) for x in range(15)}
    assert [windows.position(0, i) for i in range(30)] == places[:30]
    assert [windows.position(1, i) for i in range(30)] != places[:30]
    assert [drawn(windows.source, SMALL, PLAIN, 1).position(0, i) for i in range(30)] != places[:30]


def test_windows_a_step_apart_are_had_once_an_epoch() -> None:
    source = Cubes({"a": cube(1, 40, 33), "b": cube(2, 10, 50)})
    windows = drawn(source, SMALL, dataclasses.replace(PLAIN, step_px=16))
    expected = {("a", y, x) for y in (0, 16, 24) for x in (0, 16, 17)} | {
        ("b", 0, x) for x in (0, 16, 32, 34)
    }
    orders = []
    for epoch in range(2):
        places = [windows.position(epoch, i) for i in range(len(windows))]
        assert len(places) == 2 * len(expected)
        assert {(p.view[0], p.view[1][0], p.y, p.x) for p in places} == {
            (site, year, y, x) for site, y, x in expected for year in (2019, 2020)
        }
        orders.append(places)
    assert orders[0] != orders[1]


@pytest.mark.parametrize("card", [SMALL, CHANGE, SERIES])
def test_image_and_labels_are_turned_alike_in_all_years_and_unobserved_pixels_are_left_out(
    card: ModelCard,
) -> None:
    # Every band holds the label of its year, so after any turn, flip and shift they must still agree.
    of = cube(18, 40, 20)
    values = of.reflectance.values
    values[...] = 1000 + 3000 * of.footprint.values[:, None].astype(int)
    values[:, 4, 25:29, 5:9] = 0
    windows = drawn(
        Cubes({"a": of}),
        dataclasses.replace(card, window_px=32),
        dataclasses.replace(PLAIN, jitter=0.03),
    )
    seen = set()
    for number in range(40):
        image, wanted = windows[0, number]
        assert image.dtype == np.float32
        assert wanted.shape == ((2 if card.task == "series" else 1), len(card.classes), 32, 32)
        observed = image != 0
        raw = image * np.array(windows.survey.std, np.float32)[:, None, None]
        raw = (raw + np.array(windows.survey.mean, np.float32)[:, None, None])[:, 0]
        mine = np.where(observed.all(axis=1), raw > 2500, 255)
        expected = compute_targets(mine.astype(np.uint8), card.classes)
        assert np.array_equal(wanted, expected)
        seen.add(wanted.tobytes())
    assert len(seen) > 8


def test_turns_and_flips_are_the_eight_of_a_square_equally_often() -> None:
    image = np.arange(1, 17, dtype=np.uint16).reshape(1, 1, 4, 4)
    rng, still = np.random.default_rng(0), dataclasses.replace(PLAIN, jitter=0.0)
    forms = Counter()
    for _ in range(4000):
        varied, wanted = augment(image, image.astype(np.uint8), still, "mapping", rng)
        assert np.array_equal(varied, wanted)
        forms[varied.tobytes()] += 1
    square = image[0, 0].astype(np.float32)
    all_eight = {np.rot90(form, k).tobytes() for form in (square, square.T) for k in range(4)}
    assert set(forms) == all_eight
    assert (
        sum((n - 500) ** 2 / 500 for n in forms.values()) < 24.3
    )  # chi square, 7 degrees of freedom, p = 0.001
    varied, _ = augment(
        image, image.astype(np.uint8), dataclasses.replace(still, turns=False), "mapping", rng
    )
    assert np.array_equal(varied, image)


def test_jitter_has_a_factor_for_the_image_and_one_for_each_band() -> None:
    image = np.full((2, 3, 2, 2), 10000, np.uint16)
    image[:, :, 1, 1] = 0
    rng, label = np.random.default_rng(0), np.zeros((2, 1, 2, 2), np.uint8)
    varying = dataclasses.replace(PLAIN, jitter=0.04, turns=False)
    gains = (
        np.stack([augment(image, label, varying, "change", rng)[0] for _ in range(4000)]) / 10000
    )
    assert (gains[..., 1, 1] == 0).all()  # no observation stays none
    assert (gains[..., 0, 0] == gains[..., 0, 1]).all()
    each = gains[..., 0, 0].reshape(4000, 6)
    expected = np.kron(np.eye(2), np.full((3, 3), 0.04**2)) + np.eye(6) * 0.04**2
    np.testing.assert_allclose(each.mean(axis=0), 1, atol=4 * 0.057 / math.sqrt(4000))
    np.testing.assert_allclose(np.cov(each.T), expected, atol=2.5e-4)


def test_year_dropout_takes_images_not_labels_and_never_all() -> None:
    image, label = np.full((3, 2, 2, 2), 5000, np.uint16), np.ones((3, 1, 2, 2), np.uint8)
    some = dataclasses.replace(PLAIN, year_dropout=0.5)
    there = np.zeros(3)
    for seed in range(3000):
        varied, wanted = augment(image, label, some, "series", np.random.default_rng(seed))
        kept = (varied > 0).all(axis=(1, 2, 3))
        assert ((varied == 0).all(axis=(1, 2, 3)) | kept).all()
        assert kept.any()
        assert (wanted == 1).all()
        there += kept
    # The one that stays in any case is each as often: 1/3 + 2/3 * 1/2.
    np.testing.assert_allclose(there / 3000, 2 / 3, atol=4 * math.sqrt(2 / 9 / 3000))
    for task in ("mapping", "change"):
        varied, _ = augment(image[:2], label[:2], some, task, np.random.default_rng(1))
        assert (varied > 0).all()


@having(max_examples=40, deadline=None)
@given(
    windows=st.integers(1, 70),
    batch=st.integers(2, 20),
    processes=st.integers(1, 4),
    first=st.integers(0, 2),
)
def test_batches_hold_every_window_once_an_epoch_and_none_is_of_one(
    windows: int, batch: int, processes: int, first: int
) -> None:
    settings = dataclasses.replace(PLAIN, batch=batch, epochs=3)
    shares = [
        list(batches(windows, settings, first, (rank, processes))) for rank in range(processes)
    ]
    steps = count_steps(windows, settings, processes)
    assert {len(share) for share in shares} == {steps * (3 - first)}
    together = list(zip(*shares, strict=True))
    keys = [key for step in together for share in step for key in share]
    assert sorted(keys) == [
        (e, i) for e in range(first, 3) for i in range(max(windows, 2 * processes))
    ]
    assert min(len(share) for step in together for share in step) >= 2
    assert all(len({key[0] for share in step for key in share}) == 1 for step in together)
    if batch >= 4 * processes:
        assert max(sum(map(len, step)) for step in together) <= batch


# Validation


@having(max_examples=30, deadline=None)
@given(height=st.integers(1, 40), width=st.integers(1, 40))
def test_validation_windows_judge_every_pixel_once(height: int, width: int) -> None:
    of = cube(1, height, width)
    of.footprint.values[:, 0, 0] = 1
    index = np.arange(height * width).reshape(height, width)
    of.reflectance.values[...] = 1 + index % 60000
    found = survey_source(Cubes({"a": of}), SMALL, PLAIN)
    tiles = Tiles(Cubes({"a": of}), SMALL, PLAIN, found, (0.0,) * 10, (1.0,) * 10)
    seen = Counter()
    for number in range(len(tiles)):
        image, wanted = tiles[number]
        known = wanted[0, 0] != 255
        year = tiles.positions[number].view[1][0]
        seen.update((year, int(pixel) - 1) for pixel in image[0, 0][known])
        assert np.array_equal(
            wanted[0, 0][known],
            of.footprint.sel(year=year).values.ravel()[image[0, 0][known].astype(int) - 1],
        )
    assert seen == {(year, i): 1 for year in (2019, 2020) for i in range(height * width)}


class Threshold(nn.Module):
    """Says mine where the first band is bright, whatever it is taught."""

    def __init__(self, card: ModelCard) -> None:
        super().__init__()
        self.kept = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :1] + 0 * self.kept


def test_scores_are_those_of_the_pooled_pixels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(models.ARCHITECTURES, "unet", Threshold)
    train, valid = {"a": cube(1)}, {"b": with_holes(2, 21, 50), "c": with_holes(3, 40, 17)}
    run = TrainingOptions(checkpoint=tmp_path / "x.ckpt")
    fitted = fit(SMALL, Cubes(train), Cubes(valid), dataclasses.replace(PLAIN, epochs=1), run)
    truth = np.concatenate([labels_of(of).ravel() for of in valid.values()])
    said = np.concatenate(
        [(of.reflectance.values[:, 0] >= fitted.trained.mean[0]).ravel() for of in valid.values()]
    )
    truth, said = truth[truth < 2], said[truth < 2]
    best = fitted.best
    assert best.f1 == pytest.approx(f1_score(truth, said), abs=1e-12)
    assert best.iou == pytest.approx(jaccard_score(truth, said), abs=1e-12)
    assert best.precision == pytest.approx(precision_score(truth, said), abs=1e-12)
    assert best.recall == pytest.approx(recall_score(truth, said), abs=1e-12)
    with (tmp_path / "x.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["f1"]) == pytest.approx(best.f1, rel=1e-5)
    assert list(row) == [
        "epoch",
        "loss",
        "f1",
        "iou",
        "precision",
        "recall",
        "learning_rate",
        "seconds",
        "windows_per_s",
    ]


def test_windows_of_validation_that_hold_no_mine_are_no_measure(flat: None) -> None:
    one = dataclasses.replace(PLAIN, valid_windows=1)
    with pytest.raises(ModelError, match="1 windows of the validation sites hold no pixel of mine"):
        fit(SMALL, Cubes({"a": cube(1)}), Cubes({"b": corner(200, 200)}), one)


class Scripted(Flat):
    """Learns as ever, but is judged by how far above the mean it takes a first band to be a mine."""

    def __init__(self, card: ModelCard, thresholds: list[float]) -> None:
        super().__init__(card)
        self.thresholds = thresholds
        self.after: list[dict[str, torch.Tensor]] = []

    def train(self, mode: bool = True) -> Scripted:
        if not mode:
            self.after.append(weights(self))
        return super().train(mode)

    def forward(self, x: torch.Tensor, _years: torch.Tensor | None = None) -> torch.Tensor:
        if self.training:
            return super().forward(x)
        return x[:, :1] - self.thresholds[len(self.after) - 1]


def test_it_stops_when_f1_no_longer_grows_and_returns_the_best_epoch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    best, worse, worst = 0.7, 1.8, 2.2
    # It is tried once before it learns. An equal one is no better.
    thresholds = [best, worst, best, worse, best, best, worst, worst]
    networks: list[Scripted] = []

    def build(card: ModelCard) -> Scripted:
        networks.append(Scripted(card, thresholds))
        return networks[-1]

    monkeypatch.setitem(models.ARCHITECTURES, "unet", build)
    patient = dataclasses.replace(PLAIN, epochs=7, patience=3)
    fitted = fit(SMALL, Cubes({"a": cube(1)}), Cubes({"b": cube(2)}), patient)
    assert [epoch.epoch for epoch in fitted.history] == [1, 2, 3, 4, 5]
    assert fitted.best == fitted.history[1]
    scores = [epoch.f1 for epoch in fitted.history]
    assert scores[1] == scores[3] == scores[4] > scores[2] > scores[0]
    after = networks[0].after[1:]
    found = weights(fitted.trained.network)
    assert all(torch.equal(found[name], after[1][name]) for name in found)
    assert not all(torch.equal(found[name], after[4][name]) for name in found)
    alone = fit(SMALL, Cubes({"a": cube(1)}), None, patient)
    assert len(alone.history) == 7  # nothing to be judged by
    assert alone.best == alone.history[-1]


def test_training_and_validation_sites_are_apart() -> None:
    with pytest.raises(ModelError, match="apart, found b in both"):
        fit(SMALL, Cubes({"a": cube(1), "b": cube(2)}), Cubes({"b": cube(2), "c": cube(3)}), PLAIN)


# The loss


def by_hand(logits: np.ndarray, wanted: np.ndarray, settings: TrainingSettings) -> float:
    terms, weights_, dice = [], settings.positive_weight, []
    for c in range(logits.shape[2]):
        both = either = 0.0
        for index in np.ndindex(logits[:, :, c].shape):
            z, t = float(logits[:, :, c][index]), int(wanted[:, :, c][index])
            if t > 1:
                continue
            p = 1 / (1 + math.exp(-z))
            right = p if t else 1 - p
            terms.append(-math.log(right) * (1 - right) ** settings.focal * (weights_ if t else 1))
            both, either = both + p * t, either + p + t
        dice.append(1 - (2 * both + 1) / (either + 1))
    return sum(terms) / len(terms) + settings.dice * sum(dice) / len(dice)


@pytest.mark.parametrize(
    "how",
    [{}, {"positive_weight": 3.0}, {"focal": 2.0}, {"dice": 0.7}, {"focal": 1.0, "dice": 1.0}],
)
def test_the_loss_is_its_formula_over_known_pixels(how: dict[str, float]) -> None:
    r, settings = np.random.default_rng(0), dataclasses.replace(PLAIN, **how)
    logits, wanted = (
        r.normal(0, 2, (2, 1, 2, 5, 4)),
        r.choice([0, 1, 255], (2, 1, 2, 5, 4)).astype(np.uint8),
    )
    expected = by_hand(logits, wanted, settings)
    logits[wanted == 255] = r.choice(
        [1e30, math.nan, -math.inf], (wanted == 255).sum()
    )  # not even looked at
    given_ = torch.tensor(logits, dtype=torch.float32, requires_grad=True)
    loss = compute_loss(given_, torch.from_numpy(wanted), settings)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert (given_.grad[torch.from_numpy(wanted == 255)] == 0).all()
    assert (given_.grad[torch.from_numpy(wanted < 2)] != 0).all()
    nothing = compute_loss(
        given_.detach(), torch.full((2, 1, 2, 5, 4), 255), dataclasses.replace(settings, dice=0.0)
    )
    assert nothing.item() == 0


def iou(model: Any, of: xr.Dataset) -> float:
    of = of.assign_coords(y=np.arange(of.sizes["y"]), x=np.arange(of.sizes["x"]))
    mine, found = of.footprint.values == 1, predict(model, of.reflectance).values >= 125
    return float((mine & found).sum() / (mine | found).sum())


def test_training_maps_an_unseen_site() -> None:
    settings = dataclasses.replace(PLAIN, epochs=12, batch=16)
    model = fit(SMALL, Cubes({"b": cube(2), "a": cube(1)}), None, settings).trained
    assert iou(model, cube(16)) > 0.85
    assert model.sites == ("a", "b")
    assert not model.network.training


def test_unknown_labels_and_missing_pixels_teach_nothing() -> None:
    # Half of the site is wrongly labelled; marked unknown, or not observed, it does no harm.
    wrong = cube(1)
    wrong.footprint.values[:, :, 20:] ^= 1
    right = {}
    for how in ("unknown", "unobserved"):
        right[how] = wrong.copy(deep=True)
    right["unknown"].footprint.values[:, :, 20:] = 255
    right["unobserved"].reflectance.values[..., 20:] = 0
    unseen, long = cube(17), dataclasses.replace(PLAIN, epochs=16)
    for how, of in right.items():
        assert iou(fit(SMALL, Cubes({"a": of}), None, long).trained, unseen) > 0.6, how
    assert iou(fit(SMALL, Cubes({"a": wrong}), None, long).trained, unseen) < 0.3


@pytest.mark.parametrize("card", [SMALL, CHANGE, SERIES])
def test_every_task_is_learnt(card: ModelCard, flat: None) -> None:
    settings = dataclasses.replace(
        PLAIN, epochs=8, dice=0.5, learning_rate=0.02, rare=0.5, year_dropout=0.1, windows=64
    )
    fitted = fit(card, Cubes({"a": cube(1), "b": cube(2)}), Cubes({"c": cube(3)}), settings)
    assert fitted.history[-1].loss < fitted.history[0].loss / 2
    assert fitted.best.f1 > 0.8


def test_small_sites_and_flat_bands_can_be_trained_on() -> None:
    of = cube(19, 11, 13)
    of.footprint.values[:, 5, 5] = 1
    of.reflectance.values[:, 5] = 700
    model = fit(
        SMALL,
        Cubes({"a": of}),
        Cubes({"b": cube(20, 7, 30)}),
        dataclasses.replace(PLAIN, epochs=1, batch=64),
    ).trained
    assert model.std[5] == 1
    assert model.mean[5] == 700


def test_a_model_says_how_it_came_to_be_in_its_file_too(tmp_path: Path) -> None:
    settings = dataclasses.replace(PLAIN, epochs=3)
    fitted = fit(
        SMALL, Cubes({"a": cube(1)}), Cubes({"b": cube(2)}), settings, TrainingOptions(seed=4)
    )
    models.save(fitted.trained, tmp_path / "model.pt")
    for training in (fitted.trained.training, models.load(tmp_path / "model.pt").training):
        assert (training["seed"], training["validation sites"]) == (4, ["b"])
        assert training["settings"]["epochs"] == 3
        assert training["epoch"] == fitted.best.epoch
        assert training["validation F1"] == max(epoch.f1 for epoch in fitted.history)
    alone = fit(SMALL, Cubes({"a": cube(1)}), None, settings).trained.training
    assert alone["epoch"] == 3
    assert not [name for name in alone if name.startswith("validation ") and alone[name]]


# The same again


def test_same_cubes_and_seed_give_the_same_network() -> None:
    settings, valid = dataclasses.replace(PLAIN, epochs=2, rare=0.3), Cubes({"b": cube(2)})
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = fit(
        SMALL, Cubes({"a": cube(1)}), valid, settings, TrainingOptions(seed=3)
    ).trained.network
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers are touched
    torch.rand(5)
    assert same(
        first,
        fit(SMALL, Cubes({"a": cube(1)}), valid, settings, TrainingOptions(seed=3)).trained.network,
    )
    assert not same(
        first,
        fit(SMALL, Cubes({"a": cube(1)}), valid, settings, TrainingOptions(seed=4)).trained.network,
    )


def with_dropout(card: ModelCard) -> nn.Module:
    """Batch normalisation and random numbers of torch's own: all that a state has to know of."""
    first = nn.Conv2d(len(card.bands), 6, 3, padding=1)
    return nn.Sequential(
        first, nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout2d(0.3), nn.Conv2d(6, len(card.classes), 1)
    )


class Stopped(Exception):  # noqa: N818
    """As if the machine had gone down."""


def stop_at(step: int) -> Callable[[int, int, str], None]:
    def progress(done: int, _total: int, _note: str) -> None:
        if done == step:
            raise Stopped

    return progress


@pytest.mark.parametrize("schedule", ["one-cycle", "constant"])
@pytest.mark.parametrize("at", [1, 3, 5, 6, 8, 12])
def test_a_resumed_training_ends_as_an_uninterrupted_one(
    at: int, schedule: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(models.ARCHITECTURES, "unet", with_dropout)
    settings = dataclasses.replace(
        PLAIN, epochs=4, windows=24, schedule=schedule, optimiser="adamw", weight_decay=0.1
    )
    sources = Cubes({"a": with_holes(1)}), Cubes({"b": with_holes(2)})
    whole = fit(SMALL, *sources, settings, TrainingOptions(checkpoint=tmp_path / "whole.ckpt"))
    path = tmp_path / "other.ckpt"
    with pytest.raises(Stopped):  # three steps an epoch; in the middle of one, and when one is done
        fit(SMALL, *sources, settings, TrainingOptions(checkpoint=path, progress=stop_at(at)))
    assert path.exists() == (at > 3)
    keys: list[tuple[int, int]] = []
    taken = Windows.__getitem__
    monkeypatch.setattr(
        Windows, "__getitem__", lambda self, key: (keys.append(key), taken(self, key))[1]
    )
    seen: list[int] = []
    resumed = fit(
        SMALL,
        *sources,
        settings,
        TrainingOptions(
            checkpoint=path, resume=True, progress=lambda done, total, _: seen.append(done)
        ),
    )
    begun = (at - 1) // 3
    assert sorted(keys) == [(e, i) for e in range(begun, 4) for i in range(24)]
    assert seen == list(range(3 * begun + 1, 13))
    assert same(resumed.trained.network, whole.trained.network)
    shown = [dataclasses.replace(epoch, seconds=0, windows_per_s=0) for epoch in resumed.history]
    assert shown == [
        dataclasses.replace(epoch, seconds=0, windows_per_s=0) for epoch in whole.history
    ]
    states = [torch.load(p, weights_only=True) for p in (path, tmp_path / "whole.ckpt")]
    assert all(
        torch.equal(v, states[1]["network"][name]) for name, v in states[0]["network"].items()
    )
    moments = [state["optimiser"]["state"] for state in states]
    assert all(torch.equal(moments[0][n]["exp_avg"], moments[1][n]["exp_avg"]) for n in moments[0])
    with (tmp_path / "other.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2", "3", "4"]


def test_a_finished_training_is_not_done_again(flat: None, tmp_path: Path) -> None:
    source, run = (
        Cubes({"a": cube(1)}),
        TrainingOptions(checkpoint=tmp_path / "x.ckpt", resume=True),
    )
    done = fit(SMALL, source, Cubes({"b": cube(2)}), PLAIN, run)
    again = fit(
        SMALL, source, Cubes({"b": cube(2)}), PLAIN, dataclasses.replace(run, progress=stop_at(1))
    )
    assert same(again.trained.network, done.trained.network)
    assert again.history == done.history
    afresh = fit(
        SMALL, source, Cubes({"b": cube(2)}), PLAIN, dataclasses.replace(run, resume=False)
    )
    assert same(afresh.trained.network, done.trained.network)


def test_the_state_of_another_training_is_refused(flat: None, tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    of = {"a": cube(1), "b": cube(2)}
    valid = Cubes({"c": cube(3)})
    with pytest.raises(Stopped):
        fit(SMALL, Cubes(of), valid, PLAIN, TrainingOptions(checkpoint=path, progress=stop_at(7)))
    before = path.read_bytes()
    resume = TrainingOptions(checkpoint=path, resume=True)
    wider = dataclasses.replace(SMALL, options={"width": 8, "depth": 2})
    with pytest.raises(
        ModelError, match=r"another training, it differs in card's options \(\{'width': 4"
    ):
        fit(wider, Cubes(of), valid, PLAIN, resume)
    with pytest.raises(
        ModelError,
        match=r"differs in settings's batch \(8, now 4\); settings's dice \(0.0, now 1.0\); seed",
    ):
        fit(
            SMALL,
            Cubes(of),
            valid,
            dataclasses.replace(PLAIN, batch=4, dice=1.0),
            dataclasses.replace(resume, seed=1),
        )
    with pytest.raises(
        ModelError, match=r"training sites \(\['a', 'b'\], now \['a'\]\); normalisation's B02"
    ):
        fit(SMALL, Cubes({"a": of["a"]}), valid, PLAIN, resume)
    with pytest.raises(ModelError, match=r"validation sites \(\['c'\], now \[\]\)"):
        fit(SMALL, Cubes(of), None, PLAIN, resume)
    built_anew = {"a": cube(4), "b": cube(2)}
    with pytest.raises(ModelError, match=r"differs in normalisation's B02"):
        fit(SMALL, Cubes(built_anew), valid, PLAIN, resume)
    relabelled = {"a": of["a"].copy(deep=True), "b": of["b"]}
    relabelled["a"].footprint.values[0, :3] = 255
    with pytest.raises(ModelError, match=r"differs in pixels's training labels \(\[7680"):
        fit(SMALL, Cubes(relabelled), valid, PLAIN, resume)
    with pytest.raises(ModelError, match="interrupted after epoch 1; it would be lost"):
        fit(SMALL, Cubes(of), valid, PLAIN, TrainingOptions(checkpoint=path))
    assert path.read_bytes() == before
    for content in (b"", before[: len(before) // 2], b"PK\x03\x04" + bytes(99)):
        path.write_bytes(content)
        with pytest.raises(ModelError, match="not the state of a training"):
            fit(SMALL, Cubes(of), valid, PLAIN, resume)
    torch.save({"format": "minecube-model-2"}, path)
    with pytest.raises(ModelError, match="not the state of a training"):
        fit(SMALL, Cubes(of), valid, PLAIN, resume)


def test_a_state_with_a_flipped_bit_is_not_gone_on_from(flat: None, tmp_path: Path) -> None:
    """Torch, which opens it, does not look at the checksums that it wrote."""
    path, source = tmp_path / "x.ckpt", Cubes({"a": cube(1)})
    with pytest.raises(Stopped):
        fit(SMALL, source, None, PLAIN, TrainingOptions(checkpoint=path, progress=stop_at(7)))
    content, weight = (
        bytearray(path.read_bytes()),
        checkpoint.read_state(path)["network"]["layers.0.bias"],
    )
    at = bytes(content).index(weight.numpy().tobytes())
    content[at + 3] ^= 0x40  # in the exponent
    path.write_bytes(content)
    with pytest.raises(ModelError, match="is damaged; remove it to train afresh"):
        fit(SMALL, source, None, PLAIN, TrainingOptions(checkpoint=path, resume=True))


def test_a_state_is_written_whole_or_not_at_all(
    flat: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.ckpt"
    calls = itertools.count()
    real = Path.write_bytes

    def full(self: Path, data: Any) -> int:
        if next(calls) < 2:  # the first epoch's state and log
            return real(self, data)
        with self.open("wb") as out:
            out.write(bytes(data)[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(
        ModelError, match=r"x\.ckpt: could not be written .*No space left.*as it was"
    ):
        fit(SMALL, Cubes({"a": cube(1)}), None, PLAIN, TrainingOptions(checkpoint=path))
    assert len(checkpoint.read_state(path)["history"]) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.ckpt", "x.csv"]


class Faulty(Flat):
    """Gives this logit everywhere in one step."""

    def __init__(self, card: ModelCard, logit: float, step: int) -> None:
        super().__init__(card)
        self.logit, self.steps_left = logit, step

    def forward(self, x: torch.Tensor, _years: torch.Tensor | None = None) -> torch.Tensor:
        logits = super().forward(x)
        if self.training:
            self.steps_left -= 1
            if self.steps_left == 0:
                return torch.full_like(logits, self.logit)
        return logits


def test_a_loss_that_is_no_number_stops_says_where_and_keeps_the_last_state(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "x.ckpt"
    settings = dataclasses.replace(PLAIN, windows=16, epochs=3)
    monkeypatch.setitem(models.ARCHITECTURES, "unet", lambda card: Faulty(card, math.nan, 4))
    source = Cubes({"a": cube(1)})
    with pytest.raises(
        ModelError,
        match=r"became nan in epoch 2, step 2 \(windows of a 2019, a 2020\); .*x.ckpt holds epoch 1",
    ):
        fit(SMALL, source, None, settings, TrainingOptions(checkpoint=path))
    monkeypatch.setitem(models.ARCHITECTURES, "unet", Flat)
    resumed = fit(SMALL, source, None, settings, TrainingOptions(checkpoint=path, resume=True))
    assert all(torch.isfinite(value).all() for value in weights(resumed.trained.network).values())
    assert same(resumed.trained.network, fit(SMALL, source, None, settings).trained.network)
    monkeypatch.setitem(models.ARCHITECTURES, "unet", lambda card: Faulty(card, 1e38, 1))
    with pytest.raises(ModelError, match=r"became inf in epoch 1, step 1 .*; nothing was kept"):
        fit(SMALL, source, None, settings)


def test_windows_fit_the_network_and_devices_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="multiples of 4 px, found 18 in settings plain"):
        fit(SMALL, Cubes({"a": cube(1)}), None, dataclasses.replace(PLAIN, window_px=18))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ModelError, match=r"'cuda' was asked for, but torch .* sees 0 GPUs"):
        fit(SMALL, Cubes({"a": cube(1)}), None, PLAIN, TrainingOptions(device="cuda"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"task": "change", "classes": ("changed",)},
            "unet cannot be applied to windows of the task change",
        ),
        ({"task": "series"}, "unet cannot be applied to windows of the task series"),
        (
            {"architecture": "snunet", "options": {"width": 4}},
            "snunet cannot be applied to windows of the task mapping",
        ),
        (
            {"options": {"width": 4, "depth": 3}, "window_px": 20},
            r"\(1, 1, 10, 20, 20\).*correct the card's task, options or mul",
        ),
    ],
)
def test_a_card_whose_network_is_for_another_task_is_refused(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    run = TrainingOptions(checkpoint=tmp_path / "x.ckpt")
    with pytest.raises(ModelError, match=f"model small: .*{words}"):
        fit(dataclasses.replace(SMALL, **changes), Cubes({"a": cube(1)}), None, PLAIN, run)
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_gives_another_shape_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.ARCHITECTURES, "unet", lambda _: nn.Conv2d(10, 1, 3))
    with pytest.raises(
        ModelError,
        match=r"expected logits of shape \(1, 1, 1, 16, 16\) .*found \(1, 1, 1, 14, 14\)",
    ):
        fit(SMALL, Cubes({"a": cube(1)}), None, PLAIN)


def test_bfloat16_on_request(flat: None) -> None:
    half = dataclasses.replace(PLAIN, bf16=("cpu",))
    source = Cubes({"a": cube(1)})
    found, exact = (
        fit(SMALL, source, None, half).history[-1].loss,
        fit(SMALL, source, None, PLAIN).history[-1].loss,
    )
    assert found != exact
    assert found == pytest.approx(exact, rel=0.02)


# Several processes, each of which may use sockets: torch's talk through them.

SCRIPT = """
    import dataclasses, hashlib, sys
    sys.path.insert(0, {here!r})
    import torch, torch.distributed as dist
    from importlib import util
    from pathlib import Path

    def load():
        spec = util.spec_from_file_location("training_tests", {file!r})
        module = util.module_from_spec(spec)
        sys.modules["training_tests"] = module
        spec.loader.exec_module(module)
        return module

    t = load()
    torch.set_num_threads(1)
    from minecube import models
    from minecube.train import Cubes, TrainingOptions, fit
    settings = dataclasses.replace(t.PLAIN, epochs=2, windows=24, rare=0.3, dice=0.5, year_dropout=0.2)
    train, valid = Cubes({{"a": t.with_holes(1), "b": t.with_holes(2)}}), Cubes({{"c": t.with_holes(3)}})
"""


def started(code: str, **environment: str) -> subprocess.Popen[str]:
    script = textwrap.dedent(
        SCRIPT.format(here=str(Path(__file__).parent), file=__file__)
    ) + textwrap.dedent(code)
    return subprocess.Popen(
        [sys.executable, "-W", "error::UserWarning", "-c", script],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


@pytest.mark.parametrize(
    "forks", [True, pytest.param(False, marks=pytest.mark.slow)]
)  # those started afresh import torch
def test_workers_do_not_change_the_network(forks: bool) -> None:
    code = f"""
        models.ARCHITECTURES["unet"] = t.with_dropout
        Cubes.forkable = {forks}
        for workers in (0, 2):
            network = fit(t.SMALL, train, valid, settings, TrainingOptions(workers=workers, seed=5)).trained.network
            print(hashlib.sha256(b"".join(v.numpy().tobytes() for v in network.state_dict().values())).hexdigest())
    """
    none, two = ended(started(code)).split()
    assert none == two


def test_two_processes_learn_what_one_does_from_the_whole_batch(tmp_path: Path) -> None:
    code = f"""
        import os
        models.ARCHITECTURES["unet"] = t.Flat
        alone = os.environ["WORLD_SIZE"] == "1"
        if not alone:
            dist.init_process_group("gloo")
        gradients = []
        stepped = torch.optim.Adam.step
        def step(self, *args, **kwargs):
            gradients.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
            return stepped(self, *args, **kwargs)
        torch.optim.Adam.step = step
        fitted = fit(t.SERIES, train, valid, settings, TrainingOptions(checkpoint=Path({str(tmp_path)!r}) / os.environ["NAME"]))
        if alone or dist.get_rank() == 0:
            kept = dict(gradients=gradients, weights=fitted.trained.network.state_dict())
            kept["losses"] = [e.loss for e in fitted.history]
            torch.save(kept | dict(f1=[e.f1 for e in fitted.history]), Path({str(tmp_path)!r}) / (os.environ["NAME"] + ".pt"))
        else:
            torch.save([e.f1 for e in fitted.history], Path({str(tmp_path)!r}) / "second.pt")
        if not alone:
            dist.destroy_process_group()
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    jobs = [started(code, WORLD_SIZE="1", NAME="one")]
    jobs += [
        started(code, WORLD_SIZE="2", RANK=rank, LOCAL_RANK=rank, NAME="two", **where)
        for rank in "01"
    ]
    for job in jobs:
        ended(job)
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "two"))
    assert len(one["gradients"]) == len(two["gradients"]) == 6
    for a, b in zip(
        one["gradients"][0], two["gradients"][0], strict=True
    ):  # from the same weights: the same to rounding
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    for name, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], value, rtol=1e-3, atol=1e-4)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert two["f1"] == pytest.approx(one["f1"], abs=5e-3)
    assert torch.load(tmp_path / "second.pt", weights_only=True) == two["f1"]
    assert sorted(p.name for p in tmp_path.glob("two*")) == ["two", "two.csv", "two.pt"]


# The command


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sites, two of which are A's, committed and labelled; and a preset that is quick."""
    folder = tmp_path_factory.mktemp("training")
    recipe = Recipe(id="small", title="t", block_px=64, chunk_px=32)
    for n, name in enumerate(("A_1", "A_2", "B_1")):
        site, of = site_of(name, 360000 + n * 6000, 5600040, 48, 54), cube(n, 54, 48)
        grid = grid_of(site)
        stores.create_site(stores.Store(folder / "cubes.zarr"), site, grid, (2019, 2020), recipe)
        for at, year in enumerate((2019, 2020)):
            pixels = da.from_array(of.reflectance.values[at], chunks=(10, 64, 64))
            made = {"reflectance": (("band", "y", "x"), pixels)}
            made["clear_count"] = (("y", "x"), da.ones((54, 48), chunks=64, dtype=np.uint16))
            made["quality"] = (("y", "x"), da.ones((54, 48), chunks=64, dtype=np.uint8))
            told = {"minecube:source": "s", "s2:processing_baseline": "05.00", "minecube:offset": 0}
            scene = types.SimpleNamespace(id="a", properties=told | {"minecube:offset_reason": "r"})
            provenance = stores.describe_build(site, year, grid, recipe, [scene])
            stores.write_year(
                stores.Store(folder / "cubes.zarr"), xr.Dataset(made), provenance, b""
            )
        coordinates = {"year": [2019, 2020], **odc.geo.xr.xr_coords(grid)}
        masks = xr.DataArray(of.footprint.values, dims=("year", "y", "x"), coords=coordinates)
        stores.write_footprint(stores.Store(folder / "cubes.zarr"), name, masks, origin="drawn")
    quick = "quick:\n  title: t\n  epochs: 3\n  batch: 8\n  windows: 16\n  window_px: 24\n  patience: 9\n"
    (folder / "presets.yaml").write_text(quick)
    return folder


def command(store: Path, out: Path, *more: str) -> list[str]:
    usual = {
        "--store": str(store / "cubes.zarr"),
        "--catalog": str(store),
        "--preset": "quick",
        "--out": str(out),
    }
    start = [
        word for option, value in usual.items() if option not in more for word in (option, value)
    ]
    return ["train", *start, *more]


def test_the_command_trains_and_says_what_came_of_it(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "model.pt"
    done = CliRunner().invoke(cli, command(store, out, "--valid", "B_*", "--epochs", "2"))
    assert done.exit_code == 0, done.output
    trained = load(out)
    assert trained.sites == ("A_1", "A_2")  # what judges is left out
    with (tmp_path / "model.pt.csv").open() as file:
        rows = list(csv.DictReader(file))
    best = max(rows, key=lambda row: float(row["f1"]))
    scores = f"F1 {float(best['f1']):.3f} and IoU {float(best['iou']):.3f} on B_1"
    assert f"unet-small trained on A_1, A_2; epoch {best['epoch']} of 2, {scores}" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "model.pt",
        "model.pt.ckpt",
        "model.pt.csv",
    ]
    resumed = CliRunner().invoke(cli, command(store, out, "--valid", "B_*", "--resume"))
    assert resumed.exit_code == 2
    assert "differs in settings's epochs (2, now 3)" in resumed.output


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--valid", "*"), "no site is left to learn from, because --valid * names them all"),
        (("--valid", "C_*"), "unknown site 'C_*'"),
        (
            ("--preset", "fast"),
            "unknown preset 'fast'; there is: cpu, default, demo, published-change",
        ),
        (("--device", "gpu7"), "device 'gpu7' is not one that torch knows"),
        (("--device", "cuda"), "sees 0 GPUs here"),
        (("--out", "nowhere/model.pt"), "nowhere/model.pt: its folder is not there"),
        (("--preset", "published-mapping", "--model", "odd"), "unknown model 'odd'"),
        (("--seed", "-1"), "-1 is not in the range"),
    ],
)
def test_bad_use_of_the_command(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...], words: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, command(store, Path("model.pt"), *more))
    assert done.exit_code == 2
    assert words in done.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_torchrun_starts_several_that_train_one_network(store: Path, tmp_path: Path) -> None:
    main = tmp_path / "main.py"
    main.write_text("from minecube.cli import main\nmain()\n")
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(main),
    ]
    done = subprocess.run(
        launch + command(store, tmp_path / "model.pt", "--valid", "B_1", "--workers", "1"),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained on A_1, A_2") == 1  # one speaks
    assert load(tmp_path / "model.pt").sites == ("A_1", "A_2")


# Presets


def test_published_presets_are_as_told_and_say_so() -> None:
    for name in ("published-mapping", "published-change"):
        found = load_presets()[name]
        assert (found.optimiser, found.learning_rate, found.schedule, found.weight_decay) == (
            "adam",
            1e-4,
            "constant",
            0,
        )
        assert (found.epochs, found.batch, found.window_px, found.step_px) == (10, 64, 160, 160)
        assert (found.gaps, found.rare, found.turns, found.jitter, found.patience) == (
            (),
            0,
            False,
            0,
            None,
        )
        assert "2510.14661" in found.source
        assert "nferred" in found.source
        assert "told" in found.source  # not read in the paper
    assert {"cpu", "default", "demo"} <= set(load_presets())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("batch: 1", "'batch': expected 2 or more"),
        ("rare: 1.5", "'rare': expected a share"),
        ("{rare: 0.5, step_px: 16}", "'rare': expected 0 with step_px"),
        ("year_dropout: 1", "'year_dropout'"),
        ("optimiser: sgd", "adam or adamw, found 'sgd'"),
        ("schedule: cosine", "one-cycle or constant"),
        ("learning_rate: 0", "'learning_rate'"),
        ("bf16: [mps]", "some of cpu, cuda, found mps"),
        ("gaps: [0]", "'gaps'"),
        ("jitter: 0.5", "'jitter'"),
        ("epochs: 0", "'epochs': expected 1 or more"),
        ("focal: -1", "'focal'"),
        ("lr: 1", "'lr'"),
    ],
)
def test_wrong_presets_are_refused(line: str, words: str, tmp_path: Path) -> None:
    fields = line.strip("{}").split(", ")
    file = tmp_path / "presets.yaml"
    file.write_text("mine:\n  title: t\n" + "".join(f"  {field}\n" for field in fields))
    with pytest.raises(CatalogError, match=words):
        load_presets(file)
