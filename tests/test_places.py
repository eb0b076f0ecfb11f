"""Places are local paths or URLs; files and folders in object stores are read and written whole."""

from __future__ import annotations

import os
from pathlib import Path

import obstore
import pytest
from moto.backends import get_backend
from moto.core import DEFAULT_ACCOUNT_ID
from obstore.store import from_url

from minecube.errors import MinecubeError, PlaceError
from minecube.places import Url, check_writable, local_copy, outgoing, place_of


def stored(bucket):
    """Key -> content of all objects, read without `places`."""
    client = from_url(bucket)
    entries = obstore.list(client).collect()
    return {entry["path"]: bytes(client.get(entry["path"]).bytes()) for entry in entries}


def test_a_url_has_the_parts_of_a_path():
    url = place_of("s3://bucket/a/model.pt/")
    assert isinstance(url, Url)
    assert (str(url), url.bucket, url.key) == (
        "s3://bucket/a/model.pt",
        "s3://bucket",
        "a/model.pt",
    )
    assert (url.name, url.suffix, str(url.parent)) == ("model.pt", ".pt", "s3://bucket/a")
    assert str(url.with_name("model.pt.ckpt").with_suffix(".csv")) == "s3://bucket/a/model.pt.csv"
    assert str(Url("s3://bucket") / Path("a") / "b.png") == "s3://bucket/a/b.png"
    assert Url("s3://bucket/").key == ""
    assert url.absolute() == url == place_of(url)
    assert place_of("folder/a.gpkg") == Path("folder/a.gpkg")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://host/x", "begins with s3://, gs://, az://; found http://"),
        ("S3://bucket/x", "begins with s3://, gs://, az://; found S3://"),
        ("s3://", "names no bucket"),
        ("s3:///x", "names no bucket"),
        ("s3://bucket/a/../x", "without //"),
        ("s3://bucket//x", "without //"),
    ],
)
def test_a_url_that_names_no_place(url, message):
    with pytest.raises(PlaceError, match=message):
        place_of(url)


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIAKEY:SECRET@bucket/x",
        "s3://bucket/x?X-Amz-Signature=SECRET",
        "az://container/x?sig=SECRET",
        "gs://bucket/x#SECRET",
        "https://user:SECRET@host/x",
    ],
)
def test_keys_in_a_url_are_refused_and_never_shown(url):
    with pytest.raises(PlaceError, match="expected a URL without keys") as caught:
        place_of(url)
    assert "SECRET" not in str(caught.value)
    assert "AKIAKEY" not in str(caught.value)


def test_local_paths_are_used_directly(tmp_path):
    for place in (tmp_path / "new.txt", Path("relative")):
        with local_copy(place) as path:
            assert path is place
        with outgoing(place) as path:
            assert path is place


def test_a_file_is_written_and_read(bucket):
    url = Url(f"{bucket}/a folder/ä.bin")
    content = os.urandom(20_000_000)  # several pieces
    assert not url.exists()
    with outgoing(url) as path:
        path.write_bytes(content)
        assert stored(bucket) == {}
    assert stored(bucket) == {"a folder/ä.bin": content}
    assert url.exists()
    assert url.parent.has_objects()
    assert not url.parent.exists()
    assert url.read_bytes() == content
    with local_copy(url) as path:
        assert path.name == "ä.bin"
        assert path.read_bytes() == content
    assert not path.parent.exists()
    url.unlink()
    assert stored(bucket) == {}


def test_companions_of_a_file_are_copied_if_they_exist(bucket):
    for name in ("mines.shp", "mines.dbf", "other.dbf"):
        with outgoing(Url(f"{bucket}/{name}")) as path:
            path.write_text(name)
    with local_copy(Url(f"{bucket}/mines.shp"), (".dbf", ".prj")) as path:
        assert sorted(file.name for file in path.parent.iterdir()) == ["mines.dbf", "mines.shp"]


def test_a_missing_object_is_an_error_with_its_url(bucket):
    with pytest.raises(PlaceError, match=r"^s3://mines/none\.gpkg: no such file; check the URL"):
        Url(f"{bucket}/none.gpkg").read_bytes()


def fail_in_folder(url):
    with outgoing(url) as path:
        path.mkdir()
        (path / "a").write_text("a")
        raise MinecubeError(f"{path}/b: is damaged")


def test_nothing_is_uploaded_after_an_error(bucket):
    with pytest.raises(MinecubeError, match=r"^s3://mines/export/b: is damaged$"):
        fail_in_folder(Url(f"{bucket}/export"))
    assert stored(bucket) == {}


def test_the_index_of_a_folder_is_uploaded_last(bucket):
    with outgoing(Url(bucket) / "export") as path:
        (path / "pit").mkdir(parents=True)
        for second, name in enumerate(("z.csv", "items.parquet", "collection.json", "pit/a.tif")):
            (path / name).write_text(name)
            os.utime(path / name, (second, second))
    order = ["pit/a.tif", "z.csv", "items.parquet", "collection.json"]
    assert stored(bucket) == {f"export/{name}": name.encode() for name in order}
    server = get_backend("s3")[DEFAULT_ACCOUNT_ID]["aws"]
    assert list(server.buckets["mines"].keys) == [f"export/{name}" for name in order]


def test_a_zarr_replaces_an_older_one_and_other_objects_stay(bucket):
    client = from_url(bucket)
    for key in ("out/pit/pit.zarr/zarr.json", "out/pit/pit.zarr/a/c/9", "out/notes.txt"):
        client.put(key, b"old")
    with outgoing(Url(f"{bucket}/out")) as path:
        zarr = path / "pit" / "pit.zarr"
        (zarr / "a").mkdir(parents=True)
        (zarr / "zarr.json").write_text("new")
        (zarr / "a" / "0").write_text("new")
    assert stored(bucket) == {
        "out/notes.txt": b"old",
        "out/pit/pit.zarr/a/0": b"new",
        "out/pit/pit.zarr/zarr.json": b"new",
    }


def write_zarr(url):
    with outgoing(url) as path:
        (path / "pit.zarr").mkdir(parents=True)
        (path / "pit.zarr" / "zarr.json").write_text("new")


def test_other_objects_in_place_of_a_zarr_are_not_replaced(bucket):
    from_url(bucket).put("out/pit.zarr/notes.txt", b"mine")
    with pytest.raises(PlaceError, match=r"^s3://mines/out/pit\.zarr: expected a Zarr to replace"):
        write_zarr(Url(f"{bucket}/out"))
    assert stored(bucket) == {"out/pit.zarr/notes.txt": b"mine"}


@pytest.mark.parametrize("folder", ["", "/deep/folder"])
def test_a_folder_is_updated(bucket, folder):
    url = Url(bucket + folder)
    with outgoing(url) as path:
        (path / "parts").mkdir(parents=True)
        (path / "parts" / "a").write_text("1")
    with outgoing(url, update=True) as path:
        assert (path / "parts" / "a").read_text() == "1"
        (path / "b").write_text("2")
    prefix = f"{folder}/".lstrip("/")
    assert stored(bucket) == {f"{prefix}b": b"2", f"{prefix}parts/a": b"1"}


def test_a_check_leaves_nothing(bucket):
    check_writable(Url(f"{bucket}/export"))
    check_writable(Url(bucket))
    assert stored(bucket) == {}


def write_text(url):
    with outgoing(url) as path:
        path.write_text("a")


def test_a_missing_bucket_is_one_sentence(bucket):
    other = Url("s3://other/a.txt")
    for do in (check_writable, write_text):
        with pytest.raises(PlaceError, match=r"^s3://other/a\.txt: there is no bucket s3://other;"):
            do(other)
