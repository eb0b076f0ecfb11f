"""Markers of committed site-years: what each year is made of, and what became of its reads."""

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
from minecube.cube.store import digest, exists, group_of, reading, site_group
from minecube.errors import CubeError, StaleError

PLACING = "placing"
"""Attribute of the marker of a committed year whose objects are being renamed to their places: `made`, its provenance, and
`staging`, the group where they are. Versions that do not know it take the year for uncommitted."""
WITHDRAWN = "withdrawn"
"""Attribute of the marker of a year whose pixels are being removed: their keys."""
STAGED = ".new"
"""Suffix of the group of a year that is being built, next to its marker: `2020.1a2b3c4d.new`."""
LEFT_OUT = "left_out"
"""Attribute of a scene in a provenance: why its pixels were not used."""
COPY_OF = "copy_of"
"""Attribute of a scene in a provenance that was read in place of another one, whose files are gone: the other's id."""
_POLL_S = 0.02
PLACED_S = 10.0
"""Time to wait until objects are in place: renaming takes milliseconds on a disk, and seconds in an object store."""
_LIBRARIES = ("minecube", "numpy", "dask", "rasterio", "stackstac", "zarr")


class Account(Protocol):
    """Counts of the reads behind a composite, complete once it has been computed (`reader.Ledger`)."""

    def totals(self) -> Mapping[str, float]:
        """planned, lost, completeness and others."""

    def lost(self) -> Sequence[str]:
        """A line for each lost read."""

    def to_parquet(self) -> bytes:
        """All counts, as the bytes of a Parquet file."""


def provenance_of(site: Site, year: int, grid: GeoBox, recipe: Recipe, scenes: Sequence[Any], **more: Any) -> dict[str, Any]:
    """What a site-year is made of, as plain JSON: everything that `build_id` hashes, and what else a reader may ask."""
    listed = [_entry(s) for s in scenes]
    return {
        "site": site.id,
        "year": year,
        "grid": {"crs": f"EPSG:{grid.crs.epsg}", "transform": list(grid.transform)[:6], "shape": list(grid.shape)},
        "recipe": as_dict(recipe),
        "scenes": sorted(listed, key=lambda s: str(s["id"])),
        "version": metadata.version("minecube"),
        "libraries": {name: metadata.version(name) for name in _LIBRARIES},
        **more,
    }


def _entry(scene: Any) -> dict[str, Any]:
    """What a provenance says of a scene."""
    return {
        "id": scene.id,
        "source": scene.properties["minecube:source"],
        "baseline": scene.properties["s2:processing_baseline"],
        "offset": scene.properties["minecube:offset"],
        "offset_reason": scene.properties["minecube:offset_reason"],
    }


def build_id(provenance: Mapping[str, Any]) -> str:
    """The name of a build: a hash of its site, year, recipe, scenes and code version; 16 hexadecimal digits."""
    made_of = {k: provenance[k] for k in ("site", "year", "grid", "version")}
    # A scene that was left out afterwards is listed with the reason: the build is that of the same scenes.
    # The same holds for one whose copy was read, since its files may be back when the build is made again.
    listed = [scene for scene in provenance["scenes"] if COPY_OF not in scene]
    made_of["scenes"] = [{k: v for k, v in scene.items() if k != LEFT_OUT} for scene in listed]
    made_of["recipe"] = {k: v for k, v in provenance["recipe"].items() if k != "title"}
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]


def is_staged(key: str) -> bool:
    """Whether an object, named relative to its site's group, belongs to a year that is being built."""
    first, _, rest = key.partition("/")
    return first == "builds" and rest.split("/")[0].endswith(STAGED)


def staged_year(name: str) -> int | None:
    """The year of a group below `builds`, be it a marker or a year that is being built; None for other names."""
    first = name.split(".")[0]
    return int(first) if first.isdigit() and (name == first or name.endswith(STAGED)) else None


def leave_out(provenance: dict[str, Any], why: Mapping[str, str]) -> None:
    """Note in a provenance which of its scenes were left out after all: scene id -> reason."""
    for scene in used_scenes(provenance):
        if scene["id"] in why:
            scene[LEFT_OUT] = why[scene["id"]]


def note_copies(provenance: dict[str, Any], copies: Mapping[str, Any], why: Mapping[str, str]) -> None:
    """Note in a provenance which scenes were read from a copy in another source.

    Args:
        provenance: as `provenance_of` gives it.
        copies: scene id -> its copy.
        why: scene id -> which file is gone.
    """
    leave_out(provenance, {name: why[name] for name in copies})
    listed = [*provenance["scenes"], *({**_entry(copy), COPY_OF: name} for name, copy in copies.items())]
    provenance["scenes"] = sorted(listed, key=lambda s: str(s["id"]))


