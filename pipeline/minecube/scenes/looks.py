"""A coarse look at all scenes of a site-year, from which they are judged before any is composited."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pystac
from affine import Affine
from odc.geo.geobox import GeoBox

from minecube.catalog import SCL
from minecube.reader import Ledger, fetched, stack

CLEAR = (2, 4, 5, 6)
"""SCL: dark, vegetation, bare, water."""
_UNSEEN = (0, 1)  # SCL: no data and defective
_BANDS = ("B02", "B04", "B12", "B11", "B03", "B05", "B06", "B07", "B08", "B8A")
"""The three first that all scenes have: far apart in the spectrum, so that cloud and snow move them differently."""
_PIXELS = 40_000  # largest number of pixels of a look: 20 m pixels for a place of 4 km, averages for a larger one


@dataclass(frozen=True, kw_only=True)
class Look:
    """What scenes show of a place, in `_PIXELS` pixels at most."""

    ids: tuple[str, ...]
    bands: tuple[str, ...]
    stored: npt.NDArray[np.float32]
    """float32 [scene, band, pixel], numbers as stored, the offset still in them; NaN where not observed."""
    scl: npt.NDArray[np.uint16]
    """uint16 [scene, pixel]."""

    def of(self, scenes: Sequence[pystac.Item]) -> Look:
        """The same of some of the scenes, in their order."""
        rows = [self.ids.index(scene.id) for scene in scenes]
        ids = tuple(scene.id for scene in scenes)
        return Look(ids=ids, bands=self.bands, stored=self.stored[rows], scl=self.scl[rows])


def look_at(scenes: Sequence[pystac.Item], grid: GeoBox, ledger: Ledger | None = None) -> Look:
    """Look at scenes, in the order given: SCL and three bands of each.

    Raises:
        ReadError: a pixel that cannot be read, where the ledger does not allow it.
    """
    ids = tuple(scene.id for scene in scenes)
    bands = tuple(b for b in _BANDS if all(b in s.assets for s in scenes))[:3]
    if not scenes:
        return Look(ids=ids, bands=bands, stored=np.empty((0, len(bands), 0), np.float32), scl=np.empty((0, 0), np.uint16))
    as_stored = []
    for scene in scenes:
        copy = scene.clone()
        copy.properties["minecube:offset"] = 0  # `stack` would cut at 1 what comes out negative
        as_stored.append(copy)
    coarse = coarse_of(grid)
    pixels = fetched(stack(as_stored, coarse, (*bands, SCL), chunk_px=max(coarse.shape), ledger=ledger))
    stored, scl = np.split(pixels.reshape(*pixels.shape[:2], -1), [-1], axis=1)
    seen = (stored != 0).all(axis=1, keepdims=True) & ~np.isin(scl, _UNSEEN)
    return Look(ids=ids, bands=bands, stored=np.where(seen, stored.astype(np.float32), np.float32(np.nan)), scl=scl[:, 0])


def coarse_of(grid: GeoBox) -> GeoBox:
    """The grid in about `_PIXELS` pixels at most, of whole 20 m."""
    factor = 2 * max(1, math.ceil(math.sqrt(math.prod(grid.shape) / _PIXELS) / 2))
    height, width = (-(-n // factor) for n in grid.shape)
    return GeoBox((height, width), grid.transform @ Affine.scale(factor), grid.crs)
