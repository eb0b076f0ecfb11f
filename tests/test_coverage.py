"""Coverage against passes counted by hand, against the simulator's own, and against plain loops over plain lists."""

from __future__ import annotations

import dataclasses
import json
from datetime import UTC, date, datetime, timedelta

import numpy as np
import pystac
import pytest
from hypothesis import given
from hypothesis import strategies as st

from known_coverage import LATER, RECIPE, listing, scene
from minecube import scenes
from minecube.catalog import load_sources
from minecube.scenes import coverage
from minecube.simulate import passes


def days_of(passed):
    return [d.isoformat() for d in passed]


# Passes


def test_passes_by_hand():
    """S2A came over on 2 March 2020: so it did on 2 January, 60 days before, and S2B on the 7th."""
    year = days_of(coverage.derive_passes([scene("S2A", "2020-03-02")], 2020))
    assert year[:5] == ["2020-01-02", "2020-01-07", "2020-01-12", "2020-01-17", "2020-01-22"]
    assert len(year) == 73  # 2 January to 27 December, every fifth day
    assert year[-1] == "2020-12-27"
    summer = [
        d
        for d in days_of(coverage.derive_passes([scene("S2A", "2020-03-02")], 2017))
        if "2017-06" <= d < "2017-08"
    ]
    # S2B began on 1 July 2017, which was one of its days.
    assert summer == [
        *("2017-06-06", "2017-06-16", "2017-06-26"),
        *(
            "2017-07-01",
            "2017-07-06",
            "2017-07-11",
            "2017-07-16",
            "2017-07-21",
            "2017-07-26",
            "2017-07-31",
        ),
    ]


@pytest.mark.parametrize(
    ("orbit", "known", "other"),
    [  # of published product names
        (22, ("S2A", "2015-07-04"), ("S2A", "2017-06-13")),
        (65, ("S2A", "2020-03-02"), ("S2B", "2020-07-05")),
        (78, ("S2B", "2020-06-06"), ("S2A", "2020-06-01")),
        (36, ("S2B", "2017-07-09"), ("S2B", "2017-08-08")),
        (95, ("S2A", "2022-06-22"), ("S2C", "2025-06-26")),
        (94, ("S2C", "2025-05-27"), ("S2B", "2025-05-22")),
        (43, ("S2B", "2020-09-11"), ("S2C", "2025-09-30")),
    ],
)
def test_one_pass_tells_the_others_across_satellites_and_years(orbit, known, other):
    for a, b in ((known, other), (other, known)):
        assert date.fromisoformat(b[1]) in coverage.derive_passes([scene(*a, orbit)], int(b[1][:4]))


def test_the_real_items_agree(real_data):
    """S2A and S2B over 32TMT on one orbit, 125 days apart, from two providers."""
    sources = load_sources()
    both = []
    for file, source in (
        ("earthsearch_l2a/S2A_32TMT_20200302_1_L2A.json", "earth-search"),
        (
            "planetary_computer/S2B_MSIL2A_20200705T101559_R065_T32TMT_20200825T083452.json",
            "planetary-computer",
        ),
    ):
        item = pystac.Item.from_dict(
            json.loads((real_data / "stac_items" / file).read_text()), migrate=False
        )
        both.append(scenes.normalise(item, sources[source]))
    assert {s.properties["sat:relative_orbit"] for s in both} == {65}
    a, b = (coverage.derive_passes([s], 2020) for s in both)
    assert a == b
    assert {"2020-03-02", "2020-07-05"} <= set(days_of(a))


@pytest.mark.parametrize("year", range(2015, 2025))
@pytest.mark.parametrize("seen", [["S2A"], ["S2B"], ["S2A", "S2B"]])
def test_passes_are_the_simulators(year, seen):
    truth = [passes.list_passes(2020, orbit) for orbit in (passes.FULL_SWATH, passes.CUT_SWATH)]
    first = [next(p for p in listed if p[1] == satellite) for listed in truth for satellite in seen]
    expected = coverage.derive_passes([scene(s, day, orbit) for day, s, orbit in first], year)
    assert list(expected) == sorted(
        p[0]
        for orbit in (passes.FULL_SWATH, passes.CUT_SWATH)
        for p in passes.list_passes(year, orbit)
    )


