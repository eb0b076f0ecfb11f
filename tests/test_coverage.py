"""Coverage against passes counted by hand, against the simulator's own, and against plain loops over plain lists."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
from datetime import UTC, date, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pystac
import pytest
import stac_geoparquet.arrow
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from known_scenes import site_of
from minecube import report, scenes
from minecube.catalog import load_recipes, load_sources
from minecube.cli import cli
from minecube.errors import CubeError, SceneError
from minecube.scenes import SearchResult, coverage
from minecube.simulate import World, passes, simulate_archive

RECIPE = dataclasses.replace(
    load_recipes()["annual-median"], min_dates=1
)  # April to October, at most 90 % cloudy
LATER = date(2031, 1, 1)


def scene(
    satellite,
    day,
    orbit=65,
    *,
    cloud=10.0,
    tile="33UUR",
    baseline="05.00",
    source="first",
    utc=None,
):
    """What `normalise` would make of an acquisition at half past ten, as far as coverage asks."""
    when = utc or datetime.fromisoformat(f"{day}T10:30:00").replace(tzinfo=UTC)
    stamp = when.strftime("%Y%m%dT%H%M%S")
    return pystac.Item(
        id=f"{satellite}_{tile}_{stamp}_{source}",
        geometry=None,
        bbox=None,
        datetime=when,
        properties={
            "platform": f"sentinel-{satellite[1:].lower()}",
            "eo:cloud_cover": cloud,
            "s2:mgrs_tile": tile,
            "s2:processing_baseline": baseline,
            "sat:relative_orbit": orbit,
            "minecube:source": source,
            "minecube:solar_day": str(day),
            "minecube:datatake": f"{satellite}_{stamp}",
            "minecube:granule_start": stamp,
        },
    )


def listing(found, year=2020, source="first", **counts):
    return coverage.Listing(
        site="pit",
        year=year,
        source=source,
        result=SearchResult(scenes=tuple(found), listed=len(found), **counts),
    )


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


# The command


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Items of a small archive listed in two styles, without its images; recipes of the user's own."""
    folder = tmp_path_factory.mktemp("world")
    site = site_of("pit", 360000, 5600040, 120, 96)
    styles = ("earth-search", "planetary-computer")
    simulate_archive(
        [site],
        folder / "made",
        World(years=(2020, 2022), dates_per_year=6, winter_dates=1, styles=styles),
    )
    (folder / "catalog").mkdir()
    for path in [*(folder / "made").glob("*.parquet"), folder / "made" / "sources.yaml"]:
        shutil.copy(path, folder / "catalog")
    (folder / "catalog" / "recipes.yaml").write_text(
        "greedy: {title: Wants more than there is, months: [4, 5, 6, 7, 8, 9, 10], max_cloud_cover: 90, min_dates: 7}\n"
    )
    gpd.GeoDataFrame({"id": ["pit"], "margin": [0]}, geometry=[site.geometry], crs=4326).to_file(
        folder / "sites.geojson"
    )
    return folder


def run(
    world, out, *more, ok=0, years="2020,2022", source="sim-earth-search,sim-planetary-computer"
):
    given_ = (
        "--sites",
        world / "sites.geojson",
        "--catalog",
        world / "catalog",
        "--years",
        years,
        "--source",
        source,
    )
    done = CliRunner().invoke(cli, [str(a) for a in ("audit", *given_, "--out", out, *more)])
    assert done.exit_code == ok, f"exit {done.exit_code}\n{done.output}"
    return done.stdout, done.stderr


def raw_items(world, style):
    table = pq.read_table(world / "catalog" / f"{style}.parquet")
    return [
        pystac.Item.from_dict(d, migrate=False)
        for d in stac_geoparquet.arrow.stac_table_to_items(table)
    ]


