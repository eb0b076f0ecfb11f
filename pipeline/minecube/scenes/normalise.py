"""Convert an item of any provider to one scene in the project's own terms."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import numpy as np
import pyproj
import pystac
import shapely
from shapely.geometry.base import BaseGeometry

from minecube.catalog import ASSET_KEYS, NATIVE_M, SCL, Offset, Source
from minecube.errors import SceneError
from minecube.grid import footprint_of
from minecube.network import ForbiddenError, check_href, origin_of, without_query

log = logging.getLogger(__name__)

_TILE_M = 109_800  # side of a Sentinel-2 tile
_SHOWN = 60  # characters of a malformed value shown in an error
_SIGNS = re.compile(
    "sig|se|sp|sv|sr|st|sk[a-z]+|x-(amz|goog)-.*|signature|expires|policy|key-pair-id|awsaccesskeyid|googleaccessid|.*token",
    re.I,
)
"""Query keys in signatures of Azure, AWS, Google and CloudFront."""
UNREAD_TIME = "minecube:unread_datetime"
"""Property with an unreadable datetime of an item from a file."""
_UNKNOWN = {"", "none", "null", "nan", "<na>", "nat"}
"""Lower-case spellings of an unknown value, as tables and their libraries write null."""
_NUMERIC = (int, float, str, Decimal, np.floating, np.integer)
"""Types of numbers in items, and of text with a possible number."""
_LEVEL_1 = re.compile(
    r"(?<![A-Z0-9])(S2MSI|MSIL|L|LEVEL[-_ ]?)1[ABC](?![A-Z0-9])|^level (L|LEVEL[-_ ]?)?1[ABC]?$",
    re.I,
)
"""Level-1 in names of products, types, levels and collections.

Examples are S2A_MSIL1C_2022..., S2MSI1C, L1C and sentinel-2-l1c.
"""
_PLAIN_NAME = re.compile(r"/[A-Za-z0-9_]+\.(tiff?|jp2)$")
_LEVEL_2A = re.compile("L2A", re.I)
_UNREAD_TYPE = re.compile(r"zarr|netcdf|hdf|grib|png|jpe?g(?!2)|xml|json|zip|pdf|html", re.I)
"""Media types of unreadable formats. Bands must be GeoTIFF or JPEG 2000 (`minecube.images`)."""
_UNREAD_SUFFIX = re.compile(
    r"\.(zarr|nc4?|h5|hdf5?|he5|grib2?|png|jpe?g|xml|json|zip|pdf|html)(/|$)", re.I
)
_SAME_GRANULE_S = 2
"""Largest difference in a granule's start between processings.

Parts of a split datatake start many seconds apart.
"""


def item_of(feature: Mapping[str, Any], name: str) -> pystac.Item:
    """Turn a listed feature into an item. Drop assets without an href and links to other places.

    Args:
        feature: GeoJSON from an API or a file. Any part of it may be malformed.
        name: the item's name in errors.

    Raises:
        SceneError: the item cannot be used. The message names the item and the reason.
    """
    listed_id = feature.get("id")
    if not isinstance(listed_id, str | int) or listed_id == "":
        raise _unusable(name, "an id", listed_id)
    if feature.get("type") != "Feature":
        raise _unusable(name, "type 'Feature'", feature.get("type"))
    properties, assets = feature.get("properties"), feature.get("assets")
    if not isinstance(properties, dict):
        raise _unusable(name, "an object of properties", properties)
    if assets is not None and not isinstance(assets, dict):
        raise _unusable(name, "an object of assets", assets)
    collection = feature.get("collection")
    item = pystac.Item(
        id=str(listed_id),
        geometry=feature.get("geometry"),
        bbox=None,
        datetime=_time(properties, name),
        properties=properties,
        collection=None if collection is None else str(collection),
        assets={
            key: pystac.Asset.from_dict(asset)
            for key, asset in (assets or {}).items()
            if _has_href(asset)
        },
    )
    links = feature.get("links")
    for link in links if isinstance(links, list) else ():
        if _is_self(link):
            item.add_link(pystac.Link.from_dict(link))
    return item


def _time(properties: Mapping[str, Any], name: str) -> datetime:
    """Return an item's datetime, or the start of its interval. Raise SceneError without either."""
    listed = [properties.get(key) for key in ("datetime", "start_datetime", UNREAD_TIME)]
    for value in listed[:2]:
        if isinstance(value, str):
            try:
                return pystac.utils.str_to_datetime(value)
            except (ValueError, OverflowError):
                continue
    found = [value for value in listed if value is not None]
    if not found:
        raise SceneError(f"item {name}: has no datetime; it is refused")
    raise _unusable(name, "a datetime in ISO 8601 such as 2022-04-10T10:20:00Z", found[0])


