"""A store to which earlier years were added reads as one that was made in order, by every reader and export."""

from __future__ import annotations

import geopandas as gpd
import icechunk
import numpy as np
import pystac
import pytest
import rasterio
import xarray as xr
import zarr

from known_added_years import YEARS, add_years, make_stores
from known_builds import run_here
from known_stores import files_of, run
from minecube import cube
from minecube.export import publish


@pytest.fixture(scope="module")
def stores(tmp_path_factory, one_thread):
    return make_stores(tmp_path_factory.mktemp("stores"))


def need_same(one, other):
    """The same values under the same coordinates, in the same order."""
    xr.testing.assert_equal(one.load(), other.load())


def test_the_added_years_are_stored_last(stores):
    """Otherwise these tests would compare two equal stores."""
    order = [zarr.open_array(store / "pit/year", mode="r")[:].tolist() for store in stores]
    assert order == [list(YEARS), [2020, 2021, 2019, 2018]]


def test_every_reader_has_the_years_in_order(stores):
    in_order, added = map(cube.Store, stores)
    for read in (cube.open_cube, cube.open_committed, cube.open_reflectance):
        opened = read(added, "pit")
        assert opened.year.values.tolist() == list(YEARS)
        need_same(opened, read(in_order, "pit"))
    assert cube.read_grid_and_years(added, "pit") == cube.read_grid_and_years(in_order, "pit")
    assert list(cube.read_markers(added, "pit")) == list(YEARS)
    assert cube.open_committed(added, "pit").footprint.sum(("y", "x")).values.tolist() == [
        30 * 70,
        40 * 70,
        50 * 70,
        60 * 70,
    ]


@pytest.mark.parametrize("view", cube.VIEWS)
def test_windows(stores, view):
    in_order, added = (cube.CubeDataset(cube.Store(s), size=48, view=view, step=48) for s in stores)
    assert len(added) == len(in_order) > 0
    for one, other in zip(in_order, added, strict=True):
        assert sorted(other["years"]) == other["years"].tolist()
        for name, value in one.items():
            np.testing.assert_array_equal(other[name], value)


@pytest.mark.parametrize("model", ["net", "years", "net+hmm"])
def test_maps(stores, model):
    maps = [cube.open_probability(cube.Store(store), "pit", model) for store in stores]
    assert maps[1].year.values.tolist() == list(YEARS)
    need_same(*maps)
    assert list(maps[1].builds) == list(map(str, YEARS))


def test_maps_of_change(stores):
    maps = [cube.open_change(cube.Store(store), "pit", "pairs") for store in stores]
    assert maps[1]["first"].values.tolist() == [2018, 2018, 2018, 2019, 2019, 2020]
    assert maps[1]["second"].values.tolist() == [2019, 2020, 2021, 2020, 2021, 2021]
    need_same(*maps)


def test_tracks(stores):
    """Events, areas and rates depend on the order of the years."""
    in_order, added = (store.with_suffix(".tracks") for store in stores)
    for name in ("areas.csv", "sites.csv"):
        assert (added / name).read_text() == (in_order / name).read_text()
    layers = sorted(path.name for path in (in_order / "pit").glob("*.tif"))
    assert layers
    for name in layers:
        need_same_pixels(in_order / "pit" / name, added / "pit" / name)


def need_same_pixels(one, other):
    with rasterio.open(one) as a, rasterio.open(other) as b:
        assert a.descriptions == b.descriptions
        np.testing.assert_array_equal(a.read(), b.read())


def test_scores(stores, tmp_path):
    said = []
    for store in stores:
        models = ("--model", "net,pairs", "--baselines")
        counts = tmp_path / f"{store.stem}.json"
        said.append(run_here("score", "--store", store, *models, "--json", counts)[0])
    assert said[1] == said[0]
    assert (tmp_path / "added.json").read_text() == (tmp_path / "in_order.json").read_text()


def test_verify_and_pack(stores, tmp_path):
    in_order, added = stores
    assert "all as it was written" in run("verify", "--store", added)
    packed = tmp_path / "added.zip"
    run("pack", "--store", added, "--out", packed)
    assert "all as it was written" in run("verify", "--store", packed)
    need_same(
        cube.open_committed(cube.Store(packed), "pit"),
        cube.open_committed(cube.Store(in_order), "pit"),
    )
    maps = (cube.open_probability(cube.Store(store), "pit", "net") for store in (in_order, packed))
    need_same(*maps)


