"""Cut windows for training and validation on demand.

Position, turn and jitter of window i in epoch e depend only on (seed, e, i). The window is the same
in any process, and after an interruption. Both classes are datasets for torch's DataLoader.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from minecube.arrays import Float32, Int64, UInt8, UInt16
from minecube.catalog import ModelCard, TrainingSettings
from minecube.codes import UNKNOWN
from minecube.models import normalise
from minecube.train.source import SiteView, WindowSource, bands_at, compute_targets
from minecube.train.statistics import SourceSurvey

T = TypeVar("T", bound=np.generic)

Item = tuple[Float32, UInt8]
"""Input [time, band, y, x] and target [time, class, y, x] of a network; targets are 1, 0 or
UNKNOWN."""


@dataclass(frozen=True)
class Position:
    """Position of a window; it extends beyond a site smaller than it."""

    view: SiteView
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

    source: WindowSource
    card: ModelCard
    settings: TrainingSettings
    survey: SourceSurvey
    seed: int = 0
    size: int = field(init=False)
    _bands: list[int] = field(init=False, repr=False)
    _grids: list[tuple[list[int], list[int]]] = field(init=False, repr=False)
    _ends: dict[str, Int64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.size = self.settings.window_px or self.card.window_px
        self._bands = bands_at(self.source, self.card)
        step = self.settings.step_px or self.size
        self._grids = [
            (_grid_starts(height, self.size, step), _grid_starts(width, self.size, step))
            for height, width in (self.source.shape_of(site) for site, _ in self.survey.views)
        ]
        counts: dict[str, list[int]] = {
            "grid": [len(ys) * len(xs) for ys, xs in self._grids],
            "known": [int(cells.sum()) for cells in self.survey.known],
            "rare": [int(cells.sum()) for cells in self.survey.rare],
        }
        self._ends = {kind: np.cumsum(each) for kind, each in counts.items()}

    def __len__(self) -> int:
        """Return the number of windows per epoch."""
        return self.settings.windows or int(self._ends["grid"][-1])

    def position(self, epoch: int, number: int) -> Position:
        """Return the position of a window."""
        return self._draw(epoch, number)[0]

    def __getitem__(self, key: tuple[int, int]) -> Item:
        position, rng = self._draw(*key)
        image, label = cut(self.source, self._bands, position, self.size)
        targets = compute_targets(label, self.card.classes)
        varied, targets = augment(image, targets, self.settings, self.card.task, rng)
        return normalise(varied, self.survey.mean, self.survey.std), targets

    def _draw(self, epoch: int, number: int) -> tuple[Position, np.random.Generator]:
        rng = np.random.default_rng([self.seed, epoch, number])
        if self.settings.step_px:
            return self._position_in_grid(epoch, number), rng
        if rng.random() < self.settings.rare:
            return self._position_over_cell("rare", self.survey.rare, rng), rng
        return self._position_over_cell("known", self.survey.known, rng), rng

    def _position_in_grid(self, epoch: int, number: int) -> Position:
        order = _shuffle(self.seed, epoch, int(self._ends["grid"][-1]))
        view, index = self._locate("grid", int(order[number % len(order)]))
        ys, xs = self._grids[view]
        return Position(self.survey.views[view], ys[index // len(xs)], xs[index % len(xs)])

    def _position_over_cell(
        self, kind: str, cells: Sequence[NDArray[np.bool_]], rng: np.random.Generator
    ) -> Position:
        number, index = self._locate(kind, int(rng.integers(self._ends[kind][-1])))
        view = self.survey.views[number]
        cell = int(np.flatnonzero(cells[number])[index])
        row, column = divmod(cell, cells[number].shape[1])
        height, width = self.source.shape_of(view[0])
        y = self._draw_start(row, height, rng)
        x = self._draw_start(column, width, rng)
        return Position(view, y, x)

    def _draw_start(self, cell: int, length: int, rng: np.random.Generator) -> int:
        """Draw the start of a window along one side of a site, so that it holds the cell."""
        cell_px = self.survey.cell_px
        least = max(min((cell + 1) * cell_px, length) - self.size, 0)
        greatest = min(cell * cell_px, max(length - self.size, 0))
        return int(rng.integers(least, greatest + 1))

    def _locate(self, kind: str, number: int) -> tuple[int, int]:
        """Find the view of number `number` among all cells or windows of a kind.

        Returns the view, and the number in it.
        """
        ends = self._ends[kind]
        view = int(np.searchsorted(ends, number, "right"))
        if view == 0:
            return view, number
        return view, number - int(ends[view - 1])


@dataclass
class Tiles:
    """Windows covering the sites once in each view, by number.

    With `valid_windows`, only a sample of them.
    """

    source: WindowSource
    card: ModelCard
    settings: TrainingSettings
    survey: SourceSurvey
    """Survey of these sites."""
    mean: tuple[float, ...]
    """Mean of the training sites; `std` likewise."""
    std: tuple[float, ...]
    size: int = field(init=False)
    positions: list[Position] = field(init=False, repr=False)
    _bands: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.size = self.settings.window_px or self.card.window_px
        self._bands = bands_at(self.source, self.card)
        self.positions = []
        for view in self.survey.views:
            height, width = self.source.shape_of(view[0])
            corners = product(range(0, height, self.size), range(0, width, self.size))
            self.positions += [Position(view, y, x) for y, x in corners]
        sample = self.settings.valid_windows
        if sample is not None and sample < len(self.positions):  # same for all models and seeds
            numbers = np.random.default_rng(0).choice(len(self.positions), sample, replace=False)
            self.positions = [self.positions[number] for number in sorted(numbers)]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, number: int) -> Item:
        position = self.positions[number]
        height, width = self.source.shape_of(position.view[0])
        # The last window of a row ends at the border. Its overlap with the one before is unknown.
        y = min(position.y, max(height - self.size, 0))
        x = min(position.x, max(width - self.size, 0))
        image, label = cut(self.source, self._bands, Position(position.view, y, x), self.size)
        label[:, : position.y - y] = UNKNOWN
        label[:, :, : position.x - x] = UNKNOWN
        return normalise(image, self.mean, self.std), compute_targets(label, self.card.classes)


def cut(
    source: WindowSource, bands: list[int], position: Position, size: int
) -> tuple[UInt16, UInt8]:
    """Cut reflectance [time, band, y, x] and labels [time, y, x] of a window.

    Labels are unknown if any band is unobserved.
    """
    image, label = source.cut(*position.view, position.y, position.x, size)
    image = image[:, bands]
    return image, np.where((image > 0).all(axis=1), label, np.uint8(UNKNOWN))


def augment(
    image: UInt16, targets: UInt8, settings: TrainingSettings, task: str, rng: np.random.Generator
) -> Item:
    """Jitter an image, then turn and flip image and target.

    Jitter differs between years and bands. Turns and flips are the same in all years. In a series,
    some years lose their image.
    """
    dates, bands = image.shape[:2]
    gain = rng.normal(1, settings.jitter, (dates, 1))
    gain = gain * rng.normal(1, settings.jitter, (dates, bands))
    if task == "series":
        dropped = rng.random(dates) < settings.year_dropout
        gain[dropped & (np.arange(dates) != rng.integers(dates))] = 0  # at least one stays
    # Unobserved pixels stay zero.
    varied = image.astype(np.float32) * gain[..., None, None].astype(np.float32)
    if not settings.turns:
        return varied, targets
    turns = int(rng.integers(4))
    flip = int(rng.choice((1, -1)))
    return _turn(varied, turns, flip), _turn(targets, turns, flip)


def _turn(array: NDArray[T], turns: int, flip: int) -> NDArray[T]:
    """Flip an array [..., y, x] if `flip` is -1, then turn it by 90 degrees `turns` times."""
    return np.ascontiguousarray(np.rot90(array[..., ::flip], turns, axes=(-2, -1)))


def batches(
    length: int, settings: TrainingSettings, first_epoch: int, share: tuple[int, int]
) -> Iterator[list[tuple[int, int]]]:
    """Yield the keys of all steps from an epoch on, for process `share[0]` of `share[1]`."""
    rank, processes = share
    for epoch in range(first_epoch, settings.epochs):
        for numbers in _split_steps(length, settings, processes):
            yield [(epoch, int(number)) for number in numbers[rank::processes]]


def count_steps(length: int, settings: TrainingSettings, processes: int) -> int:
    """Return the steps of an epoch."""
    return len(_split_steps(length, settings, processes))


def _split_steps(length: int, settings: TrainingSettings, processes: int) -> list[Int64]:
    """Split an epoch's windows into steps of similar size.

    Each process has at least two windows per step. Batch normalisation over a single value, as in
    pyramid pooling, has no deviation.
    """
    length = max(length, 2 * processes)
    steps = min(-(-length // settings.batch), length // (2 * processes))
    return np.array_split(np.arange(length), max(steps, 1))


@lru_cache(maxsize=2)
def _shuffle(seed: int, epoch: int, length: int) -> Int64:
    return np.random.default_rng([seed, epoch]).permutation(length)


def _grid_starts(length: int, size: int, step: int) -> list[int]:
    """Return the starts of windows along one side."""
    last = max(length - size, 0)
    return [*range(0, last, step), last]
