"""Give mapped regions ids that last through the years, and simplify their outlines.

A region takes the id of the earlier region with the largest overlap. If several regions claim one
id (a split), the largest overlap gets it. The other parts take an unclaimed id of which they cover
at least half, if any. Otherwise they get a new id, with the contested id as `parent`. An untaken id
ends if one region covers at least half of its last outline (a merge). That region lists it in
`merged`. Other missing ids may return after a gap of up to two mapped years. Later the place gets a
new id.

`shapely.coverage_simplify` prevents overlaps, too, but bounds no area. With a tolerance of 20 m, a
real pit of 44 km2 keeps 506 corners instead of 72. On a random map, 1,730 of 1,898 regions change
their area by more than 0.5 %.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import shapely

from minecube.arrays import Bool, Int64

GAP_YEARS = 2
"""Number of mapped years an id may be missing."""
SWALLOWED = 0.5
"""Least share of an outline inside another region for a merge."""
AREA_MOVED = 0.0049
"""Largest change in area by simplification: 0.5 %, minus a margin for other projections."""
TOLERANCES_PX = (1.0, 0.5, 0.25, 0.0)
_INTERIORS_INTERSECT = "T********"  # DE-9IM: touching shapes do not count

_Shapes = npt.NDArray[np.object_]


@dataclass(frozen=True)
class _LastOutline:
    """The last outline of an id."""

    step: int
    """Index of the mapped year."""
    shape: shapely.Polygon


@dataclass(frozen=True)
class _Inheritance:
    """Ids of the regions of one year, in the order of the regions."""

    ids: list[str | None]
    """None for a new region."""
    parents: list[str | None]
    merged: list[list[str]]
    """Ids that end in this region."""


def assign_ids(polygons: gpd.GeoDataFrame, years: Iterable[int] | None = None) -> gpd.GeoDataFrame:
    """Add the text columns `id`, `parent` and `merged` by the module's rules (null if empty).

    Ids are the site's name and a number, by first year, then by area (largest first). The order of
    the rows does not matter. Later years do not change earlier ids. `merged` lists ids separated by
    commas.

    Args:
        polygons: columns site, year, geometry, as from `vectorize`. Polygons of one year and site
            do not overlap.
        years: the mapped years, including those without a mine. Default: the years of the polygons.
    """
    empty = pd.Series(pd.NA, polygons.index, "string")
    identified = polygons.assign(id=empty, parent=empty, merged=empty)
    mapped_years = sorted(set(polygons["year"]) | set(years or ()))
    for site in sorted(set(polygons["site"])):
        last_outlines: dict[str, _LastOutline] = {}
        id_count = 0
        for step, year in enumerate(mapped_years):
            of_year = (identified["site"] == site) & (identified["year"] == year)
            regions = _sort_by_area(identified[of_year])
            last_outlines = {
                name: outline
                for name, outline in last_outlines.items()
                if step - outline.step <= GAP_YEARS + 1
            }
            inheritance = _inherit_ids(regions.geometry.to_numpy(), last_outlines)
            ids: list[str] = []
            for inherited in inheritance.ids:
                if inherited is None:
                    id_count += 1
                ids.append(inherited or f"{site}_{id_count}")
            for names in inheritance.merged:
                for name in names:
                    del last_outlines[name]
            for name, shape in zip(ids, regions.geometry, strict=True):
                last_outlines[name] = _LastOutline(step, shape)
            merged = [",".join(names) or None for names in inheritance.merged]
            identified.loc[regions.index, "id"] = pd.array(ids, "string")
            identified.loc[regions.index, "parent"] = pd.array(inheritance.parents, "string")
            identified.loc[regions.index, "merged"] = pd.array(merged, "string")
    return identified


def _sort_by_area(regions: gpd.GeoDataFrame) -> gpd.GeoDataFrame:
    """Sort regions by area (largest first), then from north to south, then from west to east."""
    shapes = regions.geometry.to_numpy()
    west, _, _, north = shapely.bounds(shapes).T
    return regions.iloc[np.lexsort((west, -north, -shapely.area(shapes).round(3)))]


def _inherit_ids(shapes: _Shapes, last_outlines: dict[str, _LastOutline]) -> _Inheritance:
    """Pass the ids of earlier regions on to this year's shapes."""
    inheritance = _Inheritance(
        ids=[None] * len(shapes), parents=[None] * len(shapes), merged=[[] for _ in shapes]
    )
    names = list(last_outlines)
    if not names or not len(shapes):
        return inheritance
    earlier = np.array([outline.shape for outline in last_outlines.values()], dtype=object)
    steps = np.array([outline.step for outline in last_outlines.values()])
    claims: dict[int, int] = {}  # region -> the earlier region with the largest overlap
    heirs: dict[int, int] = {}  # earlier region -> its claimant with the largest overlap
    holders: dict[int, int] = {}  # earlier region -> the region covering at least half of it
    for region, old, overlap_m2 in _list_overlaps(shapes, earlier, steps):
        if region not in claims:
            claims[region] = old
            heirs.setdefault(old, region)
        if overlap_m2 >= SWALLOWED * shapely.area(earlier[old]):
            holders.setdefault(old, region)
    sources = {region: old for old, region in heirs.items()}
    for old, region in holders.items():
        if old not in heirs:
            sources.setdefault(region, old)
    for region, old in claims.items():
        if region in sources:
            inheritance.ids[region] = names[sources[region]]
        else:
            inheritance.parents[region] = names[old]
    for old, region in sorted(holders.items()):
        if old not in sources.values():
            inheritance.merged[region].append(names[old])
    return inheritance


