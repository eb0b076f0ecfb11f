"""The command `polygons` reports, writes and compares, and refuses mistakes."""

from __future__ import annotations

import json

import geopandas as gpd
import pytest
import shapely

from known_polygons import GRID, SITES, box, lonlat_mines, run, table, written
from minecube.labels import rasterize, read_polygons


def test_sites_without_a_place_cannot_be_held_against(tmp_path):
    _, said = run(
        "polygons", written(tmp_path, table([box(0, 0, 100, 100)])), "--sites", "Germany_1", ok=2
    )
    assert (
        "Germany_1: the catalogue has no place for them yet, so nothing can be compared with it"
        in said
    )


@pytest.mark.parametrize("out", ["repaired.parquet", "repaired.gpkg"])
def test_the_command_reports_and_writes_what_it_repaired(tmp_path, out):
    drawn = table(
        [box(0, 0, 100, 100), box(60, 0, 100, 100), box(300, 0, 3, 100)],
        year=[2019, 2019, 2019],
        site=["pit"] * 3,
    )
    path = written(tmp_path, drawn, "mines.gpkg")
    said, _ = run("polygons", path, "--out", tmp_path / out, "--json", tmp_path / "report.json")
    assert "3 rows, 2 kept" in said
    assert "cut from this row" in said
    assert "sliver" in said
    repaired = read_polygons(tmp_path / out)
    assert repaired.area.tolist() == pytest.approx([10_000, 6000])
    assert repaired["row"].tolist() == [1, 2]
    assert rasterize(repaired, GRID, [2019]).sum() == 160
    report = json.loads((tmp_path / "report.json").read_text())
    assert [f["finding"] for f in report["findings"]] == ["overlap", "sliver"]
    assert report["findings"][0]["site"] == "pit"
    assert report["files"] == {str(path): {"rows": 3, "kept": 2, "crs": "EPSG:32633"}}
    assert report["areas"][0]["area_m2"] == pytest.approx(16_000, rel=2e-3)
    assert report["comparison"] == []


def test_the_command_compares_a_column_or_a_second_file(tmp_path):
    drawn = table([box(0, 0, 200, 100), box(100, 0, 200, 100)], who=["x", "y"])
    path = written(tmp_path, drawn, "both.gpkg")
    said, _ = run("polygons", path, "--compare", "who", "--json", tmp_path / "r.json")
    assert "nothing to repair" in said
    one, two = (written(tmp_path, drawn.iloc[[n]], f"{n}.geojson") for n in (0, 1))
    run("polygons", one, "--compare", two, "--json", tmp_path / "s.json")
    for name in ("r.json", "s.json"):
        row = json.loads((tmp_path / name).read_text())["comparison"][0]
        assert row["iou"] == pytest.approx(1 / 3, rel=1e-3)
        assert row["raster_iou"] == pytest.approx(1 / 3, abs=0.02)
        assert row["year"] is None


def test_the_command_on_a_site_of_another_place(tmp_path):
    sites = gpd.GeoDataFrame({"id": list(SITES)}, geometry=list(SITES.values()), crs=4326)
    written(tmp_path, sites, "sites.geojson")
    shapes = lonlat_mines()
    shapes[0] = shapely.transform(shapes[0], lambda xy: xy[:, ::-1])
    path = written(tmp_path, table(shapes, "EPSG:4326", site=["a", "b", "b"]), "mines.gpkg")
    said, _ = run(
        "polygons", path, "--sites", tmp_path / "sites.geojson", "--out", tmp_path / "o.gpkg", ok=1
    )
    assert "with longitude and latitude swapped, it would lie there" in said
    assert len(gpd.read_file(tmp_path / "o.gpkg")) == 2
    world = written(
        tmp_path,
        table(
            [*lonlat_mines(), *[shapely.box(x, 1, x + 0.1, 1.1) for x in range(30)]], "EPSG:4326"
        ),
    )
    said, _ = run("polygons", world, "--sites", tmp_path / "sites.geojson")
    assert "33 rows, 3 kept" in said
    assert [line.split()[:6] for line in said.splitlines() if "at no site" in line] == [
        ["at", "no", "site", "left", "out", "30"]
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["mines.gpkg", "--compare", "mapper"], "has no column 'mapper'"),
        (["mines.gpkg", "--compare", "who"], "names x only; a comparison takes two mappers"),
        (["mines.gpkg", "--compare", "nowhere.gpkg"], "nowhere.gpkg: cannot be read"),
        (["other.gpkg", "--compare", "far.gpkg"], "nothing to compare"),
        (["nowhere.gpkg"], "nowhere.gpkg: cannot be read"),
        (["mines.gpkg", "--out", "o.csv"], "expected a name in .parquet or .gpkg"),
        (["mines.gpkg", "--sites", "Atlantis_1"], "unknown site 'Atlantis_1'"),
        (["mines.gpkg", "--sites", "demo_*"], "no polygon lies within 10 km of its site"),
        (["wide.gpkg", "--compare", "who"], "name the sites they are of"),
    ],
)
def test_mistakes_are_one_sentence_and_nothing_is_written(tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, table([box(0, 0, 100, 100)], who=["x"]), "mines.gpkg")
    written(
        tmp_path,
        table([box(0, 0, 100, 100), box(0, 200, 99, 99)], site=["a", "a"], who=["x", "y"]),
        "far.gpkg",
    )
    written(tmp_path, table([box(0, 0, 100, 100)], site=["b"]), "other.gpkg")
    written(
        tmp_path, table([box(0, 0, 100, 100), box(0, 300_000, 99, 99)], who=["x", "y"]), "wide.gpkg"
    )
    before = sorted(p.name for p in tmp_path.iterdir())
    extra = [] if "--out" in arguments else ["--out", "o.parquet"]
    _, err = run("polygons", *arguments, *extra, "--json", "o.json", ok=2)
    assert says in err
    assert err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == before
