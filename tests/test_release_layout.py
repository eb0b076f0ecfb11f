"""Cubes in the release's layout lie where the release lies, and labels come back as they went."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import rasterio
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox
from odc.geo.xr import xr_coords
from pyproj import Transformer
from rasterio.errors import NotGeoreferencedWarning
from rasterio.io import MemoryFile
from rasterio.vrt import WarpedVRT
from rasterio.warp import Resampling
from scipy import ndimage
from scipy.interpolate import RegularGridInterpolator

from minecube.catalog import Site
from minecube.errors import ReleaseError
from minecube.grid import PIXEL_DEG, grid_of
from minecube.release import layout

PLACES = {"Lapland": (25.0, 66.0), "Lusatia": (14.3, 51.6), "Alentejo": (-8.0, 38.0)}


def release_like(place, shape=(300, 400)):
    """A grid as the release has them, and that of the cube built on its extent."""
    lon, lat = PLACES[place]
    grid = GeoBox(shape, Affine(PIXEL_DEG, 0, lon, 0, -PIXEL_DEG, lat), "EPSG:4326")
    return grid, grid_of(Site(id="a", geometry=grid.extent.geom))


def on(grid, values):
    dims = ("band", "y", "x")[-values.ndim :]
    return xr.DataArray(values, dims=dims, coords=xr_coords(grid))


def centres(grid, of):
    """Rows and columns, fractional, in grid `of` of all pixel centres of `grid`: by pyproj."""
    rows, columns = np.mgrid[: grid.shape[0], : grid.shape[1]] + 0.5
    x, y = Transformer.from_crs(str(grid.crs), str(of.crs), always_xy=True).transform(
        *(grid.affine @ (columns, rows))
    )
    columns, rows = ~of.affine @ (x, y)
    return rows - 0.5, columns - 0.5


def covered(label, there, grid, parts=10):
    """How much of each pixel the label's pixels cover, of 250: a hundred points a pixel."""
    fine = GeoBox(
        (grid.shape[0] * parts, grid.shape[1] * parts),
        grid.affine @ Affine.scale(1 / parts),
        grid.crs,
    )
    rows, columns = (np.rint(a).astype(int) for a in centres(fine, there))
    inside = (rows >= 0) & (rows < label.shape[0]) & (columns >= 0) & (columns < label.shape[1])
    mine = np.zeros(fine.shape, bool)
    mine[inside] = label[rows[inside], columns[inside]] > 0
    share = mine.reshape(grid.shape[0], parts, grid.shape[1], parts).mean(axis=(1, 3))
    return np.rint(share * 250).astype(np.uint8), mine[
        parts // 2 :: parts, parts // 2 :: parts
    ].astype(np.uint8)


@pytest.mark.parametrize("place", PLACES)
def test_images_are_read_between_the_cubes_pixels(place):
    """Against another interpolation. GDAL's warp widens its kernel where pixels are all but of one size: some 4 DN here."""
    grid, cube = release_like(place)
    rng = np.random.default_rng(0)
    values = (
        np.stack(
            [ndimage.gaussian_filter(rng.uniform(0, 9000, cube.shape), 3) for _ in range(2)]
        ).astype(np.uint16)
        + 1
    )
    made = layout.resample_image(on(cube, values), grid)
    rows, columns = centres(grid, cube)
    for band, got in zip(values, made, strict=True):
        known = RegularGridInterpolator([np.arange(n) for n in band.shape], band.astype(np.float64))
        inside = (
            (rows >= 0)
            & (columns >= 0)
            & (rows <= band.shape[0] - 1)
            & (columns <= band.shape[1] - 1)
        )
        assert inside.mean() > 0.99
        assert (
            np.abs(got[inside] - known(np.stack([rows, columns], axis=-1)[inside])).max() <= 0.501
        )


@pytest.mark.parametrize("place", PLACES)
def test_places_are_gdals(place):
    """The nearest pixel of each, as GDAL's warp finds it."""
    grid, cube = release_like(place)
    mask = np.random.default_rng(0).integers(0, 2, cube.shape).astype(np.uint8)
    size = {"height": cube.shape[0], "width": cube.shape[1], "count": 1, "dtype": "uint8"}
    exact = {
        "crs": "EPSG:4326",
        "transform": grid.affine,
        "height": grid.shape[0],
        "width": grid.shape[1],
        "tolerance": 1e-9,
    }
    with MemoryFile() as memory:
        with memory.open(driver="GTiff", crs=str(cube.crs), transform=cube.affine, **size) as file:
            file.write(mask, 1)
        with (
            memory.open() as file,
            WarpedVRT(file, resampling=Resampling.nearest, **exact) as warped,
        ):
            expected = warped.read(1)
    assert (
        layout.resample_label(on(cube, mask), None, grid) // 255 != expected
    ).mean() < 1e-4  # one or two lie between two


