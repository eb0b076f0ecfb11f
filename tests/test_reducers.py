"""Reducers against numpy's own functions, exhaustive search and plain double precision, pixel by pixel; numpy's and torch's."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from known_scenes import unique_pixels
from minecube.catalog import BestPixel
from minecube.composite import reducers
from minecube.composite.ranks import lower_quartile
from minecube.composite.reducers import measure_sharpness, score_days
from minecube.errors import ModelError

try:
    import torch

    from minecube.composite.torch_reducers import TorchGeomedian

    GPUS = torch.cuda.device_count()
except ModuleNotFoundError:
    GPUS = 0

DAYS = st.one_of(st.integers(0, 12), st.sampled_from([45, 77]))
KINDS = [
    "numpy",
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not GPUS, reason="no GPU here")),
]


@pytest.fixture(params=KINDS)
def geomedian(request):
    if request.param == "numpy":
        return reducers.geomedian
    pytest.importorskip("torch")
    return TorchGeomedian(request.param)


@st.composite
def observations(draw, days=DAYS, extremes=True):
    """uint16 [day, y, x] in which some or all is missing; some of few different values, some of the least and the greatest."""
    shape = (draw(days), draw(st.integers(1, 3)), draw(st.integers(1, 4)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    low, high = draw(st.sampled_from([(1, 65536), (1, 4), (65530, 65536), (800, 1200)]))
    values = rng.integers(low, high, shape).astype(np.uint16)
    if extremes:
        values[rng.random(shape) < 0.1] = draw(st.sampled_from([1, 65535]))
    values[rng.random(shape) < draw(st.sampled_from([0, 0.3, 0.8, 1]))] = 0
    return values


BANDS = st.integers(1, 5)


@st.composite
def stacks(draw, days=DAYS, bands=BANDS, high=9000):
    shape = (draw(bands), draw(days), draw(st.integers(1, 2)), draw(st.integers(1, 4)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    stack = rng.integers(1, high + 1, shape).astype(np.uint16)
    return stack * (rng.random(shape[1:]) >= draw(st.sampled_from([0, 0.3, 0.8, 1]))).astype(
        np.uint16
    )


def year(bands=6, days=24, side=(9, 11), seed=0):
    """A likely year, uint16 [band, day, y, x]: seasons, noise, clouds that the mask has missed, a third missing."""
    rng = np.random.default_rng(seed)
    ground = rng.uniform(300, 3500, (bands, 1, *side)) + rng.normal(
        0, 1, (1, days, *side)
    ) * rng.uniform(50, 500, (bands, 1, *side))
    cloud = (rng.random((1, days, *side)) < 0.08) * rng.uniform(500, 6000, (bands, days, *side))
    stack = np.clip(
        np.rint(ground + cloud + rng.normal(0, 60, (bands, days, *side))), 1, 65535
    ).astype(np.uint16)
    return stack * (rng.random((days, *side)) > 0.35).astype(np.uint16)


def pixelwise(function, values, dtype):
    """`function` of each pixel's non-zero values [n]; 0 where there are none."""
    out = np.zeros(values.shape[1:], dtype)
    for yx in np.ndindex(out.shape):
        of_pixel = values[(slice(None), *yx)]
        if of_pixel.any():
            out[yx] = function(of_pixel[of_pixel > 0])
    return out


def spectra_of(stack, yx):
    """float64 [observation, band] of a pixel, and the days they are of."""
    of_pixel = stack[(slice(None), slice(None), *yx)].T
    days = np.flatnonzero(of_pixel.any(axis=1))
    return of_pixel[days].astype(np.float64), days


