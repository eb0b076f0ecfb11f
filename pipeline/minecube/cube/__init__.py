"""The Zarr store: one group per site. A site-year is built apart; its commit puts it in place.

    cubes.zarr/
      Germany_1/                   one xarray dataset: reflectance, the recipe's layers, footprint,
                                   footprint fraction
        builds/2020/               marker of a committed site-year, its provenance as attributes
          scenes                   its scene list, the bytes of a stac-geoparquet file
          reads                    outcome of every read, the bytes of a Parquet file
        builds/2020.RUN.new/       a site-year under construction (staging.py)
        predictions/unet-small-1a2b3c4d/   one xarray dataset per model: probability, or change
      .locks/                      locks of running writers (locks.py)

A site-year without a marker is not committed and has no pixels. A marker lists the size and SHA-256
of every object of its site-year, computed while writing. Labels and predictions keep theirs in
their own attributes. The site's group keeps a hash of its metadata. `verify` checks the store
against them.

    store.py     opens stores and groups             template.py     makes a group without pixels
    builds.py    provenance, markers, read counts    staging.py      builds and commits a year
    opening.py   opens cubes to read                 pixels.py       reads arrays faster than Zarr
    commits.py   detects writes during reads         predictions.py  writes and opens maps of models
    locks.py     keeps two runs apart                windows.py      windows for training
    verify.py    checks a store                      pack.py         packs a store into one zip
    packed.py    opens a packed store                names.py        finds a prediction by its name
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import dask
import numpy as np
import xarray as xr
import zarr
from odc.geo.geobox import GeoBox

from minecube.catalog import Recipe, Site, as_dict
from minecube.cube.builds import (
    PLACING,
    Account,
    build_id,
    builds,
    completeness_of,
    incomplete,
    is_committed,
    leave_out,
    marker_of,
    note_copies,
    provenance_of,
    reads,
    run_of,
    used_scenes,
)
from minecube.cube.locks import WAIT_S, Lock, hold
from minecube.cube.names import choose_name, find_prediction
from minecube.cube.opening import as_float, grid_and_years, open_committed, open_cube
from minecube.cube.pack import Packing, pack
from minecube.cube.predictions import (
    Prediction,
    mapped_by,
    open_change,
    open_probability,
    write_prediction,
    write_probability,
)
from minecube.cube.staging import (
    Staging,
    discard,
    finish,
    is_begun,
    open_staging,
    reads_so_far,
    withdraw,
    year_index,
)
from minecube.cube.store import BEING_MADE, FORMAT, NAMED, Store, is_being_made, sites
from minecube.cube.template import (
    FRACTION,
    FRACTION_ATTRS,
    begin_labels,
    encoding_of,
    extend,
    geozarr,
    grid_in,
    identities,
    note_labels,
    seal_group,
    template,
)
from minecube.cube.verify import UNFINISHED, Finding, Report, named_sites, verify
from minecube.cube.windows import CubeDataset, Window, open_reflectance
from minecube.errors import BusyError, CubeError, ReadError

__all__ = [
    "UNFINISHED",
    "CubeDataset",
    "Finding",
    "Packing",
    "Prediction",
    "Report",
    "Store",
    "Window",
    "as_float",
    "build_id",
    "builds",
    "check",
    "choose_name",
    "completeness_of",
    "create",
    "find_prediction",
    "grid_and_years",
    "is_begun",
    "is_committed",
    "leave_out",
    "mapped_by",
    "named_sites",
    "note_copies",
    "open_change",
    "open_committed",
    "open_cube",
    "open_probability",
    "open_reflectance",
    "pack",
    "provenance_of",
    "reads",
    "reads_so_far",
    "settle",
    "sites",
    "uncommit",
    "used_scenes",
    "verify",
    "write_footprint",
    "write_prediction",
    "write_probability",
    "write_year",
]

log = logging.getLogger(__name__)


def check(store: Store, site: Site, grid: GeoBox, years: Sequence[int], recipe: Recipe) -> bool:
    """Check the site's group against years, grid and recipe. Returns whether the group exists.

    Raises:
        CubeError: the group was made with another recipe or on another grid, lacks its metadata or
            an array, or would need a new year before its last one.
    """
    group = store.find_group(site.id)
    if group is None and store.has_objects(site.id):
        raise CubeError(
            f"{store}: {site.id} has lost its zarr.json, but has other objects; run `minecube verify`"
        )
    if group is None or is_being_made(group):
        return False
    made = store.open_site(site.id, mode="r").attrs[NAMED]
    asked = as_dict(recipe)
    changed = ", ".join(k for k in asked if k != "title" and made["recipe"].get(k) != asked[k])
    if changed:
        raise CubeError(
            f"{store}: {site.id} was made with recipe {made['recipe']['id']!r}, which differs from {recipe.id!r} in {changed}; "
            "use the same recipe, or another --store"
        )
    lacking = [name for name in made.get("arrays", ()) if name not in group]
    if lacking:
        raise CubeError(f"{store}: {site.id} lacks its array {lacking[0]!r}; run `minecube verify`")
    if grid_in(group.attrs) != grid:
        raise CubeError(
            f"{store}: {site.id} lies on another grid, because its polygon or --margin has changed (the store has a margin of "
            f"{made.get('margin', 0):g} m, asked for was {site.margin:g} m); use another --store"
        )
    there = [int(y) for y in group["year"][:] if y > 0]
    early = [y for y in years if y not in there and y < there[-1]]
    if early:
        raise CubeError(
            f"{store}: {site.id} has years {there[0]}..{there[-1]}, and year {early[0]} cannot be added before the last one; "
            "name all years in the first build, or use another --store"
        )
    return True


def margin_of(store: Store, site_id: str) -> float | None:
    """Return the margin of the site's grid in metres; None if the store has no such site."""
    group = store.find_group(site_id)
    if group is None or is_being_made(group):
        return None
    return float(store.open_site(site_id, mode="r").attrs[NAMED].get("margin", 0))


