"""The ledger counts every read, and a lost read fails or counts as not observed."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from known_scenes import grid_at
from known_servers import LEFT, TOP
from minecube import scenes
from minecube.catalog import Recipe
from minecube.composite import composite
from minecube.errors import ReadError
from minecube.reader import Ledger, compute_stack


def test_a_lost_read_fails_unless_the_ledger_allows_it(archive, site):
    grid = grid_at(LEFT, TOP, 240, 180)
    scene = archive.scene("2020-07-05T10:00:00", grid, {"B04": 5, "B11": 6})
    Path(scene.assets["B04"].href).unlink()
    strict, lossy = Ledger(), Ledger(lossy=True)
    with pytest.raises(ReadError, match="No such file"):
        compute_stack(scenes.stack([scene], scenes.grid_of(site), ("B04", "B11"), ledger=strict))
    values = compute_stack(
        scenes.stack([scene], scenes.grid_of(site), ("B04", "B11"), ledger=lossy)
    )
    assert not values[0, 0].any()
    assert (values[0, 1] == 6).all()
    totals = lossy.totals()
    assert (totals["planned"], totals["read"], totals["lost"], totals["completeness"]) == (
        2,
        1,
        1,
        0.5,
    )
    assert strict.totals()["lost"] == 1
    (line,) = lossy.lost()
    assert line.startswith(f"{scene.id} B04: ")
    assert "No such file" in line


def test_what_is_lost_counts_as_not_observed(archive, site):
    """A date of which one band is lost is as if it had not been."""
    grid, rng = grid_at(LEFT, TOP, 240, 180), np.random.default_rng(0)
    listed = [
        archive.scene(
            f"2020-07-{day:02d}T10:00:00",
            grid,
            {"B04": rng.integers(1, 9000, (180, 240)), "B11": rng.integers(1, 9000, (90, 120))},
        )
        for day in (1, 6, 11, 16)
    ]
    recipe = Recipe(id="r", title="t", bands=("B04", "B11"), block_px=64, chunk_px=32)
    expected = composite(listed[1:], scenes.grid_of(site), recipe).compute()
    Path(listed[0].assets["B11"].href).write_bytes(b"gone")
    ledger = Ledger(lossy=True)
    got = composite(listed, scenes.grid_of(site), recipe, ledger).compute()
    assert expected.identical(got)
    assert ledger.totals()["lost"] == 12  # blocks


def test_a_ledger_goes_on_where_it_was(tmp_path):
    """Sums of two runs, kept as Parquet between them, by hand."""
    first = Ledger()
    first.add(
        "a",
        "B04",
        planned=2,
        read=1,
        lost=1,
        requests=5,
        retried=1,
        bytes=100,
        struck=3,
        seconds=0.5,
        reason="why",
    )
    second = Ledger(before=first.to_parquet())
    second.add("a", "B04", planned=1, read=1, requests=2, bytes=10, struck=2, seconds=0.25)
    second.add("b", "SCL", planned=1, read=1)
    table = second.table().set_index(["scene", "band"])
    assert table.loc[("a", "B04")].to_dict() == {
        "planned": 3, "read": 2, "lost": 1, "requests": 7, "retried": 1, "bytes": 110, "struck": 5,
        "seconds": 0.75, "reason": "why"
    }  # fmt: skip
    assert second.totals()["completeness"] == 0.75
    assert second.lost() == ["a B04: why"]
    assert Ledger().totals()["completeness"] == 1


def test_a_lost_mask_takes_its_bands_with_it(archive):
    """One date of four: a quarter is gone, though it is one read of ten a block."""
    grid, where = grid_at(LEFT, TOP, 240, 180), grid_at(LEFT - 600, TOP + 600, 360, 300)
    days = (1, 6, 11, 16)
    listed = [
        archive.scene(f"2020-07-{day:02d}T10:00:00", where, {"B04": 5, "B11": 6}) for day in days
    ]
    Path(listed[0].assets["SCL"].href).unlink()
    ledger, recipe = (
        Ledger(lossy=True),
        Recipe(id="r", title="t", bands=("B04", "B11"), block_px=240, chunk_px=120),
    )
    made = composite(listed, grid, recipe, ledger).compute()
    assert (made.clear_count == 3).all()
    totals = ledger.totals()
    assert (totals["planned"], totals["lost"], totals["completeness"]) == (10, 1, 0.75)


def test_a_lost_band_is_read_around_and_counted_once(archive):
    """Its date is left out of all bands, for which the block is made again: what is read again was planned once."""
    grid, where = grid_at(LEFT, TOP, 240, 180), grid_at(LEFT - 600, TOP + 600, 360, 300)
    listed = [
        archive.scene(f"2020-07-{day:02d}T10:00:00", where, {"B04": 100 * day, "B11": 6})
        for day in (1, 6, 11, 16)
    ]
    Path(listed[2].assets["B11"].href).unlink()
    ledger, recipe = (
        Ledger(lossy=True),
        Recipe(id="r", title="t", bands=("B04", "B11"), block_px=240, chunk_px=120),
    )
    made = composite(listed, grid, recipe, ledger).compute()
    assert (made.clear_count == 3).all()
    assert np.unique(made.reflectance.sel(band="B04")) == [600]  # of 100, 600 and 1600
    totals = ledger.totals()
    assert (totals["planned"], totals["read"], totals["lost"], totals["completeness"]) == (
        12,
        11,
        1,
        11 / 12,
    )


def test_a_ledger_in_another_process_allows_no_loss(tmp_path):
    """Nobody would hear of it."""
    copy = pickle.loads(pickle.dumps(Ledger(lossy=True)))
    assert not copy.lossy
    assert copy.totals()["planned"] == 0
