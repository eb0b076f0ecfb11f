"""What sources list of a site against what the satellites' orbits would have: by year, month and source, no pixel read.

Sentinel-2 comes over again exactly 10 days later (143 orbits), S2B 5 days after S2A, and S2C flies where S2A did. So one
acquisition tells every pass on its orbit in all years: product names of 2015 to 2025 keep to that day for day.
"""

from __future__ import annotations

import calendar
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta

import pandas as pd
import pystac

from minecube.catalog import Recipe
from minecube.scenes import Found, dates, mean_cloud_cover, merge, usable

ALL = "all"
"""The source of rows on what the sources have together."""
TOO_FEW = "too few"
"""State of a site-year with fewer usable dates than the recipe asks for."""
_CYCLE = 10  # days, or 143 orbits (ESA, Sentinel-2 mission guide)
# Satellite -> days it flies behind S2A's place, first day of its data there, and last.
_FLOWN = {
    "S2A": (0, date(2015, 7, 4), date(2025, 1, 20)),  # moved away to make room; its extension since is no full cycle
    "S2B": (5, date(2017, 7, 1), date.max),
    "S2C": (0, date(2025, 1, 21), date.max),  # operational from that day (ESA, Sentinel-2 operations)
}
_FIRST = min(first for _, first, _ in _FLOWN.values())


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What one source has of one site-year; a source that answered and has nothing has an empty `Found`."""

    site: str
    year: int
    source: str
    found: Found


def expected(scenes: Iterable[pystac.Item], year: int, until: date = date.max) -> dict[date, date] | None:
    """The days on which a satellite passed over the place in a year: solar day -> UTC date. None: no scene names its orbit.

    Of the orbits on which the scenes were taken, by the satellites that flew then; a pass of one satellite tells those of the
    others. An upper bound: outside Europe and Africa not every pass was imaged in 2015 and 2016, in the polar night none is,
    and an orbit whose edge only grazes the site is not always listed. S2A is not expected from 21 January 2025 on.

    Args:
        scenes: normalised, of one site; the more years, the surer that every orbit is among them.
        year: of UTC, as searches and recipes count; beyond 157 degrees east the solar day is a day ahead.
        until: the last UTC date on which a pass would be listed by now.
    """
    tracks = {track for scene in scenes if (track := _track(scene))}
    passes: dict[date, date] = {}
    for behind, first, last in _FLOWN.values():
        for utc in _days(max(date(year, 1, 1), first), min(date(year, 12, 31), last, until)):
            for _, phase, ahead in tracks:
                solar = utc + timedelta(days=ahead)
                if (solar.toordinal() - behind) % _CYCLE == phase:
                    passes[solar] = utc
    return dict(sorted(passes.items())) if tracks else None


def _track(scene: pystac.Item) -> tuple[int, int, int] | None:
    """(relative orbit, S2A's day in the cycle, days that the solar day is ahead of UTC); None where it cannot be told."""
    orbit, satellite = scene.properties["sat:relative_orbit"], scene.properties["minecube:datatake"][:3]
    solar = date.fromisoformat(scene.properties["minecube:solar_day"])
    if orbit is None or satellite not in _FLOWN:
        return None
    behind, first, last = _FLOWN[satellite]
    # S2A elsewhere, or a satellite on trial: what it saw then tells nothing of the others' passes.
    return (orbit, (solar.toordinal() - behind) % _CYCLE, (solar - _utc(scene)).days) if first <= solar <= last else None


def audit(listings: Sequence[Listing], recipe: Recipe, until: date) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Coverage of one site by month and by year, as `by_month` and `by_year` have it.

    Where a year is listed by several sources, rows of source `all` follow: what they have together, each acquisition from the
    first that has it.

    Args:
        listings: of one site, each year's in order of preference.
        recipe: says which dates are usable and how many a year needs.
        until: the last UTC date on which a pass would be listed by now.
    """
    pooled = [scene for listing in listings for scene in listing.found.scenes]
    months, years = [], []
    for year in sorted({listing.year for listing in listings}):
        passes = expected(pooled, year, until)
        own = [listing for listing in listings if listing.year == year]
        for listing in [*own, _together(own)] if len(own) > 1 else own:
            months.append(by_month(listing, passes, recipe, until))
            years.append(by_year(listing, months[-1], recipe, until))
    return pd.concat(months, ignore_index=True), pd.concat(years, ignore_index=True)


def _together(listings: Sequence[Listing]) -> Listing:
    found = Found(
        scenes=tuple(merge(listing.found.scenes for listing in listings)),
        listed=sum(listing.found.listed for listing in listings),
        # One id may be refused of several sources.
        refused={f"{listing.source}/{i}": why for listing in listings for i, why in listing.found.refused.items()},
    )
    return Listing(site=listings[0].site, year=listings[0].year, source=ALL, found=found)


def by_month(listing: Listing, passes: Mapping[date, date] | None, recipe: Recipe, until: date) -> pd.DataFrame:
    """Twelve rows of what a source has of a site-year, by UTC month.

    scenes, days (solar days they are of), usable (days whose scenes the recipe uses), cloud (mean cover in percent, NaN where
    there is no scene), baselines ("02.14 05.00"), expected (days with a pass), missing (those of which nothing is listed),
    missing_days ("2020-03-02 2020-03-05", solar), and state: ok, gap (in season, nothing usable), out of season, before launch
    or to come. expected and missing are NA where no scene of the site names its orbit.
    """
    seen = set(dates(listing.found.scenes))
    rows = []
    for month in range(1, 13):
        scenes = [s for s in listing.found.scenes if _utc(s).month == month]
        due = None if passes is None else [solar.isoformat() for solar, utc in passes.items() if utc.month == month]
        lacking = [day for day in due or () if day not in seen]
        days = len(dates(usable(scenes, recipe)))
        rows.append(
            {
                "site": listing.site,
                "year": listing.year,
                "month": month,
                "source": listing.source,
                "scenes": len(scenes),
                "days": len(dates(scenes)),
                "usable": days,
                "cloud": mean_cloud_cover(scenes),
                "baselines": _baselines(scenes),
                "expected": None if due is None else len(due),
                "missing": None if due is None else len(lacking),
                "missing_days": " ".join(lacking),
                "state": _state(listing.year, month, days, recipe, until),
            }
        )
    return pd.DataFrame(rows).astype({"cloud": "float64", "expected": "Int64", "missing": "Int64"})


def by_year(listing: Listing, months: pd.DataFrame, recipe: Recipe, until: date) -> pd.DataFrame:
    """One row of what a source has of a site-year: whether the recipe can be followed.

    Of the whole year: listed, refused, copies (as `Found` has them), scenes, cloud, baselines. Of the recipe's months: days,
    expected, missing, usable, needed (the recipe's minimum), gap_days (the longest stretch of the season without a usable
    date), gap ("2020-04-01..2020-05-20") and state, `ok` or `too few`.

    Args:
        listing: what the source has.
        months: its rows by month.
        recipe: the recipe that they were made with.
        until: the last UTC date on which a pass would be listed by now.
    """
    found = listing.found
    season = months[months["month"].isin(recipe.months)]
    sums = {name: season[name].sum(min_count=1) for name in ("days", "expected", "missing")}
    days = len(dates(usable(found.scenes, recipe)))
    gap = _longest_gap(listing.year, {_utc(s) for s in usable(found.scenes, recipe)}, recipe, until)
    row = {
        "site": listing.site,
        "year": listing.year,
        "source": listing.source,
        "listed": found.listed,
        "refused": len(found.refused),
        "copies": found.copies,
        "scenes": len(found.scenes),
        **sums,
        "usable": days,
        "needed": recipe.min_dates,
        "gap_days": len(gap),
        "gap": f"{gap[0]}..{gap[-1]}" if gap else "",
        "cloud": mean_cloud_cover(found.scenes),
        "baselines": _baselines(found.scenes),
        "state": "ok" if days >= recipe.min_dates else TOO_FEW,
    }
    return pd.DataFrame([row]).astype({"cloud": "float64", "expected": "Int64", "missing": "Int64"})


def _longest_gap(year: int, usable_on: set[date], recipe: Recipe, until: date) -> list[date]:
    """The longest run of days of the season, each the day after the other, without a usable date."""
    longest: list[date] = []
    run: list[date] = []
    for day in _days(max(date(year, 1, 1), _FIRST), min(date(year, 12, 31), until)):
        run = [*run, day] if day.month in recipe.months and day not in usable_on else []
        longest = max(longest, run, key=len)
    return longest


def _state(year: int, month: int, usable_days: int, recipe: Recipe, until: date) -> str:
    if month not in recipe.months:
        return "out of season"
    if usable_days:
        return "ok"
    if date(year, month, calendar.monthrange(year, month)[1]) < _FIRST:
        return "before launch"
    return "to come" if date(year, month, 1) > until else "gap"


def _baselines(scenes: Sequence[pystac.Item]) -> str:
    return " ".join(sorted({s.properties["s2:processing_baseline"] for s in scenes}))


def _utc(scene: pystac.Item) -> date:
    if scene.datetime is None:
        raise ValueError(f"scene {scene.id} has no datetime; `scenes.normalise` lets none pass")
    return scene.datetime.date()


def _days(first: date, last: date) -> Iterable[date]:
    return (first + timedelta(days=n) for n in range((last - first).days + 1))
