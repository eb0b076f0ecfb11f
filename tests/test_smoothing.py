"""Smoothing against every path there is, learned rates against planted ones."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from minecube import tracks
from minecube.errors import LabelError
from minecube.tracks import Rates, learning, smoothing

YEARS = (2015, 2016, 2017, 2018, 2020, 2021, 2022, 2024)
RATES = Rates(opening=0.03, closing=0.01, initial=0.2, prior=0.3, temper=0.6)


def maps(values: object, years: object = YEARS) -> xr.DataArray:
    array = np.asarray(values, np.uint8)
    return xr.DataArray(
        array.reshape(len(array), 1, -1), dims=("year", "y", "x"), coords={"year": list(years)}
    )


def series(seed: int, years: int, pixels: int, unknown: float = 0.1) -> np.ndarray:
    r = np.random.default_rng(seed)
    values = np.where(
        r.random((years, pixels)) < 0.4,
        r.choice([0, 250], (years, pixels)),
        r.integers(0, 251, (years, pixels)),
    )
    return np.where(r.random((years, pixels)) < unknown, 255, values).astype(np.uint8)


def every_path(values: np.ndarray, years: tuple[int, ...], rates: Rates) -> np.ndarray:
    """Posterior of each year, by all 2^T paths, each step of a year a matrix product."""
    yearly = np.array([[1 - rates.opening, rates.opening], [rates.closing, 1 - rates.closing]])
    weight = {}
    for path in itertools.product((0, 1), repeat=len(years)):
        p = rates.initial if path[0] else 1 - rates.initial
        for t, state in enumerate(path):
            if t:
                p *= np.linalg.matrix_power(yearly, years[t] - years[t - 1])[path[t - 1], state]
            if values[t] != 255:
                share = min(max(values[t] / 250, 0.002), 0.998)
                # Bayes: what a posterior says is its odds over the prior's.
                of_state = share / rates.prior if state else (1 - share) / (1 - rates.prior)
                p *= of_state**rates.temper
        weight[path] = p
    total = sum(weight.values())
    return np.array(
        [sum(w for path, w in weight.items() if path[t]) / total for t in range(len(years))]
    )


rates_of = st.builds(
    Rates,
    opening=st.sampled_from([1e-6, 0.004, 0.1, 0.5]),
    closing=st.sampled_from([1e-6, 0.02, 0.3, 0.5]),
    initial=st.sampled_from([1e-4, 0.1, 0.5, 0.9999]),
    prior=st.sampled_from([0.01, 0.07, 0.5, 0.99]),
    temper=st.sampled_from([0.2, 0.75, 1.0]),
)
values_of = st.lists(
    st.one_of(st.sampled_from([0, 125, 250, 255]), st.integers(0, 250)), min_size=1, max_size=7
)


@settings(deadline=None, max_examples=120)
@given(values_of, rates_of, st.data())
def test_posterior_is_that_of_every_path(
    values: list[int], rates: Rates, data: st.DataObject
) -> None:
    gaps = data.draw(
        st.lists(st.integers(1, 4), min_size=len(values) - 1, max_size=len(values) - 1)
    )
    years = tuple(itertools.accumulate(gaps, initial=2015))
    column = np.array(values, np.uint8)[:, None]
    found = smoothing.compute_posterior(column, years, rates)[:, 0]
    if (column == 255).all():
        assert (found == 255).all()
        return
    marginal = every_path(column[:, 0], years, rates)
    assert np.abs(found - marginal * 250).max() <= 0.5 + 1e-3


def test_a_path_worked_by_hand() -> None:
    # Evidence 4 : 1, 1 : 4, 4 : 1 in three years (p = 0.8, 0.2, 0.8, prior 1/2), chances of 1/10 to change.
    rates = Rates(opening=0.1, closing=0.1, initial=0.5, prior=0.5, temper=1)
    # 111: 4 .9 1 .9 4 = 12.96; 101: 4 .1 4 .1 4 = .64; 011: .9 .1 4 = .36 (1 * .1 * 1 * .9 * 4); 110: 4 .9 1 .1 1 = .36;
    # 001: .9 4 .1 4 = 1.44; 100: 4 .1 4 .9 = 1.44; 000: .9 4 .9 = 3.24; 010: .1 .1 = .01
    one = {
        "111": 12.96,
        "101": 0.64,
        "011": 0.36,
        "110": 0.36,
        "001": 1.44,
        "100": 1.44,
        "000": 3.24,
        "010": 0.01,
    }
    total = sum(one.values())
    expected = [sum(v for k, v in one.items() if k[t] == "1") / total for t in range(3)]
    values = np.array([[200], [50], [200]], np.uint8)
    assert smoothing.compute_posterior(values, (2015, 2016, 2017), rates)[:, 0].tolist() == [
        round(250 * p) for p in expected
    ]


def test_a_year_left_out_is_a_year_of_which_nothing_is_known() -> None:
    values = series(0, 8, 500, unknown=0)
    every = np.full((10, 500), 255, np.uint8)
    every[np.subtract(YEARS, 2015)] = values
    gaps = smoothing.compute_posterior(values, YEARS, RATES)
    filled = smoothing.compute_posterior(every, range(2015, 2025), RATES)
    np.testing.assert_array_equal(filled[np.subtract(YEARS, 2015)], gaps)
    assert (filled[4] != 255).all()
    assert (
        smoothing.compute_posterior(values, range(2015, 2023), RATES) != gaps
    ).any()  # the gap matters


def test_unknown_is_no_probability() -> None:
    # Were 255 taken for a probability of 1.02, the year in between would make all three a mine.
    rates = dataclasses.replace(RATES, initial=0.5, prior=0.5)
    found = smoothing.compute_posterior(
        np.array([[60], [255], [60]], np.uint8), (2015, 2016, 2017), rates
    )[:, 0]
    assert (found < 60).all()
    alone = smoothing.compute_posterior(
        np.array([[255], [255], [255], [0]], np.uint8), (2015, 2016, 2017, 2018), rates
    )[:, 0]
    assert alone.tolist() == sorted(alone.tolist(), reverse=True)
    assert alone[0] < 125


def test_one_year_under_its_own_prior_stays_as_it_is() -> None:
    # Divided out and put back: the wrong way round, or once too often, it would not come back.
    rates = Rates(opening=0.01, closing=0.02, initial=0.07, prior=0.07, temper=1)
    values = np.arange(251, dtype=np.uint8)[None]
    np.testing.assert_array_equal(
        smoothing.compute_posterior(values, (2020,), rates)[0, 1:-1], values[0, 1:-1]
    )
    # Under a prior of one half a mine's odds are 0.93 / 0.07 = 13 times what they should be.
    low = smoothing.compute_posterior(values, (2020,), dataclasses.replace(rates, prior=0.5))[0]
    assert (low[1:-1] < values[0, 1:-1]).all()
    assert low[125] == round(250 * 0.07)


def test_nothing_speaks_for_a_mine_where_nothing_was_seen_of_one() -> None:
    # 0 stands for anything below 1/250; taken for 1/500 it would be twice a prior of 1/1000, and speak for a mine.
    assert smoothing.evidence(dataclasses.replace(RATES, prior=smoothing.MIN_PRIOR))[0] < 0.5
    assert smoothing.evidence(dataclasses.replace(RATES, prior=1 - smoothing.MIN_PRIOR))[250] > 2
    empty = maps(np.where(np.random.default_rng(0).random((8, 500)) < 0.005, 9, 0))
    rates = tracks.learn_rates([empty])
    assert rates.prior == smoothing.MIN_PRIOR
    assert (tracks.smooth(empty, rates) < 25).all()


def test_nothing_overflows_at_the_ends() -> None:
    rates = Rates(opening=1e-6, closing=1e-6, initial=1e-4, prior=0.01, temper=1)
    with np.errstate(all="raise"):
        for stored in (0, 250):
            values = np.full((60, 3), stored, np.uint8)
            assert (smoothing.compute_posterior(values, range(60), rates) == stored).all()
        turned = np.repeat(np.array([0, 250, 0], np.uint8), 20)[:, None]
        found = smoothing.compute_posterior(
            turned, range(60), dataclasses.replace(rates, initial=0.5, prior=0.5)
        )
    assert found[5, 0] == 0
    assert found[30, 0] == 250
    assert found[55, 0] == 0


def test_what_is_constant_and_certain_stays() -> None:
    for stored in (0, 250):
        values = np.full((8, 4), stored, np.uint8)
        off = np.abs(smoothing.compute_posterior(values, YEARS, RATES).astype(int) - values)
        assert off[:-1].max() == 0
        assert off[-1].max() <= 1  # with no year behind it, and evidence tempered


def test_a_change_is_in_the_year_it_was_seen() -> None:
    # One year too early or late, and the areas of every growing mine are another year's.
    for first in range(1, 8):
        values = np.where(np.arange(8) >= first, 250, 0).astype(np.uint8)[:, None]
        expected = (np.arange(8) >= first).tolist()
        assert (smoothing.compute_posterior(values, YEARS, RATES)[:, 0] >= 125).tolist() == expected


def test_a_single_years_error_is_mended_and_a_lasting_change_is_not() -> None:
    values = np.array(
        [[10, 10, 10, 240, 10, 10, 10, 10], [10, 10, 10, 240, 240, 240, 240, 240]], np.uint8
    ).T
    rates = dataclasses.replace(RATES, prior=0.5)
    found = smoothing.compute_posterior(values, YEARS, rates) >= 125
    assert found[:, 0].tolist() == [False] * 8
    assert found[:, 1].tolist() == [False] * 3 + [True] * 5


def test_blocks_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    values = xr.DataArray(
        series(2, 8, 37 * 61).reshape(8, 37, 61),
        dims=("year", "y", "x"),
        coords={"year": list(YEARS), "x": np.arange(61.0)},
    )
    whole = tracks.smooth(values, RATES)
    parts = [
        [tracks.smooth(values[:, y : y + 16, x : x + 20], RATES) for x in range(0, 61, 20)]
        for y in range(0, 37, 16)
    ]
    xr.testing.assert_equal(xr.combine_nested(parts, ["y", "x"]), whole)
    monkeypatch.setattr(smoothing, "_BLOCK_PX", 100)
    xr.testing.assert_identical(tracks.smooth(values, RATES), whole)
    assert whole.dtype == np.uint8
    assert whole.dims == ("year", "y", "x")
    assert whole.attrs["nodata"] == 255
    assert set(whole.coords) == {"year", "x"}


def test_lazy_maps_and_maps_of_other_layout() -> None:
    values = maps(series(3, 8, 40))
    xr.testing.assert_identical(
        tracks.smooth(values.chunk(year=1), RATES), tracks.smooth(values, RATES)
    )
    turned = values.transpose("x", "year", "y").copy().transpose("year", "y", "x")
    xr.testing.assert_identical(tracks.smooth(turned, RATES), tracks.smooth(values, RATES))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda p: p.astype(float) / 250, "uint8"),
        (lambda p: p[::-1], "ascending"),
        (lambda p: p.transpose("y", "x", "year"), "year, y, x"),
        (lambda p: p.drop_vars("year"), r"years \[\]"),
        (lambda p: p.where(p != 7, 253).astype(np.uint8), r"251\.\.254"),
    ],
)
def test_what_is_no_stored_probability_is_refused(spoil, said) -> None:
    good = maps(np.full((8, 3), 7))
    with pytest.raises(LabelError, match=said):
        tracks.smooth(spoil(good), RATES)
    with pytest.raises(LabelError, match=said):
        tracks.learn_rates([spoil(good)])


@pytest.mark.parametrize(
    "wrong",
    [
        {"opening": 0.0},
        {"closing": 0.6},
        {"initial": 0.0},
        {"prior": 1.0},
        {"temper": 0.0},
        {"opening": math.nan},
    ],
)
def test_rates_that_are_none(wrong: dict[str, float]) -> None:
    with pytest.raises(LabelError, match=next(iter(wrong))):
        dataclasses.replace(RATES, **wrong)


# Learning


def chain(seed: int, rates: Rates, years: int, pixels: int) -> np.ndarray:
    """States drawn from the model itself, bool (year, pixel)."""
    r = np.random.default_rng(seed)
    states = [r.random(pixels) < rates.initial]
    for _ in range(years - 1):
        u = r.random(pixels)
        states.append(np.where(states[-1], u >= rates.closing, u < rates.opening))
    return np.array(states)


def seen(seed: int, states: np.ndarray, prior: float) -> np.ndarray:
    """Stored probabilities that are true posteriors, under `prior`, of states seen through noise."""
    noisy = np.where(states, 1.0, -1.0) + np.random.default_rng(seed).normal(0, 1, states.shape)
    odds = (
        np.exp(2 * noisy) * prior / (1 - prior)
    )  # normal densities at +1 and -1: their ratio is exp(2 y)
    return np.rint(250 * odds / (1 + odds)).astype(np.uint8)


def test_planted_rates_are_learned() -> None:
    planted = Rates(opening=0.02, closing=0.05, initial=0.3, prior=0.4, temper=1)
    values = seen(1, chain(0, planted, 10, 60_000), planted.prior)
    found = tracks.learn_rates([maps(values, range(2015, 2025))], prior=0.4, temper=1)
    assert found.opening == pytest.approx(0.02, rel=0.1)
    assert found.closing == pytest.approx(0.05, rel=0.1)
    assert found.initial == pytest.approx(0.3, abs=0.01)
    # Through years left out and pixels unseen, the rates are still those of one year.
    values[np.random.default_rng(2).random(values.shape) < 0.2] = 255
    keep = [0, 1, 3, 6, 7, 9]
    gaps = tracks.learn_rates([maps(values[keep], np.add(2015, keep))], prior=0.4, temper=1)
    assert gaps.opening == pytest.approx(0.02, rel=0.2)
    assert gaps.closing == pytest.approx(0.05, rel=0.2)


def test_each_turn_is_at_least_as_likely() -> None:
    for seed in range(4):
        sample = learning.sampled([maps(series(seed, 8, 300))])
        _, told = learning.maximise(sample, dataclasses.replace(RATES, opening=0.3, closing=1e-4))
        assert len(told) > 3
        assert (np.diff(told) >= -1e-9 * abs(told[0])).all()


def test_the_likelihood_is_that_of_every_path() -> None:
    values = np.array([200, 255, 30, 180], np.uint8)
    rates, likely = RATES, smoothing.evidence(RATES).astype(float)[values][:, None]
    found = learning.expected(likely, np.ones(1), rates)
    total = opened = 0.0
    for path in itertools.product((0, 1), repeat=4):
        p = rates.initial if path[0] else 1 - rates.initial
        for t, state in enumerate(path):
            if t:
                p *= rates.over(1)[2 * path[t - 1] + state]
            p *= likely[t, 0] ** state
        total += p
        opened += p * sum(a < b for a, b in itertools.pairwise(path))
    assert found.log_likelihood == pytest.approx(math.log(total))
    assert found.opened == pytest.approx(opened / total)
    assert found.opened + found.closed + found.stayed_open + found.stayed_closed == pytest.approx(3)


def test_expected_counts_add_up_over_sites_and_equal_series() -> None:
    table = smoothing.evidence(RATES).astype(float)
    values = series(4, 8, 200)
    whole = learning.expected(table[values], np.ones(200), RATES)
    parts = sum(
        (learning.expected(table[v], np.ones(50), RATES) for v in np.split(values, 4, axis=1)),
        learning.Expected(),
    )
    twice = learning.expected(table[values], np.full(200, 2.0), RATES)
    for name, value in vars(whole).items():
        assert getattr(parts, name) == pytest.approx(value)
        assert getattr(twice, name) == pytest.approx(2 * value)
    both = learning.sampled([maps(values), maps(values)])
    assert sum(s.weights.sum() for s in both) == 2 * (values != 255).any(axis=0).sum()


def test_learning_is_deterministic_and_samples_all_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "_SAMPLE_PX", 500)
    sites = [maps(series(s, 8, 1000)) for s in (5, 6)]
    sample = learning.sampled(sites)
    assert [s.weights.sum() for s in sample] == [250, 250]
    assert tracks.learn_rates(sites) == tracks.learn_rates(sites)


def test_rates_are_learned_of_all_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ground that opens between two columns of a site whose width is a multiple of the step."""
    monkeypatch.setattr(learning, "_SAMPLE_PX", 1 << 10)
    closed = np.full((4, 128, 128), 5, np.uint8)  # every 16th of 128 x 128
    for first in (0, 8):
        opens = closed.copy()
        opens[2:, :, first + 1 : first + 8] = 245
        (series,) = learning.sampled([maps(opens, [2019, 2020, 2021, 2022])])
        taken = series.weights[(series.values[-1] == 245)].sum() / series.weights.sum()
        assert taken == pytest.approx(7 / 128, rel=0.1)


