"""Compute and write the ground truth next to the archive, on the site's grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import bottleneck
import numpy as np
import odc.geo.xr
import rasterio.features
import xarray as xr
from odc.geo.geobox import GeoBox
from scipy import ndimage

from minecube.arrays import Bool, Float32, UInt8, UInt16
from minecube.catalog import BANDS
from minecube.simulate.granules import fit_to_tile, list_tiles
from minecube.simulate.land import Ground
from minecube.simulate.mine import Mine
from minecube.simulate.observe import NATIVE_M, Observation
from minecube.simulate.passes import SCL_M, SEASON, Overpass, Tile
from minecube.simulate.pixels import enlarge, halve

SKY = ("not observed", "clear", "contaminated")
"""Meanings of the values of the `sky` layer."""


def compute_reflectance(
    ground: Ground, passes: Sequence[Overpass], inside: tuple[slice, slice]
) -> UInt16:
    """Compute the median clean reflectance of April to October: uint16 [band, y, x], x 10000.

    It simulates a noise-free sensor and a clear sky. Bands of 20 m are averaged over their own
    pixels; each 20 m value fills four pixels of 10 m.

    `inside` is the site's window of the canvas, of even numbers.
    """
    days = [p.day for p in passes if SEASON[0] <= p.day.month <= SEASON[1]]
    spectra = [ground.patches.spectra(day.timetuple().tm_yday) for day in days]
    planes = []
    for band, name in enumerate(BANDS):
        dates: Float32 = np.stack([ground.reflectance(day[:, band])[inside] for day in spectra])
        shape = dates.shape[1:]
        if NATIVE_M[name] == SCL_M:
            dates = halve(dates)
        median = enlarge(bottleneck.median(dates, axis=0), shape)
        planes.append(np.maximum(np.rint(median * 10000), 1).astype(np.uint16))
    return np.stack(planes)


def burn_footprint(mine: Mine, grid: GeoBox) -> UInt8:
    """Rasterise the mine: uint8 [y, x], 1 if the pixel's centre lies in it."""
    burnt: UInt8 = rasterio.features.rasterize(
        [mine.footprint], grid.shape, transform=grid.transform, dtype=np.uint8
    )
    return burnt


def classify_sky(
    observation: Observation, overpass: Overpass, tiles: list[Tile], grid: GeoBox, canvas: GeoBox
) -> UInt8:
    """Classify the site's pixels on one date: uint8 [y, x], index into `SKY`."""
    inside = locate_site(grid, canvas)
    swath = enlarge(observation.scl != 0, canvas.shape.yx)
    covered: Bool = np.zeros(grid.shape, dtype=np.bool_)
    for tile in list_tiles(tiles, overpass, grid):
        if tile.warp is None:
            columns = np.zeros(canvas.shape, dtype=np.bool_)
            columns[:, tile.cols] = True
            covered |= (columns & swath)[inside]
        else:
            scl = fit_to_tile(observation.scl, tile, SCL_M)
            covered |= ndimage.map_coordinates(scl, tile.warp.to_site, order=0, cval=0) != 0
    sky = np.where(observation.contaminated[inside], 2, 1)
    return np.where(covered, sky, 0).astype(np.uint8)


def locate_site(grid: GeoBox, canvas: GeoBox) -> tuple[slice, slice]:
    """Return the site's window of its canvas; the margin is equal on all sides."""
    margin = (canvas.shape[0] - grid.shape[0]) // 2
    return slice(margin, margin + grid.shape[0]), slice(margin, margin + grid.shape[1])


def write_year(
    store: Path,
    site: str,
    grid: GeoBox,
    year: int,
    layers: tuple[UInt16, UInt8],
    sky: Mapping[np.datetime64, UInt8],
) -> None:
    """Add a year to a site's group: reflectance, footprint, and the sky of its dates."""
    coords = odc.geo.xr.xr_coords(grid)
    reflectance, footprint = layers
    meanings = ", ".join(f"{code} {meaning}" for code, meaning in enumerate(SKY))
    of_year = xr.Dataset(
        {
            "reflectance": (
                ("year", "band", "y", "x"),
                reflectance[None],
                {"scale": 1e-4, "nodata": 0},
            ),
            "footprint": (("year", "y", "x"), footprint[None], {"meaning": "1 mine, 0 not"}),
        },
        coords={"year": [year], "band": np.asarray(BANDS, dtype=object), **coords},
    )
    of_dates = xr.Dataset(
        {"sky": (("time", "y", "x"), np.stack(list(sky.values())), {"meaning": meanings})},
        coords={"time": list(sky), **coords},
    )
    append_to = {}
    if (store / site).exists():
        append_to = {"year": "year", "time": "time"}
    for data, dim in ((of_year, "year"), (of_dates, "time")):
        data.to_zarr(
            store,
            group=site,
            mode="a",
            append_dim=append_to.get(dim),
            zarr_format=3,
            consolidated=False,
        )
