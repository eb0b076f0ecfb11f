"""Measure smoothing through time: speed, gain over yearly maps, coverage of area intervals.

    python benchmarks/tracks.py [--json FILE] [--quick] [--side 2100]

Speed is measured on ten years of a map with `--side` x `--side` pixels. The same posterior is
computed in two other ways. One is vectorised numpy over all pixels, in float64, with normalised
forward and backward probabilities. The other goes pixel by pixel, like libraries of hidden
Markov models. It is timed on 2,000 pixels and scaled up. Ratios are their time divided by ours:
above 1, minecube is faster.

Gain and coverage are measured on simulated maps with known truth. Mines grow, open and are
reclaimed through ten years. About 1 % of the pixels change from year to year.

A map's score is a sum: the truth blurred by 1.2 px, errors that are correlated over a few
pixels, white noise, and one error per year. A share of the correlated errors lasts through all
years. A logistic fit on other sites turns scores into probabilities that are right on average. A
factor on their logits then makes the probabilities overconfident, like those of networks.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox
from scipy import ndimage
from sklearn.linear_model import LogisticRegression

from minecube import metrics, tracks
from minecube.jobs.tables import format_table
from minecube.tracks import Rates

YEARS = tuple(range(2015, 2025))
SIDE = 256
"""Side of a simulated site in pixels."""
SITES = (1, 2, 3, 4)
"""Seeds of the measured sites."""
FITTED_SITES = (1001, 1002)
"""Seeds of the sites that probabilities and label rates are fitted on."""
SETTINGS = ((0.0, 1.0), (0.0, 3.0), (0.5, 1.0), (0.5, 1.5), (0.5, 3.0), (0.8, 1.5))
"""Share of errors that lasts through all years, factor of overconfidence."""
SHOWN = ("iou", "ca_tiou", "tiou_s", "tiou_c", "bc", "sc")
Maps = np.ndarray[Any, np.dtype[np.uint8]]


def main() -> None:
    """Measure speed, gain and coverage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures to this JSON file")
    parser.add_argument(
        "--quick", action="store_true", help="use two sites and two kinds of errors"
    )
    parser.add_argument(
        "--side", type=int, default=2100, help="side of the timed map in pixels (2100)"
    )
    options = parser.parse_args()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(machine, flush=True)
    settings = SETTINGS[::3] if options.quick else SETTINGS
    sites = SITES[:2] if options.quick else SITES
    figures = {
        "machine": machine,
        **measure_speed(options.side),
        "gain": measure_gain(settings, sites),
        "coverage": measure_coverage(settings, sites),
    }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


# Speed


def measure_speed(side: int, rounds: int = 3) -> dict[str, Any]:
    """Time each way of smoothing. Returns seconds and ratios."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 251, (len(YEARS), side * side), dtype=np.uint8)
    rates = Rates(opening=0.01, closing=0.02, initial=0.1, prior=0.1)
    sample = values[:, :2000]
    minecube_s = time_call(lambda: tracks.compute_posterior(values, YEARS, rates), rounds)
    figures = {"side": side, "seconds": minecube_s}
    figures["seconds_numpy"] = time_call(lambda: plain(values, rates), 1)
    figures["seconds_per_pixel"] = (
        time_call(lambda: [compute_one_pixel(sample[:, n], rates) for n in range(2000)], 1)
        * side
        * side
        / 2000
    )
    figures["vs_numpy"] = figures["seconds_numpy"] / minecube_s
    figures["vs_per_pixel"] = figures["seconds_per_pixel"] / minecube_s
    difference = np.abs(
        tracks.compute_posterior(sample, YEARS, rates).astype(int) - plain(sample, rates)
    )
    figures["steps_off"] = int(difference.max())
    figures["values_off"] = float((difference > 0).mean())
    rows = [
        ("minecube", minecube_s),
        ("numpy", figures["seconds_numpy"]),
        ("pixel by pixel", figures["seconds_per_pixel"]),
    ]
    print(format_table(("smoothing", "seconds"), rows), flush=True)
    return figures


def time_call(run: Callable[[], Any], rounds: int) -> float:
    """Run a function several times. Returns the median seconds."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def plain(values: Maps, rates: Rates) -> Maps:
    """Compute the posterior by the textbook's forward-backward algorithm.

    Works in float64, on all pixels at once, with one array per state, which suits numpy best.
    """
    transition = [[1 - rates.opening, rates.opening], [rates.closing, 1 - rates.closing]]
    probability = np.clip(values / 250, 0.002, 0.998)
    likelihood = [
        ((1 - probability) / (1 - rates.prior)) ** rates.temper,
        (probability / rates.prior) ** rates.temper,
    ]
    forward = [np.empty_like(probability), np.empty_like(probability)]
    for t in range(len(values)):
        if t:
            predicted = [
                forward[0][t - 1] * transition[0][s] + forward[1][t - 1] * transition[1][s]
                for s in (0, 1)
            ]
        else:
            predicted = [1 - rates.initial, rates.initial]
        other, mine = (predicted[s] * likelihood[s][t] for s in (0, 1))
        forward[0][t] = other / (other + mine)
        forward[1][t] = mine / (other + mine)
    backward = [np.ones(values.shape[1]), np.ones(values.shape[1])]
    posterior = np.empty_like(values)
    for t in range(len(values) - 1, -1, -1):
        other, mine = (forward[s][t] * backward[s] for s in (0, 1))
        posterior[t] = np.rint(250 * mine / (other + mine))
        evidence = [likelihood[s][t] * backward[s] for s in (0, 1)]
        backward = [transition[s][0] * evidence[0] + transition[s][1] * evidence[1] for s in (0, 1)]
        total = backward[0] + backward[1]
        backward = [backward[0] / total, backward[1] / total]
    return posterior


