"""Draw mine area by year of many sites in one picture, with one row per site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from minecube.errors import CubeError
from minecube.report.areas import GAIN, LOSS, MAPPED, TRUTH, mask_unknown
from minecube.report.style import DPI, INK, UNOBSERVED, save

SHADES = "YlGnBu"  # ColorBrewer, safe for colour-blind eyes
_ROW_IN = 0.17
_MOST_ROWS_IN = 34
"""Height of all rows at most; more sites get thinner rows."""
_NAMED_IN = 0.12
"""Lowest row with a legible name."""
_LEFT_IN = 1.7
_SHARES_IN = 3.6
_GAP_IN = 0.3
_AREAS_IN = 3.4
_RIGHT_IN = 0.35
_TOP_IN = 1.45
_BOTTOM_IN = 0.6
_SCALE_IN = 0.65
"""From the top of the picture to the colour scale."""
_FEW_ROWS = 30
"""Up to this many rows, axes have numbers at the top only."""


@dataclass(frozen=True)
class _Rows:
    """Areas in m2 by site and year, NaN where unknown; the largest last area comes first."""

    mapped: pd.DataFrame
    truth: pd.DataFrame | None
    height_in: float
    """Height of a row in inches."""


def draw_area_overview(
    areas: Mapping[str, pd.DataFrame], out: Path, truth: Mapping[str, pd.DataFrame] | None = None
) -> None:
    """Write a PNG with a row per site: shades of area by year, and first and last area in numbers.

    Shades show a year's area as a share of the site's largest. Years with more unknown than mine
    area are hatched. The site with the largest last area is at the top. The picture has at most
    4,500 rows of pixels: beyond 280 sites the names are left out.

    Args:
        areas: Site -> table as in `draw_areas`.
        truth: Site -> the same columns of the reference. Its last area is drawn as a circle.

    Raises:
        CubeError: There is no site to plot, or the file cannot be written.
    """
    if not areas:
        raise CubeError(f"{out}: there is no area to plot; score or predict a site first")
    rows = _arrange(areas, truth)
    figure, shares, ends = _lay_out(rows)
    _draw_shares(shares, rows)
    _draw_ends(ends, rows)
    _draw_scale(figure)
    _draw_legend(figure, has_truth=rows.truth is not None)
    save(figure, out)


def _arrange(areas: Mapping[str, pd.DataFrame], truth: Mapping[str, pd.DataFrame] | None) -> _Rows:
    mapped = _tabulate(areas)
    order = _find_last(mapped).sort_values(ascending=False, kind="stable", na_position="last").index
    sorted_truth = None
    if truth:
        sorted_truth = _tabulate(truth).reindex(order)
    height_in = min(_ROW_IN, _MOST_ROWS_IN / len(order))
    return _Rows(mapped.loc[order], sorted_truth, height_in)


def _tabulate(areas: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return areas in m2 by site and year. Every year between the first and last has a column."""
    tables = pd.concat(areas, names=["site", "row"])
    known = mask_unknown(tables).to_numpy()
    sites = tables.index.get_level_values("site")
    by_year = pd.Series(known, [sites, tables["year"]]).to_xarray()
    years = range(int(tables["year"].min()), int(tables["year"].max()) + 1)
    by_year = by_year.reindex(site=list(areas), year=years)
    return pd.DataFrame(by_year.to_numpy(), list(areas), years)


def _find_last(areas: pd.DataFrame) -> pd.Series:
    """Return each site's area in its last known year; NaN without one."""
    return areas.ffill(axis=1).iloc[:, -1]


def _lay_out(rows: _Rows) -> tuple[Figure, Axes, Axes]:
    """Return the figure, the axes of shades and the axes of first and last areas."""
    count = len(rows.mapped)
    height = count * rows.height_in
    width_in = _LEFT_IN + _SHARES_IN + _GAP_IN + _AREAS_IN + _RIGHT_IN
    height_in = _TOP_IN + height + _BOTTOM_IN
    figure = Figure(figsize=(width_in, height_in), dpi=DPI)

    def add_axes(left_in: float, axes_in: float) -> Axes:
        box = (left_in / width_in, _BOTTOM_IN / height_in, axes_in / width_in, height / height_in)
        return figure.add_axes(box)

    shares = add_axes(_LEFT_IN, _SHARES_IN)
    ends = add_axes(_LEFT_IN + _SHARES_IN + _GAP_IN, _AREAS_IN)
    for ax in (shares, ends):
        ax.set_ylim(count - 0.5, -0.5)
        ax.tick_params(labelsize=8, color=INK, labelcolor=INK)
        ax.tick_params(axis="x", top=True, labeltop=True)
        ax.tick_params(axis="x", bottom=count > _FEW_ROWS, labelbottom=count > _FEW_ROWS)
        ax.set_yticks([])
    if rows.height_in >= _NAMED_IN:
        shares.set_yticks(range(count), rows.mapped.index)
    else:
        shares.set_ylabel(
            f"{count:,} sites, the largest at the top", fontsize=9, color=INK, loc="top"
        )
    shares.tick_params(axis="y", length=0)
    return figure, shares, ends