def plain_geomedian(spectra, most=200_000):
    """In double precision: an observation that no pull of the others can move, or Weiszfeld's steps down to 1e-10."""
    for one in spectra:
        apart = spectra - one
        far = np.linalg.norm(apart, axis=1)
        others = far > 0
        if np.linalg.norm((apart[others] / far[others, None]).sum(axis=0)) <= np.count_nonzero(
            ~others
        ):
            return one
    at = spectra.mean(axis=0) + 1e-3  # beside whatever is in the very middle
    for _ in range(most):
        pull = 1 / np.maximum(np.linalg.norm(spectra - at, axis=1), 1e-12)
        to = pull @ spectra / pull.sum()
        if np.linalg.norm(to - at) < 1e-10:
            break
        at = to
    return at


def cost(spectra, at):
    return np.linalg.norm(spectra - at, axis=1).sum()


# Ranks


@settings(max_examples=150, deadline=None)
@given(observations(), st.randoms(use_true_random=False))
@example(np.zeros((0, 2, 3), np.uint16), None)
@example(np.zeros((4, 0, 3), np.uint16), None)
@example(np.full((2, 1, 1), 65535, np.uint16), None)
@example(np.array([[[0]], [[0]]], np.uint16), None)
def test_median_is_numpys_of_the_non_zero(observed, shuffle):
    expected = pixelwise(lambda v: np.rint(np.median(v)), observed, np.uint16)
    before = observed.copy()
    made = reducers.median(observed)
    np.testing.assert_array_equal(made, expected)
    np.testing.assert_array_equal(observed, before)
    assert made.dtype == np.uint16
    if shuffle:
        order = shuffle.sample(range(len(observed)), len(observed))
        np.testing.assert_array_equal(reducers.median(observed[order]), expected)


@settings(max_examples=100, deadline=None)
@given(DAYS, st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.4, 0.9, 1.0]))
def test_lower_quartile_is_a_value_that_is_there(days, seed, missing):
    rng = np.random.default_rng(seed)
    values = rng.choice(
        np.array([-(2**31), -70000, -3, 0, 1, 5, 70000, 2**31 - 1], np.int32), (days, 2, 3)
    )
    known = rng.random(values.shape) >= missing
    made = lower_quartile(values, known)
    assert made.dtype == np.int32
    for yx in np.ndindex(2, 3):
        there = np.sort(values[(slice(None), *yx)][known[(slice(None), *yx)]])
        assert made[yx] == (there[(len(there) - 1) // 4] if len(there) else 0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 2], 2),  # 1.5
        ([2, 3], 2),  # 2.5
        ([65534, 65535], 65534),  # 65534.5, and the sum needs 17 bits
        ([65535, 65535], 65535),
        ([1, 65535], 32768),
        ([1, 2, 9, 10], 6),  # 5.5; the lower middle, which torch.nanmedian gives, is 2
        ([7], 7),
        ([], 0),
    ],
)
def test_halves_are_rounded_to_even_whatever_is_missing(values, expected):
    for gaps in itertools.product([0, 1, 2], repeat=2):
        observed = np.array([0] * gaps[0] + values + [0] * gaps[1], np.uint16).reshape(-1, 1, 1)
        assert reducers.median(observed) == [[expected]]


def test_the_lower_middle_is_not_the_median():
    """The trap of torch.nanmedian: it is caught by observations of an even number."""
    observed = np.array([100, 0, 200, 400, 900], np.uint16).reshape(-1, 1, 1)
    assert reducers.median(observed) == [[300]]


def test_zero_as_an_observation_would_show():
    """The trap of a plain median: missing days would pull it down."""
    observed = np.array([0, 0, 0, 500, 700], np.uint16).reshape(-1, 1, 1)
    assert reducers.median(observed) == [[600]]
    assert np.median(observed) == 0


