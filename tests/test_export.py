"""Exports as other tools see them: GDAL, rio-cogeo, odc-stac, geopandas, pystac with the official schemas."""

from __future__ import annotations

import hashlib
import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree

import geopandas as gpd
import numpy as np
import odc.stac
import pyarrow.parquet as pq
import pyogrio
import pystac
import pystac.validation
import pytest
import rasterio
import rioxarray
import shapely
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox
from odc.geo.xr import xr_coords
from pyproj import Transformer
from pystac.extensions.datacube import DatacubeExtension
from pystac.validation.stac_validator import JsonSchemaSTACValidator
from rio_cogeo import cog_validate
from stac_geoparquet.arrow import stac_table_to_items

from minecube.catalog import BANDS
from minecube.errors import CubeError
from minecube.export import (
    make_asset,
    write_cogs,
    write_footprints,
    write_items,
    write_stac,
)
from minecube.export.layers import SPECTRUM

GRID = GeoBox((700, 1100), Affine(10, 0, 399960, 0, -10, 5700000), "EPSG:32633")
SMALL = GeoBox((40, 60), GRID.affine, "EPSG:32633")
SCHEMAS = Path(__file__).parent / "schemas"
BUILDS = {
    year: {
        "build_id": f"{year}abc",
        "committed": "2026-01-02T03:04:05+00:00",
        "version": "0.1.0",
        "libraries": {"numpy": "2.4.6"},
        "recipe": {"title": "Median"},
        "scenes": [{"id": f"scene_{n}", "baseline": "05.00"} for n in range(3)],
    }
    for year in (2020, 2021)
}
BUILDS[2021]["reads"] = {"completeness": 0.975}
# Written by hand from the README of stac-extensions/label v1.0.1 and of stac-extensions/processing v1.2.0: no package holds
# the official schemas.
LABEL = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "required": ["type", "links", "assets"],
    "properties": {
        "properties": {
            "required": ["label:properties", "label:description", "label:type", "label:classes"],
            "properties": {
                "label:type": {"enum": ["raster", "vector"]},
                "label:properties": {"type": "null"},  # of rasters
                "label:classes": {
                    "items": {
                        "required": ["name", "classes"],
                        "properties": {"name": {"type": "null"}},
                    },
                    "minItems": 1,
                },
                "label:description": {"type": "string", "minLength": 1},
                "label:tasks": {
                    "items": {"enum": ["regression", "classification", "detection", "segmentation"]}
                },
                "label:overviews": {
                    "items": {
                        "properties": {
                            "counts": {
                                "items": {
                                    "properties": {
                                        "name": {"type": "string"},
                                        "count": {"type": "integer"},
                                    }
                                }
                            }
                        }
                    }
                },
            },
            "propertyNames": {
                "pattern": "^(?!label:)|^label:(type|properties|classes|description|tasks|methods|overviews)$"
            },
        },
        "links": {
            "contains": {"properties": {"rel": {"const": "source"}}, "required": ["label:assets"]}
        },
    },
}
PROCESSING = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "properties": {
        "properties": {
            "properties": {
                "processing:level": {"pattern": "^(RAW|L[0-4][A-C]?)$"},
                "processing:lineage": {"type": "string"},
                "processing:datetime": {
                    "type": "string",
                    "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(Z|\+00:00)$",
                },
                "processing:software": {
                    "type": "object",
                    "additionalProperties": {"type": "string"},
                },
            },
            "propertyNames": {
                "pattern": "^(?!processing:)|^processing:(expression|lineage|level|facility|version|software|datetime)$"
            },
        },
        "providers": {"contains": {"required": ["processing:software", "roles"]}},
    },
}


