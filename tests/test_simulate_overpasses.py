"""Simulated ground, mines, sky and overpasses, without files."""

from __future__ import annotations

import itertools
import json
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import odc.geo.xr  # noqa: F401 - the .odc accessor
import pytest
import shapely

from known_scenes import site_of
from minecube.catalog import BANDS, Site
from minecube.grid import grid_of, pad
from minecube.simulate import MARGIN_M
from minecube.simulate.land import draw_ground, draw_land
from minecube.simulate.mine import draw_mine
from minecube.simulate.noise import make_generators
from minecube.simulate.observe import observe
from minecube.simulate.passes import count_possible_dates, displace_scene, simulate_overpasses
from minecube.simulate.truth import compute_reflectance


@pytest.fixture(scope="module")
def place() -> Site:
    """120 x 96 pixels in zone 33; its neighbour is zone 32."""
    return site_of("small", 360000, 5600040, 120, 96)


def test_a_full_year_shows_every_pixel_clear_often_enough_to_find_the_truth(place: Site) -> None:
    grid = grid_of(place)
    canvas, draw = pad(grid, MARGIN_M), make_generators(0, place.id)
    inside = tuple(slice(MARGIN_M // 10, MARGIN_M // 10 + n) for n in grid.shape)
    ground = draw_ground(draw_land(grid, canvas, draw), 2021)
    passes = [p for p in simulate_overpasses(draw, 13.0, 2021, 22, 2) if not p.snow]
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
    canvas, draw = pad(grid, MARGIN_M), make_generators(0, place.id)
    ground = draw_ground(draw_land(grid, canvas, draw), 2021)
    passes = [
        p for p in simulate_overpasses(draw, 13.0, 2021, 22, 2, scl_errors=True) if not p.snow
    ]
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
    canvas, draw = pad(grid, MARGIN_M), make_generators(0, place.id)
    off: dict[int, list[float]] = {}
    for year in (2020, 2022):
        ground = draw_ground(draw_land(grid, canvas, draw), year)
        for overpass in [
            displace_scene(p)
            for p in simulate_overpasses(draw, 13.0, year, 22, 0)
            if p.cover < 0.03
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


def test_mines_grow_shift_and_are_reclaimed_in_any_year() -> None:
    for name in ("one", "two", "three"):
        site = site_of(name, 360000, 5600040, 384, 384)
        grid, draw = grid_of(site), make_generators(0, name)
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
    grid, draw = grid_of(site), make_generators(0, "green")
    canvas = pad(grid, 0)
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


def test_dates_follow_the_satellites_and_sparse_years_are_sparse() -> None:
    draw = make_generators(0, "any")
    full, sparse = (
        simulate_overpasses(draw, 13.0, 2020, 22, 2),
        simulate_overpasses(draw, 13.0, 2015, 7, 2),
    )
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
        p = item["properties"]
        datatake = p.get("s2:datatake_id") or p.get("eopf:datatake_id")
        taken = re.fullmatch(r"G(S2.)_(\d{4})(\d\d)(\d\d)T\d{6}_(\d{6})_N.*", datatake)
        assert taken
        orbits = {
            (p.satellite, p.day.isoformat()): p
            for p in simulate_overpasses(make_generators(0, "x"), 8.0, 2020, 84, 90)
        }
        key = (taken.group(1), "-".join(taken.group(2, 3, 4)))
        if key in orbits:
            checked += 1
            assert orbits[key].absolute_orbit == int(taken.group(5))
    assert checked >= 2
