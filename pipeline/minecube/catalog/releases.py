"""Published datasets: the expected contents of an archive, and its known oddities."""

from __future__ import annotations

from dataclasses import dataclass

from minecube.catalog.fields import check_field, need
from minecube.catalog.mission import BANDS


@dataclass(frozen=True, kw_only=True)
class Release:
    """One published dataset of yearly images and labels."""

    id: str
    name: str
    """First words of the field `labels` of its sites in the catalogue."""
    title: str
    citation: str
    licence: str
    """SPDX identifier."""
    doi: str
    """DOI of the data."""
    sites: int
    """Published number of sites."""
    years: tuple[int, ...]
    repeated: tuple[str, ...] = ()
    """Sites named twice in its split."""
    excluded: tuple[str, ...] = ()
    """Sites skipped by its authors' code."""
    band_mean: tuple[float, ...] = ()
    """Published mean of each band, digital numbers."""
    band_std: tuple[float, ...] = ()
    """Published standard deviation of each band, too small by the factor sqrt(2) by mistake."""

    def __post_init__(self) -> None:
        check_field(self.sites > 0, self, "sites", "above 0")
        need(bool(self.years), "years", "at least one year, found none")
        for name in ("band_mean", "band_std"):
            count = len(getattr(self, name))
            need(count in (0, len(BANDS)), name, f"{len(BANDS)} numbers or none, found {count}")
