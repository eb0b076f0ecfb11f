"""Cut windows for training and validation on demand.

Position, turn and jitter of window i in epoch e depend only on (seed, e, i). The window is the same
in any process, and after an interruption. Both classes are datasets for torch's DataLoader.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from minecube.catalog import ModelCard, Settings
from minecube.models import normalise
from minecube.train.source import UNKNOWN, Source, View, bands_at, target
from minecube.train.survey import Survey

T = TypeVar("T", bound=np.generic)

Item = tuple[NDArray[np.float32], NDArray[np.uint8]]
"""Input [time, band, y, x] and target [time, class, y, x] of a network; targets are 1, 0 or
UNKNOWN."""


@dataclass(frozen=True)
class Place:
    """Position of a window; it extends beyond a site smaller than it."""

    view: View
    y: int
    x: int


@dataclass
class Windows:
    """Training windows by (epoch, number), both from 0.

    The share `rare` of them is placed over a cell with a pixel of the classes. Each such cell of
    each view is equally likely. The others are placed likewise over a cell with a known pixel. The
    position of the cell in its window is random, within the site's borders. With `step_px`, windows
    form a grid instead. Each is used once per epoch, in random order.
    """

    source: Source
    card: ModelCard
    settings: Settings
    survey: Survey
    seed: int = 0
    size: int = field(init=False)
    _bands: list[int] = field(init=False, repr=False)
    _grids: list[tuple[list[int], list[int]]] = field(init=False, repr=False)
    _ends: dict[str, NDArray[np.int64]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.size = self.settings.window_px or self.card.window_px
        self._bands = bands_at(self.source, self.card)
        step = self.settings.step_px or self.size
        self._grids = [
            (_corners(height, self.size, step), _corners(width, self.size, step))
            for height, width in (self.source.shape_of(site) for site, _ in self.survey.views)
        ]
        counts = {
            "grid": [len(ys) * len(xs) for ys, xs in self._grids],
            "known": [cells.sum() for cells in self.survey.known],
            "rare": [cells.sum() for cells in self.survey.rare],
        }
        self._ends = {kind: np.cumsum(each) for kind, each in counts.items()}

    def __len__(self) -> int:
        """Return the number of windows per epoch."""
        return self.settings.windows or int(self._ends["grid"][-1])

    def place(self, epoch: int, number: int) -> Place:
        """Return the position of a window."""
        return self._drawn(epoch, number)[0]

    def __getitem__(self, key: tuple[int, int]) -> Item:
        place, rng = self._drawn(*key)
        image, label = cut(self.source, self._bands, place, self.size)
        varied, wanted = augmented(
            image, target(label, self.card.classes), self.settings, self.card.task, rng
        )
        return normalise(varied, self.survey.mean, self.survey.std), wanted

    def _drawn(self, epoch: int, number: int) -> tuple[Place, np.random.Generator]:
        rng = np.random.default_rng([self.seed, epoch, number])
        if self.settings.step_px:
            order = _order(self.seed, epoch, int(self._ends["grid"][-1]))
            view, rest = self._within("grid", int(order[number % len(order)]))
            ys, xs = self._grids[view]
            return Place(self.survey.views[view], ys[rest // len(xs)], xs[rest % len(xs)]), rng
        kind, bits = (
            ("rare", self.survey.rare)
            if rng.random() < self.settings.rare
            else ("known", self.survey.known)
        )
        view, rest = self._within(kind, int(rng.integers(self._ends[kind][-1])))
        cell = divmod(int(np.flatnonzero(bits[view])[rest]), bits[view].shape[1])
        site, cell_px = self.survey.views[view][0], self.survey.cell_px
        y, x = (
            int(
                rng.integers(
                    max(min((at + 1) * cell_px, n) - self.size, 0),
                    min(at * cell_px, max(n - self.size, 0)) + 1,
                )
            )
            for at, n in zip(cell, self.source.shape_of(site), strict=True)
        )
        return Place(self.survey.views[view], y, x), rng

    def _within(self, kind: str, number: int) -> tuple[int, int]:
        """Find the view of number `number` among all cells or windows of a kind, and the number
        there."""
        view = int(np.searchsorted(self._ends[kind], number, "right"))
        return view, number - (int(self._ends[kind][view - 1]) if view else 0)


@dataclass
class Tiles:
    """Windows covering the sites once in each view, by number.

    With `valid_windows`, only a sample of them.
    """

    source: Source
    card: ModelCard
    settings: Settings
    survey: Survey
    """Survey of these sites."""
    mean: tuple[float, ...]
    """Mean of the training sites; `std` likewise."""
    std: tuple[float, ...]
    size: int = field(init=False)
    places: list[Place] = field(init=False, repr=False)
    _bands: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.size = self.settings.window_px or self.card.window_px
        self._bands = bands_at(self.source, self.card)
        self.places = [
            Place(view, y, x)
            for view in self.survey.views
            for y in range(0, self.source.shape_of(view[0])[0], self.size)
            for x in range(0, self.source.shape_of(view[0])[1], self.size)
        ]
        wanted = self.settings.valid_windows
        if wanted is not None and wanted < len(self.places):  # same for all models and seeds
            chosen = np.random.default_rng(0).choice(len(self.places), wanted, replace=False)
            self.places = [self.places[i] for i in sorted(chosen)]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> Item:
        place = self.places[number]
        # The last window of a row ends at the border. Its overlap with the one before is unknown.
        y, x = (
            min(at, max(n - self.size, 0))
            for at, n in zip((place.y, place.x), self.source.shape_of(place.view[0]), strict=True)
        )
        image, label = cut(self.source, self._bands, Place(place.view, y, x), self.size)
        label[:, : place.y - y] = label[:, :, : place.x - x] = UNKNOWN
        return normalise(image, self.mean, self.std), target(label, self.card.classes)


def cut(
    source: Source, bands: list[int], place: Place, size: int
) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
    """Cut reflectance [time, band, y, x] and labels [time, y, x] of a window.

    Labels are unknown if any band is unobserved.
    """
    image, label = source.cut(*place.view, place.y, place.x, size)
    image = image[:, bands]
    return image, np.where((image > 0).all(axis=1), label, np.uint8(UNKNOWN))


def augmented(
    image: NDArray[np.uint16],
    wanted: NDArray[np.uint8],
    settings: Settings,
    task: str,
    rng: np.random.Generator,
) -> Item:
    """Jitter an image, then turn and flip image and target.

    Jitter differs between years and bands. Turns and flips are the same in all years. In a series,
    some years lose their image.
    """
    times, bands = image.shape[:2]
    gain = rng.normal(1, settings.jitter, (times, 1)) * rng.normal(
        1, settings.jitter, (times, bands)
    )
    if task == "series":
        away = rng.random(times) < settings.year_dropout
        gain[away & (np.arange(times) != rng.integers(times))] = 0  # at least one stays
    # Unobserved pixels stay zero.
    varied = image.astype(np.float32) * gain[..., None, None].astype(np.float32)
    if not settings.turns:
        return varied, wanted
    turns, flip = int(rng.integers(4)), int(rng.choice((1, -1)))

    def turned(array: NDArray[T]) -> NDArray[T]:
        return np.ascontiguousarray(np.rot90(array[..., ::flip], turns, axes=(-2, -1)))

    return turned(varied), turned(wanted)


def batches(
    length: int, settings: Settings, first: int, share: tuple[int, int]
) -> Iterator[list[tuple[int, int]]]:
    """Yield the keys of all steps from epoch `first` on, for process `share[0]` of `share[1]`."""
    for epoch in range(first, settings.epochs):
        yield from (
            [(epoch, int(i)) for i in step[share[0] :: share[1]]]
            for step in _steps(length, settings, share[1])
        )


def steps_of(length: int, settings: Settings, processes: int) -> int:
    """Return the steps of an epoch."""
    return len(_steps(length, settings, processes))


def _steps(length: int, settings: Settings, processes: int) -> list[NDArray[np.int64]]:
    """Split an epoch's windows into steps of similar size.

    Each process has at least two windows per step. Batch normalisation over a single value, as in
    pyramid pooling, has no deviation.
    """
    length = max(length, 2 * processes)
    return np.array_split(
        np.arange(length), max(min(-(-length // settings.batch), length // (2 * processes)), 1)
    )


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, length: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(length)


def _corners(length: int, size: int, step: int) -> list[int]:
    """Return the starts of windows along one side."""
    last = max(length - size, 0)
    return [*range(0, last, step), last]