def test_s2c_takes_over_from_s2a():
    r65 = days_of(coverage.derive_passes([scene("S2A", "2020-03-02")], 2025))
    assert "2025-01-15" in r65  # S2A's last: 1780 days after
    assert "2025-01-25" in r65  # S2C's first
    assert len(r65) == 73
    # S2A flies on elsewhere; where it is found, it tells nothing.
    moved = scene("S2A", "2025-06-03")
    assert days_of(coverage.derive_passes([scene("S2A", "2020-03-02"), moved], 2025)) == r65
    assert coverage.derive_passes([moved], 2025) is None
    months, _ = coverage.tabulate_coverage(
        [listing([scene("S2C", "2025-06-04"), moved], 2025)], RECIPE, LATER
    )
    june = months.iloc[5]
    assert (june["days"], june["expected"]) == (2, 6)
    assert june["missing_days"] == "2025-06-09 2025-06-14 2025-06-19 2025-06-24 2025-06-29"


def test_nothing_is_expected_that_is_not_listed_yet():
    passed = coverage.derive_passes([scene("S2A", "2020-03-02")], 2020, until=date(2020, 1, 12))
    assert days_of(passed) == ["2020-01-02", "2020-01-07", "2020-01-12"]
    months, years = coverage.tabulate_coverage(
        [listing([scene("S2A", "2020-03-02")])], RECIPE, date(2020, 5, 31)
    )
    assert (
        months["state"].tolist()
        == ["out of season"] * 3 + ["gap"] * 2 + ["to come"] * 5 + ["out of season"] * 2
    )
    assert years["gap"].tolist() == ["2020-04-01..2020-05-31"]


def test_scenes_that_name_no_orbit_count_but_tell_no_pass():
    found = [scene("S2A", "2020-05-01", None), scene("S2B", "2020-05-03", None)]
    months, years = coverage.tabulate_coverage([listing(found)], RECIPE, LATER)
    assert months["days"].sum() == 2
    assert months[["expected", "missing"]].isna().all(axis=None)
    assert years[["expected", "missing"]].isna().all(axis=None)
    assert years["usable"].item() == 2


def test_a_pass_belongs_to_the_utc_year_in_which_it_is_listed():
    """Over New Zealand half past ten on 1 January 2021 is still 2020 in UTC, where a search finds it."""
    first = scene("S2A", "2021-01-01", utc=datetime(2020, 12, 31, 22, 40, tzinfo=UTC))
    assert coverage.derive_passes([first], 2020)[date(2021, 1, 1)] == date(2020, 12, 31)
    assert days_of(coverage.derive_passes([first], 2021))[0] == "2021-01-06"
    months, _ = coverage.tabulate_coverage([listing([first], 2020)], RECIPE, LATER)
    december = months.iloc[11]
    assert (december["days"], december["expected"], december["missing"]) == (
        1,
        7,
        6,
    )  # 1, 6, ... 31 December UTC


# Any list of scenes

SATELLITES = {"S2A": date(2020, 3, 2), "S2B": date(2020, 7, 5)}


@st.composite
def listings(draw):
    """Passes of two orbits in 2019 to 2021, some of them listed, now and then twice, or without orbit number."""
    found = []
    for satellite, known in SATELLITES.items():
        for orbit, later in ((65, 0), (108, 3)):
            for n in draw(st.lists(st.integers(-30, 30), max_size=12)):
                day = known + timedelta(days=later + 10 * n)
                found += [
                    scene(
                        satellite,
                        day,
                        draw(st.sampled_from([orbit, orbit, None])),
                        cloud=draw(st.sampled_from([0.0, 90.0, 90.1, 100.0])),
                        tile=tile,
                        baseline=draw(st.sampled_from(["02.14", "05.00"])),
                    )
                    for tile in draw(st.sampled_from([("33UUR",), ("33UUR", "33UVR")]))
                ]
    return list({s.id: s for s in found}.values())


@given(listings())
def test_what_is_found_is_never_missing_and_nothing_else_is_made_up(found):
    known = {
        (
            s.properties["minecube:datatake"][:3],
            date.fromisoformat(s.properties["minecube:solar_day"]),
        )
        for s in found
        if s.properties["sat:relative_orbit"]
    }
    every = [date(2020, 1, 1) + timedelta(days=n) for n in range(366)]
    # A pass of the same satellite lies a multiple of 10 days away, of the other one 5 more.
    brute = [d for d in every if any((d - day).days % 5 == 0 for _, day in known)]
    assert list(coverage.derive_passes(found, 2020) or {}) == brute
    own = [s for s in found if s.datetime.year == 2020]
    months, _ = coverage.tabulate_coverage(
        [
            listing(own),
            *(listing([s for s in found if s.datetime.year == y], y) for y in (2019, 2021)),
        ],
        RECIPE,
        LATER,
    )
    months = months[months["year"] == 2020]
    missing = " ".join(months["missing_days"]).split()
    seen = {s.properties["minecube:solar_day"] for s in own}
    assert missing == [str(d) for d in brute if str(d) not in seen]
    if known:
        assert months["missing"].sum() == len(missing)
        assert months["expected"].sum() == len(brute)


