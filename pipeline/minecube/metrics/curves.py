"""Score stored probabilities from counts of pixels by probability (251 steps) and truth.

The scores are exact for any threshold. Years mapped one by one have no probability of change. Their
score of change is the distance of the two probabilities, in stored steps. Change models give one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from minecube.compiled import compiled
from minecube.errors import ModelError
from minecube.metrics.counting import check, stack_of
from minecube.metrics.states import LEVELS, UNKNOWN, Histogram, Scores

BINS = 10
"""Number of equal bins in the reliability diagram and the expected calibration error."""


def count_probability(
    probability: NDArray[np.uint8] | xr.DataArray,
    truth: NDArray[np.uint8] | xr.DataArray,
    years: Sequence[int],
    *,
    core: tuple[slice, slice] | None = None,
) -> Scores:
    """Count pixels by probability and truth, per year, and per gap for change.

    Add the result to that of `count` for the same pixels.

    Args:
        probability: Shape (year, y, x): mine x 250, 255 for unknown.
        truth: Shape (year, y, x): 1 mine, 0 not, 255 unknown.
        years: Years of both arrays, ascending.
        core: Pixels (y, x) to count.

    Raises:
        ModelError: shapes or years differ, a probability is 251..254, or a truth value is invalid.
    """
    p, y = stack_of(probability, "probability", years), stack_of(truth, "truth", years)
    if p.shape != y.shape:
        raise ModelError(
            f"probability has shape {p.shape}, truth {y.shape}; scores need the same years on the same grid"
        )
    p, y = (
        stack[:, *(core or (slice(None), slice(None)))].reshape(len(years), -1)
        for stack in (checked(p), y)
    )
    check(y, "truth")
    gaps = np.subtract.outer(years, years)
    each = np.unique(gaps[gaps > 0])
    footprint = np.zeros((len(years), LEVELS + 1, 2), np.int64)
    change = np.zeros((len(each), LEVELS + 1, 2), np.int64)
    p, y = (np.ascontiguousarray(stack, np.uint8) for stack in (p, y))
    _count(p, y, np.searchsorted(each, gaps), footprint, change)
    return Scores(
        footprint={
            int(year): Histogram(pixels) for year, pixels in zip(years, footprint, strict=True)
        },
        change={int(gap): Histogram(pixels) for gap, pixels in zip(each, change, strict=True)},
    )


@compiled
def _count(
    p: NDArray[np.uint8],
    y: NDArray[np.uint8],
    gap: NDArray[np.intp],
    footprint: NDArray[np.int64],
    change: NDArray[np.int64],
) -> None:
    """Add pixels [year, pixel] to the counts, in place.

    Years go to `footprint` [year, 251, 2] and all pairs of years to `change` [gap, 251, 2].
    `gap` [year, earlier year] is the first index of `change`.
    """
    years, pixels = p.shape
    for n in range(pixels):
        for i in range(years):
            if p[i, n] == UNKNOWN or y[i, n] == UNKNOWN:
                continue
            footprint[i, p[i, n], y[i, n]] += 1
            for j in range(i):
                if p[j, n] != UNKNOWN and y[j, n] != UNKNOWN:
                    apart = max(p[i, n], p[j, n]) - min(p[i, n], p[j, n])
                    change[gap[i, j], apart, y[i, n] ^ y[j, n]] += 1


def checked(probability: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return stored probabilities unchanged. Raise ModelError for invalid ones."""
    if probability.dtype != np.uint8 or ((probability > LEVELS) & (probability != UNKNOWN)).any():
        raise ModelError(
            f"the probability is {probability.dtype} with values up to {probability.max(initial=0)}; expected uint8, "
            f"0..{LEVELS}, and {UNKNOWN} for unknown"
        )
    return probability


def histogram(score: NDArray[np.uint8], truth: NDArray[np.uint8]) -> Histogram:
    """Count known pixels by score (0..250) and truth (0 or 1)."""
    counts = [
        np.bincount(score, minlength=LEVELS + 1),
        np.bincount(score[truth == 1], minlength=LEVELS + 1),
    ]
    return Histogram(np.stack([counts[0] - counts[1], counts[1]], axis=1).astype(np.int64))


