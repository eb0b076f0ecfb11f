"""Items of every provider become scenes with the right offset, once each, or are refused with the reason."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import subprocess
import sys
import threading
import warnings
import xml.etree.ElementTree as ET
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pystac
import pytest
import stac_geoparquet.arrow
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minecube import scenes
from minecube.catalog import Site, load_recipes, load_sources
from minecube.errors import SceneError
from minecube.scenes import snapshot

LEFT, TOP = 360000, 5600040
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
    got = {name: scenes.normalise(*pair).properties["minecube:offset"] for name, pair in real.items()}
    assert {k: got[k] for k in OFFSETS if k in got} == OFFSETS


def test_real_items_after_pystac_migrated_them(real):
    """pystac >= 1.12 turns proj:epsg into proj:code; both must do."""
    for name, (item, source) in real.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it cannot migrate is not of interest here
            migrated = pystac.Item.from_dict(item.to_dict(include_self_link=False, transform_hrefs=False))
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
        assert [s.id for s in scenes.deduplicate(order)] == ["S2A_32TMT_20200302_1_L2A", "S2A_32TMT_20200305_1_L2A"]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(6)))
def test_split_datatake_kept_older_copies_dropped(archive, make, order):
    grid = make.grid(LEFT, TOP, 60, 60)
    upper = {"start": "20200705T100100"}
    lower = {"start": "20200705T100125"}
    twice = "2020-07-05T10:00:00"
    listed = [
        archive.scene(twice, grid, {"B04": 1, "B11": 1}, baseline="02.14", **upper),
        archive.scene(twice, grid, {"B04": 1, "B11": 1}, baseline="05.00", processed="20230101T000000", **upper),
        archive.scene(twice, grid, {"B04": 1, "B11": 1}, baseline="05.00", processed="20230601T000000", **upper),
        archive.scene(twice, grid, {"B04": 1, "B11": 1}, baseline="05.00", processed="20230101T000000", **lower),
        archive.scene(twice, grid, {"B04": 1, "B11": 1}, baseline="05.00", processed="20230601T000000", tile="33UVR", **upper),
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
        "names no processing baseline": refused(without("s2:processing_baseline", "s2:product_uri"), item, source),
        "names no acquisition": refused(without("s2:datastrip_id"), item, source),
        "expected one projection": refused(lambda c: c["properties"].update({"proj:epsg": 32633}), item, source),
        "names no MGRS tile": refused(
            without("grid:code", "mgrs:utm_zone", "mgrs:latitude_band", "mgrs:grid_square", "s2:product_uri"), item, source
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


def test_a_snapshot_gives_back_what_was_saved(real, tmp_path):
    listed = sorted((scenes.normalise(*pair) for pair in real.values()), key=lambda s: (s.datetime, s.id))
    found = scenes.Found(scenes=tuple(listed), listed=99, refused={"some": "why"})
    snapshot.save(found, tmp_path / "snapshot.parquet")
    back = snapshot.load(tmp_path / "snapshot.parquet")
    assert [s.to_dict() for s in back.scenes] == [s.to_dict() for s in listed]
    assert (back.listed, back.refused, back.copies) == (99, {"some": "why"}, 99 - 1 - len(listed))
    assert not list(tmp_path.glob("*.part"))


def test_a_list_of_another_place_year_or_source_is_refused(archive, make):
    """It would be committed as a year of zeros."""
    scene = archive.scene("2020-07-05T10:00:00", make.grid(LEFT, TOP, 60, 60), {"B04": 1, "B11": 1})
    here, there = make.site("s", LEFT, TOP, 60, 60), make.site("s", LEFT + 50000, TOP, 60, 60)
    scenes.belonging([scene], here, 2020, [archive.source])
    other = dataclasses.replace(archive.source, id="other")
    for site, year, source, said in (
        (there, 2020, archive.source, "elsewhere"),
        (here, 2022, archive.source, "of 2020"),
        (here, 2020, other, "from test"),
    ):
        with pytest.raises(SceneError, match=f"holds scenes {said}"):
            scenes.belonging([scene], site, year, [source])


def test_spellings_of_baselines(archive, make):
    item = archive.item("2020-07-05T10:00:00", make.grid(LEFT, TOP, 60, 60), {"B04": 1, "B11": 1})
    item.properties["s2:product_uri"] = ""
    for said, offset in (("4.0", -1000), ("05.00", -1000), ("3.01", 0), ("02.14", 0)):
        item.properties["s2:processing_baseline"] = said
        assert scenes.normalise(item, archive.source).properties["minecube:offset"] == offset
    item.properties["s2:processing_baseline"] = "99.99"
    with pytest.raises(SceneError, match="to be withdrawn; it is refused"):
        scenes.normalise(item, archive.source)


def test_a_file_that_is_no_snapshot(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 this is not it")
    with pytest.raises(SceneError, match=r"x\.parquet: cannot be read as stac-geoparquet"):
        snapshot.load(tmp_path / "x.parquet")


def test_selection_by_recipe_says_what_to_widen(archive, make):
    grid = make.grid(LEFT, TOP, 60, 60)
    winter = archive.scene("2020-01-05T10:00:00", grid, {"B04": 1, "B11": 1})
    cloudy = archive.scene("2020-07-05T10:00:00", grid, {"B04": 1, "B11": 1}, **{"eo:cloud_cover": 95.0})
    recipe = dataclasses.replace(load_recipes()["annual-median"], min_dates=1)
    with pytest.raises(SceneError, match=r"none of 2 scenes, and needs 1 dates: 1 are in months .* at most 90 % cloudy; widen"):
        scenes.select([winter, cloudy], recipe)
    fine = archive.scene("2020-07-08T10:00:00", grid, {"B04": 1, "B11": 1})
    assert [s.id for s in scenes.select([winter, cloudy, fine], recipe)] == [fine.id]


def test_solar_day_is_local(archive, make):
    """23:50 UTC over eastern Siberia is already the next day there."""
    item = archive.item("2020-07-05T23:50:00", make.grid(500000, 7000020, 60, 60, 32658), {"B04": 1, "B11": 1}, tile="58VEP")
    assert scenes.normalise(item, archive.source).properties["minecube:solar_day"] == "2020-07-06"


@pytest.fixture
def served(tmp_path):
    """URL under which `tmp_path` is served with byte ranges."""
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("range_server.py")), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
    server.terminate()
    server.communicate()


def test_a_remote_file_of_items_and_its_images(archive, make, tmp_path, served):
    """The index over HTTP, hrefs relative to it, pixels by range requests."""
    grid = make.grid(LEFT, TOP, 60, 60)
    item = archive.item("2020-07-05T10:00:00", grid, {"B04": make.unique(60, 60), "B11": 7})
    for asset in item.assets.values():
        asset.href = str(Path(asset.href).relative_to(tmp_path))
    table = stac_geoparquet.arrow.parse_stac_items_to_arrow([item.to_dict(transform_hrefs=False)])
    stac_geoparquet.arrow.to_parquet(table, tmp_path / "items.parquet")
    source = dataclasses.replace(archive.source, href=f"{served}/items.parquet")
    (scene,) = scenes.search(make.site("s", LEFT, TOP, 60, 60), 2020, source).scenes
    assert scene.assets["B04"].href.startswith(served)
    np.testing.assert_array_equal(scenes.stack([scene], grid, ["B04"]).values[0, 0], make.unique(60, 60))
    with pytest.raises(SceneError, match="cannot be read as stac-geoparquet"):
        scenes.search(make.site("s", LEFT, TOP, 60, 60), 2020, dataclasses.replace(source, href=f"{served}/none.parquet"))


# A STAC API on loopback


class Api:
    """Answers POST /search from a list of items, ten a page; can misbehave."""

    def __init__(self, items):
        self.items, self.posts, self.fail_first, self.lose, self.html = items, 0, 0, False, False
        api = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def answer(self, content, status=200, kind="application/geo+json"):
                body = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self):
                if api.html:
                    self.answer(b"<html>maintenance</html>", kind="text/html")
                    return
                self.answer(
                    {
                        "type": "Catalog",
                        "id": "test",
                        "stac_version": "1.0.0",
                        "description": "test",
                        "conformsTo": ["https://api.stacspec.org/v1.0.0/core", "https://api.stacspec.org/v1.0.0/item-search"],
                        "links": [
                            {"rel": "self", "href": api.url},
                            {"rel": "root", "href": api.url},
                            {"rel": "search", "href": f"{api.url}/search", "method": "POST", "type": "application/geo+json"},
                        ],
                    }
                )

            def do_POST(self):
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                api.posts += 1
                if api.posts <= api.fail_first:
                    self.answer({"code": "busy"}, status=503)
                    return
                first, last = asked["datetime"].split("/")
                match = [i for i in api.items if first <= i["properties"]["datetime"] <= last]
                at = asked.get("token", 0)
                page = match[at : at + 10]
                links = []
                if at + 10 < len(match):
                    body = {**asked, "token": at + 10}
                    links = [{"rel": "next", "href": f"{api.url}/search", "method": "POST", "body": body}]
                # A page that repeats an item of the last one, as the recorded searches do.
                again = match[at - 1 : at] if at else []
                shown = page[:-1] if api.lose and not links else [*again, *page]
                self.answer({"type": "FeatureCollection", "features": shown, "links": links, "numberMatched": len(match)})

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def api(real_data):
    recorded = [json.loads(p.read_text()) for p in sorted((real_data / "stac_items" / "search_pages").glob("*.json"))]
    items = [f for page in recorded for f in page["response"]["features"]]
    served = Api(items)
    yield served
    served.close()


@pytest.fixture
def searched(api, make):
    """A site in the recorded search's box, and Earth Search moved to loopback."""
    source = dataclasses.replace(load_sources()["earth-search"], href=api.url)
    return Site(id="Allgaeu", geometry=make.site("x", 600000, 5280000, 400, 400, 32632).geometry), source


