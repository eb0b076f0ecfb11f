"""Windows are what plain slices of the opened cube are, whoever cuts them."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import dask.array as da
import numpy as np
import obstore
import odc.geo.xr
import pytest
import xarray as xr
import zarr
from hypothesis import given
from hypothesis import settings as having
from hypothesis import strategies as st

from known_scenes import site_of
from minecube import cube, train
from minecube.catalog import ModelCard, Recipe, TrainingSettings
from minecube.cube.read import pixels as module
from minecube.cube.write import sites as creation
from minecube.errors import CubeError
from minecube.grid import grid_of

RECIPE = Recipe(id="small", title="t", bands=("B04", "B11"), block_px=64, chunk_px=32)
SIZES = {"pit": (240, 180), "pond": (48, 54)}


def built(store, site, years, recipe=RECIPE):
    """Pixels no two of which are equal, a block and a year without any, and labels of all three kinds."""
    grid = grid_of(site)
    cube.create_site(store, site, grid, years, recipe)
    for n, year in enumerate(years[:-1]):
        pixels = (
            np.arange(2 * grid.shape[0] * grid.shape[1]).reshape(2, *grid.shape) % 65521 + n + 1
        )
        pixels[:, 64:128, :64] = 0
        side = recipe.block_px
        flat = da.ones(tuple(grid.shape), chunks=side, dtype=np.uint16)
        made = {
            "reflectance": (
                ("band", "y", "x"),
                da.from_array(pixels.astype(np.uint16), chunks=(2, side, side)),
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
            store, xr.Dataset(made), cube.describe_build(site, year, grid, recipe, [scene]), b""
        )
    mask = np.random.default_rng(0).choice([0, 1, 255], (len(years), *grid.shape)).astype(np.uint8)
    mask[:, :, :64] = 255
    masks = xr.DataArray(
        mask, dims=("year", "y", "x"), coords={"year": years, **odc.geo.xr.xr_coords(grid)}
    )
    cube.write_footprint(store, site.id, masks, origin="drawn")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    where = cube.Store(tmp_path_factory.mktemp("windows") / "cubes.zarr")
    for n, (name, (width, height)) in enumerate(SIZES.items()):
        built(
            where,
            site_of(name, 360000 + n * 6000, 5600040, width, height),
            [2019, 2020, 2022, 2023],
        )
    return where


def plain(store, window, size):
    """The same by xarray and numpy."""
    opened = cube.open_cube(store, window.site).sel(year=list(window.years))
    part = opened.isel(
        y=slice(window.y, window.y + size), x=slice(window.x, window.x + size)
    ).compute()
    beyond = [(0, size - part.sizes["y"]), (0, size - part.sizes["x"])]
    return (
        np.pad(part.reflectance.values, [(0, 0), (0, 0), *beyond]),
        np.pad(part.footprint.values, [(0, 0), *beyond], constant_values=255),
    )


def is_plain(store, dataset, index):
    item, window = dataset[index], dataset.window(index)
    reflectance, footprint = plain(store, window, dataset.size)
    assert (item["site"], item["y"], item["x"]) == (window.site, window.y, window.x)
    assert item["years"].tolist() == list(window.years)
    assert (item["reflectance"].dtype, item["footprint"].dtype) == (np.uint16, np.uint8)
    np.testing.assert_array_equal(item["reflectance"], reflectance)
    np.testing.assert_array_equal(item["footprint"], footprint)


@having(max_examples=60, deadline=None)
@given(
    view=st.sampled_from(cube.VIEWS),
    size=st.integers(1, 260),
    seed=st.integers(0, 99),
    index=st.integers(0, 20),
)
def test_any_window_is_the_slice_that_numpy_cuts(store, view, size, seed, index):
    is_plain(store, cube.CubeDataset(store, view=view, size=size, seed=seed, length=21), index)


@having(max_examples=40, deadline=None)
@given(size=st.integers(1, 260), y=st.integers(0, 179), x=st.integers(0, 239), two=st.booleans())
def test_a_window_asked_for_by_its_place_is_the_slice_that_numpy_cuts(store, size, y, x, two):
    dataset = cube.CubeDataset(store, ["pit"])
    years = (2019, 2022) if two else (2020,)
    window = cube.WindowPlace(site="pit", years=years, y=y, x=x)
    for found, expected in zip(
        dataset.cut("pit", years, y, x, size), plain(store, window, size), strict=True
    ):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


def test_it_says_what_training_has_to_know(store):
    dataset = cube.CubeDataset(store, years=[2022, 2019])
    assert (dataset.sites, dataset.bands, dataset.forkable) == (
        ("pit", "pond"),
        ("B04", "B11"),
        True,
    )
    assert (dataset.years_of("pond"), dataset.shape_of("pond")) == ((2019, 2022), (54, 48))


@pytest.mark.parametrize("task", ["mapping", "change", "series"])
def test_training_sees_the_same_in_a_store_and_in_memory(store, task):
    classes = ("new",) if task == "change" else ("mine",)
    card = ModelCard(
        id="m",
        title="t",
        architecture="a",
        task=task,
        classes=classes,
        bands=("B11",),
        window_px=64,
    )
    settings = TrainingSettings(id="s", title="t", rare=0.5, year_dropout=0.2)
    opened = {"pit": cube.open_committed(store, "pit").load()}
    seen = [
        (of, train.survey_source(of, card, settings))
        for of in (cube.CubeDataset(store, ["pit"]), train.Cubes(opened))
    ]
    assert seen[0][1].mean == seen[1][1].mean
    assert seen[0][1].std == seen[1][1].std
    windows = [train.Windows(of, card, settings, survey) for of, survey in seen]
    for key in ((0, 0), (0, 1), (3, 7), (9, 2)):
        for one, other in zip(windows[0][key], windows[1][key], strict=True):
            np.testing.assert_array_equal(one, other)


def test_unknown_blocks_and_years_without_pixels_are_there(store):
    item = cube.CubeDataset(store, ["pit"], size=64, step=64, view="series")[4]
    assert (item["y"], item["x"]) == (64, 0)
    assert not item["reflectance"].any()
    assert (item["footprint"] == 255).all()


def test_sites_smaller_than_a_window_are_filled_up(store):
    dataset = cube.CubeDataset(store, ["pond"], size=160)
    assert len(dataset) == 1
    is_plain(store, dataset, 0)
    item = dataset[0]
    assert (item["y"], item["x"]) == (0, 0)
    assert not item["reflectance"][..., 54:, :].any()
    assert (item["footprint"][..., 48:] == 255).all()


def test_windows_a_step_apart_end_flush_with_the_far_border(store):
    """As the crops of the published loaders: 240 x 180 pixels in windows of 100."""
    dataset = cube.CubeDataset(store, ["pit"], size=100, step=100, view="year", years=[2020, 2022])
    places = [(w.y, w.x, w.years) for w in map(dataset.window, range(len(dataset)))]
    assert places == [
        (y, x, (year,)) for y in (0, 80) for x in (0, 100, 140) for year in (2020, 2022)
    ]
    for index in range(len(dataset)):
        is_plain(store, dataset, index)
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_views(store):
    def years(**how):
        dataset = cube.CubeDataset(store, ["pond"], step=160, **how)
        return [dataset.window(i).years for i in range(len(dataset))]

    assert years(view="series") == [(2019, 2020, 2022)]
    assert years(view="pair") == [(2019, 2020), (2019, 2022), (2020, 2022)]
    assert years(view="year") == [(2019,), (2020,), (2022,)]
    assert years(view="pair", years=[2022, 2019]) == [(2019, 2022)]


def test_windows_anywhere_are_everywhere(store):
    """Every corner that a window may have is had, and sites as often as they are large."""
    dataset = cube.CubeDataset(store, size=46, length=4000)
    drawn = [dataset.window(i) for i in range(4000)]
    assert {(w.y, w.x) for w in drawn if w.site == "pond"} == {
        (y, x) for y in range(9) for x in range(3)
    }
    share = sum(w.site == "pond" for w in drawn) / len(drawn)
    assert share == pytest.approx(48 * 54 / (48 * 54 + 240 * 180), abs=0.015)
    assert max(w.y for w in drawn) == 180 - 46
    assert [dataset.window(i) for i in range(9)] == drawn[:9]
    assert [dataclasses.replace(dataset, seed=1).window(i) for i in range(9)] != drawn[:9]


def test_workers_cut_the_same(store):
    """In a process that may use sockets: torch's workers hand their batches over through them."""
    script = f"""
        import hashlib
        from torch.utils.data import DataLoader
        from minecube import cube

        if __name__ == "__main__":
            dataset = cube.CubeDataset(cube.Store({str(store)!r}), size=80, length=12)
            for workers in (0, 2):
                for batch in DataLoader(dataset, batch_size=3, num_workers=workers):
                    arrays = [batch[name].numpy() for name in ("reflectance", "footprint", "years", "y", "x")]
                    told = hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()
                    print(workers, batch["site"], told, arrays[0].dtype, arrays[0].shape)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 8, done.stderr
    assert [line[1:] for line in lines[:4]] == [line[1:] for line in lines[4:]]
    assert len(set(lines)) == 8
    assert lines[0].endswith("uint16 (3, 3, 2, 80, 80)")


@pytest.mark.parametrize("how", ["url", "codec"])
def test_what_is_not_read_here_is_read_by_zarr(store, how, monkeypatch, tmp_path, bucket):
    where = cube.Store(f"{bucket}/cubes.zarr")
    if how == "url":
        there = obstore.store.from_url(str(where))
        for path in (p for p in store.path.rglob("*") if p.is_file()):
            there.put(str(path.relative_to(store.path)), path.read_bytes())
    if how == "codec":  # deflated chunks, as another template may have them
        where = cube.Store(tmp_path / "cubes.zarr")
        packed = zarr.codecs.GzipCodec()
        monkeypatch.setattr(
            creation,
            "encoding_of",
            lambda v, r, real=creation.encoding_of: real(v, r) | {"compressors": packed},
        )
        built(where, site_of("pit", 360000, 5600040, 240, 180), [2019, 2020, 2022, 2023])
    assert module.Pixels.open(where, "pit/reflectance").decoder is None
    assert module.Pixels.open(store, "pit/reflectance").decoder is not None
    for index in range(5):
        is_plain(store, cube.CubeDataset(where, ["pit"], size=100, length=5), index)


def test_an_older_cubes_packing_is_read_too(store, monkeypatch, tmp_path):
    """Zstandard, as Zarr has it by itself."""
    where = cube.Store(tmp_path / "cubes.zarr")
    monkeypatch.setattr(
        creation,
        "encoding_of",
        lambda v, r, real=creation.encoding_of: real(v, r) | {"compressors": "auto"},
    )
    built(where, site_of("pit", 360000, 5600040, 240, 180), [2019, 2020])
    assert module.Pixels.open(where, "pit/reflectance").decoder.codec.codec_id == "zstd"
    is_plain(where, cube.CubeDataset(where, size=100, length=1), 0)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"view": "triple"}, "expected a view of year, pair, series"),
        ({"years": [2023]}, r"pit has no committed year 2023; committed are 2019, 2020, 2022"),
        ({"view": "pair", "years": [2019]}, "pit has one year only, 2019"),
        ({"site_ids": ["nowhere"]}, "no site 'nowhere'"),
    ],
)
def test_what_cannot_be_had_is_said(store, how, said):
    with pytest.raises(CubeError, match=said):
        cube.CubeDataset(store, **how)


def test_sites_that_do_not_fit_into_one_batch(tmp_path):
    where = cube.Store(tmp_path / "cubes.zarr")
    built(where, site_of("a", 360000, 5600040, 60, 60), [2019, 2020, 2021])
    built(where, site_of("b", 366000, 5600040, 60, 60), [2019, 2020])
    with pytest.raises(CubeError, match=r"sites differ in years \(\(2019,\) and \(2019, 2020\)\)"):
        cube.CubeDataset(where)
    assert len(cube.CubeDataset(where, view="year")) == 2
    assert len(cube.CubeDataset(where, years=[2019])) == 2


def test_shards_that_change_under_a_dataset(tmp_path):
    """One that is replaced is read anew; one that ends too early is an error, not a window of what was read before."""
    where = cube.Store(tmp_path / "cubes.zarr")
    built(where, site_of("pit", 360000, 5600040, 60, 60), [2019, 2020])
    dataset = cube.CubeDataset(where, size=60)
    is_plain(where, dataset, 0)
    array = zarr.open_array(f"{where}/pit/reflectance", mode="r+")
    array[0] = array[0] + 1
    is_plain(where, dataset, 0)
    (shard,) = (tmp_path / "cubes.zarr/pit/reflectance/c/0/0/0").iterdir()
    whole = shard.read_bytes()
    for content, said in (
        (whole[:40], "too short for a shard"),
        (whole[-300:], "ends before its chunks do"),
        (b"x" * 300 + whole[300:], "has a damaged chunk"),
    ):
        shard.unlink()
        shard.write_bytes(content)
        with pytest.raises(CubeError, match=said):
            dataset[0]


@pytest.mark.parametrize("zarr_reads", [False, True])
def test_rows_of_reflectance_are_those_of_the_opened_cube(store, zarr_reads, monkeypatch):
    if zarr_reads:
        monkeypatch.setattr(module, "decoder_of", lambda _: None)
    opened = by_zarr(store)
    found = cube.open_reflectance(store, "pit")
    assert found.encoding["chunks"][-2] == 32
    for name in ("year", "y", "x"):
        np.testing.assert_array_equal(found[name], opened[name])
    assert [str(b) for b in found.band.values] == [str(b) for b in opened.band.values]
    np.testing.assert_array_equal(found, opened)
    assert found.chunks is None
    part = {"year": [2, 0], "y": slice(60, 131), "x": slice(3, 200)}
    np.testing.assert_array_equal(found.isel(part), opened.isel(part))


def by_zarr(store):
    """Reflectance of committed years as xarray and Zarr read it, without our code."""
    opened = xr.open_zarr(str(store), group="pit", consolidated=False).reflectance
    return opened.sel(year=list(cube.read_markers(store, "pit")))


def _of(size):
    """An index, some, or a slice of an axis."""
    index = st.integers(-size, size - 1)
    some = st.lists(index, max_size=4) | st.permutations(range(size)).map(
        lambda all_: list(all_)[:9]
    )
    # xarray 2026.9 takes no empty slice that goes backwards, of any file.
    steps = st.slices(size).filter(
        lambda part: (part.step or 1) > 0 or len(range(*part.indices(size))) > 0
    )
    rows = st.lists(st.integers(0, size), min_size=2, max_size=2).map(
        lambda ends: slice(*sorted(ends))
    )
    return rows | st.one_of(rows, index, some, steps)


@pytest.mark.parametrize("zarr_reads", [False, True])
@having(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_part_of_reflectance_is_that_of_the_opened_cube(store, zarr_reads, data):
    with pytest.MonkeyPatch.context() as monkeypatch:
        if zarr_reads:
            monkeypatch.setattr(module, "decoder_of", lambda _: None)
        opened = by_zarr(store).load()
        found = cube.open_reflectance(store, "pit")
        part = {name: data.draw(_of(size)) for name, size in opened.sizes.items()}
        np.testing.assert_array_equal(found.isel(part), opened.isel(part))


@pytest.mark.skipif(
    not Path("/proc/self/smaps").exists(), reason="tells what of a file is in this process's memory"
)
def test_a_site_that_is_read_through_does_not_stay_in_memory(tmp_path):
    store, recipe = (
        cube.Store(tmp_path / "cubes.zarr"),
        dataclasses.replace(RECIPE, block_px=256, chunk_px=128),
    )
    built(store, site_of("pit", 360000, 5600040, 600, 500), [2019, 2020], recipe)
    array = zarr.open_array(str(store), path="pit/reflectance", mode="r+")
    array[:1] = np.random.default_rng(0).integers(1, 65535, (1, *array.shape[1:]), np.uint16)
    cube.open_reflectance(store, "pit").load()
    read, whole = _kept(store), array[0].nbytes / 1024
    cube.CubeDataset(store, size=600)[0]
    assert _kept(store) > whole  # what is cut again is better kept
    assert read < whole / 50


def _kept(store):
    """KiB of a store's files in this process's memory."""
    lines, found, inside = Path("/proc/self/smaps").read_text().splitlines(), 0, False
    for line in lines:
        if line[:1].islower() or line[:1].isdigit():
            inside = str(store) in line
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1])
    return found
