"""What scores are made of: integers that add up over blocks, sites and machines, and go through JSON unchanged."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from minecube.errors import ModelError

UNKNOWN = 255
LEVELS = 250
"""Stored probabilities are 0..250, of 250."""
HALF = 125
"""Stored probability from which a pixel is a mine, or has changed."""
BOUNDARY_PX = 3
VERSION = 1
"""Of the JSON form."""


@dataclass(frozen=True)
class _Counts:
    def __add__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Mapped(_Counts):
    """Pixels of one year."""

    tp: int = 0
    fp: int = 0
    fn: int = 0
    tn: int = 0
    unmapped: int = 0
    """Truth known, prediction not; in none of the others."""
    drawn: int = 0
    """Boundary pixels of the prediction, and those of them near the truth's."""
    drawn_near: int = 0
    true: int = 0
    """Boundary pixels of the truth, and those of them near the prediction's."""
    true_near: int = 0


@dataclass(frozen=True)
class Tubes(_Counts):
    """Pixel-years that are mine in truth and prediction, and in either, where truth is steady (S) and where it changes (C)."""

    s_both: int = 0
    s_either: int = 0
    c_both: int = 0
    c_either: int = 0


@dataclass(frozen=True)
class Steps(_Counts):
    """Pixels from one listed year to the next."""

    both: int = 0
    """b and c"""
    either: int = 0
    """b or c"""
    y1p1: int = 0
    """Where b = 1: y_t and p_t."""
    y1p0: int = 0
    y0p1: int = 0
    y0p0: int = 0


@dataclass(frozen=True)
class Pair(_Counts):
    """Pixels of a pair of years: truth first, prediction second."""

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
    """Truth known in both years, prediction not; in none of the others."""


@dataclass(frozen=True)
class Window(_Counts):
    """Pixels known in all listed years from one to another, both among them."""

    steady: int = 0
    """Truth is the same in all."""
    kept: int = 0
    """So is the prediction, right or wrong."""


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
    """Everything the scores are made of; `Scores()` is zero."""

    years: Mapping[int, Mapped] = field(default_factory=dict)
    pairs: Mapping[tuple[int, int], Pair] = field(default_factory=dict)
    tubes: Tubes = Tubes()
    steps: Steps = Steps()
    windows: Mapping[tuple[int, int, int], Window] = field(default_factory=dict)
    """By first and last year and the number of listed years from one to the other."""
    footprint: Mapping[int, Histogram] = field(default_factory=dict)
    """By year: probability of a mine."""
    change: Mapping[int, Histogram] = field(default_factory=dict)
    """By gap, in calendar years: of change (of expansion, where that is all the model tells)."""
    classes: tuple[str, ...] = ()
    """What a change model tells: ("changed",), ("new",) or ("removed", "new"); () for footprints, which tell all of it."""

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
        """Plain JSON: numbers, text, lists and objects; `of_json` reads it back."""
        return {
            "version": VERSION,
            "years": {str(year): _numbers(n) for year, n in self.years.items()},
            "pairs": {f"{a}-{b}": _numbers(n) for (a, b), n in self.pairs.items()},
            "tubes": _numbers(self.tubes),
            "steps": _numbers(self.steps),
            "windows": {f"{a}-{b}-{n}": _numbers(window) for (a, b, n), window in self.windows.items()},
            "footprint": {str(year): h.pixels.tolist() for year, h in self.footprint.items()},
            "change": {str(gap): h.pixels.tolist() for gap, h in self.change.items()},
            "classes": list(self.classes),
        }

    @classmethod
    def of_json(cls, content: Mapping[str, Any]) -> Scores:
        """The counts again.

        Raises:
            ModelError: it is not what this version of `to_json` writes.
        """
        try:
            if content["version"] != VERSION:
                raise ValueError(f"version {content['version']}, expected {VERSION}")
            return cls(
                {int(year): Mapped(**n) for year, n in content["years"].items()},
                {(int(key[:4]), int(key[5:])): Pair(**n) for key, n in content["pairs"].items()},
                Tubes(**content["tubes"]),
                Steps(**content["steps"]),
                {(int(key[:4]), int(key[5:9]), int(key[10:])): Window(**n) for key, n in content["windows"].items()},
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
        raise ValueError(f"a histogram of {pixels.shape} {pixels.dtype}, expected whole numbers ({LEVELS + 1}, 2)")
    return Histogram(pixels.astype(np.int64))


def _joined(one: Mapping[K, C], other: Mapping[K, C]) -> dict[K, C]:
    return {**one, **{key: one[key] + value if key in one else value for key, value in other.items()}}