@pytest.mark.parametrize("days", [1, 2, 15, 16, 40])
def test_images_larger_than_a_tile_and_not_contiguous(days):
    rng = np.random.default_rng(days)
    wide = rng.integers(0, 9, (days, 140, 2, 150)).astype(np.uint16) * 1000
    observed = wide[:, :, 1, ::-1]
    assert not observed.flags.c_contiguous
    values = np.where(observed > 0, observed.astype(np.float64), np.nan)
    some = (observed > 0).any(axis=0)
    expected = np.zeros(some.shape, np.uint16)
    expected[some] = np.rint(np.nanmedian(values[:, some], axis=0))
    np.testing.assert_array_equal(reducers.median(observed), expected)
    quartile = lower_quartile(observed.astype(np.int32) - 4000, observed > 0)
    ordered, count = np.sort(values, axis=0), (observed > 0).sum(axis=0)
    rank = np.maximum(count - 1, 0) // 4
    np.testing.assert_array_equal(
        quartile[some], np.take_along_axis(ordered, rank[None], axis=0)[0][some] - 4000
    )


# Geomedian


def test_geomedian_of_a_likely_year(geomedian):
    stack = year()
    made = geomedian(stack)
    assert [a.dtype for a in made] == [np.uint16, np.float32, np.float32, np.float32]
    for yx in np.ndindex(stack.shape[2:]):
        spectra, _ = spectra_of(stack, yx)
        at = plain_geomedian(spectra)
        # What is stored is rounded; 1e-5 of reflectance is a tenth of a unit.
        assert np.abs(made.reflectance[(slice(None), *yx)] - at).max() <= 0.5 + 0.1
        unit, to = spectra / np.linalg.norm(spectra, axis=1)[:, None], at / np.linalg.norm(at)
        expected = (
            np.median(np.linalg.norm(spectra - at, axis=1)) / 1e4,
            np.median(1 - unit @ to),
            np.median(np.abs(spectra - at).sum(axis=1) / (spectra + at).sum(axis=1)),
        )
        np.testing.assert_allclose(
            [made.emad[yx], made.smad[yx], made.bcmad[yx]], expected, rtol=1e-4, atol=1e-6
        )


@settings(max_examples=40, deadline=None)
@given(stacks(), st.randoms(use_true_random=False))
def test_nothing_has_a_lower_sum_of_distances(stack, shuffle):
    pytest.importorskip("torch")
    order = shuffle.sample(range(stack.shape[1]), stack.shape[1])
    mades = [
        reducers.geomedian(stack),
        reducers.geomedian(stack[:, order]),
        TorchGeomedian("cpu")(stack),
    ]
    for yx in np.ndindex(stack.shape[2:]):
        spectra, _ = spectra_of(stack, yx)
        for made in mades:
            at = made.reflectance[(slice(None), *yx)]
            if not len(spectra):
                assert not at.any()
                assert np.isnan([made.emad[yx], made.smad[yx], made.bcmad[yx]]).all()
                continue
            # Rounding moves it by half a unit in each band, which no distance changes by more than that.
            most = len(spectra) * np.sqrt(len(at)) * 0.6
            assert cost(spectra, at) <= cost(spectra, plain_geomedian(spectra)) + most
            assert (at > 0).all()


@pytest.mark.parametrize("days", [3, 4, 5, 8, 17])
def test_geomedian_of_few_and_wild_observations(geomedian, days):
    """Of few it often is one of them, where Weiszfeld's steps become slow."""
    rng = np.random.default_rng(days)
    stack = rng.integers(1, 9000, (4, days, 6, 9)).astype(np.uint16)
    made = geomedian(stack).reflectance
    for yx in np.ndindex(6, 9):
        at = plain_geomedian(spectra_of(stack, yx)[0])
        assert np.abs(made[(slice(None), *yx)] - at).max() <= 0.5 + 0.1


