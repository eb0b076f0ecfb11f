"""Randomness that belongs to one thing alone, and fields of it that look like nature."""

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
"""Names of a thing -> its own generator: `draw("sky", 2020, 155)`."""


def streams(seed: int, site_id: str) -> Draw:
    """Generators by name for one site: what is drawn for a date depends on nothing else that is simulated."""

    def draw(*names: object) -> np.random.Generator:
        return np.random.default_rng([seed, *(zlib.crc32(str(n).encode()) for n in (site_id, *names))])

    return draw


def fractal(rng: np.random.Generator, shape: tuple[int, int], longest_px: float, slope: float = 3.0) -> Float:
    """A self-similar field, float32 [y, x], mean 0 and standard deviation 1.

    White noise whose power falls with frequency as f ** -slope, flat above wavelengths of `longest_px`: 3 gives clouds and
    woods, less gives rougher ground.
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
    """The last two dimensions at twice the pixel size: means of 2 x 2."""
    of = pixels.astype(np.float32, copy=False)
    means: Float = (of[..., ::2, ::2] + of[..., 1::2, ::2] + of[..., ::2, 1::2] + of[..., 1::2, 1::2]) * np.float32(0.25)
    return means