def cube_on(grid, years=(2020, 2021), probability=False):
    height, width = grid.shape
    rng = np.random.default_rng(0)
    reflectance = rng.integers(0, 65535, (len(years), len(BANDS), height, width), dtype=np.uint16)
    footprint = rng.choice(np.array([0, 1, 255], np.uint8), (len(years), height, width))
    coords = {"year": list(years), "band": list(BANDS), **xr_coords(grid)}
    cube = xr.Dataset(
        {
            "reflectance": (("year", "band", "y", "x"), reflectance),
            "footprint": (("year", "y", "x"), footprint),
        },
        coords,
    )
    return cube.assign(probability=cube.footprint // 2) if probability else cube


def footprints():
    shapes = [shapely.box(399960 + 10 * n, 5699000, 400960, 5700000) for n in range(2)]
    columns = {"site": ["pit"] * 2, "year": [2020, 2021], "area_m2": [1e6, 99e4]}
    return gpd.GeoDataFrame(columns, geometry=shapes, crs="EPSG:32633")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    out = tmp_path_factory.mktemp("export")
    cube = cube_on(GRID, probability=True).assign_attrs(builds=BUILDS)
    cube.footprint.attrs["origin"] = "EuroMineNet (CC BY 4.0)"
    cube.probability.attrs["model"] = {"id": "unet-small", "licence": "Apache-2.0"}
    cogs = write_cogs(cube, GRID, out / "pit", "pit")
    write_footprints(footprints(), out / "footprints.parquet")
    items = write_items(out, cogs, title="Three pits")
    assets = {"truth": make_asset("truth", out / "footprints.parquet", out)}
    write_stac(out, items, assets, title="Three pits", description="A test.")
    return out, cube, cogs


# --- COGs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "tile", "overviews"),
    [((48, 48), 48, []), ((50, 40), 64, []), ((512, 300), 512, []), ((520, 300), 512, [2])],
)
def test_an_image_that_fits_into_one_tile_fills_it(tmp_path, shape, tile, overviews):
    """The sides of TIFF's tiles are multiples of 16."""
    grid = GeoBox(shape, GRID.affine, GRID.crs)
    cube = cube_on(grid, [2020])[["reflectance"]]
    (path,) = write_cogs(cube, grid, tmp_path, "pit")
    assert cog_validate(path, strict=True) == (True, [], [])
    with rasterio.open(path) as src:
        assert set(src.block_shapes) == {(tile, tile)}
        assert src.overviews(1) == overviews
        assert np.array_equal(src.read(), cube.reflectance.sel(year=2020).values)


def test_every_cog_is_one_and_holds_the_cubes_values(exported):
    _, cube, cogs = exported
    names = [
        f"pit_{y}_{v}.tif"
        for y in (2020, 2021)
        for v in ("reflectance", "footprint", "probability")
    ]
    assert [c.name for c in cogs] == names
    for path in cogs:
        valid, errors, warnings = cog_validate(path, strict=True)
        assert (valid, errors, warnings) == (True, [], [])
        _, year, variable = path.stem.split("_")
        with rasterio.open(path) as src:
            assert np.array_equal(src.read().squeeze(), cube[variable].sel(year=int(year)).values)
            assert src.overviews(1) == [2, 4]
            assert src.nodata == (0 if variable == "reflectance" else 255)


def test_a_cog_lies_where_the_grid_lies(exported):
    _, cube, cogs = exported
    with rasterio.open(cogs[0]) as src:
        assert src.crs.to_epsg() == 32633
        assert src.xy(0, 0) == (399965, 5699995)  # centre of the first pixel
        assert tuple(src.bounds) == (399960, 5700000 - 7000, 399960 + 11000, 5700000)
        sampled = next(src.sample([(410955, 5693005)]))
        assert src.descriptions == BANDS
        assert src.scales == (1e-4,) * 10
        assert src.profile["compress"] == "deflate"
        assert src.tags(ns="IMAGE_STRUCTURE")["PREDICTOR"] == "2"

    assert np.array_equal(sampled, cube.reflectance.sel(year=2020, x=410955, y=5693005).values)


def test_footprint_overviews_hold_classes_only(exported):
    with rasterio.open(exported[2][1]) as src:
        assert set(np.unique(src.read(1, out_shape=(175, 275)))) <= {0, 1, 255}


