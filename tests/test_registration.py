"""Shifts that are found against shifts that were made: land known everywhere at 2.5 m, seen from where a scene lies."""

from __future__ import annotations

import dataclasses
import itertools
import logging

import numpy as np
import pystac
import pytest
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox
from pyproj import Transformer
from rasterio.enums import Resampling
from scipy import ndimage
from scipy.spatial import cKDTree

from known_scenes import grid_at
from minecube.catalog import Registration
from minecube.composite import registration
from minecube.composite.registration import (
    Shift,
    apply_registration,
    as_rows,
    compare,
    correlate,
    edges_of,
    measure_shifts,
    shift_of,
)
from minecube.errors import ReadError
from minecube.grid import choose_windows
from minecube.reader import Ledger, read, read_band

EPSG, LEFT, TOP = 32633, 360000, 5600040
FINE = 2.5
"""Metres; all shifts are multiples of it, so that they are exact."""
WATER, VEGETATION, CLOUD, SHADOW = 6, 4, 9, 3


def cloudlike(n, rng, slope):
    """A fractal of n x n pixels, mean 0, standard deviation 1."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(n), np.fft.fftfreq(n)))
    frequency[0, 0] = np.inf
    field = np.fft.ifft2(np.fft.fft2(rng.normal(size=(n, n))) / frequency**slope).real
    return field / field.std()


class Land:
    """Fields of `field_px` pixels across and what grows unevenly on them, 120 m beyond a site of `px` pixels of 10 m a side."""

    def __init__(self, px, seed, field_px=14):
        rng = np.random.default_rng(seed)
        self.px, self.rng = px, rng
        n = round((10 * px + 240) / FINE)
        self.fields = round(((px + 24) / field_px) ** 2)
        corners = cKDTree(rng.uniform(0, n, (self.fields, 2)))
        self.field = corners.query(np.indices((n, n)).reshape(2, -1).T.astype(np.float32))[
            1
        ].reshape(n, n)
        self.colour = rng.uniform(300, 2000, self.fields)
        self.uneven = (60 * cloudlike(n, rng, 1.3) + 150 * cloudlike(n, rng, 1.8)).astype(
            np.float32
        )

    @property
    def grid(self):
        return GeoBox((self.px, self.px), Affine(10, 0, LEFT, 0, -10, TOP), f"EPSG:{EPSG}")

    def on_a_date(self, at, changes=True):
        """Red reflectance x 10000 at points of the raster: half of the fields new, the season's contrast and brightness."""
        if not changes:
            return self.colour[self.field[at]] + self.uneven[at]
        new = self.rng.random(self.fields) < 0.5
        colour = np.where(new, self.rng.uniform(300, 2500, self.fields), self.colour)
        points = colour[self.field[at]] + self.uneven[at] * self.rng.uniform(0.5, 1.3)
        return points * self.rng.uniform(0.7, 1.4) + self.rng.uniform(0, 200)

    def seen(self, shift=(0, 0), grid=None, noise=40, changes=True):
        """A date as it looks on a grid of any zone, its content lying by `shift` metres too far east and north."""
        grid = grid or self.grid
        size = grid.resolution.x
        rows, columns = (
            np.arange(0.5, 4 * n) / 4 for n in grid.shape
        )  # 4 x 4 points in each pixel
        x, y = grid.transform * np.meshgrid(columns, rows)
        if grid.crs.epsg != EPSG:
            x, y = Transformer.from_crs(grid.crs.epsg, EPSG, always_xy=True).transform(x, y)
        row, column = (
            np.rint(d / FINE - 0.5).astype(int)
            for d in (TOP + 120 - y + shift[1], x - LEFT + 120 - shift[0])
        )
        n = len(self.field)
        there = (row >= 0) & (row < n) & (column >= 0) & (column < n)
        points = np.where(
            there, self.on_a_date((row.clip(0, n - 1), column.clip(0, n - 1)), changes), 0
        )
        mean = points.reshape(grid.shape[0], 4, grid.shape[1], 4).mean(axis=(1, 3))
        noisy = mean + self.rng.normal(0, noise * 10 / size, mean.shape)
        return np.where(mean > 0, np.clip(noisy, 1, 60000), 0).round().astype(np.uint16)


