"""Scenes + grid + recipe -> one cloud-free year, lazily.

One Dask task makes one block of one site-year, the block a Zarr shard: it reads SCL with a margin, masks, reads the bands
of the dates at their own resolution, and reduces. The margin is as wide as any neighbourhood the mask looks at, so a
pixel's value does not depend on how the site is cut into blocks.

An observation is an overpass: overlapping tiles, granules of a split datatake and tiles of the neighbouring zone are
mosaicked first, scenes of the grid's own zone before warped ones, so that it counts once.

    needs.py     what a block needs: scenes, margins, memory        plan.py          the same, as a bill
    block.py     a block from its scenes, in the order of work      bands.py         its bands, read ahead
    daymasks.py  which scene each day's pixel comes from, what it is (masks.py has the kernels)
    registration.py  scenes that lie beside the others
    reducers.py, ranks.py  many observations -> one, in numpy       torch_reducers.py  the same on a GPU
    opinion.py   a network that looks at clouds
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import dask
import dask.array as da
import numpy as np
import odc.geo.xr
import pystac
import xarray as xr
from odc.geo.geobox import GeoBox

from minecube.catalog import SCL, Recipe
from minecube.composite.block import Tools, composite_block
from minecube.composite.needs import in_mosaic_order, size_of
from minecube.errors import ReadError
from minecube.grid import blocks
from minecube.reader import Ledger

__all__ = ["Tools", "composite", "composite_block"]


def composite(
    scenes: Sequence[pystac.Item],
    grid: GeoBox,
    recipe: Recipe,
    ledger: Ledger | None = None,
    *,
    year: int | None = None,
    tools: Tools | None = None,
) -> xr.Dataset:
    """One year of one site, lazy: nothing is read until it is computed or written.

    Args:
        scenes: normalised scenes (`scenes.select`), in any order and any UTM zone: of one year, and of its neighbours where the
            recipe falls back on them.
        grid: the site's grid.
        recipe: bands, mask, reducer and block size.
        ledger: counts the reads, where they are made in this process, and says whether one may be lost.
        year: which year, where the scenes are of several.
        tools: other reducers than numpy's, and the second mask that a recipe asks for.

    Returns:
        reflectance uint16 [band, y, x], x 10000, 0 = no observation, valid >= 1; halves are rounded to even.
        clear_count uint16 [y, x]: overpasses clear and seen in every band, that the pixel is made of.
        quality uint8 [y, x]: index into `catalog.QUALITY`.
        Of reducer geomedian, emad, smad and bcmad float32 [y, x], NaN = none; of those that take one date, day_of_year
        uint16 [y, x], 0 = none. Dask chunks are blocks of `recipe.block_px`, all bands in one.

    Raises:
        ReadError: no scenes, one without a band of the recipe, several years and none named, or no second mask although the
            recipe asks for it; when computed, a pixel that cannot be read.
    """
    tools = tools or Tools()
    year = _checked(scenes, recipe, year, tools)
    shared = dask.delayed(in_mosaic_order(scenes, grid), pure=False, traverse=False)
    task = dask.delayed(composite_block, pure=False, traverse=False)
    layers = {"reflectance": np.dtype("uint16")} | {name: np.dtype(layer.dtype) for name, layer in recipe.layers.items()}
    rows: dict[str, list[list[da.Array]]] = {name: [] for name in layers}
    for _, row in itertools.groupby(blocks(grid, recipe.block_px), key=lambda block: block[0].start):
        boxes = [grid[block] for block in row]
        made = [task(shared, box, recipe, year, tools, ledger) for box in boxes]
        for name, dtype in layers.items():
            lead = (len(recipe.bands),) if name == "reflectance" else ()
            parts = zip(made, boxes, strict=True)
            rows[name].append([da.from_delayed(m[name], (*lead, *box.shape), dtype=dtype) for m, box in parts])
    variables = {
        name: (("band", "y", "x") if name == "reflectance" else ("y", "x"), da.block(parts)) for name, parts in rows.items()
    }
    return xr.Dataset(variables, coords={"band": list(recipe.bands), **odc.geo.xr.xr_coords(grid)})


def _checked(scenes: Sequence[pystac.Item], recipe: Recipe, year: int | None, tools: Tools) -> int:
    """The year; raises ReadError as `composite` says."""
    if not scenes:
        raise ReadError("no scenes to composite; expected at least one")
    for scene in scenes:
        sizes = {a.extra_fields["gsd"] for a in scene.assets.values()}
        if not sizes <= {10, 20}:
            raise ReadError(
                f"scene {scene.id}: says its pixels are of {sorted(sizes)} m; a band of 10 or 20 m is needed for each"
            )
        missing = [b for b in (*recipe.bands, SCL) if b not in scene.assets]
        if missing:
            raise ReadError(f"scene {scene.id}: has no {', '.join(missing)}, which recipe {recipe.id!r} needs")
    finest = min(size_of(b, scenes) for b in recipe.bands)
    if recipe.haze and any(size_of(b, scenes) != finest for b in ("B02", "B04")):
        raise ReadError(f"recipe {recipe.id!r} tests for haze, which needs B02 and B04 at the finest resolution of its bands")
    if bool(recipe.second_opinion) != bool(tools.opinion):
        asked, given = ("asks for", "none is given") if recipe.second_opinion else ("asks for no", "one is given")
        raise ReadError(f"recipe {recipe.id!r} {asked} second opinion on clouds, and {given}: tools=Tools(opinion=...)")
    years = sorted({s.datetime.year for s in scenes if s.datetime})
    if year is None and len(years) > 1:
        raise ReadError(f"the scenes are of {years[0]}..{years[-1]}, of which a composite is of one year; say which: year=...")
    return years[0] if year is None else year
