"""Check where a store is said to be, before anything is opened there."""

from __future__ import annotations

from minecube.errors import CubeError

SCHEMES = ("s3", "gs", "az")
"""Of object stores that cubes are kept in."""


def check_place(store: str) -> None:
    """Check the text that names a store; raises CubeError for an empty one and for a URL of another kind than `SCHEMES`."""
    if not store.strip():
        raise CubeError("the store has no name; name a folder, or an object store such as s3://bucket/cubes.zarr")
    scheme, colon, place = store.partition("://")
    if not colon:
        return
    known = ", ".join(f"{name}://" for name in SCHEMES)
    if scheme not in SCHEMES:
        raise CubeError(f"{store}: expected a folder or a URL that begins with {known}; found {scheme}://")
    if not place.strip("/"):
        raise CubeError(f"{store}: names no bucket; expected a URL such as {scheme}://bucket/cubes.zarr")