def clouded(pixels, share, rng):
    """The pixels under a share of cloud with soft edges and shadow, and SCL at 20 m that finds all but the thinnest."""
    n = len(pixels)
    field = cloudlike(n // 2, rng, 1.5)
    above = field - np.quantile(field, 1 - share)
    thick, shadow = np.clip(3 * above, 0, 1), np.roll(above > 0.1, (6, -5), (0, 1))
    thick10 = ndimage.zoom(thick, 2, order=1)
    dark = np.where(shadow.repeat(2, 0).repeat(2, 1), 0.6 * pixels, pixels)
    return (dark * (1 - thick10) + 6000 * thick10).astype(np.uint16), np.where(
        thick > 0.1, CLOUD, np.where(shadow, SHADOW, 4)
    )


def edges(pixels, scl):
    return edges_of(pixels, ~np.isin(scl.repeat(2, 0).repeat(2, 1), registration._HIDDEN))


def made_shifts(n, moved, rng, most_m=20):
    """n x [east, north], metres: of each axis, some multiple of FINE for the first `moved`, 0 for the others."""
    steps = rng.integers(-most_m / FINE, most_m / FINE + 1, (n, 2)) * FINE
    return np.where(np.arange(n)[:, None] < moved, steps, 0.0)


@pytest.mark.parametrize(("seed", "field_px"), [(0, 9), (1, 14), (2, 30)])
def test_a_year_of_known_shifts(seed, field_px):
    """Half of all fields are new on each date, up to 70 % are clouded, a fourth of the scenes lie beside the others."""
    land, n = Land(240, seed, field_px), 16
    made, cover = made_shifts(n, 4, land.rng), np.tile([0, 0.2, 0.4, 0.7], 4)[:n]
    year = []
    for shift, share in zip(made, land.rng.permutation(cover), strict=True):
        pixels = land.seen(shift)
        year.append(
            edges(*clouded(pixels, share, land.rng))
            if share
            else edges(pixels, np.full((120, 120), VEGETATION))
        )
    found, peak = compare(year)
    clear = np.array([np.count_nonzero(e) for e in year])
    error = np.linalg.norm(found - made / 10, axis=1)
    assert np.isfinite(error[clear > 5000]).all()
    assert np.nanmax(error) < 0.2
    assert np.nanmax(error[clear > 10000]) < 0.1
    assert np.nanmedian(error) < 0.05
    assert not (np.linalg.norm(found[4:], axis=1) > 0.5).any()  # nobody is accused that lies right
    assert ((peak > 0.5) | np.isnan(found[:, 0])).all()


def test_nobody_is_accused_who_lies_right_and_small_sites_are_told_too():
    accused = told = 0
    for seed in range(6):
        land = Land(120, 50 + seed, (9, 14, 24)[seed % 3])
        year = [
            edges(*clouded(land.seen(), land.rng.uniform(0.01, 0.7), land.rng)) for _ in range(7)
        ]
        found, _ = compare(year)
        accused += np.count_nonzero(np.linalg.norm(found, axis=1) > 0.5)
        told += np.count_nonzero(np.isfinite(found[:, 0]))
    assert accused == 0
    assert told > 24


def test_where_the_clearest_is_the_one_that_lies_beside():
    """It is the first reference, and yet not the measure of the others."""
    land, rng = Land(120, 7), np.random.default_rng(7)
    made = np.zeros((6, 2))
    made[3] = 12.5, -7.5
    year = [edges(*clouded(land.seen(s), 0.02 if s.any() else 0.3, rng)) for s in made]
    found, _ = compare(year)
    assert np.argmax([np.count_nonzero(e) for e in year]) == 3
    np.testing.assert_allclose(found, made / 10, atol=0.12)


def test_shifts_too_small_to_matter_are_told_from_each_other():
    """Every scene lies somewhere else, by a quarter of a pixel or none."""
    land = Land(180, 9)
    made = land.rng.integers(-1, 2, (9, 2)) * FINE
    made -= np.median(made, axis=0)
    found, _ = compare([edges(*clouded(land.seen(s), 0.2, land.rng)) for s in made])
    error = found - made / 10
    assert np.linalg.norm(error - np.median(error, axis=0), axis=1).max() < 0.12
    assert abs(np.median(error, axis=0)).max() < 0.1


def test_zero_is_among_those_that_agree():
    one, other = np.array([[0.1, 0], [-0.1, 0.1], [0, -0.1]]), np.array([[2.0, 2], [2.1, 2]])
    np.testing.assert_allclose(
        registration.zero_of(np.concatenate([other, one])), [0, 0], atol=0.11
    )
    np.testing.assert_array_equal(
        registration.zero_of(np.array([[3.0, 0], [0, 0]])), [3, 0]
    )  # of two, the clearer
    np.testing.assert_array_equal(
        registration.zero_of(np.array([[0.0, 0], [0.4, -0.2]])), [0.2, -0.1]
    )
    np.testing.assert_array_equal(
        registration.zero_of(np.array([[0.0, 0], [2.0, 0], [0, 0], [2.0, 0]])), [0, 0]
    )


def test_what_cannot_be_told():
    """Water, a lone border, unlike places, one scene, none: nobody is accused."""
    rng = np.random.default_rng(5)
    all_clear = np.ones((120, 120), bool)

    def told(*layers):
        found, _ = compare([edges_of(layer.astype(np.uint16), all_clear) for layer in layers])
        return np.isfinite(found[:, 0]).any()

    water = [250 + 15 * rng.normal(size=(120, 120)) for _ in range(6)]
    assert not told(*water)
    assert not told(
        *(1000 + 1000 * (np.arange(120) > 60)[None] + w for w in water)
    )  # one straight border: where along it?
    assert not told(*(1000 + 300 * cloudlike(120, rng, 1.5) for _ in range(6)))
    land = Land(120, 5)
    assert told(land.seen(), land.seen())
    assert not told(land.seen())
    assert not told(land.seen(), np.full((120, 120), 1000))
    stripes = 1000 + 500 * np.sin(np.arange(120)[None] * 2 * np.pi / 5)
    assert not told(*(stripes + w for w in water))
    assert compare([])[0].shape == (0, 2)


def test_a_first_scene_like_no_other_does_not_spoil_the_rest():
    land, rng = Land(120, 8), np.random.default_rng(8)
    made = np.zeros((6, 2))
    made[4] = -15, 5
    year = [edges(*clouded(land.seen(s), 0.3, rng)) for s in made]
    haze = edges_of(
        (1000 + 300 * cloudlike(120, rng, 1.5)).astype(np.uint16), np.ones((120, 120), bool)
    )
    found, _ = compare([haze, *year])
    assert np.isnan(found[0]).all()
    np.testing.assert_allclose(found[1:], made / 10, atol=0.15)


def test_correlation_by_brute_force():
    rng = np.random.default_rng(1)
    ours, theirs = (rng.normal(size=(2, 40, 31)) + 1j * rng.normal(size=(2, 40, 31))).astype(
        np.complex64
    )
    ours[:, 20:], theirs[5:15] = 0, 0
    surface = correlate(ours, theirs)
    for down, right in itertools.product((-8, -3, 0, 2, 8), repeat=2):
        product = our_power = their_power = 0.0
        for y, x in itertools.product(range(40), range(31)):
            if (
                0 <= y + down < 40
                and 0 <= x + right < 31
                and ours[y + down, x + right]
                and theirs[y, x]
            ):
                a, b = ours[y + down, x + right], theirs[y, x]
                product, our_power, their_power = (
                    product + (a * b.conj()).real,
                    our_power + abs(a) ** 2,
                    their_power + abs(b) ** 2,
                )
        expected = product / np.sqrt(our_power * their_power)
        assert surface[8 + down, 8 + right] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("right", "down"), [(0, 0), (0.3, -0.4), (-0.5, 0.5)])
