"""Load a file of polygons as sites: names become ids, and polygons are repaired."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import shapely
from geopandas import GeoDataFrame
from shapely.geometry.base import BaseGeometry

from minecube.catalog.fields import make_id, need
from minecube.catalog.loaders import catalog_folder
from minecube.catalog.site import MARGIN_M, Site
from minecube.errors import CatalogError
from minecube.places import Place, place_of
from minecube.vectors import (
    extract_polygons,
    extract_polygons_of_collections,
    read_vector,
    rename_columns,
    to_texts,
)

log = logging.getLogger(__name__)

_MOST_NAMES = 8
"""Most names listed in a warning."""
_MOST_LETTERS = 60
"""Most characters of a name in a warning."""
_SPAN = r"\s*(\d{4})(?:\.0+)?(?:\s*-\s*(\d{4}))?\s*"
"""One year, also written as 2019.0, or a first and a last year."""
_SITE_FIELDS = ("id", "country", "split", "years", "labels", "margin", "title")
"""Columns of a file of sites, without the geometry."""
_TEXT_FIELDS = ("id", "name", "site", "title", "country", "split", "labels")
"""Text columns of a file of sites."""
_NESTED = (list, tuple, set, dict)
"""Types of nested values in GeoJSON and Parquet."""


def load_sites(
    path: Place | str | None = None,
    *,
    catalogue: bool = False,
    margin: float | None = None,
    layer: str | None = None,
) -> list[Site]:
    """Load the sites of a file of polygons (`minecube.vectors.FORMAT_NAMES`).

    The name of a row is the first value in the columns `id`, `name` and `site`, in upper or lower
    case. A row without a name is called `site_` plus its number. `make_id` turns names into ids,
    and the name becomes the title. The log reports changed names.

    Args:
        path: the file. By default the shipped EuroMineNet and demo sites.
        catalogue: apply a catalogue's rules: unknown columns, unsafe ids and invalid polygons are
            errors. In a user's file, unknown columns are ignored and invalid polygons repaired with
            a warning in the log.
        margin: metres of ground around each polygon. By default the row's column `margin`, else 0
            in a catalogue and 1000 in a user's file.
        layer: the layer to read, as in `minecube.vectors.read_vector`.

    Raises:
        CatalogError: the file cannot be read, has no CRS, or an entry is wrong. Names file, entry
            and field.
    """
    catalogue = catalogue or path is None
    path = place_of(path or catalog_folder() / "sites.geojson")
    table = _read_table(path, layer, catalogue)
    names = _texts_of(table, "id", "name", "site")
    ids = _ids_of(names, catalogue)
    if not catalogue:
        _report_names(path, table, names, ids)
    titles = _texts_of(table, "title", "name")
    titles = titles.mask((titles == "") & (names != ids), names)
    titles = titles.mask(titles == ids, "")
    shapes = _shapes_of(table, ids, path, catalogue)
    default_margin = 0 if catalogue else MARGIN_M
    sites = []
    for row, site_id, title, shape in zip(_rows_of(table), ids, titles, shapes, strict=True):
        margins = (margin, _parse_margin(row["margin"]), default_margin)
        metres = next(metres for metres in margins if metres is not None)
        try:
            sites.append(_site_of(row, site_id, title, shape, metres))
        except ValueError as error:
            raise CatalogError(f"{path}: site {site_id[:100]!r}: {error}") from error
    _need_unique(ids, list(names), path)
    return sites


def _read_table(path: Place, layer: str | None, catalogue: bool) -> GeoDataFrame:
    """Read the rows of a file of sites, in longitude and latitude. Raises CatalogError."""
    try:
        table = read_vector(path, layer)
        if not isinstance(table, GeoDataFrame):
            raise CatalogError(
                f"{path}: holds a table without geometry; expected polygons of sites"
            )
        table = rename_columns(table, {name: name for name in (*_SITE_FIELDS, "name", "site")})
    except (OSError, ValueError, RuntimeError) as error:
        raise CatalogError(f"{path}: cannot be read as sites: {error}") from error
    unknown = sorted(set(table.columns) - {*_SITE_FIELDS, table.geometry.name})
    if unknown and catalogue:
        raise CatalogError(
            f"{path}: field {unknown[0]!r}: expected geometry or one of {', '.join(_SITE_FIELDS)}"
        )
    if table.empty:
        raise CatalogError(f"{path}: holds no site; expected at least one polygon")
    if table.crs is None:
        raise CatalogError(
            f"{path}: has no CRS, so its coordinates cannot be placed; "
            "set one (ogr2ogr -a_srs) and retry"
        )
    return table.to_crs(4326).reset_index(drop=True)


def _texts_of(table: GeoDataFrame, *columns: str) -> pd.Series:
    """Return the first text in these columns per row, or ""."""
    joined = pd.Series("", table.index, dtype="string")
    for column in columns:
        if column in table:
            joined = joined.mask(joined == "", to_texts(table[column]).fillna(""))
    return joined


def _ids_of(names: Iterable[str], catalogue: bool) -> list[str]:
    """Make an id of each name. In a catalogue, unsafe names stay, and are refused later."""
    ids = []
    for row, name in enumerate(names, start=1):
        safe = make_id(name) or f"site_{row}"
        if catalogue:
            safe = name.replace(" ", "_") or safe
        ids.append(safe)
    return ids


def _report_names(path: Place, table: GeoDataFrame, names: pd.Series, ids: Sequence[str]) -> None:
    """Log the ids that differ from the names in the file, and rows without a name."""
    changed = []
    numbered = []
    for name, site_id in zip(names, ids, strict=True):
        if not name:
            numbered.append(site_id)
        elif name != site_id:
            changed.append(f"{name[:_MOST_LETTERS]!r} is {site_id[:_MOST_LETTERS]}")
    if changed:
        log.warning("%s: ids made of names: %s", path, _shorten(changed))
    if numbered:
        columns = ", ".join(map(str, table.columns.drop(table.geometry.name))) or "none"
        log.warning(
            "%s: rows without a name in a column id, name or site are called by their number: %s; "
            "the columns are %s",
            path,
            _shorten(numbered),
            columns,
        )


def _shorten(words: Sequence[str]) -> str:
    remainder = ""
    if len(words) > _MOST_NAMES:
        remainder = f", and {len(words) - _MOST_NAMES} more"
    return ", ".join(words[:_MOST_NAMES]) + remainder


def _shapes_of(
    table: GeoDataFrame, ids: Sequence[str], path: Place, catalogue: bool
) -> list[BaseGeometry | None]:
    """Return the polygons of each row, 2-D, and valid in a user's file. Log each change."""
    shapes, omitted_parts = extract_polygons_of_collections(
        shapely.force_2d(table.geometry.to_numpy())
    )
    polygons = []
    for shape, omitted, site_id in zip(shapes, omitted_parts, ids, strict=True):
        if omitted:
            log.warning(
                "%s: site %s: the areas of its collection were kept, left out: %s",
                path,
                site_id,
                omitted,
            )
        if not catalogue:
            shape = _repair(shape, path, site_id)
        polygons.append(shape)
    return polygons


