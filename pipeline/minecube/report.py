"""Pictures of what was built and mapped: a strip of years with outlines, area by year, composites side by side.

All images of one picture share one stretch, so what looks brighter is brighter. What was not observed is hatched grey,
never black: black would pass for water. Outlines are cyan and magenta, which differ in lightness as well as in hue, so that
they stay apart for colour-blind eyes.
"""

from __future__ import annotations

import glob
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, MaxNLocator

from minecube.errors import CubeError

OUTLINES = (("#00f0ff", 2.2), ("#ff00c8", 1.0))
"""Colour and width in points of the first and the second footprint: broad below, thin on top, both seen where they agree."""
MAPPED, TRUTH, GAIN, LOSS = "#222222", "#009e73", "#d55e00", "#0072b2"  # the last three from Okabe and Ito's palette
INK = "#333333"
TRUE_COLOUR = ["B04", "B03", "B02"]
PANEL_IN, DPI = 2.9, 120

Image = npt.NDArray[np.uint16]


def strip(cube: xr.Dataset, footprints: Mapping[str, xr.DataArray], out: Path, title: str) -> None:
    """Write a PNG with one true-colour panel a year, outlined by the footprints; a year without observation is hatched.

    Args:
        cube: reflectance (year, band, y, x) uint16, 0 = no observation, and clear_count (year, y, x).
        footprints: name in the legend -> (year, y, x), 1 mine, on the cube's grid; at most two, years may lack.
        out: path of the PNG.
        title: stands above all panels.

    Raises:
        CubeError: a band of true colour is missing, a footprint is on another grid, or the file cannot be written.
    """
    years = [int(y) for y in cube.year.to_numpy()]
    images = [_rgb(cube.reflectance.sel(year=year), f"year {year}") for year in years]
    for name, footprint in footprints.items():
        if footprint.shape[-2:] != images[0].shape[:2]:
            expected = " x ".join(map(str, images[0].shape[:2]))
            raise CubeError(f"{title}: footprint {name!r} is not of the cube's {expected} px; draw it on its own grid")
    fig, panels = _panels(images, title, legend_in=0.35 if footprints else 0)
    styles = dict(zip(footprints, OUTLINES, strict=False))
    for ax, year, image in zip(panels, years, images, strict=True):
        clear = f"{cube.clear_count.sel(year=year).median().item():.0f} clear dates"
        ax.set_title(f"$\\bf{{{year}}}$   {clear if image.any() else 'no observation'}", fontsize=10, color=INK)
        for name, (colour, width) in styles.items():
            if year in footprints[name].year:
                _outline(ax, footprints[name].sel(year=year).to_numpy() == 1, colour, width)
    _scale_bar(panels[0], abs(float(cube.x[1] - cube.x[0])), images[0].shape)
    if styles:
        _legend(fig, [Line2D([], [], color=c, lw=w + 0.8, label=name) for name, (c, w) in styles.items()])
    _save(fig, out)


def comparison(images: Mapping[str, xr.DataArray], out: Path, title: str) -> None:
    """Write a PNG with true-colour images of one place side by side, named by their keys, in one stretch.

    Args:
        images: caption -> reflectance (band, y, x) uint16, 0 = no observation, all of one shape.
        out: path of the PNG.
        title: stands above all panels.

    Raises:
        CubeError: a band of true colour is missing or the file cannot be written.
    """
    rgb = [_rgb(image, caption) for caption, image in images.items()]
    fig, panels = _panels(rgb, title, legend_in=0)
    for ax, caption in zip(panels, images, strict=True):
        ax.set_title(caption, fontsize=10, color=INK)
    first = next(iter(images.values()))
    _scale_bar(panels[0], abs(float(first.x[1] - first.x[0])), rgb[0].shape)
    _save(fig, out)


