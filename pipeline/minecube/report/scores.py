"""Draw score tables: scores by year and gap, reliability, precision and recall.

Models differ in colour, mark and dash.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, product
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from minecube.errors import CubeError
from minecube.report.style import (
    BLACK,
    BLUE,
    DPI,
    FAINT,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    SKY_BLUE,
    VERMILION,
    save,
    strip_axes,
)

COLOURS = (BLUE, VERMILION, GREEN, PURPLE, SKY_BLUE, ORANGE, BLACK)
DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1)))
STYLES: list[dict[str, Any]] = [
    {"color": colour, "marker": mark, "ls": dash}
    for dash, (mark, colour) in product(DASHES, tuple(zip("osD^vPX", COLOURS, strict=True)))
]
_NOTE: dict[str, Any] = {"fontsize": 7.5, "color": FAINT, "va": "bottom"}
T = TypeVar("T")

MARKED = 30
"""Lines with more points have no marks."""


def draw_scores(
    tables: Mapping[str, pd.Series],
    out: Path,
    title: str,
    *,
    axes: tuple[str, str],
    models: Sequence[str] = (),
) -> None:
    """Write a PNG of a score, 0 to 1, over years or gaps.

    The tables map a model to its score by whole number. NaN is a gap in the line. `axes` are the
    labels of both axes, with units. `models` lists all models of a set of pictures, to give each
    the same style in all; by default those of `tables`.

    Raises:
        CubeError: There is no score to draw, or the file cannot be written.
    """
    figure, ax = _start_plot(tables, out, title, axes, width=5.6)
    for model, scores, style in _styled(tables, models):
        ax.plot(scores.index, scores, ms=4.5, lw=1.6, label=model, **style)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10, min_n_ticks=1))
    ax.set_ylim(0, 1.02)
    _finish_plot(figure, ax, out)


def draw_precision_recall(
    tables: Mapping[str, pd.DataFrame],
    out: Path,
    title: str,
    share: float,
    *,
    models: Sequence[str] = (),
) -> None:
    """Write a PNG of precision over recall for all thresholds.

    The tables map a model to columns threshold, precision and recall, thresholds descending. The
    share of true pixels is the precision of chance, drawn as a dotted line. `models` is as for
    `draw_scores`.

    Raises:
        CubeError: There is nothing to draw, or the file cannot be written.
    """
    labels = ("recall (marks: threshold one half)", "precision")
    figure, ax = _start_plot(tables, out, title, labels, width=4.6)
    for model, table, style in _styled(tables, models):
        (line,) = ax.plot(table["recall"], table["precision"], ms=4.5, lw=1.6, label=model, **style)
        line.set_drawstyle("steps-pre")
        if len(table) > MARKED:
            line.set_markevery([])  # the legend still shows the mark
        half = table[table["threshold"] >= 0.5].tail(1)
        mark = {**style, "ls": "none", "ms": 6.5, "mec": "white"}
        ax.plot(half["recall"], half["precision"], zorder=5, **mark)
    ax.axhline(share, color=FAINT, lw=1, ls=":")
    ax.text(0.01, share + 0.01, f"chance, {share:.2g}", **_NOTE)
    ax.set(xlim=(0, 1.02), ylim=(0, 1.02), aspect="equal")
    _finish_plot(figure, ax, out)


def draw_reliability(
    tables: Mapping[str, pd.DataFrame], out: Path, title: str, *, models: Sequence[str] = ()
) -> None:
    """Write a PNG of the observed share of mine pixels over the predicted probability.

    Larger marks stand for more pixels. The tables map a model to columns predicted, observed (both
    0 to 1) and pixels, one row per bin. `models` is as for `draw_scores`.

    Raises:
        CubeError: There is nothing to draw, or the file cannot be written.
    """
    labels = (
        "probability said, mean of the bin (larger marks: more pixels)",
        "share that is a mine",
    )
    figure, ax = _start_plot(tables, out, title, labels, width=4.6)
    ax.plot([0, 1], [0, 1], color=FAINT, lw=1, ls=":")
    ax.text(0.5, 0.52, "as often as said", rotation=45, ha="center", **_NOTE)
    for model, table, style in _styled(tables, models):
        predicted = table["predicted"]
        observed = table["observed"]
        ax.plot(predicted, observed, lw=1.3, markevery=[], label=model, **style)
        size = 12 + 70 * table["pixels"] / max(table["pixels"].max(), 1)
        mark = {"color": style["color"], "marker": style["marker"], "edgecolor": "white"}
        ax.scatter(predicted, observed, s=size, lw=0.6, zorder=4, **mark)
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    _finish_plot(figure, ax, out)


def _styled(
    tables: Mapping[str, T], models: Sequence[str]
) -> Iterator[tuple[str, T, dict[str, Any]]]:
    styles = dict(zip(models or tables, cycle(STYLES), strict=False))
    return ((model, table, styles[model]) for model, table in tables.items())


def _start_plot(
    tables: Mapping[str, object], out: Path, title: str, labels: tuple[str, str], *, width: float
) -> tuple[Figure, Axes]:
    """Return a figure with labelled axes, `width` inches wide, and room for a legend."""
    if not tables:
        raise CubeError(f"{out}: there is no score to draw; score a model first")
    legend_rows = -(-len(tables) // 3)
    figure = Figure(figsize=(width + 0.9, 4.0 + 0.17 * legend_rows), dpi=DPI, layout="constrained")
    ax = figure.subplots()
    strip_axes(ax)
    ax.set_title(title, fontsize=11, color=INK, fontweight="bold", loc="left")
    ax.set_xlabel(labels[0], fontsize=9, color=INK)
    ax.set_ylabel(labels[1], fontsize=9, color=INK)
    ax.set_yticks(np.linspace(0, 1, 6))
    return figure, ax


def _finish_plot(figure: Figure, ax: Axes, out: Path) -> None:
    """Add the legend and write the file."""
    handles, names = ax.get_legend_handles_labels()
    figure.legend(
        handles,
        names,
        loc="outside lower center",
        ncols=min(3, len(names)),
        fontsize=8,
        frameon=False,
        labelcolor=INK,
    )
    save(figure, out)
