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
from minecube.models.files import Placeholder, unpickle
from minecube.models.network import (
    TrainedModel,
    build,
    build_with_weights,
    load,
    not_a_model,
    read_model,
)
from minecube.places import place_of

log = logging.getLogger(__name__)

_TIMEOUT_S = 60


def find_model(name: str, cards: Mapping[str, ModelCard]) -> TrainedModel:
    """Load a trained model by the path or URL of its file, or by the name of a card.

    Raises:
        ModelError: The name is neither. The file is not a model. The card has no weights, or
            `fetch` refuses them.
    """
    if "://" in name or Path(name).is_file():
        return load(place_of(name))
    if name not in cards:
        raise ModelError(
            f"{name}: is neither the file of a trained model nor a model of the catalogue; train "
            "one with `minecube train`, and see `minecube models` for the names"
        )
    return fetch(cards[name])


def fetch(card: ModelCard, cache: Path | None = None) -> TrainedModel:
    """Load the card's network with the weights named in the card.

    Downloads are kept in the folder `cache`, named by hash. Default: `minecube` in torch's own
    (`torch.hub.get_dir()`, set by `TORCH_HOME`).

    Raises:
        ModelError: The card names no weights. The weights cannot be read, downloaded or written.
            Their hash is not the card's. They are of another architecture, task, other options,
            bands or classes. Neither they nor the card have mean and deviation.
    """
    if card.weights is None:
        raise ModelError(
            f"model {card.id}: its card names no trained weights; train it with `minecube train "
            f"--model {card.id}`, and give the file that comes of it"
        )
    file, data = _read_verified(card.weights, cache or Path(torch.hub.get_dir()) / "minecube")
    content = unpickle(data, not_a_model(file), placeholders=True)
    if isinstance(content, dict) and str(content.get("format")).startswith("minecube"):
        return _read_own(card, unpickle(data, not_a_model(file)), file)
    return _read_state_dict(card, content, file)


def _read_verified(weights: Weights, cache: Path) -> tuple[str, bytes]:
    """Return the file's name and content.

    Raises ModelError if the file cannot be read, or has another hash.
    """
    if "://" not in weights.href:
        content = _read(Path(weights.href))
        _need_hash(weights, weights.href, hashlib.sha256(content).hexdigest())
        return weights.href, content
    path = cache / f"{weights.sha256}.pt"
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != weights.sha256:
        _download(weights, path)
    return _remove_query(weights.href), _read(path)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: the weights cannot be read ({error})") from error


def _need_hash(weights: Weights, file: str, sha256: str) -> None:
    if sha256 != weights.sha256:
        raise ModelError(
            f"{file}: expected a file of sha256 {weights.sha256}, as its card says, found "
            f"{sha256}; it is another file, or damaged, and was not opened: get it again, or "
            "correct the card if you know where this one comes from"
        )


def _download(weights: Weights, path: Path) -> None:
    """Download the URL to `path`, whole and with the right hash, or not at all."""
    url = _remove_query(weights.href)
    if not weights.href.startswith(("http://", "https://")):
        raise ModelError(
            f"{url}: expected weights at http(s)://, or a path; get the file yourself, and put its "
            "path there"
        )
    digest = hashlib.sha256()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            with (
                requests.get(weights.href, stream=True, timeout=_TIMEOUT_S) as answer,
                part.open("wb") as file,
            ):
                answer.raise_for_status()
                for piece in answer.iter_content(1 << 20):  # raises if cut short
                    file.write(piece)
                    digest.update(piece)
            _need_hash(weights, url, digest.hexdigest())
    except OSError as error:  # includes those of requests
        raise UnreadWeightsError(
            f"{url}: the weights cannot be downloaded to {path.parent} "
            f"({_remove_query(str(error))}); try again"
        ) from error


def _remove_query(text: str) -> str:
    """Remove the query of URLs, since a signature in it is a secret."""
    return re.sub(r"\?\S*", "", text)


def _read_own(card: ModelCard, content: dict[str, Any], file: str) -> TrainedModel:
    """Read the content of one of our files, and check it against the card."""
    trained = read_model(content, file)
    for name in ("architecture", "task", "options", "bands", "classes"):
        expected = getattr(card, name)
        value = getattr(trained.card, name)
        if value != expected:
            raise ModelError(
                f"{file}: expected weights of model {card.id} with {name} {expected}, found "
                f"{value}; they would be misread: correct the card, or name the right file"
            )
    for name in ("mean", "std"):
        expected = getattr(card.weights, name)
        value = getattr(trained, name)
        if expected and value != expected:
            raise ModelError(
                f"{file}: expected {name} {expected}, as the card says, found {value}; leave it "
                "out of the card"
            )
    return dataclasses.replace(trained, card=card)


