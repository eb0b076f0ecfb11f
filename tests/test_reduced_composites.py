"""Every reducer gives the same composite through the whole engine as by brute force."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from known_composites import FOUR, LEFT, PLAIN, TOP
from known_scenes import grid_at
from minecube.catalog import BestPixel, BrightOverride, HazeTest, MaskRule
from minecube.composite import composite
from minecube.errors import ReadError
from minecube.reader import Ledger

EVERY = {
    "median": {},
    "geomedian": {},
    "best-pixel": {"best_pixel": BestPixel()},
}


def four_bands(archive, rng, days=9, cloud=0.2, bright=0.0):
    """Dates of random pixels in four bands, clouds strewn about, some on all dates; a third in part outside the swath."""
    always = rng.random((160, 160)) < bright
    where = grid_at(LEFT - 1200, TOP + 1200, 320, 320)
    many, files = dataclasses.replace(archive, bands=FOUR), []
    listed = []
    for day in range(days):
        scl = np.where((rng.random((160, 160)) < cloud) | always, 9, 4).astype(np.uint8)
        if day % 3 == 0:
            scl[:, : rng.integers(60, 100)] = 0
        pixels = {
            b: rng.integers(100, 4000, (320, 320) if b != "B11" else (160, 160)).astype(np.uint16)
            for b in FOUR
        }
        listed.append(
            many.scene(f"2020-0{4 + day % 6}-{3 + 2 * day:02d}T10:00:00", where, pixels, scl)
        )
        files.append({**pixels, "SCL": scl})
    return listed, files


def spectra(files, row, column):
    """(day, four bands) of one pixel of the grid, in plain numpy: of clear dates whose neighbours are inside the swath."""
    y, x = row + 120, column + 120
    kept = []
    for day, content in enumerate(files):
        scl = content["SCL"]
        around = scl[y // 2 - 1 : y // 2 + 2, x // 2 - 1 : x // 2 + 2]
        if around.all() and scl[y // 2, x // 2] == 4:
            kept.append(
                (
                    day,
                    [
                        int(content[b][y, x]) if b != "B11" else int(content[b][y // 2, x // 2])
                        for b in FOUR
                    ],
                )
            )
    return kept


@pytest.mark.parametrize("reducer", EVERY)
def test_every_reducer_by_brute_force(archive, reducer):
    grid = grid_at(LEFT, TOP, 48, 36)
    recipe = dataclasses.replace(
        PLAIN,
        bands=FOUR,
        mask=(MaskRule(classes=(9,)),),
        fallback=(),
        reducer=reducer,
        **EVERY[reducer],
        block_px=32,
        chunk_px=16,
    )
    listed, files = four_bands(archive, np.random.default_rng(3))
    made = composite(listed, grid, recipe).compute()
    assert set(made.data_vars) == {"reflectance", *recipe.layers}
    for row, column in np.random.default_rng(0).integers(0, (36, 48), (60, 2)):
        kept = spectra(files, row, column)
        got = made.reflectance.values[:, row, column].astype(int)
        assert made.clear_count.values[row, column] == len(kept)
        values = np.array([v for _, v in kept], dtype=float)
        if reducer == "median":
            np.testing.assert_array_equal(got, np.rint(np.median(values, axis=0)))
        elif reducer == "geomedian":
            middle = values.mean(axis=0)
            for _ in range(2000):
                weight = 1 / np.maximum(np.linalg.norm(values - middle, axis=1), 1e-9)
                middle = (values * weight[:, None]).sum(axis=0) / weight.sum()
            assert np.abs(got - middle).max() <= 0.7
            euclidean = np.median(np.linalg.norm(values - middle, axis=1)) / 1e4
            assert made.emad.values[row, column] == pytest.approx(euclidean, abs=2e-4)


@pytest.mark.parametrize(
    ("reducer", "rule"), [("medoid", {}), ("max-ndvi", {}), ("percentile", {"percentile": 30.0})]
)
def test_reducers_of_earlier_versions_are_refused_by_name(archive, reducer, rule):
    where = grid_at(LEFT, TOP, 60, 60)
    scene = archive.scene("2020-06-01T10:00:00", where, {"B04": 1, "B11": 1})
    bands = ("B04", "B08") if reducer == "max-ndvi" else PLAIN.bands
    recipe = dataclasses.replace(PLAIN, reducer=reducer, bands=bands, **rule)
    scene.assets["B08"] = scene.assets["B04"]
    with pytest.raises(
        ReadError, match=f"'{reducer}' has been removed; expected one of median, geomedian"
    ):
        composite([scene], where, recipe)


@pytest.mark.parametrize("reducer", EVERY)
def test_a_date_under_haze_is_no_choice_of_any_reducer(archive, reducer):
    """Five dates, the third hazy over the left half and of the highest NDVI there: no pixel of it, no hole for it."""
    grid, where = grid_at(LEFT, TOP, 48, 36), grid_at(LEFT - 1200, TOP + 1200, 320, 320)
    many, rng, listed = dataclasses.replace(archive, bands=FOUR), np.random.default_rng(2), []
    recipe = dataclasses.replace(
        PLAIN, bands=FOUR, haze=HazeTest(), reducer=reducer, **EVERY[reducer], block_px=32
    )
    for n in range(5):
        blue, red, nir = (
            np.full((320, 320), 400),
            rng.integers(480, 520, (320, 320)),
            np.full((320, 320), 2000 + n),
        )
        if n == 2:
            blue[:, :144], nir[:, :144] = 1500, 9000
        pixels = {"B02": blue, "B04": red, "B08": nir, "B11": 3000 + n}
        listed.append(many.scene(f"2020-07-{11 + 4 * n:02d}T10:00:00", where, pixels))
    made = composite(listed, grid, recipe).compute()
    assert (made.reflectance != 0).all()
    assert (made.clear_count.values[:, :20] == 4).all()
    assert (made.reflectance.sel(band="B02").values == 400).all()
    assert (made.reflectance.sel(band="B08").values < 2005).all()


@pytest.mark.parametrize("reducer", EVERY)
def test_a_block_made_in_parts_is_the_same(archive, reducer):
    """So that memory has a bound whatever the number of dates."""
    grid = grid_at(
        LEFT, TOP, 180, 156
    )  # half of which is no multiple of the bright override's cells
    mask = (MaskRule(classes=(9,), dilate_m=40),)
    override = BrightOverride(window_m=120, classes=(9,))
    recipe = dataclasses.replace(
        PLAIN,
        bands=FOUR,
        mask=mask,
        bright_override=override,
        haze=HazeTest(),
        reducer=reducer,
        **EVERY[reducer],
        block_px=192,
        chunk_px=96,
    )
    listed, _ = four_bands(archive, np.random.default_rng(5), cloud=0.1, bright=0.02)
    whole = composite(listed, grid, recipe).compute()
    ledger = Ledger()
    parts = composite(listed, grid, recipe, ledger, block_bytes=2_000_000).compute()
    masks_read = ledger.table().query("band == 'SCL'")
    assert (masks_read.planned > 2).all()  # once a part
    for name in whole.data_vars:
        np.testing.assert_array_equal(parts[name], whole[name], err_msg=name)
