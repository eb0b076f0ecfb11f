"""Items of every provider become scenes with the right offset, once each, or are refused with the reason."""

from __future__ import annotations

import copy
import dataclasses
import decimal
import hashlib
import itertools
import json
import re
import subprocess
import sys
import threading
import time
import warnings
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyproj
import pystac
import pytest
import shapely
import shapely.affinity
import stac_geoparquet.arrow
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from known_scenes import grid_at, serve, site_of, unique_pixels, write_tif
from minecube import cube, network, scenes
from minecube.catalog import (
    Access,
    Offset,
    Recipe,
    Site,
    Source,
    as_dict,
    load_recipes,
    load_sources,
)
from minecube.errors import CatalogError, ReadError, SceneError
from minecube.grid import grid_of
from minecube.jobs import build as building
from minecube.jobs.scene_lists import path_of_list
from minecube.reader import remote
from minecube.scenes import api as stac_api
from minecube.scenes import item_file, parquet, site_year, snapshot
from minecube.scenes.footprints import lies_over

LEFT, TOP = 360000, 5600040
PLAIN = Recipe(id="r", title="t", bands=("B04", "B11"), block_px=64, chunk_px=32)
FOLDERS = {
    "earthsearch_l2a": "earth-search",
    "earthsearch_c1": "earth-search-c1",
    "planetary_computer": "planetary-computer",
    "cdse": "cdse",
}
# What the pixels still carry, by what ESA and the providers document: the offset exists from baseline 04.00 on; Earth Search
# l2a has removed it where its flag is true; c1, Planetary Computer and CDSE have not.
OFFSETS = {
    "S2A_29RKH_20200219_0_L2A": 0,
    "S2A_32TMT_20200302_0_L2A": 0,
    "S2A_32TMT_20200302_1_L2A": 0,
    "S2A_32TMT_20200305_0_L2A": 0,
    "S2A_32TMT_20200305_1_L2A": 0,
    "S2B_24MUA_20250731_0_L2A": 0,
    "S2A_T13TDE_20240402T174230_L2A": -1000,
    "S2B_T13TDE_20240331T175111_L2A": -1000,
    "S2B_T24MUA_20250731T130245_L2A": -1000,
    "S2A_MSIL2A_20150704T101006_R022_T35XQA_20210411T133707": 0,
    "S2A_MSIL2A_20200601T080611_R078_T35MNM_20201027T072253": 0,
    "S2A_MSIL2A_20230216T145731_R082_T21UYT_20230217T083102": -1000,
    "S2A_MSIL2A_20240823T174901_R141_T13TDE_20240824T013055": -1000,
    "S2B_MSIL2A_20200606T080609_R078_T35MNM_20200826T094900": 0,
    "S2B_MSIL2A_20200705T101559_R065_T32TMT_20200825T083452": 0,
    "S2A_MSIL2A_20200301T090901_N0500_R050_T35UPU_20230630T033416": -1000,
    "S2A_MSIL2A_20241107T113311_N0511_R080_T32VKR_20241107T123948": -1000,
    "S2B_MSIL2A_20200705T101559_N0500_R065_T32TMT_20230530T175912": -1000,
}


@pytest.fixture(scope="session")
def real(real_data):
    """(raw item, source) of every real item, by id."""
    sources = load_sources()
    return {
        item.id: (item, sources[source])
        for folder, source in FOLDERS.items()
        for path in sorted((real_data / "stac_items" / folder).glob("*.json"))
        for item in [pystac.Item.from_dict(json.loads(path.read_text()), migrate=False)]
    }


def test_every_real_item_gets_its_offset(real):
    got = {
        name: scenes.normalise(*pair).properties["minecube:offset"] for name, pair in real.items()
    }
    assert {k: got[k] for k in OFFSETS if k in got} == OFFSETS


def test_real_items_after_pystac_migrated_them(real):
    """pystac >= 1.12 turns proj:epsg into proj:code; both must do."""
    for name, (item, source) in real.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it cannot migrate is not of interest here
            migrated = pystac.Item.from_dict(
                item.to_dict(include_self_link=False, transform_hrefs=False)
            )
        old, new = scenes.normalise(item, source), scenes.normalise(migrated, source)
        assert new.properties == old.properties, name


def test_real_items_in_the_projects_terms(real):
    scene = scenes.normalise(*real["S2B_MSIL2A_20200705T101559_N0500_R065_T32TMT_20230530T175912"])
    assert scene.properties["proj:code"] == "EPSG:32632"
    assert scene.properties["s2:mgrs_tile"] == "32TMT"
    assert scene.properties["minecube:solar_day"] == "2020-07-05"
    assert (scene.properties["minecube:datatake"], scene.properties["minecube:granule_start"]) == (
        "S2B_20200705T101559",
        "20200705T101917",
    )
    assert {b: a.extra_fields["gsd"] for b, a in scene.assets.items()} == {
        b: 10 if b in ("B02", "B03", "B04", "B08") else 20 for b in scene.assets
    }
    assert scene.assets["B04"].href.endswith("T32TMT_20200705T101559_B04_10m.jp2")


def test_the_rule_agrees_with_product_metadata(real_data):
    """Where BOA_ADD_OFFSET really stands: the product's own XML."""
    for path in sorted((real_data / "safe_metadata").glob("*/MTD_MSIL2A.xml")):
        root = ET.parse(path).getroot()
        baseline = next(e.text for e in root.iter("PROCESSING_BASELINE"))
        stated = {int(e.text) for e in root.iter("BOA_ADD_OFFSET")} or {0}
        rule = load_sources()["cdse"].offset
        assert stated == {rule.value if baseline >= rule.from_baseline else 0}, path


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


def refused(change, item, source):
    content = copy.deepcopy(item.to_dict(include_self_link=False, transform_hrefs=False))
    change(content)
    with pytest.raises(SceneError) as caught:
        scenes.normalise(pystac.Item.from_dict(content, migrate=False), source)
    return str(caught.value)


def test_unusable_items_are_refused_by_name(real):
    name = "S2A_32TMT_20200302_1_L2A"
    item, source = real[name]

    def without(*keys):
        return lambda content: [content["properties"].pop(k) for k in keys]

    def no_geometry(content):
        content["geometry"] = None
        content.pop("bbox")

    reasons = {
        "no geometry": refused(no_geometry, item, source),
        "no asset 'nir'": refused(lambda c: c["assets"].pop("nir"), item, source),
        "names no processing baseline": refused(
            without("s2:processing_baseline", "s2:product_uri"), item, source
        ),
        "names no acquisition": refused(without("s2:datastrip_id"), item, source),
        "expected one projection": refused(
            lambda c: c["properties"].update({"proj:epsg": 32633}), item, source
        ),
        "names no MGRS tile": refused(
            without(
                "grid:code",
                "mgrs:utm_zone",
                "mgrs:latitude_band",
                "mgrs:grid_square",
                "s2:product_uri",
            ),
            item,
            source,
        ),
    }
    for reason, said in reasons.items():
        assert reason in said
        assert name in said


def test_epsg_none_falls_back_to_the_assets(real):
    item, source = real["S2B_MSIL2A_20200705T101559_N0500_R065_T32TMT_20230530T175912"]
    changed = item.clone()
    changed.properties["proj:code"] = "EPSG:None"
    assert scenes.normalise(changed, source).properties["proj:code"] == "EPSG:32632"


def changed(item, change):
    content = copy.deepcopy(item.to_dict(include_self_link=False, transform_hrefs=False))
    change(content)
    return pystac.Item.from_dict(content, migrate=False)


def test_ways_to_say_a_projection(real):
    """Code, number, WKT or PROJJSON, of the item or its assets; all say the same, and the tile does too."""
    item, source = real["S2A_32TMT_20200302_1_L2A"]
    crs = pyproj.CRS.from_epsg(32632)

    def of_item(**fields):
        def change(content):
            content["properties"].pop("proj:epsg")
            content["properties"] |= {f"proj:{k}": v for k, v in fields.items()}

        return change

    def of_assets(**fields):
        def change(content):
            content["properties"].pop("proj:epsg")
            for asset in content["assets"].values():
                asset |= {f"proj:{k}": v for k, v in fields.items()}

        return change

    ways = [
        of_item(code="EPSG:32632"),
        of_item(wkt2=crs.to_wkt()),
        of_item(projjson=crs.to_json_dict()),
        of_item(code="EPSG:None", epsg=None, wkt2=crs.to_wkt()),
        of_item(),  # its tile says it
        of_assets(code="EPSG:32632"),
        of_assets(epsg=32632),
        of_assets(wkt2=crs.to_wkt()),
        of_assets(projjson=crs.to_json_dict(), code=None),
    ]
    expected = scenes.normalise(item, source).properties
    for way in ways:
        assert scenes.normalise(changed(item, way), source).properties == expected
    other = pyproj.CRS.from_epsg(32633)
    for way in (
        of_item(code="EPSG:32633"),
        of_item(wkt2=other.to_wkt()),
        of_assets(projjson=other.to_json_dict()),
    ):
        assert "expected one projection, EPSG:32632 of its tile 32TMT, found EPSG:32633" in refused(
            way, item, source
        )


def test_bands_under_the_keys_in_common_use(real):
    """A source of the user's own that names no asset: every provider's keys are found, at the band's own pixel size."""
    bare = Source(id="own", title="t", kind="stac-api", href="http://x", collection="c")
    for name, (item, source) in real.items():
        expected = scenes.normalise(item, source)
        got = scenes.normalise(item, bare)
        assert {b: a.href for b, a in got.assets.items()} == {
            b: a.href for b, a in expected.assets.items()
        }, name
        assert [a.extra_fields for a in got.assets.values()] == [
            a.extra_fields for a in expected.assets.values()
        ]


