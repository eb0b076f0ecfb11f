"""Markers of committed site-years: provenance and read counts of each year."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, Protocol

import pandas as pd
import zarr
import zarr.errors
from odc.geo.geobox import GeoBox

from minecube.catalog import Recipe, Site, as_dict
from minecube.cube.locks import WAIT_S, hold
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
LEFT_OUT = "left_out"
"""Attribute of an unused scene in a provenance: the reason."""
COPY_OF = "copy_of"
"""Attribute of a copy in a provenance, read in place of a scene with missing files: that scene's
id."""
_POLL_S = 0.02
PLACED_S = 10.0
"""Time to wait for objects to be in place: renaming takes milliseconds on a disk, but seconds in an
object store."""
_LIBRARIES = ("minecube", "numpy", "dask", "rasterio", "stackstac", "zarr")


class Account(Protocol):
    """Read counts of a composite, complete after its computation (`reader.Ledger`)."""

    def totals(self) -> Mapping[str, float]:
        """Return planned, lost, completeness and others."""

    def lost(self) -> Sequence[str]:
        """Return one line per lost read."""

    def to_parquet(self) -> bytes:
        """Return all counts as the bytes of a Parquet file."""


def provenance_of(
    site: Site, year: int, grid: GeoBox, recipe: Recipe, scenes: Sequence[Any], **more: Any
) -> dict[str, Any]:
    """Describe the origin of a site-year as plain JSON: the input of `build_id` and more."""
    listed = [_entry(s) for s in scenes]
    return {
        "site": site.id,
        "year": year,
        "grid": {
            "crs": f"EPSG:{grid.crs.epsg}",
            "transform": list(grid.transform)[:6],
            "shape": list(grid.shape),
        },
        "recipe": as_dict(recipe),
        "scenes": sorted(listed, key=lambda s: str(s["id"])),
        "version": metadata.version("minecube"),
        "libraries": {name: metadata.version(name) for name in _LIBRARIES},
        **more,
    }


def _entry(scene: Any) -> dict[str, Any]:
    """Return a scene's entry in a provenance."""
    return {
        "id": scene.id,
        "source": scene.properties["minecube:source"],
        "baseline": scene.properties["s2:processing_baseline"],
        "offset": scene.properties["minecube:offset"],
        "offset_reason": scene.properties["minecube:offset_reason"],
    }


def build_id(provenance: Mapping[str, Any]) -> str:
    """Hash a build's site, year, grid, recipe, scenes and version to 16 hexadecimal digits."""
    made_of = {k: provenance[k] for k in ("site", "year", "grid", "version")}
    # Scenes left out later still count: the build is named by its listed scenes.
    # Copies do not count: the original's files may be back at the next build.
    listed = [scene for scene in provenance["scenes"] if COPY_OF not in scene]
    made_of["scenes"] = [{k: v for k, v in scene.items() if k != LEFT_OUT} for scene in listed]
    made_of["recipe"] = {k: v for k, v in provenance["recipe"].items() if k != "title"}
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]


def is_staged(key: str) -> bool:
    """Whether a key, relative to the site's group, belongs to a year under construction."""
    first, _, rest = key.partition("/")
    return first == "builds" and rest.split("/")[0].endswith(STAGED)


def staged_year(name: str) -> int | None:
    """Return the year of a group below `builds` (marker or staging); None for other names."""
    first = name.split(".")[0]
    return int(first) if first.isdigit() and (name == first or name.endswith(STAGED)) else None


def leave_out(provenance: dict[str, Any], why: Mapping[str, str]) -> None:
    """Note the scenes left out after the search in a provenance (scene id -> reason)."""
    for scene in used_scenes(provenance):
        if scene["id"] in why:
            scene[LEFT_OUT] = why[scene["id"]]


def note_copies(
    provenance: dict[str, Any], copies: Mapping[str, Any], why: Mapping[str, str]
) -> None:
    """Note copies, read from other sources, in a provenance.

    Args:
        provenance: as from `provenance_of`.
        copies: scene id -> its copy.
        why: scene id -> its missing file.
    """
    leave_out(provenance, {name: why[name] for name in copies})
    listed = [
        *provenance["scenes"],
        *({**_entry(copy), COPY_OF: name} for name, copy in copies.items()),
    ]
    provenance["scenes"] = sorted(listed, key=lambda s: str(s["id"]))