def _list_overlaps(shapes: _Shapes, earlier: _Shapes, steps: Int64) -> list[tuple[int, int, float]]:
    """List region, earlier region and overlap in m2 for each overlap, the largest first.

    Ties go to the latest outline, then to the larger region, then to the older id.
    """
    region, old = shapely.STRtree(earlier).query(shapes, predicate="intersects")
    # Rounded, to make equal overlaps equal on every machine.
    overlap_m2 = shapely.area(shapely.intersection(shapes[region], earlier[old])).round(3)
    largest_first = np.lexsort((old, region, -steps[old], -overlap_m2))
    return [
        (int(region[pair]), int(old[pair]), float(overlap_m2[pair]))
        for pair in largest_first
        if overlap_m2[pair] > 0
    ]


def simplify_outlines(polygons: gpd.GeoDataFrame, pixel_m: float) -> gpd.GeoDataFrame:
    """Draw the rows with fewer corners: areas within 0.5 %, holes kept, valid, without overlaps.

    Overlaps are tested within a site and year. Outlines along pixel edges first go through the
    middles of the edges, turning stairs into slopes. Then they are simplified by at most a pixel,
    and moved to restore the area. The tolerance is reduced if the area is still off, a hole is
    lost, or two polygons overlap. If none works, the outline stays unchanged. `area_m2` remains the
    area of the pixels.

    The polygons are those of `vectorize`, with outlines along the edges of pixels and the columns
    `site` and `year`.
    """
    shapes = polygons.geometry.to_numpy().copy()
    for _, rows in polygons.reset_index(drop=True).groupby(["site", "year"], sort=True):
        shapes[rows.index] = _simplify_shapes(shapes[rows.index], pixel_m)
    return polygons.set_geometry(gpd.GeoSeries(shapes, index=polygons.index, crs=polygons.crs))


def _simplify_shapes(exact: _Shapes, pixel_m: float) -> _Shapes:
    smooth = np.array([_connect_middles(shape, pixel_m) for shape in exact], dtype=object)
    simplified = exact.copy()
    pending = np.arange(len(exact))
    for tolerance_px in TOLERANCES_PX:
        candidates = shapely.simplify(smooth[pending], pixel_m * tolerance_px)
        candidates = _restore_areas(candidates, exact[pending])
        is_good = _keeps_area_and_holes(candidates, exact[pending])
        simplified[pending[is_good]] = candidates[is_good]
        restored = _restore_overlapping(simplified, exact)
        pending = np.union1d(pending[~is_good], restored)
    return simplified


def _restore_overlapping(shapes: _Shapes, exact: _Shapes) -> Int64:
    """Restore exact outlines for overlapping shapes until none overlap. Return their indices."""
    restored = np.array([], np.int64)
    while True:
        pairs = shapely.STRtree(shapes).query(shapes, predicate="intersects")
        pairs = pairs[:, pairs[0] < pairs[1]]
        overlap = shapely.relate_pattern(shapes[pairs[0]], shapes[pairs[1]], _INTERIORS_INTERSECT)
        overlapping = np.unique(pairs[:, overlap])
        if not overlapping.size:
            return restored
        shapes[overlapping] = exact[overlapping]
        restored = np.union1d(restored, overlapping)


def _restore_areas(shapes: _Shapes, exact: _Shapes) -> _Shapes:
    """Move outlines outward or inward by a few decimetres to restore the exact areas."""
    distance = (shapely.area(exact) - shapely.area(shapes)) / shapely.length(shapes)
    with_area: _Shapes = shapely.buffer(shapes, distance, join_style="mitre")
    return with_area


def _keeps_area_and_holes(shapes: _Shapes, exact: _Shapes) -> Bool:
    """Mark shapes with the area and number of holes of the exact ones."""
    # Validity needs no test: `buffer` always gives valid shapes.
    exact_area = shapely.area(exact)
    keeps_area = np.abs(shapely.area(shapes) - exact_area) <= AREA_MOVED * exact_area
    keeps_both: Bool = keeps_area & (_count_holes(shapes) == _count_holes(exact))
    return keeps_both


def _count_holes(shapes: _Shapes) -> Int64:
    """Count the holes of polygons. Other types give -1, so they never fit."""
    is_polygon = shapely.get_type_id(shapes) == shapely.GeometryType.POLYGON.value
    return np.where(is_polygon, shapely.get_num_interior_rings(shapes), -1)


def _connect_middles(shape: shapely.Polygon, pixel_m: float) -> shapely.Polygon:
    """Draw the rings through the middles of pixel edges."""
    rings = []
    for ring in shapely.get_rings(shapely.segmentize(shape, pixel_m)):
        corners = shapely.get_coordinates(ring)
        rings.append((corners[:-1] + corners[1:]) / 2)
    return shapely.Polygon(rings[0], rings[1:])
