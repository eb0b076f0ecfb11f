"""STAC search to normalised, deduplicated scenes, saved as a stac-geoparquet snapshot before a pixel is read.

A scene is a `pystac.Item` whatever provider listed it: assets B02..B12 and SCL, `proj:code`, and under `minecube:` the
source, how to get at its files, the acquisition it belongs to, and the radiometric offset its pixels still carry, with the
reason.

    find.py       APIs and files of items: every page, each item once
    normalise.py  one provider's item -> a scene; copies told apart; sources in order of preference
    snapshot.py   the list of a site-year on disk, with its hash
    offsets.py    the offset that was decided, checked in the pixels
    coverage.py   what was found against what the satellites' orbits would have it
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pystac

from minecube.catalog import FIRST_YEAR, Recipe, Site, Source
from minecube.errors import SceneError
from minecube.grid import area_of, grid_of
from minecube.network import origin_of
from minecube.reader import stack
from minecube.scenes.find import items_of, over
from minecube.scenes.normalise import (
    acquisition,
    copies_of,
    deduplicate,
    item_of,
    merge,
    need_allowed,
    normalise,
    same_access,
)

__all__ = [
    "Found",
    "NothingFoundError",
    "acquisition",
    "belonging",
    "check_years",
    "copies_of",
    "dates",
    "deduplicate",
    "has_images",
    "mean_cloud_cover",
    "merge",
    "normalise",
    "search",
    "select",
    "stack",
    "usable",
]

log = logging.getLogger(__name__)

_FOUND = re.compile(r"""found ('.*'|".*"|[0-9.]+)(?=;)""")
"""A malformed value in a reason: it differs from item to item."""
_NAMED = 9
"""Refused items that a warning names, at most; the scene list has all."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search brought: the scenes, and what became of the other items."""

    scenes: tuple[pystac.Item, ...]
    """Normalised, one an acquisition and tile, ordered by time and id."""
    listed: int = 0
    """Items that the sources listed."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Id of an item that cannot be used -> why."""

    @property
    def copies(self) -> int:
        """Items left out because a newer processing, or a preferred source, has the same acquisition."""
        return self.listed - len(self.refused) - len(self.scenes)


class NothingFoundError(SceneError):
    """A search that was answered, and found nothing usable."""

    def __init__(self, message: str, found: Found) -> None:
        super().__init__(message)
        self.found = found
        """No scene, but what was listed, and why it was refused."""


def search(site: Site, year: int, *sources: Source) -> Found:
    """All usable scenes of one calendar year over a site, of the sources in order of preference.

    Each acquisition comes from the first source that lists it, in its newest baseline. Searched month by month; ids are
    counted once and compared with what the API says it has. Items that cannot be used are logged and kept with the reason.

    Raises:
        NothingFoundError: no source has a usable scene.
        SceneError: the year lies outside the mission, a source does not answer, or pages were lost.
    """
    check_years([year])
    area = area_of(grid_of(site))
    listed, kept = 0, []
    refused: dict[str, str] = {}
    for source in sources:
        reasons: dict[str, str] = {}
        usable_here: list[pystac.Item] = []
        for number, feature in enumerate(items_of(source, area, year), 1):
            listed_id = feature.get("id")
            name = f"without id ({number} of {source.id})" if listed_id in (None, "") else str(listed_id)
            scene = _scene(feature, name, source)
            if isinstance(scene, str):
                reasons[name] = scene
            else:
                usable_here.append(scene)
        _log_refused(reasons)
        listed += len(usable_here) + len(reasons)
        refused |= reasons
        kept.append(deduplicate(usable_here))
    found = Found(scenes=tuple(merge(kept)), listed=listed, refused=refused)
    if not found.scenes:
        box = ", ".join(f"{v:.3f}" for v in area.bounds)
        where = " and ".join(f"{s.collection} at {s.href}" for s in sources)
        why = f" ({next(iter(refused.values()))})" if refused else ""
        raise NothingFoundError(
            f"no scene of {year} over {site.id} (west, south, east, north {box}) in {where}: "
            f"{listed} listed, {len(refused)} refused{why}; try another year or --source, or check the site's polygon",
            found,
        )
    return found


def _scene(feature: Mapping[str, Any], name: str, source: Source) -> pystac.Item | str:
    """Normalise an item, or return why it is refused."""
    try:
        return normalise(item_of(feature, name), source)
    except SceneError as error:
        return str(error)
    except Exception as error:  # Libraries raise errors of many classes. One item must not end a search.
        log.debug("item %s", name, exc_info=True)
        return f"item {name}: is malformed ({type(error).__name__}: {error}); it is refused"


def _log_refused(reasons: Mapping[str, str]) -> None:
    """Warn of refused items by name: one line for each reason, since a file may hold hundreds of another collection."""
    alike: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        kind = _FOUND.sub("found", reason.replace(name, "{}"))
        alike.setdefault(kind, []).append(name)
    for names in alike.values():
        others = ", ".join(names[1:_NAMED]) + ", ..." * (len(names) > _NAMED)
        log.warning("%s%s", reasons[names[0]], f", and so are {len(names) - 1} more: {others}" if others else "")


