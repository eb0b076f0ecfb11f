"""Parse footprints of items, and compare them with an area."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pystac
import shapely
from shapely.geometry.base import BaseGeometry

from minecube.grid import clean_footprint


def parse_shape(geometry: Mapping[str, Any] | None) -> BaseGeometry | None:
    """Parse a GeoJSON geometry of any type. Return None if it is missing or malformed."""
    if not geometry:
        return None
    try:
        # For NaN in the coordinates, detected by `clean_footprint`.
        with np.errstate(invalid="ignore"):
            return shapely.geometry.shape(geometry)
    except (
        shapely.errors.ShapelyError,
        TypeError,
        ValueError,
        AttributeError,
        KeyError,
        IndexError,
        RecursionError,
    ):
        return None


def lies_over(item: pystac.Item, area: BaseGeometry) -> bool:
    """Return whether an item's footprint meets the area, including across the antimeridian."""
    return bool(shapely.intersects(clean_footprint(parse_shape(item.geometry)), area))
