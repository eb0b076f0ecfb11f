"""Compare the scene list of a site-year with a later search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pystac

from minecube.scenes.acquisitions import group_copies

_NAMED = {
    "datetime",  # pystac writes it in two forms; it names the acquisition
    "s2:processing_baseline",
    "minecube:source",
    "minecube:offset",
    "minecube:offset_reason",
}
"""Properties that are compared by themselves, or follow from one of them."""


@dataclass(frozen=True)
class SceneChange:
    """One acquisition that a later search lists in another way."""

    scene: str
    """Id of the scene; of the later one, if there are two."""
    kind: str
    """added, gone, reprocessed (another baseline or id) or changed."""
    detail: str = ""
    """What differs: old -> new."""


def compare_lists(old: Sequence[pystac.Item], new: Sequence[pystac.Item]) -> list[SceneChange]:
    """List the acquisitions that differ between two lists of one site-year, in order of time."""
    old_ids, new_ids = ({id(scene) for scene in listed} for listed in (old, new))
    changes = []
    for copies in group_copies([*old, *new]):
        earlier = [scene for scene in copies if id(scene) in old_ids]
        later = [scene for scene in copies if id(scene) in new_ids]
        if not earlier:
            changes.append(SceneChange(later[0].id, "added"))
        elif not later:
            changes.append(SceneChange(earlier[0].id, "gone"))
        elif details := _describe_differences(earlier[0], later[0]):
            kinds = {name for name, _ in details}
            kind = "reprocessed" if kinds & {"baseline", "id"} else "changed"
            detail = ", ".join(f"{name} {difference}" for name, difference in details)
            changes.append(SceneChange(later[0].id, kind, detail))
    return changes


def _describe_differences(old: pystac.Item, new: pystac.Item) -> list[tuple[str, str]]:
    values = [
        ("baseline", *(scene.properties["s2:processing_baseline"] for scene in (old, new))),
        ("id", old.id, new.id),
        ("source", *(scene.properties["minecube:source"] for scene in (old, new))),
        ("offset", *(scene.properties["minecube:offset"] for scene in (old, new))),
    ]
    differences = [
        (name, f"{before} -> {after}") for name, before, after in values if before != after
    ]
    if old.id != new.id:
        return differences  # everything else of another product differs, too
    moved = [band for band in new.assets if _href(old, band) != _href(new, band)]
    if moved:
        differences.append(("files", f"moved: {len(moved)} of {len(new.assets)}"))
    names = {*old.properties, *new.properties} - _NAMED
    other = sorted(name for name in names if old.properties.get(name) != new.properties.get(name))
    if other:
        differences.append(("properties", f"changed: {', '.join(other)}"))
    return differences


def _href(scene: pystac.Item, band: str) -> str:
    return scene.assets[band].href if band in scene.assets else ""