def test_the_recorded_search(api, searched):
    site, source = searched
    found = scenes.search(site, 2020, source).scenes
    assert len(api.items) == 16
    # By hand from the recorded pages: of both tiles over the site only sequence _1_ (05.00) is left.
    assert all(re.search(r"_1_L2A$", s.id) for s in found)
    assert {s.properties["s2:processing_baseline"] for s in found} == {"05.00"}
    takes = {(s.properties["minecube:datatake"], s.properties["s2:mgrs_tile"]) for s in found}
    assert len(takes) == len(found) > 0


def test_a_busy_api_is_asked_again(api, searched):
    api.fail_first = 2
    assert scenes.search(searched[0], 2020, searched[1])
    assert api.posts >= 14


def test_lost_items_are_not_passed_over(api, searched):
    api.lose = True
    with pytest.raises(SceneError, match="says 16 items match 2020-03, its pages held 15"):
        scenes.search(searched[0], 2020, searched[1])


def test_an_api_that_answers_html(api, searched):
    api.html = True
    with pytest.raises(SceneError, match="the search for 2020 failed"):
        scenes.search(searched[0], 2020, searched[1])


def test_an_empty_search_says_what_was_searched(api, searched):
    with pytest.raises(
        SceneError, match=r"no scene of 2021 over Allgaeu \(west.*sentinel-2-l2a at http.*0 listed, 0 refused; try"
    ):
        scenes.search(searched[0], 2021, searched[1])


@pytest.mark.parametrize("year", [2014, 2999])
def test_years_without_sentinel_2(searched, year):
    with pytest.raises(SceneError, match=f"year {year}: expected 2015"):
        scenes.search(searched[0], year, searched[1])
