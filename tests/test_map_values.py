"""A map is that of brute force, and unknown where a pixel was not observed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import xarray as xr

from known_maps import (
    CHANGE,
    SERIES,
    WIDE,
    YEARS,
    given_by,
    holes,
    normal,
    pair_of,
    reflectance,
    series_of,
    stored,
    untrained,
)
from minecube import models
from minecube.catalog import Weights
from minecube.models import Compute, list_views, predict
from minecube.models.layout import Layout

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_bf16_is_close_and_not_the_same() -> None:
    of = reflectance(14)
    exact = predict(untrained(WIDE), of).astype(int)
    coarse = predict(untrained(WIDE), of, compute=Compute(precision="bf16")).astype(int)
    assert 0 < np.abs(exact - coarse).max() < 25
    assert np.abs(exact - coarse).mean() < 2


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
