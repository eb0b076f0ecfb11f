"""Estimate mine area by year with an interval, from posteriors and correlated errors.

The expected area is the sum of p w, with p a pixel's posterior and w its area on an equal-area map.
For independent errors of pixels, its variance would be the sum of w^2 p (1 - p). Intervals would be
far too narrow, since neighbouring pixels have similar errors. With rho(d) the correlation of errors
at distance d and s = w sqrt(p (1 - p)),

    variance = sum over i, j of s_i s_j rho(d_ij)  +  shift^2

`rho` is measured without any truth, on the yearly changes made by smoothing. A change is the yearly
map less the smoothed one, less the mean of that difference over the years. `rho` is averaged over
rows and columns by distance, up to `REACH_PX`. The remaining correlation there counts as one error
of the whole site in that year, common to all pixels, such as that of a hazy year.

Errors lasting through all years cancel out in these changes. Smoothing takes each year for a new
witness. If errors come again, it settles firmly on the wrong side. The size of this error is
unknown, and the shift is its only sign. The shift is the mean over years of the yearly maps'
expected area less the smoothed one's. It is zero if both are right, and counts as a standard
deviation. On simulated maps (`benchmarks/tracks.py`), 95 % intervals contain the true area in 85 to
100 of 100 site-years. Without the shift it is 20 to 75, and for independent errors of pixels 0 to
25. No map reveals an error shared by yearly and smoothed maps, such as a quarry always mapped as a
mine.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr
from odc.geo.geobox import GeoBox

from minecube.arrays import Bool, Float32, Float64, UInt8
from minecube.codes import FULL, HALF, UNKNOWN
from minecube.errors import LabelError
from minecube.tracks.areas import pixel_areas
from minecube.tracks.smoothing import checked_years

REACH_PX = 64
NORMAL_95 = 1.959964
_LAGS = (1, 2, 3, 4, 6, 8, 11, 16, 22, 32, 45, REACH_PX)
_FAINT = 0.05  # smaller correlations are chance
_ACTIVE = 5  # stored steps from 0 or 250 of a settled pixel


@dataclass(frozen=True)
class ErrorCorrelation:
    """Correlation of errors in one year by distance."""

    by_distance: Float64
    """At 0, 1, 2 ... `REACH_PX` pixels; 1 at first."""
    common: float = 0.0
    """Part shared by all pixels, at any distance."""


UNCORRELATED = ErrorCorrelation(np.array([1.0]))
"""Independent errors of pixels, for comparison."""


def measure_error_correlation(raw: xr.DataArray, smoothed: xr.DataArray) -> ErrorCorrelation:
    """Measure the correlation of a model's errors in one year by distance.

    It is measured on the changes made by smoothing. Both maps are (year, y, x) uint8 x 250, 255 =
    unknown.

    Raises:
        LabelError: Shapes or years differ. There is one year only, without changes from year to
            year.
    """
    years = _checked_pair(raw, smoothed)
    if len(years) < 2:
        raise LabelError(
            f"expected maps of two years or more, found {years}: how errors are correlated shows "
            "in what smoothing changes from year to year; map more years, or give the correlation"
        )
    yearly = raw.to_numpy()
    smooth = smoothed.to_numpy()
    unsettled = _find_unsettled(yearly, smooth)
    # Larger distances have too few pairs, all near the edges.
    lags = [0, *(lag for lag in _LAGS if lag <= min(unsettled.shape) // 2)]
    products, pairs = _sum_lagged_products(yearly, smooth, unsettled, lags)
    if not products[0] or len(lags) == 1:
        return UNCORRELATED
    correlation = np.where(pairs > 0, products / np.maximum(pairs, 1), 0) / (products[0] / pairs[0])
    common = float(np.clip(correlation[1:][-3:].mean(), 0, 1))
    if common < _FAINT:
        common = 0.0
    # From the first faint correlation on, the rest is chance.
    faint = np.flatnonzero(correlation < common + _FAINT)
    if faint.size:
        correlation[faint[0] :] = common
    correlation = np.clip(correlation, common, 1)
    return ErrorCorrelation(np.interp(np.arange(REACH_PX + 1), lags, correlation), common)


def _find_unsettled(yearly: UInt8, smooth: UInt8) -> Bool:
    """Mark pixels (y, x) with a doubtful year, or with a year changed by smoothing."""
    valid = yearly != UNKNOWN
    doubtful = valid & (yearly > _ACTIVE) & (yearly < FULL - _ACTIVE)
    turned = valid & ((yearly > HALF) != (smooth > HALF))
    unsettled: Bool = doubtful.any(axis=0) | turned.any(axis=0)
    return unsettled


def _sum_lagged_products(
    yearly: UInt8, smooth: UInt8, unsettled: Bool, lags: list[int]
) -> tuple[Float64, Float64]:
    """Sum the products of errors, and count the pairs of pixels, by distance along y and x.

    The error of a year is its change by smoothing, less the mean change over the years. Only
    unsettled pixels known in the year count.
    """
    valid = yearly != UNKNOWN
    total = np.zeros(unsettled.shape, np.float32)
    for t in range(len(yearly)):
        total += _change_of_year(yearly[t], smooth[t])
    mean = total / np.maximum(valid.sum(axis=0), 1).astype(np.float32)
    products = np.zeros(len(lags))
    pairs = np.zeros(len(lags))
    for t in range(len(yearly)):
        weight = (valid[t] & unsettled).astype(np.float32)
        error = (_change_of_year(yearly[t], smooth[t]) - mean) * weight
        for n, lag in enumerate(lags):
            for shifted, fixed in _shift(error, lag):
                products[n] += np.vdot(shifted, fixed)
            for shifted, fixed in _shift(weight, lag):
                pairs[n] += np.vdot(shifted, fixed)
    return products, pairs


def _change_of_year(yearly: UInt8, smooth: UInt8) -> Float32:
    """Subtract the smoothed map from the yearly one; 0 for unknown pixels."""
    return np.where(yearly != UNKNOWN, yearly.astype(np.float32) - smooth, np.float32(0))


def _shift(values: Float32, lag: int) -> list[tuple[Float32, Float32]]:
    """Return values (y, x) next to those `lag` pixels apart, along y and along x."""
    height, width = values.shape
    return [
        (values[lag:], values[: height - lag]),
        (values[:, lag:], values[:, : width - lag]),
    ]


def estimate_areas(
    smoothed: xr.DataArray,
    raw: xr.DataArray,
    grid: GeoBox,
    correlation: ErrorCorrelation | None = None,
) -> pd.DataFrame:
    """Compute the expected mine area by year in m2, with a 95 % interval.

    Columns are year, expected_m2, sd_m2, low_m2 and high_m2. The interval is normal, cut at 0 and
    at the known area.

    Args:
        smoothed: (year, y, x) uint8 x 250 of `smooth`; 255 = never known, without area.
        raw: The maps before smoothing.
        grid: The grid of the maps.
        correlation: Correlation of the errors. Default: as measured on the two
            (`measure_error_correlation`).

    Raises:
        LabelError: The maps differ in shape or years. Their shape is not the grid's. There is one
            year only and no correlation.
    """
    years = _checked_pair(raw, smoothed)
    if smoothed.shape[1:] != tuple(grid.shape):
        raise LabelError(
            f"the maps are {smoothed.shape[1:]} pixels, their grid {tuple(grid.shape)}; "
            "areas would be wrong"
        )
    correlation = correlation or measure_error_correlation(raw, smoothed)
    pixel_m2 = pixel_areas(grid)
    kernel = _kernel(correlation)
    area = []
    known_area = []
    variance = []
    shift = []
    observed_years = 0
    for yearly, smooth in zip(raw.to_numpy(), smoothed.to_numpy(), strict=True):
        valid = smooth != UNKNOWN
        observed = yearly != UNKNOWN
        probability: Float64 = np.where(valid, smooth, 0) / FULL
        deviation: Float64 = pixel_m2 * np.sqrt(probability * (1 - probability))
        area.append(float((probability * pixel_m2).sum()))
        known_area.append(float(pixel_m2[valid].sum()))
        variance.append(_sum_covariances(deviation, kernel, correlation.common))
        difference = np.where(observed, yearly / FULL - probability, 0)
        shift.append(float((difference * pixel_m2).sum()))
        observed_years += bool(observed.any())
    mean_shift = np.array(shift).sum() / max(observed_years, 1)
    sd = np.sqrt(np.array(variance) + mean_shift**2)
    expected = np.array(area)
    return pd.DataFrame(
        {
            "year": years,
            "expected_m2": expected,
            "sd_m2": sd,
            "low_m2": np.maximum(expected - NORMAL_95 * sd, 0),
            "high_m2": np.minimum(expected + NORMAL_95 * sd, known_area),
        }
    )


def _sum_covariances(deviation: Float64, kernel: Float64, common: float) -> float:
    """Sum the covariances of all pairs of pixels from the deviations (y, x) of their areas."""
    from scipy.signal import oaconvolve  # slow to import, and workers start without need of it

    neighbours = oaconvolve(deviation, kernel, mode="same")
    variance = float(np.vdot(neighbours, deviation)) + common * float(deviation.sum()) ** 2
    return max(variance, 0)


def _checked_pair(raw: xr.DataArray, smoothed: xr.DataArray) -> list[int]:
    years = checked_years(raw)
    if checked_years(smoothed) != years or raw.shape != smoothed.shape:
        raise LabelError(
            f"expected a map and its smoothed twin, found {dict(raw.sizes)} with years {years} and "
            f"{dict(smoothed.sizes)} with {smoothed['year'].to_numpy().tolist()}; "
            "the two must have the same grid and years"
        )
    return years


def _kernel(correlation: ErrorCorrelation) -> Float64:
    """Tabulate the part of `by_distance` beyond `common`, by distance in both directions.

    The table is as small as possible.
    """
    excess = correlation.by_distance - correlation.common
    excess = excess[: int(np.flatnonzero(excess > 0).max(initial=0)) + 2]
    reach = len(excess) - 1
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    kernel: Float64 = np.interp(np.hypot(y, x), np.arange(reach + 1), excess, right=0.0)
    return kernel
