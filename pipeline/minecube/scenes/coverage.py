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
from minecube.scenes.acquisitions import merge_sources
from minecube.scenes.selection import list_solar_days, mean_cloud_cover, select_usable
from minecube.scenes.site_year import SearchResult

ALL_SOURCES = "all"
"""Source name in rows for all sources together."""
TOO_FEW = "too few"
"""State of a site-year with fewer usable dates than the recipe needs."""
_COLUMN_TYPES = {"cloud": "float64", "expected": "Int64", "missing": "Int64"}
_CYCLE = 10  # days, or 143 orbits (ESA, Sentinel-2 mission guide)


@dataclass(frozen=True)
class _Service:
    """Time of a satellite in the constellation."""

    behind: int
    """Days behind S2A's place."""
    start: date
    """First day of its data at this place."""
    end: date
    """Last day of its data at this place."""


_SERVICES = {
    # S2A then moved away to make room. Its later data have no full cycle.
    "S2A": _Service(0, date(2015, 7, 4), date(2025, 1, 20)),
    "S2B": _Service(5, date(2017, 7, 1), date.max),
    # Operational from that day (ESA, Sentinel-2 operations).
    "S2C": _Service(0, date(2025, 1, 21), date.max),
}
_LAUNCH = min(service.start for service in _SERVICES.values())


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Scenes of one site-year from one source. `result` is empty if the source has none."""

    site: str
    year: int
    source: str
    result: SearchResult


def derive_passes(
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
    if not tracks:
        return None
    passes: dict[date, date] = {}
    for service in _SERVICES.values():
        start = max(date(year, 1, 1), service.start)
        end = min(date(year, 12, 31), service.end, until)
        for utc in _days(start, end):
            for track in tracks:
                solar = utc + timedelta(days=track.ahead)
                if _phase(solar, service) == track.phase:
                    passes[solar] = utc
    return dict(sorted(passes.items()))


@dataclass(frozen=True)
class _Track:
    """The passes of one orbit over the site."""

    phase: int
    """S2A's day in the cycle, by solar day."""
    ahead: int
    """Solar day minus UTC date, in days."""


def _track(scene: pystac.Item) -> _Track | None:
    """Return the track of a scene, or None if unknown."""
    service = _SERVICES.get(scene.properties["minecube:datatake"][:3])
    if service is None or scene.properties["sat:relative_orbit"] is None:
        return None
    solar = date.fromisoformat(scene.properties["minecube:solar_day"])
    # Outside these dates the satellite was elsewhere or on trial. Other passes cannot be derived.
    if not service.start <= solar <= service.end:
        return None
    return _Track(phase=_phase(solar, service), ahead=(solar - _utc(scene)).days)


def _phase(solar: date, service: _Service) -> int:
    """Return the day of S2A's cycle on which a satellite passes on this solar day."""
    return (solar.toordinal() - service.behind) % _CYCLE