def test_nothing_seen_stays_nothing():
    grid, cube = release_like("Lusatia")
    values = np.full((1, *cube.shape), 500, np.uint16)
    values[:, 100:140, 100:140] = 0
    made = layout.resample_image(on(cube, values), grid)
    assert set(np.unique(made)) == {0, 500}
    rows, columns = centres(grid, cube)
    inside = (rows > 101) & (rows < 138) & (columns > 101) & (columns < 138)
    assert (made[0][inside] == 0).all()
    nearest = (
        (np.rint(rows) >= 100)
        & (np.rint(rows) < 140)
        & (np.rint(columns) >= 100)
        & (np.rint(columns) < 140)
    )
    assert (made[0] == 0).sum() == pytest.approx(
        nearest.sum(), rel=0.01
    )  # neither grown nor shrunk


@pytest.mark.parametrize("place", PLACES)
def test_labels_come_back(place):
    """Release -> cube grid -> release on blobs of some ten pixels; through the fraction nearly all, through the mask less."""
    grid, cube = release_like(place)
    ground = ndimage.gaussian_filter(np.random.default_rng(1).standard_normal(grid.shape), 10)
    label = np.where(ground > 1.2 * ground.std(), np.uint8(255), np.uint8(0))
    fraction, mask = covered(label, grid, cube)
    through_fraction = layout.resample_label(on(cube, mask), on(cube, fraction), grid)
    through_mask = layout.resample_label(on(cube, mask), None, grid)
    assert layout.compute_iou(label, through_fraction) > 0.99
    assert (
        0.9 < layout.compute_iou(label, through_mask) < layout.compute_iou(label, through_fraction)
    )
    assert set(np.unique(through_fraction)) == {0, 255}


def test_a_label_that_is_unknown_somewhere_is_none():
    grid, cube = release_like("Lusatia")
    mask, fraction = np.zeros(cube.shape, np.uint8), np.zeros(cube.shape, np.uint8)
    mask[150:160, 150:160] = 255
    fraction[150:160, 150:160] = 255
    assert layout.resample_label(on(cube, mask), None, grid) is None
    assert layout.resample_label(on(cube, mask), on(cube, fraction), grid) is None


def test_a_grid_beyond_the_cube_is_refused():
    grid, cube = release_like("Lusatia")
    layout.need_within(cube, grid)
    with pytest.raises(
        ReleaseError,
        match=r"in EPSG:32633\) reaches beyond the cube .* build the cube on the import's area",
    ):
        layout.resample_image(on(cube, np.ones((1, *cube.shape), np.uint16)), grid.pad(8))


@pytest.mark.parametrize("place", PLACES)
def test_a_site_of_no_release_gets_the_largest_grid_within_its_cube(place):
    _, cube = release_like(place)
    grid = layout.make_release_grid(cube)
    layout.need_within(cube, grid)
    with pytest.raises(ReleaseError):
        layout.need_within(cube, grid.pad(2))
    ratio = grid.affine.c / PIXEL_DEG, grid.affine.f / PIXEL_DEG
    assert ratio == pytest.approx(np.rint(ratio))  # all sites' pixels are of one lattice


def test_files_are_as_the_releases(tmp_path):
    """Names, types, bands, values; the label on the same pixels without CRS and place."""
    grid, cube = release_like("Alentejo")
    values = np.stack(
        [np.full(cube.shape, 100 * n + 1, np.uint16) for n in range(9)]
        + [np.full(cube.shape, 40000, np.uint16)]
    )
    label = layout.resample_label(on(cube, np.ones(cube.shape, np.uint8)), None, grid)
    layout.write_site_year(
        tmp_path, "Portuga_1", 2019, layout.resample_image(on(cube, values), grid), label, grid
    )
    with rasterio.open(tmp_path / "EuroMineNet/Portuga_1/image/Year2019.tif") as image:
        assert (image.count, set(image.dtypes), image.crs.to_epsg(), image.transform) == (
            10,
            {"int16"},
            4326,
            grid.affine,
        )
        pixels = image.read()
    assert [int(b.max()) for b in pixels] == [*range(1, 901, 100), 32767]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(tmp_path / "EuroMineNet/Portuga_1/label/Year2019.tif") as written:
            assert (written.count, written.dtypes[0], written.crs, written.transform) == (
                1,
                "uint8",
                None,
                Affine.identity(),
            )
            assert written.shape == pixels.shape[1:]
            assert set(np.unique(written.read())) == {255}
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["Year2019.tif"] * 2
    layout.write_site_year(
        tmp_path, "Portuga_1", 2019, layout.resample_image(on(cube, values), grid), None, grid
    )
    assert [p.parent.name for p in tmp_path.rglob("*") if p.is_file()] == [
        "image"
    ]  # no label of another cube stays
