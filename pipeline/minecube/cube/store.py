"""Open a store, its objects and its groups."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import obstore
import obstore.exceptions
import zarr
import zarr.errors
from obstore.store import LocalStore

from minecube import places
from minecube.cube import packed
from minecube.cube.checksums import ChecksumStore
from minecube.errors import CubeError

FORMAT = 1
"""Version of the layout. Stores of another version are refused."""
UNFINISHED_FORMAT = 0
"""Format of a group under construction. After a kill, its construction starts again."""
DESCRIPTION = "minecube"
"""Attribute of a site's group with its description."""


@dataclass(frozen=True, init=False)
class Store:
    """A store of cubes: a local folder, a packed file or an object-store URL.

    A store is a value: it can be hashed, and pickled to the workers of a cluster. Making it reads
    nothing but the kind of a file whose name ends in .zip.

    Raises:
        CubeError: the name is empty, or is the URL of a packed store.
        PlaceError: the URL is wrong; see `places.Url`.
    """

    name: str
    """The name as given. Messages show it."""
    path: Path | None = field(repr=False)
    """The local folder or packed file; None for an object store."""
    packed: bool = field(repr=False)
    """Whether it is a packed store, which is only read."""

    def __init__(self, name: str | Path) -> None:
        text = str(name)
        is_url = _is_url(text)
        is_packed = text.rstrip("/").endswith(packed.SUFFIX) and not Path(text).is_dir()
        if is_url and is_packed:
            raise CubeError(
                f"{text}: a packed store is read from a local disk; download it, or unzip it there"
            )
        object.__setattr__(self, "name", text)
        object.__setattr__(self, "path", None if is_url else Path(text))
        object.__setattr__(self, "packed", is_packed)

    def __str__(self) -> str:
        return self.name

    def absolute(self) -> Store:
        """Return the store with a name independent of the working directory."""
        if self.path is None:
            return self
        return Store(self.path.absolute())

    def need_writable(self) -> None:
        """Raise CubeError for a packed store."""
        if self.packed:
            raise CubeError(
                f"{self}: is a packed store, which is only read; write to the store it was packed "
                f"from, or unpack it (`unzip -d {self.suggest_folder()} {self}`)"
            )

    def suggest_folder(self) -> str:
        """Return a folder for unpacking a packed store. It differs from the original folder."""
        return f"{self.name.rstrip('/').removesuffix(packed.SUFFIX)}-unpacked"

    @classmethod
    def connect(cls, name: str, *, writable: bool = False) -> Store:
        """Open a store, and list one object of an object store.

        A silent object store is found in seconds, not minutes.

        Raises:
            CubeError: as `Store`, or the store must be writable and is packed.
            PlaceError: as `Store`, or the endpoint is no URL.
            obstore.exceptions.BaseError: the store does not answer, refuses the keys, or lacks the
                bucket.
        """
        store = cls(name)
        if writable:
            store.need_writable()
        if store.path is None:
            hurried = places.open_hurried_client(store.name)
            next(iter(obstore.list(hurried, chunk_size=1)), None)
        return store

    # Objects

    def client(self) -> Any:
        """Return the client of an object store, one per URL and process."""
        return places.open_client(self.name.rstrip("/"))

    def open_objects(self) -> Any:
        """Open the stored objects, without Zarr."""
        if self.packed:
            return packed.Objects(self.name.rstrip("/"))
        if self.path is None:
            return self.client()
        return LocalStore(self.path)

    def list_folders(self, path: str) -> list[str]:
        """List the names of the folders right below a path."""
        folders = self.open_objects().list_with_delimiter(path)["common_prefixes"]
        return [folder.rstrip("/").rpartition("/")[2] for folder in folders]

    def has_objects(self, path: str) -> bool:
        """Whether any object lies below a path."""
        if self.path is not None and not self.path.exists():
            return False
        return any(batch for batch in self.open_objects().list(path))

    def has_object(self, key: str) -> bool:
        """Whether an object exists."""
        try:
            self.open_objects().get(key)
        except FileNotFoundError:
            return False
        return True

    def open_zarr(self) -> Any:
        """Open the Zarr store."""
        if self.packed:
            return packed.open_zarr(self.name.rstrip("/"))
        if self.path is None:
            return zarr.storage.ObjectStore(self.client())
        return FolderStore(self.path)

    def open_with_checksums(self) -> ChecksumStore:
        """Open the Zarr store, with checksums of everything written through it."""
        self.need_writable()
        return ChecksumStore(self.open_zarr())

    # Groups

    def has_group(self, path: str) -> bool:
        """Whether a group exists at this path.

        Raises:
            CubeError: the group is damaged, or the store is a file.
        """
        return self.find_group(path) is not None

    def find_group(self, path: str, mode: str = "r") -> zarr.Group | None:
        """Open the group at this path; None if it is missing.

        Raises:
            CubeError: the group is damaged, or the store is a file.
        """
        if self.path is not None and not self.path.exists():
            return None
        if self.path is not None and self.path.is_file() and not self.packed:
            raise CubeError(
                f"{self}: is a file; expected a folder, the URL of one, or a packed store, whose "
                "name ends in .zip"
            )
        try:
            return self.open_group(path, mode)
        except (FileNotFoundError, zarr.errors.GroupNotFoundError):
            return None

    def open_group(self, path: str, mode: str = "r") -> zarr.Group:
        """Open the group at this path.

        Raises:
            CubeError: the group is damaged.
            FileNotFoundError: the group is missing.
        """
        if mode != "r":
            self.need_writable()
        with self.reading(path):
            return zarr.open_group(self.open_zarr(), path=path, mode=mode, use_consolidated=False)

    def read_attributes(self, path: str) -> dict[str, Any]:
        """Return the attributes of a group; empty if it is missing or damaged."""
        try:
            group = self.find_group(path)
        except CubeError:
            return {}
        return {} if group is None else dict(group.attrs)

    def open_site(self, site_id: str, mode: str = "r") -> zarr.Group:
        """Open a site's group.

        Raises:
            CubeError: the site is missing, unfinished, or of another version.
        """
        group = self.find_group(site_id, mode)
        if group is None:
            names = ", ".join(list_sites(self)) or "no site"
            raise CubeError(f"{self}: no site {site_id!r}; it has {names}")
        self.check_format(site_id, group)
        return group

    def check_format(self, site_id: str, group: zarr.Group) -> None:
        """Raise CubeError if a site's group is unfinished, or of another version."""
        if is_unfinished(group):
            raise CubeError(
                f"{self}: {site_id} is being created, or a run was killed then; run "
                "`minecube build` again"
            )
        if group.attrs.get(DESCRIPTION, {}).get("format") != FORMAT:
            raise CubeError(
                f"{self}: group {site_id!r} was not made by this version of minecube; use "
                "another --store"
            )

    def begin_group(self, path: str, attributes: Mapping[str, Any]) -> None:
        """Create a group with these attributes, or empty an existing one.

        This also clears remains of a killed run. The attributes are written first and never
        removed. The group is therefore identified at any moment.
        """
        self.need_writable()
        target = self.open_zarr()
        parent = path.rpartition("/")[0]
        with contextlib.suppress(zarr.errors.ContainsGroupError):  # made by another run just now
            zarr.open_group(target, path=parent, mode="a", use_consolidated=False)
        try:
            group = self.find_group(path, "r+")
        except CubeError:  # damaged
            group = None
        if group is None:
            group = zarr.create_group(
                target, path=path, attributes=dict(attributes), overwrite=True
            )
        else:
            group.attrs.put(dict(attributes))
        for child in self.list_folders(path):
            del group[child]

    # Errors

    @contextmanager
    def reading(self, path: str) -> Iterator[None]:
        """Convert errors on damaged data to CubeError."""
        try:
            yield
        except (FileNotFoundError, zarr.errors.GroupNotFoundError):
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CubeError(
                f"{self}: {path or 'the store'} cannot be read ({type(error).__name__}: {error}); "
                "run `minecube verify`, or use another --store if minecube did not make this one"
            ) from error

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Convert errors of writing, such as a full disk or a forbidden folder, to CubeError."""
        self.need_writable()
        try:
            yield
        except (OSError, obstore.exceptions.BaseError) as error:
            # obstore adds a dump of its internals in further lines.
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
            raise CubeError(
                f"{self}: cannot be written ({reason}); committed site-years are "
                "unharmed; make room or choose another --store, then run the same command again"
            ) from error


def _is_url(name: str) -> bool:
    """Whether the name is that of an object store.

    Raises:
        CubeError: the name is empty.
        PlaceError: as `places.check_url`.
    """
    if not name.strip():
        raise CubeError(
            "the store has no name; name a folder, or an object store such as "
            "s3://bucket/cubes.zarr"
        )
    if "://" not in name:
        return False
    places.check_url(name)
    return True


DRAFT = ".partial"
"""End of the names of Zarr's temporary files. A killed writer leaves them."""


class FolderStore(zarr.storage.LocalStore):  # type: ignore[misc]
    """Zarr's folder store, without the temporary files of other writers.

    Zarr 3.1.6 lists these files as members of a group and warns of each.
    """

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """List the names below a prefix."""
        async for name in super().list_dir(prefix):
            if not name.endswith(DRAFT):
                yield name


def is_unfinished(group: zarr.Group) -> bool:
    """Whether the group is a site with unfinished creation."""
    return bool(group.attrs.get(DESCRIPTION) == {"format": UNFINISHED_FORMAT})


def list_sites(store: Store) -> list[str]:
    """List the names of the sites in a store.

    Raises:
        CubeError: there is no store.
    """
    if not store.has_group(""):
        raise CubeError(f"{store}: there is no store; `minecube build` makes one")
    raw = store.open_objects()
    names = []
    with store.reading(""):
        for name in sorted(store.list_folders("")):
            try:
                content = bytes(raw.get(f"{name}/zarr.json").bytes())
            except FileNotFoundError:
                continue
            unfinished = {"format": UNFINISHED_FORMAT}
            attrs = json.loads(content).get("attributes", {})
            if attrs.get(DESCRIPTION, unfinished) != unfinished:
                names.append(name)
    return names
