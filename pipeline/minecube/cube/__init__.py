"""The Zarr store: one group per site, template first, then blocks that are whole shards, the commit marker last.

    cubes.zarr/
      Germany_1/                     one xarray dataset: reflectance, the recipe's layers, footprint, its fraction
        builds/2020/                 the commit marker of a site-year: its provenance as attributes, written last;
          scenes                     its scene list, the bytes of a stac-geoparquet file,
          reads                      and what became of every read, the bytes of a Parquet file
        predictions/unet-small-1a2b3c4d/   one xarray dataset a model: probability, or change

The marker also keeps the size and SHA-256 of every object of its site-year, taken as they were written; labels and
predictions keep theirs in their own attributes, and the site's group a hash of what it is. `verify` holds the store to them.

A site-year whose marker is missing is not there, whatever its pixels say. A run that was killed left blocks behind and a
note of what it was building and which are done; the same run goes on from there, another one starts afresh.

    store.py     opening stores and groups             template.py     a group before it has a pixel
    builds.py    provenance, markers, counts of reads  predictions.py  what models say of a site
    names.py     a prediction found by its name
    verify.py    what has become of what was written   windows.py      windows for training
    packed.py    a store in one zip, opened            pack.py         makes it
    pixels.py    arrays read quicker than by Zarr
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import dask
import numpy as np
import odc.geo.xr  # noqa: F401  registers the .odc accessor
import xarray as xr
import zarr
from odc.geo.geobox import GeoBox

from minecube.catalog import Recipe, Site, as_dict
from minecube.cube.builds import (
    Account,
    begin,
    build_id,
    builds,
    incomplete,
    is_committed,
    note_incomplete,
    provenance_of,
    put_bytes,
    reads,
    reads_so_far,
    run_of,
)
from minecube.cube.names import find_prediction
from minecube.cube.pack import Packing, pack
from minecube.cube.packed import is_packed, need_writable, unpacked
from minecube.cube.predictions import Prediction, mapped_by, open_change, open_probability, write_prediction, write_probability
from minecube.cube.store import (
    FORMAT,
    NAMED,
    exists,
    group_of,
    reading,
    sealed,
    site_group,
    sites,
    summing,
    writing,
    zarr_store,
)
from minecube.cube.template import (
    FRACTION,
    FRACTION_ATTRS,
    encoding_of,
    extend,
    geozarr,
    identities,
    note_labels,
    seal_group,
    template,
)
from minecube.cube.verify import Finding, Report, named_sites, uncommit, verify
from minecube.cube.windows import CubeDataset, Window, open_reflectance
from minecube.errors import CubeError, ReadError

__all__ = [
    "CubeDataset",
    "Finding",
    "Packing",
    "Prediction",
    "Report",
    "Window",
    "build_id",
    "builds",
    "check",
    "create",
    "find_prediction",
    "is_committed",
    "is_packed",
    "mapped_by",
    "named_sites",
    "need_writable",
    "note_incomplete",
    "open_change",
    "open_committed",
    "open_cube",
    "open_probability",
    "open_reflectance",
    "pack",
    "provenance_of",
    "reads",
    "reads_so_far",
    "sites",
    "uncommit",
    "unpacked",
    "verify",
    "write_footprint",
    "write_prediction",
    "write_probability",
    "write_year",
]

log = logging.getLogger(__name__)

_BEING_MADE = 0  # format of a group whose template is not whole yet; a run killed there begins anew


def check(store: str, site: Site, grid: GeoBox, years: Sequence[int], recipe: Recipe) -> bool:
    """Whether the site's group is there already, and fit for these years, this grid and this recipe; writes nothing.

    Raises:
        CubeError: the group was made by another recipe or on another grid, or a year would have to be put before existing ones.
    """
    if not exists(store, site.id) or group_of(store, site.id).attrs.get(NAMED) == {"format": _BEING_MADE}:
        return False
    made = site_group(store, site.id, mode="r").attrs[NAMED]["recipe"]
    asked = as_dict(recipe)
    changed = ", ".join(k for k in asked if k != "title" and made.get(k) != asked[k])
    if changed:
        raise CubeError(
            f"{store}: {site.id} was made by recipe {made['id']!r}, which differs from {recipe.id!r} in {changed}; years of "
            "two recipes in one cube cannot be compared, so use another --store or the same recipe"
        )
    cube = open_cube(store, site.id)
    if cube.odc.geobox != grid:
        raise CubeError(f"{store}: {site.id} lies on another grid; its polygon has changed, so use another --store")
    there = [int(y) for y in cube.year if y > 0]
    early = [y for y in years if y not in there and y < there[-1]]
    if early:
        raise CubeError(
            f"{store}: {site.id} holds {there[0]}..{there[-1]}; year {early[0]} would have to be put before existing years, so "
            "name all years at the first build, or use another --store"
        )
    return True


def create(store: str, site: Site, grid: GeoBox, years: Sequence[int], recipe: Recipe) -> None:
    """Make sure the site's group is there for these years: all metadata, no pixel. Existing years stay as they are.

    Raises:
        CubeError: as `check`, or the store cannot be written.
    """
    with writing(store):
        if check(store, site, grid, years, recipe):
            extend(group := site_group(store, site.id, mode="r+"), years)
            seal_group(group)
            return
        empty = template(grid, sorted(years), recipe)
        empty.attrs |= {NAMED: {"format": _BEING_MADE}, **geozarr(grid)}
        encoding = {str(n): encoding_of(v, recipe) for n, v in empty.data_vars.items()}
        target = zarr_store(store)
        empty.to_zarr(target, group=site.id, mode="w", compute=False, consolidated=False, zarr_format=3, encoding=encoding)
        group = zarr.open_group(target, path=site.id, mode="r+", use_consolidated=False)
        made = {"format": FORMAT, "site": site.id, "recipe": as_dict(recipe), "arrays": identities(store, site.id, group)}
        group.attrs[NAMED] = made
        seal_group(group)


def write_year(
    store: str,
    composite: xr.Dataset,
    provenance: Mapping[str, Any],
    scenes: bytes,
    *,
    reads: Account | None = None,
    completeness: float = 1.0,
    overwrite: bool = False,
    scheduler: str | None = None,
    workers: int = 4,
    stopped: Callable[[], bool] = lambda: False,
) -> bool:
    """Compute a year's composite block by block into its place and commit it; False if that very build is there already.

    Args:
        store: local path or object-store URL.
        composite: lazy Dataset of `reflectance` and the recipe's layers, its Dask chunks the cube's shards.
        provenance: what the build is made of (`provenance_of`): its site and year say where it goes, `build_id` names it.
        scenes: the scene list, as the bytes of a stac-geoparquet file.
        reads: counts of the reads that computing makes.
        completeness: share of the planned reads below which the year is not committed.
        overwrite: replace a committed year that was built from something else; the old one is gone when the new one begins.
        scheduler: which Dask scheduler computes the blocks, by its name; the one in force by default.
        workers: blocks computed at a time.
        stopped: asked between blocks; once true, the year is left as it is, to be resumed.

    Raises:
        CubeError: as `is_committed`; blocks and shards do not match, no pixel was observed, it was stopped, or the store cannot
            be written.
        ReadError: pixels could not be read, more than `completeness` allows; the year stays uncommitted.
    """
    if is_committed(store, provenance, overwrite=overwrite, completeness=completeness):
        return False
    site_id, year, build = provenance["site"], provenance["year"], build_id(provenance)
    group = site_group(store, site_id, mode="r+")
    names = [str(name) for name in composite.data_vars]
    index = _index(group, year)
    with writing(store):
        target = summing(store)
        arrays = {n: zarr.open_array(target, path=f"{site_id}/{n}") for n in names}
        _check_alignment(composite, arrays)
        marker = zarr.open_group(target, path=f"{site_id}/builds/{year}", mode="a", use_consolidated=False)
        # One that was begun before checksums were kept would end with too few of them.
        if marker.attrs.get("building") != (run := run_of(provenance)) or "checksums" not in marker.attrs:
            begin(marker, run)
        done, sums = list(marker.attrs["blocks"]), dict(marker.attrs["checksums"])
        blocks = _blocks(arrays["clear_count"])
        todo = [b for b in blocks if f"{b[0]}/{b[1]}" not in done]
        if len(todo) < len(blocks):
            log.info("%s %s: going on with block %d of %d", site_id, year, len(blocks) - len(todo) + 1, len(blocks))
        for at in range(0, len(todo), workers):
            if stopped():
                left = f"{len(todo) - at} of {len(blocks)} blocks to go"
                raise CubeError(f"{site_id} {year}: stopped with {left}; the same build goes on there")
            batch = todo[at : at + workers]
            sums |= _compute_blocks(composite, arrays, index, batch, {"scheduler": scheduler, "num_workers": workers})
            # Pixels, then the counts of their reads, then that they are done: a run killed in between does them again, and so
            # counts some reads twice, but no block is ever taken for done of which a lost read was not counted.
            if reads:
                put_bytes(marker, "reads", reads.to_parquet())
            done += [f"{row}/{column}" for row, column in batch]
            marker.attrs.update({"blocks": done, "checksums": sums})
        counts = dict(reads.totals()) if reads else {}
        seen = bool(arrays["quality"][index].any())
        if counts.get("completeness", 1.0) < completeness or (counts.get("lost") and not seen):
            marker.attrs.clear()  # so that the next run reads again what was lost
            raise ReadError(incomplete(site_id, year, counts, reads, completeness))
        if not seen:
            raise CubeError(
                f"{site_id} {year}: no scene has a pixel here, so nothing is committed; check polygon and scene list"
            )
        put_bytes(marker, "scenes", scenes)
        if reads:
            put_bytes(marker, "reads", reads.to_parquet())
        sums |= {name: s for name, s in target.below(marker.path, site_id).items() if not name.endswith(f"{year}/zarr.json")}
        made = {**provenance, "build_id": build, "committed": datetime.now(tz=UTC).isoformat(timespec="seconds")}
        if counts:
            made["reads"] = counts
            note_incomplete(store, site_id, {str(year): counts["completeness"]})
        made["checksums"] = sums
        marker.attrs.put(sealed(made))  # the commit: one object, replaced as a whole
    return True


def open_cube(store: str, site_id: str) -> xr.Dataset:
    """A site's cube, lazy, as `xarray.open_zarr` gives it: see the module for variables, `design` section 4 for meanings.

    Raises:
        CubeError: no such site, or a store that is not ours.
    """
    site_group(store, site_id, mode="r")
    with reading(store, site_id):
        opened: xr.Dataset = xr.open_zarr(zarr_store(store), group=site_id, consolidated=False)
        opened["year"].load()
    return opened


def open_committed(store: str, site_id: str) -> xr.Dataset:
    """The same, committed years only: what is to be learnt from, mapped or exported.

    Raises:
        CubeError: no such site, no committed year, or a store that is not ours.
    """
    years = list(builds(store, site_id))
    cube = open_cube(store, site_id)
    if not years:
        raise CubeError(f"{store}: {site_id} has no committed year; run `minecube build` until it says built")
    return cube.sel(year=years)


def write_footprint(
    store: str, site_id: str, footprint: xr.DataArray, origin: str, fraction: xr.DataArray | None = None
) -> None:
    """Put yearly masks (uint8 [year, y, x]: 1 mine, 0 not, 255 unknown) in their years' places; `origin` says whence.

    `fraction` is the share of each pixel that is mine (uint8 [year, y, x] x 250, 255 unknown) in the same years; without it
    those years' fraction is unknown again, so that it never is of another footprint.

    Raises:
        CubeError: they lie on another grid or in years the cube has not, or the store cannot be written.
    """
    cube = open_cube(store, site_id)
    fraction = xr.full_like(footprint, 255) if fraction is None else fraction.sel(year=footprint.year)
    if not footprint.odc.geobox == fraction.odc.geobox == cube.odc.geobox:
        raise CubeError(
            f"{store}: footprints of {site_id} lie on another grid than its cube; rasterise them on the cube's grid"
        )
    with writing(store):
        group = site_group(store, site_id, mode="r+")
        if FRACTION not in group:  # a cube made before there were fractions
            attrs = {**FRACTION_ATTRS, "grid_mapping": "spatial_ref"}
            zarr.create_array(zarr_store(store), name=f"{site_id}/{FRACTION}", **_like(group["footprint"]), attributes=attrs)
        at = [_index(group, int(year)) for year in footprint.year.values]
        # Killed in between, no fraction is left that is of another footprint.
        unknown = xr.full_like(footprint, 255)
        for name, layer in ((FRACTION, unknown), ("footprint", footprint), (FRACTION, fraction)):
            array = zarr.open_array(target := summing(store), path=f"{site_id}/{name}", mode="r+")
            for index, of_year in zip(at, layer.values, strict=True):
                array[index] = of_year
            note_labels(array, target, at, origin)


def _like(array: zarr.Array) -> dict[str, Any]:
    """What makes another array of the same layout."""
    names = array.metadata.dimension_names
    layout = {"shape": array.shape, "dtype": array.dtype, "chunks": array.chunks, "shards": array.shards}
    return {**layout, "fill_value": array.fill_value, "dimension_names": names, "compressors": array.compressors}


def _index(group: zarr.Group, year: int) -> int:
    there = [int(y) for y in group["year"][:]]
    if year not in there:
        raise CubeError(f"year {year} is not in the cube, which has {there[0]}..{there[-1]}; build it first")
    return there.index(year)


def _check_alignment(composite: xr.Dataset, arrays: Mapping[str, zarr.Array]) -> None:
    """Blocks must be shards: two writers in one shard lose one's pixels without an error."""
    for name, array in arrays.items():
        data = composite[name]
        want = tuple(
            tuple(min(side, n - at) for at in range(0, n, side)) for n, side in zip(array.shape, array.shards, strict=True)
        )
        if data.shape != array.shape[1:] or data.chunks != want[1:]:
            raise CubeError(
                f"{name}: blocks of {data.chunks} do not match shards of {array.shards[1:]} over {array.shape[1:]}; two blocks "
                "would write one shard and lose pixels, so composite with the recipe the cube was made by"
            )


