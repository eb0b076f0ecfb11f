"""Which offsets contradict their pixels: each rule by hand, then archives of which it is known, made up, simulated and real."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pystac
import pytest
import rasterio
import xarray as xr
from shapely.geometry import mapping

from known_scenes import grid_at, site_of, write_tif
from minecube import scenes
from minecube.catalog import load_recipes, load_sources
from minecube.errors import SceneError
from minecube.grid import grid_of
from minecube.scenes import offsets
from minecube.scenes.looks import Look, read_look
from minecube.scenes.offsets import OffsetCheck, check_offsets, estimate_carried, resolve_conflicts
from minecube.simulate import World, simulate_archive

VEGETATION, BARE, CLOUD = 4, 5, 9
HIGH_CLOUD = np.array([6200, 6000, 3400])
"""B02, B04, B12, reflectance x 10000."""


def ground(pixels=900, seed=0, brighter=0):
    """Fields and woods in B02, B04, B12, [band, pixel], reflectance x 10000."""
    rng = np.random.default_rng(seed)
    return (
        rng.uniform([[200], [150], [300]], [[900], [1500], [2500]], (3, pixels)) + brighter
    ).astype(np.float32)


def seen(n, land, cover=0.0, seed=1):
    """The land on n days, noise and white cloud included: reflectance [scene, band, pixel] and SCL [scene, pixel]."""
    rng = np.random.default_rng(seed)
    numbers = land + rng.normal(0, 20, (n, *land.shape))
    cloudy = rng.random((n, land.shape[1])) < cover
    numbers = np.where(
        cloudy[:, None], HIGH_CLOUD[:, None] * rng.uniform(0.8, 1.1, (n, 1, land.shape[1])), numbers
    )
    return numbers.astype(np.float32), np.where(cloudy, CLOUD, VEGETATION).astype(np.uint16)


def checked(listed, grid):
    return check_offsets(listed, read_look(listed, grid))


def told(numbers, scl, carries, decided, overpass=None):
    """What is found of scenes that carry that."""
    carries, decided = np.asarray(carries), np.asarray(decided)
    stored = numbers + carries[:, None, None].astype(np.float32)
    return estimate_carried(stored, scl, decided, overpass or [str(n) for n in range(len(stored))])


def test_quartile_of_the_others_against_brute_force():
    rng = np.random.default_rng(3)
    values = (
        rng.permutation(7 * 2 * 80).reshape(7, 2, 80).astype(np.float32) / 8
    )  # no two move more than 300 apart
    clear = rng.random((7, 80)) < 0.5
    clear[:, 0], clear[1:, 1] = False, False  # nobody, and one alone
    for n in range(7):
        expected = []
        for band in range(2):
            for pixel in range(80):
                others = sorted(
                    values[m, band, pixel] for m in range(7) if m != n and clear[m, pixel]
                )
                expected.append(others[(len(others) - 1) // 4] if others else np.nan)
        moved = np.where(clear[n], values[n] - np.reshape(expected, (2, 80)), np.nan)
        expected_step = np.nanmedian(moved.mean(axis=0))
        np.testing.assert_allclose(offsets.measure_steps(values, clear)[n], expected_step)
    assert np.isfinite(offsets.measure_steps(values, np.ones_like(clear))).all()


def test_step_is_the_thousand_and_neither_haze_nor_cloud_nor_snow():
    numbers, scl = seen(6, ground())
    numbers[1] += 1000
    numbers[2] += np.array([[1400], [1150], [200]])  # haze over everything: bands apart
    numbers[3, :, 60:] = HIGH_CLOUD[:, None]
    scl[3, 60:] = CLOUD
    numbers[4, :2] += 6000  # snow
    step = offsets.measure_steps(numbers, scl == VEGETATION)
    assert abs(step[[0, 3, 5]]).max() < 30  # the sixteenth of the ground that is left is enough
    assert step[1] == pytest.approx(1000, abs=30)
    assert np.isnan(step[[2, 4]]).all()
    assert np.isnan(offsets.measure_steps(numbers[:1], scl[:1] == VEGETATION)).all()
    few = np.full_like(numbers, np.nan)
    few[:, :, :19] = numbers[:, :, :19]
    assert np.isnan(offsets.measure_steps(few, (scl == VEGETATION) & np.isfinite(few[:, 0]))).all()


@pytest.mark.parametrize(
    ("dark", "green", "level", "decided", "expected"),
    [
        (
            200,
            0.5,
            [0, 0, 1],
            [-1000, -1000, 0],
            0,
        ),  # too dark to carry it, though all decisions contradict
        (699, 0.5, [0, 0], [-1000, -1000], 0),
        (-800, 0.5, [0, 1, 1], [0, 0, 0], -1),  # the lowest is below what any scene can be
        (1000, 0.06, [0, 0], [0, 0], 1),  # leaves so bright
        (1000, 0.04, [0, 0], [0, 0], 0),  # no leaves: as decided
        (999, 0.06, [0, 0], [0, 0], 0),
        (1500, 0.5, [0, 0, 0, 1], [0, 0, 0, 0], 0),  # two groups: green proves nothing more
        (1500, 0.0, [0] * 4, [-1000, -1000, -1000, 0], 1),
        (1500, 0.0, [0] * 3, [-1000, -1000, 0], np.nan),  # a third against the others
        (1500, 0.0, [0, 1, 1, 1, 1], [0] * 5, -1),  # one that is darker than anything
        (np.nan, 0.0, [0], [0], 0),
    ],
)
def test_lowest_group(dark, green, level, decided, expected):
    found = offsets.decide_lowest_level(dark, green, np.array(level, float), np.array(decided))
    np.testing.assert_equal(found, float(expected))


@pytest.mark.parametrize("direction", ["left in", "taken off twice"])
@pytest.mark.parametrize("wrong", [1, 6, 12])
def test_wrong_ones_are_found_however_many(direction, wrong):
    numbers, scl = seen(20, ground(), cover=0.6)
    carries, decided = np.zeros(20, int), np.zeros(20, int)
    carries[15:], decided[15:] = 1000, -1000  # some right ones of the other kind
    (carries if direction == "left in" else decided)[:wrong] += (
        1000 if direction == "left in" else -1000
    )
    carried, above = told(numbers, scl, carries, decided)
    np.testing.assert_array_equal(carried, carries)
    np.testing.assert_allclose(above, carries, atol=60)


@pytest.mark.parametrize(("carries", "decided"), [(0, -1000), (1000, 0), (0, 0), (1000, -1000)])
def test_a_year_all_alike_is_told_by_what_is_dark_and_what_is_green(carries, decided):
    numbers, scl = seen(12, ground(), cover=0.3)
    carried, _ = told(numbers, scl, [carries] * 12, [decided] * 12)
    assert (carried == carries).all()


def test_a_bright_place_goes_by_the_decisions_that_agree():
    numbers, _ = seen(20, ground(brighter=1200), cover=0.3)
    scl = np.where(numbers[:, 0] > 4000, CLOUD, BARE).astype(np.uint16)
    for carries, decided in ((0, -1000), (1000, 0)):  # both ways of being wrong
        truth, flags = np.zeros(20, int), np.zeros(20, int)
        truth[4], flags[4] = carries, decided
        np.testing.assert_array_equal(told(numbers, scl, truth, flags)[0], truth)
    # With as many one way as the other nobody can say which are right, so none is accused.
    assert np.isnan(
        told(numbers, scl, np.zeros(20, int), np.where(np.arange(20) < 10, 0, -1000))[0]
    ).all()


def test_two_scenes_do_not_change_places_for_ever():
    numbers, _ = seen(2, ground(brighter=1200))
    scl = np.full((2, 900), BARE, np.uint16)
    level, step = offsets.group_levels(
        numbers + np.array([0, 1000], np.float32)[:, None, None],
        scl == BARE,
        np.zeros(2, bool),
        np.zeros(2, int),
    )
    assert level[1] - level[0] == 1
    assert abs(step).max() < 60


def test_a_scene_that_contradicts_itself_is_not_accused():
    """Broken pixels make a scene look too dark to carry what all its others say it carries."""
    numbers, scl = seen(8, ground())
    numbers[3, :, :30] -= 1000
    carried, _ = told(numbers, scl, [1000] * 8, [-1000] * 8)
    assert np.isnan(carried[3])
    assert (np.delete(carried, 3) == 1000).all()


def test_pixels_that_are_alike_by_chance_tell_nothing():
    """Under cloud some pixels move alike in all bands, each by as much as its cloud is thick."""
    numbers, scl = seen(6, ground())
    numbers[2] = HIGH_CLOUD[:, None]  # which SCL does not see
    thick = np.linspace(650, 1350, 60)
    numbers[2, :, :60] = numbers[3, :, :60] + thick
    assert np.isnan(told(numbers, scl, [0] * 6, [0] * 6)[0][2])
    numbers[2, :, :60] = numbers[3, :, :60] + np.sort(
        np.append(thick[::2], [1000] * 30)
    )  # half of them by as much
    assert told(numbers, scl, [0] * 6, [0] * 6)[0][2] == 1000
    scl[2] = CLOUD
    assert np.isnan(
        told(numbers, scl, [0] * 6, [0] * 6)[0][2]
    )  # accused on clear pixels of its own only


@pytest.mark.parametrize("brightness", [700, 1000, 1300])
@pytest.mark.parametrize("fields", ["woods", "bare"])
def test_uniform_cloud_without_short_wave_infrared_is_not_accused(fields, brightness):
    """A veil of cloud adds its own light and lets through the rest of the ground's: blue, red and near infrared alike."""
    rng = np.random.default_rng(2)
    low, high = {
        "woods": ([200, 150, 2000], [600, 700, 4000]),
        "bare": ([600, 900, 1300], [1500, 2200, 3000]),
    }[fields]
    land = rng.uniform(np.reshape(low, (3, 1)), np.reshape(high, (3, 1)), (3, 900))
    numbers, scl = seen(6, land.astype(np.float32))
    numbers[2] = brightness + (1 - brightness / 1e4) ** 2 * numbers[2]
    for of_veil in (VEGETATION, CLOUD):
        scl[2] = of_veil
        carried, _ = told(numbers, scl, [0] * 6, [0] * 6)
        assert carried[2] != 1000
        assert (np.delete(carried, 2) == 0).all()