def create(store: Store, site: Site, grid: GeoBox, years: Sequence[int], recipe: Recipe) -> None:
    """Create the site's group for these years without pixels, or make room for missing years.

    Raises:
        BusyError: another run has held the group for minutes.
        CubeError: as `check`, or the store cannot be written.
    """
    with store.writing(), hold(store, site.id, wait_s=WAIT_S):
        if check(store, site, grid, years, recipe):
            group = store.open_site(site.id, mode="r+")
            extend(group, years)
            seal_group(group)
            return
        empty = template(grid, sorted(years), recipe)
        empty.attrs |= {NAMED: {"format": BEING_MADE}, **geozarr(grid)}
        encoding = {str(n): encoding_of(v, recipe) for n, v in empty.data_vars.items()}
        target = store.open_zarr()
        store.begin_group(site.id, {NAMED: {"format": BEING_MADE}})
        empty.to_zarr(
            target,
            group=site.id,
            mode="a",
            compute=False,
            consolidated=False,
            zarr_format=3,
            encoding=encoding,
        )
        group = zarr.open_group(target, path=site.id, mode="r+", use_consolidated=False)
        made = {
            "format": FORMAT,
            "site": site.id,
            "recipe": as_dict(recipe),
            "arrays": identities(store, site.id, group),
        }
        if site.margin:  # 0 is not stored, as in older versions
            made["margin"] = site.margin
        if site.title:
            made["title"] = site.title
        group.attrs[NAMED] = made
        seal_group(group)


def write_year(
    store: Store,
    composite: xr.Dataset,
    provenance: Mapping[str, Any],
    scenes: bytes,
    *,
    reads: Account | None = None,
    before: bytes | None = None,
    completeness: float = 1.0,
    overwrite: bool = False,
    scheduler: str | None = None,
    workers: int = 4,
    stopped: Callable[[], bool] = lambda: False,
    finished: Callable[[], Mapping[str, Any]] = dict,
) -> bool:
    """Build a site-year apart, block by block, and commit it. Returns False if already committed.

    With `overwrite`, the old year stays readable until the commit. It stays for good if the new
    build fails.

    Args:
        store: local path or object-store URL.
        composite: lazy Dataset of `reflectance` and the recipe's layers. Its Dask chunks are the
            cube's shards.
        provenance: origin of the build (`provenance_of`). Its site and year give the place.
        scenes: the scene list, as the bytes of a stac-geoparquet file.
        reads: counts of the reads of this computation.
        before: the starting counts of `reads` (`reads_so_far`). Staged blocks with other counts are
            made again.
        completeness: minimum share of the planned reads for a commit.
        overwrite: replace another committed build of the year.
        scheduler: name of the Dask scheduler; default: the active one.
        workers: blocks computed at a time.
        stopped: called between blocks. After True, the year can be resumed later.
        finished: called after the last block. Returns further entries of the provenance, such as
            the time taken.

    Raises:
        BusyError: another run is building this site-year.
        CubeError: as `is_committed`; blocks and shards do not match, no pixel was observed, the
            build was stopped, or the store cannot be written.
        ReadError: more reads were lost than `completeness` allows. The year is not committed.
    """
    site_id = provenance["site"]
    year = provenance["year"]
    with store.writing(), hold(store, f"{site_id}/builds/{year}") as lock:
        finish(store, site_id, year)
        if is_committed(store, provenance, overwrite=overwrite, completeness=completeness):
            return False
        group = store.open_site(site_id, mode="r")
        year_index(group, year)
        names = [str(name) for name in composite.data_vars]
        _check_alignment(composite, {name: group[name] for name in names})
        staging = open_staging(store, site_id, year, names, run_of(provenance), before)
        how = {"scheduler": scheduler, "num_workers": workers}
        _build_blocks(composite, staging, reads, lock, how, stopped)
        lock.check()
        counts = dict(reads.totals()) if reads else {}
        seen = bool(staging.arrays["quality"][:].any())
        if counts.get("completeness", 1.0) < completeness or (counts.get("lost") and not seen):
            discard(store, site_id, year)  # the next run reads the lost pixels again
            raise ReadError(incomplete(site_id, year, counts, reads, completeness))
        if not seen:
            raise CubeError(
                f"{site_id} {year}: no scene has a pixel here, so nothing is committed; check polygon and scene list"
            )
        committed = datetime.now(tz=UTC).isoformat(timespec="seconds")
        made = {
            **provenance,
            **finished(),
            "build_id": build_id(provenance),
            "committed": committed,
        }
        blobs = {"scenes": scenes}
        if reads:
            made["reads"] = counts
            blobs["reads"] = reads.to_parquet()
        staging.commit(made, blobs)
    return True


