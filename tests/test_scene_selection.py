"""Each acquisition counts once, and a recipe selects from all scenes."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import stac_geoparquet.arrow
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from known_items import LEFT, PLAIN, TOP, changed, read_real_items
from known_scenes import grid_at, site_of
from minecube import scenes
from minecube.catalog import load_recipes
from minecube.errors import SceneError
from minecube.scenes import snapshot


@pytest.fixture(scope="session")
def real(real_data):
    return read_real_items(real_data)


def test_the_newest_baseline_wins_whatever_the_order(real):
    names = [n for n in real if "32TMT" in n and n.startswith("S2A_32TMT")]
    listed = [scenes.normalise(*real[n]) for n in names]
    for order in (listed, listed[::-1], listed[1:] + listed[:1]):
        assert [s.id for s in scenes.deduplicate(order)] == [
            "S2A_32TMT_20200302_1_L2A",
            "S2A_32TMT_20200305_1_L2A",
        ]


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(order=st.permutations(range(6)))
def test_split_datatake_kept_older_copies_dropped(archive, order):
    grid = grid_at(LEFT, TOP, 60, 60)
    upper = {"start": "20200705T100100"}
    lower = {"start": "20200705T100125"}
    twice = "2020-07-05T10:00:00"
    listed = [
        archive.scene(twice, grid, {"B04": 1, "B11": 1}, baseline="02.14", **upper),
        archive.scene(
            twice,
            grid,
            {"B04": 1, "B11": 1},
            baseline="05.00",
            processed="20230101T000000",
            **upper,
        ),
        archive.scene(
            twice,
            grid,
            {"B04": 1, "B11": 1},
            baseline="05.00",
            processed="20230601T000000",
            **upper,
        ),
        archive.scene(
            twice,
            grid,
            {"B04": 1, "B11": 1},
            baseline="05.00",
            processed="20230101T000000",
            **lower,
        ),
        archive.scene(
            twice,
            grid,
            {"B04": 1, "B11": 1},
            baseline="05.00",
            processed="20230601T000000",
            tile="33UVR",
            **upper,
        ),
        archive.scene("2020-07-08T10:00:00", grid, {"B04": 1, "B11": 1}),
    ]
    kept = scenes.deduplicate([listed[i] for i in order])
    assert {s.id for s in kept} == {listed[i].id for i in (2, 3, 4, 5)}
    assert [s.id for s in kept] == [s.id for s in scenes.deduplicate(listed)]


def test_acquisitions_told_by_name_where_properties_are_missing(real):
    """The product's name and the granule's folder, or Collection 1's id, say the same as the properties."""
    for name in (
        "S2B_MSIL2A_20200705T101559_N0500_R065_T32TMT_20230530T175912",
        "S2B_MSIL2A_20200705T101559_R065_T32TMT_20200825T083452",
        "S2B_T24MUA_20250731T130245_L2A",
    ):
        item, _ = real[name]

        def strip(content):
            for key in ("datatake_id", "datastrip_id"):
                content["properties"].pop(f"s2:{key}", None)
                content["properties"].pop(f"eopf:{key}", None)

        assert scenes.identify_acquisition(changed(item, strip)) == scenes.identify_acquisition(
            item
        )


TWINS = {
    "S2B_20200705T101559": (
        "S2B_MSIL2A_20200705T101559_R065_T32TMT_20200825T083452",
        "S2B_MSIL2A_20200705T101559_N0500_R065_T32TMT_20230530T175912",
    ),
    "S2B_20250731T130249": ("S2B_24MUA_20250731_0_L2A", "S2B_T24MUA_20250731T130245_L2A"),
}


@pytest.mark.parametrize("take", TWINS)
def test_twins_of_two_sources_are_one(real, take):
    """The first source's, whichever that is, though the other's baseline be newer."""
    one, other = (scenes.normalise(*real[name]) for name in TWINS[take])
    assert one.properties["minecube:datatake"] == other.properties["minecube:datatake"] == take
    assert [s.id for s in scenes.merge_sources([[one], [other]])] == [one.id]
    assert [s.id for s in scenes.merge_sources([[other], [one]])] == [other.id]
    assert [s.id for s in scenes.merge_sources([[], [one]])] == [one.id]
    assert (
        len(scenes.merge_sources([[one], [scenes.normalise(*real["S2A_29RKH_20200219_0_L2A"])]]))
        == 2
    )


