"""`minecube verify` accepts stores of unfinished, resumed, repeated and older builds."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
import xarray as xr
import zarr

from known_damage import (
    RECIPE,
    SHARD,
    YEARS,
    Counted,
    edit,
    flip,
    found,
    make_whole,
    parquet,
    provenance,
    year_of,
)
from known_scenes import site_of
from minecube import cube
from minecube.errors import BusyError, CubeError
from minecube.grid import grid_of


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_whole(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def store(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "cubes.zarr"))


def test_built_before_there_were_checksums(store):
    """Unverifiable is not whole; what can be seen without checksums is seen."""
    for part in (store / "pit/builds/2020/zarr.json", store / "pit/predictions/net/zarr.json"):
        edit(part, lambda m: [m["attributes"].pop(k) for k in ("checksums", "sha256")])
    edit(
        store / "pit/footprint/zarr.json",
        lambda m: [m["attributes"].pop(k) for k in ("checksums", "sha256")],
    )
    edit(
        store / "pit/zarr.json",
        lambda m: [m["attributes"]["minecube"].pop(k) for k in ("arrays", "years", "sha256")],
    )
    shutil.rmtree(store / "pit/footprint_fraction")  # nor were there fractions
    findings = found(store)
    assert {f.kind for f in findings} == {"unverifiable"}
    assert {f.year for f in findings if f.cure == "build"} == {2020}
    assert cube.verify(cube.Store(store)).rebuild == {}
    (store / SHARD).unlink()
    assert "pixels have a quality, but no reflectance" in " ".join(map(str, found(store)))
    (store / "pit/quality/c/1/0/0").write_bytes(b"nothing of the kind")
    assert "cannot be decoded" in " ".join(map(str, found(store)))
    assert cube.verify(cube.Store(store)).rebuild == {"pit": [2020]}


def test_a_year_being_built_is_left_out(store):
    edit(
        store / "pit/builds/2020/zarr.json",
        lambda m: m.update(attributes={"building": "x", "blocks": ["0/0"]}),
    )
    shutil.rmtree(store / "pit/predictions")
    assert found(store) == ()


def test_a_resumed_build_has_all_its_checksums(tmp_path):
    site, store = site_of("pit", 360000, 5600040, 240, 180), str(tmp_path / "cubes.zarr")
    made, told = year_of(grid_of(site), 1), provenance(site, 2020)
    cube.create_site(cube.Store(store), site, grid_of(site), YEARS, RECIPE)
    asked = iter([False, False, True])
    with pytest.raises(CubeError, match="stopped"):
        cube.write_year(
            cube.Store(store),
            made,
            told,
            b"",
            cube.BuildOptions(reads=Counted(), workers=2, stopped=lambda: next(asked)),
        )
    report = cube.verify(cube.Store(store))
    (finding,) = report.findings
    assert (finding.kind, finding.year) == ("unfinished", 2020)
    assert re.fullmatch(r"builds/2020\.[0-9a-f]{16}\.new", finding.what)
    assert report.whole
    assert report.rebuild == {}
    assert cube.write_year(
        cube.Store(store), made, told, parquet(id=["a"]), cube.BuildOptions(reads=Counted())
    )
    assert found(store) == ()
    assert len(cube.read_markers(cube.Store(store), "pit")[2020]["checksums"]) == 3 * 11 + 4


def test_blocks_that_an_older_version_left_in_the_cube_are_removed(tmp_path):
    """Versions without staging wrote blocks into the cube itself, and noted in the marker what they were building."""
    site, store = site_of("pit", 360000, 5600040, 240, 180), tmp_path / "cubes.zarr"
    cube.create_site(cube.Store(store), site, grid_of(site), YEARS, RECIPE)
    zarr.open_array(f"{store}/pit/reflectance", mode="r+")[1, :, :64, :64] = 7
    marker = zarr.open_group(str(store), mode="a").create_group("pit/builds/2020")
    marker.attrs.put({"building": "x", "blocks": ["0/0"], "checksums": {}})
    assert found(store) == ()
    asked = iter([False, True])
    made, told = year_of(grid_of(site), 1), provenance(site, 2020)
    with pytest.raises(CubeError, match="stopped"):
        cube.write_year(
            cube.Store(store), made, told, b"", cube.BuildOptions(stopped=lambda: next(asked))
        )
    assert not xr.open_zarr(store, group="pit", consolidated=False).reflectance.values.any()
    assert cube.write_year(cube.Store(store), made, told, parquet(id=["a"]))
    assert found(store) == ()


def test_what_was_rebuilt_and_extended_passes(store):
    site = site_of("pit", 360000, 5600040, 240, 180)
    cube.create_site(cube.Store(store), site, grid_of(site), [2023], RECIPE)
    assert found(store) == ()
    cube.write_year(
        cube.Store(store),
        year_of(grid_of(site), 5),
        provenance(site, 2023),
        parquet(id=["a"]),
        cube.BuildOptions(reads=Counted()),
    )
    assert {f.kind for f in found(store)} == {"stale"}  # the prediction has not seen it


def test_blocks_computed_in_other_processes_have_checksums(tmp_path):
    site, store = site_of("pit", 360000, 5600040, 240, 180), str(tmp_path / "cubes.zarr")
    made = year_of(grid_of(site), 1)
    cube.create_site(cube.Store(store), site, grid_of(site), YEARS, dataclasses.replace(RECIPE))
    cube.write_year(
        cube.Store(store),
        made,
        provenance(site, 2020),
        parquet(id=["a"]),
        cube.BuildOptions(scheduler="processes"),
    )
    assert found(store) == ()


def test_a_year_that_is_built_again_while_it_is_verified_is_no_damage(store):
    """And `uncommit` leaves the new year alone."""
    site = site_of("pit", 360000, 5600040, 240, 180)
    flip(store / SHARD, 1000)
    judged = cube.verify(cube.Store(store)).committed["pit"]
    other = {**provenance(site, 2020), "version": "2"}

    def meanwhile(step, *_):
        """After metadata and before most of the content."""
        if step == 1:
            cube.write_year(
                cube.Store(store),
                year_of(grid_of(site), 5),
                other,
                parquet(id=["a"]),
                cube.BuildOptions(reads=Counted(), overwrite=True),
            )

    report = cube.verify(cube.Store(store), progress=meanwhile)
    assert report.whole
    assert {f.found.split(";")[0] for f in report.findings} == {
        "it was written while it was verified"
    }
    with pytest.raises(
        BusyError, match="pit 2020 was built again since it was verified; verify it again"
    ):
        cube.withdraw_years(cube.Store(store), "pit", [2020], judged)
    assert list(cube.read_markers(cube.Store(store), "pit")) == [2019, 2020]