def _unusable(name: str, expected: str, found: object) -> SceneError:
    shown = repr(found)
    more = "..." if len(shown) > _SHOWN else ""
    return SceneError(
        f"item {name}: expected {expected}, found {shown[:_SHOWN]}{more}; it is refused"
    )


def _is_self(link: object) -> bool:
    """Return whether a link names the item's own place. Relative hrefs of assets start there."""
    return (
        isinstance(link, dict) and link.get("rel") == "self" and isinstance(link.get("href"), str)
    )


def _has_href(asset: object) -> bool:
    return isinstance(asset, dict) and isinstance(asset.get("href"), str)


def normalise(item: pystac.Item, source: Source) -> pystac.Item:
    """Convert an item to a scene, from STAC 1.0 or 1.1 and any provider's names.

    Raises:
        SceneError: the item is not a Level-2A product of the source's collection. Or it lacks a
            footprint, time, acquisition, baseline or band. Or it contradicts itself, or names a
            forbidden or unreadable file. The message names the item and the reason.
    """
    _need_product(item, source)
    assets = _band_assets(item, source)
    _need_images(item, assets)
    when = taken(item)
    if when is None:
        raise _refused(item, "has no datetime")
    shape = shape_of(item.geometry)
    footprint = footprint_of(shape)
    if footprint.is_empty:
        kind = shape.geom_type if shape else "none"
        raise _refused(
            item,
            f"has no geometry with an area: expected polygons in longitude and latitude, found {kind}",
        )
    baseline, tile = _baseline(item), _tile(item)
    offset, reason = _offset(item, baseline, source, assets)
    datatake, start = acquisition(item)
    scene = pystac.Item(
        id=item.id,
        geometry=item.geometry if footprint is shape else json.loads(shapely.to_geojson(footprint)),
        bbox=list(footprint.bounds),
        datetime=when,
        properties={
            "eo:cloud_cover": _cloud_cover(item),
            "proj:code": _projection(item, assets.values(), tile),
            "s2:mgrs_tile": tile,
            "s2:processing_baseline": baseline,
            "sat:relative_orbit": _orbit(item),
            "minecube:source": source.id,
            "minecube:access": json.dumps(dataclasses.asdict(source.access), sort_keys=True),
            "minecube:origin": origin_of(source.href),
            "minecube:tile_px": source.tile_px,
            "minecube:solar_day": solar_day(when, tile),
            "minecube:datatake": datatake,
            "minecube:granule_start": start,
            "minecube:generated": _generated(item),
            "minecube:offset": offset,
            "minecube:offset_reason": reason,
        },
        assets=dict(_assets(item, source, assets)),
    )
    if SCL not in scene.assets:
        raise _refused(
            item,
            f"has no scene classification (SCL), only {', '.join(item.assets) or 'no asset at all'}",
        )
    need_allowed(scene, source)
    return scene


def shape_of(geometry: Mapping[str, Any] | None) -> BaseGeometry | None:
    """Parse a GeoJSON geometry of any type. Return None if it is missing or malformed."""
    try:
        # For NaN in the coordinates, detected by `footprint_of`.
        with np.errstate(invalid="ignore"):
            return shapely.geometry.shape(geometry) if geometry else None
    except (
        shapely.errors.ShapelyError,
        TypeError,
        ValueError,
        AttributeError,
        KeyError,
        IndexError,
        RecursionError,
    ):
        return None


