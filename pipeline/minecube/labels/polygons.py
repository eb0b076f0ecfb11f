"""Read and repair files of mine polygons, match their sites, and list their years."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import shapely

from minecube.arrays import Bool, Float64
from minecube.catalog import match_ids
from minecube.errors import LabelError
from minecube.labels.dates import YEARS, looks_dated, parse_years
from minecube.places import Place
from minecube.vectors import (
    extract_polygons,
    extract_polygons_of_collections,
    read_vector,
    rename_columns,
    to_texts,
)

AREAL = ("Polygon", "MultiPolygon")
UNDERSTOOD = {
    "year": "year",
    "start": "start",
    "begin": "start",
    "end": "end",
    "site": "site",
    "mapped": "mapped",
}
"""Column in lower case -> meaning. `begin` comes from KML."""
_TRUTHS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
"""Text in lower case -> value. Shapefiles have no boolean type."""
_LISTED_ROWS = 10

log = logging.getLogger(__name__)


def read_polygons(path: Place, layer: str | None = None) -> gpd.GeoDataFrame:
    """Read mine polygons from a file of `minecube.vectors.FORMAT_NAMES`, in the file's own CRS.

    `layer` is the name of a layer, * allowed, as for `minecube.vectors.read_vector`.
    All polygons returned are valid and have area. Column names may be in any case:

        year        Int64.
        start, end  First and last year, Int64, null if open. Dates count by their year.
        site        Text.
        mapped      True for a surveyed area, false for a mine.

    A row without years holds for all years. If a file has surveyed areas, nothing is known outside
    them. Other columns are kept. `repaired` is true for repaired polygons. The log warns of repairs
    and of rows dropped for lack of area. It also warns of lines and points dropped from
    collections, and of unused columns with likely years. The index is the row in the file, from 0.
    GeoJSON without `crs` is longitude and latitude (RFC 7946).

    Raises:
        LabelError: the file is unreadable, empty or without CRS. Or coordinates cannot be degrees,
            or there are other geometries than polygons. Or a year is no calendar year, a row has
            `year` and `start` or `end`, or it ends before it starts.
    """
    rows = read_rows(path, layer)
    table = repair_shapes(rows)
    flat = lacks_area(table.geometry)
    repaired = table["repaired"] & ~flat
    if repaired.any():
        log.warning("%s: invalid polygons were repaired: %s", path, describe_marked_rows(repaired))
    if flat.any():
        log.warning("%s: rows without area were left out: %s", path, describe_marked_rows(flat))
    for row, parts in describe_omitted_parts(rows).items():
        log.warning(
            "%s: the areas of the collection in row %d were kept, left out: %s",
            path,
            row + 1,
            parts,
        )
    return drop_flat_rows(table, path)


def read_rows(path: Place, layer: str | None = None) -> gpd.GeoDataFrame:
    """Read the file's rows, with columns understood. Raise LabelError like `read_polygons`."""
    table = _read_table(path, layer)
    try:  # an unread YEAR would spread one year's polygons over all years
        table = rename_columns(table, UNDERSTOOD)
    except ValueError as error:
        raise LabelError(f"{path}: {error}") from error
    _check_geometries(table, path)
    for name in ("year", "start", "end"):
        if name in table:
            table[name] = _parse_calendar_years(table[name], name, path)
    _check_years(table, path)
    if "site" in table:
        table["site"] = to_texts(table["site"])
    if "mapped" in table:
        table["mapped"] = _parse_truths(table["mapped"], path)
    _warn_of_unread_years(table, path)
    return table


