"""Predictions are written in rows, committed view by view, resumed, and never opened half."""

from __future__ import annotations

import io
import json
import shutil
import types
from contextlib import suppress

import dask.array as da
import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import xarray as xr
import zarr
from click.testing import CliRunner
from zarr.core.attributes import Attributes

from known_scenes import site_of
from minecube import cube
from minecube.catalog import BANDS, ModelCard, Recipe
from minecube.cli import cli
from minecube.cube import Prediction
from minecube.errors import BusyError, CubeError
from minecube.grid import grid_of

RECIPE = Recipe(id="small", title="t", block_px=64, chunk_px=32)
PAIRS = ((2019, 2020), (2019, 2021), (2020, 2021))
NET = {"id": "net", "weights_sha256": "a"}


@pytest.fixture
def site():
    return site_of("pit", 360000, 5600040, 90, 150)


@pytest.fixture
def store(tmp_path, site):
    """Three of four years are built."""
    where = cube.Store(tmp_path / "cubes.zarr")
    cube.create_site(where, site, grid_of(site), (2019, 2020, 2021, 2022), RECIPE)
    for year in (2019, 2020, 2021):
        build(where, site, year)
    return where


def build(store, site, year, version="1", overwrite=False, seed=0, **how):
    grid, rng = grid_of(site), np.random.default_rng([year, seed])
    pixels = rng.integers(1, 3000, (10, *grid.shape)).astype(np.uint16)
    layers = {
        "clear_count": np.full(grid.shape, 3, np.uint16),
        "quality": np.ones(grid.shape, np.uint8),
    }
    made = {"reflectance": (("band", "y", "x"), da.from_array(pixels, chunks=(10, 64, 64)))}
    made |= {name: (("y", "x"), da.from_array(layer, chunks=64)) for name, layer in layers.items()}
    told = {
        "minecube:source": "s",
        "s2:processing_baseline": "05.00",
        "minecube:offset": 0,
        "minecube:offset_reason": version,
    }
    scene = types.SimpleNamespace(id=f"a{version}", properties=told)
    listed = io.BytesIO()
    pd.DataFrame({"id": [scene.id]}).to_parquet(listed)
    provenance = cube.describe_build(site, year, grid, RECIPE, [scene])
    cube.write_year(
        store,
        xr.Dataset(made),
        provenance,
        listed.getvalue(),
        cube.BuildOptions(overwrite=overwrite, **how),
    )


def value(view, y, classes=1, times=1):
    """A map's value in row y: each view, year, class and row has its own."""
    base = 7 * sum(view) + 3 * len(view) + y
    return [[(base + 50 * t + 20 * c) % 251 for c in range(classes)] for t in range(times)]


def rows_of(
    todo, heights=(7, 40, 1, 64, 38), width=90, classes=1, series=False, asked=None, dies_after=None
):
    """Rows of all views in uneven blocks; dies after so many, if asked."""
    if asked is not None:
        asked.append(list(todo))
    count = 0
    for view in todo:
        y = 0
        for height in heights:
            if dies_after is not None and count == dies_after:
                raise KeyboardInterrupt
            each = [value(view, y + n, classes, len(view) if series else 1) for n in range(height)]
            block = np.moveaxis(np.array(each, np.uint8), 0, 2)[..., None].repeat(width, axis=-1)
            yield types.SimpleNamespace(view=view, y=y, values=block)
            y, count = y + height, count + 1


def mapped(
    store, views, *, origin=NET, overwrite=False, variable="probability", classes=("mine",), **how
):
    """Which views were asked for, and then written."""
    asked = []
    prediction = Prediction(
        model="net", views=views, origin=origin, variable=variable, classes=classes
    )
    wrote = cube.write_prediction(
        store,
        "pit",
        prediction,
        lambda todo: rows_of(todo, asked=asked, classes=len(classes), **how),
        overwrite=overwrite,
    )
    assert wrote == (asked[0] if asked else [])
    return wrote


def years(*each):
    return [(year,) for year in each]


def expected(view, classes=1, series=False):
    each = [value(view, y, classes, len(view) if series else 1) for y in range(150)]
    return np.moveaxis(np.array(each, np.uint8), 0, 2)[..., None].repeat(90, axis=-1)


def whole(store, *of):
    found = cube.open_probability(store, "pit", "net")
    assert found.year.values.tolist() == list(of)
    for year in of:
        np.testing.assert_array_equal(found.sel(year=year), expected((year,))[0, 0])


