"""What became of pixels and sites against loops; intervals against fields of known correlation; what smoothing gains."""

from __future__ import annotations

import importlib.util
import itertools
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import xarray as xr
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from odc.geo.geobox import GeoBox
from scipy import ndimage

from minecube import tracks
from minecube.errors import LabelError
from minecube.tracks import KINDS, uncertainty

YEARS = [2016, 2017, 2019, 2020, 2023]


def on_years(values: object, years: list[int] = YEARS) -> xr.DataArray:
    array = np.asarray(values, np.uint8)
    return xr.DataArray(
        array.reshape(len(array), *array.shape[1:]), dims=("year", "y", "x"), coords={"year": years}
    )


def grid(height: int, width: int) -> GeoBox:
    return GeoBox((height, width), Affine(10, 0, 700_020, 0, -10, 5_600_040), "EPSG:32633")


# Events


def story(states: list[int], odds: list[int], years: list[int]) -> dict[str, int]:
    """The layers of one pixel, told from its list of known years."""
    known = [(y, s, p) for y, s, p in zip(years, states, odds, strict=True) if s != 255]
    if not known:
        return {"onset": 0, "end": 0, "reclaimed": 255, "kind": 255, "flips": 255}
    mine = [y for y, s, _ in known if s == 1]
    steps = list(itertools.pairwise(known))
    opened = [(a, b) for a, b in steps if (a[1], b[1]) == (0, 1)]
    closed = [(a, b) for a, b in steps if (a[1], b[1]) == (1, 0)]
    told = set()
    if known[0][1] == 1:
        told.add("there_at_first")
    if known[-1][1] == 1:
        told.add("there_at_last")
    elif mine:
        before, after = closed[-1]
        told.add("closed_abruptly" if before[2] > 200 and after[2] < 50 else "closed_gradually")
    if mine and known[0][1] == 0:
        before, after = opened[0]
        told.add("opened_abruptly" if before[2] < 50 and after[2] > 200 else "opened_gradually")
    if len(opened) > (known[0][1] == 0):
        told.add("opened_again")
    return {
        "onset": min(mine, default=0),
        "end": max(mine, default=0),
        "reclaimed": int(bool(mine) and known[-1][1] == 0),
        "kind": sum(KINDS[k] for k in told),
        "flips": len(opened) + len(closed),
    }


@settings(deadline=None, max_examples=60)
@given(
    hnp.arrays(np.uint8, (5, 2, 4), elements=st.sampled_from([0, 1, 255])),
    hnp.arrays(np.uint8, (5, 2, 4), elements=st.sampled_from([0, 49, 50, 125, 200, 201, 250])),
)
def test_events_are_those_of_loops(states: np.ndarray, odds: np.ndarray) -> None:
    found = tracks.derive_events(on_years(states), on_years(odds))
    for y in range(2):
        for x in range(4):
            expected = story(states[:, y, x].tolist(), odds[:, y, x].tolist(), YEARS)
            assert {name: int(found[name][y, x]) for name in expected} == expected


def test_layers_are_small_integers_on_the_grid() -> None:
    footprint = on_years(np.zeros((5, 2, 3))).assign_coords(
        y=[25.0, 15.0], x=[5.0, 15.0, 25.0], spatial_ref=32633
    )
    found = tracks.derive_events(footprint, footprint)
    assert {n: v.dtype.name for n, v in found.items()} == {
        "onset": "uint16",
        "end": "uint16",
        "reclaimed": "uint8",
        "kind": "uint8",
        "flips": "uint8",
    }
    assert set(found.coords) == {"y", "x", "spatial_ref"}
    assert all("nodata" in layer.attrs for layer in found.values())


def test_onset_is_the_first_mine_year() -> None:
    states = on_years(np.random.default_rng(0).choice([0, 1, 255], (5, 30, 40)))
    found = tracks.derive_events(states, states)["onset"]
    assert found.dtype == np.uint16
    assert found.dims == ("y", "x")
    for y in range(30):
        for x in range(40):
            mine = (year for year, v in zip(YEARS, states.values[:, y, x], strict=True) if v == 1)
            assert found.values[y, x] == next(mine, 0)


def test_events_of_two_smoothings_are_refused() -> None:
    states = on_years(np.zeros((5, 2, 3)))
    with pytest.raises(LabelError, match="one smoothing"):
        tracks.derive_events(states, on_years(np.zeros((5, 2, 3)), [2015, *YEARS[1:]]))
    with pytest.raises(LabelError, match="one smoothing"):
        tracks.derive_events(states, on_years(np.zeros((5, 3, 2))))


