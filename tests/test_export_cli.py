"""`minecube export --format` and `minecube publish` on a small store, as Croissant's and Icechunk's own tools see them."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import dask.array as da
import geopandas as gpd
import icechunk
import mlcroissant
import numpy as np
import pystac
import pytest
import rasterio
import shapely
import xarray as xr
import zarr
from click.testing import CliRunner

from known_scenes import site_of
from minecube import codes, cube
from minecube.catalog import load_recipes
from minecube.cli import cli
from minecube.errors import CubeError
from minecube.export import EUROMINENET, write_croissant
from minecube.grid import grid_of
from minecube.jobs.export import FORMATS
from minecube.jobs.label import format_origin

RECIPE = load_recipes()["annual-median"]
YEARS = (2019, 2020, 2021)


def run(*arguments, ok=0):
    done = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert done.exit_code == ok, (done.output, done.exception)
    return done.output


def year_of(grid, seed):
    rng = np.random.default_rng(seed)

    def blocks(values):
        return da.from_array(values, chunks=(*values.shape[:-2], RECIPE.block_px, RECIPE.block_px))

    shape = grid.shape
    return xr.Dataset(
        {
            "reflectance": (
                ("band", "y", "x"),
                blocks(rng.integers(1, 9000, (10, *shape)).astype(np.uint16)),
            ),
            "clear_count": (("y", "x"), blocks(rng.integers(1, 30, shape).astype(np.uint16))),
            "quality": (("y", "x"), blocks(np.ones(shape, np.uint8))),
        }
    )


def build(store, site, year, seed=0, scene="S2A", overwrite=False):
    """Build a site-year of one scene into a store, as `minecube build` leaves it."""
    grid = grid_of(site)
    cube.create_site(cube.Store(store), site, grid, YEARS, RECIPE)
    provenance = {
        "site": site.id,
        "year": year,
        "grid": {},
        "recipe": {"title": RECIPE.title},
        "scenes": [
            {"id": scene, "source": "s", "baseline": "05.00", "offset": 0, "offset_reason": "r"}
        ],
        "version": "0.1.0",
        "libraries": {"numpy": np.__version__},
    }
    assert cube.write_year(
        cube.Store(store),
        year_of(grid, seed),
        provenance,
        b"scene list",
        cube.BuildOptions(overwrite=overwrite),
    )


@pytest.fixture(scope="module")
def pit():
    return site_of("pit", 360000, 5600040, 300, 270)


@pytest.fixture(scope="module")
def hole():
    return site_of("hole", 420000, 5600040, 60, 60)


@pytest.fixture(scope="module")
def made(tmp_path_factory, pit):
    """A store of one site, years 2019 and 2021 built, labelled by a file that says its licence."""
    folder = tmp_path_factory.mktemp("store")
    for year in (2019, 2021):
        build(str(folder / "cubes.zarr"), pit, year, seed=year)
    drawn = gpd.GeoDataFrame(
        {"source": ["maus"], "licence": ["CC BY-SA 4.0"], "doi": ["10.1594/PANGAEA.942325"]},
        geometry=[shapely.box(360500, 5598000, 362000, 5599000)],
        crs="EPSG:32633",
    )
    drawn.to_file(folder / "pits.gpkg")
    run("label", "--store", folder / "cubes.zarr", "--polygons", folder / "pits.gpkg")
    return folder / "cubes.zarr"


@pytest.fixture(scope="module")
def mapped(made, tmp_path_factory):
    """Make a copy of that store, with the prediction of a model."""
    store = shutil.copytree(made, tmp_path_factory.mktemp("mapped") / "cubes.zarr")
    footprint = cube.open_committed(cube.Store(store), "pit")["footprint"].load()
    probability = (footprint * 200 + 20).astype(np.uint8)
    cube.write_probability(
        cube.Store(store), "pit", "net-11111111", probability, {"id": "net", "licence": "MIT"}
    )
    return store


@pytest.fixture(scope="module")
def exported(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "export"
    formats = [
        f for name in ("cog", "netcdf", "zarr", "zarr2", "croissant") for f in ("--format", name)
    ]
    return out, run("export", "--store", made, "--out", out, *formats)


# --- export -------------------------------------------------------------------------------------------------------------


def test_every_format_holds_the_committed_years(exported, made):
    out, printed = exported
    expected = cube.open_committed(cube.Store(made), "pit")
    assert list(expected.year.values) == [2019, 2021]
    opened = {
        "netcdf": xr.open_dataset(out / "pit" / "pit.nc", mask_and_scale=False),
        "zarr": xr.open_zarr(out / "pit" / "pit.zarr", group="0", consolidated=False),
        "zarr2": xr.open_zarr(out / "pit" / "pit.v2.zarr", mask_and_scale=False),
    }
    for name, found in opened.items():
        assert list(found.year.values) == [2019, 2021], name
        for variable in expected.data_vars:
            np.testing.assert_array_equal(
                found[variable].values, expected[variable].values, err_msg=f"{name} {variable}"
            )
        found.close()
    assert f"{out}: 4 images; open {out}/collection.json" in printed
    assert [line for line in printed.splitlines() if "croissant" in line] == [
        f"{out}/croissant.json"
    ]
    collection = pystac.Collection.from_file(str(out / "collection.json"))
    assert {
        "pit_netcdf",
        "pit_zarr",
        "pit_zarr2",
        "footprints_labels",
        "footprints_labels_gpkg",
        "items",
    } == set(collection.assets)
    item = next(collection.get_items())
    assert item.properties["processing:software"] == {"minecube": "0.1.0", "numpy": np.__version__}
    assert item.properties["minecube:scenes"] == ["S2A"]


def test_a_polygon_files_licence_reaches_every_export(exported):
    out, _ = exported
    licence, doi = "CC-BY-SA-4.0", "10.1594/PANGAEA.942325"
    with rasterio.open(out / "pit" / "pit_2019_footprint.tif") as src:
        said = [src.tags()["TIFFTAG_COPYRIGHT"]]
    with xr.open_dataset(out / "pit" / "pit.nc") as opened:
        said.append(opened.license + opened.references)
    said.append(str(dict(zarr.open_group(out / "pit" / "pit.zarr", mode="r").attrs)))
    said.append(str(dict(zarr.open_group(out / "pit" / "pit.v2.zarr", mode="r").attrs)))
    said.append(str(gpd.read_parquet(out / "footprints_labels.parquet").attrs))
    said += [(out / name).read_text() for name in ("collection.json", "croissant.json")]
    for text in said:
        assert licence in text or "licenses/by-sa/4.0/" in text
        assert doi in text


def test_polygons_of_many_sources_go_by_their_files_name():
    drawn = gpd.GeoDataFrame(
        {"source": [f"survey {n}" for n in range(9)], "LICENSE": ["ODbL-1.0"] * 9}
    )
    assert format_origin(drawn, Path("osm.gpkg")) == "osm.gpkg (ODbL-1.0)"
    assert (
        format_origin(drawn.drop(columns="LICENSE")[:2], Path("osm.gpkg"))
        == "survey 0 (not stated) | survey 1 (not stated)"
    )
    drawn["LICENSE"] = ["CC BY 4.0"] + ["ODbL-1.0"] * 8
    said = format_origin(drawn.assign(doi=["10.1/a", *[None] * 8])[:2], Path("osm.gpkg"))
    assert said == "survey 0 (CC BY 4.0) doi:10.1/a | survey 1 (ODbL-1.0)"


def test_one_format_writes_that_alone(made, tmp_path):
    run("export", "--store", made, "--out", tmp_path / "a", "--format", "netcdf")
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()] == [
        "a/pit/pit.nc"
    ]
    run("export", "--store", made, "--out", tmp_path / "b")
    assert {p.suffix for p in (tmp_path / "b").rglob("*") if p.is_file()} == {
        ".gpkg",
        ".json",
        ".parquet",
        ".png",
        ".tif",
    }
    out = run("export", "--store", made, "--out", tmp_path / "c", "--format", "croissant", ok=2)
    assert "add --format cog or --format netcdf" in out
    assert not (tmp_path / "c").exists()


def files_of(folder):
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


def test_the_same_store_is_exported_to_the_same_bytes(mapped, tmp_path):
    """At another time, in another time zone and folder, with other hashes of text."""
    made = []
    for zone, seed in (("UTC", "1"), ("Asia/Tokyo", "2")):
        folder = tmp_path / f"in {zone.lower().replace('/', ' ')}"
        (folder / "here").mkdir(parents=True)
        command = [
            sys.executable,
            "-c",
            "from minecube.cli import main; main()",
            "export",
            "--model",
            "net",
        ]
        command += ["--store", str(mapped), "--out", "../out"]
        command += [f for name in FORMATS for f in ("--format", name)]
        environment = {**os.environ, "TZ": zone, "PYTHONHASHSEED": seed}
        subprocess.run(
            command, cwd=folder / "here", env=environment, check=True, capture_output=True
        )
        made.append(files_of(folder / "out"))
        time.sleep(2.1)
    assert {Path(name).suffix for name in made[0]} > {
        ".tif",
        ".nc",
        ".parquet",
        ".gpkg",
        ".json",
        ".png",
    }
    assert made[0] == made[1]


@pytest.fixture(scope="module")
def small(tmp_path_factory, hole):
    """Make a store of a small site, with labels and the prediction of a model."""
    store = str(tmp_path_factory.mktemp("small") / "cubes.zarr")
    for year in (2019, 2020):
        build(store, hole, year, seed=year)
    opened = cube.open_cube(cube.Store(store), "hole").sel(year=[2019, 2020])
    footprint = opened["footprint"].load().copy(data=np.zeros((2, 60, 60), np.uint8))
    footprint[:, 20:40, 10:30] = codes.MINE
    cube.write_footprint(cube.Store(store), "hole", footprint, "drawn")
    cube.write_probability(
        cube.Store(store),
        "hole",
        "net",
        (footprint * 200 + 20).astype(np.uint8),
        {"id": "net", "licence": "MIT"},
    )
    return store


WRITERS = {
    "export": (
        "export",
        "--model",
        "net",
        *(f for name in FORMATS for f in ("--format", name)),
        "--out",
        "out",
    ),
    "score": ("score", "--model", "net", "--baselines", "--out", "out"),
    "tracks": ("tracks", "--model", "net", "--rates", "0.01,0.01", "--out", "out"),
    "release export": ("release", "export", "--out", "out"),
    "pack": ("pack", "--out", "out/cubes.zip"),
}


@pytest.fixture(params=WRITERS)
def writer(request, small, tmp_path, monkeypatch):
    """Return a command that writes below `out`, and the files of an undisturbed run."""
    monkeypatch.chdir(tmp_path)
    command = (*WRITERS[request.param], "--store", small)
    run(*command)
    expected = files_of(Path("out"))
    shutil.rmtree("out")
    return command, expected


def assert_whole(folder, expected):
    """Assert that every file under a final name is whole; hidden folders hold drafts."""
    found = {name: of for name, of in files_of(folder).items() if ".part-" not in name}
    assert found.items() <= expected.items(), {
        name for name, of in found.items() if expected.get(name) != of
    }


def test_a_command_that_stops_at_any_file_goes_on_when_it_is_run_again(writer, monkeypatch):
    """Each run fails one file later than the one before, and finds what that has left."""
    command, expected = writer
    rename, folder = Path.replace, Path("out").absolute()

    def fail_at(last):
        finished = []

        def replace(source, target):
            if Path(target).absolute().is_relative_to(folder) and ".part-" not in str(target):
                finished.append(target)
                assert_whole(folder, expected)
                if len(finished) == last:
                    raise OSError(28, "No space left on device")
            return rename(source, target)

        return replace

    for last in range(1, 200):
        with monkeypatch.context() as patched:
            patched.setattr(Path, "replace", fail_at(last))
            done = CliRunner().invoke(cli, [str(a) for a in command])
        if done.exit_code == 0:  # the command has fewer files than that
            break
        assert done.exit_code == 2, done.exception
        assert done.output.count("error: ") == 1
        assert "No space left on device" in done.output
        assert_whole(folder, expected)
        assert not list(folder.rglob(".*.part-*"))
    assert last > 1
    assert files_of(folder) == expected


@pytest.mark.parametrize("limit", [300, 3000])
def test_a_disk_that_fills_up_leaves_whole_files(writer, limit):
    command, expected = writer
    with largest_file(limit):
        done = CliRunner().invoke(cli, [str(a) for a in command])
    assert done.exit_code in (0, 2), (done.output, done.exception)
    assert_whole(Path("out"), expected)
    run(*command)
    assert files_of(Path("out")) == expected


@contextmanager
def largest_file(limit):
    """Let no file grow beyond so many bytes, which is what a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_an_unknown_prediction_is_named_with_those_there_are(mapped, tmp_path):
    said = run("export", "--store", mapped, "--model", "unknown", "--out", tmp_path / "e", ok=2)
    assert "no prediction of 'unknown' for pit; it has net-11111111" in said
    assert not (tmp_path / "e").exists()
    assert "an empty name" in run("score", "--store", mapped, "--model", "net,,net", ok=2)


