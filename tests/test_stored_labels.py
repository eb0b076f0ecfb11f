"""Labels, their fractions and predictions are stored under their years, whole or not at all."""

from __future__ import annotations

import shutil
import sys

import numpy as np
import odc.geo.xr
import pytest
import xarray as xr
import zarr

from known_site_years import (
    PROVENANCE,
    RECIPE,
    YEARS,
    create_store,
    year_of,
)
from minecube import cube
from minecube.cube.write.labels import need_labels
from minecube.errors import CubeError
from minecube.grid import grid_of


@pytest.fixture
def grid(site):
    return grid_of(site)


@pytest.fixture
def store(tmp_path, site, grid):
    """A store with the site's template, nothing built."""
    return create_store(tmp_path / "cubes.zarr", site, grid)


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