def test_years_are_written_in_rows_and_found_again(store, site):
    assert mapped(store, years(2019, 2020, 2021)) == years(2019, 2020, 2021)
    whole(store, 2019, 2020, 2021)
    found = cube.open_probability(store, "pit", "net")
    assert found.odc.geobox == grid_of(site)
    assert found.attrs["model"] == NET
    assert found.attrs["builds"] == {
        str(y): a["build_id"] for y, a in cube.read_markers(store, "pit").items()
    }
    assert cube.verify(store).findings == ()
    unaided = xr.open_zarr(str(store), group="pit/predictions/net", consolidated=False)
    assert unaided.probability.dtype == np.uint8
    assert "_FillValue" not in unaided.probability.attrs


def test_pairs_have_years_and_classes(store):
    classes = ("removed", "new")
    assert mapped(store, PAIRS, variable="change", classes=classes) == list(PAIRS)
    found = cube.open_change(store, "pit", "net")
    assert found.dims == ("pair", "class", "y", "x")
    assert list(
        zip(found["first"].values.tolist(), found["second"].values.tolist(), strict=True)
    ) == list(PAIRS)
    assert found["class"].values.tolist() == list(classes)
    for n, pair in enumerate(PAIRS):
        np.testing.assert_array_equal(found[n], expected(pair, 2)[0])
    assert cube.verify(store).findings == ()
    with pytest.raises(CubeError, match="'net' maps change, not probability"):
        cube.open_probability(store, "pit", "net")


def test_a_pair_is_few_files(store, tmp_path):
    mapped(store, PAIRS, variable="change")
    files = [
        p for p in (tmp_path / "cubes.zarr/pit/predictions/net/change/c").rglob("*") if p.is_file()
    ]
    assert len(files) == 3 * 2  # of 150 x 90 px, in shards of 128


@pytest.mark.parametrize(
    ("variable", "views", "shard"), [("probability", years(2019), 64), ("change", PAIRS, 128)]
)
def test_chunks_are_of_twice_the_side_of_reflectance(store, variable, views, shard):
    mapped(store, views, variable=variable)
    array = zarr.open_array(str(store), path=f"pit/predictions/net/{variable}", mode="r")
    assert (array.chunks[-2:], array.shards[-2:]) == ((64, 64), (shard, shard))


def test_a_site_whose_place_is_damaged_is_one_sentence(store, tmp_path):
    metadata = tmp_path / "cubes.zarr/pit/zarr.json"
    about = json.loads(metadata.read_text())
    for wrong in (
        {},
        {"spatial:shape": None},
        {"spatial:shape": [1]},
        {"spatial:transform": [1, 2]},
    ):
        attrs = {k: v for k, v in about["attributes"].items() if k != "spatial:shape"} | wrong
        metadata.write_text(json.dumps({**about, "attributes": attrs}))
        with pytest.raises(CubeError, match="pit cannot be read"):
            mapped(store, years(2019))


def test_a_series_is_one_view(store):
    all_years = (2019, 2020, 2021)
    assert mapped(store, [all_years], series=True) == [all_years]
    found = cube.open_probability(store, "pit", "net")
    np.testing.assert_array_equal(found, expected(all_years, series=True)[:, 0])
    assert mapped(store, [all_years], series=True) == []
    assert cube.verify(store).findings == ()


def test_a_finished_run_does_nothing_again(store, tmp_path):
    mapped(store, years(2019, 2020, 2021))
    there = {p: p.stat().st_mtime_ns for p in (tmp_path / "cubes.zarr").rglob("*")}
    assert mapped(store, years(2019, 2020, 2021)) == []
    assert mapped(store, years(2020)) == []
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cubes.zarr").rglob("*")} == there
    assert mapped(store, years(2019, 2020, 2021), overwrite=True) == years(2019, 2020, 2021)


@pytest.mark.parametrize("blocks", [0, 3, 5, 6, 9, 14])
def test_a_killed_run_goes_on_with_the_years_that_are_not_done(store, blocks):
    with pytest.raises(KeyboardInterrupt):
        mapped(store, years(2019, 2020, 2021), dies_after=blocks)
    done = blocks // 5
    lacking = ", ".join(map(str, (2019, 2020, 2021)[done:]))
    with pytest.raises(
        CubeError, match=f"not mapped pit to its end: of 3 maps lack {lacking if done else ''}"
    ):
        cube.open_probability(store, "pit", "net")
    (finding,) = cube.verify(store).findings
    assert (finding.kind, finding.what) == ("unfinished", "predictions/net")
    assert (
        finding.found
        == f"{lacking} not mapped; run `minecube predict` again, unless it is still running"
    )
    assert mapped(store, years(2019, 2020, 2021)) == years(2019, 2020, 2021)[done:]
    whole(store, 2019, 2020, 2021)
    assert cube.verify(store).findings == ()