def _draw_shares(ax: Axes, rows: _Rows) -> None:
    areas = rows.mapped.to_numpy(float)
    largest = np.nanmax(areas, axis=1, keepdims=True, initial=0)
    share = areas / np.where(largest > 0, largest, 1)
    years = rows.mapped.columns.to_numpy(int)
    first = int(years[0])
    last = int(years[-1])
    extent = (first - 0.5, last + 0.5, len(areas) - 0.5, -0.5)
    corner = (extent[0], extent[3])
    ax.add_patch(Rectangle(corner, last - first + 1, len(areas), lw=0, zorder=0, **UNOBSERVED))
    ax.imshow(
        np.ma.masked_invalid(share),
        cmap=SHADES,
        vmin=0,
        vmax=1,
        extent=extent,
        aspect="auto",
        interpolation="antialiased",
        zorder=1,
    )
    ax.set_title("area by year, share of the site's largest", fontsize=9, color=INK)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    ax.spines[:].set_visible(False)


def _draw_ends(ax: Axes, rows: _Rows) -> None:
    """Draw a line from the first to the last known area of each site."""
    first = rows.mapped.bfill(axis=1).iloc[:, 0].to_numpy(float) / 1e6
    last = _find_last(rows.mapped).to_numpy(float) / 1e6
    y = np.arange(len(last))
    size = float(np.clip(30 * rows.height_in, 0.8, 5))
    ends = np.stack([np.stack([first, y], -1), np.stack([last, y], -1)], axis=1)
    colours = np.where(last >= first, GAIN, LOSS)
    ax.add_collection(
        LineCollection(list(ends), colors=colours.tolist(), linewidths=size * 0.6, zorder=2)
    )
    ax.plot(last, y, "o", color=MAPPED, ms=size, zorder=3)
    if rows.truth is not None:
        truth = _find_last(rows.truth).to_numpy(float) / 1e6
        ax.plot(truth, y, "o", color=TRUTH, mfc="none", ms=size * 1.5, mew=size / 5, zorder=4)
    # Logarithmic down to the smallest area, then linear down to 0.
    positive = ends[..., 0][ends[..., 0] > 0]
    smallest = 10 ** np.floor(np.log10(positive.min(initial=1)))
    ax.set_xscale("symlog", linthresh=smallest, linscale=0.4)
    ax.set_xlim(0, 1.5 * positive.max(initial=1))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set_title("area in the first and last known year, km²", fontsize=9, color=INK)
    ax.grid(axis="x", color="#dddddd", lw=0.6)
    ax.set_axisbelow(True)
    ax.spines[["bottom", "right", "left"]].set_visible(False)


def _draw_scale(figure: Figure) -> None:
    """Draw the colour scale of the shades above them."""
    width_in, height_in = figure.get_size_inches()
    bottom = 1 - _SCALE_IN / height_in
    box = (_LEFT_IN / width_in, bottom, _SHARES_IN / width_in, 0.12 / height_in)
    ax = figure.add_axes(box)
    ax.imshow(np.linspace(0, 1, 256)[None], cmap=SHADES, extent=(0, 100, 0, 1), aspect="auto")
    ax.set_yticks([])
    ax.xaxis.set_major_formatter(PercentFormatter(decimals=0))
    ax.tick_params(labelsize=8, color=INK, labelcolor=INK)
    ax.spines[:].set_visible(False)


def _draw_legend(figure: Figure, *, has_truth: bool) -> None:
    dot: dict[str, Any] = {"marker": "o", "ls": "", "ms": 5}
    handles: list[Artist] = [
        Line2D([], [], color=MAPPED, label="last area", **dot),
        Line2D([], [], color=GAIN, lw=3, label="larger than first"),
        Line2D([], [], color=LOSS, lw=3, label="smaller than first"),
        Patch(lw=0, label="unknown", **UNOBSERVED),
    ]
    if has_truth:
        handles.insert(1, Line2D([], [], color=TRUTH, mfc="none", label="last truth", **dot))
    figure.legend(
        handles=handles, loc="upper center", ncols=len(handles), fontsize=8, frameon=False
    )