def _need_product(item: pystac.Item, source: Source) -> None:
    """Raise SceneError for any product other than the source's Level-2A.

    A file of items may hold several products.
    """
    stated = [
        f"level {_first(item, 'processing:level')}",
        _first(item, "s2:product_type"),
        _product(item),
        item.id,
    ]
    collection = item.collection_id or ""
    if not _LEVEL_2A.search(collection):
        stated.append(collection)
    level_1 = next((s for s in stated if _LEVEL_1.search(s)), "")
    if level_1:
        raise _refused(item, f"expected a Level-2A product, found Level-1 ({level_1})")
    if source.kind == "stac-geoparquet" and collection not in ("", source.collection):
        raise _refused(
            item,
            f"expected collection {source.collection}, which source {source.id} lists, found {collection}",
        )


def _need_images(item: pystac.Item, assets: Mapping[str, pystac.Asset]) -> None:
    """Raise SceneError if a band has an unreadable format, or all bands lie in one Zarr."""
    formats = {key: _other_format(asset) for key, asset in (assets or item.assets).items()}
    wrong = {key: why for key, why in formats.items() if why and (assets or "zarr" in why.lower())}
    for key, why in wrong.items():
        kind = "Zarr" if "zarr" in why.lower() else "in another format"
        raise _refused(item, f"asset {key} is {kind} ({why}); expected GeoTIFF or JPEG 2000")


def _other_format(asset: pystac.Asset) -> str:
    """Return the media type or suffix of an unreadable format, else an empty text."""
    if _UNREAD_TYPE.search(str(asset.media_type or "")):
        return f"media type {asset.media_type}"
    suffix = _UNREAD_SUFFIX.search(str(asset.href).partition("?")[0].partition("#")[0])
    return f"suffix .{suffix[1]}" if suffix else ""


def _band_assets(item: pystac.Item, source: Source) -> dict[str, pystac.Asset]:
    """Map each band found, and SCL, to its asset with an href."""
    bands = source.bands()
    keys = {
        band: (source.assets[band],) if band in source.assets else ASSET_KEYS[band]
        for band in bands
    }
    assets = {k: asset for k, asset in item.assets.items() if isinstance(asset.href, str)}
    found = {band: next((assets[k] for k in keys[band] if k in assets), None) for band in bands}
    return {band: asset for band, asset in found.items() if asset is not None}


def same_access(scene: pystac.Item, source: Source) -> bool:
    """Return whether a scene was saved with the source's current access rules.

    The number of connections may differ.
    """
    said = json.loads(scene.properties.get("minecube:access", "{}"))
    ours = json.loads(json.dumps(dataclasses.asdict(source.access)))
    return bool({**said, "connections": 1} == {**ours, "connections": 1})


def need_allowed(scene: pystac.Item, source: Source) -> None:
    """Raise SceneError if a scene names a file forbidden for its source."""
    origin = origin_of(source.href)
    hosts = source.access.hosts()
    # A scene's bands share one folder, so names without special signs need only one check.
    distinct = {
        _PLAIN_NAME.sub("/x.tif", asset.href): (band, asset) for band, asset in scene.assets.items()
    }
    for name, (band, asset) in distinct.items():
        try:
            check_href(name, origin, hosts)
        except ForbiddenError as error:
            raise _refused(
                scene, f"asset {band} is not read from {without_query(asset.href)}: {error}"
            ) from error


def taken(item: pystac.Item) -> datetime | None:
    """Return an item's datetime, or the start of its interval if that is null."""
    return item.datetime or item.common_metadata.start_datetime


