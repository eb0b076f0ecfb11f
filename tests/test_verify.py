"""Every kind of damage is planted in a store that was built as always, found, and named; what is whole passes."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import dask.array as da
import numpy as np
import odc.geo.xr
import pandas as pd
import pytest
import xarray as xr
import zarr
from click.testing import CliRunner
from hypothesis import HealthCheck, given
from hypothesis import settings as having
from hypothesis import strategies as st

from known_scenes import site_of
from minecube import cube
from minecube.catalog import Recipe
from minecube.cli import cli
from minecube.cube.checksums import seal
from minecube.errors import BusyError, CubeError
from minecube.grid import grid_of

RECIPE = Recipe(id="small", title="t", bands=("B04", "B11"), block_px=64, chunk_px=32)
YEARS = (2019, 2020, 2021)
SHARD = "pit/reflectance/c/1/0/1/2"


def year_of(grid, seed):
    """A composite that a real one could be: quality, counts and reflectance agree. The last block saw nothing."""
    rng = np.random.default_rng(seed)
    quality = rng.integers(0, 7, grid.shape).astype(np.uint8)
    quality[128:, 192:] = 0  # if there is such a block
    seen = quality > 0
    reflectance = np.where(seen, rng.integers(1, 9000, (2, *grid.shape)), 0).astype(np.uint16)
    clear = np.where(np.isin(quality, (1, 5, 6)), rng.integers(1, 30, grid.shape), 0).astype(
        np.uint16
    )

    def lazy(values):
        return da.from_array(values, chunks=(*values.shape[:-2], 64, 64))

    return xr.Dataset(
        {
            "reflectance": (("band", "y", "x"), lazy(reflectance)),
            "clear_count": (("y", "x"), lazy(clear)),
            "quality": (("y", "x"), lazy(quality)),
        }
    )


def parquet(**columns):
    out = io.BytesIO()
    pd.DataFrame(columns).to_parquet(out)
    return out.getvalue()


class Counted:
    """Counts of reads, none of them lost."""

    def totals(self):
        return {"planned": 7, "lost": 0, "completeness": 1.0}

    def lost(self):
        return []

    def to_parquet(self):
        return parquet(scene=["a", "a"], planned=[3, 4], lost=[0, 0])


def provenance(site, year):
    told = {
        "source": "s",
        "s2:processing_baseline": "05.00",
        "minecube:offset": 0,
        "minecube:offset_reason": "r",
    }
    scene = types.SimpleNamespace(
        id="a",
        properties={
            k if k.startswith("s2") or ":" in k else f"minecube:{k}": v for k, v in told.items()
        },
    )
    return cube.describe_build(site, year, grid_of(site), RECIPE, [scene])


def built(store, site, years=(2019, 2020)):
    """A site with two of three years, labels and a prediction."""
    grid = grid_of(site)
    cube.create_site(cube.Store(store), site, grid, YEARS, RECIPE)
    for year in years:
        seed = year + (site.id == "quarry") * 100
        cube.write_year(
            cube.Store(store),
            year_of(grid, seed),
            provenance(site, year),
            parquet(id=["a"]),
            cube.BuildOptions(reads=Counted()),
        )
    rng = np.random.default_rng(1)
    masks = xr.DataArray(
        rng.integers(0, 2, (3, *grid.shape)).astype(np.uint8),
        dims=("year", "y", "x"),
        coords={"year": list(YEARS), **odc.geo.xr.xr_coords(grid)},
    )
    cube.write_footprint(cube.Store(store), site.id, masks, origin="drawn")
    cube.write_probability(
        cube.Store(store), site.id, "net", masks.sel(year=list(years)), {"id": "net"}
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two sites on grids of one size."""
    store = tmp_path_factory.mktemp("whole") / "cubes.zarr"
    built(str(store), site_of("pit", 360000, 5600040, 240, 180))
    built(str(store), site_of("quarry", 370020, 5600040, 240, 180), years=(2020,))
    return store


