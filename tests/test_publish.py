"""`minecube publish` keeps releases of a store in Icechunk, each under its tag."""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import icechunk
import numpy as np
import pytest
import xarray as xr
import zarr

from known_stores import build, make_hole, make_pit, run
from minecube import codes, cube
from minecube.errors import CubeError
from minecube.export.publish import publish_release


@pytest.fixture(scope="module")
def pit():
    return make_pit()


@pytest.fixture(scope="module")
def hole():
    return make_hole()


def session_of(place, **which):
    return icechunk.Repository.open(icechunk.local_filesystem_storage(str(place))).readonly_session(
        **which
    )


def released(place, tag, group="pit"):
    """A release as someone with Icechunk and xarray opens it."""
    return xr.open_zarr(session_of(place, tag=tag).store, group=group, consolidated=False)


@pytest.fixture
def growing(tmp_path, pit):
    store = tmp_path / "cubes.zarr"
    for year in (2019, 2020):
        build(str(store), pit, year, seed=year)
    return store, ("--store", store, "--icechunk", tmp_path / "releases")


def test_nothing_is_no_release(growing, tmp_path):
    store, where = growing
    run("publish", *where, "--tag", "v1")
    cube.withdraw_years(cube.Store(store), "pit", [2019, 2020])
    assert "nothing to publish" in run("publish", *where, "--tag", "v2", ok=2)
    assert [line.split()[0] for line in run("versions", where[-1]).splitlines()[2:]] == ["v1"]


def mask_of(store, value):
    opened = cube.open_cube(cube.Store(store), "pit")
    masks = np.full((1, *opened.odc.geobox.shape), value, np.uint8)
    return xr.DataArray(
        masks,
        {"year": [2020], "y": opened.y, "x": opened.x, "spatial_ref": opened.spatial_ref},
        ("year", "y", "x"),
    )


def test_each_tag_keeps_what_the_store_was(growing, pit, hole, tmp_path):
    store, where = growing
    assert "no Icechunk repository" in run("versions", where[-1], ok=2)
    assert "v1 holds 2 site-years" in run("publish", *where, "--tag", "v1")
    first = cube.open_committed(cube.Store(store), "pit").load()
    cube.write_footprint(
        cube.Store(store), "pit", mask_of(store, codes.MINE), "EuroMineNet (CC BY 4.0)"
    )
    run("publish", *where, "--tag", "v2")
    build(str(store), pit, 2019, seed=99, scene="S2B", overwrite=True)
    build(str(store), hole, 2021)
    run("publish", *where, "--tag", "v3")

    opened = released(tmp_path / "releases", "v1").sel(year=[2019, 2020])
    for name in first.data_vars:
        np.testing.assert_array_equal(opened[name].values, first[name].values)
    now = released(tmp_path / "releases", "v3")
    np.testing.assert_array_equal(
        now.reflectance.values, cube.open_cube(cube.Store(store), "pit").reflectance.values
    )
    assert "EuroMineNet, CC-BY-4.0" in now.license
    assert "EuroMineNet" not in opened.license

    first_to_second = run("versions", where[-1], "--compare", "v1", "v2").splitlines()
    assert first_to_second[2:] == [
        "pit   2020  changed  footprint",
        # its origin, and the licences
        "pit   all   changed  metadata of footprint, footprint_fraction, site",
        "1 sites differ (0 new, 0 gone), with 1 site-years (0 new, 0 gone, 1 changed)",
    ]
    assert run("versions", where[-1], "--compare", "v2", "v3").splitlines()[2:] == [
        "hole  all   new",
        "pit   2019  changed  clear_count, provenance, reflectance",
        "2 sites differ (1 new, 0 gone), with 1 site-years (0 new, 0 gone, 1 changed)",
    ]
    back = run("versions", where[-1], "--compare", "v3", "v2").splitlines()[2:]
    assert back[0] == "hole  all   gone"
    listed = run("versions", where[-1]).splitlines()[2:]
    assert [line.split()[0] for line in listed] == ["v1", "v2", "v3"]
    assert [line.endswith("  main") for line in listed] == [False, False, True]


