"""The store is written whole or not at all, resumes, refuses what does not fit, and opens unaided."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import dask.array as da
import numpy as np
import odc.geo.xr
import pandas as pd
import pyogrio
import pytest
import rasterio
import rioxarray  # noqa: F401
import xarray as xr
import zarr

from known_scenes import grid_at, site_of
from minecube import composite as module
from minecube import cube
from minecube.catalog import Recipe
from minecube.cube.write.labels import need_labels
from minecube.cube.write.staging import put_bytes
from minecube.errors import BusyError, CubeError, ReadError
from minecube.grid import grid_of

RECIPE = Recipe(id="small", title="t", bands=("B04", "B11"), block_px=64, chunk_px=32)
YEARS = (2019, 2020, 2021)
PROVENANCE = {
    "site": "mine",
    "year": 2020,
    "grid": {},
    "recipe": {},
    "scenes": [{"id": "a"}],
    "version": "1",
}


def year_of(grid, recipe=RECIPE, seed=0):
    """A composite whose pixels are known, in the recipe's blocks."""
    rng = np.random.default_rng(seed)
    shape, block = grid.shape, recipe.block_px
    return xr.Dataset(
        {
            "reflectance": (
                ("band", "y", "x"),
                da.from_array(
                    rng.integers(0, 9000, (2, *shape)).astype(np.uint16), chunks=(2, block, block)
                ),
            ),
            "clear_count": (
                ("y", "x"),
                da.from_array(rng.integers(0, 30, shape).astype(np.uint16), chunks=block),
            ),
            "quality": (
                ("y", "x"),
                da.from_array(rng.integers(0, 5, shape).astype(np.uint8), chunks=block),
            ),
        }
    )


@pytest.fixture
def grid(site):
    return grid_of(site)


@pytest.fixture
def store(tmp_path, site, grid):
    """A store with the site's template, nothing built."""
    where = cube.Store(tmp_path / "cubes.zarr")
    cube.create_site(where, site, grid, YEARS, RECIPE)
    return where


def test_a_store_is_a_value(tmp_path):
    """It is equal, hashed and pickled by its name, and shows the name as it was given."""
    store = cube.Store("cubes.zarr/")
    copy = pickle.loads(pickle.dumps(store))
    assert copy == store
    assert hash(copy) == hash(store)
    assert (str(copy), copy.path, copy.packed) == ("cubes.zarr/", Path("cubes.zarr"), False)
    assert cube.Store(tmp_path / "cubes.zip").packed
    (tmp_path / "folder.zip").mkdir()
    assert not cube.Store(tmp_path / "folder.zip").packed
    assert cube.Store("s3://bucket/cubes.zarr").absolute().path is None


def test_what_is_written_is_what_is_read(store, grid):
    made = year_of(grid)
    assert cube.write_year(store, made, PROVENANCE, b"scene list")
    opened = xr.open_zarr(str(store), group="mine", consolidated=False)
    for name in made.data_vars:
        assert (
            opened[name].dtype == made[name].dtype
        )  # no fill value that would turn integers into floats
        np.testing.assert_array_equal(opened[name].sel(year=2020), made[name])
        assert not opened[name].sel(year=[2019, 2021]).values.any()
    assert (opened.footprint == 255).all()
    assert opened.reflectance.dims == ("year", "band", "y", "x")
    assert list(opened.band.values) == ["B04", "B11"]
    by_zarr = zarr.open_group(str(store), mode="r")["mine"]
    np.testing.assert_array_equal(by_zarr["reflectance"][1], made.reflectance)
    assert by_zarr["reflectance"].shards == (1, 2, 64, 64)
    assert by_zarr["reflectance"].chunks == (1, 2, 32, 32)
    assert zarr.open_array(f"{store}/mine/builds/2020/scenes")[:].tobytes() == b"scene list"


def test_an_object_store_holds_the_same(bucket, site, grid):
    url = cube.Store(f"{bucket}/cubes.zarr")
    made = year_of(grid)
    cube.create_site(url, site, grid, YEARS, RECIPE)
    assert cube.write_year(url, made, PROVENANCE, b"")
    assert not cube.write_year(url, made, PROVENANCE, b"")
    cube.create_site(url, site, grid, [2022], RECIPE)
    opened = cube.open_committed(url, "mine")
    np.testing.assert_array_equal(opened.reflectance[0], made.reflectance)
    assert cube.list_sites(url) == ["mine"]
    assert list(cube.open_cube(url, "mine").year.values) == [*YEARS, 2022]


def test_a_template_killed_half_way_is_made_anew(store, site, grid):
    group = zarr.open_group(f"{store}/mine", mode="r+")
    group.attrs["minecube"] = {"format": 0}
    shutil.rmtree(f"{store}/mine/quality")
    cube.create_site(store, site, grid, YEARS, RECIPE)
    assert cube.write_year(store, year_of(grid), PROVENANCE, b"")


