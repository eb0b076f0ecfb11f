"""Read sites, sources, recipes, models and presets from data files into frozen values.

Unknown keys are errors.

The shipped catalogue is `catalog/` of the checkout, or `_catalog` inside the wheel. Users extend it
by a folder with any of `sites.geojson`, `sources.yaml`, `recipes.yaml`, `models.yaml`,
`presets.yaml`. `catalog/README.md` describes every field.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
import shapely
import yaml
from geopandas import GeoDataFrame
from shapely.geometry.base import BaseGeometry

from minecube.catalog.fields import (
    BANDS,
    NATIVE_M,
    SCL,
    FieldError,
    need,
    need_name,
    safe_name,
    same_names,
)
from minecube.catalog.model import TASKS, ModelCard, Weights
from minecube.catalog.recipe import (
    FALLBACKS,
    LAYERS,
    QUALITY,
    REDUCERS,
    BestPixel,
    BrightOverride,
    HazeTest,
    Layer,
    MaskRule,
    Recipe,
    Registration,
    SecondOpinion,
)
from minecube.catalog.release import Release
from minecube.catalog.training import Settings
from minecube.errors import CatalogError
from minecube.vectors import areas_of_collections, read_vector, texts, understood_columns

__all__ = [
    "ASSET_KEYS",
    "BANDS",
    "FALLBACKS",
    "FIRST_YEAR",
    "LAYERS",
    "NATIVE_M",
    "QUALITY",
    "REDUCERS",
    "SCL",
    "TASKS",
    "Access",
    "BestPixel",
    "BrightOverride",
    "HazeTest",
    "Layer",
    "MaskRule",
    "ModelCard",
    "Offset",
    "Recipe",
    "Registration",
    "Release",
    "SecondOpinion",
    "Settings",
    "Site",
    "Source",
    "Weights",
    "as_dict",
    "load_models",
    "load_presets",
    "load_recipes",
    "load_releases",
    "load_sites",
    "load_sources",
    "model_card_of",
    "pick",
    "recipe_of",
    "safe_name",
    "same_names",
    "yaml_problem",
]

_COMMON_NAMES = (
    "blue",
    "green",
    "red",
    "rededge1",
    "rededge2",
    "rededge3",
    "nir",
    "nir08",
    "swir16",
    "swir22",
    "scl",
)
ASSET_KEYS = {
    band: (common, band, f"{band}_{NATIVE_M[band]}m")
    for band, common in zip((*BANDS, SCL), _COMMON_NAMES, strict=True)
}
"""Band -> asset keys in common use: Element 84's, Microsoft's and CDSE's, at the band's own pixel size."""
FIRST_YEAR = 2015
"""Sentinel-2A was launched in June 2015."""
MARGIN_M = 1000
"""Default margin in metres around polygons of a user's file.

It adds room for growth, and background.
"""
LARGEST_MARGIN_M = 100_000
_ADDED = ("date_excess",)
"""Fields missing in the first stores.

