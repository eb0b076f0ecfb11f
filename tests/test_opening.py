"""Cubes are opened whole: no mixture, no false zero, and the natural next steps work."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path

import dask.array as da
import numpy as np
import odc.geo.xr
import pytest
import rioxarray  # noqa: F401
import xarray as xr
import zarr

import minecube
from known_scenes import site_of
from minecube import cube
from minecube.catalog import Recipe
from minecube.errors import CubeError
from minecube.grid import grid_of

RECIPE = Recipe(id="small", title="t", bands=("B04", "B08"), block_px=64, chunk_px=32)


@pytest.fixture
def site():
    return site_of("pit", 360000, 5600040, 90, 90)


@pytest.fixture
def store(tmp_path, site):
    where = cube.Store(tmp_path / "cubes.zarr")
    cube.create_site(where, site, grid_of(site), (2019, 2020, 2021), RECIPE)
    build(where, site, 2019, 1000)
    build(where, site, 2020, 2000)
    return where


def build(store, site, year, value, **how):
    """A year of one value, but for a corner without observations; its scene is named by the value."""
    grid = grid_of(site)
    quality = np.ones(grid.shape, np.uint8)
    quality[:8, :8] = 0
    pixels = np.where(quality, np.array([value, value + 7])[:, None, None], 0).astype(np.uint16)
    made = {
        "reflectance": (("band", "y", "x"), da.from_array(pixels, chunks=(2, 64, 64))),
        "clear_count": (("y", "x"), da.from_array(quality.astype(np.uint16), chunks=64)),
        "quality": (("y", "x"), da.from_array(quality, chunks=64)),
    }
    told = {
        "minecube:source": "s",
        "s2:processing_baseline": "05.00",
        "minecube:offset": 0,
        "minecube:offset_reason": "r",
    }
    scene = types.SimpleNamespace(id=f"scene {value}", properties=told)
    provenance = cube.describe_build(site, year, grid, RECIPE, [scene])
    return cube.write_year(store, xr.Dataset(made), provenance, b"", cube.BuildOptions(**how))


def test_a_failed_rebuild_leaves_the_old_year(store, site, monkeypatch):
    before = cube.open_committed(store, "pit").load()
    marker = cube.read_markers(store, "pit")[2020]
    asked = iter([False, True])
    with pytest.raises(CubeError, match="stopped with 3 of 4 blocks to go"):
        build(store, site, 2020, 3000, overwrite=True, workers=1, stopped=lambda: next(asked))
    assert cube.read_markers(store, "pit")[2020] == marker
    xr.testing.assert_identical(cube.open_committed(store, "pit").load(), before)
    assert (
        int(
            xr.open_zarr(str(store), group="pit", consolidated=False)
            .reflectance.sel(year=2020)
            .max()
        )
        == 2007
    )
    assert build(store, site, 2020, 3000, overwrite=True)
    assert int(cube.open_committed(store, "pit").reflectance.sel(year=2020).max()) == 3007


def test_a_year_that_is_being_built_reads_as_no_data_to_everyone(store, site):
    asked = iter([False, True])
    with pytest.raises(CubeError, match="stopped"):
        build(store, site, 2021, 3000, workers=1, stopped=lambda: next(asked))
    for opened in (
        xr.open_zarr(str(store), group="pit", consolidated=False),
        cube.open_cube(store, "pit"),
    ):
        assert not opened.reflectance.sel(year=2021).values.any()
    assert cube.open_committed(store, "pit").year.values.tolist() == [2019, 2020]


@pytest.mark.parametrize("change", ["rebuilt", "withdrawn", "committed"])
def test_what_changes_between_opening_and_reading_is_an_error(store, site, change):
    year = 2021 if change == "committed" else 2020
    opened = cube.open_cube(store, "pit")
    windows = cube.CubeDataset(store, size=32, step=32)
    if change == "withdrawn":
        cube.withdraw_years(store, "pit", [2020])
    else:
        build(store, site, year, 3000, overwrite=True)
    said = f"pit {year} was built again while it was being read; open the cube again"
    with pytest.raises(CubeError, match=said):
        opened.reflectance.sel(year=year).load()
    with pytest.raises(CubeError, match=said):
        opened.quality.sel(year=year)[::7, ::3].load()
    assert int(opened.reflectance.sel(year=2019).max()) == 1007  # the others are as they were
    if change != "committed":
        with pytest.raises(CubeError, match=said):
            windows[0]


def test_a_reader_during_overwrite_never_sees_a_mixture(store, site, tmp_path):
    """A process replaces a year by 2000 and 4000 in turn; no read may have pixels of both."""
    script = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import known_scenes, test_opening
        from minecube import cube
        site = known_scenes.site_of("pit", 360000, 5600040, 90, 90)
        store = cube.Store({str(store)!r})
        for n in range(1_000):
            test_opening.build(store, site, 2020, (4000, 2000)[n % 2], overwrite=True)
            print(n, flush=True)
    """
    writer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout.readline() == "0\n"
    seen: list[int] = []
    deadline = time.monotonic() + 120
    try:
        while len(seen) < 100 or len(set(seen)) < 2:
            assert time.monotonic() < deadline
            try:
                pixels = (
                    cube.open_committed(store, "pit")
                    .reflectance.sel(year=2020, band="B04")
                    .to_numpy()
                )
            except CubeError as error:
                assert "was built again while it was being read" in str(error)  # noqa: PT017
                continue
            values = np.unique(pixels).tolist()
            assert values in ([0, 2000], [0, 4000])
            seen.append(values[1])
    finally:
        writer.kill()
        writer.communicate()