def acquisition(item: pystac.Item) -> tuple[str, str]:
    """Return (datatake, granule start), equal for all processings and providers of an acquisition.

    The datatake is the satellite and the start of sensing, for example `S2A_20200302T102021`. It is
    read from the datatake's or the product's name. The granule start is the datastrip's sensing
    start. It separates the two granules of a split datatake (Sentinel-2 PSD 14.9, section 3.4).
    Without a datastrip, it is read from the granule's folder or the item's id.

    Raises:
        SceneError: the item lacks one of the two.
    """
    named = _first(item, "s2:datatake_id", "eopf:datatake_id", "sentinel:datatake_id") or _product(
        item
    )
    take = re.match(r"G?(S2[A-D])_(?:MSIL2A_)?(\d{8}T\d{6})_", named)
    strip = re.search(
        r"_S(\d{8}T\d{6})",
        _first(item, "s2:datastrip_id", "eopf:datastrip_id", "sentinel:datastrip_id"),
    )
    hrefs = (asset.href for asset in item.assets.values())
    folder = strip or next(
        (m for m in (re.search(r"/L2A_T\w{5}_A\d{6}_(\d{8}T\d{6})/", h) for h in hrefs) if m), None
    )
    start = folder or re.fullmatch(r"S2[A-D]_T\w{5}_(\d{8}T\d{6})_L2A", item.id)
    if not take or not start:
        lacking = (
            f"datatake {named!r} without datastrip or granule"
            if take
            else f"no datatake, found {named!r}"
        )
        old = any(name.startswith("sentinel:") for name in item.properties)
        hint = (
            "; sentinel:* properties are those of Earth Search v0, so list it from its successor, earth-search"
            if old
            else ""
        )
        raise _refused(
            item, f"names no acquisition ({lacking}), so copies of it could be counted twice{hint}"
        )
    return f"{take[1]}_{take[2]}", start[1]


def deduplicate(scenes: Iterable[pystac.Item]) -> list[pystac.Item]:
    """Keep one scene per acquisition and tile: the newest baseline, then the newest processing.

    The order of the input does not matter. The two granules of a split datatake start at different
    times, and both stay.
    """
    return [max(copies, key=_version) for copies in _by_acquisition(scenes)]


def merge(lists: Iterable[Iterable[pystac.Item]]) -> list[pystac.Item]:
    """Merge scenes of several sources, in order of preference. Keep the first source's copy.

    A newer baseline of a later source does not count. Each source's list is already reduced to its
    newest baselines.
    """
    ranked = [(rank, scene) for rank, listed in enumerate(lists) for scene in listed]
    rank_of = {id(scene): rank for rank, scene in ranked}
    groups = _by_acquisition(scene for _, scene in ranked)
    return [min(copies, key=lambda s: rank_of[id(s)]) for copies in groups]


def copies_of(scene: pystac.Item, listed: Iterable[pystac.Item]) -> list[pystac.Item]:
    """Return the listed scenes of the same acquisition and tile as another scene."""
    groups = _by_acquisition([scene, *listed])
    group = next(copies for copies in groups if any(copy is scene for copy in copies))
    return [copy for copy in group if copy is not scene]


def _by_acquisition(scenes: Iterable[pystac.Item]) -> list[list[pystac.Item]]:
    """Group copies. Groups are ordered by the time and id of their first scene."""
    takes: dict[tuple[str, str], list[tuple[datetime, str, pystac.Item]]] = {}
    for scene in scenes:
        p = scene.properties
        started = datetime.strptime(p["minecube:granule_start"], "%Y%m%dT%H%M%S")
        takes.setdefault((p["minecube:datatake"], p["s2:mgrs_tile"]), []).append(
            (started, scene.id, scene)
        )
    groups: list[list[pystac.Item]] = []
    for copies in takes.values():
        last = None
        for started, _, scene in sorted(copies, key=lambda c: c[:2]):
            if last is None or (started - last).total_seconds() > _SAME_GRANULE_S:
                groups.append([])
            groups[-1].append(scene)
            last = started
    return sorted(groups, key=lambda g: min((str(s.datetime), s.id) for s in g))


def _version(scene: pystac.Item) -> tuple[str, str, str]:
    p = scene.properties
    return p["s2:processing_baseline"], p["minecube:generated"], scene.id


def solar_day(when: datetime, tile: str) -> str:
    """Return the local solar date, YYYY-MM-DD, shared by tiles and granules of one overpass.

    It depends on the centre of the tile's UTM zone. Unlike a footprint's centre, this does not jump
    at the antimeridian.
    """
    longitude = 6 * int(tile[:2]) - 183
    return (when + timedelta(hours=longitude / 15)).date().isoformat()