@pytest.fixture
def store(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "cubes.zarr"))


def found(store, **options):
    return cube.verify(cube.Store(store), **options).findings


def only(store):
    (finding,) = found(store)
    return finding


def flip(path, at, bit=0):
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, indent=2))


def test_what_is_whole_passes(whole):
    steps = []
    report = cube.verify(cube.Store(whole), progress=lambda *step: steps.append(step))
    assert report.findings == ()
    assert report.rebuild == {}
    assert report.sites == ("pit", "quarry")
    assert {site: list(of) for site, of in report.committed.items()} == {
        "pit": [2019, 2020],
        "quarry": [2020],
    }
    assert report.objects == sum(p.is_file() for p in whole.rglob("*")) - 1  # the root's own
    assert [s[0] for s in steps] == list(range(1, steps[-1][1] + 1))


def test_checksums_are_those_of_the_files_and_an_empty_block_has_none(whole):
    sums = cube.read_markers(cube.Store(whole), "pit")[2020]["checksums"]
    import hashlib

    for key, (size, sha256) in sums.items():
        content = (whole / "pit" / key).read_bytes()
        assert (size, sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert "reflectance/c/1/0/2/3" not in sums
    assert "quality/c/1/2/3" not in sums
    assert len(sums) == 3 * 11 + 4


def test_a_flipped_bit(store):
    flip(store / SHARD, 1000)
    finding = only(store)
    assert (finding.site, finding.year, finding.kind, finding.cure) == (
        "pit",
        2020,
        "damaged",
        "build",
    )
    assert str(finding).startswith(
        "pit 2020: damaged: reflectance block 1/2 (reflectance/c/1/0/1/2): "
    )
    assert cube.verify(cube.Store(store)).rebuild == {"pit": [2020]}
    assert found(store, names=["quarry"]) == ()


def test_a_shard_that_is_gone(store):
    """Zarr reads it as zeros, without an error; we do not."""
    (store / SHARD).unlink()
    by_zarr = zarr.open_array(str(store / "pit/reflectance"), mode="r")
    assert not by_zarr[1, :, 64:128, 128:192].any()
    opened = cube.open_cube(cube.Store(store), "pit").reflectance.sel(year=2020)
    with pytest.raises(
        CubeError,
        match=r"reflectance/c/1/0/1/2 is missing although it was committed; run `minecube verify`",
    ):
        opened[:, 64:128, 128:192].load()
    assert opened[:, :64].values.any()
    finding = only(store)
    assert (finding.year, finding.kind, finding.what) == (2020, "missing", "reflectance/c/1/0/1/2")


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("pit/reflectance/c/0/0/1/2", "pit reflectance block 1/2 (reflectance/c/0/0/1/2)"),
        ("pit/reflectance/c/1/0/1/1", "pit reflectance block 1/1 (reflectance/c/1/0/1/1)"),
        ("quarry/reflectance/c/1/0/1/2", "quarry reflectance block 1/2 (reflectance/c/1/0/1/2)"),
    ],
)
def test_a_shard_of_another_year_place_or_site(store, source, named):
    """They decode, all of them."""
    shutil.copy(store / source, store / SHARD)
    finding = only(store)
    assert (finding.kind, finding.year) == ("foreign", 2020)
    assert finding.found == f"is that of {named}"


def test_a_shard_of_another_store(store, tmp_path):
    other, site = str(tmp_path / "other.zarr"), site_of("pit", 360000, 5600040, 240, 180)
    cube.create_site(cube.Store(other), site, grid_of(site), YEARS, RECIPE)
    cube.write_year(
        cube.Store(other), year_of(grid_of(site), 99), provenance(site, 2020), parquet(id=["a"])
    )
    shutil.copy(f"{other}/{SHARD}", store / SHARD)
    assert only(store).what == "reflectance/c/1/0/1/2"