def test_years_that_are_not_committed_are_not_published(growing, pit, tmp_path):
    store, where = growing
    half = zarr.open_group(str(store), path="pit", mode="r+")
    half["reflectance"][2] = 7  # blocks of a run that was killed before its commit
    (store / "pit" / "reflectance" / "c" / "0" / "0" / "0" / "0.1f.partial").write_text(
        "killed while writing"
    )
    zarr.open_group(str(store), path="pit/builds/2021", mode="a").attrs["building"] = "x"
    run("publish", *where, "--tag", "v1")
    opened = released(tmp_path / "releases", "v1")
    assert (opened.reflectance.sel(year=2021) == 0).all()
    assert set(
        zarr.open_group(
            session_of(tmp_path / "releases", tag="v1").store, path="pit/builds", mode="r"
        ).group_keys()
    ) == {"2019", "2020"}


def test_a_release_of_the_same_store_writes_nothing(growing):
    _, where = growing
    run("publish", *where, "--tag", "v1")
    assert "0 objects differed" in run("publish", *where, "--tag", "v2")
    assert run("versions", where[-1], "--compare", "v1", "v2") == "v1 and v2 are the same\n"
    assert "v2 already holds these 2 site-years; nothing was written" in run(
        "publish", *where, "--tag", "v2"
    )
    assert "has no tag 'v9'; it has v1, v2" in run(
        "versions", where[-1], "--compare", "v1", "v9", ok=2
    )


def history(place):
    """List the snapshots of `main`, newest first, and the tags."""
    repository = icechunk.Repository.open(icechunk.local_filesystem_storage(str(place)))
    return [snapshot.id for snapshot in repository.ancestry(branch="main")], sorted(
        repository.list_tags()
    )


def test_a_tag_of_another_state_is_refused(growing, pit, tmp_path):
    """What differs is one site-year more, its pixels, its labels, or nothing."""
    store, where = growing
    run("publish", *where, "--tag", "v1")
    kept = shutil.copytree(store, tmp_path / "kept.zarr")
    for change in (
        lambda: build(str(store), pit, 2021),
        lambda: build(str(store), pit, 2019, seed=99, scene="S2B", overwrite=True),
        lambda: cube.write_footprint(cube.Store(store), "pit", mask_of(store, codes.MINE), "a"),
        lambda: (store / "pit/reflectance/c/0/0/0/0").unlink(),
    ):
        before = history(tmp_path / "releases")
        change()
        said = run("publish", *where, "--tag", "v1", ok=2)
        assert "tag 'v1' holds another state of the store" in said
        assert history(tmp_path / "releases") == before
        shutil.rmtree(store)
        shutil.copytree(kept, store)
        assert "v1 already holds these 2 site-years" in run("publish", *where, "--tag", "v1")


@pytest.mark.parametrize(
    "tag", ["a/b", "../v1", ".", "..", "a b", "Größe", "v1?", "a\nb", "-v1", "x" * 101, "a%20b"]
)
def test_a_bad_tag_is_refused_before_anything_is_written(growing, tmp_path, tag):
    _, where = growing
    assert "letters, digits, . _ -" in run("publish", *where, f"--tag={tag}", ok=2)
    assert not (tmp_path / "releases").exists()


def test_a_good_tag_is_listed_as_it_was_given(growing):
    _, where = growing
    for tag in ("v1.0_a-b", "2", "x" * 100):
        run("publish", *where, "--tag", tag)
        assert tag in [line.split()[0] for line in run("versions", where[-1]).splitlines()[2:]]


def test_a_deleted_tag_leaves_main_as_it_was(growing, tmp_path):
    store, where = growing
    run("publish", *where, "--tag", "v1")
    run("publish", *where, "--tag", "v2")
    icechunk.Repository.open(
        icechunk.local_filesystem_storage(str(tmp_path / "releases"))
    ).delete_tag("v2")
    cube.write_footprint(cube.Store(store), "pit", mask_of(store, codes.MINE), "a")
    before = history(tmp_path / "releases")
    assert "tag 'v2' was deleted" in run("publish", *where, "--tag", "v2", ok=2)
    assert history(tmp_path / "releases") == before
    run("publish", *where, "--tag", "v3")
    assert (released(tmp_path / "releases", "v3").footprint.sel(year=2020) == 1).all()


