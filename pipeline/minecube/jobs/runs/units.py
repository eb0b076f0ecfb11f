"""Steps of a run, and their units of work: a site-year or a site."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from minecube.catalog import Dataset
from minecube.errors import CatalogError

SITE_YEAR_STEPS = ("search", "build")
SITE_STEPS = ("audit", "label", "predict", "tracks", "score", "export")
STEPS = ("search", "audit", "build", "label", "predict", "tracks", "score", "export")
"""In the order of a run."""
NEEDS = {
    "tracks": ("predict",),
    "score": ("label", "predict", "tracks"),
    "export": ("predict", "tracks"),
}
"""Step -> earlier steps of the same site without which it cannot start."""


@dataclass(frozen=True)
class Unit:
    """One task of a run."""

    step: str
    site: str
    year: int = 0
    """0 for a step of a whole site."""

    def __str__(self) -> str:
        if self.year:
            return f"{self.step} {self.site} {self.year}"
        return f"{self.step} {self.site}"

    @property
    def lease(self) -> str:
        """Name of the lock that only one run may hold while it works on the unit."""
        return f"run/{self.step}/{self.site}/{self.year}"


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count` of all units, counted from 1."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Parse "3/20". Raises CatalogError for other text."""
        index, slash, count = text.partition("/")
        if not (slash and index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
            raise CatalogError(
                f"--shard {text}: expected i/n such as 3/20, the third of twenty parts"
            )
        return cls(int(index), int(count))

    def has(self, site: str, year: int) -> bool:
        """Whether a site-year (or a site, with year 0) is in this part.

        The same on every machine, in every version: by SHA-256.
        """
        digest = hashlib.sha256(f"{site} {year}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % self.count == self.index - 1

    def has_any(self, site: str, years: Iterable[int]) -> bool:
        """Whether the site itself, or one of these years of it, is in this part."""
        return any(self.has(site, year) for year in (0, *years))


def list_steps(dataset: Dataset, only: Iterable[str] | None = None) -> list[str]:
    """List the steps of a dataset in order, or those of `only`.

    Raises CatalogError for a step that the dataset does not have.
    """
    configured = {
        "label": dataset.labels,
        "predict": dataset.models,
        "tracks": dataset.tracks,
        "score": dataset.score,
        "export": dataset.export,
    }
    steps = [step for step in STEPS if configured.get(step, True)]
    if only is None:
        return steps
    wanted = list(only)
    for name in wanted:
        if name not in STEPS:
            raise CatalogError(f"--only {name}: expected steps of {', '.join(STEPS)}")
        if name not in steps:
            raise CatalogError(
                f"--only {name}: the dataset has no such step; it has {', '.join(steps)}"
            )
    return [step for step in steps if step in wanted]
