"""Composite scenes of one site into one cloud-free year, lazily.

One Dask task makes one block of one site-year. A block is a Zarr shard. The task reads SCL with a
margin and masks clouds. Then it reads the bands of the dates at their own resolution and reduces
them. The margin covers every neighbourhood used by the mask. So a pixel's value does not depend on
the cut into blocks.

An observation is an overpass and counts once. Its overlapping tiles, granules of a split datatake
and tiles of the neighbouring zone are mosaicked first. Scenes of the grid's own zone come before
warped ones.

    needs.py            scenes, margins and memory of a block
    plan.py             estimate of reads, time and cost
    block.py            a block from its scenes, in order of work
    bands.py            its bands, read ahead
    daymasks.py         source scene and kind of each day's pixels
    masks.py            the kernels of the masks
    registration.py     scenes displaced from the others
    reducers.py         many observations -> one, in numpy
    ranks.py            medians and percentiles by rank
    torch_reducers.py   the reducers on a GPU
    opinion.py          a cloud network as second opinion
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
    """Composite one year of one site, lazily.

    Nothing is read until the result is computed or written.

    Args:
        scenes: Normalised scenes (`scenes.select`) of the year, in any order and any UTM zone.
            Scenes of the neighbouring years as well, if the recipe falls back on them.
        grid: The site's grid.
        recipe: Bands, mask, reducer and block size.
        ledger: Counts the reads made in this process. Its settings allow or forbid lost reads.
        year: Year of the composite. Required if the scenes are of several years.
        tools: Reducers to use instead of numpy's, and the second mask if the recipe asks for one.

    Returns:
        `reflectance` uint16 [band, y, x], x 10000, 0 = no observation, valid >= 1. Halves are
        rounded to even.
        `clear_count` uint16 [y, x]: Number of clear overpasses in the pixel, all seen in every
        band.
        `quality` uint8 [y, x]: Index into `catalog.QUALITY`.
        Reducer geomedian adds emad, smad and bcmad, float32 [y, x], NaN = none.
        Reducers choosing one date add day_of_year, uint16 [y, x], 0 = none.
        Dask chunks are blocks of `recipe.block_px` and contain all bands.

    Raises:
        ReadError: There are no scenes, a scene lacks a band of the recipe, or several years come
            without `year`. The recipe and `tools` disagree about a second mask. Band pixels are
            neither 10 nor 20 m, or too coarse for the haze test. When computed: A pixel cannot be
            read.
    """
    tools = tools or Tools()
    year = _checked(scenes, recipe, year, tools)
    shared = dask.delayed(in_mosaic_order(scenes, grid), pure=False, traverse=False)
    task = dask.delayed(composite_block, pure=False, traverse=False)
    layers = {"reflectance": np.dtype("uint16")} | {
        name: np.dtype(layer.dtype) for name, layer in recipe.layers.items()
    }
    rows: dict[str, list[list[da.Array]]] = {name: [] for name in layers}
    for _, row in itertools.groupby(
        blocks(grid, recipe.block_px), key=lambda block: block[0].start
    ):
        boxes = [grid[block] for block in row]
        made = [task(shared, box, recipe, year, tools, ledger) for box in boxes]
        for name, dtype in layers.items():
            lead = (len(recipe.bands),) if name == "reflectance" else ()
            parts = zip(made, boxes, strict=True)
            rows[name].append(
                [da.from_delayed(m[name], (*lead, *box.shape), dtype=dtype) for m, box in parts]
            )
    variables = {
        name: (("band", "y", "x") if name == "reflectance" else ("y", "x"), da.block(parts))
        for name, parts in rows.items()
    }
    return xr.Dataset(variables, coords={"band": list(recipe.bands), **odc.geo.xr.xr_coords(grid)})


def _checked(scenes: Sequence[pystac.Item], recipe: Recipe, year: int | None, tools: Tools) -> int:
    """Check the arguments of `composite` and return the year; raise ReadError as it does."""
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
            raise ReadError(
                f"scene {scene.id}: has no {', '.join(missing)}, which recipe {recipe.id!r} needs"
            )
    finest = min(size_of(b, scenes) for b in recipe.bands)
    if recipe.haze and any(size_of(b, scenes) != finest for b in ("B02", "B04")):
        raise ReadError(
            f"recipe {recipe.id!r} tests for haze, which needs B02 and B04 at the finest resolution of its bands"
        )
    if bool(recipe.second_opinion) != bool(tools.opinion):
        asked, given = (
            ("asks for", "none is given")
            if recipe.second_opinion
            else ("asks for no", "one is given")
        )
        raise ReadError(
            f"recipe {recipe.id!r} {asked} second opinion on clouds, and {given}: tools=Tools(opinion=...)"
        )
    years = sorted({s.datetime.year for s in scenes if s.datetime})
    if year is None and len(years) > 1:
        raise ReadError(
            f"the scenes are of {years[0]}..{years[-1]}, of which a composite is of one year; say which: year=..."
        )
    return years[0] if year is None else year
