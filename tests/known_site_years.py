"""Composites of a small recipe, stores for them, and composites that fail or are counted."""

from __future__ import annotations

import io

import dask.array as da
import numpy as np
import pandas as pd
import xarray as xr

from minecube import cube
from minecube.catalog import Recipe

RECIPE = Recipe(id="small", title="t", bands=("B04", "B11"), block_px=64, chunk_px=32)
YEARS = (2019, 2020, 2021)
PROVENANCE = {
    "site": "mine",
    "year": 2020,
    "grid": {},
    "recipe": {},
    "scenes": [{"id": "a"}],
    "version": "1",
}


def year_of(grid, recipe=RECIPE, seed=0):
    """A composite whose pixels are known, in the recipe's blocks."""
    rng = np.random.default_rng(seed)
    shape, block = grid.shape, recipe.block_px
    return xr.Dataset(
        {
            "reflectance": (
                ("band", "y", "x"),
                da.from_array(
                    rng.integers(0, 9000, (2, *shape)).astype(np.uint16), chunks=(2, block, block)
                ),
            ),
            "clear_count": (
                ("y", "x"),
                da.from_array(rng.integers(0, 30, shape).astype(np.uint16), chunks=block),
            ),
            "quality": (
                ("y", "x"),
                da.from_array(rng.integers(0, 5, shape).astype(np.uint8), chunks=block),
            ),
        }
    )


class StoppedError(Exception):
    pass


def failing_after(made, blocks):
    """The same composite, of which one block fails once `blocks` of them have been computed."""
    count = iter(range(10_000))
    seen = []

    def block(pixels):
        if next(count) >= blocks:
            raise StoppedError
        seen.append(1)
        return pixels

    counted = made.reflectance.copy(
        data=made.reflectance.data.map_blocks(block, dtype=np.uint16, meta=np.array((), np.uint16))
    )
    return made.assign(reflectance=counted), seen


class Counted:
    """Counts of reads as a ledger has them: so many planned a block, of which the first are lost."""

    def __init__(self, lost=0):
        self.blocks, self.lost_reads = 0, lost

    def totals(self):
        planned = 10 * self.blocks
        return {
            "planned": planned,
            "lost": self.lost_reads,
            "completeness": 1 - self.lost_reads / planned if planned else 1.0,
        }

    def lost(self):
        return ["some_scene B04: HTTP 404"] if self.lost_reads else []

    def to_parquet(self):
        out = io.BytesIO()
        pd.DataFrame({"planned": [10 * self.blocks]}).to_parquet(out)
        return out.getvalue()

    def over(self, made):
        """The composite, each block of which is counted once."""

        def count(block):
            self.blocks += 1
            return block

        return made.assign(
            quality=made.quality.copy(
                data=made.quality.data.map_blocks(count, dtype=np.uint8, meta=np.ndarray(()))
            )
        )


def create_store(path, site, grid):
    """A store with the site's template, nothing built."""
    where = cube.Store(path)
    cube.create_site(where, site, grid, YEARS, RECIPE)
    return where


def staged(store):
    """The group of the year that is being built."""
    (path,) = store.path.glob("mine/builds/2020.*.new")
    return path
