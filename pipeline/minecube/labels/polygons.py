"""Read and repair files of mine polygons, find their years, and detect misplaced polygons."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import shapely
from pyproj import CRS, Geod

from minecube.catalog import FIRST_YEAR, same_names
from minecube.errors import LabelError
from minecube.vectors import (
    areal_parts,
    areas_of_collections,
    read_vector,
    texts,
    understood_columns,
)

YEARS = range(1900, 2101)  # valid calendar years of a polygon; others are typing errors
AREAL = ("Polygon", "MultiPolygon")
UNDERSTOOD = {name: name for name in ("year", "start", "end", "site", "mapped")} | {
    "begin": "start"
}
"""Column in lower case -> meaning. `begin` comes from KML."""
_MONTH, _DAY = "(?:0?[1-9]|1[0-2])", "(?:0?[1-9]|[12][0-9]|3[01])"
_DATE = (
    rf"^(?:(\d{{4}})[-/]{_MONTH}(?:[-/]{_DAY}(?:[T ].*)?)?"  # 2019-06-01T10:00, 2019/6
    rf"|(\d{{4}})(?:\.{_MONTH}\.{_DAY}|(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01]))"  # 2019.06.01, 20190601
    rf"|(?:{_DAY}[-/.]{_DAY}[-/.]|{_MONTH}[-/])(\d{{4}}))$"  # 1.6.2019, 06/13/2019, 6/2019
)
_PART = r"[-_ ./,]*"
_MONTH_NAME = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?"
    r"|nov(?:ember)?|dec(?:ember)?|spring|summer|autumn|fall|winter|q[1-4])"
)
_DATE_WITHIN = (
    r"(?i)(?:(?<!\d)(20\d\d)(?:[-_./](?:0[1-9]|1[0-2])[-_./]|(?:0[1-9]|1[0-2]))(?:0[1-9]|[12]\d|3[01])"  # S2A_20190601T1010
    rf"|(?<!\d){_DAY}[-/.]{_DAY}[-/.](20\d\d)"  # from 1.6.2019
    rf"|(?<!\d)(20\d\d){_PART}{_MONTH_NAME}(?![a-z])"  # 2019-Jun-01, 2019Q3
    rf"|(?<![a-z]){_MONTH_NAME}{_PART}(?:\d\d?(?:st|nd|rd|th)?[-_ ./,]+)?(20\d\d)"  # Jun 2019, June 1, 2019
    r")(?!\d)"
)
_YEARS_ALONE = (
    r"(?i)^\W*(20\d\d)(?:\W+(?:[a-z]{1,3}\W+)?(?:20\d\d|\d\d?))*\W*$"  # 2019/2020, 2019 to 2020
)
_YEAR_AND_DAY_OR_MONTH = (
    r"(?<![\d.,])(20\d\d)(?:00[1-9]|0[1-9]\d|[12]\d\d|3[0-5]\d|36[0-6]|0[1-9]|1[0-2])(?:\.0+)?(?![\d,]|\.\d)"  # 2019152, 201906
    r"|^(?:0?[1-9]|1[0-2])\.(20\d\d)$"  # 06.2019
)
_YEAR_WITHIN = r"(?<![\d.,])(20\d\d)(?![0-9A-Za-z]|[.,]\d)"  # C2019, Sommer 2019
_OTHER_NUMBER = r"(?<!\d)(?!20\d\d(?!\d))\d{3,}"
_MOST = 0.8
_SAMPLE = 1000
"""Number of values per column searched for years in other forms."""
_ID_NAME = r"Id$|ID$|(?:^|[^a-z])[a-z]?id$|objectid$"
_TIMED_NAME = r"time|date|stamp|epoch|acq|taken|obs"
_DATED_NAME = r"year|date(?!d)|jahr|datum|ann[eé]e|fecha|(?<![a-z])(?:a[nñ]o|anno|rok)(?![a-z])"
"""Words in the names of columns with years or dates."""
NEAR_M = 10_000
"""Largest distance of a polygon from its site. Farther polygons are misplaced."""

log = logging.getLogger(__name__)


def read_polygons(path: Path, layer: str | None = None) -> gpd.GeoDataFrame:
    """Read mine polygons from a file of `minecube.vectors.NAMED`, in the file's own CRS.

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

    Args:
        path: the file.
        layer: the layer to read, as in `minecube.vectors.read_vector`.

    Raises:
        LabelError: the file is unreadable, empty or without CRS. Or coordinates cannot be degrees,
            or there are other geometries than polygons. Or a year is no calendar year, a row has
            `year` and `start` or `end`, or it ends before it starts.
    """
    raw = load(path, layer)
    table = mended(raw)
    empty = without_area(table.geometry)
    if (table["repaired"] & ~empty).any():
        log.warning(
            "%s: invalid polygons were repaired: %s", path, rows_text(table["repaired"] & ~empty)
        )
    if empty.any():
        log.warning("%s: rows without area were left out: %s", path, rows_text(empty))
    for row, parts in left_out_parts(raw).items():
        log.warning(
            "%s: the areas of the collection in row %d were kept, left out: %s",
            path,
            row + 1,
            parts,
        )
    return with_area(table, path)


def load(path: Path, layer: str | None = None) -> gpd.GeoDataFrame:
    """Read the file's rows, with columns understood. Raise LabelError like `read_polygons`."""
    try:
        table = read_vector(path, layer)
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # pyogrio's errors are RuntimeErrors, Arrow's ValueErrors
        reason = str(error).strip() or type(error).__name__
        raise LabelError(f"{path}: cannot be read as polygons: {reason}") from error
    if not isinstance(table, gpd.GeoDataFrame) or table.empty:
        raise LabelError(f"{path}: holds no polygon; expected at least one row with a geometry")
    if table.crs is None:
        raise LabelError(
            f"{path}: has no CRS, so its polygons cannot be placed on the grid; set the one they were drawn in "
            "(ogr2ogr -a_srs EPSG:..., or the missing .prj) and retry"
        )
    table = (
        table if table.geometry.name == "geometry" else table.rename_geometry("geometry")
    ).reset_index(drop=True)
    try:  # an unread YEAR would spread one year's polygons over all years
        table = understood_columns(table, UNDERSTOOD)
    except ValueError as error:
        raise LabelError(f"{path}: {error}") from error
    _need_areal(table, path)
    for name in ("year", "start", "end"):
        if name in table:
            table[name] = _calendar_years(table[name], name, path)
    _need_order(table, path)
    if "site" in table:
        table["site"] = texts(table["site"])
    if "mapped" in table:
        table["mapped"] = _true_or_false(table["mapped"], path)
    if columns := unread_years(table):
        log.warning(
            "%s: %s may hold years, but only the columns `year`, or `start` and `end`, are read as years; %d rows hold for all "
            "years, or have an open end; rename the column if it says when a polygon holds",
            path,
            " and ".join(f"column `{column}`" for column in columns),
            int(open_ended(table).sum()),
        )
    return table


