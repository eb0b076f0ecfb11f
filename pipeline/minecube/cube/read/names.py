"""Find a prediction by its name, or by the model behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from minecube.cube.store import Store
from minecube.cube.views import prediction_path
from minecube.digests import sha256_of_json
from minecube.errors import CubeError

_EXACT = "="
"""Prefix of an exact prediction name, never a model card."""


def find_prediction(store: Store, site_ids: Sequence[str], name: str) -> str:
    """Return the full name of the prediction meant by a name at these sites.

    The name is that of a prediction, or the id of its model card. `=NAME` means the prediction of
    exactly this name. `NAME+hmm` means the smoothed map of the prediction meant by NAME.

    Raises:
        CubeError: no prediction fits, or several do.
    """
    names: set[str] = set()
    for site_id in site_ids:
        names.update(store.list_folders(f"{site_id}/predictions"))
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
    """Return the name for a model's maps. `origin` is their origin, with the id of the model card.

    Older versions named a prediction only by its model card. That name is returned if it exists,
    for the same model at every site with it. Otherwise `default` is returned.
    """
    card = str(origin["id"])
    origins = [_model_of(store, site_id, card) for site_id in site_ids]
    stored = [sha256_of_json(origin) for origin in origins if origin is not None]
    if set(stored) == {sha256_of_json(dict(origin))}:
        return card
    return default


def _card_of(store: Store, site_ids: Sequence[str], name: str) -> str | None:
    """Return the id of the model card behind a prediction; None if no site's copy can be read."""
    for site_id in site_ids:
        model = _model_of(store, site_id, name)
        if model is not None:
            return str(model.get("id"))
    return None


def _model_of(store: Store, site_id: str, name: str) -> dict[str, Any] | None:
    """Return the origin of a site's prediction; None if it is missing or damaged."""
    model = store.read_attributes(prediction_path(site_id, name)).get("model")
    return model if isinstance(model, dict) else None