def test_a_truncated_object(store):
    content = (store / SHARD).read_bytes()
    (store / SHARD).write_bytes(content[:-10])
    assert only(store).found == f"{len(content) - 10} of {len(content)} bytes"


@pytest.mark.parametrize(
    ("path", "year"),
    [
        ("pit/reflectance/c/1/0/2/3", 2020),  # where nothing was seen, and so nothing was written
        ("pit/reflectance/c/1/0/9/9", 2020),
        ("pit/builds/2020/more", None),
        ("pit/notes.txt", None),
        ("pit/x/c/1", None),
        ("pit/predictions/net/probability/c/0/9/9", None),
    ],
)
def test_an_object_too_many(store, path, year):
    (store / path).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(store / SHARD, store / path)
    finding = only(store)
    assert (finding.kind, finding.cure, finding.what) == (
        "unexpected",
        "remove",
        path.removeprefix("pit/"),
    )
    assert finding.year == year


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


def test_fractions_that_were_there_are_missed(store):
    shutil.rmtree(store / "pit/footprint_fraction")
    assert ("missing", "footprint_fraction/zarr.json") in {(f.kind, f.what) for f in found(store)}


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


def test_the_command_line_says_what_to_build_and_makes_it_possible(store, tmp_path):
    flip(store / SHARD, 1000)
    out = tmp_path / "found.json"
    ran = CliRunner().invoke(cli, ["verify", "--store", str(store), "--json", str(out)])
    assert ran.exit_code == 1
    command = f"minecube build --store {store} --sites pit --years 2020 --source s --recipe small"
    assert "pit 2020: damaged: reflectance block 1/2" in ran.output
    assert command in ran.output
    said = json.loads(out.read_text())
    assert (said["ok"], said["rebuild"], said["sites"], said["site_years"]) == (
        False,
        {"pit": [2020]},
        ["pit", "quarry"],
        3,
    )
    assert said["findings"][0]["what"] == "reflectance/c/1/0/1/2"
    assert any(line.startswith(command) for line in said["commands"])
    # The build that is there is not made again, until its commit is taken off.
    site = site_of("pit", 360000, 5600040, 240, 180)
    again = (
        cube.Store(store),
        year_of(grid_of(site), 2020),
        provenance(site, 2020),
        parquet(id=["a"]),
    )
    assert not cube.write_year(*again, cube.BuildOptions(reads=Counted()))
    ran = CliRunner().invoke(cli, ["verify", "--store", str(store), "--uncommit"])
    assert "--uncommit" not in ran.output  # it is done
    assert ran.exit_code == 1
    assert "took the commit off pit 2020" in ran.output
    assert list(cube.read_markers(cube.Store(store), "pit")) == [2019]
    assert cube.write_year(*again, cube.BuildOptions(reads=Counted()))
    ran = CliRunner().invoke(cli, ["verify", "--store", str(store)])
    assert (ran.exit_code, ran.output.splitlines()[-1].endswith("all as it was written")) == (
        0,
        True,
    ), ran.output


def test_the_command_line_in_a_process_of_its_own(whole):
    """Where nothing has been imported by others before."""
    script = f"from minecube.cli import main; main(['verify', '--store', {str(whole)!r}])"
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout.endswith("all as it was written\n")) == (0, True), ran.stderr


@pytest.mark.parametrize(
    ("make_it", "said"),
    [
        (lambda p: None, "there is no store"),
        (lambda p: p.write_text(""), "is a file"),
        (lambda p: p.mkdir(), "no site of minecube is in it"),
        (lambda p: zarr.create_group(p).create_group("other"), "no site of minecube is in it"),
    ],
)
def test_a_store_that_is_not_ours(tmp_path, make_it, said):
    make_it(tmp_path / "other")
    ran = CliRunner().invoke(cli, ["verify", "--store", str(tmp_path / "other")])
    assert ran.exit_code == 2
    assert said in ran.output
    assert len(ran.output.splitlines()) == 1


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """One block, so that many bits can be tried."""
    store = tmp_path_factory.mktemp("tiny") / "cubes.zarr"
    built(str(store), site_of("pit", 360000, 5600040, 60, 48), years=(2020,))
    return store


