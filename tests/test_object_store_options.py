"""Options take URLs of object stores, and check them before anything is done."""

from __future__ import annotations

import logging
from pathlib import Path

import geopandas as gpd
import pytest
from click.testing import CliRunner
from obstore.store import from_url
from shapely.geometry import box

from known_builds import run_here
from minecube import cube
from minecube.catalog import load_sites
from minecube.catalog.loaders import load_models, load_sources
from minecube.cli import cli
from minecube.errors import CatalogError, CubeError, PlaceError
from minecube.jobs.scene_lists import default_folder
from minecube.places import Url
from minecube.vectors import read_vector

CARD = "{title: t, architecture: unet, weights: {href: %s, sha256: %s}}"


def test_scene_lists_are_next_to_the_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert default_folder(cube.Store("a/cubes.zarr/")) == Path("a/cubes.zarr-scenes")
    found = default_folder(cube.Store("gs://bucket/a/cubes.zarr/"))
    assert found == Url("gs://bucket/a/cubes.zarr-scenes")
    with pytest.raises(PlaceError, match=r"^az://bucket: is a whole bucket, .* name one with --sc"):
        default_folder(cube.Store("az://bucket"))


def test_scene_lists_of_earlier_versions_are_used_with_a_notice(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    Path("cubes.zarr-scenes").mkdir()
    with caplog.at_level(logging.WARNING):
        found = default_folder(cube.Store("s3://bucket/a/cubes.zarr"))
    assert found == Path("cubes.zarr-scenes")
    assert "move them to s3://bucket/a/cubes.zarr-scenes" in caplog.text


@pytest.fixture
def mines(tmp_path):
    """A table of one square in a UTM zone."""
    square = box(360000, 5600000, 360100, 5600100)
    return gpd.GeoDataFrame({"name": ["pit"]}, geometry=[square], crs=32632)


def put_files(folder, url):
    for path in folder.iterdir():
        from_url(url).put(path.name, path.read_bytes())


@pytest.mark.parametrize("name", ["mines.shp", "mines.gpkg", "mines.parquet", "mines.geojson"])
def test_polygons_are_read_from_an_object_store(mines, name, bucket, tmp_path):
    (tmp_path / "files").mkdir()
    path = tmp_path / "files" / name
    if name.endswith(".parquet"):
        mines.to_parquet(path)
    else:
        mines.to_file(path)
    put_files(tmp_path / "files", f"{bucket}/files")
    found = read_vector(Url(f"{bucket}/files/{name}"))
    assert found.crs == read_vector(path).crs
    assert found.geometry.tolist() == read_vector(path).geometry.tolist()
    (site,) = load_sites(f"{bucket}/files/{name}")
    assert site.id == "pit"


def test_a_geodatabase_is_zipped_for_an_object_store():
    with pytest.raises(ValueError, match="zip the File Geodatabase"):
        read_vector(Url("s3://bucket/mines.gdb"))


def test_warnings_of_a_file_name_its_url(bucket, tmp_path, caplog):
    bow_tie = '{"type": "Polygon", "coordinates": [[[7, 50], [7.1, 50.1], [7.1, 50], [7, 50.1], [7, 50]]]}'
    feature = f'{{"type": "Feature", "properties": {{"id": "pit"}}, "geometry": {bow_tie}}}'
    from_url(bucket).put(
        "a.geojson", f'{{"type": "FeatureCollection", "features": [{feature}]}}'.encode()
    )
    load_sites(f"{bucket}/a.geojson")
    assert "s3://mines/a.geojson: " in caplog.text
    assert "minecube-" not in caplog.text


def test_a_catalogue_in_an_object_store(bucket, tmp_path, mines):
    mines.to_crs(4326).rename(columns={"name": "id"}).to_file(tmp_path / "sites.geojson")
    (tmp_path / "models.yaml").write_text("mine: " + CARD % ("mine.pt", "a" * 64))
    put_files(tmp_path, f"{bucket}/catalog")
    shown, _ = run_here("sites", "--sites", "pit", "--catalog", f"{bucket}/catalog")
    assert "EPSG:32632 12 x 12 px" in shown
    shown, _ = run_here("models", "--catalog", f"{bucket}/catalog")
    assert "mine  " in shown
    card = load_models(Url(f"{bucket}/catalog/models.yaml"))["mine"]
    assert card.weights.href == "s3://mines/catalog/mine.pt"
    _, err = run_here("models", "--catalog", f"{bucket}/other", ok=2)
    assert "'s3://mines/other' does not exist" in err


def test_a_remote_catalogue_names_no_local_file(bucket):
    source = "mine: {title: t, kind: stac-geoparquet, href: /etc/items.parquet, collection: c}"
    from_url(bucket).put("sources.yaml", source.encode())
    with pytest.raises(CatalogError, match="local files are for local catalogues"):
        load_sources(Url(f"{bucket}/sources.yaml"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("score --store {store} --out s3://other/scores", "there is no bucket s3://other; check"),
        ("score --store {store} --out s3://k:SECRET@mines/x", "expected a URL without keys"),
        ("score --store {store} --json s3://mines", "names a bucket; expected a file in it"),
        ("score --store {store} --join s3://mines/c.json", "'s3://mines/c.json' does not exist"),
        ("label --store {store} --polygons s3://mines/a.gpkg", "s3://mines/a.gpkg: no such file"),
        ("sites --sites s3://mines/a.gpkg", "s3://mines/a.gpkg: no such file"),
        ("predict --store {store} --model s3://mines/m.pt", "s3://mines/m.pt: no such file"),
        ("build --store s3://mines/c?SECRET --sites a --years 2020 --source cdse", "without keys"),
        ("versions s3://k:SECRET@mines/r", "without keys"),
        ("demo --out s3://mines/demo", "expected a local folder, found a URL"),
        ("simulate --sites demo_1 --out s3://mines/w", "expected a local folder, found a URL"),
        ("pack --store {store} --out ftp://host/x.zip", "found ftp://"),
    ],
)
def test_a_wrong_place_is_one_sentence_before_any_work(words, message, bucket, tmp_path):
    cube.Store(tmp_path).open_group("", "a")
    done = CliRunner().invoke(cli, words.format(store=tmp_path).split())
    assert done.exit_code in (1, 2)
    assert message in done.stderr
    assert "SECRET" not in done.output
    assert "Traceback" not in done.output


def test_a_pack_is_outside_its_store():
    store = cube.Store("s3://mines/cubes.zarr/")
    for name in ("cubes.zarr/a.zip", "a.tar"):
        with pytest.raises(CubeError, match=r"ends in \.zip, outside s3://mines/cubes\.zarr/"):
            cube.pack(store, Url(f"s3://mines/{name}"))
