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
from minecube.report import DPI, INK, _plain, _save

COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#e69f00",
    "#222222",
)  # Okabe and Ito's palette
DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1)))
STYLES = [
    (colour, mark, dash)
    for dash, (mark, colour) in product(DASHES, tuple(zip("osD^vPX", COLOURS, strict=True)))
]
T = TypeVar("T")

MARKED = 30
"""Lines with more points have no marks."""


def lines(
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
    fig, ax = _square(title, axes, wide=5.6, found=tables, out=out)
    for (model, scores), (colour, mark, dash) in _styled(tables, models):
        ax.plot(
            scores.index, scores, color=colour, marker=mark, ls=dash, ms=4.5, lw=1.6, label=model
        )
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10, min_n_ticks=1))
    ax.set_ylim(0, 1.02)
    _finished(fig, ax, out)


def precision_recall(
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
        models: As for `lines`.

    Raises:
        CubeError: There is nothing to draw, or the file cannot be written.
    """
    fig, ax = _square(
        title, ("recall (marks: threshold one half)", "precision"), wide=4.6, found=tables, out=out
    )
    for (model, table), (colour, mark, dash) in _styled(tables, models):
        shown: dict[str, Any] = {
            "marker": mark,
            "ms": 4.5,
            "markevery": None if len(table) <= MARKED else [],
        }
        ax.plot(
            table["recall"],
            table["precision"],
            color=colour,
            ls=dash,
            lw=1.6,
            drawstyle="steps-pre",
            label=model,
            **shown,
        )
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
    ax.axhline(share, color="#777777", lw=1, ls=":")
    ax.text(0.01, share + 0.01, f"chance, {share:.2g}", fontsize=7.5, color="#777777", va="bottom")
    ax.set(xlim=(0, 1.02), ylim=(0, 1.02), aspect="equal")
    _finished(fig, ax, out)


def reliability(
    tables: Mapping[str, pd.DataFrame], out: Path, title: str, *, models: Sequence[str] = ()
) -> None:
    """Write a PNG of the observed share of mine pixels over the predicted probability.

    Larger marks stand for more pixels.

    Args:
        tables: Model -> columns predicted, observed (both 0 to 1) and pixels, one row per bin.
        out: Path of the PNG.
        title: Title above the picture.
        models: As for `lines`.

    Raises:
        CubeError: There is nothing to draw, or the file cannot be written.
    """
    labels = (
        "probability said, mean of the bin (larger marks: more pixels)",
        "share that is a mine",
    )
    fig, ax = _square(title, labels, wide=4.6, found=tables, out=out)
    ax.plot([0, 1], [0, 1], color="#777777", lw=1, ls=":")
    ax.text(
        0.5,
        0.52,
        "as often as said",
        fontsize=7.5,
        color="#777777",
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
        at = table["predicted"], table["observed"]
        ax.scatter(*at, s=size, color=colour, marker=mark, edgecolor="white", lw=0.6, zorder=4)
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    _finished(fig, ax, out)


def _styled(
    tables: Mapping[str, T], models: Sequence[str]
) -> Iterator[tuple[tuple[str, T], tuple[str, str, Any]]]:
    styles = dict(zip(models or tables, cycle(STYLES), strict=False))
    return ((item, styles[item[0]]) for item in tables.items())


def _square(
    title: str, labels: tuple[str, str], *, wide: float, found: Mapping[str, object], out: Path
) -> tuple[Figure, Axes]:
    if not found:
        raise CubeError(f"{out}: there is no score to draw; score a model first")
    fig = Figure(
        figsize=(wide + 0.9, 4.0 + 0.17 * -(-len(found) // 3)), dpi=DPI, layout="constrained"
    )
    ax = fig.subplots()
    _plain(ax)
    ax.set_title(title, fontsize=11, color=INK, fontweight="bold", loc="left")
    ax.set_xlabel(labels[0], fontsize=9, color=INK)
    ax.set_ylabel(labels[1], fontsize=9, color=INK)
    ax.set_yticks(np.linspace(0, 1, 6))
    return fig, ax


def _finished(fig: Figure, ax: Axes, out: Path) -> None:
    handles, names = ax.get_legend_handles_labels()
    fig.legend(
        handles,
        names,
        loc="outside lower center",
        ncols=min(3, len(names)),
        fontsize=8,
        frameon=False,
        labelcolor=INK,
    )
    _save(fig, out)