If unset, they are not written, so the hashes of those stores stay valid.
"""
_SUGGESTED = 8
"""Most names listed in an error."""
_LONGEST = 60
"""Most characters of a name in a warning."""

_SPAN = r"\s*(\d{4})(?:\.0+)?(?:\s*-\s*(\d{4}))?\s*"
"""One year, also written as 2019.0, or a first and a last year."""
_SITE_FIELDS = ("id", "country", "split", "years", "labels", "margin", "title")
"""Columns of a file of sites, without the geometry."""
_TEXT_FIELDS = ("id", "name", "site", "title", "country", "split", "labels")
"""Text columns of a file of sites."""
_NESTED = (list, tuple, set, dict)
"""Types of nested values in GeoJSON and Parquet."""

T = TypeVar("T")

log = logging.getLogger(__name__)


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
        need(fits, "margin", f"metres from 0 to {LARGEST_MARGIN_M}, found {self.margin!r}")
        need(
            self.split in (None, "train", "val", "test"),
            "split",
            f"train, val, test or null, found {self.split!r}",
        )
        if self.geometry is not None:
            kind = self.geometry.geom_type
            need(kind in ("Polygon", "MultiPolygon"), "geometry", f"a polygon, found {kind}")
            need(not self.geometry.is_empty, "geometry", "a polygon with area, found an empty one")
            need(
                self.geometry.is_valid,
                "geometry",
                f"a valid polygon, found {shapely.is_valid_reason(self.geometry)}",
            )
            west, south, east, north = self.geometry.bounds
            in_degrees = west >= -180 and east <= 180 and south >= -90 and north <= 90
            need(
                in_degrees,
                "geometry",
                f"longitude and latitude in degrees, found bounds {self.geometry.bounds}",
            )


@dataclass(frozen=True, kw_only=True)
class Offset:
    """Rule for BOA_ADD_OFFSET in a scene's pixels, independent of the acquisition date."""

    value: int = -1000
    """Number to add to digital numbers with the offset (Sentinel-2 PSD, BOA_ADD_OFFSET)."""
    from_baseline: str = "04.00"
    """First processing baseline with the offset."""
    applied_flag: str | None = None
    """Item property: true if the provider has already removed the offset."""
    own: int | str | None = None
    """The offset of baseline 99.xx, the mark of products from one's own Sen2Cor.

    A number, or `declared` for the raster offset in each item's bands. None refuses these products,
    since no rule gives their offset.
    """

    def __post_init__(self) -> None:
        fits = self.own is None or self.own == "declared" or isinstance(self.own, int)
        need(fits, "own", f"a number or declared, found {self.own!r}")
        need(
            re.fullmatch(r"\d\d\.\d\d", self.from_baseline),
            "from_baseline",
            f"NN.NN, found {self.from_baseline!r}",
        )


