"""Displacement of each scene from the others, measured from edges of clear ground.

Edges       The gradient of one band as a complex number, with doubled angle and limited length. It has
            the position and direction of a border, without its polarity and contrast (Fitch et al. 2002,
            orientation correlation, BMVC; doubled angles: Bigun and Granlund 1987, ICCV). Ploughing,
            seasons and haze turn or fade contrasts, but do not move borders.
Clear       Ground called clear by SCL, at least 4 pixels from other ground. All else is 0 and does not
            correlate. Gaps are not filled in: the fill would lie in the same place as the
            reference's and bias shifts towards 0.
Reference   The mean of the edges of the scenes so far, each corrected by its shift. Lasting borders
            add up, and borders of one date fade. A mosaic of edges has no seams, unlike one of brightness.
            The clearest scene comes first. Later, each scene is compared with the mean of all others.
Peak        The correlation over shifts of up to 8 pixels in each direction. A parabola through the nine
            values at its peak gives tenths of a pixel. If another peak is nearly as high, the shift is
            unknown. This happens over water, along a single border or under cloud.
Zero        The true position of a place is unknown, and the first reference may be the displaced scene.
            Zero is the median of the shifts within 1 pixel of the scene nearest to all others. So
            shifts are relative to most scenes of the year. A common shift of all scenes is not detected.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pystac
from odc.geo.geobox import GeoBox
from scipy import fft, ndimage

from minecube.catalog import SCL, Registration
from minecube.grid import ALIGN_M, PIXEL_M, at_resolution
from minecube.reader import Ledger, begin

log = logging.getLogger(__name__)

SHIFT = "minecube:shift_m"
"""Item property: [east, north] in metres. Reads on a grid moved by this shift align the scene
with the others."""
_BANDS = ("B04", "B03", "B08", "B02", "B05", "B8A", "B06", "B07", "B11", "B12")
"""Bands in order of preference among the finest. Red separates soil from leaves and is less hazy
than blue."""
_HIDDEN = (0, 1, 3, 8, 9, 10, 11)  # SCL: no data, defective, shadow, cloud, cirrus, snow
_WINDOW = 510  # side in pixels; larger sites are read in their middle only
_REACH, _FARTHEST = 8, 6  # pixels: search range, longest accepted shift; rules allow up to 5
_FRINGE = 4  # unused pixels next to cloud (SCL misses some) and the window's edge (gradients)
_SMOOTH = 0.5  # pixels, sigma before the gradient; 1 blurs borders and doubles errors
_STRONG = 0.9  # quantile of gradients with half weight; water and noise get little weight
_LEAST = 1000  # least pixels shared with the reference; a few hundred can match by chance
# Measured on simulated pairs, including lakes and 70 % cloud. Of 988 different pairs none passes both
# limits, and 3 pass the first one. Of 102 matching pairs 81 are measured, with errors of 0.06 pixels
# (median) to 0.2.
_DISTINCT, _STANDS_OUT = 0.5, 6.0
_APART = 3.5  # pixels from the peak; a separate peak is farther away
_TOGETHER = 1.0  # greatest distance in pixels between agreeing scenes
_STARTS = 3  # first scenes to try, in case the first one matches no other

Bool = npt.NDArray[np.bool_]
Complex = npt.NDArray[np.complex64]
Float = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]
UInt16 = npt.NDArray[np.uint16]


@dataclass(frozen=True, kw_only=True)
class Shift:
    """Displacement of one scene from the others of its year."""

    scene: str
    dx_m: float | None
    """Displacement of its content to the east in metres; None if unknown, as is `dy_m` then."""
    dy_m: float | None
    """Displacement to the north in metres."""
    peak: float | None
    """Share by which the correlation's peak exceeds any other peak, 0..1. Shifts with a share
    below a half are rejected. None if nothing was compared."""
    pixels: int
    """Number of clear pixels used."""

    def __str__(self) -> str:
        if self.dx_m is None or self.dy_m is None:
            return f"{self.scene}: its displacement is unknown, from {self.pixels} clear pixels"
        return (
            f"{self.scene}: lies {self.dx_m:+.1f} m east and {self.dy_m:+.1f} m north of the others"
        )

    @property
    def distance_m(self) -> float:
        """Length of the displacement in metres; 0 if unknown, so the scene is kept."""
        return math.hypot(self.dx_m or 0.0, self.dy_m or 0.0)


def shifts(
    scenes: Sequence[pystac.Item], grid: GeoBox, ledger: Ledger | None = None
) -> list[Shift]:
    """Measure one shift per scene, in the given order.

    Reads SCL of each scene in the middle of the site, and one band of scenes with enough clear
    ground.

    Raises:
        ReadError: A pixel cannot be read, and the ledger does not allow this.
    """
    shared = [b for b in _BANDS if all(b in s.assets for s in scenes)]
    if not scenes or not shared:
        return [Shift(scene=s.id, dx_m=None, dy_m=None, peak=None, pixels=0) for s in scenes]
    band, size_m = _finest(scenes, shared)
    edges = _read(scenes, band, at_resolution(_middle(grid), size_m), ledger)
    moved, peaks = compared(edges)
    found = []
    for scene, seen, (east, north), peak in zip(
        scenes, edges, (moved * size_m).tolist(), peaks.tolist(), strict=True
    ):
        told = not math.isnan(east)
        found.append(
            Shift(
                scene=scene.id,
                dx_m=east if told else None,
                dy_m=north if told else None,
                peak=None if math.isnan(peak) else peak,
                pixels=int(np.count_nonzero(seen)),
            )
        )
    return found


def registered(
    scenes: Sequence[pystac.Item], found: Sequence[Shift], rule: Registration
) -> list[pystac.Item]:
    """Keep, drop or mark the scenes displaced by more than the rule allows, and log their names.

    Marked scenes are copies with `SHIFT`, read at their corrected position. Both axes and all bands
    move by exactly this shift. It is no multiple of a file's pixel size, so the bands are
    resampled. Shifts by whole pixels could leave an error of 10 m in a 20 m band.
    """
    done = {"record": "kept as it is", "drop": "left out", "shift": "read where it lies"}[
        rule.beyond
    ]
    kept = []
    for scene, shift in zip(scenes, found, strict=True):
        if shift.distance_m <= rule.most_px * PIXEL_M:
            kept.append(scene)
            continue
        # Displacements of metres are usual until 2021, and a shift corrects them.
        log.log(logging.INFO if rule.beyond == "shift" else logging.WARNING, "%s (%s)", shift, done)
        if rule.beyond == "record":
            kept.append(scene)
        elif rule.beyond == "shift":
            marked = scene.clone()
            marked.properties[SHIFT] = [round(shift.dx_m or 0.0, 1), round(shift.dy_m or 0.0, 1)]
            kept.append(marked)
    return kept


def as_rows(found: Sequence[Shift]) -> list[dict[str, Any]]:
    """Convert shifts to plain JSON for provenance, with metres rounded to tenths."""
    return [
        {
            "scene": s.scene,
            "dx_m": None if s.dx_m is None else round(s.dx_m, 1),
            "dy_m": None if s.dy_m is None else round(s.dy_m, 1),
            "peak": None if s.peak is None else round(s.peak, 2),
            "pixels": s.pixels,
        }
        for s in found
    ]


def compared(edges: Sequence[Complex]) -> tuple[Floats, Floats]:
    """Measure the shifts of all scenes by the module's method.

    Args:
        edges: Edges of each scene from `edges_of`, all of one shape.

    Returns:
        float64 [scene, 2], pixels east and north, NaN = unknown.
        float64 [scene], distinctness of the peak, 0..1, NaN = not compared.
    """
    counts = np.array([np.count_nonzero(e) for e in edges])
    order = [n for n in np.argsort(-counts, kind="stable").tolist() if counts[n] >= _LEAST]
    told: dict[int, Floats] = {}
    for start in order[:_STARTS]:
        told = max(told, _chain(edges, [start, *(n for n in order if n != start)]), key=len)
        if 2 * len(told) > len(order):
            break
    moved, peaks = np.full((len(edges), 2), np.nan), np.full(len(edges), np.nan)
    if len(told) > 1:
        # From here on most scenes have no shift and are not resampled. If the first scene were displaced
        # by half a pixel, all other peaks would lie between two values of the correlation. There a
        # parabola is least exact.
        zero = zero_of(np.array(list(told.values())))
        told = {n: shift - zero for n, shift in told.items()}
        everyone = Mean(edges[0].shape)
        for n, shift in told.items():
            everyone.add(edges[n], shift)
        for n in order:
            if n in told:
                everyone.add(edges[n], told[n], -1)
            moved[n], peaks[n] = shift_of(edges[n], everyone.edges())
            if n in told:
                everyone.add(edges[n], told[n])
    known = [n for n in order if np.isfinite(moved[n, 0])]
    moved = moved - zero_of(moved[known]) if len(known) > 1 else np.full_like(moved, np.nan)
    return moved, peaks


def edges_of(pixels: UInt16, clear: Bool) -> Complex:
    """Compute position and direction of borders: complex64 [y, x], length at most 1, 0 = not
    clear."""
    inside = ndimage.binary_erosion(clear, np.ones((3, 3)), iterations=_FRINGE)
    if not inside.any():
        return np.zeros(pixels.shape, dtype=np.complex64)
    north, east = np.gradient(ndimage.gaussian_filter(pixels.astype(np.float32), _SMOOTH))
    power = north**2 + east**2
    strong = np.quantile(power[inside], _STRONG) + np.float32(1e-6)
    edges: Complex = np.where(inside, (east + 1j * north) ** 2 / (power + strong), 0).astype(
        np.complex64
    )
    return edges


class Mean:
    """The running reference: sums and counts of edges [y, x], each corrected by its shift."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.sum, self.count = (
            np.zeros(shape, dtype=np.complex64),
            np.zeros(shape, dtype=np.float32),
        )

    def add(self, edges: Complex, shift: Floats, times: int = 1) -> None:
        """Add a scene's edges, corrected by its shift in pixels east and north.

        `times` -1 removes them.
        """
        seen, (height, width) = (edges != 0).astype(np.float32), edges.shape
        for (down, of_row), (right, of_column) in itertools.product(
            _whole(shift[1]), _whole(-shift[0])
        ):  # rows go south
            to = np.s_[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)]
            source = np.s_[
                max(-down, 0) : height + min(-down, 0), max(-right, 0) : width + min(-right, 0)
            ]
            weight = np.float32(times * of_row * of_column)
            self.sum[to] += weight * edges[source]
            self.count[to] += weight * seen[source]

    def edges(self) -> Complex:
        """Return the mean edges, complex64 [y, x], 0 = none."""
        some = self.count > 0.5  # at least half a pixel, after bilinear weights
        mean: Complex = np.where(some, self.sum / np.maximum(self.count, np.float32(0.5)), 0)
        return mean