def test_a_killed_run_over_an_older_map_leaves_none_of_it(store):
    """Else the older map's rows would stand in the new one's."""
    mapped(store, years(2019, 2020, 2021))
    with pytest.raises(KeyboardInterrupt):
        mapped(
            store,
            years(2019, 2020, 2021),
            origin={**NET, "weights_sha256": "b"},
            dies_after=7,
            overwrite=True,
        )
    with pytest.raises(CubeError, match="of 3 maps lack 2020, 2021"):
        cube.open_probability(store, "pit", "net")
    assert mapped(store, years(2019, 2020, 2021), origin={**NET, "weights_sha256": "b"}) == years(
        2020, 2021
    )


@pytest.mark.parametrize("dies_after", [None, 7])
def test_another_model_replaces_a_prediction_only_when_told(store, dies_after):
    other = {"origin": {**NET, "weights_sha256": "b"}}
    with suppress(KeyboardInterrupt):
        mapped(store, years(2019, 2020, 2021), dies_after=dies_after)
    for how in (other, {**other, "variable": "change"}, {"variable": "change"}):
        views = PAIRS if "variable" in how else years(2019, 2020, 2021)
        with pytest.raises(
            CubeError,
            match=r"pit/predictions/net was made by another model; choose another --name, or .* --over",
        ):
            mapped(store, views, **how)
    mapped(store, years(2019, 2020, 2021))
    whole(store, 2019, 2020, 2021)
    assert mapped(store, years(2019, 2020, 2021), **other, overwrite=True) == years(
        2019, 2020, 2021
    )
    assert cube.open_probability(store, "pit", "net").attrs["model"]["weights_sha256"] == "b"
    assert mapped(store, PAIRS, variable="change", **other, overwrite=True) == list(PAIRS)
    assert cube.verify(store).findings == ()


def test_another_build_is_mapped_anew_and_no_other(store, site):
    mapped(store, years(2019, 2020, 2021))
    build(store, site, 2020, version="2", overwrite=True)
    with pytest.raises(CubeError, match="mapped pit before 2020 was built as it is now"):
        cube.open_probability(store, "pit", "net")
    assert [f.kind for f in cube.verify(store).findings] == ["stale"]
    with pytest.raises(KeyboardInterrupt):
        mapped(store, years(2019, 2020, 2021), dies_after=2)
    with pytest.raises(CubeError, match="of 3 maps lack 2020"):
        cube.open_probability(store, "pit", "net")
    assert mapped(store, years(2019, 2020, 2021)) == years(2020)
    whole(store, 2019, 2020, 2021)
    assert cube.verify(store).findings == ()


class Reads:
    """Of ten, of which some were lost."""

    def __init__(self, lost):
        self.many = {"planned": 10, "lost": lost}

    def totals(self):
        return {**self.many, "completeness": 1 - self.many["lost"] / 10}

    def lost(self):
        return []

    def to_parquet(self):
        pd.DataFrame({name: [n] for name, n in self.many.items()}).to_parquet(out := io.BytesIO())
        return out.getvalue()


def test_the_same_build_of_other_pixels_is_mapped_anew(store, site):
    """Reads that were lost are not in a build's name: it is made of the same scenes by the same recipe."""
    four = years(2019, 2020, 2021, 2022)
    build(store, site, 2022, reads=Reads(1), completeness=0.5)
    mapped(store, four)
    first = cube.read_markers(store, "pit")[2022]["build_id"]
    build(store, site, 2022, seed=1, reads=Reads(0), overwrite=True)
    assert cube.read_markers(store, "pit")[2022]["build_id"] == first
    with pytest.raises(CubeError, match="mapped pit before 2022 was built as it is now"):
        cube.open_probability(store, "pit", "net")
    assert [f.kind for f in cube.verify(store).findings] == ["stale"]
    assert mapped(store, four) == four[3:]
    cube.withdraw_years(store, "pit", [2022])
    build(store, site, 2022, seed=1, reads=Reads(0))  # the very same pixels, again
    whole(store, 2019, 2020, 2021, 2022)
    assert cube.verify(store).findings == ()


