"""Map whole sites by overlapping windows, in memory independent of their number of rows.

A view is the years seen at once by a network: one, two or all, by its card's task. Views are mapped
one after the other, from top to bottom. Rows of pixels are read ahead while the network computes,
and cut into windows. Rows are yielded as soon as no later window touches them. `layout` blends
windows into a map. `forward` runs the network, for `cores` or in `batches` on a GPU.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any, TypeVar

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from minecube.arrays import Bool, Int64, IntP, UInt8, UInt16
from minecube.catalog import ModelCard, as_dict
from minecube.codes import FULL, UNKNOWN
from minecube.errors import ModelError
from minecube.models.batches import sum_in_batches
from minecube.models.compute import Compute
from minecube.models.cores import sum_on_cores
from minecube.models.forward import Forward, prepare
from minecube.models.layout import Blend, Layout
from minecube.models.network import TrainedModel, select_bands
from minecube.models.streams import Strip, download, read_ahead, upload

T = TypeVar("T")
View = tuple[int, ...]
"""Years seen at once, in ascending order."""
_ALL_CORES = Compute()
_READ_ROWS = 256  # minimum rows per read; at least a window, rounded up to whole chunks


@dataclass(frozen=True, kw_only=True)
class MapRows:
    """Finished rows of one view's map."""

    view: View
    y: int
    """First row."""
    values: UInt8
    """[time, class, row, x], probability x 250, 255 = unknown. `time` is the view's years for a
    series, else one."""


def list_views(
    card: ModelCard, years: Sequence[int], pairs: Sequence[View] | None = None
) -> list[View]:
    """List a card's views of these years: each year, each pair, or all at once.

    `pairs` restricts the pairs of change; by default all.

    Raises:
        ModelError: There are too few years for the task. `pairs` is empty or given for another
            task. A pair is not two of these years in ascending order.
    """
    ordered = tuple(sorted(years))
    if pairs is not None and card.task != "change":
        raise ModelError(
            f"model {card.id}: pairs of years are for change; its task is {card.task}, so leave "
            "them out"
        )
    least = {"change": 2}.get(card.task, 1)
    if len(ordered) < least:
        listed = ", ".join(map(str, ordered)) or "none"
        raise ModelError(
            f"model {card.id}: {card.task} needs {least} years or more, found {listed}; build more "
            "years"
        )
    if card.task == "mapping":
        return [(year,) for year in ordered]
    if card.task == "series":
        return [ordered]
    if pairs is None:
        return list(combinations(ordered, 2))
    _check_pairs(card, ordered, pairs)
    return sorted(set(pairs))


def _check_pairs(card: ModelCard, years: View, pairs: Sequence[View]) -> None:
    expected = f"model {card.id}: expected pairs of two of the years {', '.join(map(str, years))}, "
    if not pairs:
        raise ModelError(
            f"{expected}found none as asked for; name other pairs or gaps, or leave them out for "
            "all"
        )
    for pair in pairs:
        if len(pair) != 2 or pair[0] >= pair[1] or not set(pair) <= set(years):
            raise ModelError(f"{expected}the earlier first, found {_join_years(pair)}")


