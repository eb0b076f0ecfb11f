"""Files of polygons as people have them, through the commands `sites`, `label` and `polygons`: exit codes and words."""

from __future__ import annotations

import json
import zipfile

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
import zarr
from click.testing import CliRunner

from known_scenes import site_of
from minecube import cube
from minecube.catalog import load_recipes, load_sites
from minecube.cli import COMMANDS, cli
from minecube.grid import grid_of

LEFT, TOP = 500000, 5700000
PLACES = {"pit": 0, "Big_Pit": 3000}
"""Site -> metres east of the first; each has 60 x 60 pixels."""


def box(x, y, width, height):
    """A rectangle in metres from the upper left corner of the first site."""
    return shapely.box(LEFT + x, TOP - y - height, LEFT + x + width, TOP - y)


A = box(50, 50, 200, 200)  # 400 pixels
B = box(300, 300, 100, 100)  # 100 pixels
OF_BIG = box(3100, 100, 50, 50)  # 25 pixels
FAR = box(50_000, 100, 100, 100)


def table(*shapes, **columns):
    return gpd.GeoDataFrame(columns, geometry=list(shapes), crs=32633)


def run(*arguments, ok=0):
    done = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert done.exit_code == ok, f"exit {done.exit_code}\n{done.output}"
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


@pytest.fixture
def store(tmp_path):
    """Two sites and two years, without pixels."""
    for name, x in PLACES.items():
        site = site_of(name, LEFT + x, TOP, 60, 60)
        cube.create_site(
            cube.Store(tmp_path / "cubes.zarr"),
            site,
            grid_of(site),
            [2019, 2022],
            load_recipes()["annual-median"],
        )
    return tmp_path / "cubes.zarr"


@pytest.fixture
def sites(tmp_path):
    """The same two sites as a file."""
    places = [site_of(name, LEFT + x, TOP, 60, 60).geometry for name, x in PLACES.items()]
    gpd.GeoDataFrame({"id": list(PLACES)}, geometry=places, crs=4326).to_file(
        tmp_path / "sites.geojson"
    )
    return tmp_path / "sites.geojson"


def written(folder, rows, name="mines.gpkg", **how):
    rows.to_file(folder / name, **how)
    return folder / name


def footprint(store, site, year):
    """(pixels of mine, whether any is known)."""
    mask = cube.open_cube(cube.Store(store), site)["footprint"].sel(year=year).to_numpy()
    return int((mask == 1).sum()), bool((mask != 255).any())


# --- layers -------------------------------------------------------------------------------------------------------------


def layers_by_year(folder):
    path = written(folder, table(A, year=[2019]), layer="mines_2019")
    table(A, B, year=[2022, 2022]).to_file(path, layer="mines_2022", mode="a")
    return path


def test_layers_are_named_and_chosen(store, sites, tmp_path):
    path = layers_by_year(tmp_path)
    for command in (
        ("label", "--store", store, "--polygons", path, "--sites", "pit"),
        ("polygons", path),
    ):
        _, err = run(*command, ok=2)
        assert "mines_2019" in err
        assert "mines_2022" in err
        assert "--layer" in err
        assert err.count("\n") == 1
    assert footprint(store, "pit", 2019) == (0, False)
    label = ("label", "--store", store, "--polygons", path, "--sites", "pit", "--layer")
    run(*label, "mines_2019")
    assert [footprint(store, "pit", year) for year in (2019, 2022)] == [(400, True), (0, False)]
    run(*label, "mines_*")
    assert [footprint(store, "pit", year) for year in (2019, 2022)] == [(400, True), (500, True)]
    out, _ = run("polygons", path, "--layer", "mines_2022", "--sites", sites)
    assert "2 rows, 2 kept" in out
    _, err = run(*label, "mines_2020", ok=2)
    assert "expected a layer 'mines_2020', found mines_2019" in err


