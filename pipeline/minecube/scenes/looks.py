"""Read a thin sample of all scenes of a site-year, to judge them before compositing.

A look covers all of a site up to 5 km. In a larger site it reads windows of 5 km, one per cell of
15 km or more. Scenes that cover other parts of the site have further windows. Each window lies in
one tile of the files where possible (`minecube.grid`).

Overviews are not read, so the method of their making does not matter. One tile of an overview has as
many bytes as one tile of the image. At 10 km, only overviews of 320 m would take fewer bytes than a
window. Hardly any of their pixels are free of cloud. Overviews of SCL may have false classes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pystac
import shapely
from odc.geo.geobox import GeoBox

from minecube.arrays import Float32, UInt16
from minecube.catalog import SCL
from minecube.errors import ReadError
from minecube.grid import CELL_PX, PIXEL_M, add_windows, choose_windows, coarsen
from minecube.reader import (
    READ_THREADS,
    Ledger,
    find_common_tiles,
    start_stored_read,
    wait_for,
)

log = logging.getLogger(__name__)

CLEAR = (2, 4, 5, 6)
"""SCL: dark, vegetation, bare, water."""
_UNOBSERVED = (0, 1)  # SCL: no data and defective
_BANDS = ("B02", "B04", "B12", "B11", "B03", "B05", "B06", "B07", "B08", "B8A")
"""Preference order: the first three bands common to all scenes are read.

They are far apart in the spectrum, so cloud and snow change them differently.
"""
_PIXELS = 40_000  # most pixels per look: all in a place of 4 km, else every second or less
_RED = "B04"  # the band of registration
_SCL_M = 20


@dataclass(frozen=True, kw_only=True)
class Look:
    """Pixels of 20 m of several scenes, at most `_PIXELS` per scene."""

    ids: tuple[str, ...]
    bands: tuple[str, ...]
    stored: Float32
    """float32 [scene, band, pixel], stored numbers including the offset, NaN if not observed."""
    scl: UInt16
    """uint16 [scene, pixel]."""
    middle: Mapping[tuple[str, str, GeoBox], UInt16] = field(default_factory=dict)
    """(Scene id, band, grid) -> stored pixels [y, x] of SCL and red, for registration. Empty if the
    site has several cells."""

    def select_scenes(self, scenes: Sequence[pystac.Item]) -> Look:
        """Select scenes, in the given order."""
        rows = [self.ids.index(scene.id) for scene in scenes]
        ids = tuple(scene.id for scene in scenes)
        return replace(self, ids=ids, stored=self.stored[rows], scl=self.scl[rows])


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
    tiles = find_common_tiles(scenes, (*bands, SCL)[0], grid, ledger)
    windows = choose_windows(grid, tiles, CELL_PX)
    middles = windows if len(windows) == 1 else []
    footprints = [shapely.geometry.shape(scene.geometry) for scene in scenes]
    windows += add_windows(windows, grid, footprints, tiles)
    pixels = sum(math.prod(coarsen(window, _SCL_M).shape) for window in windows)
    step = math.ceil(pixels / _PIXELS)
    parts = []
    middle = {}
    for window in windows:
        files = [(scene, band) for scene in scenes for band in (*bands, SCL)]
        grids = [_choose_grid(scene, band, window) for scene, band in files]
        reads = (
            start_stored_read(scene, band, read_grid, ledger)
            for (scene, band), read_grid in zip(files, grids, strict=True)
        )
        layers = []
        in_order = wait_for(reads, READ_THREADS)
        for (scene, band), read_grid, layer in zip(files, grids, in_order, strict=True):
            layers.append(_coarsen_to_scl(layer, read_grid, band).reshape(-1)[::step])
            if window in middles and band in (_RED, SCL):
                middle[scene.id, band, read_grid] = layer
        parts.append(np.reshape(layers, (len(scenes), len(bands) + 1, -1)))
    stored, scl = np.split(np.concatenate(parts, axis=-1), [-1], axis=1)
    observed = (stored != 0).all(axis=1, keepdims=True) & ~np.isin(scl, _UNOBSERVED)
    return Look(
        ids=ids,
        bands=bands,
        stored=np.where(observed, stored, np.float32(np.nan)),
        scl=scl[:, 0].astype(np.uint16),
        middle=middle,
    )


def _choose_grid(scene: pystac.Item, band: str, window: GeoBox) -> GeoBox:
    """Choose the grid for reading a band: 10 m for bands of 10 m and for SCL, 20 m for others.

    Registration reads SCL and a band of 10 m on this grid, too.
    """
    is_fine = band == SCL or scene.assets[band].extra_fields.get("gsd") == PIXEL_M
    return window if is_fine else coarsen(window, _SCL_M)


def _coarsen_to_scl(layer: UInt16, grid: GeoBox, band: str) -> Float32:
    """Bring a layer of a grid to pixels of 20 m: means of 2 x 2 pixels, and classes as they are.

    A mean is 0 if one of its pixels is.
    """
    if grid.resolution.x == _SCL_M:
        return layer.astype(np.float32)
    if band == SCL:
        return layer[::2, ::2].astype(np.float32)
    height, width = layer.shape
    blocks = layer.reshape(height // 2, 2, width // 2, 2)
    means: Float32 = blocks.mean(axis=(1, 3), dtype=np.float32)
    means[(blocks == 0).any(axis=(1, 3))] = 0
    return means
