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

`shapely.coverage_is_valid` marks rows with an overlap. It names neither the second row nor the
area, and it has no years, so overlaps are found here by pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import shapely
from pyproj import CRS, Geod

from minecube.arrays import AnyArray, Bool, Float64, Int64
from minecube.errors import LabelError
from minecube.labels.placement import (
    MISPLACED_M,
    describe_mistakes,
    explain_misplacement,
    measure_distances_m,
)
from minecube.labels.polygons import (
    describe_omitted_parts,
    drop_flat_rows,
    find_year_spans,
    lacks_area,
    list_years_or_none,
    mark_rows_without_site,
    mark_surveyed,
    match_sites,
    read_rows,
    repair_shapes,
)
from minecube.places import Place
from minecube.vectors import extract_polygons, to_texts

MIN_WIDTH_M = 5.0
"""Half a pixel. Narrower parts contain a pixel's centre only by chance."""
FINDINGS = ("finding", "row", "site", "years", "area_m2", "done", "about")
LEAST_OVERLAP_M2 = 1.0
"""Smaller overlaps result from rounded coordinates of a common border."""
_EQUAL_AREA = 6933  # NSIDC EASE-Grid 2.0 Global: Lambert cylindrical equal-area on WGS 84
_EDGE_M = 100
_EDGE_DEG = 0.001
"""Longest pieces of edges before reprojection. They limit the error to 0.1 m2 per kilometre."""
_LISTED_SITES = 8

_Shapes = npt.NDArray[np.object_]


@dataclass(frozen=True, kw_only=True)
class RepairedPolygons:
    """Repaired polygons of a file, and its findings."""

    polygons: gpd.GeoDataFrame
    """Repaired rows in the file's CRS, with its columns, `row` (from 1) and `repaired`."""
    findings: pd.DataFrame
    """One row per finding, columns FINDINGS. `area_m2` is the affected area, `done` the action."""
    rows: int
    """Number of rows in the file."""


class _Findings:
    """Findings in the order of the steps."""

    def __init__(self) -> None:
        self._records: list[tuple[Any, ...]] = []

    def add(
        self,
        finding: str,
        rows: gpd.GeoDataFrame,
        action: str,
        details: str | Sequence[str] | AnyArray = "",
        areas: AnyArray | None = None,
    ) -> None:
        """Add a finding for each row.

        `details` has one text per row, or is one for all rows. `areas` are the affected areas in
        m2, by default those of the rows.
        """
        if areas is None:
            areas = _compute_areas(rows.geometry, rows.crs)
        if isinstance(details, str):
            details = [details] * len(rows)
        sites = pd.Series(None, rows.index, dtype=object)
        if "site" in rows:
            sites = rows["site"].astype(object)
        sites = sites.where(sites.notna(), None)
        years = map(_describe_years, *find_year_spans(rows))
        for row, site, span, area, text in zip(
            rows["row"], sites, years, areas, details, strict=True
        ):
            self._records.append(
                (finding, int(row), site, span, round(float(area), 1), action, text)
            )

    def add_pieces(
        self, finding: str, table: gpd.GeoDataFrame, pieces: _Shapes, rows: Int64, action: str
    ) -> None:
        """Add a finding for each row with pieces: their number and total area.

        `rows` is the position in the table of each piece's row.
        """
        affected, counts = np.unique(rows, return_counts=True)
        areas = np.bincount(rows, _compute_areas(pieces, table.crs), len(table))
        details = [f"{count} of them" for count in counts]
        self.add(finding, table.iloc[affected], action, details, areas[affected])

    def tabulate(self) -> pd.DataFrame:
        """Return the findings as a table, sorted by row."""
        table = pd.DataFrame(self._records, columns=list(FINDINGS))
        return table.sort_values("row", kind="stable").reset_index(drop=True)


def repair_polygons(
    path: Place,
    *,
    layer: str | None = None,
    sites: Mapping[str, shapely.Geometry] | None = None,
    by: str | None = None,
    min_width_m: float = MIN_WIDTH_M,
) -> RepairedPolygons:
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
    rows = read_rows(path, layer)
    if by is not None:
        rows = _rename_column(rows, by, path)
    findings = _Findings()
    table = _repair_rows(rows, path, findings)
    if sites:
        table = match_sites(table, list(sites), path)
        table = _drop_distant_rows(table, sites, path, findings)
    unnamed = mark_rows_without_site(table)
    if not unnamed.all():
        findings.add("no site", table[unnamed], "kept", "counts at each site that it reaches")
    is_surveyed = mark_surveyed(table)
    surveyed = table[is_surveyed]
    mines = table[~is_surveyed]
    surveyed_sites = set(_group_keys(surveyed, None)[0])
    cleaned = []
    for (site, _), group in mines.groupby(_group_keys(mines, by)):
        width_m = min_width_m
        if site in surveyed_sites:
            # Labels drawn along pixel edges (imports, for example) may be one pixel wide (4 m).
            width_m = 0
        group = _drop_duplicates(group, findings)
        group = _remove_slivers(group, width_m, findings)
        cleaned.append(_cut_overlaps(group, findings))
    polygons = pd.concat([*cleaned, surveyed]).sort_values("row").reset_index(drop=True)
    if polygons.empty:
        raise LabelError(
            f"{path}: no polygon is wider than {min_width_m:g} m anywhere, so none is left; "
            "lower the least width"
        )
    return RepairedPolygons(polygons=polygons, findings=findings.tabulate(), rows=len(rows))


