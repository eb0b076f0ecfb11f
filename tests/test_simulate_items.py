"""Items and files of simulated archives look like the providers' own; bad settings are refused."""

from __future__ import annotations

import dataclasses
import json
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import odc.geo.xr  # noqa: F401 - the .odc accessor
import pandas as pd
import pyarrow.parquet as pq
import pystac
import pytest
import rasterio
import rasterio.warp
import stac_geoparquet.arrow
import xarray as xr
from pystac.validation import validate_dict
from rio_cogeo.cogeo import cog_validate
from shapely.geometry import shape

from known_scenes import site_of
from known_simulations import SHIPPED, STYLES, acquisition, items, prop, read, simulate_small
from minecube.catalog import Site, load_sources
from minecube.errors import CatalogError
from minecube.simulate import World, simulate_archive


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate_small(tmp_path_factory.mktemp("simulated"))


@pytest.mark.parametrize("style", STYLES)
def test_items_are_valid_stac_and_come_back_from_geoparquet_whole(world: Path, style: str) -> None:
    listed = {
        i["id"]: i
        for i in stac_geoparquet.arrow.stac_table_to_items(
            pq.read_table(world / f"{style}.parquet")
        )
    }
    written = items(world, style)
    assert list(listed) == [
        i["id"] for i in sorted(written, key=lambda i: (i["properties"]["datetime"], i["id"]))
    ]
    for item in written:
        validate_dict(
            pystac.Item.from_dict(item).to_dict(include_self_link=False, transform_hrefs=False),
            extensions=[],
        )
        back = listed[item["id"]]
        assert back["properties"] == item["properties"]
        assert shape(back["geometry"]).equals(shape(item["geometry"]))
        assert shape(item["geometry"]).exterior.is_ccw  # RFC 7946
        for key, asset in back["assets"].items():
            assert (world / asset["href"]).is_file()  # relative to the parquet file
            assert asset["href"].endswith(item["assets"][key]["href"].removeprefix("./"))
            assert {**asset, "href": ""} == {**item["assets"][key], "href": ""}


@pytest.mark.parametrize(
    ("style", "folder"),
    [
        ("earth-search", "earthsearch_l2a"),
        ("planetary-computer", "planetary_computer"),
        ("cdse", "cdse"),
    ],
)
def test_items_say_what_the_providers_items_say_and_nothing_they_do_not(
    world: Path, real_data: Path, style: str, folder: str
) -> None:
    real = [
        json.loads(p.read_text())
        for p in sorted((real_data / "stac_items" / folder).glob("*.json"))
    ]
    keys = {k for i in real for k in i["properties"]}
    for item in items(world, style):
        assert set(item["properties"]) - {"minecube:simulated"} <= keys
        assert item["stac_version"] == real[0]["stac_version"]
        assert set(item["stac_extensions"]) <= {e for r in real for e in r["stac_extensions"]}
        assert re.sub(r"\d", "9", item["id"].replace("S2B", "S2A"))[:4] == "S9A_"
        shapes = {
            re.sub(
                r"[0-9]",
                "9",
                re.sub(r"(?<=[0-9])[A-Z]{3}(?=_)", "XXX", r["id"].replace("S2B", "S2A")),
            )
            for r in real
        }
        assert (
            re.sub(
                r"[0-9]",
                "9",
                re.sub(r"(?<=[0-9])[A-Z]{3}(?=_)", "XXX", item["id"].replace("S2B", "S2A")),
            )
            in shapes
        )
        for key, asset in item["assets"].items():
            of = {k for r in real if key in r["assets"] for k in r["assets"][key]}
            assert set(asset) <= of
        for name in ("datatake_id", "datastrip_id"):
            patterns = {re.sub(r"[0-9]", "9", prop(r, name)[:15]) for r in real}
            assert re.sub(r"[0-9]", "9", prop(item, name)[:15]) in patterns


def test_sources_have_the_providers_rules(world: Path) -> None:
    made, shipped = load_sources(world / "sources.yaml"), SHIPPED
    assert list(made) == [f"sim-{s}" for s in STYLES]
    for style in STYLES:
        source = made[f"sim-{style}"]
        assert source.kind == "stac-geoparquet"
        assert Path(source.href) == world / f"{style}.parquet"
        assert (source.assets, source.offset) == (shipped[style].assets, shipped[style].offset)


def test_files_are_cogs_with_nodata_at_their_own_resolution(world: Path) -> None:
    for style in STYLES:
        item = items(world, style)[-1]
        for band, key in SHIPPED[style].assets.items():
            path = world / style / item["id"] / item["assets"][key]["href"]
            valid, errors, warnings = cog_validate(path)
            assert valid
            assert not errors
            assert not warnings
            with rasterio.open(path) as file:
                assert file.res == ((10, 10) if band in ("B02", "B03", "B04", "B08") else (20, 20))
                assert file.nodata == 0
                assert file.dtypes == ("uint8",) if band == "SCL" else ("uint16",)


def pixels_of(world: Path, site: str, year: int) -> dict[str, bytes]:
    truth = xr.open_zarr(world / "truth.zarr", group=site, consolidated=False).load()
    inside = truth.odc.geobox.geographic_extent.geom
    found = {
        f"truth {n}": truth[n].sel(year=year).values.tobytes() for n in ("reflectance", "footprint")
    }
    found["truth sky"] = truth.sky.sel(time=str(year)).values.tobytes()
    for item in items(world, "cdse", year):
        if shape(item["geometry"]).intersects(inside):
            for band in ("B02", "B11", "SCL"):
                found[
                    "/".join(
                        [*acquisition(item)[::2], item["assets"]["SCL_20m"]["proj:code"], band]
                    )
                ] = read(world, "cdse", item, band).tobytes()
    return found