def tabulate_coverage(
    listings: Sequence[Listing], recipe: Recipe, until: date
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tabulate the coverage of one site with `tabulate_months` and `tabulate_year`.

    If several sources list a year, rows of source `all` follow. These pool the sources, with each
    acquisition from the first source listing it.

    The listings of each year are in order of preference. The recipe defines usable dates and the
    minimum per year. `until` is the last UTC date with listed passes.

    Returns:
        The table by month and the table by year.
    """
    pooled = [scene for listing in listings for scene in listing.result.scenes]
    months = []
    years = []
    for listings_of_year in group_by_year(listings):
        passes = derive_passes(pooled, listings_of_year[0].year, until)
        for listing in listings_of_year:
            by_month = tabulate_months(listing, passes, recipe, until)
            months.append(by_month)
            years.append(tabulate_year(listing, by_month, recipe, until))
    return pd.concat(months, ignore_index=True), pd.concat(years, ignore_index=True)


def group_by_year(listings: Sequence[Listing]) -> list[list[Listing]]:
    """Group the listings of one site by year, in the order of `tabulate_coverage`.

    A year with several listings ends with one of source `ALL_SOURCES`.
    """
    groups = []
    for year in sorted({listing.year for listing in listings}):
        listings_of_year = [listing for listing in listings if listing.year == year]
        if len(listings_of_year) > 1:
            listings_of_year.append(_pool(listings_of_year))
        groups.append(listings_of_year)
    return groups


def _pool(listings: Sequence[Listing]) -> Listing:
    """Return the listings of one site-year as one listing of source `all`."""
    pooled = SearchResult(
        scenes=tuple(merge_sources(listing.result.scenes for listing in listings)),
        listed=sum(listing.result.listed for listing in listings),
        # Several sources may refuse the same id.
        refused={
            f"{listing.source}/{item_id}": reason
            for listing in listings
            for item_id, reason in listing.result.refused.items()
        },
    )
    return Listing(site=listings[0].site, year=listings[0].year, source=ALL_SOURCES, result=pooled)


def tabulate_months(
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
    listed_days = set(list_solar_days(listing.result.scenes))
    rows = []
    for month in range(1, 13):
        scenes = [s for s in listing.result.scenes if _utc(s).month == month]
        due_days = [
            solar.isoformat() for solar, utc in (passes or {}).items() if utc.month == month
        ]
        missing_days = [day for day in due_days if day not in listed_days]
        usable_days = len(list_solar_days(select_usable(scenes, recipe)))
        rows.append(
            {
                "site": listing.site,
                "year": listing.year,
                "month": month,
                "source": listing.source,
                "scenes": len(scenes),
                "days": len(list_solar_days(scenes)),
                "usable": usable_days,
                "cloud": mean_cloud_cover(scenes),
                "baselines": _baselines(scenes),
                "expected": len(due_days),
                "missing": len(missing_days),
                "missing_days": " ".join(missing_days),
                "state": _state(listing.year, month, usable_days, recipe, until),
            }
        )
    table = pd.DataFrame(rows)
    if passes is None:
        table[["expected", "missing"]] = None
    return table.astype(_COLUMN_TYPES)


def tabulate_year(
    listing: Listing, months: pd.DataFrame, recipe: Recipe, until: date
) -> pd.DataFrame:
    """Summarise one listing in one row, with the state of its recipe.

    Columns for the whole year are listed, refused, copies (see `SearchResult`), scenes, cloud and
    baselines. Columns for the recipe's months are days, expected, missing, usable, needed (the
    recipe's minimum), gap_days, gap and state. The gap is the longest run of days without a usable
    date in the season, for example "2020-04-01..2020-05-20". State is `ok` or `too few`.

    `months` are the listing's rows from `tabulate_months` with the same recipe. `until` is the last
    UTC date with listed passes.
    """
    result = listing.result
    season = months[months["month"].isin(recipe.months)]
    sums = {name: season[name].sum(min_count=1) for name in ("days", "expected", "missing")}
    usable_scenes = select_usable(result.scenes, recipe)
    usable_days = len(list_solar_days(usable_scenes))
    gap = _longest_gap(listing.year, {_utc(scene) for scene in usable_scenes}, recipe, until)
    row = {
        "site": listing.site,
        "year": listing.year,
        "source": listing.source,
        "listed": result.listed,
        "refused": len(result.refused),
        "copies": result.copies,
        "scenes": len(result.scenes),
        **sums,
        "usable": usable_days,
        "needed": recipe.min_dates,
        "gap_days": len(gap),
        "gap": f"{gap[0]}..{gap[-1]}" if gap else "",
        "cloud": mean_cloud_cover(result.scenes),
        "baselines": _baselines(result.scenes),
        "state": "ok" if usable_days >= recipe.min_dates else TOO_FEW,
    }
    return pd.DataFrame([row]).astype(_COLUMN_TYPES)


def _longest_gap(year: int, usable_on: set[date], recipe: Recipe, until: date) -> list[date]:
    """Return the longest run of consecutive days in the season without a usable date."""
    longest: list[date] = []
    run: list[date] = []
    for day in _days(max(date(year, 1, 1), _LAUNCH), min(date(year, 12, 31), until)):
        if day.month in recipe.months and day not in usable_on:
            run = [*run, day]
            longest = max(longest, run, key=len)
        else:
            run = []
    return longest


def _state(year: int, month: int, usable_days: int, recipe: Recipe, until: date) -> str:
    if month not in recipe.months:
        return "out of season"
    if usable_days:
        return "ok"
    if date(year, month, calendar.monthrange(year, month)[1]) < _LAUNCH:
        return "before launch"
    if date(year, month, 1) > until:
        return "to come"
    return "gap"


def _baselines(scenes: Sequence[pystac.Item]) -> str:
    return " ".join(sorted({s.properties["s2:processing_baseline"] for s in scenes}))


def _utc(scene: pystac.Item) -> date:
    if scene.datetime is None:
        raise ValueError(f"scene {scene.id} has no datetime; `scenes.normalise` lets none pass")
    return scene.datetime.date()


def _days(start: date, end: date) -> Iterable[date]:
    return (start + timedelta(days=n) for n in range((end - start).days + 1))