def test_rates_of_labels_are_counted() -> None:
    #        0->1  0->0  1->1  1->0  0->?->?, then 1: three steps of which nothing is known
    labels = [[0, 0, 1, 1, 0], [1, 0, 1, 0, 255], [1, 0, 1, 0, 255], [1, 255, 1, 0, 1]]
    found = learning.steps_of_labels(maps(labels, range(2015, 2019)))
    assert dict(found) == {
        (0, 1, 1): 1,
        (0, 0, 1): 2 + 2,
        (1, 1, 1): 2 + 3,
        (1, 0, 1): 1,
        (0, 1, 3): 1,
    }
    planted = Rates(opening=0.02, closing=0.06, initial=0.3, prior=0.3)
    states = chain(7, planted, 10, 100_000).astype(np.uint8)
    rates = tracks.learn_rates_from_labels(
        [maps(half, range(2015, 2025)) for half in np.split(states, 2, axis=1)]
    )
    stays, turns = states[:-1] == states[1:], states[:-1] != states[1:]
    assert rates.opening == pytest.approx(
        (turns & (states[:-1] == 0)).sum() / (states[:-1] == 0).sum(), rel=1e-3
    )
    assert rates.closing == pytest.approx(
        1 - (stays & (states[:-1] == 1)).sum() / (states[:-1] == 1).sum(), rel=1e-3
    )
    assert rates.prior == rates.initial == pytest.approx(states.mean())
    # Of every third year: what is seen to change is less than three years' changes, and the rates are those of one year.
    thinned = tracks.learn_rates_from_labels([maps(states[::3], range(2015, 2025, 3))])
    assert thinned.opening == pytest.approx(0.02, rel=0.05)
    assert thinned.closing == pytest.approx(0.06, rel=0.05)


def test_what_teaches_nothing_is_refused() -> None:
    with pytest.raises(LabelError, match="no map"):
        tracks.learn_rates([])
    with pytest.raises(LabelError, match="no known pixel"):
        tracks.learn_rates([maps(np.full((8, 4), 255))])
    with pytest.raises(LabelError, match="known in two years"):
        tracks.learn_rates_from_labels([maps(np.where(np.eye(8, 4), 1, 255))])
    with pytest.raises(LabelError, match="not probabilities"):
        tracks.learn_rates_from_labels([maps(np.full((8, 4), 77))])


def test_maps_without_a_change_keep_their_rates_in_bounds() -> None:
    values = np.repeat(np.array([[0, 0, 0, 250]], np.uint8), 8, axis=0)
    found = tracks.learn_rates([maps(values)])
    assert smoothing.MIN_RATE <= found.opening < 0.01
    assert smoothing.MIN_RATE <= found.closing < 0.01
    np.testing.assert_array_equal(tracks.smooth(maps(values), found).to_numpy()[:, 0], values)
