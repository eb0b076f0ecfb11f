"""Find copies of scenes with missing files, in a later source of `--source a,b`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import pystac

from minecube import scenes
from minecube.catalog import SCL, Source
from minecube.errors import SceneError, UnusableFileError
from minecube.reader import find_missing

log = logging.getLogger(__name__)


class Copies:
    """Copies of the same acquisition, for scenes of one site-year with missing files.

    Args:
        sources: In order of preference.
        bands: Bands a copy must have, next to SCL.
        find: Lists the scenes of a year in one source. May raise SceneError.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        bands: Sequence[str],
        find: Callable[[int, Source], scenes.SearchResult],
    ) -> None:
        self._order = [source.id for source in sources]
        self._sources = sources
        self._bands = (SCL, *bands)
        self._find = find
        self._listed: dict[tuple[int, str], Sequence[pystac.Item]] = {}
        self.copies: dict[str, pystac.Item] = {}
        """Scene id -> its copy."""
        self.reasons: dict[str, str] = {}
        """Scene id -> its missing file."""
        self.possible = len(sources) > 1
        """Whether another missing file may have a copy."""

    def take(
        self, originals: Sequence[pystac.Item], error: UnusableFileError | None = None
    ) -> bool:
        """Look for copies of all scenes with a missing file. Returns whether there are new copies.

        Checks all scenes after one error, since missing files are seldom alone. If an error brings
        no new copy, `possible` becomes False.
        """
        earlier = dict(self.copies)
        for scene in originals:
            current = self.copies.get(scene.id, scene)
            reason = self._missing_file(current, error)
            if reason:
                self._replace(scene, current, reason)
        changed = self.copies != earlier
        self.possible = error is None or changed
        return changed

    def replace_in(self, originals: Sequence[pystac.Item]) -> list[pystac.Item]:
        """Return the scenes, each copy in place of its original."""
        return [self.copies.get(scene.id, scene) for scene in originals]

    def describe(self) -> dict[str, str]:
        """Describe the missing file and the copy read instead, by scene id."""
        return {
            name: (
                f"{self.reasons[name]}; "
                f"read {copy.id} of {copy.properties['minecube:source']} instead"
            )
            for name, copy in self.copies.items()
        }

    def _missing_file(self, scene: pystac.Item, error: UnusableFileError | None) -> str:
        """Describe the scene's missing file.

        Returns "" if all files exist, or if no later source is left.
        """
        if not self._later_sources(scene):
            return ""
        bands = [band for band in self._bands if band in scene.assets]
        reason = find_missing(scene, bands)
        if reason or error is None:
            return reason
        for band in bands:
            if scene.assets[band].href == error.href:
                return f"{band} cannot be read"
        return ""

    def _later_sources(self, scene: pystac.Item) -> Sequence[Source]:
        return self._sources[self._order.index(scene.properties["minecube:source"]) + 1 :]

    def _replace(self, scene: pystac.Item, current: pystac.Item, reason: str) -> None:
        """Take the first copy with all its files, in the order of the later sources."""
        for source in self._later_sources(current):
            for copy in scenes.find_copies(scene, self._scenes_of(scene, source)):
                if not copy.assets.keys() >= set(self._bands) or find_missing(copy, self._bands):
                    continue
                self.copies[scene.id] = copy
                self.reasons[scene.id] = reason
                log.warning(
                    "scene %s: %s; %s of source %s is read instead",
                    scene.id,
                    reason,
                    copy.id,
                    source.id,
                )
                return

    def _scenes_of(self, scene: pystac.Item, source: Source) -> Sequence[pystac.Item]:
        """Return a source's scenes of the scene's year, or () if the search fails."""
        year = 0
        if scene.datetime:
            year = scene.datetime.year
        key = (year, source.id)
        if key not in self._listed:
            try:
                self._listed[key] = self._find(year, source).scenes
            except SceneError as error:
                log.warning("source %s: no copies can be taken from it (%s)", source.id, error)
                self._listed[key] = ()
        return self._listed[key]
