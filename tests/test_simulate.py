"""The simulated archive is as real ones are, traps included, and the truth beside it is true: seen from its files."""

from __future__ import annotations

import json
from collections import defaultdict
from datetime import date
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import odc.geo.xr  # noqa: F401 - the .odc accessor
import pytest
import rasterio
import rasterio.warp
import shapely
import xarray as xr
from scipy import ndimage
from shapely.geometry import shape

from known_simulations import PLACE, SHIPPED, STYLES, acquisition, items, read, simulate_small
from minecube.catalog import BANDS, Site
from minecube.grid import grid_of, pad
from minecube.simulate import MARGIN_M
from minecube.simulate.land import draw_ground, draw_land
from minecube.simulate.noise import make_generators


@pytest.fixture(scope="module")
def place() -> Site:
    return PLACE


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate_small(tmp_path_factory.mktemp("simulated"))


@pytest.fixture(scope="module")
def truth(world: Path) -> xr.Dataset:
    return xr.open_zarr(world / "truth.zarr", group="small", consolidated=False).load()


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
    canvas, draw = pad(grid, MARGIN_M), make_generators(0, place.id)
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
    canvas, draw = pad(grid, MARGIN_M), make_generators(0, place.id)
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