@pytest.mark.parametrize("carries", [2000, 3000])
def test_what_no_product_carries_is_not_told(carries):
    numbers, scl = seen(6, ground(brighter=1500))
    scl[:] = BARE
    others = carries - 1000 if carries == 2000 else 0
    carried, above = told(
        numbers, scl, [others, others, carries, others, others, others], [-others] * 6
    )
    assert np.isnan([carried[2], above[2]]).all()
    assert (np.delete(carried, 2) == others).all()


def test_neighbours_of_an_overpass_tell_what_is_under_cloud():
    """Scene 4 has nothing but the cloud that 5 has too, beside ground; 6 and 7 are overcast; 8 has nobody."""
    numbers, scl = seen(9, ground())
    rng = np.random.default_rng(5)
    cloud = HIGH_CLOUD[:, None] * rng.uniform(0.8, 1.1, (1, 900))
    for n in (4, 6, 7, 8):
        numbers[n], scl[n] = cloud, CLOUD
    numbers[5, :, :300], scl[5, :300] = cloud[:, :300], CLOUD
    numbers[4, :, 300:] = np.nan
    overpass = ["a", "b", "c", "d", "e", "e", "f", "f", "g"]
    carries = np.array([0, 0, 0, 0, 1000, 0, 1000, 0, 0])
    carried, above = told(numbers, scl, carries, [0] * 9, overpass)
    np.testing.assert_array_equal(carried, [0, 0, 0, 0, 1000, 0, 1000, 0, np.nan])
    assert above[4] == pytest.approx(1000, abs=40)
    assert np.isnan(above[8])
    # Alike, and nobody sees ground: nothing is told. And where both see too little of the same, nothing either.
    assert np.isnan(told(numbers, scl, [0] * 9, [0] * 9, overpass)[0][6:]).all()
    numbers[4, :, 19:] = np.nan
    assert np.isnan(told(numbers, scl, carries, [0] * 9, overpass)[0][4])
    # Not a thousand in all bands: something else is amiss.
    numbers[6, 0] += 400
    assert np.isnan(told(numbers, scl, carries, [0] * 9, overpass)[0][6:]).all()