@pytest.mark.parametrize(
    ("spectra", "expected"),
    [
        ([[1000, 500]], [1000, 500]),
        ([[1000, 500]] * 4, [1000, 500]),
        ([[1000, 500], [2000, 700]], [1500, 600]),  # any point between is one; the middle is given
        ([[1000, 500], [1001, 503]], [1000, 502]),  # 1000.5, 501.5
        ([[100, 100], [300, 300], [9000, 9000]], [300, 300]),  # on a line: the one between
        (
            [[1000, 1000], [1000, 1000], [1000, 1000], [5000, 100], [9000, 9000]],
            [1000, 1000],
        ),  # most are the same
        ([[1000, 1000], [3000, 1000], [1000, 3000], [3000, 3000]], [2000, 2000]),  # a square
        ([[1, 1], [65535, 65535], [65535, 65535]], [65535, 65535]),
        ([[1, 65535], [65535, 1]], [32768, 32768]),
    ],
)
def test_geomedians_known_by_hand(geomedian, spectra, expected):
    stack = np.array([*spectra, [0, 0]], np.uint16).T.reshape(2, -1, 1, 1)
    made = geomedian(stack)
    np.testing.assert_array_equal(made.reflectance.ravel(), expected)
    if len(set(map(tuple, spectra))) == 1:
        np.testing.assert_allclose(np.ravel(made[1:]), 0, atol=1e-7)


def test_of_an_even_number_on_a_line_it_is_between_the_two_in_the_middle(geomedian):
    made = geomedian(
        np.array([[100, 100], [200, 200], [300, 300], [9000, 9000]], np.uint16).T.reshape(
            2, 4, 1, 1
        )
    )
    one, other = made.reflectance.ravel()
    assert one == other
    assert 200 <= one <= 300


def test_it_leaves_an_observation_that_is_the_median_of_each_band(geomedian):
    """The trap of Weiszfeld's start: on an observation, whose weight is infinite, a plain step stays for good."""
    spectra = np.array(
        [
            [2000, 2000, 2000],
            [2900, 1900, 1900],
            [1900, 2900, 1900],
            [1900, 1900, 2900],
            [2100, 2100, 2100],
        ]
    )
    assert (np.median(spectra, axis=0) == spectra[0]).all()
    spectra[1:] += np.array([[0, 0, 0], [0, 0, 0], [0, 0, 0], [700, 700, 700]])
    at = plain_geomedian(spectra.astype(np.float64))
    assert np.abs(at - spectra[0]).max() > 5
    made = geomedian(spectra.astype(np.uint16).T.reshape(3, 5, 1, 1)).reflectance.ravel()
    assert np.abs(made - at).max() <= 0.6


def test_deviations_of_two_observations_are_those_of_both(geomedian):
    """A geomedian of two is the middle, from which both are equally far."""
    stack = np.array([[1000, 3000], [2000, 2000]], np.uint16).reshape(2, 2, 1, 1)
    made = geomedian(stack)
    angle = 1 - np.array([[1000, 2000], [3000, 2000]]) @ [2000, 2000] / np.hypot(
        [1000, 3000], 2000
    ) / np.hypot(2000, 2000)
    np.testing.assert_allclose(made.emad, [[0.1]], rtol=1e-6)
    np.testing.assert_allclose(made.smad, [[angle.mean()]], rtol=1e-5)
    np.testing.assert_allclose(made.bcmad, [[(1000 / 7000 + 1000 / 9000) / 2]], rtol=1e-6)


def test_small_angles_keep_their_digits(geomedian):
    """The trap of 1 - cos in single precision, which is a multiple of 6e-8."""
    spectra = np.array([[5000, 5000], [5001, 4999], [4999, 5001]], np.float64)
    stack = spectra.astype(np.uint16).T.reshape(2, 3, 1, 1)
    expected = np.arctan(1 / 5000) ** 2 / 2
    np.testing.assert_allclose(geomedian(stack).smad, [[expected]], rtol=0.02)


# One date


@settings(max_examples=80, deadline=None)
@given(
    hnp.arrays(np.float32, (5, 2, 3), elements=st.sampled_from([0.0, -1.5, 0.25, 3.5])),
    hnp.arrays(bool, (5, 2, 3)),
)
def test_best_pixel_is_the_first_of_the_highest_that_is_observed(score, observed):
    seen = np.where(observed, score, -np.inf)
    expected = np.where(observed.any(axis=0), seen.argmax(axis=0), -1)
    made = reducers.choose_best_day(score, observed)
    np.testing.assert_array_equal(made, expected)
    assert made.dtype == np.int16


