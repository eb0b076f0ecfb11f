"""Subcommand publish: save a version of a store in Icechunk."""

from __future__ import annotations

import click

from minecube.cli.bars import progress_bar
from minecube.cli.options import StoreSites, collect_options, sites_option, store_option
from minecube.jobs.publish import publish_sites


@click.command()
@store_option
@sites_option
@click.option(
    "--icechunk",
    "place",
    required=True,
    help="Icechunk repository: a folder, or s3://bucket/prefix.",
)
@click.option("--tag", required=True, help="Name of the version. Tags are permanent.")
@collect_options
def publish(sites: StoreSites, place: str, tag: str) -> None:
    """Save the committed years of the sites in --sites as a version in Icechunk.

    `minecube versions` lists and compares versions, and goes back to one.

    \b
    Example:
      minecube publish --store cubes.zarr --icechunk releases --tag v1
    """
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
