"""Turn a listed feature into a pystac item."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import pystac

from minecube.errors import SceneError

UNREAD_TIME = "minecube:unread_datetime"
"""Property with an unreadable datetime of an item from a file."""
_MOST_LETTERS = 60
"""Letters of a malformed value in an error."""


def parse_item(feature: Mapping[str, Any], name: str) -> pystac.Item:
    """Turn a listed feature into an item. Drop assets without an href and links to other places.

    Any part of the feature may be malformed. `name` is the item's name in errors.

    Raises:
        SceneError: the item cannot be used. The message names the item and the reason.
    """
    item_id = feature.get("id")
    if not isinstance(item_id, str | int) or item_id == "":
        raise _malformed(name, "an id", item_id)
    if feature.get("type") != "Feature":
        raise _malformed(name, "type 'Feature'", feature.get("type"))
    properties = feature.get("properties")
    if not isinstance(properties, dict):
        raise _malformed(name, "an object of properties", properties)
    assets = feature.get("assets")
    if assets is not None and not isinstance(assets, dict):
        raise _malformed(name, "an object of assets", assets)
    collection = feature.get("collection")
    if collection is not None:
        collection = str(collection)
    item = pystac.Item(
        id=str(item_id),
        geometry=feature.get("geometry"),
        bbox=None,
        datetime=_parse_time(properties, name),
        properties=properties,
        collection=collection,
        assets={
            key: pystac.Asset.from_dict(asset)
            for key, asset in (assets or {}).items()
            if _has_href(asset)
        },
    )
    links = feature.get("links")
    if isinstance(links, list):
        # Relative hrefs of assets start at the item's own place.
        own = [link for link in links if _has_href(link) and link.get("rel") == "self"]
        item.add_links([pystac.Link.from_dict(link) for link in own])
    return item


def _parse_time(properties: Mapping[str, Any], name: str) -> datetime:
    """Return an item's datetime, or the start of its interval. Raise SceneError without either."""
    for key in ("datetime", "start_datetime"):
        text = properties.get(key)
        if isinstance(text, str):
            try:
                return pystac.utils.str_to_datetime(text)
            except (ValueError, OverflowError):
                continue
    for key in ("datetime", "start_datetime", UNREAD_TIME):
        value = properties.get(key)
        if value is not None:
            raise _malformed(name, "a datetime in ISO 8601 such as 2022-04-10T10:20:00Z", value)
    raise SceneError(f"item {name}: has no datetime; it is refused")


def _has_href(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("href"), str)


def _malformed(name: str, expected: str, value: object) -> SceneError:
    text = repr(value)
    if len(text) > _MOST_LETTERS:
        text = text[:_MOST_LETTERS] + "..."
    return SceneError(f"item {name}: expected {expected}, found {text}; it is refused")
