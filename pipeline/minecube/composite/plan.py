"""Estimate of a site-year's reads, time and cost from scene list, grid and recipe.

The estimate reads no pixels. It counts requests per block, nearby scene and band. The first read of
a file needs one request for its header. Each row of file tiles in the block's window needs one
request, and all bytes of these tiles. The estimate is an upper bound. Bands of a scene without
clear pixels to use are not read, but only the pixels show this.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import pystac
import shapely
import yaml
from odc.geo.geobox import GeoBox

from minecube.arrays import Int64
from minecube.catalog import SCL, Recipe, describe_yaml_error
from minecube.composite.block import BLOCK_BYTES
from minecube.composite.needs import (
    LEAST_CUT_PX,
    MASK_M,
    are_cut,
    bands_with_fringe,
    compute_margins,
    count_connections,
    estimate_memory,
    pixel_size_of,
    scenes_near,
)
from minecube.errors import CatalogError
from minecube.grid import (
    CELL_PX,
    PIXEL_M,
    WINDOW_PX,
    add_windows,
    choose_windows,
    coarsen,
    iterate_blocks,
    pad,
)
from minecube.places import Place
from minecube.reader import HEAD_BYTES, READ_THREADS

_STORED: dict[int | str, float] = {10: 1.5, 20: 1.4, SCL: 0.06}
"""Bytes per pixel in the files, used if the item does not list the file size. Real Collection 1
items have 0.5 to 2.4, and SCL 0.02 to 0.09."""
_OVERVIEWS = 0.75  # share of the full resolution in the bytes of a file with overviews
_CPU_S_PER_MB = 0.009
"""Core-seconds to inflate a megabyte. Fitted to medians of 1024 px from 20 and 40 dates, with
errors up to a quarter (on a cloud server of 2026; your machine's speed differs)."""
_CPU_S_PER_MPX = 0.010
"""Core-seconds to mask and reduce a million pixels, fitted likewise. Geomedians take several times
as long."""
_CPU_S_PER_READ = 0.005
"""Core-seconds to open a file and place a window of it. A guess from small builds."""
_CPU_S_PER_SITE_YEAR = 0.5
"""Core-seconds to begin, check and commit a site-year. A guess from small builds."""
START_S = 3.0
"""Start-up time of a command in seconds."""
_OFFSET_BANDS = 4
"""Reads per scene and window, SCL included, to check its offset (`scenes.looks`)."""
_REGISTRATION_BANDS = 2
"""Reads per scene, SCL included, to check its position (`composite.registration`)."""
_RED = "B04"  # both checks share one read of it if it has 10 m, and the site has one window
_ROOM_PX = WINDOW_PX + 2  # with twice as much, a window fits into a tile of at least as much
BASE_BYTES = 100_000_000
"""Memory for the buffers of the reading threads, in `Estimate.block_bytes`."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Speed and prices of the machine for a build; `--prices FILE` may set any of them."""

    latency_s: float = 0.05
    """Seconds from a request to the first byte of its answer."""
    mb_per_s: float = 50.0
    """Network speed in megabytes per second."""
    cores: int = 2
    currency: str = "USD"
    per_1000_requests: float | None = None
    per_gb: float | None = None
    """Price per gigabyte read: data leaving a provider's region."""
    per_core_hour: float | None = None

    @classmethod
    def load(cls, path: Place) -> Terms:
        """Load terms from a YAML file; raise CatalogError for any other content."""
        try:
            content = yaml.safe_load(path.read_bytes().decode("utf-8"))
        except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
            raise CatalogError(
                f"{path}: cannot be read as prices: {describe_yaml_error(error)}"
            ) from error
        if not isinstance(content, Mapping):
            raise CatalogError(
                f"{path}: expected names and values such as per_gb: 0.09, "
                f"found {type(content).__name__}"
            )
        names = [field.name for field in fields(cls)]
        for name, value in content.items():
            if name not in names:
                raise CatalogError(f"{path}: field {name!r}: expected one of {', '.join(names)}")
            if not cls._fits(name, value):
                raise CatalogError(
                    f"{path}: field {name!r}: expected a number above 0 (currency: text), "
                    f"found {value!r}"
                )
        return cls(**content)

    @staticmethod
    def _fits(name: str, value: Any) -> bool:
        if name == "currency":
            return isinstance(value, str)
        if type(value) not in (int, float):
            return False
        if name in ("mb_per_s", "cores"):
            return bool(value > 0)
        return bool(value >= 0)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Upper bounds for one site-year, or for several."""

    site_years: int = 0
    scenes: int = 0
    reads: int = 0
    """Reads for the composite."""
    checks: int = 0
    """Reads to check offsets and positions, on top of `reads`."""
    requests: int = 0
    """Requests of reads and checks; `bytes` and `pixels` also cover both."""
    bytes: int = 0
    pixels: int = 0
    """Pixels read, at their own sizes."""
    block_bytes: int = 0
    """Memory of the largest block."""
    connections: int = READ_THREADS
    """Maximum number of simultaneous requests."""

    def __add__(self, other: Estimate) -> Estimate:
        """Add two estimates run one after the other."""
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        sums["block_bytes"] = max(self.block_bytes, other.block_bytes)
        sums["connections"] = min(self.connections, other.connections)
        return Estimate(**sums)

    def seconds(self, terms: Terms) -> float:
        """Estimate the duration: the longest of waiting, transfer and computing.

        All three run at the same time. `measure_pace` compares this estimate with real builds.
        """
        waiting = self.requests * terms.latency_s / self.connections
        transfer = self.bytes / 1e6 / terms.mb_per_s
        computing = self.bytes / 1e6 * _CPU_S_PER_MB + self.pixels / 1e6 * _CPU_S_PER_MPX
        opening = (self.reads + self.checks) * _CPU_S_PER_READ
        computing += opening + self.site_years * _CPU_S_PER_SITE_YEAR
        return max(waiting, transfer, computing / terms.cores)

    def cost(self, terms: Terms, pace: float = 1.0) -> float | None:
        """Compute the cost at this pace in the currency of the terms; None if they have no
        prices."""
        prices = (terms.per_1000_requests, terms.per_gb, terms.per_core_hour)
        if prices == (None, None, None):
            return None
        core_hours = self.seconds(terms) * pace * terms.cores / 3600
        amounts = (self.requests / 1e3, self.bytes / 1e9, core_hours)
        return sum((price or 0) * amount for price, amount in zip(prices, amounts, strict=True))


def describe_duration(estimate: Estimate, seconds: float) -> dict[str, float]:
    """Build the provenance note about a build's time, for later plans.

    The note has the estimate and the elapsed seconds of the whole machine.
    """
    return {**asdict(estimate), "seconds": round(seconds, 3)}


def measure_pace(notes: Iterable[Mapping[str, float]], terms: Terms) -> float | None:
    """Compute the ratio of real to estimated time over earlier builds; None without builds.

    `notes` come from `describe_duration`, one per build. The terms are those of the machine for
    these builds and the next one.
    """
    names = {f.name for f in fields(Estimate)}
    seconds = 0.0
    estimated = 0.0
    for note in notes:
        counts: dict[str, Any] = {name: value for name, value in note.items() if name in names}
        seconds += note["seconds"]
        estimated += Estimate(**counts).seconds(terms)
    if not seconds or not estimated:
        return None
    return seconds / estimated


def estimate(scenes: Sequence[pystac.Item], grid: GeoBox, recipe: Recipe) -> Estimate:
    """Estimate the upper bounds of reading these scenes with `composite`, and a block's memory."""
    sums = np.zeros(4, dtype=np.int64)
    block_bytes = 0
    opened: set[str] = set()
    for block in iterate_blocks(grid, recipe.block_px):
        box = grid[block]
        _, mask_margin_m = compute_margins(recipe)
        listed = scenes_near(scenes, pad(box, mask_margin_m))
        if not listed:
            continue
        sums += _count_block(listed, box, recipe, opened)
        memory = min(estimate_memory(listed, box, recipe), BLOCK_BYTES)
        block_bytes = max(block_bytes, memory + BASE_BYTES)
    checks = _count_checks(scenes, grid, recipe)
    sums[1:] += checks[1:]
    reads, requests, read_bytes, pixels = sums.tolist()
    return Estimate(
        site_years=1,
        scenes=len(scenes),
        reads=reads,
        checks=int(checks[0]),
        requests=requests,
        bytes=read_bytes,
        pixels=pixels,
        block_bytes=block_bytes,
        connections=count_connections(scenes, READ_THREADS),
    )


def _count_block(
    scenes: Sequence[pystac.Item], box: GeoBox, recipe: Recipe, opened: set[str]
) -> Int64:
    """Count reads, requests, bytes and pixels of a block: int64 [4].

    Files join `opened`. Only the first read of a file requests its header.
    """
    fringe, margin = compute_margins(recipe)
    with_fringe = bands_with_fringe(recipe)
    windows: dict[tuple[int, int], tuple[int, int]] = {}
    for size, around_m in itertools.product((10, 20), {0, fringe, margin}):
        shape = coarsen(pad(box, around_m), size).shape
        windows[size, around_m] = (shape.y, shape.x)
    cut_sizes: list[int] = []
    if are_cut(recipe):
        days = len({scene.properties["minecube:datatake"] for scene in scenes})
        cut_sizes = [s for s in (10, 20) if days * math.prod(windows[s, 0]) > LEAST_CUT_PX]
    sums = np.zeros(4, dtype=np.int64)
    for scene in scenes:
        for band in (SCL, *recipe.bands):
            size = pixel_size_of(band, [scene])
            around_m = 0
            if band == SCL:
                around_m = margin
            elif band in with_fringe:
                around_m = fringe
            href = scene.assets[band].href
            counts = _count_window(scene, band, size, windows[size, around_m])
            if band not in (SCL, *with_fringe) and size in cut_sizes:
                tile_px = scene.properties["minecube:tile_px"]
                counts[0] = math.ceil((windows[size, 0][0] + tile_px - 1) / tile_px)
            sums += counts
            if href not in opened:
                sums += _count_header(href)
                opened.add(href)
    return sums


def _count_checks(scenes: Sequence[pystac.Item], grid: GeoBox, recipe: Recipe) -> Int64:
    """Count reads, requests, bytes and pixels of the checks of offsets and positions: int64 [4].

    All bands count like the recipe's first one at 10 m. Headers of the recipe's bands are counted
    with the composite, those of other bands here.
    """
    windows = choose_windows(grid, (), CELL_PX)
    footprints = [shapely.geometry.shape(scene.geometry) for scene in scenes]
    further = add_windows(windows, grid, footprints)
    has_red = all(pixel_size_of(_RED, [s]) == PIXEL_M for s in scenes if _RED in s.assets)
    is_shared = len(windows) == 1 and has_red and all(_RED in s.assets for s in scenes)
    counts = [_OFFSET_BANDS] * len(windows + further)
    if recipe.registration:
        middles = choose_windows(grid)
        own_windows = add_windows(middles, grid, footprints)
        if not is_shared:
            own_windows += middles
        counts += [_REGISTRATION_BANDS] * len(own_windows)
    in_tile = _lie_in_tiles(scenes, grid) and not further
    sums = np.zeros(4, dtype=np.int64)
    for scene in scenes:
        of_band, of_scl = (
            _count_window(scene, band, size, coarsen(windows[0], size).shape.yx, in_tile)
            for band, size in ((recipe.bands[0], PIXEL_M), (SCL, MASK_M))
        )
        for reads in counts:
            sums += (reads - 1) * of_band + of_scl
        others = len(set(scene.assets) - {*recipe.bands, SCL})
        header = _count_header(scene.assets[recipe.bands[0]].href)
        sums += min(others, _OFFSET_BANDS - 1) * header
    return sums


def _lie_in_tiles(scenes: Sequence[pystac.Item], grid: GeoBox) -> bool:
    """Return whether `choose_windows` can move each window into one tile of any of the files."""
    places = {(s.properties["s2:mgrs_tile"], s.properties["proj:code"]) for s in scenes}
    zones = {zone for _, zone in places}
    tile_px = min((s.properties["minecube:tile_px"] for s in scenes), default=0)
    is_one_tile = len(places) == 1 and zones == {f"EPSG:{grid.crs.epsg}"}
    has_room = min(grid.shape) >= 2 * _ROOM_PX and tile_px >= _ROOM_PX
    return is_one_tile and has_room


def _count_window(
    scene: pystac.Item, band: str, size_m: int, window: tuple[int, int], in_tile: bool = False
) -> Int64:
    """Count reads, requests, bytes and pixels of a window [height, width]: int64 [4].

    `in_tile`: The window lies in one tile of its file.
    """
    tile_px = scene.properties["minecube:tile_px"]
    asset = scene.assets[band]
    shape = asset.extra_fields["proj:shape"]
    file_bytes = asset.extra_fields["file:size"]
    bytes_per_pixel = _STORED[SCL if band == SCL else size_m]
    if file_bytes:
        bytes_per_pixel = file_bytes * _OVERVIEWS / math.prod(shape)
    # A window begins anywhere in a tile. On average, n pixels touch tiles of n + tile - 1 pixels.
    touched = [tile_px if in_tile else n + tile_px - 1 for n in window]
    height, width = (min(n, side) for n, side in zip(touched, shape, strict=True))
    requests = math.ceil(height / tile_px) * _is_remote(asset.href)
    read_bytes = int(height * width * bytes_per_pixel)
    return np.array([1, requests, read_bytes, math.prod(window)], dtype=np.int64)


def _count_header(href: str) -> Int64:
    """Count reads, requests, bytes and pixels of a file's header: int64 [4]."""
    is_remote = _is_remote(href)
    return np.array([0, is_remote, HEAD_BYTES * is_remote, 0], dtype=np.int64)


def _is_remote(href: str) -> bool:
    return "://" in href
