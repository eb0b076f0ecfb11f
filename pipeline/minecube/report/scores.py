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
STYLES = [
    (colour, mark, dash)
    for dash, (mark, colour) in product(DASHES, tuple(zip("osD^vPX", COLOURS, strict=True)))
]
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

    Args:
        tables: Model -> score by whole number. NaN is a gap in the line.
        out: Path of the PNG.
        title: Title above the picture.
        axes: Labels of the two axes, with their units.
        models: All models of a set of pictures, to give each the same style in all; by default
            those of `tables`.

    Raises:
        CubeError: There is no score to draw, or the file cannot be written.
    """
    figure, ax = _start_plot(tables, out, title, axes, width=5.6)
    for (model, scores), (colour, mark, dash) in _styled(tables, models):
        ax.plot(
            scores.index, scores, color=colour, marker=mark, ls=dash, ms=4.5, lw=1.6, label=model
        )
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

    Args:
        tables: Model -> columns threshold, precision and recall, thresholds descending.
        out: Path of the PNG.
        title: Title above the picture.
        share: Share of true pixels. It is the precision of chance, drawn as a dotted line.
        models: As for `draw_scores`.

    Raises:
        CubeError: There is nothing to draw, or the file cannot be written.
    """
    labels = ("recall (marks: threshold one half)", "precision")
    figure, ax = _start_plot(tables, out, title, labels, width=4.6)
    for (model, table), (colour, mark, dash) in _styled(tables, models):
        (line,) = ax.plot(
            table["recall"],
            table["precision"],
            color=colour,
            ls=dash,
            lw=1.6,
            drawstyle="steps-pre",
            label=model,
            marker=mark,
            ms=4.5,
        )
        if len(table) > MARKED:
            line.set_markevery([])  # the legend still shows the mark
        half = table[table["threshold"] >= 0.5].tail(1)
        ax.plot(
            half["recall"],
            half["precision"],
            color=colour,
            marker=mark,
            ms=6.5,
            mec="white",
            ls="none",
            zorder=5,
        )
    ax.axhline(share, color=FAINT, lw=1, ls=":")
    ax.text(0.01, share + 0.01, f"chance, {share:.2g}", fontsize=7.5, color=FAINT, va="bottom")
    ax.set(xlim=(0, 1.02), ylim=(0, 1.02), aspect="equal")
    _finish_plot(figure, ax, out)


def draw_reliability(
    tables: Mapping[str, pd.DataFrame], out: Path, title: str, *, models: Sequence[str] = ()
) -> None:
    """Write a PNG of the observed share of mine pixels over the predicted probability.

    Larger marks stand for more pixels.

    Args:
        tables: Model -> columns predicted, observed (both 0 to 1) and pixels, one row per bin.
        out: Path of the PNG.
        title: Title above the picture.
        models: As for `draw_scores`.

    Raises:
        CubeError: There is nothing to draw, or the file cannot be written.
    """
    labels = (
        "probability said, mean of the bin (larger marks: more pixels)",
        "share that is a mine",
    )
    figure, ax = _start_plot(tables, out, title, labels, width=4.6)
    ax.plot([0, 1], [0, 1], color=FAINT, lw=1, ls=":")
    ax.text(
        0.5,
        0.52,
        "as often as said",
        fontsize=7.5,
        color=FAINT,
        rotation=45,
        ha="center",
        va="bottom",
    )
    for (model, table), (colour, mark, dash) in _styled(tables, models):
        ax.plot(
            table["predicted"],
            table["observed"],
            color=colour,
            ls=dash,
            lw=1.3,
            marker=mark,
            markevery=[],
            label=model,
        )
        size = 12 + 70 * table["pixels"] / max(table["pixels"].max(), 1)
        ax.scatter(
            table["predicted"],
            table["observed"],
            s=size,
            color=colour,
            marker=mark,
            edgecolor="white",
            lw=0.6,
            zorder=4,
        )
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    _finish_plot(figure, ax, out)


def _styled(
    tables: Mapping[str, T], models: Sequence[str]
) -> Iterator[tuple[tuple[str, T], tuple[str, str, Any]]]:
    styles = dict(zip(models or tables, cycle(STYLES), strict=False))
    return ((item, styles[item[0]]) for item in tables.items())


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