def test_three_tiles_hand_it_on():
    numbers, scl = seen(5, ground())
    cloud = HIGH_CLOUD[:, None] * np.random.default_rng(5).uniform(0.8, 1.1, (1, 900))
    for n, (start, stop) in ((2, (0, 500)), (3, (450, 900)), (4, (450, 500))):
        numbers[n, :, :], scl[n] = np.nan, CLOUD
        numbers[n, :, start:stop] = cloud[:, start:stop]
    numbers[4, :, 500:], scl[4, 500:] = ground()[:, 500:], VEGETATION  # the one that sees ground
    numbers[4, :, 475:500], numbers[2, :, :475] = np.nan, np.nan  # and shares nothing with 2
    numbers[4, :, 450:475], numbers[3, :, 500:] = cloud[:, 450:475], np.nan
    carried, _ = told(numbers, scl, [0] * 5, [0] * 5, ["a", "b", "c", "c", "c"])
    assert (carried == 0).all()


# The same through files.

APPLIED = "earthsearch:boa_offset_applied"
DAYS = [f"2023-{m:02d}-{d:02d}T10:20:30" for m in range(4, 10) for d in (3, 13, 23)]


@pytest.fixture
def place(archive, site):
    """An archive of three bands, and `scene(when, carried, offset)` which writes one of the same land."""
    archive.bands = ("B02", "B04", "B12")
    grid = grid_of(site)
    half = grid.zoom_out(2).shape

    def scene(when, carried=0, offset=0, *, brighter=0, cloud=False, scl=VEGETATION, tile="33UUR"):
        land = ground(half[0] * half[1], brighter=brighter).reshape(3, *half)
        noise = np.random.default_rng(int(when[5:7] + when[8:10])).normal(0, 15, land.shape)
        numbers = (
            np.full(land.shape, 6000) * np.array([1, 0.97, 0.55])[:, None, None]
            if cloud
            else land + noise
        )
        stored = np.clip(numbers + carried, 1, None).astype(np.uint16)
        pixels = {
            b: s.repeat(2, axis=0).repeat(2, axis=1)
            for b, s in zip(("B02", "B04"), stored, strict=False)
        }
        scl = CLOUD if cloud else scl
        return archive.scene(
            when,
            grid,
            pixels | {"B12": stored[2]},
            scl,
            baseline="05.09",
            tile=tile,
            **{APPLIED: not offset},
        )

    return grid, scene


