"""Reflectance of ground in ten bands on any day: materials and their seasonal mixtures."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from minecube.arrays import Float32, Float64

# Surface reflectance in percent, B02 B03 B04 B05 B06 B07 B08 B8A B11 B12. Rounded from typical
# spectral libraries: absorption and red edge of chlorophyll, absorption of water in the near
# infrared, slope of iron oxide in soils.
_PERCENT = {
    "conifer": (2.0, 3.6, 2.3, 5.2, 14.5, 18.0, 20.0, 21.5, 10.0, 4.8),
    "broadleaf": (2.3, 4.8, 2.7, 8.2, 25.0, 32.0, 34.0, 36.0, 17.0, 7.6),
    "twigs": (4.2, 5.6, 6.4, 9.0, 13.0, 15.0, 17.0, 18.5, 20.0, 12.5),
    "grass": (3.6, 6.6, 5.0, 11.0, 24.0, 29.0, 31.0, 33.5, 22.5, 12.0),
    "hay": (5.6, 8.2, 9.2, 13.5, 20.0, 23.0, 25.0, 27.0, 29.0, 19.0),
    "crop": (2.8, 5.6, 3.4, 9.6, 28.0, 35.0, 38.0, 40.0, 19.5, 9.4),
    "straw": (6.6, 9.4, 12.4, 16.0, 20.0, 22.0, 24.0, 26.0, 32.0, 24.5),
    "soil": (5.8, 8.0, 10.6, 13.0, 15.0, 16.5, 18.0, 20.0, 27.0, 23.0),
    "pale soil": (9.2, 12.6, 16.6, 18.8, 20.4, 21.6, 22.9, 24.2, 32.0, 28.0),
    "water": (2.6, 3.1, 1.9, 1.5, 1.0, 0.9, 0.8, 0.7, 0.35, 0.25),
    "river": (3.6, 5.2, 4.2, 3.8, 2.7, 2.4, 2.1, 1.8, 0.9, 0.6),
    "pit water": (5.4, 8.4, 5.8, 3.8, 2.0, 1.8, 1.5, 1.2, 0.5, 0.35),
    "asphalt": (8.0, 9.0, 10.0, 11.0, 11.8, 12.4, 13.0, 13.6, 15.5, 14.5),
    "red roof": (8.0, 10.4, 16.4, 18.0, 19.4, 20.4, 21.4, 22.4, 27.0, 24.0),
    "grey roof": (13.5, 14.5, 15.5, 16.2, 16.8, 17.2, 17.8, 18.2, 20.0, 19.0),
    "white roof": (33.0, 34.5, 35.5, 36.0, 36.5, 37.0, 38.0, 38.0, 36.0, 34.0),
    "overburden": (9.0, 12.4, 16.2, 18.2, 19.6, 20.6, 21.8, 23.0, 30.5, 27.0),
    "sand": (16.5, 21.5, 26.5, 28.8, 30.4, 31.6, 33.0, 34.2, 42.0, 38.5),
    "clay": (13.5, 16.0, 18.2, 19.4, 20.4, 21.2, 22.2, 23.0, 26.5, 20.5),
    "coal": (3.4, 3.8, 4.2, 4.5, 4.8, 5.1, 5.4, 5.7, 7.4, 7.2),
    "rock": (9.5, 10.5, 11.6, 12.2, 12.6, 13.0, 13.6, 14.0, 17.0, 15.5),
    "dump": (12.0, 15.4, 18.8, 20.6, 22.0, 23.0, 24.2, 25.4, 32.5, 28.5),
    "kaolin": (36.0, 40.5, 43.5, 44.8, 45.6, 46.2, 47.0, 47.5, 46.0, 39.0),
    "snow": (86.0, 85.0, 84.0, 83.0, 82.0, 81.0, 80.0, 78.0, 12.0, 9.0),
    "cloud": (62.0, 60.0, 60.0, 61.0, 62.0, 62.5, 63.0, 62.0, 46.0, 34.0),
}
MATERIAL = {name: np.array(values, dtype=np.float32) / 100 for name, values in _PERCENT.items()}


class Kind(NamedTuple):
    """A kind of ground: its materials through the year and its variation."""

    bare: str
    """Material without growth."""
    leaf: str = "grass"
    dead: str = "straw"
    evergreen: float = 0.0
    """Share of leaf all year."""
    up: float = 999.0
    """Day of the year with half of the rest grown; 999: no growth."""
    down: float = 999.0
    """Day of the year with half of the growth gone."""
    residue: float = 0.0
    """Share of dead matter on the ground after growth."""
    texture: float = 0.03
    """Relative standard deviation of pixels within a patch."""
    varies: float = 0.08
    """Relative standard deviation of brightness between patches."""
    jitter: float = 6.0
    """Standard deviation of `up` and `down` between patches, days."""


KINDS = {
    "meadow": Kind("soil", "grass", "hay", evergreen=0.75, up=98, down=255, residue=0.6),
    "winter cereal": Kind("soil", "crop", "straw", up=40, down=148, residue=0.75),
    "maize": Kind("soil", "crop", "straw", up=128, down=292, residue=0.3),
    "ley": Kind("soil", "crop", "hay", evergreen=0.55, up=95, down=290, residue=0.4),
    "fallow": Kind("pale soil", "grass", "hay", evergreen=0.06, up=60, down=118, residue=0.1),
    "conifer": Kind("twigs", "conifer", evergreen=1.0, texture=0.10),
    "broadleaf": Kind("twigs", "broadleaf", "twigs", up=104, down=296, residue=0.3, texture=0.07),
    "garden": Kind("soil", "grass", "hay", evergreen=0.7, up=100, down=280, texture=0.12),
    "young": Kind("overburden", "grass", "hay", evergreen=0.5, up=100, down=270, texture=0.06),
    "water": Kind("water", texture=0.04),
    "river": Kind("river", texture=0.05),
    "pit water": Kind("pit water", texture=0.04, varies=0.15),
    "asphalt": Kind("asphalt", texture=0.05),
    "red roof": Kind("red roof", texture=0.08, varies=0.15),
    "grey roof": Kind("grey roof", texture=0.08, varies=0.15),
    "white roof": Kind("white roof", texture=0.04),
    "overburden": Kind("overburden", texture=0.08, varies=0.10),
    "sand": Kind("sand", texture=0.07, varies=0.08),
    "clay": Kind("clay", texture=0.08, varies=0.10),
    "coal": Kind("coal", texture=0.12, varies=0.12),
    "rock": Kind("rock", texture=0.09, varies=0.10),
    "dump": Kind("dump", texture=0.08, varies=0.10),
    "pioneers": Kind(
        "dump", "grass", "hay", evergreen=0.25, up=100, down=275, residue=0.5, texture=0.10
    ),
    "kaolin": Kind("kaolin", texture=0.04, varies=0.04),
    "gravel": Kind("sand", texture=0.05),
}
"""Days are for the northern temperate zone.

