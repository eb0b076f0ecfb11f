"""Scoring 10 years x 133 sites of 900 x 900 px, against one byte-wise pass over the same pixels, and against torchmetrics.

    python benchmarks/score.py [--json FILE] [--sites 133] [--rounds 3] [--threads N]

All three work on the same arrays, uint8 prediction and truth in memory, with the same number of threads, one site a task.
- Scored is what `metrics.count` counts: footprints, boundaries within 3 px, tubes, steps, windows, change of all 45 pairs of
  years, site by site.
- The pass is `np.bitwise_xor(prediction, truth)` into a buffer of 256 KiB that stays in the cache: both arrays are read once
  and nothing else goes to or from memory. That is the fastest pass over two arrays that numpy has. `bandwidth_fraction` is its
  time over that of scoring. Beside it stands the cheapest pass with a result, the count of pixels that differ
  (`count_nonzero(prediction != truth)`, buffered likewise): `counting_fraction`.
- torchmetrics: a BinaryConfusionMatrix for each year, and one for the change of each of the 45 pairs (xor of the two years, in
  torch, on uint8), on a few of the sites, one torch thread a site; its time is scaled to all. It has neither boundaries nor
  strata nor directions of change. `validate_args` is off, which is faster. `vs_torchmetrics` is its time over that of scoring.
  Its confusion matrices must be equal to ours, or the benchmark stops.

Pixels are of two kinds: `realistic`, pits that grow in smooth terrain, of 4 to 20 % of the site, and maps whose outlines are
off by a pixel or two, otherwise each year (14 % of the pixels, 8 to 24 by site, are a mine in some year, in truth or map, and
half of those not in all years of both); and `noise`, where each pixel of each year is a mine or not by chance: the worst
case, in which nothing can be left out. Fractions without a prefix are of the realistic ones.
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
SIDE, BUFFER, DISTINCT, WITH_TORCH = 900, 1 << 18, 12, 4
Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Site = tuple[Pixels, Pixels]


def main() -> None:
    """Measure, print and, if asked, write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--sites", type=int, default=133)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    asked = parser.parse_args()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"{machine}; {asked.threads} threads, load {os.getloadavg()[0]:.1f}", flush=True)
    figures: dict[str, Any] = {"machine": machine, "threads": asked.threads, "sites": asked.sites}
    for kind, make in (("realistic", realistic), ("noise", noise)):
        made = [make(seed) for seed in range(DISTINCT)]
        # Other places in memory, other rows: nothing is found in a cache that would not be there of different sites.
        sites = [
            tuple(np.roll(a, 7 * n, axis=1) for a in made[n % DISTINCT]) for n in range(asked.sites)
        ]
        found = compared(sites, asked.rounds, asked.threads)  # type: ignore[arg-type]
        figures |= {
            f"{kind}_{name}" if kind == "noise" else name: value for name, value in found.items()
        }
        del sites
    if asked.json:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        asked.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def realistic(seed: int) -> Site:
    """Prediction and truth of a pit that grows."""
    rng = np.random.default_rng(seed)

    def field(smooth: float) -> Any:
        found = gaussian_filter(rng.standard_normal((SIDE, SIDE), dtype=np.float32), smooth)
        return found / found.std()

    y, x = np.mgrid[:SIDE, :SIDE] / SIDE - 0.5
    at_y, at_x = rng.uniform(-0.2, 0.2, 2)
    ground = (
        -8 * np.hypot(y - at_y, (x - at_x) * rng.uniform(0.7, 1.4))
        + 0.8 * field(25)
        + 0.15 * field(6)
    )
    outline, bias = np.quantile(ground, 1 - rng.uniform(0.04, 0.2)), 0.08 * field(10)
    levels = outline + 0.05 * (len(YEARS) / 2 - np.arange(len(YEARS)))
    truth = np.stack([ground > level for level in levels])
    pred = np.stack([ground + bias + 0.06 * field(4) > level for level in levels])
    return pred.astype(np.uint8), truth.astype(np.uint8)


def noise(seed: int) -> Site:
    """Chance alone."""
    rng = np.random.default_rng(seed)
    pred, truth = (rng.integers(0, 2, (len(YEARS), SIDE, SIDE), dtype=np.uint8) for _ in range(2))
    return pred, truth


def score(site: Site) -> metrics.Counts:
    """Ours."""
    return metrics.count(*site, YEARS)


