"""Whole sites mapped by overlapping windows.

Windows overlap by half and their logits, not their labels, are blended by weights that fall to zero at the windows' edges.
The sums are kept in integers, which add up to the same value in any order, and on the CPU the network sees one window per
call, because the libraries beneath choose their kernels by batch size and the last bits then differ (seen: 3e-8 between
batches of one and of two). So on the CPU the result depends neither on `batch` nor on the order of the windows. Another
number of threads, or another machine, may still move the last bits of a logit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import nn

from minecube.device import device_of
from minecube.models.network import Trained, logits, normalise, select_bands

NODATA = 255
"""Probability and footprint where nothing is known."""
SCALE = 250
"""Stored probability of one; the integers above it are free for NODATA."""
_LOGIT_STEPS = 2**20  # per unit of logit; a float32 logit near 8 has no finer steps
_LOGIT_LIMIT = 30.0  # beyond it the stored probability no longer moves, and the integer sums stay far from overflow
_WEIGHT_STEPS = 2**10  # per unit of blending weight, in y and in x


def predict(
    trained: Trained,
    reflectance: xr.DataArray,
    *,
    batch: int = 16,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> xr.DataArray:
    """Mine probability of every pixel: uint8, probability x 250, NODATA (255) where any band has no observation.

    Args:
        trained: The model.
        reflectance: (band, y, x) or (year, band, y, x), uint16, 0 = no observation; if lazy, read year by year.
        batch: Windows per call of the network on a GPU. On the CPU it is one whatever this says (see the module).
        device: cpu, cuda, cuda:1, ...
        progress: Called with windows done and windows in all.

    Returns:
        (y, x) or (year, y, x), in memory, with the coordinates of `reflectance`.

    Raises:
        ModelError: bands are missing or in another order than the card's, pixels are not uint16, the device is not there.
    """
    place = device_of(device)
    cube = select_bands(reflectance, trained.card)
    years = cube if "year" in cube.dims else cube.expand_dims("year")
    network = copy.deepcopy(trained.network).to(place).eval()
    size = batch if place.type != "cpu" else 1
    maps: list[NDArray[np.uint8]] = []
    for image in (years.isel(year=number).to_numpy() for number in range(years.sizes["year"])):
        blend = _Blend(image, trained.card.window_px)
        corners = blend.corners()
        for at in range(0, len(corners), size):
            group = corners[at : at + size]
            windows = blend.cut(group)
            if windows.any():  # one without any observation touches only pixels that come out as NODATA
                blend.add(group, _logits(network, normalise(windows, trained.mean, trained.std), place))
            if progress is not None:
                progress(len(maps) * len(corners) + at + len(group), years.sizes["year"] * len(corners))
        maps.append(np.where((image == 0).any(axis=0), np.uint8(NODATA), blend.probability()))
    found = years.isel(band=0, drop=True).copy(data=np.stack(maps))
    found = found if "year" in cube.dims else found.isel(year=0)
    return found.rename("probability").assign_attrs(long_name="mine probability x 250", nodata=NODATA)


class _Blend:
    """One year's image (band, y, x), mirrored beyond its edges, cut into windows; and their logits, added up."""

    def __init__(self, image: NDArray[np.uint16], window_px: int) -> None:
        self.step, self.beyond = window_px // 2, window_px // 4  # no pixel of the site is judged at a window's rim only
        sizes = image.shape[1:]
        more = [max(-(-(size + 2 * self.beyond - window_px) // self.step), 0) * self.step for size in sizes]
        pads = [(self.beyond, window_px + m - size - self.beyond) for size, m in zip(sizes, more, strict=True)]
        self.image = np.pad(image, [(0, 0), *pads], mode="reflect")
        self.inside = tuple(slice(self.beyond, self.beyond + size) for size in sizes)
        # Squared sine: with half overlap the weights of neighbouring windows add up to one.
        ramp = np.rint(np.sin(np.pi * (np.arange(window_px) + 0.5) / window_px) ** 2 * _WEIGHT_STEPS).astype(np.int64)
        self.ramp = ramp[:, None] * ramp
        self.total, self.weight = np.zeros((2, *self.image.shape[1:]), np.int64)

    def corners(self) -> list[tuple[int, int]]:
        """Upper left corners of the windows, in the mirrored image."""
        ys, xs = (range(0, size - len(self.ramp) + 1, self.step) for size in self.total.shape)
        return [(y, x) for y in ys for x in xs]

    def cut(self, corners: list[tuple[int, int]]) -> NDArray[np.uint16]:
        """The windows (n, band, y, x) at these corners."""
        side = len(self.ramp)
        return np.stack([self.image[:, y : y + side, x : x + side] for y, x in corners])

    def add(self, corners: list[tuple[int, int]], logits: NDArray[np.float32]) -> None:
        """Add the logits (n, y, x) of these windows, by weight."""
        steps = np.rint(np.clip(logits.astype(np.float64), -_LOGIT_LIMIT, _LOGIT_LIMIT) * _LOGIT_STEPS).astype(np.int64)
        side = len(self.ramp)
        for (y, x), window in zip(corners, steps, strict=True):
            self.total[y : y + side, x : x + side] += window * self.ramp
            self.weight[y : y + side, x : x + side] += self.ramp

    def probability(self) -> NDArray[np.uint8]:
        """Of the site (y, x), probability x 250; meaningless where no window was added."""
        logit = self.total[self.inside] / np.maximum(self.weight[self.inside], 1) / _LOGIT_STEPS
        scaled: NDArray[np.uint8] = np.rint(SCALE / (1 + np.exp(-logit))).astype(np.uint8)
        return scaled


def _logits(network: nn.Module, windows: NDArray[np.float32], place: torch.device) -> NDArray[np.float32]:
    with torch.inference_mode():
        found: NDArray[np.float32] = (
            logits(network, "mapping", torch.from_numpy(windows[:, None]).to(place))[:, 0, 0].float().cpu().numpy()
        )
    return found