def area_plot(areas: Mapping[str, pd.DataFrame], out: Path, truth: Mapping[str, pd.DataFrame] | None = None) -> None:
    """Write a PNG with, for each site, mine area by year as a line and gain and loss as bars below it.

    A year is left out of the line, and the line broken, where more of it is unknown than mine.

    Args:
        areas: site -> columns year, area_m2, gain_m2, loss_m2 (NaN: nothing to compare with) and, optionally, unknown_m2.
        out: path of the PNG.
        truth: site -> the same columns of the reference; a dashed line.

    Raises:
        CubeError: there is no site to plot, or the file cannot be written.
    """
    if not areas:
        raise CubeError(f"{out}: there is no area to plot; score or predict a site first")
    truth = truth or {}
    largest = max(table["area_m2"].max() for table in [*areas.values(), *truth.values()])
    unit, unit_m2 = ("km²", 1e6) if largest >= 1e6 else ("ha", 1e4)
    rows = -(-len(areas) // 4)
    columns = -(-len(areas) // rows)
    fig = Figure(figsize=(PANEL_IN * max(columns, 2), 3.0 * rows + 0.3), dpi=DPI, layout="constrained")
    boxes = fig.subfigures(rows, columns, squeeze=False).ravel()
    for box, (site, table) in zip(boxes, areas.items(), strict=False):
        above, below = box.subplots(2, 1, sharex=True, height_ratios=[2.2, 1])
        above.set_title(site, fontsize=10, color=INK, fontweight="bold")
        above.plot(table["year"], _known(table) / unit_m2, color=MAPPED, marker="o", ms=3.5, lw=1.6, label="mapped")
        if site in truth:
            style = {"color": TRUTH, "ls": (0, (4, 2)), "lw": 1.6, "marker": "o", "ms": 3.5, "mfc": "white"}
            above.plot(truth[site]["year"], _known(truth[site]) / unit_m2, label="truth", **style)
        below.bar(table["year"], table["gain_m2"] / unit_m2, width=0.6, color=GAIN, label="gain")
        below.bar(table["year"], -table["loss_m2"] / unit_m2, width=0.6, color=LOSS, label="loss")
        below.axhline(0, color=INK, lw=0.8)
        above.set_ylim(0, 1.15 * max(above.dataLim.y1, 1e-3))
        above.set_ylabel(f"mine area, {unit}", fontsize=8)
        below.set_ylabel(f"change, {unit}", fontsize=8)
        below.xaxis.set_major_locator(
            FixedLocator(table["year"].tolist()) if len(table) <= 6 else MaxNLocator(integer=True, nbins=6)
        )
        for ax in (above, below):
            _plain(ax)
    drawn = {name: line for box in boxes for ax in box.axes for line, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    fig.legend(drawn.values(), drawn, loc="outside lower center", ncols=len(drawn), fontsize=8, frameon=False)
    _save(fig, out)


def _known(table: pd.DataFrame) -> pd.Series:
    unknown = table.get("unknown_m2", pd.Series(0.0, index=table.index))
    return table["area_m2"].where(unknown <= table["area_m2"].clip(lower=1))


def _plain(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#dddddd", lw=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=8, color=INK, labelcolor=INK)


def _rgb(reflectance: xr.DataArray, what: str) -> Image:
    """Red, green and blue (y, x, 3) uint16; 0 in all three where one of them was not observed."""
    missing = [b for b in TRUE_COLOUR if b not in reflectance.band]
    if missing:
        raise CubeError(f"{what}: a true-colour picture needs {', '.join(TRUE_COLOUR)}, but there is no {', '.join(missing)}")
    image: Image = reflectance.sel(band=TRUE_COLOUR).transpose("y", "x", "band").to_numpy()
    return image * (image > 0).all(axis=-1, keepdims=True)


def _stretch(images: Sequence[Image]) -> tuple[float, float]:
    """The darkest and brightest value shown: those of the image with the least glare, so that clouds do not darken the rest."""
    ends = [np.percentile(image[image > 0], (0.5, 99)) for image in images if image.any()]
    low, high = np.min(ends, axis=0) if ends else (0, 1)
    return float(low), float(max(high, low + 1))


def _panels(images: Sequence[Image], title: str, legend_in: float) -> tuple[Figure, list[Axes]]:
    rows = -(-len(images) // 5)
    columns = -(-len(images) // rows)
    height = min(2.0, max(0.5, images[0].shape[0] / images[0].shape[1])) * PANEL_IN + 0.3
    fig = Figure(figsize=(PANEL_IN * max(columns, 2), height * rows + 0.35 + legend_in), dpi=DPI, layout="constrained")
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
    shades = np.clip((image - low) / (high - low), 0, 1) ** 0.6  # forest is dark: gamma lifts it
    opaque = (image > 0).all(axis=-1, keepdims=True)
    ax.add_patch(Rectangle((0, 0), width, height, facecolor="#d9d9d9", edgecolor="#a6a6a6", hatch="////", lw=0, zorder=0))
    ax.imshow(np.concatenate([shades, opaque], axis=-1), extent=(0, width, height, 0), interpolation="antialiased", zorder=1)
    ax.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    ax.spines[:].set_color("#888888")


def _outline(ax: Axes, mine: npt.NDArray[np.bool_], colour: str, width: float) -> None:
    """The pixel edges between mine and not mine, in the coordinates of `_show`."""
    framed = np.pad(mine, 1)
    y, x = np.nonzero(framed[1:-1, 1:] != framed[1:-1, :-1])
    upright = np.stack([np.stack([x, y], -1), np.stack([x, y + 1], -1)], axis=1)
    y, x = np.nonzero(framed[1:, 1:-1] != framed[:-1, 1:-1])
    level = np.stack([np.stack([x, y], -1), np.stack([x + 1, y], -1)], axis=1)
    edges = np.concatenate([upright, level])
    ax.add_collection(LineCollection(list(edges), colors=colour, linewidths=width, capstyle="round", zorder=2))


def _scale_bar(ax: Axes, pixel_m: float, shape: tuple[int, ...]) -> None:
    height, width = shape[:2]
    fitting = [m for m in (100, 200, 500, 1000, 2000, 5000, 10_000, 20_000) if m <= 0.4 * width * pixel_m]
    metres = fitting[-1] if fitting else int(pixel_m)
    long, thick, left, top = metres / pixel_m, 0.015 * height, 0.05 * width, 0.93 * height
    ax.add_patch(Rectangle((left, top), long, thick, facecolor="white", edgecolor="black", lw=0.6, zorder=4))
    text = f"{metres / 1000:g} km" if metres >= 1000 else f"{metres} m"
    behind = {"facecolor": "black", "alpha": 0.45, "edgecolor": "none", "pad": 1.5}
    ax.text(left + long / 2, top - thick, text, color="white", fontsize=8, ha="center", va="bottom", bbox=behind, zorder=4)


def _legend(fig: Figure, lines: Sequence[Line2D]) -> None:
    # On dark ground, as they are over the imagery: on white, cyan is hard to see.
    legend = fig.legend(handles=lines, loc="outside lower center", ncols=len(lines), fontsize=9, labelcolor="white")
    legend.get_frame().set(facecolor="#414b3d", edgecolor="none", alpha=1)


def _save(fig: Figure, out: Path) -> None:
    """Write the PNG under another name and rename it: a reader finds the whole picture or none."""
    drawn = io.BytesIO()
    fig.savefig(drawn, format="png")
    part = out.with_name(f".{os.getpid()}.part.{out.name}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(drawn.getbuffer())
        part.replace(out)
    except OSError as error:
        raise CubeError(f"{out}: cannot be written ({error.strerror}); mend that and draw again") from error
    finally:
        for left in out.parent.glob(f".*.part.{glob.escape(out.name)}"):  # of this run or of an earlier one that was killed
            left.unlink(missing_ok=True)
