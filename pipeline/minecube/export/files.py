"""Write complete files and folders, and describe files for a catalogue."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyogrio.errors import DataLayerError, DataSourceError

from minecube.errors import CubeError
from minecube.files import replacing


@contextmanager
def open_draft(path: Path) -> Iterator[Path]:
    """Yield a draft to write to, and rename the draft to `path` at the end, as `replacing` does.

    A draft that is a folder replaces an older Zarr, and no other folder.

    Raises:
        CubeError: the draft cannot be written or renamed, or `path` is a folder other than a Zarr.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as draft:
            yield draft
            if draft.is_dir() and path.exists():
                _need_zarr(path)
    except (OSError, DataSourceError, DataLayerError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CubeError(
            f"{path}: cannot be written ({reason}); no partial file remains. "
            "Solve this and export again"
        ) from error


def _need_zarr(path: Path) -> None:
    if not any((path / name).is_file() for name in ("zarr.json", ".zgroup")):
        raise CubeError(
            f"{path}: expected a Zarr to replace, found something else; name another folder"
        )


def measure_file(path: Path) -> tuple[int, str]:
    """Return size in bytes and SHA-256 (hexadecimal); raise CubeError if unreadable."""
    try:
        with path.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
            return content.tell(), digest
    except OSError as error:
        raise CubeError(f"{path}: cannot be read ({error.strerror}); export it again") from error


def describe_file(path: Path, folder: Path, title: str) -> dict[str, Any]:
    """Return href, title, size and checksum of a file as a STAC asset."""
    size, digest = measure_file(path)
    # Multihash: 0x12 is SHA-256, 0x20 its length of 32 bytes.
    return {
        "href": make_href(path, folder),
        "title": title,
        "file:size": size,
        "file:checksum": f"1220{digest}",
    }


def make_href(path: Path, folder: Path) -> str:
    """Return the path relative to the folder: `./pit/pit_2020.json`."""
    relative = Path(os.path.relpath(path, folder)).as_posix()
    if relative.startswith("."):
        return relative
    return f"./{relative}"


def need_inside(path: Path, folder: Path) -> None:
    """Raise CubeError for a file outside the collection's folder."""
    if not path.resolve().is_relative_to(folder.resolve()):
        raise CubeError(
            f"{path}: lies outside {folder}, where the collection lists files; export it there"
        )
