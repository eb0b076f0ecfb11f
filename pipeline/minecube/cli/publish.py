"""Subcommand that keeps releases of a store in Icechunk: publish."""

from __future__ import annotations

import click
import zarr

from minecube import cube, export
from minecube.cli.common import SiteChoice, sites_option, store_option, stored_sites, table
from minecube.cube.store import zarr_store
from minecube.errors import CubeError
from minecube.export import publish as releasing


@click.command()
@store_option
@sites_option
@click.option("--icechunk", "place", required=True, help="The repository: a folder, or s3://bucket/prefix.")
@click.option("--tag", help="Publish the store as it is now under this name. A tag never moves.")
@click.option("--diff", nargs=2, metavar="OLD NEW", help="Say in which site-years and variables two tags differ.")
@click.option("--rollback", metavar="TAG", help="Take `main` back to that tag; later tags stay.")
def publish(
    store: str, wanted: SiteChoice, place: str, tag: str | None, diff: tuple[str, str] | None, rollback: str | None
) -> None:
    """Keep a store's committed site-years in Icechunk, a tag a release; without --tag, list the releases.

    A release holds the sites that are named, all by default, and no other: what an earlier one had beside them stays in that.

    \b
    Examples:
      minecube publish --store cubes.zarr --icechunk releases --tag v1
      minecube publish --store cubes.zarr --icechunk releases --diff v1 v2

    \b
    An older release, opened:
      repository = icechunk.Repository.open(icechunk.local_filesystem_storage("releases"))
      xarray.open_zarr(repository.readonly_session(tag="v1").store, group="Germany_2", consolidated=False)
    """
    if sum(map(bool, (tag, diff, rollback))) > 1:
        raise click.UsageError("--tag, --diff and --rollback are three different things to do: give one of them")
    if tag:
        years = {name: list(cube.builds(store, name)) for name in stored_sites(store, wanted)}
        years = {name: found for name, found in years.items() if found}
        if not years:
            raise CubeError(
                f"{store}: no site-year of {str(wanted)!r} is committed, so there is nothing to publish; build first"
            )
        about = {name: export.lines(export.credits_of(cube.open_committed(store, name))) for name in years}
        root = zarr.open_group(zarr_store(store), mode="r", use_consolidated=False)
        site_years = sum(map(len, years.values()))
        changed = releasing.publish(root, years, place, tag, about)
        if changed is None:
            click.echo(f"{place}: {tag} already holds these {site_years} site-years; nothing was written")
            return
        written, gone = changed
        differed = f"{written} objects differed and were written" + (f", {gone} were removed" if gone else "")
        click.echo(f"{place}: {tag} holds {site_years} site-years; {differed}")
    elif diff:
        rows = releasing.differences(place, *diff)
        click.echo(table(("site", "year", "what differs"), rows) if rows else f"{diff[0]} and {diff[1]} are the same")
    elif rollback:
        releasing.rollback(place, rollback)
        click.echo(f"{place}: main is what it was at {rollback}")
    else:
        rows = releasing.releases(place)
        click.echo(table(("tag", "published", "snapshot"), rows) if rows else f"{place}: no release yet")
