"""Draw the usable dates of sites and sources as a table of months."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import Normalize, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from minecube.arrays import Float64
from minecube.errors import CubeError
from minecube.report.style import DPI, FAINT, INK, VERMILION, save

SHADES = "YlGnBu"  # of usable dates; ColorBrewer, safe for colour-blind eyes
NONE_USABLE = "#f5b5d0"
TOO_FEW = "#c2006b"
MISSING = VERMILION
OUT_OF_SEASON = "#e9e9e9"
PASSLESS = "#f7f7f7"
_LEGEND_IN = 7.6
_TOP_IN = 1.15
_HATCHED: dict[str, Any] = {
    "facecolor": OUT_OF_SEASON,
    "edgecolor": "#c4c4c4",
    "hatch": "/////",
    "lw": 0,
}
_ROW_TEXT: dict[str, Any] = {"color": INK, "va": "center"}
_COLUMN_TEXT: dict[str, Any] = {"color": FAINT, "va": "bottom"}
_CORNERS = np.array([(0, 0), (1, 0), (1, 1), (0, 1)])


def draw_coverage(months: pd.DataFrame, years: pd.DataFrame, out: Path, title: str) -> None:
    """Write a PNG of the usable dates, with a row per site and source and a cell per month.

    Darker cells have more usable dates. Months of the season without usable dates are pink. A bar
    in a cell shows the share of passes missing in the source. Months out of season are hatched.
    Years with too few usable dates are framed, and years without audit are crossed out.

    Args:
        months: Columns site, year, month, source, usable, expected, missing (the last two may be
            NA) and state, as in `scenes.coverage`. Sites and sources are drawn in their order.
        years: Columns site, year, source, usable and state. The state of a site-year's last source
            decides on the frame.

    Raises:
        CubeError: There is no month to draw, or the file cannot be written.
    """
    if months.empty:
        raise CubeError(f"{out}: the audit has no month to draw; audit at least one site and year")
    table = _Table(months)
    width = max(table.left_in + table.width_in + 0.2, _LEGEND_IN)
    figure = Figure(figsize=(width, _TOP_IN + table.height_in + 0.35), dpi=DPI)
    ax = figure.add_axes(
        _to_figure(figure, table.left_in, _TOP_IN, table.width_in, table.height_in)
    )
    ax.set(xlim=(0, table.width_in), ylim=(table.height_in, 0))
    ax.set_axis_off()
    shades = ScalarMappable(Normalize(0, max(float(months["usable"].max()), 4)), colormaps[SHADES])
    _draw_months(ax, table, months, shades)
    _draw_years(ax, table, years)
    _write_columns(ax, table)
    _write_rows(ax, table)
    corner = (0.1 / figure.get_figwidth(), 1 - 0.1 / figure.get_figheight())
    figure.text(*corner, title, va="top", fontsize=12, color=INK, fontweight="bold")
    _draw_legend(figure, shades)
    save(figure, out)


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """Sizes of cells in inches, and of lines and letters in points."""

    cell: tuple[float, float]
    """Width and height."""
    year_gap: float
    """Space after a year."""
    bar: float
    """Thickness of bars of missing passes, relative to a cell's height."""
    frame: float
    month: float
    source: float
    site: float
    numbers: bool
    """Write numbers of usable dates."""


_LARGE = _Sizes(
    cell=(0.25, 0.25), year_gap=0.55, bar=0.18, frame=2, month=7, source=7.5, site=8.5, numbers=True
)
_SMALL = _Sizes(
    cell=(0.13, 0.16),
    year_gap=0.1,
    bar=0.32,
    frame=1.3,
    month=5.5,
    source=7.5,
    site=8.5,
    numbers=False,
)
_TINY = replace(_SMALL, cell=(0.13, 0.11), source=6, site=7)


def _choose_sizes(rows: int, years: int) -> _Sizes:
    if rows * years <= 250 and years <= 4:
        return _LARGE
    if rows <= 150:
        return _SMALL
    return _TINY


