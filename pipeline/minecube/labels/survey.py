"""What is wrong with a file of polygons, and the same polygons with it put right.

In this order, each on what the former left:

    invalid       mended as `read_polygons` does                    no area       left out
    collection    its areas are kept, its lines and points left out
    unknown site  kept: its `site` is none of those asked for       at no site    left out: over 10 km from all, naming none
    no site       kept: it names no site, in a file whose other rows do, and counts at each site that it reaches
    elsewhere     left out: over 10 km from the site it names, or a swap of coordinates would put it at a site
    duplicate     left out: the shape and years of an earlier row
    sliver        left out: a part that is narrower everywhere than the least width (no circle of that diameter fits in);
                  kept at sites with `mapped` areas, whose labels are drawn along pixels
    hole          kept, or filled where it is such a sliver
    overlap       cut from the later row, so that no ground is twice there and none is lost; kept where their years differ

Areas that were looked at (`mapped`) stay as they are. Other rows are held against rows of the same site, and of the same mapper
where a column says whose they are. Areas are in EPSG:6933 (equal-area, worldwide).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import shapely
from odc.geo.geobox import GeoBox
from pyproj import Geod

from minecube.errors import LabelError
from minecube.labels.masks import OFF_EDGES, on_grid
from minecube.labels.polygons import (
    NEAR_M,
    distances_m,
    left_out_parts,
    likely_swap,
    load,
    mapped,
    match_sites,
    mended,
    of_no_site,
    spans,
    swaps_that_place,
    with_area,
    without_area,
    years_or_all,
)
from minecube.vectors import areal_parts, texts

MIN_WIDTH_M = 5.0
"""Half a pixel: what is narrower holds a pixel's centre by chance only."""
FINDINGS = ("finding", "row", "site", "years", "area_m2", "done", "about")
LEAST_OVERLAP_M2 = 1.0
"""Smaller overlaps are what rounded coordinates make of a common border."""
_EQUAL_AREA = 6933  # NSIDC EASE-Grid 2.0 Global: Lambert cylindrical equal-area on WGS 84


@dataclass(frozen=True, kw_only=True)
class Survey:
    """A file of polygons looked through."""

    polygons: gpd.GeoDataFrame
    """The repaired rows in the file's CRS, its columns and `row` (in the file, from 1) and `repaired`."""
    findings: pd.DataFrame
    """One row a finding, columns FINDINGS; `area_m2` is that of the part it is about, `done` what became of it."""
    rows: int
    """How many rows the file has."""


def survey(
    path: Path,
    *,
    layer: str | None = None,
    sites: Mapping[str, shapely.Geometry] | None = None,
    by: str | None = None,
    min_width_m: float = MIN_WIDTH_M,
) -> Survey:
    """The file's polygons, repaired, and what was found: by which rules, the module says.

    Args:
        path: a file as `read_polygons` takes.
        layer: the layer to read, as in `minecube.vectors.read_vector`.
        sites: id -> area of interest in longitude and latitude; polygons far from theirs are found. A row without a site's
            name may lie at any.
        by: column that says who mapped a row, where several mapped the same ground; in any case.
        min_width_m: the least width of a part or a hole; 0 keeps all.

    Raises:
        LabelError: as `read_polygons`; no such column, a negative width, or no polygon lies at its site: the message says
            which swap of coordinates would put them there; or all are slivers.
    """
    if not min_width_m >= 0:
        raise LabelError(f"expected a least width of 0 m or more, found {min_width_m:g}")
    raw = load(path, layer)
    if by is not None:
        raw = _with_column(raw, by, path)
    table = mended(raw).assign(row=np.arange(1, len(raw) + 1))
    notes: list[dict[str, Any]] = []
    _note(notes, "invalid", table[table["repaired"]], "repaired", shapely.is_valid_reason(raw.geometry[table["repaired"]]))
    collections = left_out_parts(raw)
    _note(notes, "collection", table.iloc[list(collections)], "areas kept", [f"left out: {p}" for p in collections.values()])
    _note(notes, "no area", table[without_area(table.geometry)], "left out")
    table = with_area(table, path)
    if sites:
        table = _near(match_sites(table, list(sites), path), sites, path, notes)
    unnamed = of_no_site(table)
    if not unnamed.all():
        _note(notes, "no site", table[unnamed], "kept", "counts at each site that it reaches")
    looked_at, mines = table[mapped(table)], table[~mapped(table)]
    along_pixels = set(_groups(looked_at, None)[0])
    kept = []
    for (site, _), own in mines.groupby(_groups(mines, by)):
        # Labels drawn along pixel edges, as those of an import, may be one pixel wide, which is 4 m in the north.
        kept.append(_cleaned(own, 0 if site in along_pixels else min_width_m, notes))
    polygons = pd.concat([*kept, looked_at]).sort_values("row").reset_index(drop=True)
    if polygons.empty:
        raise LabelError(f"{path}: no polygon is wider than {min_width_m:g} m anywhere, so none is left; lower the least width")
    found = pd.DataFrame(notes, columns=list(FINDINGS))
    return Survey(
        polygons=polygons,
        findings=found.sort_values("row", kind="stable").reset_index(drop=True),
        rows=len(raw),
    )


