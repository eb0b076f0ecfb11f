"""Map whole sites by overlapping windows, in memory independent of their number of rows.

A view is the years seen at once by a network: one, two or all, by its card's task. Views are mapped
one after the other, from top to bottom. Rows of pixels are read ahead while the network computes,
and cut into windows. Rows are yielded as soon as no later window touches them. `layout` blends
windows into a map, and `compute` runs the network.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from minecube.catalog import ModelCard, as_dict
from minecube.errors import ModelError
from minecube.models.compute import Compute, Forward, ready, rows_of
from minecube.models.layout import NODATA, SCALE, Blend, Layout
from minecube.models.network import Trained, select_bands
from minecube.models.streams import Strip, ahead, landed

View = tuple[int, ...]
"""Years seen at once, in ascending order."""
HERE = Compute()
"""Default computation, on all cores of this machine."""
_READ_ROWS = 256  # minimum rows per read; at least a window, rounded up to whole chunks


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Finished rows of one view's map."""

    view: View
    y: int
    """First row."""
    values: NDArray[np.uint8]
    """[time, class, row, x], probability x 250, 255 = unknown. `time` is the view's years for a
    series, else one."""


def views_of(
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
            f"model {card.id}: pairs of years are for change; its task is {card.task}, so leave them out"
        )
    least = {"change": 2}.get(card.task, 1)
    if len(ordered) < least:
        found = ", ".join(map(str, ordered)) or "none"
        raise ModelError(
            f"model {card.id}: {card.task} needs {least} years or more, found {found}; build more years"
        )
    if pairs is not None and not pairs:
        raise ModelError(
            f"model {card.id}: expected pairs of two of the years {', '.join(map(str, ordered))}, found none as asked for; "
            "name other pairs or gaps, or leave them out for all"
        )
    for pair in pairs or ():
        if len(pair) != 2 or pair[0] >= pair[1] or not set(pair) <= set(ordered):
            raise ModelError(
                f"model {card.id}: expected pairs of two of the years {', '.join(map(str, ordered))}, the earlier first, found "
                f"{'-'.join(map(str, pair))}"
            )
    if card.task == "change":
        return sorted(set(pairs)) if pairs is not None else list(combinations(ordered, 2))
    return [ordered] if card.task == "series" else [(year,) for year in ordered]


def about(trained: Trained) -> dict[str, Any]:
    """Describe the origin of a map as plain JSON.

    It holds the card, the SHA-256 of all weights, the training sites, normalisation and the overlap
    of windows. Equal descriptions give equal maps of the same builds, apart from last bits (see
    `compute`). The address of the weights is left out: it does not affect a map, and a signed URL
    is a secret. Scores are left out, since they are known only afterwards.
    """
    weights = hashlib.sha256()
    for name, value in sorted(trained.network.state_dict().items()):
        weights.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        weights.update(
            value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    card = {
        name: value
        for name, value in as_dict(trained.card).items()
        if name not in ("weights", "scores")
    }
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
    trained: Trained,
    reflectance: xr.DataArray,
    *,
    pairs: Sequence[View] | None = None,
    compute: Compute = HERE,
    progress: Callable[[int, int], None] | None = None,
) -> xr.DataArray:
    """Predict the probability of the card's classes in every pixel, in memory.

    Values are uint8, x 250, and 255 if any band has no observation.

    Args:
        trained: The model.
        reflectance: (band, y, x) or (year, band, y, x), uint16, 0 = no observation. Lazy arrays are
            read in strips.
        pairs: Pairs of years for change, by default all.
        compute: Device and its use.
        progress: Called with windows done and windows in total.

    Returns:
        Mapping and series: (y, x) or (year, y, x).
        Change: (pair, class, y, x) with coordinates `first` and `second` (years) and `class`; 255
            if either year has no observation.

    Raises:
        ModelError: As for `views_of` and `Mapper.rows`.
    """
    # The number of an unnamed year does not matter.
    named = reflectance if "year" in reflectance.coords else reflectance.assign_coords(year=0)
    cube = named if "year" in named.dims else named.expand_dims("year")
    views = views_of(trained.card, [int(year) for year in cube["year"]], pairs)
    shape = (cube.sizes["y"], cube.sizes["x"])
    found = np.empty(
        (len(views), _times(trained.card, views[0]), len(trained.card.classes), *shape), np.uint8
    )
    for rows in Mapper(trained, compute).rows(cube, views, progress):
        found[views.index(rows.view), :, :, rows.y : rows.y + rows.values.shape[-2]] = rows.values
    there = {
        name: c for name, c in cube.isel(band=0, drop=True).coords.items() if "year" not in c.dims
    }
    attrs = {"long_name": f"{trained.card.task} probability x {SCALE}", "nodata": NODATA}
    if trained.card.task == "change":
        there |= {
            name: ("pair", [view[n] for view in views])
            for n, name in enumerate(("first", "second"))
        }
        there["class"] = list(trained.card.classes)
        return xr.DataArray(
            found[:, 0], dims=("pair", "class", "y", "x"), coords=there, name="change", attrs=attrs
        )
    attrs["long_name"] = f"mine probability x {SCALE}"
    years = xr.DataArray(
        found.reshape(-1, *shape),
        dims=("year", "y", "x"),
        coords={"year": sorted(cube["year"].to_numpy()), **there},
        name="probability",
        attrs=attrs,
    )
    if "year" in reflectance.dims:
        return years.sel(year=cube["year"])
    return years.isel(year=0, drop="year" not in reflectance.coords)


