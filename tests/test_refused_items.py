"""One unusable item is refused with the reason, and the others are found."""

from __future__ import annotations

import copy
import dataclasses
import json

import pystac
import pytest
import stac_geoparquet.arrow

from known_api import serve_api
from known_items import LEFT, TOP, features_of, write_features
from known_scenes import grid_at, site_of
from minecube import scenes
from minecube.catalog import Source
from minecube.errors import SceneError


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


def search_api(archive, features):
    """What a search finds where an API lists these features."""
    with serve_api(features) as api:
        api.month = "2020-07"
        for feature in features:
            _name_remote_files(feature["assets"], api.url)
        source = dataclasses.replace(
            archive.source, kind="stac-api", href=api.url, since=api.month, searches_per_s=100
        )
        return scenes.search(site_of("s", LEFT, TOP, 60, 60), 2020, source)


def _name_remote_files(assets, url):
    if isinstance(assets, dict):
        for asset in assets.values():
            if isinstance(asset, dict) and asset.get("href"):
                asset["href"] = f"{url}{asset['href']}"


def test_a_malformed_item_of_an_api_is_refused_and_no_other(archive):
    features = features_of(archive)
    del features[1]["properties"]["datetime"]
    features[2]["assets"]["B04"] = "no asset"
    found = search_api(archive, features)
    assert [s.id for s in found.scenes] == [features[0]["id"]]
    assert set(found.refused) == {f["id"] for f in features[1:]}


def _broken(**fields):
    """A change of an item: these fields are replaced, or removed where they are `...`."""

    def change(feature):
        for name, value in fields.items():
            feature.pop(name) if value is ... else feature.update({name: value})

    return change


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
def test_one_unusable_item_of_an_api_is_refused_for_the_true_reason(archive, case):
    change, reason = UNUSABLE[case]
    features = features_of(archive)
    change(features[1])
    found = search_api(archive, features)
    assert [s.id for s in found.scenes] == [features[0]["id"], features[2]["id"]]
    assert list(found.refused) == [features[1]["id"]]
    assert found.refused[features[1]["id"]].startswith(f"item {features[1]['id']}: {reason}")


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
def test_what_a_scene_does_not_need_may_be_malformed(archive, case):
    features = features_of(archive)
    UNNEEDED[case](features[1])
    found = search_api(archive, features)
    assert [s.id for s in found.scenes] == [str(f["id"]) for f in features]
    assert found.refused == {}