def test_rollback_goes_on_from_an_older_release(growing, tmp_path):
    store, where = growing
    before = cube.open_cube(cube.Store(store), "pit").footprint.values
    run("publish", *where, "--tag", "v1")
    cube.write_footprint(cube.Store(store), "pit", mask_of(store, codes.MINE), "a mistake")
    run("publish", *where, "--tag", "v2")
    assert "main is what it was at v1" in run("versions", where[-1], "--back-to", "v1")
    main = (
        icechunk.Repository.open(icechunk.local_filesystem_storage(str(tmp_path / "releases")))
        .readonly_session("main")
        .store
    )
    np.testing.assert_array_equal(
        xr.open_zarr(main, group="pit", consolidated=False).footprint.values, before
    )
    assert (
        released(tmp_path / "releases", "v2").footprint.sel(year=2020) == 1
    ).all()  # the tag stays
    cube.write_footprint(cube.Store(store), "pit", mask_of(store, codes.BACKGROUND), "mended")
    run("publish", *where, "--tag", "v3")
    # on both sides of the rollback
    assert "pit   2020  changed  footprint\n" in run("versions", where[-1], "--compare", "v2", "v3")
    assert "has no tag 'v9'" in run("versions", where[-1], "--back-to", "v9", ok=2)


def test_what_is_changed_back_is_no_difference(growing):
    store, where = growing
    cube.write_footprint(cube.Store(store), "pit", mask_of(store, codes.BACKGROUND), "a")
    run("publish", *where, "--tag", "v1")
    cube.write_footprint(cube.Store(store), "pit", mask_of(store, codes.MINE), "a")
    run("publish", *where, "--tag", "v2")
    cube.write_footprint(cube.Store(store), "pit", mask_of(store, codes.BACKGROUND), "a")
    run("publish", *where, "--tag", "v3")
    assert run("versions", where[-1], "--compare", "v1", "v3") == "v1 and v3 are the same\n"


def test_a_site_that_is_gone_is_in_no_later_release(growing, hole, tmp_path):
    store, where = growing
    build(str(store), hole, 2020)
    run("publish", *where, "--tag", "v1")
    run("publish", *where, "--tag", "v2", "--sites", "pit")
    assert "hole  all   gone\n" in run("versions", where[-1], "--compare", "v1", "v2")
    assert list(
        zarr.open_group(session_of(tmp_path / "releases", tag="v2").store, mode="r").group_keys()
    ) == ["pit"]
    assert (released(tmp_path / "releases", "v1", "hole").reflectance.sel(year=2020) > 0).all()


def test_two_processes_do_not_publish_into_one_folder(growing, tmp_path):
    _, where = growing
    run("publish", *where, "--tag", "v1")
    holds = (
        "import fcntl, os, sys; h = os.open(sys.argv[1], 0); "
        "fcntl.flock(h, fcntl.LOCK_EX); print('held', flush=True); input()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", holds, str(tmp_path / "releases")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout.readline() == "held\n"
        assert "another process is publishing there" in run("publish", *where, "--tag", "v2", ok=2)
    finally:
        other.communicate("\n", timeout=10)
    run("publish", *where, "--tag", "v2")


@pytest.mark.parametrize(
    ("moment", "tags", "then"),
    [
        ("Session.commit = lambda *_, **__: die()", ["v1"], "v2 holds 2 site-years; 4 objects"),
        (
            "Repository.create_tag = lambda *_, **__: die()",
            ["v1"],
            "v2 holds 2 site-years; 0 objects",
        ),
        (
            "Repository.create_tag = lambda *a: (tag(*a), die())",
            ["v1", "v2"],
            "v2 already holds these 2 site-years",
        ),
    ],
)
def test_a_run_that_is_killed_can_be_repeated(growing, tmp_path, moment, tags, then):
    store, where = growing
    run("publish", *where, "--tag", "v1")
    cube.write_footprint(cube.Store(store), "pit", mask_of(store, codes.MINE), "a")
    dies = (
        "import os, signal, sys, icechunk\n"
        "die = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
        "tag = icechunk.Repository.create_tag\n"
        f"icechunk.{moment}\n"
        "from minecube.cli import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", dies, "publish", *map(str, where), "--tag", "v2"]
    assert (
        subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode
        == -signal.SIGKILL
    )
    assert [line.split()[0] for line in run("versions", where[-1]).splitlines()[2:]] == tags
    assert then in run("publish", *where, "--tag", "v2")
    assert (released(tmp_path / "releases", "v2").footprint.sel(year=2020) == 1).all()
    assert "already holds" in run("publish", *where, "--tag", "v2")


def test_a_folder_of_something_else_is_left_alone(growing, tmp_path):
    store, _ = growing
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "a.tex").write_text("years of work")
    out = run("publish", "--store", store, "--icechunk", tmp_path / "thesis", "--tag", "v1", ok=2)
    assert "is not empty and no Icechunk repository" in out
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["a.tex"]
    (tmp_path / "file").write_text("a file")
    out = run("publish", "--store", store, "--icechunk", tmp_path / "file", "--tag", "v1", ok=2)
    assert "is no folder that can be used" in out
    out = run("versions", tmp_path / "file", ok=2)
    assert "expected a folder, found a file" in out
    assert "expected a folder or s3://" in run(
        "publish", "--store", store, "--icechunk", "ftp://a/b", "--tag", "v1", ok=2
    )
    assert "give one" in run("versions", "x", "--compare", "v1", "v2", "--back-to", "v1", ok=2)


