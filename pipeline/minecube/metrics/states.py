"""Integer counts for scores, additive over blocks, sites and machines, and stored as JSON."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from minecube.errors import ModelError

UNKNOWN = 255
LEVELS = 250
"""Highest stored probability. Stored values are 0..250."""
HALF = 125
"""Lowest stored probability of a mine pixel, or of a changed pixel."""
BOUNDARY_PX = 3
VERSION = 1
"""Version of the JSON form."""


@dataclass(frozen=True)
class _Counts:
    def __add__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Mapped(_Counts):
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
class Tubes(_Counts):
    """Counts of mine pixel-years in both truth and prediction, and in either.

    Stratum S has pixels with steady truth, C those with changing truth.
    """

    s_both: int = 0
    s_either: int = 0
    c_both: int = 0
    c_either: int = 0


@dataclass(frozen=True)
class Steps(_Counts):
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
class Pair(_Counts):
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


@dataclass(frozen=True)
class Window(_Counts):
    """Counts of pixels known in all listed years from a first to a last year, inclusive."""

    steady: int = 0
    """Truth is the same in all years."""
    kept: int = 0
    """Truth and prediction are each the same in all years; the prediction may be wrong."""


@dataclass(frozen=True, eq=False)
class Histogram:
    """Pixels by stored probability and truth: int64 (251, 2), truth 0 and 1."""

    pixels: NDArray[np.int64]

    def __add__(self, other: Histogram) -> Histogram:
        return Histogram(self.pixels + other.pixels)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Histogram) and np.array_equal(self.pixels, other.pixels)

    __hash__ = None  # type: ignore[assignment]


K = TypeVar("K", bound=Hashable)
C = TypeVar("C", _Counts, Histogram, Mapped, Pair, Window)


@dataclass(frozen=True)
class Scores:
    """All counts needed for scores. `Scores()` is zero."""

    years: Mapping[int, Mapped] = field(default_factory=dict)
    pairs: Mapping[tuple[int, int], Pair] = field(default_factory=dict)
    tubes: Tubes = Tubes()
    steps: Steps = Steps()
    windows: Mapping[tuple[int, int, int], Window] = field(default_factory=dict)
    """Keys are first year, last year and number of listed years from one to the other."""
    footprint: Mapping[int, Histogram] = field(default_factory=dict)
    """Histogram of the mine probability, by year."""
    change: Mapping[int, Histogram] = field(default_factory=dict)
    """Histogram of change by gap in calendar years, or of expansion for an ("new",) model."""
    classes: tuple[str, ...] = ()
    """A change model's classes: ("changed",), ("new",), ("removed", "new"), or () for footprints.

    Footprints give both directions of change.
    """

    def __add__(self, other: Scores) -> Scores:
        if self.pairs and other.pairs and self.classes != other.classes:
            raise ModelError(
                f"scores of the change classes {self.classes} and {other.classes} cannot be joined: what one counts as new, "
                "the other counts as any change; score the two models apart"
            )
        return Scores(
            _joined(self.years, other.years),
            _joined(self.pairs, other.pairs),
            self.tubes + other.tubes,
            self.steps + other.steps,
            _joined(self.windows, other.windows),
            _joined(self.footprint, other.footprint),
            _joined(self.change, other.change),
            self.classes or other.classes,
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON (numbers, text, lists and objects) for `of_json`."""
        return {
            "version": VERSION,
            "years": {str(year): _numbers(n) for year, n in self.years.items()},
            "pairs": {f"{a}-{b}": _numbers(n) for (a, b), n in self.pairs.items()},
            "tubes": _numbers(self.tubes),
            "steps": _numbers(self.steps),
            "windows": {
                f"{a}-{b}-{n}": _numbers(window) for (a, b, n), window in self.windows.items()
            },
            "footprint": {str(year): h.pixels.tolist() for year, h in self.footprint.items()},
            "change": {str(gap): h.pixels.tolist() for gap, h in self.change.items()},
            "classes": list(self.classes),
        }

    @classmethod
    def of_json(cls, content: Mapping[str, Any]) -> Scores:
        """Read the counts from JSON.

        Raises:
            ModelError: the content differs from the output of this version's `to_json`.
        """
        try:
            if content["version"] != VERSION:
                raise ValueError(f"version {content['version']}, expected {VERSION}")
            return cls(
                {int(year): Mapped(**n) for year, n in content["years"].items()},
                {(int(key[:4]), int(key[5:])): Pair(**n) for key, n in content["pairs"].items()},
                Tubes(**content["tubes"]),
                Steps(**content["steps"]),
                {
                    (int(key[:4]), int(key[5:9]), int(key[10:])): Window(**n)
                    for key, n in content["windows"].items()
                },
                {int(year): _histogram(rows) for year, rows in content["footprint"].items()},
                {int(gap): _histogram(rows) for gap, rows in content["change"].items()},
                tuple(content["classes"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ModelError(
                f"these are not counts as `Scores.to_json` writes them ({type(error).__name__}: {error}); count again with "
                "this version"
            ) from error


def _numbers(counts: _Counts) -> dict[str, int]:
    return {f.name: getattr(counts, f.name) for f in fields(counts)}


def _histogram(rows: Any) -> Histogram:
    pixels = np.array(rows)
    if pixels.shape != (LEVELS + 1, 2) or pixels.dtype.kind != "i":
        raise ValueError(
            f"a histogram of {pixels.shape} {pixels.dtype}, expected whole numbers ({LEVELS + 1}, 2)"
        )
    return Histogram(pixels.astype(np.int64))


def _joined(one: Mapping[K, C], other: Mapping[K, C]) -> dict[K, C]:
    return {
        **one,
        **{key: one[key] + value if key in one else value for key, value in other.items()},
    }