def test_years_killed_half_way_are_named_anew(store, site, grid):
    """The arrays have grown and the year has no name yet."""
    for name in (
        "reflectance",
        "clear_count",
        "quality",
        "footprint",
        "footprint_fraction",
        "year",
    ):
        array = zarr.open_array(f"{store}/mine/{name}", mode="r+")
        array.resize((4, *array.shape[1:]))
    cube.create_site(store, site, grid, [2020, 2023], RECIPE)
    assert list(cube.open_cube(store, "mine").year.values) == [*YEARS, 2023]


def test_a_year_without_a_pixel_is_not_committed(store, grid):
    empty = year_of(grid).map(lambda v: v.copy(data=da.zeros_like(v.data)))
    with pytest.raises(CubeError, match="no scene has a pixel here, so nothing is committed"):
        cube.write_year(store, empty, PROVENANCE, b"")
    assert cube.read_markers(store, "mine") == {}


def test_a_build_told_to_stop_stops_between_blocks_and_goes_on_later(store, grid):
    asked = iter([False, False, True])
    made = year_of(grid)
    with pytest.raises(CubeError, match="stopped with 8 of 12 blocks to go"):
        cube.write_year(
            store, made, PROVENANCE, b"", cube.BuildOptions(workers=2, stopped=lambda: next(asked))
        )
    again, blocks = failing_after(made, 10_000)
    assert cube.write_year(store, again, PROVENANCE, b"")
    assert len(blocks) == 8
    np.testing.assert_array_equal(
        cube.open_committed(store, "mine").reflectance[0], made.reflectance
    )


def test_a_prediction_of_another_build_is_refused(store, grid):
    made = year_of(grid)
    cube.write_year(store, made, PROVENANCE, b"")
    masks = xr.DataArray(
        np.zeros((1, *grid.shape), np.uint8),
        dims=("year", "y", "x"),
        coords={"year": [2020], **odc.geo.xr.xr_coords(grid)},
    )
    cube.write_probability(store, "mine", "net", masks, {"id": "net"})
    cube.open_probability(store, "mine", "net")
    cube.write_year(store, made, {**PROVENANCE, "year": 2021}, b"")
    with pytest.raises(
        CubeError,
        match="'net' mapped mine before 2021 was built as it is now; run `minecube predict` again",
    ):
        cube.open_probability(store, "mine", "net")


def test_a_damaged_store_says_so(store, tmp_path):
    (tmp_path / "cubes.zarr" / "mine" / "zarr.json").write_text("{")
    with pytest.raises(CubeError, match=r"mine cannot be read .* run `minecube verify`"):
        cube.open_cube(store, "mine")
    (tmp_path / "file").write_text("")
    with pytest.raises(CubeError, match="is a file"):
        cube.list_sites(cube.Store(tmp_path / "file"))


def test_it_is_georeferenced_unaided_to_the_centimetre(store, grid):
    opened = xr.open_zarr(str(store), group="mine", consolidated=False)
    assert opened.odc.geobox == grid
    assert opened.reflectance.rio.crs.to_epsg() == 32633
    assert tuple(opened.reflectance.rio.transform())[:6] == (10, 0, 360000, 0, -10, 5600040)
    assert tuple(opened.reflectance.rio.bounds()) == tuple(grid.boundingbox)
    assert (float(opened.x[0]), float(opened.y[0])) == pytest.approx((360005, 5600035), abs=0.01)
    assert (float(opened.x[-1]), float(opened.y[-1])) == pytest.approx((362395, 5598245), abs=0.01)
    attrs = zarr.open_group(f"{store}/mine", mode="r").attrs
    assert attrs["proj:code"] == "EPSG:32633"
    assert attrs["spatial:transform"] == [10, 0, 360000, 0, -10, 5600040]
    assert attrs["spatial:bbox"] == list(grid.boundingbox)
    assert {c["name"] for c in attrs["zarr_conventions"]} == {"proj:", "spatial:"}


def test_gdal_reads_it_where_it_is_new_enough(store, grid):
    newest = max(
        tuple(int(n) for n in v.split(".")[:2])
        for v in (rasterio.__gdal_version__, pyogrio.__gdal_version_string__)
    )
    if newest < (3, 13):
        pytest.skip(
            f"GDAL reads sharded Zarr v3 from 3.13 on, here is {newest}; COGs are the way for older ones"
        )
    cube.write_year(store, made := year_of(grid), PROVENANCE, b"")
    with rasterio.open(f'ZARR:"{store}":/mine/clear_count:1') as src:
        np.testing.assert_array_equal(src.read(1), made.clear_count)


def test_a_rerun_does_nothing_and_another_build_is_refused(store, grid):
    made = year_of(grid)
    assert cube.write_year(store, made, PROVENANCE, b"")

    def fail():
        raise AssertionError("a block was computed again")

    lazy = made.map(
        lambda v: v.copy(
            data=da.map_blocks(lambda _: fail(), v.data, dtype=v.dtype, meta=np.array((), v.dtype))
        )
    )
    assert not cube.write_year(store, lazy, PROVENANCE, b"")
    other = {**PROVENANCE, "scenes": [{"id": "b"}]}
    with pytest.raises(CubeError, match=r"mine 2020 is committed as build .* use --overwrite"):
        cube.write_year(store, made, other, b"")
    again = year_of(grid, seed=1)
    assert cube.write_year(store, again, other, b"", cube.BuildOptions(overwrite=True))
    np.testing.assert_array_equal(
        cube.open_cube(store, "mine").reflectance.sel(year=2020), again.reflectance
    )


