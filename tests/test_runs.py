"""Runs of a whole tiny dataset: order, what is skipped, what is made again, and why."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import geopandas as gpd
import pandas as pd
import pytest
from click.testing import CliRunner

from known_runs import (
    PLACES,
    RECIPE,
    YEARS,
    copy_dataset,
    dataset_in,
    write_polygons,
    write_scenes,
    write_sites,
)
from known_scenes import site_of
from minecube import cube
from minecube.catalog import load_dataset
from minecube.cli import cli
from minecube.cube.events import read_events
from minecube.errors import CubeError
from minecube.jobs.runs import RunOptions, run
from minecube.jobs.runs.units import STEPS, Shard, Unit
from minecube.jobs.status import read_status

SITES = tuple(PLACES)


def events_of(folder: Path) -> pd.DataFrame:
    return read_events(cube.Store(str(folder / "cubes.zarr"))).table


def hash_tree(folder: Path) -> dict[str, str]:
    """Every file below a folder with the hash of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def steps_tried(summary) -> set[tuple[str, str]]:
    return {(unit.step, unit.site) for unit in summary.results}


@pytest.fixture
def copied(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished dataset, to be changed."""
    return copy_dataset(finished_run, tmp_path / "copied")


# A first run


def test_each_unit_starts_and_ends_once_in_the_order_data_allows(finished_run: Path) -> None:
    table = events_of(finished_run)
    starts = table[table["event"] == "start"].set_index(["step", "site", "year"])["time"]
    ends = table[table["event"] == "end"].set_index(["step", "site", "year"])["time"]
    assert len(starts) == len(ends) == 2 * 2 * 2 + 6 * 2  # two steps of years, six of sites
    assert starts.index.is_unique
    assert ends.index.is_unique
    for site in SITES:
        last_build = max(ends["build", site, year] for year in YEARS)
        for year in YEARS:
            assert ends["search", site, year] <= starts["build", site, year]
        for earlier, later in (
            ("label", "score"),
            ("predict", "tracks"),
            ("tracks", "score"),
            ("tracks", "export"),
        ):
            assert ends[earlier, site, 0] <= starts[later, site, 0]
        assert last_build <= starts["predict", site, 0]
        # The rates of tracks come from the maps of all sites.
        assert max(ends["predict", other, 0] for other in SITES) <= starts["tracks", site, 0]


def test_events_tell_who_did_what_and_what_it_took(finished_run: Path) -> None:
    table = events_of(finished_run)
    ends = table[table["event"] == "end"]
    assert set(ends["state"]) == {"done"}
    assert set(table["attempt"]) == {1}
    assert (ends["seconds"] > 0).all()
    assert ends["peak_mb"].between(50, 4000).all()
    builds = ends[ends["step"] == "build"]
    assert (builds["bytes"] > 0).all()
    markers = {
        site: cube.read_markers(cube.Store(str(finished_run / "cubes.zarr")), site)
        for site in SITES
    }
    for site, year, read in builds[["site", "year", "bytes"]].itertuples(index=False):
        marker = markers[site][year]
        checks = marker["check_reads"]["bytes"]
        assert read == marker["reads"]["bytes"] + checks
    assert (ends.loc[ends["step"] != "build", "bytes"] == 0).all()
    assert ends[["version", "worker", "machine", "system"]].notna().all(axis=None)


def test_results_of_all_sites_are_joined(finished_run: Path) -> None:
    results = finished_run / "results"
    areas = pd.read_csv(results / "tracks" / "net" / "areas.csv")
    alone = [
        pd.read_csv(results / "tracks" / "net" / "sites" / site / "areas.csv") for site in SITES
    ]
    pd.testing.assert_frame_equal(areas, pd.concat(alone, ignore_index=True))
    by_site = pd.read_csv(results / "scores" / "by_site.csv")
    assert set(by_site["site"]) == set(SITES)
    catalog = json.loads((results / "export" / "catalog.json").read_text())
    children = [link["href"] for link in catalog["links"] if link["rel"] == "child"]
    assert children == [f"./{site}/collection.json" for site in SITES]
    assert all((results / "export" / href).exists() for href in children)


# Nothing to do


def test_a_second_run_starts_no_worker_and_writes_nothing(copied: Path) -> None:
    before = hash_tree(copied)
    summary = run(load_dataset(copied / "dataset.yaml"))
    assert summary.results == {}
    assert summary.exit_code == 0
    assert dict(summary.kept) == {step: 4 if step in ("search", "build") else 2 for step in STEPS}
    assert hash_tree(copied) == before


def test_a_copy_with_other_times_is_finished(
    finished_run: Path, run_world: Path, tmp_path: Path
) -> None:
    """As `cp -r` and `aws s3 sync` make it. Content decides: a changed list is found."""
    shutil.copytree(finished_run, tmp_path / "new", copy_function=shutil.copyfile)
    command = ["run", str(tmp_path / "new" / "dataset.yaml"), "--dry-run"]
    done = CliRunner().invoke(cli, command)
    rows = [line.split() for line in done.output.splitlines()[2:]]
    assert {row[0]: row[1] for row in rows} == dict.fromkeys(STEPS, "0")

    write_scenes(tmp_path, months=(5, 6))
    (tmp_path / "recipes.yaml").write_text(json.dumps({"tiny": RECIPE}))
    thin = dataset_in(tmp_path, run_world, catalog=str(tmp_path), store="thin.zarr")
    assert run(thin, RunOptions(only=("search",), sites="pit")).exit_code == 0
    for path in (tmp_path / "thin.zarr-scenes").iterdir():
        shutil.copyfile(path, tmp_path / "new" / "cubes.zarr-scenes" / path.name)
    done = CliRunner().invoke(cli, command)
    assert done.stdout.splitlines()[3].split() == ["audit", "1", "1"]
    assert "2 finished site-years are stale" in done.stderr


def test_a_finished_dataset_is_finished_in_an_object_store_too(
    copied: Path, run_world: Path, bucket: str
) -> None:
    """The state of sites is read in threads there. No worker starts."""
    url = f"{bucket}/cubes.zarr"
    objects = cube.Store(url).client()
    for path in (copied / "cubes.zarr").rglob("*"):
        if path.is_file():
            objects.put(str(path.relative_to(copied / "cubes.zarr")), path.read_bytes())
    scenes = str(copied / "cubes.zarr-scenes")
    dataset = dataset_in(copied, run_world, store=url, scenes=scenes)
    summary = run(dataset)
    assert summary.results == {}
    assert dict(summary.kept) == {step: 4 if step in ("search", "build") else 2 for step in STEPS}


def test_a_dry_run_counts_and_writes_nothing(copied: Path, run_world: Path, tmp_path: Path) -> None:
    before = hash_tree(copied)
    done = CliRunner().invoke(cli, ["run", str(copied / "dataset.yaml"), "--dry-run"])
    rows = [line.split() for line in done.stdout.splitlines()[2:]]
    assert rows[0] == ["search", "0", "4"]
    assert rows[-1] == ["export", "0", "2"]
    assert hash_tree(copied) == before
    dataset_in(tmp_path, run_world)
    before = hash_tree(tmp_path)
    done = CliRunner().invoke(cli, ["run", str(tmp_path / "dataset.yaml"), "--dry-run"])
    rows = [line.split() for line in done.stdout.splitlines()[2:]]
    assert [row[1:] for row in rows] == [["4", "0"], ["2", "0"], ["4", "0"]] + [["2", "0"]] * 5
    assert hash_tree(tmp_path) == before


# Parts of a dataset


def test_steps_sites_and_years_restrict_a_run(run_world: Path, tmp_path: Path) -> None:
    dataset = dataset_in(tmp_path, run_world)
    options = RunOptions(only=("search", "build"), sites="po*", years=(2021,))
    summary = run(dataset, options)
    assert set(summary.results) == {Unit("search", "pond", 2021), Unit("build", "pond", 2021)}
    assert cube.list_sites(cube.Store(dataset.store)) == ["pond"]
    assert list(cube.read_markers(cube.Store(dataset.store), "pond")) == [2021]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_each_site_year_is_in_exactly_one_shard(count: int) -> None:
    shards = [Shard.parse(f"{index + 1}/{count}") for index in range(count)]
    for number in range(50):
        assert sum(shard.has(f"mine_{number}", 2020) for shard in shards) == 1


def test_shards_are_the_same_on_every_machine() -> None:
    """The part of a site-year is its SHA-256 (first eight bytes, big-endian), modulo the count."""
    digest = hashlib.sha256(b"Germany_1 2020").hexdigest()[:16]
    part = int(digest, 16) % 5 + 1
    assert Shard(part, 5).has("Germany_1", 2020)


def test_shards_and_a_last_run_make_what_one_run_makes(
    finished_run: Path, run_world: Path, tmp_path: Path
) -> None:
    dataset = dataset_in(tmp_path, run_world)
    tried = []
    for part in ("1/3", "2/3", "3/3"):
        summary = run(dataset, RunOptions(shard=Shard.parse(part)))
        assert not summary.failures
        tried += list(summary.results)
        assert not (tmp_path / "results" / "scores" / "by_site.csv").exists()
    assert len(tried) == len(set(tried))
    last = run(dataset)
    assert last.exit_code == 0
    assert not {unit for unit in last.results if unit.step in ("search", "build")}
    made = hash_tree(tmp_path)
    for name, value in hash_tree(finished_run).items():
        is_pixels = "/c/" in name and "/builds/" not in name  # builds have times of reads
        if is_pixels or name.startswith(("results/tracks", "results/scores/sites")):
            assert made[name] == value, name


# Failures


def test_a_site_without_scenes_stops_no_other(run_world: Path, tmp_path: Path) -> None:
    far = site_of("far", 700000, 6200040, 48, 48)
    write_sites(tmp_path / "three.geojson", [PLACES["pit"], far])
    dataset = dataset_in(
        tmp_path,
        run_world,
        sites=str(tmp_path / "three.geojson"),
        score=None,
        export=None,
        tracks=None,
        models=None,
    )
    summary = run(dataset)
    assert summary.exit_code == 1
    assert set(summary.failures) == {Unit("search", "far", year) for year in YEARS}
    assert {result.error_class for result in summary.failures.values()} == {"data"}
    assert dict(summary.blocked) == {"build": 2, "label": 1}
    assert summary.count("label") == 1
    assert cube.list_sites(cube.Store(dataset.store)) == ["pit"]
    again = run(dataset)
    table = events_of(tmp_path)
    attempts = table[(table["event"] == "start") & (table["site"] == "far") & (table["year"] > 0)]
    assert attempts.groupby("year")["attempt"].apply(list).tolist() == [[1, 2], [1, 2]]
    assert set(again.failures) == set(summary.failures)


def test_a_source_that_is_down_fails_each_search_with_its_reason(
    run_world: Path, tmp_path: Path
) -> None:
    dataset = dataset_in(tmp_path, run_world, sources=["gone"])
    summary = run(dataset, RunOptions(only=("search", "build")))
    assert summary.exit_code == 1
    assert len(summary.failures) == 4
    assert all("no_such_items" in result.message for result in summary.failures.values())
    assert summary.blocked == {"build": 4}


def test_a_store_of_another_dataset_is_refused_before_anything_is_written(
    copied: Path, run_world: Path
) -> None:
    moved = [site_of(name, 360100, 5600040, 48, 48) for name in SITES]
    write_sites(copied / "moved.geojson", moved)
    dataset = dataset_in(copied, run_world, sites=str(copied / "moved.geojson"))
    before = hash_tree(copied)
    with pytest.raises(CubeError, match="pit"):
        run(dataset)
    assert hash_tree(copied) == before


# Changes of inputs and outputs


def test_new_polygons_are_drawn_and_scored_again(copied: Path, run_world: Path) -> None:
    write_polygons(copied / "smaller.geojson", shrink_degrees=0.0015)
    before = pd.read_csv(copied / "results" / "scores" / "by_site.csv")
    dataset = dataset_in(copied, run_world, labels={"file": str(copied / "smaller.geojson")})
    summary = run(dataset)
    assert summary.exit_code == 0
    assert steps_tried(summary) == {
        (step, site) for step in ("label", "score", "export") for site in SITES
    }
    after = pd.read_csv(copied / "results" / "scores" / "by_site.csv")
    assert not before.equals(after)


def test_deleted_results_are_made_again_and_nothing_else(copied: Path, finished_run: Path) -> None:
    shutil.rmtree(copied / "results" / "tracks" / "net" / "sites" / "pit")
    shutil.rmtree(copied / "results" / "export" / "pond")
    summary = run(load_dataset(copied / "dataset.yaml"))
    assert steps_tried(summary) == {("tracks", "pit"), ("export", "pond")}
    made = hash_tree(copied / "results" / "tracks")
    assert made == hash_tree(finished_run / "results" / "tracks")
    listed = hash_tree(copied / "results" / "export")
    assert listed.keys() == hash_tree(finished_run / "results" / "export").keys()


def test_a_changed_list_of_scenes_makes_a_site_year_stale(copied: Path, run_world: Path) -> None:
    """Stale site-years are named and left; `overwrite` builds them, and their maps, again."""
    new_list = next((copied / "cubes.zarr-scenes").glob("pit_2020_*"))
    other_year = next((copied / "cubes.zarr-scenes").glob("pit_2021_*"))
    world = copied / "world"
    world.mkdir()
    write_scenes(world, months=(5, 6))
    (world / "recipes.yaml").write_text(json.dumps({"tiny": RECIPE}))
    new_list.unlink()
    other_year.touch()  # read again, and found unchanged
    dataset = dataset_in(copied, run_world, catalog=str(world))
    before = cube.read_markers(cube.Store(dataset.store), "pit")[2020]
    summary = run(dataset)
    assert summary.stale == {Unit("build", "pit", 2020): "the scene list of 2020 has changed"}
    assert set(summary.results) == {Unit("search", "pit", 2020), Unit("audit", "pit")}
    assert cube.read_markers(cube.Store(dataset.store), "pit")[2020] == before
    summary = run(dataset, RunOptions(overwrite=True, only=("build", "predict")))
    assert set(summary.results) == {Unit("build", "pit", 2020), Unit("predict", "pit")}
    assert summary.exit_code == 0
    after = cube.read_markers(cube.Store(dataset.store), "pit")[2020]
    assert len(cube.list_used_scenes(before)) == 3
    assert len(cube.list_used_scenes(after)) == 2


def test_all_results_are_joined_again_after_they_were_deleted(copied: Path) -> None:
    before = hash_tree(copied / "results").keys()
    shutil.rmtree(copied / "results")
    assert run(load_dataset(copied / "dataset.yaml")).exit_code == 0
    assert hash_tree(copied / "results").keys() == before


def test_a_run_of_one_site_keeps_the_rates_of_all_sites(copied: Path) -> None:
    note = copied / "cubes.zarr" / ".runs" / "steps" / "rates" / "net.json"
    before = note.read_bytes()
    shutil.rmtree(copied / "results" / "tracks" / "net" / "sites" / "pit")
    dataset = load_dataset(copied / "dataset.yaml")
    assert steps_tried(run(dataset, RunOptions(sites="pit"))) == {("tracks", "pit")}
    assert note.read_bytes() == before
    assert not run(dataset).results


def test_a_damaged_marker_fails_its_site_and_no_other(copied: Path) -> None:
    (copied / "cubes.zarr" / "pit" / "builds" / "2020" / "zarr.json").write_text("{")
    shutil.rmtree(copied / "results" / "export" / "pond")
    summary = run(load_dataset(copied / "dataset.yaml"))
    assert {unit.site for unit in summary.failures} == {"pit"}
    result = summary.failures[Unit("build", "pit", 2020)]
    assert result.error_class == "data"
    assert "marker of pit 2020 is damaged" in result.message
    assert summary.results[Unit("export", "pond")].is_good
    assert summary.exit_code == 1


def test_a_finished_site_whose_polygon_was_missing_for_a_while_is_done(
    copied: Path, run_world: Path, tmp_path: Path
) -> None:
    """No event follows once the polygon is back, so the failure must not stay."""
    sites = gpd.read_file(run_world / "sites.geojson")
    sites.loc[sites["id"] == "pit", "geometry"] = None
    sites.to_file(tmp_path / "sites.geojson")
    without = dataset_in(copied, run_world, sites=str(tmp_path / "sites.geojson"))
    reported: list[Unit] = []
    assert run(without, None, lambda unit, *_: reported.append(unit)).exit_code == 1
    assert [unit for unit in reported if unit.year] == [Unit("build", "pit", y) for y in YEARS]
    status = read_status(without)
    assert status.site_years["state"].loc["pit"].eq("failed").all()
    assert status.site_years["why"].loc["pit"].str.contains("no area of interest").all()
    dataset = dataset_in(copied, run_world)
    assert run(dataset).exit_code == 0
    status = read_status(dataset)
    assert status.site_years["state"].eq("done").all()
    assert status.site_years["why"].eq("").all()
    assert status.steps.eq("done").all(axis=None)


def test_the_state_is_shown_without_the_file_of_polygons(copied: Path, run_world: Path) -> None:
    labels = {"file": str(copied / "gone.parquet")}
    status = read_status(dataset_in(copied, run_world, labels=labels))
    assert status.site_years["state"].eq("done").all()
    assert list(status.steps["label"]) == ["stale", "stale"]
    assert status.steps.drop(columns="label").eq("done").all(axis=None)


def test_a_damaged_marker_of_another_year_fails_the_step_that_needs_it(
    copied: Path, run_world: Path
) -> None:
    (copied / "cubes.zarr" / "pit" / "builds" / "2021" / "zarr.json").write_text("{")
    dataset = dataset_in(copied, run_world, years="2020")
    summary = run(dataset, RunOptions(only=("build", "label", "export")))
    assert set(summary.failures) == {Unit("label", "pit")}
    steps = read_status(dataset).steps
    assert list(steps["label"]) == ["failed", "done"]


def test_an_export_leaves_no_file_of_an_earlier_one(copied: Path, run_world: Path) -> None:
    folder = copied / "results" / "export" / "pit"
    assert list(folder.rglob("*.tif"))
    dataset = dataset_in(copied, run_world, export={"formats": ["netcdf"]})
    assert run(dataset).exit_code == 0
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["pit.nc"]


@pytest.mark.parametrize("changes", [{"id": "others"}, {"store": "results"}])
def test_a_store_of_another_kind_is_refused(copied: Path, run_world: Path, changes: dict) -> None:
    """The store of another dataset, and a folder with other files."""
    dataset = dataset_in(copied, run_world, **changes)
    before = hash_tree(copied)
    with pytest.raises(CubeError, match="name another `store`"):
        run(dataset)
    assert hash_tree(copied) == before