def test_pixel_sizes_of_stac_1_1(real):
    item, source = real["S2B_MSIL2A_20200705T101559_N0500_R065_T32TMT_20230530T175912"]

    def without_transform(content):
        for key, asset in content["assets"].items():
            asset.pop("proj:transform", None)
            asset.pop("gsd", None)
            if key == "B05_20m":
                asset["raster:spatial_resolution"] = 20
            if key == "B11_20m":
                asset["bands"] = [{"name": "B11", "gsd": 20}]

    scene = scenes.normalise(changed(item, without_transform), source)
    sizes = {b: a.extra_fields["gsd"] for b, a in scene.assets.items()}
    assert sizes == {b: 10 if b in ("B02", "B03", "B04", "B08") else 20 for b in sizes}


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


def test_the_antimeridian(archive):
    """A tile across it: found by sites on both sides, by none half a world away, and of one day."""
    grid = grid_at(624000, 7500000, 600, 600, 32660)  # around 180 degrees at 67 north
    item = archive.item("2020-07-05T23:50:00", grid, {"B04": 1, "B11": 1}, tile="60WWV")
    west, south, east, north = item.bbox
    assert (west, east) == (-180, 180) or east - west > 300  # as naive software has it
    scene = scenes.normalise(item, archive.source)
    assert scene.geometry["type"] == "MultiPolygon"
    assert shapely.geometry.shape(scene.geometry).area < 0.2
    for x, hit in ((179.98, True), (-179.98, True), (0.0, False), (100.0, False)):
        area = shapely.box(x - 0.005, (south + north) / 2, x + 0.005, (south + north) / 2 + 0.005)
        assert lies_over(scene, area) is hit, x
    assert scene.properties["minecube:solar_day"] == "2020-07-06"
    # A footprint that is cut already stays as it is.
    assert scenes.normalise(
        pystac.Item.from_dict(scene.to_dict() | {"properties": item.to_dict()["properties"]}),
        archive.source,
    )


def test_what_is_refused_is_kept_with_the_reason(archive, tmp_path):
    grid, site = grid_at(LEFT, TOP, 60, 60), site_of("s", LEFT, TOP, 60, 60)
    fine = archive.item("2020-07-05T10:00:00", grid, {"B04": 1, "B11": 1})
    older = archive.item(
        "2020-07-05T10:00:00",
        grid,
        {"B04": 1, "B11": 1},
        baseline="02.12",
        processed="20200101T000000",
    )
    nameless = archive.item(
        "2020-07-08T10:00:00", grid, {"B04": 1, "B11": 1}, **{"s2:datastrip_id": ""}
    )
    items = [i.to_dict(transform_hrefs=False) for i in (fine, older, nameless)]
    stac_geoparquet.arrow.to_parquet(
        stac_geoparquet.arrow.parse_stac_items_to_arrow(items), archive.source.href
    )
    found = scenes.search(site, 2020, archive.source)
    assert ([s.id for s in found.scenes], found.listed, found.copies) == ([fine.id], 3, 1)
    assert list(found.refused) == [nameless.id]
    assert "names no acquisition" in found.refused[nameless.id]


def test_a_list_is_of_its_place_and_its_sources_rules(archive, tmp_path):
    """Offsets and hrefs were decided when it was made: by a rule that has been corrected since it would be built wrong."""
    scene = archive.scene("2020-07-05T10:00:00", grid_at(LEFT, TOP, 60, 60), {"B04": 1, "B11": 1})
    here, path, source = site_of("s", LEFT, TOP, 60, 60), tmp_path / "s.parquet", archive.source
    snapshot.save(
        scenes.SearchResult(scenes=(scene,)), path, snapshot.hash_search(here, 2020, [source])
    )
    moved = dataclasses.replace(source, href="elsewhere.parquet", title="x", searches_per_s=1)
    assert snapshot.load(path, snapshot.hash_search(here, 2020, [moved])).scenes
    for site, year, sources in (
        (site_of("s", LEFT, TOP, 54, 60), 2020, [source]),
        (site_of("t", LEFT, TOP, 60, 60), 2020, [source]),
        (here, 2021, [source]),
        (here, 2020, [source, dataclasses.replace(source, id="more")]),
        (here, 2020, [dataclasses.replace(source, offset=Offset(value=0))]),
        (here, 2020, [dataclasses.replace(source, resolution_m={"B04": 20})]),
    ):
        with pytest.raises(
            SceneError, match="holds the scenes of another place, or of another rule"
        ):
            snapshot.load(path, snapshot.hash_search(site, year, sources))


def test_a_list_of_another_version_is_refused(real, tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "FORMAT", 0)
    snapshot.save(
        scenes.SearchResult(scenes=(scenes.normalise(*real["S2A_29RKH_20200219_0_L2A"]),)),
        tmp_path / "x.parquet",
    )
    monkeypatch.undo()
    with pytest.raises(
        SceneError, match=r"x\.parquet: was saved by another version of minecube; search again"
    ):
        snapshot.load(tmp_path / "x.parquet")


def test_signatures_of_hrefs_are_not_kept(archive):
    item = archive.item("2020-07-05T10:00:00", grid_at(LEFT, TOP, 60, 60), {"B04": 1, "B11": 1})
    for asked, kept in (
        ("https://x/a.tif?sv=1&sig=LEAKED&se=2", "https://x/a.tif"),
        (
            "https://x/a.tif?version=7&X-Amz-Signature=LEAKED&X-Amz-Security-Token=t",
            "https://x/a.tif?version=7",
        ),
        ("https://x/a b+c.tif", "https://x/a b+c.tif"),
    ):
        item.assets["B04"].href = asked
        assert scenes.normalise(item, archive.source).assets["B04"].href == kept


def test_what_contradicts_itself_or_is_spelled_otherwise(real):
    item, source = real["S2A_32TMT_20200302_1_L2A"]
    expected = scenes.normalise(item, source).properties

    def with_properties(**fields):
        return lambda content: content["properties"].update(
            {k.replace("__", ":"): v for k, v in fields.items()}
        )

    assert "says baseline 02.14, and its product's name N0500" in refused(
        with_properties(s2__processing_baseline="02.14"), item, source
    )
    for fields in (
        {"proj__epsg": 32632.0},
        {"proj__epsg": float("nan")},
        {"proj__code": "urn:ogc:def:crs:EPSG::32632", "proj__epsg": None},
        {"grid__code": "MGRS-32tmt"},
        {"s2__mgrs_tile": "T32TMT"},
    ):
        assert (
            scenes.normalise(changed(item, with_properties(**fields)), source).properties
            == expected
        ), fields
    interval = changed(
        item,
        with_properties(
            datetime=None,
            start_datetime="2020-03-02T10:27:44.564000Z",
            end_datetime="2020-03-02T10:28:00Z",
        ),
    )
    assert scenes.normalise(interval, source).properties == expected
    empty = changed(
        item, lambda content: content.update(geometry={"type": "Polygon", "coordinates": []})
    )
    with pytest.raises(SceneError, match="has no geometry"):
        scenes.normalise(empty, source)


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


def test_a_snapshot_that_was_changed_is_refused(real, tmp_path):
    scene = scenes.normalise(*real["S2A_29RKH_20200219_0_L2A"])
    path = tmp_path / "snapshot.parquet"
    snapshot.save(scenes.SearchResult(scenes=(scene,)), path)
    table = pq.read_table(path)
    at = table.column_names.index("minecube:offset")
    pq.write_table(table.set_column(at, "minecube:offset", pa.array([-1000])), path)
    with pytest.raises(SceneError, match="have changed since they were saved"):
        snapshot.load(path)


def test_a_snapshot_gives_back_what_was_saved(real, tmp_path):
    listed = sorted(
        (scenes.normalise(*pair) for pair in real.values()), key=lambda s: (s.datetime, s.id)
    )
    found = scenes.SearchResult(scenes=tuple(listed), listed=99, refused={"some": "why"})
    snapshot.save(found, tmp_path / "snapshot.parquet")
    back = snapshot.load(tmp_path / "snapshot.parquet")
    assert [s.to_dict() for s in back.scenes] == [s.to_dict() for s in listed]
    assert (back.listed, back.refused, back.copies) == (99, {"some": "why"}, 99 - 1 - len(listed))
    assert not list(tmp_path.glob("*.part"))


def test_a_list_of_another_place_year_or_source_is_refused(archive):
    """It would be committed as a year of zeros."""
    scene = archive.scene("2020-07-05T10:00:00", grid_at(LEFT, TOP, 60, 60), {"B04": 1, "B11": 1})
    here, there = site_of("s", LEFT, TOP, 60, 60), site_of("s", LEFT + 50000, TOP, 60, 60)
    scenes.check_saved_scenes([scene], here, 2020, [archive.source])
    other = dataclasses.replace(archive.source, id="other")
    for site, year, source, said in (
        (there, 2020, archive.source, "elsewhere"),
        (here, 2022, archive.source, "of 2020"),
        (here, 2020, other, "from test"),
    ):
        with pytest.raises(SceneError, match=f"holds scenes {said}"):
            scenes.check_saved_scenes([scene], site, year, [source])


def test_spellings_of_baselines(archive):
    item = archive.item("2020-07-05T10:00:00", grid_at(LEFT, TOP, 60, 60), {"B04": 1, "B11": 1})
    item.properties["s2:product_uri"] = ""
    item.id = "a name that tells nothing"
    for said, offset in (("4.0", -1000), ("05.00", -1000), ("3.01", 0), ("02.14", 0)):
        item.properties["s2:processing_baseline"] = said
        assert scenes.normalise(item, archive.source).properties["minecube:offset"] == offset


def test_a_file_that_is_no_snapshot(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 this is not it")
    with pytest.raises(SceneError, match=r"x\.parquet: cannot be read as stac-geoparquet"):
        snapshot.load(tmp_path / "x.parquet")


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


def test_solar_day_is_local(archive):
    """23:50 UTC over eastern Siberia is already the next day there."""
    item = archive.item(
        "2020-07-05T23:50:00",
        grid_at(500000, 7000020, 60, 60, 32658),
        {"B04": 1, "B11": 1},
        tile="58VEP",
    )
    assert scenes.normalise(item, archive.source).properties["minecube:solar_day"] == "2020-07-06"


@pytest.fixture
def served(tmp_path):
    """URL under which `tmp_path` is served with byte ranges."""
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("range_server.py")), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
    server.terminate()
    server.communicate()