def test_a_model_stands_for_its_only_prediction(mapped, tmp_path):
    said = run("export", "--store", mapped, "--model", "net", "--out", tmp_path)
    assert "--model net: using prediction net-11111111" in said
    expected = cube.open_probability(cube.Store(mapped), "pit", "net-11111111").sel(year=2021)
    with rasterio.open(tmp_path / "pit" / "pit_2021_probability.tif") as image:
        np.testing.assert_array_equal(image.read(1), expected)


# --- Croissant ----------------------------------------------------------------------------------------------------------


rdflib_warns = pytest.mark.filterwarnings(
    "ignore:ConjunctiveGraph is deprecated:DeprecationWarning"
)  # what mlcroissant uses


@rdflib_warns
def test_croissants_own_library_finds_no_fault(exported, caplog):
    out, _ = exported
    described = mlcroissant.Dataset(jsonld=out / "croissant.json")
    assert not described.metadata.ctx.issues.errors
    assert not described.metadata.ctx.issues.warnings
    assert "not standard" not in caplog.text
    metadata = described.metadata
    assert set(metadata.license) == {
        "https://sentinels.copernicus.eu/documents/247904/690755/Sentinel_Data_Legal_Notice",
        "https://creativecommons.org/licenses/by-sa/4.0/",
    }
    assert (
        metadata.cite_as
        == "Contains modified Copernicus Sentinel data 2019-2021.; maus, doi:10.1594/PANGAEA.942325"
    )


