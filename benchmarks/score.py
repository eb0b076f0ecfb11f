"""Compare the speed of scoring with one byte-wise pass over the same pixels, and torchmetrics.

    python benchmarks/score.py [--json FILE] [--sites 133] [--rounds 3] [--threads N]

The data are 10 years x 133 sites of 900 x 900 px: prediction and truth, uint8, in memory. All
contenders use the same number of threads, one site per task.

- `metrics.count` scores each site: footprints, boundaries within 3 px, tubes, steps, windows,
  and change between all 45 pairs of years.
- The pass is `np.bitwise_xor(prediction, truth)` into a 256 KiB buffer that stays in the cache.
  It is numpy's fastest pass over two arrays. `bandwidth_fraction` is its time divided by the
  time of scoring. `counting_fraction` is the same for the cheapest pass with a result: counting
  the pixels that differ.
- torchmetrics computes one BinaryConfusionMatrix per year and one per pair of years. It has no
  boundaries, strata or directions of change. It runs on a few sites, with one torch thread per
  site and `validate_args` off, and its time is scaled to all sites. `vs_torchmetrics` is its
  time divided by the time of scoring. The benchmark stops if its matrices differ from ours.

There are two kinds of pixels. Realistic sites have pits that grow in smooth terrain to 4-20 % of
the site. Their maps have outlines that are wrong by a pixel or two, differently each year. About
14 % of the pixels are a mine in some year (8-24 % by site). Noise sites are random in each pixel
and year: the worst case, because no pixel can be skipped. Fractions without a prefix are for
realistic sites.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter

from minecube import metrics
from minecube.jobs.tables import format_table

YEARS = tuple(range(2015, 2025))
SIDE = 900
"""Side of a site in pixels."""
BUFFER = 1 << 18
"""Bytes per step of a pass."""
DISTINCT = 12
"""Different sites. Further sites are shifted copies."""
WITH_TORCH = 4
"""Sites that torchmetrics scores, or one per thread."""
Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Site = tuple[Pixels, Pixels]


def main() -> None:
    """Measure both kinds of pixels, print a table and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--sites", type=int, default=133, help="number of sites (133)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds per contender (3)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads (all cores)")
    options = parser.parse_args()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"{machine}; {options.threads} threads, load {os.getloadavg()[0]:.1f}", flush=True)
    figures: dict[str, Any] = {
        "machine": machine,
        "threads": options.threads,
        "sites": options.sites,
    }
    for kind, draw_site in (("realistic", draw_realistic_site), ("noise", draw_noise_site)):
        drawn = [draw_site(seed) for seed in range(DISTINCT)]
        # Copies are shifted and lie elsewhere in memory, so that caches do not help.
        sites = [
            tuple(np.roll(a, 7 * n, axis=1) for a in drawn[n % DISTINCT])
            for n in range(options.sites)
        ]
        measured = measure_contenders(sites, options.rounds, options.threads)  # type: ignore[arg-type]
        figures |= {
            f"{kind}_{name}" if kind == "noise" else name: value for name, value in measured.items()
        }
        del sites
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def draw_realistic_site(seed: int) -> Site:
    """Draw prediction and truth of a growing pit."""
    rng = np.random.default_rng(seed)

    def draw_field(sigma: float) -> Any:
        pixels = gaussian_filter(rng.standard_normal((SIDE, SIDE), dtype=np.float32), sigma)
        return pixels / pixels.std()

    y, x = np.mgrid[:SIDE, :SIDE] / SIDE - 0.5
    center_y, center_x = rng.uniform(-0.2, 0.2, 2)
    ground = (
        -8 * np.hypot(y - center_y, (x - center_x) * rng.uniform(0.7, 1.4))
        + 0.8 * draw_field(25)
        + 0.15 * draw_field(6)
    )
    outline = np.quantile(ground, 1 - rng.uniform(0.04, 0.2))
    bias = 0.08 * draw_field(10)
    levels = outline + 0.05 * (len(YEARS) / 2 - np.arange(len(YEARS)))
    truth = np.stack([ground > level for level in levels])
    pred = np.stack([ground + bias + 0.06 * draw_field(4) > level for level in levels])
    return pred.astype(np.uint8), truth.astype(np.uint8)


def draw_noise_site(seed: int) -> Site:
    """Draw prediction and truth at random."""
    rng = np.random.default_rng(seed)
    pred, truth = (rng.integers(0, 2, (len(YEARS), SIDE, SIDE), dtype=np.uint8) for _ in range(2))
    return pred, truth


def score_site(site: Site) -> metrics.Counts:
    """Score a site."""
    return metrics.count(*site, YEARS)


