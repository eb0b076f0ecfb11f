"""A store is packed into one file, always the same, and `unzip` gives the store back."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from known_builds import messages_in
from known_packs import (
    YEARS,
    contents,
    make_sites,
    make_whole,
    pack_small,
    pack_whole,
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


def test_what_the_command_says(zipped):
    out, done = zipped
    assert done.stderr.splitlines()[-1] == "left out, not committed: pit 2021, plan"
    sha256, size = hashlib.sha256(out.read_bytes()).hexdigest(), out.stat().st_size
    with zipfile.ZipFile(out) as opened:
        objects = len(opened.namelist())
    assert (
        done.stdout
        == f"{out}: 4 site-years, {objects} objects, {size / 1e6:,.1f} MB, sha256 {sha256}\n"
    )
    assert list(out.parent.glob(".*")) == []


def test_unzip_gives_the_store_back(whole, zipped, sites, tmp_path):
    """All but what the year that was begun has left, and the site without one; verified, and built on."""
    folder = tmp_path / "cubes.zarr"
    subprocess.run(["unzip", "-q", str(zipped[0]), "-d", str(folder)], check=True)
    there, back = contents(whole), contents(folder)
    lacking = {key for key in there if key not in back}
    assert back == {key: there[key] for key in there if key not in lacking}
    (staged,) = (whole / "pit" / "builds").glob("2021.*.new")
    begun = {f"pit/builds/{staged.name}", "plan"}
    assert {next((b for b in begun if key.startswith(f"{b}/")), key) for key in lacking} == begun
    assert not cube.verify(cube.Store(folder)).findings
    site, store = sites["pit"], str(folder)
    grid = grid_of(site)
    assert not cube.write_year(
        cube.Store(store), year_of(grid, 2020), provenance(site, 2020), scenes()
    )
    assert cube.write_year(cube.Store(store), year_of(grid, 2021), provenance(site, 2021), scenes())
    assert list(cube.read_markers(cube.Store(store), "pit")) == list(YEARS)


def test_the_same_store_gives_the_same_file(whole, zipped, tmp_path):
    """Whenever and in whatever order its objects were written; of a packed store, too."""
    copy = tmp_path / "other.zarr"
    for key, content in sorted(contents(whole).items(), reverse=True):
        (copy / key).parent.mkdir(parents=True, exist_ok=True)
        (copy / key).write_bytes(content)
    for store in (str(copy), str(zipped[0])):
        cube.pack(cube.Store(store), tmp_path / "again.zip")
        assert (tmp_path / "again.zip").read_bytes() == zipped[0].read_bytes()


def test_two_packs_at_once_both_end_with_a_whole_file(whole, zipped, tmp_path):
    out, inner = tmp_path / "cubes.zip", []

    def progress(done, _total, _name):
        if done == 3:
            inner.append(cube.pack(cube.Store(whole), out))

    outer = cube.pack(cube.Store(whole), out, progress=progress)
    assert inner == [outer]
    assert out.read_bytes() == zipped[0].read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["cubes.zip"]


def test_sites_are_chosen(whole, tmp_path):
    out = tmp_path / "deep" / "p.zip"
    done = CliRunner().invoke(
        cli, ["pack", "--store", str(whole), "--sites", "po*", "--out", str(out)]
    )
    assert done.exit_code == 0
    assert not messages_in(done.stderr)
    assert cube.list_sites(cube.Store(out)) == ["pond"]
    same(
        cube.CubeDataset(cube.Store(out), size=60)[0],
        cube.CubeDataset(cube.Store(whole), ["pond"], size=60)[0],
    )
    with pytest.raises(CubeError, match="no site 'nowhere'; it has pit, plan, pond"):
        cube.pack(cube.Store(whole), out, ["nowhere"])
    with pytest.raises(CubeError, match="no site-year of plan is committed"):
        cube.pack(cube.Store(whole), tmp_path / "plan.zip", ["plan"])
    assert not (tmp_path / "plan.zip").exists()


def test_a_packed_store_is_not_packed_into_itself(small, tmp_path):
    copy = Path(shutil.copy(small, tmp_path / "pond.zip"))
    with pytest.raises(CubeError, match="is the packed store itself"):
        cube.pack(cube.Store(copy), copy)
    assert copy.read_bytes() == small.read_bytes()


def test_zip64(whole, tmp_path, monkeypatch):
    """Of a store with more than 65535 objects or 4 GB, by limits set low."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 10)
    cube.pack(cube.Store(whole), out := tmp_path / "big.zip", ["pit"])
    monkeypatch.undo()
    content = out.read_bytes()
    assert content.count(b"PK\x06\x06") == 1  # its end of central directory
    with zipfile.ZipFile(out) as opened:
        extras = [
            opened.getinfo(name).extra[:2]
            for name in ("pit/reflectance/c/0/0/0/1", "pit/x/zarr.json")
        ]
    assert extras == [b"\x01\x00"] * 2
    subprocess.run(["unzip", "-tq", str(out)], check=True, capture_output=True)
    assert not cube.verify(cube.Store(out)).findings
    same(
        cube.CubeDataset(cube.Store(out), size=120)[0],
        cube.CubeDataset(cube.Store(whole), ["pit"], size=120)[0],
    )


def test_a_packing_that_ends_early_leaves_the_old_file(whole, tmp_path):
    out = tmp_path / "cubes.zip"
    out.write_text("old")

    def stop(done, *_):
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cube.pack(cube.Store(whole), out, progress=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["cubes.zip"]
    assert out.read_text() == "old"
    for place, said in (
        (whole / "x.zip", "outside"),
        (tmp_path / "cubes", r"ends in \.zip"),
        (out / "x.zip", "cannot be written"),
    ):
        with pytest.raises(CubeError, match=said):
            cube.pack(cube.Store(whole), place)
    assert dataclasses.asdict(cube.pack(cube.Store(whole), out))["objects"] > 9