def test_flip_rate_counts_what_goes_back() -> None:
    #  opens; opens and is reclaimed; forth, back, forth over an unknown year; unknown but once
    states = [
        [[0, 0, 0, 255]],
        [[0, 1, 1, 255]],
        [[1, 1, 255, 255]],
        [[1, 0, 0, 1]],
        [[1, 0, 1, 255]],
    ]
    steps = 4 + 4 + 3 + 0
    assert tracks.compute_flip_rate(on_years(states)) == pytest.approx((0 + 1 + 2) / steps)
    unknown = on_years(np.full((5, 2, 2), 255))
    assert math.isnan(tracks.compute_flip_rate(unknown))
    # Of sites together: steps that are known count, not pixels that are not.
    calm = on_years(np.zeros((5, 1, 2)))
    assert tracks.compute_flip_rate(on_years(states), unknown, calm) == pytest.approx(
        (0 + 1 + 2) / (steps + 8)
    )


def test_a_site_that_opens_and_one_that_grows() -> None:
    def table(area: list[float], gain: list[float]) -> pd.DataFrame:
        return pd.DataFrame({"year": YEARS, "area_m2": area, "gain_m2": [math.nan, *gain]})

    opened = tracks.summarize_expansion(table([0, 500, 9000, 9000, 9500], [500, 8500, 0, 500]))
    # 8500 in the two years from 2017 to 2019: 4250 a year of 9500 gained, less than half.
    assert (opened.opened, opened.kind, opened.largest_year) == (2019, "gradual", 2019)
    assert opened.largest_share == pytest.approx(4250 / 9500)
    at_once = tracks.summarize_expansion(table([0, 9000, 9000, 9000, 9500], [9000, 0, 0, 500]))
    assert (at_once.opened, at_once.kind, at_once.largest_year) == (2017, "abrupt", 2017)
    steady = tracks.summarize_expansion(table([100, 200, 400, 500, 800], [100, 200, 100, 300]))
    assert (steady.opened, steady.kind) == (2016, "gradual")
    assert steady.growth_m2_per_year == pytest.approx(100)
    still = tracks.summarize_expansion(table([900, 901, 900, 900, 900], [1, 0, 0, 0]))
    assert (still.kind, still.largest_year) == ("none", 0)
    assert tracks.summarize_expansion(table([0] * 5, [0] * 4)).opened == 0


# Intervals


def blur(r: np.random.Generator, side: int, sigma: float) -> np.ndarray:
    """A Gaussian field of deviation 1 whose correlation at distance d is exp(-d^2 / (4 sigma^2))."""
    field = ndimage.gaussian_filter(r.standard_normal((side, side)), sigma, mode="wrap")
    return field * 2 * math.sqrt(math.pi) * sigma


SIGMA, SIDE = 3.0, 96


def binary_correlation(distance: np.ndarray, p: float) -> np.ndarray:
    """Of z = [g < quantile(p)] at two points, by the bivariate normal distribution."""
    cut = scipy.stats.norm.ppf(p)
    rho = np.exp(-(distance**2) / (4 * SIGMA**2))
    both = [
        scipy.stats.multivariate_normal.cdf([cut, cut], cov=[[1, c], [c, 1]]) if c < 1 - 1e-9 else p
        for c in rho
    ]
    return (np.array(both) - p * p) / (p * (1 - p))


def test_intervals_hold_the_area_of_fields_whose_errors_are_alike() -> None:
    # True areas drawn from the posterior itself, but not pixel by pixel: neighbours go together.
    p = 0.4
    posterior = on_years(np.full((1, SIDE, SIDE), 250 * p), [2020])
    alike = tracks.ErrorCorrelation(binary_correlation(np.arange(uncertainty.REACH_PX + 1.0), p))
    table = tracks.estimate_areas(posterior, posterior, grid(SIDE, SIDE), alike)
    alone = tracks.estimate_areas(posterior, posterior, grid(SIDE, SIDE), tracks.UNCORRELATED)
    worth = uncertainty.pixel_areas(grid(SIDE, SIDE))
    r = np.random.default_rng(0)
    drawn = np.array(
        [(worth * (blur(r, SIDE, SIGMA) < scipy.stats.norm.ppf(p))).sum() for _ in range(400)]
    )
    assert table["expected_m2"][0] == pytest.approx(drawn.mean(), rel=0.02)
    assert table["sd_m2"][0] == pytest.approx(drawn.std(), rel=0.12)
    within, within_alone = (
        ((t["low_m2"][0] <= drawn) & (drawn <= t["high_m2"][0])).mean() for t in (table, alone)
    )
    assert 0.92 <= within <= 0.98
    assert within_alone < 0.35  # what taking pixels for independent would claim to be 0.95


