"""Hrefs, hosts and redirects that a catalogue may name, and those that it may not."""

from __future__ import annotations

import ctypes
import itertools
import socket
from pathlib import Path

import pytest
import rasterio
import requests
from hypothesis import given
from hypothesis import strategies as st

from known_scenes import grid_at, unique_pixels, write_tif
from minecube import network
from minecube.network import ForbiddenError, check_address, check_href, check_redirect

PUBLIC = "stac.example.org"

GDAL_NAMES = [
    "/vsicurl/http://files.example.org/B04.tif",
    "/vsis3/bucket/B04.tif",
    "/VSIZIP//data/a.zip/B04.tif",
    "/data/scene/../vsimem/x.tif",
    "http://files.example.org/vsicurl/http://x/B04.tif",
    "%2Fvsicurl%2Fhttp://x/B04.tif",
    "/data/%252Fvsicurl/x.tif",
    "\\\\vsicurl\\x",
    "GTIFF_DIR:1:/data/B04.tif",
    "/data/GTIFF_DIR:1:/data/B04.tif",
    "NETCDF:/data/a.nc:B04",
    "netcdf%3A/data/a.nc:B04",
    'ZARR:"/data/a.zarr":/B04',
    "vrt:///data/B04.tif?bands=1",
    "<VRTDataset rasterXSize='1'/>",
    "%3CVRTDataset/%3E",
    "ftp://files.example.org/B04.tif",
    "/data/a\nb.tif",
    "s3://bucket/../other/B04.tif",
    "s3://user@evil.example.org/B04.tif",
]


@pytest.mark.parametrize("origin", ["", PUBLIC])
@pytest.mark.parametrize("href", GDAL_NAMES)
def test_names_that_only_gdal_understands_are_refused_from_anywhere(href, origin):
    with pytest.raises(ForbiddenError):
        check_href(href, origin)


@given(
    st.integers(0, 4),
    st.sampled_from(["/vsicurl/http://x/a.tif", "<VRTDataset/>", "HDF5:/data/a.h5://x"]),
)
def test_percent_encoding_hides_nothing(times, name):
    for _ in range(times):
        name = "".join(f"%{ord(c):02X}" if not c.isalnum() else c for c in name)
    with pytest.raises(ForbiddenError):
        check_href(name, "")


@pytest.mark.parametrize(
    "href",
    [
        "https://files.example.org/a b/B04.tif?x=1",
        "http://files.example.org:8080/urn:eop:x/B04.jp2",
        "s3://bucket/a/B04.tif",
    ],
)
def test_remote_files_are_allowed_from_anywhere(href):
    check_href(href, PUBLIC)
    check_href(href, "")


@pytest.mark.parametrize(
    "href",
    [
        "https://h.example.org/vsi-archive/a.tif",
        "https://h.example.org/a?x=/vsi",
        "https://h.example.org/a?x=/vsizip/b",
    ],
)
def test_remote_names_that_look_like_gdals_are_allowed(href):
    check_href(href, PUBLIC)


@pytest.mark.parametrize(
    "path", ["/data/vsites/a.tif", "/data/S2A_20200101T10:20:21/B02.tif", "/data/vsi/a.tif"]
)
def test_local_names_that_look_like_gdals_are_allowed(path):
    check_href(path, "")
    check_href(f"file://{path}", "")


def test_the_virtual_file_systems_of_this_gdal_are_known(tmp_path):
    """GDAL lists them, with those that rasterio adds. A name that the list here lacks would be allowed."""
    libraries = list((Path(rasterio.__file__).parents[1] / "rasterio.libs").glob("libgdal*"))
    if not libraries:
        pytest.skip(
            "not run: rasterio was not installed from a wheel for Linux, so its GDAL is elsewhere"
        )
    prefixes = ctypes.CDLL(str(libraries[0])).VSIGetFileSystemsPrefixes
    prefixes.restype = ctypes.POINTER(ctypes.c_char_p)
    path = write_tif(tmp_path / "a.tif", unique_pixels(4, 4), grid_at(0, 0, 4, 4))
    with path.open("rb") as file, rasterio.open(file), rasterio.open(str(path), opener=open):
        names = [name.decode() for name in itertools.takewhile(bool, prefixes())]
    assert "/vsicurl/" in names
    assert any(name.startswith("/vsipythonfilelike") for name in names)
    assert any(name.startswith("/vsiriopener") for name in names)
    for name in names:
        with pytest.raises(ForbiddenError, match="special name of GDAL"):
            check_href(f"{name}a.tif", "")


