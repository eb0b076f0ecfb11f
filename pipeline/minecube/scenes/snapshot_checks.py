"""Check that a saved list of scenes belongs to a site-year and its sources."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import pystac

from minecube.catalog import Site, Source
from minecube.errors import SceneError
from minecube.grid import area_of, grid_of
from minecube.network import origin_of
from minecube.scenes.assets import has_same_access, need_allowed
from minecube.scenes.footprints import lies_over


def check_saved_scenes(
    scenes: Sequence[pystac.Item], site: Site, year: int, sources: Sequence[Source]
) -> None:
    """Check the year, sources, place and files of a saved list.

    A list of another place would produce zeros. A list from a stranger could name any file.

    Raises:
        SceneError: the list belongs to something else, or names a forbidden file.
    """
    source_by_id = {source.id: source for source in sources}
    fault = next(_foreign_scenes(scenes, site, year, source_by_id.keys()), None)
    if fault:
        raise SceneError(
            f"the saved list for {site.id} {year} from {', '.join(sorted(source_by_id))} "
            f"holds scenes {fault}; it belongs to "
            "something else, so remove it or name another folder"
        )
    for scene in scenes:
        _check_files(scene, source_by_id[scene.properties["minecube:source"]])


def _foreign_scenes(
    scenes: Sequence[pystac.Item], site: Site, year: int, source_ids: Iterable[str]
) -> Iterator[str]:
    """Describe the other years and sources of the scenes, and each scene of another place."""
    years = {scene.datetime.year for scene in scenes if scene.datetime}
    for other_year in years - {year}:
        yield f"of {other_year}"
    ids = {str(scene.properties.get("minecube:source")) for scene in scenes}
    for source_id in ids.difference(source_ids):
        yield f"from {source_id}"
    area = area_of(grid_of(site))
    for scene in scenes:
        if not lies_over(scene, area):
            yield f"elsewhere ({scene.id})"


def _check_files(scene: pystac.Item, source: Source) -> None:
    """Raise SceneError if a scene's files, access or origin differ from its source's."""
    need_allowed(scene, source)
    if not has_same_access(scene, source):
        raise SceneError(
            f"scene {scene.id}: expected the access rules of source {source.id}, found others; "
            "search again"
        )
    origin = scene.properties.get("minecube:origin")
    if origin != origin_of(source.href):
        raise SceneError(
            f"scene {scene.id}: expected a scene listed by "
            f"{origin_of(source.href) or 'a local file'}, found {origin!r}. "
            "Remove the saved list to search again."
        )
