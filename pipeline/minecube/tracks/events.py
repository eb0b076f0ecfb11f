"""What became of each pixel, and of a site: when it opened and ended, at once or by and by, and how often it changed.

A pixel's change is abrupt where the posterior goes from below 0.2 to above 0.8, or back, from one year of the series to the
next: the year is certain. Elsewhere it is gradual: ground that opens by and by, or evidence that does not settle on one year. A
site expands abruptly where one year brings at least half of all the ground it gains, and gradually elsewhere. Both definitions
are ours.

These are read from smoothed maps: in raw ones, each error is an event.
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
"""Share of all gain from which one year's makes a site's expansion abrupt."""
OPEN_SHARE, GAIN_SHARE = 0.1, 0.05
"""Shares of a site's largest area: with the first it is open; what gains less than the second in all years does not expand."""
KINDS = {
    "there_at_first": 1,
    "there_at_last": 2,
    "opened_abruptly": 4,
    "opened_gradually": 8,
    "closed_abruptly": 16,
    "closed_gradually": 32,
    "opened_again": 64,
}
"""Flags of layer `kind`: 0 was never a mine. Opening is the first one, closing the last one, of a mine that is none at last."""


def events(footprint: xr.DataArray, posterior: xr.DataArray) -> xr.Dataset:
    """Layers (y, x) that say what became of each pixel.

    Args:
        footprint: (year, y, x) uint8: 1 mine, 0 not, 255 unknown; smoothed (`likeliest`, or `threshold` of `smooth`).
        posterior: (year, y, x) uint8 x 250 of `smooth`, of the same years.

    Returns:
        onset uint16: first mine year, 0 = none; the first year of all may be late: then kind says there_at_first.
        end uint16: last mine year, 0 = none.
        reclaimed uint8: 1 was a mine and is none in the last known year, 0 not so, 255 never known.
        kind uint8: flags, see `KINDS`; 255 never known.
        flips uint8: changes from one known year to the next; 255 never known.

    Raises:
        LabelError: dimensions, dtype or years are not as described, or those of the two differ.
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
        # What closed and opened again has not closed for good.
        kind[again] = kind[again] & ~np.uint8(KINDS["closed_abruptly"] | KINDS["closed_gradually"]) | KINDS["opened_again"]
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
            "reclaimed": (("y", "x"), reclaimed, {"long_name": "was a mine and is none", "nodata": int(UNKNOWN)}),
            "kind": (("y", "x"), kind, {"long_name": "how it opened and closed", "nodata": int(UNKNOWN), **flags}),
            "flips": (("y", "x"), flips, {"long_name": "changes from year to year", "nodata": int(UNKNOWN)}),
        },
        coords={name: value for name, value in footprint.coords.items() if "year" not in (name, *value.dims)},
    )


def _mark(kind: NDArray[np.uint8], where: NDArray[np.bool_], abrupt: NDArray[np.bool_], what: str) -> None:
    kind[where & abrupt] |= KINDS[f"{what}_abruptly"]
    kind[where & ~abrupt] |= KINDS[f"{what}_gradually"]


def flip_rate(*footprints: xr.DataArray) -> float:
    """Changes that go back on an earlier one, per step from one known year to the next; 0 where no pixel changes twice.

    Of all sites' footprints together, each (year, y, x) uint8: 1 mine, 0 not, 255 unknown. A mine that opened and was reclaimed
    has gone back once, truly. NaN where no pixel is known in two years.

    Raises:
        LabelError: one is no footprint.
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
    """A site's story in a few numbers."""

    opened: int
    """First year with a tenth of its largest area; the series' first year may be late. 0: no mine in any year."""
    growth_m2_per_year: float
    """Slope of area over years by least squares; NaN of one year."""
    kind: str
    """abrupt, gradual, or none where next to nothing was gained."""
    largest_year: int
    """The year that brought most ground; 0 where none did."""
    largest_share: float
    """Its share of all gain."""


def expansion(areas: pd.DataFrame) -> Expansion:
    """How a site grew, of its table of `areas`: columns year, area_m2, gain_m2.

    A gain over several years counts as spread evenly over them, so it is abrupt only where even so one year has half of all.
    """
    years, area = areas["year"].to_numpy(), areas["area_m2"].to_numpy()
    opened = int(years[np.argmax(area >= OPEN_SHARE * area.max())]) if area.max() > 0 else 0
    growth = float(np.polyfit(years - years[0], area, 1)[0]) if len(years) > 1 else math.nan
    gain = np.nan_to_num(areas["gain_m2"].to_numpy())
    if gain.sum() <= GAIN_SHARE * area.max():
        return Expansion(opened=opened, growth_m2_per_year=growth, kind="none", largest_year=0, largest_share=0.0)
    yearly = gain / np.diff(years, prepend=years[0] - 1) / gain.sum()
    largest = int(np.argmax(yearly))
    return Expansion(
        opened=opened,
        growth_m2_per_year=growth,
        kind="abrupt" if yearly[largest] >= LARGEST_STEP else "gradual",
        largest_year=int(years[largest]),
        largest_share=float(yearly[largest]),
    )
