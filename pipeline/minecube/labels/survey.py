"""Find errors in a file of polygons, and repair them.

The steps run in this order, each on the result of the one before:

    invalid       repaired as in `read_polygons`
    collection    areas kept, lines and points left out
    no area       left out
    unknown site  kept: its `site` is not among those requested
    elsewhere     left out: over 10 km from its site; or without a site, far from all, if swapped
                  coordinates would put it at one
    at no site    left out: over 10 km from all sites, without a site's name or a likely swap
    no site       kept: its `site` is empty in a file with sites; counts at each site in reach
    duplicate     left out: shape and years of an earlier row
    sliver        left out: a part narrower everywhere than the least width (no circle of that
                  diameter fits); kept at sites with `mapped` areas, since pixels shape their labels
    hole          kept, or filled if it is a sliver
    overlap       cut from the later row, so no ground counts twice and none is lost; kept if years
                  differ

Surveyed areas (`mapped`) stay unchanged. Other rows are compared with rows of the same site. With a
column for mappers, they are compared only with rows of the same mapper. Areas are in EPSG:6933
(equal-area, worldwide).
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
"""Half a pixel. Narrower parts contain a pixel's centre only by chance."""
FINDINGS = ("finding", "row", "site", "years", "area_m2", "done", "about")
LEAST_OVERLAP_M2 = 1.0
"""Smaller overlaps result from rounded coordinates of a common border."""
_EQUAL_AREA = 6933  # NSIDC EASE-Grid 2.0 Global: Lambert cylindrical equal-area on WGS 84


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Repaired polygons of a file, and its findings."""

    polygons: gpd.GeoDataFrame
    """Repaired rows in the file's CRS, with its columns, `row` (from 1) and `repaired`."""
    findings: pd.DataFrame
    """One row per finding, columns FINDINGS. `area_m2` is the affected area, `done` the action."""
    rows: int
    """Number of rows in the file."""


def survey(
    path: Path,
    *,
    layer: str | None = None,
    sites: Mapping[str, shapely.Geometry] | None = None,
    by: str | None = None,
    min_width_m: float = MIN_WIDTH_M,
) -> Survey:
    """Repair the file's polygons by the module's rules, and list the findings.

    Args:
        path: a file for `read_polygons`.
        layer: the layer to read, as in `minecube.vectors.read_vector`.
        sites: id -> area of interest in longitude and latitude, to find misplaced polygons. A row
            without a site's name may lie at any site.
        by: column with the mapper of a row, in any case, if several mapped the same ground.
        min_width_m: the least width of a part or a hole; 0 keeps all.

    Raises:
        LabelError: see `read_polygons`. Also raised for a missing column, a negative width, slivers
            only, or polygons without a requested site. Or no polygon lies at its site, and the
            message names a swap of coordinates to explain it.
    """
    if not min_width_m >= 0:
        raise LabelError(f"expected a least width of 0 m or more, found {min_width_m:g}")
    raw = load(path, layer)
    if by is not None:
        raw = _with_column(raw, by, path)
    table = mended(raw).assign(row=np.arange(1, len(raw) + 1))
    notes: list[dict[str, Any]] = []
    _note(
        notes,
        "invalid",
        table[table["repaired"]],
        "repaired",
        shapely.is_valid_reason(raw.geometry[table["repaired"]]),
    )
    collections = left_out_parts(raw)
    _note(
        notes,
        "collection",
        table.iloc[list(collections)],
        "areas kept",
        [f"left out: {p}" for p in collections.values()],
    )
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
        # Labels drawn along pixel edges (imports, for example) may be one pixel wide (4 m).
        kept.append(_cleaned(own, 0 if site in along_pixels else min_width_m, notes))
    polygons = pd.concat([*kept, looked_at]).sort_values("row").reset_index(drop=True)
    if polygons.empty:
        raise LabelError(
            f"{path}: no polygon is wider than {min_width_m:g} m anywhere, so none is left; lower the least width"
        )
    found = pd.DataFrame(notes, columns=list(FINDINGS))
    return Survey(
        polygons=polygons,
        findings=found.sort_values("row", kind="stable").reset_index(drop=True),
        rows=len(raw),
    )


def mapped_areas(polygons: gpd.GeoDataFrame, by: str | None = None) -> pd.DataFrame:
    """Tabulate area by site, mapper and year, counting each place once.

    Columns are site, mapper, year (null for all), polygons, holes and area_m2.
    """
    rows, mines = [], polygons[~mapped(polygons)]
    for (site, mapper), own in mines.groupby(_groups(mines, by)):
        first, last = spans(own)
        for year in years_or_all(own):
            holds = own.geometry[(first <= year) & (year <= last)] if year else own.geometry
            union = areal_parts(shapely.union_all(holds.to_numpy()))
            # Rounding leaves pinholes along the cut between two rows.
            holes = _areas(_hole_polygons(shapely.get_parts(union))[0], own.crs) >= LEAST_OVERLAP_M2
            rows.append(
                (site, mapper, year, len(holds), int(holes.sum()), _areas([union], own.crs).item())
            )
    table = pd.DataFrame(rows, columns=["site", "mapper", "year", "polygons", "holes", "area_m2"])
    return table.astype({"year": "Int64"})


