"""A catalogue's hrefs cannot make the reader open a file or an address that it must not."""

from __future__ import annotations

import functools
import os
import socket
import tracemalloc
import warnings

import numpy as np
import pytest
import rasterio

from known_scenes import grid_at, unique_pixels, write_tif
from known_servers import LEFT, TOP, Ranged, noted, running
from minecube import images, network
from minecube.catalog import Access
from minecube.errors import ReadError
from minecube.reader import read
from minecube.reader.remote import Remote, Tally

pytestmark = pytest.mark.usefixtures("all_hosts_are_tried")


@pytest.mark.parametrize(
    "href", ["http://[::1/B04.tif", "http://127.0.0.1:port/B04.tif", "s3://", "s3:///B04.tif"]
)
def test_an_invalid_url_is_not_read(href):
    with pytest.raises(ReadError, match="is not read"):
        read(href, grid_at(LEFT, TOP, 10, 10))


def test_a_name_of_a_public_catalogue_that_has_a_private_address_is_not_asked(band, monkeypatch):
    """Told when the connection is made, before a request is sent."""
    folder, grid, pixels = band
    lookup = socket.getaddrinfo
    ours = {"stac.example.org": "93.184.216.34", "files.example.org": "127.0.0.1"}
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *args, **more: lookup(ours.get(host, host), *args, **more),
    )
    with noted(folder) as (url, asked):
        href = f"{url}/B04.tif".replace("127.0.0.1", "files.example.org")
        with pytest.raises(
            ReadError,
            match=r"files\.example\.org has the address 127\.0\.0\.1, which is not public",
        ):
            read(href, grid, origin="stac.example.org")
        assert asked == []
        np.testing.assert_array_equal(
            read(href, grid, origin="files.example.org"), pixels
        )  # its own API is there


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_forbidden_address_is_sent_nothing(scheme):
    """Not even the beginning of a TLS connection, which tells the host's name."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        port = server.getsockname()[1]
        source = Remote(Access(), "93.184.216.34")
        with pytest.raises(network.RequestError, match=r"127\.0\.0\.1, which is not public"):
            source.head(f"{scheme}://127.0.0.1:{port}/B04.tif", Tally())
        connection, _ = server.accept()
        with connection:
            connection.settimeout(10)
            assert connection.recv(1) == b""


@pytest.mark.parametrize(
    "target", ["file:///data/B04.tif", "ftp://127.0.0.1/B04.tif", "http://169.254.169.254/B04.tif"]
)
def test_a_redirect_leads_nowhere_else(band, target):
    folder, grid, _ = band
    with (
        noted(folder, target) as (url, asked),
        pytest.raises(ReadError, match=r"B04\.tif: cannot be read"),
    ):
        read(f"{url}/B04.tif", grid)
    assert len(asked) == 1


def test_redirects_have_an_end(band):
    folder, grid, _ = band
    with (
        noted(folder, "/B04.tif") as (url, asked),
        pytest.raises(ReadError, match="more than 5 redirects"),
    ):
        read(f"{url}/B04.tif", grid)
    assert len(asked) == 6


@pytest.mark.parametrize("far", [False, True])
def test_a_virtual_format_is_not_followed(band, far):
    """A text that points at a file of ours, under the name of a GeoTIFF. GDAL alone would read it."""
    folder, grid, pixels = band
    with rasterio.open(folder / "B04.tif") as src:
        place, wkt = ", ".join(map(str, src.transform.to_gdal())), src.crs.to_wkt()
    source = f"<SimpleSource><SourceFilename>{folder / 'B04.tif'}</SourceFilename><SourceBand>1</SourceBand></SimpleSource>"
    (folder / "V.tif").write_text(
        f'<VRTDataset rasterXSize="700" rasterYSize="600"><SRS>{wkt}</SRS><GeoTransform>{place}</GeoTransform>'
        f'<VRTRasterBand dataType="UInt16" band="1">{source}</VRTRasterBand></VRTDataset>'
    )
    with rasterio.open(folder / "V.tif") as src:
        np.testing.assert_array_equal(src.read(1), pixels)
    with running(functools.partial(Ranged, directory=str(folder))) as url:
        href = f"{url}/V.tif" if far else str(folder / "V.tif")
        with pytest.raises(
            ReadError,
            match=r"V\.tif: is not read \(expected a GeoTIFF or JPEG 2000 file, found another format",
        ):
            read(href, grid)


@pytest.mark.parametrize("far", [False, True])
def test_overviews_in_another_file_are_not_followed(band, far):
    """A GeoTIFF that names a file of ours for its overviews. GDAL alone would read it."""
    folder, grid, _ = band
    small = grid_at(LEFT, TOP, 64, 64)
    write_tif(folder / "other.tif", np.full((64, 64), 4321, np.uint16), small)
    write_tif(folder / "V.tif", np.full((128, 128), 7, np.uint16), grid_at(LEFT, TOP, 128, 128))
    with rasterio.open(folder / "V.tif", "r+") as out:
        out.update_tags(ns="OVERVIEWS", OVERVIEW_FILE=str(folder / "other.tif"))
    with rasterio.Env(**images.SETTINGS), rasterio.open(folder / "V.tif") as src:
        assert np.unique(src.read(1, out_shape=(64, 64))) == [4321]
    with running(functools.partial(Ranged, directory=str(folder))) as url:
        href = f"{url}/V.tif" if far else str(folder / "V.tif")
        with pytest.raises(
            ReadError, match=r"V\.tif: is not read \(expected an image without OVERVIEWS metadata"
        ):
            read(href, grid)


@pytest.mark.parametrize(
    "href", ["/vsicurl/{url}/B04.tif", "/vsis3/bucket/B04.tif", "GTIFF_DIR:1:{folder}/B04.tif"]
)
def test_gdals_own_names_are_not_opened(band, href):
    folder, grid, _ = band
    with pytest.raises(ReadError, match=r"it is a special name of GDAL|found GTIFF_DIR:"):
        read(href.format(url="http://127.0.0.1:1", folder=folder), grid)


def test_file_urls_are_local_files(band):
    folder, grid, pixels = band
    (folder / "a b.tif").write_bytes((folder / "B04.tif").read_bytes())
    np.testing.assert_array_equal(read(f"file://{folder}/a%20b.tif", grid), pixels)
    with pytest.raises(
        ReadError, match=r"it is a local file, but its catalogue is at stac\.example\.org"
    ):
        read(f"file://{folder}/a%20b.tif", grid, origin="stac.example.org")


def test_what_is_no_file_is_not_opened(band):
    """GDAL would wait for a pipe for ever."""
    folder, grid, _ = band
    os.mkfifo(folder / "P.tif")
    with pytest.raises(ReadError, match="expected a file, found something else"):
        read(str(folder / "P.tif"), grid)


def test_files_beside_an_image_are_not_read(tmp_path):
    """A no-data value and a place, both of which GDAL would take over."""
    grid, pixels = grid_at(LEFT, TOP, 60, 60), unique_pixels(60, 60)
    path = write_tif(tmp_path / "B04.tif", pixels, grid, nodata=None)
    wrong = f"<PAMDataset><PAMRasterBand band='1'><NoDataValue>{pixels[5, 5]}</NoDataValue></PAMRasterBand></PAMDataset>"
    path.with_suffix(".tif.aux.xml").write_text(wrong)
    with rasterio.open(path) as src:
        assert src.nodata == pixels[5, 5]
    np.testing.assert_array_equal(read(str(path), grid), pixels)


def test_world_files_are_not_read(tmp_path):
    grid, path = grid_at(LEFT, TOP, 60, 60), tmp_path / "bare.tif"
    warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
    shape = {"height": 60, "width": 60, "count": 1, "dtype": "uint16"}
    with rasterio.open(path, "w", driver="GTiff", crs="EPSG:32633", **shape) as out:
        out.write(unique_pixels(60, 60), 1)
    path.with_suffix(".tfw").write_text(f"10\n0\n0\n-10\n{LEFT + 5}\n{TOP - 5}\n")
    with rasterio.open(path) as src:
        assert src.transform == grid.transform
    with pytest.raises(ReadError, match="cannot be read"):
        read(str(path), grid)


HUGE = {
    "pixels": (
        {"height": 200_000, "width": 200_000, "blockxsize": 512, "blockysize": 512},
        r"200,000 x 200,000",
    ),
    "a tile": (
        {"height": 600, "width": 700, "blockxsize": 50_000, "blockysize": 50_000},
        r"tiles of .* 50,000 x 50,000",
    ),
}


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("what", HUGE)
def test_a_header_that_says_too_much_is_believed_before_a_pixel_is_read(tmp_path, what, far):
    """The files are sparse: a few kilobytes, whose header merely says so."""
    options, said = HUGE[what]
    grid = grid_at(LEFT, TOP, 700, 600)
    with rasterio.open(
        tmp_path / "B04.tif", "w", driver="GTiff", count=1, dtype="uint16", tiled=True, sparse_ok=True, crs="EPSG:32633",
        transform=grid.transform, BIGTIFF="YES", **options,
    ):  # fmt: skip
        pass
    assert (tmp_path / "B04.tif").stat().st_size < 5e6
    with running(functools.partial(Ranged, directory=str(tmp_path))) as url:
        tracemalloc.start()
        with pytest.raises(ReadError, match=said):
            read(f"{url}/B04.tif" if far else str(tmp_path / "B04.tif"), grid)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 10e6


def test_a_band_as_large_as_a_tile_is_read(tmp_path):
    """10,980 pixels a side, in one strip a row, are what a product has."""
    grid = grid_at(LEFT, TOP, 10_980, 10_980)
    with rasterio.open(
        tmp_path / "B04.tif", "w", driver="GTiff", count=1, dtype="uint16", height=10_980, width=10_980, sparse_ok=True,
        crs="EPSG:32633", transform=grid.transform,
    ):  # fmt: skip
        pass
    assert not read(str(tmp_path / "B04.tif"), grid[:10, :10]).any()
