"""Write and open maps of models.

A map is written in rows from top to bottom and committed view by view. Only complete maps can be
opened.

A view is the input of one model call: one year, a pair of years, or all years. The attributes of a
prediction's group list all its views (`views`) and the complete ones (`done`). For each complete
view, `done` names the builds behind it. Checksums cover complete views only. A killed run leaves
shards of an incomplete view. The next run maps only incomplete views again. Only one run at a time
writes a prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import dask.array
import numpy as np
import numpy.typing as npt
import odc.geo.xr  # registers the .odc accessor
import xarray as xr
import zarr

from minecube.cube.builds import builds, pixels_of
from minecube.cube.checksums import ChecksumStore, sealed
from minecube.cube.locks import hold
from minecube.cube.store import NAMED, Store
from minecube.cube.template import geozarr, grid_in
from minecube.digests import sha256_of_json
from minecube.errors import CubeError

View = tuple[int, ...]
_LONG_NAMES = {
    "probability": "mine probability x 250",
    "change": "probability of change between two years x 250",
}


class Rows(Protocol):
    """Rows of one view's map (`models.Rows`)."""

    @property
    def view(self) -> View:
        """The view of these rows."""

    @property
    def y(self) -> int:
        """The first row."""

    @property
    def values(self) -> npt.NDArray[np.uint8]:
        """Levels as [time, class, row, x]."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The views to map, and the model."""

    model: str
    """Name of the group."""
    views: Sequence[View]
    about: Mapping[str, Any]
    """Origin of the map, as plain JSON. A map of another origin is only replaced with
    `overwrite`."""
    variable: str = "probability"
    """probability (year, y, x), or change (pair, class, y, x)."""
    classes: Sequence[str] = ("mine",)
    computed: str = ""
    """Place and manner of the computation. They do not change the identity of a map."""

    def __post_init__(self) -> None:
        if self.variable not in _LONG_NAMES:
            raise CubeError(
                f"expected a prediction of {' or '.join(_LONG_NAMES)}, found {self.variable!r}"
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
        store: local path or object-store URL.
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
    target, now = store.open_with_checksums(), _pixels(store, site_id)
    unbuilt = [_label(view) for view in prediction.views if len(_of(view, now)) < len(view)]
    if unbuilt:
        raise CubeError(
            f"{store}: {unbuilt[0]} of {site_id} is not committed, and its pixels may change under the map; run `minecube "
            "build` until it says built"
        )
    with store.writing(), hold(store, f"{site_id}/predictions/{prediction.model}") as lock:
        group, done = _begin(store, site_id, prediction, target, now, overwrite=overwrite)
        todo = [view for view in prediction.views if _label(view) not in done]
        if not todo:
            return []
        written = dict(group.attrs["checksums"])
        array = group[prediction.variable]
        at = _places(prediction.variable, _views(group.attrs))
        with closing(rows(todo)) as given, ThreadPoolExecutor(1) as pool:
            for view, parts in _by_view(given, todo, array):
                last: Future[None] | None = None
                for y, values in parts:
                    if last is not None:
                        last.result()
                    last = pool.submit(_put, array, at[view], y, values)
                if last is not None:
                    last.result()
                lock.check()
                done[_label(view)] = {"builds": _of(view, now), "computed": prediction.computed}
                sums = {**written, **_sums(target, group.path)}
                group.attrs.put(
                    sealed({**group.attrs, "done": done, "checksums": sums})
                )  # the commit
    return todo


def write_probability(
    store: Store,
    site_id: str,
    model: str,
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
        grid = grid_in(store.open_site(site_id, mode="r").attrs)
    if probability.odc.geobox != grid:
        raise CubeError(
            f"{store}: the prediction for {site_id} lies on another grid than its cube; predict from the cube itself"
        )

    @dataclass(frozen=True)
    class Whole:
        view: View
        values: npt.NDArray[np.uint8]
        y: int = 0

    def rows(views: Sequence[View]) -> Generator[Rows, None, None]:
        for view in views:
            yield Whole(view, probability.sel(year=list(view)).to_numpy()[None])

    views = [(int(year),) for year in probability["year"]]
    origin = (
        {"made_of": {"prediction": made_of, "digest": _maker(store, site_id, made_of)}}
        if made_of
        else {}
    )
    write_prediction(
        store,
        site_id,
        Prediction(model=model, views=views, about={**card, **origin}),
        rows,
        overwrite=True,
    )


def open_probability(store: Store, site_id: str, model: str) -> xr.DataArray:
    """Open a model's probability over a site: lazy uint8 [year, y, x], x 250, 255 = missing.

    Raises:
        CubeError: the model has not mapped the site completely, the cube has other builds by now,
            the model maps change, or another model has replaced the map's source.
    """
    probability = _open(store, site_id, model, "probability")
    unmapped = set(_pixels(store, site_id)) - {str(year) for year in probability["year"].to_numpy()}
    if unmapped:
        raise _stale(store, site_id, model, min(unmapped))
    return (
        probability
        if probability.indexes["year"].is_monotonic_increasing
        else probability.sortby("year")
    )


def open_change(store: Store, site_id: str, model: str) -> xr.DataArray:
    """Open a model's change over a site: lazy uint8 [pair, class, y, x], x 250.

    The value is 255 if either year has no observation. Coordinates `first` and `second` are the
    years of each pair. `class` is "changed", "new", or "removed" and "new".

    Raises:
        CubeError: as `open_probability`. Years built later are no error: no map of them was
            requested.
    """
    return _open(store, site_id, model, "change")


def mapped_by(store: Store, site_id: str, model: str) -> str:
    """Return the variable mapped by a model at a site: probability or change.

    Raises:
        CubeError: the site has no prediction of this model.
    """
    return str(_group(store, site_id, model).attrs.get("variable", "probability"))


def _group(store: Store, site_id: str, model: str) -> zarr.Group:
    path = f"{site_id}/predictions/{model}"
    if not store.has_group(path):
        raise CubeError(
            f"{store}: no prediction of {model!r} for {site_id}; run `minecube predict` first"
        )
    return store.open_group(path)


def _open(store: Store, site_id: str, model: str, variable: str) -> xr.DataArray:
    path, group = f"{site_id}/predictions/{model}", _group(store, site_id, model)
    attrs = dict(group.attrs)
    views, done, now = _views(attrs), attrs.get("done", {}), _pixels(store, site_id)
    if views and attrs["variable"] != variable:
        raise CubeError(
            f"{store}: {model!r} maps {attrs['variable']}, not {variable}; name a model that does"
        )
    lacking = unmapped(attrs, now)
    if not done or lacking or group[variable].shape[0] != len(_axis(variable, views)):
        rest = "those that were begun last" if done else "all"
        raise CubeError(
            f"{store}: {model!r} has not mapped {site_id} to its end: of {len(views) or 'its'} maps lack "
            f"{', '.join(lacking) or rest}; run `minecube predict` again, it goes on from there"
        )
    mapped_from = {
        year: build.partition(":")[0]
        for of in done.values()
        for year, build in of["builds"].items()
    }
    changed = [
        year
        for of in done.values()
        for year, build in of["builds"].items()
        if now.get(year) != build
    ]
    if changed:
        raise _stale(store, site_id, model, min(changed))
    origin = attrs["model"].get("made_of")
    if origin and _maker(store, site_id, origin["prediction"]) not in (origin["digest"], None):
        raise CubeError(
            f"{store}: {model!r} of {site_id} was made of an earlier {origin['prediction']!r} than is there now; make it "
            "again, a smoothed map by `minecube tracks`"
        )
    opened: xr.Dataset = xr.open_zarr(store.open_zarr(), group=path, consolidated=False)
    found = opened[variable].assign_attrs(model=attrs["model"], builds=mapped_from)
    whole = [n for n, done in places(attrs).items() if done]  # without views of uncommitted years
    return found if len(whole) == found.shape[0] else found.isel({found.dims[0]: whole})


def _maker(store: Store, site_id: str, model: str) -> str | None:
    """Return the digest of a prediction's origin, also of an unfinished one; None if missing."""
    path = f"{site_id}/predictions/{model}"
    return (
        sha256_of_json(store.open_group(path).attrs.get("model")) if store.has_group(path) else None
    )


def _stale(store: Store, site_id: str, model: str, year: str) -> CubeError:
    return CubeError(
        f"{store}: {model!r} mapped {site_id} before {year} was built as it is now; run `minecube predict` again"
    )


def _pixels(store: Store, site_id: str) -> dict[str, str]:
    return {str(year): pixels_of(made) for year, made in builds(store, site_id).items()}


def _of(view: Iterable[int], now: Mapping[str, str]) -> dict[str, str]:
    return {str(year): now[str(year)] for year in view if str(year) in now}


def _label(view: Iterable[int]) -> str:
    return "-".join(map(str, view))


def _views(attrs: Mapping[str, Any]) -> list[View]:
    return [tuple(view) for view in attrs.get("views", ())]


def _axis(variable: str, views: Sequence[View]) -> list[Any]:
    """Return the values of the first axis: pairs, or the years of all views."""
    return list(views) if variable == "change" else [year for view in views for year in view]


def _places(variable: str, views: Sequence[View]) -> dict[View, list[int]]:
    """Return the indices of each view on the first axis."""
    axis = _axis(variable, views)
    return {
        view: [axis.index(v) for v in ([view] if variable == "change" else view)] for view in views
    }


def _begin(
    store: Store,
    site_id: str,
    prediction: Prediction,
    target: ChecksumStore,
    now: Mapping[str, str],
    *,
    overwrite: bool,
) -> tuple[zarr.Group, dict[str, Any]]:
    """Open the group with room for all views. Returns the group and its complete, current views.

    The other views lose their commit.
    """
    path, variable = f"{site_id}/predictions/{prediction.model}", prediction.variable
    attrs = {} if overwrite else _kept(store, path, prediction)
    old = _views(attrs)
    views = old + [view for view in prediction.views if view not in old]
    axis = _axis(variable, views)
    fresh = not old or len(set(axis)) < len(axis)  # a series of other years
    if fresh:
        attrs, views = {}, list(prediction.views)
        _template(store, site_id, prediction, target)
    group = zarr.open_group(target, path=path, mode="r+", use_consolidated=False)
    kept = {
        name: of
        for name, of in attrs.get("done", {}).items()
        if of["builds"] == _of(map(int, name.split("-")), now)
    }
    if attrs and (kept, views) == (attrs["done"], old) and _fits(group, variable, views):
        return group, kept
    again = {
        n for view, at in _places(variable, views).items() if _label(view) not in kept for n in at
    }
    if not fresh:
        _grow(group, variable, views)
    sums = {**attrs.get("checksums", {}), **_sums(target, path)}
    sums = {key: value for key, value in sums.items() if place_of(key) not in again}
    about = {
        "model": dict(prediction.about),
        "variable": variable,
        "views": [list(view) for view in views],
    }
    group.attrs.put(sealed({**group.attrs, **about, "done": kept, "checksums": sums}))
    return group, kept


def _sums(target: ChecksumStore, path: str) -> dict[str, list[Any]]:
    return {
        key: value
        for key, value in target.checksums_below(path, path).items()
        if key != "zarr.json"
    }


def place_of(key: str) -> int | None:
    """Return the first index of a shard, from its key in the group; None for other objects."""
    variable, *rest = key.split("/")
    return (
        int(rest[1])
        if variable in _LONG_NAMES and rest[:1] == ["c"] and rest[1].isdigit()
        else None
    )


def places(attrs: Mapping[str, Any]) -> dict[int, bool]:
    """Map each index on the first axis to True if its view is complete.

    `attrs` are the attributes of a prediction's group.
    """
    at = _places(attrs.get("variable", ""), _views(attrs))
    return {
        n: _label(view) in attrs.get("done", {}) for view, indices in at.items() for n in indices
    }


def unmapped(attrs: Mapping[str, Any], now: Mapping[str, str]) -> list[str]:
    """List the incomplete views of committed years (`now`).

    `attrs` are the attributes of a prediction's group.
    """
    done = attrs.get("done", {})
    return [
        _label(view)
        for view in _views(attrs)
        if _label(view) not in done and len(_of(view, now)) == len(view)
    ]


def _kept(store: Store, path: str, prediction: Prediction) -> dict[str, Any]:
    """Return the attributes left by an earlier run of this model; empty if missing or damaged.

    Raises:
        CubeError: another model made the prediction.
    """
    try:
        if not store.has_group(path):
            return {}
        group = store.open_group(path)
    except CubeError:
        return {}
    attrs = dict(group.attrs)
    if attrs != sealed(attrs):
        return {}
    if (
        sha256_of_json(attrs.get("model")) != sha256_of_json(dict(prediction.about))
        or attrs.get("variable") != prediction.variable
    ):
        raise CubeError(
            f"{store}: {path} was made by another model; choose another --name, or replace that prediction with --overwrite"
        )
    return attrs if prediction.variable in group else {}


def _template(store: Store, site_id: str, prediction: Prediction, target: ChecksumStore) -> None:
    """Create the group without pixels."""
    about = store.open_site(site_id, mode="r").attrs
    with store.reading(site_id):
        grid, recipe = grid_in(about), about[NAMED]["recipe"]
    side, chunk, variable = recipe["block_px"], recipe["chunk_px"], prediction.variable
    axis, coords = _axis(variable, prediction.views), dict(odc.geo.xr.xr_coords(grid))
    lead: tuple[int, ...] = ()
    dims: tuple[str, ...] = ("year", "y", "x")
    if variable == "change":
        # Pairs are many and take one byte per pixel. Shards of two blocks' side keep the files few.
        side, lead, dims = 2 * side, (len(prediction.classes),), ("pair", "class", "y", "x")
        coords["class"] = np.asarray(prediction.classes, dtype=object)
    coords |= {
        name: (dims[0], np.array(values, np.int64))
        for name, values in _coordinates(variable, prediction.views).items()
    }
    empty = dask.array.full(
        (len(axis), *lead, *grid.shape), 255, dtype="uint8", chunks=(1, *lead, side, side)
    )
    described = {"long_name": _LONG_NAMES[variable], "nodata": 255, "grid_mapping": "spatial_ref"}
    dataset = xr.Dataset({variable: (dims, empty, described)}, coords=coords, attrs=geozarr(grid))
    if side % (2 * chunk) == 0:  # Zarr takes half a millisecond per chunk, also for a small one
        chunk *= 2
    shape = {
        "chunks": (1, *lead, chunk, chunk),
        "shards": (1, *lead, side, side),
        "fill_value": 255,
    }
    path = f"{site_id}/predictions/{prediction.model}"
    store.begin_group(path, {})
    dataset.to_zarr(
        target,
        group=path,
        mode="a",
        compute=False,
        consolidated=False,
        zarr_format=3,
        encoding={variable: shape},
    )


def _coordinates(variable: str, views: Sequence[View]) -> dict[str, list[int]]:
    """Return the coordinates along the first axis."""
    axis = _axis(variable, views)
    return (
        {"first": [v[0] for v in axis], "second": [v[1] for v in axis]}
        if variable == "change"
        else {"year": axis}
    )


def _fits(group: zarr.Group, variable: str, views: Sequence[View]) -> bool:
    """Whether the group has room for exactly these views, under their names."""
    named = all(
        group[name][:].tolist() == values for name, values in _coordinates(variable, views).items()
    )
    return named and group[variable].shape[0] == len(_axis(variable, views))


def _grow(group: zarr.Group, variable: str, views: Sequence[View]) -> None:
    """Make room for these views, and write all their names.

    A run killed during this step may have left any part of them.
    """
    for name, values in {variable: None, **_coordinates(variable, views)}.items():
        array = group[name]
        array.resize((len(_axis(variable, views)), *array.shape[1:]))
        if values is not None:
            array[:] = np.array(values, np.int64)


def _by_view(
    rows: Iterator[Rows], todo: Sequence[View], array: zarr.Array
) -> Iterator[tuple[View, Iterator[tuple[int, npt.NDArray[np.uint8]]]]]:
    """Yield each view and its map in whole rows of shards: first row, and [time, class, row, x]."""
    height, side = array.shape[-2], array.shards[-2]

    def parts(view: View) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
        at, gathered = 0, np.empty((1, 1, 0, 0), np.uint8)
        while at < height:
            given = next(rows, None)
            if given is None or given.view != view or given.y != at:
                found = "none" if given is None else f"row {given.y} of {_label(given.view)}"
                raise CubeError(
                    f"expected row {at} of {_label(view)}, found {found}; this map is not committed"
                )
            done = 0
            while done < given.values.shape[-2]:
                first = at // side * side
                if at == first:
                    gathered = np.empty(
                        (*given.values.shape[:2], min(side, height - first), array.shape[-1]),
                        np.uint8,
                    )
                count = min(given.values.shape[-2] - done, first + gathered.shape[-2] - at)
                gathered[..., at - first : at - first + count, :] = given.values[
                    ..., done : done + count, :
                ]
                at, done = at + count, done + count
                if at == first + gathered.shape[-2]:
                    yield first, gathered

    for view in todo:
        yield view, parts(view)


def _put(array: zarr.Array, at: Sequence[int], y: int, values: npt.NDArray[np.uint8]) -> None:
    place = (slice(y, y + values.shape[-2]), slice(None))
    for n, of_one in zip(at, values, strict=True):
        array[(n, *(slice(None) for _ in range(array.ndim - 3)), *place)] = (
            of_one if array.ndim == 4 else of_one[0]
        )
