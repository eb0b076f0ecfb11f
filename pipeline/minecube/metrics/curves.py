"""Score stored probabilities from counts of pixels by probability (251 steps) and truth.

The scores are exact for any threshold. Years mapped one by one have no probability of change. Their
score of change is the distance of the two probabilities, in stored steps. Change models give one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from minecube.arrays import AnyArray, Bool, UInt8
from minecube.codes import FULL, UNKNOWN
from minecube.errors import ModelError
from minecube.metrics.counts import Counts, Histogram
from minecube.metrics.footprints import check_footprint, stack_of

BINS = 10
"""Number of equal bins in the reliability diagram and the expected calibration error."""


def count_probability(
    probability: UInt8 | xr.DataArray,
    truth: UInt8 | xr.DataArray,
    years: Sequence[int],
    *,
    core: tuple[slice, slice] | None = None,
) -> Counts:
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
    mapped = stack_of(probability, "probability", years)
    labelled = stack_of(truth, "truth", years)
    if mapped.shape != labelled.shape:
        raise ModelError(
            f"probability has shape {mapped.shape}, truth {labelled.shape}; "
            "scores need the same years on the same grid"
        )
    check_probability(mapped)
    rows, columns = core or (slice(None), slice(None))
    mapped = mapped[:, rows, columns].reshape(len(years), -1)
    labelled = labelled[:, rows, columns].reshape(len(years), -1)
    check_footprint(labelled, "truth")
    labelled = labelled.astype(np.uint8, copy=False)
    valid = (mapped != UNKNOWN) & (labelled != UNKNOWN)
    footprint = {
        int(year): histogram(mapped[t], labelled[t], valid[t]) for t, year in enumerate(years)
    }
    change: dict[int, Histogram] = {}
    for i, j in combinations(range(len(years)), 2):
        distance = np.maximum(mapped[i], mapped[j]) - np.minimum(mapped[i], mapped[j])
        pixels = histogram(distance, labelled[i] ^ labelled[j], valid[i] & valid[j])
        add_histogram(change, int(years[j] - years[i]), pixels)
    return Counts(footprint=footprint, change=dict(sorted(change.items())))


def check_probability(probability: AnyArray) -> None:
    """Raise ModelError for values that are no stored probabilities."""
    if probability.dtype != np.uint8 or ((probability > FULL) & (probability != UNKNOWN)).any():
        raise ModelError(
            f"the probability is {probability.dtype} with values up to "
            f"{probability.max(initial=0)}; expected uint8, 0..{FULL}, and {UNKNOWN} for unknown"
        )


def histogram(score: UInt8, truth: UInt8, valid: Bool) -> Histogram:
    """Count known pixels by score (0..250) and truth (0 or 1)."""
    codes = score.astype(np.uint16) * np.uint16(2) + truth
    pixels = np.bincount(codes[valid], minlength=2 * (FULL + 1))
    return Histogram(pixels.reshape(FULL + 1, 2))


def add_histogram(histograms: dict[int, Histogram], gap: int, addend: Histogram) -> None:
    """Add a histogram to that of its gap in years, in place."""
    if gap in histograms:
        addend = histograms[gap] + addend
    histograms[gap] = addend


def auprc(pixels: AnyArray) -> Any:
    """Compute the average precision of (..., 251, 2).

    It is the sum over thresholds of precision times the gain in recall, without interpolation.
    """
    hits, predicted = _count_from_above(pixels)
    positives = hits[..., -1]
    gain = np.diff(hits, axis=-1, prepend=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(predicted > 0, hits / np.maximum(predicted, 1), 0)
        return (precision * gain).sum(axis=-1) / np.where(positives > 0, positives, np.nan)


def f1_at_r(pixels: AnyArray) -> Any:
    """Compute the F1 of the r highest scores, r being the number of true pixels.

    Precision, recall and F1 are then equal. If only part of the pixels with the last score are
    needed, they count with their average share of true ones.
    """
    hits, predicted = _count_from_above(pixels)
    positives = hits[..., -1]
    # The threshold for reaching r pixels.
    threshold = np.minimum((predicted < positives[..., None]).sum(axis=-1), FULL)
    sure_pixels = _take(predicted, threshold - 1)
    sure_hits = _take(hits, threshold - 1)
    tied_pixels = _take(predicted, threshold) - sure_pixels
    tied_hits = _take(hits, threshold) - sure_hits
    share = (positives - sure_pixels) * tied_hits / np.maximum(tied_pixels, 1)
    all_hits = sure_hits + np.where(tied_pixels > 0, share, 0)
    return all_hits / np.where(positives > 0, positives, np.nan)


def _take(counts: AnyArray, threshold: AnyArray) -> AnyArray:
    """Take the count (..., threshold) at one threshold each; 0 for threshold -1."""
    at_threshold = np.take_along_axis(counts, np.maximum(threshold, 0)[..., None], -1)[..., 0]
    return np.where(threshold >= 0, at_threshold, 0)


def brier(pixels: AnyArray) -> Any:
    """Compute the mean squared distance of probability and truth."""
    probability = np.arange(FULL + 1) / FULL
    squares = pixels[..., 0] @ probability**2 + pixels[..., 1] @ (1 - probability) ** 2
    total = pixels.sum(axis=(-2, -1))
    return squares / np.where(total > 0, total, np.nan)


def ece(pixels: AnyArray) -> Any:
    """Compute the expected calibration error.

    It is the mean over pixels of |share of mine - mean probability| in the pixel's bin.
    """
    mine, probability, number = _sum_bins(pixels)
    total = number.sum(axis=-1)
    return np.abs(mine - probability).sum(axis=-1) / np.where(total > 0, total, np.nan)


def tabulate_precision_recall(h: Histogram) -> pd.DataFrame:
    """Tabulate threshold, precision and recall of occurring probabilities, highest first."""
    hits, predicted = _count_from_above(h.pixels)
    table = pd.DataFrame({"threshold": np.arange(FULL, -1, -1) / FULL})
    table["precision"] = hits / np.where(predicted > 0, predicted, np.nan)
    table["recall"] = hits / np.where(hits[-1] > 0, hits[-1], np.nan)
    return table[np.diff(predicted, prepend=0) > 0].reset_index(drop=True)


def tabulate_reliability(h: Histogram) -> pd.DataFrame:
    """Tabulate predicted (mean probability), observed (mine share) and pixels per non-empty bin."""
    mine, probability, number = _sum_bins(h.pixels)
    filled = number > 0
    columns = {
        "predicted": probability[filled] / number[filled],
        "observed": mine[filled] / number[filled],
        "pixels": number[filled],
    }
    return pd.DataFrame(columns)


def _count_from_above(pixels: AnyArray) -> tuple[AnyArray, AnyArray]:
    """Count true pixels, and all pixels, at or above each threshold, from the highest down."""
    descending = pixels[..., ::-1, :]
    return np.cumsum(descending[..., 1], axis=-1), np.cumsum(descending.sum(axis=-1), axis=-1)


def _sum_bins(pixels: AnyArray) -> tuple[AnyArray, AnyArray, AnyArray]:
    """Return, by bin, the mine pixels, the sum of probabilities, and all pixels.

    A bin includes its upper edge, not its lower one. The first bin includes 0.
    """
    stored = np.arange(FULL + 1)
    bins = np.maximum(-(-stored * BINS // FULL) - 1, 0)
    in_bin = (bins[:, None] == np.arange(BINS)).astype(np.float64)
    number = pixels.sum(axis=-1)
    return pixels[..., 1] @ in_bin, (number * (stored / FULL)) @ in_bin, number @ in_bin
