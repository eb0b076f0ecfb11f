"""Draw true-colour images side by side: years of a cube, or images of one place.

All images of one picture share one stretch, so their brightness is comparable. Pixels without
observation are hatched grey, since black looks like water. Outlines are cyan and magenta. These
differ in lightness and hue, and colour-blind readers can distinguish them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.transforms import Affine2D, Transform

from minecube.arrays import Bool, Float64, UInt16
from minecube.codes import MINE
from minecube.errors import CubeError
from minecube.report.style import DPI, INK, PANEL_IN, UNOBSERVED, save

OUTLINES = (("#00f0ff", 2.2), ("#ff00c8", 1.0))
"""Colour and width in points of the first and second footprint.

The thin second line is drawn on the broad first.
"""
TRUE_COLOUR = ["B04", "B03", "B02"]
_TITLE_IN = 0.35
_CAPTION_IN = 0.3
_EDGE_IN = 0.08
_BAR_M = (100, 200, 500, 1000, 2000, 5000, 10_000, 20_000)
"""Lengths of scale bars."""
_TITLE_GAP_PT = 5
_COLUMN_IN = PANEL_IN - _EDGE_IN
_TALLEST_IN = 2 * PANEL_IN


@dataclass(frozen=True)
class _Panel:
    """An image within the axes of a picture, whose unit is an inch from the upper left corner."""

    axes: Axes
    cell_in: float
    """Left side of its column. Titles span the column, since an image may be narrow."""
    left_in: float
    top_in: float
    pixel_in: float
    """Side of a pixel."""
    frame: Rectangle
    """The edge of the image, in pixels."""

    @property
    def transform(self) -> Transform:
        """From pixels of the image to the screen."""
        inches = Affine2D().scale(self.pixel_in).translate(self.left_in, self.top_in)
        return inches + self.axes.transData

    def set_title(self, text: str, loc: str = "center", **style: Any) -> None:
        """Write a title above the image: "left", "center" or "right"."""
        share = {"left": 0.0, "center": 0.5, "right": 1.0}[loc]
        x = self.cell_in + share * _COLUMN_IN
        y = self.top_in - _TITLE_GAP_PT / 72
        self.axes.text(x, y, text, ha=loc, fontsize=10, color=INK, **style)


def draw_strip(
    cube: xr.Dataset, footprints: Mapping[str, xr.DataArray], out: Path, title: str
) -> None:
    """Write a PNG with one true-colour panel per year and outlines of the footprints.

    Years without data are hatched.

    Args:
        cube: Variables reflectance (year, band, y, x) uint16, 0 = no observation, and clear_count
            (year, y, x).
        footprints: Name in the legend -> (year, y, x), 1 mine, on the cube's grid. At most two;
            years may be missing.

    Raises:
        CubeError: A band of true colour is missing, a footprint has another grid, or the file
            cannot be written.
    """
    years = [int(year) for year in cube.year.to_numpy()]
    images = [_read_rgb(cube.reflectance.sel(year=year), f"year {year}") for year in years]
    for name, footprint in footprints.items():
        if footprint.shape[-2:] != images[0].shape[:2]:
            expected = " x ".join(map(str, images[0].shape[:2]))
            raise CubeError(
                f"{title}: expected footprint {name!r} of {expected} px like the cube, "
                f"found {' x '.join(map(str, footprint.shape[-2:]))}; use the cube's grid"
            )
    styles = dict(zip(footprints, OUTLINES, strict=False))
    figure, panels = _draw_panels(images, title, legend_in=0.35 * bool(footprints))
    for panel, year, image in zip(panels, years, images, strict=True):
        dates = "no observation"
        if image.any():
            dates = f"{np.median(cube.clear_count.sel(year=year)):.0f} clear dates"
        panel.set_title(str(year), loc="left", fontweight="bold")
        panel.set_title(dates, loc="right")
    for name, (colour, width) in styles.items():
        masks = {
            int(year): mask
            for year, mask in zip(
                footprints[name].year, footprints[name].to_numpy() == MINE, strict=True
            )
        }
        _draw_outlines(panels, [masks.get(year) for year in years], colour, width)
    _draw_scale_bar(panels[0], abs(float(cube.x[1] - cube.x[0])), images[0].shape)
    if styles:
        _draw_legend(figure, styles)
    save(figure, out)


def draw_comparison(images: Mapping[str, xr.DataArray], out: Path, title: str) -> None:
    """Write a PNG with true-colour images of one place side by side, in one stretch.

    The images map a caption to reflectance (band, y, x) uint16, 0 = no observation, all of one
    shape.

    Raises:
        CubeError: A band of true colour is missing, shapes differ, or the file cannot be written.
    """
    rgb = [_read_rgb(image, caption) for caption, image in images.items()]
    shapes = {caption: image.shape[:2] for caption, image in zip(images, rgb, strict=True)}
    if len(set(shapes.values())) > 1:
        raise CubeError(
            f"{title}: expected images of one shape, found {shapes}; cut them to one grid"
        )
    figure, panels = _draw_panels(rgb, title, legend_in=0)
    for panel, caption in zip(panels, images, strict=True):
        panel.set_title(caption)
    x = next(iter(images.values())).x
    _draw_scale_bar(panels[0], abs(float(x[1] - x[0])), rgb[0].shape)
    save(figure, out)


def _read_rgb(reflectance: xr.DataArray, name: str) -> UInt16:
    """Return red, green and blue (y, x, 3) uint16. A pixel is 0 in all three if one band is 0."""
    missing = [band for band in TRUE_COLOUR if band not in reflectance.band]
    if missing:
        raise CubeError(
            f"{name}: expected the bands {', '.join(TRUE_COLOUR)} for true colour, "
            f"found no {', '.join(missing)}; build the cube with them"
        )
    image: UInt16 = reflectance.sel(band=TRUE_COLOUR).transpose("y", "x", "band").to_numpy()
    return image * (image > 0).all(axis=-1, keepdims=True)


def _draw_panels(
    images: Sequence[UInt16], title: str, legend_in: float
) -> tuple[Figure, list[_Panel]]:
    """Draw the images in rows of at most five; leave `legend_in` inches for a legend.

    All share one `Axes`. With axes of their own, a picture of ten years takes half as long again.
    """
    rows = -(-len(images) // 5)
    columns = -(-len(images) // rows)
    height_px, width_px = images[0].shape[:2]
    pixel_in = min(_COLUMN_IN / width_px, _TALLEST_IN / height_px)
    row_in = height_px * pixel_in + _EDGE_IN
    width_in = PANEL_IN * max(columns, 2) + _EDGE_IN
    height_in = _TITLE_IN + (_CAPTION_IN + row_in) * rows + legend_in
    figure = Figure(figsize=(width_in, height_in), dpi=DPI)
    figure.suptitle(title, y=1 - 0.08 / height_in, fontsize=12, color=INK, fontweight="bold")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width_in), ylim=(height_in, 0))
    axes.set_axis_off()
    margin_in = (width_in - columns * PANEL_IN - _EDGE_IN) / 2
    limits = _find_limits(images)
    panels = []
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        cell_in = margin_in + _EDGE_IN + column * PANEL_IN
        left_in = cell_in + (_COLUMN_IN - width_px * pixel_in) / 2
        top_in = _TITLE_IN + _CAPTION_IN + row * (_CAPTION_IN + row_in)
        frame = Rectangle((0, 0), width_px, height_px, fill=False, ec="#888888", lw=0.8, zorder=3)
        panel = _Panel(axes, cell_in, left_in, top_in, pixel_in, frame)
        _draw_image(panel, image, limits)
        panels.append(panel)
    return figure, panels


def _find_limits(images: Sequence[UInt16]) -> tuple[float, float]:
    """Return the darkest and brightest value shown.

    Both are the lowest over the images, so clouds in one image do not darken the others.
    """
    limits = [np.percentile(image[image > 0], (0.5, 99)) for image in images if image.any()]
    if not limits:
        return 0.0, 1.0
    low, high = np.min(limits, axis=0)
    return float(low), float(max(high, low + 1))


def _draw_image(panel: _Panel, image: UInt16, limits: tuple[float, float]) -> None:
    height, width = image.shape[:2]
    low, high = limits
    shades = np.clip((image - low) / (high - low), 0, 1) ** 0.6  # gamma brightens dark forest
    opaque = (image > 0).all(axis=-1, keepdims=True)
    rgba = np.concatenate([shades, opaque], axis=-1)
    ground = Rectangle((0, 0), width, height, lw=0, zorder=0, **UNOBSERVED)
    for patch in (ground, panel.frame):
        patch.set_transform(panel.transform)
        panel.axes.add_patch(patch)
    right_in = panel.left_in + width * panel.pixel_in
    bottom_in = panel.top_in + height * panel.pixel_in
    panel.axes.imshow(
        np.rint(255 * rgba).astype(np.uint8),
        extent=(panel.left_in, right_in, bottom_in, panel.top_in),
        aspect="auto",
        interpolation="antialiased",
        zorder=1,
    )


def _draw_outlines(
    panels: Sequence[_Panel], masks: Sequence[Bool | None], colour: str, width: float
) -> None:
    """Draw the pixel edges between mine and background of each panel with a mask."""
    edges = []
    for panel, mine in zip(panels, masks, strict=True):
        if mine is not None:
            corner_in = (panel.left_in, panel.top_in)
            edges.append(_find_edges(mine) * panel.pixel_in + corner_in)
    if edges:
        lines = LineCollection(
            list(np.concatenate(edges)),
            colors=colour,
            linewidths=width,
            capstyle="round",
            zorder=2,
        )
        panels[0].axes.add_collection(lines, autolim=False)


def _find_edges(mine: Bool) -> Float64:
    """Return the edges between mine and background: two corners (x, y) each, in pixels."""
    framed = np.pad(mine, 1)
    y, x = np.nonzero(framed[1:-1, 1:] != framed[1:-1, :-1])
    upright = np.stack([np.stack([x, y], -1), np.stack([x, y + 1], -1)], axis=1)
    y, x = np.nonzero(framed[1:, 1:-1] != framed[:-1, 1:-1])
    level = np.stack([np.stack([x, y], -1), np.stack([x + 1, y], -1)], axis=1)
    return np.concatenate([upright, level]).astype(np.float64)


def _draw_scale_bar(panel: _Panel, pixel_m: float, shape: tuple[int, ...]) -> None:
    """Draw a bar of a round length, at most 40 % of the image's width."""
    height, width = shape[:2]
    metres = int(pixel_m)
    for length in _BAR_M:
        if length <= 0.4 * width * pixel_m:
            metres = length
    text = f"{metres} m"
    if metres >= 1000:
        text = f"{metres / 1000:g} km"
    bar_px = metres / pixel_m
    x = 0.05 * width
    y = 0.93 * height
    thickness = 0.015 * height
    style: dict[str, Any] = {"transform": panel.transform, "zorder": 4}
    panel.axes.add_patch(
        Rectangle((x, y), bar_px, thickness, fc="white", ec="black", lw=0.6, **style)
    )
    style |= {"color": "white", "fontsize": 8, "ha": "center", "va": "bottom"}
    box = {"facecolor": "black", "alpha": 0.45, "edgecolor": "none", "pad": 1.5}
    panel.axes.text(x + bar_px / 2, y - thickness, text, bbox=box, **style)


def _draw_legend(figure: Figure, styles: Mapping[str, tuple[str, float]]) -> None:
    lines = [
        Line2D([], [], color=colour, lw=width + 0.8, label=name)
        for name, (colour, width) in styles.items()
    ]
    legend = figure.legend(
        handles=lines, loc="lower center", ncols=len(lines), fontsize=9, labelcolor="white"
    )
    # A dark background, like the imagery: cyan is hard to see on white.
    legend.get_frame().set(facecolor="#414b3d", edgecolor="none", alpha=1)
