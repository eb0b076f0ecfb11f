"""Describe the origin of a site-year, and name its build by a hash of the origin."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from odc.geo.geobox import GeoBox

from minecube.catalog import Recipe, Site, as_dict
from minecube.digests import sha256_of_json

LEFT_OUT = "left_out"
"""Attribute of an unused scene in a provenance: the reason."""
COPY_OF = "copy_of"
"""Attribute of a copy in a provenance, read in place of a scene with missing files: that scene's
id."""
VALUE_FAULTS = "value_faults"
"""Entry of a provenance with faults in the values of scenes, if there are any."""
_LIBRARIES = ("minecube", "numpy", "dask", "rasterio", "stackstac", "zarr")
_DECISIONS = ("on_offset_conflict", "offset_conflicts", "scl_errors", "shifts")
"""Entries of a provenance with decisions on doubtful scenes."""


def describe_build(
    site: Site, year: int, grid: GeoBox, recipe: Recipe, scenes: Sequence[Any], **more: Any
) -> dict[str, Any]:
    """Describe the origin of a site-year as plain JSON: the input of `hash_build` and more."""
    return {
        "site": site.id,
        "year": year,
        "grid": describe_grid(grid),
        "recipe": as_dict(recipe),
        "scenes": _sort_by_id([_describe_scene(scene) for scene in scenes]),
        "version": _version_of("minecube"),
        "libraries": {name: _version_of(name) for name in _LIBRARIES},
        **more,
    }


@functools.cache
def _version_of(library: str) -> str:
    """Return the version of an installed library. Reading it takes 0.4 ms."""
    return metadata.version(library)


def describe_grid(grid: GeoBox) -> dict[str, Any]:
    """Return a grid's entry in a provenance."""
    return {
        "crs": f"EPSG:{grid.crs.epsg}",
        "transform": list(grid.transform)[:6],
        "shape": list(grid.shape),
    }


def _describe_scene(scene: Any) -> dict[str, Any]:
    return {
        "id": scene.id,
        "source": scene.properties["minecube:source"],
        "baseline": scene.properties["s2:processing_baseline"],
        "offset": scene.properties["minecube:offset"],
        "offset_reason": scene.properties["minecube:offset_reason"],
    }


def _sort_by_id(scenes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(scenes, key=lambda scene: str(scene["id"]))


def hash_build(provenance: Mapping[str, Any]) -> str:
    """Hash a build's site, year, grid, recipe, scenes and version to 16 hexadecimal digits."""
    identity = {name: provenance[name] for name in ("site", "year", "grid", "version")}
    # Scenes left out later still count: the build is named by its listed scenes.
    # Copies do not count: the original's files may be back at the next build.
    originals = [scene for scene in provenance["scenes"] if COPY_OF not in scene]
    identity["scenes"] = [_drop(scene, LEFT_OUT) for scene in originals]
    identity["recipe"] = untitled(provenance["recipe"])
    return sha256_of_json(identity)[:16]


def hash_inputs(
    site: Site, year: int, grid: GeoBox, recipe: Recipe, scene_lists: Sequence[str]
) -> str:
    """Hash what a build is named by, with hashes of scene lists in place of scenes.

    The same version of minecube makes the same build from equal inputs. A run compares inputs
    without reading scenes.
    """
    return sha256_of_json(
        {
            "site": site.id,
            "year": year,
            "grid": describe_grid(grid),
            "recipe": untitled(as_dict(recipe)),
            "scene_lists": list(scene_lists),
            "version": _version_of("minecube"),
        }
    )


def hash_run(provenance: Mapping[str, Any]) -> str:
    """Hash the common inputs of a year's blocks: the build, and decisions on doubtful scenes."""
    decisions: list[Any] = [provenance.get(name) for name in _DECISIONS]
    if VALUE_FAULTS in provenance:
        # Details depend on the block that found a fault first. They change no pixels.
        decisions.append([[fault["scene"], fault["fault"]] for fault in provenance[VALUE_FAULTS]])
    copies = [scene for scene in provenance["scenes"] if COPY_OF in scene]
    decisions += [[scene["id"], scene["source"]] for scene in copies]
    return sha256_of_json([hash_build(provenance), decisions])[:16]


def untitled(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe without its title, which does not change pixels."""
    return _drop(recipe, "title")


def _drop(entries: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in entries.items() if key != name}


def leave_out(provenance: dict[str, Any], why: Mapping[str, str]) -> None:
    """Note the scenes left out after the search in a provenance (scene id -> reason)."""
    for scene in list_used_scenes(provenance):
        if scene["id"] in why:
            scene[LEFT_OUT] = why[scene["id"]]


def note_copies(
    provenance: dict[str, Any], copies: Mapping[str, Any], why: Mapping[str, str]
) -> None:
    """Note copies, read from other sources, in a provenance.

    `copies` maps the id of a scene to its copy, and `why` maps it to the scene's missing file.
    """
    leave_out(provenance, {scene_id: why[scene_id] for scene_id in copies})
    entries = [{**_describe_scene(copy), COPY_OF: scene_id} for scene_id, copy in copies.items()]
    provenance["scenes"] = _sort_by_id([*provenance["scenes"], *entries])


def list_used_scenes(provenance: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the used scenes of a provenance."""
    return [scene for scene in provenance["scenes"] if LEFT_OUT not in scene]
