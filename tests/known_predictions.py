"""A store with three built years, and maps whose every pixel is known."""

from __future__ import annotations

import io
import types

import dask.array as da
import numpy as np
import pandas as pd
import xarray as xr

from known_scenes import site_of
from minecube import cube
from minecube.catalog import Recipe
from minecube.cube import Prediction
from minecube.grid import grid_of

RECIPE = Recipe(id="small", title="t", block_px=64, chunk_px=32)
PAIRS = ((2019, 2020), (2019, 2021), (2020, 2021))
NET = {"id": "net", "weights_sha256": "a"}


def build(store, site, year, version="1", overwrite=False, seed=0, **how):
    grid, rng = grid_of(site), np.random.default_rng([year, seed])
    pixels = rng.integers(1, 3000, (10, *grid.shape)).astype(np.uint16)
    layers = {
        "clear_count": np.full(grid.shape, 3, np.uint16),
        "quality": np.ones(grid.shape, np.uint8),
    }
    made = {"reflectance": (("band", "y", "x"), da.from_array(pixels, chunks=(10, 64, 64)))}
    made |= {name: (("y", "x"), da.from_array(layer, chunks=64)) for name, layer in layers.items()}
    told = {
        "minecube:source": "s",
        "s2:processing_baseline": "05.00",
        "minecube:offset": 0,
        "minecube:offset_reason": version,
    }
    scene = types.SimpleNamespace(id=f"a{version}", properties=told)
    listed = io.BytesIO()
    pd.DataFrame({"id": [scene.id]}).to_parquet(listed)
    provenance = cube.describe_build(site, year, grid, RECIPE, [scene])
    cube.write_year(
        store,
        xr.Dataset(made),
        provenance,
        listed.getvalue(),
        cube.BuildOptions(overwrite=overwrite, **how),
    )


def value(view, y, classes=1, times=1):
    """A map's value in row y: each view, year, class and row has its own."""
    base = 7 * sum(view) + 3 * len(view) + y
    return [[(base + 50 * t + 20 * c) % 251 for c in range(classes)] for t in range(times)]


def rows_of(
    todo, heights=(7, 40, 1, 64, 38), width=90, classes=1, series=False, asked=None, dies_after=None
):
    """Rows of all views in uneven blocks; dies after so many, if asked."""
    if asked is not None:
        asked.append(list(todo))
    count = 0
    for view in todo:
        y = 0
        for height in heights:
            if dies_after is not None and count == dies_after:
                raise KeyboardInterrupt
            each = [value(view, y + n, classes, len(view) if series else 1) for n in range(height)]
            block = np.moveaxis(np.array(each, np.uint8), 0, 2)[..., None].repeat(width, axis=-1)
            yield types.SimpleNamespace(view=view, y=y, values=block)
            y, count = y + height, count + 1


def mapped(
    store, views, *, origin=NET, overwrite=False, variable="probability", classes=("mine",), **how
):
    """Which views were asked for, and then written."""
    asked = []
    prediction = Prediction(
        model="net", views=views, origin=origin, variable=variable, classes=classes
    )
    wrote = cube.write_prediction(
        store,
        "pit",
        prediction,
        lambda todo: rows_of(todo, asked=asked, classes=len(classes), **how),
        overwrite=overwrite,
    )
    assert wrote == (asked[0] if asked else [])
    return wrote


def years(*each):
    return [(year,) for year in each]


def expected(view, classes=1, series=False):
    each = [value(view, y, classes, len(view) if series else 1) for y in range(150)]
    return np.moveaxis(np.array(each, np.uint8), 0, 2)[..., None].repeat(90, axis=-1)


def whole(store, *of):
    found = cube.open_probability(store, "pit", "net")
    assert found.year.values.tolist() == list(of)
    for year in of:
        np.testing.assert_array_equal(found.sel(year=year), expected((year,))[0, 0])


def pit():
    return site_of("pit", 360000, 5600040, 90, 150)


def store_of(folder, site):
    """Three of four years are built."""
    where = cube.Store(folder / "cubes.zarr")
    cube.create_site(where, site, grid_of(site), (2019, 2020, 2021, 2022), RECIPE)
    for year in (2019, 2020, 2021):
        build(where, site, year)
    return where