def mapped_areas(polygons: gpd.GeoDataFrame, by: str | None = None) -> pd.DataFrame:
    """Area by site, mapper and year, each place counted once: site, mapper, year (null: all), polygons, holes, area_m2."""
    rows, mines = [], polygons[~mapped(polygons)]
    for (site, mapper), own in mines.groupby(_groups(mines, by)):
        first, last = spans(own)
        for year in years_or_all(own):
            holds = own.geometry[(first <= year) & (year <= last)] if year else own.geometry
            union = areal_parts(shapely.union_all(holds.to_numpy()))
            # Where two rows meet in a cut, rounding leaves pinholes.
            holes = _areas(_hole_polygons(shapely.get_parts(union))[0], own.crs) >= LEAST_OVERLAP_M2
            rows.append((site, mapper, year, len(holds), int(holes.sum()), _areas([union], own.crs).item()))
    table = pd.DataFrame(rows, columns=["site", "mapper", "year", "polygons", "holes", "area_m2"])
    return table.astype({"year": "Int64"})


def _with_column(table: gpd.GeoDataFrame, name: str, path: Path) -> gpd.GeoDataFrame:
    """The table with its column of this name, whose case may differ; raises LabelError without one."""
    same = [str(c) for c in table.columns if c == name] or [str(c) for c in table.columns if str(c).lower() == name.lower()]
    if len(same) != 1 or same == ["geometry"]:
        columns = ", ".join(str(c) for c in table.columns if c != "geometry") or "none"
        raise LabelError(f"{path}: has no column {name!r} that says who mapped a row; its columns are {columns}")
    return table.rename(columns={same[0]: name})


def _groups(table: gpd.GeoDataFrame, by: str | None) -> list[pd.Series]:
    """What tells site and mapper of a row; "" where nothing does."""
    none = pd.Series("", table.index, dtype="string")
    return [(texts(table[c]).fillna("") if c in table else none).rename(c) for c in ("site", by)]


def _note(
    notes: list[dict[str, Any]], finding: str, rows: gpd.GeoDataFrame, done: str, about: Any = "", area: Any = None
) -> None:
    """Adds a finding for each row; `about`, and `area` in m2 (the row's by default), are one for each or one for all."""
    areas = _areas(rows.geometry, rows.crs) if area is None else np.broadcast_to(area, len(rows))
    abouts = [about] * len(rows) if isinstance(about, str) else about
    names = rows["site"] if "site" in rows else [None] * len(rows)
    years = map(_span_text, *spans(rows))
    for row, site, span, size, words in zip(rows["row"], names, years, areas, abouts, strict=True):
        values = (finding, int(row), None if pd.isna(site) else str(site), span, round(float(size), 1), done, words)
        notes.append(dict(zip(FINDINGS, values, strict=True)))


def _span_text(first: float, last: float) -> str:
    if not np.isfinite([first, last]).any():
        return "all"
    return f"{first:.0f}" if first == last else "..".join("" if np.isinf(end) else f"{end:.0f}" for end in (first, last))


def _areas(shapes: Any, crs: Any) -> npt.NDArray[np.float64]:
    flat = gpd.GeoSeries(list(shapes), crs=crs)
    # Edges are straight in the file's CRS: in pieces of 100 m they are so in the other, to 0.1 m2 a kilometre.
    flat = flat.segmentize(0.001 if flat.crs.is_geographic else 100).to_crs(_EQUAL_AREA)
    areas: npt.NDArray[np.float64] = np.nan_to_num(flat.area.to_numpy(np.float64))
    return areas


