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

from minecube.catalog import QUALITY, Recipe, rebuild_recipe
from minecube.codes import BACKGROUND, MINE, UNKNOWN
from minecube.cube.store import DESCRIPTION, Store
from minecube.digests import sha256_of_json

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
    "nodata": UNKNOWN,
}
_REFLECTANCE_ATTRS = {"long_name": "surface reflectance x 10000", "units": "1e-4", "nodata": 0}
_FOOTPRINT_ATTRS = {
    "long_name": "mine footprint: 1 mine, 0 not mine, 255 unknown",
    "nodata": UNKNOWN,
    "flag_values": [BACKGROUND, MINE],
}
_QUALITY_ATTRS = {
    "nodata": 0,
    "flag_values": list(range(len(QUALITY))),
    "flag_meanings": " ".join(meaning.replace(" ", "_") for meaning in QUALITY),
}
_MAPPED = {"grid_mapping": "spatial_ref"}
"""Attribute of every variable: the coordinate with the CRS."""


def make_template(grid: GeoBox, years: Sequence[int], recipe: Recipe) -> xr.Dataset:
    """Make the site's lazy dataset without pixels: all fill value.

    Footprint and its fraction are 255 (unknown), integers 0 and floats NaN.
    """
    shape = (len(years), *grid.shape)
    block = (1, recipe.block_px, recipe.block_px)

    def fill(dtype: str, value: float, attrs: Mapping[str, Any]) -> xr.Variable:
        """Make a variable of one value, [year, y, x]."""
        empty = dask.array.full(shape, value, dtype=dtype, chunks=block)
        return xr.Variable(("year", "y", "x"), empty, {**attrs, **_MAPPED})

    bands = len(recipe.bands)
    reflectance = dask.array.zeros(
        (shape[0], bands, *shape[1:]), dtype="uint16", chunks=(1, bands, *block[1:])
    )
    layers = {}
    for name, layer in recipe.layers.items():
        attrs: dict[str, Any] = {"long_name": layer.long_name, "units": layer.units}
        if name == "quality":
            attrs |= _QUALITY_ATTRS
        layers[name] = fill(layer.dtype, fill_of(layer.dtype), attrs)
    return xr.Dataset(
        {
            "reflectance": xr.Variable(
                ("year", "band", "y", "x"), reflectance, {**_REFLECTANCE_ATTRS, **_MAPPED}
            ),
            **layers,
            "footprint": fill("uint8", UNKNOWN, _FOOTPRINT_ATTRS),
            FRACTION: fill("uint8", UNKNOWN, FRACTION_ATTRS),
        },
        # object becomes Zarr v3's `string`; fixed-length text has no specification there
        coords={
            "year": np.asarray(years, dtype=np.int64),
            "band": np.asarray(recipe.bands, dtype=object),
            **odc.geo.xr.xr_coords(grid),
        },
    )


def fill_of(dtype: Any) -> float:
    """Return the value of unobserved pixels: NaN for floats, 0 for integers."""
    return float("nan") if np.dtype(dtype).kind == "f" else 0


def write_template(empty: xr.Dataset, target: Any, group: str, encoding: Mapping[str, Any]) -> None:
    """Write a dataset's metadata and coordinates, without pixels, into a group of a Zarr store."""
    empty.to_zarr(
        target,
        group=group,
        mode="a",
        compute=False,
        consolidated=False,
        zarr_format=3,
        encoding=encoding,
    )


def encoding_of(variable: xr.DataArray, recipe: Recipe) -> dict[str, Any]:
    """Return a variable's chunks, shards and fill value. A shard is one block of all bands."""
    lead = variable.shape[1:-2]
    # Bitshuffle and LZ4 read numbers 1.5 times as fast as Zarr's default, in less space
    # (benchmarks/windows.py --table). Bitshuffle groups bits of equal place. LZ4 unpacks 3 GB/s.
    # Classes are small either way, but a window has many chunks: Zstandard takes 25 us each, LZ4 5.
    shuffle = "noshuffle" if variable.dtype.itemsize == 1 else "bitshuffle"
    return {
        "chunks": (1, *lead, recipe.chunk_px, recipe.chunk_px),
        "shards": (1, *lead, recipe.block_px, recipe.block_px),
        "fill_value": UNKNOWN if variable.name in LABELS else fill_of(variable.dtype),
        # LZ4 has no checksum. Without CRC-32C, a flipped bit would be read as pixels.
        "compressors": (BloscCodec(cname="lz4hc", clevel=5, shuffle=shuffle), Crc32cCodec()),
    }


