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

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.signal
import xarray as xr
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox

from minecube.errors import LabelError
from minecube.tracks.areas import UNKNOWN, pixel_areas
from minecube.tracks.smoothing import SCALE, checked_years

REACH_PX = 64
NORMAL_95 = 1.959964
_LAGS = (1, 2, 3, 4, 6, 8, 11, 16, 22, 32, 45, REACH_PX)
_FAINT = 0.05  # smaller correlations are chance
_ACTIVE = 5  # stored steps from 0 or 250 of a settled pixel


@dataclass(frozen=True)
class Correlation:
    """Correlation of errors in one year by distance."""

    near: NDArray[np.float64]
    """At 0, 1, 2 ... `REACH_PX` pixels; 1 at first."""
    common: float = 0.0
    """Part shared by all pixels, at any distance."""


ALONE = Correlation(np.array([1.0]))
"""Independent errors of pixels, for comparison."""


def error_correlation(raw: xr.DataArray, smoothed: xr.DataArray) -> Correlation:
    """Measure the correlation of a model's errors in one year by distance.

    It is measured on the changes made by smoothing.

    Args:
        raw: (year, y, x) uint8 x 250, 255 = unknown.
        smoothed: `smooth` of `raw`.

    Raises:
        LabelError: Shapes or years differ. There is one year only, without changes from year to
            year.
    """
    years = _checked_pair(raw, smoothed)
    if len(years) < 2:
        raise LabelError(
            f"expected maps of two years or more, found {years}: how errors are correlated shows in what smoothing changes "
            "from year to year; map more years, or give the correlation"
        )
    before, after = raw.to_numpy(), smoothed.to_numpy()
    known = before != UNKNOWN
    unsettled = (known & (before > _ACTIVE) & (before < SCALE - _ACTIVE)).any(axis=0)
    unsettled |= (known & ((before > SCALE // 2) != (after > SCALE // 2))).any(axis=0)
    # Larger distances have too few pairs, all near the edges.
    lags = (0, *(lag for lag in _LAGS if lag <= min(unsettled.shape) // 2))
    own, pairs = np.zeros(len(lags)), np.zeros(len(lags))

    def changes() -> Iterator[NDArray[np.float32]]:
        """Yield the change of each year, 0 for unknown pixels."""
        return (
            np.where(k, b.astype(np.float32) - a, np.float32(0))
            for b, a, k in zip(before, after, known, strict=True)
        )

    mean = sum(changes(), np.float32(0)) / np.maximum(known.sum(axis=0), 1).astype(np.float32)
    for change, there in zip(changes(), known & unsettled, strict=True):
        active = there.astype(np.float32)
        error = (change - mean) * active
        for n, lag in enumerate(lags):
            for one, other, here, beside in (
                (error[lag:], error[: len(error) - lag], active[lag:], active[: len(error) - lag]),
                (
                    error[:, lag:],
                    error[:, : error.shape[1] - lag],
                    active[:, lag:],
                    active[:, : error.shape[1] - lag],
                ),
            ):
                own[n] += np.vdot(one, other)
                pairs[n] += np.vdot(here, beside)
    if not own[0] or len(lags) == 1:
        return ALONE
    alike = np.where(pairs > 0, own / np.maximum(pairs, 1), 0) / (own[0] / pairs[0])
    common = float(np.clip(alike[1:][-3:].mean(), 0, 1))
    common = common if common >= _FAINT else 0.0
    faint = alike < common + _FAINT
    alike[int(np.argmax(faint)) if faint.any() else len(alike) :] = common  # chance from there on
    return Correlation(np.interp(np.arange(REACH_PX + 1), lags, np.clip(alike, common, 1)), common)


def expected_areas(
    smoothed: xr.DataArray, raw: xr.DataArray, grid: GeoBox, correlation: Correlation | None = None
) -> pd.DataFrame:
    """Compute the expected mine area by year in m2, with a 95 % interval.

    Columns are year, expected_m2, sd_m2, low_m2 and high_m2. The interval is normal, cut at 0 and
    at the known area.

    Args:
        smoothed: (year, y, x) uint8 x 250 of `smooth`; 255 = never known, without area.
        raw: The maps before smoothing.
        grid: The grid of the maps.
        correlation: Correlation of the errors. Default: as measured on the two
            (`error_correlation`).

    Raises:
        LabelError: The maps differ in shape or years. Their shape is not the grid's. There is one
            year only and no correlation.
    """
    years = _checked_pair(raw, smoothed)
    if smoothed.shape[1:] != tuple(grid.shape):
        raise LabelError(
            f"the maps are {smoothed.shape[1:]} pixels, their grid {tuple(grid.shape)}; areas would be wrong"
        )
    correlation = correlation or error_correlation(raw, smoothed)
    worth, kernel = pixel_areas(grid), _kernel(correlation)
    found = []
    for yearly, stored in zip(raw.to_numpy(), smoothed.to_numpy(), strict=True):
        known, seen = stored != UNKNOWN, yearly != UNKNOWN
        p: NDArray[np.float64] = np.where(known, stored, 0) / SCALE
        spread: NDArray[np.float64] = worth * np.sqrt(p * (1 - p))
        near = scipy.signal.oaconvolve(spread, kernel, mode="same")
        variance = float(np.vdot(near, spread)) + correlation.common * float(spread.sum()) ** 2
        moved = float((np.where(seen, yearly / SCALE - p, 0) * worth).sum())
        found.append(
            (
                float((p * worth).sum()),
                max(variance, 0),
                moved,
                float(worth[known].sum()),
                float(seen.any()),
            )
        )
    area, variances, moves, most, there = np.array(found).T
    sd = np.sqrt(variances + (moves.sum() / max(there.sum(), 1)) ** 2)
    low, high = np.maximum(area - NORMAL_95 * sd, 0), np.minimum(area + NORMAL_95 * sd, most)
    return pd.DataFrame(
        {"year": years, "expected_m2": area, "sd_m2": sd, "low_m2": low, "high_m2": high}
    )


def _checked_pair(raw: xr.DataArray, smoothed: xr.DataArray) -> list[int]:
    years = checked_years(raw)
    if checked_years(smoothed) != years or raw.shape != smoothed.shape:
        raise LabelError(
            f"expected a map and its smoothed twin, found {dict(raw.sizes)} with years {years} and {dict(smoothed.sizes)} with "
            f"{smoothed['year'].to_numpy().tolist()}; the two must have the same grid and years"
        )
    return years


def _kernel(correlation: Correlation) -> NDArray[np.float64]:
    """Tabulate the part of `near` beyond `common` by distance in both directions.

    The table is as small as possible.
    """
    more = correlation.near - correlation.common
    more = more[: int(np.flatnonzero(more > 0).max(initial=0)) + 2]
    reach = len(more) - 1
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    away: NDArray[np.float64] = np.hypot(y, x)
    found: NDArray[np.float64] = np.interp(away, np.arange(reach + 1), more, right=0.0)
    return found
