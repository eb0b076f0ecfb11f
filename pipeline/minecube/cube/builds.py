"""What a site-year is made of, whether it is there, and what became of its reads: all that stands under `builds/`."""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, Protocol

import numpy as np
import pandas as pd
import zarr
import zarr.errors
from odc.geo.geobox import GeoBox

from minecube.catalog import Recipe, Site, as_dict
from minecube.cube.store import digest, exists, group_of, reading, site_group
from minecube.errors import CubeError

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
    listed = [
        {
            "id": s.id,
            "source": s.properties["minecube:source"],
            "baseline": s.properties["s2:processing_baseline"],
            "offset": s.properties["minecube:offset"],
            "offset_reason": s.properties["minecube:offset_reason"],
        }
        for s in scenes
    ]
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


def build_id(provenance: Mapping[str, Any]) -> str:
    """The name of a build: a hash of its site, year, recipe, scenes and code version; 16 hexadecimal digits."""
    made_of = {k: provenance[k] for k in ("site", "year", "grid", "scenes", "version")}
    made_of["recipe"] = {k: v for k, v in provenance["recipe"].items() if k != "title"}
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]


def builds(store: str, site_id: str) -> dict[int, dict[str, Any]]:
    """Provenance of the committed years of a site; empty where there is none."""
    if not exists(store, f"{site_id}/builds"):
        return {}
    found = {}
    with reading(store, site_id):
        years = sorted(int(y) for y in group_of(store, site_id)["year"][:] if y > 0)
    # Year by year: a list of what is there would come upon markers that other threads are only beginning.
    for year in years:
        try:
            attrs = dict(group_of(store, f"{site_id}/builds/{year}").attrs)
        except (FileNotFoundError, zarr.errors.GroupNotFoundError):
            continue
        if "build_id" in attrs:
            found[year] = attrs
    return found


def pixels_of(made: Mapping[str, Any]) -> str:
    """Names the pixels of a committed year: its build, and a hash of them.

    The same build made again after reads were lost, or offsets decided otherwise, has other pixels under its name.
    """
    sums = {key: of for key, of in made.get("checksums", {}).items() if key.startswith("reflectance/")}
    return f"{made['build_id']}:{digest(sums)[:16]}"


def is_committed(store: str, provenance: Mapping[str, Any], *, overwrite: bool = False, completeness: float = 1.0) -> bool:
    """Whether that very build is there already; False too where another one is, that is to be replaced.

    Args:
        store: local path or object-store URL.
        provenance: what the build is made of (`provenance_of`).
        overwrite: whether another build of the year may be replaced.
        completeness: share of its planned reads that it must have.

    Raises:
        CubeError: the year is committed with another build, or with fewer reads, and not to be replaced.
    """
    site_id, year, build = provenance["site"], provenance["year"], build_id(provenance)
    there = builds(store, site_id).get(year)
    if there is None:
        return False
    conflicts = there.get("offset_conflicts")
    same = there["build_id"] == build and (not conflicts or there["on_offset_conflict"] == provenance["on_offset_conflict"])
    has = there.get("reads", {}).get("completeness", 1.0)
    if same and has >= completeness:
        return True
    if overwrite:
        return False
    if same:
        raise CubeError(
            f"{store}: {site_id} {year} was built with {has:.2%} of its reads, asked for are {completeness:.2%}; to build it "
            "anew say --overwrite, to leave it as it is --min-read-completeness"
        )
    raise CubeError(
        f"{store}: {site_id} {year} is build {there['build_id']}, asked for is {build} (other scenes, another version or "
        "another way with offsets in conflict); to replace it say --overwrite"
    )


def reads_so_far(store: str, provenance: Mapping[str, Any]) -> bytes | None:
    """The counts of a run of that very build that was interrupted, as `write_year` was given them; None where there is none."""
    path = f"{provenance['site']}/builds/{provenance['year']}"
    if not exists(store, path):
        return None
    marker = group_of(store, path)
    there = marker.attrs.get("building") == run_of(provenance) and "reads" in marker
    return bytes(marker["reads"][:]) if there else None


def reads(store: str, site_id: str, year: int) -> pd.DataFrame:
    """What became of every read of a committed site-year: one row a scene and band, columns as in `reader.ledger.COUNTS`.

    Raises:
        CubeError: the year is not committed, or its reads were not counted.
    """
    if year not in builds(store, site_id) or "reads" not in (marker := group_of(store, f"{site_id}/builds/{year}")):
        raise CubeError(f"{store}: there are no counts of reads for {site_id} {year}; build it first")
    return pd.read_parquet(io.BytesIO(bytes(marker["reads"][:])))


_NOTING = threading.Lock()  # threads of this process commit years of one site at a time


def note_incomplete(store: str, site_id: str, pending: Mapping[str, float] | None = None) -> None:
    """Say in the cube's own attributes which years were committed with reads lost: `incomplete_reads`, year -> share read.

    Args:
        store: local path or object-store URL.
        site_id: the site.
        pending: years about to be committed, and their shares.
    """
    with _NOTING:
        shares = {str(y): made["reads"]["completeness"] for y, made in builds(store, site_id).items() if "reads" in made}
        noted = {year: share for year, share in {**shares, **(pending or {})}.items() if share < 1}
        group = site_group(store, site_id, mode="r+")
        if noted != group.attrs.get("incomplete_reads", {}):
            group.attrs["incomplete_reads"] = noted


def run_of(provenance: Mapping[str, Any]) -> str:
    """What blocks of one year must have in common: the build, and what became of scenes whose offset or place is in doubt."""
    resolved = [provenance.get(name) for name in ("on_offset_conflict", "offset_conflicts", "shifts")]
    return hashlib.sha256(json.dumps([build_id(provenance), resolved], sort_keys=True).encode()).hexdigest()[:16]


def begin(marker: zarr.Group, run: str) -> None:
    """Forget what another run left of the year, its commit first."""
    marker.attrs.clear()
    if "reads" in marker:
        del marker["reads"]
    marker.attrs.put({"building": run, "blocks": [], "checksums": {}})


def put_bytes(group: zarr.Group, name: str, content: bytes) -> None:
    """Keep bytes as an array of their own."""
    group.create_array(name, data=np.frombuffer(content, dtype=np.uint8), overwrite=True)


def incomplete(site_id: str, year: int, counts: Mapping[str, float], reads: Account | None, completeness: float) -> str:
    """What is said of a year that has too few of its reads."""
    first = next(iter(reads.lost()), "") if reads else ""
    why = f"which leaves {counts['completeness']:.2%} where --min-read-completeness asks for {completeness:.2%}"
    why = why if counts["completeness"] < completeness else "which leaves no pixel"
    lost = f"{counts['lost']} of {counts['planned']} reads were lost"
    return f"{site_id} {year}: {lost}, {why}, so it is not committed; first {first}"