def _read_state_dict(card: ModelCard, content: Any, file: str) -> TrainedModel:
    state = _extract_state(card, content, file)
    weights = card.weights
    if weights is None or not weights.mean:
        raise ModelError(
            f"{file}: is a state_dict, which does not say by which mean and deviation its network "
            f"was trained; give `mean` and `std` of its bands in the weights of model {card.id}"
        )
    sites = tuple(site.strip() for site in card.trained_on.split(",") if site.strip())
    return TrainedModel(
        card=card,
        network=build_with_weights(card, state, file),
        mean=weights.mean,
        std=weights.std,
        sites=sites,
    )


def _extract_state(card: ModelCard, content: Any, file: str) -> dict[str, Tensor]:
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
    states = _collect_tensors(content)
    places = [
        (key, prefix) for key, state in states.items() for prefix in _list_prefixes(state, names)
    ]
    if len(places) > 1:
        listed = "; ".join(_describe_place(*place) or "without a prefix" for place in places)
        raise ModelError(
            f"{file}: holds the weights of {card.architecture} {len(places)} times ({listed}), and "
            "does not say which are meant; save those that are"
        )
    if not places and list(states) == [""]:
        return states[""]  # `build_with_weights` refuses it and names the differences
    if not places:
        raise ModelError(
            f"{file}: expected a model that minecube wrote, or a state_dict of "
            f"{card.architecture}, with tensors such as {names[0]}; found "
            f"{_describe_content(content, states)}; save the network's state_dict() by torch.save"
        )
    key, prefix = places[0]
    if key or prefix:
        log.info("%s: the weights are those with %s", file, _describe_place(key, prefix))
    parts = {name.partition(".")[0] for name in names}
    state = {}
    skipped = []
    for name, value in states[key].items():
        if name.startswith(prefix) and (prefix or name.partition(".")[0] in parts):
            state[name.removeprefix(prefix)] = value
        else:
            skipped.append(name)
    if skipped:
        log.warning(
            "%s: left out %s, which are no weights of %s",
            file,
            ", ".join(skipped),
            card.architecture,
        )
    return state


def _collect_tensors(content: Any) -> dict[str, dict[str, Tensor]]:
    """Collect the tables of tensors in a file, by their key; "" is the file itself.

    `_orig_mod`, put into names by torch.compile, is removed.
    """
    if not isinstance(content, dict):
        return {}
    tables = {"": content}
    tables |= {str(key): value for key, value in content.items() if isinstance(value, dict)}
    states = {key: _only_tensors(table) for key, table in tables.items()}
    return {key: state for key, state in states.items() if state}


def _only_tensors(table: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {
        str(name).replace("_orig_mod.", ""): value
        for name, value in table.items()
        if isinstance(value, Tensor)
    }


def _list_prefixes(state: Mapping[str, Tensor], names: list[str]) -> list[str]:
    """List the prefixes of a state_dict before all of a network's names, "" included."""
    # Batch counters exist since torch 0.4.1; `load_state_dict` works without them.
    required = [name for name in names if not name.endswith("num_batches_tracked")]
    prefixes = [name.removesuffix(required[0]) for name in state if name.endswith(required[0])]
    return [
        prefix
        for prefix in prefixes
        if prefix[-1:] in ("", ".") and all(prefix + name in state for name in required)
    ]


def _describe_place(key: str, prefix: str) -> str:
    if not prefix:
        return key
    return f"prefix {prefix!r} in {key}" if key else f"prefix {prefix!r}"


def _describe_content(content: Any, states: Mapping[str, Mapping[str, Tensor]]) -> str:
    """Describe the content of another program's file."""
    if isinstance(content, Placeholder):
        return f"a pickled {_class_name(content)}, whose code is not run"
    if not isinstance(content, dict):
        return f"a {_class_name(content)}"
    if states:
        return ", ".join(
            f"{next(iter(state))} in {key or 'no dictionary of its own'}"
            for key, state in states.items()
        )
    if not content:
        return "an empty dictionary"
    keys = ", ".join(map(str, list(content)[:5]))
    kinds = ", ".join(sorted({_class_name(value) for value in content.values()})[:5])
    return f"a dictionary of {kinds} ({keys})"


def _class_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")
