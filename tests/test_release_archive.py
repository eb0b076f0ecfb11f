"""Zip archives read in place: members, headers, identity, memory, and unreachable ones."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import rasterio
import requests
from affine import Affine
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from minecube import network, release
from minecube.cli import cli
from minecube.errors import ReleaseError
from minecube.grid import PIXEL_DEG
from minecube.reader.remote import Session
from minecube.release.ranges import MissingBytesError, Spans
from minecube.simulate.release import encode_tiff


def _moved_to_the_end(path):
    """GDAL writes the directory of tags anew, behind the pixels."""
    with rasterio.open(path, "r+") as file:
        file.update_tags(words="x" * 3000)


LAYOUTS = {
    "strips": {},
    "bands apart": {"interleave": "band"},
    "LZW": {"compress": "lzw"},
    "tiles": {"tiled": True, "blockxsize": 64, "blockysize": 64, "compress": "deflate"},
    "BigTIFF": {"BIGTIFF": "YES"},
    "directory at the end": {},
}


@pytest.mark.parametrize("packed", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED, zipfile.ZIP_BZIP2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_headers_are_what_gdal_reads_of_the_file(tmp_path, layout, packed):
    pixels = np.random.default_rng(0).integers(1, 3000, (10, 200, 150)).astype(np.int16)
    place = {"crs": "EPSG:4326", "transform": Affine(PIXEL_DEG, 0, 20.5, 0, -PIXEL_DEG, 44.5)}
    with rasterio.open(
        tmp_path / "a.tif",
        "w",
        driver="GTiff",
        count=10,
        dtype="int16",
        height=200,
        width=150,
        **place,
        **LAYOUTS[layout],
    ) as out:
        out.write(pixels)
    if layout == "directory at the end":
        _moved_to_the_end(tmp_path / "a.tif")
    with zipfile.ZipFile(tmp_path / "a.zip", "w", packed) as made:
        made.writestr("before", b"x" * 5000)
        with made.open(
            "a.tif", "w", force_zip64=True
        ) as member:  # so that something stands between its name and its bytes
            member.write((tmp_path / "a.tif").read_bytes())
        made.writestr("after", b"y" * 5000)
    archive = release.Archive(str(tmp_path / "a.zip"))
    with archive.open_image("a.tif") as found, rasterio.open(tmp_path / "a.tif") as expected:
        assert (found.shape, found.count, found.dtypes) == (
            expected.shape,
            expected.count,
            expected.dtypes,
        )
        assert (found.crs, found.transform) == (expected.crs, expected.transform)
    if packed == zipfile.ZIP_STORED:
        assert archive.bytes.tally.bytes < 12_000


def test_an_archive_of_more_than_four_gigabytes(tmp_path):
    """Zip64: members lie beyond what 32 bits can say. The file has a hole, and takes no room."""
    with (tmp_path / "big.zip").open("wb") as file:
        file.seek(5 << 30)
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
            made.writestr(
                "EuroMineNet/Spain_1/label/Year2015.tif",
                encode_tiff(np.full((1, 4, 5), 255, np.uint8)),
            )
            with made.open("second", "w", force_zip64=True) as member:
                member.write(b"z" * 100)
    archive = release.Archive(str(tmp_path / "big.zip"))
    content = dict(archive.read(archive.names()))
    assert content["second"] == b"z" * 100
    assert archive.bytes.tally.bytes < 10_000


@given(
    spans=st.lists(st.tuples(st.integers(0, 99), st.integers(1, 40)), max_size=6),
    reads=st.lists(st.tuples(st.integers(0, 110), st.integers(0, 50)), max_size=8),
)
def test_spans_give_the_files_bytes_or_say_which_they_lack(spans, reads):
    whole = bytes(range(100))
    held = Spans(len(whole))
    there = set()
    for start, length in spans:
        held.add(start, whole[start : start + length])
        there |= set(range(start, min(start + length, 100)))
    for start, length in reads:
        held.seek(start)
        wanted = set(range(start, min(start + length, 100)))
        if wanted <= there:
            assert held.read(length) == whole[start : start + length]
            assert held.tell() == min(start + length, max(start, 100)) or not wanted
        else:
            with pytest.raises(MissingBytesError) as lacking:
                held.read(length)
            gap = set(range(lacking.value.start, lacking.value.start + lacking.value.length))
            assert gap
            assert gap <= wanted - there


def test_an_archive_is_known_by_its_content(tmp_path):
    """Names and sizes are the same; another digit is another archive. Where it lies, and how it is packed, is not."""
    contents = {"a": b"1", "b": b"2", "c": b"1"}
    for name, digit in contents.items():
        with zipfile.ZipFile(
            tmp_path / f"{name}.zip",
            "w",
            zipfile.ZIP_STORED if name == "a" else zipfile.ZIP_DEFLATED,
        ) as made:
            made.writestr("EuroMineNet/Spain_1/label/Year2015.tif", digit)
    one, other, again = (
        release.Archive(str(tmp_path / f"{name}.zip")).compute_identity() for name in contents
    )
    assert one == again != other


def test_another_archive_is_not_the_release(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as made:
        made.writestr("something/else.txt", "x")
    with pytest.raises(
        ReleaseError,
        match=r"expected members such as .*found something/else.txt: not the EuroMineNet release",
    ):
        release.find_members(release.Archive(str(tmp_path / "a.zip")).names())


@pytest.mark.parametrize("packing", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_member_takes_no_more_memory_than_its_directory_says(tmp_path, packing):
    """The directory says 5000 bytes; 300 MB would come out. A block of bzip2 alone has up to 46 MB."""
    path, size = tmp_path / "a.zip", 300_000_000
    with zipfile.ZipFile(path, "w", packing) as made:
        made.writestr("x", bytes(size))
    content = path.read_bytes()
    at = content.rindex(
        struct.pack("<I", size)
    )  # of the directory: uncompressed size (APPNOTE.TXT, 4.3.12)
    path.write_bytes(content[:at] + struct.pack("<I", 5000) + content[at + 4 :])
    archive = release.Archive(str(path))
    tracemalloc.start()
    assert dict(archive.read(["x"])) == {"x": None}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (150e6 if packing == zipfile.ZIP_BZIP2 else 20e6)


def test_what_lies_between_two_members_is_not_fetched(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as made:
        made.writestr("a", b"a" * 100)
        made.fp.write(bytes(10_000_000))
        made.start_dir = made.fp.tell()
        made.writestr("b", b"b" * 100)
    archive = release.Archive(str(tmp_path / "a.zip"))
    assert dict(archive.read(["a"])) == {"a": b"a" * 100}
    assert archive.bytes.tally.bytes < 300_000


@pytest.mark.parametrize("more", [[], ["--download"]])
def test_a_server_that_is_not_there_is_said_at_once(tmp_path, clock, more):
    network.forget_unreachable()
    start = clock.now
    done = CliRunner().invoke(
        cli,
        ["release", "import", "http://127.0.0.1:1/a.zip", "--out", str(tmp_path / "made"), *more],
    )
    assert clock.now - start <= network.REFUSED_S
    assert done.exit_code == 1
    (line,) = [text for text in done.output.splitlines() if text.startswith("error: ")]
    assert (
        "127.0.0.1:1 cannot be reached (Connection refused): check the address, and that the server is running"
        in line
    )


def test_an_s3_endpoint_that_is_not_there_and_keys_that_are_not(tmp_path, clock, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    network.forget_unreachable()
    start = clock.now
    with pytest.raises(
        ReleaseError, match=r"^s3://dead/a\.zip: cannot be read \(127\.0\.0\.1:1 cannot be reached"
    ):
        release.Archive("s3://dead/a.zip")
    assert clock.now - start <= network.REFUSED_S


def test_a_download_keeps_to_the_rules_of_redirects(tmp_path, monkeypatch):
    answer = requests.Response()
    answer.status_code, answer.url = 302, "https://files.example.org/a.zip"
    answer.raw = io.BytesIO()
    for target in (
        "http://files.example.org/a.zip",
        "file:///data/a.zip",
        "https://127.0.0.1/a.zip",
    ):
        answer.headers["Location"] = target
        with pytest.raises(network.ForbiddenError):
            Session().get_redirect_target(answer)


@pytest.mark.parametrize(
    "url", ["http://[::1/x.zip", "http://127.0.0.1:port/x.zip", "ftp://127.0.0.1/x.zip", "s3://"]
)
def test_an_invalid_url_is_an_error_of_the_archive(tmp_path, url):
    with pytest.raises(ReleaseError, match=r"is not read \(expected"):
        release.Archive(url)
    with pytest.raises(ReleaseError, match=r"cannot be downloaded to .* \(expected"):
        release.download(url, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_archive_may_be_a_file_url(tmp_path):
    with zipfile.ZipFile(tmp_path / "a b.zip", "w") as file:
        file.writestr("x.txt", "x")
    assert release.Archive((tmp_path / "a b.zip").as_uri()).names() == ["x.txt"]
