"""Check the place of a store before anything is opened there."""

from __future__ import annotations

import os
from datetime import timedelta

import obstore
from obstore.store import from_url

from minecube.errors import CubeError

SCHEMES = ("s3", "gs", "az")
"""Of object stores that cubes are kept in."""
_ANSWERS_S = 8
"""How long after its first request an object store is no longer asked again."""


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
    for variable in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"):
        endpoint = os.environ.get(variable, "")
        if scheme == "s3" and endpoint and not endpoint.startswith(("https://", "http://")):
            # obstore 0.12 panics, and prints pages.
            raise CubeError(f"{variable} is {endpoint!r}; expected the URL of an endpoint such as https://s3.example.org")
    if not place.strip("/"):
        raise CubeError(f"{store}: names no bucket; expected a URL such as {scheme}://bucket/cubes.zarr")


def check_answers(store: str) -> None:
    """List one object of an object store, so that one that does not answer is found in seconds instead of minutes.

    Raises:
        obstore.exceptions.BaseError: the store does not answer, refuses the keys, or has no such bucket.
    """
    if "://" in store:
        hurried = from_url(store, retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=_ANSWERS_S)})
        next(iter(obstore.list(hurried, chunk_size=1)), None)
