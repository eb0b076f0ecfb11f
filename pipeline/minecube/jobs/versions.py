"""Sum up the differences between two published versions by site-year."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_WHOLE = "the whole site"


@dataclass(frozen=True)
class Difference:
    """One site-year, or one site, in which two versions differ."""

    site: str
    year: str
    """The year; "all" for a whole site or its metadata."""
    change: str
    """new, gone or changed."""
    what: str
    """What has changed, comma-separated; empty for a new or gone site-year."""


def group_differences(rows: Iterable[tuple[str, str, str]]) -> list[Difference]:
    """Group rows of `publish.list_differences` (site, year, variable): one per site and year."""
    groups: dict[tuple[str, str], list[str]] = {}
    for site, year, variable in rows:
        groups.setdefault((site, year), []).append(variable)
    return [_join(site, year, variables) for (site, year), variables in sorted(groups.items())]


def _join(site: str, year: str, variables: Sequence[str]) -> Difference:
    whole = "provenance" if year != "all" else _WHOLE
    for change in ("new", "gone"):
        if f"{whole} ({change})" in variables:
            return Difference(site, year, change, "")
    if year == "all":  # the site's metadata, and coordinates
        names = dict.fromkeys(variable.partition(" (")[0] for variable in variables)
        return Difference(site, year, "changed", f"metadata of {', '.join(names)}")
    return Difference(site, year, "changed", ", ".join(variables))


def count_differences(differences: Iterable[Difference]) -> str:
    """Return one sentence: how many site-years and whole sites differ."""
    years = {"new": 0, "gone": 0, "changed": 0}
    sites = {"new": 0, "gone": 0}
    names = set()
    for item in differences:
        names.add(item.site)
        if item.year != "all":
            years[item.change] += 1
        elif item.change in sites:
            sites[item.change] += 1
    text = f"{len(names)} sites differ ({_list_counts(sites)})"
    return f"{text}, with {sum(years.values())} site-years ({_list_counts(years)})"


def _list_counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {change}" for change, count in counts.items())