def test_pixels_that_err_alone_have_the_binomial_deviation() -> None:
    stored = np.random.default_rng(1).integers(0, 251, (2, 20, 30))
    maps = on_years(stored, [2019, 2020])
    found = tracks.estimate_areas(maps, maps, grid(20, 30), tracks.UNCORRELATED)
    worth = uncertainty.pixel_areas(grid(20, 30))
    p = stored / 250
    np.testing.assert_allclose(found["expected_m2"], (p * worth).sum(axis=(1, 2)))
    np.testing.assert_allclose(found["sd_m2"], np.sqrt((p * (1 - p) * worth**2).sum(axis=(1, 2))))
    np.testing.assert_allclose(found["high_m2"] - found["low_m2"], 2 * 1.959964 * found["sd_m2"])


def test_an_error_common_to_all_pixels_does_not_shrink_with_their_number() -> None:
    maps = on_years(np.full((1, 40, 50), 125), [2020])
    whole = tracks.estimate_areas(
        maps, maps, grid(40, 50), tracks.ErrorCorrelation(np.ones(65), 1.0)
    )
    assert whole["sd_m2"][0] == pytest.approx(0.5 * uncertainty.pixel_areas(grid(40, 50)).sum())
    half = tracks.estimate_areas(
        maps, maps, grid(40, 50), tracks.ErrorCorrelation(np.r_[1, np.full(64, 0.5)], 0.5)
    )
    assert half["sd_m2"][0] == pytest.approx(whole["sd_m2"][0] * math.sqrt(0.5), rel=1e-2)


def test_every_pair_of_pixels_counts_by_its_distance() -> None:
    stored = np.random.default_rng(2).integers(0, 251, (1, 9, 12))
    maps = on_years(stored, [2020])
    alike = tracks.ErrorCorrelation(np.clip(1 - np.arange(65) / 5.0, 0.1, 1), 0.1)
    spread = (
        uncertainty.pixel_areas(grid(9, 12)) * np.sqrt(stored[0] / 250 * (1 - stored[0] / 250))
    ).ravel()
    y, x = (a.ravel() for a in np.mgrid[:9, :12])
    away = np.hypot(y[:, None] - y, x[:, None] - x)
    variance = spread @ np.interp(away, np.arange(65), alike.by_distance) @ spread
    found = tracks.estimate_areas(maps, maps, grid(9, 12), alike)
    assert found["sd_m2"][0] == pytest.approx(math.sqrt(variance))


def test_correlation_is_measured_as_it_was_planted() -> None:
    r = np.random.default_rng(3)
    smoothed = np.full((10, 200, 200), 125)
    for common in (0.0, 0.5):
        noise = np.stack(
            [
                math.sqrt(1 - common) * blur(r, 200, SIGMA) + math.sqrt(common) * z
                for z in r.standard_normal(10)
            ]
        )
        # As many years up as down, so that ten draws of the common error have the variance they were planted with.
        noise += (
            math.sqrt(common) * (np.resize([1, -1], 10) - noise.mean(axis=(1, 2)))[:, None, None]
            if common
            else 0
        )
        raw = np.clip(np.rint(125 + 25 * noise), 6, 244)
        years = list(range(2010, 2020))
        found = tracks.measure_error_correlation(on_years(raw, years), on_years(smoothed, years))
        d = np.array([0, 2, 4, 8, 50])
        planted = (1 - common) * np.exp(-(d**2) / (4 * SIGMA**2)) + common
        np.testing.assert_allclose(found.by_distance[d], planted, atol=0.1)
        assert found.common == pytest.approx(common, abs=0.1)


def test_years_that_are_not_known_leave_the_others_their_intervals() -> None:
    r, years = np.random.default_rng(5), list(range(2010, 2020))
    smoothed = np.full((10, 120, 120), 125)
    raw = np.clip(np.rint(115 + 25 * np.stack([blur(r, 120, SIGMA) for _ in years])), 6, 244)
    every = (
        np.add.outer(np.arange(120), np.arange(120)) % 10 == np.arange(10)[:, None, None]
    )  # each pixel in another year
    whole, gap, speckled = raw, raw.copy(), np.where(every, 255, raw)
    gap[4] = 255
    found = [
        tracks.measure_error_correlation(on_years(a, years), on_years(smoothed, years)).by_distance[
            1:9
        ]
        for a in (whole, gap, speckled)
    ]
    assert found[0][1] > 0.8
    np.testing.assert_allclose(found[1:], [found[0]] * 2, atol=0.05)
    # The yearly maps say a tenth of one half less than the smoothed, in all years that there are.
    sd = [
        tracks.estimate_areas(on_years(smoothed, years), on_years(a, years), grid(120, 120))[
            "sd_m2"
        ]
        for a in (whole, gap)
    ]
    assert sd[1].mean() == pytest.approx(sd[0].mean(), rel=0.05)