def test_each_block_is_made_once(archive, tmp_path):
    """Three variables come from one task a block."""
    site = site_of("mine", 360000, 5600040, 60, 48)
    recipe = dataclasses.replace(RECIPE, block_px=32)
    scene = archive.scene(
        "2020-06-01T10:00:00", grid_at(359400, 5600640, 180, 180), {"B04": 7, "B11": 9}
    )
    where, made = cube.Store(tmp_path / "cubes.zarr"), []
    cube.create_site(where, site, grid_of(site), [2020], recipe)
    block = module.composite_block

    def counted(*args):
        made.append(1)
        return block(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "composite_block", counted)
        lazy = module.composite([scene], grid_of(site), recipe)
    cube.write_year(where, lazy, PROVENANCE, b"")
    assert len(made) == 4
    np.testing.assert_array_equal(cube.open_cube(where, "mine").reflectance[0, :, 5, 5], [7, 9])


class StoppedError(Exception):
    pass


def failing_after(made, blocks):
    """The same composite, of which one block fails once `blocks` of them have been computed."""
    count = iter(range(10_000))
    seen = []

    def block(pixels):
        if next(count) >= blocks:
            raise StoppedError
        seen.append(1)
        return pixels

    counted = made.reflectance.copy(
        data=made.reflectance.data.map_blocks(block, dtype=np.uint16, meta=np.array((), np.uint16))
    )
    return made.assign(reflectance=counted), seen


def test_a_stopped_run_commits_nothing_and_resumes(store, grid):
    """12 blocks; stopped in the tenth, the second run has to make at most those that were in hand."""
    import dask

    made = year_of(grid)
    with dask.config.set(scheduler="synchronous"):
        broken, first = failing_after(made, 9)
        with pytest.raises(StoppedError):
            cube.write_year(store, broken, PROVENANCE, b"")
        assert cube.read_markers(store, "mine") == {}
        with pytest.raises(CubeError, match="no committed year"):
            cube.open_committed(store, "mine")
        whole, second = failing_after(made, 10_000)
        assert cube.write_year(store, whole, PROVENANCE, b"")
    assert len(first) == 9
    assert len(second) <= 12 - 8
    np.testing.assert_array_equal(
        cube.open_committed(store, "mine").reflectance[0], made.reflectance
    )


@pytest.mark.parametrize(
    "other",
    [
        {"version": "0"},
        {"on_offset_conflict": "fix"},
        {"offset_conflicts": [{"scene": "a"}]},
        {"scl_errors": [{"scene": "a", "scl": "veiled"}]},
        {"shifts": [{"scene": "a", "dx_m": 9.0}]},
    ],
    ids=lambda other: next(iter(other)),
)
def test_leftovers_of_another_build_are_not_resumed(store, grid, other):
    """A killed build's shards are not taken for this one's, nor for one in which scenes were judged otherwise."""
    old, new = year_of(grid, seed=1), year_of(grid, seed=2)
    with pytest.raises(StoppedError):
        cube.write_year(store, failing_after(old, 9)[0], {**PROVENANCE, **other}, b"")
    assert cube.write_year(store, new, PROVENANCE, b"")
    np.testing.assert_array_equal(
        cube.open_cube(store, "mine").reflectance.sel(year=2020), new.reflectance
    )


def test_a_lost_read_keeps_the_year_uncommitted(store, grid):
    def lost(_):
        raise ReadError("B04.tif: cannot be read")

    made = year_of(grid)
    broken = made.assign(
        reflectance=made.reflectance.copy(
            data=made.reflectance.data.map_blocks(
                lost, dtype=np.uint16, meta=np.array((), np.uint16)
            )
        )
    )
    with pytest.raises(ReadError):
        cube.write_year(store, broken, PROVENANCE, b"")
    assert cube.read_markers(store, "mine") == {}


@pytest.mark.parametrize("block", [32, 96, 128])
def test_blocks_that_are_not_shards_are_refused(store, grid, block):
    """Two of them would write one shard and lose pixels without an error."""
    made = year_of(grid, dataclasses.replace(RECIPE, block_px=block))
    with pytest.raises(CubeError, match=r"blocks of .* do not match shards of .* lose pixels"):
        cube.write_year(store, made, PROVENANCE, b"")


def test_another_recipe_or_grid_is_refused(store, site, grid):
    with pytest.raises(
        CubeError, match="made with recipe 'small', which differs from 'small' in months"
    ):
        cube.create_site(store, site, grid, YEARS, dataclasses.replace(RECIPE, months=(6, 7)))
    with pytest.raises(CubeError, match="lies on another grid"):
        cube.create_site(store, site, grid.pad(6), YEARS, RECIPE)