@rdflib_warns
def test_croissants_records_are_the_tables_rows(exported):
    out, _ = exported
    described = mlcroissant.Dataset(jsonld=out / "croissant.json")
    rows = list(described.records(record_set="footprints_labels"))
    table = gpd.read_parquet(out / "footprints_labels.parquet")
    assert [r["footprints_labels/area_m2"] for r in rows] == list(table["area_m2"])
    assert [r["footprints_labels/year"] for r in rows] == list(table["year"])
    assert [r["footprints_labels/site"] for r in rows] == [s.encode() for s in table["site"]]
    items = list(described.records(record_set="items"))
    assert [i["items/id"] for i in items] == [b"pit_2019", b"pit_2021"]


def test_every_file_is_named_with_its_checksum(exported):
    out, _ = exported
    named = {
        f["contentUrl"]: f for f in json.loads((out / "croissant.json").read_text())["distribution"]
    }
    there = {
        p.relative_to(out).as_posix()
        for s in ("tif", "nc", "parquet", "gpkg")
        for p in out.rglob(f"*.{s}")
    }
    assert set(named) == there
    for name, entry in named.items():
        assert entry["sha256"] == hashlib.sha256((out / name).read_bytes()).hexdigest()
        assert entry["contentSize"] == f"{(out / name).stat().st_size} B"


