"""List and read a store's objects without Zarr, for `verify` and `pack`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import obstore.exceptions

from minecube.cube.store import DESCRIPTION, DRAFT, Store
from minecube.errors import CubeError


def list_files(store: Store) -> dict[str, dict[str, int]]:
    """Map each site to its objects (key relative to its group -> bytes).

    Sites that Zarr cannot read are listed, too. Temporary files of writers are left out.

    Raises:
        CubeError: there is no store, it cannot be listed, or it contains nothing of minecube.
    """
    if store.path is not None and not (store.path.is_dir() or store.packed):
        problem = "is a file" if store.path.exists() else "there is no store"
        raise CubeError(
            f"{store}: {problem}; name the folder, or the URL, that `minecube build` was given as "
            "--store"
        )
    groups: dict[str, dict[str, int]] = {}
    try:
        raw = store.open_objects()
        for batch in raw.list():
            for entry in batch:
                if entry["path"].endswith(DRAFT):
                    continue
                name, _, path = entry["path"].partition("/")
                groups.setdefault(name, {})[path] = entry["size"]
    except (obstore.exceptions.BaseError, OSError, ValueError) as error:
        raise CubeError(
            f"{store}: cannot be listed ({error}); check its name, and the keys it needs"
        ) from error
    sites = {name: files for name, files in groups.items() if _is_site(raw, name, files)}
    if not sites:
        raise CubeError(
            f"{store}: no site of minecube is in it, so there is nothing to verify; name another "
            "--store"
        )
    return sites


def choose_sites(store: Store, listed: Mapping[str, Any], names: Sequence[str] | None) -> list[str]:
    """Return these names, or all sites, sorted.

    Raises:
        CubeError: the store lacks one of the names.
    """
    unknown = sorted(set(names or ()) - set(listed))
    if unknown:
        raise CubeError(f"{store}: no site {unknown[0]!r}; it has {', '.join(sorted(listed))}")
    return sorted(set(names or listed))


def _is_site(raw: Any, name: str, files: Mapping[str, int]) -> bool:
    if any(path.startswith("builds/") for path in files):
        return True  # also without its own metadata
    return DESCRIPTION in (attributes_in(read_object(raw, f"{name}/zarr.json")) or {})


def read_object(raw: Any, path: str) -> Any:
    """Return an object's bytes; None if it is missing, the error if it cannot be read.

    `raw` is as from `Store.open_objects`.
    """
    try:
        return bytes(raw.get(path).bytes())
    except FileNotFoundError:
        return None
    except (obstore.exceptions.BaseError, OSError) as error:  # a bad sector, for example
        return error


def parse_json(content: Any) -> Any:
    """Parse a JSON object; None if it is missing or damaged."""
    if not isinstance(content, bytes):
        return None
    try:
        return json.loads(content)
    except ValueError:
        return None


def attributes_in(content: Any) -> dict[str, Any] | None:
    """Return the attributes in a Zarr group's metadata; None if there is no valid group."""
    group = parse_json(content)
    if not isinstance(group, dict):
        return None
    if group.get("zarr_format") != 3 or group.get("node_type") != "group":
        return None
    attrs = group.get("attributes")
    return attrs if isinstance(attrs, dict) else None