def test_files_that_others_are_writing_are_no_members(store, tmp_path):
    (tmp_path / "cubes.zarr/pit/zarr.0123.partial").write_bytes(b"{")
    (tmp_path / "cubes.zarr/zarr.4567.partial").write_bytes(b"{")
    assert cube.list_sites(store) == ["pit"]  # warnings are errors here
    assert cube.open_committed(store, "pit").year.values.tolist() == [2019, 2020]


def test_a_missing_shard_is_an_error_in_an_object_store_too(bucket, site):
    from obstore.store import from_url

    url = cube.Store(f"{bucket}/cubes.zarr")
    cube.create_site(url, site, grid_of(site), (2019, 2020), RECIPE)
    build(url, site, 2020, 2000)
    assert int(cube.open_committed(url, "pit").reflectance.max()) == 2007
    from_url(str(url)).delete("pit/reflectance/c/1/0/1/1")
    opened = cube.open_committed(url, "pit")
    assert int(opened.reflectance[:, :, :64, :64].max()) == 2007
    with pytest.raises(
        CubeError, match="pit/reflectance/c/1/0/1/1 is missing although it was committed"
    ):
        opened.reflectance.load()
    opened = cube.open_committed(url, "pit")
    build(url, site, 2020, 3000, overwrite=True)
    with pytest.raises(CubeError, match="was built again while it was being read"):
        opened.reflectance[:, :, :64, :64].load()


def test_a_shard_of_another_variable_is_an_error_not_a_pixel(store, tmp_path):
    """Its chunks have correct checksums, but fewer bytes."""
    folder = tmp_path / "cubes.zarr/pit"
    for name in ("clear_count", "quality"):
        content = (folder / name / "c/0/0/0").read_bytes()
        path = folder / "reflectance/c/0/0/0/0"
        path.unlink()
        path.write_bytes(content)
        with pytest.raises(CubeError, match=r"damaged chunk \(it has \d+ bytes in place of \d+\)"):
            cube.open_committed(store, "pit").reflectance.sel(year=2019)[:, :64, :64].load()


