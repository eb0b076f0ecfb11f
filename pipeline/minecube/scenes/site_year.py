"""Search the scenes of a site-year in several sources."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pystac
from shapely.geometry.base import BaseGeometry

from minecube.catalog import FIRST_YEAR, Site, Source
from minecube.errors import SceneError
from minecube.grid import area_of, grid_of
from minecube.scenes.acquisitions import deduplicate, merge_sources
from minecube.scenes.api import search_api
from minecube.scenes.features import Feature
from minecube.scenes.item_file import search_file
from minecube.scenes.listed_item import parse_item
from minecube.scenes.normalisation import normalise

log = logging.getLogger(__name__)

_MALFORMED_VALUE = re.compile(r"""found ('.*'|".*"|[0-9.]+)(?=;)""")
"""A malformed value in a reason. It differs between items."""
_MOST_NAMES = 9
"""Largest number of refused items in a warning. The scene list has all."""


@dataclass(frozen=True, kw_only=True)
class SearchResult:
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


class NoScenesError(SceneError):
    """An answered search without any usable scene."""

    def __init__(self, message: str, result: SearchResult) -> None:
        super().__init__(message)
        self.result = result
        """Has no scenes, only the number of listed items and the reasons for refusal."""


def search(site: Site, year: int, *sources: Source) -> SearchResult:
    """Search all usable scenes of one calendar year over a site.

    The sources are in order of preference. Each acquisition comes from the first source with a
    usable scene of it, in its newest baseline. API searches run month by month. Each id counts once,
    and the total is compared with the API's own count. Unusable items are logged and kept with the
    reason.

    Raises:
        NoScenesError: no source has a usable scene.
        SceneError: the year lies outside the mission, a source does not answer, or pages were lost.
    """
    check_years([year])
    area = area_of(grid_of(site))
    listed = 0
    scenes_by_source = []
    refused: dict[str, str] = {}
    for source in sources:
        scenes, reasons = _search_source(source, area, year)
        _log_refused(reasons)
        listed += len(scenes) + len(reasons)
        refused |= reasons
        scenes_by_source.append(deduplicate(scenes))
    result = SearchResult(
        scenes=tuple(merge_sources(scenes_by_source)), listed=listed, refused=refused
    )
    if not result.scenes:
        raise NoScenesError(_describe_empty(result, site, year, sources, area), result)
    return result


def _describe_empty(
    result: SearchResult, site: Site, year: int, sources: Iterable[Source], area: BaseGeometry
) -> str:
    box = ", ".join(f"{degrees:.3f}" for degrees in area.bounds)
    searched = " and ".join(f"{source.collection} at {source.href}" for source in sources)
    reason = ""
    if result.refused:
        reason = f" ({next(iter(result.refused.values()))})"
    return (
        f"no scene of {year} over {site.id} (west, south, east, north {box}) in {searched}: "
        f"{result.listed} listed, {len(result.refused)} refused{reason}; "
        "try another year or --source, or check the site's polygon"
    )


def _search_source(
    source: Source, area: BaseGeometry, year: int
) -> tuple[list[pystac.Item], dict[str, str]]:
    """Return the usable scenes of one source, and per refused item the reason."""
    scenes: list[pystac.Item] = []
    reasons: dict[str, str] = {}
    for number, feature in enumerate(list_features(source, area, year), 1):
        name = feature.get("id")
        if name in (None, ""):
            name = f"without id ({number} of {source.id})"
        scene = _normalise_or_explain(feature, str(name), source)
        if isinstance(scene, str):
            reasons[str(name)] = scene
        else:
            scenes.append(scene)
    return scenes, reasons


def list_features(source: Source, area: BaseGeometry, year: int) -> list[Feature]:
    """List a source's items for a calendar year and an area in EPSG:4326.

    Returns:
        GeoJSON features as the source lists them.

    Raises:
        UnansweredError: the source does not answer, or its pages differ from its own count.
        SceneError: a file of items is unusable, or a link leads to another host.
    """
    if source.kind == "stac-api":
        return search_api(source, area, year)
    return search_file(source, area, year)


def _normalise_or_explain(
    feature: Mapping[str, Any], name: str, source: Source
) -> pystac.Item | str:
    try:
        return normalise(parse_item(feature, name), source)
    except SceneError as error:
        return str(error)
    # Libraries raise errors of many classes. One item must not end a search.
    except Exception as error:
        log.debug("item %s", name, exc_info=True)
        return f"item {name}: is malformed ({type(error).__name__}: {error}); it is refused"


def _log_refused(reasons: Mapping[str, str]) -> None:
    """Log one warning per reason, with the names of the refused items.

    A file may hold hundreds of items of another collection.
    """
    names_by_kind: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        kind = _MALFORMED_VALUE.sub("found", reason.replace(name, "{}"))
        names_by_kind.setdefault(kind, []).append(name)
    for names in names_by_kind.values():
        twins = ""
        if len(names) > 1:
            listed = ", ".join(names[1:_MOST_NAMES]) + ", ..." * (len(names) > _MOST_NAMES)
            twins = f", and so are {len(names) - 1} more: {listed}"
        log.warning("%s%s", reasons[names[0]], twins)


def check_years(years: Iterable[int]) -> None:
    """Raise SceneError for a year without Sentinel-2 images."""
    for year in years:
        if not has_images(year):
            this_year = datetime.now(tz=UTC).year
            raise SceneError(
                f"year {year}: expected {FIRST_YEAR}..{this_year}; "
                "Sentinel-2 has images of no other year"
            )


def has_images(year: int) -> bool:
    """Return whether Sentinel-2 took images in the year."""
    return FIRST_YEAR <= year <= datetime.now(tz=UTC).year
