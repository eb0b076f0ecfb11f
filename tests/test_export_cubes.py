"""Whole cubes as NetCDF and Zarr, opened by netCDF4, xarray, two GDALs, a CF checker, and the GeoZarr conventions' package."""

from __future__ import annotations

import contextlib
import ctypes
import io
import warnings
from itertools import pairwise
from pathlib import Path

import netCDF4
import numpy as np
import pyogrio
import pystac
import pytest
import rasterio
import rioxarray  # noqa: F401  registers the .rio accessor
import xarray as xr
import zarr
import zarr_cm
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox
from odc.geo.xr import xr_coords

from minecube.catalog import BANDS
from minecube.errors import CubeError
from minecube.export import (
    make_asset,
    write_cogs,
    write_items,
    write_netcdf,
    write_stac,
    write_zarr,
    write_zarr2,
)

GRID = GeoBox(
    (301, 530), Affine(10, 0, 399960, 0, -10, 5700000), "EPSG:32633"
)  # odd, so that the last coarse pixel is cut
YEARS = (2019, 2021)


def cube_on(grid, seed=0):
    height, width = grid.shape
    rng = np.random.default_rng(seed)
    shape = (len(YEARS), height, width)
    reflectance = rng.integers(0, 65536, (len(YEARS), len(BANDS), height, width)).astype(np.uint16)
    reflectance[:, :, :40, :40] = 0
    quality = rng.integers(0, 7, shape).astype(np.uint8)
    flags = {
        "flag_values": list(range(7)),
        "flag_meanings": "none a b c d e f",
        "nodata": 0,
        "units": "1",
    }
    deviation = rng.random(shape).astype(np.float32)
    deviation[:, 5:9] = np.nan
    fraction = rng.choice(np.array([0, 100, 250, 255], np.uint8), shape)
    layers = {
        "footprint_fraction": (
            fraction,
            {"long_name": "share x 250", "units": "0.004", "nodata": 255},
        ),
        "clear_count": (
            rng.integers(0, 90, shape).astype(np.uint16),
            {"long_name": "clear days", "units": "1"},
        ),
        "quality": (quality, {"long_name": "how a pixel came about", **flags}),
        "smad": (deviation, {"long_name": "spectral deviation", "units": "1"}),
        "footprint": (
            rng.choice(np.array([0, 1, 255], np.uint8), shape),
            {"origin": "EuroMineNet (CC BY 4.0)"},
        ),
        "probability": (
            rng.integers(0, 251, shape).astype(np.uint8),
            {"model": {"id": "net", "licence": "MIT"}},
        ),
    }
    variables = {
        name: (("year", "y", "x"), values, attrs) for name, (values, attrs) in layers.items()
    }
    variables["reflectance"] = (("year", "band", "y", "x"), reflectance)
    builds = {year: {"build_id": f"b{year}", "version": "0.1.0"} for year in YEARS}
    builds[2021]["reads"] = {"completeness": 0.975}
    return xr.Dataset(
        variables, {"year": list(YEARS), "band": list(BANDS), **xr_coords(grid)}, {"builds": builds}
    )


@pytest.fixture(scope="module")
def cube():
    return cube_on(GRID)


@pytest.fixture(scope="module")
def netcdf(cube, tmp_path_factory):
    return write_netcdf(cube, GRID, tmp_path_factory.mktemp("nc") / "pit.nc", "pit")


@pytest.fixture(scope="module")
def pyramid(cube, tmp_path_factory):
    return write_zarr(cube, GRID, tmp_path_factory.mktemp("v3") / "pit.zarr", "pit")


@pytest.fixture(scope="module")
def second(cube, tmp_path_factory):
    return write_zarr2(cube, GRID, tmp_path_factory.mktemp("v2") / "pit.v2.zarr", "pit")