def test_layers_of_sites_and_of_a_second_file(tmp_path):
    path = tmp_path / "all.gpkg"
    for name, x in PLACES.items():
        rows = gpd.GeoDataFrame(
            {"id": [name]}, geometry=[site_of(name, LEFT + x, TOP, 60, 60).geometry], crs=4326
        )
        rows.to_file(path, layer=f"area_{name}", mode="a" if path.exists() else "w")
    table(A, B).to_file(path, layer="one", mode="a")
    table(A).to_file(path, layer="two", mode="a")
    _, err = run("sites", "--sites", path, ok=2)
    assert "area_pit" in err
    assert (
        run("sites", "--sites", path, "--layer", "area_pit")[0].splitlines()[-1].startswith("pit ")
    )
    assert run("sites", "--sites", path, "--sites-layer", "area_*")[0].count("EPSG:32633") == 2
    compare = (
        "polygons",
        path,
        "--layer",
        "one",
        "--sites",
        path,
        "--sites-layer",
        "area_pit",
        "--compare",
        path,
    )
    report = tmp_path / "report.json"
    run(*compare, "--compare-layer", "two", "--json", report)
    read = json.loads(report.read_text())
    assert read["comparison"][0]["iou"] == pytest.approx(0.8, rel=1e-3)  # 40,000 of 50,000 m2
    assert [file["rows"] for file in read["files"].values()] == [2, 1]
    _, err = run(*compare, "--compare-layer", "one", ok=2)
    assert "the same polygons twice" in err
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "all.gpkg").write_bytes(path.read_bytes())
    run(*compare[:-1], tmp_path / "copy" / "all.gpkg", "--compare-layer", "two", "--json", report)
    assert json.loads(report.read_text())["comparison"][0]["iou"] == pytest.approx(0.8, rel=1e-3)
    _, err = run("sites", "--sites", "demo_1", "--layer", "pits", ok=2)
    assert "expected a file of sites with the layer 'pits', found --sites demo_1" in err
    _, err = run(
        "polygons", path, "--layer", "one", "--compare", "id", "--compare-layer", "two", ok=2
    )
    assert "--compare-layer is of a second file" in err


OF_DATASETS = ("run", "status", "retry", "update", "versions")
"""Commands that take sites and their layer from a dataset.yaml."""
WITHOUT_SITES = ("models", "demo", "release", *OF_DATASETS)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in WITHOUT_SITES])
def test_every_command_that_reads_sites_or_polygons_has_a_layer(command):
    out, _ = run(command, "--help")
    assert "--layer" in out
    assert ("--sites-layer" in out) or "--sites " not in out


@pytest.mark.parametrize(
    "suffix",
    [".geojson", ".json", ".gpkg", ".kml", ".fgb", ".shp", ".zip", ".parquet", ".geoparquet"],
)
@pytest.mark.parametrize("upper", [False, True])
def test_sites_are_of_every_format_that_polygons_are_of(tmp_path, suffix, upper):
    rows = table(A, Name=["Bełża"]).to_crs(4326)
    path = tmp_path / f"own{suffix}"
    if "parquet" in suffix:
        rows.to_parquet(path)
    elif suffix == ".zip":
        rows.to_file(tmp_path / "own.shp")
        with zipfile.ZipFile(path, "w") as archive:
            for part in ("shp", "shx", "dbf", "prj", "cpg"):
                archive.write(tmp_path / f"own.{part}", f"own.{part}")
    else:
        rows.to_file(path, driver={".json": "GeoJSON", ".kml": "LIBKML"}.get(suffix))
    if upper:
        for file in tmp_path.glob("own.*"):
            file.rename(file.with_suffix(file.suffix.upper()))
        path = path.with_suffix(suffix.upper())
    out, err = run("sites", "--sites", path)
    assert out.splitlines()[-1].split()[0] == "Belza"
    assert out.splitlines()[-1].split()[-1] == "Bełża"
    assert "'Bełża' is Belza" in err
    assert "1 rows, 1 kept" in run("polygons", path)[0]