def _blocks(array: zarr.Array) -> list[tuple[int, int]]:
    rows, columns = (-(-n // side) for n, side in zip(array.shape[-2:], array.shards[-2:], strict=True))
    return [(r, c) for r in range(rows) for c in range(columns)]


def _compute_blocks(
    composite: xr.Dataset,
    arrays: Mapping[str, zarr.Array],
    index: int,
    blocks: Sequence[tuple[int, int]],
    how: Mapping[str, Any],
) -> dict[str, list[Any]]:
    """Write blocks; the checksums of their shards, as `Summing.below` has them."""
    side = arrays["clear_count"].shards[-1]

    @dask.delayed(pure=False)  # type: ignore[untyped-decorator]
    def write(block: tuple[int, int], parts: Sequence[np.ndarray[Any, Any]]) -> dict[str, list[Any]]:
        rows, columns = (slice(i * side, (i + 1) * side) for i in block)
        sums = {}
        for name, (array, part) in zip(arrays, zip(arrays.values(), parts, strict=True), strict=True):
            array[(index, ..., rows, columns)] = part
            key = array.metadata.encode_chunk_key((index, *(0,) * (array.ndim - 3), *block))
            # The array's own store, which may be another process's; a block of nothing but fill value is no object.
            if (written := array.store.sums.get(f"{array.path}/{key}")) is not None:
                sums[f"{name}/{key}"] = written
        return sums

    # Not optimised one by one: each would inline the task that makes the block, which would be made once a layer.
    chunks = {name: composite[name].data.to_delayed(optimize_graph=False) for name in arrays}
    tasks = []
    for r, c in blocks:
        parts = [chunks[n][r, c] if chunks[n].ndim == 2 else chunks[n][0, r, c] for n in arrays]
        tasks.append(write((r, c), parts))
    written: dict[str, list[Any]] = {}
    for sums in dask.compute(*tasks, **how):
        written |= sums
    return written