def test_a_scene_depends_on_nothing_but_seed_site_and_date(tmp_path: Path) -> None:
    a, b = site_of("a", 360000, 5600040, 48, 60), site_of("b", 390000, 5580000, 54, 48)
    few = {"dates_per_year": 2, "winter_dates": 0}
    simulate_archive([a, b], tmp_path / "both", World(years=(2019, 2023), styles=("cdse",), **few))
    simulate_archive(
        [b], tmp_path / "alone", World(years=(2023,), styles=("planetary-computer", "cdse"), **few)
    )
    simulate_archive([b], tmp_path / "other", World(years=(2023,), styles=("cdse",), seed=1, **few))
    both, alone, other = (pixels_of(tmp_path / n, "b", 2023) for n in ("both", "alone", "other"))
    assert len(both) > 10
    assert both == alone
    assert {k for k in both if k in other and both[k] == other[k]} == set()
    # The two sites lie in one MGRS square; no item of one hides the other's.
    ids = [i["id"] for i in items(tmp_path / "both", "cdse")]
    assert len({i.split("_")[5] for i in ids}) == 6


def test_styles_take_turns_when_each_site_has_one(tmp_path: Path) -> None:
    sites = [site_of(n, 360000 + 30000 * k, 5600040, 48, 48) for k, n in enumerate(("a", "b", "c"))]
    said: list[str] = []
    world = World(
        years=(2023,),
        dates_per_year=2,
        winter_dates=0,
        styles=("cdse", "earth-search"),
        one_style_per_site=True,
    )
    simulate_archive(sites, tmp_path / "out", world, progress=said.append)
    assert said == ["a 2023", "b 2023", "c 2023"]
    made = ["cdse", "cdse.parquet", "earth-search", "earth-search.parquet", "sources.yaml"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        *made,
        "truth.zarr",
        "truth_footprints.parquet",
        "truth_offsets.parquet",
        "truth_values.parquet",
    ]
    for style, of in (("cdse", (0, 2)), ("earth-search", (1,))):
        areas = [shape(i["geometry"]).centroid for i in items(tmp_path / "out", style)]
        nearest = {min(range(3), key=lambda k: p.distance(sites[k].geometry)) for p in areas}
        assert nearest == set(of)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"years": ()}, "years"),
        ({"years": (2014,)}, "2015"),
        ({"years": (2020, 2020)}, "once"),
        ({"years": (2020,), "dates_per_year": 0}, "dates_per_year"),
        ({"years": (2015,), "sparse_dates": 0}, "sparse_dates"),
        ({"years": (2020,), "winter_dates": -1}, "winter_dates"),
        ({"years": (2020,), "styles": ("sentinel-hub",)}, "sentinel-hub"),
        ({"years": (2020,), "styles": ()}, "styles"),
        ({"years": (2020,), "styles": ("cdse", "cdse")}, "once"),
        ({"years": (2020,), "seed": -1}, "seed"),
        ({"years": (2015,), "sparse_dates": 60}, "at most 24 dates in 2015"),
    ],
)
def test_a_world_that_cannot_be_is_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(CatalogError, match=re.escape(says)):
        World(**wrong)


def test_bad_sites_and_folders_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    fine, tiny = (
        site_of("fine", 360000, 5600040, 48, 48),
        site_of("tiny", 360000, 5600040, 12, 48),
    )
    world = World(years=(2023,), dates_per_year=1)
    for sites, says in (
        ([], "one site"),
        ([fine, fine], "once"),
        ([tiny], "48 pixels"),
        ([Site(id="null")], "null"),
    ):
        with pytest.raises(CatalogError, match=says):
            simulate_archive(sites, tmp_path / "out", world)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(CatalogError, match="cannot be written"):
        simulate_archive([fine], tmp_path / "file" / "out", world)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(CatalogError, match="empty"):
        simulate_archive([fine], tmp_path / "full", world)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "full", "mine.txt"]


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file of this process grows beyond so many bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    """The images fit, and the index of them does not."""
    with (
        files_up_to(50_000),
        pytest.raises(CatalogError, match=r"cannot be written .*File too large"),
    ):
        simulate_archive(
            [site_of("a", 360000, 5600040, 48, 48)],
            tmp_path / "out",
            World(years=(2023,), dates_per_year=1),
        )
    assert list(tmp_path.iterdir()) == []


def test_flags_that_are_wrong_in_either_way(tmp_path: Path) -> None:
    """Beside a world whose flags are right: the truth says what each item's pixels carry on top of that world's."""
    site = site_of("a", 360000, 5600040, 48, 48)
    right = World(years=(2022,), dates_per_year=6, winter_dates=0, styles=("earth-search",))
    simulate_archive([site], tmp_path / "right", right)
    simulate_archive([site], tmp_path / "wrong", dataclasses.replace(right, wrong_flags=1.0))
    truth = pd.read_parquet(tmp_path / "wrong" / "truth_offsets.parquet").set_index("id")
    assert truth.misflagged.all()
    assert set(truth.carried) == {0, 1000}
    for name, carried in truth.carried.items():
        item = json.loads((tmp_path / "wrong" / "earth-search" / name / "item.json").read_text())
        assert item["properties"]["earthsearch:boa_offset_applied"] is (carried == 1000)
        pixels = []
        for world in ("right", "wrong"):
            with rasterio.open(tmp_path / world / "earth-search" / name / "B04.tif") as src:
                pixels.append(src.read(1).astype(int))
        seen = pixels[0] > 1  # noise below 0 was cut at 1, where nothing is on top
        assert (pixels[1] - pixels[0])[seen].tolist() == [carried] * seen.sum()
    assert not pd.read_parquet(tmp_path / "right" / "truth_offsets.parquet").misflagged.any()
