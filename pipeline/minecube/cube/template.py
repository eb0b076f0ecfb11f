"""Make a site's group without pixels: variables, chunks, shards, coordinates and conventions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import dask.array
import numpy as np
import odc.geo.xr  # registers the .odc accessor
import xarray as xr
import zarr
from affine import Affine
from odc.geo.geobox import GeoBox
from zarr.codecs import BloscCodec, Crc32cCodec

from minecube.catalog import QUALITY, Recipe
from minecube.cube.checksums import ChecksumStore, sealed
from minecube.cube.store import NAMED, Store
from minecube.digests import sha256_of_json
from minecube.errors import CubeError

LABELLING = "labelling"
"""Attribute of label arrays: years being written, not to be read."""
WRITTEN_LATER = ("origin", "checksums", LABELLING, "sha256")
"""Attributes of arrays written with their pixels, not with the template."""
GEOZARR = (
    "zarr_conventions",
    "proj:code",
    "spatial:dimensions",
    "spatial:transform",
    "spatial:shape",
    "spatial:bbox",
)
"""Attributes of a site's group with its location."""

FRACTION = "footprint_fraction"
LABELS = ("footprint", FRACTION)
"""Variables for labels."""
FRACTION_ATTRS = {
    "long_name": "share of the pixel that is mine x 250",
    "units": "0.004",
    "nodata": 255,
}


def template(grid: GeoBox, years: Sequence[int], recipe: Recipe) -> xr.Dataset:
    """Make the site's lazy dataset without pixels: all fill value.

    Footprint and its fraction are 255 (unknown), integers 0 and floats NaN.
    """
    shape, block = (len(years), *grid.shape), (1, recipe.block_px, recipe.block_px)
    bands = len(recipe.bands)
    mapped = {"grid_mapping": "spatial_ref"}

    def empty(
        fill: float, dtype: str, attrs: dict[str, Any]
    ) -> tuple[tuple[str, ...], Any, dict[str, Any]]:
        return (
            ("year", "y", "x"),
            dask.array.full(shape, fill, dtype=dtype, chunks=block),
            {**attrs, **mapped},
        )

    reflectance = dask.array.zeros(
        (shape[0], bands, *shape[1:]), dtype="uint16", chunks=(1, bands, *block[1:])
    )
    described = {"long_name": "surface reflectance x 10000", "units": "1e-4", "nodata": 0, **mapped}
    flags = {
        "flag_values": list(range(len(QUALITY))),
        "flag_meanings": " ".join(m.replace(" ", "_") for m in QUALITY),
    }
    layers = {
        name: empty(
            fill_of(layer.dtype),
            layer.dtype,
            {
                "long_name": layer.long_name,
                "units": layer.units,
                **({"nodata": 0} | flags if name == "quality" else {}),
            },
        )
        for name, layer in recipe.layers.items()
    }
    coords = odc.geo.xr.xr_coords(grid)
    return xr.Dataset(
        {
            "reflectance": (("year", "band", "y", "x"), reflectance, described),
            **layers,
            "footprint": empty(
                255,
                "uint8",
                {
                    "long_name": "mine footprint: 1 mine, 0 not mine, 255 unknown",
                    "nodata": 255,
                    "flag_values": [0, 1],
                },
            ),
            FRACTION: empty(255, "uint8", FRACTION_ATTRS),
        },
        # object becomes Zarr v3's `string`; fixed-length text has no specification there
        coords={
            "year": np.asarray(years, dtype=np.int64),
            "band": np.asarray(recipe.bands, dtype=object),
            **coords,
        },
    )


def fill_of(dtype: Any) -> float:
    """Return the value of unobserved pixels: NaN for floats, 0 for integers."""
    return float("nan") if np.dtype(dtype).kind == "f" else 0


def encoding_of(variable: xr.DataArray, recipe: Recipe) -> dict[str, Any]:
    """Return a variable's chunks, shards and fill value. A shard is one block of all bands."""
    lead = variable.shape[1:-2]
    # Bitshuffle and LZ4 read numbers 1.5 times as fast as Zarr's default, in less space
    # (benchmarks/windows.py --table). Bitshuffle groups bits of equal place. LZ4 unpacks 3 GB/s.
    # Classes are small either way, but a window has many chunks: Zstandard takes 25 us each, LZ4 5.
    shuffle = "noshuffle" if variable.dtype.itemsize == 1 else "bitshuffle"
    fill = 255 if variable.name in ("footprint", FRACTION) else fill_of(variable.dtype)
    return {
        "chunks": (1, *lead, recipe.chunk_px, recipe.chunk_px),
        "shards": (1, *lead, recipe.block_px, recipe.block_px),
        "fill_value": fill,
        # LZ4 has no checksum. Without CRC-32C, a flipped bit would be read as pixels.
        "compressors": (BloscCodec(cname="lz4hc", clevel=5, shuffle=shuffle), Crc32cCodec()),
    }


