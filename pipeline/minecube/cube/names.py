"""Find a prediction by its name, or by the model that made it."""

from __future__ import annotations

from collections.abc import Sequence

from zarr.core.sync import sync

from minecube.cube.store import exists, group_of
from minecube.errors import CubeError


def find_prediction(store: str, site_ids: Sequence[str], wanted: str) -> str:
    """Return the name of the prediction that `wanted` means at these sites.

    A prediction of exactly that name comes first, then the only one by the model card of that name, then the only one whose
    name begins with `wanted-`. `wanted+hmm` means the smoothed map of the prediction that `wanted` means.

    Raises:
        CubeError: no prediction fits, or several do.
    """
    names = sorted({name for site_id in site_ids for name in _listed(store, site_id)})
    if wanted in names:
        return wanted
    model, plus, suffix = wanted.partition("+")
    originals = [name for name in names if "+" not in name]
    matches = [name for name in originals if _card_of(store, site_ids, name) == model]
    if not matches:
        matches = [name for name in originals if name.startswith(f"{model}-")]
    if len(matches) > 1:
        raise CubeError(f"{store}: {model!r} may mean {' or '.join(matches)}; name one of them")
    found = f"{matches[0]}{plus}{suffix}" if matches else wanted
    if found not in names:
        there = f"it has {', '.join(names)}" if names else "run `minecube predict` first"
        raise CubeError(f"{store}: no prediction of {wanted!r} for {', '.join(site_ids)}; {there}")
    return found


def _listed(store: str, site_id: str) -> list[str]:
    """List the names of a site's predictions, damaged ones among them."""
    files = group_of(store, "").store

    async def listed() -> list[str]:
        return [name async for name in files.list_dir(f"{site_id}/predictions") if name != "zarr.json"]

    return list(sync(listed()))


def _card_of(store: str, site_ids: Sequence[str], name: str) -> str | None:
    """Return the id of the model card behind a prediction; None if no site's copy can be read."""
    for site_id in site_ids:
        path = f"{site_id}/predictions/{name}"
        try:
            about = group_of(store, path).attrs.get("model") if exists(store, path) else None
        except CubeError:  # damaged: another site may have it whole
            continue
        if isinstance(about, dict):
            return str(about.get("id"))
    return None
