"""Survey the sites in one pass before training: normalisation, labels and rare class.

A site is read in blocks of a shard's size, one year at a time, so memory does not grow with it. One
bit is kept per view and cell of up to 16 x 16 pixels. This suffices to place windows over labels
and over the rare class.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from minecube.arrays import Bool, Int64, UInt8, UInt16
from minecube.catalog import ModelCard, TrainingSettings
from minecube.codes import UNKNOWN
from minecube.errors import ModelError
from minecube.train.source import SiteView, WindowSource, bands_at, compute_targets, list_views

BLOCK_PX = 512
"""Size of the recipes' shards; a multiple of every cell."""


@dataclass(frozen=True)
class SourceSurvey:
    """Results of the survey of a source."""

    mean: tuple[float, ...]
    """Mean reflectance x 10000 per band of the card, over pixels and years with every band
    observed."""
    std: tuple[float, ...]
    """Standard deviation, like `mean`; at least 1, one step of the stored integers."""
    views: tuple[SiteView, ...]
    cell_px: int
    known: tuple[Bool, ...]
    """Per view, the cells [row, column] with a pixel of known target."""
    rare: tuple[Bool, ...]
    """Per view, the cells [row, column] with a pixel of one of the classes."""
    positive: tuple[int, ...]
    """Pixels of each class, over all views."""
    pixels: int
    """Pixels of known target, over all views."""


def survey_source(
    source: WindowSource, card: ModelCard, settings: TrainingSettings
) -> SourceSurvey:
    """Survey a source's sites for a card.

    Raises:
        ModelError: A site has no pixel both labelled and observed. A class has no pixel. Bands or
            years do not fit.
    """
    site_views = list_views(source, card, settings.gaps)
    cell = _cell_px(settings.window_px or card.window_px)
    bands = _BandSums(bands_at(source, card))
    targets = {
        view: _TargetCounts(card.classes, source.shape_of(view[0]), cell) for view in site_views
    }
    for site in source.sites:
        for y, x in _blocks(source.shape_of(site)):
            labels = {
                year: bands.add(*source.cut(site, [year], y, x, BLOCK_PX))
                for year in source.years_of(site)
            }
            for view, counts in targets.items():
                if view[0] == site:
                    counts.add([labels[year] for year in view[1]], y, x)
    _check_sites(card, targets)
    positive = np.sum([counts.positive for counts in targets.values()], axis=0)
    _check_classes(card, source, positive)
    mean, std = bands.finish()
    return SourceSurvey(
        mean=mean,
        std=std,
        views=tuple(site_views),
        cell_px=cell,
        known=tuple(counts.known for counts in targets.values()),
        rare=tuple(counts.rare for counts in targets.values()),
        positive=tuple(map(int, positive)),
        pixels=sum(counts.pixels for counts in targets.values()),
    )


def _check_sites(card: ModelCard, targets: Mapping[SiteView, _TargetCounts]) -> None:
    """Raise ModelError for sites without a known target."""
    labelled = {site for (site, _), counts in targets.items() if counts.pixels}
    empty = list(dict.fromkeys(site for site, _ in targets if site not in labelled))
    if empty:
        condition = " in years that are seen together" if card.task == "change" else ""
        raise ModelError(
            f"the cubes of {', '.join(empty)} have no pixel that is both labelled and "
            f"observed{condition}, so there is nothing to learn from: run `minecube label` and "
            "`minecube build` for them first, or leave them out"
        )


def _check_classes(card: ModelCard, source: WindowSource, positive: Int64) -> None:
    """Raise ModelError for a class without pixels."""
    for name, count in zip(card.classes, positive, strict=True):
        if not count:
            kind = "with mines" if name == "mine" else "that change"
            raise ModelError(
                f"model {card.id}: expected pixels of the class {name!r}, found none in the labels "
                f"of {', '.join(source.sites)}, so a network would learn, and be judged, to say no "
                f"everywhere; choose sites {kind}"
            )


def _cell_px(window_px: int) -> int:
    """Return the largest power of two up to 16 and to a quarter of a window.

    A window then has room for one cell at any position.
    """
    return min(16, 1 << max((window_px // 4).bit_length() - 1, 0))


def _blocks(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Return the first row and column of each block."""
    height, width = shape
    return product(range(0, height, BLOCK_PX), range(0, width, BLOCK_PX))


class _TargetCounts:
    """Pixels of a view's targets, and its cells with such pixels."""

    def __init__(self, classes: Sequence[str], shape: tuple[int, int], cell_px: int) -> None:
        cells = [-(-n // cell_px) for n in shape]
        self.known: Bool = np.zeros(cells, np.bool_)
        self.rare: Bool = np.zeros(cells, np.bool_)
        self.positive = np.zeros(len(classes), np.int64)
        self.pixels = 0
        self._classes = classes
        self._cell_px = cell_px

    def add(self, labels: list[UInt8], y: int, x: int) -> None:
        """Add the block at this row and column; `labels` are [y, x] per year of the view."""
        targets = compute_targets(np.stack(labels), self._classes)
        known = targets != UNKNOWN
        positive = targets == 1
        self.positive += positive.sum(axis=(0, 2, 3))
        self.pixels += int(known[:, 0].sum())
        self._mark(self.known, known, y, x)
        self._mark(self.rare, positive, y, x)

    def _mark(self, cells: Bool, pixels: Bool, y: int, x: int) -> None:
        """Mark the cells with any of these pixels [time, class, y, x] of a block."""
        size = self._cell_px
        count = BLOCK_PX // size
        marked = np.logical_or.reduce(pixels, axis=(0, 1)).reshape(count, size, count, size)
        block = np.logical_or.reduce(marked, axis=(1, 3))
        part = cells[y // size :, x // size :][:count, :count]
        part[...] = block[: part.shape[0], : part.shape[1]]


class _BandSums:
    """Sums over observed pixels in whole numbers, exact in any order."""

    def __init__(self, bands: list[int]) -> None:
        self._bands = bands
        self._count = 0
        self._total = [0] * len(bands)
        self._squares = [0] * len(bands)

    def add(self, reflectance: UInt16, footprint: UInt8) -> UInt8:
        """Add a block [1, band, y, x] and [1, y, x] of one year, and return its labels.

        Labels [y, x] are the footprint, or 255 where a band has no observation.
        """
        image = reflectance[0, self._bands]
        observed = (image > 0).all(axis=0)
        # A block's sums of squares stay below 2 ** 53, so the quicker float64 is exact, too.
        values = image[:, observed].astype(np.float64)
        self._count += values.shape[1]
        for band, row in enumerate(values):
            self._total[band] += int(row.sum())
            self._squares[band] += int(row @ row)
        return np.where(observed, footprint[0], np.uint8(UNKNOWN))

    def finish(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and deviation of each band."""
        n = self._count
        mean = tuple(total / n for total in self._total)
        variances = [
            (n * squares - total**2) / n**2
            for total, squares in zip(self._total, self._squares, strict=True)
        ]
        return mean, tuple(max(variance, 1.0) ** 0.5 for variance in variances)
