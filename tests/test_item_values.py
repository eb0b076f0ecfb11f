"""Numbers and names of items are read in every spelling, and unknown ones stay unknown."""

from __future__ import annotations

import dataclasses

import pytest

from known_items import LEFT, TOP, changed
from known_scenes import grid_at
from minecube import scenes

UNKNOWN = [
    None,
    float("nan"),
    float("inf"),
    float("-inf"),
    "nan",
    "NaN",
    "Infinity",
    "",
    "unknown",
    [],
    True,
]


@pytest.mark.parametrize("value", UNKNOWN, ids=map(repr, UNKNOWN))
def test_an_unknown_number_is_unknown_however_it_is_spelled(archive, value):
    """Each number field of an item: as if it were not there, and the scene is listed."""
    item = archive.item("2020-07-05T10:00:00", grid_at(LEFT, TOP, 60, 60), {"B04": 1, "B11": 1})
    source = dataclasses.replace(archive.source, resolution_m={})
    bare = changed(item, _without_numbers)
    expected = scenes.normalise(bare, source)
    assert expected.properties["eo:cloud_cover"] is None
    assert expected.assets["B04"].extra_fields == {
        "gsd": 10,
        "file:size": 0,
        "proj:shape": [10980, 10980],
    }

    def spell(content):
        content["properties"] |= dict.fromkeys(
            ("eo:cloud_cover", "sat:relative_orbit", "proj:epsg", "proj:shape"), value
        )
        for asset in content["assets"].values():
            asset |= dict.fromkeys(
                ("gsd", "file:size", "proj:shape", "proj:transform", "raster:spatial_resolution"),
                value,
            )
            asset |= {"proj:shape": [value, value], "proj:transform": [value] * 6}
            asset["raster:bands"] = [{"spatial_resolution": value, "offset": value, "scale": value}]

    assert scenes.normalise(changed(bare, spell), source).to_dict() == expected.to_dict()


def _without_numbers(content):
    del content["properties"]["eo:cloud_cover"], content["properties"]["proj:epsg"]
    for asset in content["assets"].values():
        del asset["gsd"], asset["proj:shape"]


def test_numbers_as_text_and_from_tables(archive):
    """A table with one null makes floats of whole numbers; CSV makes text of all."""
    item = archive.item("2020-07-05T10:00:00", grid_at(LEFT, TOP, 60, 60), {"B04": 1, "B11": 1})
    source = dataclasses.replace(archive.source, resolution_m={})
    fields = {"gsd": "10.0", "file:size": 4321.0, "proj:shape": ["60", 60.0]}
    item.assets["B04"].extra_fields = fields
    for name in ("s2:mgrs_tile", "s2:product_uri"):
        del item.properties[name]
    item.id = "without a name"
    item.properties |= {"eo:cloud_cover": "12.5", "sat:relative_orbit": 22.0}
    item.properties |= {"mgrs:utm_zone": 33.0, "mgrs:latitude_band": "U", "mgrs:grid_square": "UR"}
    scene = scenes.normalise(item, source)
    assert scene.assets["B04"].extra_fields == {
        "gsd": 10,
        "file:size": 4321,
        "proj:shape": [60, 60],
    }
    assert scene.properties["eo:cloud_cover"] == 12.5
    assert (scene.properties["sat:relative_orbit"], scene.properties["s2:mgrs_tile"]) == (
        22,
        "33UUR",
    )


def test_names_that_a_table_made_nan_are_taken_from_the_products_name(archive):
    item = archive.item("2020-07-05T10:00:00", grid_at(LEFT, TOP, 60, 60), {"B04": 1, "B11": 1})
    expected = scenes.normalise(item, archive.source).properties
    for value in (float("nan"), "nan", None):
        item.properties |= dict.fromkeys(
            ("s2:processing_baseline", "s2:datatake_id", "s2:mgrs_tile"), value
        )
        assert scenes.normalise(item, archive.source).properties == expected