def _read_table(path: Place, layer: str | None) -> gpd.GeoDataFrame:
    """Read rows with a CRS, their shapes in column `geometry`, and the index from 0."""
    try:
        table = read_vector(path, layer)
    except (OSError, ValueError, RuntimeError) as error:
        # pyogrio's errors are RuntimeErrors, Arrow's are ValueErrors.
        reason = str(error).strip() or type(error).__name__
        raise LabelError(f"{path}: cannot be read as polygons: {reason}") from error
    if not isinstance(table, gpd.GeoDataFrame) or table.empty:
        raise LabelError(f"{path}: holds no polygon; expected at least one row with a geometry")
    if table.crs is None:
        raise LabelError(
            f"{path}: has no CRS, so its polygons cannot be placed; "
            "set their CRS (ogr2ogr -a_srs EPSG:..., or the missing .prj)"
        )
    if table.geometry.name != "geometry":
        table = table.rename_geometry("geometry")
    return table.reset_index(drop=True)


def _check_geometries(table: gpd.GeoDataFrame, path: Place) -> None:
    """Raise LabelError for shapes without area, or coordinates outside their CRS."""
    areas, _ = extract_polygons_of_collections(table.geometry.to_numpy())
    shapes = gpd.GeoSeries(areas, index=table.index)
    types = shapes.geom_type
    without_area = types.notna() & ~types.isin(AREAL) & ~shapes.is_empty
    if without_area.any():
        names = ", ".join(sorted(set(types[without_area])))
        raise LabelError(
            f"{path}: expected polygons, found {names} in {describe_marked_rows(without_area)}; "
            "they have no area to rasterise, so take them out (ogr2ogr -nlt) and retry"
        )
    if not np.isfinite(shapely.get_coordinates(table.geometry)).all():
        raise LabelError(
            f"{path}: some coordinates are infinite or not a number, "
            "so the polygons cannot be placed; correct them"
        )
    west, south, east, north = table.total_bounds
    if table.crs.is_geographic and (west < -180.1 or south < -90.1 or east > 360.1 or north > 90.1):
        raise LabelError(
            f"{path}: its CRS ({table.crs.to_string()}) is in degrees but the coordinates reach "
            f"from {west:.6g}, {south:.6g} to {east:.6g}, {north:.6g}; "
            "they look projected or swapped: set their CRS, or swap longitude and latitude"
        )


def _parse_calendar_years(column: pd.Series, name: str, path: Place) -> pd.Series:
    years = parse_years(column)
    words = to_texts(column)
    invalid = words.notna() & ~years.isin(list(YEARS)).fillna(False)
    if invalid.any():
        examples = ", ".join(words[invalid].unique()[:3])
        meaning_of_null = f"an open {name}"
        if name == "year":
            meaning_of_null = "all years"
        raise LabelError(
            f"{path}: column {name}: expected whole calendar years ({YEARS[0]}..{YEARS[-1]}), "
            f"dates, or null for {meaning_of_null}, "
            f"found {examples} in {describe_marked_rows(invalid)}; correct them"
        )
    return years.astype("Int64")


def _check_years(table: gpd.GeoDataFrame, path: Place) -> None:
    """Raise LabelError for rows with a year and a start or end, or with an end before its start."""
    missing = pd.Series(pd.NA, index=table.index, dtype="Int64")
    year, start, end = (table.get(name, missing) for name in ("year", "start", "end"))
    contradictory = year.notna() & (start.notna() | end.notna())
    if contradictory.any():
        raise LabelError(
            f"{path}: expected `year`, or `start` and `end`, "
            f"found both in {describe_marked_rows(contradictory)}; empty one of them"
        )
    backwards = (start > end).fillna(False)
    if backwards.any():
        raise LabelError(
            f"{path}: expected `start` up to `end`, found rows that end before they start "
            f"({describe_marked_rows(backwards)}); correct them"
        )


def _parse_truths(column: pd.Series, path: Place) -> pd.Series:
    words = to_texts(column).str.lower().fillna("false")
    is_truth = words.isin(list(_TRUTHS))
    if not is_truth.all():
        raise LabelError(
            f"{path}: column mapped: expected true for a surveyed area or false for a mine, "
            f"found {words[~is_truth].iloc[0]!r}; "
            "rename the column if it means something else"
        )
    return words.map(_TRUTHS).astype(bool)


