"""Count the scenes with faults in their pixels: the job of `minecube audit --pixels`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import pystac

from minecube.catalog import Recipe, Site, Source
from minecube.composite import registration, values
from minecube.errors import CatalogError
from minecube.grid import PIXEL_M, grid_of, iterate_blocks
from minecube.reader import Ledger, check_credentials
from minecube.scenes import coverage, offsets, select_usable
from minecube.scenes.looks import read_look

COLUMNS = ("checked", "wrapped", "stuck", "displaced", "strip", "offset", "moved")
"""Columns of counts: usable scenes with enough clear pixels, and those with each fault.

wrapped: numbers above 32767. stuck, displaced, strip: see `composite.values`. offset: the offset
contradicts the pixels. moved: the whole scene is displaced by more than the recipe allows.
"""
Findings = Mapping[tuple[str, str], frozenset[str]]
"""Source and id of each checked scene -> its faults, names of `COLUMNS`."""


def check_sources(sources: Sequence[Source], recipe: Recipe) -> None:
    """Raise CatalogError if the pixels of a source cannot be read."""
    for source in sources:
        missing = [band for band in recipe.bands if band not in source.bands()]
        if missing:
            raise CatalogError(
                f"--pixels: source {source.id!r} has no {', '.join(missing)}, "
                f"which recipe {recipe.id!r} needs; choose another --source or --recipe"
            )
        check_credentials(source.access, source.id)


def find_faults(site: Site, listing: coverage.Listing, recipe: Recipe) -> Findings:
    """Check the pixels of the usable scenes of a listing.

    Raises:
        ReadError: a pixel cannot be read.
    """
    grid = grid_of(site)
    scenes = select_usable(listing.result.scenes, recipe)
    ledger = Ledger()
    checked: set[str] = set()
    found: list[tuple[str, str]] = []
    for rows, columns in iterate_blocks(grid, recipe.block_px):
        faults, judged = values.check_scenes(scenes, grid[rows, columns], recipe, ledger)
        found += [(fault.scene, fault.fault) for fault in faults]
        checked |= judged
    found += [(struck["scene"], "wrapped") for struck in ledger.list_struck()]
    look = read_look(scenes, grid, ledger, recipe.bands)
    found += [
        (check.scene, "offset") for check in offsets.check_offsets(scenes, look) if check.conflict
    ]
    if recipe.registration:
        limit_m = recipe.registration.most_px * PIXEL_M
        shifts = registration.measure_shifts(scenes, grid, ledger)
        found += [(shift.scene, "moved") for shift in shifts if shift.distance_m > limit_m]
    return {
        _key(scene): frozenset(name for scene_id, name in found if scene_id == scene.id)
        for scene in scenes
        if scene.id in checked or any(scene_id == scene.id for scene_id, _ in found)
    }


def count_faults(
    listings: Sequence[coverage.Listing], findings: Findings, recipe: Recipe
) -> pd.DataFrame:
    """Count the faults of each listing's usable scenes: one row per listing, with `COLUMNS`."""
    rows = []
    for listing in listings:
        keys = [_key(scene) for scene in select_usable(listing.result.scenes, recipe)]
        faults = [findings[key] for key in keys if key in findings]
        counts = {name: sum(name in names for names in faults) for name in COLUMNS[1:]}
        rows.append({"checked": len(faults), **counts})
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype("Int64")


def _key(scene: pystac.Item) -> tuple[str, str]:
    return scene.properties["minecube:source"], scene.id