def test_what_croissant_cannot_name_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    for files, says in [
        ([], "there is no file"),
        ([tmp_path / "a.tif"], "lies outside"),
        ([tmp_path / "in" / "a.tif"], "cannot be read"),
    ]:
        with pytest.raises(CubeError, match=says):
            write_croissant(
                tmp_path / "in",
                files,
                [EUROMINENET],
                title="t",
                description="a",
                published=dt.date(2024, 1, 1),
            )
    assert not list(tmp_path.rglob("*.json"))


# --- publish ------------------------------------------------------------------------------------------------------------


def session_of(place, **which):
    return icechunk.Repository.open(icechunk.local_filesystem_storage(str(place))).readonly_session(
        **which
    )


def released(place, tag, group="pit"):
    """A release as someone with Icechunk and xarray opens it."""
    return xr.open_zarr(session_of(place, tag=tag).store, group=group, consolidated=False)


@pytest.fixture
def growing(tmp_path, pit):
    store = tmp_path / "cubes.zarr"
    for year in (2019, 2020):
        build(str(store), pit, year, seed=year)
    return store, ("--store", store, "--icechunk", tmp_path / "releases")


def test_nothing_is_no_release(growing, tmp_path):
    store, where = growing
    run("publish", *where, "--tag", "v1")
    cube.withdraw_years(cube.Store(store), "pit", [2019, 2020])
    assert "nothing to publish" in run("publish", *where, "--tag", "v2", ok=2)
    assert [line.split()[0] for line in run("publish", *where).splitlines()[2:]] == ["v1"]