def summary(checks):
    return [(c.conflict, c.should_be) for c in checks]


def test_two_scenes_of_which_one_is_wrong(place):
    grid, scene = place
    for carried, offset, should_be in ((1000, 0, -1000), (0, -1000, 0)):
        checks = checked([scene(DAYS[0]), scene(DAYS[1], carried, offset)], grid)
        assert summary(checks) == [(False, None), (True, should_be)]
        assert checks[0].step == pytest.approx(0, abs=40)
        assert checks[1].step == pytest.approx(
            1000 + 2 * offset, abs=40
        )  # below black where it was taken off twice
    assert [c.scene for c in checks] == sorted(c.scene for c in checks)


def test_one_scene_alone(place):
    grid, scene = place
    assert summary(checked([scene(DAYS[0])], grid)) == [(False, None)]
    assert summary(checked([scene(DAYS[0], 1000, -1000)], grid)) == [(False, None)]
    assert summary(checked([scene(DAYS[0], 0, -1000)], grid)) == [(True, 0)]
    assert checked([], grid) == []


def test_overcast_alone_and_with_a_neighbour(place):
    grid, scene = place
    clear = [scene(when) for when in DAYS[:4]]
    overcast = scene(DAYS[5], 0, -1000, cloud=True)
    assert summary(checked([*clear, overcast], grid)) == [(False, None)] * 5
    assert checked([*clear, overcast], grid)[4].step is None
    beside = scene(DAYS[5], cloud=True, tile="33UVR", carried=1000)
    checks = checked([*clear, overcast, beside], grid)
    assert summary(checks)[4:] == [(True, 0), (True, -1000)]