def test_a_start_that_shifts_by_a_second_is_the_same_granule(archive):
    """Reprocessing rounds it anew; the parts of a split datatake are many seconds apart."""
    grid, when = grid_at(LEFT, TOP, 60, 60), "2020-07-05T10:00:00"
    starts = {"old": "20200705T100100", "new": "20200705T100101", "other part": "20200705T100106"}
    baselines = {"old": "02.14", "new": "05.00", "other part": "05.00"}
    listed = {
        k: archive.scene(when, grid, {"B04": 1, "B11": 1}, start=starts[k], baseline=baselines[k])
        for k in starts
    }
    for order in itertools.permutations(listed):
        kept = scenes.deduplicate([listed[k] for k in order])
        assert {s.id for s in kept} == {listed["new"].id, listed["other part"].id}
        first = scenes.merge_sources([[listed["old"]], [listed[k] for k in order if k != "old"]])
        assert {s.id for s in first} == {listed["old"].id, listed["other part"].id}


def test_the_newer_of_two_processings_of_one_baseline(archive):
    """By when it was made, not by its name."""
    grid, when = grid_at(LEFT, TOP, 60, 60), "2020-07-05T10:00:00"
    older, newer = (
        archive.scene(when, grid, {"B04": 1, "B11": 1}, baseline="05.00", processed=p)
        for p in ("20230101T000000", "20230601T000000")
    )
    older.id, newer.id = "z", "a"
    assert (
        [s.id for s in scenes.deduplicate([newer, older])]
        == [s.id for s in scenes.deduplicate([older, newer])]
        == ["a"]
    )


def test_selection_by_recipe_says_what_to_widen(archive):
    grid = grid_at(LEFT, TOP, 60, 60)
    winter = archive.scene("2020-01-05T10:00:00", grid, {"B04": 1, "B11": 1})
    cloudy = archive.scene(
        "2020-07-05T10:00:00", grid, {"B04": 1, "B11": 1}, **{"eo:cloud_cover": 95.0}
    )
    recipe = dataclasses.replace(load_recipes()["annual-median"], min_dates=1)
    with pytest.raises(
        SceneError,
        match=r"none of 2 scenes, and needs 1 dates: 1 are in months .* at most 90 % cloudy; widen",
    ):
        scenes.select([winter, cloudy], recipe)
    fine = archive.scene("2020-07-08T10:00:00", grid, {"B04": 1, "B11": 1})
    assert [s.id for s in scenes.select([winter, cloudy, fine], recipe)] == [fine.id]


@pytest.mark.parametrize("value", [float("nan"), None, -1.0, 101.0])
def test_scenes_of_unknown_cloud_cover_are_used_and_counted_in_no_mean(archive, tmp_path, value):
    grid, site = grid_at(LEFT, TOP, 60, 60), site_of("s", LEFT, TOP, 60, 60)
    days = {"2020-07-05": 20.0, "2020-07-08": value, "2020-07-11": 40.0, "2020-07-14": value}
    items = [
        archive.item(f"{day}T10:00:00", grid, {"B04": 1, "B11": 1}, **{"eo:cloud_cover": cloud})
        for day, cloud in days.items()
    ]
    listed = [i.to_dict(transform_hrefs=False) for i in items]
    stac_geoparquet.arrow.to_parquet(
        stac_geoparquet.arrow.parse_stac_items_to_arrow(listed), archive.source.href
    )
    found = scenes.search(site, 2020, archive.source)
    assert len(scenes.select(found.scenes, dataclasses.replace(PLAIN, min_dates=4))) == 4
    assert scenes.mean_cloud_cover(found.scenes) == 30.0
    assert np.isnan(scenes.mean_cloud_cover(found.scenes[1::2]))
    snapshot.save(found, tmp_path / "list.parquet")
    assert [s.to_dict() for s in snapshot.load(tmp_path / "list.parquet").scenes] == [
        s.to_dict() for s in found.scenes
    ]
