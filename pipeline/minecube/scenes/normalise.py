"""An item of any provider in the project's own terms: one scene, with nothing left that belongs to the provider."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import pyproj
import pystac
import shapely

from minecube.catalog import ASSET_KEYS, NATIVE_M, Offset, Source
from minecube.errors import SceneError
from minecube.grid import split_at_antimeridian
from minecube.network import ForbiddenError, check_href, origin_of, without_query

_TILE_M = 109_800  # side of a Sentinel-2 tile
_SIGNS = re.compile(
    "sig|se|sp|sv|sr|st|sk[a-z]+|x-(amz|goog)-.*|signature|expires|policy|key-pair-id|awsaccesskeyid|googleaccessid|.*token",
    re.I,
)
"""Query keys of Azure's, AWS's, Google's and CloudFront's signatures."""
_UNKNOWN = {"", "none", "null", "nan", "<na>", "nat"}
"""Spellings of an unknown value, in lower case: what tables and their libraries make of null."""
_SAME_GRANULE_S = 2
"""Starts of a granule differ by no more between processings; the parts of a split datatake start many seconds apart."""


def normalise(item: pystac.Item, source: Source) -> pystac.Item:
    """The item as a scene: STAC 1.0 or 1.1, whatever the provider calls its bands, projection and acquisition.

    Raises:
        SceneError: it lacks geometry, time, acquisition, baseline or a band, contradicts itself, or names a file that must
            not be read; names item and reason.
    """
    when = taken(item)
    if when is None or not item.geometry or not item.geometry.get("coordinates"):
        raise _refused(item, f"has no {'geometry' if when else 'datetime'}")
    baseline, tile = _baseline(item), _tile(item)
    offset, reason = _offset(item, baseline, source.offset)
    datatake, start = acquisition(item)
    shape = shapely.geometry.shape(item.geometry)
    footprint = split_at_antimeridian(shape)
    scene = pystac.Item(
        id=item.id,
        geometry=item.geometry if footprint is shape else json.loads(shapely.to_geojson(footprint)),
        bbox=list(footprint.bounds),
        datetime=when,
        properties={
            "eo:cloud_cover": _cloud_cover(item),
            "proj:code": _projection(item, source, tile),
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
        assets=dict(_assets(item, source)),
    )
    need_allowed(scene, source)
    return scene


def same_access(scene: pystac.Item, source: Source) -> bool:
    """Whether a scene's files are got at as its source says now; how many connections at a time may have changed."""
    said = json.loads(scene.properties.get("minecube:access", "{}"))
    ours = json.loads(json.dumps(dataclasses.asdict(source.access)))
    return bool({**said, "connections": 1} == {**ours, "connections": 1})


def need_allowed(scene: pystac.Item, source: Source) -> None:
    """Raise SceneError if a scene names a file that its source must not make a build read."""
    for band, asset in scene.assets.items():
        try:
            check_href(asset.href, origin_of(source.href), source.access.hosts())
        except ForbiddenError as error:
            raise _refused(scene, f"asset {band} is not read from {without_query(asset.href)}: {error}") from error


def taken(item: pystac.Item) -> datetime | None:
    """When it was taken: its datetime, or, where that is null, the start of its interval."""
    return item.datetime or item.common_metadata.start_datetime


def acquisition(item: pystac.Item) -> tuple[str, str]:
    """(datatake, start of its granule), equal for every processing and provider of the acquisition.

    The datatake is `S2A_20200302T102021`: the satellite and when it began to look, of the datatake's or the product's name.
    The start is the sensing start of the datastrip, which tells the two granules of a split datatake apart (Sentinel-2 PSD
    14.9, section 3.4); where the item does not name the datastrip, it stands in the granule's folder too.
    """
    named = _first(item, "s2:datatake_id", "eopf:datatake_id") or _product(item)
    take = re.match(r"G?(S2[A-D])_(?:MSIL2A_)?(\d{8}T\d{6})_", named)
    strip = re.search(r"_S(\d{8}T\d{6})", _first(item, "s2:datastrip_id", "eopf:datastrip_id"))
    hrefs = (asset.href for asset in item.assets.values())
    folder = strip or next((m for m in (re.search(r"/L2A_T\w{5}_A\d{6}_(\d{8}T\d{6})/", h) for h in hrefs) if m), None)
    start = folder or re.fullmatch(r"S2[A-D]_T\w{5}_(\d{8}T\d{6})_L2A", item.id)
    if not take or not start:
        raise _refused(item, f"names no acquisition (datatake {named!r}), so copies of it could be counted twice")
    return f"{take[1]}_{take[2]}", start[1]


def deduplicate(scenes: Iterable[pystac.Item]) -> list[pystac.Item]:
    """One scene per acquisition and tile, whatever the order they come in: the newest baseline, then the newest processing.

    The two granules of a split datatake start at different times and are both kept.
    """
    return [max(copies, key=_version) for copies in _by_acquisition(scenes)]


