"""Findings of a check, and the report of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

UNFINISHED = "unfinished"
"""Kind of a finding about a killed or running command."""
CURES = ("build", "site", "label", "predict", "remove", "group")
"""Ways to repair a finding: build the year or the whole site again, write labels or a prediction
again, remove the object, or write an empty group again."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A difference between an object or variable and its written state."""

    site: str
    year: int | None
    """None for all years, or for an object without a year."""
    kind: str
    """missing, damaged, foreign (of another place), unexpected, contradictory, stale, unverifiable
    (no checksum), or unfinished."""
    what: str
    """The object, relative to the site's group, or the variable."""
    found: str
    cure: str
    """One of `CURES`."""

    def __str__(self) -> str:
        year = "" if self.year is None else f" {self.year}"
        return f"{self.site}{year}: {self.kind}: {describe_key(self.what)}: {self.found}"

    @property
    def metadata_key(self) -> str:
        """Key of the metadata behind the finding, relative to the site's group."""
        folder, *parts = self.what.split("/")
        if self.cure == "build":
            return f"builds/{self.year}/zarr.json"
        if folder == "predictions" and parts:
            return f"predictions/{parts[0]}/zarr.json"
        variable = folder.split(" ")[0]
        return f"{variable}/zarr.json"


@dataclass(frozen=True, kw_only=True)
class Report:
    """Extent and findings of a check."""

    sites: tuple[str, ...]
    committed: Mapping[str, Mapping[int, Mapping[str, Any]]]
    """Site -> committed year -> its provenance, if readable."""
    objects: int
    bytes: int
    findings: tuple[Finding, ...]

    @property
    def whole(self) -> bool:
        """Whether all findings, if any, are `unfinished`."""
        return all(finding.kind == UNFINISHED for finding in self.findings)

    @property
    def rebuild(self) -> dict[str, list[int]]:
        """Site -> years to build again."""
        years: dict[str, set[int]] = {}
        for finding in self.findings:
            is_harmless = finding.kind in ("unverifiable", UNFINISHED)
            if is_harmless or finding.cure not in ("build", "site"):
                continue
            damaged = years.setdefault(finding.site, set())
            if finding.cure == "site" or finding.year is None:
                damaged.update(self.committed[finding.site])
            else:
                damaged.add(finding.year)
        return {site: sorted(years[site]) for site in sorted(years)}


def describe_key(key: str) -> str:
    """Return a readable name of a shard, with variable and block; other keys as they are."""
    path, c, chunk = key.partition("/c/")
    indices = chunk.split("/")
    if not c or len(indices) < 3:
        return key
    variable = path.rpartition("/")[2]
    return f"{variable} block {indices[-2]}/{indices[-1]} ({key})"