def test_nothing_of_no_days(geomedian):
    none = np.zeros((0, 2, 3), np.uint16)
    assert (reducers.choose_best_day(none.astype(np.float32), none > 0) == -1).all()
    assert not reducers.take_day(none, np.full((2, 3), -1, np.int16)).any()
    made = geomedian(none[None].repeat(2, axis=0))
    assert made.reflectance.shape == (2, 2, 3)
    assert not made.reflectance.any()
    assert np.isnan(made.emad).all()


def test_the_day_that_was_chosen_is_taken():
    observed = unique_pixels(5 * 4, 6).reshape(5, 4, 6)
    index = np.random.default_rng(0).integers(-1, 5, (4, 6)).astype(np.int16)
    made = reducers.take_day(observed, index)
    assert made.dtype == np.uint16
    for yx in np.ndindex(4, 6):
        assert made[yx] == (observed[(index[yx], *yx)] if index[yx] >= 0 else 0)
    assert reducers.take_day(np.full((1, 1, 1), 65535, np.uint16), np.zeros((1, 1), np.int16)) == [
        [65535]
    ]


def test_the_score_is_a_weighted_sum_of_four_parts():
    rule = BestPixel(day=5, day_spread=10, cloud_distance_m=1000, opacity=0.05)
    flat = np.zeros((3, 1, 1), np.float32)
    best = score_days(np.array([5, 15, 360]), flat + 4000, flat, flat + 1, rule)
    season = np.exp(-(np.array([0, 10, 10.25]) ** 2) / 200)  # the year is a circle, of 365.25 days
    np.testing.assert_allclose(best.ravel(), season + 1 + 1 + 0.5, rtol=1e-6)
    assert best.dtype == np.float32
    worse = score_days(
        np.array([5, 5, 5]),
        flat + 250,
        flat + np.array([0.01, 0.05, 0.3])[:, None, None],
        flat,
        rule,
    )
    np.testing.assert_allclose(worse.ravel(), np.array([0.8, 0, 0]) + 1 + 0.25, rtol=1e-5)
    clearer = score_days(np.array([5] * 3), flat, flat - 0.2, flat, rule)
    np.testing.assert_allclose(clearer.ravel(), 2)  # less haze than none is none


def plain_sharpness(band):
    days, height, width = band.shape
    detail = np.zeros(band.shape)
    for day in range(days):
        bent = np.full((height, width), np.nan)
        for y, x in itertools.product(range(1, height - 1), range(1, width - 1)):
            five = [
                int(band[day, y + a, x + b]) for a, b in ((0, 0), (0, 1), (1, 0), (0, -1), (-1, 0))
            ]
            if all(five):
                bent[y, x] = abs(4 * five[0] - sum(five[1:]))
        for y, x in itertools.product(range(height), range(width)):
            window = bent[max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3]
            window = window[np.isfinite(window)]
            detail[day, y, x] = window.mean() if len(window) and band[day, y, x] else 0
    most = detail.max(axis=0)
    return np.where(band > 0, np.where(most > 0, detail / np.where(most > 0, most, 1), 1), 0)


def test_sharpness_is_relative_to_the_sharpest_date():
    rng = np.random.default_rng(3)
    band = rng.integers(1, 65536, (4, 13, 15)).astype(np.uint16)
    band[1] = band[1] // 10 + 1
    band[rng.random(band.shape) < 0.04] = 0
    band[:, :6, :6] = 777  # in a corner of which no date has any detail
    made = measure_sharpness(band)
    np.testing.assert_allclose(made, plain_sharpness(band), rtol=1e-5)
    assert made.dtype == np.float32
    assert made.max() == 1
    assert (made[band == 0] == 0).all()
    assert (made[:, 0, 0] == 1).all()
    np.testing.assert_array_equal(
        made[:, 3:-3, 3:-3],
        measure_sharpness(np.pad(band, ((0, 0), (5, 5), (5, 5)), "reflect"))[:, 8:-8, 8:-8],
    )
    np.testing.assert_array_equal(
        made[:, 4:9, 5:8], measure_sharpness(band[:, 1:12, 2:11])[:, 3:-3, 3:-3]
    )


