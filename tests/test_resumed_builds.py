"""A build that was stopped goes on from the blocks that it has finished."""

from __future__ import annotations

import numpy as np
import pytest

from known_site_years import (
    PROVENANCE,
    StoppedError,
    create_store,
    failing_after,
    staged,
    year_of,
)
from minecube import cube
from minecube.errors import CubeError
from minecube.grid import grid_of


@pytest.fixture
def grid(site):
    return grid_of(site)


@pytest.fixture
def store(tmp_path, site, grid):
    """A store with the site's template, nothing built."""
    return create_store(tmp_path / "cubes.zarr", site, grid)


def test_a_build_told_to_stop_stops_between_blocks_and_goes_on_later(store, grid):
    asked = iter([False, False, True])
    made = year_of(grid)
    with pytest.raises(CubeError, match="stopped with 8 of 12 blocks to go"):
        cube.write_year(
            store, made, PROVENANCE, b"", cube.BuildOptions(workers=2, stopped=lambda: next(asked))
        )
    again, blocks = failing_after(made, 10_000)
    assert cube.write_year(store, again, PROVENANCE, b"")
    assert len(blocks) == 8
    np.testing.assert_array_equal(
        cube.open_committed(store, "mine").reflectance[0], made.reflectance
    )


def test_a_stopped_run_commits_nothing_and_resumes(store, grid):
    """12 blocks; stopped in the tenth, the second run has to make at most those that were in hand."""
    import dask

    made = year_of(grid)
    with dask.config.set(scheduler="synchronous"):
        broken, first = failing_after(made, 9)
        with pytest.raises(StoppedError):
            cube.write_year(store, broken, PROVENANCE, b"")
        assert cube.read_markers(store, "mine") == {}
        with pytest.raises(CubeError, match="no committed year"):
            cube.open_committed(store, "mine")
        whole, second = failing_after(made, 10_000)
        assert cube.write_year(store, whole, PROVENANCE, b"")
    assert len(first) == 9
    assert len(second) <= 12 - 8
    np.testing.assert_array_equal(
        cube.open_committed(store, "mine").reflectance[0], made.reflectance
    )


@pytest.mark.parametrize(
    "other",
    [
        {"version": "0"},
        {"on_offset_conflict": "fix"},
        {"offset_conflicts": [{"scene": "a"}]},
        {"scl_errors": [{"scene": "a", "scl": "veiled"}]},
        {"shifts": [{"scene": "a", "dx_m": 9.0}]},
    ],
    ids=lambda other: next(iter(other)),
)
def test_leftovers_of_another_build_are_not_resumed(store, grid, other):
    """A killed build's shards are not taken for this one's, nor for one in which scenes were judged otherwise."""
    old, new = year_of(grid, seed=1), year_of(grid, seed=2)
    with pytest.raises(StoppedError):
        cube.write_year(store, failing_after(old, 9)[0], {**PROVENANCE, **other}, b"")
    assert cube.write_year(store, new, PROVENANCE, b"")
    np.testing.assert_array_equal(
        cube.open_cube(store, "mine").reflectance.sel(year=2020), new.reflectance
    )


def test_blocks_of_another_policy_are_not_gone_on_with(store, grid):
    """One scene is in conflict: kept in the first run, left out in the second."""
    kept, dropped = year_of(grid, seed=1), year_of(grid, seed=2)
    torn = {**PROVENANCE, "on_offset_conflict": "warn", "offset_conflicts": [{"scene": "a"}]}
    asked = iter([False, True])
    with pytest.raises(CubeError, match="stopped"):
        cube.write_year(
            store, kept, torn, b"", cube.BuildOptions(workers=2, stopped=lambda: next(asked))
        )
    assert cube.write_year(store, dropped, {**torn, "on_offset_conflict": "drop"}, b"")
    np.testing.assert_array_equal(
        cube.open_cube(store, "mine").reflectance.sel(year=2020), dropped.reflectance
    )


def test_a_noted_block_whose_shard_is_gone_is_made_again(store, grid):
    asked = iter([False, False, True])
    made = year_of(grid)
    with pytest.raises(CubeError, match="stopped"):
        cube.write_year(
            store, made, PROVENANCE, b"", cube.BuildOptions(workers=2, stopped=lambda: next(asked))
        )
    (staged(store) / "reflectance/c/0/0/0/0").unlink()
    assert cube.write_year(store, made, PROVENANCE, b"")
    np.testing.assert_array_equal(
        cube.open_committed(store, "mine").reflectance[0], made.reflectance
    )
