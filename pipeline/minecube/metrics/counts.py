"""Integer counts for scores, additive over blocks, sites and machines, and stored as JSON."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import numpy as np

from minecube.arrays import Int64
from minecube.codes import FULL
from minecube.errors import ModelError

VERSION = 1
"""Version of the JSON form."""


@dataclass(frozen=True)
class Tally:
    """Integers or integer arrays that add up field by field."""

    def __add__(self, addend: Self) -> Self:
        sums = {name: count + getattr(addend, name) for name, count in vars(self).items()}
        return type(self)(**sums)


@dataclass(frozen=True)
class YearCounts(Tally):
    """Counts of pixels in one year."""

    tp: int = 0
    fp: int = 0
    fn: int = 0
    tn: int = 0
    unmapped: int = 0
    """Truth known, prediction unknown. Not part of the other counts."""
    drawn: int = 0
    """Boundary pixels of the prediction; `drawn_near` has those near the truth's boundary."""
    drawn_near: int = 0
    true: int = 0
    """Boundary pixels of the truth; `true_near` has those near the prediction's boundary."""
    true_near: int = 0


@dataclass(frozen=True)
class TubeCounts(Tally):
    """Counts of mine pixel-years in both truth and prediction, and in either.

    Stratum S has pixels with steady truth, C those with changing truth.
    """

    s_both: int = 0
    s_either: int = 0
    c_both: int = 0
    c_either: int = 0


@dataclass(frozen=True)
class StepCounts(Tally):
    """Counts of pixels from one listed year to the next."""

    both: int = 0
    """b and c"""
    either: int = 0
    """b or c"""
    y1p1: int = 0
    """Values of y_t and p_t for b = 1."""
    y1p0: int = 0
    y0p1: int = 0
    y0p0: int = 0


@dataclass(frozen=True)
class PairCounts(Tally):
    """Counts of pixels in a pair of years: truth first, prediction second."""

    new_new: int = 0
    new_same: int = 0
    new_gone: int = 0
    gone_new: int = 0
    gone_same: int = 0
    gone_gone: int = 0
    same_new: int = 0
    same_same: int = 0
    same_gone: int = 0
    unmapped: int = 0
    """Truth known in both years, prediction not. Not part of the other counts."""

    def changed_in_both(self) -> int:
        """Sum the pixels that change in truth and prediction, in any direction."""
        return self.new_new + self.new_gone + self.gone_new + self.gone_gone

    def changed_in_truth(self) -> int:
        """Sum the pixels that change in the truth."""
        return self.changed_in_both() + self.new_same + self.gone_same

    def changed_in_prediction(self) -> int:
        """Sum the pixels that change in the prediction."""
        return self.changed_in_both() + self.same_new + self.same_gone


@dataclass(frozen=True)
class WindowCounts(Tally):
    """Counts of pixels known in all listed years from a first to a last year, inclusive."""

    steady: int = 0
    """Truth is the same in all years."""
    kept: int = 0
    """Truth and prediction are each the same in all years; the prediction may be wrong."""


@dataclass(frozen=True, eq=False)
class Histogram:
    """Pixels by stored probability and truth: int64 (251, 2), truth 0 and 1."""

    pixels: Int64

    def __add__(self, addend: Histogram) -> Histogram:
        return Histogram(self.pixels + addend.pixels)

    def __eq__(self, histogram: object) -> bool:
        if not isinstance(histogram, Histogram):
            return False
        return np.array_equal(self.pixels, histogram.pixels)

    __hash__ = None  # type: ignore[assignment]


K = TypeVar("K", bound=Hashable)
C = TypeVar("C", Histogram, YearCounts, PairCounts, WindowCounts)


