"""`minecube train` trains on a store's sites and reports the result."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import types
from pathlib import Path

import dask.array as da
import numpy as np
import odc.geo.xr
import pytest
import torch
import xarray as xr
from click.testing import CliRunner

from known_scenes import site_of
from known_trainings import cube
from minecube import cube as stores
from minecube.catalog import Recipe
from minecube.cli import cli
from minecube.grid import grid_of
from minecube.models import load

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sites, two of which are A's, committed and labelled; and a preset that is quick."""
    folder = tmp_path_factory.mktemp("training")
    recipe = Recipe(id="small", title="t", block_px=64, chunk_px=32)
    for n, name in enumerate(("A_1", "A_2", "B_1")):
        site, of = site_of(name, 360000 + n * 6000, 5600040, 48, 54), cube(n, 54, 48)
        grid = grid_of(site)
        stores.create_site(stores.Store(folder / "cubes.zarr"), site, grid, (2019, 2020), recipe)
        for at, year in enumerate((2019, 2020)):
            pixels = da.from_array(of.reflectance.values[at], chunks=(10, 64, 64))
            made = {"reflectance": (("band", "y", "x"), pixels)}
            made["clear_count"] = (("y", "x"), da.ones((54, 48), chunks=64, dtype=np.uint16))
            made["quality"] = (("y", "x"), da.ones((54, 48), chunks=64, dtype=np.uint8))
            told = {"minecube:source": "s", "s2:processing_baseline": "05.00", "minecube:offset": 0}
            scene = types.SimpleNamespace(id="a", properties=told | {"minecube:offset_reason": "r"})
            provenance = stores.describe_build(site, year, grid, recipe, [scene])
            stores.write_year(
                stores.Store(folder / "cubes.zarr"), xr.Dataset(made), provenance, b""
            )
        coordinates = {"year": [2019, 2020], **odc.geo.xr.xr_coords(grid)}
        masks = xr.DataArray(of.footprint.values, dims=("year", "y", "x"), coords=coordinates)
        stores.write_footprint(stores.Store(folder / "cubes.zarr"), name, masks, origin="drawn")
    quick = "quick:\n  title: t\n  epochs: 3\n  batch: 8\n  windows: 16\n  window_px: 24\n  patience: 9\n"
    (folder / "presets.yaml").write_text(quick)
    return folder


def command(store: Path, out: Path, *more: str) -> list[str]:
    usual = {
        "--store": str(store / "cubes.zarr"),
        "--catalog": str(store),
        "--preset": "quick",
        "--out": str(out),
    }
    start = [
        word for option, value in usual.items() if option not in more for word in (option, value)
    ]
    return ["train", *start, *more]


def test_the_command_trains_and_says_what_came_of_it(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "model.pt"
    done = CliRunner().invoke(cli, command(store, out, "--valid", "B_*", "--epochs", "2"))
    assert done.exit_code == 0, done.output
    trained = load(out)
    assert trained.sites == ("A_1", "A_2")  # what judges is left out
    with (tmp_path / "model.pt.csv").open() as file:
        rows = list(csv.DictReader(file))
    best = max(rows, key=lambda row: float(row["f1"]))
    scores = f"F1 {float(best['f1']):.3f} and IoU {float(best['iou']):.3f} on B_1"
    assert f"unet-small trained on A_1, A_2; epoch {best['epoch']} of 2, {scores}" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "model.pt",
        "model.pt.ckpt",
        "model.pt.csv",
    ]
    resumed = CliRunner().invoke(cli, command(store, out, "--valid", "B_*", "--resume"))
    assert resumed.exit_code == 2
    assert "differs in settings's epochs (2, now 3)" in resumed.output


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--valid", "*"), "no site is left to learn from, because --valid * names them all"),
        (("--valid", "C_*"), "unknown site 'C_*'"),
        (
            ("--preset", "fast"),
            "unknown preset 'fast'; there is: cpu, default, demo, published-change",
        ),
        (("--device", "gpu7"), "device 'gpu7' is not one that torch knows"),
        (("--device", "cuda"), "sees 0 GPUs here"),
        (("--out", "nowhere/model.pt"), "nowhere/model.pt: its folder is not there"),
        (("--preset", "published-mapping", "--model", "odd"), "unknown model 'odd'"),
        (("--seed", "-1"), "-1 is not in the range"),
    ],
)
def test_bad_use_of_the_command(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...], words: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, command(store, Path("model.pt"), *more))
    assert done.exit_code == 2
    assert words in done.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_torchrun_starts_several_that_train_one_network(store: Path, tmp_path: Path) -> None:
    main = tmp_path / "main.py"
    main.write_text("from minecube.cli import main\nmain()\n")
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(main),
    ]
    done = subprocess.run(
        launch + command(store, tmp_path / "model.pt", "--valid", "B_1", "--workers", "1"),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained on A_1, A_2") == 1  # one speaks
    assert load(tmp_path / "model.pt").sites == ("A_1", "A_2")
