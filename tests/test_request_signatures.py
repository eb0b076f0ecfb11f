"""Requests carry tokens and signatures to the named hosts only, and show them nowhere."""

from __future__ import annotations

import functools
import json
import time
import urllib.request

import numpy as np
import pytest
from rasterio.enums import Resampling

from known_scenes import serve
from known_servers import Ranged, counts, noted, running, write_jp2
from minecube import network
from minecube.catalog import Access
from minecube.errors import CatalogError, ReadError
from minecube.reader import check_credentials, read
from minecube.reader.remote import Remote, Tally
from minecube.reader.signing import bucket_of

pytestmark = pytest.mark.usefixtures("all_hosts_are_tried")


@pytest.fixture
def jp2(tmp_path):
    return write_jp2(tmp_path)


@pytest.mark.parametrize("status", [401, 403, 409])
def test_a_refusal_names_the_setting_that_would_sign(band, status):
    folder, grid, _ = band
    hint = "list the host or bucket in credentials_for"
    with serve(folder, "--fail", 1, "--status", status) as url:
        signing = Access(kind="s3", href=url, credentials_for=("ours",))
        with pytest.raises(ReadError, match=rf"HTTP {status}.*; {hint} of its source"):
            read("s3://files/B04.tif", grid, access=signing)
        for access in (
            Access(),
            Access(kind="s3", href=url, anonymous=True),
        ):  # nothing could be listed there
            with pytest.raises(ReadError, match=rf"HTTP {status}") as caught:
                read(f"{url}/B04.tif", grid, access=access)
            assert hint not in str(caught.value)


def test_tokens_that_expire_while_reading(band, caplog, capfd):
    """Signed when asked, renewed before they expire; shown nowhere."""
    folder, grid, pixels = band
    caplog.set_level("DEBUG")
    with serve(folder, "--token-life", 0.5) as url:
        access = Access(
            kind="planetary-computer", href=f"{url}/token", credentials_for=("127.0.0.1",)
        )
        href = f"{url}/B04.tif"
        for y in range(0, 600, 40):
            np.testing.assert_array_equal(
                read(href, grid[y : y + 40], access=access), pixels[y : y + 40]
            )
            time.sleep(0.1)
        assert counts(url)["refused"] == 0
    shown = caplog.text + "".join(capfd.readouterr())
    assert "B04.tif" in shown
    assert "sig=" not in shown


