"""A build plans and counts its reads, and treats lost ones and wrong offsets by its options."""

from __future__ import annotations

import shutil

import geopandas as gpd
import numpy as np
import pytest
import rasterio
import xarray as xr
import yaml

from known_builds import args, items_of, messages_in, run, write_items
from minecube import cube


def test_a_missing_and_a_truncated_file_fail_one_site_year_each_and_nothing_else(world, tmp_path):
    shutil.copytree(world / "archive", tmp_path / "archive")
    shutil.copy(world / "sites.geojson", tmp_path)
    # A file that the composite needs: of the clearest summer scene.
    victims = sorted((tmp_path / "archive" / "earth-search").glob("*_20220[5-9]*/B04.tif"))
    for path in victims:
        path.unlink()
    out, err = run("build", *args(tmp_path, tmp_path / "cubes.zarr"), ok=1)
    assert out.count("built") == 1
    assert "B04.tif: cannot be read" in err
    assert "No such file" in err
    assert list(cube.read_markers(cube.Store(tmp_path / "cubes.zarr"), "pit")) == [2020]
    for path in sorted((tmp_path / "archive" / "earth-search").glob("*_20200[5-9]*/B08.tif")):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    out, err = run("build", *args(tmp_path, tmp_path / "cubes2.zarr"), ok=1)
    assert "2 of 2 site-years failed" in err
    assert "B08.tif: cannot be read" in err
    assert cube.read_markers(cube.Store(tmp_path / "cubes2.zarr"), "pit") == {}


def test_a_later_source_fills_what_the_first_lacks(world, tmp_path):
    """The first source lists half of the acquisitions: those come from it, the others from the second, none from both."""
    shutil.copytree(world / "archive", tmp_path / "archive")
    shutil.copy(world / "sites.geojson", tmp_path)
    known = yaml.safe_load((tmp_path / "archive" / "sources.yaml").read_text())
    items = items_of(tmp_path / "archive" / "earth-search.parquet")
    takes = sorted({i["properties"]["s2:datatake_id"][:25] for i in items})
    half = [i for i in items if i["properties"]["s2:datatake_id"][:25] in takes[::2]]
    write_items(half, tmp_path / "archive" / "half.parquet")
    known["half"] = {**known["sim-earth-search"], "href": "half.parquet"}
    (tmp_path / "archive" / "sources.yaml").write_text(yaml.safe_dump(known))
    whole, mixed = tmp_path / "whole.zarr", tmp_path / "mixed.zarr"
    run("build", *args(tmp_path, whole, years="2022"))
    run("build", *args(tmp_path, mixed, years="2022", source="half,sim-earth-search"))
    provenance = cube.read_markers(cube.Store(mixed), "pit")[2022]
    by_source = {
        s: {x["id"] for x in provenance["scenes"] if x["source"] == s}
        for s in ("half", "sim-earth-search")
    }
    assert all(by_source.values())
    assert by_source["half"] == {x["id"] for x in provenance["scenes"]} & {i["id"] for i in half}
    assert sorted(i for ids in by_source.values() for i in ids) == sorted(
        x["id"] for x in cube.read_markers(cube.Store(whole), "pit")[2022]["scenes"]
    )
    one, other = (
        xr.open_zarr(s, group="pit", consolidated=False).drop_attrs() for s in (whole, mixed)
    )
    xr.testing.assert_identical(one.load(), other.load())


def test_provenance_tells_the_reads(world, built):
    """Planned and read agree with the scenes and bands of the composite, by hand."""
    made, reads = (
        cube.read_markers(cube.Store(built), "pit")[2022],
        cube.read_counts(cube.Store(built), "pit", 2022),
    )
    totals = made["reads"]
    assert totals["completeness"] == 1
    assert totals["lost"] == totals["retried"] == totals["requests"] == 0  # local files
    assert totals["read"] == totals["planned"] == reads.planned.sum()
    assert totals["bytes"] == reads.bytes.sum() > 0
    ids = {s["id"] for s in made["scenes"]}
    assert set(reads.scene) <= ids
    assert (
        set(reads[reads.band == "SCL"].scene) == ids
    )  # the mask of every scene, the bands of those that are needed
    assert (made["offset_conflicts"], made["refused"], made["on_offset_conflict"]) == (
        [],
        {},
        "drop",
    )
    assert len(made["snapshot"]) == 64


