"""A simulated archive of one site, its items and their files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import rasterio

from known_scenes import site_of
from minecube.catalog import load_sources
from minecube.simulate import World, simulate_archive

STYLES = ("earth-search", "planetary-computer", "cdse")
SHIPPED = load_sources()
PLACE = site_of("small", 360000, 5600040, 120, 96)
"""120 x 96 pixels in zone 33; its neighbour is zone 32."""


def simulate_small(folder: Path) -> Path:
    """The folder of an archive of that site in two years, in all styles."""
    out = folder / "world"
    simulate_archive([PLACE], out, World(years=(2020, 2022), dates_per_year=6, winter_dates=1))
    return out


def items(world: Path, style: str, year: int | None = None) -> list[dict[str, Any]]:
    found = [json.loads(p.read_text()) for p in sorted((world / style).glob("*/item.json"))]
    return [i for i in found if year is None or i["properties"]["datetime"].startswith(str(year))]


def read(world: Path, style: str, item: dict[str, Any], band: str) -> np.ndarray:
    key = SHIPPED[style].assets[band]
    with rasterio.open(world / style / item["id"] / item["assets"][key]["href"]) as file:
        return file.read(1)


def prop(item: dict[str, Any], name: str) -> Any:
    """A property by Earth Search's name, whoever wrote the item."""
    p = item["properties"]
    return p.get(f"s2:{name}") or p.get(f"eopf:{name}")


def acquisition(item: dict[str, Any]) -> tuple[str, str, str]:
    """Datatake without its baseline, tile, start of the datastrip: the same for all processings everywhere."""
    strip = re.search(r"_S(\d{8}T\d{6})_", prop(item, "datastrip_id"))
    p = item["properties"]
    tile = p.get("s2:mgrs_tile") or p["grid:code"].removeprefix("MGRS-")
    assert strip
    return prop(item, "datatake_id").rpartition("_")[0], tile, strip.group(1)
