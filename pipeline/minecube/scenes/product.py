"""Read tile, baseline, orbit, projection and age of an item's product."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import pyproj
import pystac

from minecube.scenes.item_values import parse_number, read_property, refusal


def read_product_name(item: pystac.Item) -> str:
    """Return the product's name, or an empty text.

    The form is S2A_MSIL2A_<start>_N<baseline>_R<orbit>_T<tile>_<made>.
    """
    name = read_property(item, "s2:product_uri", "sentinel:product_id")
    if not name and item.id.startswith("S2") and "_MSIL" in item.id:
        return item.id
    return name


def read_baseline(item: pystac.Item) -> str:
    """Return the baseline as NN.NN, from the properties or the product's name (`_N0500_`).

    Raises SceneError if both are missing, or contradict each other.
    """
    text = read_property(
        item, "s2:processing_baseline", "sentinel:processing_baseline", "processing:version"
    )
    stated = ""
    if number := re.fullmatch(r"(\d{1,2})\.(\d{1,2})", text):
        stated = f"{number[1]:0>2}.{number[2]:0<2}"  # 4.0 and 05.00 are both in use
    in_name = ""
    if part := re.search(r"_N(\d\d)(\d\d)_", read_product_name(item)):
        in_name = f"{part[1]}.{part[2]}"
    if stated and in_name and stated != in_name:
        raise refusal(
            item, f"says baseline {text}, and its product's name N{in_name.replace('.', '')}"
        )
    if not stated and not in_name:
        raise refusal(
            item, "names no processing baseline NN.NN, which decides on the offset of -1000"
        )
    return stated or in_name


def read_tile(item: pystac.Item) -> str:
    """Return the MGRS tile, such as 32TMT. Raise SceneError without one."""
    tile = read_property(item, "s2:mgrs_tile", "grid:code") or _joined_tile(item)
    if not tile:
        part = re.search(r"_T(\d\d[C-X][A-Z]{2})[_.]", read_product_name(item))
        tile = part[1] if part else ""
    tile = tile.strip().upper().removeprefix("MGRS-").removeprefix("T")
    match = re.fullmatch(r"(\d{1,2})([C-X][A-Z]{2})", tile)
    if not match or not 1 <= int(match[1]) <= 60:
        raise refusal(
            item, f"names no MGRS tile (found {tile!r}), so duplicates cannot be detected"
        )
    return f"{int(match[1]):02d}{match[2]}"


def _joined_tile(item: pystac.Item) -> str:
    """Return the tile as stated by its zone, latitude band and square, or an empty text."""
    zone, band, square = (
        read_property(item, f"mgrs:{part}", f"sentinel:{part}")
        for part in ("utm_zone", "latitude_band", "grid_square")
    )
    return re.sub(r"\.0+$", "", zone) + band + square  # tables turn a zone into 32.0 or 32.00


def read_orbit(item: pystac.Item) -> int | None:
    """Return the relative orbit (1..143), or None."""
    stated = parse_number(item.properties.get("sat:relative_orbit"))
    if stated is not None:
        return round(stated)
    part = re.search(r"_R(\d{3})_", read_product_name(item))
    return int(part[1]) if part else None


def read_cloud_cover(item: pystac.Item) -> float | None:
    """Return the cloud cover in percent of the tile, or None if unknown."""
    percent = parse_number(item.properties.get("eo:cloud_cover"))
    if percent is None or not 0 <= percent <= 100:
        return None
    return percent


def read_generation_time(item: pystac.Item) -> str:
    """Return the product's creation time, as text in order of time.

    It separates two processings of the same baseline.
    """
    part = re.search(r"_(\d{8}T\d{6})(?:\.SAFE)?$", read_product_name(item))
    if part:
        return part[1]
    stated = read_property(item, "s2:generation_time", "processing:datetime", "created")
    return re.sub(r"[^0-9T]", "", stated)[:15]


def read_projection(item: pystac.Item, assets: Iterable[pystac.Asset], tile: str) -> str:
    """Return EPSG:NNNNN of the tile. Raise SceneError if the item or its assets state another.

    They may state it as code, WKT or PROJJSON.
    """
    stated = set(_epsg_codes(item.properties))
    for asset in assets:
        stated.update(_epsg_codes(asset.extra_fields))
    of_tile = f"EPSG:{32600 + 100 * (tile[2] < 'N') + int(tile[:2])}"
    if stated - {of_tile}:
        raise refusal(
            item,
            f"expected one projection, {of_tile} of its tile {tile}, "
            f"found {', '.join(sorted(stated))}",
        )
    return of_tile


def _epsg_codes(fields: Mapping[str, Any]) -> Iterable[str]:
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