def compute_one_pixel(values: Maps, rates: Rates) -> Maps:
    """Compute the posterior of one pixel."""
    return plain(values[:, None], rates)[:, 0]


# A world with known truth


def draw_field(rng: np.random.Generator, side: int, sigma: float) -> np.ndarray:
    """Draw a random field of deviation 1 that is correlated over about `sigma` pixels."""
    pixels: np.ndarray = ndimage.gaussian_filter(
        rng.standard_normal((side, side)), sigma, mode="wrap"
    )
    return pixels / pixels.std()


@functools.cache
def draw_truth(seed: int, side: int = SIDE) -> Maps:
    """Draw four mines through ten years, uint8 (year, y, x).

    Mines are there from the start or open later. Some are reclaimed from one side.
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    mine = np.zeros((len(YEARS), side, side), bool)
    for _ in range(4):
        center_y, center_x = rng.uniform(0.15, 0.85, 2) * side
        distance = np.hypot(y - center_y, x - center_x) + 6 * draw_field(rng, side, 6)
        opening = rng.choice([-5, -5, 2, 5])
        radius = rng.uniform(10, 30)
        growth = rng.uniform(0, 2.5)
        closing = rng.choice([3, 6, 99])
        direction = rng.uniform(0, 2 * np.pi)
        reclaimed_distance = np.hypot(
            y - center_y - radius * np.sin(direction), x - center_x - radius * np.cos(direction)
        ) + 4 * draw_field(rng, side, 5)
        for t in range(max(opening, 0), len(YEARS)):
            pit = distance < (radius if opening < 0 else 8) + growth * (t - max(opening, 0))
            mine[t] |= pit
            if t >= closing:
                mine[t] &= ~(
                    (reclaimed_distance < 6 + 4 * (t - closing)) & (distance < radius + growth * 10)
                )
    return mine.astype(np.uint8)


def draw_scores(seed: int, lasting: float) -> np.ndarray:
    """Draw a network's unscaled scores of a site, float (year, y, x)."""
    truth = draw_truth(seed)
    rng = np.random.default_rng(seed + 10**6)
    side = truth.shape[1]
    lasting_error = draw_field(rng, side, 2.5)
    scores = []
    for mine in truth:
        signal = 2 * ndimage.gaussian_filter(2.0 * mine - 1, 1.2)
        yearly_error = 0.8 * draw_field(rng, side, 2.5) + 0.6 * rng.standard_normal((side, side))
        scores.append(
            signal
            + np.sqrt(lasting) * lasting_error
            + np.sqrt(1 - lasting) * yearly_error
            + 0.3 * rng.standard_normal()
        )
    return np.stack(scores)


@functools.cache
def _fit_logistic(lasting: float) -> tuple[float, float]:
    scores = np.concatenate([draw_scores(seed, lasting).ravel()[::7] for seed in FITTED_SITES])
    truth = np.concatenate([draw_truth(seed).ravel()[::7] for seed in FITTED_SITES])
    fit = LogisticRegression().fit(scores[:, None], truth)
    return float(fit.coef_[0, 0]), float(fit.intercept_[0])


def maps_of(seed: int, lasting: float, too_sure: float) -> xr.DataArray:
    """Draw the stored probability of a site, uint8 (year, y, x)."""
    slope, intercept = _fit_logistic(lasting)
    logit = too_sure * (slope * draw_scores(seed, lasting) + intercept)
    return add_years(np.rint(250 / (1 + np.exp(-logit))).astype(np.uint8))