def test_a_plan_holds(world, tmp_path):
    """What is read is at most what was planned, and not far from it; the plan writes nothing and works with the API gone."""
    prices = tmp_path / "prices.yaml"
    prices.write_text("per_1000_requests: 0.0004\nper_gb: 0.09\ncurrency: EUR\n")
    out, _ = run("plan", *args(world, tmp_path / "new.zarr"), "--prices", prices)
    assert "cost EUR" in out
    assert "nothing was read or written" in out
    assert not (tmp_path / "new.zarr").exists()
    assert "(a guess, since this store has no builds to compare with" in out
    rows = {line.split()[1]: line.split() for line in out.splitlines() if line.startswith("pit")}
    out, _ = run("build", *args(world, tmp_path / "new.zarr"))
    assert "planned, at most" in out
    built = {line.split()[1]: line.split() for line in out.splitlines() if "  built" in line}
    for year, made in cube.read_markers(cube.Store(tmp_path / "new.zarr"), "pit").items():
        megabytes = (made["reads"]["bytes"] + made["check_reads"]["bytes"]) / 1e6
        planned_mb = rows[str(year)][rows[str(year)].index("build") + 6]
        assert built[str(year)][-4:-1] == ["0", f"{megabytes:.1f}", planned_mb]
    for year in ("2020", "2022"):
        planned_reads = int(rows[year][rows[year].index("build") + 3])
        totals = cube.read_markers(cube.Store(tmp_path / "new.zarr"), "pit")[int(year)]["reads"]
        assert planned_reads / 3 < totals["planned"] <= planned_reads
    out, _ = run("plan", *args(world, tmp_path / "new.zarr"))
    assert out.count("committed") == 2
    assert "expected time: 0 s in all" in out
    assert "(from 2 builds in this store, which took" in out
    for made in cube.read_markers(cube.Store(tmp_path / "new.zarr"), "pit").values():
        took = made["took"]
        assert took["checks"] == made["check_reads"]["planned"]
        assert took["reads"] >= made["reads"]["planned"]
        assert took["seconds"] > 0
    prices.write_text("per_gigabit: 1\n")
    _, err = run("plan", *args(world, tmp_path / "new.zarr"), "--prices", prices, ok=2)
    assert "prices.yaml: field 'per_gigabit': expected one of latency_s" in err


def test_a_lost_read_may_be_allowed(world, tmp_path):
    """One file gone: refused, then committed with what is there, and the cube says so."""
    shutil.copytree(world / "archive", tmp_path / "archive")
    shutil.copy(world / "sites.geojson", tmp_path)
    sorted((tmp_path / "archive" / "earth-search").glob("*_20220[5-9]*/B11.tif"))[-1].unlink()
    store = tmp_path / "cubes.zarr"
    run("build", *args(tmp_path, store), ok=1)
    out, err = run("build", *args(tmp_path, store), "--min-read-completeness", "0.9")
    assert (out.count("built"), out.count("kept")) == (1, 1), err
    share = cube.read_markers(cube.Store(store), "pit")[2022]["reads"]["completeness"]
    assert 0.9 < share < 1
    assert xr.open_zarr(store, group="pit", consolidated=False).attrs["incomplete_reads"] == {
        "2022": share
    }
    reads = cube.read_counts(cube.Store(store), "pit", 2022)
    assert reads[reads.lost > 0].band.tolist() == ["B11"]
    assert "No such file" in reads[reads.lost > 0].reason.item()
    out, err = run("build", *args(tmp_path, store))  # accepted once, it stays
    assert out.count("kept") == 2
    advice = f"pit 2022: has {share:.2%} of its reads; use --overwrite to build it again"
    assert messages_in(err) == [advice]
    _, err = run("build", *args(tmp_path, store), "--overwrite", ok=1)
    assert "1 of 2 site-years failed; " in err
    assert (
        cube.read_markers(cube.Store(store), "pit")[2022]["reads"]["completeness"] == share
    )  # the old year stays


@pytest.mark.parametrize("policy", ["warn", "fix", "drop", "fail"])
def test_a_wrong_flag(world, built, tmp_path, policy):
    """A scene that says its offset is removed though it is not: all its numbers are 1000 too high."""
    shutil.copytree(world / "archive", tmp_path / "archive")
    shutil.copy(world / "sites.geojson", tmp_path)
    items = gpd.read_parquet(tmp_path / "archive" / "earth-search.parquet")
    clear = items[
        (items.datetime.dt.year == 2022) & items.datetime.dt.month.between(5, 9)
    ].sort_values("eo:cloud_cover")
    victim = clear.iloc[0]["id"]
    for path in (tmp_path / "archive" / "earth-search" / victim).glob("B*.tif"):
        with rasterio.open(path) as src:
            profile, pixels = src.profile, src.read(1)
        path.unlink()
        with rasterio.open(path, "w", **{**profile, "driver": "GTiff"}) as out:
            out.write(np.where(pixels == 0, 0, pixels + 1000).astype(np.uint16), 1)
    store = tmp_path / "cubes.zarr"
    out, err = run(
        "build",
        *args(tmp_path, store, years="2022"),
        "--on-offset-conflict",
        policy,
        ok=1 if policy == "fail" else 0,
    )
    if policy == "fail":
        assert "1 of" in err
        assert f"{victim}: offset 0 contradicts its pixels" in err
        assert cube.read_markers(cube.Store(store), "pit") == {}
        return
    made = cube.read_markers(cube.Store(store), "pit")[2022]
    (conflict,) = made["offset_conflicts"]
    assert (conflict["scene"], conflict["offset"], conflict["should_be"]) == (victim, 0, -1000)
    assert 850 < conflict["step"] < 1150
    plain, got = (
        xr.open_zarr(s, group="pit", consolidated=False).reflectance.sel(year=2022).values
        for s in (built, store)
    )
    if policy == "fix":
        np.testing.assert_array_equal(
            np.abs(got.astype(int) - plain) <= 1, True
        )  # what was 0 or 1 cannot be told any more
    else:
        assert (got != plain).any()
