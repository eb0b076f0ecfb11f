"""Read a coarse view of all scenes of a site-year, to judge them before compositing."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pystac
from affine import Affine
from odc.geo.geobox import GeoBox

from minecube.arrays import Float32, UInt16
from minecube.catalog import SCL
from minecube.errors import ReadError
from minecube.reader import Ledger, compute_stack, stack

log = logging.getLogger(__name__)

CLEAR = (2, 4, 5, 6)
"""SCL: dark, vegetation, bare, water."""
_UNOBSERVED = (0, 1)  # SCL: no data and defective
_BANDS = ("B02", "B04", "B12", "B11", "B03", "B05", "B06", "B07", "B08", "B8A")
"""Preference order: the first three bands common to all scenes are read.

They are far apart in the spectrum, so cloud and snow change them differently.
"""
_PIXELS = 40_000  # per look; 20 m pixels for a place of 4 km, averages for a larger one


@dataclass(frozen=True, kw_only=True)
class Look:
    """Coarse pixels of several scenes, at most `_PIXELS` per scene."""

    ids: tuple[str, ...]
    bands: tuple[str, ...]
    stored: Float32
    """float32 [scene, band, pixel], stored numbers including the offset, NaN if not observed."""
    scl: UInt16
    """uint16 [scene, pixel]."""

    def select_scenes(self, scenes: Sequence[pystac.Item]) -> Look:
        """Select scenes, in the given order."""
        rows = [self.ids.index(scene.id) for scene in scenes]
        ids = tuple(scene.id for scene in scenes)
        return Look(ids=ids, bands=self.bands, stored=self.stored[rows], scl=self.scl[rows])


def read_look(
    scenes: Sequence[pystac.Item],
    grid: GeoBox,
    ledger: Ledger | None = None,
    needed: Sequence[str] = _BANDS,
) -> Look:
    """Read SCL and three bands of the scenes of one site-year, in the given order.

    `needed` are the bands of the recipe. Other bands help to judge a scene but are optional. If one
    of them cannot be read, only needed bands are used.

    Raises:
        ReadError: a pixel cannot be read, and the ledger does not allow this.
    """
    common = [band for band in _BANDS if all(band in scene.assets for scene in scenes)]
    try:
        return _read_look(scenes, grid, ledger, common[:3])
    except ReadError:
        fallback = [band for band in common if band in needed][:3]
        if set(common[:3]) <= set(fallback):
            raise
        log.info(
            "a band that the recipe does not need cannot be read; scenes are judged by %s",
            ", ".join(fallback),
        )
        return _read_look(scenes, grid, ledger, fallback)


def _read_look(
    scenes: Sequence[pystac.Item], grid: GeoBox, ledger: Ledger | None, bands: Sequence[str]
) -> Look:
    ids = tuple(scene.id for scene in scenes)
    bands = tuple(bands)
    if not scenes:
        return Look(
            ids=ids,
            bands=bands,
            stored=np.empty((0, len(bands), 0), np.float32),
            scl=np.empty((0, 0), np.uint16),
        )
    as_stored = []
    for scene in scenes:
        copy = scene.clone()
        # With an offset, `stack` would replace negative results by 1.
        copy.properties["minecube:offset"] = 0
        as_stored.append(copy)
    coarse = coarsen_grid(grid)
    pixels = compute_stack(
        stack(as_stored, coarse, (*bands, SCL), chunk_px=max(coarse.shape), ledger=ledger)
    )
    stored, scl = np.split(pixels.reshape(*pixels.shape[:2], -1), [-1], axis=1)
    observed = (stored != 0).all(axis=1, keepdims=True) & ~np.isin(scl, _UNOBSERVED)
    return Look(
        ids=ids,
        bands=bands,
        stored=np.where(observed, stored.astype(np.float32), np.float32(np.nan)),
        scl=scl[:, 0],
    )


def coarsen_grid(grid: GeoBox) -> GeoBox:
    """Coarsen the grid to about `_PIXELS` pixels or fewer, with pixels in multiples of 20 m."""
    factor = 2 * max(1, math.ceil(math.sqrt(math.prod(grid.shape) / _PIXELS) / 2))
    height, width = (-(-n // factor) for n in grid.shape)
    return GeoBox((height, width), grid.transform @ Affine.scale(factor), grid.crs)
