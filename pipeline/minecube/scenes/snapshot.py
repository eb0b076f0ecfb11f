"""The scene list of a site-year on disk: stac-geoparquet, with what was refused and a hash, written before a pixel is read."""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pystac
import shapely
import stac_geoparquet.arrow

from minecube.catalog import Site, Source, as_dict
from minecube.errors import CubeError, SceneError
from minecube.files import replacing
from minecube.grid import grid_of
from minecube.scenes import Found
from minecube.scenes.find import read_items

FORMAT = 2
"""Version of what a saved scene holds; a list of another one is refused."""
_KEY = b"minecube"  # of the file's own metadata


def digest(scenes: Sequence[pystac.Item]) -> str:
    """The SHA-256 of the scenes, whatever order they come in and however Parquet packs them."""
    return _digest([scene.to_dict(include_self_link=False) for scene in scenes])


def _digest(features: Sequence[dict[str, Any]]) -> str:
    content = sorted(json.dumps(feature, sort_keys=True) for feature in features)
    return hashlib.sha256("\n".join(content).encode()).hexdigest()


def to_bytes(scenes: Sequence[pystac.Item]) -> bytes:
    """Scenes as the bytes of a stac-geoparquet file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scenes.parquet"
        _write(Found(scenes=tuple(scenes), listed=len(scenes)), path)
        return path.read_bytes()


def _write(found: Found, path: Path, belongs: str = "") -> None:
    listed = [s.to_dict(include_self_link=False) for s in found.scenes]
    digested = _digest(listed)
    about = {"format": FORMAT, "belongs_to": belongs, "listed": found.listed, "refused": dict(found.refused)}
    about["sha256"] = digested
    pq.write_table(_table(listed).replace_schema_metadata({**_geoparquet(), _KEY: json.dumps(about)}), path)


@functools.cache
def _geoparquet() -> dict[bytes, bytes]:
    """What the library notes in a file by which readers know GeoParquet: the same for every list of scenes."""
    bounds = dict.fromkeys(("xmin", "ymin", "xmax", "ymax"), 0.0)
    place = pa.Table.from_pylist([{"geometry": shapely.to_wkb(shapely.Point(0, 0)), "bbox": bounds}])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "place.parquet"
        stac_geoparquet.arrow.to_parquet(place, path)
        return {key: value for key, value in pq.read_schema(path).metadata.items() if key != b"ARROW:schema"}


def _table(features: Sequence[dict[str, Any]]) -> pa.Table:
    """Scenes as a stac-geoparquet table: the library's own conversion measures the memory of the process, for 50 ms a list."""
    rows = []
    for feature in features:
        row = {name: value for name, value in feature.items() if name != "properties"} | feature["properties"]
        row["geometry"] = shapely.to_wkb(shapely.geometry.shape(feature["geometry"]), flavor="iso")
        row["bbox"] = dict(zip(("xmin", "ymin", "xmax", "ymax"), feature["bbox"], strict=True))
        row["datetime"] = datetime.fromisoformat(row["datetime"])
        rows.append(row)
    return pa.Table.from_pylist(rows)


def belongs_to(site: Site, year: int, sources: Sequence[Source]) -> str:
    """What a scene list was searched for, as a hash: place, year, and the sources' rules, which its scenes have taken on.

    Not where a source is: its archive may have moved, and a list must do with the API gone.
    """
    grid = grid_of(site)
    rules = [{k: v for k, v in as_dict(s).items() if k not in ("title", "href", "licence", "searches_per_s")} for s in sources]
    for rule in rules:
        rule["access"].pop("connections")
        if rule["offset"]["own"] is None:
            del rule["offset"]["own"]  # as in lists that were saved before there was such a rule
    asked = {"site": site.id, "grid": [str(grid.crs), *grid.transform[:6], *grid.shape], "year": year, "sources": rules}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def save(found: Found, path: Path, belongs: str = "") -> None:
    """Write a scene list, whole or not at all, with what it belongs to; raises CubeError where that cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            _write(found, part, belongs)
    except OSError as error:
        raise CubeError(
            f"{path}: the scene list cannot be written ({error.strerror or error}); choose another folder"
        ) from error


def load(path: Path, belongs: str = "") -> Found:
    """A scene list, as `save` was given it, held to what it must belong to, where that is named.

    Raises:
        SceneError: the file is missing, is no scene list, belongs to something else, or its scenes are no longer those that
            were saved.
    """
    items = read_items(path)
    said = _about(path)
    if digest(items) != said["sha256"]:
        raise SceneError(f"{path}: its scenes are not those that were saved (their hash differs); search again")
    if belongs:
        need_belonging(path, belongs)
    scenes = tuple(sorted(items, key=lambda s: (s.datetime, s.id)))
    return Found(scenes=scenes, listed=said["listed"], refused=said["refused"])


def need_belonging(path: Path, belongs: str) -> None:
    """Raise SceneError if a scene list was searched for something else than `belongs_to` gives; its scenes are not read."""
    if _about(path)["belongs_to"] != belongs:
        raise SceneError(
            f"{path}: was searched for another place, or by another rule of its source; remove it to search again, or name "
            "another folder"
        )


def _about(path: Path) -> dict[str, Any]:
    """What `save` noted of a scene list; raises SceneError if it is none of this version."""
    about = (pq.read_schema(path).metadata or {}).get(_KEY)
    if about is None:
        raise SceneError(
            f"{path}: holds STAC items, but no scenes saved by minecube; name it as a source of kind stac-geoparquet"
        )
    said: dict[str, Any] = json.loads(about)
    if said.get("format") != FORMAT:
        raise SceneError(f"{path}: was saved by another version of minecube; search again, or name another folder")
    return said
