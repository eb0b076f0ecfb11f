"""Give mapped regions ids that last through the years, and simplify their outlines.

A region takes the id of the earlier region with the largest overlap. If several regions claim one
id (a split), the largest overlap gets it. The other parts take an unclaimed id of which they cover
at least half, if any. Otherwise they get a new id, with the contested id as `parent`. An untaken id
ends if one region covers at least half of its last outline (a merge). That region lists it in
`merged`. Other missing ids may return after a gap of up to two mapped years. Later the place gets a
new id.
"""

from __future__ import annotations

from collections.abc import Iterable

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import shapely

GAP_YEARS = 2
"""Number of mapped years an id may be missing."""
SWALLOWED = 0.5
"""Least share of an outline inside another region for a merge."""
AREA_MOVED = 0.0049
"""Largest change in area by simplification: 0.5 %, minus a margin for other projections."""
TOLERANCES_PX = (1.0, 0.5, 0.25, 0.0)

_Shapes = npt.NDArray[np.object_]


def identify(polygons: gpd.GeoDataFrame, years: Iterable[int] | None = None) -> gpd.GeoDataFrame:
    """Add the text columns `id`, `parent` and `merged` by the module's rules (null if empty).

    Ids are the site's name and a number, by first year, then by area (largest first). The order of
    the rows does not matter. Later years do not change earlier ids. `merged` lists ids separated by
    commas.

    Args:
        polygons: columns site, year, geometry, as from `vectorize`. Polygons of one year and site
            do not overlap.
        years: the mapped years, including those without a mine. Default: the years of the polygons.
    """
    named = polygons.assign(
        **{name: pd.Series(pd.NA, polygons.index, "string") for name in ("id", "parent", "merged")}
    )
    mapped = sorted(set(polygons["year"]) | set(years or ()))
    for site in sorted(set(polygons["site"])):
        last_seen: dict[str, tuple[int, shapely.Geometry]] = {}
        given = 0
        for now, year in enumerate(mapped):
            rows = _in_order(named[(named["site"] == site) & (named["year"] == year)])
            last_seen = {i: seen for i, seen in last_seen.items() if now - seen[0] <= GAP_YEARS + 1}
            ids, parents, merged = _handed_on(rows.geometry.to_numpy(), last_seen)
            for n, own in enumerate(ids):
                if own is None:
                    given += 1
                    ids[n] = f"{site}_{given}"
            for gone in (i for names in merged for i in names):
                del last_seen[gone]
            last_seen |= {str(i): (now, shape) for i, shape in zip(ids, rows.geometry, strict=True)}
            named.loc[rows.index, "id"] = pd.array(ids, "string")
            named.loc[rows.index, "parent"] = pd.array(parents, "string")
            named.loc[rows.index, "merged"] = pd.array(
                [",".join(names) or None for names in merged], "string"
            )
    return named


def _in_order(rows: gpd.GeoDataFrame) -> gpd.GeoDataFrame:
    west, _, _, north = shapely.bounds(rows.geometry.to_numpy()).T
    return rows.iloc[np.lexsort((west, -north, -shapely.area(rows.geometry.to_numpy()).round(3)))]


def _handed_on(
    shapes: _Shapes, last_seen: dict[str, tuple[int, shapely.Geometry]]
) -> tuple[list[str | None], list[str | None], list[list[str]]]:
    """Return, for each shape, its inherited id, its parent's id, and the ids merged into it."""
    ids: list[str | None] = [None] * len(shapes)
    parents: list[str | None] = [None] * len(shapes)
    merged: list[list[str]] = [[] for _ in shapes]
    names = list(last_seen)
    earlier = np.array([last_seen[i][1] for i in names], dtype=object)
    if not names or not len(shapes):
        return ids, parents, merged
    region, old = shapely.STRtree(earlier).query(shapes, predicate="intersects")
    # Rounded, to make equal overlaps equal on every machine.
    overlap = shapely.area(shapely.intersection(shapes[region], earlier[old])).round(3)
    region, old, overlap = (v[overlap > 0] for v in (region, old, overlap))
    recent = np.array([last_seen[i][0] for i in names])[old]
    # Ties: the latest seen, then the larger region, then the older id.
    best_first = np.lexsort((old, region, -recent, -overlap))
    claims: dict[int, int] = {}  # region -> the earlier region with the largest overlap
    heirs: dict[int, int] = {}  # earlier region -> its claimant with the largest overlap
    holders: dict[int, int] = {}  # earlier region -> the region covering at least half of it
    for pair in best_first:
        r, o = int(region[pair]), int(old[pair])
        if r not in claims:
            claims[r] = o
            heirs.setdefault(o, r)
        if overlap[pair] >= SWALLOWED * shapely.area(earlier[o]):
            holders.setdefault(o, r)
    taken = {r: o for o, r in heirs.items()}
    for o, r in holders.items():
        if o not in heirs:
            taken.setdefault(r, o)
    for r, o in claims.items():
        if r in taken:
            ids[r] = names[taken[r]]
        else:
            parents[r] = names[o]
    for o, r in sorted(holders.items()):
        if o not in taken.values():
            merged[r].append(names[o])
    return ids, parents, merged


