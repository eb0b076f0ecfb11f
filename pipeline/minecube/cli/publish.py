"""Subcommand publish: save releases of a store in Icechunk."""

from __future__ import annotations

import click

from minecube.cli.bars import progress_bar
from minecube.cli.options import StoreSites, collect_options, sites_option, store_option
from minecube.export import publish as releases
from minecube.jobs.publish import publish_sites
from minecube.jobs.tables import format_table


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
@click.option(
    "--rollback",
    metavar="TAG",
    help="Set the repository's branch `main` back to this tag. Later tags stay.",
)
@collect_options
def publish(
    sites: StoreSites,
    place: str,
    tag: str | None,
    diff: tuple[str, str] | None,
    rollback: str | None,
) -> None:
    """Save releases of a store in Icechunk, list them, and compare them.

    A release holds the committed years of the sites in --sites. Without --tag, --diff and
    --rollback, the releases are listed.

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
        _publish(sites, place, tag)
    elif diff:
        _print_differences(place, *diff)
    elif rollback:
        releases.roll_back(place, rollback)
        click.echo(f"{place}: main is what it was at {rollback}")
    else:
        _print_releases(place)


def _publish(sites: StoreSites, place: str, tag: str) -> None:
    with progress_bar("publishing objects") as bar:
        published = publish_sites(
            sites.store, sites.names(), str(sites.choice), place, tag, bar.reach
        )
    if published.changes is None:
        click.echo(
            f"{place}: {tag} already holds these {published.site_years} site-years; "
            "nothing was written"
        )
        return
    changed, removed = published.changes
    changes = f"{changed} objects differed and were written"
    if removed:
        changes += f", {removed} were removed"
    click.echo(f"{place}: {tag} holds {published.site_years} site-years; {changes}")


def _print_differences(place: str, old: str, new: str) -> None:
    rows = releases.list_differences(place, old, new)
    if rows:
        click.echo(format_table(("site", "year", "what differs"), rows))
    else:
        click.echo(f"{old} and {new} are the same")


def _print_releases(place: str) -> None:
    rows = releases.list_releases(place)
    if rows:
        click.echo(format_table(("tag", "published", "snapshot"), rows))
    else:
        click.echo(f"{place}: no release yet")
