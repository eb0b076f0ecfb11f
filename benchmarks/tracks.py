"""Smoothing through time: how fast it is, what it gains over yearly maps, and how often areas lie in their intervals.

    python benchmarks/tracks.py [--json FILE] [--quick] [--side 2100]

Speed is of ten years of `--side` pixels squared, against the same posterior as one would write it: vectorised in numpy over all
pixels, in float64 with normalised forward and backward probabilities; and pixel by pixel, as libraries of hidden Markov models
work, timed on 2,000 pixels and multiplied up. Ratios are theirs divided by ours: above 1 is faster.

Gain and coverage are of simulated maps with known truth. Mines grow, open and are reclaimed through ten years; from year to
year 1 % of pixels change. A map's score is the truth blurred by 1.2 px, plus errors alike over a few pixels, of which a share
lasts through all years, plus white noise and an error of the whole year. Scores become probabilities by a logistic fit on other
sites (so at first they are right on average), and are then made too sure by a factor on their logits, as networks are.
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
SIDE, SITES, OTHERS = 256, (1, 2, 3, 4), (1001, 1002)
SETTINGS = ((0.0, 1.0), (0.0, 3.0), (0.5, 1.0), (0.5, 1.5), (0.5, 3.0), (0.8, 1.5))
"""Share of errors that lasts, and by how much too sure."""
SHOWN = ("iou", "ca_tiou", "tiou_s", "tiou_c", "bc", "sc")
Maps = np.ndarray[Any, np.dtype[np.uint8]]


def main() -> None:
    """All three parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="two sites and two kinds of errors")
    parser.add_argument(
        "--side", type=int, default=2100, help="of the map whose smoothing is timed"
    )
    asked = parser.parse_args()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(machine, flush=True)
    settings, sites = (SETTINGS[::3], SITES[:2]) if asked.quick else (SETTINGS, SITES)
    figures = {
        "machine": machine,
        **speed(asked.side),
        "gain": gain(settings, sites),
        "coverage": coverage(settings, sites),
    }
    if asked.json:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        asked.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


# Speed


def speed(side: int, rounds: int = 3) -> dict[str, Any]:
    """Seconds of each way, and ratios."""
    r = np.random.default_rng(0)
    values = r.integers(0, 251, (len(YEARS), side * side), dtype=np.uint8)
    rates = Rates(opening=0.01, closing=0.02, initial=0.1, prior=0.1)
    some = values[:, :2000]
    ours = timed(lambda: tracks.compute_posterior(values, YEARS, rates), rounds)
    figures = {"side": side, "seconds": ours}
    figures["seconds_numpy"] = timed(lambda: plain(values, rates), 1)
    figures["seconds_per_pixel"] = (
        timed(lambda: [one(some[:, n], rates) for n in range(2000)], 1) * side * side / 2000
    )
    figures["vs_numpy"], figures["vs_per_pixel"] = (
        figures["seconds_numpy"] / ours,
        figures["seconds_per_pixel"] / ours,
    )
    off = np.abs(tracks.compute_posterior(some, YEARS, rates).astype(int) - plain(some, rates))
    figures["steps_off"] = int(off.max())
    figures["values_off"] = float((off > 0).mean())
    rows = [("ours", ours), ("numpy", figures["seconds_numpy"])]
    print(
        format_table(
            ("smoothing", "seconds"), [*rows, ("pixel by pixel", figures["seconds_per_pixel"])]
        ),
        flush=True,
    )
    return figures


