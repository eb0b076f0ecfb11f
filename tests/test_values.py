"""Values that cannot be trusted: found in simulated products whose faults are known, and in no others."""

from __future__ import annotations

import dataclasses
import itertools
import pickle

import geopandas as gpd
import numpy as np
import pandas as pd
import pystac
import pytest
import rasterio
import stac_geoparquet.arrow
import yaml
from scipy import ndimage

from known_builds import run_here
from known_scenes import grid_at, site_of
from minecube import cube, scenes
from minecube.catalog import BANDS, NATIVE_M, SCL, MaskRule, Recipe, load_recipes, load_sources
from minecube.composite import composite, masks, values
from minecube.composite.needs import index_overpasses, sort_in_mosaic_order
from minecube.cube.provenance import hash_run
from minecube.errors import SceneError
from minecube.grid import coarsen, grid_of, pad
from minecube.jobs import build as building
from minecube.jobs import pixel_audit
from minecube.jobs.scene_lists import load_or_save
from minecube.reader import Ledger, start_read
from minecube.simulate import World, simulate_archive
from minecube.simulate.faults import STRIP_PX
from minecube.simulate.noise import draw_fractal

RECIPE = dataclasses.replace(load_recipes()["annual-median"], min_dates=1)
EXPECTED = {
    "constant": "stuck",
    "saturated": "stuck",
    "strip": "strip",
    "displaced": "displaced",
    "wrapped": None,
}
"""Fault of the simulation -> the fault to be found; numbers above 32767 are only counted."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A site of 256 x 240 px; a third of its granules of 2023 have a fault in one band."""
    folder = tmp_path_factory.mktemp("world")
    site = site_of("pit", 360000, 5600040, 256, 240)
    world = World(years=(2023,), dates_per_year=22, styles=("cdse",), value_faults=0.5, seed=5)
    simulate_archive([site], folder / "archive", world)
    gpd.GeoDataFrame({"id": ["pit"], "margin": [0]}, geometry=[site.geometry], crs=4326).to_file(
        folder / "sites.geojson"
    )
    return folder, site


def truth_of(world):
    table = pd.read_parquet(world[0] / "archive" / "truth_values.parquet")
    return {row.id: (row.fault, row.band) for row in table.itertuples()}


def source_of(world):
    return load_sources(world[0] / "archive" / "sources.yaml")["sim-cdse"]


@pytest.fixture(scope="module")
def built(world):
    """(store, outcome of the build, its provenance)"""
    folder, site = world
    job = building.BuildJob(
        store=cube.Store(str(folder / "cubes.zarr")),
        sources=(source_of(world),),
        recipe=RECIPE,
        snapshots=folder / "lists",
    )
    (outcome,) = building.build_cubes(job, [site], [2023])
    assert outcome.state == "built"
    return job, outcome, cube.read_markers(job.store, "pit")[2023]


def share_used(world, listed):
    """Share of the site that is clear and comes from each scene: id -> share."""
    grid = coarsen(grid_of(world[1]), 20)
    ordered = sort_in_mosaic_order(listed, grid_of(world[1]))
    scl = [start_read(scene, SCL, grid).result().astype(np.uint8) for scene in ordered]
    owner, mosaic = masks.mosaic_scenes(scl, index_overpasses(ordered))
    clear = np.isin(mosaic, (4, 5))
    return {scene.id: (clear & (owner == n)).sum() / scl[0].size for n, scene in enumerate(ordered)}


def test_faults_are_found_in_the_scenes_that_have_them(world, built):
    """A fault is a scene's own. Where a third of the site is clear, no stuck band is missed."""
    job, outcome, made = built
    truth = truth_of(world)
    found = {fault.scene: (fault.fault, fault.band) for fault in outcome.value_faults}
    assert found
    for scene, (fault, band) in found.items():
        assert (fault, band) == (EXPECTED[truth[scene][0]], truth[scene][1])
    listed = load_or_save(world[1], 2023, job.sources, job.snapshots).scenes
    clear = share_used(world, listed)
    used = {scene["id"] for scene in made["scenes"]}
    due = {scene for scene, (fault, _) in truth.items() if fault in ("constant", "saturated")}
    due = {scene for scene in due & used if clear[scene] > 0.3}
    assert len(due) >= 5
    assert due <= set(found)
    assert {fault for fault, _ in found.values()} == {"stuck", "strip"}


