"""`minecube audit` writes the coverage of an archive, and says what is missing."""

from __future__ import annotations

import shutil
import threading
from contextlib import ExitStack
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
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from known_api import serve_api
from known_builds import messages_in
from known_scenes import site_of
from minecube import report
from minecube.cli import cli
from minecube.scenes import coverage
from minecube.simulate import World, passes, simulate_archive


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
    assert not messages_in(err)
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
    assert not messages_in(err)
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


@pytest.fixture
def half_down(world, tmp_path):
    """The same catalogue by APIs that refuse searches of 2020."""
    shutil.copytree(world, tmp_path / "world")
    path = tmp_path / "world" / "catalog" / "sources.yaml"
    known = yaml.safe_load(path.read_text())
    with ExitStack() as servers:
        for style in ("earth-search", "planetary-computer"):
            items = [i.to_dict(transform_hrefs=False) for i in raw_items(world, style)]
            api = servers.enter_context(serve_api(items))
            api.down = "2020"
            for item in items:
                for band, asset in item["assets"].items():
                    asset["href"] = f"{api.url}/{band}.tif"
            known[f"sim-{style}"] |= {"kind": "stac-api", "href": api.url, "searches_per_s": 100}
        path.write_text(yaml.safe_dump(known))
        yield tmp_path / "world"


def test_a_year_that_could_not_be_audited_leaves_the_others(half_down, tmp_path):
    _, err = run(half_down, tmp_path / "audit", ok=1)
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