def used_scenes(provenance: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The scenes of a provenance whose pixels were used."""
    return [scene for scene in provenance["scenes"] if LEFT_OUT not in scene]


def builds(store: str, site_id: str) -> dict[int, dict[str, Any]]:
    """Provenance of the committed years of a site; empty if there is none.

    A year whose objects are just being put in place is waited for; it is left out if the run that does so was killed.
    """
    if not exists(store, f"{site_id}/builds"):
        return {}
    found = {}
    with reading(store, site_id):
        years = sorted(int(y) for y in group_of(store, site_id)["year"][:] if y > 0)
    # Year by year: a listing would find markers that other threads are only beginning.
    for year in years:
        marker = marker_of(store, site_id, year, wait_s=PLACED_S)
        if marker is not None and PLACING not in marker:
            found[year] = marker
    return found


def marker_of(store: str, site_id: str, year: int, *, wait_s: float = 0.0) -> dict[str, Any] | None:
    """The provenance of a committed year; None if the year is not committed. `PLACING` is set while it is put in place.

    Args:
        store: local path or object-store URL.
        site_id: the site.
        year: the year.
        wait_s: seconds to wait until the objects of the year are in place.
    """
    until = time.monotonic() + wait_s
    while True:
        try:
            marker = dict(group_of(store, f"{site_id}/builds/{year}").attrs)
            if PLACING in marker:
                marker = {**marker[PLACING]["made"], PLACING: marker[PLACING]["staging"]}
        except (FileNotFoundError, zarr.errors.GroupNotFoundError):
            return None
        if PLACING not in marker or time.monotonic() >= until:
            return marker if "build_id" in marker else None
        time.sleep(_POLL_S)


def pixels_of(made: Mapping[str, Any]) -> str:
    """Names the pixels of a committed year: its build, and a hash of them.

    The same build made again after reads were lost, or offsets decided otherwise, has other pixels under its name.
    """
    sums = {key: of for key, of in made.get("checksums", {}).items() if key.startswith("reflectance/")}
    return f"{made['build_id']}:{digest(sums)[:16]}"


def is_committed(store: str, provenance: Mapping[str, Any], *, overwrite: bool = False, completeness: float = 0.0) -> bool:
    """Whether that very build is committed; False if another build is committed that may be replaced.

    Args:
        store: local path or object-store URL.
        provenance: what the build is made of (`provenance_of`).
        overwrite: whether another build of the year may be replaced, and the same one if it lacks reads.
        completeness: share of its planned reads below which the same build is made again, with `overwrite`.

    Raises:
        StaleError: the year is committed with another build, which may not be replaced.
    """
    site_id = provenance["site"]
    year = provenance["year"]
    build = build_id(provenance)
    there = marker_of(store, site_id, year)
    if there is None or PLACING in there:
        return False
    conflicts = there.get("offset_conflicts")
    same = there["build_id"] == build and (not conflicts or there["on_offset_conflict"] == provenance["on_offset_conflict"])
    if overwrite:
        return same and completeness_of(there) >= completeness
    if not same:
        raise StaleError(
            f"{store}: {site_id} {year} is committed as build {there['build_id']}, but this run would make build {build} "
            "(other scenes, another version or --on-offset-conflict); use --overwrite to replace it"
        )
    return True


def completeness_of(marker: Mapping[str, Any]) -> float:
    """Share of its planned reads that a committed year has."""
    return float(marker.get("reads", {}).get("completeness", 1.0))


def reads(store: str, site_id: str, year: int) -> pd.DataFrame:
    """What became of every read of a committed site-year: one row a scene and band, columns as in `reader.ledger.COUNTS`.

    Raises:
        CubeError: the year is not committed, or its reads were not counted.
    """
    if year not in builds(store, site_id) or "reads" not in (marker := group_of(store, f"{site_id}/builds/{year}")):
        raise CubeError(f"{store}: there are no counts of reads for {site_id} {year}; build it first")
    return pd.read_parquet(io.BytesIO(bytes(marker["reads"][:])))


def note_incomplete(store: str, site_id: str) -> None:
    """Write into the cube's attributes which years were committed with lost reads: `incomplete_reads`, year -> share read."""
    with hold(store, site_id, wait_s=WAIT_S):
        group = site_group(store, site_id, mode="r+")
        shares = {}
        for year in group["year"][:]:
            marker = marker_of(store, site_id, int(year))
            if marker is not None and completeness_of(marker) < 1:
                shares[str(year)] = completeness_of(marker)
        if shares != group.attrs.get("incomplete_reads", {}):
            group.attrs["incomplete_reads"] = shares


def run_of(provenance: Mapping[str, Any]) -> str:
    """What blocks of one year must have in common: the build, and what became of scenes in doubt."""
    doubts = ("on_offset_conflict", "offset_conflicts", "scl_errors", "shifts")
    resolved: list[Any] = [provenance.get(name) for name in doubts]
    resolved += [[scene["id"], scene["source"]] for scene in provenance["scenes"] if COPY_OF in scene]
    return hashlib.sha256(json.dumps([build_id(provenance), resolved], sort_keys=True).encode()).hexdigest()[:16]


def incomplete(site_id: str, year: int, counts: Mapping[str, float], reads: Account | None, completeness: float) -> str:
    """What is said of a year that has too few of its reads."""
    first = next(iter(reads.lost()), "") if reads else ""
    why = f"which leaves {counts['completeness']:.2%} where --min-read-completeness asks for {completeness:.2%}"
    why = why if counts["completeness"] < completeness else "which leaves no pixel"
    lost = f"{counts['lost']} of {counts['planned']} reads were lost"
    return f"{site_id} {year}: {lost}, {why}, so it is not committed; first {first}"
