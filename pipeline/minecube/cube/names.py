"""Find a prediction by its name, or by the model behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zarr.core.sync import sync

from minecube.cube.store import Store
from minecube.digests import sha256_of_json
from minecube.errors import CubeError

_EXACT = "="
"""Prefix of an exact prediction name, never a model card."""


def find_prediction(store: Store, site_ids: Sequence[str], wanted: str) -> str:
    """Return the name of the prediction meant by `wanted` at these sites.

    `wanted` is the name of a prediction, or the id of its model card. `=NAME` means the prediction
    of exactly this name. `wanted+hmm` means the smoothed map of the prediction meant by `wanted`.

    Raises:
        CubeError: no prediction fits, or several do.
    """
    names = sorted({name for site_id in site_ids for name in _listed(store, site_id)})
    exact = wanted.startswith(_EXACT)
    model, plus, suffix = wanted.removeprefix(_EXACT).partition("+")
    originals = sorted({name.partition("+")[0] for name in names})
    matches = [name for name in originals if name == model]
    if not exact:
        matches = [
            name for name in originals if name == model or _card_of(store, site_ids, name) == model
        ]
    if len(matches) > 1:
        # "=" distinguishes a name from a card of the same name.
        choices = " or ".join(f"{_EXACT}{name}" if name == model else name for name in matches)
        raise CubeError(f"{store}: {model!r} may mean {choices}; name one of them")
    found = f"{matches[0]}{plus}{suffix}" if matches else wanted
    if found not in names:
        there = f"it has {', '.join(names)}" if names else "run `minecube predict` first"
        raise CubeError(f"{store}: no prediction of {wanted!r} for {', '.join(site_ids)}; {there}")
    return found


def choose_name(
    store: Store, site_ids: Sequence[str], about: Mapping[str, Any], default: str
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
    card = str(about["id"])
    made_by = [
        model for site_id in site_ids if (model := _model_of(store, site_id, card)) is not None
    ]
    same = [sha256_of_json(model) == sha256_of_json(dict(about)) for model in made_by]
    return card if same and all(same) else default


def _listed(store: Store, site_id: str) -> list[str]:
    """List the names of a site's predictions, including damaged ones."""
    files = store.open_group("").store

    async def listed() -> list[str]:
        return [
            name async for name in files.list_dir(f"{site_id}/predictions") if name != "zarr.json"
        ]

    return list(sync(listed()))


def _card_of(store: Store, site_ids: Sequence[str], name: str) -> str | None:
    """Return the id of the model card behind a prediction; None if no site's copy can be read."""
    models = (_model_of(store, site_id, name) for site_id in site_ids)
    return next((str(model.get("id")) for model in models if model is not None), None)


def _model_of(store: Store, site_id: str, name: str) -> dict[str, Any] | None:
    """Return the origin of a site's prediction; None if it is missing or damaged."""
    path = f"{site_id}/predictions/{name}"
    try:
        model = store.open_group(path).attrs.get("model") if store.has_group(path) else None
    except CubeError:
        return None
    return model if isinstance(model, dict) else None