# The cut


def test_a_pixel_depends_on_nothing_but_itself(geomedian):
    """Bit by bit: alone, in rows, in the whole; among neighbours that come to rest sooner or later, or have other days."""
    stack = year(bands=4, days=21, side=(6, 7))
    stack[:, ::2, :3] = 0
    stack[:, 3:5, 2] = 0
    whole = geomedian(stack)
    median = reducers.median(stack[1])
    boxes = [
        np.s_[:2, :],
        np.s_[2:, :],
        np.s_[:, 3:5],
        *(np.s_[y : y + 1, x : x + 1] for y in range(6) for x in range(7)),
    ]
    for box in boxes:
        part = stack[(slice(None), slice(None), *box)]
        made = geomedian(part)
        if geomedian is reducers.geomedian:
            np.testing.assert_array_equal(made.reflectance, whole.reflectance[(slice(None), *box)])
            for name in ("emad", "smad", "bcmad"):
                np.testing.assert_array_equal(getattr(made, name), getattr(whole, name)[box])
        else:  # sums in torch may be in another order
            np.testing.assert_allclose(made.emad, whole.emad[box], rtol=1e-4)
            assert (
                np.abs(made.reflectance.astype(int) - whole.reflectance[(slice(None), *box)]).max()
                <= 1
            )
        np.testing.assert_array_equal(reducers.median(part[1]), median[box])


def test_ranks_go_on_where_a_tile_ends():
    rng = np.random.default_rng(6)
    observed = rng.integers(1, 9000, (6, 211, 173)).astype(
        np.uint16
    )  # 36503 pixels, where a tile is of 32768
    np.testing.assert_array_equal(reducers.median(observed), np.rint(np.median(observed, axis=0)))
    low = lower_quartile(observed.astype(np.int32), observed > 0)
    np.testing.assert_array_equal(low, np.sort(observed, axis=0)[1])


def test_tiles_and_strips_do_not_show(monkeypatch):
    stack = year(bands=3, days=13, side=(70, 90), seed=5)
    whole = reducers.geomedian(stack)
    strips = [slice(0, 1), slice(1, 32), slice(32, 70)]
    for made, field in zip(
        zip(*(reducers.geomedian(stack[:, :, s]) for s in strips), strict=True), whole, strict=True
    ):
        np.testing.assert_array_equal(np.concatenate(made, axis=-2), field)
    pytest.importorskip("torch")
    monkeypatch.setattr("minecube.composite.torch_reducers.STRIP_VALUES", 3 * 13 * 1000)
    made = TorchGeomedian("cpu")(stack)
    assert np.abs(made.reflectance.astype(int) - whole.reflectance).max() <= 1
    assert (made.reflectance != whole.reflectance).mean() < 0.01
    for name in (
        "emad",
        "smad",
        "bcmad",
    ):  # of 6300 pixels a few, of few and wild observations, are all but flat
        off = np.abs(getattr(made, name) - getattr(whole, name))
        assert np.nanmax(off) < 5e-5
        assert (off > 1e-5).sum() < 10


# Devices


def test_a_device_that_is_not_there_is_said_to_be_missing():
    pytest.importorskip("torch")
    with pytest.raises(
        ModelError, match=r"'cuda:99' was asked for, but torch .* sees \d+ GPUs here; use cpu"
    ):
        TorchGeomedian("cuda:99")
    with pytest.raises(
        ModelError, match="'abacus' is not one that torch knows; expected cpu, cuda"
    ):
        TorchGeomedian("abacus")


def test_it_travels_to_workers():
    pytest.importorskip("torch")
    copy = pickle.loads(pickle.dumps(TorchGeomedian("cpu")))
    assert copy(np.full((1, 1, 1, 1), 5, np.uint16)).reflectance == [[[5]]]
