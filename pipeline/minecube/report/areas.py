"""Draw mine area by year, with gain and loss."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from minecube.report.style import (
    BLACK,
    BLUE,
    DPI,
    GREEN,
    INK,
    VERMILION,
    save,
    strip_axes,
)

_SIZE_IN = (4.6, 3.6)
_MARGINS = {"left": 0.15, "right": 0.97, "top": 0.91, "bottom": 0.17, "hspace": 0.12}
_MIDDLE = (_MARGINS["left"] + _MARGINS["right"]) / 2
_LABEL_X = -0.13
"""Place of the names of the vertical axes, as a share of their width."""
MAPPED = BLACK
TRUTH = GREEN
GAIN = VERMILION
LOSS = BLUE


def draw_areas(
    table: pd.DataFrame, out: Path, title: str, truth: pd.DataFrame | None = None
) -> None:
    """Write a PNG of a site's mine area by year, with gain and loss as bars below the line.

    The line has a gap in years with more unknown than mine area.

    Args:
        table: Columns year, area_m2, gain_m2, loss_m2 (NaN: nothing to compare with) and,
            optionally, unknown_m2.
        truth: The same columns of the reference, drawn as a dashed line.

    Raises:
        CubeError: The file cannot be written.
    """
    unit, unit_m2 = _choose_unit([table] if truth is None else [table, truth])
    figure = Figure(figsize=_SIZE_IN, dpi=DPI)
    # Fixed margins: a constrained layout takes three times as long per picture.
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 1], gridspec_kw=_MARGINS)
    figure.suptitle(title, x=_MIDDLE, y=0.97, fontsize=11, color=INK, fontweight="bold")
    upper.set_ylabel(f"mine area, {unit}", fontsize=9)
    lower.set_ylabel(f"change, {unit}", fontsize=9)
    _draw_area(upper, table, truth, unit_m2)
    _draw_change(lower, table, unit_m2)
    for ax in (upper, lower):
        strip_axes(ax)
        ax.yaxis.set_label_coords(_LABEL_X, 0.5)
    _draw_legend(figure, (upper, lower))
    save(figure, out)


def _choose_unit(tables: Iterable[pd.DataFrame]) -> tuple[str, float]:
    """Return the unit of all areas and its size in m2."""
    if max(table["area_m2"].max() for table in tables) >= 1e6:
        return "km²", 1e6
    return "ha", 1e4


def _draw_area(ax: Axes, table: pd.DataFrame, truth: pd.DataFrame | None, unit_m2: float) -> None:
    style: dict[str, Any] = {"color": MAPPED, "marker": "o", "ms": 3.5, "lw": 1.6}
    ax.plot(table["year"], mask_unknown(table) / unit_m2, label="mapped", **style)
    if truth is not None:
        style |= {"color": TRUTH, "ls": (0, (4, 2)), "mfc": "white"}
        ax.plot(truth["year"], mask_unknown(truth) / unit_m2, label="truth", **style)
    ax.set_ylim(0, 1.15 * max(ax.dataLim.y1, 1e-3))


def mask_unknown(table: pd.DataFrame) -> pd.Series:
    """Return the area in m2, NaN in years with more unknown than mine area."""
    unknown = table.get("unknown_m2", pd.Series(0.0, index=table.index)).fillna(0)
    return table["area_m2"].where(unknown <= table["area_m2"].clip(lower=1))


def _draw_change(ax: Axes, table: pd.DataFrame, unit_m2: float) -> None:
    ax.bar(table["year"], table["gain_m2"] / unit_m2, width=0.6, color=GAIN, label="gain")
    ax.bar(table["year"], -table["loss_m2"] / unit_m2, width=0.6, color=LOSS, label="loss")
    ax.axhline(0, color=INK, lw=0.8)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if len(table) <= 6:
        ax.xaxis.set_major_locator(FixedLocator(table["year"].tolist()))


def _draw_legend(figure: Figure, axes: Iterable[Axes]) -> None:
    """Draw one legend for all axes, below them."""
    handles: list[Artist] = []
    names: list[str] = []
    for ax in axes:
        shown, labels = ax.get_legend_handles_labels()
        handles += shown
        names += labels
    figure.legend(handles, names, loc="lower center", ncols=len(names), fontsize=9, frameon=False)
