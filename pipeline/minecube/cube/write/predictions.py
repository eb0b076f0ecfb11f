"""Write maps of models.

A map is written in rows from top to bottom and committed view by view. Only complete maps can be
opened. Checksums cover complete views only. A killed run leaves shards of an incomplete view. The
next run maps only incomplete views again. Only one run at a time writes a prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import dask.array
import numpy as np
import odc.geo.xr  # registers the .odc accessor
import xarray as xr
import zarr

from minecube.arrays import UInt8
from minecube.codes import UNKNOWN
from minecube.cube.checksums import ChecksumStore, seal
from minecube.cube.locks import hold
from minecube.cube.store import DESCRIPTION, Store
from minecube.cube.template import describe_location, grid_in, write_template
from minecube.cube.views import (
    LONG_NAMES,
    View,
    axis_of,
    coordinates_of,
    index_in,
    indices_of,
    label_of,
    model_digest,
    pixels_by_year,
    prediction_path,
    select_years,
    views_in,
)
from minecube.digests import sha256_of_json
from minecube.errors import CubeError


class Rows(Protocol):
    """Rows of one view's map (`models.Rows`)."""

    @property
    def view(self) -> View:
        """The view of these rows."""

    @property
    def y(self) -> int:
        """The first row."""

    @property
    def values(self) -> UInt8:
        """Levels as [time, class, row, x]."""


