"""Counts of reads are committed with a site-year, and decide whether it is complete."""

from __future__ import annotations

import io
import json

import dask.array as da
import pandas as pd
import pytest
import xarray as xr

from known_site_years import (
    PROVENANCE,
    Counted,
    create_store,
    year_of,
)
from minecube import cube
from minecube.errors import CubeError, ReadError
from minecube.grid import grid_of


@pytest.fixture
def grid(site):
    return grid_of(site)


@pytest.fixture
def store(tmp_path, site, grid):
    """A store with the site's template, nothing built."""
    return create_store(tmp_path / "cubes.zarr", site, grid)


def test_lost_reads_keep_a_year_out_unless_allowed(store, grid):
    """12 blocks of 10 reads, 3 of them lost: 97.5 %."""
    reads, made = Counted(lost=3), year_of(grid)
    with pytest.raises(
        ReadError,
        match=r"mine 2020: 3 of 120 reads were lost, which leaves 97.50% .* asks for 100.00%.*404",
    ):
        cube.write_year(store, reads.over(made), PROVENANCE, b"", cube.BuildOptions(reads=reads))
    assert cube.read_markers(store, "mine") == {}
    assert "incomplete_reads" not in cube.open_cube(store, "mine").attrs
    # All is read again: what was lost must not pass for done.
    reads = Counted(lost=3)
    assert cube.write_year(
        store, reads.over(made), PROVENANCE, b"", cube.BuildOptions(reads=reads, completeness=0.97)
    )
    assert reads.blocks == 12
    assert cube.read_markers(store, "mine")[2020]["reads"] == {
        "planned": 120,
        "lost": 3,
        "completeness": 0.975,
    }
    assert xr.open_zarr(str(store), group="mine", consolidated=False).attrs["incomplete_reads"] == {
        "2020": 0.975
    }
    assert cube.read_counts(store, "mine", 2020).planned.tolist() == [120]
    assert not cube.write_year(store, made, PROVENANCE, b"", cube.BuildOptions(completeness=0.97))
    # What was accepted once stays accepted, until --overwrite asks for more.
    assert not cube.write_year(store, made, PROVENANCE, b"", cube.BuildOptions(completeness=0.99))
    assert not cube.write_year(
        store, made, PROVENANCE, b"", cube.BuildOptions(completeness=0.97, overwrite=True)
    )
    # Built anew with nothing lost, the cube no longer says so.
    whole = Counted()
    assert cube.write_year(
        store,
        whole.over(made),
        PROVENANCE,
        b"",
        cube.BuildOptions(reads=whole, completeness=0.99, overwrite=True),
    )
    assert (
        xr.open_zarr(str(store), group="mine", consolidated=False).attrs["incomplete_reads"] == {}
    )


def test_counts_of_an_interrupted_run_are_kept(store, grid):
    reads, made = Counted(), year_of(grid)
    asked = iter([False, False, True])
    with pytest.raises(CubeError, match="stopped"):
        cube.write_year(
            store,
            reads.over(made),
            PROVENANCE,
            b"",
            cube.BuildOptions(reads=reads, workers=2, stopped=lambda: next(asked)),
        )
    kept = cube.read_initial_counts(store, PROVENANCE)
    assert pd.read_parquet(io.BytesIO(kept)).planned.tolist() == [40]
    assert (
        cube.read_initial_counts(store, {**PROVENANCE, "version": "2"}) is None
    )  # of another build
    with pytest.raises(CubeError, match="no counts of reads for mine 2020"):
        cube.read_counts(store, "mine", 2020)