def mask_of(store, value):
    opened = cube.open_cube(cube.Store(store), "pit")
    masks = np.full((1, *opened.odc.geobox.shape), value, np.uint8)
    return xr.DataArray(
        masks,
        {"year": [2020], "y": opened.y, "x": opened.x, "spatial_ref": opened.spatial_ref},
        ("year", "y", "x"),
    )


def test_each_tag_keeps_what_the_store_was(growing, pit, hole, tmp_path):
    store, where = growing
    assert "no Icechunk repository" in run("publish", *where, ok=2)
    assert "v1 holds 2 site-years" in run("publish", *where, "--tag", "v1")
    first = cube.open_committed(cube.Store(store), "pit").load()
    cube.write_footprint(
        cube.Store(store), "pit", mask_of(store, codes.MINE), "EuroMineNet (CC BY 4.0)"
    )
    run("publish", *where, "--tag", "v2")
    build(str(store), pit, 2019, seed=99, scene="S2B", overwrite=True)
    build(str(store), hole, 2021)
    run("publish", *where, "--tag", "v3")

    opened = released(tmp_path / "releases", "v1").sel(year=[2019, 2020])
    for name in first.data_vars:
        np.testing.assert_array_equal(opened[name].values, first[name].values)
    now = released(tmp_path / "releases", "v3")
    np.testing.assert_array_equal(
        now.reflectance.values, cube.open_cube(cube.Store(store), "pit").reflectance.values
    )
    assert "EuroMineNet, CC-BY-4.0" in now.license
    assert "EuroMineNet" not in opened.license

    assert run("publish", *where, "--diff", "v1", "v2").splitlines()[2:] == [
        "pit   2020  footprint",
        "pit   all   footprint (metadata)",  # its origin
        "pit   all   footprint_fraction (metadata)",
        "pit   all   site (metadata)",  # the licences
    ]
    rows = [
        line.split(maxsplit=2)
        for line in run("publish", *where, "--diff", "v2", "v3").splitlines()[2:]
    ]
    assert ["hole", "all", "the whole site (new)"] in rows
    assert {tuple(r) for r in rows if r[0] == "pit"} == {
        ("pit", "2019", "reflectance"),
        ("pit", "2019", "clear_count"),
        ("pit", "2019", "provenance"),
    }
    back = [
        line.split(maxsplit=2)
        for line in run("publish", *where, "--diff", "v3", "v2").splitlines()[2:]
    ]
    assert back == [[s, y, w.replace("new", "gone")] for s, y, w in rows]
    listed = run("publish", *where).splitlines()[2:]
    assert [line.split()[0] for line in listed] == ["v1", "v2", "v3"]


