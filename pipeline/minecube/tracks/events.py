"""Derive the history of pixels and sites: opening, end, abruptness and number of changes.

A pixel's change is abrupt if the posterior goes from below 0.2 to above 0.8, or back, between two
successive years of the series. Its year is then certain. Otherwise the change is gradual. The
ground changes slowly, or the evidence leaves the year open. A site expands abruptly if one year
brings at least half of all its gain, and otherwise gradually. Both definitions are ours.

Use smoothed maps: in raw ones, each error is an event.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from minecube.errors import LabelError
from minecube.tracks.areas import MINE, NOT_MINE, UNKNOWN
from minecube.tracks.smoothing import SCALE, checked_years

LOW, HIGH = round(0.2 * SCALE), round(0.8 * SCALE)
LARGEST_STEP = 0.5
"""Minimum share of one year in all gain for an abrupt expansion of a site."""
OPEN_SHARE, GAIN_SHARE = 0.1, 0.05
"""Shares of a site's largest area. From the first on, the site is open. With a total gain up to the
second, it does not expand."""
KINDS = {
    "there_at_first": 1,
    "there_at_last": 2,
    "opened_abruptly": 4,
    "opened_gradually": 8,
    "closed_abruptly": 16,
    "closed_gradually": 32,
    "opened_again": 64,
}
"""Flags of layer `kind`; 0: never a mine. `opened_*` describe the first opening. `closed_*`
describe the last closing of a pixel outside any mine in its last known year."""


def events(footprint: xr.DataArray, posterior: xr.DataArray) -> xr.Dataset:
    """Derive layers (y, x) of each pixel's history.

    Args:
        footprint: (year, y, x) uint8: 1 mine, 0 not, 255 unknown. Smoothed by `likeliest`, or
            `threshold` of `smooth`.
        posterior: (year, y, x) uint8 x 250 of `smooth`, of the same years.

    Returns:
        onset uint16: First mine year, 0 = never. With there_at_first in kind, the true onset may be
            earlier.
        end uint16: Last mine year, 0 = never.
        reclaimed uint8: 1 was a mine, but not in the last known year; 0 otherwise; 255 never known.
        kind uint8: Flags, see `KINDS`; 255 never known.
        flips uint8: Changes between successive known years; 255 never known.

    Raises:
        LabelError: Dimensions, dtype or years are not as described, or differ between the two.
    """
    years = checked_years(footprint)
    if checked_years(posterior) != years or posterior.shape != footprint.shape:
        raise LabelError(
            f"footprint and posterior differ: {dict(footprint.sizes)} with years {years}, and {dict(posterior.sizes)} with "
            f"{posterior['year'].to_numpy().tolist()}; changes would be judged by other pixels: take both from one smoothing"
        )
    shape = footprint.shape[1:]
    onset, end = np.zeros((2, *shape), np.uint16)
    kind, flips = np.zeros((2, *shape), np.uint8)
    last, sure = np.full(shape, UNKNOWN), np.zeros(shape, np.uint8)
    for t, year in enumerate(years):
        now, p = footprint[t].to_numpy(), posterior[t].to_numpy()
        mine = now == MINE
        opened, closed = mine & (last == NOT_MINE), (now == NOT_MINE) & (last == MINE)
        kind[mine & (last == UNKNOWN)] |= KINDS["there_at_first"]
        again = opened & (onset > 0)
        # A pixel opened again has not closed for good.
        kind[again] = (
            kind[again] & ~np.uint8(KINDS["closed_abruptly"] | KINDS["closed_gradually"])
            | KINDS["opened_again"]
        )
        _mark(kind, opened & ~again, (sure < LOW) & (p > HIGH), "opened")
        _mark(kind, closed, (sure > HIGH) & (p < LOW), "closed")
        flips += opened | closed
        onset[mine & (onset == 0)] = year
        end[mine] = year
        last, sure = np.where(now == UNKNOWN, last, now), np.where(now == UNKNOWN, sure, p)
    kind[last == MINE] |= KINDS["there_at_last"]
    reclaimed = ((last == NOT_MINE) & (onset > 0)).astype(np.uint8)
    for layer in (reclaimed, kind, flips):
        layer[last == UNKNOWN] = UNKNOWN
    flags = {"flag_masks": list(KINDS.values()), "flag_meanings": " ".join(KINDS)}
    return xr.Dataset(
        {
            "onset": (("y", "x"), onset, {"long_name": "first year as a mine", "nodata": 0}),
            "end": (("y", "x"), end, {"long_name": "last year as a mine", "nodata": 0}),
            "reclaimed": (
                ("y", "x"),
                reclaimed,
                {"long_name": "was a mine and is background", "nodata": int(UNKNOWN)},
            ),
            "kind": (
                ("y", "x"),
                kind,
                {"long_name": "how it opened and closed", "nodata": int(UNKNOWN), **flags},
            ),
            "flips": (
                ("y", "x"),
                flips,
                {"long_name": "changes from year to year", "nodata": int(UNKNOWN)},
            ),
        },
        coords={
            name: value
            for name, value in footprint.coords.items()
            if "year" not in (name, *value.dims)
        },
    )


def _mark(
    kind: NDArray[np.uint8], where: NDArray[np.bool_], abrupt: NDArray[np.bool_], what: str
) -> None:
    kind[where & abrupt] |= KINDS[f"{what}_abruptly"]
    kind[where & ~abrupt] |= KINDS[f"{what}_gradually"]


def flip_rate(*footprints: xr.DataArray) -> float:
    """Return the reversed changes per step between successive known years.

    Every change of a pixel after its first counts as reversed. A mine opened and then reclaimed
    counts once, although its changes are true. Footprints are (year, y, x) uint8: 1 mine, 0 not,
    255 unknown. The rate is over all of them together. It is 0 if no pixel changes twice, and NaN
    if no pixel is known in two years.

    Raises:
        LabelError: An argument is not a footprint.
    """
    back = steps = 0
    for footprint in footprints:
        checked_years(footprint)
        shape = footprint.shape[1:]
        last, changes = np.full(shape, UNKNOWN), np.zeros(shape, np.uint8)
        for now in footprint.to_numpy():
            both = (now != UNKNOWN) & (last != UNKNOWN)
            steps += int(both.sum())
            changes += both & (now != last)
            last = np.where(now == UNKNOWN, last, now)
        back += int(np.maximum(changes, 1).sum(dtype=np.int64)) - changes.size
    return back / steps if steps else math.nan


@dataclass(frozen=True, kw_only=True)
class Expansion:
    """Opening and growth of a site."""

    opened: int
    """First year with a tenth of the site's largest area; 0: never a mine. The true opening may lie
    before the series' first year."""
    growth_m2_per_year: float
    """Slope of area over years by least squares; NaN for one year."""
    kind: str
    """abrupt, gradual, or none for almost no gain."""
    largest_year: int
    """Year of the largest gain; 0 for kind none."""
    largest_share: float
    """Share of the largest gain in all gain; 0 for kind none."""


def expansion(areas: pd.DataFrame) -> Expansion:
    """Summarise the growth of a site from its table of `areas`.

    Used columns are year, area_m2 and gain_m2. A gain over several years counts as spread evenly
    over them. It is abrupt only if one of these years still has half of all gain.
    """
    years, area = areas["year"].to_numpy(), areas["area_m2"].to_numpy()
    opened = int(years[np.argmax(area >= OPEN_SHARE * area.max())]) if area.max() > 0 else 0
    growth = float(np.polyfit(years - years[0], area, 1)[0]) if len(years) > 1 else math.nan
    gain = np.nan_to_num(areas["gain_m2"].to_numpy())
    if gain.sum() <= GAIN_SHARE * area.max():
        return Expansion(
            opened=opened, growth_m2_per_year=growth, kind="none", largest_year=0, largest_share=0.0
        )
    yearly = gain / np.diff(years, prepend=years[0] - 1) / gain.sum()
    largest = int(np.argmax(yearly))
    return Expansion(
        opened=opened,
        growth_m2_per_year=growth,
        kind="abrupt" if yearly[largest] >= LARGEST_STEP else "gradual",
        largest_year=int(years[largest]),
        largest_share=float(yearly[largest]),
    )
