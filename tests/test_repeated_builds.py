"""A build that is run again keeps, resumes or replaces what the store has."""

from __future__ import annotations

import datetime as dt
import os
import shutil
import signal
import subprocess
import sys
import time

import geopandas as gpd
import xarray as xr
import zarr

from known_builds import args, messages_in, run, run_here
from known_scenes import site_of
from minecube import cube
from minecube.catalog import load_sites, load_sources


def test_a_second_build_keeps_everything_and_needs_no_archive(world, built, tmp_path):
    """The scene lists were saved: the same build again works with the source gone, and does nothing."""
    shutil.copytree(
        world / "archive",
        tmp_path / "archive",
        ignore=shutil.ignore_patterns("earth-search", "*.parquet"),
    )
    shutil.copy(world / "sites.geojson", tmp_path)
    out, _ = run("build", *args(tmp_path, built))
    assert out.count("kept") == 2
    assert "built" not in out


def test_an_earlier_year_is_built_later(world, built, tmp_path):
    """The years are those of a store in which both were built at once."""
    store = tmp_path / "cubes.zarr"
    lists = ("--scenes", world / "cubes.zarr-scenes")
    for years in ("2022", "2020"):
        out, _ = run_here("build", *args(world, store, years), *lists)
        assert out.count("built") == 1
    stored = xr.open_zarr(store, group="pit", consolidated=False)
    assert stored.year.values.tolist() == [2022, 2020]
    added, at_once = (cube.open_committed(cube.Store(s), "pit").load() for s in (store, built))
    labels = ["footprint", "footprint_fraction"]
    xr.testing.assert_equal(added.drop_vars(labels), at_once.drop_vars(labels))
    out, _ = run_here("build", *args(world, store), *lists)
    assert out.count("kept") == 2


def test_other_scenes_are_refused_unless_told(world, built, tmp_path):
    """A scene list from which one scene is gone is another build."""
    from minecube.scenes import SearchResult, snapshot

    (site,) = load_sites(world / "sites.geojson")
    source = load_sources(world / "archive" / "sources.yaml")["sim-earth-search"]
    (lists := tmp_path / "lists").mkdir()
    for path in (world / "cubes.zarr-scenes").glob("*.parquet"):
        listed = snapshot.load(path).scenes
        summer = [
            s
            for s in listed
            if 4 <= s.datetime.month <= 10 and s.properties["eo:cloud_cover"] <= 90
        ]
        kept = [s for s in listed if "2020" not in path.name or s.id != summer[0].id]
        belongs = snapshot.hash_search(site, int(path.name.split("_")[1]), [source])
        snapshot.save(
            SearchResult(scenes=tuple(kept), listed=len(kept)), lists / path.name, belongs
        )
    store = tmp_path / "cubes.zarr"
    shutil.copytree(built, store)
    out, err = run("build", *args(world, store), "--scenes", lists, ok=1)
    assert out.count("kept") == 1
    assert "pit 2020" in err
    assert "use --overwrite to replace it" in err
    assert "1 of 2 site-years failed; " in err
    assert f"{store} keeps an older build of them" in err
    assert "1 of 2 site-years failed" in err
    out, _ = run("build", *args(world, store), "--scenes", lists, "--overwrite")
    assert (out.count("built"), out.count("kept")) == (1, 1)


