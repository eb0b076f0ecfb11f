"""Recipes and the corner of grids that tests of composites share, and a count of their reads."""

from __future__ import annotations

import dataclasses

from minecube.catalog import NATIVE_M, MaskRule, Recipe
from minecube.grid import coarsen
from minecube.reader import read
from minecube.reader.remote import Tally

LEFT, TOP = 360000, 5600040
PLAIN = Recipe(id="plain", title="no mask", bands=("B04", "B11"), block_px=64, chunk_px=32)
MASKED = dataclasses.replace(
    PLAIN,
    id="masked",
    mask=(
        MaskRule(classes=(8, 9), open_m=40, dilate_m=60),
        MaskRule(classes=(3,), dilate_m=20),
        MaskRule(classes=(11,)),
    ),
)
FOUR = ("B02", "B04", "B08", "B11")


def times_read(ledger, scene, band, grid):
    """How often a scene's local file of a band was read on a grid, by the bytes of one read."""
    once = Tally()
    read(scene.assets[band].href, coarsen(grid, NATIVE_M[band]), tally=once)
    table = ledger.table().set_index(["scene", "band"])
    return table.loc[(scene.id, band), "bytes"] / once.bytes