def test_later_years_are_added_earlier_ones_refused(store, site, grid):
    made = year_of(grid)
    cube.write_year(store, made, PROVENANCE, b"")
    cube.create_site(store, site, grid, [2020, 2023], RECIPE)
    opened = cube.open_cube(store, "mine")
    assert list(opened.year.values) == [2019, 2020, 2021, 2023]
    np.testing.assert_array_equal(opened.reflectance.sel(year=2020), made.reflectance)
    assert not opened.reflectance.sel(year=2023).values.any()
    assert (opened.footprint.sel(year=2023) == 255).all()
    with pytest.raises(CubeError, match=r"has years 2019\.\.2023, and year 2016 cannot be added"):
        cube.create_site(store, site, grid, [2016], RECIPE)


def test_footprints_and_probabilities_find_their_years(store, grid):
    rng = np.random.default_rng(0)
    masks = xr.DataArray(
        rng.integers(0, 2, (2, *grid.shape)).astype(np.uint8),
        dims=("year", "y", "x"),
        coords={"year": [2021, 2019], **odc.geo.xr.xr_coords(grid)},
    )
    cube.write_footprint(store, "mine", masks, origin="a test")
    opened = cube.open_cube(store, "mine")
    np.testing.assert_array_equal(opened.footprint.sel(year=[2021, 2019]), masks)
    assert (opened.footprint.sel(year=2020) == 255).all()
    with pytest.raises(CubeError, match=r"2019 of mine is not committed"):
        cube.write_probability(store, "mine", "net", masks.sortby("year"), {"id": "net"})
    for year in (2019, 2021):
        cube.write_year(store, year_of(grid), {**PROVENANCE, "year": year}, b"")
    cube.write_probability(store, "mine", "net", masks.sortby("year"), {"id": "net"})
    got = cube.open_probability(store, "mine", "net")
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got.sel(year=[2021, 2019]), masks)
    shifted = masks.assign_coords(x=masks.x + 10)
    for write in (
        lambda: cube.write_footprint(store, "mine", shifted, "x"),
        lambda: cube.write_probability(store, "mine", "n", shifted, {}),
    ):
        with pytest.raises(CubeError, match="another grid"):
            write()


@pytest.mark.parametrize("earlier", [False, True], ids=["now", "made before there were fractions"])
def test_the_fraction_goes_with_its_footprint(store, site, grid, earlier):
    if earlier:
        shutil.rmtree(f"{store}/mine/footprint_fraction")
        assert "footprint_fraction" not in cube.open_cube(store, "mine")
    rng = np.random.default_rng(0)
    coords = {"year": [2021, 2019], **odc.geo.xr.xr_coords(grid)}
    masks, shares = (
        xr.DataArray(
            rng.integers(0, top, (2, *grid.shape)).astype(np.uint8), coords, ("year", "y", "x")
        )
        for top in (2, 251)
    )
    cube.write_footprint(store, "mine", masks, "a test", shares.sortby("year"))
    cube.create_site(store, site, grid, [2024], RECIPE)
    opened = cube.open_cube(store, "mine")
    np.testing.assert_array_equal(opened.footprint.sel(year=[2021, 2019]), masks)
    np.testing.assert_array_equal(opened.footprint_fraction.sel(year=[2021, 2019]), shares)
    assert (opened.footprint_fraction.sel(year=[2020, 2024]) == 255).all()
    assert opened.footprint_fraction.dtype == np.uint8
    assert opened.footprint_fraction.attrs == opened.footprint_fraction.attrs | {
        "nodata": 255,
        "origin": "a test",
    }
    assert opened.footprint_fraction.odc.geobox == grid
    made, beside = (
        zarr.open_array(f"{store}/mine/{name}") for name in ("footprint_fraction", "footprint")
    )
    assert (made.chunks, made.shards, made.fill_value) == (
        beside.chunks,
        beside.shards,
        beside.fill_value,
    )
    # Another footprint, of which no fraction is known: the old one must not stay beside it.
    cube.write_footprint(store, "mine", masks.sel(year=[2019]), "another")
    opened = cube.open_cube(store, "mine")
    assert (opened.footprint_fraction.sel(year=2019) == 255).all()
    np.testing.assert_array_equal(opened.footprint_fraction.sel(year=2021), shares.sel(year=2021))
    with pytest.raises(CubeError, match="another grid"):
        cube.write_footprint(store, "mine", masks, "x", shares.assign_coords(x=shares.x + 10))