def test_vertex_of_a_parabola_is_exact(right, down):
    y, x = np.mgrid[-1:2, -1:2]
    nine = 0.8 - 0.2 * (x - right) ** 2 - 0.1 * (y - down) ** 2 + 0.07 * (x - right) * (y - down)
    assert registration.find_vertex(nine) == pytest.approx((right, down))
    assert registration.find_vertex(-nine) == (0, 0)
    assert registration.find_vertex(np.ones((3, 3))) == (0, 0)


def test_edges_know_neither_sign_nor_brightness():
    pixels = Land(120, 2).seen(noise=0)
    clear = np.ones(pixels.shape, bool)
    clear[:, 60:70] = False
    plain, turned = (
        edges_of(pixels, clear),
        edges_of((5000 - pixels.astype(int) // 2).astype(np.uint16), clear),
    )
    np.testing.assert_allclose(turned, plain, atol=0.02)
    assert abs(plain).max() <= 1
    assert not plain[:, 56:74].any()
    assert plain[4:-4, 4:56].all(axis=1).mean() > 0.9
    assert not plain[:4].any()
    northward = edges_of(
        np.arange(120, dtype=np.uint16)[:, None] * np.ones((1, 120), np.uint16),
        np.ones((120, 120), bool),
    )
    assert (
        northward[10:-10, 10:-10].real < 0
    ).all()  # the angle of a border that runs east, doubled


def world(archive, land, made, dates, zones=None):
    """Scenes of the archive, one a date, each lying by a made shift beside its place."""
    zones = zones or {}
    listed = []
    for day, shift in zip(dates, made, strict=True):
        grid = zones.get(day, land.grid)
        band = next(b for b in archive.bands if b != "SCL")
        where = grid.zoom_out(archive.resolution[band] / 10)
        listed.append(
            archive.scene(
                day,
                grid,
                {band: land.seen(shift, where)},
                VEGETATION,
                tile=f"{grid.crs.epsg - 32600}UUR",
            )
        )
    return listed


def days(n):
    return [f"2021-06-{d:02}T10:10:21" for d in range(1, n + 1)]


def test_scenes_of_an_archive(archive):
    """Files and items: in the order given, with signs as on a map; another zone, half a swath, all cloud, both or neither."""
    archive.bands = ("B04",)
    land = Land(144, 11)
    made = [(0, 0), (12.5, 2.5), (0, 0), (-2.5, -17.5), (0, 0), (7.5, -5)]
    here = Transformer.from_crs(EPSG, 32632, always_xy=True).transform(LEFT + 720, TOP - 720)
    left, top = (round(v / 60) * 60 for v in here)
    neighbour = GeoBox((300, 300), Affine(10, 0, left - 1500, 0, -10, top + 1500), "EPSG:32632")
    dates = days(8)
    listed = world(archive, land, made, dates[:6], {dates[4]: neighbour, dates[5]: neighbour})
    swath = land.seen((-7.5, 10))
    parts = []
    for tile, columns in (
        ("33UUR", slice(0, 80)),
        ("33UUS", slice(76, 144)),
    ):  # one overpass in two granules, cut
        part, scl = np.zeros_like(swath), np.zeros((72, 72), np.uint8)
        part[:, columns], scl[:, columns.start // 2 : columns.stop // 2] = (
            swath[:, columns],
            VEGETATION,
        )
        parts.append(archive.scene(dates[6], land.grid, {"B04": part}, scl, tile=tile))
    white = archive.scene(dates[7], land.grid, {"B04": 6000}, CLOUD)
    listed = [white, *listed, *parts]
    made = [*made, (-7.5, 10), (-7.5, 10)]

    ledger = Ledger()
    found = measure_shifts(listed, land.grid, ledger)
    assert [s.scene for s in found] == [s.id for s in listed]
    assert found[0] == Shift(scene=white.id, dx_m=None, dy_m=None, peak=None, pixels=0)
    assert "its displacement is unknown" in str(found[0])
    for shift, (east, north) in zip(found[1:], made, strict=True):
        assert np.hypot(shift.dx_m - east, shift.dy_m - north) < 1, shift  # a tenth of a pixel
        assert 0.5 <= shift.peak <= 1
        assert shift.distance_m == pytest.approx(np.hypot(shift.dx_m, shift.dy_m))
    assert 0.98 * 136**2 < found[1].pixels <= 136**2  # 40 m inside; what is flat has no edges
    reads = ledger.table().set_index(["scene", "band"]).read
    assert (white.id, "B04") not in reads.index  # no read where there is nothing to see
    assert (reads == 1).all()
    assert len(reads) == 2 * len(listed) - 1


def test_registered_pixels_lie_where_they_should(archive):
    """Read on a grid moved by the shift: what a scene that lies right would show, to what bilinear resampling blurs."""
    archive.bands = ("B04", "B11")
    land = Land(144, 12)
    made, quiet = [(0, 0), (0, 0), (12.5, -7.5), (0, 0)], {"noise": 0, "changes": False}
    coarse = land.grid.zoom_out(2)
    listed = []
    for day, shift in zip(days(4), made, strict=True):
        bands = {"B04": land.seen(shift, **quiet), "B11": land.seen(shift, coarse, **quiet)}
        listed.append(archive.scene(day, land.grid, bands, np.where(bands["B11"] > 1000, 5, 4)))
    before = [s.to_dict() for s in listed]
    found = measure_shifts(listed, land.grid)
    kept = apply_registration(listed, found, Registration(most_px=0.5, beyond="shift"))
    assert [s.to_dict() for s in listed] == before
    assert [s is k for s, k in zip(listed, kept, strict=True)] == [True, True, False, True]
    dx, dy = kept[2].properties[registration.SHIFT]
    assert (dx, dy) == pytest.approx((12.5, -7.5), abs=0.6)
    inner = slice(4, -4), slice(4, -4)
    for band, grid in (("B04", land.grid), ("B11", coarse)):
        there = GeoBox(grid.shape, Affine.translation(dx, dy) @ grid.transform, grid.crs)
        right, raw, moved = (
            read(scene.assets[band].href, on, Resampling.bilinear).astype(float)[inner]
            for scene, on in ((listed[0], grid), (kept[2], grid), (kept[2], there))
        )
        np.testing.assert_array_equal(read_band(kept[2], band, grid)[inner], moved)
        # 12.5 m is little more than half of a 20 m pixel, and bilinear resampling blurs.
        assert (
            np.abs(moved - right).mean()
            < (0.5 if band == "B04" else 0.7) * np.abs(raw - right).mean()
        )
        left = shift_of(
            *(edges_of(p.astype(np.uint16), np.ones(p.shape, bool)) for p in (moved, right))
        )[0]
        assert band == "B11" or np.hypot(*left) < 0.1
    there = GeoBox(coarse.shape, Affine.translation(dx, dy) @ coarse.transform, coarse.crs)
    right, raw, moved = (
        read(scene.assets["SCL"].href, on, Resampling.nearest)[inner]
        for scene, on in ((listed[0], coarse), (kept[2], coarse), (kept[2], there))
    )
    np.testing.assert_array_equal(read_band(kept[2], "SCL", coarse)[inner], moved)
    np.testing.assert_array_equal(
        moved[:, :-1], raw[:, 1:]
    )  # 12.5 m is more than half of its pixels, 7.5 m less
    assert (moved != right).mean() < (raw != right).mean()


def test_bands_of_20_m_where_there_are_no_others(archive):
    archive.bands = ("B11",)
    land = Land(240, 13, 24)
    made = [(0, 0), (22.5, -12.5), (0, 0), (0, 0)]
    found = measure_shifts(world(archive, land, made, days(4)), land.grid)
    np.testing.assert_allclose([(s.dx_m, s.dy_m) for s in found], made, atol=3)


def test_no_band_that_all_have_and_no_scenes(archive):
    land = Land(24, 1)
    archive.bands = ("B04",)
    one = archive.scene("2021-06-01T10:10:21", land.grid, {"B04": 500})
    archive.bands = ("B11",)
    other = archive.scene("2021-06-03T10:10:21", land.grid, {"B11": 500})
    assert [s.dx_m for s in measure_shifts([one, other], land.grid)] == [None, None]
    assert measure_shifts([], land.grid) == []
    assert apply_registration([], [], Registration()) == []


def test_a_read_that_fails(archive, tmp_path):
    archive.bands = ("B04",)
    land = Land(120, 14)
    listed = world(archive, land, [(0, 0)] * 3, days(3))
    listed[1].assets["B04"].href = str(tmp_path / "gone.tif")
    with pytest.raises(ReadError, match=r"gone\.tif"):
        measure_shifts(listed, land.grid, Ledger())
    ledger = Ledger(lossy=True)
    found = measure_shifts(listed, land.grid, ledger)
    assert [s.dx_m is None for s in found] == [False, True, False]
    assert ledger.totals()["lost"] == 1


def test_of_a_large_site_only_the_middle_is_read():
    small, large = grid_at(LEFT, TOP, 480, 120), grid_at(LEFT, TOP, 3000, 600)
    assert choose_windows(small) == [small]
    (middle,) = choose_windows(large)
    assert middle.shape == (510, 510)
    box, whole = middle.boundingbox, large.boundingbox
    assert all(v % 60 == 0 for v in (box.left - whole.left, whole.top - box.top))
    assert abs((box.left - whole.left) - (whole.right - box.right)) < 120
    assert abs((box.bottom - whole.bottom) - (whole.top - box.top)) < 120


def test_what_is_done_with_them(caplog):
    def scene(name):
        when = np.datetime64("2021-06-01T10:00:00").astype(object)
        return pystac.Item(
            id=name, geometry=None, bbox=None, datetime=when, properties={"minecube:offset": 0}
        )

    listed = [scene(name) for name in "abcd"]
    shift = Shift(scene="a", dx_m=3.0, dy_m=-4.0, peak=0.9, pixels=5000)  # 5 m, no more
    found = [
        shift,
        dataclasses.replace(shift, scene="b", dx_m=3.04, dy_m=-4.06),
        dataclasses.replace(shift, scene="c", dx_m=None, dy_m=None),
        dataclasses.replace(shift, scene="d", dx_m=-13.27, dy_m=0.0),
    ]
    with caplog.at_level(logging.INFO):
        kept = {
            b: apply_registration(listed, found, Registration(most_px=0.5, beyond=b))
            for b in ("record", "drop", "shift")
        }
    assert kept["record"] == listed
    assert kept["drop"] == [listed[0], listed[2]]
    assert [s.id for s in kept["shift"]] == list("abcd")
    assert [s.properties.get("minecube:shift_m") for s in kept["shift"]] == [
        None,
        [3.0, -4.1],
        None,
        [-13.3, 0.0],
    ]
    assert not any("minecube:shift_m" in s.properties for s in listed)
    assert kept["shift"][0] is listed[0]
    assert [r.levelname for r in caplog.records] == ["WARNING"] * 4 + ["INFO"] * 2
    assert caplog.messages[3] == "d: lies -13.3 m east and +0.0 m north of the others (left out)"
    assert as_rows(found[1:3]) == [
        {"scene": "b", "dx_m": 3.0, "dy_m": -4.1, "peak": 0.9, "pixels": 5000},
        {"scene": "c", "dx_m": None, "dy_m": None, "peak": 0.9, "pixels": 5000},
    ]
    assert len(apply_registration(listed, found, Registration(most_px=2, beyond="drop"))) == 4


def test_real_dates(real_data):
    """April 2023 in Belgium: two clear dates lie alike, and one of them, moved by 1.3 pixels, is the one that is found."""
    with xr.open_dataset(
        real_data / "gfmap_s2l2a" / "cdse_sentinel2_l2a.nc", mask_and_scale=False
    ) as data:
        red, scl = (data[f"S2-L2A-{b}"].values.astype(np.uint16) for b in ("B04", "SCL"))
    clear = ~np.isin(scl, registration._HIDDEN) & (red != 65535)
    year = [edges_of(pixels, seen) for pixels, seen in zip(red, clear, strict=True)]
    found, _ = compare(year)
    assert np.flatnonzero(np.isfinite(found[:, 0])).tolist() == [1, 5]
    assert np.linalg.norm(found[[1, 5]], axis=1).max() < 0.25
    rows, columns = np.fft.fftfreq(66)[:, None], np.fft.fftfreq(64)[None]
    for east, north in ((1.3, 0), (-0.9, 0.94), (0, -1.3)):
        ramp = np.exp(-2j * np.pi * (columns * east - rows * north))
        moved = np.fft.ifft2(np.fft.fft2(red[5]) * ramp).real.clip(1).astype(np.uint16)
        found, _ = compare([*year, edges_of(moved, clear[5])])
        np.testing.assert_allclose(found[-1] - found[5], (east, north), atol=0.15)
        assert np.linalg.norm(found[-1]) > 0.9
        assert np.linalg.norm(found[[1, 5]], axis=1).max() < 0.5