def used_scenes(provenance: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the used scenes of a provenance."""
    return [scene for scene in provenance["scenes"] if LEFT_OUT not in scene]


def builds(store: Store, site_id: str) -> dict[int, dict[str, Any]]:
    """Return the provenance of a site's committed years; empty if no year is committed.

    If a year's objects are being put in place, this waits for them. A year left out of place by a
    killed run is skipped.
    """
    if not store.has_group(f"{site_id}/builds"):
        return {}
    found = {}
    with store.reading(site_id):
        years = sorted(int(y) for y in store.open_group(site_id)["year"][:] if y > 0)
    # Year by year: a listing would also find markers just begun by other threads.
    for year in years:
        marker = marker_of(store, site_id, year, wait_s=PLACED_S)
        if marker is not None and PLACING not in marker:
            found[year] = marker
    return found


def marker_of(
    store: Store, site_id: str, year: int, *, wait_s: float = 0.0
) -> dict[str, Any] | None:
    """Return the provenance of a committed year; None if the year is not committed.

    `PLACING` is set while its objects are put in place.

    Args:
        store: local path or object-store URL.
        site_id: the site.
        year: the year.
        wait_s: seconds to wait for the objects.
    """
    until = time.monotonic() + wait_s
    while True:
        try:
            marker = dict(store.open_group(f"{site_id}/builds/{year}").attrs)
            if PLACING in marker:
                marker = {**marker[PLACING]["made"], PLACING: marker[PLACING]["staging"]}
        except (FileNotFoundError, zarr.errors.GroupNotFoundError):
            return None
        if PLACING not in marker or time.monotonic() >= until:
            return marker if "build_id" in marker else None
        time.sleep(_POLL_S)


def pixels_of(made: Mapping[str, Any]) -> str:
    """Name the pixels of a committed year by its build and a hash of their checksums.

    The same build can have other pixels, for example after lost reads or other offset decisions.
    """
    sums = {
        key: of for key, of in made.get("checksums", {}).items() if key.startswith("reflectance/")
    }
    return f"{made['build_id']}:{sha256_of_json(sums)[:16]}"


def is_committed(
    store: Store,
    provenance: Mapping[str, Any],
    *,
    overwrite: bool = False,
    completeness: float = 0.0,
) -> bool:
    """Whether this build is committed; False if another committed build may be replaced.

    Args:
        store: local path or object-store URL.
        provenance: origin of the build (`provenance_of`).
        overwrite: allow replacing another build of the year, or the same build with too few reads.
        completeness: with `overwrite`, minimum share of planned reads for the same build to be
            kept.

    Raises:
        StaleError: the year is committed with another build, and `overwrite` is False.
    """
    site_id = provenance["site"]
    year = provenance["year"]
    build = build_id(provenance)
    there = marker_of(store, site_id, year)
    if there is None or PLACING in there:
        return False
    conflicts = there.get("offset_conflicts")
    same = there["build_id"] == build and (
        not conflicts or there["on_offset_conflict"] == provenance["on_offset_conflict"]
    )
    if overwrite:
        return same and completeness_of(there) >= completeness
    if not same:
        raise StaleError(
            f"{store}: {site_id} {year} is committed as build {there['build_id']}, but this run would make build {build} "
            "(other scenes, another version or --on-offset-conflict); use --overwrite to replace it"
        )
    return True


def completeness_of(marker: Mapping[str, Any]) -> float:
    """Return the share of planned reads in a committed year."""
    return float(marker.get("reads", {}).get("completeness", 1.0))


def reads(store: Store, site_id: str, year: int) -> pd.DataFrame:
    """Return the read counts of a committed site-year.

    The table has one row per scene and band, with the columns of `reader.ledger.COUNTS`.

    Raises:
        CubeError: the year is not committed, or has no read counts.
    """
    if year not in builds(store, site_id) or "reads" not in (
        marker := store.open_group(f"{site_id}/builds/{year}")
    ):
        raise CubeError(
            f"{store}: there are no counts of reads for {site_id} {year}; build it first"
        )
    return pd.read_parquet(io.BytesIO(bytes(marker["reads"][:])))


def note_incomplete(store: Store, site_id: str) -> None:
    """Note years with lost reads in the cube's attribute `incomplete_reads`: year -> share read."""
    with hold(store, site_id, wait_s=WAIT_S):
        group = store.open_site(site_id, mode="r+")
        shares = {}
        for year in group["year"][:]:
            marker = marker_of(store, site_id, int(year))
            if marker is not None and completeness_of(marker) < 1:
                shares[str(year)] = completeness_of(marker)
        if shares != group.attrs.get("incomplete_reads", {}):
            group.attrs["incomplete_reads"] = shares


def run_of(provenance: Mapping[str, Any]) -> str:
    """Hash the common inputs of a year's blocks: the build, and decisions on doubtful scenes."""
    doubts = ("on_offset_conflict", "offset_conflicts", "scl_errors", "shifts")
    resolved: list[Any] = [provenance.get(name) for name in doubts]
    resolved += [
        [scene["id"], scene["source"]] for scene in provenance["scenes"] if COPY_OF in scene
    ]
    return hashlib.sha256(
        json.dumps([build_id(provenance), resolved], sort_keys=True).encode()
    ).hexdigest()[:16]


def incomplete(
    site_id: str, year: int, counts: Mapping[str, float], reads: Account | None, completeness: float
) -> str:
    """Return the error message for a year with too few reads."""
    first = next(iter(reads.lost()), "") if reads else ""
    why = f"which leaves {counts['completeness']:.2%} where --min-read-completeness asks for {completeness:.2%}"
    why = why if counts["completeness"] < completeness else "which leaves no pixel"
    lost = f"{counts['lost']} of {counts['planned']} reads were lost"
    return f"{site_id} {year}: {lost}, {why}, so it is not committed; first {first}"
