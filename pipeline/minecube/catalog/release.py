"""A published dataset: what its archive should hold, and what is known to be odd about it."""

from __future__ import annotations

from dataclasses import dataclass

from minecube.catalog.fields import BANDS, need


@dataclass(frozen=True, kw_only=True)
class Release:
    """One published dataset of yearly images and labels."""

    id: str
    name: str
    """What `labels` of its sites in the catalogue begins with."""
    title: str
    citation: str
    licence: str
    """SPDX identifier."""
    doi: str
    """Of the data."""
    sites: int
    """How many it says to have."""
    years: tuple[int, ...]
    repeated: tuple[str, ...] = ()
    """Sites that its split names twice."""
    excluded: tuple[str, ...] = ()
    """Sites that its authors' code passes over."""
    band_mean: tuple[float, ...] = ()
    """Published mean of each band, digital numbers."""
    band_std: tuple[float, ...] = ()
    """Published standard deviation of each band, divided by the square root of 2 by mistake."""

    def __post_init__(self) -> None:
        need(self.sites > 0, "sites", f"above 0, found {self.sites}")
        need(bool(self.years), "years", "at least one year, found none")
        for name in ("band_mean", "band_std"):
            found = len(getattr(self, name))
            need(found in (0, len(BANDS)), name, f"{len(BANDS)} numbers or none, found {found}")
