"""STAC search to normalised, deduplicated scenes, saved as stac-geoparquet before pixels are read.

A scene is a `pystac.Item` in the project's own terms, for every provider. It has the assets
B02..B12 and SCL, and `proj:code`. Properties under `minecube:` hold the source, the access to its
files and the acquisition. They also hold the radiometric offset still in the pixels, with the
reason for it.

    find.py       Searches APIs and files of items: every page, each item once.
    normalise.py  Turns a provider's item into a scene, finds copies, ranks sources.
    snapshot.py   Saves the list of a site-year, with its hash.
    offsets.py    Checks the decided offset in the pixels.
    coverage.py   Compares the scenes found with the passes expected from the orbits.
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
"""A malformed value in a reason. It differs between items."""
_NAMED = 9
"""Largest number of refused items in a warning. The scene list has all."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """Result of a search: the scenes, and the reasons for refused items."""

    scenes: tuple[pystac.Item, ...]
    """Normalised, one per acquisition and tile, ordered by time and id."""
    listed: int = 0
    """Number of items listed by the sources."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Id of an unusable item -> reason."""

    @property
    def copies(self) -> int:
        """Count the items replaced by a newer processing or by a preferred source."""
        return self.listed - len(self.refused) - len(self.scenes)


class NothingFoundError(SceneError):
    """An answered search without any usable scene."""

    def __init__(self, message: str, found: Found) -> None:
        super().__init__(message)
        self.found = found
        """Has no scenes, only the number of listed items and the reasons for refusal."""


def search(site: Site, year: int, *sources: Source) -> Found:
    """Search all usable scenes of one calendar year over a site.

    Each acquisition comes from the first source with a usable scene of it, in its newest baseline.
    API searches run month by month. Each id counts once, and the total is compared with the API's
    own count. Unusable items are logged and kept with the reason.

    Args:
        site: the site.
        year: the calendar year.
        sources: in order of preference.

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
            name = (
                f"without id ({number} of {source.id})"
                if listed_id in (None, "")
                else str(listed_id)
            )
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
    """Normalise an item, or return the reason for its refusal."""
    try:
        return normalise(item_of(feature, name), source)
    except SceneError as error:
        return str(error)
    except (
        Exception
    ) as error:  # Libraries raise errors of many classes. One item must not end a search.
        log.debug("item %s", name, exc_info=True)
        return f"item {name}: is malformed ({type(error).__name__}: {error}); it is refused"


def _log_refused(reasons: Mapping[str, str]) -> None:
    """Log one warning per reason, with the names of the refused items.

    A file may hold hundreds of items of another collection.
    """
    alike: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        kind = _FOUND.sub("found", reason.replace(name, "{}"))
        alike.setdefault(kind, []).append(name)
    for names in alike.values():
        others = ", ".join(names[1:_NAMED]) + ", ..." * (len(names) > _NAMED)
        log.warning(
            "%s%s",
            reasons[names[0]],
            f", and so are {len(names) - 1} more: {others}" if others else "",
        )


def check_years(years: Iterable[int]) -> None:
    """Raise SceneError for a year without Sentinel-2 images."""
    for year in years:
        if not has_images(year):
            last = datetime.now(tz=UTC).year
            raise SceneError(
                f"year {year}: expected {FIRST_YEAR}..{last}; Sentinel-2 has images of no other year"
            )


def has_images(year: int) -> bool:
    """Return whether Sentinel-2 took images in the year."""
    return FIRST_YEAR <= year <= datetime.now(tz=UTC).year


def select(scenes: Sequence[pystac.Item], recipe: Recipe) -> list[pystac.Item]:
    """Select the scenes for a recipe.

    They lie in the recipe's months or wider months, and have at most its `max_cloud_cover`.

    Raises:
        SceneError: the scenes of the recipe's months have fewer dates than `min_dates`.
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
    """Raise SceneError if a year's usable scenes have fewer dates than the recipe's `min_dates`."""
    days = dates([s for s in usable(scenes, recipe) if s.datetime and s.datetime.year == year])
    if len(days) < recipe.min_dates:
        raise SceneError(
            f"{len(days)} dates of {year} are left, and recipe {recipe.id!r} needs {recipe.min_dates}: the others were left "
            "out for their offset or their place; name one more --source, or lower min_dates in a recipe of your own"
        )


def usable(scenes: Iterable[pystac.Item], recipe: Recipe) -> list[pystac.Item]:
    """Select the scenes of a recipe's months with at most its `max_cloud_cover`."""
    return _of_months(scenes, recipe, recipe.months)


def _of_months(
    scenes: Iterable[pystac.Item], recipe: Recipe, months: Sequence[int]
) -> list[pystac.Item]:
    in_season = [s for s in scenes if s.datetime and s.datetime.month in months]
    # Scenes of unknown cloud cover stay. The mask finds the clouds. This test only saves reads.
    return [s for s in in_season if (s.properties["eo:cloud_cover"] or 0) <= recipe.max_cloud_cover]


def mean_cloud_cover(scenes: Iterable[pystac.Item]) -> float:
    """Average the known cloud covers, in percent. Return NaN if no cloud cover is known."""
    shares = [
        s.properties["eo:cloud_cover"] for s in scenes if s.properties["eo:cloud_cover"] is not None
    ]
    return sum(shares) / len(shares) if shares else math.nan


def dates(scenes: Iterable[pystac.Item]) -> list[str]:
    """Return the scenes' distinct solar days, YYYY-MM-DD, sorted."""
    return sorted({s.properties["minecube:solar_day"] for s in scenes})


def belonging(
    scenes: Sequence[pystac.Item], site: Site, year: int, sources: Sequence[Source]
) -> None:
    """Check the year, sources, place and files of a saved list.

    A list of another place would produce zeros. A list from a stranger could name any file.

    Raises:
        SceneError: the list belongs to something else, or names a forbidden file.
    """
    area, known = area_of(grid_of(site)), {s.id for s in sources}
    years = {s.datetime.year for s in scenes if s.datetime} - {year}
    foreign = {str(s.properties.get("minecube:source")) for s in scenes} - known
    elsewhere = [s for s in scenes if not over(s, area)]
    wrong = (
        [f"of {y}" for y in years]
        + [f"from {s}" for s in foreign]
        + [f"elsewhere ({s.id})" for s in elsewhere]
    )
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
            raise SceneError(
                f"scene {scene.id}: its files are got at in another way than {source.id} says; search again"
            )
        origin = scene.properties.get("minecube:origin")
        if origin != origin_of(source.href):
            raise SceneError(
                f"scene {scene.id}: expected a scene listed by {origin_of(source.href) or 'a local file'}, found {origin!r}. "
                "Remove the saved list to search again."
            )