def test_a_file_of_another_format_is_not_taken_for_a_name(tmp_path):
    (tmp_path / "own.tab").write_text("x")
    _, err = run("sites", "--sites", tmp_path / "own.tab", ok=2)
    assert "expected GeoJSON, GeoPackage" in err
    _, err = run("sites", "--sites", tmp_path / "nowhere.tab", ok=2)
    assert "no such file" in err


def test_a_file_without_suffix_is_named(tmp_path):
    (tmp_path / "noext").write_text("{}")
    _, err = run("sites", "--sites", tmp_path / "noext", ok=2)
    assert "noext: expected a site or a file with the suffix of its format; rename the file" in err


def test_sites_without_columns_and_with_lists_are_no_crash(tmp_path):
    out, _ = run("sites", "--sites", written(tmp_path, table(A, B)))
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["site_1", "site_2"]
    table(A, labels=[["x"]]).to_parquet(tmp_path / "own.parquet")
    _, err = run("sites", "--sites", tmp_path / "own.parquet", ok=2)
    assert "field 'labels': expected text, found ['x']" in err


def test_bytes_that_are_no_text_pass_through_every_command(store, sites, tmp_path):
    path = tmp_path / "mines.parquet"
    table(
        A, B, photo=[b"\xff", b"\xfe"], source=[b"\xff", b"\xfe"], about=[{"a": 1}, {"a": 2}]
    ).to_parquet(path)
    run("label", "--store", store, "--polygons", path, "--sites", "pit")
    assert footprint(store, "pit", 2019) == (500, True)
    run("polygons", path, "--sites", sites, "--compare", "source", "--out", tmp_path / "out.gpkg")


def test_sites_of_a_store_are_found_by_their_names(store, tmp_path):
    path = written(tmp_path, table(OF_BIG))
    run("label", "--store", store, "--polygons", path, "--sites", "big pit")
    assert footprint(store, "Big_Pit", 2019) == (25, True)
    assert footprint(store, "pit", 2019) == (0, False)


# --- rows without a site, and sites by other names ----------------------------------------------------------------------


@pytest.mark.parametrize("blank", [None, "", "  "])
def test_rows_without_a_site_count_where_they_lie(store, sites, tmp_path, blank):
    path = written(
        tmp_path, table(A, OF_BIG, B, FAR, site=["pit", "Big_Pit", blank, blank], year=[2019] * 4)
    )
    _, err = run("label", "--store", store, "--polygons", path)
    assert footprint(store, "pit", 2019) == (500, True)
    assert footprint(store, "Big_Pit", 2019) == (25, True)
    assert "1 of 4 polygons name no site and are drawn at each site that they reach: row 3" in err
    assert "1 of 4 polygons name no site, reach none of these sites and are left out: row 4" in err
    report = tmp_path / "report.json"
    run("polygons", path, "--sites", sites, "--json", report)
    found = {
        (f["finding"], f["row"], f["done"]) for f in json.loads(report.read_text())["findings"]
    }
    assert found == {("no site", 3, "kept"), ("at no site", 4, "left out")}