def _whole(shift: float) -> tuple[tuple[int, float], tuple[int, float]]:
    """Split a shift in pixels into the two nearest whole shifts and their weights.

    This is bilinear, and far faster than `ndimage.shift`.
    """
    below = math.floor(shift)
    return (below, below + 1 - shift), (below + 1, shift - below)


def shift_of(edges: Complex, reference: Complex) -> tuple[Floats, float]:
    """Measure the shift of edges from a reference, and the distinctness of the peak.

    The shift is in pixels east and north, NaN = unknown. Distinctness is 0..1.
    """
    if np.count_nonzero((edges != 0) & (reference != 0)) < _LEAST:
        return np.full(2, np.nan), 0.0
    surface = correlation(edges, reference)
    row, column = np.unravel_index(surface.argmax(), surface.shape)
    top = surface[row, column]
    rows, columns = np.indices(surface.shape)
    elsewhere = surface[np.hypot(rows - row, columns - column) > _APART]
    distinct = float(1 - max(elsewhere.max(), 0) / top) if top > 0 else 0.0
    if (
        math.hypot(row - _REACH, column - _REACH) > _FARTHEST
        or distinct < _DISTINCT
        or top - elsewhere.mean() < _STANDS_OUT * elsewhere.std()
    ):
        return np.full(2, np.nan), distinct
    right, down = vertex(surface[row - 1 : row + 2, column - 1 : column + 2])
    return np.array([column - _REACH + right, _REACH - row - down]), distinct