@dataclass(frozen=True)
class Counts:
    """All counts needed for scores. `Counts()` is zero."""

    years: Mapping[int, YearCounts] = field(default_factory=dict)
    pairs: Mapping[tuple[int, int], PairCounts] = field(default_factory=dict)
    tubes: TubeCounts = TubeCounts()
    steps: StepCounts = StepCounts()
    windows: Mapping[tuple[int, int, int], WindowCounts] = field(default_factory=dict)
    """Keys are first year, last year and number of listed years from one to the other."""
    footprint: Mapping[int, Histogram] = field(default_factory=dict)
    """Histogram of the mine probability, by year."""
    change: Mapping[int, Histogram] = field(default_factory=dict)
    """Histogram of change by gap in calendar years, or of expansion for an ("new",) model."""
    classes: tuple[str, ...] = ()
    """A change model's classes: ("changed",), ("new",), ("removed", "new"), or () for footprints.

    Footprints give both directions of change.
    """

    def __add__(self, addend: Counts) -> Counts:
        if self.pairs and addend.pairs and self.classes != addend.classes:
            raise ModelError(
                f"scores of the change classes {self.classes} and {addend.classes} cannot be "
                "joined: what one counts as new, the other counts as any change; score the two "
                "models apart"
            )
        return Counts(
            _join(self.years, addend.years),
            _join(self.pairs, addend.pairs),
            self.tubes + addend.tubes,
            self.steps + addend.steps,
            _join(self.windows, addend.windows),
            _join(self.footprint, addend.footprint),
            _join(self.change, addend.change),
            self.classes or addend.classes,
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON (numbers, text, lists and objects) for `of_json`."""
        return {
            "version": VERSION,
            "years": {str(year): vars(counts) for year, counts in self.years.items()},
            "pairs": {_as_key(pair): vars(counts) for pair, counts in self.pairs.items()},
            "tubes": vars(self.tubes),
            "steps": vars(self.steps),
            "windows": {_as_key(window): vars(counts) for window, counts in self.windows.items()},
            "footprint": {str(year): h.pixels.tolist() for year, h in self.footprint.items()},
            "change": {str(gap): h.pixels.tolist() for gap, h in self.change.items()},
            "classes": list(self.classes),
        }

    @classmethod
    def of_json(cls, content: Mapping[str, Any]) -> Counts:
        """Read the counts from JSON; raise ModelError for other content than that of `to_json`."""
        try:
            if content["version"] != VERSION:
                raise ValueError(f"version {content['version']}, expected {VERSION}")
            return cls(
                {int(year): YearCounts(**counts) for year, counts in content["years"].items()},
                {_pair_of(key): PairCounts(**counts) for key, counts in content["pairs"].items()},
                TubeCounts(**content["tubes"]),
                StepCounts(**content["steps"]),
                {
                    _window_of(key): WindowCounts(**counts)
                    for key, counts in content["windows"].items()
                },
                {int(year): _histogram_of(rows) for year, rows in content["footprint"].items()},
                {int(gap): _histogram_of(rows) for gap, rows in content["change"].items()},
                tuple(content["classes"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ModelError(
                f"these are not counts as `Counts.to_json` writes them ({type(error).__name__}: "
                f"{error}); count again with this version"
            ) from error


def _join(totals: Mapping[K, C], addends: Mapping[K, C]) -> dict[K, C]:
    """Add up the counts of each key."""
    sums = {key: totals[key] + addends[key] for key in totals.keys() & addends.keys()}
    return {**totals, **addends, **sums}


def _as_key(numbers: tuple[int, ...]) -> str:
    return "-".join(map(str, numbers))


def _pair_of(key: str) -> tuple[int, int]:
    start, end = map(int, key.split("-"))
    return start, end


def _window_of(key: str) -> tuple[int, int, int]:
    start, end, length = map(int, key.split("-"))
    return start, end, length


def _histogram_of(rows: Any) -> Histogram:
    pixels = np.array(rows)
    if pixels.shape != (FULL + 1, 2) or pixels.dtype.kind != "i":
        raise ValueError(
            f"a histogram of {pixels.shape} {pixels.dtype}, expected whole numbers ({FULL + 1}, 2)"
        )
    return Histogram(pixels.astype(np.int64))