def test_the_provenance_names_them(world, built):
    _, outcome, made = built
    truth = truth_of(world)
    assert [(row["scene"], row["band"], row["fault"]) for row in made["value_faults"]] == [
        (fault.scene, fault.band, fault.fault) for fault in outcome.value_faults
    ]
    left_out = {scene["id"] for scene in made["scenes"] if scene.get("left_out") == "values"}
    assert left_out == {f.scene for f in outcome.value_faults if f.fault != "strip"}
    wrapped = [row for row in made["struck"] if row["band"] != SCL]
    assert wrapped
    for row in wrapped:
        assert truth[row["scene"]] == ("wrapped", row["band"])
        assert row["pixels"] > 0
    assert outcome.reads["struck"] == sum(row["pixels"] for row in made["struck"])


def test_pixels_are_those_of_a_build_without_the_scenes(world, built):
    job, outcome, made = built
    opened = cube.open_committed(job.store, "pit").sel(year=2023)
    used = {s["id"]: s for s in made["scenes"] if "left_out" not in s}
    usable = scenes.select(load_or_save(world[1], 2023, job.sources, job.snapshots).scenes, RECIPE)
    usable = values.apply_faults([s for s in usable if s.id in used], outcome.value_faults)
    assert len(usable) == outcome.scenes
    # The site's recipe marks scenes before it composites; without marks the rest is the same.
    marked = building.veils.mark_wrong_classifications(
        usable, building.read_look(usable, grid_of(world[1])), RECIPE.haze
    )
    shifts = building.registration.measure_shifts(marked, grid_of(world[1]))
    marked = building.registration.apply_registration(marked, shifts, RECIPE.registration)
    expected = composite(marked, grid_of(world[1]), RECIPE, year=2023).compute()
    np.testing.assert_array_equal(opened.reflectance, expected.reflectance)


def test_a_second_run_does_nothing(world, built):
    job, outcome, _ = built
    (again,) = building.build_cubes(job, [world[1]], [2023])
    assert (again.state, again.scenes) == ("kept", outcome.scenes)


def test_a_strip_is_cut_off(world, built):
    """All of the low values are gone: a composite is as if they had been without data."""
    job, outcome, made = built
    (strip,) = (fault for fault in outcome.value_faults if fault.fault == "strip")
    assert values.CUT_PX > STRIP_PX
    (row,) = (row for row in made["struck"] if row["band"] == SCL)
    assert row["scene"] == strip.scene
    (scene,) = (
        scene
        for scene in load_or_save(world[1], 2023, job.sources, job.snapshots).scenes
        if scene.id == strip.scene
    )
    scl = start_read(scene, SCL, coarsen(pad(grid_of(world[1]), 480), 20)).result()
    inside = ndimage.binary_erosion(scl > 0, np.ones((3, 3)), values.CUT_PX, border_value=1)
    assert row["pixels"] == ((scl > 0) & ~inside)[24:-24, 24:-24].sum()


@pytest.mark.parametrize("internal_mask", [False, True], ids=["tiles", "GDAL"])
def test_numbers_above_32767_are_counted(archive, internal_mask):
    """The file's own nodata and pixels behind its mask are not counted."""
    rng = np.random.default_rng(3)
    grid = grid_at(360000, 5600040, 240, 180)
    pixels = rng.integers(1, 9000, grid.shape, dtype=np.uint16)
    wrapped = rng.random(grid.shape) < 0.1
    pixels[wrapped] = rng.integers(32768, 65536, wrapped.sum())
    scene = archive.scene("2020-07-01T10:00:00", grid, {"B04": pixels, "B11": 5})
    hidden = np.zeros(grid.shape, bool)
    if internal_mask:
        hidden[:40] = True
        with (
            rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
            rasterio.open(scene.assets["B04"].href, "r+") as file,
        ):
            file.write_mask(~hidden)
    ledger = Ledger()
    got = start_read(scene, "B04", grid, ledger).result()
    np.testing.assert_array_equal(got, np.where(wrapped | hidden, 0, pixels))
    count = int((wrapped & ~hidden).sum())
    assert ledger.list_struck() == [{"scene": scene.id, "band": "B04", "pixels": count}]
    again = Ledger(before=ledger.to_parquet())
    start_read(scene, "B04", grid, again.for_repeats()).result()
    assert again.totals()["struck"] == count