def test_years_that_are_not_committed_are_not_published(growing, pit, tmp_path):
    store, where = growing
    half = zarr.open_group(str(store), path="pit", mode="r+")
    half["reflectance"][2] = 7  # blocks of a run that was killed before its commit
    (store / "pit" / "reflectance" / "c" / "0" / "0" / "0" / "0.1f.partial").write_text(
        "killed while writing"
    )
    zarr.open_group(str(store), path="pit/builds/2021", mode="a").attrs["building"] = "x"
    run("publish", *where, "--tag", "v1")
    opened = released(tmp_path / "releases", "v1")
    assert (opened.reflectance.sel(year=2021) == 0).all()
    assert set(
        zarr.open_group(
            session_of(tmp_path / "releases", tag="v1").store, path="pit/builds", mode="r"
        ).group_keys()
    ) == {"2019", "2020"}


def test_a_release_of_the_same_store_writes_nothing(growing):
    _, where = growing
    run("publish", *where, "--tag", "v1")
    assert "0 objects differed" in run("publish", *where, "--tag", "v2")
    assert run("publish", *where, "--diff", "v1", "v2") == "v1 and v2 are the same\n"
    assert "v2 already holds these 2 site-years; nothing was written" in run(
        "publish", *where, "--tag", "v2"
    )
    assert "has no tag 'v9'; it has v1, v2" in run("publish", *where, "--diff", "v1", "v9", ok=2)


def history(place):
    """List the snapshots of `main`, newest first, and the tags."""
    repository = icechunk.Repository.open(icechunk.local_filesystem_storage(str(place)))
    return [snapshot.id for snapshot in repository.ancestry(branch="main")], sorted(
        repository.list_tags()
    )


def test_a_tag_of_another_state_is_refused(growing, pit, tmp_path):
    """What differs is one site-year more, its pixels, its labels, or nothing."""
    store, where = growing
    run("publish", *where, "--tag", "v1")
    kept = shutil.copytree(store, tmp_path / "kept.zarr")
    for change in (
        lambda: build(str(store), pit, 2021),
        lambda: build(str(store), pit, 2019, seed=99, scene="S2B", overwrite=True),
        lambda: cube.write_footprint(cube.Store(store), "pit", mask_of(store, codes.MINE), "a"),
        lambda: (store / "pit/reflectance/c/0/0/0/0").unlink(),
    ):
        before = history(tmp_path / "releases")
        change()
        said = run("publish", *where, "--tag", "v1", ok=2)
        assert "tag 'v1' holds another state of the store" in said
        assert history(tmp_path / "releases") == before
        shutil.rmtree(store)
        shutil.copytree(kept, store)
        assert "v1 already holds these 2 site-years" in run("publish", *where, "--tag", "v1")


@pytest.mark.parametrize(
    "tag", ["a/b", "../v1", ".", "..", "a b", "Größe", "v1?", "a\nb", "-v1", "x" * 101, "a%20b"]
)
def test_a_bad_tag_is_refused_before_anything_is_written(growing, tmp_path, tag):
    _, where = growing
    assert "letters, digits, . _ -" in run("publish", *where, f"--tag={tag}", ok=2)
    assert not (tmp_path / "releases").exists()


def test_a_good_tag_is_listed_as_it_was_given(growing):
    _, where = growing
    for tag in ("v1.0_a-b", "2", "x" * 100):
        run("publish", *where, "--tag", tag)
        assert tag in [line.split()[0] for line in run("publish", *where).splitlines()[2:]]


