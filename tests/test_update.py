"""`update` searches what is new, says what has changed and why, and builds next to the old."""

from __future__ import annotations

import datetime as dt
import json
import os
import re
import shutil
from dataclasses import replace

import icechunk
import pandas as pd
import pytest
import xarray as xr

from known_builds import items_of, run_here, write_items
from known_run_failures import make_dataset, write_dataset
from known_stores import files_of
from minecube import cube
from minecube.catalog import load_recipes
from minecube.errors import CatalogError, CubeError
from minecube.jobs.runs import RunOptions, run
from minecube.jobs.runs.inputs import load_inputs
from minecube.jobs.runs.publishing import check_publishing, publish_dataset
from minecube.jobs.runs.states import list_path
from minecube.jobs.runs.update import (
    UpdateOptions,
    choose_store,
    find_changes,
    update,
)
from minecube.jobs.scene_lists import complete_day
from minecube.scenes import snapshot

REFRESH = UpdateOptions(refresh=True)


def is_reprocessed(item):
    """Whether the archive also has an earlier processing of a scene."""
    baseline = item["properties"]["s2:processing_baseline"]
    return baseline == "05.00" and "2020" in item["id"]


@pytest.fixture
def growing(tmp_path, world):
    """A world in which no scene of 2020 has been processed again yet."""
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive/earth-search").symlink_to(world / "archive/earth-search")
    shutil.copy(world / "archive/sources.yaml", tmp_path / "archive")
    shutil.copy(world / "sites.geojson", tmp_path)
    items = items_of(world / "archive/earth-search.parquet")
    write_archive(tmp_path, [item for item in items if not is_reprocessed(item)])
    return tmp_path


def write_archive(folder, items):
    write_items(items, folder / "archive/earth-search.parquet")


def reprocess(folder, world):
    write_archive(folder, items_of(world / "archive/earth-search.parquet"))


def search_lists(dataset):
    assert run(dataset, RunOptions(only=("search",))).exit_code == 0


def save_at(dataset, year, time):
    """Set the time when the list of a year was saved."""
    stamp = time.timestamp()
    os.utime(list_path(load_inputs(dataset), "pit", year), (stamp, stamp))


@pytest.mark.parametrize(
    ("recipe", "day"),
    [
        ("annual-median", dt.date(2025, 11, 3)),  # April to October, and two days for the listing
        ("summer-bap", dt.date(2025, 11, 3)),  # June to August, in need April to October
        ("naive-median", dt.date(2025, 11, 3)),
        ("all", dt.date(2026, 1, 3)),
    ],
)
def test_a_list_is_complete_after_the_season(recipe, day):
    recipes = load_recipes()
    recipes["all"] = replace(recipes["annual-median"], months=tuple(range(1, 13)))
    assert complete_day(recipes[recipe], 2025) == day


def save_thin_list(dataset):
    """Save the list of 2020 as it would have been found in July 2020. Returns what it lacks."""
    inputs = load_inputs(dataset)
    path = list_path(inputs, "pit", 2020)
    whole = snapshot.load(path)
    july = dt.datetime(2020, 7, 1, tzinfo=dt.UTC)
    early = tuple(scene for scene in whole.scenes if scene.datetime < july)
    belongs = snapshot.hash_search(inputs.sites["pit"], 2020, inputs.job.sources)
    snapshot.save(replace(whole, scenes=early), path, belongs)
    save_at(dataset, 2020, july)
    return {scene.id for scene in whole.scenes} - {scene.id for scene in early}


def test_a_list_saved_too_early_is_searched_again(tmp_path, world):
    dataset = make_dataset(tmp_path, world)
    search_lists(dataset)
    assert not find_changes(dataset, UpdateOptions(), save=True).scenes
    late = save_thin_list(dataset)
    for save in (False, True):
        found = find_changes(dataset, UpdateOptions(), save=save)
        assert found.scenes.keys() == {("pit", 2020)}
        changes = found.scenes["pit", 2020]
        assert {(change.scene, change.kind) for change in changes} == {
            (scene, "added") for scene in late
        }
    assert not find_changes(dataset, UpdateOptions(), save=True).scenes


def test_a_run_searches_a_list_again_that_was_saved_too_early(tmp_path, world):
    """A run in January saves the list of the new year, as the neighbour of the old one."""
    dataset = make_dataset(tmp_path, world)
    search_lists(dataset)
    late = save_thin_list(dataset)
    search_lists(dataset)
    listed = snapshot.load(list_path(load_inputs(dataset), "pit", 2020))
    assert late <= {scene.id for scene in listed.scenes}
    assert not run(dataset, RunOptions(only=("search",))).results


