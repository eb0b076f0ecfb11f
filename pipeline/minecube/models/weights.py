"""Get trained weights by card, check their SHA-256, and only then open them.

A file is either one of ours, with card, mean and deviation, or a state_dict of the card's network.
For a state_dict, the card gives mean and deviation. The state_dict may lie in a checkpoint, as
Lightning writes them, under its own prefix.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import requests
import torch
from torch import Tensor

from minecube.catalog import ModelCard, Weights
from minecube.errors import ModelError, UnreadWeightsError
from minecube.files import replacing
from minecube.models.files import Placeholder, unpickled
from minecube.models.network import Trained, build, filled, foreign, load, model_of

log = logging.getLogger(__name__)

_TIMEOUT_S = 60


def find(name: str, cards: Mapping[str, ModelCard], cache: Path | None = None) -> Trained:
    """Load a trained model by the path of its file or by the name of a card.

    Args:
        name: Path of a file written by `save`, or a key of `cards`.
        cards: The catalogue's cards.
        cache: As for `fetch`.

    Raises:
        ModelError: The name is neither. The file is not a model. The card has no weights, or
            `fetch` refuses them.
    """
    if Path(name).is_file():
        return load(Path(name))
    if name not in cards:
        raise ModelError(
            f"{name}: is neither the file of a trained model nor a model of the catalogue; train one with `minecube train`, "
            "and see `minecube models` for the names"
        )
    return fetch(cards[name], cache)


def fetch(card: ModelCard, cache: Path | None = None) -> Trained:
    """Load the card's network with the weights named in the card.

    Args:
        card: Its `weights` have an address, http(s):// or a path.
        cache: Folder of downloads, named by hash. Default: `minecube` in torch's own
            (`torch.hub.get_dir()`, set by `TORCH_HOME`).

    Raises:
        ModelError: The card names no weights. The weights cannot be read, downloaded or written.
            Their hash is not the card's. They are of another architecture, task, other options,
            bands or classes. Neither they nor the card have mean and deviation.
    """
    if card.weights is None:
        raise ModelError(
            f"model {card.id}: its card names no trained weights; train it with `minecube train --model {card.id}`, and give "
            "the file that comes of it"
        )
    where, content = _verified(card.weights, cache or Path(torch.hub.get_dir()) / "minecube")
    found = unpickled(content, foreign(where), placeholders=True)
    if isinstance(found, dict) and str(found.get("format")).startswith("minecube"):
        return _ours(card, unpickled(content, foreign(where)), where)
    return _plain(card, found, where)


def _verified(weights: Weights, cache: Path) -> tuple[str, bytes]:
    """Return the file's name for messages, and its content.

    Raises:
        ModelError: The file cannot be read, or its hash is not the card's.
    """
    if "://" not in weights.href:
        content = _read(Path(weights.href))
        _need_hash(weights, weights.href, hashlib.sha256(content).hexdigest())
        return weights.href, content
    kept = cache / f"{weights.sha256}.pt"
    if not kept.is_file() or hashlib.sha256(kept.read_bytes()).hexdigest() != weights.sha256:
        _download(weights, kept)
    return _without_query(weights.href), _read(kept)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: the weights cannot be read ({error})") from error


def _need_hash(weights: Weights, where: str, found: str) -> None:
    if found != weights.sha256:
        raise ModelError(
            f"{where}: expected a file of sha256 {weights.sha256}, as its card says, found {found}; it is another file, or "
            "damaged, and was not opened: get it again, or correct the card if you know where this one comes from"
        )


def _download(weights: Weights, kept: Path) -> None:
    """Download the URL to `kept`, whole and with the right hash, or not at all."""
    where = _without_query(weights.href)
    if not weights.href.startswith(("http://", "https://")):
        raise ModelError(
            f"{where}: expected weights at http(s)://, or a path; get the file yourself, and put its path there"
        )
    digest = hashlib.sha256()
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with replacing(kept) as part:
            with (
                requests.get(weights.href, stream=True, timeout=_TIMEOUT_S) as answer,
                part.open("wb") as file,
            ):
                answer.raise_for_status()
                for piece in answer.iter_content(1 << 20):  # raises if cut short
                    file.write(piece)
                    digest.update(piece)
            _need_hash(weights, where, digest.hexdigest())
    except OSError as error:  # includes those of requests
        raise UnreadWeightsError(
            f"{where}: the weights cannot be downloaded to {kept.parent} ({_without_query(str(error))}); try again"
        ) from error


def _without_query(text: str) -> str:
    """Remove the query of URLs, since a signature in it is a secret."""
    return re.sub(r"\?\S*", "", text)


def _ours(card: ModelCard, content: dict[str, Any], where: str) -> Trained:
    trained = model_of(content, where)
    for name in ("architecture", "task", "options", "bands", "classes"):
        said, found = getattr(card, name), getattr(trained.card, name)
        if said != found:
            raise ModelError(
                f"{where}: expected weights of model {card.id} with {name} {said}, found {found}; they would be misread: "
                "correct the card, or name the right file"
            )
    for name in ("mean", "std"):
        said, found = getattr(card.weights, name), getattr(trained, name)
        if said and said != found:
            raise ModelError(
                f"{where}: expected {name} {said}, as the card says, found {found}; leave it out of the card"
            )
    return dataclasses.replace(trained, card=card)


def _plain(card: ModelCard, content: Any, where: str) -> Trained:
    state = _state(card, content, where)
    weights = card.weights
    if weights is None or not weights.mean:
        raise ModelError(
            f"{where}: is a state_dict, which does not say by which mean and deviation its network was trained; give `mean` "
            f"and `std` of its bands in the weights of model {card.id}"
        )
    sites = tuple(site.strip() for site in card.trained_on.split(",") if site.strip())
    return Trained(
        card=card,
        network=filled(card, state, where),
        mean=weights.mean,
        std=weights.std,
        sites=sites,
    )


def _state(card: ModelCard, content: Any, where: str) -> dict[str, Tensor]:
    """Extract the network's state_dict from another program's file, by the network's own names.

    It may lie one level down (`state_dict` of Lightning), and below a prefix (`module.` of
    DataParallel, `model.` of Lightning). Tensors without the prefix are left out and named in a
    warning. Without a prefix, tensors of parts unknown to the network, such as a loss, are left out
    likewise.

    Raises:
        ModelError: The file holds no such state_dict, or several.
    """
    with torch.device("meta"):
        names = list(build(card).state_dict())
    states = _tensors(content)
    found = [
        (place, prefix) for place, state in states.items() for prefix in _prefixes(state, names)
    ]
    places = [
        " in ".join(filter(None, [prefix and f"prefix {prefix!r}", place]))
        for place, prefix in found
    ]
    if len(found) > 1:
        listed = "; ".join(place or "without a prefix" for place in places)
        raise ModelError(
            f"{where}: holds the weights of {card.architecture} {len(found)} times ({listed}), and does not say "
            "which are meant; save those that are"
        )
    if not found and list(states) == [""]:
        return states[""]  # `filled` refuses it and names the differences
    if not found:
        raise ModelError(
            f"{where}: expected a model that minecube wrote, or a state_dict of {card.architecture}, with tensors such as "
            f"{names[0]}; found {_described(content, states)}; save the network's state_dict() by torch.save"
        )
    place, prefix = found[0]
    parts = {name.partition(".")[0] for name in names}
    others = [
        n
        for n in states[place]
        if not n.startswith(prefix) or (not prefix and n.partition(".")[0] not in parts)
    ]
    left_out = set(others)
    own = {
        name.removeprefix(prefix): value
        for name, value in states[place].items()
        if name not in left_out
    }
    if places[0]:
        log.info("%s: the weights are those with %s", where, places[0])
    if others:
        log.warning(
            "%s: left out %s, which are no weights of %s",
            where,
            ", ".join(others),
            card.architecture,
        )
    return own


def _tensors(content: Any) -> dict[str, dict[str, Tensor]]:
    """Collect the tables of tensors in a file, by their place.

    `_orig_mod`, put into names by torch.compile, is removed.
    """
    if not isinstance(content, dict):
        return {}
    places = {
        "": content,
        **{str(key): value for key, value in content.items() if isinstance(value, dict)},
    }
    tables = {
        place: {
            str(name).replace("_orig_mod.", ""): value
            for name, value in table.items()
            if isinstance(value, Tensor)
        }
        for place, table in places.items()
    }
    return {place: table for place, table in tables.items() if table}


def _prefixes(state: Mapping[str, Tensor], names: list[str]) -> list[str]:
    """List the prefixes of a state_dict before all of a network's names, "" included."""
    # Batch counters exist since torch 0.4.1; `load_state_dict` works without them.
    needed = [name for name in names if not name.endswith("num_batches_tracked")]
    before = [name.removesuffix(needed[0]) for name in state if name.endswith(needed[0])]
    return [p for p in before if p[-1:] in ("", ".") and all(p + name in state for name in needed)]


def _described(content: Any, states: Mapping[str, Mapping[str, Tensor]]) -> str:
    """Describe the content of another program's file."""
    if isinstance(content, Placeholder):
        return f"a pickled {_class(content)}, whose code is not run"
    if not isinstance(content, dict):
        return f"a {_class(content)}"
    if states:
        return ", ".join(
            f"{next(iter(state))} in {place or 'no dictionary of its own'}"
            for place, state in states.items()
        )
    keys = ", ".join(map(str, list(content)[:5]))
    kinds = ", ".join(sorted({_class(value) for value in content.values()})[:5])
    return f"a dictionary of {kinds} ({keys})" if content else "an empty dictionary"


def _class(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")