def timed(run: Callable[[], Any], rounds: int) -> float:
    """Median seconds."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def plain(values: Maps, rates: Rates) -> Maps:
    """Forward-backward as textbooks have it, in float64, all pixels at once; an array a state, which numpy likes best."""
    a = [[1 - rates.opening, rates.opening], [rates.closing, 1 - rates.closing]]
    p = np.clip(values / 250, 0.002, 0.998)
    seen = [((1 - p) / (1 - rates.prior)) ** rates.temper, (p / rates.prior) ** rates.temper]
    forward = [np.empty_like(p), np.empty_like(p)]
    for t in range(len(values)):
        if t:
            ahead = [forward[0][t - 1] * a[0][s] + forward[1][t - 1] * a[1][s] for s in (0, 1)]
        else:
            ahead = [1 - rates.initial, rates.initial]
        none, mine = (ahead[s] * seen[s][t] for s in (0, 1))
        forward[0][t], forward[1][t] = none / (none + mine), mine / (none + mine)
    backward = [np.ones(values.shape[1]), np.ones(values.shape[1])]
    out = np.empty_like(values)
    for t in range(len(values) - 1, -1, -1):
        none, mine = (forward[s][t] * backward[s] for s in (0, 1))
        out[t] = np.rint(250 * mine / (none + mine))
        told = [seen[s][t] * backward[s] for s in (0, 1)]
        backward = [a[s][0] * told[0] + a[s][1] * told[1] for s in (0, 1)]
        total = backward[0] + backward[1]
        backward = [backward[0] / total, backward[1] / total]
    return out


def one(values: Maps, rates: Rates) -> Maps:
    """The same of one pixel."""
    return plain(values[:, None], rates)[:, 0]


# A world with known truth


def field(r: np.random.Generator, side: int, sigma: float) -> np.ndarray:
    """A random field of deviation 1, alike over about `sigma` pixels."""
    made: np.ndarray = ndimage.gaussian_filter(r.standard_normal((side, side)), sigma, mode="wrap")
    return made / made.std()


@functools.cache
def truth_of(seed: int, side: int = SIDE) -> Maps:
    """Four mines through ten years, uint8 (year, y, x): some there at first, some opening, some reclaimed from one side."""
    r = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    mine = np.zeros((len(YEARS), side, side), bool)
    for _ in range(4):
        cy, cx = r.uniform(0.15, 0.85, 2) * side
        shape = np.hypot(y - cy, x - cx) + 6 * field(r, side, 6)
        opens, start, growth = r.choice([-5, -5, 2, 5]), r.uniform(10, 30), r.uniform(0, 2.5)
        closes, away = r.choice([3, 6, 99]), r.uniform(0, 2 * np.pi)
        back = np.hypot(y - cy - start * np.sin(away), x - cx - start * np.cos(away)) + 4 * field(
            r, side, 5
        )
        for t in range(max(opens, 0), len(YEARS)):
            own = shape < (start if opens < 0 else 8) + growth * (t - max(opens, 0))
            green = (
                (back < 6 + 4 * (t - closes)) & (shape < start + growth * 10)
                if t >= closes
                else False
            )
            mine[t] = (mine[t] | own) & ~np.asarray(green)
    return mine.astype(np.uint8)


def score_of(seed: int, lasting: float) -> np.ndarray:
    """What a network makes of a site, float (year, y, x), on no scale."""
    truth, r = truth_of(seed), np.random.default_rng(seed + 10**6)
    side = truth.shape[1]
    always = field(r, side, 2.5)
    scores = []
    for mine in truth:
        soft = 2 * ndimage.gaussian_filter(2.0 * mine - 1, 1.2)
        own = 0.8 * field(r, side, 2.5) + 0.6 * r.standard_normal((side, side))
        scores.append(
            soft
            + np.sqrt(lasting) * always
            + np.sqrt(1 - lasting) * own
            + 0.3 * r.standard_normal()
        )
    return np.stack(scores)


@functools.cache
def _fit(lasting: float) -> tuple[float, float]:
    scores = np.concatenate([score_of(seed, lasting).ravel()[::7] for seed in OTHERS])
    truth = np.concatenate([truth_of(seed).ravel()[::7] for seed in OTHERS])
    fit = LogisticRegression().fit(scores[:, None], truth)
    return float(fit.coef_[0, 0]), float(fit.intercept_[0])


def maps_of(seed: int, lasting: float, too_sure: float) -> xr.DataArray:
    """Stored probability (year, y, x) of a site."""
    slope, intercept = _fit(lasting)
    logit = too_sure * (slope * score_of(seed, lasting) + intercept)
    return on_years(np.rint(250 / (1 + np.exp(-logit))).astype(np.uint8))


def on_years(values: Maps) -> xr.DataArray:
    """With dimensions and years."""
    return xr.DataArray(values, dims=("year", "y", "x"), coords={"year": list(YEARS)})


# Gain


def scores(footprints: dict[int, xr.DataArray]) -> dict[str, float]:
    """Scores of all sites together, and flips: per cent of steps that go back on an earlier one."""
    counted = sum(
        (metrics.count(f.to_numpy(), truth_of(s), YEARS) for s, f in footprints.items()),
        metrics.Counts(),
    )
    found = metrics.finish(counted)
    flips = statistics.mean(tracks.compute_flip_rate(f) for f in footprints.values())
    return {name: round(found[name], 4) for name in SHOWN} | {"flips": round(100 * flips, 3)}


def gain(settings: tuple[tuple[float, float], ...], sites: tuple[int, ...]) -> list[dict[str, Any]]:
    """Raw maps against smoothed, by kind of errors; rates learned from the maps unless it says otherwise."""
    rows = []
    for lasting, too_sure in settings:
        raw = {seed: maps_of(seed, lasting, too_sure) for seed in sites}
        said = {"lasting": lasting, "too_sure": too_sure}
        rows.append(
            {**said, "way": "raw", **scores({s: tracks.threshold(p) for s, p in raw.items()})}
        )
        labelled = tracks.learn_rates_from_labels(on_years(truth_of(seed)) for seed in OTHERS)
        learned = tracks.learn_rates(raw.values())
        ways = {
            "smoothed": learned,
            "rates of labels": labelled,
            "rates 0.01": dataclasses.replace(learned, opening=0.01, closing=0.01),
            "prior not divided out": tracks.learn_rates(raw.values(), prior=0.5),
            **{
                f"temper {temper}": tracks.learn_rates(raw.values(), temper=temper)
                for temper in (0.35, 0.5, 1.0)
            },
        }
        for way, rates in ways.items():
            smoothed = {s: tracks.threshold(tracks.smooth(p, rates)) for s, p in raw.items()}
            rows.append({**said, "way": way, **scores(smoothed)})
    print("\n" + format_table(tuple(rows[0]), [tuple(row.values()) for row in rows]), flush=True)
    return rows


# Coverage


def coverage(
    settings: tuple[tuple[float, float], ...], sites: tuple[int, ...]
) -> list[dict[str, Any]]:
    """How many of all sites' years have their true area within 95 % intervals, and how wide these are."""
    grid = GeoBox((SIDE, SIDE), Affine(10, 0, 500_020, 0, -10, 5_600_040), "EPSG:32633")
    rows = []
    for lasting, too_sure in settings:
        raw = {seed: maps_of(seed, lasting, too_sure) for seed in sites}
        rates = tracks.learn_rates(raw.values())
        held: dict[str, list[float]] = {
            "within": [],
            "within_unshifted": [],
            "within_alone": [],
            "width": [],
            "off": [],
        }
        for seed, probability in raw.items():
            smoothed = tracks.smooth(probability, rates)
            true = tracks.compute_areas(on_years(truth_of(seed)), grid)["area_m2"]
            # The third: no shift, as were there no yearly maps to hold the smoothed ones against.
            for name, yearly, correlation in (
                ("within", probability, None),
                ("within_alone", smoothed, tracks.UNCORRELATED),
                (
                    "within_unshifted",
                    smoothed,
                    tracks.measure_error_correlation(probability, smoothed),
                ),
            ):
                found = tracks.estimate_areas(smoothed, yearly, grid, correlation)
                held[name] += (
                    ((found["low_m2"] <= true) & (true <= found["high_m2"])).astype(float).tolist()
                )
                if name == "within":
                    held["width"] += ((found["high_m2"] - found["low_m2"]) / true).tolist()
                    held["off"] += (found["expected_m2"] / true - 1).abs().tolist()
        rows.append(
            {
                "lasting": lasting,
                "too_sure": too_sure,
                **{k: round(statistics.mean(v), 4) for k, v in held.items()},
            }
        )
    print("\n" + format_table(tuple(rows[0]), [tuple(row.values()) for row in rows]), flush=True)
    return rows


if __name__ == "__main__":
    main()