A field keeps its state for most of April to October, so the median of the year is meaningful. The
change of state is included.
"""


class Patches:
    """The patches of a site-year, each with its own kind, colour, brightness and timing."""

    def __init__(self, kinds: list[str], rng: np.random.Generator) -> None:
        rows = [KINDS[kind] for kind in kinds]
        n = len(rows)
        varies = np.array([row.varies for row in rows])
        tint = (
            1 + varies[:, None] * rng.standard_normal((n, 1)) + 0.02 * rng.standard_normal((n, 10))
        )
        shift = np.array([row.jitter for row in rows]) * rng.standard_normal(n)
        evergreen = np.array([row.evergreen for row in rows])
        self._tint = np.clip(tint, 0.6, 1.5).astype(np.float32)
        self._bare = np.stack([MATERIAL[row.bare] for row in rows])
        self._leaf = np.stack([MATERIAL[row.leaf] for row in rows])
        self._dead = np.stack([MATERIAL[row.dead] for row in rows])
        self._evergreen = np.clip(evergreen * (1 + 0.08 * rng.standard_normal(n)), 0, 1)
        self._up = np.array([row.up for row in rows]) + shift
        self._down = np.array([row.down for row in rows]) + shift
        self._residue = np.array([row.residue for row in rows])
        self.texture = np.array([row.texture for row in rows], dtype=np.float32)

    def spectra(self, day_of_year: int) -> Float32:
        """Return the reflectance 0..1 of every patch on one day: float32 [patch, band]."""
        grown = _logistic((day_of_year - self._up) / 6)
        gone = _logistic((day_of_year - self._down) / 6)
        leaf = self._evergreen + (1 - self._evergreen) * grown * (1 - gone)
        dead = (1 - leaf) * gone * self._residue
        mix = (
            leaf[:, None] * self._leaf
            + dead[:, None] * self._dead
            + (1 - leaf - dead)[:, None] * self._bare
        )
        spectra: Float32 = (mix * self._tint).astype(np.float32)
        return spectra


def _logistic(x: Float64) -> Float64:
    return 1 / (1 + np.exp(-np.clip(x, -40, 40)))
