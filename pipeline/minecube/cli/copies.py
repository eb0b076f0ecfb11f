"""Find copies of scenes with missing files, in a later source of `--source a,b`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import pystac

from minecube import scenes
from minecube.catalog import SCL, Source
from minecube.errors import GoneError, SceneError
from minecube.reader import missing

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
        find: Callable[[int, Source], scenes.Found],
    ) -> None:
        self._order = [source.id for source in sources]
        self._sources = sources
        self._bands = (SCL, *bands)
        self._find = find
        self._listed: dict[tuple[int, str], Sequence[pystac.Item]] = {}
        self.found: dict[str, pystac.Item] = {}
        """Scene id -> its copy."""
        self.why: dict[str, str] = {}
        """Scene id -> its missing file."""
        self.possible = len(sources) > 1
        """Whether another missing file may have a copy."""

    def take(self, chosen: Sequence[pystac.Item], error: GoneError | None = None) -> bool:
        """Look for copies of all scenes with a missing file. Returns whether it found new copies.

        Checks all scenes after one error, since missing files are seldom alone. If an error brings
        no new copy, `possible` becomes False.
        """
        before = dict(self.found)
        for scene in chosen:
            current = self.found.get(scene.id, scene)
            why = self._gone(current, error)
            if why:
                self._replace(scene, current, why)
        self.possible = error is None or self.found != before
        return self.found != before

    def in_place(self, chosen: Sequence[pystac.Item]) -> list[pystac.Item]:
        """Return the scenes, each copy in place of its original."""
        return [self.found.get(scene.id, scene) for scene in chosen]

    def said(self) -> dict[str, str]:
        """Describe the missing file and the copy read instead, by scene id."""
        return {
            name: f"{self.why[name]}; read {copy.id} of {copy.properties['minecube:source']} instead"
            for name, copy in self.found.items()
        }

    def _gone(self, scene: pystac.Item, error: GoneError | None) -> str:
        """Describe the scene's missing file.

        Returns "" if all files exist, or if no later source is left.
        """
        if not self._later(scene):
            return ""
        bands = [band for band in self._bands if band in scene.assets]
        broken = next(
            (band for band in bands if error and scene.assets[band].href == error.href), ""
        )
        return missing(scene, bands) or (f"{broken} cannot be read" if broken else "")

    def _later(self, scene: pystac.Item) -> Sequence[Source]:
        return self._sources[self._order.index(scene.properties["minecube:source"]) + 1 :]

    def _replace(self, scene: pystac.Item, current: pystac.Item, why: str) -> None:
        """Take the first copy with all its files, in the order of the later sources."""
        for source in self._later(current):
            for copy in scenes.copies_of(scene, self._scenes_of(scene, source)):
                if all(band in copy.assets for band in self._bands) and not missing(
                    copy, self._bands
                ):
                    self.found[scene.id] = copy
                    self.why[scene.id] = why
                    log.warning(
                        "scene %s: %s; %s of source %s is read instead",
                        scene.id,
                        why,
                        copy.id,
                        source.id,
                    )
                    return

    def _scenes_of(self, scene: pystac.Item, source: Source) -> Sequence[pystac.Item]:
        """Return a source's scenes of the scene's year, or () if the search fails."""
        year = scene.datetime.year if scene.datetime else 0
        key = (year, source.id)
        if key not in self._listed:
            try:
                self._listed[key] = self._find(year, source).scenes
            except SceneError as error:
                log.warning("source %s: no copies can be taken from it (%s)", source.id, error)
                self._listed[key] = ()
        return self._listed[key]