def test_desert(place):
    grid, scene = place
    for carried, offset, should_be in ((1000, 0, -1000), (0, -1000, 0)):
        dry = [scene(d, brighter=1200, scl=BARE) for d in DAYS]
        dry[7] = scene(DAYS[7], carried, offset, brighter=1200, scl=BARE)
        found = summary(checked(dry, grid))
        assert found.pop(7) == (True, should_be)
        assert found == [(False, None)] * 17


def test_defective_pixels_are_not_ground(place):
    """A fifth of a scene is black because the detector was; that its offset is right the rest says."""
    grid, scene = place
    scl = np.full(grid.zoom_out(2).shape, VEGETATION)
    scl[:20] = 1
    listed = [scene(d, 1000, -1000) for d in DAYS[:4]] + [scene(DAYS[4], 1000, -1000, scl=scl)]
    with rasterio.open(listed[4].assets["B12"].href, "r+") as file:
        pixels = file.read(1)
        pixels[:20] = 1
        file.write(pixels, 1)
    checks = checked(listed, grid)
    assert summary(checks) == [(False, None)] * 5
    assert checks[4].step == pytest.approx(0, abs=40)


def test_bands_that_there_are(place, archive):
    """Bands that a scene lacks are not asked for; with one alone nothing can be said."""
    grid, scene = place
    pair = [scene(DAYS[0]), scene(DAYS[1], 1000, 0)]
    del pair[1].assets["B02"]
    assert summary(checked(pair, grid)) == [(False, None), (True, -1000)]
    del pair[0].assets["B04"]
    checks = checked(pair, grid)
    assert summary(checks) == [(False, None)] * 2
    assert [c.step for c in checks] == [None, None]


def check(scene, conflict, should_be, step=1000.0):
    offset = scene.properties["minecube:offset"]
    return OffsetCheck(
        scene=scene.id, offset=offset, step=step, conflict=conflict, should_be=should_be
    )


@pytest.fixture
def three(place):
    """A right scene and two that another offset fits, and what was found of them."""
    _, scene = place
    listed = [scene(when) for when in DAYS[:3]]
    return listed, [
        check(listed[0], False, None, 3.0),
        check(listed[1], True, -1000),
        check(listed[2], True, -1000, 990.0),
    ]


def test_policies(three, caplog):
    listed, checks = three
    assert resolve_conflicts(listed, checks, "warn") == listed
    assert resolve_conflicts(listed, checks, "drop") == listed[:1]
    fixed = resolve_conflicts(listed, checks, "fix")
    assert [s.id for s in fixed] == [s.id for s in listed]
    assert [s.properties["minecube:offset"] for s in fixed] == [0, -1000, -1000]
    assert "its pixels say -1000" in fixed[1].properties["minecube:offset_reason"]
    assert listed[1].properties["minecube:offset"] == 0  # the caller's own is as it was
    assert [r.getMessage().rpartition("(")[2] for r in caplog.records] == [
        f"{done})" for done in ("kept as it is", "left out", "mended") for _ in range(2)
    ]
    with pytest.raises(SceneError, match=r"2 of 3 scenes .*-1000 would fit.*--on-offset-conflict"):
        resolve_conflicts(listed, checks, "fail")
    with pytest.raises(SceneError, match="all 1 scenes"):
        resolve_conflicts(listed[2:], checks[2:], "drop")
    assert resolve_conflicts(listed[:1], checks[:1], "fail") == listed[:1]
    assert resolve_conflicts([], [], "drop") == []
    assert offsets.list_conflicts(checks) == [
        {"scene": listed[1].id, "offset": 0, "step": 1000.0, "should_be": -1000},
        {"scene": listed[2].id, "offset": 0, "step": 990.0, "should_be": -1000},
    ]