def check_years(years: Iterable[int]) -> None:
    """Raises SceneError for a year in which Sentinel-2 took no image."""
    for year in years:
        if not has_images(year):
            last = datetime.now(tz=UTC).year
            raise SceneError(f"year {year}: expected {FIRST_YEAR}..{last}; Sentinel-2 has images of no other year")


def has_images(year: int) -> bool:
    """Whether Sentinel-2 took images in that year."""
    return FIRST_YEAR <= year <= datetime.now(tz=UTC).year


def select(scenes: Sequence[pystac.Item], recipe: Recipe) -> list[pystac.Item]:
    """The scenes a recipe uses: those of its months, and of the wider season it falls back on, not cloudier than it allows.

    Raises:
        SceneError: those of its months are of fewer dates than the recipe asks for; says how many there were and what to widen.
    """
    chosen = usable(scenes, recipe)
    if len(dates(chosen)) < recipe.min_dates:
        in_season = [s for s in scenes if s.datetime and s.datetime.month in recipe.months]
        found = f"{len(chosen)} of {len(dates(chosen))} dates" if chosen else "none"
        raise SceneError(
            f"recipe {recipe.id!r} uses {found} of {len(scenes)} scenes, and needs {recipe.min_dates} dates: "
            f"{len(in_season)} are in months {list(recipe.months)}, {len(chosen)} of those at most "
            f"{recipe.max_cloud_cover:g} % cloudy; widen months, max_cloud_cover or min_dates in a recipe of your own, or "
            "name one more --source"
        )
    return chosen + _of_months(scenes, recipe, recipe.wider_months)


def need_dates(scenes: Sequence[pystac.Item], recipe: Recipe, year: int) -> None:
    """Raise SceneError if the scenes of a year, of a recipe's months, are of fewer dates than the recipe needs."""
    days = dates([s for s in usable(scenes, recipe) if s.datetime and s.datetime.year == year])
    if len(days) < recipe.min_dates:
        raise SceneError(
            f"{len(days)} dates of {year} are left, and recipe {recipe.id!r} needs {recipe.min_dates}: the others were left "
            "out for their offset or their place; name one more --source, or lower min_dates in a recipe of your own"
        )


def usable(scenes: Iterable[pystac.Item], recipe: Recipe) -> list[pystac.Item]:
    """The scenes of a recipe's months that are not cloudier than it allows, however few they are."""
    return _of_months(scenes, recipe, recipe.months)


def _of_months(scenes: Iterable[pystac.Item], recipe: Recipe, months: Sequence[int]) -> list[pystac.Item]:
    in_season = [s for s in scenes if s.datetime and s.datetime.month in months]
    # Of unknown cloud cover, too: the mask sees the clouds, and this number only spares reading the worst.
    return [s for s in in_season if (s.properties["eo:cloud_cover"] or 0) <= recipe.max_cloud_cover]


def mean_cloud_cover(scenes: Iterable[pystac.Item]) -> float:
    """The mean of the scenes whose cloud cover is known, in percent; NaN if it is known of none."""
    shares = [s.properties["eo:cloud_cover"] for s in scenes if s.properties["eo:cloud_cover"] is not None]
    return sum(shares) / len(shares) if shares else math.nan


def dates(scenes: Iterable[pystac.Item]) -> list[str]:
    """The solar days on which they were taken, YYYY-MM-DD, each once."""
    return sorted({s.properties["minecube:solar_day"] for s in scenes})


def belonging(scenes: Sequence[pystac.Item], site: Site, year: int, sources: Sequence[Source]) -> None:
    """Check that a saved list belongs to a year, sources and place, and that its sources allow its files.

    A list of another place would come out as zeros. A list that somebody else made could name any file.

    Raises:
        SceneError: it does not belong to them, or names a file that must not be read.
    """
    area, known = area_of(grid_of(site)), {s.id for s in sources}
    years = {s.datetime.year for s in scenes if s.datetime} - {year}
    foreign = {str(s.properties.get("minecube:source")) for s in scenes} - known
    elsewhere = [s for s in scenes if not over(s, area)]
    wrong = [f"of {y}" for y in years] + [f"from {s}" for s in foreign] + [f"elsewhere ({s.id})" for s in elsewhere]
    if wrong:
        raise SceneError(
            f"the saved list for {site.id} {year} from {', '.join(sorted(known))} holds scenes {wrong[0]}; it belongs to "
            "something else, so remove it or name another folder"
        )
    by_id = {s.id: s for s in sources}
    for scene in scenes:
        source = by_id[scene.properties["minecube:source"]]
        need_allowed(scene, source)
        if not same_access(scene, source):
            raise SceneError(f"scene {scene.id}: its files are got at in another way than {source.id} says; search again")
        origin = scene.properties.get("minecube:origin")
        if origin != origin_of(source.href):
            raise SceneError(
                f"scene {scene.id}: expected a scene listed by {origin_of(source.href) or 'a local file'}, found {origin!r}. "
                "Remove the saved list to search again."
            )