def test_rows_that_miss_the_site_they_name_are_named(store, tmp_path):
    path = written(tmp_path, table(A, FAR, OF_BIG, site=["pit", "pit", "Big_Pit"]))
    _, err = run("label", "--store", store, "--polygons", path)
    assert "1 of 3 polygons do not reach the site that they name and are left out: row 2" in err
    _, err = run(
        "label",
        "--store",
        store,
        "--polygons",
        written(tmp_path, table(A, site=["pit"]), "a.gpkg"),
        ok=2,
    )
    assert "no polygon of site 'Big_Pit'; its `site` column has pit" in err


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_mappers_that_only_touch_a_site_are_compared_without_iou(sites, tmp_path):
    edge = grid_of(load_sites(sites)[0]).boundingbox.left
    touching, across = (
        shapely.box(edge - 100, TOP - 200, edge + inside, TOP - 100) for inside in (0, 100)
    )
    path = written(tmp_path, table(touching, touching, site=["pit", "pit"], who=["x", "y"]))
    report = tmp_path / "report.json"
    out, err = run("polygons", path, "--sites", sites, "--compare", "who", "--json", report)
    assert err == ""
    for row in compared(out):
        assert [
            float(row[name])
            for name in ("area_km2", "other_area_km2", "intersection_km2", "union_km2")
        ] == [0] * 4
        assert row["iou"] == row["raster_iou"] == "-"
    rows = json.loads(report.read_text())["comparison"]
    assert [(r["area_m2"], r["union_m2"], r["iou"], r["raster_iou"]) for r in rows] == [
        (0, 0, None, None)
    ] * 2
    one_touches = table(touching, across, site=["pit", "pit"], who=["x", "y"])
    out, _ = run(
        "polygons", written(tmp_path, one_touches, "b.gpkg"), "--sites", sites, "--compare", "who"
    )
    row = compared(out)[0]
    assert float(row["area_km2"]) == float(row["iou"]) == float(row["raster_iou"]) == 0
    assert float(row["other_area_km2"]) == pytest.approx(0.01, rel=2e-3)
    assert "raster_area_off" not in row
    assert float(row["other_raster_area_off"]) == pytest.approx(0, abs=1e-9)


def compared(out):
    """The rows of one site and of the pool in a printed comparison, by the columns' heads."""
    heads, _, *rows = (line.split() for line in out.splitlines()[-4:])
    return [dict(zip(heads, row, strict=True)) for row in rows]


def test_two_mappers_are_compared_with_rows_that_name_no_site(sites, tmp_path):
    one = written(tmp_path, table(A, B, site=["pit", None]), "one.gpkg")
    two = written(tmp_path, table(A, B, site=["PIT", "pit"]), "two.gpkg")
    report = tmp_path / "report.json"
    run("polygons", one, "--sites", sites, "--compare", two, "--json", report)
    (row,) = [row for row in json.loads(report.read_text())["comparison"] if row["site"] == "pit"]
    assert row["iou"] == pytest.approx(1)


@pytest.mark.parametrize("sites", [{}, {"site": [None]}, {"site": ["Kopalnia Bełża (Nord)"]}])
@pytest.mark.parametrize("others", [{}, {"site": [None]}])
def test_two_mappers_are_compared_without_an_area(tmp_path, sites, others):
    one = written(tmp_path, table(A, **sites), "one.gpkg")
    two = written(tmp_path, table(A, **others), "two.gpkg")
    run("polygons", one, "--compare", two, "--json", tmp_path / "report.json")
    assert [
        row["iou"] for row in json.loads((tmp_path / "report.json").read_text())["comparison"]
    ] == pytest.approx([1, 1])


def test_a_file_without_a_site_says_what_it_does_not_draw(store, tmp_path):
    path = written(tmp_path, table(A, OF_BIG, FAR))
    _, err = run("label", "--store", store, "--polygons", path)
    assert footprint(store, "pit", 2019) == (400, True)
    assert "1 of 3 polygons name no site, reach none of these sites and are left out: row 3" in err
    assert "drawn at each" not in err


def test_rows_of_a_site_that_the_store_has_not_are_named(store, tmp_path):
    path = written(tmp_path, table(A, B, B, OF_BIG, site=["pit", "Pitt", "Pitt", "Big_Pit"]))
    _, err = run("label", "--store", store, "--polygons", path)
    assert "left out, rows of sites that the store has not: Pitt (2)" in err


