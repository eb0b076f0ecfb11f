"""Simulate one acquisition of one site: the recorded pixels and their contamination."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import rasterio.features
from odc.geo.geobox import GeoBox

from minecube.arrays import Bool, Float32, Int16, UInt8
from minecube.catalog import BANDS
from minecube.grid import coarsen
from minecube.simulate.land import Ground
from minecube.simulate.noise import Draw
from minecube.simulate.passes import OFFSET_DAY, SCL_M, Overpass, cut_swath, locate_sun
from minecube.simulate.pixels import displace, enlarge, halve
from minecube.simulate.sky import VISIBLE, classify, draw_sky

NATIVE_M = {**dict.fromkeys(BANDS, 20), **dict.fromkeys(("B02", "B03", "B04", "B08"), 10)}
"""Band -> pixel size in metres."""
_NOISE = np.array(
    [0.0022, 0.0022, 0.0024, 0.003, 0.003, 0.003, 0.0036, 0.0032, 0.0028, 0.0028], dtype=np.float32
)
# Uncorrected aerosol in the first processing, added to the clean counts.
_OLD_BIAS = np.array([170, 150, 140, 130, 120, 120, 120, 110, 110, 100], dtype=np.int16)


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One acquisition on the canvas.

    Int16 are reflectance x 10000 without offset. Noise can make them negative.
    """

    counts: dict[str, Int16]
    """Band -> int16 [y, x] at its own pixel size."""
    old_counts: dict[str, Int16]
    """Int16 of the old baseline. Empty from the offset on: one processing exists."""
    scl: UInt8
    """At 20 m; 0 outside the swath."""
    contaminated: Bool
    """At 10 m: cloud, halo, thin cloud, haze, shadow or snow moves a band by over VISIBLE."""
    azimuth: float
    elevation: float


def observe(
    draw: Draw, grid: GeoBox, canvas: GeoBox, ground: Ground, overpass: Overpass
) -> Observation:
    """Simulate the acquisition of one overpass.

    Ground, sky and sensor noise are combined. Some dates are displaced by a fraction of a pixel.
    """
    rng = draw("sensor", overpass.day)
    latitude = canvas.geographic_extent.centroid.coords[0][1]
    azimuth, elevation = locate_sun(overpass.day, latitude)
    half = coarsen(canvas, SCL_M)
    sky = draw_sky(draw, half.shape.yx, overpass, azimuth, elevation)
    down, right = rng.uniform(-0.4, 0.4, 2) * (rng.random() < 0.4)
    if overpass.displacement_px:
        displacement_rng = draw("astray", overpass.day)
        down, right = np.clip(displacement_rng.normal(0, overpass.displacement_px, 2), -0.99, 0.99)
    spectra = ground.patches.spectra(overpass.day.timetuple().tm_yday)
    counts: dict[str, Int16] = {}
    clean_20: dict[str, Float32] = {}
    contaminated = np.zeros(canvas.shape, dtype=np.bool_)
    for band, name in enumerate(BANDS):
        clean = displace(ground.reflectance(spectra[:, band]), down, right)
        if name in ("B04", "B08"):
            clean_20[name] = halve(clean)
        if NATIVE_M[name] == SCL_M:
            clean = halve(clean)
        measured = sky.cover_ground(clean, band)
        contaminated |= enlarge(np.abs(measured - clean) > VISIBLE, canvas.shape.yx)
        measured += _NOISE[band] * rng.standard_normal(measured.shape, dtype=np.float32)
        counts[name] = np.rint(np.clip(measured, -0.01, 1.6) * 10000).astype(np.int16)
    scl = classify(draw, ground, sky, overpass, clean_20)
    in_swath = rasterio.features.rasterize(
        [cut_swath(canvas, grid, overpass)], half.shape, transform=half.transform, dtype=np.uint8
    )
    old_counts: dict[str, Int16] = {}
    if overpass.day < OFFSET_DAY:
        old_counts = _add_old_errors(counts)
    return Observation(
        counts=counts,
        old_counts=old_counts,
        scl=scl * in_swath,
        contaminated=contaminated,
        azimuth=azimuth,
        elevation=elevation,
    )


def _add_old_errors(counts: dict[str, Int16]) -> dict[str, Int16]:
    """Add the errors of the old processing.

    Reflectance is too bright by 0.01 to 0.02. Pixels are displaced by 10 m to the south-east.
    """
    old_counts = {}
    for bias, (band, clean) in zip(_OLD_BIAS, counts.items(), strict=True):
        padded = np.pad(clean, ((1, 0), (1, 0)), mode="edge")
        if NATIVE_M[band] == 10:
            old_counts[band] = padded[:-1, :-1] + bias
        else:  # half a pixel of 20 m
            sums = padded[:-1, :-1].astype(np.int32)
            sums += padded[1:, :-1]
            sums += padded[:-1, 1:]
            sums += padded[1:, 1:]
            old_counts[band] = (sums // 4 + bias).astype(np.int16)
    return old_counts
