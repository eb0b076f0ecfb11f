"""Pack the committed part of a store into one zip, byte for byte.

The same store always gives the same file. Packing repairs nothing: findings of `verify` remain. It
leaves out uncommitted site-years, because their blocks may still change. The packed part must not
change meanwhile. Every commit or withdrawal changes metadata or the list of objects, so both are
checked again at the end.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minecube.catalog import recipe_of
from minecube.cube.builds import is_staged, staged_year
from minecube.cube.packed import SUFFIX
from minecube.cube.store import NAMED, Store
from minecube.cube.template import need_labels
from minecube.cube.verify import _attributes, _content, _listed
from minecube.errors import CubeError
from minecube.files import replacing

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first date of zip files, so that write times do not matter


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Content of a packed file."""

    site_years: int
    objects: int
    bytes: int
    """Size of the file."""
    sha256: str
    """SHA-256 of the file."""
    left_out: tuple[str, ...]
    """Uncommitted site-years, and sites without a committed year."""


def pack(
    store: Store,
    out: Path,
    names: Sequence[str] | None = None,
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> Packing:
    """Write the committed site-years of these sites, with labels and predictions, into a zip.

    Members are stored without compression, sorted by key and dated 1980, with Zip64 if needed. The
    complete file replaces an older one. Two runs may pack to one file at once: the last to finish
    wins. Memory holds the largest object.

    Args:
        store: any readable store.
        out: the file; its name ends in .zip.
        names: of sites; default: all.
        progress: called with the finished steps, their total, and the current step. Each object is
            one step, and so is the file's checksum.

    Raises:
        CubeError: a site is missing, nothing is committed, an object cannot be read, another
            command changed a packed object meanwhile, or the file cannot be written.
    """
    place = None if store.path is None else store.path.resolve()
    if out.suffix != SUFFIX or (not store.packed and place in out.resolve().parents):
        raise CubeError(f"{out}: expected a file name that ends in {SUFFIX}, outside {store}")
    if store.packed and out.resolve() == place:
        raise CubeError(f"{out}: is the packed store itself; name another file")
    listed = _listed(store)
    unknown = sorted(set(names or ()) - set(listed))
    if unknown:
        raise CubeError(f"{store}: no site {unknown[0]!r}; it has {', '.join(sorted(listed))}")
    raw, chosen = store.open_objects(), sorted(set(names or listed))
    done = {name: _committed(raw, name, listed[name]) for name in chosen}
    left_out: list[str] = []
    for name in chosen:
        left_out += (
            [f"{name} {year}" for year in sorted(_marked(listed[name]) - done[name])]
            if done[name]
            else [name]
        )
    if not any(done.values()):
        raise CubeError(
            f"{store}: no site-year of {', '.join(left_out)} is committed, so nothing can be packed; build first"
        )
    for name in (name for name, years in done.items() if years):
        need_labels(store, name)
    keys = _kept(store, listed, done)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as part:
            before = _metadata(raw, keys)
            _write(raw, store, keys, part, progress)
            changed = set(keys) ^ set(_kept(store, _listed(store), done))
            changed |= {key for key, _ in before.items() ^ _metadata(raw, keys).items()}
            for name in chosen:  # detect withdrawals before the first metadata check
                withdrawn = done[name] - _committed(raw, name, listed[name])
                changed |= {f"{name}/builds/{year}/zarr.json" for year in withdrawn}
            if changed:
                raise CubeError(
                    f"{store}: {min(changed)} was written while it was packed, so the file would be of two states of the "
                    "store; nothing was packed; pack again when no other command is at work on these site-years"
                )
            with part.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                size = file.tell()
            progress(len(keys) + 1, len(keys) + 1, "its checksum")
    except OSError as error:
        raise CubeError(
            f"{out}: cannot be written ({error.strerror or error}); make room or name another file, and pack again"
        ) from error
    years = sum(map(len, done.values()))
    return Packing(
        site_years=years, objects=len(keys), bytes=size, sha256=sha256, left_out=tuple(left_out)
    )


def _write(
    raw: Any,
    store: Store,
    keys: Sequence[str],
    part: Path,
    progress: Callable[[int, int, str], None],
) -> None:
    with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as made:
        for done, key in enumerate(keys, start=1):
            content = _content(raw, key)
            if not isinstance(content, bytes):
                why = (
                    "is gone; is it being written to?"
                    if content is None
                    else f"cannot be read ({content})"
                )
                raise CubeError(
                    f"{store}: {key} {why}; `minecube verify` says what else is wrong, nothing was packed"
                )
            member = zipfile.ZipInfo(key, _EPOCH)
            member.create_system = 3  # Unix, on every platform
            member.external_attr = 0o100644 << 16
            made.writestr(member, content)
            progress(done, len(keys) + 1, key)


def _metadata(raw: Any, keys: Iterable[str]) -> dict[str, int | None]:
    """Return the CRC-32 of the metadata of every group and array; None if unreadable."""
    contents = ((key, _content(raw, key)) for key in keys if key.endswith("zarr.json"))
    return {
        key: zlib.crc32(content) if isinstance(content, bytes) else None
        for key, content in contents
    }


def _marked(files: Iterable[str]) -> set[int]:
    """Return the committed or begun years."""
    names = {
        path.split("/")[1] for path in files if path.startswith("builds/") and path.count("/") > 1
    }
    return {year for name in names if (year := staged_year(name)) is not None}


def _committed(raw: Any, name: str, files: Iterable[str]) -> set[int]:
    """Return years with a committed or unreadable marker."""
    found = set()
    for year in _marked(files):
        content = _content(raw, f"{name}/builds/{year}/zarr.json")
        if content is None:
            continue
        said = _attributes(content)
        if said is None or ("build_id" in said):
            found.add(year)
    return found


def _kept(
    store: Store, listed: Mapping[str, Iterable[str]], done: Mapping[str, set[int]]
) -> list[str]:
    """List the objects of sites with committed years, sorted, without those of unfinished years."""
    keys = ["zarr.json"]
    for name in (name for name, years in done.items() if years):
        files = listed.get(name, ())
        idle = _marked(files) - done[name]
        begun = tuple(_begun(store, name, idle)) if idle else ()
        keys += [
            f"{name}/{key}" for key in files if not key.startswith(begun) and not is_staged(key)
        ]
    return sorted(keys)


def _begun(store: Store, name: str, idle: set[int]) -> Iterator[str]:
    """Yield the key prefixes of objects of these years."""
    group = store.open_site(name, "r")
    at = [i for i, year in enumerate(group["year"][:]) if int(year) in idle]
    yield from (f"builds/{year}/" for year in idle)
    for variable in ("reflectance", *recipe_of(group.attrs[NAMED]["recipe"]).layers):
        yield from (f"{variable}/c/{i}/" for i in at)
