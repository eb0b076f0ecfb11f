"""A store that changes while it is packed or verified is never packed as a mixture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from known_packs import make_sites, make_whole, pack_whole, provenance, scenes, year_of
from minecube import cube
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


@pytest.fixture
def copied(whole, tmp_path):
    return str(shutil.copytree(whole, tmp_path / "cubes.zarr"))


class Objects:
    """The objects of a store, and something that another command does after one of them is read."""

    def __init__(self, raw, key, does):
        self.raw, self.key, self.does = raw, key, does

    def __getattr__(self, name):
        return getattr(self.raw, name)

    def list(self):
        yield from self.raw.list()
        self.then("list")

    def get(self, key):
        content = self.raw.get(key)
        self.then(key)
        return content

    def then(self, key):
        if key == self.key:
            self.key = None
            self.does()


class Changing(cube.Store):
    """A store in which another command acts once an object is read, or once all are listed."""

    def __init__(self, name, key, does):
        super().__init__(name)
        object.__setattr__(self, "objects", Objects(super().open_objects(), key, does))

    def open_objects(self):
        return self.objects


def finish(store, site):
    cube.write_year(
        cube.Store(store), year_of(grid_of(site), 2021), provenance(site, 2021), scenes()
    )


def test_a_year_committed_after_it_was_listed_is_not_packed_in_part(copied, sites, tmp_path):
    out = tmp_path / "p.zip"
    store = Changing(copied, "list", lambda: finish(copied, sites["pit"]))
    with pytest.raises(
        CubeError,
        match=r"pit/builds/2021/\S+ was written while it was packed.*nothing was packed",
    ):
        cube.pack(store, out, ["pit"])
    assert not out.exists()
    assert cube.pack(cube.Store(copied), out, ["pit"]).site_years == 3


def test_a_year_taken_back_after_it_was_listed_is_not_packed_as_committed(copied, tmp_path):
    key = "pond/builds/2020/zarr.json"
    marker = Path(copied) / key

    def take_back():
        """As a build that replaces it begins."""
        marker.write_text(json.dumps({**json.loads(marker.read_text()), "attributes": {}}))

    with pytest.raises(
        CubeError, match=r"pond/builds/2020/zarr.json was written while it was packed"
    ):
        cube.pack(Changing(copied, key, take_back), tmp_path / "p.zip")
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


def test_a_year_committed_after_it_was_listed_lacks_nothing_to_verify(copied, sites):
    store = Changing(copied, "list", lambda: finish(copied, sites["pit"]))
    assert {(f.kind, f.what) for f in cube.verify(store, ["pit"]).findings} == {
        ("stale", "predictions/net")
    }
