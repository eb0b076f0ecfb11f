"""The scene list of a site-year on disk: stac-geoparquet, with what was refused and a hash, written before a pixel is read."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pystac
import stac_geoparquet.arrow

from minecube.errors import CubeError, SceneError
from minecube.scenes import Found
from minecube.scenes.find import read_items

_KEY = b"minecube"  # of the file's own metadata


def digest(scenes: Sequence[pystac.Item]) -> str:
    """The SHA-256 of the scenes, whatever order they come in and however Parquet packs them."""
    content = sorted(json.dumps(s.to_dict(include_self_link=False), sort_keys=True) for s in scenes)
    return hashlib.sha256("\n".join(content).encode()).hexdigest()


def to_bytes(scenes: Sequence[pystac.Item]) -> bytes:
    """Scenes as the bytes of a stac-geoparquet file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scenes.parquet"
        _write(Found(scenes=tuple(scenes), listed=len(scenes)), path)
        return path.read_bytes()


def _write(found: Found, path: Path) -> None:
    listed = [s.to_dict(include_self_link=False) for s in found.scenes]
    stac_geoparquet.arrow.to_parquet(stac_geoparquet.arrow.parse_stac_items_to_arrow(listed), path)
    table = pq.read_table(path)  # with the metadata that says it is GeoParquet, to which ours is added
    about = {"listed": found.listed, "refused": dict(found.refused), "sha256": digest(found.scenes)}
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, _KEY: json.dumps(about)}), path)


def save(found: Found, path: Path) -> None:
    """Write a scene list, whole or not at all; raises CubeError where that cannot be written."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(found, part)
        part.replace(path)
    except OSError as error:
        raise CubeError(
            f"{path}: the scene list cannot be written ({error.strerror or error}); choose another folder"
        ) from error


def load(path: Path) -> Found:
    """A scene list, as `save` was given it.

    Raises:
        SceneError: the file is missing, is no scene list, or its scenes are no longer those that were saved.
    """
    items = read_items(path)
    about = (pq.read_schema(path).metadata or {}).get(_KEY)
    if about is None:
        raise SceneError(
            f"{path}: holds STAC items, but no scenes saved by minecube; name it as a source of kind stac-geoparquet"
        )
    said = json.loads(about)
    if digest(items) != said["sha256"]:
        raise SceneError(f"{path}: its scenes are not those that were saved (their hash differs); search again")
    scenes = tuple(sorted(items, key=lambda s: (s.datetime, s.id)))
    return Found(scenes=scenes, listed=said["listed"], refused=said["refused"])