def test_an_interrupted_build_goes_on(world, tmp_path):
    """Killed while it writes: what is committed stays, the rest is built by the same command."""
    import os

    store = tmp_path / "cubes.zarr"
    command = [
        sys.executable,
        "-c",
        "from minecube.cli import main; main()",
        "build",
        *map(str, args(world, store)),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(store.glob("pit/builds/*/zarr.json")) and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (130, 0)  # 0: it was through already
    if process.returncode:
        assert "run the same command again to resume" in err
    run("build", *args(world, store))
    assert list(cube.read_markers(cube.Store(store), "pit")) == [2020, 2022]


def test_a_store_keeps_the_margin_it_was_built_with(world, tmp_path):
    """The default is 1 km; stores made before there were margins, or with another one, stay as they are."""
    (tmp_path / "mine").mkdir()
    frame = gpd.read_file(world / "sites.geojson").drop(columns="margin")
    frame.to_file(tmp_path / "mine" / "sites.geojson")
    inside = ["--sites", tmp_path / "mine" / "sites.geojson"]

    def built(store, *more, ok=0):
        lists = ["--scenes", tmp_path / f"{store}-scenes"]
        return run_here(
            "build", *inside, *args(world, tmp_path / store, "2020")[2:], *lists, *more, ok=ok
        )

    assert "324 x 300 px" not in run_here("sites", "--sites", world / "sites.geojson")[0]
    out, err = run_here("sites", *inside)
    assert "EPSG:32633 324 x 300 px" in out  # 17 times 60 m more on each side
    assert err == "margin around pit: 1000 m\n"
    assert "EPSG:32633 144 x 120 px" in run_here("sites", *inside, "--margin", 100)[0]
    _, err = built("old", "--margin", 0)
    assert not messages_in(err)
    assert (
        "margin" not in zarr.open_group(tmp_path / "old")["pit"].attrs["minecube"]
    )  # as in stores of earlier versions
    out, err = built("old")
    assert "kept" in out
    assert err.splitlines()[0] == f"margin around pit: 0 m, as in {tmp_path / 'old'}"
    _, err = built("old", "--margin", 500, ok=2)
    assert "lies on another grid, because its margin was 0 m and is now 500 m; use another" in err
    out, err = built("new", "--margin", 100)
    assert "built" in out
    assert "margin around pit: 100 m" in err
    out, err = built("new")
    assert "kept" in out
    assert f"margin around pit: 100 m, as in {tmp_path / 'new'}" in err
    out, _ = run_here(
        "plan",
        *inside,
        *args(world, tmp_path / "new", "2020")[2:],
        "--scenes",
        tmp_path / "new-scenes",
    )
    assert "committed" in out
    assert_same_pixels_within_the_margin(tmp_path / "new", tmp_path / "old")


def assert_same_pixels_within_the_margin(with_margin, without):
    wide, narrow = (
        xr.open_zarr(store, group="pit", consolidated=False) for store in (with_margin, without)
    )
    assert (wide.sizes["x"], wide.sizes["y"]) == (144, 120)  # twice 60 m on each side
    assert wide.x.values[12:-12].tolist() == narrow.x.values.tolist()
    assert wide.y.values[12:-12].tolist() == narrow.y.values.tolist()


def test_a_list_of_another_site(world, built, tmp_path):
    lists = tmp_path / "lists"
    lists.mkdir()
    for year in (2020, 2022):
        shutil.copy(
            world / "cubes.zarr-scenes" / f"pit_{year}_sim-earth-search.parquet",
            lists / f"far_{year}_sim-earth-search.parquet",
        )
    far = site_of("far", 460000, 5600040, 60, 60)
    gpd.GeoDataFrame({"id": ["far"]}, geometry=[far.geometry], crs=4326).to_file(
        tmp_path / "sites.geojson"
    )
    shutil.copytree(
        world / "archive", tmp_path / "archive", ignore=shutil.ignore_patterns("earth-search")
    )
    for command in ("build", "plan"):
        _, err = run(command, *args(tmp_path, tmp_path / "new.zarr"), "--scenes", lists, ok=2)
        assert "the saved list for far 2020 from sim-earth-search holds scenes elsewhere" in err
    assert not (tmp_path / "new.zarr").exists()


def test_a_list_saved_in_the_season_is_built_from_with_a_warning(world, tmp_path):
    """A list of 2020 that was saved in January 2020, as the neighbour of 2019, lacks the summer."""
    lists = tmp_path / "lists"
    once = ["--scenes", lists]
    run_here("build", *args(world, tmp_path / "first", "2020"), *once)
    (saved,) = lists.glob("pit_2020_*.parquet")
    january = dt.datetime(2020, 1, 20, tzinfo=dt.UTC).timestamp()
    os.utime(saved, (january, january))
    _, err = run_here("build", *args(world, tmp_path / "second", "2020"), *once)
    assert "pit 2020: the scene list was saved before the end of the season" in err
    assert str(saved) in err
    after = dt.datetime(2020, 11, 3, 12, tzinfo=dt.UTC).timestamp()
    os.utime(saved, (after, after))
    _, err = run_here("build", *args(world, tmp_path / "third", "2020"), *once)
    assert "scene list" not in err
