"""Change pixel size between 10 and 20 m, and displace pixels by a fraction."""

from __future__ import annotations

import numpy as np

from minecube.arrays import AnyArray, Float32


def halve(pixels: AnyArray) -> Float32:
    """Average 2 x 2 pixels of the last two dimensions."""
    fine = pixels.astype(np.float32, copy=False)
    return (
        fine[..., ::2, ::2] + fine[..., 1::2, ::2] + fine[..., ::2, 1::2] + fine[..., 1::2, 1::2]
    ) * np.float32(0.25)


def enlarge(pixels: AnyArray, shape: tuple[int, ...]) -> AnyArray:
    """Repeat pixels [y, x] 2 x 2, unless they already have the shape."""
    if pixels.shape == shape:
        return pixels
    return pixels.repeat(2, axis=0).repeat(2, axis=1)


def displace(pixels: Float32, down: float, right: float) -> Float32:
    """Move pixels [y, x] by a fraction of a pixel, interpolating linearly."""
    for axis, distance in enumerate((down, right)):
        if distance == 0:
            continue
        neighbours = np.roll(pixels, int(np.sign(distance)), axis=axis)
        # Pixels beyond the edge have the value of the edge.
        edge = 0 if distance > 0 else -1
        np.moveaxis(neighbours, axis, 0)[edge] = np.moveaxis(pixels, axis, 0)[edge]
        pixels = pixels + np.float32(abs(distance)) * (neighbours - pixels)
    return pixels
