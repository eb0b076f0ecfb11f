"""Write yearly masks of mines into a cube."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import odc.geo.xr  # noqa: F401  registers the .odc accessor
import xarray as xr
import zarr

from minecube.codes import UNKNOWN
from minecube.cube.checksums import ChecksumStore, seal
from minecube.cube.locks import WAIT_S, hold
from minecube.cube.store import Store
from minecube.cube.template import FRACTION, FRACTION_ATTRS, LABELLING, LABELS, grid_in, layout_of
from minecube.cube.write.staging import year_index
from minecube.errors import CubeError


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
    if fraction is None:
        fraction = xr.full_like(footprint, UNKNOWN)
    fraction = fraction.sel(year=footprint.year)
    with hold(store, site_id, wait_s=WAIT_S):
        group = store.open_site(site_id, mode="r+")
        if not footprint.odc.geobox == fraction.odc.geobox == grid_in(group.attrs):
            raise CubeError(
                f"{store}: footprints of {site_id} lie on another grid than its cube; rasterise "
                "them on the cube's grid"
            )
        if FRACTION not in group:  # a cube of a version without fractions
            like = group["footprint"]
            group.create_array(
                FRACTION,
                shape=like.shape,
                dimension_names=like.metadata.dimension_names,
                attributes={**FRACTION_ATTRS, "grid_mapping": "spatial_ref"},
                **layout_of(like),
            )
        years = {year_index(group, int(year)): int(year) for year in footprint.year.values}
        layers = {FRACTION: fraction, "footprint": footprint}
        for name in layers:
            array = zarr.open_array(store.open_zarr(), path=f"{site_id}/{name}", mode="r+")
            _begin_labels(array, years)
        for name, layer in layers.items():
            target = store.open_with_checksums()
            array = zarr.open_array(target, path=f"{site_id}/{name}", mode="r+")
            for index, mask in zip(years, layer.values, strict=True):
                array[index] = mask
            _note_labels(array, target, origin)


def _begin_labels(array: zarr.Array, years: Mapping[int, int]) -> None:
    """Note labels of these years (index -> year) as being written, and forget their checksums."""
    checksums = {
        key: checksum
        for key, checksum in array.attrs.get("checksums", {}).items()
        if int(key.split("/")[2]) not in years
    }
    notes = {
        "origin": array.attrs.get("origin", ""),
        "checksums": checksums,
        LABELLING: sorted(years.values()),
    }
    _put_notes(array, notes)


def _note_labels(array: zarr.Array, target: ChecksumStore, origin: str) -> None:
    """Note the origin of finished labels and the checksums of their shards."""
    site_id, _, _ = array.path.rpartition("/")
    sums = target.checksums_below(array.path, site_id)
    shards = {key: checksum for key, checksum in sums.items() if "/c/" in key}
    checksums = dict(sorted({**array.attrs["checksums"], **shards}.items()))
    _put_notes(array, {"origin": origin, "checksums": checksums, LABELLING: []})


def _put_notes(array: zarr.Array, notes: Mapping[str, Any]) -> None:
    """Write notes into an array's attributes, in one write: `update` would write one by one."""
    array.attrs.put({**array.attrs, **seal(notes)})


def need_labels(store: Store, site_id: str) -> None:
    """Raise CubeError if labels of the site are half written."""
    group = store.open_site(site_id)
    for name in LABELS:
        if name not in group:
            continue
        years = group[name].attrs.get(LABELLING)
        if years:
            raise CubeError(
                f"{store}: labels of {site_id} {years[0]} are being written, or a run was killed "
                "while it wrote them; wait, or run `minecube label` again"
            )
