"""The simulated archive is as real ones are, traps included, and the truth beside it is true: seen from its files."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import re
from collections import defaultdict
from datetime import date
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import odc.geo.xr  # noqa: F401 - the .odc accessor
import pandas as pd
import pyarrow.parquet as pq
import pystac
import pytest
import rasterio
import rasterio.warp
import shapely
import stac_geoparquet.arrow
import xarray as xr
from pyproj import Transformer
from pystac.validation import validate_dict
from rio_cogeo.cogeo import cog_validate
from scipy import ndimage
from shapely.geometry import box, shape

from minecube.catalog import BANDS, Site, load_sources
from minecube.errors import CatalogError
from minecube.grid import grid_of, padded
from minecube.simulate import MARGIN_M, World, archive, simulate
from minecube.simulate.land import draw_ground, draw_land
from minecube.simulate.mine import draw_mine
from minecube.simulate.noise import streams
from minecube.simulate.observe import observe
from minecube.simulate.passes import count_possible_dates, displace_scene, overpasses
from minecube.simulate.truth import compute_reflectance

STYLES = ("earth-search", "planetary-computer", "cdse")
SHIPPED = load_sources()
WORLD = World(years=(2020, 2022), dates_per_year=6, winter_dates=1)


def site_of(name: str, left: float, top: float, width: int, height: int) -> Site:
    """A site whose grid, in zone 33, has this corner and these sides in pixels; its polygon stays 3 m inside."""
    corners = box(left + 3, top - 10 * height + 3, left + 10 * width - 3, top - 3)
    to_lonlat = Transformer.from_crs(32633, 4326, always_xy=True).transform
    return Site(id=name, geometry=shapely.transform(corners, to_lonlat, interleaved=False))


@pytest.fixture(scope="module")
def place() -> Site:
    """120 x 96 pixels in zone 33; its neighbour is zone 32."""
    return site_of("small", 360000, 5600040, 120, 96)


@pytest.fixture(scope="module")
def world(place: Site, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("simulated") / "world"
    simulate([place], out, WORLD)
    return out


@pytest.fixture(scope="module")
def truth(world: Path) -> xr.Dataset:
    return xr.open_zarr(world / "truth.zarr", group="small", consolidated=False).load()


def items(world: Path, style: str, year: int | None = None) -> list[dict[str, Any]]:
    found = [json.loads(p.read_text()) for p in sorted((world / style).glob("*/item.json"))]
    return [i for i in found if year is None or i["properties"]["datetime"].startswith(str(year))]


def read(world: Path, style: str, item: dict[str, Any], band: str) -> np.ndarray:
    key = SHIPPED[style].assets[band]
    with rasterio.open(world / style / item["id"] / item["assets"][key]["href"]) as file:
        return file.read(1)


def prop(item: dict[str, Any], name: str) -> Any:
    """A property by Earth Search's name, whoever wrote the item."""
    p = item["properties"]
    return p.get(f"s2:{name}") or p.get(f"eopf:{name}")


def acquisition(item: dict[str, Any]) -> tuple[str, str, str]:
    """Datatake without its baseline, tile, start of the datastrip: the same for all processings everywhere."""
    strip = re.search(r"_S(\d{8}T\d{6})_", prop(item, "datastrip_id"))
    p = item["properties"]
    tile = p.get("s2:mgrs_tile") or p["grid:code"].removeprefix("MGRS-")
    assert strip
    return prop(item, "datatake_id").rpartition("_")[0], tile, strip.group(1)


def baseline(item: dict[str, Any]) -> str:
    p = item["properties"]
    return p.get("s2:processing_baseline") or p["processing:version"]


def on_site(
    world: Path, style: str, item: dict[str, Any], band: str, truth: xr.Dataset
) -> np.ndarray:
    """A band of an item on the site's 10 m grid, nearest neighbour, by GDAL's warper; 0 where it has no data."""
    grid = truth.odc.geobox
    out = np.zeros(grid.shape, dtype=np.uint16)
    key = SHIPPED[style].assets[band]
    with rasterio.open(world / style / item["id"] / item["assets"][key]["href"]) as file:
        rasterio.warp.reproject(
            rasterio.band(file, 1),
            out,
            dst_crs=str(grid.crs),
            dst_transform=grid.transform,
            src_nodata=0,
            dst_nodata=0,
        )
    return out