def xor(site: Site) -> None:
    """The byte-wise pass."""
    pred, truth = (a.reshape(-1) for a in site)
    buffer = np.empty(BUFFER, np.uint8)
    for at in range(0, len(pred), BUFFER):
        part = pred[at : at + BUFFER]
        np.bitwise_xor(part, truth[at : at + BUFFER], out=buffer[: len(part)])


def differing(site: Site) -> int:
    """The byte-wise pass that counts."""
    pred, truth = (a.reshape(-1) for a in site)
    buffer, found = np.empty(BUFFER, np.bool_), 0
    for at in range(0, len(pred), BUFFER):
        part = pred[at : at + BUFFER]
        found += np.count_nonzero(
            np.not_equal(part, truth[at : at + BUFFER], out=buffer[: len(part)])
        )
    return found


@functools.cache
def declare_torchvision() -> Any:
    """torchvision from PyPI is built for CUDA, and fails to import without these; kept, for they go with the library."""
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def with_torchmetrics(site: Site) -> Any:
    """Confusion matrices of years and of pairs."""
    import torch
    import torchmetrics.classification as tm

    pred, truth = (torch.from_numpy(a) for a in site)
    found = {}
    for i in range(len(YEARS)):
        found["year", i] = tm.BinaryConfusionMatrix(validate_args=False)
        found["year", i].update(pred[i], truth[i])
    for i, j in combinations(range(len(YEARS)), 2):
        found["pair", (i, j)] = tm.BinaryConfusionMatrix(validate_args=False)
        found["pair", (i, j)].update(pred[i] ^ pred[j], truth[i] ^ truth[j])
    return {name: matrix.compute().numpy() for name, matrix in found.items()}


def check(scores: metrics.Counts, matrices: Any) -> None:
    """That both counted the same."""
    for i, (year, n) in enumerate(scores.years.items()):
        assert matrices["year", i].tolist() == [[n.tn, n.fp], [n.fn, n.tp]], year
    for of, (years, n) in zip(
        combinations(range(len(YEARS)), 2), scores.pairs.items(), strict=True
    ):
        tp = n.new_new + n.new_gone + n.gone_new + n.gone_gone
        fn, fp = n.new_same + n.gone_same, n.same_new + n.same_gone
        assert matrices["pair", of].tolist() == [[n.same_same, fp], [fn, tp]], years


def compared(sites: Sequence[Site], rounds: int, threads: int) -> dict[str, Any]:
    """All of them in turn, and the medians over the rounds."""
    import torch

    seconds: dict[str, list[float]] = {}
    ways: tuple[Callable[[Site], Any], ...] = (xor, differing, score)
    with ThreadPoolExecutor(threads) as pool:
        for way in ways:
            list(pool.map(way, sites[: 2 * threads]))  # warm
        for _ in range(rounds):
            for way in ways:
                start = time.perf_counter()
                list(pool.map(way, sites))
                seconds.setdefault(way.__name__, []).append(time.perf_counter() - start)
    few = sites[: max(WITH_TORCH, threads)]
    if torch.version.cuda is None:
        declare_torchvision()
    torch.set_num_threads(1)  # a site a thread, as ours
    with ThreadPoolExecutor(threads) as pool:
        with_torchmetrics(few[0])
        start = time.perf_counter()
        matrices = list(pool.map(with_torchmetrics, few))
        seconds["torchmetrics"] = [(time.perf_counter() - start) * len(sites) / len(few)]
    check(
        sum((score(site) for site in few), metrics.Counts()),
        {n: sum(m[n] for m in matrices) for n in matrices[0]},
    )
    middle = {name: statistics.median(each) for name, each in seconds.items()}
    size = sum(a.nbytes for site in sites for a in site)
    names = {
        "xor": "byte-wise pass, xor",
        "differing": "byte-wise pass, counting",
        "score": "metrics.count",
        "torchmetrics": f"torchmetrics, scaled from {len(few)} sites",
    }
    rows = [
        (names[n], s, size / s / 1e9, s / (size / 2) * 1e9, middle["xor"] / s)
        for n, s in middle.items()
    ]
    print(format_table(("what", "s", "GB/s", "ns a pixel-year", "of the pass"), rows), flush=True)
    return {
        "bandwidth_fraction": middle["xor"] / middle["score"],
        "counting_fraction": middle["differing"] / middle["score"],
        "vs_torchmetrics": middle["torchmetrics"] / middle["score"],
        "seconds": middle,
        "rounds": seconds,
        "gigabytes": size / 1e9,
    }


if __name__ == "__main__":
    main()