def test_xarray_alone_finds_each_year(stores):
    in_order, added = (
        xr.open_zarr(store, group="pit", consolidated=False).load() for store in stores
    )
    for year in YEARS:
        need_same(in_order.sel(year=year), added.sel(year=year))
    need_same(in_order, added.sortby("year"))


def test_exports(stores, tmp_path):
    formats = [f"--format={name}" for name in ("cog", "netcdf", "zarr", "zarr2")]
    folders = []
    for store in stores:
        folders.append(tmp_path / store.stem)
        run("export", "--store", store, "--model", "net", "--out", folders[-1], *formats)
    in_order, added = folders
    names = sorted(files_of(in_order))
    assert names == sorted(files_of(added))
    for name in (name for name in names if name.endswith(".tif")):
        need_same_pixels(in_order / name, added / name)
    timed = [xr.open_dataset(folder / "pit/pit.nc") for folder in folders]
    assert timed[1].year.values.tolist() == list(YEARS)
    need_same(*timed)
    for level in ("pit.zarr", "pit.v2.zarr"):
        group = "0" if level == "pit.zarr" else None
        opened = [xr.open_zarr(f / "pit" / level, group=group, consolidated=False) for f in folders]
        need_same(*opened)
    assets = [pystac.Collection.from_file(folder / "collection.json").assets for folder in folders]
    for key in ("pit_netcdf", "pit_zarr", "pit_zarr2"):
        dimensions = [asset[key].extra_fields["cube:dimensions"] for asset in assets]
        assert dimensions[1] == dimensions[0]
    items, other = (gpd.read_parquet(folder / "items.parquet") for folder in folders)
    assert other["id"].tolist() == [f"pit_{year}" for year in YEARS]
    assert items["datetime"].tolist() == other["datetime"].tolist()
    for kind in ("labels", "mapped"):
        outlines = [gpd.read_parquet(f / f"footprints_{kind}.parquet") for f in folders]
        assert outlines[0].equals(outlines[1])


def test_the_layout_of_the_release(stores, tmp_path):
    for store in stores:
        run("release", "export", "--store", store, "--out", tmp_path / store.stem)
    assert files_of(tmp_path / "in_order") == files_of(tmp_path / "added")


def released(place, tag):
    """A release as someone with Icechunk and xarray opens it."""
    repository = icechunk.Repository.open(icechunk.local_filesystem_storage(str(place)))
    return repository.readonly_session(tag=tag).store


def test_releases_in_icechunk(stores, tmp_path):
    """Years are in order there, too: of the cube and of maps that name years."""
    places = [tmp_path / store.stem for store in stores]
    for store, place in zip(stores, places, strict=True):
        run("publish", "--store", store, "--icechunk", place, "--tag", "v1")
        assert "0 objects differed" in run(
            "publish", "--store", store, "--icechunk", place, "--tag", "v2"
        )
    for group in ("pit", "pit/predictions/net"):
        opened = [xr.open_zarr(released(p, "v1"), group=group, consolidated=False) for p in places]
        assert opened[1].year.values.tolist() == list(YEARS)
        need_same(*opened)


def test_releases_before_and_after_earlier_years(stores, tmp_path):
    """Of 2020 and 2021 only the labels of `first` differ, although their shards have other keys."""
    where = ("--icechunk", tmp_path / "releases")
    first = tmp_path / "first.zarr"
    add_years(first, (2020, 2021))
    run("publish", "--store", first, *where, "--tag", "v1")
    run("publish", "--store", stores[1], *where, "--tag", "v2")
    differences = publish.list_differences(str(tmp_path / "releases"), "v1", "v2")
    rows = [[year, name] for _, year, name in differences]
    pixels = ["clear_count", "footprint", "footprint_fraction", "quality", "reflectance"]
    for year in ("2018", "2019"):
        assert [name for when, name in rows if when == year and name in pixels] == pixels
    for year in ("2020", "2021"):
        assert not [name for when, name in rows if when == year and name in pixels]
    assert ["all", "predictions/pairs/change"] in rows
