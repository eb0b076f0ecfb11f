"""Build a site-year and commit it, or withdraw the commit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

import xarray as xr
import zarr

from minecube.cube.locks import hold
from minecube.cube.markers import PLACING, is_committed, marker_path, read_marker
from minecube.cube.provenance import hash_build, hash_run
from minecube.cube.store import Store
from minecube.cube.write.blocks import build_blocks
from minecube.cube.write.options import DEFAULT, Account, BuildOptions
from minecube.cube.write.staging import Staging, discard, finish, open_staging, withdraw, year_index
from minecube.errors import BusyError, CubeError, ReadError


def write_year(
    store: Store,
    composite: xr.Dataset,
    provenance: Mapping[str, Any],
    scenes: bytes,
    options: BuildOptions = DEFAULT,
) -> bool:
    """Build a site-year apart, block by block, and commit it. Returns False if already committed.

    With `overwrite`, the old year stays readable until the commit. It stays for good if the new
    build fails.

    The composite is a lazy Dataset of `reflectance` and the recipe's layers. Its Dask chunks are the
    cube's shards. `provenance` (`describe_build`) gives site and year. `scenes` is the scene list, as
    the bytes of a stac-geoparquet file.

    Raises:
        BusyError: another run is building this site-year.
        CubeError: as `is_committed`; blocks and shards do not match, no pixel was observed, the
            build was stopped, or the store cannot be written.
        ReadError: more reads were lost than `completeness` allows. The year is not committed.
    """
    site_id = provenance["site"]
    year = provenance["year"]
    with hold(store, marker_path(site_id, year)) as lock:
        finish(store, site_id, year)
        if is_committed(
            store,
            provenance,
            overwrite=options.overwrite,
            completeness=options.completeness,
        ):
            return False
        cube = store.open_site(site_id)
        year_index(cube, year)
        names = [str(name) for name in composite.data_vars]
        _check_alignment(composite, {name: cube[name] for name in names})
        staging = open_staging(store, site_id, year, names, hash_run(provenance), options.before)
        build_blocks(composite, staging, lock, options)
        lock.check()
        _check_complete(staging, options)
        _commit(staging, provenance, scenes, options)
    return True


def _check_alignment(composite: xr.Dataset, arrays: Mapping[str, zarr.Array]) -> None:
    """Compare blocks with shards. Two writers to one shard would lose pixels without an error."""
    for name, array in arrays.items():
        data = composite[name]
        blocks = [
            tuple(min(side, length - start) for start in range(0, length, side))
            for length, side in zip(array.shape, array.shards, strict=True)
        ]
        if data.shape != array.shape[1:] or data.chunks != tuple(blocks[1:]):
            raise CubeError(
                f"{name}: blocks of {data.chunks} do not match shards of {array.shards[1:]} over "
                f"{array.shape[1:]}; two blocks would write one shard and lose pixels, so "
                "composite with the recipe the cube was made by"
            )


def _check_complete(staging: Staging, options: BuildOptions) -> None:
    """Raise an error if a built year has too few reads for a commit, or no pixel."""
    site_year = f"{staging.site_id} {staging.year}"
    has_pixels = bool(staging.arrays["quality"][:].any())
    if options.reads is not None:
        counts = options.reads.totals()
        is_short = counts["completeness"] < options.completeness
        if is_short or (counts["lost"] and not has_pixels):
            # The next run reads the lost pixels again.
            discard(staging.store, staging.site_id, staging.year)
            raise ReadError(f"{site_year}: {_explain_losses(options.reads, options.completeness)}")
    if not has_pixels:
        raise CubeError(
            f"{site_year}: no scene has a pixel here, so nothing is committed; check polygon and "
            "scene list"
        )


def _explain_losses(reads: Account, completeness: float) -> str:
    """Say how many reads were lost, and why this is too many."""
    counts = reads.totals()
    why = "which leaves no pixel"
    if counts["completeness"] < completeness:
        why = (
            f"which leaves {counts['completeness']:.2%} where --min-read-completeness asks for "
            f"{completeness:.2%}"
        )
    return (
        f"{counts['lost']} of {counts['planned']} reads were lost, {why}, so it is not committed; "
        f"first {next(iter(reads.lost()), '')}"
    )


def _commit(
    staging: Staging, provenance: Mapping[str, Any], scenes: bytes, options: BuildOptions
) -> None:
    """Commit a built year with its scene list and read counts."""
    marker = {
        **provenance,
        **options.finished(),
        "build_id": hash_build(provenance),
        "committed": datetime.now(tz=UTC).isoformat(timespec="seconds"),
    }
    files = {"scenes": scenes}
    if options.reads is not None:
        marker["reads"] = dict(options.reads.totals())
        files["reads"] = options.reads.to_parquet()
    staging.commit(marker, files)


def finish_commit(store: Store, site_id: str, year: int) -> None:
    """Put the objects of a committed year in place after a killed run. Other years stay as is.

    Raises:
        CubeError: the store cannot be written.
    """
    marker = read_marker(store, site_id, year)
    if marker is None or PLACING not in marker:
        return
    with contextlib.suppress(BusyError), hold(store, marker_path(site_id, year)):
        finish(store, site_id, year)


def withdraw_years(
    store: Store,
    site_id: str,
    years: Iterable[int],
    judged: Mapping[int, Mapping[str, Any]] | None = None,
) -> None:
    """Withdraw the commits of years and remove their pixels.

    The same `minecube build` then rebuilds the years. `judged` maps years to their faulty markers. A
    year with another marker by now is left alone.

    Raises:
        BusyError: another run is building one of the years, or has rebuilt it.
        CubeError: the store cannot be written.
    """
    markers = judged or {}
    for year in years:
        with hold(store, marker_path(site_id, year)):
            withdraw(store, site_id, year, markers.get(year, {}).get("sha256"))