@pytest.mark.parametrize("killed_at", ["footprint", "footprint_fraction"])
def test_labels_that_a_killed_run_left_are_not_opened(store, grid, monkeypatch, killed_at):
    coords = {"year": [2019], **odc.geo.xr.xr_coords(grid)}
    first, second = (
        xr.DataArray(np.full((1, *grid.shape), v, np.uint8), coords, ("year", "y", "x"))
        for v in (0, 1)
    )
    cube.write_footprint(store, "mine", first, "first", first)
    module = sys.modules["minecube.cube.write.labels"]
    note = module._note_labels

    def dies(array, *told):
        if array.path.endswith(f"/{killed_at}"):
            raise KeyboardInterrupt
        note(array, *told)

    with monkeypatch.context() as patched:
        patched.setattr(module, "_note_labels", dies)
        with pytest.raises(KeyboardInterrupt):
            cube.write_footprint(store, "mine", second, "second", second * np.uint8(250))
    half = cube.open_cube(store, "mine")  # pixels are read all the same
    assert not half.reflectance[0, 0, :9, :9].values.any()
    for name in ("footprint", "footprint_fraction"):
        if name != "footprint_fraction" or killed_at == name:
            with pytest.raises(
                CubeError,
                match="labels of mine are being written, or a run was killed while it wrote them",
            ):
                half[name].sel(year=2019).load()
    with pytest.raises(CubeError, match="labels of mine 2019 are being written"):
        need_labels(store, "mine")
    report = cube.verify(store)
    assert report.whole
    assert {(f.kind, f.year) for f in report.findings} == {("unfinished", 2019)}
    assert cube.read_grid_and_years(store, "mine") == (
        grid,
        list(YEARS),
    )  # so that they can be written again
    cube.write_footprint(store, "mine", second, "second", second * np.uint8(250))
    opened = cube.open_cube(store, "mine").sel(year=2019)
    assert (opened.footprint == 1).all()
    assert (opened.footprint_fraction == 250).all()
    assert cube.verify(store).findings == ()


def test_labels_written_while_they_are_read_are_an_error(store, grid):
    coords = {"year": [2019], **odc.geo.xr.xr_coords(grid)}
    first, second = (
        xr.DataArray(np.full((1, *grid.shape), v, np.uint8), coords, ("year", "y", "x"))
        for v in (0, 1)
    )
    cube.write_footprint(store, "mine", first, "first", first)
    opened = cube.open_cube(store, "mine")
    cube.write_footprint(store, "mine", second, "second", second)
    for name in ("footprint", "footprint_fraction"):
        with pytest.raises(
            CubeError,
            match="labels of mine were written while they were being read; open the cube again",
        ):
            opened[name].load()


def test_what_is_not_there_is_named(store):
    with pytest.raises(CubeError, match="no site 'other'; it has mine"):
        cube.open_cube(store, "other")
    with pytest.raises(CubeError, match="no prediction of 'net' for mine"):
        cube.open_probability(store, "mine", "net")
    with pytest.raises(CubeError, match="there is no store"):
        cube.list_sites(cube.Store(f"{store}x"))


def test_a_store_that_is_not_ours(tmp_path, site, grid):
    where = cube.Store(tmp_path / "other.zarr")
    zarr.create_group(str(where)).create_group("mine")
    with pytest.raises(CubeError, match="was not made by this version"):
        cube.create_site(where, site, grid, YEARS, RECIPE)


