"""Draw mine area by year, with gain and loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FixedLocator, MaxNLocator

from minecube.errors import CubeError
from minecube.report.style import (
    BLACK,
    BLUE,
    DPI,
    GREEN,
    INK,
    PANEL_IN,
    VERMILION,
    save,
    strip_axes,
)

MAPPED = BLACK
TRUTH = GREEN
GAIN = VERMILION
LOSS = BLUE


def draw_areas(
    areas: Mapping[str, pd.DataFrame], out: Path, truth: Mapping[str, pd.DataFrame] | None = None
) -> None:
    """Write a PNG of mine area by year per site, with gain and loss as bars below the line.

    The line has a gap in years with more unknown than mine area.

    Args:
        areas: Site -> columns year, area_m2, gain_m2, loss_m2 (NaN: nothing to compare with) and,
            optionally, unknown_m2.
        truth: Site -> the same columns of the reference, drawn as a dashed line.

    Raises:
        CubeError: There is no site to plot, or the file cannot be written.
    """
    if not areas:
        raise CubeError(f"{out}: there is no area to plot; score or predict a site first")
    truth = truth or {}
    unit, unit_m2 = _choose_unit([*areas.values(), *truth.values()])
    rows = -(-len(areas) // 4)
    columns = -(-len(areas) // rows)
    figure = Figure(
        figsize=(PANEL_IN * max(columns, 2), 3.0 * rows + 0.3), dpi=DPI, layout="constrained"
    )
    panels = figure.subfigures(rows, columns, squeeze=False).ravel()
    for panel, (site, table) in zip(panels, areas.items(), strict=False):
        upper, lower = panel.subplots(2, 1, sharex=True, height_ratios=[2.2, 1])
        upper.set_title(site, fontsize=10, color=INK, fontweight="bold")
        upper.set_ylabel(f"mine area, {unit}", fontsize=8)
        lower.set_ylabel(f"change, {unit}", fontsize=8)
        _draw_area(upper, table, truth.get(site), unit_m2)
        _draw_change(lower, table, unit_m2)
        strip_axes(upper)
        strip_axes(lower)
    _draw_legend(figure, panels)
    save(figure, out)


def _choose_unit(tables: Iterable[pd.DataFrame]) -> tuple[str, float]:
    """Return the unit of all areas and its size in m2."""
    if max(table["area_m2"].max() for table in tables) >= 1e6:
        return "km²", 1e6
    return "ha", 1e4


def _draw_area(ax: Axes, table: pd.DataFrame, truth: pd.DataFrame | None, unit_m2: float) -> None:
    style: dict[str, Any] = {"color": MAPPED, "marker": "o", "ms": 3.5, "lw": 1.6}
    ax.plot(table["year"], _mask_unknown(table) / unit_m2, label="mapped", **style)
    if truth is not None:
        style |= {"color": TRUTH, "ls": (0, (4, 2)), "mfc": "white"}
        ax.plot(truth["year"], _mask_unknown(truth) / unit_m2, label="truth", **style)
    ax.set_ylim(0, 1.15 * max(ax.dataLim.y1, 1e-3))


def _mask_unknown(table: pd.DataFrame) -> pd.Series:
    """Return the area in m2, NaN in years with more unknown than mine area."""
    unknown = table.get("unknown_m2", pd.Series(0.0, index=table.index))
    return table["area_m2"].where(unknown <= table["area_m2"].clip(lower=1))


def _draw_change(ax: Axes, table: pd.DataFrame, unit_m2: float) -> None:
    ax.bar(table["year"], table["gain_m2"] / unit_m2, width=0.6, color=GAIN, label="gain")
    ax.bar(table["year"], -table["loss_m2"] / unit_m2, width=0.6, color=LOSS, label="loss")
    ax.axhline(0, color=INK, lw=0.8)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if len(table) <= 6:
        ax.xaxis.set_major_locator(FixedLocator(table["year"].tolist()))


def _draw_legend(figure: Figure, panels: Iterable[SubFigure]) -> None:
    """Draw one legend for all panels, with each name once."""
    handles: dict[str, Artist] = {}
    for panel in panels:
        for ax in panel.axes:
            lines, names = ax.get_legend_handles_labels()
            handles.update(zip(names, lines, strict=True))
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=len(handles),
        fontsize=8,
        frameon=False,
    )
