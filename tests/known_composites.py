"""Recipes of composites that several tests make, and the corner of their grids."""

from __future__ import annotations

import dataclasses

from minecube.catalog import MaskRule, Recipe

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