def test_a_remote_file_of_items_and_its_images(archive, tmp_path, served):
    """The index over HTTP, hrefs relative to it, pixels by range requests."""
    grid = grid_at(LEFT, TOP, 60, 60)
    item = archive.item("2020-07-05T10:00:00", grid, {"B04": unique_pixels(60, 60), "B11": 7})
    for asset in item.assets.values():
        asset.href = str(Path(asset.href).relative_to(tmp_path))
    table = stac_geoparquet.arrow.parse_stac_items_to_arrow([item.to_dict(transform_hrefs=False)])
    stac_geoparquet.arrow.to_parquet(table, tmp_path / "items.parquet")
    source = dataclasses.replace(archive.source, href=f"{served}/items.parquet")
    (scene,) = scenes.search(site_of("s", LEFT, TOP, 60, 60), 2020, source).scenes
    assert scene.assets["B04"].href.startswith(served)
    np.testing.assert_array_equal(
        scenes.stack([scene], grid, ["B04"]).values[0, 0], unique_pixels(60, 60)
    )
    with pytest.raises(SceneError, match="cannot be read as stac-geoparquet"):
        scenes.search(
            site_of("s", LEFT, TOP, 60, 60),
            2020,
            dataclasses.replace(source, href=f"{served}/none.parquet"),
        )


# A STAC API on loopback


class Api:
    """Answers POST /search from a list of items, ten a page; can misbehave."""

    def __init__(self, items):
        self.items, self.posts, self.fail_first, self.retry_after = items, 0, 0, ""
        self.lose = self.html = self.old = self.hang = False
        self.next_href, self.moved_to = None, ""
        self.search_href = ""
        api = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def answer(self, content, status=200, kind="application/geo+json", retry_after=""):
                body = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                if retry_after:
                    self.send_header("Retry-After", retry_after)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self):
                if api.moved_to:
                    self.send_response(302)
                    self.send_header("Location", api.moved_to)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                if api.html:
                    self.answer(b"<html>maintenance</html>", kind="text/html")
                    return
                self.answer(
                    {
                        "type": "Catalog",
                        "id": "test",
                        "stac_version": "1.0.0",
                        "description": "test",
                        "conformsTo": [
                            "https://api.stacspec.org/v1.0.0/core",
                            "https://api.stacspec.org/v1.0.0/item-search",
                        ],
                        "links": [
                            {"rel": "self", "href": api.url},
                            {"rel": "root", "href": api.url},
                            {
                                "rel": "search",
                                "href": api.search_href or f"{api.url}/search",
                                "method": "POST",
                                "type": "application/geo+json",
                            },
                        ],
                    }
                )

            def do_POST(self):
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                api.posts += 1
                if api.hang:
                    time.sleep(2)
                if api.posts <= api.fail_first:
                    self.answer(
                        {"code": "busy"},
                        status=429 if api.retry_after else 503,
                        retry_after=api.retry_after,
                    )
                    return
                first, last = asked["datetime"].split("/")
                match = [i for i in api.items if first <= i["properties"]["datetime"] <= last]
                at = asked.get("token", 0)
                page = match[at : at + 10]
                links = []
                if at + 10 < len(match):
                    body = {**asked, "token": at + 10}
                    href = api.next_href or f"{api.url}/search"
                    links = [{"rel": "next", "href": href, "method": "POST", "body": body}]
                # A page that repeats an item of the last one, as the recorded searches do.
                again = match[at - 1 : at] if at else []
                shown = page[:-1] if api.lose and not links else [*again, *page]
                told = (
                    {"context": {"matched": len(match)}}
                    if api.old
                    else {"numberMatched": len(match)}
                )
                self.answer(
                    {"type": "FeatureCollection", "features": shown, "links": links, **told}
                )

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def api(real_data):
    recorded = [
        json.loads(p.read_text())
        for p in sorted((real_data / "stac_items" / "search_pages").glob("*.json"))
    ]
    items = [f for page in recorded for f in page["response"]["features"]]
    served = Api(items)
    yield served
    served.close()


@pytest.fixture
def searched(api):
    """A site in the recorded search's box, and Earth Search moved to loopback."""
    source = dataclasses.replace(load_sources()["earth-search"], href=api.url)
    return Site(
        id="Allgaeu", geometry=site_of("x", 600000, 5280000, 400, 400, 32632).geometry
    ), source


def test_the_recorded_search(api, searched):
    site, source = searched
    found = scenes.search(site, 2020, source).scenes
    assert len(api.items) == 16
    # By hand from the recorded pages: the site lies in 32TNT alone, which the overpass of 5 March misses there; of the two
    # copies of 2 March the one of baseline 05.00 is left.
    assert [s.id for s in found] == ["S2A_32TNT_20200302_1_L2A"]
    assert found[0].properties["s2:processing_baseline"] == "05.00"


def test_a_busy_api_is_asked_again(api, searched):
    api.fail_first = 2
    assert scenes.search(searched[0], 2020, searched[1])
    assert api.posts >= 14


@pytest.mark.parametrize("old", [False, True], ids=["numberMatched", "context"])
def test_lost_items_are_not_passed_over(api, searched, old):
    api.lose, api.old = True, old
    with pytest.raises(
        SceneError, match="expected 16 items of 2020-03, as it counts them, found 15 in its pages"
    ):
        scenes.search(searched[0], 2020, searched[1])


def test_a_source_is_not_asked_for_months_it_does_not_have(api, searched):
    site, source = searched
    assert scenes.search(site, 2020, dataclasses.replace(source, since="2020-03")).scenes
    assert api.posts == 11  # ten months, one of them of two pages
    with pytest.raises(SceneError, match="no scene of 2020"):
        scenes.search(site, 2020, dataclasses.replace(source, since="2020-04"))


def test_requests_keep_the_pace(api, searched):
    site, source = searched
    start = time.monotonic()
    scenes.search(site, 2020, dataclasses.replace(source, searches_per_s=20))
    assert time.monotonic() - start >= 12 / 20


def test_an_api_that_says_when_to_come_back(api, searched):
    api.fail_first, api.retry_after, start = 1, "1", time.monotonic()
    assert scenes.search(searched[0], 2020, searched[1]).scenes
    assert time.monotonic() - start >= 1


@pytest.mark.parametrize("href", ["/search", "search", "?page=2"])
def test_next_links_may_be_relative(api, searched, href):
    """To the page that they stand on."""
    api.next_href = href
    expected = [s.id for s in scenes.search(*searched_as(searched)).scenes]
    assert expected == ["S2A_32TNT_20200302_1_L2A"]


def searched_as(searched):
    return searched[0], 2020, searched[1]


@pytest.mark.parametrize(
    ("href", "said"),
    [
        (
            "http://localhost:1/search",
            "localhost; links and redirects of an API must stay on its host",
        ),
        ("//files.example.org/search", r"files\.example\.org; links and redirects"),
        ("file:///data/items.json", "expected an http"),
        ("http://169.254.169.254/latest", "which is not public"),
    ],
)
def test_next_links_and_redirects_stay_on_the_host(api, searched, href, said):
    api.next_href = href
    with pytest.raises(SceneError, match=said):
        scenes.search(*searched_as(searched))
    api.next_href, api.moved_to = None, href
    with pytest.raises(SceneError, match=said):
        scenes.search(*searched_as(searched))


@pytest.mark.parametrize(
    "href", ["file:///data/items.json", "file:items.json", "ftp://127.0.0.1/search"]
)
def test_a_search_link_leads_to_the_web(api, searched, href):
    """The client would open a local file of this name."""
    api.search_href = href
    with pytest.raises(SceneError, match=r"the search for 2020 failed \(expected an http"):
        scenes.search(*searched_as(searched))


def test_pages_without_end_are_given_up(api, searched, monkeypatch):
    monkeypatch.setattr(stac_api, "_PAGES", 1)
    with pytest.raises(SceneError, match="expected at most 1 pages of 2020-03, found more"):
        scenes.search(*searched_as(searched))


def test_an_answer_that_is_too_long_is_given_up(api, searched, monkeypatch):
    monkeypatch.setattr(stac_api, "_PAGE_BYTES", 5000)
    with pytest.raises(SceneError, match="expected an answer of at most 5,000 bytes"):
        scenes.search(*searched_as(searched))


def test_a_file_of_too_many_items_is_not_read(archive, monkeypatch):
    item = archive.item("2020-07-05T10:00:00", grid_at(LEFT, TOP, 60, 60), {"B04": 1, "B11": 1})
    table = stac_geoparquet.arrow.parse_stac_items_to_arrow([item.to_dict(transform_hrefs=False)])
    stac_geoparquet.arrow.to_parquet(table, archive.source.href)
    site = site_of("s", LEFT, TOP, 60, 60)
    assert scenes.search(site, 2020, archive.source).scenes
    item_file._cache.clear()
    for limit, value in (("_MOST_ITEMS", 0), ("MOST_BYTES", 100)):
        with monkeypatch.context() as patched:
            patched.setattr(parquet, limit, value)
            patched.setattr(pq.ParquetFile, "iter_batches", lambda *_: pytest.fail("it was read"))
            with pytest.raises(
                SceneError, match="cannot be read as stac-geoparquet \\(expected at most"
            ):
                scenes.search(site, 2020, archive.source)


def test_a_file_is_measured_as_it_is_unpacked(tmp_path, monkeypatch):
    """A text of 10,000 letters in 5,000 rows: 50 MB unpacked, of which the file stores one copy."""
    monkeypatch.setattr(parquet, "MOST_BYTES", 5_000_000)
    path = tmp_path / "items.parquet"
    pq.write_table(pa.table({"id": ["x" * 10_000] * 5000}), path)
    about = pq.read_metadata(path)
    assert sum(about.row_group(n).total_byte_size for n in range(about.num_row_groups)) < 100_000
    before = pa.total_allocated_bytes()
    most = []
    batches = pq.ParquetFile.iter_batches

    def counted(file, rows):
        for batch in batches(file, rows):
            most.append(pa.total_allocated_bytes() - before)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    with pytest.raises(
        SceneError,
        match=r"expected at most 1,000,000 items and 5,000,000 bytes, found 5,000 and \d",
    ):
        item_file.read_items(path)
    assert max(most) < 15_000_000