def auprc(pixels: NDArray[Any]) -> Any:
    """Compute the average precision of (..., 251, 2).

    It is the sum over thresholds of precision times the gain in recall, without interpolation.
    """
    hits, drawn = _from_above(pixels)
    all_true = hits[..., -1:]
    gained = np.diff(hits, axis=-1, prepend=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(drawn > 0, hits / np.maximum(drawn, 1), 0)
        return (precision * gained).sum(axis=-1) / np.where(all_true > 0, all_true, np.nan)[..., 0]


def f1_at_r(pixels: NDArray[Any]) -> Any:
    """Compute the F1 of the r highest scores, r being the number of true pixels.

    Precision, recall and F1 are then equal. If only part of the pixels with the last score are
    needed, they count with their average share of true ones.
    """
    hits, drawn = _from_above(pixels)
    true = hits[..., -1]
    at = (drawn < true[..., None]).sum(axis=-1)[..., None]  # the threshold for reaching r
    at = np.minimum(at, LEVELS)
    before = np.maximum(at - 1, 0)
    taken, sure = (
        np.where(at > 0, np.take_along_axis(a, before, -1), 0)[..., 0] for a in (drawn, hits)
    )
    tied, right = (
        np.take_along_axis(a, at, -1)[..., 0] - b for a, b in ((drawn, taken), (hits, sure))
    )
    found = sure + np.where(tied > 0, (true - taken) * right / np.maximum(tied, 1), 0)
    return found / np.where(true > 0, true, np.nan)


def brier(pixels: NDArray[Any]) -> Any:
    """Compute the mean squared distance of probability and truth."""
    p = np.arange(LEVELS + 1) / LEVELS
    off = pixels[..., 0] @ p**2 + pixels[..., 1] @ (1 - p) ** 2
    known = pixels.sum(axis=(-2, -1))
    return off / np.where(known > 0, known, np.nan)


def ece(pixels: NDArray[Any]) -> Any:
    """Compute the expected calibration error.

    It is the mean over pixels of |share of mine - mean probability| in the pixel's bin.
    """
    mine, said, drawn = _binned(pixels)
    known = drawn.sum(axis=-1)
    return np.abs(mine - said).sum(axis=-1) / np.where(known > 0, known, np.nan)


def precision_recall(h: Histogram) -> pd.DataFrame:
    """Tabulate threshold, precision and recall of occurring probabilities, highest first."""
    hits, drawn = _from_above(h.pixels)
    table = pd.DataFrame({"threshold": np.arange(LEVELS, -1, -1) / LEVELS})
    table["precision"] = hits / np.where(drawn > 0, drawn, np.nan)
    table["recall"] = hits / hits[-1] if hits[-1] else np.nan
    return table[np.diff(drawn, prepend=0) > 0].reset_index(drop=True)


def reliability(h: Histogram) -> pd.DataFrame:
    """Tabulate predicted (mean probability), observed (mine share) and pixels per non-empty bin."""
    mine, said, drawn = _binned(h.pixels)
    there = drawn > 0
    columns = {
        "predicted": said[there] / drawn[there],
        "observed": mine[there] / drawn[there],
        "pixels": drawn[there],
    }
    return pd.DataFrame(columns)


def _from_above(pixels: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Count true pixels, and all pixels, at or above each threshold, from the highest down."""
    down = pixels[..., ::-1, :]
    return np.cumsum(down[..., 1], axis=-1), np.cumsum(down.sum(axis=-1), axis=-1)


def _binned(pixels: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return, by bin, the mine pixels, the sum of probabilities, and all pixels.

    A bin includes its upper edge, not its lower one. The first bin includes 0.
    """
    p = np.arange(LEVELS + 1)
    at = np.maximum(-(-p * BINS // LEVELS) - 1, 0)
    in_bin = (at[:, None] == np.arange(BINS)).astype(np.float64)
    drawn = pixels.sum(axis=-1)
    return pixels[..., 1] @ in_bin, (drawn * (p / LEVELS)) @ in_bin, drawn @ in_bin
