"""Remember finished steps of sites in the store, with what they were made from.

    cubes.zarr/.runs/steps/STEP/SITE.json    {"inputs": hash, "outputs": hash, "time": ...}

The file is written after the outputs. A step is finished if its inputs are the same as now, and
its outputs are still there. If `inputs` has times of files, `content` is a hash of their content.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from operator import methodcaller
from typing import Any

import msgspec

from minecube.cube.events import RUNS
from minecube.cube.store import Store
from minecube.files import replacing
from minecube.places import Place, place_of

_READERS = 32  # simultaneous requests to an object store


def folder_of_notes(store: Store, step: str) -> Place:
    """Return the folder with the notes of a step."""
    return place_of(store.name) / _folder(step)


def _folder(step: str) -> str:
    return f"{RUNS}/steps/{step}"


def _key(step: str, name: str) -> str:
    return f"{_folder(step)}/{name}.json"


def note_finished(
    store: Store, step: str, name: str, inputs: str, outputs: Any, content: str | None = None
) -> None:
    """Note that a step is finished for a site (or a dataset, by its name).

    `content` is a further hash of the inputs, for inputs that have times of files.

    Raises:
        CubeError: the store cannot be written.
    """
    note = {"inputs": inputs, "outputs": outputs, "time": datetime.now(tz=UTC).isoformat()}
    if content is not None:
        note["content"] = content
    text = msgspec.json.encode(note, enc_hook=methodcaller("tolist"))  # numbers of numpy
    with store.writing():
        if store.path is None:
            store.client().put(_key(step, name), text)
        else:
            path = store.path / _key(step, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as draft:
                draft.write_bytes(text)


def forget_finished(store: Store, step: str, name: str) -> None:
    """Note that a step is not finished: its outputs are about to change.

    Raises:
        CubeError: the store cannot be written.
    """
    if read_finished(store, step, name):
        note_finished(store, step, name, "", None)


def read_notes(store: Store, step: str, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the notes of finished steps, by name. Others are left out.

    Reads several notes at a time from an object store.
    """
    names = list(names)
    read = partial(read_finished, store, step)
    if store.path is not None:
        notes = list(map(read, names))
    else:
        with ThreadPoolExecutor(_READERS) as pool:
            notes = list(pool.map(read, names))
    return {name: note for name, note in zip(names, notes, strict=True) if note}


def read_finished(store: Store, step: str, name: str) -> dict[str, Any]:
    """Return the note of a finished step; empty for a missing, damaged or forgotten note."""
    try:
        if store.path is None:
            content = bytes(store.client().get(_key(step, name)).bytes())
        else:
            content = (store.path / _key(step, name)).read_bytes()
        note = msgspec.json.decode(content)
    except (FileNotFoundError, NotADirectoryError, ValueError, msgspec.DecodeError):
        return {}
    is_whole = isinstance(note, dict) and note.keys() >= {"inputs", "outputs"}
    return note if is_whole and note["inputs"] else {}
