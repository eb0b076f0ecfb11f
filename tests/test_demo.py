"""The whole job, as the README says: `minecube demo` and what it must reach."""

from __future__ import annotations

import json
import subprocess
import sys

import geopandas as gpd
import pystac
import pytest
import rasterio
import xarray as xr

from minecube import cube

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(folder, what it printed): the demo in a process of its own."""
    out = tmp_path_factory.mktemp("demo") / "demo"
    command = [
        sys.executable,
        "-c",
        "from minecube.cli import main; main()",
        "demo",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_what_it_must_reach(demo):
    summary = json.loads((demo[0] / "summary.json").read_text())
    assert summary["composite_rmse"] <= min(0.015, summary["composite_rmse_naive"] / 5)
    assert summary["residual_cloud_pct"] <= 0.5
    assert summary["holes_pct"] == 0
    assert (
        min(summary["map_iou_2020"], summary["map_iou_2022"]) >= 0.85
    )  # the years with enough scenes
    assert summary["composite_rmse_mine"] <= 1.5 * summary["composite_rmse"]
    assert summary["peak_rss_mb"] <= 3000
    for key in ("map_iou", "ca_tiou", "change_f1", "area_error_pct", "seconds"):
        assert summary[key] > 0
    # Better than calling no change, which scores zero.
    assert summary["change_f1"] > 0.5


def test_it_prints_the_summary_as_a_table(demo):
    out, printed = demo
    for key, value in json.loads((out / "summary.json").read_text()).items():
        (line,) = [line for line in printed.splitlines() if line.split()[:1] == [key]]
        assert float(line.split()[1]) == pytest.approx(value, rel=2e-3)


def test_what_it_leaves_opens_in_other_tools(demo):
    out, _ = demo
    collection = pystac.Collection.from_file(str(out / "export" / "collection.json"))
    assert {i.id for i in collection.get_items(recursive=True)} == {
        f"demo_{n}_{y}" for n in (1, 2, 3) for y in (2015, 2020, 2022)
    }
    with rasterio.open(out / "export" / "demo_3" / "demo_3_2022_reflectance.tif") as src:
        cubes = xr.open_zarr(out / "cubes.zarr", group="demo_3", consolidated=False)
        assert (src.read() == cubes.reflectance.sel(year=2022).values).all()
    mapped = gpd.read_parquet(out / "export" / "footprints_mapped.parquet")
    assert set(mapped.site) == {"demo_1", "demo_2", "demo_3"}
    for name in ("comparison.png", "export/areas.png", "export/demo_3/demo_3_strip.png"):
        assert (out / name).stat().st_size > 20_000


def test_each_provider_took_part(demo):
    used = set()
    for site in cube.list_sites(cube.Store(demo[0] / "cubes.zarr")):
        for build in cube.read_markers(cube.Store(demo[0] / "cubes.zarr"), site).values():
            used |= {(s["source"], s["offset"]) for s in build["scenes"]}
    assert {source for source, _ in used} == {
        "sim-earth-search",
        "sim-planetary-computer",
        "sim-cdse",
    }
    assert {("sim-cdse", -1000), ("sim-earth-search", 0), ("sim-planetary-computer", -1000)} <= used


def test_a_folder_that_is_not_empty_is_left_alone(demo):
    command = [
        sys.executable,
        "-c",
        "from minecube.cli import main; main()",
        "demo",
        "--out",
        str(demo[0]),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "is not empty" in done.stderr