def raw(opened, cube):
    """Every variable of the cube is there with its values, to the last bit."""
    for name, variable in cube.data_vars.items():
        assert opened[name].dtype == variable.dtype, name
        np.testing.assert_array_equal(opened[name].values, variable.values, err_msg=name)


# --- NetCDF -------------------------------------------------------------------------------------------------------------


def test_netcdf_holds_the_cubes_values(netcdf, cube):
    with netCDF4.Dataset(netcdf) as opened:
        opened.set_auto_maskandscale(False)
        for name, variable in cube.data_vars.items():
            np.testing.assert_array_equal(opened[name][:], variable.values, err_msg=name)
        assert list(opened["band_name"][:]) == list(BANDS)
        assert list(opened["year"][:]) == list(YEARS)
        assert opened["reflectance"].dimensions == ("time", "band", "y", "x")
    with xr.open_dataset(netcdf, mask_and_scale=False) as opened:
        raw(opened, cube)
        assert [str(t)[:10] for t in opened.time.values] == ["2019-07-02", "2021-07-02"]
        assert [[str(t)[:10] for t in pair] for pair in opened.time_bnds.values] == [
            ["2019-01-01", "2020-01-01"],
            ["2021-01-01", "2022-01-01"],
        ]


def test_netcdf_decodes_to_reflectance(netcdf, cube):
    with xr.open_dataset(netcdf) as opened:
        expected = np.where(cube.reflectance == 0, np.nan, cube.reflectance * 1e-4)
        np.testing.assert_allclose(opened.reflectance.values, expected, rtol=1e-6)
        assert np.isnan(opened.footprint.values[cube.footprint.values == 255]).all()
        # A year of no clear day is a count like any other.
        assert opened.clear_count.dtype == np.uint16