def correlation(edges: Complex, reference: Complex) -> Float:
    """Correlate edges with a reference at each whole shift: float32, -1..1.

    The shape is [2 * `_REACH` + 1, 2 * `_REACH` + 1]. Only pixels present in both count. The middle
    is no shift. Values below or right of it are for edges displaced in this direction.
    """
    shape = [
        fft.next_fast_len(n + _REACH) for n in edges.shape
    ]  # padded, so shifts do not wrap around
    shifts = np.ix_(*[np.arange(-_REACH, _REACH + 1)] * 2)

    def sums(ours: Float, theirs: Float) -> Float:
        both: Float = fft.irfft2(fft.rfft2(ours, shape) * fft.rfft2(theirs, shape).conj(), shape)[
            shifts
        ]
        return both

    product = fft.ifft2(fft.fft2(edges, shape) * fft.fft2(reference, shape).conj())[shifts].real
    (our_power, ours), (their_power, theirs) = (
        (np.abs(e) ** 2, (e != 0).astype(np.float32)) for e in (edges, reference)
    )
    power = sums(our_power, theirs) * sums(ours, their_power)
    # With hardly any common pixels, power is rounding error: do not divide by it.
    least = np.float32(1e-3) * power.max() + np.float32(1e-9)
    alike: Float = product / np.sqrt(np.maximum(power, least))
    return alike