def test_the_error_of_too_few_dates_counts_the_reasons():
    left_out = {"a": "values", "b": "offset", "c": "values"}
    with pytest.raises(
        SceneError, match=r"0 dates of 2023 .*; scenes left out: offset 1, values 2"
    ):
        scenes.need_dates([], RECIPE, 2023, left_out)


@pytest.mark.parametrize("min_dates", [4, 5])
def test_blocks_find_faults_one_after_the_other(archive, tmp_path, min_dates):
    """Two blocks each saturate a scene of their own. A build starts again until it finds no more."""
    rng = np.random.default_rng(8)
    site = site_of("pit", 360000, 5600040, 256, 128)
    grid = grid_of(site)
    around = pad(grid, 320)
    many = dataclasses.replace(archive, bands=("B02", "B04", "B08", "B11"))
    middle = around.shape[1] // 2
    halves = {"2023-05-01": slice(0, middle), "2023-06-01": slice(middle, None)}
    items = []
    for day in (*halves, "2023-07-01", "2023-08-01", "2023-09-01", "2023-10-01"):
        pixels = {
            band: rng.integers(2000, 6000, coarsen(around, NATIVE_M[band]).shape, dtype=np.uint16)
            for band in many.bands
        }
        if day in halves:
            part = pixels["B04"][:, halves[day]]
            part[:] = np.minimum(part, 4000)
        items.append(many.item(f"{day}T10:00:00", around, pixels).to_dict())
    table = stac_geoparquet.arrow.parse_stac_items_to_arrow(items)
    stac_geoparquet.arrow.to_parquet(table, archive.root / "items.parquet")
    job = building.BuildJob(
        store=cube.Store(tmp_path / "cubes.zarr"),
        sources=(many.source,),
        recipe=Recipe(
            id="small",
            title="t",
            bands=many.bands,
            mask=(MaskRule(classes=(9,)),),
            min_dates=min_dates,
            block_px=128,
            chunk_px=128,
        ),
        snapshots=tmp_path / "lists",
    )
    (outcome,) = building.build_cubes(job, [site], [2023])
    if min_dates == 5:
        assert outcome.state == "failed"
        assert "4 dates of 2023 are left" in outcome.message
        assert "scenes left out: values 2;" in outcome.message
        return
    assert outcome.state == "built", outcome.message
    assert [fault.scene[11:19] for fault in outcome.value_faults] == ["20230501", "20230601"]
    assert (cube.open_committed(job.store, "pit").clear_count == 4).all()


@pytest.mark.parametrize("recipe", ["annual-geomedian", "summer-bap"])
def test_other_reducers_are_checked(world, built, recipe):
    """Whatever reads the bands, a constant band is found, and no scene without a fault."""
    truth = truth_of(world)
    recipe = dataclasses.replace(load_recipes()[recipe], registration=None)
    listed = load_or_save(world[1], 2023, built[0].sources, built[0].snapshots).scenes
    annual = composite(
        scenes.select(listed, recipe), grid_of(world[1]), recipe, year=2023, check_values=True
    )
    with pytest.raises(values.UntrustedValuesError) as error:
        annual.compute()
    found = {fault.scene: fault.fault for fault in error.value.faults}
    assert "stuck" in found.values()
    assert all(EXPECTED[truth[scene][0]] == fault for scene, fault in found.items())