class Mapper:
    """Trained network ready to map site after site.

    It is moved to its device and optimised there once for all sites.
    """

    def __init__(self, trained: Trained, compute: Compute = HERE) -> None:
        self.trained, self.compute = trained, compute
        self._lock = threading.Lock()
        self._ready: tuple[View | int, Forward] | None = None

    @cached_property
    def about(self) -> dict[str, Any]:
        """Description of the model by `about`."""
        return about(self.trained)

    @property
    def name(self) -> str:
        """Default name of its predictions: card id and first digits of the weights' SHA-256."""
        return f"{self.trained.card.id}-{self.about['weights_sha256'][:8]}"

    def check(self, reflectance: xr.DataArray, views: Sequence[View]) -> None:
        """Check before any reading or writing if these views can be mapped.

        Raises:
            ModelError: Bands are missing or in another order than the card's. Pixels are not
                uint16. A year is missing. The network takes another number of years. The device is
                not available.
        """
        card = self.trained.card
        # Some networks take one number of years only.
        takes = getattr(self.trained.network, "years", None)
        years = [int(year) for year in select_bands(reflectance, card)["year"]]
        lacking = sorted({year for view in views for year in view} - set(years))
        if lacking:
            raise ModelError(
                f"model {card.id}: year {lacking[0]} is not in the cube, which has {', '.join(map(str, years))}"
            )
        for view in views:
            if takes is not None and len(view) != takes:
                raise ModelError(
                    f"model {card.id}: its network takes {takes} years, found {len(view)} ({', '.join(map(str, view))}); map "
                    "as many years, or train it on series as long as this one"
                )
        self.compute.place()

    def rows(
        self,
        reflectance: xr.DataArray,
        views: Sequence[View],
        progress: Callable[[int, int], None] | None = None,
    ) -> Generator[Rows, None, None]:
        """Yield the maps of these views one after the other, in finished rows from top to bottom.

        On a CPU in fp32 the result depends only on model and pixels. Workers, cores, strips and the
        order of windows have no effect. Another machine, bf16, and batches on a GPU may change the
        last bits of a logit.

        Raises:
            ModelError: As for `check`. A logit is not a number. The device has too little memory.
        """
        self.check(reflectance, views)
        card = self.trained.card
        cube, forward = select_bands(reflectance, card), self._forward(views[0])
        layout = Layout(cube.sizes["y"], cube.sizes["x"], card.window_px)
        each = len(layout.tops) * len(layout.lefts)
        with (
            closing(ahead(_strips(cube, views, layout, card.task))) as strips,
            closing(rows_of(forward, strips, layout.ramp, self.compute)) as found,
        ):
            for done, (part, values, finite) in enumerate(
                landed(_blended(found, layout, card, forward.place)), start=1
            ):
                if not bool(finite.all()):
                    left = part.lefts[int(torch.nonzero(~finite)[0])]
                    y, x = max(part.top - layout.beyond, 0), max(left - layout.beyond, 0)
                    raise ModelError(
                        f"model {card.id}: a logit is not a number in {'-'.join(map(str, part.view))}, in the window at "
                        f"row {y}, column {x}; this map is not kept: look at the reflectance there, or train the model again"
                    )
                site, own = layout.finished(part.top)
                if progress is not None:
                    progress(done * len(layout.lefts), len(views) * each)
                if site.stop > site.start:
                    known = part.known[:, None, own]
                    yield Rows(
                        view=part.view,
                        y=site.start,
                        values=np.where(known, values.numpy(), np.uint8(NODATA)),
                    )

    def _forward(self, view: View) -> Forward:
        """Return the network prepared for views like this one.

        Only a network for series receives the years.
        """
        like = view if self.trained.card.task == "series" else len(view)
        with self._lock:  # several threads may use the same model
            if self._ready is None or self._ready[0] != like:
                self._ready = None  # never two in a GPU's memory
                self._ready = (like, ready(self.trained, self.compute, view))
            return self._ready[1]


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A row of windows of one view."""

    view: View
    top: int
    lefts: tuple[int, ...]
    """First columns of the windows to compute, each with a known pixel."""
    known: NDArray[np.bool_]
    """[time, window, x] of the site: pixels known in the map, not NODATA."""


def _times(card: ModelCard, view: View) -> int:
    return len(view) if card.task == "series" else 1


def _blended(
    found: Iterator[tuple[_Part, Tensor, Tensor]],
    layout: Layout,
    card: ModelCard,
    place: torch.device,
) -> Iterator[tuple[_Part, Tensor, Tensor]]:
    """Yield finished rows [time, class, row, x] per row of windows, still on the device."""
    blend = Blend(layout, place)
    for part, row, finite in found:
        if part.top == 0:
            blend = Blend(layout, place)
        if not part.lefts:
            shape = (
                _times(card, part.view),
                len(card.classes),
                layout.window_px,
                len(layout.columns),
            )
            row = torch.zeros(shape, dtype=torch.int64, device=place)
        yield part, blend.down(part.top, row), finite


def _strips(
    cube: xr.DataArray, views: Sequence[View], layout: Layout, task: str
) -> Iterator[Strip[_Part]]:
    """Yield the rows of windows of every view.

    Each row of pixels is read once per view, in whole rows of the store's chunks.
    """
    chunk = int(cube.encoding.get("chunks", (1,))[-2:][0])
    read = -(-max(layout.window_px, _READ_ROWS) // chunk) * chunk
    years = [int(year) for year in cube["year"]]
    side = layout.window_px
    needs = [layout.rows[top : top + side] for top in layout.tops]
    # First row needed from here on: mirrored rows of windows go back up.
    first = np.minimum.accumulate([rows.min() for rows in needs][::-1])[::-1]
    for view in views:
        at = [years.index(year) for year in view]
        # Rows come first, so any range of rows with all bands is contiguous.
        held, begin, end = (
            np.empty((0, len(at), cube.sizes["band"], len(layout.columns)), np.uint16),
            0,
            0,
        )
        known = np.empty((0, len(at), layout.width), np.bool_)
        for top, rows, oldest in zip(layout.tops, needs, first, strict=True):
            while end <= rows.max():
                part = slice(end, min(end + read, layout.height))
                new = cube.isel(year=at, y=part).to_numpy()
                held = _followed(held[oldest - begin :], new.transpose(2, 0, 1, 3), layout)
                known = np.concatenate(
                    [known[oldest - begin :], new.min(axis=1).transpose(1, 0, 2) > 0]
                )
                begin, end = int(oldest), part.stop
            whole = rows[-1] - rows[0] == side - 1  # nothing mirrored: no copy
            here = slice(rows[0] - begin, rows[-1] + 1 - begin) if whole else rows - begin
            sure = known[here].transpose(1, 0, 2)
            if task == "change":
                sure = np.logical_and.reduce(sure, axis=0, keepdims=True)
            seen = np.logical_or.reduce(sure, axis=(0, 1))[layout.columns]
            lefts = tuple(left for left in layout.lefts if seen[left : left + side].any())
            # A window without a known pixel only touches NODATA pixels.
            part_of = _Part(view=view, top=top, lefts=lefts, known=sure)
            yield Strip(of=part_of, pixels=held[here].transpose(1, 2, 0, 3), lefts=lefts)


def _followed(
    rows: NDArray[np.uint16], new: NDArray[np.uint16], layout: Layout
) -> NDArray[np.uint16]:
    """Append new rows [row, time, band, x] to rows [row, time, band, columns].

    The new rows are mirrored beyond the site's sides.
    """
    wide = np.empty((len(rows) + len(new), *rows.shape[1:]), np.uint16)
    wide[: len(rows)] = rows
    inside = slice(layout.beyond, layout.beyond + layout.width)
    wide[len(rows) :, ..., inside] = new
    for edge in (slice(0, inside.start), slice(inside.stop, None)):
        wide[len(rows) :, ..., edge] = new[..., layout.columns[edge]]
    return wide
