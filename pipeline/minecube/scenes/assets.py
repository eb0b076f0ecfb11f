"""Pick the files of a scene's bands, and check their names, formats and hosts."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import pystac

from minecube.catalog import ASSET_KEYS, NATIVE_M, Source
from minecube.network import ForbiddenError, check_href, origin_of, remove_query
from minecube.scenes.item_values import parse_number, parse_numbers, read_number, refusal

_TILE_M = 109_800  # side of a Sentinel-2 tile
_SIGNATURE_KEYS = re.compile(
    "sig|se|sp|sv|sr|st|sk[a-z]+|x-(amz|goog)-.*|signature|expires|policy|key-pair-id|"
    "awsaccesskeyid|googleaccessid|.*token",
    re.I,
)
"""Query keys in signatures of Azure, AWS, Google and CloudFront."""
_PLAIN_NAME = re.compile(r"/[A-Za-z0-9_]+\.(tiff?|jp2)$")
_UNREAD_TYPE = re.compile(r"zarr|netcdf|hdf|grib|png|jpe?g(?!2)|xml|json|zip|pdf|html", re.I)
"""Media types of unreadable formats. Bands must be GeoTIFF or JPEG 2000 (`minecube.images`)."""
_UNREAD_SUFFIX = re.compile(
    r"\.(zarr|nc4?|h5|hdf5?|he5|grib2?|png|jpe?g|xml|json|zip|pdf|html)(/|$)", re.I
)


def find_band_assets(item: pystac.Item, source: Source) -> dict[str, pystac.Asset]:
    """Map each band of the item, and SCL, to its asset with an href."""
    assets = {key: asset for key, asset in item.assets.items() if isinstance(asset.href, str)}
    by_band = {}
    for band in source.bands():
        keys: tuple[str, ...] = ASSET_KEYS[band]
        if band in source.assets:
            keys = (source.assets[band],)
        key = next((key for key in keys if key in assets), None)
        if key is not None:
            by_band[band] = assets[key]
    return by_band


def need_images(item: pystac.Item, assets: Mapping[str, pystac.Asset]) -> None:
    """Raise SceneError if a band has an unreadable format, or all bands lie in one Zarr."""
    for key, asset in (assets or item.assets).items():
        mark = _find_unread_format(asset)
        if "zarr" in mark.lower():
            kind = "Zarr"
        elif mark and assets:
            kind = "in another format"
        else:
            continue
        raise refusal(item, f"asset {key} is {kind} ({mark}); expected GeoTIFF or JPEG 2000")


def _find_unread_format(asset: pystac.Asset) -> str:
    """Return the media type or suffix of an unreadable format, else an empty text."""
    if _UNREAD_TYPE.search(str(asset.media_type or "")):
        return f"media type {asset.media_type}"
    suffix = _UNREAD_SUFFIX.search(str(asset.href).partition("?")[0].partition("#")[0])
    return f"suffix .{suffix[1]}" if suffix else ""


def convert_assets(
    item: pystac.Item, source: Source, assets: Mapping[str, pystac.Asset]
) -> dict[str, pystac.Asset]:
    """Convert the assets of the bands to the project's own terms.

    Raises:
        SceneError: the item lacks an asset named by the source. Other bands may be missing.
    """
    for band, key in source.assets.items():
        if band not in assets:
            raise refusal(item, f"has no asset {key!r} for {band}")
    converted = {}
    for band, asset in assets.items():
        size = source.resolution_m.get(band) or _read_pixel_size(asset) or NATIVE_M[band]
        shape = (
            _read_shape(asset.extra_fields) or _read_shape(item.properties) or [_TILE_M // size] * 2
        )
        converted[band] = _convert_asset(asset, size, shape)
    return converted


def _convert_asset(asset: pystac.Asset, size: int, shape: list[int]) -> pystac.Asset:
    """Return an asset with an absolute, unsigned href, pixel size and shape."""
    href = asset.href
    if "://" not in href:
        href = asset.get_absolute_href() or href
    stored_bytes = parse_number(asset.extra_fields.get("file:size")) or 0
    return pystac.Asset(
        remove_signature(href),
        media_type=asset.media_type,
        roles=asset.roles,
        extra_fields={"gsd": size, "file:size": max(round(stored_bytes), 0), "proj:shape": shape},
    )


def remove_signature(href: str) -> str:
    """Remove the signature from an href. Signatures are created at each read and never stored."""
    if "?" not in href:
        return href
    parts = urlsplit(href)
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    unsigned = [(key, value) for key, value in pairs if not _SIGNATURE_KEYS.fullmatch(key)]
    return urlunsplit(parts._replace(query=urlencode(unsigned)))


def _read_shape(fields: Mapping[str, Any]) -> list[int]:
    """Return rows and columns of `proj:shape`, empty if unknown."""
    sides = [round(side) for side in parse_numbers(fields.get("proj:shape"))]
    if len(sides) != 2 or min(sides) <= 0:
        return []
    return sides


def _read_pixel_size(asset: pystac.Asset) -> int | None:
    """Return an asset's pixel size in metres, or None if not stated."""
    fields = asset.extra_fields
    transform = fields.get("proj:transform")
    if isinstance(transform, list | tuple) and transform:
        width = abs(parse_number(transform[0]) or 0.0)
        if width >= 1:
            return round(width)
    sizes = [
        read_number(fields, "raster:spatial_resolution"),
        *(
            read_number(band, "spatial_resolution", "raster:spatial_resolution", "gsd")
            for band in list_bands(asset)
        ),
        read_number(fields, "gsd"),
    ]
    metres = (round(abs(size or 0)) for size in sizes)
    return next((size for size in metres if size), None)


def list_bands(asset: pystac.Asset) -> list[Mapping[str, Any]]:
    """Return the asset's descriptions of its bands, in terms of STAC 1.0 and 1.1."""
    descriptions = []
    for name in ("raster:bands", "bands"):
        bands = asset.extra_fields.get(name)
        if isinstance(bands, list | tuple):
            descriptions += [band for band in bands if isinstance(band, Mapping)]
    return descriptions


def format_access(source: Source) -> str:
    """Return the source's access rules as text, for the property `minecube:access`."""
    return json.dumps(dataclasses.asdict(source.access), sort_keys=True)


def has_same_access(scene: pystac.Item, source: Source) -> bool:
    """Return whether a scene was saved with the source's current access rules.

    The number of connections may differ.
    """
    saved = json.loads(scene.properties.get("minecube:access", "{}"))
    current = json.loads(format_access(source))
    return bool({**saved, "connections": 1} == {**current, "connections": 1})


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
            raise refusal(
                scene, f"asset {band} is not read from {remove_query(asset.href)}: {error}"
            ) from error
