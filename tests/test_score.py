"""The command `score`: what it reads in blocks is what numpy has whole, its tables agree, its pictures show them."""

from __future__ import annotations

import csv
import json
import types
from itertools import combinations

import dask.array as da
import numpy as np
import odc.geo.xr
import pandas as pd
import pytest
import xarray as xr
from click.testing import CliRunner
from matplotlib.figure import Figure
from scipy import ndimage

from known_scenes import site_of
from minecube import cube, metrics, tracks
from minecube.catalog import Recipe
from minecube.cli import cli
from minecube.errors import CubeError, LabelError
from minecube.grid import grid_of
from minecube.jobs import score as counting
from minecube.jobs.tables import format_latex
from minecube.report import scores as pictures

RECIPE = Recipe(id="small", title="t", bands=("B04", "B11"), block_px=64, chunk_px=32)
YEARS = [2019, 2020, 2022, 2023]
PAIRS = list(combinations(YEARS, 2))
SITES = {"pit": (180, 240), "pond": (130, 90), "quarry": (70, 110)}


def build(store, site, labelled=True):
    """Committed years of nothing in particular, and footprints that grow, a corner of them unknown; those footprints."""
    grid = grid_of(site)
    cube.create_site(cube.Store(store), site, grid, YEARS, RECIPE)
    for year in YEARS:
        flat = da.ones(tuple(grid.shape), chunks=64, dtype=np.uint16)
        made = {
            "reflectance": (
                ("band", "y", "x"),
                da.ones((2, *grid.shape), chunks=(2, 64, 64), dtype=np.uint16),
            ),
            "clear_count": (("y", "x"), flat),
            "quality": (("y", "x"), flat.astype(np.uint8)),
        }
        told = {
            "minecube:source": "s",
            "s2:processing_baseline": "05.00",
            "minecube:offset": 0,
            "minecube:offset_reason": "r",
        }
        scene = types.SimpleNamespace(id="a", properties=told)
        cube.write_year(
            cube.Store(store),
            xr.Dataset(made),
            cube.describe_build(site, year, grid, RECIPE, [scene]),
            b"",
        )
    y, x = np.mgrid[: grid.shape[0], : grid.shape[1]]
    away = np.hypot(y - grid.shape[0] / 2, x - grid.shape[1] / 2)
    truth = np.stack([away < min(grid.shape) / 5 + 2 * n for n in range(len(YEARS))]).astype(
        np.uint8
    )
    truth[1, :9, :11] = 255
    if labelled:
        cube.write_footprint(cube.Store(store), site.id, stack(truth, grid), origin="drawn")
    return grid, truth


def stack(values, grid):
    return xr.DataArray(
        values, dims=("year", "y", "x"), coords={"year": YEARS, **odc.geo.xr.xr_coords(grid)}
    )


def probability(truth, seed, noise):
    """Of the truth, blurred, with noise that is alike over a few pixels."""
    r = np.random.default_rng(seed)
    blurred = [ndimage.gaussian_filter((t == 1).astype(float), 2) for t in truth]
    off = [ndimage.gaussian_filter(r.standard_normal(t.shape), 2) * noise for t in truth]
    p = np.clip(np.array(blurred) + off, 0, 1) * 250
    p[:, -5:, -5:] = 255
    return p.round().astype(np.uint8)


