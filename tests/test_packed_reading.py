"""A packed store reads as its folder does, for Zarr, xarray, GDAL and windows, and is never written."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import rasterio
import xarray as xr
import zarr
from click.testing import CliRunner
from hypothesis import given
from hypothesis import settings as having
from hypothesis import strategies as st

from known_packs import (
    RECIPE,
    make_sites,
    make_whole,
    pack_small,
    pack_whole,
    place,
    provenance,
    same,
    scenes,
    year_of,
)
from minecube import cube
from minecube.cli import cli
from minecube.errors import CubeError
from minecube.grid import grid_of


@pytest.fixture(scope="module")
def sites():
    return make_sites()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_whole(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def zipped(whole):
    return pack_whole(whole)


@pytest.fixture(scope="module")
def small(whole):
    return pack_small(whole)


def test_zarr_and_xarray_open_it_unaided(whole, zipped):
    with zarr.storage.ZipStore(zipped[0], mode="r") as store:
        group, asked = zarr.open_group(store, mode="r"), zarr.open_group(str(whole), mode="r")
        arrays = {name: a for name, a in group.members(max_depth=None) if isinstance(a, zarr.Array)}
        assert {n.split("/")[0] for n in arrays} == {"pit", "pond"}
        assert {
            "pit/reflectance",
            "pond/predictions/net/probability",
            "pond/builds/2019/scenes",
        } < set(arrays)
        for name, array in arrays.items():
            expected = asked[name][...]
            if (
                name.startswith("pit/")
                and len(array.shape) > 2
                and "footprint" not in name
                and "net" not in name
            ):
                expected[2] = 0  # the year that was only begun
            np.testing.assert_array_equal(array[...], expected, err_msg=name)
        with xr.open_zarr(store, group="pond", consolidated=False) as opened:
            xr.testing.assert_identical(
                opened.load(), xr.open_zarr(whole, group="pond", consolidated=False).load()
            )


def test_gdal_says_of_it_what_it_says_of_the_folder(whole, zipped):
    """Up to 3.12 that shards are beyond it, which it learns from the metadata; later ones read pixels."""

    def said(store):
        try:
            with rasterio.open(f'ZARR:"{store}/pond":/reflectance') as opened:
                return opened.read().tolist()
        except rasterio.errors.RasterioIOError as error:
            return str(error)

    assert said(f"/vsizip/{zipped[0]}") == said(whole)
    assert "not recognized" not in said(whole)


def test_it_opens_as_the_folder_does(whole, zipped):
    here, there = str(zipped[0]), str(whole)
    assert cube.list_sites(cube.Store(here)) == ["pit", "pond"]
    for name in cube.list_sites(cube.Store(here)):
        assert cube.read_markers(cube.Store(here), name) == cube.read_markers(
            cube.Store(there), name
        )
        xr.testing.assert_identical(
            cube.open_committed(cube.Store(here), name).load(),
            cube.open_committed(cube.Store(there), name).load(),
        )
        probability = [
            cube.open_probability(cube.Store(store), name, "net").load() for store in (here, there)
        ]
        xr.testing.assert_identical(*probability)
    with pytest.raises(CubeError, match="no site 'plan'; it has pit, pond"):
        cube.open_cube(cube.Store(here), "plan")
    with pytest.raises(CubeError, match="no prediction of 'other'"):
        cube.open_probability(cube.Store(here), "pit", "other")


@having(max_examples=30, deadline=None)
@given(
    view=st.sampled_from(cube.VIEWS),
    size=st.integers(1, 140),
    seed=st.integers(0, 99),
    site=st.sampled_from(["pit", "pond"]),
)
def test_windows_are_those_of_the_folder(whole, zipped, view, size, seed, site):
    how = {"site_ids": [site], "view": view, "size": size, "seed": seed, "length": 2}
    here, there = (
        cube.CubeDataset(cube.Store(zipped[0]), **how),
        cube.CubeDataset(cube.Store(whole), **how),
    )
    assert here._sites[site].reflectance.decoder is not None
    for index in range(2):
        same(here[index], there[index])


def test_workers_cut_the_same(whole, zipped):
    """Forked and spawned, after the parent has cut some itself; in a process that may use sockets."""
    script = f"""
        import hashlib
        from torch.utils.data import DataLoader
        from minecube.cube import CubeDataset, Store

        if __name__ == "__main__":
            for store, workers, way in (
                ({str(whole)!r}, 0, None), ({str(zipped[0])!r}, 0, None),
                ({str(zipped[0])!r}, 2, "fork"), ({str(zipped[0])!r}, 2, "spawn"),
            ):
                told = hashlib.sha256()
                windows = CubeDataset(Store(store), ["pit", "pond"], size=80, length=12)
                for batch in DataLoader(windows, batch_size=3, num_workers=workers, multiprocessing_context=way):
                    for name in ("reflectance", "footprint", "years", "y", "x"):
                        told.update(batch[name].numpy().tobytes())
                print(told.hexdigest())
    """
    Path(whole.with_name("workers.py")).write_text(
        textwrap.dedent(script)
    )  # spawned processes read it again
    done = subprocess.run(
        [sys.executable, str(whole.with_name("workers.py"))],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 4, done.stderr
    assert len(set(lines)) == 1


def test_zips_of_other_hands(whole, tmp_path):
    """Folders as members of their own, a comment at the end, no order: zip -0 makes such."""
    store = Path(shutil.copytree(whole, tmp_path / "cubes.zarr"))
    out = tmp_path / "other.zip"
    subprocess.run(
        ["zip", "-0", "-r", "-q", "-z", str(out), "."], cwd=store, check=True, input=b"by hand\n"
    )
    assert cube.verify(cube.Store(out)).whole
    assert cube.list_sites(cube.Store(out)) == ["pit", "plan", "pond"]
    same(
        cube.CubeDataset(cube.Store(out), ["pit"], size=120)[0],
        cube.CubeDataset(cube.Store(whole), ["pit"], size=120)[0],
    )


def test_a_store_far_away_and_a_folder_of_that_name(whole, tmp_path):
    with pytest.raises(
        CubeError,
        match=r"s3://b/cubes.zip: a packed store is read from a local disk; download it",
    ):
        cube.Store("s3://b/cubes.zip")
    folder = shutil.copytree(whole, tmp_path / "cubes.zip")
    assert cube.list_sites(cube.Store(folder)) == ["pit", "plan", "pond"]
    cube.withdraw_years(cube.Store(folder), "pond", [2019])
    assert list(cube.read_markers(cube.Store(folder), "pond")) == [2020]


def test_nothing_is_written_into_it(zipped, sites, tmp_path):
    """Neither by a command nor by what they call, and before anything is read."""
    out, before = str(zipped[0]), zipped[0].read_bytes()
    site, grid = sites["pond"], grid_of(sites["pond"])
    opened = cube.open_cube(cube.Store(out), "pond").load()
    said = r"cubes.zarr.zip: is a packed store, which is only read; write to the store it was packed from, or unpack it"
    for write in (
        lambda: cube.create_site(cube.Store(out), site, grid, [2022], RECIPE),
        lambda: cube.create_site(cube.Store(tmp_path / "new.zip"), site, grid, [2022], RECIPE),
        lambda: cube.write_year(
            cube.Store(out), year_of(grid, 2021), provenance(site, 2021), scenes()
        ),
        lambda: cube.write_footprint(cube.Store(out), "pond", opened.footprint, "drawn"),
        lambda: cube.write_probability(cube.Store(out), "pond", "net2", opened.footprint, {}),
        lambda: cube.withdraw_years(cube.Store(out), "pond", [2019]),
    ):
        with pytest.raises(CubeError, match="is a packed store, which is only read"):
            write()
    none = str(tmp_path / "none")
    for asked in (
        ["build", "--sites", "Germany_1", "--years", "2020", "--source", "none"],
        ["label", "--polygons", none],
        ["predict", "--model", none],
        ["verify", "--uncommit"],
    ):
        done = CliRunner().invoke(cli, [*asked, "--store", out])
        assert (done.exit_code, len(done.output.splitlines())) == (2, 1)
        assert said.replace(r"\.", ".") in done.output
    assert zipped[0].read_bytes() == before
    assert not (tmp_path / "new.zip").exists()


def test_one_that_is_replaced_is_another(small, whole, sites, tmp_path):
    """And one that is cut short under a dataset is an error, not a window of what was read before."""
    store = str(shutil.copytree(whole, tmp_path / "cubes.zarr"))
    out = tmp_path / "pond.zip"
    cube.pack(cube.Store(store), out, ["pond"])
    dataset = cube.CubeDataset(cube.Store(out), size=60)
    first = dataset[0]
    other = year_of(grid_of(sites["pond"]), 5)
    changed = {**provenance(sites["pond"], 2019), "scenes": []}
    cube.write_year(cube.Store(store), other, changed, scenes(), cube.BuildOptions(overwrite=True))
    cube.pack(cube.Store(store), out, ["pond"])
    second = dataset[0]["reflectance"]
    np.testing.assert_array_equal(second[0], other.reflectance.values)
    np.testing.assert_array_equal(second[1], first["reflectance"][1])
    start, size = place(out, "pond/reflectance/c/0/0/0/0")
    whole_file = out.read_bytes()
    for content, said in (
        (whole_file[: start + size // 2], "is no zip, or a damaged one"),
        (
            whole_file[:start] + bytes(size - 68) + whole_file[start + size - 68 :],
            "has a damaged chunk",
        ),
        (
            whole_file[: start - 40] + bytes(40) + whole_file[start:],
            "points outside the file's data",
        ),
    ):
        out.unlink()
        out.write_bytes(content)
        with pytest.raises(CubeError, match=said):
            dataset[0]
    out.unlink()
    with pytest.raises(CubeError, match="is gone"):
        dataset[0]
