"""A search of a STAC API finds every item, keeps the pace and stays within its limits."""

from __future__ import annotations

import copy
import dataclasses
import time

import pytest

from known_api import serve_recorded_search
from known_scenes import site_of
from minecube import network, scenes
from minecube.catalog import Site, load_sources
from minecube.errors import SceneError
from minecube.scenes import api as stac_api


@pytest.fixture
def api(real_data):
    with serve_recorded_search(real_data) as served:
        yield served


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


def test_pages_without_end_are_given_up(api, searched):
    api.endless, api.page_size = True, 1
    site, source = searched
    with pytest.raises(SceneError, match="expected at most 200 pages of 2020-03, found more"):
        scenes.search(site, 2020, dataclasses.replace(source, searches_per_s=100))
    assert api.posts == 2 + 201  # of January and February, and of March


def test_an_answer_that_is_too_long_is_given_up(api, searched):
    """As it is unpacked: 100 MB of it take 12 MB."""
    api.page_bytes = [100_000_001]
    with pytest.raises(SceneError, match="expected an answer of at most 100,000,000 bytes"):
        scenes.search(*searched_as(searched))


def test_a_month_has_a_limit_of_bytes(api, searched):
    """The recorded month has the most bytes in three pages, and each month has a limit of its own."""
    found = scenes.search(*searched_as(searched)).scenes
    api.page_size, third = 6, 66_666_666
    api.page_bytes = [third + 1, third + 1, third]
    assert [s.id for s in scenes.search(*searched_as(searched)).scenes] == [s.id for s in found]
    assert not api.page_bytes
    api.page_bytes = [third + 1, third + 1, third + 1]
    with pytest.raises(
        SceneError, match="expected at most 200,000,000 bytes of one month, found more"
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


def test_items_without_id_are_refused_one_by_one_and_pages_with_them_are_read(api, searched):
    """Three more of a month: null instead of an item, an item of null id, one without id. The others are found."""
    listed = scenes.search(*searched_as(searched)).listed
    (known,) = [item for item in api.items if item["id"] == "S2A_32TNT_20200302_1_L2A"]
    nameless, null = copy.deepcopy(known), copy.deepcopy(known)
    del nameless["id"]
    null["id"] = None
    api.items += [nameless, null, None]
    api.month = "2020-03"
    found = scenes.search(*searched_as(searched))
    assert found.listed == listed + 3
    assert [scene.id for scene in found.scenes] == ["S2A_32TNT_20200302_1_L2A"]
    assert [
        reason.partition(": ")[2]
        for name, reason in found.refused.items()
        if name.startswith("without id")
    ] == ["expected an id, found None; it is refused"] * 3