def test_a_month_has_a_limit_of_bytes(api, searched, monkeypatch):
    """The recorded month has two pages, and each month has a limit of its own."""
    answers = []
    bounded = stac_api._read_body
    monkeypatch.setattr(
        stac_api, "_read_body", lambda *args: answers.append(bounded(*args)) or answers[-1]
    )
    found = scenes.search(*searched_as(searched)).scenes
    sizes = [len(answer) for answer in answers]
    two = sum(sorted(sizes)[-2:])  # the only month with items
    assert two < sum(sizes)
    network.forget_unreachable()
    monkeypatch.setattr(stac_api, "_MONTH_BYTES", two)
    assert [s.id for s in scenes.search(*searched_as(searched)).scenes] == [s.id for s in found]
    monkeypatch.setattr(stac_api, "_MONTH_BYTES", two - 1)
    with pytest.raises(
        SceneError, match=f"expected at most {two - 1:,} bytes of one month, found more"
    ):
        scenes.search(*searched_as(searched))


def test_an_api_that_is_not_there_is_tried_once_a_run(searched, clock, caplog, capfd):
    """Not once a site-year; and no library's own lines are shown."""
    network.forget_unreachable()
    dead, spent = dataclasses.replace(searched[1], href="http://127.0.0.1:1/v1"), []
    for year in (2019, 2020, 2021):
        start = clock.now
        with pytest.raises(
            SceneError,
            match=r"failed \(127\.0\.0\.1:1 cannot be reached \(Connection refused\): check the",
        ):
            scenes.search(searched[0], year, dead)
        spent.append(clock.now - start)
    network.forget_unreachable()
    assert network.REFUSED_S / 2 < spent[0] <= network.REFUSED_S
    assert max(spent[1:]) < 1  # the pace of searches
    assert not [
        r
        for r in caplog.records
        if r.name.startswith(("urllib3", "pystac_client")) and r.levelname != "DEBUG"
    ]
    assert capfd.readouterr().err == ""


def test_an_api_that_hangs_is_given_up(api, searched, monkeypatch):
    monkeypatch.setattr(stac_api, "_READ_S", 0.3)
    api.hang, start = True, time.monotonic()
    with pytest.raises(
        SceneError,
        match=r"127\.0\.0\.1 accepted the connection, but sent nothing for 0 s: try again later",
    ):
        scenes.search(*searched_as(searched))
    network.forget_unreachable()
    assert time.monotonic() - start < 5
    assert api.posts == 2


# Files that a catalogue must not name

SECRET = 4321


@pytest.fixture
def listed(archive, tmp_path, served):
    """A file of items on a server that names a local file, and the site and source; `at` makes it name another."""
    grid = grid_at(LEFT, TOP, 60, 60)
    local = write_tif(tmp_path / "private" / "B04.tif", np.full((60, 60), SECRET, np.uint16), grid)
    item = archive.item("2020-07-05T10:00:00", grid, {"B04": 1, "B11": 1})
    for asset in item.assets.values():
        asset.href = str(Path(asset.href).relative_to(tmp_path))

    def at(href):
        item.assets["B04"].href = href
        table = stac_geoparquet.arrow.parse_stac_items_to_arrow(
            [item.to_dict(transform_hrefs=False)]
        )
        stac_geoparquet.arrow.to_parquet(table, tmp_path / "items.parquet")
        return dataclasses.replace(archive.source, href=f"{served}/items.parquet"), item

    return at, local, site_of("s", LEFT, TOP, 60, 60)


@pytest.mark.parametrize(
    "form", ["{}", "file://{}", "FILE://{}", "/vsicurl/file://{}", "GTIFF_DIR:1:{}"]
)
def test_a_remote_catalogue_names_no_local_file(listed, form, tmp_path):
    at, local, site = listed
    source, item = at(form.format(local))
    with pytest.raises(
        SceneError, match=f"item {item.id}: asset B04 is not read from .*; it is refused"
    ):
        scenes.search(site, 2020, source)
    store = str(tmp_path / "cubes.zarr")
    job = building.BuildJob(
        store=cube.Store(store), sources=(source,), recipe=PLAIN, snapshots=tmp_path / "lists"
    )
    with pytest.raises(SceneError, match=item.id):
        building.build_cubes(job, [site], [2020])
    assert not Path(store).exists()


def test_a_saved_list_names_no_local_file(listed, tmp_path):
    """Made by somebody else, with the right hash, for the right site; its file is said to come from a local catalogue."""
    at, local, site = listed
    source, _ = at("archive/none.tif")
    (scene,) = scenes.search(site, 2020, source).scenes
    scene.assets["B04"].href = str(local)
    scene.properties["minecube:origin"] = ""
    job = building.BuildJob(
        store=cube.Store(tmp_path / "c.zarr"),
        sources=(source,),
        recipe=PLAIN,
        snapshots=tmp_path / "lists",
    )
    path = path_of_list(site, 2020, [source], job.snapshots)
    snapshot.save(
        scenes.SearchResult(scenes=(scene,), listed=1),
        path,
        snapshot.hash_search(site, 2020, [source]),
    )
    with pytest.raises(
        SceneError, match=f"item {scene.id}: asset B04 is not read from {local}: it is a local file"
    ):
        building.build_cubes(job, [site], [2020])
    assert not job.store.path.exists()


def test_a_saved_list_brings_no_access_of_its_own(archive):
    """Where tokens come from, and whom they are for, is what the source says."""
    scene = archive.scene("2020-07-05T10:00:00", grid_at(LEFT, TOP, 60, 60), {"B04": 1, "B11": 1})
    site = site_of("s", LEFT, TOP, 60, 60)
    fewer = dataclasses.replace(archive.source, access=Access(connections=3))
    scenes.check_saved_scenes([scene], site, 2020, [fewer])
    access = json.loads(scene.properties["minecube:access"])
    access |= {"kind": "s3", "href": "http://evil.example.org", "credentials_for": ["ours"]}
    scene.properties["minecube:access"] = json.dumps(access)
    with pytest.raises(
        SceneError,
        match=f"scene {scene.id}: expected the access rules of source test, found others",
    ):
        scenes.check_saved_scenes([scene], site, 2020, [archive.source])


@pytest.mark.parametrize("origin", ["", None, "127.0.0.1"])
def test_a_saved_list_names_no_origin_of_its_own(archive, origin):
    """A scene that claims a local or private catalogue would be allowed to reach private hosts."""
    site = site_of("s", LEFT, TOP, 60, 60)
    scene = archive.scene("2020-07-05T10:00:00", grid_at(LEFT, TOP, 60, 60), {"B04": 1, "B11": 1})
    scenes.check_saved_scenes([scene], site, 2020, [archive.source])
    source = dataclasses.replace(archive.source, href="https://stac.example.org/v1")
    for band in scene.assets:
        scene.assets[band].href = f"https://files.example.org/{band}.tif"
    scene.properties["minecube:origin"] = "stac.example.org"
    scenes.check_saved_scenes([scene], site, 2020, [source])
    scene.properties["minecube:origin"] = origin
    with pytest.raises(SceneError, match=r"expected a scene listed by stac\.example\.org"):
        scenes.check_saved_scenes([scene], site, 2020, [source])


def test_a_scene_without_origin_is_not_read(archive):
    grid = grid_at(LEFT, TOP, 60, 60)
    scene = archive.scene("2020-07-05T10:00:00", grid, {"B04": 1, "B11": 1})
    del scene.properties["minecube:origin"]
    with pytest.raises(
        ReadError, match="expected the host of its catalogue in minecube:origin, found None"
    ):
        scenes.stack([scene], grid, ["B04"])


def test_a_scene_that_was_changed_after_it_was_listed_is_checked_when_it_is_read(listed):
    at, local, site = listed
    source, _ = at("archive/none.tif")
    (scene,) = scenes.search(site, 2020, source).scenes
    for href in (
        str(local),
        f"file://{local}",
        f"/vsicurl/{local}",
        "http://169.254.169.254/latest",
    ):
        scene.assets["B04"].href = href
        with pytest.raises(ReadError, match=f"scene {scene.id}: B04 is not read from"):
            scenes.stack([scene], scenes.grid_of(site), ["B04"])


def test_an_image_of_another_format_is_refused_by_name_and_nothing_is_committed(listed, tmp_path):
    at, local, site = listed
    (tmp_path / "V.tif").write_text(
        f'<VRTDataset rasterXSize="60" rasterYSize="60"><VRTRasterBand dataType="UInt16" band="1"><SimpleSource>'
        f"<SourceFilename>{local}</SourceFilename><SourceBand>1</SourceBand></SimpleSource></VRTRasterBand></VRTDataset>"
    )
    source, _ = at("V.tif")
    job = building.BuildJob(
        store=cube.Store(tmp_path / "c.zarr"),
        sources=(source,),
        recipe=PLAIN,
        snapshots=tmp_path / "lists",
    )
    (outcome,) = building.build_cubes(job, [site], [2020])
    assert outcome.state == "failed"
    assert re.search(
        r"V\.tif: is not read \(expected a GeoTIFF or JPEG 2000 file, found another format\)",
        outcome.message,
    )
    assert not cube.read_markers(job.store, site.id)


def test_an_api_that_answers_html(api, searched):
    api.html = True
    with pytest.raises(SceneError, match="the search for 2020 failed"):
        scenes.search(searched[0], 2020, searched[1])