def test_a_disk_that_fills_up(store, tmp_path, site):
    """In a process that may write files of 9 kB at most: a real error of the operating system."""
    script = f"""
        import resource, signal, sys
        sys.path.insert(0, {str(tmp_path)!r})
        import dask, numpy as np, xarray as xr, dask.array as da
        from minecube import cube
        from minecube.errors import CubeError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))
        rng = np.random.default_rng(0)
        a = lambda *s: da.from_array(rng.integers(0, 60000, s).astype(np.uint16), chunks=(*s[:-2], 64, 64))
        made = xr.Dataset({{
            "reflectance": (("band", "y", "x"), a(2, 180, 240)),
            "clear_count": (("y", "x"), a(180, 240)),
            "quality": (("y", "x"), a(180, 240).astype(np.uint8)),
        }})
        try:
            cube.write_year(cube.Store({str(store)!r}), made, {PROVENANCE!r}, b"")
        except CubeError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert "cannot be written (File too large); committed site-years are unharmed" in done.stdout, (
        done.stderr
    )
    assert cube.read_markers(store, "mine") == {}


def test_a_folder_that_cannot_be_written(site, grid):
    with pytest.raises(CubeError, match=r"/proc/cubes\.zarr: cannot be written"):
        cube.create_site(cube.Store("/proc/cubes.zarr"), site, grid, YEARS, RECIPE)


class Counted:
    """Counts of reads as a ledger has them: so many planned a block, of which the first are lost."""

    def __init__(self, lost=0):
        self.blocks, self.lost_reads = 0, lost

    def totals(self):
        planned = 10 * self.blocks
        return {
            "planned": planned,
            "lost": self.lost_reads,
            "completeness": 1 - self.lost_reads / planned if planned else 1.0,
        }

    def lost(self):
        return ["some_scene B04: HTTP 404"] if self.lost_reads else []

    def to_parquet(self):
        out = io.BytesIO()
        pd.DataFrame({"planned": [10 * self.blocks]}).to_parquet(out)
        return out.getvalue()

    def over(self, made):
        """The composite, each block of which is counted once."""

        def count(block):
            self.blocks += 1
            return block

        return made.assign(
            quality=made.quality.copy(
                data=made.quality.data.map_blocks(count, dtype=np.uint8, meta=np.ndarray(()))
            )
        )


def test_lost_reads_keep_a_year_out_unless_allowed(store, grid):
    """12 blocks of 10 reads, 3 of them lost: 97.5 %."""
    reads, made = Counted(lost=3), year_of(grid)
    with pytest.raises(
        ReadError,
        match=r"mine 2020: 3 of 120 reads were lost, which leaves 97.50% .* asks for 100.00%.*404",
    ):
        cube.write_year(store, reads.over(made), PROVENANCE, b"", cube.BuildOptions(reads=reads))
    assert cube.read_markers(store, "mine") == {}
    assert "incomplete_reads" not in cube.open_cube(store, "mine").attrs
    # All is read again: what was lost must not pass for done.
    reads = Counted(lost=3)
    assert cube.write_year(
        store, reads.over(made), PROVENANCE, b"", cube.BuildOptions(reads=reads, completeness=0.97)
    )
    assert reads.blocks == 12
    assert cube.read_markers(store, "mine")[2020]["reads"] == {
        "planned": 120,
        "lost": 3,
        "completeness": 0.975,
    }
    assert xr.open_zarr(str(store), group="mine", consolidated=False).attrs["incomplete_reads"] == {
        "2020": 0.975
    }
    assert cube.read_counts(store, "mine", 2020).planned.tolist() == [120]
    assert not cube.write_year(store, made, PROVENANCE, b"", cube.BuildOptions(completeness=0.97))
    # What was accepted once stays accepted, until --overwrite asks for more.
    assert not cube.write_year(store, made, PROVENANCE, b"", cube.BuildOptions(completeness=0.99))
    assert not cube.write_year(
        store, made, PROVENANCE, b"", cube.BuildOptions(completeness=0.97, overwrite=True)
    )
    # Built anew with nothing lost, the cube no longer says so.
    whole = Counted()
    assert cube.write_year(
        store,
        whole.over(made),
        PROVENANCE,
        b"",
        cube.BuildOptions(reads=whole, completeness=0.99, overwrite=True),
    )
    assert (
        xr.open_zarr(str(store), group="mine", consolidated=False).attrs["incomplete_reads"] == {}
    )


def test_counts_of_an_interrupted_run_are_kept(store, grid):
    reads, made = Counted(), year_of(grid)
    asked = iter([False, False, True])
    with pytest.raises(CubeError, match="stopped"):
        cube.write_year(
            store,
            reads.over(made),
            PROVENANCE,
            b"",
            cube.BuildOptions(reads=reads, workers=2, stopped=lambda: next(asked)),
        )
    kept = cube.read_initial_counts(store, PROVENANCE)
    assert pd.read_parquet(io.BytesIO(kept)).planned.tolist() == [40]
    assert (
        cube.read_initial_counts(store, {**PROVENANCE, "version": "2"}) is None
    )  # of another build
    with pytest.raises(CubeError, match="no counts of reads for mine 2020"):
        cube.read_counts(store, "mine", 2020)


def test_another_way_with_conflicting_offsets_is_another_build(store, grid):
    """Only where there was a conflict: else it would have come out the same."""
    made, calm = year_of(grid), {**PROVENANCE, "on_offset_conflict": "drop", "offset_conflicts": []}
    assert cube.write_year(store, made, calm, b"")
    assert cube.is_committed(store, {**calm, "on_offset_conflict": "fix"})
    torn = {
        **PROVENANCE,
        "year": 2021,
        "on_offset_conflict": "drop",
        "offset_conflicts": [{"scene": "a"}],
    }
    assert cube.write_year(store, made, torn, b"")
    assert cube.is_committed(store, torn)
    with pytest.raises(CubeError, match="another version or --on-offset-conflict"):
        cube.is_committed(store, {**torn, "on_offset_conflict": "fix"})
    assert not cube.is_committed(store, {**torn, "on_offset_conflict": "fix"}, overwrite=True)


def test_a_run_killed_before_its_counts_are_kept_does_those_blocks_again(store, grid):
    """A lost read whose count died with the run must not pass for a read."""

    class Dies(Counted):
        def to_parquet(self):
            if self.blocks == 4:
                raise KeyboardInterrupt
            return super().to_parquet()

    made, reads = year_of(grid), Dies()
    with pytest.raises(KeyboardInterrupt):
        cube.write_year(
            store, reads.over(made), PROVENANCE, b"", cube.BuildOptions(reads=reads, workers=2)
        )
    kept = cube.read_initial_counts(store, PROVENANCE)
    assert pd.read_parquet(io.BytesIO(kept)).planned.tolist() == [20]  # of the first batch
    again = Counted()
    assert cube.write_year(
        store,
        again.over(made),
        PROVENANCE,
        b"",
        cube.BuildOptions(reads=again, before=kept, workers=2),
    )
    assert again.blocks == 12 - 2
    assert (
        cube.read_markers(store, "mine")[2020]["reads"]["planned"] == 100
    )  # this fake counts its own blocks only


def test_blocks_of_another_policy_are_not_gone_on_with(store, grid):
    """One scene is in conflict: kept in the first run, left out in the second."""
    kept, dropped = year_of(grid, seed=1), year_of(grid, seed=2)
    torn = {**PROVENANCE, "on_offset_conflict": "warn", "offset_conflicts": [{"scene": "a"}]}
    asked = iter([False, True])
    with pytest.raises(CubeError, match="stopped"):
        cube.write_year(
            store, kept, torn, b"", cube.BuildOptions(workers=2, stopped=lambda: next(asked))
        )
    assert cube.write_year(store, dropped, {**torn, "on_offset_conflict": "drop"}, b"")
    np.testing.assert_array_equal(
        cube.open_cube(store, "mine").reflectance.sel(year=2020), dropped.reflectance
    )


def test_a_year_of_which_all_was_lost_says_so(store, grid):
    empty, reads = (
        year_of(grid).map(lambda v: v.copy(data=da.zeros_like(v.data))),
        Counted(lost=120),
    )
    with pytest.raises(ReadError, match="120 of 120 reads were lost, which leaves no pixel"):
        cube.write_year(
            store,
            reads.over(empty),
            PROVENANCE,
            b"",
            cube.BuildOptions(reads=reads, completeness=0),
        )
    assert cube.read_initial_counts(store, PROVENANCE) is None


def test_counts_of_another_build_are_not_gone_on_with(store, grid):
    """The second build dies before it has counts of its own: the first one's are no beginning for it."""

    class Dies(Counted):
        def to_parquet(self):
            raise KeyboardInterrupt

    made, asked, other = year_of(grid), iter([False, True]), {**PROVENANCE, "version": "2"}
    first, second = Counted(), Dies()
    with pytest.raises(CubeError, match="stopped"):
        cube.write_year(
            store,
            first.over(made),
            PROVENANCE,
            b"",
            cube.BuildOptions(reads=first, workers=2, stopped=lambda: next(asked)),
        )
    with pytest.raises(KeyboardInterrupt):
        cube.write_year(
            store, second.over(made), other, b"", cube.BuildOptions(reads=second, workers=2)
        )
    assert cube.read_initial_counts(store, other) is None