def test_a_run_killed_before_its_counts_are_kept_does_those_blocks_again(store, grid):
    """A lost read whose count died with the run must not pass for a read."""

    class Dies(Counted):
        def to_parquet(self):
            if self.blocks == 4:
                raise KeyboardInterrupt
            return super().to_parquet()

    made, reads = year_of(grid), Dies()
    with pytest.raises(KeyboardInterrupt):
        cube.write_year(
            store, reads.over(made), PROVENANCE, b"", cube.BuildOptions(reads=reads, workers=2)
        )
    kept = cube.read_initial_counts(store, PROVENANCE)
    assert pd.read_parquet(io.BytesIO(kept)).planned.tolist() == [20]  # of the first batch
    again = Counted()
    assert cube.write_year(
        store,
        again.over(made),
        PROVENANCE,
        b"",
        cube.BuildOptions(reads=again, before=kept, workers=2),
    )
    assert again.blocks == 12 - 2
    assert (
        cube.read_markers(store, "mine")[2020]["reads"]["planned"] == 100
    )  # this fake counts its own blocks only


def test_a_year_of_which_all_was_lost_says_so(store, grid):
    empty, reads = (
        year_of(grid).map(lambda v: v.copy(data=da.zeros_like(v.data))),
        Counted(lost=120),
    )
    with pytest.raises(ReadError, match="120 of 120 reads were lost, which leaves no pixel"):
        cube.write_year(
            store,
            reads.over(empty),
            PROVENANCE,
            b"",
            cube.BuildOptions(reads=reads, completeness=0),
        )
    assert cube.read_initial_counts(store, PROVENANCE) is None


def test_counts_of_another_build_are_not_gone_on_with(store, grid):
    """The second build dies before it has counts of its own: the first one's are no beginning for it."""

    class Dies(Counted):
        def to_parquet(self):
            raise KeyboardInterrupt

    made, asked, other = year_of(grid), iter([False, True]), {**PROVENANCE, "version": "2"}
    first, second = Counted(), Dies()
    with pytest.raises(CubeError, match="stopped"):
        cube.write_year(
            store,
            first.over(made),
            PROVENANCE,
            b"",
            cube.BuildOptions(reads=first, workers=2, stopped=lambda: next(asked)),
        )
    with pytest.raises(KeyboardInterrupt):
        cube.write_year(
            store, second.over(made), other, b"", cube.BuildOptions(reads=second, workers=2)
        )
    assert cube.read_initial_counts(store, other) is None


def test_counts_that_cannot_be_read_start_the_year_afresh(store, grid):
    """They are one object with the blocks they belong to; damaged all the same, no block of theirs counts as done."""
    reads, made = Counted(), year_of(grid)
    asked = iter([False, False, True])
    with pytest.raises(CubeError, match="stopped"):
        cube.write_year(
            store,
            reads.over(made),
            PROVENANCE,
            b"",
            cube.BuildOptions(reads=reads, workers=2, stopped=lambda: next(asked)),
        )
    (path,) = store.path.glob("mine/builds/2020.*.new/zarr.json")
    staged = json.loads(path.read_text())
    assert len(staged["attributes"]["blocks"]) == 4
    staged["attributes"]["reads"] = staged["attributes"]["reads"][:40]
    path.write_text(json.dumps(staged))
    assert cube.read_initial_counts(store, PROVENANCE) is None
    again = Counted()
    assert cube.write_year(store, again.over(made), PROVENANCE, b"", cube.BuildOptions(reads=again))
    assert again.blocks == 12
    assert cube.read_counts(store, "mine", 2020).planned.tolist() == [120]


def test_blocks_of_a_process_whose_counts_are_unknown_are_made_again(store, grid):
    """Another process has done some blocks, and lost reads, since this one looked for counts to go on from."""
    before = cube.read_initial_counts(store, PROVENANCE)
    other, made = Counted(lost=3), year_of(grid)
    asked = iter([False, True])
    with pytest.raises(CubeError, match="stopped"):
        cube.write_year(
            store,
            other.over(made),
            PROVENANCE,
            b"",
            cube.BuildOptions(reads=other, workers=2, stopped=lambda: next(asked)),
        )
    reads = Counted()
    assert cube.write_year(
        store, reads.over(made), PROVENANCE, b"", cube.BuildOptions(reads=reads, before=before)
    )
    assert reads.blocks == 12
