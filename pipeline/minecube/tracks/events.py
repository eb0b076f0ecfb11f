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

from minecube.arrays import AnyArray, Bool, UInt8, UInt16
from minecube.codes import BACKGROUND, FULL, MINE, UNKNOWN
from minecube.errors import LabelError
from minecube.tracks.smoothing import checked_years

LOW = round(0.2 * FULL)
HIGH = round(0.8 * FULL)
LARGEST_STEP = 0.5
"""Minimum share of one year in all gain for an abrupt expansion of a site."""
OPEN_SHARE = 0.1
"""Share of a site's largest area. From this area on, the site is open."""
GAIN_SHARE = 0.05
"""Share of a site's largest area. With a total gain up to this area, the site does not expand."""
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


def derive_events(footprint: xr.DataArray, posterior: xr.DataArray) -> xr.Dataset:
    """Derive layers (y, x) of each pixel's history.

    Args:
        footprint: (year, y, x) uint8: 1 mine, 0 not, 255 unknown. `threshold` of `smooth`.
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
            f"footprint and posterior differ: {dict(footprint.sizes)} with years {years}, and "
            f"{dict(posterior.sizes)} with {posterior['year'].to_numpy().tolist()}; changes would "
            "be judged by other pixels: take both from one smoothing"
        )
    history = _History.create(footprint.shape[1:])
    for t, year in enumerate(years):
        history.add(year, footprint[t].to_numpy(), posterior[t].to_numpy())
    coordinates = {
        name: values
        for name, values in footprint.coords.items()
        if name != "year" and "year" not in values.dims
    }
    return xr.Dataset(history.layers(), coords=coordinates)


@dataclass(frozen=True)
class _History:
    """Layers (y, x) of the years so far, updated in place."""

    onset: UInt16
    end: UInt16
    kind: UInt8
    flips: UInt8
    state: UInt8
    """Footprint in the last known year; 255 never known."""
    probability: UInt8
    """Posterior in the last known year."""

    @classmethod
    def create(cls, shape: tuple[int, ...]) -> _History:
        """Create the layers before the first year."""
        return cls(
            onset=np.zeros(shape, np.uint16),
            end=np.zeros(shape, np.uint16),
            kind=np.zeros(shape, np.uint8),
            flips=np.zeros(shape, np.uint8),
            state=np.full(shape, UNKNOWN, np.uint8),
            probability=np.zeros(shape, np.uint8),
        )

    def add(self, year: int, footprint: UInt8, posterior: UInt8) -> None:
        """Add a year to the layers."""
        mine = footprint == MINE
        opened = mine & (self.state == BACKGROUND)
        closed = (footprint == BACKGROUND) & (self.state == MINE)
        opened_again = opened & (self.onset > 0)
        self.kind[mine & (self.state == UNKNOWN)] |= KINDS["there_at_first"]
        # A pixel opened again has not closed for good.
        self.kind[opened_again] &= ~np.uint8(KINDS["closed_abruptly"] | KINDS["closed_gradually"])
        self.kind[opened_again] |= KINDS["opened_again"]
        rose = (self.probability < LOW) & (posterior > HIGH)
        fell = (self.probability > HIGH) & (posterior < LOW)
        _mark(self.kind, opened & ~opened_again, rose, "opened")
        _mark(self.kind, closed, fell, "closed")
        self.flips[opened | closed] += 1
        self.onset[mine & (self.onset == 0)] = year
        self.end[mine] = year
        observed = footprint != UNKNOWN
        np.copyto(self.state, footprint, where=observed)
        np.copyto(self.probability, posterior, where=observed)

    def layers(self) -> dict[str, xr.DataArray]:
        """Return the layers of `derive_events` after the last year."""
        self.kind[self.state == MINE] |= KINDS["there_at_last"]
        reclaimed = ((self.state == BACKGROUND) & (self.onset > 0)).astype(np.uint8)
        for layer in (reclaimed, self.kind, self.flips):
            layer[self.state == UNKNOWN] = UNKNOWN
        flags = {"flag_masks": list(KINDS.values()), "flag_meanings": " ".join(KINDS)}
        return {
            "onset": _layer(self.onset, "first year as a mine", 0),
            "end": _layer(self.end, "last year as a mine", 0),
            "reclaimed": _layer(reclaimed, "was a mine and is background", UNKNOWN),
            "kind": _layer(self.kind, "how it opened and closed", UNKNOWN).assign_attrs(flags),
            "flips": _layer(self.flips, "changes from year to year", UNKNOWN),
        }


def _layer(values: AnyArray, description: str, nodata: int) -> xr.DataArray:
    attributes = {"long_name": description, "nodata": nodata}
    return xr.DataArray(values, dims=("y", "x"), attrs=attributes)


def _mark(kind: UInt8, changed: Bool, abrupt: Bool, change: str) -> None:
    """Flag changed pixels by the kind of change, opened or closed, in place."""
    kind[changed & abrupt] |= KINDS[f"{change}_abruptly"]
    kind[changed & ~abrupt] |= KINDS[f"{change}_gradually"]


def compute_flip_rate(*footprints: xr.DataArray) -> float:
    """Return the reversed changes per step between successive known years.

    Every change of a pixel after its first counts as reversed. A mine opened and then reclaimed
    counts once, although its changes are true. Footprints are (year, y, x) uint8: 1 mine, 0 not,
    255 unknown. The rate is over all of them together. It is 0 if no pixel changes twice, and NaN
    if no pixel is known in two years.

    Raises:
        LabelError: An argument is not a footprint.
    """
    reversals = 0
    steps = 0
    for footprint in footprints:
        checked_years(footprint)
        shape = footprint.shape[1:]
        state = np.full(shape, UNKNOWN, np.uint8)
        changes = np.zeros(shape, np.uint8)
        for states in footprint.to_numpy():
            comparable = (states != UNKNOWN) & (state != UNKNOWN)
            steps += int(comparable.sum())
            changes += comparable & (states != state)
            state = np.where(states == UNKNOWN, state, states)
        reversals += int(np.maximum(changes, 1).sum(dtype=np.int64)) - changes.size
    if not steps:
        return math.nan
    return reversals / steps


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


def summarize_expansion(areas: pd.DataFrame) -> Expansion:
    """Summarise the growth of a site from its table of `compute_areas`.

    Used columns are year, area_m2 and gain_m2. A gain over several years counts as spread evenly
    over them. It is abrupt only if one of these years still has half of all gain.
    """
    years = areas["year"].to_numpy()
    area = areas["area_m2"].to_numpy()
    gain = np.nan_to_num(areas["gain_m2"].to_numpy())
    opened = 0
    if area.max() > 0:
        opened = int(years[np.argmax(area >= OPEN_SHARE * area.max())])
    growth = math.nan
    if len(years) > 1:
        growth = float(np.polyfit(years - years[0], area, 1)[0])
    if gain.sum() <= GAIN_SHARE * area.max():
        return Expansion(
            opened=opened, growth_m2_per_year=growth, kind="none", largest_year=0, largest_share=0.0
        )
    yearly = gain / np.diff(years, prepend=years[0] - 1) / gain.sum()
    largest = int(np.argmax(yearly))
    kind = "gradual"
    if yearly[largest] >= LARGEST_STEP:
        kind = "abrupt"
    return Expansion(
        opened=opened,
        growth_m2_per_year=growth,
        kind=kind,
        largest_year=int(years[largest]),
        largest_share=float(yearly[largest]),
    )