def xor_site(site: Site) -> None:
    """Pass over both arrays without a result."""
    pred, truth = (a.reshape(-1) for a in site)
    buffer = np.empty(BUFFER, np.uint8)
    for start in range(0, len(pred), BUFFER):
        part = pred[start : start + BUFFER]
        np.bitwise_xor(part, truth[start : start + BUFFER], out=buffer[: len(part)])


def count_differing(site: Site) -> int:
    """Pass over both arrays and count the pixels that differ."""
    pred, truth = (a.reshape(-1) for a in site)
    buffer = np.empty(BUFFER, np.bool_)
    count = 0
    for start in range(0, len(pred), BUFFER):
        part = pred[start : start + BUFFER]
        count += np.count_nonzero(
            np.not_equal(part, truth[start : start + BUFFER], out=buffer[: len(part)])
        )
    return count


@functools.cache
def declare_torchvision() -> Any:
    """Declare the operators that torchvision needs at import.

    torchvision from PyPI is built for CUDA and does not import without them. The cache keeps the
    library alive, and with it the operators.
    """
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def run_torchmetrics(site: Site) -> Any:
    """Compute confusion matrices of all years and pairs of years."""
    import torch
    import torchmetrics.classification as tm

    pred, truth = (torch.from_numpy(a) for a in site)
    matrices = {}
    for i in range(len(YEARS)):
        matrices["year", i] = tm.BinaryConfusionMatrix(validate_args=False)
        matrices["year", i].update(pred[i], truth[i])
    for i, j in combinations(range(len(YEARS)), 2):
        matrices["pair", (i, j)] = tm.BinaryConfusionMatrix(validate_args=False)
        matrices["pair", (i, j)].update(pred[i] ^ pred[j], truth[i] ^ truth[j])
    return {name: matrix.compute().numpy() for name, matrix in matrices.items()}


def assert_equal_counts(scores: metrics.Counts, matrices: Any) -> None:
    """Assert that torchmetrics' matrices equal our counts."""
    for i, (year, n) in enumerate(scores.years.items()):
        assert matrices["year", i].tolist() == [[n.tn, n.fp], [n.fn, n.tp]], year
    for pair, (years, n) in zip(
        combinations(range(len(YEARS)), 2), scores.pairs.items(), strict=True
    ):
        tp = n.new_new + n.new_gone + n.gone_new + n.gone_gone
        fn = n.new_same + n.gone_same
        fp = n.same_new + n.same_gone
        assert matrices["pair", pair].tolist() == [[n.same_same, fp], [fn, tp]], years


def measure_contenders(sites: Sequence[Site], rounds: int, threads: int) -> dict[str, Any]:
    """Run all contenders in turn and print their medians."""
    import torch

    seconds: dict[str, list[float]] = {}
    ways: dict[str, Callable[[Site], Any]] = {
        "xor": xor_site,
        "differing": count_differing,
        "score": score_site,
    }
    with ThreadPoolExecutor(threads) as pool:
        for way in ways.values():
            list(pool.map(way, sites[: 2 * threads]))  # warm-up, not timed
        for _ in range(rounds):
            for name, way in ways.items():
                start = time.perf_counter()
                list(pool.map(way, sites))
                seconds.setdefault(name, []).append(time.perf_counter() - start)
    torch_sites = sites[: max(WITH_TORCH, threads)]
    if torch.version.cuda is None:
        declare_torchvision()
    torch.set_num_threads(1)  # one site per thread, like ours
    with ThreadPoolExecutor(threads) as pool:
        run_torchmetrics(torch_sites[0])
        start = time.perf_counter()
        matrices = list(pool.map(run_torchmetrics, torch_sites))
        seconds["torchmetrics"] = [(time.perf_counter() - start) * len(sites) / len(torch_sites)]
    assert_equal_counts(
        sum((score_site(site) for site in torch_sites), metrics.Counts()),
        {n: sum(m[n] for m in matrices) for n in matrices[0]},
    )
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    size = sum(a.nbytes for site in sites for a in site)
    names = {
        "xor": "byte-wise pass, xor",
        "differing": "byte-wise pass, counting",
        "score": "metrics.count",
        "torchmetrics": f"torchmetrics, scaled from {len(torch_sites)} sites",
    }
    rows = [
        (names[n], s, size / s / 1e9, s / (size / 2) * 1e9, medians["xor"] / s)
        for n, s in medians.items()
    ]
    print(
        format_table(("contender", "s", "GB/s", "ns per pixel-year", "xor time / this"), rows),
        flush=True,
    )
    return {
        "bandwidth_fraction": medians["xor"] / medians["score"],
        "counting_fraction": medians["differing"] / medians["score"],
        "vs_torchmetrics": medians["torchmetrics"] / medians["score"],
        "seconds": medians,
        "rounds": seconds,
        "gigabytes": size / 1e9,
    }


if __name__ == "__main__":
    main()