@pytest.mark.parametrize("side", [1, 2, 7, 40])
def test_sites_smaller_than_the_reach(side: int) -> None:
    r = np.random.default_rng(4)
    raw = on_years(r.integers(6, 245, (5, side, side)))
    found = tracks.measure_error_correlation(raw, on_years(np.full((5, side, side), 125)))
    assert found.by_distance[0] == 1
    assert np.isfinite(found.by_distance).all()
    assert np.isfinite(tracks.estimate_areas(raw, raw, grid(side, side), found).to_numpy()).all()


def test_what_lasts_widens_the_interval() -> None:
    smoothed = on_years(np.full((5, 30, 30), 250))
    raw = on_years(np.full((5, 30, 30), 225))  # always a tenth less: no year differs from another
    found = tracks.estimate_areas(smoothed, raw, grid(30, 30))
    whole = uncertainty.pixel_areas(grid(30, 30)).sum()
    np.testing.assert_allclose(found["sd_m2"], 0.1 * whole)
    assert (found["high_m2"] <= whole + 1e-6).all()
    unknown = raw.copy(
        data=np.where(np.arange(30) < 15, 255, 225).astype(np.uint8) * np.ones((5, 30, 1), np.uint8)
    )
    np.testing.assert_allclose(
        tracks.estimate_areas(smoothed, unknown, grid(30, 30))["sd_m2"], 0.05 * whole, rtol=1e-3
    )


def test_ground_never_known_has_no_area() -> None:
    stored = np.full((5, 10, 10), 250)
    stored[:, :, 5:] = 255
    found = tracks.estimate_areas(on_years(stored), on_years(stored), grid(10, 10))
    np.testing.assert_allclose(
        found["expected_m2"], uncertainty.pixel_areas(grid(10, 10))[:, :5].sum()
    )


def test_maps_of_other_grids_and_years_are_refused() -> None:
    maps = on_years(np.full((5, 10, 10), 9))
    with pytest.raises(LabelError, match="grid"):
        tracks.estimate_areas(maps, maps, grid(10, 11))
    with pytest.raises(LabelError, match="twin"):
        tracks.estimate_areas(
            maps, on_years(np.full((5, 10, 10), 9), [2015, *YEARS[1:]]), grid(10, 10)
        )
    with pytest.raises(LabelError, match="two years or more"):
        tracks.estimate_areas(maps[:1], maps[:1], grid(10, 10))


# A world with known truth


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "tracks.py"
    spec = importlib.util.spec_from_file_location("bench_tracks", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("lasting", "too_sure"), [(0.0, 1.0), (0.5, 3.0)])
def test_smoothing_gains_in_every_score_through_time(
    bench: ModuleType, lasting: float, too_sure: float
) -> None:
    raw = {seed: bench.maps_of(seed, lasting, too_sure) for seed in bench.SITES[:2]}
    rates = tracks.learn_rates(raw.values())
    before = bench.scores({s: tracks.threshold(p) for s, p in raw.items()})
    after = bench.scores({s: tracks.threshold(tracks.smooth(p, rates)) for s, p in raw.items()})
    assert after["ca_tiou"] > before["ca_tiou"] + 0.05
    assert after["bc"] > before["bc"] * 1.5
    assert after["flips"] < before["flips"] / 10
    # Not dividing out the prior the maps were made under costs more than any choice of rates.
    undivided = tracks.learn_rates(raw.values(), prior=0.5)
    worse = bench.scores({s: tracks.threshold(tracks.smooth(p, undivided)) for s, p in raw.items()})
    assert worse["ca_tiou"] < after["ca_tiou"] - 0.02


def test_the_textbooks_posterior_is_ours(bench: ModuleType) -> None:
    values = np.random.default_rng(5).integers(0, 251, (10, 3000), dtype=np.uint8)
    rates = tracks.Rates(opening=0.01, closing=0.02, initial=0.1, prior=0.1)
    off = np.abs(
        tracks.compute_posterior(values, bench.YEARS, rates).astype(int)
        - bench.plain(values, rates)
    )
    assert off.max() <= 1
    assert (off > 0).mean() < 1e-3  # ties of rounding only
