"""Networks by card: built, saved, loaded, and applied to whole sites by overlapping windows.

Windows overlap by half and their logits, not their labels, are blended by weights that fall to zero at the windows' edges.
The sums are kept in integers, which add up to the same value in any order, and on the CPU the network sees one window per
call, because the libraries beneath choose their kernels by batch size and the last bits then differ (seen: 3e-8 between
batches of one and of two). So on the CPU the result depends neither on `batch` nor on the order of the windows. Another
number of threads, or another machine, may still move the last bits of a logit.
"""

from __future__ import annotations

import copy
import io
import itertools
import os
import pickle
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor, nn

from minecube.catalog import ModelCard, as_dict
from minecube.device import device_of
from minecube.errors import ModelError

NODATA = 255
"""Probability and footprint where nothing is known."""
SCALE = 250
"""Stored probability of one; the integers above it are free for NODATA."""
_FORMAT = "minecube-model-1"
_LOGIT_STEPS = 2**20  # per unit of logit; a float32 logit near 8 has no finer steps
_LOGIT_LIMIT = 30.0  # beyond it the stored probability no longer moves, and the integer sums stay far from overflow
_WEIGHT_STEPS = 2**10  # per unit of blending weight, in y and in x


class UNet(nn.Module):
    """Ronneberger, Fischer and Brox 2015 (arXiv:1505.04597), with padded convolutions and batch normalisation.

    Takes (n, bands, y, x) float32 with sides that are multiples of 2 ** depth; gives logits (n, 1, y, x).
    """

    def __init__(self, bands: int, width: int, depth: int) -> None:
        super().__init__()
        channels = [width * 2**level for level in range(depth + 1)]
        steps = list(itertools.pairwise(channels))
        self.inlet = _two_convolutions(bands, width)
        self.down = nn.ModuleList(nn.Sequential(nn.MaxPool2d(2), _two_convolutions(a, b)) for a, b in steps)
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in reversed(steps))
        self.merge = nn.ModuleList(_two_convolutions(2 * a, a) for a, _ in reversed(steps))
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of (n, bands, y, x)."""
        skipped = [self.inlet(x)]
        for down in self.down:
            skipped.append(down(skipped[-1]))
        x = skipped.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([skipped.pop(), up(x)], dim=1))
        logits: Tensor = self.head(x)
        return logits


def _two_convolutions(inputs: int, outputs: int) -> nn.Sequential:
    # Batch normalisation, not group: what is bright ground is a matter of absolute reflectance, not of the window.
    layers: list[nn.Module] = []
    for a, b in ((inputs, outputs), (outputs, outputs)):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A network and all that is needed to apply it."""

    card: ModelCard
    network: nn.Module
    """In evaluation mode, on the CPU."""
    mean: tuple[float, ...]
    """Per band of the card, reflectance x 10000, of the training sites."""
    std: tuple[float, ...]
    """Likewise; never zero."""
    sites: tuple[str, ...]
    """What it was trained on: scores there are not scores on unseen ground."""


def build(card: ModelCard) -> nn.Module:
    """The card's network with fresh weights, from torch's global random state."""
    network = UNet(len(card.bands), card.width, card.depth)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]  # a third faster on CPUs


def save(trained: Trained, path: Path) -> None:
    """Write the model to one file, whole or not at all.

    Raises:
        ModelError: the file cannot be written (folder missing or read-only, disk full).
    """
    content = {
        "format": _FORMAT,
        "card": as_dict(trained.card),
        "mean": list(trained.mean),
        "std": list(trained.std),
        "sites": list(trained.sites),
        "weights": trained.network.state_dict(),
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    # Beside the target, so that the rename stays within one file system; a reader never meets half a file.
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_bytes(buffer.getbuffer())
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise ModelError(f"{path}: the model could not be written ({error}); nothing was left there") from error


def load(path: Path) -> Trained:
    """The model of a file that `save` wrote.

    Raises:
        ModelError: the file cannot be read, is not one of ours, or its weights are another architecture's.
    """
    try:
        file = io.BytesIO(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: the model cannot be read ({error})") from error
    foreign = f"{path}: is not a model that minecube wrote, or is damaged; train one with `minecube train`"
    if not zipfile.is_zipfile(file):  # what torch.load would raise on any other file is a long list
        raise ModelError(foreign)
    file.seek(0)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise ModelError(foreign) from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ModelError(
            f"{path}: is not a model of this version of minecube (expected {_FORMAT}); train one with `minecube train`"
        )
    card = _card(content["card"], path)
    network = build(card)
    try:
        network.load_state_dict(content["weights"])
    except RuntimeError as error:
        raise ModelError(
            f"{path}: the weights are not those of its card ({card.architecture}, {len(card.bands)} bands, width {card.width}, "
            f"depth {card.depth}), so it cannot be applied; train it again"
        ) from error
    mean, std, sites = (tuple(content[key]) for key in ("mean", "std", "sites"))
    return Trained(card=card, network=network.eval(), mean=mean, std=std, sites=sites)


def _card(fields: dict[str, Any], path: Path) -> ModelCard:
    try:
        return ModelCard(**{**fields, "bands": tuple(fields["bands"])})
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"{path}: is a model that this version of minecube does not know ({error}); update minecube"
        ) from error


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


def normalise(
    windows: NDArray[np.uint16] | NDArray[np.float32], mean: Sequence[float], std: Sequence[float]
) -> NDArray[np.float32]:
    """Reflectance (n, band, y, x) as the network takes it: zero mean, unit deviation, zero where there is no observation."""
    shape = (-1, 1, 1)
    centred = windows - np.asarray(mean, np.float32).reshape(shape)
    return np.where(windows > 0, centred / np.asarray(std, np.float32).reshape(shape), np.float32(0))


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
        found: NDArray[np.float32] = network(torch.from_numpy(windows).to(place))[:, 0].float().cpu().numpy()
    return found


def select_bands(reflectance: xr.DataArray, card: ModelCard) -> xr.DataArray:
    """The card's bands of a cube's reflectance, ([year,] band, y, x), still lazy.

    Raises:
        ModelError: bands are missing or in another order than the card's, or pixels are not uint16.
    """
    order = [d for d in ("year", "band", "y", "x") if d != "year" or d in reflectance.dims]
    if set(reflectance.dims) != set(order) or reflectance.dtype != np.uint16:
        raise ModelError(
            f"model {card.id}: expected reflectance (year, band, y, x) as uint16, found {reflectance.dims} as "
            f"{reflectance.dtype}; hand in the cube's `reflectance` as it was opened, integers undecoded"
        )
    found = [str(b) for b in reflectance["band"].to_numpy()] if "band" in reflectance.coords else []
    if [b for b in found if b in card.bands] != list(card.bands):
        raise ModelError(
            f"model {card.id}: expected the bands {', '.join(card.bands)} in this order, found "
            f"{', '.join(found) or 'no names'}; it would take one band for another: build the cube with these bands"
        )
    return reflectance.transpose(*order).isel(band=[found.index(b) for b in card.bands])