def test_a_list_saved_after_the_season_is_not_searched(tmp_path, world):
    dataset = make_dataset(tmp_path, world)
    search_lists(dataset)
    save_thin_list(dataset)
    save_at(dataset, 2020, dt.datetime(2020, 11, 4, tzinfo=dt.UTC))
    assert not find_changes(dataset, UpdateOptions(), save=True).scenes


def test_the_list_of_a_neighbour_year_is_searched_again(tmp_path, world):
    """2021 has no scene of its own. `summer-bap` also reads those of 2020 and 2022."""
    search_lists(make_dataset(tmp_path, world))
    save_thin_list(make_dataset(tmp_path, world))
    dataset = make_dataset(tmp_path, world, years=2021, recipe="summer-bap")
    found = find_changes(dataset, UpdateOptions(), save=False)
    assert found.scenes.keys() == {("pit", 2020)}
    assert found.reasons == {("pit", 2021): "new"}


def test_a_silent_source_keeps_the_list(growing):
    dataset = make_dataset(growing, growing)
    search_lists(dataset)
    before = files_of(growing / "scenes")
    (growing / "archive/earth-search.parquet").write_bytes(b"junk")
    found = find_changes(dataset, REFRESH, save=True)
    assert set(found.unanswered) == {("pit", 2020), ("pit", 2022)}
    assert files_of(growing / "scenes") == before


def test_an_update_without_an_answer_fails_and_publishes_nothing(growing):
    """The committed years are whole, so only the silent source keeps them from being published."""
    path = write_dataset(growing, growing, publish="releases")
    run_here("run", path, "--only", "search,build")
    archive = growing / "archive/earth-search.parquet"
    archive.rename(growing / "moved.parquet")
    archive.write_bytes(b"junk")
    _, err = run_here("update", path, "--refresh", "--dry-run", ok=1)
    assert "error: pit 2020 was not searched" in err
    _, err = run_here("update", path, "--refresh", "--publish", "v1", ok=1)
    assert err.splitlines()[-1] == "v1 is not published: 2 searches had no answer; run again"
    assert not (growing / "releases").exists()
    (growing / "moved.parquet").replace(archive)
    run_here("update", path, "--refresh", "--publish", "v1")
    assert (growing / "releases").exists()


def test_an_update_adds_a_year_and_builds_reprocessed_scenes_again(
    growing, world, tmp_path_factory
):
    """Only 2020 has reprocessed scenes. 2022 is new."""
    path = write_dataset(growing, growing, years=2020, publish="releases")
    dataset = make_dataset(growing, growing, years=2020, publish="releases")
    assert run(dataset, RunOptions(only=("search", "build"))).exit_code == 0
    store = cube.Store(dataset.store)
    old = cube.open_committed(store, "pit").sel(year=[2020]).load()
    old_list = snapshot.load(list_path(load_inputs(dataset), "pit", 2020)).scenes
    old_scenes = {s["id"]: s for s in cube.read_markers(store, "pit")[2020]["scenes"]}
    reprocess(growing, world)

    before = files_of(growing)
    table = tmp_path_factory.mktemp("table") / "changes.csv"
    what = ("--year", "2022", "--refresh", "--dry-run", "--changes", table)
    out, err = run_here("update", path, *what)
    assert files_of(growing) == before
    assert set(pd.read_csv(table)["change"]) == {"reprocessed"}
    assert len(pd.read_csv(table)) == len(old_list)
    assert "write `years: 2020,2022` into its file" in err
    assert re.search(
        r"pit +2020 +S2A_33UUR_20200928_1_L2A +reprocessed +baseline 02.14 -> 05.00", out
    )
    assert re.search(r"pit +2020 +the scene list of 2020 has changed\n", out)
    assert re.search(r"pit +2022 +new\n", out)

    run_here("update", path, "--year", "2022", "--refresh", "--publish", "v1")
    markers = cube.read_markers(store, "pit")
    assert set(markers) == {2020, 2022}
    new_scenes = {s["id"]: s for s in markers[2020]["scenes"]}
    assert {s["baseline"] for s in old_scenes.values()} == {"02.14"}
    assert {s["baseline"] for s in new_scenes.values()} == {"05.00"}
    assert len(old_scenes) == len(new_scenes)
    now = cube.open_committed(store, "pit").load()
    assert (now.reflectance.sel(year=2020) != old.reflectance.sel(year=2020)).any()

    lists = {path: path.stat().st_mtime_ns for path in (growing / "scenes").iterdir()}
    again = find_changes(replace(dataset, years=(2020, 2022)), REFRESH, save=True)
    assert {path: path.stat().st_mtime_ns for path in (growing / "scenes").iterdir()} == lists
    assert (again.scenes, again.reasons, again.older) == ({}, {}, {})
    assert_published(growing / "releases", "v1", now)
    _check_another_recipe(growing, path, now)