def unread_years(table: gpd.GeoDataFrame) -> list[str]:
    """List unused columns with likely years or dates, unless all rows have complete years."""
    if not open_ended(table).any():
        return []
    others = table.columns.drop(
        [name for name in {*UNDERSTOOD.values(), "geometry"} if name in table]
    )
    return [str(name) for name in others if _looks_dated(table[name].dropna(), str(name))]


def open_ended(table: gpd.GeoDataFrame) -> npt.NDArray[np.bool_]:
    """Mark rows without a first or last year."""
    first, last = spans(table)
    return np.isinf(first) | np.isinf(last)


def _looks_dated(column: pd.Series, name: str) -> bool:
    if isinstance(column.dtype, gpd.array.GeometryDtype):
        return False
    values = texts(column).dropna()
    if values.empty or values.str.contains("\ufffd").any():  # bytes of another content than text
        return False
    are_ids = re.search(_ID_NAME, name) is not None
    are_numbers = pd.api.types.is_numeric_dtype(column)
    share = float(_years_in(values).isin(list(YEARS)).mean())
    if (share == 1 and not (are_numbers and are_ids)) or (share >= 0.5 and not are_numbers):
        return True
    if re.search(_DATED_NAME, name.lower()) and values.str.contains(r"\d").any():
        return True
    sample = values.iloc[:: max(1, len(values) // _SAMPLE)]
    return _holds_dates(sample) or (not are_ids and _holds_years(sample, name))


def _holds_dates(values: pd.Series) -> bool:
    """Return whether half of the texts contain a whole date, or only years, of the mission."""
    dates = values.str.extract(_DATE_WITHIN).bfill(axis="columns").iloc[:, 0]
    years = values.str.extract(_YEARS_ALONE)[0]
    found = dates.fillna(years).where(~_are_numbers(values))
    return float(_of_mission(found).mean()) >= 0.5


def _holds_years(values: pd.Series, name: str) -> bool:
    """Return whether most numbers or texts contain a year of the mission in another form.

    A single year within a text may be part of a name, so at least two different years are needed.
    """
    numbers = values.str.extract(_YEAR_AND_DAY_OR_MONTH).bfill(axis="columns").iloc[:, 0]
    if float(_of_mission(numbers).mean()) >= _MOST or _are_seconds(values, name):
        return True
    years = values.str.extract(_YEAR_WITHIN)[0].where(
        ~values.str.contains(_OTHER_NUMBER) & ~_are_numbers(values)
    )
    found = _of_mission(years)
    return float(found.mean()) >= _MOST and len(years[found].unique()) > 1


def _are_seconds(values: pd.Series, name: str) -> bool:
    """Return whether most values are seconds or milliseconds since 1970, in the mission's years.

    Ids and phone numbers may be as large. So the values must be whole minutes, or the name must
    mention time.
    """
    numbers = pd.to_numeric(values.where(values.str.fullmatch(r"\d{10}(\d{3})?(\.0+)?"))).astype(
        "Float64"
    )
    seconds = numbers.where(numbers < 1e10, numbers / 1000)
    found = _of_mission(pd.to_datetime(seconds, unit="s", errors="coerce").dt.year)
    if not re.search(_TIMED_NAME, name.lower()):
        found &= (seconds % 60 == 0).fillna(False)
    return float(found.mean()) >= _MOST


def _are_numbers(values: pd.Series) -> pd.Series:
    return pd.to_numeric(values, errors="coerce").notna() | values.str.fullmatch(
        r"\d+,(?!20\d\d$)\d+"
    )


def _of_mission(years: pd.Series) -> pd.Series:
    """Mark years from the mission's first to next year."""
    mission = range(FIRST_YEAR, datetime.now(tz=UTC).year + 2)
    return pd.to_numeric(years).isin(list(mission)).fillna(False).astype(bool)


def _years_in(values: pd.Series) -> pd.Series:
    """Extract years from numbers, dates, or texts of either, Float64, missing without one."""
    found = texts(values).str.extract(_DATE)
    year = found[0].fillna(found[1]).fillna(found[2])
    return pd.to_numeric(year.fillna(texts(values)), errors="coerce").astype("Float64")


def left_out_parts(table: gpd.GeoDataFrame) -> dict[int, str]:
    """Map each row (from 0) to a description of its GeometryCollection's lines and points."""
    words = areas_of_collections(table.geometry.to_numpy())[1]
    return {int(row): words[row] for row in np.flatnonzero(words != "")}


def match_sites(polygons: gpd.GeoDataFrame, sites: Sequence[str], path: Path) -> gpd.GeoDataFrame:
    """Rename each `site` to its catalogue id, and log the changed names.

    A name may equal an id, or match only one id apart from case, accents, blanks and `_ . -`. Other
    names stay.

    Raises:
        LabelError: a name may mean several ids.
    """
    if "site" not in polygons:
        return polygons
    found = {name: same_names(name, sites) for name in polygons["site"].dropna().unique()}
    for name, ids in found.items():
        if len(ids) > 1:
            raise LabelError(
                f"{path}: site {name!r} may be {' or '.join(ids)}; spell it as one of them"
            )
    renamed = {name: ids[0] for name, ids in found.items() if ids and ids[0] != name}
    if renamed:
        log.warning(
            "%s: sites by another name: %s",
            path,
            ", ".join(f"{name!r} is {renamed[name]}" for name in renamed),
        )
    return polygons.assign(site=polygons["site"].replace(renamed))


def of_site(polygons: gpd.GeoDataFrame, site: str) -> npt.NDArray[np.bool_]:
    """Mark the rows of this site."""
    if "site" not in polygons:
        return np.zeros(len(polygons), bool)
    own: npt.NDArray[np.bool_] = (polygons["site"] == site).to_numpy(bool, na_value=False)
    return own


def of_no_site(polygons: gpd.GeoDataFrame) -> npt.NDArray[np.bool_]:
    """Mark the rows without a site. Each counts at all sites in reach."""
    if "site" not in polygons:
        return np.ones(len(polygons), bool)
    unnamed: npt.NDArray[np.bool_] = polygons["site"].isna().to_numpy(bool)
    return unnamed


def _need_areal(table: gpd.GeoDataFrame, path: Path) -> None:
    shapes = gpd.GeoSeries(areas_of_collections(table.geometry.to_numpy())[0], index=table.index)
    kinds = shapes.geom_type
    other = kinds.notna() & ~kinds.isin(AREAL) & ~shapes.is_empty
    if other.any():
        raise LabelError(
            f"{path}: expected polygons, found {', '.join(sorted(set(kinds[other])))} in {rows_text(other)}; "
            "they have no area to rasterise, so take them out (ogr2ogr -nlt) and retry"
        )
    if not np.isfinite(shapely.get_coordinates(table.geometry)).all():
        raise LabelError(
            f"{path}: some coordinates are infinite or not a number, so the polygons cannot be placed; mend them"
        )
    west, south, east, north = table.total_bounds
    if table.crs.is_geographic and (west < -180.1 or south < -90.1 or east > 360.1 or north > 90.1):
        raise LabelError(
            f"{path}: its CRS ({table.crs.to_string()}) is in degrees but the coordinates reach from {west:.6g}, {south:.6g} "
            f"to {east:.6g}, {north:.6g}; they look projected, or have longitude and latitude swapped: state the CRS they are "
            "in, or swap them, and retry"
        )


def _calendar_years(column: pd.Series, name: str, path: Path) -> pd.Series:
    numbers = _years_in(column)
    words = texts(column)
    wrong = words.notna() & ~numbers.isin(list(YEARS)).fillna(False)
    if wrong.any():
        found = ", ".join(words[wrong].unique()[:3])
        where = "all years" if name == "year" else f"an open {name}"
        raise LabelError(
            f"{path}: column {name}: expected whole calendar years ({YEARS[0]}..{YEARS[-1]}), dates, or null for {where}, "
            f"found {found} in {rows_text(wrong)}; the year decides which mask a polygon is drawn on, so correct it"
        )
    return numbers.astype("Int64")


def _need_order(table: gpd.GeoDataFrame, path: Path) -> None:
    missing = pd.Series(pd.NA, index=table.index, dtype="Int64")
    year, start, end = (table.get(name, missing) for name in ("year", "start", "end"))
    both = year.notna() & (start.notna() | end.notna())
    if both.any():
        raise LabelError(
            f"{path}: expected `year`, or `start` and `end`, found both in {rows_text(both)}; empty one of them"
        )
    backwards = (start > end).fillna(False)
    if backwards.any():
        raise LabelError(
            f"{path}: expected `start` up to `end`, found rows that end before they start ({rows_text(backwards)}); they would "
            "hold in no year, so correct them"
        )


def mended(table: gpd.GeoDataFrame) -> gpd.GeoDataFrame:
    """Return the rows with valid, flat shapes and `repaired`. Shapes without area stay."""
    shapes, _ = areas_of_collections(shapely.force_2d(table.geometry.to_numpy()))
    broken = ~shapely.is_valid(shapes) & ~shapely.is_missing(shapes)
    # "structure" unites a self-crossing shell. The default rule (even-odd) would cut holes.
    shapes[broken] = [
        areal_parts(s)
        for s in shapely.make_valid(shapes[broken], method="structure", keep_collapsed=False)
    ]
    return table.set_geometry(gpd.GeoSeries(shapes, index=table.index, crs=table.crs)).assign(
        repaired=broken
    )


def without_area(shapes: gpd.GeoSeries) -> npt.NDArray[np.bool_]:
    """Mark missing, empty and flat shapes."""
    empty: npt.NDArray[np.bool_] = shapely.is_missing(shapes) | ~(
        shapely.area(shapes.to_numpy()) > 0
    )
    return empty


def with_area(table: gpd.GeoDataFrame, path: Path) -> gpd.GeoDataFrame:
    """Select the rows with area. Raise LabelError without any."""
    empty = without_area(table.geometry)
    if empty.all():
        raise LabelError(f"{path}: holds no polygon with area; expected at least one")
    return table[~empty]


def rows_text(which: npt.ArrayLike) -> str:
    """Name the true rows, counted from 1 as in an attribute table."""
    return index_text(np.flatnonzero(np.asarray(which, bool)))


def index_text(index: Iterable[int]) -> str:
    """Name rows of an index from 0, counted from 1 as in an attribute table."""
    numbers = [str(n + 1) for n in index]
    more = f" and {len(numbers) - 10} more" if len(numbers) > 10 else ""
    return f"row{'s' if len(numbers) > 1 else ''} {', '.join(numbers[:10])}{more}"


def spans(polygons: gpd.GeoDataFrame) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the first and last year of each row, -inf and inf if open."""

    def column(name: str) -> npt.NDArray[np.float64]:
        values = polygons[name] if name in polygons else pd.Series(np.nan, index=polygons.index)
        return pd.to_numeric(values).to_numpy(np.float64, na_value=np.nan)

    year, start, end = (column(name) for name in ("year", "start", "end"))
    first, last = (np.where(np.isnan(year), own, year) for own in (start, end))
    return np.where(np.isnan(first), -np.inf, first), np.where(np.isnan(last), np.inf, last)


def _true_or_false(column: pd.Series, path: Path) -> pd.Series:
    # Shapefiles have no boolean type.
    words = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    said = texts(column).str.lower().fillna("false")
    if not said.isin(list(words)).all():
        raise LabelError(
            f"{path}: column mapped: expected true where a row is an area that was looked at, false where it is a mine, found "
            f"{said[~said.isin(list(words))].iloc[0]!r}; rename the column if it means something else"
        )
    return said.map(words).astype(bool)


def mapped(polygons: gpd.GeoDataFrame) -> npt.NDArray[np.bool_]:
    """Mark the rows with surveyed areas, as opposed to mines."""
    rows: npt.NDArray[np.bool_] = (
        np.zeros(len(polygons), bool)
        if "mapped" not in polygons
        else polygons["mapped"].to_numpy(bool)
    )
    return rows


def years_of(*tables: gpd.GeoDataFrame) -> list[int]:
    """List years of polygons, ascending: named years, and years in between.

    The list is empty if all rows hold forever.
    """
    found = [spans(t) for t in tables]
    ends = np.concatenate([end for span in found for end in span])
    ends = ends[np.isfinite(ends)]
    if not ends.size:
        return []
    years: set[int] = set()
    for first, last in {
        pair
        for starts, stops in found
        for pair in zip(starts.tolist(), stops.tolist(), strict=True)
    }:
        if np.isfinite([first, last]).any():
            years |= set(range(int(max(first, ends.min())), int(min(last, ends.max())) + 1))
    return sorted(years)


def years_or_all(*tables: gpd.GeoDataFrame) -> list[int | None]:
    """List the years of polygons like `years_of`, or [None] if all rows hold forever."""
    return [*years_of(*tables)] if years_of(*tables) else [None]


def distances_m(lonlat: gpd.GeoSeries, area: shapely.Geometry) -> npt.NDArray[np.float64]:
    """Compute metres from each shape to the area, both in longitude and latitude.

    The distance is 0 if they meet, and inf for shapes off the globe. It is measured between the
    points nearest in degrees. So it is some per cent too large for distant shapes.
    """
    ends = np.full((len(lonlat), 2, 2), np.nan)
    lines = shapely.shortest_line(lonlat.to_numpy(), area)
    there = ~shapely.is_missing(lines) & ~shapely.is_empty(lines)
    ends[there] = shapely.get_coordinates(lines[there]).reshape(-1, 2, 2)
    on_globe = np.isfinite(ends).all(axis=(1, 2)) & (np.abs(ends[:, :, 1]) <= 90).all(axis=1)
    metres = np.full(len(lonlat), np.inf)
    a, b = ends[on_globe, 0], ends[on_globe, 1]
    metres[on_globe] = Geod(ellps="WGS84").inv(a[:, 0], a[:, 1], b[:, 0], b[:, 1])[2]
    return metres


def swaps_that_place(polygons: gpd.GeoSeries, area: shapely.Geometry) -> pd.Series:
    """Name each misplaced polygon's likely coordinate mistake, "" if unknown.

    Candidates are swapped longitude and latitude, lost signs, both, and a UTM zone of the other
    hemisphere. A mistake explains a polygon if its correction lies within 10 km of the area (in
    longitude and latitude). If several fit, the one explaining most polygons wins.
    """
    places = {
        words: distances_m(lonlat, area) <= NEAR_M for words, lonlat in _mended_places(polygons)
    }
    mistakes = pd.Series("", polygons.index)
    for words, explained in sorted(places.items(), key=lambda place: -place[1].sum()):
        mistakes[explained & (mistakes == "")] = words
    return mistakes


def likely_swap(mistakes: pd.Series) -> str:
    """Return the most frequent mistake and its count as a clause, or ""."""
    named = mistakes[mistakes != ""].value_counts()
    return (
        f"; {named.index[0]}, {named.iloc[0]} of {len(mistakes)} would lie there"
        if len(named)
        else ""
    )


def _mended_places(polygons: gpd.GeoSeries) -> Iterator[tuple[str, gpd.GeoSeries]]:
    x, y = ("longitude", "latitude") if polygons.crs.is_geographic else ("x", "y")
    moves = {
        f"with {x} and {y} swapped": (True, 1, 1),
        f"with the sign of {x} changed": (False, -1, 1),
        f"with the sign of {y} changed": (False, 1, -1),
        "with both signs changed": (False, -1, -1),
        f"with {x} and {y} swapped and the sign of {x} changed": (True, -1, 1),
        f"with {x} and {y} swapped and the sign of {y} changed": (True, 1, -1),
        f"with {x} and {y} swapped and both signs changed": (True, -1, -1),
    }
    for words, (swap, sign_x, sign_y) in moves.items():
        moved = shapely.transform(
            polygons.to_numpy(),
            lambda xy, s=swap, sx=sign_x, sy=sign_y: (xy[:, ::-1] if s else xy) * [sx, sy],
        )
        yield words, gpd.GeoSeries(moved, index=polygons.index, crs=polygons.crs).to_crs(4326)
    if zone := polygons.crs.utm_zone:
        other = CRS.from_dict({"proj": "utm", "zone": int(zone[:-1]), "south": zone[-1] == "N"})
        yield (
            "in the UTM zone of the other hemisphere",
            polygons.set_crs(other, allow_override=True).to_crs(4326),
        )


def years_text(years: Iterable[int]) -> str:
    """Format years as 2020, or 2018..2020 (3 years)."""
    known = sorted(set(years))
    return f"{known[0]}" if len(known) == 1 else f"{known[0]}..{known[-1]} ({len(known)} years)"