def _near(
    table: gpd.GeoDataFrame, sites: Mapping[str, shapely.Geometry], path: Path, notes: list[dict[str, Any]]
) -> gpd.GeoDataFrame:
    """The rows that lie at their site, or name one that was not asked for."""
    own = table["site"] if "site" in table else pd.Series(pd.NA, table.index, "string")
    foreign = (own.notna() & ~own.isin(list(sites))).to_numpy()
    if foreign.all():
        names = ", ".join(sorted(set(own.dropna()))[:8])
        raise LabelError(f"{path}: no polygon is of a site that was asked for ({', '.join(list(sites)[:8])}); its are {names}")
    _note(notes, "unknown site", table[foreign], "kept")
    lonlat = table.geometry.to_crs(4326)
    metres = np.stack([distances_m(lonlat, area) for area in sites.values()])
    metres[[(own.notna() & (own != site)).to_numpy(bool) for site in sites]] = np.inf  # a row that names a site is of no other
    nearest, km = np.array(list(sites))[metres.argmin(axis=0)], metres.min(axis=0) / 1000
    far = (km > NEAR_M / 1000) & ~foreign
    swaps = pd.Series("", table.index)
    for site, rows in table[far].groupby(own[far].fillna("")):
        area = sites[str(site)] if site else shapely.union_all(list(sites.values()))
        swaps[rows.index] = swaps_that_place(rows.geometry, area)
    if far.sum() == (~foreign).sum():
        row = np.where(far, km, np.inf).argmin()
        raise LabelError(
            f"{path}: no polygon lies within {NEAR_M / 1000:.0f} km of its site: the nearest is {km[row]:.0f} km from "
            f"{nearest[row]}{likely_swap(swaps[far])}; their masks would be empty, so mend the file, or name the right sites"
        )
    away = np.array([f"{k:.0f} km from {site}" for k, site in zip(km, nearest, strict=True)], dtype=object)
    explained = (swaps != "").to_numpy()
    away[explained] = [f"{a}; {swap}, it would lie there" for a, swap in zip(away[explained], swaps[explained], strict=True)]
    # A row that names no site may well be of one that was not asked for: a file of the whole world is.
    wrong = far & (own.notna().to_numpy() | explained)
    _note(notes, "elsewhere", table[wrong], "left out", away[wrong])
    _note(notes, "at no site", table[far & ~wrong], "left out", away[far & ~wrong])
    return table[~far]


def _cleaned(table: gpd.GeoDataFrame, min_width_m: float, notes: list[dict[str, Any]]) -> gpd.GeoDataFrame:
    """Rows of one site and mapper without duplicates, overlaps and slivers."""
    first, last = spans(table)
    shape = shapely.to_wkb(shapely.normalize(table.geometry.to_numpy()))
    same = pd.DataFrame({"shape": shape, "first": first, "last": last, "row": table["row"].to_numpy()})
    earlier = same.groupby(["shape", "first", "last"])["row"].transform("min")
    twice = (earlier < same["row"]).to_numpy()
    _note(notes, "duplicate", table[twice], "left out", [f"as row {r}" for r in earlier[twice]])
    return _cut_overlaps(_without_slivers(table[~twice], min_width_m, notes), notes)


def _cut_overlaps(table: gpd.GeoDataFrame, notes: list[dict[str, Any]]) -> gpd.GeoDataFrame:
    shapes = table.geometry.to_numpy().copy()
    first, last = spans(table)
    a, b = shapely.STRtree(shapes).query(shapes, predicate="intersects")
    a, b = (v[(a < b) & (first[a] <= last[b]) & (first[b] <= last[a])] for v in (a, b))
    common = _areas(shapely.intersection(shapes[a], shapes[b]), table.crs)
    a, b, common = (v[common >= LEAST_OVERLAP_M2] for v in (a, b, common))
    original = shapes.copy()
    same_years = (first[a] == first[b]) & (last[a] == last[b])
    for later in np.unique(b[same_years]):
        before = shapely.union_all(original[a[same_years & (b == later)]])
        shapes[later] = areal_parts(shapely.difference(shapes[later], before))
    for done, which in (("cut from this row", same_years), ("kept, years differ", ~same_years)):
        with_row = [f"with row {r}" for r in table["row"].to_numpy()[a[which]]]
        _note(notes, "overlap", table.iloc[b[which]], done, with_row, common[which])
    cut = table.set_geometry(gpd.GeoSeries(shapes, index=table.index, crs=table.crs))
    swallowed = np.zeros(len(cut), bool)
    swallowed[b[same_years]] = _areas(shapes[b[same_years]], table.crs) < LEAST_OVERLAP_M2
    _note(notes, "overlap", table[swallowed], "left out", "wholly within earlier rows")
    return cut[~swallowed]


