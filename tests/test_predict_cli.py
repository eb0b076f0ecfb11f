"""`minecube predict` maps the sites of a store under the name of a model."""

from __future__ import annotations

import json
import shutil

import geopandas as gpd
import numpy as np
import pytest
import xarray as xr
from click.testing import CliRunner

from known_predictions import PAIRS, RECIPE, build, pit, rows_of, store_of, years
from known_scenes import site_of
from minecube import cube
from minecube.catalog import BANDS, ModelCard
from minecube.cli import cli
from minecube.cube import Prediction
from minecube.errors import CubeError
from minecube.grid import grid_of


@pytest.fixture
def site():
    return pit()


@pytest.fixture
def store(tmp_path, site):
    return store_of(tmp_path, site)


def model_file(path, task="mapping", seed=0, **more):
    import torch

    from minecube import models

    torch.manual_seed(seed)
    card = ModelCard(
        id="tiny",
        title="t",
        architecture="unet",
        options={"width": 2, "depth": 1},
        task=task,
        window_px=32,
        multiple_px=2,
        **more,
    )
    n = len(card.bands)
    trained = models.TrainedModel(
        card=card,
        network=models.build(card).eval(),
        mean=(1500.0,) * n,
        std=(900.0,) * n,
        sites=("a",),
    )
    models.save(trained, path)
    return trained


def run(*args, ok=0):
    done = CliRunner().invoke(cli, [str(a) for a in args])
    assert done.exit_code == ok, done.output + repr(done.exception)
    return done.stdout, done.stderr


def test_predict_maps_resumes_and_says_how_fast(store, site, tmp_path):
    from minecube import models

    trained = model_file(tmp_path / "m.pt")
    ask = ("predict", "--store", str(store), "--sites", "pit", "--model", tmp_path / "m.pt")
    out, _ = run(*ask)
    assert "pit: 3 years mapped, 0.04 Mpx in " in out
    assert " Mpx/s, " in out
    assert " km2/s" in out
    name = cube.find_prediction(store, ["pit"], "tiny")
    assert f"prediction {name} ({store}, group pit/predictions/{name})" in out
    found = cube.open_probability(store, "pit", name)
    reflectance = cube.open_committed(store, "pit")["reflectance"].load()
    np.testing.assert_array_equal(found, models.predict(trained, reflectance))
    assert found.attrs["model"]["trained_on"] == ["a"]
    assert len(found.attrs["model"]["weights_sha256"]) == 64
    assert name == f"tiny-{found.attrs['model']['weights_sha256'][:8]}"
    group = json.loads((tmp_path / f"cubes.zarr/pit/predictions/{name}/zarr.json").read_text())[
        "attributes"
    ]
    assert group["done"]["2019"]["computed"].startswith("torch ")
    assert group["done"]["2019"]["computed"].endswith(" on cpu in fp32")
    assert cube.verify(store).findings == ()
    out, _ = run(*ask)
    assert "pit: mapped already" in out
    build(store, site, 2022)
    assert "pit: 1 years mapped" in run(*ask)[0]
    assert "pit: 4 years mapped" in run(*ask, "--overwrite")[0]


def test_a_second_model_leaves_the_maps_of_the_first(store, tmp_path):
    """Each by its own name, the same on every path; one name for two models only if told."""
    kept = {}
    for seed, folder in enumerate(("this year", "last year")):
        (tmp_path / folder).mkdir()
        model_file(tmp_path / folder / "m.pt", seed=seed)
        ask = ("predict", "--store", str(store), "--model", tmp_path / folder / "m.pt")
        run(*ask)
        (name,) = {
            p.name for p in (tmp_path / "cubes.zarr/pit/predictions").iterdir() if p.is_dir()
        } - {*kept}
        kept[name] = cube.open_probability(store, "pit", name).load()
        shutil.copy(tmp_path / folder / "m.pt", tmp_path / f"copy-{seed}.pt")
        assert (
            f"mapped already; prediction {name} " in run(*ask[:-1], tmp_path / f"copy-{seed}.pt")[0]
        )
    for name, found in kept.items():
        xr.testing.assert_identical(cube.open_probability(store, "pit", name).load(), found)
    first, second = kept.values()
    both = " or ".join(sorted(kept))
    for command in ("score", "export", "tracks"):
        out = ("--out", tmp_path / command)
        assert (
            f"'tiny' may mean {both}; name one of them"
            in run(command, "--store", str(store), "--model", "tiny", *out, ok=2)[1]
        )
    run(*ask, "--name", "mine")
    again = ("predict", "--store", str(store), "--model", tmp_path / "copy-0.pt", "--name", "mine")
    refused = run(*again, ok=2)[1]
    assert refused.count("error: ") == 1
    assert "pit/predictions/mine was made by another model" in refused
    xr.testing.assert_equal(cube.open_probability(store, "pit", "mine"), second)
    run(*again, "--overwrite")
    xr.testing.assert_equal(cube.open_probability(store, "pit", "mine"), first)
    for name in ("a/b", "a,b", "+hmm", ".hidden", "", "a b"):
        run(*ask, "--name", name, ok=2)


