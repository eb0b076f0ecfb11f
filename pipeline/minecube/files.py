"""Write a file or a folder in one step, so that readers never see a part of it."""

from __future__ import annotations

import fcntl
import glob
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

_LOCK = "writer.lock"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a draft to write to, and rename the draft to `path` at the end.

    The draft has the name of `path` and lies in its own hidden folder next to `path`. Two writers
    of one path therefore never share a draft. The hidden folder is removed at the end. Hidden
    folders of killed writers are removed first. A draft folder replaces an older folder.

    Raises:
        OSError: the folder of `path` is missing, or the draft cannot be made or renamed. `path`
            stays as it was.
    """
    for draft_folder in path.parent.glob(f"{_prefix(glob.escape(path.name))}*"):
        _remove_abandoned(draft_folder)
    folder = Path(tempfile.mkdtemp(prefix=_prefix(path.name), dir=path.parent))
    draft = folder / path.name
    try:
        # Other writers remove a folder with an unlocked `_LOCK`, so the file has another name
        # until it is locked.
        unlocked = folder / f"{_LOCK}.new"
        with unlocked.open("w") as lock:
            with suppress(OSError):  # without locks, the folder outlives a killed writer
                _lock(lock)
            unlocked.rename(folder / _LOCK)
            yield draft
            _rename(draft, path)
    finally:
        if draft.is_dir():
            _remove_busy(folder)
        shutil.rmtree(folder, ignore_errors=True)


def _prefix(name: str) -> str:
    return f".{name}.part-"


def _lock(file: IO[str]) -> None:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove_abandoned(folder: Path) -> None:
    """Remove the folder of a killed writer: the system released its lock."""
    with suppress(OSError), (folder / _LOCK).open("r+") as lock:
        _lock(lock)
        shutil.rmtree(folder, ignore_errors=True)


def _rename(draft: Path, path: Path) -> None:
    if not (draft.is_dir() and path.is_dir()):
        draft.replace(path)
        return
    # No system call replaces a folder with content.
    old_folder = draft.with_name(f"{path.name}.old")
    path.rename(old_folder)
    try:
        draft.replace(path)
    except OSError:
        old_folder.rename(path)
        raise


def _remove_busy(folder: Path) -> None:
    """Remove a folder. Threads of a failed writer may still write to it or make it again."""
    for pause in (0.05, 0.2, 0.8, 3):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(pause)
        if not folder.exists():
            return