@pytest.mark.parametrize(
    "href",
    ["/data/B04.tif", "data/B04.tif", "../B04.tif", "file:///data/B04.tif", "FILE:///data/B04.tif"],
)
def test_local_files_are_for_local_catalogues(href):
    check_href(href, "")
    with pytest.raises(
        ForbiddenError, match=rf"it is a local file, but its catalogue is at {PUBLIC}"
    ):
        check_href(href, PUBLIC)


PRIVATE = [
    "127.0.0.1",
    "10.1.2.3",
    "192.168.0.1",
    "172.16.0.1",
    "100.64.0.1",
    "0.0.0.0",
    "[::1]",
    "[fd00::1]",
]
SHORT = ["127.1", "2130706433", "0x7f.0.0.1", "[::ffff:127.0.0.1]", "localhost"]
EMBEDDED = [
    "[64:ff9b::7f00:1]",
    "[2002:7f00:1::]",
    "[::127.0.0.1]",
    "[64:ff9b:1::1]",
]  # 127.0.0.1 within IPv6
LINK_LOCAL = [
    "169.254.169.254",
    "[fe80::1]",
    "[::ffff:169.254.169.254]",
    "2852039166",
    "[64:ff9b::a9fe:a9fe]",
]
SPECIAL = [*LINK_LOCAL, "168.63.129.16", "[fd00:ec2::254]", "224.0.0.1", "[ff02::1]", "[ff0e::1]"]


@pytest.fixture
def no_dns(monkeypatch):
    """Names have the addresses given here."""
    known = {PUBLIC: "93.184.216.34", "stac.institute": "10.0.0.5"}

    def lookup(host, port, *args, **kwargs):
        if host not in known:
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (known[host], 0))]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    network.forget_unreachable()
    yield
    network.forget_unreachable()


@pytest.mark.parametrize("host", [*PRIVATE, *SHORT, *EMBEDDED, *SPECIAL])
def test_a_public_catalogue_reaches_no_private_address(no_dns, host):
    href = f"http://{host}/B04.tif"
    for origin in (PUBLIC, "unknown.example.org"):
        with pytest.raises(ForbiddenError, match="which is not public"):
            check_href(href, origin)
    check_href(href, PUBLIC, [host.strip("[]")])  # the source itself names it


@pytest.mark.parametrize("host", PRIVATE)
def test_a_private_catalogue_reaches_private_addresses(no_dns, host):
    for origin in ("", "stac.institute", "127.0.0.1"):
        check_href(f"http://{host}/B04.tif", origin)


@pytest.mark.parametrize("host", SPECIAL)
def test_no_catalogue_reaches_special_addresses(no_dns, host):
    for origin in ("", "stac.institute", "127.0.0.1", host.strip("[]")):
        with pytest.raises(ForbiddenError, match="which is not public"):
            check_href(f"http://{host}/latest/B04.tif", origin)


@pytest.mark.parametrize(
    "host", ["93.184.216.34", "[2606:4700::1111]", "[64:ff9b::5db8:d822]", "[2002:5db8:d822::]"]
)
def test_public_addresses_are_reached_in_every_form(no_dns, host):
    check_href(f"http://{host}/B04.tif", PUBLIC)