def tabulate_areas(polygons: gpd.GeoDataFrame, mapper_column: str | None = None) -> pd.DataFrame:
    """Tabulate area by site, mapper and year, counting each place once.

    Columns are site, mapper, year (null for all), polygons, holes and area_m2.
    """
    records = []
    mines = polygons[~mark_surveyed(polygons)]
    for (site, mapper), group in mines.groupby(_group_keys(mines, mapper_column)):
        first_year, last_year = find_year_spans(group)
        for year in list_years_or_none(group):
            shapes = group.geometry.to_numpy()
            if year is not None:
                shapes = shapes[(first_year <= year) & (year <= last_year)]
            union = extract_polygons(shapely.union_all(shapes))
            holes, _ = _list_holes(shapely.get_parts(union))
            # Rounding leaves pinholes along the cut between two rows.
            is_hole = _compute_areas(holes, group.crs) >= LEAST_OVERLAP_M2
            area = _compute_areas([union], group.crs).item()
            records.append((site, mapper, year, len(shapes), int(is_hole.sum()), area))
    columns = ["site", "mapper", "year", "polygons", "holes", "area_m2"]
    return pd.DataFrame(records, columns=columns).astype({"year": "Int64"})


def _rename_column(table: gpd.GeoDataFrame, name: str, path: Place) -> gpd.GeoDataFrame:
    """Rename the column matching `name` apart from case. Raise LabelError without one."""
    columns = [str(column) for column in table.columns]
    matches = [column for column in columns if column == name]
    if not matches:
        matches = [column for column in columns if column.lower() == name.lower()]
    if len(matches) != 1 or matches == ["geometry"]:
        listed = ", ".join(column for column in columns if column != "geometry") or "none"
        raise LabelError(
            f"{path}: has no column {name!r} that says who mapped a row; its columns are {listed}"
        )
    return table.rename(columns={matches[0]: name})


def _group_keys(table: gpd.GeoDataFrame, by: str | None) -> list[pd.Series]:
    """Return each row's site and mapper for grouping, "" if missing."""
    keys = []
    for column in ("site", by):
        key = pd.Series("", table.index, dtype="string")
        if column in table:
            key = to_texts(table[column]).fillna("")
        keys.append(key.rename(column))
    return keys


def _describe_years(first_year: float, last_year: float) -> str:
    """Format a span as all, 2019, 2019..2021, 2019.. or ..2021."""
    start, end = ("" if np.isinf(year) else f"{year:.0f}" for year in (first_year, last_year))
    if not start and not end:
        return "all"
    if first_year == last_year:
        return start
    return f"{start}..{end}"


def _compute_areas(shapes: Any, crs: CRS) -> Float64:
    """Compute areas in m2."""
    series = gpd.GeoSeries(list(shapes), crs=crs)
    edge = _EDGE_DEG if series.crs.is_geographic else _EDGE_M
    projected = series.segmentize(edge).to_crs(_EQUAL_AREA)
    areas: Float64 = np.nan_to_num(projected.area.to_numpy(np.float64))
    return areas


def _repair_rows(rows: gpd.GeoDataFrame, path: Place, findings: _Findings) -> gpd.GeoDataFrame:
    """Repair shapes and drop those without area. Column `row` counts the file's rows from 1."""
    table = repair_shapes(rows).assign(row=np.arange(1, len(rows) + 1))
    repaired = table["repaired"]
    reasons = shapely.is_valid_reason(rows.geometry[repaired])
    findings.add("invalid", table[repaired], "repaired", reasons)
    parts = describe_omitted_parts(rows)
    omitted = [f"left out: {text}" for text in parts.values()]
    findings.add("collection", table.iloc[list(parts)], "areas kept", omitted)
    findings.add("no area", table[lacks_area(table.geometry)], "left out")
    return drop_flat_rows(table, path)


