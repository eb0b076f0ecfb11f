"""Find a prediction by its name, or by the model behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from minecube.cube.store import Store
from minecube.digests import sha256_of_json
from minecube.errors import CubeError

_EXACT = "="
"""Prefix of an exact prediction name, never a model card."""


def find_prediction(store: Store, site_ids: Sequence[str], name: str) -> str:
    """Return the name of the prediction meant by `wanted` at these sites.

    `wanted` is the name of a prediction, or the id of its model card. `=NAME` means the prediction
    of exactly this name. `wanted+hmm` means the smoothed map of the prediction meant by `wanted`.

    Raises:
        CubeError: no prediction fits, or several do.
    """
    names: set[str] = set()
    for site_id in site_ids:
        names.update(_list_predictions(store, site_id))
    model, plus, suffix = name.removeprefix(_EXACT).partition("+")
    originals = sorted({name.partition("+")[0] for name in names})
    if name.startswith(_EXACT):
        matches = [name for name in originals if name == model]
    else:
        matches = [name for name in originals if model in (name, _card_of(store, site_ids, name))]
    if len(matches) > 1:
        # "=" distinguishes a name from a card of the same name.
        choices = [f"{_EXACT}{name}" if name == model else name for name in matches]
        raise CubeError(f"{store}: {model!r} may mean {' or '.join(choices)}; name one of them")
    name = f"{matches[0]}{plus}{suffix}" if matches else name
    if name not in names:
        hint = "run `minecube predict` first"
        if names:
            hint = f"it has {', '.join(sorted(names))}"
        raise CubeError(f"{store}: no prediction of {name!r} for {', '.join(site_ids)}; {hint}")
    return name


def choose_name(
    store: Store, site_ids: Sequence[str], origin: Mapping[str, Any], default: str
) -> str:
    """Return the name for a model's maps.

    Older versions named a prediction only by its model card. That name is returned if it exists,
    for the same model at every site with it. Otherwise `default` is returned.

    Args:
        store: The cubes.
        site_ids: The sites to map.
        about: Origin of the maps, with the card's id.
        default: The name for a model without an older prediction.
    """
    card = str(origin["id"])
    origins = [_model_of(store, site_id, card) for site_id in site_ids]
    stored = [sha256_of_json(origin) for origin in origins if origin is not None]
    if set(stored) == {sha256_of_json(dict(origin))}:
        return card
    return default


def _list_predictions(store: Store, site_id: str) -> list[str]:
    """List the names of a site's predictions, including damaged ones."""
    folders = store.open_objects().list_with_delimiter(f"{site_id}/predictions")
    return [path.rstrip("/").rpartition("/")[2] for path in folders["common_prefixes"]]


def _card_of(store: Store, site_ids: Sequence[str], name: str) -> str | None:
    """Return the id of the model card behind a prediction; None if no site's copy can be read."""
    for site_id in site_ids:
        model = _model_of(store, site_id, name)
        if model is not None:
            return str(model.get("id"))
    return None


def _model_of(store: Store, site_id: str, name: str) -> dict[str, Any] | None:
    """Return the origin of a site's prediction; None if it is missing or damaged."""
    try:
        group = store.find_group(f"{site_id}/predictions/{name}")
    except CubeError:
        return None
    if group is None:
        return None
    model = group.attrs.get("model")
    return model if isinstance(model, dict) else None