def test_real_dates_of_april_2023(real_data, tmp_path):
    """Twelve dates without offset, of which some are clear: none is accused, and those that are made wrong are found."""
    with xr.open_dataset(
        real_data / "gfmap_s2l2a" / "cdse_sentinel2_l2a.nc", mask_and_scale=False
    ) as data:
        arrays = {
            b: data[f"S2-L2A-{b}"].values.astype(np.uint16) for b in ("B04", "B08", "B11", "SCL")
        }
        days = data.t.values.astype("datetime64[D]").astype(str)
        left, top = float(data.x[0]) - 5, float(data.y[0]) + 5
    arrays = {b: np.where(a == 65535, 0, a) for b, a in arrays.items()}
    grid = grid_at(left, top, 64, 66, 32631)
    clear = np.isin(arrays["SCL"], (2, 4, 5, 6)).mean(axis=(1, 2))
    clearest = [int(n) for n in np.argsort(-clear)[:2]]

    def found(wrong, folder):
        listed = []
        for n, day in enumerate(days):
            on_top = 1000 * (n in wrong)
            assets = {
                b: pystac.Asset(
                    str(
                        write_tif(
                            folder / day / f"{b}.tif",
                            np.where(a[n], a[n] + on_top * (b != "SCL"), 0).astype("u2"),
                            grid,
                        )
                    )
                )
                for b, a in arrays.items()
            }
            properties = {
                "minecube:offset": 0,
                "minecube:access": "{}",
                "minecube:origin": "",
                "minecube:datatake": day,
            }
            when = np.datetime64(f"{day}T10:50:31").astype(object)
            footprint = mapping(grid.extent.to_crs("EPSG:4326").geom)
            listed.append(pystac.Item(day, footprint, None, when, properties, assets=assets))
        return [n for n, c in enumerate(checked(listed, grid)) if c.conflict]

    assert clear[clearest].min() > 0.5
    assert found([], tmp_path / "right") == []
    assert found(clearest[:1], tmp_path / "one") == clearest[:1]
    assert found(clearest, tmp_path / "two") == sorted(clearest)


@pytest.fixture
def april(real_data):
    """The same twelve dates as `checks(bands, decided, on_top)`: offsets as decided, numbers with `on_top` added."""
    with xr.open_dataset(
        real_data / "gfmap_s2l2a" / "cdse_sentinel2_l2a.nc", mask_and_scale=False
    ) as data:
        arrays = {b: data[f"S2-L2A-{b}"].values.reshape(12, -1) for b in (*OF_APRIL, "SCL")}
    missing = np.any([np.isin(arrays[b], (0, 65535)) for b in OF_APRIL], axis=0) | np.isin(
        arrays["SCL"], (0, 1)
    )

    def checks(bands, decided=(0,) * 12, on_top=(0,) * 12):
        stored = np.stack([arrays[b] for b in bands], axis=1) + np.reshape(on_top, (12, 1, 1))
        stored = np.where(missing[:, None], np.nan, stored).astype(np.float32)
        return looked_at(bands, stored, arrays["SCL"].astype(np.uint16), decided)

    return checks


def looked_at(bands, stored, scl, decided):
    ids = tuple(f"{n:02d}" for n in range(len(stored)))
    properties = [
        {"minecube:offset": offset, "minecube:datatake": name}
        for name, offset in zip(ids, decided, strict=True)
    ]
    when = np.datetime64("2023-04-01T10:50:31").astype(object)
    listed = [
        pystac.Item(name, None, None, when, p) for name, p in zip(ids, properties, strict=True)
    ]
    return check_offsets(listed, Look(ids=ids, bands=tuple(bands), stored=stored, scl=scl))


