"""Colours, plain axes and PNG files of all pictures."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minecube.errors import CubeError
from minecube.files import replacing

INK = "#333333"
"""Colour of titles, labels and lines of reference."""
FAINT = "#777777"
"""Colour of text that explains."""
# Okabe and Ito's palette, safe for colour-blind eyes, with black as its last colour.
BLUE = "#0072b2"
VERMILION = "#d55e00"
GREEN = "#009e73"
PURPLE = "#cc79a7"
SKY_BLUE = "#56b4e9"
ORANGE = "#e69f00"
BLACK = "#222222"
UNOBSERVED: dict[str, Any] = {"facecolor": "#d9d9d9", "edgecolor": "#a6a6a6", "hatch": "////"}
"""Style of patches without data."""
PANEL_IN = 2.9
"""Width of a panel, in inches."""
DPI = 120


def strip_axes(ax: Axes) -> None:
    """Leave the left and the lower side of the axes, with horizontal grid lines."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#dddddd", lw=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=8, color=INK, labelcolor=INK)


def save(figure: Figure, out: Path) -> None:
    """Write the figure as PNG. Raises CubeError if the file cannot be written."""
    png = io.BytesIO()
    figure.savefig(png, format="png")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as draft:
            draft.write_bytes(png.getbuffer())
    except OSError as error:
        raise CubeError(
            f"{out}: cannot be written ({error.strerror}); solve this and draw again"
        ) from error
