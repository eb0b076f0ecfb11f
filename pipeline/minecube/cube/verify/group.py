"""Check a site's group: its description, its arrays' metadata, and its coordinates."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import xarray as xr
import zarr
from odc.geo.geobox import GeoBox

from minecube.catalog import Recipe, rebuild_recipe
from minecube.cube.listing import attributes_in, parse_json
from minecube.cube.store import DESCRIPTION, FORMAT, UNFINISHED_FORMAT
from minecube.cube.template import (
    FRACTION,
    describe_location,
    encoding_of,
    grid_in,
    hash_array,
    hash_group,
    make_template,
    write_template,
)
from minecube.cube.verify.findings import Finding
from minecube.cube.verify.state import SiteState
from minecube.errors import MinecubeError

_SETTLED = (
    "zarr_format",
    "node_type",
    "data_type",
    "dimension_names",
    "fill_value",
    "chunk_key_encoding",
)
"""Constant entries of an array's metadata."""


def check_group(site: SiteState) -> Iterator[Finding]:
    """Check a site's group and all its arrays except pixels."""
    _read_metadata(site)
    attrs = attributes_in(site.read("zarr.json")) or {}
    description = attrs.get(DESCRIPTION, {})
    if description == {"format": UNFINISHED_FORMAT}:
        yield site.find_unfinished("zarr.json", "the site's group was being created", "build")
        return
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        yield site.find(
            "damaged", "zarr.json", "is not the metadata of a site of this version", "site"
        )
        return
    try:
        recipe = rebuild_recipe(description["recipe"])
        grid = grid_in(attrs)
    except (MinecubeError, KeyError, ValueError, TypeError, RuntimeError) as error:
        yield site.find(
            "damaged", "zarr.json", f"recipe or place cannot be understood ({error})", "site"
        )
        return
    yield from _check_description(site, attrs, grid)
    site.built |= {"reflectance", *recipe.layers}
    yield from _check_years(site, description)
    yield from _check_arrays(
        site, make_template(grid, site.years or [2000], recipe), recipe, description
    )
    site.description = description
    site.grid = grid
    site.incomplete_reads = attrs.get("incomplete_reads", {})


def _read_metadata(site: SiteState) -> None:
    """Read the metadata of all arrays, and the years."""
    for path in sorted(site.files):
        name, _, file = path.partition("/")
        if file != "zarr.json" or name in ("builds", "predictions"):
            continue
        content = site.read(path)
        if isinstance(content, bytes):
            site.metadata[name] = content
    years = site.values_of("year")
    if years is not None:
        site.years = [int(year) for year in years]


def _check_description(
    site: SiteState, attrs: Mapping[str, Any], grid: GeoBox
) -> Iterator[Finding]:
    """Check recipe and location against their hash, and the location against the grid."""
    description = attrs[DESCRIPTION]
    is_sealed = bool({"sha256", "arrays", "years"} & set(description))
    if is_sealed and description.get("sha256") != hash_group(attrs):
        yield site.find(
            "damaged", "zarr.json", "recipe or place is not what the group was made with", "site"
        )
    elif description.get("site") != site.name:
        yield site.find("foreign", "zarr.json", f"is of site {description.get('site')!r}", "site")
    wrong = [
        name
        for name, value in describe_location(grid).items()
        if name.startswith(("proj:", "spatial:")) and attrs.get(name) != value
    ]
    if wrong:
        text = f"{', '.join(sorted(wrong))} are not those of the grid"
        yield site.find("contradictory", "zarr.json", text, "site")


def _check_years(site: SiteState, description: Mapping[str, Any]) -> Iterator[Finding]:
    """Check the values of the coordinate `year`."""
    years = site.years
    expected = description.get("years", years)
    # Room for another year has the name 0 until the year is written.
    named_years = years[: years.index(0)] if 0 in years else years
    is_growing = (
        years != expected
        and named_years[: len(expected)] == expected
        and not any(years[len(named_years) :])
    )
    if is_growing:
        yield site.find_unfinished("year", "room for another year was being made", "build")
    is_distinct = named_years and len(set(named_years)) == len(named_years)
    if not is_distinct or (years != expected and not is_growing):
        text = f"expected {description.get('years', 'each year once')}, found {years}"
        yield site.find("damaged", "year", text, "site")


def _check_arrays(
    site: SiteState, empty: xr.Dataset, recipe: Recipe, description: Mapping[str, Any]
) -> Iterator[Finding]:
    """Check each array's metadata, and the coordinates, against the template."""
    site.expected = _metadata_of(empty, recipe)
    identities = description.get("arrays", {})
    for name in sorted({*site.expected, *identities}):
        if name == FRACTION and name not in {*site.metadata, *identities}:
            continue  # a cube of a version without fractions: the next labelling adds one
        metadata = parse_json(site.metadata.get(name))
        if metadata is None:
            yield site.find(
                "damaged" if name in site.metadata else "missing",
                f"{name}/zarr.json",
                "without it no pixel of the variable can be read",
                "site",
            )
            continue
        keys = [*_SETTLED]
        if name in empty.data_vars:
            keys += ["chunk_grid", "shape"]
        expected = site.expected.get(name, metadata)
        wrong = [key for key in keys if metadata.get(key) != expected.get(key)]
        if wrong == ["shape"] and _has_more_years(metadata, expected):
            yield site.find_unfinished(
                f"{name}/zarr.json", "room for another year was being made", "build"
            )
        elif wrong:
            texts = [f"{key} {metadata.get(key)}, expected {expected.get(key)}" for key in wrong]
            yield site.find("damaged", f"{name}/zarr.json", "; ".join(texts), "site")
        elif name in identities and identities[name] != hash_array(metadata):
            yield site.find(
                "damaged", f"{name}/zarr.json", "is not what the group was made with", "site"
            )
    yield from _check_coordinates(site, empty)


def _metadata_of(empty: xr.Dataset, recipe: Recipe) -> dict[str, Any]:
    memory: dict[str, Any] = {}
    layers = empty.data_vars.items()
    encoding = {str(name): encoding_of(layer, recipe) for name, layer in layers}
    write_template(empty, zarr.storage.MemoryStore(memory), "", encoding)
    return {
        str(name): json.loads(memory[f"{name}/zarr.json"].to_bytes()) for name in empty.variables
    }


def _has_more_years(metadata: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    """Whether an array differs from the expected shape only by more years."""
    years, *shape = metadata["shape"]
    return bool(years > expected["shape"][0] and shape == list(expected["shape"][1:]))


def _check_coordinates(site: SiteState, empty: xr.Dataset) -> Iterator[Finding]:
    """Check the coordinates, except years, against those of the grid."""
    for name in map(str, empty.coords):
        if name == "year":
            continue
        expected = empty[name].to_numpy()
        values = site.values_of(name)
        if values is None:
            yield site.find("damaged", name, "coordinate: cannot be read", "site")
        elif values.shape != expected.shape or not (values == expected).all():
            yield site.find("damaged", name, "coordinate: values are not those of the grid", "site")