def test_checksums_are_of_objects_that_are_there(tmp_path):
    """Also where a long array has made way for a short one."""
    target = cube.Store(tmp_path / "cubes.zarr").open_with_checksums()
    group = zarr.open_group(target, mode="a")
    for size in (3_000_000, 300):
        put_bytes(group, "reads", np.random.default_rng(size).bytes(size))
    there = {
        p.relative_to(tmp_path / "cubes.zarr").as_posix()
        for p in (tmp_path / "cubes.zarr/reads").rglob("*")
    }
    assert {key for key in target.sums if key.startswith("reads/")} == there - {"reads/c"}


def test_counts_that_cannot_be_read_start_the_year_afresh(store, grid):
    """They are one object with the blocks they belong to; damaged all the same, no block of theirs counts as done."""
    reads, made = Counted(), year_of(grid)
    asked = iter([False, False, True])
    with pytest.raises(CubeError, match="stopped"):
        cube.write_year(
            store,
            reads.over(made),
            PROVENANCE,
            b"",
            cube.BuildOptions(reads=reads, workers=2, stopped=lambda: next(asked)),
        )
    (path,) = store.path.glob("mine/builds/2020.*.new/zarr.json")
    staged = json.loads(path.read_text())
    assert len(staged["attributes"]["blocks"]) == 4
    staged["attributes"]["reads"] = staged["attributes"]["reads"][:40]
    path.write_text(json.dumps(staged))
    assert cube.read_initial_counts(store, PROVENANCE) is None
    again = Counted()
    assert cube.write_year(store, again.over(made), PROVENANCE, b"", cube.BuildOptions(reads=again))
    assert again.blocks == 12
    assert cube.read_counts(store, "mine", 2020).planned.tolist() == [120]


def test_blocks_of_a_process_whose_counts_are_unknown_are_made_again(store, grid):
    """Another process has done some blocks, and lost reads, since this one looked for counts to go on from."""
    before = cube.read_initial_counts(store, PROVENANCE)
    other, made = Counted(lost=3), year_of(grid)
    asked = iter([False, True])
    with pytest.raises(CubeError, match="stopped"):
        cube.write_year(
            store,
            other.over(made),
            PROVENANCE,
            b"",
            cube.BuildOptions(reads=other, workers=2, stopped=lambda: next(asked)),
        )
    reads = Counted()
    assert cube.write_year(
        store, reads.over(made), PROVENANCE, b"", cube.BuildOptions(reads=reads, before=before)
    )
    assert reads.blocks == 12


