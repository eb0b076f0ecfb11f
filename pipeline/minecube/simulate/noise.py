"""Random generators by name, and random fields with a natural look."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
import scipy.fft

from minecube.arrays import Float32

Draw = Callable[..., np.random.Generator]
"""Names of an object -> its generator: `draw("sky", 2020, 155)`."""


def make_generators(seed: int, site_id: str) -> Draw:
    """Create generators by name for one site.

    Numbers for a date are independent of everything else simulated.
    """

    def draw(*names: object) -> np.random.Generator:
        checksums = [zlib.crc32(str(name).encode()) for name in (site_id, *names)]
        return np.random.default_rng([seed, *checksums])

    return draw


def draw_fractal(
    rng: np.random.Generator, shape: tuple[int, int], longest_px: float, slope: float = 3.0
) -> Float32:
    """Create a self-similar field, float32 [y, x], mean 0 and standard deviation 1.

    It is white noise with a power falling with frequency as f ** -slope. The power is flat above
    wavelengths of `longest_px`. A slope of 3 gives clouds and woods, a smaller one gives rougher
    ground.
    """
    size = [scipy.fft.next_fast_len(n, real=True) for n in shape]
    wave = scipy.fft.rfft2(rng.standard_normal(size, dtype=np.float32))
    square = np.fft.fftfreq(size[0])[:, None] ** 2 + np.fft.rfftfreq(size[1])[None, :] ** 2
    wave *= ((square + longest_px**-2) ** (-slope / 4)).astype(np.float32)
    field: Float32 = scipy.fft.irfft2(wave, s=size)[: shape[0], : shape[1]]
    field -= field.mean()
    field /= max(float(field.std()), 1e-9)
    return field