@given(listings())
def test_counts_by_brute_force(found):
    own = [s for s in found if s.datetime.year == 2020]
    months, years = coverage.tabulate_coverage([listing(own)], RECIPE, LATER)
    used = set()
    for row in months.itertuples():
        there = [s for s in own if s.properties["minecube:solar_day"][5:7] == f"{row.month:02d}"]
        fine = {
            s.properties["minecube:solar_day"]
            for s in there
            if s.properties["eo:cloud_cover"] <= 90
        }
        fine = fine if 4 <= row.month <= 10 else set()
        used |= fine
        assert (row.scenes, row.usable) == (len(there), len(fine))
        assert row.days == len({s.properties["minecube:solar_day"] for s in there})
        assert row.baselines.split() == sorted(
            {s.properties["s2:processing_baseline"] for s in there}
        )
        np.testing.assert_allclose(
            row.cloud, np.mean([s.properties["eo:cloud_cover"] for s in there]) if there else np.nan
        )
        assert row.state == (
            "out of season" if not 4 <= row.month <= 10 else "ok" if fine else "gap"
        )
    year = years.iloc[0]
    assert (year["scenes"], year["usable"]) == (len(own), len(used))
    assert year["days"] == months["days"][3:10].sum()
    season = "".join(
        "x" if str(date(2020, 4, 1) + timedelta(days=n)) in used else "." for n in range(214)
    )
    assert year["gap_days"] == max(map(len, season.split("x")))
    if used:
        assert sorted(used) == scenes.list_solar_days(scenes.select(own, RECIPE))


def test_a_season_across_new_year_is_two_stretches():
    recipe = dataclasses.replace(RECIPE, months=(1, 2, 11, 12))
    _, years = coverage.tabulate_coverage([listing([scene("S2A", "2020-11-17")])], recipe, LATER)
    assert years["gap"].item() == "2020-01-01..2020-02-29"
    assert years["gap_days"].item() == 60


def test_the_first_year_begins_with_the_first_image():
    months, years = coverage.tabulate_coverage(
        [listing([scene("S2A", "2015-07-04", 22)], 2015)], RECIPE, LATER
    )
    assert months["state"].tolist()[3:7] == ["before launch"] * 3 + ["ok"]
    assert months["expected"].tolist()[5:7] == [0, 3]  # 4, 14 and 24 July
    assert years["gap"].item() == "2015-07-05..2015-10-31"


def test_sources_together():
    """Each acquisition from the first source that has it; orbits from all of them; a source without any is a row of zeros."""
    first = [scene("S2A", "2020-05-01", cloud=95.0), scene("S2A", "2020-05-11")]
    second = [
        scene("S2A", "2020-05-01", cloud=1.0, source="second"),
        scene("S2B", "2020-05-06", source="second"),
    ]
    asked = [
        listing(first, refused={"x": "why"}),
        listing(second, source="second", refused={"x": "why"}),
    ]
    asked = [dataclasses.replace(a, result=dataclasses.replace(a.result, listed=5)) for a in asked]
    months, years = coverage.tabulate_coverage([*asked, listing([], source="third")], RECIPE, LATER)
    may = months[months["month"] == 5].set_index("source")
    assert may["days"].to_dict() == {"first": 2, "second": 2, "third": 0, "all": 3}
    # The cloudy copy of 1 May is the preferred one, as in a build.
    assert may["usable"].to_dict() == {"first": 1, "second": 2, "third": 0, "all": 2}
    assert may["expected"].tolist() == [7] * 4
    assert may["missing"].to_dict() == {"first": 5, "second": 5, "third": 7, "all": 4}
    counts = years.set_index("source")[["listed", "refused", "copies", "scenes"]]
    assert counts.T.to_dict("list") == {
        "first": [5, 1, 2, 2],
        "second": [5, 1, 2, 2],
        "third": [0, 0, 0, 0],
        "all": [10, 2, 5, 3],
    }
    third = months[months["source"] == "third"]
    assert third[["scenes", "days", "usable"]].sum().tolist() == [0, 0, 0]
    assert third["cloud"].isna().all()
    merged = scenes.merge_sources([first, second])
    assert counts.loc["all", "scenes"] == len(merged)


def test_the_recipes_minimum():
    found = [scene("S2A", f"2020-0{m}-15") for m in (5, 6, 7)]
    for needed, state in ((3, "ok"), (4, coverage.TOO_FEW)):
        _, years = coverage.tabulate_coverage(
            [listing(found)], dataclasses.replace(RECIPE, min_dates=needed), LATER
        )
        assert (years["state"].item(), years["needed"].item(), years["usable"].item()) == (
            state,
            needed,
            3,
        )