def merge(lists: Iterable[Iterable[pystac.Item]]) -> list[pystac.Item]:
    """Scenes of several sources, in order of preference: of each acquisition the first source's, never two.

    A later source's newer baseline does not count: within the first source's own the newest was chosen already.
    """
    ranked = [(rank, scene) for rank, listed in enumerate(lists) for scene in listed]
    rank_of = {id(scene): rank for rank, scene in ranked}
    groups = _by_acquisition(scene for _, scene in ranked)
    return [min(copies, key=lambda s: rank_of[id(s)]) for copies in groups]


def _by_acquisition(scenes: Iterable[pystac.Item]) -> list[list[pystac.Item]]:
    """Groups of copies, ordered by time and id of their first."""
    takes: dict[tuple[str, str], list[tuple[datetime, str, pystac.Item]]] = {}
    for scene in scenes:
        p = scene.properties
        started = datetime.strptime(p["minecube:granule_start"], "%Y%m%dT%H%M%S")
        takes.setdefault((p["minecube:datatake"], p["s2:mgrs_tile"]), []).append((started, scene.id, scene))
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
    """The local solar date, YYYY-MM-DD: tiles and granules of one overpass share it, wherever on Earth midnight falls.

    By the middle of the tile's UTM zone, which, unlike a footprint's, does not jump at the antimeridian.
    """
    longitude = 6 * int(tile[:2]) - 183
    return (when + timedelta(hours=longitude / 15)).date().isoformat()


