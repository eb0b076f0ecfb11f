"""Decide the radiometric offset of an item by the rule of its source."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import pystac

from minecube.catalog import SCL, Offset, Source
from minecube.scenes.assets import list_bands
from minecube.scenes.item_values import parse_number, read_number, read_property, refusal

log = logging.getLogger(__name__)


def decide_offset(
    item: pystac.Item, baseline: str, source: Source, assets: Mapping[str, pystac.Asset]
) -> tuple[int, str]:
    """Return the number to add to the pixels, and the reason.

    Sources' rules decide, since raster offsets declared by items may be applied already. A declared
    offset counts only for products of one's own Sen2Cor.
    """
    by_band = {band: _declared_offset(asset) for band, asset in assets.items() if band != SCL}
    declared = {band: offset for band, offset in by_band.items() if offset is not None}
    if baseline >= "99":
        return _own_offset(item, baseline, source.offset, set(declared.values()))
    offset, reason = _ruled_offset(item, baseline, source.offset)
    plausible = (0, source.offset.value, offset)
    odd = [f"{value} for {band}" for band, value in declared.items() if value not in plausible]
    if odd:
        log.warning(
            "item %s: declares offset %s; the rule of source %s gives %d",
            item.id,
            ", ".join(odd),
            source.id,
            offset,
        )
        reason += f"; the item declares {', '.join(odd)}"
    return offset, reason


def _declared_offset(asset: pystac.Asset) -> int | None:
    """Return an asset's raster offset in digital numbers, or None if not declared."""
    for fields in (asset.extra_fields, *list_bands(asset)):
        offset = read_number(fields, "raster:offset", "offset")
        if offset is None:
            continue
        scale = read_number(fields, "raster:scale", "scale")
        if not scale:
            # Without a scale, a value below 10 can only be reflectance.
            scale = 1e-4 if abs(offset) < 10 else 1
        return round(offset / scale)
    return None


def _own_offset(
    item: pystac.Item, baseline: str, rule: Offset, declared: set[int]
) -> tuple[int, str]:
    """Return the offset of a product from one's own Sen2Cor, and the reason.

    It depends on the version of Sen2Cor and on the Level-1C input.
    """
    marks = f"baseline {baseline} marks a product of one's own Sen2Cor"
    if rule.own is None:
        remedy = "write own (-1000, 0 or declared) into the offset of its source"
        raise refusal(item, f"{marks}, and no rule tells which offset its pixels carry: {remedy}")
    if isinstance(rule.own, int):
        return rule.own, f"{marks}; its source gives {rule.own}"
    if len(declared) != 1:
        listed = ", ".join(map(str, sorted(declared))) or "none"
        raise refusal(
            item, f"{marks}: expected one raster offset declared for all its bands, found {listed}"
        )
    offset = min(declared)
    return offset, f"{marks}; it declares {offset}"


def _ruled_offset(item: pystac.Item, baseline: str, rule: Offset) -> tuple[int, str]:
    if baseline < rule.from_baseline:
        return 0, f"baseline {baseline} is older than {rule.from_baseline}"
    reason = f"baseline {baseline} from {rule.from_baseline} on"
    if not rule.applied_flag:
        return rule.value, reason
    flag = read_property(item, rule.applied_flag)
    if flag.lower() == "true" or parse_number(flag) == 1:
        return 0, f"baseline {baseline}, {rule.applied_flag} is true"
    stated = item.properties.get(rule.applied_flag, "missing")
    return rule.value, f"{reason}, {rule.applied_flag} is {stated}"