def test_a_flipped_bit_is_an_error_not_a_pixel(store, tmp_path):
    """Each byte of the packed chunks of a shard in turn; chunks of other shards are still read."""
    path = tmp_path / "cubes.zarr/pit/reflectance/c/0/0/0/0"
    whole = path.read_bytes()
    index = 4 * 16 + 4  # four chunks of 32 px, and the checksum of the index
    for at in range(0, len(whole) - index, 7):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        path.unlink()  # a new file, as every writer makes one
        path.write_bytes(damaged)
        with pytest.raises(CubeError, match=r"has a damaged chunk .*run `minecube verify`"):
            cube.open_committed(store, "pit").reflectance.sel(year=2019)[:, :64, :64].load()
        with pytest.raises(ValueError, match=r"checksum|crc32c"):
            zarr.open_array(f"{store}/pit/reflectance", mode="r")[0, :, :64, :64]
    assert (
        int(cube.open_committed(store, "pit").reflectance.sel(year=2019)[:, 64:, 64:].max()) == 1007
    )


def test_a_flipped_bit_in_the_index_is_an_error_not_no_data(store, tmp_path):
    """A chunk that the index does not name would read as fill value."""
    path = tmp_path / "cubes.zarr/pit/reflectance/c/0/0/0/0"
    whole = path.read_bytes()
    index = 4 * 16 + 4
    for at in range(len(whole) - index, len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        path.unlink()
        path.write_bytes(damaged)
        with pytest.raises(
            CubeError, match=r"CRC-32C of its index is wrong.*run `minecube verify`"
        ):
            cube.open_committed(store, "pit").reflectance.sel(year=2019)[:, :64, :64].load()
        with pytest.raises(ValueError, match=r"checksum|crc32c"):
            zarr.open_array(f"{store}/pit/reflectance", mode="r")[0, :, :64, :64]


def test_natural_next_steps_work(store, site, tmp_path):
    grid = grid_of(site)
    masks = xr.DataArray(
        np.ones((1, *grid.shape), np.uint8),
        dims=("year", "y", "x"),
        coords={"year": [2020], **odc.geo.xr.xr_coords(grid)},
    )
    cube.write_footprint(store, "pit", masks, "drawn (CC0)")
    opened = minecube.open_committed(store, "pit")
    assert opened.odc.geobox == grid
    assert opened.reflectance.dtype == np.uint16
    assert opened.reflectance.data.chunksize == (1, 2, 32, 32)
    assert opened.footprint.attrs["origin"] == "drawn (CC0)"
    for written in ("cube.nc", "cube.zarr"):
        if written.endswith("nc"):
            opened.to_netcdf(tmp_path / written)
            back = xr.open_dataset(tmp_path / written, engine="netcdf4")
        else:
            opened.to_zarr(tmp_path / written, consolidated=False)
            back = xr.open_zarr(tmp_path / written, consolidated=False)
        with back:
            for name in opened.data_vars:
                np.testing.assert_array_equal(back[name], opened[name], err_msg=name)
            assert back.rio.crs.to_epsg() == 32633
    tree = xr.open_datatree(str(store), engine="zarr", consolidated=False)
    np.testing.assert_array_equal(tree["pit/reflectance"][:2], opened.reflectance)


def test_reflectance_as_numbers(store):
    """NDVI of 2000 and 2007 by hand: 7 / 4007; as stored, B04 - B08 would wrap to 65529."""
    as_float = minecube.as_float(minecube.open_committed(store, "pit"))
    red, infrared = (as_float.reflectance.sel(year=2020, band=band) for band in ("B04", "B08"))
    assert red.dtype == np.float32
    assert np.isnan(red[:8, :8]).all()
    assert float(red[20, 20]) == pytest.approx(0.2)
    ndvi = (infrared - red) / (infrared + red)
    assert float(ndvi.mean()) == pytest.approx(7 / 4007, rel=1e-4)
    assert as_float.reflectance.attrs == {
        "grid_mapping": "spatial_ref",
        "long_name": "surface reflectance",
        "units": "1",
    }
    assert as_float.odc.geobox == minecube.open_committed(store, "pit").odc.geobox
