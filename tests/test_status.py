"""`minecube status`: from markers and event logs alone."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace

import geopandas as gpd
import pandas as pd
import pytest
import shapely
from click.testing import CliRunner

from known_scenes import site_of
from known_stores import RECIPE, year_of
from minecube import cube
from minecube.catalog import load_dataset
from minecube.catalog.dataset import TEMPLATE
from minecube.cli import cli
from minecube.cube.events import DEAD_S, EventLog, read_events
from minecube.grid import grid_of
from minecube.jobs.status import read_status, read_store_status
from minecube.places import place_of

YEARS = (2019, 2020, 2021)


def commit(store, site, year, lost=0, version=None):
    """Commit a site-year, with lost reads or by another version."""
    grid = grid_of(site)
    cube.create_site(store, site, grid, YEARS, RECIPE)
    provenance = cube.describe_build(site, year, grid, RECIPE, [])
    provenance["version"] = version or provenance["version"]
    if lost:
        provenance["reads"] = {"planned": 100, "lost": lost, "completeness": 1 - lost / 100}
    cube.write_year(store, year_of(grid, 0), provenance, b"scene list")


@pytest.fixture
def dataset(tmp_path):
    """Two sites of 48 x 48 px; nothing is built."""
    sites = [
        site_of(name, 360000 + at, 5600040, 48, 48) for name, at in (("pit", 0), ("pond", 3000))
    ]
    frame = gpd.GeoDataFrame(
        {"id": [s.id for s in sites], "margin": [0, 0]},
        geometry=[s.geometry for s in sites],
        crs=4326,
    )
    frame.to_file(tmp_path / "sites.geojson")
    path = tmp_path / "dataset.yaml"
    path.write_text(
        "id: two\nsites: sites.geojson\nyears: 2019-2021\nsources: [earth-search]\n"
        "store: cubes.zarr\nprices: prices.yaml\n"
    )
    (tmp_path / "prices.yaml").write_text("per_gb: 0.5\nper_1000_requests: 2.0\n")
    return path, cube.Store(tmp_path / "cubes.zarr"), sites


def event(site, year, kind="end", step="build", **more):
    return {"event": kind, "step": step, "site": site, "year": year, "attempt": 1, **more}


def states_of(status):
    return {f"{site} {year}": state for (site, year), state in status.site_years["state"].items()}


def test_without_any_run(dataset):
    path, _, _ = dataset
    status = read_status(load_dataset(path))
    assert set(states_of(status).values()) == {"to do"}
    assert status.left is None


def test_each_state(dataset):
    path, store, (pit, _) = dataset
    commit(store, pit, 2019)
    commit(store, pit, 2020, lost=3)
    commit(store, pit, 2021, version="0.0.9")
    dead = EventLog(store)
    dead.write(event("pond", 2019, "start"))
    old = time.time() - DEAD_S - 5
    os.utime(store.path / ".runs" / "events" / f"{dead.worker}.jsonl", (old, old))
    log = EventLog(store)
    log.write(event("pond", 2020, "start"))
    log.write(event("pond", 2020, state="failed", error_class="data", message="no scene"))
    log.write(event("pond", 2021, "start"))
    status = read_status(replace(load_dataset(path), min_read_completeness=0.97))
    assert states_of(status) == {
        "pit 2019": "done",
        "pit 2020": "gaps",
        "pit 2021": "stale",
        "pond 2019": "interrupted",
        "pond 2020": "failed",
        "pond 2021": "running",
    }
    table = status.site_years
    assert table.loc[("pit", 2020), "why"] == "3 reads were lost"
    assert table.loc[("pit", 2021), "why"] == "built by minecube 0.0.9"
    assert table.loc[("pond", 2020), "why"] == "no scene"
    assert table.loc[("pond", 2020), "error_class"] == "data"
    strict = read_status(load_dataset(path)).site_years.loc[("pit", 2020)]
    assert strict["state"] == "stale"
    assert strict["why"] == "more reads were lost (3) than min_read_completeness allows"
    assert status.km2 == pytest.approx(3 * 0.48 * 0.48)  # three years of 48 x 48 pixels of 10 m


@pytest.mark.parametrize(
    ("polygon", "reason"),
    [
        (None, "has no area of interest yet"),
        (shapely.box(-179.9, 0, 179.9, 1), "expected at most 100000 per side"),
    ],
)
def test_a_site_without_a_grid_hides_no_other(dataset, polygon, reason):
    path, store, (pit, pond) = dataset
    commit(store, pit, 2019)
    commit(store, pond, 2019)
    frame = gpd.read_file(path.with_name("sites.geojson"))
    frame.loc[frame["id"] == "pond", "geometry"] = polygon
    frame.to_file(path.with_name("sites.geojson"))
    status = read_status(load_dataset(path))
    assert states_of(status)["pit 2019"] == "done"
    assert states_of(status)["pond 2019"] == "failed"
    assert reason in status.site_years.loc[("pond", 2019), "why"]


def test_a_failed_step_says_why(dataset):
    path, store, _ = dataset
    log = EventLog(store)
    for site, state, more in (
        ("pond", "failed", {"error_class": "network", "message": "no answer"}),
        ("pond", "failed", {"error_class": "disk", "message": "no space left"}),
        ("pit", "failed", {"error_class": "data", "message": "no list"}),
        ("pit", "done", {}),
    ):
        log.write(event(site, 0, "start", step="audit"))
        log.write(event(site, 0, step="audit", state=state, **more))
    (failure,) = read_status(load_dataset(path)).step_failures.to_dict("records")
    assert failure == {
        "site": "pond",
        "step": "audit",
        "error_class": "disk",
        "attempts": 2,
        "why": "no space left",
    }
    printed = CliRunner().invoke(cli, ["status", str(path)]).stdout
    assert "pond audit: failed (disk), 2 attempts: no space left" in printed
    assert "no list" not in printed


def test_sums_and_cost_count_every_attempt(dataset):
    path, store, (pit, _) = dataset
    log = EventLog(store)
    for state in ("failed", "done"):
        log.write(event("pit", 2019, "start"))
        log.write(event("pit", 2019, state=state, seconds=10, bytes=5e8, requests=1500))
    commit(store, pit, 2019)
    status = read_status(load_dataset(path))
    assert status.spent == {"seconds": 20, "mb": 1000, "requests": 3000}
    assert status.cost == pytest.approx(0.5 * 1 + 2.0 * 3)
    assert status.site_years.loc[("pit", 2019), "attempts"] == 2


def test_stale_site_years_are_left_to_do_while_one_is_built_again(dataset):
    """A build has just ended. Of the other five site-years, three are stale."""
    path, store, (pit, pond) = dataset
    for year in YEARS:
        commit(store, pit, year, version="0.0.9")
    log = EventLog(store)
    for _ in range(2):
        log.write(event("pond", 2019, state="done"))
    commit(store, pond, 2019)
    waiting = []
    for site, year in (("pond", 2020), ("pit", 2019)):
        EventLog(store).write(event(site, year, "start"))  # a worker for each
        status = read_status(load_dataset(path))
        waiting.append(status.left.total_seconds() / 3600 * status.per_hour)
    # pond 2020 is running and pond 2021 to do; then pit 2019 is running, too, and two are stale.
    assert waiting == pytest.approx([2, 5], rel=1e-3)


def test_a_dry_run_counts_stale_site_years(dataset):
    path, store, (pit, _) = dataset
    commit(store, pit, 2019)
    commit(store, pit, 2020, version="0.0.9")
    result = CliRunner().invoke(cli, ["run", str(path), "--dry-run", "--only", "build"])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].split() == ["build", "4", "2"]
    assert result.stderr.startswith(
        "1 finished site-years are stale and stay as they are "
        "(first pit 2020: built by minecube 0.0.9)"
    )


def test_a_failed_rebuild_leaves_the_old_year_done(dataset):
    path, store, (pit, _) = dataset
    commit(store, pit, 2019)
    log = EventLog(store)
    log.write(event("pit", 2019, state="failed", error_class="network", message="no answer"))
    row = read_status(load_dataset(path)).site_years.loc[("pit", 2019)]
    assert (row["state"], row["why"]) == ("done", "no answer")


def test_a_store_without_dataset_and_run(dataset):
    _, store, (pit, _) = dataset
    commit(store, pit, 2020)
    assert states_of(read_store_status(store)) == {"pit 2020": "done"}


def test_a_map_that_other_tools_open(dataset, tmp_path):
    path, store, (pit, _) = dataset
    commit(store, pit, 2019)
    out = tmp_path / "states.parquet"
    result = CliRunner().invoke(
        cli, ["status", str(path), "--format", "parquet", "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    table = gpd.read_parquet(out)
    assert len(table) == 6
    assert table.crs.to_epsg() == 4326
    row = table[(table["site"] == "pit") & (table["year"] == 2019)].iloc[0]
    assert row["state"] == "done"
    assert row.geometry.equals(pit.geometry)
    assert {"why", "attempts", "seconds", "mb", "lost", "version"} <= set(table.columns)


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_files_in_an_object_store_are_as_local_ones(dataset, bucket, tmp_path, form):
    path, store, (pit, _) = dataset
    commit(store, pit, 2019)
    for out in (tmp_path / "states", f"{bucket}/states"):
        words = ["status", str(path), "--format", form, "--out", str(out)]
        result = CliRunner().invoke(cli, words)
        assert (result.exit_code, result.stdout) == (0, f"{out}: 6 site-years\n")
    assert place_of(f"{bucket}/states").read_bytes() == (tmp_path / "states").read_bytes()


def test_a_template_in_an_object_store(bucket):
    place = f"{bucket}/dataset.yaml"
    for code in (0, 2):
        result = CliRunner().invoke(cli, ["run", "--init", place])
        assert result.exit_code == code, result.output
    assert "exists already" in result.stderr
    assert place_of(place).read_bytes() == TEMPLATE.encode()


def test_formats_agree(dataset):
    path, store, (pit, _) = dataset
    commit(store, pit, 2019)
    outputs = {}
    for form in ("csv", "json", "table"):
        result = CliRunner().invoke(cli, ["status", str(path), "--format", form])
        assert result.exit_code == 0, result.output
        outputs[form] = result.stdout
    rows = [json.loads(line) for line in outputs["json"].splitlines()]
    assert [row["state"] for row in rows] == ["done"] + ["to do"] * 5
    assert outputs["csv"].count("to do") == 5
    assert "6 site-years: 1 done, 5 to do" in outputs["table"]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([], "expected either DATASET"),
        (["{dataset}", "--store", "x"], "expected either DATASET"),
        (["{dataset}", "--format", "parquet"], "expected --out"),
        (["{dataset}", "--watch"], "needs a terminal"),
        (["missing.yaml"], "cannot be read as a dataset"),
        (["--store", "missing.zarr"], "there is no store"),
    ],
)
def test_bad_use(dataset, words, found):
    path, _, _ = dataset
    result = CliRunner().invoke(cli, ["status", *[w.format(dataset=path) for w in words]])
    assert result.exit_code == 2
    assert found in result.stderr


def test_status_of_an_object_store(bucket, tmp_path):
    store = cube.Store(f"{bucket}/cubes.zarr")
    pit = site_of("pit", 360000, 5600040, 48, 48)
    commit(store, pit, 2019)
    EventLog(store).write(event("pit", 2020, "start"))
    assert states_of(read_store_status(store)) == {"pit 2019": "done", "pit 2020": "running"}
    assert isinstance(read_events(store).table, pd.DataFrame)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"}", b""),
        (b'"attributes"', b'"attribute"'),
        (b'"committed"', b'"comitted"'),
        (b'"recipe": {', b'"recipe": 5, "x": {'),
        (b'"shape": [', b'"shape": [1], "x": ['),
        (b'"shape": [', b'"shape": ["a", "b"], "x": ['),
        (b'"shape": [', b'"shape": [-1, -1], "x": ['),
        (b'"shape": [', b'"shape": [1%b], "x": [' % (b"0" * 400)),
        (b'"transform": [', b'"transform": [1%b], "x": [' % (b"0" * 400)),
        (
            b'"recipe": {',
            b'"recipe": {"id": "r", "deep": %b%b}, "x": {' % (b"[" * 100_000, b"]" * 100_000),
        ),
        (b'"crs": "', b'"crs": ["x"], "y": "'),
        (b'"recipe": {', b'"recipe": {"id": [1]}, "x": {'),
        (b'"committed": "', b'"committed": "yesterday'),
        (b'"attributes": {', b'"attributes": {"reads": {"lost": 1000000000000000000000000000000},'),
        (b'"node_type": "', b'"node_type": "\xff'),  # text that is not used, and is no UTF-8
    ],
)
def test_a_damaged_marker_is_listed_and_hides_no_other_site_year(dataset, old, new):
    path, store, (pit, pond) = dataset
    commit(store, pit, 2019)
    commit(store, pond, 2019)
    marker = store.path / "pit" / "builds" / "2019" / "zarr.json"
    content = marker.read_bytes()
    assert old in content
    marker.write_bytes(content.replace(old, new))
    status = read_status(load_dataset(path))
    assert states_of(status)["pit 2019"] == "failed"
    assert "the marker of pit 2019 is damaged" in status.site_years.loc[("pit", 2019), "why"]
    assert states_of(status)["pond 2019"] == "done"
