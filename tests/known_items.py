"""Raw items of the real providers and of a small archive, changes of them, and files of items."""

from __future__ import annotations

import copy
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pystac
import pytest
import shapely
import stac_geoparquet.arrow

from known_scenes import grid_at
from minecube import scenes
from minecube.catalog import Recipe, load_sources
from minecube.errors import SceneError

LEFT, TOP = 360000, 5600040
PLAIN = Recipe(id="r", title="t", bands=("B04", "B11"), block_px=64, chunk_px=32)
FOLDERS = {
    "earthsearch_l2a": "earth-search",
    "earthsearch_c1": "earth-search-c1",
    "planetary_computer": "planetary-computer",
    "cdse": "cdse",
}


def changed(item, change):
    content = copy.deepcopy(item.to_dict(include_self_link=False, transform_hrefs=False))
    change(content)
    return pystac.Item.from_dict(content, migrate=False)


def refused(change, item, source):
    content = copy.deepcopy(item.to_dict(include_self_link=False, transform_hrefs=False))
    change(content)
    with pytest.raises(SceneError) as caught:
        scenes.normalise(pystac.Item.from_dict(content, migrate=False), source)
    return str(caught.value)


def write_features(features, path, geometries=None):
    """A stac-geoparquet file of features; with these geometries instead of their own."""
    table = stac_geoparquet.arrow.parse_stac_items_to_arrow(features).read_all()
    if geometries is not None:
        column = pa.array(
            [None if g is None else shapely.to_wkb(g) for g in geometries], type=pa.binary()
        )
        table = table.set_column(table.column_names.index("geometry"), "geometry", column)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def features_of(archive, n=3, **properties):
    grid = grid_at(LEFT, TOP, 60, 60)
    days = [f"2020-07-{day:02d}T10:00:00" for day in range(5, 5 + n)]
    return [
        archive.item(day, grid, {"B04": 1, "B11": 1}, **properties).to_dict(transform_hrefs=False)
        for day in days
    ]


def read_real_items(real_data):
    """(raw item, source) of every real item, by id."""
    sources = load_sources()
    return {
        item.id: (item, sources[source])
        for folder, source in FOLDERS.items()
        for path in sorted((real_data / "stac_items" / folder).glob("*.json"))
        for item in [pystac.Item.from_dict(json.loads(path.read_text()), migrate=False)]
    }
