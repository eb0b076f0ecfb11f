"""Scenes that lie beside the others: the shift of each against what all show where they are clear, from its edges.

edges       The gradient of one band as a complex number, its angle doubled and its length cut short: where a border lies
            and which way it runs, not which side is brighter nor by how much (Fitch et al. 2002, orientation correlation,
            BMVC; doubled angles: Bigun and Granlund 1987, ICCV). A field that is ploughed, a season or haze turns or
            fades contrasts, and moves no border.
clear       Only ground that SCL calls clear, 40 m inside it; all else is 0 and correlates with nothing. Nothing is filled
            in, since what is filled in lies where the reference does and would draw shifts to 0.
reference   The mean of the edges of the scenes so far, each put back by its shift: borders that last add up, those of one
            date fade, and patches that are pieced together leave no seams as brightness would. The clearest scene comes
            first; then each is compared again with the mean of all others.
peak        The correlation over shifts of up to 8 pixels either way; a parabola through the nine values at its peak tells
            the tenths. Where another peak is nearly as high, as over water, along one lone border or under cloud, the shift
            is not told.
zero        Nobody knows where a place really lies, and the first reference may be what is shifted: zero is the median of
            the shifts that lie within 10 m of the scene that is nearest to all others. So shifts are of scenes against
            most scenes of their year, and one that shifts all of them alike is not seen.
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
"""Item property: [east, north] in metres; read on a grid moved by as much, the scene's pixels lie on the others'."""
_BANDS = ("B04", "B03", "B08", "B02", "B05", "B8A", "B06", "B07", "B11", "B12")
"""In order of preference, among the finest: red tells soil from leaves and is not hazy as blue is."""
_HIDDEN = (0, 1, 3, 8, 9, 10, 11)  # SCL: no data, defective, shadow, cloud, cirrus, snow
_WINDOW = 510  # pixels a side: of a larger site, the middle
_REACH, _FARTHEST = 8, 6  # pixels either way that are looked at, and the farthest shift believed; rules go up to 5
_FRINGE = 4  # pixels beside cloud and the window's edge that are not looked at: what SCL misses, and what a gradient sees
_SMOOTH = 0.5  # pixels, sigma before the gradient; 1 blurs borders and doubles errors
_STRONG = 0.9  # quantile of gradients at which an edge counts half, so that water and noise count little
_LEAST = 1000  # pixels that a scene and the reference must share; in a few hundred, some unlike ones look alike
# Measured on simulated pairs, some of them lakes or under 70 % cloud: of 988 unlike ones none passes both, and 3 pass the first
# alone; of 102 alike ones 81 are told, with errors of 0.06 pixels (median) to 0.2.
_DISTINCT, _STANDS_OUT = 0.5, 6.0
_APART = 3.5  # pixels from the peak at which another one is another one
_TOGETHER = 1.0  # pixels between scenes that agree
_STARTS = 3  # scenes to begin with, should the first be like no other

Bool = npt.NDArray[np.bool_]
Complex = npt.NDArray[np.complex64]
Float = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]
UInt16 = npt.NDArray[np.uint16]


@dataclass(frozen=True, kw_only=True)
class Shift:
    """How far one scene lies beside the others of its year."""

    scene: str
    dx_m: float | None
    """Metres that its content lies too far east; None where that cannot be told, and then `dy_m`, too."""
    dy_m: float | None
    """The same, north."""
    peak: float | None
    """By which share the correlation's peak stands above any other, 0..1; one below a half is not believed. None where nothing
    was compared."""
    pixels: int
    """Clear pixels that it was told from."""

    def __str__(self) -> str:
        if self.dx_m is None or self.dy_m is None:
            return f"{self.scene}: whether it lies beside the others cannot be told from {self.pixels} clear pixels"
        return f"{self.scene}: lies {self.dx_m:+.1f} m east and {self.dy_m:+.1f} m north of the others"

    @property
    def distance_m(self) -> float:
        """How far that is; 0 where it cannot be told: nobody is accused then."""
        return math.hypot(self.dx_m or 0.0, self.dy_m or 0.0)


def shifts(scenes: Sequence[pystac.Item], grid: GeoBox, ledger: Ledger | None = None) -> list[Shift]:
    """One shift a scene, in the order given; reads SCL of each in the middle of the site, and one band where that is clear.

    Raises:
        ReadError: a pixel that cannot be read, where the ledger does not allow it.
    """
    shared = [b for b in _BANDS if all(b in s.assets for s in scenes)]
    if not scenes or not shared:
        return [Shift(scene=s.id, dx_m=None, dy_m=None, peak=None, pixels=0) for s in scenes]
    band, size_m = _finest(scenes, shared)
    edges = _read(scenes, band, at_resolution(_middle(grid), size_m), ledger)
    moved, peaks = compared(edges)
    found = []
    for scene, seen, (east, north), peak in zip(scenes, edges, (moved * size_m).tolist(), peaks.tolist(), strict=True):
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


def registered(scenes: Sequence[pystac.Item], found: Sequence[Shift], rule: Registration) -> list[pystac.Item]:
    """Keep the scenes beyond the rule, leave them out, or mark them to be read where they lie; the log names them.

    Those marked are copies that carry `SHIFT`. Both axes and all bands move by exactly that, which no file's pixels are
    multiples of, so that they are resampled: whole pixels, which a band of 20 m has every 20 m, could leave 10 m of it.
    """
    done = {"record": "kept as it is", "drop": "left out", "shift": "read where it lies"}[rule.beyond]
    kept = []
    for scene, shift in zip(scenes, found, strict=True):
        if shift.distance_m <= rule.most_px * PIXEL_M:
            kept.append(scene)
            continue
        # Metres are usual until 2021, and mended by a shift.
        log.log(logging.INFO if rule.beyond == "shift" else logging.WARNING, "%s (%s)", shift, done)
        if rule.beyond == "record":
            kept.append(scene)
        elif rule.beyond == "shift":
            marked = scene.clone()
            marked.properties[SHIFT] = [round(shift.dx_m or 0.0, 1), round(shift.dy_m or 0.0, 1)]
            kept.append(marked)
    return kept


def as_rows(found: Sequence[Shift]) -> list[dict[str, Any]]:
    """Shifts as plain JSON, for provenance: metres to a tenth."""
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
    """The shifts of all scenes, by the module's rule.

    Args:
        edges: of each scene, as `edges_of` gives them, all of one shape.

    Returns:
        float64 [scene, 2], pixels east and north, NaN where not told; float64 [scene], how distinct the peak is, 0..1, NaN
        where nothing was compared.
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
        # From here on most lie at no shift, where nothing is resampled; a first scene that lies half a pixel beside would have
        # all others read off between two values of the correlation, where a parabola is least exact.
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
    """Where borders lie and which way they run, complex64 [y, x], at most 1 long; 0 where not clear."""
    inside = ndimage.binary_erosion(clear, np.ones((3, 3)), iterations=_FRINGE)
    if not inside.any():
        return np.zeros(pixels.shape, dtype=np.complex64)
    north, east = np.gradient(ndimage.gaussian_filter(pixels.astype(np.float32), _SMOOTH))
    power = north**2 + east**2
    strong = np.quantile(power[inside], _STRONG) + np.float32(1e-6)
    edges: Complex = np.where(inside, (east + 1j * north) ** 2 / (power + strong), 0).astype(np.complex64)
    return edges


