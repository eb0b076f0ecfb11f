"""An archive on a server is read by few byte ranges, and a broken connection is no broken archive."""

from __future__ import annotations

import json
import os
import shutil
import urllib.request
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from rasterio.errors import NotGeoreferencedWarning

from known_archives import KNOWN, SPLIT, changed, drawn, image, make_archive
from known_scenes import serve
from minecube import release
from minecube.cli import cli
from minecube.errors import ReleaseError
from minecube.simulate.release import write_release


@pytest.fixture(autouse=True)
def _labels_have_no_place():
    warnings.simplefilter("ignore", NotGeoreferencedWarning)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_archive(tmp_path_factory.mktemp("release"))


@pytest.mark.parametrize("packed", [True, False])
def test_few_bytes_are_asked_for(tmp_path, packed):
    """Of the release's own size, images would be 14 MB; here they are 1.8 MB, so that headers weigh eight times as much."""
    path = tmp_path / "served" / "EuroMineNet.zip"
    path.parent.mkdir()
    write_release(
        path, {"Germany_1": (12.0, 51.0)}, range(2015, 2020), shape=(320, 280), packed=packed
    )
    with zipfile.ZipFile(path) as content:
        labels = sum(m.compress_size for m in content.infolist() if "/label/" in m.filename)
    with serve(path.parent) as url:
        archive = release.Archive(f"{url}/EuroMineNet.zip")
        made = release.import_release(archive, tmp_path / "made", KNOWN, SPLIT)
        with urllib.request.urlopen(f"{url}/counts") as answer:
            requests = json.load(answer)["requests"]
    assert len(made.years) == 5
    assert archive.bytes.tally.requests == requests
    assert archive.bytes.tally.bytes - labels < 0.005 * path.stat().st_size
    assert (
        requests <= 3 + 1 + 5 * 3
    )  # the directory; labels, which lie apart here; two or three a header


def test_labels_side_by_side_are_one_request(whole, tmp_path):
    def by_kind(members):
        for name in sorted(members, key=lambda n: "/label/" in n):
            members[name] = members.pop(name)

    changed(whole[0], tmp_path / "sorted.zip", by_kind)
    with serve(tmp_path) as url:
        archive = release.Archive(f"{url}/sorted.zip")
        before = archive.bytes.tally.requests
        names = [n for n in archive.names() if "/label/" in n]
        content = dict(archive.read(names))
        assert archive.bytes.tally.requests == before + 1
    with zipfile.ZipFile(tmp_path / "sorted.zip") as plain:
        assert content == {n: plain.read(n) for n in names}


def test_a_header_that_is_lost_halfway_is_no_header(whole, tmp_path):
    """GDAL is given zeros for what does not come: it must not be believed."""
    path = Path(shutil.copy(whole[0], tmp_path / "a.zip"))
    archive = release.Archive(str(path))
    name = image("Germany_1", 2015)
    with zipfile.ZipFile(path) as content:
        start = content.getinfo(name).header_offset
    os.truncate(path, start + 1250)
    before = archive.bytes.tally.bytes
    with (
        pytest.raises(ReleaseError, match=r"cannot be read \(.*it has become shorter"),
        archive.open_image(name) as found,
    ):
        found.transform  # noqa: B018
    assert archive.bytes.tally.bytes > before  # the first part came


def test_a_disk_that_fails_is_no_broken_member(whole, tmp_path):
    """A file that becomes shorter while it is read: nothing is left out for it."""
    path = tmp_path / "a.zip"
    path.write_bytes(whole[0].read_bytes())
    archive = release.Archive(str(path))
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ReleaseError, match="it has become shorter"):
        release.import_release(archive, tmp_path / "made", KNOWN, SPLIT)


def test_a_line_that_breaks_is_not_taken_for_a_broken_member(whole, tmp_path, clock):
    """What could not be asked for is asked for again by the next run; nothing is left out for it."""
    with serve(whole[0].parent) as url:
        archive = release.Archive(f"{url}/EuroMineNet.zip")
    with pytest.raises(ReleaseError, match=r"cannot be read \(.* 0 sites are read, run again"):
        release.import_release(archive, tmp_path / "made", KNOWN, SPLIT)


def test_nothing_is_downloaded_into_a_catalogue_of_the_users(whole, tmp_path):
    (tmp_path / "sites.geojson").write_text("precious")
    with serve(whole[0].parent) as url:
        asked = [
            "release",
            "import",
            f"{url}/EuroMineNet.zip",
            "--download",
            "--out",
            str(tmp_path),
        ]
        done = CliRunner().invoke(cli, asked)
        with urllib.request.urlopen(f"{url}/counts") as answer:
            assert json.load(answer)["requests"] == 0
    assert done.exit_code == 2
    assert "has a sites.geojson that no import wrote" in done.output
    assert [p.name for p in tmp_path.iterdir()] == ["sites.geojson"]


def test_a_server_without_ranges_needs_a_download(whole, tmp_path):
    with serve(whole[0].parent, "--no-ranges") as url:
        asked = ["release", "import", f"{url}/EuroMineNet.zip", "--out", str(tmp_path / "made")]
        refused = CliRunner().invoke(cli, asked)
        assert refused.exit_code == 2
        assert "does not answer byte ranges" in refused.output
        assert "--download" in refused.output
        assert not (tmp_path / "made").exists()
        done = CliRunner().invoke(cli, [*asked, "--download"])
    assert done.exit_code == 0, done.output
    made = release.open_import(tmp_path / "made")
    for (site, year), mask in whole[1].items():
        np.testing.assert_array_equal(drawn(made, site, year), mask)


def test_a_download_that_stops_short_is_none(whole, tmp_path):
    with (
        serve(whole[0].parent, "--truncate", 1) as url,
        pytest.raises(ReleaseError, match="cannot be downloaded"),
    ):
        release.download(f"{url}/EuroMineNet.zip", tmp_path / "made")
    assert list((tmp_path / "made").iterdir()) == []
