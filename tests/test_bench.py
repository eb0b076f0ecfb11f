"""The simulated benchmark made, and networks trained, applied and scored on it by one command."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import types
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import rasterio.features
import xarray as xr
from click.testing import CliRunner

from known_builds import PROGRESS, messages_in
from minecube import cube, metrics, models, tracks
from minecube.catalog import load_presets
from minecube.cli import cli
from minecube.jobs import bench as job
from minecube.jobs.score_tables import ScoreTables
from minecube.places import Url

YEARS = (2019, 2020, 2021)
CARDS = """
mini: {title: t, architecture: unet, options: {width: 4, depth: 2}, window_px: 32, multiple_px: 4}
mini-pairs:
  {title: t, architecture: fc-ef, task: change, classes: [changed], options: {width: 4}, window_px: 32, multiple_px: 16}
"""
PRESETS = """
quick: {title: t, windows: 24, epochs: 2, batch: 8, rare: 0.5, learning_rate: 0.01}
"""
SPLIT = ("--train", "train_*", "--valid", "valid_*", "--test", "test_*")


def workflow():
    path = Path(__file__).parents[1] / "workflows" / "simulated.py"
    spec = importlib.util.spec_from_file_location("simulated", path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Four sites of three years, and a catalogue of small networks."""
    folder = tmp_path_factory.mktemp("bench")
    simulated = workflow()
    counts = {"train": 1, "valid": 1, "test": 2}
    sites = simulated.draw_sites(counts, 600)
    sites.to_file(folder / "sites.geojson")
    made = simulated.World(years=YEARS, dates_per_year=4, winter_dates=0, styles=(simulated.STYLE,))
    for site in simulated.load_sites(folder / "sites.geojson", catalogue=True):
        simulated.make_site(site, folder, YEARS, made)
    (folder / "models.yaml").write_text(CARDS)
    (folder / "presets.yaml").write_text(PRESETS)
    return folder


def bench(world, out, *more, ok=0):
    common = [
        "bench",
        "--store",
        str(world / "cubes.zarr"),
        "--catalog",
        str(world),
        "--preset",
        "quick",
        "--out",
        str(out),
    ]
    done = CliRunner().invoke(cli, [*common, *(more or (*SPLIT, "--models", "mini*"))])
    assert done.exit_code == ok, done.output
    return done.output


@pytest.fixture(scope="module")
def out(world, tmp_path_factory):
    """After a first run of one network, as if it had been stopped, and a whole one."""
    folder = tmp_path_factory.mktemp("tables")
    log = bench(world, folder, *SPLIT, "--models", "mini")
    (folder / "log").write_text(log)
    (folder / "first").write_bytes((folder / "models" / "mini.pt").read_bytes())
    bench(world, folder)
    return folder


def rows(path):
    lines = path.read_text().splitlines()
    head, *body = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])
    )
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in body}


def called(store, name):
    return cube.find_prediction(cube.Store(store), ["test_1", "test_2"], name)


def test_labels_are_the_truths_pixels(world):
    """As rasterio draws the true outlines; scenes are gone, and sites have the size asked for."""
    assert cube.list_sites(cube.Store(world / "cubes.zarr")) == [
        "test_1",
        "test_2",
        "train_1",
        "valid_1",
    ]
    for name in ("test_2", "train_1"):
        opened = cube.open_committed(cube.Store(world / "cubes.zarr"), name)
        assert opened["year"].values.tolist() == list(YEARS)
        assert opened["footprint"].shape[1:] == (60, 60)
        grid = opened.odc.geobox
        outlines = (
            gpd.read_parquet(world / "truth" / f"{name}.parquet").to_crs(grid.crs).set_index("year")
        )
        for year in YEARS:
            drawn = rasterio.features.rasterize(
                [outlines.geometry[year]], grid.shape, transform=grid.transform
            )
            assert (
                opened["footprint"].sel(year=year).values != drawn
            ).mean() < 0.002  # corners moved by the way through degrees
        assert opened["footprint"].values.any()
        assert not (world / "worlds" / name).exists()


