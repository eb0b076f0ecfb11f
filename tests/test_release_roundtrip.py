"""From the archive to a cube and back: import, build, label, export, on the command line as a user would."""

from __future__ import annotations

import shutil
import warnings
import zipfile

import numpy as np
import pandas as pd
import pytest
import rasterio
import xarray as xr
from click.testing import CliRunner
from rasterio.errors import NotGeoreferencedWarning

from minecube.cli import cli
from minecube.release import layout
from minecube.simulate.release import write_release

SITE, YEARS = "Germany_1", (2020, 2021)


def run(*arguments):
    done = CliRunner().invoke(cli, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory):
    """Folder with an archive, its import, a cube of simulated scenes labelled from it, and that in the release's layout."""
    place = tmp_path_factory.mktemp("rebuilt")
    write_release(place / "a.zip", {SITE: (12.0, 51.0)}, YEARS, shape=(150, 200))
    run("release", "import", place / "a.zip", "--out", place / "imported")
    of_site = ("--catalog", place / "imported", "--sites", SITE, "--years", "2020-2021")
    run("simulate", *of_site, "--out", place / "world", "--dates", "6")
    # The world's catalogue has no sites: it is one of sources, and the import one of sites.
    (place / "imported" / "sources.yaml").write_text(
        (place / "world" / "sources.yaml")
        .read_text()
        .replace("href: ", f"href: {place / 'world'}/")
    )
    run("build", *of_site, "--source", "sim-cdse", "--store", place / "cubes.zarr")
    run(
        "label",
        "--store",
        place / "cubes.zarr",
        "--polygons",
        place / "imported" / "labels.parquet",
    )
    said = run(
        "release",
        "export",
        "--store",
        place / "cubes.zarr",
        "--import",
        place / "imported",
        "--out",
        place / "again",
    )
    return place, said


def test_labels_come_back(rebuilt):
    place, said = rebuilt
    assert f"{SITE}       2       2  -" in said
    with zipfile.ZipFile(place / "a.zip") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        for year in YEARS:
            name = f"EuroMineNet/{SITE}/label/Year{year}.tif"
            with rasterio.MemoryFile(archive.read(name)) as memory, memory.open() as src:
                before = src.read(1)
            with rasterio.open(place / "again" / name) as src:
                after = src.read(1)
            assert layout.compute_iou(before, after) > 0.98


def test_images_lie_on_the_releases_pixels(rebuilt):
    place, _ = rebuilt
    with zipfile.ZipFile(place / "a.zip") as archive:
        for year in YEARS:
            name = f"EuroMineNet/{SITE}/image/Year{year}.tif"
            with (
                rasterio.MemoryFile(archive.read(name)) as memory,
                memory.open() as src,
                rasterio.open(place / "again" / name) as new,
            ):
                assert (new.shape, new.transform, new.crs, new.dtypes) == (
                    src.shape,
                    src.transform,
                    src.crs,
                    src.dtypes,
                )
                assert (new.read() > 0).mean() > 0.99


def test_a_year_that_the_release_lacks_lies_where_its_others_do(rebuilt, tmp_path):
    place, _ = rebuilt
    shutil.copytree(place / "imported", tmp_path / "less")
    years = pd.read_parquet(tmp_path / "less" / "years.parquet")
    years.loc[years["year"] == 2021, ["crs", "problem"]] = [
        "EPSG:32633",
        "image: expected EPSG:4326 and a place",
    ]
    years.to_parquet(tmp_path / "less" / "years.parquet")
    run(
        "release",
        "export",
        "--store",
        place / "cubes.zarr",
        "--import",
        tmp_path / "less",
        "--out",
        tmp_path,
    )
    shapes = []
    for year in YEARS:
        with rasterio.open(tmp_path / f"EuroMineNet/{SITE}/image/Year{year}.tif") as image:
            shapes.append((image.shape, image.transform))
    assert shapes[0] == shapes[1]


def test_a_site_that_is_not_in_the_import_is_refused(rebuilt, tmp_path):
    place, _ = rebuilt
    shutil.copytree(place / "imported", tmp_path / "other")
    sites = tmp_path / "other" / "sites.geojson"
    sites.write_text(sites.read_text().replace(SITE, "Germany_2"))
    asked = [
        "release",
        "export",
        "--store",
        place / "cubes.zarr",
        "--import",
        tmp_path / "other",
        "--out",
        tmp_path / "out",
    ]
    done = CliRunner().invoke(cli, list(map(str, asked)))
    assert done.exit_code == 2
    assert f"{SITE} not in" in done.output
    assert not (tmp_path / "out").exists()


def test_what_the_release_did_not_map_is_unknown(rebuilt):
    """The cube's grid is upright in UTM and so a little larger than the image; there nothing is known to be no mine."""
    place, _ = rebuilt
    cube = xr.open_zarr(place / "cubes.zarr", group=SITE, consolidated=False)
    footprint = cube.footprint.values
    assert (footprint == 255).any()
    assert (footprint == 255).mean() < 0.2
    assert np.array_equal(footprint == 255, cube.footprint_fraction.values == 255)
