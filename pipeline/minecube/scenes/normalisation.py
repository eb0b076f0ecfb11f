"""Turn an item of any provider into one scene in the project's own terms."""

from __future__ import annotations

import json
import re
from typing import Any

import pystac
import shapely
from shapely.geometry.base import BaseGeometry

from minecube.catalog import SCL, Source
from minecube.grid import clean_footprint
from minecube.network import origin_of
from minecube.scenes.acquisitions import compute_solar_day, identify_acquisition
from minecube.scenes.assets import (
    convert_assets,
    find_band_assets,
    format_access,
    need_allowed,
    need_images,
)
from minecube.scenes.footprints import parse_shape
from minecube.scenes.item_values import read_property, refusal
from minecube.scenes.offset_rule import decide_offset
from minecube.scenes.product import (
    read_baseline,
    read_cloud_cover,
    read_generation_time,
    read_orbit,
    read_product_name,
    read_projection,
    read_tile,
)

_LEVEL_1 = re.compile(
    r"(?<![A-Z0-9])(S2MSI|MSIL|L|LEVEL[-_ ]?)1[ABC](?![A-Z0-9])|^level (L|LEVEL[-_ ]?)?1[ABC]?$",
    re.I,
)
"""Level-1 in names of products, types, levels and collections.

Examples are S2A_MSIL1C_2022..., S2MSI1C, L1C and sentinel-2-l1c.
"""
_LEVEL_2A = re.compile("L2A", re.I)


def normalise(item: pystac.Item, source: Source) -> pystac.Item:
    """Convert an item to a scene, from STAC 1.0 or 1.1 and any provider's names.

    Raises:
        SceneError: the item is not a Level-2A product of the source's collection. Or it lacks a
            footprint, time, acquisition, baseline or band. Or it contradicts itself, or names a
            forbidden or unreadable file. The message names the item and the reason.
    """
    _need_product(item, source)
    assets = find_band_assets(item, source)
    need_images(item, assets)
    time = item.datetime or item.common_metadata.start_datetime
    if time is None:
        raise refusal(item, "has no datetime")
    geometry, footprint = _footprint(item)
    baseline = read_baseline(item)
    tile = read_tile(item)
    offset, reason = decide_offset(item, baseline, source, assets)
    datatake, start = identify_acquisition(item)
    scene = pystac.Item(
        id=item.id,
        geometry=geometry,
        bbox=list(footprint.bounds),
        datetime=time,
        properties={
            "eo:cloud_cover": read_cloud_cover(item),
            "proj:code": read_projection(item, assets.values(), tile),
            "s2:mgrs_tile": tile,
            "s2:processing_baseline": baseline,
            "sat:relative_orbit": read_orbit(item),
            "minecube:source": source.id,
            "minecube:access": format_access(source),
            "minecube:origin": origin_of(source.href),
            "minecube:tile_px": source.tile_px,
            "minecube:solar_day": compute_solar_day(time, tile),
            "minecube:datatake": datatake,
            "minecube:granule_start": start,
            "minecube:generated": read_generation_time(item),
            "minecube:offset": offset,
            "minecube:offset_reason": reason,
        },
        assets=convert_assets(item, source, assets),
    )
    if SCL not in scene.assets:
        listed = ", ".join(item.assets) or "no asset at all"
        raise refusal(item, f"has no scene classification (SCL), only {listed}")
    need_allowed(scene, source)
    return scene


def _footprint(item: pystac.Item) -> tuple[dict[str, Any] | None, BaseGeometry]:
    """Return the footprint as GeoJSON and as shape. Raise SceneError if it has no area."""
    shape = parse_shape(item.geometry)
    footprint = clean_footprint(shape)
    if footprint.is_empty:
        kind = shape.geom_type if shape else "none"
        raise refusal(
            item,
            "has no geometry with an area: expected polygons in longitude and latitude, "
            f"found {kind}",
        )
    if footprint is shape:
        return item.geometry, footprint
    return json.loads(shapely.to_geojson(footprint)), footprint


def _need_product(item: pystac.Item, source: Source) -> None:
    """Raise SceneError for any product other than the source's Level-2A.

    A file of items may hold several products.
    """
    names = [
        f"level {read_property(item, 'processing:level')}",
        read_property(item, "s2:product_type"),
        read_product_name(item),
        item.id,
    ]
    collection = item.collection_id or ""
    if not _LEVEL_2A.search(collection):
        names.append(collection)
    level_1 = next((name for name in names if _LEVEL_1.search(name)), None)
    if level_1:
        raise refusal(item, f"expected a Level-2A product, found Level-1 ({level_1})")
    if source.kind == "stac-geoparquet" and collection not in ("", source.collection):
        raise refusal(
            item,
            f"expected collection {source.collection}, which source {source.id} lists, "
            f"found {collection}",
        )