def test_without_a_terminal_every_step_logs_lines(out):
    """24 windows of batches of 8 are 3 steps; one network and its smoothed maps on two sites."""
    lines = (out / "log").read_text().splitlines()
    texts = [line[len("2026-11-30 16:47:25Z ") :] for line in lines if PROGRESS.match(line)]
    assert texts[:2] == ["preparing", "1 of 1: mini"]
    assert texts[2].startswith("training mini 1 of 6: epoch 1, loss ")
    assert any(text.startswith("training mini 6 of 6: epoch 2, loss ") for text in texts)
    assert any(re.fullmatch(r"mapping test_1 (\d+) of \1", text) for text in texts)
    assert any(text.startswith("scoring 4 of 4: test_2 ") for text in texts)


def test_both_tables_have_every_network_and_what_must_lose(out):
    mapping, change = rows(out / "mapping.md"), rows(out / "change.md")
    nothing = ["never changes", "always mine", "last year's map"]
    assert list(mapping) == ["mini", "mini+hmm", *nothing]
    assert list(change) == ["mini-pairs", "mini", "mini+hmm", *nothing]
    assert change["never changes"]["change_f1"].startswith("0.000")
    weights = sum(p.numel() for p in models.load(out / "models" / "mini.pt").network.parameters())
    assert mapping["mini"]["M weights"] == f"{weights / 1e6:.2f}"


def test_scores_are_those_of_the_stored_maps(world, out):
    """All pixels of both test sites together, by plain numpy."""
    hit = either = moved = drawn = both = 0
    for name in ("test_1", "test_2"):
        store = str(world / "cubes.zarr")
        truth = cube.open_committed(cube.Store(store), name)["footprint"].values == 1
        found = cube.open_probability(cube.Store(store), name, called(store, "mini")).values
        assert (found != 255).all()
        found = found >= 125
        hit, either = hit + (truth & found).sum(), either + (truth | found).sum()
        change = cube.open_change(cube.Store(store), name, called(store, "mini-pairs"))
        for pair in range(change.sizes["pair"]):
            first, second = (YEARS.index(int(change[k][pair])) for k in ("first", "second"))
            b, c = truth[first] != truth[second], change.values[pair, 0] >= 125
            moved, drawn, both = moved + b.sum(), drawn + c.sum(), both + (b & c).sum()
    assert rows(out / "mapping.md")["mini"]["iou"].split()[0] == f"{hit / either:.3f}"
    assert (
        rows(out / "change.md")["mini-pairs"]["change_f1"].split()[0]
        == f"{2 * both / (moved + drawn):.3f}"
    )


def test_what_is_trained_and_mapped_is_not_done_again(world, out, monkeypatch):
    assert (out / "first").read_bytes() == (out / "models" / "mini.pt").read_bytes()
    before = {
        name: (out / name).read_text() for name in ("mapping.md", "change.md", "models/mini.json")
    }

    def refused(*_args, **_more):
        raise AssertionError("trained again")

    monkeypatch.setattr(job, "train_network", refused)
    monkeypatch.setattr(models.Mapper, "map_rows", refused)
    bench(world, out)
    assert before == {name: (out / name).read_text() for name in before}


def test_what_sees_all_years_is_held_against_all_others_and_smoothed_maps_against_their_own():
    cards = [
        types.SimpleNamespace(id=name, task=task)
        for name, task in (("a", "mapping"), ("all", "series"), ("b", "mapping"), ("two", "change"))
    ]
    assert job.list_comparisons(cards) == [
        *(("a+hmm", "a"), ("all+hmm", "all"), ("b+hmm", "b")),
        *(("all", "a"), ("all", "b"), ("all", "two")),
    ]


def test_another_benchmark_in_the_same_folder_is_refused(world, out):
    assert "other seed" in bench(world, out, *SPLIT, "--models", "mini", "--seed", "1", ok=2)
    assert json.loads((out / "bench.json").read_text())["seed"] == 0


def test_bad_use(world, tmp_path):
    twice = bench(
        world, tmp_path, "--train", "t*_1", "--valid", "valid_1", "--test", "test_*", ok=2
    )
    assert "test_1: expected each site in one part" in twice
    assert "unknown model 'gpt*'" in bench(world, tmp_path, *SPLIT, "--models", "mini,gpt*", ok=2)
    assert not any(tmp_path.iterdir())
    (tmp_path / "bench.json").write_text("[1")
    assert "is not what `minecube bench` writes" in bench(
        world, tmp_path, *SPLIT, "--models", "mini", ok=2
    )


