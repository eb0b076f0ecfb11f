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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minecube.cube.listing import attributes_in, choose_sites, list_files, read_object
from minecube.cube.markers import is_staged, staged_year
from minecube.cube.packed import SUFFIX
from minecube.cube.store import Store
from minecube.cube.template import built_variables
from minecube.cube.write.labels import need_labels
from minecube.errors import CubeError
from minecube.files import replacing
from minecube.places import Place, Url, outgoing

Progress = Callable[[int, int, str], None]
"""Called with the finished steps, their total, and the current step."""

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first date of zip files, so that write times do not matter
_UNIX = 3
_FILE_MODE = 0o100644


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
    out: Place,
    names: Sequence[str] | None = None,
    progress: Progress = lambda *_: None,
) -> Packing:
    """Write the committed site-years of these sites, with labels and predictions, into a zip.

    Members are stored without compression, sorted by key and dated 1980, with Zip64 if needed. The
    complete file replaces an older one. Two runs may pack to one file at once: the last to finish
    wins. Memory holds the largest object.

    The name of `out` ends in .zip. `names` are those of the sites; default: all. Each object is one
    step of `progress`, and so is the file's checksum.

    Raises:
        CubeError: a site is missing, nothing is committed, an object cannot be read, another
            command changed a packed object meanwhile, or the file cannot be written.
    """
    _check_place(store, out)
    selection = _select(store, names)
    keys = _keys_to_pack(store, selection.files, selection.years)
    try:
        with outgoing(out) as path:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as part:
                raw = store.open_objects()
                crcs = _metadata_crcs(raw, keys)
                _write(store, keys, part, progress)
                _need_unchanged(store, selection, keys, crcs)
                with part.open("rb") as file:
                    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                    size = file.tell()
            progress(len(keys) + 1, len(keys) + 1, "its checksum")
    except OSError as error:
        raise CubeError(
            f"{out}: cannot be written ({error.strerror or error}); make room or name another "
            "file, and pack again"
        ) from error
    return Packing(
        site_years=sum(map(len, selection.years.values())),
        objects=len(keys),
        bytes=size,
        sha256=sha256,
        left_out=selection.left_out,
    )


@dataclass(frozen=True)
class _Selection:
    """What to pack."""

    files: Mapping[str, Iterable[str]]
    """Site -> its objects."""
    years: Mapping[str, set[int]]
    """Site -> its committed years."""
    left_out: tuple[str, ...]


def _check_place(store: Store, out: Place) -> None:
    if isinstance(out, Url):
        is_inside = f"{out}/".startswith(f"{store.name.rstrip('/')}/")
        if out.suffix != SUFFIX or is_inside:
            raise CubeError(f"{out}: expected a file name that ends in {SUFFIX}, outside {store}")
        return
    place = None if store.path is None else store.path.resolve()
    if out.suffix != SUFFIX or (not store.packed and place in out.resolve().parents):
        raise CubeError(f"{out}: expected a file name that ends in {SUFFIX}, outside {store}")
    if store.packed and out.resolve() == place:
        raise CubeError(f"{out}: is the packed store itself; name another file")


def _select(store: Store, names: Sequence[str] | None) -> _Selection:
    """Choose the committed years of these sites.

    Raises:
        CubeError: a site is missing, nothing is committed, or labels are half written.
    """
    files = list_files(store)
    raw = store.open_objects()
    years = {}
    left_out: list[str] = []
    for name in choose_sites(store, files, names):
        years[name] = _committed_years(raw, name, files[name])
        if years[name]:
            uncommitted = _begun_years(files[name]) - years[name]
            left_out += [f"{name} {year}" for year in sorted(uncommitted)]
        else:
            left_out.append(name)
    committed = [name for name in years if years[name]]
    if not committed:
        raise CubeError(
            f"{store}: no site-year of {', '.join(left_out)} is committed, so nothing can be "
            "packed; build first"
        )
    for name in committed:
        need_labels(store, name)
    return _Selection(files, years, tuple(left_out))