def test_an_empty_search_says_what_was_searched(api, searched):
    with pytest.raises(
        SceneError,
        match=r"no scene of 2021 over Allgaeu \(west.*sentinel-2-l2a at http.*0 listed, 0 refused; try",
    ):
        scenes.search(searched[0], 2021, searched[1])


@pytest.mark.parametrize("year", [2014, 2999])
def test_years_without_sentinel_2(searched, year):
    with pytest.raises(SceneError, match=f"year {year}: expected 2015"):
        scenes.search(searched[0], year, searched[1])


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


SQUARE = shapely.box(15.0, 51.44, 15.01, 51.45)
LINE = shapely.LineString([(14, 50), (16, 52)])
AREAS = {
    "polygon": SQUARE,
    "three dimensions": shapely.force_3d(SQUARE, 7.0),
    "multipolygon": shapely.MultiPolygon([SQUARE]),
    "collection": shapely.GeometryCollection([SQUARE, LINE]),
    "collection of collections": shapely.GeometryCollection(
        [shapely.GeometryCollection([shapely.MultiPolygon([SQUARE]), LINE])]
    ),
    "drawn twice": shapely.GeometryCollection([SQUARE, SQUARE]),
    "bow tie": shapely.Polygon([(15.0, 51.44), (15.01, 51.45), (15.01, 51.44), (15.0, 51.45)]),
}
NO_AREAS = {
    "null": None,
    "empty": shapely.Polygon(),
    "empty collection": shapely.GeometryCollection(),
    "point": shapely.Point(15.0, 51.44),
    "line": LINE,
    "collection of lines": shapely.GeometryCollection([LINE]),
    "metres": shapely.box(360000, 5600000, 361000, 5601000),
    "infinity": shapely.Polygon([(15.0, 51.44), (float("inf"), 51.45), (15.01, 51.44)]),
}


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


def test_rows_of_a_file_are_the_items_that_its_library_reads(tmp_path, archive):
    """Nulls and nested lists included; times of another zone, which the library labels as UTC, are told in UTC."""
    features = features_of(archive)
    features[0]["properties"] |= {
        "created": "2020-07-06T01:02:03.456789Z",
        "eo:cloud_cover": None,
        "s2:lists": [[1, 2], []],
    }
    features[1]["assets"].pop("B11")
    features[1]["properties"]["none"] = None
    write_features(features, tmp_path / "items.parquet")
    library = list(
        stac_geoparquet.arrow.stac_table_to_items(pq.read_table(tmp_path / "items.parquet"))
    )
    read = item_file.read_items(tmp_path / "items.parquet")
    for item, expected in zip(read, library, strict=True):
        found = item.to_dict(include_self_link=False, transform_hrefs=False)
        for name in ("id", "geometry", "assets"):
            assert found[name] == expected[name]
        times = {"datetime", "created"}
        assert {k: v for k, v in found["properties"].items() if k not in times} == {
            k: v for k, v in expected["properties"].items() if k not in times
        }
        assert item.datetime == pystac.utils.str_to_datetime(expected["properties"]["datetime"])
        assert found["properties"]["created"] == expected["properties"]["created"]
    assert read[0].properties["created"] == "2020-07-06T01:02:03.456789Z"
    assert sorted(read[1].assets) == ["B04", "SCL"]

    table = pq.read_table(tmp_path / "items.parquet")
    there = table.column("datetime").cast(pa.timestamp("us", tz="Europe/Berlin"))
    table = table.set_column(table.column_names.index("datetime"), "datetime", there)
    pq.write_table(table, tmp_path / "berlin.parquet")
    assert [i.datetime for i in item_file.read_items(tmp_path / "berlin.parquet")] == [
        i.datetime for i in read
    ]

    # One nanosecond more, as pandas writes times: microseconds are kept.
    finer = (np.asarray(there.to_numpy(), "datetime64[ns]") + np.timedelta64(1, "ns")).tolist()
    column = pa.array(finer, type=pa.timestamp("ns", tz="UTC"))
    table = table.set_column(table.column_names.index("datetime"), "datetime", column)
    pq.write_table(table, tmp_path / "ns.parquet")
    assert [i.datetime for i in item_file.read_items(tmp_path / "ns.parquet")] == [
        i.datetime for i in read
    ]


@pytest.mark.parametrize("kind", AREAS)
def test_footprints_of_every_type_that_has_an_area(archive, kind):
    """From a file and from an API; the area is that of the square, or of the two halves that a bow tie leaves."""
    features = features_of(archive)
    own = shapely.geometry.shape(features[0]["geometry"])
    moved = shapely.affinity.translate(
        AREAS[kind], own.centroid.x - 15.005, own.centroid.y - 51.445
    )
    write_features(features, archive.root / "items.parquet", [moved, own, own])
    found = scenes.search(site_of("s", LEFT, TOP, 60, 60), 2020, archive.source)
    assert (len(found.scenes), found.refused) == (3, {})
    in_json = pystac.Item.from_dict(
        features[0] | {"geometry": json.loads(json.dumps(shapely.geometry.mapping(moved)))}
    )
    for scene in (found.scenes[0], scenes.normalise(in_json, archive.source)):
        footprint = shapely.geometry.shape(scene.geometry)
        assert footprint.geom_type in ("Polygon", "MultiPolygon")
        assert not footprint.has_z
        assert footprint.area == pytest.approx(5e-5 if kind == "bow tie" else 1e-4)


@pytest.mark.parametrize("kind", NO_AREAS)
def test_a_footprint_without_area_refuses_its_item_by_name_and_no_other(archive, kind):
    features = features_of(archive)
    own = shapely.geometry.shape(features[0]["geometry"])
    write_features(features, archive.root / "items.parquet", [own, NO_AREAS[kind], own])
    found = scenes.search(site_of("s", LEFT, TOP, 60, 60), 2020, archive.source)
    assert [s.id for s in found.scenes] == [features[0]["id"], features[2]["id"]]
    assert list(found.refused) == [features[1]["id"]]
    assert (
        "has no geometry with an area: expected polygons in longitude and latitude"
        in found.refused[features[1]["id"]]
    )


MALFORMED = [
    {"type": "Polygon"},
    {"type": "Blob", "coordinates": []},
    {"type": "GeometryCollection", "geometries": [None]},
    {
        "type": "Polygon",
        "coordinates": [[[15.0, 51.44], [float("nan"), 51.45], [15.01, 51.44], [15.0, 51.44]]],
    },
    {
        "type": "Polygon",
        "coordinates": [[[15.0, 51.44], [None, 51.45], [15.01, 51.44], [15.0, 51.44]]],
    },
    {"coordinates": [1]},
    {},
]


@pytest.mark.parametrize("geometry", MALFORMED)
def test_a_malformed_geometry_is_no_geometry(archive, geometry):
    item = archive.item("2020-07-05T10:00:00", grid_at(LEFT, TOP, 60, 60), {"B04": 1, "B11": 1})
    item.geometry = geometry
    with pytest.raises(SceneError, match="has no geometry with an area"):
        scenes.normalise(item, archive.source)


def test_a_footprint_that_goes_on_beyond_180_degrees(archive):
    item = archive.item("2020-07-05T10:00:00", grid_at(LEFT, TOP, 60, 60), {"B04": 1, "B11": 1})
    for west in (179.0, -181.0):
        item.geometry = shapely.geometry.mapping(shapely.box(west, 60, west + 2, 61))
        scene = scenes.normalise(item, archive.source)
        assert shapely.geometry.shape(scene.geometry).area == pytest.approx(2)
        for x, hit in ((179.5, True), (-179.5, True), (178.5, False), (-178.5, False)):
            assert lies_over(scene, shapely.box(x - 0.1, 60.4, x + 0.1, 60.6)) is hit, (west, x)


@pytest.mark.parametrize(
    "change",
    [
        {"s2:product_uri": "S2A_MSIL1C_20200705T100000_N0500_R022_T33UUR_20200705T120000.SAFE"},
        {"s2:product_type": "S2MSI1C"},
        {"processing:level": "L1C"},
        {"processing:level": "Level-1C"},
        {"processing:level": "L1"},
        {"id": "S2A_33UUR_20200705_0_L1C"},
        {"id": "S2A_MSIL1C_20200705T100000_R022_T33UUR_20200705T120000"},
        {"collection": "sentinel-2-l1c"},
        {"collection": "sentinel-s2-l1c"},
    ],
)
def test_level_1_is_told_by_name_type_level_or_collection(archive, change):
    """With all assets of Level-2A, and newer: it would win over the Level-2A copy."""
    feature, *_ = features_of(archive, 1)
    other = copy.deepcopy(feature)
    other |= {name: value for name, value in change.items() if ":" not in name} or {
        "id": "an id that tells nothing"
    }
    other["properties"] |= {name: value for name, value in change.items() if ":" in name}
    write_features([feature, other], archive.root / "items.parquet")
    found = scenes.search(site_of("s", LEFT, TOP, 60, 60), 2020, archive.source)
    assert [s.id for s in found.scenes] == [feature["id"]]
    assert "expected a Level-2A product, found Level-1" in found.refused[other["id"]]


def test_names_that_are_not_of_level_1(archive):
    item = archive.item(
        "2020-07-05T10:00:00", grid_at(LEFT, TOP, 60, 60), {"B04": 1, "B11": 1}, tile="31CLC"
    )
    item.properties |= {"proj:epsg": 32731, "processing:level": "L2", "s2:product_type": "S2MSI2A"}
    item.set_collection(None)
    item.collection_id = "sentinel-2-l2a-from-l1c"
    assert scenes.normalise(
        item, dataclasses.replace(archive.source, collection=item.collection_id)
    )
    item.id = "1"
    assert scenes.normalise(
        item, dataclasses.replace(archive.source, collection=item.collection_id)
    )


