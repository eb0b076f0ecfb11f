"""Compare the scenes listed for a site with the passes expected from the satellites' orbits.

The comparison is by year, month and source. It reads no pixels. Sentinel-2 repeats its track
exactly every 10 days (143 orbits). S2B flies 5 days behind S2A, and S2C took S2A's place. One
acquisition therefore gives all passes on its orbit, in all years. Product names of 2015 to 2025
agree to the day.
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
"""Source name in rows for all sources together."""
TOO_FEW = "too few"
"""State of a site-year with fewer usable dates than the recipe needs."""
_CYCLE = 10  # days, or 143 orbits (ESA, Sentinel-2 mission guide)
# Satellite -> days behind S2A's place, first and last day of its data there.
_FLOWN = {
    # S2A then moved away to make room. Its later data have no full cycle.
    "S2A": (0, date(2015, 7, 4), date(2025, 1, 20)),
    "S2B": (5, date(2017, 7, 1), date.max),
    "S2C": (
        0,
        date(2025, 1, 21),
        date.max,
    ),  # operational from that day (ESA, Sentinel-2 operations)
}
_FIRST = min(first for _, first, _ in _FLOWN.values())


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Scenes of one site-year from one source. `found` is empty if the source has none."""

    site: str
    year: int
    source: str
    found: Found


def expected(
    scenes: Iterable[pystac.Item], year: int, until: date = date.max
) -> dict[date, date] | None:
    """Return the expected passes of a year, as solar day -> UTC date.

    The passes follow the orbits of the given scenes, for each satellite in service at the time. The
    result is an upper bound. In 2015 and 2016 not every pass was imaged outside Europe and Africa.
    No pass is imaged in the polar night. An orbit may be missing from listings if only its edge
    touches the site. S2A is not expected from 21 January 2025 on.

    Args:
        scenes: normalised scenes of one site. More years make it likelier to include every orbit.
        year: UTC year, as in searches and recipes. East of 157 degrees east the solar day is one
            ahead.
        until: the last UTC date with listed passes.

    Returns:
        Passes in order, or None if no scene names its orbit.
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
    """Return (relative orbit, S2A's day in the cycle, solar day minus UTC date), or None."""
    orbit, satellite = (
        scene.properties["sat:relative_orbit"],
        scene.properties["minecube:datatake"][:3],
    )
    solar = date.fromisoformat(scene.properties["minecube:solar_day"])
    if orbit is None or satellite not in _FLOWN:
        return None
    behind, first, last = _FLOWN[satellite]
    # Outside these dates the satellite was elsewhere or on trial. Other passes cannot be derived.
    return (
        (orbit, (solar.toordinal() - behind) % _CYCLE, (solar - _utc(scene)).days)
        if first <= solar <= last
        else None
    )


def audit(
    listings: Sequence[Listing], recipe: Recipe, until: date
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tabulate the coverage of one site with `by_month` and `by_year`.

    If several sources list a year, rows of source `all` follow. These pool the sources, with each
    acquisition from the first source listing it.

    Args:
        listings: Of one site, each year's in order of preference.
        recipe: Defines usable dates and the minimum per year.
        until: the last UTC date with listed passes.

    Returns:
        The table by month and the table by year.
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
        # Several sources may refuse the same id.
        refused={
            f"{listing.source}/{i}": why
            for listing in listings
            for i, why in listing.found.refused.items()
        },
    )
    return Listing(site=listings[0].site, year=listings[0].year, source=ALL, found=found)


def by_month(
    listing: Listing, passes: Mapping[date, date] | None, recipe: Recipe, until: date
) -> pd.DataFrame:
    """Tabulate one listing by UTC month, in twelve rows.

    Columns:
        scenes: Number of scenes.
        days: Solar days with a scene.
        usable: Days with a scene usable for the recipe.
        cloud: Mean cloud cover in percent, NaN without scenes.
        baselines: Text such as "02.14 05.00".
        expected: Days with a pass.
        missing: Expected days without a listed scene.
        missing_days: Those solar days, for example "2020-03-02 2020-03-05".
        state: One of ok, gap (in season, nothing usable), out of season, before launch, or to come.

    `expected` and `missing` are NA if no scene of the site names its orbit.
    """
    seen = set(dates(listing.found.scenes))
    rows = []
    for month in range(1, 13):
        scenes = [s for s in listing.found.scenes if _utc(s).month == month]
        due = (
            None
            if passes is None
            else [solar.isoformat() for solar, utc in passes.items() if utc.month == month]
        )
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
    """Summarise one listing in one row, with the state of its recipe.

    Columns for the whole year are listed, refused, copies (see `Found`), scenes, cloud and
    baselines. Columns for the recipe's months are days, expected, missing, usable, needed (the
    recipe's minimum), gap_days, gap and state. The gap is the longest run of days without a usable
    date in the season, for example "2020-04-01..2020-05-20". State is `ok` or `too few`.

    Args:
        listing: Scenes of one source.
        months: The listing's rows from `by_month`.
        recipe: the recipe used for `months`.
        until: the last UTC date with listed passes.
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
    """Return the longest run of consecutive days in the season without a usable date."""
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