OF_APRIL = ("B01", "B04", "B08", "B11")
CLEAR_IN_APRIL = (1, 5)
SETS_OF_APRIL = [bands for n in (2, 3) for bands in itertools.combinations(OF_APRIL, n)]


@pytest.mark.parametrize("bands", SETS_OF_APRIL, ids="+".join)
def test_right_offsets_of_april_2023_in_few_bands(april, bands):
    checks = april(bands)
    assert [c.scene for c in checks if c.conflict] == []
    answered = [n for n, c in enumerate(checks) if c.step is not None]
    assert set(CLEAR_IN_APRIL) <= set(answered) if bands != ("B08", "B11") else answered == []


@pytest.mark.parametrize("bands", [b for b in SETS_OF_APRIL if b != ("B08", "B11")], ids="+".join)
def test_wrong_offsets_of_april_2023_in_few_bands(april, bands):
    """The offset is removed from numbers without it, or left in numbers that have it: on one clear date or on both."""
    for wrong in (CLEAR_IN_APRIL[:1], CLEAR_IN_APRIL[1:], CLEAR_IN_APRIL):
        is_wrong = np.isin(np.arange(12), wrong)
        removed, left = (
            april(bands, np.where(is_wrong, -1000, 0)),
            april(bands, on_top=np.where(is_wrong, 1000, 0)),
        )
        for checks, should_be in ((removed, 0), (left, -1000)):
            assert [(n, c.should_be) for n, c in enumerate(checks) if c.conflict] == [
                (n, should_be) for n in wrong
            ]


LEAVES = {
    "B03": (400, 1100),
    "B05": (900, 1500),
    "B06": (1800, 3000),
    "B07": (2200, 3500),
    "B08": (2500, 4500),
    "B8A": (2600, 4600),
    "B11": (1200, 2200),
    "B12": (1000, 1600),
}
"""Range of reflectance x 10000 of dry fields."""


@pytest.mark.parametrize(
    "bands", [b for n in (2, 3) for b in itertools.combinations(LEAVES, n)], ids="+".join
)
def test_bands_without_blue_or_red_give_no_answer(bands):
    rng = np.random.default_rng(0)
    land = rng.uniform(*np.transpose([LEAVES[b] for b in bands])[:, :, None], (len(bands), 900))
    stored = (land + rng.normal(0, 40, (4, len(bands), 900))).astype(np.float32)
    scl = np.full((4, 900), VEGETATION, np.uint16)
    for on_top in (0, [[[0]], [[0]], [[1000]], [[1000]]]):  # all bands of a season may move alike
        checks = looked_at(bands, (stored + on_top).astype(np.float32), scl, [0] * 4)
        assert [(c.conflict, c.step) for c in checks] == [(False, None)] * 4


@pytest.mark.slow
def test_simulated_years(tmp_path):
    """Of the scenes that a recipe uses all wrong ones are accused and no right one; of all scenes no right one."""
    sites = [site_of("a", 360000, 5600040, 120, 120), site_of("b", 420000, 5640000, 120, 120)]
    world = World(
        years=(2023,), styles=("earth-search",), wrong_flags=0.2, seed=4, dates_per_year=18
    )
    simulate_archive(sites, tmp_path / "w", world)
    truth = pd.read_parquet(tmp_path / "w" / "truth_offsets.parquet").set_index("id")
    source = load_sources(tmp_path / "w" / "sources.yaml")["sim-earth-search"]
    wrong, untold = 0, 0
    for site in sites:
        for year in world.years:
            listed = list(scenes.search(site, year, source).scenes)
            used = scenes.select(listed, load_recipes()["annual-median"])
            for check in checked(used, grid_of(site)):
                right = -int(truth.carried[check.scene])
                assert check.should_be == (None if check.offset == right else right), check
                assert check.conflict == (check.offset != right), check
                wrong += check.conflict
                untold += check.step is None
            for check in checked(listed, grid_of(site)):
                assert not check.conflict or check.should_be == -int(truth.carried[check.scene]), (
                    check
                )
    assert wrong >= 10
    assert untold <= 2
