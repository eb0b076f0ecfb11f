"""Open complete maps of models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
import zarr

from minecube.cube.store import Store
from minecube.cube.views import (
    axis_of,
    completeness_by_index,
    list_mapped_pixels,
    list_unmapped,
    model_digest,
    pixels_by_year,
    prediction_path,
    views_in,
)
from minecube.errors import CubeError


def open_probability(store: Store, site_id: str, name: str) -> xr.DataArray:
    """Open a model's probability over a site: lazy uint8 [year, y, x], x 250, 255 = missing.

    Raises:
        CubeError: the model has not mapped the site completely, the cube has other builds by now,
            the model maps change, or another model has replaced the map's source.
    """
    probability = _open(store, site_id, name, "probability")
    years = {str(year) for year in probability["year"].to_numpy()}
    later = set(pixels_by_year(store, site_id)) - years
    if later:
        raise _stale(store, site_id, name, min(later))
    if probability.indexes["year"].is_monotonic_increasing:
        return probability
    return probability.sortby("year")


def open_change(store: Store, site_id: str, name: str) -> xr.DataArray:
    """Open a model's change over a site: lazy uint8 [pair, class, y, x], x 250.

    The value is 255 if either year has no observation. Coordinates `first` and `second` are the
    years of each pair, in ascending order. `class` is "changed", "new", or "removed" and "new".

    Raises:
        CubeError: as `open_probability`. Years built later are no error: no map of them was
            requested.
    """
    change = _open(store, site_id, name, "change")
    order = np.lexsort((change["second"].to_numpy(), change["first"].to_numpy()))
    return change.isel(pair=order)


def read_variable(store: Store, site_id: str, model: str) -> str:
    """Return the variable mapped by a model at a site: probability or change.

    Raises:
        CubeError: the site has no prediction of this model.
    """
    return str(_open_group(store, site_id, model).attrs.get("variable", "probability"))


def _open_group(store: Store, site_id: str, model: str) -> zarr.Group:
    group = store.find_group(prediction_path(site_id, model))
    if group is None:
        raise CubeError(
            f"{store}: no prediction of {model!r} for {site_id}; run `minecube predict` first"
        )
    return group


def _open(store: Store, site_id: str, model: str, variable: str) -> xr.DataArray:
    """Open the complete views of a prediction, after checks of the model and the cube's builds."""
    group = _open_group(store, site_id, model)
    attrs = dict(group.attrs)
    pixels = pixels_by_year(store, site_id)
    views = views_in(attrs)
    if views and attrs["variable"] != variable:
        raise CubeError(
            f"{store}: {model!r} maps {attrs['variable']}, not {variable}; name a model that does"
        )
    incomplete = list_unmapped(attrs, pixels)
    is_unfinished = not attrs.get("done") or incomplete
    if is_unfinished or group[variable].shape[0] != len(axis_of(variable, views)):
        raise CubeError(
            f"{store}: {model!r} has not mapped {site_id} to its end: of {len(views) or 'its'} "
            f"maps lack {_list_missing(attrs, incomplete)}; run `minecube predict` again, it goes "
            "on from there"
        )
    inputs = list_mapped_pixels(attrs)
    changed = [year for year, name in inputs if pixels.get(year) != name]
    if changed:
        raise _stale(store, site_id, model, min(changed))
    _check_source(store, site_id, model, attrs)
    opened: xr.Dataset = xr.open_zarr(
        store.open_zarr(), group=prediction_path(site_id, model), consolidated=False
    )
    origin = {year: name.partition(":")[0] for year, name in sorted(inputs)}
    prediction = opened[variable].assign_attrs(model=attrs["model"], builds=origin)
    # Views of uncommitted years have no map.
    complete = [index for index, is_done in completeness_by_index(attrs).items() if is_done]
    if len(complete) == prediction.shape[0]:
        return prediction
    return prediction.isel({prediction.dims[0]: complete})


def _list_missing(attrs: Mapping[str, Any], incomplete: list[str]) -> str:
    """Name the missing views for a message."""
    if incomplete:
        return ", ".join(incomplete)
    if attrs.get("done"):
        return "those that were begun last"
    return "all"


def _check_source(store: Store, site_id: str, model: str, attrs: Mapping[str, Any]) -> None:
    """Raise CubeError if another model has replaced the prediction behind this one."""
    origin = attrs["model"].get("made_of")
    if not origin:
        return
    source = origin["prediction"]
    if model_digest(store, site_id, source) not in (origin["digest"], None):
        raise CubeError(
            f"{store}: {model!r} of {site_id} was made of an earlier {source!r} than is there now; "
            "make it again, a smoothed map by `minecube tracks`"
        )


def _stale(store: Store, site_id: str, model: str, year: str) -> CubeError:
    return CubeError(
        f"{store}: {model!r} mapped {site_id} before {year} was built as it is now; run "
        "`minecube predict` again"
    )
