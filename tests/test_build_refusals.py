"""A build with wrong options, sites or sources is refused in one sentence, and writes nothing."""

from __future__ import annotations

import re
import shutil
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import geopandas as gpd
import pytest
import yaml
from shapely.geometry import box

from known_builds import args, items_of, run, run_here, write_items
from minecube.catalog import load_sites


def test_dry_run_writes_nothing(world, tmp_path):
    out, _ = run("build", *args(world, tmp_path / "new.zarr"), "--dry-run")
    assert "nothing was read or written" in out
    assert "to build" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--years": "2012"}, "year 2012: expected 2015"),
        ({"--years": "2099"}, "year 2099: expected 2015"),
        ({"--device": "gpu7"}, "device 'gpu7' is not one that torch knows"),
        (
            {"--recipe": "winter-mean"},
            "unknown recipe 'winter-mean'; there is: annual-geomedian, annual-median",
        ),
        ({"--source": "nasa"}, "unknown source 'nasa'"),
        ({"--store": "/proc/cubes.zarr"}, "cannot be written"),
        ({"--sites": "Germany_1"}, "site 'Germany_1' has no area of interest yet"),
        ({"--scheduler": "tcp://127.0.0.1:1"}, "no Dask scheduler answers at tcp://127.0.0.1:1"),
        ({"--scheduler": "cluster"}, "no Dask scheduler answers at cluster (missing port number"),
    ],
)
def test_a_bad_build(world, tmp_path, change, said, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = dict(zip(*[iter(args(world, tmp_path / "new.zarr"))] * 2, strict=True)) | change
    _, err = run_here("build", *[v for pair in given.items() for v in pair], ok=2)
    assert said in err
    assert list(tmp_path.iterdir()) == []


def test_a_country_is_shown_its_plan_and_not_built(world, tmp_path):
    (pit,) = load_sites(world / "sites.geojson")
    x, y = pit.geometry.centroid.coords[0]
    gpd.GeoDataFrame(
        {"id": ["country"]}, geometry=[box(x - 1, y - 0.7, x + 1, y + 0.7)], crs=4326
    ).to_file(tmp_path / "country.geojson")
    given = [
        "--sites",
        tmp_path / "country.geojson",
        *args(world, tmp_path / "new.zarr", "2020")[2:],
    ]
    out, err = run_here("build", *given, ok=2)
    assert "MB a block" in out  # the plan
    (km2,) = re.findall(r"country \(([\d,]+) km2\): larger than 2500 km2", err)
    assert (
        18_000 < int(km2.replace(",", "")) < 28_000
    )  # 1.4 of 111 km by 2 of 65..75, and what the grid adds at its corners
    assert [f.name for f in tmp_path.iterdir()] == ["country.geojson"]


def test_a_large_site_is_built_when_asked_twice(world, tmp_path, monkeypatch):
    monkeypatch.setattr("minecube.cli.build.LARGE_KM2", 1)
    asked = args(world, tmp_path / "new.zarr", "2020")
    assert "pit (1 km2): larger than 1 km2" in run_here("build", *asked, ok=2)[1]
    assert "built" in run_here("build", *asked, "--yes")[0]


def test_an_empty_search_says_how_to_widen_it_and_leaves_nothing(world, tmp_path):
    _, err = run("build", *args(world, tmp_path / "new.zarr", years="2019"), ok=1)
    assert "no scene of 2019 over pit (west, south, east, north" in err
    assert "try another year or --source" in err
    assert list(tmp_path.iterdir()) == []


def test_bad_sources(world, tmp_path, monkeypatch):
    """Each is one sentence, exit 2, and nothing written."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    shutil.copytree(
        world / "archive", tmp_path / "archive", ignore=shutil.ignore_patterns("earth-search")
    )
    shutil.copy(world / "sites.geojson", tmp_path)
    known = yaml.safe_load((tmp_path / "archive" / "sources.yaml").read_text())
    raw = items_of(tmp_path / "archive" / "earth-search.parquet")[:4]
    for item in raw:
        item["properties"].pop("s2:datastrip_id")
    write_items(raw, tmp_path / "archive" / "unusable.parquet")
    with html_server() as url:
        known["keyless"] = {
            **known["sim-earth-search"],
            "access": {"kind": "s3", "href": "https://eodata.example.org"},
        }
        known["html"] = {**known["sim-earth-search"], "kind": "stac-api", "href": url}
        known["unusable"] = {**known["sim-earth-search"], "href": "unusable.parquet"}
        (tmp_path / "archive" / "sources.yaml").write_text(yaml.safe_dump(known))
        for source, code, said in (
            ("keyless", 2, "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY not set"),
            ("html", 1, "the search for 2020 failed"),
            ("unusable", 2, "names no acquisition"),
            ("html,html", 2, "expected each source once"),
        ):
            before = sorted(tmp_path.rglob("*"))
            out, err = run("build", *args(tmp_path, tmp_path / "new.zarr", source=source), ok=code)
            (line,) = [x for x in err.splitlines() if x.startswith("error: ")]
            assert said in line
            assert out == ""
            assert sorted(tmp_path.rglob("*")) == before
    known["html"]["access"] = {"kind": "ftp"}
    (tmp_path / "archive" / "sources.yaml").write_text(yaml.safe_dump(known))
    _, err = run("build", *args(tmp_path, tmp_path / "new.zarr"), ok=2)
    assert (
        "sources.yaml: entry 'html': field 'kind': expected one of plain, planetary-computer, s3"
        in err
    )


@contextmanager
def html_server():
    """Answers everything with a page."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<html>maintenance</html>")

        do_POST = do_GET  # noqa: N815  what the server calls

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