class Meddling(zarr.storage.WrapperStore):
    """A store that is written to when the first of its pixels are read."""

    writes = ()

    async def get(self, key, prototype, byte_range=None):
        content = await super().get(key, prototype, byte_range)
        if "reflectance/c/" in key and self.writes:
            await asyncio.to_thread(self.writes.pop())
        return content


def test_a_store_that_is_written_while_it_is_published_is_no_version(growing, pit, tmp_path):
    store, where = growing
    run("publish", *where, "--tag", "v1")
    before = history(tmp_path / "releases")
    write = lambda: build(str(store), pit, 2019, 99, scene="S2B", overwrite=True)  # noqa: E731
    meddling = type("Once", (Meddling,), {"writes": [write]})(cube.Store(store).open_zarr())
    root = zarr.open_group(meddling, mode="r", use_consolidated=False)
    years = {"pit": [2019, 2020]}
    with pytest.raises(CubeError, match=r"pit/builds/2019/zarr.json: was written while"):
        publish_release(root, years, str(tmp_path / "releases"), "v2", {"pit": {}})
    assert history(tmp_path / "releases") == before
    assert "v2 holds 2 site-years" in run("publish", *where, "--tag", "v2")


def test_releases_on_s3(growing, monkeypatch):
    from moto.server import ThreadedMotoServer

    store, _ = growing
    for name, value in {
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        import requests
        from obstore.store import S3Store  # noqa: F401  the bucket is made by a plain request

        requests.put(f"{endpoint}/cubes", timeout=5).raise_for_status()
        where = ("--store", store, "--icechunk", "s3://cubes/releases")
        run("publish", *where, "--tag", "v1")
        cube.write_footprint(cube.Store(store), "pit", mask_of(store, codes.MINE), "a")
        run("publish", *where, "--tag", "v2")
        assert "pit   2020  changed  footprint\n" in run(
            "versions", where[-1], "--compare", "v1", "v2"
        )
        storage = icechunk.s3_storage(
            bucket="cubes",
            prefix="releases",
            endpoint_url=endpoint,
            allow_http=True,
            force_path_style=True,
            from_env=True,
        )
        opened = xr.open_zarr(
            icechunk.Repository.open(storage).readonly_session(tag="v2").store,
            group="pit",
            consolidated=False,
        )
        expected = cube.open_cube(cube.Store(store), "pit")
        np.testing.assert_array_equal(opened.reflectance.values, expected.reflectance.values)
    finally:
        server.stop()


def test_without_icechunk_it_says_what_to_install(growing):
    store, where = growing
    code = "import sys; sys.modules['icechunk'] = None; from minecube.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "publish", *map(str, where)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert "needs Icechunk: pip install 'minecube[publish]'" in done.stderr
    code = code.replace("'icechunk'", "'netCDF4'")
    out = Path(store).parent / "out"
    command = [
        sys.executable,
        "-c",
        code,
        "export",
        "--store",
        str(store),
        "--format",
        "netcdf",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert "needs one package more: pip install 'minecube[publish]'" in done.stderr
    assert not list(out.rglob("*.nc"))