@pytest.mark.parametrize(
    ("variable", "views"), [("probability", years(2021, 2022)), ("change", [(2021, 2022)])]
)
def test_a_year_that_is_not_committed_is_not_mapped(store, site, variable, views):
    """Else its map would be of no build, and never out of date."""
    with pytest.raises(
        CubeError, match=r"(2021-)?2022 of pit is not committed, and its pixels may change"
    ):
        mapped(store, views, variable=variable)
    with pytest.raises(CubeError, match="no prediction of 'net' for pit"):
        cube.open_probability(store, "pit", "net")
    cube.withdraw_years(store, "pit", [2019])
    grid = xr.open_zarr(str(store), group="pit", consolidated=False).footprint
    with pytest.raises(CubeError, match="2019 of pit is not committed"):
        cube.write_probability(store, "pit", "net", grid, {})


def test_later_years_and_pairs_join_those_that_are_there(store, site):
    mapped(store, years(2019, 2021))
    assert mapped(store, years(2019, 2020, 2021)) == years(2020)
    whole(store, 2019, 2020, 2021)  # in their order
    build(store, site, 2022)
    with pytest.raises(CubeError, match="mapped pit before 2022 was built as it is now"):
        cube.open_probability(store, "pit", "net")
    assert mapped(store, years(2019, 2020, 2021, 2022)) == years(2022)
    whole(store, 2019, 2020, 2021, 2022)
    assert cube.verify(store).findings == ()
    change = {"variable": "change", "origin": {"id": "other"}}
    mapped(store, PAIRS[1:2], overwrite=True, **change)
    assert mapped(store, PAIRS, **change) == [PAIRS[0], PAIRS[2]]
    found = cube.open_change(store, "pit", "net")
    assert list(
        zip(found["first"].values.tolist(), found["second"].values.tolist(), strict=True)
    ) == [PAIRS[n] for n in (1, 0, 2)]
    np.testing.assert_array_equal(found[1], expected(PAIRS[0])[0])
    assert cube.verify(store).findings == ()


@pytest.mark.parametrize("dies_at", ["change", "first", "first written", "group"])
@pytest.mark.parametrize(
    "then", [(PAIRS[0], PAIRS[2]), PAIRS[:1], PAIRS], ids=["other", "fewer", "more"]
)
def test_a_run_killed_while_it_makes_room_leaves_no_pair_under_another_ones_name(
    store, monkeypatch, dies_at, then
):
    """Room is made array by array; the group says last what it is for."""
    mapped(store, PAIRS[:1], variable="change")
    name, _, written = dies_at.partition(" ")
    where, does = (
        (zarr.Array, "__setitem__" if written else "resize")
        if name != "group"
        else (Attributes, "put")
    )
    done = getattr(where, does)

    def dying(self, *args):
        if name == "group":
            raise KeyboardInterrupt
        done(self, *args)
        if self.basename == name:
            raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(where, does, dying)
        with pytest.raises(KeyboardInterrupt):
            mapped(store, PAIRS[:2], variable="change")
    mapped(store, then, variable="change")
    found = cube.open_change(store, "pit", "net")
    assert list(
        zip(found["first"].values.tolist(), found["second"].values.tolist(), strict=True)
    ) == list(then)
    for n, pair in enumerate(then):
        np.testing.assert_array_equal(found[n], expected(pair)[0])
    assert cube.verify(store).findings == ()


def test_a_series_of_more_years_is_another_one(store, site):
    mapped(store, [(2019, 2020, 2021)], series=True)
    build(store, site, 2022)
    longer = (2019, 2020, 2021, 2022)
    assert mapped(store, [longer], series=True) == [longer]
    np.testing.assert_array_equal(
        cube.open_probability(store, "pit", "net"), expected(longer, series=True)[:, 0]
    )
    assert cube.verify(store).findings == ()


def test_a_year_that_is_no_longer_committed_is_not_shown(store):
    mapped(store, years(2019, 2020, 2021))
    cube.withdraw_years(store, "pit", [2020])
    with pytest.raises(CubeError, match="mapped pit before 2020 was built as it is now"):
        cube.open_probability(store, "pit", "net")
    assert mapped(store, years(2019, 2021)) == []
    whole(store, 2019, 2021)


