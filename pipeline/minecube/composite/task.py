"""What a block's composite is made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pystac
from odc.geo.geobox import GeoBox

from minecube.arrays import UInt16
from minecube.catalog import Recipe
from minecube.composite.reducers import Geomedian
from minecube.reader import Ledger

GeomedianFunction = Callable[[UInt16], Geomedian]
"""`reducers.geomedian`, or the same on a GPU."""


@dataclass(frozen=True, kw_only=True)
class BlockTask:
    """A block to composite."""

    scenes: Sequence[pystac.Item]
    """Scenes near the block, in mosaic order."""
    box: GeoBox
    """The block, at 10 m."""
    recipe: Recipe
    year: int
    """Year of the composite."""
    geomedian: GeomedianFunction
    ledger: Ledger | None
    """Counts the reads."""
    check_values: bool = False
    """Whether to raise UntrustedValuesError for scenes with faults in their values."""