@dataclass(frozen=True, kw_only=True)
class Access:
    """How to turn an asset's href into an authorised request. Contains no secrets."""

    kind: str = "plain"
    """plain: without credentials; planetary-computer: a token per container; s3: signed with keys from the environment."""
    href: str | None = None
    """planetary-computer: the token service, called with /<account>/<container>.

    s3: the endpoint, by default AWS's.
    """
    region: str | None = None
    """s3 only; by default the environment's."""
    anonymous: bool = False
    """s3 only: public objects, with unsigned requests."""
    credentials_for: tuple[str, ...] = ()
    """planetary-computer: more hosts allowed to see a token; s3: buckets with signed requests."""
    connections: int = 64
    """Most simultaneous requests for pixels per process."""

    def __post_init__(self) -> None:
        kinds = ("plain", "planetary-computer", "s3")
        need(self.kind in kinds, "kind", f"one of {', '.join(kinds)}, found {self.kind!r}")
        need(
            self.kind != "planetary-computer" or self.href,
            "href",
            "the URL of the token service, found none",
        )
        need(
            self.kind == "s3" or not (self.region or self.anonymous),
            "region",
            f"kind s3 for this field, found {self.kind!r}",
        )
        need(
            not self.href or re.match("https?://", self.href), "href", f"a URL, found {self.href!r}"
        )
        signs = self.kind != "plain" and not self.anonymous
        found = ", ".join(self.credentials_for)
        need(
            signs or not self.credentials_for,
            "credentials_for",
            f"no names where nothing is signed, found {found}",
        )
        bare = all(
            re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) for name in self.credentials_for
        )
        need(bare, "credentials_for", f"bare names such as files.example.org, found {found}")
        need(1 <= self.connections <= 256, "connections", f"1..256, found {self.connections}")

    def hosts(self) -> frozenset[str]:
        """Return the host of the service or endpoint, and the hosts allowed to see a token."""
        service = urlsplit(self.href or "").hostname
        named = self.credentials_for if self.kind == "planetary-computer" else ()
        return frozenset([service, *named] if service else named)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A STAC API or a stac-geoparquet file, and how to read its scenes."""

    id: str
    title: str
    kind: str
    """stac-api or stac-geoparquet."""
    href: str
    """URL of the API's landing page; or path or URL of the file, relative to the YAML file."""
    collection: str
    assets: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Band name (and SCL) -> asset key.

    If empty, the keys in common use are tried (`ASSET_KEYS`).
    """
    resolution_m: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Band name -> pixel size. Replaces a wrong size in the item's assets or from the mission."""
    offset: Offset = Offset()
    access: Access = Access()
    tile_px: int = 512
    """Side of the tiles in its files, for the estimates of `plan`."""
    searches_per_s: float = 10.0
    """Most requests to the API per second."""
    since: str | None = None
    """YYYY-MM: the first listed month. Earlier months are not searched."""
    licence: str = ""

    def __post_init__(self) -> None:
        kinds = ("stac-api", "stac-geoparquet")
        need(self.kind in kinds, "kind", f"one of {', '.join(kinds)}, found {self.kind!r}")
        names = {*BANDS, SCL}
        need(
            set(self.assets) <= names,
            "assets",
            f"bands of {', '.join([*BANDS, SCL])}, found {', '.join(self.assets)}",
        )
        need(
            not self.assets or SCL in self.assets,
            "assets",
            f"an entry for {SCL} (the mask), found {', '.join(self.assets)}",
        )
        sizes = set(self.resolution_m) <= names and set(self.resolution_m.values()) <= {10, 20}
        need(sizes, "resolution_m", f"10 or 20 metres by band, found {dict(self.resolution_m)}")
        need(self.tile_px > 0, "tile_px", f"pixels above 0, found {self.tile_px}")
        need(
            0 < self.searches_per_s <= 100,
            "searches_per_s",
            f"above 0 and up to 100, found {self.searches_per_s}",
        )
        fits = self.since is None or re.fullmatch(r"20\d\d-(0[1-9]|1[0-2])", self.since)
        need(fits, "since", f"a month YYYY-MM in quotes, found {self.since!r}")

    def bands(self) -> tuple[str, ...]:
        """Return the bands named in `assets`; all bands if `assets` is empty."""
        return tuple(self.assets) or (*BANDS, SCL)


def _catalog_dir() -> Path:
    package = Path(__file__).parents[1]
    shipped = package / "_catalog"  # in a wheel; a checkout has catalog/ at its top
    return shipped if shipped.is_dir() else package.parents[1] / "catalog"