def _drop_distant_rows(
    table: gpd.GeoDataFrame,
    sites: Mapping[str, shapely.Geometry],
    path: Place,
    findings: _Findings,
) -> gpd.GeoDataFrame:
    """Select the rows near their site, or of an unknown site. Raise LabelError if none is left."""
    names = pd.Series(pd.NA, table.index, "string")
    if "site" in table:
        names = table["site"]
    is_unknown = (names.notna() & ~names.isin(list(sites))).to_numpy()
    if is_unknown.all():
        requested = ", ".join(list(sites)[:_LISTED_SITES])
        in_file = ", ".join(sorted(set(names.dropna()))[:_LISTED_SITES])
        raise LabelError(
            f"{path}: expected polygons of the sites {requested}, found only {in_file}"
        )
    findings.add("unknown site", table[is_unknown], "kept")
    lonlat = table.geometry.to_crs(4326)
    metres = np.stack([measure_distances_m(lonlat, area) for area in sites.values()])
    for row_of_metres, site in zip(metres, sites, strict=True):
        # A row with a site's name belongs to no other site.
        row_of_metres[(names.notna() & (names != site)).to_numpy(bool)] = np.inf
    nearest = np.array(list(sites))[metres.argmin(axis=0)]
    km = metres.min(axis=0) / 1000
    is_distant = (km > MISPLACED_M / 1000) & ~is_unknown
    mistakes = _explain_rows(table[is_distant], names[is_distant], sites).reindex(
        table.index, fill_value=""
    )
    if is_distant.sum() == (~is_unknown).sum():
        row = np.where(is_distant, km, np.inf).argmin()
        raise LabelError(
            f"{path}: no polygon lies within {MISPLACED_M / 1000:.0f} km of its site: "
            f"the nearest is {km[row]:.0f} km from {nearest[row]}"
            f"{describe_mistakes(mistakes[is_distant])}; "
            "correct the file, or choose the right sites"
        )
    details = np.array(
        [
            _describe_misplacement(distance, site, mistake)
            for distance, site, mistake in zip(km, nearest, mistakes, strict=True)
        ],
        dtype=object,
    )
    # A row without a site may belong to a site not requested, as in a file of the whole world.
    is_wrong = is_distant & (names.notna().to_numpy() | (mistakes != "").to_numpy())
    at_no_site = is_distant & ~is_wrong
    findings.add("elsewhere", table[is_wrong], "left out", details[is_wrong])
    findings.add("at no site", table[at_no_site], "left out", details[at_no_site])
    return table[~is_distant]


def _explain_rows(
    table: gpd.GeoDataFrame, names: pd.Series, sites: Mapping[str, shapely.Geometry]
) -> pd.Series:
    """Name the coordinate mistake that explains each row's distance from its site, or ""."""
    mistakes = pd.Series("", table.index)
    all_sites = shapely.union_all(list(sites.values()))
    for site, rows in table.groupby(names.fillna("")):
        area = all_sites
        if site:
            area = sites[str(site)]
        mistakes[rows.index] = explain_misplacement(rows.geometry, area)
    return mistakes


def _describe_misplacement(km: float, site: str, mistake: str) -> str:
    distance = f"{km:.0f} km from {site}"
    if not mistake:
        return distance
    return f"{distance}; {mistake}, it would lie there"


def _drop_duplicates(table: gpd.GeoDataFrame, findings: _Findings) -> gpd.GeoDataFrame:
    """Drop rows with the shape and years of an earlier row."""
    first_year, last_year = find_year_spans(table)
    keys = pd.DataFrame(
        {
            "shape": shapely.to_wkb(shapely.normalize(table.geometry.to_numpy())),
            "first": first_year,
            "last": last_year,
            "row": table["row"].to_numpy(),
        }
    )
    original = keys.groupby(["shape", "first", "last"])["row"].transform("min")
    is_copy = (original < keys["row"]).to_numpy()
    details = [f"as row {row}" for row in original[is_copy]]
    findings.add("duplicate", table[is_copy], "left out", details)
    return table[~is_copy]


def _cut_overlaps(table: gpd.GeoDataFrame, findings: _Findings) -> gpd.GeoDataFrame:
    """Cut overlaps from the later row if the years of two rows are the same."""
    original = table.geometry.to_numpy()
    earlier, later, areas = _list_overlaps(table)
    first_year, last_year = find_year_spans(table)
    have_same_years = (first_year[earlier] == first_year[later]) & (
        last_year[earlier] == last_year[later]
    )
    shapes = original.copy()
    for row in np.unique(later[have_same_years]):
        overlapping = earlier[have_same_years & (later == row)]
        difference = shapely.difference(shapes[row], shapely.union_all(original[overlapping]))
        shapes[row] = extract_polygons(difference)
    row_numbers = table["row"].to_numpy()
    for action, pairs in (
        ("cut from this row", have_same_years),
        ("kept, years differ", ~have_same_years),
    ):
        details = [f"with row {row}" for row in row_numbers[earlier[pairs]]]
        findings.add("overlap", table.iloc[later[pairs]], action, details, areas[pairs])
    cut_rows = later[have_same_years]
    is_covered = np.zeros(len(table), bool)
    is_covered[cut_rows] = _compute_areas(shapes[cut_rows], table.crs) < LEAST_OVERLAP_M2
    findings.add("overlap", table[is_covered], "left out", "wholly within earlier rows")
    geometry = gpd.GeoSeries(shapes, index=table.index, crs=table.crs)
    return table.set_geometry(geometry)[~is_covered]


