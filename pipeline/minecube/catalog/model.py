"""Description of a network, before and after training."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from minecube.catalog.fields import check_field, need, need_bands, need_name
from minecube.catalog.mission import BANDS

TASKS = {"mapping": ("mine",), "change": ("changed", "removed", "new"), "series": ("mine",)}
"""Task -> its possible classes.

Input: one year (mapping), two years (change) or all years (series).
"""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A file of trained weights."""

    href: str
    """URL, or a path relative to the YAML file."""
    sha256: str
    revision: str = ""
    mean: tuple[float, ...] = ()
    """Mean per band of the card, reflectance x 10000.

    Needed for a plain state_dict; our own files contain it.
    """
    std: tuple[float, ...] = ()
    """Standard deviation per band, likewise."""

    def __post_init__(self) -> None:
        is_sha256 = re.fullmatch("[0-9a-f]{64}", self.sha256)
        check_field(is_sha256, self, "sha256", "64 hexadecimal digits")
        means = len(self.mean)
        stds = len(self.std)
        need(means == stds, "std", f"as many numbers as mean ({means}), found {stds}")
        need(all(s > 0 for s in self.std), "std", f"numbers above 0, found {list(self.std)}")


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """A network: its architecture, input, classes and weights."""

    id: str
    title: str
    architecture: str
    """Name of the architecture in `minecube.models`."""
    task: str = "mapping"
    """A key of `TASKS`."""
    classes: tuple[str, ...] = ("mine",)
    """One logit per class: `mine`.

    For change: `changed`, `new` (expansion), or `removed` and `new` (transition).
    """
    bands: tuple[str, ...] = BANDS
    """Input channels, in order."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the architecture: encoder, width, ..."""
    window_px: int = 160
    """Side of the windows in training and mapping."""
    multiple_px: int = 32
    """Sides of windows must be multiples of this."""
    paper: str = ""
    """Citation of the architecture."""
    licence: str = "Apache-2.0"
    """Licence of the weights."""
    weights: Weights | None = None
    """Trained weights; None: still to be trained."""
    trained_on: str = ""
    """Training data of the weights: site ids, comma-separated, if known."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Published scores of the weights, by name."""

    def __post_init__(self) -> None:
        need_name(self.id)
        check_field(self.task in TASKS, self, "task", f"one of {', '.join(TASKS)}")
        classes = TASKS[self.task]
        is_subset = self.classes and set(self.classes) <= set(classes)
        need(
            is_subset and len(set(self.classes)) == len(self.classes),
            "classes",
            f"some of {', '.join(classes)} for {self.task}, each once, "
            f"found {', '.join(self.classes) or 'none'}",
        )
        need_bands(self.bands)
        band_count = len(self.bands)
        is_unique = len(set(self.bands)) == band_count
        need(is_unique, "bands", f"each band once, found {', '.join(self.bands)}")
        check_field(self.multiple_px > 0, self, "multiple_px", "pixels above 0")
        means = len(self.weights.mean) if self.weights else 0
        expected = f"a number for each of {band_count} bands, found {means}"
        need(means in (0, band_count), "mean", expected)
        fits = self.window_px > 0 and self.window_px % self.multiple_px == 0
        check_field(fits, self, "window_px", f"a multiple of {self.multiple_px}")