def simplify(polygons: gpd.GeoDataFrame, pixel_m: float) -> gpd.GeoDataFrame:
    """Draw the rows with fewer corners: areas within 0.5 %, holes kept, valid, without overlaps.

    Overlaps are tested within a site and year. Outlines along pixel edges first go through the
    middles of the edges, turning stairs into slopes. Then they are simplified by at most a pixel,
    and moved to restore the area. The tolerance is reduced if the area is still off, a hole is
    lost, or two polygons overlap. If none works, the outline stays unchanged. `area_m2` remains the
    area of the pixels.

    Args:
        polygons: as from `vectorize`, with columns site, year, geometry along the edges of pixels.
        pixel_m: the side of a pixel.
    """
    drawn = polygons.geometry.to_numpy().copy()
    for _, rows in polygons.reset_index(drop=True).groupby(["site", "year"], sort=True):
        drawn[rows.index] = _simplified(drawn[rows.index], pixel_m)
    return polygons.set_geometry(gpd.GeoSeries(drawn, index=polygons.index, crs=polygons.crs))


def _simplified(exact: _Shapes, pixel_m: float) -> _Shapes:
    smooth = np.array([_through_middles(shape, pixel_m) for shape in exact], dtype=object)
    drawn, left = exact.copy(), np.arange(len(exact))
    for tolerance in TOLERANCES_PX:
        tried = _at_area_of(exact[left], shapely.simplify(smooth[left], pixel_m * tolerance))
        fits = _fits(tried, exact[left])
        drawn[left[fits]] = tried[fits]
        left = np.union1d(left[~fits], _put_back(drawn, exact))
    return drawn


def _put_back(drawn: _Shapes, exact: _Shapes) -> npt.NDArray[np.int64]:
    """Restore exact outlines for overlapping shapes until none overlap. Return their indices."""
    back = np.array([], np.int64)
    while True:
        pairs = shapely.STRtree(drawn).query(drawn, predicate="intersects")
        pairs = pairs[:, pairs[0] < pairs[1]]
        clash = np.unique(
            pairs[:, shapely.relate_pattern(drawn[pairs[0]], drawn[pairs[1]], "T********")]
        )
        if not clash.size:
            return back
        drawn[clash] = exact[clash]
        back = np.union1d(back, clash)


def _at_area_of(exact: _Shapes, simple: _Shapes) -> _Shapes:
    """Move outlines outward or inward by a few decimetres to restore the exact areas."""
    missing = (shapely.area(exact) - shapely.area(simple)) / shapely.length(simple)
    moved: _Shapes = shapely.buffer(simple, missing, join_style="mitre")
    return moved


def _fits(drawn: _Shapes, exact: _Shapes) -> npt.NDArray[np.bool_]:
    moved = np.abs(shapely.area(drawn) - shapely.area(exact)) <= AREA_MOVED * shapely.area(exact)
    # `buffer` always gives valid shapes.
    fits: npt.NDArray[np.bool_] = moved & (_holes(drawn) == _holes(exact))
    return fits


def _holes(shapes: _Shapes) -> npt.NDArray[np.int64]:
    """Count the holes of polygons. Other types give -1, so they never fit."""
    return np.where(shapely.get_type_id(shapes) == 3, shapely.get_num_interior_rings(shapes), -1)


def _through_middles(shape: shapely.Polygon, pixel_m: float) -> shapely.Polygon:
    rings = [
        shapely.get_coordinates(ring)
        for ring in shapely.get_rings(shapely.segmentize(shape, pixel_m))
    ]
    middles = [(xy[:-1] + xy[1:]) / 2 for xy in rings]
    return shapely.Polygon(middles[0], middles[1:])