def load_sites(
    path: Path | str | None = None,
    *,
    catalogue: bool = False,
    margin: float | None = None,
    layer: str | None = None,
) -> list[Site]:
    """Load the sites of a file of polygons (`minecube.vectors.NAMED`).

    The name of a row is the first value in the columns `id`, `name` and `site`, in upper or lower
    case. A row without a name is called `site_` plus its number. `safe_name` turns names into ids,
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
    path = Path(path) if path else _catalog_dir() / "sites.geojson"
    try:
        table = read_vector(path, layer)
        if not isinstance(table, GeoDataFrame):
            raise CatalogError(
                f"{path}: holds a table without geometry; expected polygons of sites"
            )
        table = understood_columns(table, {name: name for name in (*_SITE_FIELDS, "name", "site")})
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
            f"{path}: has no CRS, so its coordinates cannot be placed; set one (ogr2ogr -a_srs) and retry"
        )
    table = table.to_crs(4326).reset_index(drop=True)
    names = _texts_of(table, "id", "name", "site")
    ids = [safe_name(name) or f"site_{row}" for row, name in enumerate(names, start=1)]
    if catalogue:
        ids = [name.replace(" ", "_") or made for name, made in zip(names, ids, strict=True)]
    else:
        _report_names(path, table, names, ids)
    titles = _texts_of(table, "title", "name")
    titles = titles.mask((titles == "") & (names != ids), names)
    shapes, left_out = areas_of_collections(shapely.force_2d(table.geometry.to_numpy()))
    rows = _rows_of(table)
    sites = []
    for row, site_id, title, shape, lost in zip(rows, ids, titles, shapes, left_out, strict=True):
        if lost:
            log.warning(
                "%s: site %s: the areas of its collection were kept, left out: %s",
                path,
                site_id,
                lost,
            )
        known: dict[str, Any] = {
            "id": site_id,
            "title": "" if title == site_id else title,
            "geometry": shape if catalogue else _mended(shape, path, site_id),
        }
        margins = (margin, _number(row["margin"]), 0 if catalogue else MARGIN_M)
        known["margin"] = next(value for value in margins if value is not None)
        try:
            for field in _TEXT_FIELDS:
                need(not isinstance(row[field], _NESTED), field, f"text, found {row[field]!r}")
            known |= {
                "country": row["country"] or "",
                "split": row["split"],
                "labels": row["labels"],
            }
            sites.append(Site(**known, years=_years(row["years"])))
        except ValueError as error:
            raise CatalogError(f"{path}: site {site_id[:100]!r}: {error}") from error
    _need_unique(ids, list(names), path)
    return sites


def _rows_of(table: GeoDataFrame) -> list[dict[str, Any]]:
    """Convert a table to one dictionary per row, with a value or None for each field of a site.

    Blank text becomes None. Text fields become text, except lists and dictionaries.
    """
    rows: list[dict[str, Any]] = [
        dict.fromkeys((*_TEXT_FIELDS, "years", "margin")) for _ in range(len(table))
    ]
    for name in rows[0]:
        if name not in table:
            continue
        words = texts(table[name])
        # pandas reads integers with a gap as floats.
        values = table[name].convert_dtypes().astype(object)
        for row, value, text in zip(rows, values, words, strict=True):
            if isinstance(value, np.ndarray):
                value = value.tolist()
            if isinstance(value, _NESTED):
                row[name] = value or None
            elif not pd.isna(text):
                row[name] = (
                    text if name in _TEXT_FIELDS or isinstance(value, str | bytes) else value
                )
    return rows


def _number(value: Any) -> Any:
    """Convert text and decimals to a number; other values stay."""
    if not isinstance(value, str | Decimal):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def _texts_of(table: GeoDataFrame, *columns: str) -> pd.Series:
    """Return the first text in these columns per row, or ""."""
    found = pd.Series("", table.index, dtype="string")
    for column in columns:
        if column in table:
            found = found.mask(found == "", texts(table[column]).fillna(""))
    return found


def _report_names(path: Path, table: GeoDataFrame, names: pd.Series, ids: Sequence[str]) -> None:
    """Log the ids that differ from the names in the file, and rows without a name."""
    made = [
        f"{name[:_LONGEST]!r} is {site_id[:_LONGEST]}"
        for name, site_id in zip(names, ids, strict=True)
        if name and name != site_id
    ]
    if made:
        log.warning("%s: ids made of names: %s", path, _shortened(made))
    numbered = [site_id for name, site_id in zip(names, ids, strict=True) if not name]
    if numbered:
        columns = ", ".join(map(str, table.columns.drop(table.geometry.name))) or "none"
        log.warning(
            "%s: rows without a name in a column id, name or site are called by their number: %s; the columns are %s",
            path,
            _shortened(numbered),
            columns,
        )


def _shortened(words: Sequence[str]) -> str:
    more = f", and {len(words) - _SUGGESTED} more" if len(words) > _SUGGESTED else ""
    return ", ".join(words[:_SUGGESTED]) + more


def _years(value: Any) -> tuple[int, ...]:
    """Parse years from a list, a number, or text such as 2015-2024 or 2015, 2020."""
    if value is None:
        return ()
    if isinstance(value, str):
        spans = [re.fullmatch(_SPAN, part) for part in value.strip("[]").split(",")]
        need(all(spans), "years", f"2015-2024 or a list of years, found {value!r}")
        return tuple(y for s in spans if s for y in range(int(s[1]), int(s[2] or s[1]) + 1))
    listed = value if isinstance(value, Iterable) else [value]
    found = texts(pd.Series(list(listed), dtype=object)).dropna()
    need(found.str.fullmatch(r"\d{4}(\.0+)?").all(), "years", f"whole years, found {value!r}")
    return tuple(int(text[:4]) for text in found)


def _mended(shape: BaseGeometry | None, path: Path, site_id: str) -> BaseGeometry | None:
    if shape is None or shape.is_valid:
        return shape
    parts = shapely.get_parts(shapely.make_valid(shape, method="structure"))
    mended = shapely.union_all([p for p in parts if p.geom_type in ("Polygon", "MultiPolygon")])
    reason = shapely.is_valid_reason(shape)
    log.warning(
        "%s: site %s: its polygon was invalid (%s) and has been repaired; compare it with what was meant",
        path,
        site_id,
        reason,
    )
    return mended


def load_sources(path: Path | None = None) -> dict[str, Source]:
    """Load a `sources.yaml`, by id. Raises CatalogError as `load_sites` does."""
    path = Path(path or _catalog_dir() / "sources.yaml").resolve()
    sources = _load_yaml(Source, path)
    return {
        s.id: dataclasses.replace(s, href=_beside(path, s.href)) if s.kind != "stac-api" else s
        for s in sources
    }


def _beside(path: Path, href: str) -> str:
    """Resolve a path relative to the folder of the YAML file. URLs stay unchanged."""
    return href if "://" in href else str(path.parent / href)


def load_recipes(path: Path | None = None) -> dict[str, Recipe]:
    """Load a `recipes.yaml`, by id. Raises CatalogError as `load_sites` does."""
    return {r.id: r for r in _load_yaml(Recipe, path or _catalog_dir() / "recipes.yaml")}


def load_releases(path: Path | None = None) -> dict[str, Release]:
    """Load the published datasets of a `releases.yaml`, by id.

    Raises CatalogError as `load_sites` does.
    """
    return {r.id: r for r in _load_yaml(Release, path or _catalog_dir() / "releases.yaml")}


def recipe_of(written: Mapping[str, Any]) -> Recipe:
    """Rebuild a recipe from `as_dict`. Raises CatalogError if this version cannot read it."""
    try:
        return _build(Recipe, written)
    except ValueError as error:
        raise CatalogError(f"recipe {written.get('id')!r}: {error}") from error


def model_card_of(written: Mapping[str, Any]) -> ModelCard:
    """Rebuild a model card from `as_dict`. Raises CatalogError if this version cannot read it."""
    try:
        return _build(ModelCard, written)
    except ValueError as error:
        raise CatalogError(f"model {written.get('id')!r}: {error}") from error


def load_models(path: Path | None = None) -> dict[str, ModelCard]:
    """Load the model cards of a `models.yaml`, by id. Raises CatalogError as `load_sites` does."""
    path = Path(path or _catalog_dir() / "models.yaml").resolve()
    cards = _load_yaml(ModelCard, path)
    placed = {
        m.id: dataclasses.replace(m.weights, href=_beside(path, m.weights.href))
        for m in cards
        if m.weights
    }
    return {m.id: dataclasses.replace(m, weights=placed.get(m.id)) for m in cards}


def load_presets(path: Path | None = None) -> dict[str, Settings]:
    """Load the training settings of a `presets.yaml`, by id.

    Raises CatalogError as `load_sites` does.
    """
    return {p.id: p for p in _load_yaml(Settings, path or _catalog_dir() / "presets.yaml")}


def pick(known: Mapping[str, T], name: str, what: str) -> T:
    """Pick an entry by name. Raises CatalogError with the available names."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=_SUGGESTED)
        listed = near if near and len(known) > _SUGGESTED else sorted(known)[:_SUGGESTED]
        more = f", and {len(known) - len(listed)} more" if len(known) > len(listed) else ""
        raise CatalogError(f"unknown {what} {name!r}; there is: {', '.join(listed)}{more}")
    return known[name]