@pytest.mark.parametrize("scl", [4, 9], ids=["clear", "cloud"])
@pytest.mark.parametrize("by", ["composite", "audit"])
def test_only_clear_pixels_count(archive, scl, by):
    """A cloud that fills a gap saturates a band. The ground does not."""
    rng = np.random.default_rng(6)
    grid = grid_at(360000, 5600040, 128, 128)
    around = pad(grid, 320)
    many = dataclasses.replace(archive, bands=("B02", "B04", "B08", "B11"))
    pixels = {
        band: rng.integers(2000, 6000, coarsen(around, NATIVE_M[band]).shape, dtype=np.uint16)
        for band in many.bands
    }
    pixels["B04"] = np.minimum(pixels["B04"], 4000)
    scene = many.scene("2023-07-01T10:00:00", around, pixels, scl)
    recipe = Recipe(
        id="cloudy",
        title="cloud where nothing else is",
        bands=many.bands,
        mask=(MaskRule(classes=(9,)),),
        fallback=("ungrown", "thin", "cloud"),
        block_px=128,
        chunk_px=128,
    )
    found = []
    if by == "audit":
        found, _ = values.check_scenes([scene], grid, recipe)
    else:
        try:
            composite([scene], grid, recipe, check_values=True).compute()
        except values.UntrustedValuesError as error:
            found = list(error.faults)
    assert [(f.fault, f.band) for f in found] == ([("stuck", "B04")] if scl == 4 else [])


def test_recipes_without_a_mask_are_not_checked(world, built):
    """Nothing tells their clouds from the ground."""
    listed = load_or_save(world[1], 2023, built[0].sources, built[0].snapshots).scenes
    recipe = dataclasses.replace(load_recipes()["naive-median"], registration=None)
    usable = scenes.select(listed, recipe)
    checked = composite(usable, grid_of(world[1]), recipe, year=2023, check_values=True).compute()
    plain = composite(usable, grid_of(world[1]), recipe, year=2023).compute()
    np.testing.assert_array_equal(checked.reflectance, plain.reflectance)


def test_details_do_not_change_the_hash_of_a_run(built):
    """Which block finds a fault first depends on threads. An interrupted run resumes anyway."""
    made = built[2]
    of_other_block = [{**row, "detail": "is 1 in 99 %"} for row in made["value_faults"]]
    assert hash_run({**made, "value_faults": of_other_block}) == hash_run(made)
    fewer = made["value_faults"][1:]
    assert hash_run({**made, "value_faults": fewer}) != hash_run(made)


def test_faults_add_up():
    def fault_of(scene, kind, band):
        return values.Fault(scene=scene, band=band, fault=kind, detail="")

    first = [fault_of("b", "strip", "B02")]
    later = [fault_of("b", "strip", "B03"), fault_of("a", "stuck", "B03")]
    merged = values.merge_faults(first, later)
    assert merged == [fault_of("a", "stuck", "B03"), fault_of("b", "strip", "B02")]
    items = [pystac.Item(name, None, None, pd.Timestamp("2023-06-01"), {}) for name in "abc"]
    applied = values.apply_faults(items, merged)
    assert [(item.id, dict(item.properties)) for item in applied] == [
        ("b", {**items[1].properties, values.HAS_STRIP: True}),
        ("c", dict(items[2].properties)),
    ]
    assert values.HAS_STRIP not in items[1].properties


def test_stuck_bands_by_hand():
    rng = np.random.default_rng(1)
    varied = {band: rng.integers(800, 3000, 1000).astype(np.uint16) for band in ("B02", "B03")}
    flat = np.full(1000, 1234, np.uint16)
    half = np.where(np.arange(1000) < 250, 2900, varied["B02"]).astype(np.uint16)
    few = np.where(np.arange(1000) < 150, 2900, varied["B02"]).astype(np.uint16)
    black = np.ones(1000, np.uint16)
    assert values.find_stuck({**varied, "B04": flat}) == {"B04": (1234, 1.0)}
    found = values.find_stuck({**varied, "B04": half})
    assert found["B04"] == (2900, np.mean(half == 2900))
    assert values.find_stuck({**varied, "B04": few}) == {}
    assert values.find_stuck({**varied, "B12": black}) == {"B12": (1, 1.0)}
    water = {band: pixels // 10 for band, pixels in varied.items()}
    assert values.find_stuck({**water, "B12": black}) == {}  # water is black there
    assert values.find_stuck({"B02": flat, "B03": flat, "B04": varied["B02"]}) == {}
    pond = np.where(np.arange(1000) < 400, 1, varied["B02"]).astype(np.uint16)
    assert values.find_stuck({**varied, "B12": pond}) == {}  # bright ground around a black pond
    lake = (110 + rng.poisson(2, 1000)).astype(np.uint16)
    assert np.mean(lake == np.median(lake)) > 0.2
    assert values.find_stuck({**varied, "B12": lake}) == {}  # smooth, but not stuck


def land_of(seed, side=64):
    """Ten bands of one ground, which differ in contrast and polarity: float32 [band, y, x]."""
    rng = np.random.default_rng(seed)
    grounds = np.stack([draw_fractal(rng, (side, side), 20) for _ in range(3)])
    mix = rng.normal(0, 300, (10, 3))
    noise = rng.normal(0, 20, (10, side, side))
    return (np.einsum("bg,gyx->byx", mix, grounds) + noise + 4000).astype(np.float32)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("down", "right"), [(0, 1), (-1, 0), (1, 1)])