def _warn_of_unread_years(table: gpd.GeoDataFrame, path: Place) -> None:
    columns = find_unread_year_columns(table)
    if columns:
        log.warning(
            "%s: %s may hold years, but only the columns `year`, or `start` and `end`, "
            "are read as years; %d rows hold for all years, or have an open end; "
            "rename the column if it holds their years",
            path,
            " and ".join(f"column `{column}`" for column in columns),
            int(_are_open_ended(table).sum()),
        )


def find_unread_year_columns(table: gpd.GeoDataFrame) -> list[str]:
    """List unused columns with likely years or dates, unless all rows have complete years."""
    if not _are_open_ended(table).any():
        return []
    read_columns = [name for name in {*UNDERSTOOD.values(), "geometry"} if name in table]
    unused = table.columns.drop(read_columns)
    return [str(name) for name in unused if looks_dated(table[name].dropna(), str(name))]


def _are_open_ended(table: gpd.GeoDataFrame) -> Bool:
    """Mark rows without a first or last year."""
    first_year, last_year = find_year_spans(table)
    return np.isinf(first_year) | np.isinf(last_year)


def repair_shapes(table: gpd.GeoDataFrame) -> gpd.GeoDataFrame:
    """Return the rows with valid, flat shapes and `repaired`. Shapes without area stay."""
    shapes, _ = extract_polygons_of_collections(shapely.force_2d(table.geometry.to_numpy()))
    invalid = ~shapely.is_valid(shapes) & ~shapely.is_missing(shapes)
    # "structure" unites a self-crossing shell. The default rule (even-odd) would cut holes.
    valid = shapely.make_valid(shapes[invalid], method="structure", keep_collapsed=False)
    shapes[invalid] = [extract_polygons(shape) for shape in valid]
    geometry = gpd.GeoSeries(shapes, index=table.index, crs=table.crs)
    return table.set_geometry(geometry).assign(repaired=invalid)


def lacks_area(shapes: gpd.GeoSeries) -> Bool:
    """Mark missing, empty and flat shapes."""
    flat: Bool = shapely.is_missing(shapes) | ~(shapely.area(shapes.to_numpy()) > 0)
    return flat


def drop_flat_rows(table: gpd.GeoDataFrame, path: Place) -> gpd.GeoDataFrame:
    """Select the rows with area. Raise LabelError without any."""
    flat = lacks_area(table.geometry)
    if flat.all():
        raise LabelError(f"{path}: holds no polygon with area; expected at least one")
    return table[~flat]


def describe_omitted_parts(table: gpd.GeoDataFrame) -> dict[int, str]:
    """Map each row (from 0) to a description of its GeometryCollection's lines and points."""
    _, parts = extract_polygons_of_collections(table.geometry.to_numpy())
    return {int(row): parts[row] for row in np.flatnonzero(parts != "")}


def match_sites(polygons: gpd.GeoDataFrame, sites: Sequence[str], path: Place) -> gpd.GeoDataFrame:
    """Rename each `site` to its catalogue id, and log the changed names.

    A name may equal an id, or match only one id apart from case, accents, blanks and `_ . -`. Other
    names stay.

    Raises:
        LabelError: a name may mean several ids.
    """
    if "site" not in polygons:
        return polygons
    ids_by_name = {name: match_ids(name, sites) for name in polygons["site"].dropna().unique()}
    for name, ids in ids_by_name.items():
        if len(ids) > 1:
            raise LabelError(
                f"{path}: site {name!r} may be {' or '.join(ids)}; spell it as one of them"
            )
    renamed = {name: ids[0] for name, ids in ids_by_name.items() if ids and ids[0] != name}
    if renamed:
        changes = ", ".join(f"{name!r} is {site}" for name, site in renamed.items())
        log.warning("%s: sites by another name: %s", path, changes)
    return polygons.assign(site=polygons["site"].replace(renamed))