def _check_another_recipe(folder, path, old):
    """Cubes of another recipe are built next to the old, and become current at the end."""
    text = path.read_text().replace("years: 2020", "years: 2020,2022")
    path.write_text(text + "recipe: naive-median\n")
    before = files_of(folder / "cubes.zarr")
    _, err = run_here("run", path, ok=2)
    assert "was made with recipe 'annual-median'" in err
    _, err = run_here("update", path, "--publish", "v2")
    assert files_of(folder / "cubes.zarr") == before
    (store,) = folder.glob("cubes-naive-median-*.zarr")
    assert f"store: {store}\n" in err
    new = cube.open_committed(cube.Store(store), "pit").load()
    assert (new.reflectance != old.reflectance).any()
    assert_published(folder / "releases", "v1", old)
    for version in ({"tag": "v2"}, {"branch": "main"}):
        assert_holds(folder / "releases", version, new)


def assert_published(place, tag, expected):
    assert_holds(place, {"tag": tag}, expected)


def assert_holds(place, version, expected):
    repository = icechunk.Repository.open(icechunk.local_filesystem_storage(str(place)))
    session = repository.readonly_session(**version)
    opened = xr.open_zarr(session.store, group="pit", consolidated=False)
    for name in expected.data_vars:
        if name != "spatial_ref":
            assert (opened[name].values == expected[name].values).all()


def test_another_version_of_minecube_is_left_unless_asked(tmp_path, world):
    dataset = make_dataset(tmp_path, world, years=2020)
    assert run(dataset, RunOptions(only=("search", "build"))).exit_code == 0
    marker = tmp_path / "cubes.zarr/pit/builds/2020/zarr.json"
    content = marker.read_text()
    marker.write_text(re.sub(r'"version": "[^"]*"', '"version": "0.0.1"', content, count=1))
    for rebuild, reasons, older in ((False, 0, 1), (True, 1, 0)):
        found = find_changes(dataset, UpdateOptions(rebuild=rebuild), save=False)
        assert (len(found.reasons), len(found.older)) == (reasons, older)
        assert "built by minecube 0.0.1" in str(found)


def change_marker(dataset, **changes):
    """Change attributes in the marker of 2020."""
    marker = cube.Store(dataset.store).path / "pit/builds/2020/zarr.json"
    content = json.loads(marker.read_text())
    content["attributes"] |= changes
    marker.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("marker", "accepting", "reason"),
    [
        (
            {"reads": {"planned": 100, "lost": 4, "completeness": 0.96}},
            {"min_read_completeness": 0.96},
            "more reads were lost (4) than min_read_completeness allows",
        ),
        (
            {"offset_conflicts": [{"scene": "a"}], "on_offset_conflict": "warn"},
            {"on_offset_conflict": "warn"},
            "built with on_offset_conflict warn",
        ),
    ],
)
def test_a_site_year_of_looser_rules_is_stale(tmp_path, world, marker, accepting, reason):
    dataset = make_dataset(tmp_path, world, years=2020)
    assert run(dataset, RunOptions(only=("search", "build"))).exit_code == 0
    change_marker(dataset, **marker)
    assert not find_changes(replace(dataset, **accepting), UpdateOptions(), save=False).reasons
    found = find_changes(dataset, UpdateOptions(), save=False)
    assert found.reasons == {("pit", 2020): reason}
    assert update(dataset, UpdateOptions()).exit_code == 0
    again = cube.read_markers(cube.Store(dataset.store), "pit")[2020]
    assert again["reads"]["completeness"] == 1
    assert (again["offset_conflicts"], again["on_offset_conflict"]) == ([], "drop")
    assert not find_changes(dataset, UpdateOptions(), save=False).reasons


def test_what_is_not_whole_is_not_published(tmp_path, world):
    dataset = make_dataset(tmp_path, world, publish="releases")
    assert run(dataset, RunOptions(only=("search",))).exit_code == 0
    done = publish_dataset(dataset, "v1")
    assert not done.is_good
    assert done.text == "v1 is not published: unfinished are 2 of build; run again"
    assert not (tmp_path / "releases").exists()


def test_publishing_is_checked_before_the_work(tmp_path, world):
    with pytest.raises(CatalogError, match="has no `publish`"):
        check_publishing(make_dataset(tmp_path, world), "v1")
    with pytest.raises(CubeError, match="letters, digits"):
        check_publishing(make_dataset(tmp_path, world, publish="releases"), "a/b")


def test_an_empty_store_takes_any_recipe(tmp_path, world):
    dataset = make_dataset(tmp_path, world)
    assert choose_store(dataset) is dataset
