"""Mine area by year with an interval: expected from posteriors, and as wide as errors are alike in neighbouring pixels.

The expected area is the sum of p w, with p a pixel's posterior and w its area on an equal-area map. If pixels erred each on its
own, its variance would be the sum of w^2 p (1 - p), and intervals absurdly narrow: a map that errs at one pixel errs beside it,
too. With rho(d) the correlation of errors at distance d and s = w sqrt(p (1 - p)),

    variance = sum over i, j of s_i s_j rho(d_ij)

rho is measured, without any truth, on what smoothing changes from year to year: the yearly map less the smoothed one, less the
mean of that over the years. It is averaged over rows and columns by distance, up to `REACH_PX`; what is left of it there is
taken as one error of the whole site in that year, common to all pixels, as a hazy year's is.

What it cannot see: an error that is the same in all years (a quarry that the model always takes for a mine) is in no difference
between years. And the posteriors are taken at their word: where they claim too much, the interval is too narrow.
"""

from __future__ import annotations

import math
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
_FAINT = 0.05  # correlation below which what is measured is chance
_ACTIVE = 5  # stored steps from 0 and 250 within which a pixel is settled


@dataclass(frozen=True)
class Correlation:
    """How alike errors of a year are by distance."""

    near: NDArray[np.float64]
    """At 0, 1, 2 ... `REACH_PX` pixels; 1 at first."""
    common: float = 0.0
    """What all pixels share, at any distance."""


ALONE = Correlation(np.array([1.0]))
"""Pixels that err on their own: for comparison."""


def error_correlation(raw: xr.DataArray, smoothed: xr.DataArray) -> Correlation:
    """Correlation of a model's errors in one year by distance, measured on what smoothing changed.

    Args:
        raw: (year, y, x) uint8 x 250, 255 = none.
        smoothed: `smooth` of it.

    Raises:
        LabelError: they are not of one shape and the same years, or of one year only, which shows no change from year to year.
    """
    years = checked_years(raw)
    if checked_years(smoothed) != years or raw.shape != smoothed.shape or len(years) < 2:
        raise LabelError(
            f"expected a map and its smoothed twin, of two years or more, found {dict(raw.sizes)} and {dict(smoothed.sizes)}; "
            "how errors are correlated shows in what smoothing changes from year to year"
        )
    before, after = raw.to_numpy(), smoothed.to_numpy()
    known = (before != UNKNOWN).all(axis=0)
    unsettled = ((before > _ACTIVE) & (before < SCALE - _ACTIVE)).any(axis=0)
    unsettled |= ((before > SCALE // 2) != (after > SCALE // 2)).any(axis=0)
    active = (known & unsettled).astype(np.float32)
    own, pairs = np.zeros(1 + len(_LAGS)), np.zeros(1 + len(_LAGS))
    mean = sum((b.astype(np.float32) - a for b, a in zip(before, after, strict=True)), np.float32(0)) / len(years)
    for b, a in zip(before, after, strict=True):
        error = (b.astype(np.float32) - a - mean) * active
        for n, lag in enumerate((0, *_LAGS)):
            for one, other, there, here in (
                (error[lag:], error[: len(error) - lag], active[lag:], active[: len(error) - lag]),
                (error[:, lag:], error[:, : error.shape[1] - lag], active[:, lag:], active[:, : error.shape[1] - lag]),
            ):
                own[n] += np.vdot(one, other)
                pairs[n] += np.vdot(there, here)
    if not own[0]:
        return ALONE
    alike = np.where(pairs > 0, own / np.maximum(pairs, 1), 0) / (own[0] / pairs[0])
    common = float(np.clip(alike[-3:].mean(), 0, 1))
    common = common if common >= _FAINT else 0.0
    faint = alike < common + _FAINT
    alike[int(np.argmax(faint)) if faint.any() else len(alike) :] = common  # from there on it is chance
    return Correlation(np.interp(np.arange(REACH_PX + 1), (0, *_LAGS), np.clip(alike, common, 1)), common)


def expected_areas(posterior: xr.DataArray, grid: GeoBox, correlation: Correlation) -> pd.DataFrame:
    """Expected mine area by year, in m2: columns year, expected_m2, sd_m2, low_m2, high_m2, the last two of 95 in 100.

    The interval is the normal one, cut at 0 and at the known ground.

    Args:
        posterior: (year, y, x) uint8 x 250 of `smooth`; 255 = never known, which counts for nothing.
        grid: The grid it lies on.
        correlation: Of its errors.

    Raises:
        LabelError: it is no stored probability, or has another shape than the grid.
    """
    years = checked_years(posterior)
    if posterior.shape[1:] != tuple(grid.shape):
        raise LabelError(f"the posterior is {posterior.shape[1:]} pixels, its grid {tuple(grid.shape)}; areas would be wrong")
    worth = pixel_areas(grid)
    kernel = _kernel(correlation)
    rows = []
    for year, stored in zip(years, posterior.to_numpy(), strict=True):
        known = stored != UNKNOWN
        p: NDArray[np.float64] = np.where(known, stored, 0) / SCALE
        area = float((p * worth).sum())
        spread: NDArray[np.float64] = worth * np.sqrt(p * (1 - p))
        near = scipy.signal.oaconvolve(spread, kernel, mode="same")
        variance = float(np.vdot(near, spread)) + correlation.common * float(spread.sum()) ** 2
        sd = math.sqrt(max(variance, 0))
        low, high = max(area - NORMAL_95 * sd, 0.0), min(area + NORMAL_95 * sd, float(worth[known].sum()))
        rows.append((year, area, sd, low, high))
    return pd.DataFrame(rows, columns=["year", "expected_m2", "sd_m2", "low_m2", "high_m2"])


def _kernel(correlation: Correlation) -> NDArray[np.float64]:
    """What `near` has beyond `common`, by distance in both directions; as small as holds all of it."""
    more = correlation.near - correlation.common
    more = more[: int(np.flatnonzero(more > 0).max(initial=0)) + 2]
    reach = len(more) - 1
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    away: NDArray[np.float64] = np.hypot(y, x)
    found: NDArray[np.float64] = np.interp(away, np.arange(reach + 1), more, right=0.0)
    return found