def _with_column(table: gpd.GeoDataFrame, name: str, path: Path) -> gpd.GeoDataFrame:
    """Rename the column matching `name` apart from case. Raise LabelError without one."""
    same = [str(c) for c in table.columns if c == name] or [
        str(c) for c in table.columns if str(c).lower() == name.lower()
    ]
    if len(same) != 1 or same == ["geometry"]:
        columns = ", ".join(str(c) for c in table.columns if c != "geometry") or "none"
        raise LabelError(
            f"{path}: has no column {name!r} that says who mapped a row; its columns are {columns}"
        )
    return table.rename(columns={same[0]: name})


def _groups(table: gpd.GeoDataFrame, by: str | None) -> list[pd.Series]:
    """Return each row's site and mapper for grouping, "" if missing."""
    none = pd.Series("", table.index, dtype="string")
    return [(texts(table[c]).fillna("") if c in table else none).rename(c) for c in ("site", by)]


def _note(
    notes: list[dict[str, Any]],
    finding: str,
    rows: gpd.GeoDataFrame,
    done: str,
    about: Any = "",
    area: Any = None,
) -> None:
    """Append a finding for each row.

    `about` and `area` (in m2, by default the row's) hold one value per row, or one for all rows.
    """
    areas = _areas(rows.geometry, rows.crs) if area is None else np.broadcast_to(area, len(rows))
    abouts = [about] * len(rows) if isinstance(about, str) else about
    names = rows["site"] if "site" in rows else [None] * len(rows)
    years = map(_span_text, *spans(rows))
    for row, site, span, size, words in zip(rows["row"], names, years, areas, abouts, strict=True):
        values = (
            finding,
            int(row),
            None if pd.isna(site) else str(site),
            span,
            round(float(size), 1),
            done,
            words,
        )
        notes.append(dict(zip(FINDINGS, values, strict=True)))


def _span_text(first: float, last: float) -> str:
    if not np.isfinite([first, last]).any():
        return "all"
    return (
        f"{first:.0f}"
        if first == last
        else "..".join("" if np.isinf(end) else f"{end:.0f}" for end in (first, last))
    )


def _areas(shapes: Any, crs: Any) -> npt.NDArray[np.float64]:
    flat = gpd.GeoSeries(list(shapes), crs=crs)
    # Edges are straight in the file's CRS. Pieces of 100 m limit the error to 0.1 m2 per kilometre.
    flat = flat.segmentize(0.001 if flat.crs.is_geographic else 100).to_crs(_EQUAL_AREA)
    areas: npt.NDArray[np.float64] = np.nan_to_num(flat.area.to_numpy(np.float64))
    return areas


def _near(
    table: gpd.GeoDataFrame,
    sites: Mapping[str, shapely.Geometry],
    path: Path,
    notes: list[dict[str, Any]],
) -> gpd.GeoDataFrame:
    """Select the rows near their site, or of an unknown site. Raise LabelError if none is left."""
    own = table["site"] if "site" in table else pd.Series(pd.NA, table.index, "string")
    foreign = (own.notna() & ~own.isin(list(sites))).to_numpy()
    if foreign.all():
        names = ", ".join(sorted(set(own.dropna()))[:8])
        raise LabelError(
            f"{path}: no polygon is of a site that was asked for ({', '.join(list(sites)[:8])}); its are {names}"
        )
    _note(notes, "unknown site", table[foreign], "kept")
    lonlat = table.geometry.to_crs(4326)
    metres = np.stack([distances_m(lonlat, area) for area in sites.values()])
    # A row with a site's name belongs to no other site.
    metres[[(own.notna() & (own != site)).to_numpy(bool) for site in sites]] = np.inf
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
    away = np.array(
        [f"{k:.0f} km from {site}" for k, site in zip(km, nearest, strict=True)], dtype=object
    )
    explained = (swaps != "").to_numpy()
    away[explained] = [
        f"{a}; {swap}, it would lie there"
        for a, swap in zip(away[explained], swaps[explained], strict=True)
    ]
    # A row without a site may belong to a site not requested, as in a file of the whole world.
    wrong = far & (own.notna().to_numpy() | explained)
    _note(notes, "elsewhere", table[wrong], "left out", away[wrong])
    _note(notes, "at no site", table[far & ~wrong], "left out", away[far & ~wrong])
    return table[~far]


