"""What a later search lists in another way, acquisition by acquisition."""

from __future__ import annotations

import datetime as dt

import pystac
import pytest

from minecube.scenes import SceneChange, compare_lists


def scene(name, day=1, baseline="02.14", **changes):
    time = dt.datetime(2020, 5, day, 10, tzinfo=dt.UTC)
    item = pystac.Item(
        name,
        None,
        None,
        time,
        {
            "minecube:datatake": f"S2A_202005{day:02d}T100000",
            "minecube:granule_start": f"202005{day:02d}T100000",
            "s2:mgrs_tile": "33UUR",
            "s2:processing_baseline": baseline,
            "minecube:source": changes.get("source", "a"),
            "minecube:offset": changes.get("offset", 0),
            "eo:cloud_cover": changes.get("cloud", 5.0),
        },
    )
    folder = changes.get("folder", "x")
    for band in ("B02", "SCL"):
        item.add_asset(band, pystac.Asset(f"https://host.example/{folder}/{band}.tif"))
    return item


@pytest.mark.parametrize(
    ("old", "new", "change"),
    [
        (None, scene("a"), SceneChange("a", "added")),
        (scene("a"), None, SceneChange("a", "gone")),
        (
            scene("a"),
            scene("b", baseline="05.00", offset=-1000),
            SceneChange(
                "b", "reprocessed", "baseline 02.14 -> 05.00, id a -> b, offset 0 -> -1000"
            ),
        ),
        (
            scene("a"),
            scene("a", baseline="05.00"),
            SceneChange("a", "reprocessed", "baseline 02.14 -> 05.00"),
        ),
        (scene("a"), scene("b", folder="y"), SceneChange("b", "reprocessed", "id a -> b")),
        (scene("a"), scene("a", offset=-1000), SceneChange("a", "changed", "offset 0 -> -1000")),
        (scene("a"), scene("a", source="b"), SceneChange("a", "changed", "source a -> b")),
        (
            scene("a"),
            scene("a", cloud=50.0),
            SceneChange("a", "changed", "properties changed: eo:cloud_cover"),
        ),
        (scene("a"), scene("a", folder="y"), SceneChange("a", "changed", "files moved: 2 of 2")),
    ],
)
def test_each_kind_of_change_is_named(old, new, change):
    same = [scene("same", day=3)]
    lists = [[item, *same] if item else same for item in (old, new)]
    assert compare_lists(*lists) == [change]


def test_equal_lists_have_no_change_in_any_order():
    days = range(1, 5)
    old = [scene(f"s{day}", day) for day in days]
    assert compare_lists(old, [scene(f"s{day}", day) for day in reversed(days)]) == []
