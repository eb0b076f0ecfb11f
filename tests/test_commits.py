"""A site-year is committed whole or not at all."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import textwrap

import dask.array as da
import numpy as np
import pytest
import zarr

from known_scenes import grid_at, site_of
from known_site_years import (
    PROVENANCE,
    RECIPE,
    create_store,
    staged,
    year_of,
)
from minecube import cube
from minecube.composite import composite, reducers
from minecube.cube.write.staging import put_bytes
from minecube.errors import BusyError, CubeError, ReadError
from minecube.grid import grid_of


@pytest.fixture
def grid(site):
    return grid_of(site)


@pytest.fixture
def store(tmp_path, site, grid):
    """A store with the site's template, nothing built."""
    return create_store(tmp_path / "cubes.zarr", site, grid)


def test_a_year_without_a_pixel_is_not_committed(store, grid):
    empty = year_of(grid).map(lambda v: v.copy(data=da.zeros_like(v.data)))
    with pytest.raises(CubeError, match="no scene has a pixel here, so nothing is committed"):
        cube.write_year(store, empty, PROVENANCE, b"")
    assert cube.read_markers(store, "mine") == {}


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
    """All variables come from one task a block."""
    site = site_of("mine", 360000, 5600040, 60, 48)
    recipe = dataclasses.replace(RECIPE, block_px=32, reducer="geomedian")
    scene = archive.scene(
        "2020-06-01T10:00:00", grid_at(359400, 5600640, 180, 180), {"B04": 7, "B11": 9}
    )
    where, made = cube.Store(tmp_path / "cubes.zarr"), []
    cube.create_site(where, site, grid_of(site), [2020], recipe)

    def counted(stack):
        made.append(1)
        return reducers.geomedian(stack)

    lazy = composite([scene], grid_of(site), recipe, geomedian=counted)
    cube.write_year(where, lazy, PROVENANCE, b"")
    assert len(made) == 4
    np.testing.assert_array_equal(cube.open_cube(where, "mine").reflectance[0, :, 5, 5], [7, 9])


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


def test_a_second_builder_of_a_site_year_is_told(store, grid):
    made = year_of(grid)

    def meanwhile():
        with pytest.raises(BusyError, match="mine/builds/2020 is being written by another run"):
            cube.write_year(store, made, PROVENANCE, b"")
        return True

    with pytest.raises(CubeError, match="stopped"):
        cube.write_year(store, made, PROVENANCE, b"", cube.BuildOptions(stopped=meanwhile))
    assert cube.write_year(store, made, PROVENANCE, b"")


def stop_while_placing(store, made, provenance):
    """Commit a year, and stop at its third object: a folder is where the object belongs."""
    place = store.path / "mine/clear_count/c/1/0/0"
    kept = place.read_bytes() if place.exists() else None
    place.unlink(missing_ok=True)
    place.mkdir(parents=True)
    (place / "file").touch()
    with pytest.raises(CubeError, match=r"cannot be written .*Is a directory.* make room"):
        cube.write_year(store, made, provenance, b"", cube.BuildOptions(overwrite=True))
    shutil.rmtree(place)
    if kept is not None:
        place.write_bytes(kept)


@pytest.mark.parametrize("lost", ["a staged shard", "all that is staged"])
def test_a_commit_that_lost_an_object_is_taken_back_and_built_again(store, grid, lost):
    """Also where the year that it replaces has a shard of that name: it must not be taken for the new one."""
    old, new = year_of(grid, seed=1), year_of(grid, seed=2)
    cube.write_year(store, old, PROVENANCE, b"")
    other = {**PROVENANCE, "version": "2"}
    stop_while_placing(store, new, other)
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
    stop_while_placing(store, year_of(grid, seed=2), {**PROVENANCE, "version": "2"})
    assert cube.open_committed(store, "mine").year.values.tolist() == [2019]
    with pytest.raises(CubeError, match="mine 2020 was built again while it was being read"):
        cube.open_cube(store, "mine").reflectance.sel(year=2020).load()
    cube.finish_commit(store, "mine", 2020)
    assert cube.open_committed(store, "mine").year.values.tolist() == [2019, 2020]
    np.testing.assert_array_equal(
        cube.open_cube(store, "mine").reflectance[1], year_of(grid, seed=2).reflectance
    )


def test_a_withdrawn_year_that_was_half_in_its_place_is_built_again(store, grid):
    made = year_of(grid)
    stop_while_placing(store, made, PROVENANCE)
    cube.withdraw_years(store, "mine", [2020])
    assert cube.write_year(store, made, PROVENANCE, b"")
    np.testing.assert_array_equal(
        cube.open_committed(store, "mine").reflectance[0], made.reflectance
    )