def _build_blocks(
    composite: xr.Dataset,
    staging: Staging,
    reads: Account | None,
    lock: Lock,
    how: Mapping[str, Any],
    stopped: Callable[[], bool],
) -> None:
    """Compute the missing blocks, a few at a time, and note them.

    A block's pixels are written first. Then one note marks it as done and adds its read counts. A
    run killed in between computes the block again and counts some reads twice. Every done block has
    its lost reads counted.
    """
    where = f"{staging.site_id} {staging.year}"
    blocks = _blocks(staging.arrays["clear_count"])
    done = staging.blocks
    checksums = staging.checksums
    todo = [b for b in blocks if f"{b[0]}/{b[1]}" not in done]
    if len(todo) < len(blocks):
        log.info(
            "%s: going on with block %d of %d", where, len(blocks) - len(todo) + 1, len(blocks)
        )
    workers = how["num_workers"]
    for at in range(0, len(todo), workers):
        lock.check()
        if stopped():
            raise CubeError(
                f"{where}: stopped with {len(todo) - at} of {len(blocks)} blocks to go; the same build goes on there"
            )
        batch = todo[at : at + workers]
        checksums |= _compute_blocks(composite, staging.arrays, batch, how)
        lock.check()
        done += [f"{row}/{column}" for row, column in batch]
        staging.note(done, checksums, reads.to_parquet() if reads else None)


def settle(store: Store, site_id: str, year: int) -> None:
    """Put the objects of a committed year in place after a killed run. Other years stay as is.

    Raises:
        CubeError: the store cannot be written.
    """
    marker = marker_of(store, site_id, year)
    if marker is None or PLACING not in marker:
        return
    with contextlib.suppress(BusyError), store.writing(), hold(store, f"{site_id}/builds/{year}"):
        finish(store, site_id, year)


def uncommit(
    store: Store,
    site_id: str,
    years: Iterable[int],
    judged: Mapping[int, Mapping[str, Any]] | None = None,
) -> None:
    """Withdraw the commits of years and remove their pixels.

    The same `minecube build` then rebuilds the years.

    Args:
        store: local path or object-store URL.
        site_id: the site.
        years: the years.
        judged: faulty markers by year. A year with another marker by now is left alone.

    Raises:
        BusyError: another run is building one of the years, or has rebuilt it.
        CubeError: the store cannot be written.
    """
    for year in years:
        sha256 = None if judged is None else judged.get(year, {}).get("sha256")
        with store.writing(), hold(store, f"{site_id}/builds/{year}"):
            withdraw(store, site_id, year, sha256)