@having(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_flipped_bit_of_any_file_is_found(tiny, data):
    """Of all files of the site, shared ones too. One that Zarr reads as the very same thing need not be found."""
    files = sorted(p for p in (tiny / "pit").rglob("*") if p.is_file())
    path = data.draw(st.sampled_from(files), label="file")
    at = data.draw(st.integers(0, path.stat().st_size - 1), label="byte")
    bit = data.draw(st.integers(0, 7), label="bit")
    before, content = same_to_a_reader(path), path.read_bytes()
    try:
        flip(path, at, bit)
        if not found(tiny, names=["pit"]):
            assert (
                path.name == "zarr.json" or path.parent.parent.parent == tiny / "pit"
            )  # metadata, or a coordinate
            assert same_to_a_reader(path) == before
    finally:
        path.write_bytes(content)


def same_to_a_reader(path):
    """What a JSON file or a chunk of a coordinate says, however it says it."""
    if path.name == "zarr.json":
        try:
            return json.loads(path.read_bytes())
        except ValueError:
            return None
    try:
        return (
            zarr.open_array(path.parent.parent, mode="r")[...].tobytes()
            if path.parent.name == "c"
            else None
        )
    except Exception:
        return None


def test_in_an_object_store(bucket):
    """An S3 server: listed, verified, damaged, found, taken back."""
    import obstore

    url = f"{bucket}/a/cubes.zarr"
    with pytest.raises(CubeError, match="no site of minecube"):
        cube.verify(cube.Store(url))
    built(url, site_of("pit", 360000, 5600040, 240, 180), years=(2020,))
    report = cube.verify(cube.Store(url))
    assert report.findings == ()
    assert report.objects > 50
    objects = obstore.store.from_url(url)
    content = bytearray(bytes(objects.get(SHARD).bytes()))
    content[99] ^= 4
    objects.put(SHARD, bytes(content))
    objects.delete("pit/quality/c/1/0/0")
    assert [(f.kind, f.year, f.what) for f in cube.verify(cube.Store(url)).findings] == [
        ("missing", 2020, "quality/c/1/0/0"),
        ("damaged", 2020, "reflectance/c/1/0/1/2"),
    ]
    cube.withdraw_years(cube.Store(url), "pit", [2020])
    assert cube.read_markers(cube.Store(url), "pit") == {}


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


def test_a_year_that_is_built_again_while_it_is_verified_is_no_damage(store, monkeypatch):
    """And `uncommit` leaves the new year alone."""
    site = site_of("pit", 360000, 5600040, 240, 180)
    flip(store / SHARD, 1000)
    judged = cube.verify(cube.Store(store)).committed["pit"]
    module = sys.modules["minecube.cube.verify"]
    places = module.places_by_sha256
    told = provenance(site, 2020)
    other = {**told, "version": "2"}

    def meanwhile(sites):
        """After metadata and before content."""
        cube.write_year(
            cube.Store(store),
            year_of(grid_of(site), 5),
            other,
            parquet(id=["a"]),
            cube.BuildOptions(reads=Counted(), overwrite=True),
        )
        return places(sites)

    with monkeypatch.context() as patched:
        patched.setattr(module, "places_by_sha256", meanwhile)
        report = cube.verify(cube.Store(store))
    assert report.whole
    assert {f.found.split(";")[0] for f in report.findings} == {
        "it was written while it was verified"
    }
    with pytest.raises(
        BusyError, match="pit 2020 was built again since it was verified; verify it again"
    ):
        cube.withdraw_years(cube.Store(store), "pit", [2020], judged)
    assert list(cube.read_markers(cube.Store(store), "pit")) == [2019, 2020]