def write_change(store, site, model, change, classes, pairs=PAIRS):
    def rows(todo):
        for view in todo:
            yield types.SimpleNamespace(view=view, y=0, values=change[PAIRS.index(view)][None])

    about = cube.Prediction(
        model=model, views=pairs, origin={"id": model}, variable="change", classes=classes
    )
    cube.write_prediction(cube.Store(store), site, about, rows)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A store of three sites, mapped by two models of footprints and one of change; and a site without labels."""
    store = str(tmp_path_factory.mktemp("score") / "cubes.zarr")
    pixels = {}
    for n, (name, (height, width)) in enumerate(SITES.items()):
        grid, truth = build(store, site_of(name, 360000 + n * 6000, 5600040, width, height))
        pixels[name] = {"truth": truth}
        for m, (model, noise) in enumerate((("sharp", 0.4), ("rough", 2.0))):
            pixels[name][model] = probability(truth, 10 * n + m, noise)
            cube.write_probability(
                cube.Store(store), name, model, stack(pixels[name][model], grid), {"id": model}
            )
        p = pixels[name]["sharp"].astype(int)
        moves = np.array(
            [
                [np.maximum(p[i] - p[j], 0), np.maximum(p[j] - p[i], 0)]
                for i, j in combinations(range(4), 2)
            ]
        )
        pixels[name]["pairs"] = moves.astype(np.uint8)
        write_change(store, name, "pairs", pixels[name]["pairs"], ("removed", "new"))
        write_change(
            store, name, "near", pixels[name]["pairs"], ("removed", "new"), [PAIRS[0], PAIRS[-1]]
        )
    grid, truth = build(store, site_of("bare", 360000 + 90000, 5600040, 60, 60), labelled=False)
    cube.write_probability(
        cube.Store(store), "bare", "sharp", stack(probability(truth, 0, 0.4), grid), {"id": "sharp"}
    )
    return store, pixels


def run(*arguments, ok=0):
    result = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert result.exit_code == ok, result.output
    return result.output


def whole(pixels, model):
    """Counts of a site at once."""
    p, y = pixels[model], pixels["truth"]
    footprint = np.where(p == 255, 255, p >= 125).astype(np.uint8)
    return metrics.count(footprint, y, YEARS) + metrics.count_probability(p, y, YEARS)


@pytest.mark.parametrize("rows", [40, 512])
def test_a_site_is_scored_by_blocks_as_it_is_whole(world, rows, monkeypatch):
    store, pixels = world
    monkeypatch.setattr(counting, "BLOCK_PX", rows)
    for name, of_site in pixels.items():
        assert counting.score_site(cube.Store(store), name, "sharp") == whole(of_site, "sharp")
        expected = metrics.count_change(
            of_site["pairs"], of_site["truth"], YEARS, PAIRS, ("removed", "new")
        )
        assert counting.score_site(cube.Store(store), name, "pairs") == expected


def test_half_is_where_a_mine_begins_here_as_in_tracks():
    levels = np.array([124, 125, 255], np.uint8).reshape(1, 1, 3)
    mapped = tracks.threshold(xr.DataArray(levels, {"year": [2020]}, ("year", "y", "x")))
    assert mapped.values.ravel().tolist() == [0, 1, 255]
    truth = xr.DataArray(np.ones_like(levels), {"year": [2020]}, ("year", "y", "x"))
    counts = metrics.count(mapped.values, truth.values, [2020])
    assert (counts.years[2020].tp, counts.years[2020].fn) == (1, 1)


def test_several_models_in_one_table(world, tmp_path):
    store, pixels = world
    out = tmp_path / "out"
    shown = run(
        *(
            "score",
            "--store",
            store,
            "--sites",
            "p*,quarry",
            "--model",
            "sharp,rough,pairs",
            "--baselines",
        ),
        *("--json", tmp_path / "scores.json", "--out", out),
    )
    found = json.loads((tmp_path / "scores.json").read_text())
    baselines = ["never changes", "always mine", "last year's map"]
    assert list(found["models"]) == ["sharp", "rough", "pairs", *baselines]
    assert all(name in shown for name in found["models"])
    sharp, rough, pairs = (found["models"][m] for m in ("sharp", "rough", "pairs"))
    pooled = metrics.finish(sum((whole(p, "sharp") for p in pixels.values()), metrics.Counts()))
    assert sharp["sites"]["pooled"] == pytest.approx(pooled)
    assert sharp["sites"]["pooled"]["iou"] > rough["sites"]["pooled"]["iou"]
    assert set(sharp["by_year"]["pooled"]) == {str(y) for y in YEARS}
    assert set(pairs["by_gap"]["pond"]) == {"1", "2", "3", "4"}
    assert not pairs["by_year"]
    assert "iou" not in pairs["sites"]["pooled"]
    assert found["models"]["never changes"]["sites"]["pooled"]["change_f1"] == 0
    # Intervals are there, of three sites, and the paired difference says which is better.
    ends = sharp["intervals"]["iou"]
    assert ends["low"] <= ends["score"] <= ends["high"]
    assert found["differences"]["rough - sharp"]["iou"]["high"] < 0
    assert "change_f1" in found["differences"]["pairs - sharp"]
    assert "iou" not in found["differences"]["pairs - sharp"]
    # The same in all files.
    rows = {
        r["model"]: r for r in csv.DictReader((out / "pooled.csv").open()) if r["name"] == "iou"
    }
    assert float(rows["sharp"]["score"]) == sharp["sites"]["pooled"]["iou"]
    text = f"{ends['score']:.3f} [{ends['low']:.3f}, {ends['high']:.3f}]"
    cells = {
        line.split("|")[1].strip(): line for line in (out / "scores.md").read_text().splitlines()
    }
    assert text in cells["sharp"]
    assert text in (out / "scores.tex").read_text()
    assert len({line.count("|") for line in cells.values()}) == 1
    assert {
        line.count("&") for line in (out / "scores.tex").read_text().splitlines() if "&" in line
    } == {16 - 1}
    by_site = list(csv.DictReader((out / "by_site.csv").open()))
    assert len(by_site) == 6 * 3
    # Counts of machines are joined without the pixels.
    counts = json.loads((out / "counts.json").read_text())
    joined = sum((metrics.Counts.of_json(c) for c in counts["sharp"].values()), metrics.Counts())
    assert metrics.finish(joined)["iou"] == sharp["sites"]["pooled"]["iou"]
    made = {p.name for p in out.glob("*.png")}
    names = (
        "iou_by_year",
        "change_f1_by_gap",
        "reliability",
        "precision_recall",
        "change_precision_recall",
    )
    assert made == {f"{n}.png" for n in names}
    assert not list(out.glob(".*"))


def test_every_year_gap_and_pair_of_every_site_is_a_row(world, tmp_path):
    store, pixels = world
    run("score", "--store", store, "--sites", "p*", "--model", "sharp,pairs", "--out", tmp_path)
    tables = {
        n: list(csv.DictReader((tmp_path / f"by_{n}.csv").open())) for n in ("year", "gap", "pair")
    }
    sites = ["pit", "pond", "pooled"]
    assert [(r["model"], r["site"], r["year"]) for r in tables["year"]] == [
        ("sharp", s, str(y)) for s in sites for y in YEARS
    ]
    for table, count in (("gap", 4), ("pair", 6)):
        each = [(m, s) for m in ("sharp", "pairs") for s in sites for _ in range(count)]
        assert [(r["model"], r["site"]) for r in tables[table]] == each
    p, y = pixels["pond"]["sharp"], pixels["pond"]["truth"]
    for (i, a), (j, b) in combinations(enumerate(YEARS), 2):
        known = (p[i] != 255) & (p[j] != 255) & (y[i] != 255) & (y[j] != 255)
        drawn, moved = ((v[i][known] >= h) != (v[j][known] >= h) for v, h in ((p, 125), (y, 1)))
        (row,) = (
            r
            for r in tables["pair"]
            if (r["model"], r["site"], r["years"]) == ("sharp", "pond", f"{a}-{b}")
        )
        assert float(row["change_f1"]) == pytest.approx(
            2 * (drawn & moved).sum() / (drawn.sum() + moved.sum())
        )


def test_counts_of_two_machines_are_joined(world, tmp_path, monkeypatch):
    store, _ = world
    ask = ("score", "--store", store, "--model", "sharp,rough", "--sites")
    run(*ask, "p*,quarry", "--json", tmp_path / "all.json", "--out", tmp_path / "all")
    for site in ("pit", "quarry"):
        run(*ask, site, "--out", tmp_path / site)
    files = [tmp_path / site / "counts.json" for site in ("pit", "quarry")]
    join = [word for file in files for word in ("--join", file)]
    run(*ask, "pond", *join, "--json", tmp_path / "joined.json")
    one, other = (
        json.loads((tmp_path / f"{n}.json").read_text())["models"] for n in ("all", "joined")
    )
    assert list(one) == list(other) == ["sharp", "rough"]
    for model, found in other.items():
        assert found["sites"] == one[model]["sites"]
        assert found["by_year"] == one[model]["by_year"]
        assert (
            found["intervals"] == one[model]["intervals"]
        )  # the same draws, whatever was counted first
    # Nothing is counted before these are seen to be wrong.
    monkeypatch.setattr(counting, "score_site", None)
    assert "pit of sharp is already counted" in run(*ask, "pit", *join, ok=2)
    assert "pit of sharp is already counted" in run(*ask, "pond", *join, *join, ok=2)
    (tmp_path / "other.json").write_text('{"sharp": {"a": {}}}')
    for wrong in (store + "/pit/zarr.json", tmp_path / "other.json"):
        assert "expected counts.json" in run(*ask, "pond", "--join", wrong, ok=2)


def test_one_site_has_no_interval_and_says_why(world, tmp_path):
    store, _ = world
    shown = run(
        "score",
        "--store",
        store,
        "--sites",
        "pond",
        "--model",
        "sharp",
        "--json",
        tmp_path / "s.json",
    )
    assert "no confidence interval" in shown
    found = json.loads((tmp_path / "s.json").read_text())["models"]["sharp"]["intervals"]["iou"]
    assert found["low"] is found["high"] is None
    assert "[" not in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--sites", "bare", "--model", "sharp"), "bare has no footprint in any built year"),
        (("--sites", "bare", "--baselines", "--model", "sharp"), "run `minecube label` first"),
        (("--sites", "pond", "--model", "none"), "no prediction of 'none' for pond"),
        (("--sites", "pond", "--model", "sharp,sharp"), "each model once"),
        (("--sites", "pont", "--model", "sharp"), "unknown site 'pont'"),
        (
            ("--sites", "pond", "--model", "sharp,near"),
            "pond is scored over 2 and 6 pairs of years",
        ),
        (
            ("--sites", "pond", "--model", "near", "--baselines"),
            "pond is scored over 6 and 2 pairs of years",
        ),
    ],
)
def test_what_cannot_be_scored_says_so_and_writes_nothing(world, tmp_path, arguments, words):
    out = tmp_path / "out"
    shown = run(
        "score", "--store", world[0], *arguments, "--out", out, "--json", tmp_path / "s.json", ok=2
    )
    assert words in shown
    assert not out.exists()
    assert not (tmp_path / "s.json").exists()


def test_labels_are_asked_for_before_predictions(world):
    with pytest.raises(LabelError, match="so nothing can be scored"):
        counting.score_site(cube.Store(world[0]), "bare", "sharp")


def test_a_place_that_cannot_be_written_says_so(world, tmp_path):
    (tmp_path / "file").write_text("")
    shown = run(
        "score",
        "--store",
        world[0],
        "--sites",
        "pond",
        "--model",
        "sharp",
        "--out",
        tmp_path / "file" / "x",
        ok=2,
    )
    assert "cannot be written" in shown


def test_names_are_safe_in_latex():
    table = pd.DataFrame({"iou": ["0.5"]}, index=pd.Index(["a_b & 50 %"], name="model"))
    assert r"a\_b \& 50 \% & 0.5 \\" in format_latex(table)


@pytest.fixture
def figures(monkeypatch):
    saved = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (saved.append(self), save(self, *a, **k))[1]
    )
    return saved


def test_pictures_show_the_tables(tmp_path, figures):
    years = pd.Series([0.5, np.nan, 0.7], index=[2019, 2020, 2021])
    pictures.draw_scores(
        {"a": years, "b": years / 2}, tmp_path / "y.png", "t", axes=("year", "IoU")
    )
    first, second = figures[-1].axes[0].lines
    assert np.array_equal(first.get_ydata(), years, equal_nan=True)
    assert (first.get_color(), first.get_marker()) != (second.get_color(), second.get_marker())
    assert [t.get_text() for t in figures[-1].legends[0].get_texts()] == ["a", "b"]
    assert figures[-1].axes[0].get_ylabel() == "IoU"
    curve = pd.DataFrame({"threshold": [0.9, 0.4], "precision": [1.0, 0.5], "recall": [0.2, 1.0]})
    pictures.draw_precision_recall({"a": curve}, tmp_path / "p.png", "t", 0.25)
    line, mark, chance = figures[-1].axes[0].lines
    assert line.get_xdata().tolist() == [0.2, 1.0]
    assert mark.get_xdata().tolist() == [0.2]  # at one half: the last threshold that is not below
    assert set(chance.get_ydata()) == {0.25}
    bins = pd.DataFrame({"predicted": [0.1, 0.9], "observed": [0.2, 0.7], "pixels": [10, 5]})
    pictures.draw_reliability({"a": bins}, tmp_path / "r.png", "t")
    assert figures[-1].axes[0].lines[1].get_ydata().tolist() == [0.2, 0.7]
    with pytest.raises(CubeError, match="no score to draw"):
        pictures.draw_reliability({}, tmp_path / "none.png", "t")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.png", "r.png", "y.png"]


def test_twenty_models_are_told_apart():
    styles = pictures.STYLES
    assert len({str(s) for s in styles}) == len(styles) == 21