def describe(trained: TrainedModel) -> dict[str, Any]:
    """Describe the origin of a map as plain JSON.

    It holds the card, the SHA-256 of all weights, the training sites, normalisation and the overlap
    of windows. Equal descriptions give equal maps of the same builds, apart from last bits (see
    `cores`). The address of the weights is left out: it does not affect a map, and a signed URL is
    a secret. Scores are left out, since they are known only afterwards.
    """
    weights = hashlib.sha256()
    for name, value in sorted(trained.network.state_dict().items()):
        weights.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        weights.update(
            value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    card = as_dict(trained.card)
    for name in ("weights", "scores"):
        card.pop(name, None)
    return {
        **card,
        "trained_on": list(trained.sites),
        "weights_sha256": weights.hexdigest(),
        "mean": list(trained.mean),
        "std": list(trained.std),
        "mapped_by": {
            "window_px": trained.card.window_px,
            "step_px": trained.card.window_px // 2,
            "weights": "squared sine",
        },
    }


def predict(
    trained: TrainedModel,
    reflectance: xr.DataArray,
    *,
    pairs: Sequence[View] | None = None,
    compute: Compute = _ALL_CORES,
    progress: Callable[[int, int], None] | None = None,
) -> xr.DataArray:
    """Predict the probability of the card's classes in every pixel, in memory.

    Values are uint8, x 250, and 255 if any band has no observation.

    Args:
        trained: The model.
        reflectance: (band, y, x) or (year, band, y, x), uint16, 0 = no observation. Lazy arrays are
            read in strips.
        pairs: Pairs of years for change, by default all.
        compute: Device and its use; by default all cores of this machine.
        progress: Called with windows done and windows in total.

    Returns:
        Mapping and series: (y, x) or (year, y, x).
        Change: (pair, class, y, x) with coordinates `first` and `second` (years) and `class`; 255
            if either year has no observation.

    Raises:
        ModelError: As for `list_views` and `Mapper.map_rows`.
    """
    cube = reflectance
    if "year" not in cube.coords:
        cube = cube.assign_coords(year=0)  # the number of an unnamed year does not matter
    if "year" not in cube.dims:
        cube = cube.expand_dims("year")
    card = trained.card
    views = list_views(card, [int(year) for year in cube["year"]], pairs)
    shape = (len(views), _count_dates(card, views[0]), len(card.classes))
    maps = np.empty((*shape, cube.sizes["y"], cube.sizes["x"]), np.uint8)
    for rows in Mapper(trained, compute).map_rows(cube, views, progress):
        maps[views.index(rows.view), :, :, rows.y : rows.y + rows.values.shape[-2]] = rows.values
    if card.task == "change":
        return _label_changes(card, cube, views, maps[:, 0])
    years = _label_years(cube, maps.reshape(-1, *maps.shape[-2:]))
    if "year" in reflectance.dims:
        return years.sel(year=cube["year"])
    return years.isel(year=0, drop="year" not in reflectance.coords)


def _label_changes(
    card: ModelCard, cube: xr.DataArray, views: Sequence[View], maps: UInt8
) -> xr.DataArray:
    coords = _coords_without_year(cube)
    coords["first"] = ("pair", [view[0] for view in views])
    coords["second"] = ("pair", [view[1] for view in views])
    coords["class"] = list(card.classes)
    attrs = {"long_name": f"change probability x {FULL}", "nodata": UNKNOWN}
    dims = ("pair", "class", "y", "x")
    return xr.DataArray(maps, coords, dims, name="change", attrs=attrs)


def _label_years(cube: xr.DataArray, maps: UInt8) -> xr.DataArray:
    coords = {"year": sorted(cube["year"].to_numpy()), **_coords_without_year(cube)}
    attrs = {"long_name": f"mine probability x {FULL}", "nodata": UNKNOWN}
    return xr.DataArray(maps, coords, ("year", "y", "x"), name="probability", attrs=attrs)


def _coords_without_year(cube: xr.DataArray) -> dict[Any, Any]:
    coords = cube.isel(band=0, drop=True).coords
    return {name: values for name, values in coords.items() if "year" not in values.dims}


class Mapper:
    """Trained network ready to map site after site.

    It is moved to its device and optimised there once for all sites.
    """

    def __init__(self, trained: TrainedModel, compute: Compute = _ALL_CORES) -> None:
        self.trained = trained
        self.compute = compute
        self._lock = threading.Lock()
        self._prepared: tuple[View | int, Forward] | None = None

    @cached_property
    def description(self) -> dict[str, Any]:
        """Description of the model by `describe`."""
        return describe(self.trained)

    @property
    def name(self) -> str:
        """Default name of its predictions: card id and first digits of the weights' SHA-256."""
        return f"{self.trained.card.id}-{self.description['weights_sha256'][:8]}"

    def check(self, reflectance: xr.DataArray, views: Sequence[View]) -> None:
        """Check before any reading or writing if these views can be mapped.

        Raises:
            ModelError: Bands are missing or in another order than the card's. Pixels are not
                uint16. A year is missing. The network takes another number of years. The device is
                not available.
        """
        card = self.trained.card
        years = [int(year) for year in select_bands(reflectance, card)["year"]]
        missing = sorted({year for view in views for year in view} - set(years))
        if missing:
            raise ModelError(
                f"model {card.id}: year {missing[0]} is not in the cube, which has "
                f"{', '.join(map(str, years))}"
            )
        # Some networks take one number of years only.
        length = getattr(self.trained.network, "years", None)
        for view in views:
            if length is not None and len(view) != length:
                raise ModelError(
                    f"model {card.id}: its network takes {length} years, found {len(view)} "
                    f"({', '.join(map(str, view))}); map as many years, or train it on series as "
                    "long as this one"
                )
        self.compute.find_device()

    def map_rows(
        self,
        reflectance: xr.DataArray,
        views: Sequence[View],
        progress: Callable[[int, int], None] | None = None,
    ) -> Generator[MapRows, None, None]:
        """Yield the maps of these views one after the other, in finished rows from top to bottom.

        On a CPU in fp32 the result depends only on model and pixels. Workers, cores, strips and the
        order of windows have no effect. Another machine, bf16, and batches on a GPU may change the
        last bits of a logit.

        Raises:
            ModelError: As for `check`. A logit is not a number. The device has too little memory.
        """
        self.check(reflectance, views)
        card = self.trained.card
        cube = select_bands(reflectance, card)
        forward = self._prepare(views[0])
        layout = Layout(cube.sizes["y"], cube.sizes["x"], card.window_px)
        total = len(views) * len(layout.tops) * len(layout.lefts)
        with (
            closing(read_ahead(_read_strips(cube, views, layout, card.task))) as strips,
            closing(sum_rows(forward, strips, layout.ramp, self.compute)) as sums,
        ):
            blended = download(_blend_rows(sums, layout, card, forward.device))
            for number, (row, levels, finite) in enumerate(blended, start=1):
                _check_finite(card, layout, row, finite)
                if progress is not None:
                    progress(number * len(layout.lefts), total)
                site, window = layout.finished_rows(row.top)
                if site.stop > site.start:
                    valid = row.valid[:, None, window]
                    values = np.where(valid, levels.numpy(), np.uint8(UNKNOWN))
                    yield MapRows(view=row.view, y=site.start, values=values)

    def _prepare(self, view: View) -> Forward:
        """Return the network prepared for views like this one.

        Only a network for series receives the years.
        """
        kind: View | int = view if self.trained.card.task == "series" else len(view)
        with self._lock:  # several threads may use the same model
            if self._prepared is None or self._prepared[0] != kind:
                self._prepared = None  # never two in a GPU's memory
                self._prepared = (kind, prepare(self.trained, self.compute, view))
            return self._prepared[1]


def sum_rows(
    forward: Forward, strips: Iterator[Strip[T]], ramp: Int64, compute: Compute
) -> Generator[tuple[T, Tensor, Tensor], None, None]:
    """Yield each strip's logit sums, in order, as (`Strip.tag`, sums, finite).

    Sums are weighted, int64 [time, class, window, columns], on the device. `finite` marks the
    windows with only finite logits.

    Raises:
        ModelError: The device's memory cannot hold one window.
    """
    if forward.device.type == "cpu":
        yield from sum_on_cores(forward, strips, ramp, compute.workers)
    else:
        weights = torch.from_numpy(ramp).to(forward.device)
        with closing(upload(strips, forward.device)) as uploaded:
            yield from sum_in_batches(forward, uploaded, weights)


@dataclass(frozen=True, kw_only=True)
class _WindowRow:
    """A row of windows of one view."""

    view: View
    top: int
    lefts: tuple[int, ...]
    """First columns of the windows to compute, each with a valid pixel."""
    valid: Bool
    """[time, window, x] of the site: observed pixels; for change, in both years."""


def _count_dates(card: ModelCard, view: View) -> int:
    return len(view) if card.task == "series" else 1


def _join_years(view: View) -> str:
    return "-".join(map(str, view))


def _check_finite(card: ModelCard, layout: Layout, row: _WindowRow, finite: Tensor) -> None:
    if bool(finite.all()):
        return
    left = row.lefts[int(torch.nonzero(~finite)[0])]
    y = max(row.top - layout.margin, 0)
    x = max(left - layout.margin, 0)
    raise ModelError(
        f"model {card.id}: a logit is not a number in {_join_years(row.view)}, in the window at "
        f"row {y}, column {x}; this map is not kept: look at the reflectance there, or train the "
        "model again"
    )


def _blend_rows(
    sums: Iterator[tuple[_WindowRow, Tensor, Tensor]],
    layout: Layout,
    card: ModelCard,
    device: torch.device,
) -> Iterator[tuple[_WindowRow, Tensor, Tensor]]:
    """Yield finished rows [time, class, row, x] per row of windows, still on the device."""
    blend = Blend(layout, device)
    for row, total, finite in sums:
        if row.top == 0:
            blend = Blend(layout, device)
        if not row.lefts:
            dates = _count_dates(card, row.view)
            shape = (dates, len(card.classes), layout.window_px, len(layout.columns))
            total = torch.zeros(shape, dtype=torch.int64, device=device)
        yield row, blend.down(row.top, total), finite


def _read_strips(
    cube: xr.DataArray, views: Sequence[View], layout: Layout, task: str
) -> Iterator[Strip[_WindowRow]]:
    """Yield the rows of windows of every view.

    Each row of pixels is read once per view, in whole rows of the store's chunks.
    """
    chunk = int(cube.encoding.get("chunks", (1,))[-2:][0])
    read_rows = -(-max(layout.window_px, _READ_ROWS) // chunk) * chunk
    years = [int(year) for year in cube["year"]]
    windows = [layout.rows[top : top + layout.window_px] for top in layout.tops]
    # First row needed from here on: mirrored rows of windows go back up.
    oldest = np.minimum.accumulate([rows.min() for rows in windows][::-1])[::-1]
    for view in views:
        positions = [years.index(year) for year in view]
        buffer = _RowBuffer(layout, len(view), cube.sizes["band"])
        for top, rows, start in zip(layout.tops, windows, oldest, strict=True):
            while buffer.stop <= rows.max():
                part = slice(buffer.stop, min(buffer.stop + read_rows, layout.height))
                buffer.append(cube.isel(year=positions, y=part).to_numpy(), int(start))
            valid = buffer.observed[buffer.index(rows)].transpose(1, 0, 2)
            if task == "change":
                valid = np.logical_and.reduce(valid, axis=0, keepdims=True)
            lefts = _lefts_with_valid(layout, valid)
            yield Strip(
                tag=_WindowRow(view=view, top=top, lefts=lefts, valid=valid),
                pixels=buffer.pixels[buffer.index(rows)].transpose(1, 2, 0, 3),
                lefts=lefts,
            )


def _lefts_with_valid(layout: Layout, valid: Bool) -> tuple[int, ...]:
    """Return the first columns of windows with a valid pixel; other windows only touch unknown."""
    columns = np.logical_or.reduce(valid, axis=(0, 1))[layout.columns]
    side = layout.window_px
    return tuple(left for left in layout.lefts if columns[left : left + side].any())


class _RowBuffer:
    """Consecutive rows of a view's pixels, mirrored beyond the site's sides.

    Rows come first, so any range of rows with all bands is contiguous.
    """

    def __init__(self, layout: Layout, dates: int, bands: int) -> None:
        self.pixels: UInt16 = np.empty((0, dates, bands, len(layout.columns)), np.uint16)
        """[row, time, band, column]."""
        self.observed: Bool = np.empty((0, dates, layout.width), np.bool_)
        """[row, time, x] of the site: every band is observed."""
        self._layout = layout
        self._start = 0

    @property
    def stop(self) -> int:
        """First row of the site after the buffer."""
        return self._start + len(self.pixels)

    def append(self, image: UInt16, start: int) -> None:
        """Append the next rows [time, band, row, x], and forget all rows before `start`."""
        layout = self._layout
        previous = self.pixels[start - self._start :]
        observed = self.observed[start - self._start :]
        rows = image.transpose(2, 0, 1, 3)
        pixels = np.empty((len(previous) + len(rows), *previous.shape[1:]), np.uint16)
        pixels[: len(previous)] = previous
        pixels[len(previous) :, ..., layout.inside] = rows
        for edge in (slice(0, layout.inside.start), slice(layout.inside.stop, None)):
            pixels[len(previous) :, ..., edge] = rows[..., layout.columns[edge]]
        self.pixels = pixels
        new_observed = image.min(axis=1).transpose(1, 0, 2) > 0
        self.observed = np.concatenate([observed, new_observed])
        self._start = start

    def index(self, rows: IntP) -> slice | IntP:
        """Return the positions of these rows of the site; without mirrored rows, as a slice."""
        if rows[-1] - rows[0] == len(rows) - 1:  # a slice needs no copy
            return slice(int(rows[0]) - self._start, int(rows[-1]) + 1 - self._start)
        return rows - self._start