def layout_of(array: zarr.Array) -> dict[str, Any]:
    """Return type, chunks, shards, fill value and codecs of an array, to create another one."""
    names = ("dtype", "chunks", "shards", "fill_value", "compressors")
    return {name: getattr(array, name) for name in names}


def built_variables(group: zarr.Group) -> tuple[str, ...]:
    """Return the variables of a site that builds write."""
    return ("reflectance", *rebuild_recipe(group.attrs[DESCRIPTION]["recipe"]).layers)


def hash_array(metadata: Mapping[str, Any]) -> str:
    """Hash the constant part of an array's `zarr.json`: all but years and notes of labels."""
    attrs = {
        name: value
        for name, value in metadata.get("attributes", {}).items()
        if name not in WRITTEN_LATER
    }
    constant = {**metadata, "attributes": attrs}
    if "year" in (metadata.get("dimension_names") or ())[:1]:
        constant["shape"] = metadata.get("shape", ())[1:]
    return sha256_of_json(constant)[:16]


def hash_arrays(store: Store, site_id: str, group: zarr.Group) -> dict[str, str]:
    """Return the `hash_array` of each array of a group, by name."""
    objects = store.open_objects()
    hashes = {}
    for name in sorted(name for name, _ in group.arrays()):
        content = bytes(objects.get(f"{site_id}/{name}/zarr.json").bytes())
        hashes[name] = hash_array(json.loads(content))
    return hashes


def hash_group(attrs: Mapping[str, Any]) -> str:
    """Hash the description of a site's group: identity, origin and location."""
    location = {name: value for name, value in attrs.items() if name in GEOZARR}
    description = {name: value for name, value in attrs[DESCRIPTION].items() if name != "sha256"}
    return sha256_of_json({**location, DESCRIPTION: description})


def seal_group(group: zarr.Group) -> None:
    """Note the years with room in a site's group, and a hash of the group.

    Groups of older versions are left alone.
    """
    description = {**group.attrs[DESCRIPTION], "years": [int(year) for year in group["year"][:]]}
    description["sha256"] = hash_group({**group.attrs, DESCRIPTION: description})
    if "arrays" in description and description != group.attrs[DESCRIPTION]:
        group.attrs[DESCRIPTION] = description


def describe_location(grid: GeoBox) -> dict[str, Any]:
    """Return group attributes of the GeoZarr conventions `proj:` and `spatial:`.

    Source: zarr-conventions/geo-proj and zarr-conventions/spatial, v1.
    """
    return {
        "zarr_conventions": [
            _convention(
                "geo-proj",
                "proj:",
                "f17cb550-5864-4468-aeb7-f3180cfb622f",
                "Coordinate reference system of the arrays",
            ),
            _convention(
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


def _convention(repository: str, name: str, uuid: str, description: str) -> dict[str, str]:
    raw = f"https://raw.githubusercontent.com/zarr-conventions/{repository}"
    return {
        "schema_url": f"{raw}/refs/tags/v1/schema.json",
        "spec_url": f"https://github.com/zarr-conventions/{repository}/blob/v1/README.md",
        "uuid": uuid,
        "name": name,
        "description": description,
    }


def grid_in(attrs: Mapping[str, Any]) -> GeoBox:
    """Return the grid described by a group's attributes, as from `describe_location`."""
    height, width = attrs["spatial:shape"]
    return GeoBox((height, width), Affine(*attrs["spatial:transform"]), attrs["proj:code"])


def extend(group: zarr.Group, years: Sequence[int]) -> None:
    """Append missing years to the axis, also years before the stored ones.

    Committed years keep their index, because it is a part of the keys of their shards. The stored
    axis is therefore in no order; readers sort it.
    """
    # A run killed here may have left years of 0 at the end: room without a name.
    stored = [int(year) for year in group["year"][:] if year > 0]
    new = sorted(set(years) - set(stored))
    if not new and len(stored) == len(group["year"][:]):
        return
    # The coordinate comes last. Until then, the added part of the arrays has no year.
    for name, array in sorted(group.arrays(), key=lambda member: member[0] == "year"):
        if name == "year" or array.ndim >= 3:
            array.resize((len(stored) + len(new), *array.shape[1:]))
    coordinate = group["year"]
    # One at a time: a run killed in between leaves no unnamed year before a named one.
    for index, year in enumerate(new, start=len(stored)):
        coordinate[index] = year
