"""Subcommand versions: list published versions, compare them, and go back."""

from __future__ import annotations

import click

from minecube.export import publish as releases
from minecube.jobs.tables import format_table
from minecube.jobs.versions import count_differences, group_differences


@click.command()
@click.argument("place")
@click.option(
    "--compare",
    nargs=2,
    metavar="OLD NEW",
    help="List the site-years in which two versions differ, one line each.",
)
@click.option(
    "--back-to",
    metavar="TAG",
    help="Make this version the current one: the repository's branch `main`. Later versions stay.",
)
def versions(place: str, compare: tuple[str, str] | None, back_to: str | None) -> None:
    """List the versions in the Icechunk repository PLACE: a folder, or s3://bucket/prefix.

    `minecube publish` and `minecube update --publish` save versions. Each is whole, and a reader
    of one version never sees another.

    \b
    Examples:
      minecube versions releases
      minecube versions releases --compare v1 v2
      minecube versions releases --back-to v1

    \b
    To open a version (branch="main" opens the current one):
      repository = icechunk.Repository.open(icechunk.local_filesystem_storage("releases"))
      xarray.open_zarr(repository.readonly_session(tag="v1").store, group="Germany_2", consolidated=False)
    """
    if compare and back_to:
        raise click.UsageError("--compare and --back-to are different things to do: give one")
    if compare:
        _print_differences(place, *compare)
    elif back_to:
        releases.roll_back(place, back_to)
        click.echo(f"{place}: main is what it was at {back_to}")
    else:
        _print_versions(place)


def _print_differences(place: str, old: str, new: str) -> None:
    differences = group_differences(releases.list_differences(place, old, new))
    if not differences:
        click.echo(f"{old} and {new} are the same")
        return
    rows = [(item.site, item.year, item.change, item.what) for item in differences]
    click.echo(format_table(("site", "year", "change", "what differs"), rows))
    click.echo(count_differences(differences))


def _print_versions(place: str) -> None:
    rows = releases.list_releases(place)
    if rows:
        click.echo(format_table(("tag", "published", "snapshot", "branch"), rows))
    else:
        click.echo(f"{place}: no version yet")