class Mean:
    """The running reference: sums of edges [y, x] that were put back where they belong, and how many."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.sum, self.count = np.zeros(shape, dtype=np.complex64), np.zeros(shape, dtype=np.float32)

    def add(self, edges: Complex, shift: Floats, times: int = 1) -> None:
        """Add a scene's edges, put back by its shift, pixels east and north; or take them away, `times` -1."""
        seen, (height, width) = (edges != 0).astype(np.float32), edges.shape
        for (down, of_row), (right, of_column) in itertools.product(_whole(shift[1]), _whole(-shift[0])):  # rows go south
            to = np.s_[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)]
            source = np.s_[max(-down, 0) : height + min(-down, 0), max(-right, 0) : width + min(-right, 0)]
            weight = np.float32(times * of_row * of_column)
            self.sum[to] += weight * edges[source]
            self.count[to] += weight * seen[source]

    def edges(self) -> Complex:
        """Their mean, complex64 [y, x], 0 where there are none."""
        some = self.count > 0.5  # half a pixel of one, what bilinear weights leave
        mean: Complex = np.where(some, self.sum / np.maximum(self.count, np.float32(0.5)), 0)
        return mean


def _whole(shift: float) -> tuple[tuple[int, float], tuple[int, float]]:
    """A shift in pixels as the two whole ones around it and their shares: bilinear, and far faster than `ndimage.shift`."""
    below = math.floor(shift)
    return (below, below + 1 - shift), (below + 1, shift - below)


