"""One mine: its area of interest, years, split and margin."""

from __future__ import annotations

from dataclasses import dataclass

import shapely
from shapely.geometry.base import BaseGeometry

from minecube.catalog.fields import check_field, need, need_name

MARGIN_M = 1000
"""Default margin in metres around polygons of a user's file.

It adds room for growth, and background.
"""
LARGEST_MARGIN_M = 100_000


@dataclass(frozen=True, kw_only=True)
class Site:
    """One mine."""

    id: str
    title: str = ""
    """Common name, if it differs from the id."""
    country: str = ""
    split: str | None = None
    """train, val or test; None outside the benchmark splits."""
    geometry: BaseGeometry | None = None
    """Area of interest, EPSG:4326; None until it is known."""
    years: tuple[int, ...] = ()
    """Years for which the site has labels; empty where unknown."""
    labels: str | None = None
    """Origin of the labels."""
    margin: float = 0.0
    """Metres of ground in the grid on each side of the geometry's box."""

    def __post_init__(self) -> None:
        need_name(self.id)
        number = isinstance(self.margin, int | float) and not isinstance(self.margin, bool)
        fits = number and 0 <= self.margin <= LARGEST_MARGIN_M
        check_field(fits, self, "margin", f"metres from 0 to {LARGEST_MARGIN_M}")
        is_known = self.split in (None, "train", "val", "test")
        check_field(is_known, self, "split", "train, val, test or null")
        if self.geometry is not None:
            kind = self.geometry.geom_type
            need(kind in ("Polygon", "MultiPolygon"), "geometry", f"a polygon, found {kind}")
            need(not self.geometry.is_empty, "geometry", "a polygon with area, found an empty one")
            if not self.geometry.is_valid:
                reason = shapely.is_valid_reason(self.geometry)
                need(False, "geometry", f"a valid polygon, found {reason}")
            bounds = self.geometry.bounds
            west, south, east, north = bounds
            in_degrees = west >= -180 and east <= 180 and south >= -90 and north <= 90
            expected = f"longitude and latitude in degrees, found bounds {bounds}"
            need(in_degrees, "geometry", expected)
