"""The Zarr store: one group per site, template first, then blocks that are whole shards, the commit marker last.

    cubes.zarr/
      Germany_1/                     one xarray dataset: reflectance, clear_count, quality, footprint
        builds/2020/                 the commit marker of a site-year: its provenance as attributes, written last;
          scenes                     its scene list, the bytes of a stac-geoparquet file,
          reads                      and what became of every read, the bytes of a Parquet file
        predictions/unet-small/      one xarray dataset a model: probability

A site-year whose marker is missing is not there, whatever its pixels say. A run that was killed left blocks behind and a
note of what it was building and which are done; the same run goes on from there, another one starts afresh.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import dask
import numpy as np
import odc.geo.xr  # registers the .odc accessor
import pandas as pd
import xarray as xr
import zarr
import zarr.errors
from obstore.store import from_url
from odc.geo.geobox import GeoBox

from minecube.catalog import Recipe, Site, as_dict
from minecube.errors import CubeError, ReadError

log = logging.getLogger(__name__)

FORMAT = 1
"""Version of the layout above; a store of another one is refused."""
_NAMED = "minecube"
_BEING_MADE = 0  # format of a group whose template is not whole yet; a run killed there begins anew
_LIBRARIES = ("minecube", "numpy", "dask", "rasterio", "stackstac", "zarr")


def check(store: str, site: Site, grid: GeoBox, years: Sequence[int], recipe: Recipe) -> bool:
    """Whether the site's group is there already, and fit for these years, this grid and this recipe; writes nothing.

    Raises:
        CubeError: the group was made by another recipe or on another grid, or a year would have to be put before existing ones.
    """
    if not _exists(store, site.id) or _group(store, site.id).attrs.get(_NAMED) == {"format": _BEING_MADE}:
        return False
    made = _site_group(store, site.id, mode="r").attrs[_NAMED]["recipe"]
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
    with _writing(store):
        if check(store, site, grid, years, recipe):
            _extend(_site_group(store, site.id, mode="r+"), years)
            return
        template = _template(grid, sorted(years), recipe)
        template.attrs |= {_NAMED: {"format": _BEING_MADE}, **_geozarr(grid)}
        encoding = {str(n): _encoding(v, recipe) for n, v in template.data_vars.items()}
        target = _zarr_store(store)
        template.to_zarr(target, group=site.id, mode="w", compute=False, consolidated=False, zarr_format=3, encoding=encoding)
        made = {"format": FORMAT, "site": site.id, "recipe": as_dict(recipe)}
        zarr.open_group(target, path=site.id, mode="r+", use_consolidated=False).attrs[_NAMED] = made


class Account(Protocol):
    """Counts of the reads behind a composite, complete once it has been computed (`reader.Ledger`)."""

    def totals(self) -> Mapping[str, float]:
        """planned, lost, completeness and others."""

    def lost(self) -> Sequence[str]:
        """A line for each lost read."""

    def to_parquet(self) -> bytes:
        """All counts, as the bytes of a Parquet file."""


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
        composite: lazy Dataset of `reflectance`, `clear_count`, `quality`, its Dask chunks the cube's shards.
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
    group = _site_group(store, site_id, mode="r+")
    names = ("reflectance", "quality", "clear_count")
    index = _index(group, year)
    with _writing(store):
        arrays = {n: zarr.open_array(_zarr_store(store), path=f"{site_id}/{n}") for n in names}
        _check_alignment(composite, arrays)
        marker = zarr.open_group(_zarr_store(store), path=f"{site_id}/builds/{year}", mode="a", use_consolidated=False)
        if marker.attrs.get("building") != (run := _run_of(provenance)):
            _begin(marker, run)
        done = list(marker.attrs["blocks"])
        blocks = _blocks(arrays["clear_count"])
        todo = [b for b in blocks if f"{b[0]}/{b[1]}" not in done]
        if len(todo) < len(blocks):
            log.info("%s %s: going on with block %d of %d", site_id, year, len(blocks) - len(todo) + 1, len(blocks))
        for at in range(0, len(todo), workers):
            if stopped():
                left = f"{len(todo) - at} of {len(blocks)} blocks to go"
                raise CubeError(f"{site_id} {year}: stopped with {left}; the same build goes on there")
            batch = todo[at : at + workers]
            _compute_blocks(composite, arrays, index, batch, {"scheduler": scheduler, "num_workers": workers})
            # Pixels, then the counts of their reads, then that they are done: a run killed in between does them again, and so
            # counts some reads twice, but no block is ever taken for done of which a lost read was not counted.
            if reads:
                _put_bytes(marker, "reads", reads.to_parquet())
            done += [f"{row}/{column}" for row, column in batch]
            marker.attrs["blocks"] = done
        counts = dict(reads.totals()) if reads else {}
        seen = bool(arrays["quality"][index].any())
        if counts.get("completeness", 1.0) < completeness or (counts.get("lost") and not seen):
            marker.attrs.clear()  # so that the next run reads again what was lost
            raise ReadError(_incomplete(site_id, year, counts, reads, completeness))
        if not seen:
            raise CubeError(
                f"{site_id} {year}: no scene has a pixel here, so nothing is committed; check polygon and scene list"
            )
        _put_bytes(marker, "scenes", scenes)
        made = {**provenance, "build_id": build, "committed": datetime.now(tz=UTC).isoformat(timespec="seconds")}
        if counts:
            made["reads"] = counts
            note_incomplete(store, site_id, {str(year): counts["completeness"]})
        marker.attrs.put(made)  # the commit: one object, replaced as a whole
    return True


def reads_so_far(store: str, provenance: Mapping[str, Any]) -> bytes | None:
    """The counts of a run of that very build that was interrupted, as `write_year` was given them; None where there is none."""
    path = f"{provenance['site']}/builds/{provenance['year']}"
    if not _exists(store, path):
        return None
    marker = _group(store, path)
    there = marker.attrs.get("building") == _run_of(provenance) and "reads" in marker
    return bytes(marker["reads"][:]) if there else None


def reads(store: str, site_id: str, year: int) -> pd.DataFrame:
    """What became of every read of a committed site-year: one row a scene and band, columns as in `reader.ledger.COUNTS`.

    Raises:
        CubeError: the year is not committed, or its reads were not counted.
    """
    if year not in builds(store, site_id) or "reads" not in (marker := _group(store, f"{site_id}/builds/{year}")):
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
        group = _site_group(store, site_id, mode="r+")
        if noted != group.attrs.get("incomplete_reads", {}):
            group.attrs["incomplete_reads"] = noted


def _run_of(provenance: Mapping[str, Any]) -> str:
    """What blocks of one year must have in common: the build, and what became of scenes whose offsets are in conflict."""
    resolved = [provenance.get(name) for name in ("on_offset_conflict", "offset_conflicts")]
    return hashlib.sha256(json.dumps([build_id(provenance), resolved], sort_keys=True).encode()).hexdigest()[:16]


def _begin(marker: zarr.Group, run: str) -> None:
    """Forget what another run left of the year, its commit first."""
    marker.attrs.clear()
    if "reads" in marker:
        del marker["reads"]
    marker.attrs.put({"building": run, "blocks": []})


def _put_bytes(group: zarr.Group, name: str, content: bytes) -> None:
    group.create_array(name, data=np.frombuffer(content, dtype=np.uint8), overwrite=True)


def _incomplete(site_id: str, year: int, counts: Mapping[str, float], reads: Account | None, completeness: float) -> str:
    first = next(iter(reads.lost()), "") if reads else ""
    why = f"which leaves {counts['completeness']:.2%} where --min-read-completeness asks for {completeness:.2%}"
    why = why if counts["completeness"] < completeness else "which leaves no pixel"
    lost = f"{counts['lost']} of {counts['planned']} reads were lost"
    return f"{site_id} {year}: {lost}, {why}, so it is not committed; first {first}"


def build_id(provenance: Mapping[str, Any]) -> str:
    """The name of a build: a hash of its site, year, recipe, scenes and code version; 16 hexadecimal digits."""
    made_of = {k: provenance[k] for k in ("site", "year", "grid", "scenes", "version")}
    made_of["recipe"] = {k: v for k, v in provenance["recipe"].items() if k != "title"}
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]


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


def builds(store: str, site_id: str) -> dict[int, dict[str, Any]]:
    """Provenance of the committed years of a site; empty where there is none."""
    if not _exists(store, f"{site_id}/builds"):
        return {}
    group = zarr.open_group(_zarr_store(store), path=f"{site_id}/builds", mode="r", use_consolidated=False)
    found = {int(name): dict(marker.attrs) for name, marker in group.groups()}
    return {year: attrs for year, attrs in sorted(found.items()) if "build_id" in attrs}


def sites(store: str) -> list[str]:
    """Names of the sites in a store; raises CubeError where there is no store of ours."""
    if not _exists(store, ""):
        raise CubeError(f"{store}: there is no store; `minecube build` makes one")
    root = zarr.open_group(_zarr_store(store), mode="r", use_consolidated=False)
    return sorted(name for name, group in root.groups() if _NAMED in group.attrs)


def open_cube(store: str, site_id: str) -> xr.Dataset:
    """A site's cube, lazy, as `xarray.open_zarr` gives it: see the module for variables, `design` section 4 for meanings.

    Raises:
        CubeError: no such site, or a store that is not ours.
    """
    _site_group(store, site_id, mode="r")
    with _reading(store, site_id):
        opened: xr.Dataset = xr.open_zarr(_zarr_store(store), group=site_id, consolidated=False)
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


def write_footprint(store: str, site_id: str, footprint: xr.DataArray, origin: str) -> None:
    """Put yearly masks (uint8 [year, y, x]: 1 mine, 0 not, 255 unknown) in their years' places; `origin` says whence.

    Raises:
        CubeError: the masks lie on another grid or in years the cube has not, or the store cannot be written.
    """
    cube = open_cube(store, site_id)
    if footprint.odc.geobox != cube.odc.geobox:
        raise CubeError(
            f"{store}: footprints of {site_id} lie on another grid than its cube; rasterise them on the cube's grid"
        )
    with _writing(store):
        group = _site_group(store, site_id, mode="r+")
        array = zarr.open_array(_zarr_store(store), path=f"{site_id}/footprint", mode="r+")
        for year in footprint.year.values:
            array[_index(group, int(year))] = footprint.sel(year=year).values
        array.attrs["origin"] = origin


def write_probability(store: str, site_id: str, model: str, probability: xr.DataArray, card: Mapping[str, Any]) -> None:
    """Put a model's mine probability (uint8 [year, y, x], x 250, 255 = none) into its own group, replacing an older run's.

    Raises:
        CubeError: the probability lies on another grid than the cube, or the store cannot be written.
    """
    cube = open_cube(store, site_id)
    if probability.odc.geobox != cube.odc.geobox:
        raise CubeError(
            f"{store}: the prediction for {site_id} lies on another grid than its cube; predict from the cube itself"
        )
    recipe = _site_group(store, site_id, mode="r").attrs[_NAMED]["recipe"]
    side, chunk = recipe["block_px"], recipe["chunk_px"]
    mapped_from = {str(year): attrs["build_id"] for year, attrs in builds(store, site_id).items()}
    attrs = {"long_name": "mine probability x 250", "nodata": 255, "grid_mapping": "spatial_ref"}
    attrs |= {"model": dict(card), "builds": mapped_from}
    named = probability.rename("probability").drop_attrs().assign_attrs(attrs).to_dataset()
    named.attrs = _geozarr(cube.odc.geobox)
    encoding = {"probability": {"chunks": (1, chunk, chunk), "shards": (1, side, side), "fill_value": 255}}
    with _writing(store):
        named.chunk({"year": 1, "y": side, "x": side}).to_zarr(
            _zarr_store(store),
            group=f"{site_id}/predictions/{model}",
            mode="w",
            consolidated=False,
            zarr_format=3,
            encoding=encoding,
        )


def open_probability(store: str, site_id: str, model: str) -> xr.DataArray:
    """A model's probability over a site, lazy uint8 [year, y, x].

    Raises:
        CubeError: that model did not run there, or ran on other builds than the cube now holds.
    """
    if not _exists(store, f"{site_id}/predictions/{model}"):
        raise CubeError(f"{store}: no prediction of {model!r} for {site_id}; run `minecube predict` first")
    opened: xr.Dataset = xr.open_zarr(_zarr_store(store), group=f"{site_id}/predictions/{model}", consolidated=False)
    probability = opened["probability"]
    now = {str(year): attrs["build_id"] for year, attrs in builds(store, site_id).items()}
    changed = sorted(set(now.items()) ^ set(probability.attrs["builds"].items()))
    if changed:
        raise CubeError(
            f"{store}: {model!r} mapped {site_id} before {changed[0][0]} was built as it is now; run `minecube predict` again"
        )
    return probability


def _template(grid: GeoBox, years: Sequence[int], recipe: Recipe) -> xr.Dataset:
    shape, block = (len(years), *grid.shape), (1, recipe.block_px, recipe.block_px)
    bands = len(recipe.bands)
    mapped = {"grid_mapping": "spatial_ref"}

    def empty(fill: int, dtype: str, attrs: dict[str, Any]) -> tuple[tuple[str, ...], Any, dict[str, Any]]:
        return ("year", "y", "x"), dask.array.full(shape, fill, dtype=dtype, chunks=block), {**attrs, **mapped}

    reflectance = dask.array.zeros((shape[0], bands, *shape[1:]), dtype="uint16", chunks=(1, bands, *block[1:]))
    described = {"long_name": "surface reflectance x 10000", "units": "1e-4", "nodata": 0, **mapped}
    quality = {"long_name": "how a pixel came about", "nodata": 0, "flag_values": [0, 1, 2, 3, 4]}
    meanings = "no_observation clear clear_before_mask_was_grown thin_cloud_or_shadow cloud_in_every_observation"
    coords = odc.geo.xr.xr_coords(grid)
    return xr.Dataset(
        {
            "reflectance": (("year", "band", "y", "x"), reflectance, described),
            "clear_count": empty(0, "uint16", {"long_name": "clear observations behind each pixel", "units": "1"}),
            "quality": empty(0, "uint8", {**quality, "flag_meanings": meanings}),
            "footprint": empty(
                255,
                "uint8",
                {"long_name": "mine footprint: 1 mine, 0 not mine, 255 unknown", "nodata": 255, "flag_values": [0, 1]},
            ),
        },
        # object, so that it becomes Zarr v3's `string`; fixed-length text has no specification there
        coords={"year": np.asarray(years, dtype=np.int64), "band": np.asarray(recipe.bands, dtype=object), **coords},
    )


def _encoding(variable: xr.DataArray, recipe: Recipe) -> dict[str, Any]:
    lead = variable.shape[1:-2]
    fill = 255 if variable.name == "footprint" else 0
    return {
        "chunks": (1, *lead, recipe.chunk_px, recipe.chunk_px),
        "shards": (1, *lead, recipe.block_px, recipe.block_px),
        "fill_value": fill,
    }


def _geozarr(grid: GeoBox) -> dict[str, Any]:
    """Group attributes of the GeoZarr conventions `proj:` and `spatial:` (zarr-conventions/geo-proj and /spatial, v1)."""

    def convention(repository: str, name: str, uuid: str, about: str) -> dict[str, str]:
        return {
            "schema_url": f"https://raw.githubusercontent.com/zarr-conventions/{repository}/refs/tags/v1/schema.json",
            "spec_url": f"https://github.com/zarr-conventions/{repository}/blob/v1/README.md",
            "uuid": uuid,
            "name": name,
            "description": about,
        }

    return {
        "zarr_conventions": [
            convention(
                "geo-proj", "proj:", "f17cb550-5864-4468-aeb7-f3180cfb622f", "Coordinate reference system of the arrays"
            ),
            convention("spatial", "spatial:", "689b58e2-cf7b-45e0-9fff-9cfc0883d6b4", "From array indices to coordinates"),
        ],
        "proj:code": f"EPSG:{grid.crs.epsg}",
        "spatial:dimensions": ["y", "x"],
        "spatial:transform": list(grid.transform)[:6],
        "spatial:shape": list(grid.shape),
        "spatial:bbox": list(grid.boundingbox),
    }


def _extend(group: zarr.Group, years: Sequence[int]) -> None:
    """Room for later years at the end, where it shifts no committed year."""
    # A run killed here may have left years of 0 at the end: room that has no name yet.
    there = [int(y) for y in group["year"][:] if y > 0]
    new = sorted(set(years) - set(there))
    if not new and len(there) == len(group["year"][:]):
        return
    # The coordinate last: until it has grown, the longer arrays end in years that nobody can name.
    for name in ("reflectance", "clear_count", "quality", "footprint", "year"):
        array = group[name]
        array.resize((len(there) + len(new), *array.shape[1:]))
    group["year"][len(there) :] = np.asarray(new, dtype=np.int64)


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
) -> None:
    side = arrays["clear_count"].shards[-1]

    @dask.delayed(pure=False)  # type: ignore[untyped-decorator]
    def write(block: tuple[int, int], parts: Sequence[np.ndarray[Any, Any]]) -> None:
        rows, columns = (slice(i * side, (i + 1) * side) for i in block)
        for array, part in zip(arrays.values(), parts, strict=True):
            array[(index, ..., rows, columns)] = part

    # Not optimised one by one: each would inline the task that makes the block, and the block would be made three times.
    chunks = {name: composite[name].data.to_delayed(optimize_graph=False) for name in arrays}
    tasks = []
    for r, c in blocks:
        parts = [chunks[n][r, c] if chunks[n].ndim == 2 else chunks[n][0, r, c] for n in arrays]
        tasks.append(write((r, c), parts))
    dask.compute(*tasks, **how)


def _zarr_store(store: str) -> Any:
    return zarr.storage.ObjectStore(from_url(store)) if "://" in store else store


def _exists(store: str, path: str) -> bool:
    if "://" not in store and not Path(store).exists():
        return False
    if Path(store).is_file():
        raise CubeError(f"{store}: is a file; a store is a folder, or the URL of one")
    try:
        _group(store, path)
    except (FileNotFoundError, zarr.errors.GroupNotFoundError):
        return False
    return True


def _group(store: str, path: str, mode: str = "r") -> zarr.Group:
    with _reading(store, path):
        return zarr.open_group(_zarr_store(store), path=path, mode=mode, use_consolidated=False)


@contextmanager
def _reading(store: str, path: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, zarr.errors.GroupNotFoundError):
        raise
    except (OSError, ValueError, KeyError) as error:
        raise CubeError(
            f"{store}: {path or 'the store'} cannot be read ({type(error).__name__}: {error}); it is damaged or not ours, so "
            "remove that site's folder and build it again, or use another --store"
        ) from error


def _site_group(store: str, site_id: str, mode: str) -> zarr.Group:
    if not _exists(store, site_id):
        there = ", ".join(sites(store)) or "no site"
        raise CubeError(f"{store}: no site {site_id!r}; it has {there}")
    group = _group(store, site_id, mode)
    known = group.attrs.get(_NAMED, {})
    if known.get("format") != FORMAT:
        raise CubeError(f"{store}: group {site_id!r} was not made by this version of minecube; use another --store")
    return group


@contextmanager
def _writing(store: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CubeError(
            f"{store}: cannot be written ({error.strerror or error}); committed site-years are unharmed; make room or "
            "choose another --store, then run the same command again"
        ) from error