def test_a_host_with_a_public_and_a_private_address_counts_as_public(monkeypatch):
    """A catalogue could add a private address to its own name, and would reach it there."""
    found = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))
        for address in ("93.184.216.34", "10.0.0.5")
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: found)
    network.forget_unreachable()
    with pytest.raises(
        ForbiddenError, match=r"both\.example\.org has the address 10\.0\.0\.5, which is not public"
    ):
        check_address("both.example.org", "10.0.0.5", "both.example.org")
    check_address("both.example.org", "93.184.216.34", "both.example.org")
    network.forget_unreachable()


def test_a_name_is_judged_by_its_address(no_dns):
    check_address("files.example.org", "93.184.216.34", PUBLIC)
    for address in ("127.0.0.1", "10.0.0.5", "169.254.169.254"):
        with pytest.raises(ForbiddenError, match=rf"files\.example\.org has the address {address}"):
            check_address("files.example.org", address, PUBLIC)


MALFORMED = [
    "http://[::1/x.zip",
    "http://files.example.org:port/x",
    "http://files.example.org:99999/x",
]
ENCODED = ["http://files%2eexample.org/x", "http://%a1/x"]


@pytest.mark.parametrize(
    "url",
    [
        *MALFORMED,
        *ENCODED,
        "http://127.0.0.1\\@files.example.org/x",
        "http://files.example.org/a\\b",
    ],
)
def test_urls_that_libraries_read_differently_are_refused(url):
    for check in (
        lambda: check_href(url, PUBLIC),
        lambda: check_redirect("http://a.example.org/x", url, PUBLIC),
    ):
        with pytest.raises(ForbiddenError):
            check()


@given(st.text(alphabet="ab.:@\\/?#[]%1 ", max_size=12))
def test_the_host_that_is_checked_is_the_host_that_is_asked(rest):
    """`requests` prepares the URL, and an HTTP connection is made to what it prepared."""
    url = f"http://{rest}"
    try:
        checked = network.host_of(url)
        asked = requests.Request("GET", url).prepare().url
    except (ForbiddenError, requests.RequestException):
        return
    assert requests.utils.urlparse(asked).hostname == checked.lower()


def test_redirects_stay_on_the_web(no_dns):
    assert check_redirect("http://a.example.org/x/y", "../z", PUBLIC) == "http://a.example.org/z"
    assert (
        check_redirect("http://a.example.org/x", "https://b.example.org/", PUBLIC)
        == "https://b.example.org/"
    )
    for url, target in (
        ("http://a.example.org/x", "file:///data/x"),
        ("http://a.example.org/x", "ftp://b.example.org/x"),
        ("https://a.example.org/x", "http://a.example.org/x"),
        ("http://a.example.org/x", "http://169.254.169.254/latest"),
        ("http://a.example.org/x", "//127.0.0.1/x"),
    ):
        with pytest.raises(ForbiddenError):
            check_redirect(url, target, PUBLIC)
    with pytest.raises(ForbiddenError):
        check_redirect("http://a.example.org/x", "http://stac.institute/x", PUBLIC, resolve=True)


def test_a_host_that_does_not_answer_is_remembered_for_a_while(monkeypatch):
    network.forget_unreachable()
    network.note_unreachable("http://a.example.org:80/x", "a is down")
    with pytest.raises(network.RequestError, match="a is down"):
        network.need_reachable("http://a.example.org:80/y")
    network.need_reachable("http://a.example.org:81/y")
    monkeypatch.setattr(network, "_REMEMBERED_S", 0.0)
    network.note_unreachable("http://a.example.org:80/x", "a is down")
    network.need_reachable("http://a.example.org:80/y")
    network.note_unreachable("http://a.example.org:80/x", "a is down")
    network.forget_unreachable()
    network.need_reachable("http://a.example.org:80/y")


def test_other_errors_are_not_taken_for_an_unreachable_host():
    assert network.explain_unreachable("http://x/", ValueError("no")) is None
    try:
        requests.get("http://127.0.0.1:1/", timeout=5)
    except requests.ConnectionError as error:
        said = network.explain_unreachable("http://user:secret@127.0.0.1:1/", error)
    assert (
        said
        == "127.0.0.1:1 cannot be reached (Connection refused): check the address, and that the server is running"
    )
