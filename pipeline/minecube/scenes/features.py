"""Convert rows of a file of items to GeoJSON features, with footprints of any type or none.

stac-geoparquet's conversion fails on a row without footprint or bounding box, and on assets as map
or JSON. It also takes six times as long: 1.5 ms per item, where the whole search takes 1.2 ms.
"""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import shapely
from shapely.geometry.base import BaseGeometry

from minecube.arrays import AnyArray
from minecube.scenes.parquet import TIMES, strip_extension

Feature = dict[str, Any]

_TOP_LEVEL = {"type", "stac_version", "stac_extensions", "id", "collection"}
"""Columns outside the properties, apart from place and assets."""


def to_features(table: pa.Table) -> list[Feature]:
    """Convert the rows of a table to GeoJSON features."""
    return [
        _to_feature(row, shape)
        for row, shape in zip(_to_rows(table), parse_shapes(table), strict=True)
    ]


def parse_shapes(table: pa.Table) -> AnyArray:
    """Return the geometry of each row, None if missing or invalid WKB."""
    wkb = strip_extension(table.column("geometry")).to_numpy()
    shapes: AnyArray = shapely.from_wkb(wkb, on_invalid="ignore")
    return shapes


def _to_rows(table: pa.Table) -> list[dict[str, Any]]:
    """Return the rows without place and links, with times as text."""
    names = set(table.column_names)
    table = table.drop_columns(
        [name for name in ("geometry", "bbox", "proj:geometry", "links") if name in names]
    )
    for name in names.intersection(TIMES):
        timestamps = table.column(name).cast(pa.timestamp("us", tz="UTC"), safe=False)
        texts = pc.strftime(timestamps, format="%Y-%m-%dT%H:%M:%SZ")
        table = table.set_column(table.column_names.index(name), name, texts)
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def _to_feature(row: dict[str, Any], shape: BaseGeometry | None) -> Feature:
    """Return a row as a feature. Columns outside `_TOP_LEVEL` become properties."""
    feature: Feature = {
        "type": "Feature",
        "stac_version": "1.0.0",
        "geometry": None,
        "bbox": None,
        "links": [],
    }
    if shape is not None:
        # Parsers return GeoJSON with lists in place of tuples.
        feature["geometry"] = json.loads(json.dumps(shapely.geometry.mapping(shape)))
        feature["bbox"] = list(shape.bounds)
    feature["assets"] = _assets(row.pop("assets"))
    for name in _TOP_LEVEL & row.keys():
        value = row.pop(name)
        # Joined files have null in columns missing from one of their parts.
        if value is not None:
            feature[name] = value
    feature["properties"] = row
    return feature


def _assets(value: Any) -> Any:
    """Return assets by name, without nulls. Values of other types are returned unchanged."""
    assets = _as_object(value)
    if not isinstance(assets, dict):
        return assets
    return {name: _as_object(asset) for name, asset in assets.items() if asset is not None}


def _as_object(value: Any) -> Any:
    """Return assets, or one asset, as a dictionary.

    A map column has pairs, and some files have JSON. Other values are returned unchanged.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return value
    if isinstance(value, list) and all(isinstance(pair, tuple) for pair in value):
        value = dict(value)
    if value is None:
        return {}
    return value