def test_sites_are_matched_alike_by_both_commands(store, sites, tmp_path):
    path = written(tmp_path, table(A, OF_BIG, SITE=["PIT", "big  pit"]))
    _, err = run("label", "--store", store, "--polygons", path)
    assert footprint(store, "Big_Pit", 2019) == (25, True)
    assert "'PIT' is pit, 'big  pit' is Big_Pit" in err
    out, err = run("polygons", path, "--sites", sites)
    assert "'PIT' is pit, 'big  pit' is Big_Pit" in err
    assert "nothing to repair" in out


def test_a_site_that_may_be_two_is_refused(store, tmp_path):
    site = site_of("big-pit", LEFT + 3000, TOP, 60, 60)
    cube.create_site(
        cube.Store(store), site, grid_of(site), [2019], load_recipes()["annual-median"]
    )
    path = written(tmp_path, table(OF_BIG, site=["BIG PIT"]))
    _, err = run("label", "--store", store, "--polygons", path, ok=2)
    assert "site 'BIG PIT' may be Big_Pit or big-pit; spell it as one of them" in err


def test_numbers_with_a_gap_name_the_same_sites(tmp_path):
    places = [site_of("x", LEFT + x, TOP, 60, 60).geometry for x in PLACES.values()]
    path = written(
        tmp_path, gpd.GeoDataFrame({"id": [7.0, 8.0]}, geometry=places, crs=4326), "numbers.gpkg"
    )
    out, _ = run("sites", "--sites", path)
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["7", "8"]
    mines = written(tmp_path, table(A, OF_BIG, B, site=[7, 8, None]))
    out, _ = run("polygons", mines, "--sites", path)
    assert "unknown site" not in out


# --- years, tiny polygons, output ---------------------------------------------------------------------------------------


def test_a_column_of_dates_that_is_not_read_is_named_with_the_years(store, sites, tmp_path):
    path = written(tmp_path, table(A, B, date=["2019-06-01", "2022-06-01"]))
    _, err = run("label", "--store", store, "--polygons", path, "--sites", "pit")
    assert (
        "column `date` may hold years, but only the columns `year`, or `start` and `end`, are read as years"
        in err
    )
    assert "pit: rows without years are drawn in 2019, 2022" in err
    assert [footprint(store, "pit", year)[0] for year in (2019, 2022)] == [500, 500]
    _, err = run("polygons", path, "--sites", sites)
    assert "column `date` may hold years" in err
    run(
        "label",
        "--store",
        store,
        "--sites",
        "pit",
        "--polygons",
        written(tmp_path, table(A, YEAR=["2022-06-01"]), "y.gpkg"),
    )
    assert [footprint(store, "pit", year) for year in (2019, 2022)] == [(0, False), (400, True)]


def test_polygons_that_hold_no_centre_are_counted(store, tmp_path):
    tiny, strip = box(141, 101, 3, 4), box(351, 100, 3, 200)
    path = written(tmp_path, table(tiny, A, strip))
    _, err = run("label", "--store", store, "--polygons", path, "--sites", "pit")
    assert "pit: 2 of 3 polygons hold no pixel's centre (rows 1, 3)" in err
    assert "`footprint_fraction` has their area" in err
    fraction = (
        cube.open_cube(cube.Store(store), "pit")["footprint_fraction"].sel(year=2019).to_numpy()
    )
    assert fraction.sum() / 250 * 100 == pytest.approx(
        40_000 + 600, rel=1e-3
    )  # the tiny one lies within A
    _, err = run(
        "label",
        "--store",
        store,
        "--polygons",
        written(tmp_path, table(A), "a.gpkg"),
        "--sites",
        "pit",
    )
    assert "centre" not in err
    sited = table(A, OF_BIG, strip, site=["pit", "Big_Pit", "pit"])
    _, err = run("label", "--store", store, "--polygons", written(tmp_path, sited, "sited.gpkg"))
    assert "pit: 1 of 2 polygons hold no pixel's centre (row 3)" in err
    assert "Big_Pit:" not in err