def test_a_file_lists_its_collection_alone_as_an_api_does(archive, caplog):
    features = features_of(archive, 12)
    for feature in features[:11]:
        feature["collection"] = "landsat-c2-l2"
    features[11]["collection"] = archive.source.collection
    write_features(features, archive.root / "items.parquet")
    found = scenes.search(site_of("s", LEFT, TOP, 60, 60), 2020, archive.source)
    assert [s.id for s in found.scenes] == [features[11]["id"]]
    assert set(found.refused) == {f["id"] for f in features[:11]}
    assert found.refused[features[0]["id"]].endswith(
        "expected collection test, which source test lists, found landsat-c2-l2; it is refused"
    )
    said = [record.message for record in caplog.records]
    assert len(said) == 1
    assert said[0].endswith(f"{features[8]['id']}, ...")
    assert "so are 10 more" in said[0]


@pytest.mark.parametrize(
    ("href", "media_type", "said"),
    [
        (
            "a.zarr/measurements/reflectance/r10m/b04",
            "application/vnd+zarr",
            "is Zarr (media type application/vnd+zarr)",
        ),
        (
            "s3://bucket/a/b04",
            "application/vnd.zarr; version=3; profile=multiscales",
            "is Zarr (media type application/vnd.zarr",
        ),
        ("https://x.org/a.zarr", None, "is Zarr (suffix .zarr)"),
        ("https://x.org/A.ZARR/b04?x=1", "image/tiff", "is Zarr (suffix .ZARR)"),
        ("a.nc", "application/netcdf", "is in another format (media type application/netcdf)"),
        ("a.h5", None, "is in another format (suffix .h5)"),
        ("preview.jpg", "image/jpeg", "is in another format (media type image/jpeg)"),
    ],
)
def test_formats_that_are_not_read_are_refused_where_they_are_listed(
    archive, href, media_type, said
):
    item = archive.item("2020-07-05T10:00:00", grid_at(LEFT, TOP, 60, 60), {"B04": 1, "B11": 1})
    item.assets["B11"] = pystac.Asset(href, media_type=media_type)
    for source in (archive.source, dataclasses.replace(archive.source, assets={})):
        with pytest.raises(SceneError) as caught:
            scenes.normalise(item, source)
        assert f"{item.id}: asset B11 {said}" in str(caught.value)
        assert "expected GeoTIFF or JPEG 2000; it is refused" in str(caught.value)


@pytest.mark.parametrize(
    "media_type",
    [
        None,
        "image/tiff; application=geotiff; profile=cloud-optimized",
        "image/vnd.stac.geotiff; cloud-optimized=true",
        "image/x.geotiff",
        "image/jp2",
        "image/jpx",
        "image/jpeg2000",
        "application/octet-stream",
    ],
)
def test_media_types_of_images(archive, media_type):
    item = archive.item("2020-07-05T10:00:00", grid_at(LEFT, TOP, 60, 60), {"B04": 1, "B11": 1})
    item.assets["B11"].media_type = media_type
    item.assets["preview"] = pystac.Asset(
        "x.zarr", media_type="application/vnd+zarr"
    )  # which nobody reads
    assert scenes.normalise(item, archive.source)


def test_real_zarr_items_are_refused_where_they_are_listed(real_data):
    bare = Source(id="own", title="t", kind="stac-api", href="http://x", collection="c")
    paths = sorted((real_data / "eopf").glob("item_*.json"))
    assert len(paths) == 5
    for path in paths:
        item = pystac.Item.from_dict(json.loads(path.read_text()), migrate=False)
        with pytest.raises(SceneError, match=r"is Zarr \((media type|suffix)"):
            scenes.normalise(item, bare)


def test_an_item_without_scene_classification_is_refused(archive):
    item = archive.item("2020-07-05T10:00:00", grid_at(LEFT, TOP, 60, 60), {"B04": 1, "B11": 1})
    source = dataclasses.replace(archive.source, assets={})
    item.assets["SCL"].href = None  # of a table whose other items have it
    with pytest.raises(
        SceneError, match=r"has no scene classification \(SCL\), only B04, B11, SCL"
    ):
        scenes.normalise(item, source)
    del item.assets["SCL"]
    with pytest.raises(SceneError, match=r"has no scene classification \(SCL\), only B04, B11"):
        scenes.normalise(item, source)


def declaring(item, **offsets):
    """The item, whose bands declare raster offsets: by key, as reflectance."""
    for band, offset in offsets.items():
        item.assets[band].extra_fields["raster:bands"] = [{"scale": 0.0001, "offset": offset}]
    return item


def test_products_of_ones_own_sen2cor_need_their_offset_declared(archive):
    grid = grid_at(LEFT, TOP, 60, 60)
    item = archive.item("2020-07-05T10:00:00", grid, {"B04": 1, "B11": 1}, baseline="99.99")

    def with_own(own):
        return dataclasses.replace(archive.source, offset=Offset(own=own))

    with pytest.raises(
        SceneError,
        match=r"own Sen2Cor, .* write own \(-1000, 0 or declared\) into the offset of its source",
    ):
        scenes.normalise(item, archive.source)
    for own in (-1000, 0, -350):
        properties = scenes.normalise(item, with_own(own)).properties
        assert properties["minecube:offset"] == own
        assert properties["minecube:offset_reason"].endswith(f"its source gives {own}")
    with pytest.raises(
        SceneError, match="expected one raster offset declared for all its bands, found none"
    ):
        scenes.normalise(item, with_own("declared"))
    with pytest.raises(
        SceneError, match="expected one raster offset declared for all its bands, found -1000, 0"
    ):
        scenes.normalise(declaring(item.clone(), B04=-0.1, B11=0), with_own("declared"))
    for offset, number in ((-0.1, -1000), (0, 0)):
        scene = scenes.normalise(
            declaring(item.clone(), B04=offset, B11=offset), with_own("declared")
        )
        assert scene.properties["minecube:offset"] == number
    # The rule of ESA's baselines is as it was.
    fresh = archive.item("2022-07-05T10:00:00", grid, {"B04": 1, "B11": 1}, baseline="05.00")
    assert scenes.normalise(fresh, with_own(0)).properties["minecube:offset"] == -1000


def test_what_a_source_may_say_of_own_products(tmp_path):
    path = tmp_path / "sources.yaml"
    entry = (
        "s: {title: t, kind: stac-geoparquet, href: x.parquet, collection: c, offset: {own: %s}}"
    )
    for own, value in (("-1000", -1000), ("0", 0), ("declared", "declared"), ("null", None)):
        path.write_text(entry % own)
        assert load_sources(path)["s"].offset.own == value
    for own in ("guess", "true", "1.5", "[]"):
        path.write_text(entry % own)
        with pytest.raises(CatalogError, match="field 'own': expected"):
            load_sources(path)


def test_lists_that_were_saved_before_there_was_such_a_rule_still_belong(archive):
    """The hash of the rules that earlier versions wrote: without the field."""
    site, source = site_of("s", LEFT, TOP, 60, 60), archive.source
    grid, rule = grid_of(site), as_dict(source)
    for name in ("title", "href", "licence", "searches_per_s"):
        del rule[name]
    del rule["access"]["connections"], rule["offset"]["own"]
    asked = {
        "site": "s",
        "grid": [str(grid.crs), *grid.transform[:6], *grid.shape],
        "year": 2020,
        "sources": [rule],
    }
    expected = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    assert snapshot.hash_search(site, 2020, [source]) == expected
    own = dataclasses.replace(source, offset=dataclasses.replace(source.offset, own=0))
    assert snapshot.hash_search(site, 2020, [own]) != expected


def test_a_real_item_of_earth_search_v0_is_refused_for_the_true_reason(real_data):
    path = real_data / "earthsearch_scene_29RKH_20200219" / "S2A_31NBJ_20190524_0_L2A.v0.json"
    item = pystac.Item.from_dict(json.loads(path.read_text()), migrate=False)
    bare = Source(id="own", title="t", kind="stac-api", href="http://x", collection="c")
    with pytest.raises(SceneError) as caught:
        scenes.normalise(item, bare)
    assert (
        "names no acquisition (datatake 'S2A_MSIL2A_20190524T101031_N0212_R022_T31NBJ_20190524T130304' without"
        in str(caught.value)
    )
    assert "Earth Search v0, so list it from its successor, earth-search; it is refused" in str(
        caught.value
    )
    item.properties["sentinel:datastrip_id"] = (
        "S2A_OPER_MSI_L2A_DS_MPS__20190524T130304_S20190524T101030_N02.12"
    )
    scene = scenes.normalise(item, bare)
    known = (
        "s2:mgrs_tile",
        "s2:processing_baseline",
        "sat:relative_orbit",
        "minecube:datatake",
        "minecube:granule_start",
    )
    assert [scene.properties[name] for name in known] == [
        "31NBJ",
        "02.12",
        22,
        "S2A_20190524T101031",
        "20190524T101030",
    ]


@pytest.mark.parametrize(
    ("baseline", "flag", "offset", "fields", "warned"),
    [
        (
            "05.00",
            None,
            -1000,
            {"raster:bands": [{"scale": 0.0001, "offset": -0.05}]},
            "-500 for B04",
        ),
        ("05.00", None, -1000, {"raster:offset": 0.1, "raster:scale": 0.0001}, "1000 for B04"),
        (
            "05.00",
            None,
            -1000,
            {"bands": [{"raster:scale": 0.0001, "raster:offset": -0.2}]},
            "-2000 for B04",
        ),
        ("05.00", None, -1000, {"raster:bands": [{"offset": -0.05}]}, "-500 for B04"),
        ("02.14", None, 0, {"raster:bands": [{"offset": -300, "scale": 1}]}, "-300 for B04"),
        ("05.00", None, -1000, {"raster:bands": [{"scale": 0.0001, "offset": -0.1}]}, ""),
        ("05.00", None, -1000, {"raster:bands": [{"scale": 0.0001, "offset": 0}]}, ""),
        ("05.00", True, 0, {"raster:bands": [{"scale": 0.0001, "offset": -0.1}]}, ""),
        ("02.14", None, 0, {"raster:bands": [{"scale": 0.0001, "offset": -0.1}]}, ""),
        ("02.14", None, 0, {"raster:bands": [{"scale": 0.0001, "offset": "nan"}]}, ""),
        ("02.14", None, 0, {}, ""),
    ],
)
def test_a_declared_offset_that_no_product_has_is_warned_of_by_name(
    archive, caplog, baseline, flag, offset, fields, warned
):
    properties = {} if flag is None else {"earthsearch:boa_offset_applied": flag}
    grid = grid_at(LEFT, TOP, 60, 60)
    item = archive.item(
        "2022-07-05T10:00:00", grid, {"B04": 1, "B11": 1}, baseline=baseline, **properties
    )
    item.assets["B04"].extra_fields |= fields
    scene = scenes.normalise(item, archive.source)
    assert scene.properties["minecube:offset"] == offset
    said = [record.message for record in caplog.records]
    assert len(said) == bool(warned)
    if warned:
        assert said[0].startswith(
            f"item {item.id}: declares offset {warned}; the rule of source test gives {offset}"
        )
        assert scene.properties["minecube:offset_reason"].endswith(f"; the item declares {warned}")
    else:
        assert "declares" not in scene.properties["minecube:offset_reason"]