def identity(metadata: Mapping[str, Any]) -> str:
    """Hash the constant part of an array's `zarr.json`: all but years and notes of labels."""
    attrs = {k: v for k, v in metadata.get("attributes", {}).items() if k not in WRITTEN_LATER}
    kept = {**metadata, "attributes": attrs}
    if "year" in (metadata.get("dimension_names") or ())[:1]:
        kept["shape"] = metadata.get("shape", ())[1:]
    return sha256_of_json(kept)[:16]


def identities(store: Store, site_id: str, group: zarr.Group) -> dict[str, str]:
    """Return the `identity` of each array of a group, by name."""
    stored = store.open_objects()
    names = sorted(name for name, _ in group.arrays())
    return {
        n: identity(json.loads(bytes(stored.get(f"{site_id}/{n}/zarr.json").bytes())))
        for n in names
    }


def group_digest(attrs: Mapping[str, Any]) -> str:
    """Hash the description of a site's group: identity, origin and location."""
    about = {k: v for k, v in attrs[NAMED].items() if k != "sha256"}
    return sha256_of_json({**{k: v for k, v in attrs.items() if k in GEOZARR}, NAMED: about})


def seal_group(group: zarr.Group) -> None:
    """Note the years with room in a site's group, and a hash of the group.

    Groups of older versions are left alone.
    """
    about = {**group.attrs[NAMED], "years": [int(y) for y in group["year"][:]]}
    about["sha256"] = group_digest({**group.attrs, NAMED: about})
    if "arrays" in about and about != group.attrs[NAMED]:
        group.attrs[NAMED] = about


def begin_labels(array: zarr.Array, years: Mapping[int, int]) -> None:
    """Note labels of these years (index -> year) as being written, and forget their checksums."""
    kept = {
        k: s
        for k, s in array.attrs.get("checksums", {}).items()
        if int(k.split("/")[2]) not in years
    }
    noted = {
        "origin": array.attrs.get("origin", ""),
        "checksums": kept,
        LABELLING: sorted(years.values()),
    }
    array.attrs.put({**array.attrs, **sealed(noted)})  # `update` would write one by one


def need_labels(store: Store, site_id: str) -> None:
    """Raise CubeError if labels of the site are half written."""
    group = store.open_site(site_id, "r")
    for name in LABELS:
        years = group[name].attrs.get(LABELLING) if name in group else None
        if years:
            raise CubeError(
                f"{store}: labels of {site_id} {years[0]} are being written, or a run was killed while it wrote them; wait, or "
                "run `minecube label` again"
            )


def note_labels(array: zarr.Array, target: ChecksumStore, origin: str) -> None:
    """Note the origin of finished labels and the checksums of their shards."""
    name = array.path.rpartition("/")[2]
    new = {
        k: s
        for k, s in target.checksums_below(array.path, array.path.removesuffix(f"/{name}")).items()
        if "/c/" in k
    }
    checksums = dict(sorted({**array.attrs["checksums"], **new}.items()))
    array.attrs.put(
        {**array.attrs, **sealed({"origin": origin, "checksums": checksums, LABELLING: []})}
    )


def geozarr(grid: GeoBox) -> dict[str, Any]:
    """Return group attributes of the GeoZarr conventions `proj:` and `spatial:`.

    Source: zarr-conventions/geo-proj and zarr-conventions/spatial, v1.
    """

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
                "geo-proj",
                "proj:",
                "f17cb550-5864-4468-aeb7-f3180cfb622f",
                "Coordinate reference system of the arrays",
            ),
            convention(
                "spatial",
                "spatial:",
                "689b58e2-cf7b-45e0-9fff-9cfc0883d6b4",
                "From array indices to coordinates",
            ),
        ],
        "proj:code": f"EPSG:{grid.crs.epsg}",
        "spatial:dimensions": ["y", "x"],
        "spatial:transform": list(grid.transform)[:6],
        "spatial:shape": list(grid.shape),
        "spatial:bbox": list(grid.boundingbox),
    }


def grid_in(attrs: Mapping[str, Any]) -> GeoBox:
    """Return the grid described by a group's attributes, as from `geozarr`."""
    height, width = attrs["spatial:shape"]
    return GeoBox((height, width), Affine(*attrs["spatial:transform"]), attrs["proj:code"])


def extend(group: zarr.Group, years: Sequence[int]) -> None:
    """Make room for later years at the end. Committed years keep their index."""
    # A run killed here may have left years of 0 at the end: room without a name.
    there = [int(y) for y in group["year"][:] if y > 0]
    new = sorted(set(years) - set(there))
    if not new and len(there) == len(group["year"][:]):
        return
    # The coordinate comes last. Until then, the added part of the arrays has no year.
    for name, array in sorted(group.arrays(), key=lambda named: named[0] == "year"):
        if name != "year" and array.ndim < 3:
            continue
        array.resize((len(there) + len(new), *array.shape[1:]))
    group["year"][len(there) :] = np.asarray(new, dtype=np.int64)