class Revoking(Ranged):
    """Gives tokens that are said to last for centuries, and refuses those that are revoked."""

    def __init__(self, given, revoked, *args, **kwargs):
        self.given, self.revoked = given, revoked
        super().__init__(*args, **kwargs)

    def do_GET(self):  # noqa: N802  the name that http.server calls
        path, _, query = self.path.partition("?")
        if path.startswith("/token/"):
            self.given.append(f"sig={len(self.given)}")
            token = {"token": self.given[-1], "msft:expiry": "2999-01-01T00:00:00+00:00"}
            self.reply(200, json.dumps(token).encode())
        elif query in self.revoked or query not in self.given:
            self.reply(403, b"")
        else:
            super().do_GET()

    def reply(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def test_a_token_that_is_refused_before_its_end_is_renewed(band, caplog, capfd):
    """It is thought to be good for longer than it is, as where clocks differ."""
    folder, grid, pixels = band
    caplog.set_level("DEBUG")
    given, revoked = [], []
    with running(functools.partial(Revoking, given, revoked, directory=str(folder))) as url:
        access = Access(
            kind="planetary-computer", href=f"{url}/token", credentials_for=("127.0.0.1",)
        )
        read(f"{url}/B04.tif", grid[:40], access=access)
        revoked += given
        tally = Tally()
        np.testing.assert_array_equal(
            read(f"{url}/B04.tif", grid[300:340], access=access, tally=tally), pixels[300:340]
        )
    assert tally.retried == 1
    assert given == ["sig=0", "sig=1"]
    assert "sig=" not in caplog.text + "".join(capfd.readouterr())


def test_a_token_service_that_gives_none(band):
    folder, grid, _ = band
    with serve(folder) as url:
        access = Access(
            kind="planetary-computer", href=f"{url}/nowhere", credentials_for=("127.0.0.1",)
        )
        with pytest.raises(ReadError, match=r"/nowhere gives no token for 127/B04\.tif: HTTP 404"):
            read(f"{url}/B04.tif", grid, access=access)


@pytest.fixture
def s3(monkeypatch):
    """An S3 server on loopback, and the keys it takes."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    yield f"http://127.0.0.1:{port}"
    server.stop()


def test_files_in_s3(s3, jp2, band):
    """As CDSE has them: JPEG 2000 under s3:// hrefs at an endpoint of its own, requests signed when they are made."""
    import obstore

    (path, grid, pixels), (folder, _, tif_pixels) = jp2, band
    urllib.request.urlopen(urllib.request.Request(f"{s3}/eodata", method="PUT"), timeout=20)
    access = Access(kind="s3", href=s3, region="default", credentials_for=("eodata",))
    bucket = bucket_of(access, "eodata")
    obstore.put(bucket, "a/B04.jp2", path)
    obstore.put(bucket, "a/B04.tif", folder / "B04.tif")
    np.testing.assert_array_equal(
        read("s3://eodata/a/B04.jp2", grid[100:300, 200:500], access=access),
        pixels[100:300, 200:500],
    )
    np.testing.assert_array_equal(read("s3://eodata/a/B04.tif", grid, access=access), tif_pixels)
    with pytest.raises(
        ReadError, match=r"^s3://eodata/a/none\.tif: cannot be read \(HTTP 404"
    ) as caught:
        read("s3://eodata/a/none.tif", grid, access=access)
    assert "ignature" not in str(caught.value)


def test_public_objects_are_asked_for_without_a_signature(band):
    folder, grid, pixels = band
    with serve(folder.parent) as url:
        access = Access(kind="s3", href=url, anonymous=True)
        np.testing.assert_array_equal(read("s3://files/B04.tif", grid, access=access), pixels)


def test_requests_to_s3_are_signed(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    access = Access(
        kind="s3", href="https://eodata.example.org", region="default", credentials_for=("eodata",)
    )
    url, _ = Remote(access).sign("s3://eodata/a b/x.jp2")
    assert url.startswith("https://eodata.example.org/eodata/a%20b/x.jp2?")
    assert "X-Amz-Signature=" in url
    assert "very-secret" not in url
    other, _ = Remote(access).sign("s3://elsewhere/a b/x.jp2")
    assert other == "https://eodata.example.org/elsewhere/a%20b/x.jp2"
    assert (
        Remote(Access()).sign("s3://eodata/x.jp2")[0]
        == "https://s3.us-east-1.amazonaws.com/eodata/x.jp2"
    )


def test_only_sources_of_kind_s3_use_an_endpoint_of_the_user(monkeypatch):
    """Any catalogue can name s3://, and would reach a private endpoint or the token service."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://10.0.0.5:9000")
    service = Access(kind="planetary-computer", href="https://tokens.example.org/token")
    for access in (Access(), service):
        remote = Remote(access, "stac.example.org")
        assert remote.sign("s3://a/b.tif") == (
            "https://s3.us-east-1.amazonaws.com/a/b.tif",
            None,
        )
        with pytest.raises(network.ForbiddenError, match=r"10\.0\.0\.5"):
            remote.check_address("10.0.0.5", "10.0.0.5")
    remote = Remote(Access(kind="s3", anonymous=True), "stac.example.org")
    assert remote.sign("s3://a/b.tif") == ("http://10.0.0.5:9000/a/b.tif", None)
    remote.check_address("10.0.0.5", "10.0.0.5")


def test_a_source_without_keys(monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    with pytest.raises(
        CatalogError,
        match=r"'cdse' reads from https://x, which needs keys: AWS_ACCESS_KEY_ID not set",
    ):
        check_credentials(Access(kind="s3", href="https://x", credentials_for=("b",)), "cdse")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    check_credentials(Access(kind="s3", href="https://x", credentials_for=("b",)), "cdse")
    for access in (Access(kind="s3", href="https://x"), Access(kind="s3")):
        with pytest.raises(
            CatalogError, match="'cdse' signs requests, but names no bucket: list its buckets in"
        ):
            check_credentials(access, "cdse")
    check_credentials(Access(kind="s3", href="https://x", anonymous=True), "cdse")
    check_credentials(Access(), "plain")


def test_a_redirect_shows_no_signature(band, caplog):
    folder, grid, pixels = band
    caplog.set_level("DEBUG")
    with serve(folder, "--redirect", "--fail", 0.3) as url:
        np.testing.assert_array_equal(read(f"{url}/B04.tif?sig=secret", grid), pixels)
    assert "Redirecting" in caplog.text
    assert "secret" not in caplog.text


def test_a_read_that_gdal_makes_shows_no_url(band, caplog):
    """What fails within GDAL is told by the request that failed, not by GDAL's name for the file."""
    folder, grid, _ = band
    content = (folder / "B04.tif").read_bytes()
    (folder / "B04.tif").write_bytes(
        content[: len(content) // 2]
    )  # the header promises tiles that are not there
    with serve(folder) as url, pytest.raises(ReadError, match=rf"^{url}/B04\.tif: cannot be read"):
        read(f"{url}/B04.tif?sig=secret", grid, Resampling.nearest)
    assert "secret" not in caplog.text


def test_a_token_is_for_the_hosts_that_the_source_names(band):
    """A foreign host is asked without it, by itself and after a redirect. `localhost` is another name of this machine."""
    folder, grid, pixels = band
    with noted(folder) as (url, asked):
        foreign = url.replace("127.0.0.1", "localhost")
        access = Access(
            kind="planetary-computer", href=f"{url}/token", credentials_for=("127.0.0.1",)
        )
        np.testing.assert_array_equal(read(f"{foreign}/B04.tif", grid, access=access), pixels)
        assert asked
        assert not [a for a in asked if "SECRET" in a or a.startswith("/token/")]
        with noted(folder, f"{foreign}/B04.tif") as (named, asked_first):
            access = Access(
                kind="planetary-computer", href=f"{named}/token", credentials_for=("127.0.0.1",)
            )
            np.testing.assert_array_equal(read(f"{named}/B04.tif", grid, access=access), pixels)
            assert any("SECRET" in a for a in asked_first)  # the named host does see it
        assert not [a for a in asked if "SECRET" in a or "uthorization" in a]


def test_a_backslash_hides_no_host(band):
    """urlsplit takes what follows @ for the host, urllib3 what comes before the backslash."""
    folder, grid, _ = band
    with noted(folder) as (url, asked):
        access = Access(
            kind="planetary-computer", href=f"{url}/token", credentials_for=("blob.example.org",)
        )
        with pytest.raises(ReadError, match="expected a URL without a backslash"):
            read(f"{url}\\@blob.example.org/c/B04.tif", grid, access=access)
        with pytest.raises(network.RequestError, match="expected a URL without a backslash"):
            Remote(access).head(f"{url}\\@blob.example.org/c/B04.tif", Tally())
        assert asked == []


def test_a_bucket_is_no_host():
    """A host that has the name of a bucket is not given a token."""
    access = Access(kind="s3", href="https://s3.example.org", credentials_for=("eodata",))
    assert Remote(access).sign("https://eodata/c/B04.tif") == ("https://eodata/c/B04.tif", None)


def test_a_token_is_not_sent_in_the_clear():
    access = Access(
        kind="planetary-computer",
        href="https://tokens.example.org",
        credentials_for=("files.example.org",),
    )
    assert Remote(access).sign("http://files.example.org/c/B04.tif") == (
        "http://files.example.org/c/B04.tif",
        None,
    )


def test_another_bucket_is_asked_without_a_signature(band, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "KEY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    folder, grid, pixels = band
    with noted(folder.parent) as (url, asked):
        access = Access(kind="s3", href=url, region="default", credentials_for=("ours",))
        np.testing.assert_array_equal(read("s3://files/B04.tif", grid, access=access), pixels)
        assert asked
        assert not [a for a in asked if "KEY" in a or "X-Amz" in a or "uthorization" in a]
        with pytest.raises(ReadError, match="HTTP 404"):
            read("s3://ours/B04.tif", grid, access=access)
        assert "X-Amz-Signature" in asked[-1]
