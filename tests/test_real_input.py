"""The main job on products that no one here made, against plain numpy on the source arrays, exactly."""

from __future__ import annotations

import json
from pathlib import Path

import geopandas as gpd
import numpy as np
import pystac
import pytest
import rasterio
import stac_geoparquet.arrow
import xarray as xr
import yaml
from click.testing import CliRunner
from shapely.geometry import box

from known_scenes import grid_at, to_lonlat, write_tif
from minecube.catalog import BANDS
from minecube.cli import cli

CATALOG = Path(__file__).parents[1] / "catalog"
HIDDEN = (3, 8, 9, 10)
"""SCL classes that the recipes of these tests mask; 8 and 9 are the worst."""


def build(folder, items, outline, epsg, year, bands, assets, resolution=None, recipe=None):
    """`minecube build` over a folder with its own catalogue, as a user would lay it out; the opened cube.

    The recipe's bands and blocks are those of the test; by default it is a plain mask and the median.
    """
    table = stac_geoparquet.arrow.parse_stac_items_to_arrow(
        [i.to_dict(transform_hrefs=False) for i in items]
    )
    stac_geoparquet.arrow.to_parquet(table, folder / "items.parquet")
    source = {"title": "t", "kind": "stac-geoparquet", "href": "items.parquet", "assets": assets}
    source["collection"] = items[0].collection_id or "c"
    source["offset"] = {"applied_flag": "earthsearch:boa_offset_applied"}
    recipe = recipe or {"title": "t", "mask": [{"classes": list(HIDDEN)}]}
    recipe = recipe | {"bands": bands, "block_px": 32, "chunk_px": 16}
    (folder / "sources.yaml").write_text(
        yaml.safe_dump({"real": source | ({"resolution_m": resolution} if resolution else {})})
    )
    (folder / "recipes.yaml").write_text(yaml.safe_dump({"plain": recipe}))
    lonlat = gpd.GeoSeries([outline], crs=epsg).to_crs(4326)
    gpd.GeoDataFrame({"id": ["real"], "margin": [0]}, geometry=lonlat, crs=4326).to_file(
        folder / "sites.gpkg"
    )
    arguments = [
        "build",
        "--sites",
        folder / "sites.gpkg",
        "--catalog",
        folder,
        "--source",
        "real",
        "--recipe",
        "plain",
    ]
    arguments += ["--years", year, "--store", folder / "cubes.zarr"]
    done = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    return (
        xr.open_zarr(folder / "cubes.zarr", group="real", consolidated=False).sel(year=year).load()
    )


def composite_by_numpy(stack, scl):
    """Medians, clear counts and quality of [day, band, y, x] and [day, y, x]; nothing grown, nothing at an edge."""
    observed = (scl != 0) & (stack != 0).all(axis=1)
    rank = np.where(~np.isin(scl, HIDDEN), 1, np.where(np.isin(scl, (8, 9)), 4, 3))
    rank = np.where(observed, rank, 255)
    best = rank.min(axis=0)
    chosen = np.where(((rank == best) & observed)[:, None], stack.astype(float), np.nan)
    return np.rint(np.nanmedian(chosen, axis=0)), (rank == 1).sum(axis=0), best


@pytest.fixture(scope="module")
def april(real_data, tmp_path_factory):
    """openEO's NetCDF of April 2023 as items: twelve dates of which two are clear; all bands at 10 m, SCL too."""
    folder = tmp_path_factory.mktemp("april")
    with xr.open_dataset(
        real_data / "gfmap_s2l2a" / "cdse_sentinel2_l2a.nc", mask_and_scale=False
    ) as data:
        arrays = {
            b: data[f"S2-L2A-{b}"].values.astype(np.uint16)
            for b in ("B01", "B04", "B08", "B11", "SCL")
        }
        blue = arrays.pop("B01")
        times = data.t.values.astype("datetime64[D]").astype(str)
        left, top = float(data.x[0]) - 5, float(data.y[0]) + 5
        wkt = data.crs.attrs.get("crs_wkt", data.crs.attrs.get("spatial_ref"))
    epsg = rasterio.crs.CRS.from_wkt(wkt).to_epsg()
    assert epsg == 32631
    # The file has no B02: the other blue band takes its place.
    arrays = {b: np.where(a == 65535, 0, a) for b, a in (arrays | {"B02": blue}).items()}
    grid = grid_at(left, top, 64, 66, epsg)
    items = []
    for t, day in enumerate(times):
        stamp = day.replace("-", "") + "T105031"
        assets = {}
        for band, pixels in arrays.items():
            path = write_tif(
                folder / day / f"{band}.tif",
                pixels[t],
                grid,
                driver="COG",
                tiled=None,
                blockxsize=None,
                blockysize=None,
            )
            assets[band] = pystac.Asset(str(path))
        items.append(
            pystac.Item(
                id=f"gfmap_{day}",
                geometry=to_lonlat(box(*grid.boundingbox), epsg).__geo_interface__,
                bbox=list(to_lonlat(box(*grid.boundingbox), epsg).bounds),
                datetime=np.datetime64(f"{day}T10:50:31").astype(object),
                properties={
                    "proj:code": f"EPSG:{epsg}",
                    "grid:code": "MGRS-31UFS",
                    "processing:version": "02.14",  # openEO has removed the offset
                    "eopf:datatake_id": f"GS2A_{stamp}_000001_N02.14",
                    "eopf:datastrip_id": f"S2A_OPER_MSI_L2A_DS_X_{stamp}_S{stamp}_N02.14",
                },
                assets=assets,
            )
        )
    # 48 x 54 pixels inside the data, on multiples of 60 m.
    outline = box(left + 63, top - 597, left + 537, top - 63)
    inside = (..., slice(6, 60), slice(6, 54))
    stack = np.stack([arrays[b] for b in ("B02", "B04", "B08", "B11")], axis=1)[inside]
    job = (
        items,
        outline,
        epsg,
        2023,
        ["B02", "B04", "B08", "B11"],
        {b: b for b in arrays},
        dict.fromkeys(arrays, 10),
    )
    return job, stack, arrays["SCL"][inside], times.tolist()