def test_flags_as_tables_spell_them(archive):
    item = archive.item(
        "2022-07-05T10:00:00", grid_at(LEFT, TOP, 60, 60), {"B04": 1, "B11": 1}, baseline="05.00"
    )
    for value, offset in (
        (True, 0),
        ("true", 0),
        (1.0, 0),
        (False, -1000),
        ("false", -1000),
        (None, -1000),
        (0.0, -1000),
    ):
        item.properties["earthsearch:boa_offset_applied"] = value
        assert scenes.normalise(item, archive.source).properties["minecube:offset"] == offset, value


def test_a_malformed_item_of_a_file_or_an_api_is_refused_and_no_other(archive, monkeypatch):
    features = features_of(archive)
    del features[1]["properties"]["datetime"]
    features[2]["assets"]["B04"] = "no asset"
    monkeypatch.setattr(site_year, "list_features", lambda *_: features)
    found = scenes.search(site_of("s", LEFT, TOP, 60, 60), 2020, archive.source)
    assert [s.id for s in found.scenes] == [features[0]["id"]]
    assert set(found.refused) == {f["id"] for f in features[1:]}


def test_a_search_lists_what_a_loop_over_all_rows_lists(archive, tmp_path):
    """Places and years at random, more rows than a batch has, one of unknown time; in the order of the file."""
    feature, *_ = features_of(archive, 1)
    rng, n = np.random.default_rng(0), 2 * parquet._BATCH + 7
    west, south = rng.uniform(14, 16, n), rng.uniform(50, 52, n)
    footprints = shapely.box(west, south, west + 0.3, south + 0.2)
    days = [f"{year}-07-05T10:00:00Z" for year in rng.integers(2019, 2023, n)]
    features = []
    for number, day in enumerate(days):
        listed = copy.deepcopy(feature) | {"id": f"{number}"}
        listed["properties"] |= {"datetime": day, "start_datetime": day, "end_datetime": day}
        features.append(listed)
    features[5]["properties"]["datetime"] = None
    write_features(features, archive.root / "items.parquet", footprints)
    for west, south in ((14.2, 50.3), (15.1, 51.2), (13.0, 50.0)):
        area = shapely.box(west, south, west + 0.05, south + 0.05)
        for year in (2019, 2021, 2024):
            expected = [
                str(k)
                for k in range(n)
                if days[k][:4] == str(year) and footprints[k].intersects(area)
            ]
            assert [f["id"] for f in item_file.search_file(archive.source, area, year)] == expected


def test_a_file_of_items_is_read_once_and_again_when_it_changes(archive, monkeypatch):
    features, site = features_of(archive), site_of("s", LEFT, TOP, 60, 60)
    path, reads = archive.root / "items.parquet", []
    unpacked = item_file._read_table
    monkeypatch.setattr(item_file, "_read_table", lambda href: reads.append(href) or unpacked(href))
    write_features(features, path)
    with ThreadPoolExecutor(4) as pool:
        found = list(
            pool.map(lambda _: len(scenes.search(site, 2020, archive.source).scenes), range(8))
        )
    assert (found, len(reads)) == ([3] * 8, 1)
    write_features(features[:2], path)
    assert len(scenes.search(site, 2020, archive.source).scenes) == 2
    assert len(reads) == 2


def test_a_remote_file_of_items_is_asked_for_changes_once_a_minute(
    archive, tmp_path, clock, monkeypatch
):
    """By size and ETag, which the test's server makes of time and size; a server without ETag sends the file again."""
    features = features_of(archive)
    write_features(features, tmp_path / "remote" / "items.parquet")
    fetched, whole = [], remote.Remote.whole
    monkeypatch.setattr(
        remote.Remote,
        "whole",
        lambda self, url, most: fetched.append(url) or whole(self, url, most),
    )
    with serve(tmp_path / "remote") as url:
        href = f"{url}/items.parquet"
        index = item_file._index_of(href)
        assert item_file._index_of(href) is index
        clock.now += 61
        assert (item_file._index_of(href) is index, len(fetched)) == (True, 1)
        write_features(features[:2], tmp_path / "remote" / "items.parquet")
        assert item_file._index_of(href) is index
        clock.now += 61
        assert len(item_file._index_of(href).years) == 2
        monkeypatch.setattr(remote.Remote, "version", lambda *_: (1, None))
        clock.now += 61
        item_file._index_of(href)
        clock.now += 61
        item_file._index_of(href)
    assert len(fetched) == 4


def test_a_row_without_a_time_is_refused_by_name(archive):
    """Its year is unknown, so every search lists it: it is not lost."""
    features = features_of(archive)
    path = archive.root / "items.parquet"
    write_features(features, path)
    table = pq.read_table(path)
    times = table["datetime"].to_pylist()
    column = pa.array([None, *times[1:]], table.schema.field("datetime").type)
    pq.write_table(table.set_column(table.column_names.index("datetime"), "datetime", column), path)
    found = scenes.search(site_of("s", LEFT, TOP, 60, 60), 2020, archive.source)
    assert len(found.scenes) == 2
    assert list(found.refused) == [features[0]["id"]]


def test_times_as_text_and_files_without_boxes_or_links(archive, tmp_path):
    """As tools other than stac-geoparquet write them."""
    features = features_of(archive)
    path = archive.root / "items.parquet"
    write_features(features, path)
    expected = scenes.search(site_of("s", LEFT, TOP, 60, 60), 2020, archive.source)
    table = pq.read_table(path).drop_columns(["bbox", "links", "type", "stac_version"])
    text = pa.array([f["properties"]["datetime"] for f in features])
    table = table.set_column(table.column_names.index("datetime"), "datetime", text)
    pq.write_table(table.append_column("created", pa.nulls(3, pa.string())), path)
    found = scenes.search(site_of("s", LEFT, TOP, 60, 60), 2020, archive.source)
    assert [s.to_dict() for s in found.scenes] == [s.to_dict() for s in expected.scenes]
    assert len(found.scenes) == 3
    pq.write_table(table.slice(0, 0), path)
    with pytest.raises(scenes.NoScenesError, match="0 listed"):
        scenes.search(site_of("s", LEFT, TOP, 60, 60), 2020, archive.source)
    pq.write_table(table.drop_columns("geometry"), path)
    with pytest.raises(
        SceneError,
        match=r"items\.parquet: cannot be read as stac-geoparquet \(expected a column 'geometry'",
    ):
        scenes.search(site_of("s", LEFT, TOP, 60, 60), 2020, archive.source)


def _broken(**fields):
    """A change of an item: these fields are replaced, or removed where they are `...`."""

    def change(feature):
        for name, value in fields.items():
            feature.pop(name) if value is ... else feature.update({name: value})

    return change


def _deep(depth):
    """A geometry of collections in collections."""
    geometry = {"type": "GeometryCollection", "geometries": []}
    for _ in range(depth):
        geometry = {"type": "GeometryCollection", "geometries": [geometry]}
    return geometry


def _of_asset(value):
    return lambda feature: feature["assets"].update({"B04": value})