def _without_slivers(table: gpd.GeoDataFrame, min_width_m: float, notes: list[dict[str, Any]]) -> gpd.GeoDataFrame:
    shapes, of = shapely.get_parts(table.geometry.to_numpy(), return_index=True)
    lonlat = gpd.GeoSeries(shapes, crs=table.crs).to_crs(4326).to_numpy()
    thin = _narrow(lonlat, min_width_m)
    holes, within = _hole_polygons(shapes)
    thin_hole = _narrow(_hole_polygons(lonlat)[0], min_width_m)
    _note_pieces(notes, "sliver", table, shapes[thin], of[thin], "left out")
    _note_pieces(notes, "hole", table, holes[thin_hole], of[within[thin_hole]], "filled")
    _note_pieces(notes, "hole", table, holes[~thin_hole], of[within[~thin_hole]], "kept")
    for n in np.unique(within[thin_hole]):
        large = holes[(within == n) & ~thin_hole]
        shapes[n] = shapely.Polygon(shapes[n].exterior, [hole.exterior for hole in large])
    touched = np.unique(np.append(of[thin], of[within[thin_hole]]))
    whole = table.geometry.to_numpy().copy()
    for n in touched:
        whole[n] = shapely.multipolygons(shapes[(of == n) & ~thin])
    return table.set_geometry(gpd.GeoSeries(whole, index=table.index, crs=table.crs))[~shapely.is_empty(whole)]


def _note_pieces(
    notes: list[dict[str, Any]],
    finding: str,
    table: gpd.GeoDataFrame,
    pieces: npt.NDArray[np.object_],
    of: npt.NDArray[np.int64],
    done: str,
) -> None:
    """One finding for each row that has pieces of the kind: how many, and their area."""
    rows, count = np.unique(of, return_counts=True)
    sizes = np.bincount(of, _areas(pieces, table.crs), len(table))
    _note(notes, finding, table.iloc[rows], done, [f"{n} of them" for n in count], sizes[rows])


def _hole_polygons(shapes: npt.NDArray[np.object_]) -> tuple[npt.NDArray[np.object_], npt.NDArray[np.int64]]:
    """The holes as polygons, and which shape each is in."""
    holes = [shapely.Polygon(hole) for shape in shapes for hole in shape.interiors]
    found = np.empty(len(holes), dtype=object)
    found[:] = holes
    return found, np.repeat(np.arange(len(shapes)), shapely.get_num_interior_rings(shapes))


def rows_without_centre(polygons: gpd.GeoDataFrame, grid: GeoBox) -> pd.Index:
    """The rows of mines that hold no pixel's centre, by their index: `rasterize` draws no pixel of them."""
    here = on_grid(polygons.loc[~mapped(polygons), ["geometry"]], grid, needed=False)
    # A shape's area is at most its length times the radius of the largest circle in it. A circle of half a pixel's diagonal
    # holds a centre.
    radius = np.hypot(grid.resolution.x, grid.resolution.y) / 2
    small = here[(here.area <= here.length * radius) & here.within(grid.extent.geom)]
    drawn = [_is_drawn(shape, _around(grid, shape)) for shape in small.geometry]
    rows: pd.Index = small.index[~np.array(drawn, bool)]
    return rows


def _is_drawn(shape: shapely.Geometry, grid: GeoBox) -> bool:
    """Whether `rasterize` draws a pixel: it looks at each pixel slightly off its centre."""
    height, width = grid.shape
    column, row = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    x, y = grid.affine * OFF_EDGES * (column, row)
    return bool(shapely.contains_xy(shape, x, y).any())


def _around(grid: GeoBox, shape: shapely.Geometry) -> GeoBox:
    """The pixels of the grid around a shape within it."""
    x, y = ~grid.affine * np.reshape(shape.bounds, (2, 2)).T
    rows, columns = (slice(max(int(min(v)), 0), int(max(v)) + 1) for v in (y, x))
    return grid[rows, columns]


def _narrow(lonlat: npt.NDArray[np.object_], width_m: float) -> npt.NDArray[np.bool_]:
    """Which polygons (longitude, latitude) no circle of that diameter fits into."""
    plane = np.array([_in_metres(shape) for shape in lonlat], dtype=object)
    # Where no such circle fits, every point is within half of the width of an edge, so the area is less than that strip's.
    maybe = shapely.area(plane) <= shapely.length(plane) * width_m / 2
    narrow = np.zeros(len(plane), bool)
    narrow[maybe] = shapely.is_empty(shapely.buffer(plane[maybe], -width_m / 2))
    return narrow


def _in_metres(shape: shapely.Geometry) -> shapely.Geometry:
    """The shape around its own middle, in metres: true to about 1 % for what is a few kilometres large."""
    west, south, east, north = shape.bounds
    lat = np.deg2rad((south + north) / 2)
    geod = Geod(ellps="WGS84")
    bent = 1 - geod.es * np.sin(lat) ** 2
    per_degree = np.deg2rad([geod.a * np.cos(lat) / bent**0.5, geod.a * (1 - geod.es) / bent**1.5])
    return shapely.transform(shape, lambda xy: (xy - [(west + east) / 2, (south + north) / 2]) * per_degree)
