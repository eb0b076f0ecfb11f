"""Find copies of one acquisition, and keep the best one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import datetime, timedelta

import pystac

from minecube.errors import SceneError
from minecube.scenes.item_values import read_property, refusal
from minecube.scenes.product import read_product_name

_SAME_GRANULE_S = 2
"""Largest difference in a granule's start between processings.

Parts of a split datatake start many seconds apart.
"""


def identify_acquisition(item: pystac.Item) -> tuple[str, str]:
    """Return (datatake, granule start), equal for all processings and providers of an acquisition.

    The datatake is the satellite and the start of sensing, for example `S2A_20200302T102021`. It is
    read from the datatake's or the product's name. The granule start is the datastrip's sensing
    start. It separates the two granules of a split datatake (Sentinel-2 PSD 14.9, section 3.4).
    Without a datastrip, it is read from the granule's folder or the item's id.

    Raises:
        SceneError: the item lacks one of the two.
    """
    name = read_property(item, "s2:datatake_id", "eopf:datatake_id", "sentinel:datatake_id")
    name = name or read_product_name(item)
    datatake = re.match(r"G?(S2[A-D])_(?:MSIL2A_)?(\d{8}T\d{6})_", name)
    if not datatake:
        raise _unidentified(item, f"no datatake, found {name!r}")
    start = _granule_start(item)
    if not start:
        raise _unidentified(item, f"datatake {name!r} without datastrip or granule")
    return f"{datatake[1]}_{datatake[2]}", start


def _granule_start(item: pystac.Item) -> str:
    """Return the sensing start of the datastrip or granule, or an empty text."""
    strip = read_property(item, "s2:datastrip_id", "eopf:datastrip_id", "sentinel:datastrip_id")
    start = re.search(r"_S(\d{8}T\d{6})", strip)
    if start:
        return start[1]
    for asset in item.assets.values():
        start = re.search(r"/L2A_T\w{5}_A\d{6}_(\d{8}T\d{6})/", asset.href)
        if start:
            return start[1]
    start = re.fullmatch(r"S2[A-D]_T\w{5}_(\d{8}T\d{6})_L2A", item.id)
    return start[1] if start else ""


def _unidentified(item: pystac.Item, problem: str) -> SceneError:
    hint = ""
    if any(name.startswith("sentinel:") for name in item.properties):
        hint = (
            "; sentinel:* properties are those of Earth Search v0, "
            "so list it from its successor, earth-search"
        )
    return refusal(
        item, f"names no acquisition ({problem}), so copies of it could be counted twice{hint}"
    )


def compute_solar_day(time: datetime, tile: str) -> str:
    """Return the local solar date, YYYY-MM-DD, shared by tiles and granules of one overpass.

    It depends on the centre of the tile's UTM zone. Unlike a footprint's centre, this does not jump
    at the antimeridian.
    """
    longitude = 6 * int(tile[:2]) - 183
    return (time + timedelta(hours=longitude / 15)).date().isoformat()


def deduplicate(scenes: Iterable[pystac.Item]) -> list[pystac.Item]:
    """Keep one scene per acquisition and tile: the newest baseline, then the newest processing.

    The order of the input does not matter. The two granules of a split datatake start at different
    times, and both stay.
    """
    return [max(copies, key=_version) for copies in group_copies(scenes)]


def _version(scene: pystac.Item) -> tuple[str, str, str]:
    properties = scene.properties
    return properties["s2:processing_baseline"], properties["minecube:generated"], scene.id


def merge_sources(lists: Iterable[Iterable[pystac.Item]]) -> list[pystac.Item]:
    """Merge scenes of several sources, in order of preference. Keep the first source's copy.

    A newer baseline of a later source does not count. Each source's list is already reduced to its
    newest baselines.
    """
    ranked = [(rank, scene) for rank, listed in enumerate(lists) for scene in listed]
    ranks = {id(scene): rank for rank, scene in ranked}
    groups = group_copies(scene for _, scene in ranked)
    return [min(copies, key=lambda scene: ranks[id(scene)]) for copies in groups]


def find_copies(scene: pystac.Item, listed: Iterable[pystac.Item]) -> list[pystac.Item]:
    """Return the listed scenes of the same acquisition and tile as another scene."""
    groups = group_copies([scene, *listed])
    copies = next(group for group in groups if any(copy is scene for copy in group))
    return [copy for copy in copies if copy is not scene]


def group_copies(scenes: Iterable[pystac.Item]) -> list[list[pystac.Item]]:
    """Group copies. Groups are ordered by the time and id of their first scene."""
    by_datatake: dict[tuple[str, str], list[pystac.Item]] = {}
    for scene in scenes:
        key = (scene.properties["minecube:datatake"], scene.properties["s2:mgrs_tile"])
        by_datatake.setdefault(key, []).append(scene)
    groups: list[list[pystac.Item]] = []
    for copies in by_datatake.values():
        previous_start = datetime.min
        for scene in sorted(copies, key=lambda copy: (_start_of(copy), copy.id)):
            start = _start_of(scene)
            if (start - previous_start).total_seconds() > _SAME_GRANULE_S:
                groups.append([])
            groups[-1].append(scene)
            previous_start = start
    return sorted(groups, key=_time_and_id)


def _start_of(scene: pystac.Item) -> datetime:
    return datetime.strptime(scene.properties["minecube:granule_start"], "%Y%m%dT%H%M%S")


def _time_and_id(group: Iterable[pystac.Item]) -> tuple[str, str]:
    return min((str(scene.datetime), scene.id) for scene in group)