def _assets(item: pystac.Item, source: Source) -> Iterable[tuple[str, pystac.Asset]]:
    for band in source.bands():
        keys = (source.assets[band],) if band in source.assets else ASSET_KEYS[band]
        asset = next((item.assets[k] for k in keys if k in item.assets), None)
        if asset is None and source.assets:
            raise _refused(item, f"has no asset {keys[0]!r} for {band}")
        if asset is None:
            continue  # the source does not say which bands it has; a recipe that needs this one will miss it
        size = source.resolution_m.get(band) or _pixel_size(asset) or NATIVE_M[band]
        shape = _shape(asset.extra_fields) or _shape(item.properties) or [_TILE_M // size] * 2
        stored_bytes = number(asset.extra_fields.get("file:size")) or 0
        fields = {"gsd": size, "file:size": max(round(stored_bytes), 0), "proj:shape": shape}
        yield (
            band,
            pystac.Asset(
                _unsigned(asset.get_absolute_href() or asset.href),
                media_type=asset.media_type,
                roles=asset.roles,
                extra_fields=fields,
            ),
        )


def _unsigned(href: str) -> str:
    """The href without what signs it: signatures are made when a file is read, and never kept."""
    parts = urlsplit(href)
    if not parts.query:
        return href
    kept = [(k, v) for k, v in parse_qsl(parts.query, keep_blank_values=True) if not _SIGNS.fullmatch(k)]
    return urlunsplit(parts._replace(query=urlencode(kept)))


def number(value: object) -> float | None:
    """The finite number that a field holds, also as text; None for null, NaN, infinity and anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def _numbers(value: object) -> list[float]:
    """The numbers of a list; empty if it is no list, or one of them is unknown."""
    listed = [number(v) for v in value] if isinstance(value, list | tuple) else []
    finite = [n for n in listed if n is not None]
    return finite if len(finite) == len(listed) else []


def _shape(fields: Mapping[str, Any]) -> list[int]:
    """Rows and columns of `proj:shape`; empty if they are unknown."""
    sides = [round(n) for n in _numbers(fields.get("proj:shape"))]
    return sides if len(sides) == 2 and min(sides) > 0 else []


def _cloud_cover(item: pystac.Item) -> float | None:
    """Percent of the tile; None if it is unknown, which recipes let through: the mask sees the clouds."""
    share = number(item.properties.get("eo:cloud_cover"))
    return share if share is not None and 0 <= share <= 100 else None


def _first(item: pystac.Item, *names: str) -> str:
    """The first of these properties that is known, as text; empty if none is."""
    listed = [str(item.properties.get(name, "")).strip() for name in names]
    return next((text for text in listed if text.lower() not in _UNKNOWN), "")


def _product(item: pystac.Item) -> str:
    """The product's name, S2A_MSIL2A_<start>_N<baseline>_R<orbit>_T<tile>_<made>; empty where the item does not tell."""
    uri = _first(item, "s2:product_uri")
    return uri or (item.id if item.id.startswith("S2") and "_MSIL" in item.id else "")


def _baseline(item: pystac.Item) -> str:
    """NN.NN, from the properties or from the product's name (`_N0500_`)."""
    stated = re.fullmatch(r"(\d{1,2})\.(\d{1,2})", _first(item, "s2:processing_baseline", "processing:version"))
    named = re.search(r"_N(\d\d)(\d\d)_", _product(item))
    # 4.0 and 05.00 are both in use.
    if stated and named and f"{stated[1]:0>2}{stated[2]:0<2}" != named[1] + named[2]:
        raise _refused(item, f"says baseline {stated[0]}, and its product's name N{named[1]}{named[2]}")
    baseline = f"{stated[1]:0>2}.{stated[2]:0<2}" if stated else f"{named[1]}.{named[2]}" if named else ""
    if baseline >= "99":
        raise _refused(item, f"baseline {baseline} marks a provider's own reprocessing, which is to be withdrawn")
    if not baseline:
        raise _refused(
            item, "names no processing baseline NN.NN, so whether its pixels carry the offset of -1000 cannot be told"
        )
    return baseline


def _offset(item: pystac.Item, baseline: str, rule: Offset) -> tuple[int, str]:
    """What to add to the pixels, and why. What the item declares as raster offset is not asked: it is wrong where applied."""
    if baseline < rule.from_baseline:
        return 0, f"baseline {baseline} is older than {rule.from_baseline}"
    if rule.applied_flag and item.properties.get(rule.applied_flag) is True:
        return 0, f"baseline {baseline}, {rule.applied_flag} is true"
    flag = f", {rule.applied_flag} is {item.properties.get(rule.applied_flag, 'missing')}" if rule.applied_flag else ""
    return rule.value, f"baseline {baseline} from {rule.from_baseline} on{flag}"


def _tile(item: pystac.Item) -> str:
    tile = _first(item, "s2:mgrs_tile", "grid:code")
    if not tile:
        parts = [_first(item, f"mgrs:{p}", f"sentinel:{p}") for p in ("utm_zone", "latitude_band", "grid_square")]
        tile = "".join([parts[0].removesuffix(".0"), *parts[1:]])  # tables make 32.0 of a zone
    named = re.search(r"_T(\d\d[C-X][A-Z]{2})[_.]", _product(item))
    tile = (tile or (named.group(1) if named else "")).strip().upper().removeprefix("MGRS-").removeprefix("T")
    match = re.fullmatch(r"(\d{1,2})([C-X][A-Z]{2})", tile)
    if not match or not 1 <= int(match.group(1)) <= 60:
        raise _refused(item, f"names no MGRS tile (found {tile!r}), so duplicates cannot be told")
    return f"{int(match.group(1)):02d}{match.group(2)}"


def _projection(item: pystac.Item, source: Source, tile: str) -> str:
    """EPSG:NNNNN of the item or its assets, as code, WKT or PROJJSON; they and the tile must agree, which has only one."""
    keys = {k for band in source.bands() for k in ([source.assets[band]] if band in source.assets else ASSET_KEYS[band])}
    shown: list[Mapping[str, Any]] = [item.properties, *(item.assets[k].extra_fields for k in keys if k in item.assets)]
    said = {code for fields in shown for code in _codes(fields)}
    of_tile = f"EPSG:{32600 + 100 * (tile[2] < 'N') + int(tile[:2])}"
    if said - {of_tile}:
        raise _refused(item, f"expected one projection, {of_tile} of its tile {tile}, found {', '.join(sorted(said))}")
    return of_tile


def _codes(fields: Mapping[str, Any]) -> Iterable[str]:
    for name in ("proj:code", "proj:epsg"):
        # EPSG:32632, 32632, 32632.0 from a table, urn:ogc:def:crs:EPSG::32632; "EPSG:None" is none.
        code = re.search(r"(\d{4,6})(?:\.0)?$", str(fields.get(name)))
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
    """Relative orbit, 1..143."""
    named = re.search(r"_R(\d{3})_", _product(item))
    stated = number(item.properties.get("sat:relative_orbit"))
    if stated is not None:
        return round(stated)
    return int(named[1]) if named else None


def _pixel_size(asset: pystac.Asset) -> int | None:
    fields, bands = asset.extra_fields, _bands(asset)
    stated: list[object] = [*_numbers(fields.get("proj:transform"))[:1]]
    stated += [fields.get("raster:spatial_resolution"), *(b.get("spatial_resolution") for b in bands)]
    stated += [*(b.get("raster:spatial_resolution") for b in bands), *(b.get("gsd") for b in bands), fields.get("gsd")]
    sizes = [round(abs(number(s) or 0)) for s in stated]
    return next((size for size in sizes if size), None)


def _bands(asset: pystac.Asset) -> list[Mapping[str, Any]]:
    """What an asset says of its bands, in the terms of STAC 1.0 and of STAC 1.1."""
    listed = [asset.extra_fields.get(name) for name in ("raster:bands", "bands")]
    return [band for bands in listed if isinstance(bands, list | tuple) for band in bands if isinstance(band, Mapping)]


def _generated(item: pystac.Item) -> str:
    """When the product was made, for telling two processings in one baseline apart; as text that sorts by time."""
    named = re.search(r"_(\d{8}T\d{6})(?:\.SAFE)?$", _product(item))
    if named:
        return named.group(1)
    stated = _first(item, "s2:generation_time", "processing:datetime", "created")
    return re.sub(r"[^0-9T]", "", stated)[:15]


def _refused(item: pystac.Item, reason: str) -> SceneError:
    return SceneError(f"item {item.id}: {reason}; it is refused")
