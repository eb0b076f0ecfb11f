"""Windows of training and validation are drawn, turned, jittered and batched as the settings say."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as having
from hypothesis import strategies as st

from known_trainings import CHANGE, PLAIN, SERIES, SMALL, corner, cube
from minecube.catalog import ModelCard, TrainingSettings
from minecube.train import Cubes, Tiles, Windows, compute_targets, survey_source
from minecube.train.windows import augment, batches, count_steps

pytestmark = pytest.mark.usefixtures("one_thread")


def drawn(source: Cubes, card: ModelCard, settings: TrainingSettings, seed: int = 0) -> Windows:
    return Windows(source, card, settings, survey_source(source, card, settings), seed)


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
