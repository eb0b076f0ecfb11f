"""Find the scenes of site-years, and keep their lists in a folder.

A build from a saved list needs no search, so it can be repeated with the same scenes.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

from minecube import cube, scenes
from minecube.catalog import Recipe, Site, Source
from minecube.digests import sha256_of_json
from minecube.errors import PlaceError
from minecube.network import origin_of
from minecube.places import Place, Url, local_copy, outgoing, place_of
from minecube.scenes import snapshot

log = logging.getLogger(__name__)

FindScenes = Callable[[Site, int, Sequence[Source], Place], scenes.SearchResult]
"""Finds the scenes of a site and year in sources, with a folder of lists."""
HashList = Callable[[Site, int, Sequence[Source], Place], str | None]
"""Hashes the saved list of a site and year, as `hash_list`."""

LISTING_LAG = timedelta(days=2)
"""Time until a pass counts as missing, and a list as complete. Products are made and listed within about a day."""
_CACHED_LISTS = 4  # a year, its two neighbours, and the next year


def default_folder(store: cube.Store) -> Place:
    """Return the folder of scene lists for a store. It is next to the store.

    Before, lists for a store at a URL were in the current folder. Lists found there are used.

    Raises:
        PlaceError: the store is a whole bucket, so nothing is next to it.
    """
    name = store.name.rstrip("/")
    local_folder = Path(f"{name.rpartition('/')[2]}-scenes")
    if store.path is None and local_folder.is_dir():
        log.warning(
            "%s: using the scene lists in this folder; to keep them next to the store, "
            "move them to %s-scenes",
            local_folder,
            name,
        )
        return local_folder
    if store.path is None and not Url(name).key:
        raise PlaceError(
            f"{name}: is a whole bucket, so no folder of scene lists can be next to it; "
            "name one with --scenes"
        )
    return place_of(f"{name}-scenes")


def path_of_list(site: Site, year: int, sources: Sequence[Source], folder: Place) -> Place:
    """Return the path or URL of the site-year's scene list."""
    return folder / name_list(site.id, year, sources)


def name_list(site: str, year: int, sources: Sequence[Source]) -> str:
    """Return the name of the file of a site-year's scene list."""
    return f"{site}_{year}_{'+'.join([source.id for source in sources])}.parquet"


def complete_day(recipe: Recipe, year: int) -> date:
    """Return the first day on which a list can have all scenes of a year for a recipe."""
    last_month = max(*recipe.months, *recipe.wider_months)
    next_month = date(year + last_month // 12, last_month % 12 + 1, 1)
    return next_month + LISTING_LAG


def is_early(saved: float, recipe: Recipe, year: int) -> bool:
    """Whether a list saved at this time lacks scenes that a search would find today.

    A list may be saved in January, as the neighbour of the year before. `saved` is in seconds since
    1970.
    """
    saved_on = datetime.fromtimestamp(saved, tz=UTC).date()
    return saved_on < complete_day(recipe, year) <= datetime.now(tz=UTC).date()


def load_or_search(
    site: Site, year: int, sources: Sequence[Source], folder: Place
) -> scenes.SearchResult:
    """Load the site-year's scenes from its saved list. Without a list, search them.

    Raises:
        SceneError: the list belongs to another search, or the search had no usable scene.
    """
    listed = load_list(site, year, sources, folder)
    return scenes.search(site, year, *sources) if listed is None else listed


def load_list(
    site: Site, year: int, sources: Sequence[Source], folder: Place
) -> scenes.SearchResult | None:
    """Load the saved list of a site-year; None without a list. An object is not looked up before.

    Raises:
        SceneError: the list belongs to another search.
    """
    place = path_of_list(site, year, sources, folder)
    if isinstance(place, Path) and not place.exists():
        return None
    try:
        with local_copy(place) as path:
            listed = snapshot.load(path)
            scenes.check_saved_scenes(listed.scenes, site, year, sources)
            snapshot.check_search_hash(path, snapshot.hash_search(site, year, sources))
    except PlaceError:  # the object is missing
        return None
    return listed


def hash_list(site: Site, year: int, sources: Sequence[Source], folder: Place) -> str | None:
    """Hash the file of a saved scene list, with all that `load_or_search` checks it against.

    An equal hash means the same scenes, and that they pass the same checks. No scene is read, so
    this takes 0.2 ms instead of 20. Returns None if the list is missing or cannot be read.
    """
    try:
        content = path_of_list(site, year, sources, folder).read_bytes()
    except (OSError, PlaceError):
        return None
    return sha256_of_json(
        {
            "file": hashlib.sha256(content).hexdigest(),
            "search": snapshot.hash_search(site, year, sources),
            "origins": [origin_of(source.href) for source in sources],
        }
    )


def load_or_save(
    site: Site, year: int, sources: Sequence[Source], folder: Place
) -> scenes.SearchResult:
    """Find the site-year's scenes as `load_or_search` does, and save their list.

    A later run then builds from the same list.
    """
    listed = load_list(site, year, sources, folder)
    return search_and_save(site, year, sources, folder) if listed is None else listed


def search_and_save(
    site: Site, year: int, sources: Sequence[Source], folder: Place
) -> scenes.SearchResult:
    """Search the site-year's scenes, and save their list in place of an older list.

    Raises SceneError if the search had no usable scene, or no answer.
    """
    listed = scenes.search(site, year, *sources)
    save_list(listed, site, year, sources, folder)
    return listed


def save_list(
    listed: scenes.SearchResult, site: Site, year: int, sources: Sequence[Source], folder: Place
) -> None:
    """Save the result of a search in place of an older list. Raises CubeError if it fails."""
    with outgoing(path_of_list(site, year, sources, folder)) as path:
        snapshot.save(listed, path, snapshot.hash_search(site, year, sources))


def cache_lists(find: FindScenes) -> FindScenes:
    """Add a cache of the last lists to `load_or_search` or `load_or_save`.

    A list may be needed three times: for its own year and for both neighbours.
    """
    lists: dict[tuple[str, int], scenes.SearchResult] = {}

    def find_cached(
        site: Site, year: int, sources: Sequence[Source], folder: Place
    ) -> scenes.SearchResult:
        key = (site.id, year)
        if key not in lists:
            if len(lists) >= _CACHED_LISTS:
                del lists[next(iter(lists))]
            lists[key] = find(site, year, sources, folder)
        return lists[key]

    return find_cached