@dataclass(frozen=True)
class _Map:
    """A complete map of one view, as `Rows`."""

    view: View
    values: UInt8
    y: int = 0


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The views to map, and the model."""

    model: str
    """Name of the group."""
    views: Sequence[View]
    origin: Mapping[str, Any]
    """Origin of the map, as plain JSON. A map of another origin is only replaced with
    `overwrite`."""
    variable: str = "probability"
    """probability (year, y, x), or change (pair, class, y, x)."""
    classes: Sequence[str] = ("mine",)
    computed: str = ""
    """Place and manner of the computation. They do not change the identity of a map."""

    def __post_init__(self) -> None:
        if self.variable not in LONG_NAMES:
            raise CubeError(
                f"expected a prediction of {' or '.join(LONG_NAMES)}, found {self.variable!r}"
            )


def write_prediction(
    store: Store,
    site_id: str,
    prediction: Prediction,
    rows: Callable[[Sequence[View]], Generator[Rows, None, None]],
    *,
    overwrite: bool = False,
) -> list[View]:
    """Write and commit the missing views one by one. Returns these views.

    A view is present if the same model mapped it from the current builds of the cube. One row of
    shards is written while the next is gathered. Memory holds both.

    Args:
        store: the cubes.
        site_id: the site.
        prediction: the views to have at the end. Other views of the same model stay.
        rows: called with the missing views. Yields their rows in this order, each view from top to
            bottom without a gap.
        overwrite: replace the whole prediction, also one of another model.

    Raises:
        BusyError: another run is writing this prediction.
        CubeError: a year is not committed or was rebuilt meanwhile, another model made the
            prediction, rows are missing, or the store cannot be written. Views committed before the
            error stay.
    """
    target = store.open_with_checksums()
    pixels = pixels_by_year(store, site_id)
    for view in prediction.views:
        if len(select_years(view, pixels)) < len(view):
            raise CubeError(
                f"{store}: {label_of(view)} of {site_id} is not committed, and its pixels may "
                "change under the map; run `minecube build` until it says built"
            )
    writer = _Writer(store, site_id, prediction, target, pixels)
    with hold(store, prediction_path(site_id, prediction.model)) as lock:
        group, complete = writer.begin(overwrite=overwrite)
        todo = [view for view in prediction.views if label_of(view) not in complete]
        if not todo:
            return []
        checksums = dict(group.attrs["checksums"])
        array = group[prediction.variable]
        indices = indices_of(prediction.variable, views_in(group.attrs))
        with closing(rows(todo)) as source:
            for view in todo:
                _write_view(array, indices[view], _gather(source, view, array))
                lock.check()
                complete[label_of(view)] = {
                    "builds": select_years(view, pixels),
                    "computed": prediction.computed,
                }
                shards = {**checksums, **_checksums_of(target, group.path)}
                # The commit:
                group.attrs.put(seal({**group.attrs, "done": complete, "checksums": shards}))
    return todo


def write_probability(
    store: Store,
    site_id: str,
    name: str,
    probability: xr.DataArray,
    card: Mapping[str, Any],
    *,
    made_of: str | None = None,
) -> None:
    """Write a model's mine probability into its own group, replacing an older one.

    The probability is uint8 [year, y, x], x 250, 255 = missing. `card` is the origin of the map, as
    plain JSON. `made_of` names the source prediction. Once another model replaces the source, the
    map can no longer be opened.

    Raises:
        CubeError: the probability lies on another grid than the cube, or the store cannot be
            written.
    """
    with store.reading(site_id):
        grid = grid_in(store.open_site(site_id).attrs)
    if probability.odc.geobox != grid:
        raise CubeError(
            f"{store}: the prediction for {site_id} lies on another grid than its cube; predict "
            "from the cube itself"
        )

    def rows(views: Sequence[View]) -> Generator[Rows, None, None]:
        for view in views:
            yield _Map(view, probability.sel(year=list(view)).to_numpy()[None])

    origin = dict(card)
    if made_of:
        digest = model_digest(store, site_id, made_of)
        origin["made_of"] = {"prediction": made_of, "digest": digest}
    views = [(int(year),) for year in probability["year"]]
    prediction = Prediction(model=name, views=views, origin=origin)
    write_prediction(store, site_id, prediction, rows, overwrite=True)


@dataclass(frozen=True)
class _Writer:
    """Opens a prediction's group to write missing views."""

    store: Store
    site_id: str
    prediction: Prediction
    target: ChecksumStore
    pixels: Mapping[str, str]
    """As from `pixels_by_year`."""

    @property
    def path(self) -> str:
        return prediction_path(self.site_id, self.prediction.model)

    def begin(self, *, overwrite: bool) -> tuple[zarr.Group, dict[str, Any]]:
        """Open the group with room for all views. Returns the group and its complete views.

        Views of other builds lose their commit.

        Raises:
            CubeError: another model made the prediction.
        """
        variable = self.prediction.variable
        attrs = {} if overwrite else self._stored_attributes()
        stored = views_in(attrs)
        views = stored + [view for view in self.prediction.views if view not in stored]
        axis = axis_of(variable, views)
        is_new = not stored or len(set(axis)) < len(axis)  # the latter: a series of other years
        if is_new:
            attrs = {}
            views = list(self.prediction.views)
            self._create()
        group = zarr.open_group(self.target, path=self.path, mode="r+", use_consolidated=False)
        complete = self._current(attrs.get("done", {}))
        if attrs and (complete, views) == (attrs["done"], stored) and _fits(group, variable, views):
            return group, complete
        if not is_new:
            _grow(group, variable, views)
        group.attrs.put(seal({**group.attrs, **self._describe(attrs, views, complete)}))
        return group, complete

    def _current(self, complete: Mapping[str, Any]) -> dict[str, Any]:
        """Return the complete views of the current builds."""
        current = {}
        for label, entry in complete.items():
            years = map(int, label.split("-"))
            if entry["builds"] == select_years(years, self.pixels):
                current[label] = entry
        return current

    def _describe(
        self, attrs: Mapping[str, Any], views: Sequence[View], complete: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the group's attributes, with the checksums of all but the views to map."""
        variable = self.prediction.variable
        todo: set[int] = set()
        for view, indices in indices_of(variable, views).items():
            if label_of(view) not in complete:
                todo.update(indices)
        checksums = {**attrs.get("checksums", {}), **_checksums_of(self.target, self.path)}
        return {
            "model": dict(self.prediction.origin),
            "variable": variable,
            "views": [list(view) for view in views],
            "done": complete,
            "checksums": {
                key: checksum for key, checksum in checksums.items() if index_in(key) not in todo
            },
        }

    def _stored_attributes(self) -> dict[str, Any]:
        """Return the attributes left by an earlier run of this model.

        They are empty if group or variable is missing, or if the attributes do not match the
        checksum that they hold (`seal`).

        Raises:
            CubeError: another model made the prediction.
        """
        try:
            group = self.store.find_group(self.path)
        except CubeError:
            return {}
        if group is None or dict(group.attrs) != seal(group.attrs):
            return {}
        attrs = dict(group.attrs)
        is_same = sha256_of_json(attrs.get("model")) == sha256_of_json(dict(self.prediction.origin))
        if not is_same or attrs.get("variable") != self.prediction.variable:
            raise CubeError(
                f"{self.store}: {self.path} was made by another model; choose another --name, or "
                "replace that prediction with --overwrite"
            )
        return attrs if self.prediction.variable in group else {}

    def _create(self) -> None:
        site = self.store.open_site(self.site_id).attrs
        with self.store.reading(self.site_id):
            grid = grid_in(site)
            recipe = site[DESCRIPTION]["recipe"]
        variable = self.prediction.variable
        coords = dict(odc.geo.xr.xr_coords(grid))
        side = recipe["block_px"]
        lead: tuple[int, ...] = ()
        dims: tuple[str, ...] = ("year", "y", "x")
        if variable == "change":
            # Pairs are many and take one byte per pixel. Shards of two blocks' side keep the files
            # few.
            side *= 2
            lead = (len(self.prediction.classes),)
            dims = ("pair", "class", "y", "x")
            coords["class"] = np.asarray(self.prediction.classes, dtype=object)
        for name, values in coordinates_of(variable, self.prediction.views).items():
            coords[name] = (dims[0], np.array(values, np.int64))
        length = len(axis_of(variable, self.prediction.views))
        attrs = {
            "long_name": LONG_NAMES[variable],
            "nodata": UNKNOWN,
            "grid_mapping": "spatial_ref",
        }
        shard = (1, *lead, side, side)
        empty = dask.array.full((length, *lead, *grid.shape), UNKNOWN, dtype="uint8", chunks=shard)
        chunk = recipe["chunk_px"]
        if side % (2 * chunk) == 0:  # Zarr takes half a millisecond per chunk, also for a small one
            chunk *= 2
        layout = {"chunks": (1, *lead, chunk, chunk), "shards": shard, "fill_value": UNKNOWN}
        self.store.begin_group(self.path, {})
        dataset = xr.Dataset(
            {variable: (dims, empty, attrs)}, coords=coords, attrs=describe_location(grid)
        )
        write_template(dataset, self.target, self.path, {variable: layout})


def _checksums_of(target: ChecksumStore, path: str) -> dict[str, list[Any]]:
    """Return the checksums of everything written below a group, without its metadata."""
    sums = target.checksums_below(path, path)
    sums.pop("zarr.json", None)
    return sums


def _fits(group: zarr.Group, variable: str, views: Sequence[View]) -> bool:
    """Whether the group has room for exactly these views, under their names."""
    coordinates = coordinates_of(variable, views)
    is_named = all(group[name][:].tolist() == values for name, values in coordinates.items())
    return is_named and group[variable].shape[0] == len(axis_of(variable, views))


def _grow(group: zarr.Group, variable: str, views: Sequence[View]) -> None:
    """Make room for these views, and write all their names.

    A run killed during this step may have left any part of them.
    """
    length = len(axis_of(variable, views))
    coordinates = coordinates_of(variable, views)
    for name in (variable, *coordinates):
        array = group[name]
        array.resize((length, *array.shape[1:]))
        if name in coordinates:
            array[:] = np.array(coordinates[name], np.int64)


def _gather(rows: Iterator[Rows], view: View, array: zarr.Array) -> Iterator[tuple[int, UInt8]]:
    """Yield a view's map in whole rows of shards: first row, and [time, class, row, x].

    Raises:
        CubeError: rows of the view are missing.
    """
    height = array.shape[-2]
    side = array.shards[-2]
    y = 0
    gathered: UInt8 = np.empty((1, 1, 0, 0), np.uint8)
    while y < height:
        values = _next_rows(rows, view, y)
        offset = 0
        while offset < values.shape[-2]:
            top = y // side * side
            if y == top:
                shape = (*values.shape[:2], min(side, height - top), array.shape[-1])
                gathered = np.empty(shape, np.uint8)
            bottom = top + gathered.shape[-2]
            count = min(values.shape[-2] - offset, bottom - y)
            gathered[..., y - top : y - top + count, :] = values[..., offset : offset + count, :]
            y += count
            offset += count
            if y == bottom:
                yield top, gathered


def _next_rows(rows: Iterator[Rows], view: View, y: int) -> UInt8:
    """Return the next rows of a map, which must be those of this view from row `y` on."""
    part = next(rows, None)
    if part is None or part.view != view or part.y != y:
        text = "none" if part is None else f"row {part.y} of {label_of(part.view)}"
        raise CubeError(
            f"expected row {y} of {label_of(view)}, found {text}; this map is not committed"
        )
    return part.values


def _write_view(
    array: zarr.Array, indices: Sequence[int], parts: Iterator[tuple[int, UInt8]]
) -> None:
    """Write a view's map. One row of shards is written while the next is gathered."""
    with ThreadPoolExecutor(1) as pool:
        writing: Future[None] | None = None
        for y, values in parts:
            if writing is not None:
                writing.result()
            writing = pool.submit(_put_rows, array, indices, y, values)
        if writing is not None:
            writing.result()


def _put_rows(array: zarr.Array, indices: Sequence[int], y: int, values: UInt8) -> None:
    """Write rows from row `y` on: values [time, class, row, x] at these indices."""
    rows = slice(y, y + values.shape[-2])
    for index, classes in zip(indices, values, strict=True):
        if array.ndim == 4:
            array[index, :, rows, :] = classes
        else:
            array[index, rows, :] = classes[0]
