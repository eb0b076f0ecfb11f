"""Scenes and listings as coverage needs them, without files."""

from __future__ import annotations

import dataclasses
from datetime import UTC, date, datetime

import pystac

from minecube.catalog import load_recipes
from minecube.scenes import SearchResult, coverage

RECIPE = dataclasses.replace(
    load_recipes()["annual-median"], min_dates=1
)  # April to October, at most 90 % cloudy
LATER = date(2031, 1, 1)


def scene(
    satellite,
    day,
    orbit=65,
    *,
    cloud=10.0,
    tile="33UUR",
    baseline="05.00",
    source="first",
    utc=None,
):
    """What `normalise` would make of an acquisition at half past ten, as far as coverage asks."""
    when = utc or datetime.fromisoformat(f"{day}T10:30:00").replace(tzinfo=UTC)
    stamp = when.strftime("%Y%m%dT%H%M%S")
    return pystac.Item(
        id=f"{satellite}_{tile}_{stamp}_{source}",
        geometry=None,
        bbox=None,
        datetime=when,
        properties={
            "platform": f"sentinel-{satellite[1:].lower()}",
            "eo:cloud_cover": cloud,
            "s2:mgrs_tile": tile,
            "s2:processing_baseline": baseline,
            "sat:relative_orbit": orbit,
            "minecube:source": source,
            "minecube:solar_day": str(day),
            "minecube:datatake": f"{satellite}_{stamp}",
            "minecube:granule_start": stamp,
        },
    )


def listing(found, year=2020, source="first", **counts):
    return coverage.Listing(
        site="pit",
        year=year,
        source=source,
        result=SearchResult(scenes=tuple(found), listed=len(found), **counts),
    )