def _need_unchanged(
    store: Store, selection: _Selection, keys: Sequence[str], crcs: Mapping[str, int | None]
) -> None:
    """Raise CubeError if a packed object was written since the selection."""
    raw = store.open_objects()
    changed = set(keys) ^ set(_keys_to_pack(store, list_files(store), selection.years))
    changed |= {key for key, _ in crcs.items() ^ _metadata_crcs(raw, keys).items()}
    for name, years in selection.years.items():  # withdrawals before the first metadata check
        withdrawn = years - _committed_years(raw, name, selection.files[name])
        changed |= {f"{name}/builds/{year}/zarr.json" for year in withdrawn}
    if changed:
        raise CubeError(
            f"{store}: {min(changed)} was written while it was packed, so the file would be of two "
            "states of the store; nothing was packed; pack again when no other command is at work "
            "on these site-years"
        )


def _write(store: Store, keys: Sequence[str], part: Path, progress: Progress) -> None:
    raw = store.open_objects()
    with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
        for number, key in enumerate(keys, start=1):
            content = read_object(raw, key)
            if not isinstance(content, bytes):
                problem = f"cannot be read ({content})"
                if content is None:
                    problem = "is gone; is it being written to?"
                raise CubeError(
                    f"{store}: {key} {problem}; `minecube verify` says what else is wrong, nothing "
                    "was packed"
                )
            member = zipfile.ZipInfo(key, _EPOCH)
            member.create_system = _UNIX  # on every platform
            member.external_attr = _FILE_MODE << 16
            archive.writestr(member, content)
            progress(number, len(keys) + 1, key)


def _metadata_crcs(raw: Any, keys: Iterable[str]) -> dict[str, int | None]:
    """Return the CRC-32 of the metadata of every group and array; None if unreadable."""
    sums: dict[str, int | None] = {}
    for key in keys:
        if key.endswith("zarr.json"):
            content = read_object(raw, key)
            sums[key] = zlib.crc32(content) if isinstance(content, bytes) else None
    return sums


def _begun_years(files: Iterable[str]) -> set[int]:
    """Return the committed or begun years."""
    keys = [path.split("/") for path in files]
    names = {parts[0] for folder, *parts in keys if folder == "builds" and len(parts) > 1}
    return {year for year in map(staged_year, names) if year is not None}


def _committed_years(raw: Any, name: str, files: Iterable[str]) -> set[int]:
    """Return years with a committed or unreadable marker."""
    years = set()
    for year in _begun_years(files):
        content = read_object(raw, f"{name}/builds/{year}/zarr.json")
        if content is None:
            continue
        attrs = attributes_in(content)
        if attrs is None or "build_id" in attrs:
            years.add(year)
    return years


def _keys_to_pack(
    store: Store, files: Mapping[str, Iterable[str]], years: Mapping[str, set[int]]
) -> list[str]:
    """List the objects of sites with committed years, sorted, without those of unfinished years."""
    keys = ["zarr.json"]
    for name, committed in years.items():
        if not committed:
            continue
        site_files = files.get(name, ())
        unfinished = _begun_years(site_files) - committed
        prefixes = _prefixes_of_years(store, name, unfinished)
        keys += [
            f"{name}/{key}"
            for key in site_files
            if not key.startswith(prefixes) and not is_staged(key)
        ]
    return sorted(keys)


def _prefixes_of_years(store: Store, name: str, years: set[int]) -> tuple[str, ...]:
    """Return the key prefixes of objects of these years."""
    if not years:
        return ()
    group = store.open_site(name)
    indices = [index for index, year in enumerate(group["year"][:]) if int(year) in years]
    variables = built_variables(group)
    shards = [f"{variable}/c/{index}/" for variable in variables for index in indices]
    return (*(f"builds/{year}/" for year in years), *shards)
