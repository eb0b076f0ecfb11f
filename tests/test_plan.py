"""A plan says beforehand what a build reads at most: counted by hand, by loops over tiles, and against what was read."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pystac
import pytest
import rasterio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from known_scenes import grid_at, serve, write_tif
from minecube.catalog import Recipe, Registration
from minecube.composite import bands, composite, plan
from minecube.composite import registration as registering
from minecube.errors import CatalogError
from minecube.grid import grid_of
from minecube.reader import HEAD_BYTES, Ledger
from minecube.scenes import offsets
from minecube.scenes.looks import read_look

LEFT, TOP = 360000, 5600040
RECIPE = Recipe(id="r", title="t", bands=("B04", "B11"), block_px=120, chunk_px=60)


@pytest.fixture
def listed(archive):
    grid, rng = grid_at(LEFT, TOP, 240, 180), np.random.default_rng(0)
    return [
        archive.scene(
            f"2020-07-{day:02d}T10:00:00",
            grid,
            {"B04": rng.integers(1, 9000, (180, 240)), "B11": rng.integers(1, 9000, (90, 120))},
        )
        for day in (1, 6, 11)
    ]


def test_reads_are_those_that_are_made(listed, site):
    """Every scene is needed here, so the most is also what happens: 4 blocks x 3 scenes x (2 bands and SCL)."""
    ledger = Ledger()
    composite(listed, grid_of(site), RECIPE, ledger).compute()
    planned = plan.estimate(listed, grid_of(site), RECIPE)
    assert planned.reads == ledger.totals()["planned"] == 4 * 3 * 3
    assert planned.scenes == 3


def test_scenes_elsewhere_are_not_planned(listed, site, archive):
    far = archive.scene(
        "2020-07-21T10:00:00", grid_at(LEFT + 50000, TOP, 240, 180), {"B04": 1, "B11": 1}
    )
    assert (
        plan.estimate([*listed, far], grid_of(site), RECIPE).reads
        == plan.estimate(listed, grid_of(site), RECIPE).reads
    )


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(tile=st.sampled_from([64, 128, 512]), window=st.integers(1, 900))
def test_tiles_touched_by_brute_force(listed, tile, window):
    """The mean over every place a window can begin at, by counting tiles; in a file that is large, and known to be of 1 GB."""
    scene = listed[0].clone()
    scene.properties["minecube:tile_px"] = tile
    scene.assets["B04"] = pystac.Asset(
        "https://x/B04.tif", extra_fields={"file:size": 10**9, "proj:shape": [10980, 10980]}
    )
    counted = np.mean([len({(start + k) // tile for k in range(window)}) for start in range(tile)])
    _, requests, read_bytes, pixels = plan._count_window(scene, "B04", 10, (window, window))
    assert read_bytes == pytest.approx(counted**2 * tile**2 * 0.75 * 10**9 / 10980**2, rel=1e-3)
    assert requests == np.ceil(counted)
    assert pixels == window**2
    assert plan._count_header("https://x/B04.tif").tolist() == [0, 1, HEAD_BYTES, 0]


def test_no_more_is_planned_than_a_file_has(listed):
    """240 x 180 pixels of 1.5 bytes, on a disk: no requests."""
    _, requests, read_bytes, _ = plan._count_window(listed[0], "B04", 10, (5000, 5000))
    assert (read_bytes, requests) == (240 * 180 * 1.5, 0)
    assert not plan._count_header(listed[0].assets["B04"].href).any()


def test_time_is_what_takes_longest_and_cost_is_counted():
    """By hand: 6400 requests at 50 ms over 64 connections 5 s; 1000 MB at 50 MB/s 20 s; cores (9 + 1) / 2 s."""
    asked = plan.Estimate(requests=6400, bytes=1_000_000_000, pixels=100_000_000)
    terms = plan.Terms(per_1000_requests=0.5, per_gb=0.1, per_core_hour=0.36)
    assert asked.seconds(terms) == pytest.approx(20)
    assert asked.seconds(dataclasses.replace(terms, latency_s=1.0)) == pytest.approx(100)
    assert asked.seconds(dataclasses.replace(terms, mb_per_s=1e6, cores=1)) == pytest.approx(10)
    assert asked.cost(terms) == pytest.approx(6.4 * 0.5 + 1 * 0.1 + 20 * 2 / 3600 * 0.36)
    assert asked.cost(terms, pace=2.0) == pytest.approx(
        6.4 * 0.5 + 1 * 0.1 + 2 * 20 * 2 / 3600 * 0.36
    )
    assert asked.cost(plan.Terms()) is None
    # 1000 reads and 400 checks of 5 ms, and 10 site-years of half a second: 12 core-seconds.
    assert plan.Estimate(site_years=10, reads=1000, checks=400).seconds(terms) == pytest.approx(
        12 / 2
    )


def test_plans_add_up():
    one = plan.Estimate(
        scenes=1, reads=2, requests=3, bytes=4, pixels=5, block_bytes=6, connections=4
    )
    other = plan.Estimate(scenes=10, reads=20, requests=30, bytes=40, pixels=50, block_bytes=60)
    both = plan.Estimate(
        scenes=11, reads=22, requests=33, bytes=44, pixels=55, block_bytes=60, connections=4
    )
    assert one + other == other + one == both


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("per_gb: free", "field 'per_gb': expected a number"),
        ("cores: 0", "field 'cores': expected a number above 0"),
        ("per_gb: true", "found True"),
        ("- 1", "expected names and values"),
        ("a: [", "cannot be read as prices"),
        ("colour: 1", "field 'colour': expected one of latency_s"),
    ],
)
def test_bad_prices(tmp_path, text, said):
    (tmp_path / "prices.yaml").write_text(text)
    with pytest.raises(CatalogError, match=rf"prices\.yaml: {said}|{said}"):
        plan.Terms.load(tmp_path / "prices.yaml")


def test_a_plan_is_as_slow_as_the_builds_before_it():
    """By hand: builds guessed at 6 and 3 s took 20 and 16 s, so the next takes four times its guess; no build, no pace."""
    terms = plan.Terms()
    asked = [plan.Estimate(site_years=n, reads=100 * n, checks=40 * n) for n in (10, 5)]
    assert [estimate.seconds(terms) for estimate in asked] == pytest.approx([6, 3])
    notes = [
        plan.describe_duration(estimate, seconds)
        for estimate, seconds in zip(asked, (20.0, 16.0), strict=True)
    ]
    assert plan.measure_pace(notes, terms) == pytest.approx(4)
    assert plan.measure_pace(
        [{**note, "of a later version": 1} for note in notes], terms
    ) == pytest.approx(4)
    assert plan.measure_pace([], terms) is None


def test_checks_are_planned(listed, site):
    """Three bands and SCL where there are three bands; here there are two: counted where they are made."""
    grid = grid_of(site)
    for registration in (None, Registration(most_px=0.5, beyond="drop")):
        recipe = dataclasses.replace(RECIPE, registration=registration)
        planned = plan.estimate(listed, grid, recipe)
        assert planned.checks == 3 * 4  # registration uses the pixels of the look
        looks = Ledger()
        look = read_look(listed, grid, looks)
        offsets.check_offsets(listed, look)
        if registration:
            registering.measure_shifts(listed, grid, looks, look.middle)
        made = looks.totals()["planned"]
        assert planned.checks * 3 / 4 <= made <= planned.checks


def test_registration_reads_for_itself_where_it_needs_other_pixels(archive):
    """Bands of 20 m, and a site of several windows."""
    recipe = dataclasses.replace(RECIPE, registration=Registration(most_px=0.5, beyond="drop"))
    large = grid_at(LEFT, TOP, 3000, 600)
    scene = archive.scene(
        "2020-07-01T10:00:00", grid_at(LEFT, TOP, 3000, 600), {"B04": 7, "B11": 7}
    )
    assert plan.estimate([scene], large, recipe).checks == 2 * 4 + 2
    assert plan.estimate([scene], large[:, :600], recipe).checks == 4
    scene.assets["B04"].extra_fields["gsd"] = 20
    assert plan.estimate([scene], large[:, :600], recipe).checks == 4 + 2


@pytest.mark.parametrize("side", [360, 1032])
@pytest.mark.parametrize("corner", [0, 60, 240, 300])
def test_checks_take_at_most_what_is_planned(archive, tmp_path, side, corner):
    """Files of random pixels, uncompressed, on a server: two bytes per pixel and nothing to spare."""
    rng = np.random.default_rng(0)
    archive.bands = ("B02", "B04", "B12")
    where = grid_at(LEFT, TOP, 1536, 1536)
    pixels = {b: rng.integers(1, 9000, (1536, 1536)) for b in ("B02", "B04")}
    scene = archive.scene(
        "2020-07-01T10:00:00", where, {**pixels, "B12": rng.integers(1, 9000, (768, 768))}
    )
    scene.properties["minecube:tile_px"] = 512
    for band, asset in scene.assets.items():
        path = Path(asset.href)
        with rasterio.open(path) as image:
            stored = image.read(1)
        size = archive.resolution[band]
        write_tif(
            path, stored, where.zoom_out(size / 10), blockxsize=512, blockysize=512, compress=None
        )
        # The plan takes three quarters of the file, since others have overviews.
        asset.extra_fields["file:size"] = path.stat().st_size / 0.75
    recipe = dataclasses.replace(RECIPE, bands=("B02", "B04", "B12"), registration=Registration())
    grid = where[corner:, corner:][:side, :side]
    with serve(archive.root) as url:
        for asset in scene.assets.values():
            asset.href = asset.href.replace(str(archive.root), url)
        checks = plan._count_checks([scene], grid, recipe)
        looks = Ledger()
        look = read_look([scene], grid, looks)
        registering.measure_shifts([scene], grid, looks, look.middle)
    made = looks.totals()
    headers = 4
    assert made["planned"] == checks[0] == 4
    assert made["requests"] - headers <= checks[1]
    assert made["bytes"] - headers * HEAD_BYTES <= checks[2]
    if side > 1024:  # one tile per file
        assert made["requests"] == headers + 4
        assert made["bytes"] == headers * HEAD_BYTES + 512**2 * (3 * 2 + 1)


def test_strips_are_planned(archive, site, monkeypatch):
    """One block of 240 x 180, cut where tiles of 64 px begin: B04 in 3 parts, B11 in 2, SCL whole."""
    for module in (plan, bands):
        monkeypatch.setattr(module, "LEAST_CUT_PX", 0)
    monkeypatch.setattr(bands, "_LEAST_ROWS", 2)
    scene = archive.scene("2020-07-01T10:00:00", grid_at(LEFT, TOP, 240, 180), {"B04": 1, "B11": 1})
    scene.properties["minecube:tile_px"] = 64
    recipe = dataclasses.replace(RECIPE, block_px=240)
    ledger = Ledger()
    composite([scene], grid_of(site), recipe, ledger).compute()
    assert ledger.totals()["planned"] == 3 + 2 + 1
    # A window that begins anywhere may touch one more row of tiles.
    assert plan.estimate([scene], grid_of(site), recipe).reads == 4 + 3 + 1
