"""Create a site's group without pixels, or check an existing one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import zarr
from odc.geo.geobox import GeoBox

from minecube.catalog import Recipe, Site, as_dict
from minecube.cube.listing import attributes_in, read_object
from minecube.cube.locks import WAIT_S, hold
from minecube.cube.store import DESCRIPTION, FORMAT, UNFINISHED_FORMAT, Store, is_unfinished
from minecube.cube.template import (
    describe_location,
    encoding_of,
    extend,
    grid_in,
    hash_arrays,
    make_template,
    seal_group,
    write_template,
)
from minecube.errors import CubeError


def check_site(store: Store, site: Site, grid: GeoBox, recipe: Recipe) -> bool:
    """Check the site's group against grid and recipe. Returns whether the group exists.

    Raises:
        CubeError: the group was made with another recipe or on another grid, or lacks its metadata
            or an array.
    """
    group = store.find_group(site.id)
    if group is None and store.has_objects(site.id):
        raise CubeError(
            f"{store}: {site.id} has lost its zarr.json, but has other objects; run "
            "`minecube verify`"
        )
    if group is None or is_unfinished(group):
        return False
    store.check_format(site.id, group)
    description = group.attrs[DESCRIPTION]
    _check_description(store, site, grid, recipe, group.attrs)
    names = description.get("arrays", ())
    missing = [name for name in names if not store.has_object(f"{site.id}/{name}/zarr.json")]
    if missing:
        raise CubeError(f"{store}: {site.id} lacks its array {missing[0]!r}; run `minecube verify`")
    return True


def read_fitting_years(store: Store, site: Site, grid: GeoBox, recipe: Recipe) -> list[int] | None:
    """Check the site's group as `check_site`, but not its arrays: this takes one request.

    Returns the years of the group, which have pixels or room for them; None if there is no group.
    """
    if store.path is not None and not store.path.exists():
        return None
    content = read_object(store.open_objects(), f"{site.id}/zarr.json")
    attributes = attributes_in(content) or {}
    description = attributes.get(DESCRIPTION, {})
    if description.get("format") != FORMAT or "years" not in description:
        if not check_site(store, site, grid, recipe):
            return None
        return [int(year) for year in store.open_group(site.id)["year"][:]]
    _check_description(store, site, grid, recipe, attributes)
    return list(description["years"])


def _check_description(
    store: Store, site: Site, grid: GeoBox, recipe: Recipe, attributes: Mapping[str, Any]
) -> None:
    """Raise CubeError if a site's group was made with another recipe or on another grid."""
    description = attributes[DESCRIPTION]
    _check_recipe(store, site, description["recipe"], recipe)
    if grid_in(attributes) != grid:
        stored_margin = description.get("margin", 0)
        cause = "its polygon has changed"
        if stored_margin != site.margin:
            cause = f"its margin was {stored_margin:g} m and is now {site.margin:g} m"
        raise CubeError(
            f"{store}: {site.id} lies on another grid, because {cause}; use another store, or the "
            "earlier polygon and margin"
        )


def _check_recipe(store: Store, site: Site, stored: Mapping[str, Any], recipe: Recipe) -> None:
    """Raise CubeError if a site was made with another recipe than this one."""
    fields = as_dict(recipe)
    changed = [name for name in fields if name != "title" and stored.get(name) != fields[name]]
    if changed:
        raise CubeError(
            f"{store}: {site.id} was made with recipe {stored['id']!r}, which differs from "
            f"{recipe.id!r} in {', '.join(changed)}; use the same recipe, or another "
            "store; `minecube update` makes one next to it"
        )


def read_margin(store: Store, site_id: str) -> float | None:
    """Return the margin of the site's grid in metres; None if the store has no such site."""
    group = store.find_group(site_id)
    if group is None or is_unfinished(group):
        return None
    return float(store.open_site(site_id).attrs[DESCRIPTION].get("margin", 0))


def create_site(
    store: Store, site: Site, grid: GeoBox, years: Sequence[int], recipe: Recipe
) -> None:
    """Create the site's group for these years without pixels, or make room for missing years.

    Raises:
        BusyError: another run has held the group for minutes.
        CubeError: as `check_site`, or the store cannot be written.
    """
    with hold(store, site.id, wait_s=WAIT_S):
        if check_site(store, site, grid, recipe):
            group = store.open_site(site.id, mode="r+")
            extend(group, years)
        else:
            empty = make_template(grid, sorted(years), recipe)
            unfinished = {DESCRIPTION: {"format": UNFINISHED_FORMAT}}
            empty.attrs |= {**unfinished, **describe_location(grid)}
            store.begin_group(site.id, unfinished)
            layers = empty.data_vars.items()
            encoding = {str(name): encoding_of(layer, recipe) for name, layer in layers}
            write_template(empty, store.open_zarr(), site.id, encoding)
            group = store.open_group(site.id, "r+")
            group.attrs[DESCRIPTION] = _describe(store, site, recipe, group)
        seal_group(group)


def _describe(store: Store, site: Site, recipe: Recipe, group: zarr.Group) -> dict[str, Any]:
    """Return the attribute `DESCRIPTION` of a complete group."""
    description = {
        "format": FORMAT,
        "site": site.id,
        "recipe": as_dict(recipe),
        "arrays": hash_arrays(store, site.id, group),
    }
    if site.margin:  # 0 is not stored, as in older versions
        description["margin"] = site.margin
    if site.title:
        description["title"] = site.title
    return description