def test_audit_of_an_archive(world, tmp_path):
    out, err = run(world, tmp_path / "audit")
    assert err == ""
    assert sorted(p.name for p in (tmp_path / "audit").iterdir()) == [
        "audit.csv",
        "audit.parquet",
        "audit.png",
    ]
    months = pd.read_parquet(tmp_path / "audit" / "audit.parquet")
    years = pd.read_csv(tmp_path / "audit" / "audit.csv")
    assert len(months) == 2 * 12 * 3
    assert len(years) == 2 * 3
    truth = {
        p
        for orbit in (passes.FULL_SWATH, passes.CUT_SWATH)
        for y in (2020, 2022)
        for p in passes.list_passes(y, orbit)
    }
    for style in ("earth-search", "planetary-computer"):
        items = raw_items(world, style)
        for row in months[months["source"] == f"sim-{style}"].itertuples():
            there = [
                i for i in items if (i.datetime.year, i.datetime.month) == (row.year, row.month)
            ]
            seen = {i.datetime.date() for i in there}
            fine = {i.datetime.date() for i in there if i.properties["eo:cloud_cover"] <= 90}
            due = {d for d, _, _ in truth if (d.year, d.month) == (row.year, row.month)}
            assert (row.days, row.usable) == (len(seen), len(fine) if 4 <= row.month <= 10 else 0)
            assert (row.expected, row.missing) == (len(due), len(due - seen))
            assert row.missing_days.split() == sorted(map(str, due - seen))
        for year in (2020, 2022):
            row = years[(years["source"] == f"sim-{style}") & (years["year"] == year)].iloc[0]
            assert row["listed"] == sum(i.datetime.year == year for i in items)
            assert row["copies"] == row["listed"] - row["refused"] - row["scenes"]
            assert row["days"] == 6
    assert imread(tmp_path / "audit" / "audit.png").shape[2] == 4
    shown = [line.split()[:3] for line in out.splitlines()[2:8]]
    sources = ("sim-earth-search", "sim-planetary-computer", "all")
    assert shown == [["pit", str(year), source] for year in (2020, 2022) for source in sources]


def test_too_few_dates(world, tmp_path):
    run(world, tmp_path / "fine")
    out, err = run(world, tmp_path / "audit", "--recipe", "greedy", ok=1)
    years = pd.read_csv(tmp_path / "audit" / "audit.csv").groupby("year").tail(1)
    for row in years.itertuples():
        assert (
            f"error: pit {row.year}: {row.usable} usable dates, and recipe 'greedy' needs 7; "
            f"the longest gap in season is {row.gap_days} days, {row.gap}" in err
        )
    assert "of 2 site-years, 2 have too few usable dates and 0 could not be audited" in err
    assert out.count(coverage.TOO_FEW) == 6
    plain, framed = (imread(tmp_path / name / "audit.png")[..., :3] for name in ("fine", "audit"))
    frame = [np.abs(p - to_rgb(report.TOO_FEW)).max(axis=-1) < 0.02 for p in (plain, framed)]
    assert frame[1].sum() > 4 * frame[0].sum() > 0  # the legend has it in both


def test_a_source_that_lists_nothing_is_a_row_of_zeros(world, tmp_path):
    _, err = run(world, tmp_path / "audit", ok=1, years="2020,2021", source="sim-earth-search")
    assert "error: pit 2021: 0 usable dates, and recipe 'annual-median' needs" in err
    assert "the longest gap in season is 214 days, 2021-04-01..2021-10-31" in err
    months = pd.read_parquet(tmp_path / "audit" / "audit.parquet")
    empty = months[months["year"] == 2021]
    assert empty[["scenes", "days", "usable"]].sum().tolist() == [0, 0, 0]
    # Which orbits see the site is known from the other year.
    assert (empty["expected"] == empty["missing"]).all()
    assert empty["expected"].sum() == len(
        {p for o in (passes.FULL_SWATH, passes.CUT_SWATH) for p in passes.list_passes(2021, o)}
    )


def test_sources_too_thin_alone_are_enough_together(world, tmp_path):
    """Every second item in either: each has too few dates, both together as many as the recipe needs."""
    shutil.copytree(world, tmp_path / "world")
    catalog = tmp_path / "world" / "catalog"
    table = pq.read_table(catalog / "earth-search.parquet")
    days = sorted({i.datetime.date() for i in raw_items(world, "earth-search")})
    known = yaml.safe_load((catalog / "sources.yaml").read_text())
    for n in (0, 1):
        kept = [days.index(t.date()) % 2 == n for t in table["datetime"].to_pylist()]
        pq.write_table(table.filter(kept), catalog / f"half_{n}.parquet")
        known[f"half-{n}"] = known["sim-earth-search"] | {"href": f"half_{n}.parquet"}
    (catalog / "sources.yaml").write_text(yaml.safe_dump(known))
    recipe = yaml.safe_load((catalog / "recipes.yaml").read_text())["greedy"]
    (catalog / "recipes.yaml").write_text(yaml.safe_dump({"modest": recipe | {"min_dates": 4}}))
    out, err = run(
        tmp_path / "world", tmp_path / "both", "--recipe", "modest", source="half-0,half-1"
    )
    assert err == ""
    assert out.count(coverage.TOO_FEW) == 4
    run(tmp_path / "world", tmp_path / "one", "--recipe", "modest", source="half-1", ok=1)