def _repair(shape: BaseGeometry | None, path: Place, site_id: str) -> BaseGeometry | None:
    if shape is None or shape.is_valid:
        return shape
    polygons = extract_polygons(shapely.make_valid(shape, method="structure"))
    log.warning(
        "%s: site %s: its polygon was invalid (%s) and has been repaired; check the result",
        path,
        site_id,
        shapely.is_valid_reason(shape),
    )
    return shapely.union_all(polygons)


def _rows_of(table: GeoDataFrame) -> list[dict[str, Any]]:
    """Convert a table to one dictionary per row, with a value or None for each field of a site.

    Blank text becomes None. Text fields become text, except lists and dictionaries.
    """
    fields = (*_TEXT_FIELDS, "years", "margin")
    rows: list[dict[str, Any]] = [dict.fromkeys(fields) for _ in range(len(table))]
    for field in fields:
        if field in table:
            for row, value in zip(rows, _values_of(table[field], field), strict=True):
                row[field] = value
    return rows


def _values_of(column: pd.Series, field: str) -> list[Any]:
    """Return the values of a field: nested ones as lists, blank ones as None."""
    values: list[Any] = []
    # pandas reads integers with a gap as floats.
    for value, text in zip(column.convert_dtypes().astype(object), to_texts(column), strict=True):
        if isinstance(value, np.ndarray):
            value = value.tolist()
        if isinstance(value, _NESTED):
            values.append(value or None)
        elif pd.isna(text):
            values.append(None)
        elif field in _TEXT_FIELDS or isinstance(value, str | bytes):
            values.append(text)
        else:
            values.append(value)
    return values


def _site_of(
    row: dict[str, Any], site_id: str, title: str, shape: BaseGeometry | None, margin: Any
) -> Site:
    """Build a site from a row. Raises ValueError for a wrong field."""
    for field in _TEXT_FIELDS:
        need(not isinstance(row[field], _NESTED), field, f"text, found {row[field]!r}")
    return Site(
        id=site_id,
        title=title,
        country=row["country"] or "",
        split=row["split"],
        geometry=shape,
        years=_parse_years(row["years"]),
        labels=row["labels"],
        margin=margin,
    )


def _parse_margin(value: Any) -> Any:
    """Convert text and decimals to a number; other values stay."""
    if not isinstance(value, str | Decimal):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def _parse_years(value: Any) -> tuple[int, ...]:
    """Parse years from a list, a number, or text such as 2015-2024 or 2015, 2020."""
    if value is None:
        return ()
    if isinstance(value, str):
        spans = [re.fullmatch(_SPAN, part) for part in value.strip("[]").split(",")]
        need(all(spans), "years", f"2015-2024 or a list of years, found {value!r}")
        years: list[int] = []
        for start, end in (span.groups() for span in spans if span):
            years += range(int(start), int(end or start) + 1)
        return tuple(years)
    listed = [value]
    if isinstance(value, Iterable):
        listed = list(value)
    words = to_texts(pd.Series(listed, dtype=object)).dropna()
    need(words.str.fullmatch(r"\d{4}(\.0+)?").all(), "years", f"whole years, found {value!r}")
    return tuple(int(word[:4]) for word in words)


def _need_unique(ids: Sequence[str], names: Sequence[str], path: Place) -> None:
    """Raise CatalogError if two rows have one id, and name both."""
    name_by_id: dict[str, str] = {}
    for site_id, name in zip(ids, names, strict=True):
        if site_id in name_by_id and name in ("", name_by_id[site_id]):
            raise CatalogError(
                f"{path}: site {site_id!r} occurs twice; rename one, "
                "since ids name groups of the cube"
            )
        if site_id in name_by_id:
            raise CatalogError(
                f"{path}: sites {name_by_id[site_id]!r} and {name!r} would both have "
                f"the id {site_id!r}; rename one"
            )
        name_by_id[site_id] = name