def test_openeos_netcdf_of_april_2023(april, tmp_path):
    """65535 is nodata, though no attribute says so."""
    job, stack, scl, _ = april
    made = build(tmp_path, *job)
    values, count, quality = composite_by_numpy(stack, scl)
    assert made.reflectance.shape == (4, 54, 48)
    np.testing.assert_array_equal(made.reflectance, values)
    np.testing.assert_array_equal(made.clear_count, count)
    np.testing.assert_array_equal(made.quality, quality)
    assert count.max() >= 2


@pytest.mark.parametrize("name", ["annual-median", "annual-geomedian", "summer-bap"])
def test_the_shipped_recipes_on_april_2023(april, tmp_path, name):
    """Ten dates of cloud leave no trace: each pixel lies between its values on the two clear dates, and 2 % beyond."""
    job, stack, _, days = april
    recipe = yaml.safe_load((CATALOG / "recipes.yaml").read_text())[name]
    if 4 not in recipe["months"]:
        recipe |= {"months": [4], "wider_months": [5]}
    made = build(tmp_path, *job, recipe=recipe)
    clear = stack[[days.index("2023-04-05"), days.index("2023-04-15")]].astype(float)
    ours = made.reflectance.values
    assert ((ours >= 0.98 * clear.min(axis=0)) & (ours <= 1.02 * clear.max(axis=0))).all()
    assert (
        made.quality == 1
    ).mean() > 0.99  # on few pixels SCL calls one date cirrus, and leaves the other unclassified


def test_one_real_earth_search_scene(real_data, tmp_path):
    """The item says 10 and 20 m, its files are 100 and 200 m: the file is right, and its pixels are repeated."""
    folder = real_data / "earthsearch_scene_29RKH_20200219"
    item = pystac.Item.from_dict(
        json.loads((folder / "S2A_29RKH_20200219_0_L2A.json").read_text()), migrate=False
    )
    item.links = []
    with open(folder / "S2A_29RKH_20200219_0_L2A.json") as text:  # noqa: PTH123
        hrefs = {k: a["href"].rpartition("/")[2] for k, a in json.load(text)["assets"].items()}
    item.assets = {k: a for k, a in item.assets.items() if (folder / hrefs[k]).exists()}
    for key, asset in item.assets.items():
        asset.href = str(folder / hrefs[key])
    common = (
        "blue",
        "green",
        "red",
        "rededge1",
        "rededge2",
        "rededge3",
        "nir",
        "nir08",
        "swir16",
        "swir22",
    )
    assets = {**dict(zip(BANDS, common, strict=True)), "SCL": "scl"}
    left, top, width, height = 240000, 2760000, 300, 240
    outline = box(left + 3, top - 10 * height + 3, left + 10 * width - 3, top - 3)
    made = build(tmp_path, [item], outline, 32629, 2020, list(BANDS), assets)

    def pixels(key):
        with rasterio.open(item.assets[key].href) as src:
            values, size = src.read(1), src.transform.a
            rows = ((src.transform.f - (top - 5 - 10 * np.arange(height))) // size).astype(int)
            columns = ((left + 5 + 10 * np.arange(width) - src.transform.c) // size).astype(int)
        return values[np.ix_(rows, columns)]

    values, count, quality = composite_by_numpy(
        np.stack([pixels(k) for k in common])[None], pixels("scl")[None]
    )
    np.testing.assert_array_equal(made.reflectance, values)
    np.testing.assert_array_equal(made.clear_count, count)
    np.testing.assert_array_equal(made.quality, quality)
    assert made.attrs["proj:code"] == "EPSG:32629"


def test_the_outline_may_lie_where_the_scene_is_not(real_data, tmp_path):
    """A site half beside the scene: what is beside is empty, what is inside is not."""
    folder = real_data / "earthsearch_scene_29RKH_20200219"
    item = pystac.Item.from_dict(
        json.loads((folder / "S2A_29RKH_20200219_0_L2A.json").read_text()), migrate=False
    )
    item.links = []
    item.assets = {k: item.assets[k] for k in ("red", "scl")}
    item.assets["red"].href, item.assets["scl"].href = (
        str(folder / "B04.tif"),
        str(folder / "SCL.tif"),
    )
    outline = box(199980 - 1197, 2760000 - 1197, 199980 + 1197, 2760000 - 3)
    made = build(tmp_path, [item], outline, 32629, 2020, ["B04"], {"B04": "red", "SCL": "scl"})
    seen = (made.reflectance.values > 0).any(axis=0)
    edge = round((199980 - float(made.x[0]) + 5) / 10)
    assert not seen[:, : edge + 2].any()  # beside, and the outermost 20 m pixel
    assert seen[:, edge + 2 :].all()