@pytest.fixture
def gone(world, tmp_path):
    """A catalogue with one source more, whose API knows of nothing."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            self.send_error(404)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    shutil.copytree(world, tmp_path / "world")
    with (tmp_path / "world" / "catalog" / "sources.yaml").open("a") as f:
        href = f"http://127.0.0.1:{server.server_port}"
        f.write(
            f"\ngone: {{title: Gone, kind: stac-api, href: '{href}', collection: c, offset: {{value: -1000}}}}\n"
        )
    yield tmp_path / "world"
    server.shutdown()
    server.server_close()


def test_a_source_that_does_not_answer(gone, tmp_path):
    """No zeros are made up for it: nothing of those site-years is written."""
    out, err = run(gone, tmp_path / "audit", ok=1, source="sim-earth-search,gone")
    assert err.count("error:") == 1  # one line per source, however many site-years
    assert "error: pit 2020 and 1 other site-years are not audited, gone: http://127.0.0.1" in err
    assert "of 2 site-years, 0 have too few usable dates and 2 could not be audited" in err
    assert out == ""
    assert not (tmp_path / "audit").exists()


def test_a_year_that_could_not_be_audited_leaves_the_others(world, tmp_path, monkeypatch):
    search = scenes.search

    def sometimes(site, year, *sources):
        if year == 2020:
            raise SceneError("the API is down")
        return search(site, year, *sources)

    monkeypatch.setattr(scenes, "search", sometimes)
    _, err = run(world, tmp_path / "audit", ok=1)
    assert err.count("error: pit 2020 is not audited, sim-") == 2
    assert "1 could not be audited" in err
    assert set(pd.read_parquet(tmp_path / "audit" / "audit.parquet")["year"]) == {2022}


def test_bad_use_leaves_nothing(world, tmp_path):
    _, err = run(world, tmp_path / "audit", ok=2, years="2012")
    assert "year 2012: expected 2015" in err
    _, err = run(world, tmp_path / "audit", "--recipe", "winter", ok=2)
    assert "unknown recipe 'winter'" in err
    (tmp_path / "file").write_text("")
    _, err = run(world, tmp_path / "file" / "audit", ok=2, source="sim-earth-search")
    assert "cannot be written to (Not a directory); name another place" in err
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_help_shows_an_example():
    out = CliRunner().invoke(cli, ["audit", "--help"]).output
    assert "Example" in out
    assert "minecube audit" in out


# The picture


def drawn(path, found, recipe=RECIPE, until=LATER):
    report.draw_coverage(
        *coverage.tabulate_coverage([listing(found)], recipe, until), path, "Usable dates by month"
    )
    return imread(path)[..., :3]


def test_the_picture_follows_the_counts(tmp_path):
    """A usable date more, a pass missed less: other pixels. The same again: the same."""
    found = [scene("S2A", "2020-05-01"), scene("S2A", "2020-07-10")]
    one = drawn(tmp_path / "one.png", found)
    np.testing.assert_array_equal(one, drawn(tmp_path / "again.png", found))
    assert (one != drawn(tmp_path / "more.png", [*found, scene("S2B", "2020-08-04")])).any()

    def area(picture, colour):
        return (np.abs(picture - to_rgb(colour)).max(axis=-1) < 0.02).sum()

    every = [scene("S2A", day) for day in coverage.derive_passes(found, 2020)]
    full = drawn(tmp_path / "full.png", every)
    # In the full year only the legend shows these colours.
    assert area(one, report.NONE_USABLE) > 5 * area(full, report.NONE_USABLE) > 0
    assert area(one, report.MISSING) > 2 * area(full, report.MISSING) > 0


@pytest.mark.parametrize("sites", [1, 60])
def test_pictures_of_few_and_of_many(tmp_path, sites):
    """Ten years of many sites are not larger than a screen scrolls; no row and no year is lost."""
    months, years = coverage.tabulate_coverage(
        [listing([scene("S2A", f"{y}-05-01")], y) for y in range(2016, 2026)], RECIPE, LATER
    )
    tables = [pd.concat([t.assign(site=f"pit_{n}") for n in range(sites)]) for t in (months, years)]
    report.draw_coverage(*tables, tmp_path / "map.png", "Usable dates by month")
    height, width = imread(tmp_path / "map.png").shape[:2]
    assert 900 < width < 2600
    assert height < 1500


def test_nothing_to_draw(tmp_path):
    months, years = coverage.tabulate_coverage([listing([])], RECIPE, LATER)
    with pytest.raises(CubeError, match="the audit has no month to draw"):
        report.draw_coverage(months[:0], years[:0], tmp_path / "map.png", "")
