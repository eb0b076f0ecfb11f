"""Random generators by name, and random fields with a natural look."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.fft

Float = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]
Draw = Callable[..., np.random.Generator]
"""Names of an object -> its generator: `draw("sky", 2020, 155)`."""


def streams(seed: int, site_id: str) -> Draw:
    """Create generators by name for one site.

    Numbers for a date are independent of everything else simulated.
    """

    def draw(*names: object) -> np.random.Generator:
        return np.random.default_rng(
            [seed, *(zlib.crc32(str(n).encode()) for n in (site_id, *names))]
        )

    return draw


def fractal(
    rng: np.random.Generator, shape: tuple[int, int], longest_px: float, slope: float = 3.0
) -> Float:
    """Create a self-similar field, float32 [y, x], mean 0 and standard deviation 1.

    It is white noise with a power falling with frequency as f ** -slope. The power is flat above
    wavelengths of `longest_px`. A slope of 3 gives clouds and woods, a smaller one gives rougher
    ground.
    """
    size = [scipy.fft.next_fast_len(n, real=True) for n in shape]
    wave = scipy.fft.rfft2(rng.standard_normal(size, dtype=np.float32))
    square = np.fft.fftfreq(size[0])[:, None] ** 2 + np.fft.rfftfreq(size[1])[None, :] ** 2
    wave *= ((square + longest_px**-2) ** (-slope / 4)).astype(np.float32)
    field: Float = scipy.fft.irfft2(wave, s=size)[: shape[0], : shape[1]]
    field -= field.mean()
    field /= max(float(field.std()), 1e-9)
    return field


def halved(pixels: npt.NDArray[Any]) -> Float:
    """Average 2 x 2 pixels of the last two dimensions."""
    of = pixels.astype(np.float32, copy=False)
    means: Float = (
        of[..., ::2, ::2] + of[..., 1::2, ::2] + of[..., ::2, 1::2] + of[..., 1::2, 1::2]
    ) * np.float32(0.25)
    return means
