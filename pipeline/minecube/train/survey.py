"""Survey the sites in one pass before training: normalisation, labels and rare class.

A site is read in blocks of a shard's size, one year at a time, so memory does not grow with it. One
bit is kept per view and cell of up to 16 x 16 pixels. This suffices to place windows over labels
and over the rare class.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minecube.catalog import ModelCard, Settings
from minecube.errors import ModelError
from minecube.train.source import UNKNOWN, Source, View, bands_at, target, views

BLOCK_PX = 512
"""Size of the recipes' shards; a multiple of every cell."""


@dataclass(frozen=True)
class Survey:
    """Results of the survey of a source."""

    mean: tuple[float, ...]
    """Mean reflectance x 10000 per band of the card, over pixels and years with every band
    observed."""
    std: tuple[float, ...]
    """Standard deviation, like `mean`; at least 1, one step of the stored integers."""
    views: tuple[View, ...]
    cell_px: int
    known: tuple[NDArray[np.bool_], ...]
    """Per view, the cells [row, column] with a pixel of known target."""
    rare: tuple[NDArray[np.bool_], ...]
    """Per view, the cells [row, column] with a pixel of one of the classes."""
    positive: tuple[int, ...]
    """Pixels of each class, over all views."""
    pixels: int
    """Pixels of known target, over all views."""


def survey(source: Source, card: ModelCard, settings: Settings) -> Survey:
    """Survey a source's sites for a card.

    Raises:
        ModelError: A site has no pixel both labelled and observed. A class has no pixel. Bands or
            years do not fit.
    """
    chosen, cell = (
        views(source, card, settings.gaps),
        _cell_px(settings.window_px or card.window_px),
    )
    of_site: dict[str, list[int]] = {}
    for number, (site, _) in enumerate(chosen):
        of_site.setdefault(site, []).append(number)
    sums = _Sums(bands_at(source, card))
    known, rare = (
        [np.zeros([-(-n // cell) for n in source.shape_of(s)], bool) for s, _ in chosen]
        for _ in range(2)
    )
    positive, pixels = np.zeros(len(card.classes), np.int64), 0
    for site, numbers in of_site.items():
        years, (height, width) = source.years_of(site), source.shape_of(site)
        for y, x in ((y, x) for y in range(0, height, BLOCK_PX) for x in range(0, width, BLOCK_PX)):
            labels = dict(
                zip(
                    years,
                    (sums.add(*source.cut(site, [year], y, x, BLOCK_PX)) for year in years),
                    strict=True,
                )
            )
            for number in numbers:
                found = target(np.stack([labels[year] for year in chosen[number][1]]), card.classes)
                positive += (found == 1).sum(axis=(0, 2, 3))
                pixels += int((found[:, 0] != UNKNOWN).sum())
                for bits, there in ((known, found != UNKNOWN), (rare, found == 1)):
                    cells = (
                        there.any(axis=(0, 1))
                        .reshape(BLOCK_PX // cell, cell, BLOCK_PX // cell, cell)
                        .any(axis=(1, 3))
                    )
                    part = bits[number][y // cell :, x // cell :][
                        : BLOCK_PX // cell, : BLOCK_PX // cell
                    ]
                    part[...] = cells[: part.shape[0], : part.shape[1]]
    named = ", ".join(source.sites)
    empty = [
        site
        for site, numbers in of_site.items()
        if not any(known[number].any() for number in numbers)
    ]
    if empty:
        together = " in years that are seen together" if card.task == "change" else ""
        raise ModelError(
            f"the cubes of {', '.join(empty)} have no pixel that is both labelled and observed{together}, so there is nothing "
            "to learn from: run `minecube label` and `minecube build` for them first, or leave them out"
        )
    for name, count in zip(card.classes, positive, strict=True):
        if not count:
            raise ModelError(
                f"model {card.id}: expected pixels of the class {name!r}, found none in the labels of {named}, so a network "
                "would learn, and be judged, to say no everywhere; choose sites "
                f"{'with mines' if name == 'mine' else 'that change'}"
            )
    mean, std = sums.finish()
    return Survey(
        mean, std, tuple(chosen), cell, tuple(known), tuple(rare), tuple(map(int, positive)), pixels
    )


def _cell_px(window_px: int) -> int:
    """Return the largest power of two up to 16 and to a quarter of a window.

    A window then has room for one cell at any position.
    """
    return min(16, 1 << max((window_px // 4).bit_length() - 1, 0))


class _Sums:
    """Sums over observed pixels in whole numbers, exact in any order."""

    def __init__(self, bands: list[int]) -> None:
        self.bands, self.count = bands, 0
        self.total, self.squares = [0] * len(bands), [0] * len(bands)

    def add(
        self, reflectance: NDArray[np.uint16], footprint: NDArray[np.uint8]
    ) -> NDArray[np.uint8]:
        """Add a block of one year, and return its labels [y, x].

        Labels are unknown without observation.
        """
        image = reflectance[0, self.bands]
        observed = (image > 0).all(axis=0)
        # A block's sums of squares stay below 2 ** 53, so the quicker float64 is exact, too.
        values = image[:, observed].astype(np.float64)
        self.count += values.shape[1]
        for band, row in enumerate(values):
            self.total[band] += int(row.sum())
            self.squares[band] += int(row @ row)
        return np.where(observed, footprint[0], np.uint8(UNKNOWN))

    def finish(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and deviation of each band."""
        n = self.count
        pairs = list(zip(self.total, self.squares, strict=True))
        variance = [(n * squares - total**2) / n**2 for total, squares in pairs]
        return tuple(total / n for total, _ in pairs), tuple(max(v, 1.0) ** 0.5 for v in variance)
