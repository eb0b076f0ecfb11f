"""A packed store is the store it was packed from: for Zarr and xarray unaided, for windows, for `verify`, and for unzip."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import shutil
import subprocess
import sys
import textwrap
import types
import zipfile
from pathlib import Path

import dask.array as da
import numpy as np
import odc.geo.xr
import pandas as pd
import pytest
import rasterio
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
from minecube.cube import packed
from minecube.errors import CubeError
from minecube.grid import grid_of

RECIPE = Recipe(id="small", title="t", bands=("B04", "B11"), block_px=64, chunk_px=32)
YEARS = (2019, 2020, 2021)


def year_of(grid, seed):
    """What a real composite could be: quality, counts and reflectance agree. The last block saw nothing."""
    rng = np.random.default_rng(seed)
    quality = rng.integers(1, 7, grid.shape).astype(np.uint8)
    quality[64:, 128:] = 0  # if there is such a block
    reflectance = np.where(quality, rng.integers(1, 9000, (2, *grid.shape)), 0).astype(np.uint16)
    clear = np.where(np.isin(quality, (1, 5, 6)), rng.integers(1, 30, grid.shape), 0).astype(
        np.uint16
    )
    layers = {"reflectance": reflectance, "clear_count": clear, "quality": quality}
    return xr.Dataset(
        {
            n: (
                ("band", "y", "x")[3 - v.ndim :],
                da.from_array(v, chunks=(2, 64, 64)[3 - v.ndim :]),
            )
            for n, v in layers.items()
        }
    )


def provenance(site, year):
    told = {
        "minecube:source": "s",
        "s2:processing_baseline": "05.00",
        "minecube:offset": 0,
        "minecube:offset_reason": "r",
    }
    return cube.describe_build(
        site, year, grid_of(site), RECIPE, [types.SimpleNamespace(id="a", properties=told)]
    )


def built(store, site, years=(2019, 2020), begun=()):
    """Some years, one that is only begun, labels of all, and a prediction."""
    grid = grid_of(site)
    cube.create_site(cube.Store(store), site, grid, YEARS, RECIPE)
    for year in years:
        cube.write_year(cube.Store(store), year_of(grid, year), provenance(site, year), scenes())
    for year in begun:
        how = {"workers": 1, "stopped": iter((False, True, True)).__next__}
        with pytest.raises(CubeError, match="stopped with"):
            cube.write_year(
                cube.Store(store),
                year_of(grid, year),
                provenance(site, year),
                scenes(),
                cube.BuildOptions(**how),
            )
    mask = np.random.default_rng(1).integers(0, 2, (3, *grid.shape)).astype(np.uint8)
    masks = xr.DataArray(
        mask, dims=("year", "y", "x"), coords={"year": list(YEARS), **odc.geo.xr.xr_coords(grid)}
    )
    cube.write_footprint(cube.Store(store), site.id, masks, origin="drawn")
    if years:
        cube.write_probability(
            cube.Store(store), site.id, "net", masks.sel(year=list(years)), {"id": "net"}
        )


def scenes():
    pd.DataFrame({"id": ["a"]}).to_parquet(out := io.BytesIO())
    return out.getvalue()


@pytest.fixture(scope="module")
def sites():
    return {
        "pit": site_of("pit", 360000, 5600040, 180, 120),
        "pond": site_of("pond", 370020, 5600040, 60, 60),
        "plan": site_of("plan", 380040, 5600040, 60, 60),
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory, sites):
    """A site with a year begun, a small one, and one of which nothing is built."""
    store = tmp_path_factory.mktemp("whole") / "cubes.zarr"
    built(str(store), sites["pit"], begun=(2021,))
    built(str(store), sites["pond"])
    built(str(store), sites["plan"], years=())
    return store


@pytest.fixture(scope="module")
def zipped(whole):
    """It packed, and what the command said."""
    out = whole.with_name("cubes.zarr.zip")
    done = CliRunner().invoke(cli, ["pack", "--store", str(whole), "--out", str(out)])
    assert done.exit_code == 0, done.output
    return out, done


@pytest.fixture(scope="module")
def small(whole):
    """Only the small site, for tests that look at every byte."""
    cube.pack(cube.Store(whole), out := whole.with_name("pond.zip"), ["pond"])
    return out


def contents(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


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


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


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
    assert not done.stderr
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


def test_verify_says_of_it_what_it_says_of_the_folder(zipped, tmp_path):
    with zipfile.ZipFile(zipped[0]) as opened:
        opened.extractall(tmp_path)
    here, there = cube.verify(cube.Store(zipped[0])), cube.verify(cube.Store(tmp_path))
    assert not here.findings
    assert here == there
    done = CliRunner().invoke(cli, ["verify", "--store", str(zipped[0])])
    assert done.exit_code == 0
    assert done.output.endswith("all as it was written\n")


def place(path, key):
    """Where a member's bytes begin, and how many they are."""
    with zipfile.ZipFile(path) as opened:
        info = opened.getinfo(key)
        content = opened.read(key)
    return path.read_bytes().index(content, info.header_offset), len(content)