def _assets(
    item: pystac.Item, source: Source, assets: Mapping[str, pystac.Asset]
) -> Iterable[tuple[str, pystac.Asset]]:
    """Yield (band, asset) in the project's own terms.

    Raises:
        SceneError: the item lacks an asset named by the source. Other bands may be missing.
    """
    lacking = [band for band in source.assets if band not in assets]
    if lacking:
        raise _refused(item, f"has no asset {source.assets[lacking[0]]!r} for {lacking[0]}")
    for band, asset in assets.items():
        size = source.resolution_m.get(band) or _pixel_size(asset) or NATIVE_M[band]
        shape = _shape(asset.extra_fields) or _shape(item.properties) or [_TILE_M // size] * 2
        stored_bytes = number(asset.extra_fields.get("file:size")) or 0
        fields = {"gsd": size, "file:size": max(round(stored_bytes), 0), "proj:shape": shape}
        yield (
            band,
            pystac.Asset(
                _unsigned(
                    asset.href if "://" in asset.href else asset.get_absolute_href() or asset.href
                ),
                media_type=asset.media_type,
                roles=asset.roles,
                extra_fields=fields,
            ),
        )


def _unsigned(href: str) -> str:
    """Remove the signature from an href. Signatures are created at each read and never stored."""
    if "?" not in href:
        return href
    parts = urlsplit(href)
    kept = [
        (k, v) for k, v in parse_qsl(parts.query, keep_blank_values=True) if not _SIGNS.fullmatch(k)
    ]
    return urlunsplit(parts._replace(query=urlencode(kept)))


def number(value: object) -> float | None:
    """Parse a finite number, also from text. Return None for any other value."""
    if isinstance(value, bool) or not isinstance(value, _NUMERIC):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def _numbers(value: object) -> list[float]:
    """Parse a list of numbers. Return an empty list for other values or any unknown number."""
    listed = [number(v) for v in value] if isinstance(value, list | tuple) else []
    finite = [n for n in listed if n is not None]
    return finite if len(finite) == len(listed) else []


def _shape(fields: Mapping[str, Any]) -> list[int]:
    """Return rows and columns of `proj:shape`, empty if unknown."""
    sides = [round(n) for n in _numbers(fields.get("proj:shape"))]
    return sides if len(sides) == 2 and min(sides) > 0 else []


def _cloud_cover(item: pystac.Item) -> float | None:
    """Return the cloud cover in percent of the tile, or None if unknown."""
    share = number(item.properties.get("eo:cloud_cover"))
    return share if share is not None and 0 <= share <= 100 else None


def _first(item: pystac.Item, *names: str) -> str:
    """Return the first known property as text, or an empty text."""
    listed = [str(item.properties.get(name, "")).strip() for name in names]
    return next((text for text in listed if text.lower() not in _UNKNOWN), "")


def _product(item: pystac.Item) -> str:
    """Return the product's name, or an empty text.

    The form is S2A_MSIL2A_<start>_N<baseline>_R<orbit>_T<tile>_<made>.
    """
    uri = _first(item, "s2:product_uri", "sentinel:product_id")
    return uri or (item.id if item.id.startswith("S2") and "_MSIL" in item.id else "")


def _baseline(item: pystac.Item) -> str:
    """Return the baseline as NN.NN, from the properties or the product's name (`_N0500_`)."""
    stated = re.fullmatch(
        r"(\d{1,2})\.(\d{1,2})",
        _first(
            item, "s2:processing_baseline", "sentinel:processing_baseline", "processing:version"
        ),
    )
    named = re.search(r"_N(\d\d)(\d\d)_", _product(item))
    # 4.0 and 05.00 are both in use.
    if stated and named and f"{stated[1]:0>2}{stated[2]:0<2}" != named[1] + named[2]:
        raise _refused(
            item, f"says baseline {stated[0]}, and its product's name N{named[1]}{named[2]}"
        )
    baseline = (
        f"{stated[1]:0>2}.{stated[2]:0<2}" if stated else f"{named[1]}.{named[2]}" if named else ""
    )
    if not baseline:
        raise _refused(
            item, "names no processing baseline NN.NN, which decides on the offset of -1000"
        )
    return baseline


def _offset(
    item: pystac.Item, baseline: str, source: Source, assets: Mapping[str, pystac.Asset]
) -> tuple[int, str]:
    """Return the number to add to the pixels, and the reason.

    Sources' rules decide, since raster offsets declared by items may be applied already. A declared
    offset counts only for products of one's own Sen2Cor.
    """
    declared = _declared_offsets(assets)
    if baseline >= "99":
        return _own_offset(item, baseline, source.offset, set(declared.values()))
    offset, reason = _ruled_offset(item, baseline, source.offset)
    odd = {
        band: value
        for band, value in declared.items()
        if value not in (0, source.offset.value, offset)
    }
    if odd:
        shown = ", ".join(f"{value} for {band}" for band, value in odd.items())
        log.warning(
            "item %s: declares offset %s; the rule of source %s gives %d",
            item.id,
            shown,
            source.id,
            offset,
        )
        reason += f"; the item declares {shown}"
    return offset, reason


def _declared_offsets(assets: Mapping[str, pystac.Asset]) -> dict[str, int]:
    """Map each band to its declared raster offset, if there is one."""
    found = {band: _declared_offset(asset) for band, asset in assets.items() if band != SCL}
    return {band: offset for band, offset in found.items() if offset is not None}


def _declared_offset(asset: pystac.Asset) -> int | None:
    """Return an asset's raster offset in digital numbers, or None if not declared."""
    for fields in (asset.extra_fields, *_bands(asset)):
        offset = _first_number(fields, "raster:offset", "offset")
        if offset is None:
            continue
        # Without a scale, a value below 10 can only be reflectance.
        unstated = 1e-4 if abs(offset) < 10 else 1
        return round(offset / (_first_number(fields, "raster:scale", "scale") or unstated))
    return None


def _first_number(fields: Mapping[str, Any], *names: str) -> float | None:
    """Return the first of these fields with a number, or None."""
    for name in names:
        found = number(fields.get(name))
        if found is not None:
            return found
    return None


def _own_offset(
    item: pystac.Item, baseline: str, rule: Offset, declared: set[int]
) -> tuple[int, str]:
    """Return the offset of a product from one's own Sen2Cor, and the reason.

    It depends on the version of Sen2Cor and on the Level-1C input.
    """
    marks = f"baseline {baseline} marks a product of one's own Sen2Cor"
    if rule.own is None:
        way = "write own (-1000, 0 or declared) into the offset of its source"
        raise _refused(item, f"{marks}, and no rule tells which offset its pixels carry: {way}")
    if isinstance(rule.own, int):
        return rule.own, f"{marks}; its source gives {rule.own}"
    if len(declared) != 1:
        shown = ", ".join(map(str, sorted(declared))) or "none"
        raise _refused(
            item, f"{marks}: expected one raster offset declared for all its bands, found {shown}"
        )
    return min(declared), f"{marks}; it declares {min(declared)}"


def _ruled_offset(item: pystac.Item, baseline: str, rule: Offset) -> tuple[int, str]:
    if baseline < rule.from_baseline:
        return 0, f"baseline {baseline} is older than {rule.from_baseline}"
    flag = _first(item, rule.applied_flag) if rule.applied_flag else ""
    if flag.lower() == "true" or number(flag) == 1:
        return 0, f"baseline {baseline}, {rule.applied_flag} is true"
    seen = (
        f", {rule.applied_flag} is {item.properties.get(rule.applied_flag, 'missing')}"
        if rule.applied_flag
        else ""
    )
    return rule.value, f"baseline {baseline} from {rule.from_baseline} on{seen}"


def _tile(item: pystac.Item) -> str:
    tile = _first(item, "s2:mgrs_tile", "grid:code")
    if not tile:
        parts = [
            _first(item, f"mgrs:{p}", f"sentinel:{p}")
            for p in ("utm_zone", "latitude_band", "grid_square")
        ]
        zone = re.sub(r"\.0+$", "", parts[0])  # tables turn a zone into 32.0 or 32.00
        tile = "".join([zone, *parts[1:]])
    named = re.search(r"_T(\d\d[C-X][A-Z]{2})[_.]", _product(item))
    tile = (
        (tile or (named.group(1) if named else ""))
        .strip()
        .upper()
        .removeprefix("MGRS-")
        .removeprefix("T")
    )
    match = re.fullmatch(r"(\d{1,2})([C-X][A-Z]{2})", tile)
    if not match or not 1 <= int(match.group(1)) <= 60:
        raise _refused(
            item, f"names no MGRS tile (found {tile!r}), so duplicates cannot be detected"
        )
    return f"{int(match.group(1)):02d}{match.group(2)}"


def _projection(item: pystac.Item, assets: Iterable[pystac.Asset], tile: str) -> str:
    """Return EPSG:NNNNN of the tile. Raise SceneError if the item or its assets state another.

    They may state it as code, WKT or PROJJSON.
    """
    shown: list[Mapping[str, Any]] = [item.properties, *(asset.extra_fields for asset in assets)]
    said = {code for fields in shown for code in _codes(fields)}
    of_tile = f"EPSG:{32600 + 100 * (tile[2] < 'N') + int(tile[:2])}"
    if said - {of_tile}:
        raise _refused(
            item,
            f"expected one projection, {of_tile} of its tile {tile}, found {', '.join(sorted(said))}",
        )
    return of_tile


def _codes(fields: Mapping[str, Any]) -> Iterable[str]:
    for name in {"proj:code", "proj:epsg"} & fields.keys():
        # Accepts EPSG:32632, 32632, 32632.0 (tables) and urn:ogc:def:crs:EPSG::32632, but not
        # "EPSG:None".
        code = re.search(r"(\d{4,6})(?:\.0+)?$", str(fields.get(name)))
        if code:
            yield f"EPSG:{code[1]}"
    for name in ("proj:wkt2", "proj:projjson"):
        if fields.get(name):
            try:
                epsg = pyproj.CRS.from_user_input(fields[name]).to_epsg()
            except pyproj.exceptions.CRSError:
                continue
            if epsg:
                yield f"EPSG:{epsg}"


def _orbit(item: pystac.Item) -> int | None:
    """Return the relative orbit (1..143), or None."""
    named = re.search(r"_R(\d{3})_", _product(item))
    stated = number(item.properties.get("sat:relative_orbit"))
    if stated is not None:
        return round(stated)
    return int(named[1]) if named else None


def _pixel_size(asset: pystac.Asset) -> int | None:
    """Return an asset's pixel size in metres, or None if not stated."""
    fields = asset.extra_fields
    transform = fields.get("proj:transform")
    if isinstance(transform, list | tuple) and transform:
        width = abs(number(transform[0]) or 0.0)
        if width >= 1:
            return round(width)
    bands = _bands(asset)
    stated = [
        _first_number(band, "spatial_resolution", "raster:spatial_resolution", "gsd")
        for band in bands
    ]
    sizes = (number(fields.get("raster:spatial_resolution")), *stated, number(fields.get("gsd")))
    return next((round(abs(size)) for size in sizes if size and round(abs(size))), None)


def _bands(asset: pystac.Asset) -> list[Mapping[str, Any]]:
    """Return the asset's descriptions of its bands, in terms of STAC 1.0 and 1.1."""
    listed = [asset.extra_fields.get(name) for name in ("raster:bands", "bands")]
    return [
        band
        for bands in listed
        if isinstance(bands, list | tuple)
        for band in bands
        if isinstance(band, Mapping)
    ]


def _generated(item: pystac.Item) -> str:
    """Return the product's creation time, as text in order of time.

    It separates two processings of the same baseline.
    """
    named = re.search(r"_(\d{8}T\d{6})(?:\.SAFE)?$", _product(item))
    if named:
        return named.group(1)
    stated = _first(item, "s2:generation_time", "processing:datetime", "created")
    return re.sub(r"[^0-9T]", "", stated)[:15]


def _refused(item: pystac.Item, reason: str) -> SceneError:
    return SceneError(f"item {item.id}: {reason}; it is refused")
