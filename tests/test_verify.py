"""Damage to any object of a store is found and named, and a whole store passes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import zarr
from click.testing import CliRunner
from hypothesis import HealthCheck, given
from hypothesis import settings as having
from hypothesis import strategies as st

from known_damage import (
    RECIPE,
    SHARD,
    YEARS,
    Counted,
    built,
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
from minecube.cli import cli
from minecube.errors import CubeError
from minecube.grid import grid_of


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_whole(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def store(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "cubes.zarr"))


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


def test_a_temporary_file_of_a_killed_writer_is_no_finding(store, tmp_path):
    """Zarr writes each object to a file of this name, and renames it."""
    draft = "pit/zarr.11fc8e0dab234fd3b3b2efaacd1540c2.partial"
    shutil.copy(store / "pit/zarr.json", store / draft)
    assert found(store) == ()
    packed = tmp_path / "cubes.zip"
    cube.pack(cube.Store(store), packed)
    with zipfile.ZipFile(packed) as archive:
        assert "pit/zarr.json" in archive.namelist()
        assert draft not in archive.namelist()


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
