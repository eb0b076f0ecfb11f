"""Simulate the sky of one date, its effect on pixels and its SCL."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from minecube.arrays import AnyArray, Float32, UInt8
from minecube.simulate.land import Ground
from minecube.simulate.noise import Draw, draw_fractal
from minecube.simulate.passes import SCL_M, Overpass
from minecube.simulate.pixels import enlarge, halve
from minecube.simulate.spectra import MATERIAL

# Scattering of thin cloud and haze, and darkening by shadow, per band. Both fall with wavelength:
# the blue sky lights shadows.
_SCATTER = np.array([1.0, 0.92, 0.82, 0.76, 0.68, 0.63, 0.56, 0.5, 0.24, 0.15], dtype=np.float32)
_SHADE = np.array([0.46, 0.52, 0.57, 0.6, 0.63, 0.65, 0.67, 0.68, 0.72, 0.74], dtype=np.float32)
# Bands view a spot one after the other at different angles. Displacement of a cloud at 10 km, in
# 20 m pixels along the track, and scattering of its ice.
_PARALLAX_PX = (0, 4, 8, 10, 11, 12, 2, 13, 15, 18)
_ICE = np.array([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.98, 0.95, 0.5, 0.4], dtype=np.float32)
_FALSE_CIRRUS = 0.6  # share of clear ground, on dates with false cirrus
_MARGIN_PX = 100  # clouds up to this far outside cast shadows inside
VISIBLE = 0.02
"""Smallest contamination: a reflectance change above this in any band.

