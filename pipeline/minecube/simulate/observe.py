"""Simulate one acquisition of one site: the recorded pixels and their contamination."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import rasterio.features
from odc.geo.geobox import GeoBox

from minecube.catalog import BANDS
from minecube.grid import at_resolution
from minecube.simulate.land import Ground
from minecube.simulate.noise import Bool, Draw, Float, halved
from minecube.simulate.passes import OFFSET_DAY, SCL_M, Overpass, sun, swath
from minecube.simulate.sky import VISIBLE, UInt8, classify, sky_of

Counts = npt.NDArray[np.int16]
NATIVE_M = {b: 10 if b in ("B02", "B03", "B04", "B08") else 20 for b in BANDS}
_NOISE = np.array(
    [0.0022, 0.0022, 0.0024, 0.003, 0.003, 0.003, 0.0036, 0.0032, 0.0028, 0.0028], dtype=np.float32
)
# Uncorrected aerosol in the first processing, added to the clean counts.
_OLD_BIAS = np.array([170, 150, 140, 130, 120, 120, 120, 110, 110, 100], dtype=np.int16)


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One acquisition on the canvas.

    Counts are reflectance x 10000 without offset. Noise can make them negative.
    """

    counts: dict[str, Counts]
    """Band -> int16 [y, x] at its own pixel size."""
    old_counts: dict[str, Counts]
    """Counts of the old baseline. Empty from the offset on: one processing exists."""
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
    azimuth, elevation = sun(overpass.day, latitude)
    half = at_resolution(canvas, SCL_M)
    sky = sky_of(draw, half.shape.yx, overpass, azimuth, elevation)
    astray = rng.uniform(-0.4, 0.4, 2) * (rng.random() < 0.4)
    if overpass.astray_px:
        astray = np.clip(draw("astray", overpass.day).normal(0, overpass.astray_px, 2), -0.99, 0.99)
    spectra = ground.patches.spectra(overpass.day.timetuple().tm_yday)
    counts: dict[str, Counts] = {}
    clean_20: dict[str, Float] = {}
    contaminated = np.zeros(canvas.shape, dtype=np.bool_)
    for band, name in enumerate(BANDS):
        clean = displaced(ground.reflectance(spectra[:, band]), *astray)
        if name in ("B04", "B08"):
            clean_20[name] = halved(clean)
        if NATIVE_M[name] == SCL_M:
            clean = halved(clean)
        seen = sky.over(clean, band)
        moves = np.abs(seen - clean) > VISIBLE
        contaminated |= (
            moves if moves.shape == canvas.shape.yx else moves.repeat(2, axis=0).repeat(2, axis=1)
        )
        seen += _NOISE[band] * rng.standard_normal(seen.shape, dtype=np.float32)
        counts[name] = np.rint(np.clip(seen, -0.01, 1.6) * 10000).astype(np.int16)
    scl = classify(draw, ground, sky, overpass, clean_20)
    seen_by = rasterio.features.rasterize(
        [swath(canvas, grid, overpass)], half.shape, transform=half.transform, dtype=np.uint8
    )
    return Observation(
        counts=counts,
        old_counts=_as_first_processed(counts) if overpass.day < OFFSET_DAY else {},
        scl=scl * seen_by,
        contaminated=contaminated,
        azimuth=azimuth,
        elevation=elevation,
    )


def _as_first_processed(counts: dict[str, Counts]) -> dict[str, Counts]:
    """Add the errors of the old processing.

    Reflectance is too bright by 0.01 to 0.02. Pixels are displaced by 10 m to the south-east.
    """
    made = {}
    for bias, (band, clean) in zip(_OLD_BIAS, counts.items(), strict=True):
        moved = np.pad(clean, ((1, 0), (1, 0)), mode="edge")
        if NATIVE_M[band] == 10:
            made[band] = moved[:-1, :-1] + bias
        else:  # half a pixel of 20 m
            quarters = (
                moved[:-1, :-1].astype(np.int32) + moved[1:, :-1] + moved[:-1, 1:] + moved[1:, 1:]
            )
            made[band] = (quarters // 4 + bias).astype(np.int16)
    return made


def displaced(pixels: Float, down: float, right: float) -> Float:
    """Move pixels [y, x] by a fraction of a pixel, interpolating linearly."""
    for axis, by in ((0, down), (1, right)):
        if by:
            step = 1 if by > 0 else -1
            aside = np.roll(pixels, step, axis=axis)
            edge = [slice(None), slice(None)]
            edge[axis] = slice(0, 1) if step > 0 else slice(-1, None)
            aside[tuple(edge)] = pixels[tuple(edge)]
            pixels = pixels + np.float32(abs(by)) * (aside - pixels)
    return pixels
