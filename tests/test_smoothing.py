"""Smoothing against every story there is, what it must leave alone, rates by hand, numpy against torch."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from minecube import tracks
from minecube.errors import LabelError, ModelError
from minecube.tracks import Rates, learning, smoothing
from minecube.tracks.torch_smoothing import TorchSmoothing

YEARS = (2015, 2016, 2017, 2018, 2020, 2021, 2022, 2024)
RATES = Rates(again=0.1)


def maps(values: object, years: object = YEARS) -> xr.DataArray:
    array = np.asarray(values, np.uint8)
    return xr.DataArray(array.reshape(len(array), 1, -1), dims=("year", "y", "x"), coords={"year": list(years)})


def series(seed: int, years: int, pixels: int, unknown: float = 0.1) -> np.ndarray:
    r = np.random.default_rng(seed)
    values = np.where(r.random((years, pixels)) < 0.4, r.choice([0, 250], (years, pixels)), r.integers(0, 251, (years, pixels)))
    return np.where(r.random((years, pixels)) < unknown, 255, values).astype(np.uint8)


def smoothed(values: object, rates: Rates = RATES) -> np.ndarray:
    """(year, pixel) in and out."""
    array = np.asarray(values, np.uint8)
    return tracks.smooth(maps(array, range(len(array))), rates).to_numpy()[:, 0]


def every_story(values: list[int], again: float) -> dict[tuple[int, ...], float]:
    """Score of each of the 2^T stories, in float64."""
    found = {}
    for story in itertools.product((0, 1), repeat=len(values)):
        changes = sum(a != b for a, b in itertools.pairwise(story))
        score = max(changes - 1, 0) * math.log(again)
        for state, value in zip(story, values, strict=True):
            p = min(max(value / 250, 0.002), 0.998)
            score += math.log(p / (1 - p)) if state and value != 255 else 0
        found[story] = score
    return found


again_of = st.sampled_from([1e-4, 0.02, 0.3, 1.0])
values_of = st.lists(st.one_of(st.sampled_from([0, 125, 250, 255]), st.integers(0, 250)), min_size=1, max_size=8)


@settings(deadline=None, max_examples=200)
@given(values_of, again_of)
def test_each_year_is_that_of_the_best_of_all_stories(values: list[int], again: float) -> None:
    found = smoothed(np.array(values)[:, None], Rates(again=again))[:, 0]
    known = [t for t, value in enumerate(values) if value != 255]
    if not known:
        assert (found == 255).all()
        return
    stories = every_story(values, again)
    for t in range(known[0], known[-1] + 1):
        yes, no = (max(score for story, score in stories.items() if story[t] == state) for state in (1, 0))
        expected = 250 / (1 + math.exp(no - yes))
        # Half a step of rounding, and a little of log-odds in whole numbers; below one half is stored below it.
        assert abs(found[t] - expected) <= 0.52 or (124 < expected < 125 and found[t] == 124)
    assert (found[: known[0]] == found[known[0]]).all()
    assert (found[known[-1] :] == found[known[-1]]).all()


def test_stories_worked_by_hand() -> None:
    # p = 0.8, 0.2, 0.8, log-odds log 4, -log 4, log 4: 111, 100 and 001 score log 4, 011, 110 and 000 score 0, 010 less, and
    # 101 scores 2 log 4 + log(again): with 1/2 log 8, with 1/8 log 2. So with 1/2 odds are 8 : 4, 4 : 8, 8 : 4; with 1/8 4 : 4.
    values = np.array([[200], [50], [200]])
    assert smoothed(values, Rates(again=1 / 2))[:, 0].tolist() == [167, 83, 167]
    assert smoothed(values, Rates(again=1 / 8))[:, 0].tolist() == [125, 125, 125]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 250), min_size=1, max_size=12), st.integers(0, 12), st.booleans(), again_of)
def test_what_changes_once_or_never_keeps_its_footprint(low: list[int], at: int, opens: bool, again: float) -> None:
    # A pixel at p = 0.3 in every year became a mine where the mine share was divided out; a mine that opened in the last year
    # was none where opening was charged for. Both cost more than smoothing gains.
    closed = np.array([min(v, 250 - v, 124) for v in low])
    is_mine = (np.arange(len(low)) >= at) == opens
    values = np.where(is_mine, 250 - closed, closed)
    np.testing.assert_array_equal(smoothed(values[:, None], Rates(again=again))[:, 0] >= 125, is_mine)


def test_again_of_one_changes_no_footprint() -> None:
    values = series(0, 9, 2000, unknown=0)
    np.testing.assert_array_equal(smoothed(values, Rates(again=1.0)) >= 125, values >= 125)


def test_what_is_stored_falls_on_the_side_of_its_log_odds() -> None:
    # -0.001 rounds to 125: a mine, where the best story has none.
    table = smoothing.stored()
    assert (table[: smoothing.FAR] < 125).all()
    assert (table[smoothing.FAR :] >= 125).all()
    assert (np.diff(table.astype(int)) >= 0).all()


def test_blips_and_dips_go_and_what_is_reclaimed_stays() -> None:
    blip, dip = [10, 10, 10, 220, 10, 10, 10], [240, 240, 240, 30, 240, 240, 240]
    reclaimed = [10, 10, 240, 240, 240, 10, 10]
    found = smoothed(np.array([blip, dip, reclaimed]).T, Rates(again=0.05)) >= 125
    assert found.T.tolist() == [[False] * 7, [True] * 7, [False] * 2 + [True] * 3 + [False] * 2]


def test_time_backwards_and_mine_for_none_give_the_same_turned() -> None:
    values = series(1, 9, 3000)
    found = smoothed(values)
    np.testing.assert_array_equal(smoothed(values[::-1]), found[::-1])
    other = smoothed(np.where(values == 255, 255, 250 - values))
    even = np.abs(found.astype(int) - 125) <= 1  # a draw is a mine, either way
    np.testing.assert_array_equal(other[~even], (250 - found)[~even])


def test_a_year_left_out_is_a_year_of_which_nothing_is_known() -> None:
    values = series(2, 8, 500, unknown=0)
    every = np.full((10, 500), 255, np.uint8)
    every[np.subtract(YEARS, 2015)] = values
    filled = smoothed(every)
    np.testing.assert_array_equal(filled[np.subtract(YEARS, 2015)], tracks.smooth(maps(values), RATES).to_numpy()[:, 0])
    assert (filled != 255).all()


def test_unknown_is_no_probability_and_ends_are_those_of_the_nearest_year() -> None:
    # Were 255 taken for a probability of 1.02, the year in between would be a mine; unseen last years would be even.
    found = smoothed(np.array([[60, 255, 5], [255, 255, 5], [60, 60, 255], [60, 255, 255]]))
    assert (found[:, :2] <= 60).all()
    assert (found[:, 2] <= 5).all()


def test_a_year_alone_and_long_certain_series_stay_as_they_are() -> None:
    values = np.arange(251)[None]
    found = smoothed(values)
    np.testing.assert_array_equal(found, values)
    turned = np.repeat([0, 250, 0], 300)[:, None]
    np.testing.assert_array_equal(smoothed(turned, Rates(again=smoothing.LEAST)), turned)


def test_torch_does_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minecube.tracks.torch_smoothing.STRIP_VALUES", 8 * 1000)
    values = series(3, 8, 50_001)
    for rates in (RATES, Rates(again=1.0), Rates(again=smoothing.LEAST)):
        np.testing.assert_array_equal(TorchSmoothing("cpu").best_stories(values, rates), smoothing.best_stories(values, rates))


def test_torch_refuses_what_is_not_there() -> None:
    with pytest.raises(ModelError, match="abacus"):
        TorchSmoothing("abacus")


def test_blocks_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    values = xr.DataArray(
        series(2, 8, 37 * 61).reshape(8, 37, 61), dims=("year", "y", "x"), coords={"year": list(YEARS), "x": np.arange(61.0)}
    )
    whole = tracks.smooth(values, RATES)
    parts = [[tracks.smooth(values[:, y : y + 16, x : x + 20], RATES) for x in range(0, 61, 20)] for y in range(0, 37, 16)]
    xr.testing.assert_equal(xr.combine_nested(parts, ["y", "x"]), whole)
    monkeypatch.setattr(smoothing, "_BLOCK_PX", 100)
    xr.testing.assert_identical(tracks.smooth(values, RATES), whole)
    assert whole.dtype == np.uint8
    assert whole.dims == ("year", "y", "x")
    assert whole.attrs["nodata"] == 255
    assert set(whole.coords) == {"year", "x"}


def test_lazy_maps_and_maps_of_other_layout() -> None:
    values = maps(series(3, 8, 40))
    xr.testing.assert_identical(tracks.smooth(values.chunk(year=1), RATES), tracks.smooth(values, RATES))
    assert tracks.learn_rates([values.chunk(year=1)]) == tracks.learn_rates([values])
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


@pytest.mark.parametrize("wrong", [0.0, 1.5, -1.0, math.nan])
def test_rates_that_are_none(wrong: float) -> None:
    with pytest.raises(LabelError, match="again"):
        Rates(again=wrong)


# Learning


def test_again_is_true_changes_back_over_those_shown() -> None:
    # Shown: 0101 goes back twice, 0110 once, the others never: 3 in 4 x 3 steps. True: 1 in 2 x 3 steps, one pixel seen twice.
    shown = np.array([[0, 250, 0, 250], [10, 200, 130, 90], [0, 0, 0, 200], [250, 250, 250, 250]]).T
    labels = np.array([[0, 1, 0, 0], [1, 1, 1, 1]]).T
    site, true = maps(shown, range(4)), maps(labels, range(4))
    assert tracks.learn_rates([site], [true]).again == pytest.approx((1 / 6) / (3 / 12))
    # Sites count by their steps, not each alike: 3 of 12 and 0 of 12 make 3 of 24.
    calm = maps(np.zeros((4, 4)), range(4))
    assert tracks.learn_rates([site, calm], [true, calm]).again == pytest.approx((1 / 18) / (3 / 24))
    assert tracks.learn_rates([site]).again == pytest.approx(learning.TRUE_RATE / (3 / 12))
    # More in labels than in maps: nothing is to be smoothed away. None in labels: as little is believed as can be.
    assert tracks.learn_rates([calm, site], [maps([[0], [1], [0], [1]], range(4))]).again == 1
    assert tracks.learn_rates([site], [calm]).again == smoothing.LEAST
    assert tracks.learn_rates([calm]).again == 1


def test_what_teaches_nothing_is_refused() -> None:
    with pytest.raises(LabelError, match="no map"):
        tracks.learn_rates([])
    with pytest.raises(LabelError, match="no known pixel"):
        tracks.learn_rates([maps(np.full((8, 4), 255))])
    with pytest.raises(LabelError, match="known in two years"):
        tracks.learn_rates([maps(np.zeros((8, 4)))], [maps(np.where(np.eye(8, 4), 1, 255))])
    with pytest.raises(LabelError, match="not probabilities"):
        tracks.learn_rates([maps(np.zeros((8, 4)))], [maps(np.full((8, 4), 77))])
