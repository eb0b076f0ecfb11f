"""Items of every provider become scenes in the project's own terms, or are refused by name."""

from __future__ import annotations

import json
import warnings

import pyproj
import pystac
import pytest

from known_items import LEFT, TOP, changed, read_real_items, refused
from known_scenes import grid_at
from minecube import scenes
from minecube.catalog import Source
from minecube.errors import SceneError


@pytest.fixture(scope="session")
def real(real_data):
    return read_real_items(real_data)


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


def test_solar_day_is_local(archive):
    """23:50 UTC over eastern Siberia is already the next day there."""
    item = archive.item(
        "2020-07-05T23:50:00",
        grid_at(500000, 7000020, 60, 60, 32658),
        {"B04": 1, "B11": 1},
        tile="58VEP",
    )
    assert scenes.normalise(item, archive.source).properties["minecube:solar_day"] == "2020-07-06"


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