def _list_overlaps(table: gpd.GeoDataFrame) -> tuple[Int64, Int64, Float64]:
    """List overlaps of rows with common years: the positions of both rows, and the area in m2."""
    shapes = table.geometry.to_numpy()
    first_year, last_year = find_year_spans(table)
    earlier, later = shapely.STRtree(shapes).query(shapes, predicate="intersects")
    have_common_years = (first_year[earlier] <= last_year[later]) & (
        first_year[later] <= last_year[earlier]
    )
    is_pair = (earlier < later) & have_common_years
    earlier = earlier[is_pair]
    later = later[is_pair]
    areas = _compute_areas(shapely.intersection(shapes[earlier], shapes[later]), table.crs)
    overlap = areas >= LEAST_OVERLAP_M2
    return earlier[overlap], later[overlap], areas[overlap]


def _remove_slivers(
    table: gpd.GeoDataFrame, min_width_m: float, findings: _Findings
) -> gpd.GeoDataFrame:
    """Remove parts narrower than the least width, and fill such holes."""
    parts, row_of_part = shapely.get_parts(table.geometry.to_numpy(), return_index=True)
    lonlat = gpd.GeoSeries(parts, crs=table.crs).to_crs(4326).to_numpy()
    is_sliver = _are_narrow(lonlat, min_width_m)
    holes, part_of_hole = _list_holes(parts)
    is_filled = _are_narrow(_list_holes(lonlat)[0], min_width_m)
    row_of_hole = row_of_part[part_of_hole]
    findings.add_pieces("sliver", table, parts[is_sliver], row_of_part[is_sliver], "left out")
    findings.add_pieces("hole", table, holes[is_filled], row_of_hole[is_filled], "filled")
    findings.add_pieces("hole", table, holes[~is_filled], row_of_hole[~is_filled], "kept")
    for part in np.unique(part_of_hole[is_filled]):
        open_holes = holes[(part_of_hole == part) & ~is_filled]
        rings = [hole.exterior for hole in open_holes]
        parts[part] = shapely.Polygon(parts[part].exterior, rings)
    shapes = table.geometry.to_numpy().copy()
    for row in np.unique(np.append(row_of_part[is_sliver], row_of_hole[is_filled])):
        shapes[row] = shapely.multipolygons(parts[(row_of_part == row) & ~is_sliver])
    geometry = gpd.GeoSeries(shapes, index=table.index, crs=table.crs)
    return table.set_geometry(geometry)[~shapely.is_empty(shapes)]


def _list_holes(shapes: _Shapes) -> tuple[_Shapes, Int64]:
    """Return the holes as polygons, and the index of each hole's shape."""
    rings, ring_of_shape = shapely.get_rings(shapes, return_index=True)
    # The first ring of a shape is its shell.
    is_hole = np.diff(ring_of_shape, prepend=-1) == 0
    return shapely.polygons(rings[is_hole]), ring_of_shape[is_hole]


def _are_narrow(lonlat: _Shapes, width_m: float) -> Bool:
    """Mark polygons (longitude, latitude) too narrow for a circle of this diameter."""
    plane = np.array([_project_to_metres(shape) for shape in lonlat], dtype=object)
    # In a narrow polygon every point is within half the width of an edge. So the area is at most
    # the area of this strip.
    may_be_narrow = shapely.area(plane) <= shapely.length(plane) * width_m / 2
    is_narrow = np.zeros(len(plane), bool)
    shrunk = shapely.buffer(plane[may_be_narrow], -width_m / 2)
    is_narrow[may_be_narrow] = shapely.is_empty(shrunk)
    return is_narrow


def _project_to_metres(shape: shapely.Geometry) -> shapely.Geometry:
    """Project a shape to metres around its middle, true to about 1 % over a few kilometres."""
    west, south, east, north = shape.bounds
    middle = [(west + east) / 2, (south + north) / 2]
    lat = np.deg2rad(middle[1])
    geod = Geod(ellps="WGS84")
    bent = 1 - geod.es * np.sin(lat) ** 2
    metres_per_radian = [geod.a * np.cos(lat) / bent**0.5, geod.a * (1 - geod.es) / bent**1.5]
    factors = np.deg2rad(metres_per_radian)
    return shapely.transform(shape, lambda corners: (corners - middle) * factors)