def _cleaned(
    table: gpd.GeoDataFrame, min_width_m: float, notes: list[dict[str, Any]]
) -> gpd.GeoDataFrame:
    """Remove duplicates, overlaps and slivers from rows of one site and mapper."""
    first, last = spans(table)
    shape = shapely.to_wkb(shapely.normalize(table.geometry.to_numpy()))
    same = pd.DataFrame(
        {"shape": shape, "first": first, "last": last, "row": table["row"].to_numpy()}
    )
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


def _without_slivers(
    table: gpd.GeoDataFrame, min_width_m: float, notes: list[dict[str, Any]]
) -> gpd.GeoDataFrame:
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
    return table.set_geometry(gpd.GeoSeries(whole, index=table.index, crs=table.crs))[
        ~shapely.is_empty(whole)
    ]


def _note_pieces(
    notes: list[dict[str, Any]],
    finding: str,
    table: gpd.GeoDataFrame,
    pieces: npt.NDArray[np.object_],
    of: npt.NDArray[np.int64],
    done: str,
) -> None:
    """Append one finding per row with such pieces: their number and area."""
    rows, count = np.unique(of, return_counts=True)
    sizes = np.bincount(of, _areas(pieces, table.crs), len(table))
    _note(notes, finding, table.iloc[rows], done, [f"{n} of them" for n in count], sizes[rows])


def _hole_polygons(
    shapes: npt.NDArray[np.object_],
) -> tuple[npt.NDArray[np.object_], npt.NDArray[np.int64]]:
    """Return the holes as polygons, and the index of each hole's shape."""
    holes = [shapely.Polygon(hole) for shape in shapes for hole in shape.interiors]
    found = np.empty(len(holes), dtype=object)
    found[:] = holes
    return found, np.repeat(np.arange(len(shapes)), shapely.get_num_interior_rings(shapes))


def rows_without_centre(polygons: gpd.GeoDataFrame, grid: GeoBox) -> pd.Index:
    """Return the index of mine rows without a pixel's centre, not drawn by `rasterize`."""
    here = on_grid(polygons.loc[~mapped(polygons), ["geometry"]], grid, needed=False)
    # A shape's area is at most its length times the radius of its largest circle. A circle with
    # radius of half a pixel's diagonal contains a centre.
    radius = np.hypot(grid.resolution.x, grid.resolution.y) / 2
    small = here[(here.area <= here.length * radius) & here.within(grid.extent.geom)]
    drawn = [_is_drawn(shape, _around(grid, shape)) for shape in small.geometry]
    rows: pd.Index = small.index[~np.array(drawn, bool)]
    return rows


def _is_drawn(shape: shapely.Geometry, grid: GeoBox) -> bool:
    """Return whether `rasterize` draws a pixel. It samples each pixel slightly off its centre."""
    height, width = grid.shape
    column, row = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    x, y = grid.affine * OFF_EDGES * (column, row)
    return bool(shapely.contains_xy(shape, x, y).any())


def _around(grid: GeoBox, shape: shapely.Geometry) -> GeoBox:
    """Return the part of the grid around a shape inside it."""
    x, y = ~grid.affine * np.reshape(shape.bounds, (2, 2)).T
    rows, columns = (slice(max(int(min(v)), 0), int(max(v)) + 1) for v in (y, x))
    return grid[rows, columns]


def _narrow(lonlat: npt.NDArray[np.object_], width_m: float) -> npt.NDArray[np.bool_]:
    """Mark polygons (longitude, latitude) too narrow for a circle of this diameter."""
    plane = np.array([_in_metres(shape) for shape in lonlat], dtype=object)
    # In a narrow polygon every point is within half the width of an edge. So the area is at most the
    # area of this strip.
    maybe = shapely.area(plane) <= shapely.length(plane) * width_m / 2
    narrow = np.zeros(len(plane), bool)
    narrow[maybe] = shapely.is_empty(shapely.buffer(plane[maybe], -width_m / 2))
    return narrow


def _in_metres(shape: shapely.Geometry) -> shapely.Geometry:
    """Project a shape to metres around its middle, true to about 1 % over a few kilometres."""
    west, south, east, north = shape.bounds
    lat = np.deg2rad((south + north) / 2)
    geod = Geod(ellps="WGS84")
    bent = 1 - geod.es * np.sin(lat) ** 2
    per_degree = np.deg2rad([geod.a * np.cos(lat) / bent**0.5, geod.a * (1 - geod.es) / bent**1.5])
    return shapely.transform(
        shape, lambda xy: (xy - [(west + east) / 2, (south + north) / 2]) * per_degree
    )