def constant(todo, value, meanwhile=None):
    """Maps of one value; with something else going on before the second row of the second map."""
    for n, view in enumerate(todo):
        for y in (0, 64, 128):
            if meanwhile and (n, y) == (1, 64):
                meanwhile()
            yield types.SimpleNamespace(
                view=view, y=y, values=np.full((1, 1, min(64, 150 - y), 90), value, np.uint8)
            )


@pytest.mark.parametrize(
    "other", [NET, {**NET, "weights_sha256": "b"}], ids=["same model", "another of that name"]
)
def test_of_two_runs_at_once_the_second_is_told_and_writes_nothing(store, other):
    """Else the maps of one would stand under the name, and the checksums, of the other."""
    three = years(2019, 2020, 2021)

    def meanwhile():
        with pytest.raises(
            BusyError,
            match=r"pit/predictions/net is being written by another run \(process \d+ on ",
        ):
            mapped(store, three, origin=other)

    first = Prediction(model="net", views=three, origin=NET)
    assert (
        cube.write_prediction(store, "pit", first, lambda todo: constant(todo, 5, meanwhile))
        == three
    )
    assert (cube.open_probability(store, "pit", "net") == 5).all()
    assert cube.verify(store).findings == ()


def test_two_models_map_one_site_at_once(store):
    three, others = years(2019, 2020, 2021), []

    def meanwhile():
        others.append(mapped(store, three))

    other = Prediction(model="other", views=three, origin={"id": "other"})
    assert (
        cube.write_prediction(store, "pit", other, lambda todo: constant(todo, 5, meanwhile))
        == others[0]
        == three
    )
    whole(store, 2019, 2020, 2021)
    assert (cube.open_probability(store, "pit", "other") == 5).all()
    assert cube.verify(store).findings == ()


def test_missing_rows_are_not_committed(store):
    for heights in ((7, 40), (7, 40, 1, 64)):
        with pytest.raises(
            CubeError,
            match=r"expected row \d+ of 2019, found (none|row 0 of 2020); this map is not committed",
        ):
            mapped(store, years(2019, 2020), heights=heights)
        with pytest.raises(CubeError, match="not mapped pit to its end"):
            cube.open_probability(store, "pit", "net")


def test_a_shard_that_comes_out_empty_leaves_none_of_before(store, tmp_path):
    mapped(store, years(2019))
    shard = tmp_path / "cubes.zarr/pit/predictions/net/probability/c/0/0/0"
    assert shard.exists()

    def nothing(todo):
        for view in todo:
            yield types.SimpleNamespace(
                view=view, y=0, values=np.full((1, 1, 150, 90), 255, np.uint8)
            )

    cube.write_prediction(
        store,
        "pit",
        Prediction(model="net", views=years(2019), origin=NET),
        nothing,
        overwrite=True,
    )
    assert not shard.exists()
    assert [f.kind for f in cube.verify(store).findings] == [
        "stale"
    ]  # 2020 and 2021 were not mapped


def test_flipped_bits_are_found(store, tmp_path):
    mapped(store, PAIRS, variable="change")
    shard = tmp_path / "cubes.zarr/pit/predictions/net/change/c/1/0/0/0"
    content = bytearray(shard.read_bytes())
    content[40] ^= 1
    shard.write_bytes(content)
    (finding,) = cube.verify(store).findings
    assert (finding.kind, finding.cure, finding.what) == (
        "damaged",
        "predict",
        "predictions/net/change/c/1/0/0/0",
    )
    shard.unlink()
    assert [f.kind for f in cube.verify(store).findings] == ["missing"]


def test_a_damaged_group_is_begun_anew(store, tmp_path):
    mapped(store, years(2019, 2020, 2021))
    (tmp_path / "cubes.zarr/pit/predictions/net/zarr.json").write_text("{")
    assert mapped(store, years(2019, 2020, 2021)) == years(2019, 2020, 2021)
    whole(store, 2019, 2020, 2021)


def test_other_variables_are_refused():
    with pytest.raises(
        CubeError, match="expected a prediction of probability or change, found 'height'"
    ):
        Prediction(model="net", views=years(2019), origin={}, variable="height")


# With networks, through the command line


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

    import minecube.models.unet as module

    monkeypatch.setattr(module, "difference", Difference, raising=False)
    monkeypatch.setitem(models.ARCHITECTURES, "unet", "unet:difference")
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
    np.testing.assert_array_equal(
        cube.open_change(store, "pit", name).values, expected.values[[0, 2, 1]]
    )
    assert "expected pairs of two of the years" in run(*ask, "--pairs", "2019-2030", ok=2)[1]