def test_a_displacement_is_measured(seed, down, right):
    stack = land_of(seed)
    clear = np.ones(stack.shape[1:], bool)
    moves, explained, gain = values.measure_displacements(stack, clear)
    assert np.abs(moves).max() < 0.2
    assert gain.max() < 1.5
    stack[seed] = np.roll(stack[seed], (down, right), (0, 1))
    moves, explained, gain = values.measure_displacements(stack, clear)
    assert gain.argmax() == seed
    assert gain[seed] > 2
    assert explained[seed] > 0.8
    np.testing.assert_allclose(moves[seed], (right, down), atol=0.2)


def test_pixels_under_cloud_are_not_compared():
    """Half of the pixels say something else: only if they count do the bands disagree."""
    stack = land_of(7)
    clear = np.ones(stack.shape[1:], bool)
    clear[:, 32:] = False
    moved = stack.copy()
    moved[4, :, 34:] = np.roll(stack[4], 1, axis=0)[:, 34:]
    whole = values.measure_displacements(stack, clear)
    for expected, got in zip(whole, values.measure_displacements(moved, clear), strict=True):
        np.testing.assert_array_equal(expected, got)
    assert values.measure_displacements(stack, clear & (np.arange(64) < 10)) is None


def judge(stack):
    """Judge the bands [scene, band, y, x] of scenes, each of its own day."""
    items = [
        pystac.Item(str(n), None, None, pd.Timestamp("2023-06-01"), {}) for n in range(len(stack))
    ]
    shape = len(stack), *stack.shape[2:]
    owner = np.arange(len(stack), dtype=np.int8)[:, None, None].repeat(shape[1], 1)
    samples = values.Samples(
        items, range(len(stack)), owner.repeat(shape[2], 2), np.ones(shape, bool)
    )
    for scene, bands in enumerate(stack):
        for name, pixels in zip(BANDS, bands, strict=False):
            samples.add(scene, name, (0, 0), pixels.astype(np.uint16), 20)
    return [(fault.scene, fault.fault, fault.band) for fault in samples.find_faults()]


def test_a_fault_that_most_scenes_share_is_the_grounds():
    stack = np.stack([land_of(1) + 50 * scene for scene in range(4)])
    green, infrared = BANDS.index("B03"), BANDS.index("B08")
    stack[:, infrared] = np.maximum(stack[:, infrared], stack[:, green] + 1)
    assert judge(stack) == []
    two = stack.copy()
    two[:2, 3] = 4321
    assert judge(two) == [("0", "stuck", BANDS[3]), ("1", "stuck", BANDS[3])]
    two[2, 3] = 4321
    assert judge(two) == []
    assert judge(two[:2]) == [("0", "stuck", BANDS[3]), ("1", "stuck", BANDS[3])]


def test_waves_are_no_displaced_band():
    """Bands see waves one after the other. Water is brighter in green than in infrared."""
    ground = land_of(3)
    green, infrared = BANDS.index("B03"), BANDS.index("B08")
    ground[infrared] = ground[green] + 50
    ground[5] = np.roll(ground[5], 1, axis=1)
    assert judge(ground[None]) == [("0", "displaced", BANDS[5])]
    ground[infrared] -= 100
    assert judge(ground[None]) == []