def as_dict(value: Any) -> dict[str, Any]:
    """Convert a catalogue value to plain JSON types, for provenance and hashing."""
    return typing.cast("dict[str, Any]", _plain(dataclasses.asdict(value, dict_factory=_written)))


def _written(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in fields if name not in _ADDED or value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return shapely.to_wkt(value) if isinstance(value, BaseGeometry) else value


def _load_yaml(cls: type[T], path: Path) -> list[T]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)  # noqa: S506  a SafeLoader
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise CatalogError(
            f"{path}: cannot be read as a catalogue: {yaml_problem(error)}"
        ) from error
    if not isinstance(content, Mapping):
        raise CatalogError(f"{path}: expected entries by id, found {type(content).__name__}")
    loaded = []
    for name, entry in content.items():
        try:
            if not isinstance(entry, Mapping):
                raise FieldError(f"expected fields, found {type(entry).__name__}")
            loaded.append(_build(cls, {"id": str(name), **entry}))
        except ValueError as error:
            raise CatalogError(f"{path}: entry {name!r}: {error}") from error
    return loaded


def yaml_problem(error: Exception) -> str:
    """Describe the problem in a YAML file in one line, with its line number."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "strerror", None) or error
    text = " ".join(str(problem).split())
    return f"line {mark.line + 1}: {text}" if mark else text


def _build(cls: type[T], entry: Mapping[str, Any]) -> T:
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in entry:
        need(name in fields, name, f"one of {', '.join(f for f in fields if f != 'id')}")
    required = {
        n
        for n, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    for name in sorted(required - set(entry)):
        raise FieldError(f"field {name!r}: expected a value, found none")
    return cls(**{name: _convert(hints[name], value, name) for name, value in entry.items()})


def _convert(hint: Any, value: Any, field: str) -> Any:
    if hint is Any:
        return value
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        kinds = [a for a in args if a is not type(None)]
        fitting = [a for a in kinds if isinstance(a, type) and isinstance(value, a)]
        return None if value is None else _convert((fitting or kinds)[0], value, field)
    if dataclasses.is_dataclass(hint):
        need(
            isinstance(value, Mapping),
            field,
            f"fields of {getattr(hint, '__name__', '')}, found {value!r}",
        )
        return _build(typing.cast("type[Any]", hint), value)
    if origin is tuple:
        need(
            isinstance(value, Sequence) and not isinstance(value, str),
            field,
            f"a list, found {value!r}",
        )
        return tuple(_convert(args[0], v, field) for v in value)
    if origin is not None and issubclass(origin, Mapping):
        need(isinstance(value, Mapping), field, f"names and values, found {value!r}")
        return {str(k): _convert(args[1], v, field) for k, v in value.items()}
    fits = isinstance(value, int | float) if hint is float else isinstance(value, hint)
    need(
        fits and not (isinstance(value, bool) and hint is not bool),
        field,
        f"{hint.__name__}, found {value!r}",
    )
    return hint(value)


def _need_unique(ids: Sequence[str], names: Sequence[str], path: Path) -> None:
    """Raise CatalogError if two rows have one id, and name both."""
    first: dict[str, str] = {}
    for site_id, name in zip(ids, names, strict=True):
        if first.get(site_id) == name or (site_id in first and not name):
            raise CatalogError(
                f"{path}: site {site_id!r} stands there twice; ids name groups of the cube, so rename one"
            )
        if site_id in first:
            raise CatalogError(
                f"{path}: sites {first[site_id]!r} and {name!r} would both have the id {site_id!r}; rename one"
            )
        first[site_id] = name


class _UniqueKeys(yaml.SafeLoader):
    """Load YAML. Repeated keys are errors."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = str(self.construct_object(key_node, deep=True))
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} stands there twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)