def mark_rows_of_site(polygons: gpd.GeoDataFrame, site: str) -> Bool:
    """Mark the rows of this site."""
    if "site" not in polygons:
        return np.zeros(len(polygons), bool)
    of_this_site: Bool = (polygons["site"] == site).to_numpy(bool, na_value=False)
    return of_this_site


def mark_rows_without_site(polygons: gpd.GeoDataFrame) -> Bool:
    """Mark the rows without a site. Each counts at all sites in reach."""
    if "site" not in polygons:
        return np.ones(len(polygons), bool)
    unnamed: Bool = polygons["site"].isna().to_numpy(bool)
    return unnamed


def mark_surveyed(polygons: gpd.GeoDataFrame) -> Bool:
    """Mark the rows with surveyed areas, as opposed to mines."""
    if "mapped" not in polygons:
        return np.zeros(len(polygons), bool)
    surveyed: Bool = polygons["mapped"].to_numpy(bool)
    return surveyed


def find_year_spans(polygons: gpd.GeoDataFrame) -> tuple[Float64, Float64]:
    """Return the first and last year of each row, -inf and inf if open."""
    year, start, end = (_read_numbers(polygons, name) for name in ("year", "start", "end"))
    first_year = np.where(np.isnan(year), start, year)
    last_year = np.where(np.isnan(year), end, year)
    return (
        np.where(np.isnan(first_year), -np.inf, first_year),
        np.where(np.isnan(last_year), np.inf, last_year),
    )


def _read_numbers(polygons: gpd.GeoDataFrame, name: str) -> Float64:
    """Return a column as numbers, NaN where missing."""
    if name not in polygons:
        return np.full(len(polygons), np.nan)
    numbers: Float64 = pd.to_numeric(polygons[name]).to_numpy(np.float64, na_value=np.nan)
    return numbers


def list_years(*tables: gpd.GeoDataFrame) -> list[int]:
    """List years of polygons, ascending: named years, and years in between.

    The list is empty if all rows hold forever.
    """
    spans: set[tuple[float, float]] = set()
    for table in tables:
        first_years, last_years = find_year_spans(table)
        spans |= set(zip(first_years.tolist(), last_years.tolist(), strict=True))
    limits = [year for span in spans for year in span if np.isfinite(year)]
    if not limits:
        return []
    earliest = min(limits)
    latest = max(limits)
    years: set[int] = set()
    for first_year, last_year in spans:
        if np.isfinite([first_year, last_year]).any():
            years |= set(range(int(max(first_year, earliest)), int(min(last_year, latest)) + 1))
    return sorted(years)


def list_years_or_none(*tables: gpd.GeoDataFrame) -> list[int | None]:
    """List the years of polygons like `list_years`, or [None] if all rows hold forever."""
    return [*list_years(*tables)] or [None]


def format_years(years: Iterable[int]) -> str:
    """Format years as 2020, or 2018..2020 (3 years)."""
    distinct = sorted(set(years))
    if len(distinct) == 1:
        return f"{distinct[0]}"
    return f"{distinct[0]}..{distinct[-1]} ({len(distinct)} years)"


def describe_marked_rows(marked: npt.ArrayLike) -> str:
    """Name the true rows, counted from 1 as in an attribute table."""
    return describe_rows(np.flatnonzero(np.asarray(marked, bool)))


def describe_rows(index: Iterable[int]) -> str:
    """Name rows of an index from 0, counted from 1 as in an attribute table."""
    numbers = [str(row + 1) for row in index]
    if len(numbers) == 1:
        return f"row {numbers[0]}"
    text = f"rows {', '.join(numbers[:_LISTED_ROWS])}"
    if len(numbers) > _LISTED_ROWS:
        text += f" and {len(numbers) - _LISTED_ROWS} more"
    return text
