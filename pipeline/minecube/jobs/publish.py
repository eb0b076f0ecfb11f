"""Save releases of a store in Icechunk: the job of `minecube publish`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import zarr

from minecube import cube, export
from minecube.errors import CubeError
from minecube.export import publish


@dataclass(frozen=True)
class Published:
    """Result of saving a release."""

    site_years: int
    changes: tuple[int, int] | None
    """Numbers of written and removed objects; None if the tag held the same state already."""


def publish_sites(
    store: cube.Store,
    sites: Sequence[str],
    selection: str,
    place: str,
    tag: str,
    progress: Callable[[int, int], None] = lambda _part, _total: None,
) -> Published:
    """Save the committed years of sites as a release in an Icechunk repository.

    The repository `place` is a folder, or s3://bucket/prefix. Tags are permanent. The text
    `selection` chose the sites, and is for errors. Calls `progress` with the number of compared
    objects, and of all objects.

    Raises:
        CubeError: no site has a committed year, or the tag holds another state.
    """
    builds = {site: list(cube.read_markers(store, site)) for site in sites}
    years = {site: committed for site, committed in builds.items() if committed}
    if not years:
        raise CubeError(
            f"{store}: no site-year of {selection!r} is committed, "
            "so there is nothing to publish; build first"
        )
    citations = {
        site: export.format_credits(export.list_credits(cube.open_committed(store, site)))
        for site in years
    }
    root = zarr.open_group(store.open_zarr(), mode="r", use_consolidated=False)
    changes = publish.publish_release(root, years, place, tag, citations, progress)
    return Published(site_years=sum(map(len, years.values())), changes=changes)