def shift_of(edges: Complex, reference: Complex) -> tuple[Floats, float]:
    """By how much edges lie east and north of a reference, in pixels, NaN if not told; and how distinct the peak is, 0..1."""
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
    """How alike the pixels are that both have, -1..1, at each whole shift: float32 [2 * `_REACH` + 1, the same].

    No shift is in the middle; what lies further down or right of it is for edges that do.
    """
    shape = [fft.next_fast_len(n + _REACH) for n in edges.shape]  # what leaves at one side must not come in at the other
    shifts = np.ix_(*[np.arange(-_REACH, _REACH + 1)] * 2)

    def sums(ours: Float, theirs: Float) -> Float:
        both: Float = fft.irfft2(fft.rfft2(ours, shape) * fft.rfft2(theirs, shape).conj(), shape)[shifts]
        return both

    product = fft.ifft2(fft.fft2(edges, shape) * fft.fft2(reference, shape).conj())[shifts].real
    (our_power, ours), (their_power, theirs) = ((np.abs(e) ** 2, (e != 0).astype(np.float32)) for e in (edges, reference))
    power = sums(our_power, theirs) * sums(ours, their_power)
    # Where hardly any pixels meet, power is rounding, by which nothing must be divided.
    least = np.float32(1e-3) * power.max() + np.float32(1e-9)
    alike: Float = product / np.sqrt(np.maximum(power, least))
    return alike


def vertex(nine: Float) -> tuple[float, float]:
    """Where a parabola through [3, 3] values, in least squares, is highest: columns and rows from the middle, 1 at most."""
    x = np.array([-1.0, 0.0, 1.0])
    columns, rows = nine.sum(axis=0), nine.sum(axis=1)
    slope = np.array([columns @ x, rows @ x]) / 6
    bend_x, bend_y = columns @ x**2 - 2 / 3 * columns.sum(), rows @ x**2 - 2 / 3 * rows.sum()
    bend = np.array([[bend_x, x @ nine @ x / 4], [x @ nine @ x / 4, bend_y]])
    if bend_x >= 0 or np.linalg.det(bend) <= 0:
        return 0.0, 0.0  # not a summit
    right, down = np.clip(-np.linalg.solve(bend, slope), -1, 1).tolist()
    return right, down


def zero_of(moved: Floats) -> Floats:
    """Where shifts [scene, 2], the clearest first, are counted from: [2], by the module's rule."""
    apart = np.linalg.norm(moved[:, None] - moved[None], axis=-1)
    near = apart[apart.sum(axis=1).argmin()] <= _TOGETHER  # of two scenes as near, the clearer
    zero: Floats = np.median(moved[near], axis=0)
    return zero


def _chain(edges: Sequence[Complex], order: Sequence[int]) -> dict[int, Floats]:
    """The shifts that are told when scenes are compared one after another with the mean of those before."""
    mean, told = Mean(edges[order[0]].shape), {order[0]: np.zeros(2)}
    mean.add(edges[order[0]], np.zeros(2))
    for n in order[1:]:
        shift, _ = shift_of(edges[n], mean.edges())
        if np.isfinite(shift[0]):
            told[n] = shift
            mean.add(edges[n], shift)
    return told


def _finest(scenes: Sequence[pystac.Item], bands: Sequence[str]) -> tuple[str, int]:
    """The finest of bands that all scenes have, of equals the first; and the pixel size in metres that all have it at."""
    sizes = [max(int(s.assets[b].extra_fields["gsd"]) for s in scenes) for b in bands]
    return min(zip(bands, sizes, strict=True), key=lambda band: band[1])


def _middle(grid: GeoBox) -> GeoBox:
    """The grid, or its middle where it is larger than `_WINDOW` pixels, from a multiple of 60 m to another."""
    step = ALIGN_M // PIXEL_M
    first = [max(n - _WINDOW, 0) // 2 // step * step for n in grid.shape]
    rows, columns = (slice(a, min(a + _WINDOW, n)) for a, n in zip(first, grid.shape, strict=True))
    middle: GeoBox = grid[rows, columns]
    return middle


def _read(scenes: Sequence[pystac.Item], band: str, grid: GeoBox, ledger: Ledger | None) -> list[Complex]:
    """The edges of each scene [y, x]; of those with too little clear ground the band is not read, and all are 0."""
    masks = _results([begin(s, SCL, grid, ledger) for s in scenes])
    clear = [~np.isin(scl, _HIDDEN) for scl in masks]
    use = [n for n, c in enumerate(clear) if np.count_nonzero(c) >= _LEAST]
    pixels = dict(zip(use, _results([begin(scenes[n], band, grid, ledger) for n in use]), strict=True))
    nothing = np.zeros(grid.shape, dtype=np.complex64)
    return [edges_of(pixels[n], c & (pixels[n] != 0)) if n in pixels else nothing for n, c in enumerate(clear)]


def _results(reads: Sequence[Future[UInt16]]) -> list[UInt16]:
    """What was read; where one fails, those not yet begun are given up."""
    try:
        return [read.result() for read in reads]
    finally:
        for read in reads:
            read.cancel()
