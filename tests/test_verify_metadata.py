"""Damage to markers, metadata, coordinates and labels is found and named."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import odc.geo.xr
import pytest
import xarray as xr
import zarr

from known_damage import (
    RECIPE,
    YEARS,
    edit,
    flip,
    found,
    make_whole,
    only,
    parquet,
    provenance,
    year_of,
)
from known_scenes import site_of
from minecube import cube
from minecube.cube.checksums import seal
from minecube.grid import grid_of


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_whole(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def store(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "cubes.zarr"))


def test_markers(store):
    marker = store / "pit/builds/2020/zarr.json"
    kept = marker.read_text()
    edit(marker, lambda m: m["attributes"].update(version="9"))
    assert only(store).found == "is not what was committed"
    marker.write_text(kept)
    # One that agrees with itself, and yet is no name of what it lists.
    edit(marker, lambda m: m.update(attributes=seal({**m["attributes"], "version": "9"})))
    assert "but what it is made of is build" in only(store).found
    marker.write_text(kept[:-20])
    assert only(store).found.startswith("cannot be understood")
    shutil.copy(store / "quarry/builds/2020/zarr.json", marker)
    kinds = {f.kind for f in found(store)}
    assert "foreign" in kinds
    shutil.rmtree(marker.parent)
    assert {(f.kind, f.year) for f in found(store)} == {("missing", 2020)}
    assert cube.verify(cube.Store(store)).rebuild == {"pit": [2020]}


def test_a_marker_of_another_year(store):
    shutil.rmtree(store / "pit/builds/2020")
    shutil.copytree(store / "pit/builds/2019", store / "pit/builds/2020")
    assert ("foreign", 2020, "is that of pit 2019") in [
        (f.kind, f.year, f.found) for f in found(store)
    ]


def test_scene_lists_and_reads(store):
    for name, content in (("scenes", parquet(id=["b"])), ("reads", parquet(planned=[1], lost=[0]))):
        marker = zarr.open_group(store / "pit/builds/2020", mode="r+")
        marker.create_array(name, data=np.frombuffer(content, np.uint8), overwrite=True)
    said = {(f.kind, f.what) for f in found(store)}
    assert ("contradictory", "builds/2020/scenes") in said
    assert ("contradictory", "builds/2020/reads") in said
    assert ("damaged", "builds/2020/scenes/c/0") in said


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("reflectance", lambda m: m.update(data_type="int16")),
        (
            "reflectance",
            lambda m: m["chunk_key_encoding"]["configuration"].update(separator="."),
        ),  # one bit from "/"
        ("quality", lambda m: m.update(fill_value=1)),
        ("reflectance", lambda m: m["attributes"].update(units="1")),
        ("spatial_ref", lambda m: m["attributes"].update(crs_wkt="none")),
    ],
)
def test_metadata(store, name, change):
    edit(store / f"pit/{name}/zarr.json", change)
    findings = found(store)
    assert (findings[0].kind, findings[0].cure) == ("damaged", "site")
    assert f"{name}/zarr.json" in {f.what for f in findings}
    assert cube.verify(cube.Store(store)).rebuild == {"pit": [2019, 2020]}


def test_coordinates(store):
    for name, values in (("x", np.arange(240.0)), ("year", np.array([2019, 2021, 2022]))):
        array = zarr.open_array(store / "pit" / name, mode="r+")
        array[:] = values
    said = " ".join(map(str, found(store)))
    assert "pit: damaged: x: coordinate: values are not those of the grid" in said
    assert "the cube's years are [2019, 2021, 2022]" in said


def test_years_that_changed_places(store):
    """Nothing is damaged, and 2019 is read as 2018."""
    zarr.open_array(store / "pit/year", mode="r+")[:] = [2018, 2019, 2020]
    assert "its pixels are at [0] among the years [2018, 2019, 2020]" in " ".join(
        map(str, found(store))
    )


def test_the_groups_own_metadata(store):
    group = store / "pit/zarr.json"
    kept = group.read_text()
    edit(group, lambda m: m["attributes"].update({"proj:code": "EPSG:32632"}))
    assert "recipe or place is not what the group was made with" in " ".join(map(str, found(store)))
    group.write_text("{")
    assert {f.what for f in found(store)} == {"zarr.json"}
    group.write_text(kept)
    edit(group, lambda m: m["attributes"].update(incomplete_reads={"2020": 0.5}))
    assert only(store).found == "incomplete_reads says 0.5, the marker 1.0"


def test_groups_that_hold_groups(store):
    """Without builds/zarr.json no year is committed any more."""
    (store / "pit/builds/zarr.json").unlink()
    (store / "zarr.json").write_text("{}")
    assert cube.read_markers(cube.Store(store), "pit") == {}
    assert [(f.what, f.kind, f.cure) for f in found(store)] == [
        ("zarr.json", "damaged", "group"),
        ("builds/zarr.json", "missing", "group"),
    ]


def test_pixels_that_cannot_be(whole, tmp_path):
    """As a build with an error would commit them: all checksums are right."""
    site = site_of("pit", 360000, 5600040, 240, 180)
    grid = grid_of(site)
    for name, at, value, said in (
        ("reflectance", (1, 5, 70), 0, "1 pixels have a quality, but no reflectance in some band"),
        ("quality", (5, 70), 0, "1 pixels have reflectance, but no quality"),
        (
            "clear_count",
            (5, 70),
            0,
            "1 pixels count clear observations where quality has no clear kind",
        ),
        ("quality", (5, 70), 9, "expected [0, 1, 2, 3, 4, 5, 6] or 0, found [9]"),
    ):
        store, made = str(tmp_path / f"{name}{value}.zarr"), year_of(grid, 1).compute()
        made.quality[5, 70], made.clear_count[5, 70], made.reflectance[:, 5, 70] = 1, 3, 9
        made[name][at] = value
        cube.create_site(cube.Store(store), site, grid, YEARS, RECIPE)
        cube.write_year(
            cube.Store(store),
            made.chunk({"y": 64, "x": 64, "band": -1}),
            provenance(site, 2020),
            parquet(id=["a"]),
        )
        assert any(
            f.kind == "contradictory" and f.year == 2020 and said in f.found for f in found(store)
        ), name


def test_labels(store):
    shard = store / "pit/footprint/c/2/1/1"  # of a year that is not built: labels do without
    kept = shard.read_bytes()
    flip(shard, 30)
    finding = only(store)
    assert (finding.year, finding.kind, finding.cure) == (2021, "damaged", "label")
    assert cube.verify(cube.Store(store)).rebuild == {}
    shard.write_bytes(kept)
    edit(store / "pit/footprint/zarr.json", lambda m: m["attributes"].update(origin="traced"))
    assert "origin or checksums are not what was written" in " ".join(map(str, found(store)))


def test_labels_written_again_bring_their_checksums_along(store):
    grid = grid_of(site_of("pit", 360000, 5600040, 240, 180))
    mask = np.full((1, *grid.shape), 255, np.uint8)
    mask[0, :10, :10] = 1  # eleven of its twelve blocks are no objects any more
    masks = xr.DataArray(
        mask, dims=("year", "y", "x"), coords={"year": [2020], **odc.geo.xr.xr_coords(grid)}
    )
    cube.write_footprint(cube.Store(store), "pit", masks, origin="anew")
    assert found(store) == ()
    (store / "pit/footprint/c/1/0/0").unlink()
    assert (only(store).kind, only(store).year) == ("missing", 2020)


def test_predictions(store):
    flip(store / "pit/predictions/net/probability/c/0/1/1", 40)
    finding = only(store)
    assert (finding.kind, finding.cure) == ("damaged", "predict")
    assert str(finding).startswith(
        "pit: damaged: probability block 1/1 (predictions/net/probability/c/0/1/1)"
    )


def test_fractions_that_were_there_are_missed(store):
    shutil.rmtree(store / "pit/footprint_fraction")
    assert ("missing", "footprint_fraction/zarr.json") in {(f.kind, f.what) for f in found(store)}