def test_netcdf_passes_the_cf_checker(netcdf, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from compliance_checker.runner import CheckSuite, ComplianceChecker

        CheckSuite.load_all_available_checkers()
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            ComplianceChecker.run_checker(
                str(netcdf),
                ["cf:1.11"],
                0,
                "normal",
                output_filename=str(tmp_path / "report.txt"),
                output_format="text",
            )
    report = (tmp_path / "report.txt").read_text()
    assert "cf:1.11" in report
    assert "Errors" not in report, report
    # What it warns of: bands stand between time and y, as in the cube; uint16, which CF allows since 1.9, it does not know.
    warned = [line for line in report.splitlines() if line.startswith("* ")]
    assert all(
        "reflectance's spatio-temporal dimensions" in w or "not of type byte, short, or int" in w
        for w in warned
    ), warned


def test_gdal_reads_netcdf_in_its_place(netcdf, cube):
    with rasterio.open(f"netcdf:{netcdf}:reflectance") as src:
        assert src.crs.to_epsg() == 32633
        assert src.transform == GRID.affine
        assert np.array_equal(src.read().reshape(cube.reflectance.shape), cube.reflectance.values)
        assert (src.nodata, src.scales[0]) == (0, 1e-4)
    with rasterio.open(f"netcdf:{netcdf}:footprint") as src:
        assert np.array_equal(src.read(), cube.footprint.values)
        assert src.nodata == 255
    with rasterio.open(f"netcdf:{netcdf}:footprint_fraction") as src:
        assert src.nodata == 255
    with rasterio.open(f"netcdf:{netcdf}:quality") as src:
        assert src.nodata != 0  # which is a quality like any other


# --- Zarr v3 ------------------------------------------------------------------------------------------------------------


def test_the_finest_level_is_the_cube(pyramid, cube):
    opened = xr.open_zarr(pyramid, group="0", consolidated=False)
    raw(opened, cube)
    assert list(opened.band.values) == list(BANDS)
    assert opened.rio.crs.to_epsg() == 32633
    assert opened.rio.transform() == GRID.affine
    assert zarr.open_group(pyramid, mode="r").metadata.zarr_format == 3


def test_the_conventions_own_package_finds_it_valid(pyramid):
    root = zarr.open_group(pyramid, mode="r")
    for group, names in (
        (root, {"multiscales", "proj", "spatial"}),
        (root["0"], {"proj", "spatial"}),
    ):
        attributes = dict(group.attrs)
        zarr_cm.validate_all(attributes)
        assert {c["name"] for c in attributes["zarr_conventions"]} == names
    zarr_cm.multiscales.validate_group_metadata(
        {"zarr_format": 3, "node_type": "group", "attributes": dict(root.attrs)}
    )
    with pytest.raises(ValueError, match="layout"):
        zarr_cm.validate_all({**root.attrs, "multiscales": {"layout": []}})


def test_each_level_lies_where_the_convention_says(pyramid):
    root = zarr.open_group(pyramid, mode="r")
    layout = root.attrs["multiscales"]["layout"]
    assert [level["asset"] for level in layout] == ["0", "1", "2"]
    for level, entry in enumerate(layout):
        opened = xr.open_zarr(pyramid, group=entry["asset"], consolidated=False)
        side = 10 * 2**level
        assert entry["transform"] == {"scale": [2**level] * 2, "translation": [0, 0]}
        assert (
            entry["spatial:shape"]
            == [-(-301 // 2**level), -(-530 // 2**level)]
            == list(opened.reflectance.shape[-2:])
        )
        assert (
            entry["spatial:transform"]
            == [side, 0, 399960, 0, -side, 5700000]
            == opened.attrs["spatial:transform"]
        )
        assert (float(opened.x[0]), float(opened.y[0])) == (399960 + side / 2, 5700000 - side / 2)
        assert opened.rio.transform() == Affine(side, 0, 399960, 0, -side, 5700000)


def blocks_of(plane, factor):
    """The pixels below each coarse pixel, those beyond the edge cut off."""
    rows, columns = (range(0, n, factor) for n in plane.shape)
    return [[plane[r : r + factor, c : c + factor] for c in columns] for r in rows]


@pytest.mark.parametrize("level", [1, 2])
def test_coarser_reflectance_is_the_mean_of_what_was_observed(pyramid, cube, level):
    opened = xr.open_zarr(pyramid, group=str(level), consolidated=False)
    assert opened.reflectance.dtype == np.uint16
    made = opened.reflectance.values
    for year, band in ((0, 0), (1, 9)):
        blocks = blocks_of(cube.reflectance.values[year, band].astype(float), 2**level)
        expected = np.array(
            [[b[b > 0].mean() if (b > 0).any() else 0 for b in row] for row in blocks]
        )
        assert (np.abs(made[year, band] - expected) <= 0.5 + 1e-9).all()
        assert ((made[year, band] == 0) == (expected == 0)).all()


def test_coarser_fractions_are_means_of_what_is_known(pyramid, cube):
    made = xr.open_zarr(pyramid, group="1", consolidated=False).footprint_fraction.values[0]
    blocks = blocks_of(cube.footprint_fraction.values[0].astype(float), 2)
    expected = np.array(
        [[b[b < 255].mean() if (b < 255).any() else 255 for b in row] for row in blocks]
    )
    assert (np.abs(made - expected) <= 0.5).all()
    assert (expected == 255).any()


def test_coarser_footprints_are_what_most_pixels_are(pyramid, cube):
    made = xr.open_zarr(pyramid, group="1", consolidated=False).footprint.values
    for year in range(len(YEARS)):
        for row, values in zip(blocks_of(cube.footprint.values[year], 2), made[year], strict=True):
            for block, value in zip(row, values, strict=True):
                counts = [(block == c).sum() for c in (0, 1)]
                allowed = {c for c in (0, 1) if counts[c] == max(counts)} if max(counts) else {255}
                assert value == min(allowed), (block, value)


def test_other_layers_take_a_value_that_is_there(pyramid, cube):
    opened = xr.open_zarr(pyramid, group="1", consolidated=False)
    assert opened.smad.dtype == np.float32
    for row, values in zip(blocks_of(cube.smad.values[0], 2), opened.smad.values[0], strict=True):
        for block, value in zip(row, values, strict=True):
            assert np.isin(value, block) or (np.isnan(value) and np.isnan(block).any())
    # The last row and column are of one pixel each, and take it.
    np.testing.assert_array_equal(
        opened.smad.values[:, -1, :-1], cube.smad.values[:, -1, 1::2][:, :-1]
    )


@settings(max_examples=15, deadline=None)  # writes files: what that takes is the disk's
@given(height=st.integers(1, 40), width=st.integers(257, 600))
def test_levels_halve_until_they_are_small(tmp_path_factory, height, width):
    grid = GeoBox((height, width), GRID.affine, "EPSG:32633")
    cube = xr.Dataset(
        {"footprint": (("year", "y", "x"), np.ones((1, height, width), np.uint8))},
        {"year": [2020], **xr_coords(grid)},
    )
    made = write_zarr(cube, grid, tmp_path_factory.mktemp("any") / "a.zarr", "a")
    sizes = [
        entry["spatial:shape"]
        for entry in zarr.open_group(made, mode="r").attrs["multiscales"]["layout"]
    ]
    assert max(sizes[-1]) <= 256 < max(sizes[-2])
    for (h1, w1), (h2, w2) in pairwise(sizes):
        assert 2 * h2 - h1 in (0, 1)
        assert 2 * w2 - w1 in (0, 1)


# --- GDAL -----------------------------------------------------------------------------------------------------------------


def test_gdal_3_10_reads_zarr_v2(second, cube):
    assert rasterio.__gdal_version__ < "3.13"
    with rasterio.open(f'ZARR:"{second}":/reflectance') as src:
        assert src.crs.to_epsg() == 32633
        assert src.transform == GRID.affine
        assert np.array_equal(src.read().reshape(cube.reflectance.shape), cube.reflectance.values)
        assert (src.nodata, src.scales[0]) == (0, 1e-4)
        assert src.tags(12)["DIM_band_VALUE"] == "B03"
        assert src.tags(12)["DIM_year_VALUE"] == "2021"
    for name in ("footprint", "footprint_fraction", "clear_count", "quality", "probability"):
        # GDAL 3.6, which is not at hand here, knows no other CRS than this; later ones read `grid_mapping`, too.
        own = zarr.open_group(second, mode="r")[name].attrs["_CRS"]
        assert rasterio.CRS.from_wkt(own["wkt"]).to_epsg() == 32633
        assert own["url"].endswith("/EPSG/0/32633")
        with rasterio.open(f'ZARR:"{second}":/{name}') as src:
            assert np.array_equal(src.read(), cube[name].values)
            assert src.crs.to_epsg() == 32633
            assert src.nodata == {
                "footprint": 255,
                "footprint_fraction": 255,
                "probability": 255,
            }.get(name)


def test_xarray_reads_zarr_v2(second, cube):
    opened = xr.open_zarr(second, mask_and_scale=False)  # consolidated
    raw(opened, cube)
    assert zarr.open_group(second, mode="r").metadata.zarr_format == 2
    assert (second / ".zmetadata").is_file()
    assert opened.rio.crs.to_epsg() == 32633


@pytest.fixture(scope="module")
def gdal():
    """The newest GDAL at hand, inside pyogrio's wheel, through its C interface: pyogrio itself reads vectors only."""
    found = list((Path(pyogrio.__file__).parents[1] / "pyogrio.libs").glob("libgdal*.so*"))
    if not found or pyogrio.__gdal_version__ < (3, 12):
        pytest.skip("pyogrio brings no GDAL 3.12 of its own")
    library = ctypes.CDLL(str(found[0]))
    library.GDALAllRegister()
    library.GDALOpenEx.restype = ctypes.c_void_p
    library.GDALOpenEx.argtypes = [ctypes.c_char_p, ctypes.c_uint, *[ctypes.c_void_p] * 3]
    library.GDALGetGeoTransform.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.GDALGetProjectionRef.argtypes = [ctypes.c_void_p]
    library.GDALGetProjectionRef.restype = ctypes.c_char_p
    library.GDALClose.argtypes = [ctypes.c_void_p]
    pointer, whole = ctypes.c_void_p, ctypes.c_int
    library.GDALDatasetRasterIO.argtypes = [
        pointer, *[whole] * 5, pointer, *[whole] * 4, pointer, *[whole] * 3,
    ]  # fmt: skip
    return library


@pytest.mark.parametrize(("level", "which"), [("0", "pyramid"), ("1", "pyramid"), (None, "second")])
def test_gdal_3_12_reads_both(gdal, request, cube, level, which):
    path = request.getfixturevalue(which)
    expected = xr.open_zarr(
        path, group=level, mask_and_scale=False, consolidated=level is None
    ).reflectance
    years, bands, height, width = expected.shape
    array = "/".join(["", *([level] if level else []), "reflectance"])
    opened = gdal.GDALOpenEx(f'ZARR:"{path}":{array}'.encode(), 2, None, None, None)
    assert opened
    try:
        pixels = np.zeros((years * bands, height, width), np.uint16)
        buffer = pixels.ctypes.data_as(ctypes.c_void_p)
        read = gdal.GDALDatasetRasterIO(
            opened, 0, 0, 0, width, height, buffer, width, height, 2, years * bands, None, 0, 0, 0
        )  # 2: GDT_UInt16
        assert read == 0
        np.testing.assert_array_equal(pixels.reshape(expected.shape), expected.values)
        place = (ctypes.c_double * 6)()
        assert gdal.GDALGetGeoTransform(opened, place) == 0
        side = 20 if level == "1" else 10
        assert list(place) == [399960, side, 0, 5700000, 0, -side]
        assert rasterio.CRS.from_wkt(gdal.GDALGetProjectionRef(opened).decode()).to_epsg() == 32633
    finally:
        gdal.GDALClose(opened)


# --- all ------------------------------------------------------------------------------------------------------------------


def test_licence_and_citation_stand_in_every_one(netcdf, pyramid, second):
    for opened in (
        xr.open_dataset(netcdf),
        xr.open_zarr(pyramid, group="0", consolidated=False),
        xr.open_zarr(pyramid, group="1", consolidated=False),
        xr.open_zarr(second),
    ):
        assert (
            "imagery: Copernicus Sentinel-2, European Space Agency, Copernicus Sentinel data terms"
            in opened.license
        )
        assert (
            "labels: EuroMineNet, CC-BY-4.0 (https://creativecommons.org/licenses/by/4.0/)"
            in opened.license
        )
        assert "model: model net, MIT" in opened.license
        assert opened.acknowledgement.startswith(
            "Contains modified Copernicus Sentinel data 2019-2021; EuroMineNet"
        )
        assert "https://doi.org/10.14278/rodare.4656" in opened.references
        assert (
            opened.history
            == "2019: build b2019, minecube 0.1.0; 2021: build b2021, minecube 0.1.0, 97.50% of its reads"
        )
        opened.close()
    assert "CC-BY-4.0" in zarr.open_group(pyramid, mode="r").attrs["license"]


@pytest.mark.parametrize("write", [write_netcdf, write_zarr, write_zarr2])
def test_a_second_export_takes_the_place_of_the_first(tmp_path, write):
    grid = GeoBox((30, 50), GRID.affine, "EPSG:32633")
    for seed in (1, 2):
        made = write(
            cube_on(grid, seed),
            grid,
            tmp_path / ("a.nc" if write is write_netcdf else "a.zarr"),
            "a",
        )
    if write is write_netcdf:
        opened = xr.open_dataset(made, mask_and_scale=False)
    else:
        opened = xr.open_zarr(
            made,
            group="0" if write is write_zarr else None,
            mask_and_scale=False,
            consolidated=False,
        )
    raw(opened, cube_on(grid, 2))
    opened.close()
    assert [p.name for p in tmp_path.iterdir()] == [made.name]


def test_an_export_that_fails_at_its_end_leaves_the_former(tmp_path, monkeypatch):
    grid = GeoBox((30, 50), GRID.affine, "EPSG:32633")
    write_zarr2(cube_on(grid, 1), grid, tmp_path / "a.zarr", "a")
    real = Path.replace

    def full(self, target):
        if target == tmp_path / "a.zarr":
            raise OSError(28, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(CubeError, match="No space left on device"):
        write_zarr2(cube_on(grid, 2), grid, tmp_path / "a.zarr", "a")
    raw(xr.open_zarr(tmp_path / "a.zarr", mask_and_scale=False), cube_on(grid, 1))
    assert [p.name for p in tmp_path.iterdir()] == ["a.zarr"]


def test_a_folder_that_is_no_zarr_is_left_alone(tmp_path):
    grid = GeoBox((30, 50), GRID.affine, "EPSG:32633")
    (tmp_path / "a.zarr").mkdir()
    (tmp_path / "a.zarr" / "thesis.tex").write_text("years of work")
    with pytest.raises(CubeError, match="expected a Zarr to replace, found something else"):
        write_zarr(cube_on(grid), grid, tmp_path / "a.zarr", "a")
    assert [p.name for p in tmp_path.rglob("*")] == ["a.zarr", "thesis.tex"]


def test_a_cube_of_another_grid_is_refused(tmp_path):
    grid = GeoBox((30, 50), GRID.affine, "EPSG:32633")
    for write in (write_netcdf, write_zarr, write_zarr2):
        with pytest.raises(CubeError, match="not the grid's pixel centres"):
            write(cube_on(grid.translate_pix(1, 0)), grid, tmp_path / "a.zarr", "a")
    assert list(tmp_path.iterdir()) == []


def test_the_collection_lists_whole_cubes_with_their_dimensions(tmp_path):
    grid = GeoBox((30, 50), GRID.affine, "EPSG:32633")
    cube = cube_on(grid).drop_attrs(deep=False)  # who knows nothing of builds can export, too
    cogs = write_cogs(cube, grid, tmp_path / "pit", "pit")
    whole = {
        "netcdf": write_netcdf(cube, grid, tmp_path / "pit" / "pit.nc", "pit"),
        "zarr": write_zarr(cube, grid, tmp_path / "pit" / "pit.zarr", "pit"),
        "zarr2": write_zarr2(cube, grid, tmp_path / "pit" / "pit.v2.zarr", "pit"),
    }
    items = write_items(tmp_path, cogs, title="t")
    assets = {key: make_asset(key, path, tmp_path) for key, path in whole.items()}
    collection = pystac.Collection.from_file(
        str(write_stac(tmp_path, items, assets, title="t", description="a"))
    )
    for key, path in whole.items():
        asset = collection.assets[key]
        assert Path(asset.get_absolute_href()) == path
        assert asset.extra_fields["cube:dimensions"]["band"]["values"] == list(BANDS)
        time = "time" if key == "netcdf" else "year"
        assert asset.extra_fields["cube:dimensions"][time]["extent"] == [
            "2019-01-01T00:00:00Z",
            "2021-12-31T23:59:59Z",
        ]
        if time == "time":
            with xr.open_dataset(path) as opened:
                middles = [f"{moment}Z" for moment in opened.time.values.astype("datetime64[s]")]
            assert asset.extra_fields["cube:dimensions"]["time"]["values"] == middles
        assert asset.extra_fields["cube:variables"]["reflectance"]["dimensions"] == [
            time,
            "band",
            "y",
            "x",
        ]
        assert ("file:checksum" in asset.extra_fields) == path.is_file()