def newest(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    best: dict[tuple[str, str, str], dict[str, Any]] = {}
    for item in found:
        key = acquisition(item)
        if key not in best or baseline(item) > baseline(best[key]):
            best[key] = item
    return list(best.values())


def day_of(item: dict[str, Any]) -> str:
    return str(
        item["properties"]["datetime"][:10]
    )  # at 13 degrees east the solar day is the UTC day


# ---------------------------------------------------------------- radiometry


def test_one_acquisition_holds_the_same_reflectance_in_every_style_once_the_offset_is_gone(
    world: Path,
) -> None:
    kept = {s: {acquisition(i): i for i in newest(items(world, s))} for s in STYLES}
    assert set(kept["earth-search"]) == set(kept["planetary-computer"]) == set(kept["cdse"])
    below = 0
    for key, item in kept["earth-search"].items():
        after = day_of(item) >= "2022-01-25"
        scl = read(world, "earth-search", item, "SCL")
        for band in BANDS:
            clean = read(world, "earth-search", item, band).astype(int)
            seen = np.repeat(
                np.repeat(scl != 0, len(clean) // len(scl), axis=0), len(clean) // len(scl), axis=1
            ).astype(int)
            # Valid pixels are never 0, pixels without data always.
            assert ((clean != 0) == seen).all()
            for style, carried in (("planetary-computer", 1000 * after), ("cdse", 1000)):
                stored = read(world, style, kept[style][key], band).astype(int)
                assert ((stored != 0) == seen).all()
                np.testing.assert_array_equal(np.maximum(stored - carried, 1) * seen, clean)
                below += int(((stored < carried) & (seen == 1)).sum())
            if band == "B02":
                for style in STYLES[1:]:
                    np.testing.assert_array_equal(read(world, style, kept[style][key], "SCL"), scl)
    assert below > 0  # pixels that wrap around in uint16 arithmetic, and must come out as 1


def test_offset_is_declared_and_flagged_as_the_providers_do(world: Path) -> None:
    for item in items(world, "earth-search"):
        assert item["properties"]["earthsearch:boa_offset_applied"] is (baseline(item) >= "04.00")
        assert (
            item["assets"]["red"]["raster:bands"][0]["offset"] == -0.1
        )  # declared whatever the pixels are
    for item in items(world, "cdse"):
        assert item["assets"]["B04_10m"]["raster:offset"] == -0.1
    for item in items(world, "planetary-computer"):
        assert "offset" not in json.dumps(item)
        assert (baseline(item) >= "04.00") is (day_of(item) >= "2022-01-25")


def test_before_the_offset_earth_search_lists_an_old_and_a_new_baseline_and_the_old_one_is_worse(
    world: Path,
) -> None:
    pairs = defaultdict(list)
    for item in items(world, "earth-search"):
        pairs[acquisition(item)].append(item)
    for both in pairs.values():
        if day_of(both[0]) >= "2022-01-25":
            assert len(both) == 1
            continue
        old, new = sorted(both, key=baseline)
        assert (baseline(old), baseline(new)) == ("02.14", "05.00")
        assert int(old["properties"]["s2:sequence"]) < int(new["properties"]["s2:sequence"])
        before, after = (read(world, "earth-search", i, "B04").astype(float) for i in (old, new))
        valid = (before[1:, 1:] != 0) & (after[:-1, :-1] != 0) & (after[1:, 1:] != 0)
        moved = before[1:, 1:][valid] - after[:-1, :-1][valid]
        # The bias, and nothing else once the misregistration of one pixel is undone.
        assert 100 <= np.median(moved) <= 200
        assert (
            np.abs(moved - np.median(moved)).mean()
            < np.abs(before - after - np.median(moved))[1:, 1:][valid].mean()
        )
    assert {baseline(i) for i in items(world, "planetary-computer", 2020)} == {"02.12"}
    assert {baseline(i) for i in items(world, "cdse", 2020)} == {"05.00"}


# ---------------------------------------------------------------- geometry


def test_both_granules_of_a_split_datatake_are_needed(world: Path) -> None:
    for style in STYLES:
        for year in (2020, 2022):
            halves = defaultdict(list)
            for item in newest(items(world, style, year)):
                halves[acquisition(item)[:2]].append(item)
            split = [
                sorted(v, key=lambda i: acquisition(i)[2]) for v in halves.values() if len(v) == 2
            ]
            assert len(split) >= 1
            for north, south in split:
                assert day_of(north) == day_of(south)
                assert acquisition(north)[2] < acquisition(south)[2]
                a, b = (read(world, style, i, "B8A") for i in (north, south))
                assert a.shape == b.shape
                for part in (a, b):
                    assert 0.4 < (part != 0).mean() / ((a != 0) | (b != 0)).mean() < 0.6
                shared = (a != 0) & (b != 0)
                assert shared.any()
                np.testing.assert_array_equal(a[shared], b[shared])
                assert (a != 0).any(axis=1).argmax() < (b != 0).any(
                    axis=1
                ).argmax()  # the first seen lies north


def test_two_tiles_overlap_hold_the_same_pixels_and_cover_the_site_only_together(
    world: Path, truth: xr.Dataset
) -> None:
    by_day = defaultdict(dict)
    for item in newest(items(world, "cdse")):
        if item["assets"]["B04_10m"]["proj:code"] == "EPSG:32633" and "_R065_" in item["id"]:
            by_day[day_of(item)].setdefault(acquisition(item)[1], []).append(item)
    whole = [v for v in by_day.values() if len(v) == 2]
    assert whole
    for tiles in whole:
        seen = [
            np.max([on_site(world, "cdse", i, "B04", truth) for i in parts], axis=0)
            for parts in tiles.values()
        ]
        west, east = sorted(seen, key=lambda a: (a != 0).any(axis=0).argmax())
        both = (west != 0) & (east != 0)
        np.testing.assert_array_equal(west[both], east[both])
        assert 0.05 < both.mean() < 0.3
        assert not (west != 0).all()
        assert not (east != 0).all()
        assert ((west != 0) | (east != 0)).all()


def test_tiles_lie_on_the_archives_grid_and_reach_beyond_the_site(
    world: Path, truth: xr.Dataset
) -> None:
    left, bottom, right, top = truth.odc.geobox.extent.boundingbox.bbox
    for style in STYLES:
        for item in items(world, style):
            for key, asset in item["assets"].items():
                with rasterio.open(world / style / item["id"] / asset["href"]) as file:
                    assert [v % 60 for v in file.bounds] == [0, 0, 0, 0]
                    assert list(file.transform)[:6] == asset["proj:transform"]
                    assert list(file.shape) == asset["proj:shape"]
                    epsg = item["properties"].get("proj:epsg") or asset["proj:code"].removeprefix(
                        "EPSG:"
                    )
                    assert file.crs.to_epsg() == int(epsg)
                    if file.crs.to_epsg() == 32633:
                        assert file.bounds.bottom <= bottom - 200
                        assert file.bounds.top >= top + 200
                        assert file.bounds.left <= left - 200 or file.bounds.right >= right + 200
                    assert key in SHIPPED[style].assets.values()


def test_the_neighbouring_zone_shows_the_same_ground(world: Path, truth: xr.Dataset) -> None:
    found = [
        i for i in newest(items(world, "earth-search")) if i["properties"]["proj:epsg"] == 32632
    ]
    assert found
    compared = 0
    for item in found:
        there = on_site(world, "earth-search", item, "B08", truth).astype(float)
        same = [i for i in newest(items(world, "earth-search")) if day_of(i) == day_of(item)]
        here = [
            on_site(world, "earth-search", i, "B08", truth)
            for i in same
            if i["properties"]["proj:epsg"] == 32633
        ]
        home = np.max(here, axis=0).astype(float)
        both = (there != 0) & (home != 0)
        if both.sum() < 500 or home[both].std() < 100:
            continue
        compared += 1
        assert np.corrcoef(there[both], home[both])[0, 1] > 0.9
        shifted = np.roll(home, 3, axis=1)
        assert np.abs(there - home)[both].mean() < 0.7 * np.abs(there - shifted)[both].mean()
    assert compared >= 2


def test_one_of_two_orbits_leaves_a_wedge_without_data(world: Path, truth: xr.Dataset) -> None:
    shares = defaultdict(list)
    for item in newest(items(world, "cdse")):
        if item["assets"]["B04_10m"]["proj:code"] == "EPSG:32633":
            scl = read(world, "cdse", item, "SCL")
            area = gpd.GeoSeries([shape(item["geometry"])], crs=4326).to_crs(32633).area[0]
            assert area == pytest.approx(
                (scl != 0).sum() * 400, rel=0.04
            )  # the item's geometry is where the data are
            split = (scl != 0).any(axis=1).mean() < 0.9
            shares[item["properties"]["sat:relative_orbit"], split].append((scl != 0).mean())
    assert set(shares) == {(65, False), (65, True), (108, False)}
    assert min(shares[65, False]) == 1
    assert min(shares[108, False]) < 0.8
    # On the site: nodata in the north-west reaches further east than in the south-west.
    cut = [t for t in truth.time.values if (truth.sky.sel(time=t) == 0).any()]
    edge = (truth.sky.sel(time=cut[0]).values != 0).argmax(axis=1)
    assert edge[0] > edge[-1] > 0


def test_a_catalogue_gap_is_filled_by_the_neighbouring_zone_alone(
    world: Path, truth: xr.Dataset
) -> None:
    zones = defaultdict(set)
    for item in items(world, "cdse"):
        zones[day_of(item)].add((acquisition(item)[1], item["assets"]["B04_10m"]["proj:code"]))
    kinds = {tuple(sorted(code for _, code in v)) for v in zones.values()}
    assert ("EPSG:32632", "EPSG:32633") in kinds  # one own tile is missing
    assert ("EPSG:32632", "EPSG:32633", "EPSG:32633") in kinds
    assert ("EPSG:32633", "EPSG:32633") in kinds
    for day, tiles in zones.items():
        found = [i for i in newest(items(world, "cdse")) if day_of(i) == day]
        seen = np.max([on_site(world, "cdse", i, "SCL", truth) for i in found], axis=0) != 0
        observed = truth.sky.sel(time=day).values.squeeze() != 0
        assert (seen != observed).mean() < (0.01 if len({c for _, c in tiles}) == 2 else 1e-9)


# ---------------------------------------------------------------- classification and sky


def test_bright_mine_ground_is_called_cloud_on_nearly_every_clear_date(
    world: Path, truth: xr.Dataset
) -> None:
    flagged = clear = elsewhere = others = 0
    for item in newest(items(world, "earth-search")):
        if item["properties"]["proj:epsg"] != 32633 or day_of(item)[5:7] in ("01", "02", "12"):
            continue
        of = truth.sel(year=int(day_of(item)[:4]))
        bright = (of.reflectance.sel(band="B02").values > 3000) & (of.footprint.values == 1)
        scl = on_site(world, "earth-search", item, "SCL", truth)
        seen = (truth.sky.sel(time=day_of(item)).values.squeeze() == 1) & (scl != 0)
        flagged += int((np.isin(scl, (8, 9)) & seen & bright).sum())
        clear += int((seen & bright).sum())
        elsewhere += int((np.isin(scl, (8, 9)) & seen & ~bright).sum())
        others += int((seen & ~bright).sum())
    assert clear > 500
    assert flagged / clear > 0.85
    assert elsewhere / others < 0.05


def test_scl_misses_halo_and_thin_cloud_but_not_thick_cloud(world: Path, truth: xr.Dataset) -> None:
    missed = contaminated = thick = thick_seen = halo = ring = 0
    classes: set[int] = set()
    for item in newest(items(world, "earth-search")):
        scl = on_site(world, "earth-search", item, "SCL", truth)
        classes |= set(np.unique(scl).tolist())
        if item["properties"]["proj:epsg"] != 32633 or day_of(item)[5:7] in ("01", "02", "12"):
            continue
        dirty = (truth.sky.sel(time=day_of(item)).values.squeeze() == 2) & (scl != 0)
        missed += int((dirty & np.isin(scl, (2, 4, 5, 6))).sum())
        contaminated += int(dirty.sum())
        # Unflagged, on a date without thin cloud, and no more than 40 m from what is flagged.
        if not (scl == 10).any():
            land = truth.footprint.sel(year=int(day_of(item)[:4])).values == 0
            near = ndimage.binary_dilation(np.isin(scl, (8, 9)) & land, iterations=4) & np.isin(
                scl, (2, 4, 5, 6)
            )
            halo += int((near & dirty).sum())
            ring += int(near.sum())
        white = on_site(world, "earth-search", item, "B02", truth) > 5000
        thick += int((white & dirty).sum())
        thick_seen += int((white & dirty & np.isin(scl, (8, 9))).sum())
    assert 0.02 < missed / contaminated < 0.3
    assert thick_seen / thick > 0.95
    assert halo / ring > 0.12
    assert {0, 3, 4, 5, 6, 7, 8, 9, 10, 11} <= classes <= set(range(12)) - {1}


def test_snow_lies_in_winter_only(world: Path) -> None:
    for item in newest(items(world, "planetary-computer")):
        winter = day_of(item)[5:7] in ("01", "02", "12")
        assert (item["properties"]["s2:snow_ice_percentage"] > 0) is winter
    assert {day_of(i)[5:7] in ("01", "02", "12") for i in items(world, "planetary-computer")} == {
        True,
        False,
    }


def test_truth_says_clear_where_the_pixels_are_the_ground_and_contaminated_where_they_are_not(
    world: Path, place: Site, truth: xr.Dataset
) -> None:
    grid = grid_of(place)
    canvas, draw = padded(grid, MARGIN_M), streams(0, place.id)
    inside = tuple(slice(MARGIN_M // 10, MARGIN_M // 10 + n) for n in grid.shape)
    land = draw_land(grid, canvas, draw)
    grounds = {year: draw_ground(land, year) for year in (2020, 2022)}
    as_clean, dirty = [], []
    for item in newest(items(world, "earth-search")):
        if item["properties"]["proj:epsg"] != 32633:
            continue
        day = date.fromisoformat(day_of(item))
        ground = grounds[day.year]
        spectra = ground.patches.spectra(day.timetuple().tm_yday)
        worst = np.zeros(grid.shape)
        for band in ("B02", "B04", "B08"):
            clean = ground.reflectance(spectra[:, BANDS.index(band)])[inside] * 10000
            seen = on_site(world, "earth-search", item, band, truth)
            worst = np.where(seen == 0, np.nan, np.maximum(worst, np.abs(seen - clean)))
        sky = truth.sky.sel(time=day_of(item)).values.squeeze()
        # 0.02 and four sigma of noise.
        clear = worst[(sky == 1) & ~np.isnan(worst)]
        if clear.size > 500:
            as_clean.append((clear < 200 + 4 * 36).mean())
        dirty.append(worst[(sky == 2) & ~np.isnan(worst)])
    assert np.median(as_clean) > 0.999
    assert min(as_clean) > 0.7  # misregistered dates, at the edges of things
    assert (np.concatenate(dirty) > 200 - 4 * 36).mean() > 0.97


# ---------------------------------------------------------------- truth


def test_truth_is_the_median_of_the_clean_dates_at_each_bands_own_resolution(
    place: Site, truth: xr.Dataset
) -> None:
    grid = grid_of(place)
    canvas, draw = padded(grid, MARGIN_M), streams(0, place.id)
    inside = tuple(slice(MARGIN_M // 10, MARGIN_M // 10 + n) for n in grid.shape)
    ground = draw_ground(draw_land(grid, canvas, draw), 2020)
    days = [
        d
        for d in truth.time.values
        if 4 <= d.astype("M8[M]").astype(int) % 12 + 1 <= 10 and str(d)[:4] == "2020"
    ]
    assert len(days) == 6
    for index, band in enumerate(BANDS):
        dates = []
        for day in days:
            number = int((day.astype("M8[D]") - np.datetime64("2020-01-01")).astype(int)) + 1
            plane = ground.reflectance(ground.patches.spectra(number)[:, index])[inside]
            if band not in ("B02", "B03", "B04", "B08"):
                means = plane.reshape(grid.shape[0] // 2, 2, grid.shape[1] // 2, 2).mean(
                    axis=(1, 3)
                )
                plane = np.kron(means, np.ones((2, 2)))
            dates.append(plane)
        expected = np.median(np.stack(dates), axis=0) * 10000
        got = truth.reflectance.sel(year=2020, band=band).values
        assert got.dtype == np.uint16
        assert np.abs(got - expected).max() <= 0.51


def test_the_median_of_truly_clear_pixels_comes_close_to_the_truth_and_that_of_all_does_not(
    world: Path, truth: xr.Dataset
) -> None:
    dates, clear = defaultdict(list), []
    found = defaultdict(list)
    for item in newest(items(world, "earth-search", 2022)):
        if item["properties"]["proj:epsg"] == 32633 and 4 <= int(day_of(item)[5:7]) <= 10:
            found[day_of(item)].append(item)
    for day, parts in found.items():
        for band in ("B03", "B08", "B12"):
            dates[band].append(
                np.max(
                    [on_site(world, "earth-search", i, band, truth) for i in parts], axis=0
                ).astype(float)
            )
        clear.append(truth.sky.sel(time=day).values.squeeze() == 1)
    for band, stack in dates.items():
        seen = np.where(np.stack(stack) == 0, np.nan, np.stack(stack))
        masked = np.where(np.stack(clear), seen, np.nan)
        enough = (~np.isnan(masked)).sum(axis=0) >= 2
        of = truth.reflectance.sel(year=2022, band=band).values.astype(float)
        mine = truth.footprint.sel(year=2022).values[enough] == 1
        good, naive = (
            (np.nanmedian(s[:, enough], axis=0) - of[enough]) / 1e4 for s in (masked, seen)
        )
        assert np.sqrt((good[mine] ** 2).mean()) < 0.01
        assert np.sqrt((good[mine] ** 2).mean()) < 0.5 * np.sqrt((naive[mine] ** 2).mean())


def test_a_full_year_shows_every_pixel_clear_often_enough_to_find_the_truth(place: Site) -> None:
    grid = grid_of(place)
    canvas, draw = padded(grid, MARGIN_M), streams(0, place.id)
    inside = tuple(slice(MARGIN_M // 10, MARGIN_M // 10 + n) for n in grid.shape)
    ground = draw_ground(draw_land(grid, canvas, draw), 2021)
    passes = [p for p in overpasses(draw, 13.0, 2021, 22, 2) if not p.snow]
    clear, stacks = [], defaultdict(list)
    for overpass in passes:
        seen = observe(draw, grid, canvas, ground, overpass)
        observed = np.kron(seen.scl != 0, np.ones((2, 2), bool))[inside]
        clear.append(observed & ~seen.contaminated[inside])
        for band, counts in seen.counts.items():
            fine = counts if counts.shape == canvas.shape.yx else np.kron(counts, np.ones((2, 2)))
            stacks[band].append(np.where(clear[-1], fine[inside], np.nan))
    often = np.sum(clear, axis=0)
    assert (often >= 2).mean() >= 0.999
    assert 0.4 < 1 - np.mean(clear) < 0.65  # wedge and cloud
    truth = compute_reflectance(ground, passes, inside)
    off = [
        np.nanmedian(stacks[b], axis=0)[often > 0] - truth[k][often > 0]
        for k, b in enumerate(BANDS)
    ]
    assert np.sqrt(np.square(off).mean()) / 1e4 < 0.01


def test_errors_of_scene_classifications(place: Site) -> None:
    """Class 7 is mostly cloud; one date is veiled unseen; on the clearest, most of the clear ground is called cirrus."""
    grid = grid_of(place)
    canvas, draw = padded(grid, MARGIN_M), streams(0, place.id)
    ground = draw_ground(draw_land(grid, canvas, draw), 2021)
    passes = [p for p in overpasses(draw, 13.0, 2021, 22, 2, scl_errors=True) if not p.snow]
    unclassified = []
    for overpass in passes:
        seen = observe(draw, grid, canvas, ground, overpass)
        height, width = seen.scl.shape
        cloudy = seen.contaminated.reshape(height, 2, width, 2).any(axis=(1, 3))
        unclassified.append(cloudy[seen.scl == 7])
        if overpass.unseen_cirrus:
            clear = np.isin(seen.scl, (2, 4, 5, 6))
            assert clear.sum() > 0.9 * (seen.scl != 0).sum()
            assert cloudy[clear].mean() > 0.8
            counts = seen.counts["B02"].astype(float), seen.counts["B04"].astype(float)
            streaks = [
                np.diff(c, axis=0).ravel() for c in counts
            ]  # along the track, where bands see them apart
            assert np.corrcoef(*streaks)[0, 1] < 0.9
        if overpass.false_cirrus:
            cirrus = seen.scl == 10
            assert 0.4 < cirrus.sum() / (seen.scl != 0).sum() < 0.7
            assert cloudy[cirrus].mean() < 0.1
            assert overpass.cover == min(p.cover for p in passes if p.orbit == overpass.orbit)
    assert np.concatenate(unclassified).mean() > 0.9
    assert sum(p.unseen_cirrus for p in passes) == sum(p.false_cirrus for p in passes) == 1


def test_scenes_lie_beside_each_other(place: Site) -> None:
    """About 6 m off until 2021, about 2 m afterwards: as a Taylor series of the ground tells."""
    grid = grid_of(place)
    canvas, draw = padded(grid, MARGIN_M), streams(0, place.id)
    off: dict[int, list[float]] = {}
    for year in (2020, 2022):
        ground = draw_ground(draw_land(grid, canvas, draw), year)
        for overpass in [
            displace_scene(p) for p in overpasses(draw, 13.0, year, 22, 0) if p.cover < 0.03
        ]:
            seen = observe(draw, grid, canvas, ground, overpass).counts["B04"] / 1e4
            clean = ground.reflectance(
                ground.patches.spectra(overpass.day.timetuple().tm_yday)[:, BANDS.index("B04")]
            )
            slopes = np.stack([slope.ravel() for slope in np.gradient(clean)], axis=1)
            shift, *_ = np.linalg.lstsq(slopes, (seen - clean).ravel(), rcond=None)
            off.setdefault(year, []).append(10 * float(np.hypot(*shift)))
    assert 3 < np.median(off[2020]) < 10
    assert np.median(off[2022]) < 4


def test_footprint_is_the_outline_by_pixel_centre(world: Path, truth: xr.Dataset) -> None:
    outlines = gpd.read_parquet(world / "truth_footprints.parquet")
    assert outlines.crs == "EPSG:4326"
    assert list(outlines[["site", "year"]].itertuples(index=False, name=None)) == [
        ("small", 2020),
        ("small", 2022),
    ]
    local = outlines.to_crs(truth.odc.geobox.crs.to_epsg())
    x, y = np.meshgrid(truth.x.values, truth.y.values)
    for row in local.itertuples():
        assert row.geometry.is_valid
        inside = shapely.contains_xy(row.geometry, x, y)
        np.testing.assert_array_equal(truth.footprint.sel(year=row.year).values, inside)
        assert 0.08 < inside.mean() < 0.3
        # Smooth: no two neighbouring sides turn by a right angle but where the site's edge cuts.
        within = row.geometry.intersection(truth.odc.geobox.extent.geom.buffer(-1)).buffer(0)
        assert within.buffer(-10).buffer(10).area > 0.97 * within.area


def test_mines_grow_shift_and_are_reclaimed_in_any_year() -> None:
    for name in ("one", "two", "three"):
        site = site_of(name, 360000, 5600040, 384, 384)
        grid, draw = grid_of(site), streams(0, name)
        shapes = [draw_mine(grid, draw, year).footprint for year in range(2010, 2031)]
        for before, after in itertools.pairwise(shapes):
            # Each year some land is taken and some given back, never much.
            taken, given = after.difference(before).area, before.difference(after).area
            assert 0 < taken < 0.2 * before.area
            assert given < 0.2 * before.area
        assert shapes[5].difference(shapes[-1]).area > 0.05 * shapes[5].area
        assert shapes[-1].difference(shapes[5]).area > 0.05 * shapes[5].area
        mine = draw_mine(grid, draw, 2020)
        assert mine.lake.area > 0
        assert mine.pits.buffer(1).contains(mine.lake)
        assert mine.dumps.difference(mine.outline.buffer(15)).area == pytest.approx(0, abs=1)


def test_reclaimed_land_is_green_again() -> None:
    site = site_of("green", 360000, 5600040, 240, 240)
    grid, draw = grid_of(site), streams(0, "green")
    canvas = padded(grid, 0)
    land = draw_land(grid, canvas, draw)
    was, ground = draw_ground(land, 2016), draw_ground(land, 2023)
    x, y = np.meshgrid(*(canvas.coords[d].values for d in ("x", "y")))
    given = shapely.contains_xy(was.mine.outline, x, y) & ~shapely.contains_xy(
        ground.mine.outline, x, y
    )
    assert given.sum() > 100
    assert set(np.array(ground.kinds)[ground.patch[given]]) == {"young"}
    red, nir = (
        ground.reflectance(ground.patches.spectra(180)[:, BANDS.index(b)])[given]
        for b in ("B04", "B08")
    )
    assert np.median((nir - red) / (nir + red)) > 0.4


# ---------------------------------------------------------------- dates


def test_dates_follow_the_satellites_and_sparse_years_are_sparse() -> None:
    draw = streams(0, "any")
    full, sparse = overpasses(draw, 13.0, 2020, 22, 2), overpasses(draw, 13.0, 2015, 7, 2)
    assert sum(4 <= p.day.month <= 10 for p in full) == 22
    assert sum(4 <= p.day.month <= 10 for p in sparse) == 7
    assert min(p.day for p in sparse).isoformat() >= "2015-07-04"  # no Sentinel-2 before
    assert {p.satellite for p in sparse} == {"S2A"}
    assert {p.satellite for p in full} == {"S2A", "S2B"}
    assert {p.orbit for p in full} == {65, 108}
    assert sum(p.split for p in full) == 1
    for p in (
        full
    ):  # relative orbit from the absolute one: S2A minus 140, S2B minus 26 (143 orbits a cycle)
        assert (p.absolute_orbit - {"S2A": 140, "S2B": 26}[p.satellite]) % 143 == p.orbit % 143
        assert p.start < p.sensed
    covers = [p.cover for p in full if not p.snow]
    assert min(covers) < 0.02
    assert max(covers) > 0.95
    assert 0.3 < np.mean(covers) < 0.5
    assert count_possible_dates(2015) < count_possible_dates(2016) < count_possible_dates(2020)


def test_known_acquisitions_have_their_real_numbers(real_data: Path) -> None:
    found = {}
    for path in (real_data / "stac_items").glob("*/*T32TMT*.json"):
        item = json.loads(path.read_text())
        found[item["id"]] = item
    for path in (real_data / "stac_items" / "earthsearch_l2a").glob("*32TMT*.json"):
        found[path.stem] = json.loads(path.read_text())
    checked = 0
    for item in found.values():
        taken = re.fullmatch(
            r"G(S2.)_(\d{4})(\d\d)(\d\d)T\d{6}_(\d{6})_N.*", prop(item, "datatake_id")
        )
        assert taken
        orbits = {
            (p.satellite, p.day.isoformat()): p
            for p in overpasses(streams(0, "x"), 8.0, 2020, 84, 90)
        }
        key = (taken.group(1), "-".join(taken.group(2, 3, 4)))
        if key in orbits:
            checked += 1
            assert orbits[key].absolute_orbit == int(taken.group(5))
    assert checked >= 2


# ---------------------------------------------------------------- items and files


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


def test_truth_lies_on_the_sites_grid(place: Site, truth: xr.Dataset) -> None:
    assert truth.odc.geobox == grid_of(place)
    assert truth.reflectance.dims == ("year", "band", "y", "x")
    assert truth.footprint.dims == ("year", "y", "x")
    assert truth.sky.dims == ("time", "y", "x")
    assert list(truth.year.values) == [2020, 2022]
    assert list(truth.band.values) == list(BANDS)
    assert (truth.footprint.dtype, truth.sky.dtype) == (np.uint8, np.uint8)
    assert truth.time.dtype.kind == "M"
    assert (np.diff(truth.time.values).astype(int) > 0).all()
    assert len(truth.time) == 2 * (6 + 1)


# ---------------------------------------------------------------- determinism


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
    simulate([a, b], tmp_path / "both", World(years=(2019, 2023), styles=("cdse",), **few))
    simulate(
        [b], tmp_path / "alone", World(years=(2023,), styles=("planetary-computer", "cdse"), **few)
    )
    simulate([b], tmp_path / "other", World(years=(2023,), styles=("cdse",), seed=1, **few))
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
    simulate(sites, tmp_path / "out", world, progress=said.append)
    assert said == ["a 2023", "b 2023", "c 2023"]
    made = ["cdse", "cdse.parquet", "earth-search", "earth-search.parquet", "sources.yaml"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        *made,
        "truth.zarr",
        "truth_footprints.parquet",
        "truth_offsets.parquet",
    ]
    for style, of in (("cdse", (0, 2)), ("earth-search", (1,))):
        areas = [shape(i["geometry"]).centroid for i in items(tmp_path / "out", style)]
        nearest = {min(range(3), key=lambda k: p.distance(sites[k].geometry)) for p in areas}
        assert nearest == set(of)


# ---------------------------------------------------------------- bad input


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
    fine, tiny = site_of("fine", 360000, 5600040, 48, 48), site_of("tiny", 360000, 5600040, 12, 48)
    world = World(years=(2023,), dates_per_year=1)
    for sites, says in (
        ([], "one site"),
        ([fine, fine], "once"),
        ([tiny], "48 pixels"),
        ([Site(id="null")], "null"),
    ):
        with pytest.raises(CatalogError, match=says):
            simulate(sites, tmp_path / "out", world)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(CatalogError, match="cannot be written"):
        simulate([fine], tmp_path / "file" / "out", world)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(CatalogError, match="empty"):
        simulate([fine], tmp_path / "full", world)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "full", "mine.txt"]


def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(archive, "_write_cog", full)
    with pytest.raises(CatalogError, match="No space left"):
        simulate(
            [site_of("a", 360000, 5600040, 48, 48)],
            tmp_path / "out",
            World(years=(2023,), dates_per_year=1),
        )
    assert list(tmp_path.iterdir()) == []


def test_flags_that_are_wrong_in_either_way(tmp_path: Path) -> None:
    """Beside a world whose flags are right: the truth says what each item's pixels carry on top of that world's."""
    site = site_of("a", 360000, 5600040, 48, 48)
    right = World(years=(2022,), dates_per_year=6, winter_dates=0, styles=("earth-search",))
    simulate([site], tmp_path / "right", right)
    simulate([site], tmp_path / "wrong", dataclasses.replace(right, wrong_flags=1.0))
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