def test_verify_says_how_to_make_a_damaged_prediction_again(store, tmp_path):
    """The command that it prints mends it, be it of a model or smoothed."""
    model_file(tmp_path / "m.pt")
    run("predict", "--store", str(store), "--model", tmp_path / "m.pt", "--name", "spring")
    run(
        "tracks",
        "--store",
        store,
        "--model",
        "spring",
        "--rates",
        "0.01,0.01",
        "--out",
        tmp_path / "tracks",
    )
    assert cube.verify(store).findings == ()
    for name, command in (
        (
            "spring",
            f"minecube predict --store {store} --sites pit --model FILE --name spring --overwrite",
        ),
        ("spring+hmm", f"minecube tracks --store {store} --sites pit --model spring --out FOLDER"),
    ):
        (tmp_path / f"cubes.zarr/pit/predictions/{name}/probability/c/0/0/0").write_bytes(
            b"damaged"
        )
        assert command in [
            line.strip() for line in run("verify", "--store", str(store), ok=1)[0].splitlines()
        ]
        said = (
            command.removeprefix("minecube ")
            .replace("FILE", str(tmp_path / "m.pt"))
            .replace("FOLDER", str(tmp_path / "again"))
        )
        run(*said.split())
        assert cube.verify(store).findings == ()


def test_find_a_prediction_by_its_name_or_its_model_card(store, site, tmp_path):
    def add(name, card):
        views = years(2019, 2020, 2021)
        cube.write_prediction(
            store,
            "pit",
            Prediction(model=name, views=views, origin={"id": card}),
            lambda todo: rows_of(todo),
        )

    def find(wanted):
        return cube.find_prediction(store, ["pit"], wanted)

    with pytest.raises(
        CubeError, match="no prediction of 'unet' for pit; run `minecube predict` first"
    ):
        find("unet")
    add("unet-small-11111111", "unet-small")
    assert (
        find("unet-small")
        == find("unet-small-11111111")
        == find("=unet-small-11111111")
        == "unet-small-11111111"
    )
    for other in ("unet", "unet-small-1", "=unet-small"):  # the beginning of a name means nothing
        with pytest.raises(CubeError, match=f"no prediction of '{other}'"):
            find(other)
    add("unet-small-x", "tiny")
    assert find("tiny") == "unet-small-x"
    assert find("unet-small") == "unet-small-11111111"
    add("spring", "unet")
    assert find("unet") == "spring"
    add("unet-small-11111111+hmm", "unet-small-11111111+hmm")
    assert find("unet-small+hmm") == find("=unet-small-11111111+hmm") == "unet-small-11111111+hmm"
    assert find("unet-small") == "unet-small-11111111"
    with pytest.raises(
        CubeError,
        match=r"no prediction of 'spring\+hmm' for pit; it has spring, unet-small-11111111, unet-small-",
    ):
        find("spring+hmm")
    add("unet-small-22222222", "unet-small")
    with pytest.raises(
        CubeError,
        match="'unet-small' may mean unet-small-11111111 or unet-small-22222222; name one of them",
    ):
        find("unet-small+hmm")
    (tmp_path / "cubes.zarr/pit/predictions/unet-small-22222222/zarr.json").write_text("{")
    assert find("unet") == "spring"
    cube.pack(store, tmp_path / "cubes.zip")
    assert cube.find_prediction(cube.Store(tmp_path / "cubes.zip"), ["pit"], "unet") == "spring"


def test_a_map_named_by_its_card_alone_is_continued_or_told_apart(store, tmp_path):
    """Older versions named maps so. The same model goes on with its map; another model's map is never taken for it."""
    model_file(tmp_path / "old.pt", seed=1)
    model_file(tmp_path / "new.pt", seed=2)
    ask = ("predict", "--store", str(store), "--model")
    run(*ask, tmp_path / "old.pt", "--name", "tiny")
    assert "pit: mapped already; prediction tiny " in run(*ask, tmp_path / "old.pt")[0]
    run(*ask, tmp_path / "new.pt")
    names = {p.name for p in (tmp_path / "cubes.zarr/pit/predictions").iterdir() if p.is_dir()}
    (new,) = names - {"tiny"}
    assert new.startswith("tiny-")
    for command in ("score", "export", "tracks"):
        said = run(
            command, "--store", str(store), "--model", "tiny", "--out", tmp_path / command, ok=2
        )[1]
        assert f"'tiny' may mean =tiny or {new}; name one of them" in said
    run(
        "tracks",
        "--store",
        store,
        "--model",
        "=tiny",
        "--rates",
        "0.01,0.01",
        "--out",
        tmp_path / "tracks",
    )
    assert (tmp_path / "cubes.zarr/pit/predictions/tiny+hmm").is_dir()
    assert cube.find_prediction(store, ["pit"], "=tiny+hmm") == "tiny+hmm"