def write_footprint(
    store: Store,
    site_id: str,
    footprint: xr.DataArray,
    origin: str,
    fraction: xr.DataArray | None = None,
) -> None:
    """Write yearly masks (uint8 [year, y, x]: 1 mine, 0 not mine, 255 unknown) into their years.

    `origin` names the source of the masks. `fraction` is the share of each pixel covered by mine
    (uint8 [year, y, x] x 250, 255 unknown). Without it, the fraction of these years becomes
    unknown: the old one belongs to another footprint. Labels half written by a killed run cannot be
    opened until the next complete write.

    Raises:
        BusyError: another run has held the site's group for minutes.
        CubeError: the masks lie on another grid or in years missing from the cube, or the store
            cannot be written.
    """
    fraction = (
        xr.full_like(footprint, 255) if fraction is None else fraction.sel(year=footprint.year)
    )
    with store.writing(), hold(store, site_id, wait_s=WAIT_S):
        group = store.open_site(site_id, mode="r+")
        if not footprint.odc.geobox == fraction.odc.geobox == grid_in(group.attrs):
            raise CubeError(
                f"{store}: footprints of {site_id} lie on another grid than its cube; rasterise them on the cube's grid"
            )
        if FRACTION not in group:  # a cube of a version without fractions
            attrs = {**FRACTION_ATTRS, "grid_mapping": "spatial_ref"}
            zarr.create_array(
                store.open_zarr(),
                name=f"{site_id}/{FRACTION}",
                **_like(group["footprint"]),
                attributes=attrs,
            )
        years = {year_index(group, int(year)): int(year) for year in footprint.year.values}
        layers = {FRACTION: fraction, "footprint": footprint}
        for name in layers:
            begin_labels(
                zarr.open_array(store.open_zarr(), path=f"{site_id}/{name}", mode="r+"), years
            )
        for name, layer in layers.items():
            target = store.open_with_checksums()
            array = zarr.open_array(target, path=f"{site_id}/{name}", mode="r+")
            for index, of_year in zip(years, layer.values, strict=True):
                array[index] = of_year
            note_labels(array, target, origin)


def _like(array: zarr.Array) -> dict[str, Any]:
    """Return the arguments for another array of the same layout."""
    names = array.metadata.dimension_names
    layout = {
        "shape": array.shape,
        "dtype": array.dtype,
        "chunks": array.chunks,
        "shards": array.shards,
    }
    return {
        **layout,
        "fill_value": array.fill_value,
        "dimension_names": names,
        "compressors": array.compressors,
    }


def _check_alignment(composite: xr.Dataset, arrays: Mapping[str, zarr.Array]) -> None:
    """Compare blocks with shards. Two writers to one shard would lose pixels without an error."""
    for name, array in arrays.items():
        data = composite[name]
        want = tuple(
            tuple(min(side, n - at) for at in range(0, n, side))
            for n, side in zip(array.shape, array.shards, strict=True)
        )
        if data.shape != array.shape[1:] or data.chunks != want[1:]:
            raise CubeError(
                f"{name}: blocks of {data.chunks} do not match shards of {array.shards[1:]} over {array.shape[1:]}; two blocks "
                "would write one shard and lose pixels, so composite with the recipe the cube was made by"
            )


def _blocks(array: zarr.Array) -> list[tuple[int, int]]:
    rows, columns = (
        -(-n // side) for n, side in zip(array.shape[-2:], array.shards[-2:], strict=True)
    )
    return [(r, c) for r in range(rows) for c in range(columns)]


def _compute_blocks(
    composite: xr.Dataset,
    arrays: Mapping[str, zarr.Array],
    blocks: Sequence[tuple[int, int]],
    how: Mapping[str, Any],
) -> dict[str, list[Any]]:
    """Compute blocks into staged arrays. Returns their shards' checksums as in `ChecksumStore.below`."""
    side = arrays["clear_count"].shards[-1]

    @dask.delayed(pure=False)  # type: ignore[untyped-decorator]
    def write(
        block: tuple[int, int], parts: Sequence[np.ndarray[Any, Any]]
    ) -> dict[str, list[Any]]:
        rows, columns = (slice(i * side, (i + 1) * side) for i in block)
        sums = {}
        for name, part in zip(arrays, parts, strict=True):
            array = arrays[name]
            array[(0, ..., rows, columns)] = part
            key = array.metadata.encode_chunk_key((0,) * (array.ndim - 2) + block)
            # The array may have the store of another process. An all-fill block is not stored.
            if (written := array.store.sums.get(f"{array.path}/{key}")) is not None:
                sums[f"{name}/{key}"] = written
        return sums

    # Optimising each layer alone would inline the block's task and compute it once per layer.
    chunks = {name: composite[name].data.to_delayed(optimize_graph=False) for name in arrays}
    tasks = []
    for r, c in blocks:
        parts = [chunks[n][r, c] if chunks[n].ndim == 2 else chunks[n][0, r, c] for n in arrays]
        tasks.append(write((r, c), parts))
    written: dict[str, list[Any]] = {}
    for sums in dask.compute(*tasks, **how):
        written |= sums
    return written