def add_years(values: Maps) -> xr.DataArray:
    """Add dimensions and years."""
    return xr.DataArray(values, dims=("year", "y", "x"), coords={"year": list(YEARS)})


# Gain


def scores(footprints: dict[int, xr.DataArray]) -> dict[str, float]:
    """Score all sites together.

    `flips` is the percentage of yearly steps that undo an earlier one.
    """
    counts = sum(
        (metrics.count(f.to_numpy(), draw_truth(s), YEARS) for s, f in footprints.items()),
        metrics.Counts(),
    )
    all_scores = metrics.finish(counts)
    flips = statistics.mean(tracks.compute_flip_rate(f) for f in footprints.values())
    return {name: round(all_scores[name], 4) for name in SHOWN} | {"flips": round(100 * flips, 3)}


def measure_gain(
    settings: tuple[tuple[float, float], ...], sites: tuple[int, ...]
) -> list[dict[str, Any]]:
    """Score raw and smoothed maps for each kind of errors.

    Rates are learned from the maps, unless the way names other rates.
    """
    rows = []
    for lasting, too_sure in settings:
        raw = {seed: maps_of(seed, lasting, too_sure) for seed in sites}
        setting = {"lasting": lasting, "too_sure": too_sure}
        rows.append(
            {**setting, "way": "raw", **scores({s: tracks.threshold(p) for s, p in raw.items()})}
        )
        label_rates = tracks.learn_rates_from_labels(
            add_years(draw_truth(seed)) for seed in FITTED_SITES
        )
        learned_rates = tracks.learn_rates(raw.values())
        ways = {
            "smoothed": learned_rates,
            "rates of labels": label_rates,
            "rates 0.01": dataclasses.replace(learned_rates, opening=0.01, closing=0.01),
            "prior not divided out": tracks.learn_rates(raw.values(), prior=0.5),
            **{
                f"temper {temper}": tracks.learn_rates(raw.values(), temper=temper)
                for temper in (0.35, 0.5, 1.0)
            },
        }
        for way, rates in ways.items():
            smoothed = {s: tracks.threshold(tracks.smooth(p, rates)) for s, p in raw.items()}
            rows.append({**setting, "way": way, **scores(smoothed)})
    print("\n" + format_table(tuple(rows[0]), [tuple(row.values()) for row in rows]), flush=True)
    return rows


# Coverage


def measure_coverage(
    settings: tuple[tuple[float, float], ...], sites: tuple[int, ...]
) -> list[dict[str, Any]]:
    """Measure how often true areas lie within their 95 % intervals.

    Also returns the mean width of the intervals and the mean error, relative to the true area.
    """
    grid = GeoBox((SIDE, SIDE), Affine(10, 0, 500_020, 0, -10, 5_600_040), "EPSG:32633")
    rows = []
    for lasting, too_sure in settings:
        raw = {seed: maps_of(seed, lasting, too_sure) for seed in sites}
        rates = tracks.learn_rates(raw.values())
        values_by_name: dict[str, list[float]] = {
            "within": [],
            "within_unshifted": [],
            "within_alone": [],
            "width": [],
            "off": [],
        }
        for seed, probability in raw.items():
            smoothed = tracks.smooth(probability, rates)
            true = tracks.compute_areas(add_years(draw_truth(seed)), grid)["area_m2"]
            # `within_unshifted` has no shift, as if there were no yearly maps to compare with.
            for name, yearly, correlation in (
                ("within", probability, None),
                ("within_alone", smoothed, tracks.UNCORRELATED),
                (
                    "within_unshifted",
                    smoothed,
                    tracks.measure_error_correlation(probability, smoothed),
                ),
            ):
                areas = tracks.estimate_areas(smoothed, yearly, grid, correlation)
                values_by_name[name] += (
                    ((areas["low_m2"] <= true) & (true <= areas["high_m2"])).astype(float).tolist()
                )
                if name == "within":
                    values_by_name["width"] += (
                        (areas["high_m2"] - areas["low_m2"]) / true
                    ).tolist()
                    values_by_name["off"] += (areas["expected_m2"] / true - 1).abs().tolist()
        rows.append(
            {
                "lasting": lasting,
                "too_sure": too_sure,
                **{k: round(statistics.mean(v), 4) for k, v in values_by_name.items()},
            }
        )
    print("\n" + format_table(tuple(rows[0]), [tuple(row.values()) for row in rows]), flush=True)
    return rows


if __name__ == "__main__":
    main()