def test_reflectance_overviews_are_means_of_what_was_observed(tmp_path):
    """One pixel of four is seen: an average over nodata would be a quarter of it."""
    cube = cube_on(GRID, [2020])[["reflectance"]]
    cube.reflectance[:] = 0
    cube.reflectance[:, :, ::2, 1::2] = 4000
    (path,) = write_cogs(cube, GRID, tmp_path, "pit")
    with rasterio.open(path) as src:
        for factor in src.overviews(1):
            assert (src.read(out_shape=(10, 700 // factor, 1100 // factor)) == 4000).all()


def test_overviews_of_probabilities_keep_zeros(tmp_path):
    """Zeros are valid: 255 is no data. Three of four pixels are unknown."""
    cube = cube_on(GRID, [2020], probability=True)[["probability"]]
    cube.probability[:] = 255
    cube.probability[:, ::2, 1::2] = 0
    (path,) = write_cogs(cube, GRID, tmp_path, "pit")
    with rasterio.open(path) as src:
        assert src.overviews(1) == [2, 4]
        for factor in src.overviews(1):
            assert (src.read(1, out_shape=(700 // factor, 1100 // factor)) == 0).all()


def test_years_without_a_value_and_variables_without_a_place_get_no_file(tmp_path):
    cube = cube_on(SMALL)
    cube.reflectance.loc[{"year": 2021}] = 0
    cube.footprint[:] = 255
    assert [p.name for p in write_cogs(cube, SMALL, tmp_path, "pit")] == [
        "pit_2020_reflectance.tif"
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["pit_2020_reflectance.tif"]


def test_the_same_cube_gives_the_same_bytes(tmp_path):
    first, second = (write_cogs(cube_on(SMALL), SMALL, tmp_path / n, "pit") for n in "ab")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


def test_a_cube_of_another_grid_is_refused(tmp_path):
    shifted = SMALL.translate_pix(0.5, 0)
    for cube in (cube_on(shifted), cube_on(GRID), cube_on(SMALL).isel(y=slice(None, None, -1))):
        with pytest.raises(CubeError, match="not the grid's pixel centres"):
            write_cogs(cube, SMALL, tmp_path, "pit")
    assert list(tmp_path.iterdir()) == []


# --- tables -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["f.parquet", "f.gpkg"])
@pytest.mark.parametrize("rows", [2, 0])
def test_tables_come_back_whole(tmp_path, name, rows):
    path = tmp_path / name
    write_footprints(footprints()[:rows], path)
    if name == "f.parquet":
        back = gpd.read_parquet(path)
    else:
        assert pyogrio.list_layers(path)[0][0] == "footprints"
        back = gpd.read_file(path)
    assert back.crs.to_epsg() == 32633
    assert back[["site", "year", "area_m2"]].to_dict("list") == footprints()[:rows][
        ["site", "year", "area_m2"]
    ].to_dict("list")
    assert shapely.equals(back.geometry.values, footprints().geometry.values[:rows]).all()
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_other_suffixes_are_refused(tmp_path):
    with pytest.raises(CubeError, match=r"\.parquet or \.gpkg, found '\.csv'"):
        write_footprints(footprints(), tmp_path / "f.csv")


# --- STAC ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def validator(monkeypatch):
    """pystac's validator with the extensions' official schemas from `tests/schemas`; the network is blocked."""
    own = JsonSchemaSTACValidator()
    for name, schema in {"label/v1.0.1": LABEL, "processing/v1.2.0": PROCESSING}.items():
        own.schema_cache[f"https://stac-extensions.github.io/{name}/schema.json"] = schema
    own.schema_cache["https://proj.org/schemas/v0.4/projjson.schema.json"] = json.loads(
        (SCHEMAS / "projjson_v0.4.json").read_text()
    )
    for path in set(SCHEMAS.glob("*.json")) - set(SCHEMAS.glob("projjson*")):
        name, version = path.stem.split("_")
        own.schema_cache[f"https://stac-extensions.github.io/{name}/{version}/schema.json"] = (
            json.loads(path.read_text())
        )
    monkeypatch.setattr(pystac.validation.RegisteredValidator, "_validator", own)
    return own


def test_the_collection_validates_with_every_extension_it_names(exported, validator, tmp_path):
    moved = shutil.copytree(
        exported[0], tmp_path / "elsewhere"
    )  # relative links: the folder can go anywhere
    collection = pystac.Collection.from_file(str(moved / "collection.json"))
    assert collection.validate_all() == 2
    items = sorted(collection.get_items(), key=lambda i: i.id)
    assert [i.id for i in items] == ["pit_2020", "pit_2021"]
    named = set(collection.stac_extensions).union(*(i.stac_extensions for i in items))
    assert named <= set(validator.schema_cache)
    for asset in (*items[0].assets.values(), *collection.assets.values()):
        assert Path(asset.get_absolute_href()).is_relative_to(moved)
        assert Path(asset.get_absolute_href()).exists()
    text = (moved / "collection.json").read_text() + "".join(
        p.read_text() for p in moved.glob("pit/*.json")
    )
    assert str(exported[0]) not in text


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        (("properties", "proj:code"), 32633),
        (("properties", "proj:shape"), [1]),
        (("assets", "reflectance", "raster:bands"), [{"data_type": "u2"}]),
        (("assets", "reflectance", "eo:bands"), [{"name": "B02", "common_name": "bleu"}]),
        (("assets", "reflectance", "file:checksum"), "XYZ"),
        (("properties", "end_datetime"), None),
        (("properties", "cube:dimensions", "x", "extent"), [1]),
        (("properties", "cube:variables", "reflectance", "dimensions"), None),
        (("properties", "label:classes"), [{"name": "mine"}]),
        (("properties", "label:type"), "picture"),
        (("properties", "processing:level"), "5"),
        (("properties", "processing:software"), {"numpy": 2}),
        (("links",), []),
    ],
)
def test_the_schemas_would_notice(exported, validator, place, wrong):
    item = json.loads((exported[0] / "pit" / "pit_2020.json").read_text())
    inner = item
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = wrong
    with pytest.raises(pystac.STACValidationError):
        validator.validate(item, "Feature", "1.1.0", item["stac_extensions"])


def test_items_say_where_when_and_what(exported):
    out, _, cogs = exported
    item = pystac.Item.from_file(str(out / "pit" / "pit_2020.json"))
    assert item.datetime == datetime(2020, 7, 2, tzinfo=UTC)  # 183 of 366 days
    assert item.properties["datetime"] == "2020-07-02T00:00:00Z"
    later = pystac.Item.from_file(str(out / "pit" / "pit_2021.json"))
    assert later.properties["datetime"] == "2021-07-02T12:00:00Z"  # 182.5 of 365 days
    table = gpd.read_parquet(out / "items.parquet").set_index("id")
    assert table.loc["pit_2021", "datetime"] == later.datetime
    assert item.get_collection().id == item.get_root().id == item.get_parent().id == "three-pits"
    assert (item.properties["start_datetime"], item.properties["end_datetime"]) == (
        "2020-01-01T00:00:00Z",
        "2020-12-31T23:59:59Z",
    )
    assert item.properties["proj:code"] == "EPSG:32633"
    assert item.properties["proj:shape"] == [700, 1100]
    assert item.properties["proj:transform"] == [10, 0, 399960, 0, -10, 5700000]
    lon, lat = Transformer.from_crs(32633, 4326, always_xy=True).transform(
        [399960, 410960] * 2, [5700000] * 2 + [5693000] * 2
    )
    assert item.bbox == pytest.approx([min(lon), min(lat), max(lon), max(lat)], abs=1e-4)
    assert shapely.equals_exact(
        shapely.normalize(shapely.geometry.shape(item.geometry)),
        shapely.normalize(shapely.convex_hull(shapely.multipoints(np.column_stack([lon, lat])))),
        tolerance=1e-6,
    )
    asset = item.assets["reflectance"].to_dict()
    assert asset["file:size"] == cogs[0].stat().st_size
    assert asset["file:checksum"] == "1220" + hashlib.sha256(cogs[0].read_bytes()).hexdigest()
    assert [b["name"] for b in asset["eo:bands"]] == list(BANDS)
    assert asset["raster:bands"][0] == {
        "data_type": "uint16",
        "nodata": 0,
        "scale": 1e-4,
        "spatial_resolution": 10,
    }


@pytest.mark.parametrize("year", [2020, 2021])
def test_items_say_what_the_pixels_were_made_of(exported, year):
    item = pystac.Item.from_file(str(exported[0] / "pit" / f"pit_{year}.json"))
    said = item.properties
    assert said["minecube:read_completeness"] == (0.975 if year == 2021 else 1)
    assert said["processing:software"] == {"minecube": "0.1.0", "numpy": "2.4.6"}
    assert said["processing:lineage"] == "Median, from 3 scenes of processing baselines 05.00"
    assert (said["minecube:build_id"], said["minecube:scenes"]) == (
        f"{year}abc",
        ["scene_0", "scene_1", "scene_2"],
    )


def test_items_are_labels_with_the_pixels_of_each_class_counted(exported):
    out, cube, _ = exported
    item = pystac.Item.from_file(
        str(out / "pit" / "pit_2020.json")
    )  # pystac's own label module warns on import
    values = cube.footprint.sel(year=2020).values
    (overview,) = item.properties["label:overviews"]
    counted = {c["name"]: c["count"] for c in overview["counts"]}
    assert counted == {
        "not mine": (values == 0).sum(),
        "mine": (values == 1).sum(),
        "unknown": (values == 255).sum(),
    }
    assert item.properties["label:type"] == "raster"
    assert item.properties["label:classes"] == [{"name": None, "classes": ["not mine", "mine"]}]
    assert item.properties["label:description"].endswith("from EuroMineNet (CC-BY-4.0)")
    (source,) = item.get_links("source")
    assert source.extra_fields["label:assets"] == ["reflectance"]
    assert Path(source.get_absolute_href()) == out / "pit" / "pit_2020.json"


def test_items_have_the_cubes_dimensions(exported):
    out, cube, _ = exported
    item = DatacubeExtension.ext(pystac.Item.from_file(str(out / "pit" / "pit_2020.json")))
    for axis in ("x", "y"):
        assert item.dimensions[axis].extent == [float(cube[axis].min()), float(cube[axis].max())]
        assert item.dimensions[axis].reference_system == 32633
    assert item.dimensions["bands"].values == list(BANDS)
    assert {n: v.dimensions for n, v in item.variables.items()} == {
        "reflectance": ["bands", "y", "x"],
        "footprint": ["y", "x"],
        "probability": ["y", "x"],
    }


def test_the_table_of_items_is_the_items(exported):
    out = exported[0]
    table = gpd.read_parquet(out / "items.parquet")
    assert list(table["id"]) == ["pit_2020", "pit_2021"]
    assert table.crs.to_epsg() == 4326
    back = list(stac_table_to_items(pq.read_table(out / "items.parquet")))
    for dictionary in back:
        item, own = (
            pystac.Item.from_dict(dictionary),
            pystac.Item.from_file(str(out / "pit" / f"{dictionary['id']}.json")),
        )
        assert shapely.equals_exact(
            shapely.geometry.shape(item.geometry), shapely.geometry.shape(own.geometry), 1e-9
        )
        assert {k: (out / a.href).resolve() for k, a in item.assets.items()} == {
            k: Path(a.get_absolute_href()) for k, a in own.assets.items()
        }
        assert item.properties["cube:variables"]["reflectance"]["dimensions"] == ["bands", "y", "x"]
        assert (
            item.assets["reflectance"].extra_fields["file:checksum"]
            == own.assets["reflectance"].extra_fields["file:checksum"]
        )


def test_band_names_and_wavelengths_are_those_of_real_products(real_data):
    item = json.loads(
        (
            real_data / "stac_items" / "earthsearch_c1" / "S2B_T24MUA_20250731T130245_L2A.json"
        ).read_text()
    )
    theirs = {
        b["name"]: b["common_name"] for a in item["assets"].values() for b in a.get("eo:bands", [])
    }
    assert {b: SPECTRUM[b][0] for b in BANDS} == {b: theirs[b] for b in BANDS}
    (product,) = real_data.glob("safe_metadata/S2A_MSIL2A_2023*/MTD_MSIL2A.xml")
    bands = ElementTree.parse(product).iter("Spectral_Information")
    centres = {b.get("physicalBand"): float(b.findtext("Wavelength/CENTRAL")) / 1000 for b in bands}
    for band in BANDS:
        assert SPECTRUM[band][1] == pytest.approx(centres[band.replace("B0", "B")], abs=1e-9), band


def test_an_index_of_an_image_that_is_opened_scaled_is_not_scaled_again(exported, tmp_path):
    """As docs/formats.md advises, since xarray keeps attributes through arithmetic."""
    _, cube, cogs = exported
    (image,) = (path for path in cogs if path.name == "pit_2020_reflectance.tif")
    red, nir = (
        cube.reflectance.sel(year=2020, band=band).values.astype(float) for band in ("B04", "B08")
    )
    with np.errstate(invalid="ignore"):
        expected = np.where((red == 0) | (nir == 0), np.nan, (nir - red) / (nir + red))
    scaled = rioxarray.open_rasterio(image, mask_and_scale=True)
    red, nir = (scaled[scaled.long_name.index(band)].astype("float64") for band in ("B04", "B08"))
    ((nir - red) / (nir + red)).rename("ndvi").to_netcdf(tmp_path / "ndvi.nc")
    with xr.open_dataset(tmp_path / "ndvi.nc") as opened:
        np.testing.assert_allclose(opened.ndvi.values, expected, rtol=0, atol=1e-6)


def test_odc_stac_loads_the_cube_back_from_the_collection(exported):
    out, cube, _ = exported
    items = list(pystac.Collection.from_file(str(out / "collection.json")).get_items())
    loaded = odc.stac.load(items, bands=["B04", "B12"], groupby="id")
    for band in ("B04", "B12"):
        assert np.array_equal(loaded[band].values, cube.reflectance.sel(band=band).values)
    assert loaded.odc.geobox == GRID


def test_the_collection_carries_extent_licence_and_attribution(exported):
    collection = pystac.Collection.from_file(str(exported[0] / "collection.json"))
    assert collection.id == "three-pits"
    assert [d.year for d in collection.extent.temporal.intervals[0]] == [2020, 2021]
    assert collection.license == "other"
    assert collection.get_single_link("license").href.startswith("https://sentinels.copernicus.eu/")
    assert "Contains modified Copernicus Sentinel data 2020-2021." in collection.description
    assert collection.providers[0].roles == ["producer", "licensor"]
    assert collection.assets["truth"].media_type == "application/vnd.apache.parquet"


def test_licence_and_citation_of_every_input_travel(exported):
    out, _, cogs = exported
    collection = pystac.Collection.from_file(str(out / "collection.json"))
    assert {link.href for link in collection.get_links("license")} == {
        "https://sentinels.copernicus.eu/documents/247904/690755/Sentinel_Data_Legal_Notice",
        "https://creativecommons.org/licenses/by/4.0/",
    }
    assert [p["doi"] for p in collection.extra_fields["sci:publications"]] == [
        "10.14278/rodare.4656",
        "10.48550/arXiv.2510.14661",
    ]
    assert {link.href for link in collection.get_links("cite-as")} == {
        "https://doi.org/10.14278/rodare.4656",
        "https://doi.org/10.48550/arXiv.2510.14661",
    }
    assert [p.name for p in collection.providers][1:3] == ["EuroMineNet", "model unet-small"]
    said = {}
    for path in cogs[:3]:
        with rasterio.open(path) as src:
            said[path.stem.split("_")[2]] = src.tags()["TIFFTAG_COPYRIGHT"]
    assert said["reflectance"].startswith(
        "Contains modified Copernicus Sentinel data 2020. imagery: Copernicus Sentinel-2"
    )
    assert "EuroMineNet" not in said["reflectance"]
    assert "CC-BY-4.0" in said["footprint"]
    assert "arXiv:2510.14661" in said["footprint"]
    assert "model unet-small, Apache-2.0" in said["probability"]


def test_tables_carry_their_licence(tmp_path):
    table = footprints()
    table.attrs = {"license": "labels: pits, CC-BY-4.0"}
    for suffix in ("parquet", "gpkg"):
        write_footprints(table, tmp_path / f"f.{suffix}")
    assert gpd.read_parquet(tmp_path / "f.parquet").attrs == table.attrs
    assert pyogrio.read_info(tmp_path / "f.gpkg")["layer_metadata"] == table.attrs


def test_what_cannot_be_listed_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "pit_2020_reflectance.tif").write_text("no image")
    stranger = tmp_path / "in" / "scene_2020_B04.tif"
    profile = {"driver": "GTiff", "crs": "EPSG:32633", "transform": GRID.affine, "dtype": "uint8"}
    with rasterio.open(stranger, "w", count=1, height=2, width=2, **profile) as dst:
        dst.write(np.ones((1, 2, 2), np.uint8))
    (cog,) = write_cogs(cube_on(SMALL, [2020])[["footprint"]], SMALL, tmp_path / "out", "pit")
    for out, cogs, says in [
        (tmp_path / "in", [cog], "lies outside"),
        (
            tmp_path / "in",
            [tmp_path / "in" / "pit_2020_reflectance.tif"],
            "expected an image written by write_cogs",
        ),
        (tmp_path / "in", [stranger], "expected an image written by write_cogs"),
    ]:
        with pytest.raises(CubeError, match=says):
            write_items(out, cogs, title="t")
    assert not list(tmp_path.rglob("*.json"))
    write_items(tmp_path / "out", [cog], title="t")
    with pytest.raises(CubeError, match="expected images for the collection, found none"):
        write_stac(tmp_path / "in", [], {}, title="t", description="a")
    with pytest.raises(CubeError, match="lies outside"):
        make_asset("truth", stranger, tmp_path / "out")
    with pytest.raises(CubeError, match="cannot be read"):
        make_asset("truth", tmp_path / "out" / "none.parquet", tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*.json")] == ["pit_2020.json"]