def test_nothing_is_touched_where_the_model_does_not_fit(store, tmp_path):
    model_file(tmp_path / "m.pt")
    ask = ("predict", "--store", str(store), "--model", tmp_path / "m.pt")
    run(*ask)
    before = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "cubes.zarr").rglob("*"))
    for more, words in (
        (("--device", "cuda"), "sees 0 GPUs"),
        (("--pairs", "1"), "pairs of years are for change"),
        (("--pairs", "next"), "expected gaps such as 1,2 or pairs"),
        (("--sites", "other"), "unknown site 'other'"),
    ):
        assert words in run(*ask, *more, ok=2)[1]
    model_file(tmp_path / "m.pt", bands=tuple(reversed(BANDS)))
    assert "in this order" in run(*ask, ok=2)[1]
    assert sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "cubes.zarr").rglob("*")) == before


def test_sites_without_a_committed_year_are_not_mapped(store, tmp_path):
    other = site_of("quarry", 380000, 5600040, 90, 90)
    cube.create_site(store, other, grid_of(other), (2019,), RECIPE)
    model_file(tmp_path / "m.pt")
    out, err = run("predict", "--store", str(store), "--model", tmp_path / "m.pt", ok=1)
    assert "pit: 3 years mapped" in out
    assert "not mapped, no committed year: quarry" in err
    _, err = run(
        "predict", "--store", str(store), "--sites", "quarry", "--model", tmp_path / "m.pt", ok=2
    )
    assert "no committed year in quarry" in err


def test_sites_of_a_store_are_named_by_the_file_they_were_built_of(store, site, tmp_path):
    model_file(tmp_path / "m.pt")
    other = site_of("quarry", 380000, 5600040, 90, 90)
    cube.create_site(store, other, grid_of(other), (2019,), RECIPE)
    for name, sites in (
        ("one", [site]),
        ("both", [site, site_of("dump", 390000, 5600040, 90, 90)]),
    ):
        table = gpd.GeoDataFrame(
            {"id": [s.id for s in sites]}, geometry=[s.geometry for s in sites], crs=4326
        )
        table.to_file(tmp_path / f"{name}.geojson")
    ask = ("predict", "--store", str(store), "--model", tmp_path / "m.pt", "--sites")
    out, err = run(*ask, tmp_path / "one.geojson")
    assert "pit: 3 years mapped" in out
    assert "quarry" not in out + err
    _, err = run(*ask, tmp_path / "both.geojson", ok=2)
    assert "no site 'dump' of" in err


def test_predict_maps_pairs_by_gap_and_by_name(store, tmp_path, monkeypatch):
    import torch

    from minecube import models

    class Difference(torch.nn.Module):
        def __init__(self, card):
            super().__init__()
            self.head = torch.nn.Conv2d(len(card.bands), len(card.classes), 1)

        def forward(self, x):
            return self.head(x[:, 1] - x[:, 0])

    monkeypatch.setitem(models.ARCHITECTURES, "unet", Difference)
    trained = model_file(tmp_path / "c.pt", task="change", classes=("removed", "new"))
    ask = ("predict", "--store", str(store), "--model", tmp_path / "c.pt")
    for gap in ("7", "0"):
        assert (
            "of the years 2019, 2020, 2021, found none as asked for"
            in run(*ask, "--pairs", gap, ok=2)[1]
        )
    assert not (tmp_path / "cubes.zarr/pit/predictions").exists()
    assert "pit: 2 pairs mapped" in run(*ask, "--pairs", "1")[0]
    name = cube.find_prediction(store, ["pit"], "tiny")
    found = cube.open_change(store, "pit", name)
    assert list(
        zip(found["first"].values.tolist(), found["second"].values.tolist(), strict=True)
    ) == [PAIRS[0], PAIRS[2]]
    assert "pit: mapped already" in run(*ask, "--pairs", "2019-2020")[0]
    assert "pit: 1 pairs mapped" in run(*ask)[0]
    reflectance = cube.open_committed(store, "pit")["reflectance"].load()
    expected = models.predict(trained, reflectance, pairs=[PAIRS[0], PAIRS[2], PAIRS[1]])
    found = cube.open_change(store, "pit", name)  # in the order of the years
    assert list(zip(found["first"].values, found["second"].values, strict=True)) == list(PAIRS)
    np.testing.assert_array_equal(found.values, expected.values)
    assert "expected pairs of two of the years" in run(*ask, "--pairs", "2019-2030", ok=2)[1]
