"""Keep a training's state on disk after each epoch, to resume it.

One file holds all of the state. A log lies next to it.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minecube.errors import ModelError
from minecube.models.files import pickle, unpickle, write_whole
from minecube.places import Place

FORMAT = "minecube-training-1"


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """Results of an epoch.

    Scores are those of the validation sites, NaN without any.
    """

    epoch: int
    """Number from 1."""
    loss: float
    """Mean over the epoch's steps."""
    f1: float
    iou: float
    precision: float
    recall: float
    learning_rate: float
    """Learning rate of the last step."""
    seconds: float
    """Duration, including validation."""
    windows_per_s: float
    """Windows per second of all processes together, without validation."""


def write_state(path: Place, content: Mapping[str, Any]) -> None:
    """Write a training's state whole, or raise ModelError and write nothing."""
    write_whole(path, pickle({"format": FORMAT, **content}))


def read_state(path: Place) -> dict[str, Any]:
    """Read a state of `write_state`; raise ModelError for any other or a damaged file."""
    not_a_state = (
        f"{path}: is not the state of a training of this version of minecube, or is damaged; "
        "remove it to train afresh"
    )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: the training's state cannot be read ({error})") from error
    content = unpickle(data, not_a_state)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ModelError(not_a_state)
    return content


def need_same(path: Place, state: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Raise ModelError with the differences if a state is another training's."""
    differences: list[str] = []
    for name, value in identity.items():
        if isinstance(value, Mapping):
            differences += [f"{name}'s {text}" for text in _list_differences(state[name], value)]
        else:
            differences += _list_differences({name: state[name]}, {name: value})
    if differences:
        raise ModelError(
            f"{path}: is the state of another training, it differs in {'; '.join(differences)}; "
            "going on would mix the two: ask for what it was begun with, or remove it to train "
            "afresh"
        )


def _list_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [
        f"{key} ({old.get(key)}, now {new.get(key)})"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]


def write_log(path: Place, history: Sequence[Epoch]) -> None:
    """Write all epochs so far as CSV whole, or raise ModelError and write nothing."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(f.name for f in dataclasses.fields(Epoch))
    rows.writerows(map(_format_epoch, history))
    write_whole(path, text.getvalue().encode())


def _format_epoch(epoch: Epoch) -> list[str]:
    values = dataclasses.astuple(epoch)
    return [f"{value:.6g}" if isinstance(value, float) else str(value) for value in values]