def test_a_deleted_tag_leaves_main_as_it_was(growing, tmp_path):
    store, where = growing
    run("publish", *where, "--tag", "v1")
    run("publish", *where, "--tag", "v2")
    icechunk.Repository.open(
        icechunk.local_filesystem_storage(str(tmp_path / "releases"))
    ).delete_tag("v2")
    cube.write_footprint(cube.Store(store), "pit", mask_of(store, codes.MINE), "a")
    before = history(tmp_path / "releases")
    assert "tag 'v2' was deleted" in run("publish", *where, "--tag", "v2", ok=2)
    assert history(tmp_path / "releases") == before
    run("publish", *where, "--tag", "v3")
    assert (released(tmp_path / "releases", "v3").footprint.sel(year=2020) == 1).all()


def test_rollback_goes_on_from_an_older_release(growing, tmp_path):
    store, where = growing
    before = cube.open_cube(cube.Store(store), "pit").footprint.values
    run("publish", *where, "--tag", "v1")
    cube.write_footprint(cube.Store(store), "pit", mask_of(store, codes.MINE), "a mistake")
    run("publish", *where, "--tag", "v2")
    assert "main is what it was at v1" in run("publish", *where, "--rollback", "v1")
    main = (
        icechunk.Repository.open(icechunk.local_filesystem_storage(str(tmp_path / "releases")))
        .readonly_session("main")
        .store
    )
    np.testing.assert_array_equal(
        xr.open_zarr(main, group="pit", consolidated=False).footprint.values, before
    )
    assert (
        released(tmp_path / "releases", "v2").footprint.sel(year=2020) == 1
    ).all()  # the tag stays
    cube.write_footprint(cube.Store(store), "pit", mask_of(store, codes.BACKGROUND), "mended")
    run("publish", *where, "--tag", "v3")
    assert "pit   2020  footprint\n" in run(
        "publish", *where, "--diff", "v2", "v3"
    )  # on both sides of the rollback
    assert "has no tag 'v9'" in run("publish", *where, "--rollback", "v9", ok=2)


def test_what_is_changed_back_is_no_difference(growing):
    store, where = growing
    cube.write_footprint(cube.Store(store), "pit", mask_of(store, codes.BACKGROUND), "a")
    run("publish", *where, "--tag", "v1")
    cube.write_footprint(cube.Store(store), "pit", mask_of(store, codes.MINE), "a")
    run("publish", *where, "--tag", "v2")
    cube.write_footprint(cube.Store(store), "pit", mask_of(store, codes.BACKGROUND), "a")
    run("publish", *where, "--tag", "v3")
    assert run("publish", *where, "--diff", "v1", "v3") == "v1 and v3 are the same\n"


def test_a_site_that_is_gone_is_in_no_later_release(growing, hole, tmp_path):
    store, where = growing
    build(str(store), hole, 2020)
    run("publish", *where, "--tag", "v1")
    run("publish", *where, "--tag", "v2", "--sites", "pit")
    assert "hole  all   the whole site (gone)" in run("publish", *where, "--diff", "v1", "v2")
    assert list(
        zarr.open_group(session_of(tmp_path / "releases", tag="v2").store, mode="r").group_keys()
    ) == ["pit"]
    assert (released(tmp_path / "releases", "v1", "hole").reflectance.sel(year=2020) > 0).all()


