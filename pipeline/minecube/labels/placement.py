"""Place polygons on a grid or near a site, and explain misplaced ones."""

from __future__ import annotations

from collections.abc import Iterator

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
from odc.geo.geobox import GeoBox
from pyproj import CRS, Geod

from minecube.arrays import Float64
from minecube.errors import LabelError

MISPLACED_M = 10_000
"""Largest distance of a polygon from its site. Farther polygons are misplaced."""
_EDGE_M = 1000
_EDGE_DEG = 0.01
"""Longest pieces of edges before reprojection. Edges are straight in their own CRS.

Pieces of about a kilometre keep them within 3 cm.
"""


def place_on_grid(
    polygons: gpd.GeoDataFrame, grid: GeoBox, required: bool = True
) -> gpd.GeoDataFrame:
    """Return the rows on the grid, in its CRS. Raise LabelError for no rows if `required`."""
    extent = gpd.GeoSeries([grid.extent.geom], crs=str(grid.crs)).segmentize(_EDGE_M)
    extent_lonlat = extent.to_crs(4326)
    if polygons.crs == extent.crs:
        lonlat = _to_lonlat(polygons)
        placed = polygons
    else:
        longest_edge = _EDGE_DEG if polygons.crs.is_geographic else _EDGE_M
        segmentized = polygons.set_geometry(polygons.segmentize(longest_edge))
        lonlat = _to_lonlat(segmentized)
        # Shapes far away have no place in this projection, so cut in degrees.
        clipped = lonlat.intersection(shapely.box(*extent_lonlat.total_bounds))
        placed = segmentized.set_geometry(clipped).to_crs(extent.crs)
    on_extent = placed[placed.intersects(extent.iloc[0])]
    if on_extent.empty and required:
        mistakes = explain_misplacement(polygons.geometry, extent_lonlat.iloc[0])
        distance = _describe_distance(lonlat, extent_lonlat.iloc[0].centroid)
        raise LabelError(distance + describe_mistakes(mistakes))
    return on_extent


def _to_lonlat(polygons: gpd.GeoDataFrame) -> gpd.GeoSeries:
    """Convert to longitude and latitude. Raise LabelError if a shape is not on the globe."""
    lonlat = polygons.to_crs(4326).geometry
    if not np.isfinite(shapely.get_coordinates(lonlat)).all():
        raise LabelError(
            "some polygons cannot be placed on the globe: "
            "their coordinates do not fit their CRS; set the right one"
        )
    return lonlat


def _describe_distance(lonlat: gpd.GeoSeries, centre: shapely.Point) -> str:
    lon, lat = shapely.get_coordinates(lonlat).T
    to_centre = Geod(ellps="WGS84").inv(
        np.full_like(lon, centre.x), np.full_like(lat, centre.y), lon, lat
    )
    metres = to_centre[2]
    nearest = int(np.argmin(metres))
    return (
        f"no polygon reaches the grid around {centre.x:.3f}, {centre.y:.3f}: "
        f"the nearest of {len(lonlat)} is {metres[nearest] / 1000:.1f} km away, "
        f"at {lon[nearest]:.3f}, {lat[nearest]:.3f}; "
        "check the site, the CRS and the order of longitude and latitude"
    )


def measure_distances_m(lonlat: gpd.GeoSeries, area: shapely.Geometry) -> Float64:
    """Compute metres from each shape to the area, both in longitude and latitude.

    The distance is 0 if they meet, and inf for shapes off the globe. It is measured between the
    points nearest in degrees. So it is some per cent too large for distant shapes.
    """
    ends = np.full((len(lonlat), 2, 2), np.nan)
    lines = shapely.shortest_line(lonlat.to_numpy(), area)
    has_line = ~shapely.is_missing(lines) & ~shapely.is_empty(lines)
    ends[has_line] = shapely.get_coordinates(lines[has_line]).reshape(-1, 2, 2)
    on_globe = np.isfinite(ends).all(axis=(1, 2)) & (np.abs(ends[:, :, 1]) <= 90).all(axis=1)
    start = ends[on_globe, 0]
    stop = ends[on_globe, 1]
    metres = np.full(len(lonlat), np.inf)
    metres[on_globe] = Geod(ellps="WGS84").inv(start[:, 0], start[:, 1], stop[:, 0], stop[:, 1])[2]
    return metres


def explain_misplacement(polygons: gpd.GeoSeries, area: shapely.Geometry) -> pd.Series:
    """Name each misplaced polygon's likely coordinate mistake, "" if unknown.

    Candidates are swapped longitude and latitude, lost signs, both, and a UTM zone of the other
    hemisphere. A mistake explains a polygon if its correction lies within 10 km of the area (in
    longitude and latitude). If several fit, the one explaining most polygons wins.
    """
    explained = {
        mistake: measure_distances_m(lonlat, area) <= MISPLACED_M
        for mistake, lonlat in _correct_mistakes(polygons)
    }
    likely = pd.Series("", polygons.index)
    for mistake, rows in sorted(explained.items(), key=lambda item: -item[1].sum()):
        likely[rows & (likely == "")] = mistake
    return likely


def describe_mistakes(mistakes: pd.Series) -> str:
    """Return the most frequent mistake and its count as a clause, or ""."""
    counts = mistakes[mistakes != ""].value_counts()
    if counts.empty:
        return ""
    return f"; {counts.index[0]}, {counts.iloc[0]} of {len(mistakes)} would lie there"


def _correct_mistakes(polygons: gpd.GeoSeries) -> Iterator[tuple[str, gpd.GeoSeries]]:
    """Yield each mistake and the shapes without that mistake, in longitude and latitude."""
    axes = ("x", "y")
    if polygons.crs.is_geographic:
        axes = ("longitude", "latitude")
    x, y = axes
    moves = {
        f"with {x} and {y} swapped": (True, 1, 1),
        f"with the sign of {x} changed": (False, -1, 1),
        f"with the sign of {y} changed": (False, 1, -1),
        "with both signs changed": (False, -1, -1),
        f"with {x} and {y} swapped and the sign of {x} changed": (True, -1, 1),
        f"with {x} and {y} swapped and the sign of {y} changed": (True, 1, -1),
        f"with {x} and {y} swapped and both signs changed": (True, -1, -1),
    }
    for mistake, (swapped, *signs) in moves.items():
        columns = np.array([0, 1])
        if swapped:
            columns = columns[::-1]
        corrected = shapely.transform(
            polygons.to_numpy(), lambda xy, order=columns, factors=signs: xy[:, order] * factors
        )
        yield mistake, gpd.GeoSeries(corrected, polygons.index, polygons.crs).to_crs(4326)
    if zone := polygons.crs.utm_zone:
        opposite = CRS.from_dict({"proj": "utm", "zone": int(zone[:-1]), "south": zone[-1] == "N"})
        yield (
            "in the UTM zone of the other hemisphere",
            polygons.set_crs(opposite, allow_override=True).to_crs(4326),
        )