UNUSABLE = {
    "null type": (_broken(type=None), "expected type 'Feature', found None"),
    "other type": (_broken(type="Collection"), "expected type 'Feature', found 'Collection'"),
    "no type": (_broken(type=...), "expected type 'Feature', found None"),
    "no properties": (_broken(properties=None), "expected an object of properties, found None"),
    "text for assets": (_broken(assets="B04"), "expected an object of assets, found 'B04'"),
    "no assets": (_broken(assets=None), "has no asset 'B04' for B04"),
    "null asset": (_of_asset(None), "has no asset 'B04' for B04"),
    "null href": (_of_asset({"href": None}), "has no asset 'B04' for B04"),
    "no href": (_of_asset({}), "has no asset 'B04' for B04"),
    "a number for a geometry": (_broken(geometry=5), "has no geometry with an area"),
    "a deep geometry": (_broken(geometry=_deep(3000)), "has no geometry with an area"),
    "text for a time": (
        lambda feature: feature["properties"].update(datetime="05.07.2020"),
        "expected a datetime in ISO 8601 such as 2022-04-10T10:20:00Z, found '05.07.2020'",
    ),
    "number for a time": (
        lambda feature: feature["properties"].update(datetime=1593943200),
        "expected a datetime in ISO 8601 such as 2022-04-10T10:20:00Z, found 1593943200",
    ),
    "no time": (lambda feature: feature["properties"].update(datetime=None), "has no datetime"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_one_unusable_item_of_an_api_is_refused_for_the_true_reason(archive, monkeypatch, case):
    change, reason = UNUSABLE[case]
    features = features_of(archive)
    change(features[1])
    monkeypatch.setattr(site_year, "list_features", lambda *_: features)
    found = scenes.search(site_of("s", LEFT, TOP, 60, 60), 2020, archive.source)
    assert [s.id for s in found.scenes] == [features[0]["id"], features[2]["id"]]
    assert list(found.refused) == [features[1]["id"]]
    assert found.refused[features[1]["id"]].startswith(f"item {features[1]['id']}: {reason}")


def test_items_without_id_are_refused_one_by_one_and_pages_with_them_are_read(api, searched):
    """Three of a month: null instead of an item, an item of null id, one without id. The others are found."""
    site, source = searched
    march = [item for item in api.items if item["properties"]["datetime"].startswith("2020-03")]
    nameless, null = copy.deepcopy(march[:2])
    del nameless["id"]
    null["id"] = None
    listed = {stac_api._key(item): item for item in march}
    page = {"features": [*march, nameless, null, None]}

    class Client:
        def search(self, **_):
            return self

        def pages_as_dicts(self):
            return [page]

    ids, matched = stac_api._search_month(
        Client(), source.collection, shapely.box(0, 0, 1, 1), "2020-03"
    )
    assert matched is None
    assert len(ids) == len(listed) + 3
    assert list(ids.values())[-1] == {}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(site_year, "list_features", lambda *_: list(copy.deepcopy(ids).values()))
        found = scenes.search(site, 2020, source)
    assert "S2A_32TNT_20200302_1_L2A" in [scene.id for scene in found.scenes]
    assert [
        reason.partition(": ")[2]
        for name, reason in found.refused.items()
        if name.startswith("without id")
    ] == ["expected an id, found None; it is refused"] * 3


UNNEEDED = {
    "null thumbnail": lambda feature: feature["assets"].update(thumbnail=None),
    "thumbnail of nulls": lambda feature: feature["assets"].update(
        thumbnail={"href": None, "type": None}
    ),
    "thumbnail without href": lambda feature: feature["assets"].update(
        thumbnail={"type": "image/png"}
    ),
    "thumbnail as text": lambda feature: feature["assets"].update(thumbnail="t.png"),
    "no version": _broken(stac_version=...),
    "null version": _broken(stac_version=None),
    "null links": _broken(links=None),
    "a broken link": _broken(links=[{"rel": "root"}, None]),
    "null extensions": _broken(stac_extensions=[None]),
    "number for an id": _broken(id=7),
    "zero for an id": _broken(id=0),
    "start without end": lambda feature: feature["properties"].update(
        datetime=None, start_datetime="2020-07-06T10:00:00Z"
    ),
}


@pytest.mark.parametrize("case", UNNEEDED)
def test_what_a_scene_does_not_need_may_be_malformed(archive, monkeypatch, case):
    features = features_of(archive)
    UNNEEDED[case](features[1])
    monkeypatch.setattr(site_year, "list_features", lambda *_: features)
    found = scenes.search(site_of("s", LEFT, TOP, 60, 60), 2020, archive.source)
    assert [s.id for s in found.scenes] == [str(f["id"]) for f in features]
    assert found.refused == {}


def rewritten(archive, change, n=3):
    """A file of n items whose table was changed; what a search finds in it."""
    path = archive.root / "items.parquet"
    write_features(features_of(archive, n), path)
    table = pq.read_table(path)
    pq.write_table(change(table), path)
    return scenes.search(site_of("s", LEFT, TOP, 60, 60), 2020, archive.source)


def column(name, values):
    """A change of a table: this column from its values, or from an array."""

    def change(table):
        found = values(table.column(name)) if callable(values) else values
        if name not in table.column_names:
            return table.append_column(name, found)
        return table.set_column(table.column_names.index(name), name, found)

    return change


def _as_map(assets):
    return pa.array(
        [list(row.items()) for row in assets.to_pylist()],
        pa.map_(pa.string(), assets.type.field(0).type),
    )


def _with_view(assets):
    fields = [
        field.with_type(pa.string_view()) if field.name == "href" else field
        for field in assets.type.field(0).type
    ]
    return pa.array(
        assets.to_pylist(),
        pa.struct([pa.field(asset.name, pa.struct(fields)) for asset in assets.type]),
    )


READ = {
    "string_view": ("id", lambda ids: ids.cast(pa.string_view())),
    "binary_view": (
        "geometry",
        lambda shapes: parquet.strip_extension(shapes).cast(pa.binary_view()),
    ),
    "string_view in assets": ("assets", _with_view),
    "assets as map": ("assets", _as_map),
    "assets as map of maps": (
        "assets",
        lambda assets: pa.array(
            [
                [(band, [("href", asset["href"])]) for band, asset in row.items()]
                for row in assets.to_pylist()
            ],
            pa.map_(pa.string(), pa.map_(pa.string(), pa.string())),
        ),
    ),
    "assets as JSON": (
        "assets",
        lambda assets: pa.array([json.dumps(row) for row in assets.to_pylist()]),
    ),
    "unknown zone": ("datetime", lambda times: times.cast(pa.timestamp("us", "Mars/Olympus"))),
    "unknown zone of another column": (
        "s2:seen",
        pa.array([0, 1, 2], pa.timestamp("ms", "Mars/Olympus")),
    ),
    "null types": ("type", pa.array(["Feature", None, None])),
    "null versions": ("stac_version", pa.array(["1.1.0", None, "1.0.0"])),
    "seven decimals": ("created", pa.array(["2020-07-06T00:00:00.1234567Z", None, "2020-07-06"])),
    "nine decimals": (
        "datetime",
        pa.array([f"2020-07-0{day}T10:00:00.000000789Z" for day in (5, 6, 7)]),
    ),
}


@pytest.mark.parametrize("case", READ)
def test_files_of_items_as_other_tools_write_them(archive, case):
    """The days and bands of three items, by hand."""
    found = rewritten(archive, column(*READ[case]))
    assert found.refused == {}
    assert [str(s.datetime) for s in found.scenes] == [
        f"2020-07-0{day} 10:00:00+00:00" for day in (5, 6, 7)
    ]
    assert [sorted(s.assets) for s in found.scenes] == [["B04", "B11", "SCL"]] * 3
    assert all(Path(asset.href).is_file() for s in found.scenes for asset in s.assets.values())


UNREAD = {
    "geometry as list": (
        "geometry",
        pa.array([[[0.0, 1.0]]] * 3),
        r"expected WKB in column 'geometry', found list<",
    ),
    "geometry as struct": (
        "geometry",
        pa.array([{"type": "Point"}] * 3),
        r"expected WKB in column 'geometry', found struct<",
    ),
    "assets as list": (
        "assets",
        pa.array([["B04"]] * 3),
        r"expected structs with an href in column 'assets', found list<",
    ),
    "hrefs": (
        "assets",
        pa.array([{"B04": "a.tif"}] * 3),
        r"expected structs with an href in column 'assets', found struct<B04",
    ),
    "seconds": (
        "datetime",
        pa.array([1593943200] * 3),
        r"expected timestamps or ISO 8601 texts in column 'datetime', found int64",
    ),
}


@pytest.mark.parametrize("case", UNREAD)
def test_a_file_of_other_columns_is_refused_in_one_sentence(archive, case):
    name, values, reason = UNREAD[case]
    message = rf"items\.parquet: cannot be read as stac-geoparquet \({reason}.*\); write it again with stac-geoparquet$"
    with pytest.raises(SceneError, match=message):
        rewritten(archive, column(name, values))


def test_a_row_of_broken_json_is_refused_and_no_other(archive):
    def broken(assets):
        first, *others = [json.dumps(row) for row in assets.to_pylist()]
        return pa.array([first[:40], *others])

    found = rewritten(archive, column("assets", broken))
    assert len(found.scenes) == 2
    (reason,) = found.refused.values()
    assert """: expected an object of assets, found '{"B""" in reason
    assert reason.endswith("; it is refused")


def test_times_that_are_not_iso_are_refused_with_what_was_found(archive, caplog):
    """One line for all of them."""
    times = pa.array(["05.07.2020 10:00", "2020-07-06T10:00:00Z", "07.07.2020 10:00"])
    found = rewritten(archive, column("datetime", times))
    assert [str(s.datetime) for s in found.scenes] == ["2020-07-06 10:00:00+00:00"]
    expected = "expected a datetime in ISO 8601 such as 2022-04-10T10:20:00Z, found"
    assert [reason.partition(": ")[2] for reason in found.refused.values()] == [
        f"{expected} '05.07.2020 10:00'; it is refused",
        f"{expected} '07.07.2020 10:00'; it is refused",
    ]
    assert len([line for line in caplog.messages if expected in line]) == 1


def test_decimals_are_numbers(archive):
    """A column of DECIMAL, as databases write it: 95 % is no unknown cover, and 33.00 is zone 33."""
    percent = pa.array(
        [decimal.Decimal("95.0"), decimal.Decimal("12.5"), None], pa.decimal128(10, 1)
    )
    found = rewritten(archive, column("eo:cloud_cover", percent))
    assert [s.properties["eo:cloud_cover"] for s in found.scenes] == [95.0, 12.5, None]
    assert (
        len(scenes.select_usable(found.scenes, dataclasses.replace(PLAIN, max_cloud_cover=60))) == 2
    )
    item = archive.item(
        "2022-07-05T10:00:00", grid_at(LEFT, TOP, 60, 60), {"B04": 1, "B11": 1}, baseline="05.00"
    )
    del item.properties["s2:mgrs_tile"]
    item.properties |= {
        "mgrs:utm_zone": decimal.Decimal("33.00"),
        "mgrs:latitude_band": "U",
        "mgrs:grid_square": "UR",
        "earthsearch:boa_offset_applied": decimal.Decimal("1.00"),
        "proj:epsg": decimal.Decimal("32633.00"),
        "sat:relative_orbit": np.float16(22),
    }
    scene = scenes.normalise(item, archive.source).properties
    assert (scene["s2:mgrs_tile"], scene["minecube:offset"], scene["sat:relative_orbit"]) == (
        "33UUR",
        0,
        22,
    )
    item.properties["proj:epsg"] = decimal.Decimal("32632.00")
    with pytest.raises(
        SceneError, match="expected one projection, EPSG:32633 of its tile 33UUR, found EPSG:32632"
    ):
        scenes.normalise(item, archive.source)