def test_collections_lose_their_lines_by_name(store, tmp_path):
    line = shapely.LineString([(LEFT, TOP), (LEFT + 300, TOP)])
    path = written(tmp_path, table(shapely.GeometryCollection([A, line]), B))
    _, err = run("label", "--store", store, "--polygons", path, "--sites", "pit")
    assert footprint(store, "pit", 2019) == (500, True)
    assert "row 1 were kept, left out: 1 LineString" in err
    out, _ = run("polygons", path)
    (said,) = [line for line in out.splitlines() if line.startswith("collection")]
    assert said.endswith("areas kept  left out: 1 LineString")


@pytest.mark.parametrize(
    "columns",
    [
        {"fid": [1, 1, 2]},
        {"FID": ["a", "b", "c"]},
        {"Fid": [1.5, None, 2]},
        {"fid": [-1, 0, 1], "fid_1": ["x", "y", "z"]},
        {"geom": ["a", "b", "c"]},
    ],
)
def test_no_column_breaks_the_output(tmp_path, columns):
    rows = table(A, B, OF_BIG, **columns)
    rows.to_parquet(tmp_path / "mines.parquet")
    run("polygons", tmp_path / "mines.parquet", "--out", tmp_path / "out.gpkg")
    found = gpd.read_file(tmp_path / "out.gpkg")
    assert len(found) == 3
    for name, values in columns.items():
        pd.testing.assert_series_equal(found[name], pd.Series(values, name=name), check_dtype=False)


def test_columns_that_differ_in_case_and_a_second_geometry_are_written(tmp_path):
    rows = table(A, B, Owner=["a", "b"], owner=["c", "d"]).assign(middle=lambda t: t.centroid)
    rows.to_parquet(tmp_path / "mines.parquet")
    _, err = run("polygons", tmp_path / "mines.parquet", "--out", tmp_path / "out.gpkg")
    found = gpd.read_file(tmp_path / "out.gpkg")
    assert found["Owner"].tolist() == ["a", "b"]
    assert found["owner_1"].tolist() == ["c", "d"]
    assert found["middle"][0].startswith("POINT")
    assert "owner is owner_1" in err


def test_a_column_of_mappers_is_found_in_any_case(tmp_path):
    path = written(tmp_path, table(A, B, SOURCE=["x", "y"]), "mines.shp")
    assert "pooled" in run("polygons", path, "--compare", "source")[0]
    _, err = run("polygons", path, "--compare", "mapper", ok=2)
    assert "has no column 'mapper' that says who mapped a row; its columns are SOURCE" in err


def test_names_become_ids_of_groups_and_titles(tmp_path):
    site = site_of("x", LEFT, TOP, 60, 60).geometry
    rows = gpd.GeoDataFrame(
        {"id": ["way/10001"], "name": ["Kamieniołom Górny"]}, geometry=[site], crs=4326
    )
    out, err = run("sites", "--sites", written(tmp_path, rows, "osm.geojson"))
    assert out.splitlines()[0].split()[-1] == "title"
    assert out.splitlines()[-1].split()[0] == "way_10001"
    assert out.splitlines()[-1].endswith("Kamieniołom Górny")
    assert "'way/10001' is way_10001" in err
    assert "title" not in run("sites", "--sites", "demo_1")[0]


def test_a_group_keeps_the_title(tmp_path):
    site = site_of("x", LEFT, TOP, 60, 60)
    titled = type(site)(id="way_1", title="Kamieniołom Górny", geometry=site.geometry)
    cube.create_site(
        cube.Store(tmp_path / "c.zarr"),
        titled,
        grid_of(titled),
        [2019],
        load_recipes()["annual-median"],
    )
    assert (
        zarr.open_group(tmp_path / "c.zarr" / "way_1", mode="r").attrs["minecube"]["title"]
        == "Kamieniołom Górny"
    )
    assert np.array_equal(
        cube.read_grid_and_years(cube.Store(tmp_path / "c.zarr"), "way_1")[1], [2019]
    )
