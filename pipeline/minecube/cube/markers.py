"""Read the markers of committed site-years: provenance and read counts of each year."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping
from typing import Any

import pandas as pd
import zarr
import zarr.errors

from minecube.cube.listing import attributes_in, read_object
from minecube.cube.provenance import hash_build
from minecube.cube.store import Store
from minecube.digests import sha256_of_json
from minecube.errors import CubeError, StaleError

PLACING = "placing"
"""Attribute of the marker of a committed year while its objects are renamed to their places.

It holds `made`, the provenance, and `staging`, the group with the objects. Versions without this
attribute take the year for uncommitted."""
WITHDRAWN = "withdrawn"
"""Attribute of the marker of a year during removal of its pixels. It holds the keys of the
pixels."""
STAGED = ".new"
"""Suffix of the group of a year under construction, next to its marker: `2020.1a2b3c4d.new`."""
PLACED_S = 10.0
"""Time to wait for objects to be in place: renaming takes milliseconds on a disk, but seconds in an
object store."""
_POLL_S = 0.02


def marker_path(site_id: str, year: int) -> str:
    """Return the path of the group with a year's marker."""
    return f"{site_id}/builds/{year}"


def is_staged(key: str) -> bool:
    """Whether a key, relative to the site's group, belongs to a year under construction."""
    folder, _, path = key.partition("/")
    return folder == "builds" and path.split("/")[0].endswith(STAGED)


def staged_year(name: str) -> int | None:
    """Return the year of a group below `builds` (marker or staging); None for other names."""
    year = name.split(".")[0]
    if year.isdigit() and (name == year or name.endswith(STAGED)):
        return int(year)
    return None


def read_markers(store: Store, site_id: str) -> dict[int, dict[str, Any]]:
    """Return the provenance of a site's committed years; empty if no year is committed.

    If a year's objects are being put in place, this waits for them. A year left out of place by a
    killed run is skipped.
    """
    if not store.has_group(f"{site_id}/builds"):
        return {}
    with store.reading(site_id):
        years = sorted(int(year) for year in store.open_group(site_id)["year"][:] if year > 0)
    committed = {}
    # Year by year: a listing would also find markers just begun by other threads.
    for year in years:
        marker = read_marker(store, site_id, year, wait_s=PLACED_S)
        if marker is not None and PLACING not in marker:
            committed[year] = marker
    return committed


def read_marker(
    store: Store, site_id: str, year: int, *, wait_s: float = 0.0
) -> dict[str, Any] | None:
    """Return the provenance of a committed year; None if the year is not committed.

    `PLACING` is set while its objects are put in place. `wait_s` is the time to wait for them, in
    seconds.
    """
    deadline = time.monotonic() + wait_s
    while True:
        try:
            marker = dict(store.open_group(marker_path(site_id, year)).attrs)
            if PLACING in marker:
                marker = {**marker[PLACING]["made"], PLACING: marker[PLACING]["staging"]}
        except (FileNotFoundError, zarr.errors.GroupNotFoundError):
            return None
        if PLACING not in marker or time.monotonic() >= deadline:
            break
        time.sleep(_POLL_S)
    return marker if "build_id" in marker else None


def name_pixels(marker: Mapping[str, Any]) -> str:
    """Name the pixels of a committed year by its build and a hash of their checksums.

    The same build can have other pixels, for example after lost reads or other offset decisions.
    """
    checksums = {
        key: checksum
        for key, checksum in marker.get("checksums", {}).items()
        if key.startswith("reflectance/")
    }
    return f"{marker['build_id']}:{sha256_of_json(checksums)[:16]}"


def is_committed(
    store: Store,
    provenance: Mapping[str, Any],
    *,
    overwrite: bool = False,
    completeness: float = 0.0,
) -> bool:
    """Whether this build is committed; False if another committed build may be replaced.

    `provenance` is as from `describe_build`. `overwrite` allows replacing another build of the year,
    or the same build with a smaller share of its planned reads than `completeness`.

    Raises:
        StaleError: the year is committed with another build, and `overwrite` is False.
    """
    site_id = provenance["site"]
    year = provenance["year"]
    build = hash_build(provenance)
    marker = read_marker(store, site_id, year)
    if marker is None or PLACING in marker:
        return False
    is_same = marker["build_id"] == build and _has_same_decisions(
        marker, provenance.get("on_offset_conflict")
    )
    if overwrite:
        return is_same and completeness_of(marker) >= completeness
    if not is_same:
        raise StaleError(
            f"{store}: {site_id} {year} is committed as build {marker['build_id']}, but this run "
            f"would make build {build} (other scenes, another version or --on-offset-conflict); "
            "use --overwrite to replace it"
        )
    return True


def find_build(
    store: Store, site_id: str, year: int, inputs: str, on_offset_conflict: str
) -> dict[str, Any] | None:
    """Return the provenance of a committed year if it was built from these inputs; else None.

    `inputs` is as from `hash_inputs`. None may also mean that the marker is damaged, or of an older
    version, which stored no inputs. Zarr would take 0.5 ms to read the marker instead of 0.1.
    """
    if store.path is not None and not store.path.exists():
        return None
    raw = store.open_objects()
    marker = attributes_in(read_object(raw, f"{marker_path(site_id, year)}/zarr.json"))
    if marker is None or PLACING in marker or marker.get("inputs") != inputs:
        return None
    return marker if _has_same_decisions(marker, on_offset_conflict) else None


def _has_same_decisions(marker: Mapping[str, Any], on_offset_conflict: str | None) -> bool:
    """Whether a run with this rule for offset conflicts would decide as the committed build."""
    if not marker.get("offset_conflicts"):
        return True
    return bool(marker["on_offset_conflict"] == on_offset_conflict)


def completeness_of(marker: Mapping[str, Any]) -> float:
    """Return the share of planned reads in a committed year."""
    return float(marker.get("reads", {}).get("completeness", 1.0))


def read_counts(store: Store, site_id: str, year: int) -> pd.DataFrame:
    """Return the read counts of a committed site-year.

    The table has one row per scene and band, with the columns of `reader.ledger.COUNTS`.

    Raises:
        CubeError: the year is not committed, or has no read counts.
    """
    if year in read_markers(store, site_id):
        group = store.open_group(marker_path(site_id, year))
        if "reads" in group:
            return pd.read_parquet(io.BytesIO(bytes(group["reads"][:])))
    raise CubeError(f"{store}: there are no counts of reads for {site_id} {year}; build it first")