@pytest.mark.parametrize("seed", range(5))
def test_clouds_are_no_displaced_band(seed):
    """Clouds move between bands, so each band has a place of its own."""
    places = np.random.default_rng(seed).uniform(-1, 1, (6, 2))
    clouds = land_of(seed)[:6]
    for band, place in enumerate(places):
        clouds[band] = ndimage.shift(clouds[band], place, order=1, mode="nearest")
    _, _, gain = values.measure_displacements(clouds, np.ones(clouds.shape[1:], bool))
    assert gain.max() > 2  # as of a displaced band
    assert judge(clouds[None]) == []


@pytest.mark.parametrize("size_m", [10, 20])
@pytest.mark.parametrize("split", [1, 23, 47, 63])
def test_bands_may_come_in_parts(split, size_m):
    """A band in two strips of rows gives the same fault as a whole one."""
    stack = land_of(2).astype(np.uint16)
    stack[3] = np.roll(stack[3], 1, axis=1)
    low = stack.copy()
    low[6, :, :3] //= 3
    scale = 20 // size_m
    covered = np.full((1, 64, 70), -1, np.int8)
    covered[0, :, 3:67] = 0
    found = []
    for cuts in ([0, 64], [0, split, 64]):
        scene = pystac.Item("scene", None, None, pd.Timestamp("2023-06-01"), {})
        samples = values.Samples([scene], [0], covered, covered == 0)
        for band, pixels in enumerate(low):
            fine = pixels.repeat(scale, axis=0).repeat(scale, axis=1)
            for start, stop in itertools.pairwise(cuts):
                part = fine[start * scale : stop * scale]
                samples.add(0, str(band), (start, 3), part, size_m)
        found.append(samples.find_faults())
    assert found[0] == found[1]
    assert {(fault.fault, fault.band) for fault in found[0]} == {
        ("displaced", "3"),
        ("strip", "6"),
    }


def test_the_error_of_a_worker_arrives_whole():
    fault = values.Fault(scene="scene", band="B04", fault="stuck", detail="is 1")
    error = pickle.loads(pickle.dumps(values.UntrustedValuesError([fault])))
    assert error.faults == (fault,)
    assert str(error) == "scene: B04 is 1"


def test_audit_counts_them(world, tmp_path):
    """Of the scenes with a fault, those whose pixels show it; no count without a fault."""
    given = (
        *("audit", "--sites", world[0] / "sites.geojson", "--catalog", world[0] / "archive"),
        *("--years", "2023", "--source", "sim-cdse"),
    )
    run_here(*given, "--out", tmp_path / "plain")
    out, _ = run_here(*given, "--out", tmp_path / "audit", "--pixels")
    assert "scenes with faults in their pixels" in out
    plain = pd.read_csv(tmp_path / "plain" / "audit.csv")
    (row,) = pd.read_csv(tmp_path / "audit" / "audit.csv").to_dict("records")
    assert set(row) - set(plain.columns) == set(pixel_audit.COLUMNS)
    truth = [fault for fault, _ in truth_of(world).values()]
    assert row["checked"] <= row["scenes"]
    assert 0 < row["wrapped"] <= truth.count("wrapped")
    assert 0 < row["stuck"] <= truth.count("constant") + truth.count("saturated")
    assert 0 < row["strip"] <= truth.count("strip")
    assert 0 < row["displaced"] <= truth.count("displaced")
    assert (row["offset"], row["moved"]) == (0, 0)


def test_audit_needs_the_bands_of_the_recipe(world, tmp_path):
    sources = yaml.safe_load((world[0] / "archive" / "sources.yaml").read_text())
    del sources["sim-cdse"]["assets"]["B05"]
    sources["sim-cdse"]["href"] = str(world[0] / "archive" / "cdse.parquet")
    (tmp_path / "sources.yaml").write_text(yaml.safe_dump(sources))
    given = (
        *("audit", "--sites", world[0] / "sites.geojson", "--catalog", tmp_path),
        *("--years", "2023", "--source", "sim-cdse", "--out", tmp_path / "audit"),
    )
    run_here(*given)
    _, err = run_here(*given, "--pixels", ok=2)
    assert "--pixels: source 'sim-cdse' has no B05" in err
