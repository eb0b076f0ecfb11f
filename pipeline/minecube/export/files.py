"""Files and folders that are there whole or not at all, and what a catalogue says of them."""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyogrio.errors import DataLayerError, DataSourceError

from minecube.errors import CubeError


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, renamed to `path` at the end, so that a reader finds the whole file or none.

    What is written may be a folder; it takes the place of a Zarr of that name, and of nothing else.
    """
    part = path.with_name(f".{os.getpid()}.part.{path.name}")  # keeps the suffix, which drivers go by
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        if part.is_dir() and path.exists():
            _take_place(part, path)
        else:
            part.replace(path)
    except (OSError, DataSourceError, DataLayerError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CubeError(f"{path}: cannot be written ({reason}); no half file stays; mend that and export again") from error
    finally:
        # Whatever a failed or an earlier, killed run left of this file; SQLite keeps a journal beside its own.
        for left in path.parent.glob(f".*.part.{glob.escape(path.name)}*"):
            _remove(left) if left.is_dir() else left.unlink(missing_ok=True)


def _remove(folder: Path) -> None:
    """Also where threads that were at work when another one failed still write into it, or make it again."""
    for pause in (0.05, 0.2, 0.8, 3):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(pause)
        if not folder.exists():
            return
    shutil.rmtree(folder)


def _take_place(part: Path, path: Path) -> None:
    """Of a folder: no system call replaces one that is not empty, so the old one steps aside and is removed by the caller."""
    if not any((path / name).is_file() for name in ("zarr.json", ".zgroup")):
        raise CubeError(f"{path}: is there already and no Zarr, so it is not replaced; move it away or name another folder")
    old = part.with_name(f"{part.name}.old")
    path.rename(old)
    try:
        part.replace(path)
    except OSError:
        old.rename(path)
        raise


def sha256_of(path: Path) -> tuple[int, str]:
    """Size in bytes and SHA-256, in hexadecimal; raises CubeError where it cannot be read."""
    try:
        with path.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
            return content.tell(), digest
    except OSError as error:
        raise CubeError(f"{path}: cannot be read ({error.strerror}), so it cannot be listed") from error


def listed(path: Path, folder: Path, title: str) -> dict[str, Any]:
    """Href, title, size and checksum of a file, as a STAC asset has them."""
    size, digest = sha256_of(path)
    # Multihash: 0x12 says SHA-256, 0x20 its 32 bytes.
    return {"href": href(path, folder), "title": title, "file:size": size, "file:checksum": f"1220{digest}"}


def href(path: Path, folder: Path) -> str:
    """The path as seen from the folder: `./pit/pit_2020.json`."""
    relative = Path(os.path.relpath(path, folder)).as_posix()
    return relative if relative.startswith(".") else f"./{relative}"
