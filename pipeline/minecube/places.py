"""Read and write files at local paths and in object stores: S3, Google Cloud Storage, Azure.

A place is a `Path` or a `Url`. Readers that need a path get a copy (`local_copy`). Writers fill a
local draft, which is uploaded when it is complete (`outgoing`). Local paths are used directly.

Keys, endpoints and regions come from the environment only, as obstore reads them.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from obstore.store import from_url

from minecube.errors import MinecubeError, PlaceError

SCHEMES = ("s3", "gs", "az")
"""URL schemes of object stores."""
_ANSWERS_S = 8
"""Seconds after the first request of a check before an object store is given up."""
_UPLOADS = 8
"""Files uploaded at once."""
_PIECE = 2**23
"""Bytes of a piece of a large file."""
_MOST_PIECES = 9000
"""Most pieces of an upload. S3 accepts 10,000."""
_ZARR = ".zarr"
"""Suffix of a folder that is replaced as a whole."""


@dataclass(frozen=True, init=False)
class Url:
    """The URL of a file or folder in an object store, with a part of the interface of `Path`.

    Raises:
        PlaceError: the scheme is not in `SCHEMES`, the bucket is missing, or the URL has keys, a
            query or a folder named `..`.
    """

    text: str
    """The URL without a slash at its end."""

    def __init__(self, text: str) -> None:
        check_url(text)
        object.__setattr__(self, "text", text.rstrip("/"))

    def __str__(self) -> str:
        return self.text

    def __truediv__(self, name: str | Path) -> Url:
        return Url(f"{self.text}/{PurePosixPath(name)}")

    @property
    def bucket(self) -> str:
        """The URL of the bucket."""
        return "/".join(self.text.split("/", 3)[:3])

    @property
    def key(self) -> str:
        """The path in the bucket; empty for the bucket itself."""
        return self.text[len(self.bucket) + 1 :]

    @property
    def name(self) -> str:
        """The last part of the path."""
        return PurePosixPath(self.key).name

    @property
    def suffix(self) -> str:
        """The suffix of the name, with its dot."""
        return PurePosixPath(self.key).suffix

    @property
    def parent(self) -> Url:
        """The folder of this file or folder."""
        return Url(self.text.rpartition("/")[0])

    def with_name(self, name: str) -> Url:
        """Return the URL of another file in the same folder."""
        return self.parent / name

    def with_suffix(self, suffix: str) -> Url:
        """Return the URL with another suffix."""
        return self.with_name(PurePosixPath(self.name).with_suffix(suffix).name)

    def absolute(self) -> Url:
        """Return the URL itself. It is the same in every folder."""
        return self

    def resolve(self) -> Url:
        """Return the URL itself. Object stores have no links."""
        return self

    def exists(self) -> bool:
        """Return whether the object exists. A folder of objects does not count."""
        if not self.key:
            return False
        try:
            self.client().head(self.key)
        except FileNotFoundError:
            return False
        return True

    def has_objects(self) -> bool:
        """Return whether this is a folder with objects."""
        return any(batch for batch in self.client().list(self.key, chunk_size=1))

    def read_bytes(self) -> bytes:
        """Read the object. Raises PlaceError if it is missing."""
        with local_copy(self) as path:
            return path.read_bytes()

    def unlink(self) -> None:
        """Delete the object."""
        self.client().delete(self.key)

    def client(self) -> Any:
        """Return the client of the bucket."""
        return open_client(self.bucket)


Place = Path | Url
"""A local path or the URL of an object store."""


def place_of(name: str | Place) -> Place:
    """Return the path or URL with this name. Raises PlaceError as `Url`."""
    if isinstance(name, Url):
        return name
    if "://" in str(name):
        return Url(str(name))
    return Path(name)


def check_url(url: str) -> None:
    """Check the URL of an object store. Messages never show keys.

    Raises:
        PlaceError: as `Url`.
    """
    scheme, _, place = url.partition("://")
    bucket, _, key = place.partition("/")
    if "@" in bucket or "?" in place or "#" in place:
        shown = f"{scheme}://{bucket.rpartition('@')[2]}/{key}"
        raise PlaceError(
            f"{shown.partition('?')[0].partition('#')[0]}: expected a URL without keys and query; "
            "name the bucket and path only, and set the keys in the environment"
        )
    if scheme not in SCHEMES:
        schemes = ", ".join(f"{text}://" for text in SCHEMES)
        raise PlaceError(
            f"{url}: expected a local path or a URL that begins with {schemes}; found {scheme}://"
        )
    if not bucket:
        raise PlaceError(f"{url}: names no bucket; expected a URL such as {scheme}://bucket/folder")
    if {"", ".", ".."} & set(key.rstrip("/").split("/")) and key:
        raise PlaceError(f"{url}: expected a path without //, . and ..; write the path out")


def open_client(url: str) -> Any:
    """Return obstore's client of an object store below a URL, one per URL and process.

    A client keeps its connections, and they do not survive a fork.

    Raises:
        PlaceError: the endpoint in the environment is no URL.
    """
    return _client(url, os.getpid())


@lru_cache(maxsize=32)
def _client(url: str, _process: int) -> Any:
    _check_endpoint(url)
    return from_url(url)


def open_hurried_client(url: str) -> Any:
    """Return a client that gives up after seconds. Raises PlaceError as `open_client`."""
    _check_endpoint(url)
    return from_url(
        url, retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=_ANSWERS_S)}
    )


def _check_endpoint(url: str) -> None:
    """Raise PlaceError if an S3 endpoint is no URL: obstore 0.12 panics and prints pages."""
    if not url.startswith("s3://"):
        return
    for variable in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"):
        endpoint = os.environ.get(variable, "")
        if endpoint and not endpoint.startswith(("https://", "http://")):
            raise PlaceError(
                f"{variable} is {endpoint!r}; expected the URL of an endpoint such as "
                "https://s3.example.org"
            )


def list_files(folder: Place) -> list[str]:
    """List the files below a folder, relative to it, sorted; empty for a missing folder."""
    if isinstance(folder, Url):
        return sorted(_relative(key, folder) for key in _list_keys(folder))
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def time_of_change(place: Place) -> float | None:
    """Return the time of the last change of a file in seconds since 1970; None if it is missing."""
    if not isinstance(place, Url):
        return time_of_file(place)
    try:
        return float(place.client().head(place.key)["last_modified"].timestamp())
    except (FileNotFoundError, NotADirectoryError):
        return None


def time_of_file(path: str | Path) -> float | None:
    """Return the same as `time_of_change` for a local file."""
    try:
        return os.stat(path).st_mtime  # noqa: PTH116  called for each site-year
    except (FileNotFoundError, NotADirectoryError):
        return None


def check_writable(folder: Url) -> None:
    """Write an empty object to a folder, and delete it.

    Raises:
        PlaceError: the bucket is missing.
        obstore.exceptions.BaseError: the object store does not answer, or refuses the keys.
    """
    client = open_hurried_client(folder.bucket)
    probe = folder / ".minecube-write-check"
    with _need_bucket(folder):
        client.put(probe.key, b"")
    with suppress(FileNotFoundError):  # another process has deleted it
        client.delete(probe.key)


@contextmanager
def local_copy(place: Place, more: Sequence[str] = ()) -> Iterator[Path]:
    """Yield the local path of a file, in a temporary folder for a URL.

    The copy has the name of the file. Errors raised meanwhile name the URL.

    Args:
        place: the file.
        more: suffixes of further files with the same stem. They are copied if they exist.

    Raises:
        PlaceError: the object is missing.
    """
    if isinstance(place, Path):
        yield place
        return
    with tempfile.TemporaryDirectory(prefix="minecube-") as folder:
        copy = Path(folder) / place.name
        try:
            _download(place, copy)
        except FileNotFoundError as error:
            raise PlaceError(f"{place}: no such file; check the URL") from error
        for suffix in more:
            with suppress(FileNotFoundError):
                _download(place.with_suffix(suffix), copy.with_suffix(suffix))
        with _naming(copy, place):
            yield copy


@contextmanager
def outgoing(place: Place, *, update: bool = False) -> Iterator[Path]:
    """Yield a local path for a file or folder to write, and upload it at the end for a URL.

    For a URL, the path lies in a temporary folder and does not exist yet. Nothing is uploaded
    after an error. Of a folder, subfolders are uploaded first. Its own files follow in the order
    of their last change, so an index that was written last is uploaded last. Other objects in the
    folder stay, but a folder named `*.zarr` replaces all objects of an older one.

    With `update`, the objects of a folder are downloaded first.

    Raises:
        PlaceError: the bucket is missing, or objects other than a Zarr are in place of a folder
            named `*.zarr`.
    """
    if isinstance(place, Path):
        yield place
        return
    with tempfile.TemporaryDirectory(prefix="minecube-") as folder:
        draft = Path(folder) / (place.name or "files")
        if update:
            for key in _list_keys(place):
                path = draft / _relative(key, place)
                path.parent.mkdir(parents=True, exist_ok=True)
                _download(Url(f"{place.bucket}/{key}"), path)
        with _naming(draft, place):
            yield draft
        if draft.is_dir():
            _upload_folder(draft, place)
        elif draft.exists():
            _upload(draft, place)


@contextmanager
def _naming(path: Path, url: Url) -> Iterator[None]:
    """Put the URL in place of its local path into the text of errors."""
    try:
        yield
    except MinecubeError as error:
        error.args = tuple(str(text).replace(str(path), url.text) for text in error.args)
        raise


@contextmanager
def _need_bucket(url: Url) -> Iterator[None]:
    """Convert the error of a missing bucket to PlaceError."""
    try:
        yield
    except FileNotFoundError as error:
        raise PlaceError(f"{url}: there is no bucket {url.bucket}; check the URL") from error


def _download(url: Url, path: Path) -> None:
    pieces = url.client().get(url.key).stream(min_chunk_size=_PIECE)
    with path.open("wb") as file:
        for piece in pieces:
            file.write(piece)


def _list_keys(folder: Url) -> list[str]:
    return [entry["path"] for batch in folder.client().list(folder.key) for entry in batch]


def _relative(key: str, folder: Url) -> str:
    return key.removeprefix(folder.key).lstrip("/")


def _upload(path: Path, url: Url) -> None:
    size = path.stat().st_size
    piece = max(_PIECE, math.ceil(size / _MOST_PIECES))
    with _need_bucket(url):
        url.client().put(url.key, path, chunk_size=piece)


def _upload_folder(folder: Path, url: Url) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    own = [path for path in files if path.parent == folder]
    zarrs = {url / path.relative_to(folder): path for path in folder.rglob(f"*{_ZARR}")}
    old_keys = {zarr: _list_zarr(zarr) for zarr in zarrs}
    _upload_all([path for path in files if path.parent != folder], folder, url)
    for zarr, path in zarrs.items():
        stale = [key for key in old_keys[zarr] if not (path / _relative(key, zarr)).is_file()]
        if stale:
            url.client().delete(stale)
    for path in sorted(own, key=lambda path: path.stat().st_mtime_ns):
        _upload(path, url / path.relative_to(folder))


def _upload_all(files: Iterable[Path], folder: Path, url: Url) -> None:
    pool = ThreadPoolExecutor(_UPLOADS)
    try:
        uploads = [pool.submit(_upload, path, url / path.relative_to(folder)) for path in files]
        for upload in uploads:
            upload.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _list_zarr(url: Url) -> list[str]:
    """List the keys of a Zarr; none if nothing is there. Raises PlaceError for anything else."""
    keys = _list_keys(url)
    if keys and not {f"{url.key}/zarr.json", f"{url.key}/.zgroup"} & set(keys):
        raise PlaceError(
            f"{url}: expected a Zarr to replace, found other objects; name another folder"
        )
    return keys