class _Table:
    """Positions of the rows and cells of a coverage map, in inches. Few cells are drawn large."""

    def __init__(self, months: pd.DataFrame) -> None:
        rows = list(months[["site", "source"]].drop_duplicates().itertuples(index=False, name=None))
        self.sites = list(dict.fromkeys(site for site, _ in rows))
        # Keep a site's rows together, also if different sources list its years.
        rows.sort(key=lambda row: self.sites.index(row[0]))
        self.years = sorted(months["year"].unique())
        self.sizes = _choose_sizes(len(rows), len(self.years))
        width, height = self.sizes.cell
        self.year_in = 12 * width + self.sizes.year_gap
        site_gap = 0.1 * (len(rows) > len(self.sites))
        self.y: dict[tuple[str, str], float] = {}
        """Site and source -> upper edge of the row."""
        for number, (site, source) in enumerate(rows):
            self.y[site, source] = number * height + self.sites.index(site) * site_gap
        self.width_in = self.year_in * len(self.years)
        self.height_in = self.y[rows[-1]] + height
        sources_in = 0.2 + 0.068 * max(len(source) for _, source in rows)
        self.left_in = 0.2 + 0.085 * max(map(len, self.sites)) + sources_in

    def x(self, year: int, month: int = 1) -> float:
        """Return the left edge of a month."""
        return self.year_in * self.years.index(year) + self.sizes.cell[0] * (month - 1)

    def x_of_sum(self, year: int) -> float:
        """Return the right edge of a year's sum."""
        return self.x(year) + 12 * self.sizes.cell[0] + 0.3

    def locate_year(self, site: str, year: int) -> tuple[tuple[float, float], float, float]:
        """Return corner, width and height of a site-year.

        It is slightly smaller than the cells, to separate the frames of neighbouring rows.
        """
        width, height = self.sizes.cell
        edges = [y for (name, _), y in self.y.items() if name == site]
        corner = (self.x(year) + 0.01, edges[0] + 0.01)
        return corner, 12 * width - 0.02, edges[-1] + height - edges[0] - 0.02


def _to_figure(
    figure: Figure, left: float, top: float, width: float, height: float
) -> tuple[float, float, float, float]:
    """Convert a box in inches from the upper left corner to shares of the figure."""
    figure_width, figure_height = figure.get_size_inches()
    return (
        left / figure_width,
        1 - (top + height) / figure_height,
        width / figure_width,
        height / figure_height,
    )


def _draw_months(ax: Axes, table: _Table, months: pd.DataFrame, shades: ScalarMappable) -> None:
    out_of_season = (months["state"] == "out of season").to_numpy()
    no_pass = months["state"].isin(["before launch", "to come"]).to_numpy()
    in_season = ~out_of_season & ~no_pass
    usable = months["usable"].to_numpy(float)
    corners = _locate_months(table, months)
    boxes = corners[:, None] + _CORNERS * table.sizes.cell
    colours = np.where(usable[:, None] > 0, shades.to_rgba(usable), to_rgba(NONE_USABLE))
    colours[no_pass] = to_rgba(PASSLESS)
    ax.add_collection(
        PolyCollection(
            list(boxes[~out_of_season]),
            facecolors=colours[~out_of_season],
            edgecolors="white",
            linewidths=0.6,
        )
    )
    _draw_missing(ax, table, months[in_season], corners[in_season])
    if table.sizes.numbers:
        _write_usable(ax, table, shades, usable[in_season], corners[in_season])


def _locate_months(table: _Table, months: pd.DataFrame) -> Float64:
    """Return the upper left corner of each month's cell: float64 [month, 2]."""
    x = [table.x(y, m) for y, m in zip(months["year"], months["month"], strict=True)]
    y = [table.y[row] for row in zip(months["site"], months["source"], strict=True)]
    return np.stack([x, y], -1)


def _draw_missing(ax: Axes, table: _Table, months: pd.DataFrame, corners: Float64) -> None:
    """Draw bars of the share of passes missing in the source."""
    width, height = table.sizes.cell
    thickness = table.sizes.bar * height
    share = (months["missing"] / months["expected"]).astype("Float64").fillna(0.0).to_numpy(float)
    sizes = np.stack([share * width * 0.84, np.full(share.shape, thickness)], -1)
    x, y = corners.T
    bars = _CORNERS * sizes[:, None]
    bars += np.stack([x + 0.08 * width, y + 0.93 * height - thickness], -1)[:, None]
    ax.add_collection(
        PolyCollection(
            list(bars[share > 0]), facecolors=MISSING, edgecolors="white", linewidths=0.4
        )
    )


def _write_usable(
    ax: Axes, table: _Table, shades: ScalarMappable, usable: Float64, corners: Float64
) -> None:
    width, height = table.sizes.cell
    dark = usable > 0.55 * (shades.get_clim()[1] or 1)
    colours = np.where(dark, "white", INK)  # text stands out from its cell
    for (x, y), dates, colour in zip(corners, usable, colours, strict=True):
        middle = (x + width / 2, y + 0.4 * height)
        style = {**_ROW_TEXT, "color": str(colour)}
        ax.text(*middle, f"{dates:.0f}", fontsize=7.5, ha="center", **style)


