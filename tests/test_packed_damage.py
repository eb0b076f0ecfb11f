"""Damage to a packed store is named, and a file that is no packed store is refused."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import pytest
import zarr
from click.testing import CliRunner
from hypothesis import HealthCheck, given
from hypothesis import settings as having
from hypothesis import strategies as st

from known_packs import flip, make_whole, pack_small, pack_whole, place
from minecube import cube
from minecube.cli import cli
from minecube.cube import packed
from minecube.errors import CubeError


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_whole(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def zipped(whole):
    return pack_whole(whole)


@pytest.fixture(scope="module")
def small(whole):
    return pack_small(whole)


def test_verify_says_of_it_what_it_says_of_the_folder(zipped, tmp_path):
    with zipfile.ZipFile(zipped[0]) as opened:
        opened.extractall(tmp_path)
    here, there = cube.verify(cube.Store(zipped[0])), cube.verify(cube.Store(tmp_path))
    assert not here.findings
    assert here == there
    done = CliRunner().invoke(cli, ["verify", "--store", str(zipped[0])])
    assert done.exit_code == 0
    assert done.output.endswith("all as it was written\n")


def test_a_flipped_bit_in_a_shard_is_named(whole, tmp_path):
    cube.pack(cube.Store(whole), out := tmp_path / "pit.zip", ["pit"])
    start, _ = place(out, "pit/reflectance/c/1/0/1/1")
    flip(out, start + 40)
    (found,) = cube.verify(cube.Store(out)).findings
    assert (found.site, found.year, found.kind, found.cure) == ("pit", 2020, "damaged", "build")
    assert "reflectance block 1/1" in str(found)
    assert "CRC-32" in found.found
    done = CliRunner().invoke(cli, ["verify", "--store", str(out)])
    assert done.exit_code == 1
    commands = [line.strip() for line in done.output.split("to mend it:\n")[1].splitlines()]
    folder = f"{out}".removesuffix(".zip") + "-unpacked"
    assert commands[0].startswith(f"unzip -d {folder} {out} ")
    assert commands[1] == f"minecube verify --store {folder} --sites pit --uncommit"
    assert commands[-1] == f"minecube pack --store {folder} --out {out}"


@pytest.mark.parametrize("key", ["pit/builds/2020/zarr.json", "pit/zarr.json"])
def test_a_flipped_bit_in_metadata_is_damage_not_a_change_meanwhile(whole, tmp_path, key):
    cube.pack(cube.Store(whole), out := tmp_path / "pit.zip", ["pit"])
    start, size = place(out, key)
    flip(out, start + size // 2)
    found = cube.verify(cube.Store(out)).findings
    assert key.partition("/")[2] in {f.what for f in found if f.kind == "damaged"}
    assert not [f for f in found if f.kind == "unfinished"]
    assert CliRunner().invoke(cli, ["verify", "--store", str(out)]).exit_code == 1


def test_the_zips_own_checksum_serves_where_there_is_no_other(whole, tmp_path):
    """Of a year built before checksums were kept."""
    store = Path(shutil.copytree(whole, tmp_path / "cubes.zarr"))
    marker = zarr.open_group(store, path="pond/builds/2019", mode="r+")
    marker.attrs.put({k: v for k, v in marker.attrs.items() if k not in ("checksums", "sha256")})
    mapped = cube.open_cube(cube.Store(store), "pond").footprint.sel(year=[2019, 2020])
    cube.write_probability(cube.Store(store), "pond", "net", mapped, {"id": "net"})
    cube.pack(cube.Store(store), out := tmp_path / "pond.zip", ["pond"])
    before = {(f.kind, f.what) for f in cube.verify(cube.Store(out)).findings}
    assert before == {("unverifiable", "builds/2019/zarr.json")}
    start, size = place(out, "pond/clear_count/c/0/0/0")
    flip(out, start + size // 2)
    after = {(f.kind, f.what) for f in cube.verify(cube.Store(out)).findings}
    assert after - before == {("damaged", "clear_count/c/0/0/0")}


def test_what_is_read_whole_is_held_to_the_zips_own_checksum(small, tmp_path):
    out = Path(shutil.copy(small, tmp_path / "pond.zip"))
    start, size = place(out, "pond/x/c/0")
    flip(out, start + size - 1)
    with pytest.raises(
        CubeError, match=r"pond/x/c/0 is damaged \(its CRC-32 is not that of the zip's directory\)"
    ):
        cube.open_cube(cube.Store(out), "pond")
    assert "x" in {f.what for f in cube.verify(cube.Store(out)).findings}


def test_a_zip_that_lost_its_beginning(small, tmp_path):
    """Its directory is whole, so that the rest can be read: what was lost is damaged."""
    (out := tmp_path / "pond.zip").write_bytes(small.read_bytes()[1000:])
    assert "damaged" in {f.kind for f in cube.verify(cube.Store(out)).findings}


@having(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(at=st.integers(0, 2**40), bit=st.integers(0, 7), tail=st.booleans())
def test_a_bit_flipped_anywhere_is_found_or_changes_nothing(whole, small, tmp_path, at, bit, tail):
    """Be it in a member, or in the zip's own structure (its directory is the tail)."""
    out, size = Path(shutil.copy(small, tmp_path / "flipped.zip")), small.stat().st_size
    directory = small.read_bytes().index(b"PK\x01\x02")
    flip(out, directory + at % (size - directory) if tail else at % directory, bit)
    try:
        findings = cube.verify(cube.Store(out)).findings
    except CubeError:
        return
    if not findings:
        read = {key: packed.read(str(out), key) for key in packed.members(str(out))}
        assert read == {key: packed.read(str(small), key) for key in packed.members(str(small))}


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-300]), "is no zip, or a damaged one"),
        (lambda p: p.write_bytes(b""), "is no zip, or a damaged one"),
        (lambda p: p.write_text("not found"), "is no zip, or a damaged one"),
        (lambda p: p.unlink(), "there is no"),
        (
            lambda p: again(p, zipfile.ZIP_DEFLATED),
            "is compressed or encrypted.*unzip it, and `minecube pack` the folder",
        ),
    ],
)
def test_what_is_no_packed_store_is_said_so(small, tmp_path, harm, said):
    harm(out := Path(shutil.copy(small, tmp_path / "pond.zip")))
    for look in (
        cube.verify,
        cube.CubeDataset,
        lambda store: cube.open_cube(store, "pond").load(),
    ):
        with pytest.raises(CubeError, match=said):
            look(cube.Store(out))


def again(path, how):
    """Packed again by another hand."""
    with zipfile.ZipFile(path) as opened:
        content = {name: opened.read(name) for name in opened.namelist()}
    with zipfile.ZipFile(path, "w", how) as made:
        for name in content:
            made.writestr(name, content[name])