def vertex(nine: Float) -> tuple[float, float]:
    """Find the maximum of a least-squares parabola through [3, 3] values.

    Returns columns and rows from the middle, at most 1.
    """
    x = np.array([-1.0, 0.0, 1.0])
    columns, rows = nine.sum(axis=0), nine.sum(axis=1)
    slope = np.array([columns @ x, rows @ x]) / 6
    bend_x, bend_y = columns @ x**2 - 2 / 3 * columns.sum(), rows @ x**2 - 2 / 3 * rows.sum()
    bend = np.array([[bend_x, x @ nine @ x / 4], [x @ nine @ x / 4, bend_y]])
    if bend_x >= 0 or np.linalg.det(bend) <= 0:
        return 0.0, 0.0  # not a maximum
    right, down = np.clip(-np.linalg.solve(bend, slope), -1, 1).tolist()
    return right, down


def zero_of(moved: Floats) -> Floats:
    """Compute the zero of shifts [scene, 2], clearest scene first: [2], by the module's method."""
    apart = np.linalg.norm(moved[:, None] - moved[None], axis=-1)
    near = apart[apart.sum(axis=1).argmin()] <= _TOGETHER  # among equally near scenes, the clearest
    zero: Floats = np.median(moved[near], axis=0)
    return zero


def _chain(edges: Sequence[Complex], order: Sequence[int]) -> dict[int, Floats]:
    """Measure the shift of each scene from the mean of the scenes before it, if possible."""
    mean, told = Mean(edges[order[0]].shape), {order[0]: np.zeros(2)}
    mean.add(edges[order[0]], np.zeros(2))
    for n in order[1:]:
        shift, _ = shift_of(edges[n], mean.edges())
        if np.isfinite(shift[0]):
            told[n] = shift
            mean.add(edges[n], shift)
    return told


def _finest(scenes: Sequence[pystac.Item], bands: Sequence[str]) -> tuple[str, int]:
    """Choose the finest band common to all scenes, and the pixel size in metres common to them.

    Among equal bands, the first is chosen.
    """
    sizes = [max(int(s.assets[b].extra_fields["gsd"]) for s in scenes) for b in bands]
    return min(zip(bands, sizes, strict=True), key=lambda band: band[1])


def _middle(grid: GeoBox) -> GeoBox:
    """Return the grid, or its middle if it is larger than `_WINDOW` pixels.

    The middle begins at a multiple of 60 m.
    """
    step = ALIGN_M // PIXEL_M
    first = [max(n - _WINDOW, 0) // 2 // step * step for n in grid.shape]
    rows, columns = (slice(a, min(a + _WINDOW, n)) for a, n in zip(first, grid.shape, strict=True))
    middle: GeoBox = grid[rows, columns]
    return middle


def _read(
    scenes: Sequence[pystac.Item], band: str, grid: GeoBox, ledger: Ledger | None
) -> list[Complex]:
    """Read the edges [y, x] of each scene.

    Scenes with too little clear ground get zeros, and their band is not read.
    """
    masks = _results([begin(s, SCL, grid, ledger) for s in scenes])
    clear = [~np.isin(scl, _HIDDEN) for scl in masks]
    use = [n for n, c in enumerate(clear) if np.count_nonzero(c) >= _LEAST]
    pixels = dict(
        zip(use, _results([begin(scenes[n], band, grid, ledger) for n in use]), strict=True)
    )
    nothing = np.zeros(grid.shape, dtype=np.complex64)
    return [
        edges_of(pixels[n], c & (pixels[n] != 0)) if n in pixels else nothing
        for n, c in enumerate(clear)
    ]


def _results(reads: Sequence[Future[UInt16]]) -> list[UInt16]:
    """Wait for all reads and return their pixels; if one fails, cancel those not yet begun."""
    try:
        return [read.result() for read in reads]
    finally:
        for read in reads:
            read.cancel()