def test_two_processes_do_not_publish_into_one_folder(growing, tmp_path):
    _, where = growing
    run("publish", *where, "--tag", "v1")
    holds = (
        "import fcntl, os, sys; h = os.open(sys.argv[1], 0); "
        "fcntl.flock(h, fcntl.LOCK_EX); print('held', flush=True); input()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", holds, str(tmp_path / "releases")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout.readline() == "held\n"
        assert "another process is publishing there" in run("publish", *where, "--tag", "v2", ok=2)
    finally:
        other.communicate("\n", timeout=10)
    run("publish", *where, "--tag", "v2")


@pytest.mark.parametrize(
    ("moment", "tags", "then"),
    [
        ("Session.commit = lambda *_, **__: die()", ["v1"], "v2 holds 2 site-years; 4 objects"),
        (
            "Repository.create_tag = lambda *_, **__: die()",
            ["v1"],
            "v2 holds 2 site-years; 0 objects",
        ),
        (
            "Repository.create_tag = lambda *a: (tag(*a), die())",
            ["v1", "v2"],
            "v2 already holds these 2 site-years",
        ),
    ],
)
def test_a_run_that_is_killed_can_be_repeated(growing, tmp_path, moment, tags, then):
    store, where = growing
    run("publish", *where, "--tag", "v1")
    cube.write_footprint(cube.Store(store), "pit", mask_of(store, codes.MINE), "a")
    dies = (
        "import os, signal, sys, icechunk\n"
        "die = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
        "tag = icechunk.Repository.create_tag\n"
        f"icechunk.{moment}\n"
        "from minecube.cli import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", dies, "publish", *map(str, where), "--tag", "v2"]
    assert (
        subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode
        == -signal.SIGKILL
    )
    assert [line.split()[0] for line in run("publish", *where).splitlines()[2:]] == tags
    assert then in run("publish", *where, "--tag", "v2")
    assert (released(tmp_path / "releases", "v2").footprint.sel(year=2020) == 1).all()
    assert "already holds" in run("publish", *where, "--tag", "v2")


def test_a_folder_of_something_else_is_left_alone(growing, tmp_path):
    store, _ = growing
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "a.tex").write_text("years of work")
    out = run("publish", "--store", store, "--icechunk", tmp_path / "thesis", "--tag", "v1", ok=2)
    assert "is not empty and no Icechunk repository" in out
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["a.tex"]
    (tmp_path / "file").write_text("a file")
    out = run("publish", "--store", store, "--icechunk", tmp_path / "file", "--tag", "v1", ok=2)
    assert "is no folder that can be used" in out
    assert "expected a folder or s3://" in run(
        "publish", "--store", store, "--icechunk", "ftp://a/b", "--tag", "v1", ok=2
    )
    assert "give one of them" in run(
        "publish", "--store", store, "--icechunk", "x", "--tag", "v1", "--rollback", "v1", ok=2
    )


def test_releases_on_s3(growing, monkeypatch):
    from moto.server import ThreadedMotoServer

    store, _ = growing
    for name, value in {
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        import requests
        from obstore.store import S3Store  # noqa: F401  the bucket is made by a plain request

        requests.put(f"{endpoint}/cubes", timeout=5).raise_for_status()
        where = ("--store", store, "--icechunk", "s3://cubes/releases")
        run("publish", *where, "--tag", "v1")
        cube.write_footprint(cube.Store(store), "pit", mask_of(store, codes.MINE), "a")
        run("publish", *where, "--tag", "v2")
        assert "pit   2020  footprint\n" in run("publish", *where, "--diff", "v1", "v2")
        storage = icechunk.s3_storage(
            bucket="cubes",
            prefix="releases",
            endpoint_url=endpoint,
            allow_http=True,
            force_path_style=True,
            from_env=True,
        )
        opened = xr.open_zarr(
            icechunk.Repository.open(storage).readonly_session(tag="v2").store,
            group="pit",
            consolidated=False,
        )
        expected = cube.open_cube(cube.Store(store), "pit")
        np.testing.assert_array_equal(opened.reflectance.values, expected.reflectance.values)
    finally:
        server.stop()


def test_without_icechunk_it_says_what_to_install(growing):
    store, where = growing
    code = "import sys; sys.modules['icechunk'] = None; from minecube.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "publish", *map(str, where)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert "needs Icechunk: pip install 'minecube[publish]'" in done.stderr
    code = code.replace("'icechunk'", "'netCDF4'")
    out = Path(store).parent / "out"
    command = [
        sys.executable,
        "-c",
        code,
        "export",
        "--store",
        str(store),
        "--format",
        "netcdf",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert "needs one package more: pip install 'minecube[publish]'" in done.stderr
    assert not list(out.rglob("*.nc"))