Cloud, halo, haze, shadow and snow cause it.
"""


@dataclass(frozen=True, kw_only=True)
class Sky:
    """Layers at 20 m on the canvas, float32 [y, x], 0..1."""

    cloud: Float32
    """Opacity of cloud, including its halo."""
    white: Float32
    """Brightness of the cloud, around 1."""
    veil: Float32
    """Opacity of thin cloud and haze in the blue."""
    shadow: Float32
    snow: Float32
    """Share of the ground under snow."""
    cirrus: Float32
    """Opacity of high thin cloud. Its position differs per band and SCL misses it."""
    veil_missed: bool
    """SCL detects only the thickest veil on this date."""

    def cover_ground(self, clean: Float32, band: int) -> Float32:
        """Return the ground of one band, at 10 or 20 m, as observed through this sky."""

        def fit(layer: Float32) -> Float32:
            # Clouds are soft enough for repeated pixels.
            return enlarge(layer, clean.shape)

        cloud = MATERIAL["cloud"][band]
        observed: Float32 = clean.copy()
        if self.snow.any():
            observed = clean + fit(self.snow) * (MATERIAL["snow"][band] - clean)
        observed *= 1 - _SHADE[band] * fit(self.shadow)
        if self.veil.any():
            observed += _SCATTER[band] * fit(self.veil) * (cloud - observed)
        if self.cirrus.any():
            cirrus = np.roll(self.cirrus, _PARALLAX_PX[band], axis=0)
            observed += _ICE[band] * fit(cirrus) * (cloud - observed)
        observed += fit(self.cloud) * (cloud * fit(self.white) - observed)
        return observed


def draw_sky(
    draw: Draw, shape: tuple[int, int], overpass: Overpass, azimuth: float, elevation: float
) -> Sky:
    """Simulate the sky over a canvas of `shape` 20 m pixels on one date.

    Azimuth and elevation are those of the sun, in degrees.
    """
    rng = draw("sky", overpass.day)
    margin = _MARGIN_PX
    wide = (shape[0] + 2 * margin, shape[1] + 2 * margin)
    inner = (slice(margin, -margin), slice(margin, -margin))
    field = draw_fractal(rng, wide, rng.uniform(60, 160), slope=3.5)
    cut = float(np.quantile(field[inner], 1 - overpass.cover))
    if overpass.cover > 0.97:
        cut = float(field.min()) - 0.5
    dense = np.clip((field - cut) / 0.22 + 0.15, 0, 1)
    dense[field < cut] = 0
    halo = ndimage.gaussian_filter((dense > 0.4).astype(np.float32), 2.2) * np.float32(0.45)
    cloud = np.maximum(dense * 0.96, halo)[inner]

    # The shadow lies opposite the sun; its distance grows with cloud height.
    reach = rng.uniform(500, 1500) / math.tan(math.radians(max(elevation, 15))) / SCL_M
    down = round(reach * math.cos(math.radians(azimuth)))
    right = round(reach * -math.sin(math.radians(azimuth)))
    row = margin - int(np.clip(down, -margin, margin))
    column = margin - int(np.clip(right, -margin, margin))
    shadow = ndimage.gaussian_filter(dense, 0.8)[row : row + shape[0], column : column + shape[1]]

    thin = draw_fractal(rng, shape, 120, slope=3.6)
    strength = rng.uniform(0.10, 0.30) * (rng.random() < 0.4) * (overpass.cover > 0.02)
    snow: AnyArray = np.zeros(shape)
    if overpass.snow:
        snow = draw_fractal(rng, shape, 90) * 0.3 + 0.8
    cirrus = np.zeros(shape, np.float32)
    if overpass.unseen_cirrus:
        cirrus = _draw_cirrus(draw("cirrus", overpass.day), shape)
    return Sky(
        cloud=cloud,
        white=1 + np.float32(0.12) * draw_fractal(rng, wide, 40, slope=2.6)[inner],
        veil=np.clip(strength * (thin + 0.3), 0, 0.4).astype(np.float32),
        shadow=shadow * (1 - cloud),
        snow=np.clip(snow, 0, 0.97).astype(np.float32),
        cirrus=cirrus,
        veil_missed=bool(rng.random() < 0.25),
    )


def _draw_cirrus(rng: np.random.Generator, shape: tuple[int, int]) -> Float32:
    """Simulate streaks, four times as long as wide, over a thin layer: float32 [y, x]."""
    height, width = shape
    streaks = draw_fractal(rng, (height, -(-width // 4)), 12, slope=2.4).repeat(4, axis=1)[
        :, :width
    ]
    opacity: Float32 = np.clip(np.float32(0.06) + np.float32(0.05) * streaks, 0, 0.3)
    return opacity


def classify(
    draw: Draw, ground: Ground, sky: Sky, overpass: Overpass, clean: dict[str, Float32]
) -> UInt8:
    """Imitate Sen2Cor's scene classification of one date: uint8 [y, x] at 20 m, without 0.

    It misses the halo of clouds and, on some dates, thin cloud. It classifies dazzling mine ground
    as cloud on nearly every date. It takes some dark water for shadow and some shadow for dark
    ground. On some overpasses the whole date is wrong.

    `clean` has the ground reflectance of B04 and B08 on this date, float32 [y, x] at 20 m.
    """
    rng = draw("scl", overpass.day)
    noise = rng.random((2, *sky.cloud.shape), dtype=np.float32)
    red = clean["B04"]
    nir = clean["B08"]
    scl = np.where((nir - red) / (nir + red) > 0.4, 4, 5).astype(np.uint8)
    scl[(nir < 0.07) & (red < 0.06)] = 2
    scl[halve(ground.water) > 0.5] = 6
    scl[(scl == 6) & (noise[0] < 0.01)] = 3
    scl[noise[1] < 0.002] = 7
    scl[sky.snow > 0.45] = 11
    scl[(sky.shadow > 0.3) & (noise[0] > 0.03) & (scl != 6)] = 3
    scl[(sky.shadow > 0.3) & (noise[0] <= 0.03)] = 2
    thinnest_veil = 0.045
    if sky.veil_missed:
        thinnest_veil = 0.15
    scl[sky.veil > thinnest_veil] = 10
    # On a few dates dazzling ground is classified correctly. Noise makes single pixels flicker.
    fooled = rng.random() < 0.97
    dazzled = (halve(ground.dazzling) > 0.2) & (noise[1] < 0.97) & fooled
    scl[dazzled] = np.where(halve(ground.shade)[dazzled] > 1, 9, 8)
    if overpass.false_cirrus:
        alarm = draw_fractal(draw("alarm", overpass.day), scl.shape, 60)
        scl[(alarm > np.quantile(alarm, 1 - _FALSE_CIRRUS)) & np.isin(scl, (2, 4, 5, 6))] = 10
    edge_share = 0.5
    if overpass.edges_unclassified:
        edge_share = 0.9
    scl[(sky.cloud > 0.14) & (noise[1] < edge_share)] = 7
    scl[sky.cloud > 0.3] = 8
    scl[sky.cloud > 0.6] = 9
    if overpass.edges_unclassified:
        scl[(sky.cloud > 0.3) & (sky.cloud <= 0.8) & (noise[0] < 0.5)] = 7
    return scl
