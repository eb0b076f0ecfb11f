"""Read the attributes of a prediction's group: its views, and which of them are complete.

A view is the input of one model call: one year, a pair of years, or all years. `views` lists all
views. For each complete one, `done` names the builds behind it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from minecube.cube.markers import name_pixels, read_markers
from minecube.cube.store import Store
from minecube.digests import sha256_of_json

View = tuple[int, ...]
LONG_NAMES = {
    "probability": "mine probability x 250",
    "change": "probability of change between two years x 250",
}
"""Variables of predictions, and their attribute `long_name`."""


def prediction_path(site_id: str, name: str) -> str:
    """Return the path of a prediction's group."""
    return f"{site_id}/predictions/{name}"


def pixels_by_year(store: Store, site_id: str) -> dict[str, str]:
    """Map each committed year, as text, to the name of its pixels (`name_pixels`)."""
    return {str(year): name_pixels(marker) for year, marker in read_markers(store, site_id).items()}


def select_years(view: Iterable[int], pixels: Mapping[str, str]) -> dict[str, str]:
    """Return the names of the pixels of a view's committed years."""
    return {str(year): pixels[str(year)] for year in view if str(year) in pixels}


def label_of(view: Iterable[int]) -> str:
    """Return a view's name in `done`: its years, with hyphens."""
    return "-".join(map(str, view))


def views_in(attrs: Mapping[str, Any]) -> list[View]:
    """List all views of a prediction."""
    return [tuple(view) for view in attrs.get("views", ())]


def list_mapped_pixels(attrs: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List year and pixels' name of each input of the complete views."""
    return [
        (year, pixels)
        for entry in attrs.get("done", {}).values()
        for year, pixels in entry["builds"].items()
    ]


def axis_of(variable: str, views: Sequence[View]) -> list[Any]:
    """Return the values of the first axis: pairs, or the years of all views."""
    if variable == "change":
        return list(views)
    return [year for view in views for year in view]


def coordinates_of(variable: str, views: Sequence[View]) -> dict[str, list[int]]:
    """Return the coordinates along the first axis."""
    if variable == "change":
        return {"first": [view[0] for view in views], "second": [view[1] for view in views]}
    return {"year": axis_of(variable, views)}


def indices_of(variable: str, views: Sequence[View]) -> dict[View, list[int]]:
    """Return the indices of each view on the first axis."""
    axis = axis_of(variable, views)
    indices = {}
    for view in views:
        values = [view] if variable == "change" else view
        indices[view] = [axis.index(value) for value in values]
    return indices


def completeness_by_index(attrs: Mapping[str, Any]) -> dict[int, bool]:
    """Map each index on the first axis to True if its view is complete."""
    entries = attrs.get("done", {})
    complete: dict[int, bool] = {}
    for view, indices in indices_of(attrs.get("variable", ""), views_in(attrs)).items():
        complete |= dict.fromkeys(indices, label_of(view) in entries)
    return complete


def list_unmapped(attrs: Mapping[str, Any], pixels: Mapping[str, str]) -> list[str]:
    """List the incomplete views of committed years. `pixels` is as from `pixels_by_year`."""
    entries = attrs.get("done", {})
    labels = []
    for view in views_in(attrs):
        is_committed = len(select_years(view, pixels)) == len(view)
        if label_of(view) not in entries and is_committed:
            labels.append(label_of(view))
    return sorted(labels)


def index_in(key: str) -> int | None:
    """Return the first index of a shard, from its key in the group; None for other objects."""
    variable, *parts = key.split("/")
    if variable in LONG_NAMES and parts[:1] == ["c"] and parts[1].isdigit():
        return int(parts[1])
    return None


def model_digest(store: Store, site_id: str, name: str) -> str | None:
    """Return the digest of a prediction's origin, also of an unfinished one; None if missing."""
    group = store.find_group(prediction_path(site_id, name))
    if group is None:
        return None
    return sha256_of_json(group.attrs.get("model"))