def flip(path, at, bit=0):
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


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


@pytest.fixture
def copied(whole, tmp_path):
    return str(shutil.copytree(whole, tmp_path / "cubes.zarr"))


def meanwhile(monkeypatch, does, module="write.pack", after=1):
    """Something that another command does once the store has been listed."""
    module = sys.modules[f"minecube.cube.{module}"]
    listed, calls = module.list_files, []

    def then(store):
        found = listed(store)
        calls.append(store)
        if len(calls) == after:
            does()
        return found

    monkeypatch.setattr(module, "list_files", then)


def finish(store, site):
    cube.write_year(
        cube.Store(store), year_of(grid_of(site), 2021), provenance(site, 2021), scenes()
    )


def test_a_year_committed_after_it_was_listed_is_not_packed_in_part(
    copied, sites, tmp_path, monkeypatch
):
    out = tmp_path / "p.zip"
    with monkeypatch.context() as patched:
        meanwhile(patched, lambda: finish(copied, sites["pit"]))
        with pytest.raises(
            CubeError,
            match=r"pit/builds/2021/\S+ was written while it was packed.*nothing was packed",
        ):
            cube.pack(cube.Store(copied), out, ["pit"])
    assert not out.exists()
    assert cube.pack(cube.Store(copied), out, ["pit"]).site_years == 3


def test_a_year_taken_back_after_it_was_listed_is_not_packed_as_committed(
    copied, tmp_path, monkeypatch
):
    module, marker = (
        sys.modules["minecube.cube.write.pack"],
        Path(copied) / "pond" / "builds" / "2020" / "zarr.json",
    )
    kept = module._keys_to_pack

    def then(*of):
        found = kept(*of)
        # As a build that replaces it begins.
        marker.write_text(json.dumps({**json.loads(marker.read_text()), "attributes": {}}))
        return found

    monkeypatch.setattr(module, "_keys_to_pack", then)
    with pytest.raises(
        CubeError, match=r"pond/builds/2020/zarr.json was written while it was packed"
    ):
        cube.pack(cube.Store(copied), tmp_path / "p.zip")
    assert [p.name for p in tmp_path.iterdir()] == ["cubes.zarr"]


def test_a_year_that_is_built_meanwhile_does_not_matter_to_the_others(
    copied, sites, zipped, tmp_path
):
    steps = []

    def progress(*step):
        if not steps:
            finish(copied, sites["pit"])
        steps.append(step)

    assert cube.pack(cube.Store(copied), tmp_path / "p.zip", progress=progress).left_out == (
        "pit 2021",
        "plan",
    )
    assert (tmp_path / "p.zip").read_bytes() == zipped[0].read_bytes()


@pytest.mark.parametrize("when", ["first", "midst", "zarr.json"])
@pytest.mark.parametrize(
    ("what", "midst"),
    [
        ("built", "clear_count/c/0/0/0"),
        ("mapped", "predictions/net/probability/c/0/0/0"),
        ("labelled", "footprint/c/0/0/0"),
    ],
)
def test_what_is_written_anew_while_it_is_packed_is_said(
    copied, sites, tmp_path, what, midst, when
):
    """Else its shards would be of one make and its marker of another."""
    site, out = sites["pond"], tmp_path / "p.zip"
    opened, places = (
        cube.open_cube(cube.Store(copied), "pond").footprint.load(),
        {"first": "builds/2019/zarr.json", "midst": midst},
    )

    def progress(_done, _of, key):
        if key != f"pond/{places.get(when, when)}":
            return
        if what == "built":
            other = {**provenance(site, 2020), "scenes": []}
            cube.write_year(
                cube.Store(copied),
                year_of(grid_of(site), 7),
                other,
                scenes(),
                cube.BuildOptions(overwrite=True),
            )
        elif what == "mapped":
            cube.write_probability(
                cube.Store(copied),
                "pond",
                "net",
                1 - opened.sel(year=[2019, 2020]),
                {"id": "net", "weights": "b"},
            )
        else:
            cube.write_footprint(cube.Store(copied), "pond", 1 - opened, origin="drawn again")

    with pytest.raises(CubeError, match=r"pond/\S+ was written while it was packed"):
        cube.pack(cube.Store(copied), out, ["pond"], progress)
    assert [p.name for p in tmp_path.iterdir()] == ["cubes.zarr"]


def test_a_year_committed_after_it_was_listed_lacks_nothing_to_verify(copied, sites, monkeypatch):
    meanwhile(monkeypatch, lambda: finish(copied, sites["pit"]), "verify")
    assert {(f.kind, f.what) for f in cube.verify(cube.Store(copied), ["pit"]).findings} == {
        ("stale", "predictions/net")
    }


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
