"""Searches against a real STAC API, stac-fastapi over pgstac, started here; skipped where it cannot run."""

from __future__ import annotations

import copy
import dataclasses
import datetime as dt
import importlib.util
import json
from pathlib import Path

import pystac
import pytest
import requests

from known_scenes import site_of
from minecube import scenes
from minecube.catalog import Site, load_sources
from minecube.errors import SceneError

_SPEC = importlib.util.spec_from_file_location(
    "pgstac_server", Path(__file__).with_name("pgstac_server.py")
)
pgstac_server = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(pgstac_server)

COLLECTION = {
    "type": "Collection",
    "stac_version": "1.0.0",
    "id": "sentinel-2-l2a",
    "description": "Recorded items of Earth Search",
    "license": "other",
    "extent": {
        "spatial": {"bbox": [[-180, -90, 180, 90]]},
        "temporal": {"interval": [["2015-06-27T00:00:00Z", None]]},
    },
    "links": [],
}
OVERPASSES = 130
"""Each in two baselines: 260 items, three pages of 100."""
# By hand from the recorded pages: the first place lies where four tiles overlap, the second in 32TNT alone, which the overpass
# of 5 March misses there. Sequence 0 is baseline 02.14 of the same acquisitions.
EXPECTED = {
    (503000, 5297000): [
        "S2A_32UNU_20200302_1_L2A",
        "S2A_32UMU_20200302_1_L2A",
        "S2A_32TNT_20200302_1_L2A",
        "S2A_32TMT_20200302_1_L2A",
        "S2A_32UNU_20200305_1_L2A",
        "S2A_32UMU_20200305_1_L2A",
        "S2A_32TNT_20200305_1_L2A",
        "S2A_32TMT_20200305_1_L2A",
    ],
    (600000, 5280000): ["S2A_32TNT_20200302_1_L2A"],
}


@pytest.fixture(scope="module")
def recorded(real_data):
    pages = [
        json.loads(p.read_text())
        for p in sorted((real_data / "stac_items" / "search_pages").glob("*.json"))
    ]
    return {f["id"]: f for page in pages for f in page["response"]["features"]}


@pytest.fixture(scope="module")
def api(recorded, tmp_path_factory):
    """The recorded items of March 2020, and in March 2019 an overpass every five hours."""
    originals = [recorded[f"S2A_32TNT_20200302_{sequence}_L2A"] for sequence in (0, 1)]
    times = [dt.datetime(2019, 3, 1, 0, 30) + n * dt.timedelta(hours=5) for n in range(OVERPASSES)]
    more = [moved(item, time, 20000 + n) for n, time in enumerate(times) for item in originals]
    try:
        with pgstac_server.pgstac(
            tmp_path_factory.mktemp("pgstac"), COLLECTION, [*recorded.values(), *more]
        ) as url:
            yield url
    except pgstac_server.Unavailable as missing:
        pytest.skip(f"not run: {missing}")


def moved(item, time, orbit):
    """The item as of another acquisition."""
    item, stamp = copy.deepcopy(item), f"{time:%Y%m%dT%H%M%S}"
    p = item["properties"]
    item["id"] = item["id"].replace("20200302", stamp)
    p["datetime"] = f"{time.isoformat()}Z"
    p["s2:datatake_id"] = p["s2:datatake_id"].replace(
        "20200302T102021_024515", f"{stamp}_{orbit:06d}"
    )
    p["s2:datastrip_id"] = p["s2:datastrip_id"].replace("S20200302T102554", f"S{stamp}")
    p["s2:product_uri"] = p["s2:product_uri"].replace("20200302T102021", stamp, 1)
    assert stamp in p["s2:datatake_id"]
    assert stamp in p["s2:datastrip_id"]
    assert stamp in p["s2:product_uri"]
    return item


@pytest.fixture
def source(api):
    return dataclasses.replace(load_sources()["earth-search"], href=api, searches_per_s=100)


@pytest.fixture
def allgaeu():
    return Site(id="Allgaeu", geometry=site_of("x", 600000, 5280000, 400, 400, 32632).geometry)


def search(*args):
    return list(scenes.search(*args).scenes)


@pytest.mark.parametrize(("corner", "expected"), EXPECTED.items(), ids=["four tiles", "one tile"])
def test_the_recorded_items_come_back_once_each(corner, expected, recorded, source):
    listed = search(site_of("place", *corner, 300, 300, 32632), 2020, source)
    assert [s.id for s in listed] == expected
    for scene in listed:
        item, p = recorded[scene.id], scene.properties
        assert p["s2:processing_baseline"] == "05.00"
        assert p["eo:cloud_cover"] == item["properties"]["eo:cloud_cover"]
        assert scene.assets["B04"].href == item["assets"]["red"]["href"]
        assert scene.assets["SCL"].href == item["assets"]["scl"]["href"]
        # pgstac keeps items in parts and puts them together again: nothing of the recorded one may be lost.
        assert (
            scene.to_dict()
            == scenes.normalise(pystac.Item.from_dict(item, migrate=False), source).to_dict()
        )


def test_pages_are_followed_to_the_last(api, source, allgaeu):
    asked = {
        "collections": ["sentinel-2-l2a"],
        "datetime": "2019-03-01T00:00:00Z/2019-03-31T23:59:59Z",
        "limit": 100,
    }
    page = requests.post(f"{api}/search", json=asked, timeout=60).json()
    assert (page["numberMatched"], len(page["features"])) == (2 * OVERPASSES, 100)
    listed = search(allgaeu, 2019, source)
    assert len(listed) == OVERPASSES
    assert all(s.id.endswith("_1_L2A") for s in listed)
    start = dt.datetime(2019, 3, 1, 0, 30, tzinfo=dt.UTC)
    assert [s.datetime for s in listed] == [
        start + n * dt.timedelta(hours=5) for n in range(OVERPASSES)
    ]


def test_an_empty_search_says_what_was_searched(source, allgaeu):
    with pytest.raises(
        SceneError,
        match=r"no scene of 2021 over Allgaeu \(west.*\) in sentinel-2-l2a at http://127.0.0.1:\d+: 0 listed, 0 refused",
    ):
        scenes.search(allgaeu, 2021, source)
