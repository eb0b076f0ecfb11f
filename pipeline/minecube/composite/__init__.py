"""Composite scenes of one site into one cloud-free year, lazily.

One Dask task makes one block of one site-year. A block is a Zarr shard. The task reads SCL with a
margin and masks clouds. Then it reads the bands of the dates at their own resolution and reduces
them. The margin covers every neighbourhood used by the mask. So a pixel's value does not depend on
the cut into blocks.

An observation is an overpass and counts once. Its overlapping tiles, granules of a split datatake
and tiles of the neighbouring zone are mosaicked first. Scenes of the grid's own zone come before
warped ones.

    plan.py             estimate of reads, time and cost
    registration.py     scenes displaced from the others
    values.py           scenes with values that cannot be trusted
    task.py             what a block is made from
    needs.py            scenes, margins and memory of a block
    block.py            a block from its scenes, in order of work
    daymasks.py         source scene and kind of each day's pixels
    masks.py            the kernels of the masks
    bands.py            the bands of a block, read ahead
    reducers.py         many observations -> one, in numpy
    ranks.py            medians and quartiles by rank
    torch_reducers.py   the geomedian on a GPU
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

from minecube.catalog import REDUCERS, SCL, Recipe
from minecube.composite.block import BLOCK_BYTES, composite_block
from minecube.composite.needs import pixel_size_of, sort_in_mosaic_order
from minecube.composite.reducers import geomedian as numpy_geomedian
from minecube.composite.task import GeomedianFunction
from minecube.errors import ReadError
from minecube.grid import iterate_blocks
from minecube.reader import Ledger

__all__ = ["BLOCK_BYTES", "GeomedianFunction", "composite", "composite_block"]


def composite(
    scenes: Sequence[pystac.Item],
    grid: GeoBox,
    recipe: Recipe,
    ledger: Ledger | None = None,
    *,
    year: int | None = None,
    geomedian: GeomedianFunction = numpy_geomedian,
    block_bytes: int = BLOCK_BYTES,
    check_values: bool = False,
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
        geomedian: The geomedian for recipes that use it, by default numpy's.
        block_bytes: Memory limit of a block. A block above it is made in parts. Few pixels of
            scenes of another UTM zone then differ by 1.
        check_values: Whether to check the values of each scene (`values`).

    Returns:
        `reflectance` uint16 [band, y, x], x 10000, 0 = no observation, valid >= 1. Halves are
        rounded to even.
        `clear_count` uint16 [y, x]: Number of clear overpasses in the pixel, all seen in every
        band.
        `quality` uint8 [y, x]: Index into `catalog.QUALITY`.
        Reducer geomedian adds emad, smad and bcmad, float32 [y, x], NaN = none.
        Reducer best-pixel adds day_of_year, uint16 [y, x], 0 = none.
        Dask chunks are blocks of `recipe.block_px` and contain all bands.

    Raises:
        ReadError: There are no scenes, a scene lacks a band of the recipe, or several years come
            without `year`. The recipe has a reducer or a second cloud mask that has been removed.
            Band pixels are neither 10 nor 20 m, or too coarse for the haze test. When computed: A
            pixel cannot be read.
        UntrustedValuesError: When computed, with `check_values`: A scene has faults in its values.
    """
    _check_scenes(scenes, recipe)
    _check_recipe(recipe)
    year = year or _find_year(scenes)
    shared_scenes = dask.delayed(sort_in_mosaic_order(scenes, grid), pure=False, traverse=False)
    task = dask.delayed(composite_block, pure=False, traverse=False)
    dtypes = {"reflectance": np.dtype("uint16")}
    dtypes |= {name: np.dtype(layer.dtype) for name, layer in recipe.layers.items()}
    rows: dict[str, list[list[da.Array]]] = {name: [] for name in dtypes}
    row_of_blocks = itertools.groupby(
        iterate_blocks(grid, recipe.block_px), key=lambda block: block[0].start
    )
    for _, row in row_of_blocks:
        boxes = [grid[block] for block in row]
        composites = [
            task(shared_scenes, box, recipe, year, geomedian, ledger, block_bytes, check_values)
            for box in boxes
        ]
        for name, dtype in dtypes.items():
            lead = (len(recipe.bands),) if name == "reflectance" else ()
            rows[name].append(
                [
                    da.from_delayed(layers[name], (*lead, *box.shape), dtype=dtype)
                    for layers, box in zip(composites, boxes, strict=True)
                ]
            )
    variables: dict[str, tuple[tuple[str, ...], da.Array]] = {}
    for name, parts in rows.items():
        dims = ("band", "y", "x") if name == "reflectance" else ("y", "x")
        variables[name] = (dims, da.block(parts))
    return xr.Dataset(variables, coords={"band": list(recipe.bands), **odc.geo.xr.xr_coords(grid)})


def _check_scenes(scenes: Sequence[pystac.Item], recipe: Recipe) -> None:
    """Check the scenes' bands; raise ReadError as `composite` does."""
    if not scenes:
        raise ReadError("no scenes to composite; expected at least one")
    for scene in scenes:
        sizes = {asset.extra_fields["gsd"] for asset in scene.assets.values()}
        if not sizes <= {10, 20}:
            raise ReadError(
                f"scene {scene.id}: says its pixels are of {sorted(sizes)} m; "
                "a band of 10 or 20 m is needed for each"
            )
        missing = [band for band in (*recipe.bands, SCL) if band not in scene.assets]
        if missing:
            raise ReadError(
                f"scene {scene.id}: has no {', '.join(missing)}, which recipe {recipe.id!r} needs"
            )
    if recipe.haze:
        finest = min(pixel_size_of(band, scenes) for band in recipe.bands)
        if any(pixel_size_of(band, scenes) != finest for band in ("B02", "B04")):
            raise ReadError(
                f"recipe {recipe.id!r} tests for haze, "
                "which needs B02 and B04 at the finest resolution of its bands"
            )


def _check_recipe(recipe: Recipe) -> None:
    """Raise ReadError for a recipe of an earlier version that needs removed code."""
    if recipe.reducer not in REDUCERS:
        raise ReadError(
            f"recipe {recipe.id!r}: reducer {recipe.reducer!r} has been removed; "
            f"expected one of {', '.join(REDUCERS)}"
        )
    if recipe.second_opinion is not None:
        raise ReadError(
            f"recipe {recipe.id!r}: second cloud masks have been removed; "
            "expected second_opinion to be None"
        )


def _find_year(scenes: Sequence[pystac.Item]) -> int:
    """Return the year of the scenes; raise ReadError if they are of several years."""
    years = sorted({scene.datetime.year for scene in scenes if scene.datetime})
    if len(years) > 1:
        raise ReadError(
            f"the scenes are of {years[0]}..{years[-1]}, of which a composite is of one year; "
            "say which: year=..."
        )
    return years[0]