def _draw_years(ax: Axes, table: _Table, years: pd.DataFrame) -> None:
    """Draw hatching, sums, frames around years with few dates, and crosses for missing years."""
    for site in table.sites:
        for year in table.years:
            rows = years[(years["site"] == site) & (years["year"] == year)]
            _draw_year(ax, table, table.locate_year(site, year), rows)


def _draw_year(
    ax: Axes, table: _Table, box: tuple[tuple[float, float], float, float], rows: pd.DataFrame
) -> None:
    """Draw one site-year; `rows` are its sources."""
    if rows.empty:
        ax.add_patch(Rectangle(*box, facecolor="white", edgecolor="#888888", hatch="xx", lw=0.8))
        return
    ax.add_patch(Rectangle(*box, zorder=0, **_HATCHED))
    if rows["state"].iloc[-1] != "ok":
        ax.add_patch(
            Rectangle(*box, facecolor="none", edgecolor=TOO_FEW, lw=table.sizes.frame, zorder=3)
        )
    if table.sizes.numbers:
        for row in rows.itertuples():
            _write_sum(ax, table, row)


def _write_sum(ax: Axes, table: _Table, row: Any) -> None:
    """Write the usable dates of one source of a site-year."""
    x = table.x_of_sum(row.year)
    y = table.y[row.site, row.source] + table.sizes.cell[1] / 2
    text = ax.text(x, y, f"{row.usable}", fontsize=8, ha="right", **_ROW_TEXT)
    if row.state != "ok":
        text.set(color=TOO_FEW, fontweight="bold")


def _write_columns(ax: Axes, table: _Table) -> None:
    """Write years and months above, and years also below a high table."""
    width, _ = table.sizes.cell
    for year in table.years:
        middle = table.x(year) + 6 * width
        _write_year(ax, year, middle, -0.2, va="bottom")
        if table.height_in > 6:  # the headings above are out of sight
            _write_year(ax, year, middle, table.height_in + 0.05, va="top")
        for month, letter in enumerate("JFMAMJJASOND", start=1):
            x = table.x(year, month) + width / 2
            ax.text(x, -0.05, letter, fontsize=table.sizes.month, ha="center", **_COLUMN_TEXT)
        if table.sizes.numbers:
            x = table.x_of_sum(year)
            ax.text(x, -0.05, "sum", fontsize=7, ha="right", **_COLUMN_TEXT)


def _write_year(ax: Axes, year: int, x: float, y: float, *, va: str) -> None:
    ax.text(x, y, str(year), fontsize=9, fontweight="bold", color=INK, ha="center", va=va)


def _write_rows(ax: Axes, table: _Table) -> None:
    """Write sites and sources to the left."""
    _, height = table.sizes.cell
    tops: dict[str, float] = {}
    for (site, source), y in table.y.items():
        tops.setdefault(site, y)
        size = table.sizes.source
        ax.text(-0.08, y + height / 2, source, fontsize=size, ha="right", **_ROW_TEXT)
    for site, y in tops.items():
        style = {**_ROW_TEXT, "fontsize": table.sizes.site, "fontweight": "bold"}
        ax.text(0.1 - table.left_in, y + height / 2, site, **style)


def _draw_legend(figure: Figure, shades: ScalarMappable) -> None:
    bar = figure.add_axes(_to_figure(figure, 0.12, 0.42, 1.3, 0.1))
    figure.colorbar(
        shades, cax=bar, orientation="horizontal", ticks=MaxNLocator(integer=True, nbins=5)
    )
    bar.tick_params(labelsize=7, color=INK, labelcolor=INK, length=2, pad=1)
    bar.set_title("usable dates", fontsize=7, color=INK, pad=2)
    handles = [
        Patch(facecolor=NONE_USABLE, label="no usable date"),
        Patch(facecolor=MISSING, label="share of passes that is not listed"),
        Patch(label="out of season", **_HATCHED),
        Patch(facecolor=PASSLESS, edgecolor="#dddddd", label="before launch, or to come"),
        Patch(
            facecolor="none", edgecolor=TOO_FEW, lw=1.8, label="too few usable dates for the recipe"
        ),
        Patch(facecolor="white", edgecolor="#888888", hatch="xxxx", lw=0.8, label="not audited"),
    ]
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(1.6 / figure.get_figwidth(), 1 - 0.32 / figure.get_figheight()),
        ncols=3,
        fontsize=7,
        frameon=False,
        labelcolor=INK,
    )
