"""Draw cubes and maps: strips of years, area by year, composites and scene coverage.

All images of one picture share one stretch, so their brightness is comparable. Pixels without
observation are hatched grey, since black looks like water. Outlines are cyan and magenta. These
differ in lightness and hue, and colour-blind readers can distinguish them.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import xarray as xr
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import Normalize, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedLocator, MaxNLocator

from minecube.errors import CubeError
from minecube.files import replacing

OUTLINES = (("#00f0ff", 2.2), ("#ff00c8", 1.0))
"""Colour and width in points of the first and second footprint.

The thin second line is drawn on the broad first.
"""
MAPPED, TRUTH, GAIN, LOSS = (
    "#222222",
    "#009e73",
    "#d55e00",
    "#0072b2",
)  # the last three from Okabe and Ito's palette
INK = "#333333"
TRUE_COLOUR = ["B04", "B03", "B02"]
PANEL_IN, DPI = 2.9, 120
SHADES = "YlGnBu"  # of usable dates; ColorBrewer, safe for colour-blind eyes
NONE_USABLE, TOO_FEW, MISSING, OUT_OF_SEASON, NO_PASS = (
    "#f5b5d0",
    "#c2006b",
    "#d55e00",
    "#e9e9e9",
    "#f7f7f7",
)

Image = npt.NDArray[np.uint16]


def strip(cube: xr.Dataset, footprints: Mapping[str, xr.DataArray], out: Path, title: str) -> None:
    """Write a PNG with one true-colour panel per year and outlines of the footprints.

    Years without data are hatched.

    Args:
        cube: Variables reflectance (year, band, y, x) uint16, 0 = no observation, and clear_count
            (year, y, x).
        footprints: Name in the legend -> (year, y, x), 1 mine, on the cube's grid. At most two;
            years may be missing.
        out: Path of the PNG.
        title: Title above all panels.

    Raises:
        CubeError: A band of true colour is missing, a footprint has another grid, or the file
            cannot be written.
    """
    years = [int(y) for y in cube.year.to_numpy()]
    images = [_rgb(cube.reflectance.sel(year=year), f"year {year}") for year in years]
    for name, footprint in footprints.items():
        if footprint.shape[-2:] != images[0].shape[:2]:
            expected = " x ".join(map(str, images[0].shape[:2]))
            raise CubeError(
                f"{title}: footprint {name!r} is not of the cube's {expected} px; draw it on its own grid"
            )
    fig, panels = _panels(images, title, legend_in=0.35 if footprints else 0)
    styles = dict(zip(footprints, OUTLINES, strict=False))
    for ax, year, image in zip(panels, years, images, strict=True):
        clear = f"{cube.clear_count.sel(year=year).median().item():.0f} clear dates"
        ax.set_title(
            f"$\\bf{{{year}}}$   {clear if image.any() else 'no observation'}",
            fontsize=10,
            color=INK,
        )
        for name, (colour, width) in styles.items():
            if year in footprints[name].year:
                _outline(ax, footprints[name].sel(year=year).to_numpy() == 1, colour, width)
    _scale_bar(panels[0], abs(float(cube.x[1] - cube.x[0])), images[0].shape)
    if styles:
        _legend(
            fig,
            [Line2D([], [], color=c, lw=w + 0.8, label=name) for name, (c, w) in styles.items()],
        )
    _save(fig, out)


def comparison(images: Mapping[str, xr.DataArray], out: Path, title: str) -> None:
    """Write a PNG with true-colour images of one place side by side, in one stretch.

    Args:
        images: Caption -> reflectance (band, y, x) uint16, 0 = no observation, all of one shape.
        out: Path of the PNG.
        title: Title above all panels.

    Raises:
        CubeError: A band of true colour is missing or the file cannot be written.
    """
    rgb = [_rgb(image, caption) for caption, image in images.items()]
    fig, panels = _panels(rgb, title, legend_in=0)
    for ax, caption in zip(panels, images, strict=True):
        ax.set_title(caption, fontsize=10, color=INK)
    first = next(iter(images.values()))
    _scale_bar(panels[0], abs(float(first.x[1] - first.x[0])), rgb[0].shape)
    _save(fig, out)


def area_plot(
    areas: Mapping[str, pd.DataFrame], out: Path, truth: Mapping[str, pd.DataFrame] | None = None
) -> None:
    """Write a PNG of mine area by year per site, with gain and loss as bars below the line.

    The line has a gap in years with more unknown than mine area.

    Args:
        areas: Site -> columns year, area_m2, gain_m2, loss_m2 (NaN: nothing to compare with) and,
            optionally, unknown_m2.
        out: Path of the PNG.
        truth: Site -> the same columns of the reference, drawn as a dashed line.

    Raises:
        CubeError: There is no site to plot, or the file cannot be written.
    """
    if not areas:
        raise CubeError(f"{out}: there is no area to plot; score or predict a site first")
    truth = truth or {}
    largest = max(table["area_m2"].max() for table in [*areas.values(), *truth.values()])
    unit, unit_m2 = ("km²", 1e6) if largest >= 1e6 else ("ha", 1e4)
    rows = -(-len(areas) // 4)
    columns = -(-len(areas) // rows)
    fig = Figure(
        figsize=(PANEL_IN * max(columns, 2), 3.0 * rows + 0.3), dpi=DPI, layout="constrained"
    )
    boxes = fig.subfigures(rows, columns, squeeze=False).ravel()
    for box, (site, table) in zip(boxes, areas.items(), strict=False):
        above, below = box.subplots(2, 1, sharex=True, height_ratios=[2.2, 1])
        above.set_title(site, fontsize=10, color=INK, fontweight="bold")
        above.plot(
            table["year"],
            _known(table) / unit_m2,
            color=MAPPED,
            marker="o",
            ms=3.5,
            lw=1.6,
            label="mapped",
        )
        if site in truth:
            style = {
                "color": TRUTH,
                "ls": (0, (4, 2)),
                "lw": 1.6,
                "marker": "o",
                "ms": 3.5,
                "mfc": "white",
            }
            above.plot(truth[site]["year"], _known(truth[site]) / unit_m2, label="truth", **style)
        below.bar(table["year"], table["gain_m2"] / unit_m2, width=0.6, color=GAIN, label="gain")
        below.bar(table["year"], -table["loss_m2"] / unit_m2, width=0.6, color=LOSS, label="loss")
        below.axhline(0, color=INK, lw=0.8)
        above.set_ylim(0, 1.15 * max(above.dataLim.y1, 1e-3))
        above.set_ylabel(f"mine area, {unit}", fontsize=8)
        below.set_ylabel(f"change, {unit}", fontsize=8)
        below.xaxis.set_major_locator(
            FixedLocator(table["year"].tolist())
            if len(table) <= 6
            else MaxNLocator(integer=True, nbins=6)
        )
        for ax in (above, below):
            _plain(ax)
    drawn = {
        name: line
        for box in boxes
        for ax in box.axes
        for line, name in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    fig.legend(
        drawn.values(),
        drawn,
        loc="outside lower center",
        ncols=len(drawn),
        fontsize=8,
        frameon=False,
    )
    _save(fig, out)


def coverage_map(months: pd.DataFrame, years: pd.DataFrame, out: Path, title: str) -> None:
    """Write a PNG of the usable dates, with a row per site and source and a cell per month.

    Darker cells have more usable dates. Months of the season without usable dates are pink. A bar
    in a cell shows the share of passes missing in the source. Months out of season are hatched.
    Years with too few usable dates are framed, and years without audit are crossed out.

    Args:
        months: Columns site, year, month, source, usable, expected, missing (the last two may be
            NA) and state, as in `scenes.coverage`. Sites and sources are drawn in their order.
        years: Columns site, year, source, usable and state. The state of a site-year's last source
            decides on the frame.
        out: Path of the PNG.
        title: Title above the picture.

    Raises:
        CubeError: There is no month to draw, or the file cannot be written.
    """
    if months.empty:
        raise CubeError(f"{out}: there is no month to draw; audit a site and a year first")
    table = _Table(months)
    fig = Figure(
        figsize=(max(table.left + table.wide + 0.2, _LEGEND_IN), table.top + table.high + 0.35),
        dpi=DPI,
    )
    ax = fig.add_axes(_inches(fig, table.left, table.top, table.wide, table.high))
    ax.set(xlim=(0, table.wide), ylim=(table.high, 0))
    ax.set_axis_off()
    shades = ScalarMappable(Normalize(0, max(float(months["usable"].max()), 4)), colormaps[SHADES])
    _cells(ax, table, months, shades)
    _site_years(ax, table, years)
    _headings(ax, table)
    fig.text(
        0.1 / fig.get_figwidth(),
        1 - 0.1 / fig.get_figheight(),
        title,
        va="top",
        fontsize=12,
        color=INK,
        fontweight="bold",
    )
    _coverage_legend(fig, shades)
    _save(fig, out)


_LEGEND_IN = 7.6


class _Table:
    """Positions of the rows and cells of a coverage map, in inches. Few cells are drawn large."""

    top = 1.15

    def __init__(self, months: pd.DataFrame) -> None:
        self.rows = list(
            months[["site", "source"]].drop_duplicates().itertuples(index=False, name=None)
        )
        sites = list(dict.fromkeys(site for site, _ in self.rows))
        # Keep a site's rows together, also if different sources list its years.
        self.rows.sort(key=lambda row: sites.index(row[0]))
        self.years = sorted(months["year"].unique())
        self.roomy = len(self.rows) * len(self.years) <= 250 and len(self.years) <= 4
        self.cell = (0.25, 0.25) if self.roomy else (0.13, 0.16 if len(self.rows) <= 150 else 0.11)
        self.year_in = 12 * self.cell[0] + (0.55 if self.roomy else 0.1)
        between = 0.1 if len(self.rows) > len(sites) else 0
        places = [
            n * self.cell[1] + sites.index(site) * between for n, (site, _) in enumerate(self.rows)
        ]
        self.y = dict(zip(self.rows, places, strict=True))
        self.wide, self.high = self.year_in * len(self.years), places[-1] + self.cell[1]
        self.sources_in = 0.2 + 0.068 * max(len(source) for _, source in self.rows)
        self.left = 0.2 + 0.085 * max(map(len, sites)) + self.sources_in

    def x(self, year: int, month: int = 1) -> float:
        """Return the left edge of a month."""
        return self.year_in * self.years.index(year) + self.cell[0] * (month - 1)


def _inches(
    fig: Figure, left: float, top: float, width: float, height: float
) -> tuple[float, float, float, float]:
    wide, high = fig.get_size_inches()
    return left / wide, 1 - (top + height) / high, width / wide, height / high


def _cells(ax: Axes, table: _Table, months: pd.DataFrame, shades: ScalarMappable) -> None:
    width, height = table.cell
    corners = np.array([(0, 0), (1, 0), (1, 1), (0, 1)])
    left = np.array([table.x(y, m) for y, m in zip(months["year"], months["month"], strict=True)])
    above = np.array([table.y[key] for key in zip(months["site"], months["source"], strict=True)])
    boxes = np.stack([left, above], -1)[:, None] + corners * (width, height)
    outside, idle = (
        months["state"] == "out of season",
        months["state"].isin(["before launch", "to come"]),
    )
    season = (~outside & ~idle).to_numpy()
    usable = months["usable"].to_numpy(float)
    colours = np.where(usable[:, None] > 0, shades.to_rgba(usable), to_rgba(NONE_USABLE))
    colours[idle] = to_rgba(NO_PASS)
    ax.add_collection(
        PolyCollection(
            list(boxes[~outside]), facecolors=colours[~outside], edgecolors="white", linewidths=0.6
        )
    )
    share = (months["missing"] / months["expected"]).astype("Float64").fillna(0.0).to_numpy(float)
    marked, thick = season & (share > 0), (0.18 if table.roomy else 0.32) * height
    bars = corners * np.stack([share * width * 0.84, np.full(share.shape, thick)], -1)[:, None]
    bars += np.stack([left + 0.08 * width, above + 0.93 * height - thick], -1)[:, None]
    ax.add_collection(
        PolyCollection(list(bars[marked]), facecolors=MISSING, edgecolors="white", linewidths=0.4)
    )
    if table.roomy:
        for x, y, n in zip(left[season], above[season], usable[season], strict=True):
            colour = "white" if n > 0.55 * (shades.get_clim()[1] or 1) else INK
            ax.text(
                x + width / 2,
                y + 0.4 * height,
                f"{n:.0f}",
                color=colour,
                fontsize=7.5,
                ha="center",
                va="center",
            )


def _site_years(ax: Axes, table: _Table, years: pd.DataFrame) -> None:
    """Draw hatching, sums, frames around years with few dates, and crosses for missing years."""
    width, height = table.cell
    for site in dict.fromkeys(site for site, _ in table.rows):
        own = [y for (s, _), y in table.y.items() if s == site]
        for year in table.years:
            rows = years[(years["site"] == site) & (years["year"] == year)]
            # Slightly smaller, to separate the frames of neighbouring rows.
            box = (
                (table.x(year) + 0.01, own[0] + 0.01),
                12 * width - 0.02,
                own[-1] + height - own[0] - 0.02,
            )
            if rows.empty:
                ax.add_patch(
                    Rectangle(*box, facecolor="white", edgecolor="#888888", hatch="xx", lw=0.8)
                )
                continue
            ax.add_patch(
                Rectangle(
                    *box,
                    facecolor=OUT_OF_SEASON,
                    edgecolor="#c4c4c4",
                    hatch="/////",
                    lw=0,
                    zorder=0,
                )
            )
            if rows["state"].iloc[-1] != "ok":
                ax.add_patch(
                    Rectangle(
                        *box,
                        facecolor="none",
                        edgecolor=TOO_FEW,
                        lw=2 if table.roomy else 1.3,
                        zorder=3,
                    )
                )
            for row in rows.itertuples() if table.roomy else ():
                where = (table.x(year) + 12 * width + 0.3, table.y[site, row.source] + height / 2)
                text = ax.text(
                    *where, f"{row.usable}", fontsize=8, color=INK, ha="right", va="center"
                )
                if row.state != "ok":
                    text.set(color=TOO_FEW, fontweight="bold")


def _headings(ax: Axes, table: _Table) -> None:
    """Write years and months above, and sites and sources to the left."""
    width, height = table.cell
    for year in table.years:
        ax.text(
            table.x(year) + 6 * width,
            -0.2,
            str(year),
            fontsize=9,
            fontweight="bold",
            color=INK,
            ha="center",
            va="bottom",
        )
        for month, letter in enumerate("JFMAMJJASOND", start=1):
            where = (table.x(year, month) + width / 2, -0.05)
            ax.text(
                *where,
                letter,
                fontsize=7 if table.roomy else 5.5,
                color="#777777",
                ha="center",
                va="bottom",
            )
        if table.roomy:
            ax.text(
                table.x(year) + 12 * width + 0.3,
                -0.05,
                "sum",
                fontsize=7,
                color="#777777",
                ha="right",
                va="bottom",
            )
        if table.high > 6:  # the headings above are out of sight
            where = (table.x(year) + 6 * width, table.high + 0.05)
            ax.text(
                *where, str(year), fontsize=9, fontweight="bold", color=INK, ha="center", va="top"
            )
    small = 7.5 if height > 0.12 else 6
    named = set()
    for (site, source), y in table.y.items():
        ax.text(-0.08, y + height / 2, source, fontsize=small, color=INK, ha="right", va="center")
        if site not in named:
            named.add(site)
            where = (0.1 - table.left, y + height / 2)
            ax.text(
                *where,
                site,
                fontsize=min(small + 1, 8.5),
                fontweight="bold",
                color=INK,
                va="center",
            )


def _coverage_legend(fig: Figure, shades: ScalarMappable) -> None:
    bar = fig.add_axes(_inches(fig, 0.12, 0.42, 1.3, 0.1))
    fig.colorbar(
        shades, cax=bar, orientation="horizontal", ticks=MaxNLocator(integer=True, nbins=5)
    )
    bar.tick_params(labelsize=7, color=INK, labelcolor=INK, length=2, pad=1)
    bar.set_title("usable dates", fontsize=7, color=INK, pad=2)
    marks = [
        Patch(facecolor=NONE_USABLE, label="no usable date"),
        Patch(facecolor=MISSING, label="share of passes that is not listed"),
        Patch(
            facecolor=OUT_OF_SEASON, edgecolor="#c4c4c4", hatch="/////", lw=0, label="out of season"
        ),
        Patch(facecolor=NO_PASS, edgecolor="#dddddd", label="before launch, or to come"),
        Patch(
            facecolor="none", edgecolor=TOO_FEW, lw=1.8, label="too few usable dates for the recipe"
        ),
        Patch(facecolor="white", edgecolor="#888888", hatch="xxxx", lw=0.8, label="not audited"),
    ]
    where = (1.6 / fig.get_figwidth(), 1 - 0.32 / fig.get_figheight())
    fig.legend(
        handles=marks,
        loc="upper left",
        bbox_to_anchor=where,
        ncols=3,
        fontsize=7,
        frameon=False,
        labelcolor=INK,
    )


def _known(table: pd.DataFrame) -> pd.Series:
    unknown = table.get("unknown_m2", pd.Series(0.0, index=table.index))
    return table["area_m2"].where(unknown <= table["area_m2"].clip(lower=1))


def _plain(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#dddddd", lw=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=8, color=INK, labelcolor=INK)


def _rgb(reflectance: xr.DataArray, what: str) -> Image:
    """Return red, green and blue (y, x, 3) uint16. A pixel is 0 in all three if one band is 0."""
    missing = [b for b in TRUE_COLOUR if b not in reflectance.band]
    if missing:
        raise CubeError(
            f"{what}: a true-colour picture needs {', '.join(TRUE_COLOUR)}, but there is no {', '.join(missing)}"
        )
    image: Image = reflectance.sel(band=TRUE_COLOUR).transpose("y", "x", "band").to_numpy()
    return image * (image > 0).all(axis=-1, keepdims=True)


def _stretch(images: Sequence[Image]) -> tuple[float, float]:
    """Return the darkest and brightest value shown.

    Both are the lowest over the images, so clouds in one image do not darken the others.
    """
    ends = [np.percentile(image[image > 0], (0.5, 99)) for image in images if image.any()]
    low, high = np.min(ends, axis=0) if ends else (0, 1)
    return float(low), float(max(high, low + 1))


def _panels(images: Sequence[Image], title: str, legend_in: float) -> tuple[Figure, list[Axes]]:
    rows = -(-len(images) // 5)
    columns = -(-len(images) // rows)
    height = min(2.0, max(0.5, images[0].shape[0] / images[0].shape[1])) * PANEL_IN + 0.3
    fig = Figure(
        figsize=(PANEL_IN * max(columns, 2), height * rows + 0.35 + legend_in),
        dpi=DPI,
        layout="constrained",
    )
    fig.suptitle(title, fontsize=12, color=INK, fontweight="bold")
    axes = list(fig.subplots(rows, columns, squeeze=False).ravel())
    for ax in axes[len(images) :]:
        ax.remove()
    stretch = _stretch(images)
    for ax, image in zip(axes, images, strict=False):
        _show(ax, image, stretch)
    return fig, axes[: len(images)]


def _show(ax: Axes, image: Image, stretch: tuple[float, float]) -> None:
    height, width = image.shape[:2]
    low, high = stretch
    shades = np.clip((image - low) / (high - low), 0, 1) ** 0.6  # gamma brightens dark forest
    opaque = (image > 0).all(axis=-1, keepdims=True)
    ax.add_patch(
        Rectangle(
            (0, 0),
            width,
            height,
            facecolor="#d9d9d9",
            edgecolor="#a6a6a6",
            hatch="////",
            lw=0,
            zorder=0,
        )
    )
    ax.imshow(
        np.concatenate([shades, opaque], axis=-1),
        extent=(0, width, height, 0),
        interpolation="antialiased",
        zorder=1,
    )
    ax.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    ax.spines[:].set_color("#888888")


def _outline(ax: Axes, mine: npt.NDArray[np.bool_], colour: str, width: float) -> None:
    """Draw the pixel edges between mine and background, in the coordinates of `_show`."""
    framed = np.pad(mine, 1)
    y, x = np.nonzero(framed[1:-1, 1:] != framed[1:-1, :-1])
    upright = np.stack([np.stack([x, y], -1), np.stack([x, y + 1], -1)], axis=1)
    y, x = np.nonzero(framed[1:, 1:-1] != framed[:-1, 1:-1])
    level = np.stack([np.stack([x, y], -1), np.stack([x + 1, y], -1)], axis=1)
    edges = np.concatenate([upright, level])
    ax.add_collection(
        LineCollection(list(edges), colors=colour, linewidths=width, capstyle="round", zorder=2)
    )


def _scale_bar(ax: Axes, pixel_m: float, shape: tuple[int, ...]) -> None:
    height, width = shape[:2]
    fitting = [
        m for m in (100, 200, 500, 1000, 2000, 5000, 10_000, 20_000) if m <= 0.4 * width * pixel_m
    ]
    metres = fitting[-1] if fitting else int(pixel_m)
    long, thick, left, top = metres / pixel_m, 0.015 * height, 0.05 * width, 0.93 * height
    ax.add_patch(
        Rectangle((left, top), long, thick, facecolor="white", edgecolor="black", lw=0.6, zorder=4)
    )
    text = f"{metres / 1000:g} km" if metres >= 1000 else f"{metres} m"
    behind = {"facecolor": "black", "alpha": 0.45, "edgecolor": "none", "pad": 1.5}
    ax.text(
        left + long / 2,
        top - thick,
        text,
        color="white",
        fontsize=8,
        ha="center",
        va="bottom",
        bbox=behind,
        zorder=4,
    )


def _legend(fig: Figure, lines: Sequence[Line2D]) -> None:
    # A dark background, like the imagery: cyan is hard to see on white.
    legend = fig.legend(
        handles=lines, loc="outside lower center", ncols=len(lines), fontsize=9, labelcolor="white"
    )
    legend.get_frame().set(facecolor="#414b3d", edgecolor="none", alpha=1)


def _save(fig: Figure, out: Path) -> None:
    """Write the figure as PNG. Raises CubeError if the file cannot be written."""
    drawn = io.BytesIO()
    fig.savefig(drawn, format="png")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as part:
            part.write_bytes(drawn.getbuffer())
    except OSError as error:
        raise CubeError(
            f"{out}: cannot be written ({error.strerror}); mend that and draw again"
        ) from error