def test_sites_without_labels_are_found_before_anything_is_trained(world, tmp_path, monkeypatch):
    store = str(world / "cubes.zarr")
    truth = cube.open_committed(cube.Store(store), "test_2")["footprint"].load()
    monkeypatch.setattr(job, "train_network", None)
    cube.write_footprint(cube.Store(store), "test_2", xr.full_like(truth, 255), origin="none")
    try:
        said = bench(world, tmp_path, *SPLIT, "--models", "mini", ok=2)
    finally:
        cube.write_footprint(cube.Store(store), "test_2", truth, origin="simulated truth")
    assert "test_2 has no footprint in any built year" in said


def test_flips_are_pooled_over_sites(world, out):
    """Changes that go back on an earlier one, pixel by pixel."""
    store, back, steps = str(world / "cubes.zarr"), 0, 0
    for name in ("test_1", "test_2"):
        found = cube.open_probability(cube.Store(store), name, called(store, "mini")).values >= 125
        changes = (np.diff(found.astype(int), axis=0) != 0).sum(axis=0)
        back, steps = (
            back + np.maximum(changes - 1, 0).sum(),
            steps + changes.size * (len(YEARS) - 1),
        )
    assert rows(out / "mapping.md")["mini"]["flips"] == f"{back / steps:.2%}"


def test_a_gap_that_nothing_was_said_of_is_no_number(world, out, tmp_path, monkeypatch):
    """Of last year's map, the first year is not there."""
    again = shutil.copytree(out, tmp_path / "again")
    monkeypatch.setattr(job, "GAPS", (1, 2, 3))
    bench(world, again)
    late = rows(again / "change.md")["last year's map"]
    assert [late[f"F1, gap {gap}"] for gap in (2, 3)] == ["n/a", ""]
    assert 0 <= float(late["F1, gap 1"]) < 1


def test_of_a_single_year_there_is_no_change_to_score(world, out, tmp_path, monkeypatch):
    store, opened, counted = str(world / "cubes.zarr"), cube.open_probability, {}
    monkeypatch.setattr(cube, "open_probability", lambda *of: opened(*of).isel(year=[0]))
    predictions = {name: called(store, name) for name in ("mini", "mini+hmm")}
    for name, prediction in predictions.items():
        maps = {
            site: tracks.threshold(cube.open_probability(cube.Store(store), site, prediction))
            for site in ("test_1", "test_2")
        }
        counted[name] = {
            site: metrics.count(found, found, YEARS[:1]) for site, found in maps.items()
        }
    benchmark = job.Benchmark(
        store=cube.Store(store),
        split=job.Split(train=[], valid=[], test=["test_1", "test_2"]),
        cards=(models.load(out / "models" / "mini.pt").card,),
        settings=load_presets()["cpu"],
        folder=tmp_path,
    )
    tables = ScoreTables.from_counts(counted, [("mini+hmm", "mini")])
    job.write_benchmark(benchmark, tables, job.ModelRuns(predictions=predictions))
    change = rows(tmp_path / "change.md")["mini"]
    assert (change["change_f1"], change["F1, gap 1"]) == ("n/a", "")
    assert rows(tmp_path / "mapping.md")["mini"]["flips"] == "n/a"


def test_in_an_object_store(world, out, bucket):
    """The same tables as on disk. A second run trains nothing."""
    place = Url(f"{bucket}/bench")
    printed = bench(world, place)
    assert "s3://mines/bench/scores/counts.json" in printed
    for name in ("bench.json", "change.tex", "scores/counts.json", "scores/iou_by_year.png"):
        assert (place / name).read_bytes() == (out / name).read_bytes()
    head = place.client().head("bench/models/mini.pt")
    assert not (place / "models" / "mini.pt.ckpt").exists()
    assert messages_in(bench(world, place)) == messages_in(printed)
    assert place.client().head("bench/models/mini.pt") == head
