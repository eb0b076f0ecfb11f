"""Subcommand publish: save releases of a store in Icechunk."""

from __future__ import annotations

import click
import zarr

from minecube import cube, export
from minecube.cli.common import SiteChoice, sites_option, store_option, stored_sites, table
from minecube.errors import CubeError
from minecube.export import publish as releasing


@click.command()
@store_option
@sites_option
@click.option(
    "--icechunk",
    "place",
    required=True,
    help="Icechunk repository: a folder, or s3://bucket/prefix.",
)
@click.option("--tag", help="Save the store's current state under this name. Tags are permanent.")
@click.option(
    "--diff",
    nargs=2,
    metavar="OLD NEW",
    help="List the site-years and variables in which two tags differ.",
)
@click.option("--rollback", metavar="TAG", help="Reset `main` to this tag. Later tags stay.")
def publish(
    store: cube.Store,
    wanted: SiteChoice,
    place: str,
    tag: str | None,
    diff: tuple[str, str] | None,
    rollback: str | None,
) -> None:
    """Save releases of a store in Icechunk, list them, and compare them.

    A release holds the committed years of the named sites only. Without --tag, the releases are listed.

    \b
    Examples:
      minecube publish --store cubes.zarr --icechunk releases --tag v1
      minecube publish --store cubes.zarr --icechunk releases --diff v1 v2

    \b
    To open an older release:
      repository = icechunk.Repository.open(icechunk.local_filesystem_storage("releases"))
      xarray.open_zarr(repository.readonly_session(tag="v1").store, group="Germany_2", consolidated=False)
    """
    if sum(map(bool, (tag, diff, rollback))) > 1:
        raise click.UsageError(
            "--tag, --diff and --rollback are three different things to do: give one of them"
        )
    if tag:
        years = {name: list(cube.builds(store, name)) for name in stored_sites(store, wanted)}
        years = {name: found for name, found in years.items() if found}
        if not years:
            raise CubeError(
                f"{store}: no site-year of {str(wanted)!r} is committed, so there is nothing to publish; build first"
            )
        about = {
            name: export.lines(export.credits_of(cube.open_committed(store, name)))
            for name in years
        }
        root = zarr.open_group(store.open_zarr(), mode="r", use_consolidated=False)
        site_years = sum(map(len, years.values()))
        changed = releasing.publish(root, years, place, tag, about)
        if changed is None:
            click.echo(
                f"{place}: {tag} already holds these {site_years} site-years; nothing was written"
            )
            return
        written, gone = changed
        differed = f"{written} objects differed and were written" + (
            f", {gone} were removed" if gone else ""
        )
        click.echo(f"{place}: {tag} holds {site_years} site-years; {differed}")
    elif diff:
        rows = releasing.differences(place, *diff)
        click.echo(
            table(("site", "year", "what differs"), rows)
            if rows
            else f"{diff[0]} and {diff[1]} are the same"
        )
    elif rollback:
        releasing.rollback(place, rollback)
        click.echo(f"{place}: main is what it was at {rollback}")
    else:
        rows = releasing.releases(place)
        click.echo(
            table(("tag", "published", "snapshot"), rows) if rows else f"{place}: no release yet"
        )
