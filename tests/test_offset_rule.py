"""Each item gets the offset that its pixels still carry."""

from __future__ import annotations

import dataclasses
import xml.etree.ElementTree as ET

import pytest

from known_items import LEFT, TOP, read_real_items
from known_scenes import grid_at
from minecube import scenes
from minecube.catalog import Offset, load_sources
from minecube.errors import CatalogError, SceneError


@pytest.fixture(scope="session")
def real(real_data):
    return read_real_items(real_data)


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


def test_every_real_item_gets_its_offset(real):
    got = {
        name: scenes.normalise(*pair).properties["minecube:offset"] for name, pair in real.items()
    }
    assert {k: got[k] for k in OFFSETS if k in got} == OFFSETS


def test_the_rule_agrees_with_product_metadata(real_data):
    """Where BOA_ADD_OFFSET really stands: the product's own XML."""
    for path in sorted((real_data / "safe_metadata").glob("*/MTD_MSIL2A.xml")):
        root = ET.parse(path).getroot()
        baseline = next(e.text for e in root.iter("PROCESSING_BASELINE"))
        stated = {int(e.text) for e in root.iter("BOA_ADD_OFFSET")} or {0}
        rule = load_sources()["cdse"].offset
        assert stated == {rule.value if baseline >= rule.from_baseline else 0}, path


def test_spellings_of_baselines(archive):
    item = archive.item("2020-07-05T10:00:00", grid_at(LEFT, TOP, 60, 60), {"B04": 1, "B11": 1})
    item.properties["s2:product_uri"] = ""
    item.id = "a name that tells nothing"
    for said, offset in (("4.0", -1000), ("05.00", -1000), ("3.01", 0), ("02.14", 0)):
        item.properties["s2:processing_baseline"] = said
        assert scenes.normalise(item, archive.source).properties["minecube:offset"] == offset


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
