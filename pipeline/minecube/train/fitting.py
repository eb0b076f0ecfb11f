"""Fitting a network to cubes: windows are cut from the cubes as they are needed, nothing is written in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor, nn

from minecube.catalog import ModelCard
from minecube.errors import ModelError
from minecube.models import Trained, build, normalise, select_bands

_LEARNING_RATE = 3e-3  # peak of the one-cycle schedule (Smith and Topin 2019, arXiv:1708.07120)
_GAIN = 0.05  # deviation of the factor by which reflectance is jittered, all bands together and each alone


_Pixels = tuple[xr.DataArray, xr.DataArray]  # reflectance (year, band, y, x) and footprint (year, y, x) of one site


@dataclass(frozen=True)
class _Window:
    """Where a window begins; it may end beyond a site that is smaller than it."""

    site: str
    year: int
    """Position in the cube, not the calendar year."""
    y: int
    x: int


def fit(
    cubes: Mapping[str, xr.Dataset],
    card: ModelCard,
    *,
    epochs: int = 30,
    batch: int = 16,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> Trained:
    """The card's network trained on all labelled pixels of these cubes.

    Same cubes, same seed, same number of threads: same network. (Threads split sums, so that last bits differ between
    machines.)

    Args:
        cubes: Site id -> cube with `reflectance` (year, band, y, x) and `footprint` (year, y, x). Windows are read from
            them again and again, so load those that fit into memory.
        card: What to train.
        epochs: An epoch is as many windows as would tile the cubes once.
        batch: Windows per step.
        seed: Of the first weights, the windows and their augmentation.
        progress: Called after each epoch with its number, from 1, and its mean loss.

    Raises:
        ModelError: no pixel is both labelled and observed, a cube lacks labels or bands, or the loss is no longer a number.
    """
    pixels = {site: _pixels(site, cube, card) for site, cube in cubes.items()}
    places, mean, std = _survey(pixels, card.window_px)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build(card)
    rng = np.random.default_rng(seed)
    steps = -(-len(places) // (4 * batch))  # places overlap by half, so a quarter of them tile the cubes
    optimiser = torch.optim.Adam(network.parameters(), lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _LEARNING_RATE, total_steps=epochs * steps)
    network.train()
    for epoch in range(1, epochs + 1):
        losses = []
        for step, windows in enumerate(_batches(places, steps, batch, rng), start=1):
            image, label = _cut(pixels, windows, card.window_px, rng)
            loss = _loss(network(torch.from_numpy(normalise(image, mean, std))), torch.from_numpy(label))
            if not torch.isfinite(loss):
                where = ", ".join(sorted({f"{w.site} {int(cubes[w.site]['year'][w.year])}" for w in windows}))
                raise ModelError(
                    f"model {card.id}: the loss became {loss.item()} in epoch {epoch}, step {step} (windows of {where}); "
                    "nothing was kept: look at the reflectance of these site-years, or try another seed"
                )
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
        if progress is not None:
            progress(epoch, float(np.mean(losses)))
    return Trained(card=card, network=network.eval(), mean=mean, std=std, sites=tuple(sorted(cubes)))


def _pixels(site: str, cube: xr.Dataset, card: ModelCard) -> _Pixels:
    if "footprint" not in cube or "reflectance" not in cube:
        raise ModelError(
            f"site {site}: expected a cube with reflectance and footprint, found {', '.join(map(str, cube)) or 'nothing'}; "
            "a model learns from labels: run `minecube label` first"
        )
    return select_bands(cube["reflectance"], card), cube["footprint"].transpose("year", "y", "x")


def _survey(pixels: Mapping[str, _Pixels], window_px: int) -> tuple[list[_Window], tuple[float, ...], tuple[float, ...]]:
    """Where windows with labels begin, half a window apart; and mean and deviation of every band, of observed pixels only."""
    places: list[_Window] = []
    count, total, squares, step = 0, np.zeros(1), np.zeros(1), window_px // 2
    for site, (reflectance, footprint) in pixels.items():
        for year in range(footprint.sizes["year"]):
            image = reflectance.isel(year=year).to_numpy()
            observed = (image > 0).all(axis=0)
            values = image[:, observed].astype(np.float64)
            count, total, squares = count + values.shape[1], total + values.sum(axis=1), squares + (values**2).sum(axis=1)
            known = observed & (footprint.isel(year=year).to_numpy() <= 1)
            ys, xs = (range(0, max(size - step, 1), step) for size in known.shape)
            places += [_Window(site, year, y, x) for y in ys for x in xs if known[y : y + window_px, x : x + window_px].any()]
    if not places:
        raise ModelError(
            f"the cubes of {', '.join(pixels) or 'no site'} have no pixel that is both labelled and observed, "
            "so there is nothing to learn from; run `minecube label` and `minecube build` for them first"
        )
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 1))  # at least one step of the stored integers: a flat band is no error
    return places, tuple(mean.tolist()), tuple(std.tolist())


def _batches(places: list[_Window], steps: int, batch: int, rng: np.random.Generator) -> Iterator[list[_Window]]:
    order = rng.permutation(len(places))
    for step in range(steps):
        yield [places[i] for i in order[step * batch : (step + 1) * batch]]


def _cut(
    pixels: Mapping[str, _Pixels], windows: list[_Window], window_px: int, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Reflectance (n, band, y, x) and labels (n, y, x), shifted, jittered, turned, flipped; 255 where not to be learnt."""
    bands = next(iter(pixels.values()))[0].sizes["band"]
    images = np.zeros((len(windows), bands, window_px, window_px), np.float32)
    labels = np.full((len(windows), window_px, window_px), 255, np.uint8)
    for image, label, window in zip(images, labels, windows, strict=True):
        reflectance, footprint = (array.isel(year=window.year) for array in pixels[window.site])
        ys, xs = (_shifted(at, size, window_px, rng) for at, size in zip((window.y, window.x), footprint.shape, strict=True))
        observed, known = reflectance[:, ys, xs].to_numpy(), footprint[ys, xs].to_numpy()
        height, width = known.shape
        gain = rng.normal(1, _GAIN) * rng.normal(1, _GAIN, (bands, 1, 1))
        image[:, :height, :width] = observed * gain  # no observation stays zero
        label[:height, :width] = np.where((observed > 0).all(axis=0), known, 255)
        turns, flip = int(rng.integers(4)), int(rng.choice((1, -1)))
        for array in (image, label):
            array[...] = np.rot90(array[..., ::flip], turns, axes=(-2, -1))
    return images, labels


def _shifted(at: int, size: int, window_px: int, rng: np.random.Generator) -> slice:
    """A window about `at`, moved by up to a quarter but within the site where it can be."""
    start = at + int(rng.integers(-window_px // 4, window_px // 4 + 1))
    start = min(max(start, 0), max(size - window_px, 0))
    return slice(start, start + window_px)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross entropy over known pixels."""
    known = labels <= 1
    each = nn.functional.binary_cross_entropy_with_logits(logits[:, 0], labels.float(), reduction="none")
    return (each * known).sum() / known.sum().clamp(min=1)