def test_a_site_that_lost_its_metadata_is_not_created_again(store, site, grid):
    cube.write_year(store, year_of(grid), PROVENANCE, b"")
    Path(store.path, "mine/zarr.json").unlink()
    there = sorted(store.path.rglob("*"))
    with pytest.raises(
        CubeError,
        match=r"mine has lost its zarr.json, but has other objects; run `minecube verify`",
    ):
        cube.create_site(store, site, grid, YEARS, RECIPE)
    assert sorted(store.path.rglob("*")) == there


def test_a_group_that_lacks_an_array_is_refused(store, site, grid):
    shutil.rmtree(f"{store}/mine/quality")
    with pytest.raises(CubeError, match="mine lacks its array 'quality'; run `minecube verify`"):
        cube.create_site(store, site, grid, YEARS, RECIPE)


def test_a_second_builder_of_a_site_year_is_told(store, grid):
    made = year_of(grid)

    def meanwhile():
        with pytest.raises(BusyError, match="mine/builds/2020 is being written by another run"):
            cube.write_year(store, made, PROVENANCE, b"")
        return True

    with pytest.raises(CubeError, match="stopped"):
        cube.write_year(store, made, PROVENANCE, b"", cube.BuildOptions(stopped=meanwhile))
    assert cube.write_year(store, made, PROVENANCE, b"")


def staged(store):
    """The group of the year that is being built."""
    (path,) = store.path.glob("mine/builds/2020.*.new")
    return path


def test_a_noted_block_whose_shard_is_gone_is_made_again(store, grid):
    asked = iter([False, False, True])
    made = year_of(grid)
    with pytest.raises(CubeError, match="stopped"):
        cube.write_year(
            store, made, PROVENANCE, b"", cube.BuildOptions(workers=2, stopped=lambda: next(asked))
        )
    (staged(store) / "reflectance/c/0/0/0/0").unlink()
    assert cube.write_year(store, made, PROVENANCE, b"")
    np.testing.assert_array_equal(
        cube.open_committed(store, "mine").reflectance[0], made.reflectance
    )


class Interrupted(BaseException):
    pass


def kill_while_placing(store, made, provenance, monkeypatch, after=2):
    """Commit a year, and stop after so many of its objects are in place."""
    place = sys.modules["minecube.cube.write.staging"]._place
    count = iter(range(10_000))

    def dies(*args):
        if next(count) == after:
            raise Interrupted
        return place(*args)

    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["minecube.cube.write.staging"], "_place", dies)
        with pytest.raises(Interrupted):
            cube.write_year(store, made, provenance, b"", cube.BuildOptions(overwrite=True))


@pytest.mark.parametrize("lost", ["a staged shard", "all that is staged"])
def test_a_commit_that_lost_an_object_is_taken_back_and_built_again(store, grid, monkeypatch, lost):
    """Also where the year that it replaces has a shard of that name: it must not be taken for the new one."""
    old, new = year_of(grid, seed=1), year_of(grid, seed=2)
    cube.write_year(store, old, PROVENANCE, b"")
    other = {**PROVENANCE, "version": "2"}
    kill_while_placing(store, new, other, monkeypatch)
    if lost == "a staged shard":
        sorted((staged(store) / "reflectance").rglob("[0-9]"))[-1].unlink()
    else:
        shutil.rmtree(staged(store))
    assert cube.write_year(store, new, other, b"", cube.BuildOptions(overwrite=True))
    np.testing.assert_array_equal(
        cube.open_committed(store, "mine").reflectance[0], new.reflectance
    )
    np.testing.assert_array_equal(cube.open_committed(store, "mine").quality[0], new.quality)


def test_a_year_that_is_half_in_its_place_is_not_read(store, grid, monkeypatch):
    monkeypatch.setattr(sys.modules["minecube.cube.read.commits"], "PLACED_S", 0.0)
    cube.write_year(store, year_of(grid, seed=1), PROVENANCE, b"")
    cube.write_year(store, year_of(grid, seed=1), {**PROVENANCE, "year": 2019}, b"")
    kill_while_placing(store, year_of(grid, seed=2), {**PROVENANCE, "version": "2"}, monkeypatch)
    assert cube.open_committed(store, "mine").year.values.tolist() == [2019]
    with pytest.raises(CubeError, match="mine 2020 was built again while it was being read"):
        cube.open_cube(store, "mine").reflectance.sel(year=2020).load()
    cube.finish_commit(store, "mine", 2020)
    assert cube.open_committed(store, "mine").year.values.tolist() == [2019, 2020]
    np.testing.assert_array_equal(
        cube.open_cube(store, "mine").reflectance[1], year_of(grid, seed=2).reflectance
    )


def test_a_withdrawn_year_that_was_half_in_its_place_is_built_again(store, grid, monkeypatch):
    made = year_of(grid)
    kill_while_placing(store, made, PROVENANCE, monkeypatch)
    cube.withdraw_years(store, "mine", [2020])
    assert cube.write_year(store, made, PROVENANCE, b"")
    np.testing.assert_array_equal(
        cube.open_committed(store, "mine").reflectance[0], made.reflectance
    )
